"""The modes from beginning to end: check, train, quantise again, score again; and how runs end when something stops
them."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, RUN, base_run, forked, main, own_data, result, scratch, spawn, start

import train_gpt


def lines(outcome) -> list[str]:
    return outcome.err.strip().splitlines()


def refusal(outcome, *names):
    assert outcome.code == 2, outcome.out[-2000:] + outcome.err[-2000:]
    assert len(lines(outcome)) == 1 and outcome.err.startswith("error: "), outcome.err
    for name in names:
        assert str(name) in outcome.err, outcome.err


def copy(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        shutil.copy(base_run() / name, folder)
    return folder


# ---- the verdict of a run ----


def test_result_json():
    found = result(base_run())
    assert {
        "bpb",
        "val_bpb",
        "dataset",
        "bytes",
        "seconds",
        "settings",
        "settings_sha256",
        "source_sha256",
        "data",
        "hardware",
        "versions",
        "seed",
        "verdicts",
    } <= set(found)
    assert (
        {"trained", "quantized"} <= set(found["bpb"])
        and found["dataset"] == "other"
        and found["seed"] == found["settings"]["seed"] == 1337
    )
    assert found["settings"] == json.loads(
        json.dumps(train_gpt.Config.from_env({k.upper(): str(v) for k, v in RUN.items()}).settings())
    )
    assert {"train", "eval", "steps", "calibrate", "quantize", "load"} <= set(found["seconds"])
    assert all(
        v["verdict"] in ("PASS", "FAIL", "DISPUTED", "NOT RUN") and v["reason"] for v in found["verdicts"].values()
    )
    assert {"C1", "C2", "C3", "C4", "bytes", "train_budget", "eval_budget"} <= set(found["verdicts"])
    assert found["verdicts"]["bytes"]["verdict"] == "PASS" and found["verdicts"]["C1"]["verdict"] == "NOT RUN"
    assert 0 < found["bpb"]["quantized"] - found["bpb"]["trained"] < 0.5


def test_budgets_add_up():
    seconds = result(base_run())["seconds"]
    assert seconds["train"] >= seconds["steps"] + seconds["calibrate"] + seconds["quantize"] - 1e-6
    assert seconds["eval"] >= seconds["load"] + seconds.get("score", 0) + seconds.get("adapt", 0) - 1e-6 and {
        "score",
        "adapt",
    } & set(seconds)


def test_a_folder_holds_whole_files_only():
    names = {path.name for path in base_run().iterdir()}
    assert {"train_gpt.py", "model.bin", "trained.npz", "result.json", "train.log"} <= names
    assert not [name for name in names if ".part" in name or "preflight" in name]


def test_the_log_holds_every_setting_and_no_home(tmp_path):
    log = (base_run() / "train.log").read_text()
    assert result(base_run())["settings_sha256"] in log and result(base_run())["source_sha256"] in log
    assert "MODEL_DIM=32" in log and str(Path.home()) + os.sep not in log


def test_over_budget_is_a_fail_and_no_headline(tmp_path):
    """A wall-clock run whose evaluation cannot be done in time: the verdict says so, and val_bpb is absent."""
    short = {"max_wallclock_seconds": 0.05, "gptq_reserve_seconds": 0.01, "iterations": 5}
    out = main({**RUN, **short, "ttt_enabled": False}, tmp_path).ok()
    found = result(tmp_path)
    assert (
        found["verdicts"]["eval_budget"]["verdict"] == "FAIL" and "val_bpb" not in found and "quantized" in found["bpb"]
    )
    assert "no val_bpb" in out.out
    # With test-time training the time is estimated: what cannot be done in time is not begun.
    refused = main({**RUN, **short, "quantize_only": True, "ttt_enabled": True}, tmp_path)
    assert refused.code == 2 and "MAX_WALLCLOCK_SECONDS" in refused.err and refused.err.count("\n") == 1
    assert "\nquantized: " in refused.out and "\nadapted: " not in refused.out


def test_over_the_cap_is_a_fail_and_no_headline(tmp_path):
    main({**RUN, "artifact_cap": 1000}, tmp_path)
    if (tmp_path / "result.json").exists():
        found = result(tmp_path)
        assert found["verdicts"]["bytes"]["verdict"] == "FAIL" and "val_bpb" not in found


def test_shrink_to_fit(tmp_path):
    """A run that would end a little over its cap widens the quantiser's step until it fits."""
    cap = result(base_run())["bytes"]["total"] - 2000
    main({**RUN, "artifact_cap": cap}, tmp_path).ok()
    assert result(tmp_path)["bytes"]["total"] <= cap and result(tmp_path)["verdicts"]["bytes"]["verdict"] == "PASS"


# ---- modes ----


def test_check_only_makes_nothing(tmp_path):
    main({**RUN, "check_only": True}, tmp_path / "out").ok()
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert not left & {"model.bin", "trained.npz", "result.json", "train_gpt.py", "preflight.bin"} and not [
        n for n in left if ".part" in n
    ]


def test_check_only_reads_no_more_than_it_must(tmp_path, monkeypatch):
    """No training step, no score."""
    monkeypatch.setattr(train_gpt, "train", lambda *_: pytest.fail("trained"))
    monkeypatch.setattr(train_gpt, "score_artifact", lambda *_: pytest.fail("scored"))
    main({**RUN, "check_only": True}, tmp_path).ok()


def test_quantize_only_gives_the_same_artifact(tmp_path):
    copy(tmp_path, "trained.npz")
    main({**RUN, "quantize_only": True}, tmp_path).ok()
    assert result(tmp_path)["bpb"] == result(base_run())["bpb"]
    for name in ("model.bin", "train_gpt.py"):
        assert (tmp_path / name).read_bytes() == (base_run() / name).read_bytes(), name
    assert result(tmp_path)["training"]["steps"] == result(base_run())["training"]["steps"]


def test_quantize_only_without_weights_or_with_others(tmp_path):
    refusal(main({**RUN, "quantize_only": True}, tmp_path), "trained.npz")
    copy(tmp_path, "trained.npz")
    refusal(main({**RUN, "quantize_only": True, "num_layers": 6}, tmp_path), "trained.npz", "settings")
    data_of = (tmp_path / "trained.npz").read_bytes()
    (tmp_path / "trained.npz").write_bytes(data_of[: len(data_of) // 2])
    refusal(main({**RUN, "quantize_only": True}, tmp_path), "trained.npz")


def test_eval_only_gives_the_same_scores(tmp_path):
    """From the artifact's own settings: not one of the run's is given again."""
    copy(tmp_path, "model.bin", "train_gpt.py")
    main({"ttt_eval_only": True, "ledger_path": tmp_path / "ledger.npy"}, tmp_path).ok()
    found, ran = result(tmp_path, "eval_result.json"), result(base_run())
    assert (
        found["val_bpb"] == ran["val_bpb"]
        and found["settings_sha256"] == ran["settings_sha256"]
        and "training" not in found
    )
    assert np.array_equal(np.load(tmp_path / "ledger.npy"), np.load(scratch() / "base_ledger.npy"))
    assert not (tmp_path / "result.json").exists()


def evaluate(rank: int, world: int, folder: Path):
    outcome = main(
        {
            "ttt_eval_only": True,
            "rank": rank,
            "local_rank": rank,
            "world_size": world,
            "ledger_path": folder / f"ledger{world}.npy",
        },
        folder,
    )
    assert outcome.code == 0, outcome.err


@pytest.mark.parametrize("world", (2, 3))
def test_worlds_score_the_same(world, tmp_path):
    copy(tmp_path, "model.bin", "train_gpt.py")
    forked(evaluate, world, tmp_path)
    assert result(tmp_path, "eval_result.json")["val_bpb"] == pytest.approx(result(base_run())["val_bpb"], abs=1e-5)
    assert np.abs(np.load(tmp_path / f"ledger{world}.npy") - np.load(scratch() / "base_ledger.npy")).max() < 1e-3


def test_eval_only_with_another_stride(tmp_path):
    copy(tmp_path, "model.bin", "train_gpt.py")
    main({"ttt_eval_only": True, "eval_stride": 12}, tmp_path).ok()
    found = result(tmp_path, "eval_result.json")
    assert found["settings"]["eval_stride"] == 12 and found["bpb"] != result(base_run())["bpb"]
    assert found["settings_sha256"] != result(base_run())["settings_sha256"]


def test_eval_only_of_damaged_artifacts(tmp_path):
    refusal(main({"ttt_eval_only": True}, tmp_path), "model.bin")
    copy(tmp_path, "model.bin", "train_gpt.py")
    path = tmp_path / "model.bin"
    good = path.read_bytes()
    damaged = {
        "empty": b"",
        "one byte": good[:1],
        "half": good[: len(good) // 2],
        "all but the last byte": good[:-1],
        "more": good + b"x",
        "not ours": b"hello world" * 50,
    }
    for share in (0, 1, 5, 20, 40, 60, 80, 95):
        at = len(good) * share // 100
        damaged[f"altered at {share} %"] = good[:at] + bytes([good[at] ^ 0x55]) + good[at + 1 :]
    damaged["last byte altered"] = good[:-1] + bytes([good[-1] ^ 1])
    for name, content in damaged.items():
        path.write_bytes(content)
        outcome = main({"ttt_eval_only": True}, tmp_path)
        assert outcome.code == 2 and len(lines(outcome)) == 1 and "model.bin" in outcome.err, name


FIRST = "the settings are validated beside the defaults before the artifact's are read"


@pytest.mark.parametrize(
    "setting, value",
    (
        ("model_dim", 64),
        ("num_layers", 6),
        ("mlp_mult", 3.0),
        ("smear_gate_enabled", False),
        ("num_kv_heads", 4),
    ),
)
def test_eval_only_with_settings_that_do_not_fit(setting, value, tmp_path):
    copy(tmp_path, "model.bin", "train_gpt.py")
    refusal(main({"ttt_eval_only": True, setting: value}, tmp_path), "model.bin", "settings")


@pytest.mark.parametrize(
    "change", (lambda settings: settings.update(warp_factor=9), lambda settings: settings.pop("attn_window"))
)
def test_an_artifact_of_another_version(change, tmp_path):
    """Settings that this script does not know are one line, not a TypeError; one that the artifact lacks would get a
    default that its weights never saw."""
    arrays, meta = train_gpt.load_artifact(base_run() / "model.bin")
    change(meta["settings"])
    train_gpt.save_artifact(tmp_path / "model.bin", arrays, meta)
    refusal(main({"ttt_eval_only": True}, tmp_path), "model.bin", "packed with it")


def test_eval_only_settings_are_judged_with_the_artifact_s(tmp_path):
    """VAL_BATCH_TOKENS=96 is too small beside the default EVAL_SEQ_LEN, but not beside the artifact's."""
    copy(tmp_path, "model.bin", "train_gpt.py")
    main({"ttt_eval_only": True, "val_batch_tokens": 96}, tmp_path).ok()
    assert result(tmp_path, "eval_result.json")["settings"]["val_batch_tokens"] == 96


def test_data_that_does_not_fit_the_artifact(tmp_path):
    copy(tmp_path, "model.bin", "train_gpt.py")
    folder = own_data(tmp_path / "data")
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"vocab_size": 320', '"vocab_size": 512'))
    refusal(main({"ttt_eval_only": True}, tmp_path, folder), "manifest.json", "VOCAB_SIZE")


# ---- places that cannot be written ----


@contextlib.contextmanager
def small_disk(folder: Path, options: str):
    """A tmpfs of its own; skips where this user may not mount one."""
    folder.mkdir(exist_ok=True)
    if (
        not shutil.which("mount")
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "golf_test", str(folder)], capture_output=True
        ).returncode
    ):
        pytest.skip("cannot mount a tmpfs here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_artifact_dir_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("in the way")
    refusal(main(RUN, tmp_path / "file"), "ARTIFACT_DIR")
    refusal(main(RUN, tmp_path / "file" / "out"), "ARTIFACT_DIR")


def test_a_read_only_disk(tmp_path):
    with small_disk(tmp_path / "disk", "size=1m") as disk:
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        refusal(main(RUN, disk), "ARTIFACT_DIR")


def test_too_small_a_disk_is_refused_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(train_gpt, "train", lambda *_: pytest.fail("trained"))
    with small_disk(tmp_path / "disk", "size=200k") as disk:
        refusal(main(RUN, disk), "ARTIFACT_DIR", "free")


@pytest.mark.parametrize("name", ("trained.npz", "model.bin", "result.json"))
def test_a_disk_that_fills_up_during_the_run(name, tmp_path, monkeypatch):
    """Whatever the file: one line that names it and the remedy, and what was there before stays."""
    copy(tmp_path, "trained.npz", "model.bin", "result.json", "train_gpt.py")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    opened = open

    def full(path, *args, **kwargs):
        if Path(str(path)).name.startswith(name) and args[:1] == ("wb",):
            raise OSError(28, "No space left on device")
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(train_gpt, "open", full, raising=False)
    refusal(main({**RUN, "seed": 5, "iterations": 2}, tmp_path), name, "No space left", "free space")
    assert (tmp_path / name).read_bytes() == before[name] and not list(tmp_path.glob("*.part*"))


def test_an_impossible_ledger_path_is_refused_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(train_gpt, "train", lambda *_: pytest.fail("trained"))
    refusal(main({**RUN, "ledger_path": tmp_path / "nowhere" / "ledger.npy"}, tmp_path), "LEDGER_PATH")


# ---- runs that are stopped ----

LONG = {**RUN, "iterations": 100_000}


def wait_for(log: Path, text: str):
    for _ in range(600):
        if log.exists() and text in log.read_text():
            return
        time.sleep(0.1)
    pytest.fail(f"no {text!r} in {log}")


def run_long(folder: Path):
    outcome = main(LONG, folder)
    (folder / "stderr").write_text(outcome.err)
    sys.exit(outcome.code)


@pytest.mark.parametrize("number, code", ((signal.SIGTERM, 143), (signal.SIGINT, 130)))
def test_a_signal_ends_a_run_cleanly(number, code, tmp_path):
    """No half-written file, and a status that says which signal it was."""
    process = get_context("fork").Process(target=run_long, args=(tmp_path,))
    process.start()
    wait_for(tmp_path / "train.log", "step      3")
    os.kill(process.pid, number)
    process.join(30)
    assert process.exitcode == code
    assert {path.name for path in tmp_path.iterdir()} <= {"train.log", "stderr"}


def children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
def test_a_killed_rank_ends_the_run(tmp_path):
    """Under torchrun: kill -9 of one rank, and the others and torchrun itself end with an error instead of waiting for
    it."""
    process = start(LONG, tmp_path, world=2)
    wait_for(tmp_path / "train.log", "step      3")
    workers = children(process.pid)
    assert len(workers) == 2
    os.kill(workers[1], signal.SIGKILL)
    process.communicate(timeout=90)
    assert process.returncode != 0
    assert not any(
        Path(f"/proc/{pid}").exists() and "State:\tZ" not in Path(f"/proc/{pid}/status").read_text() for pid in workers
    )
    assert not (tmp_path / "model.bin").exists() and not list(tmp_path.glob("*.part*"))


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted in /proc")
def test_no_thread_outlives_the_process_group(tmp_path):
    """gloo's threads may still hold tensors while the interpreter goes down, which aborts a rank that has done all its
    work (pytorch #179291)."""
    script = tmp_path / "close.py"
    script.write_text(f"""import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
import torch
from train_gpt import Config, Ranks
threads = lambda: sum("gloo" in open(f"/proc/self/task/{{t}}/comm").read() for t in os.listdir("/proc/self/task"))
ranks = Ranks(Config.from_env(os.environ))
torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))])
ranks.all_reduce_(torch.ones(2))
assert threads() > 0
ranks.close()
deadline = time.monotonic() + 10                                       # /proc shows a joined thread for a moment
while threads() and time.monotonic() < deadline:
    time.sleep(0.1)
assert threads() == 0
""")
    spawn({"device": "cpu"}, world=2, script=script).ok()
