"""Training: the stream, the packed batches, accumulation, the schedule, the same result for any number of ranks, and
the same bytes from the same settings."""

import math
import re
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import (
    BOS,
    CPU,
    RUN,
    Silent,
    base_run,
    config,
    data,
    forked,
    gpt,
    main,
    ranks,
    result,
    scratch,
    spawn,
    write_shard,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt
from train_gpt import Schedule, TrainStream


def write_train(folder, *shards):
    folder.mkdir(parents=True, exist_ok=True)
    for i, shard in enumerate(shards):
        write_shard(folder / f"fineweb_train_{i:06d}.bin", shard)
    return folder


def stream(folder, **overrides) -> TrainStream:
    return TrainStream(config(RUN, data_path=str(folder), **overrides))


def real(batches) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets of a step's batches without their padding."""
    keep = [b.targets >= 0 for b in batches]
    join = lambda name: np.concatenate([getattr(b, name)[k].numpy() for b, k in zip(batches, keep)])
    return join("tokens"), join("targets")


# ---- the stream ----


def test_every_token_once_in_shard_order(tmp_path):
    """Three shards, documents across their joints: the inputs of successive steps are the shards one after the other,
    and every target follows its input."""
    flat = np.random.default_rng(0).integers(2, 300, 2400)
    flat[::37] = BOS
    s = stream(write_train(tmp_path, flat[:1001], flat[1001:1003], flat[1003:]))
    steps = [real(s.step(step, 48, 0, 1)) for step in range(6)]
    inputs, targets = (np.concatenate(x) for x in zip(*steps))
    endless = np.concatenate([flat, flat])
    assert (inputs == endless[:3000]).all() and (targets == endless[1:3001]).all()


def test_shards_go_by_name(tmp_path):
    """Ten shards and more: 10 comes after 9, as the zero-padded names say, not as the folder lists them."""
    shards = [np.full(200, i + 2) for i in range(12)]
    shards[0][0] = BOS
    for i in reversed(range(12)):
        write_shard(tmp_path / f"fineweb_train_{i:06d}.bin", shards[i])
    assert (stream(tmp_path).read(0, 2400) == np.concatenate(shards)).all()


@settings(max_examples=30, deadline=None)
@given(total=st.integers(1, 700), micro=st.integers(1, 200), world=st.integers(1, 5), step=st.integers(0, 40))
def test_a_step_reads_the_same_tokens_at_any_world_size(total, micro, world, step):
    s = stream(data(), train_batch_tokens=total, micro_batch_tokens=micro)
    ours = [s.step(step, 48, rank, world) for rank in range(world)]
    dealt = [ours[i % world][i // world] for i in range(sum(map(len, ours)))]
    alone = s.step(step, 48, 0, 1)
    assert len(dealt) == len(alone) == -(-total // micro)
    for a, b in zip(dealt, alone):
        assert (
            torch.equal(a.tokens, b.tokens)
            and torch.equal(a.targets, b.targets)
            and torch.equal(a.seq.cu_q, b.seq.cu_q)
        )
    assert sum(int((b.targets >= 0).sum()) for b in alone) == total


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=8), span=st.integers(1, 30), padding=st.integers(0, 50)
)
def test_packing(lengths, span, padding):
    """Segments are the documents cut every span tokens; positions count from the document's start; padding is segments
    of its own without targets."""
    documents = [[BOS, *range(100, 99 + n)] for n in lengths]
    tokens = np.array([*sum(documents, []), BOS])
    n = len(tokens) - 1
    batch = train_gpt.pack_documents(
        tokens[:-1], tokens[1:], np.flatnonzero(tokens[:-1] == BOS), span, 64, n + padding, "train"
    )
    segments, positions = [], []
    for length in [*lengths, *([padding] if padding else [])]:
        segments += [span] * (length // span) + ([length % span] if length % span else [])
        positions += range(length)
    assert batch.seq.cu_q.tolist() == [0, *np.cumsum(segments)] and batch.seq.cu_q.dtype == torch.int32
    assert batch.seq.positions.tolist() == positions
    assert batch.tokens[:n].tolist() == tokens[:-1].tolist() and batch.targets[:n].tolist() == tokens[1:].tolist()
    assert (batch.targets[n:] == -1).all() and batch.targets.dtype == batch.tokens.dtype == torch.int64
    assert batch.seq.max_q == batch.seq.max_k == 64 and batch.split == "train"


def test_a_running_document_begins_anew_at_a_micro_batch(tmp_path):
    flat = np.arange(2, 302)
    flat[0] = BOS
    batch = stream(write_train(tmp_path, flat), micro_batch_tokens=64, train_batch_tokens=64).step(1, 48, 0, 1)[0]
    assert batch.tokens[0] == flat[64] and batch.seq.positions[0] == 0 and batch.seq.cu_q.tolist() == [0, 48, 64]


def test_prefetch_changes_nothing():
    cfg = config(RUN, data_path=str(data()))
    s = TrainStream(cfg)
    fetch = train_gpt.Prefetch(s, ranks(cfg))
    for step, span in ((0, 16), (1, 16), (2, 48), (3, 48), (3, 16), (7, 48)):
        for have, want in zip(fetch(step, span), s.step(step, span, 0, 1), strict=True):
            assert torch.equal(have.tokens, want.tokens) and torch.equal(have.seq.cu_q, want.seq.cu_q)


# ---- loss and accumulation ----


def test_padding_has_no_weight():
    model = gpt()
    tokens = np.array([BOS, 5, 6, 7, 8, BOS, 9, 10, 11])
    losses, gradients = [], []
    for capacity in (8, 8 + 13):
        batch = train_gpt.pack_documents(tokens[:-1], tokens[1:], np.array([0, 5]), 16, 16, capacity, "train")
        batch = train_gpt.to_device(batch, CPU)
        model.zero_grad()
        loss = train_gpt.batch_loss(model, batch, 8, True)
        loss.backward()
        losses.append(loss.item())
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients))


def test_loss_is_the_mean_over_all_tokens():
    """Of the global batch, though its last micro-batch is smaller: 500 tokens in micro-batches of 128."""
    cfg = config(RUN, data_path=str(data()))
    model = gpt(cfg)
    total, count = 0.0, 0
    for batch in TrainStream(cfg).step(0, 48, 0, 1):
        with torch.no_grad():
            hidden = model.trunk(batch.tokens, batch.seq, looped=False)
            nats = model.nll(hidden, batch.targets.clamp(min=0)).nats.double()
        total, count = total + nats[batch.targets >= 0].sum().item(), count + int((batch.targets >= 0).sum())
    log, group = Silent(), ranks(cfg)
    trainer = train_gpt.Trainer(model, cfg, group, log)
    assert count == 500
    assert trainer.gradients(TrainStream(cfg).step(0, 48, 0, 1), False).item() == pytest.approx(total / 500, rel=1e-5)


def test_micro_batches_add_up_to_one_big_batch(tmp_path):
    """Documents of 32 tokens, so that every micro-batch begins at a document and the cut loses no context."""
    flat = np.random.default_rng(1).integers(2, 300, 640)
    flat[::32] = BOS
    write_train(tmp_path, flat)
    gradients, losses = [], []
    for micro in (320, 64, 96):
        cfg = config(RUN, data_path=str(tmp_path), train_batch_tokens=320, micro_batch_tokens=micro)
        model, log, group = gpt(cfg), Silent(), ranks(cfg)
        trainer = train_gpt.Trainer(model, cfg, group, log)
        losses.append(trainer.gradients(trainer.stream.step(0, 48, 0, 1), True).item())
        gradients.append([p.grad for p in model.parameters()])
    for loss, other in zip(losses[1:], gradients[1:]):
        assert loss == pytest.approx(losses[0], rel=1e-5)
        assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in zip(gradients[0], other))


def test_validation_batches_cannot_be_trained_on():
    cfg = config(RUN, data_path=str(data()))
    log, group = Silent(), ranks(cfg)
    trainer = train_gpt.Trainer(gpt(cfg), cfg, group, log)
    batch = trainer.stream.step(0, 48, 0, 1)[0]
    with pytest.raises(AssertionError):
        trainer.gradients([batch._replace(split="val")], False)


# ---- the schedule ----


def test_learning_rate():
    """Flat, then linear to the floor: with 0.85 and 0.1 flat until 0.15 and on the floor from 0.915."""
    s = Schedule(config(warmdown_frac=0.85, min_lr=0.1))
    assert [s.lr_scale(p) for p in (0.0, 0.1, 0.1499)] == [1.0, 1.0, 1.0]
    assert s.lr_scale(0.575) == pytest.approx(0.5) and s.lr_scale(0.83) == pytest.approx(0.2)
    assert [s.lr_scale(p) for p in (0.915, 0.95, 1.0, 1.01)] == pytest.approx([0.1] * 4)
    assert Schedule(config(warmdown_frac=0.0)).lr_scale(0.99) == 1.0
    assert Schedule(config(warmdown_frac=1.0, min_lr=0.0)).lr_scale(1.0) == 0.0


def test_loops_switch_on_once():
    s = Schedule(config(enable_looping_at=0.35))
    assert [s.looped(p) for p in (0.0, 0.3499, 0.35, 0.9)] == [False, False, True, True]
    assert not Schedule(config(num_loops=0, enable_looping_at=0.0)).looped(0.9)


def test_context_schedule():
    s = Schedule(config(train_seq_len=64, train_seq_schedule="64@1.0,16@0.1,32@0.7"))
    assert [s.span(p) for p in (0.0, 0.0999, 0.101, 0.699, 0.701, 1.0, 1.5)] == [16, 16, 32, 32, 64, 64, 64]
    assert Schedule(config(train_seq_len=64)).span(0.5) == 64


def test_ramp_after_a_change_of_context():
    s = Schedule(config(seq_change_warmup_steps=4))
    assert [s.ramp(step, 10) for step in (10, 11, 12, 13, 14, 99)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert s.ramp(0, -math.inf) == 1.0 and Schedule(config(seq_change_warmup_steps=0)).ramp(10, 10) == 1.0


def test_the_run_follows_its_schedule(tmp_path, monkeypatch):
    """The spans, loops and learning rates that training really used, step by step, with ITERATIONS as the clock."""
    used = []
    loss = train_gpt.batch_loss

    def spy(model, batch, total, looped):
        used.append((looped, int(batch.seq.cu_q.diff().max())))
        return loss(model, batch, total, looped)

    monkeypatch.setattr(train_gpt, "batch_loss", spy)
    run = dict(
        RUN,
        train_batch_tokens=128,
        iterations=10,
        warmup_steps=0,
        train_seq_schedule="12@0.3,24@0.6,48@1.0",
        seq_change_warmup_steps=2,
        enable_looping_at=0.5,
        warmdown_frac=0.5,
        min_lr=0.2,
        data_path=str(data()),
    )
    cfg = config(run)
    log, group = Silent(), ranks(cfg)
    trainer = train_gpt.Trainer(gpt(cfg), cfg, group, log)
    counts = trainer.run()
    assert [looped for looped, _ in used] == [False] * 5 + [True] * 5
    assert [span for _, span in used] == [12] * 3 + [24] * 3 + [48] * 4
    scales = [scale for *_, scale in trainer.curve]
    assert scales == pytest.approx([1, 1, 1, 0.5, 1, 1, 0.8 * 0.5, 0.6, 0.4, 0.2])
    assert counts["steps"] == 10 and counts["tokens"] == 1280 and len(trainer.curve) == 10


def test_iterations_mode_does_not_depend_on_the_clock(monkeypatch):
    """The same weights though every reading of the clock is different."""
    weights = []
    for speed in (1.0, 1e6):
        clock = train_gpt.time.perf_counter
        with monkeypatch.context() as patch:
            patch.setattr(train_gpt.time, "perf_counter", lambda clock=clock, speed=speed: clock() * speed)
            cfg = config(RUN, data_path=str(data()), iterations=4, enable_looping_at=0.5)
            model, log, group = gpt(cfg), Silent(), ranks(cfg)
            train_gpt.Trainer(model, cfg, group, log).run()
        weights.append([p.detach() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights))


def test_wallclock_mode_stops_inside_its_budget(monkeypatch):
    """A step takes a tenth of a second of a false clock: the run ends before the reserve, and the schedule follows
    time, not steps."""
    now = [0.0]
    monkeypatch.setattr(train_gpt.time, "perf_counter", lambda: now[0])
    loss = train_gpt.batch_loss

    def slow(model, batch, total, looped):
        now[0] += 0.1
        return loss(model, batch, total, looped)

    monkeypatch.setattr(train_gpt, "batch_loss", slow)
    cfg = config(
        RUN,
        data_path=str(data()),
        train_batch_tokens=128,
        iterations=1000,
        max_wallclock_seconds=3.0,
        gptq_reserve_seconds=1.0,
        enable_looping_at=0.5,
    )
    log, group = Silent(), ranks(cfg)
    counts = train_gpt.Trainer(gpt(cfg), cfg, group, log).run()
    assert counts["steps"] in (19, 20) and counts["seconds"] <= 2.0 + 1e-9
    switch = [line for line in log.lines if "loops on" in line]
    assert len(switch) == 1 and switch[0].startswith(("step 10:", "step 11:"))


def test_training_lowers_the_loss():
    curve = result(base_run())["training"]["curve"]
    assert curve[-1][2] < curve[0][2] - 0.5
    assert abs(curve[0][2] - math.log(320)) < 0.1  # a fresh model is uniform


def test_caps_learn_and_are_stored(tmp_path):
    """Each from its own logits; the artifact holds them and a rerun scores with them."""
    main({**RUN, "asym_logit_rescale": True, "logit_softcap": 5.0, "scalar_lr": 0.1, "iterations": 6}, tmp_path).ok()
    caps = train_gpt.load_artifact(tmp_path / "model.bin")[0]["caps"]
    assert caps.shape == (2,) and (np.abs(caps - 5.0) > 0.01).all() and abs(caps[0] - caps[1]) > 0.01
    main({"ttt_eval_only": True}, tmp_path).ok()
    assert result(tmp_path, "eval_result.json")["val_bpb"] == result(tmp_path)["val_bpb"]


def test_a_diverging_loss_is_one_line(tmp_path):
    out = main({**RUN, "matrix_lr": 1e30, "tied_embed_lr": 1e30, "grad_clip_norm": 0.0}, tmp_path)
    assert out.code == 2 and len(out.err.strip().splitlines()) == 1 and "loss is" in out.err


# ---- worlds and determinism ----


def whole_run(rank: int, world: int, folder):
    outcome = main({**RUN, "rank": rank, "local_rank": rank, "world_size": world}, folder / str(world))
    assert outcome.code == 0, outcome.err


@pytest.fixture(scope="module")
def worlds():
    """Artifact folders of the same run on 1, 2 and 3 ranks; 2 through torchrun as a user starts it."""
    folder = scratch() / "worlds"
    folder.mkdir()
    base_run()
    spawn(RUN, folder / "2", world=2).ok()
    forked(whole_run, 3, folder)
    return {1: base_run(), 2: folder / "2", 3: folder / "3"}


@pytest.mark.parametrize("world", (2, 3))
def test_any_number_of_ranks_trains_the_same(worlds, world):
    """4 micro-batches a step over 1, 2 and 3 ranks, the last not full: the same curve and the same scores."""
    one, other = result(worlds[1]), result(worlds[world])
    assert [c[0] for c in one["training"]["curve"]] == [c[0] for c in other["training"]["curve"]]
    for a, b in zip(one["training"]["curve"], other["training"]["curve"]):
        assert a[2] == pytest.approx(b[2], abs=1e-5) and a[3] == b[3]
    for name, bpb in one["bpb"].items():
        assert other["bpb"][name] == pytest.approx(bpb, abs=1e-5), name
    assert one["settings_sha256"] == other["settings_sha256"]


def test_more_ranks_than_micro_batches(tmp_path):
    """A rank without work still takes part in every sum."""
    settings = {**RUN, "train_batch_tokens": 128, "iterations": 4}

    def run(rank, world, folder):
        outcome = main({**settings, "rank": rank, "local_rank": rank, "world_size": world}, folder / str(world))
        assert outcome.code == 0, outcome.err

    for world in (1, 2):
        forked(run, world, tmp_path)
    one, two = result(tmp_path / "1"), result(tmp_path / "2")
    assert [c[2] for c in one["training"]["curve"]] == pytest.approx([c[2] for c in two["training"]["curve"]], abs=1e-5)
    assert one["bpb"] == pytest.approx(two["bpb"], abs=1e-5)


# ---- scores while it trains ----

SCORED = {**RUN, "iterations": 4, "ema_decay": 0.0, "val_every_steps": 2}


def weights(folder) -> dict:
    arrays = dict(np.load(folder / "trained.npz"))
    arrays.pop("meta")
    return arrays


def test_scores_on_the_way_change_no_weight(tmp_path):
    """Bit for bit, and the last of them, by the last weights, is the score of the trained model."""
    for name, every in (("with", 2), ("without", 0)):
        main({**SCORED, "val_every_steps": every}, tmp_path / name).ok()
    scored, plain = result(tmp_path / "with"), result(tmp_path / "without")
    arrays = weights(tmp_path / "with")
    assert all((arrays[name] == other).all() for name, other in weights(tmp_path / "without").items())
    assert scored["bpb"] == plain["bpb"] and scored["settings_sha256"] == plain["settings_sha256"]
    assert (tmp_path / "with/model.bin").read_bytes() == (tmp_path / "without/model.bin").read_bytes()
    assert [step for step, _, _ in scored["val_curve"]] == [2, 4] and "val_curve" not in plain
    assert scored["val_curve"][-1][2] == scored["bpb"]["trained"]
    seconds = scored["seconds"]
    assert seconds["subset"] > 0 and "subset" not in plain["seconds"]
    assert seconds["train"] == pytest.approx(sum(seconds[name] for name in ("steps", "calibrate", "quantize")))
    log = (tmp_path / "with/train.log").read_text()
    told = [
        f"step {step:6d}: {bpb:.4f} BPB of the first validation documents\n" for step, _, bpb in scored["val_curve"]
    ]
    assert all(line in log for line in told)


def test_loops_are_scored_as_they_are_trained(tmp_path):
    """Before they switch on, the network without them; afterwards with them."""
    never = main(
        {**SCORED, "num_loops": 0, "iterations": 3, "val_every_steps": 1, "max_wallclock_seconds": 0}, tmp_path / "0"
    )
    late = main({**SCORED, "enable_looping_at": 0.6, "iterations": 3, "val_every_steps": 1}, tmp_path / "late")
    never.ok(), late.ok()
    curves = [[bpb for *_, bpb in result(tmp_path / name)["val_curve"]] for name in ("0", "late")]
    assert curves[0][:2] == curves[1][:2] and curves[0][2] != curves[1][2]


def test_scores_on_the_way_are_of_the_first_documents(monkeypatch, tmp_path):
    """Of whole documents: those that begin within SUBSET. One that begins behind it has no part."""
    calls = []
    score = train_gpt.score_documents
    monkeypatch.setattr(train_gpt, "score_documents", lambda s, a, b: calls.append((s.ledger, a, b)) or score(s, a, b))
    monkeypatch.setattr(train_gpt, "SUBSET", 60)
    main({**SCORED, "iterations": 2, "ttt_enabled": False}, tmp_path).ok()
    (ledger, first, last), (whole, *_), *_ = calls
    starts = np.flatnonzero(train_gpt.ValidationStream(config(RUN, data_path=str(data()))).tokens == BOS)
    assert ledger.name == "subset" and first == 0 and starts[last - 1] < 60 <= starts[last]
    assert len(ledger.nats) == starts[last] < len(whole.nats)
    assert (ledger.nats == whole.nats[: len(ledger.nats)]).all()


def slow_clock(monkeypatch) -> list[float]:
    """A clock for the script that moves a little at each reading, and that a test moves by what it returns: [now]."""
    now = [0.0]

    def reading() -> float:
        now[0] += 2.0**-10
        return now[0]

    monkeypatch.setattr(train_gpt, "time", SimpleNamespace(**vars(time) | {"perf_counter": reading}))
    return now


def test_scores_on_the_way_take_no_time_of_training(monkeypatch, tmp_path):
    """Of neither clock nor phase, whatever they take: here an hour, by a clock that else moves a little a reading."""
    now = slow_clock(monkeypatch)
    score = train_gpt.score_documents

    def slow(scoring, *documents):
        now[0] += 3600 * (scoring.ledger.name == "subset")
        score(scoring, *documents)

    monkeypatch.setattr(train_gpt, "score_documents", slow)
    main({**SCORED, "max_wallclock_seconds": 600}, tmp_path).ok()
    found = result(tmp_path)
    assert 7200 <= found["seconds"]["subset"] < 7201 and 0 < found["seconds"]["steps"] < found["seconds"]["train"] < 1
    assert found["training"]["seconds"] < 1 and [seconds < 1 for _, seconds, _ in found["val_curve"]] == [True, True]
    assert found["training"]["steps"] == 4 and found["verdicts"]["train_budget"]["verdict"] == "PASS"


def test_a_run_over_its_training_budget_names_the_setting(tmp_path, monkeypatch):
    now = slow_clock(monkeypatch)
    collect = train_gpt.collect_hessians

    def slow(*arguments):
        now[0] += 3600
        return collect(*arguments)

    monkeypatch.setattr(train_gpt, "collect_hessians", slow)
    main({**RUN, "max_wallclock_seconds": 600}, tmp_path).ok()
    found, log = result(tmp_path), (tmp_path / "train.log").read_text()
    assert found["verdicts"]["train_budget"]["verdict"] == "FAIL" and "val_bpb" not in found
    assert re.search(r"^no val_bpb: train_budget failed; a larger GPTQ_RESERVE_SECONDS ", log, re.M)
    assert log.endswith(f"TTT_EVAL_ONLY=1 ARTIFACT_DIR={tmp_path} python train_gpt.py\n")
    assert f"python tools/audit.py {tmp_path} --data {data()}\n" in log


def test_scores_on_the_way_are_those_of_all_ranks(tmp_path):
    def run(rank, world, folder):
        outcome = main({**SCORED, "rank": rank, "local_rank": rank, "world_size": world}, folder / str(world))
        assert outcome.code == 0, outcome.err

    for world in (1, 2):
        forked(run, world, tmp_path)
    one, two = (result(tmp_path / str(world)) for world in (1, 2))
    assert [step for step, *_ in two["val_curve"]] == [2, 4]
    assert [bpb for *_, bpb in two["val_curve"]] == pytest.approx([bpb for *_, bpb in one["val_curve"]], abs=1e-5)
    assert two["val_curve"][-1][2] == two["bpb"]["trained"]


CLOCK = "model.bin holds wall-clock seconds: meta['seconds'] and the times in meta['training']['curve']"


def test_the_same_settings_give_the_same_bytes(tmp_path):
    main(RUN, tmp_path).ok()
    for name in ("model.bin", "train_gpt.py"):
        assert (tmp_path / name).read_bytes() == (base_run() / name).read_bytes(), name
    assert result(tmp_path)["bpb"] == result(base_run())["bpb"]
    assert result(tmp_path)["settings_sha256"] == result(base_run())["settings_sha256"]


def test_another_seed_gives_another_model(tmp_path):
    main({**RUN, "seed": 7}, tmp_path).ok()
    assert (tmp_path / "model.bin").read_bytes() != (base_run() / "model.bin").read_bytes()
    assert result(tmp_path)["settings_sha256"] != result(base_run())["settings_sha256"]


def requantize(rank: int, world: int, folder):
    outcome = main(
        {**RUN, "quantize_only": True, "rank": rank, "local_rank": rank, "world_size": world}, folder / str(world)
    )
    assert outcome.code == 0, outcome.err


@pytest.fixture(scope="module")
def requantized():
    """The artifacts that 1, 2 and 3 ranks make of the same weights."""
    paths = []
    for world in (1, 2, 3):
        folder = scratch() / "requantized" / str(world)
        folder.mkdir(parents=True)
        (folder / "trained.npz").write_bytes((base_run() / "trained.npz").read_bytes())
        forked(requantize, world, folder.parent)
        paths.append(folder / "model.bin")
    return paths


def test_the_same_weights_give_the_same_tensors_at_any_world_size(requantized):
    """Hessians are added per calibration batch in a fixed order: 5 batches over 1, 2 and 3 ranks."""
    first, *others = (train_gpt.load_artifact(path)[0] for path in requantized)
    for other in others:
        assert set(other) == set(first)
        for name, array in first.items():
            assert array.tobytes() == other[name].tobytes(), name


def test_the_same_weights_give_the_same_file_at_any_world_size(requantized):
    assert len({path.read_bytes() for path in requantized}) == 1
