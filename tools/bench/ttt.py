"""One artifact adapted under several settings, one after another in one process, on the same documents."""

import argparse
import os
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import train_gpt as ours
from tools.anatomy import anatomy
from tools.bench.table import Row


class Silent(ours.Log):
    """Keeps the lines of a pass out of the table."""

    def __init__(self):
        self.main = False


def variants(environment: dict[str, str], lines: list[str]) -> Iterator[tuple[str, ours.Config]]:
    """(settings as given, the artifact's settings with these laid over them) for each line of NAME=value words.

    An empty line changes nothing.
    """
    for line in lines:
        yield line or "as stored", ours.configure(environment | dict(word.split("=", 1) for word in shlex.split(line)))


def ttt(args: argparse.Namespace) -> Iterator[Row]:
    """BPB and targets/s of test-time training under each --set, on the same artifact and documents.

    None of it is a result: settings other than the artifact's make C4 DISPUTED.
    """
    rows = list(passes(args.artifact, dict(os.environ), args.set or [""], args.budget))
    for line, bpb, capture, seconds, targets in rows:
        what = f"{bpb:.5f} BPB, captured in {capture:.1f} s"
        yield Row(what, line, seconds, rows[0][3] / seconds, targets, "targets/s")


def passes(
    folder: Path, environment: dict[str, str], lines: list[str], budget: float
) -> Iterator[tuple[str, float, float, float, int]]:
    """Yields (settings, BPB, seconds to capture, seconds of adaptation, targets).

    Passes that would begin after `budget` seconds are left out.
    """
    began, environment = time.perf_counter(), environment | {"ARTIFACT_DIR": str(folder), "TTT_EVAL_ONLY": "1"}
    first = ours.configure(environment)
    run = ours.Run(first)
    run.prepare()
    model = run.new_model().to(run.ranks.device)
    weights = ours.unflatten(ours.load_artifact(folder / "model.bin")[0]).state()
    for line, cfg in variants(environment, lines):
        if time.perf_counter() - began > budget:
            print(f"left out, {budget:.0f} s are over: {line}", file=sys.stderr)
            continue
        model.cfg = cfg
        ours.load_state(model, weights, folder)  # phases of the pass before have changed them
        scoring = run.scoring(model, "ttt")._replace(cfg=cfg)
        marks = [time.perf_counter()]
        adaptation = ours.TestTimeTraining(scoring._replace(log=Silent()))
        marks.append(time.perf_counter())
        bpb = adaptation.score()
        run.ranks.synchronize()
        marks.append(time.perf_counter())
        parts = anatomy(scoring.ledger.nats, run.val.target_bytes, run.val.starts)
        bands = " ".join(f"{band['bpb']:.4f}" for band in parts["bpb_by_position"])
        capture = marks[1] - marks[0]
        seconds = marks[2] - marks[1]
        rate = run.val.targets / seconds
        print(
            f"{bpb:.5f} BPB  {rate:8,.0f} targets/s  capture {capture:5.1f} s  by position {bands}  {line}", flush=True
        )
        yield line, bpb, capture, seconds, run.val.targets
        del adaptation
