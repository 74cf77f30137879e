"""Whole runs of train_gpt.py in processes of their own.

They are timed by the lines they print, and ended once the last wanted one is there.
"""

import argparse
import os
import re
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import torch

import train_gpt as ours
from tools.bench.table import Row
from tools.processes import stop

SCRIPT = Path(ours.__file__).resolve()
PATIENCE, GRACE = 900, 15  # seconds after which a run that hangs is ended, and that it has to end by itself
PHASES = (
    ("imports, data, attention", r"^hardware "),
    ("checks", r"^checks passed"),
    ("kernels, warm-up", r"^warmed up"),
    ("first step", r"^step +1 "),
)
STEP = re.compile(r"^step +(\d+) .* loss ([\d.]+) .* ([\d.]+) ms/step")


def environment(folder: str, **settings) -> dict[str, str]:
    """The caller's environment with these settings: fixed steps, results in `folder`.

    Without its modes, which would run something else, and without its ledger, which would be overwritten.
    """
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in ("TTT_EVAL_ONLY", "QUANTIZE_ONLY", "CHECK_ONLY", "LEDGER_PATH")
    }
    return (
        kept
        | {"ARTIFACT_DIR": str(Path(folder, "run")), "MAX_WALLCLOCK_SECONDS": "0", "TTT_ENABLED": "0"}
        | {name: str(value) for name, value in settings.items()}
    )


def read(command: list[str], env: dict[str, str], last: str) -> list[tuple[float, str]]:
    """(seconds since the start, line) of all that a command prints up to the first line matching `last`.

    There it is ended. Raises SystemExit with its last lines where it ends by itself before.
    """
    seen, started = [], time.perf_counter()
    child = subprocess.Popen(
        command,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    watchdog = threading.Timer(PATIENCE, stop, [child, GRACE])
    watchdog.start()
    try:
        for line in child.stdout:
            seen.append((time.perf_counter() - started, line.rstrip()))
            if re.search(last, line):
                return seen
    finally:
        watchdog.cancel()
        stop(child, GRACE)
        child.stdout.close()
    ended = f"{shlex.join(command)} ended before a line like {last!r}. Its last lines:"
    raise SystemExit("\n".join((ended, *(line for _, line in seen[-15:]))))


# ---------------------------------------------------------------- start-up


def phases(seen: list[tuple[float, str]]) -> Iterator[tuple[str, float]]:
    """(phase, its seconds): each ends with the first line of its kind; then their sum."""
    ends = [next(seconds for seconds, line in seen if re.search(pattern, line)) for _, pattern in PHASES]
    for (name, _), (begin, end) in zip(PHASES, pairwise((0.0, *ends))):
        yield name, end - begin
    yield "process start to step 1", ends[-1]


def startup(args: argparse.Namespace) -> Iterator[Row]:
    """Seconds from the start of train_gpt.py's process to the end of its first training step.

    With empty caches of compiled kernels, and again with those that the first start has left. Settings come from the
    environment. Ratio: the cold start's seconds over this one's.
    """
    cold = {}
    for phase, caches, seconds in starts():
        cold.setdefault(phase, seconds)
        yield Row(phase, caches, seconds, cold[phase] / seconds)


def starts() -> Iterator[tuple[str, str, float]]:
    """Yields (phase, caches, seconds) of a start with empty caches, and of one that finds what the first has left."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        env = environment(folder, ITERATIONS=2, TRITON_CACHE_DIR=Path(folder, "triton"))
        for caches in ("cold caches", "warm caches"):
            for phase, seconds in phases(read([sys.executable, str(SCRIPT)], env, PHASES[-1][1])):
                yield phase, caches, seconds


# ---------------------------------------------------------------- scaling


def step_lines(seen: list[tuple[float, str]]) -> list[tuple[int, float, float]]:
    """(step, seconds since the first step began, loss) of the logged steps.

    The mean of ms/step has more digits than the seconds in the same line.
    """
    found = [match for _, line in seen if (match := STEP.search(line))]
    return [
        (int(step), int(step) * float(ms) / 1e3, float(loss)) for step, loss, ms in (match.groups() for match in found)
    ]


def step_seconds(curve: list[tuple[int, float, float]]) -> float:
    """Seconds of one step, without the first sixth, in which clocks and queues settle."""
    first, last = max((point for point in curve if point[0] <= max(curve[-1][0] // 6, 1)), default=curve[-1]), curve[-1]
    if first[0] == last[0]:
        raise SystemExit("too few logged steps to time one; more --steps")
    return (last[1] - first[1]) / (last[0] - first[0])


def scaling(args: argparse.Namespace) -> Iterator[Row]:
    """Tokens/s per GPU of the plain graph through torchrun; ratio: over that of the first run.

    MICRO_BATCH_TOKENS on each rank and step (weak scaling); with --same-batch the same tokens in all (strong scaling).
    """
    rate = None
    for ranks, tokens, seconds in scaled_runs(args.gpus, args.steps, args.same_batch):
        rate = rate or tokens / seconds
        what = f"{tokens:,} tokens a rank"
        yield Row(what, f"{ranks} rank(s)", seconds, tokens / seconds / rate, tokens / 1e3, "ktok/s a rank")


def scaled_runs(counts: list[int] | None, steps: int, same_batch: bool) -> Iterator[tuple[int, int, float]]:
    """Yields (ranks, tokens of a rank's step, seconds of a step) for each number of ranks, through torchrun.

    Each has the machine to itself.
    """
    cfg = ours.Config.from_env(os.environ)
    gpus = 0 if cfg.device == "cpu" else torch.cuda.device_count()
    counts = counts or [n for n in (1, 2, 4) if n <= (gpus or 2)]
    if gpus and max(counts) > gpus:
        raise SystemExit(f"scaling: {max(counts)} GPUs are asked for, {gpus} are here")
    # NVLink multicast belongs to the whole host, which others may share; torchrun sets the threads of several ranks,
    # not of one.
    defaults = {"NCCL_NVLS_ENABLE": "0", "OMP_NUM_THREADS": "1"}
    micro, curves = cfg.micro_batch_tokens, {}
    for n in counts:
        batch = micro * (max(counts) if same_batch else n)
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            # Loops that never begin: only plain steps are timed.
            env = defaults | environment(
                folder,
                TRAIN_BATCH_TOKENS=batch,
                MICRO_BATCH_TOKENS=micro,
                ITERATIONS=steps,
                TRAIN_LOG_EVERY=10,
                ENABLE_LOOPING_AT=2,
            )
            command = [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                f"--nproc_per_node={n}",
                str(SCRIPT),
            ]
            curves[n] = curve = step_lines(read(command, env, r"^trained \d+ steps"))
        print(
            f"{n} rank(s), {batch:,} tokens a step, loss by step: "
            + "  ".join(f"{step}: {loss:.4f}" for step, _, loss in curve),
            flush=True,
        )
        yield n, batch // n, step_seconds(curve)
    if same_batch:
        reference = [loss for *_, loss in curves[counts[0]]]
        for n in counts[1:]:
            most = max(abs(other - loss) for (*_, other), loss in zip(curves[n], reference))
            print(f"loss on {n} and on {counts[0]} rank(s): they differ by at most {most:.4f}")
