"""What general compressors and counting reach on the validation documents of a run, in bits per byte over the same
bytes that the run is scored on."""

import gzip
import hashlib
import json
import lzma
import time
from pathlib import Path

import numpy as np

from prepare_data import write_file
from tools.runs import ReportError, Run
from tools.streams import document_texts, read_stream

BIGRAM_TOKENS = 100_000_000  # the n-grams are fitted on at most this many training tokens
COMPRESSORS = {
    "gzip -9": lambda text: gzip.compress(text, 9, mtime=0),
    "xz -9e": lambda text: lzma.compress(text, preset=9 | lzma.PRESET_EXTREME),
}


class Bigram:
    """Interpolated modified Kneser-Ney bigram over token ids (Chen and Goodman 1998), down to a uniform distribution.

    p(w | h) = (c(h, w) - D(c)) / c(h) + lambda(h) p1(w), where p1 counts the different tokens seen before w, and D(1),
    D(2), D(3+) come from the counts of counts.
    """

    def __init__(self, tokens: np.ndarray, vocab_size: int):
        """tokens: uint16 (n,), n > 1."""
        self.vocab_size = vocab_size
        self.keys, counts = np.unique(pair_keys(tokens[:-1], tokens[1:], vocab_size), return_counts=True)
        heads, tails = self.keys // vocab_size, self.keys % vocab_size
        discounts = kneser_ney_discounts(counts)[np.minimum(counts, 3)]
        total = np.bincount(heads, counts, vocab_size)
        self.left_over = np.where(total > 0, np.bincount(heads, discounts, vocab_size) / np.maximum(total, 1), 1.0)
        self.kept = (counts - discounts) / total[heads]
        before = np.bincount(tails, minlength=vocab_size)  # different tokens before each token
        spread = 0.75 * np.count_nonzero(before) / before.sum()
        self.lower = np.maximum(before - 0.75, 0) / before.sum() + spread / vocab_size

    def probability(self, heads: np.ndarray, tails: np.ndarray) -> np.ndarray:
        """p(tails | heads), elementwise: uint16 (n,), uint16 (n,) -> float64 (n,)."""
        keys = pair_keys(heads, tails, self.vocab_size)
        at = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        return np.where(self.keys[at] == keys, self.kept[at], 0.0) + self.left_over[heads] * self.lower[tails]


def pair_keys(heads: np.ndarray, tails: np.ndarray, vocab_size: int) -> np.ndarray:
    """One uint32 per pair of ids below 65536."""
    return heads.astype(np.uint32) * np.uint32(vocab_size) + tails.astype(np.uint32)


def kneser_ney_discounts(counts: np.ndarray) -> np.ndarray:
    """(0, D1, D2, D3+) from the counts of counts; 0.75 where there is too little data for the estimate."""
    n = [np.count_nonzero(counts == i) for i in range(1, 5)]
    if min(n) == 0:
        return np.array([0, 0.75, 0.75, 0.75])
    ratio = n[0] / (n[0] + 2 * n[1])
    estimates = [i - (i + 1) * ratio * n[i] / n[i - 1] for i in (1, 2, 3)]
    return np.array([0, *(min(max(estimate, 0.01), i - 0.01) for i, estimate in enumerate(estimates, 1))])


def fingerprint(data_path: Path) -> dict:
    """What the figures depend on."""
    train = sum((path.stat().st_size - 1024) // 2 for path in data_path.glob("fineweb_train_*.bin"))
    val = read_stream(data_path, "val")
    return {"val_sha256": hashlib.sha256(np.ascontiguousarray(val)).hexdigest(), "train_tokens": train}


def compute_baselines(data_path: Path, model: Path) -> dict:
    """BPB of compressors on the concatenated validation text, and of token n-grams on the validation tokens, all over
    the bytes of the sidecar."""
    started = time.perf_counter()
    tokens, train = read_stream(data_path, "val"), read_stream(data_path, "train", BIGRAM_TOKENS)
    size = int(read_stream(data_path, "val_bytes").sum(dtype=np.int64))
    text = "".join(document_texts(tokens, model)).encode("utf-8", "replace")
    bpb = {name: 8 * len(compress(text)) / size for name, compress in COMPRESSORS.items()}
    vocab_size = int(max(train.max(), tokens.max())) + 1
    bigram = Bigram(train, vocab_size).probability(tokens[:-1], tokens[1:])
    counts = np.bincount(train, minlength=vocab_size) + 1
    unigram = counts[tokens[1:]] / counts.sum()
    bpb |= {name: float(-np.log2(p).sum() / size) for name, p in (("token bigram", bigram), ("token unigram", unigram))}
    return {
        "bpb": bpb,
        "bytes": size,
        "text_bytes": len(text),
        "bigram": f"interpolated modified Kneser-Ney, {len(train):,} training tokens",
        "fingerprint": fingerprint(data_path),
        "seconds": round(time.perf_counter() - started, 1),
    }


def add_baselines(run: Run, data_path: Path) -> None:
    """Takes baselines.json if it belongs to this data, else computes and writes it."""
    now = fingerprint(data_path)
    if run.result["data"].get("val_sha256", now["val_sha256"]) != now["val_sha256"]:
        raise ReportError(
            f"{data_path}: not the validation documents that {run.folder} was scored on; give --baselines the right "
            "folder"
        )
    if run.baselines is None or run.baselines["fingerprint"] != now:
        run.baselines = compute_baselines(data_path, data_path / "tokenizer.model")
        write_file(run.folder / "baselines.json", json.dumps(run.baselines, indent=1).encode())
