"""The byte-level PPM-D mixture that some published systems report (#1795, #1835, #1858), from a saved ledger. It FAILS
C2: the output says so, and no tool takes it for a result.

    LEDGER_PATH=ledger.npy TTT_EVAL_ONLY=1 ARTIFACT_DIR=runs/42 python train_gpt.py
    python tools/ppm_mix.py ledger.npy --data data/caseops --gate 1858

Each token's nats are spread evenly over its bytes, a byte model of order 5 learns every byte behind its score, and a
gate picks the share of the network: 0.05 where the byte model is confident (highest count over total + distinct, at the
longest context seen, at least 0.9), else 0.9. But p(token)^(1/n) is no distribution over bytes: all tokens that begin
with one byte bring powers of their own, and over the 256 bytes they add up to more than 1. The mixture inherits that
mass, and its gain comes from there (#1905: with true byte probabilities the same mixture is worse than the network
alone).

Gates: 1795 (as above; the byte model is PPM-D proper, counts (2c - 1) / 2T, escape u / 2T), 1835 (counts c / (T + u),
escape u / (T + u)), 1858 (as 1835, and the network alone where the byte that came cost it less than 0.277 nats: a gate
that reads its target, so it fails C1 as well).
"""

import argparse
import json
import math
import signal
import sys
from pathlib import Path

import numpy as np

if not __package__:  # run as a file
    import anywhere  # noqa: F401

from prepare_data import BOS_ID, DataError, write_file
from tools.anatomy import check_targets, read_ledger
from tools.runs import ReportError
from tools.streams import document_texts, read_stream, scored_stream

CONFIDENT, NETWORK_SHARE, NETWORK_SHARE_CONFIDENT, SURE_NATS = 0.9, 0.9, 0.05, 0.277
WHY = (
    "FAIL: a token's probability spread evenly over its bytes is no distribution over bytes, "
    "so the mixture is none over tokens"
)


class PPM:
    """Prediction by partial matching over bytes, longest context first, escaping to shorter ones and at last to 1/256.
    Counts change only in update."""

    def __init__(self, order: int, halves: bool):
        """halves: PPM-D proper, (2c - 1) / 2T and escape u / 2T; else c / (T + u) and u / (T + u)."""
        self.order, self.halves = order, halves
        self.tables = [{} for _ in range(order + 1)]  # context -> {byte: count}, by its length

    def counts(self, history: bytes):
        """Counts of the contexts seen before, longest first."""
        for length in range(min(self.order, len(history)), -1, -1):
            found = self.tables[length].get(history[len(history) - length :])
            if found:
                yield found

    def probability(self, history: bytes, byte: int) -> tuple[float, float]:
        """p(byte | history) and the confidence of the longest context, which does not look at the byte."""
        escaped, confidence = 1.0, None
        for counts in self.counts(history):
            total, distinct = sum(counts.values()), len(counts)
            if confidence is None:
                confidence = max(counts.values()) / (total + distinct)
            if byte in counts:
                share = (2 * counts[byte] - 1) / (2 * total) if self.halves else counts[byte] / (total + distinct)
                return escaped * share, confidence
            escaped *= distinct / (2 * total) if self.halves else distinct / (total + distinct)
        return escaped / 256, confidence or 0.0

    def update(self, history: bytes, byte: int) -> None:
        for length in range(min(self.order, len(history)) + 1):
            counts = self.tables[length].setdefault(history[len(history) - length :], {})
            counts[byte] = counts.get(byte, 0) + 1


def mix(nats: np.ndarray, sizes: np.ndarray, text: bytes, order: int, gate: str) -> tuple[float, float]:
    """nats, sizes (targets,): the network's nats and bytes of each token; text: all those bytes. Returns the mixture's
    nats and the share of bytes left to the network alone."""
    ppm, total, alone, at = PPM(order, halves=gate == "1795"), 0.0, 0, 0
    for token_nats, size in zip(nats.tolist(), sizes.tolist()):
        if size == 0:
            total += token_nats  # control tokens: nothing to mix with
            continue
        each = token_nats / size
        for _ in range(size):
            history, byte = text[max(at - order, 0) : at], text[at]
            p, confidence = ppm.probability(history, byte)
            share = NETWORK_SHARE_CONFIDENT if confidence >= CONFIDENT else NETWORK_SHARE
            if gate == "1858" and each < SURE_NATS:
                share, alone = 1.0, alone + 1
            total -= math.log(share * math.exp(-each) + (1 - share) * p)
            ppm.update(history, byte)
            at += 1
    return total, alone / max(at, 1)


def byte_stream(tokens: np.ndarray, sizes: np.ndarray, model: Path) -> bytes:
    """The bytes of the documents, cut or padded with spaces to what the ledger counts: SentencePiece shows a run of
    spaces as one."""
    starts, out = np.flatnonzero(tokens == BOS_ID), []
    for text, start, end in zip(document_texts(tokens, model), starts, [*starts[1:], len(tokens)], strict=True):
        wanted = int(sizes[start:end].sum())
        out.append(text.encode("utf-8", "replace")[:wanted].ljust(wanted, b" "))
    return b"".join(out)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ledger", type=Path, help="file that LEDGER_PATH wrote: nats of every validation target")
    parser.add_argument("--data", type=Path, required=True, metavar="DATA_PATH", help="the data folder of that run")
    parser.add_argument("--order", type=int, default=5, help="of the byte model (default: 5)")
    parser.add_argument(
        "--gate", choices=("1795", "1835", "1858"), default="1858", help="of which system (default: 1858)"
    )
    parser.add_argument(
        "--targets", type=int, metavar="N", help="only the first N targets, as #1858 did; the output names the subset"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the output as JSON there too")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> dict:
    tokens, sizes = read_stream(args.data, "val"), read_stream(args.data, "val_bytes").astype(np.int64)
    text = byte_stream(tokens, sizes, args.data / "tokenizer.model")[int(sizes[0]) :]
    nats = read_ledger(args.ledger)
    sizes = scored_stream(args.data, len(nats))[1].astype(np.int64)
    check_targets(args.ledger, nats, len(sizes) - 1)
    used = min(args.targets or len(nats), len(nats))
    nats, sizes = nats[:used], sizes[1 : used + 1]
    mixture, alone = mix(nats, sizes, text, args.order, args.gate)
    bits = math.log(2) * int(sizes.sum())
    verdicts = {"C2": WHY} | ({"C1": "FAIL: the gate reads the byte that came"} if args.gate == "1858" else {})
    return {
        "bpb_of_the_network": float(nats.sum() / bits),
        "bpb_of_the_mixture": mixture / bits,
        "targets": used,
        "of_targets": len(tokens) - 1,
        "gate": args.gate,
        "order": args.order,
        "share_of_bytes_left_to_the_network": alone,
        "verdicts": verdicts,
    }


def main(argv: list[str] | None = None) -> int:
    try:
        args = parse_args(argv)
        found = run(args)
        subset = (
            ""
            if found["targets"] == found["of_targets"]
            else f" on the first {found['targets']:,} of {found['of_targets']:,} targets"
        )
        print(
            f"network {found['bpb_of_the_network']:.6f} BPB, with the byte mixture of #{args.gate} "
            f"{found['bpb_of_the_mixture']:.6f} BPB{subset}"
        )
        print(
            *(f"{condition} {verdict}" for condition, verdict in found["verdicts"].items()),
            "no val_bpb: no tool takes this number for a result",
            sep="\n",
        )
        if args.out:
            write_file(args.out, (json.dumps(found, indent=1) + "\n").encode())
        return 0
    except (ReportError, DataError, OSError) as error:
        print(f"ppm_mix.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # a reader like `head` may leave before the end
    sys.exit(main())
