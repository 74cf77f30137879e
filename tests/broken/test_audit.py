"""The auditor itself: its command line, its clean processes, its statistics. What its checks find is in
test_broken.py."""

import base64
import hashlib
import json
import lzma
import socket
import zlib

import numpy as np
import pytest
from workshop import artifact, copy_of, data

from tools.audit import run as runner
from tools.audit.causality import telling_prefix
from tools.audit.checks import CHECKS, run_checks
from tools.audit.cli import main
from tools.audit.readme import variables_of_file
from tools.audit.run import Artifact, last_words, launch, unpack
from tools.audit.shared import Audit
from tools.audit.stats import t_quantile, t_tail, welch


def run(folder, *arguments) -> int:
    return main([str(folder), "--data", str(data()), *arguments])


def test_the_report_is_bound_to_the_files(tmp_path, capsys):
    folder = copy_of(artifact(), tmp_path / "artifact")
    assert run(folder, "--only", "size", "stream", "bytes", "seeds") == 0
    report = json.loads((folder / "audit.json").read_text())
    for name in ("train_gpt.py", "model.bin"):
        assert report["artifact"][name]["sha256"] == hashlib.sha256((folder / name).read_bytes()).hexdigest()
    assert {name: row["verdict"] for name, row in report["checks"].items()} == {
        "stream": "PASS",
        "bytes": "PASS",
        "size": "PASS",
        "seeds": "NOT RUN",
    }
    assert report["verdicts"]["bytes"]["verdict"] == "PASS" and "C1" not in report["verdicts"]
    shown = capsys.readouterr().out
    assert all(name in shown for name in report["checks"]) and report["artifact"]["model.bin"]["sha256"][:12] in shown


def test_a_failure_is_the_exit_status(tmp_path, capsys):
    folder = copy_of(artifact(), tmp_path / "artifact")
    with open(folder / "model.bin", "ab") as file:
        file.truncate(16_000_000)
    assert run(folder, "--json", "--only", "size") == 1
    assert json.loads(capsys.readouterr().out)["verdicts"]["bytes"]["verdict"] == "FAIL"
    assert run(folder, "--json", "--skip", *(name for name in CHECKS if name != "stream")) == 0


def test_bad_arguments(tmp_path, capsys):
    assert run(tmp_path, "--only", "size") == 2 and "train_gpt.py" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(artifact(), "--only", "no_such_check")


def test_a_mistyped_data_folder_is_refused(tmp_path, capsys):
    folder = copy_of(artifact(), tmp_path / "artifact")
    assert main([str(folder), "--data", str(tmp_path / "dat"), "--only", "size"]) == 2
    assert f"{tmp_path / 'dat'}: no file fineweb_val_*.bin there" in capsys.readouterr().err
    assert not (folder / "audit.json").exists()


def test_without_data_the_scorer_is_not_run(tmp_path):
    folder = copy_of(artifact(), tmp_path / "artifact")
    found = run_checks(
        Audit(Artifact(folder, tmp_path, "cpu", 60), None), ["future", "sum_to_one_64", "stream", "size"]
    )
    assert [row["verdict"] for row in found.values()] == ["NOT RUN", "NOT RUN", "NOT RUN", "PASS"]


PROBE = """import os, shutil, socket, sys
print("program", shutil.which("sh"))
try:
    socket.create_connection(("127.0.0.1", int(os.environ["PORT"])), timeout=5)
    print("connected")
except OSError as error:
    print("refused", error)
sys.exit(3)
"""


@pytest.mark.parametrize("namespaces", (True, False))
def test_a_blocked_process_has_no_network_and_no_programs(namespaces, tmp_path, monkeypatch):
    """With a namespace of its own where the machine allows one, and with sockets that refuse."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "train_gpt.py").write_text(PROBE)
    if not namespaces:
        monkeypatch.setattr(runner.shutil, "which", lambda name: None)
    with socket.create_server(("127.0.0.1", 0)) as server:
        env = {"PORT": str(server.getsockname()[1]), "PATH": "/usr/bin:/bin", "DEVICE": "cpu"}
        free, blocked = (launch(folder, env, 1, block, 60) for block in (False, True))
    assert free.code == blocked.code == 3
    assert "connected" in free.output and "program None" not in free.output
    assert "refused" in blocked.output and "program None" in blocked.output


def test_a_process_that_hangs_is_ended(tmp_path):
    (tmp_path / "train_gpt.py").write_text("import time\ntime.sleep(60)\n")
    assert launch(tmp_path, {}, 1, False, 1.0).code == 124


SOURCE = "def main():\n    return 'source'\n" * 20
LZMA = base64.b85encode(lzma.compress(SOURCE.encode()))
ZLIB = base64.b64encode(zlib.compress(SOURCE.encode())).decode()


@pytest.mark.parametrize(
    "script",
    (
        SOURCE.encode(),
        f"import lzma,base64\nexec(lzma.decompress(base64.b85decode({LZMA!r})))".encode(),
        f"import zlib,base64\nexec(zlib.decompress(base64.b64decode({ZLIB!r})))".encode(),
    ),
    ids=("plain", "lzma", "zlib"),
)
def test_scripts_are_read_without_running_them(script):
    assert unpack(script) == SOURCE


@pytest.mark.parametrize("pack", (lzma.compress, lambda data: zlib.compress(data, 9)), ids=("lzma", "zlib"))
def test_a_script_that_unpacks_to_gigabytes_is_refused(pack):
    """One of 64 MB stands for them."""
    blob = base64.b85encode(pack(bytes(64 << 20)))
    with pytest.raises(runner.Broken, match="more than"):
        unpack(f"import lzma,base64\nexec(lzma.decompress(base64.b85decode({blob!r})))".encode())


def test_text_that_reads_as_an_empty_stream_is_no_packed_source():
    """As raw LZMA, the first letter of this list ends the stream."""
    script = f"NAMES = {'ACTIVATION ADAM_LR ' * 40!r}"
    assert unpack(script.encode()) == script


def test_the_shipped_script_is_read():
    assert "class Ledger" in unpack((artifact() / "train_gpt.py").read_bytes())


def test_statistics():
    """Against tables of Student's t, and Welch's test against a simulation."""
    assert t_tail(2.015, 5) == pytest.approx(0.05, abs=1e-4) and t_tail(-2.015, 5) == pytest.approx(0.95, abs=1e-4)
    assert t_quantile(0.01, 4) == pytest.approx(3.747, abs=2e-3)
    rng = np.random.default_rng(0)
    p = [welch(rng.normal(0, 1, 4).tolist(), rng.normal(0, 3, 3).tolist())[2] for _ in range(400)]
    assert np.mean(np.array(p) < 0.25) == pytest.approx(0.25, abs=0.06)
    assert welch([1.0, 1.1, 1.2], [1.6, 1.7])[2] < 0.01 < 0.5 < welch([1.0, 1.1, 1.2], [0.9])[2]


def test_a_prefix_ends_in_a_phrase_that_it_holds_already(tmp_path):
    """There the hints of an n-gram model fire, so the sum is taken with them on."""
    shared = Audit(Artifact(artifact(), tmp_path, "cpu", 60), data())
    prefix = telling_prefix(shared, 200).tolist()
    assert prefix[0] == shared.data.bos and prefix.count(shared.data.bos) == 1 and 150 < len(prefix) <= 201
    assert any(prefix[i : i + 2] == prefix[-2:] for i in range(1, len(prefix) - 2))


def test_a_submission_of_several_seeds_needs_the_logs_of_all(tmp_path, capsys):
    first, second = (copy_of(artifact(), tmp_path / name) for name in ("first", "second"))
    own = json.loads((first / "result.json").read_text())["val_bpb"]
    (second / "train.log").write_text("val_bpb 1.234567 on all targets\n")
    claim = {"val_bpb": (own + 1.234567) / 2, "seed_results": {"1": {"val_bpb": own}, "2": {"val_bpb": 1.234567}}}
    (first / "submission.json").write_text(json.dumps(claim))
    assert run(first, "--only", "evidence") == 1 and "seed 2 val_bpb 1.234567" in capsys.readouterr().out
    assert run(first, "--only", "evidence", "--seeds", str(second)) == 0


@pytest.mark.parametrize(
    "output,words",
    [
        ("", "no output"),
        ("step 1\nerror: no data\n\n", "error: no data"),
        ("=====\n", "no output"),
        (
            "score 1\n[rank1]: ValueError: bad\nW1121 22:04:06.240000 15224 "
            ".venv/torch/distributed/elastic/api.py:1028] Sending\n"
            "E1121 22:04:06.273000 15224 .venv/torch/distributed/elastic/api.py:1002] failed (exitcode: -6) "
            "local_rank: 1 (pid: 15230) of binary: python\n"
            "Traceback (most recent call last):\n=====\ntrain_gpt.py FAILED\n=====",
            "rank 1 ended with -6: [rank1]: ValueError: bad",
        ),
    ],
)
def test_a_failed_run_is_told_in_the_words_of_its_rank(output, words):
    assert last_words(output) == words


# ---- folders as records are published ----

SCRIPT = """import os
lr = float(os.environ.get("MATRIX_LR", 0.02))
seed = int(os.environ.get("SEED", 1))
"""
LOG = """step:9/9 val_loss:2.0 val_bpb:1.3000 train_time:590000ms
Code size: {code} bytes
Serialized model int6: {model} bytes
Total submission size: 60000000 bytes
Total submission size int6+zlib: {total} bytes
final_exact val_loss:2.0 val_bpb:{bpb:.8f} eval_time:80000ms
"""


def published(folder, readme="", claim=None, script=SCRIPT, bpb=(1.1, 1.2), names="train_seed{}.log", total=15_000_000):
    """A record's folder, without model.bin."""
    folder.mkdir(parents=True)
    if script is not None:
        (folder / "train_gpt.py").write_text(script)
    if readme:
        (folder / "README.md").write_text(readme)
    if claim is not None:
        (folder / "submission.json").write_text(json.dumps(claim))
    for seed, value in enumerate(bpb):
        path = folder / names.format(seed)
        path.parent.mkdir(exist_ok=True)
        path.write_text(LOG.format(code=50_000, model=total - 50_000, total=total, bpb=value))
    return folder


def checked(folder, *names, **options) -> dict[str, dict]:
    work = folder.with_name(folder.name + "_work")
    work.mkdir(exist_ok=True)
    return run_checks(Audit(Artifact(folder, work, "cpu", 60), None, **options), [*names])


@pytest.mark.parametrize(
    "text, found",
    [
        ("```bash\nSEED=42 \\\nMATRIX_LR=0.02 \\\n  torchrun --nproc_per_node=8 train_gpt.py\n```\n", "SEED MATRIX_LR"),
        ("```\nA_B=1 \\  \nC=\"two words\" python3 -u train_gpt.py > x.log 2>&1\n```\n", "A_B C"),
        ("```\nfor N in 1 2; do\n  A=1 \\\n  SEED=$N \\\n  python train_gpt.py \\\n  | tee x\ndone\n```", "A SEED"),
        ("```\nexport A=1 B=2\npython train_gpt.py\n```\n", "A B"),
        ("```\nenv A=1 python train_gpt.py\ndocker run -e B=2 image python train_gpt.py\n```\n", "A B"),
        ("Run `A=1 python train_gpt.py` here.\n", "A"),
        ("    A=1 python records/2026/train_gpt.py\n", "A"),
        ("Each shard must hold `BOS_ID=1`, as `train_gpt.py` expects with `CASEOPS_ENABLED=1`.\n", ""),
        ("```\nDATASET=x python3 prepare.py\nSEED=0\nA=1 python train_gpt.py  # not B=2\n```\n", "A"),
        ("```python\nB = dict(WINDOW=12)\n```\nNCCL_NET=Socket, MIN_LR=0.1 in train_gpt.py\n", ""),
        ("~~~sh\r\nA=1 \\\r\npython train_gpt.py\r\n~~~\r\n", "A"),
        ("```\nA=1 uv run torchrun train_gpt.py\n", "A"),
    ],
)  # fmt: skip
def test_the_variables_of_a_readmes_commands(text, found):
    assert variables_of_file("README.md", text) == set(found.split())


def test_a_command_over_several_lines_is_held_against_the_script(tmp_path):
    readme = "Needs `BOS_ID=1` in `train_gpt.py`.\n```\nSEED=1 \\\n{}=0.1 \\\ntorchrun train_gpt.py\n```\n"
    good = checked(published(tmp_path / "good", readme.format("MATRIX_LR")), "settings")["settings"]
    assert good["verdict"] == "PASS" and good["evidence"].startswith("2 variables")
    bad = checked(published(tmp_path / "bad", readme.format("MATRIXLR")), "settings")["settings"]
    assert bad["verdict"] == "FAIL" and "MATRIXLR" in bad["evidence"]
    helped = published(tmp_path / "helped", readme.format("MATRIXLR"))
    (helped / "helper.py").write_text("import os\nos.environ['MATRIXLR']\n")
    assert checked(helped, "settings")["settings"]["verdict"] == "PASS"


CLAIM = {"val_bpb": 1.15, "seed_results": {"0": {"val_bpb": 1.1}, "1": {"val_bpb": 1.2}}, "bytes_total": 15_000_000}


@pytest.mark.parametrize(
    "readme, claim, names, verdict",
    [
        ("| seed | BPB |\n|--|--|\n| 0 | 1.1000 |\n\nBetter than 1.1421 of #99.\n", CLAIM, "train_seed{}.log", "PASS"),
        ("| record | BPB |\n|--|--|\n| somebody | 1.1421 |\n", CLAIM, "train_seed{}.log", "DISPUTED"),
        ("| seed | this | #99 |\n|--|--|--|\n| 0 | 1.1000 | 1.1421 |\n", CLAIM, "train_seed{}.log", "PASS"),
        ("| seed | BPB |\n|--|--|\n| 0 | 1.1421 |\n", CLAIM, "train_seed{}.log", "FAIL"),
        ("val_bpb: 1.1421\n", CLAIM, "train_seed{}.log", "FAIL"),
        ("", CLAIM, "logs/train{}.txt", "PASS"),
        ("", CLAIM, "run_{}.txt", "PASS"),
        ("", {"val_bpb": 1.15}, "train_seed{}.log", "PASS"),  # a mean whose seeds only the logs name
        ("", {"val_bpb": 1.1499}, "train_seed{}.log", "FAIL"),
        ("", {"val_bpb": 1.1499, "seeds": [0, 1]}, "train_seed{}.log", "DISPUTED"),
        ("", {"mean_val_bpb": 1.15, "seeds": {"0": 1.1, "1": 1.2}}, "train_seed{}.log", "PASS"),
        ("", {"val_bpb": 1.15, "seeds": [0, 1], "seed_scores": [1.1, 1.3]}, "train_seed{}.log", "FAIL"),
        ("", {"val_loss": 2.0}, "train_seed{}.log", "FAIL"),
        ("", CLAIM | {"bytes_total": 15_000_001}, "train_seed{}.log", "DISPUTED"),
    ],
)  # fmt: skip
def test_the_evidence_of_a_published_record(readme, claim, names, verdict, tmp_path):
    row = checked(published(tmp_path / "record", readme, claim, names=names), "evidence")["evidence"]
    assert row["verdict"] == verdict, row["evidence"]


def test_a_traceback_that_a_log_only_quotes_is_none(tmp_path):
    folder = published(tmp_path / "record", claim=CLAIM)
    log = folder / "train_seed0.log"
    text = log.read_text()
    log.write_text(text + '    if "Traceback (most recent call last)" in line:\n')
    assert checked(folder, "evidence")["evidence"]["verdict"] == "PASS"
    log.write_text(text + "[rank0]: Traceback (most recent call last):\n")
    assert checked(folder, "evidence")["evidence"]["verdict"] == "FAIL"


@pytest.mark.parametrize("line", ("x = = 1", "def f[T: int = str](x): ...\nprint('", "x = '\0'"))
def test_syntax_that_this_python_does_not_know_is_no_fault(line, tmp_path):
    rows = checked(published(tmp_path / "record", script=f"{SCRIPT}{line}\n"), "source", "settings", "size")
    assert rows["source"]["verdict"] == "NOT RUN" and "Python 3." in rows["source"]["evidence"]
    assert "could not be done" not in str(rows)
    other = published(tmp_path / "other", script=f"{SCRIPT}{line}\n")
    (other / "result.json").write_text(json.dumps({"source_sha256": "0" * 64}))
    assert checked(other, "source")["source"]["verdict"] == "FAIL"  # the hash needs no parser


def test_a_record_without_a_model_is_audited_by_its_papers(tmp_path, capsys):
    folder = published(tmp_path / "record", "```\nSEED=1 python train_gpt.py\n```\n", CLAIM)
    assert main([str(folder), "--workers", "1"]) == 0
    report = json.loads((folder / "audit.json").read_text())
    found = {name: row["verdict"] for name, row in report["checks"].items()}
    ran = dict.fromkeys(("size", "source", "settings", "budget", "seeds", "evidence"), "PASS")
    assert found == dict.fromkeys(CHECKS, "NOT RUN") | ran
    assert [*report["artifact"]] == ["train_gpt.py"] and "no model.bin" in capsys.readouterr().out
    assert run(folder, "--only", "future", "reload", "worlds", "training") == 0  # with data, too


@pytest.mark.parametrize("only", ("train_seed{}.log", "README.md", "submission.json"))
def test_any_paper_alone_gives_a_table(only, tmp_path):
    folder = published(tmp_path / "record", "text\n", CLAIM, names="train_seed{}.log")
    for path in folder.iterdir():
        if not path.match(only.format("*")):
            path.unlink()
    assert main([str(folder), "--workers", "1"]) in (0, 1)
    assert "could not be done" not in (folder / "audit.json").read_text()


def test_sizes_and_clocks_of_a_record_are_those_of_its_logs(tmp_path):
    over = published(tmp_path / "over", script="x = 1\n" * 9_000, total=16_010_000)
    assert checked(over, "size")["size"]["verdict"] == "FAIL"
    packed = published(tmp_path / "packed", total=16_010_000)  # counted with its source, shipped without
    assert checked(packed, "size")["size"]["verdict"] == "DISPUTED"
    assert checked(over, "budget")["budget"]["verdict"] == "PASS"
    for path in over.glob("*.log"):
        path.write_text(path.read_text().replace("590000ms", "900000ms"))
    assert checked(over, "budget")["budget"]["verdict"] == "FAIL"
    next(over.glob("*.log")).write_text("train_time: 599000ms eval_time:1000ms\n")
    assert checked(over, "budget")["budget"]["verdict"] == "DISPUTED"  # one of them may be of a trial
    seeds = checked(published(tmp_path / "tie", claim=CLAIM), "seeds", baseline=(1.14, 1.16))["seeds"]
    assert seeds["verdict"] == "FAIL" and "sample std 0.070711" in seeds["evidence"]


def test_a_result_of_another_model_is_found_by_its_hash(tmp_path):
    folder = copy_of(artifact(), tmp_path / "artifact")
    result = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(json.dumps(result | {"artifact_sha256": {"model.bin": "0" * 64}}))
    row = checked(folder, "size")["size"]
    assert row["verdict"] == "FAIL" and "another model.bin" in row["evidence"]
    assert "another model.bin" in checked(artifact(), "seeds", seeds=(folder,))["seeds"]["evidence"]
