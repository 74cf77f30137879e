"""tools/mix_ledgers.py: the mixture is a distribution of the past alone, and what the equations say."""

import math

import numpy as np
import pytest
from helpers import data

from tools import mix_ledgers
from tools.mix_ledgers import Rule, mixture

LENGTHS = np.array([5, 0, 9, 1, 7])
STARTS = np.cumsum(LENGTHS) - LENGTHS
RULES = (Rule(0.0, math.inf), Rule(1.0, math.inf), Rule(0.5, 3.0))


def ledgers(count: int = 3) -> np.ndarray:
    return np.random.default_rng(1).exponential(2.0, (count, LENGTHS.sum()))


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_the_equations(rule):
    """One document after the other, target by target."""
    nats, found = ledgers(), mixture(ledgers(), STARTS, LENGTHS, rule)
    for start, length in zip(STARTS, LENGTHS):
        evidence = np.zeros(3)
        for t in range(start, start + length):
            weights = np.exp(evidence) / np.exp(evidence).sum()
            assert found[t] == pytest.approx(-math.log(weights @ np.exp(-nats[:, t])))
            evidence = 0.5 ** (1 / rule.half_life) * evidence - rule.eta * nats[:, t]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_later_targets_change_nothing(rule):
    """Nor does another document."""
    nats = ledgers()
    changed = nats.copy()
    changed[:, 9:14] += 1.0  # document 2 from its target 4 on
    before, after = (mixture(n, STARTS, LENGTHS, rule) for n in (nats, changed))
    assert np.array_equal(np.delete(before, slice(9, 14)), np.delete(after, slice(9, 14)))
    assert (before[9:14] != after[9:14]).all()


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_the_mixture_sums_to_one(rule):
    """Over a vocabulary of four behind one past."""
    logits = np.random.default_rng(2).normal(size=(3, 4))
    nats = ledgers()
    total = 0.0
    for token in range(4):
        nats[:, 8] = np.logaddexp.reduce(logits, axis=1) - logits[:, token]
        total += math.exp(-mixture(nats, STARTS, LENGTHS, rule)[8])
    assert total == pytest.approx(1.0)


def test_one_ledger_is_itself_and_bayes_is_near_the_best():
    """Without forgetting, the mixture's nats of a document exceed those of the best ledger by at most log 3."""
    nats = ledgers()
    assert np.allclose(mixture(nats[:1], STARTS, LENGTHS, RULES[1]), nats[0])
    found = mixture(nats, STARTS, LENGTHS, RULES[1])
    for start, length in zip(STARTS, LENGTHS):
        own = slice(start, start + length)
        assert found[own].sum() <= nats[:, own].sum(1).min() + math.log(3) + 1e-9


def test_the_report(tmp_path, capsys):
    """Half A chooses; ledgers that are no such thing, or of other data, are refused in one line."""
    targets = len(mix_ledgers.Documents(data()).document)
    paths = [tmp_path / f"{name}.npy" for name in ("low", "high")]
    for path, nats in zip(paths, np.random.default_rng(0).exponential(2.0, (2, targets))):
        np.save(path, nats)
    command = [*map(str, paths), "--data", str(data())]
    assert mix_ledgers.main(command) == 0
    out = capsys.readouterr().out
    assert out.count("<- chosen on A") == 2 and "half B: the mixture saves " in out and "eta 0.25, half-life 16 " in out
    assert mix_ledgers.main([*command[:3], str(tmp_path)]) == 2 and "fineweb_val_" in capsys.readouterr().err
    np.save(paths[0], np.zeros(3))
    assert mix_ledgers.main(command) == 2
    error = capsys.readouterr().err
    assert error.startswith("mix_ledgers.py: ") and "low.npy" in error and error.count("\n") == 1
