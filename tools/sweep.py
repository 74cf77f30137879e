"""Runs of train_gpt.py over seeds and settings, one after another.

    python tools/sweep.py --recipe best --scale full --seeds 42 314 1234     three seeds, torchrun over all GPUs here
    python tools/sweep.py --recipe best --scale demo --seeds 1 2 3           the same on a CPU, minutes
    python tools/sweep.py --recipe best --set MATRIX_LR=0.022,0.026,0.03 MUON_WD=0.08,0.095    a grid: six runs
    python tools/sweep.py --eval-only runs/42 --set TTT_LOCAL_LR_MULT=0.5,1,2
                                         the artifact of runs/42, scored by its own script under other settings

A recipe is a file of settings in recipes/, a scale (demo, rehearsal, full) one that is laid over it; --set comes last.
Values of a number are separated by commas, of a text setting (TTT_CHUNKS=8,16;16,32) by semicolons. Exported paths,
DEVICE and ATTENTION are passed on; other exported settings are not, and named.

Each run has a folder in --out. Every attempt, failed and bad ones too, is a line in runs.jsonl there, which only ever
grows. The same command again goes on where it stopped: runs that ended well with these settings and this script are not
repeated. Ctrl-C ends the current run cleanly and says how to go on. --dry-run writes nothing.

How long a run takes is known once one has ended: of the first only what its budgets allow is said.
"""

import argparse
import fcntl
import hashlib
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

if not __package__:  # run as a file
    import anywhere  # noqa: F401

from tools.processes import stop

ROOT = Path(__file__).resolve().parents[1]

PASSED_ON = ("DATA_PATH", "TOKENIZER_PATH", "DEVICE", "ATTENTION", "FA3_LIBRARY")


class SweepError(Exception):
    """A problem that the user can act on; printed as one line."""


# ---------------------------------------------------------------- what to run


@dataclass
class Planned:
    name: str  # of its folder
    point: str  # the settings that --set varies, as text: what its seeds have in common
    settings: dict[str, str]
    key: str  # hash of all that decides the result: settings, script, command
    resolved: tuple  # what the settings mean, so that 0.02 and 0.020 are seen to be the same run


def read_recipe(path: Path) -> dict[str, str]:
    """NAME=value lines of a recipe, in order; what follows # is a comment."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        known = ", ".join(sorted(p.stem for p in (ROOT / "recipes").glob("*.env")))
        raise SweepError(f"{path}: {error.strerror}; known are {known}") from None
    settings = {}
    for number, line in enumerate(lines, 1):
        line = line.split("#", 1)[0].strip()
        if not line:
            continue
        if not re.fullmatch(r"[A-Z][A-Z0-9_]*=\S*", line):
            raise SweepError(f"{path}: line {number} is not NAME=value: {line}")
        name, value = line.split("=", 1)
        settings[name] = value
    return settings


def grid_of(assignments: list[str]) -> list[dict[str, str]]:
    """KEY=V1,V2 ... as every combination, in the order given."""
    import dataclasses

    from train_gpt import Config

    texts = {f.name.upper() for f in dataclasses.fields(Config) if isinstance(f.default, str)}
    axes = []
    for text in assignments:
        name, equals, values = text.partition("=")
        if not equals or not name:
            raise SweepError(f"--set {text}: must be KEY=VALUE or KEY=V1,V2")
        axes.append([(name, value) for value in values.split(";" if name in texts else ",")])
    if len({axis[0][0] for axis in axes}) < len(axes):
        raise SweepError("--set names a setting twice")
    return [dict(point) for point in itertools.product(*axes)]


def plan(args: argparse.Namespace) -> list[Planned]:
    import dataclasses

    from train_gpt import Config, UserError

    base = settings_of_files(args) | {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    script = hashlib.sha256(script_of(args).read_bytes()).hexdigest()
    planned, grid = [], grid_of(args.set)
    fixed = "-".join(f"{name}={value}" for name, value in grid[0].items() if len({point[name] for point in grid}) == 1)
    if len(fixed) > 40:
        fixed = f"set{hashlib.sha256(fixed.encode()).hexdigest()[:8]}"
    for point in grid:
        for seed in args.seeds:
            settings = base | point | ({"SEED": str(seed)} if seed is not None else {})
            known = {name: value for name, value in settings.items() if name != "OMP_NUM_THREADS"}
            try:
                cfg = Config.from_env(known, check=not args.eval_only)
            except UserError as error:
                raise SweepError(f"{args.recipe}, scale {args.scale}: {error}") from None
            varied = [f"{name}={value}" for name, value in point.items() if len({other[name] for other in grid}) > 1]
            parts = [args.recipe or "eval", args.scale, fixed, *varied, f"seed{seed}" if seed is not None else None]
            name = re.sub(r"[^\w.=,@+-]", "_", "-".join(part for part in parts if part))
            if len(name) > 120:
                name = f"{name[:100]}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"
            whole = json.dumps([settings, script, args.nproc, str(args.eval_only)], sort_keys=True)
            key = hashlib.sha256(whole.encode()).hexdigest()[:16]
            planned.append(Planned(name, " ".join(varied), settings, key, dataclasses.astuple(cfg)))
    refuse_equal(planned)
    return planned


def settings_of_files(args: argparse.Namespace) -> dict[str, str]:
    """Those of the recipe, and over them those of the scale."""
    settings = {}
    for file in ([args.recipe] if args.recipe else []) + ([f"scale_{args.scale}"] if args.scale else []):
        settings |= read_recipe(ROOT / "recipes" / f"{file}.env")
    return settings


def refuse_equal(planned: list[Planned]) -> None:
    """Two runs with the same seed and settings give the same result twice, and a mean over them would be a lie."""
    first = {}
    for run in planned:
        twin = first.setdefault(run.resolved, run)
        if twin is not run:
            raise SweepError(f"{run.name} is planned twice (as {twin.name}); give each seed and value once")


def replaced_by_exports(args: argparse.Namespace, runs: list[Planned]) -> list[str]:
    """What the recipe or the scale sets and an exported variable replaces, one line each."""
    return [
        f"exported {name}={os.environ[name]} replaces {name}={value} of the recipe or scale; unset it, or use --set"
        for name, value in settings_of_files(args).items()
        if name in PASSED_ON and os.environ.get(name, value) != value
        if any(run.settings[name] == os.environ[name] for run in runs)
    ]


def script_of(args: argparse.Namespace) -> Path:
    return args.eval_only / "train_gpt.py" if args.eval_only else ROOT / "train_gpt.py"


def command_of(run: Planned, folder: Path, args: argparse.Namespace) -> tuple[list[str], dict[str, str]]:
    """Command line and environment of one run. An artifact is copied into the run's folder, so that its own results
    stay as they are."""
    script = folder / "train_gpt.py" if args.eval_only else script_of(args)
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={args.nproc}"] if args.nproc > 1 else []
    )
    inherited = {name: value for name, value in os.environ.items() if name not in foreign_settings()}
    mode = {"TTT_EVAL_ONLY": "1"} if args.eval_only else {}
    return [sys.executable, *launcher, str(script)], inherited | run.settings | mode | {"ARTIFACT_DIR": str(folder)}


def foreign_settings() -> list[str]:
    """Settings that happen to be exported and are not ours to pass on."""
    import dataclasses

    from train_gpt import OUR_PREFIXES, Config

    names = {f.name.upper() for f in dataclasses.fields(Config)}
    return sorted(
        name for name in os.environ if (name in names or name.startswith(OUR_PREFIXES)) and name not in PASSED_ON
    )


# ---------------------------------------------------------------- the list of all runs


class Journal:
    """runs.jsonl: one line when a run starts and one when it ends, in whatever way. Lines are only ever appended; a
    lock keeps a second sweep out. One that only reads makes no file and waits for nobody."""

    def __init__(self, path: Path, writes: bool = True):
        self.path = path
        if not writes:
            lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
            self.entries = [entry for line in lines if (entry := self.parsed(line))]
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(path, "a+", encoding="utf-8")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise SweepError(f"{path}: another sweep is writing there; wait for it or give another --out") from None
        self.file.seek(0)
        self.entries = [entry for line in self.file if (entry := self.parsed(line))]
        if self.entries and not self.last_line_ends():
            # A line that a kill cut off stays as it is, unreadable, and the next begins behind it.
            self.file.write("\n")

    @staticmethod
    def parsed(line: str) -> dict | None:
        try:
            return json.loads(line)
        except ValueError:
            return None

    def last_line_ends(self) -> bool:
        return self.path.read_bytes().endswith(b"\n")

    def append(self, **entry) -> None:
        self.entries.append(entry)
        self.file.write(json.dumps(entry) + "\n")
        self.file.flush()
        os.fsync(self.file.fileno())

    def done(self, run: Planned, folder: Path) -> dict | None:
        """The line of a run that ended well and whose result is still there."""
        found = [
            e
            for e in self.entries
            if e["key"] == run.key and e["event"] == "end" and e["status"] == "ok" and (folder / e["result"]).exists()
        ]
        return found[-1] if found else None

    def seconds_like(self, run: Planned, args: argparse.Namespace) -> list[float]:
        """Durations of earlier runs like this one, on the same hardware: those that differ in the seed alone, or where
        there are none, all of this recipe and scale."""
        ended = [
            e for e in self.entries if e["event"] == "end" and e["status"] == "ok" and e["shape"] == shape_of(args)
        ]
        unseeded = lambda settings: {name: value for name, value in settings.items() if name != "SEED"}
        alike = [e for e in ended if unseeded(e["settings"]) == unseeded(run.settings)]
        return [e["seconds"] for e in alike or ended]


# ---------------------------------------------------------------- time and cost


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


class Bounds(NamedTuple):
    """What the runs of a sweep take, in seconds: at least and at most. Measured, the two are equal."""

    least: float
    most: float

    def times(self, factor: float, form: Callable[[float], str]) -> str:
        least, most = form(self.least * factor), form(self.most * factor)
        return least if least == most else f"{least} to {most}"


def expected_seconds(run: Planned, journal: Journal, args: argparse.Namespace) -> Bounds | None:
    """Seconds of one run: measured on earlier ones; else what its budgets allow; None where no clock ends it."""
    if earlier := journal.seconds_like(run, args):
        return Bounds(statistics.fmean(earlier), statistics.fmean(earlier))
    from train_gpt import Config

    value = lambda name: float(run.settings.get(name.upper(), getattr(Config(), name)))
    budget = value("max_wallclock_seconds")
    if not budget:
        return None
    if args.eval_only:
        return Bounds(0, budget)
    return Bounds(budget - value("gptq_reserve_seconds"), 2 * budget)


def estimate(runs: list[Planned], journal: Journal, args: argparse.Namespace) -> str:
    """How long these runs will take and what they will cost, and on what that rests."""
    each = [expected_seconds(run, journal, args) for run in runs]
    free = args.gpu_hour_price is not None and args.device == "cpu"
    why = (
        "; no cost: the runs are on the CPU, and the price is a GPU's (--set DEVICE=cuda where one is)" if free else ""
    )
    if None in each:
        also = " and the cost" if args.gpu_hour_price is not None and not free else ""
        unknown = f"{len(runs)} run(s); no clock ends them (MAX_WALLCLOCK_SECONDS=0)"
        return f"{unknown}: the first one will tell the time{also}{why}"
    total = Bounds(sum(one.least for one in each), sum(one.most for one in each))
    earlier = len(journal.seconds_like(runs[0], args))
    basis = f"mean of {earlier} earlier run(s) here" if earlier else "what the budgets allow; the first one will tell"
    text = f"{len(runs)} run(s) of {each[0].times(1, duration)} ({basis}): {total.times(1, duration)} in all"
    if args.gpu_hour_price is None or free:
        return text + why
    hours = args.nproc / 3600
    cost = total.times(hours * args.gpu_hour_price, "{:,.2f}".format)
    return f"{text}, {total.times(hours, '{:,.2f}'.format)} GPU hours, {cost} at {args.gpu_hour_price:g} an hour"


def shape_of(args: argparse.Namespace) -> list:
    """What runs of about the same length have in common."""
    return [args.recipe, args.scale, args.nproc, bool(args.eval_only), args.device]


# ---------------------------------------------------------------- running


def execute(run: Planned, folder: Path, args: argparse.Namespace, status) -> int:
    """The run in a session of its own, its output kept in console.log; status(line) sees each line. Returns the exit
    status."""
    command, env = command_of(run, folder, args)
    with open(folder / "console.log", "a", encoding="utf-8") as log:
        settings = " ".join(f"{name}={shlex.quote(value)}" for name, value in run.settings.items())
        log.write(f"\n==== {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC: {settings} {shlex.join(command)}\n")
        log.flush()
        child = subprocess.Popen(
            command,
            env=env,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        try:
            for line in child.stdout:
                log.write(line)
                log.flush()
                status(line.rstrip())
            return child.wait()
        finally:
            stop(child, grace=30)


class Status:
    """The last line of the run now and then, with the time that is left for the whole sweep."""

    def __init__(self, head: str, expected: float | None, later: float):
        self.head = head
        self.expected = expected  # None: no run like this one has ended yet
        self.later = later
        self.begun = time.monotonic()
        self.shown = 0.0

    def __call__(self, line: str) -> None:
        now = time.monotonic()
        if line.startswith(("error:", "Traceback")) or now - self.shown > 10:
            self.shown = now
            left = ""
            if self.expected is not None:
                left = f", about {duration(max(self.expected - (now - self.begun), 0) + self.later)} left in all"
            print(f"{self.head} {duration(now - self.begun)}{left} | {line.strip()[:110]}", flush=True)


def run_all(runs: list[Planned], journal: Journal, args: argparse.Namespace) -> list[dict]:
    result_file, ends = "eval_result.json" if args.eval_only else "result.json", []
    waiting = [run for run in runs if not journal.done(run, args.out / run.name)]
    print(
        f"{len(runs) - len(waiting)} of {len(runs)} run(s) done before"
        + (f"; {estimate(waiting, journal, args)}" if waiting else ""),
        flush=True,
    )
    for number, run in enumerate(runs, 1):
        folder, head = args.out / run.name, f"[{number}/{len(runs)}] {run.name}"
        if done := journal.done(run, folder):
            ends.append(done)
            continue
        waiting.remove(run)
        folder.mkdir(parents=True, exist_ok=True)
        if args.eval_only:
            for file in ("train_gpt.py", "model.bin"):
                shutil.copyfile(args.eval_only / file, folder / file)
        (folder / result_file).unlink(missing_ok=True)  # what stands there later is this run's
        shared = {
            "name": run.name,
            "point": run.point,
            "key": run.key,
            "shape": shape_of(args),
            "settings": run.settings,
        }
        journal.append(event="start", at=f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}", **shared)
        begun, code = time.monotonic(), None
        try:
            code = execute(run, folder, args, status_of(head, run, waiting, journal, args))
        finally:
            end = outcome(folder / result_file, code)
            journal.append(
                event="end",
                at=f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
                seconds=round(time.monotonic() - begun, 1),
                **end,
                **shared,
            )
        ends.append(journal.entries[-1])
        print(f"{head}: {end['status']}, {summary(end)}", flush=True)
        if waiting and code == 0:
            print(f"left: {estimate(waiting, journal, args)}", flush=True)
    return ends


def status_of(head: str, run: Planned, waiting: list[Planned], journal: Journal, args: argparse.Namespace) -> Status:
    """The status line of a run; it tells the time that is left where earlier runs do."""
    if not journal.seconds_like(run, args):
        return Status(head, None, 0)
    one, *later = (expected_seconds(each, journal, args).most for each in [run, *waiting])
    return Status(head, one, sum(later))


def outcome(path: Path, code: int | None) -> dict:
    """How a run ended; code None: it was interrupted."""
    entry = {"status": "interrupted" if code is None else "failed" if code else "ok", "exit": code, "result": path.name}
    if code == 0:
        result = json.loads(path.read_text(encoding="utf-8"))
        entry |= {
            "val_bpb": result.get("val_bpb"),
            "bpb": result["bpb"],
            "bytes": result["bytes"].get("total"),
            "settings_sha256": result["settings_sha256"],
            "source_sha256": result["source_sha256"],
            "failed": [c for c, v in result["verdicts"].items() if v["verdict"] == "FAIL"],
        }
    return entry


def summary(end: dict) -> str:
    if end["status"] != "ok":
        return f"exit status {end['exit']}; see console.log in its folder"
    stages = ", ".join(f"{stage} {value:.5f}" for stage, value in end["bpb"].items())
    return (
        f"val_bpb {end['val_bpb']:.6f}"
        if end["val_bpb"] is not None
        else f"no val_bpb, {', '.join(end['failed'])} FAIL"
    ) + f" ({stages}), {end['bytes'] or 0:,} bytes"


def closing_table(runs: list[Planned], ends: list[dict]) -> str:
    """Mean and sample standard deviation of val_bpb over the seeds of each point."""
    lines = []
    for point in dict.fromkeys(run.point for run in runs):
        mine = [end for run, end in zip(runs, ends) if run.point == point]
        values = [end["val_bpb"] for end in mine if end["status"] == "ok" and end["val_bpb"] is not None]
        spread = f" +- {statistics.stdev(values):.6f}" if len(values) > 1 else ""
        lines.append(
            f"  {point or 'as the recipe says':40s} {len(values)} of {len(mine)} with a val_bpb"
            + (f", mean {statistics.fmean(values):.6f}{spread}" if values else "")
        )
    return "\n".join(lines)


# ---------------------------------------------------------------- command line


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--recipe",
        help="name of a file in recipes/ (default: best; with --eval-only none: the artifact's own settings)",
    )
    parser.add_argument("--scale", help="demo, rehearsal or full (default: full)")
    parser.add_argument(
        "--seeds", nargs="+", type=int, metavar="SEED", help="default: the script's; with --eval-only the artifact's"
    )
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=V1,V2",
        help="settings laid over the recipe; several values make a grid",
    )
    parser.add_argument(
        "--eval-only",
        type=Path,
        metavar="ARTIFACT",
        help="folder with train_gpt.py and model.bin: score it, train nothing",
    )
    parser.add_argument(
        "--nproc",
        type=int,
        help="processes, one for each GPU (default: all GPUs of this machine, 1 without or with DEVICE=cpu)",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/sweep"), help="default: runs/sweep")
    parser.add_argument(
        "--gpu-hour-price", type=float, metavar="PRICE", help="of one GPU, for the estimate of the cost"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the runs and the estimate; write nothing")
    args = parser.parse_args(argv)
    if args.eval_only:
        if missing := [name for name in ("train_gpt.py", "model.bin") if not (args.eval_only / name).is_file()]:
            raise SweepError(
                f"--eval-only {args.eval_only}: has no {' and no '.join(missing)}; give the ARTIFACT_DIR of a "
                "finished run"
            )
    else:
        args.recipe, args.scale = args.recipe or "best", args.scale or "full"
    if args.seeds and any(text.startswith("SEED=") for text in args.set):
        raise SweepError("--seeds and --set SEED=... both give seeds; use one of them")
    if args.gpu_hour_price is not None and not args.gpu_hour_price >= 0:
        raise SweepError(f"--gpu-hour-price {args.gpu_hour_price:g}: must not be below 0")
    args.seeds = args.seeds or [None]
    args.out = args.out.resolve()
    return args


def find_hardware(runs: list[Planned]) -> tuple[str, int]:
    """What the runs will be on, "cpu" or a GPU's name, and how many of them this machine has."""
    import torch

    device = runs[0].settings.get("DEVICE", "auto")
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return "cpu", 1
    return (torch.cuda.get_device_name() if torch.cuda.is_available() else "cuda"), max(torch.cuda.device_count(), 1)


def sweep(args: argparse.Namespace) -> int:
    given = args.nproc
    args.nproc = given or 1
    runs = plan(args)
    args.device, found = find_hardware(runs)
    if given is None and found > 1:
        args.nproc = found
        runs = plan(args)  # the key of a run holds the number of processes
    if ignored := foreign_settings():
        print(f"exported but not passed on: {', '.join(ignored)}; use --set", file=sys.stderr)
    for line in replaced_by_exports(args, runs):
        print(line, file=sys.stderr)
    if args.dry_run:
        journal = Journal(args.out / "runs.jsonl", writes=False)
        print("\n".join(f"{run.name}" for run in runs), estimate(runs, journal, args), sep="\n")
        return 0
    journal = Journal(args.out / "runs.jsonl")
    ends = run_all(runs, journal, args)
    here = lambda path: path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    folders = " ".join(
        shlex.quote(str(here(args.out / run.name))) for run, end in zip(runs, ends) if end["status"] == "ok"
    )
    print(
        closing_table(runs, ends),
        *([f"tables and plots: python tools/report.py {folders}"] if folders else []),
        sep="\n",
    )
    return 1 if any(end["status"] != "ok" for end in ends) else 0


def main(argv: list[str] | None = None) -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        return sweep(parse_args(argv))
    except SweepError as error:
        print(f"sweep.py: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"sweep.py: {error.filename or 'a file'}: {error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nsweep.py: interrupted; the same command goes on from here", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
