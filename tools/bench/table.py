"""Rows of a benchmark, how two variants are compared, and the table."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One measured variant.

    `amount` / seconds is its rate; `ratio` is the rate over that of the reference it was measured beside.
    """

    what: str
    variant: str
    seconds: float
    ratio: float
    amount: float = 0.0
    unit: str = ""


def compare(
    what: str, variants: dict[str, Callable[[], object]], *, amount: float = 0.0, unit: str = "", repeats: int = 5
) -> list[Row]:
    """Best of `repeats` runs of each variant; the first one is the reference of the ratios.

    The variants take turns, so a machine that slows down slows all of them. A variant must wait for its device.
    """
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
