"""N-grams: exact counts of earlier segments and the document's own prefix, as a plain dictionary would find them, and
probabilities that still sum to one."""

import dataclasses

import numpy as np
import pytest
import torch
from helpers import BOS, RUN, TINY, Stream, config, forked, main, network, ranks, result, scoring_pass
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt
from train_gpt import Runs, TestTimeTraining, continuations, plan_segments, score_stream

TestTimeTraining.__test__ = False
VOCAB = 12
# Repetitive text, adaptation far above float noise, several segments, and thresholds that let many orders through.
BASE = dict(
    TINY,
    vocab_size=VOCAB,
    eval_seq_len=32,
    val_batch_tokens=96,
    ttt_eval_seq_len=128,
    ttt_chunks="4,4,8,16",
    ttt_lora_rank=4,
    ttt_lora_alpha=8.0,
    ttt_lora_lr=0.01,
    ttt_batch_size=4,
    phased_ttt_num_phases=0,
    global_ttt_chunk_tokens=24,
    global_ttt_lr=0.01,
    segment_docs=3,
    ngram_enabled=True,
    ngram_order=6,
    ngram_min_order=2,
    ngram_min_count=1,
)
WAYS = {
    "windows": dict(ttt_enabled=False),
    "windows, stride": dict(ttt_enabled=False, eval_stride=8),
    "cached": dict(ttt_backprop_tokens=0),
    "exact": dict(ttt_backprop_tokens=10**6),
    "phases": dict(phased_ttt_num_phases=2, phased_ttt_prefix_docs=6),
}
SETS = {"weak": dict(), "strong": dict(ngram_boost=2.625)}
every_way = pytest.mark.parametrize("way", WAYS)
every_set = pytest.mark.parametrize("kind", SETS)


def repetitive(lengths, vocab: int = VOCAB, seed: int = 0) -> list[np.ndarray]:
    """Documents that mostly copy a stretch of their own or of an earlier document."""
    rng, past = np.random.default_rng(seed), np.arange(2, vocab)
    documents = []
    for length in lengths:
        words = [BOS]
        while len(words) < length:
            at = int(rng.integers(len(past)))
            words += (
                past[at : at + int(rng.integers(1, 9))].tolist()
                if rng.random() < 0.8
                else [int(rng.integers(2, vocab))]
            )
        documents.append(np.array(words[:length], np.int64))
        past = np.concatenate([past, documents[-1][1:]])
    return documents


LENGTHS = [30, 9, 40, 1, 30, 60, 2, 33, 1, 20]


def counted(documents, sizes, orders: int, vocab: int = VOCAB) -> dict:
    """(order, target) -> (hint, top, total), hint None where nothing was seen."""
    stream, table = Stream(documents), {}
    document = np.repeat(np.arange(len(documents)), [len(d) for d in documents])[:-1]
    segment = np.repeat(np.arange(len(sizes)), sizes)[document]
    as_tensor = lambda a: torch.from_numpy(a.astype(np.int32))
    for found in continuations(as_tensor(stream.tokens), as_tensor(document), as_tensor(segment), orders, vocab):
        for target, hint, top, total in zip(*(t.tolist() for t in found[1:])):
            table[found.order, target] = (hint if total else None, top, total)
    return {
        (order, target): table.get((order, target), (None, 0, 0))
        for order in range(2, orders + 1)
        for target in range(stream.targets)
    }


class Context:
    """A dictionary of continuations and the incumbent: the token that reached the highest count first."""

    def __init__(self):
        self.counts, self.hint, self.top = {}, None, 0

    def copy(self):
        other = Context()
        other.counts, other.hint, other.top = dict(self.counts), self.hint, self.top
        return other

    def add(self, token):
        self.counts[token] = self.counts.get(token, 0) + 1
        if self.counts[token] > self.top:
            self.hint, self.top = token, self.counts[token]


def slow(documents, sizes, orders: int) -> dict:
    """counted(), one token after the other: what a document sees is a copy of the earlier segments' dictionary that it
    alone extends."""
    stream, table, frozen = Stream(documents), {}, {}
    borders = np.cumsum([0, *sizes])
    for first, last in zip(borders, borders[1:]):
        events = []
        for i in range(first, last):
            own, span = {}, stream.of(i)
            for target in range(span.start, span.stop):
                for order in range(2, min(orders, target - span.start + 2) + 1):
                    key, token = (
                        tuple(stream.tokens[target - order + 2 : target + 1].tolist()),
                        int(stream.tokens[target + 1]),
                    )
                    state = own.setdefault(key, frozen.get(key, Context()).copy())
                    table[order, target] = (state.hint, state.top, sum(state.counts.values()))
                    state.add(token)
                    events.append((key, token))
        for key, token in events:
            frozen.setdefault(key, Context()).add(token)
    return {
        (order, target): table.get((order, target), (None, 0, 0))
        for order in range(2, orders + 1)
        for target in range(stream.targets)
    }


# ---- counts ----


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_counts_equal_a_dictionary(data):
    lengths = data.draw(st.lists(st.integers(1, 50), min_size=1, max_size=9).filter(lambda lengths: sum(lengths) > 1))
    vocab, orders = data.draw(st.integers(3, 12)), data.draw(st.integers(2, 9))
    cuts = sorted(data.draw(st.sets(st.integers(1, len(lengths)))) | {len(lengths)})
    documents = repetitive(lengths, vocab, data.draw(st.integers(0, 1000)))
    sizes = np.diff([0, *cuts]).tolist()
    assert counted(documents, sizes, orders, vocab) == slow(documents, sizes, orders)


def test_long_repeats_reach_the_longest_order():
    """Two documents of a segment each, the second a copy of the first: from its second token on, every order knows the
    next one."""
    text = np.concatenate([[BOS], np.random.default_rng(0).permutation(np.arange(2, 40))])
    found, last = counted([text, text], [1, 1], 16, 40), len(text) - 1
    for order in range(2, 17):
        assert all(
            found[order, target] == (int(text[target + 1 - len(text)]), 1, 1)
            for target in range(len(text) + order - 2, len(text) + last)
        )
    assert all(found[order, target][2] == 0 for order in range(2, 17) for target in range(len(text)))


WORKED = [np.array([BOS, 5, 6, 5, 7]), np.array([BOS, 5, 6])]  # the eight tokens in the docstring of continuations()


def test_the_worked_example():
    """Its sorted list, what Runs counts there, and the hints; in one segment the second document sees nothing of the
    first."""
    as_tensor = lambda *values: torch.tensor(values, dtype=torch.int32)
    tokens, document, context = as_tensor(1, 5, 6, 5, 7, 1, 5, 6), as_tensor(0, 0, 0, 0, 0, 1, 1), [1, 1, 5, 5, 5]
    first, *_ = continuations(tokens, document, document, 3, 8)
    assert first.order == 2 and first.targets.tolist() == [0, 5, 1, 3, 6]
    assert tokens[first.targets].tolist() == context and tokens[first.targets + 1].tolist() == [5, 5, 6, 7, 6]
    assert first.total.tolist() == [0, 1, 0, 1, 2] and first.top.tolist() == [0, 1, 0, 1, 1]
    assert first.hint[first.total > 0].tolist() == [5, 6, 6]
    runs = Runs.of(as_tensor(*context), as_tensor(0, 1, 0, 0, 1), as_tensor(0, 1, 0, 0, 1))
    assert [t.tolist() for t in runs] == [[0, 0, 2, 2, 2], [0, 1, 2, 2, 4], [0, 1, 2, 2, 4]]
    assert runs.seen_before(torch.arange(5)).tolist() == [0, 1, 0, 1, 2]
    together = counted(WORKED, [2], 2, 8)
    assert counted(WORKED, [1, 1], 2, 8)[2, 6] == (6, 1, 2) and together[2, 6] == (None, 0, 0)
    assert together[2, 3] == (6, 1, 1)


def test_documents_of_a_segment_do_not_see_each_other():
    text = np.array([BOS, 5, 6, 7, 5, 6, 7])
    together, apart = (counted([text, text], sizes, 4) for sizes in ([2], [1, 1]))
    assert together[3, 2][2] == together[3, 9][2] == 0 and together[3, 5] == together[3, 12] == (7, 1, 1)
    assert apart[3, 9] == (7, 2, 2) and apart[3, 12] == (7, 3, 3)


def test_contexts_end_at_bos():
    """The same two tokens around a border: no context spans it, so nothing is known of what follows there."""
    found = counted(
        [np.array([BOS, 4, 5]), np.array([BOS, 6]), np.array([BOS, 4, 5]), np.array([BOS, 6, 7])], [1, 1, 1, 1], 5
    )
    assert found[2, 8] == (4, 2, 3)  # BOS was followed by 4 twice and 6 once
    assert all(found[order, 8][2] == 0 for order in (3, 4, 5))  # "5 BOS -> 6" is no trigram, although it occurred
    assert found[2, 7] == (BOS, 1, 1) and found[4, 7] == (BOS, 1, 1)  # the end of a document is a continuation


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.data())
def test_no_count_sees_its_target_or_later_tokens(seed, data):
    """A token replaced: all that is known at earlier targets of the document, at its own target and in other documents
    of the segment stays."""
    documents, sizes = repetitive([30, 25, 40, 20], seed=seed), [1, 2, 1]
    which, stream = data.draw(st.integers(0, 2)), Stream(documents)
    at = data.draw(st.integers(1, len(documents[which]) - 1))
    changed = [d.copy() for d in documents]
    changed[which][at:] = 2 + (changed[which][at:] - 2 + data.draw(st.integers(1, VOCAB - 3))) % (VOCAB - 2)
    before, after = counted(documents, sizes, 6), counted(changed, sizes, 6)
    kept = [
        t
        for i in range(3)
        for t in range(stream.of(i).start, stream.of(i).stop)
        if i < which or (i == which and t < stream.starts[which] + at) or ({i, which} == {1, 2} and i != which)
    ]
    assert all(before[order, t] == after[order, t] for order in range(2, 7) for t in kept)
    assert (
        any(before[order, t] != after[order, t] for order in range(2, 7) for t in range(stream.targets))
        or at == len(documents[which]) - 1
    )


@pytest.mark.parametrize("n", (1, 2, 3, 10, 101))
def test_running_max(n):
    x = torch.from_numpy(np.random.default_rng(n).integers(0, 50, n))
    assert torch.equal(train_gpt.running_max(x), x.cummax(0).values)


# ---- scores ----


def score(documents, cfg, group=None) -> np.ndarray:
    """Nats of every target."""
    stream = Stream(documents)
    ledger = stream.ledger()
    scoring = scoring_pass(network(cfg), cfg, group or ranks(cfg), stream, ledger)
    TestTimeTraining(scoring).score()
    return ledger.nats


def all_logprobs(documents, cfg) -> np.ndarray:
    """The network's log-probability of every token after every position (targets, VOCAB), one document at a time."""
    model, rows = network(cfg), []
    stream = Stream(documents)
    for i in range(len(documents)):
        tokens = torch.from_numpy(stream.tokens[stream.of(i)].astype(np.int64))
        if len(tokens):
            cu = torch.tensor([0, len(tokens)], dtype=torch.int32)
            hidden = model.trunk(
                tokens,
                train_gpt.Seq(cu, cu, len(tokens), len(tokens), torch.arange(len(tokens), dtype=torch.int32)),
                looped=True,
            )
            rows.append(-torch.stack([model.nll(hidden, torch.full_like(tokens, x)).nats for x in range(VOCAB)], 1))
    return torch.cat(rows).detach().double().numpy()


def longest(documents, cfg) -> dict[int, tuple[int, int]]:
    """target -> (order, hint) of the longest order that clears, from the slow counts."""
    found = {}
    for (order, target), (hint, top, total, *_) in sorted(
        slow(documents, [s.last - s.first for s in plan_segments(documents, cfg)], cfg.ngram_order).items()
    ):
        if order >= cfg.ngram_min_order and total >= cfg.ngram_min_count and top / total >= cfg.ngram_threshold:
            found[target] = order, hint
    return found


def test_the_tilt_is_what_it_says():
    """p e^(b [x = h]) over its sum, written out over the vocabulary; targets without a hint keep the network's nats to
    the bit."""
    cfg, documents = (
        config(BASE, ttt_enabled=False, eval_seq_len=96, ngram_boost=1.7, ngram_threshold=0.6),
        repetitive(LENGTHS),
    )
    stream, logp, found, plain = (
        Stream(documents),
        all_logprobs(documents, cfg),
        score(documents, cfg),
        score(documents, dataclasses.replace(cfg, ngram_enabled=False)),
    )
    hints = longest(documents, cfg)
    for target, (_, hint) in hints.items():
        tilted = logp[target] + 1.7 * (np.arange(VOCAB) == hint)
        assert found[target] == pytest.approx(
            np.log(np.exp(tilted).sum()) - tilted[stream.tokens[target + 1]], abs=1e-5
        )
    bare = np.setdiff1d(np.arange(stream.targets), [*hints])
    assert 0.2 < len(hints) / stream.targets < 0.95 and np.abs(found[bare] - plain[bare]).max() < 1e-6


@every_set
@every_way
def test_probabilities_sum_to_one(way, kind):
    """Two prefixes before every token of the vocabulary, BOS as the next document's, after a segment that has filled
    the tables.

    The prefixes fit one window: where a later window begins depends on where its document ends.
    """
    documents, ends = repetitive([40, 50, 60]), {}
    for length in (25, 33):
        prefix = repetitive([length], seed=length)[0]
        ends[length] = len(documents) + np.arange(VOCAB)
        documents += [prefix, *(np.append(prefix, token) for token in range(VOCAB) if token != BOS)]
    for i in range(3, 3 + 2 * VOCAB):  # prefixes that have been seen to go on
        documents[1][10 + i % 7] = documents[3][-1]
    cfg = config(
        BASE,
        **{**WAYS[way], **SETS[kind], "segment_docs": 100, "phased_ttt_num_phases": 1, "phased_ttt_prefix_docs": 3},
        eval_seq_len=64,
    )
    stream = Stream(documents)
    plain, found = (score(documents, dataclasses.replace(cfg, ngram_enabled=on)) for on in (False, True))
    for length, which in ends.items():
        at = stream.starts[which] + length - 1
        p, q = np.exp(-found[at]), np.exp(-plain[at])
        assert p.sum() == pytest.approx(1, abs=1e-5) and q.sum() == pytest.approx(1, abs=1e-5) and p.min() > 0
        assert np.abs(p - q).max() > 1e-2  # the n-grams were not in vain


@every_set
@every_way
def test_later_tokens_change_no_earlier_score(way, kind):
    """Lengths kept, values replaced: earlier scores of the document, of the others in its segment and of earlier
    segments are equal to the bit."""
    cfg, documents = config(BASE, **WAYS[way], **SETS[kind]), repetitive(LENGTHS)
    changed, stream = [d.copy() for d in documents], Stream(documents)
    changed[5][24:] = 2 + (changed[5][24:] - 1) % (VOCAB - 2)
    before, after = score(documents, cfg), score(changed, cfg)
    same = np.ones(stream.targets, bool)
    same[stream.starts[5] + 23 : stream.of(5).stop] = False
    same[stream.starts[6] :] = False  # later segments may have learnt from it
    assert np.array_equal(before[same], after[same]) and (before[~same] != after[~same]).any()


def score_on(rank: int, world: int, folder, way: str, kind: str):
    cfg = config(BASE, **WAYS[way], **SETS[kind], rank=rank, local_rank=rank, world_size=world)
    group = train_gpt.Ranks(cfg)
    nats = score(repetitive(LENGTHS), cfg, group)
    np.save(folder / f"{world}.{rank}.npy", nats)
    group.close()


@pytest.mark.parametrize(
    "way, kind", (("windows, stride", "weak"), ("cached", "weak"), ("phases", "weak"), ("cached", "strong"))
)
def test_ranks_change_float_noise_only(way, kind, tmp_path):
    forked(score_on, 2, tmp_path, way, kind)
    alone = score(repetitive(LENGTHS), config(BASE, **WAYS[way], **SETS[kind]))
    assert all(np.abs(np.load(tmp_path / f"2.{rank}.npy") - alone).max() < 1e-5 for rank in range(2))


def test_n_grams_help_on_repetition():
    documents = repetitive([60] * 12)
    for kind in SETS.values():
        cfg = config(BASE, ttt_enabled=False, ngram_min_order=3, ngram_threshold=0.6, **kind)
        assert score(documents, cfg).sum() < score(documents, dataclasses.replace(cfg, ngram_enabled=False)).sum() - 20


# ---- runs ----


def test_the_headline_has_n_grams_and_the_diagnostics_have_not(tmp_path):
    """TTT off: "quantized" is the network alone, "adapted" the network with n-grams; the tables are counted from the
    first segment on."""
    run = {**RUN, "iterations": 3, "ttt_enabled": False, "segment_docs": 3, "ngram_enabled": True, "ngram_min_order": 2}
    main(run, tmp_path).ok()
    found = result(tmp_path)
    assert found["val_bpb"] == found["bpb"]["adapted"] < found["bpb"]["quantized"]
    assert "n-grams of order 2..16: hints at" in (tmp_path / "train.log").read_text()
    main({**run, "ngram_enabled": False, "ttt_eval_only": True}, tmp_path).ok()
    assert result(tmp_path, "eval_result.json")["val_bpb"] == found["bpb"]["quantized"]


def test_hints_are_off_unless_asked_for():
    assert not train_gpt.Config().ngram_enabled
    for name, value in (
        ("order", 1),
        ("order", 65),
        ("min_order", 1),
        ("min_order", 17),
        ("threshold", 1.5),
        ("min_count", 0),
        ("boost", 13.0),
    ):
        with pytest.raises(train_gpt.UserError, match=f"NGRAM_{name.upper()}="):
            config({"ngram_" + name: value})


@pytest.mark.parametrize("stride", (0, 8))
def test_the_scorer_asks_for_hints_where_it_scores(stride):
    """The windows' own check: with a boost of zero, n-grams change nothing at all."""
    cfg, documents = (
        config(BASE, ttt_enabled=False, eval_stride=stride, ngram_boost=0.0),
        repetitive(LENGTHS),
    )
    stream = Stream(documents)
    ledger = stream.ledger()
    score_stream(scoring_pass(network(cfg), cfg, ranks(cfg), stream, ledger))
    assert np.abs(ledger.nats - score(documents, cfg)).max() < 1e-5
