"""Settings: read once, typed, checked before anything runs; and the rules of the file's layout."""

import ast
import builtins
import dataclasses
import re
import resource
import signal

import pytest
import torch
from helpers import ROOT, RUN, Silent, config, data, forked, main, ranks, scoring_pass

import train_gpt
from train_gpt import Config, UserError

FIELDS = dataclasses.fields(Config)
SOURCE = (ROOT / "train_gpt.py").read_text()


def test_every_setting_is_read_from_its_name():
    for f in FIELDS:
        if f.name in ("rank", "local_rank", "world_size"):
            continue
        assert f.name.islower() and f.metadata["meaning"] and type(f.default) in (bool, int, float, str)
        text = {bool: str(int(not f.default)), int: str(f.default), float: str(f.default), str: f.default}[
            type(f.default)
        ]
        value = getattr(Config.from_env({"TTT_EVAL_ONLY": "1", f.name.upper(): text}), f.name)
        assert type(value) is type(f.default) and value == (not f.default if type(f.default) is bool else f.default)


def test_the_environment_beats_the_artifact_and_the_artifact_the_default():
    cfg = Config.from_env({"EVAL_STRIDE": "64"}, stored={"eval_stride": 32, "seed": 5})
    assert (cfg.eval_stride, cfg.seed, cfg.model_dim) == (64, 5, 512)


@pytest.mark.parametrize("first, heading", train_gpt.GROUPS.items())
def test_help_and_the_table_have_the_same_groups(first, heading):
    assert f"    # {heading}\n    {first}: " in SOURCE
    assert f"\n{heading}\n  {first.upper()} " in train_gpt.help_text()


@pytest.mark.parametrize("meaning", [f.metadata["meaning"] for f in FIELDS])
def test_a_meaning_stands_alone(meaning):
    """It is read in --help, in grep and in error messages, without the line above it."""
    riddles = r"^(its|the same)\b|\b(of those|of that|that prefix|that sigmoid|such a|the same for)\b"
    assert not re.search(riddles, meaning)


@pytest.mark.parametrize(
    "name, near",
    (
        ("MUON_MOMENTUN", "MUON_MOMENTUM"),
        ("TRAIN_SEQ_LENGTH", "TRAIN_SEQ_LEN"),
        ("EVAL_STRIDES", "EVAL_STRIDE"),
        ("EMA_DECAI", "EMA_DECAY"),
        ("GPTQ_CALIBRATION_BATCH", "GPTQ_CALIBRATION_BATCHES"),
        ("ROPE_DIM", "ROPE_DIMS"),
        ("TTT_EVAL_ONY", "TTT_EVAL_ONLY"),
    ),
)
def test_an_unknown_name_with_our_prefix_is_an_error_that_names_the_nearest(name, near):
    with pytest.raises(UserError, match=f"^{name} is not a setting; did you mean {near}\\?"):
        Config.from_env({name: "1"})


def test_every_family_of_settings_has_a_guarded_prefix():
    """A misspelt tail of any setting is noticed: as an error or, without one of our prefixes, as a warning."""
    silent = []
    for f in FIELDS:
        name = f.name.upper() + "X"
        with pytest.MonkeyPatch.context() as patch:
            lines = []
            patch.setattr(builtins, "print", lambda *a, lines=lines, **k: lines.append(a))
            try:
                Config.from_env({name: "1"})
                if not lines and len(f.name) > 4:
                    silent.append(name)
            except UserError:
                pass
    assert not silent


def test_a_foreign_variable_is_nobodys_business(capsys):
    Config.from_env(
        {
            "HOME": "/x",
            "PATH": "/bin",
            "NCCL_DEBUG": "INFO",
            "TORCHELASTIC_RUN_ID": "1",
            "LANG": "C",
            "CUDA_VISIBLE_DEVICES": "0",
            "OMP_NUM_THREADS": "1",
        }
    )
    assert capsys.readouterr().err == ""


SHARED = (
    "LOCAL_WORLD_SIZE NUM_PROC MODEL_DIR DATA_DIR MAX_JOBS MIN_FREE PARALLEL_SEQ GLOBAL_RANK DEVICE_ORDER SEED_FILE "
    "CHECK_HOST BETA1 BETA_2 ADAM_LR WORLD RANK_TABLE_FILE SKIP_TESTS SEGMENT_KEY TOKENIZERS_PARALLELISM"
)


@pytest.mark.parametrize("name", SHARED.split())
def test_a_word_that_others_use_is_no_error(name):
    Config.from_env({"TTT_EVAL_ONLY": "1", name: "1"})


@pytest.mark.parametrize("name", train_gpt.RETIRED)
def test_a_retired_setting_has_one_value_left(name, tmp_path, monkeypatch):
    """In the environment, where published commands name it, and in an older artifact."""
    assert name not in {f.name for f in FIELDS}
    fixed = train_gpt.RETIRED[name]
    text = str(int(fixed)) if isinstance(fixed, bool) else str(fixed)
    assert Config.from_env({name.upper(): text, "SEED": "5"}).seed == 5
    other = "elsewhere" if isinstance(fixed, str) else str(1 - fixed)
    with pytest.raises(UserError, match=f"^{name.upper()} is no longer a setting: its value is always {fixed}"):
        Config.from_env({name.upper(): other})
    stored = {**Config(seed=5, ngram_enabled=True).settings(), **train_gpt.RETIRED}
    monkeypatch.setattr(train_gpt, "read_trained", lambda path: ({}, {"settings": stored}))
    env = {"QUANTIZE_ONLY": "1", "ARTIFACT_DIR": str(tmp_path)}
    assert train_gpt.configure(env).seed == 5
    stored[name] = "something else"
    with pytest.raises(UserError, match=name):
        train_gpt.configure(env)


def test_an_artifact_without_the_newer_settings_keeps_what_its_script_did(tmp_path, monkeypatch):
    """All earlier text again in every phase; what is said in the environment wins."""
    stored = {**Config(seed=5, phased_ttt_prefix_docs=2500).settings()}
    assert set(train_gpt.ADDED) <= set(stored)
    for name in train_gpt.ADDED:
        del stored[name]
    monkeypatch.setattr(train_gpt, "read_trained", lambda path: ({}, {"settings": stored}))
    env = {"QUANTIZE_ONLY": "1", "ARTIFACT_DIR": str(tmp_path)}
    found = train_gpt.configure(env)
    assert found.seed == 5 and found.global_ttt_replay == 1.0 != Config().global_ttt_replay
    assert train_gpt.configure(env | {"GLOBAL_TTT_REPLAY": "0.5"}).global_ttt_replay == 0.5
    new = Config(global_ttt_replay=0.2).settings()
    assert train_gpt.still_set(new) == new


def test_a_near_miss_without_our_prefix_warns(capsys):
    Config.from_env({"ITERATION": "5"})
    assert "ITERATION" in (err := capsys.readouterr().err) and "ITERATIONS?" in err and err.count("\n") == 1


BAD = {
    "ITERATIONS": ("ten", "1.5", ""),
    "MATRIX_LR": ("fast", "nan"),
    "EMA_DECAY": ("inf", "1"),
    "TTT_ENABLED": ("maybe",),
    "NUM_HEADS": ("7",),
    "NUM_KV_HEADS": ("3",),
    "ROPE_DIMS": ("15", "130"),
    "ATTN_FULL_LAYERS": ("2;5", "2,", "all"),
    "ATTN_WINDOW": ("-1",),
    "VOCAB_SIZE": ("70000",),
    "LOOP_END": ("2", "11"),
    "DEVICE": ("tpu",),
    "ATTENTION": ("fa4000",),
    "MUON_COEFFICIENTS": ("newton",),
    "EVAL_STRIDE": ("-1", "4096"),
    "VAL_BATCH_TOKENS": ("100",),
    "MATRIX_BITS": ("9",),
    "EMBED_BITS": ("1",),
    "TRAIN_SEQ_SCHEDULE": ("1024", "1024@0.5", "a@b", "0@0.5,2048@1", "2048@nan"),
    "GPTQ_RESERVE_SECONDS": ("600",),
}


@pytest.mark.parametrize("setting", [f"{name}={text}" for name, texts in BAD.items() for text in texts])
def test_a_bad_value_is_one_line(setting, tmp_path):
    name, text = setting.split("=")
    out = main({name.lower(): text}, tmp_path)
    assert out.code == 2 and out.err.startswith(f"error: {name}") and out.err.count("\n") == 1, out.err


def tried(cfg: Config):
    """Everything a short run does with the settings, without files: schedule, a training step, quantisation,
    windows."""
    model = train_gpt.GPT(cfg, "reference", torch.float32)
    model.init_weights(cfg.seed)
    log, group = Silent(), ranks(cfg)
    trainer = train_gpt.Trainer(model, cfg, group, log, lambda *_: None)
    trainer.warm_up()
    trainer.run()
    hessians = train_gpt.collect_hessians(model, trainer.stream, cfg, group)
    train_gpt.Quantizer(model, hessians, cfg, group).quantize()
    val = train_gpt.ValidationStream(cfg)
    ledger = train_gpt.Ledger("test", val.target_bytes, train_gpt.Verdicts())
    scoring = scoring_pass(model, cfg, group, val, ledger)
    if cfg.ngram_enabled:
        train_gpt.TestTimeTraining(scoring).score()
    else:
        train_gpt.score_stream(scoring)


EXTREMES = {
    f.name: (-1, 0, 1, 3) if type(f.default) is int else (-1.0, 0.0, 1e-3, 2.0)
    for f in FIELDS
    if type(f.default) in (int, float) and f.name not in ("rank", "local_rank", "world_size", "artifact_cap")
}
EXTREMES["seed"] += (2**70,)


def attempt(name: str, value) -> str:
    """What is wrong with how a value is treated; empty if it runs or is refused at the start by its name."""
    run = {
        **RUN,
        "iterations": 1,
        "train_batch_tokens": 32,
        "micro_batch_tokens": 32,
        "gptq_calibration_batches": 2,
        "num_layers": 4,
        "parallel_start_layer": 3,
        "data_path": str(data()),
    }
    if name in ("max_wallclock_seconds", "gptq_reserve_seconds"):
        run.update(max_wallclock_seconds=2.0, gptq_reserve_seconds=1.0)
    if name.startswith("ngram_"):
        run.update(ngram_enabled=True, ttt_enabled=False)
    env = {k.upper(): str(int(v)) if isinstance(v, bool) else str(v) for k, v in {**run, name: value}.items()}
    try:
        cfg = Config.from_env(env)
    except UserError:
        return ""
    try:
        tried(cfg)
    except UserError as e:
        return (
            ""
            if name.upper() in str(e) or "the loss is" in str(e)
            else f"{name.upper()}={value} is refused without its name: {e}"
        )
    except BaseException as e:
        said = str(e).splitlines()[0][:150] if str(e) else ""
        return f"{name.upper()}={value} is accepted and ends in {type(e).__name__}: {said}"
    return ""


def attempt_all(rank: int, world: int, name: str, path):
    """In a process of its own, with limits on memory and time: a bad value may make a loop endless."""
    resource.setrlimit(resource.RLIMIT_DATA, (2**32, 2**32))

    def late(*_):
        raise TimeoutError("no end in sight")

    signal.signal(signal.SIGALRM, late)
    wrong = []
    for value in EXTREMES[name]:
        signal.alarm(30)
        wrong.append(attempt(name, value))
        signal.alarm(0)
    path.write_text("\n".join(filter(None, wrong)))


@pytest.mark.parametrize("name", EXTREMES)
def test_an_extreme_value_works_or_is_refused_at_the_start(name, tmp_path):
    """Zero, negative and odd values of every number: a run or one line that names the setting, never an exception after
    minutes of training."""
    forked(attempt_all, 1, name, tmp_path / "wrong")
    assert (tmp_path / "wrong").read_text() == ""


def test_settings_hash_covers_what_decides_the_result_and_nothing_else():
    base = config()
    assert base.sha256() == config().sha256()
    for f in FIELDS:
        value = getattr(base, f.name)
        other = dataclasses.replace(
            base, **{f.name: not value if type(value) is bool else value + "x" if type(value) is str else value + 1}
        )
        assert (other.sha256() != base.sha256()) == (f.name in base.settings()), f.name
    hidden = {f.name for f in FIELDS} - set(base.settings())
    assert hidden == {
        "data_path",
        "tokenizer_path",
        "artifact_dir",
        "ledger_path",
        "ttt_eval_only",
        "quantize_only",
        "check_only",
        "device",
        "attention",
        "fa3_library",
        "rank",
        "local_rank",
        "world_size",
        "rendezvous_seconds",
        "train_log_every",
        "val_every_steps",
    }


def test_help_lists_every_setting(tmp_path):
    out = main({}, argv=["--help"])
    assert out.code == 0 and out.err == ""
    for f in FIELDS:
        assert f"{f.name.upper()} " in out.out and f.metadata["meaning"] in out.out


def test_arguments_are_refused():
    out = main({}, argv=["--iterations", "5"])
    assert out.code == 2 and "--iterations" in out.err and out.err.count("\n") == 1


# ---- the layout of the file ----


def sections() -> list[tuple[str, int, int]]:
    """(title, first line, last line) of each banner's section."""
    lines = SOURCE.splitlines()
    banners = [(line.strip("#= ").split(":")[0], i) for i, line in enumerate(lines) if line.startswith("# =====")]
    ends = [start - 1 for _, start in banners[1:]] + [len(lines)]
    return [(title, start, end) for (title, start), end in zip(banners, ends)]


def test_sections_stand_in_dependency_order():
    """A section's code uses only names of its own or of sections above it."""
    tree, parts = ast.parse(SOURCE), sections()
    assert len(parts) >= 11
    where = lambda line: next((i for i, (_, start, end) in enumerate(parts) if start <= line <= end), -1)
    owner = {}
    for node in tree.body:
        names = (
            [node.name]
            if hasattr(node, "name")
            else [t.id for target in getattr(node, "targets", []) for t in ast.walk(target) if isinstance(t, ast.Name)]
        )
        owner.update({name: where(node.lineno) for name in names})
    upward = {
        (parts[where(node.lineno)][0], use.id)
        for node in tree.body
        for use in ast.walk(node)
        if isinstance(use, ast.Name) and isinstance(use.ctx, ast.Load) and owner.get(use.id, -1) > where(node.lineno)
    }
    assert not upward


def test_the_environment_is_read_in_one_place():
    reads = [
        line
        for line in SOURCE.splitlines()
        if ("environ" in line or "getenv" in line) and not line.lstrip().startswith(("#", '"'))
    ]
    assert all("configure(os.environ)" in line or "environment" in line for line in reads), reads


def test_functions_are_short_and_there_is_no_global():
    for node in ast.walk(ast.parse(SOURCE)):
        assert not isinstance(node, ast.Global)
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 70, node.name


def test_no_project_file_is_imported():
    imported = {
        alias.name.split(".")[0]
        for node in ast.walk(ast.parse(SOURCE))
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    imported |= {node.module.split(".")[0] for node in ast.walk(ast.parse(SOURCE)) if isinstance(node, ast.ImportFrom)}
    assert not imported & {path.stem for path in [*ROOT.glob("*.py"), *ROOT.glob("tools/*.py")]}
