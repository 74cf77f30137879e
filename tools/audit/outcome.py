"""How a check ends without a verdict of its own, and how its findings become one."""

from tools.verdicts import DISPUTED, FAIL, PASS


class NotRun(Exception):
    """What a check needs is not there; the message says what."""


class Broken(Exception):
    """The artifact did not do what the file contract asks; the check that ran it fails with this message."""


def verdict_of(faults: list[str], good: str, doubts: list[str] | None = None) -> tuple[str, str]:
    """FAIL with the faults, else DISPUTED with the doubts, else PASS with what was found."""
    if faults:
        return FAIL, "; ".join(faults)
    if doubts:
        return DISPUTED, "; ".join(doubts)
    return PASS, good
