"""The model against a plain reference written from the published formulas, and the properties that scores rest on:
causality, isolation, caches, graphs."""

import dataclasses
import math
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from helpers import BOS, VOCAB, config, gpt, packed_seq, random_documents

import train_gpt
from train_gpt import GPT, Cache, Config, Seq

# ---- a plain forward: one document, float64, one head at a time ----

CHANNELS = 12  # that SmearGate and the attention gates read


def unit(x: torch.Tensor) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 2.0**-23).sqrt()


def turn(x: torch.Tensor, dims: int, base: float) -> torch.Tensor:
    """RoPE of x (T, D) at positions 0..T-1 over its first ``dims`` dimensions, pairs (i, i + dims / 2)."""
    n, out = dims // 2, x.clone()
    for i in range(n):
        angle = torch.arange(len(x), dtype=torch.float64) * base ** (-2 * i / dims)
        out[:, i] = x[:, i] * angle.cos() + x[:, i + n] * angle.sin()
        out[:, i + n] = -x[:, i] * angle.sin() + x[:, i + n] * angle.cos()
    return out


class Reference:
    """Final hidden states of one document, and the input of every matrix product by (kind, layer)."""

    def __init__(self, model: GPT, looped: bool):
        self.p = {name: p.detach().double() for name, p in model.named_parameters()}
        self.cfg, self.looped, self.inputs = model.cfg, looped, {}

    def saw(self, kind: str, layer: int, x: torch.Tensor):
        self.inputs.setdefault((kind, layer), []).append(x)

    def visits(self) -> tuple[list[int], list[int]]:
        c = self.cfg
        order = list(range(c.num_layers))
        if self.looped:
            order = (
                order[: c.loop_start]
                + order[c.loop_start : c.loop_end + 1] * (1 + c.num_loops)
                + order[c.loop_end + 1 :]
            )
        return order[: len(order) // 2], order[len(order) // 2 :]

    def attention(self, n: torch.Tensor, layer: int) -> torch.Tensor:
        c, p, t = self.cfg, self.p, len(n)
        d, group = c.model_dim // c.num_heads, c.num_heads // c.num_kv_heads
        self.saw("qkv", layer, n)
        q, k, v = (n @ p["qkv"][layer].T).split((c.num_heads * d, c.num_kv_heads * d, c.num_kv_heads * d), dim=1)
        seen = torch.ones(t, t, dtype=torch.bool).tril()
        if c.attn_window and str(layer) not in c.attn_full_layers.split(","):
            seen &= torch.arange(t)[:, None] - torch.arange(t) <= c.attn_window
        heads = []
        for h in range(c.num_heads):
            own = slice(h // group * d, (h // group + 1) * d)
            qh = turn(unit(q[:, h * d : (h + 1) * d]), c.rope_dims, c.rope_base) * p["q_gain"][layer, h]
            kh, vh = turn(unit(k[:, own]), c.rope_dims, c.rope_base), v[:, own]
            y = (qh @ kh.T / math.sqrt(d)).masked_fill(~seen, -math.inf).softmax(-1) @ vh
            direction = vh / vh.norm(dim=1, keepdim=True)
            y = y - (y * direction).sum(1, keepdim=True) * direction
            if c.sparse_attn_gate_enabled:
                z = n[:, :CHANNELS] @ p["attn_gate"][layer, h]
                y = y * torch.sigmoid(c.sparse_attn_gate_scale * z)[:, None]
            if c.attn_out_gate_enabled:
                y = y * 2 * torch.sigmoid(n[:, :CHANNELS] @ p["attn_gate"][layer, h])[:, None]
            heads.append(y)
        y = torch.cat(heads, 1)
        self.saw("o", layer, y)
        return p["attn_scale"][layer] * (y @ p["o"][layer].T)

    def mlp(self, n: torch.Tensor, layer: int) -> torch.Tensor:
        u = n @ self.p["up"][layer].T
        hidden = torch.where(u > 0, u, self.cfg.leaky_relu_sq_slope * u) ** 2
        self.saw("up", layer, n)
        self.saw("down", layer, hidden)
        return self.p["mlp_scale"][layer] * (hidden @ self.p["down"][layer].T)

    def embed(self, tokens) -> torch.Tensor:
        e = self.p["tok_emb"][torch.as_tensor(tokens)]
        if not self.cfg.smear_gate_enabled:
            return e
        out = e.clone()
        for t in range(1, len(e)):
            out[t] += self.p["smear_lambda"] * torch.sigmoid(e[t, :CHANNELS] @ self.p["smear_gate"]) * e[t - 1]
        return out

    def merge(self, x: torch.Tensor, skip: torch.Tensor, j: int) -> torch.Tensor:
        g = torch.sigmoid(self.p["skip_gates"][j])
        return g * x + (1 - g) * self.p["skip_weights"][j] * skip

    def __call__(self, tokens) -> torch.Tensor:
        c, p = self.cfg, self.p
        normed = lambda x, layer: unit(x) * (layer + 1) ** -0.5
        mixed = lambda x, layer: p["resid_mix"][layer, 0] * x + p["resid_mix"][layer, 1] * x0

        def block(x, layer):
            x = mixed(x, layer)
            if c.parallel_mode == "gptj" and 0 < c.parallel_start_layer <= layer:
                return x + self.attention(normed(x, layer), layer) + self.mlp(normed(x, layer), layer)
            x = x + self.attention(normed(x, layer), layer)
            return x + self.mlp(normed(x, layer), layer)

        x = x0 = unit(self.embed(tokens))
        encoder, decoder = self.visits()
        stack, lanes = [], None
        for layer in encoder:
            x = block(x, layer)
            stack.append(x)
        for j, layer in enumerate(decoder):
            if lanes is None and c.parallel_mode == "lanes" and 0 < c.parallel_start_layer <= layer:
                lanes = [x, x]
            if stack and j < len(p["skip_weights"]):
                skip = stack.pop()
                if lanes is None:
                    x = self.merge(x, skip, j)
                else:
                    lanes[0] = self.merge(lanes[0], skip, j)
            if lanes is None:
                x = block(x, layer)
            else:
                a = self.attention(normed(mixed(lanes[0], layer), layer), layer)
                m = self.mlp(normed(lanes[1], layer), layer)
                post, keep = p["parallel_post"][layer], p["parallel_resid"][layer]
                lanes = [keep[lane] * lanes[lane] + post[0, lane] * a + post[1, lane] * m for lane in (0, 1)]
        if lanes is not None:
            x = (lanes[0] + lanes[1]) / 2
        return unit(x)

    def log_probs(self, tokens) -> torch.Tensor:
        z = self(tokens) @ self.p["tok_emb"].T
        return torch.log_softmax(self.cfg.logit_softcap * torch.tanh(z / self.cfg.logit_softcap), -1)


def trunk(model: GPT, documents, looped: bool, **options) -> torch.Tensor:
    return model.trunk(
        torch.from_numpy(np.concatenate(documents)), packed_seq([len(d) for d in documents]), looped=looped, **options
    )


VARIANTS = {
    "everything": {},
    "early lanes": {"num_layers": 6, "parallel_start_layer": 3, "loop_start": 0, "loop_end": 1},
    "one lane": {"parallel_start_layer": 0},
    "gptj": {"parallel_mode": "gptj", "parallel_start_layer": 1},
    "gate of twice a sigmoid": {"sparse_attn_gate_enabled": False, "attn_out_gate_enabled": True},
    "no windows": {"attn_window": 0},
    "windows everywhere": {"attn_window": 1, "attn_full_layers": ""},
    "no gates": {"smear_gate_enabled": False, "sparse_attn_gate_enabled": False},
    "two extra loops": {
        "num_layers": 7,
        "num_loops": 2,
        "loop_start": 2,
        "loop_end": 4,
        "parallel_start_layer": 5,
        "num_kv_heads": 4,
    },
    "one kv head": {
        "num_kv_heads": 1,
        "rope_dims": 8,
        "leaky_relu_sq_slope": 0.3,
        "logit_softcap": 5.0,
        "rope_base": 100.0,
    },
}


@pytest.mark.parametrize("looped", (False, True))
@pytest.mark.parametrize("variant", VARIANTS)
def test_forward_equals_the_plain_reference(variant, looped):
    model = gpt(config(**VARIANTS[variant]))
    documents = random_documents([13, 1, 7, 13])
    with torch.no_grad():
        hidden = trunk(model, documents, looped)
        at = 0
        for document in documents:
            reference = Reference(model, looped)
            assert torch.allclose(hidden[at : at + len(document)].double(), reference(document), atol=3e-4)
            targets = torch.from_numpy(np.roll(document, -1))
            nats = model.nll(hidden[at : at + len(document)], targets).nats
            wanted = -reference.log_probs(document).gather(1, targets[:, None])[:, 0]
            assert torch.allclose(nats.double(), wanted, atol=2e-3, rtol=1e-4)
            at += len(document)


def test_small_embeddings_are_not_crushed_by_the_norm():
    """At the initial standard deviation of 0.005 the mean square is 2.5e-5: an epsilon of bf16's size would shrink the
    stream 17 times."""
    model = gpt()
    with torch.no_grad():
        model.tok_emb.mul_(0.005 / model.tok_emb.std())
        x = train_gpt.add_and_norm((model.tok_emb,), 1.0, keep=False).normed
    assert abs(x.square().mean().item() - 1) < 0.02


def test_published_visit_lists():
    layers = lambda looped: [v.layer for v in train_gpt.visit_schedule(Config(), looped)]
    assert layers(True) == [0, 1, 2, 3, 4, 5, 3, 4] + [5, 3, 4, 5, 6, 7, 8, 9, 10]
    assert layers(False) == list(range(11))
    sources = lambda looped: [v.source for v in train_gpt.visit_schedule(Config(), looped)]
    assert sources(True) == [None] * 8 + [7, 6, 5, 4, 3, 2, 1, 0] + [None]
    assert sources(False) == [None] * 5 + [4, 3, 2, 1, 0, None]
    assert [v.layer for v in train_gpt.visit_schedule(Config(), True) if v.lanes] == [8, 9, 10]


@pytest.mark.parametrize("heads, parameters", (({}, 35_945_099), ({"num_heads": 8, "num_kv_heads": 4}, 35_945_671)))
def test_parameter_count(heads, parameters):
    """With 8 heads that of #1855; a head fewer has a gain and a gate of 12 fewer in each layer."""
    with torch.device("meta"):
        model = GPT(dataclasses.replace(Config(), **heads), "reference", torch.float32)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_counting_parameters_imports_no_compiler():
    """Every load of an artifact counts them on the meta device, where a division alone imports 800 modules."""
    build = "with train_gpt.torch.device('meta'): train_gpt.GPT(train_gpt.Config(), 'reference', train_gpt.torch.float)"
    lines = ["import sys, train_gpt", "known = set(sys.modules)", build, "print(*sorted(set(sys.modules) - known))"]
    run = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True)
    assert not {"sympy", "torch._dynamo"} & set(run.stdout.split())


def test_initial_weights():
    model = GPT(config(), "reference", torch.float32)
    model.init_weights(3)
    again = GPT(config(), "reference", torch.float32)
    again.init_weights(3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
    again.init_weights(4)
    assert not torch.equal(model.tok_emb, again.tok_emb) and not torch.equal(model.qkv, again.qkv)
    assert not model.o.any() and not model.down.any() and not model.smear_lambda.any() and not model.skip_gates.any()
    assert abs(model.tok_emb.std().item() / model.cfg.tied_embed_init_std - 1) < 0.05
    q, kv = model.q_dim, model.kv_dim
    for layer in range(model.cfg.num_layers):
        for matrix in (model.qkv[layer, :q], model.qkv[layer, q : q + kv], model.qkv[layer, q + kv :], model.up[layer]):
            short = matrix if matrix.size(0) <= matrix.size(1) else matrix.T
            assert torch.allclose(short @ short.T, torch.eye(len(short)), atol=1e-5)
    assert torch.equal(model.resid_mix[:, 0], torch.ones(5, 32)) and not model.resid_mix[:, 1].any()


# ---- causality and isolation ----


@pytest.mark.parametrize("looped", (False, True))
def test_a_token_changes_nothing_before_it(looped):
    model, (document,) = gpt(), random_documents([24])
    with torch.no_grad():
        before = trunk(model, [document], looped)
        for t in (1, 5, 6, 23):
            changed = document.copy()
            changed[t] = (changed[t] + 7) % (VOCAB - 2) + 2
            after = trunk(model, [changed], looped)
            assert torch.equal(after[:t], before[:t]), f"token {t} changed an earlier hidden state"
            assert not torch.equal(after[t], before[t]) and not torch.equal(after[-1], before[-1])


@pytest.mark.parametrize("looped", (False, True))
def test_a_document_changes_nothing_in_another(looped):
    model, documents = gpt(), random_documents([9, 14, 14, 6])
    with torch.no_grad():
        before = trunk(model, documents, looped).split([9, 14, 14, 6])
        for changed in range(4):
            others = [random_documents([len(d)], seed=99)[0] if i == changed else d for i, d in enumerate(documents)]
            others[changed][0] = 5  # even its first token, which the next document's SmearGate must not see
            after = trunk(model, others, looped).split([9, 14, 14, 6])
            for i in range(4):
                assert torch.equal(before[i], after[i]) == (i != changed), f"document {changed} reached document {i}"


@pytest.mark.parametrize("looped", (False, True))
def test_packed_documents_equal_documents_one_by_one(looped):
    model, documents = gpt(), random_documents([9, 1, 14, 2, 6, 6])
    with torch.no_grad():
        packed = trunk(model, documents, looped).split([len(d) for d in documents])
        for hidden, document in zip(packed, documents):
            assert torch.allclose(hidden, trunk(model, [document], looped), atol=2e-5)


def test_the_same_document_scores_the_same_wherever_it_lies():
    """Positions count from the document's start, so nothing depends on the place in the buffer."""
    model, (document, other) = gpt(), random_documents([11, 30])
    with torch.no_grad():
        first = trunk(model, [document, other, document, document], True)
    assert torch.allclose(first[:11], first[41:52], atol=2e-5) and torch.allclose(first[41:52], first[52:63], atol=2e-5)


def test_gradients_stay_in_their_document():
    """Backward through the custom operator: the loss of one document gives no gradient to the tokens that only
    the other holds."""
    model = gpt()
    a, b = np.array([BOS, 10, 11, 12, 13]), np.array([BOS, 20, 21, 22])
    hidden = trunk(model, [a, b], True)
    hidden[:5].square().mul(torch.arange(32)).sum().backward()
    rows = model.tok_emb.grad.abs().sum(1)
    assert (rows[a] > 0).all() and not rows[[20, 21, 22]].any()


def test_gradient_equals_the_reference_gradient():
    """One directional derivative per parameter against central differences of the float64 reference."""
    model, documents = gpt(config(parallel_start_layer=3)), random_documents([8, 5])
    tokens, seq = torch.from_numpy(np.concatenate(documents)), packed_seq([8, 5])
    targets = torch.from_numpy(np.random.default_rng(5).integers(0, VOCAB, 13))
    loss = model.nll(model.trunk(tokens, seq, looped=True), targets).nats.sum()
    loss.backward()

    def reference_loss(name, direction, scale):
        reference = Reference(model, True)
        reference.p[name] = reference.p[name] + scale * direction
        log_probs = torch.cat([reference.log_probs(d) for d in documents])
        return -log_probs.gather(1, targets[:, None]).sum().item()

    generator = torch.Generator().manual_seed(2)
    for name, p in model.named_parameters():
        direction = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        slope = (reference_loss(name, direction, 1e-5) - reference_loss(name, direction, -1e-5)) / 2e-5
        assert (p.grad.double() * direction).sum().item() == pytest.approx(slope, rel=2e-3, abs=2e-3), name


# ---- key/value cache ----


def empty_cache(model: GPT, rows: int, looped: bool) -> Cache:
    shape = len(model.schedules[looped]), rows, 0, model.cfg.num_kv_heads, model.head_dim
    return Cache(torch.zeros(shape), torch.zeros(shape), torch.zeros(rows, dtype=torch.int64))


def row_seq(rows: int, past: int, new: int) -> Seq:
    offsets = torch.arange(rows + 1, dtype=torch.int32)
    return Seq(
        offsets * new,
        offsets * (past + new),
        new,
        past + new,
        torch.arange(past, past + new, dtype=torch.int32).repeat(rows),
    )


@pytest.mark.parametrize("looped", (False, True))
@pytest.mark.parametrize("cuts", ([7, 6], [1, 1, 11], [12, 1], [5, 4, 4]))
def test_chunks_with_the_returned_cache_equal_one_pass(looped, cuts):
    """Two rows; cu_q and cu_k differ from the second chunk on; SmearGate reads the last token of the chunk before."""
    model, rows = gpt(), random_documents([13, 13])
    with torch.no_grad():
        whole = trunk(model, rows, looped).view(2, 13, -1)
        cache, at = empty_cache(model, 2, looped), 0
        for new in cuts:
            tokens = torch.from_numpy(np.concatenate([row[at : at + new] for row in rows]))
            hidden, fresh = model.trunk(tokens, row_seq(2, at, new), looped=looped, cache=cache)
            assert torch.allclose(hidden.view(2, new, -1), whole[:, at : at + new], atol=3e-5), f"chunk at {at}"
            assert (
                fresh.keys.shape == (len(model.schedules[looped]), 2, new, 2, 8)
                and fresh.values.shape == fresh.keys.shape
            )
            cache = Cache(
                torch.cat((cache.keys, fresh.keys), 2), torch.cat((cache.values, fresh.values), 2), fresh.last
            )
            at += new


def test_a_cache_row_sees_only_its_own_row():
    model, rows = gpt(), random_documents([10, 10])
    tokens = lambda lo, hi: torch.from_numpy(np.concatenate([row[lo:hi] for row in rows]))
    with torch.no_grad():
        _, fresh = model.trunk(tokens(0, 6), row_seq(2, 0, 6), looped=True, cache=empty_cache(model, 2, True))
        before, _ = model.trunk(tokens(6, 10), row_seq(2, 6, 4), looped=True, cache=fresh)
        other = Cache(
            *(torch.stack((t.select(1, 0), torch.randn_like(t.select(1, 1))), 1) for t in fresh[:2]),
            torch.stack((fresh.last[0], fresh.last[1] + 1)),
        )
        after, _ = model.trunk(tokens(6, 10), row_seq(2, 6, 4), looped=True, cache=other)
    assert torch.equal(before[:4], after[:4]) and not torch.equal(before[4:], after[4:])


def test_smear_crosses_the_joint():
    """Without attention the only path from one chunk to the next is SmearGate's last token."""
    model, (row,) = gpt(), random_documents([4])
    with torch.no_grad():
        model.o.zero_()
        tokens = torch.from_numpy(row)
        _, fresh = model.trunk(tokens[:3], row_seq(1, 0, 3), looped=False, cache=empty_cache(model, 1, False))
        assert fresh.last.tolist() == [row[2]]
        joined, _ = model.trunk(tokens[3:], row_seq(1, 3, 1), looped=False, cache=fresh)
        apart, _ = model.trunk(
            tokens[3:], row_seq(1, 3, 1), looped=False, cache=fresh._replace(last=torch.zeros_like(fresh.last))
        )
    assert not torch.allclose(joined, apart, atol=1e-3)


# ---- taps ----


@pytest.mark.parametrize("looped", (False, True))
def test_taps_see_the_input_of_every_product(looped):
    model, documents = gpt(), random_documents([9, 5])
    seen = {}
    with torch.no_grad():
        tap = lambda kind, layer, x: seen.setdefault((kind, layer), []).append(x.clone())
        hidden = trunk(model, documents, looped, tap=tap)
        assert torch.equal(hidden, trunk(model, documents, looped))  # watching changes nothing
    references = [Reference(model, looped) for _ in documents]
    final = torch.cat([reference(document) for reference, document in zip(references, documents)])
    wanted = {
        key: [torch.cat(parts) for parts in zip(*(r.inputs[key] for r in references))] for key in references[0].inputs
    }
    assert set(seen) == set(wanted)
    for key, inputs in wanted.items():
        assert len(seen[key]) == len(inputs) == (2 if looped and key[1] in (1, 2) else 1), key
        for have, want in zip(seen[key], inputs):
            assert torch.allclose(have.double(), want, atol=5e-4 * float(want.abs().max())), key
    assert torch.allclose(hidden.double(), final, atol=3e-4)  # the head's input is what the trunk returns


# ---- the head ----


def test_probabilities_sum_to_one_and_the_hint_is_right():
    model, (document,) = gpt(config(logit_softcap=4.0)), random_documents([12])
    with torch.no_grad():
        hidden = trunk(model, [document], True)
        total = torch.zeros(12, dtype=torch.float64)
        table = []
        for token in range(VOCAB):
            nats, absent = model.nll(hidden, torch.full((12,), token))
            assert absent is None
            assert nats.dtype == torch.float32 and (nats >= 0).all()
            total += (-nats.double()).exp()
            table.append(nats)
        assert torch.allclose(total, torch.ones_like(total), atol=1e-5)
        hint = torch.arange(12) * 7
        nats, log_prob = model.nll(hidden, torch.from_numpy(document), hint=hint)
    table = torch.stack(table, 1)
    assert torch.allclose(log_prob, -table.gather(1, hint[:, None])[:, 0], atol=1e-5)
    assert torch.allclose(nats, table.gather(1, torch.from_numpy(document)[:, None])[:, 0], atol=1e-6)
    logits = hidden.double() @ model.tok_emb.detach().double().T
    wanted = -torch.log_softmax(4 * torch.tanh(logits / 4), -1)
    assert torch.allclose(table.double(), wanted, atol=2e-5)


# ---- attention backends ----


@pytest.mark.parametrize("fault", [None, "no window", "keys aligned at the front", "zero gradient"])
def test_a_backend_is_taken_only_if_it_agrees(monkeypatch, fault):
    """FlashAttention 4's functions, played by the reference with one fault each, through the same check that every
    backend must pass on a GPU."""

    def where(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, window_size_left):
        assert causal and (window_size_left is None or window_size_left >= 0)
        keys = cu_seqlens_q if fault == "keys aligned at the front" else cu_seqlens_k
        return (
            cu_seqlens_q,
            keys,
            max_seqlen_q,
            max_seqlen_k,
            -1 if window_size_left is None or fault == "no window" else window_size_left,
        )

    def forward(q, k, v, return_lse, **words):
        assert return_lse
        return *train_gpt.reference_forward(q, k, v, *where(**words)), None, None

    def backward(q, k, v, out, dout, lse, **words):
        dq, dk, dv = train_gpt.reference_backward(dout, q, k, v, out, lse, *where(**words))
        return dq, dk, 0 * dv if fault == "zero gradient" else dv

    monkeypatch.setitem(
        sys.modules,
        "flash_attn.cute.interface",
        types.SimpleNamespace(_flash_attn_fwd=forward, _flash_attn_bwd=backward),
    )
    if fault is None:
        train_gpt.check_backend("fa4", Config(), torch.device("cpu"))
    else:
        with pytest.raises(RuntimeError, match="differs from the reference"):
            train_gpt.check_backend("fa4", Config(), torch.device("cpu"))
