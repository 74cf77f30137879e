"""The benchmarks' own arithmetic, and that whole runs are timed by their lines and leave no process behind."""

import contextlib
import io
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from helpers import CPU, RUN, TINY, base_run, config, data, environment, gpt, ranks, replaced_environ
from torch.utils.flop_counter import FlopCounterMode

import train_gpt
from tools import processes
from tools.bench import cli, parts, runs
from tools.bench.table import Row


@pytest.fixture
def table(tmp_path):
    """Rows of a subcommand, as the command line gives them under the settings of a tiny run."""

    def rows(*argv: str) -> list[Row]:
        with replaced_environ(environment(RUN)):
            cli.main(["--json", str(tmp_path / "rows.json"), *argv])
        return [Row(**row) for row in json.loads((tmp_path / "rows.json").read_text())]

    return rows


def test_causal_pairs():
    lengths = [5, 1, 3]
    assert parts.causal_pairs(torch.tensor([0, 5, 6, 9], dtype=torch.int32)) == sum(
        1 for n in lengths for i in range(n) for j in range(n) if j <= i
    )
    within = sum(1 for n in lengths for i in range(n) for j in range(n) if i - 2 <= j <= i)
    assert parts.causal_pairs(torch.tensor([0, 5, 6, 9], dtype=torch.int32), 2) == within


@pytest.mark.parametrize("where", ["data", "nowhere"])
def test_documents_fill_the_buffer(where, tmp_path):
    cfg = config(RUN, data_path=str(data() if where == "data" else tmp_path), micro_batch_tokens=600)
    seq, origin = parts.documents(cfg)
    assert (
        seq.cu_q[0] == 0
        and seq.cu_q[-1] == 600
        and 1 <= seq.cu_q.diff().min()
        and seq.cu_q.diff().max() <= cfg.train_seq_len
    )
    assert ("first micro-batch" in origin) == (where == "data")


def test_attention(table):
    rows = table("attention", "--tokens", "256")
    assert [(r.what, r.variant) for r in rows] == [
        (d, f"reference, 4 heads, {kv} of K/V, {reach} back")
        for kv in (2, 4)
        for reach in ("all", "7 tokens")
        for d in ("forward", "backward")
    ]
    assert all(r.seconds > 0 and r.amount > 0 and r.ratio > 0 for r in rows)
    assert rows[1].amount == pytest.approx(2.5 * rows[0].amount) and rows[4].amount == rows[0].amount > rows[2].amount


def optimizer(**overrides) -> train_gpt.Optimizer:
    cfg = config(TINY, **overrides)
    return train_gpt.Optimizer(gpt(cfg), cfg, ranks(cfg))


@pytest.mark.parametrize("shapes", [{}, {"mlp_mult": 0.5}])
def test_orthogonalize_flops(shapes):
    """As torch counts them, for wide and for tall matrices."""
    o = optimizer(**shapes)
    coefficients = train_gpt.MUON_COEFFICIENTS["polar_express"]
    with FlopCounterMode(display=False) as counter:
        for g in o.muon:
            train_gpt.orthogonalize(torch.randn(g.shard, g.rows, g.cols), coefficients)
    assert parts.orthogonalize_flops(o.muon, len(coefficients)) == counter.get_total_flops() > 0


@pytest.mark.parametrize("overrides", [{}, {"ema_decay": 0.0, "grad_clip_norm": 0.0}])
@torch.no_grad()
def test_parts_of_a_step_repeat(overrides):
    """Bytes and FLOPs of the parts are the step's; no call changes the magnitude of what the next one works on."""
    o = optimizer(**overrides)
    whole, *inner, alone = parts.step_parts(o)
    assert whole.moved == sum(p.moved for p in inner) and whole.flops == sum(p.flops for p in inner) == alone.flops
    for part in inner:
        part.call()
        before = [p.clone() for p in (*o.parameters, *(g.momentum for g in o.muon))]
        first = part.call()
        again = part.call()
        if part.name.startswith(("gradients", "Muon: momentum")):
            assert all(torch.equal(a, b) for a, b in zip(first, again)), part.name
            assert all(torch.equal(a, b) for a, b in zip(before, (*o.parameters, *(g.momentum for g in o.muon)))), (
                part.name
            )
    for _ in range(3):
        whole.call()
    assert all(p.isfinite().all() for p in o.parameters)


def test_optimizer(table):
    rows = table("optimizer")
    assert (
        rows[0].variant == "Optimizer.step"
        and len(rows) == 7
        and all(r.seconds > 0 and r.amount > 0 and r.ratio > 0 for r in rows)
    )


def test_machine_floor():
    with contextlib.redirect_stdout(io.StringIO()):
        machine = parts.Machine(CPU)
    assert machine.floor(machine.copy_rate, 2 * machine.product_rate) == pytest.approx(3)


# ---- runs in processes of their own ----


def test_step_lines_of_a_real_log():
    seen = [(0.0, line) for line in (base_run() / "train.log").read_text().splitlines()]
    curve = runs.step_lines(seen)
    assert [step for step, *_ in curve] == list(range(1, 11))
    assert all(before < after for (_, before, _), (_, after, _) in zip(curve, curve[1:])) and all(
        3 < loss < 8 for *_, loss in curve
    )


def test_step_seconds():
    """The first sixth, which is slow, does not count."""
    curve = [(1, 5.0, 6.0), (5, 7.0, 6.0), (10, 8.0, 5.0), (60, 13.0, 4.0)]
    assert runs.step_seconds(curve) == pytest.approx(0.1)
    with pytest.raises(SystemExit, match="too few"):
        runs.step_seconds(curve[:1])


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
def test_a_stopped_run_leaves_nothing_behind(tmp_path, monkeypatch):
    """A process and its child in a session of its own, both deaf to SIGTERM, as torchrun's workers may be."""
    monkeypatch.setattr(runs, "GRACE", 0.5)
    deaf = "import signal, os, sys, time, subprocess; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    script = tmp_path / "deaf.py"
    script.write_text(
        f"{deaf}\nchild = subprocess.Popen([sys.executable, '-c', {deaf + 'time.sleep(60)'!r}], "
        "start_new_session=True)\ntime.sleep(0.5)\n"
        "print('pids', os.getpid(), child.pid, flush=True)\nprint('wanted', "
        "flush=True)\ntime.sleep(60)\nprint('never')\n"
    )
    seen = runs.read([sys.executable, str(script)], dict(os.environ), "^wanted")
    assert [line.split()[0] for _, line in seen] == ["pids", "wanted"] and 0.5 < seen[0][0] <= seen[1][0] < 30
    assert not any(processes.alive(int(pid)) for pid in seen[0][1].split()[1:])


def test_a_run_that_ends_early_says_why():
    with pytest.raises(SystemExit, match="(?s)ended before.*error: no data"):
        runs.read([sys.executable, "-c", "print('error: no data')"], dict(os.environ), "^wanted")


def test_startup(table):
    rows = table("startup")
    names = [*(name for name, _ in runs.PHASES), "process start to step 1"]
    assert [(r.what, r.variant) for r in rows] == [
        (name, caches) for caches in ("cold caches", "warm caches") for name in names
    ]
    for part in (rows[:5], rows[5:]):
        assert all(r.seconds > 0 for r in part) and sum(r.seconds for r in part[:4]) == pytest.approx(part[4].seconds)


@pytest.mark.parametrize("more,batches", [((), [128, 256, 512]), (("--same-batch",), [512] * 3)])
def test_what_scaling_runs(table, monkeypatch, more, batches):
    """Through torchrun, each rank with its micro-batches, the plain graph from beginning to end; the last of three runs
    is slower than the others."""
    begun = []

    def read(command, env, last):
        begun.append((command, env))
        ms = 10.0 if len(begun) < 3 else 12.5
        return [
            (
                0.0,
                f"step {step:6d}   10.0 %  loss 5.1234  lr x 1.000  {ms:7.1f} ms/step       12,800 tokens/s     0.1 "
                "s, 0 s left",
            )
            for step in (1, 10, 60)
        ]

    monkeypatch.setattr(runs, "read", read)
    rows = table("scaling", "--gpus", "1", "2", "4", *more)
    assert [command[-2] for command, _ in begun] == [f"--nproc_per_node={n}" for n in (1, 2, 4)]
    for (_, env), batch in zip(begun, batches):
        cfg = train_gpt.Config.from_env(env)
        assert (cfg.train_batch_tokens, cfg.micro_batch_tokens, cfg.iterations, cfg.max_wallclock_seconds) == (
            batch,
            128,
            60,
            0,
        )
        assert (
            not any(train_gpt.Schedule(cfg).looped(progress) for progress in (0.0, 0.5, 1.0))
            and env["NCCL_NVLS_ENABLE"] == "0"
        )
    assert [row.seconds for row in rows] == pytest.approx([0.01, 0.01, 0.0125])
    assert [row.ratio for row in rows] == pytest.approx([1, 0.5, 0.2] if more else [1, 1, 0.8])


def test_scaling(table, capsys):
    """One batch on one and on two ranks: the same losses, half of the tokens on each."""
    one, two = table("scaling", "--gpus", "1", "2", "--steps", "12", "--same-batch")
    assert (one.variant, two.variant, one.ratio) == (
        "1 rank(s)",
        "2 rank(s)",
        1.0,
    ) and one.amount == 2 * two.amount == 0.256
    assert two.ratio == pytest.approx(one.seconds / two.seconds / 2)
    said = capsys.readouterr().out
    assert "10: " in said and "differ by at most 0.0000" in said
