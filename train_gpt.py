"""Train a GPT in ten minutes, quantise it below 16,000,000 bytes, and score it in bits per byte (BPB).

    torchrun --nproc_per_node=8 train_gpt.py          train, quantise, pack, reload from disk, score
    TTT_EVAL_ONLY=1 python train_gpt.py               score the artifact in ARTIFACT_DIR
    QUANTIZE_ONLY=1 python train_gpt.py               start again from the trained weights in ARTIFACT_DIR
    CHECK_ONLY=1 python train_gpt.py                  check data, tokenizer, attention, codec and disk, then stop
    python train_gpt.py --help                        every setting, its default and its meaning
    python train_gpt.py --unpack FILE                 print the source inside a packed script

Settings are environment variables. The same file runs on a CPU, one GPU, eight GPUs or several nodes. prepare_data.py
makes the data folder; shards that others made in the same format load as they are.

Sections, each using only those above it: Hyperparameters, Runtime, Data, Kernels, Attention, Model, Adapters,
Optimizers, Training, Quantizer, Artifact, Scoring, N-gram, Test-time training, Packer, Main.
"""

# A run is a list of phases; `execute`, in Main at the end of the file, calls them in this order:
#
#   check      Run.prepare, preflight   read the data, choose the attention backend, try the codec and the disk
#   train      Trainer                  TrainStream -> Batch -> GPT -> loss -> Optimizer, until the budget is spent
#   quantize   write_artifact           Hessians of training data -> symbols, step sizes -> entropy coder -> model.bin;
#                                       the packed source -> train_gpt.py; together they stay below ARTIFACT_CAP
#   score      score_artifact           model.bin from the disk -> GPT -> nats of every validation target -> Ledger;
#                                       TestTimeTraining learns from a chunk only after its nats are in the ledger
#   report     finish                   verdicts on budgets, bytes and conditions C1 to C4; result.json
#
# The network, for one document of tokens t[0], t[1], ... (d channels, L layers; the docstring of `GPT` has the exact
# equations, with the coefficients that are learnt, and the shapes of the weights):
#
#   rms(x)  = x / sqrt(mean(x^2) + eps)
#   x0[i]   = rms(E[t[i]] + gate * E[t[i-1]])                      E (vocabulary, d); SmearGate
#   x       = x0
#   visit the layers in order, layers LOOP_START to LOOP_END several times in a row:
#     x     = mix(x0, x, output of an earlier visit)               coefficients per channel; U-Net skip
#     n     = rms(x) / sqrt(layer + 1)
#     q,k,v = W_qkv n                                              q and k normed and rotated (RoPE); K/V heads shared
#     y     = softmax(q k^T / sqrt(head width)) v                  causal, within the document, windowed in most layers
#     y     = sigmoid(gate of n) * (y - projection of y on v)      per head; XSA
#     x     = x + W_o y
#     x     = x + W_down leaky_relu(W_up rms(x) / sqrt(layer + 1))^2
#   logits  = cap * tanh(E x / cap)                                the embedding is the output matrix, too
#   nats[i] = logsumexp(logits[i]) - logits[i][t[i+1]]
#
# The last layers split x into two lanes: attention reads the first, the MLP the second, and both write both.
# BPB = sum of nats / ln 2 / bytes of the validation text.
#
# One forward serves all: training, Hessians, scoring and test-time training differ in the arguments of `GPT.trunk`.
# Every Triton kernel stands below a plain PyTorch function that computes the same; on a CPU only that one runs.

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
from collections.abc import Callable
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
PACKED = "PACKED_PATH" in globals()  # set by the packed script's first lines; see BOOTSTRAP
RUNNING = Path(globals().get("PACKED_PATH", __file__)).resolve()


class UserError(Exception):
    """Bad input: printed as one line that names the file or setting and the remedy; the process exits with status 2."""


def require(holds, message: str):
    """Raise UserError unless `holds`."""
    if not holds:
        raise UserError(message)


@contextlib.contextmanager
def explained(message: str, *errors: type[Exception]):
    """Turn `errors` of the block into a UserError; {} in the message stands for the error's own text."""
    try:
        yield
    except errors as e:
        raise UserError(message.replace("{}", getattr(e, "strerror", None) or str(e))) from None


# ======== Hyperparameters =============================================================================================

ADAPTER_KINDS = ("q", "k", "v", "o", "mlp", "head")

# Fields of Config that do not decide the result: paths, modes, ranks.
NOT_SETTINGS = frozenset(
    "data_path tokenizer_path artifact_dir ledger_path ttt_eval_only quantize_only check_only device attention "
    "fa3_library rank local_rank world_size train_log_every".split()
)

# Settings of earlier scripts and the value that is now fixed. An artifact that holds one of them with this value loads.
RETIRED = {
    "ln_scale": True,
    "muon_backend_steps": 5,
    "muon_row_normalize": True,
}

# The groups of --help: first setting -> heading.
GROUPS = {
    "seed": "Run",
    "vocab_size": "Model",
    "max_wallclock_seconds": "Training",
    "matrix_lr": "Optimizers",
    "prequant_ttt_enabled": "Training on the validation set, which FAILS condition C3",
    "rate_distortion": "Quantizer and artifact",
    "eval_seq_len": "Scoring",
    "ttt_enabled": "Test-time training",
    "ngram_enabled": "N-grams",
    "rank": "Set by torchrun",
}


def setting(default, meaning: str, within: str = ""):
    """A field of Config: its default, what --help says about it, and its limits (see `lies_within`).

    Without limits a string may be anything, and a number must lie in [0, inf)."""
    within = within or ("" if isinstance(default, str) else "[0, inf)")
    return dataclasses.field(default=default, metadata={"meaning": meaning, "within": within})


def lies_within(value, within: str) -> bool:
    """Whether a number lies in an interval like "[0, 1)", which excludes 1; or a string is one of "auto, cpu, cuda"."""
    if isinstance(value, str):
        return not within or value in within.split(", ")
    low, high = map(float, within[1:-1].split(", "))
    if value in (low, high):
        return within[0 if value == low else -1] in "[]"
    return low < value < high


@dataclasses.dataclass(frozen=True, slots=True)
class Config:
    """Every setting once: the field's name in capitals is the variable. The defaults are our best configuration."""

    # A table of two lines a setting, which the formatter would break into one to five.
    # fmt: off

    # Run
    seed: int = setting(1337,
        "seed of the initial weights; the order of the data is fixed", "[0, 9e18]")
    data_path: str = setting("data",
        "folder of the shards fineweb_{train,val,val_bytes}_*.bin and of manifest.json")
    tokenizer_path: str = setting("",
        "SentencePiece model; empty: tokenizer.model in DATA_PATH")
    artifact_dir: str = setting("",
        "folder of train_gpt.py, model.bin, result.json and the log; empty: runs/SEED (packed script: its own folder)")
    ledger_path: str = setting("",
        "file for the nats of every validation target (float64 .npy, stream order) of the headline pass; empty: none")
    ttt_eval_only: bool = setting(False,
        "score the artifact in ARTIFACT_DIR and stop")
    quantize_only: bool = setting(False,
        "start from ARTIFACT_DIR/trained.npz instead of training")
    check_only: bool = setting(False,
        "run every pre-flight check and stop")
    device: str = setting("auto",
        "where to run; auto: a GPU if there is one", "auto, cpu, cuda")
    attention: str = setting("auto",
        "attention backend; auto: the first of fa3, fa4, torch and reference that works here",
        "auto, fa3, fa4, torch, reference")
    fa3_library: str = setting("",
        "shared object that registers torch.ops.flash_attn_3 (for example that of the xformers wheel)")

    # Model
    vocab_size: int = setting(8192,
        "tokens in the vocabulary; a token is stored in 16 bits", "[8, 65536]")
    bos_id: int = setting(1,
        "token that begins every document")
    num_layers: int = setting(11,
        "physical layers", "(0, inf)")
    model_dim: int = setting(512,
        "width of the residual stream", "(0, inf)")
    num_heads: int = setting(4,
        "query heads of a layer", "(0, inf)")
    num_kv_heads: int = setting(2,
        "key and value heads of a layer", "(0, inf)")
    mlp_mult: float = setting(4.0,
        "hidden width of the MLP over MODEL_DIM")
    leaky_relu_sq_slope: float = setting(0.5,
        "negative slope of the MLP's squared leaky ReLU")
    tied_embed_init_std: float = setting(0.005,
        "standard deviation of the initial embedding")
    logit_softcap: float = setting(30.0,
        "bound of the logits: a tanh keeps them between -LOGIT_SOFTCAP and LOGIT_SOFTCAP", "(0, inf)")
    asym_logit_rescale: bool = setting(False,
        "learn one cap for positive and one for negative logits, both from LOGIT_SOFTCAP on (#1923)")
    rope_base: float = setting(10000.0,
        "base of the rotary position embedding (RoPE)", "(0, inf)")
    rope_dims: int = setting(32,
        "rotated dimensions of each head")
    attn_window: int = setting(128,
        "tokens that attention reaches back in layers other than ATTN_FULL_LAYERS; 0: the attention span everywhere")
    attn_full_layers: str = setting("2,5,10",
        "layers whose attention reaches back over the attention span; numbers beyond NUM_LAYERS mean nothing")
    qk_gain_init: float = setting(5.0,
        "initial gain of each normalised query head")
    xsa_last_n: int = setting(11,
        "layers, from the last, whose heads drop the component along their own value")
    smear_gate_enabled: bool = setting(True,
        "add a gated copy of the previous token's embedding")
    gate_window: int = setting(12,
        "leading channels that SmearGate and the attention gates read", "(0, inf)")
    sparse_attn_gate_enabled: bool = setting(True,
        "gate each head's output by a sigmoid of the leading channels")
    sparse_attn_gate_scale: float = setting(0.5,
        "factor inside the sigmoid of the attention gate")
    attn_out_gate_enabled: bool = setting(False,
        "gate each head's output by twice a sigmoid of the leading channels, one at the start (#1667)")
    skip_gates_enabled: bool = setting(True,
        "U-Net skips are merged by a learned gate (off: added)")
    num_loops: int = setting(2,
        "extra passes over the looped layers")
    loop_start: int = setting(3,
        "first looped layer")
    loop_end: int = setting(5,
        "last looped layer")
    enable_looping_at: float = setting(0.35,
        "progress of training at which the loops switch on")
    parallel_start_layer: int = setting(8,
        "first layer whose attention and MLP run side by side; 0: none")
    parallel_mode: str = setting("lanes",
        "how attention and MLP run side by side; lanes: in two lanes of the decoder (#1529); "
        "gptj: from one input, outputs added (#1493)", "lanes, gptj")
    parallel_final_lane: str = setting("mean",
        "what the two lanes of the decoder end in", "mean, attn, mlp")

    # Training
    max_wallclock_seconds: float = setting(600.0,
        "training budget, calibration and quantisation included; 0: ITERATIONS decides and no clock is read")
    gptq_reserve_seconds: float = setting(12.0,
        "part of the training budget that is reserved for calibration and quantisation")
    iterations: int = setting(20000,
        "most training steps; with MAX_WALLCLOCK_SECONDS=0 exactly this many", "(0, inf)")
    train_batch_tokens: int = setting(786432,
        "tokens of one training step over all ranks", "(0, inf)")
    micro_batch_tokens: int = setting(98304,
        "tokens of one forward; micro-batches are dealt to the ranks, so results do not depend on the number of ranks",
        "(0, inf)")
    train_seq_len: int = setting(2048,
        "longest attention span in training: documents are cut there", "(0, inf)")
    train_seq_schedule: str = setting("",
        "growing attention span in training, LEN@END_PROGRESS,...; empty: TRAIN_SEQ_LEN throughout")
    seq_change_warmup_steps: int = setting(32,
        "steps of the learning rate's ramp after a change of the attention span")
    warmup_steps: int = setting(3,
        "steps without and steps with loops that are run and undone before the clock starts")
    warmdown_frac: float = setting(0.85,
        "share of the training budget in which the learning rate falls linearly")
    min_lr: float = setting(0.1,
        "floor of the learning-rate multiplier")
    train_log_every: int = setting(100,
        "training steps between log lines", "(0, inf)")

    # Optimizers
    matrix_lr: float = setting(0.026,
        "learning rate of Muon, which trains the matrices")
    scalar_lr: float = setting(0.02,
        "Adam learning rate of vectors, gates and scalars")
    tied_embed_lr: float = setting(0.03,
        "Adam learning rate of the embedding")
    muon_momentum: float = setting(0.97,
        "momentum of Muon after its warm-up", "[0, 1)")
    muon_momentum_warmup_start: float = setting(0.92,
        "momentum of Muon at step 0")
    muon_momentum_warmup_steps: int = setting(1500,
        "steps in which the momentum of Muon grows linearly")
    muon_coefficients: str = setting("polar_express",
        "coefficients of Muon's five iterations; newton_schulz: the constant ones of the first Muon",
        "polar_express, newton_schulz")
    muon_wd: float = setting(0.095,
        "decoupled weight decay of the matrices")
    adam_wd: float = setting(0.02,
        "decoupled weight decay of vectors, gates and scalars")
    embed_wd: float = setting(0.085,
        "decoupled weight decay of the embedding")
    beta1: float = setting(0.9,
        "decay of Adam's first moment", "[0, 1)")
    beta2: float = setting(0.99,
        "decay of Adam's second moment", "[0, 1)")
    adam_eps: float = setting(1e-8,
        "epsilon in Adam's denominator", "(0, inf)")
    grad_clip_norm: float = setting(0.3,
        "norm to which the gradient, summed over the ranks, is clipped; 0: not clipped")
    ema_decay: float = setting(0.9965,
        "decay of the weights' debiased moving average, the result of training; 0: the last weights", "[0, 1)")

    # Training on the validation set, which FAILS condition C3
    prequant_ttt_enabled: bool = setting(False,
        "before quantisation AdamW on the validation set (#1735), in steps of GLOBAL_TTT_CHUNK_TOKENS; no val_bpb")
    prequant_ttt_epochs: int = setting(21,
        "passes of PREQUANT_TTT_ENABLED over the validation set")
    prequant_ttt_lr: float = setting(5e-4,
        "learning rate of the first PREQUANT_TTT pass; a cosine leads to a tenth of it in the last")
    prequant_ttt_freeze_blocks: int = setting(2,
        "first layers that PREQUANT_TTT_ENABLED leaves as they are, like the embedding")

    # Quantizer and artifact
    rate_distortion: bool = setting(True,
        "choose every quantiser step by what it costs in loss, so that ARTIFACT_CAP is just met (off: *_CLIP_SIGMAS)")
    rate_rows: float = setting(0.75,
        "power to which the step sizes of a matrix's rows follow their gradients; 0: all alike", "[0, 4]")
    rate_embed_rows: float = setting(0.5,
        "power to which the step sizes of embedding rows follow their gradients; calibration sees most rows seldom",
        "[0, 4]")
    rate_columns: float = setting(1.0,
        "power to which the step sizes of columns follow the Hessian's Cholesky diagonal; 0: all alike", "[0, 4]")
    matrix_bits: int = setting(6,
        "without RATE_DISTORTION: symbol range of matrices, +-(2^(bits-1) - 1)", "[2, 8]")
    embed_bits: int = setting(7,
        "symbol range of the embedding, +-(2^(bits-1) - 1)", "[2, 8]")
    mlp_clip_sigmas: float = setting(11.5,
        "without RATE_DISTORTION: range of symbols of MLP rows, in standard deviations of the row")
    attn_clip_sigmas: float = setting(13.0,
        "without RATE_DISTORTION: range of symbols of attention rows, in standard deviations of the row")
    embed_clip_sigmas: float = setting(14.0,
        "without RATE_DISTORTION: range of symbols of embedding rows, in standard deviations of the row")
    gptq_calibration_batches: int = setting(16,
        "micro-batches of training data whose activations and gradients weigh the rounding error", "(0, inf)")
    gptq_damping: float = setting(0.01,
        "what is added to the Hessian's diagonal, as a share of the diagonal's mean")
    awq_lite_enabled: bool = setting(False,
        "without RATE_DISTORTION: finer steps for the most salient groups of columns")
    awq_lite_bits: int = setting(8,
        "symbol range of a salient group of columns", "[2, 8]")
    awq_lite_group_size: int = setting(64,
        "columns of a salient group", "(0, inf)")
    awq_lite_group_top_k: int = setting(1,
        "salient groups of columns in all matrices together")
    lqer_enabled: bool = setting(False,
        "correct the rounding error of some matrices by a low-rank product")
    lqer_rank: int = setting(4,
        "rank of the product that corrects rounding error", "(0, inf)")
    lqer_top_k: int = setting(3,
        "matrices whose rounding error is corrected: those of largest error")
    lqer_asym_group: int = setting(64,
        "values of the correction's int4 factor that share a scale", "(0, inf)")
    lqer_gain_select: bool = setting(False,
        "of four times as many matrices, correct those where a byte removes most error")
    lqer_weight: str = setting("none",
        "moments of the inputs that weigh the corrected error: none, their diagonal, or all of the hessian",
        "none, diagonal, hessian")
    gated_attn_quant_gate: bool = setting(False,
        "store the attention gate in int8 rows instead of fp16")
    logit_calibration_enabled: bool = setting(False,
        "fit a logit scale and biases of 14 token categories on training tokens after quantisation")
    artifact_cap: int = setting(16_000_000,
        "most bytes of train_gpt.py and model.bin together", "(0, inf)")
    artifact_margin: int = setting(2_000,
        "bytes below ARTIFACT_CAP that the artifact may not enter")

    # Scoring
    eval_seq_len: int = setting(2048,
        "longest context of a target scored without test-time training; windows never cross a document's start",
        "(0, inf)")
    eval_stride: int = setting(0,
        "new targets of each window after a document's first; 0: EVAL_SEQ_LEN, windows do not overlap")
    val_batch_tokens: int = setting(131072,
        "tokens of one scoring forward on one rank")

    # Test-time training
    ttt_enabled: bool = setting(True,
        "adapt to each document while scoring it: score a chunk, then learn from it")
    ttt_method: str = setting("lora",
        "lora: each document trains adapters; "
        "sgd: base weights learn from each GLOBAL_TTT_CHUNK_TOKENS after they are scored (#549)", "lora, sgd")
    segment_docs: int = setting(50000,
        "most documents of a segment; state crosses documents only between segments, "
        "and a segment waits for its longest document", "(0, inf)")
    ttt_batch_size: int = setting(64,
        "documents adapted together, of similar length; no score depends on it", "(0, inf)")
    ttt_chunks: str = setting("8,8,16,32",
        "sizes of the chunks from a document's start; the last repeats")
    ttt_eval_seq_len: int = setting(3072,
        "longest context of a target scored with test-time training", "(0, inf)")
    ttt_backprop_tokens: int = setting(64,
        "tokens before a chunk that run again with it, so that gradients reach back; "
        "TTT_EVAL_SEQ_LEN: the exact recompute of #1855")
    ttt_mask: str = setting("",
        "adapter kinds switched off, of q,k,v,o,mlp,head; no_qv is q,v")
    ttt_lora_rank: int = setting(32,
        "rank of the adapters", "(0, inf)")
    ttt_lora_alpha: float = setting(144.0,
        "factor of the adapters' product, over TTT_LORA_RANK")
    ttt_lora_lr: float = setting(1e-4,
        "Adam learning rate of the adapters")
    ttt_local_lr_mult: float = setting(1.5,
        "factor of TTT_LORA_LR")
    ttt_beta2: float = setting(0.99,
        "decay of the second moment of the adapters' Adam, which has no first moment", "[0, 1)")
    ttt_weight_decay: float = setting(0.5,
        "decoupled weight decay of the adapters")
    ttt_warm_start: float = setting(1.0,
        "share by which the adapters' start moves, after a segment, to the mean of its documents' adapters; 0: never")
    ttt_grad_steps: int = setting(1,
        "steps on each chunk after it is scored; 0: carried context only")
    phased_ttt_num_phases: int = setting(8,
        "times the base weights learn from the scored documents of the prefix; 0: never")
    phased_ttt_prefix_docs: int = setting(2500,
        "first documents of the stream, the prefix from which the base weights learn")
    global_ttt_lr: float = setting(0.05,
        "SGD learning rate of the base weights, cosine to zero over a phase (TTT_METHOD=sgd: over the stream)")
    global_ttt_momentum: float = setting(0.9,
        "momentum of the base weights' SGD; it begins at zero in each phase", "[0, 1)")
    global_ttt_epochs: int = setting(1,
        "passes of the base weights' SGD over the prefix in each phase (TTT_METHOD=sgd: over each chunk)")
    global_ttt_chunk_tokens: int = setting(32768,
        "tokens of one SGD step over all ranks (TTT_METHOD=sgd: about; a chunk ends with a document)", "(0, inf)")
    global_ttt_grad_clip: float = setting(1.0,
        "norm to which the gradient of the base weights' SGD, summed over the ranks, is clipped")

    # N-grams
    ngram_enabled: bool = setting(False,
        "let exact counts of earlier segments and of the document so far improve the scored probabilities")
    ngram_mode: str = setting("tilt",
        "tilt: raise the hinted token's probability; mix: mix in the counts, the network as the lowest order",
        "tilt, mix")
    ngram_order: int = setting(16,
        "longest n-gram, its last token included (TOKEN_ORDER of #2140)", "[2, 64]")
    ngram_min_order: int = setting(3,
        "shortest n-gram, its last token included (#2140: 16)", "[2, 64]")
    ngram_threshold: float = setting(0.5,
        "least share of a context's commonest continuation that gives a hint (TOKEN_THRESHOLD of #2140: 0.8)", "[0, 1]")
    ngram_min_count: int = setting(2,
        "least number of times a context was seen before it gives a hint (#2140: 1)", "[1, inf)")
    ngram_boost: float = setting(1.0,
        "log-odds added to the hinted token (TOKEN_BOOST of #2140: 2.625)", "[0, 12]")
    ngram_calibrate: bool = setting(True,
        "learn the boost of each order, count and share from scored segments (#2140: 0)")
    ngram_weight: float = setting(0.2,
        "weight of each order in the mixture", "[0, 1)")

    # Set by torchrun
    rank: int = setting(0,
        "number of this process among all processes")
    local_rank: int = setting(0,
        "number of this process's GPU on its node")
    world_size: int = setting(1,
        "processes of the run", "(0, inf)")
    # fmt: on

    @classmethod
    def from_env(cls, env, stored: dict | None = None, check: bool = True) -> "Config":
        """Each setting from the mapping `env`, else from `stored` (an artifact's settings), else its default.

        Raises UserError for a bad value or, with `check`, for values that do not go together."""
        fields = {f.name.upper(): f for f in dataclasses.fields(cls)}
        check_names(env, fields)
        given = {f.name: parse_setting(name, env[name], type(f.default)) for name, f in fields.items() if name in env}
        cfg = cls(**{**(stored or {}), **given})
        if check:
            cfg.validate()
        return cfg

    def validate(self):
        """Refuse settings that could not work, before anything is read or trained."""
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            within = f.metadata["within"]
            kind = "one of" if isinstance(value, str) else "in"
            require(lies_within(value, within), f"{f.name.upper()}={value} must be {kind} {within}")
        for name, holds, rule in self.rules():
            require(holds, f"{name.upper()}={getattr(self, name)} {rule}")
        context_schedule(self)

    def rules(self) -> tuple:
        """What several settings owe each other: (setting to blame, whether the rule holds, the rule)."""
        head_dim = self.model_dim // self.num_heads
        loops_fit = self.loop_start <= self.loop_end < self.num_layers
        two_gates = self.attn_out_gate_enabled and self.sparse_attn_gate_enabled
        size = r"[1-9]\d{0,8}"
        chunk_list = re.fullmatch(f"{size}(,{size})*", self.ttt_chunks)
        chunks_fit = chunk_list and max(map(int, self.ttt_chunks.split(","))) <= self.ttt_eval_seq_len
        kinds = set(ADAPTER_KINDS)
        masked = set(self.ttt_mask.replace("no_qv", "q,v").split(",")) - {""}
        some_learn = masked != kinds or self.ttt_grad_steps == 0
        return (
            ("num_heads", self.model_dim % self.num_heads == 0, "must divide MODEL_DIM"),
            ("num_kv_heads", self.num_heads % self.num_kv_heads == 0, "must divide NUM_HEADS"),
            ("rope_dims", self.rope_dims in range(0, head_dim + 1, 2), "must be even and at most the head width"),
            ("loop_end", self.num_loops == 0 or loops_fit, "must satisfy LOOP_START <= LOOP_END < NUM_LAYERS"),
            ("gate_window", self.gate_window <= self.model_dim, "must be at most MODEL_DIM"),
            ("attn_out_gate_enabled", not two_gates, "needs SPARSE_ATTN_GATE_ENABLED=0: heads have one gate"),
            ("mlp_mult", int(self.mlp_mult * self.model_dim) >= 8, "gives an MLP of fewer than 8 units"),
            ("attn_full_layers", re.fullmatch(r"(\d+(,\d+)*)?", self.attn_full_layers), "must be layers like 2,5,10"),
            (
                "gptq_reserve_seconds",
                self.max_wallclock_seconds == 0 or self.gptq_reserve_seconds < self.max_wallclock_seconds,
                "must be below MAX_WALLCLOCK_SECONDS",
            ),
            ("artifact_margin", self.artifact_margin < self.artifact_cap, "must be below ARTIFACT_CAP"),
            ("eval_stride", self.eval_stride <= self.eval_seq_len, "must be at most EVAL_SEQ_LEN"),
            ("val_batch_tokens", self.val_batch_tokens >= self.eval_seq_len, "must be at least EVAL_SEQ_LEN"),
            ("ttt_chunks", chunks_fit, "must be sizes like 8,8,16,32,64, none above TTT_EVAL_SEQ_LEN"),
            ("ttt_mask", masked <= kinds, f"may name no_qv and {','.join(ADAPTER_KINDS)}"),
            ("ttt_mask", some_learn, "leaves no adapter to learn; set TTT_GRAD_STEPS=0"),
            ("ngram_min_order", self.ngram_min_order <= self.ngram_order, "must be at most NGRAM_ORDER"),
        )

    @property
    def looped(self) -> bool:
        """Whether the model runs its loops after training: calibration, scoring and adaptation do as training ended."""
        return self.num_loops > 0 and self.enable_looping_at < 1

    def settings(self) -> dict:
        """What decides the result: every setting but paths, modes and ranks."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in NOT_SETTINGS}

    def sha256(self) -> str:
        return hashlib.sha256(json.dumps(self.settings(), sort_keys=True).encode()).hexdigest()


# A variable of the environment that begins like one of our settings must be one. First words that other programs use,
# as in LOCAL_WORLD_SIZE, MAX_JOBS or PARALLEL_SEQ, do not count.
SHARED_WORDS = set(
    "ADAM ATTENTION CHECK DATA DEVICE ENABLE GLOBAL GRAD ITERATIONS LOCAL MAX MIN MODEL NUM PARALLEL QUANTIZE RANK "
    "SCALAR SEED SEGMENT SEQ SKIP TOKENIZER VOCAB WARMUP WORLD".split()
)
FIRST_WORDS = {f.name.upper().split("_")[0] for f in dataclasses.fields(Config)}
OUR_PREFIXES = tuple(f"{word}_" for word in sorted(FIRST_WORDS - SHARED_WORDS))


def check_names(env, fields):
    """Refuse a name that begins like a setting and is none; warn of a near miss without one of our prefixes."""
    for name in sorted(set(env) - set(fields)):
        fixed = RETIRED.get(name.lower())
        require(fixed is None, f"{name} is no longer a setting: its value is always {fixed}")
        ours = name.startswith(OUR_PREFIXES)
        nearest = difflib.get_close_matches(name, fields, n=1, cutoff=0.5 if ours else 0.8)
        question = f"; did you mean {nearest[0]}?" if nearest else ""
        require(not ours, f"{name} is not a setting{question} (--help lists them all)")
        if nearest and nearest[0] not in env and len(name) > 4:
            print(f"warning: the environment has {name}, which is not a setting{question}", file=sys.stderr)


def parse_setting(name: str, text: str, kind: type):
    """Text of an environment variable -> bool, int, float or str."""
    if kind is bool:
        word = text.strip().lower()
        require(word in ("1", "true", "yes", "0", "false", "no", ""), f"{name}={text!r} is not 0 or 1")
        return word in ("1", "true", "yes")
    with explained(f"{name}={text!r} is not of type {kind.__name__}", ValueError):
        value = kind(text)
    require(kind is not float or math.isfinite(value), f"{name}={text!r} is not finite")
    return value


class Stage(NamedTuple):
    """A part of training with one attention span."""

    end: float  # progress at which the next stage begins
    span: int  # tokens


def context_schedule(cfg: Config) -> list[Stage]:
    """The stages of TRAIN_SEQ_SCHEDULE in order; the last one ends at infinity (#2014).

    "1024@0.1,2048@1.0" -> [Stage(0.1, 1024), Stage(inf, 2048)]"""
    if not cfg.train_seq_schedule:
        return [Stage(math.inf, cfg.train_seq_len)]
    name = f"TRAIN_SEQ_SCHEDULE={cfg.train_seq_schedule!r}"
    with explained(f"{name} is not of the form 1024@0.1,2048@0.7,3072@1.0", ValueError):
        parts = [part.split("@") for part in cfg.train_seq_schedule.split(",")]
        stages = sorted(Stage(float(end), int(span)) for span, end in parts)
    require(all(span > 0 and end > 0 for end, span in stages), f"{name}: lengths and ends must be positive")
    require(
        max(stage.span for stage in stages) == cfg.train_seq_len,
        f"{name}: the longest span must equal TRAIN_SEQ_LEN={cfg.train_seq_len}",
    )
    return [*stages[:-1], stages[-1]._replace(end=math.inf)]


def help_text() -> str:
    """The table of --help."""
    lines = [
        "Settings are environment variables. Of each: name, default, meaning; limits (a number's are else [0, inf))"
    ]
    for f in dataclasses.fields(Config):
        if f.name in GROUPS:
            lines.append(f"\n{GROUPS[f.name]}")
        default = int(f.default) if isinstance(f.default, bool) else f.default
        within = f.metadata["within"]
        limits = "" if within in ("", "[0, inf)") else f"; {within}"
        lines.append(f"  {f.name.upper():28s} {str(default) or '(empty)':>13s}   {f.metadata['meaning']}{limits}")
    return "\n".join(lines)


# ======== Runtime: ranks, log, clock, budgets, verdicts, ledger =======================================================


class Ranks:
    """The process group. On one rank every collective is a no-op, so nothing else asks how many there are."""

    def __init__(self, cfg: Config):
        self.rank = cfg.rank
        self.world = cfg.world_size
        self.main = cfg.rank == 0
        gpu = torch.cuda.is_available()
        use_cuda = cfg.device == "cuda" or (cfg.device == "auto" and gpu)
        require(
            gpu or not use_cuda,
            "DEVICE=cuda, but torch sees no GPU; set DEVICE=cpu or install a CUDA build of torch",
        )
        self.device = torch.device("cuda", cfg.local_rank) if use_cuda else torch.device("cpu")
        if use_cuda:
            torch.cuda.set_device(self.device)
        if self.world > 1:
            # torch.optim imports this module, whose defaults hold on to the group that exists by then: imported later,
            # gloo's threads would outlive close() and abort some exits.
            importlib.import_module("torch.distributed.nn.functional")
            # Tensors on the CPU travel over gloo, so sharing the clock does not wait for the GPU's queue.
            dist.init_process_group("cpu:gloo,cuda:nccl" if use_cuda else "gloo")

    def all_reduce_(self, t: Tensor) -> Tensor:
        """`t` becomes its sum over the ranks."""
        if self.world > 1:
            dist.all_reduce(t)
        return t

    def all_reduce_flat(self, tensors: list[Tensor]) -> list[Tensor]:
        """The sums over the ranks of all `tensors`, through one buffer."""
        if self.world == 1:
            return tensors
        flat = self.all_reduce_(torch.cat([t.flatten() for t in tensors]))
        pieces = flat.split([t.numel() for t in tensors])
        return [piece.view_as(t) for piece, t in zip(pieces, tensors)]

    def broadcast_(self, t: Tensor, source: int = 0) -> Tensor:
        """`t` becomes that of rank `source`."""
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
    """Lines to the console and, once `open` has been called, to a file; from rank 0 only.

    Every line is flushed, so a killed run leaves its log."""

    def __init__(self, ranks: Ranks):
        self.main = ranks.main
        self.file = io.StringIO()  # until there is a file

    def open(self, path: Path, mode: str):
        """Only now is an earlier log replaced: a run that fails its checks leaves it alone."""
        if self.main:
            early = self.file.getvalue()
            self.file = open(path, mode, encoding="utf-8")
            self.file.write(early)

    def __call__(self, line: str = "", console: bool = True):
        if self.main:
            line = line.replace(str(Path.home()) + os.sep, "~/")  # logs are published: no private paths
            self.file.write(line + "\n")
            self.file.flush()
            if console:
                print(line, flush=True)


class Clock:
    """Seconds of training, the same on every rank: rank 0's reading, sent over the CPU group.

    Reading it does not drain the GPU's queue. Up to LEAD steps are still queued there; their expected duration is
    added, so `tick` predicts when the next step starts."""

    LEAD = 2

    def __init__(self, ranks: Ranks):
        self.ranks = ranks
        self.steps = 0  # steps launched
        self.pending = collections.deque()  # an event for each step that may not have ended
        ranks.synchronize()
        ranks.agree(0)  # all ranks start together
        self.start = time.perf_counter()

    def seconds(self) -> float:
        """This rank's seconds since construction."""
        return time.perf_counter() - self.start

    def tick(self) -> float:
        """Call before each step; returns its predicted start in seconds since construction."""
        while len(self.pending) > self.LEAD:  # launch no further ahead: a prediction of few steps errs little
            self.pending.popleft().synchronize()
        while self.pending and self.pending[0].query():  # the step has ended
            self.pending.popleft()
        now = self.seconds()
        queued = len(self.pending)
        done = self.steps - queued
        return self.ranks.agree(now + queued * (now / done if done else 0.0))

    def step_done(self):
        """Call after each step has been launched."""
        self.steps += 1
        if self.ranks.device.type == "cuda":
            event = torch.cuda.Event()
            event.record()
            self.pending.append(event)

    def stop(self) -> float:
        """Wait for the GPU and return the seconds since construction."""
        self.ranks.synchronize()
        return self.ranks.agree(self.seconds())


class Phases:
    """Wall seconds by phase, and the two budgets they add up to."""

    BUDGET = {
        # training data changes the model
        "steps": "train",
        "calibrate": "train",
        "quantize": "train",
        # validation data is read
        "load": "eval",
        "prepare": "eval",
        "score": "eval",
        "adapt": "eval",
        "read": "eval",
        "prequant": "eval",
        # neither
        "setup": None,
        "warmup": None,
        "diagnostic": None,
        "write": None,
    }

    def __init__(self, ranks: Ranks):
        self.ranks = ranks
        self.seconds = collections.defaultdict(float)  # phase -> wall seconds so far

    @contextlib.contextmanager
    def __call__(self, name: str):
        """Time the block as part of phase `name`."""
        assert name in self.BUDGET, name
        start = time.perf_counter()
        yield
        self.ranks.synchronize()  # what the block launched belongs to it
        self.seconds[name] += time.perf_counter() - start

    def charge(self, name: str, to: str, seconds: float):
        """Move seconds that were timed as phase `name` to phase `to`."""
        self.seconds[name] -= seconds
        self.seconds[to] += seconds

    def budget(self, which: str) -> float:
        """Seconds of all phases that count towards the budget "train" or "eval"."""
        return sum(s for name, s in self.seconds.items() if self.BUDGET[name] == which)


class Verdicts:
    """PASS, FAIL, DISPUTED or NOT RUN for each condition, with the reason. What only an audit can show is NOT RUN."""

    CONDITIONS = ("C1", "C2", "C3", "C4", "bytes", "train_budget", "eval_budget", "packaging", "data")

    def __init__(self):
        self.table = dict.fromkeys(self.CONDITIONS, ("NOT RUN", "shown by tools/audit.py"))

    def set(self, condition: str, verdict: str, reason: str):
        """A condition that has failed stays failed."""
        if self.table[condition][0] != "FAIL":
            self.table[condition] = (verdict, reason)

    def judge(self, condition: str, holds: bool, reason: str):
        self.set(condition, "PASS" if holds else "FAIL", reason)

    def failed(self) -> list[str]:
        return [condition for condition, (verdict, _) in self.table.items() if verdict == "FAIL"]


class Ledger:
    """Write-once record of one scoring pass: `nats` of every validation target in stream order, NaN until scored.

    Scoring a target twice, training on one that is not scored, or closing with a hole raises RuntimeError: a run whose
    ledger does not hold is not a result."""

    ROUNDING = 1e-4  # a certain token may come out this far below zero nats: fp32 logits of up to 30

    def __init__(self, name: str, target_bytes: np.ndarray, verdicts: Verdicts):
        self.name = name
        self.bytes = target_bytes  # uint16 (targets,)
        self.verdicts = verdicts
        self.nats = np.full(len(target_bytes), np.nan)  # float64 (targets,)
        self.merged = np.zeros(len(target_bytes), bool)  # scored by any rank before the last merge

    @property
    def scored(self) -> np.ndarray:
        """bool (targets,): scored by this rank, or by any before the last merge."""
        return ~np.isnan(self.nats)

    def write(self, targets: np.ndarray, nats: np.ndarray):
        """Record the scores of `targets`, int64 indices; `nats` is float, of the same length."""
        unscored = np.isnan(self.nats[targets]).all()
        distinct = len(np.unique(targets)) == len(targets)
        self.check(unscored and distinct, "a target was scored twice")
        possible = np.isfinite(nats).all() and (nats >= -self.ROUNDING).all()
        self.check(possible, "a score is not finite or implies a probability above 1")
        self.nats[targets] = np.maximum(nats, 0.0)

    def merge(self, ranks: Ranks):
        """Join what the ranks have scored since the last merge; one rank alone must have scored each target."""
        new = self.scored & ~self.merged
        if ranks.world > 1:
            # Only what is new travels, so that a sum over the ranks adds one score and zeros.
            writers = ranks.all_reduce_(torch.from_numpy(new.astype(np.int32))).numpy()
            nats = ranks.all_reduce_(torch.from_numpy(np.where(new, self.nats, 0.0))).numpy()
            once = writers.max() <= 1 and not writers[self.merged].any()
            self.check(once, "two ranks scored the same target")
            self.nats = np.where(writers > 0, nats, self.nats)
        self.merged = self.scored

    def may_train(self, targets: np.ndarray):
        """Call before learning from `targets`: all of them must be scored (C3)."""
        if np.isnan(self.nats[targets]).any():
            self.break_condition("C3", f"pass {self.name} trained on a target before it was scored")
            self.check(False, "training on a target that is not scored")

    def break_condition(self, condition: str, reason: str):
        """Record that a setting breaks a condition: the run goes on, its number never becomes `val_bpb`."""
        self.verdicts.set(condition, "FAIL", reason)

    def bpb(self) -> float:
        """Bits per byte over all targets; raises if one is missing."""
        self.check(self.scored.all(), f"{np.isnan(self.nats).sum()} targets were never scored")
        return self.partial_bpb(self.scored)

    def partial_bpb(self, which: np.ndarray) -> float:
        """Bits per byte over the targets that the mask `which` (targets,) selects."""
        size = self.bytes[which].sum(dtype=np.int64)  # uint16 would overflow
        return float(self.nats[which].sum() / math.log(2) / max(size, 1))

    def check(self, holds: bool, fault: str):
        if not holds:
            raise RuntimeError(f"ledger {self.name}: {fault}")


class Progress:
    """Says every few seconds how far a scoring pass is."""

    EVERY = 5.0  # seconds

    def __init__(self, ranks: Ranks, log: Log):
        self.ranks = ranks
        self.log = log
        self.begun = time.perf_counter()
        self.shown = self.begun  # time of the last line

    def show(self, ledger: Ledger):
        """Call before each batch. The other ranks are taken to have scored as much as this one since the last merge."""
        now = time.perf_counter()
        if now - self.shown <= self.EVERY:
            return
        self.shown = now
        targets = len(ledger.nats)
        new = ledger.scored & ~ledger.merged
        done = ledger.merged.sum() + self.ranks.world * new.sum()
        left = max(targets - done, 0)
        rate = max(done, 1) / (now - self.begun)
        self.log(
            f"  {100 * (1 - left / targets):5.1f} %  BPB so far {ledger.partial_bpb(ledger.scored):.4f}  "
            f"{rate:,.0f} targets/s  {left / rate:.0f} s left"
        )


@contextlib.contextmanager
def whole_file(path: Path, setting: str = "ARTIFACT_DIR"):
    """Open `path` for writing bytes so that it appears complete, by rename, or not at all.

    `setting` is what an error tells the user to change."""
    part = path.with_name(f"{path.name}.part{os.getpid()}")  # on the same disk, for the rename
    with explained(f"{path}: cannot be written ({{}}); free space there or set {setting} to another place", OSError):
        try:
            with open(part, "wb") as f:
                yield f
                f.flush()
                os.fsync(f.fileno())  # a rename may reach the disk before the data
            os.replace(part, path)
        finally:
            with contextlib.suppress(OSError):  # after the rename there is none
                part.unlink()


# ======== Data: shards, packed training batches, the validation stream ================================================

SHARD_MAGIC = 20240520
SHARD_HEADER_BYTES = 1024
# Contest sets by their tokens: the bytes that the published exports count.
CONTEST_SETS = {
    47_853_344: (151_080_645, 151_074_309),  # CaseOps
    40_540_160: (151_078_222,),  # plain SentencePiece
}


def open_shard(path: Path) -> np.ndarray:
    """Memory-map the uint16 values of a shard; before them stand 256 little-endian int32: magic, 1, count, 0, ..."""
    header = np.fromfile(path, dtype="<i4", count=256)
    genuine = len(header) == 256 and tuple(header[:2]) == (SHARD_MAGIC, 1)
    require(genuine, f"{path}: not a shard (wrong magic or version); make it again with prepare_data.py")
    count = int(header[2])
    size = path.stat().st_size
    expected = SHARD_HEADER_BYTES + 2 * count
    require(
        size == expected,
        f"{path}: {size} bytes, its header promises {expected}; the file is truncated or damaged: "
        "fetch or make it again",
    )
    return np.memmap(path, dtype="<u2", mode="r", offset=SHARD_HEADER_BYTES, shape=(count,))


def find_shards(folder: Path, pattern: str, required: bool = True) -> list[Path]:
    """Files of `pattern` (its * is digits) in name order; UserError where there are none and one is required."""
    digits = re.compile(pattern.replace("*", r"\d+"))  # fineweb_val_*.bin must not match fineweb_val_bytes_0.bin
    paths = sorted(path for path in folder.glob(pattern) if digits.fullmatch(path.name) and path.is_file())
    require(paths or not required, f"DATA_PATH={folder}: no file {pattern} there; run prepare_data.py or set DATA_PATH")
    return paths


def check_start(path: Path, tokens: np.ndarray, cfg: Config):
    """The first token of a stream begins a document."""
    require(
        list(tokens[:1]) == [cfg.bos_id],
        f"{path}: the first token is {tokens[:1]}, not BOS_ID={cfg.bos_id}; prepare the data again",
    )


def check_tokens(path: Path, tokens: np.ndarray, cfg: Config):
    """Every token is in the vocabulary."""
    highest = tokens.max(initial=0)
    require(
        highest < cfg.vocab_size,
        f"{path}: token {highest} is outside VOCAB_SIZE={cfg.vocab_size}; "
        "set VOCAB_SIZE or use shards of the right tokenizer",
    )


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


class TrainStream:
    """The training tokens as one endless stream over all shards in name order: step s reads the same at any world size.

    The methods stand in the order in which a step calls them."""

    def __init__(self, cfg: Config):
        self.cfg = cfg
        self.paths = find_shards(Path(cfg.data_path), "fineweb_train_*.bin")
        self.shards = [open_shard(path) for path in self.paths]
        self.ends = np.cumsum([len(shard) for shard in self.shards])  # of each shard, in the stream
        self.tokens = int(self.ends[-1])
        require(
            self.tokens > cfg.micro_batch_tokens,
            f"DATA_PATH={cfg.data_path}: {self.tokens} training tokens are fewer than one micro-batch; "
            "lower MICRO_BATCH_TOKENS or prepare more documents",
        )
        check_start(self.paths[0], self.shards[0], cfg)
        for path, shard in zip(self.paths, self.shards):
            check_tokens(path, shard[: 1 << 20], cfg)  # `read` checks the rest when its turn comes

    def step(self, step: int, span: int, rank: int, world: int) -> list[Batch]:
        """This rank's micro-batches of a step: the global batch cut every MICRO_BATCH_TOKENS, dealt in turn."""
        total = self.cfg.train_batch_tokens
        micro = self.cfg.micro_batch_tokens
        cuts = range(rank * micro, total, world * micro)
        return [self.micro_batch(step * total + cut, min(micro, total - cut), span) for cut in cuts]

    def micro_batch(self, start: int, count: int, span: int) -> Batch:
        """Inputs [start, start + count) and their targets; a document already running at `start` begins anew there."""
        tokens = self.read(start, count + 1)
        starts = np.flatnonzero(tokens[:-1] == self.cfg.bos_id)
        if not len(starts) or starts[0] != 0:
            starts = np.insert(starts, 0, 0)  # the rest of a document whose beginning another batch has
        return pack(tokens, starts, span, self.cfg.train_seq_len, "train", self.cfg.micro_batch_tokens)

    def read(self, start: int, count: int) -> np.ndarray:
        """`count` tokens from position `start` of the endless stream, int64."""
        pieces = []
        while count:
            start %= self.tokens  # another epoch
            i = int(np.searchsorted(self.ends, start, side="right"))  # the shard that holds `start`
            offset = start - (int(self.ends[i]) - len(self.shards[i]))
            piece = self.shards[i][offset : offset + count].astype(np.int64)
            check_tokens(self.paths[i], piece, self.cfg)
            pieces.append(piece)
            start += len(piece)
            count -= len(piece)
        return np.concatenate(pieces)


class Prefetch:
    """Builds the next step's batches in a thread. A change of span only wastes what was built for the earlier span."""

    def __init__(self, stream: TrainStream, ranks: Ranks):
        self.stream = stream
        self.ranks = ranks
        self.pool = ThreadPoolExecutor(1)
        self.waiting = {}  # (step, span) -> future of its batches

    def submit(self, step: int, span: int):
        return self.pool.submit(self.stream.step, step, span, self.ranks.rank, self.ranks.world)

    def __call__(self, step: int, span: int) -> list[Batch]:
        future = self.waiting.pop((step, span), None) or self.submit(step, span)
        self.waiting = {(step + 1, span): self.submit(step + 1, span)}  # the guess: no change of span
        return [to_device(batch, self.ranks.device) for batch in future.result()]


class ValidationStream:
    """The validation tokens, the original bytes of each, and the documents they form."""

    def __init__(self, cfg: Config):
        folder = Path(cfg.data_path)
        self.tokens = np.concatenate([open_shard(path) for path in find_shards(folder, "fineweb_val_*.bin")])
        check_start(folder / "fineweb_val_*.bin", self.tokens, cfg)
        check_tokens(folder / "fineweb_val_*.bin", self.tokens, cfg)
        self.targets = len(self.tokens) - 1  # target i is token i + 1
        self.starts = np.flatnonzero(self.tokens == cfg.bos_id)
        # Inputs of each document. The target of its last input is the next document's BOS.
        self.lengths = np.diff(np.append(self.starts, self.targets))
        sidecars = find_shards(folder, "fineweb_val_bytes_*.bin", required=False)
        if sidecars:
            self.byte_source = "sidecar"
            self.bytes = np.concatenate([open_shard(path) for path in sidecars])
            require(
                len(self.bytes) == len(self.tokens),
                f"{folder}: the byte sidecar has {len(self.bytes)} entries for {len(self.tokens)} tokens; "
                "prepare both in one go",
            )
            require(self.bytes.any(), f"{sidecars[0]}: the byte sidecar holds only zeros; prepare the data again")
        else:
            self.byte_source = "tokenizer"
            self.bytes = tokenizer_bytes(cfg, self.tokens)
        require(
            not self.bytes[self.starts].any(),
            f"{folder}: the byte {self.byte_source} counts bytes for BOS; prepare the data again",
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


def open_tokenizer(cfg: Config):
    """The SentencePieceProcessor at `tokenizer_path`; UserError if it cannot be the one of shards without a sidecar."""
    import sentencepiece

    path = tokenizer_path(cfg)
    with explained(f"TOKENIZER_PATH={path}: not a SentencePiece model, or a damaged one", RuntimeError, OSError):
        sp = sentencepiece.SentencePieceProcessor(model_file=str(path))
    pieces = sp.vocab_size()
    require(pieces == cfg.vocab_size, f"TOKENIZER_PATH={path}: {pieces} pieces, VOCAB_SIZE={cfg.vocab_size}")
    case_marks = "\ue001\ue002\ue003\ue004"  # pieces of a CaseOps tokenizer, which stand for no bytes
    require(
        not any(sp.id_to_piece(i) in case_marks for i in range(8)),
        f"DATA_PATH={cfg.data_path}: a CaseOps tokenizer needs the byte sidecar fineweb_val_bytes_*.bin; "
        "prepare the data again",
    )
    return sp


def tokenizer_bytes(cfg: Config, tokens: np.ndarray) -> np.ndarray:
    """Bytes of each token from the pieces of a plain tokenizer, uint16: for data without a sidecar.

    A control token has 0 bytes, a byte-fallback token 1, and \\u2581 is a space. Many tokenizers put a space of their
    own before a document: it does not count, since the text does not have it."""
    sp = open_tokenizer(cfg)
    ids = range(cfg.vocab_size)
    special = np.array([sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i) for i in ids])
    texts = ["" if special[i] else sp.id_to_piece(i).replace("\u2581", " ") for i in ids]
    sizes = np.array([1 if sp.is_byte(i) else len(texts[i].encode()) for i in ids], np.uint16)
    counts = sizes[tokens]  # (tokens,)
    if sp.encode("a", out_type=str)[0].startswith("\u2581"):  # the tokenizer has add_dummy_prefix
        spaced = np.array([text.startswith(" ") for text in texts])
        opens = np.concatenate([[True], special[tokens[:-1]]])  # the first token after BOS
        counts -= opens & spaced[tokens]
    return counts


def sha256(data) -> str:
    return hashlib.sha256(data).hexdigest()


def fingerprint(cfg: Config, val: ValidationStream) -> dict:
    """What identifies the data, for the log and result.json; first it must be what its manifest says."""
    size = int(val.bytes.sum(dtype=np.int64))
    # The contest's validation set has the first 50,000 documents of FineWeb.
    contest = size in CONTEST_SETS.get(len(val.tokens), ()) and len(val.starts) == 50_000
    manifest = Path(cfg.data_path) / "manifest.json"
    facts = {
        "val_tokens": len(val.tokens),
        "val_targets": val.targets,
        "val_documents": len(val.starts),
        "val_bytes": size,
        "byte_source": val.byte_source,
        "val_sha256": sha256(np.ascontiguousarray(val.tokens)),  # however the tokens are cut into shards
        "dataset": "contest" if contest else "other",
        "manifest": manifest.is_file(),
    }
    return facts | check_manifest(cfg, manifest, facts) if facts["manifest"] else facts


def check_manifest(cfg: Config, manifest: Path, facts: dict) -> dict:
    """Raise UserError unless the data is as its manifest says; return the manifest's transform and tokenizer hash.

    Checked are counts, vocabulary and BOS; validation files and tokenizer by hash, training shards by their length."""
    damaged = f"{manifest}: damaged, or not written by prepare_data.py; prepare the data again"
    with explained(damaged, ValueError, KeyError, TypeError):
        promised = json.loads(manifest.read_text())
        for key in ("tokens", "documents", "bytes"):
            count = facts[f"val_{key}"]
            wanted = promised["val"][key]
            require(
                wanted in (None, count),
                f"{manifest}: promises {wanted} validation {key}, the shards hold {count}; prepare the data again",
            )
        for name, file in promised["files"].items():
            check_promised_file(manifest.parent / name, file)
        for key in ("vocab_size", "bos_id"):
            ours = getattr(cfg, key)
            require(
                promised[key] == ours,
                f"{manifest}: the shards have {key.upper()}={promised[key]}, the setting is {ours}",
            )
        made_by = promised["tokenizer"]["sha256"]
        model = tokenizer_path(cfg)
        require(
            sha256(model.read_bytes()) == made_by,
            f"TOKENIZER_PATH={model}: not the tokenizer that made these shards ({manifest})",
        )
        return {"transform": promised["transform"], "tokenizer_sha256": made_by}


def check_promised_file(path: Path, file: dict):
    """A file of the manifest is there and intact. `file` has its "tokens" and "sha256"."""
    require(path.is_file(), f"{path}: promised by manifest.json, not there; prepare the data again")
    if "train" in path.name:  # hashing gigabytes would take minutes
        intact = len(open_shard(path)) == file["tokens"]
    else:
        intact = sha256(path.read_bytes()) == file["sha256"]
    require(intact, f"{path}: not the file that manifest.json describes; fetch or prepare it again")


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
        self.norm_scales = [1 / math.sqrt(layer + 1) for layer in range(layers)]
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

    def nll(self, hidden: Tensor, targets: Tensor, *, lora=None, hint: Tensor | None = None):
        """hidden (T, d), targets (T,) int64 -> nats per token (T,) fp32; with hint (T,) int64 also the log-probability of the hinted token."""
        z, delta = F.linear(hidden, self.tok_emb.to(self.dtype)), lora.at("head", 0) if lora is not None else None
        z = z if delta is None else z + delta(hidden)
        if self.calibration is not None:
            logits = self.calibration[0] * softcap(z, self.caps) + self.calibration[1]
            lse = logits.logsumexp(-1)
            nats = lse - logits.gather(1, targets[:, None])[:, 0]
            return nats if hint is None else (nats, logits.gather(1, hint[:, None])[:, 0] - lse)
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


# ======== Optimizers: Muon for matrices, Adam for the rest, the averaged weights ======================================

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


class Rule(NamedTuple):
    """How one parameter is trained: its matrices by Muon, or its elements by Adam."""

    lr: float
    weight_decay: float
    heights: tuple[int, ...] = ()  # Muon: the rows of each of the matrices that a layer stacks; empty: Adam


def parameter_rules(model: GPT, cfg: Config) -> dict[str, Rule]:
    """The rule of every parameter by name. A parameter that the table does not name gets the rule of the scalars."""
    muon = Rule(cfg.matrix_lr, cfg.muon_wd)
    scalars = Rule(cfg.scalar_lr, cfg.adam_wd)
    table = {
        "qkv": muon._replace(heights=(model.q_dim, model.kv_dim, model.kv_dim)),  # Q, K and V are three matrices
        "o": muon._replace(heights=(model.o.size(1),)),
        "up": muon._replace(heights=(model.up.size(1),)),
        "down": muon._replace(heights=(model.down.size(1),)),
        "tok_emb": Rule(cfg.tied_embed_lr, cfg.embed_wd),
        "caps": scalars._replace(weight_decay=0.0),  # decay would pull them from LOGIT_SOFTCAP to zero
    }
    return {name: table.get(name, scalars) for name, _ in model.named_parameters()}


def orthogonalize(u: Tensor, coefficients: tuple) -> Tensor:
    """Nearest semi-orthogonal matrices of u (n, rows, cols), by one odd quintic iteration for each (a, b, c).

        x <- a x + (b G + c G^2) x    with G = x x^T, the Gram matrix of the shorter side

    Five iterations leave singular values within about 0.1 of 1 (Polar Express) or 0.3 (constant coefficients)."""
    x = u / (u.norm(dim=(1, 2), keepdim=True) + 1e-7)  # all singular values below 1, or the iteration diverges
    wide = u.size(1) <= u.size(2)
    for a, b, c in coefficients:
        gram = x @ x.mT if wide else x.mT @ x
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # b G + c G^2
        factors = (polynomial, x) if wide else (x, polynomial)
        x = torch.baddbmm(x, *factors, beta=a)
    return x


class Block(NamedTuple):
    """Rows low to high of a parameter (layers, rows, cols): one matrix in each layer."""

    parameter: nn.Parameter
    low: int
    high: int


class MuonGroup:
    """All matrices of one shape, from several parameters, in one tensor (matrices, rows, cols) cut over the ranks."""

    def __init__(self, blocks: list[Block], world: int, dtype: torch.dtype):
        first = blocks[0]
        self.blocks = blocks
        self.rows = first.high - first.low
        self.cols = first.parameter.size(2)
        self.count = sum(len(block.parameter) for block in blocks)
        self.shard = -(-self.count // world)  # matrices of one rank; the last ranks' may be padding
        self.padded = self.shard * world
        # This rank's momentum, (shard, rows, cols).
        self.momentum = torch.zeros(self.shard, self.rows, self.cols, dtype=dtype, device=first.parameter.device)
        self.scale = math.sqrt(max(1.0, self.rows / self.cols))  # of the update: tall matrices need larger entries

    def gradient(self) -> Tensor:
        """(padded, rows, cols) in the momentum's dtype."""
        pieces = [p.grad[:, low:high].to(self.momentum.dtype) for p, low, high in self.blocks]
        padding = self.momentum.new_zeros(self.padded - self.count, self.rows, self.cols)
        return torch.cat([*pieces, padding])

    def apply_(self, update: Tensor, lr: float, weight_decay: float):
        """w <- (1 - lr * weight_decay) w - lr * scale * update, with update (padded, rows, cols)."""
        pieces = update[: self.count].split([len(block.parameter) for block in self.blocks])
        for (p, low, high), piece in zip(self.blocks, pieces):
            p[:, low:high].mul_(1 - lr * weight_decay).add_(piece, alpha=-lr * self.scale)


class Optimizer:
    """One step: sum the gradients over the ranks, clip their global norm, update. The ranks share Muon's matrices out.

    Gradients must hold the sum over this rank's tokens of the loss divided by the global number of tokens."""

    def __init__(self, model: GPT, cfg: Config, ranks: Ranks):
        self.cfg = cfg
        self.ranks = ranks
        self.parameters = list(model.parameters())
        self.small = []  # Adam's parameters
        alike = {}  # rule -> those of `small` that share it
        shapes = {}  # shape -> Muon's blocks: q with o, k with v, and up and down where their shapes differ
        for p, rule in zip(self.parameters, parameter_rules(model, cfg).values()):
            if not rule.heights:
                self.small.append(p)
                alike.setdefault(rule, []).append(p)
            low = 0
            for height in rule.heights:
                shapes.setdefault((height, p.size(2)), []).append(Block(p, low, low + height))
                low += height
            assert low == (p.size(1) if rule.heights else 0), "Muon needs every row of a parameter once"
        dtype = torch.bfloat16 if ranks.device.type == "cuda" else torch.float32
        groups = [MuonGroup(blocks, ranks.world, dtype) for blocks in shapes.values()]
        # Largest first: its communication overlaps the others' work.
        self.muon = sorted(groups, key=lambda group: -group.momentum.numel())
        self.adam = torch.optim.AdamW(
            [
                {"params": params, "base_lr": rule.lr, "lr": rule.lr, "weight_decay": rule.weight_decay}
                for rule, params in alike.items()
            ],
            betas=(cfg.beta1, cfg.beta2),
            eps=cfg.adam_eps,
            fused=True,  # one kernel for each group
        )
        self.average = [torch.zeros_like(p) for p in self.parameters] if cfg.ema_decay else []
        self.averaged_steps = 0

    def reset(self):
        """Forget everything: momentum, Adam's moments and the average."""
        for t in (*(group.momentum for group in self.muon), *self.average):
            t.zero_()
        self.adam.state.clear()
        self.averaged_steps = 0

    @torch.no_grad()
    def step(self, step: int, lr_scale: float):
        """Update every parameter with its gradient and forget the gradients. Adam works while Muon's updates travel."""
        cfg = self.cfg
        # 1. Sum over the ranks: each gets its shard of Muon's gradients and all of Adam's.
        for p in self.parameters:
            if p.grad is None:  # a rank without a micro-batch still takes part in the sums
                p.grad = torch.zeros_like(p)
        shards, waits = self.reduce_scatter()
        for p, grad in zip(self.small, self.ranks.all_reduce_flat([p.grad for p in self.small])):
            p.grad = grad
        for wait in waits:
            wait.wait()

        # 2. Clip the norm of the sum, not that of each rank's part.
        clip = self.clip_factor(shards)
        torch._foreach_mul_([p.grad for p in self.small], clip)

        # 3. Update.
        momentum = self.muon_momentum(step)
        updates = [self.direction(g, shard * clip.to(shard.dtype), momentum) for g, shard in zip(self.muon, shards)]
        gathered = [self.gather(g, update) for g, update in zip(self.muon, updates)]
        for group in self.adam.param_groups:
            group["lr"] = group["base_lr"] * lr_scale
        self.adam.step()
        for group, (update, wait) in zip(self.muon, gathered):
            if wait is not None:
                wait.wait()
            group.apply_(update, cfg.matrix_lr * lr_scale, cfg.muon_wd)

        # 4. Average.
        for p in self.parameters:
            p.grad = None
        if self.average:
            torch._foreach_lerp_(self.average, self.parameters, 1 - cfg.ema_decay)
            self.averaged_steps += 1

    def reduce_scatter(self) -> tuple[list[Tensor], list]:
        """This rank's shard of each Muon group's summed gradient, and what to wait for."""
        ranks = self.ranks
        gradients = [group.gradient() for group in self.muon]
        if ranks.world == 1:
            return gradients, []
        if ranks.device.type == "cpu":  # gloo has no reduce_scatter
            return [ranks.all_reduce_(t).chunk(ranks.world)[ranks.rank] for t in gradients], []
        shards = [torch.empty_like(group.momentum) for group in self.muon]
        waits = [dist.reduce_scatter_tensor(s, t, async_op=True) for s, t in zip(shards, gradients)]
        return shards, waits

    def clip_factor(self, shards: list[Tensor]) -> Tensor:
        """min(1, GRAD_CLIP_NORM / norm of the gradient of all parameters over all ranks), a scalar on the device."""
        if not self.cfg.grad_clip_norm:
            return torch.ones((), device=self.ranks.device)
        norms = torch._foreach_norm(shards, dtype=torch.float32)  # fp32: the shards are bf16 on a GPU
        squares = self.ranks.all_reduce_(torch.stack(norms).square().sum())
        # Every rank already has the sum of these.
        small_norms = torch._foreach_norm([p.grad for p in self.small])
        squares = squares + torch.stack(small_norms).square().sum()
        return (self.cfg.grad_clip_norm / (squares.sqrt() + 1e-6)).clamp(max=1.0)

    def muon_momentum(self, step: int) -> float:
        """Muon's momentum after its linear warm-up or on the way there."""
        cfg = self.cfg
        warm = min(step / cfg.muon_momentum_warmup_steps, 1.0) if cfg.muon_momentum_warmup_steps else 1.0
        return (1 - warm) * cfg.muon_momentum_warmup_start + warm * cfg.muon_momentum

    def direction(self, group: MuonGroup, grad: Tensor, momentum: float) -> Tensor:
        """Nesterov momentum, rows normed (MuonEq-R), orthogonalised: this rank's matrices (n, rows, cols)."""
        group.momentum.mul_(momentum).add_(grad)  # m <- momentum m + g
        u = grad.add_(group.momentum, alpha=momentum)  # g + momentum m
        row_norms = torch.linalg.vector_norm(u, dim=-1, keepdim=True, dtype=torch.float32)
        u = u / row_norms.clamp_min(1e-7).to(u.dtype)
        return orthogonalize(u, MUON_COEFFICIENTS[self.cfg.muon_coefficients])

    def gather(self, group: MuonGroup, update: Tensor):
        """All ranks' updates (padded, rows, cols), and what to wait for before reading them."""
        if self.ranks.world == 1:
            return update, None
        everyones = update.new_empty(group.padded, group.rows, group.cols)
        return everyones, dist.all_gather_into_tensor(everyones, update.contiguous(), async_op=True)

    @torch.no_grad()
    def use_average(self):
        """Put the debiased average into the model: average / (1 - decay^steps).

        The average begins at zero; without the correction a short run would be averaged with zeros."""
        if self.averaged_steps:
            correction = 1 - self.cfg.ema_decay**self.averaged_steps
            for p, average in zip(self.parameters, self.average):
                p.copy_(average / correction)


# ======== Training ====================================================================================================


class Schedule:
    """How far training is, and what depends on this progress in [0, 1): learning rate, loops, attention span.

    Training may use MAX_WALLCLOCK_SECONDS but for the reserve or, if that setting is 0, a number of steps."""

    def __init__(self, cfg: Config):
        self.cfg = cfg
        limit = cfg.max_wallclock_seconds
        self.seconds = limit - cfg.gptq_reserve_seconds if limit else math.inf
        self.stages = context_schedule(cfg)

    def allows(self, step: int, now: float) -> bool:
        """Whether a step of mean duration, begun after `step` steps and `now` seconds, would end in time."""
        return now + now / max(step, 1) <= self.seconds

    def progress(self, step: int, now: float) -> float:
        """The share of the budget that `step` steps and `now` seconds have used."""
        return step / self.cfg.iterations if self.seconds == math.inf else now / self.seconds

    def looped(self, progress: float) -> bool:
        return self.cfg.num_loops > 0 and progress >= self.cfg.enable_looping_at

    def span(self, progress: float) -> int:
        return next(stage.span for stage in self.stages if progress < stage.end)

    def lr_scale(self, progress: float) -> float:
        """1, then linear to zero at the end of training, but never below MIN_LR."""
        warmdown = self.cfg.warmdown_frac
        if warmdown <= 0 or progress < 1 - warmdown:
            return 1.0
        return max((1 - progress) / warmdown, self.cfg.min_lr)

    def ramp(self, step: int, changed_at: int | None) -> float:
        """Extra factor after a change of span at step `changed_at`: 1/n, 2/n, ..., 1."""
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

    def __init__(self, model: GPT, cfg: Config, ranks: Ranks, log: Log):
        self.model = model
        self.cfg = cfg
        self.ranks = ranks
        self.log = log
        self.stream = TrainStream(cfg)
        self.optimizer = Optimizer(model, cfg, ranks)
        self.schedule = Schedule(cfg)
        self.curve = []  # (step, seconds, loss, learning-rate factor) of every logged step

    def warm_up(self):
        """Run steps of both schedules on real shapes, then restore weights and optimizer entirely.

        Kernels are compiled and libraries are set up before the clock starts."""
        saved = [p.detach().clone() for p in self.model.parameters()]
        fetch = Prefetch(self.stream, self.ranks)
        for looped in sorted({self.schedule.looped(0.0), self.schedule.looped(1.0)}):  # those that will occur
            for step in range(self.cfg.warmup_steps):
                self.gradients(fetch(step, self.cfg.train_seq_len), looped)
                self.optimizer.step(step, 1.0)
        with torch.no_grad():
            torch._foreach_copy_(list(self.model.parameters()), saved)
        self.optimizer.reset()

    def run(self) -> dict:
        """Train until the budget or ITERATIONS ends, leave the averaged weights in the model, return the counts."""
        cfg = self.cfg
        schedule = self.schedule
        fetch = Prefetch(self.stream, self.ranks)
        clock = Clock(self.ranks)
        step = 0
        looped = False
        span = None  # attention span of the last step
        changed_at = None  # step at which the span changed last
        # All ranks read the same clock, so they stop, loop and change the span at the same step.
        while step < cfg.iterations and schedule.allows(step, now := clock.tick()):
            progress = schedule.progress(step, now)
            if schedule.looped(progress) and not looped:
                looped = True  # from here on a step visits more layers and takes longer
                visits = [visit.layer for visit in self.model.schedules[True]]
                self.log(f"step {step}: loops on at progress {progress:.3f}, visits {visits}")
            if schedule.span(progress) != span:
                changed_at = None if span is None else step  # the first span is no change: no ramp
                span = schedule.span(progress)
                self.log(f"step {step}: attention span {span}")
            lr_scale = schedule.lr_scale(progress) * schedule.ramp(step, changed_at)

            loss = self.gradients(fetch(step, span), looped)  # a thread builds the next step's batches meanwhile
            self.optimizer.step(step, lr_scale)
            clock.step_done()
            step += 1
            if step <= 5 or step % cfg.train_log_every == 0:  # the first steps show a mistake early
                self.report(step, loss, lr_scale, clock)
        seconds = clock.stop()
        self.optimizer.use_average()
        return self.summary(step, seconds)

    def gradients(self, batches: list[Batch], looped: bool) -> Tensor:
        """Backward through this rank's micro-batches; returns their part of the loss, on the device."""
        loss = torch.zeros((), device=self.ranks.device)
        for batch in batches:
            assert batch.split == "train"  # validation tokens never train the model here
            part = batch_loss(self.model, batch, self.cfg.train_batch_tokens, looped)
            part.backward()
            loss += part.detach()
        return loss

    def report(self, step: int, loss: Tensor, lr_scale: float, clock: Clock):
        """A log line and a point of the curve, after `step` steps; `loss` is this rank's part."""
        loss = self.ranks.all_reduce_(loss.clone()).item()  # waits for the GPU
        seconds = clock.seconds()
        require(math.isfinite(loss), f"the loss is {loss} at step {step}; lower MATRIX_LR or TIED_EMBED_LR")
        self.curve.append((step, round(seconds, 3), loss, lr_scale))
        mean = seconds / step
        progress = self.schedule.progress(step, seconds)
        left = seconds * max(1 / progress - 1, 0)  # exact if the budget is of seconds, else an estimate
        self.log(
            f"step {step:6d}  {100 * progress:5.1f} %  loss {loss:.4f}  lr x {lr_scale:.3f}  "
            f"{1e3 * mean:7.1f} ms/step  {self.cfg.train_batch_tokens / mean:11,.0f} tokens/s  "
            f"{seconds:6.1f} s, {left:.0f} s left"
        )

    def summary(self, step: int, seconds: float) -> dict:
        """The counts of the run for result.json, logged."""
        tokens = step * self.cfg.train_batch_tokens
        self.log(
            f"trained {step} steps, {tokens:,} tokens in {seconds:.1f} s: "
            f"{1e3 * seconds / max(step, 1):.1f} ms/step, {tokens / seconds:,.0f} tokens/s"
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
            nats = model.nll(hidden, batch.targets.clamp(min=0))
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
        nats = model.nll(x, targets.clamp(min=0))
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
        self.progress = Progress(ranks, log)

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
            self.progress.show(ledger)
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
        progress = Progress(self.ranks, self.log)
        self.model.requires_grad_(False)
        for i, segment in enumerate(self.segments):
            if self.method == "lora":
                for batch in self.batches[i]:
                    progress.show(self.ledger)
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


# ======== Packer ======================================================================================================

# A packed script decompresses its source into a temporary file, once, and runs that: Triton reads the source of kernels
# from the file that holds them.
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
ESCAPES = {"\\": "\\\\", "\r": "\\r", "\n": "\\n", "\0": "\\x00", '"': '\\"'}  # backslash first


def pack_script(source: str) -> bytes:
    """Self-extracting script: the stripped source, LZMA, in a latin-1 string (3 % overhead where base85 has 25 %)."""
    stripped = strip_source(source)
    if without_docstrings(source) != without_docstrings(stripped):
        raise RuntimeError("stripping comments would change the program")
    # lc: four bits of the byte before select the literal's statistics, which suits text.
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 4, "lp": 0, "pb": 0}]
    packed = lzma.compress(stripped.encode(), format=lzma.FORMAT_XZ, check=lzma.CHECK_CRC32, filters=filters)
    text = packed.decode("latin-1")
    for char, escape in ESCAPES.items():
        text = text.replace(char, escape)
    return (BOOTSTRAP % text).encode("latin-1")


def strip_source(source: str) -> str:
    """The source without comments, docstrings and blank lines.

    Names, annotations and layout stay, since Triton and torch read them."""
    lines = source.split("\n")
    docstrings = set()  # numbers of lines that hold nothing but a docstring
    for node in documented(ast.parse(source)):
        doc, following = node.body[:2]
        starts_line = not lines[doc.lineno - 1][: doc.col_offset].strip()
        if starts_line and following.lineno > doc.end_lineno:
            docstrings.update(range(doc.lineno, doc.end_lineno + 1))
    literal = set()  # numbers of lines of a string that spans several: they stay to the letter
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        row, column = token.start
        if token.type == tokenize.COMMENT:
            lines[row - 1] = lines[row - 1][:column].rstrip()
        elif token.end[0] > row and token.type not in (tokenize.NEWLINE, tokenize.NL):
            literal.update(range(row, token.end[0] + 1))
    remaining = []
    for number, line in enumerate(lines, 1):
        text = line if number in literal else line.rstrip()
        if number not in docstrings and (text or number in literal):
            remaining.append(text)
    return "\n".join(remaining) + "\n"


def without_docstrings(source: str) -> str:
    """The syntax tree as text, docstrings left out."""
    tree = ast.parse(source)
    for node in documented(tree):
        del node.body[0]
    return ast.dump(tree)


def documented(tree: ast.Module) -> list:
    """Nodes whose first statement is a docstring and not the only one."""
    return [
        node
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        and ast.get_docstring(node) is not None
        and len(node.body) > 1
    ]


def unpack_script(path: Path) -> str:
    """The source inside a packed script, without running it."""
    require(path.is_file(), f"--unpack {path}: no such file")
    before, after = (re.escape(part) for part in BOOTSTRAP.split("%s"))
    match = re.fullmatch(f"{before}(.*){after}", path.read_bytes().decode("latin-1"))
    damaged = f"--unpack {path}: not a script packed by train_gpt.py, or a damaged one"
    with explained(damaged, TypeError, ValueError, SyntaxError, lzma.LZMAError):
        return lzma.decompress(ast.literal_eval(f'"{match[1]}"').encode("latin-1")).decode()


# ======== Main ========================================================================================================


class Run:
    """What the modes share: settings, ranks, log, timers, verdicts, validation data, attention backend."""

    def __init__(self, cfg: Config):
        self.cfg = cfg
        self.folder = artifact_folder(cfg)
        self.ranks = Ranks(cfg)
        self.log = Log(self.ranks)
        self.phases = Phases(self.ranks)
        self.verdicts = Verdicts()
        self.result = {"bpb": {}, "bytes": {}}  # what result.json will hold

    def prepare(self):
        """Make the folder, read and check the validation data, choose the attention backend, and log what is used."""
        cfg = self.cfg
        if self.ranks.main:
            with explained(f"ARTIFACT_DIR={self.folder}: cannot be made ({{}}); name another folder", OSError):
                self.folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(cfg.seed)
        torch.set_float32_matmul_precision("high")  # TF32 for what is left in fp32
        with self.phases("read"):
            self.val = ValidationStream(cfg)
            self.data = fingerprint(cfg, self.val)
        with self.phases("setup"):
            self.attention_backend = choose_attention(cfg, self.ranks.device)
        self.environment = self.describe_environment()
        self.log_environment()

    def describe_environment(self) -> dict:
        """Hardware, versions and hashes, for result.json."""
        ranks = self.ranks
        hardware = f"CPU, {torch.get_num_threads()} threads x {ranks.world} rank(s)"
        if ranks.device.type == "cuda":
            hardware = f"{ranks.world} x {torch.cuda.get_device_name()}"
        source = SOURCE if PACKED else strip_source(SOURCE)
        fused = use_kernels(torch.bfloat16, ranks.device, self.cfg.model_dim // self.cfg.num_heads)
        return {
            "hardware": hardware,
            "attention": self.attention_backend,
            "kernels": "Triton" if fused else "plain PyTorch",
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "cuda": torch.version.cuda,
                "numpy": np.__version__,
            },
            "source_sha256": sha256(source.encode()),
            "settings_sha256": self.cfg.sha256(),
        }

    def log_environment(self):
        """The first lines of the log."""
        log = self.log
        listed = lambda facts: ", ".join(f"{name} {value}" for name, value in facts.items())
        facts = self.environment
        versions = listed(facts["versions"])
        log(f"hardware {facts['hardware']}, attention {facts['attention']}, kernels {facts['kernels']}, {versions}")
        log(f"source sha256 {facts['source_sha256']}")
        settings = self.cfg.settings()
        defaults = Config().settings()
        changed = [f"{name.upper()}={value}" for name, value in settings.items() if value != defaults[name]]
        changes = " ".join(changed) or "none"
        log(f"settings sha256 {facts['settings_sha256']}; changed from their defaults: {changes}")
        log(f"all settings: {json.dumps(settings)}", console=False)
        log(f"data: {listed(self.data)}")
        if not self.data["manifest"]:
            log("data: no manifest.json, so documents and hashes are unchecked")

    def ledger(self, name: str) -> Ledger:
        """An empty ledger for one scoring pass over the validation set."""
        return Ledger(name, self.val.target_bytes, self.verdicts)

    def new_model(self) -> GPT:
        """A GPT in memory, its weights not set yet."""
        dtype = torch.bfloat16 if self.ranks.device.type == "cuda" else torch.float32
        return GPT(self.cfg, self.attention_backend, dtype)


def artifact_folder(cfg: Config) -> Path:
    """ARTIFACT_DIR; else runs/SEED, or a packed script's own folder."""
    if cfg.artifact_dir:
        return Path(cfg.artifact_dir)
    return RUNNING.parent if PACKED else Path("runs") / str(cfg.seed)


def preflight(run: Run):
    """Everything that could fail after the training clock has run, tried before it starts."""
    cfg = run.cfg
    if run.ranks.main:
        try_codec(run)
        if cfg.ledger_path:
            with whole_file(Path(cfg.ledger_path), "LEDGER_PATH") as f:
                f.write(b"")
        if not cfg.ttt_eval_only:  # scoring leaves the folder's script alone: it may be the one that runs
            check_folder(run)
    if not cfg.ttt_eval_only and not cfg.quantize_only:
        check_training(run)


def try_codec(run: Run):
    """Write and read a small artifact in the run's folder."""
    probe = {
        "q.0.symbols": np.random.default_rng(0).integers(-9, 10, (64, 64)).astype(np.int8),
        "q.0.step": np.arange(64, dtype=np.int16),
        "r": np.ones(3, np.float16),
    }
    path = run.folder / f"preflight{os.getpid()}.bin"  # a name of this process: another may run in the folder
    save_artifact(path, probe, {"settings": run.cfg.settings()})
    loaded, _ = load_artifact(path)
    path.unlink()
    if any((loaded[name] != probe[name]).any() for name in probe):
        raise RuntimeError("the artifact codec does not reproduce its input")


def check_folder(run: Run):
    """The source can be packed, train_gpt.py would not overwrite the script that runs, and the files fit on the disk."""
    packed = pack_script(SOURCE)
    script = run.folder / "train_gpt.py"
    if script.exists() and script.samefile(RUNNING):
        require(
            script.read_bytes() == packed,
            f"ARTIFACT_DIR={run.folder}: would overwrite the running script; set ARTIFACT_DIR elsewhere",
        )
    with torch.device("meta"):  # shapes alone
        weights = sum(p.numel() for p in run.new_model().parameters())
    need = 4 * weights + 2 * run.cfg.artifact_cap  # trained.npz, and model.bin beside an earlier one
    free = shutil.disk_usage(run.folder).free
    require(
        free >= need,
        f"ARTIFACT_DIR={run.folder}: {free / 1e6:.0f} MB free, {need / 1e6:.0f} MB needed; "
        "free space or set ARTIFACT_DIR elsewhere",
    )


def check_training(run: Run):
    """The training shards are there, and there is work for every rank."""
    stream = TrainStream(run.cfg)
    micro_batches = -(-run.cfg.train_batch_tokens // run.cfg.micro_batch_tokens)
    run.log(
        f"checks passed: {stream.tokens:,} training tokens in {len(stream.shards)} shard(s), "
        f"{micro_batches} micro-batch(es) a step"
    )
    idle = run.ranks.world - micro_batches
    if idle > 0:
        run.log(f"warning: {idle} rank(s) will idle in every step; lower MICRO_BATCH_TOKENS")


def train(run: Run, model: GPT):
    """Train the model and keep its weights on disk (trained.npz)."""
    model.init_weights(run.cfg.seed)
    weights = sum(p.numel() for p in model.parameters())
    run.log(f"{weights:,} parameters, visits {[visit.layer for visit in model.schedules[False]]}")
    trainer = Trainer(model, run.cfg, run.ranks, run.log)
    with run.phases("warmup"):
        trainer.warm_up()
    run.log(f"warmed up in {run.phases.seconds['warmup']:.1f} s")
    with run.phases("steps"):
        run.result["training"] = trainer.run()
    with run.phases("write"):
        if run.ranks.main:
            save_trained(run, model)


def save_trained(run: Run, model: GPT):
    """Write trained.npz: the fp32 weights by name, and as JSON in "meta" what a later run needs to continue."""
    meta = {
        "settings": run.cfg.settings(),
        "training": run.result["training"],
        "seconds": {name: run.phases.seconds[name] for name in ("warmup", "steps")},
    }
    arrays = {name: p.detach().cpu().numpy() for name, p in model.named_parameters()}
    with whole_file(run.folder / "trained.npz") as f:
        np.savez(f, meta=np.array(json.dumps(meta)), **arrays)


def read_trained(path: Path) -> tuple[dict[str, np.ndarray], dict]:
    """Weights (fp32) and meta of trained.npz."""
    remedy = "train again, or set ARTIFACT_DIR to the folder that holds it"
    with explained(
        f"{path}: cannot be read ({{}}); {remedy}", OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile
    ):
        arrays = dict(np.load(path))
        return arrays, json.loads(str(arrays.pop("meta")))


def load_trained(run: Run, model: GPT):
    """Put the weights of trained.npz into the model, and its counts and times into the result."""
    path = run.folder / "trained.npz"
    arrays, meta = read_trained(path)
    load_state(model, {name: torch.from_numpy(array) for name, array in arrays.items()}, path)
    run.result["training"] = meta["training"]
    run.phases.seconds.update(meta["seconds"])


def diagnose(run: Run, model: GPT, name: str):
    """BPB of the weights in memory, in a ledger and a time of its own."""
    with run.phases("diagnostic"):
        score_plainly(run, model, run.ledger(name))
    run.log(f"{name}: {run.result['bpb'][name]:.5f} BPB")


def score_plainly(run: Run, model: GPT, ledger: Ledger):
    """Score the validation set without adaptation; the BPB goes into the result under the ledger's name."""
    scorer = Scorer(model, run.cfg, run.ranks, run.log)
    run.result["bpb"][ledger.name] = scorer.score(run.val, ledger, run.cfg.eval_stride)


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
    cfg = run.cfg
    path = run.folder / "model.bin"
    with run.phases("load"):
        arrays, meta = load_artifact(path)
        load_state(model, dequantize(arrays), path)
    stored = meta["settings"]
    others = sorted(name.upper() for name, value in cfg.settings().items() if value != stored.get(name))
    if others:
        run.verdicts.set("C4", "DISPUTED", f"scored with settings other than the artifact's: {', '.join(others)}")
    ledger = run.ledger("quantized")
    if stored.get("prequant_ttt_enabled"):
        ledger.break_condition(
            "C3", "PREQUANT_TTT_ENABLED=1: the weights learnt from every validation target before it was scored"
        )
    # Sizes of the segments in documents. The audit relies on them: within a segment no document depends on another.
    run.result["segments"] = [len(run.val.starts)]
    if cfg.ttt_enabled or cfg.ngram_enabled:
        diagnose(run, model, "quantized")
        ledger = run.ledger("adapted")
        with run.phases("prepare"):
            adaptation = TestTimeTraining(model, cfg, run.ranks, run.log, run.val, ledger)
            adaptation.prepare()
        with run.phases("adapt"):
            run.result["bpb"]["adapted"] = adaptation.score()
        run.result["segments"] = [segment.last - segment.first for segment in adaptation.segments]
    else:
        with run.phases("score"):
            score_plainly(run, model, ledger)
    run.log(f"{ledger.name}: {run.result['bpb'][ledger.name]:.5f} BPB")
    run.headline = ledger.name  # the pass whose BPB may become val_bpb
    run.result.update(anatomy(ledger, run.val))
    if cfg.ledger_path and run.ranks.main:
        with whole_file(Path(cfg.ledger_path), "LEDGER_PATH") as f:
            np.save(f, ledger.nats)
        run.log(f"ledger written to {cfg.ledger_path}")


def finish(run: Run):
    """Verdicts, result.json and the final table."""
    cfg = run.cfg
    result = run.result
    files = {"code": run.folder / "train_gpt.py", "model": run.folder / "model.bin"}
    result["bytes"] = {name: path.stat().st_size for name, path in files.items() if path.exists()}
    result["bytes"]["total"] = sum(result["bytes"].values())
    result["seconds"] = {which: run.phases.budget(which) for which in ("train", "eval")} | run.phases.seconds
    judge_budgets(run)
    failed = run.verdicts.failed()
    if not failed:  # the one place that makes a number the result
        result["val_bpb"] = result["bpb"][run.headline]
    result.update(
        dataset=run.data["dataset"],
        settings=cfg.settings(),
        data=run.data,
        seed=cfg.seed,
        verdicts={c: {"verdict": v, "reason": r} for c, (v, r) in run.verdicts.table.items()},
        **run.environment,
    )
    if run.ranks.main:
        with whole_file(run.folder / ("eval_result.json" if cfg.ttt_eval_only else "result.json")) as f:
            f.write(json.dumps(result, indent=1).encode())
    log_table(run)
    run.log(
        f"no val_bpb: {', '.join(failed)} failed"
        if failed
        else f"val_bpb {result['val_bpb']:.6f} on all {run.val.targets:,} targets, dataset {run.data['dataset']}"
    )


def judge_budgets(run: Run):
    """Verdicts on bytes and seconds."""
    cap = run.cfg.artifact_cap
    total = run.result["bytes"]["total"]
    run.verdicts.judge("bytes", total <= cap, f"{total:,} of {cap:,} bytes")
    parts = {"train": "steps, calibration, quantisation", "eval": "read, load, prepare, score"}
    limit = run.cfg.max_wallclock_seconds
    for which in ("eval",) if run.cfg.ttt_eval_only else ("train", "eval"):
        spent = run.result["seconds"][which]
        if limit:
            run.verdicts.judge(f"{which}_budget", spent < limit, f"{spent:.1f} of {limit:.0f} s: {parts[which]}")


def log_table(run: Run):
    """The last lines of the log: every BPB, size, time and verdict."""
    run.log()
    for unit, form in (("BPB", ".6f"), ("bytes", ","), ("seconds", ".1f")):
        for name, value in run.result[unit.lower()].items():
            run.log(f"  {f'{name} {unit}':24s} {value:{form}}")
    for condition, (verdict, reason) in run.verdicts.table.items():
        run.log(f"  {condition:24s} {verdict:9s} {reason}".rstrip())


def configure(env) -> Config:
    """Settings from the environment. Where a run continues from a file, the file's settings are the defaults."""
    cfg = Config.from_env(env, check=False)  # the mode and the folder; the rest may need the stored settings
    if cfg.ttt_eval_only:
        path = artifact_folder(cfg) / "model.bin"
        stored = read_artifact(path)[0]["meta"]["settings"]
    elif cfg.quantize_only:
        path = artifact_folder(cfg) / "trained.npz"
        stored = read_trained(path)[1]["settings"]
    else:
        return Config.from_env(env)
    # A retired setting with the value that is fixed now is as good as absent; with another value the script differs.
    stored = {name: value for name, value in stored.items() if RETIRED.get(name) != value}
    others = ", ".join(sorted(set(stored) ^ set(cfg.settings())))
    require(
        not others,
        f"{path}: written by a script with other settings than this one's ({others}); "
        "use the train_gpt.py that was packed with it",
    )
    return Config.from_env(env, stored)


def execute(cfg: Config):
    """One mode from beginning to end."""
    run = Run(cfg)
    try:
        run.prepare()
        preflight(run)
        if cfg.check_only:
            return
        # A run continued from trained.npz continues the log, too.
        run.log.open(run.folder / ("eval.log" if cfg.ttt_eval_only else "train.log"), "a" if cfg.quantize_only else "w")
        model = run.new_model().to(run.ranks.device)
        if not cfg.ttt_eval_only:
            produce_weights = load_trained if cfg.quantize_only else train
            produce_weights(run, model)
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
        place = e.filename or "a file"
        print(f"error: {place}: {e.strerror or e}; free space there or name another folder", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
