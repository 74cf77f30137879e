"""tools/report.py: what it reads, what it refuses, and baselines that agree with figures worked out by hand."""

import gzip
import json
import math
import os
import re
import shutil
import subprocess
import sys
import zlib
from itertools import pairwise

import numpy as np
import pytest
from helpers import ROOT, base_run

import lossless_caps
import prepare_data
import train_gpt
from tools import baselines as counting
from tools import plots, report, runs
from tools.audit.tamper import KNOWN
from tools.streams import document_texts, read_stream

RESULT = {
    "bpb": {"trained": 1.5, "quantized": 1.5123456},
    "val_bpb": 1.5123456,
    "bytes": {"code": 30_000, "model": 500_000, "total": 530_000},
    "dataset": "other",
    "seconds": {
        "train": 58.5,
        "eval": 9.0,
        "setup": 0.1,
        "warmup": 3.0,
        "steps": 55.0,
        "calibrate": 3.0,
        "quantize": 0.5,
        "load": 1.0,
        "score": 8.0,
        "diagnostic": 8.0,
    },
    "training": {
        "steps": 40,
        "tokens": 40_960,
        "seconds": 55.0,
        "epochs": 0.5,
        "curve": [[1, 1.4, 6.9, 1.0], [20, 27.0, 4.0, 1.0], [40, 55.0, 3.0, 0.1]],
    },
    "settings": {"max_wallclock_seconds": 60.0, "artifact_cap": 16_000_000},
    "seed": 7,
    "hardware": "CPU, 2 threads x 1 rank(s)",
    "versions": {"torch": "2.13.0"},
    "data": {"dataset": "other", "val_documents": 12, "val_bytes": 34_567},
    "verdicts": {"bytes": {"verdict": "PASS", "reason": ""}, "C1": {"verdict": "NOT RUN", "reason": ""}},
}
PNG = b"\x89PNG\r\n\x1a\n"


def make_run(folder, **changes):
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(RESULT | changes))
    return folder


def refused(capsys, *arguments) -> str:
    assert report.main([*map(str, arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    return err


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """A small corpus with capitals, accents and characters that only byte fallback spells."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    words = [
        "the",
        "River",
        "NASA",
        "iPhone",
        "École",
        "北京",
        "counts",
        "tokens",
        "and",
        "bytes.",
        "  two  spaces",
        "É",
    ]
    texts = [f"{i} " + " ".join(rng.choice(words, rng.integers(20, 60))) for i in range(60)]
    (folder / "docs.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    arguments = [
        "--source",
        str(folder / "docs.jsonl"),
        "--out",
        str(folder / "out"),
        "--val-docs",
        "12",
        "--vocab-size",
        "320",
        "--workers",
        "1",
    ]
    assert prepare_data.main(arguments) == 0
    return folder / "out", texts[:12]


def test_one_run(tmp_path, capsys):
    run = make_run(tmp_path / "run")
    (run / "train.log").write_text(
        "step 0: attention span 512\nstep 20: loops on at progress 0.5, visits [0, 1, 1]\n<angle brackets>\n"
    )
    assert report.main([str(run)]) == 0
    out = capsys.readouterr().out
    for figure in (
        "1.500000",
        "1.512346",
        "530,000",
        "58.5",
        "40,960 tokens",
        "seed 7",
        "CPU, 2 threads",
        "34,567 bytes, not the contest's",
        "val_bpb 1.512346",
        "bytes PASS",
    ):
        assert figure in out
    assert "C1" not in out and "DIFFERENT" not in out
    assert all((run / name).read_bytes().startswith(PNG) for name in ("loss.png", "phases.png"))
    page = (run / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2 * 2 and "1.512346" in page and "&lt;angle brackets&gt;" in page
    assert not list(run.glob("*.part"))


def test_several_runs(tmp_path, capsys):
    runs = [
        make_run(tmp_path / str(seed), seed=seed, val_bpb=bpb, bpb={"trained": bpb - 0.01, "quantized": bpb})
        for seed, bpb in ((1, 1.5), (2, 1.6), (3, 1.7))
    ]
    assert report.main([*map(str, runs), "--out", str(tmp_path / "out")]) == 0
    lines = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines() if line}
    assert lines["2"][1:5] == ["2", "1.590000", "1.600000", "1.600000"]
    assert lines["mean"][1:] == ["1.590000", "1.600000", "1.600000"] and lines["std"][1:] == ["0.100000"] * 3
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"loss.png", "phases.png", "report.html"}


def configured(folder, seed, bpb, **changes):
    changes = {"seed": seed, "val_bpb": bpb, "bpb": {"trained": bpb - 0.01, "quantized": bpb}} | changes
    return make_run(folder / f"{seed}-{len(list(folder.glob('*')))}", **changes)


@pytest.mark.parametrize(
    "other, word",
    [
        ({"settings": RESULT["settings"] | {"matrix_lr": 0.1}}, "MATRIX_LR=0.1"),
        ({"source_sha256": "f" * 64}, "source=ffffffffffff"),
        ({"data": RESULT["data"] | {"val_sha256": "e" * 64}}, "validation=eeeeeeeeeeee"),
    ],
)
def test_a_mean_is_over_seeds_of_one_configuration(tmp_path, capsys, other, word):
    """Of a sweep's folders each configuration has a mean of its own, and nothing is the headline."""
    (tmp_path / "runs").mkdir()
    runs = [configured(tmp_path / "runs", seed, bpb) for seed, bpb in ((1, 1.5), (2, 1.6))]
    runs += [configured(tmp_path / "runs", seed, bpb, **other) for seed, bpb in ((1, 2.5), (2, 2.7))]
    assert report.main([*map(str, runs), "--out", str(tmp_path / "out")]) == 0
    out, page = capsys.readouterr().out, (tmp_path / "out" / "report.html").read_text()
    means = [line for line in out.splitlines() if line.startswith("mean")]
    assert len(means) == 2 and "1.550000" in means[0] and "2.600000" in means[1] and word in means[1]
    assert "2.075" not in out + page and "mean of 4" not in page and "2 configurations" in page


def test_a_seed_twice_has_no_mean(tmp_path, capsys):
    (tmp_path / "runs").mkdir()
    runs = [configured(tmp_path / "runs", 1, bpb) for bpb in (1.5, 1.6)]
    assert report.main([*map(str, runs), "--out", str(tmp_path / "out")]) == 0
    assert "\nmean" not in capsys.readouterr().out
    assert "1.55" not in (tmp_path / "out" / "report.html").read_text()


def test_the_page_has_the_conditions_of_every_run(tmp_path):
    """Also those that the first run does not name."""
    (tmp_path / "runs").mkdir()
    verdicts = RESULT["verdicts"] | {"C9": {"verdict": "FAIL", "reason": "only the second knows"}}
    runs = [configured(tmp_path / "runs", 1, 1.5), configured(tmp_path / "runs", 2, 1.6, verdicts=verdicts)]
    assert report.main([*map(str, runs), "--out", str(tmp_path / "out")]) == 0
    assert "<td>C9</td>" in (tmp_path / "out" / "report.html").read_text()


ROW = {"verdict": "PASS", "reason": "seen", "evidence": "seen"}


@pytest.mark.parametrize(
    "audit",
    [
        {"verdicts": {"C1": ROW | {"verdict": "LEGAL"}}, "checks": {"future": ROW}},
        {"verdicts": {"C1": {"verdict": "PASS"}}, "checks": {"future": ROW}},
        {"verdicts": {"C1": ROW}, "checks": {"future": {"verdict": "FAIL"}}},
        {"verdicts": {"C1": ROW}, "checks": {"future": "PASS"}},
        {"verdicts": {"C1": ROW}, "checks": {"future": ROW}, "artifact": ["model.bin"]},
        {"verdicts": {"C1": ROW}, "checks": {"future": ROW}, "artifact": {"model.bin": "0"}},
    ],
)
def test_refuses_a_bad_audit(tmp_path, capsys, audit):
    run = make_run(tmp_path / "run")
    (run / "audit.json").write_text(json.dumps(audit))
    assert "run tools/audit.py again" in refused(capsys, run)


@pytest.mark.parametrize("coding", ("utf-8", "latin-1"))
def test_names_outside_ascii_under_the_locale_c(tmp_path, coding):
    """Tables, pictures, pages and errors; the second name is no UTF-8 at all."""
    name = os.fsdecode(b"caf\xe9" if coding == "latin-1" else "café 北京".encode())
    run = make_run(tmp_path / name)
    (run / "train.log").write_text("step 1: École\n", encoding="utf-8")
    bare = {key: value for key, value in os.environ.items() if not key.startswith(("LC_", "LANG", "PYTHONUTF8"))}
    env = bare | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    call = lambda *arguments: subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=runs.ROOT, env=env, capture_output=True
    )
    done = call("tools/report.py", run, "--name", name)
    assert done.returncode == 0 and not done.stderr, done.stderr.decode(errors="replace")
    page = (run / "report.html").read_text(encoding="utf-8")
    assert ("caf\ufffd" if coding == "latin-1" else "café 北京") in page and "École" in page
    for arguments in (
        ("tools/report.py", run / "none"),
        ("tools/anatomy.py", run / "none", "--data", run),
        ("tools/audit.py", run / "none"),
    ):
        failed = call(*arguments)
        assert failed.returncode == 2 and failed.stderr.count(b"\n") == 1 and b"caf" in failed.stderr, failed.stderr


def test_failed_condition_and_short_run(tmp_path, capsys):
    result = {key: value for key, value in RESULT.items() if key != "val_bpb"} | {
        "training": {"steps": 0},
        "settings": {"max_wallclock_seconds": 0.0},
    }
    run = tmp_path / "run"
    run.mkdir()
    (run / "result.json").write_text(json.dumps(result))
    assert report.main([str(run)]) == 0
    assert "no val_bpb" in capsys.readouterr().out
    assert not (run / "loss.png").exists() and (run / "phases.png").exists()


@pytest.mark.parametrize(
    "text, complaint",
    [
        (None, "no such file"),
        ("", "not JSON"),
        (json.dumps(RESULT)[:-40], "not JSON"),
        ("\xff\xfe", "not JSON"),
        ("[]", "not a JSON object"),
        ("{}", "holds no bpb"),
        (json.dumps({key: value for key, value in RESULT.items() if key != "seconds"}), "holds no seconds"),
        (json.dumps(RESULT | {"bpb": {}}), "bpb is empty"),
        (json.dumps(RESULT | {"bpb": {"trained": math.nan}}), "not finite"),
        (json.dumps(RESULT | {"val_bpb": math.nan}), "not finite"),
        (json.dumps(RESULT | {"seconds": {"train": -math.inf}}), "not finite"),
        (json.dumps(RESULT | {"settings": {"matrix_lr": math.inf}}), "not finite"),
        (json.dumps(RESULT | {"val_bpb": "1.51"}), "val_bpb is '1.51'"),
        (json.dumps(RESULT).replace('"val_bpb": 1.5123456', '"val_bpb": 1e999'), "val_bpb is inf"),
        (json.dumps(RESULT | {"bytes": {"total": "530,000"}}), "bytes of total"),
        (json.dumps(RESULT | {"seconds": {"eval": None}}), "seconds of eval"),
        (json.dumps(RESULT | {"training": {"steps": "many"}}), "steps is 'many'"),
        (json.dumps(RESULT | {"training": {"curve": [[1, 2.0]]}}), "curve"),
        (json.dumps(RESULT | {"val_curve": [[1, 2.0]]}), "val_curve"),
        (json.dumps(RESULT | {"val_curve": 1.5}), "val_curve"),
        (json.dumps(RESULT | {"data": RESULT["data"] | {"val_bytes": 0}}), "val_bytes is 0"),
        (json.dumps(RESULT | {"verdicts": {"C1": {"verdict": "LEGAL", "reason": ""}}}), "on C1 is 'LEGAL'"),
        (json.dumps(RESULT | {"verdicts": {"C1": {"verdict": ["PASS"], "reason": ""}}}), "on C1 is ['PASS']"),
        (json.dumps(RESULT | {"verdicts": {"C1": "PASS"}}), "on C1 has no reason"),
        ("[" * 100_000, "not JSON"),
        (json.dumps(RESULT | {"data": {"dataset": "other"}}), "lacks val_documents"),
    ],
)
def test_refuses_a_bad_result(tmp_path, capsys, text, complaint):
    run = tmp_path / "run"
    run.mkdir()
    if text is not None:
        (run / "result.json").write_text(text, encoding="latin-1")
    err = refused(capsys, run)
    assert complaint in err and str(run / "result.json") in err
    assert sorted(path.name for path in run.iterdir()) == (["result.json"] if text is not None else [])


def test_rescored_must_equal_as_printed(tmp_path, capsys):
    run = make_run(tmp_path / "run")
    (run / "baselines.json").write_text(
        json.dumps({"bpb": {"gzip -9": 2.0, "token bigram": 1.9}, "fingerprint": {}, "text_bytes": 1, "bigram": ""})
    )
    for value, status in ((1.51234561, 0), (1.5123468, 1)):
        (run / "eval_result.json").write_text(json.dumps({"bpb": {"quantized": value}}))
        assert report.main([str(run), "--check"]) == status
        out, err = capsys.readouterr()
        assert ("DIFFERENT" in out) == bool(status) == ("eval_result.json" in err)
    (run / "eval_result.json").write_text(json.dumps({"bpb": {"adapted": 1.4}}))
    assert report.main([str(run), "--check"]) == 1


@pytest.mark.parametrize(
    "baselines, status",
    [
        ({"gzip -9": 1.51, "token bigram": 1.51}, 0),
        ({"gzip -9": 1.5, "token bigram": 1.51}, 1),
        ({"gzip -9": 1.51, "token bigram": 1.49}, 1),
        (None, 1),
    ],
)
def test_check_demands_a_win_over_both_baselines(tmp_path, capsys, baselines, status):
    run = make_run(tmp_path / "run")
    if baselines:
        (run / "baselines.json").write_text(
            json.dumps({"bpb": baselines, "fingerprint": {}, "text_bytes": 1, "bigram": ""})
        )
    assert report.main([str(run), "--check"]) == status
    err = capsys.readouterr().err
    assert err.count("check failed") == status
    assert ("DEMO_SECONDS=" in err) == bool(status and baselines)  # the remedy, which the Makefile must know
    assert "\nDEMO_SECONDS ?=" in (ROOT / "Makefile").read_text(encoding="utf-8")


def test_baselines(tmp_path, capsys, dataset):
    data, texts = dataset
    run = make_run(tmp_path / "run")
    assert report.main([str(run), "--baselines", str(data)]) == 0
    found = json.loads((run / "baselines.json").read_text())
    spelled = "".join(re.sub(" +", " ", text) for text in texts).encode()  # this corpus knows no other normalisation
    size = sum(np.fromfile(path, "<u2", offset=1024).sum(dtype=int) for path in data.glob("fineweb_val_bytes_*.bin"))
    stream = zlib.compressobj(9, zlib.DEFLATED, -15)
    deflated = len(stream.compress(spelled) + stream.flush()) + 18  # gzip adds a header of 10 bytes and a trailer of 8
    assert found["bytes"] == size == sum(len(text.encode()) for text in texts) and found["text_bytes"] == len(spelled)
    assert found["bpb"]["gzip -9"] == pytest.approx(8 * deflated / size)
    assert gzip.decompress(counting.COMPRESSORS["gzip -9"](spelled)) == spelled
    assert found["bpb"]["token bigram"] < found["bpb"]["token unigram"]
    assert "gzip -9" in capsys.readouterr().out


def test_baselines_are_kept_until_the_data_changes(tmp_path, capsys, dataset, monkeypatch):
    data, _ = dataset
    run = make_run(tmp_path / "run")
    assert report.main([str(run), "--baselines", str(data)]) == 0
    kept = json.loads((run / "baselines.json").read_text())
    monkeypatch.setattr(counting, "compute_baselines", lambda *_: pytest.fail("computed again"))
    assert report.main([str(run), "--baselines", str(data)]) == 0
    (run / "baselines.json").write_text(json.dumps(kept | {"fingerprint": {"val_sha256": "of other data"}}))
    monkeypatch.setattr(counting, "compute_baselines", lambda *_: kept)
    assert report.main([str(run), "--baselines", str(data)]) == 0
    assert json.loads((run / "baselines.json").read_text()) == kept
    capsys.readouterr()
    (run / "result.json").write_text(json.dumps(RESULT | {"data": RESULT["data"] | {"val_sha256": "of other data"}}))
    assert "not the validation documents" in refused(capsys, run, "--baselines", data)
    assert "fineweb_val_*.bin" in refused(capsys, run, "--baselines", tmp_path)


def test_documents_come_back_from_their_tokens(dataset):
    data, texts = dataset
    tokens = read_stream(data, "val")
    assert document_texts(tokens, data / "tokenizer.model") == [re.sub(" +", " ", text) for text in texts]


def test_operators_that_normalisation_orphaned_are_dropped(dataset):
    data, _ = dataset
    encoder = prepare_data.Encoder(data / "tokenizer.model", lossless_caps.NAME)
    tokens = np.concatenate([[1], encoder.tokens("E\u0301cole Word")]).astype(
        np.uint16
    )  # E + accent: NFKC joins what the operator pointed at
    with pytest.raises(lossless_caps.CaseOpsError):
        lossless_caps.decode(encoder.sp.decode(tokens[1:].tolist()))
    assert document_texts(tokens, data / "tokenizer.model") == ["école word"]


def test_bigram_is_a_distribution_and_knows_what_it_saw():
    rng = np.random.default_rng(1)
    tokens = rng.choice(20, 3000, p=(p := 1 / np.arange(1, 21)) / p.sum()).astype(np.uint16)
    tokens[tokens == 7] = 8  # 7 is never seen, neither before nor behind a token
    model = counting.Bigram(tokens, 20)
    heads, tails = (grid.ravel().astype(np.uint16) for grid in np.meshgrid(np.arange(20), np.arange(20), indexing="ij"))
    table = model.probability(heads, tails).reshape(20, 20)
    assert table.sum(1) == pytest.approx(np.ones(20)) and table.min() > 0
    assert (table[:, 7] <= table.min(1)).all() and table[7] == pytest.approx(model.lower)
    seen = max(pairs := [*pairwise(tokens.tolist())], key=pairs.count)
    assert table[seen] == pytest.approx(pairs.count(seen) / tokens[:-1].tolist().count(seen[0]), rel=0.1)


def test_discounts_follow_the_counts_of_counts():
    counts = np.repeat([1, 2, 3, 4, 9], [100, 40, 20, 10, 5])
    ratio = 100 / 180
    assert counting.kneser_ney_discounts(counts) == pytest.approx(
        [0, 1 - 2 * ratio * 40 / 100, 2 - 3 * ratio * 20 / 40, 3 - 4 * ratio * 10 / 20]
    )
    assert counting.kneser_ney_discounts(np.array([1, 1, 5])).tolist() == [0, 0.75, 0.75, 0.75]


def test_bits_of_every_kind_add_up_to_the_file(tmp_path):
    run = report.load_run(shutil.copytree(base_run(), tmp_path / "run"))
    bits = report.bits_by_tensor(run)
    assert {"qkv", "o", "up", "down", "tok_emb"} < set(bits)
    assert sum(entry["bits"] for entry in bits.values()) == pytest.approx(8 * run.result["bytes"]["model"], abs=1e-3)
    assert all(entry["bits"] > 0 for entry in bits.values())
    assert bits["tok_emb"]["weights"] == 320 * 32 and 1 < bits["tok_emb"]["bits"] / bits["tok_emb"]["weights"] < 17
    kept = json.loads((tmp_path / "run" / "bits.json").read_text())
    assert kept["bits"] == bits
    (tmp_path / "run" / "bits.json").write_text(json.dumps({"sha256": kept["sha256"], "bits": {}}))
    assert report.bits_by_tensor(run) == bits  # figures of an earlier version did not add up
    (tmp_path / "run" / "model.bin").write_bytes(b"another version's")
    assert report.bits_by_tensor(run) == {}  # neither the kept figures of another file nor a traceback


def test_page_with_everything(tmp_path, capsys):
    """Four pictures: also the coded bits, the BPB by length and by position, and the interval, where a run holds
    them."""
    run = shutil.copytree(base_run(), tmp_path / "run")
    found = json.loads((run / "result.json").read_text())
    found |= {
        "bpb_by_length": [{"upto": 64, "bpb": 2.0, "documents": 3}, {"upto": 1024, "bpb": 1.5, "documents": 9}],
        "bpb_by_position": [{"upto": 16, "bpb": 3.0}, {"upto": 1024, "bpb": 1.5}],
        "bpb_interval": [1.23456, 7.0],
    }
    (run / "result.json").write_text(json.dumps(found))
    assert report.main([str(run)]) == 0
    page = (run / "report.html").read_text()
    assert (
        page.count("data:image/png;base64,") == 2 * 4  # each wide and narrow
        and "1.23456 to 7.00000" in page
        and f"{found['val_bpb']:.5f} BPB" in page
        and "score before update" in page
    )


def test_facts_that_stand_twice_agree():
    """train_gpt.py imports nothing of the project, and the auditor does not ask what it audits."""
    budgets = train_gpt.Phases.BUDGET
    assert runs.TRAIN_PHASES == tuple(name for name, budget in budgets.items() if budget == "train")
    assert runs.OUTSIDE_PHASES == tuple(name for name, budget in budgets.items() if budget is None)
    for tokens, sizes in train_gpt.CONTEST_SETS.items():
        assert set(sizes) <= set(KNOWN[tokens])
    assert set(prepare_data.CONTEST_VAL_TOKENS.values()) <= set(KNOWN)


def figures(monkeypatch, plot, *arguments):
    """The figure that a plot would save."""
    drawn = []
    monkeypatch.setattr(plots, "as_png", lambda figure: drawn.append(figure) or b"")
    plot(*arguments)
    return drawn[0]


def curved_run(tmp_path, name: str = "run", **changes) -> runs.Run:
    rng = np.random.default_rng(0)
    curve = [[step, step * 0.1, 7 - step / 200 + rng.normal() / 10, 1.0] for step in range(400)]
    bins = [{"upto": n, "bpb": 2.0, "documents": 12_345, "targets": 1_234_567} for n in (64, 1024, 8192)]
    parts = {"bpb_by_length": bins, "bpb_by_position": bins}
    folder = make_run(tmp_path / name, training=RESULT["training"] | {"curve": curve}, **parts, **changes)
    return report.load_run(folder)


@pytest.mark.parametrize("narrow", [False, True])
def test_loss_is_smoothed_over_its_points(tmp_path, monkeypatch, narrow):
    run = curved_run(tmp_path)
    figure = figures(monkeypatch, plots.plot_loss, [run], narrow)
    points, line = figure.axes[0].lines
    curve = np.array(run.result["training"]["curve"])
    assert points.get_linestyle() == "None" and line.get_linestyle() == "-"
    assert np.array_equal(points.get_ydata(), curve[:, 2])
    rough, smooth = (np.abs(np.diff(y, 2)).mean() for y in (curve[:, 2], line.get_ydata()))
    assert smooth < rough / 10
    assert line.get_ydata()[[0, -1]] == pytest.approx(curve[[0, -1], 2])  # not bent at its ends


def test_scores_during_training_have_an_axis_of_their_own(tmp_path, monkeypatch):
    curve = [[100, 10.0, 2.5], [200, 20.0, 2.0]]
    both = [curved_run(tmp_path, "a", val_curve=curve), curved_run(tmp_path, "b")]
    figure = figures(monkeypatch, plots.plot_loss, both)
    assert len(figure.axes) == 4
    for axis, column in zip(figure.axes[2:], (0, 1)):
        assert axis.lines[0].get_xdata().tolist() == [row[column] for row in curve]
        assert axis.lines[0].get_ydata().tolist() == [2.5, 2.0] and len(axis.lines[1].get_xdata()) == 0
        assert axis.lines[0].get_color() == figure.axes[0].lines[0].get_color() and "BPB" in axis.get_ylabel()
    assert len(figures(monkeypatch, plots.plot_loss, both[1:]).axes) == 2


def test_a_running_mean_keeps_a_straight_line():
    mean, window = plots.smoothed(np.arange(100.0))
    assert window == 5 and mean == pytest.approx(np.arange(100.0))
    assert plots.smoothed(np.array([3.0, 1.0]))[0].tolist() == [3.0, 1.0]


def test_no_line_runs_through_categories(tmp_path, monkeypatch):
    two = [curved_run(tmp_path, name) for name in "ab"]
    for plot, panels in ((plots.plot_phases, (0,)), (plots.plot_documents, (0, 1))):
        figure = figures(monkeypatch, plot, two)
        lines = [line for panel in panels for line in figure.axes[panel].lines]
        assert len(lines) >= 2 and all(line.get_linestyle() == "None" for line in lines)
        assert lines[0].get_xdata()[0] != lines[1].get_xdata()[0]  # side by side: none hides another


def test_counts_stand_at_their_bins(tmp_path, monkeypatch):
    figure = figures(monkeypatch, plots.plot_documents, [curved_run(tmp_path)])
    labels = [[tick.get_text() for tick in axis.get_xticklabels()] for axis in figure.axes]
    assert labels == [["64\n12.3k", "1,024\n12.3k", "8,192\n12.3k"], ["64\n1.23M", "1,024\n1.23M", "8,192\n1.23M"]]


@pytest.mark.parametrize("narrow", [False, True])
def test_no_name_hides_what_is_drawn(tmp_path, monkeypatch, narrow):
    """Names of baselines beside the points, even where a stage is at one; the legend of the loss below its panels."""
    run = curved_run(tmp_path)
    run.baselines = {"bpb": {"gzip -9": run.stages["trained"], "token bigram": list(run.stages.values())[-1]}}
    figure = figures(monkeypatch, plots.plot_phases, [run], narrow)
    figure.canvas.draw()
    axis = figure.axes[0]
    places = [
        place
        for line in axis.lines
        for place in axis.transData.transform(line.get_xydata())
        if len(line.get_xdata()) == len(run.stages)
    ]
    names = [text.get_window_extent() for text in axis.texts if text.get_text().startswith(("gzip", "token"))]
    assert len(places) >= 2 and len(names) == 2
    assert not any(box.padded(5).contains(*place) for box in names for place in places)
    sums = [text for text in figure.axes[1].texts if "limit" not in text.get_text()]
    assert len(sums) == 3 and all(text.get_bbox_patch() for text in sums)  # no line of the limit runs through them
    loss = figures(monkeypatch, plots.plot_loss, [run], narrow)
    assert [axis.get_legend() for axis in loss.axes] == [None, None]
    assert [text.get_text() for text in loss.legends[0].get_texts()] == [f"{run.name}, seed {run.result['seed']}"]


def test_every_phase_has_a_colour_of_its_own(tmp_path, monkeypatch):
    assert set(train_gpt.Phases.BUDGET) <= set(plots.PHASE_COLOURS)
    assert len(set(plots.PHASE_COLOURS.values())) == len(plots.PHASE_COLOURS)
    figure = figures(monkeypatch, plots.plot_phases, [curved_run(tmp_path)])
    axis = figure.axes[1]
    named = {text.get_text().split()[0] for text in axis.get_legend().get_texts()}
    assert named == {name for name in RESULT["seconds"] if name not in ("train", "eval")}
    shown = {tuple(patch.get_facecolor()) for patch in axis.patches}
    assert len(shown) == len(named)


def test_the_page_fits_a_phone(tmp_path, capsys):
    run = curved_run(tmp_path)
    assert report.main([str(run.folder)]) == 0
    page = (run.folder / "report.html").read_text()
    assert "initial-scale=1" in page and "@media (max-width: 720px)" in page
    assert page.count('<source media="(max-width: 720px)"') == page.count("<img ")
