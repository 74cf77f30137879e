"""Attention and the optimizer beside the floor of their bytes and FLOPs, at rates measured in the same run."""

import argparse
import dataclasses
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import train_gpt as ours
from tools.bench.table import Row


class Machine:
    """A device, what it is timed with, and the two rates of every floor here.

    The rates are bytes per second of a large copy and FLOPs per second of a large product.
    """

    def __init__(self, device: torch.device):
        torch.manual_seed(0)
        torch.set_float32_matmul_precision("high")
        self.device, self.gpu = device, device.type == "cuda"
        self.dtype = torch.bfloat16 if self.gpu else torch.float32
        self.flops, self.unit = (1e12, "TFLOP/s") if self.gpu else (1e9, "GFLOP/s")
        size, side = (2**30, 8192) if self.gpu else (2**26, 1024)
        source, target = (torch.zeros(size, dtype=torch.int8, device=device) for _ in range(2))
        a, b = self.randn(side, side), self.randn(side, side)
        self.copy_rate = 2 * size / self.seconds(lambda: target.copy_(source))
        self.product_rate = 2 * side**3 / self.seconds(lambda: a @ b)
        name = torch.cuda.get_device_name() if self.gpu else f"CPU, {torch.get_num_threads()} thread(s)"
        print(
            f"{name}, torch {torch.__version__}: copy {self.copy_rate / 1e9:,.1f} GB/s, "
            f"{side:,}-cubed product of {str(self.dtype)[6:]} {self.product_rate / self.flops:,.1f} {self.unit}"
        )

    def randn(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=self.device).to(self.dtype)

    def seconds(self, function: Callable[[], object]) -> float:
        """Median seconds of a call.

        On a GPU between two events, queued behind a kernel that sleeps some 10 ms: training, too, launches ahead.
        """
        if self.gpu:
            for _ in range(3):
                function()
            events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(15)]
            for start, end in events:
                torch.cuda._sleep(20_000_000)
                start.record()
                function()
                end.record()
            torch.cuda.synchronize()
            return statistics.median(start.elapsed_time(end) for start, end in events) / 1e3
        function()
        taken = []
        for _ in range(3):
            started = time.perf_counter()
            function()
            taken.append(time.perf_counter() - started)
        return statistics.median(taken)

    def floor(self, moved: float, flops: float) -> float:
        """Seconds of so many bytes and FLOPs, one after the other."""
        return moved / self.copy_rate + flops / self.product_rate


# ---------------------------------------------------------------- attention


def documents(cfg: ours.Config) -> tuple[ours.Seq, str]:
    """One micro-batch of packed documents and where it is from.

    That is the training stream, or, without one, lengths like those of web text.
    """
    span, tokens = cfg.train_seq_len, cfg.micro_batch_tokens
    if ours.find_shards(Path(cfg.data_path), "fineweb_train_*.bin", required=False):
        return ours.TrainStream(cfg).micro_batch(0, tokens, span).seq, f"the first micro-batch of {cfg.data_path}"
    lengths = 1 + np.random.default_rng(0).lognormal(np.log(500), 1.1, tokens).astype(np.int64)
    starts = np.cumsum(lengths) - lengths
    return ours.Seq.packed(starts[starts < tokens], span, span, tokens), "random lengths"


def causal_pairs(cu: torch.Tensor, window: int = -1) -> int:
    """(query, key) pairs that causal attention inside the sequences looks at, ``window`` tokens back (-1: all)."""
    lengths = cu.diff().long()
    beyond = (lengths - 1 - window).clamp(min=0) if window >= 0 else 0 * lengths
    return int((lengths * (lengths + 1) // 2 - beyond * (beyond + 1) // 2).sum())


def backends(cfg: ours.Config, device: torch.device) -> Iterator[str]:
    """Those that load here and agree with the reference; on a CPU that is the reference alone."""
    for name in ours.BACKENDS:
        try:
            if ours.choose_attention(dataclasses.replace(cfg, attention=name), device) == name:
                yield name
        except ours.UserError as e:
            print(e)


def attention(args: argparse.Namespace) -> Iterator[Row]:
    """Each attention backend that works here, forward and backward, on packed documents at the model's head shapes.

    Ratio: its FLOP/s over a large matrix product's. FLOPs are those of the causal pairs inside documents: two products
    forward, five backward. Each runs with the model's K/V heads and with one for each query head. The documents are
    the first of DATA_PATH, or of random lengths.
    """
    cfg = ours.Config.from_env(os.environ)
    machine = Machine(ours.Ranks(cfg).device)
    cfg = dataclasses.replace(cfg, micro_batch_tokens=args.tokens or (cfg.micro_batch_tokens if machine.gpu else 4096))
    seq, origin = documents(cfg)
    cu = seq.cu_q.to(machine.device)
    windows = [-1, cfg.attn_window] if cfg.attn_window else [-1]
    print(
        f"{cfg.micro_batch_tokens:,} tokens, {len(cu) - 1:,} sequences of at most {cfg.train_seq_len:,}, "
        f"{causal_pairs(cu):,} causal pairs: {origin}"
    )
    heads, width = cfg.num_heads, cfg.model_dim // cfg.num_heads
    for name in backends(cfg, machine.device):
        forward, backward = ours.BACKENDS[name]
        for kv in sorted({cfg.num_kv_heads, heads}):
            qkv = machine.randn(cfg.micro_batch_tokens, heads + 2 * cfg.num_kv_heads, width)
            q, k, v = (t.contiguous() for t in qkv.split((heads, cfg.num_kv_heads, cfg.num_kv_heads), 1))
            dout = machine.randn(*q.shape)
            if kv > cfg.num_kv_heads:
                k, v = (t.repeat_interleave(kv // cfg.num_kv_heads, 1) for t in (k, v))
            for window in windows:
                where = (cu, cu, seq.max_q, seq.max_k, window)
                out, lse = forward(q, k, v, *where)
                calls = (
                    ("forward", 4, lambda: forward(q, k, v, *where)),
                    ("backward", 10, lambda: backward(dout, q, k, v, out, lse, *where)),
                )
                for direction, products, call in calls:
                    seconds, flops = machine.seconds(call), products * heads * width * causal_pairs(cu, window)
                    reach = "all" if window < 0 else f"{window} tokens"
                    yield Row(
                        direction,
                        f"{name}, {heads} heads, {kv} of K/V, {reach} back",
                        seconds,
                        machine.floor(0, flops) / seconds,
                        flops / machine.flops,
                        machine.unit,
                    )


# ---------------------------------------------------------------- optimizer


class Part(NamedTuple):
    """One part of a step: the least bytes that it must read and write, its FLOPs, and a call of it that can be
    repeated."""

    name: str
    moved: int
    flops: int
    call: Callable[[], object]


def orthogonalize_flops(groups: list[ours.MuonGroup], iterations: int) -> int:
    """Of three products per iteration: x xT, its square, and their sum by x, with the shorter side first."""
    sides = [(g.shard, *sorted((g.rows, g.cols))) for g in groups]
    return iterations * sum(n * (4 * short * short * long + 2 * short**3) for n, short, long in sides)


def step_parts(optimizer: ours.Optimizer) -> list[Part]:
    """The whole step on one rank, then what it consists of.

    Each has random gradients inside the clipping norm, so that repeats change no magnitude.
    """
    o, cfg = optimizer, optimizer.cfg
    grads = [torch.randn_like(p) for p in o.parameters]
    norm = torch.stack(torch._foreach_norm(grads)).norm()
    torch._foreach_mul_(grads, (cfg.grad_clip_norm or 1.0) / 2 / norm)

    def with_gradients(call: Callable[[], object]) -> Callable[[], object]:
        def run():
            for p, grad in zip(o.parameters, grads):  # the step forgets them
                p.grad = grad
            return call()

        return run

    def reduce():
        shards = [ours.arrived(*group.reduce_scatter()) for group in o.muon]
        small_grads = [p.grad for p in o.small]
        clip = ours.clip_factor(shards, small_grads, cfg.grad_clip_norm or math.inf, o.ranks)
        torch._foreach_mul_(small_grads, clip)
        return [shard * clip.to(shard.dtype) for shard in shards]

    shards = with_gradients(reduce)()
    coefficients = ours.MUON_COEFFICIENTS[cfg.muon_coefficients]
    updates = [ours.orthogonalize(shard, coefficients) for shard in shards]
    muon, small, wide = sum(s.numel() for s in shards), sum(p.numel() for p in o.small), shards[0].element_size()
    everything, flops = 4 * (muon + small), orthogonalize_flops(o.muon, len(coefficients))
    parts = [
        Part("gradients: cast, norm, clip", everything + wide * muon + 4 * small, 0, with_gradients(reduce)),
        # momentum 0 leaves the shard, which `direction` writes into, as it is
        Part(
            "Muon: momentum, rows, orthogonalise",
            4 * wide * muon,
            flops,
            lambda: [ours.muon_direction(g.momentum, shard, 0.0, coefficients) for g, shard in zip(o.muon, shards)],
        ),
        Part("Adam: embedding, vectors, scalars", 7 * 4 * small, 0, with_gradients(o.adam.step)),
        Part(
            "Muon: weights",
            (wide + 8) * muon,
            0,
            lambda: [g.apply_(u, cfg.matrix_lr, cfg.muon_wd) for g, u in zip(o.muon, updates)],
        ),
    ]
    if o.average:
        parts.append(
            Part(
                "average of the weights",
                3 * everything,
                0,
                lambda: torch._foreach_lerp_(o.average, o.parameters, 1 - cfg.ema_decay),
            )
        )
    whole = Part("Optimizer.step", sum(p.moved for p in parts), flops, with_gradients(lambda: o.step(0, 1.0)))
    alone = Part(
        "of Muon: orthogonalise",
        2 * wide * muon,
        flops,
        lambda: [ours.orthogonalize(shard, coefficients) for shard in shards],
    )
    return [whole, *parts, alone]


@torch.no_grad()
def optimizer(args: argparse.Namespace) -> Iterator[Row]:
    """A step of the optimizer on one rank and each of its parts by itself, with random gradients.

    Ratio: the floor of its bytes and FLOPs over its time. The floor is the time of the bytes that must be read and
    written at the rate of a large copy, plus that of the FLOPs at the rate of a large matrix product. A model small
    enough for a cache can be faster.
    """
    cfg = ours.Config.from_env(os.environ)
    ranks = ours.Ranks(cfg)
    machine = Machine(ranks.device)
    model = ours.GPT(cfg, "reference", machine.dtype).to(ranks.device)
    model.init_weights(cfg.seed)
    for part in step_parts(ours.Optimizer(model, cfg, ranks)):
        seconds = machine.seconds(part.call)
        work = f"{part.moved / 1e6:,.0f} MB" + (f", {part.flops / 1e9:,.0f} GFLOP" if part.flops else "")
        amount, unit = (part.flops / machine.flops, machine.unit) if part.flops else (part.moved / 1e9, "GB/s")
        yield Row(work, part.name, seconds, machine.floor(part.moved, part.flops) / seconds, amount, unit)
