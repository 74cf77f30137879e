"""`bench.py ttt`: one artifact adapted under several settings, one after another in one process, on the same documents."""

import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import train_gpt as ours


class Silent(ours.Log):
    """Keeps the lines of a pass out of the table."""

    def __init__(self):
        self.main = False


def variants(environment: dict[str, str], lines: list[str]) -> Iterator[tuple[str, ours.Config]]:
    """(settings as given, the artifact's settings with these laid over them) for each line of NAME=value words; an empty line changes nothing."""
    for line in lines:
        yield line or "as stored", ours.configure(environment | dict(word.split("=", 1) for word in shlex.split(line)))


def ttt(
    folder: Path, environment: dict[str, str], lines: list[str], budget: float
) -> Iterator[tuple[str, float, float, float, int]]:
    """Yields (settings, BPB, seconds to capture, seconds of adaptation, targets). Passes that would begin after ``budget`` seconds are left out."""
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
        adaptation.prepare()
        marks.append(time.perf_counter())
        bpb = adaptation.score()
        run.ranks.synchronize()
        marks.append(time.perf_counter())
        print(
            f"{bpb:.5f} BPB  {run.val.targets / (marks[2] - marks[1]):8,.0f} targets/s  "
            f"capture {marks[1] - marks[0]:5.1f} s  {line}",
            flush=True,
        )
        yield line, bpb, marks[1] - marks[0], marks[2] - marks[1], run.val.targets
        del adaptation
