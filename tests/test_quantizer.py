"""GPTQ against a plain solver, the Hessians it weighs errors with, and the way from weights to the artifact's arrays and back."""
import numpy as np
import pytest
import torch
from helpers import RUN, base_run, config, data, gpt, packed_seq, random_documents, ranks

import train_gpt
from train_gpt import TrainStream, collect_hessians, dequantize, folded_state, gptq, load_state, quantize


def problem(n=2, rows=5, cols=24, seed=0):
    """Weights, correlated inputs' second moments, row steps."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(n, rows, cols, generator=g)
    mix = torch.randn(n, cols, cols, generator=g) / cols ** 0.5
    x = torch.randn(n, 200, cols, generator=g) @ mix
    return w, x.mT @ x / 200, torch.rand(n, rows, generator=g) * 0.2 + 0.3


def plain_gptq(w: np.ndarray, h: np.ndarray, step: np.ndarray, limit: int, damping: float) -> np.ndarray:
    """One matrix by the definition: round the column of largest diagonal, move its error onto the rest by the inverse of what remains of H."""
    w, h = w.astype(np.float64).copy(), h.astype(np.float64).copy()
    cols = w.shape[1]
    dead = np.diag(h) == 0
    w[:, dead] = 0
    h[np.diag_indices(cols)] += dead + damping * np.diag(h).mean()
    order = sorted(range(cols), key=lambda j: (-h[j, j], j))
    symbols = np.zeros(w.shape)
    for i, j in enumerate(order):
        rest = order[i:]
        inverse = np.linalg.inv(h[np.ix_(rest, rest)])
        symbols[:, j] = np.clip(np.round(w[:, j] / step), -limit, limit)
        error = (w[:, j] - symbols[:, j] * step) / inverse[0, 0]
        w[:, rest] -= np.outer(error, inverse[0])
    return symbols


@pytest.mark.parametrize("block", (128, 5))
def test_gptq_against_the_definition(block):
    w, h, step = problem()
    h[1, 3] = h[1, :, 3] = 0                                            # an input that never fires
    symbols = gptq(w, h, step, 7, 0.01, block=block)
    assert symbols.dtype == torch.int16 and symbols.abs().max() <= 7 and not symbols[1, :, 3].any()
    for i in range(2):
        wanted = plain_gptq(w[i].numpy(), h[i].numpy(), step[i].numpy(), 7, 0.01)
        assert (symbols[i].numpy() == wanted).mean() > 0.99             # a tie in fp32 may fall the other way


def test_gptq_beats_rounding_where_it_matters():
    w, h, step = problem(seed=3)
    error = lambda symbols: torch.einsum("nri,nij,nrj->", w - symbols * step[:, :, None], h, w - symbols * step[:, :, None]).item()
    rounded = (w / step[:, :, None]).round().clamp(-31, 31)
    assert error(gptq(w, h, step, 31, 0.01).float()) < 0.7 * error(rounded)


def test_gptq_leaves_its_inputs_alone():
    w, h, step = problem()
    copies = w.clone(), h.clone(), step.clone()
    gptq(w, h, step, 7, 0.01)
    assert all(torch.equal(a, b) for a, b in zip(copies, (w, h, step)))


def test_hessians_are_mean_second_moments_of_the_inputs():
    """Every kind and layer, the visits of a looped layer added up, over calibration batches spread over the training stream."""
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
    return {"qkv": eye(32, 5), "o": eye(32, 5), "up": eye(32, 5), "down": eye(64, 5), "head": eye(32, 1)}


def test_quantize_and_back():
    """Within half a step of the folded weights, symbols within their range, everything else to fp16; and the model that comes back computes the same."""
    cfg = config(RUN, matrix_bits=6, embed_bits=7)
    model = gpt(cfg)
    arrays = quantize(model, identity_hessians(model), cfg, ranks(cfg))
    state, folded = dequantize(arrays), folded_state(model)
    assert set(state) == set(dict(model.named_parameters()))
    for name in ("qkv", "o", "up", "down", "tok_emb"):
        limit = 63 if name == "tok_emb" else 31
        sigmas = {"tok_emb": cfg.embed_clip_sigmas, "up": cfg.mlp_clip_sigmas, "down": cfg.mlp_clip_sigmas}.get(name, cfg.attn_clip_sigmas)
        for layer, w in enumerate(folded[name].double().numpy().reshape(-1, *folded[name].shape[-2:])):
            symbols, step = arrays[f"{name}.{layer}.symbols"], train_gpt.dequantize_scales(arrays[f"{name}.{layer}.step"]).astype(np.float64)
            assert symbols.dtype == np.int8 and abs(symbols.astype(int)).max() <= limit
            assert np.allclose(step, sigmas * w.std(1, ddof=1) / limit, rtol=0.023)       # codes are 4.4 % apart
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
        assert model.attn_scale.std() > 0.1                             # the model itself is as it was


def test_many_bits_are_nearly_lossless():
    cfg = config(RUN, matrix_bits=8, embed_bits=8, mlp_clip_sigmas=5.0, attn_clip_sigmas=5.0, embed_clip_sigmas=5.0)
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


@pytest.mark.parametrize("change, message", ((lambda s: s.pop("qkv"), "holds no qkv"), (lambda s: s.update(o=torch.zeros(2, 2)), r"holds \(2, 2\) o"),
                                             (lambda s: s.update(extra=torch.zeros(1)), "holds extra")))
def test_state_that_does_not_fit_names_its_file(change, message):
    model = gpt()
    state = folded_state(model)
    change(state)
    with pytest.raises(train_gpt.UserError, match=f"^somewhere/model.bin: {message}"):
        load_state(model, state, "somewhere/model.bin")


def test_the_artifact_holds_what_was_quantised():
    """Bit for bit through the file: the weights scored after reloading are those that quantisation made."""
    arrays, meta = train_gpt.load_artifact(base_run() / "model.bin")
    trained = dict(np.load(base_run() / "trained.npz"))
    del trained["meta"]
    cfg = train_gpt.Config.from_env({"DATA_PATH": str(data()), "DEVICE": "cpu"}, stored=meta["settings"])
    model = train_gpt.GPT(cfg, "reference", torch.float32)
    load_state(model, {n: torch.from_numpy(a) for n, a in trained.items()}, "trained.npz")
    again = quantize(model, collect_hessians(model, TrainStream(cfg), cfg, ranks(cfg)), cfg, ranks(cfg))
    assert set(again) == set(arrays)
    for name, array in again.items():
        assert arrays[name].dtype == array.dtype and arrays[name].shape == array.shape and arrays[name].tobytes() == array.tobytes(), name
