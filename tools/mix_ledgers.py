"""What a mixture of adapters of several rates would give, from the ledgers of one run for each rate.

    for lr in 0.00005 0.0001 0.0002; do
      TTT_LORA_LR=$lr LEDGER_PATH=$lr.npy TTT_EVAL_ONLY=1 ARTIFACT_DIR=runs/42 python train_gpt.py
    done
    python tools/mix_ledgers.py 0.00005.npy 0.0001.npy 0.0002.npy --data data/caseops

With nats n_k[t] of target t in ledger k, and weights that know only the document's earlier targets:

    evidence_k[t + 1] = decay evidence_k[t] - eta n_k[t],   evidence_k = 0 at a document's start
    w_k[t]            = exp(evidence_k[t]) / sum over j of exp(evidence_j[t])
    p[t]              = sum over k of w_k[t] exp(-n_k[t])

A ledger's exp(-n_k) belongs to probabilities that sum to one, and so does p. eta = 1 without forgetting is Bayes'
rule; eta = 0 the plain mean. The decay is named by its half-life in tokens. Documents are halved by a hash of their
tokens, as everywhere: half A chooses eta and half-life, half B is reported. An experiment: nothing here makes a result.
"""

import argparse
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

if not __package__:  # run as a file
    import anywhere  # noqa: F401

from prepare_data import DataError
from tools.anatomy import check_targets, read_ledger
from tools.lease import Documents
from tools.runs import ReportError, show_all_text, shown
from tools.streams import read_stream

ETAS = (0.0, 0.25, 0.5, 1.0, 2.0)
HALF_LIVES = (16, 64, 256, 1024, math.inf)  # tokens
DRAWS = 1000


class Rule(NamedTuple):
    """How weights follow from a document's past nats."""

    eta: float
    half_life: float  # tokens

    def __str__(self):
        return f"eta {self.eta:g}, half-life {self.half_life:g}"


def rules() -> Iterator[Rule]:
    """All that are tried; without evidence there is nothing to forget."""
    yield Rule(0.0, math.inf)
    yield from (Rule(eta, half_life) for eta in ETAS[1:] for half_life in HALF_LIVES)


def mixture(nats: np.ndarray, starts: np.ndarray, lengths: np.ndarray, rule: Rule) -> np.ndarray:
    """Nats (targets,) of the mixture of ledgers (ledgers, targets); starts and lengths are of the documents' targets.

    All documents go forward together, position by position, the longest first in line.
    """
    order = np.argsort(-lengths, kind="stable")
    starts, falling = starts[order], lengths[order]
    running = np.searchsorted(-falling, -np.arange(falling.max(initial=0)), side="left")  # documents that go on
    decay = 0.5 ** (1 / rule.half_life)
    evidence = np.zeros((len(nats), len(starts)))
    mixed = np.empty(nats.shape[1])
    for position, count in enumerate(running.tolist()):
        targets = starts[:count] + position
        here, known = nats[:, targets], evidence[:, :count]
        mixed[targets] = np.logaddexp.reduce(known) - np.logaddexp.reduce(known - here)
        evidence[:, :count] = decay * known - rule.eta * here
    return mixed


def bpb(bits: np.ndarray, sizes: np.ndarray) -> float:
    return float(bits.sum() / sizes.sum())


def gain(before: np.ndarray, after: np.ndarray, sizes: np.ndarray) -> tuple[float, float, float]:
    """BPB saved, and its 95 % interval by draws of documents; bits and bytes of each document."""
    drawn = np.random.default_rng(0).integers(0, len(sizes), (DRAWS, len(sizes)))
    draws = (before - after)[drawn].sum(1) / sizes[drawn].sum(1)
    return bpb(before - after, sizes), *np.quantile(draws, (0.025, 0.975)).tolist()


def run(args: argparse.Namespace) -> list[str]:
    """The lines of the report."""
    targets = len(read_stream(args.data, "val")) - 1  # raises where there is no data
    documents = Documents(args.data)
    lengths = np.bincount(documents.document, minlength=len(documents.bytes))
    starts = np.cumsum(lengths) - lengths
    ledgers = [read_ledger(path) for path in args.ledgers]
    for path, nats in zip(args.ledgers, ledgers):
        check_targets(path, nats, targets)
    nats = np.stack(ledgers)
    if np.isnan(nats).any():
        raise ReportError("a ledger has targets that were not scored; give ledgers of finished runs")
    a, b = ~documents.in_b, documents.in_b
    if not a.any() or not b.any():
        raise ReportError(f"{args.data}: too few documents for two halves")
    names = [path.stem for path in args.ledgers]
    candidates = dict(zip(names, nats)) | {str(rule): mixture(nats, starts, lengths, rule) for rule in rules()}
    bits = {name: documents.bits(values) for name, values in candidates.items()}
    on_a = {name: bpb(values[a], documents.bytes[a]) for name, values in bits.items()}
    single, best = min(names, key=on_a.get), min(set(on_a) - set(names), key=on_a.get)
    lines = [f"{'':32s}  half A   half B   ({a.sum():,} and {b.sum():,} documents)"]
    for name, values in bits.items():
        mark = "<- chosen on A" if name in (single, best) else ""
        lines.append(f"{name:32s} {on_a[name]:.5f}  {bpb(values[b], documents.bytes[b]):.5f}  {mark}".rstrip())
    saved, low, high = gain(bits[single][b], bits[best][b], documents.bytes[b])
    lines.append(f"half B: the mixture saves {saved:.5f} BPB against {single} alone, 95 % from {low:.5f} to {high:.5f}")
    return lines


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ledgers", type=Path, nargs="+", help="files that LEDGER_PATH wrote, one for each rate")
    parser.add_argument("--data", type=Path, required=True, metavar="DATA_PATH", help="the data folder of those runs")
    show_all_text()
    try:
        print(*run(parser.parse_args(argv)), sep="\n")
        return 0
    except (ReportError, DataError, OSError) as error:
        print(f"mix_ledgers.py: {shown(str(error))}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
