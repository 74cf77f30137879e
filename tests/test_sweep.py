"""tools/sweep.py: what it plans, that it remembers every run, and goes on where it stopped."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import ROOT, RUN, base_run, clean_environ, data, environment

from tools import sweep

STUB = """
import json, os, sys, time
from pathlib import Path
if os.environ.get("DATA_PATH") == "/nowhere":
    sys.exit("error: DATA_PATH=/nowhere has no shards")
print("step 1", flush=True)
if os.environ["ITERATIONS"] == "100000":
    time.sleep(100)
seed = int(os.environ["SEED"])
result = {"bpb": {"quantized": 1.0 + seed}, "val_bpb": 1.0 + seed, "bytes": {"total": 5}}
result |= {"settings_sha256": "", "source_sha256": "", "verdicts": {}}
(Path(os.environ["ARTIFACT_DIR"]) / "result.json").write_text(json.dumps(result))
"""  # what the sweep needs of a run, without the seconds to import torch
FAST = ["TTT_ENABLED=0", *(f"{k}={v}" for k, v in environment(RUN).items() if k not in ("DEVICE", "DATA_PATH"))]


@pytest.fixture(autouse=True)
def paths(monkeypatch):
    for name in sweep.foreign_settings():
        monkeypatch.delenv(name)
    for name, value in {"DATA_PATH": str(data()), "DEVICE": "cpu", "OMP_NUM_THREADS": "1"}.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def stub(monkeypatch, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("stub") / "train_gpt.py"
    path.write_text(STUB)
    monkeypatch.setattr(sweep, "script_of", lambda args: path)
    return path


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "runs.jsonl").read_text().splitlines()]


def planned(*argv: str):
    args = sweep.parse_args([*argv])
    args.nproc = 1
    return sweep.plan(args)


def test_a_grid_is_every_combination_for_every_seed():
    runs = planned("--seeds", "1", "2", "--set", "MATRIX_LR=0.02,0.03", "TTT_CHUNKS=8,16;16,32")
    assert runs[0].point == "MATRIX_LR=0.02 TTT_CHUNKS=8,16" and planned("--set", "MATRIX_LR=0.02")[0].point == ""
    assert [(r.settings["SEED"], r.settings["MATRIX_LR"], r.settings["TTT_CHUNKS"]) for r in runs] == [
        (seed, lr, chunks) for lr in ("0.02", "0.03") for chunks in ("8,16", "16,32") for seed in ("1", "2")
    ]
    assert len({r.name for r in runs}) == len({r.key for r in runs}) == 8


def test_scale_lies_over_recipe_and_set_over_both():
    run = planned("--recipe", "ngram_progressive", "--scale", "demo", "--set", "MODEL_DIM=64")[0]
    assert (run.settings["MODEL_DIM"], run.settings["NUM_LAYERS"], run.settings["LEAKY_RELU_SQ_SLOPE"]) == (
        "64",
        "2",
        "0.3",
    )


@pytest.mark.parametrize(
    "argv, complaint",
    [
        (["--recipe", "bset"], "known are best"),
        (["--scale", "tiny"], "scale_tiny.env"),
        (["--set", "MATRIX_LR"], "KEY=VALUE"),
        (["--set", "MATRIX_LRX=1"], "MATRIX_LR"),
        (["--set", "NUM_HEADS=7"], "NUM_HEADS"),
        (["--set", "SEED=1", "SEED=2"], "twice"),
        (["--seeds", "1", "1"], "planned twice"),
        (["--eval-only", "/nowhere"], "no train_gpt.py"),
    ],
)
def test_a_bad_plan_is_one_line(argv, complaint, tmp_path, capsys):
    assert sweep.main([*argv, "--out", str(tmp_path / "o"), "--nproc", "1"]) == 2
    err = capsys.readouterr().err
    assert complaint in err and err.count("\n") == 1 and not (tmp_path / "o" / "runs.jsonl").exists()


@pytest.mark.parametrize(
    "argv",
    [
        ["--seeds", "1", "1"],
        ["--set", "MATRIX_LR=0.02,0.020"],
        ["--set", "SEED=3,3"],
        ["--set", "SEED=1,2", "--seeds", "3"],
    ],
)
@pytest.mark.parametrize("dry", [["--dry-run"], []])
def test_equal_runs_are_refused(argv, dry, tmp_path, capsys):
    assert sweep.main([*argv, *dry, "--out", str(tmp_path / "o"), "--nproc", "1"]) == 2
    err = capsys.readouterr().err
    assert ("planned twice" in err or "both give seeds" in err) and err.count("\n") == 1
    assert not (tmp_path / "o").exists()


def dry_run(capsys, out: Path, *argv: str) -> tuple[str, str]:
    assert sweep.main([*argv, "--dry-run", "--out", str(out)]) == 0
    return capsys.readouterr()


def test_before_the_first_run_only_what_the_budgets_allow_is_said(tmp_path, capsys):
    argv = ("--seeds", "1", "2", "3", "--nproc", "8", "--gpu-hour-price", "2.5", "--set", "DEVICE=cuda")
    out, _ = dry_run(capsys, tmp_path / "o", *argv)
    # 588 s of steps to 2 * 600 s, three times, on 8 GPUs
    assert "3 run(s) of 9 min 48 s to 20 min 0 s (what the budgets allow" in out
    assert "29 min 24 s to 1 h 0 min in all, 3.92 to 8.00 GPU hours, 9.80 to 20.00 at 2.5" in out
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    "settings, said",
    [
        (["DEVICE=cpu"], "no cost: the runs are on the CPU"),
        (["DEVICE=auto"], "no cost: the runs are on the CPU"),
        (["DEVICE=cpu", "MAX_WALLCLOCK_SECONDS=0"], "will tell the time; no cost: the runs are on the CPU"),
        (["DEVICE=cuda", "MAX_WALLCLOCK_SECONDS=0"], "will tell the time and the cost"),
    ],
)
def test_where_no_cost_is_printed_it_says_why(settings, said, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert said in dry_run(capsys, tmp_path, "--gpu-hour-price", "2", "--nproc", "1", "--set", *settings)[0]


def test_estimates_come_from_the_first_run(tmp_path, capsys, stub):
    argv = ["--seeds", "1", "2", "--set", *FAST, "--nproc", "1"]
    assert sweep.main([*argv, "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "no clock ends them" in out.splitlines()[0]
    assert "left: 1 run(s) of " in out and "mean of 1 earlier run(s) here" in out
    before = (tmp_path / "runs.jsonl").read_bytes()
    took = [e["seconds"] for e in lines(tmp_path) if e["event"] == "end"]
    said, _ = dry_run(capsys, tmp_path, *argv[:3], "3", *argv[3:])
    assert f"3 run(s) of {sweep.duration(sum(took) / 2)} (mean of 2 earlier run(s) here)" in said
    assert (tmp_path / "runs.jsonl").read_bytes() == before  # a dry run reads, and writes nothing


def test_runs_on_other_hardware_say_nothing_of_the_time(tmp_path):
    run, settings = planned("--seeds", "1")[0], {"SEED": "9"}
    args = sweep.parse_args(["--out", str(tmp_path)])
    args.nproc, args.device = 1, "cpu"
    entry = {"key": "k", "event": "end", "status": "ok", "settings": settings}
    (tmp_path / "runs.jsonl").write_text(
        "".join(
            json.dumps(entry | {"seconds": seconds, "shape": ["best", "full", 1, False, device]}) + "\n"
            for seconds, device in ((7, "cpu"), (700, "NVIDIA H100 80GB HBM3"))
        )
    )
    journal = sweep.Journal(tmp_path / "runs.jsonl", writes=False)
    assert sweep.expected_seconds(run, journal, args) == (7, 7)
    journal.entries.append(
        entry | {"seconds": 30, "shape": sweep.shape_of(args), "settings": run.settings | {"SEED": "2"}}
    )
    assert sweep.expected_seconds(run, journal, args) == (30, 30)  # the same settings tell more than the same scale


def test_an_exported_path_that_replaces_the_scales_says_so(tmp_path, capsys, monkeypatch):
    name = f"exported DATA_PATH={data()} replaces DATA_PATH=data/demo"
    assert name in dry_run(capsys, tmp_path, "--scale", "demo")[1]
    assert "replaces" not in dry_run(capsys, tmp_path, "--scale", "demo", "--set", "DATA_PATH=mine")[1]
    assert "replaces" not in dry_run(capsys, tmp_path, "--scale", "full")[1]
    monkeypatch.setenv("DEVICE", "cuda")
    assert "exported DEVICE=cuda replaces DEVICE=cpu" in dry_run(capsys, tmp_path, "--scale", "demo")[1]
    monkeypatch.setenv("DATA_PATH", "data/demo")
    assert "DATA_PATH" not in dry_run(capsys, tmp_path, "--scale", "demo")[1]


def test_two_seeds_then_nothing_left_to_do(tmp_path, capsys, stub):
    argv = ["--seeds", "1", "2", "--set", *FAST, "--out", str(tmp_path), "--nproc", "1"]
    assert sweep.main(argv) == 0
    out = capsys.readouterr().out
    assert [(e["event"], e.get("status")) for e in lines(tmp_path)] == [("start", None), ("end", "ok")] * 2
    assert "2 of 2 with a val_bpb, mean" in out and "+-" in out
    before = (tmp_path / "runs.jsonl").read_bytes()
    assert sweep.main(argv) == 0 and "2 of 2 run(s) done before" in capsys.readouterr().out
    assert (tmp_path / "runs.jsonl").read_bytes() == before
    first = lines(tmp_path)[1]
    (tmp_path / first["name"] / "result.json").unlink()  # a result that is gone is made again
    assert sweep.main(argv) == 0 and len(lines(tmp_path)) == 6
    stub.write_text(STUB + "# changed")
    assert sweep.main(argv) == 0 and len(lines(tmp_path)) == 10  # another script: both seeds again


def test_a_failed_run_stays_on_the_list_and_the_rest_goes_on(tmp_path, capsys, stub):
    argv = ["--seeds", "1", "--set", *FAST, f"DATA_PATH=/nowhere;{data()}", "--out", str(tmp_path), "--nproc", "1"]
    assert sweep.main(argv) == 1
    ends = [e for e in lines(tmp_path) if e["event"] == "end"]
    assert [e["status"] for e in ends] == ["failed", "ok"] and ends[0]["exit"] == 1
    assert (
        "error: " in (tmp_path / ends[0]["name"] / "console.log").read_text() and "error: " in capsys.readouterr().out
    )
    assert sweep.main(argv) == 1 and [e["status"] for e in lines(tmp_path) if e["event"] == "end"] == [
        "failed",
        "ok",
        "failed",
    ]


def started(argv: list[str], tmp_path: Path, stub: Path) -> subprocess.Popen:
    """A sweep in a process of its own, in the middle of its first run."""
    env = clean_environ(environment({}, data_path=data()))
    code = (
        "import sys; from pathlib import Path; from tools import sweep; "
        f"sweep.script_of = lambda args: Path({str(stub)!r}); sys.exit(sweep.main(sys.argv[1:]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, *argv],
        env=env,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        logs = list(tmp_path.glob("*/console.log"))
        if logs and "step 1" in logs[0].read_text():
            return process
        time.sleep(0.2)
    process.kill()
    raise AssertionError(f"the run does not start: {process.communicate()[0]}")


def running(pattern: str) -> bool:
    return any(
        re.search(pattern.encode(), Path(f"/proc/{pid}/environ").read_bytes())
        for pid in os.listdir("/proc")
        if pid.isdigit() and readable(pid)
    )


def readable(pid: str) -> bool:
    try:
        return (
            bool(Path(f"/proc/{pid}/environ").read_bytes())
            and b"train_gpt.py" in Path(f"/proc/{pid}/cmdline").read_bytes()
        )
    except OSError:
        return False


@pytest.mark.parametrize("how", (signal.SIGINT, signal.SIGTERM, signal.SIGKILL))
def test_an_interrupted_sweep_goes_on(how, tmp_path, capsys, stub):
    """Ctrl-C and SIGTERM end the run too and note it; a kill leaves the line of its start. The same command then
    finishes."""
    endless = [text if not text.startswith("ITERATIONS=") else "ITERATIONS=100000" for text in FAST]
    process = started(["--seeds", "1", "--set", *endless, "--out", str(tmp_path), "--nproc", "1"], tmp_path, stub)
    process.send_signal(how)
    out = process.communicate(timeout=60)[0]
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}[how], out
    if how == signal.SIGKILL:
        assert [e["event"] for e in lines(tmp_path)] == ["start"]
        pids = [
            pid
            for pid in os.listdir("/proc")
            if pid.isdigit() and readable(pid) and str(tmp_path).encode() in Path(f"/proc/{pid}/environ").read_bytes()
        ]
        for pid in pids:  # the orphan of this very test
            os.kill(int(pid), signal.SIGKILL)
    else:
        assert [e.get("status") for e in lines(tmp_path)] == [None, "interrupted"]
        assert not running(re.escape(str(tmp_path)))
    assert sweep.main(["--seeds", "1", "--set", *FAST, "--out", str(tmp_path), "--nproc", "1"]) == 0
    assert lines(tmp_path)[-1]["status"] == "ok"


def test_a_line_cut_off_by_a_kill_is_skipped(tmp_path):
    (tmp_path / "runs.jsonl").write_text('{"event": "start", "key": "x"}\n{"event": "en')
    journal = sweep.Journal(tmp_path / "runs.jsonl")
    assert [e["event"] for e in journal.entries] == ["start"]
    journal.append(event="end", key="y")
    assert (tmp_path / "runs.jsonl").read_text().splitlines()[1:] == ['{"event": "en', '{"event": "end", "key": "y"}']


def test_two_sweeps_do_not_share_a_folder(tmp_path):
    journal = sweep.Journal(tmp_path / "runs.jsonl")
    with pytest.raises(sweep.SweepError, match="another sweep"):
        sweep.Journal(tmp_path / "runs.jsonl")
    journal.file.close()


def test_an_artifact_is_scored_under_several_settings_and_left_alone(tmp_path, capsys):
    before = sorted((p.name, p.stat().st_mtime_ns) for p in base_run().iterdir())
    assert (
        sweep.main(
            [
                "--eval-only",
                str(base_run()),
                "--set",
                "EVAL_STRIDE=16,24",
                "TTT_ENABLED=0",
                "--out",
                str(tmp_path),
                "--nproc",
                "1",
            ]
        )
        == 0
    )
    ends = [e for e in lines(tmp_path) if e["event"] == "end"]
    assert [e["settings"]["EVAL_STRIDE"] for e in ends] == ["16", "24"] and ends[0]["val_bpb"] != ends[1]["val_bpb"]
    assert all((tmp_path / e["name"] / "eval_result.json").exists() for e in ends)
    assert sorted((p.name, p.stat().st_mtime_ns) for p in base_run().iterdir()) == before


def test_a_real_run(tmp_path, capsys):
    """The script itself, with a recipe under it: its result and its log lie in the folder of the run."""
    assert (
        sweep.main(
            ["--recipe", "multi_phase_sgd", "--seeds", "7", "--set", *FAST, "--out", str(tmp_path), "--nproc", "1"]
        )
        == 0
    )
    end = lines(tmp_path)[-1]
    found = json.loads((tmp_path / end["name"] / "result.json").read_text())
    assert (
        found["seed"] == 7
        and found["settings"]["attn_out_gate_enabled"]
        and found["val_bpb"] == end["val_bpb"]
        and end["settings_sha256"] == found["settings_sha256"]
    )
