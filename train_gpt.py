"""Train a GPT in ten minutes, quantise it below 16,000,000 bytes, and score it in bits per byte (BPB).

    torchrun --nproc_per_node=8 train_gpt.py          train, quantise, pack, reload from disk, score
    TTT_EVAL_ONLY=1 python train_gpt.py               score the artifact in ARTIFACT_DIR
    QUANTIZE_ONLY=1 python train_gpt.py               start again from the trained weights in ARTIFACT_DIR
    CHECK_ONLY=1 python train_gpt.py                  check data, tokenizer, attention, codec and disk, then stop
    python train_gpt.py --help                        every setting, its default and its meaning
    python train_gpt.py --unpack FILE                 print the source inside a packed script

The same file runs on a CPU, one GPU, eight GPUs or several nodes. prepare_data.py makes the data folder; shards that
others made in the same format load as they are.

Sections, each using only those above it: Hyperparameters, Runtime, Data, Kernels, Attention, Model, Adapters,
Optimizers, Training, Entropy coder, Quantizer, Artifact, N-gram, Scoring, Test-time training, Packer, Main.
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
# C1: a score uses nothing but earlier text. C2: the probabilities of all tokens sum to one. C3: a target is scored
# before anything learns from it. C4: one pass, by settings that the artifact holds. #1855 and the like are pull
# requests of openai/parameter-golf.
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
import bz2
import collections
import contextlib
import dataclasses
import difflib
import fcntl
import functools
import glob
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
import threading
import time
import timeit
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, TextIO


def on_signals(handler):
    """Call handler(number, frame) on Ctrl-C and SIGTERM; a job that ignores Ctrl-C, as one started with & does, goes
    on ignoring it."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


def leave(number: int, frame):
    """End at once: until there is a run, there is nothing to undo."""
    os.write(2, b"interrupted while starting\n")
    os._exit(128 + number)


if __name__ == "__main__":
    on_signals(leave)  # before the imports: they take seconds, and an exception inside them is pages long
try:
    import numpy as np
    import torch
    import torch.distributed as dist
    import torch.nn.functional as F
    from numpy import ndarray
    from torch import Tensor, nn
except ModuleNotFoundError as missing:
    raise SystemExit(f"error: no Python package {missing.name}; pip install -r requirements.txt") from None

PACKED = "PACKED_PATH" in globals()  # set by the packed script's first lines, as PACKED_SOURCE is; see BOOTSTRAP
# Captured once: editing the file during a run changes nothing.
SOURCE = globals()["PACKED_SOURCE"] if PACKED else Path(__file__).read_text(encoding="utf-8")
RUNNING = Path(globals().get("PACKED_PATH", __file__)).resolve()


class UserError(Exception):
    """Bad input: printed as one line that names the file or setting and the remedy; the process exits with status 2."""

    def __init__(self, message: str):
        """What a stranger's file puts into the message can neither begin a line nor steer a terminal."""
        super().__init__("".join(c if c.isprintable() else ascii(c)[1:-1] for c in message))


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
        reason = getattr(e, "strerror", None) or str(e)
        raise UserError(message.replace("{}", reason.partition("\n")[0])) from None


def installed(package: str):
    """Import a package that only some runs need."""
    with explained(f"no Python package {package} ({{}}); pip install {package}", ImportError):
        return importlib.import_module(package)


def sha256(data) -> str:
    """Hexadecimal digest of bytes or of a contiguous array."""
    return hashlib.sha256(data).hexdigest()


def inflate(decompressor, packed: bytes, most: int) -> bytes:
    """What a zlib, bz2 or LZMA stream holds. ValueError where that is over `most` bytes, since a stranger's kilobytes
    can become gigabytes, or where the stream is cut short."""
    data = decompressor.decompress(packed, most + 1)
    if len(data) > most or not decompressor.eof:
        raise ValueError(f"a compressed part is cut short, or over {most:,} bytes unpacked")
    return data


def json_object(text: bytes | str) -> dict:
    """The object that JSON text holds; ValueError where it holds something else, or NaN and infinities, which are no
    JSON."""

    def refuse(name: str):
        raise ValueError(f"{name} in JSON")

    value = json.loads(text, parse_constant=refuse)
    if not isinstance(value, dict):
        raise ValueError("no JSON object")
    return value


# ======== Hyperparameters =============================================================================================

ADAPTER_KINDS = ("q", "k", "v", "o", "mlp", "head")

# Fields of Config that do not decide the result: paths, modes, ranks.
NOT_SETTINGS = frozenset(
    "data_path tokenizer_path artifact_dir ledger_path ttt_eval_only quantize_only check_only device attention "
    "fa3_library rank local_rank world_size rendezvous_seconds train_log_every val_every_steps".split()
)

# Settings of earlier scripts and the value that is now fixed. An artifact that holds one of them with this value loads.
RETIRED = {
    "awq_lite_bits": 8,
    "awq_lite_group_size": 64,
    "awq_lite_group_top_k": 1,
    "gate_window": 12,
    "ln_scale": True,
    "lqer_asym_group": 64,
    "lqer_gain_select": False,
    "lqer_weight": "none",
    "muon_backend_steps": 5,
    "muon_row_normalize": True,
    "ngram_calibrate": False,
    "ngram_mode": "tilt",
    "ngram_weight": 0.2,  # of the mixture: without effect on the tilt
    "parallel_final_lane": "mean",
    "skip_gates_enabled": True,
    "ttt_grad_steps": 1,
    "xsa_last_n": 11,
}

# Settings that the artifact of an earlier script lacks, with what it did; it had a prefix, thus no growing segments.
ADDED = {
    "join_operators": False,
    "trellis": False,
    "segment_first_docs": 64,
    "segment_growth": 0.25,
    "global_ttt_replay": 1.0,
    "global_ttt_optimizer": "sgd",
}

PATHS = ("data_path", "tokenizer_path", "artifact_dir", "ledger_path", "fa3_library")  # settings in which ~ is the home

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
        "file of the SentencePiece model that made the shards; empty: tokenizer.model in DATA_PATH")
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
    join_operators: bool = setting(False,
        "read a space and the CaseOps operator behind it as one token (#2109); for shards with operators behind spaces")
    num_layers: int = setting(11,
        "physical layers", "(0, 1000]")
    model_dim: int = setting(512,
        "width of the residual stream", "(0, 4096]")
    num_heads: int = setting(4,
        "query heads of a layer", "(0, inf)")
    num_kv_heads: int = setting(2,
        "key and value heads of a layer", "(0, inf)")
    mlp_mult: float = setting(4.0,
        "hidden width of the MLP over MODEL_DIM", "[0, 64]")
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
        "tokens that attention reaches back in all layers but ATTN_FULL_LAYERS; 0: back to the document's start or "
        "as far as TRAIN_SEQ_LEN or the scoring context goes, in every layer")
    attn_full_layers: str = setting("2,5,10",
        "layers (from 0) that ATTN_WINDOW does not limit; numbers beyond NUM_LAYERS mean nothing")
    qk_gain_init: float = setting(5.0,
        "initial value of the learned factor of each query head, which is normalised before", "[0, 1e6]")
    smear_gate_enabled: bool = setting(True,
        "add a gated copy of the previous token's embedding")
    sparse_attn_gate_enabled: bool = setting(True,
        "multiply each attention head's output by a learned sigmoid of the first 12 channels of the layer's input")
    sparse_attn_gate_scale: float = setting(0.5,
        "with SPARSE_ATTN_GATE_ENABLED: factor of what the sigmoid gets")
    attn_out_gate_enabled: bool = setting(False,
        "multiply each attention head's output by twice a learned sigmoid of the first 12 channels of the layer's "
        "input, so by one at the start (#1667); instead of SPARSE_ATTN_GATE_ENABLED")
    num_loops: int = setting(2,
        "how often layers LOOP_START to LOOP_END run again after their first pass; 0: each layer runs once", "[0, 100]")
    loop_start: int = setting(3,
        "first (from 0) of the layers that NUM_LOOPS runs again")
    loop_end: int = setting(5,
        "last (from 0) of the layers that NUM_LOOPS runs again")
    enable_looping_at: float = setting(0.35,
        "share of training after which NUM_LOOPS takes effect; 1: never, in scoring neither")
    parallel_start_layer: int = setting(8,
        "first layer (from 0) whose attention and MLP run side by side, as PARALLEL_MODE says; 0: none")
    parallel_mode: str = setting("lanes",
        "how attention and MLP run side by side; lanes: each in a stream of its own, in the decoder half (#1529); "
        "gptj: both read one input, outputs added (#1493)", "lanes, gptj")

    # Training
    max_wallclock_seconds: float = setting(600.0,
        "training budget, calibration and quantisation included; 0: ITERATIONS decides and no clock is read")
    gptq_reserve_seconds: float = setting(12.0,
        "part of MAX_WALLCLOCK_SECONDS in which no step is begun, for calibration and quantisation")
    iterations: int = setting(20000,
        "most training steps; with MAX_WALLCLOCK_SECONDS=0 exactly this many", "(0, inf)")
    train_batch_tokens: int = setting(786432,
        "tokens of one training step over all ranks", "(0, inf)")
    micro_batch_tokens: int = setting(98304,
        "tokens of one forward and backward; TRAIN_BATCH_TOKENS is cut into such micro-batches, which go round the "
        "GPUs, so results do not depend on their number",
        "(0, inf)")
    train_seq_len: int = setting(2048,
        "tokens that attention may reach back over in training, at most; longer documents are cut", "(0, inf)")
    train_seq_schedule: str = setting("",
        "TRAIN_SEQ_LEN in stages, LENGTH@SHARE_OF_TRAINING_AT_ITS_END,... like 1024@0.1,2048@1.0; empty: "
        "TRAIN_SEQ_LEN throughout")
    seq_change_warmup_steps: int = setting(32,
        "steps over which the learning rate rises linearly again after TRAIN_SEQ_SCHEDULE changes the length")
    warmup_steps: int = setting(3,
        "training steps made before the clock starts and undone, so that it does not see compilation: so many "
        "without loops, as many with")
    warmdown_frac: float = setting(0.85,
        "last share of training, over which the learning rate falls linearly towards zero, but not below MIN_LR")
    min_lr: float = setting(0.1,
        "least learning rate in the fall of WARMDOWN_FRAC, as a share of its full value")
    train_log_every: int = setting(100,
        "training steps between log lines", "(0, inf)")
    val_every_steps: int = setting(0,
        "training steps between scores of the first validation documents, some 500,000 tokens, by the weights as they "
        "are then: shown in the log, never val_bpb, and training goes on as without; 0: none")

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
        "steps in which the momentum of Muon grows linearly from MUON_MOMENTUM_WARMUP_START to MUON_MOMENTUM")
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
        "passes of PREQUANT_TTT_ENABLED over the validation set", "[0, 1000]")
    prequant_ttt_lr: float = setting(5e-4,
        "with PREQUANT_TTT_ENABLED: AdamW's learning rate in the first pass; a cosine leads to a tenth in the last")
    prequant_ttt_freeze_blocks: int = setting(2,
        "with PREQUANT_TTT_ENABLED: so many first layers, and the embedding, stay as they are")

    # Quantizer and artifact
    rate_distortion: bool = setting(True,
        "choose every quantiser step by what it costs in loss, so that ARTIFACT_CAP is just met (off: *_CLIP_SIGMAS)")
    rate_rows: float = setting(0.75,
        "with RATE_DISTORTION: power to which the step sizes of a matrix's rows follow their gradients; 0: all alike",
        "[0, 4]")
    rate_embed_rows: float = setting(0.5,
        "with RATE_DISTORTION: power to which the step sizes of embedding rows follow their gradients; calibration "
        "sees most rows seldom",
        "[0, 4]")
    rate_columns: float = setting(1.0,
        "with RATE_DISTORTION: power to which the step sizes of columns follow the Hessian's Cholesky diagonal; 0: "
        "all alike", "[0, 4]")
    trellis: bool = setting(True,
        "with RATE_DISTORTION: dependent quantisation, on a trellis of 8 states; a fifth less rounding error at equal "
        "bytes")
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
        "with GPTQ: share of its mean that is added to the diagonal of each matrix's Hessian, against noise")
    awq_lite_enabled: bool = setting(False,
        "without RATE_DISTORTION: 8-bit steps for the one group of 64 columns, of all matrices, with the largest "
        "inputs times weights (#1908)")
    lqer_enabled: bool = setting(False,
        "correct the rounding error of some matrices by a low-rank product")
    lqer_rank: int = setting(4,
        "with LQER_ENABLED: rank of the correcting product", "(0, inf)")
    lqer_top_k: int = setting(3,
        "with LQER_ENABLED: how many matrices are corrected, those of largest rounding error")
    gated_attn_quant_gate: bool = setting(False,
        "store the weights of SPARSE_ATTN_GATE_ENABLED or ATTN_OUT_GATE_ENABLED in int8 rows instead of fp16")
    logit_calibration_enabled: bool = setting(False,
        "fit a logit scale and biases of 14 token categories on training tokens after quantisation")
    artifact_cap: int = setting(16_000_000,
        "most bytes of train_gpt.py and model.bin together", "(0, inf)")
    artifact_margin: int = setting(2_000,
        "bytes that the artifact stays below ARTIFACT_CAP")

    # Scoring
    eval_seq_len: int = setting(2048,
        "longest context of a target scored without test-time training; windows never cross a document's start",
        "(0, inf)")
    eval_stride: int = setting(0,
        "without test-time training: tokens by which the window of EVAL_SEQ_LEN moves on in a document; 0: "
        "EVAL_SEQ_LEN, so windows do not overlap")
    val_batch_tokens: int = setting(131072,
        "tokens of one scoring forward on one GPU; bounds memory, and no score depends on it", "[0, 1e7]")

    # Test-time training
    ttt_enabled: bool = setting(True,
        "adapt to each document while scoring it: score a chunk, then learn from it")
    ttt_method: str = setting("lora",
        "how test-time training learns; lora: low-rank adapters of each document's own; sgd: all weights, from each "
        "GLOBAL_TTT_CHUNK_TOKENS after they are scored (#549)", "lora, sgd")
    segment_docs: int = setting(2500,
        "most documents of a segment: within it documents do not know of each other, between segments what they "
        "taught is carried over; a segment waits for its longest document", "(0, inf)")
    segment_first_docs: int = setting(64,
        "documents of the first segment, and at least so many of a later one, within SEGMENT_DOCS", "(0, inf)")
    segment_growth: float = setting(0.25,
        "documents of a segment over those before it, within SEGMENT_FIRST_DOCS and SEGMENT_DOCS")
    ttt_batch_size: int = setting(64,
        "documents adapted together, of similar length; no score depends on it", "(0, 65536]")
    ttt_chunks: str = setting("8,8,16,32",
        "tokens that a document scores before it learns from them, from its start on; the last size repeats")
    ttt_eval_seq_len: int = setting(3072,
        "longest context of a target scored with test-time training", "(0, 1e6]")
    ttt_backprop_tokens: int = setting(64,
        "tokens before each of TTT_CHUNKS that run again with it, so that gradients reach back; TTT_EVAL_SEQ_LEN: "
        "all of the context, as #1855")
    ttt_mask: str = setting("",
        "adapters that are switched off, of q,k,v,o,mlp,head, separated by commas; no_qv means q,v")
    ttt_lora_rank: int = setting(32,
        "rank of the LoRA adapters that each document trains while it is scored", "(0, 4096]")
    ttt_lora_alpha: float = setting(144.0,
        "scale of the LoRA adapters: TTT_LORA_ALPHA / TTT_LORA_RANK times their product is added")
    ttt_lora_lr: float = setting(1e-4,
        "Adam learning rate of the LoRA adapters")
    ttt_local_lr_mult: float = setting(1.5,
        "multiplies TTT_LORA_LR; two settings, since published scripts have both")
    ttt_beta2: float = setting(0.99,
        "decay of the second moment of the LoRA adapters' Adam, which has no first moment", "[0, 1)")
    ttt_weight_decay: float = setting(0.5,
        "decoupled weight decay of the LoRA adapters")
    ttt_warm_start: float = setting(1.0,
        "share by which the LoRA adapters' initial values move, after each segment of documents, to the mean of what "
        "its documents learnt; 0: never")
    phased_ttt_num_phases: int = setting(8,
        "times the base weights learn from a prefix (without one: after every segment); 0: never",
        "[0, 1000]")
    phased_ttt_prefix_docs: int = setting(0,
        "documents of a prefix, cut into equal phases, from which alone the base weights learn; "
        "0: none, the whole stream teaches")
    global_ttt_optimizer: str = setting("sgd",
        "what moves the base weights; muon: the optimizer of training, its rates times GLOBAL_TTT_LR", "sgd, muon")
    global_ttt_lr: float = setting(0.1,
        "learning rate of the SGD that teaches the base weights; a cosine leads to zero over each phase "
        "(TTT_METHOD=sgd: over the stream)",
        "[0, 1e6]")
    global_ttt_momentum: float = setting(0.9,
        "momentum of the SGD that teaches the base weights; it begins at zero in each phase", "[0, 1)")
    global_ttt_epochs: int = setting(1,
        "passes of the base weights' SGD over the text of each phase (TTT_METHOD=sgd: over each chunk)", "[0, 1000]")
    global_ttt_replay: float = setting(0.5,
        "share of the text of earlier phases that a phase learns from again, other chunks each time; 1: all", "[0, 1]")
    global_ttt_chunk_tokens: int = setting(32768,
        "tokens, over all GPUs, of one step of the SGD that teaches the base weights (TTT_METHOD=sgd: about; a chunk "
        "ends with a document)", "(0, inf)")
    global_ttt_grad_clip: float = setting(1.0,
        "norm to which the gradient that teaches the base weights, summed over the GPUs, is clipped")

    # N-grams
    ngram_enabled: bool = setting(False,
        "let exact counts of earlier segments and of the document so far improve the scored probabilities")
    ngram_order: int = setting(16,
        "longest n-gram, its last token included (TOKEN_ORDER of #2140)", "[2, 64]")
    ngram_min_order: int = setting(3,
        "shortest n-gram, its last token included (#2140: 16)", "[2, 64]")
    ngram_threshold: float = setting(0.5,
        "least share of a context's commonest continuation that gives a hint (TOKEN_THRESHOLD of #2140: 0.8)", "[0, 1]")
    ngram_min_count: int = setting(2,
        "times that a context must have been seen before its commonest continuation is hinted at (#2140: 1)",
        "[1, inf)")
    ngram_boost: float = setting(1.0,
        "log-odds added to the token that the n-grams hint at (TOKEN_BOOST of #2140: 2.625)", "[0, 12]")

    # Set by torchrun
    rank: int = setting(0,
        "number of this process among all processes")
    local_rank: int = setting(0,
        "number of this process's GPU on its node")
    world_size: int = setting(1,
        "processes of the run", "(0, inf)")
    rendezvous_seconds: int = setting(120,
        "seconds that a process waits at the start for the others", "(0, 1e6]")
    # fmt: on

    @classmethod
    def from_env(cls, env, stored: dict | None = None, check: bool = True) -> "Config":
        """Each setting from the mapping `env`, else from `stored` (an artifact's settings), else its default.

        Raises one UserError for all unknown names and unreadable texts and, with `check`, for all values out of range,
        else for those in conflict. A run that continues from a file is checked once its settings are `stored`."""
        fields = {f.name.upper(): f for f in dataclasses.fields(cls)}
        wrong = wrong_names(env, fields, warn=stored is None)
        values = dict(stored or {})
        for name in fields.keys() & env.keys():
            try:
                values[name.lower()] = parse_setting(name, env[name], type(fields[name].default))
            except UserError as e:
                wrong.append(str(e))
        cfg = cls(**values)
        if check and (stored or not (cfg.ttt_eval_only or cfg.quantize_only)):
            unset = ", ".join(sorted(LAUNCHED - env.keys()))
            if unset and cfg.world_size > 1:
                wrong.append(f"WORLD_SIZE={cfg.world_size} without {unset}: start with torchrun, or set them, too")
            wrong += cfg.out_of_range()
            if not wrong:
                cfg.validate()
        require(not wrong, f"{' | '.join(sorted(wrong))} (--help lists all settings; {TRANSLATOR})")
        return cfg

    def validate(self):
        """Refuse settings that could not work, before anything is read or trained."""
        wrong = self.out_of_range() or self.conflicts()
        require(not wrong, " | ".join(wrong))
        context_schedule(self)  # raises where TRAIN_SEQ_SCHEDULE is malformed

    def out_of_range(self) -> list[str]:
        """What is wrong with values by themselves."""
        limits = {f.name: f.metadata["within"] for f in dataclasses.fields(self)}
        return [
            f"{name.upper()}={getattr(self, name)} is not in {within}"
            for name, within in limits.items()
            if not lies_within(getattr(self, name), within)
        ]

    def conflicts(self) -> list[str]:
        """What is wrong between values."""
        broken = (rule.split(maxsplit=1) for rule, holds in self.rules().items() if not holds)
        return [f"{name}={getattr(self, name.lower())} {duty}" for name, duty in broken]

    def rules(self) -> dict:
        """Conditions across settings: a message that begins with the setting to blame -> whether it holds."""
        limit = self.max_wallclock_seconds
        loops_fit = self.loop_start <= self.loop_end < self.num_layers
        two_gates = self.attn_out_gate_enabled and self.sparse_attn_gate_enabled
        size = r"[1-9]\d{0,8}"
        chunk_list = re.fullmatch(f"{size}(,{size})*", self.ttt_chunks)
        chunks_fit = chunk_list and max(map(int, self.ttt_chunks.split(","))) <= self.ttt_eval_seq_len
        kinds = set(ADAPTER_KINDS)
        return {
            "NUM_HEADS must divide MODEL_DIM": self.model_dim % self.num_heads == 0,
            "NUM_KV_HEADS must divide NUM_HEADS": self.num_heads % self.num_kv_heads == 0,
            "ROPE_DIMS must be even": self.rope_dims % 2 == 0,
            "ROPE_DIMS must be at most the head width": self.rope_dims <= self.model_dim // self.num_heads,
            "LOOP_END must satisfy LOOP_START <= LOOP_END < NUM_LAYERS": self.num_loops == 0 or loops_fit,
            "ATTN_OUT_GATE_ENABLED needs SPARSE_ATTN_GATE_ENABLED=0: heads have one gate": not two_gates,
            "MLP_MULT gives an MLP of fewer than 8 units": int(self.mlp_mult * self.model_dim) >= 8,
            "ATTN_FULL_LAYERS must be layers like 2,5,10": re.fullmatch(r"(\d+(,\d+)*)?", self.attn_full_layers),
            f"GPTQ_RESERVE_SECONDS must be below MAX_WALLCLOCK_SECONDS={limit:g}, since steps get the rest; "
            f"set it lower, too, as to {limit / 8:g}": not limit or self.gptq_reserve_seconds < limit,
            "ARTIFACT_MARGIN must be below ARTIFACT_CAP": self.artifact_margin < self.artifact_cap,
            "EVAL_STRIDE must be at most EVAL_SEQ_LEN": self.eval_stride <= self.eval_seq_len,
            "VAL_BATCH_TOKENS must be at least EVAL_SEQ_LEN": self.val_batch_tokens >= self.eval_seq_len,
            "TTT_CHUNKS must be sizes like 8,8,16,32,64, none above TTT_EVAL_SEQ_LEN": chunks_fit,
            "TTT_MASK may name no_qv, q, k, v, o, mlp and head": self.masked_adapters <= kinds,
            "TTT_MASK leaves no adapter to learn; set TTT_ENABLED=0": self.masked_adapters != kinds,
            "NGRAM_MIN_ORDER must be at most NGRAM_ORDER": self.ngram_min_order <= self.ngram_order,
            "DATA_PATH must name a folder": self.data_path,
            "LEDGER_PATH must end in .npy": not self.ledger_path or self.ledger_path.endswith(".npy"),
            f"RANK must be below WORLD_SIZE={self.world_size}": self.rank < self.world_size,
            f"LOCAL_RANK must be below WORLD_SIZE={self.world_size}": self.local_rank < self.world_size,
        }

    @property
    def masked_adapters(self) -> frozenset:
        """The kinds of adapters that TTT_MASK switches off."""
        return frozenset(self.ttt_mask.replace("no_qv", "q,v").split(",")) - {""}

    @property
    def looped(self) -> bool:
        """Whether the model runs its loops after training: calibration, scoring and adaptation do as training ended."""
        return self.num_loops > 0 and self.enable_looping_at < 1

    def settings(self) -> dict:
        """What decides the result: every setting but paths, modes and ranks."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in NOT_SETTINGS}

    def sha256(self) -> str:
        return sha256(json.dumps(self.settings(), sort_keys=True).encode())


# A variable of the environment that begins like one of our settings must be one. First words that other programs use,
# as in LOCAL_WORLD_SIZE, MAX_JOBS or PARALLEL_SEQ, do not count.
SHARED_WORDS = set(
    "ADAM ATTENTION CHECK DATA DEVICE ENABLE GLOBAL GRAD ITERATIONS LOCAL MAX MIN MODEL NUM PARALLEL QUANTIZE RANK "
    "SCALAR SEED SEGMENT SEQ SKIP TOKENIZER VOCAB WARMUP WORLD".split()
)
FIRST_WORDS = {f.name.upper().split("_")[0] for f in dataclasses.fields(Config)}
LAUNCHED = {"RANK", "LOCAL_RANK", "WORLD_SIZE"}  # launchers set names like these beside them, as GLOBAL_RANK
OUR_PREFIXES = tuple(f"{word}_" for word in FIRST_WORDS - SHARED_WORDS)
TRANSLATOR = "tools/migrate.py translates those of other scripts"
# How other names of published scripts begin, which would else be ignored in silence. tools/migrate.py knows each.
FOREIGN = tuple(
    "ACTIVATION ADAM_LR ADAM_WEIGHT ASYMMETRIC_LOGIT BANK_SPLIT BATCH_SCHEDULE BATCH_TOKENS BIGRAM_ BITNET_ "
    "BLOCK_LARS BLOCK_TYPE CANON_ CASEOPS_ CAUTIOUS_ CHURN_ CLIP_MULT COMPILE_MODE COMPRESSOR CONTROL_TENSOR "
    "CORR_WEIGHT DATASETS_ DATA_DIR DIFF_ATTN DISABLE_LAYER DTG_ EMBEDDING_ ETLB_ FP16_ FP_STORAGE FUSED_CE GATE_ "
    "GLOBAL_TTT HEAD_LR HESSIAN_ INT4_ INT5_ INT6_ INT8_ LATE_QAT LAWA_ LORA_ MIXED_QUANT MTP_ NEGATIVE_SLOPE N_INT6 "
    "PARALLEL_RES PARALLEL_START POLAR_ POST_GPTQ PRUNE_ QAT QUANT_CLIP RECUR_ REFINER REPEAT_UNTIE RUN_ID SAVE_QUANT "
    "SEQ_LEN SEQ_SCHEDULE SKIP_POST SLIDING_ SLOT_ SMEAR SOFTCAP_ STRIDE SWA_ SW_EVAL TARGET_MB TEMP_SCALING "
    "TIE_EMBED TRAINING_DEPTH TRIGRAM TVERSKY_ UNTIE_ USE_COMPILE USE_GPTQ USE_INT6 USE_POLAR USE_SMEAR USE_ZSTD "
    "VALUE_RES VE_ WD_TAPER WEIGHT_DECAY YARN_ ZSTD_".split()
)


def still_set(stored: dict) -> dict:
    """An artifact's settings with those that are new, and without those that are retired, where it had what is fixed
    now or its n-grams were off."""
    remaining = ADDED | stored
    for name, fixed in RETIRED.items():
        idle = name.startswith("ngram_") and not stored.get("ngram_enabled")
        if idle or stored.get(name) == fixed:
            remaining.pop(name, None)
    return remaining


def letters(name: str) -> list[str]:
    """Those of a name, in alphabetical order."""
    return sorted(name.replace("_", ""))


def wrong_names(env, fields, warn: bool) -> list[str]:
    """What is wrong with the names of the environment: those that begin like a setting, or have the letters of one, and
    are none. With `warn`, other near misses are printed, and names of other scripts."""
    wrong = []
    foreign = []
    for name in sorted(set(env) - set(fields)):
        fixed = RETIRED.get(name.lower())
        if fixed is not None:
            with contextlib.suppress(UserError):
                if parse_setting(name, env[name], type(fixed)) == fixed:
                    continue
            wrong.append(f"{name} is no longer a setting: its value is always {fixed}")
            continue
        # MODLE_DIM, NUMLAYERS; short names may have a setting's letters by chance
        misspelt = len(name) > 6 and letters(name) in map(letters, fields)
        # Close enough for a slip of the hand: TTT_LR of other scripts is not TTT_LORA_LR.
        nearest = difflib.get_close_matches(name, fields, n=1, cutoff=0.5 if misspelt else 0.88)
        question = f"; did you mean {nearest[0]}?" if nearest else ""
        if misspelt or name.startswith(OUR_PREFIXES):
            wrong.append(f"{name} is not a setting{question}")
        elif name.startswith(FOREIGN):
            foreign.append(name)
        elif warn and nearest and nearest[0] not in LAUNCHED & env.keys():
            print(f"warning: the environment has {name}, which is not a setting{question}", file=sys.stderr)
    if warn and foreign:
        print(f"warning: not settings here: {', '.join(foreign)}; {TRANSLATOR}", file=sys.stderr)
    return wrong


def parse_setting(name: str, text: str, kind: type):
    """Text of an environment variable -> bool, int, float or str; in a path, ~ becomes the home."""
    clean = text == text.strip() and not re.search(r"[\x00-\x1f\x7f]", text)
    require(clean, f"{name}={text!r} has white space or a line end (Windows: \\r) around it; remove that")
    require(text or kind is str, f"{name} is empty; unset it or give it a value")
    if kind is bool:
        word = text.lower()
        yes = word in ("1", "true", "yes")
        require(yes or word in ("0", "false", "no"), f"{name}={text!r} is not 0 or 1")
        return yes
    if name.lower() in PATHS:
        path = os.path.expanduser(text)
        require(not path.startswith("~"), f"{name}={text}: no such home; write the path out, or ./~")
        return path
    with explained(f"{name}={text!r} is not of type {kind.__name__}", ValueError):
        return kind(text)


class Stage(NamedTuple):
    """A part of training with one attention span."""

    end: float  # progress at which the next stage begins
    span: int  # tokens


def context_schedule(cfg: Config) -> list[Stage]:
    """The stages of TRAIN_SEQ_SCHEDULE in order; the last one ends at infinity (#2014).

    "1024@0.1,2048@1.0" -> [Stage(0.1, 1024), Stage(inf, 2048)]"""
    longest = cfg.train_seq_len
    schedule = cfg.train_seq_schedule or f"{longest}@1.0"
    name = f"TRAIN_SEQ_SCHEDULE={schedule!r}"
    with explained(f"{name} is not of the form 1024@0.1,2048@0.7,3072@1.0", ValueError):
        parts = [part.split("@") for part in schedule.split(",")]
        stages = sorted(Stage(float(end), int(span)) for span, end in parts)
    require(all(span > 0 and end > 0 for end, span in stages), f"{name}: lengths and ends must be positive")
    fits = max(stage.span for stage in stages) == longest
    require(fits, f"{name}: the longest span must equal TRAIN_SEQ_LEN={longest}")
    return [*stages[:-1], stages[-1]._replace(end=math.inf)]


def help_text() -> str:
    """The table of --help."""
    lines = [
        "Settings are environment variables. Of each: name, default, meaning; limits (a number's are else [0, inf)).\n"
        "What the recipes in recipes/ set instead stands beside them in docs/SETTINGS.md."
    ]
    if PACKED:
        lines.append("A packed script has no meanings: docs/SETTINGS.md of its repository has them, and --help there")
    for f in dataclasses.fields(Config):
        if f.name in GROUPS:
            lines.append(f"\n{GROUPS[f.name]}")
        within = f.metadata["within"].replace("[0, inf)", "")
        text = "; ".join(filter(None, (f.metadata["meaning"], within)))
        lines.append(f"  {f.name.upper():28s} {str(f.default) or '(empty)':>13s}   {text}".rstrip())
    return "\n".join(lines)


# ======== Runtime: ranks, log, clock, budgets, verdicts ===============================================================


class Ranks:
    """The process group. On one rank every collective is a no-op, so nothing else asks how many there are."""

    def __init__(self, cfg: Config):
        self.rank = cfg.rank
        self.world = cfg.world_size
        self.main = cfg.rank == 0
        gpu = torch.cuda.is_available()
        self.cuda = gpu and cfg.device != "cpu"  # whether this process computes on a GPU
        self.device = torch.device("cpu")
        if cfg.device == "cuda":
            require(gpu, "DEVICE=cuda, but torch sees no GPU; set DEVICE=cpu or install a CUDA build of torch")
        if self.cuda:
            here = torch.cuda.device_count()
            require(cfg.local_rank < here, f"LOCAL_RANK={cfg.local_rank}: {here} GPU(s) here; start as many processes")
            self.device = torch.device("cuda", cfg.local_rank)
            torch.cuda.set_device(self.device)
        if self.world > 1:
            # torch.optim imports this module, whose defaults hold on to the group that exists by then: imported later,
            # gloo's threads would outlive close() and abort some exits.
            importlib.import_module("torch.distributed.nn.functional")
            # Tensors on the CPU travel over gloo, so sharing the clock does not wait for the GPU's queue.
            backend = "cpu:gloo,cuda:nccl" if self.cuda else "gloo"
            dist.init_process_group(backend, store=meet(cfg), rank=self.rank, world_size=self.world)

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
        if self.cuda:
            torch.cuda.synchronize()

    def close(self):
        if dist.is_initialized():
            dist.destroy_process_group()


def meet(cfg: Config) -> dist.Store:
    """What MASTER_ADDR and MASTER_PORT lead to, once all processes of the run are there; says what it waits for."""
    limit = cfg.rendezvous_seconds
    where = f"rank {cfg.rank} of WORLD_SIZE={cfg.world_size}"
    met = Future()

    def arrive():
        try:
            # Beyond the limit, torch would print its stack.
            store, *_ = next(dist.rendezvous("env://", timeout=timedelta(seconds=limit + 60)))
            store.set(f"rank {cfg.rank}", "here")
            store.wait([f"rank {rank}" for rank in range(cfg.world_size)])
            store.set_timeout(dist.default_pg_timeout)
            met.set_result(store)
        except Exception as e:
            met.set_exception(e)

    threading.Thread(target=arrive, daemon=True).start()  # torch waits where no signal would interrupt it
    remedy = "start every RANK, with the same MASTER_ADDR and MASTER_PORT"
    for waited in range(0, limit, 5):
        if waited:
            print(f"{where} has waited {waited} of {limit} s for the others", file=sys.stderr, flush=True)
        with contextlib.suppress(TimeoutError):
            with explained(f"{where} cannot meet the others ({{}}); {remedy}", RuntimeError, ValueError):
                return met.result(timeout=min(5, limit - waited))
    raise UserError(f"{where}: not all came within RENDEZVOUS_SECONDS={limit}; {remedy}")


def say(text: str, end: str = "\n"):
    """Print to the console while there is one: a reader like `head` may leave before the end."""
    encoding = sys.stdout.encoding or "utf-8"
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding), end=end, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python writes the rest when it ends


class Log:
    """Lines to the console and, once `open` has been called, to a file; from rank 0 only.

    Every line is flushed, so a killed run leaves its log."""

    def __init__(self, ranks: Ranks):
        self.main = ranks.main
        self.file: Any = io.StringIO()  # until there is a file

    def open(self, path: Path, mode: str):
        """Only now is an earlier log replaced: a run that fails its checks leaves it alone."""
        if self.main:
            early = self.file.getvalue()
            self.file = open(path, mode, encoding="utf-8", errors="backslashreplace")
            self.file.write(early)

    def __call__(self, line: str, console: bool = True, fleeting: bool = False):
        """On a terminal, the next line takes the place of a fleeting one, whose end may be cut off there."""
        if self.main:
            line = line.replace(os.path.expanduser("~") + os.sep, "~/")  # logs are published: no private paths
            self.file.write(line + "\n")
            self.file.flush()
            if console and sys.stdout.isatty():
                width = shutil.get_terminal_size().columns - 1 if fleeting else None
                say(f"{line[:width]}\033[K", end="\r" if fleeting else "\n")
            elif console:
                say(line)


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
        if self.ranks.cuda:
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
        "save": None,
        "subset": None,
        "diagnostic": None,
        "write": None,
    }

    def __init__(self, ranks: Ranks):
        self.ranks = ranks
        self.latest = "setup"  # the phase that began last
        self.seconds = collections.defaultdict(float)  # phase -> wall seconds so far

    @contextlib.contextmanager
    def __call__(self, name: str):
        """Time the block as part of phase `name`."""
        self.latest = name
        start = time.perf_counter()
        yield
        self.ranks.synchronize()  # what the block launched belongs to it
        self.seconds[name] += time.perf_counter() - start

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
            part.unlink(missing_ok=True)  # after the rename there is none


def try_path(path: Path, setting: str):
    """Raise UserError unless `path` can be written; what stands there is left as it is."""
    require(not path.is_dir(), f"{setting}={path}: a folder; name a file")
    trial = path.with_name(f"{path.name}.trial{os.getpid()}")
    with whole_file(trial, setting):
        pass
    trial.unlink()


def open_lock(path: Path) -> TextIO:
    """`path`, open and locked for this process; UserError while another has it. The operating system ends the lock with
    its process, so what a killed run leaves is taken over."""
    while True:
        file = open(path, "a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read() or "another process"
            busy = f"ARTIFACT_DIR={path.parent}: {owner} is writing there; wait for it, or name another folder"
            raise UserError(busy) from None
        except OSError:  # a file system without locks
            pass
        with contextlib.suppress(FileNotFoundError):
            if os.path.samefile(path, file.fileno()):
                break  # else its owner has just removed it
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}")
    file.flush()
    return file


@contextlib.contextmanager
def claimed(folder: Path):
    """Make the artifact's folder and keep other runs out of it. A block that fails leaves no empty folder of ours."""
    where = f"ARTIFACT_DIR={folder}"
    require(folder.is_dir() or not folder.exists(), f"{where}: a file, not a folder; name another, or move that away")
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    path = folder / "run.lock"
    with explained(f"{where}: cannot be written ({{}}); name another folder, or start in one to score", OSError):
        folder.mkdir(parents=True, exist_ok=True)
        lock = open_lock(path)
    try:
        yield
        made.clear()
    finally:
        path.unlink(missing_ok=True)
        lock.close()
        with contextlib.suppress(OSError):  # a folder that holds something stays
            for path in made:
                path.rmdir()


def clear_parts(path: Path):
    """Remove what `whole_file` left of `path` in processes that were killed; a run calls this before it writes."""
    for part in path.parent.glob(f"{glob.escape(path.name)}.part*"):
        pid = part.name.rpartition(".part")[2]
        if re.fullmatch(r"\d{1,9}", pid) and (int(pid) == os.getpid() or not is_alive(int(pid))):
            with contextlib.suppress(OSError):  # where nothing can be removed, the run says so when it writes
                part.unlink()


def is_alive(pid: int) -> bool:
    """Whether this machine runs a process of that number."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        pass
    return True


# ======== Data: shards, packed training batches, the validation stream ================================================

SHARD_MAGIC = 20240520
SHARD_HEADER_BYTES = 1024
# Contest sets by their tokens: the bytes that the published exports count.
CONTEST_SETS = {
    47_853_344: (151_080_645, 151_074_309),  # CaseOps
    40_540_160: (151_078_222,),  # plain SentencePiece
}
BEHIND_SPACE = "lossless_caps_caseops_v1"  # the published transform: a word's operator stands behind its space


def open_shard(path: Path) -> ndarray:
    """Memory-map the uint16 values of a shard; before them stand 256 little-endian int32: magic, 1, count, 0, ..."""
    header = np.fromfile(path, dtype="<i4", count=256)
    genuine = len(header) == 256 and header[:2].tolist() == [SHARD_MAGIC, 1]
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


class Joins(NamedTuple):
    """What JOIN_OPERATORS reads as one token."""

    space: int  # the token of a space alone
    joined: dict[int, int]  # token of an operator -> of the space and it

    def pairs(self, tokens: ndarray) -> ndarray:
        """Whether each token but the last is the space of a pair."""
        operators = np.isin(tokens[1:], list(self.joined), kind="sort")  # so few are compared one by one: the fastest
        return operators & (tokens[:-1] == self.space)


def operator_joins(cfg: Config) -> Joins | None:
    """The pairs that JOIN_OPERATORS joins; None without it.

    A space and TITLE become the token of byte 0xC0, a space and ALLCAPS that of 0xC1: UTF-8 never holds these bytes."""
    if not cfg.join_operators:
        return None
    sp = open_tokenizer(cfg)
    space, *operators = sp.piece_to_id(["\u2581", "\ue001", "\ue002"])
    spare = sp.piece_to_id(["<0xC0>", "<0xC1>"])
    require(
        sp.unk_id() not in [space, *operators] and all(sp.is_byte(spare)),
        f"JOIN_OPERATORS=1: {tokenizer_path(cfg)} is no CaseOps tokenizer with byte fallback; set JOIN_OPERATORS=0",
    )
    return Joins(space, dict(zip(operators, spare)))


def join_pairs(joins: Joins | None, tokens: ndarray, *sizes: ndarray) -> list[ndarray]:
    """`tokens` (uint16) with every pair as one token, and `sizes`, the bytes of each token, with those of both."""
    if joins is None:
        return [tokens, *sizes]
    pairs = joins.pairs(tokens)
    first = np.flatnonzero(pairs)
    kept = ~np.append(False, pairs)[: len(tokens)]  # all but the operators of pairs
    tokens, *sizes = (np.array(stream) for stream in (tokens, *sizes))
    for stream in sizes:
        stream[first] += stream[first + 1]
    for operator, token in joins.joined.items():
        tokens[first[tokens[first + 1] == operator]] = token
    return [stream[kept] for stream in (tokens, *sizes)]


@torch.no_grad()
def init_joined(embedding: Tensor, joins: Joins | None):
    """Rows of joined tokens start from their parts' (#2109): 0.4 of the space's and 0.6 of the operator's, as long as
    the operator's."""
    if joins is None:
        return
    operators = list(joins.joined)
    parts = 0.4 * embedding[joins.space] + 0.6 * embedding[operators]
    length = embedding[operators].norm(dim=1, keepdim=True)
    embedding[list(joins.joined.values())] = F.normalize(parts) * length


def train_blocks(cfg: Config, size: int = 1 << 20) -> list[tuple[Path, ndarray]]:
    """The training shards in name order, cut into blocks: (path of the shard, tokens). Blocks are joined one by one, so
    a pair across their border stays two tokens."""
    shards = [(path, open_shard(path)) for path in find_shards(Path(cfg.data_path), "fineweb_train_*.bin")]
    return [(path, shard[start : start + size]) for path, shard in shards for start in range(0, len(shard), size)]


@functools.lru_cache(1)
def count_pairs(cfg: Config) -> ndarray:
    """Pairs in each of `train_blocks`. Every shard is read, so it is done once, before the training clock starts."""
    joins = operator_joins(cfg)
    return np.array([np.count_nonzero(joins.pairs(tokens)) for _, tokens in train_blocks(cfg)])


class Seq(NamedTuple):
    """Where the sequences of a packed buffer lie. Attention is causal inside a sequence, whose last query and last key
    are the same token."""

    cu_q: Tensor  # int32 (sequences + 1,): where the queries of each sequence begin, then where the last one ends
    cu_k: Tensor  # int32 (sequences + 1,): the same for its keys; the same tensor unless a cache is read
    max_q: int  # no sequence has more queries
    max_k: int  # no sequence has more keys
    positions: Tensor  # int32 (tokens,): offset in the document; 0 means that no previous token may be seen

    @classmethod
    def packed(cls, starts: ndarray, span: int, longest: int, capacity: int) -> "Seq":
        """Documents that begin at `starts` (starts[0] == 0) and fill a buffer of `capacity` tokens, on the CPU.

        Each document is cut every `span` tokens; `longest` is the longest span of the run. Positions count from the
        document's start, not from the cut.
        """
        lengths = np.diff(np.append(starts, capacity))
        positions = np.arange(capacity) - np.repeat(starts, lengths)
        cuts = np.flatnonzero(positions % span == 0)  # every document begins at position 0
        cu = torch.from_numpy(np.append(cuts, capacity)).int()
        return cls(cu, cu, longest, longest, torch.from_numpy(positions).int())

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

        def offsets(before, length):
            """Where the two sequences of each row begin; `before` of its `length` tokens stand before the chunk."""
            outside = (before - begin).clamp(min=0).int()
            in_row = F.pad(outside[None], (1, 0))
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
    inputs: ndarray,  # (tokens,)
    targets: ndarray,  # (tokens,): what follows each input
    starts: ndarray,  # where documents begin; starts[0] == 0
    span: int,  # documents are cut every so many tokens
    longest: int,  # the longest span of the run
    capacity: int,  # tokens of the buffer, at least those given
    split: str,
) -> Batch:
    """Documents -> one CPU batch, padded to `capacity`.

    Padding is a document of its own: it attends to itself, so it is never NaN, no other token sees it, and its
    targets are -1, so it is never scored.
    """

    def padded(values, fill):
        values = torch.from_numpy(values.astype(np.int64))
        return F.pad(values, (0, capacity - len(values)), value=fill)

    if len(inputs) < capacity:
        starts = np.append(starts, len(inputs))
    seq = Seq.packed(starts, span, longest, capacity)
    return Batch(padded(inputs, 0), padded(targets, -1), seq, split)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Copy without waiting."""

    def move(t):
        if device.type == "cpu":
            return t
        return t.pin_memory().to(device, non_blocking=True)

    seq = batch.seq
    cu = move(seq.cu_q)  # of queries and keys: without a cache both lie alike
    seq = Seq(cu, cu, seq.max_q, seq.max_k, move(seq.positions))
    return Batch(move(batch.tokens), move(batch.targets), seq, batch.split)


class TrainStream:
    """The training tokens as one endless stream over all shards in name order: step s reads the same at any world size.

    The methods stand in the order in which a step calls them."""

    def __init__(self, cfg: Config):
        self.cfg = cfg
        self.blocks = train_blocks(cfg)
        self.joins = operator_joins(cfg)
        lengths = np.array([len(tokens) for _, tokens in self.blocks], np.int64)
        self.ends = np.cumsum(lengths - count_pairs(cfg) if self.joins else lengths)  # of each block, in the stream
        self.tokens = int(self.ends[-1]) if self.blocks else 0
        self.block = functools.lru_cache(2)(self.block)  # a block serves several micro-batches
        require(
            self.tokens > cfg.micro_batch_tokens,
            f"DATA_PATH={cfg.data_path}: {self.tokens} training tokens are fewer than one micro-batch; "
            "lower MICRO_BATCH_TOKENS or prepare more documents",
        )
        check_start(*self.blocks[0], cfg)
        first = dict(reversed(self.blocks))  # of each shard; `block` checks the others when their turn comes
        for path, tokens in self.blocks if cfg.check_only else first.items():
            check_tokens(path, tokens, cfg)

    def step(self, step: int, span: int, rank: int, world: int) -> list[Batch]:
        """This rank's micro-batches of a step: the global batch cut every MICRO_BATCH_TOKENS, dealt in turn."""
        total = self.cfg.train_batch_tokens
        micro = self.cfg.micro_batch_tokens
        cuts = range(rank * micro, total, world * micro)
        return [self.micro_batch(step * total + cut, min(micro, total - cut), span) for cut in cuts]

    def micro_batch(self, start: int, count: int, span: int) -> Batch:
        """Inputs [start, start + count) and their targets; a document already running at `start` begins anew there."""
        tokens = self.read(start, count + 1)
        starts = np.union1d(0, np.flatnonzero(tokens[:-1] == self.cfg.bos_id))
        capacity = self.cfg.micro_batch_tokens
        return pack_documents(tokens[:-1], tokens[1:], starts, span, self.cfg.train_seq_len, capacity, "train")

    def read(self, start: int, count: int) -> ndarray:
        """`count` tokens from position `start` of the endless stream, uint16."""
        pieces = []
        while count:
            start %= self.tokens  # another epoch
            i = int(np.searchsorted(self.ends, start, side="right"))  # the block that holds `start`
            before_end = start - self.ends[i]  # negative: counted from the block's end
            piece = self.block(i)[before_end:][:count]
            pieces.append(piece)
            start += len(piece)
            count -= len(piece)
        return np.concatenate(pieces)

    def block(self, i: int) -> ndarray:
        """The tokens of block i as the model reads them."""
        path, tokens = self.blocks[i]
        check_tokens(path, tokens, self.cfg)
        return join_pairs(self.joins, tokens)[0]


class Prefetch:
    """Builds the next step's batches in a thread. A change of span only wastes what was built for the earlier span."""

    def __init__(self, stream: TrainStream, ranks: Ranks):
        thread = ThreadPoolExecutor(1)
        self.submit = lambda step, span: thread.submit(stream.step, step, span, ranks.rank, ranks.world)
        self.device = ranks.device
        self.waiting = {}  # (step, span) -> future of its batches

    def __call__(self, step: int, span: int) -> list[Batch]:
        future = self.waiting.pop((step, span), None) or self.submit(step, span)
        self.waiting = {(step + 1, span): self.submit(step + 1, span)}  # the guess: no change of span
        return [to_device(batch, self.device) for batch in future.result()]


class ValidationStream:
    """The validation tokens, the original bytes of each, and the documents they form."""

    def __init__(self, cfg: Config):
        folder = Path(cfg.data_path)
        shards = folder / "fineweb_val_*.bin"
        self.tokens = np.concatenate([open_shard(path) for path in find_shards(folder, shards.name)])
        check_start(shards, self.tokens, cfg)
        check_tokens(shards, self.tokens, cfg)
        sidecars = find_shards(folder, "fineweb_val_bytes_*.bin", required=False)
        if sidecars:
            self.byte_source = "sidecar"
            self.bytes = np.concatenate([open_shard(path) for path in sidecars])
        else:
            self.byte_source = "tokenizer"
            self.bytes = tokenizer_bytes(cfg, self.tokens)
        again = "prepare tokens and bytes again, in one go"
        aligned = len(self.bytes) == len(self.tokens)
        require(
            aligned and not self.bytes[self.tokens == cfg.bos_id].any(),
            f"{folder}: the byte {self.byte_source} must give bytes for every token, and none for BOS; {again}",
        )
        require(self.bytes.any(), f"{shards}: no text to score, its tokens have 0 bytes; {again}")
        self.index(cfg)

    def index(self, cfg: Config):
        """Count the targets, and find the documents."""
        self.targets = len(self.tokens) - 1  # target i is token i + 1
        self.starts = np.flatnonzero(self.tokens == cfg.bos_id)
        # Inputs of each document. The target of its last input is the next document's BOS.
        self.lengths = np.diff(np.append(self.starts, self.targets))

    def join(self, cfg: Config):
        """Read the pairs of JOIN_OPERATORS as one token each. The data was identified by its tokens as they are."""
        self.tokens, self.bytes = join_pairs(operator_joins(cfg), self.tokens, self.bytes)
        self.index(cfg)

    @property
    def target_bytes(self) -> ndarray:
        """Bytes of target i, the token at i + 1."""
        return self.bytes[1:]


def check_start(path: Path, tokens: ndarray, cfg: Config):
    """The first token of a stream begins a document."""
    require(
        cfg.bos_id in tokens[:1],
        f"{path}: the first token is {tokens[:1]}, not BOS_ID={cfg.bos_id}; prepare the data again",
    )


def check_tokens(path: Path, tokens: ndarray, cfg: Config):
    """Every token is in the vocabulary."""
    highest = tokens.max(initial=0)
    require(
        highest < cfg.vocab_size,
        f"{path}: token {highest} is outside VOCAB_SIZE={cfg.vocab_size}; "
        "set VOCAB_SIZE or use shards of the right tokenizer",
    )


def tokenizer_file(cfg: Config) -> Path:
    """TOKENIZER_PATH, or tokenizer.model beside the shards, whether it is there or not."""
    return Path(cfg.tokenizer_path) if cfg.tokenizer_path else Path(cfg.data_path) / "tokenizer.model"


def tokenizer_path(cfg: Config) -> Path:
    """tokenizer_file; UserError where there is no such file."""
    path = tokenizer_file(cfg)
    require(path.is_file(), f"TOKENIZER_PATH={path}: no such file")
    return path


def open_tokenizer(cfg: Config):
    """The SentencePieceProcessor at `tokenizer_path`; UserError where it has another number of pieces."""
    sentencepiece = installed("sentencepiece")
    path = tokenizer_path(cfg)
    with explained(f"TOKENIZER_PATH={path}: not a SentencePiece model, or a damaged one", RuntimeError, OSError):
        sp = sentencepiece.SentencePieceProcessor(model_file=str(path))
    pieces = sp.vocab_size()
    require(pieces == cfg.vocab_size, f"TOKENIZER_PATH={path}: {pieces} pieces, VOCAB_SIZE={cfg.vocab_size}")
    return sp


def tokenizer_bytes(cfg: Config, tokens: ndarray) -> ndarray:
    """Bytes of each token from the pieces of a plain tokenizer, uint16: for data without a sidecar.

    A control token has 0 bytes, a byte-fallback token 1, and white space 1. Many tokenizers put a space of their own
    before a document or behind it: it does not count, since the text does not have it."""
    sp = open_tokenizer(cfg)
    ids = list(range(cfg.vocab_size))
    special = np.any([sp.is_control(ids), sp.is_unused(ids)], axis=0)
    mark = "\u2581" if "\u2581" in sp.normalize("a a") else " "  # how pieces spell white space
    texts = [piece.replace(mark, " ") for piece in sp.id_to_piece(ids)]
    sizes = np.array([len(text.encode()) for text in texts], np.uint16)
    sizes[sp.is_byte(ids)] = 1
    sizes[special] = 0
    counts = sizes[tokens]  # (tokens,)
    opens = np.char.startswith(texts, " ")[tokens]
    closes = np.char.endswith(texts, " ")[tokens]
    own = sp.normalize("a")
    if sp.is_unknown(sp.piece_to_id(mark)):  # then the bytes of the mark spell a space; one of them counts
        spelling = [sp.piece_to_id(f"<0x{byte:02X}>") for byte in mark.encode()]
        last = len(spelling) - 1
        begins = np.all([np.roll(tokens, -i) == byte for i, byte in enumerate(spelling)], axis=0)
        for i in range(len(spelling)):
            counts[np.roll(begins, i)] = i == (last if own.endswith(mark) else 0)
        opens |= begins
        closes |= np.roll(begins, last)
    case_marks = sp.piece_to_id(["\ue001", "\ue002", "\ue003", "\ue004"])  # of CaseOps: they stand for no bytes
    require(
        all(sp.is_unknown(case_marks)) and sp.unk_id() not in tokens,
        f"DATA_PATH={cfg.data_path}: a CaseOps tokenizer, or text unknown to the tokenizer, needs a byte sidecar, "
        "fineweb_val_bytes_*.bin; prepare the data again",
    )
    # The token behind or before a control token; the ends of the stream lie beside its first BOS.
    if own.startswith(mark):
        counts -= np.roll(special[tokens], 1) & opens & (counts > 0)
    if own.endswith(mark):
        counts -= np.roll(special[tokens], -1) & closes & (counts > 0)
    return counts


def fingerprint(cfg: Config, val: ValidationStream) -> dict:
    """What identifies the data, for the log and result.json; first it must be what its manifest says."""
    size = int(val.bytes.sum(dtype=np.int64))
    # The contest's validation set has the first 50,000 documents of FineWeb.
    contest = size in CONTEST_SETS.get(len(val.tokens), ()) and len(val.starts) == 50_000
    manifest = Path(cfg.data_path) / "manifest.json"
    model = tokenizer_file(cfg)
    facts = {
        "val_tokens": len(val.tokens),
        "val_targets": val.targets,
        "val_documents": len(val.starts),
        "val_bytes": size,
        "byte_source": val.byte_source,
        "vocab_size": cfg.vocab_size,
        "bos_id": cfg.bos_id,
        "val_sha256": sha256(np.ascontiguousarray(val.tokens)),  # however the tokens are cut into shards
        "tokenizer_sha256": sha256(model.read_bytes()) if model.is_file() else None,
        "dataset": "contest" if contest else "other",
        "manifest": os.path.lexists(manifest),
    }
    return facts | check_manifest(cfg, manifest, facts) if facts["manifest"] else facts


class TrainingHashes:
    """Holds the training shards against the SHA-256 of the manifest, in a thread: gigabytes take a minute, which passes
    while the model trains."""

    def __init__(self, cfg: Config):
        manifest = Path(cfg.data_path) / "manifest.json"
        files = json.loads(manifest.read_text(encoding="utf-8"))["files"] if manifest.is_file() else {}
        self.promised = {manifest.with_name(name): file["sha256"] for name, file in files.items() if "train" in name}
        self.other = []  # shards that are not what the manifest promises
        self.thread = threading.Thread(target=self.compare, daemon=True)
        self.thread.start()

    def compare(self):
        for path, promised in self.promised.items():
            # Hashed in one call, which leaves the interpreter to the training steps.
            if not path.is_file() or sha256(np.memmap(path, np.uint8, "r")) != promised:
                self.other.append(path.name)

    def judge(self, verdicts: Verdicts):
        """Wait for the thread, and say what was compared."""
        self.thread.join()
        reason = "shown by tools/audit.py; no training shard has been held against a manifest.json"
        if self.promised:
            reason = f"shown by tools/audit.py; validation, tokenizer and {len(self.promised)} training shards have "
            reason += "the SHA-256 of manifest.json"
        verdicts.set("data", "NOT RUN", reason)
        if self.other:
            verdicts.set("data", "FAIL", f"not the files that manifest.json describes: {', '.join(self.other)}")


def check_manifest(cfg: Config, manifest: Path, facts: dict) -> dict:
    """Raise UserError unless the data is as its manifest says; return the manifest's transform.

    Checked are counts, vocabulary and BOS; validation files and tokenizer by hash, training shards by their names and
    lengths. TrainingHashes follows."""
    damaged = f"{manifest}: damaged, or not written by prepare_data.py; prepare the data again"
    require(manifest.is_file(), damaged)  # a folder, or a link to nothing
    with explained(damaged, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        promised = json_object(manifest.read_bytes())
        theirs = {f"val_{key}": promised["val"][key] for key in ("tokens", "documents", "bytes")}
        theirs |= {key: promised[key] for key in ("vocab_size", "bos_id")}
        for key, value in theirs.items():
            require(
                value in (None, facts[key]),
                f"{manifest}: promises {key} {value}, here it is {facts[key]}; "
                "prepare the data again, or set VOCAB_SIZE and BOS_ID",
            )
        for name, file in promised["files"].items():
            path = manifest.parent / name
            plain = path.name == name and name.isprintable()  # no way to a file outside the folder
            require(plain, f"{manifest}: names {name!r}, which is no file of its folder; prepare the data again")
            require(path.is_file(), f"{path}: promised by manifest.json, not there; prepare the data again")
            if "train" in name:  # hashing gigabytes would take minutes
                intact = len(open_shard(path)) == file["tokens"]
            else:
                intact = sha256(path.read_bytes()) == file["sha256"]
            require(intact, f"{path}: not the file that manifest.json describes; fetch or prepare it again")
        for path in find_shards(manifest.parent, "fineweb_train_*.bin", required=False):
            require(
                path.name in promised["files"], f"{path}: not in manifest.json; move it away or prepare the data again"
            )
        require(
            facts["tokenizer_sha256"] == promised["tokenizer"]["sha256"],
            f"TOKENIZER_PATH={tokenizer_path(cfg)}: not the tokenizer that made these shards ({manifest})",
        )
        transform = promised["transform"]
        require(
            transform == BEHIND_SPACE or not cfg.join_operators,
            f"JOIN_OPERATORS=1: {manifest} names the transform {transform}, not {BEHIND_SPACE}; set JOIN_OPERATORS=0",
        )
        return {"transform": transform}


# ======== Kernels: each stands below its plain PyTorch reference, and every public function picks one of the two ======
# A training step launches these kernels and cuBLAS; nothing else is compiled. In every kernel `ok` excludes the rows
# beyond the last token, `col` counts the columns of a tile, and rows are int64, since row times width may exceed 2^31.

try:
    import triton
    import triton.language as tl
    from triton.language import constexpr
    from triton.tools.tensor_descriptor import TensorDescriptor

    INTERPRET = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1: the kernels run on the CPU, for tests
except ImportError:  # without Triton only the references run; the kernels are defined and stay plain functions
    tl = SimpleNamespace()
    constexpr = int
    triton = SimpleNamespace(jit=lambda fn, **_: fn)
    INTERPRET = None
kernel = functools.partial(triton.jit, do_not_specialize=["T"])  # compiled once for every number of tokens
HEAD_TILE = 1024  # elements of heads per program of 4 warps
STREAM_ROWS = 4  # rows of d elements per tile of 4 warps
STREAM_PROGRAMS = 4  # programs per multiprocessor


@functools.cache
def processors(device: torch.device, least: int = 8) -> int:
    """The number of multiprocessors of a GPU of compute capability `least` (8: Ampere, 9: Hopper) or more.
    2 where Triton interprets the kernels, 0 where they cannot run."""
    if INTERPRET:
        return 2
    if INTERPRET is None or device.type != "cuda":
        return 0
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count if properties.major >= least else 0


def use_kernels(dtype: torch.dtype, device: torch.device, width: int = 16, least: int = 8) -> bool:
    """Whether the Triton kernels take activations of that dtype. `width`, of a head or of the stream, must be a power
    of two; `least` is the compute capability that the kernel needs."""
    power_of_two = width & (width - 1) == 0
    return dtype == torch.bfloat16 and power_of_two and processors(device, least) > 0


def empty_like(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Contiguous tensors of the same shapes, unset."""
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors)


def contiguous(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors, copied where they are not contiguous."""
    return tuple(None if t is None else t.contiguous() for t in tensors)


@triton.jit
def rows_from(first, ROWS: constexpr):
    """first .. first + ROWS - 1 (ROWS,) int64."""
    return (first + tl.arange(0, ROWS)).to(tl.int64)


@triton.jit
def columns(WIDTH: constexpr):
    """0 .. WIDTH - 1 (1, WIDTH)."""
    return tl.arange(0, WIDTH)[None, :]


@triton.jit
def load_fp32(ptrs, ok):
    """The numbers at `ptrs` in fp32; 0 where not `ok`."""
    return tl.load(ptrs, mask=ok, other=0.0).to(tl.float32)


@triton.jit
def bf16(x):
    """fp32 numbers rounded to bf16, the dtype in which the reference holds them."""
    return x.to(tl.bfloat16).to(tl.float32)


@triton.jit
def row_dot(x, y):
    """x . y of each row of two tiles (rows, D), as (rows, 1)."""
    return tl.sum(x * y, 1)[:, None]


@triton.jit
def inverse_rms(x, D: constexpr, eps):
    """r = 1 / sqrt(mean(x^2) + eps) of each row of x (rows, D), as (rows, 1). The row's RMSNorm is n = r x."""
    return tl.rsqrt(row_dot(x, x) / D + eps)


@triton.jit
def norm_gradient(x, dn, scale, D: constexpr, eps):
    """dx = scale r (dn - x r^2 (x . dn) / D) for rows x (rows, D) and the gradient dn of scale r x."""
    r = inverse_rms(x, D, eps)
    return scale * r * (dn - x * (r * r * row_dot(x, dn) / D))


# --- MLP: down(leaky_relu(up(x))^2) ---
# With p = x @ w_up.T (the pre-activation) and hidden = leaky_relu(p)^2:
#     d hidden / d p = 2 leaky_relu(p) leaky_relu'(p) = 2 sqrt(hidden)            where p >= 0
#                                                     = -2 slope sqrt(hidden)     where p < 0
# So backward needs hidden and the sign of p, not p itself. The kernel keeps the sign in the last bit of hidden's bf16:
# - A bf16 is the upper half of an fp32. Let t be the upper half of hidden's fp32, read as an integer. In units of the
#   last place, hidden lies in [t, t + 1).
# - Numbers that end in the wanted bit are two units apart. If t ends in it, t is the nearest of them, less than one
#   unit below; otherwise t + 1 is, at most one unit above.
# - Both cases are equally likely, so the errors spread evenly over (-1, 1]: their mean is zero.


def mlp_reference(x, w_up, w_down, slope):
    """`mlp` in plain PyTorch."""
    hidden = F.leaky_relu(F.linear(x, w_up), slope).square()
    return F.linear(hidden, w_down), hidden.detach()


@triton.jit
def upper_halves(first, second):
    """Two tiles of fp32, both cut to bf16 -> one tile of int32, `first` in the lower half as in memory."""
    first_bits = first.to(tl.int32, bitcast=True)
    second_bits = second.to(tl.int32, bitcast=True)
    return ((first_bits >> 16) & 0xFFFF) | (second_bits & -65536)  # -65536 is 0xFFFF0000


@triton.jit
def hidden_words(p0, p1, slope):
    """Two tiles of pre-activations, fp32 -> both leaky_relu(p)^2 in bf16, each with the sign of its p as last bit, in
    one tile of int32. 0 <= slope <= 1."""
    LAST_BITS: constexpr = 0x00010001  # of both halves
    leaky0 = tl.maximum(p0, slope * p0)
    leaky1 = tl.maximum(p1, slope * p1)
    cut = upper_halves(leaky0 * leaky0, leaky1 * leaky1)
    signs = (upper_halves(p0, p1) >> 15) & LAST_BITS
    # t + 1 - s, its last bit cleared, is t or t + 1 rounded down to even (s = 1) or up to even (s = 0); then s is set.
    # Squares are positive, so the lower half is at most 0x7FFF: adding 1 never carries into the upper one.
    return ((cut + LAST_BITS - signs) & ~LAST_BITS) | signs


@triton.jit
def times_hidden_slope(d_hidden, hidden_bits, negative, slope):
    """d_hidden * d hidden / d p, from the fp32 bits of hidden and the bit that is set where p < 0."""
    root = tl.sqrt(hidden_bits.to(tl.float32, bitcast=True))
    return d_hidden * root * tl.where(negative != 0, -2 * slope, 2.0)


@kernel
def mlp_gemm_kernel(
    a_desc,  # (T, K) bf16: x; backward: d_out
    b_desc,  # (N, K) bf16: w_up; backward (K, N): w_down
    hidden_desc,  # (T, N / 2) int32, pairs of bf16: written; backward: read
    d_pre_desc,  # (T, N) bf16: written by backward only
    slope,
    T,
    N: constexpr,
    K: constexpr,
    BACKWARD: constexpr,
    BLOCK_M: constexpr,
    BLOCK_N: constexpr,
    BLOCK_K: constexpr,
):
    """Forward: p = a @ b.T, hidden = leaky_relu(p)^2. Backward: d_pre = (a @ b) * d hidden / d p.

    A program computes tiles (BLOCK_M, BLOCK_N), one after another: the next tile's loads are under way during the
    epilogue, which works on two halves to leave them shared memory."""
    tiles_n: constexpr = N // BLOCK_N
    HALF: constexpr = BLOCK_N // 2
    tiles = tl.cdiv(T, BLOCK_M) * tiles_n
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        m = tile // tiles_n * BLOCK_M
        n = tile % tiles_n * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, K, BLOCK_K):
            a = a_desc.load([m, k])
            if BACKWARD:
                acc = tl.dot(a, b_desc.load([k, n]), acc)
            else:
                acc = tl.dot(a, b_desc.load([n, k]).T, acc)
        halves = acc.reshape(BLOCK_M, 2, HALF).permute(0, 2, 1).split()
        for i in tl.static_range(2):
            # Neighbouring columns sit in one thread: splitting and joining them moves no data.
            even, odd = halves[i].reshape(BLOCK_M, HALF // 2, 2).split()
            col = n + i * HALF
            if BACKWARD:
                word = hidden_desc.load([m, col // 2])
                d_even = times_hidden_slope(even, word << 16, word & 1, slope)
                d_odd = times_hidden_slope(odd, word & -65536, word & 0x10000, slope)
                d_pre = tl.join(d_even, d_odd).reshape(BLOCK_M, HALF)
                d_pre_desc.store([m, col], d_pre.to(tl.bfloat16))
            else:
                hidden_desc.store([m, col // 2], hidden_words(even, odd, slope))


class MLPTile(NamedTuple):
    """How a program of `mlp_gemm_kernel` works, and how many of them there are."""

    block_m: int  # rows of the product
    block_n: int  # columns of the product
    block_k: int  # terms of its sums at a time
    warps: int
    stages: int  # loads under way at once
    programs: int  # per multiprocessor


# The fastest of those that `python -m tools.bench kernels` measured on an H200 (logs/bench/h200_tiles.log).
MLP_TILES = {
    "forward": MLPTile(128, 128, 64, warps=8, stages=3, programs=2),
    "backward": MLPTile(128, 128, 32, warps=4, stages=5, programs=2),
}


def mlp_gemm(
    a: Tensor,
    b: Tensor,
    hidden: Tensor,
    d_pre: Tensor | None,
    slope: float,
    tile: MLPTile | None = None,
) -> None:
    """Launch `mlp_gemm_kernel`, backward if there is a `d_pre`: fill d_pre (T, N), otherwise hidden (T, N).
    a (T, K); b (N, K), backward (K, N); all bf16 and contiguous."""
    backward = d_pre is not None
    T, K = a.shape
    N = hidden.size(1)
    tile = tile or MLP_TILES["backward" if backward else "forward"]
    block_m, block_n, block_k, warps, stages, programs = tile
    block_n = min(block_n, N & -N)  # N & -N is the largest power of two that divides N:
    block_k = min(block_k, K & -K)  # every width of a model has a tile, if not a fast one
    tiles = triton.cdiv(T, block_m) * (N // block_n)
    grid = (min(processors(a.device) * programs, tiles),)
    describe = TensorDescriptor.from_tensor
    words = describe(hidden.view(torch.int32), [block_m, block_n // 4])
    mlp_gemm_kernel[grid](
        describe(a, [block_m, block_k]),
        describe(b, [block_k, block_n] if backward else [block_n, block_k]),
        words,
        describe(d_pre, [block_m, block_n // 2]) if backward else words,
        slope,
        T,
        N=N,
        K=K,
        BACKWARD=backward,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        num_warps=warps,
        num_stages=stages,
    )


class MLP(torch.autograd.Function):
    """`mlp` through the fused products and cuBLAS; bf16."""

    @staticmethod
    def forward(ctx, x, w_up, w_down, slope):
        x, w_up, w_down = contiguous(x, w_up, w_down)
        hidden = x.new_empty(len(x), len(w_up))
        mlp_gemm(x, w_up, hidden, None, slope)
        ctx.save_for_backward(x, w_up, w_down, hidden)
        ctx.slope = slope
        ctx.mark_non_differentiable(hidden)
        ctx.set_materialize_grads(False)  # else hidden's gradient would be 0.4 GB of zeros
        return F.linear(hidden, w_down), hidden

    @staticmethod
    def backward(ctx, d_out, _):
        x, w_up, w_down, hidden = ctx.saved_tensors
        need_x, need_up, need_down, _ = ctx.needs_input_grad  # test-time training freezes the weights
        if need_x or need_up:
            d_pre = torch.empty_like(hidden)
            mlp_gemm(d_out.contiguous(), w_down, hidden, d_pre, ctx.slope)
        dx = d_pre @ w_up if need_x else None
        d_up = d_pre.T @ x if need_up else None
        d_down = d_out.T @ hidden if need_down else None
        return dx, d_up, d_down, None


def mlp(x: Tensor, w_up: Tensor, w_down: Tensor, slope: float) -> tuple[Tensor, Tensor]:
    """x (T, d), w_up (h, d), w_down (d, h), all of one dtype -> out (T, d) and hidden (T, h). Observers get hidden;
    it has no gradient.

    The kernel keeps one tensor for backward, hidden, instead of hidden and pre-activation: 0.4 GB less per layer of
    98,304 tokens."""
    fits = w_up.size(0) % 64 == 0 and w_up.size(1) % 16 == 0  # the least sides of a tile
    if fits and use_kernels(x.dtype, x.device, least=9):  # tensor memory accelerator and wgmma: Hopper
        return MLP.apply(x, w_up, w_down, slope)
    return mlp_reference(x, w_up, w_down, slope)


# --- Cross-entropy of softcapped logits ---
# For one row of logits z, target y and cap c:
#     l_j = c tanh(z_j / c)
#     nll = ln(sum_j exp(l_j)) - l_y
#     d nll / d z_j = (exp(l_j) / sum_k exp(l_k) - [j = y]) (1 - tanh(z_j / c)^2)
# The kernel subtracts no maximum from l: |l_j| <= c, so the sum of V terms is at most V exp(c), which fp32 holds
# (up to exp(88.7)) for c <= 79 at V = 8,192.


def softcap(z: Tensor, cap: float | Tensor) -> Tensor:
    """z -> cap tanh(z / cap), fp32. A tensor `cap` (2,) holds one for positive z and one for the rest (#1923)."""
    z = z.float()
    if not isinstance(cap, Tensor):
        return cap * torch.tanh(z / cap)
    above, below = (c * torch.tanh(z / c) for c in cap.unbind(0))
    return torch.where(z > 0, above, below)


def of_tokens(logits: Tensor, tokens: Tensor) -> Tensor:
    """From each row of logits (T, V) that of its token: (T,)."""
    return logits.gather(1, tokens[:, None])[:, 0]


def softcap_nll_reference(z, targets, cap):
    """`softcap_nll` in plain PyTorch."""
    logits = softcap(z, cap)
    lse = logits.logsumexp(-1)
    return lse - of_tokens(logits, targets), lse.detach()


@triton.jit
def tanh_of(doubled):
    """tanh(x), to 3e-7, from doubled = 2 x log2(e), so that 2^doubled = exp(2x):

    tanh(x) = 1 - 2 / (exp(2x) + 1) = 1 - 1 / (2^(doubled - 1) + 1/2).
    rsqrt(y)^2 is 1 / y without the range checks of a division."""
    r = tl.rsqrt(tl.exp2(doubled - 1.0) + 0.5)
    return 1.0 - r * r


@kernel
def softcap_nll_kernel(
    z_ptr,  # (T, V)
    target_ptr,  # (T,) int64
    row_grad_ptr,  # (T,) fp32: the gradients of nll; None: ones
    nll_ptr,  # (T,) fp32, written
    lse_ptr,  # (T,) fp32, written: ln(sum_j exp(l_j))
    dz_ptr,  # (T, V), written; may be z itself; None: no gradient
    cap,
    V: constexpr,
    BLOCK: constexpr,
):
    """One row per program, held in registers: z is read once and dz written once. BLOCK: from V the next power of 2."""
    LOG2E: constexpr = 1.4426950408889634
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row).to(tl.int32)
    to_doubled = 2 * LOG2E / cap  # z to_doubled = 2 (z / cap) log2(e)
    to_log2 = cap * LOG2E  # 2^(t to_log2) = exp(cap t)
    z_target = tl.load(z_ptr + row * V + target).to(tl.float32)
    logit_target = cap * tanh_of(z_target * to_doubled)
    col = tl.arange(0, BLOCK)
    z = load_fp32(z_ptr + row * V + col, col < V)
    t = tanh_of(z * to_doubled)
    e = tl.exp2(t * to_log2)
    if V != BLOCK:
        e = tl.where(col < V, e, 0.0)
    total = tl.sum(e, 0)
    lse = tl.log(total)
    tl.store(nll_ptr + row, lse - logit_target)
    tl.store(lse_ptr + row, lse)
    if dz_ptr is not None:
        scale = 1.0 if row_grad_ptr is None else tl.load(row_grad_ptr + row)
        d_logit = e * (scale / total) - tl.where(col == target, scale, 0.0)
        dz = d_logit * (1.0 - t * t)
        tl.store(dz_ptr + row * V + col, dz, mask=col < V)


def launch_softcap_nll(z, targets, cap, row_grad=None, dz=None) -> tuple[Tensor, Tensor]:
    """-> nll (T,), lse (T,), both fp32; fills dz (T, V), if given, by row_grad (T,) fp32. z (T, V) contiguous."""
    T, V = z.shape
    nll = z.new_empty(T, dtype=torch.float32)
    lse = torch.empty_like(nll)
    block = triton.next_power_of_2(V)
    warps = min(32, max(1, block // 1024))
    softcap_nll_kernel[(T,)](z, targets, row_grad, nll, lse, dz, cap, V, block, num_warps=warps)
    return nll, lse


def fuses_softcap(like: Tensor, vocab: int, cap: float | Tensor) -> bool:
    """Whether the kernel serves logits of `like`'s dtype and device: one cap, and vocab exp(cap) within fp32."""
    if isinstance(cap, Tensor):
        return False
    log_largest_sum = cap + math.log(vocab)
    return log_largest_sum < 88 and use_kernels(like.dtype, like.device)


class SoftcapNLL(torch.autograd.Function):
    """`softcap_nll` through the kernel."""

    @staticmethod
    def forward(ctx, z, targets, cap):
        z = z.contiguous()
        nll, lse = launch_softcap_nll(z, targets, cap)
        ctx.save_for_backward(z, targets)
        ctx.cap = cap
        ctx.mark_non_differentiable(lse)
        return nll, lse

    @staticmethod
    def backward(ctx, d_nll, _):
        z, targets = ctx.saved_tensors
        dz = torch.empty_like(z)
        launch_softcap_nll(z, targets, ctx.cap, row_grad=d_nll.float().contiguous(), dz=dz)
        return dz, None, None


def softcap_nll(z: Tensor, targets: Tensor, cap: float | Tensor) -> tuple[Tensor, Tensor]:
    """z (T, V) before the softcap, targets (T,) int64 -> nats (T,) and log-sum-exp (T,), both fp32.

    Gradients reach z through the nats; the log-sum-exp has none. Two caps (a tensor, see `softcap`) have gradients,
    too, and always take the plain path."""
    if fuses_softcap(z, z.size(1), cap):
        return SoftcapNLL.apply(z, targets, cap)
    return softcap_nll_reference(z, targets, cap)


class HeadLoss(torch.autograd.Function):
    """`head_loss`: the forward pass overwrites the logits with the loss's gradient by them."""

    @staticmethod
    def forward(ctx, x, w, targets, cap, weight):
        z = F.linear(x, w)
        nll, _ = launch_softcap_nll(z, targets, cap, row_grad=weight, dz=z)
        ctx.save_for_backward(x, w, z)
        return torch.dot(nll, weight)

    @staticmethod
    def backward(ctx, d_loss):
        x, w, dz = ctx.saved_tensors
        need_x, need_w, *_ = ctx.needs_input_grad
        # The scalar d_loss commutes with the products: it multiplies (V, d) numbers instead of the (T, V) of dz.
        dx = dz @ (w * d_loss) if need_x else None
        dw = (dz.T @ x) * d_loss if need_w else None
        return dx, dw, None, None, None


def head_loss(x: Tensor, w: Tensor, targets: Tensor, cap: float | Tensor, weight: Tensor) -> Tensor:
    """The sum over rows of weight (T,) fp32 times `softcap_nll` of x (T, d) @ w (V, d).T; a scalar, for training.

    The logits cross memory twice (one read, one write) instead of three times, and one (T, V) buffer lives instead of
    two (1.6 GB each at T = 98,304)."""
    differentiable = torch.is_grad_enabled() and (x.requires_grad or w.requires_grad)
    if differentiable and fuses_softcap(x, len(w), cap):
        return HeadLoss.apply(x, w, targets, cap, weight)
    nats, _ = softcap_nll(F.linear(x, w), targets, cap)
    return torch.dot(nats, weight)


# --- Heads of a packed QKV product: RMSNorm of q and k, partial RoPE, gain of q ---
# A row of qkv, that is one token, and the number of each head:
#
#     | q of head 0 | ... | q of head H-1 | k of head 0 | ... | k of head KV-1 | v of head 0 | ... | v of head KV-1 |
#       0                   H-1             H                   H+KV-1           H+KV                H+2KV-1
#
# A head x of q or k, D wide, is normed, rotated by the angles of its token and scaled, where g = 1 for k:
#
#     | a: N | b: N | rest: D-2N |  ->  | a cos + b sin: N | b cos - a sin: N | rest: D-2N |      this is R x
#     y = g R n   with   n = r x   and   r = 1 / rms(x) = 1 / sqrt(mean(x^2) + eps)
#
# Backward. R is a rotation: its inverse is its transpose R', the same with -sin. So n = R' y / g, and dn = g R' dy.
# RMSNorm has dx = r (dn - n (n . dn) / D), and n . dn = (R' y) . (R' dy) = y . dy. Both terms are rotated back, thus
#
#     dx = R' (r g dy - r (y . dy) / (D g) y),   and for q   dg = sum over tokens of (R n) . dy = sum of (y . dy) / g


def qkv_heads_reference(qkv, gain, cos, sin, kv_heads, copies, eps):
    """`qkv_heads` in plain PyTorch."""
    H = gain.numel()
    n = cos.size(1)
    cos = cos[:, None]
    sin = sin[:, None]
    heads = qkv.unflatten(1, (H + 2 * kv_heads, -1))
    D = heads.size(2)
    normed = F.rms_norm(heads[:, :-kv_heads].float(), (D,), eps=eps)
    a, b, rest = normed.split((n, n, D - 2 * n), dim=-1)
    rotated = (a * cos + b * sin, b * cos - a * sin, rest)
    q, k = torch.cat(rotated, dim=-1).split((H, kv_heads), dim=1)
    q = (q * gain[:, None]).to(qkv.dtype)
    k = k.to(qkv.dtype).repeat_interleave(copies, 1)
    v = heads[:, -kv_heads:]
    return q, k, v.repeat_interleave(copies, 1), v


@triton.jit
def head_and_tokens(HEADS: constexpr, BLOCK: constexpr):
    """-> the head and the tokens (BLOCK, 1) of this program. Neighbouring programs take heads of the same tokens."""
    pid = tl.program_id(0)
    return pid % HEADS, rows_from(pid // HEADS * BLOCK, BLOCK)[:, None]


@triton.jit
def store_rotated(out_ptr, x, a, b, cos, sin, ok, D: constexpr, N: constexpr):
    """Store R x for rows x (BLOCK, D), whose first 2N columns stand apart in a and b (BLOCK, N)."""
    col = columns(D)
    pair = columns(N)
    tl.store(out_ptr + col, x, mask=ok & (col >= 2 * N))
    tl.store(out_ptr + pair, a * cos + b * sin, mask=ok)
    tl.store(out_ptr + N + pair, b * cos - a * sin, mask=ok)


@kernel
def qkv_heads_kernel(
    qkv_ptr,  # (T, H + 2 KV, D)
    gain_ptr,  # (H,) fp32
    cos_ptr,  # (T, N) fp32
    sin_ptr,  # (T, N) fp32
    q_ptr,  # (T, H, D), written
    k_ptr,  # (T, KV, COPIES, D), written
    v_ptr,  # (T, KV, COPIES, D), written
    rstd_ptr,  # (T, H + KV) fp32, written: r of the heads of q and k
    T,
    eps,
    H: constexpr,
    KV: constexpr,
    COPIES: constexpr,
    D: constexpr,
    N: constexpr,
    BLOCK: constexpr,
):
    """One head of BLOCK tokens per program: y = g R n for q and k, v as it is."""
    HEADS: constexpr = H + 2 * KV
    head, token = head_and_tokens(HEADS, BLOCK)
    is_query = head < H
    is_value = head >= H + KV
    ok = token < T
    col = columns(D)
    pair = columns(N)
    x_ptr = qkv_ptr + (token * HEADS + head) * D
    x = tl.load(x_ptr + col, mask=ok, other=0.0)  # not widened: v is stored as it is
    if is_value:
        copies_ptr = v_ptr + (token * KV + head - H - KV) * COPIES * D
        for c in tl.static_range(COPIES):
            tl.store(copies_ptr + c * D + col, x, mask=ok)
    else:
        wide = x.to(tl.float32)
        rstd = inverse_rms(wide, D, eps)
        tl.store(rstd_ptr + token * (H + KV) + head, rstd, mask=ok)
        gain = tl.load(gain_ptr + head) if is_query else 1.0
        scale = rstd * gain
        y = wide * scale
        # The halves come once more, from the L1 cache: to cut them out of the tile would move data between threads.
        a = load_fp32(x_ptr + pair, ok) * scale
        b = load_fp32(x_ptr + N + pair, ok) * scale
        cos = load_fp32(cos_ptr + token * N + pair, ok)
        sin = load_fp32(sin_ptr + token * N + pair, ok)
        if is_query:
            store_rotated(q_ptr + (token * H + head) * D, y, a, b, cos, sin, ok, D, N)
        else:
            copies_ptr = k_ptr + (token * KV + head - H) * COPIES * D
            for c in tl.static_range(COPIES):
                store_rotated(copies_ptr + c * D, y, a, b, cos, sin, ok, D, N)


@triton.jit
def load_sum(ptr, offset, ok, COPIES: constexpr, D: constexpr):
    """The sum of a tile's COPIES, D elements apart, fp32."""
    total = load_fp32(ptr + offset, ok)
    for c in tl.static_range(1, COPIES):
        total += load_fp32(ptr + c * D + offset, ok)
    return total


@triton.jit
def load_head(ptr, ok, COPIES: constexpr, D: constexpr, N: constexpr):
    """The sums of COPIES heads at ptr (BLOCK, 1): all D columns, and again, from the L1 cache, the halves a and b."""
    pair = columns(N)
    x = load_sum(ptr, columns(D), ok, COPIES, D)
    a = load_sum(ptr, pair, ok, COPIES, D)
    b = load_sum(ptr, N + pair, ok, COPIES, D)
    return x, a, b


@kernel
def qkv_heads_gradient_kernel(
    dq_ptr,  # (T, H, D)
    dk_ptr,  # (T, KV, COPIES, D)
    dv_ptr,  # (T, KV, COPIES, D)
    d_own_ptr,  # (T, KV, D): of v as a view of qkv
    q_ptr,  # (T, H, D): y of each head, as attention saved it
    k_ptr,  # (T, KV, COPIES, D)
    gain_ptr,  # (H,) fp32
    cos_ptr,  # (T, N) fp32
    sin_ptr,  # (T, N) fp32
    rstd_ptr,  # (T, H + KV) fp32
    d_qkv_ptr,  # (T, H + 2 KV, D), written
    d_gain_ptr,  # (H,) fp32, added to; None: no gradient
    T,
    H: constexpr,
    KV: constexpr,
    COPIES: constexpr,
    D: constexpr,
    N: constexpr,
    BLOCK: constexpr,
):
    """One head of BLOCK tokens per program: dx from y and dy; dv sums the gradients of v's copies and of its view."""
    HEADS: constexpr = H + 2 * KV
    head, token = head_and_tokens(HEADS, BLOCK)
    is_query = head < H
    is_value = head >= H + KV
    ok = token < T
    col = columns(D)
    pair = columns(N)
    dx_ptr = d_qkv_ptr + (token * HEADS + head) * D
    if is_value:
        offset = (token * KV + head - H - KV) * D
        d_own = load_fp32(d_own_ptr + offset + col, ok)
        dv = load_sum(dv_ptr + offset * COPIES, col, ok, COPIES, D) + d_own
        tl.store(dx_ptr + col, dv, mask=ok)
    else:
        rstd = load_fp32(rstd_ptr + token * (H + KV) + head, ok)
        cos = load_fp32(cos_ptr + token * N + pair, ok)
        sin = load_fp32(sin_ptr + token * N + pair, ok)
        if is_query:
            gain = tl.load(gain_ptr + head)
            offset = (token * H + head) * D
            y_ptr = q_ptr + offset
            dy, da, db = load_head(dq_ptr + offset, ok, 1, D, N)
        else:
            gain = 1.0
            offset = (token * KV + head - H) * COPIES * D  # of the first of equal copies
            y_ptr = k_ptr + offset
            dy, da, db = load_head(dk_ptr + offset, ok, COPIES, D, N)
        y = load_fp32(y_ptr + col, ok)
        dot = row_dot(y, dy)
        by_dy = rstd * gain
        by_y = rstd * dot / (D * gain)
        a = by_dy * da - by_y * load_fp32(y_ptr + pair, ok)
        b = by_dy * db - by_y * load_fp32(y_ptr + N + pair, ok)
        store_rotated(dx_ptr, by_dy * dy - by_y * y, a, b, cos, -sin, ok, D, N)
        if is_query and d_gain_ptr is not None:
            tl.atomic_add(d_gain_ptr + head, tl.sum(dot) / gain, sem="relaxed")


class QKVHeads(torch.autograd.Function):
    """`qkv_heads` through the kernels."""

    @staticmethod
    def forward(ctx, qkv, gain, cos, sin, kv_heads, copies, eps):
        qkv, gain, cos, sin = contiguous(qkv, gain, cos, sin)
        T = len(qkv)
        H = len(gain)
        heads = qkv.unflatten(1, (H + 2 * kv_heads, -1))
        D = heads.size(2)
        q = qkv.new_empty(T, H, D)
        k, v = (qkv.new_empty(T, copies * kv_heads, D) for _ in range(2))
        rstd = qkv.new_empty(T, H + kv_heads, dtype=torch.float32)
        rows = max(HEAD_TILE // D, 1)  # tokens per program
        ctx.sizes = (H, kv_heads, copies, D, cos.size(1), rows)
        ctx.grid = (triton.cdiv(T, rows) * heads.size(1),)
        qkv_heads_kernel[ctx.grid](qkv, gain, cos, sin, q, k, v, rstd, T, eps, *ctx.sizes)
        ctx.save_for_backward(q, k, gain, cos, sin, rstd)
        return q, k, v, heads[:, -kv_heads:]

    @staticmethod
    def backward(ctx, *grads):
        _, _, gain, _, _, rstd = ctx.saved_tensors
        H, kv_heads, _, D, *_ = ctx.sizes
        T = len(rstd)
        d_qkv = grads[0].new_empty(T, (H + 2 * kv_heads) * D)
        d_gain = torch.zeros_like(gain) if ctx.needs_input_grad[1] else None
        inputs = (*contiguous(*grads), *ctx.saved_tensors)
        qkv_heads_gradient_kernel[ctx.grid](*inputs, d_qkv, d_gain, T, *ctx.sizes)
        return d_qkv, d_gain, None, None, None, None, None


def qkv_heads(
    qkv: Tensor, gain: Tensor, cos: Tensor, sin: Tensor, kv_heads: int, copies: int, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """qkv (T, (H + 2 KV) D), gain (H,) fp32 and nonzero, cos and sin (T, n) fp32
    -> q (T, H, D), k and v (T, copies KV, D), and v again as a view of qkv (T, KV, D).

    q and k: RMSNorm over D, rotation of the pairs (i, i + n) for i < n, then q times its head's gain. Each head of k
    and v comes `copies` times in a row: FlashAttention 3 takes 1.22 ms forward and backward for 4 heads of 128 with
    their own keys, 1.41 ms where two share them (98,304 tokens, H200)."""
    n = cos.size(1)
    head_dim = qkv.size(1) // (gain.numel() + 2 * kv_heads)
    rotates = n > 0 and n & (n - 1) == 0
    function = QKVHeads.apply if rotates and use_kernels(qkv.dtype, qkv.device, head_dim) else qkv_heads_reference
    return function(qkv, gain, cos, sin, kv_heads, copies, eps)


# --- XSA and the gate of each head's output ---
# For one head's y, the v of its group and the gate's input z:
#     along = (y . v) / (v . v)                    across = y - along v               out = top sigmoid(slope z) across
# Backward, from d_across = top sigmoid(slope z) d_out and its own component d_along = (d_across . v) / (v . v):
#     dz = (d_out . across) top slope sigmoid(slope z) (1 - sigmoid(slope z))
#     dy = d_across - d_along v                    dv = 2 along d_along v - d_along y - along d_across


def xsa_gate_reference(y, v, z, slope, top):
    """`xsa_gate` in plain PyTorch."""
    y_grouped = y.unflatten(1, (v.size(1), -1)).float()  # (T, KV, H / KV, D)
    v = v[:, :, None].float()
    dot = (y_grouped * v).sum(-1, keepdim=True)
    along = dot / (v * v).sum(-1, keepdim=True).clamp_min(1e-12)
    across = (y_grouped - along * v).flatten(1, 2)
    gate = top * torch.sigmoid(slope * z.float())
    return (across * gate[:, :, None]).to(y.dtype)


@kernel
def xsa_gate_kernel(
    y_ptr,  # (T, KV, GROUP, D)
    v_ptr,  # (T, KV, D), its tokens v_stride elements apart
    z_ptr,  # (T, KV, GROUP)
    d_out_ptr,  # (T, KV, GROUP, D); None: forward
    out_ptr,  # (T, KV, GROUP, D), written: out; backward: dy
    dv_ptr,  # (T, KV, D), written by backward only
    dz_ptr,  # (T, KV, GROUP), written by backward only
    T,
    v_stride,
    slope,
    top,
    KV: constexpr,
    GROUP: constexpr,
    D: constexpr,
    BLOCK: constexpr,
):
    """BLOCK rows (token, KV head) per program; the GROUP query heads that share a v pass one after another."""
    row = rows_from(tl.program_id(0) * BLOCK, BLOCK)
    col = columns(D)
    exists = row < T * KV
    ok = exists[:, None]
    v_row = row // KV * v_stride + row % KV * D
    v = load_fp32(v_ptr + v_row[:, None] + col, ok)
    inverse = 1.0 / tl.maximum(row_dot(v, v), 1e-12)
    dv = tl.zeros((BLOCK, D), tl.float32)
    for g in tl.static_range(GROUP):
        head = row * GROUP + g
        cell = head[:, None] * D + col
        y = load_fp32(y_ptr + cell, ok)
        opened = tl.sigmoid(slope * load_fp32(z_ptr + head, exists))[:, None]
        along = row_dot(y, v) * inverse
        across = y - along * v
        if d_out_ptr is None:
            tl.store(out_ptr + cell, across * (top * opened), mask=ok)
        else:
            d_out = load_fp32(d_out_ptr + cell, ok)
            d_gate = row_dot(d_out, across)
            dz = d_gate * (top * slope) * opened * (1.0 - opened)
            tl.store(dz_ptr + head[:, None], dz, mask=ok)
            d_across = d_out * (top * opened)
            d_along = row_dot(d_across, v) * inverse
            tl.store(out_ptr + cell, d_across - d_along * v, mask=ok)
            dv += 2.0 * along * d_along * v - d_along * y - along * d_across
    if d_out_ptr is not None:
        tl.store(dv_ptr + row[:, None] * D + col, dv, mask=ok)


def launch_xsa_gate(y, v, z, slope, top, d_out, out, dv=None, dz=None):
    """Forward (d_out None) fills out; backward fills out with the gradient of y, and dv and dz."""
    T, KV, D = v.shape
    rows = max(HEAD_TILE // D, 1)
    tensors = (y, v, z, d_out, out, dv, dz)
    sizes = (KV, y.size(1) // KV, D, rows)
    xsa_gate_kernel[(triton.cdiv(T * KV, rows),)](*tensors, T, v.stride(0), slope, top, *sizes)


class XSAGate(torch.autograd.Function):
    """`xsa_gate` through the kernel."""

    @staticmethod
    def forward(ctx, y, v, z, slope, top):
        y, z = contiguous(y, z)
        if not v[:1].is_contiguous():  # tokens may lie apart, as they do in a view of qkv, but not a token's heads
            v = v.contiguous()
        out = torch.empty_like(y)
        launch_xsa_gate(y, v, z, slope, top, None, out)
        ctx.save_for_backward(y, v, z)
        ctx.constants = (slope, top)
        return out

    @staticmethod
    def backward(ctx, d_out):
        grads = empty_like(*ctx.saved_tensors)
        launch_xsa_gate(*ctx.saved_tensors, *ctx.constants, d_out.contiguous(), *grads)
        return *grads, None, None


def xsa_gate(y: Tensor, v: Tensor, z: Tensor, slope: float, top: float) -> Tensor:
    """y (T, H, D), v (T, KV, D), z (T, H) -> top sigmoid(slope z) (y - (y . v) / (v . v) v) (T, H, D) in y's dtype,
    where v is that of the head's group (#265, #1787)."""
    function = XSAGate.apply if use_kernels(y.dtype, y.device, y.size(2)) else xsa_gate_reference
    return function(y, v, z, slope, top)


# --- Embeddings, smeared and normed ---
# With e_t the embedding of token t, c(e) its first channels, g the gate's weights and s the strength:
#     open_t = sigmoid(g . c(e_t)), 0 at the first position of a document
#     x_t = e_t + s open_t e_(t-1)                 out_t = n_t = r x_t   with   r = 1 / sqrt(mean(x_t^2) + eps)
# Backward, from dx_t = r (dn_t - x_t r^2 (x_t . dn_t) / D):
#     d e_t += dx_t                                d e_(t-1) += s open_t dx_t
#     d s += open_t (e_(t-1) . dx_t)               dz_t = s (e_(t-1) . dx_t) open_t (1 - open_t)
#     d c(e_t) += dz_t g                           d g += dz_t c(e_t)


def embed_reference(tokens, previous, positions, table, gate, strength, eps, dtype):
    """`embed` in plain PyTorch."""
    x = F.embedding(tokens, table).to(dtype)
    if gate is not None:
        first = x[:, : len(gate)]
        z = F.linear(first, gate[None].to(dtype)).float()
        smear = strength * torch.sigmoid(z) * (positions > 0)[:, None]
        x = (x + smear * F.embedding(previous, table).to(dtype)).to(dtype)
    return F.rms_norm(x, x.shape[1:], eps=eps)


@triton.jit
def smeared(row, inputs, T, C: constexpr, D: constexpr, GATE: constexpr):
    """-> x (ROWS, D) of some rows, and what its gradient needs: the tokens and those before, both (ROWS, 1), c(e)
    (ROWS, GATE), of which C channels count, how far the gate is open (ROWS,), and the embeddings before (ROWS, D).
    inputs: tokens (T,), previous (T,), positions (T,), table (V, D), gate (C,) and strength () or None."""
    tokens_ptr, previous_ptr, positions_ptr, table_ptr, gate_ptr, strength_ptr = inputs
    ok = row < T
    channel = columns(GATE)
    col = columns(D)
    token = tl.load(tokens_ptr + row, mask=ok, other=0)[:, None]
    before = tl.load(previous_ptr + row, mask=ok, other=0)[:, None]
    token_row = table_ptr + token * D
    x = bf16(tl.load(token_row + col))
    first = bf16(load_fp32(token_row + channel, channel < C))
    e_before = x
    opened = tl.zeros(row.shape, tl.float32)
    if gate_ptr is not None:
        e_before = bf16(tl.load(table_ptr + before * D + col))
        gate = bf16(load_fp32(gate_ptr + channel, channel < C))
        position = tl.load(positions_ptr + row, mask=ok, other=0)
        has_before = (position > 0).to(tl.float32)
        opened = tl.sigmoid(tl.sum(first * gate, 1)) * has_before
        x += (tl.load(strength_ptr) * opened)[:, None] * e_before
    return bf16(x), (token, before, first, opened, e_before)


@kernel
def embed_kernel(
    inputs,  # of smeared()
    out_ptr,  # (T, D), written
    T,
    eps,
    C: constexpr,
    D: constexpr,
    GATE: constexpr,
    ROWS: constexpr,
):
    """ROWS smeared and normed embeddings per program."""
    row = rows_from(tl.program_id(0) * ROWS, ROWS)
    x, _ = smeared(row, inputs, T, C, D, GATE)
    n = x * inverse_rms(x, D, eps)
    out_ptr += row[:, None] * D + columns(D)
    tl.store(out_ptr, n, mask=(row < T)[:, None])


@kernel
def embed_gradient_kernel(
    dn_ptr,  # (T, D)
    inputs,  # of smeared()
    d_table_ptr,  # (V, D) fp32, added to
    d_gate_ptr,  # (C,) fp32, added to; None without gate
    d_strength_ptr,  # () fp32, added to; None without gate
    T,
    eps,
    C: constexpr,
    D: constexpr,
    GATE: constexpr,
    ROWS: constexpr,
):
    """Every program takes ROWS tokens at a time and sums the gradients of gate and strength in registers."""
    _, _, _, _, gate_ptr, strength_ptr = inputs
    channel = columns(GATE)
    col = columns(D)
    d_gate = tl.zeros((ROWS, GATE), tl.float32)
    d_strength = tl.zeros((ROWS,), tl.float32)
    for begin in range(tl.program_id(0) * ROWS, T, tl.num_programs(0) * ROWS):
        row = rows_from(begin, ROWS)
        ok = (row < T)[:, None]
        x, parts = smeared(row, inputs, T, C, D, GATE)
        token, before, first, opened, e_before = parts
        dn = load_fp32(dn_ptr + row[:, None] * D + col, ok)
        dx = norm_gradient(x, dn, 1.0, D, eps)
        token_row = d_table_ptr + token * D
        tl.atomic_add(token_row + col, dx, mask=ok, sem="relaxed")
        if gate_ptr is not None:
            strength = tl.load(strength_ptr)
            dot = tl.sum(e_before * dx, 1)
            before_row = d_table_ptr + before * D
            d_before = (strength * opened)[:, None] * dx
            tl.atomic_add(before_row + col, d_before, mask=ok & (opened > 0)[:, None], sem="relaxed")
            dz = (strength * dot * opened * (1.0 - opened))[:, None]
            gate = bf16(load_fp32(gate_ptr + channel, channel < C))
            tl.atomic_add(token_row + channel, dz * gate, mask=ok & (channel < C), sem="relaxed")
            d_gate += dz * first
            d_strength += dot * opened
    if gate_ptr is not None:
        channel = tl.arange(0, GATE)
        tl.atomic_add(d_gate_ptr + channel, tl.sum(d_gate, 0), mask=channel < C, sem="relaxed")
        tl.atomic_add(d_strength_ptr, tl.sum(d_strength, 0), sem="relaxed")


class Embed(torch.autograd.Function):
    """`embed` through the kernels."""

    @staticmethod
    def forward(ctx, tokens, previous, positions, table, gate, strength, eps):
        T = len(tokens)
        d = table.size(1)
        channels = 0 if gate is None else len(gate)
        block = triton.next_power_of_2(channels or 16)
        ctx.constants = (T, eps, channels, d, block, STREAM_ROWS)
        inputs = (tokens, previous, positions, table, gate, strength)
        out = table.new_empty(T, d, dtype=torch.bfloat16)
        embed_kernel[(triton.cdiv(T, STREAM_ROWS),)](inputs, out, *ctx.constants)
        ctx.save_for_backward(*inputs)
        return out

    @staticmethod
    def backward(ctx, dn):
        inputs = tuple(ctx.saved_tensors)
        grads = [None if t is None else torch.zeros_like(t) for t in inputs[3:]]
        grid = (3 * processors(dn.device),)  # with more they contend for the rows of the table
        embed_gradient_kernel[grid](dn.contiguous(), inputs, *grads, *ctx.constants)
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
    """tokens, previous (T,) int64, positions (T,) int32, table (V, d), gate (c,) and strength () fp32
    -> RMSNorm of e_t + strength sigmoid(gate . e_t[:c]) e_{t-1} (T, d) in `dtype`. The second term is
    missing at position 0 and, where gate is None, everywhere (SmearGate, #1667)."""
    if use_kernels(dtype, table.device, table.size(1)):
        return Embed.apply(tokens, previous, positions, table, gate, strength, eps)
    return embed_reference(tokens, previous, positions, table, gate, strength, eps, dtype)


# --- Weighted sums of streams, channel by channel, and the RMSNorm of each sum ---
ONE = -1  # a weight of Sum: the stream as it is
ABSENT = -2  # a weight of Sum: the stream is no part of this sum
IS_ONE = constexpr(ONE)  # a kernel reads only globals of this type


class Sum(NamedTuple):
    """One weighted sum of streams, and what combine() returns of it."""

    weights: tuple[int, ...]  # for each stream: the row of `rows` that multiplies it channel by channel, ONE or ABSENT
    norm_scale: float | None = None  # factor of the sum's RMSNorm; None: no norm is wanted
    keep: bool = True  # whether the sum itself is wanted


class Combined(NamedTuple):
    """One result of combine(); what its Sum did not ask for is None."""

    sum: Tensor | None  # (T, d)
    normed: Tensor | None  # (T, d)


def combine_reference(terms, sums, rows, eps):
    """combine() in plain PyTorch. Of single terms (T, d): the sums have a weight for each."""
    results = []
    for weights, norm_scale, keep in sums:
        parts = [x if w == ONE else rows[w] * x for w, x in zip(weights, terms) if w != ABSENT]
        total = sum(parts[1:], parts[0]).to(terms[0].dtype)
        normed = None if norm_scale is None else F.rms_norm(total, total.shape[1:], eps=eps) * norm_scale
        results.append(Combined(total if keep else None, normed))
    return results


@triton.jit
def load_rows(w_ptr, R: constexpr, D: constexpr, BLOCK: constexpr):
    """The R rows of weights, each (1, BLOCK)."""
    col = columns(BLOCK)
    ws = ()
    for r in tl.static_range(R):
        ws += (load_fp32(w_ptr + r * D + col, col < D),)
    return ws


@triton.jit
def tile_from(first, T, D: constexpr, BLOCK: constexpr, ROWS: constexpr):
    """-> offsets of the tile of ROWS tokens that begins at token `first`, and which of its elements exist."""
    row = rows_from(first, ROWS)[:, None]
    col = columns(BLOCK)
    return row * D + col, (row < T) & (col < D)


@triton.jit
def weighted_sum(tiles, ws, FORM: constexpr, m: constexpr):
    """sum_i c_i tiles[i] (ROWS, BLOCK) fp32: c_i is 1 (ONE), 0 (ABSENT) or the row ws[FORM[m][i]] (1, BLOCK)."""
    total = tl.zeros(tiles[0].shape, tl.float32)
    for i in tl.static_range(len(tiles)):
        if FORM[m][i] == IS_ONE:
            total += tiles[i]
        elif FORM[m][i] >= 0:
            total += ws[FORM[m][i]] * tiles[i]
    return total


@kernel
def combine_kernel(
    streams,  # (T, D) each
    w_ptr,  # (R, D) fp32; None if R is 0
    ys,  # (T, D) each, written: the sums; None where not wanted
    ns,  # (T, D) each, written: their norms; None where not wanted
    scales,  # of the norms
    T,
    eps,
    FORM: constexpr,  # the weights of each Sum
    R: constexpr,
    D: constexpr,
    BLOCK: constexpr,  # D or the next power of two
    ROWS: constexpr,
):
    """y = sum of w x over the streams x, and n = scale r y, for each Sum; ROWS tokens at a time."""
    ws = load_rows(w_ptr, R, D, BLOCK)
    for first in range(tl.program_id(0) * ROWS, T, tl.num_programs(0) * ROWS):
        offset, ok = tile_from(first, T, D, BLOCK, ROWS)
        xs = [load_fp32(x_ptr + offset, ok) for x_ptr in streams]
        for m in tl.static_range(len(FORM)):
            if ys[m] is not None or ns[m] is not None:
                y = bf16(weighted_sum(xs, ws, FORM, m))
                if ys[m] is not None:
                    tl.store(ys[m] + offset, y, mask=ok)
                if ns[m] is not None:
                    n = y * (scales[m] * inverse_rms(y, D, eps))
                    tl.store(ns[m] + offset, n, mask=ok)


@kernel
def combine_gradient_kernel(
    streams,  # (T, D) each
    w_ptr,  # (R, D) fp32; None if R is 0
    dys,  # (T, D) each: the gradients of the sums; None: zero
    dns,  # (T, D) each: of their norms; None: zero
    scales,  # of the norms
    grads,  # (T, D) each, written: a gradient for each entry of COLUMNS
    dw_ptr,  # (R, D) fp32, added to; None: no gradient
    COLUMNS: constexpr,  # of FORM: the weights of one stream in each Sum
    T,
    eps,
    FORM: constexpr,  # the weights of each Sum
    R: constexpr,
    D: constexpr,
    BLOCK: constexpr,  # D or the next power of two
    ROWS: constexpr,
):
    """dx = sum of w g over the Sums and dw = sum of g x over the tokens, g being the gradient of a Sum's y."""
    ws = load_rows(w_ptr, R, D, BLOCK)
    row_sums = [tl.zeros((ROWS, BLOCK), tl.float32) for _ in ws]  # this program's part of dw
    for first in range(tl.program_id(0) * ROWS, T, tl.num_programs(0) * ROWS):
        offset, ok = tile_from(first, T, D, BLOCK, ROWS)
        xs = [load_fp32(x_ptr + offset, ok) for x_ptr in streams]
        gs = ()  # of each sum: through its norm, and directly
        for m in tl.static_range(len(FORM)):
            g = tl.zeros((ROWS, BLOCK), tl.float32)
            if dns[m] is not None:
                y = bf16(weighted_sum(xs, ws, FORM, m))
                g = norm_gradient(y, load_fp32(dns[m] + offset, ok), scales[m], D, eps)
            if dys[m] is not None:
                g += load_fp32(dys[m] + offset, ok)
            gs += (g,)
        for k in tl.static_range(len(COLUMNS)):
            # Every use of a stream meets here, handing it on included: one store, and no addition later.
            tl.store(grads[k] + offset, weighted_sum(gs, ws, COLUMNS, k), mask=ok)
        added = ()
        for r in tl.static_range(R):
            total = row_sums[r]
            for m in tl.static_range(len(FORM)):
                for k in tl.static_range(len(streams)):
                    if FORM[m][k] == r:
                        total += gs[m] * xs[k]
            added += (total,)
        row_sums = added
    if dw_ptr is not None:
        col = tl.arange(0, BLOCK)
        for r in tl.static_range(R):
            tl.atomic_add(dw_ptr + r * D + col, tl.sum(row_sums[r], 0), mask=col < D, sem="relaxed")


class Combine(torch.autograd.Function):
    """combine() through the kernels. Its outputs are the sums and then the norms, None where not wanted."""

    @staticmethod
    def forward(ctx, rows, sums, eps, *terms):
        rows, *terms = contiguous(rows, *terms)
        T, d = terms[0].shape
        form, scales, keeps = zip(*sums)
        totals = []  # the sums that are returned
        ys = []  # those of them that are computed
        for weights, keep in zip(form, keeps):
            y = None
            total = None
            if keep and [w for w in weights if w != ABSENT] == [ONE]:
                term = terms[weights.index(ONE)]
                total = term.view_as(term)  # handed on: nothing to compute
            elif keep:
                total = y = torch.empty_like(terms[0])
            totals.append(total)
            ys.append(y)
        ns = [None if scale is None else torch.empty_like(terms[0]) for scale in scales]
        height = 0 if rows is None else len(rows)
        ctx.constants = (T, eps, form, height, d, triton.next_power_of_2(d))
        grid = (STREAM_PROGRAMS * processors(terms[0].device),)
        combine_kernel[grid](tuple(terms), rows, tuple(ys), tuple(ns), scales, *ctx.constants, STREAM_ROWS)
        ctx.save_for_backward(rows, *terms)
        ctx.form = form
        ctx.scales = scales
        ctx.set_materialize_grads(False)
        return *totals, *ns

    @staticmethod
    def backward(ctx, *d_outputs):
        rows, *terms = ctx.saved_tensors
        need_rows, _, _, *need_terms = ctx.needs_input_grad
        d_outputs = contiguous(*d_outputs)
        count = len(ctx.form)
        # Terms of equal weights in every sum, such as those of one stream, have one gradient: it is computed once.
        columns = list(zip(*ctx.form))
        needed = dict.fromkeys(itertools.compress(columns, need_terms))
        grads = {column: torch.empty_like(terms[0]) for column in needed}
        d_rows = torch.zeros_like(rows) if need_rows else None
        # Four rows of four streams do not fit into the registers.
        programs, tile = (6, STREAM_ROWS) if len(terms) < 4 else (8, 1)
        combine_gradient_kernel[(programs * processors(terms[0].device),)](
            tuple(terms),
            rows,
            d_outputs[:count],
            d_outputs[count:],
            ctx.scales,
            tuple(grads.values()),
            d_rows,
            tuple(grads),
            *ctx.constants,
            tile,
        )
        return d_rows, None, None, *[grads.get(column) for column in columns]


def combine(streams: list[tuple], sums: list[Sum], rows: Tensor | None, eps: float) -> list[Combined]:
    """Weighted sums of streams, all from one pass over memory: one Combined for each Sum. A stream is a tuple of terms
    (T, d), whose sum it is; an empty one is no stream. `rows` (R, d) fp32 holds the weights that sums name by number;
    it may be None where all weights are ONE or ABSENT.

    A Sum of a single term as it is hands the stream on: it returns the term itself, which costs nothing forward.
    Use it where a stream has later readers, and let them read what is returned here. Their gradient then arrives here,
    and the backward kernel adds it to the stream's gradient while it writes that. If they read the stream itself,
    autograd adds the (T, d) gradients in a kernel of its own, a pass over memory for each reader."""
    terms = [x for stream in streams for x in stream]
    counts = [len(stream) for stream in streams]
    by_term = [s._replace(weights=tuple(np.repeat(s.weights, counts).tolist())) for s in sums]
    if not use_kernels(terms[0].dtype, terms[0].device):
        return combine_reference(terms, by_term, rows, eps)
    outputs = Combine.apply(rows, by_term, eps, *terms)
    return [Combined(*pair) for pair in zip(outputs[: len(sums)], outputs[len(sums) :])]


# --- A matrix product, and the attention gate's product with the first channels of the same input ---


class GatedLinear(torch.autograd.Function):
    """x (T, d), w (n, d), gate (H, c) -> x @ w.T (T, n), and of its leading channels x[:, :c] @ gate.T (T, H).

    For x[:, :c] autograd would make a zero-padded (T, d) gradient and add it to dx; this adds in place."""

    @staticmethod
    def forward(ctx, x, w, gate):
        ctx.save_for_backward(x, w, gate)
        leading = x[:, : gate.size(1)]
        return F.linear(x, w), F.linear(leading, gate)

    @staticmethod
    def backward(ctx, dy, dz):
        x, w, gate = ctx.saved_tensors
        need_x, need_w, need_gate = ctx.needs_input_grad
        channels = gate.size(1)
        dx = dy @ w if need_x else None
        if need_x:
            dx[:, :channels].addmm_(dz, gate)
        dw = dy.T @ x if need_w else None
        d_gate = dz.T @ x[:, :channels] if need_gate else None
        return dx, dw, d_gate


gated_linear = GatedLinear.apply


# ======== Attention backends: one function, in the order FlashAttention 3, FlashAttention 4, torch's own, reference ===
# Causal attention inside packed sequences, scores scaled by D^-0.5. Every backend has the same two functions:
#     forward(q, k, v, *where) -> out, lse                       q, out (Tq, H, D); k, v (Tk, KV, D); H = G KV
#     backward(dout, q, k, v, out, lse, *where) -> dq, dk, dv    (some return more)
#     where = cu_q, cu_k, max_q, max_k, window
# cu_q and cu_k (sequences + 1,) int32 hold where each sequence begins and the last one ends, max_q and max_k the
# largest lengths. `window` is how many tokens a query reaches back, -1: all. A sequence's queries are its last tokens.


def heads_first(t: Tensor, count: int, kv_heads: int) -> Tensor:
    """(count n, H, D) -> (count, KV, H / KV, n, D)."""
    grouped = t.unflatten(0, (count, -1)).unflatten(2, (kv_heads, -1))  # (count, n, KV, H / KV, D)
    return grouped.permute(0, 2, 3, 1, 4)


def tokens_first(t: Tensor) -> Tensor:
    """(count, KV, H / KV, n, D) -> (count n, H, D)."""
    return t.permute(0, 3, 1, 2, 4).flatten(2, 3).flatten(0, 1)


class Group(NamedTuple):
    """A run of `count` consecutive sequences of equal lengths, n queries and m keys each, with their heads first."""

    queries: slice  # of the tokens of q
    keys: slice  # of the tokens of k
    q: Tensor  # (count, KV, G, n, D)
    k: Tensor  # (count, KV, 1, m, D)
    v: Tensor  # (count, KV, 1, m, D)
    weights: Tensor  # (count, KV, G, n, m), softmax over the keys that a query sees


def sequence_groups(q, k, v, cu_q, cu_k, window) -> Iterator[Group]:
    """Yield the sequences that have queries."""
    lengths = zip(cu_q.diff().tolist(), cu_k.diff().tolist())
    nonempty = (pair for pair in lengths if pair != (0, 0))
    queries = slice(0, 0)
    keys = slice(0, 0)
    for (n, m), run in itertools.groupby(nonempty):
        count = len(list(run))
        queries = slice(queries.stop, queries.stop + count * n)
        keys = slice(keys.stop, keys.stop + count * m)
        if n == 0:  # keys that nobody asks for
            continue
        seen = torch.ones(n, m, dtype=torch.bool, device=q.device)
        seen = seen.tril(m - n)  # query i sees the keys up to m - n + i
        if window >= 0:
            seen = seen.triu(m - n - window)
        qs = heads_first(q[queries], count, k.size(1))
        ks = heads_first(k[keys], count, k.size(1))
        vs = heads_first(v[keys], count, k.size(1))
        scores = qs @ ks.mT * q.size(-1) ** -0.5
        weights = scores.masked_fill_(~seen, -torch.inf).softmax(-1)
        yield Group(queries, keys, qs, ks, vs, weights)


def reference_forward(q, k, v, cu_q, cu_k, max_q=0, max_k=0, window=-1):
    """Attention in plain PyTorch. The log-sum-exp is empty, since the backward pass recomputes."""
    out = torch.empty_like(q)
    for group in sequence_groups(q, k, v, cu_q, cu_k, window):
        out[group.queries] = tokens_first(group.weights @ group.v)
    return out, q.new_empty(0, dtype=torch.float32)


def reference_backward(dout, q, k, v, out, lse, cu_q, cu_k, max_q=0, max_k=0, window=-1):
    """Gradients of `reference_forward`, from P = softmax(S), S = q k' / sqrt(D), where ' is the transpose:

    dv = P' dout    dP = dout v'    dS = P (dP - rowsum(dP P)) / sqrt(D)    dq = dS k    dk = dS' q
    Those of k and v sum over the G heads that share them."""
    dq, dk, dv = (torch.zeros_like(t) for t in (q, k, v))
    for queries, keys, qs, ks, vs, p in sequence_groups(q, k, v, cu_q, cu_k, window):
        do = heads_first(dout[queries], *qs.shape[:2])
        dp = do @ vs.mT
        ds = p * (dp - (dp * p).sum(-1, keepdim=True)) * q.size(-1) ** -0.5
        dq[queries] = tokens_first(ds @ ks)
        dk[keys] = tokens_first((ds.mT @ qs).sum(2, keepdim=True))
        dv[keys] = tokens_first((p.mT @ do).sum(2, keepdim=True))
    return dq, dk, dv


# The operators of FlashAttention 3 take up to 34 positional arguments: one group of them a line.
# fmt: off
def fa3_forward(q, k, v, cu_q, cu_k, max_q, max_k, window):
    """FlashAttention 3: out (Tq, H, D) and log-sum-exp (H, Tq) fp32."""
    out, lse, *_ = torch.ops.flash_attn_3.fwd(
        q, k, v,
        None, None, None, None,  # k_new, v_new, qv, out: nothing is appended to k and v, out is allocated
        cu_q, cu_k, None,  # cu_seqlens of q, k, k_new
        None, None,  # seqused of q, k: every sequence is used to its end
        max_q, max_k,
        None, None, None,  # page_table, kv_batch_idx, leftpad_k: keys are not paged
        None, None, None,  # rotary_cos, rotary_sin, seqlens_rotary: q and k are rotated
        None, None, None,  # descale of q, k, v: for fp8
        q.size(-1) ** -0.5, True, window, 0,  # softmax_scale, causal, window to the left, to the right
        num_splits=1,  # FA3 would split the keys; the kernel that combines the parts costs what that gains
    )
    return out, lse


def fa3_backward(dout, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, window):
    """FlashAttention 3: gradients of q, k, v."""
    grads = empty_like(q, k, v)
    torch.ops.flash_attn_3.bwd(
        dout, q, k, v, out, lse,
        *grads,  # written in place; builds differ in what the operator returns
        cu_q, cu_k, None, None,  # cu_seqlens of q, k; seqused of q, k
        max_q, max_k,
        q.size(-1) ** -0.5, True, window, 0,  # softmax_scale, causal, window to the left, to the right
    )
    return grads
# fmt: on


def fa4_where(cu_q, cu_k, max_q, max_k, window) -> dict:
    """The arguments that both directions of FlashAttention 4 share. No bound is None
    there, not -1; causal=True bounds the right side."""
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
    module = sys.modules[ATTENTION_MODULES["fa4"]]
    return module._flash_attn_fwd(q, k, v, return_lse=True, **fa4_where(*where))[:2]


def fa4_backward(dout, q, k, v, out, lse, *where):
    """FlashAttention 4: gradients of q, k, v."""
    module = sys.modules[ATTENTION_MODULES["fa4"]]
    return module._flash_attn_bwd(q, k, v, out, dout, lse, **fa4_where(*where))


def torch_where(cu_q, cu_k, max_q, max_k, window) -> dict:
    """The arguments that both directions of torch's FlashAttention 2 share."""
    return dict(
        cum_seq_q=cu_q,
        cum_seq_k=cu_k,
        max_q=max_q,
        max_k=max_k,
        dropout_p=0.0,
        is_causal=True,
        window_size_left=window,
        window_size_right=0,
    )


def torch_forward(q, k, v, *where):
    """torch's own FlashAttention 2: out and log-sum-exp."""
    attention = torch.ops.aten._flash_attention_forward
    out, lse, *_ = attention(q, k, v, return_debug_mask=False, **torch_where(*where))
    return out, lse


def torch_backward(dout, q, k, v, out, lse, *where):
    """torch's own FlashAttention 2: gradients of q, k, v."""
    attention_gradient = torch.ops.aten._flash_attention_backward
    seed = torch.zeros(2, dtype=torch.uint64, device=q.device)  # state of the dropout, not used at rate 0
    dropout = dict(rng_state=seed, unused=seed[0])
    return attention_gradient(dout, q, k, v, out, lse, **dropout, **torch_where(*where))


class Backend(NamedTuple):
    """The two directions of an attention."""

    forward: Callable
    backward: Callable


BACKENDS = {  # in the order of preference
    "fa3": Backend(fa3_forward, fa3_backward),
    "fa4": Backend(fa4_forward, fa4_backward),
    "torch": Backend(torch_forward, torch_backward),
    "reference": Backend(reference_forward, reference_backward),
}
ATTENTION_MODULES = {  # that of fa3 registers torch.ops.flash_attn_3
    "fa3": "flash_attn_interface",
    "fa4": "flash_attn.cute.interface",
}


def choose_attention(cfg: Config, device: torch.device) -> str:
    """The first backend that loads and agrees with the reference on this device."""
    missing = cfg.fa3_library and not Path(cfg.fa3_library).is_file()
    require(not missing, f"FA3_LIBRARY={cfg.fa3_library}: no such file")
    if device.type == "cpu":
        needs_gpu = cfg.attention not in ("auto", "reference")
        require(not needs_gpu, f"ATTENTION={cfg.attention} needs a GPU, and this run is on the CPU; unset it or DEVICE")
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
        except Exception as e:  # whatever fails in a third party's library, the next backend is tried
            lines = str(e).splitlines() or [type(e).__name__]
            reasons.append(f"{name}: {lines[0]}")
    raise UserError(f"ATTENTION={cfg.attention}: no backend works here ({'; '.join(reasons)})")


def both_directions(backend: Backend, tensors: list[Tensor], where: tuple) -> tuple[Tensor, ...]:
    """-> out, dq, dk, dv of tensors dout, q, k, v."""
    dout, *qkv = tensors
    out, lse = backend.forward(*qkv, *where)
    return out, *backend.backward(dout, *qkv, out, lse, *where)[:3]


def check_backend(name: str, cfg: Config, device: torch.device) -> None:
    """Compare both directions with the reference on two documents, without a window and with one; both
    without cached keys and with them: fewer queries than keys. Raise RuntimeError if they differ by 2 % (bf16)."""
    head_dim = cfg.model_dim // cfg.num_heads
    generator = torch.Generator(device).manual_seed(0)
    dout, q, k, v = (
        torch.randn(384, heads, head_dim, device=device, dtype=torch.bfloat16, generator=generator)
        for heads in (cfg.num_heads, cfg.num_heads, cfg.num_kv_heads, cfg.num_kv_heads)
    )
    cu_k = torch.tensor([0, 100, 384], dtype=torch.int32, device=device)
    cu_cached = torch.tensor([0, 30, 130], dtype=torch.int32, device=device)
    for window, (cu_q, n) in itertools.product((-1, 64), ((cu_k, 384), (cu_cached, 130))):
        tensors = [dout[:n], q[:n], k, v]
        where = (cu_q, cu_k, 384, 384, window)
        results = both_directions(BACKENDS[name], tensors, where)
        exact = both_directions(BACKENDS["reference"], [t.float() for t in tensors], where)
        for have, want in zip(results, exact):
            error = ((have.float() - want).norm() / want.norm()).item()
            if not error < 0.02:  # NaN is no agreement
                raise RuntimeError(f"differs from the reference by {error:.1%}")


class Attention(torch.autograd.Function):
    """A backend: q (Tq, H, D), k, v (Tk, KV, D) -> (Tq, H, D)."""

    @staticmethod
    def forward(ctx, backend, q, k, v, *where):
        out, lse = backend.forward(q, k, v, *where)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.backend = backend
        ctx.where = where
        return out

    @staticmethod
    def backward(ctx, dout):
        grads = ctx.backend.backward(dout.contiguous(), *ctx.saved_tensors, *ctx.where)
        return None, *grads[:3], *[None] * len(ctx.where)


def attend(q: Tensor, k: Tensor, v: Tensor, seq: Seq, window: int, attention_backend: str) -> Tensor:
    """q (Tq, H, D); k, v (Tk, KV, D) -> (Tq, H, D) in q's dtype. `window`: tokens a query reaches back, -1: all."""
    dtype = q.dtype
    if attention_backend != "reference":  # the flash kernels take no fp32
        q, k, v = (t.to(torch.bfloat16) for t in (q, k, v))
    where = (seq.cu_q, seq.cu_k, seq.max_q, seq.max_k, window)
    return Attention.apply(BACKENDS[attention_backend], q, k, v, *where).to(dtype)


# ======== Model: one trunk, one head =================================================================================

NORM_EPS = 2.0**-23  # the embedding's mean square begins at 2.5e-5: bf16's epsilon would crush it
GATE_CHANNELS = 12  # leading channels that SmearGate and the attention gates read
FOLDED = {"attn_scale": "o", "mlp_scale": "down"}  # sublayer scales, and the matrices whose rows they multiply


class Visit(NamedTuple):
    """One stop of the trunk. A layer in the loop is visited several times."""

    index: int  # type: ignore[assignment]
    layer: int
    source: int | None  # index of the visit whose output is merged in; None: nothing is
    keep: bool  # whether a later visit merges the stream that this one finds, the output of the visit before
    lanes: bool  # attention reads one lane, the MLP the other (#1529)
    shared: bool  # the MLP reads what attention reads, as in GPT-J (#1493)
    norm_scale: float  # factor of the sublayers' inputs


def visit_schedule(cfg: Config, looped: bool) -> tuple[Visit, ...]:
    """Depth recurrence and U-Net pairing. The first half of the visits encodes, the second half merges their outputs,
    last first: of 6 visits number 3 merges the output of number 2, number 4 that of number 1, number 5 that of 0."""
    layers = list(range(cfg.num_layers))
    if looped:
        end = cfg.loop_end + 1
        layers[end:end] = layers[cfg.loop_start : end] * cfg.num_loops
    encoder = len(layers) // 2
    visits = []
    for i, layer in enumerate(layers):
        parallel = 0 < cfg.parallel_start_layer <= layer
        lanes = cfg.parallel_mode == "lanes"
        visits.append(
            Visit(
                index=i,
                layer=layer,
                source=2 * encoder - 1 - i if encoder <= i < 2 * encoder else None,
                keep=0 < i < encoder,
                lanes=parallel and lanes and i >= encoder,
                shared=parallel and not lanes,
                norm_scale=1 / math.sqrt(layer + 1),
            )
        )
    return tuple(visits)


class Cache(NamedTuple):
    """What earlier tokens left behind, for rows of equal length: keys and values of each visit, and the last token for
    SmearGate."""

    keys: Tensor  # (visits, rows, length, KV, D)
    values: Tensor  # (visits, rows, length, KV, D)
    last: Tensor  # (rows,) int64

    def by_row(self, t: Tensor) -> Tensor:
        """t (rows * n, ...) -> (rows, n, ...)."""
        return t.unflatten(0, (len(self.last), -1))

    def extended(self, cached: Tensor, new: Tensor) -> Tensor:
        """cached (rows, length, ...), and behind each row its new (rows * n, ...) -> (rows * (length + n), ...)."""
        return torch.cat((cached, self.by_row(new)), 1).flatten(0, 1)


class Mix(NamedTuple):
    """The coefficients of a visit, a number for each channel. With x0 the embedding, x the stream (with lanes: lane 0)
    and s the output of an earlier visit that is merged in, attention reads the RMSNorm of
        embedding x0 + stream x + skip s
    and lane 0 becomes
        lane_stream x + lane_skip s."""

    embedding: Tensor
    stream: Tensor
    skip: Tensor
    lane_stream: Tensor
    lane_skip: Tensor


# A visit's coefficients are stacked to (5, d) in the order of Mix; this names the row of each.
ROW: Any = Mix(*range(5))


class LayerWeights(NamedTuple):
    """The matrices of a layer in the compute dtype; stacked over layers in layer_weights()."""

    qkv: Tensor  # ((H + 2 KV) D, d)
    o: Tensor  # (d, H D)
    up: Tensor  # (hidden, d)
    down: Tensor  # (d, hidden)
    attn_gate: Tensor | None  # (H, GATE_CHANNELS)


class LogitCalibration(NamedTuple):
    """Correction of the softcapped logits of a quantised model: logits = scale softcap(z) + bias (#1924)."""

    scale: Tensor  # ()
    bias: Tensor  # (V,)


class Scores(NamedTuple):
    """What a model says of given tokens, fp32."""

    nats: Tensor  # -log p of each target
    hint_log_prob: Tensor | None = None  # log p of each hinted token, where hints were given


def calibrated_scores(
    z: Tensor, targets: Tensor, caps: float | Tensor, calibration: LogitCalibration, hint: Tensor | None = None
) -> Scores:
    """Scores of targets (T,) and hint (T,), both int64, from z (T, V), the logits before the softcap."""
    logits = calibration.scale * softcap(z, caps) + calibration.bias
    log_total = logits.logsumexp(-1)
    nats = log_total - of_tokens(logits, targets)
    return Scores(nats, None if hint is None else of_tokens(logits, hint) - log_total)


def no_tap(kind: str, layer: int, x: Tensor):
    """The tap of a pass that nobody watches."""


class Site(NamedTuple):
    """What a sublayer computes with at a visit, besides its input."""

    visit: Visit
    weights: LayerWeights
    rope: tuple[Tensor, Tensor]  # cos, sin (T, rope_dims / 2)
    seq: Seq
    lora: "LoRA | None"
    tap: Callable  # (kind, layer, x) sees the input of every product
    cache: Cache | None

    def adapted(self, kind: str, y: Tensor, x: Tensor) -> Tensor:
        """y (T, out) and what the adapter of that kind adds to it, a function of x (T, in)."""
        return y if self.lora is None else self.lora.add_to(y, kind, self.visit.index, x)


def add_and_norm(terms: tuple, scale: float, keep: bool = True) -> Combined:
    """The sum of terms (T, d), if it is to be kept, and its RMSNorm times scale."""
    return combine([terms], [Sum((ONE,), scale, keep)], None, NORM_EPS)[0]


class Residual:
    """The residual stream of one forward pass, by the equations of GPT. At each visit attention reads it with read(),
    the MLP with read_mlp(), and both write() what they add to it.

    Additions wait. What is written stays a term of its own until the next read, where one kernel adds, mixes and norms.
    x0 is handed on (see combine): a visit reads the x0 that the read before it returned."""

    def __init__(self, model: "GPT", x0: Tensor, looped: bool):
        self.model = model
        self.x0 = x0
        self.mixes = model.mixes(looped)
        self.lanes = []  # where there are two: both, without what was written since
        # Without lanes the stream is the sum of these; at first it is x0, which `mixes` accounts for. With lanes, these
        # are what attention and the MLP wrote.
        self.terms: tuple[Tensor, ...] = ()
        self.shares: Tensor | None = None  # (3, 2): in each lane's new value the weights of lane, attention and MLP
        self.outputs = {}  # index of a visit -> (stream after it,), where a later visit merges it
        self.mlp_input: Tensor | None = None  # where the MLP reads nothing of what attention writes

    def read(self, visit: Visit) -> Tensor:
        """Mix x0 and the skip into the stream, or into lane 0 -> what attention reads (T, d)."""
        # The first visit that merges comes right after its source: s is x itself, and mixes() adds both coefficients.
        skip = self.outputs.get(visit.source, ())
        streams = [(self.x0,), self.terms, skip, ()]  # the last is for lane 1
        sums = [
            Sum((ROW.embedding, ROW.stream, ROW.skip, ABSENT), visit.norm_scale, keep=not visit.lanes),
            Sum((ONE, ABSENT, ABSENT, ABSENT)),
        ]
        if visit.keep:
            sums.append(Sum((ABSENT, ONE, ABSENT, ABSENT)))
        if visit.lanes:
            lane_0, lane_1 = self.read_lanes(visit.norm_scale)
            streams = [(self.x0,), (lane_0.sum,), skip, (lane_1.sum,)]
            own = ONE if visit.source is None else ROW.lane_stream
            sums += [Sum((ABSENT, own, ROW.lane_skip, ABSENT)), Sum((ABSENT, ABSENT, ABSENT, ONE))]
        mixed, x0, *others = combine(streams, sums, self.mixes[visit.index], NORM_EPS)
        self.x0 = x0.sum
        self.terms = (mixed.sum,)
        self.mlp_input = mixed.normed
        if visit.keep:
            self.outputs[visit.index - 1] = (others[0].sum,)
        if visit.lanes:
            self.lanes = [lane.sum for lane in others]
            self.terms = ()
            self.mlp_input = lane_1.normed
            of_lane = self.model.parallel_resid[visit.layer, None]
            self.shares = torch.cat((of_lane, self.model.parallel_post[visit.layer]))
        return mixed.normed

    def read_lanes(self, scale: float):
        """Both lanes with all that was written, and the RMSNorm of lane 1 times scale."""
        if self.lanes:
            sums = [Sum((0, ABSENT, 2, 4)), Sum((ABSENT, 1, 3, 5), scale)]  # rows of the flattened shares
            return self.combine_lanes(sums, self.shares.flatten())
        return [add_and_norm(self.terms, scale)] * 2  # both begin as the stream

    def read_mlp(self, visit: Visit) -> Tensor:
        """-> what the MLP reads (T, d), once attention has written."""
        if visit.lanes or visit.shared:
            return self.mlp_input
        added = add_and_norm(self.terms, visit.norm_scale)
        self.terms = (added.sum,)
        return added.normed

    def write(self, update: Tensor):
        """Add a sublayer's output (T, d) to the stream, or to both lanes."""
        self.terms += (update,)

    def final(self) -> Tensor:
        """The trunk's output (T, d): the RMSNorm of the stream or of the mean of the lanes."""
        if not self.lanes:
            return add_and_norm(self.terms, 1.0, keep=False).normed
        half = 0.5 * self.shares
        weights = torch.cat((half[0], half[1:].sum(1)))  # of both lanes, of attention and of the MLP in the mean
        (mean,) = self.combine_lanes([Sum((0, 1, 2, 3), 1.0, keep=False)], weights)
        return mean.normed

    def combine_lanes(self, sums, weights):
        """combine() of both lanes and of what attention and the MLP wrote, by weights (rows,) that hold for all
        channels."""
        streams = [(x,) for x in (*self.lanes, *self.terms)]
        rows = weights[:, None].expand(-1, self.x0.size(1))
        return combine(streams, sums, rows, NORM_EPS)


def parameter(*shape: int, value: float = 0) -> nn.Parameter:
    """fp32, all of that value."""
    return nn.Parameter(torch.full(shape, float(value)))


class GPT(nn.Module):
    """The network of #1855. Its equations, for the visits of visit_schedule() in order, each of some layer l:

        x = x0 = norm(smear(embedding of the tokens))
        x = g x + (1 - g) skip_weights[j] s     where s, the output of an earlier visit, is merged by skip j (U-Net);
                                                g = sigmoid(skip_gates[j])
        x = resid_mix[l, 0] x + resid_mix[l, 1] x0
        x = x + attention(n)                    n = norm(x) / sqrt(l + 1)
        x = x + mlp(norm(x) / sqrt(l + 1))      mlp(n) = mlp_scale[l] down[l] leaky_relu(up[l] n)^2
        hidden = norm(x)                        after the last visit

    Where a visit's sublayers are `shared`, the MLP reads the n of attention (GPT-J, #1493):
        x = x + attention(n) + mlp(n)

    Where a visit has `lanes` (#1529), both of which begin as x, only lane_0 receives the skip. Then
        a = attention(norm(resid_mix[l, 0] lane_0 + resid_mix[l, 1] x0) / sqrt(l + 1))
        m = mlp(norm(lane_1) / sqrt(l + 1))
        lane_k = parallel_resid[l, k] lane_k + parallel_post[l, 0, k] a + parallel_post[l, 1, k] m     for k = 0, 1
        hidden = norm((lane_0 + lane_1) / 2)

    attention(n) = attn_scale[l] o[l] y, with the heads y of attention_sublayer(). norm is the RMSNorm; a product of two
    vectors is one by channel. Matrices of all layers are stacked: optimizer and quantizer see one tensor of a kind."""

    def __init__(
        self,
        cfg: Config,
        attention_backend: str,
        dtype: torch.dtype,
        logit_calibration: LogitCalibration | None = None,
    ):
        """attention_backend: a name in BACKENDS; dtype: of activations and matrix products (parameters are fp32);
        logit_calibration: the artifact's, on the device where the model will run."""
        super().__init__()
        self.cfg = cfg
        self.attention_backend = attention_backend
        self.dtype = dtype
        self.logit_calibration = logit_calibration
        self.schedules = {looped: visit_schedule(cfg, looped) for looped in (False, True)}

        layers = cfg.num_layers
        d = cfg.model_dim
        heads = cfg.num_heads
        self.head_dim = d // heads
        self.q_dim = heads * self.head_dim
        self.kv_dim = cfg.num_kv_heads * self.head_dim
        hidden = int(cfg.mlp_mult * d)
        channels = min(GATE_CHANNELS, d)
        skips = len(self.schedules[True]) // 2  # the loops only add visits

        # matrices
        self.tok_emb = parameter(cfg.vocab_size, d)  # (V, d), also the head
        self.qkv = parameter(layers, self.q_dim + 2 * self.kv_dim, d)  # (L, (H + 2 KV) D, d)
        self.o = parameter(layers, d, self.q_dim)  # (L, d, H D)
        self.up = parameter(layers, hidden, d)  # (L, hidden, d)
        self.down = parameter(layers, d, hidden)  # (L, d, hidden)

        # scales and gates of the sublayers
        self.attn_scale = parameter(layers, d, value=1)  # (L, d)
        self.mlp_scale = parameter(layers, d, value=1)  # (L, d)
        # On "meta", `repeat` and a division would import the compiler: seconds, wherever an artifact is loaded.
        self.resid_mix = nn.Parameter(torch.tensor([[1.0], [0.0]]).expand(layers, 2, d).contiguous())  # (L, 2, d)
        self.q_gain = parameter(layers, heads, value=cfg.qk_gain_init)  # (L, H)
        gated = cfg.sparse_attn_gate_enabled or cfg.attn_out_gate_enabled
        self.attn_gate = parameter(layers, heads, channels) if gated else None  # (L, H, channels)
        # The gate of a head is top sigmoid(slope z). Without attn_gate z = 0, and top = 2 makes the gate 1.
        self.gate_slope = cfg.sparse_attn_gate_scale if cfg.sparse_attn_gate_enabled else 1.0
        self.gate_top = 1.0 if cfg.sparse_attn_gate_enabled else 2.0

        # skips and lanes
        self.skip_weights = parameter(skips, d, value=1)  # (skips, d)
        self.skip_gates = parameter(skips, d)  # (skips, d)
        lanes = any(visit.lanes for visit in self.schedules[False])
        self.parallel_post = parameter(layers, 2, 2, value=1) if lanes else None  # (L, of attention and MLP, to lane)
        self.parallel_resid = parameter(layers, 2, value=1.1) if lanes else None  # (L, lane)

        # embedding and head
        self.smear_gate = parameter(channels) if cfg.smear_gate_enabled else None  # (channels,)
        self.smear_lambda = parameter() if cfg.smear_gate_enabled else None  # ()
        # One cap of all logits, or learned ones of positive and of negative logits.
        self.caps = parameter(2, value=cfg.logit_softcap) if cfg.asym_logit_rescale else cfg.logit_softcap

        # constants of each layer
        pairs = torch.arange(0, cfg.rope_dims, 2, device="cpu")
        frequency = cfg.rope_base ** -(pairs / cfg.rope_dims)
        self.register_buffer("rope_frequency", frequency, persistent=False)  # (rope_dims / 2,)
        window = cfg.attn_window or -1
        full = {int(n) for n in cfg.attn_full_layers.split(",") if n}
        self.windows = [-1 if layer in full else window for layer in range(layers)]  # tokens seen; -1: all

    @torch.no_grad()
    def init_weights(self, seed: int):
        """Embedding N(0, TIED_EMBED_INIT_STD); Q, K, V and up orthogonal; o, down and gates zero; scales one.
        Drawn on the CPU: every machine starts equal."""
        generator = torch.Generator().manual_seed(seed)
        self.tok_emb.copy_(torch.randn(self.tok_emb.shape, generator=generator) * self.cfg.tied_embed_init_std)
        for qkv, up in zip(self.qkv, self.up):
            for matrix in (*qkv.split((self.q_dim, self.kv_dim, self.kv_dim)), up):
                matrix.copy_(nn.init.orthogonal_(torch.empty(matrix.shape), generator=generator))

    def layer_weights(self) -> list[LayerWeights]:
        """The weights of each layer. The sublayer scales multiply rows of `o` and `down`: smaller than activations."""
        stacks = LayerWeights(
            qkv=self.qkv,
            o=self.o * self.attn_scale[:, :, None],
            up=self.up,
            down=self.down * self.mlp_scale[:, :, None],
            attn_gate=self.attn_gate,
        )
        columns = [itertools.repeat(None) if stack is None else stack.to(self.dtype).unbind() for stack in stacks]
        return list(map(LayerWeights, *columns))

    def embed(self, tokens: Tensor, positions: Tensor, cache: Cache | None) -> Tensor:
        """tokens (T,) -> x0 (T, d), normed."""
        if cache is None:
            # Before the first comes itself: at position 0 nothing before is seen.
            previous = torch.cat((tokens[:1], tokens[:-1]))
        else:
            earlier = cache.by_row(tokens)[:, :-1]
            previous = torch.cat((cache.last[:, None], earlier), 1).flatten()
        return embed(
            tokens,
            previous,
            positions,
            self.tok_emb,
            self.smear_gate,
            self.smear_lambda,
            NORM_EPS,
            self.dtype,
        )

    def mixes(self, looped: bool) -> tuple[Tensor, ...]:
        """A tuple: for each visit its Mix, stacked (5, d) fp32. With w = skip_weights and stay, begin = resid_mix,
        x = g x + (1 - g) w s and then x = stay x + begin x0 are together
        x = begin x0 + (stay g) x + (stay (1 - g) w) s."""
        schedule = self.schedules[looped]
        layers = self.resid_mix.unbind()
        stay, begin = torch.stack([layers[visit.layer] for visit in schedule]).unbind(1)  # (visits, d)
        # At the first visit x = x0. Residual.read passes no stream there, so x0 gets both coefficients.
        begin = torch.cat((begin[:1] + stay[:1], begin[1:]))

        # The first half of the visits merges nothing. In the second, visit encoder + j merges by skip j.
        encoder = len(schedule) // 2
        g = torch.sigmoid(self.skip_gates[:encoder])
        skip = (1 - g) * self.skip_weights[:encoder]
        # The first merge follows its source directly: s = x. Residual.read passes no s there, so x gets both.
        g = torch.cat((g[:1] + skip[:1], g[1:]))

        around = 0, 0, encoder, len(schedule) - 2 * encoder  # F.pad: no columns, then rows before and after
        g = F.pad(g - 1, around) + 1  # (visits, d): 1 where nothing is merged
        skip = F.pad(skip, around)
        mix = Mix(
            embedding=begin,
            stream=stay * g,
            skip=stay * skip,
            lane_stream=g,
            lane_skip=skip,
        )
        return torch.stack(mix, 1).unbind()

    def trunk(
        self,
        tokens: Tensor,
        seq: Seq,
        *,
        looped: bool,
        lora: "LoRA | None" = None,
        tap: Callable = no_tap,
        cache: Cache | None = None,
    ) -> Any:  # Tensor; with a cache (Tensor, Cache)
        """tokens (T,) int64 -> final hidden states (T, d) in the compute dtype; with a cache also the new tokens'.
        With lora or cache, tokens are rows of one length, flattened. The tap sees the input of every product."""
        residual = Residual(self, self.embed(tokens, seq.positions, cache), looped)
        angle = seq.positions[:, None] * self.rope_frequency
        rope = angle.cos(), angle.sin()
        weights = self.layer_weights()
        new = []  # keys and values of each visit
        for visit in self.schedules[looped]:
            site = Site(visit, weights[visit.layer], rope, seq, lora, tap, cache)
            attended, *keys_values = self.attention_sublayer(residual.read(visit), site)
            residual.write(attended)
            residual.write(self.mlp_sublayer(residual.read_mlp(visit), site))
            if cache is not None:  # otherwise nobody reads them, and in training they are 0.2 GB a visit
                new.append(keys_values)
        hidden = residual.final()
        if cache is None:
            return hidden
        keys, values = (torch.stack([cache.by_row(t) for t in visits]) for visits in zip(*new))
        return hidden, Cache(keys, values, cache.by_row(tokens)[:, -1])

    def attention_sublayer(self, n: Tensor, site: Site) -> tuple[Tensor, ...]:
        """n (T, d) -> output (T, d), and the new tokens' keys and values: (T, KV, D) with a cache, else (T, H, D).

        q, k = rope(norm(q)) q_gain, rope(norm(k))
        y = softmax(q k / sqrt(D)) v             over the document's tokens so far, within the layer's window
        y = y - (y v / |v|^2) v                  XSA: without the component along the token's own value
        y = top sigmoid(slope z) y               z = attn_gate times the first channels of n, for each head"""
        cfg = self.cfg
        visit = site.visit
        layer = visit.layer
        weights = site.weights
        cache = site.cache
        site.tap("qkv", layer, n)
        if weights.attn_gate is None:
            qkv = F.linear(n, weights.qkv)
            z = n.new_zeros(len(n), cfg.num_heads)
        else:
            qkv, z = gated_linear(n, weights.qkv, weights.attn_gate)
        qkv = site.adapted("qkv", qkv, n)
        copies = cfg.num_heads // cfg.num_kv_heads if cache is None else 1  # a cache holds each key once
        q, *new, own_v = qkv_heads(
            qkv,
            self.q_gain[layer],
            *site.rope,
            cfg.num_kv_heads,
            copies,
            NORM_EPS,
        )
        k, v = new
        if cache is not None:
            k = cache.extended(cache.keys[visit.index], k)
            v = cache.extended(cache.values[visit.index], v)
        y = attend(q, k, v, site.seq, self.windows[layer], self.attention_backend)
        y = xsa_gate(y, own_v, z, self.gate_slope, self.gate_top).flatten(1)
        site.tap("o", layer, y)
        # The adapter "o" reads the sublayer's input and not that of the product, as #1855's does.
        return site.adapted("o", F.linear(y, weights.o), n), *new

    def mlp_sublayer(self, n: Tensor, site: Site) -> Tensor:
        """n (T, d) -> (T, d)."""
        out, hidden = mlp(n, site.weights.up, site.weights.down, self.cfg.leaky_relu_sq_slope)
        site.tap("up", site.visit.layer, n)
        site.tap("down", site.visit.layer, hidden)
        return site.adapted("mlp", out, n)

    def logits(self, hidden: Tensor, lora: "LoRA | None" = None) -> Tensor:
        """hidden (T, d) -> z (T, V) before the softcap, in the compute dtype."""
        z = F.linear(hidden, self.tok_emb.to(self.dtype))
        return z if lora is None else lora.add_to(z, "head", 0, hidden)

    def nll(self, hidden: Tensor, targets: Tensor, *, lora: "LoRA | None" = None, hint: Tensor | None = None) -> Scores:
        """Scores of targets (T,) int64, and of hint (T,) int64, after hidden (T, d)."""
        z = self.logits(hidden, lora)
        if self.logit_calibration is not None:
            return calibrated_scores(z, targets, self.caps, self.logit_calibration, hint)
        nats, log_total = softcap_nll(z, targets, self.caps)
        return Scores(nats, None if hint is None else softcap(of_tokens(z, hint), self.caps) - log_total)


@torch.no_grad()
def folded_state(model: GPT) -> dict[str, Tensor]:
    """Parameters by name (fp32), the sublayer scales multiplied into the rows they scale and set to one."""
    state = {name: p.clone() for name, p in model.named_parameters()}
    for scale, matrix in FOLDED.items():
        state[matrix] *= state[scale][:, :, None]
        state[scale].fill_(1.0)
    return state


def load_state(model: GPT, state: dict[str, Tensor], origin: Path):
    """Copy parameters by name into the model, all or none; a missing, unknown or misshapen one is an error that names
    the file they came from."""
    wanted = {name: tuple(p.shape) for name, p in model.named_parameters()}
    given = {name: tuple(t.shape) for name, t in state.items()}
    for name in wanted | given:
        shape = given.get(name, "no")
        require(
            shape == wanted.get(name),
            f"{origin}: holds {shape} {name}, the settings ask for {wanted.get(name, 'none')}; "
            "use the settings it was made with",
        )
        require(state[name].isfinite().all(), f"{origin}: {name} holds a value that is not finite; write it anew")
    model.load_state_dict(state)


def batch_loss(model: GPT, batch: Batch, total: int, looped: bool) -> Tensor:
    """Sum of nats over this micro-batch's targets / `total`, the tokens of the global batch."""
    hidden = model.trunk(batch.tokens, batch.seq, looped=looped)
    targets = batch.targets.clamp(min=0)
    weight = (batch.targets >= 0).float() / total  # padding has target -1
    if model.logit_calibration is not None:
        return torch.dot(model.nll(hidden, targets).nats, weight)
    return head_loss(hidden, model.tok_emb.to(model.dtype), targets, model.caps, weight)


# ======== Adapters: LoRA stacked over visits and documents ===========================================================


class LoRA(NamedTuple):
    """Low-rank adapters, one for each kind of product, visit and document. To the product of a document's tokens x
    (n, in) it adds
        delta(x) = scale x A B          A (in, rank), B (rank, out), scale = alpha / rank
    The tensors are leaves of autograd and never module parameters, so the model stays unaware of them. They are stored
    in the order of this product: their gradients then come out of it contiguous, as the fused optimizer needs them."""

    a: dict[str, list[Tensor]]  # kind -> for each visit (documents, in, rank) fp32
    b: dict[str, list[Tensor]]  # kind -> for each visit (documents, rank, out) fp32
    widths: dict[str, int]  # kind -> out, of every kind, adapted or not
    scale: float  # alpha / rank

    def add_to(self, y: Tensor, kind: str, visit: int, x: Tensor) -> Tensor:
        """y (documents * n, out) plus delta(x) of x (documents * n, in). The kind "qkv" joins q, k and v."""
        kinds = "qkv" if kind == "qkv" else (kind,)
        if self.a.keys().isdisjoint(kinds):
            return y
        deltas = [self.delta(k, visit, x) for k in kinds]
        return y + torch.cat(deltas, dim=-1)

    def delta(self, kind: str, visit: int, x: Tensor) -> Tensor:
        """x (documents * n, in) -> (documents * n, out), zero where the kind is not adapted."""
        if kind not in self.a:
            return x.new_zeros(len(x), self.widths[kind])
        a = self.a[kind][visit].to(x.dtype)
        b = (self.scale * self.b[kind][visit]).to(x.dtype)
        by_document = x.unflatten(0, (len(a), -1))  # (documents, n, in)
        return (by_document @ a @ b).flatten(0, 1)

    def leaves(self) -> list[Tensor]:
        """Every tensor that learns."""
        return list(itertools.chain(*self.a.values(), *self.b.values()))

    def first(self, documents: int) -> "LoRA":
        """The adapters of the first documents: leaves of their own in the same memory."""

        def cut(part):
            return {kind: [t.detach()[:documents].requires_grad_() for t in part[kind]] for kind in part}

        return self._replace(a=cut(self.a), b=cut(self.b))


def new_lora(model: GPT, documents: int, masked: frozenset, rank: int, alpha: float, seed: int) -> LoRA:
    """B zero; A uniform in +-1/sqrt(in), the same for every document, so that no score depends on a document's batch.
    Kinds in `masked` get no adapter. Their A is drawn all the same: the others begin as if nothing were masked."""
    d = model.cfg.model_dim
    device = model.tok_emb.device
    visits = len(model.schedules[model.cfg.looped])
    widths = {
        "q": model.q_dim,
        "k": model.kv_dim,
        "v": model.kv_dim,
        "o": d,
        "mlp": d,
        "head": model.cfg.vocab_size,
    }
    generator = torch.Generator().manual_seed(seed)
    a = {}
    b = {}
    for kind, width in widths.items():
        count = 1 if kind == "head" else visits
        uniform = torch.rand(count, 1, d, rank, generator=generator)
        initial = (2 * uniform - 1) / math.sqrt(d)
        if kind not in masked:
            a[kind] = [t.repeat(documents, 1, 1).requires_grad_() for t in initial.to(device)]
            b[kind] = [torch.zeros(documents, rank, width, device=device, requires_grad=True) for _ in a[kind]]
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

    def muon(*heights: int) -> Rule:
        return Rule(cfg.matrix_lr, cfg.muon_wd, heights)

    scalars = Rule(cfg.scalar_lr, cfg.adam_wd)
    table = {
        "qkv": muon(model.q_dim, model.kv_dim, model.kv_dim),  # Q, K and V are three matrices
        "o": muon(model.o.size(1)),
        "up": muon(model.up.size(1)),
        "down": muon(model.down.size(1)),
        "tok_emb": Rule(cfg.tied_embed_lr, cfg.embed_wd),
        "caps": Rule(cfg.scalar_lr, 0.0),  # decay would pull them from LOGIT_SOFTCAP to zero
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


def muon_direction(m: Tensor, grad: Tensor, momentum: float, coefficients: tuple) -> Tensor:
    """What matrices (n, rows, cols) of momentum m move along: Nesterov momentum, rows normed (MuonEq-R),
    orthogonalised. Updates m, overwrites grad."""
    m.mul_(momentum)
    m.add_(grad)  # m <- momentum m + g
    u = grad.add_(m, alpha=momentum)  # g + momentum m
    row_norms = torch.linalg.vector_norm(u, dim=-1, keepdim=True, dtype=torch.float32)
    u = u / row_norms.clamp_min(1e-7).to(u.dtype)
    return orthogonalize(u, coefficients)


def clip_factor(shards: list[Tensor], small: list[Tensor], limit: float, ranks: Ranks) -> Tensor:
    """min(1, limit / norm of the gradient of all parameters over all ranks), a scalar on the device.

    shards: this rank's of Muon's gradients; small: Adam's, of which every rank already has the sum."""
    norms = torch._foreach_norm(shards, dtype=torch.float32)  # fp32: the shards are bf16 on a GPU
    squares = ranks.all_reduce_(torch.stack(norms).square().sum())
    small_norms = torch._foreach_norm(small)
    squares += torch.stack(small_norms).square().sum()
    norm = squares.sqrt()
    return (limit / (norm + 1e-6)).clamp(max=1.0)


class Block(NamedTuple):
    """Some rows of a parameter (layers, all rows, cols): one matrix in each layer."""

    parameter: Tensor
    rows: slice


class MuonGroup:
    """All matrices of one shape, from several parameters, in one tensor (matrices, rows, cols) cut over the ranks: each
    rank finds the direction of its shard."""

    def __init__(self, rows: int, cols: int, blocks: list[Block], ranks: Ranks, dtype: torch.dtype):
        """dtype: of momentum and update."""
        self.ranks = ranks
        self.rows = rows
        self.cols = cols
        self.blocks = blocks
        self.count = len(blocks) * len(blocks[0].parameter)  # a matrix in each layer
        self.shard = math.ceil(self.count / ranks.world)  # matrices of one rank; the last ranks' may be padding
        self.padded = self.shard * ranks.world
        self.momentum = torch.zeros(self.shard, rows, cols, dtype=dtype, device=ranks.device)  # this rank's

    def pieces(self, t: Tensor):
        """Each block and its part (layers, rows, cols) of t (padded, rows, cols)."""
        return zip(self.blocks, t[: self.count].chunk(len(self.blocks)))

    def gradient(self) -> Tensor:
        """(padded, rows, cols) in the momentum's dtype."""
        gradient = self.momentum.new_zeros(self.padded, self.rows, self.cols)
        for (p, rows), piece in self.pieces(gradient):
            piece.copy_(p.grad[:, rows])
        return gradient

    def reduce_scatter(self):
        """This rank's shard of the summed gradient, and what to wait for before reading it."""
        ranks = self.ranks
        gradient = self.gradient()
        if ranks.world == 1 or ranks.device.type == "cpu":  # gloo has no reduce_scatter
            return ranks.all_reduce_(gradient).chunk(ranks.world)[ranks.rank], None
        shard = torch.empty_like(self.momentum)
        return shard, dist.reduce_scatter_tensor(shard, gradient, async_op=True)

    def gather(self, update: Tensor):
        """All ranks' updates (padded, rows, cols), and what to wait for before reading them."""
        if self.ranks.world == 1:
            return update, None
        everyones = update.new_empty(self.padded, self.rows, self.cols)
        return everyones, dist.all_gather_into_tensor(everyones, update, async_op=True)

    def apply_(self, update: Tensor, lr: float, weight_decay: float):
        """w <- (1 - lr * weight_decay) w - lr * scale * update, with update (padded, rows, cols)."""
        scale = math.sqrt(max(1.0, self.rows / self.cols))  # tall matrices need larger entries
        for (p, rows), piece in self.pieces(update):
            w = p[:, rows]
            w.mul_(1 - lr * weight_decay)
            w.add_(piece, alpha=-lr * scale)


def arrived(t: Tensor, wait) -> Tensor:
    """t, once its communication has ended."""
    if wait is not None:
        wait.wait()
    return t


class Optimizer:
    """One step: sum the gradients over the ranks, clip their global norm, update. The ranks share Muon's matrices out.

    Gradients must hold the sum over this rank's tokens of the loss divided by the global number of tokens."""

    def __init__(self, model: GPT, cfg: Config, ranks: Ranks):
        self.cfg = cfg
        self.ranks = ranks
        self.parameters: list[Tensor] = list(model.parameters())
        self.small = []  # Adam's parameters
        adam_groups = {}  # rule -> the group of those of `small` that share it
        shapes = {}  # (rows, cols) -> Muon's blocks of that shape: q and o together, k and v together
        for p, rule in zip(self.parameters, parameter_rules(model, cfg).values()):
            if not rule.heights:
                self.small.append(p)
                settings = {
                    "params": [],
                    "base_lr": rule.lr,  # step() sets lr = base_lr * lr_scale
                    "weight_decay": rule.weight_decay,
                }
                adam_groups.setdefault(rule, settings)["params"].append(p)
                continue
            assert sum(rule.heights) == p.size(1), "Muon needs every row of a parameter once"
            low = 0
            for height in rule.heights:
                block = Block(p, slice(low, low + height))
                shapes.setdefault((height, p.size(2)), []).append(block)
                low += height
        groups = [MuonGroup(rows, cols, blocks, ranks, model.dtype) for (rows, cols), blocks in shapes.items()]
        # Largest first: its communication overlaps the others' work.
        self.muon = sorted(groups, key=lambda group: -group.momentum.numel())
        self.adam = torch.optim.AdamW(
            list(adam_groups.values()),
            betas=(cfg.beta1, cfg.beta2),
            eps=cfg.adam_eps,
            fused=True,  # one kernel for each group
        )
        self.average = [torch.zeros_like(p) for p in self.parameters] if cfg.ema_decay else []

    @torch.no_grad()
    def step(self, step: int, lr_scale: float):
        """Update every parameter with its gradient and forget the gradients. Adam works while Muon's updates travel."""
        cfg = self.cfg
        # 1. Sum over the ranks: each gets its shard of Muon's gradients and all of Adam's.
        for p in self.parameters:
            if p.grad is None:  # a rank without a micro-batch still takes part in the sums
                p.grad = torch.zeros_like(p)
        travelling = [group.reduce_scatter() for group in self.muon]
        small = self.ranks.all_reduce_flat([p.grad for p in self.small])
        shards = [arrived(*shard) for shard in travelling]

        # 2. Clip the norm of the sum, not that of each rank's part.
        clip = clip_factor(shards, small, cfg.grad_clip_norm or math.inf, self.ranks)
        torch._foreach_mul_(small, clip)

        # 3. Update.
        momentum = self.muon_momentum(step)
        travelling = []
        for group, shard in zip(self.muon, shards):
            clipped = shard * clip.to(shard.dtype)
            update = muon_direction(group.momentum, clipped, momentum, MUON_COEFFICIENTS[cfg.muon_coefficients])
            travelling.append(group.gather(update))
        for p, grad in zip(self.small, small):
            p.grad = grad
        for group in self.adam.param_groups:
            group["lr"] = group["base_lr"] * lr_scale
        self.adam.step()
        for group, update in zip(self.muon, travelling):
            group.apply_(arrived(*update), cfg.matrix_lr * lr_scale, cfg.muon_wd)

        # 4. Average.
        for p in self.parameters:
            p.grad = None
        if self.average:
            torch._foreach_lerp_(self.average, self.parameters, 1 - cfg.ema_decay)

    def muon_momentum(self, step: int) -> float:
        """Muon's momentum after its linear warm-up or on the way there."""
        cfg = self.cfg
        steps = cfg.muon_momentum_warmup_steps
        warm = min(step / steps, 1.0) if steps else 1.0
        return (1 - warm) * cfg.muon_momentum_warmup_start + warm * cfg.muon_momentum

    @torch.no_grad()
    def use_average(self, steps: int):
        """Put the debiased average over the `steps` steps so far into the model: average / (1 - decay^steps).

        The average begins at zero; without the correction a short run would be averaged with zeros."""
        if steps:
            correction = 1 - self.cfg.ema_decay**steps
            for p, average in zip(self.parameters, self.average):
                p.copy_(average / correction)


# ======== Training ====================================================================================================


class Schedule:
    """How far training is, and what depends on this progress in [0, 1): learning rate, loops, attention span.

    The limit is MAX_WALLCLOCK_SECONDS less the reserve; where that is 0, it is ITERATIONS, which caps every run."""

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
        if progress < 1 - warmdown:
            return 1.0
        return max((1 - progress) / warmdown, self.cfg.min_lr)

    def ramp(self, step: int, changed_at: float) -> float:
        """Extra factor after a change of span at step `changed_at`: 1/n, 2/n, ..., 1."""
        n = self.cfg.seq_change_warmup_steps
        return min((step - changed_at + 1) / n, 1.0) if n else 1.0


class Trainer:
    """Everything a training run holds: data, optimizer, schedule, and the curve it leaves."""

    def __init__(self, model: GPT, cfg: Config, ranks: Ranks, log: Log, diagnose: Callable = None):
        self.model = model
        self.cfg = cfg
        self.ranks = ranks
        self.log = log
        self.diagnose = diagnose  # what VAL_EVERY_STEPS calls, with model, loops or none, steps so far and clock
        self.stream = TrainStream(cfg)
        self.fetch = Prefetch(self.stream, ranks)
        self.optimizer = Optimizer(model, cfg, ranks)
        self.schedule = Schedule(cfg)
        self.curve = []  # (step, seconds, loss, learning-rate factor) of every logged step

    def warm_up(self):
        """Run steps of both schedules on real shapes, then restore weights and optimizer entirely.

        Kernels are compiled and libraries are set up before the clock starts."""
        parameters = self.optimizer.parameters
        saved = [p.detach().clone() for p in parameters]
        for looped in sorted({self.schedule.looped(0.0), self.schedule.looped(1.0)}):  # those that will occur
            for step in range(self.cfg.warmup_steps):
                self.gradients(self.fetch(step, self.cfg.train_seq_len), looped)
                self.optimizer.step(step, 1.0)
        with torch.no_grad():
            torch._foreach_copy_(parameters, saved)
        self.optimizer = Optimizer(self.model, self.cfg, self.ranks)  # no momentum, no moments, no average

    def run(self) -> dict:
        """Train until the budget or ITERATIONS ends, leave the averaged weights in the model, return the counts."""
        cfg = self.cfg
        schedule = self.schedule
        clock = Clock(self.ranks)
        step = 0
        looped = False
        span = schedule.span(0.0)  # attention span of the last step
        changed_at = -math.inf  # step at which the span changed last
        # All ranks read the same clock, so they stop, loop and change the span at the same step.
        while step < cfg.iterations and schedule.allows(step, now := clock.tick()):
            progress = schedule.progress(step, now)
            if not looped and schedule.looped(progress):
                looped = True  # from here on a step visits more layers and takes longer
                self.log(f"step {step}: loops on at progress {progress:.3f}")
            if span != schedule.span(progress):
                span = schedule.span(progress)
                changed_at = step
                self.log(f"step {step}: attention span {span}")
            lr_scale = schedule.lr_scale(progress) * schedule.ramp(step, changed_at)

            loss = self.gradients(self.fetch(step, span), looped)  # a thread builds the next step's batches meanwhile
            self.optimizer.step(step, lr_scale)
            clock.step_done()
            step += 1
            if step <= 5 or step % cfg.train_log_every == 0:  # the first steps show a mistake early
                self.report(step, loss, lr_scale, clock)
            if cfg.val_every_steps and step % cfg.val_every_steps == 0:
                self.diagnose(self.model, looped, step, clock)
        seconds = clock.stop()
        self.optimizer.use_average(step)
        tokens = step * cfg.train_batch_tokens
        rate = seconds / max(step, 1)
        self.log(f"trained {step} steps, {tokens:,} tokens in {seconds:.1f} s: {1e3 * rate:.1f} ms/step")
        return {
            "steps": step,
            "tokens": tokens,
            "seconds": seconds,
            "epochs": tokens / self.stream.tokens,
            "curve": self.curve,
        }

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
        loss = self.ranks.all_reduce_(loss).item()  # waits for the GPU
        seconds = clock.seconds()
        require(math.isfinite(loss), f"the loss is {loss} at step {step}; lower MATRIX_LR or TIED_EMBED_LR")
        self.curve.append((step, round(seconds, 3), loss, lr_scale))
        progress = self.schedule.progress(step, seconds)
        rate = seconds / step
        left = seconds * (1 / progress - 1)  # progress is linear in time, or in steps
        self.log(
            f"step {step:6d}  {100 * progress:5.1f} %  loss {loss:.4f}  lr x {lr_scale:.3f}  "
            f"{1e3 * rate:7.1f} ms/step  {self.cfg.train_batch_tokens / rate:11,.0f} tokens/s  "
            f"{seconds:6.1f} s, {max(left, 0):.0f} s left",
            fleeting=True,
        )


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
#   trellis     In a stack whose rows follow the trellis (see there), x_j is odd just where the row's state is, and the
#               values before it tell that. So only (x_j - state mod 2) / 2 is coded, of half the mean and sigma.
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
HALF_Q8 = 128  # what the mean of a symbol on the trellis loses in odd states
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
MAX_WIDTH = 4096
MIN_D_Q22 = 2.0**15  # half of 1/64: rounding may take d below it
MOST_SIDE = 1 << 22  # bytes of a header's JSON


class CorrelationPrior(NamedTuple):
    """What the first rows of a stack are predicted with: the correlations of earlier stacks of the same width."""

    rows: int  # that the prior counts for against a matrix's own rows; 0: no predictor, columns are independent
    pool_weight: float  # of the earlier stacks' correlations against the identity; also the most that the members' get


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
    trellis: int = 0  # 1: all rows are paths of the trellis


# --- Integer tables ---


def binary_roots(n: int) -> list[int]:
    """2**(i/n) * 2**60 for i < n. decimal rounds exp and ln correctly, so every machine agrees."""
    logarithms = (Decimal(2).ln() * i / n for i in range(n))
    return [int(x.exp() * 2**60) for x in logarithms]


def half_gaussian() -> ndarray:
    """Mass of N(0, 1) on [0, i / GAUSS_STEPS] times 2**30, up to 9 sigma, int64 (9 * GAUSS_STEPS + 1,), by the
    trapezoid rule."""
    exponent = Decimal(-1) / (2 * GAUSS_STEPS**2)
    ratio = int(exponent.exp() * 2**90)  # of the density at one place to that at the place before, in 2**-90
    change = ratio * ratio >> 90
    density = [1 << 64]
    density_q90 = 1 << 90
    for _ in range(9 * GAUSS_STEPS):
        density_q90 = density_q90 * ratio >> 90
        ratio = ratio * change >> 90
        density.append(density_q90 >> 26)
    trapezoids = map(sum, itertools.pairwise(density))
    area = list(itertools.accumulate(trapezoids, initial=0))
    return np.array([(a << 29) // area[-1] for a in area])


def bucket_sigmas_q20() -> ndarray:
    """Standard deviation of the Gaussian behind each variance bucket, int64 (VARIANCE_BUCKETS,)."""
    middles_q60 = np.array(binary_roots(2 * BUCKETS_PER_OCTAVE)[1::2])
    octave, step = np.divmod(np.arange(VARIANCE_BUCKETS), BUCKETS_PER_OCTAVE)
    middle_q40 = middles_q60[step] >> 20 - MIN_LOG2_VARIANCE - octave
    # Rounding to unit bins has added 1/12 to the variance (Sheppard's correction).
    true_q40 = np.maximum(middle_q40 - 2**40 // 12, 2**40 // 48)
    return np.sqrt(true_q40).astype(np.int64)  # exact below 2**52: IEEE square roots are


def frequency_tables() -> ndarray:
    """Integer frequencies of all cells, (mixtures, VARIANCE_BUCKETS * MEAN_FRACTIONS * 256), int64. The cell of a
    symbol is table * 256 + code. Each table's sum is 2**PROB_BITS. Symbols beyond 6 sigma + 2 have none and are
    escaped; ESCAPE has at least 1."""
    half = half_gaussian()
    sigma_q20 = bucket_sigmas_q20()[:, None, None]
    fractions = np.arange(MEAN_FRACTIONS)[:, None]
    symbols = np.arange(-MAX_SYMBOL, MAX_SYMBOL + 2)
    # In 1 / (2 * MEAN_FRACTIONS): a symbol less 1/2, less the mean's fraction.
    edges = (2 * symbols - 1) * MEAN_FRACTIONS - 2 * fractions
    edges_q32 = edges * 2**32 // (2 * MEAN_FRACTIONS)
    inside = np.abs(symbols[:-1]) <= (sigma_q20 * 6 >> 20) + 2
    room = SLOT_MASK - inside.sum(-1, keepdims=True)  # every symbol inside gets 1 before the rest is dealt out
    tables = []
    for mixture in TAIL_SHAPES:
        mass = 0  # below each edge, in 2**-32
        for quarters in mixture:
            x = edges_q32 // (quarters * sigma_q20)  # in 1 / GAUSS_STEPS of this Gaussian's sigma
            distance = np.minimum(np.abs(x), len(half) - 1)
            mass += np.sign(x) * half[distance]
        freq = np.where(inside, 1 + (np.diff(mass) * room >> 32), 0)
        freq = np.insert(freq, ESCAPE, 1, axis=-1).reshape(-1, 256)
        left_over = (1 << PROB_BITS) - freq.sum(-1)  # by rounding
        freq[np.arange(len(freq)), freq.argmax(-1)] += left_over
        tables.append(freq.ravel())
    return np.stack(tables)


FREQUENCIES = frequency_tables()
BEFORE = FREQUENCIES.cumsum(1) - FREQUENCIES & SLOT_MASK  # of every cell: the sum of those before it in its table
ESCAPED = FREQUENCIES[0] == 0  # cells that cannot be coded: every mixture has its zeros in the same places
ESCAPED[ESCAPE::256] = True
# Mantissas of frexp, 0.5 <= m < 1, at which the rounded logarithm changes.
LOG2_EDGES = np.array(binary_roots(2 * LOG2_STEPS)[1::2], np.float64) / 2**61


# --- Symbols to rANS states and back ---


def rans_encode(steps: list[tuple[int, ndarray]], rider: bytes) -> tuple[bytes, bytes]:
    """steps: mixture and cells, in the order of decoding. Returns states uint32 and words uint16. A state begins with
    16 bits that carry nothing, so they carry `rider` (two bytes a state), which the decoder ends with."""
    states = np.frombuffer(rider, "<u2").astype(np.int64) + (1 << 16)
    words = []
    for mixture, cells in reversed(steps):
        state = states[: len(cells)]  # a view
        freq = FREQUENCIES[mixture].take(cells)
        full = np.flatnonzero(state >= freq << (32 - PROB_BITS))
        words.append(state[full].astype("<u2").tobytes())
        state[full] >>= 16
        times = (state / freq).astype(np.int64)  # exact: state < 2**32, freq <= 2**14
        state += times * ((1 << PROB_BITS) - freq)
        state += BEFORE[mixture].take(cells)
    return states.astype("<u4").tobytes(), b"".join(reversed(words))


class SymbolWriter:
    """Turns the columns of one stack into cells of the tables, for `rans_encode`."""

    def __init__(self):
        self.cells = []  # arrays int32 (G * rows,), one for every step
        self.escaped = []  # bytes of raw int16

    def columns(self, table, least_q8, values, state):
        """Take some steps: columns of all rows of a chunk, int32 (steps, G, rows): the table of each symbol at a mean
        without fraction, the mean's value of code 0, which may be one for all, and its value. `state` of the trellis,
        or None: a value on it is as odd as its state, and its symbol is half of it."""
        if state is not None:
            least_q8 = least_q8 - (values & 1) * HALF_Q8
            values = values >> 1
        code = (values - (least_q8 >> 8)).clip(-1, ESCAPE) & 255  # what is out of reach becomes ESCAPE
        cell = (at_fraction(table, least_q8) << 8 | code).reshape(len(table), -1)
        escaped = ESCAPED.take(cell)
        if escaped.any():
            cell[escaped] |= ESCAPE
            self.escaped.append(values.reshape(cell.shape)[escaped].astype("<i2").tobytes())
        self.cells.extend(cell)

    def best_mixture(self) -> int:
        """The tail shape that codes every fifth column best."""
        counts = np.bincount(np.concatenate(self.cells[::5]), minlength=len(ESCAPED))
        gains = np.log2(np.maximum(FREQUENCIES, 1)) @ counts  # nothing is coded with them, so libm may be used
        return int(np.argmax(gains))


def take(values, count: int):
    """The first `count` values and the rest."""
    if count > len(values):
        raise ValueError("the code ends early")
    return values[:count], values[count:]


class SymbolReader:
    """Decodes columns, stack by stack, from states, words and escaped values, which it uses up from the front."""

    def __init__(self, states: ndarray, words: ndarray, escaped: ndarray):
        self.states = states.astype(np.int64)
        self.words = words
        self.escaped = escaped

    def begin(self, mixture: int):
        """Lay out the tables of a stack."""
        frequencies = FREQUENCIES[mixture]
        codes = np.arange(len(frequencies)).astype(np.uint8)  # of every cell: its number modulo 256
        self.codes = np.repeat(codes, frequencies)  # of every slot of every table
        self.before = BEFORE[mixture]
        self.others = (1 << PROB_BITS) - frequencies

    def columns(self, table, least_q8, values, state):
        """As SymbolWriter.columns, but fills in the values, and leads the trellis' state, uint8 (G * rows,), to the
        next column."""
        codes = np.empty((len(table), table[0].size), np.uint8)
        if state is not None:
            odd = np.empty_like(codes)  # the states before each column, modulo 2
            # Whether code 0 stands for an odd symbol: bit 0 in even states, bit 1 in odd ones.
            turns = (least_q8 >> 8 & 1 | (least_q8 - HALF_Q8 >> 8 & 1) << 1).astype(np.uint8)
            turns = np.broadcast_to(turns, values.shape).reshape(codes.shape)
        rans = self.states[: codes.shape[1]]  # a view: the states advance in place
        cells = at_fraction(table, least_q8).reshape(codes.shape) << np.int64(8)
        slots = cells << PROB_BITS - 8
        escapes = []
        for i, (code, cell, slot) in enumerate(zip(codes, cells, slots)):  # cell, slot: the first of their table
            if state is not None:
                np.bitwise_and(state, 1, out=odd[i])
                half = odd[i].astype(np.int64) * (MEAN_FRACTIONS // 2 << 8)
                cell ^= half  # half a unit less: the fraction, modulo 1, moves to the other half of the tables
                slot ^= half << PROB_BITS - 8
            slot += rans & SLOT_MASK
            self.codes.take(slot, out=code, mode="clip")  # in range; without a mode, numpy would copy `code`
            cell += code
            # freq (s div 2**14) + s mod 2**14 - before
            times = rans >> PROB_BITS
            times *= self.others.take(cell)
            rans -= times
            rans -= self.before.take(cell)
            low = (rans < 1 << 16).nonzero()[0]
            taken, self.words = take(self.words, len(low))
            rans[low] = rans[low] << 16 | taken
            escaped = (code == ESCAPE).nonzero()[0]
            if len(escaped):
                raw, self.escaped = take(self.escaped, len(escaped))
                escapes.append((i, escaped, raw))
            if state is not None:
                symbol_is_odd = code ^ turns[i] >> odd[i]
                if len(escaped):
                    symbol_is_odd[escaped] = raw
                NEXT_STATES.take(state << 1 | symbol_is_odd & 1, out=state, mode="clip")
        if state is not None:
            odd = odd.reshape(values.shape)
            least_q8 = least_q8 - odd * np.int32(HALF_Q8)
        symbols = codes.reshape(values.shape) + (least_q8 >> 8)
        for i, escaped, raw in escapes:
            symbols[i].reshape(-1)[escaped] = raw
        values[...] = symbols if state is None else symbols << 1 | odd


# --- The model ---


def log2_fixed(x: ndarray) -> ndarray:
    """round(LOG2_STEPS * log2(x)), int32, equal on every machine."""
    mantissa, exponent = np.frexp(x)
    octaves = exponent - 1
    return octaves * LOG2_STEPS + np.searchsorted(LOG2_EDGES, mantissa, side="right").astype(np.int32)


def ldl(c: ndarray) -> tuple[ndarray, ndarray]:
    """Factor correlations c (G, n, n) = (I + L) diag(d) (I + L)^T, L strictly lower: L_q20 (G, n, n) and d_q22 (G, n),
    integers in float64.

    L_ij d_j = c_ij - sum_k<j L_ik (L_jk d_k), left-looking in panels of 16 columns. By Cauchy-Schwarz
    sum_k |L_ik d_k L_jk| <= 1, so partial sums stay below 2**53 in any order."""
    ld_q22 = np.rint(np.ascontiguousarray(c.mT) * 2.0**22)  # begins as c^T, becomes L d column by column
    low_q20 = np.zeros_like(ld_q22)
    d_q22 = np.empty(c.shape[:2])
    for first in range(0, c.shape[1], 16):
        panel = slice(first, first + 16)
        known_q42 = ld_q22[:, panel, :first] @ low_q20[:, first:, :first].mT
        rest = ld_q22[:, panel, first:] - np.rint(known_q42 * 2.0**-20)  # columns as rows: each is read at once
        for i in range(rest.shape[1]):
            j = first + i
            d_q22[:, j] = np.maximum(rest[:, i, i], MIN_D_Q22)
            inverse = 2.0**20 / d_q22[:, j, None]
            column = np.rint(rest[:, i, i + 1 :] * inverse)
            low_q20[:, j + 1 :, j] = column
            row = rest[:, i, i + 1 : rest.shape[1], None] * 2.0**-20
            rest[:, i + 1 :, i + 1 :] -= np.rint(column[:, None] * row)
        ld_q22[:, first:, panel] = rest.mT
    return low_q20, d_q22


def correlation(moments: ndarray) -> ndarray:
    """(G, n, n) second moments to correlations."""
    square = np.linalg.diagonal(moments)
    scale = np.sqrt(np.maximum(square, 1e-9))
    return moments / scale[:, :, None] / scale[:, None, :]


def blend(a, b, weight):
    """a (1 - weight) + b weight, arrays."""
    return a * (1 - weight) + b * weight


def second_moments(columns: ndarray) -> ndarray:
    """Sums of x x^T over the rows of every member, columns (n, G, R) -> (G, n, n). Sums of products are exact, see
    MAX_CHUNK_ROWS. Of a matrix with itself BLAS does half of them."""
    width, members, rows = columns.shape
    moments = np.zeros((members, width, width))
    for first in range(0, rows, MAX_CHUNK_ROWS):
        part = columns[:, :, first : first + MAX_CHUNK_ROWS]
        exact = np.float32 if np.abs(part).max() <= 128 else np.float64
        for member, total in enumerate(moments):
            x: Any = part[:, member].astype(exact)
            total += x @ x.T
    return moments


# --- Trellis ---
#
# Dependent quantisation: a row begins in state 0 of 8, its next value must be as even or odd as the state, and the
# value modulo 4 names the next state. Neighbouring values are two steps apart, as far as the code's length goes, but
# over a whole row paths come closer to the weights than a grid of two steps does: the error is 0.79 of that grid's. Of
# the codes with 8 states this has paths that lie furthest apart (Ungerboeck 1982, parity checks 13 and 04).

TRELLIS_STATES = 8


def next_state(state, value):
    """The state behind a value; integer arrays or tensors."""
    return state >> 1 ^ value & 2 ^ (value & 1) * 5


# The state behind state s and a value (x - s mod 2) / 2, at 2 s + that value's last bit.
NEXT_STATES = np.array([next_state(s, 2 * last + (s & 1)) for s in range(TRELLIS_STATES) for last in (0, 1)], np.uint8)


def follows_trellis(columns: ndarray) -> bool:
    """Whether every row of columns (n, ...) is a path."""
    state = np.zeros_like(columns[0])
    for column in columns:
        if ((column ^ state) & 1).any():
            return False
        state = next_state(state, column)
    return True


class StackModel:
    """The distribution of every symbol of a stack, given those before it. Rows go in chunks, and in them columns."""

    def __init__(self, columns: ndarray, header: StackHeader):
        """columns (n, G, R) int32: the stack's values, which an encoder reads and a decoder fills in."""
        width, members, _ = columns.shape
        self.columns = columns
        self.variance = np.exp2(np.array(header.log2_variance, np.float64))  # of integers: exact
        self.prior = CORRELATION_PRIORS[header.prior]
        self.row_trust, self.column_trust = header.trust
        self.trellis = header.trellis
        self.squares = np.zeros((members, width))  # sums of x^2 of the rows seen
        self.moments = np.zeros((members, width, width))  # sums of x x^T, which a predictor needs
        self.seen = 0
        self.gain_sum_q8 = np.full(members, 256.0 * UNIT_GAIN_SYMBOLS)  # of squared e / sigma

    def shared(self, sums):
        """Sums over the rows of each member, (G, ...), added up over the members, each at unit variance, (1, ...)."""
        return sum(m / v for m, v in zip(sums, self.variance))[None]

    def column_variances(self):
        """Of x (G, n): a column's own variance, drawn to that of all members."""
        total = UNIT_VARIANCE_ROWS + self.seen * len(self.squares)
        shared = self.shared(self.squares)
        common = (UNIT_VARIANCE_ROWS + shared) / total * self.variance[:, None]
        variance = (self.column_trust * common + self.squares) / (self.column_trust + self.seen)
        return np.maximum(variance, MIN_VARIANCE)

    def correlations(self, pool):
        """Correlations (G, n, n) to code with. With more rows, weight moves from identity and pool to those of all
        members, then to the matrix's own."""
        identity = np.eye(len(self.columns))
        rows = self.seen * len(self.moments)
        common = self.prior.pool_weight * rows / (rows + SHARED_CORRELATION_ROWS)
        own = self.seen / (self.seen + self.prior.rows)
        c = blend(identity, pool, self.prior.pool_weight)
        c = blend(c, correlation(self.shared(self.moments)), common)
        c = blend(c, correlation(self.moments), own)
        return np.broadcast_to(blend(c, identity, IDENTITY_SHARE), self.moments.shape)

    def predictor(self, pool):
        """L (G, n, n), whole multiples of 2**-12 in float64, of x = e + L e, or None for L = 0; and the variance of e
        (G, n)."""
        variance = self.column_variances()
        if not self.prior.rows:
            return None, variance
        low_q20, d_q22 = ldl(self.correlations(pool))
        scale = np.sqrt(np.minimum(variance, MAX_SCALED_VARIANCE))
        ratio = scale[:, :, None] / scale[:, None, :]  # from unit variances to those of x
        low_q12 = np.rint(low_q20 * (ratio * 2.0**-8))
        return low_q12 * 2.0**-12, d_q22 * 2.0**-22 * variance

    def code_chunk(self, size: int, coder, pool):
        """Code the next `size` rows of every member, or what is left, then learn from them."""
        low, variance = self.predictor(pool)
        sigma = np.sqrt(variance).T[:, :, None]
        log2_variance = log2_fixed(variance).T[:, :, None]
        chunk = self.columns[:, :, self.seen : self.seen + size]
        width, members, rows = chunk.shape
        e_q8 = np.empty(chunk.shape)
        mean_q8 = np.zeros((1, 1, 1))
        square_q8 = np.zeros((members, rows))  # sums of the rows' squared e / sigma
        gain = self.gain_sum_q8 / (256.0 * (UNIT_GAIN_SYMBOLS + width * self.seen))
        prior_q8 = gain[:, None] * (self.row_trust * 256)
        at_once = REFRESH_COLUMNS if low is None else 1  # columns whose tables do not depend on each other's values
        state = np.zeros(members * rows, np.uint8) if self.trellis else None
        for a in range(0, width, REFRESH_COLUMNS):
            block = slice(a, a + REFRESH_COLUMNS)
            per_symbol = 1 / (256 * (a + self.row_trust))
            log2_gain = log2_fixed((square_q8 + prior_q8) * per_symbol)
            table = first_tables(log2_variance[block] + log2_gain - 2 * LOG2_STEPS * self.trellis)
            if low is not None:  # what all columns before say of the next ones, in one product
                known_q8 = low[:, block, :a] @ e_q8[:a].transpose(1, 0, 2)
            for j in range(0, len(table), at_once):
                here = slice(a + j, a + j + at_once)
                if low is not None:
                    # No BLAS: its threads would begin and end at every column, which takes seconds on a busy machine.
                    recent_q8 = np.einsum("gk,kgr->gr", low[:, a + j, a : a + j], e_q8[a : a + j])
                    mean_q8 = np.rint(known_q8[None, :, j] + recent_q8).clip(-MAX_MEAN_Q8, MAX_MEAN_Q8)
                # To the nearest fraction, once cut, and from the mean down to the value of code 0.
                least_q8 = (mean_q8.astype(np.int32) >> self.trellis) + 128 // MEAN_FRACTIONS - MAX_SYMBOL * 256
                coder.columns(table[j : j + at_once], least_q8, chunk[here], state)
                innovation_q8 = chunk[here] * 256 - mean_q8
                innovation_q8.clip(-MAX_INNOVATION_Q8, MAX_INNOVATION_Q8, out=e_q8[here])
            white_q8 = np.rint(e_q8[block] / sigma[block])
            white_q8 *= white_q8
            square_q8 += np.rint(white_q8 / 256).sum(0)
        self.gain_sum_q8 += square_q8.sum(1)
        self.squares += np.square(chunk, dtype=np.float64).sum(2).T
        if low is not None:
            self.moments += second_moments(chunk)
        self.seen += rows

    def teach(self, pools: dict[int, ndarray]):
        """Let the correlations of all rows guide later stacks of this width. pools: n -> (1, n, n)."""
        width = len(self.columns)
        own = correlation(self.shared(second_moments(self.columns)))
        pools[width] = blend(pools.get(width, own), own, 0.5)

    def code(self, coder, pool):
        """Code all rows through `coder`, a SymbolWriter or a SymbolReader. pool: correlations (1, n, n) that earlier
        stacks have left as prior; unused where there is no predictor."""
        members, rows = self.columns.shape[1:]
        most = max(1, min(RANS_STATES // members, MAX_CHUNK_ROWS))
        size = min(FIRST_CHUNK_ROWS, most)
        while self.seen < rows:
            self.code_chunk(size, coder, pool)
            size = min(2 * size, most)


def at_fraction(table: ndarray, least_q8: ndarray) -> ndarray:
    """The table at the mean's fraction, from that at a mean without."""
    return table + (least_q8 * MEAN_FRACTIONS >> 8 & MEAN_FRACTIONS - 1)


def first_tables(log2_variance: ndarray) -> ndarray:
    """The table of a variance, in 1 / LOG2_STEPS of an octave, at a mean without fraction."""
    above = log2_variance - MIN_LOG2_VARIANCE * LOG2_STEPS
    bucket = above // (LOG2_STEPS // BUCKETS_PER_OCTAVE)
    return bucket.clip(0, VARIANCE_BUCKETS - 1) * MEAN_FRACTIONS


# --- What the encoder chooses ---


def choose_prior(q: ndarray, pool: ndarray) -> int:
    """Index into CORRELATION_PRIORS for q (G, R, n), by Gaussian code length of odd rows given the correlation
    of even ones, on at most two members."""
    members, rows, width = q.shape
    if rows * members < 64 or width < 8:
        return len(CORRELATION_PRIORS) - 1
    q = q[:: max(members - 1, 1)].astype(np.float64)  # the first and the last
    square = (q**2).mean(1, keepdims=True)
    z = q / np.sqrt(np.maximum(square, MIN_VARIANCE))
    even = z[:, ::2]
    odd = z[:, 1::2]
    known = correlation(even.mT @ even)
    identity = np.eye(width)
    nats = []  # per symbol, against independent columns
    for prior in CORRELATION_PRIORS[:-1]:
        own = even.shape[1] / (even.shape[1] + prior.rows)
        c = blend(blend(identity, pool, prior.pool_weight), known, own)
        low = np.linalg.cholesky(blend(c, identity, IDENTITY_SHARE))
        e = torch.linalg.solve_triangular(torch.from_numpy(low), torch.from_numpy(odd).mT, upper=False)
        determinant = np.log(np.linalg.diagonal(low)).mean()
        energy = float(e.square().mean()) - (odd * odd).mean()
        nats.append(determinant + 0.5 * energy + CORRELATION_COST)
    return int(np.argmin([*nats, 0.0]))


def common_weight(squares: ndarray, axis: int) -> int:
    """How many observations the common variance counts for beside a row's own (axis 2) or a column's (axis 1), by how
    far theirs lie apart. squares (G, R, n) of the values."""
    spread = np.log(squares.mean(axis) + 1 / 12).var(1).mean()
    spread -= 2 / squares.shape[axis]  # what chance alone would give
    return int(np.clip(2 / max(spread, 1e-9), 2, 60))


def repeated_rows(q: ndarray) -> dict[int, int]:
    """Rows of a lone matrix (1, R, n) that equal an earlier row, and which: tokens that training never saw."""
    if len(q) > 1:
        return {}
    seen = {}
    first = [seen.setdefault(row.tobytes(), i) for i, row in enumerate(q[0])]
    return {i: source for i, source in enumerate(first) if source != i}


def residual_width(stacks: list[ndarray]) -> int:
    """The side that most values share: the width of the residual stream."""
    values = collections.Counter()
    for q in stacks:
        values.update(dict.fromkeys(q.shape[1:], q.size))
    return max(sorted(values), key=values.get, default=0)


# --- Stacks to bytes and back ---


def prepared(residual: int, pools: dict[int, ndarray], q: ndarray) -> tuple[StackHeader, StackModel, ndarray]:
    """What the encoder chooses for a stack (G, R, C), a model to code it with, and the pool of correlations to begin
    with; see StackModel.teach for pools. A matrix that writes to or reads from the residual stream is turned so that
    vectors of that width are its rows."""
    copies = repeated_rows(q)
    q = np.delete(q, list(copies), axis=1) if copies else q
    rows, width = q.shape[1:]
    turned = width != residual and (rows == residual or rows < width)
    q = q.mT if turned else q
    width = q.shape[2]
    squares = np.square(q, dtype=np.float64)
    variance = np.maximum(squares.mean((1, 2)), MIN_VARIANCE)
    pool = pools.get(width, np.eye(width))
    header = StackHeader(
        shape=list(q.shape),
        log2_variance=np.rint(np.log2(variance)).astype(int).tolist(),
        turned=int(turned),
        prior=choose_prior(q, pool),
        trust=[common_weight(squares, 2), common_weight(squares, 1)],
        copies=[list(copies), list(copies.values())],
    )
    columns = np.ascontiguousarray(q.transpose(2, 0, 1), np.int32)
    header = header._replace(trellis=int(follows_trellis(columns)))
    model = StackModel(columns, header)
    model.teach(pools)
    return header, model, pool


def encode_stacks(stacks: list[ndarray], rider: bytes = b"") -> tuple[bytes, int]:
    """Entropy-code integer stacks (G, R, C), |value| < 2**15. Returns the code and how many bytes of `rider` travel in
    it for nothing."""
    headers = []
    pools = {}
    steps = []  # mixture and cells of every column of every chunk
    escaped = []
    with ThreadPoolExecutor(1) as worker:  # prepares the next stacks meanwhile
        for header, model, pool in worker.map(functools.partial(prepared, residual_width(stacks), pools), stacks):
            writer = SymbolWriter()
            model.code(writer, pool)
            header = header._replace(mixture=writer.best_mixture())
            steps += [(header.mixture, cells) for cells in writer.cells]
            escaped += writer.escaped
            headers.append(header._asdict())
    count = max((len(cells) for _, cells in steps), default=0)
    ridden = min(len(rider), 2 * count)
    states, words = rans_encode(steps, rider[:ridden].ljust(2 * count, b"\0"))
    side = zlib.compress(json.dumps(headers, separators=(",", ":")).encode(), 9)
    raw = zlib.compress(b"".join(escaped), 9)
    sizes = struct.pack("<4I", len(side), len(raw), count, len(words) // 2)
    return sizes + side + raw + states + words, ridden


def decode_stacks(code: bytes, most: int = 1 << 27) -> tuple[list[ndarray], bytes]:
    """Inverse of encode_stacks: int32 stacks, and the rider padded with zeros. ValueError for a cut or altered code,
    and before anything of more than `most` values is made."""
    parts = io.BytesIO(code)
    side, raw, count, words = struct.unpack("<4I", parts.read(16))
    length = 16 + side + raw + 4 * count + 2 * words
    if len(code) != length:
        raise ValueError(f"{len(code)} bytes of code, {length} by their header")
    headers = json.loads(inflate(zlib.decompressobj(), parts.read(side), MOST_SIDE))
    escaped = np.frombuffer(inflate(zlib.decompressobj(), parts.read(raw), 2 * most), "<i2")
    states = np.frombuffer(parts.read(4 * count), "<u4")
    reader = SymbolReader(states, np.frombuffer(parts.read(), "<u2"), escaped)
    stacks = []
    pools = {}
    left = most
    with ThreadPoolExecutor(1) as worker:  # adds up correlations meanwhile
        for entry in headers:
            header = StackHeader(**entry)
            members, rows, width = header.shape
            left -= members * (rows + len(header.copies[0])) * width
            moments = 4 * members * width * width  # float64, and copied a few times
            sound = min(header.shape) > 0 and width <= MAX_WIDTH and len(header.log2_variance) == members
            if not sound or left < 0 or moments > most or header.trellis not in (0, 1):
                raise ValueError(f"a stack of shape {header.shape} and trellis {header.trellis} is none of this script")
            columns = np.empty((width, members, rows), np.int32)
            reader.begin(header.mixture)
            model = StackModel(columns, header)
            pool = model.prior.rows and worker.submit(pools.get, width, np.eye(width)).result()  # after earlier stacks
            model.code(reader, pool)
            worker.submit(model.teach, pools)
            q = columns.transpose((1, 0, 2) if header.turned else (1, 2, 0))
            copies, sources = np.array(header.copies, int)
            if len(copies):
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
ROW_STEPS = 16  # codes per octave of the rows' step sizes: 4.4 % apart
COLUMN_STEPS = 4  # codes per octave of the columns' factors: 19 % apart
AWQ_BITS = 8  # symbol range of the group of columns with finer steps (#1908)
AWQ_GROUP = 64  # columns of that group
LQER_GROUP = 64  # values of the int4 factor that share a scale (#1797)


# --- Hessians: second moments of the inputs of every matrix ---


def batch_moments(model: GPT, batch: Batch, seed: int, rows: bool) -> dict[str, Tensor]:
    """Sums of x x^T over the tokens at the input of every matrix, {tap: (layers, in, in) fp32}, over a layer's visits.

    With `rows` also {"NAME.rows": (layers, out) fp32}, for the embedding (out,): for every row of a matrix sum_t
    |dnats_t / drow|^2. One backward pass estimates it. With random signs s_t, E |sum_t s_t g_t|^2 = sum_t |g_t|^2:
    cross terms cancel."""
    sums = {}
    matrices = [getattr(model, name) for name in MATRICES]
    for kind, matrix in zip(MATRICES.values(), matrices):
        layers = len(matrix) if matrix.ndim == 3 else 1
        width = matrix.size(-1)
        sums[kind.hessian] = matrix.new_zeros(layers, width, width)

    def tap(kind: str, layer: int, x: Tensor):
        x = x.detach().float()
        sums[kind][layer].addmm_(x.T, x)

    with torch.set_grad_enabled(rows):
        hidden = model.trunk(batch.tokens, batch.seq, looped=model.cfg.looped, tap=tap)
        tap("head", 0, hidden)
        if rows:
            generator = torch.Generator().manual_seed(seed)  # on the CPU: the same signs on every device
            coins = torch.randint(0, 2, batch.targets.shape, generator=generator)
            targets = batch.targets
            signs = coins.to(targets.device) * 2 - 1
            nats = model.nll(hidden, targets.clamp(min=0)).nats
            loss = (nats * signs * (targets >= 0)).sum()
            gradients = torch.autograd.grad(loss, matrices)
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

    order: Tensor  # (n, cols) int64: columns as they are rounded, by falling diagonal
    upper: Tensor  # (n, cols, cols) fp32: U with U^T U = H^-1, columns in that order
    diagonal: Tensor  # (n, cols) fp32: of the Hessian, in the matrix's order; 0: an input that never fires


def error_feedback(hessian: Tensor, damping: float, sort: bool = True) -> ErrorFeedback:
    """hessian (n, cols, cols) fp32. `damping` times the mean diagonal is added to it, in fp64; a silent input counts as
    one of variance 1. Without `sort` columns keep their order.

    Activations span many orders of magnitude. Where rounding has made a Hessian indefinite, its damping grows tenfold
    until it is not."""
    h = hessian.double()
    diagonal = h.diagonal(dim1=1, dim2=2)
    diagonal.add_(diagonal == 0)  # a view: this writes into h
    order = (diagonal * sort).argsort(dim=1, descending=True, stable=True)
    h = h.take_along_dim(order[:, :, None], 1).take_along_dim(order[:, None], 2)
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


# --- GPTQ ---


class StepSizes(NamedTuple):
    """The step size of weight (layer, row, column) is row * column_scale."""

    row: Tensor  # (layers, rows) fp32
    column_codes: Tensor  # (layers, cols), whole numbers in fp32
    limit: int  # largest symbol

    @property
    def column_scale(self) -> Tensor:
        """(layers, cols) fp32."""
        return (self.column_codes / COLUMN_STEPS).exp2()


class Columns(NamedTuple):
    """Columns that are rounded one after the other, in that order."""

    w: Tensor  # (n, columns, rows): a column lies in one piece
    upper: Tensor  # (n, columns, columns), see ErrorFeedback
    size: Tensor  # (n, columns, rows): step sizes
    limit: Tensor  # (n, columns, 1): largest symbols


def round_columns(columns: Columns, down: bool = False) -> tuple[Tensor, Tensor]:
    """Symbols and errors, fp32, both like columns.w. For every column j, and then every later column k:

        symbol_j = round(w_j / size_j),  error_j = (w_j - symbol_j size_j) / U_jj,  w_k <- w_k - error_j U_jk

    Six small kernels for each column, which neither wait for the GPU nor depend on a value, so a CUDA graph can replay
    them. `down`: symbols are on a trellis down each column, for a matrix that the coder turns; about 90 kernels."""
    w, upper, size, high = columns
    w = w.clone()
    low = -high
    pivot = upper.diagonal(dim1=1, dim2=2)[:, :, None]
    symbols = torch.empty_like(w)
    errors = torch.empty_like(w)
    for j in range(w.size(1)):
        one = slice(j, j + 1)
        symbol = symbols[:, one]
        error = errors[:, one]
        torch.div(w[:, one], size[:, one], out=symbol)
        if down:
            symbols[:, j] = nearest_path(symbols[:, j])
        else:
            symbol.round_().clamp_(low[:, one], high[:, one])
        torch.addcmul(w[:, one], symbol, size[:, one], value=-1, out=error)
        error.div_(pivot[:, one])
        later = upper[:, j, j + 1 :, None]
        w[:, j + 1 :].addcmul_(error, later, value=-1)
    return symbols, errors


@functools.cache
def subsets(device: torch.device) -> Tensor:
    """(8, 8) int64: a value modulo 4 that leads from one state of the trellis to another; 4: none does."""
    state = torch.arange(TRELLIS_STATES, device=device)
    subset = torch.stack((state & 1, (state & 1) + 2))
    leads = next_state(state, subset)[..., None] == state
    return torch.where(leads, subset[..., None], 4).amin(0)


def nearest_in_subset(x: Tensor, subset: Tensor) -> Tensor:
    """The values nearest to x that are `subset` modulo 4, from -248 to 247."""
    return ((x - subset) / 4).round().clamp(-62, 61) * 4 + subset


def nearest_path(x: Tensor) -> Tensor:
    """x (n, rows) -> values on a trellis down the rows of least squared distance.

    Instead of walking down the rows it joins two neighbouring runs of rows at a time: the cost between any two states
    is the least over the state in the middle. Then it finds the states in the middle, longest runs first."""
    rows = x.size(1)
    subset = subsets(x.device)
    values = nearest_in_subset(x[..., None], torch.arange(4, device=x.device))
    cost = (x[..., None] - values).square()
    cost = F.pad(cost, (0, 0, 0, (1 << (rows - 1).bit_length()) - rows))  # rows behind the last cost nothing
    runs = [F.pad(cost, (0, 1), value=torch.inf)[..., subset]]  # (n, runs, states before, states behind)
    while runs[-1].size(1) > 1:
        above, below = runs[-1].unflatten(1, (-1, 2)).unbind(2)
        runs.append((above[..., None] + below[:, :, None]).amin(3))
    end = runs.pop()[:, :, 0].argmin(2)
    begin = torch.zeros_like(end)
    for run in reversed(runs):
        above, below = run.unflatten(1, (-1, 2)).unbind(2)
        above = above.take_along_dim(begin[..., None, None], 2)[:, :, 0]
        below = below.take_along_dim(end[..., None, None], 3)[..., 0]
        middle = (above + below).argmin(2)
        begin = torch.stack((begin, middle), 2).flatten(1)
        end = torch.stack((middle, end), 2).flatten(1)
    return values.take_along_dim(subset[begin, end][:, :rows, None], 2)[..., 0]


def trellis_along(columns: Columns) -> tuple[Tensor, Tensor]:
    """As round_columns, with every row on the trellis.

    For every state the best path into it survives, with weights of its own, since each path has fed back its own
    errors. The sum of squared errors decides."""
    w, upper, size, _ = columns
    by_subset, by_source = subsets(w.device).sort(0)
    subset = by_subset[:2]  # of the two ways into each state, (2, states)
    source = by_source[:2]
    states = torch.arange(TRELLIS_STATES, device=w.device)[:, None]
    scale = size / upper.diagonal(dim1=1, dim2=2)[:, :, None]
    paths = w[:, None].repeat(1, TRELLIS_STATES, 1, 1)
    cost = torch.full_like(paths[:, :, 0], torch.inf)
    cost[:, 0] = 0
    steps = []  # of every column: the state before each state, and the error on the way, (n, states, rows)
    for j in range(w.size(1)):
        x = (paths[:, :, 0] / size[:, None, j])[:, source]
        error = (x - nearest_in_subset(x, subset[..., None])) * scale[:, None, None, j]
        cost, way = (cost[:, source] + error.square()).min(1)
        error = error.take_along_dim(way[:, None], 1)[:, 0]
        before = source[way, states]
        steps.append((before, error))
        paths = paths[:, :, 1:].take_along_dim(before[:, :, None], 1)
        paths.addcmul_(error[:, :, None], upper[:, None, j, j + 1 :, None], value=-1)
    state = cost.argmin(1, keepdim=True)
    backwards = []
    for before, error in reversed(steps):
        backwards.append(error.take_along_dim(state, 1))
        state = before.take_along_dim(state, 1)
    errors = torch.cat(backwards[::-1], 1)
    values = (w - upper.mT.double() @ errors.double()) / size  # TF32 would not tell one value from the next
    return values.round().float(), errors


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
    w: Tensor, feedback: ErrorFeedback, steps: StepSizes, block: int = 128, rounding: Callable = round_columns
) -> Tensor:
    """Round w (n, rows, cols) to multiples of its step sizes, feeding each column's error to the columns that are not
    yet rounded (arXiv 2210.17323).

    Returns symbols int16 (n, rows, cols), at most steps.limit, or MAX_SYMBOL where column_scale is below 1; on a
    trellis twice as much. Columns go in the order of `feedback`. One whose input never fires is zero, but on a trellis.
    """
    order, upper, diagonal = feedback
    silent = (diagonal == 0)[:, :, None]
    w = w.mT.masked_fill(silent, 0.0).take_along_dim(order[:, :, None], 1)
    scale = steps.column_scale.gather(1, order)[:, :, None]
    size = steps.row[:, None] * scale
    limit = torch.where(scale < 1, MAX_SYMBOL, steps.limit).float()
    symbols = torch.empty_like(w, dtype=torch.int16)
    if rounding is trellis_along:  # whose paths feed back errors of their own, from the first column to the last
        block = w.size(1)
    round_block = rounding
    for start in range(0, w.size(1), block):
        here = slice(start, start + block)
        rest = slice(start + block, None)
        columns = Columns(w[:, here], upper[:, here, here], size[:, here], limit[:, here])
        is_full = start + block <= w.size(1)
        if w.is_cuda and is_full and start == block:  # the first block has loaded the kernels
            round_block = replayed(rounding, columns)
        symbols[:, here], errors = round_block(columns) if is_full else rounding(columns)
        w[:, rest].baddbmm_(upper[:, here, rest].mT, errors, alpha=-1)
    return symbols.take_along_dim(order.argsort(dim=1)[:, :, None], 1).mT.contiguous()


# --- What is stored of a matrix ---


def dequantize_scales(codes: ndarray, per_octave: int = ROW_STEPS) -> ndarray:
    """2**(code / per_octave), float32, equal on every machine."""
    roots = np.array(binary_roots(per_octave), np.float64) / (1 << 60)
    octave, step = np.divmod(codes.astype(np.int64), per_octave)
    return np.ldexp(roots[step], octave).astype(np.float32)


def quantize_scales(scale: ndarray) -> ndarray:
    """Positive floats to int16 codes. Weights are quantised with dequantize_scales(codes), so rounding only moves the
    step size by 2 %."""
    codes = np.rint(np.log2(np.maximum(scale, 1e-30)) * ROW_STEPS)
    return np.clip(codes, -1600, 1600).astype(np.int16)


class Correction(NamedTuple):
    """LQER: a product A B of low rank that is added to a matrix (rows, cols) to undo part of its rounding error."""

    a: ndarray  # int8 -2..1 (rows, rank), one scale
    b: ndarray  # int8 -8..7: B (rank, cols), flattened, padded with zeros, as rows of LQER_GROUP values
    scales: ndarray  # fp16: of a, and of each row of b
    error: float = 0.0  # Frobenius norm to be corrected; not stored, but model.bin lists the largest first

    def product(self, cols: int) -> Tensor:
        """A B (rows, cols), fp32."""
        a, b, scales = (torch.from_numpy(part).float() for part in self[:3])
        b = (b * scales[1:, None]).flatten()
        b = b[: a.size(1) * cols].view(-1, cols)
        return scales[0] * a @ b


class QuantizedMatrix(NamedTuple):
    """One matrix: symbol (row, column) * 2**(row code / ROW_STEPS) * 2**(column code / COLUMN_STEPS) + correction."""

    symbols: ndarray  # int8, or int16 for some on a trellis, (rows, cols)
    row_codes: ndarray  # int16 (rows,)
    column_codes: ndarray  # int8 (cols,)
    correction: Correction | None = None

    def dequantize(self) -> Tensor:
        """(rows, cols), fp32, equal on every machine but for the correction."""
        row = dequantize_scales(self.row_codes)
        column = dequantize_scales(self.column_codes, COLUMN_STEPS)
        w = torch.from_numpy(self.symbols * row[:, None] * column)
        return w + self.correction.product(w.size(1)) if self.correction else w


class Quantized(NamedTuple):
    """A model as the artifact holds it."""

    matrices: dict[str, list[QuantizedMatrix]]  # by name: one for each layer
    parameters: dict[str, ndarray]  # fp16; the attention gate may be in int8 rows, see `quantize_gate`
    logit_calibration: ndarray | None = None  # fp32 (15,), see to_logit_calibration

    def state(self) -> dict[str, Tensor]:
        """Parameters by name, fp32, on the CPU. Sublayer scales come back as ones: they are part of the matrices."""
        state = {name: torch.from_numpy(array).float() for name, array in self.parameters.items()}
        if "attn_gate.int8" in state:
            scale = state.pop("attn_gate.scale")
            gate = state.pop("attn_gate.int8")
            state["attn_gate"] = gate * scale[..., None].expand_as(gate)
        for name, layers in self.matrices.items():
            stack = torch.stack([matrix.dequantize() for matrix in layers])
            state[name] = stack[0] if name == "tok_emb" else stack
        for vector, matrix in FOLDED.items():
            state[vector] = torch.ones(state[matrix].shape[:2])
        return state


def quantize_stack(
    w: Tensor, feedback: ErrorFeedback, steps: StepSizes, rounding: Callable, owner: int, ranks: Ranks
) -> list[QuantizedMatrix]:
    """Matrices w (layers, rows, cols) of one kind, solved by one rank for all: the symbols do not depend on the number
    of ranks."""
    row_codes = quantize_scales(steps.row.cpu().numpy())
    if ranks.rank == owner:
        row = torch.from_numpy(dequantize_scales(row_codes)).to(w.device)
        symbols = gptq(w, feedback, steps._replace(row=row), rounding=rounding)
    else:
        symbols = torch.empty_like(w, dtype=torch.int16)
    symbols = ranks.broadcast_(symbols.view(torch.int8), owner).view(torch.int16).cpu().numpy()  # NCCL has no int16
    symbols = symbols.astype(np.int8 if np.abs(symbols).max() <= MAX_SYMBOL else np.int16)
    column_codes = steps.column_codes.to(torch.int8).cpu().numpy()
    return list(map(QuantizedMatrix, symbols, row_codes, column_codes))


# --- Step sizes ---


def clip_step_sizes(weights: dict[str, Tensor], cfg: Config, saved: float) -> dict[str, StepSizes]:
    """The published rule (#1394): *_CLIP_SIGMAS standard deviations of a row of weights (layers, rows, cols) over the
    symbol range, times 2**saved."""
    steps = {}
    for name, kind in MATRICES.items():
        w = weights[name]
        limit = 2 ** (getattr(cfg, kind.bits) - 1) - 1
        row = 2**saved * getattr(cfg, kind.sigmas) * w.std(2) / limit
        steps[name] = StepSizes(row.clamp_min(1e-6), torch.zeros_like(w[:, 0]), limit)
    return steps


def refine_salient_columns(steps: dict[str, StepSizes], saliency: dict[str, Tensor], cfg: Config):
    """AWQ-lite (#1908): of all matrices, the group of AWQ_GROUP columns with the largest sum of `saliency` (layers,
    cols), activation RMS * mean |w|, gets the step sizes of AWQ_BITS."""
    sums = {}  # (layers, groups)
    for name, columns in saliency.items():
        if steps[name].limit < MAX_SYMBOL and columns.size(1) >= AWQ_GROUP:
            sums[name] = columns.unfold(1, AWQ_GROUP, AWQ_GROUP).sum(2)
    if sums:
        name = max(sums, key=lambda name: sums[name].max())
        finer = AWQ_BITS - getattr(cfg, MATRICES[name].bits)
        layer, group = divmod(int(sums[name].argmax()), sums[name].size(1))
        groups = steps[name].column_codes[layer].unfold(0, AWQ_GROUP, AWQ_GROUP)  # a view
        groups[group] = -finer * COLUMN_STEPS


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
    # The 0.1 keeps rows that calibration hardly uses from nearly unbounded step sizes.
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


# --- LQER ---


def round_to_int8(w: Tensor, scale: Tensor, low: int, high: int) -> ndarray:
    """w / scale, rounded to low..high."""
    return (w / scale).round().clamp(low, high).to(torch.int8).cpu().numpy()


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
    return Correction(
        a=round_to_int8(a, scales[0], -2, 1),
        b=round_to_int8(groups, scales[1:, None], -8, 7),
        scales=scales.cpu().numpy(),
        error=error.norm().item(),
    )


def add_corrections(matrices: dict[str, list[QuantizedMatrix]], weights: dict[str, Tensor], cfg: Config):
    """LQER for the LQER_TOP_K matrices with the largest Frobenius error."""
    errors = {}
    for name, layers in matrices.items():
        for layer, (w, matrix) in enumerate(zip(weights[name], layers)):
            errors[name, layer] = w - matrix.dequantize().to(w.device)
    largest = sorted(errors, key=lambda place: -errors[place].norm().item())
    for name, layer in largest[: cfg.lqer_top_k]:
        layers = matrices[name]
        layers[layer] = layers[layer]._replace(correction=lqer(errors[name, layer], cfg))


def quantize_gate(gate: Tensor) -> dict[str, ndarray]:
    """gate (layers, heads, channels) as int8, and the fp16 scale (layers, heads) of each row."""
    scale = (gate.abs().amax(-1) / MAX_SYMBOL).clamp_min(1e-7).half()
    symbols = round_to_int8(gate, scale[..., None], -MAX_SYMBOL, MAX_SYMBOL)
    return {"attn_gate.int8": symbols, "attn_gate.scale": scale.cpu().numpy()}


# --- All of it ---


class Quantizer:
    """Quantises one model, as often as its size asks for. What no step size changes is computed once."""

    def __init__(self, model: GPT, hessians: dict[str, Tensor], cfg: Config, ranks: Ranks):
        self.cfg = cfg
        self.ranks = ranks
        self.parameters = folded_state(model)
        self.weights = {}  # of matrices, (layers, rows, cols) fp32
        self.feedback = {}
        self.rounding = {}  # the function that rounds columns
        self.curves = {}  # for RATE_DISTORTION
        self.saliency = {}  # for AWQ-lite: activation RMS * mean |w| of every column
        scales = {matrix: getattr(model, vector).detach() for vector, matrix in FOLDED.items()}
        visited = [visit.layer for visit in model.schedules[cfg.looped]]
        visits = torch.tensor(visited, device=model.tok_emb.device).bincount()
        trellis = cfg.rate_distortion and cfg.trellis
        for name, kind in MATRICES.items():
            w = self.parameters.pop(name)
            w = w if w.ndim == 3 else w[None]
            along = trellis and w.size(2) == cfg.model_dim  # the coder does not turn it, and codes columns in order
            self.rounding[name] = trellis_along if along else functools.partial(round_columns, down=trellis)
            feedback = error_feedback(hessians[kind.hessian], cfg.gptq_damping, sort=not along)
            self.weights[name] = w
            self.feedback[name] = feedback
            if cfg.rate_distortion:
                g = hessians[f"{name}.rows"].view(w.shape[:2])
                if name in scales:  # gradients are of the model's own matrix: chain rule for the folded one
                    g = g / scales[name].square().clamp_min(1e-6)
                curve = rate_curve(w, feedback, g, getattr(cfg, kind.rows), cfg.rate_columns)
                # Values on the trellis take the bits of steps twice as wide, and may be twice as large.
                parts = 1 + trellis
                self.curves[name] = curve._replace(finest=curve.finest / parts, sigma=curve.sigma / parts)
            elif cfg.awq_lite_enabled:
                mean_square = feedback.diagonal / (1 if name == "tok_emb" else visits[:, None])
                self.saliency[name] = mean_square.sqrt() * w.abs().mean(1)

    def quantize(self, saved: float = 0.0) -> Quantized:
        """Matrices by GPTQ with these step sizes, corrected by LQER where set; the gate in int8 rows where set; the
        rest in fp16."""
        matrices = {}
        for i, (name, steps) in enumerate(self.step_sizes(saved).items()):
            owner = i % self.ranks.world
            rounding = self.rounding[name]
            matrices[name] = quantize_stack(self.weights[name], self.feedback[name], steps, rounding, owner, self.ranks)
        if self.cfg.lqer_enabled:
            add_corrections(matrices, self.weights, self.cfg)
        parameters = {}
        for name, value in self.parameters.items():
            if name == "attn_gate" and self.cfg.gated_attn_quant_gate:
                parameters |= quantize_gate(value)
            elif name not in FOLDED:
                parameters[name] = value.half().cpu().numpy()
        return Quantized(matrices, parameters)

    def step_sizes(self, saved: float) -> dict[str, StepSizes]:
        """Step sizes that save `saved` bits a weight, against ARTIFACT_CAP (RATE_DISTORTION) or the published rule."""
        if not self.cfg.rate_distortion:
            steps = clip_step_sizes(self.weights, self.cfg, saved)
            refine_salient_columns(steps, self.saliency, self.cfg)
            return steps
        weights = sum(w.numel() for w in self.weights.values())
        level = level_for(self.curves.values(), 8 * self.cfg.artifact_cap - saved * weights)
        return {name: curve.step_sizes_at(level) for name, curve in self.curves.items()}


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
    sentencepiece = installed("sentencepiece")
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_path(cfg)))
    features = torch.zeros(cfg.vocab_size, LOGIT_CATEGORIES)
    for i in range(min(cfg.vocab_size, len(pieces))):
        features[i] = torch.tensor(piece_categories(pieces.id_to_piece(i)))
    return features


def to_logit_calibration(values: Tensor, features: Tensor) -> LogitCalibration:
    """15 numbers -> the factor of the softcapped logits, 0.9..1.1, and their biases (V,): +-0.5 for each category."""
    scale = 0.9 + 0.2 * torch.sigmoid(values[0])
    return LogitCalibration(scale, features @ values[1:].clamp(-0.5, 0.5))


def fit_logit_calibration(model: GPT, stream: TrainStream, cfg: Config, ranks: Ranks) -> ndarray:
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
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return ranks.broadcast_(values.detach().cpu()).numpy()


# ======== Artifact: a quantised model as named arrays, and a container for them =======================================

# --- Names of the arrays; the file's bytes depend on their order ---


MATRIX_PARTS = ("symbols", "step", "column")
LQER_PARTS = ("lqer_a", "lqer_b", "lqer_scales")


def flatten(quantized: Quantized) -> dict[str, ndarray]:
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
            add(name, MATRIX_PARTS if matrix.column_codes.any() else MATRIX_PARTS[:2], matrix)
            if matrix.correction:
                corrections[name] = matrix.correction
    # Corrections follow all matrices, the largest error first.
    for name in sorted(corrections, key=lambda name: -corrections[name].error):
        add(name, LQER_PARTS, corrections[name])
    arrays |= quantized.parameters
    if quantized.logit_calibration is not None:
        arrays["logit_calibration"] = quantized.logit_calibration
    return arrays


def unflatten(arrays: dict[str, ndarray]) -> Quantized:
    """Inverse of flatten. ValueError or KeyError where a matrix lacks a part, or has one of another size."""
    layers = {}  # "qkv.3" -> {"symbols": ..., "step": ...}
    parameters = {}
    for full_name, array in arrays.items():
        name, _, part = full_name.rpartition(".")
        if part in MATRIX_PARTS + LQER_PARTS:
            layers.setdefault(name, {})[part] = array
        else:
            parameters[full_name] = array
    matrices = {}
    for name, parts in layers.items():
        rows, cols = parts["symbols"].shape
        parts.setdefault("column", np.zeros(cols, np.int8))
        sizes = {"symbols": (rows, cols), "step": (rows,), "column": (cols,)}
        correction = None
        if "lqer_a" in parts:
            correction = Correction(*[parts[part] for part in LQER_PARTS])
            rank = correction.a.shape[1]
            groups = -(-rank * cols // LQER_GROUP)
            sizes |= {"lqer_a": (rows, rank), "lqer_b": (groups, LQER_GROUP), "lqer_scales": (1 + groups,)}
        if {part: array.shape for part, array in parts.items()} != sizes:  # numpy would broadcast some others
            raise ValueError(f"the parts of {name} do not fit together")
        matrix = QuantizedMatrix._make([*(parts[part] for part in MATRIX_PARTS), correction])
        matrices.setdefault(name.split(".")[0], []).append(matrix)
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
UNDECODABLE = "{}: cannot be decoded ({{}}); write it anew"


def as_matrix(a: ndarray) -> ndarray:
    """An integer array as (R, C): vectors and matrices of two long sides are folded, the last row padded with zeros."""
    if a.ndim > 1 and min(len(a), a[0].size) <= 1024:
        return a.reshape(len(a), -1)
    width = 64 if a.ndim == 1 else 512
    padded = np.pad(a.ravel(), (0, -a.size % width))
    return padded.reshape(-1, width)


def planes(values: ndarray) -> bytes:
    """Bytes of values (count,), most significant bytes of all values first: these repeat, so LZMA sees runs."""
    return values.view(np.uint8).reshape(-1, values.itemsize).T[::-1].tobytes()


def from_planes(raw: bytes, dtype: str, count: int) -> ndarray:
    """Inverse of planes, (count,)."""
    size = np.dtype(dtype).itemsize
    planes = np.frombuffer(raw, np.uint8, size * count).reshape(size, count)
    return planes[::-1].T.copy().view(dtype).ravel()


def encode_artifact(tensors: dict[str, ndarray], meta: dict) -> bytes:
    """Arrays (any numpy dtype) and `meta` (JSON) as the bytes of a model file. Integer arrays of LEAST_CODED values or
    more are entropy-coded. Arrays whose names differ only in numbers, of one shape, are coded together, so many small
    ones cost little."""
    groups = {}  # entropy-coded: (name without numbers, shape, dtype) -> names
    rest = {}  # dtype -> names
    for name, a in tensors.items():
        is_integer = a.dtype.kind in "iu" and a.size >= LEAST_CODED
        if is_integer and int(a.max()) - int(a.min()) < 1 << 15:
            key = (re.sub(r"\d+", "#", name), a.shape, a.dtype.str)  # "qkv.3.symbols" -> "qkv.#.symbols"
            groups.setdefault(key, []).append(name)
        else:
            rest.setdefault(a.dtype.str, []).append(name)
    coded = []
    stacks = []
    for (_, shape, dtype), names in groups.items():
        # The coder expects values around 0, so codes of step sizes lose their median. Symbols stay the same modulo 4,
        # which keeps them on the trellis.
        arrays = [tensors[name] for name in names]
        unit = 4 if names[0].endswith(".symbols") else 1
        centres = [unit * round(np.median(a) / unit) for a in arrays]
        coded.append([dtype, shape, names, centres])
        centred = [as_matrix(a.astype(np.int64) - centre).astype(np.int32) for a, centre in zip(arrays, centres)]
        stacks.append(np.stack(centred))
    plain = []
    raw = b""
    for dtype, names in rest.items():
        plain.append([dtype, [[name, tensors[name].shape] for name in names]])
        raw += planes(np.concatenate([tensors[name].ravel() for name in names]))
    raw = lzma.compress(raw, lzma.FORMAT_RAW, filters=LZMA)
    code, ridden = encode_stacks(stacks, raw)  # the first `ridden` bytes of raw travel in the code's states
    header = {"meta": meta, "coded": coded, "plain": plain, "ridden": ridden}
    header = zlib.compress(json.dumps(header, separators=(",", ":"), sort_keys=True).encode(), 9)
    body = header + code + raw[ridden:]
    total = FIXED.size + len(body) + 4
    data = FIXED.pack(MAGIC, VERSION, total, len(header), len(code)) + body
    return data + struct.pack("<I", zlib.crc32(data))


def save_artifact(path: Path, tensors: dict[str, ndarray], meta: dict, setting: str = "ARTIFACT_DIR"):
    """Write encode_artifact's bytes whole, by rename."""
    with whole_file(path, setting) as f:
        f.write(encode_artifact(tensors, meta))


def unpack_tensors(header: dict, code: bytes, rest: bytes, most: int) -> dict[str, ndarray]:
    """The arrays that a model file's header describes; see decode_stacks for `most`."""
    stacks, rider = decode_stacks(code, most)
    tensors = {}
    for (dtype, shape, names, centres), stack in zip(header["coded"], stacks, strict=True):
        for name, q, centre in zip(names, stack, centres, strict=True):
            values = q.astype(dtype).ravel()[: math.prod(shape)]
            values += np.int64(centre).astype(dtype)  # modulo 2**bits, as the symbols are
            tensors[name] = values.reshape(shape)
    raw = rider[: header["ridden"]] + rest
    raw = inflate(lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=LZMA), raw, 8 * most)
    for dtype, members in header["plain"]:
        sizes = [math.prod(shape) for _, shape in members]
        values = from_planes(raw, dtype, sum(sizes))
        raw = raw[values.nbytes :]
        pieces = np.split(values, np.cumsum(sizes)[:-1])  # one for each member
        for (name, shape), a in zip(members, pieces):
            tensors[name] = a.reshape(shape)
    return tensors


def read_artifact(path: Path, cap: int = Config().artifact_cap) -> tuple[dict, bytes, bytes]:
    """A model file, verified: its header, the entropy-coded stacks and the rest. One that is missing, short, altered,
    of another kind, or above `cap` bytes raises UserError."""
    with (
        explained(
            f"{path}: cannot be read ({{}}); train first, or set ARTIFACT_DIR to the folder that holds it", OSError
        ),
        open(path, "rb") as f,
    ):
        data = f.read(min(os.fstat(f.fileno()).st_size, cap + 1))
    require(len(data) <= cap, f"{path}: over {cap:,} bytes; set ARTIFACT_CAP where you trust it with more")
    magic, version, length, header_size, code_size = FIXED.unpack_from(data.ljust(FIXED.size, b"\0"))
    require(
        magic == MAGIC,
        f"{path}: not a model file of this script (its first bytes are {magic!r}); "
        "set ARTIFACT_DIR to the folder that holds one",
    )
    require(
        len(data) == length,
        f"{path}: {len(data)} bytes long, not what its header says; it was cut or extended: copy it again or write it "
        "anew",
    )
    require(
        zlib.crc32(data[:-4]) == int.from_bytes(data[-4:], "little"),
        f"{path}: checksum does not match; the file was altered: copy it again or write it anew",
    )
    require(
        version == VERSION,
        f"{path}: format version {version}, this script reads {VERSION}; score it with the script that wrote it",
    )
    parts = io.BytesIO(data[FIXED.size : -4])
    with explained(UNDECODABLE.format(path), Exception):
        header = json_object(inflate(zlib.decompressobj(), parts.read(header_size), MOST_SIDE))
        check_arrays(header, most_values(cap))
    return header, parts.read(code_size), parts.read()


def most_values(cap: int) -> int:
    """Values that a model below `cap` bytes may hold: one for each bit. A code of nothing but zeros could hold more
    than any memory."""
    return 8 * max(cap, Config().artifact_cap)


def check_arrays(header: dict, most: int):
    """Raise an exception unless a header describes arrays of numbers with distinct names and at most `most` values."""
    arrays = [(name, dtype, shape) for dtype, shape, names, _ in header["coded"] for name in names]
    arrays += [(name, dtype, shape) for dtype, members in header["plain"] for name, shape in members]
    for name, dtype, shape in arrays:
        if not re.fullmatch("[<|][iuf][1248]", dtype) or min(shape, default=0) < 0:
            raise ValueError(f"{name!r} is of type {dtype!r} and shape {shape}")
    if len({name for name, _, _ in arrays}) < len(arrays):
        raise ValueError("two arrays of one name")
    if sum(math.prod(shape) for _, _, shape in arrays) > most:
        raise ValueError(f"its arrays have over {most:,} values")


def load_artifact(path: Path, cap: int = Config().artifact_cap) -> tuple[dict[str, ndarray], dict]:
    """Inverse of encode_artifact: arrays and meta."""
    header, code, rest = read_artifact(path, cap)
    # The checksum holds, so an error is of a file that was made wrongly.
    with explained(UNDECODABLE.format(path), Exception), np.errstate(over="raise", divide="raise", invalid="raise"):
        return unpack_tensors(header, code, rest, most_values(cap)), header["meta"]


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
    """For each place the one at which its run begins, in which no key (n,) changes: (n,) int64."""
    begins = torch.zeros_like(keys[0], dtype=torch.bool)
    begins[:1] = True
    for key in keys:
        begins[1:] |= key[1:] != key[:-1]
    return begins.nonzero()[:, 0][begins.cumsum(0) - 1]


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
        return cls(run_starts(key), run_starts(key, segment), run_starts(key, document))

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
    reached = run_starts(highest)
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
    their documents. Counts are exact: a context is known by its place among the sorted pairs (context one token
    shorter, its last token), never by a hash. One stable sort by (context, what follows) serves an order, and shifted
    by one place it lists the contexts of the next. Two documents, a segment each:

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
    document = F.pad(document, (0, 1), value=-1)  # behind the last target there is no document
    for order in range(2, orders + 1):
        _, group, size = context.unique_consecutive(return_inverse=True, return_counts=True)
        again = size[group] > 1  # a context met once, and every longer one that ends in it, know nothing
        targets = targets[again]
        context = context[again]
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
        context = pairs.group
        goes_on = document[targets] == document[targets - 1]
        targets = targets[goes_on]
        context = context[goes_on]


class NGram:
    """Improves the scored probabilities by what earlier segments and the document so far have shown.

    An order clears when its context was seen NGRAM_MIN_COUNT times and its commonest continuation has a share of
    NGRAM_THRESHOLD. The longest order that clears hints at that token h, whose log-odds rise by b = NGRAM_BOOST
    (#1145):

        p'(x) = p(x) e^(b [x = h]) / (1 + p(h) (e^b - 1))

    The divisor is the sum of the numerators, so p' sums to one; h depends on nothing but what came before x.
    """

    def __init__(self, scoring: "ScoringPass", sizes: list[int]):
        """Count the whole stream, on every rank: counts are integers, so all ranks agree.

        sizes: documents of each segment, in order.
        """
        cfg = scoring.cfg
        val = scoring.val
        device = scoring.ranks.device
        self.boost = cfg.ngram_boost
        self.tokens = val.tokens  # uint16 (targets + 1,)
        # Document and segment of each target: 0 for the first lengths[0] targets, then 1, ...
        document = np.repeat(np.arange(len(val.lengths)), val.lengths)
        segment = np.repeat(np.arange(len(sizes)), sizes)[document]
        tokens, document, segment = (
            torch.from_numpy(x.astype(np.int32)).to(device) for x in (val.tokens, document, segment)
        )
        hint = torch.full((val.targets,), -1, dtype=torch.int32, device=device)
        for known in continuations(tokens, document, segment, cfg.ngram_order, cfg.vocab_size):
            if known.order < cfg.ngram_min_order:
                continue
            share = known.top.double() / known.total
            often = known.total >= cfg.ngram_min_count
            clears = often & (share >= cfg.ngram_threshold)
            hint[known.targets[clears]] = known.hint[clears]  # a longer order comes later and replaces a shorter one
        self.hint = hint.cpu().numpy()  # int32 (targets,): -1 where no order clears
        # The tokens whose log-probabilities `tilted` asks for, int64 (targets,) on the device: 0 where no order clears.
        self.asked = hint.clamp(min=0).long()
        hinted = 100 * (self.hint >= 0).mean()
        scoring.log(
            f"n-grams of order {cfg.ngram_min_order}..{cfg.ngram_order}: hints at {hinted:.2f} % of the targets"
        )

    def tilted(self, targets: ndarray, nats: ndarray, hint_log_prob: ndarray) -> ndarray:
        """The network's nats of `targets` (n,) and its log-probabilities of their hints -> nats of p', float64 (n,)."""
        hint = self.hint[targets]
        boost = np.where(hint >= 0, self.boost, 0.0)
        hit = hint == self.tokens[targets + 1]
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
    ledger: "Ledger"  # of this pass alone
    progress: "Progress"
    ngram: NGram | None = None  # tilts every score before it is written


def book(scoring: ScoringPass, targets: ndarray, scores: Scores, places: ndarray):
    """Write what a forward gave at `places`, int64 indices, as the nats of `targets`, tilted by n-grams if any."""

    def of_targets(values: Tensor) -> ndarray:
        # In float64 from here on: the ledger's sums run over the whole stream.
        return values.detach().cpu().double().numpy()[places]

    nats = of_targets(scores.nats)
    if scoring.ngram is not None:
        nats = scoring.ngram.tilted(targets, nats, of_targets(scores.hint_log_prob))
    scoring.ledger.write(targets, nats)


class Ledger:
    """Write-once record of one scoring pass: `nats` of every validation target in stream order, NaN until scored.

    Scoring a target twice, training on one that is not scored, or closing with a hole raises RuntimeError: a run whose
    ledger does not hold is not a result."""

    ROUNDING = 1e-4  # a certain token may come out this far below zero nats: fp32 logits of up to 30

    def __init__(self, name: str, target_bytes: ndarray, verdicts: Verdicts):
        self.name = name
        self.bytes = target_bytes  # uint16 (targets,)
        self.verdicts = verdicts
        self.nats = np.full(len(target_bytes), np.nan)  # float64 (targets,)
        self.merged = np.zeros(len(target_bytes), bool)  # scored by any rank before the last merge
        # Targets, nats and bytes: of all ranks up to the last merge, of this rank since.
        self.shared = np.zeros(3)
        self.own = np.zeros(3)

    def write(self, targets: ndarray, nats: ndarray):
        """Record the scores of `targets`, int64 indices; `nats` is float, of the same length."""
        unscored = np.isnan(self.nats[targets]).all()
        distinct = len(np.unique(targets)) == len(targets)
        self.check(unscored and distinct, "a target was scored twice")
        possible = np.isfinite(nats).all() and (nats >= -self.ROUNDING).all()
        self.check(possible, "a score is not finite or implies a probability above 1")
        self.nats[targets] = np.maximum(nats, 0.0)
        self.own += self.sums(targets)

    def sums(self, targets: ndarray | slice) -> ndarray:
        """How many targets, their nats and their bytes: float64 (3,)."""
        nats = self.nats[targets]
        size = self.bytes[targets].sum(dtype=np.int64)  # uint16 would overflow
        return np.array([len(nats), nats.sum(), size])

    def merge(self, ranks: Ranks, begin: int = 0, end: int | None = None):
        """Join what the ranks have scored of targets begin..end since the last merge; one rank alone must have scored
        each. Only these travel: a stream of 48 million targets has many segments."""
        if ranks.world == 1:
            return
        merged = self.merged[begin:end]
        nats = self.nats[begin:end]
        # Only what is new counts, so that a sum over the ranks adds one score and zeros.
        new = ~np.isnan(nats) & ~merged
        writers = ranks.all_reduce_(torch.from_numpy(new.astype(np.int32))).numpy()
        sums = ranks.all_reduce_(torch.from_numpy(np.where(new, nats, 0.0))).numpy()
        once = writers.max() <= 1 and not writers[merged].any()
        self.check(once, "two ranks scored the same target")
        found = np.flatnonzero(writers)
        nats[found] = sums[found]
        merged[found] = True
        self.shared += self.sums(begin + found)
        self.own[:] = 0.0

    def may_train(self, targets: ndarray | slice):
        """Call before learning from `targets`: all of them must be scored (C3)."""
        if np.isnan(self.nats[targets]).any():
            fault = "training on a target that is not scored"
            self.break_condition("C3", f"pass {self.name}: {fault}")
            self.check(False, fault)

    def break_condition(self, condition: str, reason: str):
        """The one door for settings that break a condition: the run goes on, and its number never becomes `val_bpb`."""
        self.verdicts.set(condition, "FAIL", reason)

    def bpb(self) -> float:
        """Bits per byte over all targets; raises if one is missing."""
        missing = np.isnan(self.nats).sum()
        self.check(missing == 0, f"{missing} targets were never scored")
        _, nats, size = self.sums(slice(None))
        return float(nats / math.log(2) / max(size, 1))

    def check(self, holds, fault: str):
        if not holds:
            raise RuntimeError(f"ledger {self.name}: {fault}")


class Progress:
    """Says every few seconds how far a scoring pass is. Running sums serve it: no device is asked, no ledger read."""

    EVERY = 5.0  # seconds

    def __init__(self):
        self.begun = time.perf_counter()
        self.shown = self.begun  # time of the last line

    def show(self, scoring: ScoringPass, doing: str = ""):
        """Call before each forward. The other ranks are taken to have scored as this one has since the last merge."""
        now = time.perf_counter()
        if now - self.shown <= self.EVERY:
            return
        self.shown = now
        ledger = scoring.ledger
        targets = len(ledger.nats)
        done, nats, size = ledger.shared + scoring.ranks.world * ledger.own
        rate = done / (now - self.begun)
        left = max(targets - done, 0) / max(rate, 1)
        bpb = nats / math.log(2) / max(size, 1)
        share = 100 * done / targets
        line = f"  {share:5.1f} %  BPB so far {bpb:.4f}  {rate:,.0f} targets/s  {left:.0f} s left{doing}"
        scoring.log(line, fleeting=True)


def plan_windows(starts: ndarray, inputs: int, seq_len: int, stride: int) -> ndarray:
    """Windows (n, 3) int64, rows (begin, first, end): tokens begin..end are read, targets of first..end are scored.

    Ends are exclusive. Every position from starts[0] to `inputs` is scored once. The first window of a
    document scores all it reads; each later one scores `stride` new positions after seq_len - stride tokens of context.
    A document of 7 tokens, seq_len = 4, stride = 2:

        0 1 2 3                 scores 0 1 2 3
            2 3 4 5             scores 4 5
                4 5 6           scores 6

    A document's length must not decide where a window begins, or the context would reveal where it ends (C1).
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


def greedy_cuts(sizes: ndarray, capacity: int, overfull: bool) -> list[int]:
    """Cut a list into groups of neighbours that hold as many as fit `capacity`: the first index of each group, and the
    list's length. If `overfull`, a group also takes the one that fills it or no longer fits."""
    before = np.append(0, np.cumsum(sizes))  # what lies before each index
    cuts = [0]
    while cuts[-1] < len(sizes):
        full = before[cuts[-1]] + capacity
        if overfull:
            cut = np.searchsorted(before, full)  # the first index that has so much before it
        else:
            cut = np.searchsorted(before, full, side="right") - 1  # the last that has no more
        cuts.append(min(int(cut), len(sizes)))
    return cuts


def group_windows(windows: ndarray, capacity: int) -> list[ndarray]:
    """Consecutive windows, as many for each buffer as `capacity` tokens hold."""
    lengths = windows[:, 2] - windows[:, 0]
    cuts = greedy_cuts(lengths, capacity, overfull=False)
    return [windows[low:high] for low, high in itertools.pairwise(cuts)]


def window_batch(
    val: ValidationStream,
    windows: ndarray,  # (n, 3) of plan_windows, together at most VAL_BATCH_TOKENS tokens
    cfg: Config,
) -> tuple[Batch, ndarray, ndarray]:
    """One buffer of windows -> (batch, places in the buffer that are scored, the targets that they score)."""
    begin, first, end = windows.T
    lengths = end - begin
    starts = np.cumsum(lengths) - lengths  # of the windows in the buffer: each is packed as a document
    place = np.arange(lengths.sum())
    position = place + np.repeat(begin - starts, lengths)  # in the stream
    scored = position >= np.repeat(first, lengths)
    inputs = val.tokens[position]
    targets = val.tokens[position + 1]
    span = cfg.eval_seq_len
    batch = pack_documents(inputs, targets, starts, span, span, cfg.val_batch_tokens, "val")
    return batch, place[scored], position[scored]


@torch.no_grad()
def score_documents(scoring: ScoringPass, first: int, last: int):
    """Score documents first..last (exclusive) by windows and share the scores with all ranks.

    Windows never cross a document's start, and each target is scored once, whatever the number of ranks.
    """
    cfg = scoring.cfg
    ranks = scoring.ranks
    val = scoring.val
    stride = cfg.eval_stride or cfg.eval_seq_len
    end = int(np.append(val.starts, val.targets)[last])
    windows = plan_windows(val.starts[first:last], end, cfg.eval_seq_len, stride)
    buffers = group_windows(windows, cfg.val_batch_tokens)
    for buffer in buffers[ranks.rank :: ranks.world]:  # dealt to the ranks in turn
        scoring.progress.show(scoring)
        batch, places, targets = window_batch(val, buffer, cfg)
        batch = to_device(batch, ranks.device)
        hint = None
        if scoring.ngram is not None:  # places that are not scored ask for token 0, and nobody looks
            hint = torch.zeros_like(batch.targets)
            hint[torch.from_numpy(places)] = scoring.ngram.asked[torch.from_numpy(targets)]
        hidden = scoring.model.trunk(batch.tokens, batch.seq, looped=cfg.looped)
        scores = scoring.model.nll(hidden, batch.targets.clamp(min=0), hint=hint)
        book(scoring, targets, scores, places)
    scoring.ledger.merge(ranks, int(val.starts[first]), end)


def score_stream(scoring: ScoringPass) -> float:
    """Score the whole stream by windows, without adaptation; returns the ledger's BPB."""
    val = scoring.val
    scoring.log(f"scoring {scoring.ledger.name}: {val.targets:,} targets over {scoring.ranks.world} rank(s)")
    score_documents(scoring, 0, len(val.starts))
    return scoring.ledger.bpb()


# ======== Test-time training: score a chunk, then learn from it; state crosses documents only between segments ========


class Shape(NamedTuple):
    """All that a step depends on besides the contents of its memory: one pair of CUDA graphs each."""

    rows: int  # documents run together
    older: int  # cached tokens that may be attended to
    back: int  # scored tokens run again, so that gradients reach back through them
    count: int  # type: ignore[assignment]  # tokens of the chunk

    @property
    def work(self) -> int:
        """Tokens that are run."""
        return self.rows * (self.back + self.count)


class Lockstep:
    """The device's half of adapting to documents: every row is at the same position of a document of its own.

    All memory is static and score() and learn() depend on their Shape alone, so a GPU replays them as CUDA graphs.
    """

    def __init__(self, scoring: ScoringPass):
        model = scoring.model
        cfg = scoring.cfg
        device = scoring.ranks.device
        rows = cfg.ttt_batch_size
        self.model = model
        self.cfg = cfg
        self.tokens = torch.from_numpy(scoring.val.tokens.astype(np.int64)).to(device)  # of the whole stream
        self.hints = None if scoring.ngram is None else scoring.ngram.asked  # int64 (targets,)
        self.begin = torch.zeros((), dtype=torch.int64, device=device)  # position at which the chunk begins
        self.row_starts = torch.zeros(rows, dtype=torch.int64, device=device)  # of the documents in the stream
        self.row_lengths = torch.zeros_like(self.row_starts)  # 0 where a row has no document

        # Keys and values of each row's last TTT_EVAL_SEQ_LEN tokens, at every visit, as they were when their token was
        # scored. The token at position p lies in slot p % TTT_EVAL_SEQ_LEN.
        visits = len(model.schedules[cfg.looped])
        ring = (2, visits, rows, cfg.ttt_eval_seq_len, cfg.num_kv_heads, model.head_dim)
        self.ring = torch.zeros(ring, dtype=model.dtype, device=device)

        self.lora = new_lora(model, rows, cfg.masked_adapters, cfg.ttt_lora_rank, cfg.ttt_lora_alpha, cfg.seed)
        # Adapters of the first rows: the same leaves at every call, so that learn() finds those of score().
        self.first = functools.cache(self.lora.first)
        leaves = self.lora.leaves()
        self.squares = [torch.zeros_like(p) for p in leaves]  # second moments
        self.updates = torch.zeros((), device=device)  # of these documents, for Adam's bias correction
        self.start = [p[:1].detach().clone() for p in leaves]  # (1, in, rank) and (1, rank, out), of every document

    def score(self, shape: Shape) -> Scores:
        """Scores (rows * count,) of the chunk at `self.begin`, and of the hints if there are n-grams.

        The last `back` tokens before the chunk are run again together with it, and before those `older` tokens are
        read as cached keys and values. Positions before a document are BOS, which Seq.lockstep hides.
        """
        rows, older, back, count = shape
        cfg = self.cfg
        context = torch.arange(-older - back, count, device=self.tokens.device)
        cached, position = (self.begin + context).split((older, back + count))  # in the document
        index = self.row_starts[:rows, None] + position  # (rows, back + count): in the stream
        index = index.clamp(0, len(self.tokens) - 2)  # outside the document anything will do: nobody sees it
        tokens = torch.where(position >= 0, self.tokens[index], cfg.bos_id)
        before = (index[:, 0] - 1).clamp(min=0)  # SmearGate looks one token back
        slots = cached % cfg.ttt_eval_seq_len
        keys, values = (memory[:, :rows].index_select(2, slots) for memory in self.ring)
        lora = self.first(rows)
        hidden, new = self.model.trunk(
            tokens.flatten(),
            Seq.lockstep(self.begin, position, rows, older, back),
            looped=cfg.looped,
            lora=lora,
            cache=Cache(keys, values, self.tokens[before]),
        )
        slots = position % cfg.ttt_eval_seq_len  # a token that is run again overwrites itself
        for memory, computed in zip(self.ring, (new.keys, new.values)):
            memory[:, :rows].index_copy_(2, slots, computed.detach())
        hidden = hidden.unflatten(0, tokens.shape)[:, back:].flatten(0, 1)  # only the chunk pays for the head
        chunk = index[:, back:].flatten()
        hint = None if self.hints is None else self.hints[chunk]
        return self.model.nll(hidden, self.tokens[chunk + 1], lora=lora, hint=hint)

    def learn(self, shape: Shape, nats: Tensor):
        """A step of AdamW without a first moment on the mean nats of the chunk, for rows with a later chunk.

        nats (rows * count,): of score(). Rows do not mix: the loss is a sum over them and AdamW is elementwise.
        """
        cfg = self.cfg
        rows = shape.rows
        goes_on = (self.row_lengths[:rows] > self.begin + shape.count).float()  # 0: a finished row stays as it is
        loss = (nats.unflatten(0, (rows, shape.count)).mean(1) * goes_on).sum()
        leaves = self.first(rows).leaves()
        grads = [grad.contiguous() for grad in torch.autograd.grad(loss, leaves)]
        lr = cfg.ttt_lora_lr * cfg.ttt_local_lr_mult
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


class CapturedStep(NamedTuple):
    """The CUDA graphs of a Shape, and the memory in which the first leaves its scores."""

    score: torch.cuda.CUDAGraph
    learn: torch.cuda.CUDAGraph
    scores: Scores


def chunk_ends(longest: int, cfg: Config) -> list[int]:
    """Ends of the chunks that cover `longest` positions: sizes are TTT_CHUNKS in order, the last one repeated.

    They are a function of position, never of a document's length (C1).
    """
    sizes = [int(size) for size in cfg.ttt_chunks.split(",")]
    endless = itertools.chain(sizes, itertools.repeat(sizes[-1]))
    ends = []
    end = 0
    while end < longest:
        end += next(endless)
        ends.append(end)
    return ends


def plan_lockstep(lengths: ndarray, cfg: Config, exact: bool) -> Iterator[tuple[int, Shape]]:
    """The steps of documents of these lengths: yields where each chunk begins, and its Shape.

    Rows hold the documents by falling length, so finished ones leave the batch. Unless `exact`, rows and context are
    rounded up to powers of two, so that few shapes serve every batch.
    """

    def rounded(needed: int, least: int, most: int) -> int:
        if exact or needed == 0:
            return min(needed, most)
        power = 1 << (needed - 1).bit_length()  # the least that holds what is needed
        return min(max(least, power), most)

    longest = int(lengths.max(initial=0))
    for begin, end in itertools.pairwise([0, *chunk_ends(longest, cfg)]):
        count = end - begin
        room = cfg.ttt_eval_seq_len - count  # of the context, before the chunk
        back = rounded(begin, 64, min(cfg.ttt_backprop_tokens, room))
        older = rounded(max(begin - back, 0), 256, room - back)
        running = int((lengths > begin).sum())
        yield begin, Shape(rounded(running, 8, cfg.ttt_batch_size), older, back, count)


def deal_batches(lengths: ndarray, first: int, cfg: Config, world: int) -> list[list[ndarray]]:
    """For each rank its batches of the documents first, first + 1, ... that have these lengths.

    Documents are taken by falling length. Each batch goes to the rank with the least work so far, counted in chunks of
    a batch's longest document.
    """
    order = np.argsort(-lengths, kind="stable")  # a batch of alike documents has few idle rows
    load = np.zeros(world)  # chunks in a row, of each rank
    dealt = [[] for _ in range(world)]
    for batch in np.split(order, range(cfg.ttt_batch_size, len(order), cfg.ttt_batch_size)):
        rank = int(load.argmin())
        load[rank] += len(chunk_ends(int(lengths[batch[0]]), cfg))
        dealt[rank].append(first + batch)
    return dealt


class DocumentTTT:
    """Scores documents of one segment and adapts to each: the host's half, which plans, books scores and asks the
    ledger before anything learns."""

    def __init__(self, scoring: ScoringPass):
        self.scoring = scoring
        self.lockstep = Lockstep(scoring)
        self.graphs = {}  # Shape -> CapturedStep, on a GPU
        # Sum over documents of weight * (adapters - start), shaped like start: (1, in, rank) or (1, rank, out).
        self.drift = [torch.zeros_like(p) for p in self.lockstep.start]
        self.drift_tokens = 0  # sum of those weights

    def plan(self, documents: ndarray) -> Iterator[tuple[int, Shape]]:
        """plan_lockstep() of `documents` (indices). A CPU has no graphs, so no shape needs to serve twice."""
        return plan_lockstep(self.scoring.val.lengths[documents], self.scoring.cfg, exact=not self.scoring.ranks.cuda)

    def capture(self, batches: list[ndarray]):
        """Capture the CUDA graphs that these batches need. No validation token is read, only lengths are."""
        begun = time.perf_counter()
        plans = itertools.chain(*map(self.plan, batches))
        shapes = {shape for _, shape in plans}
        lockstep = self.lockstep
        pool = torch.cuda.graph_pool_handle()
        for shape in sorted(shapes, reverse=True):  # the largest first: smaller ones find their memory in the pool
            with torch.cuda.stream(torch.cuda.Stream()):
                lockstep.learn(shape, lockstep.score(shape).nats)  # libraries and Triton set themselves up before
            torch.cuda.synchronize()
            score = torch.cuda.CUDAGraph()
            with torch.cuda.graph(score, pool=pool):
                scores = lockstep.score(shape)
            learn = torch.cuda.CUDAGraph()
            with torch.cuda.graph(learn, pool=pool):
                lockstep.learn(shape, scores.nats)
            # Detached, so that what autograd kept for learn() is free for the next capture.
            detached = [None if t is None else t.detach() for t in scores]
            self.graphs[shape] = CapturedStep(score, learn, Scores(*detached))
        seconds = time.perf_counter() - begun
        self.scoring.log(f"  captured {len(self.graphs)} graphs in {seconds:.1f} s")

    @contextlib.contextmanager
    def random_tokens(self):
        """For the while of the block, steps read random tokens in the stream's place."""
        stream = self.lockstep.tokens
        kept = stream.clone()
        stream.random_(self.scoring.cfg.vocab_size)
        yield
        stream.copy_(kept)

    def step_seconds(self, shape: Shape) -> float:
        """What a step of this Shape takes, bookkeeping included."""
        rows, older, back, count = shape
        begin = older + back
        starts = np.arange(rows) * count - begin  # so that the ledger that is thrown away has rows * count targets
        lengths = np.full(rows, begin + count + 1)  # every row goes on, so the step learns
        self.seat(starts, lengths)

        def step():
            ledger = Ledger("timing", np.ones(rows * count, np.uint16), Verdicts())
            self.step(self.scoring._replace(ledger=ledger, ngram=None), begin, shape, starts, lengths)

        return seconds_of(step, self.scoring.ranks)

    @torch.no_grad()
    def seat(self, starts: ndarray, lengths: ndarray):
        """Put documents into the rows: their adapters are at the start, without second moments and updates."""
        lockstep = self.lockstep
        lockstep.row_lengths.zero_()
        lockstep.row_starts[: len(starts)] = torch.from_numpy(starts)
        lockstep.row_lengths[: len(lengths)] = torch.from_numpy(lengths)
        for p, start in zip(lockstep.lora.leaves(), lockstep.start):
            p.copy_(start)
        torch._foreach_zero_([*lockstep.squares, lockstep.updates])

    def run(self, documents: ndarray):
        """Score every target of `documents` (indices, at most TTT_BATCH_SIZE, in any order), learning in between."""
        val = self.scoring.val
        documents = documents[np.argsort(-val.lengths[documents], kind="stable")]
        starts = val.starts[documents]
        lengths = val.lengths[documents]
        self.seat(starts, lengths)
        for begin, shape in self.plan(documents):
            self.scoring.progress.show(self.scoring)
            self.step(self.scoring, begin, shape, starts, lengths)
        self.remember(lengths)

    def step(self, scoring: ScoringPass, begin: int, shape: Shape, starts: ndarray, lengths: ndarray):
        """Score the chunk at `begin` of every row and learn from it.

        starts and lengths (documents,): of the documents in rows 0, 1, ..., by falling length.
        """
        self.lockstep.begin.fill_(begin)
        graphs = self.graphs[shape] if self.graphs else None  # once captured, every shape is
        if graphs:
            graphs.score.replay()
            scores = graphs.scores
        else:
            scores = self.lockstep.score(shape)
        end = begin + shape.count
        position = np.arange(begin, end)
        row_lengths = lengths[: shape.rows, None]  # (documents, 1); the shape may have more rows than documents
        targets = starts[: shape.rows, None] + position  # (documents, count)
        valid = position < row_lengths  # chunks reach beyond the end of a document
        book(scoring, targets[valid], scores, np.flatnonzero(valid))
        learnt = targets[row_lengths[:, 0] > end]  # a last chunk teaches nobody
        if not len(learnt):
            return
        scoring.ledger.may_train(learnt.ravel())
        if graphs:
            graphs.learn.replay()
        else:
            self.lockstep.learn(shape, scores.nats)

    @torch.no_grad()
    def remember(self, lengths: ndarray):
        """Add to `drift` how far each document's adapters have moved, weighted by its tokens, at most TTT_EVAL_SEQ_LEN.

        lengths (documents,): of the documents in rows 0, 1, ..., in that order.
        """
        tokens = np.minimum(lengths, self.scoring.cfg.ttt_eval_seq_len)
        total = int(tokens.sum())
        weight = torch.from_numpy(tokens.astype(np.float32)).to(self.scoring.ranks.device)
        for drift, p, start in zip(self.drift, self.lockstep.lora.leaves(), self.lockstep.start):
            # sum over documents of weight (adapters - start)
            drift += torch.tensordot(weight, p[: len(weight)], 1) - total * start
        self.drift_tokens += total

    @torch.no_grad()
    def next_segment(self):
        """Move the start by TTT_WARM_START to the mean of the segment's adapters (Reptile, arXiv 1803.02999).

        All that it learns from is scored: the segment is over.
        """
        ranks = self.scoring.ranks
        total = ranks.all_reduce_(torch.tensor(self.drift_tokens)).item()
        share = self.scoring.cfg.ttt_warm_start / max(total, 1)  # start += TTT_WARM_START (mean - start)
        for start, drift in zip(self.lockstep.start, self.drift):
            start += share * ranks.all_reduce_(drift)
            drift.zero_()
        self.drift_tokens = 0


def base_gradients(scoring: ScoringPass, begin: int, end: int):
    """Leave in .grad of every parameter the gradient of the mean nats of targets begin..end (exclusive) over all ranks.

    Its norm is at most GLOBAL_TTT_GRAD_CLIP. The targets are cut every TTT_EVAL_SEQ_LEN and each rank takes
    neighbouring pieces, so the pieces are the same for any number of ranks.
    """
    cfg = scoring.cfg
    ranks = scoring.ranks
    tokens = scoring.val.tokens
    span = cfg.ttt_eval_seq_len

    def rank_share(targets: int) -> int:
        """Of so many targets, those of one rank: whole pieces."""
        return math.ceil(targets / (span * ranks.world)) * span

    share = rank_share(end - begin)
    micro_batch = rank_share(cfg.global_ttt_chunk_tokens)
    first = begin + ranks.rank * share
    last = min(first + share, end)
    for low in range(first, last, micro_batch):
        high = min(low + micro_batch, last)
        inputs = tokens[low:high]
        targets = tokens[low + 1 : high + 1]
        document_starts = np.flatnonzero(inputs == cfg.bos_id)
        starts = np.union1d(document_starts, np.arange(0, len(inputs), span))
        batch = pack_documents(inputs, targets, starts, span, span, len(inputs), "val")
        batch_loss(scoring.model, to_device(batch, ranks.device), end - begin, cfg.looped).backward()
    parameters = list(scoring.model.parameters())
    for p in parameters:
        if p.grad is None:  # a rank without a piece, or a parameter outside the loss
            p.grad = torch.zeros_like(p)
    for p, grad in zip(parameters, ranks.all_reduce_flat([p.grad for p in parameters])):
        p.grad = grad
    # Clipped after the sum over the ranks, so that all take the same step.
    nn.utils.clip_grad_norm_(parameters, cfg.global_ttt_grad_clip)


def sgd_chunks(begin: int, fresh: int, end: int, turn: int, cfg: Config) -> list[tuple[int, int]]:
    """Chunks (low, high) of targets begin..end, one a step, in stream order: GLOBAL_TTT_EPOCHS passes.

    Each has about GLOBAL_TTT_CHUNK_TOKENS. All that ends before `fresh` was learnt from in earlier turns: a share of
    GLOBAL_TTT_REPLAY comes again, evenly spaced, other chunks in each turn. Positions decide, nothing else.
    """
    count = max(round((end - begin) / cfg.global_ttt_chunk_tokens), 1)
    edges = np.linspace(begin, end, count + 1).astype(int)
    chunks = []
    share = round(1000 * cfg.global_ttt_replay)  # whole numbers: floats would round some turns away
    for i, (low, high) in enumerate(itertools.pairwise(edges.tolist()), turn):
        again = (i + 1) * share // 1000 > i * share // 1000
        if high > fresh or again:
            chunks.append((low, high))
    return chunks * cfg.global_ttt_epochs


class GlobalSGD:
    """SGD of all base weights on scored targets. lr(x) = GLOBAL_TTT_LR (1 + cos(pi x)) / 2 at progress x in 0..1."""

    def __init__(self, scoring: ScoringPass):
        self.scoring = scoring
        self.optimizer: Any = torch.optim.SGD(scoring.model.parameters(), momentum=scoring.cfg.global_ttt_momentum)

    def learn(self, chunks: list[tuple[int, int]], progress: float, progress_after: float):
        """A step on the targets low..high of each chunk, all of them scored.

        Progress rises evenly from `progress` to `progress_after`, which it does not reach.
        """
        scoring = self.scoring
        for low, high in chunks:
            scoring.ledger.may_train(slice(low, high))
        scoring.model.requires_grad_(True)
        for i, (low, high) in enumerate(chunks):
            scoring.progress.show(scoring, ", base weights learning")
            base_gradients(scoring, low, high)
            # Written so that progress 0 to 1 gives exactly i / len(chunks), and equal ends give exactly progress.
            x = progress + (progress_after - progress) * (i / len(chunks))
            self.step(scoring.cfg.global_ttt_lr * 0.5 * (1 + math.cos(math.pi * x)))
            scoring.model.zero_grad()  # to None: the next chunk starts anew
        scoring.model.requires_grad_(False)

    def step(self, lr: float):
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.step()


class GlobalMuon(GlobalSGD):
    """GLOBAL_TTT_OPTIMIZER=muon: the optimizer of training in SGD's place, all its rates times lr(x), without decay."""

    def __init__(self, scoring: ScoringPass):
        self.scoring = scoring
        still: dict[str, Any] = dict.fromkeys(("muon_wd", "adam_wd", "embed_wd", "ema_decay", "grad_clip_norm"), 0.0)
        momentum = scoring.cfg.global_ttt_momentum
        cfg = dataclasses.replace(scoring.cfg, **still, muon_momentum=momentum, muon_momentum_warmup_steps=0)
        self.optimizer = Optimizer(scoring.model, cfg, scoring.ranks)

    def step(self, lr: float):
        # Every rank has the sum over the ranks, and the optimizer sums once more.
        torch._foreach_div_([p.grad for p in self.optimizer.parameters], self.scoring.ranks.world)
        self.optimizer.step(0, lr)


GLOBAL_OPTIMIZERS = {"sgd": GlobalSGD, "muon": GlobalMuon}


class Segment(NamedTuple):
    """Consecutive documents of the stream that are independent of each other."""

    first: int  # documents first..last (exclusive)
    last: int
    then_learn: bool  # the base weights learn from scored targets before the next segment


def seconds_of(work: Callable, ranks: Ranks) -> float:
    """The fewest seconds of three times; the first also warms up."""

    def all_of_it():
        work()
        ranks.synchronize()

    return min(timeit.repeat(all_of_it, number=1, repeat=3))


def sgd_seconds(scoring: ScoringPass) -> float:
    """What the gradients of a step of global SGD take, on random tokens. No weight moves."""
    step_tokens = scoring.cfg.global_ttt_chunk_tokens
    count = step_tokens if scoring.ranks.cuda else min(step_tokens, 512)  # a CPU is slow, and the time in proportion
    tokens = np.random.default_rng(0).integers(scoring.cfg.vocab_size, size=count + 1)
    val: Any = SimpleNamespace(tokens=tokens)
    scoring = scoring._replace(val=val)
    scoring.model.requires_grad_(True)
    seconds = seconds_of(lambda: base_gradients(scoring, 0, count), scoring.ranks)
    scoring.model.requires_grad_(False)
    scoring.model.zero_grad()
    return seconds * step_tokens / count


def plan_lessons(segments: list[Segment], starts: ndarray, cfg: Config) -> dict[int, list[tuple[int, int]]]:
    """Index of each segment behind which the base weights learn -> the chunks that they learn from.

    Those of all that is scored; with TTT_METHOD=sgd those of the segment."""
    lessons = {}
    fresh = 0  # what no lesson has had yet begins here
    for i, segment in enumerate(segments):
        if segment.then_learn and cfg.ttt_enabled:
            end = int(starts[segment.last])
            begin = fresh if cfg.ttt_method == "sgd" else 0
            lessons[i] = sgd_chunks(begin, fresh, end, len(lessons), cfg)
            fresh = end
    return lessons


class Windows:
    """TTT_ENABLED=0: windows alone; nothing learns but the n-grams, which count between segments."""

    @staticmethod
    def plan(lengths: ndarray, cfg: Config) -> list[Segment]:
        return plan_segments(lengths, cfg)

    def __init__(self, scoring: ScoringPass, segments: list[Segment]):
        self.scoring = scoring
        self.segments = segments
        self.lessons = plan_lessons(segments, scoring.val.starts, scoring.cfg)

    def score(self, i: int):
        """Score segment i; returns once all ranks have its scores."""
        first, last, _ = self.segments[i]
        score_documents(self.scoring, first, last)

    def learn(self, i: int):
        """Learn from what is scored, after segment i."""

    def scoring_seconds(self, segments: list[Segment], windows_seconds: float) -> float:
        """About how long it takes to score these segments, where windows alone take `windows_seconds`."""
        return windows_seconds


class LearnBehindWindows(Windows):
    """TTT_METHOD=sgd: the base weights learn from each segment behind its scores (#549). One momentum and one half
    cosine span the stream."""

    @staticmethod
    def plan(lengths: ndarray, cfg: Config) -> list[Segment]:
        return plan_sgd_segments(lengths, cfg)

    def __init__(self, scoring: ScoringPass, segments: list[Segment]):
        super().__init__(scoring, segments)
        self.optimizer = GLOBAL_OPTIMIZERS[scoring.cfg.global_ttt_optimizer](scoring)

    def learn(self, i: int):
        progress = i / len(self.segments)  # constant in a segment
        self.optimizer.learn(self.lessons[i], progress, progress)


class AdaptDocuments(Windows):
    """TTT_METHOD=lora: adapters learn inside each document, and the base weights in phases from what is scored."""

    def __init__(self, scoring: ScoringPass, segments: list[Segment]):
        super().__init__(scoring, segments)
        self.documents = DocumentTTT(scoring)
        self.batches = [self.deal(segment)[scoring.ranks.rank] for segment in segments]  # of each, this rank's
        longest = [int(scoring.val.lengths[first:last].max()) for first, last, _ in segments]
        # With ever more ranks a pass takes as long as these documents.
        serial = sum(len(chunk_ends(length, scoring.cfg)) for length in longest)
        scoring.log(f"  critical path {serial:,} chunks, one after the other: the longest documents of the segments")
        if scoring.ranks.cuda:
            with self.documents.random_tokens():
                self.documents.capture(list(itertools.chain(*self.batches)))

    def deal(self, segment: Segment) -> list[list[ndarray]]:
        """For each rank its batches of the segment's documents."""
        lengths = self.scoring.val.lengths[segment.first : segment.last]
        return deal_batches(lengths, segment.first, self.scoring.cfg, self.scoring.ranks.world)

    def score(self, i: int):
        for batch in self.batches[i]:
            self.documents.run(batch)
        self.documents.next_segment()
        first, last, _ = self.segments[i]
        begin = int(self.scoring.val.starts[first])
        end = begin + int(self.scoring.val.lengths[first:last].sum())
        self.scoring.ledger.merge(self.scoring.ranks, begin, end)

    def learn(self, i: int):
        """A phase of global SGD, with a half cosine and a momentum of its own."""
        chunks = self.lessons[i]
        GLOBAL_OPTIMIZERS[self.scoring.cfg.global_ttt_optimizer](self.scoring).learn(chunks, 0.0, 1.0)
        count = sum(high - low for low, high in chunks)
        self.scoring.log(f"  base weights learnt from {count:,} of {chunks[-1][1]:,} scored targets")

    def steps(self, segment: Segment) -> list[list[Shape]]:
        """For each rank its steps of the segment."""
        plans = [itertools.chain(*map(self.documents.plan, batches)) for batches in self.deal(segment)]
        return [[shape for _, shape in plan] for plan in plans]

    @functools.cached_property
    def times(self) -> dict[Shape, float]:
        """Seconds of a step, of each Shape that has graphs; without graphs of the one of least and of most work."""
        shapes = self.documents.graphs
        if not shapes:
            of_ranks = itertools.chain(*map(self.steps, self.segments))
            every = list(itertools.chain(*of_ranks))
            shapes = {pick(every, key=lambda shape: shape.work) for pick in (min, max)}
        with self.documents.random_tokens():
            return {shape: self.documents.step_seconds(shape) for shape in shapes}

    def scoring_seconds(self, segments: list[Segment], windows_seconds: float) -> float:
        work, seconds = zip(*sorted((shape.work, seconds) for shape, seconds in self.times.items()))

        def rank_seconds(steps: list[Shape]) -> float:
            return sum(self.times.get(shape) or np.interp(shape.work, work, seconds) for shape in steps)

        # A segment waits for the rank with the most to do.
        return sum(max(map(rank_seconds, self.steps(segment))) for segment in segments)


def plan_segments(lengths: ndarray, cfg: Config) -> list[Segment]:
    """Segments of documents of these lengths; what counts is how many there are.

    Without a prefix, a segment has SEGMENT_GROWTH times the documents before it, at least SEGMENT_FIRST_DOCS and at
    most SEGMENT_DOCS, however many follow. The base weights learn after each but the last:

        64, 64, 64, 64, 64, 80, 100, 125, ...      SEGMENT_FIRST_DOCS = 64, SEGMENT_GROWTH = 0.25

    With a prefix, phase p = 1, 2, ... of global SGD follows document PHASED_TTT_PREFIX_DOCS p / PHASED_TTT_NUM_PHASES,
    never the last one. A segment ends there and otherwise every SEGMENT_DOCS.
    """
    documents = len(lengths)
    phases = cfg.phased_ttt_num_phases
    prefix = min(cfg.phased_ttt_prefix_docs, documents - 1)
    phase_ends = {prefix * phase // phases for phase in range(1, phases + 1)}
    cuts = {0, documents, *phase_ends, *range(0, documents, cfg.segment_docs)}
    if not prefix:
        cuts = {documents}
        end = 0
        while end < documents:
            cuts.add(end)
            end += min(max(int(cfg.segment_growth * end), cfg.segment_first_docs), cfg.segment_docs)
        phase_ends = cuts - {documents} if phases else set()
    return [Segment(first, last, last in phase_ends) for first, last in itertools.pairwise(sorted(cuts))]


def plan_sgd_segments(lengths: ndarray, cfg: Config) -> list[Segment]:
    """Segments of as many documents, of these lengths, as hold GLOBAL_TTT_CHUNK_TOKENS targets.

    All segments but the last are learnt from.
    """
    cuts = greedy_cuts(lengths, cfg.global_ttt_chunk_tokens, overfull=True)
    return [Segment(first, last, last < len(lengths)) for first, last in itertools.pairwise(cuts)]


class TestTimeTraining:
    """Scores the validation stream segment by segment and lets the model learn from what is scored."""

    STRATEGIES = {"lora": AdaptDocuments, "sgd": LearnBehindWindows}

    def __init__(self, scoring: ScoringPass):
        """Everything that takes time before the first score; no weight learns from a token in it."""
        cfg = scoring.cfg
        strategy = self.STRATEGIES[cfg.ttt_method] if cfg.ttt_enabled else Windows
        self.segments = strategy.plan(scoring.val.lengths, cfg)
        sizes = self.sizes = [segment.last - segment.first for segment in self.segments]  # documents of each
        shown = sizes if len(sizes) < 30 else f"{min(sizes)}..{max(sizes)}"
        scoring.log(f"scoring {scoring.ledger.name}: {len(sizes)} segment(s) of {shown} documents")
        if cfg.ngram_enabled:
            scoring = scoring._replace(ngram=NGram(scoring, sizes))
        scoring.model.requires_grad_(False)  # only adapters learn, until global SGD asks for more
        self.scoring = scoring
        self.strategy = strategy(scoring, self.segments)
        self.estimated = 0.0  # seconds that score() will take, once measure() has been called

    def measure(self, windows_seconds: float) -> float:
        """Time each kind of step shortly, on random tokens; returns about how many seconds score() will take.

        windows_seconds: of a pass over the stream by windows alone.
        """
        self.windows_seconds = windows_seconds
        self.step_seconds = sgd_seconds(self.scoring) if self.strategy.lessons else 0.0
        self.estimated = self.planned_seconds(self.scoring.cfg)
        self.scoring.log(f"  about {self.estimated:.1f} s, by the time of single steps")
        return self.estimated

    def planned_seconds(self, cfg: Config) -> float:
        """About how long scoring takes by the plan of these settings: rank 0's answer."""
        segments = self.strategy.plan(self.scoring.val.lengths, cfg)
        lessons = plan_lessons(segments, self.scoring.val.starts, cfg)
        seconds = self.strategy.scoring_seconds(segments, self.windows_seconds)
        return self.scoring.ranks.agree(seconds + sum(map(len, lessons.values())) * self.step_seconds)

    def check_time(self, left: float):
        """Raise UserError if score() will take more than the `left` seconds of the budget, before it has begun.

        No clock decides more than that."""
        cfg = self.scoring.cfg
        left = self.scoring.ranks.agree(left)
        if self.estimated <= left:
            return
        changes: list[tuple[str, Any]] = [("segment_docs", cfg.segment_docs << doublings) for doublings in range(1, 6)]
        for name, value in (*changes, ("phased_ttt_num_phases", 0), ("ttt_enabled", 0)):
            if self.planned_seconds(dataclasses.replace(cfg, **{name: value})) <= left:
                break  # else the last is named
        raise UserError(
            f"MAX_WALLCLOCK_SECONDS={cfg.max_wallclock_seconds:.0f} leaves {left:.0f} s for test-time training, which "
            f"will take about {self.estimated:.0f}; set {name.upper()}={value}, or MAX_WALLCLOCK_SECONDS=0: no budget"
        )

    def score(self) -> float:
        """Score a segment, learn from it, go on; returns the ledger's BPB."""
        begun = time.perf_counter()
        self.scoring.progress.begun = begun  # what came before says nothing about the rate
        for i, segment in enumerate(self.segments):
            self.strategy.score(i)
            if segment.then_learn:
                self.strategy.learn(i)
        seconds = time.perf_counter() - begun
        scoring = self.scoring
        targets = scoring.val.targets
        rate = targets / seconds
        scoring.log(
            f"  {targets:,} targets in {seconds:.1f} s: {rate:,.0f} targets/s over {scoring.ranks.world} rank(s)"
        )
        scoring.log(f"  {self.estimated:.1f} s by estimate")
        return scoring.ledger.bpb()


def train_on_validation_set(scoring: ScoringPass):
    """AdamW over the whole validation set before any of it is scored (#1735, #1738), which breaks C3.

    The published mistake, kept so that it can be measured: no ledger is asked, and scoring the artifact fails C3. The
    embedding and the first PREQUANT_TTT_FREEZE_BLOCKS layers stay as they are.
    """
    model = scoring.model
    cfg = scoring.cfg
    targets = scoring.val.targets
    chunk = cfg.global_ttt_chunk_tokens
    epochs = cfg.prequant_ttt_epochs
    adam = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    not_by_layer = ("skip_", "tok_emb")
    by_layer = [p for name, p in model.named_parameters() if p.ndim > 1 and not name.startswith(not_by_layer)]
    for epoch in range(epochs):
        cosine = math.cos(math.pi * epoch / max(epochs - 1, 1))
        adam.param_groups[0]["lr"] = cfg.prequant_ttt_lr * (0.55 + 0.45 * cosine)
        for begin in range(0, targets, chunk):
            base_gradients(scoring, begin, min(begin + chunk, targets))
            model.tok_emb.grad = None  # Adam leaves alone what never had a gradient
            for p in by_layer:
                p.grad[: cfg.prequant_ttt_freeze_blocks] = 0.0
            adam.step()
            adam.zero_grad()  # to None: base_gradients starts anew
        scoring.log(f"  trained on the validation set, pass {epoch + 1} of {epochs}")


# ======== Packer ======================================================================================================

# A packed script decompresses its source into memory and runs that. No file holds it, so none can be read, replaced or
# left behind by others: Triton and tracebacks find the lines of kernels in the cache that `inspect` reads.
BOOTSTRAP = """# coding: latin-1
# Packed train_gpt.py. Its source: python3 train_gpt.py --unpack FILE, or the bz2 stream in the string below.
import bz2,io,linecache,sys,traceback
PACKED_PATH=__file__
try:PACKED_SOURCE=bz2.decompress("%s".encode("latin-1")).decode();PACKED_SOURCE[0]
except(IndexError,OSError,ValueError)as e:sys.exit("error: "+PACKED_PATH+": damaged ("+str(e)+"); copy it again")
__file__+=" (unpacked)"
sys.excepthook=traceback.print_exception
linecache.cache[__file__]=len(PACKED_SOURCE),None,io.StringIO(PACKED_SOURCE).readlines(),__file__
exec(compile(PACKED_SOURCE,__file__,"exec"))
"""
MOST_SOURCE = 1 << 25  # bytes that --unpack prints
ESCAPES = str.maketrans({"\\": "\\\\", "\r": "\\r", "\n": "\\n", "\0": "\\x00", '"': '\\"'})


def pack_script(source: str) -> bytes:
    """Self-extracting script: the stripped source in a latin-1 string (3 % overhead where base85 has 25 %), by bz2,
    which takes 2 % less than LZMA for text of this length."""
    stripped = strip_source(source)
    if without_docstrings(stripped) != without_docstrings(source):  # a string with a blank line in it
        raise RuntimeError("stripping comments would change the program")
    text = bz2.compress(without_meanings(stripped).encode()).decode("latin-1").translate(ESCAPES)
    return (BOOTSTRAP % text).encode("latin-1")


def without_meanings(source: str) -> str:
    """Empties the text with which the second line of a setting begins, in one or more pieces: --help alone reads it."""
    return re.sub(r'(: \w+ = setting\([^\n]*,\n *)("(?:[^"\\\n]|\\.)*"\s*)+(?=[,)])', r'\1""', source)


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
    before, after = map(re.escape, BOOTSTRAP.split("%s"))
    match = re.fullmatch(f"{before}(.*){after}", path.read_bytes().decode("latin-1"))
    damaged = f"--unpack {path}: not a script packed by train_gpt.py, or a damaged one"
    with explained(damaged, TypeError, ValueError, SyntaxError, OSError):
        packed = ast.literal_eval(f'"{match[1]}"').encode("latin-1")
        return inflate(bz2.BZ2Decompressor(), packed, MOST_SOURCE).decode()


# ======== Main ========================================================================================================

SUBSET = 1 << 19  # first validation targets: VAL_EVERY_STEPS scores the documents that begin there


class Run:
    """What the modes share: settings, ranks, log, timers, verdicts, validation data, attention backend."""

    def __init__(self, cfg: Config):
        self.cfg = cfg
        self.folder = artifact_folder(cfg)
        self.ranks = Ranks(cfg)
        self.log = Log(self.ranks)
        self.phases = Phases(self.ranks)
        self.verdicts = Verdicts()
        self.result: dict[str, Any] = {"bpb": {}}  # what result.json will hold
        self.training_hashes: TrainingHashes | None = None  # on rank 0, where training data is read
        self.output = output_folder(cfg)
        # What moves the output elsewhere.
        self.place = "ARTIFACT_DIR" if self.output == self.folder else "the working directory"

    def prepare(self):
        """Read and check the validation data, choose the attention backend, and log what is used."""
        cfg = self.cfg
        torch.manual_seed(cfg.seed)
        torch.set_float32_matmul_precision("high")  # TF32 for what is left in fp32
        with self.phases("read"):
            self.val = ValidationStream(cfg)
            data = fingerprint(cfg, self.val)
            self.val.join(cfg)
        with self.phases("setup"):
            self.attention_backend = choose_attention(cfg, self.ranks.device)
        settings = cfg.settings()
        facts = self.describe_environment() | {"dataset": data["dataset"], "data": data}
        self.result |= facts | {"seed": cfg.seed, "settings": settings}
        self.log(f"hardware {facts['hardware']}, attention {facts['attention']}, kernels {facts['kernels']}")
        self.log(f"versions {facts['versions']}")
        self.log(f"source sha256 {facts['source_sha256']}")
        changed = sorted(settings.items() - Config().settings().items())
        changes = " ".join(f"{name.upper()}={value}" for name, value in changed) or "none"
        self.log(f"settings sha256 {facts['settings_sha256']}; changed from their defaults: {changes}")
        self.log(f"all settings: {json.dumps(settings)}", console=False)
        self.log("data: " + ", ".join(f"{name} {value}" for name, value in data.items()))
        if self.output != self.folder:
            self.log(f"{self.folder} can only be read; eval.log and eval_result.json go to {self.output}")
        if not data["manifest"]:
            self.log("data: no manifest.json, so documents and hashes are unchecked")

    def describe_environment(self) -> dict:
        """Hardware, versions and hashes, for the log and result.json."""
        ranks = self.ranks
        hardware = f"CPU, {torch.get_num_threads()} threads x {ranks.world} rank(s)"
        if ranks.cuda:
            hardware = f"{ranks.world} x {torch.cuda.get_device_name()}"
        fused = use_kernels(torch.bfloat16, ranks.device, self.cfg.model_dim // self.cfg.num_heads)
        source = SOURCE if PACKED else without_meanings(strip_source(SOURCE))
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

    def origin(self) -> dict:
        """What weights must know of the run that made them."""
        data = self.result["data"]
        known = {name: data.get(name) for name in ("tokenizer_sha256", "transform")}
        return {"settings": self.cfg.settings(), **known}

    def scoring(self, model: GPT, name: str, end: int | None = None) -> ScoringPass:
        """A pass over the validation stream, up to target `end`, with a ledger of its own."""
        ledger = Ledger(name, self.val.target_bytes[:end], self.verdicts)
        return ScoringPass(model, self.cfg, self.ranks, self.log, self.val, ledger, Progress())

    def new_model(self, logit_calibration: LogitCalibration | None = None) -> GPT:
        """A GPT on the run's device, its weights not set yet."""
        dtype = torch.bfloat16 if self.ranks.cuda else torch.float32
        return GPT(self.cfg, self.attention_backend, dtype, logit_calibration).to(self.ranks.device)

    def interrupted(self) -> str:
        """Log where the run is and how it can go on; returns what the console should say, which is rank 0's to say."""
        saved = self.cfg.quantize_only or "save" in self.phases.seconds
        remedy = "; `QUANTIZE_ONLY=1` goes on from trained.npz" if saved and not self.cfg.ttt_eval_only else ""
        line = f"interrupted in {self.phases.latest}{remedy}"
        self.log(line, console=False)
        return line if self.ranks.main else ""

    def record(self, name: str, bpb: float):
        """Keep and log the BPB of pass `name`."""
        self.result["bpb"][name] = bpb
        self.headline = bpb  # of the last pass
        self.log(f"{name}: {bpb:.5f} BPB")

    def diagnose(self, model: GPT, name: str):
        """BPB of the weights in memory, in a ledger and a time of its own."""
        with self.phases("diagnostic"):
            bpb = score_stream(self.scoring(model, name))
        self.record(name, bpb)

    def diagnose_subset(self, model: GPT, looped: bool, step: int, clock: Clock):
        """BPB of the documents that begin within SUBSET, by the weights in memory, while the training clock stands."""
        stands = clock.stop()
        with self.phases("subset"):
            last = int(np.searchsorted(self.val.starts, SUBSET))
            scoring = self.scoring(model, "subset", np.append(self.val.starts, self.val.targets)[last])
            cfg = self.cfg if looped else dataclasses.replace(self.cfg, num_loops=0)
            score_documents(scoring._replace(cfg=cfg), 0, last)
            bpb = scoring.ledger.bpb()
        self.phases.latest = "steps"
        self.log(f"step {step:6d}: {bpb:.4f} BPB of the first validation documents")
        self.result.setdefault("val_curve", []).append((step, round(stands, 3), bpb))
        spent = clock.stop() - stands
        clock.start += spent
        self.phases.seconds["steps"] -= spent


def artifact_folder(cfg: Config) -> Path:
    """ARTIFACT_DIR; else runs/SEED, or a packed script's own folder."""
    if cfg.artifact_dir:
        return Path(cfg.artifact_dir)
    return RUNNING.parent if PACKED else Path("runs") / str(cfg.seed)


def output_folder(cfg: Config) -> Path:
    """Where the log and the result go: an artifact can be scored in a folder that can only be read."""
    folder = artifact_folder(cfg)
    read_only = cfg.ttt_eval_only and folder.is_dir() and not os.access(folder, os.W_OK)
    return Path.cwd() if read_only else folder


def parameter_count(model: GPT) -> int:
    """Numbers in all weights; 4 bytes each in trained.npz."""
    return sum(p.numel() for p in model.parameters())


# Every file of a run; what was half written by a run that was killed goes when the next one starts.
WRITTEN = ("trained.npz", "model.bin", "train_gpt.py", "result.json", "eval_result.json", "preflight")


def preflight(run: Run):
    """Everything that could fail after the training clock has run, tried before it starts."""
    cfg = run.cfg
    if run.ranks.main:
        for name in WRITTEN:
            clear_parts(run.output / name)
        try_codec(run)
        if cfg.ledger_path:
            clear_parts(Path(cfg.ledger_path))
            try_path(Path(cfg.ledger_path), "LEDGER_PATH")
        if not cfg.ttt_eval_only:  # scoring leaves the folder's script alone: it may be the one that runs
            check_folder(run)
    if cfg.logit_calibration_enabled:
        piece_features(cfg)  # reads the tokenizer
    if run.ranks.main and not cfg.ttt_eval_only:
        run.training_hashes = TrainingHashes(cfg)
    if not (cfg.ttt_eval_only or cfg.quantize_only):
        tokens = TrainStream(cfg).tokens
        micro_batches = math.ceil(cfg.train_batch_tokens / cfg.micro_batch_tokens)
        run.log(f"checks passed: {tokens:,} training tokens, {micro_batches} micro-batch(es) a step")
        if micro_batches < run.ranks.world:
            run.log(f"warning: only {micro_batches} of {run.ranks.world} ranks will work; lower MICRO_BATCH_TOKENS")


def wait_for_hashes(run: Run):
    """Raise UserError if a training shard is not the manifest's."""
    if run.training_hashes:
        run.training_hashes.judge(run.verdicts)
    require(not run.verdicts.failed(), f"DATA_PATH={run.cfg.data_path}: {run.verdicts.table['data'][1]}")


def try_codec(run: Run):
    """Write and read a small artifact in the run's folder."""
    symbols = np.random.default_rng(0).integers(-9, 10, (64, 64), dtype=np.int8)
    path = run.output / f"preflight.part{os.getpid()}"  # a name of this process: another may run in the folder
    try:
        save_artifact(path, {"q.0.symbols": symbols}, {}, run.place)
        arrays, _ = load_artifact(path)
    finally:
        path.unlink(missing_ok=True)
    if not np.array_equal(arrays["q.0.symbols"], symbols):
        raise RuntimeError("the artifact codec does not reproduce its input")


def check_folder(run: Run):
    """The source can be packed, the running script would not be overwritten, and the files fit on the disk."""
    packed = pack_script(SOURCE)
    elsewhere = f"set ARTIFACT_DIR={run.folder} to another folder"
    script = run.folder / "train_gpt.py"
    if script.exists() and script.samefile(RUNNING):
        require(script.read_bytes() == packed, f"the run would overwrite its own script; {elsewhere}")
    # trained.npz, and model.bin beside an earlier one
    need = 4 * parameter_count(run.new_model()) + 2 * run.cfg.artifact_cap
    free = shutil.disk_usage(run.folder).free
    require(free >= need, f"{free:,} bytes free, {need:,} needed; free space or {elsewhere}")


def train(run: Run, model: GPT):
    """Train the model and keep its weights on disk: trained.npz holds the fp32 weights by name, and as JSON in "meta"
    what a later run needs to continue."""
    model.init_weights(run.cfg.seed)
    init_joined(model.tok_emb, operator_joins(run.cfg))
    run.log(f"{parameter_count(model):,} parameters")
    trainer = Trainer(model, run.cfg, run.ranks, run.log, run.diagnose_subset)
    with run.phases("warmup"):
        trainer.warm_up()
    run.log(f"warmed up in {run.phases.seconds['warmup']:.1f} s")
    with run.phases("steps"):
        training = trainer.run()
    run.result["training"] = training
    with run.phases("save"):
        if run.ranks.main:
            seconds = {"steps": run.phases.seconds["steps"]}
            meta = run.origin() | {"training": training, "seconds": seconds}
            arrays: Any = {name: p.detach().cpu().numpy() for name, p in model.named_parameters()}
            with whole_file(run.folder / "trained.npz") as f:
                np.savez(f, meta=np.array(json.dumps(meta)), **arrays)


def read_trained(path: Path) -> tuple[dict[str, ndarray], dict]:
    """Weights (fp32) and meta of trained.npz."""
    damaged = f"{path}: cannot be read ({{}}); train again, or set ARTIFACT_DIR to the folder that holds it"
    with explained(damaged, Exception):  # zipfile and numpy know many
        with zipfile.ZipFile(path) as z:
            if sum(member.file_size for member in z.infolist()) > path.stat().st_size:
                raise ValueError("compressed")  # kilobytes can become gigabytes, and np.savez never does it
        arrays = dict(np.load(path))
        meta = json_object(str(arrays.pop("meta")))
        if any(a.dtype != np.float32 for a in arrays.values()):
            raise ValueError("weights other than float32")
        return arrays, meta


def load_trained(run: Run, model: GPT):
    """Put the weights of trained.npz into the model, and its counts and times into the result."""
    path = run.folder / "trained.npz"
    arrays, meta = read_trained(path)
    same_data(run, path, meta)
    load_state(model, {name: torch.from_numpy(array) for name, array in arrays.items()}, path)
    with explained(f"{path}: lacks counts or times of its training; train again", KeyError, TypeError, ValueError):
        run.result["training"] = dict(meta["training"])
        run.phases.seconds["steps"] = float(meta["seconds"]["steps"])


def same_data(run: Run, path: Path, meta: dict) -> bool:
    """Whether weights and shards are known to be of one tokenizer; UserError where they are of two, or of two forms of
    CaseOps."""
    data = run.result["data"]
    for name in ("transform", "tokenizer_sha256"):
        theirs = meta.get(name)
        ours = data.get(name)
        require(
            theirs == ours or None in (theirs, ours),
            f"{path}: made for data of {name} {theirs!s:.40}, DATA_PATH is of {ours!s:.40}; set DATA_PATH and "
            "TOKENIZER_PATH to what it was made with",
        )
    return None not in (meta.get("tokenizer_sha256"), data.get("tokenizer_sha256"))


class RateSearch:
    """Looks for the bits to save per weight at which model.bin just fits. Sizes are measured, since a code's length is
    only known once it is written."""

    ATTEMPTS = 12
    AIM = 0.9997  # of the room: a little below, so that the attempt after a near miss fits

    def __init__(self, cfg: Config, code_bytes: int, weights: int):
        self.cfg = cfg
        self.weights = weights
        taken = cfg.artifact_margin + code_bytes
        self.room = cfg.artifact_cap - taken
        # RATE_DISTORTION's own budget is the whole cap; the published rule's is what its settings give.
        self.saved = 8 * taken / weights if cfg.rate_distortion else 0.0
        self.sizes = [math.inf]  # of each attempt; before the first, nothing fits
        self.best = b""  # the largest model.bin that fits; empty on ranks that do not write

    def propose(self) -> float:
        """Bits to save per weight in the next attempt."""
        require(
            len(self.sizes) <= self.ATTEMPTS,
            f"ARTIFACT_CAP={self.cfg.artifact_cap}: the model does not fit with any step; "
            "shrink the model or raise the cap",
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
        """Whether the last attempt fits and another is not worth its time."""
        size = self.sizes[-1]
        if size > self.room:
            return False  # only a file that fits ends the search
        return (
            not self.cfg.rate_distortion  # the published rule has sizes of its own: it is only widened until it fits
            or self.room - size < self.room / 1000  # the room is used
            or len(self.sizes) > 4  # after four attempts: every one costs training time
            or abs(size - self.sizes[-2]) < self.room / 10000  # nothing gains: the steps are as fine as symbols allow
        )


def search_rate(run: Run, model: GPT, code_bytes: int) -> bytes:
    """Calibrate, then quantise and encode until RateSearch is content; the bytes of model.bin on rank 0."""
    cfg = run.cfg
    search = RateSearch(cfg, code_bytes, parameter_count(model))
    with run.phases("calibrate"):
        hessians = collect_hessians(model, TrainStream(cfg), cfg, run.ranks)
    with run.phases("quantize"):
        quantizer = Quantizer(model, hessians, cfg, run.ranks)
    logit_values = None
    while True:
        with run.phases("quantize"):
            quantized = quantizer.quantize(search.propose())
            if cfg.logit_calibration_enabled and logit_values is None:  # fitted to the first attempt, and kept
                rounded = run.new_model()
                load_state(rounded, quantized.state(), run.folder)
                logit_values = fit_logit_calibration(rounded, TrainStream(cfg), cfg, run.ranks)
            quantized = quantized._replace(logit_calibration=logit_values)
        with run.phases("write"):
            data = encode_artifact(flatten(quantized), run.origin()) if run.ranks.main else b""
            size = int(run.ranks.agree(len(data)))
        run.log(f"attempt {len(search.sizes)}: model.bin of {size:,} bytes, {search.room - size:,} left")
        search.observe(data, size)
        if search.done():
            return search.best
        # Encoding that only steers the search is part of it: training time.
        run.phases.seconds["quantize"] += run.phases.seconds.pop("write")


def write_artifact(run: Run, model: GPT):
    """Calibrate, quantise, and write model.bin and the packed train_gpt.py. Step sizes widen until the two fit under
    the cap; with RATE_DISTORTION they also narrow, until a thousandth of it is left or nothing gains."""
    packed = pack_script(SOURCE)
    data = search_rate(run, model, len(packed))
    contents = {"model.bin": data, "train_gpt.py": packed}
    with run.phases("write"):
        if run.ranks.main:
            for name, content in contents.items():
                with whole_file(run.folder / name) as f:
                    f.write(content)
            run.result["artifact_sha256"] = {name: sha256(content) for name, content in contents.items()}
            (run.folder / "eval_result.json").unlink(missing_ok=True)  # of the artifact before
    run.ranks.agree(0)  # the files are there before another rank reads them
    seconds = (f"{name} {run.phases.seconds[name]:.1f}" for name in ("calibrate", "quantize", "write"))
    run.log(f"seconds: {', '.join(seconds)}")


def check_hashes(run: Run):
    """What is scored is what this run wrote, the same on every rank; result.json names it by its SHA-256."""
    paths = [run.folder / name for name in ("train_gpt.py", "model.bin")]
    found = {path.name: sha256(path.read_bytes()) for path in paths if path.is_file()}
    expected = run.result.setdefault("artifact_sha256", found)  # a run that only scores expects what it finds
    start = int(found["model.bin"][:12], 16)  # 48 bits, which agree() sends exactly
    require(
        found == expected and start == run.ranks.agree(start),
        f"{run.folder}: another run has written to it meanwhile; give each an ARTIFACT_DIR of its own and run again",
    )


def load_quantized(run: Run) -> tuple[GPT, dict]:
    """A model with the weights of model.bin, and what the file says of its origin."""
    device = run.ranks.device
    path = run.folder / "model.bin"
    arrays, meta = load_artifact(path, run.cfg.artifact_cap)
    check_hashes(run)
    with torch.device("meta"):  # of no memory: the settings may ask for any
        wanted = parameter_count(GPT(run.cfg, run.attention_backend, torch.float32))
    held = sum(a.size for a in arrays.values())
    require(wanted <= held, f"{path}: holds {held:,} values, its settings ask for {wanted:,}; write it anew")
    with explained(UNDECODABLE.format(path), Exception), np.errstate(over="raise", invalid="raise"):
        quantized = unflatten(arrays)
        state = quantized.state()
        if flatten(quantized).keys() != arrays.keys():
            raise ValueError("names of no array of a model")
    calibration = None
    if quantized.logit_calibration is not None:
        values = torch.from_numpy(quantized.logit_calibration).to(device)
        sound = values.shape == (1 + LOGIT_CATEGORIES,) and values.isfinite().all()
        require(sound, f"{path}: its logit calibration is not {1 + LOGIT_CATEGORIES} finite numbers; write it anew")
        calibration = to_logit_calibration(values, piece_features(run.cfg).to(device))
    model = run.new_model(calibration)
    load_state(model, state, path)
    return model, meta


def score_artifact(run: Run):
    """Load model.bin from disk and score it; the number comes from what ships."""
    cfg = run.cfg
    with run.phases("load"):
        model, meta = load_quantized(run)
    stored = meta["settings"]
    changed = dict(cfg.settings().items() - still_set(stored).items())
    changed.pop("max_wallclock_seconds", None)  # another budget changes no score
    others = [name.upper() for name in sorted(changed)]
    if not same_data(run, run.folder / "model.bin", meta) and cfg.ttt_eval_only:
        others.append("TOKENIZER_PATH (unknown)")
    if others:
        run.verdicts.set("C4", "DISPUTED", f"scored with settings other than the artifact's: {', '.join(others)}")
    scoring = run.scoring(model, "quantized")
    if stored.get("prequant_ttt_enabled"):
        reason = "PREQUANT_TTT_ENABLED=1: the weights learnt from every validation target before it was scored"
        scoring.ledger.break_condition("C3", reason)
    sizes = [len(run.val.starts)]
    if cfg.ttt_enabled or cfg.ngram_enabled:
        before = run.phases.seconds["diagnostic"]
        run.diagnose(model, "quantized")
        scoring = run.scoring(model, "adapted")
        with run.phases("prepare"):
            adaptation = TestTimeTraining(scoring)
            estimated = adaptation.measure(run.phases.seconds["diagnostic"] - before)
        if cfg.max_wallclock_seconds:
            adaptation.check_time(cfg.max_wallclock_seconds - run.phases.budget("eval"))
        with run.phases("adapt"):
            bpb = adaptation.score()
        run.result["adapt_seconds"] = {"estimated": estimated, "measured": run.phases.seconds["adapt"]}
        sizes = adaptation.sizes
    else:
        with run.phases("score"):
            bpb = score_stream(scoring)
    run.record(scoring.ledger.name, bpb)
    run.result["segments"] = sizes  # what the audit may hold us to: documents of a segment are independent
    if cfg.ledger_path and run.ranks.main:
        with whole_file(Path(cfg.ledger_path), "LEDGER_PATH") as f:
            np.save(f, scoring.ledger.nats)


def finish(run: Run):
    """Verdicts, result.json and the final table."""
    cfg = run.cfg
    result = run.result
    paths = {"code": run.folder / "train_gpt.py", "model": run.folder / "model.bin"}
    sizes = {name: path.stat().st_size for name, path in paths.items() if path.exists()}
    total = sum(sizes.values())
    run.verdicts.judge("bytes", total <= cfg.artifact_cap, f"{total:,} of {cfg.artifact_cap:,} bytes")
    if run.training_hashes:
        run.training_hashes.judge(run.verdicts)
    budgets = {which: run.phases.budget(which) for which in ("train", "eval")}
    limit = cfg.max_wallclock_seconds
    for which, spent in budgets.items():
        if limit and spent:  # an artifact that is scored again has spent nothing on training
            run.verdicts.judge(f"{which}_budget", spent < limit, f"{spent:.1f} of {limit:.0f} s")
    result["bytes"] = sizes | {"total": total}
    result["seconds"] = budgets | run.phases.seconds
    failed = run.verdicts.failed()
    outcome = f"no val_bpb: {', '.join(failed)} failed"
    if "train_budget" in failed:
        outcome += "; a larger GPTQ_RESERVE_SECONDS ends the steps earlier"
    if not failed:  # the one place that makes a number the result
        result["val_bpb"] = run.headline
        outcome = f"val_bpb {run.headline:.6f} on all {run.val.targets:,} targets, dataset {result['dataset']}"
    table = run.verdicts.table
    result["verdicts"] = {name: {"verdict": verdict, "reason": reason} for name, (verdict, reason) in table.items()}
    if run.ranks.main:
        name = "eval_result.json" if cfg.ttt_eval_only else "result.json"
        with whole_file(run.output / name, run.place) as f:
            f.write(json.dumps(result, indent=1).encode())
    for unit, form in (("BPB", ".6f"), ("bytes", ","), ("seconds", ".1f")):
        for name, value in result[unit.lower()].items():
            run.log(f"  {f'{name} {unit}':24s} {value:{form}}")
    for condition, (verdict, reason) in table.items():
        run.log(f"  {condition:24s} {verdict:9s} {reason}")
    run.log(outcome)
    folder = run.output
    run.log(f"files are in {folder}")
    if not cfg.ttt_eval_only:
        run.log(f"next: python tools/report.py {folder}; python tools/audit.py {folder} --data {cfg.data_path}")
        run.log(f"to score it again: TTT_EVAL_ONLY=1 ARTIFACT_DIR={folder} python train_gpt.py")


def configure(env) -> Config:
    """Settings from the environment. Where a run continues from a file, the file's settings are the defaults."""
    cfg = Config.from_env(env)
    if cfg.ttt_eval_only:
        path = artifact_folder(cfg) / "model.bin"
        meta = read_artifact(path, cfg.artifact_cap)[0].get("meta")
    elif cfg.quantize_only:
        path = artifact_folder(cfg) / "trained.npz"
        meta = read_trained(path)[1]
    else:
        return cfg
    with explained(f"{path}: holds no settings; use one that this script wrote", Exception):
        # A retired setting with the value that is fixed now is as good as absent; with another the script differs.
        stored = still_set(meta["settings"])
    usual = Config().settings()
    others = ", ".join(sorted(set(stored) ^ set(usual)))
    require(
        not others,
        f"{path}: written by a script with other settings than this one's ({others:.400}); "
        "use the train_gpt.py that was packed with it",
    )
    for name, value in usual.items():
        odd = type(stored[name]) is not type(value)
        require(not odd, f"{path}: holds {name.upper()}={stored[name]!r:.40}, no {type(value).__name__}; write it anew")
    if cfg.ttt_eval_only:  # a file does not decide how large it may be
        stored["artifact_cap"] = min(stored["artifact_cap"], cfg.artifact_cap)
    return Config.from_env(env, stored)


def produce_artifact(run: Run):
    """Trained weights -> train_gpt.py and model.bin."""
    model = run.new_model()
    if run.cfg.quantize_only:
        load_trained(run, model)
    else:
        train(run, model)
    run.diagnose(model, "trained")
    if run.cfg.prequant_ttt_enabled:  # scoring the artifact keeps its number out of val_bpb
        with run.phases("prequant"):
            train_on_validation_set(run.scoring(model, "prequant"))
        run.diagnose(model, "prequant")
    write_artifact(run, model)


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM, by number, raised where the run is, so that half-written files are removed."""

    line = "interrupted while starting"


def interrupt(number: int, frame):
    """Raise Interrupted once: launchers send more signals meanwhile."""
    on_signals(signal.SIG_IGN)
    raise Interrupted(number)


def execute(cfg: Config):
    """One mode from beginning to end."""
    on_signals(interrupt)
    with claimed(output_folder(cfg)) if cfg.rank == 0 else contextlib.nullcontext():
        run = Run(cfg)
        try:
            run.prepare()
            preflight(run)
            if cfg.check_only:
                wait_for_hashes(run)
                return
            # A run continued from trained.npz continues the log, too.
            name = "eval.log" if cfg.ttt_eval_only else "train.log"
            run.log.open(run.output / name, "a" if cfg.quantize_only else "w")
            if not cfg.ttt_eval_only:
                produce_artifact(run)
            score_artifact(run)
            finish(run)
        except Interrupted as e:
            e.line = run.interrupted()
            raise
        finally:
            if sys.stdout.isatty():
                say("\033[K", end="")  # what a fleeting line would leave beside an error
            run.ranks.close()


def main(argv: list[str]) -> int:
    """Exit status: 0, 2 after one line about bad input, 130 after Ctrl-C, 143 after SIGTERM."""
    try:
        if argv in (["--help"], ["-h"]):
            say(f"{__doc__ or ''}\n{help_text()}")
        elif len(argv) == 2 and argv[0] == "--unpack":
            say(unpack_script(Path(argv[1])), end="")
        else:
            require(not argv, f"{' '.join(argv)}: not an option; settings are environment variables (--help)")
            execute(configure(os.environ))
        return 0
    except Interrupted as e:
        if e.line:
            print(e.line, file=sys.stderr)
        return 128 + e.args[0]
    except UserError as e:
        fault = str(e)
    except OSError as e:
        fault = f"{e.filename or 'a file'}: {e.strerror or e}; free space there or name another folder"
    except (MemoryError, torch.OutOfMemoryError):
        fault = "out of memory; lower MICRO_BATCH_TOKENS, VAL_BATCH_TOKENS or TTT_BATCH_SIZE"
    print(f"error: {fault}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
