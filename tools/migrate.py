"""The settings of this script for the command, or the .env, of a published record.

    python tools/migrate.py command.txt            a run command as its README has it, an .env, or a shell script
    pbpaste | python tools/migrate.py              the same from standard input
    python tools/migrate.py 'SEED=42 MUON_WEIGHT_DECAY=0.04 torchrun --nproc_per_node=8 train_gpt.py'

Prints a table with a row for every variable, and a command to paste: each variable becomes a setting, has no effect
here, or is not supported, with the reason. Nothing is run. The exit status is 1 where something is not supported.

What the command does not name takes the default of this script, not that of the script it was written for.
"""

import dataclasses
import math
import re
import shlex
import shutil
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

if not __package__:  # run as a file
    import anywhere  # noqa: F401

from train_gpt import RETIRED, Config, UserError, lies_within, parse_setting

FIELDS = {f.name.upper(): f for f in dataclasses.fields(Config)}
NO_EFFECT, UNSUPPORTED, OTHER = "no effect here", "not supported", "as it is"


class Fate(NamedTuple):
    """What becomes of a variable."""

    settings: dict[str, str]  # of this script, that stand in its place; empty: none
    verdict: str  # NO_EFFECT, UNSUPPORTED, OTHER; of a setting ""
    note: str = ""


Rule = Callable[[str, dict[str, str]], Fate]  # of the value, and of all variables of the command


def becomes(note: str = "", **settings) -> Fate:
    return Fate({name: str(value) for name, value in settings.items()}, "", note)


def no_effect(note: str) -> Fate:
    return Fate({}, NO_EFFECT, note)


def unsupported(note: str) -> Fate:
    return Fate({}, UNSUPPORTED, note)


# ---------------------------------------------------------------- the foreign names

# The same thing by another name.
RENAMED = {
    "ADAM_WEIGHT_DECAY": "ADAM_WD",
    "DATASETS_DIR": "DATA_PATH",
    "GATE_ATTN_OUT": "ATTN_OUT_GATE_ENABLED",
    "GPTQ_DAMP": "GPTQ_DAMPING",
    "MUON_WEIGHT_DECAY": "MUON_WD",
    "NEGATIVE_SLOPE": "LEAKY_RELU_SQ_SLOPE",
    "PARALLEL_START": "PARALLEL_START_LAYER",
    "SMEAR_GATE": "SMEAR_GATE_ENABLED",
    "STRIDE": "EVAL_STRIDE",
    "TTT_CHUNK_SIZE": "TTT_CHUNKS",
    "USE_SMEARGATE": "SMEAR_GATE_ENABLED",
    "SLIDING_EVAL_STRIDE": "EVAL_STRIDE",
    "SMEAR": "SMEAR_GATE_ENABLED",
    "WARMDOWN_FRACTION": "WARMDOWN_FRAC",
}

# Test-time training by SGD on the base weights (#549): one name of ours each, and the method.
SGD = {
    "TTT_CHUNK_TOKENS": "GLOBAL_TTT_CHUNK_TOKENS",
    "TTT_EPOCHS": "GLOBAL_TTT_EPOCHS",
    "TTT_GRAD_CLIP": "GLOBAL_TTT_GRAD_CLIP",
    "TTT_LR": "GLOBAL_TTT_LR",
    "TTT_MOMENTUM": "GLOBAL_TTT_MOMENTUM",
}

# A switch whose "off" is a value of another setting here.
SWITCHES = {
    "EMA_ENABLED": ("EMA_DECAY", "0"),
    "PARALLEL_RESIDUAL": ("PARALLEL_START_LAYER", "0"),
    "PHASED_TTT_ENABLED": ("PHASED_TTT_NUM_PHASES", "0"),
    "SLIDING_WINDOW_ENABLED": ("EVAL_STRIDE", "0"),
    "EMA": ("EMA_DECAY", "0"),
    "SLIDING_EVAL": ("EVAL_STRIDE", "0"),
}

# Settings of ours that act only beside others, as they did in the scripts that these names are from.
NEEDS = {
    **dict.fromkeys(
        ("ATTN_CLIP_SIGMAS", "AWQ_LITE_ENABLED", "EMBED_CLIP_SIGMAS", "MATRIX_BITS", "MLP_CLIP_SIGMAS"),
        {"RATE_DISTORTION": "0"},
    ),
    "ATTN_OUT_GATE_ENABLED": {"SPARSE_ATTN_GATE_ENABLED": "0"},  # heads have one gate
}

# What nearly all published scripts have by default and this one has not: the heads of their networks.
THEIR_HEADS = {"NUM_HEADS": "8", "NUM_KV_HEADS": "4", "ROPE_DIMS": "16", "ATTN_WINDOW": "0"}

# Has no effect here because ...
IDLE = {
    "CASEOPS_ENABLED": "the data decides: a dataset with CaseOps has its byte sidecar beside the shards",
    "COMPRESSOR": "model.bin has an entropy coder of its own",
    "CONTROL_TENSOR_NAME_PATTERNS": "the kind of a parameter decides how it learns and is stored",
    "EMBED_LR": "it belongs to untied embeddings; those here are tied and learn by TIED_EMBED_LR",
    "EVAL_BATCH_SEQS": "batches change no score; VAL_BATCH_TOKENS bounds their memory",
    "EVAL_BATCH_SIZE": "batches change no score; VAL_BATCH_TOKENS bounds their memory",
    "FP16_EMBED_EXPORT": "the quantiser decides by kind: the embedding has EMBED_BITS",
    "FP16_KEEP_NAME_PATTERNS": "the quantiser decides by kind: the embedding has EMBED_BITS",
    "FP16_PASSTHROUGH_PATTERNS": "the quantiser decides by kind: the embedding has EMBED_BITS",
    "FUSED_CE_ENABLED": "the device decides whether the fused kernel runs",
    "GLOBAL_TTT_BATCH_SEQS": "an SGD step takes GLOBAL_TTT_CHUNK_TOKENS, in as many forwards as memory wants",
    "GPTQ_BATCH_SIZE": "calibration takes micro-batches of MICRO_BATCH_TOKENS",
    "GPTQ_BLOCK_SIZE": "the block of GPTQ changes its speed only",
    "HEAD_LR": "it belongs to untied embeddings; the head here is the embedding",
    "INT8_FULL_RANGE_PATTERNS": "the quantiser decides by kind, and the entropy coder by content",
    "INT8_KEEP_FLOAT_FP32_NAME_PATTERNS": "the kind of a parameter decides how it is stored",
    "MUON_BETA2": "the records that read it compute nothing with it",
    "ROPE_TRAIN_SEQ_LEN": "the base of RoPE does not follow the length of the context",
    "SW_EVAL_BATCH": "batches change no score; VAL_BATCH_TOKENS bounds their memory",
    "TTT_BATCH_SEQS": "an SGD step takes GLOBAL_TTT_CHUNK_TOKENS, in as many forwards as memory wants",
    "TTT_HEARTBEAT_SECONDS": "scoring reports its progress by itself",
    "TTT_OUTPUT_DIR": "everything goes to ARTIFACT_DIR, the score of each target to LEDGER_PATH",
    "USE_COMPILE": "nothing goes through torch.compile",
    "USE_ZSTD": "model.bin has an entropy coder of its own",
    "VAL_BATCH_SIZE": "batches change no score; VAL_BATCH_TOKENS bounds their memory",
    "ZSTD_LEVEL": "model.bin has an entropy coder of its own",
    "CHURN_LOG_EVERY": "no weight here flips its sign by being rounded in training",
    "COMPILE_MODE": "nothing goes through torch.compile",
    "SLIDING_BATCH_SIZE": "batches change no score; VAL_BATCH_TOKENS bounds their memory",
    "YARN_MAX_LEN": "it belongs to YaRN; RoPE is plain here",
}

# Values that are built in here; any other is not supported.
BUILT_IN = {
    "ATTN_OUT_GATE_SRC": ("proj", "the gate reads the sublayer's input"),
    "GATE_ATTN_SRC": ("proj", "the gate reads the sublayer's input"),
    "GATE_WIDTH": ("12", "gates read 12 channels"),
    "GLOBAL_TTT_RESPECT_DOC_BOUNDARIES": ("1", "attention never crosses the start of a document"),
    "GPTQ_ENABLED": ("1", "matrices are always rounded by GPTQ"),
    "LQER_ASYM_ENABLED": ("1", "LQER stores its factors asymmetrically, as #1797"),
    "LQER_FACTOR_BITS": ("4", "LQER stores its factors in 2 and 4 bits, as #1797"),
    "PARALLEL_START_LAYER_IS_PHYSICAL": ("1", "layers are counted once, however often they are visited"),
    "SMEAR_GATE_WIDTH": ("12", "gates read 12 channels"),
    "SPARSE_ATTN_GATE_INIT_STD": ("0", "the gate begins at zero"),
    "TIE_EMBEDDINGS": ("1", "the embedding is also the head"),
    "TTT_BETA1": ("0", "the adapters' Adam has no first moment"),
    "TTT_FREEZE_BLOCKS": ("0", "every layer learns"),
    "TTT_NS_STEPS": ("0", "SGD steps are not orthogonalised"),
    "TTT_OPTIMIZER": ("adam", "adapters learn by Adam"),
    "USE_GPTQ": ("1", "matrices are always rounded by GPTQ"),
    "VAL_DOC_FRACTION": ("1", "every document is scored: a part of the set gives no val_bpb"),
    "ATTN_PROJ_TYPE": ("standard", "projections are full matrices"),
    "ATTN_VARIANT": ("standard", "attention has one form"),
    "BLOCK_TYPE": ("standard", "blocks have one form"),
    "LOGIT_HEAD_TYPE": ("standard", "the head is a matrix product"),
    "MATRIX_OPTIMIZER": ("muon", "Muon trains the matrices"),
    "ROPE_TYPE": ("rope", "RoPE is plain"),
    "SOFTCAP_TYPE": ("tanh", "the softcap is a tanh"),
    "VAL_MAX_TOKENS": ("0", "every document is scored"),
}

# What this script does not have: the variable that switches it on, what it is, and the variables that tune it.
ABSENT = {
    "ASYMMETRIC_LOGIT": ("learned scales of positive and negative logits; ASYM_LOGIT_RESCALE learns two caps", ""),
    "BIGRAM_HASH_BUCKETS": ("hashed bigram embeddings", "BIGRAM_HASH_DIM"),
    "BIGRAM_VOCAB_SIZE": ("hashed bigram embeddings", "BIGRAM_DIM TRIGRAM"),
    "BLOCK_LARS_TRUST": ("learning rates of blocks by LARS", "BLOCK_LARS_MIN_SCALE"),
    "CANON_AC_LAYERS": ("Canon layers", ""),
    "CAUTIOUS_WD": ("cautious weight decay", ""),
    "DISABLE_LAYER0_ATTN": ("a first layer without attention", ""),
    "DTG_ENABLED": ("the gate of #315 on what a layer adds", ""),
    "ETLB_ENABLED": ("logit biases trained while scoring", "ETLB_CLIP ETLB_LR ETLB_STEPS"),
    "EVAL_NTK_ALPHA": ("NTK scaling of RoPE while scoring", ""),
    "EVAL_ONLY_PATH": ("foreign checkpoints; TTT_EVAL_ONLY=1 scores the artifact in ARTIFACT_DIR", ""),
    "EVAL_ONLY_QUANTIZED_PATH": ("foreign checkpoints; TTT_EVAL_ONLY=1 scores the artifact in ARTIFACT_DIR", ""),
    "GATED_ATTENTION": ("a gate of whole heads; SPARSE_ATTN_GATE_ENABLED and ATTN_OUT_GATE_ENABLED are near", ""),
    "GATED_ATTN": ("a gate of whole heads; SPARSE_ATTN_GATE_ENABLED and ATTN_OUT_GATE_ENABLED are near", ""),
    "GATED_ATTN_ENABLED": (
        "a gate that reads all channels; SPARSE_ATTN_GATE_ENABLED and ATTN_OUT_GATE_ENABLED are near",
        "GATED_ATTN_INIT_STD",
    ),
    "GATE_MLP_OUT": ("a gate of the MLP's output", ""),
    "GLOBAL_TTT_DOC_LIMIT": ("a limit of documents; PHASED_TTT_PREFIX_DOCS says how many teach", ""),
    "GLOBAL_TTT_WARMUP_CHUNKS": ("a warm-up of the base weights' SGD", "GLOBAL_TTT_WARMUP_START_LR"),
    "GPTQ_AR_SELFGEN": ("calibration on text that the model wrote; it takes training data", "GPTQ_TEMPERATURE"),
    "HESSIAN_CLIP_LAMBDA": ("clips by Hessian; RATE_DISTORTION=1 chooses every step", ""),
    "INT4_LAYERS": ("bits by layer; RATE_DISTORTION=1 chooses every step", "INT4_STEP"),
    "INT5_LAYERS": ("bits by layer; RATE_DISTORTION=1 chooses every step", ""),
    "INT6_LAYER_START": ("bits by layer; RATE_DISTORTION=1 chooses every step", "INT6_LAYER_END"),
    "LATE_QAT": ("training with rounded weights", "LATE_QAT_THRESHOLD QAT_THRESHOLD"),
    "LAWA_ENABLED": ("averages of checkpoints; EMA_DECAY averages the weights", "LAWA_FREQ LAWA_K"),
    "LOOP_LAYER_BITS": ("bits of looped layers; RATE_DISTORTION=1 chooses every step", ""),
    "LOOP_LAYER_CLIP_SIGMAS": ("clips of looped layers; RATE_DISTORTION=1 chooses every step", ""),
    "LOOP_PHASE2_AT": ("loops that come one after another", ""),
    "LORA_RANK": ("low-rank weights in training", "LORA_LR"),
    "MIXED_QUANT": ("bits by sensitivity; RATE_DISTORTION=1 chooses every step", "N_INT6_LAYERS"),
    "MTP_NUM_HEADS": ("heads that predict several tokens", "MTP_LOSS_WEIGHT"),
    "NGRAM_TILT_ENABLED": (
        "the n-gram channels of #1420; NGRAM_ENABLED has one, causal by construction",
        "NGRAM_AGREE_BONUS NGRAM_BASE_BETA NGRAM_OPEN_TABLE_BITS NGRAM_ORDER_STRIDE NGRAM_WITHIN_BETA "
        "NGRAM_WITHIN_THRESHOLD NGRAM_WORD_BETA NGRAM_WORD_THRESHOLD",
    ),
    "POST_GPTQ_EVAL_ONLY": ("this mode; TTT_EVAL_ONLY=1 scores the artifact in ARTIFACT_DIR", ""),
    "PREQUANT_ONLY": ("a stop before quantisation; trained.npz is on disk by then", ""),
    "PRUNE_RATIO": ("pruning", ""),
    "QAT": ("training with rounded weights", ""),
    "QAT_ENABLED": ("training with rounded weights", "QAT_INT6"),
    "REPEAT_UNTIE_MLP": ("MLPs of their own in repeated layers", "REPEAT_UNTIE_MLP_LAYERS"),
    "ROPE_YARN": ("YaRN", ""),
    "SAVE_QUANT_STATE": ("this file; the artifact is in ARTIFACT_DIR", ""),
    "SKIP_POST_TRAIN_EVAL": ("a stop after training; trained.npz is on disk by then", ""),
    "SLOT_ENABLED": ("SLOT, which learns from a target before it is scored", "SLOT_LR SLOT_STEPS"),
    "SWA_ENABLED": ("averages of checkpoints; EMA_DECAY averages the weights", "SWA_DECAY SWA_EVERY SWA_START_FRAC"),
    "TTT_DEBUG_BYPASS": ("this debugging aid", ""),
    "TTT_DOC_LIMIT": ("a limit of documents: every document is scored", ""),
    "TTT_ENTROPY_HIGH": ("a choice of documents by entropy; every document is adapted to", "TTT_ENTROPY_LOW"),
    "TTT_EVAL_BATCHES": ("a choice of batches: every document is scored", ""),
    "TTT_ONLY": ("this mode; TTT_EVAL_ONLY=1 scores the artifact in ARTIFACT_DIR", ""),
    "TTT_ONLY_EVAL": ("this mode; TTT_EVAL_ONLY=1 scores the artifact in ARTIFACT_DIR", ""),
    "UNTIE_LOOP_MLPS": ("MLPs of their own in looped layers", ""),
    "USE_INT6": ("this storage; MATRIX_BITS and EMBED_BITS say how many", ""),
    "VALUE_RESIDUAL": ("residuals of values", ""),
    "VE_ENABLED": ("value embeddings", "VE_DIM VE_LAYERS"),
    "WD_TAPER_FINAL_MULT": ("a taper of the weight decay", "WD_TAPER_START_FRAC"),
    "BATCH_TOKENS_START": ("batches that grow", "BATCH_SCHEDULE_FRACTION"),
    "BIGRAM_HASH": ("hashed bigram embeddings", ""),
    "CORR_WEIGHT_LR": ("correction weights", ""),
    "DIFF_ATTN": ("differential attention", ""),
    "EVAL_DEPTH_RECURRENCE": ("another depth in scoring; NUM_LOOPS holds for training and scoring", ""),
    "FP_STORAGE": ("this storage; MATRIX_BITS and EMBED_BITS say how many", ""),
    "MLP_GROUPS": ("grouped MLPs", ""),
    "MTP_HEADS": ("heads that predict several tokens", ""),
    "REFINER": ("a refiner behind the trunk", "REFINER_KERNEL"),
    "SEQ_LEN_START": ("this schedule; TRAIN_SEQ_SCHEDULE has one", "SEQ_SCHEDULE_FRACTION"),
    "TEMP_SCALING": ("a temperature; LOGIT_CALIBRATION_ENABLED fits a scale and biases", ""),
    "TRAINING_DEPTH_RECURRENCE": ("this recurrence; NUM_LOOPS repeats layers", ""),
    "TVERSKY_NUM_FEATURES": ("Tversky projections", "TVERSKY_FEATURE_POOLS TVERSKY_MEMBERSHIP"),
    "UNTIE_AT_FRACTION": ("a head that parts from the embedding", ""),
}
KNOBS = {knob: switch for switch, (_, knobs) in ABSENT.items() for knob in knobs.split()}
OFF = ("", "0", "none", "false")  # values that mean "off"; of two switches other ones
OFF_TOO = {"INT6_LAYER_START": "-1", "WD_TAPER_FINAL_MULT": "1"}

# Counted otherwise here.
UNCOUNTED = {
    "BANK_SPLIT": "one MATRIX_LR trains all layers",
    "CLIP_MULT_EARLY": "clips are set by kind of matrix; RATE_DISTORTION=1 chooses every step",
    "CLIP_MULT_LATE": "clips are set by kind of matrix; RATE_DISTORTION=1 chooses every step",
    "CLIP_MULT_LOOP": "clips are set by kind of matrix; RATE_DISTORTION=1 chooses every step",
    "CLIP_MULT_MID": "clips are set by kind of matrix; RATE_DISTORTION=1 chooses every step",
    "GPTQ_CALIB_BATCHES": "its batches have another size; GPTQ_CALIBRATION_BATCHES counts MICRO_BATCH_TOKENS",
    "GPTQ_CALIB_SAMPLES": "its samples have another size; GPTQ_CALIBRATION_BATCHES counts MICRO_BATCH_TOKENS",
    "MATRIX_LR_EARLY": "one MATRIX_LR trains all layers",
    "MATRIX_LR_LATE": "one MATRIX_LR trains all layers",
    "RECUR_WARMUP_STEPS": "loops switch on at once, at ENABLE_LOOPING_AT",
    "ADAM_LR": "Adam has a rate for each kind: SCALAR_LR and TIED_EMBED_LR",
    "BITNET_GROUP_SIZE": "weights are no ternary ones: GPTQ rounds them after training",
    "EMA_START_FRACTION": "the average of EMA_DECAY is debiased and runs from the first step",
}

# Variables that other programs read.
OTHERS = re.compile(
    r"(NCCL|CUDA|TORCH|PYTORCH|TRITON|OMP|MKL|OPENBLAS|GLOO|HF|WANDB|UV|LD|XDG|CC|CXX)(_.*)?|PYTHON.*|"
    r"PATH|HOME|USER|SHELL|LANG|LC_.*|TMPDIR|VIRTUAL_ENV|MASTER_ADDR|MASTER_PORT|LOCAL_WORLD_SIZE|"
    r"TOKENIZERS_PARALLELISM"
)


# ---------------------------------------------------------------- rules that compute something


def number(value: str) -> float:
    return float(value.replace("_", ""))


def plain(x: float) -> str:
    return f"{x:.6g}"


def share_of_steps(target: str) -> Rule:
    """A number of steps becomes a share of the run, where the command says how many steps that has."""

    def rule(value: str, given: dict[str, str]) -> Fate:
        if "ITERATIONS" in given and float(given.get("MAX_WALLCLOCK_SECONDS", "600")) == 0:
            share = number(value) / number(given["ITERATIONS"])
            return becomes(f"as a share of ITERATIONS={given['ITERATIONS']}", **{target: plain(share)})
        return unsupported(f"it counts steps, and the clock ends the run; {target} is a share of the run")

    return rule


def activation(value: str, given: dict[str, str]) -> Fate:
    if value == "relu2":
        return becomes("a squared ReLU has no slope below zero", LEAKY_RELU_SQ_SLOPE=0)
    return unsupported("the MLP has a squared leaky ReLU: LEAKY_RELU_SQ_SLOPE")


def clip_of_matrices(value: str, given: dict[str, str]) -> Fate:
    own = [name for name in ("MLP_CLIP_SIGMAS", "ATTN_CLIP_SIGMAS") if name not in given]
    return becomes(**dict.fromkeys(own, value)) if own else no_effect("the command has a clip for each kind of matrix")


def data_folder(value: str, given: dict[str, str]) -> Fate:
    """The folders that the published scripts make of DATA_DIR."""
    vocab, root = given.get("VOCAB_SIZE", "8192"), value.rstrip("/")
    if given.get("CASEOPS_ENABLED", "0") not in OFF:
        root, form = f"{root}/datasets/fineweb10B_sp8192_caseops/datasets", "_lossless_caps_caseops_v1_reserved"
    else:
        form = ""
    places = {
        "DATA_PATH": f"{root}/datasets/fineweb10B_sp{vocab}{form}",
        "TOKENIZER_PATH": f"{root}/tokenizers/fineweb_{vocab}_bpe{form}.model",
    }
    own = {name: place for name, place in places.items() if name not in given}
    if not own:
        return no_effect("DATA_PATH and TOKENIZER_PATH say where both are")
    return becomes("where the published scripts look", **own)


def embedding_width(value: str, given: dict[str, str]) -> Fate:
    reason = "the embedding is as wide as the model"
    as_wide = value in ("0", given.get("MODEL_DIM", str(Config().model_dim)))
    return no_effect(reason) if as_wide else unsupported(reason)


def folder_of_files(value: str, given: dict[str, str]) -> Fate:
    folder = str(Path(value).parent)
    if given.get("DATA_PATH") == folder:
        return no_effect("DATA_PATH says it")
    return becomes("the folder; names of shards are fixed", DATA_PATH=folder)


def hidden_width(value: str, given: dict[str, str]) -> Fate:
    if number(value) == 0:
        return no_effect("0 leaves it to MLP_MULT")
    width = number(given.get("MODEL_DIM", str(Config().model_dim)))
    return becomes("over MODEL_DIM", MLP_MULT=plain(number(value) / width))


def loop_of_layers(value: str, given: dict[str, str]) -> Fate:
    layers = [int(part) for part in value.split(",") if part.strip()]
    if not layers:
        return becomes(NUM_LOOPS=0)
    if layers != list(range(layers[0], layers[-1] + 1)):
        return unsupported("looped layers follow each other: LOOP_START to LOOP_END")
    return becomes("run once more", LOOP_START=layers[0], LOOP_END=layers[-1], NUM_LOOPS=1)


def masked_adapters(value: str, given: dict[str, str]) -> Fate:
    """TTT_K_LORA and its like are one setting here."""
    off = [kind for name, kind in ADAPTERS.items() if given.get(name, "1") in OFF]
    if value not in OFF:
        return no_effect("every kind of adapter is on unless TTT_MASK names it")
    return becomes(TTT_MASK=",".join(off))


def parallel_from(value: str, given: dict[str, str]) -> Fate:
    first = max(int(value), 0)
    return becomes(PARALLEL_START_LAYER=first) if first or int(value) < 0 else unsupported("0 means none here")


def polar_express(value: str, given: dict[str, str]) -> Fate:
    return becomes(MUON_COEFFICIENTS="newton_schulz" if value in OFF else "polar_express")


def reserved_seconds(value: str, given: dict[str, str]) -> Fate:
    default = Config().gptq_reserve_seconds
    if number(value) >= default:
        return becomes(GPTQ_RESERVE_SECONDS=value)
    return no_effect(f"the training budget holds all of the quantisation, for which {default:g} s stay reserved")


def run_id(value: str, given: dict[str, str]) -> Fate:
    if "ARTIFACT_DIR" in given:
        return no_effect("ARTIFACT_DIR names the folder of the run")
    return becomes("the folder of the run, its log inside", ARTIFACT_DIR=f"runs/{value}")


def scoring_tokens(value: str, given: dict[str, str]) -> Fate:
    """The published scripts divide it by ranks and accumulation steps; here it is what one rank holds in memory."""
    if number(value) <= Config().val_batch_tokens:
        return becomes(VAL_BATCH_TOKENS=value)
    return no_effect("batches change no score, and here it counts the tokens of one rank")


def symbol_range(value: str, given: dict[str, str]) -> Fate:
    bits = math.log2(number(value) + 1) + 1
    if not bits.is_integer():
        return unsupported("ranges are 2^(bits-1) - 1")
    return becomes("as bits", MATRIX_BITS=int(bits))


def score_every(value: str, given: dict[str, str]) -> Fate:
    if number(value) == 0:
        return no_effect("none are made unless VAL_EVERY_STEPS asks for them")
    return becomes("of the first documents, while the clock stands", VAL_EVERY_STEPS=int(value))


def xsa_layers(value: str, given: dict[str, str]) -> Fate:
    if number(value) >= number(given.get("NUM_LAYERS", str(Config().num_layers))):
        return no_effect("XSA runs in every layer, always")
    return unsupported("XSA runs in every layer, always")


ADAPTERS = {"TTT_K_LORA": "k", "TTT_MLP_LORA": "mlp", "TTT_O_LORA": "o"}
COMPUTED: dict[str, Rule] = {
    **dict.fromkeys(ADAPTERS, masked_adapters),
    "DATA_DIR": data_folder,
    "EMBEDDING_DIM": embedding_width,
    "GPTQ_RESERVE_MS": lambda value, given: reserved_seconds(plain(number(value) / 1000), given),
    "GPTQ_RESERVE_SECONDS": reserved_seconds,
    "MATRIX_CLIP_SIGMAS": clip_of_matrices,
    "MLP_HIDDEN": hidden_width,
    "PARALLEL_RESIDUAL_START": parallel_from,
    "POLAR_EXPRESS": polar_express,
    "QUANT_CLIP_RANGE": symbol_range,
    "RECUR_LAYERS": loop_of_layers,
    "RECUR_START_STEP": share_of_steps("ENABLE_LOOPING_AT"),
    "RUN_ID": run_id,
    "TARGET_MB": lambda value, given: becomes("in bytes", ARTIFACT_CAP=int(number(value) * 2**20)),
    "TRAIN_FILES": folder_of_files,
    "TTT_WARM_START_A": lambda value, given: becomes(
        "from the mean of a segment's adapters", TTT_WARM_START=0 if value in OFF else 1
    ),
    "USE_POLAR_EXPRESS": polar_express,
    "VAL_BATCH_TOKENS": scoring_tokens,
    "VAL_FILES": folder_of_files,
    "VAL_LOSS_EVERY": score_every,
    "WARMDOWN_ITERS": share_of_steps("WARMDOWN_FRAC"),
    "WEIGHT_DECAY": lambda value, given: becomes("its Muon had 0.04", EMBED_WD=value, ADAM_WD=value),
    "XSA_LAST_N": xsa_layers,
    "ACTIVATION": activation,
    "EMBED_DIM": embedding_width,
}


# ---------------------------------------------------------------- the fate of each variable


def same(value: str, other: str) -> bool:
    """Whether two texts mean the same value: 1.0 is 1."""
    try:
        return number(value) == number(other)
    except ValueError:
        return value.strip().lower() == other


def switched(name: str, given: dict[str, str]) -> Fate | None:
    """The fate of a switch and of what it switches, where one is off by a value of the other."""
    for switch, (target, off) in SWITCHES.items():
        is_off = given.get(switch, "1") in OFF
        if name == switch:
            first = {"PHASED_TTT_NUM_PHASES": "1"}.get(target)  # what the scripts with that switch do by default
            on = becomes(**{target: first}) if first and target not in given else no_effect(f"{target} switches it on")
            return becomes(**{target: off}) if is_off else on
        if name == target and is_off:
            return no_effect(f"{switch}={given[switch]} switches it off")
    return None


def tuned(name: str, value: str, given: dict[str, str]) -> Fate:
    """The fate of a variable in ABSENT or KNOBS."""
    switch = KNOBS.get(name, name)
    what, _ = ABSENT[switch]
    if name == switch and (value.strip().lower() in OFF or same(value, OFF_TOO.get(name, "0"))):
        return no_effect("it is off, and not here")
    if name != switch and given.get(switch, "1").strip().lower() in OFF:
        return no_effect(f"{switch}={given[switch]} switches it off")
    return unsupported(what)


def by_sgd(name: str, value: str, given: dict[str, str]) -> Fate:
    if any(other.startswith("TTT_LORA_") for other in given) or given.get("TTT_METHOD") == "lora":
        return unsupported("test-time training has one method: SGD on the base weights, or adapters (TTT_LORA_*)")
    return becomes(**{SGD[name]: value, "TTT_METHOD": "sgd"})


def built_in(value: str, fixed: str, reason: str) -> Fate:
    return no_effect(f"{reason}, always") if same(value, fixed) else unsupported(f"{reason}, always")


def fate(name: str, given: dict[str, str]) -> Fate:
    """What becomes of a variable of the command."""
    value = given[name]
    if (found := switched(name, given)) is not None:
        return found
    if name in COMPUTED:
        return COMPUTED[name](value, given)
    if name in RENAMED:
        return becomes(**{RENAMED[name]: value})
    if name in SGD:
        return by_sgd(name, value, given)
    if name in IDLE:
        return no_effect(IDLE[name])
    if name in BUILT_IN:
        return built_in(value, *BUILT_IN[name])
    if name in ABSENT or name in KNOBS:
        return tuned(name, value, given)
    if name in UNCOUNTED:
        return unsupported(UNCOUNTED[name])
    if name in FIELDS:
        return becomes(**{name: value})
    if name.lower() in RETIRED:
        fixed = RETIRED[name.lower()]
        equal = parse_setting(name, value, type(fixed)) == fixed
        return (no_effect if equal else unsupported)(f"it is always {fixed}")
    if OTHERS.fullmatch(name):
        return Fate({name: value}, OTHER, "other programs read it")
    return unsupported("it is no setting here, and tools/migrate.py does not know it")


def checked(found: Fate) -> Fate:
    """The fate, or why its settings cannot have these values. What only the shell knows stays unchecked."""
    for name, value in found.settings.items():
        if name not in FIELDS:
            continue
        if "$" in value or "`" in value:
            found = found._replace(note="the shell fills it in: not checked")
        elif problem := refused({name: value}):
            return unsupported(problem)
    return found


def refused(settings: dict[str, str]) -> str:
    """Why these settings cannot be, or nothing."""
    try:
        cfg = Config.from_env(settings, check=len(settings) > 1)
        alone = {name.lower() for name in settings}
        for f in dataclasses.fields(Config):
            if len(settings) == 1 and f.name in alone and not lies_within(getattr(cfg, f.name), f.metadata["within"]):
                return f"{f.name.upper()}={getattr(cfg, f.name)} is not in {f.metadata['within']}"
    except UserError as error:
        return str(error)
    return ""


class Migration(NamedTuple):
    """The fate of every variable, and the settings that come of it."""

    fates: dict[str, Fate]
    settings: dict[str, str]
    conflict: str  # why the settings do not go together, or nothing

    @property
    def complete(self) -> bool:
        return not self.conflict and all(found.verdict != UNSUPPORTED for found in self.fates.values())


def migrate(given: dict[str, str]) -> Migration:
    """The variables of a command, as this script would have them."""
    fates, settings, source = {}, {}, {}
    for name in sorted(given, key=lambda name: name not in FIELDS):  # a setting's own name comes first
        try:
            found = checked(fate(name, given))
        except (ValueError, UserError, ZeroDivisionError):
            found = unsupported("its value is not of the kind that it should be")
        for target, value in found.settings.items():
            if target in settings and not same(settings[target], value):
                found = unsupported(f"{source[target]} sets {target}={settings[target]}")
                break
        settings |= found.settings
        source |= dict.fromkeys(found.settings, name)
        fates[name] = found
    for name, needs in NEEDS.items():
        if settings.get(name, "0") not in OFF:
            settings = needs | settings
    known = {name: value for name, value in settings.items() if name in FIELDS and "$" not in value}
    return Migration({name: fates[name] for name in given}, settings, refused(known) if len(known) > 1 else "")


# ---------------------------------------------------------------- reading a command


class MigrateError(Exception):
    """A problem that the user can act on; printed as one line."""


class Command(NamedTuple):
    """What a shell would hand to the script."""

    given: dict[str, str]
    launcher: list[str]  # words that start the script, its name replaced by ours
    notes: list[str]  # what was left out


ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)=(.*)", re.S)
BEFORE = {"do", "then", "else", "export", "declare", "typeset", "env", "nohup", "time", "exec", "sudo", "command"}
LAUNCHERS = re.compile(r"(.*/)?(torchrun|python[\d.]*|accelerate|uv|srun|mpirun)")
QUIET_WORDS = {"done", "fi", "set", "wait", "}"}  # of the shell: nothing is lost with them
COMMENT = re.compile(r"""('[^']*'|"[^"]*")|(?:^|(?<=\s))#.*""")  # or a quoted text, which stays
VARIABLE = re.compile(r"\$\{(\w+)(?::?-([^}]*))?\}|\$(\w+)")


def simple_commands(text: str) -> list[list[str]]:
    """The words of each simple command; redirections and what a pipe leads to are left out."""
    text = text.replace("\u00a0", " ")  # pages have blanks that do not break
    text = re.sub(r"\\[ \t]*\r?\n", " ", text)
    commands = []
    for line in text.splitlines():
        line = re.sub(r"=(<[^<>\s]+>)", r"='\1'", line)  # SEED=<seed> is a gap to fill, no redirection
        line = COMMENT.sub(r"\1", re.sub(r"^\s*\$ ", "", line))
        if line.strip().startswith("```"):
            continue
        lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|<>")
        lexer.whitespace_split, lexer.commenters = True, ""
        try:
            words = list(lexer)
        except ValueError as error:
            raise MigrateError(f"cannot read {line.strip()[:60]!r}: {str(error).lower()}") from None
        command, skip = [], False
        for word in words + [";"]:
            if set(word) <= set(";&") or word == "||":
                commands.append(command)
                command, skip = [], False
            elif set(word) <= set("|<>&"):
                if command and command[-1].isdigit() and "|" not in word:
                    command.pop()  # the 2 of 2>&1
                skip = True
            elif not skip:
                command.append(word)
    return [command for command in commands if command]


def filled_in(value: str, known: dict[str, str]) -> str:
    """The value with the shell variables that are known, and the defaults of others."""

    def text_of(match: re.Match) -> str:
        name = match[1] or match[3]
        return known.get(name, match[0] if match[2] is None else match[2])

    return VARIABLE.sub(text_of, value)


def script_in(words: list[str]) -> int | None:
    """The place of the script that a command trains with: torchrun's, or python's where its name says so."""
    if not words or not LAUNCHERS.fullmatch(words[0]):
        return None
    scripts = [i for i, word in enumerate(words) if word.endswith(".py")]
    if not scripts or "torchrun" not in " ".join(words) and "train" not in Path(words[scripts[0]]).name:
        return None
    return scripts[0]


def loop_of(words: list[str], known: dict[str, str]) -> str | None:
    """A note on a `for` loop, whose variable gets its first value; None where there is none."""
    if words[0] != "for" or len(words) < 4 or words[2] != "in":
        return None
    values = [filled_in(value, known) for value in words[3:]]
    known[words[1]] = values[0]
    return f"a loop over {words[1]}: {' '.join(values)}; its first value is here (sweep.py --seeds has all)"


def read_command(text: str) -> Command:
    """The settings and the launcher of the first training run in a text: a command, an .env, a script. What is set for
    another command, such as one that fetches the data, is that one's own."""
    known: dict[str, str] = {}  # every variable that was set, shell variables too
    given: dict[str, str] = {}
    launcher: list[str] = []
    notes: list[str] = []
    for words in simple_commands(text):
        if note := loop_of(words, known):
            notes.append(note)
            continue
        while words and (words[0] in BEFORE or words[0].startswith("-")):
            words = words[1:]
        own = {}
        while words and (match := ASSIGNMENT.fullmatch(words[0])):
            own[match[1]] = filled_in(match[2], known | own)
            words = words[1:]
        words = [word for word in words if word not in known]  # `export SEED` alone
        script = script_in(words)
        if launcher and script is not None:
            notes.append("a second run in the text is left out: give one at a time")
            break
        if words and script is None and words[0] not in QUIET_WORDS:
            notes.append(f"left out: {' '.join(words)[:80]}")
        if words and script is None:
            continue
        known |= own
        given |= {name: value for name, value in own.items() if name.isupper()}
        if script is not None:
            launcher = [filled_in(word, known) for word in words[:script]] + ["train_gpt.py"]
            if rest := " ".join(words[script + 1 :]):
                notes.append(f"arguments not supported: {rest}; settings come from the environment")
    if not given and not launcher:
        raise MigrateError("no NAME=value and no run command found; paste a command, or give the file that holds it")
    return Command(given, launcher or ["python3", "train_gpt.py"], notes)


# ---------------------------------------------------------------- printing


def quoted(name: str, value: str) -> str:
    return f'{name}="{value}"' if "$" in value else f"{name}={shlex.quote(value)}"


def as_command(settings: dict[str, str], launcher: list[str], width: int = 100) -> str:
    """A command to paste, broken behind settings."""
    parts = [quoted(name, value) for name, value in settings.items()]
    # A value may hold spaces: only the joints between settings may break.
    text = textwrap.fill(
        " ".join(part.replace(" ", "\0") for part in parts), width, break_long_words=False, break_on_hyphens=False
    )
    lines = [line.replace("\0", " ") for line in text.splitlines()]
    return " \\\n".join([*lines, shlex.join(launcher)])


def told(found: Fate) -> str:
    if found.verdict == NO_EFFECT:
        return f"has no effect here because {found.note}"
    if found.verdict == UNSUPPORTED:
        return f"NOT SUPPORTED: {found.note}"
    settings = " ".join(f"{name}={value}" for name, value in found.settings.items())
    return f"{settings}  ({found.note})" if found.note else settings


def report(command: Command, migration: Migration, width: int) -> str:
    names = [f"{name}={value}" for name, value in command.given.items()]
    column = min(max((len(name) for name in names), default=0), 44) + 2
    lines = []
    for name, found in zip(names, migration.fates.values(), strict=True):
        first, *rest = textwrap.wrap(
            told(found), max(width - column, 40), break_long_words=False, break_on_hyphens=False
        ) or [""]
        if len(name) >= column:
            lines.append(name)
            name = ""
        lines.append(f"{name:{column}s}{first}")
        lines += [" " * column + line for line in rest]
    lines += [f"note: {note}" for note in command.notes]
    if migration.conflict:
        lines.append(f"NOT SUPPORTED together: {migration.conflict}")
    added = [
        f"{name}={value}"
        for name, value in migration.settings.items()
        if not any(name in found.settings for found in migration.fates.values())
    ]
    if added:
        lines.append(f"added: {' '.join(added)}, which settings above need")
    lines += [
        "What is not named takes the default of this script (python3 train_gpt.py --help); recipes/ has published",
        "systems whole.",
    ]
    if heads := [f"{name}={value}" for name, value in THEIR_HEADS.items() if name not in migration.settings]:
        lines.append(f"Most published scripts have by default: {' '.join(heads)}. Add it for their network.")
    lines += [
        "The command:",
        "",
        as_command(migration.settings, command.launcher),
    ]
    return "\n".join(lines)


def text_to_read(argv: list[str]) -> str:
    """The text of a file, of the arguments themselves, or of standard input."""
    if len(argv) == 1 and "=" not in argv[0]:
        try:
            return Path(argv[0]).read_text(encoding="utf-8") if argv[0] != "-" else sys.stdin.read()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "is no text"
            raise MigrateError(f"{argv[0]}: {reason}; give a file with a command, or the command in quotes") from None
    return (argv[0] if len(argv) == 1 else shlex.join(argv)) if argv else sys.stdin.read()


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    try:
        command = read_command(text_to_read(argv))
    except MigrateError as error:
        print(f"migrate.py: {error}", file=sys.stderr)
        return 2
    migration = migrate(command.given)
    print(report(command, migration, min(shutil.get_terminal_size((120, 40)).columns, 140)))
    return 0 if migration.complete else 1


if __name__ == "__main__":
    sys.exit(main())
