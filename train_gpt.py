"""Train a GPT in ten minutes, quantise it below 16,000,000 bytes, and score it in bits per byte (BPB).

    torchrun --nproc_per_node=8 train_gpt.py          train, quantise, pack, reload from disk, score
    TTT_EVAL_ONLY=1 python train_gpt.py               score the artifact in ARTIFACT_DIR
    QUANTIZE_ONLY=1 python train_gpt.py               start again from the trained weights in ARTIFACT_DIR
    CHECK_ONLY=1 python train_gpt.py                  check data, tokenizer, attention, codec and disk, then stop
    python train_gpt.py --help                        every setting, its default and its meaning
    python train_gpt.py --unpack FILE                 print the source inside a packed script

Settings are environment variables. The same file runs on a CPU, one GPU, eight GPUs or several nodes. The data folder is made by
prepare_data.py; shards of third parties in the same format load as they are.

Sections, each using only those above it: Hyperparameters, Runtime, Data, Kernels, Attention, Model, Adapters, Optimizers, Training, Quantizer, Artifact,
N-gram, Scoring, Test-time training, Packer, Main.
"""

import ast
import collections
import contextlib
import copy
import dataclasses
import difflib
import functools
import hashlib
import importlib
import io
import itertools
import json
import lzma
import math
import os
import platform
import re
import shutil
import signal
import struct
import sys
import time
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

SOURCE = Path(__file__).read_text(encoding="utf-8")  # captured once: editing the file during a run changes nothing
RUNNING = Path(globals().get("PACKED_PATH", __file__)).resolve()  # the packed script names itself


class UserError(Exception):
    """Bad input: printed as one line that names the file or setting and the remedy; the process exits with status 2."""


def require(holds, message: str):
    """Raise UserError unless ``holds``."""
    if not holds:
        raise UserError(message)


@contextlib.contextmanager
def explained(message: str, *errors: type[Exception]):
    """Turn ``errors`` of the block into a UserError; {} in the message is the error's own text."""
    try:
        yield
    except errors as e:
        raise UserError(message.replace("{}", getattr(e, "strerror", None) or str(e))) from None


# ======== Hyperparameters =====================================================================================================================================

ADAPTER_KINDS = ("q", "k", "v", "o", "mlp", "head")
POSITIVE, SHARE = "(0, inf)", "[0, 1)"


def setting(default, meaning: str, within: str = ""):
    """A field of Config: its default, its line in --help, and the interval of a number ([0, inf) if none is given) or the choices of a string."""
    return dataclasses.field(
        default=default,
        metadata={"meaning": meaning, "within": within or ("" if isinstance(default, str) else "[0, inf)")},
    )


def lies_within(value, within: str) -> bool:
    """Whether a number lies in an interval like [0, 1), without its end at a round bracket; whether a string is among "a, b, c"."""
    if isinstance(value, str):
        return not within or value in within.split(", ")
    low, high = map(float, within[1:-1].split(", "))
    return (low < value or low == value and within[0] == "[") and (value < high or value == high and within[-1] == "]")


@dataclasses.dataclass(frozen=True, slots=True)
class Config:
    """Every setting once: the environment variable is the field's name in capitals. Defaults are our best configuration."""

    # run
    seed: int = setting(1337, "seed of the initial weights; the order of the data is fixed", "[0, 9e18]")
    data_path: str = setting("data", "folder of shards fineweb_{train,val,val_bytes}_*.bin and manifest.json")
    tokenizer_path: str = setting("", "SentencePiece model; empty: tokenizer.model in DATA_PATH")
    artifact_dir: str = setting(
        "",
        "where train_gpt.py, model.bin, result.json and the log go; empty: runs/SEED (packed script: its own folder)",
    )
    ledger_path: str = setting(
        "", "write the nats of every validation target (float64 .npy, stream order) of the headline pass here"
    )
    ttt_eval_only: bool = setting(False, "score the artifact in ARTIFACT_DIR and stop")
    quantize_only: bool = setting(False, "start from ARTIFACT_DIR/trained.npz instead of training")
    check_only: bool = setting(False, "run every pre-flight check and stop")
    device: str = setting("auto", "where to run; auto: a GPU if there is one", "auto, cpu, cuda")
    attention: str = setting(
        "auto", "attention backend; auto: the first that works here, in this order", "auto, fa3, fa4, torch, reference"
    )
    fa3_library: str = setting(
        "", "shared object that registers torch.ops.flash_attn_3 (for example of the xformers wheel)"
    )
    # model
    vocab_size: int = setting(8192, "tokens in the vocabulary; tokens are stored in 16 bits", "[8, 65536]")
    bos_id: int = setting(1, "token that begins every document")
    num_layers: int = setting(11, "physical layers", POSITIVE)
    model_dim: int = setting(512, "width of the residual stream", POSITIVE)
    num_heads: int = setting(4, "query heads", POSITIVE)
    num_kv_heads: int = setting(2, "key/value heads", POSITIVE)
    mlp_mult: float = setting(4.0, "MLP hidden width over MODEL_DIM")
    leaky_relu_sq_slope: float = setting(0.5, "negative slope of the squared leaky ReLU")
    tied_embed_init_std: float = setting(0.005, "standard deviation of the initial embedding")
    logit_softcap: float = setting(30.0, "logits are capped to +-this by a tanh", POSITIVE)
    asym_logit_rescale: bool = setting(
        False, "learn the cap of positive and that of negative logits, both from LOGIT_SOFTCAP on (#1923)"
    )
    rope_base: float = setting(10000.0, "RoPE base", POSITIVE)
    rope_dims: int = setting(32, "rotated dimensions of each head")
    attn_window: int = setting(
        128, "tokens that attention reaches back, but for ATTN_FULL_LAYERS; 0: the whole span in every layer"
    )
    attn_full_layers: str = setting(
        "2,5,10", "layers whose attention reaches back over the whole span; numbers beyond NUM_LAYERS mean nothing"
    )
    qk_gain_init: float = setting(5.0, "initial gain of each normalised query head")
    xsa_last_n: int = setting(11, "layers, from the last, whose heads drop the component along their own value")
    ln_scale: bool = setting(True, "scale sublayer inputs by 1/sqrt(layer + 1)")
    smear_gate_enabled: bool = setting(True, "add a gated copy of the previous token's embedding")
    gate_window: int = setting(12, "leading channels that SmearGate and the attention gates read", POSITIVE)
    sparse_attn_gate_enabled: bool = setting(True, "gate each head's output by a sigmoid of the leading channels")
    sparse_attn_gate_scale: float = setting(0.5, "factor inside that sigmoid")
    attn_out_gate_enabled: bool = setting(
        False, "the gate of #1667 instead: twice that sigmoid, so that heads begin unchanged"
    )
    skip_gates_enabled: bool = setting(True, "U-Net skips are merged by a learned gate (off: added)")
    num_loops: int = setting(2, "extra passes over the looped layers")
    loop_start: int = setting(3, "first looped layer")
    loop_end: int = setting(5, "last looped layer")
    enable_looping_at: float = setting(0.35, "progress at which the loops switch on")
    parallel_start_layer: int = setting(8, "first layer whose attention and MLP run side by side; 0: none")
    parallel_mode: str = setting(
        "lanes", "how: in two lanes of the decoder (#1529), or from one input, outputs added (#1493)", "lanes, gptj"
    )
    parallel_final_lane: str = setting("mean", "what the two lanes end in", "mean, attn, mlp")
    # training
    max_wallclock_seconds: float = setting(
        600.0, "training budget, calibration and quantisation included; 0: ITERATIONS decides and no clock is read"
    )
    gptq_reserve_seconds: float = setting(12.0, "part of the budget kept for calibration and quantisation")
    iterations: int = setting(20000, "most steps; with MAX_WALLCLOCK_SECONDS=0 exactly this many", POSITIVE)
    train_batch_tokens: int = setting(786432, "tokens of one step over all ranks", POSITIVE)
    micro_batch_tokens: int = setting(
        98304,
        "tokens of one forward; a step's micro-batches are dealt to the ranks, so results do not depend on their number",
        POSITIVE,
    )
    train_seq_len: int = setting(2048, "longest attention span: documents are cut there", POSITIVE)
    train_seq_schedule: str = setting("", "progressive context, LEN@END_PROGRESS,...; empty: TRAIN_SEQ_LEN throughout")
    seq_change_warmup_steps: int = setting(32, "learning-rate ramp after a change of context")
    warmup_steps: int = setting(3, "plain and looped steps each, run and undone before the clock starts")
    warmdown_frac: float = setting(0.85, "share of the budget in the linear decay of the learning rate")
    min_lr: float = setting(0.1, "floor of the learning-rate multiplier")
    train_log_every: int = setting(100, "steps between log lines", POSITIVE)
    # optimizers
    matrix_lr: float = setting(0.026, "Muon learning rate")
    scalar_lr: float = setting(0.02, "Adam learning rate of vectors, gates and scalars")
    tied_embed_lr: float = setting(0.03, "Adam learning rate of the embedding")
    muon_momentum: float = setting(0.97, "Muon momentum at the end of its warm-up", SHARE)
    muon_momentum_warmup_start: float = setting(0.92, "Muon momentum at step 0")
    muon_momentum_warmup_steps: int = setting(1500, "steps of its linear warm-up")
    muon_backend_steps: int = setting(5, "iterations that orthogonalise an update", "[1, 5]")
    muon_coefficients: str = setting(
        "polar_express",
        "of those iterations; newton_schulz: the constant ones of Muon's beginnings",
        "polar_express, newton_schulz",
    )
    muon_row_normalize: bool = setting(True, "normalise the rows of the update before orthogonalisation")
    muon_wd: float = setting(0.095, "decoupled weight decay of matrices")
    adam_wd: float = setting(0.02, "decoupled weight decay of vectors, gates and scalars")
    embed_wd: float = setting(0.085, "decoupled weight decay of the embedding")
    beta1: float = setting(0.9, "Adam beta1", SHARE)
    beta2: float = setting(0.99, "Adam beta2", SHARE)
    adam_eps: float = setting(1e-8, "Adam epsilon", POSITIVE)
    grad_clip_norm: float = setting(0.3, "norm to which the reduced gradient is clipped; 0: not clipped")
    ema_decay: float = setting(
        0.9965, "decay of the debiased average of the weights that is kept; 0: the last weights", SHARE
    )
    # training on the validation set, which FAILS condition C3
    prequant_ttt_enabled: bool = setting(
        False,
        "before quantisation AdamW on the whole validation set (#1735), in steps of GLOBAL_TTT_CHUNK_TOKENS; no val_bpb",
    )
    prequant_ttt_epochs: int = setting(21, "passes over it")
    prequant_ttt_lr: float = setting(5e-4, "learning rate of the first pass, by a cosine to a tenth of it in the last")
    prequant_ttt_freeze_blocks: int = setting(2, "first layers that stay as they are, like the embedding")
    # quantizer and artifact
    rate_distortion: bool = setting(
        True,
        "choose every quantiser step by what it costs in loss, so that the artifact just fits ARTIFACT_CAP (off: the *_CLIP_SIGMAS)",
    )
    rate_rows: float = setting(
        0.75, "power to which the rows of a matrix follow their gradients; 0: all alike", "[0, 4]"
    )
    rate_embed_rows: float = setting(
        0.5, "the same for embedding rows, most of which calibration sees seldom", "[0, 4]"
    )
    rate_columns: float = setting(
        1.0, "power to which columns follow the Hessian's Cholesky diagonal; 0: all alike", "[0, 4]"
    )
    matrix_bits: int = setting(6, "without RATE_DISTORTION: symbol range of matrices, +-(2^(bits-1) - 1)", "[2, 8]")
    embed_bits: int = setting(7, "symbol range of the embedding", "[2, 8]")
    mlp_clip_sigmas: float = setting(11.5, "MLP rows: step = this many row standard deviations over the range")
    attn_clip_sigmas: float = setting(13.0, "the same for attention rows")
    embed_clip_sigmas: float = setting(14.0, "the same for embedding rows")
    gptq_calibration_batches: int = setting(
        16, "micro-batches of training data whose activations and gradients weigh the rounding error", POSITIVE
    )
    gptq_damping: float = setting(0.01, "added to the Hessian's diagonal, as a share of its mean")
    awq_lite_enabled: bool = setting(
        False, "without RATE_DISTORTION: finer steps for the most salient groups of columns"
    )
    awq_lite_bits: int = setting(8, "symbol range of such a group", "[2, 8]")
    awq_lite_group_size: int = setting(64, "columns of a group", POSITIVE)
    awq_lite_group_top_k: int = setting(1, "groups, of all matrices")
    lqer_enabled: bool = setting(False, "correct the rounding error of some matrices by a low-rank product")
    lqer_rank: int = setting(4, "its rank", POSITIVE)
    lqer_top_k: int = setting(3, "corrected matrices: those of largest error")
    lqer_asym_group: int = setting(64, "values of the int4 factor that share a scale", POSITIVE)
    lqer_gain_select: bool = setting(
        False, "of four times as many matrices, correct those where a byte removes most error"
    )
    lqer_weight: str = setting(
        "none",
        "inputs' moments that weigh that error: none, their diagonal, or all of the hessian",
        "none, diagonal, hessian",
    )
    gated_attn_quant_gate: bool = setting(False, "store the attention gate in int8 rows instead of fp16")
    logit_calibration_enabled: bool = setting(
        False, "fit a logit scale and biases of 14 token categories on training tokens after quantisation"
    )
    artifact_cap: int = setting(16_000_000, "most bytes of train_gpt.py and model.bin together", POSITIVE)
    artifact_margin: int = setting(2_000, "bytes below ARTIFACT_CAP that the artifact may not enter")
    # scoring
    eval_seq_len: int = setting(
        2048, "longest context of a scored token; windows never cross a document's start", POSITIVE
    )
    eval_stride: int = setting(
        0, "new targets of each window after a document's first; 0: EVAL_SEQ_LEN, windows do not overlap"
    )
    val_batch_tokens: int = setting(131072, "tokens of one scoring forward on one rank")
    # test-time training
    ttt_enabled: bool = setting(True, "adapt to each document while scoring it: score a chunk, then learn from it")
    ttt_method: str = setting(
        "lora",
        "lora: adapters of each document; sgd: the base weights learn from each GLOBAL_TTT_CHUNK_TOKENS after they are scored (#549)",
        "lora, sgd",
    )
    segment_docs: int = setting(
        50000,
        "most documents of a segment; state crosses documents only between segments, and a segment waits for its longest document",
        POSITIVE,
    )
    ttt_batch_size: int = setting(64, "documents adapted together, of similar length; no score depends on it", POSITIVE)
    ttt_chunks: str = setting("8,8,16,32", "sizes of the chunks from a document's start; the last repeats")
    ttt_eval_seq_len: int = setting(3072, "longest context of a scored token", POSITIVE)
    ttt_backprop_tokens: int = setting(
        64,
        "tokens before a chunk that are run again with it, so that gradients reach back; TTT_EVAL_SEQ_LEN: the exact recompute of #1855",
    )
    ttt_mask: str = setting("", "adapter kinds switched off, of q,k,v,o,mlp,head; no_qv is q,v")
    ttt_lora_rank: int = setting(32, "rank of the adapters", POSITIVE)
    ttt_lora_alpha: float = setting(144.0, "adapters are scaled by this over their rank")
    ttt_lora_lr: float = setting(1e-4, "Adam learning rate of the adapters")
    ttt_local_lr_mult: float = setting(1.5, "factor of TTT_LORA_LR")
    ttt_beta2: float = setting(0.99, "Adam beta2 of the adapters; there is no first moment", SHARE)
    ttt_weight_decay: float = setting(0.5, "decoupled weight decay of the adapters")
    ttt_warm_start: float = setting(
        1.0, "after each segment the adapters' start moves this far to the mean of its documents' adapters; 0: never"
    )
    phased_ttt_num_phases: int = setting(8, "times the base weights learn from the scored prefix; 0: never")
    phased_ttt_prefix_docs: int = setting(2500, "documents of that prefix, in stream order")
    global_ttt_lr: float = setting(
        0.05, "SGD learning rate of the base weights, cosine to zero over a phase (TTT_METHOD=sgd: over the stream)"
    )
    global_ttt_momentum: float = setting(0.9, "SGD momentum, fresh in each phase", SHARE)
    global_ttt_epochs: int = setting(1, "passes over the prefix in each phase (TTT_METHOD=sgd: over each chunk)")
    global_ttt_chunk_tokens: int = setting(
        32768, "tokens of one SGD step over all ranks (TTT_METHOD=sgd: about; a chunk ends with a document)", POSITIVE
    )
    global_ttt_grad_clip: float = setting(1.0, "norm to which the reduced SGD gradient is clipped")
    # n-grams
    ngram_enabled: bool = setting(
        False, "let exact counts of earlier segments and of the document so far improve the scored probabilities"
    )
    ngram_order: int = setting(16, "longest n-gram, its last token included (TOKEN_ORDER of #2140)", "[2, 64]")
    ngram_min_order: int = setting(3, "shortest n-gram (#2140: 16)", "[2, 64]")
    ngram_threshold: float = setting(
        0.5, "least share of the commonest continuation (TOKEN_THRESHOLD of #2140: 0.8)", "[0, 1]"
    )
    ngram_min_count: int = setting(2, "least number of times a context was seen (#2140: 1)", "[1, inf)")
    ngram_boost: float = setting(1.0, "log-odds added to the hinted token (TOKEN_BOOST of #2140: 2.625)", "[0, 12]")
    # set by torchrun
    rank: int = setting(0, "rank of this process")
    local_rank: int = setting(0, "its GPU")
    world_size: int = setting(1, "processes", POSITIVE)

    @classmethod
    def from_env(cls, env, stored: dict | None = None, check: bool = True) -> "Config":
        """Read every setting from the mapping ``env``, else from ``stored`` (an artifact's settings), else its default; bad ones raise UserError."""
        fields = {f.name.upper(): f for f in dataclasses.fields(cls)}
        check_names(env, fields)
        values = {f.name: parse_setting(name, env[name], type(f.default)) for name, f in fields.items() if name in env}
        cfg = cls(**{**(stored or {}), **values})
        if check:
            cfg.validate()
        return cfg

    def validate(self):
        """Refuse settings that could not work, before anything is read or trained."""
        for f in dataclasses.fields(self):
            value, within = getattr(self, f.name), f.metadata["within"]
            require(
                lies_within(value, within),
                f"{f.name.upper()}={value} must be {'one of' if isinstance(value, str) else 'in'} {within}",
            )
        chunks = (
            [int(c) for c in self.ttt_chunks.split(",")]
            if re.fullmatch(r"[1-9]\d{0,8}(,[1-9]\d{0,8})*", self.ttt_chunks)
            else []
        )
        masked = set(self.ttt_mask.replace("no_qv", "q,v").split(",")) - {""}
        for name, holds, rule in (
            ("num_heads", self.model_dim % self.num_heads == 0, "must divide MODEL_DIM"),
            ("num_kv_heads", self.num_heads % self.num_kv_heads == 0, "must divide NUM_HEADS"),
            (
                "rope_dims",
                self.rope_dims % 2 == 0 and self.rope_dims <= self.model_dim // self.num_heads,
                "must be even and at most the head width",
            ),
            (
                "loop_end",
                self.num_loops == 0 or self.loop_start <= self.loop_end < self.num_layers,
                "must satisfy LOOP_START <= LOOP_END < NUM_LAYERS",
            ),
            ("gate_window", self.gate_window <= self.model_dim, "must be at most MODEL_DIM"),
            (
                "attn_out_gate_enabled",
                not (self.attn_out_gate_enabled and self.sparse_attn_gate_enabled),
                "needs SPARSE_ATTN_GATE_ENABLED=0: heads have one gate",
            ),
            ("mlp_mult", int(self.mlp_mult * self.model_dim) >= 8, "gives an MLP of fewer than 8 units"),
            ("artifact_margin", self.artifact_margin < self.artifact_cap, "must be below ARTIFACT_CAP"),
            (
                "gptq_reserve_seconds",
                self.max_wallclock_seconds == 0 or self.gptq_reserve_seconds < self.max_wallclock_seconds,
                "must be below MAX_WALLCLOCK_SECONDS",
            ),
            ("eval_stride", self.eval_stride <= self.eval_seq_len, "must be at most EVAL_SEQ_LEN"),
            ("val_batch_tokens", self.val_batch_tokens >= self.eval_seq_len, "must be at least EVAL_SEQ_LEN"),
            (
                "ttt_chunks",
                chunks and max(chunks) <= self.ttt_eval_seq_len,
                f"must be sizes like 8,8,16,32,64, none above TTT_EVAL_SEQ_LEN={self.ttt_eval_seq_len}",
            ),
            ("attn_full_layers", re.fullmatch(r"(\d+(,\d+)*)?", self.attn_full_layers), "must be layers like 2,5,10"),
            ("ngram_min_order", self.ngram_min_order <= self.ngram_order, "must be at most NGRAM_ORDER"),
            ("ttt_mask", masked <= set(ADAPTER_KINDS), f"may name no_qv and {','.join(ADAPTER_KINDS)}"),
            ("ttt_mask", masked != set(ADAPTER_KINDS), "leaves no adapter to learn; set TTT_ENABLED=0"),
        ):
            require(holds, f"{name.upper()}={getattr(self, name)} {rule}")
        context_schedule(self)

    @property
    def looped(self) -> bool:
        """Whether the finished model runs its loops: calibration, scoring and test-time training follow the end of training."""
        return self.num_loops > 0 and self.enable_looping_at < 1

    def settings(self) -> dict:
        """What decides the result: every setting but paths, modes and ranks."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in NOT_SETTINGS}

    def sha256(self) -> str:
        return hashlib.sha256(json.dumps(self.settings(), sort_keys=True).encode()).hexdigest()


NOT_SETTINGS = frozenset(
    (
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
        "train_log_every",
    )
)
# Settings of earlier versions -> the value that is fixed now.
RETIRED = {
    "ttt_grad_steps": 1,
    "ngram_mode": "tilt",
    "ngram_weight": 0.2,  # of the mixture: without effect on the tilt
    "ngram_calibrate": False,
}
OUR_PREFIXES = (
    "TRAIN_",
    "VAL_",
    "EVAL_",
    "TTT_",
    "MUON_",
    "GPTQ_",
    "LQER_",
    "AWQ_",
    "LOOP_",
    "ROPE_",
    "EMBED_",
    "MLP_",
    "ATTN_",
    "MATRIX_",
    "XSA_",
    "EMA_",
    "NGRAM_",
    "PHASED_",
    "PREQUANT_",
    "GLOBAL_TTT_",
    "PARALLEL_",
    "SMEAR_",
    "SPARSE_",
    "SKIP_",
    "RATE_",
    "GATED_",
    "LOGIT_",
    "ARTIFACT_",
    "LEDGER_",
    "WARMDOWN_",
    "MICRO_",
    "GATE_",
)


def still_set(stored: dict) -> dict:
    """An artifact's settings without those that are retired, where it had what is fixed now or its n-grams were off."""

    def without_effect(name: str) -> bool:
        idle = name.startswith("ngram_") and not stored["ngram_enabled"]
        return name in RETIRED and (idle or stored[name] == RETIRED[name])

    return {name: value for name, value in stored.items() if not without_effect(name)}


def check_names(env, fields):
    """A name with one of our prefixes that is no setting is an error; a near miss without one is a warning."""
    for name in sorted(set(env) - set(fields)):
        ours = name.startswith(OUR_PREFIXES)
        nearest = difflib.get_close_matches(name, fields, n=1, cutoff=0.5 if ours else 0.8)
        require(
            not ours,
            f"{name} is not a setting{f'; did you mean {nearest[0]}?' if nearest else ''} (--help lists them all)",
        )
        if nearest and nearest[0] not in env and len(name) > 4 and name.isupper():
            print(
                f"warning: the environment has {name}, which is not a setting; did you mean {nearest[0]}?",
                file=sys.stderr,
            )


def parse_setting(name: str, text: str, kind: type):
    """Text of an environment variable -> bool, int, float or str."""
    with explained(
        f"{name}={text!r} is not {'0 or 1' if kind is bool else 'of type ' + kind.__name__}", ValueError, KeyError
    ):
        if kind is bool:
            return {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False, "": False}[
                text.strip().lower()
            ]
        value = kind(text)
    require(kind is not float or math.isfinite(value), f"{name}={text!r} is not finite")
    return value


def context_schedule(cfg: Config) -> list[tuple[float, int]]:
    """TRAIN_SEQ_SCHEDULE as (progress at which the stage ends, attention span), in order; the last stage ends at infinity (#2014)."""
    if not cfg.train_seq_schedule:
        return [(math.inf, cfg.train_seq_len)]
    name = f"TRAIN_SEQ_SCHEDULE={cfg.train_seq_schedule!r}"
    with explained(f"{name} is not of the form 1024@0.1,2048@0.7,3072@1.0", ValueError):
        stages = sorted(
            (float(end), int(length)) for length, end in (part.split("@") for part in cfg.train_seq_schedule.split(","))
        )
    require(all(length > 0 and end > 0 for end, length in stages), f"{name}: lengths and ends must be positive")
    require(
        max(length for _, length in stages) == cfg.train_seq_len,
        f"{name}: the longest span must equal TRAIN_SEQ_LEN={cfg.train_seq_len}",
    )
    return [*stages[:-1], (math.inf, stages[-1][1])]


def help_text() -> str:
    """The table of --help."""
    lines = [
        "Settings (environment variables), their defaults, meaning and limits; a number without them is in [0, inf):"
    ]
    for f in dataclasses.fields(Config):
        shown = int(f.default) if isinstance(f.default, bool) else f.default
        limits = f"; {f.metadata['within']}" if f.metadata["within"] not in ("", "[0, inf)") else ""
        lines.append(f"  {f.name.upper():28s} {str(shown) or '(empty)':>12s}   {f.metadata['meaning']}{limits}")
    return "\n".join(lines)


# ======== Runtime: ranks, log, clock, budgets, verdicts, ledger ===============================================================================================


class Ranks:
    """The process group. On one rank every collective is a no-op, so nothing else asks how many there are."""

    def __init__(self, cfg: Config):
        self.rank, self.world, self.main = cfg.rank, cfg.world_size, cfg.rank == 0
        use_cuda = cfg.device == "cuda" or (cfg.device == "auto" and torch.cuda.is_available())
        require(
            torch.cuda.is_available() or not use_cuda,
            "DEVICE=cuda, but torch sees no GPU; set DEVICE=cpu or install a CUDA build of torch",
        )
        self.device = torch.device("cuda", cfg.local_rank) if use_cuda else torch.device("cpu")
        if use_cuda:
            torch.cuda.set_device(self.device)
        if self.world > 1:
            # torch.optim imports this, whose defaults keep the group that exists by then: gloo's threads would outlive close() and abort some exits.
            importlib.import_module("torch.distributed.nn.functional")
            # Tensors on the CPU travel over gloo, so the clock is shared without touching the GPU's queue.
            dist.init_process_group("cpu:gloo,cuda:nccl" if use_cuda else "gloo")

    def all_reduce_(self, t: Tensor) -> Tensor:
        if self.world > 1:
            dist.all_reduce(t)
        return t

    def all_reduce_flat(self, tensors: list[Tensor]) -> list[Tensor]:
        """Their sums over the ranks, through one buffer."""
        if self.world == 1:
            return tensors
        flat = self.all_reduce_(torch.cat([t.flatten() for t in tensors]))
        return [piece.view_as(t) for piece, t in zip(flat.split([t.numel() for t in tensors]), tensors)]

    def broadcast_(self, t: Tensor, source: int = 0) -> Tensor:
        if self.world > 1:
            dist.broadcast(t, source)
        return t

    def agree(self, value: float) -> float:
        """Rank 0's value, sent over the CPU group; also a barrier."""
        return self.broadcast_(torch.tensor(value, dtype=torch.float64)).item()

    def synchronize(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def close(self):
        if dist.is_initialized():
            dist.destroy_process_group()


class Log:
    """Lines to the console and, once ``open`` has been called, to a file; from rank 0 only. Flushed at once, so that a killed run keeps its log."""

    def __init__(self, ranks: Ranks):
        self.main, self.file = ranks.main, io.StringIO()

    def open(self, path: Path, mode: str):
        """Only now is an earlier log replaced: a run that fails its checks leaves it alone."""
        if self.main:
            early, self.file = self.file.getvalue(), open(path, mode, encoding="utf-8")
            self.file.write(early)

    def __call__(self, line: str = "", console: bool = True):
        if self.main:
            line = line.replace(str(Path.home()) + os.sep, "~/")  # logs are published: no private paths
            self.file.write(line + "\n")
            self.file.flush()
            if console:
                print(line, flush=True)


class Clock:
    """Seconds of training, the same on every rank: rank 0's reading, sent over the CPU group, with no drain of the GPU's queue.
    At most ``LEAD`` steps are queued on the GPU; the reading counts them at the mean time of a step, so it is when the next step will begin."""

    LEAD = 2

    def __init__(self, ranks: Ranks):
        self.ranks, self.pending, self.steps = ranks, collections.deque(), 0
        ranks.synchronize()
        ranks.agree(0)
        self.start = time.perf_counter()

    def tick(self) -> float:
        """Call before each step; returns its predicted start in seconds since construction."""
        while len(self.pending) > self.LEAD:
            self.pending.popleft().synchronize()
        while self.pending and self.pending[0].query():
            self.pending.popleft()
        now = time.perf_counter() - self.start
        done = self.steps - len(self.pending)
        return self.ranks.agree(now + len(self.pending) * (now / done if done else 0.0))

    def step_done(self):
        self.steps += 1
        if self.ranks.device.type == "cuda":
            event = torch.cuda.Event()
            event.record()
            self.pending.append(event)

    def stop(self) -> float:
        self.ranks.synchronize()
        return self.ranks.agree(time.perf_counter() - self.start)


class Phases:
    """Wall seconds by phase, and the two budgets they add up to: training data changes the model, or validation data is touched."""

    BUDGET = {
        "steps": "train",
        "calibrate": "train",
        "quantize": "train",
        "load": "eval",
        "prepare": "eval",
        "score": "eval",
        "adapt": "eval",
        "read": "eval",
        "prequant": "eval",
        "setup": None,
        "warmup": None,
        "diagnostic": None,
        "write": None,
    }

    def __init__(self, ranks: Ranks, log: Log):
        self.ranks, self.log, self.seconds = ranks, log, {}

    @contextlib.contextmanager
    def __call__(self, name: str):
        assert name in self.BUDGET, name
        start = time.perf_counter()
        yield
        self.ranks.synchronize()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def budget(self, which: str) -> float:
        return sum(s for name, s in self.seconds.items() if self.BUDGET[name] == which)


class Verdicts:
    """PASS, FAIL, DISPUTED or NOT RUN for each condition, with the reason; what only an audit can show starts as NOT RUN."""

    def __init__(self):
        self.table = dict.fromkeys(
            ("C1", "C2", "C3", "C4", "bytes", "train_budget", "eval_budget", "packaging", "data"),
            ("NOT RUN", "shown by tools/audit.py"),
        )

    def set(self, condition: str, verdict: str, reason: str):
        if self.table[condition][0] != "FAIL":
            self.table[condition] = (verdict, reason)

    def failed(self) -> list[str]:
        return [c for c, (verdict, _) in self.table.items() if verdict == "FAIL"]


class Ledger:
    """Write-once record of one scoring pass: ``nats`` of every validation target in stream order, float64 (targets,), NaN until scored.
    Writing a target twice, training on one that is not written, or closing with a hole raises: a run whose ledger does not hold is not a result."""

    ROUNDING = 1e-4  # a certain token may come out this far below zero nats: fp32 logits of up to 30

    def __init__(self, name: str, target_bytes: np.ndarray, verdicts: Verdicts):
        self.name, self.bytes, self.verdicts = name, target_bytes, verdicts
        self.nats = np.full(len(target_bytes), np.nan)
        self.merged, self.begun, self.shown = np.zeros(len(target_bytes), bool), None, None

    def check(self, holds: bool, fault: str):
        if not holds:
            raise RuntimeError(f"ledger {self.name}: {fault}")

    @property
    def scored(self) -> np.ndarray:
        return ~np.isnan(self.nats)

    def write(self, targets: np.ndarray, nats: np.ndarray):
        """targets: int64 indices; nats: float, the same length."""
        self.check(
            np.isnan(self.nats[targets]).all() and len(np.unique(targets)) == len(targets), "a target was scored twice"
        )
        self.check(
            np.isfinite(nats).all() and (nats >= -self.ROUNDING).all(),
            "a score is not finite or implies a probability above 1",
        )
        self.nats[targets] = np.maximum(nats, 0.0)

    def may_train(self, targets: np.ndarray):
        if np.isnan(self.nats[targets]).any():
            self.break_condition("C3", f"pass {self.name} trained on a target before it was scored")
            self.check(False, "training on a target that is not scored")

    def break_condition(self, condition: str, reason: str):
        """The one door for settings that break a condition: the run goes on, its number never becomes ``val_bpb``."""
        self.verdicts.set(condition, "FAIL", reason)

    def merge(self, ranks: Ranks):
        """Join what the ranks have scored since the last merge; each target must have been scored by exactly one rank."""
        fresh = self.scored & ~self.merged
        if ranks.world > 1:
            counts = ranks.all_reduce_(torch.from_numpy(fresh.astype(np.int32))).numpy()
            nats = ranks.all_reduce_(torch.from_numpy(np.where(fresh, self.nats, 0.0))).numpy()
            self.check(counts.max() <= 1 and not counts[self.merged].any(), "two ranks scored the same target")
            self.nats = np.where(counts > 0, nats, self.nats)
        self.merged = self.scored

    def progress(self, ranks: Ranks, log: Log):
        """Call before each batch: every five seconds a line says how far the pass is, if the other ranks have scored as much as this one."""
        now = time.perf_counter()
        self.begun, self.shown = self.begun or now, self.shown or now
        if now - self.shown > 5:
            self.shown, done = now, int(self.merged.sum()) + ranks.world * int((self.scored & ~self.merged).sum())
            rate, left = max(done, 1) / (now - self.begun), max(len(self.nats) - done, 0)
            log(
                f"  {100 * (1 - left / len(self.nats)):5.1f} %  BPB so far {self.partial_bpb(self.scored):.4f}  {rate:,.0f} targets/s  {left / rate:.0f} s left"
            )

    def partial_bpb(self, which: np.ndarray) -> float:
        """Bits per byte over the targets that the mask ``which`` (targets,) selects."""
        return float(self.nats[which].sum() / math.log(2) / max(self.bytes[which].sum(dtype=np.int64), 1))

    def bpb(self) -> float:
        """Bits per byte over all targets; raises if one is missing."""
        self.check(self.scored.all(), f"{np.isnan(self.nats).sum()} targets were never scored")
        return self.partial_bpb(self.scored)


@contextlib.contextmanager
def whole_file(path: Path, setting: str = "ARTIFACT_DIR"):
    """Open ``path`` for writing bytes so that it appears whole, by rename, or not at all. ``setting`` is what an error tells the user to change."""
    part = path.with_name(f"{path.name}.part{os.getpid()}")
    with explained(f"{path}: cannot be written ({{}}); free space there or set {setting} to another place", OSError):
        try:
            with open(part, "wb") as f:
                yield f
                f.flush()
                os.fsync(f.fileno())
            os.replace(part, path)
        finally:
            with contextlib.suppress(OSError):
                part.unlink()


# ======== Data: shards, packed training batches, the validation stream ========================================================================================

SHARD_MAGIC, SHARD_HEADER_BYTES = 20240520, 1024
CONTEST_SETS = {
    47_853_344: (151_080_645, 151_074_309),
    40_540_160: (151_078_222,),
}  # tokens -> bytes of the exports with CaseOps and without


def open_shard(path: Path) -> np.ndarray:
    """Memory-map the uint16 values of a shard: 256 little-endian int32 of header ([magic, 1, count, 0, ...]), then the values."""
    header = np.fromfile(path, dtype="<i4", count=256)
    require(
        len(header) == 256 and tuple(header[:2]) == (SHARD_MAGIC, 1),
        f"{path}: not a shard (wrong magic or version); make it again with prepare_data.py",
    )
    size, expected = path.stat().st_size, SHARD_HEADER_BYTES + 2 * int(header[2])
    require(
        size == expected,
        f"{path}: {size} bytes, its header promises {expected}; the file is truncated or damaged: fetch or make it again",
    )
    return np.memmap(path, dtype="<u2", mode="r", offset=SHARD_HEADER_BYTES, shape=(int(header[2]),))


def find_shards(folder: Path, pattern: str, required: bool = True) -> list[Path]:
    """Files of ``pattern`` (its * is digits) in name order; UserError where there are none and one is required."""
    paths = sorted(
        p for p in folder.glob(pattern) if re.fullmatch(pattern.replace("*", r"\d+"), p.name) and p.is_file()
    )  # val_* must not match val_bytes_*
    require(paths or not required, f"DATA_PATH={folder}: no file {pattern} there; run prepare_data.py or set DATA_PATH")
    return paths


class Seq(NamedTuple):
    """Where the sequences of a packed buffer lie. Attention is causal inside a sequence, whose last query and last key
    are the same token."""

    cu_q: Tensor  # int32 (sequences + 1,): where the queries of each sequence begin, then where the last one ends
    cu_k: Tensor  # int32 (sequences + 1,): the same for its keys; the same tensor unless a cache is read
    max_q: int  # no sequence has more queries
    max_k: int  # no sequence has more keys
    positions: Tensor  # int32 (tokens,): offset in the document; 0 means that no previous token may be seen

    @classmethod
    def packed(cls, starts: np.ndarray, span: int, longest: int, capacity: int) -> "Seq":
        """Documents that begin at `starts` (starts[0] == 0) and fill a buffer of `capacity` tokens, on the CPU.

        Each document is cut every `span` tokens; `longest` is the longest span of the run. Positions count from the
        document's start, not from the cut.
        """
        lengths = np.diff(np.append(starts, capacity))
        pieces = -(-lengths // span)  # of each document
        first = np.cumsum(pieces) - pieces  # the first piece of each document, among all pieces of the buffer
        number = np.arange(pieces.sum()) - np.repeat(first, pieces)  # of each piece in its document: 0, 1, ...
        cuts = np.repeat(starts, pieces) + number * span
        ends = np.append(cuts, capacity)
        cu = torch.from_numpy(ends.astype(np.int32))
        positions = np.arange(capacity) - np.repeat(starts, lengths)
        positions = torch.from_numpy(positions.astype(np.int32))
        return cls(cu, cu, longest, longest, positions)

    @classmethod
    def lockstep(
        cls,
        begin: Tensor,  # int64 (): position at which the chunk of every row begins
        positions: Tensor,  # int64 (back + count,): of the tokens that every row runs
        rows: int,  # documents, all at the same place
        older: int,  # cached keys of each row, before the tokens that it runs
        back: int,  # tokens before the chunk that are run again
    ) -> "Seq":
        """Rows of equal length for test-time training: each row runs its tokens and reads cached keys before them.

        What would lie before position 0 is BOS, in a sequence of its own that no token of the document sees. So every
        size is static, and how much lies outside is read from `begin` on the device. A row with older = 2, back = 4,
        count = 3 and begin = 3 holds the sequences ^^^ and 012345:

            keys      ^ ^ ^ 0 1 2 3 4 5        older + back - begin = 3 keys lie outside the document,
            queries       ^ 0 1 2 3 4 5        back - begin = 1 query does
        """
        row = torch.arange(rows, dtype=torch.int32, device=begin.device)[:, None]

        def offsets(before: int, length: int) -> Tensor:
            """Where the two sequences of each row begin; `before` of its `length` tokens stand before the chunk."""
            outside = (before - begin).clamp(min=0).int()
            in_row = torch.stack((torch.zeros_like(outside), outside))
            starts = row * length + in_row
            return F.pad(starts.flatten(), (0, 1), value=rows * length)

        queries = len(positions)
        keys = older + queries
        cu_q = offsets(back, queries)
        cu_k = offsets(older + back, keys)
        return cls(cu_q, cu_k, queries, keys, positions.int().repeat(rows))


class Batch(NamedTuple):
    """One packed buffer and where it comes from."""

    tokens: Tensor  # int64 (tokens,)
    targets: Tensor  # int64 (tokens,): -1 where padded
    seq: Seq
    split: str  # "train" or "val"


def pack_documents(
    inputs: np.ndarray,  # (tokens,)
    targets: np.ndarray,  # (tokens,): what follows each input
    starts: np.ndarray,  # where documents begin; starts[0] == 0
    span: int,  # documents are cut every so many tokens
    longest: int,  # the longest span of the run
    capacity: int,  # tokens of the buffer, at least those given
    split: str,
) -> Batch:
    """Documents -> one CPU batch, padded to `capacity`.

    Padding is a document of its own: it attends to itself, so it is never NaN, no other token sees it, and its
    targets are -1, so it is never scored.
    """

    def padded(values: np.ndarray, fill: int) -> Tensor:
        buffer = np.full(capacity, fill, np.int64)
        buffer[: len(values)] = values
        return torch.from_numpy(buffer)

    if len(inputs) < capacity:
        starts = np.append(starts, len(inputs))
    seq = Seq.packed(starts, span, longest, capacity)
    return Batch(padded(inputs, 0), padded(targets, -1), seq, split)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Copy without waiting."""

    def move(t: Tensor) -> Tensor:
        if device.type == "cpu":
            return t
        return t.pin_memory().to(device, non_blocking=True)

    cu = move(batch.seq.cu_q)  # of queries and keys: without a cache both lie alike
    positions = move(batch.seq.positions)
    return batch._replace(
        tokens=move(batch.tokens),
        targets=move(batch.targets),
        seq=batch.seq._replace(cu_q=cu, cu_k=cu, positions=positions),
    )


def check_tokens(path: Path, tokens: np.ndarray, cfg: Config, from_start: bool = False):
    """Every token is in the vocabulary; the first is BOS where the tokens are a stream ``from_start``."""
    if from_start:
        require(
            list(tokens[:1]) == [cfg.bos_id],
            f"{path}: the first token is {tokens[:1]}, not BOS_ID={cfg.bos_id}; prepare the data again",
        )
    highest = tokens.max(initial=0)
    require(
        highest < cfg.vocab_size,
        f"{path}: token {highest} is outside VOCAB_SIZE={cfg.vocab_size}; set VOCAB_SIZE or use shards of the right tokenizer",
    )


class TrainStream:
    """The training tokens as one endless stream over all shards in name order. Step s reads the same tokens at any world size."""

    def __init__(self, cfg: Config):
        self.cfg = cfg
        self.paths = find_shards(Path(cfg.data_path), "fineweb_train_*.bin")
        self.shards = [open_shard(p) for p in self.paths]
        self.ends = np.cumsum([len(s) for s in self.shards])
        self.tokens = int(self.ends[-1])
        require(
            self.tokens > cfg.micro_batch_tokens,
            f"DATA_PATH={cfg.data_path}: {self.tokens} training tokens are fewer than one micro-batch; "
            "lower MICRO_BATCH_TOKENS or prepare more documents",
        )
        for i, (path, shard) in enumerate(zip(self.paths, self.shards)):  # the whole shard is checked as it is read
            check_tokens(path, shard[: 1 << 20], cfg, from_start=i == 0)

    def read(self, start: int, count: int) -> np.ndarray:
        """``count`` tokens from position ``start`` of the endless stream, int64."""
        pieces = []
        while count:
            start %= self.tokens
            i = int(np.searchsorted(self.ends, start, side="right"))
            offset = start - (int(self.ends[i]) - len(self.shards[i]))
            pieces.append(self.shards[i][offset : offset + count].astype(np.int64))
            check_tokens(self.paths[i], pieces[-1], self.cfg)
            start, count = start + len(pieces[-1]), count - len(pieces[-1])
        return np.concatenate(pieces)

    def micro_batch(self, start: int, count: int, span: int) -> Batch:
        """Inputs [start, start + count) and their targets; a document already running at ``start`` begins anew there."""
        tokens = self.read(start, count + 1)
        starts = np.flatnonzero(tokens[:-1] == self.cfg.bos_id)
        if not len(starts) or starts[0] != 0:
            starts = np.insert(starts, 0, 0)
        capacity = self.cfg.micro_batch_tokens
        return pack_documents(tokens[:-1], tokens[1:], starts, span, self.cfg.train_seq_len, capacity, "train")

    def step(self, step: int, span: int, rank: int, world: int) -> list[Batch]:
        """This rank's micro-batches of a step: the global batch cut every MICRO_BATCH_TOKENS, dealt to the ranks in turn."""
        total, micro = self.cfg.train_batch_tokens, self.cfg.micro_batch_tokens
        return [
            self.micro_batch(step * total + at, min(micro, total - at), span)
            for at in range(rank * micro, total, world * micro)
        ]


class Prefetch:
    """Builds the next step's batches in a thread; a change of span only costs the one batch that was built for the old one."""

    def __init__(self, stream: TrainStream, ranks: Ranks):
        pool, self.device, self.waiting = ThreadPoolExecutor(1), ranks.device, {}
        self.submit = lambda step, span: pool.submit(stream.step, step, span, ranks.rank, ranks.world)

    def __call__(self, step: int, span: int) -> list[Batch]:
        future = self.waiting.pop((step, span), None) or self.submit(step, span)
        self.waiting = {(step + 1, span): self.submit(step + 1, span)}
        return [to_device(b, self.device) for b in future.result()]


class ValidationStream:
    """The validation tokens, the original bytes of each, and the documents they form."""

    def __init__(self, cfg: Config):
        folder = Path(cfg.data_path)
        self.tokens = np.concatenate([open_shard(p) for p in find_shards(folder, "fineweb_val_*.bin")])
        check_tokens(folder / "fineweb_val_*.bin", self.tokens, cfg, from_start=True)
        self.starts = np.flatnonzero(self.tokens == cfg.bos_id)
        self.targets = len(self.tokens) - 1
        self.lengths = np.diff(
            np.append(self.starts, self.targets)
        )  # inputs of each document; its last target is the next one's BOS
        sidecars = find_shards(folder, "fineweb_val_bytes_*.bin", required=False)
        self.byte_source = "sidecar" if sidecars else "tokenizer"
        self.bytes = (
            np.concatenate([open_shard(p) for p in sidecars]) if sidecars else tokenizer_bytes(cfg, self.tokens)
        )
        require(
            len(self.bytes) == len(self.tokens),
            f"{folder}: the byte sidecar has {len(self.bytes)} entries for {len(self.tokens)} tokens; prepare both in one go",
        )
        require(
            not sidecars or self.bytes.any(),
            f"{folder}/fineweb_val_bytes_*.bin: the byte sidecar holds only zeros; prepare the data again",
        )
        require(
            not self.bytes[self.starts].any(),
            f"{folder}: the byte sidecar counts bytes for BOS; prepare the data again",
        )

    @property
    def target_bytes(self) -> np.ndarray:
        """Bytes of target i, the token at i + 1."""
        return self.bytes[1:]


def tokenizer_path(cfg: Config) -> Path:
    """TOKENIZER_PATH, or tokenizer.model beside the shards; UserError where there is no such file."""
    path = Path(cfg.tokenizer_path) if cfg.tokenizer_path else Path(cfg.data_path) / "tokenizer.model"
    require(path.is_file(), f"TOKENIZER_PATH={path}: no such file")
    return path


def tokenizer_bytes(cfg: Config, tokens: np.ndarray) -> np.ndarray:
    """Bytes per token from the piece table, for plain tokenizers without a sidecar: control 0, byte fallback 1, a space for each \u2581.
    A tokenizer that puts a space before every document (add_dummy_prefix) is not paid for it."""
    import sentencepiece

    path = tokenizer_path(cfg)
    with explained(f"TOKENIZER_PATH={path}: not a SentencePiece model, or a damaged one", RuntimeError, OSError):
        sp = sentencepiece.SentencePieceProcessor(model_file=str(path))
    require(
        sp.vocab_size() == cfg.vocab_size,
        f"TOKENIZER_PATH={path}: {sp.vocab_size()} pieces, VOCAB_SIZE={cfg.vocab_size}",
    )
    require(
        not any(sp.id_to_piece(i) in "\ue001\ue002\ue003\ue004" for i in range(8)),
        f"DATA_PATH={cfg.data_path}: a CaseOps tokenizer needs the byte sidecar fineweb_val_bytes_*.bin; prepare the data again",
    )
    special = np.array([sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i) for i in range(cfg.vocab_size)])
    texts = ["" if special[i] else sp.id_to_piece(i).replace("\u2581", " ") for i in range(cfg.vocab_size)]
    table = np.array([1 if sp.is_byte(i) else len(text.encode()) for i, text in enumerate(texts)], np.uint16)
    counts = table[tokens]
    if sp.encode("a", out_type=str)[0].startswith("\u2581"):
        spaced = np.array([text.startswith(" ") for text in texts])
        counts -= np.concatenate([[True], special[tokens[:-1]]]) & spaced[tokens]
    return counts


def describe_data(cfg: Config, val: ValidationStream) -> dict:
    """Fingerprint of the validation set. All must be as manifest.json says, where there is one: counts, vocabulary, BOS; tokenizer and validation files by hash."""
    have = {"tokens": len(val.tokens), "documents": len(val.starts), "bytes": int(val.bytes.sum(dtype=np.int64))}
    contest = have["bytes"] in CONTEST_SETS.get(len(val.tokens), ()) and len(val.starts) == 50_000
    manifest, sha256 = Path(cfg.data_path) / "manifest.json", lambda data: hashlib.sha256(data).hexdigest()
    found = {
        "val_tokens": len(val.tokens),
        "val_targets": val.targets,
        "val_documents": len(val.starts),
        "val_bytes": have["bytes"],
        "byte_source": val.byte_source,
        "val_sha256": sha256(np.ascontiguousarray(val.tokens)),
        "dataset": "contest" if contest else "other",
        "manifest": manifest.is_file(),
    }
    if not found["manifest"]:
        return found
    with explained(
        f"{manifest}: damaged, or not written by prepare_data.py; prepare the data again",
        ValueError,
        KeyError,
        TypeError,
    ):
        promised = json.loads(manifest.read_text())
        for key, count in have.items():
            require(
                promised["val"][key] in (None, count),
                f"{manifest}: promises {promised['val'][key]} validation {key}, the shards hold {count}; prepare the data again",
            )
        for name, file in promised["files"].items():
            path = manifest.parent / name
            require(path.is_file(), f"{path}: promised by {manifest.name}, not there; prepare the data again")
            intact = (
                len(open_shard(path)) == file["tokens"]
                if "train" in name
                else sha256(path.read_bytes()) == file["sha256"]
            )
            require(intact, f"{path}: not the file that {manifest.name} describes; fetch or prepare it again")
        for key in ("vocab_size", "bos_id"):
            require(
                promised[key] == getattr(cfg, key),
                f"{manifest}: the shards have {key.upper()}={promised[key]}, the setting is {getattr(cfg, key)}",
            )
        model, made_by = tokenizer_path(cfg), promised["tokenizer"]["sha256"]
        require(
            sha256(model.read_bytes()) == made_by,
            f"TOKENIZER_PATH={model}: not the tokenizer that made these shards ({manifest})",
        )
        return found | {"transform": promised["transform"], "tokenizer_sha256": made_by}


# ======== Kernels: each Triton kernel stands below its plain PyTorch reference; every public function picks one of the two ====================================
# Training runs eagerly: these kernels and cuBLAS are all that a step launches on (tokens, channels), and nothing is compiled but they.

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor

    INTERPRET = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1: the kernels run on the CPU, for tests
except ImportError:  # without Triton only the references exist
    triton, tl, INTERPRET = (
        SimpleNamespace(jit=lambda fn=None, **_: fn or (lambda f: f)),
        SimpleNamespace(constexpr=int),
        None,
    )
HEAD_TILE = 1024  # elements of heads per program of 4 warps
STREAM_ROWS, STREAM_PROGRAMS = 4, 4  # rows of d elements per tile of 4 warps, programs per multiprocessor
MLP_TILES = {
    "forward": (128, 128, 64, 8, 3, 2),
    "backward": (128, 128, 32, 4, 5, 2),
}  # BLOCK_M, _N, _K, warps, stages, programs per multiprocessor


@functools.cache
def processors(device: torch.device, least: int = 8) -> int:
    """Multiprocessors of a GPU of compute capability ``least`` (8: Ampere, 9: Hopper) or more; 2 where Triton interprets; 0 where kernels cannot run."""
    if INTERPRET:
        return 2
    properties = torch.cuda.get_device_properties(device) if INTERPRET is not None and device.type == "cuda" else None
    return properties.multi_processor_count if properties and properties.major >= least else 0


def use_kernels(dtype: torch.dtype, device: torch.device, width: int = 16, least: int = 8) -> bool:
    """Whether activations of that dtype can go through the Triton kernels; ``width``, of a head or of the stream, must be a power of two."""
    return dtype == torch.bfloat16 and width & (width - 1) == 0 and processors(device, least) > 0


def empty_like(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Contiguous tensors of the same shapes, unset."""
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors)


# --- MLP: down(leaky_relu(up(x))^2) ---
def mlp_reference(x: Tensor, w_up: Tensor, w_down: Tensor, slope: float) -> tuple[Tensor, Tensor]:
    """mlp() in plain PyTorch."""
    hidden = F.leaky_relu(F.linear(x, w_up), slope).square()
    return F.linear(hidden, w_down), hidden.detach()


@triton.jit
def hidden_words(p0, p1, slope):
    """Pairs of fp32 pre-activations -> pairs of bf16 leaky_relu(p)^2 in one int32, the sign of p in each least significant bit.
    Of the bf16 numbers with the wanted last bit the nearest is taken: at most one unit in the last place off, without bias."""
    l0, l1 = tl.maximum(p0, slope * p0), tl.maximum(p1, slope * p1)
    h0, h1 = (l0 * l0).to(tl.int32, bitcast=True), (l1 * l1).to(tl.int32, bitcast=True)
    s0, s1 = p0.to(tl.int32, bitcast=True), p1.to(tl.int32, bitcast=True)
    high = ((h0 >> 16) & 0xFFFF) | (h1 & -65536)  # both upper halves: the squares cut to bf16
    sign = ((((s0 >> 16) & 0xFFFF) | (s1 & -65536)) >> 15) & 0x00010001
    return ((high + 0x00010001 - sign) & -65538) | sign  # -65538 clears both last bits


@triton.jit(do_not_specialize=["T"])
def mlp_gemm_kernel(
    a_desc,
    b_desc,
    hidden_desc,
    d_pre_desc,
    slope,
    T,
    N: tl.constexpr,
    K: tl.constexpr,
    BACKWARD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Forward: hidden = leaky_relu(a @ b.T)^2, b (N, K). Backward: d_pre = (a @ b) * d hidden / d pre, b (K, N). hidden as int32 pairs.
    Persistent: the next tile's loads are under way during an epilogue, which works on two halves to leave them shared memory. 0 <= slope <= 1."""
    tiles_n: tl.constexpr = N // BLOCK_N
    HALF: tl.constexpr = BLOCK_N // 2
    for tile in tl.range(tl.program_id(0), tl.cdiv(T, BLOCK_M) * tiles_n, tl.num_programs(0), flatten=True):
        m, n = (tile // tiles_n) * BLOCK_M, (tile % tiles_n) * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, K, BLOCK_K):
            a = a_desc.load([m, k])
            if BACKWARD:
                acc = tl.dot(a, b_desc.load([k, n]), acc)
            else:
                acc = tl.dot(a, b_desc.load([n, k]).T, acc)
        halves = acc.reshape(BLOCK_M, 2, HALF).permute(0, 2, 1).split()
        for i in tl.static_range(2):
            p0, p1 = halves[i].reshape(BLOCK_M, HALF // 2, 2).split()  # neighbours sit in one thread: no data moves
            at = n + i * HALF
            if BACKWARD:
                word = hidden_desc.load([m, at // 2])
                d0 = (
                    p0 * tl.sqrt((word << 16).to(tl.float32, bitcast=True)) * tl.where((word & 1) != 0, -2 * slope, 2.0)
                )
                d1 = (
                    p1
                    * tl.sqrt((word & -65536).to(tl.float32, bitcast=True))
                    * tl.where((word & 0x10000) != 0, -2 * slope, 2.0)
                )
                d_pre_desc.store([m, at], tl.join(d0, d1).reshape(BLOCK_M, HALF).to(tl.bfloat16))
            else:
                hidden_desc.store([m, at // 2], hidden_words(p0, p1, slope))


def mlp_gemm(a: Tensor, b: Tensor, hidden: Tensor, d_pre: Tensor | None, slope: float, tile: tuple | None = None):
    """Launch: fills hidden (d_pre None) or d_pre. a (T, K), hidden and d_pre (T, N), all bf16 and contiguous."""
    backward = d_pre is not None
    (T, K), N = a.shape, hidden.size(1)
    bm, bn, bk, warps, stages, per_sm = tile or MLP_TILES["backward" if backward else "forward"]
    bn, bk = min(bn, N & -N), min(bk, K & -K)  # every model width has a tile, if not a fast one
    programs = min(processors(a.device) * per_sm, triton.cdiv(T, bm) * (N // bn))
    desc = TensorDescriptor.from_tensor
    words = desc(hidden.view(torch.int32), [bm, bn // 4])
    mlp_gemm_kernel[(programs,)](
        desc(a, [bm, bk]),
        desc(b, [bk, bn] if backward else [bn, bk]),
        words,
        desc(d_pre, [bm, bn // 2]) if backward else words,
        slope,
        T,
        N,
        K,
        backward,
        bm,
        bn,
        bk,
        num_warps=warps,
        num_stages=stages,
    )


class MLP(torch.autograd.Function):
    """mlp() through the fused products and cuBLAS; bf16."""

    @staticmethod
    def forward(ctx, x, w_up, w_down, slope):
        x, w_up, w_down = x.contiguous(), w_up.contiguous(), w_down.contiguous()
        hidden = x.new_empty(len(x), len(w_up))
        mlp_gemm(x, w_up, hidden, None, slope)
        ctx.save_for_backward(x, w_up, w_down, hidden)
        ctx.mark_non_differentiable(hidden)
        ctx.set_materialize_grads(False)  # else hidden's would be 0.4 GB of zeros
        ctx.slope = slope
        return F.linear(hidden, w_down), hidden

    @staticmethod
    def backward(ctx, d_out, _):
        x, w_up, w_down, hidden = ctx.saved_tensors
        need_x, need_up, need_down, _ = ctx.needs_input_grad  # test-time training freezes the weights
        if need_x or need_up:  # d(pre-activation): d_out @ w_down times the slope that hidden remembers
            d_pre = torch.empty_like(hidden)
            mlp_gemm(d_out.contiguous(), w_down, hidden, d_pre, ctx.slope)
        return (
            d_pre @ w_up if need_x else None,
            d_pre.T @ x if need_up else None,
            d_out.T @ hidden if need_down else None,
            None,
        )


def mlp(x: Tensor, w_up: Tensor, w_down: Tensor, slope: float) -> tuple[Tensor, Tensor]:
    """x (T, d), w_up (h, d), w_down (d, h), all of one dtype -> out (T, d), hidden (T, h); hidden is for observers and has no gradient.
    The kernel keeps one tensor for backward, hidden, instead of hidden and pre-activation: 0.4 GB less per layer of 98,304 tokens."""
    fits = w_up.size(0) % 64 == 0 and w_up.size(1) % 16 == 0  # a tile's least sides
    return (MLP.apply if fits and use_kernels(x.dtype, x.device, least=9) else mlp_reference)(
        x, w_up, w_down, slope
    )  # TMA, wgmma


# --- Cross-entropy of softcapped logits ---
def softcap(z: Tensor, caps: Tensor) -> Tensor:
    """z -> caps[0] tanh(z / caps[0]) where positive, caps[1] tanh(z / caps[1]) elsewhere (#1923), fp32."""
    z = z.float()
    return torch.where(z > 0, caps[0] * torch.tanh(z / caps[0]), caps[1] * torch.tanh(z / caps[1]))


def softcap_nll_reference(z: Tensor, targets: Tensor, caps: Tensor) -> tuple[Tensor, Tensor]:
    """softcap_nll() in plain PyTorch."""
    logits = softcap(z, caps)
    lse = logits.logsumexp(-1)
    return lse - logits.gather(1, targets[:, None])[:, 0], lse.detach()


@triton.jit
def tanh_of(doubled):
    """tanh(x) = 1 - 1 / (2^(doubled - 1) + 1/2) from doubled = 2 x log2(e), to 3e-7; rsqrt(y)^2 is 1/y without the range checks of a division."""
    r = tl.rsqrt(tl.exp2(doubled - 1.0) + 0.5)
    return 1.0 - r * r


@triton.jit
def softcap_nll_kernel(
    z_ptr, target_ptr, cap_ptr, row_grad_ptr, nll_ptr, lse_ptr, dz_ptr, d_cap_ptr, V: tl.constexpr, BLOCK: tl.constexpr
):
    """One row of logits per program, held in registers: z is read once and dz (if dz_ptr; may be z itself) written once.
    No running maximum: a logit is at most its cap, and exp(cap) fits fp32 up to caps of 80."""
    LOG2E: tl.constexpr = 1.4426950408889634
    row = tl.program_id(0).to(tl.int64)
    cap_p, cap_n, target = tl.load(cap_ptr), tl.load(cap_ptr + 1), tl.load(target_ptr + row).to(tl.int32)
    doubled_p, doubled_n, log2_p, log2_n = 2 * LOG2E / cap_p, 2 * LOG2E / cap_n, cap_p * LOG2E, cap_n * LOG2E
    z_target = tl.load(z_ptr + row * V + target).to(tl.float32)
    logit_target = tl.where(z_target > 0, cap_p, cap_n) * tanh_of(
        z_target * tl.where(z_target > 0, doubled_p, doubled_n)
    )
    cols = tl.arange(0, BLOCK)
    z = tl.load(z_ptr + row * V + cols, mask=cols < V, other=0.0).to(tl.float32)
    t = tanh_of(z * tl.where(z > 0, doubled_p, doubled_n))
    e = tl.exp2(t * tl.where(z > 0, log2_p, log2_n))
    if V != BLOCK:
        e = tl.where(cols < V, e, 0.0)
    total = tl.sum(e, 0)
    lse = tl.log(total)
    tl.store(nll_ptr + row, lse - logit_target)
    tl.store(lse_ptr + row, lse)
    if dz_ptr is not None:
        scale = 1.0 if row_grad_ptr is None else tl.load(row_grad_ptr + row)
        d_logit = e * (scale / total) - tl.where(cols == target, scale, 0.0)
        slope = 1.0 - t * t
        tl.store(dz_ptr + row * V + cols, (d_logit * slope).to(dz_ptr.dtype.element_ty), mask=cols < V)
        if d_cap_ptr is not None:
            d_cap = d_logit * (t - z * tl.where(z > 0, 1.0 / cap_p, 1.0 / cap_n) * slope)
            tl.store(d_cap_ptr + 2 * row, tl.sum(tl.where(z > 0, d_cap, 0.0), 0))
            tl.store(d_cap_ptr + 2 * row + 1, tl.sum(tl.where(z > 0, 0.0, d_cap), 0))


def launch_softcap_nll(
    z: Tensor,
    targets: Tensor,
    caps: Tensor,
    row_grad: Tensor | None = None,
    dz: Tensor | None = None,
    want_caps: bool = False,
):
    """-> nll (T,), lse (T,), gradient of each row by the caps (T, 2) or (0, 2); fills dz if given. z (T, V) contiguous."""
    T, V = z.shape
    nll, lse = (torch.empty(T, dtype=torch.float32, device=z.device) for _ in range(2))
    d_caps = torch.empty(T if want_caps else 0, 2, dtype=torch.float32, device=z.device)
    block = triton.next_power_of_2(V)
    softcap_nll_kernel[(T,)](
        z,
        targets,
        caps,
        row_grad,
        nll,
        lse,
        dz,
        d_caps if want_caps else None,
        V,
        block,
        num_warps=min(32, max(1, block // 1024)),
    )
    return nll, lse, d_caps


class SoftcapNLL(torch.autograd.Function):
    """softcap_nll() through the kernel."""

    @staticmethod
    def forward(ctx, z, targets, caps):
        z = z.contiguous()
        nll, lse, _ = launch_softcap_nll(z, targets, caps)
        ctx.save_for_backward(z, targets, caps)
        ctx.mark_non_differentiable(lse)
        return nll, lse

    @staticmethod
    def backward(ctx, d_nll, _):
        z, targets, caps = ctx.saved_tensors
        dz = torch.empty_like(z)
        d_caps = launch_softcap_nll(z, targets, caps, d_nll.float().contiguous(), dz, ctx.needs_input_grad[2])[2]
        return dz, None, d_caps.sum(0) if ctx.needs_input_grad[2] else None


def softcap_nll(z: Tensor, targets: Tensor, caps: Tensor) -> tuple[Tensor, Tensor]:
    """z (T, V) before the softcap, targets (T,) int64, caps (2,) fp32 (positive, negative) -> nats (T,), log-sum-exp (T,), both fp32.
    Gradients reach z and caps through the nats; the log-sum-exp has none."""
    return (SoftcapNLL.apply if use_kernels(z.dtype, z.device) else softcap_nll_reference)(z, targets, caps)


class HeadLoss(torch.autograd.Function):
    """head_loss() whose logits are overwritten by the loss's gradient in the forward pass."""

    @staticmethod
    def forward(ctx, x, w, targets, caps, weight):
        z = F.linear(x, w)
        nll, _, d_caps = launch_softcap_nll(z, targets, caps, weight, z, ctx.needs_input_grad[3])
        ctx.save_for_backward(x, w, z, d_caps)
        return torch.dot(nll, weight)

    @staticmethod
    def backward(ctx, d_loss):
        x, w, dz, d_caps = ctx.saved_tensors
        need_x, need_w, _, need_caps, _ = (
            ctx.needs_input_grad
        )  # a scalar commutes with the products: it multiplies what is small
        return (
            dz @ (w * d_loss) if need_x else None,
            (dz.T @ x) * d_loss if need_w else None,
            None,
            d_caps.sum(0) * d_loss if need_caps else None,
            None,
        )


def head_loss(x: Tensor, w: Tensor, targets: Tensor, caps: Tensor, weight: Tensor) -> Tensor:
    """Sum over the rows of weight (T,) fp32 times softcap_nll of x (T, d) @ w (V, d).T; a scalar, for training. The logits cross memory twice (1 read,
    1 write) instead of 3 times, and one (T, V) buffer lives instead of two (1.6 GB each at T = 98,304)."""
    differentiable = torch.is_grad_enabled() and (x.requires_grad or w.requires_grad or caps.requires_grad)
    if use_kernels(x.dtype, x.device) and differentiable:
        return HeadLoss.apply(x, w, targets, caps, weight)
    return torch.dot(softcap_nll(F.linear(x, w), targets, caps)[0], weight)


# --- Heads of a packed QKV product: RMSNorm of q and k, partial RoPE, gain of q ---
def qkv_heads_reference(
    qkv: Tensor, gain: Tensor, cos: Tensor, sin: Tensor, kv_heads: int, copies: int, eps: float
) -> tuple[Tensor, ...]:
    """qkv_heads() in plain PyTorch."""
    H, n, cos, sin = gain.numel(), cos.size(1), cos[:, None], sin[:, None]
    heads = qkv.unflatten(1, (H + 2 * kv_heads, -1))
    x = F.rms_norm(heads[:, : H + kv_heads].float(), heads.shape[2:], eps=eps)
    a, b, rest = x[..., :n], x[..., n : 2 * n], x[..., 2 * n :]
    q, k = torch.cat((a * cos + b * sin, b * cos - a * sin, rest), dim=-1).split((H, kv_heads), dim=1)
    v = heads[:, -kv_heads:]
    return (
        (q * gain[:, None]).to(qkv.dtype),
        k.to(qkv.dtype).repeat_interleave(copies, 1),
        v.repeat_interleave(copies, 1),
        v,
    )


@triton.jit
def store_turned(out_ptr, x, a, b, cos, sin, ok, D: tl.constexpr, N: tl.constexpr):
    """Store rows x (BLOCK, D) with a, b (BLOCK, N), turned by an angle, in place of their first 2N columns."""
    at, i = tl.arange(0, D)[None, :], tl.arange(0, N)[None, :]
    tl.store(out_ptr + at, x.to(out_ptr.dtype.element_ty), mask=ok & (at >= 2 * N))
    tl.store(out_ptr + i, (a * cos + b * sin).to(out_ptr.dtype.element_ty), mask=ok)
    tl.store(out_ptr + N + i, (b * cos - a * sin).to(out_ptr.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["T"])
def qkv_heads_kernel(
    qkv_ptr,
    gain_ptr,
    cos_ptr,
    sin_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    rstd_ptr,
    T,
    eps,
    H: tl.constexpr,
    KV: tl.constexpr,
    COPIES: tl.constexpr,
    D: tl.constexpr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One head, of q, k or v, of BLOCK tokens: normed, rotated and scaled rows, the 1 / rms of each kept for backward; v as it is."""
    head, row = (
        tl.program_id(0) % (H + 2 * KV),
        (tl.program_id(0) // (H + 2 * KV) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64),
    )
    token, at, i = row[:, None], tl.arange(0, D)[None, :], tl.arange(0, N)[None, :]
    ok = token < T
    x_ptr = qkv_ptr + (token * (H + 2 * KV) + head) * D
    x = tl.load(x_ptr + at, mask=ok, other=0.0)
    if head >= H + KV:
        for c in tl.static_range(COPIES):
            tl.store(v_ptr + ((token * KV + head - H - KV) * COPIES + c) * D + at, x, mask=ok)
    else:
        wide = x.to(tl.float32)
        rstd = tl.rsqrt(tl.sum(wide * wide, 1) / D + eps)
        tl.store(rstd_ptr + row * (H + KV) + head, rstd, mask=row < T)
        scale = rstd[:, None] * (tl.load(gain_ptr + head) if head < H else 1.0)
        a, b = (
            tl.load(x_ptr + i, mask=ok, other=0.0) * scale,
            tl.load(x_ptr + N + i, mask=ok, other=0.0) * scale,
        )  # L1 hits
        cos, sin = (
            tl.load(cos_ptr + token * N + i, mask=ok, other=0.0),
            tl.load(sin_ptr + token * N + i, mask=ok, other=0.0),
        )
        if head < H:
            store_turned(q_ptr + (token * H + head) * D, wide * scale, a, b, cos, sin, ok, D, N)
        else:
            for c in tl.static_range(COPIES):
                store_turned(k_ptr + ((token * KV + head - H) * COPIES + c) * D, wide * scale, a, b, cos, sin, ok, D, N)


@triton.jit
def load_sum(ptr, at, mask, COPIES: tl.constexpr, STRIDE: tl.constexpr):
    """The sum of COPIES tiles, STRIDE elements apart, fp32."""
    total = tl.load(ptr + at, mask=mask, other=0.0).to(tl.float32)
    for i in tl.static_range(1, COPIES):
        total += tl.load(ptr + i * STRIDE + at, mask=mask, other=0.0).to(tl.float32)
    return total


@triton.jit(do_not_specialize=["T"])
def qkv_heads_gradient_kernel(
    dq_ptr,
    dk_ptr,
    dv_ptr,
    d_own_ptr,
    q_ptr,
    k_ptr,
    gain_ptr,
    cos_ptr,
    sin_ptr,
    rstd_ptr,
    d_qkv_ptr,
    d_gain_ptr,
    T,
    H: tl.constexpr,
    KV: tl.constexpr,
    COPIES: tl.constexpr,
    D: tl.constexpr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One head of d(qkv), of q, k or v, of BLOCK tokens. The normed vectors come from q and k as attention saved them: q / gain, unrotated."""
    head, row = (
        tl.program_id(0) % (H + 2 * KV),
        (tl.program_id(0) // (H + 2 * KV) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64),
    )
    token, at, i = row[:, None], tl.arange(0, D)[None, :], tl.arange(0, N)[None, :]
    ok = token < T
    dx_ptr = d_qkv_ptr + (token * (H + 2 * KV) + head) * D
    if head >= H + KV:
        own = (token * KV + head - H - KV) * D
        dv = load_sum(dv_ptr + own * COPIES, at, ok, COPIES, D) + tl.load(d_own_ptr + own + at, mask=ok, other=0.0)
        tl.store(dx_ptr + at, dv.to(dx_ptr.dtype.element_ty), mask=ok)
    else:
        rstd = tl.load(rstd_ptr + row * (H + KV) + head, mask=row < T, other=0.0)
        cos, sin = (
            tl.load(cos_ptr + token * N + i, mask=ok, other=0.0),
            tl.load(sin_ptr + token * N + i, mask=ok, other=0.0),
        )
        if head < H:
            gain, y_ptr, dy_ptr = (
                tl.load(gain_ptr + head),
                q_ptr + (token * H + head) * D,
                dq_ptr + (token * H + head) * D,
            )
            dy, da, db = (
                load_sum(dy_ptr, at, ok, 1, D),
                load_sum(dy_ptr, i, ok, 1, D),
                load_sum(dy_ptr, N + i, ok, 1, D),
            )
        else:
            gain, y_ptr, dy_ptr = (
                1.0,
                k_ptr + (token * KV + head - H) * COPIES * D,
                dk_ptr + (token * KV + head - H) * COPIES * D,
            )
            dy, da, db = (
                load_sum(dy_ptr, at, ok, COPIES, D),
                load_sum(dy_ptr, i, ok, COPIES, D),
                load_sum(dy_ptr, N + i, ok, COPIES, D),
            )
        y = tl.load(y_ptr + at, mask=ok, other=0.0).to(tl.float32)
        dot = tl.sum(y * dy, 1)  # no rotation or gain changes it
        keep, drop = (rstd * gain)[:, None], (rstd * dot / (D * gain))[:, None]
        a = keep * da - drop * tl.load(y_ptr + i, mask=ok, other=0.0)  # L1 hits
        b = keep * db - drop * tl.load(y_ptr + N + i, mask=ok, other=0.0)
        store_turned(dx_ptr, keep * dy - drop * y, a, b, cos, -sin, ok, D, N)
        if head < H and d_gain_ptr is not None:
            tl.atomic_add(d_gain_ptr + head, tl.sum(dot, 0) / gain, sem="relaxed")


class QKVHeads(torch.autograd.Function):
    """qkv_heads() through the kernels."""

    @staticmethod
    def forward(ctx, qkv, gain, cos, sin, kv_heads, copies, eps):
        qkv, gain, cos, sin = (t.contiguous() for t in (qkv, gain, cos, sin))
        T, H, D = len(qkv), len(gain), qkv.size(1) // (len(gain) + 2 * kv_heads)
        q, k, v = (qkv.new_empty(T, heads, D) for heads in (H, copies * kv_heads, copies * kv_heads))
        rstd = qkv.new_empty(T, H + kv_heads, dtype=torch.float32)  # 1 / rms of the heads of q and k
        rows = max(HEAD_TILE // D, 1)
        qkv_heads_kernel[(triton.cdiv(T, rows) * (H + 2 * kv_heads),)](
            qkv, gain, cos, sin, q, k, v, rstd, T, eps, H, kv_heads, copies, D, cos.size(1), rows
        )
        ctx.save_for_backward(q, k, gain, cos, sin, rstd)
        return q, k, v, qkv.unflatten(1, (-1, D))[:, -kv_heads:]

    @staticmethod
    def backward(ctx, *grads):
        q, k, gain, cos, sin, rstd = ctx.saved_tensors
        (T, H, D), KV, grads = q.shape, grads[3].size(1), [t.contiguous() for t in grads]
        d_qkv, d_gain, rows = (
            q.new_empty(T, (H + 2 * KV) * D),
            torch.zeros_like(gain) if ctx.needs_input_grad[1] else None,
            max(HEAD_TILE // D, 1),
        )
        qkv_heads_gradient_kernel[(triton.cdiv(T, rows) * (H + 2 * KV),)](
            *grads, q, k, gain, cos, sin, rstd, d_qkv, d_gain, T, H, KV, k.size(1) // KV, D, cos.size(1), rows
        )
        return d_qkv, d_gain, None, None, None, None, None


def qkv_heads(
    qkv: Tensor, gain: Tensor, cos: Tensor, sin: Tensor, kv_heads: int, copies: int, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """qkv (T, (H + 2 KV) D), gain (H,) fp32 and nonzero, cos and sin (T, n) fp32 -> q (T, H, D), k and v (T, copies KV, D), and v again as a view of qkv (T, KV, D).
    q and k: RMSNorm over D, rotation of the pairs (i, i + n) for i < n, then q times its head's gain. k and v come ``copies`` times in a row: FlashAttention 3
    takes 1.22 ms forward and backward for 4 heads of 128 with their own keys, 1.41 ms where two share them (98,304 tokens, H200)."""
    rotates = cos.size(1) > 0 and cos.size(1) & (cos.size(1) - 1) == 0
    kernel = rotates and use_kernels(qkv.dtype, qkv.device, qkv.size(1) // (gain.numel() + 2 * kv_heads))
    return (QKVHeads.apply if kernel else qkv_heads_reference)(qkv, gain, cos, sin, kv_heads, copies, eps)


# --- XSA and the gate of each head's output ---
def xsa_gate_reference(y: Tensor, v: Tensor, z: Tensor, slope: float, top: float) -> Tensor:
    """xsa_gate() in plain PyTorch."""
    grouped, v = y.unflatten(1, (v.size(1), -1)).float(), v[:, :, None].float()
    along = (grouped * v).sum(-1, keepdim=True) / (v * v).sum(-1, keepdim=True).clamp_min(1e-12)
    return ((grouped - along * v).flatten(1, 2) * (top * torch.sigmoid(slope * z.float()))[:, :, None]).to(y.dtype)


@triton.jit(do_not_specialize=["T"])
def xsa_gate_kernel(
    y_ptr,
    v_ptr,
    z_ptr,
    d_out_ptr,
    out_ptr,
    dv_ptr,
    dz_ptr,
    T,
    v_stride,
    slope,
    top,
    KV: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rows are (token, KV head); the GROUP query heads that share a value pass one after another. With d_out_ptr backward: out is d(y)."""
    row = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    d, ok = tl.arange(0, D)[None, :], (row < T * KV)[:, None]
    v = tl.load(v_ptr + (row // KV * v_stride + row % KV * D)[:, None] + d, mask=ok, other=0.0).to(tl.float32)
    inverse = 1.0 / tl.maximum(tl.sum(v * v, 1), 1e-12)[:, None]
    dv = tl.zeros((BLOCK, D), tl.float32)
    for g in tl.static_range(GROUP):
        head = row * GROUP + g
        at = head[:, None] * D + d
        y = tl.load(y_ptr + at, mask=ok, other=0.0).to(tl.float32)
        opened = tl.sigmoid(slope * tl.load(z_ptr + head, mask=row < T * KV, other=0.0).to(tl.float32))
        along = tl.sum(y * v, 1)[:, None] * inverse
        kept = y - along * v
        if d_out_ptr is None:
            tl.store(out_ptr + at, (kept * (top * opened)[:, None]).to(out_ptr.dtype.element_ty), mask=ok)
        else:
            d_out = tl.load(d_out_ptr + at, mask=ok, other=0.0).to(tl.float32)
            dz = tl.sum(d_out * kept, 1) * (top * slope) * opened * (1.0 - opened)
            tl.store(dz_ptr + head, dz.to(dz_ptr.dtype.element_ty), mask=row < T * KV)
            d_kept = d_out * (top * opened)[:, None]
            d_along = tl.sum(d_kept * v, 1)[:, None] * inverse
            tl.store(out_ptr + at, (d_kept - d_along * v).to(out_ptr.dtype.element_ty), mask=ok)
            dv += 2.0 * along * d_along * v - d_along * y - along * d_kept
    if d_out_ptr is not None:
        tl.store(dv_ptr + row[:, None] * D + d, dv.to(dv_ptr.dtype.element_ty), mask=ok)


def launch_xsa_gate(y: Tensor, v: Tensor, z: Tensor, slope: float, top: float, *results: Tensor | None):
    """results: None, out, None, None; or the gradient of out, and room for those of y, v and z."""
    (T, KV, D), rows = v.shape, max(HEAD_TILE // v.size(2), 1)
    xsa_gate_kernel[(triton.cdiv(T * KV, rows),)](
        y, v, z, *results, T, v.stride(0), slope, top, KV, y.size(1) // KV, D, rows
    )


class XSAGate(torch.autograd.Function):
    """xsa_gate() through the kernel. v's heads lie side by side, its tokens at any stride."""

    @staticmethod
    def forward(ctx, y, v, z, slope, top):
        inputs, out = (
            (y.contiguous(), v if v.stride()[1:] == (v.size(2), 1) else v.contiguous(), z.contiguous()),
            y.new_empty(y.shape),
        )
        launch_xsa_gate(*inputs, slope, top, None, out, None, None)
        ctx.save_for_backward(*inputs)
        ctx.constants = slope, top
        return out

    @staticmethod
    def backward(ctx, d_out):
        grads = empty_like(*ctx.saved_tensors)
        launch_xsa_gate(*ctx.saved_tensors, *ctx.constants, d_out.contiguous(), *grads)
        return *grads, None, None


def xsa_gate(y: Tensor, v: Tensor, z: Tensor, slope: float, top: float) -> Tensor:
    """y (T, H, D), v (T, KV, D), z (T, H) -> top sigmoid(slope z) (y - (y . v) / (v . v) v) in y's dtype, v that of the head's group (#265, #1787)."""
    return (XSAGate.apply if use_kernels(y.dtype, y.device, y.size(2)) else xsa_gate_reference)(y, v, z, slope, top)


# --- Embeddings, smeared and normed ---
def embed_reference(
    tokens: Tensor,
    previous: Tensor,
    positions: Tensor,
    table: Tensor,
    gate: Tensor | None,
    strength: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """embed() in plain PyTorch."""
    x = F.embedding(tokens, table).to(dtype)
    if gate is not None:
        z = F.linear(x[:, : len(gate)], gate[None].to(dtype)).float()
        smear = strength * torch.sigmoid(z) * (positions > 0)[:, None]
        x = (x + smear * F.embedding(previous, table).to(dtype)).to(dtype)
    return F.rms_norm(x, x.shape[1:], eps=eps)


@triton.jit
def smeared(
    row,
    tokens_ptr,
    previous_ptr,
    positions_ptr,
    table_ptr,
    gate_ptr,
    strength_ptr,
    T,
    C: tl.constexpr,
    D: tl.constexpr,
    GATE: tl.constexpr,
):
    """Of some rows: token and the one before it; its first GATE channels (of the gate's C); how far the gate is open, 0 at a start; the embedding before, the smeared one."""
    ok, i, col = row < T, tl.arange(0, GATE)[None, :], tl.arange(0, D)[None, :]
    token, before = tl.load(tokens_ptr + row, mask=ok, other=0), tl.load(previous_ptr + row, mask=ok, other=0)
    x = tl.load(table_ptr + token[:, None] * D + col).to(tl.bfloat16).to(tl.float32)
    first = tl.load(table_ptr + token[:, None] * D + i, mask=i < C, other=0.0).to(tl.bfloat16).to(tl.float32)
    p, opened = x, tl.zeros(row.shape, tl.float32)
    if gate_ptr is not None:
        p = tl.load(table_ptr + before[:, None] * D + col).to(tl.bfloat16).to(tl.float32)
        z = tl.sum(first * tl.load(gate_ptr + i, mask=i < C, other=0.0).to(tl.bfloat16).to(tl.float32), 1)
        seen = (tl.load(positions_ptr + row, mask=ok, other=0) > 0).to(tl.float32)
        opened = tl.sigmoid(z) * seen
        x += (tl.load(strength_ptr) * opened)[:, None] * p
    return token, before, first, opened, p, x.to(tl.bfloat16).to(tl.float32)


@triton.jit(do_not_specialize=["T"])
def embed_kernel(
    tokens_ptr,
    previous_ptr,
    positions_ptr,
    table_ptr,
    gate_ptr,
    strength_ptr,
    out_ptr,
    T,
    eps,
    C: tl.constexpr,
    D: tl.constexpr,
    GATE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """ROWS smeared embeddings, normed."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    _, _, _, _, _, x = smeared(
        row, tokens_ptr, previous_ptr, positions_ptr, table_ptr, gate_ptr, strength_ptr, T, C, D, GATE
    )
    n = x * tl.rsqrt(tl.sum(x * x, 1) / D + eps)[:, None]
    tl.store(
        out_ptr + row[:, None] * D + tl.arange(0, D)[None, :], n.to(out_ptr.dtype.element_ty), mask=(row < T)[:, None]
    )


@triton.jit(do_not_specialize=["T"])
def embed_gradient_kernel(
    dn_ptr,
    tokens_ptr,
    previous_ptr,
    positions_ptr,
    table_ptr,
    gate_ptr,
    strength_ptr,
    d_table_ptr,
    d_gate_ptr,
    d_strength_ptr,
    T,
    eps,
    C: tl.constexpr,
    D: tl.constexpr,
    GATE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Adds to the gradients of the table, the gate and the strength."""
    i, col = tl.arange(0, GATE)[None, :], tl.arange(0, D)[None, :]
    d_gate, d_strength = tl.zeros((ROWS, GATE), tl.float32), tl.zeros((ROWS,), tl.float32)
    for begin in range(tl.program_id(0) * ROWS, T, tl.num_programs(0) * ROWS):
        row = (begin + tl.arange(0, ROWS)).to(tl.int64)
        ok = (row < T)[:, None]
        token, before, first, opened, p, x = smeared(
            row, tokens_ptr, previous_ptr, positions_ptr, table_ptr, gate_ptr, strength_ptr, T, C, D, GATE
        )
        dn = tl.load(dn_ptr + row[:, None] * D + col, mask=ok, other=0.0).to(tl.float32)
        rstd = tl.rsqrt(tl.sum(x * x, 1) / D + eps)[:, None]
        dx = rstd * (dn - x * (rstd * rstd * tl.sum(x * dn, 1)[:, None] / D))
        tl.atomic_add(d_table_ptr + token[:, None] * D + col, dx, mask=ok, sem="relaxed")
        if gate_ptr is not None:
            strength, along = tl.load(strength_ptr), tl.sum(p * dx, 1)
            tl.atomic_add(
                d_table_ptr + before[:, None] * D + col,
                (strength * opened)[:, None] * dx,
                mask=ok & (opened > 0)[:, None],
                sem="relaxed",
            )
            dz = strength * along * opened * (1.0 - opened)
            gate = tl.load(gate_ptr + i, mask=i < C, other=0.0).to(tl.bfloat16).to(tl.float32)
            tl.atomic_add(d_table_ptr + token[:, None] * D + i, dz[:, None] * gate, mask=ok & (i < C), sem="relaxed")
            d_gate += dz[:, None] * first
            d_strength += along * opened
    if gate_ptr is not None:
        tl.atomic_add(d_gate_ptr + tl.arange(0, GATE), tl.sum(d_gate, 0), mask=tl.arange(0, GATE) < C, sem="relaxed")
        tl.atomic_add(d_strength_ptr, tl.sum(d_strength, 0), sem="relaxed")


class Embed(torch.autograd.Function):
    """embed() through the kernels."""

    @staticmethod
    def forward(ctx, tokens, previous, positions, table, gate, strength, eps):
        T, d = len(tokens), table.size(1)
        ctx.width = (0, d, 16) if gate is None else (len(gate), d, triton.next_power_of_2(len(gate)))
        out = torch.empty(T, d, dtype=torch.bfloat16, device=table.device)
        embed_kernel[(triton.cdiv(T, STREAM_ROWS),)](
            tokens, previous, positions, table, gate, strength, out, T, eps, *ctx.width, STREAM_ROWS
        )
        ctx.save_for_backward(tokens, previous, positions, table, gate, strength)
        ctx.eps = eps
        return out

    @staticmethod
    def backward(ctx, dn):
        grads = [None if t is None else torch.zeros_like(t) for t in ctx.saved_tensors[3:]]
        programs = 3 * processors(dn.device)  # more contend for the table
        embed_gradient_kernel[(programs,)](
            dn.contiguous(), *ctx.saved_tensors, *grads, len(dn), ctx.eps, *ctx.width, STREAM_ROWS
        )
        return None, None, None, *grads, None


def embed(
    tokens: Tensor,
    previous: Tensor,
    positions: Tensor,
    table: Tensor,
    gate: Tensor | None,
    strength: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """tokens, previous (T,) int64, positions (T,) int32, table (V, d), gate (c,) and strength () fp32 -> RMSNorm of e_t + strength sigmoid(gate . e_t) e_{t-1}
    (T, d) in ``dtype``, without the second term at position 0 (SmearGate, #1667)."""
    if use_kernels(dtype, table.device, table.size(1)):
        return Embed.apply(tokens, previous, positions, table, gate, strength, eps)
    return embed_reference(tokens, previous, positions, table, gate, strength, eps, dtype)


# --- Sums of streams weighted channel by channel, and their RMSNorm ---
ONE, NO = -1, -2  # in a form of mix(): the stream as it is; not at all


def mix_reference(
    weights: Tensor | None, form: tuple, scales: tuple, keep: tuple, eps: float, *streams: Tensor
) -> tuple[Tensor, ...]:
    """mix() in plain PyTorch."""
    outputs = []
    for row, scale, kept in zip(form, scales, keep):
        terms = [x if r == ONE else weights[r] * x for r, x in zip(row, streams) if r != NO]
        y = sum(terms[1:], terms[0]).to(streams[0].dtype)
        outputs += [y] * kept + ([] if scale is None else [F.rms_norm(y, y.shape[1:], eps=eps) * scale])
    return tuple(outputs)


@triton.jit
def load_all(ptrs, at, ok):
    """The tiles of all pointers, fp32."""
    tiles = ()
    for i in tl.static_range(len(ptrs)):
        tiles = tiles + (tl.load(ptrs[i] + at, mask=ok, other=0.0).to(tl.float32),)
    return tiles


@triton.jit
def mixture(xs, ws, FORM: tl.constexpr, m: tl.constexpr):
    """The sum of tiles xs, each by the row of ws that row m of FORM names."""
    y = tl.zeros(xs[0].shape, tl.float32)
    for k in tl.static_range(len(xs)):
        if FORM[m][k] == -1:
            y += xs[k]
        elif FORM[m][k] >= 0:
            y += ws[FORM[m][k]] * xs[k]
    return y


@triton.jit(do_not_specialize=["T"])
def mix_kernel(
    streams,
    w_ptr,
    ys,
    ns,
    scales,
    T,
    eps,
    FORM: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Each of ys and ns may be None. BLOCK is D or the next power of two."""
    col, ws = tl.arange(0, BLOCK)[None, :], ()
    for r in tl.static_range(R):
        ws = ws + (tl.load(w_ptr + r * D + col, mask=col < D, other=0.0),)
    for first in range(tl.program_id(0) * ROWS, T, tl.num_programs(0) * ROWS):
        row = (first + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        at, ok = row * D + col, row < T if BLOCK == D else (row < T) & (col < D)
        xs = load_all(streams, at, ok)
        for m in tl.static_range(len(FORM)):
            if ys[m] is not None or ns[m] is not None:
                y = mixture(xs, ws, FORM, m).to(streams[0].dtype.element_ty)
                if ys[m] is not None:
                    tl.store(ys[m] + at, y, mask=ok)
                if ns[m] is not None:
                    wide = y.to(tl.float32)
                    n = wide * (scales[m] * tl.rsqrt(tl.sum(wide * wide, 1) / D + eps))[:, None]
                    tl.store(ns[m] + at, n.to(ns[m].dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["T"])
def mix_gradient_kernel(
    streams,
    w_ptr,
    dys,
    dns,
    scales,
    grads,
    dw_ptr,
    T,
    eps,
    FORM: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Gradients of the streams; those of the weights are added to dw_ptr if given. Each of dys, dns and grads may be None."""
    col, ws, sums = tl.arange(0, BLOCK)[None, :], (), ()
    for r in tl.static_range(R):
        ws, sums = (
            ws + (tl.load(w_ptr + r * D + col, mask=col < D, other=0.0),),
            sums + (tl.zeros((ROWS, BLOCK), tl.float32),),
        )
    for first in range(tl.program_id(0) * ROWS, T, tl.num_programs(0) * ROWS):
        row = (first + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        at, ok = row * D + col, row < T if BLOCK == D else (row < T) & (col < D)
        xs, gs, added = load_all(streams, at, ok), (), ()
        for m in tl.static_range(len(FORM)):
            g = tl.zeros((ROWS, BLOCK), tl.float32)
            if dns[m] is not None:
                y = mixture(xs, ws, FORM, m).to(streams[0].dtype.element_ty).to(tl.float32)
                dn = tl.load(dns[m] + at, mask=ok, other=0.0).to(tl.float32)
                rstd = tl.rsqrt(tl.sum(y * y, 1) / D + eps)[:, None]
                g = scales[m] * rstd * (dn - y * (rstd * rstd * tl.sum(y * dn, 1)[:, None] / D))
            if dys[m] is not None:
                g += tl.load(dys[m] + at, mask=ok, other=0.0).to(tl.float32)
            gs = gs + (g,)
        for k in tl.static_range(len(streams)):
            if grads[k] is not None:
                d = tl.zeros((ROWS, BLOCK), tl.float32)
                for m in tl.static_range(len(FORM)):
                    if FORM[m][k] == -1:
                        d += gs[m]
                    elif FORM[m][k] >= 0:
                        d += ws[FORM[m][k]] * gs[m]
                tl.store(grads[k] + at, d.to(grads[k].dtype.element_ty), mask=ok)
        for r in tl.static_range(R):
            total = sums[r]
            for m in tl.static_range(len(FORM)):
                for k in tl.static_range(len(streams)):
                    if FORM[m][k] == r:
                        total += gs[m] * xs[k]
            added = added + (total,)
        sums = added
    if dw_ptr is not None:
        for r in tl.static_range(R):
            tl.atomic_add(
                dw_ptr + r * D + tl.arange(0, BLOCK), tl.sum(sums[r], 0), mask=tl.arange(0, BLOCK) < D, sem="relaxed"
            )


class Mix(torch.autograd.Function):
    """mix() through the kernels. A row that is one stream as it is costs nothing forward: its gradient joins where the stream's others arise."""

    @staticmethod
    def forward(ctx, weights, form, scales, keep, eps, *streams):
        weights, (T, d), R = (
            (None, streams[0].shape, 0) if weights is None else (weights.contiguous(), streams[0].shape, len(weights))
        )
        streams = tuple(x.contiguous() for x in streams)
        alias = [row.index(ONE) if sorted(row)[-2:] in ([ONE], [NO, ONE]) else None for row in form]
        ys = tuple(torch.empty_like(streams[0]) if kept and a is None else None for a, kept in zip(alias, keep))
        ns = tuple(None if scale is None else torch.empty_like(streams[0]) for scale in scales)
        if any(t is not None for t in ys + ns):
            mix_kernel[(STREAM_PROGRAMS * processors(streams[0].device),)](
                streams, weights, ys, ns, scales, T, eps, form, R, d, triton.next_power_of_2(d), STREAM_ROWS
            )
        ctx.save_for_backward(weights, *streams)
        ctx.constants = form, scales, keep, eps
        ctx.set_materialize_grads(False)
        outputs = (
            (streams[a].view_as(streams[a]) if a is not None and kept else y, n)
            for a, kept, y, n in zip(alias, keep, ys, ns)
        )
        return tuple(t for pair in outputs for t in pair if t is not None)

    @staticmethod
    def backward(ctx, *d_outputs):
        (weights, *streams), (form, scales, keep, eps) = ctx.saved_tensors, ctx.constants
        arriving = iter(None if t is None else t.contiguous() for t in d_outputs)
        dys, dns = zip(
            *(
                (next(arriving) if kept else None, next(arriving) if scale is not None else None)
                for kept, scale in zip(keep, scales)
            )
        )
        columns, need_w = list(zip(*form)), ctx.needs_input_grad[0]  # streams of equal columns have one gradient
        firsts = [columns.index(column) for column in columns]
        needed = {first for first, need in zip(firsts, ctx.needs_input_grad[5:]) if need}
        grads = tuple(torch.empty_like(x) if k in needed else None for k, x in enumerate(streams))
        d_weights, (T, d), rows = (
            torch.zeros_like(weights) if need_w else None,
            streams[0].shape,
            0 if weights is None else len(weights),
        )
        programs, tile = (
            (6, STREAM_ROWS) if len(streams) < 4 else (8, 1)
        )  # four rows of four streams do not fit into the registers
        mix_gradient_kernel[(programs * processors(streams[0].device),)](
            tuple(streams),
            weights,
            dys,
            dns,
            scales,
            grads,
            d_weights,
            T,
            eps,
            form,
            rows,
            d,
            triton.next_power_of_2(d),
            tile,
        )
        return (
            d_weights,
            None,
            None,
            None,
            None,
            *(grads[k] if need else None for k, need in zip(firsts, ctx.needs_input_grad[5:])),
        )


def mix(
    weights: Tensor | None, form: tuple, scales: tuple, keep: tuple, eps: float, *streams: Tensor
) -> tuple[Tensor, ...]:
    """Weighted sums of streams (T, d). For each row of ``form``: its sum (T, d) if kept, then the sum's RMSNorm times its scale (T, d) unless that is None.
    A row names for each stream the row of weights (R, d) fp32 that multiplies it, ONE or NO. One with a single ONE hands a stream on, whose gradients then meet here."""
    return (Mix.apply if use_kernels(streams[0].dtype, streams[0].device) else mix_reference)(
        weights, form, scales, keep, eps, *streams
    )


# --- A product and the attention gate's, from one input ---
class GatedLinear(torch.autograd.Function):
    """gated_linear(): a Function, so that the gradient of the leading channels is added in place and not as a padded (T, d)."""

    @staticmethod
    def forward(ctx, x, w, gate):
        ctx.save_for_backward(x, w, gate)
        return F.linear(x, w), F.linear(x[:, : gate.size(1)], gate)

    @staticmethod
    def backward(ctx, dy, dz):
        x, w, gate = ctx.saved_tensors
        need_x, need_w, need_gate = ctx.needs_input_grad
        dx = dy @ w if need_x else None
        if need_x:
            dx[:, : gate.size(1)].addmm_(dz, gate)
        return dx, dy.T @ x if need_w else None, dz.T @ x[:, : gate.size(1)] if need_gate else None


def gated_linear(x: Tensor, w: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """x (T, d), w (n, d), gate (H, c) -> x @ w.T (T, n), and of its leading channels x[:, :c] @ gate.T (T, H)."""
    return GatedLinear.apply(x, w, gate)


# ======== Attention backends: one function, found in the order FlashAttention 3, FlashAttention 4, torch's FlashAttention 2, masked reference ================


def segment_groups(cu_q: Tensor, cu_k: Tensor, window: int):
    """Runs of consecutive segments of equal lengths: (slices of queries and keys, segments, causal mask (n, m) aligned at its end, ``window`` keys back, -1: all)."""
    end_q = end_k = 0
    lengths = zip(cu_q.diff().tolist(), cu_k.diff().tolist())
    for (n, m), run in itertools.groupby(pair for pair in lengths if pair != (0, 0)):
        segments = sum(1 for _ in run)
        at_q, at_k, end_q, end_k = end_q, end_k, end_q + segments * n, end_k + segments * m
        if n:
            mask = torch.ones(n, m, dtype=torch.bool, device=cu_q.device).tril(m - n)
            yield slice(at_q, end_q), slice(at_k, end_k), segments, mask if window < 0 else mask.triu(m - n - window)


def attention_weights(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    """q (B, KV, G, n, D), k (B, KV, 1, m, D) -> (B, KV, G, n, m), softmax over the keys that the mask allows."""
    return (q @ k.mT * q.size(-1) ** -0.5).masked_fill_(~mask, -torch.inf).softmax(-1)


def heads_first(t: Tensor, segments: int, kv_heads: int) -> Tensor:
    """(segments n, H, D) -> (segments, KV, H / KV, n, D)."""
    return t.unflatten(0, (segments, -1)).unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4)


def tokens_first(t: Tensor) -> Tensor:
    """(segments, KV, H / KV, n, D) -> (segments n, H, D)."""
    return t.permute(0, 3, 1, 2, 4).flatten(2, 3).flatten(0, 1)


def reference_forward(q, k, v, cu_q, cu_k, max_q=0, max_k=0, window=-1) -> tuple[Tensor, Tensor]:
    """Causal attention of packed segments in plain torch. The log-sum-exp is empty, since the backward pass recomputes."""
    out, kv = torch.empty_like(q), k.size(1)
    for at_q, at_k, segments, mask in segment_groups(cu_q, cu_k, window):
        qs, ks, vs = (
            heads_first(q[at_q], segments, kv),
            heads_first(k[at_k], segments, kv),
            heads_first(v[at_k], segments, kv),
        )
        out[at_q] = tokens_first(attention_weights(qs, ks, mask) @ vs)
    return out, q.new_empty(0, dtype=torch.float32)


def reference_backward(dout, q, k, v, out, lse, cu_q, cu_k, max_q=0, max_k=0, window=-1):
    """Gradients of reference_forward by q, k, v, written out."""
    dq, dk, dv, kv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v), k.size(1)
    for at_q, at_k, segments, mask in segment_groups(cu_q, cu_k, window):
        qs, ds = heads_first(q[at_q], segments, kv), heads_first(dout[at_q], segments, kv)
        ks, vs = heads_first(k[at_k], segments, kv), heads_first(v[at_k], segments, kv)
        p = attention_weights(qs, ks, mask)
        dp = ds @ vs.mT
        dscore = p * (dp - (dp * p).sum(-1, keepdim=True)) * q.size(-1) ** -0.5
        dq[at_q] = tokens_first(dscore @ ks)
        dk[at_k] = tokens_first((dscore.mT @ qs).sum(2, keepdim=True))
        dv[at_k] = tokens_first((p.mT @ ds).sum(2, keepdim=True))
    return dq, dk, dv


def fa3_forward(q, k, v, cu_q, cu_k, max_q, max_k, window):
    """FlashAttention 3: out (Tq, H, D) and log-sum-exp (H, Tq) fp32."""
    nothing = [None] * 4
    out, lse, *_ = torch.ops.flash_attn_3.fwd(
        q,
        k,
        v,
        *nothing,
        cu_q,
        cu_k,
        None,
        None,
        None,
        max_q,
        max_k,
        *nothing,
        None,
        None,
        None,
        None,
        None,
        q.size(-1) ** -0.5,
        True,
        window,
        0,
        num_splits=1,
    )  # its own choice splits, and a combining kernel eats the gain
    return out, lse


def fa3_backward(dout, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, window):
    """FlashAttention 3: gradients of q, k, v."""
    grads = empty_like(q, k, v)
    torch.ops.flash_attn_3.bwd(
        dout, q, k, v, out, lse, *grads, cu_q, cu_k, None, None, max_q, max_k, q.size(-1) ** -0.5, True, window, 0
    )
    return grads  # written in place; builds differ in what the operator returns


def fa4_arguments(cu_q, cu_k, max_q, max_k, window) -> dict:
    """What both directions of FlashAttention 4 take; it has no -1 for a window that reaches back to the start."""
    return dict(
        cu_seqlens_q=cu_q,
        cu_seqlens_k=cu_k,
        max_seqlen_q=max_q,
        max_seqlen_k=max_k,
        causal=True,
        window_size_left=None if window < 0 else window,
    )


def fa4_forward(q, k, v, *where):
    """FlashAttention 4 (CuTe DSL, compiled at first use): out and log-sum-exp (H, Tq)."""
    return sys.modules[ATTENTION_MODULES["fa4"]]._flash_attn_fwd(q, k, v, return_lse=True, **fa4_arguments(*where))[:2]


def fa4_backward(dout, q, k, v, out, lse, *where):
    """FlashAttention 4: gradients of q, k, v."""
    return sys.modules[ATTENTION_MODULES["fa4"]]._flash_attn_bwd(q, k, v, out, dout, lse, **fa4_arguments(*where))


def torch_forward(q, k, v, cu_q, cu_k, max_q, max_k, window):
    """torch's own FlashAttention 2: out and log-sum-exp."""
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, cu_q, cu_k, max_q, max_k, 0.0, True, False, window_size_left=window, window_size_right=0
    )
    return out, lse


def torch_backward(dout, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, window):
    """torch's own FlashAttention 2: gradients of q, k, v."""
    seed = torch.zeros(2, dtype=torch.uint64, device=q.device)  # dropout state, unused at rate 0
    return torch.ops.aten._flash_attention_backward(
        dout,
        q,
        k,
        v,
        out,
        lse,
        cu_q,
        cu_k,
        max_q,
        max_k,
        0.0,
        True,
        seed,
        seed[0],
        window_size_left=window,
        window_size_right=0,
    )


BACKENDS = {
    "fa3": (fa3_forward, fa3_backward),
    "fa4": (fa4_forward, fa4_backward),
    "torch": (torch_forward, torch_backward),
    "reference": (reference_forward, reference_backward),
}
ATTENTION_MODULES = {
    "fa3": "flash_attn_interface",
    "fa4": "flash_attn.cute.interface",
}  # the first registers torch.ops.flash_attn_3


def choose_attention(cfg: Config, device: torch.device) -> str:
    """The first backend that loads and agrees with the reference on this device."""
    if device.type == "cpu":
        return "reference"
    reasons = []
    for name in BACKENDS if cfg.attention == "auto" else [cfg.attention]:
        try:
            if name == "fa3" and cfg.fa3_library:
                torch.ops.load_library(cfg.fa3_library)
            elif name in ATTENTION_MODULES:
                importlib.import_module(ATTENTION_MODULES[name])
            check_backend(name, cfg, device)
            return name
        except Exception as e:  # any fault of a third-party library only means: try the next
            reasons.append(f"{name}: {str(e).splitlines()[0] if str(e) else type(e).__name__}")
    raise UserError(f"ATTENTION={cfg.attention}: no backend works here ({'; '.join(reasons)})")


def check_backend(name: str, cfg: Config, device: torch.device):
    """Forward and backward on two documents against the reference, whole and behind cached keys, with a window and without, relative error below 2 % (bf16)."""
    generator, head_dim = torch.Generator(device).manual_seed(0), cfg.model_dim // cfg.num_heads
    q, k, v, dout = (
        torch.randn(384, heads, head_dim, device=device, dtype=torch.bfloat16, generator=generator)
        for heads in (cfg.num_heads, cfg.num_kv_heads, cfg.num_kv_heads, cfg.num_heads)
    )
    forward, backward = BACKENDS[name]
    cu_k, cached = (torch.tensor(ends, dtype=torch.int32, device=device) for ends in ([0, 100, 384], [0, 30, 130]))
    for window, (cu_q, n) in itertools.product((-1, 64), ((cu_k, 384), (cached, 130))):
        inputs, where = (q[:n], k, v, dout[:n]), (cu_q, cu_k, 384, 384, window)
        out, lse = forward(*inputs[:3], *where)
        found = (out, *backward(inputs[3], *inputs[:3], out, lse, *where)[:3])
        *exact, d_exact = (t.float() for t in inputs)
        wanted = (reference_forward(*exact, *where)[0], *reference_backward(d_exact, *exact, None, None, *where))
        for have, want in zip(found, wanted):
            error = ((have.float() - want).norm() / want.norm()).item()
            if not error < 0.02:
                raise RuntimeError(f"differs from the reference by {error:.1%}")


class Attention(torch.autograd.Function):
    """The chosen backend: q (Tq, H, D), k, v (Tk, KV, D) -> (Tq, H, D)."""

    @staticmethod
    def forward(ctx, q, k, v, cu_q, cu_k, max_q, max_k, window, backend):
        out, lse = BACKENDS[backend][0](q, k, v, cu_q, cu_k, max_q, max_k, window)
        ctx.save_for_backward(q, k, v, out, lse, cu_q, cu_k)
        ctx.constants, ctx.backend = (max_q, max_k, window), backend
        return out

    @staticmethod
    def backward(ctx, dout):
        return *BACKENDS[ctx.backend][1](dout.contiguous(), *ctx.saved_tensors, *ctx.constants)[:3], *[None] * 6


def attend(q: Tensor, k: Tensor, v: Tensor, seq: Seq, window: int, backend: str) -> Tensor:
    """q (Tq, H, D); k, v (Tk, KV, D) -> (Tq, H, D) in q's dtype; window: tokens reached back, -1: all. Flash kernels get bf16 whatever arrives (B68)."""
    inputs = [t if backend == "reference" else t.to(torch.bfloat16) for t in (q, k, v)]
    return Attention.apply(*inputs, seq.cu_q, seq.cu_k, seq.max_q, seq.max_k, window, backend).to(q.dtype)


# ======== Model: one trunk, one head ==========================================================================================================================

NORM_EPS = 2.0**-23  # the embedding's mean square begins at 2.5e-5: bf16's epsilon would crush it


class Visit(NamedTuple):
    """One stop of the trunk: which layer, which earlier visit is merged in by which skip, and whether two lanes run."""

    layer: int
    skip: int | None  # row of skip_weights and skip_gates
    source: int | None  # index of the visit whose output is merged
    lanes: bool


def visit_schedule(cfg: Config, looped: bool) -> tuple[Visit, ...]:
    """Depth recurrence and U-Net pairing. The first half of the visits encodes, the second half merges their outputs, last first."""
    loop = list(range(cfg.loop_start, cfg.loop_end + 1)) * (cfg.num_loops + 1)
    layers = (
        [*range(cfg.loop_start), *loop, *range(cfg.loop_end + 1, cfg.num_layers)]
        if looped and cfg.num_loops
        else list(range(cfg.num_layers))
    )
    encoder = len(layers) // 2
    visits = []
    for i, layer in enumerate(layers):
        j = i - encoder  # decoder visit
        merges = 0 <= j < encoder
        lanes = cfg.parallel_mode == "lanes" and j >= 0 and 0 < cfg.parallel_start_layer <= layer
        visits.append(Visit(layer, j if merges else None, encoder - 1 - j if merges else None, lanes))
    return tuple(visits)


class Cache(NamedTuple):
    """What earlier tokens left behind, for rows of equal length: keys and values of each visit, and the last token for SmearGate."""

    keys: Tensor  # (visits, rows, length, KV, D)
    values: Tensor  # (visits, rows, length, KV, D)
    last: Tensor  # (rows,) int64


class Scores(NamedTuple):
    """What the head says of every token."""

    nats: Tensor  # fp32, the shape of the targets
    hint_log_prob: Tensor | None = (
        None  # fp32, the same shape: log-probability of the hinted token, where one was given
    )


class Site(NamedTuple):
    """What a visit computes with."""

    layer: int
    weights: tuple[Tensor, ...]  # qkv, o, up, down
    rows: Tensor  # of GPT.mixing
    rope: tuple[Tensor, Tensor]
    seq: Seq
    delta: Callable  # kind -> low-rank delta or None
    watch: Callable  # (kind, x): shows the input of a product to whoever taps it
    past: tuple[Tensor, Tensor] | None  # cached keys and values


class GPT(nn.Module):
    """The network of #1855. Matrices of all layers are stacked, so that optimizer and quantizer see one tensor of a kind.
    tok_emb (V, d) | qkv (L, (H + 2 KV) D, d) | o (L, d, H D) | up (L, hidden, d) | down (L, d, hidden)
    attn_scale, mlp_scale (L, d) | resid_mix (L, 2, d) | q_gain (L, H) | attn_gate (L, H, window) | skip_weights, skip_gates (skips, d)
    parallel_post (L, 2 from, 2 to) | parallel_resid (L, 2) | smear_gate (window,) | smear_lambda () | caps (2,), positive and negative logits"""

    def __init__(self, cfg: Config, attention: str, dtype: torch.dtype):
        """attention: a name in BACKENDS; dtype: of activations and matrix products (parameters are fp32)."""
        super().__init__()
        self.cfg, self.attention, self.dtype = cfg, attention, dtype
        layers, d, self.head_dim = cfg.num_layers, cfg.model_dim, cfg.model_dim // cfg.num_heads
        self.q_dim, self.kv_dim, hidden = (
            cfg.num_heads * self.head_dim,
            cfg.num_kv_heads * self.head_dim,
            int(cfg.mlp_mult * d),
        )
        self.schedules = {looped: visit_schedule(cfg, looped) for looped in (False, True)}
        full = {int(n) for n in cfg.attn_full_layers.split(",") if n} if cfg.attn_window else range(layers)
        self.norm_scales = [1 / math.sqrt(layer + 1) if cfg.ln_scale else 1.0 for layer in range(layers)]
        self.gate_slope, self.gate_top = (
            (cfg.sparse_attn_gate_scale, 1.0) if cfg.sparse_attn_gate_enabled else (1.0, 2.0)
        )  # 2 sigmoid(0) = 1 without a gate
        self.windows = [-1 if layer in full else cfg.attn_window for layer in range(layers)]
        skips = max(sum(v.skip is not None for v in s) for s in self.schedules.values())
        parameter = lambda *shape, value=None: nn.Parameter(
            torch.empty(shape) if value is None else torch.full(shape, float(value))
        )
        self.tok_emb = parameter(cfg.vocab_size, d)
        self.qkv = parameter(layers, self.q_dim + 2 * self.kv_dim, d)
        self.o = parameter(layers, d, self.q_dim, value=0)
        self.up = parameter(layers, hidden, d)
        self.down = parameter(layers, d, hidden, value=0)
        self.attn_scale, self.mlp_scale = parameter(layers, d, value=1), parameter(layers, d, value=1)
        self.resid_mix = nn.Parameter(torch.tensor([1.0, 0.0])[None, :, None].repeat(layers, 1, d))
        self.q_gain = parameter(layers, cfg.num_heads, value=cfg.qk_gain_init)
        gated = cfg.sparse_attn_gate_enabled or cfg.attn_out_gate_enabled
        self.attn_gate = parameter(layers, cfg.num_heads, cfg.gate_window, value=0) if gated else None
        self.skip_weights = parameter(skips, d, value=1)
        self.skip_gates = parameter(skips, d, value=0) if cfg.skip_gates_enabled else None
        lanes = any(v.lanes for v in self.schedules[False])
        self.parallel_post = parameter(layers, 2, 2, value=1) if lanes else None
        self.parallel_resid = parameter(layers, 2, value=1.1) if lanes else None
        self.smear_gate = parameter(cfg.gate_window, value=0) if cfg.smear_gate_enabled else None
        self.smear_lambda = parameter(value=0) if cfg.smear_gate_enabled else None
        inverse = cfg.rope_base ** -(torch.arange(0, cfg.rope_dims, 2, dtype=torch.float32) / max(cfg.rope_dims, 1))
        self.register_buffer("rope_frequency", inverse, persistent=False)
        self.caps = (
            parameter(2, value=cfg.logit_softcap)
            if cfg.asym_logit_rescale
            else nn.Buffer(torch.full((2,), cfg.logit_softcap), persistent=False)
        )
        self.calibration = None  # factor () and bias (V,) of the softcapped logits, where the artifact has them

    @torch.no_grad()
    def init_weights(self, seed: int):
        """Embedding N(0, TIED_EMBED_INIT_STD); Q, K, V and up orthogonal; o, down and gates zero; scales one. Drawn on the CPU: every machine starts equal."""
        generator = torch.Generator().manual_seed(seed)
        self.tok_emb.copy_(torch.randn(self.tok_emb.shape, generator=generator) * self.cfg.tied_embed_init_std)
        q, k = self.q_dim, self.q_dim + self.kv_dim
        for layer in range(self.cfg.num_layers):
            for matrix in (self.qkv[layer, :q], self.qkv[layer, q:k], self.qkv[layer, k:], self.up[layer]):
                matrix.copy_(nn.init.orthogonal_(torch.empty(matrix.shape), generator=generator))

    def layer_weights(self) -> list[tuple[Tensor, ...]]:
        """(qkv, o, up, down[, attn_gate]) of each layer in the compute dtype. The sublayer scales multiply rows of o and down: weights are smaller than data."""
        stacks = (
            self.qkv,
            self.o * self.attn_scale[:, :, None],
            self.up,
            self.down * self.mlp_scale[:, :, None],
            *([] if self.attn_gate is None else [self.attn_gate]),
        )
        return list(zip(*(s.to(self.dtype).unbind(0) for s in stacks)))

    def embed(self, tokens: Tensor, positions: Tensor, cache: Cache | None) -> Tensor:
        """tokens (T,) -> x0 (T, d), normed."""
        rows = tokens[None] if cache is None else tokens.unflatten(0, (len(cache.last), -1))
        previous = torch.cat((rows[:, :1] if cache is None else cache.last[:, None], rows[:, :-1]), 1).flatten()
        return embed(
            tokens, previous, positions, self.tok_emb, self.smear_gate, self.smear_lambda, NORM_EPS, self.dtype
        )

    def mixing(self, looped: bool) -> tuple[Tensor, ...]:
        """For each visit rows (5, d): attention reads row 0 of x0, row 1 of the stream and row 2 of an earlier visit's output that joins it; of the last two,
        lane 0 becomes rows 3 and 4. A skip merges g stream + (1 - g) w joining with g = sigmoid(gate), or stream + w joining without gates (U-Net)."""
        schedule, mixes = self.schedules[looped], self.resid_mix.unbind(0)
        stay, begin = torch.stack([mixes[visit.layer] for visit in schedule]).unbind(1)
        skips = [
            i for i, visit in enumerate(schedule) if visit.skip is not None
        ]  # consecutive, the first of them first
        w = self.skip_weights[: len(skips)]
        g = torch.ones_like(w) if self.skip_gates is None else torch.sigmoid(self.skip_gates[: len(skips)])
        joining = w if self.skip_gates is None else (1 - g) * w
        g = torch.cat((g[:1] + joining[:1], g[1:]))  # the first skip would join the visit before to itself
        begin = torch.cat((begin[:1] + stay[:1], begin[1:]))  # the first visit finds x0 in the stream, too
        before = skips[0] if skips else 0
        around = 0, 0, before, len(schedule) - before - len(skips)
        g, joining = F.pad(g - 1, around) + 1, F.pad(joining, around)
        return torch.stack((begin, stay * g, stay * joining, g, joining), 1).unbind(0)

    def trunk(self, tokens: Tensor, seq: Seq, *, looped: bool, lora=None, tap=None, cache: Cache | None = None):
        """tokens (T,) int64 -> final hidden states (T, d) in the compute dtype; with a cache also the new tokens' Cache.
        lora.at(kind, visit) gives a delta or None; tap(kind, layer, x) sees the input of every product. With lora or cache, tokens are rows of equal length, flattened."""
        x0 = self.embed(tokens, seq.positions, cache)
        angle = seq.positions[:, None].float() * self.rope_frequency
        schedule, weights, mixing, rope = (
            self.schedules[looped],
            self.layer_weights(),
            self.mixing(looped),
            (angle.cos(), angle.sin()),
        )
        sources = {visit.source for i, visit in enumerate(schedule) if visit.source != i - 1}
        terms, lanes, outputs, fresh = (
            (),
            None,
            {},
            [],
        )  # the residual stream is the sum of its terms: additions wait for the norm that reads them
        for i, visit in enumerate(schedule):
            delta = (lambda kind, i=i: lora.at(kind, i)) if lora is not None else lambda kind: None
            watch = (
                (lambda kind, x, layer=visit.layer: tap(kind, layer, x)) if tap is not None else lambda kind, x: None
            )
            site = Site(
                visit.layer,
                weights[visit.layer],
                mixing[i],
                rope,
                seq,
                delta,
                watch,
                None if cache is None else (cache.keys[i], cache.values[i]),
            )
            joining = (outputs[visit.source],) if visit.source in outputs else ()
            if visit.lanes and lanes is None:
                lane, normed = mix(
                    None, ((ONE,) * len(terms),), (self.norm_scales[visit.layer],), (True,), NORM_EPS, *terms
                )
                lanes = lane, lane, normed
            if lanes is None:
                terms, x0, outputs[i - 1], kv = self.one_lane(site, x0, terms, joining, i - 1 in sources)
            else:
                lanes, x0, kv = self.two_lanes(
                    site,
                    x0,
                    lanes,
                    joining,
                    visit.skip is not None,
                    schedule[i + 1].layer if i + 1 < len(schedule) else None,
                )
            if cache is not None:  # nobody else asks, and they are 0.2 GB a visit in training
                fresh.append(kv)
        hidden = mix(None, ((ONE,) * len(terms),), (1.0,), (False,), NORM_EPS, *terms)[0] if lanes is None else lanes[0]
        if cache is None:
            return hidden
        keys, values = (torch.stack([kv[j].unflatten(0, (len(cache.last), -1)) for kv in fresh]) for j in (0, 1))
        return hidden, Cache(keys, values, tokens.unflatten(0, (len(cache.last), -1))[:, -1])

    def one_lane(self, site: Site, x0: Tensor, terms: tuple, joining: tuple, keep: bool):
        """-> terms of the stream after the visit, x0 as handed on, the stream before the visit if it is to be kept, new keys and values."""
        row = lambda *r: (r[0], *[r[1]] * len(terms), *[r[2]] * len(joining))
        scale, streams = self.norm_scales[site.layer], (x0, *terms, *joining)
        form, scales = (row(0, 1, 2), row(ONE, NO, NO), row(NO, ONE, NO)), (scale, None, None)
        x, n, x0, *before = mix(
            site.rows, form[: 2 + keep], scales[: 2 + keep], (True,) * (2 + keep), NORM_EPS, *streams
        )
        a, kv = self.attn(n, site)
        if self.cfg.parallel_mode == "gptj" and 0 < self.cfg.parallel_start_layer <= site.layer:
            terms = x, a  # #1493: the MLP reads what the attention read
        else:
            x, n = mix(None, ((ONE, ONE),), (scale,), (True,), NORM_EPS, x, a)
            terms = (x,)
        return (*terms, self.mlp(n, site)), x0, before[0] if keep else None, kv

    def two_lanes(self, site: Site, x0: Tensor, lanes: tuple, joining: tuple, skips: bool, following: int | None):
        """Attention reads lane 0, which alone receives the skip, the MLP reads lane 1, and both write both (#1529). lanes: both, and the norm of the second.
        -> lanes for layer ``following``, or if that is None the final hidden states alone; x0 as handed on; new keys and values."""
        row = lambda *r: (r[0], r[1], NO, *[r[2]] * len(joining))
        form = (
            row(0, 1, 2),
            row(ONE, NO, NO),
            row(NO, 3, 4) if skips else row(NO, ONE, NO),
            (NO, NO, ONE, *[NO] * len(joining)),
        )
        n, x0, first, second = mix(
            site.rows,
            form,
            (self.norm_scales[site.layer], None, None, None),
            (False, True, True, True),
            NORM_EPS,
            x0,
            *lanes[:2],
            *joining,
        )
        (a, kv), m = self.attn(n, site), self.mlp(lanes[2], site)
        stay, attn, mlp = torch.cat((self.parallel_resid[site.layer][None], self.parallel_post[site.layer])).unbind(
            0
        )  # each by the lane written
        if following is None:
            share = {"mean": (0.5, 0.5), "attn": (1.0, 0.0), "mlp": (0.0, 1.0)}[self.cfg.parallel_final_lane]
            stay, attn, mlp = ((share[0] * t[:1], share[1] * t[1:]) for t in (stay, attn, mlp))
            weights, form, scales, keep = (*stay, sum(attn), sum(mlp)), ((0, 1, 2, 3),), (1.0,), (False,)
        else:
            weights, form, scales, keep = (
                (stay, attn, mlp),
                ((0, NO, 2, 4), (NO, 1, 3, 5)),
                (None, self.norm_scales[following]),
                (True, True),
            )
        return (
            mix(torch.cat(weights)[:, None].expand(-1, n.size(1)), form, scales, keep, NORM_EPS, first, second, a, m),
            x0,
            kv,
        )

    def attn(self, n: Tensor, site: Site) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """n (T, d) -> (T, d), and this visit's new keys and values (T, KV, D), or (T, H, D) where no cache is kept."""
        cfg, layer, delta = self.cfg, site.layer, site.delta("qkv")
        site.watch("qkv", n)
        qkv, z = (
            (F.linear(n, site.weights[0]), n.new_zeros(len(n), cfg.num_heads))
            if self.attn_gate is None
            else gated_linear(n, site.weights[0], site.weights[4])
        )
        qkv = qkv if delta is None else qkv + delta(n)
        copies = cfg.num_heads // cfg.num_kv_heads if site.past is None else 1
        q, k, v, own = qkv_heads(qkv, self.q_gain[layer], *site.rope, cfg.num_kv_heads, copies, NORM_EPS)
        past_and = lambda old, new: torch.cat((old, new.unflatten(0, (old.size(0), -1))), 1).flatten(0, 1)
        all_k, all_v = (k, v) if site.past is None else map(past_and, site.past, (k, v))
        y = attend(q, all_k, all_v, site.seq, self.windows[layer], self.attention)
        if layer >= cfg.num_layers - cfg.xsa_last_n:
            y = xsa_gate(y, own, z, self.gate_slope, self.gate_top)
        else:
            y = (y * (self.gate_top * torch.sigmoid(self.gate_slope * z.float()))[:, :, None]).to(self.dtype)
        site.watch("o", y := y.flatten(1))
        y, parallel = (
            F.linear(y, site.weights[1]),
            site.delta("o"),
        )  # the adapter reads the sublayer's input, as #1855's does
        return (y if parallel is None else y + parallel(n)), (k, v)

    def mlp(self, n: Tensor, site: Site) -> Tensor:
        """n (T, d) -> (T, d)."""
        out, hidden = mlp(n, *site.weights[2:4], self.cfg.leaky_relu_sq_slope)
        site.watch("up", n)
        site.watch("down", hidden)
        parallel = site.delta("mlp")
        return out if parallel is None else out + parallel(n)

    def nll(self, hidden: Tensor, targets: Tensor, *, lora=None, hint: Tensor | None = None) -> Scores:
        """hidden (T, d), targets (T,) int64 -> nats per token; with hint (T,) int64 also the log-probability of the hinted token."""
        z, delta = F.linear(hidden, self.tok_emb.to(self.dtype)), lora.at("head", 0) if lora is not None else None
        z = z if delta is None else z + delta(hidden)
        if self.calibration is not None:
            logits = self.calibration[0] * softcap(z, self.caps) + self.calibration[1]
            lse = logits.logsumexp(-1)
            nats = lse - logits.gather(1, targets[:, None])[:, 0]
            return Scores(nats, None if hint is None else logits.gather(1, hint[:, None])[:, 0] - lse)
        nats, lse = softcap_nll(z, targets, self.caps)
        return Scores(nats, None if hint is None else softcap(z.gather(1, hint[:, None])[:, 0], self.caps) - lse)

    def loss(self, hidden: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
        """Sum of nll() times weight (T,) fp32."""
        if self.calibration is not None:
            return torch.dot(self.nll(hidden, targets).nats, weight)
        return head_loss(hidden, self.tok_emb.to(self.dtype), targets, self.caps, weight)


# ======== Adapters: LoRA stacked over visits and documents ====================================================================================================


class LoRA(NamedTuple):
    """One adapter for each visit and document: delta(x) = scale x A B. Leaves of autograd, never module parameters, so the model stays unaware.
    In this order of dimensions their gradients come out of the products contiguous, as the fused optimizer needs them."""

    a: dict[str, list[Tensor]]  # kind -> for each visit (documents, in, rank) fp32
    b: dict[str, list[Tensor]]  # kind -> for each visit (documents, rank, out) fp32
    widths: dict[str, int]  # kind -> out, of every kind, adapted or not
    scale: float  # alpha / rank

    def at(self, kind: str, visit: int) -> Callable | None:
        """The delta of one site as a function of its input (documents * n, in); None where nothing is adapted. "qkv" joins three kinds."""
        kinds = ("q", "k", "v") if kind == "qkv" else (kind,)
        if not any(k in self.a for k in kinds):
            return None
        return lambda x: torch.cat(
            [self.delta(k, visit, x) if k in self.a else x.new_zeros(x.size(0), self.widths[k]) for k in kinds], dim=-1
        )

    def delta(self, kind: str, visit: int, x: Tensor) -> Tensor:
        a, b = self.a[kind][visit].to(x.dtype), (self.scale * self.b[kind][visit]).to(x.dtype)
        return (x.unflatten(0, (a.size(0), -1)) @ a @ b).flatten(0, 1)

    def leaves(self) -> list[Tensor]:
        return [t for part in (self.a, self.b) for visits in part.values() for t in visits]

    def first(self, documents: int) -> "LoRA":
        """The adapters of the first documents: leaves of their own in the same memory."""
        cut = lambda part: {
            kind: [t.detach()[:documents].requires_grad_() for t in visits] for kind, visits in part.items()
        }
        return self._replace(a=cut(self.a), b=cut(self.b))


def new_lora(model: GPT, documents: int, masked: frozenset, rank: int, alpha: float, seed: int) -> LoRA:
    """A uniform in +-1/sqrt(in) and the same for every document, so that no score depends on the batch a document is in; B zero."""
    d, visits = model.cfg.model_dim, len(model.schedules[model.cfg.looped])
    widths = {"q": model.q_dim, "k": model.kv_dim, "v": model.kv_dim, "o": d, "mlp": d, "head": model.cfg.vocab_size}
    generator, device, a, b = torch.Generator().manual_seed(seed), model.tok_emb.device, {}, {}
    for kind, width in widths.items():
        n = 1 if kind == "head" else visits
        initial = (2 * torch.rand(n, 1, d, rank, generator=generator) - 1) / math.sqrt(d)
        if kind not in masked:
            a[kind] = [t.repeat(documents, 1, 1).requires_grad_() for t in initial.to(device)]
            b[kind] = [torch.zeros(documents, rank, width, device=device).requires_grad_() for _ in range(n)]
    return LoRA(a, b, widths, alpha / rank)


# ======== Optimizers: Muon for matrices, Adam for the rest, the averaged weights ==============================================================================

MUON_COEFFICIENTS = {  # (a, b, c) of each iteration
    "polar_express": (  # arXiv 2505.16932, #1344
        (8.156554524902461, -22.48329292557795, 15.878769915207462),
        (4.042929935166739, -2.808917465908714, 0.5000178451051316),
        (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
        (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
        (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
    ),
    "newton_schulz": ((3.4445, -4.7750, 2.0315),) * 5,
}


def orthogonalize(u: Tensor, coefficients: tuple) -> Tensor:
    """Nearest semi-orthogonal matrices of u (n, rows, cols), by one odd quintic iteration for each (a, b, c). Five of Polar Express leave singular values
    within about 0.1 of 1, five of the constant ones within about 0.3."""
    x, wide = u / (u.norm(dim=(1, 2), keepdim=True) + 1e-7), u.size(1) <= u.size(2)
    for a, b, c in coefficients:  # the Gram matrix of the shorter side
        gram = x @ x.mT if wide else x.mT @ x
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, *((polynomial, x) if wide else (x, polynomial)), beta=a)
    return x


class MuonGroup:
    """Matrices of one shape out of several parameters: blocks are (parameter, first row, end row), all layers each."""

    def __init__(self, blocks: list[tuple[nn.Parameter, int, int]], world: int, dtype: torch.dtype):
        self.blocks = blocks
        self.rows, self.cols = blocks[0][2] - blocks[0][1], blocks[0][0].size(2)
        self.count = sum(p.size(0) for p, _, _ in blocks)
        self.shard = -(-self.count // world)  # matrices of one rank; the last rank's may be padding
        self.padded = self.shard * world
        self.momentum = torch.zeros(self.shard, self.rows, self.cols, dtype=dtype, device=blocks[0][0].device)
        self.scale = math.sqrt(max(1.0, self.rows / self.cols))

    def gradient(self) -> Tensor:
        """(padded, rows, cols) in the momentum's dtype."""
        pieces = [p.grad[:, lo:hi].to(self.momentum.dtype) for p, lo, hi in self.blocks]
        return torch.cat([*pieces, self.momentum.new_zeros(self.padded - self.count, self.rows, self.cols)])

    def apply_(self, update: Tensor, lr: float, wd: float):
        at = 0
        for p, lo, hi in self.blocks:
            p[:, lo:hi].mul_(1 - lr * wd).add_(update[at : at + p.size(0)], alpha=-lr * self.scale)
            at += p.size(0)


class Optimizer:
    """One step: reduce the summed gradients over the ranks, clip their global norm, update. Muon's matrices are sharded over the ranks.
    Gradients must hold the sum over this rank's tokens of the loss divided by the global number of tokens."""

    def __init__(self, model: GPT, cfg: Config, ranks: Ranks):
        self.cfg, self.ranks, self.model, self.parameters = cfg, ranks, model, list(model.parameters())
        q, kv, shapes, dtype = (
            model.q_dim,
            model.kv_dim,
            {},
            torch.bfloat16 if ranks.device.type == "cuda" else torch.float32,
        )
        blocks = [
            (model.qkv, 0, q),
            (model.qkv, q, q + kv),
            (model.qkv, q + kv, q + 2 * kv),
            *((p, 0, p.size(1)) for p in (model.o, model.up, model.down)),
        ]
        for p, lo, hi in blocks:  # one group for each shape: q and o, k and v, up, down where the widths differ
            shapes.setdefault((hi - lo, p.size(2)), []).append((p, lo, hi))
        self.muon = sorted(
            (MuonGroup(blocks, ranks.world, dtype) for blocks in shapes.values()), key=lambda g: -g.momentum.numel()
        )  # communication hides best
        in_muon = {id(p) for g in self.muon for p, _, _ in g.blocks}
        self.small = [p for p in self.parameters if id(p) not in in_muon]
        covered = sum(p.numel() for p in self.small) + sum(g.count * g.rows * g.cols for g in self.muon)
        assert covered == sum(p.numel() for p in self.parameters), (
            "every element of every parameter needs exactly one rule"
        )
        rules = (
            ([model.tok_emb], cfg.tied_embed_lr, cfg.embed_wd),
            ([p for p in self.small if p is not model.tok_emb and p is not model.caps], cfg.scalar_lr, cfg.adam_wd),
            ([model.caps] if cfg.asym_logit_rescale else [], cfg.scalar_lr, 0.0),
        )
        self.adam = torch.optim.AdamW(
            [{"params": params, "base_lr": lr, "lr": lr, "weight_decay": wd} for params, lr, wd in rules if params],
            betas=(cfg.beta1, cfg.beta2),
            eps=cfg.adam_eps,
            fused=True,
        )
        self.average = [torch.zeros_like(p) for p in self.parameters] if cfg.ema_decay else []
        self.averaged_steps = 0

    def reset(self):
        """Forget everything: momentum, Adam's moments and the average."""
        for t in (*(g.momentum for g in self.muon), *self.average):
            t.zero_()
        self.adam.state.clear()
        self.averaged_steps = 0

    @torch.no_grad()
    def step(self, step: int, lr_scale: float):
        for p in self.parameters:  # a rank without a micro-batch still joins the sums
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        shards, waits = self.reduce_scatter()
        for p, grad in zip(self.small, self.ranks.all_reduce_flat([p.grad for p in self.small])):
            p.grad = grad
        for wait in waits:
            wait.wait()
        clip = self.clip_factor(shards)
        torch._foreach_mul_([p.grad for p in self.small], clip)
        warm = min(step / self.cfg.muon_momentum_warmup_steps, 1.0) if self.cfg.muon_momentum_warmup_steps else 1.0
        momentum = (1 - warm) * self.cfg.muon_momentum_warmup_start + warm * self.cfg.muon_momentum
        updates = [self.direction(g, shard * clip.to(shard.dtype), momentum) for g, shard in zip(self.muon, shards)]
        gathered = [self.gather(g, u) for g, u in zip(self.muon, updates)]
        for group in self.adam.param_groups:
            group["lr"] = group["base_lr"] * lr_scale
        self.adam.step()
        for g, (update, wait) in zip(self.muon, gathered):
            if wait is not None:
                wait.wait()
            g.apply_(update, self.cfg.matrix_lr * lr_scale, self.cfg.muon_wd)
        for p in self.parameters:
            p.grad = None
        if self.average:
            torch._foreach_lerp_(self.average, self.parameters, 1 - self.cfg.ema_decay)
            self.averaged_steps += 1

    def reduce_scatter(self) -> tuple[list[Tensor], list]:
        """This rank's shard of each Muon group's summed gradient, and what to wait for."""
        full = [g.gradient() for g in self.muon]
        if self.ranks.world == 1:
            return full, []
        if self.ranks.device.type == "cpu":  # gloo has no reduce_scatter
            return [
                self.ranks.all_reduce_(t)[self.ranks.rank * g.shard : (self.ranks.rank + 1) * g.shard]
                for t, g in zip(full, self.muon)
            ], []
        shards = [torch.empty_like(g.momentum) for g in self.muon]
        return shards, [dist.reduce_scatter_tensor(s, t, async_op=True) for s, t in zip(shards, full)]

    def clip_factor(self, shards: list[Tensor]) -> Tensor:
        """min(1, GRAD_CLIP_NORM / norm of the whole reduced gradient), a scalar on the device."""
        if not self.cfg.grad_clip_norm:
            return torch.ones((), device=self.ranks.device)
        norms = torch._foreach_norm(shards, dtype=torch.float32)
        squares = self.ranks.all_reduce_(torch.stack(norms).square().sum())
        squares = squares + torch.stack(torch._foreach_norm([p.grad for p in self.small])).square().sum()
        return (self.cfg.grad_clip_norm / (squares.sqrt() + 1e-6)).clamp(max=1.0)

    def direction(self, group: MuonGroup, grad: Tensor, momentum: float) -> Tensor:
        """Nesterov momentum, row normalisation (MuonEq-R), orthogonalisation of this rank's matrices (n, rows, cols)."""
        group.momentum.mul_(momentum).add_(grad)
        u = grad.add_(group.momentum, alpha=momentum)
        if self.cfg.muon_row_normalize:
            u = u / torch.linalg.vector_norm(u, dim=-1, keepdim=True, dtype=torch.float32).clamp_min(1e-7).to(u.dtype)
        return orthogonalize(u, MUON_COEFFICIENTS[self.cfg.muon_coefficients][: self.cfg.muon_backend_steps])

    def gather(self, group: MuonGroup, update: Tensor):
        if self.ranks.world == 1:
            return update, None
        full = update.new_empty(group.padded, group.rows, group.cols)
        return full, dist.all_gather_into_tensor(full, update.contiguous(), async_op=True)

    @torch.no_grad()
    def use_average(self):
        """Put the debiased average into the model: average / (1 - decay^steps), so that a short run is not averaged with zeros."""
        if self.averaged_steps:
            correction = 1 - self.cfg.ema_decay**self.averaged_steps
            for p, average in zip(self.parameters, self.average):
                p.copy_(average / correction)


# ======== Training ============================================================================================================================================


class Schedule:
    """Everything that depends on progress in [0, 1): learning rate, loops, attention span."""

    def __init__(self, cfg: Config):
        self.cfg, self.stages = cfg, context_schedule(cfg)

    def looped(self, progress: float) -> bool:
        return self.cfg.num_loops > 0 and progress >= self.cfg.enable_looping_at

    def span(self, progress: float) -> int:
        return next(length for end, length in self.stages if progress < end)

    def lr_scale(self, progress: float) -> float:
        if self.cfg.warmdown_frac <= 0 or progress < 1 - self.cfg.warmdown_frac:
            return 1.0
        return max((1 - progress) / self.cfg.warmdown_frac, self.cfg.min_lr)

    def ramp(self, step: int, changed_at: int | None) -> float:
        """Extra factor after a change of span at step ``changed_at``: 1/n, 2/n, ..., 1."""
        n = self.cfg.seq_change_warmup_steps
        return 1.0 if changed_at is None or n == 0 else min((step - changed_at + 1) / n, 1.0)


def score_batch(model: GPT, batch: Batch, looped: bool, hint: Tensor | None = None) -> Scores:
    """Scores of every target of the batch, (tokens,) each; hint int64 (tokens,). Those of padding mean nothing."""
    hidden = model.trunk(batch.tokens, batch.seq, looped=looped)
    return model.nll(hidden, batch.targets.clamp(min=0), hint=hint)


def batch_loss(model: GPT, batch: Batch, total: int, looped: bool) -> Tensor:
    """Sum of nats over this micro-batch's targets / ``total``, the tokens of the global batch."""
    hidden, weight = model.trunk(batch.tokens, batch.seq, looped=looped), (batch.targets >= 0).float() / total
    return model.loss(hidden, batch.targets.clamp(min=0), weight)


class Trainer:
    """Everything a training run holds: data, optimizer, schedule, and the curve it leaves."""

    def __init__(self, model: GPT, cfg: Config, ranks: Ranks, log: Log, phases: Phases):
        self.model, self.cfg, self.ranks, self.log, self.phases = model, cfg, ranks, log, phases
        self.stream = TrainStream(cfg)
        self.optimizer = Optimizer(model, cfg, ranks)
        self.schedule = Schedule(cfg)
        self.curve = []  # (step, seconds, loss, learning-rate factor) of every logged step

    def gradients(self, batches: list[Batch], looped: bool) -> Tensor:
        """Backward through this rank's micro-batches; returns their part of the loss, on the device."""
        loss = torch.zeros((), device=self.ranks.device)
        for batch in batches:
            assert batch.split == "train"
            part = batch_loss(self.model, batch, self.cfg.train_batch_tokens, looped)
            part.backward()
            loss += part.detach()
        return loss

    def warm_up(self):
        """Run steps of both schedules on real shapes, so that kernels are compiled and libraries set up, then restore weights and optimizer entirely."""
        saved = [p.detach().clone() for p in self.model.parameters()]
        fetch = Prefetch(self.stream, self.ranks)
        for looped in sorted({self.schedule.looped(0.0), self.schedule.looped(1.0)}):
            for step in range(self.cfg.warmup_steps):
                self.gradients(fetch(step, self.cfg.train_seq_len), looped)
                self.optimizer.step(step, 1.0)
        with torch.no_grad():
            torch._foreach_copy_(list(self.model.parameters()), saved)
        self.optimizer.reset()

    def run(self) -> dict:
        """Train until the budget or ITERATIONS ends, leave the averaged weights in the model, return the counts."""
        cfg, fetch, timed = self.cfg, Prefetch(self.stream, self.ranks), self.cfg.max_wallclock_seconds > 0
        budget = cfg.max_wallclock_seconds - cfg.gptq_reserve_seconds
        clock, step, span, changed_at, looped = Clock(self.ranks), 0, None, None, False
        while step < cfg.iterations:
            now = clock.tick()
            if timed and now + now / max(step, 1) > budget:
                break
            progress = now / budget if timed else step / cfg.iterations
            if self.schedule.looped(progress) != looped:
                looped = True
                self.log(
                    f"step {step}: loops on at progress {progress:.3f}, visits {[v.layer for v in self.model.schedules[True]]}"
                )
            if span != self.schedule.span(progress):
                changed_at = None if span is None else step
                span = self.schedule.span(progress)
                self.log(f"step {step}: attention span {span}")
            scale = self.schedule.lr_scale(progress) * self.schedule.ramp(step, changed_at)
            loss = self.gradients(fetch(step, span), looped)
            self.optimizer.step(step, scale)
            clock.step_done()
            step += 1
            if step <= 5 or step % cfg.train_log_every == 0:
                loss, seconds = self.ranks.all_reduce_(loss.clone()).item(), time.perf_counter() - clock.start
                require(math.isfinite(loss), f"the loss is {loss} at step {step}; lower MATRIX_LR or TIED_EMBED_LR")
                rate = seconds / step
                left = budget - seconds if timed else (cfg.iterations - step) * rate
                self.curve.append((step, round(seconds, 3), loss, scale))
                self.log(
                    f"step {step:6d}  {100 * progress:5.1f} %  loss {loss:.4f}  lr x {scale:.3f}  {1e3 * rate:7.1f} ms/step  "
                    f"{cfg.train_batch_tokens / rate:11,.0f} tokens/s  {seconds:6.1f} s, {max(left, 0):.0f} s left"
                )
        seconds = clock.stop()
        self.optimizer.use_average()
        tokens = step * cfg.train_batch_tokens
        self.log(
            f"trained {step} steps, {tokens:,} tokens in {seconds:.1f} s: {1e3 * seconds / max(step, 1):.1f} ms/step, {tokens / seconds:,.0f} tokens/s"
            f"{' (averaged weights)' if cfg.ema_decay else ''}"
        )
        return {
            "steps": step,
            "tokens": tokens,
            "seconds": seconds,
            "epochs": tokens / self.stream.tokens,
            "curve": self.curve,
        }


# ======== Quantizer ===========================================================================================================================================


class MatrixKind(NamedTuple):
    """How one kind of matrix is quantised."""

    hessian: str  # which tap weighs its rounding error
    bits: str  # settings that hold its symbol range, its step, and how far rows differ by their share in the loss
    sigmas: str
    rows: str


MATRICES = {
    "qkv": MatrixKind("qkv", "matrix_bits", "attn_clip_sigmas", "rate_rows"),
    "o": MatrixKind("o", "matrix_bits", "attn_clip_sigmas", "rate_rows"),
    "up": MatrixKind("up", "matrix_bits", "mlp_clip_sigmas", "rate_rows"),
    "down": MatrixKind("down", "matrix_bits", "mlp_clip_sigmas", "rate_rows"),
    "tok_emb": MatrixKind("head", "embed_bits", "embed_clip_sigmas", "rate_embed_rows"),
}
FOLDED = {"attn_scale": "o", "mlp_scale": "down"}  # vectors that become part of the rows of a matrix
SYMBOL_MAX = 127
SCALE_STEPS, COLUMN_STEPS = 16, 4  # codes per octave of the scales of rows, 4.4 % apart, and of columns, 19 %


def binary_roots(n: int) -> list[int]:
    """2**(i/n) * 2**60 for i < n; decimal's exp and ln are correctly rounded, so every machine agrees."""
    return [int((Decimal(2).ln() * i / n).exp() * 2**60) for i in range(n)]


def quantize_scales(scale: np.ndarray) -> np.ndarray:
    """Positive float scales to int16 codes; quantise the weights with dequantize_scales(codes), and the rounding costs nothing but 2 % of step."""
    return np.clip(np.rint(np.log2(np.maximum(scale, 1e-30)) * SCALE_STEPS), -1600, 1600).astype(np.int16)


def dequantize_scales(codes: np.ndarray) -> np.ndarray:
    """2**(code / 16), float32, equal on every machine."""
    roots = np.array(binary_roots(SCALE_STEPS), np.float64) / (1 << 60)
    codes = codes.astype(np.int64)
    return np.ldexp(roots[codes % SCALE_STEPS], codes // SCALE_STEPS).astype(np.float32)


def batch_moments(model: GPT, batch: Batch, seed: int, rows: bool) -> dict[str, Tensor]:
    """Sums of x x^T over the tokens at the input of every matrix, {kind: (layers, in, in) fp32}; visits of one layer add up.
    With ``rows`` also {"NAME.rows": the matrices' shape without columns}: squared gradients of matrix rows, summed over tokens as if each had a backward pass of its own. One pass
    estimates that sum, since the tokens' losses get random signs."""
    cols = {kind.hessian: getattr(model, name).size(-1) for name, kind in MATRICES.items()}
    sums = {
        kind: torch.zeros(1 if kind == "head" else model.cfg.num_layers, n, n, device=model.tok_emb.device)
        for kind, n in cols.items()
    }

    def tap(kind: str, layer: int, x: Tensor):
        x = x.detach().float()
        sums[kind][layer].addmm_(x.T, x)

    with torch.set_grad_enabled(rows):
        hidden = model.trunk(batch.tokens, batch.seq, looped=model.cfg.looped, tap=tap)
        tap("head", 0, hidden)
        if rows:
            signs = (
                torch.randint(0, 2, batch.targets.shape, generator=torch.Generator().manual_seed(seed)).to(
                    batch.targets.device
                )
                * 2
                - 1
            )
            nats = model.nll(hidden, batch.targets.clamp(min=0)).nats
            gradients = torch.autograd.grad(
                (nats * signs * (batch.targets >= 0)).sum(), [getattr(model, name) for name in MATRICES]
            )
            sums |= {f"{name}.rows": gradient.square().sum(-1) for name, gradient in zip(MATRICES, gradients)}
    return sums


def collect_hessians(model: GPT, stream: TrainStream, cfg: Config, ranks: Ranks) -> dict[str, Tensor]:
    """Mean of batch_moments over GPTQ_CALIBRATION_BATCHES, spread evenly over the training stream; RATE_DISTORTION alone needs the rows.
    Batches are dealt to the ranks and added in the same order everywhere, so the sums depend on the number of ranks no more than two runs on one rank differ."""
    total, batches, micro = {}, cfg.gptq_calibration_batches, cfg.micro_batch_tokens
    for first in range(0, batches, ranks.world):
        i = min(first + ranks.rank, batches - 1)  # a rank too many repeats the last one, which nobody asks it for
        batch = stream.micro_batch(i * max(stream.tokens - micro, 1) // batches, micro, cfg.train_seq_len)
        mine = batch_moments(model, to_device(batch, ranks.device), i, cfg.rate_distortion)
        for rank in range(min(ranks.world, batches - first)):
            for kind, sums in mine.items():
                total[kind] = total.get(kind, 0) + ranks.broadcast_(
                    sums if rank == ranks.rank else torch.empty_like(sums), rank
                )
    return {kind: sums / batches for kind, sums in total.items()}


def error_feedback(hessian: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """hessian (n, cols, cols) -> the order of columns (n, cols), by falling diagonal, and upper Cholesky factors of the inverses in that order, fp32.
    The mean diagonal times damping is added, in fp64. Activations span many orders of magnitude: where rounding has made a Hessian indefinite, its damping
    grows tenfold until it is not. An input that never fires counts as one of variance 1."""
    h = hessian.double()
    diagonal = h.diagonal(dim1=1, dim2=2)
    diagonal.add_(diagonal == 0)
    order = diagonal.argsort(dim=1, descending=True, stable=True)
    h = h.gather(1, order[:, :, None].expand_as(h)).gather(2, order[:, None].expand_as(h))
    mean = diagonal.mean(1)
    damp = torch.full_like(mean, damping)
    for _ in range(8):
        lower, info = torch.linalg.cholesky_ex(h + torch.diag_embed((damp * mean)[:, None].expand(-1, h.size(1))))
        if not info.any():
            return order, torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True).float()
        damp = torch.where(info > 0, (10 * damp).clamp_min(1e-6), damp)
    raise RuntimeError("a Hessian is not positive definite; raise GPTQ_DAMPING")


def gptq_block(w: Tensor, upper: Tensor, step: Tensor, column: Tensor, top: Tensor) -> tuple[Tensor, Tensor]:
    """Symbols and errors, like w, of w (n, block, rows); upper (n, block, block), step (n, rows), column and top (n, block), all fp32, as in gptq.
    Six small kernels for each column, which neither wait for the GPU nor depend on a value: so it can replay them as a CUDA graph."""
    w, scale, top = w.clone(), step[:, None] * column[:, :, None], top[:, :, None]
    symbols, errors = torch.empty_like(w), torch.empty_like(w)
    columns = zip(
        *(t.split(1, dim=1) for t in (w, scale, -top, top, symbols, errors, upper.diagonal(dim1=1, dim2=2)[:, :, None]))
    )
    for j, (x, size, low, high, s, e, pivot) in enumerate(columns):
        torch.div(x, size, out=s).round_().clamp_(low, high)
        torch.addcmul(x, s, size, value=-1, out=e).div_(pivot)
        w[:, j + 1 :].addcmul_(e, upper[:, j, j + 1 :, None], value=-1)
    return symbols, errors


def gptq(
    w: Tensor, hessian: Tensor, step: Tensor, limit: int, damping: float, column: Tensor | None = None, block: int = 128
) -> Tensor:
    """Round w (n, rows, cols) to multiples of step (n, rows), feeding each column's error to the columns not yet rounded (GPTQ, arXiv 2210.17323).
    hessian (n, cols, cols) fp32 is the second moment of the inputs. column (n, cols): factors of the step; where one is below 1, symbols may reach SYMBOL_MAX
    instead of limit. Returns symbols int16. Columns go in order of falling diagonal; one whose input never fires is zero."""
    order, upper = error_feedback(hessian, damping)
    w = w.float().mT.masked_fill((hessian.diagonal(dim1=1, dim2=2) == 0)[:, :, None], 0.0)
    w = w.gather(1, order[:, :, None].expand_as(w))  # (n, cols, rows): a column lies in one piece
    column = torch.ones_like(upper[:, 0]) if column is None else column.gather(1, order)
    top, symbols, graph = (
        torch.where(column < 1, SYMBOL_MAX, limit).float(),
        torch.empty_like(w, dtype=torch.int16),
        None,
    )
    for lo in range(0, w.size(1), block):
        at, rest = slice(lo, lo + block), slice(lo + block, None)
        parts, whole = (w[:, at], upper[:, at, at], step, column[:, at], top[:, at]), lo + block <= w.size(1)
        if w.is_cuda and whole and lo == block:  # the first block has loaded the kernels
            held, graph = [t.clone() for t in parts], torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                found = gptq_block(*held)
        if graph and whole:
            torch._foreach_copy_(held, parts)
            graph.replay()
        else:
            found = gptq_block(*parts)
        symbols[:, at] = found[0]
        w[:, rest].baddbmm_(upper[:, at, rest].mT, found[1], alpha=-1)
    return symbols.gather(1, order.argsort(dim=1)[:, :, None].expand_as(symbols)).mT.contiguous()


@torch.no_grad()
def folded_state(model: GPT) -> dict[str, Tensor]:
    """Parameters by name (fp32), the sublayer scales multiplied into the rows they scale and set to one."""
    state = {name: p.detach().clone() for name, p in model.named_parameters()}
    for vector, matrix in FOLDED.items():
        state[matrix] *= state[vector][:, :, None]
        state[vector].fill_(1.0)
    return state


class Steps(NamedTuple):
    """The quantiser's step of weight (layer, row, column) is row * column."""

    row: Tensor  # (layers, rows) fp32
    column: Tensor  # (layers, cols) fp32
    limit: int  # largest symbol


def clip_steps(
    model: GPT, weights: dict[str, Tensor], hessians: dict[str, Tensor], cfg: Config, saved: float
) -> dict[str, Steps]:
    """The published recipe: *_CLIP_SIGMAS standard deviations of a row over the symbol range (#1394), times 2**saved. AWQ-lite (#1908): the groups of columns
    with the largest sum of activation RMS times mean weight, AWQ_LITE_GROUP_TOP_K of all matrices, get the steps of AWQ_LITE_BITS."""
    steps, scores = {}, []
    visits = torch.bincount(torch.tensor([v.layer for v in model.schedules[cfg.looped]]), minlength=cfg.num_layers).to(
        model.tok_emb.device
    )
    for name, kind in MATRICES.items():
        w, bits, size = weights[name], getattr(cfg, kind.bits), cfg.awq_lite_group_size
        limit = 2 ** (bits - 1) - 1
        diagonal = hessians[kind.hessian].diagonal(dim1=1, dim2=2)
        steps[name] = Steps(
            (2**saved * getattr(cfg, kind.sigmas) * w.std(2) / limit).clamp_min(1e-6), torch.ones_like(diagonal), limit
        )
        if cfg.awq_lite_enabled and bits < cfg.awq_lite_bits and size <= w.size(2):
            groups = (
                ((diagonal / (visits[:, None] if len(w) > 1 else 1)).sqrt() * w.abs().mean(1))
                .unfold(1, size, size)
                .sum(2)
                .tolist()
            )
            scores += [(score, name, layer, at) for layer, row in enumerate(groups) for at, score in enumerate(row)]
    for _, name, layer, at in sorted(scores, reverse=True)[: cfg.awq_lite_group_top_k]:
        fine = 2.0 ** (getattr(cfg, MATRICES[name].bits) - cfg.awq_lite_bits)
        steps[name].column[layer, at * cfg.awq_lite_group_size : (at + 1) * cfg.awq_lite_group_size] = fine
    return steps


def rate_distortion_steps(
    model: GPT, weights: dict[str, Tensor], hessians: dict[str, Tensor], cfg: Config, saved: float
) -> dict[str, Steps]:
    """Steps at which one more bit anywhere lowers the loss by the same amount (reverse water-filling), for ARTIFACT_CAP bytes less ``saved`` bits a weight.
    Rounding adds sum_r g_r dW_r H dW_r^T / 2 to the loss, g_r being the mean squared gradient of output r. GPTQ leaves dW_r H dW_r^T = sum_j d_j step_rj^2 / 12,
    d_j being the squared diagonal of H's Cholesky factor, and a bit halves a step: g_r d_j step_rj^2 must be the same everywhere. Matrices differ by the mean of
    g_r; its spread over rows, rarely used ones known badly, enters to the power RATE_ROWS. A Gaussian row takes log2(1 + 2 pi e (sigma / step)^2) / 2 bits a weight."""
    steps, rates = {}, []
    folded = {matrix: getattr(model, vector).detach() for vector, matrix in FOLDED.items()}
    for name, kind in MATRICES.items():
        w, h = weights[name], hessians[kind.hessian]
        order, upper = error_feedback(h, cfg.gptq_damping)
        log_d = -2 * upper.diagonal(dim1=1, dim2=2).gather(1, order.argsort(dim=1)).log2()
        g = hessians[f"{name}.rows"].view(w.shape[:2]) / (
            folded[name].square().clamp_min(1e-6) if name in folded else 1
        )
        mean = g.mean(1, keepdim=True).clamp_min(1e-20)
        g = (
            (g / mean + 0.1).pow(getattr(cfg, kind.rows))
            * mean
            / h.diagonal(dim1=1, dim2=2).sum(1, keepdim=True).clamp_min(1e-20)
        )
        level = log_d.mean(1, keepdim=True)
        column = (
            ((level - log_d) * (COLUMN_STEPS * cfg.rate_columns / 2))
            .round()
            .clamp(-SYMBOL_MAX, SYMBOL_MAX)
            .div(COLUMN_STEPS)
            .exp2()
        )
        finest = (w.abs() / column[:, None]).amax(2) / (0.97 * SYMBOL_MAX)
        steps[name] = Steps(((-level - g.log2()) / 2).exp2(), column, SYMBOL_MAX)
        rates.append((steps[name].row, finest.clamp_min(1e-12), w.std(2), w.size(2)))
    low, high, budget = -60.0, 60.0, 8 * cfg.artifact_cap - saved * sum(w.numel() for w in weights.values())
    for _ in range(40):
        middle = (low + high) / 2
        spent = sum(
            float(
                (
                    0.5 * n * (1 + 2 * math.pi * math.e * (sigma / (row * 2**middle).maximum(finest)).square()).log2()
                ).sum()
            )
            for row, finest, sigma, n in rates
        )
        low, high = (middle, high) if spent > budget else (low, middle)
    return {
        name: s._replace(row=(s.row * 2**high).maximum(finest))
        for (name, s), (_, finest, _, _) in zip(steps.items(), rates)
    }


def lqer(error: Tensor, hessian: Tensor, cfg: Config) -> tuple[dict[str, np.ndarray], float]:
    """A correction A B of rank LQER_RANK for ``error`` (rows, cols): A int2 of one scale, B int4 of one scale for LQER_ASYM_GROUP values (#1797).
    It is the best in the norm tr(E H E^T), H by LQER_WEIGHT. Returns its arrays by suffix and the squared norm it removes for each byte."""
    h = {"none": torch.eye(len(hessian)).to(hessian), "diagonal": hessian.diagonal().diag(), "hessian": hessian}[
        cfg.lqer_weight
    ].double()
    lower = torch.linalg.cholesky(
        h + (cfg.gptq_damping + 1e-6) * h.diagonal().mean().clamp_min(1e-30) * torch.eye(len(h)).to(h)
    )
    weighted = error.double() @ lower
    v = torch.linalg.eigh(weighted.T @ weighted)[1].flip(1)[:, : cfg.lqer_rank]
    a, b = weighted @ v, torch.linalg.solve_triangular(lower, v.T, upper=False, left=False)
    groups = F.pad(b.flatten(), (0, -b.numel() % cfg.lqer_asym_group)).view(-1, cfg.lqer_asym_group)
    scales = torch.cat((a.abs().max()[None] / 1.5, groups.abs().amax(1) / 7.5)).clamp(1e-7, 6e4).half()
    a, b = (a / scales[0]).round().clamp(-2, 1), (groups / scales[1:, None]).round().clamp(-8, 7)
    arrays = {
        "lqer_a": a.to(torch.int8).cpu().numpy(),
        "lqer_b": b.to(torch.int8).cpu().numpy(),
        "lqer_scales": scales.cpu().numpy(),
    }
    rest = (error - lqer_product(arrays, len(h)).to(error.device)).double() @ lower
    return arrays, float(weighted.square().sum() - rest.square().sum()) / (
        a.numel() / 4 + b.numel() / 2 + 2 * len(scales)
    )


def lqer_product(arrays: dict[str, np.ndarray], cols: int) -> Tensor:
    """A B (rows, cols) fp32 of lqer's arrays."""
    a, b, scales = (torch.from_numpy(arrays[name].astype(np.float32)) for name in ("lqer_a", "lqer_b", "lqer_scales"))
    return scales[0] * a @ (b * scales[1:, None]).flatten()[: a.size(1) * cols].view(-1, cols)


def add_corrections(
    arrays: dict[str, np.ndarray], weights: dict[str, Tensor], hessians: dict[str, Tensor], cfg: Config
):
    """LQER for the LQER_TOP_K matrices with the largest Frobenius error; by LQER_GAIN_SELECT those of four times as many that gain most for each byte."""
    errors = {
        (name, layer): w[layer] - dequantize_matrix(arrays, name, layer).to(w.device)
        for name, w in weights.items()
        for layer in range(len(w))
    }
    largest = sorted(errors, key=lambda at: -errors[at].norm().item())[
        : cfg.lqer_top_k * (4 if cfg.lqer_gain_select else 1)
    ]
    found = [(lqer(errors[at], hessians[MATRICES[at[0]].hessian][at[1]], cfg), at) for at in largest]
    if cfg.lqer_gain_select:
        found = sorted([f for f in found if f[0][1] > 0], key=lambda f: -f[0][1])[: cfg.lqer_top_k]
    for (parts, _), (name, layer) in found:
        arrays.update({f"{name}.{layer}.{suffix}": part for suffix, part in parts.items()})


def quantize(
    model: GPT, hessians: dict[str, Tensor], cfg: Config, ranks: Ranks, saved: float = 0.0
) -> dict[str, np.ndarray]:
    """The arrays of the artifact: KIND.LAYER.symbols int8 (rows, cols), KIND.LAYER.step int16 codes of rows and KIND.LAYER.column int8 codes of columns
    (where they are not all 1) and LQER's for matrices, int8 rows for gates where set, fp16 for the rest. A weight gets ``saved`` bits fewer than the settings
    say. Kinds are dealt to the ranks; each is solved whole by one of them, so the symbols do not depend on the number of ranks."""
    state, arrays = folded_state(model), {}
    weights = {name: state.pop(name) for name in MATRICES}
    weights = {name: w if w.ndim == 3 else w[None] for name, w in weights.items()}
    plan = rate_distortion_steps if cfg.rate_distortion else clip_steps
    for i, (name, steps) in enumerate(plan(model, weights, hessians, cfg, saved).items()):
        w, codes, owner = weights[name], quantize_scales(steps.row.cpu().numpy()), i % ranks.world
        step, symbols = (
            torch.from_numpy(dequantize_scales(codes)).to(w.device),
            torch.empty(w.shape, dtype=torch.int8, device=w.device),
        )
        if ranks.rank == owner:
            symbols = gptq(w, hessians[MATRICES[name].hessian], step, steps.limit, cfg.gptq_damping, steps.column).to(
                torch.int8
            )
        ranks.broadcast_(symbols, owner)
        for layer in range(len(w)):
            arrays[f"{name}.{layer}.symbols"], arrays[f"{name}.{layer}.step"] = (
                symbols[layer].cpu().numpy(),
                codes[layer],
            )
            column = (steps.column[layer].log2() * COLUMN_STEPS).round().to(torch.int8).cpu().numpy()
            if column.any():
                arrays[f"{name}.{layer}.column"] = column
    if cfg.lqer_enabled:
        add_corrections(arrays, weights, hessians, cfg)
    for name, value in state.items():
        if name == "attn_gate" and cfg.gated_attn_quant_gate:
            scale = (value.abs().amax(-1) / SYMBOL_MAX).clamp_min(1e-7).half()
            arrays["attn_gate.int8"] = (
                (value / scale[..., None]).round().clamp(-SYMBOL_MAX, SYMBOL_MAX).to(torch.int8).cpu().numpy()
            )
            arrays["attn_gate.scale"] = scale.cpu().numpy()
        elif name not in FOLDED:
            arrays[name] = value.half().cpu().numpy()
    return arrays


def dequantize_matrix(arrays: dict[str, np.ndarray], name: str, layer: int) -> Tensor:
    """One matrix of quantize's arrays, (rows, cols) fp32."""
    parts = {
        suffix: arrays.get(f"{name}.{layer}.{suffix}")
        for suffix in ("symbols", "step", "column", "lqer_a", "lqer_b", "lqer_scales")
    }
    w = parts["symbols"].astype(np.float32) * dequantize_scales(parts["step"])[:, None]
    if parts["column"] is not None:
        w *= dequantize_scales(parts["column"].astype(np.int64) * (SCALE_STEPS // COLUMN_STEPS))
    w = torch.from_numpy(w)
    return w if parts["lqer_a"] is None else w + lqer_product(parts, w.size(1))


def dequantize(arrays: dict[str, np.ndarray]) -> dict[str, Tensor]:
    """Inverse of quantize up to the rounding: parameters by name, fp32. Sublayer scales come back as ones."""
    state, layers = {}, {}
    for name, array in arrays.items():
        if name.endswith(".symbols"):
            layers[name.split(".")[0]] = layers.get(name.split(".")[0], 0) + 1
        elif name == "attn_gate.int8":
            state["attn_gate"] = torch.from_numpy(
                array.astype(np.float32) * arrays["attn_gate.scale"].astype(np.float32)[..., None]
            )
        elif "." not in name:
            state[name] = torch.from_numpy(array.astype(np.float32))
    for name, count in layers.items():
        state[name] = torch.stack([dequantize_matrix(arrays, name, layer) for layer in range(count)])
    state["tok_emb"] = state["tok_emb"][0]
    for vector, matrix in FOLDED.items():
        state[vector] = torch.ones(state[matrix].shape[:2])
    return state


def load_state(model: GPT, state: dict[str, Tensor], origin: Path):
    """Copy parameters by name into the model; a missing, unknown or misshapen one is an error that names the file they came from."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            shape = tuple(state[name].shape) if name in state else "no"
            if shape != tuple(p.shape):
                raise UserError(
                    f"{origin}: holds {shape} {name}, the settings ask for {tuple(p.shape)}; use the settings it was made with"
                )
            p.copy_(state[name])
    unknown = set(state) - {name for name, _ in model.named_parameters()} - {*FOLDED, "logit_calibration"}
    if unknown:
        raise UserError(
            f"{origin}: holds {', '.join(sorted(unknown))}, which the settings do not use; use the settings it was made with"
        )
    model.calibration = None
    if "logit_calibration" in state:
        model.calibration = calibration(
            state["logit_calibration"].to(model.tok_emb.device), piece_features(model.cfg).to(model.tok_emb.device)
        )


def piece_features(cfg: Config) -> Tensor:
    """What the tokenizer's pieces look like without their leading space: 14 overlapping categories (V, 14), 0 or 1 (#1924)."""
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_path(cfg)))
    features = torch.zeros(cfg.vocab_size, 14)
    for i in range(min(cfg.vocab_size, len(pieces))):
        piece = pieces.id_to_piece(i)
        text = piece.removeprefix("\u2581")
        size = len(text.encode())
        features[i] = torch.tensor(
            (
                size == 1,
                size == 2,
                size == 3,
                size == 4,
                5 <= size <= 8,
                size >= 9,
                text != piece,
                "\n" in text,
                any(map(str.isdigit, text)),
                text != "" and not any(c.isalnum() or c.isspace() for c in text),
                any(map(str.isalpha, text)),
                text.islower(),
                text.isupper(),
                text.istitle(),
            )
        )
    return features


def calibration(values: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
    """15 numbers -> the factor of the softcapped logits, 0.9..1.1, and what is added to them (V,), +-0.5 for each category."""
    return 0.9 + 0.2 * torch.sigmoid(values[0]), features @ values[1:].clamp(-0.5, 0.5)


def fit_logit_calibration(model: GPT, stream: TrainStream, cfg: Config, ranks: Ranks) -> np.ndarray:
    """The 15 numbers (fp32) of calibration() that suit the quantised model, from the first 131,072 training tokens; Adam, 256 steps (#1924)."""
    parts, micro, features = [], cfg.micro_batch_tokens, piece_features(cfg).to(ranks.device)
    with torch.no_grad():
        for at in range(0, min(131072, max(stream.tokens - micro, 1)), micro):
            batch = to_device(stream.micro_batch(at, micro, cfg.train_seq_len), ranks.device)
            parts += zip(model.trunk(batch.tokens, batch.seq, looped=cfg.looped).split(4096), batch.targets.split(4096))
    values = torch.zeros(15, device=ranks.device, requires_grad=True)
    optimizer = torch.optim.Adam([values], lr=0.003)
    for step in range(256):
        x, targets = parts[step % len(parts)]
        model.calibration = scale, _ = calibration(values, features)
        nats = model.nll(x, targets.clamp(min=0)).nats
        loss = (nats * (targets >= 0)).sum() / (targets >= 0).sum().clamp_min(1) + 0.01 * (
            values[1:].square().mean() + (scale - 1).square()
        )
        (values.grad,) = torch.autograd.grad(loss, [values])
        optimizer.step()
    model.calibration = None
    return ranks.broadcast_(values.detach().cpu()).numpy()


# ======== Artifact: entropy coder for quantised weights, tensor container =====================================================================================
#
# Rows of a weight matrix (or columns, where those live in the residual stream) are draws from a correlated Gaussian. The coder learns its
# covariance from what is already decoded, so a symbol's mean and variance follow from the earlier columns of its row, the earlier rows and the
# earlier matrices; nothing of this is stored. Encoder and decoder must agree to the bit on any machine, hence: matrix products only of integers
# held in float64 (exact in any order below 2**53), everything else element by element in IEEE arithmetic, logarithms and the Gaussian from integer
# tables, no libm.

LANES = 6144  # interleaved rANS states; a step codes one column of up to this many rows
REFRESH = 16  # columns between refreshes of the rows' gains
PROB_BITS = 14  # frequencies of a table add up to 2**14
SPAN, ESCAPE = 127, 255  # symbols are -127..127 around the predicted mean; code 255 escapes to a raw int16
PHASES = 8  # the predicted mean is kept to 1/8
LOG = 32  # steps per octave in fixed-point log2 of a variance
LOG_LOW, PER_OCTAVE, BUCKETS = -5, 8, 116  # variance buckets: 2**-5 upwards, 8 per octave
MIXTURES = (
    (4, 4, 4, 4),
    (3, 4, 4, 5),
    (2, 4, 4, 7),
    (1, 3, 5, 12),
)  # tail shapes: four equal Gaussians of these sigmas, in quarters
PRIORS = (
    (700, 0.6),
    (2500, 0.4),
    (0, 0.0),
)  # (rows the prior correlation counts for, its weight against identity); 0: variances alone


class ArtifactError(UserError):
    """The model file is damaged or not ours; the message names it and the remedy."""


def half_gaussian(steps: int = 1024, top: int = 9) -> np.ndarray:
    """Mass of N(0, 1) on [0, i/steps] times 2**30, int64 (steps * top + 1,), by the trapezoid rule; decimal's exp is correctly rounded everywhere."""
    density = [int((Decimal(-i * i) / (2 * steps**2)).exp() * 2**64) for i in range(steps * top + 1)]
    area = list(itertools.accumulate((a + b for a, b in zip(density, density[1:])), initial=0))
    return np.array([(a << 29) // area[-1] for a in area], np.int64)


def frequency_tables() -> np.ndarray:
    """Integer frequencies (mixtures, BUCKETS * PHASES, 256): a Gaussian mixture of the bucket's variance, integrated over unit bins."""
    root, half, tables = binary_roots(2 * PER_OCTAVE), half_gaussian(), []
    variance = [
        root[2 * (b % PER_OCTAVE) + 1] << b // PER_OCTAVE >> 20 - LOG_LOW for b in range(BUCKETS)
    ]  # of the middle, * 2**40
    # A bin adds 1/12 to the variance of what falls into it (Sheppard), so it is taken off here.
    sigma = np.array([math.isqrt(max(v - (1 << 40) // 12, (1 << 40) // 48)) for v in variance])[
        :, None, None
    ]  # * 2**20
    edges = (2 * np.arange(-SPAN, SPAN + 2) - 1) * PHASES - 2 * np.arange(PHASES)[:, None]  # * 2 * PHASES
    inside = np.abs(np.arange(-SPAN, SPAN + 1)) <= (sigma * 6 >> 20) + 2
    room = (1 << PROB_BITS) - 1 - inside.sum(-1, keepdims=True)
    for mixture in MIXTURES:
        at = [edges * (1 << 32) // (2 * PHASES * s * sigma) for s in mixture]  # 1/1024 sigma
        mass = sum(np.sign(x) * half[np.minimum(np.abs(x), len(half) - 1)] for x in at)
        freq = np.where(inside, 1 + (np.diff(mass) * room >> 32), 0)
        freq = np.concatenate([freq, np.ones_like(freq[..., :1])], -1).reshape(-1, 256)
        freq[np.arange(len(freq)), freq.argmax(-1)] += (1 << PROB_BITS) - freq.sum(-1)
        tables.append(freq)
    return np.stack(tables)


LOG_EDGES = np.array(binary_roots(2 * LOG)[1::2], np.float64) / (
    1 << 61
)  # mantissas of frexp where the rounded logarithm changes
FREQ = frequency_tables()
COST = np.where(FREQ > 0, PROB_BITS - np.log2(np.maximum(FREQ, 1)), 0).astype(
    np.float32
)  # bits; estimates only, never coded with


def log2_fixed(x: np.ndarray) -> np.ndarray:
    """round(LOG * log2(x)), int64, equal on every machine."""
    mantissa, exponent = np.frexp(x)
    return (exponent.astype(np.int64) - 1) * LOG + np.searchsorted(LOG_EDGES, mantissa, side="right")


def ldl(c: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Correlations (G, n, n), smallest eigenvalue above 1/64, to c = L diag(d) L^T: strictly lower L * 2**20 and d * 2**22, integers in float64.
    Left-looking in panels of 16. |sum_k L_ik d_k L_jk| <= 1 keeps every product below 2**53."""
    a = np.rint(c * 2.0**22)  # becomes L * d column by column
    low, d = np.zeros_like(a), np.empty(a.shape[:2])
    for p in range(0, a.shape[1], 16):
        end = min(p + 16, a.shape[1])
        panel = a[:, p:, p:end] - np.rint(low[:, p:, :p] @ a[:, p:end, :p].transpose(0, 2, 1) * 2.0**-20)
        for j in range(end - p):
            d[:, p + j] = np.maximum(panel[:, j, j], 2.0**15)
            low[:, p + j + 1 :, p + j] = column = np.rint(panel[:, j + 1 :, j] * (2.0**20 / d[:, p + j, None]))
            panel[:, j + 1 :, j + 1 :] -= np.rint(column[:, :, None] * (panel[:, None, j + 1 : end - p, j] * 2.0**-20))
        a[:, p:, p:end] = panel
    return low, d


def correlation(moments: np.ndarray) -> np.ndarray:
    """(G, n, n) second moments to correlations."""
    scale = np.sqrt(np.maximum(np.diagonal(moments, axis1=1, axis2=2), 1e-9))
    return moments / scale[:, :, None] / scale[:, None, :]


class Stack:
    """Integer matrices q (G, R, n) while they are coded: chunks of rows, in them columns, all G at once."""

    def __init__(self, head: dict, pools: dict):
        """head: what the encoder chose. pools: correlations by width that earlier stacks left as prior; this one adds its own."""
        self.members, self.rows, self.width = head["shape"]
        self.variance = np.exp2(np.array(head["log2_variance"], np.float64))  # of integers: exact
        (self.strength, self.weight), self.trust = PRIORS[head["prior"]], head["trust"]
        self.pools, self.moments, self.seen = pools, np.zeros((self.members, self.width, self.width)), 0
        self.square, self.count = np.full(self.members, 256000.0), 256000.0

    def shared(self) -> np.ndarray:
        """Moments summed over the members, each at unit variance (1, n, n)."""
        return sum(m / v for m, v in zip(self.moments, self.variance))[None]

    def predictor(self) -> tuple[np.ndarray | None, np.ndarray]:
        """L (G, n, n) * 2**12, integers in float64, such that x = e + L e with independent e, or None; and the variance of e (G, n)."""
        shared, own, total = self.shared(), np.diagonal(self.moments, axis1=1, axis2=2), self.seen * self.members
        common = (100 + np.diagonal(shared, axis1=1, axis2=2)) / (100 + total) * self.variance[:, None]
        variance = np.maximum((self.trust[1] * common + own) / (self.trust[1] + self.seen), 2.0**-5)
        if not self.strength:
            return None, variance
        c = np.eye(self.width)[None]
        c = c * (1 - self.weight) + self.pools.get(self.width, c) * self.weight
        if self.seen:
            weight, mine = self.weight * total / (total + 500), self.seen / (self.seen + self.strength)
            c = (c * (1 - weight) + correlation(shared) * weight) * (1 - mine) + correlation(self.moments) * mine
        low, d = ldl(np.broadcast_to(c * (63 / 64) + np.eye(self.width) / 64, self.moments.shape))
        scale = np.sqrt(np.minimum(variance, 2.0**12))
        return np.rint(low * (scale[:, :, None] / scale[:, None, :] * 2.0**-8)), d * 2.0**-22 * variance

    def code(self, coder):
        """All columns of all chunks, chunks growing while the covariance is young. coder(tables, floors, rows, j) -> column j, all (G, rows) int64."""
        start, size = 0, 32
        while start < self.rows:
            size = max(1, min(2 * size, LANES // self.members, 1024))
            self.code_chunk(start, min(start + size, self.rows), coder)
            start += size
        own = correlation(self.shared())
        self.pools[self.width] = 0.5 * self.pools.get(self.width, own) + 0.5 * own

    def code_chunk(self, start: int, end: int, coder):
        low, variance = self.predictor()
        sigma, log_variance = np.sqrt(variance), log2_fixed(variance)
        e, q = np.zeros((2, self.members, self.width, end - start))
        mean, initial = (
            np.zeros((self.members, end - start)),
            (self.square / self.count)[:, None] * (self.trust[0] * 256),
        )
        square = np.zeros_like(mean)  # of the rows' innovations so far, in sigma**2 / 256
        for a in range(0, self.width, REFRESH):
            b = min(a + REFRESH, self.width)
            gain = log2_fixed((square + initial) * (1 / (256 * (a + self.trust[0]))))
            bucket = (log_variance[:, a:b, None] + gain[:, None] - LOG_LOW * LOG) // (LOG // PER_OCTAVE)
            table = np.clip(bucket, 0, BUCKETS - 1) * PHASES
            known = low[:, a:b, :a] @ e[:, :a] if low is not None else None
            for j in range(a, b):
                if low is not None:
                    mean = known[:, j - a] + (low[:, j, None, a:j] @ e[:, a:j])[:, 0]
                    mean = np.clip(np.rint(mean * 2.0**-12), -(2.0**15), 2.0**15)  # in 1/256
                total = (mean + 128 // PHASES).astype(np.int64)
                q[:, j] = symbols = coder(
                    table[:, j - a] + ((total & 255) * PHASES >> 8), total >> 8, slice(start, end), j
                )
                e[:, j] = np.clip(symbols * 256 - mean, -(2.0**17), 2.0**17)
            white = np.rint(e[:, a:b] / sigma[:, a:b, None])
            square += np.rint(white * white * (1 / 256)).sum(1)
        self.square += square.sum(1)
        self.count += 256.0 * self.width * (end - start)
        exact = (
            q.astype(np.float32) if np.abs(q).max() <= 128 else q
        )  # at most 1,024 rows: no sum of products passes 2**24
        for moments, x in zip(self.moments, exact):
            moments += x @ x.T  # of a matrix with itself: BLAS does half of it
        self.seen += end - start


def choose_prior(q: np.ndarray, pool: np.ndarray | None) -> int:
    """Index into PRIORS by Gaussian code length of odd rows given the correlation of even ones, on at most two members."""
    members, rows, width = q.shape
    if rows * members < 64 or width < 8:
        return len(PRIORS) - 1
    best = np.zeros(len(PRIORS))
    for g in {0, members - 1}:
        z = q[g] / np.sqrt(np.maximum((q[g].astype(np.float64) ** 2).mean(0), 2.0**-5))
        even, odd = z[::2], z[1::2]
        known = correlation((even.T @ even)[None])[0]
        for i, (strength, weight) in enumerate(PRIORS[:-1]):
            own = len(even) / (len(even) + strength)
            prior = np.eye(width) * (1 - weight) + (np.eye(width) if pool is None else pool[0]) * weight
            low = np.linalg.cholesky((known * own + prior * (1 - own)) * (63 / 64) + np.eye(width) / 64)
            e = np.linalg.solve(low, odd.T)
            best[i] += np.log(np.diag(low)).mean() + 0.5 * ((e * e).mean() - (odd * odd).mean()) + 0.002
    return int(best.argmin())


def cell_starts(mixture: int) -> np.ndarray:
    """For every cell (table * 256 + symbol): frequency << PROB_BITS | sum of the frequencies before it."""
    freq = FREQ[mixture]
    return (freq << PROB_BITS | np.minimum(np.cumsum(freq, 1) - freq, (1 << PROB_BITS) - 1)).ravel()


def rans_encode(steps: list[tuple[np.ndarray, np.ndarray]], rider: bytes) -> tuple[np.ndarray, np.ndarray]:
    """steps: (cells, starts), in the order of decoding. Returns states uint32 (lanes,) and words uint16.
    A state begins with 16 bits that carry nothing, so they carry ``rider`` (two bytes a lane), which the decoder ends with."""
    state = np.frombuffer(rider, "<u2").astype(np.int64) + (1 << 16)
    words = []
    for cells, starts in reversed(steps):
        x, start = state[: len(cells)], starts[cells]
        freq, start = start >> PROB_BITS, start & (1 << PROB_BITS) - 1
        full = x >= freq << (32 - PROB_BITS)
        words.append(x[full].astype("<u2"))
        x = np.where(full, x >> 16, x)
        times = (x / freq).astype(np.int64)  # exact: x < 2**32, freq <= 2**14
        state[: len(cells)] = (times << PROB_BITS) + (x - times * freq) + start
    return state.astype("<u4"), np.concatenate(words[::-1] + [np.empty(0, "<u2")])


def common_weight(q: np.ndarray, axis: int) -> int:
    """How many observations the common variance counts for beside a row's own (axis 2) or a column's (axis 1), by how far theirs lie apart."""
    spread = np.log((q.astype(np.float64) ** 2).mean(axis) + 1 / 12).var(1).mean() - 2 / q.shape[axis]
    return int(np.clip(2 / max(spread, 1e-9), 2, 60))


def repeated_rows(q: np.ndarray) -> dict[int, int]:
    """Rows of a lone matrix (1, R, n) that equal an earlier row, and which: embeddings of tokens that training never saw."""
    seen = {}
    return (
        {i: first for i, row in enumerate(q[0]) if (first := seen.setdefault(row.tobytes(), i)) != i}
        if len(q) == 1
        else {}
    )


def encode_stacks(stacks: list[np.ndarray], rider: bytes = b"") -> tuple[bytes, int]:
    """Entropy-code integer stacks (G, R, C), |value| < 2**15. Returns the code and how many bytes of ``rider`` travel in it for nothing.
    A matrix that writes to or reads from the residual stream, by far the most common size, is turned so that vectors of that width are its rows."""
    weight = collections.Counter()
    for q in stacks:
        weight.update(dict.fromkeys(q.shape[1:], q.size))
    residual = max(sorted(weight), key=weight.get, default=0)
    heads, steps, escaped, pools = [], [], [np.empty(0, np.int64)], {}
    for q in stacks:
        copies = repeated_rows(q)
        q = np.delete(q, list(copies), axis=1)
        rows, width = q.shape[1:]
        turn = width != residual and (rows == residual or rows < width)
        q = q.transpose(0, 2, 1) if turn else q
        variance = np.maximum((q.astype(np.float64) ** 2).mean((1, 2)), 2.0**-5)
        head = {
            "shape": list(q.shape),
            "log2_variance": np.rint(np.log2(variance)).astype(int).tolist(),
            "turned": int(turn),
            "prior": choose_prior(q, pools.get(q.shape[2])),
            "trust": [common_weight(q, 2), common_weight(q, 1)],
            "copies": [list(copies), list(copies.values())],
        }
        columns, cells = np.ascontiguousarray(q.transpose(2, 0, 1), np.int64), []

        def coder(table, floor, rows, j):
            values = columns[j, :, rows]
            symbol = values - floor + SPAN
            cell = (table * 256 + np.where((symbol < 0) | (symbol > ESCAPE), ESCAPE, symbol)).ravel()
            lost = (FREQ[0].ravel()[cell] == 0) | (cell & 255 == ESCAPE)
            if lost.any():
                cell[lost] |= ESCAPE
                escaped.append(values.ravel()[lost])
            cells.append(cell.astype(np.int32))
            return values

        Stack(head, pools).code(coder)
        head["mixture"] = int(
            np.argmin([sum(float(cost.ravel()[c].sum(dtype=np.float64)) for c in cells[::5]) for cost in COST])
        )
        starts = cell_starts(head["mixture"])
        steps += [(c, starts) for c in cells]
        heads.append(head)
    lanes = max((len(c) for c, _ in steps), default=0)
    states, words = rans_encode(steps, rider[: 2 * lanes].ljust(2 * lanes, b"\0"))
    side = zlib.compress(json.dumps(heads, separators=(",", ":")).encode(), 9)
    raw = zlib.compress(np.concatenate(escaped).astype("<i2").tobytes(), 9)
    sizes = struct.pack("<4I", len(side), len(raw), lanes, len(words))
    return b"".join((sizes, side, raw, states.tobytes(), words.tobytes())), min(len(rider), 2 * lanes)


def decode_stacks(code: bytes) -> tuple[list[np.ndarray], bytes]:
    """Inverse of encode_stacks: the stacks, int16, and the rider (padded with zeros)."""
    side, raw, lanes, count = struct.unpack_from("<4I", code)
    at = np.cumsum([16, side, raw, 4 * lanes]).tolist()
    escaped = np.frombuffer(zlib.decompress(code[at[1] : at[2]]), "<i2")
    state, words = (
        np.frombuffer(code, "<u4", lanes, at[2]).astype(np.uint32),
        np.frombuffer(code, "<u2", count, at[3]).astype(np.uint32),
    )
    stacks, pools = [], {}
    for head in json.loads(zlib.decompress(code[at[0] : at[1]])):
        starts, columns = (
            cell_starts(head["mixture"]).astype(np.uint32),
            np.empty(head["shape"][2:] + head["shape"][:2], np.int16),
        )
        symbols = np.repeat(np.tile(np.arange(256, dtype=np.uint8), BUCKETS * PHASES), FREQ[head["mixture"]].ravel())

        def coder(table, floor, rows, j):
            nonlocal escaped, words
            x, table = state[: table.size], table.ravel()
            slot = x & (1 << PROB_BITS) - 1
            symbol = symbols.take((table << PROB_BITS) + slot)
            start = starts.take((table << 8) + symbol)
            x[:] = (start >> PROB_BITS) * (x >> PROB_BITS) + (
                slot - (start & (1 << PROB_BITS) - 1)
            )  # stays below 2**32
            low = np.flatnonzero(x < 1 << 16)
            x[low], words = (
                x[low] << 16 | words[: len(low)],
                words[len(low) :],
            )  # a stream that is too short raises here
            values, lost = symbol + (floor.ravel() - SPAN), symbol == ESCAPE
            if n := np.count_nonzero(lost):
                values[lost], escaped = escaped[:n], escaped[n:]
            columns[j, :, rows] = values = values.reshape(floor.shape)
            return values

        Stack(head, pools).code(coder)
        rows, sources = (np.array(rows, int) for rows in head["copies"])
        q = columns.transpose(*((1, 0, 2) if head["turned"] else (1, 2, 0)))
        q = np.insert(q, rows - np.arange(len(rows)), 0, axis=1)
        q[:, rows] = q[:, sources]
        stacks.append(q)
    if len(words):
        raise ValueError("words are left over")
    return stacks, (state - (1 << 16)).astype("<u2").tobytes()


# A file: magic, version, total length, lengths of header and stacks | header: zlib of JSON | entropy-coded stacks | LZMA of the other tensors | CRC-32
MAGIC, VERSION, FIXED = b"GPTGOLF\n", 1, struct.Struct("<8sIQII")
LZMA = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 0, "pb": 0}]


def as_matrix(a: np.ndarray) -> np.ndarray:
    """An integer tensor as (R, C): vectors and matrices of two long sides are folded, the last row padded with zeros."""
    if a.ndim > 1 and min(len(a), a[0].size) <= 1024:
        return a.reshape(len(a), -1)
    width = 64 if a.ndim == 1 else 512
    return np.pad(a.ravel(), (0, -a.size % width)).reshape(-1, width)


def planes(arrays: list[np.ndarray]) -> bytes:
    """Bytes of arrays of one dtype, most significant bytes of all values first."""
    return (
        np.frombuffer(b"".join(a.tobytes() for a in arrays), np.uint8).reshape(-1, arrays[0].itemsize).T[::-1].tobytes()
    )


def encode_artifact(tensors: dict[str, np.ndarray], meta: dict) -> bytes:
    """Tensors (any numpy dtype) and ``meta`` (JSON) as the bytes of a model file. Integer tensors of 64 values or more are entropy-coded.
    Tensors whose names differ only in numbers, of one shape, are coded together, so many small ones cost little."""
    groups, rest = {}, {}
    for name, a in tensors.items():
        if a.dtype.kind in "iu" and a.size >= 64 and int(a.max()) - int(a.min()) < 1 << 15:
            groups.setdefault((re.sub(r"\d+", "#", name), a.shape, a.dtype.str), {})[name] = a
        else:
            rest.setdefault(a.dtype.str, {})[name] = a
    coded, stacks = [], []
    for (_, shape, dtype), members in groups.items():
        centres = [round(float(np.median(a))) for a in members.values()]
        coded.append([dtype, shape, list(members), centres])
        stacks.append(np.stack([as_matrix(a.astype(np.int64) - c) for a, c in zip(members.values(), centres)]))
    plain = [[dtype, [[name, a.shape] for name, a in members.items()]] for dtype, members in rest.items()]
    raw = lzma.compress(
        b"".join(planes(list(members.values())) for members in rest.values()), lzma.FORMAT_RAW, filters=LZMA
    )
    code, ridden = encode_stacks(stacks, raw)
    head = {"meta": meta, "coded": coded, "plain": plain, "ridden": ridden}
    head = zlib.compress(json.dumps(head, separators=(",", ":"), sort_keys=True).encode(), 9)
    total = FIXED.size + len(head) + len(code) + len(raw) - ridden + 4
    data = FIXED.pack(MAGIC, VERSION, total, len(head), len(code)) + head + code + raw[ridden:]
    return data + struct.pack("<I", zlib.crc32(data))


def save_artifact(path: Path, tensors: dict[str, np.ndarray], meta: dict):
    """Write encode_artifact's bytes whole, by rename."""
    with whole_file(path) as f:
        f.write(encode_artifact(tensors, meta))


def read_artifact(path: Path) -> tuple[dict, bytes, bytes]:
    """A model file, verified: its header, the entropy-coded stacks and the rest. One that is missing, short, altered or of another kind raises ArtifactError."""
    try:
        data = path.read_bytes()
    except OSError as e:
        raise ArtifactError(
            f"{path}: cannot be read ({e.strerror}); train first, or set ARTIFACT_DIR to the folder that holds it"
        ) from None
    if data[:8] != MAGIC:
        raise ArtifactError(
            f"{path}: not a model file of this script (its first bytes are {data[:8]!r}); set ARTIFACT_DIR to the folder that holds one"
        )
    if len(data) < FIXED.size or len(data) != FIXED.unpack_from(data)[2]:
        raise ArtifactError(
            f"{path}: {len(data)} bytes long, not what its header says; it was cut or extended: copy it again or write it anew"
        )
    if zlib.crc32(data[:-4]) != struct.unpack("<I", data[-4:])[0]:
        raise ArtifactError(f"{path}: checksum does not match; the file was altered: copy it again or write it anew")
    _, version, _, head, code = FIXED.unpack_from(data)
    if version != VERSION:
        raise ArtifactError(
            f"{path}: format version {version}, this script reads {VERSION}; score it with the script that wrote it"
        )
    at = FIXED.size + head
    return json.loads(zlib.decompress(data[FIXED.size : at])), data[at : at + code], data[at + code : -4]


def load_artifact(path: Path) -> tuple[dict[str, np.ndarray], dict]:
    """Inverse of encode_artifact: tensors and meta."""
    head, code, rest = read_artifact(path)
    try:
        return unpack_tensors(head, code, rest), head["meta"]
    except Exception as e:  # the checksum holds, so this is a file that was made wrongly
        raise ArtifactError(f"{path}: cannot be decoded ({type(e).__name__}: {e}); write it anew") from e


def unpack_tensors(head: dict, code: bytes, rest: bytes) -> dict[str, np.ndarray]:
    """The tensors that a model file's header describes."""
    stacks, rider = decode_stacks(code)
    raw = lzma.decompress(rider[: head["ridden"]] + rest, lzma.FORMAT_RAW, filters=LZMA)
    tensors, at = {}, 0
    for (dtype, shape, names, centres), stack in zip(head["coded"], stacks, strict=True):
        for name, q, centre in zip(names, stack, centres, strict=True):
            tensors[name] = (q.ravel()[: math.prod(shape)].astype(np.int64) + centre).astype(dtype).reshape(shape)
    for dtype, members in head["plain"]:
        size, count = np.dtype(dtype).itemsize, sum(math.prod(shape) for _, shape in members)
        values = np.frombuffer(raw, np.uint8, size * count, at).reshape(size, count)[::-1].T.copy().view(dtype).ravel()
        at += size * count
        for name, shape in members:
            tensors[name], values = values[: math.prod(shape)].reshape(shape), values[math.prod(shape) :]
    return tensors


# ======== N-gram: exact causal token statistics, and the tilt that they give the scored probabilities =================


class Continuations(NamedTuple):
    """What had followed the contexts of one order before each of `targets`; all (n,) on the device.

    A context that occurs once in the stream is left out.
    """

    order: int  # tokens of the context and the one it predicts
    targets: Tensor  # int64: indices of targets, in the order of their contexts
    hint: Tensor  # int32: the token seen most often, of equals the one that got there first; anything if total is 0
    top: Tensor  # int64: how often the hint was seen
    total: Tensor  # int64: how often the context was seen


def run_starts(*keys: Tensor) -> Tensor:
    """Places (n,) bool where any of the sorted keys differs from the place before."""
    first = torch.zeros_like(keys[0], dtype=torch.bool)
    first[:1] = True
    for key in keys:
        first[1:] |= key[1:] != key[:-1]
    return first


def latest(flags: Tensor) -> Tensor:
    """Index (n,) int64 of the last True at or before each place; flags[0] is True."""
    return flags.nonzero()[:, 0][flags.cumsum(0) - 1]


def running_max(x: Tensor) -> Tensor:
    """Cumulative maximum of x (n,), not negative, by rows: a scan over one long row would occupy one block of a GPU."""
    width = max(math.isqrt(len(x)), 1)
    padding = -len(x) % width
    rows = F.pad(x, (0, padding)).view(-1, width)
    within = rows.cummax(1).values
    to_row_end = within[:-1, -1].cummax(0).values
    earlier_rows = F.pad(to_row_end, (1, 0))  # nothing stands before the first row
    return torch.maximum(within, earlier_rows[:, None]).flatten()[: len(x)]


class Runs(NamedTuple):
    """Where the group, the segment and the document of each place of a sorted list begin; each (n,) int64.

    The list is sorted by a key (a context, or a context and what followed it) and keeps the stream's order where keys
    agree. So a group of equal keys is a row of segments, and a segment is a row of documents. What the target at a
    place may know of its group lies in two stretches:

        group            segment             document          place
          | earlier segments | other documents   | its own document | this target, later ones
          |     visible      |     hidden        |     visible      |     hidden
    """

    group: Tensor
    segment: Tensor
    document: Tensor

    @classmethod
    def of(cls, key: Tensor, segment: Tensor, document: Tensor) -> "Runs":
        """key, segment and document of each place (n,); key is sorted, the others rise where it is constant."""
        group_starts = run_starts(key)
        segment_starts = run_starts(key, segment)
        document_starts = run_starts(key, document)
        return cls(latest(group_starts), latest(segment_starts), latest(document_starts))

    def seen_before(self, place: Tensor) -> Tensor:
        """How many members of its group the target at each place may know, (n,) int64; place: 0, 1, ..., n - 1."""
        in_earlier_segments = self.segment - self.group
        in_own_document = place - self.document
        return in_earlier_segments + in_own_document


def leader(start: Tensor, end: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """For each place the highest of `counts` (n,) in the places start..end (exclusive), and where it was first reached.

    Both int64 (n,); the count is 0 where there are no such places. `start` is the same for all places of a run and
    rises from run to run, so one running maximum of the pair (start, count) serves all runs: it begins anew where
    start rises. It grows exactly at the places that reach a higher count than those before them in the run.
    """
    highest = running_max((start << 32) + counts)
    reached = latest(run_starts(highest))
    last = (end - 1).clamp(min=0)
    count = highest[last] & 0xFFFFFFFF
    return torch.where(end > start, count, 0), reached[last]


def continuations(
    tokens: Tensor,  # int32 (n + 1,)
    document: Tensor,  # int32 (n,): of each target, rising
    segment: Tensor,  # int32 (n,): of each target, rising
    orders: int,
    vocab: int,
) -> Iterator[Continuations]:
    """Yield Continuations of order 2, 3, ..., `orders`.

    A target sees the targets of earlier segments and the earlier ones of its own document, whose contexts lie inside
    their documents. Counts are exact: a context is known by its rank among the sorted pairs (context one token shorter,
    its last token), never by a hash. One stable sort by (context, what follows) serves an order, and shifted by one
    place it lists the contexts of the next. Two documents, a segment each:

        target    0 1 2 3 4   5 6          Sorted by contexts of one token; 6 and 7 occur once and are left out:
        context   1 5 6 5 7   1 5
        follows   5 6 5 7 1   5 6              place     0  1     2  3  4
                                               context   1  1     5  5  5
        Target 6 has seen 5 followed once      target    0  5     1  3  6
        by 6 and once by 7. 6 was first,       follows   5  5     6  7  6
        so it is the hint. In one segment      total     0  1     0  1  2      what Runs.seen_before counts
        it would have seen neither.            hint      -  5     -  6  6      top is 1 at all three
    """
    targets = tokens[:-1].sort(stable=True).indices  # by context, and in the stream's order where contexts agree
    context = tokens[targets].long()
    for order in range(2, orders + 1):
        starts = run_starts(context)
        ends = F.pad(starts[1:], (0, 1), value=True)
        alone = starts & ends  # met once: this context and every longer one that ends in it know nothing
        targets = targets[~alone]
        context = context[~alone]
        if not len(targets):
            return
        place = torch.arange(len(targets), device=targets.device)
        follows = tokens[targets + 1]
        segments = segment[targets]
        documents = document[targets]
        pair, by_pair = (context * vocab + follows).sort(stable=True)
        pairs = Runs.of(pair, segments[by_pair], documents[by_pair])

        # How often each target's own pair came before it: in the whole stream, and where the target may look.
        in_stream = torch.empty_like(targets)
        in_stream[by_pair] = place - pairs.group
        visible = torch.empty_like(targets)
        visible[by_pair] = pairs.seen_before(place)

        # The commonest token led when the segment began, or occurs in the own document and has passed that leader.
        contexts = Runs.of(context, segments, documents)
        earlier_top, earlier_place = leader(contexts.group, contexts.segment, in_stream + 1)
        own_top, own_place = leader(contexts.document, place, visible + 1)
        hint = follows[torch.where(own_top > earlier_top, own_place, earlier_place)]
        top = torch.maximum(own_top, earlier_top)
        yield Continuations(order, targets, hint, top, contexts.seen_before(place))

        # A pair is a context of the next order; it predicts the next target, if that is in the same document.
        targets = targets[by_pair] + 1
        context = run_starts(pair).cumsum(0)
        inside = targets < len(document)
        targets = targets[inside]
        context = context[inside]
        same = document[targets] == document[targets - 1]
        targets = targets[same]
        context = context[same]


class NGram:
    """Improves the scored probabilities by what earlier segments and the document so far have shown.

    An order clears when its context was seen NGRAM_MIN_COUNT times and its commonest continuation has a share of
    NGRAM_THRESHOLD. The longest order that clears hints at that token h, whose log-odds rise by b = NGRAM_BOOST
    (#1145):

        p'(x) = p(x) e^(b [x = h]) / (1 + p(h) (e^b - 1))

    The divisor is the sum of the numerators, so p' sums to one; h depends on nothing but what came before x.
    """

    def __init__(
        self,
        cfg: Config,
        ranks: Ranks,
        val: ValidationStream,
        sizes: list[int],  # documents of each segment, in order
        log: Log,
    ):
        """Count the whole stream, on every rank: counts are integers, so all ranks agree."""
        begun = time.perf_counter()
        device = ranks.device
        self.device = device
        self.boost = cfg.ngram_boost
        self.gold = val.tokens[1:]  # uint16 (targets,): the realised tokens
        lengths = torch.from_numpy(val.lengths.astype(np.int32))
        document = torch.repeat_interleave(
            lengths.to(device)
        )  # of each target: 0 for the first lengths[0], then 1, ...
        segment_of_document = torch.repeat_interleave(torch.tensor(sizes, dtype=torch.int32, device=device))
        segment = segment_of_document[document]
        tokens = torch.from_numpy(val.tokens.astype(np.int32))
        hint = torch.full_like(document, -1)
        for known in continuations(tokens.to(device), document, segment, cfg.ngram_order, cfg.vocab_size):
            if known.order < cfg.ngram_min_order:
                continue
            share = known.top.double() / known.total
            often = known.total >= cfg.ngram_min_count
            clears = often & (share >= cfg.ngram_threshold)
            hint[known.targets[clears]] = known.hint[clears]  # a longer order comes later and replaces a shorter one
        self.hint = hint.cpu().numpy()  # int32 (targets,): -1 where no order clears
        hinted = 100 * (self.hint >= 0).mean()
        seconds = time.perf_counter() - begun
        orders = f"{cfg.ngram_min_order}..{cfg.ngram_order}"
        log(f"n-grams of order {orders}: hints at {hinted:.2f} % of the targets, {seconds:.1f} s")

    def hints(self, targets: np.ndarray) -> Tensor:
        """The tokens whose log-probabilities `tilted` asks for, int64 on the device; 0 where there is no hint."""
        tokens = np.maximum(self.hint[targets], 0)
        return torch.from_numpy(tokens.astype(np.int64)).to(self.device)

    def tilted(self, targets: np.ndarray, nats: np.ndarray, hint_log_prob: np.ndarray) -> np.ndarray:
        """The network's nats of `targets` (n,) and its log-probabilities of their hints -> nats of p', float64 (n,)."""
        hint = self.hint[targets]
        boost = np.where(hint >= 0, self.boost, 0.0)
        hit = hint == self.gold[targets]
        divisor = np.exp(hint_log_prob) * np.expm1(boost)  # less 1
        return nats - boost * hit + np.log1p(divisor)


# ======== Scoring =====================================================================================================


class ScoringPass(NamedTuple):
    """One pass over the validation stream: what it scores with, what it scores, and where the scores go."""

    model: GPT
    cfg: Config
    ranks: Ranks
    log: Log
    val: ValidationStream
    ledger: Ledger  # of this pass alone
    ngram: NGram | None = None  # tilts every score before it is written


def plan_windows(starts: np.ndarray, inputs: int, seq_len: int, stride: int) -> np.ndarray:
    """Windows (n, 3) int64, rows (begin, first, end): tokens begin..end are read, targets of first..end are scored.

    Every position 0..inputs is scored once. The first window of a document scores all it reads; each later one scores
    `stride` new positions after seq_len - stride tokens of context. A document of 7 tokens, seq_len = 4, stride = 2:

        0 1 2 3                 scores 0 1 2 3
            2 3 4 5             scores 4 5
                4 5 6           scores 6

    The last window begins where a full one would: a document's length decides nothing, or the context would tell where
    it ends (C1).
    """
    windows = []
    ends = np.append(starts[1:], inputs).clip(max=inputs)
    for start, end in zip(starts.tolist(), ends.tolist()):
        begin = start
        first = start
        reach = min(start + seq_len, end)  # where this window ends
        while first < end:
            windows.append((begin, first, reach))
            first = reach  # the next window scores what follows
            begin = max(start, first + stride - seq_len)
            reach = min(first + stride, end)
    return np.array(windows, dtype=np.int64).reshape(-1, 3)


def group_windows(windows: np.ndarray, capacity: int) -> list[np.ndarray]:
    """Consecutive windows, as many for each buffer as `capacity` tokens hold."""
    lengths = windows[:, 2] - windows[:, 0]
    tokens_before = np.append(0, np.cumsum(lengths))  # each window, and after the last one
    cuts = [0]  # windows at which a buffer begins
    while cuts[-1] < len(windows):
        full = tokens_before[cuts[-1]] + capacity
        # tokens_before[too_many] is the first that exceeds `full`, so the window before it no longer fits.
        too_many = np.searchsorted(tokens_before, full, side="right")
        cuts.append(int(too_many) - 1)
    return [windows[low:high] for low, high in itertools.pairwise(cuts)]


def window_batch(
    val: ValidationStream,
    windows: np.ndarray,  # (n, 3) of plan_windows, together at most VAL_BATCH_TOKENS tokens
    cfg: Config,
) -> tuple[Batch, np.ndarray, np.ndarray]:
    """One buffer of windows -> (batch, places in the buffer that are scored, the targets that they score)."""
    begin, first, end = windows.T
    lengths = end - begin
    starts = np.cumsum(lengths) - lengths  # of the windows in the buffer: each is packed as a document
    place = np.arange(lengths.sum())
    position = place + np.repeat(begin - starts, lengths)  # in the stream
    scored = position >= np.repeat(first, lengths)
    batch = pack_documents(
        val.tokens[position],
        val.tokens[position + 1],
        starts,
        span=cfg.eval_seq_len,
        longest=cfg.eval_seq_len,
        capacity=cfg.val_batch_tokens,
        split="val",
    )
    return batch, place[scored], position[scored]


def book(scoring: ScoringPass, targets: np.ndarray, scores: Scores, places: Tensor):
    """Write what a forward gave at `places` (indices or a mask) as the nats of `targets`, tilted by n-grams if any."""

    def of_targets(values: Tensor) -> np.ndarray:
        # In float64 from here on: the ledger's sums run over the whole stream.
        return values.detach()[places].double().cpu().numpy()

    nats = of_targets(scores.nats)
    if scoring.ngram is not None:
        hint_log_prob = of_targets(scores.hint_log_prob)
        nats = scoring.ngram.tilted(targets, nats, hint_log_prob)
    scoring.ledger.write(targets, nats)


@torch.no_grad()
def score_documents(scoring: ScoringPass, first: int, last: int):
    """Score documents first..last (exclusive) by windows and share the scores with all ranks.

    Windows never cross a document's start, and each target is scored once, whatever the number of ranks.
    """
    model, cfg, ranks, log, val, ledger, ngram = scoring
    stride = cfg.eval_stride or cfg.eval_seq_len
    end = int(np.append(val.starts, val.targets)[last])
    windows = plan_windows(val.starts[first:last], end, cfg.eval_seq_len, stride)
    buffers = group_windows(windows, cfg.val_batch_tokens)
    for buffer in buffers[ranks.rank :: ranks.world]:  # dealt to the ranks in turn
        ledger.progress(ranks, log)
        batch, places, targets = window_batch(val, buffer, cfg)
        batch = to_device(batch, ranks.device)
        places = torch.from_numpy(places).to(ranks.device)
        hint = None
        if ngram is not None:  # places that are not scored ask for token 0, and nobody looks
            hint = torch.zeros_like(batch.targets).index_copy(0, places, ngram.hints(targets))
        scores = score_batch(model, batch, cfg.looped, hint)
        book(scoring, targets, scores, places)
    ledger.merge(ranks)


def score_stream(scoring: ScoringPass) -> float:
    """Score the whole stream by windows, without adaptation; returns the ledger's BPB."""
    val = scoring.val
    scoring.log(f"scoring {scoring.ledger.name}: {val.targets:,} targets over {scoring.ranks.world} rank(s)")
    score_documents(scoring, 0, len(val.starts))
    return scoring.ledger.bpb()


# ======== Test-time training: score a chunk, then learn from it; state crosses documents only between segments ========


class Segment(NamedTuple):
    """Consecutive documents of the stream that are independent of each other."""

    first: int  # documents first..last (exclusive)
    last: int
    then_learn: bool  # the base weights learn from scored targets before the next segment


def plan_segments(lengths: np.ndarray, cfg: Config) -> list[Segment]:
    """Segments of documents of these lengths end where a phase of global SGD follows and otherwise every SEGMENT_DOCS.

    Phase p = 1, 2, ... follows document PHASED_TTT_PREFIX_DOCS * p / PHASED_TTT_NUM_PHASES, never the last one.
    """
    documents = len(lengths)
    prefix = min(cfg.phased_ttt_prefix_docs, documents - 1)
    phases = cfg.phased_ttt_num_phases
    phase_ends = {prefix * phase // phases for phase in range(1, phases + 1)} - {0}
    full = range(cfg.segment_docs, documents, cfg.segment_docs)
    cuts = sorted({0, *phase_ends, *full, documents})
    ends = cuts[1:]
    then_learn = [end in phase_ends for end in ends]
    return list(map(Segment, cuts, ends, then_learn))


def plan_sgd_segments(lengths: np.ndarray, cfg: Config) -> list[Segment]:
    """Segments of as many documents, of these lengths, as hold GLOBAL_TTT_CHUNK_TOKENS targets.

    All segments but the last are learnt from.
    """
    documents = len(lengths)
    targets_before = np.append(0, np.cumsum(lengths))
    cuts = [0]
    while cuts[-1] < documents:
        filled = targets_before[cuts[-1]] + cfg.global_ttt_chunk_tokens
        last = int(np.searchsorted(targets_before, filled))
        cuts.append(min(last, documents))
    ends = cuts[1:]
    then_learn = [end < documents for end in ends]
    return list(map(Segment, cuts, ends, then_learn))


def chunk_ends(longest: int, cfg: Config) -> list[int]:
    """Ends of the chunks that cover `longest` positions: sizes are TTT_CHUNKS in order, the last one repeated.

    They are a function of position, never of a document's length (C1).
    """
    sizes = [int(size) for size in cfg.ttt_chunks.split(",")]
    ends = [0]
    while ends[-1] < longest:
        chunk = min(len(ends), len(sizes)) - 1  # index of the next size
        ends.append(ends[-1] + sizes[chunk])
    return ends[1:]


class Shape(NamedTuple):
    """All that a step depends on besides the contents of its memory: one CUDA graph each."""

    rows: int  # documents run together
    older: int  # cached tokens that may be attended to
    back: int  # scored tokens run again, so that gradients reach back through them
    count: int  # tokens of the chunk


def plan_lockstep(lengths: np.ndarray, cfg: Config, exact: bool) -> Iterator[tuple[int, int, Shape]]:
    """Steps of documents of these lengths, longest first: yields (begin, end, Shape) of each chunk.

    Finished rows leave the batch. Unless `exact`, rows and context are rounded up to powers of two, so that few shapes
    serve every batch.
    """

    def rounded(needed: int, least: int, most: int) -> int:
        if exact or needed == 0:
            return min(needed, most)
        power = 1 << (needed - 1).bit_length()  # the least that holds what is needed
        return min(max(least, power), most)

    begin = 0
    for end in chunk_ends(int(lengths.max(initial=0)), cfg):
        count = end - begin
        room = cfg.ttt_eval_seq_len - count  # of the context, before the chunk
        back = rounded(begin, 64, min(cfg.ttt_backprop_tokens, room))
        older = rounded(max(begin - back, 0), 256, room - back)
        running = int((lengths > begin).sum())
        rows = rounded(running, 8, cfg.ttt_batch_size)
        yield begin, end, Shape(rows, older, back, count)
        begin = end


def deal_batches(lengths: np.ndarray, first: int, cfg: Config, world: int) -> list[list[np.ndarray]]:
    """For each rank its batches of the documents first, first + 1, ... that have these lengths.

    Documents are taken by falling length. Each batch goes to the rank with the least work so far, counted in chunks of
    a batch's longest document.
    """
    order = np.argsort(-lengths, kind="stable")  # a batch of alike documents has few idle rows
    load = np.zeros(world)  # chunks in a row, of each rank
    dealt = [[] for _ in range(world)]
    for begin in range(0, len(order), cfg.ttt_batch_size):
        batch = order[begin : begin + cfg.ttt_batch_size]
        longest = int(lengths[batch].max())
        rank = int(load.argmin())
        load[rank] += len(chunk_ends(longest, cfg))
        dealt[rank].append(first + batch)
    return dealt


class KeyValueRing:
    """Keys and values of each row's last `length` tokens, at every visit, as they were when their token was scored."""

    def __init__(self, model: GPT, rows: int, length: int):
        cfg = model.cfg
        visits = len(model.schedules[cfg.looped])
        shape = (visits, rows, length, cfg.num_kv_heads, model.head_dim)
        self.length = length  # the token at position p lies in slot p % length
        self.keys = torch.zeros(shape, dtype=model.dtype, device=model.tok_emb.device)
        self.values = torch.zeros_like(self.keys)

    def read(self, rows: int, positions: Tensor, last: Tensor) -> Cache:
        """What the first rows hold of `positions` (n,) int64; of a negative position, anything.

        last (rows,) int64: the token before those that will be run.
        """
        slots = positions % self.length
        keys = self.keys[:, :rows].index_select(2, slots)
        values = self.values[:, :rows].index_select(2, slots)
        return Cache(keys, values, last)

    def write(self, rows: int, positions: Tensor, new: Cache):
        """Store what the first rows have computed for `positions`; a position that is run again overwrites itself."""
        slots = positions % self.length
        for memory, computed in ((self.keys, new.keys), (self.values, new.values)):
            memory[:, :rows].index_copy_(2, slots, computed.detach())


class AdapterState:
    """The adapters of a batch of documents, their second moments, and where the adapters of later documents start."""

    def __init__(self, model: GPT, cfg: Config):
        self.cfg = cfg
        # All batches use the same memory, because CUDA graphs hold its addresses.
        masked = frozenset(cfg.ttt_mask.replace("no_qv", "q,v").split(","))
        self.lora = new_lora(
            model,
            documents=cfg.ttt_batch_size,
            masked=masked,
            rank=cfg.ttt_lora_rank,
            alpha=cfg.ttt_lora_alpha,
            seed=cfg.seed,
        )
        leaves = self.lora.leaves()
        self.first_rows = {}  # number of rows -> their adapters, leaves that share the memory of self.lora
        self.squares = [torch.zeros_like(p) for p in leaves]  # second moments
        self.updates = torch.zeros((), device=model.tok_emb.device)  # of this batch, for Adam's bias correction
        self.start = [p[:1].detach().clone() for p in leaves]  # (1, in, rank) and (1, rank, out), of every document
        self.drift = [torch.zeros_like(p) for p in self.start]  # sum over tokens of how far their adapters moved
        self.drift_tokens = 0.0  # that the sum holds

    @torch.no_grad()
    def reset(self):
        """For the next batch: all adapters at their start, no second moments, no updates."""
        for p, start in zip(self.lora.leaves(), self.start):
            p.copy_(start.expand_as(p))
        for square in self.squares:
            square.zero_()
        self.updates.zero_()

    def first(self, rows: int) -> LoRA:
        """The adapters of the first rows: the same leaves at every call, so that learning finds those of scoring."""
        if rows not in self.first_rows:
            self.first_rows[rows] = self.lora.first(rows)
        return self.first_rows[rows]

    def step(self, rows: int, loss: Tensor, goes_on: Tensor):
        """AdamW without a first moment on `loss` () for the first rows.

        goes_on (rows,) float: 0 keeps a finished row as it is; its gradient is zero, and it does not decay.
        """
        cfg = self.cfg
        lr = cfg.ttt_lora_lr * cfg.ttt_local_lr_mult
        leaves = self.first(rows).leaves()
        grads = [grad.contiguous() for grad in torch.autograd.grad(loss, leaves)]
        self.updates += 1
        with torch.no_grad():
            # Decoupled decay is done here, since the fused optimizer would apply it to finished rows, too.
            decay = 1 - lr * cfg.ttt_weight_decay * goes_on
            for p in leaves:
                p.mul_(decay[:, None, None])
            torch._fused_adamw_(
                leaves,
                grads,
                grads,  # with beta1 = 0 the first moment is the gradient: one memory serves as both
                [square[:rows] for square in self.squares],
                [],
                [self.updates] * len(leaves),
                lr=lr,
                beta1=0.0,
                beta2=cfg.ttt_beta2,
                weight_decay=0.0,
                eps=1e-10,
                amsgrad=False,
                maximize=False,
            )

    @torch.no_grad()
    def remember(self, lengths: np.ndarray):
        """Add up how far the batch's adapters have moved. lengths: of its documents, in the order of the rows.

        A document counts by its tokens, at most a context of them.
        """
        tokens = np.minimum(lengths, self.cfg.ttt_eval_seq_len)
        weight = torch.from_numpy(tokens.astype(np.float32)).to(self.updates.device)
        total = weight.sum()
        for drift, p, start in zip(self.drift, self.lora.leaves(), self.start):
            # sum over documents of weight (adapters - start)
            drift += torch.tensordot(weight, p[: len(weight)], 1) - total * start
        self.drift_tokens += float(total)

    @torch.no_grad()
    def next_segment(self, ranks: Ranks):
        """Move the start by TTT_WARM_START to the mean of the segment's adapters (Reptile, arXiv 1803.02999).

        All that it learns from is scored: the segment is over.
        """
        tokens = torch.tensor([self.drift_tokens], dtype=torch.float64)
        total = ranks.all_reduce_(tokens).item()
        share = self.cfg.ttt_warm_start / max(total, 1.0)  # start += TTT_WARM_START (mean - start)
        for start, drift in zip(self.start, self.drift):
            start += share * ranks.all_reduce_(drift)
            drift.zero_()
        self.drift_tokens = 0.0


def each(change: Callable[[Tensor], Tensor], scores: Scores) -> Scores:
    """Scores of which every tensor is changed."""
    return Scores(*[None if t is None else change(t) for t in scores])


class CapturedStep(NamedTuple):
    """The CUDA graphs of a Shape, and the memory in which the first leaves its scores."""

    scoring: torch.cuda.CUDAGraph
    learning: torch.cuda.CUDAGraph
    scores: Scores


class GraphPool:
    """Runs the two halves of a step, score(shape) -> Scores and learn(shape, nats).

    Once they are captured they are replayed as CUDA graphs, which share the memory of one pool; before, and on a CPU,
    they are called.
    """

    def __init__(self):
        self.steps = {}  # Shape -> CapturedStep

    def capture(self, shapes: set[Shape], score: Callable, learn: Callable):
        """Capture every shape, the largest first: smaller ones then find their memory in the pool."""
        pool = torch.cuda.graph_pool_handle()
        for shape in sorted(shapes, reverse=True):
            self.steps[shape] = self.captured(shape, score, learn, pool)

    @staticmethod
    def captured(shape: Shape, score: Callable, learn: Callable, pool) -> CapturedStep:
        with torch.cuda.stream(torch.cuda.Stream()):
            learn(shape, score(shape).nats)  # libraries and Triton set themselves up outside of a capture
        torch.cuda.synchronize()
        scoring = torch.cuda.CUDAGraph()
        with torch.cuda.graph(scoring, pool=pool):
            scores = score(shape)
        learning = torch.cuda.CUDAGraph()
        with torch.cuda.graph(learning, pool=pool):
            learn(shape, scores.nats)
        # Detached, so that what autograd kept for learn() is free for the next capture.
        return CapturedStep(scoring, learning, each(Tensor.detach, scores))

    def score(self, shape: Shape, call: Callable) -> Scores:
        """Replay, or else call(shape)."""
        if not self.steps:
            return call(shape)
        if shape not in self.steps:  # prepare() was given other batches
            raise RuntimeError(f"no graph was captured for {shape}")
        step = self.steps[shape]
        step.scoring.replay()
        return step.scores

    def learn(self, shape: Shape, scores: Scores, call: Callable):
        """Replay, or else call(shape, nats). scores: what score() returned for this chunk."""
        if self.steps:
            self.steps[shape].learning.replay()
        else:
            call(shape, scores.nats)


class DocumentTTT:
    """Scores documents of one segment and adapts to each, in lockstep: every row is at the same position of its own.

    All memory is static and a step depends on its Shape alone, so a GPU replays CUDA graphs: its many small kernels
    cost no launches.
    """

    def __init__(self, scoring: ScoringPass):
        cfg = scoring.cfg
        val = scoring.val
        ngram = scoring.ngram
        device = scoring.ranks.device
        rows = cfg.ttt_batch_size
        self.scoring = scoring
        self.tokens = torch.from_numpy(val.tokens.astype(np.int32)).to(device)  # of the whole stream
        self.hints = None if ngram is None else ngram.hints(np.arange(val.targets))
        self.begin = torch.zeros((), dtype=torch.int64, device=device)  # position at which the chunk begins
        self.row_starts = torch.zeros(rows, dtype=torch.int64, device=device)  # of the documents in the stream
        self.row_lengths = torch.zeros_like(self.row_starts)
        self.adapters = AdapterState(scoring.model, cfg)
        self.ring = KeyValueRing(scoring.model, rows, cfg.ttt_eval_seq_len)
        self.graphs = GraphPool()

    def prepare(self, batches: list[np.ndarray]):
        """Capture every graph that these batches need, on random tokens: only lengths of documents are read (B29)."""
        cfg = self.scoring.cfg
        val = self.scoring.val
        shapes = set()
        for batch in batches:
            falling = np.sort(val.lengths[batch])[::-1]
            shapes.update(shape for _, _, shape in plan_lockstep(falling, cfg, exact=False))
        generator = torch.Generator(self.tokens.device).manual_seed(0)
        self.tokens.random_(cfg.vocab_size, generator=generator)
        self.graphs.capture(shapes, self.score, self.learn)
        tokens = torch.from_numpy(val.tokens.astype(np.int32))
        self.tokens.copy_(tokens)

    def run(self, documents: np.ndarray):
        """Score every target of `documents` (indices, at most TTT_BATCH_SIZE, in any order), learning in between."""
        cfg = self.scoring.cfg
        val = self.scoring.val
        falling = np.argsort(-val.lengths[documents], kind="stable")
        documents = documents[falling]
        starts = val.starts[documents]
        lengths = val.lengths[documents]
        self.seat(starts, lengths)
        on_cpu = self.tokens.device.type == "cpu"
        for begin, end, shape in plan_lockstep(lengths, cfg, exact=on_cpu):
            self.begin.fill_(begin)
            scores = self.graphs.score(shape, self.score)  # (shape.rows, count)
            row_starts = starts[: shape.rows, None]
            row_lengths = lengths[: shape.rows, None]  # (documents, 1); the shape may have more rows than documents
            position = np.arange(begin, end)
            targets = row_starts + position
            valid = position < row_lengths  # (documents, count): chunks reach beyond the end of a document
            on_host = each(lambda t: t[: len(valid)].cpu(), scores)
            book(self.scoring, targets[valid], on_host, torch.from_numpy(valid))
            goes_on = row_lengths[:, 0] > end
            if goes_on.any():  # a last chunk teaches nobody
                learnt = targets[goes_on]
                self.scoring.ledger.may_train(learnt.ravel())
                self.graphs.learn(shape, scores, self.learn)
        self.adapters.remember(lengths)

    def seat(self, starts: np.ndarray, lengths: np.ndarray):
        """Put documents into the rows, with new adapters. Rows that are left over are documents of no length."""
        self.adapters.reset()
        for memory, values in ((self.row_starts, starts), (self.row_lengths, lengths)):
            memory.zero_()
            memory[: len(values)] = torch.from_numpy(values)

    def score(self, shape: Shape) -> Scores:
        """Scores (rows, count) of the chunk at `self.begin`, with the log-probabilities of hints if there are n-grams.

        The last `back` tokens before the chunk are run again together with it, and before those `older` tokens are
        read as cached keys and values. Positions before a document are BOS, which Seq.lockstep hides.
        """
        rows, older, back, count = shape
        width = back + count
        model = self.scoring.model
        cfg = self.scoring.cfg
        device = self.tokens.device
        first = self.begin - back
        position = first + torch.arange(width, device=device)  # (width,): in the document
        index = self.row_starts[:rows, None] + position  # (rows, width): in the stream
        index = index.clamp(0, len(self.tokens) - 2)  # outside the document anything will do: nobody sees it
        tokens = torch.where(position >= 0, self.tokens[index], cfg.bos_id).long()
        before = (index[:, 0] - 1).clamp(min=0)  # SmearGate looks one token back
        cached = first - older + torch.arange(older, device=device)
        cache = self.ring.read(rows, cached, last=self.tokens[before].long())
        seq = Seq.lockstep(self.begin, position, rows, older, back)
        lora = self.adapters.first(rows)
        hidden, new = model.trunk(
            tokens.flatten(),
            seq,
            looped=cfg.looped,
            lora=lora,
            cache=cache,
        )
        chunk = index[:, back:]
        hidden = hidden.unflatten(0, (rows, width))[:, back:]  # only the chunk pays for the head
        targets = self.tokens[chunk + 1].flatten()
        scores = model.nll(
            hidden.flatten(0, 1),
            targets.long(),
            lora=lora,
            hint=None if self.hints is None else self.hints[chunk].flatten(),
        )
        self.ring.write(rows, position, new)
        return each(lambda t: t.unflatten(0, (rows, count)), scores)

    def learn(self, shape: Shape, nats: Tensor):
        """A step on the mean nats (rows, count) of the chunk, for rows with a later chunk.

        Rows do not mix: the loss is a sum over them and AdamW is elementwise.
        """
        end = self.begin + shape.count
        goes_on = (self.row_lengths[: shape.rows] > end).float()
        loss = (nats.mean(1) * goes_on).sum()
        self.adapters.step(shape.rows, loss, goes_on)


def base_gradients(
    model: GPT,
    cfg: Config,
    ranks: Ranks,
    val: ValidationStream,
    begin: int,  # targets begin..end (exclusive)
    end: int,
):
    """Leave in .grad of every parameter the gradient of the mean nats of the targets, summed over the ranks.

    Its norm is at most GLOBAL_TTT_GRAD_CLIP. The targets are cut every TTT_EVAL_SEQ_LEN and each rank takes
    neighbouring pieces, so no sum depends on the number of ranks.
    """
    span = cfg.ttt_eval_seq_len

    def rank_share(targets: int) -> int:
        """Of so many targets, those of one rank: whole pieces."""
        return -(-targets // (span * ranks.world)) * span

    share = rank_share(end - begin)
    micro_batch = rank_share(cfg.global_ttt_chunk_tokens)
    first = begin + ranks.rank * share
    last = min(first + share, end)
    for low in range(first, last, micro_batch):
        high = min(low + micro_batch, last)
        tokens = val.tokens[low : high + 1]
        inputs = tokens[:-1]
        document_starts = np.flatnonzero(inputs == cfg.bos_id)
        starts = np.union1d(document_starts, np.arange(0, len(inputs), span))
        batch = pack_documents(
            inputs,
            tokens[1:],
            starts,
            span=span,
            longest=span,
            capacity=len(inputs),
            split="val",
        )
        loss = batch_loss(model, to_device(batch, ranks.device), end - begin, cfg.looped)
        loss.backward()
    parameters = list(model.parameters())
    for p in parameters:
        if p.grad is None:  # a rank without a piece, or a parameter outside the loss
            p.grad = torch.zeros_like(p)
    # Clipped after the sum over the ranks, so that all take the same step.
    grads = ranks.all_reduce_flat([p.grad for p in parameters])
    norm = torch.stack(torch._foreach_norm(grads)).norm()
    factor = cfg.global_ttt_grad_clip / (norm + 1e-6)
    torch._foreach_mul_(grads, factor.clamp(max=1.0))
    for p, grad in zip(parameters, grads):
        p.grad = grad


class GlobalSGD:
    """SGD of all base weights on scored targets. lr(x) = GLOBAL_TTT_LR (1 + cos(pi x)) / 2 at progress x in 0..1."""

    def __init__(self, scoring: ScoringPass):
        self.scoring = scoring
        momentum = scoring.cfg.global_ttt_momentum
        self.optimizer = torch.optim.SGD(scoring.model.parameters(), momentum=momentum)

    def learn(self, begin: int, end: int, progress: float, progress_after: float) -> int:
        """GLOBAL_TTT_EPOCHS passes over targets begin..end, all of them scored; returns the number of steps.

        Each step takes about GLOBAL_TTT_CHUNK_TOKENS in stream order. Progress rises evenly from `progress` to
        `progress_after`.
        """
        model = self.scoring.model
        cfg = self.scoring.cfg
        ranks = self.scoring.ranks
        val = self.scoring.val
        self.scoring.ledger.may_train(np.arange(begin, end))
        model.requires_grad_(True)
        count = max(round((end - begin) / cfg.global_ttt_chunk_tokens), 1)
        edges = np.linspace(begin, end, count + 1).astype(int)
        chunks = list(itertools.pairwise(edges.tolist())) * cfg.global_ttt_epochs
        for i, (low, high) in enumerate(chunks):
            base_gradients(model, cfg, ranks, val, low, high)
            # From 0 to 1 x is i / len(chunks) to the bit, and from x to x it stays x.
            x = progress + (progress_after - progress) * (i / len(chunks))
            cosine = math.cos(math.pi * x)
            (group,) = self.optimizer.param_groups
            group["lr"] = cfg.global_ttt_lr * 0.5 * (1 + cosine)
            self.optimizer.step()
            self.optimizer.zero_grad()  # to None: the next chunk starts anew
        model.requires_grad_(False)
        ranks.synchronize()
        return len(chunks)


class AdaptDocuments:
    """TTT_METHOD=lora: adapters learn inside each document, base weights in phases from all that is scored so far."""

    plan = staticmethod(plan_segments)

    def __init__(self, scoring: ScoringPass, segments: list[Segment]):
        cfg = scoring.cfg
        ranks = scoring.ranks
        self.scoring = scoring
        self.documents = DocumentTTT(scoring)
        self.batches = {}  # Segment -> this rank's batches
        serial = 0  # chunks of the longest documents: with ever more ranks a pass takes as long as these
        for segment in segments:
            lengths = scoring.val.lengths[segment.first : segment.last]
            dealt = deal_batches(lengths, segment.first, cfg, ranks.world)
            self.batches[segment] = dealt[ranks.rank]
            serial += len(chunk_ends(int(lengths.max()), cfg))
        scoring.log(f"  critical path {serial:,} chunks in a row, the longest documents of the segments")

    def prepare(self):
        """On a GPU, capture whatever the timed part will replay."""
        if self.scoring.ranks.device.type != "cuda":
            return
        begun = time.perf_counter()
        batches = itertools.chain(*self.batches.values())
        self.documents.prepare(list(batches))
        seconds = time.perf_counter() - begun
        captured = len(self.documents.graphs.steps)
        self.scoring.log(f"  captured {captured} graphs in {seconds:.1f} s")

    def score(self, segment: Segment):
        """Score the segment's documents on all ranks; the adapters of the next segment start where these have led."""
        ranks = self.scoring.ranks
        ledger = self.scoring.ledger
        for batch in self.batches[segment]:
            ledger.progress(ranks, self.scoring.log)
            self.documents.run(batch)
        ledger.merge(ranks)
        self.documents.adapters.next_segment(ranks)

    def learn(self, segment: Segment):
        """A phase: the base weights learn from the stream up to the segment's end, with a cosine and a momentum of its
        own."""
        begun = time.perf_counter()
        end = int(self.scoring.val.starts[segment.last])
        steps = GlobalSGD(self.scoring).learn(0, end, 0.0, 1.0)
        seconds = time.perf_counter() - begun
        self.scoring.log(f"  base weights learnt from {end:,} scored targets in {steps} steps, {seconds:.1f} s")


class Slide:
    """TTT_ENABLED=0 with n-grams: windows alone. Segments are those of AdaptDocuments: n-grams count between them."""

    plan = staticmethod(plan_segments)

    def __init__(self, scoring: ScoringPass, segments: list[Segment]):
        self.scoring = scoring

    def prepare(self):
        """Windows need no preparation."""

    def score(self, segment: Segment):
        score_documents(self.scoring, segment.first, segment.last)

    def learn(self, segment: Segment):
        """Nothing learns but the n-grams, which have counted already."""


class SlideAndLearn(Slide):
    """TTT_METHOD=sgd: windows score a segment, then the base weights learn from it (#549).

    One momentum and one half cosine span the stream.
    """

    plan = staticmethod(plan_sgd_segments)

    def __init__(self, scoring: ScoringPass, segments: list[Segment]):
        super().__init__(scoring, segments)
        self.sgd = GlobalSGD(scoring)
        self.progress = {segment: i / len(segments) for i, segment in enumerate(segments)}

    def learn(self, segment: Segment):
        starts = self.scoring.val.starts
        begin = int(starts[segment.first])
        end = int(starts[segment.last])
        progress = self.progress[segment]  # constant in a segment
        self.sgd.learn(begin, end, progress, progress)


class TestTimeTraining:
    """Scores the validation stream segment by segment; a strategy adapts the model inside and between them."""

    STRATEGIES = {"lora": AdaptDocuments, "sgd": SlideAndLearn, "none": Slide}

    def __init__(self, scoring: ScoringPass):
        cfg = scoring.cfg
        val = scoring.val
        log = scoring.log
        method = cfg.ttt_method if cfg.ttt_enabled else "none"
        strategy = self.STRATEGIES[method]
        self.segments = strategy.plan(val.lengths, cfg)
        sizes = [segment.last - segment.first for segment in self.segments]
        shown = sizes if len(sizes) < 30 else f"{min(sizes)}..{max(sizes)}"
        log(f"test-time training ({method}): {len(sizes)} segment(s) of {shown} documents")
        if cfg.ngram_enabled:
            ngram = NGram(cfg, scoring.ranks, val, sizes, log)
            scoring = scoring._replace(ngram=ngram)
        scoring.model.requires_grad_(False)  # only adapters learn, until global SGD asks for more
        self.scoring = scoring
        self.strategy = strategy(scoring, self.segments)

    def prepare(self):
        """Everything that takes time before the first score; no validation token is read for it (B29)."""
        self.strategy.prepare()

    def score(self) -> float:
        """Score a segment, learn from it, go on; returns the ledger's BPB."""
        begun = time.perf_counter()
        for segment in self.segments:
            self.strategy.score(segment)
            if segment.then_learn:
                self.strategy.learn(segment)
        seconds = time.perf_counter() - begun
        targets = self.scoring.val.targets
        world = self.scoring.ranks.world
        self.scoring.log(
            f"  {targets:,} targets in {seconds:.1f} s: {targets / seconds:,.0f} targets/s over {world} rank(s)"
        )
        return self.scoring.ledger.bpb()


def train_on_validation_set(model: GPT, cfg: Config, ranks: Ranks, log: Log, val: ValidationStream):
    """AdamW over the whole validation set before any of it is scored (#1735, #1738), which breaks C3.

    The published mistake, kept so that it can be measured: no ledger is asked, and scoring the artifact fails C3. The
    embedding and the first PREQUANT_TTT_FREEZE_BLOCKS layers stay as they are.
    """
    adam = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    chunk = cfg.global_ttt_chunk_tokens
    epochs = cfg.prequant_ttt_epochs
    by_layer = []  # the parameters that are stacked by layer
    for name, p in model.named_parameters():
        if p.ndim > 1 and not name.startswith(("skip_", "tok_emb")):
            by_layer.append(p)
    for epoch in range(epochs):
        cosine = math.cos(math.pi * epoch / max(epochs - 1, 1))
        adam.param_groups[0]["lr"] = cfg.prequant_ttt_lr * (0.55 + 0.45 * cosine)
        for begin in range(0, val.targets, chunk):
            end = min(begin + chunk, val.targets)
            base_gradients(model, cfg, ranks, val, begin, end)
            model.tok_emb.grad = None  # Adam leaves alone what never had a gradient
            for p in by_layer:
                p.grad[: cfg.prequant_ttt_freeze_blocks] = 0.0
            adam.step()
            adam.zero_grad()  # to None: base_gradients starts anew
        log(f"  trained on the validation set, pass {epoch + 1} of {epochs}")


# ======== Packer ==============================================================================================================================================

BOOTSTRAP = """# coding: latin-1
# Packed train_gpt.py. Its source: python3 train_gpt.py --unpack FILE, or the lzma stream in the string below.
import hashlib,lzma,os,tempfile
PACKED_PATH=__file__
s=lzma.decompress("%s".encode("latin-1"))
__file__=os.path.join(tempfile.gettempdir(),"train_gpt_"+str(os.getuid())+"_"+hashlib.sha256(s).hexdigest()[:24]+".py")
if not(os.path.exists(__file__)and open(__file__,"rb").read()==s):
 t=__file__+str(os.getpid())
 with open(t,"wb")as f:f.write(s)
 os.replace(t,__file__)
exec(compile(s,__file__,"exec"))
"""


def documented(tree: ast.Module) -> list:
    """Nodes whose first statement is a docstring and not the only one."""
    return [
        node
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        and ast.get_docstring(node) is not None
        and len(node.body) > 1
    ]


def strip_source(source: str) -> str:
    """The source without comments, docstrings and blank lines; names, annotations and layout stay, since Triton and torch read them."""
    lines, drop, inside = source.split("\n"), set(), set()
    for node in documented(ast.parse(source)):
        doc = node.body[0]
        alone = not lines[doc.lineno - 1][: doc.col_offset].strip() and node.body[1].lineno > doc.end_lineno
        drop.update(range(doc.lineno, doc.end_lineno + 1) if alone else ())
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        row, col = token.start
        if token.type == tokenize.COMMENT:
            lines[row - 1] = lines[row - 1][:col].rstrip()
        elif token.end[0] > row and token.type not in (tokenize.NEWLINE, tokenize.NL):
            inside.update(range(row, token.end[0] + 1))  # a string of several lines stays to the letter
    kept = [
        line if number in inside else line.rstrip()
        for number, line in enumerate(lines, 1)
        if number not in drop and (number in inside or line.strip())
    ]
    return "\n".join(kept) + "\n"


def without_docstrings(source: str) -> str:
    """The syntax tree as text, docstrings left out."""
    tree = ast.parse(source)
    for node in documented(tree):
        del node.body[0]
    return ast.dump(tree)


def pack_script(source: str) -> bytes:
    """Self-extracting script: the stripped source, LZMA, in a latin-1 string (3 % overhead where base85 has 25 %)."""
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 4, "lp": 0, "pb": 0}]
    stripped = strip_source(source)
    if without_docstrings(source) != without_docstrings(
        stripped
    ):  # a string with a blank line or a trailing space in it
        raise RuntimeError("stripping comments would change the program")
    payload = lzma.compress(stripped.encode(), format=lzma.FORMAT_XZ, check=lzma.CHECK_CRC32, filters=filters).decode(
        "latin-1"
    )
    for char, escape in (("\\", "\\\\"), ("\r", "\\r"), ("\n", "\\n"), ("\0", "\\x00"), ('"', '\\"')):
        payload = payload.replace(char, escape)
    return (BOOTSTRAP % payload).encode("latin-1")


def unpack_script(path: Path) -> str:
    """The source inside a packed script, without running it."""
    require(path.is_file(), f"--unpack {path}: no such file")
    head, tail = (re.escape(part) for part in BOOTSTRAP.split("%s"))
    found = re.fullmatch(f"{head}(.*){tail}", path.read_bytes().decode("latin-1"))
    with explained(
        f"--unpack {path}: not a script packed by train_gpt.py, or a damaged one",
        TypeError,
        ValueError,
        SyntaxError,
        lzma.LZMAError,
    ):
        return lzma.decompress(ast.literal_eval(f'"{found[1]}"').encode("latin-1")).decode()


# ======== Main ================================================================================================================================================


class Run:
    """What the modes share: settings, ranks, log, timers, verdicts, validation data, attention backend."""

    def __init__(self, cfg: Config):
        self.cfg, self.folder, self.ranks = cfg, artifact_folder(cfg), Ranks(cfg)
        if self.ranks.main:
            with explained(f"ARTIFACT_DIR={self.folder}: cannot be made ({{}}); name another folder", OSError):
                self.folder.mkdir(parents=True, exist_ok=True)
        self.log = log = Log(self.ranks)
        self.phases, self.verdicts, self.result = Phases(self.ranks, log), Verdicts(), {"bpb": {}, "bytes": {}}
        torch.manual_seed(cfg.seed)
        torch.set_float32_matmul_precision("high")
        with self.phases("read"):
            self.val = ValidationStream(cfg)
            self.data = describe_data(cfg, self.val)
        with self.phases("setup"):
            self.attention = choose_attention(cfg, self.ranks.device)
        self.environment = {
            "hardware": (
                f"{self.ranks.world} x {torch.cuda.get_device_name()}"
                if self.ranks.device.type == "cuda"
                else f"CPU, {torch.get_num_threads()} threads x {self.ranks.world} rank(s)"
            ),
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "cuda": torch.version.cuda,
                "numpy": np.__version__,
            },
            "source_sha256": hashlib.sha256(
                (SOURCE if "PACKED_PATH" in globals() else strip_source(SOURCE)).encode()
            ).hexdigest(),
            "settings_sha256": cfg.sha256(),
            "attention": self.attention,
        }
        changed = [f"{k.upper()}={v}" for k, v in cfg.settings().items() if v != getattr(Config(), k)]
        kernels = (
            "Triton"
            if use_kernels(torch.bfloat16, self.ranks.device, cfg.model_dim // cfg.num_heads)
            else "plain PyTorch"
        )
        log(
            f"hardware {self.environment['hardware']}, attention {self.attention}, kernels {kernels}, "
            + ", ".join(f"{k} {v}" for k, v in self.environment["versions"].items())
        )
        log(f"source sha256 {self.environment['source_sha256']}")
        log(
            f"settings sha256 {self.environment['settings_sha256']}; changed from their defaults: {' '.join(changed) or 'none'}"
        )
        log("all settings: " + json.dumps(cfg.settings()), console=False)
        log("data: " + ", ".join(f"{k} {v}" for k, v in self.data.items()))
        if not self.data["manifest"]:
            log("data: no manifest.json, so documents and hashes are unchecked")

    def scoring(self, model: GPT, name: str) -> ScoringPass:
        """A pass over the validation stream, with a ledger of its own."""
        ledger = Ledger(name, self.val.target_bytes, self.verdicts)
        return ScoringPass(model, self.cfg, self.ranks, self.log, self.val, ledger)


def artifact_folder(cfg: Config) -> Path:
    """ARTIFACT_DIR; else runs/SEED, or a packed script's own folder."""
    return Path(cfg.artifact_dir or (RUNNING.parent if "PACKED_PATH" in globals() else Path("runs") / str(cfg.seed)))


def preflight(run: Run):
    """Everything that could fail after the training clock has run, tried before it starts."""
    cfg = run.cfg
    if run.ranks.main:
        probe = {
            "q.0.symbols": np.random.default_rng(0).integers(-9, 10, (64, 64)).astype(np.int8),
            "q.0.step": np.arange(64, dtype=np.int16),
            "r": np.ones(3, np.float16),
        }
        path = run.folder / f"preflight{os.getpid()}.bin"
        save_artifact(path, probe, {"settings": cfg.settings()})
        loaded, _ = load_artifact(path)
        path.unlink()
        if any((loaded[k] != probe[k]).any() for k in probe):
            raise RuntimeError("the artifact codec does not reproduce its input")
        if cfg.ledger_path:
            with whole_file(Path(cfg.ledger_path), "LEDGER_PATH") as f:
                f.write(b"")
        if not cfg.ttt_eval_only:  # a packed script may run in its own folder: it is not changed
            script, packed = run.folder / "train_gpt.py", pack_script(SOURCE)
            blocked = script.exists() and script.samefile(RUNNING) and script.read_bytes() != packed
            require(
                not blocked,
                f"ARTIFACT_DIR={run.folder}: would overwrite the running script; set ARTIFACT_DIR elsewhere",
            )
            need = (
                4 * sum(p.numel() for p in GPT(cfg, run.attention, torch.float32).parameters()) + 2 * cfg.artifact_cap
            )
            free = shutil.disk_usage(run.folder).free
            require(
                free >= need,
                f"ARTIFACT_DIR={run.folder}: {free / 1e6:.0f} MB free, {need / 1e6:.0f} MB needed; free space or set ARTIFACT_DIR elsewhere",
            )
    if not cfg.ttt_eval_only and not cfg.quantize_only:
        stream = TrainStream(cfg)
        micro_batches = -(-cfg.train_batch_tokens // cfg.micro_batch_tokens)
        run.log(
            f"checks passed: {stream.tokens:,} training tokens in {len(stream.shards)} shard(s), {micro_batches} micro-batch(es) a step"
        )
        if micro_batches < run.ranks.world:
            run.log(
                f"warning: {run.ranks.world - micro_batches} rank(s) will idle in every step; lower MICRO_BATCH_TOKENS"
            )


def train(run: Run, model: GPT):
    """Train the model and keep its weights on disk (trained.npz)."""
    model.init_weights(run.cfg.seed)
    run.log(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, visits {[v.layer for v in model.schedules[False]]}"
    )
    trainer = Trainer(model, run.cfg, run.ranks, run.log, run.phases)
    with run.phases("warmup"):
        trainer.warm_up()
    run.log(f"warmed up in {run.phases.seconds['warmup']:.1f} s")
    with run.phases("steps"):
        run.result["training"] = trainer.run()
    with run.phases("write"):
        if run.ranks.main:
            meta = {
                "settings": run.cfg.settings(),
                "training": run.result["training"],
                "seconds": {k: run.phases.seconds[k] for k in ("warmup", "steps")},
            }
            with whole_file(run.folder / "trained.npz") as f:
                np.savez(
                    f,
                    meta=np.array(json.dumps(meta)),
                    **{n: p.detach().cpu().numpy() for n, p in model.named_parameters()},
                )


def read_trained(path: Path) -> tuple[dict[str, np.ndarray], dict]:
    """Weights (fp32) and meta of trained.npz."""
    with explained(
        f"{path}: cannot be read ({{}}); train again, or set ARTIFACT_DIR to the folder that holds it",
        OSError,
        ValueError,
        KeyError,
        EOFError,
        zipfile.BadZipFile,
    ):
        arrays = dict(np.load(path))
        return arrays, json.loads(str(arrays.pop("meta")))


def load_trained(run: Run, model: GPT):
    """Put the weights of trained.npz into the model, and its counts and times into the result."""
    arrays, meta = read_trained(path := run.folder / "trained.npz")
    load_state(model, {n: torch.from_numpy(a) for n, a in arrays.items()}, path)
    run.result["training"] = meta["training"]
    run.phases.seconds.update(meta["seconds"])


def diagnose(run: Run, model: GPT, name: str):
    """BPB of the weights in memory, in a ledger and a time of its own."""
    with run.phases("diagnostic"):
        run.result["bpb"][name] = score_stream(run.scoring(model, name))
    run.log(f"{name}: {run.result['bpb'][name]:.5f} BPB")


def write_artifact(run: Run, model: GPT):
    """Calibrate, quantise, and write model.bin and the packed train_gpt.py.
    Steps widen until the two fit under the cap; with RATE_DISTORTION they also narrow, until a thousandth of it is left or nothing gains."""
    cfg, packed = run.cfg, pack_script(SOURCE)
    with run.phases("calibrate"):
        hessians = collect_hessians(model, TrainStream(cfg), cfg, run.ranks)
    weights, room = sum(p.numel() for p in model.parameters()), cfg.artifact_cap - cfg.artifact_margin - len(packed)
    saved, best, last, extra = 8 * (cfg.artifact_cap - room) / weights if cfg.rate_distortion else 0.0, b"", 0, {}
    for attempt in range(12):
        with run.phases("quantize"):
            arrays = quantize(model, hessians, cfg, run.ranks, saved)
            if cfg.logit_calibration_enabled:
                extra = extra or {"logit_calibration": quantized_calibration(run, model, arrays)}
        before = run.phases.seconds.get("write", 0.0)
        with run.phases("write"):
            data = encode_artifact(arrays | extra, {"settings": cfg.settings()}) if run.ranks.main else b""
            size = int(run.ranks.agree(len(data)))
        run.log(f"model.bin of {size:,} bytes, {room - size:,} left")
        best = data if size <= room and len(data) >= len(best) else best
        if size <= room and (
            not cfg.rate_distortion or room - size < room / 1000 or attempt > 2 or abs(size - last) < room / 10000
        ):
            break
        saved, last = (
            saved + 8 * (size - room * 0.9997) / weights,
            size,
        )  # a step 2**x times as wide saves x bits a weight
        spent = run.phases.seconds["write"] - before  # coding that only steers the search is part of it: training time
        run.phases.seconds["quantize"], run.phases.seconds["write"] = run.phases.seconds["quantize"] + spent, before
    else:
        raise UserError(
            f"ARTIFACT_CAP={cfg.artifact_cap}: the model does not fit with any step; shrink the model or raise the cap"
        )
    with run.phases("write"):
        if run.ranks.main:
            with whole_file(run.folder / "model.bin") as f:
                f.write(best)
            script = run.folder / "train_gpt.py"
            if not (script.exists() and script.read_bytes() == packed):
                with whole_file(script) as f:
                    f.write(packed)
    run.ranks.agree(0)
    run.log(f"train_gpt.py: {len(SOURCE.encode()):,} bytes of source packed into {len(packed):,}")
    run.log(
        "seconds: " + ", ".join(f"{name} {run.phases.seconds[name]:.1f}" for name in ("calibrate", "quantize", "write"))
    )


def quantized_calibration(run: Run, model: GPT, arrays: dict[str, np.ndarray]) -> np.ndarray:
    """fit_logit_calibration for the weights as the artifact will give them back; the model stays as it is."""
    quantized = copy.deepcopy(model)
    load_state(quantized, dequantize(arrays), run.folder)
    return fit_logit_calibration(quantized, TrainStream(run.cfg), run.cfg, run.ranks)


def score_artifact(run: Run, model: GPT):
    """Load model.bin from disk into the model and score it; the number comes from what ships."""
    cfg, path = run.cfg, run.folder / "model.bin"
    with run.phases("load"):
        arrays, meta = load_artifact(path)
        load_state(model, dequantize(arrays), path)
    others = sorted(k.upper() for k, v in cfg.settings().items() if v != meta["settings"].get(k))
    if others:
        run.verdicts.set("C4", "DISPUTED", f"scored with settings other than the artifact's: {', '.join(others)}")
    scoring = run.scoring(model, "quantized")
    run.result["segments"] = [len(run.val.starts)]
    if meta["settings"].get("prequant_ttt_enabled"):
        reason = "PREQUANT_TTT_ENABLED=1: the weights learnt from every validation target before it was scored"
        scoring.ledger.break_condition("C3", reason)
    if cfg.ttt_enabled or cfg.ngram_enabled:
        diagnose(run, model, "quantized")
        scoring = run.scoring(model, "adapted")
        with run.phases("prepare"):
            adaptation = TestTimeTraining(scoring)
            adaptation.prepare()
        with run.phases("adapt"):
            bpb = adaptation.score()
        # What the audit may hold us to: documents of a segment are independent.
        run.result["segments"] = [segment.last - segment.first for segment in adaptation.segments]
    else:
        with run.phases("score"):
            bpb = score_stream(scoring)
    run.headline = scoring.ledger.name
    run.result["bpb"][run.headline] = bpb
    run.log(f"{run.headline}: {bpb:.5f} BPB")
    if cfg.ledger_path and run.ranks.main:
        with whole_file(Path(cfg.ledger_path), "LEDGER_PATH") as f:
            np.save(f, scoring.ledger.nats)
        run.log(f"ledger written to {cfg.ledger_path}")


def finish(run: Run):
    """Verdicts, result.json and the final table."""
    cfg, result, phases = run.cfg, run.result, run.phases
    files = {"code": run.folder / "train_gpt.py", "model": run.folder / "model.bin"}
    result["bytes"] = {name: path.stat().st_size for name, path in files.items() if path.exists()}
    result["bytes"]["total"] = total = sum(result["bytes"].values())
    run.verdicts.set(
        "bytes", "PASS" if total <= cfg.artifact_cap else "FAIL", f"{total:,} of {cfg.artifact_cap:,} bytes"
    )
    train_s, eval_s, limit = phases.budget("train"), phases.budget("eval"), cfg.max_wallclock_seconds
    if limit and not cfg.ttt_eval_only:
        run.verdicts.set(
            "train_budget",
            "PASS" if train_s < limit else "FAIL",
            f"{train_s:.1f} of {limit:.0f} s: steps, calibration, quantisation",
        )
    if limit:
        run.verdicts.set(
            "eval_budget",
            "PASS" if eval_s < limit else "FAIL",
            f"{eval_s:.1f} of {limit:.0f} s: read, load, prepare, score",
        )
    failed = run.verdicts.failed()
    if not failed:
        result["val_bpb"] = result["bpb"][run.headline]
    result.update(
        dataset=run.data["dataset"],
        seconds={"train": train_s, "eval": eval_s, **phases.seconds},
        settings=cfg.settings(),
        data=run.data,
        seed=cfg.seed,
        verdicts={c: {"verdict": v, "reason": r} for c, (v, r) in run.verdicts.table.items()},
        **run.environment,
    )
    if run.ranks.main:
        with whole_file(run.folder / ("eval_result.json" if cfg.ttt_eval_only else "result.json")) as f:
            f.write(json.dumps(result, indent=1).encode())
    table = [("", "")] + [(f"{name} BPB", f"{bpb:.6f}") for name, bpb in result["bpb"].items()]
    table += [(f"{name} bytes", f"{size:,}") for name, size in result["bytes"].items()]
    table += [(f"{name} seconds", f"{seconds:.1f}") for name, seconds in result["seconds"].items()]
    table += [(condition, f"{verdict:9s} {reason}") for condition, (verdict, reason) in run.verdicts.table.items()]
    for name, value in table:
        run.log(f"  {name:24s} {value}".rstrip())
    run.log(
        f"val_bpb {result['val_bpb']:.6f} on all {run.val.targets:,} targets, dataset {run.data['dataset']}"
        if not failed
        else f"no val_bpb: {', '.join(failed)} failed"
    )


def configure(env) -> Config:
    """Settings from the environment; where a run continues from a file, that file's settings stand where the environment says nothing."""
    cfg, stored, path = Config.from_env(env, check=False), {}, None
    if cfg.ttt_eval_only:
        path = artifact_folder(cfg) / "model.bin"
        stored = still_set(read_artifact(path)[0]["meta"]["settings"])
    elif cfg.quantize_only:
        path = artifact_folder(cfg) / "trained.npz"
        stored = still_set(read_trained(path)[1]["settings"])
    others = sorted(set(stored) ^ set(cfg.settings())) if path else []
    require(
        not others,
        f"{path}: written by a script with other settings than this one's ({', '.join(others)}); use the train_gpt.py that was packed with it",
    )
    return Config.from_env(env, stored)


def execute(cfg: Config):
    """One mode from beginning to end."""
    run = Run(cfg)
    try:
        preflight(run)
        if cfg.check_only:
            return
        run.log.open(run.folder / ("eval.log" if cfg.ttt_eval_only else "train.log"), "a" if cfg.quantize_only else "w")
        model = GPT(cfg, run.attention, torch.bfloat16 if run.ranks.device.type == "cuda" else torch.float32).to(
            run.ranks.device
        )
        if not cfg.ttt_eval_only:
            (load_trained if cfg.quantize_only else train)(run, model)
            diagnose(run, model, "trained")
            if cfg.prequant_ttt_enabled:  # scoring the artifact opens the door that keeps its number out of val_bpb
                with run.phases("prequant"):
                    train_on_validation_set(model, cfg, run.ranks, run.log, run.val)
                diagnose(run, model, "prequant")
            write_artifact(run, model)
        score_artifact(run, model)
        finish(run)
    finally:
        run.ranks.close()


def main(argv: list[str]) -> int:
    """Exit status: 0, 2 after one line about bad input, 130 after Ctrl-C."""
    if argv in (["--help"], ["-h"]):
        print(__doc__ or "", help_text(), sep="\n")
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds: half-written files are removed
    try:
        if len(argv) == 2 and argv[0] == "--unpack":
            sys.stdout.write(unpack_script(Path(argv[1])))
            return 0
        require(not argv, f"{' '.join(argv)}: not an option; settings are environment variables (--help)")
        execute(configure(os.environ))
        return 0
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except OSError as e:
        print(
            f"error: {e.filename or 'a file'}: {e.strerror or e}; free space there or name another folder",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
