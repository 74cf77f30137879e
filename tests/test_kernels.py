"""Every Triton kernel against its plain PyTorch reference, values and gradients.

On a machine without a GPU the kernels run through Triton's interpreter, in a process of their own: the interpreter is
chosen when Triton is imported. Tests marked gpu compare the same on the device, at the shapes of a training step.
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
import helpers  # noqa: E402

import train_gpt as K  # noqa: E402

INTERPRETING = bool(K.INTERPRET)
TOKENS = 98_304
interpreted = pytest.mark.skipif(not INTERPRETING, reason="runs inside test_kernels_through_the_interpreter")
on_gpu = [pytest.mark.gpu, pytest.mark.skipif(INTERPRETING or not torch.cuda.is_available(), reason="needs a GPU")]


def cases(small: int, large: int = TOKENS):
    """(device, number of tokens), neither of them a multiple of a tile."""
    return pytest.mark.parametrize(
        "device,T", [pytest.param("cpu", small, marks=interpreted), pytest.param("cuda", large - 3, marks=on_gpu)]
    )


def repair_interpreter():
    """Triton 3.6's interpreter indexes with arrays of one element, an error since NumPy 2.4, multiplies bf16 by its bit
    patterns, and truncates to bf16 where hardware rounds to the nearest. Truncated streams shrink by 0.15 %, which the
    gradient of a lane's scalar, a sum of terms that cancel, shows as 4 %."""
    import numpy as np
    from triton.runtime import interpreter

    patch, dot = interpreter._patch_lang_tensor, interpreter.InterpreterBuilder.create_dot
    convert_float = interpreter._convert_float

    def patched(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def wide(t):
        bf16 = t.dtype.scalar == K.tl.bfloat16
        return interpreter.TensorHandle((t.data.astype(np.uint32) << 16).view(np.float32), K.tl.float32) if bf16 else t

    def rounded(data, source, target, mode):
        if (source, target) != (K.tl.float32, K.tl.bfloat16):
            return convert_float(data, source, target, mode)
        return torch.from_numpy(np.ascontiguousarray(data)).bfloat16().view(torch.uint16).numpy()

    interpreter._patch_lang_tensor = patched
    interpreter._convert_float = rounded
    interpreter.InterpreterBuilder.create_dot = lambda self, a, b, *rest: dot(self, wide(a), wide(b), *rest)


if INTERPRETING:
    repair_interpreter()


def randn(*shape, device, scale=1.0, seed=0, dtype=torch.bfloat16):
    generator = torch.Generator(device).manual_seed(seed + sum(shape))
    return (torch.randn(*shape, device=device, generator=generator) * scale).to(dtype)


def error(found, wanted) -> float:
    return ((found.float() - wanted.float()).norm() / wanted.float().norm()).item()


def run(fn, inputs, weights, frozen=()):
    """Outputs of fn and the gradients of (outputs . weights) by the floating-point inputs that are not frozen."""
    learns = [t.is_floating_point() and i not in frozen for i, t in enumerate(inputs)]
    leaves = [t.detach().clone().requires_grad_(learn) for t, learn in zip(inputs, learns)]
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
    result = subprocess.run(
        command, check=False, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert " passed" in result.stdout


@pytest.mark.skipif(INTERPRETING, reason="the interpreter replaces the compiler")
@pytest.mark.parametrize("capability,shared", [(80, 163), (90, 227)])
def test_every_kernel_compiles(monkeypatch, capability, shared):
    """To machine code for Hopper, and for Ampere but for those that need TMA, without Triton's specialisation on
    divisibility: the interpreter accepts programs that the compiler refuses."""
    if sys.platform != "linux":
        pytest.importorskip("triton")
    import triton.compiler
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction, mangle_type

    compiled = set()

    def compile_only(kernel, *args, grid, warmup, num_warps=4, num_stages=3, **others):
        values = dict(zip(kernel.arg_names, args)) | others
        constants = {}

        def kind(value, path, constant=False):
            """Triton's name of the type of an argument; in a tuple of them each may be a constant."""
            if constant or value is None:
                constants[path] = value
                return "constexpr"
            if isinstance(value, tuple):
                return tuple(kind(v, (*path, i)) for i, v in enumerate(value))
            return mangle_type(value)

        signature = {p.name: kind(values[p.name], (i,), p.is_constexpr) for i, p in enumerate(kernel.params)}
        binary = triton.compile(
            triton.compiler.ASTSource(kernel, signature, constexprs=constants),
            target=GPUTarget("cuda", capability, 32),
            options={"num_warps": num_warps, "num_stages": num_stages},
        )
        assert binary.metadata.shared <= shared * 1024
        compiled.add(kernel.fn.__name__)

    monkeypatch.setattr(JITFunction, "run", compile_only)
    monkeypatch.setattr(K, "processors", lambda device, least=8: 132 if least <= capability // 10 else 0)
    leaf = lambda *shape, dtype=torch.bfloat16: randn(*shape, device="cpu", dtype=dtype).requires_grad_()
    T, d = 256, 512
    targets = torch.zeros(T, dtype=torch.int64)
    x = leaf(T, d)
    K.mlp(x, leaf(2048, d), leaf(d, 2048), 0.5)[0].sum().backward()
    for V in (8192, 9001):  # a power of two, and what needs a mask
        K.softcap_nll(leaf(T, V), targets, 30.0)[0].sum().backward()
    K.head_loss(x, leaf(8192, d), targets, 30.0, torch.ones(T)).backward()
    for H, KV, D, copies in ((8, 4, 64, 2), (4, 2, 128, 2), (4, 2, 128, 1)):
        for learns in (True, False):
            gain = torch.ones(H, requires_grad=learns)
            q, k, v, own = K.qkv_heads(leaf(T, (H + 2 * KV) * D), gain, *rope(T, D // 8, "cpu"), KV, copies, 1e-6)
            (K.xsa_gate(q, own, leaf(T, H), 0.5, 1.0).sum() + k.sum() + v.sum()).backward()
    model = K.GPT(helpers.config(model_dim=512, num_heads=4, num_kv_heads=2, mlp_mult=4.0), "reference", torch.bfloat16)
    seq = helpers.packed_seq([T // 2, T // 2])
    for looped in (False, True):  # every form of combine() that the network has
        model.trunk(torch.zeros(T, dtype=torch.int64), seq, looped=looped).sum().backward()
    assert compiled == {name for name in vars(K) if name.endswith("_kernel")} - (
        {"mlp_gemm_kernel"} if capability == 80 else set()
    )


def test_references_serve_a_machine_without_triton():
    code = """
import sys; sys.modules["triton"] = None
import torch, train_gpt as K
assert K.INTERPRET is None
x, up, down = (torch.randn(*s, requires_grad=True) for s in ((5, 8), (16, 8), (8, 16)))
out, hidden = K.mlp(x, up, down, 0.5)
targets = torch.tensor([0, 1, 2, 3, 4])
(K.head_loss(out, up, targets, 30.0, torch.ones(5)) + K.softcap_nll(hidden, targets, 30.0)[0].sum()).backward()
qkv, cos, sin = torch.randn(5, 32, dtype=torch.bfloat16), torch.ones(5, 2), torch.zeros(5, 2)
q, k, v, own = K.qkv_heads(qkv, torch.ones(2), cos, sin, 1, 1, 1e-6)
assert K.xsa_gate(q, own, torch.ones(5, 2), 1.0, 1.0).shape == q.shape == (5, 2, 8) and x.grad.isfinite().all()
assert K.combine([(x,), (x,)], [K.Sum((0, 1), 1.0)], torch.ones(2, 8), 1e-6)[0].normed.shape == x.shape
"""
    subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
    )


# --- MLP ---


def mlp_inputs(device, T, d=512, hidden=2048):
    return (
        randn(T, d, device=device),
        randn(hidden, d, device=device, scale=d**-0.5),
        randn(d, hidden, device=device, scale=hidden**-0.5),
    )


@cases(150)
@pytest.mark.parametrize("slope", [0.5, 0.3, 0.0])
def test_mlp(device, T, slope):
    x, up, down = mlp_inputs(device, T, *((64, 256) if device == "cpu" else ()))
    weight = randn(T, x.size(1), device=device, seed=1)
    (_, hidden), (_, wanted) = compare(
        lambda *t: K.mlp(*t, slope), lambda *t: K.mlp_reference(*t, slope), (x, up, down), (weight, 0), 0.01
    )
    pre = F.linear(x.float(), up.float())
    surely = pre.abs() > 1e-3
    assert torch.equal((hidden.view(torch.int16) & 1).bool()[surely], pre[surely] < 0)
    relative = (hidden.float() - wanted)[wanted > 1e-3] / wanted[wanted > 1e-3]
    assert relative.abs().max() < 2**-7 + 1e-3 and abs(relative.mean()) < 1e-3


@interpreted
@pytest.mark.parametrize("T,d,hidden", [(1, 16, 64), (128, 32, 512), (129, 96, 192)])
def test_mlp_at_odd_sizes(T, d, hidden):
    inputs = mlp_inputs("cpu", T, d, hidden)
    weight = randn(T, d, device="cpu", seed=1)
    compare(lambda *t: K.mlp(*t, 0.5), lambda *t: K.mlp_reference(*t, 0.5), inputs, (weight, 0), 0.015)


@cases(40)
def test_mlp_of_frozen_weights_computes_no_weight_gradient(device, T, monkeypatch):
    inputs = mlp_inputs(device, T, 64, 256)
    weight = randn(T, 64, device=device, seed=1)
    ours = lambda *t: K.mlp(*t, 0.5)
    compare(ours, lambda *t: K.mlp_reference(*t, 0.5), inputs, (weight, 0), 0.015, frozen=(1, 2))
    real, backward = K.mlp_gemm, []

    def watched(a, b, hidden, d_pre, slope):
        backward.append(d_pre is not None)
        real(a, b, hidden, d_pre, slope)

    monkeypatch.setattr(K, "mlp_gemm", watched)
    run(ours, inputs, (1, 0), frozen=(0, 1))
    assert backward == [False]  # only w_down learns: no gradient of the pre-activation


@cases(20)
def test_hidden_has_no_gradient(device, T, monkeypatch):
    """Nor does autograd make one of zeros: 0.4 GB a visit, 2 % of a step."""
    x, up, down = (t.requires_grad_() for t in mlp_inputs(device, T, 64, 256))
    real, arrived = K.MLP.backward, []

    def watched(ctx, d_out, d_hidden):
        arrived.append(d_hidden)
        return real(ctx, d_out, d_hidden)

    monkeypatch.setattr(K.MLP, "backward", staticmethod(watched))
    out, hidden = K.mlp(x, up, down, 0.5)
    assert out.requires_grad and not hidden.requires_grad
    out.sum().backward()
    assert arrived == [None] and x.grad.isfinite().all()


# --- cross-entropy ---


def cap_and_learned(caps, device):
    """The cap and () where there is one; None and the pair, as an input of its own, where there are two."""
    return (caps, ()) if isinstance(caps, float) else (None, (torch.tensor(caps, device=device),))


def plain_nll(z, targets, cap):
    above, below = cap if isinstance(cap, torch.Tensor) else (cap, cap)
    logits = torch.where(z > 0, above * torch.tanh(z / above), below * torch.tanh(z / below))
    return F.cross_entropy(logits, targets, reduction="none")


@pytest.mark.parametrize("V,caps", [(64, 30.0), (1000, (20.0, 35.0)), (8192, 20.0), (8192, (30.0, 15.0)), (9001, 30.0)])
@cases(11, 20_000)
def test_softcap_nll(device, T, V, caps, monkeypatch):
    launches = []
    real = K.launch_softcap_nll
    monkeypatch.setattr(K, "launch_softcap_nll", lambda *a, **named: launches.append(1) or real(*a, **named))
    z = randn(T, V, device=device, scale=15.0)
    z[0], z[1, 0] = 0.0, 400.0  # a tie of all, and a saturated tanh
    targets = torch.randint(V, (T,), device=device)
    cap, learned = cap_and_learned(caps, device)
    (nats, lse), (wanted, _) = compare(
        lambda z, targets, c=cap: K.softcap_nll(z, targets, c),
        lambda z, targets, c=cap: (plain_nll(z, targets, c), K.softcap_nll_reference(z, targets, c)[1]),
        (z, targets, *learned),
        (torch.rand(T, device=device) - 0.3, 0),
        0.006,
    )
    assert (nats - wanted).abs().max() < 1e-4
    assert (lse - K.softcap(z, *(learned or (cap,))).logsumexp(-1)).abs().max() < 1e-4
    assert abs(nats[0].item() - torch.tensor(float(V)).log().item()) < 1e-5
    assert len(launches) == (0 if learned else 2)  # the kernel serves one cap, forward and backward


@cases(3)
def test_caps_whose_exponential_overflows(device, T):
    """The kernel subtracts no maximum: beyond exp(88) it leaves the row to the reference."""
    z = torch.full((T, 8192), 1e4, device=device, dtype=torch.bfloat16)
    for cap in (78.0, 79.5, 500.0):
        nats, lse = K.softcap_nll(z, torch.zeros(T, dtype=torch.int64, device=device), cap)
        assert (nats - torch.tensor(8192.0).log()).abs().max() < 1e-3 and (lse - nats - cap).abs().max() < 1e-3


@pytest.mark.parametrize("caps", [30.0, (30.0, 25.0)])
@cases(9)
def test_head_loss(device, T, caps):
    d, V = (32, 200) if device == "cpu" else (512, 8192)
    x, w = randn(T, d, device=device), randn(V, d, device=device, scale=3 * d**-0.5)
    targets = torch.randint(V, (T,), device=device)
    weight = torch.rand(T, device=device) / T
    weight[-1] = 0  # padding
    cap, learned = cap_and_learned(caps, device)
    ours = lambda x, w, targets, c=cap: K.head_loss(x, w, targets, c, weight)
    plain = lambda x, w, targets, c=cap: (plain_nll(F.linear(x, w), targets, c) * weight).sum()
    inputs = (x, w, targets, *learned)
    for frozen in ((), (1, 2), (0, 2), (3,)):
        compare(ours, plain, inputs, (-3.0,), 0.01, frozen=frozen)
    with torch.no_grad():
        assert error(ours(*inputs), plain(x.float(), w.float(), *inputs[2:])) < 0.005


# --- heads ---


def rope(T, n, device):
    angle = torch.arange(T, device=device)[:, None] * 100.0 ** -(torch.arange(n, device=device) / n)
    return angle.cos(), angle.sin()


@pytest.mark.parametrize(
    "H,KV,D,n,copies", [(8, 4, 64, 8, 1), (8, 4, 64, 8, 2), (4, 2, 128, 16, 2), (4, 1, 32, 16, 4), (2, 2, 16, 4, 1)]
)
@cases(37)
def test_qkv_heads(device, T, H, KV, D, n, copies):
    gain = randn(H, device=device, dtype=torch.float32) + 5
    inputs = randn(T, (H + 2 * KV) * D, device=device), gain, *rope(T, n, device)
    weights = [
        randn(T, heads, D, device=device, seed=heads + i, dtype=torch.float32)
        for i, heads in enumerate((H, copies * KV, copies * KV, KV))
    ]
    compare(
        lambda *t: K.qkv_heads(*t, KV, copies, 1e-6),
        lambda *t: K.qkv_heads_reference(*t, KV, copies, 1e-6),
        inputs,
        weights,
        0.015,
        frozen=(2, 3),
    )


@cases(10)
def test_value_heads_are_a_view_of_the_product(device, T):
    qkv = randn(T, 16 * 64, device=device)
    _, _, v, own = K.qkv_heads(qkv, torch.full((8,), 5.0, device=device), *rope(T, 8, device), 4, 2, 1e-6)
    assert own.untyped_storage().data_ptr() == qkv.untyped_storage().data_ptr()
    assert torch.equal(own, qkv.view(T, 16, 64)[:, 12:])
    assert torch.equal(v[:, 0::2], own) and torch.equal(v[:, 1::2], own)


@pytest.mark.parametrize("slope,top", [(0.5, 1.0), (1.0, 2.0)])
@pytest.mark.parametrize("H,KV,D", [(8, 4, 64), (4, 4, 16), (8, 1, 32)])
@cases(37)
def test_xsa_gate(device, T, H, KV, D, slope, top):
    y, packed, z = randn(T, H, D, device=device), randn(T, H + 2 * KV, D, device=device), randn(T, H, device=device)
    weight = randn(T, H, D, device=device, seed=3, dtype=torch.float32)
    compare(
        lambda *t: K.xsa_gate(*t, slope, top),
        lambda *t: K.xsa_gate_reference(*t, slope, top),
        (y, packed[:, -KV:], z),
        (weight,),
        0.006,
    )
    strided = K.xsa_gate(y, packed[:, -KV:], z, slope, top)
    assert torch.equal(strided, K.xsa_gate(y, packed[:, -KV:].contiguous(), z, slope, top))
    along_v = (strided.unflatten(1, (KV, -1)).float() * packed[:, -KV:, None].float()).sum(-1)
    assert (along_v.abs() < 0.3 * top).all()  # nothing is left of it


# --- embeddings ---


@pytest.mark.parametrize("channels", [12, 16, 0])
@cases(23)
def test_embed(device, T, channels):
    V, d = (30, 64) if device == "cpu" else (8192, 512)
    tokens = torch.randint(V, (T,), device=device)
    table, gate = randn(V, d, device=device, dtype=torch.float32), randn(channels, device=device, dtype=torch.float32)
    previous, positions = tokens.roll(1), torch.arange(T, device=device, dtype=torch.int32) % 7

    def by(function, dtype):
        def of(table, gate, strength):
            smear = (gate, strength) if channels else (None, None)
            return function(tokens, previous, positions, table, *smear, 1e-6, dtype)

        return of

    inputs = table, gate, torch.tensor(0.7, device=device)
    weight = randn(T, d, device=device, seed=1, dtype=torch.float32)
    weight += F.embedding(previous, table)  # so that the strength has a gradient beyond rounding
    compare(by(K.embed, torch.bfloat16), by(K.embed_reference, torch.float32), inputs, (weight,), 0.015)


# --- weighted sums of streams ---

ONE, ABSENT, Sum = K.ONE, K.ABSENT, K.Sum
FORMS = {  # rows of weights, and the sums
    "norm of one stream": (0, [Sum((ONE,), 1.0, keep=False)]),
    "sum of two and its norm": (0, [Sum((ONE, ONE), 0.7)]),
    "attention's input": (3, [Sum((0, 1, 1, 2), 0.7), Sum((ONE, ABSENT, ABSENT, ABSENT))]),
    "the same, and the stream": (
        2,
        [Sum((0, 1, 1), 0.7), Sum((ONE, ABSENT, ABSENT)), Sum((ABSENT, ONE, ONE))],
    ),
    "lane 0": (
        5,
        [
            Sum((0, 1, ABSENT, 2), 0.3, keep=False),
            Sum((ONE, ABSENT, ABSENT, ABSENT)),
            Sum((ABSENT, 3, ABSENT, 4)),
            Sum((ABSENT, ABSENT, ONE, ABSENT)),
        ],
    ),
    "both lanes": (6, [Sum((0, ABSENT, 2, 4)), Sum((ABSENT, 1, 3, 5), 0.9)]),
    "a stream and its norm": (1, [Sum((ABSENT, ONE), 1.0), Sum((0, ABSENT))]),
}


def combining(name, device, T, d=None):
    """Inputs of combine(), a loss weight for each output, and combine and its reference as functions of the inputs,
    which give every sum and norm that is not None."""
    rows, sums = FORMS[name]
    d = d or (64 if device == "cpu" else 512)
    streams = [randn(T, d, device=device, seed=i, scale=1 + i) for i in range(len(sums[0].weights))]
    w = [randn(rows, d, device=device, dtype=torch.float32)] if rows else []
    count = sum(s.keep + (s.norm_scale is not None) for s in sums)
    weights = [randn(T, d, device=device, seed=7 + i, dtype=torch.float32) for i in range(count)]

    def call(function):
        def outputs(*tensors):
            results = function(tensors[bool(rows) :], sums, tensors[0] if rows else None, 1e-6)
            assert len(results) == len(sums)
            for s, result in zip(sums, results):
                assert (result.sum is not None) == s.keep and (result.normed is not None) == (s.norm_scale is not None)
            return tuple(t for result in results for t in result if t is not None)

        return outputs

    of_one_term = lambda streams, *rest: K.combine([(x,) for x in streams], *rest)
    return w + streams, weights, call(of_one_term), call(K.combine_reference)


@pytest.mark.parametrize("name", FORMS)
@cases(21)
def test_combine(device, T, name):
    inputs, weights, ours, reference = combining(name, device, T)
    compare(ours, reference, inputs, weights, 0.01)


@pytest.mark.parametrize("d", [1, 40, 384])
@cases(6)
def test_combine_of_any_width(device, T, d):
    inputs, weights, ours, reference = combining("lane 0", device, T, d)
    compare(ours, reference, inputs, weights, 0.01)


@pytest.mark.parametrize("frozen", [(0,), (1,), (2, 3), (0, 1, 2)])
@cases(9)
def test_combine_of_frozen_inputs(device, T, frozen):
    inputs, weights, ours, reference = combining("attention's input", device, T)
    compare(ours, reference, inputs, weights, 0.01, frozen=frozen)


@cases(9)
def test_combine_where_an_output_is_not_used(device, T):
    inputs, weights, ours, reference = combining("attention's input", device, T)
    for unused in ({0}, {1}, {2}, {1, 2}):
        some = lambda function: lambda *t: tuple(out for i, out in enumerate(function(*t)) if i not in unused)
        used = [w for i, w in enumerate(weights) if i not in unused]
        compare(some(ours), some(reference), inputs, used, 0.01, frozen=())


@cases(9)
def test_a_stream_handed_on_is_no_copy(device, T):
    inputs, _, ours, _ = combining("attention's input", device, T)
    assert ours(*inputs)[2].data_ptr() == inputs[1].data_ptr()


@cases(5)
def test_combine_of_one_stream_twice(device, T):
    x, w = randn(T, 32, device=device), randn(2, 32, device=device, dtype=torch.float32)
    weights = [randn(T, 32, device=device, seed=i, dtype=torch.float32) for i in range(2)]
    of_one_term = lambda terms, *rest: K.combine([(x,) for x in terms], *rest)
    call = lambda function: lambda w, x: tuple(function((x, x), [Sum((0, 1), 0.5)], w, 1e-6)[0])
    compare(call(of_one_term), call(K.combine_reference), (w, x), weights, 0.01)


@cases(7)
def test_a_stream_of_several_terms_is_their_sum(device, T):
    a, b, c = (randn(T, 64, device=device, seed=i) for i in range(3))
    w = randn(2, 64, device=device, dtype=torch.float32)
    weights = [randn(T, 64, device=device, seed=i, dtype=torch.float32) for i in range(2)]
    sums = [Sum((0, 1, ABSENT)), Sum((ABSENT, ONE, 0), keep=False, norm_scale=0.5)]

    def ours(a, b, c, w):
        total, normed = K.combine([(a,), (b, c), ()], sums, w, 1e-6)
        return total.sum, normed.normed

    def plain(a, b, c, w):
        return w[0] * a + w[1] * (b + c), 0.5 * F.rms_norm(b + c, (64,), eps=1e-6)

    compare(ours, plain, (a, b, c, w), weights, 0.01)


# --- a product and a gate ---


@pytest.mark.parametrize("frozen", [(), (0,), (1, 2)])
@cases(50)
def test_gated_linear(device, T, frozen):
    inputs = randn(T, 64, device=device), randn(96, 64, device=device), randn(4, 12, device=device)
    weights = (
        randn(T, 96, device=device, seed=1, dtype=torch.float32),
        randn(T, 4, device=device, seed=2, dtype=torch.float32),
    )
    plain = lambda x, w, gate: (F.linear(x, w), F.linear(x[:, :12], gate))
    compare(K.gated_linear, plain, inputs, weights, 0.01, frozen=frozen)


# --- the whole network ---


@cases(64, 4096)
@pytest.mark.parametrize(
    "variant",
    [
        {},
        {"model_dim": 48},
        {"parallel_start_layer": 0},
        {"parallel_mode": "gptj", "parallel_start_layer": 1},
        {"num_layers": 7, "parallel_start_layer": 4},
    ],
)
@pytest.mark.parametrize("train", (True, False))
def test_the_network_on_kernels_equals_the_plain_one(device, T, train, variant, monkeypatch):
    """In bf16 against the references in fp32: the loss and the gradient of every parameter."""
    cfg = helpers.config(**{"model_dim": 64, "rope_dims": 8} | variant)
    tokens = torch.randint(4, cfg.vocab_size, (T // 2 * 2,), generator=torch.Generator().manual_seed(0)).to(device)
    seq = K.Seq(*(t.to(device) if isinstance(t, torch.Tensor) else t for t in helpers.packed_seq([T // 2, T // 2])))

    def result(dtype):
        model = helpers.randomize(K.GPT(cfg, "reference", dtype), 0).to(device)
        with torch.set_grad_enabled(train):
            loss = model.nll(model.trunk(tokens, seq, looped=True), tokens.roll(-1)).nats.mean()
        if train:
            loss.backward()
        return loss.detach(), {name: p.grad for name, p in model.named_parameters()}

    loss, grads = result(torch.bfloat16)
    monkeypatch.setattr(K, "use_kernels", lambda *_, **__: False)
    wanted, wanted_grads = result(torch.float32)
    assert error(loss, wanted) < 0.01
    for name in grads if train else ():
        assert error(grads[name], wanted_grads[name]) < 0.06, name
