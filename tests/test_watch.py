"""tools/watch.py: runs drawn from their logs while they go."""

import os
import re
import time

import pytest

from tools import watch

LINE = "step {:6d}  {:5.1f} %  loss {:.4f}  lr x 1.000    480.2 ms/step        2,132 tokens/s  {:6.1f} s, 160 s left\n"


def log(folder, losses, end: str = "", head: str = "hardware CPU\n") -> None:
    folder.mkdir(exist_ok=True)
    steps = (LINE.format(10 * i, i, loss, 2.5 * i) for i, loss in enumerate(losses))
    (folder / "train.log").write_text(head + "".join(steps) + end)


def shown(capsys, *argv) -> str:
    assert watch.main([*map(str, argv), "--once"]) == 0
    return capsys.readouterr().out


def test_points_and_state_come_from_the_log(tmp_path):
    log(tmp_path / "a", [9, 5, 4, 3.5])
    run = watch.read_run(tmp_path / "a", "step")
    assert run.points == [(0, 9), (10, 5), (20, 4), (30, 3.5)] and not run.ended
    assert watch.read_run(tmp_path / "a" / "train.log", "seconds").points[-1] == (7.5, 3.5)
    assert run.state.startswith("step     30")


def test_the_lines_are_those_that_train_gpt_writes():
    """On the log of a real run."""
    from helpers import base_run, result

    run = watch.read_run(base_run(), "step")
    curve = result(base_run())["training"]["curve"]
    assert run.points == [(step, pytest.approx(loss, abs=1e-4)) for step, _, loss, _ in curve]
    assert run.ended and "val_bpb" in run.state


def test_the_latest_bpb_of_a_run_that_scores_meanwhile(tmp_path):
    lines = (
        "step     10: 2.5000 BPB of the first validation documents\nstep    100: 1.2345 BPB of the first validation\n"
    )
    log(tmp_path / "a", [9, 5], lines + LINE.format(110, 1, 3.2, 9))
    run = watch.read_run(tmp_path / "a", "step")
    assert run.state.startswith("1.2345 BPB at step 100 | step    110") and len(run.points) == 3


@pytest.mark.parametrize("end", ["val_bpb 1.234567\nwhat to do next\n", "no val_bpb: C3 failed\n"])
def test_a_run_that_ended(tmp_path, end):
    log(tmp_path / "a", [5, 4], end)
    run = watch.read_run(tmp_path / "a", "step")
    assert run.ended and run.state == end.splitlines()[0]
    with open(tmp_path / "a" / "train.log", "a") as f:
        f.write("hardware CPU\ncalibrating\n")  # QUANTIZE_ONLY=1 goes on in the same log
    run = watch.read_run(tmp_path / "a", "step")
    assert not run.ended and run.state == "calibrating"


def test_a_run_that_has_not_begun_is_waited_for(tmp_path, capsys):
    log(tmp_path / "a", [5, 4])
    assert "later: no train.log yet" in shown(capsys, tmp_path / "a", tmp_path / "later")
    log(tmp_path / "empty", [], head="")
    assert "nothing in its log yet" in shown(capsys, tmp_path / "empty")


def test_a_silent_run_says_so(tmp_path, capsys):
    log(tmp_path / "a", [5, 4])
    old = time.time() - 600
    os.utime(tmp_path / "a" / "train.log", (old, old))
    assert "a: no line for 10 min, the last: step" in shown(capsys, tmp_path / "a")


def test_a_log_that_only_scores(tmp_path):
    log(tmp_path / "a", [5, 4], "val_bpb 1.0\n")
    (tmp_path / "a" / "eval.log").write_text("hardware CPU\n   11.8 %  BPB so far 2.0074\n")
    new = time.time() + 5
    os.utime(tmp_path / "a" / "eval.log", (new, new))
    assert watch.read_run(tmp_path / "a", "step").state == "11.8 %  BPB so far 2.0074"


@pytest.mark.parametrize("braille", [False, True])
@pytest.mark.parametrize("size", [(100, 24), (30, 8)])
def test_a_falling_loss_falls_on_the_screen(tmp_path, size, braille):
    log(tmp_path / "a", [99, *(4 - i / 100 for i in range(200))])
    text = watch.picture([watch.read_run(tmp_path / "a", "step")], "step", size, False, braille)
    lines = text.splitlines()
    assert len(lines) <= size[1] and max(map(len, lines)) <= size[0]
    assert text.isascii() != braille
    body = [line[9:] for line in lines[:-2]]
    places = [(row, column) for row, line in enumerate(body) for column, sign in enumerate(line) if sign.strip()]
    columns = {column for _, column in places}
    assert len(columns) > 0.8 * len(body[0].rstrip())  # a curve without gaps
    tops = [min(row for row, column in places if column == at) for at in sorted(columns)]
    assert tops == sorted(tops) and tops[-1] > tops[0]
    assert not re.search(r"99\.", text)  # the first steps, which fall steeply, are out of the picture


def test_two_runs_have_two_colours(tmp_path):
    for name, losses in (("a", [5, 4, 3]), ("b", [5, 4.5, 4])):
        log(tmp_path / name, losses)
    runs = [watch.read_run(tmp_path / name, "step") for name in "ab"]
    assert set(re.findall(r"\033\[(\d+)m", watch.picture(runs, "step", (80, 20), True, True))) == {"0", "34", "33"}


@pytest.mark.parametrize("losses", [[5], [5, 5, 5], [float("nan")]])
def test_little_to_draw(tmp_path, capsys, losses):
    log(tmp_path / "a", losses)
    assert "a: step" in shown(capsys, tmp_path / "a")


def test_pictures_go_on_until_all_have_ended(tmp_path, monkeypatch):
    log(tmp_path / "a", [5, 4])
    naps = []

    def nap(seconds):
        naps.append(seconds)
        if len(naps) == 2:
            log(tmp_path / "a", [5, 4, 3], "val_bpb 1.0\n")

    class Terminal:
        encoding, text = "utf-8", ""

        def isatty(self):
            return True

        def write(self, text):
            self.text += text

        def flush(self):
            pass

    terminal = Terminal()
    monkeypatch.setattr(watch.time, "sleep", nap)
    monkeypatch.setattr(watch.sys, "stdout", terminal)
    assert watch.main([str(tmp_path / "a"), "--every", "0.5"]) == 0
    assert naps == [0.5, 0.5] and terminal.text.count("\033[H") == 3 and "ended a: val_bpb 1.0" in terminal.text
