"""Train a GPT in ten minutes, quantise it below 16,000,000 bytes, and score it in bits per byte (BPB).

    torchrun --nproc_per_node=8 train_gpt.py          train, quantise, pack, reload from disk, score
    TTT_EVAL_ONLY=1 python train_gpt.py               score the artifact in ARTIFACT_DIR
    QUANTIZE_ONLY=1 python train_gpt.py               start again from the trained weights in ARTIFACT_DIR
    CHECK_ONLY=1 python train_gpt.py                  check data, tokenizer, attention, codec and disk, then stop
    python train_gpt.py --help                        every setting, its default and its meaning
    python train_gpt.py --unpack FILE                 print the source inside a packed script

Settings are environment variables. The same file runs on a CPU, one GPU, eight GPUs or several nodes. The data folder is made by
prepare_data.py; shards of third parties in the same format load as they are.

Sections, each using only those above it: Hyperparameters, Runtime, Data, Kernels, Attention, Model, Adapters, Optimizers, Training, Entropy coder,
Quantizer, Artifact, Scoring, N-gram, Test-time training, Packer, Main.
"""

import ast
import collections
import contextlib
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
from collections.abc import Callable, Iterable
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
        False, "without RATE_DISTORTION: 8-bit steps for the most salient group of 64 columns"
    )
    lqer_enabled: bool = setting(False, "correct the rounding error of some matrices by a low-rank product")
    lqer_rank: int = setting(4, "rank of that product", POSITIVE)
    lqer_top_k: int = setting(3, "corrected matrices: those of largest error")
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
    ttt_grad_steps: int = setting(1, "steps on each chunk after it is scored; 0: carried context only")
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
    ngram_mode: str = setting(
        "tilt",
        "tilt: raise the hinted token's probability; mix: mix in the counts, the network as the lowest order",
        "tilt, mix",
    )
    ngram_order: int = setting(16, "longest n-gram, its last token included (TOKEN_ORDER of #2140)", "[2, 64]")
    ngram_min_order: int = setting(3, "shortest n-gram (#2140: 16)", "[2, 64]")
    ngram_threshold: float = setting(
        0.5, "least share of the commonest continuation (TOKEN_THRESHOLD of #2140: 0.8)", "[0, 1]"
    )
    ngram_min_count: int = setting(2, "least number of times a context was seen (#2140: 1)", "[1, inf)")
    ngram_boost: float = setting(1.0, "log-odds added to the hinted token (TOKEN_BOOST of #2140: 2.625)", "[0, 12]")
    ngram_calibrate: bool = setting(
        True, "learn the boost of each order, count and share from scored segments (#2140: 0)"
    )
    ngram_weight: float = setting(0.2, "weight of each order in the mixture", "[0, 1)")
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
            (
                "ttt_mask",
                self.ttt_grad_steps == 0 or masked != set(ADAPTER_KINDS),
                "leaves no adapter to learn; set TTT_GRAD_STEPS=0",
            ),
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
RETIRED = {  # settings of older artifacts that are fixed now, and the only value with which such an artifact loads
    "awq_lite_bits": 8,
    "awq_lite_group_size": 64,
    "awq_lite_group_top_k": 1,
    "lqer_asym_group": 64,
    "lqer_gain_select": False,
    "lqer_weight": "none",
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

    def charge(self, name: str, to: str, seconds: float):
        """Move seconds of one phase to another."""
        self.seconds[name] -= seconds
        self.seconds[to] = self.seconds.get(to, 0.0) + seconds

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
    """Where the documents of a packed buffer lie. Attention is causal, aligned at the end, inside each (query, key) segment."""

    cu_q: Tensor  # int32 (segments + 1,): query offsets
    cu_k: Tensor  # int32 (segments + 1,): key offsets; the same tensor unless a cache is read
    max_q: int  # upper bounds of the segment lengths
    max_k: int
    positions: Tensor  # int32 (tokens,): offset in the document; 0 means that no previous token may be seen


class Batch(NamedTuple):
    """One packed buffer and where it comes from."""

    tokens: Tensor  # int64 (tokens,)
    targets: Tensor  # int64 (tokens,): -1 where padded
    seq: Seq
    split: str  # "train" or "val"


def pack(
    tokens: np.ndarray,
    starts: np.ndarray,
    span: int,
    max_len: int,
    split: str,
    capacity: int,
    targets: np.ndarray | None = None,
) -> Batch:
    """Documents that begin at ``starts`` (starts[0] == 0) and are cut every ``span`` tokens -> a CPU batch padded to ``capacity``.
    ``tokens`` holds one more token than there are inputs, unless ``targets`` are given. Padding is a document of its own, so it is never NaN and never seen."""
    inputs = tokens if targets is not None else tokens[:-1]
    targets = tokens[1:] if targets is None else targets
    n = len(inputs)
    if n < capacity:
        starts = np.append(starts, n)
    lengths = np.diff(np.append(starts, capacity))
    pieces = -(-lengths // span)
    offsets = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    cu = torch.from_numpy(np.append(np.repeat(starts, pieces) + offsets * span, capacity).astype(np.int32))
    positions = (np.arange(capacity) - np.repeat(starts, lengths)).astype(np.int32)
    padded_inputs, padded_targets = np.zeros(capacity, np.int64), np.full(capacity, -1, np.int64)
    padded_inputs[:n], padded_targets[:n] = inputs, targets
    return Batch(
        torch.from_numpy(padded_inputs),
        torch.from_numpy(padded_targets),
        Seq(cu, cu, max_len, max_len, torch.from_numpy(positions)),
        split,
    )


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Copy without waiting."""
    move = lambda t: t if device.type == "cpu" else t.pin_memory().to(device, non_blocking=True)
    cu = move(batch.seq.cu_q)
    return batch._replace(
        tokens=move(batch.tokens),
        targets=move(batch.targets),
        seq=batch.seq._replace(cu_q=cu, cu_k=cu, positions=move(batch.seq.positions)),
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
        return pack(tokens, starts, span, self.cfg.train_seq_len, "train", self.cfg.micro_batch_tokens)

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


# MERGE: stand-ins for B2's; take his Model section. The sections of C use LogitCalibration, calibrated_scores(...).nats, GPT(..., logit_calibration=) and GPT.logits.
class LogitCalibration(NamedTuple):
    """What an artifact with logit calibration changes: logits <- scale * softcap(z) + bias."""

    scale: Tensor  # ()
    bias: Tensor  # (V,)


class Scores(NamedTuple):
    nats: Tensor
    hint_log_prob: Tensor | None = None


def calibrated_scores(
    z: Tensor, targets: Tensor, caps: Tensor, calibration: LogitCalibration, hint: Tensor | None = None
) -> Scores:
    """z (T, V), targets and hint (T,) int64 -> Scores."""
    logits = calibration.scale * softcap(z, caps) + calibration.bias
    lse = logits.logsumexp(-1)
    nats = lse - logits.gather(1, targets[:, None])[:, 0]
    return Scores(nats, None if hint is None else logits.gather(1, hint[:, None])[:, 0] - lse)


class GPT(nn.Module):
    """The network of #1855. Matrices of all layers are stacked, so that optimizer and quantizer see one tensor of a kind.
    tok_emb (V, d) | qkv (L, (H + 2 KV) D, d) | o (L, d, H D) | up (L, hidden, d) | down (L, d, hidden)
    attn_scale, mlp_scale (L, d) | resid_mix (L, 2, d) | q_gain (L, H) | attn_gate (L, H, window) | skip_weights, skip_gates (skips, d)
    parallel_post (L, 2 from, 2 to) | parallel_resid (L, 2) | smear_gate (window,) | smear_lambda () | caps (2,), positive and negative logits"""

    def __init__(
        self, cfg: Config, attention: str, dtype: torch.dtype, logit_calibration: LogitCalibration | None = None
    ):
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
        self.calibration = logit_calibration

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

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (T, d) -> logits (T, V) before the softcap."""
        return F.linear(hidden, self.tok_emb.to(self.dtype))

    def nll(self, hidden: Tensor, targets: Tensor, *, lora=None, hint: Tensor | None = None):
        """hidden (T, d), targets (T,) int64 -> nats per token (T,) fp32; with hint (T,) int64 also the log-probability of the hinted token."""
        z, delta = F.linear(hidden, self.tok_emb.to(self.dtype)), lora.at("head", 0) if lora is not None else None
        z = z if delta is None else z + delta(hidden)
        if self.calibration is not None:
            scores = calibrated_scores(z, targets, self.caps, self.calibration, hint)
            return scores.nats if hint is None else scores
        nats, lse = softcap_nll(z, targets, self.caps)
        return nats if hint is None else (nats, softcap(z.gather(1, hint[:, None])[:, 0], self.caps) - lse)

    def loss(self, hidden: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
        """Sum of nll() times weight (T,) fp32."""
        if self.calibration is not None:
            return torch.dot(self.nll(hidden, targets), weight)
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


def batch_nats(model: GPT, batch: Batch, looped: bool, hint: Tensor | None = None):
    """Nats of every target of the batch, fp32 (tokens,); with hints (tokens,) also their log-probabilities."""
    return model.nll(model.trunk(batch.tokens, batch.seq, looped=looped), batch.targets.clamp(min=0), hint=hint)


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


# ======== Entropy coder: stacks of integer matrices, by a model that the decoder learns as well =======================
#
# A stack is G integer matrices of one shape, (G, R, n). Rows are draws from a correlated Gaussian whose covariance the
# coder learns from the rows that it has coded. The decoder knows the same rows, so nothing of the model is stored.
#
#   predictor   Let the correlations be C = (I + L) diag(d) (I + L)^T, with L strictly lower triangular. A row of unit
#               variances is then x = e + L e with independent innovations e. Column j follows the columns k < j:
#                   mean_j = sum_k<j L_jk e_k
#                   e_j    = x_j - mean_j
#   variance    var(e_rj) = gain_r d_j v_j
#                   v_j      mean square of column j, of this matrix and of all members of the stack
#                   gain_r   mean square of row r's own e / sqrt(d v) so far, starting at the stack's mean
#   tables      x_j is a Gaussian, or a mixture with heavier tails, integrated over unit bins. There is a table for each
#               eighth of an octave of variance and each eighth of the mean. The mean's whole part shifts the symbol:
#                   code = x_j - floor(mean_j) + MAX_SYMBOL, or ESCAPE, and x_j follows as a raw int16
#   rANS        A state s holds 2**16 <= s < 2**32. For a symbol of frequency f, out of 2**14, after others of sum c:
#                   decode   slot = s mod 2**14 names the symbol
#                            s <- f (s div 2**14) + slot - c
#                            if s < 2**16: s <- 2**16 s + next word
#                   encode   (last symbol first)
#                            if s >= 2**18 f: its low 16 bits become a word, s <- s div 2**16
#                            s <- 2**14 (s div f) + (s mod f) + c
#               One step codes a column of all rows of a chunk, each row with a state of its own.
#
# Encoder and decoder must agree to the bit on any machine. So matrix products are only of integers held in float64,
# exact in any order while sums stay below 2**53. All else is element by element in IEEE arithmetic; logarithms and the
# Gaussian come from integer tables; nothing that is decoded calls libm. A name that ends in _q8 is a fixed-point number
# in units of 2**-8, and so on.

RANS_STATES = 6144  # most rows of a step, over all members of a stack
PROB_BITS = 14  # the frequencies of a table add up to 2**14
SLOT_MASK = (1 << PROB_BITS) - 1

MAX_SYMBOL = 127  # codes 0..254 are -127..127 around the floor of the mean
ESCAPE = 255

MEAN_FRACTIONS = 8  # tables for one integer of the mean
LOG2_STEPS = 32  # of log2_fixed, per octave
BUCKETS_PER_OCTAVE = 8
MIN_LOG2_VARIANCE = -5  # lower end of the first bucket
VARIANCE_BUCKETS = 116
TAIL_SHAPES = ((4, 4, 4, 4), (3, 4, 4, 5), (2, 4, 4, 7), (1, 3, 5, 12))  # quarters of sigma of four equal Gaussians
GAUSS_STEPS = 1024  # per sigma, of half_gaussian

REFRESH_COLUMNS = 16  # between two updates of the rows' gains
FIRST_CHUNK_ROWS = 64  # chunks double from here on, as the covariance gets old more slowly
MAX_CHUNK_ROWS = 1024  # products of so many pairs of values up to 128 add up to 2**24 at most, exact even in float32

# Priors: how many made-up observations count beside the real ones.
UNIT_GAIN_SYMBOLS = 1000  # with a gain of 1
UNIT_VARIANCE_ROWS = 100  # with the variance of the whole matrix, which the header gives
SHARED_CORRELATION_ROWS = 500  # with the pool's correlations, beside those of all members
IDENTITY_SHARE = 1 / 64  # of every correlation matrix. No eigenvalue is smaller, so |L_ij| <= d_j**-1/2 <= 8
MIN_VARIANCE = 2.0**MIN_LOG2_VARIANCE
CORRELATION_COST = 0.002  # nats per symbol that a predictor must gain, for its time

# Bounds: |L_q12 e_q8| <= 8 sqrt(2**12 / 2**-5) 2**12 2**17 < 2**41, so 4,096 columns add up below 2**53.
MAX_SCALED_VARIANCE = 2.0**12
MAX_MEAN_Q8 = 2.0**15
MAX_INNOVATION_Q8 = 2.0**17
MIN_D_Q22 = 2.0**15  # half of 1/64: rounding may take d below it


class CorrelationPrior(NamedTuple):
    """What the first rows of a stack are predicted with: the correlations of earlier stacks of the same width."""

    rows: int  # that the prior counts for against a matrix's own rows; 0: no predictor, columns are independent
    pool_weight: float  # of the earlier stacks' correlations against the identity


CORRELATION_PRIORS = (CorrelationPrior(700, 0.6), CorrelationPrior(2500, 0.4), CorrelationPrior(0, 0.0))


class StackHeader(NamedTuple):
    """What the encoder chose for a stack; stored as JSON."""

    shape: list  # (G, R, n) as coded: turned, and without repeated rows
    log2_variance: list  # of each member
    turned: int  # 1: columns of the matrices are coded as rows
    prior: int  # index into CORRELATION_PRIORS
    trust: list  # observations that the common variance counts for beside a row's own, and beside a column's own
    copies: list  # rows that repeat an earlier row, and which
    mixture: int = 0  # index into TAIL_SHAPES


# --- Integer tables ---


def binary_roots(n: int) -> list[int]:
    """2**(i/n) * 2**60 for i < n. decimal rounds exp and ln correctly, so every machine agrees."""
    logarithms = (Decimal(2).ln() * i / n for i in range(n))
    return [int(x.exp() * 2**60) for x in logarithms]


def half_gaussian(top: int = 9) -> np.ndarray:
    """Mass of N(0, 1) on [0, i / GAUSS_STEPS] times 2**30, int64 (GAUSS_STEPS * top + 1,), by the trapezoid rule."""
    twice_variance = 2 * GAUSS_STEPS**2
    squares = (Decimal(i * i) for i in range(GAUSS_STEPS * top + 1))
    density = [int((-x / twice_variance).exp() * 2**64) for x in squares]
    trapezoids = (a + b for a, b in itertools.pairwise(density))
    area = list(itertools.accumulate(trapezoids, initial=0))
    return np.array([(a << 29) // area[-1] for a in area], np.int64)


def bucket_sigmas_q20() -> np.ndarray:
    """Standard deviation of the Gaussian behind each variance bucket, int64 (VARIANCE_BUCKETS,)."""
    roots_q60 = binary_roots(2 * BUCKETS_PER_OCTAVE)
    sigmas = []
    for bucket in range(VARIANCE_BUCKETS):
        octave, step = divmod(bucket, BUCKETS_PER_OCTAVE)
        middle_q40 = roots_q60[2 * step + 1] << octave >> 20 - MIN_LOG2_VARIANCE
        # Rounding to unit bins has added 1/12 to the variance (Sheppard's correction).
        true_q40 = max(middle_q40 - (1 << 40) // 12, (1 << 40) // 48)
        sigmas.append(math.isqrt(true_q40))
    return np.array(sigmas)


def frequency_tables() -> np.ndarray:
    """Integer frequencies (mixtures, VARIANCE_BUCKETS * MEAN_FRACTIONS, 256), each table's sum 2**PROB_BITS.
    Symbols beyond 6 sigma + 2 have none and are escaped; ESCAPE has at least 1."""
    half = half_gaussian()
    sigma_q20 = bucket_sigmas_q20()[:, None, None]
    unit = 2 * MEAN_FRACTIONS  # of the bins' edges: a symbol less 1/2, less the mean's fraction
    fractions = np.arange(MEAN_FRACTIONS)[:, None]
    symbols = np.arange(-MAX_SYMBOL, MAX_SYMBOL + 2)
    edges = (2 * symbols - 1) * MEAN_FRACTIONS - 2 * fractions
    inside = np.abs(symbols[:-1]) <= (sigma_q20 * 6 >> 20) + 2
    room = SLOT_MASK - inside.sum(-1, keepdims=True)  # every symbol inside gets 1 before the rest is dealt out
    tables = []
    for mixture in TAIL_SHAPES:
        mass = 0  # below each edge, in 2**-32
        for quarters in mixture:
            x = edges * (1 << 32) // (unit * quarters * sigma_q20)  # in 1 / GAUSS_STEPS of this Gaussian's sigma
            distance = np.minimum(np.abs(x), len(half) - 1)
            mass += np.sign(x) * half[distance]
        freq = np.where(inside, 1 + (np.diff(mass) * room >> 32), 0)
        escape = np.ones_like(freq[..., :1])
        freq = np.concatenate([freq, escape], -1).reshape(-1, 256)
        left_over = (1 << PROB_BITS) - freq.sum(-1)  # by rounding
        freq[np.arange(len(freq)), freq.argmax(-1)] += left_over
        tables.append(freq)
    return np.stack(tables)


FREQUENCIES = frequency_tables()
# Bits of every cell. These choose a mixture, nothing is coded with them, so libm may be used.
COST_BITS = PROB_BITS - np.log2(np.maximum(FREQUENCIES, 1))
COST_BITS = np.where(FREQUENCIES > 0, COST_BITS, 0).astype(np.float32)
# Mantissas of frexp, 0.5 <= m < 1, at which the rounded logarithm changes.
LOG2_EDGES = np.array(binary_roots(2 * LOG2_STEPS)[1::2], np.float64) / 2**61


def cell_starts(mixture: int) -> np.ndarray:
    """For every cell (table * 256 + code): frequency << PROB_BITS | sum of the frequencies before it."""
    freq = FREQUENCIES[mixture]
    before = np.minimum(np.cumsum(freq, 1) - freq, SLOT_MASK)
    return (freq << PROB_BITS | before).ravel()


# --- The model ---


def log2_fixed(x: np.ndarray) -> np.ndarray:
    """round(LOG2_STEPS * log2(x)), int64, equal on every machine."""
    mantissa, exponent = np.frexp(x)
    octaves = exponent.astype(np.int64) - 1
    return octaves * LOG2_STEPS + np.searchsorted(LOG2_EDGES, mantissa, side="right")


def ldl(c: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Correlations (G, n, n) to c = (I + L) diag(d) (I + L)^T: strictly lower L_q20 and d_q22, integers in float64.

    L_ij d_j = c_ij - sum_k<j L_ik (L_jk d_k), left-looking in panels of 16 columns. |sum_k L_ik d_k L_jk| <= 1 and no
    eigenvalue below 1/64 keep every product below 2**53."""
    ld_q22 = np.rint(c * 2.0**22)  # begins as c, becomes L d column by column
    low_q20 = np.zeros_like(ld_q22)
    d_q22 = np.empty(c.shape[:2])
    for first in range(0, c.shape[1], 16):
        end = min(first + 16, c.shape[1])
        rows = ld_q22[:, first:end, :first].transpose(0, 2, 1)
        known_q42 = low_q20[:, first:, :first] @ rows
        panel = ld_q22[:, first:, first:end]
        panel = panel - np.rint(known_q42 * 2.0**-20)
        for i in range(end - first):
            j = first + i
            d_q22[:, j] = np.maximum(panel[:, i, i], MIN_D_Q22)
            inverse = 2.0**20 / d_q22[:, j, None]
            column = np.rint(panel[:, i + 1 :, i] * inverse)
            low_q20[:, j + 1 :, j] = column
            later = slice(i + 1, end - first)
            row = panel[:, None, later, i] * 2.0**-20
            panel[:, i + 1 :, later] -= np.rint(column[:, :, None] * row)
        ld_q22[:, first:, first:end] = panel
    return low_q20, d_q22


def correlation(moments: np.ndarray) -> np.ndarray:
    """(G, n, n) second moments to correlations."""
    square = np.diagonal(moments, axis1=1, axis2=2)
    scale = np.sqrt(np.maximum(square, 1e-9))
    return moments / scale[:, :, None] / scale[:, None, :]


def blend(a: np.ndarray, b: np.ndarray, weight: float) -> np.ndarray:
    """a (1 - weight) + b weight."""
    return a * (1 - weight) + b * weight


class StackModel:
    """The distribution of every symbol of a stack, given those before it. Rows go in chunks, and in them columns."""

    def __init__(self, header: StackHeader, pools: dict[int, np.ndarray]):
        """pools: correlations (1, n, n) by width n that earlier stacks have left as prior; this stack adds its own."""
        self.members, self.rows, self.width = header.shape
        self.variance = np.exp2(np.array(header.log2_variance, np.float64))  # of integers: exact
        self.prior = CORRELATION_PRIORS[header.prior]
        self.row_trust, self.column_trust = header.trust
        self.pools = pools
        self.moments = np.zeros((self.members, self.width, self.width))  # sums of x x^T of the rows seen
        self.seen = 0
        self.gain_sum_q8 = np.full(self.members, 256.0 * UNIT_GAIN_SYMBOLS)  # of squared e / sigma
        self.gain_count_q8 = 256.0 * UNIT_GAIN_SYMBOLS

    def shared_moments(self) -> np.ndarray:
        """Moments summed over the members, each at unit variance, (1, n, n)."""
        scaled = (m / v for m, v in zip(self.moments, self.variance))
        return sum(scaled)[None]

    def column_variances(self, shared: np.ndarray) -> np.ndarray:
        """Of x (G, n): a column's own variance, drawn to that of all members."""
        total = self.seen * self.members
        common = UNIT_VARIANCE_ROWS + np.diagonal(shared, axis1=1, axis2=2)
        common = common / (UNIT_VARIANCE_ROWS + total) * self.variance[:, None]
        own = np.diagonal(self.moments, axis1=1, axis2=2)
        variance = (self.column_trust * common + own) / (self.column_trust + self.seen)
        return np.maximum(variance, MIN_VARIANCE)

    def correlations(self, shared: np.ndarray) -> np.ndarray:
        """Of x (G, n, n). As rows come in they move from the pool's to all members' to the matrix's own."""
        identity = np.eye(self.width)[None]
        pool = self.pools.get(self.width, identity)
        c = blend(identity, pool, self.prior.pool_weight)
        if self.seen:
            total = self.seen * self.members
            common = self.prior.pool_weight * total / (total + SHARED_CORRELATION_ROWS)
            own = self.seen / (self.seen + self.prior.rows)
            c = blend(c, correlation(shared), common)
            c = blend(c, correlation(self.moments), own)
        return np.broadcast_to(blend(c, identity, IDENTITY_SHARE), self.moments.shape)

    def predictor(self) -> tuple[np.ndarray | None, np.ndarray]:
        """L_q12 (G, n, n), integers in float64, of x = e + L e, or None for L = 0; and the variance of e (G, n)."""
        shared = self.shared_moments()
        variance = self.column_variances(shared)
        if not self.prior.rows:
            return None, variance
        low_q20, d_q22 = ldl(self.correlations(shared))
        scale = np.sqrt(np.minimum(variance, MAX_SCALED_VARIANCE))
        ratio = scale[:, :, None] / scale[:, None, :]  # from unit variances to those of x
        low_q12 = np.rint(low_q20 * (ratio * 2.0**-8))
        return low_q12, d_q22 * 2.0**-22 * variance

    def code(self, symbols):
        """Code all rows through `symbols`, a SymbolWriter or a SymbolReader."""
        start = 0
        size = FIRST_CHUNK_ROWS
        most = max(1, min(RANS_STATES // self.members, MAX_CHUNK_ROWS))
        while start < self.rows:
            end = min(start + min(size, most), self.rows)
            self.code_chunk(start, end, symbols)
            start = end
            size *= 2
        own = correlation(self.shared_moments())
        earlier = self.pools.get(self.width, own)
        self.pools[self.width] = blend(earlier, own, 0.5)

    def code_chunk(self, start: int, end: int, symbols):
        """Code rows start..end of every member, then learn from them."""
        low_q12, variance = self.predictor()
        sigma = np.sqrt(variance)
        log2_variance = log2_fixed(variance)
        q = np.zeros((self.members, self.width, end - start))
        e_q8 = np.zeros_like(q)
        mean_q8 = np.zeros((self.members, end - start))
        square_q8 = np.zeros_like(mean_q8)  # sums of the rows' squared e / sigma
        rows = slice(start, end)
        mean_gain = (self.gain_sum_q8 / self.gain_count_q8)[:, None]
        prior_q8 = mean_gain * (self.row_trust * 256)
        for a in range(0, self.width, REFRESH_COLUMNS):
            b = min(a + REFRESH_COLUMNS, self.width)
            per_symbol = 1 / (256 * (a + self.row_trust))
            log2_gain = log2_fixed((square_q8 + prior_q8) * per_symbol)
            table = first_tables(log2_variance[:, a:b, None] + log2_gain[:, None])
            if low_q12 is not None:  # what all columns before a say of the next ones, in one product
                known_q20 = low_q12[:, a:b, :a] @ e_q8[:, :a]
            for j in range(a, b):
                if low_q12 is not None:
                    recent_q20 = low_q12[:, j, None, a:j] @ e_q8[:, a:j]
                    mean_q20 = known_q20[:, j - a] + recent_q20[:, 0]
                    mean_q8 = np.rint(mean_q20 * 2.0**-12)
                    mean_q8 = np.clip(mean_q8, -MAX_MEAN_Q8, MAX_MEAN_Q8)
                rounded_q8 = (mean_q8 + 128 // MEAN_FRACTIONS).astype(np.int64)  # to the nearest fraction, once cut
                fraction = (rounded_q8 & 255) * MEAN_FRACTIONS >> 8
                floor = rounded_q8 >> 8
                values = symbols.column(table[:, j - a] + fraction, floor, rows, j)
                q[:, j] = values
                innovation_q8 = values * 256 - mean_q8
                e_q8[:, j] = np.clip(innovation_q8, -MAX_INNOVATION_Q8, MAX_INNOVATION_Q8)
            white_q8 = np.rint(e_q8[:, a:b] / sigma[:, a:b, None])
            white_square_q8 = np.rint(white_q8 * white_q8 / 256)
            square_q8 += white_square_q8.sum(1)
        self.gain_sum_q8 += square_q8.sum(1)
        self.gain_count_q8 += 256.0 * self.width * (end - start)
        self.learn(q)

    def learn(self, q: np.ndarray):
        """Add a chunk (G, n, rows) to the moments; exact, see MAX_CHUNK_ROWS."""
        exact = q.astype(np.float32) if np.abs(q).max() <= 128 else q
        for moments, x in zip(self.moments, exact):
            moments += x @ x.T  # of a matrix with itself: BLAS does half of it
        self.seen += q.shape[2]


def first_tables(log2_variance: np.ndarray) -> np.ndarray:
    """The table of a variance, in 1 / LOG2_STEPS of an octave, at a mean without fraction."""
    above = log2_variance - MIN_LOG2_VARIANCE * LOG2_STEPS
    bucket = above // (LOG2_STEPS // BUCKETS_PER_OCTAVE)
    return np.clip(bucket, 0, VARIANCE_BUCKETS - 1) * MEAN_FRACTIONS


# --- Symbols to rANS states and back ---


class SymbolWriter:
    """Turns the columns of one stack into cells of the tables, for `rans_encode`."""

    def __init__(self, q: np.ndarray):
        self.columns = np.ascontiguousarray(q.transpose(2, 0, 1), np.int64)
        self.cells: list[np.ndarray] = []  # of every step
        self.escaped: list[np.ndarray] = []

    def column(
        self,
        table: np.ndarray,  # (G, rows) int64: the table of each symbol
        floor: np.ndarray,  # (G, rows) int64: whole part of its mean
        rows: slice,
        j: int,
    ) -> np.ndarray:
        """Values of column j in `rows` of all members, (G, rows) int64."""
        values = self.columns[j, :, rows]
        code = values - floor + MAX_SYMBOL
        outside = (code < 0) | (code > ESCAPE)
        cell = (table * 256 + np.where(outside, ESCAPE, code)).ravel()
        frequency = FREQUENCIES[0].ravel()[cell]  # every mixture has its zeros in the same places
        escaped = (frequency == 0) | (cell & 255 == ESCAPE)
        if escaped.any():
            cell[escaped] |= ESCAPE
            self.escaped.append(values.ravel()[escaped])
        self.cells.append(cell.astype(np.int32))
        return values

    def best_mixture(self) -> int:
        """The tail shape that codes every fifth column best."""

        def cost(bits: np.ndarray) -> float:
            sums = (bits[cells].sum(dtype=np.float64) for cells in self.cells[::5])
            return sum(float(x) for x in sums)

        return int(np.argmin([cost(bits.ravel()) for bits in COST_BITS]))


def take(values: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The first `count` values and the rest."""
    if count > len(values):
        raise ValueError("the code ends early")
    return values[:count], values[count:]


class SymbolReader:
    """Decodes columns, stack by stack, from states, words and escaped values, which it uses up from the front."""

    def __init__(self, states: np.ndarray, words: np.ndarray, escaped: np.ndarray):
        self.states = states.astype(np.uint32)
        self.words = words.astype(np.uint32)
        self.escaped = escaped

    def begin(self, header: StackHeader):
        """Make room for a stack, and lay out its tables."""
        members, rows, width = header.shape
        codes = np.tile(np.arange(256, dtype=np.uint8), VARIANCE_BUCKETS * MEAN_FRACTIONS)
        self.columns = np.empty((width, members, rows), np.int16)
        self.starts = cell_starts(header.mixture).astype(np.uint32)
        self.codes = np.repeat(codes, FREQUENCIES[header.mixture].ravel())  # of every slot of every table

    def column(self, table: np.ndarray, floor: np.ndarray, rows: slice, j: int) -> np.ndarray:
        """As SymbolWriter.column, but decoded."""
        state = self.states[: table.size]  # a view: the states advance in place
        table = table.ravel()
        slot = state & SLOT_MASK
        code = self.codes.take((table << PROB_BITS) + slot)
        start = self.starts.take((table << 8) + code)
        before = start & SLOT_MASK
        state[:] = (start >> PROB_BITS) * (state >> PROB_BITS) + (slot - before)  # stays below 2**32
        low = np.flatnonzero(state < 1 << 16)
        taken, self.words = take(self.words, len(low))
        state[low] = state[low] << 16 | taken
        values = code + (floor.ravel() - MAX_SYMBOL)
        is_escaped = code == ESCAPE
        if count := np.count_nonzero(is_escaped):
            values[is_escaped], self.escaped = take(self.escaped, count)
        values = values.reshape(floor.shape)
        self.columns[j, :, rows] = values
        return values


def rans_encode(steps: list[tuple[np.ndarray, np.ndarray]], rider: bytes) -> tuple[np.ndarray, np.ndarray]:
    """steps: (cells, starts), in the order of decoding. Returns states uint32 and words uint16.
    A state begins with 16 bits that carry nothing, so they carry `rider` (two bytes a state), which the decoder ends
    with."""
    states = np.frombuffer(rider, "<u2").astype(np.int64) + (1 << 16)
    words = [np.empty(0, "<u2")]
    for cells, starts in reversed(steps):
        state = states[: len(cells)]
        start = starts[cells]
        freq = start >> PROB_BITS
        full = state >= freq << (32 - PROB_BITS)
        words.append(state[full].astype("<u2"))
        state = np.where(full, state >> 16, state)
        times = (state / freq).astype(np.int64)  # exact: state < 2**32, freq <= 2**14
        rest = state - times * freq
        states[: len(cells)] = (times << PROB_BITS) + rest + (start & SLOT_MASK)
    return states.astype("<u4"), np.concatenate(words[::-1])


# --- What the encoder chooses ---


def choose_prior(q: np.ndarray, pool: np.ndarray | None) -> int:
    """Index into CORRELATION_PRIORS by Gaussian code length of odd rows given the correlation of even ones, on at most
    two members."""
    members, rows, width = q.shape
    if rows * members < 64 or width < 8:
        return len(CORRELATION_PRIORS) - 1
    identity = np.eye(width)
    nats = np.zeros(len(CORRELATION_PRIORS))  # per symbol, against independent columns
    for g in {0, members - 1}:
        square = (q[g].astype(np.float64) ** 2).mean(0)
        scale = np.sqrt(np.maximum(square, MIN_VARIANCE))
        z = q[g] / scale
        even = z[::2]
        odd = z[1::2]
        known = correlation((even.T @ even)[None])[0]
        for i, prior in enumerate(CORRELATION_PRIORS[:-1]):
            own = len(even) / (len(even) + prior.rows)
            expected = identity if pool is None else pool[0]
            expected = blend(identity, expected, prior.pool_weight)
            c = known * own + expected * (1 - own)
            low = np.linalg.cholesky(blend(c, identity, IDENTITY_SHARE))
            e = np.linalg.solve(low, odd.T)
            determinant = np.log(np.diag(low)).mean()
            energy = (e * e).mean() - (odd * odd).mean()
            nats[i] += determinant + 0.5 * energy + CORRELATION_COST
    return int(nats.argmin())


def common_weight(q: np.ndarray, axis: int) -> int:
    """How many observations the common variance counts for beside a row's own (axis 2) or a column's (axis 1), by how
    far theirs lie apart."""
    square = (q.astype(np.float64) ** 2).mean(axis)
    spread = np.log(square + 1 / 12).var(1).mean()
    spread -= 2 / q.shape[axis]  # what chance alone would give
    return int(np.clip(2 / max(spread, 1e-9), 2, 60))


def repeated_rows(q: np.ndarray) -> dict[int, int]:
    """Rows of a lone matrix (1, R, n) that equal an earlier row, and which: tokens that training never saw."""
    if len(q) > 1:
        return {}
    seen = {}
    first = [seen.setdefault(row.tobytes(), i) for i, row in enumerate(q[0])]
    return {i: source for i, source in enumerate(first) if source != i}


def residual_width(stacks: list[np.ndarray]) -> int:
    """The side that most values share: the width of the residual stream."""
    values = collections.Counter()
    for q in stacks:
        values.update(dict.fromkeys(q.shape[1:], q.size))
    return max(sorted(values), key=values.get, default=0)


# --- Stacks to bytes and back ---


def encode_stacks(stacks: list[np.ndarray], rider: bytes = b"") -> tuple[bytes, int]:
    """Entropy-code integer stacks (G, R, C), |value| < 2**15. Returns the code and how many bytes of `rider` travel in
    it for nothing. A matrix that writes to or reads from the residual stream is turned so that vectors of that width
    are its rows."""
    residual = residual_width(stacks)
    headers = []
    pools = {}
    steps = []  # (cells, starts) of every column of every chunk
    escaped = [np.empty(0, np.int64)]
    for q in stacks:
        copies = repeated_rows(q)
        q = np.delete(q, list(copies), axis=1)
        rows, width = q.shape[1:]
        turned = width != residual and (rows == residual or rows < width)
        q = q.transpose(0, 2, 1) if turned else q
        square = (q.astype(np.float64) ** 2).mean((1, 2))
        variance = np.maximum(square, MIN_VARIANCE)
        header = StackHeader(
            shape=list(q.shape),
            log2_variance=np.rint(np.log2(variance)).astype(int).tolist(),
            turned=int(turned),
            prior=choose_prior(q, pools.get(q.shape[2])),
            trust=[common_weight(q, 2), common_weight(q, 1)],
            copies=[list(copies), list(copies.values())],
        )
        writer = SymbolWriter(q)
        StackModel(header, pools).code(writer)
        header = header._replace(mixture=writer.best_mixture())
        starts = cell_starts(header.mixture)
        steps += [(cells, starts) for cells in writer.cells]
        escaped += writer.escaped
        headers.append(header._asdict())
    count = max((len(cells) for cells, _ in steps), default=0)
    ridden = min(len(rider), 2 * count)
    states, words = rans_encode(steps, rider[:ridden].ljust(2 * count, b"\0"))
    side = zlib.compress(json.dumps(headers, separators=(",", ":")).encode(), 9)
    raw = zlib.compress(np.concatenate(escaped).astype("<i2").tobytes(), 9)
    sizes = struct.pack("<4I", len(side), len(raw), count, len(words))
    code = (sizes, side, raw, states.tobytes(), words.tobytes())
    return b"".join(code), ridden


def decode_stacks(code: bytes) -> tuple[list[np.ndarray], bytes]:
    """Inverse of encode_stacks: int16 stacks, and the rider padded with zeros. ValueError for a cut or altered code."""
    side, raw, count, words = struct.unpack_from("<4I", code)
    sizes = np.array([16, side, raw, 4 * count, 2 * words])
    side_at, raw_at, states_at, words_at, end = np.cumsum(sizes).tolist()
    if len(code) != end:
        raise ValueError(f"{len(code)} bytes of code, {end} by their header")
    reader = SymbolReader(
        states=np.frombuffer(code, "<u4", count, states_at),
        words=np.frombuffer(code, "<u2", words, words_at),
        escaped=np.frombuffer(zlib.decompress(code[raw_at:states_at]), "<i2"),
    )
    stacks = []
    pools = {}
    for entry in json.loads(zlib.decompress(code[side_at:raw_at])):
        header = StackHeader(**entry)
        reader.begin(header)
        StackModel(header, pools).code(reader)
        q = reader.columns.transpose((1, 0, 2) if header.turned else (1, 2, 0))
        copies, sources = (np.array(rows, int) for rows in header.copies)
        q = np.insert(q, copies - np.arange(len(copies)), 0, axis=1)
        q[:, copies] = q[:, sources]
        stacks.append(q)
    if len(reader.words) or len(reader.escaped):
        raise ValueError("words or escaped values are left over")
    return stacks, (reader.states - (1 << 16)).astype("<u2").tobytes()


# ======== Quantizer ===================================================================================================
#
# weights, Hessians -> step sizes (by rate and distortion, or the published rule) -> symbols (GPTQ) -> LQER
#
#   w_rj ~ symbol_rj * row_r * column_j [+ (A B)_rj]


class MatrixKind(NamedTuple):
    """How one kind of matrix is quantised."""

    hessian: str  # the tap whose second moments weigh its rounding error
    bits: str  # setting: symbol range of the published rule
    sigmas: str  # setting: step size of the published rule
    rows: str  # setting: how far rows differ by their share in the loss


MATRICES = {
    "qkv": MatrixKind("qkv", "matrix_bits", "attn_clip_sigmas", "rate_rows"),
    "o": MatrixKind("o", "matrix_bits", "attn_clip_sigmas", "rate_rows"),
    "up": MatrixKind("up", "matrix_bits", "mlp_clip_sigmas", "rate_rows"),
    "down": MatrixKind("down", "matrix_bits", "mlp_clip_sigmas", "rate_rows"),
    "tok_emb": MatrixKind("head", "embed_bits", "embed_clip_sigmas", "rate_embed_rows"),
}
FOLDED = {"attn_scale": "o", "mlp_scale": "down"}  # vectors that become part of the rows of a matrix
ROW_STEPS = 16  # codes per octave of the rows' step sizes: 4.4 % apart
COLUMN_STEPS = 4  # codes per octave of the columns' factors: 19 % apart
AWQ_BITS = 8  # symbol range of the group of columns with finer steps (#1908)
AWQ_GROUP = 64  # columns of that group
LQER_GROUP = 64  # values of the int4 factor that share a scale (#1797)


@torch.no_grad()
def folded_state(model: GPT) -> dict[str, Tensor]:
    """Parameters by name (fp32), the sublayer scales multiplied into the rows they scale and set to one."""
    state = {name: p.detach().clone() for name, p in model.named_parameters()}
    for vector, matrix in FOLDED.items():
        state[matrix] *= state[vector][:, :, None]
        state[vector].fill_(1.0)
    return state


# --- What is stored of a matrix ---


def quantize_scales(scale: np.ndarray) -> np.ndarray:
    """Positive floats to int16 codes. Weights are quantised with dequantize_scales(codes), so rounding only moves the
    step size by 2 %."""
    codes = np.rint(np.log2(np.maximum(scale, 1e-30)) * ROW_STEPS)
    return np.clip(codes, -1600, 1600).astype(np.int16)


def dequantize_scales(codes: np.ndarray, per_octave: int = ROW_STEPS) -> np.ndarray:
    """2**(code / per_octave), float32, equal on every machine."""
    roots = np.array(binary_roots(per_octave), np.float64) / (1 << 60)
    octave, step = np.divmod(codes.astype(np.int64), per_octave)
    return np.ldexp(roots[step], octave).astype(np.float32)


class Correction(NamedTuple):
    """LQER: a product A B of low rank that is added to a matrix (rows, cols) to undo part of its rounding error."""

    a: np.ndarray  # int8 -2..1 (rows, rank), one scale
    b: np.ndarray  # int8 -8..7: B (rank, cols), flattened, padded with zeros, as rows of LQER_GROUP values
    scales: np.ndarray  # fp16: of a, and of each row of b
    error: float = 0.0  # Frobenius norm to be corrected; not stored, but model.bin lists the largest first

    def product(self, cols: int) -> Tensor:
        """A B (rows, cols), fp32."""
        a, b, scales = (torch.from_numpy(part.astype(np.float32)) for part in self[:3])
        b = (b * scales[1:, None]).flatten()
        b = b[: a.size(1) * cols].view(-1, cols)
        return scales[0] * a @ b


class QuantizedMatrix(NamedTuple):
    """One matrix: symbol (row, column) * 2**(row code / ROW_STEPS) * 2**(column code / COLUMN_STEPS) + correction."""

    symbols: np.ndarray  # int8 (rows, cols)
    row_codes: np.ndarray  # int16 (rows,)
    column_codes: np.ndarray | None = None  # int8 (cols,); None: zeros
    correction: Correction | None = None

    def dequantize(self) -> Tensor:
        """(rows, cols), fp32, equal on every machine but for the correction."""
        row = dequantize_scales(self.row_codes)
        w = self.symbols.astype(np.float32) * row[:, None]
        if self.column_codes is not None:
            w *= dequantize_scales(self.column_codes, COLUMN_STEPS)
        w = torch.from_numpy(w)
        return w if self.correction is None else w + self.correction.product(w.size(1))


class QuantizedGate(NamedTuple):
    """The attention gate in int8 rows."""

    symbols: np.ndarray  # int8 (layers, heads, channels)
    scale: np.ndarray  # fp16 (layers, heads)

    def dequantize(self) -> Tensor:
        scale = self.scale.astype(np.float32)
        return torch.from_numpy(self.symbols.astype(np.float32) * scale[..., None])


class Quantized(NamedTuple):
    """A model as the artifact holds it."""

    matrices: dict[str, list[QuantizedMatrix]]  # by name: one for each layer
    parameters: dict[str, np.ndarray | QuantizedGate]  # fp16 but for the gate
    logit_calibration: np.ndarray | None = None  # fp32 (15,), see to_logit_calibration

    def state(self) -> dict[str, Tensor]:
        """Parameters by name, fp32, on the CPU. Sublayer scales come back as ones: they are part of the matrices."""
        state = {}
        for name, array in self.parameters.items():
            gate = isinstance(array, QuantizedGate)
            state[name] = array.dequantize() if gate else torch.from_numpy(array.astype(np.float32))
        for name, layers in self.matrices.items():
            stack = torch.stack([matrix.dequantize() for matrix in layers])
            state[name] = stack[0] if name == "tok_emb" else stack
        for vector, matrix in FOLDED.items():
            if matrix in state:
                state[vector] = torch.ones(state[matrix].shape[:2])
        return state


def load_state(model: GPT, state: dict[str, Tensor], origin: Path):
    """Copy parameters by name into the model, all or none; a missing, unknown or misshapen one is an error that names
    the file they came from."""
    parameters = dict(model.named_parameters())
    for name, p in parameters.items():
        shape = tuple(state[name].shape) if name in state else "no"
        require(
            shape == tuple(p.shape),
            f"{origin}: holds {shape} {name}, the settings ask for {tuple(p.shape)}; use the settings it was made with",
        )
    unknown = ", ".join(sorted(set(state) - set(parameters)))
    require(
        not unknown,
        f"{origin}: holds {unknown}, which the settings do not use; use the settings it was made with",
    )
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(state[name])


# --- Hessians: second moments of the inputs of every matrix ---


def batch_moments(model: GPT, batch: Batch, seed: int, rows: bool) -> dict[str, Tensor]:
    """Sums of x x^T over the tokens at the input of every matrix, {tap: (layers, in, in) fp32}, over a layer's visits.

    With `rows` also {"NAME.rows": (layers, out) fp32}, for the embedding (out,): for every row of a matrix sum_t
    |dnats_t / drow|^2. One backward pass estimates it. With random signs s_t, E |sum_t s_t g_t|^2 = sum_t |g_t|^2:
    cross terms cancel."""
    sums = {}
    for name, kind in MATRICES.items():
        matrix = getattr(model, name)
        layers = len(matrix) if matrix.ndim == 3 else 1
        width = matrix.size(-1)
        sums[kind.hessian] = torch.zeros(layers, width, width, device=matrix.device)

    def tap(kind: str, layer: int, x: Tensor):
        x = x.detach().float()
        sums[kind][layer].addmm_(x.T, x)

    with torch.set_grad_enabled(rows):
        hidden = model.trunk(batch.tokens, batch.seq, looped=model.cfg.looped, tap=tap)
        tap("head", 0, hidden)
        if rows:
            generator = torch.Generator().manual_seed(seed)  # on the CPU: the same signs on every device
            coins = torch.randint(0, 2, batch.targets.shape, generator=generator)
            signs = coins.to(batch.targets.device) * 2 - 1
            nats = model.nll(hidden, batch.targets.clamp(min=0))
            loss = (nats * signs * (batch.targets >= 0)).sum()
            gradients = torch.autograd.grad(loss, [getattr(model, name) for name in MATRICES])
            for name, gradient in zip(MATRICES, gradients):
                sums[f"{name}.rows"] = gradient.square().sum(-1)
    return sums


def collect_hessians(model: GPT, stream: TrainStream, cfg: Config, ranks: Ranks) -> dict[str, Tensor]:
    """Mean of batch_moments over GPTQ_CALIBRATION_BATCHES, spread evenly over the training stream; only RATE_DISTORTION
    needs the rows.

    Batches are dealt to the ranks and added in the same order everywhere, so the number of ranks changes the sums no
    more than a second run would."""
    batches = cfg.gptq_calibration_batches
    last_start = max(stream.tokens - cfg.micro_batch_tokens, 1)
    total = {}
    for first in range(0, batches, ranks.world):
        i = min(first + ranks.rank, batches - 1)  # surplus ranks repeat the last batch; nobody reads their result
        batch = stream.micro_batch(i * last_start // batches, cfg.micro_batch_tokens, cfg.train_seq_len)
        moments = batch_moments(model, to_device(batch, ranks.device), i, cfg.rate_distortion)
        for rank in range(min(ranks.world, batches - first)):
            for name, own in moments.items():
                sums = ranks.broadcast_(own if rank == ranks.rank else torch.empty_like(own), rank)
                total[name] = total.get(name, 0) + sums
    return {name: sums / batches for name, sums in total.items()}


class ErrorFeedback(NamedTuple):
    """A stack of Hessians as GPTQ uses them; they do not change between attempts at a size, so this is made once."""

    order: Tensor  # (n, cols) int64: columns by falling diagonal
    upper: Tensor  # (n, cols, cols) fp32: U with U^T U = H^-1, columns in that order
    diagonal: Tensor  # (n, cols) fp32: of the Hessian, in the matrix's order; 0: an input that never fires


def error_feedback(hessian: Tensor, damping: float) -> ErrorFeedback:
    """hessian (n, cols, cols) fp32. `damping` times the mean diagonal is added to it, in fp64; a silent input counts as
    one of variance 1.

    Activations span many orders of magnitude. Where rounding has made a Hessian indefinite, its damping grows tenfold
    until it is not."""
    h = hessian.double()
    diagonal = h.diagonal(dim1=1, dim2=2)
    diagonal.add_(diagonal == 0)
    order = diagonal.argsort(dim=1, descending=True, stable=True)
    h = h.gather(1, order[:, :, None].expand_as(h))
    h = h.gather(2, order[:, None].expand_as(h))
    mean = diagonal.mean(1)
    damp = torch.full_like(mean, damping)
    for _ in range(8):
        added = (damp * mean)[:, None].expand(-1, h.size(1))
        lower, info = torch.linalg.cholesky_ex(h + torch.diag_embed(added))
        if not info.any():
            upper = torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
            return ErrorFeedback(order, upper.float(), hessian.diagonal(dim1=1, dim2=2))
        damp = torch.where(info > 0, (10 * damp).clamp_min(1e-6), damp)
    raise RuntimeError("a Hessian is not positive definite; raise GPTQ_DAMPING")


# --- Step sizes ---


class StepSizes(NamedTuple):
    """The step size of weight (layer, row, column) is row * column_scale."""

    row: Tensor  # (layers, rows) fp32
    column_codes: Tensor  # (layers, cols), whole numbers in fp32
    limit: int  # largest symbol

    @property
    def column_scale(self) -> Tensor:
        """(layers, cols) fp32."""
        return (self.column_codes / COLUMN_STEPS).exp2()


def clip_step_sizes(
    model: GPT,
    weights: dict[str, Tensor],  # (layers, rows, cols)
    feedback: dict[str, ErrorFeedback],
    cfg: Config,
    saved: float,
) -> dict[str, StepSizes]:
    """The published rule (#1394): *_CLIP_SIGMAS standard deviations of a row over the symbol range, times 2**saved.

    AWQ-lite (#1908): of all matrices, the group of AWQ_GROUP columns with the largest sum of (activation RMS * mean
    |w|) gets the step sizes of AWQ_BITS."""
    steps = {}
    groups = []  # (saliency, name, layer, first column)
    layers = torch.tensor([visit.layer for visit in model.schedules[cfg.looped]])
    visits = torch.bincount(layers, minlength=cfg.num_layers).to(model.tok_emb.device)
    for name, kind in MATRICES.items():
        w = weights[name]
        bits = getattr(cfg, kind.bits)
        limit = 2 ** (bits - 1) - 1
        sigmas = getattr(cfg, kind.sigmas)
        row = 2**saved * sigmas * w.std(2) / limit
        square = feedback[name].diagonal
        steps[name] = StepSizes(row.clamp_min(1e-6), torch.zeros_like(square), limit)
        if cfg.awq_lite_enabled and bits < AWQ_BITS and w.size(2) >= AWQ_GROUP:
            square = square / visits[:, None] if len(w) > 1 else square  # the embedding is read once
            saliency = square.sqrt() * w.abs().mean(1)
            sums = saliency.unfold(1, AWQ_GROUP, AWQ_GROUP).sum(2)
            for layer, row_sums in enumerate(sums.tolist()):
                groups += [(total, name, layer, i * AWQ_GROUP) for i, total in enumerate(row_sums)]
    if groups:
        _, name, layer, first = max(groups)
        finer = AWQ_BITS - getattr(cfg, MATRICES[name].bits)
        group = slice(first, first + AWQ_GROUP)
        steps[name].column_codes[layer, group] = -finer * COLUMN_STEPS
    return steps


# How RATE_DISTORTION chooses step sizes: one more bit anywhere must lower the loss by the same amount (reverse
# water-filling).
#
#   distortion   dloss = 1/2 sum_r g_r dW_r H dW_r^T         g_r: mean squared gradient of output r
#   GPTQ         dW_r H dW_r^T = sum_j d_j s_rj^2 / 12        s_rj: step size;  d_j = 1 / U_jj^2, see ErrorFeedback
#   rate         one bit more for weight (r, j) halves s_rj, which removes 3/4 of its term. So at the optimum
#                    g_r d_j s_rj^2 = constant
#                    s_rj = 2**level * row_r * column_j
#                    row_r = (g_r mean d)^-1/2                mean d: 2 to the mean of log2 d
#                    column_j = (d_j / mean d)^-1/2
#   level        one constant for all matrices. A Gaussian row of standard deviation sigma_r takes about
#                    1/2 log2(1 + 2 pi e (sigma_r / s_r)^2)   bits a weight
#                and bisection finds the level at which all rows together take the budget.
#
# g_r is the squared gradient of row r over the trace of H. Its mean over the rows is trusted. Its spread enters to the
# power RATE_ROWS, since calibration knows rarely used rows badly.

GAUSSIAN_ENTROPY = 2 * math.pi * math.e


class RateCurve(NamedTuple):
    """Step sizes and code length of a stack of matrices as functions of the level."""

    row: Tensor  # (layers, rows): step sizes at level 0
    column_codes: Tensor  # (layers, cols)
    finest: Tensor  # (layers, rows): at which the largest weight takes the largest symbol
    sigma: Tensor  # (layers, rows): standard deviations of the weights

    def step_sizes_at(self, level: float) -> StepSizes:
        row = (self.row * 2**level).maximum(self.finest)
        return StepSizes(row, self.column_codes, MAX_SYMBOL)

    def bits_at(self, level: float) -> float:
        """Expected length of the code of all weights."""
        ratio = self.sigma / self.step_sizes_at(level).row
        doubled = (1 + GAUSSIAN_ENTROPY * ratio.square()).log2()  # bits of two weights of each row
        return float((0.5 * self.column_codes.size(1) * doubled).sum())


def rate_curve(
    w: Tensor,
    feedback: ErrorFeedback,
    g: Tensor,
    row_power: float,
    column_power: float,
) -> RateCurve:
    """w (layers, rows, cols), folded; g (layers, rows): squared gradients of its rows; powers: see RATE_ROWS."""
    log2_u = feedback.upper.diagonal(dim1=1, dim2=2).log2()
    log2_d = -2 * log2_u.gather(1, feedback.order.argsort(dim=1))
    mean_log2_d = log2_d.mean(1, keepdim=True)
    codes = (mean_log2_d - log2_d) * (COLUMN_STEPS * column_power / 2)
    codes = codes.round().clamp(-MAX_SYMBOL, MAX_SYMBOL)

    mean = g.mean(1, keepdim=True).clamp_min(1e-20)
    trace = feedback.diagonal.sum(1, keepdim=True).clamp_min(1e-20)
    g = (g / mean + 0.1).pow(row_power) * mean / trace
    row = ((-mean_log2_d - g.log2()) / 2).exp2()

    # 3 % coarser than the largest weight needs: rounding a row's code may make its step 2 % finer.
    scaled = w.abs() / (codes / COLUMN_STEPS).exp2()[:, None]
    finest = scaled.amax(2) / (0.97 * MAX_SYMBOL)
    return RateCurve(row, codes, finest.clamp_min(1e-12), w.std(2))


def level_for(curves: Iterable[RateCurve], budget: float) -> float:
    """The lowest level, of -60..60, at which all curves together take at most `budget` bits."""
    low = -60.0
    high = 60.0
    for _ in range(40):
        middle = (low + high) / 2
        if sum(curve.bits_at(middle) for curve in curves) > budget:
            low = middle
        else:
            high = middle
    return high


# --- GPTQ ---


class Columns(NamedTuple):
    """Columns that are rounded one after the other, in that order."""

    w: Tensor  # (n, columns, rows): a column lies in one piece
    upper: Tensor  # (n, columns, columns), see ErrorFeedback
    step: Tensor  # (n, rows)
    scale: Tensor  # (n, columns): factors of the step size
    limit: Tensor  # (n, columns): largest symbols


def round_columns(columns: Columns) -> tuple[Tensor, Tensor]:
    """Symbols and errors, fp32, both like columns.w. For every column j, and then every later column k:

        symbol_j = round(w_j / size_j),  error_j = (w_j - symbol_j size_j) / U_jj,  w_k <- w_k - error_j U_jk

    Six small kernels for each column, which neither wait for the GPU nor depend on a value, so a CUDA graph can replay
    them."""
    w = columns.w.clone()
    size = columns.step[:, None] * columns.scale[:, :, None]
    high = columns.limit[:, :, None]
    low = -high
    pivot = columns.upper.diagonal(dim1=1, dim2=2)[:, :, None]
    symbols = torch.empty_like(w)
    errors = torch.empty_like(w)
    for j in range(w.size(1)):
        one = slice(j, j + 1)
        symbol = symbols[:, one]
        error = errors[:, one]
        torch.div(w[:, one], size[:, one], out=symbol)
        symbol.round_().clamp_(low[:, one], high[:, one])
        torch.addcmul(w[:, one], symbol, size[:, one], value=-1, out=error)
        error.div_(pivot[:, one])
        later = columns.upper[:, j, j + 1 :, None]
        w[:, j + 1 :].addcmul_(error, later, value=-1)
    return symbols, errors


def replayed(function: Callable, example: NamedTuple) -> Callable:
    """`function` of a record of tensors, as a CUDA graph for records of the shapes of `example`. A call overwrites the
    results of the call before."""
    inputs = example._make(t.clone() for t in example)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function(inputs)

    def replay(arguments: NamedTuple):
        torch._foreach_copy_(inputs, arguments)
        graph.replay()
        return results

    return replay


def gptq(
    w: Tensor,  # (n, rows, cols)
    feedback: ErrorFeedback,
    step: Tensor,  # (n, rows)
    limit: int,
    column_scale: Tensor | None = None,  # (n, cols): factors of the step; None: ones
    block: int = 128,
) -> Tensor:
    """Round w to multiples of step, feeding each column's error to the columns not yet rounded (arXiv 2210.17323).

    Returns symbols int16 (n, rows, cols), at most `limit`, or MAX_SYMBOL where column_scale is below 1. Columns go in
    the order of `feedback`. One whose input never fires is zero."""
    order, upper, diagonal = feedback
    silent = (diagonal == 0)[:, :, None]
    w = w.float().mT.masked_fill(silent, 0.0)
    w = w.gather(1, order[:, :, None].expand_as(w))
    scale = torch.ones_like(upper[:, 0])
    if column_scale is not None:
        scale = column_scale.gather(1, order)
    limits = torch.where(scale < 1, MAX_SYMBOL, limit).float()
    symbols = torch.empty_like(w, dtype=torch.int16)
    round_block = round_columns
    for start in range(0, w.size(1), block):
        here = slice(start, start + block)
        rest = slice(start + block, None)
        columns = Columns(
            w=w[:, here],
            upper=upper[:, here, here],
            step=step,
            scale=scale[:, here],
            limit=limits[:, here],
        )
        is_full = start + block <= w.size(1)
        if w.is_cuda and is_full and start == block:  # the first block has loaded the kernels
            round_block = replayed(round_columns, columns)
        symbols[:, here], errors = round_block(columns) if is_full else round_columns(columns)
        later = upper[:, here, rest].mT
        w[:, rest].baddbmm_(later, errors, alpha=-1)
    in_place = order.argsort(dim=1)[:, :, None].expand_as(symbols)
    return symbols.gather(1, in_place).mT.contiguous()


# --- LQER ---


def lqer(error: Tensor, cfg: Config) -> Correction:
    """The best product of rank LQER_RANK for `error` (rows, cols), in the Frobenius norm: A = E V, B = V^T with V the
    first right singular vectors of E. A is stored in int2 of one scale, B in int4 of one scale for LQER_GROUP values
    (#1797)."""
    # A factor between A and B that changes nothing but the last bits of their scales. It stays, so that artifacts stay
    # as they were.
    balance = math.sqrt(1 + (cfg.gptq_damping + 1e-6))
    weighted = error.double() * balance
    vectors = torch.linalg.eigh(weighted.T @ weighted).eigenvectors
    v = vectors.flip(1)[:, : cfg.lqer_rank]  # of the largest eigenvalues
    a = weighted @ v
    b = v.T.flatten() / balance
    groups = F.pad(b, (0, -b.numel() % LQER_GROUP)).view(-1, LQER_GROUP)
    scale_a = a.abs().max()[None] / 1.5
    scales_b = groups.abs().amax(1) / 7.5
    scales = torch.cat((scale_a, scales_b)).clamp(1e-7, 6e4).half()
    a = (a / scales[0]).round().clamp(-2, 1).to(torch.int8)
    b = (groups / scales[1:, None]).round()
    b = b.clamp(-8, 7).to(torch.int8)
    return Correction(
        a=a.cpu().numpy(),
        b=b.cpu().numpy(),
        scales=scales.cpu().numpy(),
        error=error.norm().item(),
    )


def add_corrections(matrices: dict[str, list[QuantizedMatrix]], weights: dict[str, Tensor], cfg: Config):
    """LQER for the LQER_TOP_K matrices with the largest Frobenius error."""
    errors = {}
    for name, layers in matrices.items():
        for layer, matrix in enumerate(layers):
            w = weights[name][layer]
            errors[name, layer] = w - matrix.dequantize().to(w.device)
    largest = sorted(errors, key=lambda place: -errors[place].norm().item())
    for name, layer in largest[: cfg.lqer_top_k]:
        layers = matrices[name]
        layers[layer] = layers[layer]._replace(correction=lqer(errors[name, layer], cfg))


# --- All of it ---


class Quantizer:
    """Quantises one model, as often as its size asks for. What no step size changes is computed once."""

    def __init__(self, model: GPT, hessians: dict[str, Tensor], cfg: Config, ranks: Ranks):
        self.model = model
        self.cfg = cfg
        self.ranks = ranks
        self.parameters = folded_state(model)
        self.weights = {}  # of matrices, (layers, rows, cols) fp32
        self.feedback = {}
        self.curves = {}
        scales = {matrix: getattr(model, vector).detach() for vector, matrix in FOLDED.items()}
        for name, kind in MATRICES.items():
            w = self.parameters.pop(name)
            w = w if w.ndim == 3 else w[None]
            feedback = error_feedback(hessians[kind.hessian], cfg.gptq_damping)
            self.weights[name] = w
            self.feedback[name] = feedback
            if cfg.rate_distortion:
                g = hessians[f"{name}.rows"].view(w.shape[:2])
                if name in scales:  # gradients are of the model's own matrix: chain rule for the folded one
                    g = g / scales[name].square().clamp_min(1e-6)
                row_power = getattr(cfg, kind.rows)
                self.curves[name] = rate_curve(w, feedback, g, row_power, cfg.rate_columns)

    def step_sizes(self, saved: float) -> dict[str, StepSizes]:
        """By the settings, for `saved` bits a weight less than ARTIFACT_CAP bytes, or than the published rule."""
        if not self.cfg.rate_distortion:
            return clip_step_sizes(self.model, self.weights, self.feedback, self.cfg, saved)
        weights = sum(w.numel() for w in self.weights.values())
        level = level_for(self.curves.values(), 8 * self.cfg.artifact_cap - saved * weights)
        return {name: curve.step_sizes_at(level) for name, curve in self.curves.items()}

    def quantize(self, saved: float = 0.0) -> Quantized:
        """Matrices by GPTQ with these step sizes, corrected by LQER where set; the gate in int8 rows where set; the
        rest in fp16."""
        matrices = {}
        for i, (name, steps) in enumerate(self.step_sizes(saved).items()):
            matrices[name] = self.quantize_stack(name, steps, owner=i % self.ranks.world)
        if self.cfg.lqer_enabled:
            add_corrections(matrices, self.weights, self.cfg)
        parameters = {}
        for name, value in self.parameters.items():
            if name == "attn_gate" and self.cfg.gated_attn_quant_gate:
                parameters[name] = quantize_gate(value)
            elif name not in FOLDED:
                parameters[name] = value.half().cpu().numpy()
        return Quantized(matrices, parameters)

    def quantize_stack(self, name: str, steps: StepSizes, owner: int) -> list[QuantizedMatrix]:
        """The matrices of one kind, by layer, solved by one rank for all: the symbols do not depend on the number of
        ranks."""
        w = self.weights[name]
        row_codes = quantize_scales(steps.row.cpu().numpy())
        symbols = torch.empty(w.shape, dtype=torch.int8, device=w.device)
        if self.ranks.rank == owner:
            step = torch.from_numpy(dequantize_scales(row_codes)).to(w.device)
            rounded = gptq(w, self.feedback[name], step, steps.limit, steps.column_scale)
            symbols = rounded.to(torch.int8)
        symbols = self.ranks.broadcast_(symbols, owner).cpu().numpy()
        columns = steps.column_codes.to(torch.int8).cpu().numpy()
        return [QuantizedMatrix(*parts) for parts in zip(symbols, row_codes, columns)]


def quantize_gate(gate: Tensor) -> QuantizedGate:
    """gate (layers, heads, channels), each row with a scale of its own."""
    scale = (gate.abs().amax(-1) / MAX_SYMBOL).clamp_min(1e-7).half()
    symbols = (gate / scale[..., None]).round()
    symbols = symbols.clamp(-MAX_SYMBOL, MAX_SYMBOL).to(torch.int8)
    return QuantizedGate(symbols.cpu().numpy(), scale.cpu().numpy())


# --- Logit calibration (#1924): logits <- scale * softcap(z) + features . biases, fitted to the quantised model ---

LOGIT_CATEGORIES = 14
LOGIT_FIT_TOKENS = 131072  # first tokens of the training stream


def piece_categories(piece: str) -> tuple[bool, ...]:
    """What one of the tokenizer's pieces looks like without its leading space: LOGIT_CATEGORIES overlapping answers."""
    text = piece.removeprefix("\u2581")
    size = len(text.encode())
    return (
        size == 1,
        size == 2,
        size == 3,
        size == 4,
        5 <= size <= 8,
        size >= 9,
        text != piece,  # begins a word
        "\n" in text,
        any(map(str.isdigit, text)),
        text != "" and not any(c.isalnum() or c.isspace() for c in text),  # punctuation
        any(map(str.isalpha, text)),
        text.islower(),
        text.isupper(),
        text.istitle(),
    )


def piece_features(cfg: Config) -> Tensor:
    """piece_categories of the whole vocabulary, (V, LOGIT_CATEGORIES), 0 or 1, fp32, on the CPU. Reads the
    tokenizer."""
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_path(cfg)))
    features = torch.zeros(cfg.vocab_size, LOGIT_CATEGORIES)
    for i in range(min(cfg.vocab_size, len(pieces))):
        features[i] = torch.tensor(piece_categories(pieces.id_to_piece(i)))
    return features


def to_logit_calibration(values: Tensor, features: Tensor) -> LogitCalibration:
    """15 numbers -> the factor of the softcapped logits, 0.9..1.1, and their biases (V,): +-0.5 for each category."""
    scale = 0.9 + 0.2 * torch.sigmoid(values[0])
    return LogitCalibration(scale, features @ values[1:].clamp(-0.5, 0.5))


def fit_logit_calibration(model: GPT, stream: TrainStream, cfg: Config, ranks: Ranks) -> np.ndarray:
    """The 15 numbers (fp32) of to_logit_calibration that suit the quantised model, by 256 steps of Adam on
    LOGIT_FIT_TOKENS training tokens. The model is only read."""
    features = piece_features(cfg).to(ranks.device)
    parts = []  # (hidden, targets) of 4,096 tokens
    micro = cfg.micro_batch_tokens
    with torch.no_grad():
        for start in range(0, min(LOGIT_FIT_TOKENS, max(stream.tokens - micro, 1)), micro):
            batch = to_device(stream.micro_batch(start, micro, cfg.train_seq_len), ranks.device)
            hidden = model.trunk(batch.tokens, batch.seq, looped=cfg.looped)
            parts += zip(hidden.split(4096), batch.targets.split(4096))
    values = torch.zeros(1 + LOGIT_CATEGORIES, device=ranks.device, requires_grad=True)
    optimizer = torch.optim.Adam([values], lr=0.003)
    for step in range(256):
        hidden, targets = parts[step % len(parts)]
        real = targets >= 0
        with torch.no_grad():
            z = model.logits(hidden)
        calibration = to_logit_calibration(values, features)
        nats = calibrated_scores(z, targets.clamp(min=0), model.caps, calibration).nats
        penalty = values[1:].square().mean() + (calibration.scale - 1).square()
        mean_nats = (nats * real).sum() / real.sum().clamp_min(1)
        loss = mean_nats + 0.01 * penalty
        (values.grad,) = torch.autograd.grad(loss, [values])
        optimizer.step()
    return ranks.broadcast_(values.detach().cpu()).numpy()


# ======== Artifact: a quantised model as named arrays, and a container for them =======================================

# --- Names of the arrays; the file's bytes depend on their order ---


MATRIX_PARTS = ("symbols", "step", "column")
LQER_PARTS = ("lqer_a", "lqer_b", "lqer_scales")
GATE_PARTS = ("int8", "scale")


def flatten(quantized: Quantized) -> dict[str, np.ndarray]:
    """KIND.LAYER.symbols, .step and, where not all zero, .column of every matrix; KIND.LAYER.lqer_a, lqer_b,
    lqer_scales of the corrected ones; attn_gate.int8 and .scale; every other parameter by its name;
    logit_calibration."""
    arrays = {}
    corrections = {}

    def add(name: str, suffixes: tuple, parts: tuple):
        arrays.update({f"{name}.{suffix}": part for suffix, part in zip(suffixes, parts)})

    for kind, layers in quantized.matrices.items():
        for layer, matrix in enumerate(layers):
            name = f"{kind}.{layer}"
            has_columns = matrix.column_codes is not None and matrix.column_codes.any()
            add(name, MATRIX_PARTS[: 2 + has_columns], matrix)
            if matrix.correction is not None:
                corrections[name] = matrix.correction
    # Corrections follow all matrices, the largest error first.
    for name, correction in sorted(corrections.items(), key=lambda item: -item[1].error):
        add(name, LQER_PARTS, correction)
    for name, value in quantized.parameters.items():
        if isinstance(value, QuantizedGate):
            add(name, GATE_PARTS, value)
        else:
            arrays[name] = value
    if quantized.logit_calibration is not None:
        arrays["logit_calibration"] = quantized.logit_calibration
    return arrays


def unflatten(arrays: dict[str, np.ndarray]) -> Quantized:
    """Inverse of flatten."""
    matrices = {}
    parameters = {}
    for full_name, array in arrays.items():
        name, _, part = full_name.rpartition(".")  # "qkv.3", "symbols"; a parameter has no dot: "", "caps"
        parts = lambda suffixes, name=name: [arrays.get(f"{name}.{suffix}") for suffix in suffixes]
        if part == "symbols":
            correction = Correction(*parts(LQER_PARTS)) if f"{name}.lqer_a" in arrays else None
            matrix = QuantizedMatrix(*parts(MATRIX_PARTS), correction)
            matrices.setdefault(name.split(".")[0], []).append(matrix)
        elif part == "int8":
            parameters[name] = QuantizedGate(*parts(GATE_PARTS))
        elif not name:
            parameters[part] = array
    return Quantized(matrices, parameters, parameters.pop("logit_calibration", None))


# --- The container: names, types and coders of arrays ---
#
# magic, version, total length, lengths of header and stacks | header: zlib of JSON | entropy-coded stacks | LZMA of the
# other arrays | CRC-32

MAGIC = b"GPTGOLF\n"
VERSION = 1
FIXED = struct.Struct("<8sIQII")
LZMA = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 0, "pb": 0}]
LEAST_CODED = 64  # values of an array that are worth the entropy coder's header


class ArtifactError(UserError):
    """The model file is damaged or not ours; the message names it and the remedy."""


def as_matrix(a: np.ndarray) -> np.ndarray:
    """An integer array as (R, C): vectors and matrices of two long sides are folded, the last row padded with zeros."""
    if a.ndim > 1 and min(len(a), a[0].size) <= 1024:
        return a.reshape(len(a), -1)
    width = 64 if a.ndim == 1 else 512
    padded = np.pad(a.ravel(), (0, -a.size % width))
    return padded.reshape(-1, width)


def planes(arrays: Iterable[np.ndarray], dtype: str) -> bytes:
    """Bytes of arrays of one dtype, most significant bytes of all values first: these repeat, so LZMA sees runs."""
    raw = b"".join(a.tobytes() for a in arrays)
    values = np.frombuffer(raw, np.uint8).reshape(-1, np.dtype(dtype).itemsize)
    return values.T[::-1].tobytes()


def from_planes(raw: bytes, dtype: str, count: int) -> np.ndarray:
    """Inverse of planes, (count,)."""
    size = np.dtype(dtype).itemsize
    planes = np.frombuffer(raw, np.uint8, size * count).reshape(size, count)
    return planes[::-1].T.copy().view(dtype).ravel()


def encode_artifact(tensors: dict[str, np.ndarray], meta: dict) -> bytes:
    """Arrays (any numpy dtype) and `meta` (JSON) as the bytes of a model file. Integer arrays of LEAST_CODED values or
    more are entropy-coded. Arrays whose names differ only in numbers, of one shape, are coded together, so many small
    ones cost little."""
    groups = {}  # entropy-coded: (name without numbers, shape, dtype) -> arrays by name
    rest = {}  # dtype -> arrays by name
    for name, a in tensors.items():
        is_integer = a.dtype.kind in "iu" and a.size >= LEAST_CODED
        if is_integer and int(a.max()) - int(a.min()) < 1 << 15:
            key = (re.sub(r"\d+", "#", name), a.shape, a.dtype.str)  # "qkv.3.symbols" -> "qkv.#.symbols"
            groups.setdefault(key, {})[name] = a
        else:
            rest.setdefault(a.dtype.str, {})[name] = a
    coded = []
    stacks = []
    for (_, shape, dtype), members in groups.items():
        # The coder expects values around 0, so codes of step sizes lose their median.
        centres = [round(float(np.median(a))) for a in members.values()]
        centred = [a.astype(np.int64) - centre for a, centre in zip(members.values(), centres)]
        coded.append([dtype, shape, list(members), centres])
        stacks.append(np.stack([as_matrix(a) for a in centred]))
    plain = []
    raw = b""
    for dtype, members in rest.items():
        shapes = [[name, a.shape] for name, a in members.items()]
        plain.append([dtype, shapes])
        raw += planes(members.values(), dtype)
    raw = lzma.compress(raw, lzma.FORMAT_RAW, filters=LZMA)
    code, ridden = encode_stacks(stacks, raw)  # the first `ridden` bytes of raw travel in the code's states
    header = {"meta": meta, "coded": coded, "plain": plain, "ridden": ridden}
    header = zlib.compress(json.dumps(header, separators=(",", ":"), sort_keys=True).encode(), 9)
    body = header + code + raw[ridden:]
    total = FIXED.size + len(body) + 4
    data = FIXED.pack(MAGIC, VERSION, total, len(header), len(code)) + body
    return data + struct.pack("<I", zlib.crc32(data))


def save_artifact(path: Path, tensors: dict[str, np.ndarray], meta: dict):
    """Write encode_artifact's bytes whole, by rename."""
    with whole_file(path) as f:
        f.write(encode_artifact(tensors, meta))


def read_artifact(path: Path) -> tuple[dict, bytes, bytes]:
    """A model file, verified: its header, the entropy-coded stacks and the rest. One that is missing, short, altered or
    of another kind raises ArtifactError."""
    try:
        data = path.read_bytes()
    except OSError as e:
        raise ArtifactError(
            f"{path}: cannot be read ({e.strerror}); train first, or set ARTIFACT_DIR to the folder that holds it"
        ) from None

    def verify(holds: bool, problem: str):
        if not holds:
            raise ArtifactError(f"{path}: {problem}")

    verify(
        data[:8] == MAGIC,
        f"not a model file of this script (its first bytes are {data[:8]!r}); "
        "set ARTIFACT_DIR to the folder that holds one",
    )
    length = FIXED.unpack_from(data)[2] if len(data) >= FIXED.size else 0
    verify(
        len(data) == length,
        f"{len(data)} bytes long, not what its header says; it was cut or extended: copy it again or write it anew",
    )
    (checksum,) = struct.unpack("<I", data[-4:])
    verify(
        zlib.crc32(data[:-4]) == checksum,
        "checksum does not match; the file was altered: copy it again or write it anew",
    )
    _, version, _, header_size, code_size = FIXED.unpack_from(data)
    verify(
        version == VERSION,
        f"format version {version}, this script reads {VERSION}; score it with the script that wrote it",
    )
    code_at = FIXED.size + header_size
    rest_at = code_at + code_size
    header = json.loads(zlib.decompress(data[FIXED.size : code_at]))
    return header, data[code_at:rest_at], data[rest_at:-4]


def load_artifact(path: Path) -> tuple[dict[str, np.ndarray], dict]:
    """Inverse of encode_artifact: arrays and meta."""
    header, code, rest = read_artifact(path)
    try:
        return unpack_tensors(header, code, rest), header["meta"]
    except Exception as e:  # the checksum holds, so this is a file that was made wrongly
        raise ArtifactError(f"{path}: cannot be decoded ({type(e).__name__}: {e}); write it anew") from e


def unpack_tensors(header: dict, code: bytes, rest: bytes) -> dict[str, np.ndarray]:
    """The arrays that a model file's header describes."""
    stacks, rider = decode_stacks(code)
    tensors = {}
    for (dtype, shape, names, centres), stack in zip(header["coded"], stacks, strict=True):
        for name, q, centre in zip(names, stack, centres, strict=True):
            values = q.ravel()[: math.prod(shape)]
            values = values.astype(np.int64) + centre
            tensors[name] = values.astype(dtype).reshape(shape)
    raw = rider[: header["ridden"]] + rest
    raw = lzma.decompress(raw, lzma.FORMAT_RAW, filters=LZMA)
    for dtype, members in header["plain"]:
        sizes = [math.prod(shape) for _, shape in members]
        values = from_planes(raw, dtype, sum(sizes))
        raw = raw[values.nbytes :]
        pieces = np.split(values, np.cumsum(sizes)[:-1])  # one for each member
        for (name, shape), a in zip(members, pieces):
            tensors[name] = a.reshape(shape)
    return tensors


# ======== Scoring =============================================================================================================================================


def plan_windows(starts: np.ndarray, inputs: int, seq_len: int, stride: int) -> np.ndarray:
    """Windows (begin, first, end) int64: tokens begin..end are read, targets of positions first..end are scored.
    Every position 0..inputs is scored once. A document's first window scores all it reads; each later one scores ``stride`` new positions after seq_len -
    stride tokens of context: a document's length decides nothing, or the context would tell where it ends (C1)."""
    rows = []
    for start, end in zip(starts, np.append(starts[1:], inputs)):
        start, end = int(start), int(min(end, inputs))
        first, reach = start, min(start + seq_len, end)
        while first < end:
            rows.append((max(start, first + stride - seq_len) if first > start else start, first, reach))
            first, reach = reach, min(reach + stride, end)
    return np.array(rows, dtype=np.int64).reshape(-1, 3)


def pack_windows(windows: np.ndarray, capacity: int) -> list[np.ndarray]:
    """Consecutive windows into buffers of at most ``capacity`` tokens."""
    tokens, cuts = np.append(0, np.cumsum(windows[:, 2] - windows[:, 0])), [0]
    while cuts[-1] < len(windows):
        cuts.append(int(np.searchsorted(tokens, tokens[cuts[-1]] + capacity, side="right")) - 1)
    return [windows[lo:hi] for lo, hi in zip(cuts, cuts[1:])]


def window_batch(val: ValidationStream, windows: np.ndarray, cfg: Config) -> tuple[Batch, np.ndarray, np.ndarray]:
    """One buffer of windows -> (batch, places scored in the buffer, targets they score in the stream)."""
    lengths = windows[:, 2] - windows[:, 0]
    starts = np.cumsum(lengths) - lengths
    index = np.arange(lengths.sum()) + np.repeat(windows[:, 0] - starts, lengths)
    batch = pack(
        val.tokens[index].astype(np.int64),
        starts,
        cfg.eval_seq_len,
        cfg.eval_seq_len,
        "val",
        cfg.val_batch_tokens,
        val.tokens[index + 1].astype(np.int64),
    )
    places = np.flatnonzero(index >= np.repeat(windows[:, 1], lengths))
    return batch, places, index[places]


def book(ledger: Ledger, targets: np.ndarray, found, at: Tensor, ngram=None):
    """Write the nats (or pair with the hints' log-probabilities) that a forward found at places ``at`` as the scores of ``targets``, improved by an NGram."""
    parts = [t.detach()[at].double().cpu().numpy() for t in (found if isinstance(found, tuple) else (found,))]
    ledger.write(targets, parts[0] if ngram is None else ngram.scored(targets, *parts))


def anatomy(ledger: Ledger, val: ValidationStream) -> dict:
    """Where the bits of a finished pass are: BPB by document length and by position, both in tokens, and a 95 % interval over documents.
    The interval is the bootstrap's: 1,000 draws of as many documents as there are, each with its nats and bytes."""
    ends = np.append(val.starts[1:], val.targets)
    lengths = (ends - val.starts)[val.starts < val.targets]
    document = np.repeat(np.arange(len(lengths)), lengths)
    nats, size = (
        np.bincount(document, values, len(lengths)) for values in (ledger.nats / math.log(2), val.target_bytes)
    )
    draws = np.random.default_rng(0).integers(0, len(lengths), (1000, len(lengths)))
    interval = np.quantile(nats[draws].sum(1) / np.maximum(size[draws].sum(1), 1), (0.025, 0.975))
    position, result = (
        np.arange(val.targets) - val.starts[document],
        {"bpb_interval": interval.tolist(), "bpb_by_length": [], "bpb_by_position": []},
    )
    for low, high in (
        (0, 64),
        (64, 256),
        (256, 1024),
        (1024, 2048),
        (2048, 8192),
        (8192, max(8193, int(lengths.max()))),
    ):
        for name, within in (
            ("length", (lengths[document] > low) & (lengths[document] <= high)),
            ("position", (position >= low) & (position < high)),
        ):
            if val.target_bytes[within].any():
                result[f"bpb_by_{name}"].append(
                    {
                        "upto": high,
                        "bpb": ledger.partial_bpb(within),
                        "targets": int(within.sum()),
                        "documents": int(len(np.unique(document[within]))),
                    }
                )
    return result


class Scorer:
    """Document-bounded scoring: windows never cross a document's start, each validation target is scored once, whatever the number of ranks."""

    def __init__(self, model: GPT, cfg: Config, ranks: Ranks, log: Log, ngram=None):
        self.model, self.cfg, self.ranks, self.log, self.ngram = model, cfg, ranks, log, ngram

    def score(self, val: ValidationStream, ledger: Ledger, stride: int) -> float:
        """Fill the ledger and return its BPB."""
        self.log(f"scoring {ledger.name}: {val.targets:,} targets over {self.ranks.world} rank(s)")
        self.score_documents(val, ledger, stride, 0, len(val.starts))
        return ledger.bpb()

    @torch.no_grad()
    def score_documents(self, val: ValidationStream, ledger: Ledger, stride: int, first: int, last: int):
        """Score documents first..last (exclusive) and share the scores with all ranks."""
        windows = plan_windows(
            val.starts[first:last],
            int(np.append(val.starts, val.targets)[last]),
            self.cfg.eval_seq_len,
            stride or self.cfg.eval_seq_len,
        )
        buffers = pack_windows(windows, self.cfg.val_batch_tokens)
        for buffer in buffers[self.ranks.rank :: self.ranks.world]:
            ledger.progress(self.ranks, self.log)
            batch, places, targets = window_batch(val, buffer, self.cfg)
            at, hint = torch.from_numpy(places).to(self.ranks.device), self.ngram and self.ngram.hints(targets)
            hint = (
                ()
                if hint is None
                else (
                    torch.zeros(self.cfg.val_batch_tokens, dtype=torch.int64, device=at.device).index_copy(0, at, hint),
                )
            )
            book(
                ledger,
                targets,
                batch_nats(self.model, to_device(batch, self.ranks.device), self.cfg.looped, *hint),
                at,
                self.ngram,
            )
        ledger.merge(self.ranks)


# ======== N-gram: exact causal token statistics, and the tilt or mixture that they give the scored probabilities ==============================================


class Continuations(NamedTuple):
    """What had followed the contexts of one order before each of ``targets``; all (n,) on the device. A context that occurs once in the stream is left out."""

    order: int  # tokens of the context and the one it predicts
    targets: Tensor  # int64
    hint: Tensor  # int32: the token seen most often, of equals the one that got there first
    top: Tensor  # int64: how often it was seen
    total: Tensor  # int64: how often the context was seen; 0: hint is meaningless
    seen: Tensor  # int64: how often the realised target was seen
    distinct: Tensor  # int64: how many different tokens were seen


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
    """Cumulative maximum of x (n,), not negative, by rows: a scan over one long row would occupy a single block of the GPU."""
    width = max(math.isqrt(len(x)), 1)
    rows = F.pad(x, (0, -len(x) % width)).view(-1, width).cummax(1).values
    return torch.maximum(rows, F.pad(rows[:-1, -1].cummax(0).values, (1, 0))[:, None]).flatten()[: len(x)]


def leader(start: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Inside groups that begin at ``start`` (n,): the highest of the counts (n,) so far, and where it was first reached."""
    highest = running_max((start << 32) + counts)
    return highest & 0xFFFFFFFF, latest(run_starts(highest))


def continuations(tokens: Tensor, document: Tensor, segment: Tensor, orders: int, vocab: int):
    """Yield Continuations of order 2, 3, ..., ``orders``. tokens int32 (n + 1,); document and segment of each target int32 (n,), both rising.
    A target sees the targets of earlier segments and the earlier ones of its own document, whose contexts lie inside their documents. Counts
    are exact: a context is known by its rank among the sorted pairs (context one token shorter, its last token), never by a hash. One stable
    sort by (context, target) serves an order, and shifted by one place it lists the contexts of the next; places run through those lists."""
    at = (
        tokens[:-1].sort(stable=True).indices
    )  # targets in the order of their contexts, and of the stream where these agree
    context = tokens[at].long()
    for order in range(2, orders + 1):
        alone = run_starts(context)
        alone = alone & F.pad(
            alone[1:], (0, 1), value=True
        )  # met once: it, and all longer ones that end in it, know nothing
        at, context = at[~alone], context[~alone]
        if not len(at):
            return
        place, target, own, block = torch.arange(len(at), device=at.device), tokens[at + 1], document[at], segment[at]
        pair, by_pair = (context * vocab + target).sort(stable=True)
        whole, old, mine = (
            latest(run_starts(pair)),
            latest(run_starts(pair, block[by_pair])),
            latest(run_starts(pair, own[by_pair])),
        )
        seen, rank = torch.empty_like(at), torch.empty_like(at)
        seen[by_pair], rank[by_pair] = (
            old - whole + place - mine,
            place - whole,
        )  # of this pair, before: visible from here; in the whole stream
        whole, old, mine = (
            latest(run_starts(context)),
            latest(run_starts(context, block)),
            latest(run_starts(context, own)),
        )
        frozen, frozen_at = (t[(old - 1).clamp(min=0)] for t in leader(whole, rank + 1))
        top, top_at = (t[(place - 1).clamp(min=0)] for t in leader(mine, seen + 1))
        frozen, top = torch.where(old > whole, frozen, 0), torch.where(place > mine, top, 0)
        firsts, news = (F.pad((count == 0).cumsum(0), (1, 0)) for count in (rank, seen))
        yield Continuations(
            order,
            at,
            target[torch.where(top > frozen, top_at, frozen_at)],
            torch.maximum(top, frozen),
            old - whole + place - mine,
            seen,
            firsts[old] - firsts[whole] + news[place] - news[mine],
        )
        at, context = at[by_pair], run_starts(pair).cumsum(0)
        goes_on = at + 1 < len(document)
        goes_on[goes_on.clone()] = document[at[goes_on] + 1] == document[at[goes_on]]
        at, context = at[goes_on] + 1, context[goes_on]


class NGram:
    """Improves the scored probabilities by what earlier segments and the document so far have shown to follow the last tokens.
    An order clears when its context was seen NGRAM_MIN_COUNT times and its commonest continuation has a share of NGRAM_THRESHOLD.
    tilt: the longest order that clears hints at that token h, and p' = p e^(b [x = h]) / (1 + p(h) (e^b - 1)) (#1145). b is NGRAM_BOOST; with
    NGRAM_CALIBRATE it is, for each bucket of (order, count, share), moved to the most probable value given the hits on scored segments.
    mix: each order that clears takes NGRAM_WEIGHT from the distribution of the orders below, the lowest of which is the network:
    p_n(x) = (1 - w) p_(n-1)(x) + w ((c(x) - 1/2)+ / total + distinct / (2 total) p_(n-1)(x)), PPM-D with its exact escape, so p sums to one."""

    COUNTS, SHARES, PRIOR = (
        6,
        9,
        20.0,
    )  # buckets: powers of two, eighths; NGRAM_BOOST weighs as much as 80 targets of which half hit

    def __init__(self, cfg: Config, ranks: Ranks, val: ValidationStream, sizes: list[int], log: Log):
        """sizes: documents of each segment, in order. Every rank counts the whole stream: integers, so all agree."""
        self.cfg, self.ranks, self.val, self.fresh, begun = cfg, ranks, val, [], time.perf_counter()
        n, device, segments = (
            val.targets,
            ranks.device,
            torch.arange(len(sizes), dtype=torch.int32).repeat_interleave(torch.tensor(sizes)),
        )
        tokens, document = torch.from_numpy(val.tokens.astype(np.int32)).to(device), torch.zeros(n, dtype=torch.int32)
        document[torch.from_numpy(val.starts[val.starts < n])] = 1
        document = document.to(device).cumsum(0, dtype=torch.int32) - 1
        hint, bucket = (
            torch.full((n,), -1, dtype=torch.int32, device=device),
            torch.zeros(n, dtype=torch.int16, device=device),
        )
        mass, rest = torch.zeros(n, device=device), torch.ones(n, device=device)
        for found in continuations(tokens, document, segments.to(device)[document], cfg.ngram_order, cfg.vocab_size):
            share = found.top.double() / found.total
            clears = ((found.total >= cfg.ngram_min_count) & (share >= cfg.ngram_threshold)).nonzero()[:, 0]
            if found.order < cfg.ngram_min_order or not len(clears):
                continue
            at, share, total, seen, distinct = (
                found.targets[clears],
                share[clears],
                found.total[clears],
                found.seen[clears],
                found.distinct[clears],
            )
            level = total.double().log2().long().clamp(max=self.COUNTS - 1)
            hint[at] = found.hint[clears]
            bucket[at] = (
                (found.order * self.COUNTS + level) * self.SHARES + (share * (self.SHARES - 1)).long()
            ).short()
            keep = 1 - cfg.ngram_weight + cfg.ngram_weight * distinct / (2 * total)
            mass[at] = keep * mass[at] + cfg.ngram_weight * (seen - 0.5).clamp(min=0) / total
            rest[at] *= keep
        self.hint, self.bucket, self.mass, self.rest = (t.cpu().numpy() for t in (hint, bucket, mass, rest))
        self.boost = np.full((cfg.ngram_order + 1) * self.COUNTS * self.SHARES, cfg.ngram_boost)
        self.precision = np.full_like(self.boost, self.PRIOR)
        log(
            f"n-grams of order {cfg.ngram_min_order}..{cfg.ngram_order}: hints at {100 * (self.hint >= 0).mean():.2f} % of the targets, {time.perf_counter() - begun:.1f} s"
        )

    def hints(self, targets: np.ndarray) -> Tensor | None:
        """The tokens whose log-probability scored() will ask for, int64 in the shape of ``targets``, on the device; None where it asks for none."""
        tokens = np.maximum(self.hint[np.minimum(targets, self.val.targets - 1)], 0)
        return (
            torch.from_numpy(tokens.astype(np.int64)).to(self.ranks.device) if self.cfg.ngram_mode == "tilt" else None
        )

    def scored(self, targets: np.ndarray, nats: np.ndarray, log_q: np.ndarray | None = None) -> np.ndarray:
        """Nats of the network for ``targets`` (n,), and its log-probabilities of their hints -> the nats to be booked, float64."""
        if log_q is None:
            return -np.log(self.mass[targets] + self.rest[targets] * np.exp(-nats))
        hinted, hit = self.hint[targets] >= 0, self.hint[targets] == self.val.tokens[targets + 1]
        self.fresh.append((targets[hinted], hit[hinted], np.exp(log_q[hinted])))
        boost = np.where(hinted, self.boost[self.bucket[targets]], 0.0)
        return nats - boost * hit + np.log1p(np.exp(log_q) * np.expm1(boost))

    def learn(self, ledger: Ledger):
        """At a segment's end: Newton steps towards the boosts under which its hits are likeliest, given what earlier segments said."""
        if not self.cfg.ngram_calibrate or self.cfg.ngram_mode != "tilt":
            return
        targets, hit, q = (
            np.concatenate(parts) for parts in zip((np.empty(0, np.int64), np.empty(0), np.empty(0)), *self.fresh)
        )
        ledger.may_train(targets)
        self.fresh, centre, bucket = [], self.boost, self.bucket[targets]
        for _ in range(6):
            odds = q * np.exp(self.boost[bucket])
            p = odds / (1 - q + odds)
            sums = np.stack([np.bincount(bucket, weights, len(self.boost)) for weights in (hit - p, p * (1 - p))])
            slope, curvature = self.ranks.all_reduce_(torch.from_numpy(sums)).numpy()
            self.boost = np.clip(
                self.boost + (slope - self.precision * (self.boost - centre)) / (curvature + self.precision), 0, 12
            )
        self.precision = self.precision + curvature


# ======== Test-time training: score a chunk, then learn from it; state crosses documents only between segments ================================================


class Segment(NamedTuple):
    """Consecutive documents of the stream that are independent of each other."""

    first: int  # documents first..last (exclusive)
    last: int
    phase_ends: bool  # global SGD follows


def plan_segments(documents: int, cfg: Config) -> list[Segment]:
    """Segments end at the phase boundaries PHASED_TTT_PREFIX_DOCS * p / PHASED_TTT_NUM_PHASES and otherwise every SEGMENT_DOCS."""
    prefix, phases = min(cfg.phased_ttt_prefix_docs, documents - 1), cfg.phased_ttt_num_phases
    boundaries = {prefix * p // phases for p in range(1, phases + 1)} - {0} if phases else set()
    ends = sorted({*boundaries, *range(cfg.segment_docs, documents, cfg.segment_docs), documents})
    return [Segment(lo, hi, hi in boundaries) for lo, hi in zip([0, *ends], ends)]


def plan_chunks(lengths: np.ndarray, cfg: Config) -> list[Segment]:
    """The segments of TTT_METHOD=sgd: whole documents of at least GLOBAL_TTT_CHUNK_TOKENS targets; all but the last are learnt from."""
    targets, ends = np.append(0, np.cumsum(lengths)), [0]
    while ends[-1] < len(lengths):
        ends.append(min(int(np.searchsorted(targets, targets[ends[-1]] + cfg.global_ttt_chunk_tokens)), len(lengths)))
    return [Segment(lo, hi, hi < len(lengths)) for lo, hi in zip(ends, ends[1:])]


def chunk_ends(longest: int, cfg: Config) -> list[int]:
    """Ends of the chunks that cover ``longest`` positions: TTT_CHUNKS in order, its last size repeated. A function of position, never of a document's length."""
    sizes, ends = [int(size) for size in cfg.ttt_chunks.split(",")], [0]
    while ends[-1] < longest:
        ends.append(ends[-1] + sizes[min(len(ends), len(sizes)) - 1])
    return ends[1:]


class Shape(NamedTuple):
    """All that a step of test-time training depends on besides the contents of its memory: one CUDA graph each."""

    rows: int  # documents run together
    older: int  # cached tokens that may be attended to
    back: int  # scored tokens run again, so that gradients reach back through them
    count: int  # tokens of the chunk


def lockstep(lengths: np.ndarray, cfg: Config, exact: bool):
    """Chunks of documents of these lengths, longest first: yields (begin, end, Shape). Finished rows leave the batch.
    Unless ``exact``, rows and context are rounded up to powers of two, so that few shapes serve every batch."""
    ceil = (
        (lambda n, least, most: min(n, most))
        if exact
        else lambda n, least, most: min(max(least, 1 << (n - 1).bit_length()), most) if n else 0
    )
    begin, context = 0, cfg.ttt_eval_seq_len
    for end in chunk_ends(int(lengths.max(initial=0)), cfg):
        count = end - begin
        back = ceil(begin, 64, min(cfg.ttt_backprop_tokens, context - count))
        older = ceil(max(begin - back, 0), 256, context - count - back)
        yield begin, end, Shape(ceil(int((lengths > begin).sum()), 8, cfg.ttt_batch_size), older, back, count)
        begin = end


class DocumentTTT:
    """Score-first adapters for batches of documents of one segment, in lockstep: every row is at the same position of its own document.
    All memory is static and a step depends on its Shape alone, so a GPU replays CUDA graphs: its many small kernels cost no launches. Keys and values stay as
    they were when their token was scored; a ring holds the last TTT_EVAL_SEQ_LEN of them."""

    def __init__(self, model: GPT, cfg: Config, val: ValidationStream, ledger: Ledger, ngram: NGram | None = None):
        self.model, self.cfg, self.val, self.ledger, self.ngram, self.device = (
            model,
            cfg,
            val,
            ledger,
            ngram,
            model.tok_emb.device,
        )
        rows, device, visits = cfg.ttt_batch_size, self.device, len(model.schedules[cfg.looped])
        self.stream = torch.from_numpy(val.tokens.astype(np.int32)).to(device)
        self.hints = None if ngram is None else ngram.hints(np.arange(val.targets))
        self.begin, self.updates = torch.zeros((), dtype=torch.int64, device=device), torch.zeros((), device=device)
        self.row_starts, self.row_lengths = (torch.zeros(rows, dtype=torch.int64, device=device) for _ in range(2))
        self.lora = new_lora(
            model,
            rows,
            frozenset(cfg.ttt_mask.replace("no_qv", "q,v").split(",")),
            cfg.ttt_lora_rank,
            cfg.ttt_lora_alpha,
            cfg.seed,
        )
        self.start = [p[:1].detach().clone() for p in self.lora.leaves()]  # where every document's adapters begin
        self.squares = [torch.zeros_like(p) for p in self.lora.leaves()]
        ring = visits, rows, cfg.ttt_eval_seq_len, cfg.num_kv_heads, model.head_dim
        self.keys, self.values = (torch.zeros(ring, dtype=model.dtype, device=device) for _ in range(2))
        self.parts, self.graphs, self.pool = {}, {}, None
        self.drift, self.documents = [torch.zeros_like(t) for t in self.start], 0.0

    def prepare(self, batches: list[np.ndarray]):
        """Capture every graph that these batches need, on random tokens (B29). Only lengths of documents are read."""
        self.stream.random_(self.cfg.vocab_size, generator=torch.Generator(self.device).manual_seed(0))
        self.pool = torch.cuda.graph_pool_handle()
        for shape in sorted(
            {
                shape
                for batch in batches
                for *_, shape in lockstep(np.sort(self.val.lengths[batch])[::-1], self.cfg, False)
            },
            reverse=True,
        ):
            self.graphs[shape] = self.capture(shape)
        self.stream.copy_(torch.from_numpy(self.val.tokens.astype(np.int32)))

    def capture(self, shape: Shape):
        """Graphs of score() and learn(), and where the first leaves its findings."""
        with torch.cuda.stream(torch.cuda.Stream()):
            self.learn(shape, self.score(shape)[0])  # libraries and Triton set themselves up outside of a capture
        torch.cuda.synchronize()
        scoring, learning = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(scoring, pool=self.pool):
            found = self.score(shape)
        with torch.cuda.graph(learning, pool=self.pool):
            self.learn(shape, found[0])
        return scoring, learning, [t.detach() for t in found]

    @torch.no_grad()
    def reset(self, documents: np.ndarray):
        """Forget the last batch: adapters at their start, no second moments, no updates. Unused rows are documents of no length."""
        for p, start, v in zip(self.lora.leaves(), self.start, self.squares):
            p.copy_(start.expand_as(p))
            v.zero_()
        self.updates.zero_()
        for memory, values in (
            (self.row_starts, self.val.starts[documents]),
            (self.row_lengths, self.val.lengths[documents]),
        ):
            memory.zero_()
            memory[: len(documents)] = torch.from_numpy(values)

    def run(self, documents: np.ndarray):
        """documents: indices, at most TTT_BATCH_SIZE, in any order."""
        documents = documents[np.argsort(-self.val.lengths[documents], kind="stable")]
        starts, lengths = self.val.starts[documents], self.val.lengths[documents]
        self.reset(documents)
        for begin, end, shape in lockstep(lengths, self.cfg, self.device.type == "cpu"):
            self.begin.fill_(begin)
            scoring, learning, found = self.graphs.get(shape, (None, None, None))
            if self.graphs and found is None:
                raise RuntimeError(f"no graph was captured for {shape}")
            scoring.replay() if scoring else (found := self.score(shape))
            targets = starts[: shape.rows, None] + np.arange(begin, end)
            valid = np.arange(begin, end) < lengths[: shape.rows, None]
            book(
                self.ledger,
                targets[valid],
                tuple(t[: len(valid)].cpu() for t in found),
                torch.from_numpy(valid),
                self.ngram,
            )
            goes_on = lengths[: shape.rows] > end
            if goes_on.any() and self.cfg.ttt_grad_steps:
                self.ledger.may_train(targets[goes_on].ravel())
                learning.replay() if learning else self.learn(shape, found[0])
        self.remember(lengths)

    def score(self, shape: Shape, keep: bool = True) -> tuple[Tensor, ...]:
        """Nats (rows, count) of the chunk at self.begin, and the log-probabilities of its hints where there are any.
        Rows hold ``older`` cached keys and then ``back + count`` tokens. What would lie before a document is BOS in a segment of its own, seen by nobody."""
        rows, older, back, count = shape
        width, device, context = back + count, self.device, self.cfg.ttt_eval_seq_len
        position = self.begin - back + torch.arange(width, device=device)
        index = (self.row_starts[:rows, None] + position).clamp(0, len(self.stream) - 2)
        tokens = torch.where(position >= 0, self.stream[index], self.cfg.bos_id).long()
        before = self.stream[(index[:, 0] - 1).clamp(min=0)].long()
        at = torch.arange(rows, dtype=torch.int32, device=device)[:, None]
        offsets = lambda length, outside: F.pad(
            (at * length + torch.stack((torch.zeros_like(outside), outside))).flatten(), (0, 1), value=rows * length
        )
        outside = [(n - self.begin).clamp(min=0).int() for n in (back, older + back)]
        seq = Seq(
            offsets(width, outside[0]),
            offsets(older + width, outside[1]),
            width,
            older + width,
            position.int().repeat(rows),
        )
        slots = (self.begin - back - older + torch.arange(older, device=device)) % context
        cache = Cache(*(t[:, :rows].index_select(2, slots) for t in (self.keys, self.values)), before)
        lora = self.parts[rows] = self.parts.get(rows) or self.lora.first(rows)
        with torch.set_grad_enabled(self.cfg.ttt_grad_steps > 0):
            hidden, fresh = self.model.trunk(tokens.flatten(), seq, looped=self.cfg.looped, lora=lora, cache=cache)
            hidden = hidden.unflatten(0, (rows, width))[:, back:].flatten(0, 1)  # only the chunk pays for the head
            hint = None if self.hints is None else self.hints[index[:, back:]].flatten()
            found = self.model.nll(hidden, self.stream[index[:, back:] + 1].flatten().long(), lora=lora, hint=hint)
        if keep:
            for ring, t in ((self.keys, fresh.keys), (self.values, fresh.values)):
                ring[:, :rows].index_copy_(2, position % context, t.detach())
        return tuple(t.unflatten(0, (rows, count)) for t in (found if isinstance(found, tuple) else (found,)))

    def learn(self, shape: Shape, nats: Tensor):
        """TTT_GRAD_STEPS of AdamW on the mean nats (rows, count) of the chunk, for rows with a later chunk. Rows do not mix: the loss is a sum and Adam is elementwise."""
        cfg, lora = self.cfg, self.parts[shape.rows]
        lr, squares = cfg.ttt_lora_lr * cfg.ttt_local_lr_mult, [v[: shape.rows] for v in self.squares]
        goes_on = (self.row_lengths[: shape.rows] > self.begin + shape.count).float()
        for step in range(cfg.ttt_grad_steps):
            nats = self.score(shape, keep=False)[0] if step else nats
            grads = [g.contiguous() for g in torch.autograd.grad((nats.mean(1) * goes_on).sum(), lora.leaves())]
            self.updates += 1
            with torch.no_grad():  # a finished row stays as it is: its gradient is zero, and it does not decay
                for p in lora.leaves():
                    p.mul_((1 - lr * cfg.ttt_weight_decay * goes_on)[:, None, None])
                # With beta1 = 0 the first moment is the gradient, so the gradients' memory serves as its own.
                torch._fused_adamw_(
                    lora.leaves(),
                    grads,
                    grads,
                    squares,
                    [],
                    [self.updates] * len(grads),
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
        """Add up how far the batch's adapters have moved, each document by its tokens, at most a context of them."""
        weight = torch.from_numpy(np.minimum(lengths, self.cfg.ttt_eval_seq_len).astype(np.float32)).to(self.device)
        for drift, p, start in zip(self.drift, self.lora.leaves(), self.start):
            drift += torch.tensordot(weight, p[: len(weight)], 1) - weight.sum() * start
        self.documents += float(weight.sum())

    @torch.no_grad()
    def next_segment(self, ranks: Ranks):
        """The adapters' start moves to the mean of the segment's adapters, scored tokens all of them (Reptile, arXiv 1803.02999)."""
        total = ranks.all_reduce_(torch.tensor([self.documents], dtype=torch.float64)).item()
        for start, drift in zip(self.start, self.drift):
            start += self.cfg.ttt_warm_start / max(total, 1.0) * ranks.all_reduce_(drift)
            drift.zero_()
        self.documents = 0.0


def deal_batches(lengths: np.ndarray, first: int, cfg: Config, world: int) -> list[list[np.ndarray]]:
    """Documents of a segment by falling length in batches, dealt to the ranks by falling cost: a batch costs what its longest row takes."""
    order = first + np.argsort(-lengths, kind="stable")
    batches = [order[i : i + cfg.ttt_batch_size] for i in range(0, len(order), cfg.ttt_batch_size)]
    load, dealt = np.zeros(world), [[] for _ in range(world)]
    for batch in batches:
        rank = int(load.argmin())
        load[rank] += len(chunk_ends(int(lengths[batch - first].max()), cfg))
        dealt[rank].append(batch)
    return dealt


class BaseLearner:
    """Gradients of the base weights from validation targets, for whoever may learn from them."""

    def __init__(self, model: GPT, cfg: Config, ranks: Ranks, val: ValidationStream):
        self.model, self.cfg, self.ranks, self.val = model, cfg, ranks, val
        self.width = cfg.ttt_eval_seq_len
        self.tokens = (
            -(-cfg.global_ttt_chunk_tokens // (self.width * ranks.world)) * self.width
        )  # of one micro-batch on one rank

    def clipped_gradients(self, at: int, count: int):
        """Gradients (.grad) of every parameter for the mean nats of targets at..at + count, summed over the ranks, clipped to GLOBAL_TTT_GRAD_CLIP."""
        self.gradients(at, count)
        parameters = list(self.model.parameters())
        grads = self.ranks.all_reduce_flat([torch.zeros_like(p) if p.grad is None else p.grad for p in parameters])
        torch._foreach_mul_(
            grads,
            (self.cfg.global_ttt_grad_clip / (torch.stack(torch._foreach_norm(grads)).norm() + 1e-6)).clamp(max=1.0),
        )
        for p, grad in zip(parameters, grads):
            p.grad = grad

    def gradients(self, at: int, count: int):
        """Mean nats of targets at..at + count: the chunk is cut every TTT_EVAL_SEQ_LEN and each rank takes neighbouring pieces, so no sum depends on their number."""
        share = -(-count // (self.width * self.ranks.world)) * self.width
        first, last = at + self.ranks.rank * share, min(at + (self.ranks.rank + 1) * share, at + count)
        for lo in range(first, last, self.tokens):
            self.backward(self.val.tokens[lo : min(lo + self.tokens, last) + 1].astype(np.int64), count)

    def backward(self, tokens: np.ndarray, count: int):
        """Add the gradient of the summed nats of tokens[1:] over ``count``."""
        starts = np.union1d(np.flatnonzero(tokens[:-1] == self.cfg.bos_id), np.arange(0, len(tokens) - 1, self.width))
        batch = to_device(pack(tokens, starts, self.width, self.width, "val", len(tokens) - 1), self.ranks.device)
        batch_loss(self.model, batch, count, self.cfg.looped).backward()

    def prequant(self, log: Log):
        """AdamW over the whole validation set before any of it is scored (#1735, #1738): the published mistake, kept so that it can be measured."""
        cfg, chunk, epochs = self.cfg, self.cfg.global_ttt_chunk_tokens, self.cfg.prequant_ttt_epochs
        adam = torch.optim.AdamW(self.model.parameters(), weight_decay=0.0)
        for epoch in range(epochs):
            adam.param_groups[0]["lr"] = cfg.prequant_ttt_lr * (
                0.55 + 0.45 * math.cos(math.pi * epoch / max(epochs - 1, 1))
            )
            for at in range(0, self.val.targets, chunk):
                self.clipped_gradients(at, min(chunk, self.val.targets - at))
                self.model.tok_emb.grad = None  # Adam leaves alone what never had a gradient
                for name, p in self.model.named_parameters():
                    if p.ndim > 1 and not name.startswith(("skip_", "tok_emb")):  # stacked by layer
                        p.grad[: cfg.prequant_ttt_freeze_blocks] = 0.0
                adam.step()
                adam.zero_grad()
            log(f"  trained on the validation set, pass {epoch + 1} of {epochs}")


class TestTimeTraining:
    """Scores the validation stream segment by segment, adapting within documents and, at phase boundaries, the base weights."""

    def __init__(self, model: GPT, cfg: Config, ranks: Ranks, log: Log, val: ValidationStream, ledger: Ledger):
        self.model, self.cfg, self.ranks, self.log, self.val, self.ledger = model, cfg, ranks, log, val, ledger
        self.method = cfg.ttt_method if cfg.ttt_enabled else "none"
        self.segments = plan_chunks(val.lengths, cfg) if self.method == "sgd" else plan_segments(len(val.lengths), cfg)
        self.learner, self.sgd = BaseLearner(model, cfg, ranks, val), None
        sizes = [s.last - s.first for s in self.segments]
        serial = sum(len(chunk_ends(int(val.lengths[s.first : s.last].max()), cfg)) for s in self.segments)
        log(
            f"test-time training ({self.method}): {len(sizes)} segment(s) of {sizes if len(sizes) < 30 else f'{min(sizes)}..{max(sizes)}'} documents"
            + (
                f"; critical path {serial:,} chunks in a row, the longest documents of the segments"
                if self.method == "lora"
                else ""
            )
        )
        self.ngram = NGram(cfg, ranks, val, sizes, log) if cfg.ngram_enabled else None
        if self.method == "lora":
            self.adapters = DocumentTTT(model, cfg, val, ledger, self.ngram)
            self.batches = [
                deal_batches(val.lengths[s.first : s.last], s.first, cfg, ranks.world)[ranks.rank]
                for s in self.segments
            ]
        else:
            self.scorer = Scorer(model, cfg, ranks, log, self.ngram)

    def prepare(self):
        """On a GPU, capture on random tokens whatever the timed part will replay: no validation token is read before (B29)."""
        begun = time.perf_counter()
        self.model.requires_grad_(False)
        if self.method == "lora" and self.ranks.device.type == "cuda":
            self.adapters.prepare([batch for mine in self.batches for batch in mine])
            self.log(f"  captured {len(self.adapters.graphs)} graphs in {time.perf_counter() - begun:.1f} s")

    def score(self) -> float:
        begun = time.perf_counter()
        self.model.requires_grad_(False)
        for i, segment in enumerate(self.segments):
            if self.method == "lora":
                for batch in self.batches[i]:
                    self.ledger.progress(self.ranks, self.log)
                    self.adapters.run(batch)
                self.ledger.merge(self.ranks)
                self.adapters.next_segment(self.ranks)
            else:
                self.scorer.score_documents(self.val, self.ledger, self.cfg.eval_stride, segment.first, segment.last)
            if self.ngram:
                self.ngram.learn(self.ledger)
            if segment.phase_ends and self.method != "none":
                begin, end = (int(self.val.starts[j]) for j in (segment.first, segment.last))
                self.global_sgd(end, *((begin, i / len(self.segments)) if self.method == "sgd" else ()))
        seconds = time.perf_counter() - begun
        self.log(
            f"  {self.val.targets:,} targets in {seconds:.1f} s: {self.val.targets / seconds:,.0f} targets/s over {self.ranks.world} rank(s)"
        )
        return self.ledger.bpb()

    def global_sgd(self, end: int, begin: int = 0, progress: float | None = None):
        """All base parameters learn from targets begin..end, every one of them scored: SGD on chunks in stream order, documents kept apart.
        The learning rate is the half cosine at ``progress`` in 0..1; without it this call is a phase, with a whole half cosine and a momentum of its own."""
        cfg, steps = self.cfg, max(round((end - begin) / self.cfg.global_ttt_chunk_tokens), 1)
        self.ledger.may_train(np.arange(begin, end))
        self.model.requires_grad_(True)
        if progress is None or self.sgd is None:
            self.sgd = torch.optim.SGD(self.model.parameters(), momentum=cfg.global_ttt_momentum)
        edges = np.linspace(begin, end, steps + 1).astype(int).tolist()
        chunks = list(zip(edges, edges[1:])) * cfg.global_ttt_epochs
        begun = time.perf_counter()
        for i, (lo, hi) in enumerate(chunks):
            self.learner.clipped_gradients(lo, hi - lo)
            share = i / len(chunks) if progress is None else progress
            self.sgd.param_groups[0]["lr"] = cfg.global_ttt_lr * 0.5 * (1 + math.cos(math.pi * share))
            self.sgd.step()
            self.sgd.zero_grad()
        self.model.requires_grad_(False)
        self.ranks.synchronize()
        if progress is None:
            self.log(
                f"  base weights learnt from {end - begin:,} scored targets in {len(chunks)} steps, {time.perf_counter() - begun:.1f} s"
            )


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

    def ledger(self, name: str) -> Ledger:
        return Ledger(name, self.val.target_bytes, self.verdicts)


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
        run.result["bpb"][name] = Scorer(model, run.cfg, run.ranks, run.log).score(
            run.val, run.ledger(name), run.cfg.eval_stride
        )
    run.log(f"{name}: {run.result['bpb'][name]:.5f} BPB")


class RateSearch:
    """Looks for the bits to save per weight at which model.bin just fits. Sizes are measured, since a code's length is
    only known once it is written."""

    ATTEMPTS = 12
    AIM = 0.9997  # of the room: a little below, so that the attempt after a near miss fits

    def __init__(self, cfg: Config, code_bytes: int, weights: int):
        self.cfg = cfg
        self.weights = weights
        self.room = cfg.artifact_cap - cfg.artifact_margin - code_bytes
        # RATE_DISTORTION's own budget is the whole cap; the published rule's is what its settings give.
        self.saved = 8 * (cfg.artifact_cap - self.room) / weights if cfg.rate_distortion else 0.0
        self.sizes = []
        self.best = b""  # the largest model.bin that fits; empty on ranks that do not write

    def propose(self) -> float:
        """Bits to save per weight in the next attempt."""
        if len(self.sizes) == self.ATTEMPTS:
            raise UserError(
                f"ARTIFACT_CAP={self.cfg.artifact_cap}: the model does not fit with any step; "
                "shrink the model or raise the cap"
            )
        return self.saved

    def observe(self, data: bytes, size: int):
        """data: the model.bin of the last proposal, on rank 0; size: its length, on every rank."""
        self.sizes.append(size)
        if size <= self.room and len(data) >= len(self.best):
            self.best = data
        # Steps 2**x times as wide save x bits a weight.
        self.saved += 8 * (size - self.room * self.AIM) / self.weights

    def done(self) -> bool:
        if not self.sizes or self.sizes[-1] > self.room:
            return False  # only a file that fits ends the search
        left = self.room - self.sizes[-1]
        before = self.sizes[-2] if len(self.sizes) > 1 else 0
        return (
            not self.cfg.rate_distortion  # the published rule has sizes of its own: it is only widened until it fits
            or left < self.room / 1000  # the room is used
            or len(self.sizes) > 3  # every attempt costs training time
            or abs(self.sizes[-1] - before) < self.room / 10000  # nothing gains: the steps are as fine as symbols allow
        )


def search_rate(run: Run, model: GPT, hessians: dict[str, Tensor], code_bytes: int) -> bytes:
    """Quantise and encode until RateSearch is content; the bytes of model.bin on rank 0."""
    cfg = run.cfg
    search = RateSearch(cfg, code_bytes, sum(p.numel() for p in model.parameters()))
    with run.phases("quantize"):
        quantizer = Quantizer(model, hessians, cfg, run.ranks)
    logit_values = None
    while True:
        with run.phases("quantize"):
            quantized = quantizer.quantize(search.propose())
            if cfg.logit_calibration_enabled:
                if logit_values is None:  # fitted to the first attempt, and kept
                    logit_values = quantized_calibration(run, model, quantized)
                quantized = quantized._replace(logit_calibration=logit_values)
        before = run.phases.seconds.get("write", 0.0)
        with run.phases("write"):
            data = encode_artifact(flatten(quantized), {"settings": cfg.settings()}) if run.ranks.main else b""
            size = int(run.ranks.agree(len(data)))
        run.log(f"model.bin of {size:,} bytes, {search.room - size:,} left")
        search.observe(data, size)
        if search.done():
            return search.best
        # Encoding that only steers the search is part of it: training time.
        run.phases.charge("write", to="quantize", seconds=run.phases.seconds["write"] - before)


def write_artifact(run: Run, model: GPT):
    """Calibrate, quantise, and write model.bin and the packed train_gpt.py. Step sizes widen until the two fit under
    the cap; with RATE_DISTORTION they also narrow, until a thousandth of it is left or nothing gains."""
    cfg = run.cfg
    packed = pack_script(SOURCE)
    with run.phases("calibrate"):
        hessians = collect_hessians(model, TrainStream(cfg), cfg, run.ranks)
    data = search_rate(run, model, hessians, len(packed))
    with run.phases("write"):
        if run.ranks.main:
            with whole_file(run.folder / "model.bin") as f:
                f.write(data)
            script = run.folder / "train_gpt.py"
            if not (script.exists() and script.read_bytes() == packed):  # a packed script may run in its own folder
                with whole_file(script) as f:
                    f.write(packed)
    run.ranks.agree(0)
    run.log(f"train_gpt.py: {len(SOURCE.encode()):,} bytes of source packed into {len(packed):,}")
    seconds = [f"{name} {run.phases.seconds[name]:.1f}" for name in ("calibrate", "quantize", "write")]
    run.log(f"seconds: {', '.join(seconds)}")


def quantized_calibration(run: Run, model: GPT, quantized: Quantized) -> np.ndarray:
    """fit_logit_calibration for the weights as the artifact will give them back, in a model of their own."""
    cfg = run.cfg
    rounded = GPT(cfg, run.attention, model.dtype).to(run.ranks.device)
    load_state(rounded, quantized.state(), run.folder)
    return fit_logit_calibration(rounded, TrainStream(cfg), cfg, run.ranks)


def load_quantized(run: Run, model: GPT) -> tuple[GPT, dict]:
    """model.bin in the model, and its meta. An artifact with logit calibration needs a model that was made with it."""
    cfg, device = run.cfg, run.ranks.device
    path = run.folder / "model.bin"
    arrays, meta = load_artifact(path)
    quantized = unflatten(arrays)
    if quantized.logit_calibration is not None:
        values = torch.from_numpy(quantized.logit_calibration).to(device)
        calibration = to_logit_calibration(values, piece_features(cfg).to(device))
        model = GPT(cfg, run.attention, model.dtype, calibration).to(device)
    load_state(model, quantized.state(), path)
    return model, meta


def score_artifact(run: Run, model: GPT):
    """Load model.bin from disk into the model and score it; the number comes from what ships."""
    cfg = run.cfg
    with run.phases("load"):
        model, meta = load_quantized(run, model)
    others = sorted(k.upper() for k, v in cfg.settings().items() if v != meta["settings"].get(k))
    if others:
        run.verdicts.set("C4", "DISPUTED", f"scored with settings other than the artifact's: {', '.join(others)}")
    ledger, run.result["segments"] = run.ledger("quantized"), [len(run.val.starts)]
    if meta["settings"].get("prequant_ttt_enabled"):
        ledger.break_condition(
            "C3", "PREQUANT_TTT_ENABLED=1: the weights learnt from every validation target before it was scored"
        )
    if cfg.ttt_enabled or cfg.ngram_enabled:
        diagnose(run, model, "quantized")
        ledger = run.ledger("adapted")
        with run.phases("prepare"):
            adaptation = TestTimeTraining(model, cfg, run.ranks, run.log, run.val, ledger)
            adaptation.prepare()
        with run.phases("adapt"):
            run.result["bpb"]["adapted"] = adaptation.score()
        run.result["segments"] = [
            s.last - s.first for s in adaptation.segments
        ]  # what the audit may hold us to: documents of a segment are independent
    else:
        with run.phases("score"):
            run.result["bpb"]["quantized"] = Scorer(model, cfg, run.ranks, run.log).score(
                run.val, ledger, cfg.eval_stride
            )
    run.log(f"{ledger.name}: {run.result['bpb'][ledger.name]:.5f} BPB")
    run.headline = ledger.name
    run.result.update(anatomy(ledger, run.val))
    if cfg.ledger_path and run.ranks.main:
        with whole_file(Path(cfg.ledger_path), "LEDGER_PATH") as f:
            np.save(f, ledger.nats)
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
        stored = read_artifact(path)[0]["meta"]["settings"]
    elif cfg.quantize_only:
        path = artifact_folder(cfg) / "trained.npz"
        stored = read_trained(path)[1]["settings"]
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
                    BaseLearner(model, cfg, run.ranks, run.val).prequant(run.log)
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
