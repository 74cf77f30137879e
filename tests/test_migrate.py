"""tools/migrate.py: a published run command -> settings of this script."""

import io
import re
import shlex
from pathlib import Path

import pytest

from tools import migrate
from tools.migrate import NO_EFFECT, OTHER, UNSUPPORTED
from train_gpt import FOREIGN, RETIRED, Config, UserError

FIXTURE = Path(__file__).with_name("published_names.txt")
RECORDS = dict(line.split(": ", 1) for line in FIXTURE.read_text().splitlines() if not line.startswith("#"))
NAMES = sorted({name for names in RECORDS.values() for name in names.split()})
FIELDS = migrate.FIELDS


def settings_of(text: str) -> dict[str, str]:
    found = migrate.migrate(migrate.read_command(text).given)
    assert found.complete, [(name, fate.note) for name, fate in found.fates.items() if fate.verdict == UNSUPPORTED]
    return found.settings


def fate_of(name: str, value: str, **others) -> migrate.Fate:
    return migrate.migrate({name: value} | others).fates[name]


def printed(capsys, *argv: str) -> tuple[int, str]:
    status = migrate.main(list(argv))
    return status, capsys.readouterr().out


@pytest.mark.parametrize("record", RECORDS)
def test_every_name_of_twenty_published_records_has_a_place(record):
    assert len(RECORDS) > 20
    names = RECORDS[record].split()
    for value in ("0", "1", "4", "0.5", "48", "4,5", "./data", ""):
        for name, fate in migrate.migrate(dict.fromkeys(names, value)).fates.items():
            assert "does not know" not in fate.note, name
            assert fate.settings or fate.note and fate.verdict in (NO_EFFECT, UNSUPPORTED), name
            assert set(fate.settings) <= set(FIELDS), name


@pytest.mark.parametrize("record", RECORDS)
def test_the_script_points_here_for_every_name_of_a_record(record, capsys):
    """Together in one line; no name is ignored in silence, and by itself it is at least a near miss, like TTT_BETA1."""
    names = [name for name in RECORDS[record].split() if name not in FIELDS and name.lower() not in RETIRED]
    for given in (names, *([name] for name in names)) if names else ():
        told = ""
        try:
            Config.from_env(dict.fromkeys(given, "1"))
        except UserError as error:
            told = str(error)
        warned = capsys.readouterr().err
        assert told.count("migrate.py") <= 1 and warned.count("\n") <= 1
        near = given != names and "did you mean" in told
        assert "tools/migrate.py" in told + warned or near
        assert all(re.search(rf"\b{name}\b", told + warned) for name in given), given


MISLEADING = (
    "VAL_BATCH_SIZE PHASED_TTT_ENABLED TTT_LR MUON_WEIGHT_DECAY EMA_ENABLED VAL_LOSS_EVERY WEIGHT_DECAY LORA_RANK"
)


@pytest.mark.parametrize("name", MISLEADING.split())
def test_no_other_setting_is_suggested_for_a_foreign_name(name, capsys):
    told = ""
    try:
        Config.from_env({name: "1"})
    except UserError as error:
        told = str(error)
    told += capsys.readouterr().err
    assert "did you mean" not in told and "tools/migrate.py" in told


def test_words_of_others_are_not_foreign():
    for name in "HOME PATH SLURM_JOB_ID USER USE_TF GATEWAY PARALLEL_JOBS SEQ BATCH LORA BLOCKSIZE INT".split():
        assert not name.startswith(FOREIGN)


def test_a_known_name_stands_in_one_table():
    tables = (migrate.RENAMED, migrate.SGD, migrate.IDLE, migrate.BUILT_IN, migrate.ABSENT, migrate.KNOBS)
    tables += (migrate.UNCOUNTED, migrate.COMPUTED)
    names = [name for table in tables for name in table]
    assert sorted(set(names)) == sorted(names)
    assert set(migrate.RENAMED.values()) | set(migrate.SGD.values()) <= set(FIELDS)
    assert {target for target, _ in migrate.SWITCHES.values()} | set(migrate.NEEDS) <= set(FIELDS)


def test_notes_name_settings_that_exist():
    notes = [*migrate.IDLE.values(), *migrate.UNCOUNTED.values(), *(reason for _, reason in migrate.BUILT_IN.values())]
    notes += [what for what, _ in migrate.ABSENT.values()]
    words = {word.strip(";:,.()") for note in notes for word in note.split() if "_" in word and word.upper() == word}
    assert {word.split("=")[0] for word in words} <= set(FIELDS)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("MUON_WEIGHT_DECAY=0.04", {"MUON_WD": "0.04"}),
        ("PHASED_TTT_ENABLED=0 PHASED_TTT_NUM_PHASES=3", {"PHASED_TTT_NUM_PHASES": "0"}),
        ("PHASED_TTT_ENABLED=1", {"PHASED_TTT_NUM_PHASES": "1"}),
        ("PHASED_TTT_ENABLED=1 PHASED_TTT_NUM_PHASES=3", {"PHASED_TTT_NUM_PHASES": "3"}),
        ("EMA_ENABLED=0 EMA_DECAY=0.997", {"EMA_DECAY": "0"}),
        ("EMA_ENABLED=1 EMA_DECAY=0.997", {"EMA_DECAY": "0.997"}),
        (
            "TTT_ENABLED=1 TTT_LR=0.005 TTT_EPOCHS=3",
            {"TTT_ENABLED": "1", "TTT_METHOD": "sgd", "GLOBAL_TTT_LR": "0.005", "GLOBAL_TTT_EPOCHS": "3"},
        ),
        ("TTT_CHUNK_SIZE=48", {"TTT_CHUNKS": "48"}),
        ("TTT_K_LORA=0 TTT_O_LORA=0 TTT_MLP_LORA=1", {"TTT_MASK": "k,o"}),
        ("MATRIX_CLIP_SIGMAS=12.85 ATTN_CLIP_SIGMAS=13", None),
        ("MATRIX_BITS=5", {"MATRIX_BITS": "5", "RATE_DISTORTION": "0"}),
        ("AWQ_LITE_ENABLED=0", {"AWQ_LITE_ENABLED": "0"}),
        ("GATE_ATTN_OUT=1", {"ATTN_OUT_GATE_ENABLED": "1", "SPARSE_ATTN_GATE_ENABLED": "0"}),
        ("QUANT_CLIP_RANGE=31", {"MATRIX_BITS": "6", "RATE_DISTORTION": "0"}),
        ("MLP_HIDDEN=1536 MODEL_DIM=512", {"MODEL_DIM": "512", "MLP_MULT": "3"}),
        ("RECUR_LAYERS=4,5", {"LOOP_START": "4", "LOOP_END": "5", "NUM_LOOPS": "1"}),
        ("PARALLEL_RESIDUAL_START=-1", {"PARALLEL_START_LAYER": "0"}),
        ("RUN_ID=baseline", {"ARTIFACT_DIR": "runs/baseline"}),
        ("RUN_ID=baseline ARTIFACT_DIR=out", {"ARTIFACT_DIR": "out"}),
        ("DATA_DIR=./d/ VOCAB_SIZE=1024", None),
        ("TRAIN_FILES=d/fineweb_train_*.bin VAL_FILES=d/fineweb_val_*.bin", {"DATA_PATH": "d"}),
        ("VAL_BATCH_SIZE=524288 VAL_BATCH_TOKENS=524288 VAL_LOSS_EVERY=0", {}),
        ("VAL_LOSS_EVERY=4000", {"VAL_EVERY_STEPS": "4000"}),
        ("WARMDOWN_ITERS=100 ITERATIONS=400 MAX_WALLCLOCK_SECONDS=0", None),
        ("COMPRESSOR=lrzip CASEOPS_ENABLED=1 TIE_EMBEDDINGS=1 HEAD_LR=0 SWA_ENABLED=0 SWA_EVERY=50", {}),
        ("MUON_BACKEND_STEPS=5 LN_SCALE=1 XSA_LAST_N=11", {}),
        ("ACTIVATION=relu2", {"LEAKY_RELU_SQ_SLOPE": "0"}),
        ("POLAR_EXPRESS=0", {"MUON_COEFFICIENTS": "newton_schulz"}),
        ("GPTQ_RESERVE_MS=14000", {"GPTQ_RESERVE_SECONDS": "14"}),
        ("GPTQ_RESERVE_SECONDS=0.5", {}),  # here it must hold the whole quantisation
        ("NCCL_NET=Socket SEED=42", {"SEED": "42", "NCCL_NET": "Socket"}),
    ],
)
def test_values_are_converted(text, expected):
    found = settings_of(text)
    if expected is not None:
        assert found == expected
    elif "CLIP" in text:
        assert found == {"ATTN_CLIP_SIGMAS": "13", "MLP_CLIP_SIGMAS": "12.85", "RATE_DISTORTION": "0"}
    elif "DATA_DIR" in text:
        assert found["DATA_PATH"] == "./d/datasets/fineweb10B_sp1024"
        assert found["TOKENIZER_PATH"] == "./d/tokenizers/fineweb_1024_bpe.model"
    else:
        assert found["WARMDOWN_FRAC"] == "0.25"
    Config.from_env({name: value for name, value in found.items() if name in FIELDS})


@pytest.mark.parametrize(
    "name, value, others, reason",
    [
        ("TIE_EMBEDDINGS", "0", {}, "also the head"),
        ("SWA_ENABLED", "1", {}, "EMA_DECAY"),
        ("BIGRAM_DIM", "112", {}, "bigram"),
        ("BIGRAM_VOCAB_SIZE", "2048", {}, "bigram"),
        ("XSA_LAST_N", "4", {}, "every layer"),
        ("MUON_BACKEND_STEPS", "6", {}, "always 5"),
        ("WARMDOWN_ITERS", "1200", {}, "WARMDOWN_FRAC"),
        ("TTT_LR", "0.005", {"TTT_LORA_RANK": "96"}, "one method"),
        ("MUON_WEIGHT_DECAY", "0.04", {"MUON_WD": "0.02"}, "MUON_WD sets MUON_WD=0.02"),
        ("MUON_MOMENTUM", "1.5", {}, "is not in [0, 1)"),
        ("SEED", "abc", {}, "not of type int"),
        ("NUM_LAYERS", "", {}, "NUM_LAYERS"),
        ("MLP_HIDDEN", "wide", {}, "not of the kind"),
        ("VAL_DOC_FRACTION", "0.1", {}, "no val_bpb"),
        ("QUITE_UNHEARD_OF", "1", {}, "does not know it"),
    ],
)
def test_what_is_not_supported_says_why(name, value, others, reason):
    found = fate_of(name, value, **others)
    assert found.verdict == UNSUPPORTED and not found.settings
    assert reason in found.note


def test_settings_that_do_not_go_together_are_found():
    found = migrate.migrate({"MODEL_DIM": "512", "NUM_HEADS": "7"})
    assert "NUM_HEADS" in found.conflict and not found.complete


def test_our_own_recipes_come_out_as_they_are():
    from tools.sweep import ROOT, read_recipe

    for recipe in sorted((ROOT / "recipes").glob("*.env")):
        if given := read_recipe(recipe):
            found = settings_of(recipe.read_text())
            assert given.items() <= found.items(), recipe.name
            assert set(found) - set(given) <= {"RATE_DISTORTION", "SPARSE_ATTN_GATE_ENABLED"}, recipe.name


COMMAND = r"""
```bash
$ export NCCL_NET=Socket  # the network
MUON_WEIGHT_DECAY=0.04 RUN_ID='a b' \
COMPRESSOR=pergroup SEED=42 \@
torchrun --standalone --nproc_per_node=8 records/x/train_gpt.py 2>&1 | tee "log #1.txt"
```
""".replace("@", " ")  # a blank behind the backslash, as pages give it


def test_a_pasted_command_gives_a_table_and_a_command(capsys):
    status, out = printed(capsys, COMMAND)
    assert status == 0
    assert re.search(r"^COMPRESSOR=pergroup +has no effect here because model\.bin", out, re.M)
    assert "by default: NUM_HEADS=8 NUM_KV_HEADS=4 ROPE_DIMS=16 ATTN_WINDOW=0." in out
    command = out.split("The command:\n\n")[1]
    words = shlex.split(command.replace("\\\n", " "))
    assert words[-4:] == ["torchrun", "--standalone", "--nproc_per_node=8", "train_gpt.py"]
    assert sorted(words[:-4]) == ["ARTIFACT_DIR=runs/a b", "MUON_WD=0.04", "NCCL_NET=Socket", "SEED=42"]
    assert migrate.read_command(command).launcher == words[-4:]


def test_forms_of_a_command(tmp_path, capsys, monkeypatch):
    read = migrate.read_command
    assert read("env SEED=1 MIN_LR=0 python3 train_gpt.py").given == {"SEED": "1", "MIN_LR": "0"}
    assert read("export SEED=1; export MIN_LR=0 && python train_gpt.py").given == {"SEED": "1", "MIN_LR": "0"}
    assert read("# c\nSEED=1 # one\n\nexport MIN_LR='0'\n").launcher == ["python3", "train_gpt.py"]
    assert read("s=7\nSEED=$s RUN_ID=${RUN_ID:-x}_${s} torchrun train.py").given == {"SEED": "7", "RUN_ID": "x_7"}
    loop = read("for s in 42 314; do\n  SEED=$s torchrun train.py > l_$s\ndone")
    assert loop.given == {"SEED": "42"} and "42 314" in loop.notes[0] and len(loop.notes) == 1
    assert read("SEED=$(date) python train.py").given["SEED"].startswith("$")
    two = read("SEED=1 python train.py\nSEED=2 python train.py")
    assert two.given == {"SEED": "1"} and "second run" in two.notes[0]
    assert "--lr 3" in read("SEED=1 python train.py --lr 3").notes[0]
    assert "cd /x" in read("cd /x && SEED=1 python train.py").notes[0]
    fetched = read("REPO=x python3 data/fetch.py --variant sp8192\nSEED=1 python3 train_gpt.py")
    assert fetched.given == {"SEED": "1"} and fetched.launcher == ["python3", "train_gpt.py"]
    assert "left out: python3 data/fetch.py" in fetched.notes[0]
    assert read("SEED=1 \\\n\u00a0MIN_LR=0 \\\n torchrun train.py").given == {"SEED": "1", "MIN_LR": "0"}
    assert read("SEED=<seed> python3 train_gpt.py > log").given == {"SEED": "<seed>"}
    file = tmp_path / "run.env"
    file.write_text("TIE_EMBEDDINGS=0\n")
    status, out = printed(capsys, str(file))
    assert status == 1 and "NOT SUPPORTED" in out
    monkeypatch.setattr("sys.stdin", io.StringIO("MUON_WEIGHT_DECAY=0"))
    assert "MUON_WD=0" in printed(capsys)[1]
    assert "MUON_WD=0" in printed(capsys, "MUON_WEIGHT_DECAY=0", "python3", "train_gpt.py")[1]


@pytest.mark.parametrize("argv", [["no/such/file"], ["a = b"], ["SEED='1"]])
def test_what_cannot_be_read_is_one_line(argv, capsys):
    assert migrate.main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("migrate.py: ") and captured.err.count("\n") == 1


def test_variables_of_other_programs_stay():
    for name in ("NCCL_NET", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "PYTHONUNBUFFERED", "PYTORCH_CUDA_ALLOC_CONF"):
        assert fate_of(name, "1").verdict == OTHER, name
    for name in NAMES:
        assert not migrate.OTHERS.fullmatch(name), name
