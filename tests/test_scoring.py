"""Scoring: every target once, with the context the plan promises, against a slow one-window-at-a-time scorer; and a
ledger that cannot be cheated."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from helpers import BOS, base_run, config, data, gpt, random_documents, ranks, result, scoring_pass, scratch
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt
from train_gpt import Ledger, ValidationStream, Verdicts, plan_windows, score_stream


class Stream:
    """A validation stream in memory."""

    def __init__(self, documents):
        self.tokens = np.concatenate(documents).astype(np.uint16)
        self.starts = np.flatnonzero(self.tokens == BOS)
        self.targets = len(self.tokens) - 1
        self.bytes = np.where(self.tokens == BOS, 0, self.tokens % 5 + 1).astype(np.uint16)
        self.target_bytes = self.bytes[1:]


def ledger_of(stream) -> Ledger:
    return Ledger("test", stream.target_bytes, Verdicts())


def score(model, stream, cfg, stride: int) -> tuple[float, np.ndarray]:
    ledger = ledger_of(stream)
    cfg = dataclasses.replace(cfg, eval_stride=stride)
    bpb = score_stream(scoring_pass(model, cfg, ranks(cfg), stream, ledger))
    return bpb, ledger.nats


# ---- the plan ----


def test_windows_of_the_docstring():
    """A document of 7 tokens behind one of 2, windows of 4 tokens, 2 of them new."""
    windows = plan_windows(np.array([0, 2]), 9, 4, 2)
    assert windows.tolist() == [[0, 0, 2], [2, 2, 6], [4, 6, 8], [6, 8, 9]]


documents_and_windows = given(
    lengths=st.lists(st.integers(1, 70), min_size=1, max_size=12), seq_len=st.integers(1, 40), data=st.data()
)


@settings(max_examples=200, deadline=None)
@documents_and_windows
def test_every_target_once_in_its_own_document(lengths, seq_len, data):
    """Each position is scored once; its window lies in its document, is no longer than seq_len, and gives seq_len -
    stride tokens of context, wherever the document ends."""
    stride = data.draw(st.integers(1, seq_len))
    starts = np.cumsum([0, *lengths[:-1]])
    inputs = sum(lengths) - 1
    document = np.repeat(starts, lengths)
    windows = plan_windows(starts, inputs, seq_len, stride)
    scored = np.concatenate([np.arange(first, end) for _, first, end in windows]) if len(windows) else np.array([], int)
    assert scored.tolist() == list(range(inputs))
    for begin, first, end in windows:
        start = document[begin]
        assert start <= begin <= first < end <= inputs and document[end - 1] == start
        assert end - begin <= seq_len and begin == max(
            start, min(first, first + stride - seq_len) if first > start else start
        )
        assert end - first <= stride or begin == first == start


@settings(max_examples=100, deadline=None)
@documents_and_windows
def test_buffers_hold_all_windows_in_order(lengths, seq_len, data):
    capacity = data.draw(st.integers(seq_len, 3 * seq_len))
    windows = plan_windows(np.cumsum([0, *lengths[:-1]]), sum(lengths) - 1, seq_len, data.draw(st.integers(1, seq_len)))
    buffers = train_gpt.group_windows(windows, capacity)
    assert np.array_equal(np.concatenate([np.empty((0, 3), int), *buffers]), windows)
    assert all(0 < (b[:, 2] - b[:, 0]).sum() <= capacity for b in buffers)


# ---- scores ----

LENGTHS = [1, 30, 2, 17, 90, 16, 33, 5, 1, 48]


def one_at_a_time(model, stream, seq_len: int, stride: int) -> np.ndarray:
    """Nats of every target from windows worked out position by position, one forward each."""
    nats = np.full(stream.targets, np.nan)
    bounds = [*stream.starts.tolist(), len(stream.tokens)]
    for start, stop in zip(bounds, bounds[1:]):
        for position in range(start, min(stop, stream.targets)):
            inside = position - start
            reach = (
                seq_len if inside < seq_len else seq_len + ((inside - seq_len) // stride + 1) * stride
            )  # where the window that first sees it ends
            begin, end = start + reach - seq_len, min(start + reach, stop, stream.targets)
            tokens = torch.from_numpy(stream.tokens[begin:end].astype(np.int64))
            n = len(tokens)
            cu = torch.tensor([0, n], dtype=torch.int32)
            hidden = model.trunk(tokens, train_gpt.Seq(cu, cu, n, n, torch.arange(n, dtype=torch.int32)), looped=True)
            target = torch.tensor([int(stream.tokens[position + 1])])
            nats[position] = model.nll(hidden[position - begin][None], target).nats.item()
    return nats


@pytest.mark.parametrize("stride", (0, 16, 5, 1))
def test_scores_equal_one_window_at_a_time(stride):
    cfg = config(eval_seq_len=16, val_batch_tokens=64)
    model, stream = gpt(cfg), Stream(random_documents(LENGTHS))
    with torch.no_grad():
        wanted = one_at_a_time(model, stream, 16, stride or 16)
    bpb, nats = score(model, stream, cfg, stride)
    assert np.abs(nats - wanted).max() < 1e-3
    assert bpb == pytest.approx(wanted.sum() / math.log(2) / stream.bytes[1:].sum(dtype=int), rel=1e-6)


def test_more_context_scores_better_on_repetition(tmp_path):
    """A trained model on the shared data: a small stride is never much worse than windows that do not overlap."""
    arrays, meta = train_gpt.load_artifact(base_run() / "model.bin")
    cfg = train_gpt.Config.from_env({"DATA_PATH": str(data()), "DEVICE": "cpu"}, stored=meta["settings"])
    model = train_gpt.GPT(cfg, "reference", torch.float32)
    train_gpt.load_state(model, train_gpt.unflatten(arrays).state(), base_run() / "model.bin")
    val = ValidationStream(cfg)
    apart, close = (score(model, val, cfg, stride)[0] for stride in (0, 8))
    assert close < apart + 1e-3 and close != apart


def test_buffers_do_not_change_scores():
    """The same targets in forwards of other sizes: windows are independent of what they are packed with."""
    stream, found = Stream(random_documents(LENGTHS)), []
    for capacity in (16, 37, 300):
        cfg = config(eval_seq_len=16, val_batch_tokens=capacity)
        found.append(score(gpt(cfg), stream, cfg, 4)[1])
    assert np.abs(found[0] - found[1]).max() < 1e-4 and np.abs(found[0] - found[2]).max() < 1e-4


@pytest.mark.parametrize("stride", (0, 3))
def test_later_tokens_and_other_documents_change_no_score(stride):
    """Lengths kept, values replaced: earlier scores of the document and all of the other documents' are equal to the
    bit."""
    cfg = config(eval_seq_len=16, val_batch_tokens=64)
    model, documents = gpt(cfg), random_documents(LENGTHS)
    before = score(model, Stream(documents), cfg, stride)[1]
    poisoned = [d.copy() for d in documents]
    poisoned[4][40:] = random_documents([51], seed=5)[0][1:]
    after = score(model, Stream(poisoned), cfg, stride)[1]
    first = sum(LENGTHS[:4]) + 39  # the target at position 39 of the document is its token 40
    last = sum(LENGTHS[:5]) - 1
    assert np.array_equal(before[:first], after[:first]) and np.array_equal(before[last + 1 :], after[last + 1 :])
    assert (before[first:last] != after[first:last]).all()


def test_the_last_target_of_each_document_is_the_next_bos():
    """It counts in nats and not in bytes; the first token of the stream is no target; the last token is one."""
    stream = Stream(random_documents([4, 3]))
    cfg = config(eval_seq_len=16, val_batch_tokens=64)
    _, nats = score(gpt(cfg), stream, cfg, 0)
    assert len(nats) == len(stream.tokens) - 1 == 6 and (nats > 0).all()
    assert stream.tokens[1:][3] == BOS and stream.target_bytes[3] == 0


# ---- the ledger ----


def ledger(n: int = 6) -> Ledger:
    return Ledger("test", np.arange(n, dtype=np.uint16), Verdicts())


def test_a_target_is_written_once():
    book = ledger()
    book.write(np.array([0, 1]), np.array([1.0, 2.0]))
    for again in ([1], [4, 4], [5, 0]):
        with pytest.raises(RuntimeError, match="twice"):
            book.write(np.array(again), np.ones(len(again)))
    assert np.isnan(book.nats[2:]).all() and book.nats[:2].tolist() == [1.0, 2.0]


@pytest.mark.parametrize("value", (-1e-3, np.nan, np.inf, -np.inf))
def test_impossible_scores_are_refused(value):
    book = ledger()
    with pytest.raises(RuntimeError, match="not finite"):
        book.write(np.array([2, 3]), np.array([1.0, value]))
    assert np.isnan(book.nats).all()


def test_training_before_scoring_is_refused_and_recorded():
    book = ledger()
    book.write(np.array([0, 1, 2]), np.ones(3))
    book.may_train(np.array([0, 2]))
    assert book.verdicts.failed() == []
    with pytest.raises(RuntimeError, match="not scored"):
        book.may_train(np.array([2, 3]))
    assert book.verdicts.failed() == ["C3"]


def test_a_hole_gives_no_number():
    book = ledger()
    book.write(np.array([0, 1, 2, 4, 5]), np.ones(5))
    with pytest.raises(RuntimeError, match="1 targets were never scored"):
        book.bpb()
    book.write(np.array([3]), np.array([7.0]))
    assert book.bpb() == pytest.approx(12 / math.log(2) / 15)


def test_bytes_are_summed_without_overflow():
    book = Ledger("test", np.full(3000, 60000, np.uint16), Verdicts())
    book.write(np.arange(3000), np.full(3000, 2.0))
    assert book.bpb() == pytest.approx(6000 / math.log(2) / (3000 * 60000))


def test_a_failed_condition_stays_failed():
    verdicts = Verdicts()
    verdicts.set("C1", "FAIL", "broken")
    verdicts.set("C1", "PASS", "never mind")
    assert verdicts.table["C1"] == ("FAIL", "broken") and verdicts.failed() == ["C1"]


class TwoRanks(train_gpt.Ranks):
    """all_reduce_ with another rank's entries, without a process group."""

    def __init__(self, nats):
        self.rank, self.world, self.others = 0, 2, nats

    def all_reduce_(self, t):
        other = ~np.isnan(self.others) if not t.is_floating_point() else np.nan_to_num(self.others)
        return t.add_(torch.from_numpy(other.astype(t.numpy().dtype)))


def test_ranks_join_their_entries():
    book = ledger(3)
    book.write(np.array([0]), np.array([0.5]))
    book.merge(TwoRanks(np.array([np.nan, 1.0, 2.0])))
    assert book.nats.tolist() == [0.5, 1.0, 2.0]
    book = ledger(3)
    book.write(np.array([0]), np.array([0.5]))
    book.merge(TwoRanks(np.array([np.nan, np.nan, 2.0])))
    assert np.isnan(book.nats[1])
    book = ledger(3)
    book.write(np.array([0]), np.array([0.5]))
    with pytest.raises(RuntimeError, match="same target"):
        book.merge(TwoRanks(np.array([0.5, 1.0, 2.0])))


def test_the_ledger_file_gives_the_printed_number():
    """LEDGER_PATH: one entry per target, the tail included; its sum over the sidecar's bytes is the headline to the
    last digit."""
    folder = base_run()
    nats, found = np.load(scratch() / "base_ledger.npy"), result(folder)
    sizes = np.concatenate(
        [np.frombuffer((data() / f"fineweb_val_bytes_00000{i}.bin").read_bytes()[1024:], "<u2") for i in (0, 1)]
    )
    assert (
        nats.dtype == np.float64
        and len(nats) == len(sizes) - 1 == found["data"]["val_targets"] == found["data"]["val_tokens"] - 1
    )
    assert (
        found["val_bpb"]
        == found["bpb"].get("adapted", found["bpb"]["quantized"])
        == float(nats.sum() / math.log(2) / sizes.sum(dtype=np.int64))
    )
    assert f"\nval_bpb {found['val_bpb']:.6f} on all" in (folder / "train.log").read_text()


@pytest.mark.parametrize("stride", (3, 8, 10))
def test_a_window_does_not_tell_where_its_document_ends(stride):
    """The context of every target is the same however long the document is."""

    def contexts(length):
        windows = train_gpt.plan_windows(np.array([0]), length, 10, stride)
        return [begin for begin, first, reach in windows.tolist() for _ in range(first, reach)]

    longest = contexts(60)
    assert all(contexts(length) == longest[:length] for length in range(1, 60))
