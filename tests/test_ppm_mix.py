"""tools/ppm_mix.py: the byte model is a distribution, the mixture is what its sources say, and it never passes for a
result."""

import json
import math

import numpy as np
import pytest
from helpers import RUN, data, main, scratch

from tools import ppm_mix
from tools.ppm_mix import PPM, mix


@pytest.fixture(scope="module")
def ledger():
    path = scratch() / "ppm_ledger.npy"
    main({**RUN, "ttt_enabled": False, "ledger_path": path}, scratch() / "ppm").ok()
    return path


@pytest.mark.parametrize("halves", (False, True))
def test_the_byte_model_never_exceeds_one(halves):
    """Backing off without exclusion leaves some mass unused, but gives none twice."""
    ppm, text = PPM(3, halves), b"abracadabra abracadabra"
    for i, byte in enumerate(text):
        history = text[max(i - 3, 0) : i]
        assert sum(ppm.probability(history, b)[0] for b in range(256)) <= 1 + 1e-12
        assert len({ppm.probability(history, b)[1] for b in range(256)}) == 1  # confidence does not look at the byte
        ppm.update(history, byte)
    assert ppm.probability(b"bra", ord("c"))[0] < ppm.probability(b"abr", ord("a"))[0]


def test_figures_worked_out_by_hand():
    ppm = PPM(1, halves=False)
    for history, byte in ((b"", 97), (b"a", 98), (b"b", 97)):
        ppm.update(history, byte)
    # Behind a: b once, so T = u = 1. b: 1/2. a: escape 1/2, then order 0 holds a twice and b once: 2/5.
    assert ppm.probability(b"a", 98) == (1 / 2, 1 / 2) and ppm.probability(b"a", 97)[0] == pytest.approx(1 / 2 * 2 / 5)
    assert ppm.probability(b"a", 99)[0] == pytest.approx(1 / 2 * 2 / 5 / 256)
    d = PPM(1, halves=True)
    d.update(b"", 97)
    assert d.probability(b"", 97)[0] == 1 / 2 and d.probability(b"", 98)[0] == pytest.approx(1 / 2 / 256)


def test_gates():
    """One byte per token, nothing learnt yet: p = 0.9 p_network + 0.1 / 256; #1858 leaves a sure network alone."""
    nats, sizes = np.array([0.1]), np.array([1])
    assert mix(nats, sizes, b"x", 5, "1835")[0] == pytest.approx(-math.log(0.9 * math.exp(-0.1) + 0.1 / 256))
    assert mix(nats, sizes, b"x", 5, "1858") == (pytest.approx(0.1), 1.0)
    assert mix(np.array([0.3]), sizes, b"x", 5, "1858") == mix(np.array([0.3]), sizes, b"x", 5, "1835")
    assert mix(np.array([0.5]), np.array([0]), b"", 5, "1858")[0] == 0.5  # control tokens keep their nats


@pytest.mark.parametrize("gate", ("1795", "1835", "1858"))
def test_from_a_ledger_labelled_as_what_it_is(ledger, tmp_path, capsys, gate):
    assert ppm_mix.main([str(ledger), "--data", str(data()), "--gate", gate, "--out", str(tmp_path / "o.json")]) == 0
    out, found = capsys.readouterr().out, json.loads((tmp_path / "o.json").read_text())
    network = json.loads((scratch() / "ppm" / "result.json").read_text())["val_bpb"]
    assert found["bpb_of_the_network"] == pytest.approx(network, abs=1e-6) and found["bpb_of_the_mixture"] < network
    assert (
        "C2 FAIL" in out
        and ("C1 FAIL" in out) == (gate == "1858")
        and "val_bpb" not in found
        and found["verdicts"]["C2"].startswith("FAIL")
    )


def test_a_subset_is_named(ledger, capsys):
    assert ppm_mix.main([str(ledger), "--data", str(data()), "--targets", "100"]) == 0
    assert "on the first 100 of" in capsys.readouterr().out


def test_a_ledger_of_other_data_is_one_line(tmp_path, capsys):
    np.save(tmp_path / "l.npy", np.zeros(3))
    (tmp_path / "no.npy").write_bytes(b"text")
    for name in ("l.npy", "no.npy", "missing.npy"):
        assert ppm_mix.main([str(tmp_path / name), "--data", str(data())]) == 2
        assert (err := capsys.readouterr().err).count("\n") == 1 and name in err
