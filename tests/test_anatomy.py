"""tools/anatomy.py: bins and interval worked out by hand, from a saved ledger, and their way into the report."""

import json
import math
import shutil

import numpy as np
import pytest
from helpers import base_run, data, scratch, write_shard

from tools import anatomy, report
from tools.runs import ReportError, load_run

BIT = math.log(2)


def test_bins_by_hand():
    """Two documents: 3 targets of a bit a byte, then 100 of two bits a byte, the first 64 of them in the first bin."""
    nats = np.r_[np.full(3, BIT), np.full(100, 2 * BIT)]
    sizes = np.ones(103, np.int64)
    found = anatomy.anatomy(nats, sizes, np.array([0, 3]))
    assert found["bpb_by_length"] == [
        {"upto": 64, "bpb": pytest.approx(1.0), "targets": 3, "documents": 1},
        {"upto": 256, "bpb": pytest.approx(2.0), "targets": 100, "documents": 1},
    ]
    assert found["bpb_by_position"] == [
        {"upto": 64, "bpb": pytest.approx((3 + 128) / 67), "targets": 67, "documents": 2},
        {"upto": 256, "bpb": pytest.approx(2.0), "targets": 36, "documents": 1},
    ]
    # A draw is one document twice, or both.
    assert found["bpb_interval"] == pytest.approx([1.0, 2.0])


def test_a_document_without_targets_and_bins_without_bytes():
    """BOS as the last token begins a document of which nothing is scored."""
    found = anatomy.anatomy(np.full(4, BIT), np.array([0, 1, 1, 0]), np.array([0, 4]))
    assert [part["targets"] for part in found["bpb_by_length"]] == [4]
    assert found["bpb_by_length"][0]["bpb"] == pytest.approx(2.0)


def test_from_a_ledger_to_the_report(tmp_path, capsys):
    """Computed once, kept beside the ledger and bound to it; the report then needs no data."""
    run = shutil.copytree(base_run(), tmp_path / "run")
    shutil.copy(scratch() / "base_ledger.npy", run / "ledger.npy")
    stored = json.loads((run / "result.json").read_text())
    (run / "result.json").write_text(json.dumps({k: v for k, v in stored.items() if k not in anatomy_keys()}))
    assert load_run(run).anatomy == {}
    assert anatomy.main([str(run / "ledger.npy"), "--data", str(data())]) == 0
    assert "95 % of the draws" in capsys.readouterr().out
    found = load_run(run)
    anatomy.add_anatomy(found, data())
    assert found.anatomy == load_run(run).anatomy and set(found.anatomy) == anatomy_keys()
    low, high = found.anatomy["bpb_interval"]
    assert low < found.val_bpb < high
    assert report.main([str(run)]) == 0
    page = (run / "report.html").read_text()
    assert "Bits per byte by document length" in page and f"{low:.5f} to {high:.5f}" in page
    np.save(run / "ledger.npy", np.zeros(3))
    assert load_run(run).anatomy == {}  # of another ledger


def anatomy_keys():
    return {"bpb_interval", "bpb_by_length", "bpb_by_position"}


def test_what_does_not_fit_is_one_line(tmp_path, capsys):
    np.save(tmp_path / "ledger.npy", np.zeros(3))
    assert anatomy.main([str(tmp_path / "ledger.npy"), "--data", str(data())]) == 2
    assert "give the data of that run" in capsys.readouterr().err
    (tmp_path / "ledger.npy").write_text("none")
    with pytest.raises(ReportError, match="not a ledger"):
        anatomy.anatomy_of(tmp_path / "ledger.npy", data())
    write_shard(tmp_path / "fineweb_val_000000.bin", [1, 2, 3])
    with pytest.raises(ReportError, match="without the bytes"):
        anatomy.anatomy_of(tmp_path / "ledger.npy", tmp_path)
