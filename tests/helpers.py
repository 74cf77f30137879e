"""Tiny models, tiny data and runners shared by the tests. Importing this makes `train_gpt` importable from the
repository's root."""

import atexit
import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch._dynamo  # noqa: F401  (2 s that forked children would each spend)

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import train_gpt  # noqa: E402

torch.set_num_threads(1)

BOS, VOCAB = 1, 320
CPU = torch.device("cpu")
# A model of about 50k parameters in which everything is on: loops, two lanes, skips, gates, grouped heads, XSA and
# windows on some layers only.
TINY = dict(
    vocab_size=VOCAB,
    model_dim=32,
    num_layers=5,
    num_heads=4,
    num_kv_heads=2,
    mlp_mult=2.0,
    rope_dims=4,
    loop_start=1,
    loop_end=2,
    num_loops=1,
    parallel_start_layer=4,
    attn_window=7,
    attn_full_layers="1,4",
)
# Training that takes a second: the last micro-batch of a step is not full, documents are longer than the span, and the
# loops switch on halfway.
RUN = dict(
    TINY,
    train_batch_tokens=500,
    micro_batch_tokens=128,
    train_seq_len=48,
    eval_seq_len=48,
    val_batch_tokens=256,
    iterations=10,
    max_wallclock_seconds=0,
    warmup_steps=1,
    train_log_every=1,
    gptq_calibration_batches=5,
    muon_momentum_warmup_steps=6,
    ema_decay=0.8,
)
WORDS = (
    "the of and river stone walked quietly home again said nothing blue fire 1984 École naïve 北京 don't stop, ok. "
    "(maybe) x=1; 🙂 zebra under over light"
).split()


def config(base: dict = TINY, **overrides) -> "train_gpt.Config":
    cfg = dataclasses.replace(train_gpt.Config(), **{**base, **overrides})
    cfg.validate()
    return cfg


def ranks(cfg=None) -> "train_gpt.Ranks":
    return train_gpt.Ranks(cfg or config())


class Silent(train_gpt.Log):
    """A log that keeps its lines."""

    def __init__(self):
        self.lines = []

    def __call__(self, line: str = "", fleeting: bool = False):
        self.lines.append(line)


def scoring_pass(model, cfg, group, stream, ledger) -> "train_gpt.ScoringPass":
    """A pass over the stream whose log is silent."""
    log = Silent()
    return train_gpt.ScoringPass(model, cfg, group, log, stream, ledger, train_gpt.Progress())


def randomize(model, seed: int = 0):
    """Non-trivial values in every parameter: gates, lambdas, mixes and skips included."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=g)
            if p.ndim == 3 and name in ("qkv", "o", "up", "down"):
                p.copy_(noise * 1.3 / p.size(-1) ** 0.5)
            elif name in (
                "attn_scale",
                "mlp_scale",
                "resid_mix",
                "skip_weights",
                "parallel_post",
                "parallel_resid",
                "q_gain",
            ):
                p.copy_(1 + 0.4 * noise)
            else:
                p.copy_(0.7 * noise)
    return model


def gpt(cfg=None, seed: int = 0):
    return randomize(train_gpt.GPT(cfg or config(), "reference", torch.float32), seed)


def packed_seq(lengths, maximum: int | None = None) -> "train_gpt.Seq":
    """Seq of whole documents of the given lengths, one after the other."""
    cu = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    positions = torch.cat([torch.arange(n, dtype=torch.int32) for n in lengths])
    longest = maximum or max(lengths)
    return train_gpt.Seq(cu, cu, longest, longest, positions)


def random_documents(lengths, vocab: int = VOCAB, seed: int = 0) -> list[np.ndarray]:
    """Documents of random tokens that begin with BOS and hold no other."""
    rng = np.random.default_rng(seed)
    return [np.concatenate([[BOS], rng.integers(2, vocab, n - 1)]).astype(np.int64) for n in lengths]


class Stream:
    """A validation stream in memory."""

    def __init__(self, documents):
        self.tokens = np.concatenate(documents).astype(np.uint16)
        self.starts = np.cumsum([0, *(len(d) for d in documents[:-1])])
        self.targets = len(self.tokens) - 1
        self.lengths = np.diff([*self.starts, self.targets])
        self.target_bytes = np.where(self.tokens == BOS, 0, self.tokens % 5 + 1).astype(np.uint16)[1:]

    def ledger(self) -> "train_gpt.Ledger":
        return train_gpt.Ledger("test", self.target_bytes, train_gpt.Verdicts())

    def of(self, i: int) -> slice:
        """Targets that the tokens of document i predict."""
        return slice(int(self.starts[i]), int([*self.starts[1:], self.targets][i]))


def network(cfg):
    """Random weights in every parameter; a small embedding, so that logits stay off the softcap and float noise stays
    small."""
    model = gpt(cfg)
    with torch.no_grad():
        model.tok_emb.mul_(0.2)
    return model


# ---- data on disk ----


def write_shard(path: Path, values, magic: int = 20240520, version: int = 1, count: int | None = None) -> Path:
    """256 little-endian int32 ([magic, version, count, 0, ...]) and uint16 values."""
    values = np.asarray(values, dtype="<u2")
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, len(values) if count is None else count
    path.write_bytes(header.tobytes() + values.tobytes())
    return path


@functools.cache
def scratch() -> Path:
    """A folder that is gone when the tests end."""
    path = Path(tempfile.mkdtemp(prefix="golf_tests_"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


def sentence(rng: random.Random, words: int) -> str:
    return " ".join(rng.choices(WORDS, k=words))


@functools.cache
def tokenizer(lines: tuple[str, ...] = (), **options) -> Path:
    """A SentencePiece model of VOCAB pieces with byte fallback and no normalisation, so that bytes can be counted
    exactly."""
    import sentencepiece

    rng = random.Random(1)
    lines = lines or [sentence(rng, 20) for _ in range(300)]
    settings = dict(
        model_type="bpe",
        vocab_size=VOCAB,
        byte_fallback=True,
        character_coverage=0.995,
        normalization_rule_name="identity",
        unk_id=3,
        bos_id=1,
        eos_id=2,
        pad_id=0,
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=2,
    )
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=out, **{**settings, **options})
    path = scratch() / f"tokenizer_{hashlib.sha256(out.getvalue()).hexdigest()[:8]}.model"
    path.write_bytes(out.getvalue())
    return path


@functools.cache
def processor(model: Path):
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_file=str(model))


def encode(text: str, model: Path | None = None) -> tuple[list[int], list[int]]:
    """Tokens of a document with BOS, and the bytes of the text that each stands for, from SentencePiece's own
    surfaces."""
    sp = processor(model or tokenizer())
    if hasattr(sp, "encode_as_offset_mapping"):  # sentencepiece 0.2.2 and later
        pieces = sp.encode_as_offset_mapping(text)
        ids, surfaces = pieces["ids"], [text[start:end] for start, end in pieces["offsets"]]
    else:
        pieces = sp.encode_as_immutable_proto(text).pieces
        ids, surfaces = [p.id for p in pieces], [p.surface for p in pieces]
    return [BOS, *ids], [0, *(len(s.encode()) for s in surfaces)]


def write_data(
    folder: Path,
    train_documents: int = 150,
    val_words=(0, 1, 40, 3, 90, 12, 0, 25, 2, 60),
    seed: int = 0,
    sidecar: bool = True,
) -> Path:
    """A data folder as prepare_data.py leaves it: two train shards with a document across their joint, two validation
    shards, sidecar, manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    split = lambda sizes: tuple(zip(*(encode(sentence(rng, n)) for n in sizes)))
    val_tokens, val_bytes = split(val_words)
    train_tokens, train_bytes = split([rng.randrange(1, 60) for _ in range(train_documents)])
    model = folder / "tokenizer.model"
    shutil.copy(tokenizer(), model)
    files, flat = {}, lambda lists: np.concatenate([np.array(x, np.int64) for x in lists])
    streams = {"fineweb_train": flat(train_tokens), "fineweb_val": flat(val_tokens)}
    if sidecar:
        streams["fineweb_val_bytes"] = flat(val_bytes)
    for name, values in streams.items():
        half = len(values) // 2
        for i, part in enumerate((values[:half], values[half:])):
            path = write_shard(folder / f"{name}_{i:06d}.bin", part)
            files[path.name] = {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "tokens": len(part)}
    counts = lambda tokens, size, first: {
        "first_document": first,
        "documents": len(tokens),
        "tokens": len(flat(tokens)),
        "bos": len(tokens),
        "bytes": int(flat(size).sum()),
        "utf8_bytes": int(flat(size).sum()),
    }
    digest = hashlib.sha256(model.read_bytes()).hexdigest()
    manifest = {
        "format": 1,
        "source": {"kind": "test"},
        "transform": "none",
        "vocab_size": VOCAB,
        "bos_id": BOS,
        "tokenizer": {"file": model.name, "sha256": digest},
        "train": counts(train_tokens, train_bytes, len(val_tokens)),
        "val": counts(val_tokens, val_bytes, 0),
        "files": files,
        "options": {"val_docs": len(val_tokens)},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@functools.cache
def data() -> Path:
    """The data folder most tests share; copy it before changing anything in it."""
    return write_data(scratch() / "data")


def own_data(folder: Path) -> Path:
    """A copy of the shared data folder that a test may damage."""
    return Path(shutil.copytree(data(), folder))


# ---- runs ----


def environment(settings: dict, artifact: Path | None = None, data_path: Path | None = None) -> dict[str, str]:
    """Settings in lower case -> environment variables, for a CPU run on one thread."""
    paths = {"data_path": data_path or data(), **({"artifact_dir": artifact} if artifact else {})}
    text = lambda v: str(int(v)) if isinstance(v, bool) else str(v)
    return {name.upper(): text(value) for name, value in {"device": "cpu", **paths, **settings}.items()}


@contextlib.contextmanager
def replaced_environ(env: dict[str, str]):
    """os.environ with exactly our settings: whatever the caller has exported is hidden for the while."""
    kept = dict(os.environ)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    names = {f.name.upper() for f in dataclasses.fields(train_gpt.Config)}
    try:
        for name in [n for n in os.environ if n in names or n.startswith(train_gpt.OUR_PREFIXES)]:
            del os.environ[name]
        os.environ.update(env)
        yield
    finally:
        os.environ.clear()
        os.environ.update(kept)
        for number, handler in handlers.items():
            signal.signal(number, handler)


class Outcome:
    """Exit status and both outputs of a run."""

    def __init__(self, code: int, out: str, err: str):
        self.code, self.out, self.err = code, out, err

    def ok(self) -> "Outcome":
        assert self.code == 0, f"exit status {self.code}\n{self.out[-3000:]}\n{self.err[-3000:]}"
        return self


def main(settings: dict, artifact: Path | None = None, data_path: Path | None = None, argv=()) -> Outcome:
    """train_gpt.main in this process: as the command line would run it, without the seconds to start an interpreter. A
    traceback is an exception here."""
    out, err = io.StringIO(), io.StringIO()
    with (
        replaced_environ(environment(settings, artifact, data_path)),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        code = train_gpt.main(list(argv))
    return Outcome(code, out.getvalue(), err.getvalue())


def clean_environ(env: dict[str, str]) -> dict[str, str]:
    keep = {k: v for k, v in os.environ.items() if k in ("PATH", "HOME", "TMPDIR", "LD_LIBRARY_PATH", "SYSTEMROOT")}
    return {**keep, "OMP_NUM_THREADS": "1", **env}


def command(world: int, script: Path, *args) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"] if world > 1 else []
    return [sys.executable, *launcher, str(script), *args]


def start(
    settings: dict,
    artifact: Path | None = None,
    *args,
    world: int = 1,
    script: Path = ROOT / "train_gpt.py",
    cwd: Path | None = None,
    data_path: Path | None = None,
) -> subprocess.Popen:
    """A run in processes of its own; more than one rank goes through torchrun."""
    return subprocess.Popen(
        command(world, script, *args),
        env=clean_environ(environment(settings, artifact, data_path)),
        cwd=cwd or ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def spawn(settings: dict, artifact: Path | None = None, *args, timeout: float = 180, **options) -> Outcome:
    process = start(settings, artifact, *args, **options)
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return Outcome(process.returncode, out, err)


def forked(function, world: int, *args):
    """function(rank, world, *args) in `world` forked processes that can form a process group: no interpreter has to
    start. Any failure fails the test."""
    port, context = free_port(), multiprocessing.get_context("fork")

    def body(rank: int):
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
        )
        function(rank, world, *args)

    processes = [context.Process(target=body, args=(rank,)) for rank in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    alive = [process.kill() for process in processes if process.is_alive()]
    assert not alive, "a rank hangs"
    assert [process.exitcode for process in processes] == [0] * world


def result(folder: Path, name: str = "result.json") -> dict:
    return json.loads((folder / name).read_text())


@functools.cache
def base_run() -> Path:
    """Artifact folder of the tiny run that most tests look at; never written to again."""
    folder = scratch() / "base"
    main({**RUN, "ledger_path": scratch() / "base_ledger.npy"}, folder).ok()
    return folder


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def batches_of_step(cfg, step: int = 0, data_path: Path | None = None) -> list:
    """All micro-batches of a training step, as one rank sees them."""
    stream = train_gpt.TrainStream(dataclasses.replace(cfg, data_path=str(data_path or data())))
    return [train_gpt.to_device(batch, CPU) for batch in stream.step(step, cfg.train_seq_len, 0, 1)]
