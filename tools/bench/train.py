"""Step time and loss of our script and of a public one (#1855) beside it, on the same batches, on one GPU.

Losses are compared where the two are the same network and begin with the same weights: NUM_HEADS=8 NUM_KV_HEADS=4
ROPE_DIMS=16 ATTN_WINDOW=0.
"""

import argparse
import importlib.util
import math
import os
import statistics
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

import train_gpt as ours
from tools.bench.table import Row

BLOCK = 5


def opaque_attention(backend: str):
    """Our backend as an operator that torch.compile does not look into, as the public script's own FlashAttention-3
    is."""
    forward, backward = ours.BACKENDS[backend]

    @torch.library.custom_op("bench::attention", mutates_args=())
    def attention(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu: torch.Tensor, longest: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return forward(q, k, v, cu, cu, longest, longest, -1)

    @torch.library.custom_op("bench::attention_gradient", mutates_args=())
    def gradient(
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        cu: torch.Tensor,
        longest: int,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return tuple(backward(dout.contiguous(), q, k, v, out, lse, cu, cu, longest, longest, -1)[:3])

    def context(ctx, inputs, output):
        *tensors, ctx.longest = inputs
        ctx.save_for_backward(*tensors[:3], *output, tensors[3])
        ctx.mark_non_differentiable(output[1])

    attention.register_fake(
        lambda q, k, v, cu, longest: (*ours.empty_like(q), q.new_empty(q.size(1), q.size(0), dtype=torch.float32))
    )
    gradient.register_fake(lambda dout, q, k, v, *_: ours.empty_like(q, k, v))
    attention.register_autograd(
        lambda ctx, dout, _: (*gradient(dout, *ctx.saved_tensors, ctx.longest), None, None), setup_context=context
    )
    return attention


def import_public(path: Path, settings: Path | None, backend: str):
    """Import a published train_gpt.py from its folder, with KEY=VALUE words of ``settings`` in the environment; its
    FlashAttention-3 calls go to the same operator as ours."""
    words = (
        [w for line in settings.read_text().splitlines() if not line.startswith("#") for w in line.split()]
        if settings
        else []
    )
    os.environ.update(w.split("=", 1) for w in words)
    module, attention = types.ModuleType("flash_attn_interface"), opaque_attention(backend)

    def varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal=True, window_size=(-1, -1)):
        return attention(q, k, v, cu_seqlens_q, max_seqlen_q)[0]

    module.flash_attn_varlen_func = varlen
    module.flash_attn_func = None
    sys.modules["flash_attn_interface"] = module
    sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location("public_train_gpt", path)
    public = importlib.util.module_from_spec(spec)
    sys.modules["public_train_gpt"] = public
    spec.loader.exec_module(public)
    public.BOS_ID = 1  # its loader would set it
    return public


class OurSide:
    name = "ours"

    def __init__(self, cfg, ranks, backend):
        self.cfg = cfg
        self.model = ours.GPT(cfg, backend, torch.bfloat16).to(ranks.device)
        self.model.init_weights(cfg.seed)
        self.optimizer = ours.Optimizer(self.model, cfg, ranks)

    def step(self, step, batches, looped):
        total = torch.zeros((), device="cuda")
        for batch in batches:
            part = ours.batch_loss(self.model, batch, self.cfg.train_batch_tokens, looped)
            part.backward()
            total += part.detach()
        self.optimizer.step(step, 1.0)
        return total


class PublicSide:
    """#1855's step_fn and per-step EMA, restated around its own model and optimizers."""

    name = "public"

    def __init__(self, public, mine: OurSide):
        self.h = h = public.Hyperparameters()
        h.distributed, h.world_size, h.rank, h.is_main_process = False, 1, 0, True
        self.public = public
        self.base = public.GPT(h).to("cuda").bfloat16()
        public.restore_fp32_params(self.base)
        parameters = [sum(p.numel() for p in model.parameters()) for model in (self.base, mine.model)]
        self.same = parameters[0] == parameters[1] and mine.cfg.attn_window == 0 and mine.cfg.rope_dims == 16
        if self.same:  # the same network begins with the same weights
            self.copy_weights(mine.model)
        for block in self.base.blocks:  # its training loop fills the rotary cache before compiling
            block.attn.rotary(mine.cfg.micro_batch_tokens, torch.device("cuda"), torch.bfloat16)
        self.model = torch.compile(self.base, dynamic=False, fullgraph=True)
        self.optimizers = public.Optimizers(h, self.base)
        self.clipped = [p for p in self.base.parameters() if p.requires_grad]
        self.average = [(t.detach().float().clone(), t) for t in self.base.state_dict(keep_vars=True).values()]

    @torch.no_grad()
    def copy_weights(self, model):
        q, k = model.q_dim, model.q_dim + model.kv_dim
        self.base.tok_emb.weight.copy_(model.tok_emb)
        self.base.qo_bank.copy_(torch.cat((model.qkv[:, :q], model.o)))
        self.base.kv_bank.copy_(torch.cat((model.qkv[:, q:k], model.qkv[:, k:])))
        self.base.mlp_up_bank.copy_(model.up)
        self.base.mlp_down_bank.copy_(model.down)

    def step(self, step, batches, looped):
        h = self.h
        self.base.looping_active = looped
        total = torch.zeros((), device="cuda")
        for batch in batches:
            torch._dynamo.mark_dynamic(
                batch.seq.cu_q, 0
            )  # else its graph is compiled anew for every number of documents
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                loss = self.model(
                    batch.tokens[None], batch.targets[None], cu_seqlens=batch.seq.cu_q, max_seqlen=h.train_seq_len
                )
            total += loss.detach() / len(batches)
            (loss / len(batches)).backward()
        warm = min(step / h.muon_momentum_warmup_steps, 1.0)
        for group in self.optimizers.optimizer_muon.param_groups:
            group["momentum"] = (1 - warm) * h.muon_momentum_warmup_start + warm * h.muon_momentum
        torch.nn.utils.clip_grad_norm_(self.clipped, h.grad_clip_norm)
        self.optimizers.step(distributed=False)
        with torch.no_grad():
            for average, p in self.average:
                average.mul_(h.ema_decay).add_(p.detach(), alpha=1 - h.ema_decay)
        return total


def side_by_side(cfg, ranks, backend, stream, public, looped: bool, steps: int):
    """Both sides over the same batches, from the same fresh weights where they are the same network; BLOCK steps in a
    row, as in training, where nothing waits for the GPU between two steps. Returns sides, losses, seconds of a step in
    each block but the first, seconds of the first block."""
    torch.compiler.reset()
    mine = OurSide(cfg, ranks, backend)
    sides = [mine] + ([PublicSide(public, mine)] if public else [])
    losses, seconds, first = ({side.name: [] for side in sides} for _ in range(3))
    for block in range(steps // BLOCK):
        batches = {
            step: [ours.to_device(b, ranks.device) for b in stream.step(step, cfg.train_seq_len, 0, 1)]
            for step in range(block * BLOCK, (block + 1) * BLOCK)
        }
        for side in sides if block % 2 else sides[::-1]:  # in turns, so that a slower GPU slows both
            torch.cuda.synchronize()
            begun = time.perf_counter()
            found = [side.step(step, batch, looped) for step, batch in batches.items()]
            torch.cuda.synchronize()
            (seconds if block else first)[side.name].append((time.perf_counter() - begun) / (BLOCK if block else 1))
            losses[side.name] += [loss.item() for loss in found]
    return sides, losses, seconds, first


def print_losses(mode: str, losses: dict[str, list[float]]):
    pairs = list(zip(losses["ours"], losses["public"]))
    print(f"{mode}: loss of ours and of the public script by step")
    print("  " + "  ".join(f"{i}: {a:.4f} {b:.4f}" for i, (a, b) in enumerate(pairs) if i < 10 or i % 5 == 4))
    differences = [a - b for a, b in pairs]
    print(
        f"  mean |difference| {statistics.mean(map(abs, differences)):.5f}, mean {statistics.mean(differences):+.5f}, "
        f"of the last ten {statistics.mean(differences[-10:]):+.5f}"
    )


def train(args: argparse.Namespace) -> Iterator[Row]:
    """Step time and loss of the plain and the looped graph on one GPU, optimizer included.

    Settings come from the environment as in training. Ratio: to the public script, where one is given.
    """
    steps = args.steps
    if steps < 2 * BLOCK:
        raise SystemExit(f"--steps {steps}: at least {2 * BLOCK} are needed, since the first {BLOCK} are not timed")
    cfg = ours.Config.from_env(os.environ)
    ranks = ours.Ranks(cfg)
    torch.set_float32_matmul_precision("high")
    backend = ours.choose_attention(cfg, ranks.device)
    public = import_public(args.public.resolve(), args.public_settings, backend) if args.public else None
    stream = ours.TrainStream(cfg)
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, attention {backend}, "
        f"{cfg.train_batch_tokens:,} tokens a step in micro-batches of {cfg.micro_batch_tokens:,}"
    )
    for looped in (False, True):
        mode = "looped" if looped else "plain"
        sides, losses, seconds, first = side_by_side(cfg, ranks, backend, stream, public, looped, steps)
        medians = {side.name: statistics.median(seconds[side.name]) for side in sides}
        for side in sides:
            print(f"{mode}: {side.name} sets up and runs its first {BLOCK} steps in {first[side.name][0]:.1f} s")
            ratio = medians.get("public", medians["ours"]) / medians[side.name]
            yield Row(mode, side.name, medians[side.name], ratio, cfg.train_batch_tokens / 1e6, "Mtok/s")
        if public and sides[-1].same:
            print_losses(mode, losses)
        del sides
        torch.cuda.empty_cache()


def protocol(args: argparse.Namespace) -> Iterator[Row]:
    """BPB of trained weights in the windows of #1855's own diagnostic.

    It cuts the stream every 65,536 tokens and drops its last batch. Printed; there is no table.
    """
    for folder in args.runs:
        print(published_protocol(folder))
    yield from ()


@torch.no_grad()
def published_protocol(folder: Path) -> str:
    """BPB of a run's trained weights as #1855's own diagnostic counts it, one line.

    Its buffers of 65,536 tokens cut documents once more, and its last, incomplete batch is dropped.
    """
    arrays, meta = ours.read_trained(folder / "trained.npz")
    cfg = ours.Config.from_env(os.environ, stored=meta["settings"])
    ranks = ours.Ranks(cfg)
    torch.set_float32_matmul_precision("high")
    val = ours.ValidationStream(cfg)
    model = ours.GPT(
        cfg, ours.choose_attention(cfg, ranks.device), torch.bfloat16 if ranks.device.type == "cuda" else torch.float32
    ).to(ranks.device)
    ours.load_state(model, {name: torch.from_numpy(a) for name, a in arrays.items()}, folder)
    limit, nats = val.targets // 65536 * 65536, np.full(val.targets, np.nan)
    starts = np.unique(np.concatenate([val.starts[val.starts < limit], np.arange(0, limit, 65536)]))
    for buffer in ours.group_windows(
        ours.plan_windows(starts, limit, cfg.eval_seq_len, cfg.eval_seq_len), cfg.val_batch_tokens
    ):
        batch, places, targets = ours.window_batch(val, buffer, cfg)
        batch = ours.to_device(batch, ranks.device)
        hidden = model.trunk(batch.tokens, batch.seq, looped=cfg.looped)
        scores = model.nll(hidden, batch.targets.clamp(min=0)).nats
        nats[targets] = scores[torch.from_numpy(places).to(scores.device)].double().cpu().numpy()
    bpb = nats[:limit].sum() / math.log(2) / val.target_bytes[:limit].sum(dtype=np.int64)
    return f"{folder}: {bpb:.5f} BPB on {limit:,} of {val.targets:,} targets"
