"""The exact n-gram statistics beside a Python dictionary with the same counts."""

import argparse
import time
from collections.abc import Iterator

import numpy as np
import torch

from tools.bench.table import Row
from train_gpt import continuations


def count_by_dictionary(tokens: list[int], bos: int, orders: int) -> list[tuple[int, int]]:
    """(times seen, times its commonest continuation was seen) of the longest known context before each token.

    One dictionary per order, read in stream order.
    """
    totals, pairs, tops = {}, {}, {}
    found, start = [], 0
    for i, token in enumerate(tokens[:-1]):
        start = i if token == bos else start
        known, following = (0, 0), tokens[i + 1]
        for length in range(1, min(orders - 1, i - start + 1) + 1):
            context = tuple(tokens[i - length + 1 : i + 1])
            if context in totals:
                known = totals[context], tops[context]
            totals[context] = totals.get(context, 0) + 1
            pairs[context, following] = count = pairs.get((context, following), 0) + 1
            tops[context] = max(count, tops.get(context, 0))
        found.append(known)
    return found


def synthetic_text(n: int, vocab: int, copied: float) -> np.ndarray:
    """Tokens (n,) with Zipf's frequencies, of which a share repeats earlier stretches; documents begin with 1."""
    stretch, rng = 24, np.random.default_rng(0)
    frequencies = 1 / np.arange(1, vocab - 1)
    words = np.searchsorted(np.cumsum(frequencies) / np.sum(frequencies), rng.random(n)) + 2
    source = np.arange(n)
    copies = np.flatnonzero(rng.random(n // stretch) < copied) * stretch
    origins = (rng.random(len(copies)) * np.maximum(copies - stretch, 1)).astype(int)
    source[copies[:, None] + np.arange(stretch)] = origins[:, None] + np.arange(stretch)
    tokens = words[source]
    tokens[rng.random(n) < 1 / 950] = tokens[0] = 1  # documents as long as the contest's
    return tokens


def ngram(args: argparse.Namespace) -> Iterator[Row]:
    """Tokens/s of the exact n-gram statistics (orders 2 to 16, every document a segment) beside a Python dictionary."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    n = args.tokens or (48_000_000 if device.type == "cuda" else 500_000)
    vocab, orders = 8192, 16
    tokens = synthetic_text(n, vocab, args.copied)

    def ours(count: int) -> tuple[float, torch.Tensor]:
        text = torch.from_numpy(tokens[:count].astype(np.int32)).to(device)
        started = time.perf_counter()
        document = (text[:-1] == 1).cumsum(0, dtype=torch.int32)
        known = torch.zeros(2, count - 1, dtype=torch.int64, device=device)
        for level in continuations(text, document, document, orders, vocab):
            places = level.targets[level.total > 0]
            known[:, places] = torch.stack((level.total, level.top))[:, level.total > 0]
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started, known

    prefix = min(args.prefix, n)
    started = time.perf_counter()
    wanted = count_by_dictionary(tokens[:prefix].tolist(), 1, orders)
    slow = time.perf_counter() - started
    if ours(prefix)[1].T.tolist() != [list(pair) for pair in wanted]:
        raise SystemExit("ngram: the two variants disagree")
    seconds = min(ours(n)[0] for _ in range(3))
    if device.type == "cuda":
        memory = torch.cuda.max_memory_allocated() / 1e9
        print(f"{n:,} tokens on {torch.cuda.get_device_name()}: most memory {memory:.1f} GB")
    yield Row("orders 2..16", f"dictionary, {prefix:,} tokens", slow, 1.0, prefix / 1e3, "ktok/s")
    yield Row("orders 2..16", f"sorting, {n:,} tokens", seconds, slow / prefix * n / seconds, n / 1e3, "ktok/s")
