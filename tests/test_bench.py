"""The benchmarks' own arithmetic."""
import contextlib
import io
import json
import sys

import pytest
import torch
from helpers import CPU, ROOT, RUN, TINY, config, data, environment, gpt, ranks, replaced_environ
from torch.utils.flop_counter import FlopCounterMode

import train_gpt

sys.path.insert(0, str(ROOT / "tools"))
import bench  # noqa: E402
import bench_parts  # noqa: E402


@pytest.fixture
def table(tmp_path):
    """Rows of a subcommand, as the command line gives them under the settings of a tiny run."""
    def rows(*argv: str) -> list[bench.Row]:
        with replaced_environ(environment(RUN)):
            bench.main(["--json", str(tmp_path / "rows.json"), *argv])
        return [bench.Row(**row) for row in json.loads((tmp_path / "rows.json").read_text())]
    return rows


def test_causal_pairs():
    lengths = [5, 1, 3]
    assert bench_parts.causal_pairs(torch.tensor([0, 5, 6, 9], dtype=torch.int32)) == sum(1 for n in lengths for i in range(n) for j in range(n) if j <= i)


@pytest.mark.parametrize("where", ["data", "nowhere"])
def test_documents_fill_the_buffer(where, tmp_path):
    cfg = config(RUN, data_path=str(data() if where == "data" else tmp_path), micro_batch_tokens=600)
    seq, origin = bench_parts.documents(cfg)
    assert seq.cu_q[0] == 0 and seq.cu_q[-1] == 600 and 1 <= seq.cu_q.diff().min() and seq.cu_q.diff().max() <= cfg.train_seq_len
    assert ("first micro-batch" in origin) == (where == "data")


def test_attention(table):
    rows = table("attention", "--tokens", "256")
    assert [(r.what, r.variant) for r in rows] == [(d, f"reference, 4 heads, {kv} of K/V") for kv in (2, 4) for d in ("forward", "backward")]
    assert all(r.seconds > 0 and r.amount > 0 and r.ratio > 0 for r in rows)
    assert rows[1].amount == pytest.approx(2.5 * rows[0].amount) and rows[2].amount == rows[0].amount


def optimizer(**overrides) -> train_gpt.Optimizer:
    cfg = config(TINY, **overrides)
    return train_gpt.Optimizer(gpt(cfg), cfg, ranks(cfg))


@pytest.mark.parametrize("shapes", [{}, {"mlp_mult": 0.5, "muon_backend_steps": 3}])
def test_orthogonalize_flops(shapes):
    """As torch counts them, for wide and for tall matrices."""
    o = optimizer(**shapes)
    iterations = o.cfg.muon_backend_steps
    with FlopCounterMode(display=False) as counter:
        for g in o.muon:
            train_gpt.orthogonalize(torch.randn(g.shard, g.rows, g.cols), train_gpt.MUON_COEFFICIENTS["polar_express"][:iterations])
    assert bench_parts.orthogonalize_flops(o.muon, iterations) == counter.get_total_flops() > 0


@pytest.mark.parametrize("overrides", [{}, {"ema_decay": 0.0, "grad_clip_norm": 0.0}])
@torch.no_grad()
def test_parts_of_a_step_repeat(overrides):
    """Bytes and FLOPs of the parts are the step's; no call changes the magnitude of what the next one works on."""
    o = optimizer(**overrides)
    whole, *parts, alone = bench_parts.step_parts(o)
    assert whole.moved == sum(p.moved for p in parts) and whole.flops == sum(p.flops for p in parts) == alone.flops
    for part in parts:
        part.call()
        before = [p.clone() for p in (*o.parameters, *(g.momentum for g in o.muon))]
        first = part.call()
        again = part.call()
        if part.name.startswith(("gradients", "Muon: momentum")):
            assert all(torch.equal(a, b) for a, b in zip(first, again)), part.name
            assert all(torch.equal(a, b) for a, b in zip(before, (*o.parameters, *(g.momentum for g in o.muon)))), part.name
    for _ in range(3):
        whole.call()
    assert all(p.isfinite().all() for p in o.parameters)


def test_optimizer(table):
    rows = table("optimizer")
    assert rows[0].variant == "Optimizer.step" and len(rows) == 7 and all(r.seconds > 0 and r.amount > 0 and r.ratio > 0 for r in rows)


def test_machine_floor():
    with contextlib.redirect_stdout(io.StringIO()):
        machine = bench_parts.Machine(CPU)
    assert machine.floor(machine.copy_rate, 2 * machine.product_rate) == pytest.approx(3)
