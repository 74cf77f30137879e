"""Muon, Adam, clipping, the average and the warm-up against plain float64 references; sharded steps on two and three
ranks against one."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from helpers import RUN, Silent, batches_of_step, config, data, forked, gpt, ranks

import train_gpt
from train_gpt import Optimizer


def optimizer(model, **overrides) -> Optimizer:
    cfg = dataclasses.replace(model.cfg, **overrides)
    return Optimizer(model, cfg, ranks(cfg))


def set_gradients(model, seed: int, scale: float = 1.0):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator) * scale


# ---- the parameter table ----


def coverage(opt: Optimizer) -> dict[int, torch.Tensor]:
    """How many rules own each element of each parameter."""
    counts = {id(p): torch.zeros_like(p) for p in opt.parameters}
    for group in opt.muon:
        for p, rows in group.blocks:
            counts[id(p)][:, rows] += 1
    for group in opt.adam.param_groups:
        for p in group["params"]:
            counts[id(p)] += 1
    return counts


@pytest.mark.parametrize(
    "variant",
    (
        {},
        {"num_kv_heads": 4},
        {"mlp_mult": 1.0},
        {"smear_gate_enabled": False, "parallel_start_layer": 0},
    ),
)
def test_every_element_has_exactly_one_rule(variant):
    opt = optimizer(gpt(config(**variant)))
    assert all((count == 1).all() for count in coverage(opt).values())


def test_groups_are_the_published_ones():
    model = gpt()
    opt, cfg = optimizer(model), model.cfg
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)] for group in opt.muon for p, _ in group.blocks} == {"qkv", "o", "up", "down"}
    rules = {
        names[id(p)]: (group["base_lr"], group["weight_decay"])
        for group in opt.adam.param_groups
        for p in group["params"]
    }
    assert rules.pop("tok_emb") == (cfg.tied_embed_lr, cfg.embed_wd)
    assert set(rules.values()) == {(cfg.scalar_lr, cfg.adam_wd)} and len(rules) == 11


def test_caps_do_not_decay():
    """Decay would pull them from LOGIT_SOFTCAP to zero."""
    model = gpt(config(asym_logit_rescale=True))
    groups = [group for group in optimizer(model).adam.param_groups if any(p is model.caps for p in group["params"])]
    assert [(group["base_lr"], group["weight_decay"]) for group in groups] == [(model.cfg.scalar_lr, 0.0)]


def test_the_rules_name_every_parameter_once():
    model = gpt(config(asym_logit_rescale=True))
    rules = train_gpt.parameter_rules(model, model.cfg)
    assert list(rules) == [name for name, _ in model.named_parameters()]
    assert rules["qkv"].heights == (model.q_dim, model.kv_dim, model.kv_dim)
    assert {name for name, rule in rules.items() if rule.heights} == {"qkv", "o", "up", "down"}


def test_a_row_without_a_rule_is_an_error(monkeypatch):
    model = gpt()
    rules = train_gpt.parameter_rules(model, model.cfg)
    rules["qkv"] = rules["qkv"]._replace(heights=(model.q_dim, model.kv_dim))
    monkeypatch.setattr(train_gpt, "parameter_rules", lambda *_: rules)
    with pytest.raises(AssertionError, match="every row"):
        optimizer(model)


def test_a_new_parameter_joins_the_scalars():
    """A parameter nobody wrote a rule for is trained, unlike in the published scripts, where it silently is not."""
    model = gpt()
    model.novel = torch.nn.Parameter(torch.ones(3))
    opt = optimizer(model, grad_clip_norm=0.0)
    assert all((count == 1).all() for count in coverage(opt).values())
    set_gradients(model, 0)
    opt.step(0, 1.0)
    assert (model.novel != 1).all()


def test_every_parameter_gets_a_gradient():
    """Each row of each parameter, with the loops on; the two-lane parameters of layers before the lanes are never
    read."""
    model = gpt(
        config(**{k: v for k, v in RUN.items() if k in ("train_batch_tokens", "micro_batch_tokens", "train_seq_len")})
    )
    for batch in batches_of_step(model.cfg):
        train_gpt.batch_loss(model, batch, 500, True).backward()
    for name, p in model.named_parameters():
        if name == "tok_emb":
            assert (p.grad.abs().sum(1) > 0).float().mean() > 0.9
        else:
            rows = p.grad.flatten(1) if p.ndim > 1 else p.grad.reshape(1, -1)
            dead = [i for i, row in enumerate(rows) if not row.any()]
            assert dead == ([0, 1, 2, 3] if name.startswith("parallel_") else []), name


# ---- Muon ----


@pytest.mark.parametrize("shape", ((24, 24), (48, 12), (10, 40)))
def test_polar_express_against_svd(shape):
    """The singular vectors stay, and singular values over two orders of magnitude all go to about one."""
    noise = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    left, values, right = torch.linalg.svd(noise, full_matrices=False)
    u = left * torch.logspace(-2, 0, values.size(1), dtype=torch.float64) @ right
    core = (
        left.mT @ train_gpt.orthogonalize(u.float(), train_gpt.MUON_COEFFICIENTS["polar_express"]).double() @ right.mT
    )
    diagonal = core.diagonal(dim1=1, dim2=2)
    assert 0.85 < diagonal.min() and diagonal.max() < 1.15
    assert (core - torch.diag_embed(diagonal)).abs().max() < 1e-3


def plain_muon(w, grads, momenta, cfg, lr_scale: float) -> np.ndarray:
    """One matrix through a list of gradients, float64 numpy."""
    w, buffer = w.astype(np.float64), np.zeros(w.shape)
    for g, mu in zip(grads, momenta):
        buffer = mu * buffer + g
        u = g + mu * buffer
        u = u / np.linalg.norm(u, axis=1, keepdims=True)
        rows, cols = u.shape
        x = u.T if rows > cols else u
        x = x / np.linalg.norm(x)
        for a, b, c in (
            (8.156554524902461, -22.48329292557795, 15.878769915207462),
            (4.042929935166739, -2.808917465908714, 0.5000178451051316),
            (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
            (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
            (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
        ):
            s = x @ x.T
            x = a * x + (b * s + c * s @ s) @ x
        x = x.T if rows > cols else x
        lr = cfg.matrix_lr * lr_scale
        w = w * (1 - lr * cfg.muon_wd) - lr * math.sqrt(max(1.0, rows / cols)) * x
    return w


@pytest.mark.parametrize("variant", ({"mlp_mult": 3.0}, {"num_kv_heads": 4, "mlp_mult": 1.0}))
def test_muon_against_the_plain_reference(variant):
    """Momentum with its warm-up, Nesterov, row normalisation, scale and decay of every matrix on its own: q, k and v
    apart."""
    model = gpt(config(**variant))
    opt = optimizer(model, grad_clip_norm=0.0, muon_momentum_warmup_steps=2, muon_wd=0.3)
    before = {n: p.detach().numpy().copy() for n, p in model.named_parameters()}
    grads = []
    for step in range(4):
        set_gradients(model, step)
        grads.append({n: p.grad.numpy().copy() for n, p in model.named_parameters()})
        opt.step(step, 0.7)
    momenta = [0.92, 0.945, 0.97, 0.97]
    q, kv = model.q_dim, model.kv_dim
    for name, spans in {
        "qkv": [(0, q), (q, q + kv), (q + kv, q + 2 * kv)],
        "o": [(0, 32)],
        "up": [(0, model.up.size(1))],
        "down": [(0, 32)],
    }.items():
        for layer in range(model.cfg.num_layers):
            for lo, hi in spans:
                wanted = plain_muon(
                    before[name][layer, lo:hi], [g[name][layer, lo:hi] for g in grads], momenta, opt.cfg, 0.7
                )
                have = getattr(model, name).detach().numpy()[layer, lo:hi]
                assert np.abs(have - wanted).max() < 2e-5, (name, layer, lo)


# ---- Adam ----


def test_adam_against_the_plain_reference():
    model = gpt()
    opt = optimizer(model, grad_clip_norm=0.0, beta1=0.8, beta2=0.95, adam_eps=1e-6, embed_wd=0.4, adam_wd=0.2)
    names = [n for n in dict(model.named_parameters()) if n not in ("qkv", "o", "up", "down")]
    plain = {n: getattr(model, n).detach().double().clone() for n in names}
    first, second = ({n: torch.zeros_like(plain[n]) for n in names} for _ in range(2))
    for step in range(3):
        set_gradients(model, step)
        for n in names:
            g = getattr(model, n).grad.double()
            lr, wd = (opt.cfg.tied_embed_lr, 0.4) if n == "tok_emb" else (opt.cfg.scalar_lr, 0.2)
            lr *= 0.5
            first[n], second[n] = 0.8 * first[n] + 0.2 * g, 0.95 * second[n] + 0.05 * g * g
            plain[n] = plain[n] * (1 - lr * wd) - lr * (first[n] / (1 - 0.8 ** (step + 1))) / (
                (second[n] / (1 - 0.95 ** (step + 1))).sqrt() + 1e-6
            )
        opt.step(step, 0.5)
    for n in names:
        assert torch.allclose(getattr(model, n).double(), plain[n], atol=1e-5), n


# ---- clipping ----


def test_clip_acts_on_the_whole_norm():
    """Adam's first step does not depend on the gradient's length, so look at the momentum, which does."""
    model = gpt()
    opt = optimizer(model, grad_clip_norm=0.5)
    set_gradients(model, 1)
    whole = math.sqrt(sum(p.grad.double().square().sum().item() for p in model.parameters()))
    wanted = [group.gradient() * (0.5 / whole) for group in opt.muon]
    small = model.q_gain.grad * (0.5 / whole)
    opt.step(0, 1.0)
    for group, g in zip(opt.muon, wanted):
        assert torch.allclose(group.momentum, g, rtol=1e-4)
    assert torch.allclose(opt.adam.state[model.q_gain]["exp_avg"], 0.1 * small, rtol=1e-4)


def test_small_gradients_are_not_clipped():
    model = gpt()
    opt = optimizer(model, grad_clip_norm=0.5)
    set_gradients(model, 1, 1e-5)
    wanted = [group.gradient().clone() for group in opt.muon]
    opt.step(0, 1.0)
    assert all(torch.equal(group.momentum, g) for group, g in zip(opt.muon, wanted))


def share(rank: int, world: int, name: str, p: torch.Tensor, step: int) -> torch.Tensor:
    """Rank's part of a gradient: large parts that nearly cancel, so that clipping each rank's own would give another
    answer."""
    generator = torch.Generator().manual_seed(1000 * step + sum(map(ord, name)))
    total, noise = torch.randn(p.shape, generator=generator), torch.randn(p.shape, generator=generator) * 50
    if world == 1:
        return total
    return total / world + (noise if rank == 0 else -noise if rank == 1 else 0.0)


def three_steps(rank: int, world: int, out):
    cfg = config(rank=rank, world_size=world, grad_clip_norm=0.5, ema_decay=0.7)
    model = gpt(cfg)
    group = train_gpt.Ranks(cfg)
    opt = Optimizer(model, cfg, group)
    for step in range(3):
        for name, p in model.named_parameters():
            p.grad = share(rank, world, name, p, step)
        opt.step(step, 0.6)
    opt.use_average(3)
    group.close()
    torch.save([p.detach() for p in model.parameters()], out / f"{world}_{rank}.pt")


def test_two_and_three_ranks_step_like_one(tmp_path):
    """Sharded Muon with padding (5 layers over 2 and 3 ranks), reduced Adam, and clipping of the reduced gradient, not
    of each rank's own."""
    for world in (1, 2, 3):
        forked(three_steps, world, tmp_path)
    one = torch.load(tmp_path / "1_0.pt")
    for world in (2, 3):
        everywhere = [torch.load(tmp_path / f"{world}_{rank}.pt") for rank in range(world)]
        for rank in range(1, world):
            assert all(torch.equal(a, b) for a, b in zip(everywhere[0], everywhere[rank])), (
                f"ranks 0 and {rank} of {world} disagree"
            )
        for a, b in zip(one, everywhere[0]):
            assert torch.allclose(a, b, atol=3e-4)


# ---- the average ----


def test_average_is_the_debiased_weighted_mean():
    model = gpt()
    opt = optimizer(model, ema_decay=0.9)
    history = []
    for step in range(5):
        set_gradients(model, step)
        opt.step(step, 1.0)
        history.append([p.detach().double().clone() for p in model.parameters()])
    weights = [0.1 * 0.9 ** (4 - i) for i in range(5)]
    assert sum(weights) < 0.5  # without the correction the result would be less than half the weights
    opt.use_average(5)
    for j, p in enumerate(model.parameters()):
        wanted = sum(w * h[j] for w, h in zip(weights, history)) / sum(weights)
        assert torch.allclose(p.double(), wanted, atol=1e-5)


def test_without_an_average_the_last_weights_stay():
    model = gpt()
    opt = optimizer(model, ema_decay=0.0)
    set_gradients(model, 0)
    opt.step(0, 1.0)
    last = [p.detach().clone() for p in model.parameters()]
    opt.use_average(1)
    assert all(torch.equal(a, b) for a, b in zip(last, model.parameters()))


# ---- the warm-up ----


def trainer(**overrides) -> train_gpt.Trainer:
    cfg = config(RUN, data_path=str(data()), **overrides)
    group, log = ranks(cfg), Silent()
    model = train_gpt.GPT(cfg, "reference", torch.float32)
    model.init_weights(7)
    return train_gpt.Trainer(model, cfg, group, log)


def test_warm_up_restores_everything():
    """Weights, Muon's momentum, Adam's moments and step count, the average: bit for bit, and a run after it is the run
    without it."""
    fresh, warm = trainer(), trainer(warmup_steps=2)
    warm.warm_up()
    assert all(torch.equal(a, b) for a, b in zip(fresh.model.parameters(), warm.model.parameters()))
    assert not any(group.momentum.any() for group in warm.optimizer.muon)
    assert not any(a.any() for a in warm.optimizer.average)
    assert not any(value.any() for state in warm.optimizer.adam.state.values() for value in state.values())
    assert all(p.grad is None or not p.grad.any() for p in warm.model.parameters())
    fresh.run(), warm.run()
    assert all(torch.equal(a, b) for a, b in zip(fresh.model.parameters(), warm.model.parameters()))


def test_warm_up_runs_every_graph(monkeypatch):
    """Both loop settings and the optimizer, on training batches of the real size; nothing runs when the loops never
    switch."""
    seen = []
    loss = train_gpt.batch_loss
    monkeypatch.setattr(
        train_gpt,
        "batch_loss",
        lambda model, batch, total, looped: (
            seen.append((looped, len(batch.tokens), batch.split)) or loss(model, batch, total, looped)
        ),
    )
    trainer().warm_up()
    assert set(seen) == {(False, 128, "train"), (True, 128, "train")}
    seen.clear()
    trainer(num_loops=0).warm_up()
    assert set(seen) == {(False, 128, "train")}
