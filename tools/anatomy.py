"""Where the bits of a finished scoring pass are: by length of the document, by position in it, and how sure the sum is.

LEDGER_PATH=runs/42/ledger.npy ARTIFACT_DIR=runs/42 python train_gpt.py
python tools/anatomy.py runs/42/ledger.npy --data data/caseops
"""

import argparse
import json
import math
import signal
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np

if not __package__:  # run as a file
    import anywhere  # noqa: F401

from prepare_data import BOS_ID, DataError, sha256_file, write_file
from tools.runs import ReportError, Run, show_all_text, shown
from tools.streams import scored_stream, shard_paths

BOUNDS = (0, 64, 256, 1024, 2048, 8192)  # tokens; the last bin is open
DRAWS = 1000


def anatomy(nats: np.ndarray, sizes: np.ndarray, starts: np.ndarray) -> dict:
    """BPB by document length and by position, both in tokens, and a 95 % interval over documents.

    nats, sizes: (targets,), nats and bytes of every target in stream order; target i is token i + 1. starts:
    (documents,), places of BOS. Bins without bytes are left out.
    """
    starts = starts[starts < len(nats)]
    lengths = np.diff(np.append(starts, len(nats)))
    document = np.repeat(np.arange(len(lengths)), lengths)  # of each target
    length = lengths[document]
    position = np.arange(len(nats)) - starts[document]
    found = {"bpb_interval": interval(nats, sizes, document), "bpb_by_length": [], "bpb_by_position": []}
    for low, high in pairwise((*BOUNDS, max(BOUNDS[-1] + 1, int(lengths.max())))):
        by_length = (length > low) & (length <= high)
        by_position = (position >= low) & (position < high)
        for key, within in (("bpb_by_length", by_length), ("bpb_by_position", by_position)):
            if sizes[within].any():
                part = {
                    "upto": high,
                    "bpb": bits_per_byte(nats[within], sizes[within]),
                    "targets": int(within.sum()),
                    "documents": len(np.unique(document[within])),
                }
                found[key].append(part)
    return found


def bits_per_byte(nats: np.ndarray, sizes: np.ndarray) -> float:
    """BPB of the targets with these nats and bytes."""
    return float(nats.sum() / math.log(2) / sizes.sum(dtype=np.int64))


def interval(nats: np.ndarray, sizes: np.ndarray, document: np.ndarray) -> list[float]:
    """95 % bootstrap interval of the BPB: draws of as many documents as there are, each with its nats and bytes."""
    count = int(document[-1]) + 1
    bits = np.bincount(document, nats / math.log(2), count)
    size = np.bincount(document, sizes, count)
    draws = np.random.default_rng(0).integers(0, count, (DRAWS, count))
    drawn = bits[draws].sum(1) / np.maximum(size[draws].sum(1), 1)
    return np.quantile(drawn, (0.025, 0.975)).tolist()


def anatomy_of(ledger: Path, data: Path) -> dict:
    """The anatomy of a saved ledger over the data folder that it scores.

    Raises `ReportError` where one does not fit the other, or where there is no sidecar of bytes.
    """
    if not shard_paths(data, "val_bytes"):
        raise ReportError(f"{data}: no fineweb_val_bytes_*.bin there; without the bytes of each token there is no BPB")
    nats = read_ledger(ledger)
    tokens, sizes = scored_stream(data, len(nats))
    check_targets(ledger, nats, len(tokens) - 1)
    return anatomy(nats, sizes[1:].astype(np.int64), np.flatnonzero(tokens == BOS_ID))


def add_anatomy(run: Run, data: Path) -> None:
    """Compute and write the anatomy.json of a run that has a ledger.npy; `data` is what it was scored on."""
    ledger = run.folder / "ledger.npy"
    if ledger.exists() and not run.anatomy:
        run.anatomy = anatomy_of(ledger, data)
        found = {"ledger_sha256": sha256_file(ledger), **run.anatomy}
        write_file(run.folder / "anatomy.json", (json.dumps(found, indent=1) + "\n").encode())


def read_ledger(path: Path) -> np.ndarray:
    """Nats of every target, float64 (targets,), as `LEDGER_PATH` wrote them; raises `ReportError` where it is not
    one."""
    try:
        return np.atleast_1d(np.load(path))
    except ValueError as error:
        raise ReportError(f"{path}: not a ledger ({error}); set LEDGER_PATH in a run of train_gpt.py") from None


def check_targets(path: Path, nats: np.ndarray, targets: int) -> None:
    """Raises `ReportError` where the ledger at `path` is of other data."""
    if nats.shape != (targets,):
        raise ReportError(f"{path}: holds {len(nats):,} targets, the data has {targets:,}; give the data of that run")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ledger", type=Path, help="file that LEDGER_PATH wrote: nats of every validation target")
    parser.add_argument("--data", type=Path, required=True, metavar="DATA_PATH", help="the data folder of that run")
    args = parser.parse_args(argv)
    show_all_text()
    try:
        found = anatomy_of(args.ledger, args.data)
    except (ReportError, DataError, OSError) as error:
        print(f"anatomy.py: {shown(str(error))}", file=sys.stderr)
        return 2
    low, high = found["bpb_interval"]
    print(f"95 % of the draws of documents are between {low:.5f} and {high:.5f} BPB")
    for key, what in (("bpb_by_length", "document of"), ("bpb_by_position", "position")):
        for part in found[key]:
            reach = f"up to {part['upto']:,}"
            print(f"{what:11s} {reach:>14s} tokens: {part['bpb']:.5f} BPB, {part['targets']:,} targets")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # a reader like `head` may leave before the end
    sys.exit(main())
