"""The four verdicts, and which one stands where two meet. DISPUTED: people disagree, or too little is declared."""

from collections.abc import Callable, Iterable
from typing import TypeVar

PASS, FAIL, DISPUTED, NOT_RUN = "PASS", "FAIL", "DISPUTED", "NOT RUN"
VERDICTS = (PASS, FAIL, DISPUTED, NOT_RUN)

# Of several runs or checks that must all hold, the worst speaks: one that was not run leaves the whole unshown.
BADNESS = {PASS: 0, NOT_RUN: 1, DISPUTED: 2, FAIL: 3}
# Of two witnesses of one run, itself and the audit, the one who has looked speaks, and of two the stricter.
WEIGHT = {NOT_RUN: 0, PASS: 1, DISPUTED: 2, FAIL: 3}

Row = TypeVar("Row")


def worst(rows: Iterable[Row], verdict: Callable[[Row], str]) -> Row:
    """The first row with the worst verdict: PASS only where all are PASS."""
    return max(rows, key=lambda row: BADNESS[verdict(row)])


def overrules(later: str, earlier: str) -> bool:
    """Whether the verdict of a second witness replaces the first one's."""
    return WEIGHT[later] > WEIGHT[earlier]
