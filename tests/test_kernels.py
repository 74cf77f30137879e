"""Every Triton kernel against its plain PyTorch reference, values and gradients.

On a machine without a GPU the kernels run through Triton's interpreter, in a process of their own: the interpreter is chosen when Triton
is imported. Tests marked gpu run the same comparisons on the device, at the shapes of a training step.
"""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import train_gpt as K  # noqa: E402

INTERPRETING = bool(K.INTERPRET)
TOKENS = 98_304
interpreted = pytest.mark.skipif(not INTERPRETING, reason="runs inside test_kernels_through_the_interpreter")
on_gpu = [pytest.mark.gpu, pytest.mark.skipif(INTERPRETING or not torch.cuda.is_available(), reason="needs a GPU")]


def cases(small: int, large: int = TOKENS):
    """(device, number of tokens), neither of them a multiple of a tile."""
    return pytest.mark.parametrize("device,T", [pytest.param("cpu", small, marks=interpreted), pytest.param("cuda", large - 3, marks=on_gpu)])


def repair_interpreter():
    """Triton 3.6's interpreter indexes with arrays of one element (an error since NumPy 2.4) and multiplies bf16 by its bit patterns."""
    import numpy as np
    from triton.runtime import interpreter
    patch, dot = interpreter._patch_lang_tensor, interpreter.InterpreterBuilder.create_dot

    def patched(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def wide(t):
        bf16 = t.dtype.scalar == K.tl.bfloat16
        return interpreter.TensorHandle((t.data.astype(np.uint32) << 16).view(np.float32), K.tl.float32) if bf16 else t

    interpreter._patch_lang_tensor = patched
    interpreter.InterpreterBuilder.create_dot = lambda self, a, b, *rest: dot(self, wide(a), wide(b), *rest)


if INTERPRETING:
    repair_interpreter()


def randn(*shape, device, scale=1.0, seed=0, dtype=torch.bfloat16):
    generator = torch.Generator(device).manual_seed(seed + sum(shape))
    return (torch.randn(*shape, device=device, generator=generator) * scale).to(dtype)


def error(found, wanted) -> float:
    return ((found.float() - wanted.float()).norm() / wanted.float().norm()).item()


def run(fn, inputs, weights, frozen=()):
    """Outputs of fn and the gradients of (outputs . weights) with respect to the floating-point inputs that are not frozen."""
    leaves = [t.detach().clone().requires_grad_(t.is_floating_point() and i not in frozen) for i, t in enumerate(inputs)]
    outputs = fn(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    sum((out.float() * w).sum() for out, w in zip(outputs, weights)).backward()
    return [out.detach() for out in outputs], [leaf.grad for leaf in leaves]


def compare(fn, reference, inputs, weights, tolerance, frozen=()):
    """fn on bf16 inputs against reference on the same numbers in fp32."""
    outputs, grads = run(fn, inputs, weights, frozen)
    wanted, wanted_grads = run(reference, [t.float() if t.is_floating_point() else t for t in inputs], weights, frozen)
    for have, want in zip(outputs, wanted):
        assert error(have, want) < tolerance
    for i, (have, want) in enumerate(zip(grads, wanted_grads)):
        assert (have is None) == (want is None), f"input {i}"
        if have is not None:
            assert have.dtype == inputs[i].dtype and have.shape == inputs[i].shape
            assert error(have, want) < tolerance, f"gradient of input {i}"
    return outputs, wanted


# --- the process that interprets ---

@pytest.mark.skipif(INTERPRETING, reason="this is that process")
def test_kernels_through_the_interpreter():
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    result = subprocess.run(command, check=False, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert " passed" in result.stdout


@pytest.mark.skipif(INTERPRETING, reason="the interpreter replaces the compiler")
def test_every_kernel_compiles_for_a_hopper_gpu(monkeypatch):
    """To machine code for sm_90, without Triton's specialisation on divisibility: the interpreter accepts programs that the compiler refuses."""
    if sys.platform != "linux":
        pytest.importorskip("triton")
    import triton.compiler
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction, mangle_type
    compiled = set()

    def compile_only(kernel, *args, grid, warmup, num_warps=4, num_stages=3, **others):
        values = dict(zip(kernel.arg_names, args)) | others
        constant = {p.name for p in kernel.params if p.is_constexpr or values[p.name] is None}
        source = triton.compiler.ASTSource(kernel, {n: "constexpr" if n in constant else mangle_type(v) for n, v in values.items()},
                                           constexprs={(kernel.arg_names.index(n),): values[n] for n in constant})
        binary = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": num_warps, "num_stages": num_stages})
        assert binary.metadata.shared <= 227 * 1024
        compiled.add(kernel.fn.__name__)

    monkeypatch.setattr(JITFunction, "run", compile_only)
    T, d = 256, 512
    x, up, down, caps = randn(T, d, device="cpu"), randn(2048, d, device="cpu"), randn(d, 2048, device="cpu"), torch.full((2,), 30.0)
    K.mlp_op(x, up, down, 0.5)
    K.mlp_d_pre_op(x, down, randn(T, 2048, device="cpu"), 0.5)
    z, targets = randn(T, 8192, device="cpu"), torch.zeros(T, dtype=torch.int64)
    K.softcap_nll_op(z, targets, caps)
    K.softcap_nll_gradient_op(z, targets, caps, torch.ones(T), True)
    K.head_nll_op(x, randn(8192, d, device="cpu"), targets, caps, False)
    for H, KV, D, copies in ((8, 4, 64, 2), (4, 2, 128, 2), (4, 2, 128, 1)):
        rotation, gain = rope(T, D // 8, "cpu"), torch.ones(H)
        q, k, v, rstd = K.qkv_heads_op(randn(T, (H + 2 * KV) * D, device="cpu"), gain, *rotation, KV, copies, 1e-6)
        K.qkv_heads_gradient_op(q, k, v, v[:, :KV], q, k, gain, *rotation, rstd)
        gate = torch.ones(T, H)
        K.xsa_gate_op(q, v[:, :KV], gate)
        K.xsa_gate_gradient_op(q, q, v[:, :KV], gate)
    for streams in ([x, x], [x, x, x]):
        K.mix_norm_gradient_op(x, x, x, torch.ones(len(streams), d), streams, 0.5, 1e-6)
    assert compiled == {name for name in vars(K) if name.endswith("_kernel")}


def test_references_serve_a_machine_without_triton():
    code = """
import sys; sys.modules["triton"] = None
import torch, train_gpt as K
assert K.INTERPRET is None
x, up, down = (torch.randn(*s, requires_grad=True) for s in ((5, 8), (16, 8), (8, 16)))
out, hidden = K.mlp(x, up, down, 0.5)
targets, caps = torch.tensor([0, 1, 2, 3, 4]), torch.full((2,), 30.0)
(K.head_nll(out, up, targets, caps).sum() + K.softcap_nll(hidden, targets, caps)[0].sum()).backward()
q, k, v, own = K.qkv_heads(torch.randn(5, 32, dtype=torch.bfloat16), torch.ones(2), torch.ones(5, 2), torch.zeros(5, 2), 1, 1, 1e-6)
assert K.xsa_gate(q, own, torch.ones(5, 2)).shape == q.shape == (5, 2, 8) and K.mix_norm(torch.ones(2, 8), 1.0, 1e-6, x, x)[1].shape == x.shape and x.grad.isfinite().all()
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"})


# --- MLP ---

def mlp_inputs(device, T, d=512, hidden=2048):
    return randn(T, d, device=device), randn(hidden, d, device=device, scale=d ** -0.5), randn(d, hidden, device=device, scale=hidden ** -0.5)


@cases(150)
@pytest.mark.parametrize("slope", [0.5, 0.3, 0.0])
def test_mlp(device, T, slope):
    x, up, down = mlp_inputs(device, T, *((64, 256) if device == "cpu" else ()))
    weight = randn(T, x.size(1), device=device, seed=1)
    (_, hidden), (_, wanted) = compare(lambda *t: K.mlp(*t, slope), lambda *t: K.mlp_reference(*t, slope), (x, up, down), (weight, 0), 0.01)
    pre = F.linear(x.float(), up.float())
    surely = pre.abs() > 1e-3
    assert torch.equal((hidden.view(torch.int16) & 1).bool()[surely], pre[surely] < 0)
    relative = (hidden.float() - wanted)[wanted > 1e-3] / wanted[wanted > 1e-3]
    assert relative.abs().max() < 2 ** -7 + 1e-3 and abs(relative.mean()) < 1e-3


@interpreted
@pytest.mark.parametrize("T,d,hidden", [(1, 16, 64), (128, 32, 512), (129, 96, 192)])
def test_mlp_at_odd_sizes(T, d, hidden):
    inputs = mlp_inputs("cpu", T, d, hidden)
    compare(lambda *t: K.mlp(*t, 0.5), lambda *t: K.mlp_reference(*t, 0.5), inputs, (randn(T, d, device="cpu", seed=1), 0), 0.015)


@cases(40)
def test_mlp_of_frozen_weights_computes_no_weight_gradient(device, T, monkeypatch):
    x, up, down = mlp_inputs(device, T, 64, 256)
    compare(lambda *t: K.mlp(*t, 0.5), lambda *t: K.mlp_reference(*t, 0.5), (x, up, down), (randn(T, 64, device=device, seed=1), 0), 0.015, frozen=(1, 2))
    launches = []
    monkeypatch.setattr(K, "mlp_gemm", lambda *a, real=K.mlp_gemm: (launches.append(a[3] is not None), real(*a))[1])
    run(lambda *t: K.mlp(*t, 0.5), (x, up, down), (1, 0), frozen=(0, 1))
    assert launches == [False]                                          # only w_down learns: no gradient of the pre-activation


@cases(20)
def test_hidden_has_no_gradient(device, T):
    x, up, down = (t.requires_grad_() for t in mlp_inputs(device, T, 64, 256))
    out, hidden = K.mlp(x, up, down, 0.5)
    assert out.requires_grad and not hidden.requires_grad


# --- cross-entropy ---

def plain_nll(z, targets, caps):
    logits = torch.where(z > 0, caps[0] * torch.tanh(z / caps[0]), caps[1] * torch.tanh(z / caps[1]))
    return F.cross_entropy(logits, targets, reduction="none")


@pytest.mark.parametrize("V,caps", [(64, (30.0, 30.0)), (1000, (20.0, 35.0)), (8192, (30.0, 15.0)), (9001, (30.0, 30.0))])
@cases(11, 20_000)
def test_softcap_nll(device, T, V, caps):
    z = randn(T, V, device=device, scale=15.0)
    z[0], z[1, 0] = 0.0, 400.0                                          # a tie of all, and a saturated tanh
    targets = torch.randint(V, (T,), device=device)
    caps = torch.tensor(caps, device=device)
    (nats, lse), (wanted, _) = compare(K.softcap_nll, lambda *t: (plain_nll(*t), K.softcap_nll_reference(*t)[1]), (z, targets, caps),
                                       (torch.rand(T, device=device) - 0.3, 0), 0.006)
    assert (nats - wanted).abs().max() < 1e-4
    assert (lse - K.softcap(z, caps).logsumexp(-1)).abs().max() < 1e-4
    assert abs(nats[0].item() - torch.tensor(float(V)).log().item()) < 1e-5


@cases(9)
def test_head_nll(device, T):
    d, V = (32, 200) if device == "cpu" else (512, 8192)
    x, w, caps = randn(T, d, device=device), randn(V, d, device=device, scale=3 * d ** -0.5), torch.tensor((30.0, 25.0), device=device)
    targets = torch.randint(V, (T,), device=device)
    weight = torch.rand(T, device=device) / T
    weight[-1] = 0                                                      # padding
    compare(K.head_nll, lambda x, w, t, c: plain_nll(F.linear(x, w), t, c), (x, w, targets, caps), (weight,), 0.01)
    compare(K.head_nll, lambda x, w, t, c: plain_nll(F.linear(x, w), t, c), (x, w, targets, caps), (weight,), 0.01, frozen=(1, 3))
    with torch.no_grad():
        assert error(K.head_nll(x, w, targets, caps), plain_nll(F.linear(x.float(), w.float()), targets, caps)) < 0.005


# --- heads ---

def rope(T, n, device):
    angle = torch.arange(T, device=device)[:, None] * 100.0 ** -(torch.arange(n, device=device) / n)
    return angle.cos(), angle.sin()


@pytest.mark.parametrize("H,KV,D,n,copies", [(8, 4, 64, 8, 1), (8, 4, 64, 8, 2), (4, 2, 128, 16, 2), (4, 1, 32, 16, 4), (2, 2, 16, 4, 1)])
@cases(37)
def test_qkv_heads(device, T, H, KV, D, n, copies):
    gain = randn(H, device=device, dtype=torch.float32) + 5
    inputs = randn(T, (H + 2 * KV) * D, device=device), gain, *rope(T, n, device)
    weights = [randn(T, heads, D, device=device, seed=heads + i, dtype=torch.float32) for i, heads in enumerate((H, copies * KV, copies * KV, KV))]
    compare(lambda *t: K.qkv_heads(*t, KV, copies, 1e-6), lambda *t: K.qkv_heads_reference(*t, KV, copies, 1e-6), inputs, weights, 0.015, frozen=(2, 3))


@cases(10)
def test_value_heads_are_a_view_of_the_product(device, T):
    qkv = randn(T, 16 * 64, device=device)
    _, _, v, own = K.qkv_heads(qkv, torch.full((8,), 5.0, device=device), *rope(T, 8, device), 4, 2, 1e-6)
    assert own.untyped_storage().data_ptr() == qkv.untyped_storage().data_ptr() and torch.equal(own, qkv.view(T, 16, 64)[:, 12:])
    assert torch.equal(v[:, 0::2], own) and torch.equal(v[:, 1::2], own)


@pytest.mark.parametrize("H,KV,D", [(8, 4, 64), (4, 4, 16), (8, 1, 32)])
@cases(37)
def test_xsa_gate(device, T, H, KV, D):
    y, packed, gate = randn(T, H, D, device=device), randn(T, H + 2 * KV, D, device=device), torch.rand(T, H, device=device)
    weight = randn(T, H, D, device=device, seed=3, dtype=torch.float32)
    compare(K.xsa_gate, K.xsa_gate_reference, (y, packed[:, -KV:], gate), (weight,), 0.006)
    strided = K.xsa_gate(y, packed[:, -KV:], gate)
    assert torch.equal(strided, K.xsa_gate(y, packed[:, -KV:].contiguous(), gate))
    assert ((strided.unflatten(1, (KV, -1)).float() * packed[:, -KV:, None].float()).sum(-1).abs() < 0.3).all()     # nothing left along v


# --- mixed streams ---

@pytest.mark.parametrize("k", [2, 3])
@cases(21)
def test_mix_norm(device, T, k):
    d, scale = (64 if device == "cpu" else 512), 0.7
    streams = [randn(T, d, device=device, seed=i, scale=1 + i) for i in range(k)]
    inputs = randn(k, d, device=device, dtype=torch.float32), *streams
    weights = [randn(T, d, device=device, seed=7 + i, dtype=torch.float32) for i in range(3)]
    reference = lambda w, *s: (*K.mix_norm_reference(w, scale, 1e-6, *s), s[0])
    compare(lambda w, *s: K.mix_norm(w, scale, 1e-6, *s), reference, inputs, weights, 0.01)


@cases(5)
def test_mix_norm_of_a_skip_from_the_visit_before(device, T):
    inputs = randn(3, 32, device=device, dtype=torch.float32), randn(T, 32, device=device), randn(T, 32, device=device, seed=1)
    weights = [randn(T, 32, device=device, seed=i, dtype=torch.float32) for i in range(3)]
    compare(lambda w, x, y: K.mix_norm(w, 1.0, 1e-6, x, y, y), lambda w, x, y: (*K.mix_norm_reference(w, 1.0, 1e-6, x, y, y), x), inputs, weights, 0.01)


@cases(5)
def test_mix_norm_of_one_stream_twice(device, T):
    x, w = randn(T, 32, device=device), randn(2, 32, device=device, dtype=torch.float32)
    weights = [randn(T, 32, device=device, seed=i, dtype=torch.float32) for i in range(3)]
    compare(lambda w, x: K.mix_norm(w, 1.0, 1e-6, x, x), lambda w, x: (*K.mix_norm_reference(w, 1.0, 1e-6, x, x), x), (w, x), weights, 0.01)


# --- inside torch.compile ---

def small_step(x, up, down, qkv, gain, cos, sin, targets, caps):
    out, _ = K.mlp(x, up, down, 0.5)
    _, out, x = K.mix_norm(gain[:, None].expand(2, 64), 0.5, 1e-6, x, out)
    q, k, v, own = K.qkv_heads(F.linear(out + x, qkv), gain, cos, sin, 1, 2, 1e-6)
    y = K.xsa_gate(q * k + v, own, torch.sigmoid(out[:, :2]).float()).flatten(1)
    return K.head_nll(y, up[:64, :32], targets, caps).mean() + K.softcap_nll(F.linear(y, up[:50, :32]), targets, caps)[0].mean()


@cases(12, 515)
def test_compiled_graph_equals_eager(device, T):
    x, up, down = mlp_inputs(device, T, 64, 128)
    inputs = [x, up, down, randn(64, 64, device=device, scale=0.1), randn(2, device=device, dtype=torch.float32) + 3, *rope(T, 4, device),
              torch.randint(50, (T,), device=device), torch.tensor((30.0, 20.0), device=device)]
    eager = run(small_step, inputs, (1,), frozen=(5, 6))
    compiled = run(torch.compile(small_step, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager"), inputs, (1,), frozen=(5, 6))
    for have, want in zip(compiled[0] + compiled[1], eager[0] + eager[1]):
        assert (have is None) == (want is None)
        assert have is None or error(have, want) < (0.05 if device == "cuda" else 1e-6)


@cases(64, 4096)
@pytest.mark.parametrize("train", (True, False))
def test_compiled_model_equals_the_plain_one(device, T, train, monkeypatch):
    """The whole network with every kernel, compiled, in bf16, against the references in fp32: loss and the gradient of every parameter."""
    from helpers import config, packed_seq, randomize
    cfg = config(model_dim=64, rope_dims=8)
    tokens = torch.randint(4, cfg.vocab_size, (T // 2 * 2,), generator=torch.Generator().manual_seed(0)).to(device)
    seq = K.Seq(*(t.to(device) if isinstance(t, torch.Tensor) else t for t in packed_seq([T // 2, T // 2])))
    step = lambda model, tokens, seq: model.nll(model.trunk(tokens, seq, looped=True), tokens.roll(-1)).mean()

    def result(dtype, function):
        model = randomize(K.GPT(cfg, "reference", dtype), 0).to(device)
        with torch.set_grad_enabled(train):
            loss = function(model, tokens, seq)
        if train:
            loss.backward()
        return loss.detach(), {name: p.grad for name, p in model.named_parameters()}

    loss, grads = result(torch.bfloat16, torch.compile(step, fullgraph=True, dynamic=False, backend="inductor" if device == "cuda" else "aot_eager"))
    monkeypatch.setattr(K, "use_kernels", lambda *_: False)
    wanted, wanted_grads = result(torch.float32, step)
    assert error(loss, wanted) < 0.01
    for name in grads if train else ():
        assert error(grads[name], wanted_grads[name]) < 0.06, name


@cases(12, 515)
def test_operators_keep_their_contracts(device, T):
    x, up, down = (t.requires_grad_() for t in mlp_inputs(device, T, 64, 128))
    caps, targets = torch.tensor((30.0, 20.0), device=device, requires_grad=True), torch.randint(128, (T,), device=device)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    check = lambda op, *args: torch.library.opcheck(op, args, test_utils=tests)
    check(K.mlp_op, x, up, down, 0.5)
    check(K.softcap_nll_op, randn(T, 128, device=device).requires_grad_(), targets, caps)
    check(K.head_nll_op, x, up, targets, caps, True)
    y, v, gate = randn(T, 4, 16, device=device), randn(T, 2, 16, device=device), torch.rand(T, 4, device=device)
    check(K.xsa_gate_op, *(t.requires_grad_() for t in (y, v, gate)))
    check(K.qkv_heads_op, randn(T, 8 * 16, device=device), torch.rand(4, device=device) + 1, *rope(T, 4, device), 2, 2, 1e-6)
    streams = [randn(T, 64, device=device, seed=i) for i in range(5)]
    check(K.mix_norm_gradient_op, *streams[:3], randn(2, 64, device=device, dtype=torch.float32), streams[3:], 0.5, 1e-6)
