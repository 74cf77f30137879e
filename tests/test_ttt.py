"""Test-time training: the score of a token depends on earlier segments and its own prefix, whatever the batch, the
ranks and the later tokens; and it learns what it says."""

import contextlib
import dataclasses
import math
import shutil

import numpy as np
import pytest
import torch
from helpers import (
    BOS,
    RUN,
    TINY,
    Stream,
    config,
    data,
    forked,
    main,
    network,
    random_documents,
    ranks,
    result,
    scoring_pass,
    scratch,
    spawn,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train_gpt
from train_gpt import (
    ADAPTER_KINDS,
    Cache,
    DocumentTTT,
    GlobalSGD,
    Ledger,
    ScoringPass,
    Seq,
    TestTimeTraining,
    Verdicts,
    chunk_ends,
    new_lora,
    plan_segments,
    sgd_chunks,
)

TestTimeTraining.__test__ = False  # not a test class, whatever its name begins with

# Adaptation that is far above float noise; no phases unless a test asks for them.
TTT = dict(
    TINY,
    ttt_eval_seq_len=128,
    ttt_chunks="4,4,8,16",
    ttt_lora_rank=4,
    ttt_lora_alpha=8.0,
    ttt_lora_lr=0.01,
    ttt_batch_size=4,
    phased_ttt_num_phases=0,
    ttt_backprop_tokens=0,
    global_ttt_chunk_tokens=24,
    global_ttt_lr=0.01,
)
MODES = {
    "cached": dict(ttt_backprop_tokens=0),
    "partial": dict(ttt_backprop_tokens=6),
    "exact": dict(ttt_backprop_tokens=10**6),
}
LENGTHS = [9, 40, 1, 30, 75, 2, 33, 1, 20]  # the last document's last token is no input
every_mode = pytest.mark.parametrize("mode", MODES)


def ttt_config(base: dict = TTT, **overrides):
    return config(base, **overrides)


def passing(cfg, stream, model=None, ledger=None) -> ScoringPass:
    """A pass over the stream on one rank."""
    return scoring_pass(model or network(cfg), cfg, ranks(cfg), stream, ledger or stream.ledger())


def adapt(documents, cfg, model=None) -> np.ndarray:
    """Nats of every target, float64."""
    stream = Stream(documents)
    ledger = stream.ledger()
    bpb = TestTimeTraining(passing(cfg, stream, model, ledger)).score()
    assert bpb == pytest.approx(ledger.nats.sum() / math.log(2) / stream.target_bytes.sum(dtype=int))
    return ledger.nats


def largest(a, b) -> float:
    return float(np.abs(np.asarray(a) - np.asarray(b)).max())


# ---- slow references ----


def alone(tokens: torch.Tensor, position: int = 0) -> Seq:
    cu = torch.tensor([0, len(tokens)], dtype=torch.int32)
    return Seq(cu, cu, len(tokens), len(tokens), torch.arange(position, position + len(tokens), dtype=torch.int32))


def chunks_of(length: int, sizes: list[int]):
    begin, i = 0, 0
    while begin < length:
        end = begin + sizes[min(i, len(sizes) - 1)]
        yield begin, end
        begin, i = end, i + 1


def document(stream: Stream, i: int) -> torch.Tensor:
    """Its tokens and one more, its last target."""
    span = stream.of(i)
    return torch.from_numpy(stream.tokens[span.start : span.stop + 1].astype(np.int64))


@torch.no_grad()
def plain_windows(model, tokens: torch.Tensor, cfg) -> np.ndarray:
    """Nats of every chunk from one plain forward over at most TTT_EVAL_SEQ_LEN tokens that ends with it."""
    nats, length = [], len(tokens) - 1
    for begin, end in chunks_of(length, [int(s) for s in cfg.ttt_chunks.split(",")]):
        low, stop = max(0, end - cfg.ttt_eval_seq_len), min(end, length)
        hidden = model.trunk(tokens[low:stop], alone(tokens[low:stop]), looped=True)
        nats.append(model.nll(hidden[begin - low :], tokens[begin + 1 : stop + 1]).nats)
    return torch.cat(nats).double().numpy() if nats else np.empty(0)


class PlainAdapters:
    """The adapters of one document as separate matrices: each site adds alpha / rank B A x."""

    def __init__(self, model, cfg, masked=()):
        start = new_lora(model, 1, frozenset(masked), cfg.ttt_lora_rank, cfg.ttt_lora_alpha, cfg.seed)
        self.widths, self.scale = start.widths, cfg.ttt_lora_alpha / cfg.ttt_lora_rank
        self.a, self.b = (
            {
                (kind, visit): t[0].T.detach().clone().requires_grad_()
                for kind, visits in part.items()
                for visit, t in enumerate(visits)
            }
            for part in (start.a, start.b)
        )
        self.leaves = [*self.a.values(), *self.b.values()]
        self.squares = [torch.zeros_like(p) for p in self.leaves]
        self.steps = 0

    def add_to(self, y, kind, visit, x):
        def delta(kind):
            if (kind, visit) not in self.a:
                return torch.zeros(len(x), self.widths[kind])
            return (self.scale * self.b[kind, visit] @ self.a[kind, visit] @ x.T).T

        return y + torch.cat([delta(k) for k in (("q", "k", "v") if kind == "qkv" else (kind,))], 1)

    def step(self, loss, cfg):
        """AdamW with beta1 = 0, written out."""
        self.steps += 1
        for p, v, g in zip(self.leaves, self.squares, torch.autograd.grad(loss, self.leaves)):
            v[...] = cfg.ttt_beta2 * v + (1 - cfg.ttt_beta2) * g**2
            root = torch.sqrt(v / (1 - cfg.ttt_beta2**self.steps))
            lr = cfg.ttt_lora_lr * cfg.ttt_local_lr_mult
            with torch.no_grad():
                p -= lr * cfg.ttt_weight_decay * p + lr * g / (root + 1e-10)


def slow_document(model, tokens: torch.Tensor, cfg) -> np.ndarray:
    """One document: score a chunk, learn from it if another follows. Keys and values of all positions are kept; a
    window ends with its chunk."""
    model.requires_grad_(False)
    length, context = len(tokens) - 1, cfg.ttt_eval_seq_len
    adapters, nats = PlainAdapters(model, cfg, cfg.ttt_mask.split(",")), np.empty(0)
    keys = values = torch.zeros(len(model.schedules[True]), 1, 0, cfg.num_kv_heads, model.head_dim)
    for begin, end in chunks_of(length, [int(s) for s in cfg.ttt_chunks.split(",")]):
        stop, low = min(end, length), max(0, end - context)  # the window, its first position
        again = max(low, begin - cfg.ttt_backprop_tokens)  # first position that is run
        n = stop - again
        seq = Seq(
            torch.tensor([0, n], dtype=torch.int32),
            torch.tensor([0, stop - low], dtype=torch.int32),
            n,
            stop - low,
            torch.arange(again, stop, dtype=torch.int32),
        )
        last = tokens[again - 1 if again else 0][None]
        hidden, new = model.trunk(
            tokens[again:stop],
            seq,
            looped=True,
            lora=adapters,
            cache=Cache(keys[:, :, low:again], values[:, :, low:again], last),
        )
        scores = model.nll(hidden[begin - again :], tokens[begin + 1 : stop + 1], lora=adapters).nats
        nats = np.append(nats, scores.detach().double().numpy())
        if end < length:
            adapters.step(scores.mean(), cfg)
        keys, values = (
            torch.cat((old[:, :, :again], t.detach()), 2) for old, t in ((keys, new.keys), (values, new.values))
        )
    return nats


# ---- without learning: the base model ----


@pytest.mark.parametrize("batch_size", (1, 4))
@every_mode
def test_zero_adapters_give_the_base_models_scores(mode, batch_size):
    """The context covers every document."""
    cfg = ttt_config(ttt_lora_lr=0.0, ttt_batch_size=batch_size, **MODES[mode])
    stream = Stream(random_documents(LENGTHS))
    nats = adapt(random_documents(LENGTHS), cfg)
    for i in range(len(LENGTHS)):
        wanted = plain_windows(network(cfg), document(stream, i), cfg)
        found = nats[stream.of(i)]
        assert len(found) == len(wanted)
        if len(found):
            assert largest(found, wanted) < 1e-5, i


@pytest.mark.parametrize("mode", ("exact",))
def test_longer_documents_get_a_whole_context(mode):
    """The chunk and as much before it as TTT_EVAL_SEQ_LEN holds, run exactly. Without SmearGate, which looks one token
    further where a cache remembers it."""
    cfg = ttt_config(ttt_lora_lr=0.0, ttt_eval_seq_len=24, smear_gate_enabled=False, **MODES[mode])
    stream = Stream(random_documents([100, 61, 24, 25]))
    nats = adapt(random_documents([100, 61, 24, 25]), cfg)
    for i in range(4):
        assert largest(nats[stream.of(i)], plain_windows(network(cfg), document(stream, i), cfg)) < 1e-5


def test_cached_windows_are_as_long_as_the_context(monkeypatch):
    """One forward of each whole document under a mask: from a chunk that ends at e, keys from e - TTT_EVAL_SEQ_LEN on
    are seen, and no others."""
    cfg = ttt_config(ttt_lora_lr=0.0, ttt_eval_seq_len=24, ttt_chunks="4,4,8")
    documents, model = random_documents([100, 61, 24, 30]), network(cfg)
    stream, nats = Stream(documents), adapt(documents, cfg)

    def masked(q, k, v, seq, window, backend):
        n, group = len(q), q.size(1) // k.size(1)
        ends = np.repeat([e for _, e in chunks_of(n, [4, 4, 8])], [e - b for b, e in chunks_of(n, [4, 4, 8])])[:n]
        at = torch.arange(n)
        seen = (at[None] <= at[:, None]) & (at[None] >= torch.from_numpy(ends)[:, None] - 24)
        seen &= torch.tensor(window < 0) | (at[:, None] - at[None] <= window)
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        scores = torch.einsum("ihd,jhd->hij", q, k) / math.sqrt(q.size(2))
        return torch.einsum("hij,jhd->ihd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)

    monkeypatch.setattr(train_gpt, "attend", masked)
    for i in range(len(documents)):
        tokens = document(stream, i)
        with torch.no_grad():
            wanted = model.nll(model.trunk(tokens[:-1], alone(tokens[:-1]), looped=True), tokens[1:]).nats.numpy()
        assert largest(nats[stream.of(i)], wanted) < 1e-5


# ---- adapters ----


@torch.no_grad()
def random_lora(model, documents: int):
    lora = new_lora(model, documents, frozenset(), 3, 6.0, seed=0)
    for t in lora.leaves():
        t.copy_(0.3 * torch.randn(t.shape, generator=torch.Generator().manual_seed(t.numel())))
    return lora


class Merged(train_gpt.GPT):
    """Adapters of one document of a model without loops, merged into weights where they sit on one, added as a matrix
    where they run beside a sublayer."""

    def set(self, source, lora, row: int):
        self.load_state_dict(source.state_dict())
        self.extra = {
            kind: torch.stack([lora.scale * b[row].T @ a[row].T for a, b in zip(lora.a[kind], lora.b[kind])])
            for kind in ADAPTER_KINDS
        }  # (visits, out, in)
        self.qkv += torch.cat([self.extra[kind] for kind in ("q", "k", "v")], 1)

    def attention_sublayer(self, n, site):
        y, *new = super().attention_sublayer(n, site)
        return y + n @ self.extra["o"][site.visit.layer].T, *new

    def mlp_sublayer(self, n, site):
        return super().mlp_sublayer(n, site) + n @ self.extra["mlp"][site.visit.layer].T


@torch.no_grad()
def test_adapters_sit_on_the_projections_and_beside_the_sublayers():
    """Documents side by side with adapters of their own against each document in a model that has them merged."""
    cfg = ttt_config(num_loops=0)
    model, merged, n = network(cfg), Merged(cfg, "reference", torch.float32), 12
    lora = random_lora(model, 3)
    tokens = torch.from_numpy(np.concatenate(random_documents([n] * 3)))
    cu = torch.arange(0, 3 * n + 1, n, dtype=torch.int32)
    targets = tokens.flip(0)
    found = model.nll(
        model.trunk(tokens, Seq(cu, cu, n, n, torch.arange(n, dtype=torch.int32).repeat(3)), looped=False, lora=lora),
        targets,
        lora=lora,
    ).nats
    for row in range(3):
        merged.set(model, lora, row)
        span = slice(row * n, row * n + n)
        hidden = merged.trunk(tokens[span], alone(tokens[span]), looped=False)
        merged.tok_emb += merged.extra["head"][0]  # of the head alone: the trunk has read its embedding
        assert largest(found[span], merged.nll(hidden, targets[span]).nats) < 1e-4
        unadapted = model.nll(model.trunk(tokens[span], alone(tokens[span]), looped=False), targets[span]).nats
        assert largest(found[span], unadapted) > 0.1


def test_adapters_begin_equal_for_every_document():
    """B zero; A uniform in +-1/sqrt(in), the same for every document of any batch, other for every visit and kind."""
    model = network(ttt_config())
    one, five = (new_lora(model, n, frozenset(), 8, 16.0, seed=3) for n in (1, 5))
    for kind in ADAPTER_KINDS:
        visits = 1 if kind == "head" else len(model.schedules[True])
        a, b = (torch.stack(list(part[kind])) for part in (five.a, five.b))
        assert a.shape == (visits, 5, 32, 8) and b.shape[:3] == (visits, 5, 8)
        assert not b.any() and (a == torch.stack(one.a[kind])).all()
        assert 0.9 / math.sqrt(32) < a.abs().max() <= 1 / math.sqrt(32) and abs(a.mean()) < 0.02
    rows = torch.cat([a for visits in one.a.values() for a in visits])
    assert len(torch.unique(rows.flatten(1), dim=0)) == len(rows)
    assert not torch.equal(one.a["q"][0], new_lora(model, 1, frozenset(), 8, 16.0, seed=4).a["q"][0])


# ---- one document, learning ----

LEARNING = {
    "exact": MODES["exact"],
    "exact, short context": dict(ttt_backprop_tokens=24, ttt_eval_seq_len=24),
    "cached": MODES["cached"],
    "cached, short context": dict(ttt_backprop_tokens=0, ttt_eval_seq_len=24),
    "partial, short context": dict(ttt_eval_seq_len=24, ttt_backprop_tokens=5),
    "partial, masked": dict(ttt_backprop_tokens=5, ttt_mask="k,o"),
}


@pytest.mark.parametrize("how", LEARNING)
def test_documents_learn_as_one_alone_would(how):
    """A batch of nine documents, some of which end while the others go on, against each in a slow loop of its own."""
    cfg = ttt_config(ttt_batch_size=9, ttt_weight_decay=0.5, ttt_local_lr_mult=0.7, **LEARNING[how])
    documents, model = random_documents(LENGTHS), network(cfg)
    stream, nats = Stream(documents), adapt(documents, cfg)
    unadapted = adapt(documents, dataclasses.replace(cfg, ttt_lora_lr=0.0))
    assert largest(nats, unadapted) > 0.03
    for i in range(len(LENGTHS)):
        if LENGTHS[i] > 1:
            assert largest(nats[stream.of(i)], slow_document(model, document(stream, i), cfg)) < 1e-5, i


def test_learning_lowers_the_loss_of_repetition():
    """A document that repeats three tokens: later chunks score better with adaptation than without."""
    documents = [np.array([BOS, *[7, 8, 9] * 30])]
    still, learning = (adapt(documents, ttt_config(ttt_lora_lr=lr)) for lr in (0.0, 0.01))
    assert np.array_equal(still[:4], learning[:4]) and learning[60:].mean() < still[60:].mean() - 0.5


# ---- batches and ranks ----

PHASES = dict(TTT, phased_ttt_num_phases=2, phased_ttt_prefix_docs=6, segment_docs=4, global_ttt_replay=0.5)
# The whole stream teaches: segments of 2, 2, 2 and 3 of the usual documents.
GROWING = dict(
    TTT, phased_ttt_num_phases=1, segment_first_docs=2, segment_growth=0.5, segment_docs=4, global_ttt_replay=0.5
)


@pytest.mark.parametrize("mode", ("exact", "partial"))
def test_batch_size_changes_float_noise_only(mode):
    documents = random_documents(LENGTHS)
    one, *others = (adapt(documents, ttt_config(PHASES, ttt_batch_size=n, **MODES[mode])) for n in (1, 3, 64))
    assert max(largest(one, other) for other in others) < 1e-5


def test_the_order_in_a_batch_changes_float_noise_only():
    cfg, found = ttt_config(), []
    stream = Stream(random_documents(LENGTHS))
    for order in (np.arange(9), np.array([4, 0, 8, 2, 6, 1, 7, 3, 5])):
        ledger = stream.ledger()
        scoring = passing(dataclasses.replace(cfg, ttt_batch_size=9), stream, network(cfg), ledger)
        DocumentTTT(scoring).run(order)
        found.append(ledger.nats)
    assert not np.isnan(found[0]).any() and largest(*found) < 1e-5


# Three pieces in every SGD step, and no clipping to hide a wrong scale.
SHARED = dict(
    GROWING,
    ttt_batch_size=2,
    ttt_eval_seq_len=16,
    ttt_chunks="4,4,8",
    global_ttt_chunk_tokens=40,
    global_ttt_grad_clip=1e9,
    global_ttt_lr=0.001,
)


def adapt_on(rank: int, world: int, folder):
    cfg = ttt_config(SHARED, rank=rank, world_size=world)
    group, model, stream = train_gpt.Ranks(cfg), network(cfg), Stream(random_documents(LENGTHS))
    ledger = stream.ledger()
    TestTimeTraining(scoring_pass(model, cfg, group, stream, ledger)).score()
    np.savez(
        folder / f"{world}_{rank}",
        nats=ledger.nats,
        weights=torch.cat([p.flatten() for p in model.parameters()]).numpy(),
    )
    group.close()


def test_ranks_change_float_noise_only(tmp_path):
    """1, 2 and 3 ranks over gloo, three phases: every rank holds the whole ledger and, to the bit, the same weights."""
    for world in (1, 2, 3):
        forked(adapt_on, world, tmp_path)
    one = np.load(tmp_path / "1_0.npz")
    assert np.array_equal(one["nats"], adapt(random_documents(LENGTHS), ttt_config(SHARED)))
    assert (
        largest(one["nats"], adapt(random_documents(LENGTHS), ttt_config(SHARED, phased_ttt_num_phases=0))) > 1e-3
    )  # the phases were not in vain
    for world in (2, 3):
        first, *rest = (np.load(tmp_path / f"{world}_{rank}.npz") for rank in range(world))
        assert largest(one["nats"], first["nats"]) < 1e-5 and largest(one["weights"], first["weights"]) < 1e-5
        for other in rest:
            assert np.array_equal(first["nats"], other["nats"]) and np.array_equal(first["weights"], other["weights"])


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 90), min_size=1, max_size=30),
    size=st.integers(1, 8),
    world=st.integers(1, 4),
    first=st.integers(0, 5),
)
def test_every_document_of_a_segment_is_dealt_once(lengths, size, world, first):
    dealt = train_gpt.deal_batches(np.array(lengths), first, ttt_config(ttt_batch_size=size), world)
    assert len(dealt) == world and all(0 < len(batch) <= size for mine in dealt for batch in mine)
    assert sorted(int(i) for mine in dealt for batch in mine for i in batch) == list(range(first, first + len(lengths)))


# ---- causality ----


def other_values(documents, i: int, at: int):
    """The documents with other values from token ``at`` of document i on; every length kept."""
    changed = [d.copy() for d in documents]
    changed[i][at:] = (changed[i][at:] - 2 + 100) % 318 + 2  # 2..319: never BOS
    return changed


@every_mode
def test_later_tokens_change_no_earlier_score(mode):
    """To the bit: neither the document's earlier targets, nor those of any other document of its segment or of earlier
    ones."""
    cfg, documents = (
        ttt_config(PHASES, phased_ttt_num_phases=1, phased_ttt_prefix_docs=3, segment_docs=100, **MODES[mode]),
        random_documents(LENGTHS),
    )
    before = adapt(documents, cfg)
    for i, at in ((4, 33), (4, 1), (4, 74), (6, 17)):
        span, after = Stream(documents).of(i), adapt(other_values(documents, i, at), cfg)
        touched = np.zeros(len(before), bool)
        touched[span.start + at - 1 : span.stop] = True
        assert (before != after)[touched].mean() > 0.9 and np.array_equal(before[~touched], after[~touched]), (i, at)


@every_mode
def test_scored_segments_teach_the_base_weights(mode):
    """A document's values change no other score of its segment, to the bit, and nearly every score after a phase has
    ended behind it, or adapters begin warm."""
    documents = random_documents(LENGTHS)
    poisoned = other_values(documents, 1, 5)
    end = sum(LENGTHS[:3])
    for phases, warm in ((1, 0.0), (0, 1.0), (0, 0.0)):
        cfg = ttt_config(
            PHASES,
            phased_ttt_num_phases=phases,
            phased_ttt_prefix_docs=3,
            segment_docs=3,
            ttt_warm_start=warm,
            **MODES[mode],
        )
        before, after = adapt(documents, cfg), adapt(poisoned, cfg)
        own = np.zeros(len(before), bool)
        own[Stream(documents).of(1)] = True
        assert np.array_equal(before[:end][~own[:end]], after[:end][~own[:end]])
        changed = (before[end:] != after[end:]).mean()
        assert changed > 0.9 if phases or warm else changed == 0


def test_poison_in_segments_that_grow():
    """To the bit: documents 4 and 5 share a segment, and what comes before document 5's last half never moves; the last
    segment does, since base weights and adapters have learnt from it."""
    documents, cfg = random_documents([9, 40, 1, 30, 75, 62, 33, 1, 20]), ttt_config(GROWING)
    before, after = adapt(documents, cfg), adapt(other_values(documents, 5, 31), cfg)
    span, last = Stream(documents).of(5), Stream(documents).of(6).start
    assert np.array_equal(before[: span.start + 30], after[: span.start + 30])
    assert (before != after)[span.start + 30 : last].mean() > 0.9 and (before != after)[last:].mean() > 0.9


@every_mode
def test_lengths_change_float_noise_only(mode):
    """A document cut short, another gone: earlier scores and those of the others move by the rounding of other
    shapes."""
    cfg, documents = ttt_config(segment_docs=100, **MODES[mode]), random_documents(LENGTHS)
    stream, whole = Stream(documents), adapt(documents, cfg)
    shorter = [*documents[:4], documents[4][:50], *documents[5:6], *documents[7:]]
    found, less = adapt(shorter, cfg), Stream(shorter)
    pairs = [(i, i) for i in range(6)] + [(7, 6), (8, 7)]
    for a, b in pairs:
        n = 49 if a == 4 else stream.of(a).stop - stream.of(a).start  # token 50 was a word and is BOS now
        assert largest(whole[stream.of(a)][:n], found[less.of(b)][:n]) < 1e-5


# ---- plans ----


def check_chunks(sizes, lengths):
    cfg = ttt_config(ttt_chunks=",".join(map(str, sizes)))
    found = [chunk_ends(longest, cfg) for longest in sorted(lengths)]
    for longest, ends in zip(sorted(lengths), found):
        assert all(type(e) is int for e in ends)
        endless = [*sizes, *[sizes[-1]] * len(ends)][: len(ends)]
        assert (
            np.diff([0, *ends]).tolist() == endless
        )  # contiguous from 0, the sizes in order: no position twice or left out
        assert longest == 0 or (ends and ends[-1] >= longest)
    for a, b in zip(found, found[1:]):
        assert b[: len(a)] == a  # a longer document begins with the same chunks


@settings(max_examples=300, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 20), min_size=1, max_size=5),
    lengths=st.lists(st.integers(0, 120), min_size=2, max_size=4),
)
def test_chunks_depend_on_position_only(sizes, lengths):
    check_chunks(sizes, lengths)


def test_no_chunk_begins_past_the_longest_document():
    counts = {1: 1, 5: 1, 8: 1, 9: 2, 64: 4, 65: 5, 129: 6}
    assert {longest: len(chunk_ends(longest, ttt_config(ttt_chunks="8,8,16,32,64"))) for longest in counts} == counts


@settings(max_examples=300, deadline=None)
@given(documents=st.integers(2, 60), size=st.integers(1, 70), phases=st.integers(0, 4), prefix=st.integers(1, 70))
def test_segments_of_a_prefix(documents, size, phases, prefix):
    """All documents once, in order; a border at every phase and every SEGMENT_DOCS, nowhere else; learning follows the
    phases only, each before the last document."""
    segments = plan_segments(
        range(documents), ttt_config(segment_docs=size, phased_ttt_num_phases=phases, phased_ttt_prefix_docs=prefix)
    )
    assert [i for s in segments for i in range(s.first, s.last)] == list(range(documents)) and all(
        s.first < s.last for s in segments
    )
    ends, learns = {s.last for s in segments}, {s.last for s in segments if s.then_learn}
    share = min(prefix, documents - 1)
    assert learns == {share * p // phases for p in range(1, phases + 1)} - {0} if phases else not learns
    assert ends == learns | {i for i in range(1, documents) if i % size == 0} | {documents}


def sizes_of(documents: int, **overrides) -> list[int]:
    return [s.last - s.first for s in plan_segments(range(documents), ttt_config(**overrides))]


@settings(max_examples=300, deadline=None)
@given(
    documents=st.integers(1, 90),
    more=st.integers(1, 90),
    first=st.integers(1, 9),
    growth=st.floats(0, 2),
    most=st.integers(1, 30),
    phases=st.integers(0, 2),
)
def test_segments_grow_over_the_whole_stream(documents, more, first, growth, most, phases):
    """All documents once, in order; learning after each segment but the last; a segment is as large as those before it
    allow, whatever follows."""
    cfg = ttt_config(segment_docs=most, segment_first_docs=first, segment_growth=growth, phased_ttt_num_phases=phases)
    segments = plan_segments(range(documents), cfg)
    assert [i for s in segments for i in range(s.first, s.last)] == list(range(documents))
    assert [s.then_learn for s in segments] == [phases > 0] * (len(segments) - 1) + [False]
    for s in segments:
        whole = min(max(int(growth * s.first), first), most)
        assert s.last - s.first == whole or s.last == documents and s.last - s.first < whole
    longer = plan_segments(range(documents + more), cfg)
    assert [s[:2] for s in longer][: len(segments) - 1] == [s[:2] for s in segments][:-1]


def test_the_default_plan_at_the_contests_size():
    """Some thirty segments cover 50,000 documents; those of a short stream are short."""
    sizes = sizes_of(50_000, phased_ttt_num_phases=8)
    assert sizes[:8] == [64, 64, 64, 64, 64, 80, 100, 125] and max(sizes) == 2500 and len(sizes) == 37
    assert sizes_of(150) == [64, 64, 22]


REPLAY = dict(first=st.integers(0, 400), fresh=st.integers(1, 400), tokens=st.integers(5, 60), turn=st.integers(0, 30))


@settings(max_examples=300, deadline=None)
@given(tenths=st.integers(0, 10), **REPLAY)
def test_a_lesson_has_all_that_is_new_and_a_share_of_the_rest(tenths, first, fresh, tokens, turn):
    """In stream order, nothing beyond the end; of the earlier text each chunk in one of ten turns, for a tenth; the
    chunks are those of a lesson that has everything."""
    end = first + fresh
    cfg = ttt_config(global_ttt_chunk_tokens=tokens, global_ttt_replay=tenths / 10)
    everything = sgd_chunks(0, 0, end, 0, cfg)
    edges = np.linspace(0, end, max(round(end / tokens), 1) + 1).astype(int).tolist()
    assert everything == list(zip(edges, edges[1:]))
    turns = [sgd_chunks(0, first, end, turn + t, cfg) for t in range(10)]
    for chunks in turns:
        assert chunks == [chunk for chunk in everything if chunk in chunks]
        assert {chunk for chunk in everything if chunk[1] > first} <= set(chunks)
        old = sum(chunk[1] <= first for chunk in everything)
        assert abs(sum(chunk[1] <= first for chunk in chunks) - old * tenths / 10) < 1
    for chunk in everything:
        if chunk[1] <= first:
            assert sum(chunk in chunks for chunks in turns) == tenths


def test_lessons_of_a_plan():
    """What is new is what no phase has had, across segments that end without one; TTT_METHOD=sgd has no replay."""
    starts = np.arange(0, 1000, 100)
    cfg = ttt_config(segment_docs=1, phased_ttt_num_phases=2, phased_ttt_prefix_docs=8, global_ttt_chunk_tokens=100)
    segments = plan_segments(range(10), cfg)
    lessons = train_gpt.plan_lessons(segments, starts, dataclasses.replace(cfg, global_ttt_replay=0.0))
    assert {segments[i].last: chunks[0][0] for i, chunks in lessons.items()} == {4: 0, 8: 400}
    assert lessons[7] == [(400, 500), (500, 600), (600, 700), (700, 800)]
    sgd = ttt_config(SGD, global_ttt_epochs=2, global_ttt_chunk_tokens=100)
    segments = train_gpt.plan_sgd_segments(np.full(10, 100), sgd)
    lessons = train_gpt.plan_lessons(segments, starts, sgd)
    assert lessons == {i: [(100 * i, 100 * i + 100)] * 2 for i in range(9)}
    assert train_gpt.plan_lessons(segments, starts, dataclasses.replace(sgd, ttt_enabled=False)) == {}


# ---- time ----


@pytest.mark.parametrize("base", ("lora", "sgd"))
def test_timing_leaves_no_trace(base):
    """The estimate is there before the first score; scores, weights and the ledger are those of a run without it."""
    cfg = ttt_config(GROWING if base == "lora" else SGD)
    found = []
    for timed in (False, True):
        stream, model = Stream(random_documents(LENGTHS)), network(cfg)
        scoring = passing(cfg, stream, model)
        adaptation = TestTimeTraining(scoring)
        if timed:
            before = {name: p.clone() for name, p in model.named_parameters()}
            tokens = torch.from_numpy(stream.tokens.astype(np.int64))
            assert adaptation.measure(0.5) > 0.5 * (base == "sgd")
            assert np.isnan(scoring.ledger.nats).all() and not scoring.ledger.own.any()
            assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())
            assert not any(p.requires_grad for p in model.parameters())
            assert base == "sgd" or torch.equal(adaptation.strategy.documents.lockstep.tokens, tokens)
        adaptation.score()
        found.append(scoring.ledger.nats)
    assert np.array_equal(*found)


def timed(cfg, monkeypatch, step=0.5, lesson=3.0):
    """A TestTimeTraining of which every step takes `step` seconds and every step of global SGD `lesson`."""
    monkeypatch.setattr(DocumentTTT, "step_seconds", lambda self, shape: step)
    monkeypatch.setattr(train_gpt, "sgd_seconds", lambda scoring: lesson)
    return TestTimeTraining(passing(cfg, Stream(random_documents(LENGTHS)), network(cfg)))


def test_the_estimate_adds_up_the_steps_of_the_plan(monkeypatch):
    """By hand: a document of each length alone in its batch; two ranks wait for each other behind every segment."""
    cfg = ttt_config(GROWING, ttt_batch_size=1)
    adaptation = timed(cfg, monkeypatch)
    chunks = [len(chunk_ends(n, cfg)) for n in Stream(random_documents(LENGTHS)).lengths.tolist()]
    segments = [chunks[0:2], chunks[2:4], chunks[4:6], chunks[6:9]]
    lessons = sum(len(lesson) for lesson in adaptation.strategy.lessons.values())
    assert lessons > 9 and adaptation.measure(0) == 0.5 * sum(chunks) + 3.0 * lessons
    adaptation.scoring.ranks.world = 2
    longest = [max(a, b) for a, b in segments[:3]] + [max(segments[3][0], sum(segments[3][1:]))]
    monkeypatch.setattr(train_gpt.Ranks, "agree", lambda self, value: value)
    assert adaptation.measure(0) == 0.5 * sum(longest) + 3.0 * lessons


def test_a_plan_beyond_the_budget_is_refused_before_the_first_score(monkeypatch):
    """The line names a setting and a value with which the plan does fit; what fits goes on."""
    cfg = ttt_config(GROWING, max_wallclock_seconds=77.0, segment_growth=9.0, segment_docs=2)
    adaptation = timed(cfg, monkeypatch)
    whole = adaptation.measure(0.0)
    adaptation.check_time(whole)
    fits = {docs: adaptation.planned_seconds(dataclasses.replace(cfg, segment_docs=docs)) for docs in (4, 8)}
    assert whole > fits[4] > fits[8]
    refusals = {fits[4]: "SEGMENT_DOCS=4", fits[8]: "SEGMENT_DOCS=8", 0.1: "TTT_ENABLED=0"}
    for left, remedy in refusals.items():
        with pytest.raises(train_gpt.UserError, match=f"MAX_WALLCLOCK_SECONDS=77 leaves {left:.0f} s .* set {remedy},"):
            adaptation.check_time(left)
    assert np.isnan(adaptation.scoring.ledger.nats).all()


def test_progress_shows_inside_a_batch(monkeypatch):
    """A line after each forward, as often as the clock allows, about all targets so far of all ranks."""
    monkeypatch.setattr(train_gpt.Progress, "EVERY", -1.0)
    cfg = ttt_config(ttt_batch_size=9)
    scoring = passing(cfg, Stream(random_documents(LENGTHS)), network(cfg))
    TestTimeTraining(scoring).score()
    lines = [line for line in scoring.log.lines if "BPB so far" in line]
    assert len(lines) == len(chunk_ends(max(LENGTHS), cfg))
    shares = [float(line.split()[0]) for line in lines]
    assert shares == sorted(set(shares)) and shares[0] == 0 and 90 < shares[-1] < 100
    scoring.ranks.world = 3
    ledger = Ledger("test", np.ones(40, np.uint16), Verdicts())
    ledger.write(np.arange(4), np.full(4, math.log(2)))
    ledger.shared += 8, 4 * math.log(2), 8  # of all ranks, before the last merge
    scoring.progress.show(scoring._replace(ledger=ledger))
    assert "50.0 %  BPB so far 0.8000" in scoring.log.lines[-1]


def test_a_chunk_fits_the_context():
    with pytest.raises(train_gpt.UserError, match="TTT_CHUNKS"):
        ttt_config(ttt_eval_seq_len=24, ttt_chunks="8,32")


# ---- probabilities ----


@pytest.mark.parametrize("base", (TTT, PHASES), ids=("adapted", "with phases"))
@every_mode
def test_probabilities_sum_to_one(mode, base):
    """Two prefixes before every token of the vocabulary, BOS as the next document's: documents of one segment, scored
    after several updates.

    One prefix ends inside a chunk, the other before the first token of one."""
    vocab, documents, ends = 12, random_documents([30, 41], 12, seed=1), {}
    for length in (25, 33):
        prefix = random_documents([length], vocab, seed=length)[0]
        ends[length] = len(documents) + np.arange(vocab)
        documents += [prefix, *(np.append(prefix, token) for token in range(vocab) if token != BOS)]
    cfg = ttt_config(
        base, vocab_size=vocab, segment_docs=100, phased_ttt_prefix_docs=2, ttt_batch_size=7, **MODES[mode]
    )
    stream, found = Stream(documents), {}
    for learns in (False, True):
        nats = adapt(documents, dataclasses.replace(cfg, ttt_lora_lr=cfg.ttt_lora_lr if learns else 0.0))
        found[learns] = {length: np.exp(-nats[stream.starts[which] + length - 1]) for length, which in ends.items()}
    for length in ends:
        assert found[True][length].sum() == pytest.approx(1, abs=1e-5) and found[True][length].min() > 0
        assert largest(found[False][length], found[True][length]) > 1e-3  # the updates were not in vain


# ---- global SGD ----


def slow_sgd(model, stream, end: int, cfg):
    """Momentum SGD over whole chunks of targets 0..end; pieces of TTT_EVAL_SEQ_LEN, cut again at every BOS, one forward
    each."""
    chunk, parameters = cfg.global_ttt_chunk_tokens, list(model.parameters())
    velocity = [torch.zeros_like(p) for p in parameters]
    steps = [i * chunk for _ in range(cfg.global_ttt_epochs) for i in range(end // chunk)]
    for step, begin in enumerate(steps):
        loss = 0.0
        cuts = sorted(
            {
                *range(begin, begin + chunk, cfg.ttt_eval_seq_len),
                *(s for s in stream.starts.tolist() if begin < s < begin + chunk),
                begin + chunk,
            }
        )
        for lo, hi in zip(cuts, cuts[1:]):
            tokens = torch.from_numpy(stream.tokens[lo : hi + 1].astype(np.int64))
            nats = model.nll(model.trunk(tokens[:-1], alone(tokens[:-1]), looped=True), tokens[1:]).nats
            loss = loss + nats.sum() / chunk
        grads = [
            g if g is not None else torch.zeros_like(p)
            for p, g in zip(parameters, torch.autograd.grad(loss, parameters, allow_unused=True))
        ]
        norm = math.sqrt(sum(float((g.double() ** 2).sum()) for g in grads))
        lr = cfg.global_ttt_lr * (1 + math.cos(math.pi * step / len(steps))) / 2
        with torch.no_grad():
            for p, v, g in zip(parameters, velocity, grads):
                v[...] = cfg.global_ttt_momentum * v + g * min(1, cfg.global_ttt_grad_clip / norm)
                p -= lr * v


@pytest.mark.parametrize(
    "overrides",
    (
        dict(),
        dict(global_ttt_epochs=2, global_ttt_grad_clip=1e9),
        dict(global_ttt_momentum=0.0),
        dict(asym_logit_rescale=True, logit_softcap=3.0),
    ),
    ids=str,
)
def test_base_weights_learn_by_sgd(overrides, monkeypatch):
    """Five chunks of three pieces each, documents kept apart; every parameter that reaches the loss moves. Progress,
    which stands meanwhile, says what goes on."""
    monkeypatch.setattr(train_gpt.Progress, "EVERY", -1.0)
    cfg = ttt_config(ttt_eval_seq_len=16, ttt_chunks="4,8", global_ttt_chunk_tokens=40, **overrides)
    stream = Stream(random_documents([50, 1, 90, 59, 30]))
    ledger, found, wanted, start = stream.ledger(), network(cfg), network(cfg), network(cfg)
    ledger.write(np.arange(200), np.ones(200))
    scoring = passing(cfg, stream, found, ledger)
    GlobalSGD(scoring).learn(sgd_chunks(0, 0, 200, 0, cfg), 0.0, 1.0)
    assert scoring.log.lines and all(line.endswith(" s left, base weights learning") for line in scoring.log.lines)
    slow_sgd(wanted, stream, 200, cfg)
    for (name, a), b, before in zip(found.named_parameters(), wanted.parameters(), start.parameters()):
        assert largest(a.detach(), b.detach()) < 2e-6 + 1e-3 * largest(b.detach(), before.detach()), name
        assert not torch.equal(a, before), name
        assert a.grad is None and not a.requires_grad


MUON = dict(global_ttt_optimizer="muon", global_ttt_lr=0.1, matrix_lr=0.05)


def test_muon_in_the_place_of_sgd():
    """A step moves each matrix by lr MATRIX_LR along all of its directions alike, and what Adam has by lr times its
    rate; nothing decays."""
    cfg = ttt_config(**MUON, global_ttt_chunk_tokens=100)
    stream, model, start = Stream(random_documents([50, 50, 30])), network(cfg), network(cfg)
    scoring = passing(cfg, stream, model)
    scoring.ledger.write(np.arange(100), np.ones(100))
    train_gpt.GlobalMuon(scoring).learn(sgd_chunks(0, 0, 100, 0, cfg), 0.0, 1.0)
    moved = {n: p.detach() - q.detach() for (n, p), q in zip(model.named_parameters(), start.parameters())}
    singular = torch.linalg.svdvals(moved["o"])
    assert 0.7 < singular.median() / (0.1 * 0.05) < 1.3
    assert moved["tok_emb"].abs().max() == pytest.approx(0.1 * cfg.tied_embed_lr, rel=1e-2)
    assert all(move.any() for move in moved.values()) and not any(p.requires_grad for p in model.parameters())


def muon_on(rank: int, world: int, folder):
    cfg = ttt_config({**SHARED, **MUON}, rank=rank, local_rank=rank, world_size=world)
    group, stream, model = train_gpt.Ranks(cfg), Stream(random_documents(LENGTHS)), network(cfg)
    ledger = stream.ledger()
    TestTimeTraining(scoring_pass(model, cfg, group, stream, ledger)).score()
    np.savez(folder / f"muon_{rank}", nats=ledger.nats, weights=torch.cat([p.flatten() for p in model.parameters()]))
    group.close()


def test_muon_on_two_ranks_agrees(tmp_path):
    """The ranks share the matrices out and still hold the same weights; scores are those of one rank."""
    forked(muon_on, 2, tmp_path)
    alone_nats = adapt(random_documents(LENGTHS), ttt_config({**SHARED, **MUON}))
    first, second = (np.load(tmp_path / f"muon_{rank}.npz") for rank in range(2))
    assert np.array_equal(first["weights"], second["weights"]) and np.array_equal(first["nats"], second["nats"])
    assert largest(first["nats"], alone_nats) < 1e-3


@pytest.mark.parametrize("base", ("phases", "sgd"))
def test_the_optimizer_of_the_base_weights_is_a_choice(base):
    """It learns, only behind scores: the first segment is equal to the bit; other weights than SGD's come of it."""
    documents, found = random_documents(LENGTHS), {}
    for optimizer in ("sgd", "muon"):
        cfg = ttt_config(PHASES if base == "phases" else SGD, global_ttt_optimizer=optimizer)
        found[optimizer] = adapt(documents, cfg)
    first = sum(LENGTHS[:2])
    assert np.array_equal(found["sgd"][:first], found["muon"][:first])
    assert largest(found["sgd"][first:], found["muon"][first:]) > 1e-3


def test_phases_learn_from_the_scored_prefix(monkeypatch):
    """What each phase is given: the targets of all documents so far, their last BOS included; and the model is frozen
    while documents adapt."""
    cfg = ttt_config(PHASES, phased_ttt_num_phases=3, phased_ttt_prefix_docs=6, global_ttt_replay=1)
    stream, model = Stream(random_documents(LENGTHS)), network(cfg)
    scoring, seen = passing(cfg, stream, model), []

    def learn(self, chunks, *progress):
        scored, thawed = int((~np.isnan(scoring.ledger.nats)).sum()), any(p.requires_grad for p in model.parameters())
        assert all(a[1] == b[0] for a, b in zip(chunks, chunks[1:]))  # no gap
        seen.append((self, chunks[0][0], chunks[-1][1], progress, scored, thawed))

    monkeypatch.setattr(GlobalSGD, "learn", learn)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    TestTimeTraining(scoring).score()
    prefixes = [sum(LENGTHS[:n]) for n in (2, 4, 6)]
    assert [rest for _, *rest in seen] == [[0, end, (0.0, 1.0), end, False] for end in prefixes]
    assert len({id(sgd) for sgd, *_ in seen}) == 3  # a momentum of its own for each phase
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def ahead(learn):
    """GlobalSGD.learn that also takes the target behind what it was given."""
    return lambda self, chunks, *rest: learn(self, [*chunks[:-1], (chunks[-1][0], chunks[-1][1] + 1)], *rest)


# ---- full-parameter SGD, chunk after chunk ----

SGD = dict(
    TTT,
    ttt_method="sgd",
    eval_seq_len=64,
    val_batch_tokens=128,
    eval_stride=24,
    ttt_eval_seq_len=16,
    ttt_chunks="4,8",
    global_ttt_chunk_tokens=45,
    global_ttt_epochs=3,
    global_ttt_lr=0.05,
)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 70), min_size=1, max_size=20), st.integers(1, 80))
def test_chunks_are_whole_documents(lengths, tokens):
    """In order, all of them; a chunk ends with the document that fills it; only the last is not learnt from."""
    chunks = train_gpt.plan_sgd_segments(np.array(lengths), ttt_config(global_ttt_chunk_tokens=tokens))
    assert [i for s in chunks for i in range(s.first, s.last)] == list(range(len(lengths))) and [
        s.then_learn for s in chunks
    ] == [True] * (len(chunks) - 1) + [False]
    assert all(sum(lengths[s.first : s.last]) >= tokens > sum(lengths[s.first : s.last - 1]) for s in chunks[:-1])


def slow_chunks(stream, cfg) -> np.ndarray:
    """Score the documents of a chunk window by window with the weights so far, then take GLOBAL_TTT_EPOCHS passes of
    SGD over its targets; the last chunk is only scored."""
    model, nats = network(cfg), np.full(stream.targets, np.nan)
    parameters, lengths = (
        list(model.parameters()),
        [stream.of(i).stop - stream.of(i).start for i in range(len(stream.starts))],
    )
    velocity, chunks = [torch.zeros_like(p) for p in parameters], train_gpt.plan_sgd_segments(np.array(lengths), cfg)
    for number, chunk in enumerate(chunks):
        begin, end = stream.of(chunk.first).start, stream.of(chunk.last - 1).stop
        with torch.no_grad():
            for low, first, stop in train_gpt.plan_windows(
                stream.starts[chunk.first : chunk.last], end, cfg.eval_seq_len, cfg.eval_stride
            ).tolist():
                tokens = torch.from_numpy(stream.tokens[low : stop + 1].astype(np.int64))
                hidden = model.trunk(tokens[:-1], alone(tokens[:-1]), looped=True)
                nats[first:stop] = model.nll(hidden[first - low :], tokens[1 + first - low :]).nats
        steps = max(round((end - begin) / cfg.global_ttt_chunk_tokens), 1) if chunk.then_learn else 0
        edges = [int(begin + (end - begin) * i / steps) for i in range(steps + 1)] if steps else []
        for lo, hi in list(zip(edges, edges[1:])) * cfg.global_ttt_epochs:
            cuts, loss = (
                sorted({*range(lo, hi, cfg.ttt_eval_seq_len), *(s for s in stream.starts.tolist() if lo < s < hi), hi}),
                0.0,
            )
            for a, b in zip(cuts, cuts[1:]):
                tokens = torch.from_numpy(stream.tokens[a : b + 1].astype(np.int64))
                hidden = model.trunk(tokens[:-1], alone(tokens[:-1]), looped=True)
                loss = loss + model.nll(hidden, tokens[1:]).nats.sum() / (hi - lo)
            grads = torch.autograd.grad(loss, parameters, materialize_grads=True)
            norm = math.sqrt(sum(float((g.double() ** 2).sum()) for g in grads))
            with torch.no_grad():
                for p, v, g in zip(parameters, velocity, grads):
                    v[...] = cfg.global_ttt_momentum * v + g * min(1, cfg.global_ttt_grad_clip / norm)
                    p -= cfg.global_ttt_lr * (1 + math.cos(math.pi * number / len(chunks))) / 2 * v
    return nats


SGD_LENGTHS = [30, 9, 40, 1, 130, 60, 2, 33, 1, 20]  # chunks of [3, 2, 1, 4] documents, the second of two steps


def test_chunks_are_scored_and_then_learnt_from():
    cfg, documents = ttt_config(SGD), random_documents(SGD_LENGTHS)
    stream = Stream(documents)
    found, still = adapt(documents, cfg), adapt(documents, dataclasses.replace(cfg, global_ttt_lr=0.0))
    wanted = slow_chunks(stream, cfg)
    first = stream.of(3).start
    assert largest(found[:first], still[:first]) < 1e-6 and largest(found[first:], still[first:]) > 0.1
    assert largest(found, wanted) < 1e-3


def test_sgd_lets_no_later_token_change_an_earlier_score():
    """Lengths kept: everything but the changed document's later targets and later chunks is equal to the bit."""
    cfg, documents = ttt_config(SGD), random_documents(SGD_LENGTHS)
    stream, changed = Stream(documents), other_values(documents, 4, 70)
    before, after = adapt(documents, cfg), adapt(changed, cfg)
    assert (
        np.array_equal(before[: stream.starts[4] + 69], after[: stream.starts[4] + 69])
        and (before[stream.starts[5] :] != after[stream.starts[5] :]).all()
    )


def sgd_on(rank: int, world: int, folder):
    cfg = ttt_config(SGD, rank=rank, local_rank=rank, world_size=world)
    group, stream = train_gpt.Ranks(cfg), Stream(random_documents(SGD_LENGTHS))
    ledger = stream.ledger()
    TestTimeTraining(scoring_pass(network(cfg), cfg, group, stream, ledger)).score()
    np.save(folder / f"sgd.{rank}.npy", ledger.nats)
    group.close()


def test_sgd_on_two_ranks_agrees(tmp_path):
    forked(sgd_on, 2, tmp_path)
    alone_nats = adapt(random_documents(SGD_LENGTHS), ttt_config(SGD))
    assert all(largest(np.load(tmp_path / f"sgd.{rank}.npy"), alone_nats) < 1e-3 for rank in range(2))


def test_sgd_that_runs_ahead_aborts(monkeypatch):
    monkeypatch.setattr(GlobalSGD, "learn", ahead(GlobalSGD.learn))
    assert failing(ttt_config(SGD), "not scored") == ["C3"]


# ---- the ledger ----


def failing(cfg, match: str):
    """A pass over the usual documents that must abort; its verdicts."""
    stream = Stream(random_documents(LENGTHS))
    ledger = stream.ledger()
    with pytest.raises(RuntimeError, match=match):
        TestTimeTraining(passing(cfg, stream, ledger=ledger)).score()
    return ledger.verdicts.failed()


def test_learning_before_scoring_aborts(monkeypatch):
    monkeypatch.setattr(train_gpt, "book", lambda *_: None)
    assert failing(ttt_config(), "not scored") == ["C3"]


def test_a_phase_that_runs_ahead_aborts(monkeypatch):
    monkeypatch.setattr(GlobalSGD, "learn", ahead(GlobalSGD.learn))
    assert failing(ttt_config(PHASES), "not scored") == ["C3"]


@pytest.mark.parametrize("copies, match", ((2, "twice"), (0, "targets were never scored")))
def test_a_batch_lost_or_dealt_twice_aborts(monkeypatch, copies, match):
    honest = train_gpt.deal_batches

    def wrong(*arguments):
        dealt = honest(*arguments)
        return [[*dealt[0][1:], *dealt[0][:1] * copies], *dealt[1:]]

    monkeypatch.setattr(train_gpt, "deal_batches", wrong)
    failing(ttt_config(), match)


class TwoRanks(train_gpt.Ranks):
    """all_reduce_ with what another rank has scored since the last merge, without a process group."""

    def __init__(self, *entries):
        self.rank, self.world, self.entries = (
            0,
            2,
            iter([e for nats in entries for e in (~np.isnan(nats), np.nan_to_num(nats))]),
        )

    def all_reduce_(self, t):
        return t.add_(torch.from_numpy(next(self.entries).astype(t.numpy().dtype)))


def test_ledgers_merge_segment_by_segment():
    nan = np.nan
    book = Ledger("test", np.ones(5, np.uint16), Verdicts())
    group = TwoRanks(np.array([nan, 1.5, nan, nan, nan]), np.array([nan, nan, nan, 3.5, 4.5]))
    book.write(np.array([0]), np.array([0.5]))
    book.merge(group)
    assert np.isnan(book.nats).tolist() == [False, False, True, True, True]
    book.write(np.array([2]), np.array([2.5]))
    book.merge(group)
    assert book.nats.tolist() == [0.5, 1.5, 2.5, 3.5, 4.5] and book.bpb() == pytest.approx(12.5 / 5 / math.log(2))
    part = Ledger("test", np.ones(5, np.uint16), Verdicts())  # only targets 1..4 travel
    part.write(np.array([0, 2]), np.array([9.0, 2.5]))
    part.merge(TwoRanks(np.array([1.5, nan, 3.5])), 1, 4)
    assert np.array_equal(part.nats, [9.0, 1.5, 2.5, 3.5, nan], equal_nan=True)
    assert part.merged.tolist() == [False, True, True, True, False]
    again = Ledger("test", np.ones(2, np.uint16), Verdicts())
    group = TwoRanks(np.array([nan, 1.5]), np.array([2.5, nan]))
    again.write(np.array([0]), np.array([0.5]))
    again.merge(group)
    with pytest.raises(RuntimeError, match="twice"):
        again.write(np.array([1]), np.ones(1))  # scored by the other rank
    with pytest.raises(RuntimeError, match="same target"):
        again.merge(group)  # the other rank scores what this one has already merged


# ---- masks ----


def leaves_after(cfg):
    stream = Stream(random_documents([40, 30]))
    batch = DocumentTTT(passing(dataclasses.replace(cfg, ttt_batch_size=2), stream, network(cfg)))
    batch.run(np.arange(2))
    return batch.lockstep.lora


@pytest.mark.parametrize("kind", ADAPTER_KINDS)
def test_each_kind_learns_alone_at_every_visit(kind):
    """All other kinds masked: they are gone, this one gets a gradient in A and B at every visit, and later scores
    move."""
    cfg = ttt_config(ttt_mask=",".join(k for k in ADAPTER_KINDS if k != kind))
    lora = leaves_after(cfg)
    assert set(lora.a) == set(lora.b) == {kind}
    start = new_lora(network(cfg), 2, frozenset(), cfg.ttt_lora_rank, cfg.ttt_lora_alpha, cfg.seed)
    shrunk = (
        1 - cfg.ttt_lora_lr * cfg.ttt_weight_decay
    ) ** 4  # what A would be times with no gradient: 4 updates in 40 positions
    for a, b, first in zip(lora.a[kind], lora.b[kind], start.a[kind]):
        assert b.flatten(1).any(1).all() and ((a - shrunk * first).abs().flatten(1).amax(1) > 1e-3).all()
    documents = random_documents([40, 30])
    still, learning = (adapt(documents, dataclasses.replace(cfg, ttt_lora_lr=lr)) for lr in (0.0, cfg.ttt_lora_lr))
    assert np.array_equal(still[:4], learning[:4]) and largest(still[8:40], learning[8:40]) > 1e-4


@pytest.mark.parametrize("kind", ADAPTER_KINDS)
def test_a_masked_kind_is_gone(kind):
    """As if its B had stayed zero: every other kind learns on, and scores differ from those with all kinds on."""
    masked, every = ttt_config(ttt_mask=kind), ttt_config()
    assert set(leaves_after(masked).a) == set(ADAPTER_KINDS) - {kind} and set(leaves_after(every).a) == set(
        ADAPTER_KINDS
    )
    documents = random_documents([40, 30])
    found = adapt(documents, masked)
    assert largest(found, adapt(documents, every)) > 1e-4
    stream = Stream(documents)
    assert largest(found[stream.of(0)], slow_document(network(masked), document(stream, 0), masked)) < 1e-5


def test_no_qv_masks_q_and_v():
    assert set(leaves_after(ttt_config(ttt_mask="no_qv")).a) == {"k", "o", "mlp", "head"}
    documents = random_documents([40, 30])
    assert np.array_equal(*(adapt(documents, ttt_config(ttt_mask=mask)) for mask in ("no_qv", "q,v")))


def test_every_kind_masked_is_refused():
    """Nothing is left to learn: refused."""
    for mask in (",".join(ADAPTER_KINDS), "no_qv,k,o,mlp,head"):
        with pytest.raises(train_gpt.UserError, match="TTT_MASK"):
            ttt_config(ttt_mask=mask)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=20),
    sizes=st.lists(st.integers(1, 20), min_size=1, max_size=4),
    back=st.integers(0, 400),
    context=st.integers(20, 200),
    rows=st.integers(1, 64),
    exact=st.booleans(),
)
def test_lockstep_covers_every_position_within_the_context(lengths, sizes, back, context, rows, exact):
    cfg = ttt_config(
        ttt_chunks=",".join(map(str, sizes)),
        ttt_backprop_tokens=back,
        ttt_eval_seq_len=context,
        ttt_batch_size=max(rows, len(lengths)),
    )
    lengths, at = np.sort(lengths)[::-1], 0
    for begin, shape in train_gpt.plan_lockstep(lengths, cfg, exact):
        assert begin == at
        assert (lengths > begin).sum() <= shape.rows <= cfg.ttt_batch_size
        reach = min(begin, context - shape.count)  # what the window holds before the chunk
        run = min(reach, back)
        assert (
            shape.back >= run
            and shape.back <= max(context - shape.count, 0)
            and shape.older + shape.back >= reach
            and shape.older + shape.back + shape.count <= context
        )
        if exact:
            assert (shape.rows, shape.back, shape.older) == ((lengths > begin).sum(), run, reach - run)
        at = begin + shape.count
    assert at >= lengths[0]


@every_mode
@pytest.mark.parametrize("phases", (0, 2))
def test_the_shapes_of_a_gpu_give_the_same_scores(monkeypatch, mode, phases):
    """Rows, keys and rerun tokens rounded up to powers of two, as CUDA graphs need it: what is added is never seen."""
    documents, cfg = (
        random_documents(LENGTHS),
        ttt_config(PHASES, phased_ttt_num_phases=phases, ttt_batch_size=8, ttt_weight_decay=0.5, **MODES[mode]),
    )
    plain, lockstep, seen = adapt(documents, cfg), train_gpt.plan_lockstep, set()

    def rounded(lengths, cfg, exact):
        for begin, shape in lockstep(lengths, cfg, False):
            seen.add(shape)
            yield begin, shape

    monkeypatch.setattr(train_gpt, "plan_lockstep", rounded)
    assert largest(plain, adapt(documents, cfg)) < 1e-5 and all(shape.rows == 8 for shape in seen)


# ---- CUDA graphs, on a CPU ----


class Recorded:
    """torch.cuda.CUDAGraph on a CPU: replay() runs the recorded operations again, into the memory of their first
    results."""

    def __init__(self):
        self.operations = []

    def replay(self):
        with torch.no_grad():
            for function, arguments, keywords, results in self.operations:
                again = function(*arguments, **keywords)
                for old, new in zip(tree_leaves(results), tree_leaves(again)):
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


class Recording(TorchDispatchMode):
    """torch.cuda.graph on a CPU."""

    def __init__(self, graph: Recorded, pool):
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        results = function(*arguments, **(keywords or {}))
        self.graph.operations.append((function, arguments, keywords or {}, results))
        return results


def masked_attend(q, k, v, seq, window, backend):
    """Attention by one mask over all sequences, with no look at the values of cu_q and cu_k: what a graph can hold."""
    queries, keys = (torch.arange(len(t)) for t in (q, k))
    of_query = torch.searchsorted(seq.cu_q, queries.int(), right=True)
    of_key = torch.searchsorted(seq.cu_k, keys.int(), right=True)
    back = (seq.cu_q[of_query] - queries)[:, None] - (seq.cu_k[of_key] - keys)[None]  # both counted from the end
    seen = (of_query[:, None] == of_key) & (back <= 0) & ((-back <= window) if window >= 0 else torch.tensor(True))
    group = q.size(1) // k.size(1)
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("ihd,jhd->hij", q, k) / math.sqrt(q.size(2))
    return torch.einsum("hij,jhd->ihd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


@pytest.mark.parametrize("mode, ngrams", (("cached", True), ("partial", False)))
def test_replayed_graphs_give_the_same_scores(monkeypatch, mode, ngrams):
    """Every batch through graphs that were captured on other tokens: all that a step reads lies in static memory."""
    for name, stand_in in (
        ("graph_pool_handle", lambda: None),
        ("Stream", lambda: None),
        ("stream", lambda stream: contextlib.nullcontext()),
        ("synchronize", lambda: None),
        ("CUDAGraph", Recorded),
        ("graph", Recording),
    ):
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(train_gpt, "attend", masked_attend)
    documents = random_documents([9, 40, 1, 30, 2])
    cfg = ttt_config(PHASES, ttt_batch_size=8, ttt_chunks="4,16", ngram_enabled=ngrams, **MODES[mode])
    cfg = dataclasses.replace(cfg, phased_ttt_num_phases=1, phased_ttt_prefix_docs=3)
    plain = adapt(documents, cfg)
    scoring = passing(cfg, Stream(documents))
    adaptation = TestTimeTraining(scoring)
    adapted = adaptation.strategy.documents
    tokens = adapted.lockstep.tokens.clone()
    lockstep = train_gpt.plan_lockstep
    monkeypatch.setattr(train_gpt, "plan_lockstep", lambda lengths, cfg, exact: lockstep(lengths, cfg, False))
    adapted.capture([batch for batches in adaptation.strategy.batches for batch in batches])
    assert torch.equal(adapted.lockstep.tokens, tokens)
    called = []
    monkeypatch.setattr(
        GlobalSGD, "learn", lambda self, *rest, learn=GlobalSGD.learn: called.append(learn(self, *rest))
    )
    adaptation.score()
    assert len(adapted.graphs) >= 2 and len(called) == 1
    assert largest(plain, scoring.ledger.nats) < 1e-5
    adapted.graphs = {train_gpt.Shape(8, 0, 0, 5): None}
    with pytest.raises(KeyError):
        adapted.run(np.arange(5))


def test_adapters_of_a_later_segment_begin_at_the_mean_of_earlier_ones():
    """By hand: each document's adapters after its last chunk, weighed by its tokens up to a context; the start moves
    there from segment to segment."""
    cfg = ttt_config(segment_docs=4, ttt_warm_start=0.5, ttt_eval_seq_len=32, ttt_batch_size=2)
    model, stream = network(cfg), Stream(random_documents(LENGTHS))
    documents = DocumentTTT(passing(cfg, stream, model))
    adapted = documents.lockstep
    start = [t.clone() for t in adapted.start]
    total, weights = [torch.zeros_like(t) for t in start], 0.0
    for i in range(4):
        documents.run(np.array([i]))
        weight = min(LENGTHS[i], 32)
        for t, p in zip(total, adapted.lora.leaves()):
            t += weight * p[:1].detach()
        weights += weight
    documents.next_segment()
    assert weights and any(t.abs().max() > 1e-4 for t in adapted.start[len(adapted.start) // 2 :])  # B has left zero
    for t, first, mean in zip(adapted.start, start, total):
        assert largest(t, first + 0.5 * (mean / weights - first)) < 1e-6
    cold, warm = (adapt(random_documents(LENGTHS), dataclasses.replace(cfg, ttt_warm_start=w)) for w in (0.0, 0.5))
    end = sum(LENGTHS[:4])
    assert np.array_equal(cold[:end], warm[:end]) and (cold[end:] != warm[end:]).mean() > 0.9


# ---- runs ----

STORED = {
    **RUN,
    "iterations": 4,
    "ttt_eval_seq_len": 48,
    "ttt_chunks": "4,4,8,16",
    "ttt_lora_rank": 4,
    "ttt_batch_size": 3,
    "ttt_lora_lr": 0.0003,
    "phased_ttt_num_phases": 2,
    "phased_ttt_prefix_docs": 6,
    "segment_docs": 4,
    "global_ttt_chunk_tokens": 64,
}


@pytest.fixture(scope="module")
def shipped():
    folder = scratch() / "ttt"
    main({**STORED, "ledger_path": scratch() / "ttt.npy"}, folder).ok()
    return folder


def rescore(shipped, folder, **options):
    folder.mkdir()
    for name in ("train_gpt.py", "model.bin"):
        shutil.copy(shipped / name, folder)
    settings = {"ttt_eval_only": True, "ledger_path": folder / "ledger.npy", "data_path": data()}
    (spawn(settings, folder, **options) if options else main(settings, folder)).ok()
    return result(folder, "eval_result.json"), np.load(folder / "ledger.npy")


def test_the_headline_is_the_adapted_pass(shipped):
    found, nats = result(shipped), np.load(scratch() / "ttt.npy")
    assert (
        found["val_bpb"] == found["bpb"]["adapted"] != found["bpb"]["quantized"]
        and found["seconds"]["eval"] >= found["seconds"]["adapt"] > 0
    )
    assert len(nats) == found["data"]["val_targets"] and np.isfinite(nats).all()
    log = (shipped / "train.log").read_text()
    assert "scoring adapted: 5 segment(s) of [3, 1, 2, 2, 2] documents" in log
    assert log.count("base weights learnt from") == 2
    times = found["adapt_seconds"]
    assert times["estimated"] > 0 and times["measured"] == found["seconds"]["adapt"]
    assert f"about {times['estimated']:.1f} s, by" in log and f"{times['estimated']:.1f} s by estimate" in log


def test_a_run_that_would_not_end_in_time_is_refused(shipped, tmp_path, monkeypatch):
    """One line, no result; the files that were there stay."""
    for name in ("train_gpt.py", "model.bin"):
        shutil.copy(shipped / name, tmp_path)
    monkeypatch.setattr(DocumentTTT, "step_seconds", lambda self, shape: 1e3)
    late = main({"ttt_eval_only": True, "max_wallclock_seconds": 500, "gptq_reserve_seconds": 0}, tmp_path)
    assert late.code == 2 and late.err.count("\n") == 1
    assert late.err.startswith("error: MAX_WALLCLOCK_SECONDS=500 leaves ") and "set TTT_ENABLED=0, or " in late.err
    assert not (tmp_path / "eval_result.json").exists() and (tmp_path / "model.bin").exists()


def test_a_rerun_of_the_artifact_gives_the_same_number(shipped, tmp_path):
    """Its settings lie in model.bin: nothing else is said, and the last digit agrees."""
    found, nats = rescore(shipped, tmp_path / "rerun")
    assert (
        found["val_bpb"] == result(shipped)["val_bpb"]
        and found["bpb"]["quantized"] == result(shipped)["bpb"]["quantized"]
    )
    assert np.array_equal(nats, np.load(scratch() / "ttt.npy"))
    assert found["settings_sha256"] == result(shipped)["settings_sha256"]


def test_a_rerun_on_two_ranks_agrees(shipped, tmp_path):
    """Through torchrun, as users start it."""
    found, nats = rescore(shipped, tmp_path / "two", world=2)
    assert (
        found["val_bpb"] == pytest.approx(result(shipped)["val_bpb"], abs=1e-5)
        and largest(nats, np.load(scratch() / "ttt.npy")) < 1e-3
    )
