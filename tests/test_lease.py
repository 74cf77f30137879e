"""tools/lease.py with stub scripts: a queue's order, its gate, its end, what comes back and what is printed."""

import json
import lzma
import math
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, RUN, base_run, environment, replaced_environ, result

TOOLS = Path(__file__).resolve().parents[1] / "tools"
LEASE = TOOLS / "lease.py"
sys.path.insert(0, str(TOOLS))

import lease  # noqa: E402
import lease_report  # noqa: E402

OURS = """
import json, os
import numpy as np
steps, bpb = 10, 1.0 + float(os.environ["SEED"]) / 100
if os.environ.get("TTT_EVAL_ONLY"):
    name, result = "eval_result.json", {"bpb": {"quantized": bpb, "adapted": bpb - 0.1}, "bytes": {}, "seconds": {}}
else:
    name, result = "result.json", {"bpb": {"trained": bpb - 0.05, "quantized": bpb}, "bytes": {"total": 15},
                                   "seconds": {"steps": 5.0}, "training": {"steps": steps, "tokens": 1000}}
os.makedirs(os.environ["ARTIFACT_DIR"], exist_ok=True)
json.dump(result, open(os.environ["ARTIFACT_DIR"] + "/" + name, "w"))
tokens = np.fromfile(os.environ["DATA_PATH"] + "/fineweb_val_000000.bin", "<u2", offset=1024)
np.save(os.environ["LEDGER_PATH"], np.full(len(tokens) - 1, bpb))
print("ran with", os.environ["CUDA_VISIBLE_DEVICES"], os.environ.get("MAX_WALLCLOCK_SECONDS"))
"""
PUBLIC = """
import os, time
import numpy as np
print("train_batch_tokens: 786432\\nlease: waiting at the gate", flush=True)
while not os.path.exists(os.environ["LEASE_GATE"]):
    time.sleep(0.05)
print("stopping_early: wallclock_cap train_time: 399592ms step: 945/20000")
print("diagnostic pre-quantization post-ema val_loss:2.3 val_bpb:1.06395844 eval_time:6718ms")
print("GPTQ:collected 67 Hessians in 4.7s", flush=True)
tokens = np.fromfile(os.environ["DATA_PATH"] + "/fineweb_val_000000.bin", "<u2", offset=1024)
np.save(os.environ["ARTIFACT_DIR"] + "/nats_quantized.npy", np.full(len(tokens) - 3, 2.0))
print("diagnostic quantized val_loss:2.3 val_bpb:1.07254371 eval_time:49995ms")
print("Total submission size quantized+brotli: 15897259 bytes")
"""


def write_shard(path: Path, tokens: np.ndarray) -> None:
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(tokens)
    path.write_bytes(header.tobytes() + tokens.astype("<u2").tobytes())


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A machine's folder with forty validation documents of five tokens."""
    (data := tmp_path / "data").mkdir()
    tokens = np.tile([1, 7, 8, 9, 10], 40)
    tokens[1::5] = np.arange(40) + 20
    write_shard(data / "fineweb_val_000000.bin", tokens)
    write_shard(data / "fineweb_val_bytes_000000.bin", np.where(tokens == 1, 0, 3))
    manifest = {
        "train": {"documents": 5, "tokens": 500},
        "val": {"documents": 40, "bytes": 480},
        "duplicates_dropped": 0,
    }
    (data / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "ours.py").write_text(OURS)
    (tmp_path / "public.py").write_text(PUBLIC)
    return tmp_path


def run_queue(root: Path, runs: list[dict], **more) -> dict:
    queue = lease.Queue(root, {"gpus": 4, "runs": runs, **more})
    queue.run()
    return json.loads((root / "state.json").read_text())["runs"]


def stub(root: Path, name: str, code: str, **more) -> dict:
    return {"name": name, "command": [sys.executable, "-c", code], **more}


def test_gate_order_and_report(root: Path, capsys):
    ours = {"script": str(root / "ours.py"), "scale": "tenth"}
    runs = [
        {"name": "pub_s1", "script": str(root / "public.py"), "gpus": 1, "gate": ["ours_s1"]},
        ours | {"name": "ours_s1", "seed": 1, "after": [f"pub_s1:{lease.WAITING}"]},
        ours
        | {"name": "ours_s1_ttt", "seed": 1, "continues": "ours_s1", "pass": "adapted", "shares": True}
        | {"env": "TTT_EVAL_ONLY=1", "after": ["pub_s1:Hessians in"]},
        ours | {"name": "ours_s2", "seed": 2, "after": ["ours_s1_ttt"]},
    ]
    state = run_queue(root, runs)
    assert {name: run["state"] for name, run in state.items()} == dict.fromkeys(state, "ended")
    assert (
        state["ours_s1"]["ended"] <= state["pub_s1"]["ended"] and state["ours_s1"]["ended"] <= state["ours_s2"]["begun"]
    )
    assert "480" in (root / "runs" / "ours_s1" / "console.log").read_text()

    lease.collect(root, root / "out", ledgers=True)
    files = list((root / "out").iterdir())
    assert len(files) <= 8 and (root / "out" / "ours_s1_adapted.f32.xz").exists()
    found = json.loads((root / "out" / "runs.json").read_text())["runs"]
    assert found["pub_s1"]["steps"] == 945 and found["pub_s1"]["tokens"] == 945 * 786432
    assert found["pub_s1"]["bpb"] == {"trained": 1.06395844, "quantized": 1.07254371}
    assert found["ours_s1"]["bpb"]["quantized"] == 1.01 and found["ours_s1_ttt"]["bpb"]["adapted"] == pytest.approx(
        0.91
    )
    bits = dict(np.load(root / "out" / "docs.npz"))
    assert np.isnan(bits["pub_s1/quantized"]).sum() == 1  # the last document lost its tail
    assert bits["ours_s1/quantized"][0] == pytest.approx(5 * 1.01 / math.log(2))
    assert 5 < bits["in_b"].sum() < 35

    lease_report.report([root / "out"])
    text = capsys.readouterr().out
    assert "quantized: pub less ours" in text and "1 against 2, no standard error over seeds" in text
    assert "| pub_s1 (ended) | 945 | 422.8 |" in text


def test_four_at_once_then_one_over_four(root: Path):
    """Short runs share the machine; the long one waits for all GPUs and nothing behind it overtakes."""
    nap = "import time; time.sleep(0.5)"
    runs = [stub(root, f"a{i}", nap) for i in range(4)]
    runs += [stub(root, "wide", nap, gpus=4), stub(root, "last", nap), stub(root, "cpu", nap, gpus=0)]
    state = run_queue(root, runs)
    assert sorted(state[f"a{i}"]["gpus"][0] for i in range(4)) == [0, 1, 2, 3]
    assert state["wide"]["begun"] >= max(state[f"a{i}"]["ended"] for i in range(4))
    assert state["last"]["begun"] >= state["wide"]["ended"]


def test_a_run_waits_until_its_memory_is_free(root: Path):
    """Three sharers of 30 GiB on one GPU of 78: the third begins when one of the first two has ended."""
    nap = ["bash", "-c", "sleep 0.8"]
    sharer = {"shares": True, "memory": 30, "command": nap, "env": "CUDA_VISIBLE_DEVICES=1"}
    runs = [sharer | {"name": f"on1_{i}"} for i in range(3)] + [
        sharer | {"name": "on0", "env": "CUDA_VISIBLE_DEVICES=0"}
    ]
    queue = lease.Queue(root, {"gpus": 2, "runs": runs})
    queue.run()
    jobs = queue.jobs
    assert {job.state for job in jobs.values()} == {"ended"}
    first = min(jobs[name].ended for name in ("on1_0", "on1_1"))
    assert jobs["on1_2"].begun >= first
    assert max(jobs[name].begun for name in ("on1_0", "on1_1", "on0")) < first  # another GPU's run does not wait


def test_limit_ends_what_runs(root: Path):
    """A run and its children end at the limit; what waits is left out."""
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    begun = time.time()
    state = run_queue(root, [stub(root, "long", code, gpus=4), stub(root, "never", code, gpus=4)], seconds=1)
    assert time.time() - begun < 15
    assert state["long"]["state"].startswith("failed") and state["never"]["state"] == "left out"


def test_detached_start_and_status(root: Path):
    """The queue runs on after the call that started it."""
    (root / "queue.json.in").write_text(json.dumps({"gpus": 1, "runs": [stub(root, "one", "print('a last line')")]}))
    subprocess.run([sys.executable, LEASE, "start", root, root / "queue.json.in"], check=True)
    asked = [sys.executable, LEASE, "status", root, "--wait", "20", "--out", root / "out"]
    found = subprocess.run(asked, check=True, capture_output=True)
    assert (root / "out" / "logs.tar.xz").exists() and (root / "out" / "runs.json").exists()
    assert "queue: ended" in found.stdout.decode() and "a last line" in found.stdout.decode()


def test_another_machine_is_noticed_at_once(tmp_path: Path):
    """A machine that went back between two calls took the queue along: no minute is spent waiting on its successor."""
    with pytest.raises(SystemExit, match="another machine"):
        lease.status(tmp_path, 600, None)


@pytest.mark.parametrize(
    "runs",
    [
        [{"name": "a", "after": ["b"]}],
        [{"name": "a", "continues": "b"}],
        [{"name": "a", "gpus": 5}],
        [{"name": "a", "memory": 90}],
    ],
)
def test_a_bad_queue_is_refused(root: Path, runs: list[dict]):
    with pytest.raises(SystemExit):
        lease.Queue(root, {"gpus": 4, "runs": runs})


def test_documents_are_shuffled_the_same_way(tmp_path: Path):
    """Files in numeric order, one shuffle by the seed, validation as it is."""
    (corpus := tmp_path / "corpus").mkdir()
    for name, texts in {"docs-2": "abc", "docs-10": "def", "val-web": "xyz"}.items():
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (corpus / f"{name}.jsonl.xz").write_bytes(lzma.compress(lines.encode()))
    texts = []
    for out in (tmp_path / "one", tmp_path / "two"):
        assert lease.write_documents(corpus, "docs-*.jsonl.xz", out, seed=0) == 3
        texts.append((out / "train.jsonl").read_text())
    assert texts[0] == texts[1] and sorted(texts[0].split()) != texts[0].split()
    assert [json.loads(line)["text"] for line in (tmp_path / "one" / "val.jsonl").read_text().splitlines()] == list(
        "xyz"
    )


def test_bits_of_joined_operators_stay_with_their_document(tmp_path: Path):
    """JOIN_OPERATORS leaves fewer targets; each of the rest counts in its own document."""
    tokens = np.array([1, 7, 4, 9, 1, 4, 7, 4, 1, 7, 7, 5], "<u2")  # 1: BOS, 7: a space, 4 and 5: operators
    for name, values in (("val_0", tokens), ("val_bytes_0", np.ones(12, "<u2"))):
        (tmp_path / f"fineweb_{name}00000.bin").write_bytes(bytes(1024) + values.astype("<u2").tobytes())
    documents = lease.Documents(tmp_path)
    joined = documents.joined(7, [4, 5])
    assert len(joined.document) == len(documents.document) - 3
    assert (joined.bits(np.full(8, math.log(2))) == [3, 3, 2]).all()
    assert (documents.bits(np.full(11, math.log(2))) == [4, 4, 3]).all()


def test_differences():
    """Paired where the seeds are the same, Welch where they are not, nothing from one run."""
    mean, error, how = lease_report.difference({"1": 1.0, "2": 1.2}, {"1": 0.9, "2": 1.0})
    assert mean == pytest.approx(0.15) and error == pytest.approx(0.05) and "pairs" in how
    mean, error, how = lease_report.difference({"1": 1.0, "2": 1.2}, {"3": 0.9, "4": 1.0, "5": 1.1})
    assert mean == pytest.approx(0.1) and error == pytest.approx(math.sqrt(0.02 / 2 + 0.01 / 3)) and "Welch" in how
    assert lease_report.difference({"1": 1.0}, {"1": 0.9})[1] is None
    size = np.full(50, 10.0)
    a = np.random.default_rng(0).normal(10, 1, 50)
    assert lease_report.over_documents(a, np.full(50, 10.0), size) == pytest.approx(
        a.std(ddof=1) / math.sqrt(50) / 10, rel=1e-6
    )


def test_a_curve_has_one_point_for_each_budget(tmp_path: Path):
    def run(curve: str, seconds: float, bpb: float) -> dict:
        entry = {"curve": curve} if curve else {}
        steps = int(seconds * 5)
        about = {"seconds": {"steps": seconds}, "steps": steps, "tokens": steps * 1000, "bpb": {"trained": bpb}}
        return {"entry": entry, "gpus": [0, 1]} | about

    runs = {
        "a": run("ours@400", 388.0, 1.25),
        "b": run("ours@100", 88.0, 1.30),
        "c": run("ours@400", 387.0, 1.27),
        "d": run("1855@400", 399.0, 1.28),
        "e": run("", 10.0, 3.0),
    }
    curves = lease_report.points(runs, 10_000)
    assert set(curves) == {"ours", "1855"} and curves["1855"] == [(798.0, 1995, 199.5, 1.28, 0.0)]
    short, long = curves["ours"]
    assert short == (176.0, 440, 44.0, 1.30, 0.0)
    assert long == pytest.approx((775.0, 1937.5, 193.75, 1.26, 0.01))
    lease_report.draw_curves(runs, 10_000, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit, match="no run names a curve"):
        lease_report.draw_curves({}, 10_000, tmp_path / "none.png")


def test_trained_weights_are_scored_by_the_script_itself(tmp_path: Path):
    """`score` calls into train_gpt.py, so a renaming there must fail here."""
    folder = base_run()
    with replaced_environ(environment(RUN, folder)):
        lease.score(ROOT / "train_gpt.py", tmp_path / "nats.npy")
    nats, val = np.load(tmp_path / "nats.npy"), result(folder)["data"]
    assert len(nats) == val["val_targets"]
    bpb = nats.sum() / math.log(2) / val["val_bytes"]
    assert bpb == pytest.approx(result(folder)["bpb"]["trained"], abs=1e-6)
