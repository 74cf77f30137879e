"""Benchmarks: each subcommand prints a table of times and ratios that were all measured in one run, on this machine.

    python tools/bench.py caseops

A subcommand is a function under `@bench`, with its options; it returns a list of `Row`. The variants of a comparison take turns, so a machine that
slows down slows all of them.
"""

import argparse
import json
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

BENCHES: dict[str, tuple[Callable[[argparse.Namespace], list["Row"]], tuple[tuple, ...]]] = {}


@dataclass(frozen=True)
class Row:
    """One measured variant. `amount` / seconds is its rate; `ratio` is the rate over that of the reference it was measured beside."""

    what: str
    variant: str
    seconds: float
    ratio: float
    amount: float = 0.0
    unit: str = ""


def bench(name: str, *options: tuple[str, dict]) -> Callable:
    """Registers a subcommand; `options` are (flag, keyword arguments of argparse's add_argument)."""

    def register(function: Callable[[argparse.Namespace], list[Row]]) -> Callable:
        BENCHES[name] = function, options
        return function

    return register


def compare(
    what: str, variants: dict[str, Callable[[], object]], *, amount: float = 0.0, unit: str = "", repeats: int = 5
) -> list[Row]:
    """Best of `repeats` runs of each variant, interleaved; the first one is the reference of the ratios. A variant must wait for its device."""
    best = dict.fromkeys(variants, float("inf"))
    for function in variants.values():
        function()  # caches, compilation, allocations
    for _ in range(repeats):
        for name, function in variants.items():
            started = time.perf_counter()
            function()
            best[name] = min(best[name], time.perf_counter() - started)
    reference = next(iter(best.values()))
    return [Row(what, name, seconds, reference / seconds, amount, unit) for name, seconds in best.items()]


def print_table(rows: Iterable[Row]) -> None:
    cells = [("what", "variant", "ms", "rate", "ratio")]
    for row in rows:
        rate = f"{row.amount / row.seconds:.1f} {row.unit}" if row.amount else ""
        cells.append((row.what, row.variant, f"{1e3 * row.seconds:.2f}", rate, f"{row.ratio:.2f}x"))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        print(
            "  ".join(
                cell.ljust(width) if i < 2 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
        )


# ---------------------------------------------------------------- CaseOps


def encode_by_character(text: str) -> str:
    """CaseOps as a scan over characters: the plain reading of the rules in lossless_caps.py."""
    out, i = [], 0
    while i < len(text):
        if not (text[i].isascii() and text[i].isalpha()):
            out.append("\ue004" + text[i] if "\ue001" <= text[i] <= "\ue004" else text[i])
            i += 1
            continue
        end = i
        while end < len(text) and text[end].isascii() and text[end].isalpha():
            end += 1
        word, i = text[i:end], end
        if len(word) > 1 and word.isupper():
            out.append("\ue002" + word.lower())
            continue
        for k, letter in enumerate(word):
            if letter.isupper():
                out.append("\ue003" if k else "\ue001")
            out.append(letter.lower())
    return "".join(out)


def decode_by_character(text: str) -> str:
    """A state machine over the characters of well-formed text."""
    out, allcaps, capital, escaped = [], False, False, False
    for char in text:
        if escaped:
            out.append(char)
            escaped = allcaps = False
        elif char == "\ue004":
            escaped = True
        elif char == "\ue002":
            allcaps = True
        elif char in "\ue001\ue003":
            capital = True
        elif char.isascii() and char.isalpha():
            out.append(char.upper() if allcaps or capital else char)
            capital = False
        else:
            out.append(char)
            allcaps = False
    return "".join(out)


def piece_bytes_by_character(surfaces: list[str]) -> list[int]:
    counts, escaped = [], False
    for surface in surfaces:
        count = 0
        for char in surface:
            if not escaped and "\ue001" <= char <= "\ue004":
                escaped = char == "\ue004"
            else:
                count += len(char.encode())
                escaped = False
        counts.append(count)
    return counts


@bench(
    "caseops",
    ("--file", {"type": Path, "help": "JSONL file of documents (default: the Python standard library)"}),
    ("--mb", {"type": float, "default": 1, "help": "text to use (default: %(default)s)"}),
    ("--repeats", {"type": int, "default": 5, "help": "runs of each variant (default: %(default)s)"}),
)
def caseops(args: argparse.Namespace) -> list[Row]:
    """MB/s of encode, decode and piece_bytes beside per-character loops that give the same results."""
    import sentencepiece

    import lossless_caps
    from prepare_data import Source, encode_pieces, parse_document, stdlib_documents

    source = Source("jsonl", (args.file,)) if args.file else Source("stdlib", documents=stdlib_documents())
    texts, size = [], 0
    for line in source.lines():
        texts.append(parse_document(line))
        size += len(texts[-1].encode())
        if size >= args.mb * 1e6:
            break
    encoded = [lossless_caps.encode(text) for text in texts]
    sp = sentencepiece.SentencePieceProcessor(model_file=str(ROOT / "tests/golden/fineweb_8192_caseops.model"))
    surfaces = [encode_pieces(sp, text)[1] for text in encoded]
    jobs = (
        ("encode", encode_by_character, lossless_caps.encode, texts),
        ("decode", decode_by_character, lossless_caps.decode, encoded),
        ("piece_bytes", piece_bytes_by_character, lossless_caps.piece_bytes, surfaces),
    )
    rows = []
    for what, reference, ours, inputs in jobs:
        if [*map(reference, inputs)] != [*map(ours, inputs)]:
            raise SystemExit(f"{what}: the two variants disagree")
        rows += compare(
            what,
            {
                "per character": lambda f=reference, x=inputs: [*map(f, x)],
                "lossless_caps": lambda f=ours, x=inputs: [*map(f, x)],
            },
            amount=size / 1e6,
            unit="MB/s",
            repeats=args.repeats,
        )
    return rows


@bench(
    "train",
    (
        "--public",
        {
            "type": Path,
            "help": "train_gpt.py of a published record (#1855), run beside ours; its folder is never part of this repository",
        },
    ),
    ("--public-settings", {"type": Path, "help": "file of KEY=VALUE words for its environment"}),
    ("--steps", {"type": int, "default": 50, "help": "optimizer steps of each graph (default: %(default)s)"}),
)
def train(args: argparse.Namespace) -> list[Row]:
    """Step time and loss of the plain and the looped graph on one GPU, optimizer included; settings come from the environment as in training."""
    from bench_train import measure

    return [
        Row(mode, variant, seconds, ratio, tokens / 1e6, "Mtok/s")
        for mode, variant, seconds, ratio, tokens in measure(args.public, args.public_settings, args.steps)
    ]


@bench("protocol", ("runs", {"nargs": "+", "type": Path, "metavar": "RUN_DIR", "help": "folder with a trained.npz"}))
def protocol(args: argparse.Namespace) -> list[Row]:
    """BPB of trained weights in the windows of #1855's own diagnostic, which cuts the stream every 65,536 tokens and drops its last batch."""
    from bench_train import published_protocol

    for folder in args.runs:
        print(published_protocol(folder))
    return []


@bench("codec", ("--artifact", {"type": Path, "required": True, "metavar": "PATH", "help": "model.bin of a run"}))
def codec(args: argparse.Namespace) -> list[Row]:
    """Bytes and seconds of a model file's tensors by our coder, brotli 11, LZMA and, where installed, lrzip's zpaq over sorted rows; ratio: bytes over ours."""
    from bench_quant import codec as measure

    rows = list(measure(args.artifact))
    return [Row(f"{size:,} bytes", variant, seconds, size / rows[0][1]) for variant, size, seconds in rows]


@bench(
    "quant",
    (
        "--trained",
        {"type": Path, "required": True, "metavar": "PATH", "help": "trained.npz of a run; DATA_PATH names its data"},
    ),
    ("--budget", {"type": float, "default": 1e9, "help": "begin no method after this many seconds"}),
)
def quant(args: argparse.Namespace) -> list[Row]:
    """BPB that each method of quantisation loses at the size of the published recipe; ratio: its loss over the published one's (GPTQ: seconds over ours)."""
    from bench_quant import quant as measure

    rows = list(measure(args.trained, args.budget))
    reference = {False: next((lost for _, size, lost, _ in rows if size), 1.0), True: rows[0][3]}
    return [
        Row(
            f"{size:,} bytes, {lost:+.5f} BPB" if size else "solve",
            method,
            seconds,
            lost / reference[False] if size else seconds / reference[True],
        )
        for method, size, lost, seconds in rows
    ]


@bench(
    "ttt",
    (
        "--artifact",
        {
            "type": Path,
            "required": True,
            "metavar": "DIR",
            "help": "folder of a run with model.bin; DATA_PATH names its data",
        },
    ),
    (
        "--set",
        {
            "action": "append",
            "default": [],
            "metavar": "SETTINGS",
            "help": "one pass under these, e.g. 'TTT_CHUNKS=48 TTT_LORA_RANK=80'; repeatable; the first is 1.00x",
        },
    ),
    ("--budget", {"type": float, "default": 1e9, "help": "begin no pass after this many seconds"}),
)
def ttt(args: argparse.Namespace) -> list[Row]:
    """BPB and targets/s of test-time training under each --set, on the same artifact and documents. None of it is a result: settings other than the artifact's make C4 DISPUTED."""
    from bench_ttt import ttt as measure

    rows = list(measure(args.artifact, dict(os.environ), args.set or [""], args.budget))
    return [
        Row(f"{bpb:.5f} BPB, captured in {warm:.1f} s", line, seconds, rows[0][3] / seconds, targets, "targets/s")
        for line, bpb, warm, seconds, targets in rows
    ]


@bench("startup")
def startup(args: argparse.Namespace) -> list[Row]:
    """Seconds from the start of train_gpt.py's process to the end of its first training step, with empty compiler caches and again with those it left.

    Settings come from the environment. Ratio: the cold start's seconds over this one's.
    """
    from bench_runs import startup as measure

    rows = list(measure())
    cold = {phase: seconds for phase, caches, seconds in rows if caches == "cold caches"}
    return [Row(phase, caches, seconds, cold[phase] / seconds) for phase, caches, seconds in rows]


@bench(
    "attention",
    ("--tokens", {"type": int, "help": "packed tokens (default: MICRO_BATCH_TOKENS on a GPU, 4,096 on a CPU)"}),
)
def attention(args: argparse.Namespace) -> list[Row]:
    """Each attention backend that works here, forward and backward, on packed documents at the model's head shapes; ratio: its FLOP/s over a large matrix product's.

    FLOPs are those of the causal pairs inside documents: two products forward, five backward. The documents are the first of DATA_PATH, or of random lengths.
    """
    from bench_parts import attention as measure

    return [Row(*row) for row in measure(args.tokens)]


@bench("optimizer")
def optimizer(args: argparse.Namespace) -> list[Row]:
    """A step of the optimizer on one rank and each of its parts by itself, with random gradients; ratio: the floor of its bytes and FLOPs over its time.

    The floor is the time of the bytes that must be read and written at the rate of a large copy, plus that of the FLOPs at the rate of a large matrix product.
    A model small enough for a cache can be faster.
    """
    from bench_parts import optimizer as measure

    return [Row(*row) for row in measure()]


@bench(
    "scaling",
    (
        "--gpus",
        {
            "nargs": "+",
            "type": int,
            "metavar": "N",
            "help": "numbers of ranks, one GPU each (default: 1, 2 and 4, as far as there are GPUs; 1 and 2 on a CPU)",
        },
    ),
    ("--steps", {"type": int, "default": 60, "help": "steps of each run (default: %(default)s)"}),
    (
        "--same-batch",
        {
            "action": "store_true",
            "help": "every number of ranks trains the largest one's batch: strong scaling, and the loss curves must agree",
        },
    ),
)
def scaling(args: argparse.Namespace) -> list[Row]:
    """Tokens/s per GPU of the plain graph through torchrun, MICRO_BATCH_TOKENS on each rank and step (weak scaling); ratio: over that of the first run."""
    from bench_runs import scaling as measure

    rows = list(measure(args.gpus, args.steps, args.same_batch))
    rate = rows[0][1] / rows[0][2]
    return [
        Row(
            f"{tokens:,} tokens a rank",
            f"{ranks} rank(s)",
            seconds,
            tokens / seconds / rate,
            tokens / 1e3,
            "ktok/s a rank",
        )
        for ranks, tokens, seconds in rows
    ]


@bench("kernels")
def kernels(args: argparse.Namespace) -> list[Row]:
    """Each Triton kernel at the shapes of a training step, beside its compiled reference and its floor; needs a Hopper GPU."""
    import bench_kernels

    bench_kernels.main()
    return []


# ---------------------------------------------------------------- n-grams


def count_by_dictionary(tokens: list[int], bos: int, orders: int) -> list[tuple[int, int]]:
    """(times seen, times its commonest continuation was seen) of the longest known context before each token: one dictionary per order, read in stream order."""
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


@bench(
    "ngram",
    ("--tokens", {"type": int, "help": "tokens of synthetic text (default: 48 million on a GPU, 500,000 on a CPU)"}),
    ("--prefix", {"type": int, "default": 50_000, "help": "of these, through the dictionary (default: %(default)s)"}),
    (
        "--copied",
        {
            "type": float,
            "default": 0.3,
            "help": "share of the text that repeats earlier stretches (default: %(default)s)",
        },
    ),
)
def ngram(args: argparse.Namespace) -> list[Row]:
    """Tokens/s of the exact n-gram statistics (orders 2 to 16, every document a segment) beside a Python dictionary with the same counts."""
    import numpy as np
    import torch

    from train_gpt import continuations

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    n, vocab, orders, stretch, rng = (
        args.tokens or (48_000_000 if device.type == "cuda" else 500_000),
        8192,
        16,
        24,
        np.random.default_rng(0),
    )
    words = (
        np.searchsorted(np.cumsum(1 / np.arange(1, vocab - 1)) / np.sum(1 / np.arange(1, vocab - 1)), rng.random(n)) + 2
    )
    source, copies = np.arange(n), np.flatnonzero(rng.random(n // stretch) < args.copied) * stretch
    source[copies[:, None] + np.arange(stretch)] = (rng.random(len(copies)) * np.maximum(copies - stretch, 1)).astype(
        int
    )[:, None] + np.arange(stretch)
    tokens = words[source]
    tokens[rng.random(n) < 1 / 950] = tokens[0] = 1  # documents as long as the contest's

    def ours(count: int) -> tuple[float, torch.Tensor]:
        text = torch.from_numpy(tokens[:count].astype(np.int32)).to(device)
        started = time.perf_counter()
        document = (text[:-1] == 1).cumsum(0, dtype=torch.int32)
        known = torch.zeros(2, count - 1, dtype=torch.int64, device=device)
        for level in continuations(text, document, document, orders, vocab):
            at = level.targets[level.total > 0]
            known[:, at] = torch.stack((level.total, level.top))[:, level.total > 0]
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
        print(
            f"{n:,} tokens on {torch.cuda.get_device_name()}: most memory {torch.cuda.max_memory_allocated() / 1e9:.1f} GB"
        )
    return [
        Row("orders 2..16", f"dictionary, {prefix:,} tokens", slow, 1.0, prefix / 1e3, "ktok/s"),
        Row("orders 2..16", f"sorting, {n:,} tokens", seconds, slow / prefix * n / seconds, n / 1e3, "ktok/s"),
    ]


def main(argv: list[str] | None = None) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds: runs that were started end too
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows as JSON")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (function, options) in BENCHES.items():
        command = commands.add_parser(name, help=function.__doc__.splitlines()[0], description=function.__doc__)
        for flag, keywords in options:
            command.add_argument(flag, **keywords)
    args = parser.parse_args(argv)
    rows = BENCHES[args.command][0](args)
    if not rows:
        return
    print(f"{args.command} on {platform.machine()}, Python {platform.python_version()}")
    print_table(rows)
    if args.json:
        args.json.write_text(json.dumps([vars(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
