"""Bytes of a model file beside general compressors, and what quantisation costs at equal bytes, method by method."""

import argparse
import dataclasses
import lzma
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import train_gpt as ours
from tools.bench.table import Row
from tools.lease import Documents, space_and_operators

PUBLISHED = dict(
    rate_distortion=False,
    mlp_clip_sigmas=11.5,
    attn_clip_sigmas=13.0,
    embed_clip_sigmas=14.0,
    matrix_bits=6,
    embed_bits=7,
)
METHODS = {  # the first gives the size that all must have
    "published: sigmas, LQER, AWQ": dict(
        PUBLISHED, lqer_enabled=True, lqer_top_k=3, lqer_rank=4, awq_lite_enabled=True
    ),
    "ours": dict(trellis=True),
    "ours, uniform grid": dict(trellis=False),
    "ours, rows alike": dict(rate_rows=0.0, rate_embed_rows=0.0),
    "ours, columns alike": dict(rate_columns=0.0),
    "ours, matrices only": dict(rate_rows=0.0, rate_embed_rows=0.0, rate_columns=0.0),
    "published sigmas": PUBLISHED,
    "published sigmas, LQER": dict(PUBLISHED, lqer_enabled=True),
    "published sigmas, AWQ": dict(PUBLISHED, awq_lite_enabled=True),
    "ours + logit calibration": dict(logit_calibration_enabled=True),
    "ours, rows by 1": dict(rate_rows=1.0),
    "ours, rows by 0.5": dict(rate_rows=0.5),
    "ours, embedding rows by 0.25": dict(rate_embed_rows=0.25),
    "ours, embedding rows by 0.75": dict(rate_embed_rows=0.75),
    "ours, embedding rows alike": dict(rate_embed_rows=0.0),
}


# ---------------------------------------------------------------- codec


def similar_rows(q: np.ndarray) -> np.ndarray:
    """#1855's order of rows: from row 0, always the unused one at the smallest L1 distance."""
    left, order = np.arange(1, len(q)), [0]
    wide = q.astype(np.int16)
    while len(left):
        nearest = int(np.abs(wide[left] - wide[order[-1]]).sum(1, dtype=np.int32).argmin())
        order.append(int(left[nearest]))
        left = np.delete(left, nearest)
    return np.array(order, np.uint16)


def zpaq(data: bytes) -> bytes:
    """lrzip -z -L 9."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "stream")
        path.write_bytes(data)
        subprocess.run(["lrzip", "-q", "-z", "-L", "9", str(path)], check=True, stdout=subprocess.DEVNULL)
        return path.with_suffix(".lrz").read_bytes()


def published_streams(arrays: dict[str, np.ndarray], settings: dict) -> tuple[list[bytes], bytes, bytes]:
    """Symbols as #1855's "pergroup" lays them out: a transposed stream for each kind, rows of tok_emb, q and up sorted;
    the rest; the permutations."""
    head = settings["model_dim"] // settings["num_heads"]
    q, kv = settings["num_heads"] * head, settings["num_kv_heads"] * head
    cuts = {
        "tok_emb": [("tok_emb", slice(None))],
        "k": [("qkv", slice(q, q + kv))],
        "q": [("qkv", slice(q))],
        "v": [("qkv", slice(q + kv, None))],
        "o": [("o", slice(None))],
        "up": [("up", slice(None))],
        "down": [("down", slice(None))],
    }
    streams, orders = [], []
    for kind, ((name, rows),) in cuts.items():
        parts = []
        for key, a in arrays.items():
            if key.startswith(f"{name}.") and key.endswith(".symbols"):
                part = a[rows]
                if kind in ("tok_emb", "q", "up"):
                    orders.append(similar_rows(part))
                    part = part[orders[-1]]
                parts.append(np.ascontiguousarray(part.T).tobytes())
        streams.append(b"".join(parts))
    rest = b"".join(a.tobytes() for key, a in arrays.items() if not key.endswith(".symbols"))
    return streams, rest, b"".join(o.tobytes() for o in orders)


def codec(args: argparse.Namespace) -> Iterator[Row]:
    """Bytes and seconds of a model file's tensors by our coder and by general compressors; ratio: bytes over ours.

    The others are brotli 11, LZMA and, where it is installed, lrzip's zpaq over sorted rows.
    """
    sizes = list(coded_sizes(args.artifact))
    for variant, size, seconds in sizes:
        yield Row(f"{size:,} bytes", variant, seconds, size / sizes[0][1])


def coded_sizes(path: Path) -> Iterator[tuple[str, int, float]]:
    """Yields (variant, bytes, seconds): the tensors of a model file by our coder and by others."""
    import brotli

    arrays, meta = ours.load_artifact(path)
    begun = time.perf_counter()
    data = ours.encode_artifact(arrays, {})
    yield "ours, encode", len(data), time.perf_counter() - begun
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "model.bin")
        copy.write_bytes(data)
        begun = time.perf_counter()
        again = ours.load_artifact(copy)[0]
        seconds = time.perf_counter() - begun
    if any(again[name].tobytes() != a.tobytes() for name, a in arrays.items()):
        raise SystemExit(f"{path}: does not come back as it was")
    yield "ours, decode", len(data), seconds
    raw = b"".join(a.tobytes() for a in arrays.values())
    for name, compress in (
        ("brotli 11", lambda d: brotli.compress(d, quality=11, lgwin=24)),
        ("lzma 9e", lambda d: lzma.compress(d, preset=9 | lzma.PRESET_EXTREME)),
    ):
        begun = time.perf_counter()
        yield name, len(compress(raw)), time.perf_counter() - begun
    if shutil.which("lrzip"):
        begun = time.perf_counter()
        streams, rest, orders = published_streams(arrays, meta["settings"])
        size = sum(len(zpaq(s)) for s in streams) + sum(
            len(brotli.compress(d, quality=11, lgwin=24)) for d in (rest, orders)
        )
        yield "lrzip -z -L 9, rows sorted", size, time.perf_counter() - begun


# ---------------------------------------------------------------- quant


class Score(NamedTuple):
    """BPB of all validation documents that were scored whole, and of their halves A and B."""

    all: float
    a: float
    b: float

    def less(self, other: "Score") -> "Score":
        return Score(*(mine - yours for mine, yours in zip(self, other, strict=True)))

    def __str__(self):
        return f"{self.all:+.5f} BPB (A {self.a:+.5f}, B {self.b:+.5f})"


class Lab:
    """A run's trained weights, their Hessians, and scores of what quantisation makes of them."""

    def __init__(self, trained: Path):
        arrays, meta = ours.read_trained(trained)
        known = {f.name for f in dataclasses.fields(ours.Config)}
        stored = {"attn_window": 0} | meta["settings"]  # weights older than that setting were trained without windows
        self.cfg = ours.Config.from_env(os.environ, stored={k: v for k, v in stored.items() if k in known})
        self.ranks = ours.Ranks(self.cfg)
        torch.set_float32_matmul_precision("high")
        self.backend = ours.choose_attention(self.cfg, self.ranks.device)
        self.model, self.scored = self.new_model(), self.new_model()
        ours.load_state(self.model, {name: torch.from_numpy(a) for name, a in arrays.items()}, trained)
        self.stream, self.val = ours.TrainStream(self.cfg), ours.ValidationStream(self.cfg)
        self.documents = Documents(Path(self.cfg.data_path))
        if self.cfg.join_operators:
            self.documents = self.documents.joined(*space_and_operators(ours.tokenizer_path(self.cfg)))
        begun = self.now()
        self.hessians = ours.collect_hessians(self.model, self.stream, self.cfg, self.ranks)
        print(f"calibration {self.now() - begun:.1f} s", flush=True)
        self.weights = sum(p.numel() for p in self.model.parameters())
        self.trained_state = {name: p.detach() for name, p in self.model.named_parameters()}
        self.trained = self.score(self.trained_state)

    def now(self) -> float:
        self.ranks.synchronize()
        return time.perf_counter()

    def new_model(self, logit_calibration=None):
        dtype = torch.bfloat16 if self.ranks.device.type == "cuda" else torch.float32
        return ours.GPT(self.cfg, self.backend, dtype, logit_calibration).to(self.ranks.device)

    def score(self, state: dict, logit_values: np.ndarray | None = None) -> Score:
        model, device = self.scored, self.ranks.device
        if logit_values is not None:
            values, features = torch.from_numpy(logit_values).to(device), ours.piece_features(self.cfg).to(device)
            model = self.new_model(ours.to_logit_calibration(values, features))
        ours.load_state(model, state, "memory")
        ledger = ours.Ledger("bench", self.val.target_bytes, ours.Verdicts())
        log = lambda *_, **__: None
        scoring = ours.ScoringPass(model, self.cfg, self.ranks, log, self.val, ledger, ours.Progress())
        ours.score_stream(scoring)
        bits, size, in_b = self.documents.bits(ledger.nats), self.documents.bytes, self.documents.in_b
        whole = ~np.isnan(bits)
        return Score(*(bits[part].sum() / size[part].sum() for part in (whole, whole & ~in_b, whole & in_b)))

    def fitted(self, settings: dict, target: int) -> tuple["ours.Quantized", int, float]:
        """A quantised model within 0.05 % of `target` bytes (0: as the settings say), its size, and seconds of one
        quantisation, factors of the Hessians included."""
        cfg, saved, size = dataclasses.replace(self.cfg, **settings), 0.0, 0
        if target:
            cfg = dataclasses.replace(cfg, artifact_cap=target)
        for _ in range(4):
            begun = self.now()
            quantized = ours.Quantizer(self.model, self.hessians, cfg, self.ranks).quantize(saved)
            seconds = self.now() - begun
            if cfg.logit_calibration_enabled:
                ours.load_state(self.scored, quantized.state(), "memory")
                values = ours.fit_logit_calibration(self.scored, self.stream, cfg, self.ranks)
                quantized = quantized._replace(logit_calibration=values)
            size = len(ours.encode_artifact(ours.flatten(quantized), {"settings": cfg.settings()}))
            if not target or abs(size / target - 1) < 0.0005:
                break
            saved += 8 * (size - target) / self.weights
        return quantized, size, seconds


def quant(args: argparse.Namespace) -> Iterator[Row]:
    """BPB that each method of quantisation loses at the size of the published recipe.

    Ratio: its loss over the published one's; of GPTQ, its seconds over those of our batched solver.
    """
    rows = list(losses(args.trained, args.budget))
    published = next((lost.all for _, size, lost, _ in rows if size), 1.0)
    solver = rows[0][3]
    for method, size, lost, seconds in rows:
        if size:
            yield Row(f"{size:,} bytes, {lost}", method, seconds, lost.all / published)
        else:
            yield Row("solve", method, seconds, seconds / solver)


def losses(trained: Path, budget: float) -> Iterator[tuple[str, int, Score, float]]:
    """Yields (method, bytes, BPB lost, seconds of quantisation). Methods that would begin after ``budget`` seconds are
    left out."""
    began, target = time.perf_counter(), 0
    lab = Lab(trained)
    print(f"trained: {lab.trained.all:.5f} BPB (A {lab.trained.a:.5f}, B {lab.trained.b:.5f})", flush=True)
    yield from solve_times(lab)
    for name, settings in METHODS.items():
        if time.perf_counter() - began > budget:
            print(f"out of time before: {name}")
            break
        quantized, size, seconds = lab.fitted(settings, target)
        target = target or size
        lost = lab.score(quantized.state(), quantized.logit_calibration).less(lab.trained)
        print(f"{name:36s} {size:,} bytes  {lost}  {seconds:.1f} s", flush=True)
        yield name, size, lost, seconds


def where(args: argparse.Namespace) -> Iterator[Row]:
    """BPB that quantisation loses by kind, by layer and by both, everything else left as it was trained.

    Ratio: of the loss of all together."""
    lab = Lab(args.trained)
    begun = lab.now()
    quantized = ours.Quantizer(lab.model, lab.hessians, lab.cfg, lab.ranks).quantize(0.0)
    seconds = lab.now() - begun
    rounded = {name: tensor.to(lab.ranks.device) for name, tensor in quantized.state().items()}
    whole = lab.score(rounded).less(lab.trained)
    yield Row(f"{whole}", "all", seconds, 1.0)
    layers = range(len(rounded["down"]))
    kinds = [name for name in ours.MATRICES if name != "tok_emb"]
    parts = {name: [(name, slice(None))] for name in ours.MATRICES}
    parts |= {f"layer {layer}": [(name, [layer]) for name in kinds] for layer in layers}
    parts |= {f"{name} of layer {layer}": [(name, [layer])] for name in kinds for layer in layers}
    for part, places in parts.items():
        lost = lab.score(partly_rounded(lab.trained_state, rounded, places)).less(lab.trained)
        print(f"{part:20s} {lost}", flush=True)
        yield Row(f"{lost}", part, 0.0, lost.all / whole.all)


def partly_rounded(trained: dict, rounded: dict, places: list) -> dict:
    """The trained state with some layers of some matrices as quantised, and the scales that were folded into them."""
    state = dict(trained)
    for name, layers in places:
        scales = [scale for scale, matrix in ours.FOLDED.items() if matrix == name]
        for key in [name, *scales]:
            state[key] = state[key].clone()
            state[key][layers] = rounded[key][layers]
    return state


@torch.no_grad()
def column_by_column(
    w: torch.Tensor, h: torch.Tensor, step: torch.Tensor, limit: int, damping: float, block: int = 128
) -> torch.Tensor:
    """GPTQ of one matrix on the CPU as published scripts write it; no column's input is silent."""
    h = h + damping * h.diagonal().mean() * torch.eye(len(h))
    order = h.diagonal().argsort(descending=True)
    w, h = w[:, order].clone(), h[order][:, order]
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    q = torch.zeros_like(w)
    for lo in range(0, w.size(1), block):
        hi = min(lo + block, w.size(1))
        errors = torch.zeros(len(w), hi - lo)
        for j in range(lo, hi):
            q[:, j] = (w[:, j] / step).round().clamp(-limit, limit)
            errors[:, j - lo] = (w[:, j] - q[:, j] * step) / upper[j, j]
            w[:, j:hi] -= errors[:, j - lo, None] * upper[j, j:hi]
        w[:, hi:] -= errors @ upper[lo:hi, hi:]
    return q[:, order.argsort()]


def solve_times(lab: Lab):
    """Seconds of GPTQ for all matrices: batched on the device, and column by column on one CPU thread."""
    cfg = dataclasses.replace(lab.cfg, **PUBLISHED)
    quantizer = ours.Quantizer(lab.model, lab.hessians, cfg, lab.ranks)
    plan = quantizer.step_sizes(0.0)
    problems = [
        (quantizer.weights[name], lab.hessians[kind.hessian], plan[name], cfg.gptq_damping)
        for name, kind in ours.MATRICES.items()
    ]
    seconds = []
    for _ in range(2):  # the first loads libraries
        begun = lab.now()
        found = [ours.gptq(w, ours.error_feedback(h, damping), steps) for w, h, steps, damping in problems]
        seconds.append(lab.now() - begun)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    on_cpu = [(w.cpu(), h.cpu(), steps.row.cpu(), steps.limit, damping) for w, h, steps, damping in problems]
    begun = time.perf_counter()
    plain = [
        [column_by_column(w[i], h[i], step[i], limit, damping) for i in range(len(w))]
        for w, h, step, limit, damping in on_cpu
    ]
    cpu = time.perf_counter() - begun
    torch.set_num_threads(threads)
    same = sum(int((torch.stack(p) == f.cpu()).sum()) for p, f in zip(plain, found)) / sum(f.numel() for f in found)
    print(
        f"GPTQ of {sum(f.numel() for f in found):,} weights: batched on {lab.ranks.device.type} {seconds[-1]:.2f} s, "
        f"column by column on one CPU thread {cpu:.2f} s, ratio {cpu / seconds[-1]:.1f}; {same:.2%} of the symbols "
        "equal",
        flush=True,
    )
    yield "GPTQ, batched", 0, 0.0, seconds[-1]
    yield "GPTQ, CPU column by column", 0, 0.0, cpu
