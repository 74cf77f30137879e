"""Draws runs in the terminal while they go, from their train.log: the training loss, and where each run is.

    python tools/watch.py runs/42                       refreshed every 5 seconds, until the run ends or Ctrl-C
    python tools/watch.py runs/sweep/* --by seconds     several runs in one picture
    python tools/watch.py runs/42 --once                one picture of now, for a file or a pipe

A run is a folder with a train.log (or an eval.log, of a run that only scores), or the log itself; one that has not
begun is waited for. Nothing is written.
"""

import argparse
import re
import shutil
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

if not __package__:  # run as a file
    import anywhere  # noqa: F401

from tools.runs import show_all_text, shown

STEP = re.compile(r"^step +(\d+) +[\d.]+ % +loss ([\d.]+) .* ([\d.,]+) s(?:,|$)", re.M)
BPB = re.compile(r"^step +(\d+): ([\d.]+ BPB) of the first", re.M)  # of VAL_EVERY_STEPS
END = re.compile(r"^(no )?val_bpb\b.*", re.M)
COLOURS = (34, 33, 32, 35, 36, 31)  # of terminals: blue, yellow, green, magenta, cyan, red
DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # bits of a braille character, by row and column


class Watched(NamedTuple):
    """A run as its log tells of it."""

    name: str
    points: list[tuple[float, float]]  # step or seconds, loss
    state: str  # the last line of the log
    ended: bool


def log_of(run: Path) -> Path:
    """The log that a run writes now: of a folder's two the newer one."""
    if run.suffix == ".log" and not run.is_dir():
        return run
    there = [path for name in ("train.log", "eval.log") if (path := run / name).exists()]
    return max(there, key=lambda path: path.stat().st_mtime, default=run / "train.log")


def read_run(run: Path, by: str) -> Watched:
    log = log_of(run)
    name = shown(run.name or run.resolve().name)
    try:
        text = log.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return Watched(name, [], f"no {log.name} yet", False)
    points = []
    for step, loss, seconds in STEP.findall(text):
        points.append((float(step if by == "step" else seconds.replace(",", "")), float(loss)))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    # A run that goes on from trained.npz continues the log of the one before.
    ended = END.search(text, max(text.rfind("\nhardware "), 0))
    if ended:
        return Watched(name, points, ended[0], True)
    silent = time.time() - log.stat().st_mtime
    scored = "".join(f"{bpb} at step {step} | " for step, bpb in BPB.findall(text)[-1:])
    since = f"no line for {silent / 60:.0f} min, the last: " if silent > 120 else ""
    return Watched(name, points, scored + since + (lines[-1] if lines else "nothing in its log yet"), False)


class Canvas:
    """Points on a grid of characters, each of 2 by 4 dots in braille, or of one where the terminal has only ASCII."""

    def __init__(self, width: int, height: int, braille: bool):
        self.width, self.height, self.braille = width, height, braille
        self.bits = [[0] * width for _ in range(height)]
        self.colours = [[0] * width for _ in range(height)]

    def mark(self, x: float, y: float, colour: int):
        """A point at x and y in [0, 1], from the lower left."""
        column = round(x * (2 * self.width - 1))
        row = round((1 - y) * (4 * self.height - 1))
        self.bits[row // 4][column // 2] |= DOTS[row % 4][column % 2]
        self.colours[row // 4][column // 2] = colour

    def line(self, begin: tuple[float, float], end: tuple[float, float], colour: int):
        """Points from one place to another, as many as the longer way has dots."""
        across, up = end[0] - begin[0], end[1] - begin[1]
        dots = round(max(abs(across) * 2 * self.width, abs(up) * 4 * self.height)) or 1
        for i in range(dots + 1):
            self.mark(begin[0] + across * i / dots, begin[1] + up * i / dots, colour)

    def lines(self, coloured: bool) -> list[str]:
        def character(bits: int, colour: int) -> str:
            if not bits:
                return " "
            sign = chr(0x2800 + bits) if self.braille else "*"
            return f"\033[{colour}m{sign}\033[0m" if coloured else sign

        return ["".join(map(character, *row)) for row in zip(self.bits, self.colours)]


def limits(runs: list[Watched]) -> tuple[float, float, float]:
    """The last x, and the losses between which to draw: of the first tenth, which falls steeply, the end is seen."""
    last = max(x for run in runs for x, _ in run.points)
    losses = [loss for run in runs for x, loss in run.points if x >= last / 10]
    low, high = min(losses), max(losses)
    return last, low, high if high > low else low + 1


def picture(runs: list[Watched], by: str, size: tuple[int, int], coloured: bool, braille: bool) -> str:
    """The curves, and a line of text for each run; no line is wider than the terminal."""
    columns, rows = size
    lines = []
    drawn = [run for run in runs if run.points]
    if drawn:
        last, low, high = limits(drawn)
        canvas = Canvas(max(columns - 10, 10), max(rows - len(runs) - 3, 5), braille)
        for number, run in enumerate(runs):
            shown_points = [(x / (last or 1), (loss - low) / (high - low)) for x, loss in run.points if loss <= high]
            for begin, end in pairwise([*shown_points[:1], *shown_points]):
                canvas.line(begin, end, COLOURS[number % len(COLOURS)])
        body = canvas.lines(coloured)
        for number, line in enumerate(body):
            y = high - (high - low) * number / (len(body) - 1)
            lines.append(f"{y:8.3f} {line}" if number % 4 == 0 or number == len(body) - 1 else f"{'':9s}{line}")
        right = f"{last:,.0f} {by}{'s' if by == 'step' else ''}"
        lines.append(f"{'loss':>8s} 0{right:>{max(columns - 11, 1)}s}")
    for number, run in enumerate(runs):
        text = f"{'ended' if run.ended else '     '} {run.name}: {run.state}"[:columns]
        colour = COLOURS[number % len(COLOURS)]
        lines.append(f"\033[{colour}m{text}\033[0m" if coloured else text)
    return "\n".join(lines)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run, or its log")
    parser.add_argument("--by", choices=("step", "seconds"), default="step", help="what runs to the right")
    parser.add_argument("--every", type=float, default=5.0, metavar="SECONDS", help="between pictures (default: 5)")
    parser.add_argument("--once", action="store_true", help="one picture, and stop; so too where no terminal is")
    args = parser.parse_args(argv)
    if not args.every > 0:
        parser.error("--every must be above 0")
    return args


def watch(args: argparse.Namespace) -> None:
    """Pictures until every run has ended."""
    terminal = sys.stdout.isatty()
    braille = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    while True:
        runs = [read_run(run, args.by) for run in args.runs]
        size = shutil.get_terminal_size((100, 24))
        text = picture(runs, args.by, size, terminal, braille)
        # Home, the text, and nothing below it: a terminal that is cleared first flickers.
        sys.stdout.write("\033[H" + text.replace("\n", "\033[K\n") + "\033[K\n\033[J" if terminal else text + "\n")
        sys.stdout.flush()
        if args.once or not terminal or all(run.ended for run in runs):
            return
        time.sleep(args.every)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    show_all_text()
    try:
        watch(args)
        return 0
    except OSError as error:
        print(f"watch.py: {error.filename or 'the terminal'}: {error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print()
        return 130


if __name__ == "__main__":
    sys.exit(main())
