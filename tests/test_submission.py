"""What is handed in says what the runs say: submission.json, the record folder, README parts; and a number changed by
hand is caught, wherever it stands."""

import hashlib
import json
import os
import re
import shutil
import statistics

import pytest
from helpers import RUN, main, scratch

from tools import report, submission
from tools.runs import load_run

UNION = {
    "author",
    "github_id",
    "name",
    "blurb",
    "date",
    "val_loss",
    "val_bpb",
    "bytes_total",
    "bytes_code",
    "track",
    "val_loss_std",
    "val_bpb_std",
    "seeds",
    "seed_results",
    "artifact_bytes_mean",
    "artifact_bytes_max",
    "train_steps_mean",
    "hardware",
    "pytorch_version",
    "cuda_version",
    "flash_attn_version",
    "technique_summary",
    "compliance",
    "attribution",
}


@pytest.fixture(scope="module")
def made():
    """Three seeds of a tiny run."""
    folders = [scratch() / "seeds" / str(seed) for seed in (1, 2, 3)]
    for seed, folder in zip((1, 2, 3), folders):
        main({**RUN, "seed": seed, "ttt_enabled": False}, folder).ok()
    return folders


@pytest.fixture
def runs(made, tmp_path):
    """Copies to spoil."""
    return [shutil.copytree(folder, tmp_path / "runs" / folder.name) for folder in made]


def command(*arguments, status: int = 0):
    assert report.main([*map(str, arguments)]) == status


def edit(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value, indent=1))


def audited(folder, **verdicts):
    """An audit.json of this folder's artifact."""
    hashes = {
        name: {"sha256": hashlib.sha256((folder / name).read_bytes()).hexdigest()}
        for name in ("train_gpt.py", "model.bin")
    }
    checks = {
        f"check_of_{name}": {"verdict": verdict, "evidence": "seen", "seconds": 1.0}
        for name, verdict in verdicts.items()
    }
    rows = {name: {"verdict": verdict, "reason": f"check_of_{name}: seen"} for name, verdict in verdicts.items()}
    (folder / "audit.json").write_text(json.dumps({"artifact": hashes, "checks": checks, "verdicts": rows}))


def test_three_seeds(runs, tmp_path, capsys):
    command(
        *runs,
        "--submission",
        tmp_path / "s.json",
        "--author",
        "A",
        "--github-id",
        "a",
        "--name",
        "N",
        "--out",
        tmp_path / "out",
    )
    found = json.loads((tmp_path / "s.json").read_text())
    results = [json.loads((run / "result.json").read_text()) for run in runs]
    assert set(found) >= UNION and None not in found.values()
    assert found["val_bpb"] == pytest.approx(statistics.fmean(r["val_bpb"] for r in results), abs=1e-8)
    assert found["val_bpb_std"] == pytest.approx(statistics.stdev(r["val_bpb"] for r in results), abs=1e-8)
    assert found["bytes_total"] == max(r["bytes"]["total"] for r in results) and found["seeds"] == [1, 2, 3]
    data = results[0]["data"]
    assert found["val_loss"] * data["val_targets"] == pytest.approx(
        found["val_bpb"] * 0.6931471805599453 * data["val_bytes"], rel=1e-7
    )
    assert (
        found["compliance"]["C1"]["verdict"] == "NOT RUN"
        and found["compliance"]["bytes"]["verdict"] == "PASS"
        and "legal" not in json.dumps(found)
    )
    assert found["track"] == "track_non_record_16mb" and found["dataset"] == "other"
    command(*runs, "--verify", "--submission", tmp_path / "s.json")
    assert "no difference" in capsys.readouterr().out


@pytest.mark.parametrize(
    "key, value",
    [
        ("val_bpb", 1.0),
        ("val_bpb_std", 0.0),
        ("bytes_total", 1),
        ("seeds", [1, 2]),
        ("source_sha256", "0" * 64),
        ("dataset", "contest"),
        ("extra", 1),
    ],
)
def test_a_number_changed_in_submission_json_is_caught(runs, tmp_path, capsys, key, value):
    command(*runs, "--submission", tmp_path / "s.json", "--out", tmp_path / "out")
    edit(tmp_path / "s.json", lambda entry: entry.__setitem__(key, value))
    command(*runs, "--verify", "--submission", tmp_path / "s.json", status=1)
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and key in err


SPOILED = {
    "trained": lambda r: r["bpb"].__setitem__("trained", r["bpb"]["trained"] - 0.01),
    "total": lambda r: r["bytes"].__setitem__("total", r["bytes"]["total"] - 1),
    "headline": lambda r: (r["bpb"].__setitem__("quantized", 1.0), r.__setitem__("val_bpb", 1.0)),
    "seconds": lambda r: r["seconds"].__setitem__("eval", r["seconds"]["eval"] + 1),
    "verdict": lambda r: r["verdicts"]["C1"].__setitem__("verdict", "PASS"),
    "setting": lambda r: r["settings"].__setitem__("matrix_lr", 0.1),
    "hidden fail": lambda r: r["verdicts"]["C3"].update(verdict="FAIL"),
    "loss": lambda r: r["training"]["curve"][-1].__setitem__(2, 1.0),
    "targets": lambda r: r["data"].__setitem__("val_targets", 5),
    "hash": lambda r: r.__setitem__("settings_sha256", "0"),
    "source": lambda r: r.__setitem__("source_sha256", "0"),
}


@pytest.mark.parametrize("what", SPOILED)
def test_a_number_changed_in_result_json_is_caught(runs, tmp_path, capsys, what):
    edit(runs[1] / "result.json", SPOILED[what])
    command(*runs, "--verify", status=1)
    assert str(runs[1] / "result.json") in capsys.readouterr().err
    assert (
        report.main([*map(str, runs), "--submission", str(tmp_path / "s.json"), "--out", str(tmp_path / "out")]) == 2
        and not (tmp_path / "s.json").exists()
    )


def test_an_artifact_of_another_size_is_caught(runs, capsys):
    with open(runs[0] / "model.bin", "ab") as file:
        file.write(b"x")
    command(runs[0], "--verify", status=1)
    assert "model.bin" in capsys.readouterr().err


def bind(folder, name="result.json", **changes):
    """The hashes of the artifact, as train_gpt.py writes them."""
    hashes = {file: hashlib.sha256((folder / file).read_bytes()).hexdigest() for file in ("train_gpt.py", "model.bin")}
    edit(folder / name, lambda result: result.__setitem__("artifact_sha256", hashes | changes))


def flip(path):
    """One bit of a file, its size and its time kept."""
    data, times = bytearray(path.read_bytes()), path.stat()
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize("name", ("model.bin", "train_gpt.py"))
def test_a_result_of_other_files_is_refused(runs, tmp_path, capsys, name):
    bind(runs[0])
    command(runs[0], "--verify")
    assert f"the SHA-256 of {name}" in capsys.readouterr().out
    flip(runs[0] / name)
    command(runs[0], "--verify", status=1)
    assert f"another {name}" in capsys.readouterr().err
    for more in ((), ("--check",), ("--submission", tmp_path / "s.json"), ("--record", tmp_path / "record")):
        command(runs[0], "--out", tmp_path / "out", *more, status=2)
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and f"another {name}" in err and "TTT_EVAL_ONLY=1" in err
    assert not (tmp_path / "out").exists() and not (tmp_path / "s.json").exists()


def test_a_result_without_hashes_that_is_older_than_its_model_is_named_stale(runs, tmp_path, capsys):
    """As a second run into the folder leaves it that was killed behind its model.bin."""
    edit(runs[0] / "result.json", lambda r: r.pop("artifact_sha256"))
    later = (runs[0] / "result.json").stat().st_mtime + 60
    os.utime(runs[0] / "model.bin", (later, later))
    command(runs[0], "--out", tmp_path / "out")
    out = capsys.readouterr().out
    assert "stale, model.bin is 60 s newer" in out and "no val_bpb" in out
    assert "no val_bpb" in (tmp_path / "out" / "report.html").read_text()
    command(runs[0], "--verify", status=1)
    command(runs[0], "--check", "--out", tmp_path / "out", status=1)
    assert capsys.readouterr().err.count("stale") == 2
    command(runs[0], "--submission", tmp_path / "s.json", status=2)
    bind(runs[0])  # what is bound by hashes may be copied about
    os.utime(runs[0] / "result.json", (0, 0))
    command(runs[0], "--verify")


@pytest.mark.parametrize("bound", (True, False))
def test_a_stale_eval_result_is_left_aside_and_named(runs, tmp_path, capsys, bound):
    bpb = json.loads((runs[0] / "result.json").read_text())["bpb"]["quantized"]
    (runs[0] / "eval_result.json").write_text(json.dumps({"bpb": {"quantized": bpb}}))
    if bound:
        bind(runs[0], "eval_result.json", **{"model.bin": "0" * 64})
    else:
        os.utime(runs[0] / "eval_result.json", (0, 0))
    command(runs[0], "--out", tmp_path / "out")
    out = capsys.readouterr().out
    assert "left aside" in out and "scored by themselves" not in out
    command(runs[0], "--verify", status=1)
    assert "eval_result.json" in capsys.readouterr().err


def test_a_packed_script_of_another_source_is_caught_without_hashes(runs, capsys):
    flip(runs[0] / "train_gpt.py")
    command(runs[0], "--verify", status=1)
    assert "train_gpt.py" in capsys.readouterr().err


def test_damaged_hashes_are_told(runs, capsys):
    edit(runs[0] / "result.json", lambda result: result.__setitem__("artifact_sha256", "abc"))
    command(runs[0], status=2)
    assert "artifact_sha256 is no table" in capsys.readouterr().err


def test_verify_says_what_it_compared_and_what_it_cannot_know(runs, capsys):
    """An edit of result.json and train.log alike passes it."""
    result = json.loads((runs[0] / "result.json").read_text())
    true, false = result["val_bpb"], result["val_bpb"] - 0.5
    edit(runs[0] / "result.json", lambda r: (r.__setitem__("val_bpb", false), r["bpb"].__setitem__("quantized", false)))
    edit(runs[0] / "result.json", lambda r: r.pop("artifact_sha256"))  # as earlier scripts wrote it
    log = (runs[0] / "train.log").read_text()
    (runs[0] / "train.log").write_text(log.replace(f"{true:.6f}", f"{false:.6f}"))
    command(runs[0], "--verify")
    out = capsys.readouterr().out
    assert "only the audit's reload" in out and f"tools/audit.py {runs[0]}" in out
    assert "the size of model.bin alone" in out and "holds no hash" in out
    audited(runs[0], packaging="PASS")
    edit(runs[0] / "audit.json", lambda audit: audit["checks"].__setitem__("reload", audit["checks"].popitem()[1]))
    (runs[0] / "model.bin").rename(runs[0] / "elsewhere")
    command(runs[0], "--verify")
    out = capsys.readouterr().out
    assert "says reload PASS" in out and "not model.bin, which is not there" in out


@pytest.mark.parametrize("group, key", [(None, "source_sha256"), ("data", "val_targets"), ("bytes", "total")])
def test_a_result_that_lacks_what_is_handed_in_is_told_in_one_line(runs, capsys, group, key):
    edit(runs[0] / "result.json", lambda result: (result[group] if group else result).pop(key))
    command(runs[0], "--verify", status=1)
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and f"lacks {key}" in err


def test_a_run_without_its_log_bears_nothing_out(runs, capsys):
    (runs[0] / "train.log").unlink()
    command(runs[0], "--verify", status=1)
    assert "train.log" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change, complaint",
    [
        (lambda r: r["settings"].__setitem__("matrix_lr", 0.1), "MATRIX_LR"),
        (lambda r: r.__setitem__("source_sha256", "0"), "another train_gpt.py"),
        (lambda r: r["data"].__setitem__("val_sha256", "0"), "other validation data"),
        (lambda r: (r.__setitem__("seed", 1), r["settings"].__setitem__("seed", 1)), "twice"),
    ],
)
def test_a_mean_is_over_seeds_of_one_configuration(runs, change, complaint):
    edit(runs[1] / "result.json", change)
    with pytest.raises(report.ReportError, match=complaint):
        submission.check_together([load_run(run) for run in runs])


# ---- the audit's verdicts ----


def test_the_audit_joins_the_run(runs, tmp_path):
    for run in runs:
        audited(run, C1="PASS", C2="PASS", C3="PASS", packaging="PASS", bytes="NOT RUN")
    audited(runs[2], C1="DISPUTED", C2="PASS", C3="DISPUTED", packaging="PASS")
    command(*runs, "--submission", tmp_path / "s.json", "--out", tmp_path / "out")
    found = {
        name: entry["verdict"] for name, entry in json.loads((tmp_path / "s.json").read_text())["compliance"].items()
    }
    assert (found["C2"], found["packaging"], found["C1"], found["C3"], found["C4"]) == (
        "PASS",
        "PASS",
        "DISPUTED",
        "DISPUTED",
        "NOT RUN",
    )
    assert found["bytes"] == "PASS"  # what the run has shown stays shown


def test_a_check_that_fails_leaves_no_val_bpb(runs, tmp_path, capsys):
    audited(runs[0], C2="FAIL")
    command(runs[0], "--verify", status=1)
    assert "check_of_C2 FAIL" in capsys.readouterr().err
    command(*runs, "--submission", tmp_path / "s.json", "--out", tmp_path / "out", status=2)
    err = capsys.readouterr().err
    assert "check_of_C2" in err and err.count("\n") == 1 and not (tmp_path / "s.json").exists()
    command(runs[0], "--out", tmp_path / "out")
    assert "no val_bpb" in capsys.readouterr().out and "no val_bpb" in (tmp_path / "out" / "report.html").read_text()


def test_an_audit_of_another_artifact_is_refused(runs, capsys):
    audited(runs[0], C1="PASS")
    edit(runs[0] / "result.json", lambda r: r.pop("artifact_sha256"))  # which would be found first
    (runs[0] / "model.bin").write_bytes((runs[1] / "model.bin").read_bytes())
    command(runs[0], status=2)
    assert "audit of another model.bin" in capsys.readouterr().err


# ---- the record folder ----


def test_record_folder(runs, tmp_path, capsys):
    record = tmp_path / "2026-05-01_Name"
    command(*runs, "--record", record, "--name", "A name", "--out", tmp_path / "out")
    names = {path.name for path in record.iterdir()}
    assert names == {
        "README.md",
        "submission.json",
        "requirements.txt",
        "train_gpt.py",
        *(f"train_seed{s}.log" for s in (1, 2, 3)),
        *(f"result_seed{s}.json" for s in (1, 2, 3)),
    }
    assert (record / "train_gpt.py").read_bytes() == (runs[0] / "train_gpt.py").read_bytes()
    text, entry = (record / "README.md").read_text(), json.loads((record / "submission.json").read_text())
    assert f"val_bpb {entry['val_bpb']:.5f}" in text and "NOT RUN" in text and "MODEL_DIM=32" in text
    command(*runs, "--verify", "--record", record)
    command(*runs, "--record", record, status=2)  # never over something that is there
    (record / "README.md").write_text(re.sub(r"val_bpb \d\.\d", "val_bpb 0.9", text))
    (record / "train_seed2.log").unlink()
    (record / "other.txt").write_text("")
    capsys.readouterr()
    command(*runs, "--verify", "--record", record, status=1)
    err = capsys.readouterr().err
    assert (
        all(word in err for word in ("README.md: has", "train_seed2.log: missing", "other.txt: no part"))
        and err.count("\n") == 3
    )


def test_the_readme_claims_no_more_than_its_table(runs, tmp_path):
    record = tmp_path / "record"
    command(*runs, "--record", record, "--out", tmp_path / "out")
    text = (record / "README.md").read_text()
    assert "disjoint, bytes true: NOT RUN" in text and "disjoint: checked" not in text
    assert "LoRA per document" not in text and "XSA #265" in text  # TTT_ENABLED=0
    assert "DATA_PATH=DATA SEED=1 DEVICE=cpu " in text and "mean of 3 seeds" in text
    assert "runs.jsonl" not in text and "eval_result_seed" not in text  # neither is there
    for run in runs:
        audited(run, data="PASS")
    (runs[0].parent / "runs.jsonl").write_text("{}\n")
    command(runs[0], "--record", tmp_path / "one", "--out", tmp_path / "out")
    text = (tmp_path / "one" / "README.md").read_text()
    assert "disjoint, bytes true: PASS (audit, check_of_data: seen)" in text and "deviation" not in text
    assert "`runs.jsonl` lists" in text and "`audit_seed*.json`" in text and (tmp_path / "one" / "runs.jsonl").exists()


@pytest.mark.parametrize(
    "settings, data, on, off",
    [
        ({"ttt_enabled": False}, {}, (), ("LoRA per document", "global SGD in phases", "score-first SGD")),
        ({"ttt_enabled": True, "ttt_method": "sgd"}, {}, ("score-first SGD",), ("LoRA per document",)),
        ({"smear_gate_enabled": False}, {}, ("XSA",), ("SmearGate",)),
        ({"parallel_start_layer": 0}, {}, (), ("two-lane decoder", "attention and MLP from one input")),
        ({"parallel_mode": "gptj"}, {}, ("attention and MLP from one input",), ("two-lane decoder",)),
        ({"lqer_enabled": True}, {"transform": "caps"}, ("LQER", "CaseOps"), ("n-gram tilt",)),
        ({}, {"transform": "none"}, ("the stack it follows",), ("CaseOps",)),
    ],
)
def test_only_what_was_on_is_credited(runs, settings, data, on, off):
    run = load_run(runs[0])
    run.result["settings"] |= settings
    run.result["data"] |= data
    credited = submission.attribution(run)
    assert set(on) <= set(credited) and not set(off) & set(credited)


def test_the_command_has_the_ranks_of_the_run():
    assert [submission.launcher(h) for h in ("8 x NVIDIA H100", "1 x NVIDIA H200", "CPU, 1 threads x 2 rank(s)")] == [
        "torchrun --standalone --nproc_per_node=8",
        "python",
        "torchrun --standalone --nproc_per_node=2",
    ]


def test_no_comparison_off_the_contests_data(runs, tmp_path, capsys):
    command(
        *runs, "--submission", tmp_path / "s.json", "--baseline", "#1855:1.06108", "--out", tmp_path / "out", status=2
    )
    assert "no published figure compares" in capsys.readouterr().err


# ---- generated parts of a text ----


def test_generated_parts(runs, tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text(
        "before\n<!-- report: settings -->\n<!-- /report -->\nbetween\n<!-- report: results runs/1 runs/2 "
        "-->\nold\n<!-- /report -->\n"
        "<!-- report: verdicts runs/1 -->\n<!-- /report -->\nafter\n"
    )
    command("--settings", "--verify", "--into", readme, status=1)
    command("--settings", "--into", readme)
    command("--settings", "--verify", "--into", readme)
    text = readme.read_text()
    assert (
        "| `MATRIX_LR` | `0.026` |" in text
        and "**Test-time training**" in text
        and "\nold\n" not in text
        and text.startswith("before\n")
        and text.endswith("after\n")
    )
    assert "| C3 | score before update | NOT RUN |" in text and "| mean |" in text
    capsys.readouterr()
    readme.write_text(text.replace("| `0.026` |", "| `0.027` |"))
    command("--settings", "--verify", "--into", readme, status=1)
    assert "0.027" in capsys.readouterr().err


def test_every_setting_is_in_the_table():
    from train_gpt import Config

    table = submission.settings_table()
    assert all(f"| `{name.upper()}` |" in table for name in Config.__dataclass_fields__)


def test_the_table_of_settings_has_what_recipes_change():
    """Every value of every recipe that is not the default, under its short name, and nothing else."""
    from tools.sweep import read_recipe
    from train_gpt import Config, parse_setting

    table = submission.settings_table()
    short = dict(re.findall(r"(\w{3,}) `(\w+)`", table.split("\n")[0]))
    assert len(set(short.values())) == len(short) > 4 and not {"best", "scale_demo"} & set(short.values())
    want = set()
    for key, recipe in short.items():
        for name, text in read_recipe(submission.ROOT / "recipes" / f"{recipe}.env").items():
            default = getattr(Config(), name.lower())
            value = parse_setting(name, text, type(default))
            if value != default:
                want.add((name, key, submission.as_code(value) or "empty"))
    found = set()
    for name, others in re.findall(r"^\| `(\w+)` \|.* \| (.*) \|$", table, re.M):
        for part in filter(None, others.split("; ")):
            value, *keys = part.split(" ")
            found |= {(name, key, value) for key in (short if keys == ["all"] else keys)}
    assert found == want and len(want) > 100


def test_generated_results_of_two_configurations_have_no_mean(runs):
    edit(runs[1] / "result.json", lambda result: result["settings"].__setitem__("matrix_lr", 0.1))
    loaded = [load_run(run) for run in runs]
    assert "| mean |" not in submission.results_table(loaded[:2])
    assert "| mean |" in submission.results_table([loaded[0], loaded[2]])
