"""`bench.py kernels`: the Triton kernels on one GPU, against torch.compile of their references, against cuBLAS, and against the floor of bytes and FLOPs.

Medians of CUDA-event times on random data. Each timed call is queued behind a sleeping kernel, so that launches are not part of it. Floors
use the rates measured here first: device copy for bytes, an 8,192-cubed bf16 product for FLOPs.
"""

import statistics

import torch
import torch.nn.functional as F

import train_gpt as K

T, D, HIDDEN, V, H, KV, HEAD = 98_304, 512, 2048, 8192, 4, 2, 128
TILES = {  # BLOCK_M, BLOCK_N, BLOCK_K, warps, stages, programs per multiprocessor
    "forward": [(128, 128, 64, 4, 3, 2), (128, 256, 64, 8, 4, 1), (256, 128, 64, 8, 4, 1), (128, 128, 32, 4, 6, 2)],
    "backward": [(128, 128, 32, 4, 5, 2), (128, 256, 64, 8, 3, 1), (256, 128, 64, 8, 3, 1), (128, 128, 64, 4, 2, 2)],
}


def randn(*shape, scale=1.0, dtype=torch.bfloat16):
    return (torch.randn(*shape, device="cuda") * scale).to(dtype)


def timed(fn, repeats: int = 25) -> float:
    """Median milliseconds."""
    for _ in range(4):
        fn()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, end in events:
        torch.cuda._sleep(3_000_000)                                    # about 1.6 ms: the host queues the whole call meanwhile
        start.record()
        fn()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events)


def step(fn, inputs, learns, grad):
    """A call of fn and of the gradients of its first output with respect to inputs[i] for i in learns."""
    leaves = [t.detach().requires_grad_(i in learns) for i, t in enumerate(inputs)]

    def both():
        out = fn(*leaves)
        out = out[0] if isinstance(out, tuple) else out
        return torch.autograd.grad(out, [leaves[i] for i in learns], grad)
    return both


@torch.library.custom_op("bench::attention", mutates_args=())
def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """Stands for attention and XSA: it takes q, k, v and v's own heads, gives nothing, and its gradients are those of other tokens."""
    return q.new_zeros(1)


@torch.library.custom_op("bench::attention_gradient", mutates_args=())
def attention_gradient(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, own: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return tuple(t.flip(0) for t in (q, k, v, own))


attention.register_fake(lambda q, k, v, own: q.new_empty(1))
attention_gradient.register_fake(lambda *inputs: K.empty_like(*inputs))
attention.register_autograd(lambda ctx, d: attention_gradient(*ctx.saved_tensors), setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


def peak(fn) -> float:
    """GB allocated by a call above what was there before."""
    fn()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    fn()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e9


def rates() -> tuple[float, float]:
    """bytes per ms of a device copy, FLOP per ms of a large product."""
    a, b = torch.empty(2 ** 30, dtype=torch.int8, device="cuda"), torch.empty(2 ** 30, dtype=torch.int8, device="cuda")
    square, other = randn(8192, 8192), randn(8192, 8192)
    copy, product = 2 * 2 ** 30 / timed(lambda: b.copy_(a)), 2 * 8192 ** 3 / timed(lambda: square @ other)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {K.triton.__version__}, {T:,} tokens: "
          f"copy {copy / 1e9:.2f} TB/s, product {product / 1e9:.0f} TFLOP/s\n")
    return copy, product


def tiles(x, up, down):
    """The fused products with each tile, beside the bare cuBLAS product of the same shape."""
    flop = 2 * T * D * HIDDEN
    hidden, d_pre, d_out = x.new_empty(T, HIDDEN), x.new_empty(T, HIDDEN), randn(T, D)
    runs = {"forward": (x, up, None, lambda: F.linear(x, up)), "backward": (d_out, down, d_pre, lambda: d_out @ down)}
    for name, (a, b, into, cublas) in runs.items():
        ms = timed(cublas)
        print(f"mlp {name:9} {'cuBLAS, bare product':38} {ms:7.3f} ms {flop / ms / 1e9:6.0f} TFLOP/s")
        first = None
        for tile in TILES[name]:
            try:
                ms = timed(lambda: K.mlp_gemm(a, b, hidden, into, 0.5, tile))
            except Exception as e:                                      # a tile may need more shared memory than there is
                print(f"mlp {name:9} {str(tile):38} {type(e).__name__}: {str(e).splitlines()[0][:80]}")
                continue
            out = (hidden if into is None else into).clone()
            first = out if first is None else first
            agrees = "same" if torch.equal(out, first) else f"differs by {((out.float() - first.float()).norm() / first.float().norm()).item():.1e}"
            print(f"mlp {name:9} {str(tile):38} {ms:7.3f} ms {flop / ms / 1e9:6.0f} TFLOP/s  {agrees}")
    print()


def mixed(mix_norm, weights, x, residual):
    """mix_norm as a block uses it: its three outputs each get a gradient."""
    y, n, x = mix_norm(weights, 0.5, 1e-6, x, residual)
    return y + 2 * n + 3 * x


def warps_and_rows(z, targets, caps, qkv, gain, rope, y, v, gate):
    nll, lse, dz = torch.empty(T, device="cuda"), torch.empty(T, device="cuda"), torch.empty_like(z)
    for warps in (4, 8, 16, 32):
        ms = [timed(lambda: K.softcap_nll_kernel[(T,)](z, targets, caps, None, nll, lse, into, None, V, V, num_warps=warps)) for into in (None, dz)]
        print(f"softcap_nll, {warps:2} warps: forward {ms[0]:.3f} ms, with dz {ms[1]:.3f} ms")
    default = K.HEAD_ROWS
    for rows in (8, 16, 32, 64, 128):
        K.HEAD_ROWS = rows
        q, k, wide, rstd = K.qkv_heads_op(qkv, gain, *rope, KV, H // KV, 1e-6)
        ms = [timed(fn) for fn in (lambda: K.qkv_heads_op(qkv, gain, *rope, KV, H // KV, 1e-6), lambda: K.qkv_heads_gradient_op(q, k, wide, v, q, k, gain, *rope, rstd),
                                   lambda: K.xsa_gate_op(y, v, gate), lambda: K.xsa_gate_gradient_op(y, y, v, gate))]
        print(f"HEAD_ROWS {rows:3}: qkv_heads {ms[0]:.3f} ms, gradient {ms[1]:.3f} ms; xsa_gate {ms[2]:.3f} ms, gradient {ms[3]:.3f} ms")
    K.HEAD_ROWS = default
    print()


def main():
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    copy, product = rates()
    A = 2 * T                                                           # bytes of one bf16 column
    x, up, down, head = randn(T, D), randn(HIDDEN, D, scale=D ** -0.5), randn(D, HIDDEN, scale=HIDDEN ** -0.5), randn(V, D, scale=0.1)
    z, targets, caps = randn(T, V, scale=5.0), torch.randint(V, (T,), device="cuda"), torch.full((2,), 30.0, device="cuda")
    qkv, gain = randn(T, (H + 2 * KV) * HEAD), torch.full((H,), 5.0, device="cuda")
    angle = torch.arange(T, device="cuda")[:, None] % 2048 * 10_000.0 ** (-torch.arange(16, device="cuda") / 16)
    rope, v = (angle.cos(), angle.sin()), qkv.view(T, -1, HEAD)[:, -KV:]
    residual, mix = randn(T, D), torch.rand(2, D, device="cuda")
    y, gate, row = randn(T, H, HEAD), torch.rand(T, H, device="cuda"), torch.full((T,), 1 / T, device="cuda")
    tiles(x, up, down)
    warps_and_rows(z, targets, caps, qkv, gain, rope, y, v, gate)

    gemm = 2 * T * D * HIDDEN / product
    logits = 2 * T * D * V / product
    cases = [  # name, kernel, reference, inputs, which learn, gradient, floor in ms
        ("mlp, all gradients", lambda *t: K.mlp(*t, 0.5), lambda *t: K.mlp_reference(*t, 0.5), (x, up, down), (0, 1, 2), randn(T, D), 6 * gemm),
        ("mlp, frozen weights", lambda *t: K.mlp(*t, 0.5), lambda *t: K.mlp_reference(*t, 0.5), (x, up, down), (0,), randn(T, D), 4 * gemm),
        ("softcap_nll", K.softcap_nll, K.softcap_nll_reference, (z, targets, caps), (0,), row, 3 * A * V / copy),
        ("softcap_nll, caps learn", K.softcap_nll, K.softcap_nll_reference, (z, targets, caps), (0, 2), row, 3 * A * V / copy),
        ("head: linear, softcap_nll", lambda x, w, *t: K.softcap_nll(F.linear(x, w), *t), lambda x, w, *t: K.softcap_nll_reference(F.linear(x, w), *t),
         (x, head, targets, caps), (0, 1), row, 3 * logits),
        ("head: head_nll", K.head_nll, lambda x, w, *t: K.softcap_nll_reference(F.linear(x, w), *t), (x, head, targets, caps), (0, 1), row, 3 * logits),
        ("qkv_heads, and flips of q, k, v", lambda *t: attention(*K.qkv_heads(*t, KV, H // KV, 1e-6)), lambda *t: attention(*K.qkv_heads_reference(*t, KV, H // KV, 1e-6)),
         (qkv, gain, *rope), (0, 1), randn(1), A * HEAD * (8 + 12 + 2 * 14 + 14 + 6 + 8) / copy),
        ("mix_norm", lambda *t: mixed(K.mix_norm, *t), lambda *t: mixed(lambda *t: (*K.mix_norm_reference(*t), t[3]), *t), (mix, x, residual), (0, 1, 2), randn(T, D),
         A * D * (2 + 2 + 5 + 2) / copy),
        ("xsa_gate", K.xsa_gate, K.xsa_gate_reference, (y, v, gate), (0, 1, 2), randn(T, H, HEAD), A * HEAD * (4 + 2 + 4 + 4 + 4 + 2 + 4 + 2) / copy),
    ]
    print(f"{'forward and backward':32} {'kernel':>9} {'compiled':>9} {'floor':>7}   ms;  peak GB kernel, compiled")
    for name, kernel, reference, inputs, learns, grad, floor in cases:
        torch._dynamo.reset()
        ours, theirs = (step(torch.compile(fn, fullgraph=True, dynamic=False), inputs, learns, grad) for fn in (kernel, reference))
        for have, want in zip(ours(), theirs()):
            off = ((have.float() - want.float()).norm() / want.float().norm()).item()
            if not off < 0.03:
                print(f"  {name}: a gradient of shape {tuple(want.shape)} differs by {off:.1%}")
        print(f"{name:32} {timed(ours):9.3f} {timed(theirs):9.3f} {floor:7.3f}       {peak(ours):5.2f} {peak(theirs):5.2f}", flush=True)

