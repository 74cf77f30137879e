"""The Triton kernels on one GPU, against torch.compile of their references, cuBLAS, and the floor of bytes and FLOPs.

Medians of CUDA-event times on random data. Each timed call is queued behind a sleeping kernel, so that launches are not
part of it. Floors use the rates measured here first: device copy for bytes, an 8,192-cubed bf16 product for FLOPs.
"""

import argparse
from collections.abc import Iterator

import torch
import torch.nn.functional as F

import train_gpt as K
from tools.bench.parts import Machine
from tools.bench.table import Row

T, D, HIDDEN, V, H, KV, HEAD = 98_304, 512, 2048, 8192, 4, 2, 128
TILES = {  # BLOCK_M, BLOCK_N, BLOCK_K, warps, stages, programs per multiprocessor
    "forward": [
        (128, 128, 64, 8, 3, 2),
        (128, 128, 64, 4, 3, 2),
        (128, 256, 64, 8, 4, 1),
        (128, 128, 32, 8, 6, 2),
        (64, 256, 64, 4, 2, 2),
    ],
    "backward": [
        (128, 128, 32, 4, 5, 2),
        (128, 128, 32, 8, 5, 2),
        (128, 128, 64, 8, 2, 2),
        (128, 256, 64, 8, 3, 1),
        (64, 256, 32, 4, 4, 2),
    ],
}


def randn(*shape, scale=1.0, dtype=torch.bfloat16):
    return (torch.randn(*shape, device="cuda") * scale).to(dtype)


def step(fn, inputs, learns, grads):
    """A call of fn and of the gradients of its outputs with respect to inputs[i] for i in learns.

    An output whose gradient is None is not used.
    """
    leaves = [t.detach().requires_grad_(i in learns) for i, t in enumerate(inputs)]

    def both():
        out = fn(*leaves)
        used = [(o, g) for o, g in zip(out if isinstance(out, tuple) else (out,), grads) if g is not None]
        return torch.autograd.grad([o for o, _ in used], [leaves[i] for i in learns], [g for _, g in used])

    return both


def peak(fn) -> float:
    """GB allocated by a call above what was there before."""
    fn()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    fn()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e9


def tiles(machine, x, up, down):
    """The fused products with each tile, beside the bare cuBLAS product of the same shape."""
    flop = 2 * T * D * HIDDEN
    hidden, d_pre, d_out = x.new_empty(T, HIDDEN), x.new_empty(T, HIDDEN), randn(T, D)
    runs = {"forward": (x, up, None, lambda: F.linear(x, up)), "backward": (d_out, down, d_pre, lambda: d_out @ down)}
    for name, (a, b, into, cublas) in runs.items():
        seconds = machine.seconds(cublas)
        print(f"mlp {name:9} {'cuBLAS, bare product':38} {1e3 * seconds:7.3f} ms {flop / seconds / 1e12:6.0f} TFLOP/s")
        first = None
        for tile in TILES[name]:
            try:
                seconds = machine.seconds(lambda: K.mlp_gemm(a, b, hidden, into, 0.5, tile))
            except Exception as e:  # a tile may need more shared memory than there is
                print(f"mlp {name:9} {str(tile):38} {type(e).__name__}: {str(e).splitlines()[0][:80]}")
                continue
            out = (hidden if into is None else into).clone()
            first = out if first is None else first
            agrees = (
                "same"
                if torch.equal(out, first)
                else f"differs by {((out.float() - first.float()).norm() / first.float().norm()).item():.1e}"
            )
            print(f"mlp {name:9} {str(tile):38} {1e3 * seconds:7.3f} ms {flop / seconds / 1e12:6.0f} TFLOP/s  {agrees}")
    print()


def head_tiles(machine, heads, gate):
    """Forward and gradients of the kernels that work on heads, with each size of their tiles."""
    default = K.HEAD_TILE
    for size in (512, 1024, 2048, 4096):
        K.HEAD_TILE = size
        ms = [1e3 * machine.seconds(call) for call in (heads, gate)]
        print(f"HEAD_TILE {size:5}: qkv_heads {ms[0]:.3f} ms, xsa_gate {ms[1]:.3f} ms")
    K.HEAD_TILE = default
    print()


def fp8(machine):
    """What fp8 could bring: the forward products of a visit and of the head from copies in e4m3 beside those in bf16.

    The cast of the activations is timed on its own.
    """
    cast, hidden = lambda t: t.to(torch.float8_e4m3fn), torch.empty(T, HIDDEN, dtype=torch.bfloat16, device="cuda")
    scales = {"scale_a": torch.ones((), device="cuda"), "scale_b": torch.full((), 1 / 16, device="cuda")}
    for name, inner, outer in (
        ("qkv", D, (H + 2 * KV) * HEAD),
        ("o", H * HEAD, D),
        ("mlp up, fused", D, HIDDEN),
        ("mlp down", HIDDEN, D),
        ("head", D, V),
    ):
        a, b = randn(T, inner), randn(outer, inner, scale=inner**-0.5)
        a8, b8 = cast(a), cast(b * 16)
        wide, narrow = (
            lambda: F.linear(a, b),
            lambda: torch._scaled_mm(a8, b8.t(), **scales, out_dtype=torch.bfloat16, use_fast_accum=True),
        )
        if name == "mlp up, fused":
            wide, narrow = (
                lambda: K.mlp_gemm(a, b, hidden, None, 0.5),
                lambda: K.mlp_gemm(a8, b8, hidden, None, 0.5, (128, 128, 128, 8, 3, 2)),
            )
        ms = [1e3 * machine.seconds(fn) for fn in (wide, narrow, lambda: cast(a))]
        print(f"{name:14} bf16 {ms[0]:6.3f}  fp8 {ms[1]:6.3f}  cast {ms[2]:6.3f} ms", flush=True)
    print()


def kernels(args: argparse.Namespace) -> Iterator[Row]:
    """Each Triton kernel at the shapes of a training step, beside its compiled reference and its floor.

    Needs a Hopper GPU. Printed; there is no table.
    """
    machine = Machine(torch.device("cuda"))
    print(f"triton {K.triton.__version__}, {T:,} tokens\n")
    copy, product = machine.copy_rate, machine.product_rate
    A = 2 * T  # bytes of one bf16 column
    x, up, down, table = (
        randn(T, D),
        randn(HIDDEN, D, scale=D**-0.5),
        randn(D, HIDDEN, scale=HIDDEN**-0.5),
        randn(V, D, scale=0.1),
    )
    z, targets = randn(T, V, scale=5.0), torch.randint(V, (T,), device="cuda")
    caps = torch.full((2,), 30.0, device="cuda")
    qkv, gain = randn(T, (H + 2 * KV) * HEAD), torch.full((H,), 5.0, device="cuda")
    angle = torch.arange(T, device="cuda")[:, None] % 2048 * 10_000.0 ** (-torch.arange(16, device="cuda") / 16)
    rope, v = (angle.cos(), angle.sin()), qkv.view(T, -1, HEAD)[:, -KV:]
    y, gate, row = randn(T, H, HEAD), randn(T, H), torch.full((T,), 1 / T, device="cuda")
    rows, streams = torch.rand(3, D, device="cuda"), [randn(T, D) for _ in range(3)]
    added = [K.Sum((K.ONE, K.ONE), 0.5)]  # a sublayer's input
    read = [K.Sum((0, 1, 1), 0.5), K.Sum((K.ONE, K.ABSENT, K.ABSENT))]  # the attention's input
    tokens, positions = torch.randint(V, (T,), device="cuda"), torch.arange(T, device="cuda", dtype=torch.int32) % 1000
    smear = table.float(), torch.zeros(12, device="cuda"), torch.ones((), device="cuda")
    embed = lambda f: lambda *t: f(tokens, tokens.roll(1), positions, *t, 1e-6, torch.bfloat16)

    kernel = lambda streams, *rest: K.combine([(x,) for x in streams], *rest)

    def combined(f, sums, weighted=False):
        """f of streams, and of rows of weights before them -> every sum and norm that is wanted."""

        def call(*t):
            results = f(t[weighted:], sums, t[0] if weighted else None, 1e-6)
            return tuple(x for result in results for x in result if x is not None)

        return call

    like = lambda *tensors: [torch.randn_like(t) for t in tensors]
    copied = y, randn(T, H, HEAD), randn(T, H, HEAD), v.contiguous()

    cases = [  # name, kernel, reference, inputs, which learn, gradients of the outputs, floor in seconds
        (
            "mlp, all gradients",
            lambda *t: K.mlp(*t, 0.5),
            lambda *t: K.mlp_reference(*t, 0.5),
            (x, up, down),
            (0, 1, 2),
            [x, None],
            12 * T * D * HIDDEN / product,
        ),
        (
            "mlp, frozen weights",
            lambda *t: K.mlp(*t, 0.5),
            lambda *t: K.mlp_reference(*t, 0.5),
            (x, up, down),
            (0,),
            [x, None],
            8 * T * D * HIDDEN / product,
        ),
        (
            "softcap_nll",
            lambda *t: K.softcap_nll(*t, 30.0),
            lambda *t: K.softcap_nll_reference(*t, 30.0),
            (z, targets),
            (0,),
            [row, None],
            3 * A * V / copy,
        ),
        (
            "softcap_nll, two caps",  # no kernel
            K.softcap_nll,
            K.softcap_nll_reference,
            (z, targets, caps),
            (0, 2),
            [row, None],
            3 * A * V / copy,
        ),
        (
            "head_loss",
            lambda *t: K.head_loss(*t, 30.0, row),
            lambda x, w, t: torch.dot(K.softcap_nll_reference(F.linear(x, w), t, 30.0)[0], row),
            (x, table, targets),
            (0, 1),
            like(row.sum()),
            6 * T * D * V / product,
        ),
        ("embed", embed(K.embed), embed(K.embed_reference), smear, (0, 1, 2), [x], 2 * A * D / copy),
        (
            "combine, a sublayer's input",
            combined(kernel, added),
            combined(K.combine_reference, added),
            streams[:2],
            (0, 1),
            [x, x],
            (4 + 5) * A * D / copy,
        ),
        (
            "combine, attention's input",
            *(combined(f, read, weighted=True) for f in (kernel, K.combine_reference)),
            (rows[:2], *streams),
            (0, 1, 2, 3),
            [x, x, x],
            (5 + 8) * A * D / copy,
        ),
        (
            "qkv_heads",
            lambda *t: K.qkv_heads(*t, KV, H // KV, 1e-6),
            lambda *t: K.qkv_heads_reference(*t, KV, H // KV, 1e-6),
            (qkv, gain, *rope),
            (0, 1),
            like(*copied),
            A * HEAD * (8 + 12 + 12 + 2 + 8 + 8) / copy,
        ),
        (
            "xsa_gate",
            lambda *t: K.xsa_gate(*t, 0.5, 1.0),
            lambda *t: K.xsa_gate_reference(*t, 0.5, 1.0),
            (y, v, gate),
            (0, 1, 2),
            like(y),
            A * HEAD * (4 + 2 + 4 + 4 + 4 + 2 + 4 + 2) / copy,
        ),
    ]
    tiles(machine, x, up, down)
    fp8(machine)
    runs = {name: step(kernel, inputs, learns, grads) for name, kernel, _, inputs, learns, grads, _ in cases}
    head_tiles(machine, runs["qkv_heads"], runs["xsa_gate"])
    titles = f"{'kernel':>8} {'plain':>8} {'compiled':>9} {'floor':>7}   ms;  peak GB kernel, compiled"
    print(f"{'forward and backward':28} {titles}")
    for name, _, reference, inputs, learns, grads, floor in cases:
        torch._dynamo.reset()
        plain, compiled = (
            step(fn, inputs, learns, grads)
            for fn in (reference, torch.compile(reference, fullgraph=True, dynamic=False))
        )
        for have, want in zip(runs[name](), plain()):
            off = ((have.float() - want.float()).norm() / want.float().norm()).item()
            if not off < 0.03:
                print(f"  {name}: a gradient of shape {tuple(want.shape)} differs by {off:.1%}")
        ms = [1e3 * machine.seconds(fn) for fn in (runs[name], plain, compiled)]
        times = f"{ms[0]:8.3f} {ms[1]:8.3f} {ms[2]:9.3f} {1e3 * floor:7.3f}"
        print(f"{name:28} {times}       {peak(runs[name]):5.2f} {peak(compiled):5.2f}", flush=True)
    yield from ()
