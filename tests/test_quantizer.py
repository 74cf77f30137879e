"""GPTQ against a plain solver, the Hessians it weighs errors with, and the way from weights to arrays and back."""

import dataclasses
import functools
import hashlib
import itertools
import json
import math
import shutil
import struct
import zlib

import numpy as np
import pytest
import torch
from helpers import (
    BOS,
    RUN,
    VOCAB,
    base_run,
    config,
    data,
    forked,
    gpt,
    main,
    own_data,
    packed_seq,
    processor,
    random_documents,
    ranks,
    result,
)
from torch.utils._python_dispatch import TorchDispatchMode

import train_gpt
from train_gpt import (
    MATRICES,
    Quantizer,
    TrainStream,
    collect_hessians,
    error_feedback,
    flatten,
    folded_state,
    load_state,
    unflatten,
)


def gptq(w, hessian, step, limit, damping, column_scale=None, block=128):
    scale = torch.ones_like(w[:, 0]) if column_scale is None else column_scale
    steps = train_gpt.StepSizes(step, scale.log2() * train_gpt.COLUMN_STEPS, limit)
    return train_gpt.gptq(w, error_feedback(hessian, damping), steps, block)


def quantize(model, hessians, cfg, group, saved=0.0):
    """The artifact's arrays."""
    return flatten(Quantizer(model, hessians, cfg, group).quantize(saved))


def dequantize(arrays):
    return unflatten(arrays).state()


def dequantize_matrix(arrays, name, layer):
    return unflatten(arrays).matrices[name][layer].dequantize()


def problem(n=2, rows=5, cols=24, seed=0):
    """Weights, correlated inputs' second moments, row steps."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(n, rows, cols, generator=g)
    mix = torch.randn(n, cols, cols, generator=g) / cols**0.5
    x = torch.randn(n, 200, cols, generator=g) @ mix
    return w, x.mT @ x / 200, torch.rand(n, rows, generator=g) * 0.2 + 0.3


def plain_gptq(w: np.ndarray, h: np.ndarray, step: np.ndarray, limit: np.ndarray, damping: float) -> np.ndarray:
    """One matrix by the definition: round the column of largest diagonal, move its error onto the rest by the inverse
    of what remains of H.

    step (rows, cols), limit (cols,): the published recipe, with AWQ-lite's finer columns.
    """
    w, h = w.astype(np.float64).copy(), h.astype(np.float64).copy()
    cols = w.shape[1]
    dead = np.diag(h) == 0
    w[:, dead] = 0
    h[np.diag_indices(cols)] += dead
    order = sorted(range(cols), key=lambda j: (-h[j, j], j))
    h[np.diag_indices(cols)] += damping * np.diag(h).mean()
    symbols = np.zeros(w.shape)
    for i, j in enumerate(order):
        rest = order[i:]
        inverse = np.linalg.inv(h[np.ix_(rest, rest)])
        symbols[:, j] = np.clip(np.round(w[:, j] / step[:, j]), -limit[j], limit[j])
        error = (w[:, j] - symbols[:, j] * step[:, j]) / inverse[0, 0]
        w[:, rest] -= np.outer(error, inverse[0])
    return symbols


@pytest.mark.parametrize("device", ("cpu", pytest.param("cuda", marks=pytest.mark.gpu)))
@pytest.mark.parametrize("block", (128, 5))
@pytest.mark.parametrize("fine", (1.0, 0.5))
def test_gptq_against_the_definition(block, fine, device):
    w, h, step = problem()
    h[1, 3] = h[1, :, 3] = 0  # an input that never fires
    column = torch.ones(2, 24)
    column[0, 8:16] = fine
    symbols = gptq(*(t.to(device) for t in (w, h, step)), 7, 0.01, column.to(device), block=block).cpu()
    assert symbols.dtype == torch.int16 and symbols[1].abs().max() <= 7 and not symbols[1, :, 3].any()
    for i in range(2):
        limit = np.where(column[i] < 1, 127, 7)
        wanted = plain_gptq(w[i].numpy(), h[i].numpy(), step[i, :, None].numpy() * column[i].numpy(), limit, 0.01)
        assert (symbols[i].numpy() == wanted).all()


class Recorded(TorchDispatchMode):
    """Stands for torch.cuda.CUDAGraph and, entered, for torch.cuda.graph: keeps the operations with the very tensors
    they met, and runs them again."""

    replays = 0

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        self.operations.append((function, args, kwargs or {}, found))
        return found

    def replay(self):
        Recorded.replays += 1
        for function, args, kwargs, found in self.operations:
            again = function(*args, **kwargs)
            if (
                isinstance(found, torch.Tensor) and found.data_ptr() != again.data_ptr()
            ):  # neither a view nor in place: a graph's memory is fixed
                found.copy_(again)


def test_replayed_blocks_are_computed_blocks(monkeypatch):
    """What a GPU does after the first block: the operations of the second, in its memory, for every block but a
    shorter last one."""
    w, h, step = problem(rows=7, cols=33, seed=2)
    column = torch.ones(2, 33)
    column[1, 4:20] = 0.5
    wanted = gptq(w, h, step, 7, 0.01, column, block=6)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recorded)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: graph)
    monkeypatch.setattr(Recorded, "replays", 0)
    assert torch.equal(gptq(w, h, step, 7, 0.01, column, block=6), wanted) and Recorded.replays == 4
    assert (
        torch.equal(gptq(w, h, step, 7, 0.01, column), gptq(w, h, step, 7, 0.01, column, block=33))
        and Recorded.replays == 4
    )


def test_gptq_beats_rounding_where_it_matters():
    w, h, step = problem(seed=3)
    error = lambda symbols: torch.einsum(
        "nri,nij,nrj->", w - symbols * step[:, :, None], h, w - symbols * step[:, :, None]
    ).item()
    rounded = (w / step[:, :, None]).round().clamp(-31, 31)
    assert error(gptq(w, h, step, 31, 0.01).float()) < 0.7 * error(rounded)


def test_gptq_leaves_its_inputs_alone():
    w, h, step = problem()
    copies = w.clone(), h.clone(), step.clone()
    gptq(w, h, step, 7, 0.01)
    assert all(torch.equal(a, b) for a, b in zip(copies, (w, h, step)))


def every_path(rows):
    """Values modulo 4 of all paths of the trellis: the parity is the state's, and either value of it may follow."""
    for turns in itertools.product((0, 2), repeat=rows):
        state, path = 0, []
        for turn in turns:
            path.append((state & 1) + turn)
            state = train_gpt.next_state(state, path[-1])
        yield path


@pytest.mark.parametrize("rows", (1, 2, 5, 9))
def test_the_nearest_path_is_the_nearest_of_all(rows):
    x = torch.randn(4, rows, generator=torch.Generator().manual_seed(rows)) * 5
    near = train_gpt.nearest_in_subset(x[:, None], torch.tensor([*every_path(rows)]))
    wanted = ((x[:, None] - near) ** 2).sum(2).argmin(1)
    assert train_gpt.nearest_path(x).tolist() == near[range(4), wanted].tolist()


def test_a_trellis_along_the_rows_finds_the_best_path():
    """Without feedback between columns nothing is lost by keeping one path into each state."""
    w = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1)) * 5
    h = torch.diag_embed(torch.rand(2, 8, generator=torch.Generator().manual_seed(2)) + 0.1)
    steps = train_gpt.StepSizes(torch.ones(2, 3), torch.zeros(2, 8), 127)
    found = train_gpt.gptq(w, error_feedback(h, 0.0, sort=False), steps, rounding=train_gpt.trellis_along)
    weight = h.diagonal(dim1=1, dim2=2)[:, None]
    error = ((w - found) ** 2 * weight).sum(2)
    paths = torch.tensor([*every_path(8)])
    near = train_gpt.nearest_in_subset(w[:, :, None], paths)
    best = ((w[:, :, None] - near) ** 2 * weight[:, :, None]).sum(3).amin(2)
    assert torch.allclose(error, best, rtol=1e-4)
    assert train_gpt.follows_trellis(found.permute(2, 0, 1).int().numpy())


@pytest.mark.parametrize("down", (False, True))
def test_the_trellis_has_less_error_at_equal_bytes(down):
    """Feedback, the columns' step sizes and the coder included; the code comes back."""
    w, h, _ = problem(n=1, rows=96 if down else 256, cols=160 if down else 128, seed=4)
    other = np.zeros((1, 96 if down else 128, 3000), np.int64)  # tells the coder which side is the residual stream's

    def errors_and_bytes(level, rounding, sort):
        feedback = error_feedback(h, 0.01, sort)
        steps = train_gpt.rate_curve(w, feedback, torch.ones(w.shape[:2]), 1.0, 1.0).step_sizes_at(level)
        q = train_gpt.gptq(w, feedback, steps, rounding=rounding)
        e = w - q * steps.row[..., None] * steps.column_scale[:, None]
        code, _ = train_gpt.encode_stacks([other, q.numpy().astype(np.int64)])
        assert (train_gpt.decode_stacks(code)[0][1] == q.numpy()).all()
        return ((e @ h) * e).sum().item(), len(code)

    error, size = errors_and_bytes(-5.0, train_gpt.round_columns, True)
    rounding = functools.partial(train_gpt.round_columns, down=True) if down else train_gpt.trellis_along
    finer, smaller = errors_and_bytes(-6.0, rounding, down)
    assert finer * 4 ** ((smaller - size) * 8 / w.numel()) < 0.87 * error  # a bit a weight is a factor of 4


def stack_headers(code: bytes) -> list[dict]:
    """What the encoder chose for each stack."""
    return json.loads(zlib.decompress(code[16 : 16 + struct.unpack_from("<I", code)[0]]))


def with_headers(code: bytes, headers: list[dict]) -> bytes:
    old, *sizes = struct.unpack_from("<4I", code)
    side = zlib.compress(json.dumps(headers).encode())
    return struct.pack("<4I", len(side), *sizes) + side + code[16 + old :]


def test_matrices_of_a_model_go_on_the_trellis(tmp_path):
    """Every kind, in the direction in which the coder reads it; not without the setting, nor by the published rule."""
    cfg = config(RUN, artifact_cap=25_000, artifact_margin=0)
    model = gpt(cfg)

    def followed(**settings):
        changed = dataclasses.replace(cfg, **settings)
        arrays = quantize(model, random_hessians(model), changed, ranks(changed))
        round_trip(arrays, tmp_path / "x.bin")
        _, code, _ = train_gpt.read_artifact(tmp_path / "x.bin")
        return sum(header["trellis"] for header in stack_headers(code))

    assert followed() == len(MATRICES)
    assert followed(trellis=False) == followed(rate_distortion=False) == 0


def test_the_trellis_has_steps_as_fine_as_the_uniform_grid(tmp_path):
    """Where bytes are no limit, too: values are then above a byte, stay on the trellis and come back."""
    cfg = config(RUN, artifact_cap=1_000_000, artifact_margin=0)
    model = gpt(cfg)
    state = folded_state(model)
    sizes, errors = [], []
    for trellis in (False, True):
        changed = dataclasses.replace(cfg, trellis=trellis)
        arrays = quantize(model, random_hessians(model), changed, ranks(changed))
        sizes.append(round_trip(arrays, tmp_path / "x.bin"))
        found = dequantize(arrays)
        errors.append(sum(((found[name] - state[name]) ** 2).sum().item() for name in MATRICES))
    assert max(np.abs(a).max() for name, a in arrays.items() if name.endswith(".symbols")) > 127
    assert sizes[1] < 1.01 * sizes[0] and errors[1] < errors[0]


@pytest.mark.parametrize("correlated", (False, True))
def test_paths_with_far_values_come_back(correlated):
    """Through every way of the coder: with a predictor and without, several chunks of rows, values that are escaped in
    even states and in odd ones; and half a bit a value and more below the same values on no trellis."""
    rng = np.random.default_rng(5)
    x = rng.standard_normal((2, 700, 48))
    if correlated:
        x = x @ (np.eye(48) + np.triu(np.full((48, 48), 0.4), 1)) / 3
    x[rng.random(x.shape) < 0.002] *= 40
    path = np.empty(x.shape, np.int64)
    state = np.zeros(x.shape[:2], np.int64)
    for j in range(48):
        path[..., j] = 2 * np.rint(4 * x[..., j]).astype(np.int64).clip(-120, 120) + (state & 1)
        state = train_gpt.next_state(state, path[..., j])
    code, _ = train_gpt.encode_stacks([path])
    header = stack_headers(code)[0]
    assert header["trellis"] == 1 and (header["prior"] < 2) == correlated
    assert (train_gpt.decode_stacks(code)[0][0] == path).all()
    path[0, 0, 0] ^= 1  # its first value is odd now, where state 0 asks for an even one
    off, _ = train_gpt.encode_stacks([path])
    assert (train_gpt.decode_stacks(off)[0][0] == path).all()
    assert 8 * (len(off) - len(code)) > 0.5 * path.size


@pytest.mark.parametrize("trellis", (2, -1, 1e30, "1", None, [1]))
def test_a_trellis_that_is_none_is_refused(trellis):
    code, _ = train_gpt.encode_stacks([gaussian(70, 33, 3.0)[None].astype(np.int64)])
    headers = stack_headers(code)
    headers[0]["trellis"] = trellis
    with pytest.raises(ValueError, match="trellis"):
        train_gpt.decode_stacks(with_headers(code, headers))


def test_a_code_without_a_trellis_in_its_header_comes_back():
    """What earlier scripts wrote."""
    q = gaussian(70, 33, 3.0)[None].astype(np.int64)
    code, _ = train_gpt.encode_stacks([q])
    headers = stack_headers(code)
    del headers[0]["trellis"]
    stacks, _ = train_gpt.decode_stacks(with_headers(code, headers))
    assert (stacks[0] == q).all()


def test_hessians_are_mean_second_moments_of_the_inputs():
    """Every kind and layer, the visits of a looped layer added up, over calibration batches spread over the training
    stream."""
    cfg = config(RUN, data_path=str(data()), gptq_calibration_batches=2)
    model, stream = gpt(cfg), TrainStream(cfg)
    found = collect_hessians(model, stream, cfg, ranks(cfg))
    wanted, sources = {}, set()
    with torch.no_grad():
        for i in range(2):
            start = i * (stream.tokens - 128) // 2
            sources.add(start)
            batch = stream.micro_batch(start, 128, 48)
            inputs = {}
            tap = lambda kind, layer, x, inputs=inputs: inputs.setdefault((kind, layer), []).append(x.double())
            hidden = model.trunk(batch.tokens, batch.seq, looped=True, tap=tap)
            inputs["head", 0] = [hidden.double()]
            for key, xs in inputs.items():
                wanted[key] = wanted.get(key, 0) + sum(x.T @ x for x in xs)
    assert len(sources) == 2 and len(wanted) == 4 * 5 + 1
    for (kind, layer), h in wanted.items():
        have, want = found[kind][layer].double(), h / 2
        assert torch.allclose(have, want, rtol=1e-3, atol=1e-3 * float(want.abs().max())), (kind, layer)


def identity_hessians(model):
    eye = lambda n, layers: torch.eye(n).repeat(layers, 1, 1)
    rows = {f"{name}.rows": torch.ones(getattr(model, name).shape[:-1]) for name in train_gpt.MATRICES}
    return {"qkv": eye(32, 5), "o": eye(32, 5), "up": eye(32, 5), "down": eye(64, 5), "head": eye(32, 1), **rows}


def test_quantize_and_back():
    """Within half a step of the folded weights, symbols within their range, everything else to fp16; and the model that
    comes back computes the same."""
    cfg = config(RUN, rate_distortion=False, matrix_bits=6, embed_bits=7)
    model = gpt(cfg)
    arrays = quantize(model, identity_hessians(model), cfg, ranks(cfg))
    state, folded = dequantize(arrays), folded_state(model)
    assert set(state) == set(dict(model.named_parameters()))
    for name in ("qkv", "o", "up", "down", "tok_emb"):
        limit = 63 if name == "tok_emb" else 31
        sigmas = {"tok_emb": cfg.embed_clip_sigmas, "up": cfg.mlp_clip_sigmas, "down": cfg.mlp_clip_sigmas}.get(
            name, cfg.attn_clip_sigmas
        )
        for layer, w in enumerate(folded[name].double().numpy().reshape(-1, *folded[name].shape[-2:])):
            symbols, step = (
                arrays[f"{name}.{layer}.symbols"],
                train_gpt.dequantize_scales(arrays[f"{name}.{layer}.step"]).astype(np.float64),
            )
            assert symbols.dtype == np.int8 and abs(symbols.astype(int)).max() <= limit
            assert np.allclose(step, sigmas * w.std(1, ddof=1) / limit, rtol=0.023)  # codes are 4.4 % apart
            assert (abs(w - symbols * step[:, None]) <= 0.501 * step[:, None]).all(), (name, layer)
        assert state[name].shape == folded[name].shape
    for name in set(state) - {"qkv", "o", "up", "down", "tok_emb"}:
        assert torch.equal(state[name], folded[name].half().float()), name
    assert torch.equal(state["attn_scale"], torch.ones(5, 32)) and torch.equal(state["mlp_scale"], torch.ones(5, 32))


def test_folding_changes_nothing():
    model, other = gpt(), gpt(seed=1)
    document = random_documents([20])[0]
    load_state(other, folded_state(model), "memory")
    run = lambda m: m.trunk(torch.from_numpy(document), packed_seq([20]), looped=True)
    with torch.no_grad():
        assert torch.allclose(run(model), run(other), atol=1e-4)
        assert model.attn_scale.std() > 0.1  # the model itself is as it was


def test_many_bits_are_nearly_lossless():
    cfg = config(
        RUN,
        rate_distortion=False,
        matrix_bits=8,
        embed_bits=8,
        mlp_clip_sigmas=5.0,
        attn_clip_sigmas=5.0,
        embed_clip_sigmas=5.0,
    )
    model, other = gpt(cfg), gpt(cfg, seed=1)
    load_state(other, dequantize(quantize(model, identity_hessians(model), cfg, ranks(cfg))), "memory")
    document = torch.from_numpy(random_documents([20])[0])
    with torch.no_grad():
        a, b = (m.trunk(document, packed_seq([20]), looped=True) for m in (model, other))
    assert torch.nn.functional.cosine_similarity(a, b).mean() > 0.98


def test_constant_rows_survive():
    """Rows without any spread have a step of 0 by the rule; they must come back finite."""
    model = gpt()
    with torch.no_grad():
        model.o[1] = 0
        model.down[2, 3] = 0.25
    state = dequantize(quantize(model, identity_hessians(model), model.cfg, ranks(model.cfg)))
    assert not state["o"][1].any() and torch.isfinite(state["down"]).all()


@pytest.mark.parametrize(
    "change, message",
    (
        (lambda s: s.pop("qkv"), "holds no qkv"),
        (lambda s: s.update(o=torch.zeros(2, 2)), r"holds \(2, 2\) o"),
        (lambda s: s.update(extra=torch.zeros(1)), r"holds \(1,\) extra"),
    ),
)
def test_state_that_does_not_fit_names_its_file(change, message):
    model = gpt()
    state = folded_state(model)
    change(state)
    with pytest.raises(train_gpt.UserError, match=f"^somewhere/model.bin: {message}"):
        load_state(model, state, "somewhere/model.bin")


EVERYTHING = dict(
    rate_distortion=False,
    lqer_enabled=True,
    awq_lite_enabled=True,
    gated_attn_quant_gate=True,
    logit_calibration_enabled=True,
)


def test_the_artifact_holds_what_was_quantised(tmp_path):
    """Bit for bit through the file, with every published option: the weights scored after reloading are those that
    quantisation made."""
    shutil.copy(base_run() / "trained.npz", tmp_path)
    main({**RUN, **EVERYTHING, "quantize_only": True}, tmp_path).ok()
    arrays, meta = train_gpt.load_artifact(tmp_path / "model.bin")
    assert arrays.pop("logit_calibration").shape == (15,)
    trained = dict(np.load(base_run() / "trained.npz"))
    del trained["meta"]
    cfg = train_gpt.Config.from_env({"DATA_PATH": str(data()), "DEVICE": "cpu"}, stored=meta["settings"])
    model = train_gpt.GPT(cfg, "reference", torch.float32)
    load_state(model, {n: torch.from_numpy(a) for n, a in trained.items()}, "trained.npz")
    again = quantize(model, collect_hessians(model, TrainStream(cfg), cfg, ranks(cfg)), cfg, ranks(cfg))
    assert set(again) == set(arrays) and any(name.endswith(".column") for name in arrays)
    for name, array in again.items():
        assert (
            arrays[name].dtype == array.dtype
            and arrays[name].shape == array.shape
            and arrays[name].tobytes() == array.tobytes()
        ), name


# ---- rate-distortion ----


def random_hessians(model, seed=0):
    """Hessians of correlated inputs of very different sizes, and rows that matter differently."""
    g = torch.Generator().manual_seed(seed)
    found = {}
    for kind, eye in identity_hessians(model).items():
        x = (
            torch.randn(*eye.shape[:1], 200, eye.shape[-1], generator=g)
            * torch.rand(eye.shape[-1], generator=g).exp() ** 3
        )
        found[kind] = x.mT @ x / 200 if eye.ndim == 3 else torch.rand(eye.shape, generator=g) ** 2 + 0.01
    return found


def test_steps_have_equal_slopes_and_spend_the_budget():
    """step^2 * (what an error of this row and column costs) is the same for every weight of every matrix, up to the
    rounding of column factors."""
    cfg = config(RUN, artifact_cap=20_000, artifact_margin=0, rate_rows=1.0, rate_embed_rows=1.0)
    model = gpt(cfg)
    state, hessians = folded_state(model), random_hessians(model)
    weights = {name: state[name] if state[name].ndim == 3 else state[name][None] for name in MATRICES}
    quantizer = Quantizer(model, hessians, cfg, ranks(cfg))
    plan = quantizer.step_sizes(0.0)
    scales = {matrix: getattr(model, vector).detach() for vector, matrix in train_gpt.FOLDED.items()}
    slopes, bits = [], 0.0
    for name, kind in MATRICES.items():
        h, row, column = hessians[kind.hessian].double(), plan[name].row, plan[name].column_scale
        gradient = hessians[f"{name}.rows"].view(row.shape).double() / (scales[name] ** 2 if name in scales else 1)
        gradient = gradient + 0.1 * gradient.mean(1, keepdim=True)
        for layer in range(len(row)):
            order = quantizer.feedback[name].order[layer]
            damped = h[layer] + cfg.gptq_damping * h[layer].diagonal().mean() * torch.eye(len(h[layer]))
            d = 1 / torch.linalg.cholesky(torch.linalg.inv(damped[order][:, order]), upper=True).diagonal() ** 2
            fine = (
                row[layer] > (weights[name][layer].abs() / column[layer]).amax(1) / 120
            )  # the others have no finer step
            slope = (
                (row[layer, fine, None] * column[layer, order]) ** 2
                * gradient[layer, fine, None]
                * d
                / h[layer].trace()
            )
            slopes.append(slope.log2().flatten())
            bits += (
                (
                    0.5
                    * h.size(1)
                    * (1 + 0.5 * math.pi * math.e * (weights[name][layer].std(1) / row[layer]) ** 2).log2()
                )
                .sum()
                .item()
            )
    slopes = torch.cat(slopes)
    assert len(slopes) > 20_000 and slopes.max() - slopes.min() < 0.51  # column factors are 1/4 octave apart
    assert abs(bits / (8 * 20_000) - 1) < 0.01


def test_equal_slopes_beat_equal_sigmas():
    """Less loss-weighted error than the published steps at the same code length."""
    cfg = config(RUN, artifact_cap=25_000, artifact_margin=0)
    model = gpt(cfg)
    hessians, state = random_hessians(model), folded_state(model)

    def error(arrays):
        found = dequantize(arrays)
        total = 0.0
        for name, kind in MATRICES.items():
            e = (found[name] - state[name]).view(-1, *state[name].shape[-2:]).double()
            h = hessians[kind.hessian].double()
            rows = hessians[f"{name}.rows"].view(e.shape[:2]) / h.diagonal(dim1=1, dim2=2).sum(1)[:, None]
            rows = rows / {"o": model.attn_scale, "down": model.mlp_scale}.get(name, torch.ones(())).detach() ** 2
            total += (torch.einsum("nri,nij,nrj->nr", e, h, e) * rows).sum().item()
        return total

    best = quantize(model, hessians, cfg, ranks(cfg))
    size = len(train_gpt.encode_artifact(best, {}))
    published = config(RUN, rate_distortion=False)
    other = next(
        a
        for a in (quantize(model, hessians, published, ranks(cfg), saved) for saved in np.arange(-2, 4, 0.1))
        if len(train_gpt.encode_artifact(a, {})) <= size
    )
    assert error(best) < 0.8 * error(other)


def curves(**settings):
    model = gpt(config(RUN, **settings))
    return Quantizer(model, random_hessians(model), model.cfg, ranks(model.cfg)).curves


def test_a_level_more_saves_a_bit_of_every_weight():
    """Where steps are fine but not the finest: bits_at falls by the number of weights for each level; step sizes
    double."""
    curve = curves()["up"]
    low, high = (curve._replace(finest=torch.zeros_like(curve.finest)).step_sizes_at(level) for level in (-9.0, -8.0))
    assert torch.equal(2 * low.row, high.row) and torch.equal(low.column_scale, high.column_scale)
    fine = curve._replace(finest=torch.zeros_like(curve.finest), row=curve.sigma)
    weights = curve.sigma.numel() * curve.column_codes.size(1)
    assert abs((fine.bits_at(-9.0) - fine.bits_at(-8.0)) / weights - 1) < 1e-4
    assert abs(fine.bits_at(-8.0) / weights - (8 + 0.5 * math.log2(2 * math.pi * math.e))) < 1e-3


def test_no_step_is_finer_than_symbols_reach():
    """At any level the largest weight of a row is at most the largest symbol."""
    for name, curve in curves().items():
        steps = curve.step_sizes_at(-60.0)
        assert torch.equal(steps.row, curve.finest) and steps.limit == 127, name
        assert curve.bits_at(-60.0) == curve.bits_at(-61.0) < curve.column_codes.size(1) * curve.row.numel() * 9


def test_the_level_spends_the_budget():
    """As much as the bisection resolves, never more; and a budget that no step can spend is no error."""
    found = list(curves().values())
    bits = lambda level: sum(curve.bits_at(level) for curve in found)
    for budget in (bits(-4.0) * 0.999, bits(0.0) * 0.999):
        level = train_gpt.level_for(found, budget)
        assert bits(level) <= budget < bits(level - 1e-3)
    assert bits(train_gpt.level_for(found, 1e12)) == bits(-60.0)


def search(rate_distortion, room, sizes):
    """Sizes that the attempts of a RateSearch come to -> the sizes it asked for, and what it settled on."""
    cfg = config(rate_distortion=rate_distortion, artifact_cap=room + 300, artifact_margin=100)
    found = train_gpt.RateSearch(cfg, 200, 8000)
    sizes, proposed = iter(sizes), []
    while not found.done():
        proposed.append(found.propose())
        size = next(sizes)
        found.observe(bytes(size), size)
    return proposed, len(found.best)


def test_the_search_ends_for_each_of_its_reasons():
    """The first size that fits, without RATE_DISTORTION; a thousandth is left; four attempts; nothing gains. All else
    goes on."""
    assert search(False, 10_000, (12_000, 10_001, 5_000)) == (pytest.approx([0.0, 2.003, 2.007], abs=1e-3), 5_000)
    assert search(True, 10_000, (12_000, 9_991)) == (pytest.approx([0.3, 2.303], abs=1e-3), 9_991)
    assert len(search(True, 10_000, (9_000, 9_500, 10_500, 9_600))[0]) == 4
    assert search(True, 100_000, (90_000, 90_009)) == (pytest.approx([0.3, 0.3 - 9.97], abs=1e-2), 90_009)
    assert search(True, 10_000, (9_800, 9_700, 9_600, 9_500)) == (
        pytest.approx([0.3, 0.103, -0.194, -0.591], abs=1e-3),
        9_800,
    )


def test_a_search_that_fits_nothing_names_the_cap():
    with pytest.raises(train_gpt.UserError, match="^ARTIFACT_CAP=10300: the model does not fit with any step"):
        search(True, 10_000, range(10_100, 20_000, 100))


@pytest.mark.parametrize("rate_distortion, share", ((True, 0.8), (True, 0.6), (False, 0.8)))
def test_the_artifact_fills_its_cap(rate_distortion, share, tmp_path):
    """Down to a cap that binds; with RATE_DISTORTION what remains is below one per cent, and never more than
    ARTIFACT_MARGIN less than the cap."""
    shutil.copy(base_run() / "trained.npz", tmp_path)
    sizes = result(base_run())["bytes"]
    cap = sizes["code"] + int(sizes["model"] * share)
    main(
        {
            **RUN,
            "quantize_only": True,
            "artifact_cap": cap,
            "artifact_margin": 50,
            "rate_distortion": rate_distortion,
            "ttt_enabled": False,
        },
        tmp_path,
    ).ok()
    total = result(tmp_path)["bytes"]["total"]
    assert total <= cap - 50 and (not rate_distortion or total > cap - 50 - 0.01 * sizes["model"])


def test_row_gradients_are_sums_over_tokens():
    """batch_moments estimates the squared gradients of single tokens' losses, without a backward pass for each."""
    cfg = config(RUN, data_path=str(data()))
    model = gpt(cfg)
    batch = TrainStream(cfg).micro_batch(0, 128, 48)
    found = sum(train_gpt.batch_moments(model, batch, seed, rows=True)["up.rows"] for seed in range(16))
    wanted = torch.zeros_like(model.up[..., 0])
    nats = model.nll(model.trunk(batch.tokens, batch.seq, looped=True), batch.targets.clamp(min=0)).nats
    for i in np.flatnonzero(batch.targets >= 0):
        wanted += torch.autograd.grad(nats[i], model.up, retain_graph=True)[0].square().sum(-1)
    ratio = found / 16 / wanted
    assert 0.8 < ratio.log().mean().exp() < 1.25 and ratio.log().std() < 0.5


def test_every_calibration_batch_teaches_the_rows():
    """The mean over all of them, with signs of each batch's own; and no backward pass where nothing asks for rows."""
    cfg = config(RUN, data_path=str(data()), gptq_calibration_batches=3)
    model, stream = gpt(cfg), TrainStream(cfg)
    found = collect_hessians(model, stream, cfg, ranks(cfg))
    parts = [
        train_gpt.batch_moments(model, stream.micro_batch(i * (stream.tokens - 128) // 3, 128, 48), i, True)
        for i in range(3)
    ]
    assert (
        set(found)
        == set(parts[0])
        == {kind.hessian for kind in MATRICES.values()} | {f"{name}.rows" for name in MATRICES}
    )
    assert all(torch.equal(found[kind], (parts[0][kind] + parts[1][kind] + parts[2][kind]) / 3) for kind in found)
    published = collect_hessians(
        model, stream, config(RUN, data_path=str(data()), gptq_calibration_batches=3, rate_distortion=False), ranks(cfg)
    )
    assert set(published) == {kind.hessian for kind in MATRICES.values()} and all(
        torch.allclose(published[kind], found[kind]) for kind in published
    )


def collect(rank: int, world: int, path):
    cfg = config(RUN, data_path=str(data()), gptq_calibration_batches=3, rank=rank, local_rank=rank, world_size=world)
    group = ranks(cfg)
    found = collect_hessians(gpt(cfg), TrainStream(cfg), cfg, group)
    if path and group.main:
        torch.save(found, path)
    group.close()
    return found


def test_moments_do_not_depend_on_the_number_of_ranks(tmp_path):
    """Two ranks for three batches: one of them has none in the second round."""
    forked(collect, 2, tmp_path / "found")
    wanted, found = collect(0, 1, None), torch.load(tmp_path / "found")
    assert set(wanted) == set(found) and all(torch.equal(wanted[kind], found[kind]) for kind in wanted)


# ---- LQER, AWQ-lite, logit calibration ----


@pytest.mark.parametrize("seed", (1, 2, 3))
def test_lqer_reduces_the_error(seed):
    """By the best product of its rank, in the Frobenius norm, rounded to few bits."""
    g = torch.Generator().manual_seed(seed)
    error = torch.randn(64, 40, generator=g) * 0.1 + torch.randn(64, 2, generator=g) @ torch.randn(2, 40, generator=g)
    correction = train_gpt.lqer(error, config())
    assert correction.a.shape == (64, 4) and set(np.unique(correction.a)) <= {-2, -1, 0, 1}
    assert abs(correction.b.astype(int)).max() <= 8
    assert correction.error == pytest.approx(error.norm().item())
    assert (error - correction.product(40)).norm() ** 2 < 0.5 * error.norm() ** 2


def test_lqer_corrects_the_matrices_of_largest_error():
    model = gpt()
    cfg = config(rate_distortion=False, lqer_enabled=True, lqer_top_k=2, embed_bits=4)
    arrays = quantize(model, identity_hessians(model), cfg, ranks(cfg))
    assert sum(name.endswith("lqer_a") for name in arrays) == 2
    plain = {name: a for name, a in arrays.items() if "lqer" not in name}
    w = folded_state(model)["tok_emb"]  # four bits err most
    corrected, uncorrected = (dequantize_matrix(found, "tok_emb", 0) - w for found in (arrays, plain))
    assert "tok_emb.0.lqer_a" in arrays and corrected.norm() < uncorrected.norm()


def test_awq_makes_the_most_salient_columns_finer(monkeypatch):
    monkeypatch.setattr(train_gpt, "AWQ_GROUP", 8)
    model = gpt()
    hessians = identity_hessians(model)
    hessians["up"][3, range(8, 16), range(8, 16)] = 400.0
    cfg = config(rate_distortion=False, awq_lite_enabled=True)
    arrays = quantize(model, hessians, cfg, ranks(cfg))
    assert [name for name in arrays if name.endswith("column")] == ["up.3.column"]
    wanted = [0] * 8 + [-8] * 8 + [0] * 16  # 8 bits instead of 6: a quarter of the step
    assert arrays["up.3.column"].tolist() == wanted
    error = (dequantize_matrix(arrays, "up", 3) - folded_state(model)["up"][3]).abs()
    assert (
        error[:, 8:16].mean() < 0.4 * error[:, 16:].mean()
        and abs(arrays["up.3.symbols"].astype(int)[:, 8:16]).max() > 31
    )


def test_gates_in_int8():
    model = gpt()
    arrays = quantize(model, identity_hessians(model), config(gated_attn_quant_gate=True), ranks())
    back, step = dequantize(arrays)["attn_gate"], model.attn_gate.detach().abs().amax(-1, keepdim=True) / 127
    assert (
        arrays["attn_gate.int8"].dtype == np.int8
        and "attn_gate" not in arrays
        and ((back - model.attn_gate).abs() <= 0.51 * step + 1e-6).all()
    )


def test_calibration_reads_training_data_only(tmp_path):
    """The validation shards are gone; and it lowers the loss of the tokens it is fitted to."""
    folder = own_data(tmp_path / "data")
    for path in folder.glob("fineweb_val*"):
        path.unlink()
    cfg = config(RUN, data_path=str(folder), logit_calibration_enabled=True)
    model, stream = gpt(cfg), TrainStream(cfg)
    batch = stream.micro_batch(0, 128, 48)
    assert batch.split == "train"
    with torch.no_grad():
        loss = lambda model: (
            model.nll(model.trunk(batch.tokens, batch.seq, looped=True), batch.targets.clamp(min=0)).nats
            * (batch.targets >= 0)
        ).sum()
        before = loss(model)
    values = train_gpt.fit_logit_calibration(model, stream, cfg, ranks(cfg))
    assert values.shape == (15,)
    with torch.no_grad():
        assert loss(model) == before  # the model itself is as it was
        assert loss(calibrated(model, torch.from_numpy(values))) < before


def calibrated(model, values):
    """The same weights in a model with logit calibration."""
    calibration = train_gpt.to_logit_calibration(values, train_gpt.piece_features(model.cfg))
    other = train_gpt.GPT(model.cfg, "reference", torch.float32, calibration)
    load_state(other, dict(model.named_parameters()), "memory")
    return other


def test_calibrated_probabilities_sum_to_one():
    plain = gpt(config(RUN, data_path=str(data())))
    model = calibrated(plain, torch.linspace(-1, 1, 15))
    hidden = model.trunk(torch.tensor([BOS, 50, 60]), packed_seq([3]), looped=True)[2:].expand(VOCAB, -1)
    with torch.no_grad():
        nats, hinted = model.nll(hidden, torch.arange(VOCAB), hint=torch.arange(VOCAB))
        assert abs((-nats).exp().sum() - 1) < 1e-5 and torch.allclose(hinted, -nats, atol=1e-6)
        assert torch.allclose(model.nll(hidden, torch.arange(VOCAB)).nats, nats, atol=1e-6)
        assert not torch.allclose(plain.nll(hidden, torch.arange(VOCAB)).nats, nats, atol=1e-2)


def test_features_of_the_tokenizer_s_pieces():
    cfg = config(RUN, data_path=str(data()))
    features, pieces = train_gpt.piece_features(cfg), processor(train_gpt.tokenizer_path(cfg))
    assert features.shape == (VOCAB, 14) and (features[:, :6].sum(1) <= 1).all()
    spaced = torch.tensor([pieces.id_to_piece(i).startswith("\u2581") for i in range(VOCAB)])
    assert torch.equal(features[:, 6].bool(), spaced) and features[:, 8].any() and features[:, 10].any()


# ---- entropy coder ----


def round_trip(arrays, path):
    train_gpt.save_artifact(path, arrays, {"x": 1})
    found, meta = train_gpt.load_artifact(path)
    assert meta == {"x": 1} and sorted(found) == sorted(arrays)
    for name, a in arrays.items():
        assert found[name].dtype == a.dtype and found[name].shape == a.shape and found[name].tobytes() == a.tobytes(), (
            name
        )
    return path.stat().st_size


def gaussian(rows, cols, sigma, seed=0):
    return np.rint(np.random.default_rng(seed).standard_normal((rows, cols)) * sigma).clip(-127, 127).astype(np.int8)


def test_any_tensor_comes_back(tmp_path):
    rng = np.random.default_rng(0)
    cases = {
        "a.0.symbols": gaussian(70, 33, 3.0),
        "a.1.symbols": gaussian(70, 33, 9.0),
        "wide.0.symbols": gaussian(20, 300, 2.0),
        "zero": np.zeros((40, 40), np.int8),
        "one row": gaussian(1, 200, 5.0),
        "one column": gaussian(200, 1, 5.0),
        "large": rng.integers(-9000, 9000, (30, 30)).astype(np.int16),
        "vector": np.arange(100, dtype=np.int16),
        "rare": np.where(rng.random((64, 64)) < 0.01, 127, 0).astype(np.int8),
        "long": rng.integers(0, 2**40, 80),
        "cube": gaussian(24, 30, 4.0).reshape(4, 6, 30),
        "few": np.arange(5, dtype=np.int8),
        "none": np.zeros((0, 4), np.float16),
        "scalar": np.float16(2.5).reshape(()),
        "half": rng.standard_normal((3, 5)).astype(np.float16),
    }
    round_trip(cases, tmp_path / "all.bin")
    for name, a in cases.items():
        round_trip({name: a}, tmp_path / "one.bin")
    round_trip({}, tmp_path / "none.bin")


def test_gaussian_symbols_take_their_entropy(tmp_path):
    """Within 1.5 % of the ideal code length, and below it where rows and columns differ or are correlated."""
    plain = np.stack([gaussian(512, 128, 2.7, seed) for seed in range(2)])
    ideal = plain.size * (math.log2(2.7) + 2.047) / 8
    spread = lambda a: (
        np.rint(a * np.exp(0.3 * np.random.default_rng(5).standard_normal(128))).clip(-127, 127).astype(np.int8)
    )
    mixed = lambda a: np.rint((a @ (np.eye(128) + 0.6 * np.eye(128, k=1))) / 1.166).clip(-127, 127).astype(np.int8)
    size = lambda f: round_trip(
        {f"up.{i}.symbols": f(a.astype(float)) for i, a in enumerate(plain)}, tmp_path / "x.bin"
    )
    assert ideal < size(lambda a: a.astype(np.int8)) < 1.015 * ideal + 2600  # states of 1,024 lanes, tables of settings
    assert size(mixed) < 0.99 * size(lambda a: a.astype(np.int8)) and size(spread) < 1.01 * (ideal + 2600)


def test_repeated_rows_cost_next_to_nothing(tmp_path):
    a = gaussian(500, 64, 4.0)
    b = np.concatenate([a, a[np.random.default_rng(1).integers(0, 20, 200)]])
    assert (
        round_trip({"tok_emb.0.symbols": b}, tmp_path / "b.bin")
        < round_trip({"tok_emb.0.symbols": a}, tmp_path / "a.bin") + 700
    )


def test_coding_tables_are_the_same_everywhere():
    """Frequencies come from integers alone: any change in them is a change of format."""
    frequencies = train_gpt.FREQUENCIES.reshape(len(train_gpt.TAIL_SHAPES), -1, 256)
    assert (frequencies.sum(-1) == 1 << train_gpt.PROB_BITS).all() and (frequencies >= 0).all()
    assert (frequencies[..., train_gpt.ESCAPE] > 0).all()
    assert hashlib.sha256(np.ascontiguousarray(frequencies, "<i8").tobytes()).hexdigest()[:16] == "8c4c5f6eb556e477"
    assert train_gpt.binary_roots(4)[2] == math.isqrt(2 << 120)


def test_the_code_of_given_stacks_is_the_same_in_every_version():
    """What is decoded must not depend on the script that wrote it: with and without a predictor, turned, with escapes,
    repeated rows, and a pool that later stacks begin with."""
    draw = np.random.RandomState(0)  # whose numbers numpy has frozen
    mixing = np.eye(48) + np.tril(draw.normal(0, 0.2, (48, 48)), -1)
    correlated = draw.normal(0, 9, (3, 700, 48)) @ mixing.T
    stacks = [draw.normal(0, 3, (5, 300, 48)), correlated, correlated.transpose(0, 2, 1)[:2] / 3, correlated[:1] * 300]
    stacks.append(np.concatenate([correlated[:1, :200], correlated[:1, 20:50]], 1))
    stacks = [np.rint(q).clip(-20000, 20000).astype(np.int64) for q in stacks]
    code, _ = train_gpt.encode_stacks(stacks)
    headers = stack_headers(code)
    assert {header["prior"] for header in headers} >= {0, 2} and {header["turned"] for header in headers} == {0, 1}
    symbols = code[16 + int.from_bytes(code[:4], "little") :]  # behind the headers, which may gain fields
    assert hashlib.sha256(symbols).hexdigest()[:16] == "a7e8913a28e5bca7"
    decoded, _ = train_gpt.decode_stacks(code)
    assert all((a == b).all() for a, b in zip(stacks, decoded, strict=True))


@pytest.mark.parametrize("largest", (128, 129, 20000))
def test_moments_of_symbols_are_exact(largest):
    """The decoder's probabilities rest on them, so no machine may round them otherwise: whole numbers, also of the
    longest chunk of the largest symbols."""
    q = np.random.default_rng(0).choice((-largest, largest, 1), (2, 1024, 24))
    header = train_gpt.StackHeader(list(q.shape), [14, 14], turned=0, prior=0, trust=[8, 8], copies=[[], []])
    model = train_gpt.StackModel(q.transpose(2, 0, 1).astype(np.int32), header)
    model.code_chunk(1024, train_gpt.SymbolWriter(), np.eye(24))
    assert (model.moments == q.transpose(0, 2, 1) @ q).all()


@pytest.mark.parametrize("end", (-1, -2, 2))
def test_a_code_that_is_cut_or_extended_is_refused(end):
    code, _ = train_gpt.encode_stacks([gaussian(70, 33, 3.0)[None].astype(np.int64)])
    changed = code[:end] if end < 0 else code + bytes(end)
    with pytest.raises(ValueError, match=f"^{len(changed)} bytes of code, {len(code)} by their header"):
        train_gpt.decode_stacks(changed)


@pytest.mark.parametrize("change", (-1, 1))
def test_words_that_do_not_suffice_or_are_left_over_are_refused(change):
    """A header that agrees with the length, but not with what is decoded: one word taken away or added."""
    code, _ = train_gpt.encode_stacks([gaussian(70, 33, 3.0)[None].astype(np.int64)])
    sizes = np.frombuffer(code, "<u4", 4).tolist()
    sizes[3] += change
    words = code[16:-2] if change < 0 else code[16:] + b"\0\0"
    with pytest.raises(ValueError, match="ends early|left over"):
        train_gpt.decode_stacks(np.array(sizes, "<u4").tobytes() + words)


def test_names_of_arrays_come_back_as_records():
    """flatten and unflatten are each other's inverse, order of the names included: the file's bytes depend on it."""
    model = gpt()
    settings = dict(rate_distortion=False, lqer_enabled=True, gated_attn_quant_gate=True)
    quantized = Quantizer(model, identity_hessians(model), config(**settings), ranks()).quantize()
    quantized = quantized._replace(logit_calibration=np.zeros(15, np.float32))
    arrays = flatten(quantized)
    assert [*arrays][-1] == "logit_calibration" and sum(name.endswith("lqer_a") for name in arrays) == 3
    errors = [layer.correction.error for layers in quantized.matrices.values() for layer in layers if layer.correction]
    corrected = [name for name in arrays if name.endswith("lqer_a")]
    by_name = lambda name: quantized.matrices[name.split(".")[0]][int(name.split(".")[1])].correction.error
    assert [by_name(name) for name in corrected] == sorted(errors, reverse=True)
    assert {name: id(a) for name, a in flatten(unflatten(arrays)).items()} == {
        name: id(a) for name, a in arrays.items()
    }
    state, again = quantized.state(), unflatten(arrays).state()
    assert set(state) == set(again) and all(torch.equal(state[name], again[name]) for name in state)
