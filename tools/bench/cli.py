"""Benchmarks: each command prints a table of times and ratios that were all measured in one run, on this machine.

    python -m tools.bench caseops
    python -m tools.bench train --steps 50

The variants of a comparison take turns, so a machine that slows down slows all of them.
"""

import argparse
import json
import platform
import signal
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from tools.bench import caseops, kernels, ngram, parts, quant, runs, train, ttt
from tools.bench.table import Row, print_table

Option = tuple[str, dict]  # a flag, and the keywords of argparse's add_argument


class Command(NamedTuple):
    """A benchmark, whose docstring is its help, and its options. What it yields becomes the table."""

    measure: Callable[[argparse.Namespace], Iterable[Row]]
    options: tuple[Option, ...] = ()


def path(flag: str, text: str, **more) -> Option:
    """An option that is a file or a folder."""
    return flag, {"type": Path, "help": text, **more}


def number(flag: str, kind: type, default, text: str) -> Option:
    """An option that is a number, its default in the help."""
    return flag, {"type": kind, "default": default, "help": f"{text} (default: %(default)s)"}


BUDGET = ("--budget", {"type": float, "default": 1e9, "help": "begin nothing after this many seconds"})

COMMANDS = {
    "caseops": Command(
        caseops.caseops,
        (
            path("--file", "JSONL file of documents (default: the Python standard library)"),
            number("--mb", float, 1, "text to use"),
            number("--repeats", int, 5, "runs of each variant"),
        ),
    ),
    "ngram": Command(
        ngram.ngram,
        (
            (
                "--tokens",
                {"type": int, "help": "tokens of synthetic text (default: 48 million on a GPU, 500,000 on a CPU)"},
            ),
            number("--prefix", int, 50_000, "of these, through the dictionary"),
            number("--copied", float, 0.3, "share of the text that repeats earlier stretches"),
        ),
    ),
    "train": Command(
        train.train,
        (
            path(
                "--public", "train_gpt.py of a published record (#1855), run beside ours; it is not in this repository"
            ),
            path("--public-settings", "file of KEY=VALUE words for its environment"),
            number("--steps", int, 50, "optimizer steps of each graph"),
        ),
    ),
    "protocol": Command(
        train.protocol,
        (path("runs", "folder with a trained.npz", nargs="+", metavar="RUN_DIR"),),
    ),
    "codec": Command(
        quant.codec,
        (path("--artifact", "model.bin of a run", required=True, metavar="PATH"),),
    ),
    "quant": Command(
        quant.quant,
        (
            path("--trained", "trained.npz of a run; DATA_PATH names its data", required=True, metavar="PATH"),
            BUDGET,
        ),
    ),
    "where": Command(
        quant.where,
        (path("--trained", "trained.npz of a run; DATA_PATH names its data", required=True, metavar="PATH"),),
    ),
    "ttt": Command(
        ttt.ttt,
        (
            path(
                "--artifact", "folder of a run with model.bin; DATA_PATH names its data", required=True, metavar="DIR"
            ),
            (
                "--set",
                {
                    "action": "append",
                    "default": [],
                    "metavar": "SETTINGS",
                    "help": "one pass under these, e.g. 'TTT_CHUNKS=48 TTT_LORA_RANK=80'; repeatable; the first is 1x",
                },
            ),
            BUDGET,
        ),
    ),
    "startup": Command(runs.startup),
    "attention": Command(
        parts.attention,
        (("--tokens", {"type": int, "help": "packed tokens (default: MICRO_BATCH_TOKENS on a GPU, 4,096 on a CPU)"}),),
    ),
    "optimizer": Command(parts.optimizer),
    "scaling": Command(
        runs.scaling,
        (
            (
                "--gpus",
                {
                    "nargs": "+",
                    "type": int,
                    "metavar": "N",
                    "help": "numbers of ranks, one GPU each (default: 1, 2, 4, as far as they are here; 1, 2 on a CPU)",
                },
            ),
            number("--steps", int, 60, "steps of each run"),
            (
                "--same-batch",
                {
                    "action": "store_true",
                    "help": "every number of ranks trains the largest one's batch: the loss curves must agree",
                },
            ),
        ),
    ),
    "kernels": Command(kernels.kernels),
}


def main(argv: list[str] | None = None) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds: runs that were started end too
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows as JSON")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (measure, options) in COMMANDS.items():
        command = commands.add_parser(name, help=measure.__doc__.splitlines()[0], description=measure.__doc__)
        for flag, keywords in options:
            command.add_argument(flag, **keywords)
    args = parser.parse_args(argv)
    rows = list(COMMANDS[args.command].measure(args))
    if not rows:
        return
    print(f"{args.command} on {platform.machine()}, Python {platform.python_version()}")
    print_table(rows)
    if args.json:
        args.json.write_text(json.dumps([vars(row) for row in rows], indent=1) + "\n")
