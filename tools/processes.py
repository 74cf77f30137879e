"""Ending a process that leads a session, and all that it has started."""

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path


def descendants(pid: int) -> list[int]:
    """Children of a process and theirs, where there is a /proc."""
    found = []
    for listing in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, listing.read_text().split()):
                found += [child, *descendants(child)]
    return found


def alive(pid: int) -> bool:
    """Whether a process still runs; a dead one that nobody has waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def stop(child: subprocess.Popen, grace: float) -> None:
    """SIGTERM, which train_gpt.py and torchrun unwind in ``grace`` seconds; then SIGKILL, also for torchrun's workers,
    which are in sessions of their own."""
    if child.poll() is not None:
        return
    family = [*descendants(child.pid), child.pid]
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(grace)
    for pid in filter(alive, family):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    child.kill()  # where there is no /proc
    child.wait()
    while any(map(alive, family)):  # the next run must find the machine idle
        time.sleep(0.05)
