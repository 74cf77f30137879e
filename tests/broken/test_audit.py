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
