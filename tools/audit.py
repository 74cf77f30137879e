"""Audit an artifact folder as a black box: conditions C1-C4, bytes, data, budgets, packaging and evidence.

    python tools/audit.py runs/demo --data data/demo                       every check that the folder allows
    python tools/audit.py runs/1337 --data data/caseops --device cuda      on one GPU
    python tools/audit.py runs/1337 --seeds runs/42 runs/314 --baseline 1.0611,1.0608,1.0614
    python tools/audit.py runs/demo --data data/demo --only sum_to_one_64 future

Wanted of the folder: train_gpt.py and model.bin; beside them, where they exist, result.json, *.log, README.md and submission.json are checked too. Run alone with
TTT_EVAL_ONLY=1, DATA_PATH and LEDGER_PATH, train_gpt.py must score the fineweb_val_*.bin of that folder, write the nats of every target to LEDGER_PATH (float64 .npy, stream
order) and eval_result.json (bpb, settings; `segments` where state crosses documents) beside itself. The auditor tampers with the validation data and compares ledgers.

Verdicts: PASS, FAIL, DISPUTED (people disagree, or the artifact does not declare enough), NOT RUN. Exit status: 1 with a FAIL, else 0. audit.json in the folder holds
all of it, bound to the SHA-256 of both files. A PASS says what these experiments showed on this machine, and no more.
"""

import argparse
import ast
import base64
import collections
import contextlib
import hashlib
import json
import lzma
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import unicodedata
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

CAP, BUDGET_SECONDS = 16_000_000, 600
PASS, FAIL, DISPUTED, NOT_RUN = "PASS", "FAIL", "DISPUTED", "NOT RUN"
PREFIXES = (64, 300, 1000)
SUM_TOLERANCE = {"cpu": 1e-4, "cuda": 1e-3}
LENGTH_TOLERANCE = 1e-5  # nats: other batch shapes round differently
WORLD_TOLERANCE = 1e-5  # BPB
# trust.md A6: validation tokens -> bytes of the known public exports (none where no exact count is published)
KNOWN = {
    62_021_632: (),
    63_779_840: (),
    40_540_160: (151_078_222, 151_080_891),
    40_548_352: (),
    40_546_304: (),
    40_542_208: (),
    40_538_112: (),
    47_853_344: (151_074_309, 151_080_645),
    45_508_608: (),
    45_514_752: (),
}
ALARMS = {
    9_662_464: "the 10,000-document CaseOps set (#1854)",
    9_661_440: "the 10,000-document CaseOps set, trimmed (#1854)",
    36_562_944: "a broken parallel preparation (#2109)",
    36_335_616: "casefolded text under the plain name (#1670)",
}
ALARM_TRAIN_SHARDS = {1499, 1502, 1600, 488}  # local preparations with validation documents in training (#2130)
# Which checks each condition of result.json's verdicts rests on; sum_to_one stands for every prefix length.
CONDITIONS = {
    "C1": ("sum_to_one", "future", "tail", "documents", "lengths"),
    "C2": ("sum_to_one",),
    "C3": ("future", "tail", "training"),
    "C4": ("ledger", "worlds", "reload"),
    "bytes": ("size",),
    "train_budget": ("budget",),
    "eval_budget": ("budget",),
    "packaging": ("reload", "pack", "source", "settings"),
    "data": ("stream", "bytes", "identity", "disjoint"),
}


class NotRun(Exception):
    """What a check needs is not there; the message says what."""


class Broken(Exception):
    """The artifact did not do what the file contract asks; the check that ran it fails with this message."""


# ---------------------------------------------------------------- validation data


@dataclass
class Dataset:
    """A validation stream: uint16 tokens and the bytes of each (None without a sidecar)."""

    tokens: np.ndarray
    sizes: np.ndarray | None
    bos: int
    folder: Path  # training shards, tokenizer and manifest lie here

    @property
    def starts(self) -> np.ndarray:
        return np.flatnonzero(self.tokens == self.bos)

    def documents(self) -> list[tuple[int, int]]:
        return list(pairwise([*self.starts.tolist(), len(self.tokens)]))

    def with_tokens(self, tokens: np.ndarray) -> "Dataset":
        """Other tokens at the same places; BOS has no bytes."""
        return Dataset(
            tokens, None if self.sizes is None else np.where(tokens == self.bos, 0, self.sizes), self.bos, self.folder
        )

    def of_documents(self, pieces: list[tuple[int, int]]) -> "Dataset":
        """The stream of the given stretches of this one, each beginning with BOS."""
        at = np.concatenate([np.arange(*piece) for piece in pieces])
        return Dataset(self.tokens[at], None if self.sizes is None else self.sizes[at], self.bos, self.folder)

    def write(self, folder: Path) -> Path:
        """A data folder without a manifest: this stream, and links to the training shards and the tokenizer."""
        folder.mkdir(parents=True)
        for path in (*shard_paths(self.folder, "train"), *self.folder.glob("*.model")):
            (folder / path.name).symlink_to(path.resolve())
        for name, values in (("val", self.tokens), ("val_bytes", self.sizes)):
            if values is not None:
                header = np.zeros(256, "<i4")
                header[:3] = 20240520, 1, len(values)
                (folder / f"fineweb_{name}_000000.bin").write_bytes(header.tobytes() + values.astype("<u2").tobytes())
        return folder


def shard_paths(folder: Path, split: str) -> list[Path]:
    """Shards of one split in name order; val never takes val_bytes."""
    return sorted(
        path for path in folder.glob("fineweb_*.bin") if re.fullmatch(rf"fineweb_{split}_\d+\.bin", path.name)
    )


def read_shard(path: Path) -> np.ndarray:
    header = np.fromfile(path, "<i4", 256)
    if len(header) < 256 or (header[0], header[1]) != (20240520, 1) or path.stat().st_size != 1024 + 2 * int(header[2]):
        raise Broken(f"{path.name}: not a shard, or truncated")
    return np.memmap(path, "<u2", "r", 1024, (int(header[2]),))


def load_dataset(folder: Path) -> Dataset:
    paths, sidecars = shard_paths(folder, "val"), shard_paths(folder, "val_bytes")
    if not paths:
        raise NotRun(f"{folder}: no fineweb_val_*.bin there")
    manifest = json.loads((folder / "manifest.json").read_text()) if (folder / "manifest.json").is_file() else {}
    tokens = np.concatenate([read_shard(p) for p in paths])
    return Dataset(
        tokens,
        np.concatenate([read_shard(p) for p in sidecars]) if sidecars else None,
        manifest.get("bos_id", 1),
        folder,
    )


def document_hashes(shards: list[np.ndarray], bos: int):
    """(hash, tokens) of every document, BOS excluded; a document may continue in the next shard."""
    rest = np.zeros(0, "<u2")
    for shard in shards:
        tokens = np.concatenate([rest, shard])
        starts = np.flatnonzero(tokens == bos)
        for start, end in pairwise(starts):
            yield hashlib.blake2b(tokens[start + 1 : end], digest_size=16).digest(), end - start - 1
        rest = tokens[starts[-1] :] if len(starts) else tokens
    yield hashlib.blake2b(rest[1:], digest_size=16).digest(), len(rest) - 1


# ---------------------------------------------------------------- running the artifact


class Scored(NamedTuple):
    nats: np.ndarray  # float64 (targets,)
    result: dict  # eval_result.json


class Launched(NamedTuple):
    code: int
    output: str


def launch(folder: Path, env: dict[str, str], world: int, blocked: bool, timeout: float) -> Launched:
    """`python train_gpt.py` in ``folder``; blocked: no network and, on a CPU, no program on the path."""
    command = [
        sys.executable,
        *(["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"] if world > 1 else []),
        "train_gpt.py",
    ]
    if blocked:
        env, command = without_network(folder, env, command)
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
        return Launched(process.returncode, output)
    except subprocess.TimeoutExpired:
        return Launched(124, f"still running after {timeout:.0f} s")
    finally:
        if process.poll() is None:  # every rank of it, also when the auditor is interrupted
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def last_words(output: str) -> str:
    """The last line that a rank wrote and, under torchrun, which rank failed first and how; torchrun's own report follows and hides both."""
    lines = [line.strip() for line in output.splitlines() if line.strip(" =-*")]
    report = next((i for i, line in enumerate(lines) if re.match(r"[EWI]\d{4} .*torch/distributed/", line)), len(lines))
    said = (lines[:report] or lines or ["no output"])[-1][:200]
    failed = re.search(r"\(exitcode: (-?\d+)\) local_rank: (\d+)", output)
    return f"rank {failed[2]} ended with {failed[1]}: {said}" if failed else said


def without_network(folder: Path, env: dict[str, str], command: list[str]) -> tuple[dict, list[str]]:
    """An empty network namespace where the machine allows one; else sockets that refuse to connect."""
    empty = folder.parent / (folder.name + "_path")
    empty.mkdir(exist_ok=True)
    env = {**env, **({"PATH": str(empty)} if env.get("DEVICE") != "cuda" else {})}
    unshare = shutil.which("unshare")
    if unshare and subprocess.run([unshare, "-rn", "true"], capture_output=True).returncode == 0:
        return env, [unshare, "-rn", *command]
    (empty / "sitecustomize.py").write_text(
        "import socket\ndef refuse(*_):\n    raise OSError('the auditor blocks the network')\n"
        "socket.socket.connect = socket.socket.connect_ex = refuse\n"
    )
    return {**env, "PYTHONPATH": str(empty)}, command


class Artifact:
    """train_gpt.py and model.bin of a folder, run in clean folders and clean processes."""

    def __init__(self, folder: Path, work: Path, device: str, timeout: float, launcher: Callable = launch):
        for name in ("train_gpt.py", "model.bin"):
            if not (folder / name).is_file():
                raise NotRun(f"{folder}: holds no {name}; give the folder of a finished run")
        self.folder, self.work, self.device, self.timeout, self.launcher = folder, work, device, timeout, launcher
        self.result = read_json(folder / "result.json")
        self.settings = self.result.get("settings", {})
        self.runs, self.lock = 0, threading.Lock()

    def environment(self, data: Path, env: dict) -> dict[str, str]:
        kept = {
            name: value
            for name, value in os.environ.items()
            if name in ("PATH", "TMPDIR", "LD_LIBRARY_PATH", "LANG", "ATTENTION", "FA3_LIBRARY")
            or name.startswith(("CUDA_", "NVIDIA_", "NCCL_"))
        }
        tokenizer = next(iter(sorted(data.glob("*.model"))), None)
        return {
            **kept,
            "HOME": str(self.work),
            "TRITON_CACHE_DIR": str(self.work / "triton"),
            "OMP_NUM_THREADS": "1",
            "DEVICE": self.device,
            "DATA_PATH": str(data),
            **({"TOKENIZER_PATH": str(tokenizer)} if tokenizer else {}),
            **{name: str(value) for name, value in env.items()},
        }

    def clean_folder(self, script: bytes | None = None, *names: str) -> Path:
        with self.lock:
            self.runs += 1
            folder = self.work / f"run{self.runs}"
        folder.mkdir()
        for name in names:
            shutil.copyfile(self.folder / name, folder / name)
        if script is not None:
            (folder / "train_gpt.py").write_bytes(script)
        return folder

    def run(self, folder: Path, env: dict[str, str], world: int = 1, blocked: bool = False):
        code, output = self.launcher(folder, env, world, blocked, self.timeout)
        if code != 0:
            raise Broken(f"exit status {code}: {last_words(output)}")

    def score(self, data: Dataset | Path, world: int = 1, env: dict | None = None, blocked: bool = False) -> Scored:
        """Score a validation stream; ``data`` is a folder that lies ready, or is written to one."""
        folder = self.clean_folder(None, "train_gpt.py", "model.bin")
        path = data if isinstance(data, Path) else data.write(folder.with_name(folder.name + "_data"))
        ledger = folder / "ledger.npy"
        self.run(
            folder,
            self.environment(path.resolve(), {"TTT_EVAL_ONLY": 1, "LEDGER_PATH": ledger, **(env or {})}),
            world,
            blocked,
        )
        if not ledger.is_file():
            raise Broken("no ledger at LEDGER_PATH")
        result = read_json(folder / "eval_result.json")
        if not result.get("bpb"):
            raise Broken("no eval_result.json with a bpb")
        return Scored(np.load(ledger, allow_pickle=False), result)

    def train(self, script: bytes, data: Dataset, env: dict) -> dict[str, bytes]:
        """The files of a short training with this script and this validation stream: {"train_gpt.py", "model.bin"}."""
        folder = self.clean_folder(script)
        out = folder.with_name(folder.name + "_out")
        path = data.write(folder.with_name(folder.name + "_data"))
        self.run(folder, self.environment(path, {**env, "ARTIFACT_DIR": out}))
        return {name: (out / name).read_bytes() for name in ("train_gpt.py", "model.bin")}


def read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise Broken(f"{path.name}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise Broken(f"{path.name}: not a JSON object")
    return value


def unpack(script: bytes) -> str:
    """The readable source of a script: itself, or the largest compressed string in it (latin-1, base85 or base64; LZMA or zlib), without running it."""
    try:
        text = script.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = script.decode("latin-1")
    strings = [
        n.value
        for n in ast.walk(ast.parse(text if not text.startswith("# coding") else text.split("\n", 1)[1]))
        if isinstance(n, ast.Constant)
    ]
    blobs = [
        b if isinstance(b, bytes) else b.encode("latin-1")
        for b in strings
        if isinstance(b, bytes) or (isinstance(b, str) and b and max(map(ord, b)) < 256)
    ]
    blob = max(blobs, key=len, default=b"")
    for decode in (bytes, base64.b85decode, base64.a85decode, base64.b64decode):
        for inflate in (
            lzma.decompress,
            zlib.decompress,
            lambda b: lzma.decompress(b, lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2, "preset": 9}]),
        ):
            with contextlib.suppress(Exception):
                return inflate(decode(blob)).decode("utf-8")
    if "exec(" in text and len(blob) > 0.5 * len(script):
        raise Broken("the source is hidden: its largest string is executed and is no LZMA or zlib stream")
    return text


# ---------------------------------------------------------------- the audit: what the checks share


class Audit:
    """One artifact, one data folder, and the runs that several checks look at."""

    def __init__(
        self,
        artifact: Artifact,
        data: Path | None,
        targets: int = 6000,
        seeds: tuple[Path, ...] = (),
        baseline: tuple[float, ...] = (),
    ):
        self.artifact, self.folder, self.data_path, self.targets = artifact, artifact.folder, data, targets
        self.seeds, self.baseline = seeds, baseline
        self.kept, self.locks, self.lock = {}, collections.defaultdict(threading.Lock), threading.Lock()

    def once(self, name: str, make: Callable):
        """make(), computed once for all the checks that ask."""
        with self.lock:
            lock = self.locks[name]
        with lock:
            if name not in self.kept:
                try:
                    self.kept[name] = make()
                except Exception as error:
                    self.kept[name] = error
        if isinstance(self.kept[name], Exception):
            raise self.kept[name]
        return self.kept[name]

    @property
    def data(self) -> Dataset:
        if self.data_path is None:
            raise NotRun("no --data")
        return self.once("data", lambda: load_dataset(self.data_path))

    @property
    def source(self) -> str:
        return self.once("source", lambda: unpack((self.folder / "train_gpt.py").read_bytes()))

    @property
    def excerpt(self) -> Dataset:
        """Whole documents from the start of the stream, the long ones cut short: about ``targets`` targets."""

        def cut():
            data, pieces, longest = self.data, [], self.targets // 4
            for start, end in data.documents():
                if end - start > 8:
                    pieces.append((start, min(end, start + longest)))
                if sum(b - a for a, b in pieces) > self.targets and len(pieces) > 5:
                    break
            if len(pieces) < 4:
                raise NotRun(f"{data.folder}: fewer than four documents to tamper with")
            return data.of_documents(pieces)

        return self.once("excerpt", cut)

    @property
    def base(self) -> Scored:
        return self.once("base", lambda: self.artifact.score(self.excerpt))

    @property
    def vocab(self) -> int:
        size = self.artifact.settings.get("vocab_size")
        if not size and self.data_path and (model := next(self.data_path.glob("*.model"), None)):
            import sentencepiece

            size = sentencepiece.SentencePieceProcessor(model_file=str(model)).vocab_size()
        return size or int(self.data.tokens.max()) + 1

    @property
    def tolerance(self) -> float:
        """Nats within which two scores of the same thing agree: none on a CPU; on a GPU, four times what a second identical run differs by."""
        if self.artifact.device == "cpu":
            return 0.0
        again = self.once("again", lambda: self.artifact.score(self.excerpt))
        return 4 * float(np.abs(again.nats - self.base.nats).max()) + 1e-6

    def replaced(self, data: Dataset, places: np.ndarray, seed: int = 0) -> Dataset:
        """Other tokens at ``places`` (BOS stays), drawn from those that the validation set holds."""
        pool = np.unique(self.data.tokens[:1_000_000])
        pool = pool[pool != data.bos]
        rank = np.searchsorted(pool, data.tokens[places])
        other = pool[(rank + np.random.default_rng(seed).integers(1, len(pool), len(places))) % len(pool)]
        tokens = data.tokens.copy()
        tokens[places] = np.where(tokens[places] == data.bos, data.bos, other)
        return data.with_tokens(tokens)

    def segment(self) -> tuple[int, int, bool]:
        """Documents first..last of the excerpt's largest declared segment, and whether segments are declared at all (else the first document alone)."""
        count, segments = len(self.excerpt.starts), self.base.result.get("segments")
        if segments is None:
            return 0, 1, False
        if sum(segments) != count or min(segments) < 1:
            raise Broken(f"declares segments of {segments} documents for {count} documents")
        largest = int(np.argmax(segments))
        return sum(segments[:largest]), sum(segments[: largest + 1]), True


def moved(a: np.ndarray, b: np.ndarray, tolerance: float) -> np.ndarray:
    """Indices at which two ledgers differ."""
    return np.flatnonzero(~(np.abs(a - b) <= tolerance))


CHECKS: dict[str, Callable[[Audit], tuple[str, str]]] = {}


def check(function: Callable) -> Callable:
    CHECKS[function.__name__.rstrip("_")] = function
    return function


def verdict_of(faults: list[str], good: str, doubts: list[str] | None = None) -> tuple[str, str]:
    """FAIL with the faults, else DISPUTED with the doubts, else PASS with what was found."""
    if faults:
        return FAIL, "; ".join(faults)
    return (DISPUTED, "; ".join(doubts)) if doubts else (PASS, good)


# ---------------------------------------------------------------- conditions C1-C4: the scorer as a black box


def telling_prefix(a: Audit, length: int) -> np.ndarray:
    """About ``length`` tokens of validation text behind BOS, ending where the longest run of tokens occurs a second time: there the hints of an n-gram model fire."""
    text = a.data.tokens[a.data.tokens != a.data.bos][:length].astype(np.int64)
    if len(text) < length // 2:
        raise NotRun(f"the validation set is shorter than {length} tokens")
    best, at = -1, len(text)
    for end in range(int(0.8 * len(text)), len(text) + 1):
        last = text[end - 1]
        for other in np.flatnonzero(text[: end - 1] == last)[-20:]:
            run = 1
            while run <= other and run < 12 and text[end - 1 - run] == text[other - run]:
                run += 1
            if run > best:
                best, at = run, end
    return np.concatenate([[a.data.bos], text[:at]]).astype(np.uint16)


def sum_to_one(a: Audit, length: int) -> tuple[str, str]:
    """C1, C2: the probabilities of every token of the vocabulary behind one prefix, each scored as the end of a document of its own, sum to 1.

    Short documents come first, so that all the continuations lie in one segment behind every change of the base weights. BOS ends the document without continuation.
    """
    vocab, settings = a.vocab, a.artifact.settings
    if vocab > 1024:
        raise NotRun(
            f"a vocabulary of {vocab:,} would take {vocab * length:,} targets; audit a model of at most 1,024 by the same script"
        )
    prefix, bos = telling_prefix(a, length), a.data.bos
    others = np.setdiff1d(np.arange(vocab), [bos]).astype(np.uint16)
    span, env = settings.get("segment_docs", 1 << 30), {}
    if span < vocab + 1:
        span, env = 1 << 20, {"SEGMENT_DOCS": 1 << 20}
    fillers = settings.get("phased_ttt_prefix_docs", 2500) if settings.get("phased_ttt_num_phases", 1) else 1
    if fillers // span != (fillers + vocab) // span:
        fillers = -(-fillers // span) * span
    text = a.data.tokens[a.data.tokens != bos][:60]
    filler = [np.concatenate([[bos], text[i % 50 : i % 50 + 6]]) for i in range(fillers)]
    tokens = np.concatenate([*filler, prefix, *(np.append(prefix, token) for token in others)]).astype(np.uint16)
    data = Dataset(tokens, None if a.data.sizes is None else np.where(tokens == bos, 0, 1), bos, a.data.folder)
    nats = a.artifact.score(data, env=env).nats
    first = (
        sum(map(len, filler)) + len(prefix) - 1
    )  # the target of BOS behind the bare prefix; then one target per document
    ends = first + np.append(0, len(prefix) + np.arange(len(others)) * (len(prefix) + 1))
    if len(nats) != len(tokens) - 1 or np.isnan(nats).any():
        raise Broken("the ledger lacks targets")
    same = nats[ends[1:, None] - np.arange(1, len(prefix))]  # the prefix itself, scored once per document
    total, spread = float(np.exp(-nats[ends]).sum()), float(np.ptp(same, axis=0).max())
    where = f"sum over {vocab} tokens behind {len(prefix)} = {total:.7f}, behind {fillers} documents" + (
        ", one segment by SEGMENT_DOCS" if env else ""
    )
    tolerance = SUM_TOLERANCE[a.artifact.device]
    faults = [] if abs(total - 1) <= tolerance else [where]
    if spread > max(LENGTH_TOLERANCE, 10 * a.tolerance):
        faults.append(f"the same prefix is scored differently before different tokens (by {spread:.2g} nats)")
    return verdict_of(faults, where)


for _length in PREFIXES:
    CHECKS[f"sum_to_one_{_length}"] = lambda a, length=_length: sum_to_one(a, length)


@check
def future(a: Audit) -> tuple[str, str]:
    """C1, C3: later tokens of each document are replaced, lengths kept; what stands before them keeps its score."""
    data, rng = a.excerpt, np.random.default_rng(1)
    first, last, declared = a.segment()
    documents = data.documents()
    cuts = [int(rng.integers(2, end - start)) for start, end in documents[first:last]]
    places = np.concatenate([np.arange(start + cut, end) for (start, end), cut in zip(documents[first:last], cuts)])
    nats = a.artifact.score(a.replaced(data, places)).nats
    before = np.concatenate(
        [
            np.arange(documents[first][0]),
            *(np.arange(start, start + cut - 1) for (start, _), cut in zip(documents[first:last], cuts)),
        ]
    )
    changed = moved(nats[before], a.base.nats[before], a.tolerance)
    after = places[places < len(nats) + 1] - 1
    if not len(moved(nats[after], a.base.nats[after], a.tolerance)):
        raise Broken("replaced tokens keep their scores: the ledger is not of the data that was given")
    what = f"{len(before):,} targets before the replaced ends of {last - first} document(s)" + (
        "" if declared else " (no segments declared)"
    )
    return verdict_of(
        [f"{len(changed):,} of {what} moved, by up to {np.abs(nats[before] - a.base.nats[before]).max():.2g} nats"]
        if len(changed)
        else [],
        f"{what}: {'bit-equal' if not a.tolerance else f'equal within {a.tolerance:.1g}'}",
    )


@check
def tail(a: Audit) -> tuple[str, str]:
    """C1, C3: the last tenth of the stream is replaced; everything before it keeps its score."""
    data = a.excerpt
    cut = int(0.9 * len(data.tokens))
    nats = a.artifact.score(a.replaced(data, np.arange(cut, len(data.tokens)))).nats
    changed = moved(nats[: cut - 1], a.base.nats[: cut - 1], a.tolerance)
    return verdict_of(
        [f"{len(changed):,} of {cut - 1:,} earlier targets moved, from target {changed[0]:,} on"]
        if len(changed)
        else [],
        f"{cut - 1:,} targets before the replaced tenth: {'bit-equal' if not a.tolerance else f'equal within {a.tolerance:.1g}'}",
    )


@check
def documents(a: Audit) -> tuple[str, str]:
    """C1: one document is replaced, length kept. No earlier one moves, and none of the same declared segment; a leak over BOS alone moves the next one."""
    data = a.excerpt
    first, last, declared = a.segment()
    spans = data.documents()
    other = (first + last - 1) // 2 if declared else 1
    start, end = spans[other]
    nats = a.artifact.score(a.replaced(data, np.arange(start + 1, end))).nats
    changed = moved(nats, a.base.nats, a.tolerance)
    earlier = changed[changed < start]
    later = sorted(
        {int(d) for d in np.searchsorted(data.starts, changed, side="right") - 1 if d > other}
    )  # of the inputs: BOS is the last target before it
    faults = [f"{len(earlier):,} targets of earlier documents moved"] if len(earlier) else []
    mates = [d for d in later if d < last] if declared else []
    if mates:
        faults.append(f"documents {mates[:5]} moved with document {other} of the same segment")
    if not declared and later == [other + 1]:
        faults.append(f"only document {other + 1} moved with document {other}: something leaks over BOS")
    doubts = (
        [f"{len(later)} later documents moved; no segments are declared, so state crosses documents unannounced"]
        if not declared and later
        else []
    )
    return verdict_of(
        faults,
        f"document {other} replaced: no other of its segment of {last - first} moved"
        + ("" if declared else " (no segments declared)"),
        doubts,
    )


@check
def lengths(a: Audit) -> tuple[str, str]:
    """C1: documents end earlier; what is left keeps its score, so no schedule looks at a document's length."""
    data, rng = a.excerpt, np.random.default_rng(2)
    first, last, _ = a.segment()
    spans = data.documents()
    cuts = [
        int(rng.integers(max(2, (end - start) // 3), end - start)) if first <= d < last else end - start
        for d, (start, end) in enumerate(spans)
    ]
    nats = a.artifact.score(data.of_documents([(start, start + cut) for (start, _), cut in zip(spans, cuts)])).nats
    begins = np.cumsum([0, *cuts])
    pairs = [
        (nats[new : new + cut - 1], a.base.nats[start : start + cut - 1])
        for d, ((start, _), cut, new) in enumerate(zip(spans, cuts, begins))
        if d < last
    ]
    worst = max(float(np.abs(x - y).max()) for x, y in pairs)
    what = f"{sum(len(x) for x, _ in pairs):,} targets of documents cut short: off by at most {worst:.2g} nats"
    return verdict_of([what] if not worst <= max(LENGTH_TOLERANCE, 4 * a.tolerance) else [], what)


@check
def ledger(a: Audit) -> tuple[str, str]:
    """C4: one score per target, none missing, and the reported BPB is their sum over the bytes of the data."""
    faults, notes = [], []
    whole = len(a.excerpt.tokens) == len(a.data.tokens)
    for name, data, scored in [("excerpt", a.excerpt, a.base)] + (
        [("full set", a.data, full_run(a))] if small(a) and not whole else []
    ):
        nats, targets = scored.nats, len(data.tokens) - 1
        if nats.shape != (targets,):
            faults.append(f"{name}: {nats.size:,} entries for {targets:,} targets")
            continue
        if not np.isfinite(nats).all() or (nats < 0).any():
            faults.append(
                f"{name}: {int((~np.isfinite(nats)).sum()):,} targets have no finite score, {int((nats < 0).sum()):,} a probability above 1"
            )
            continue
        reported = scored.result.get("val_bpb", list(scored.result["bpb"].values())[-1])
        if data.sizes is not None:
            bpb = float(nats.sum(dtype=np.float64) / math.log(2) / data.sizes[1:].sum(dtype=np.int64))
            notes.append(f"{name}: {targets:,} targets once each, BPB {bpb:.6f} from the ledger")
            if abs(bpb - reported) > 1e-6 * bpb:
                faults.append(f"{name}: reports {reported:.8f} BPB, its ledger and the sidecar give {bpb:.8f}")
        if reported < 0.1 or (reported < 0.95 and targets + 1 in KNOWN):
            faults.append(f"{name}: {reported:.6f} BPB is implausible")
    return verdict_of(faults, "; ".join(notes))


@check
def worlds(a: Audit) -> tuple[str, str]:
    """C4: 1, 2 and 3 ranks give the same BPB, so no score depends on which rank is free."""
    if a.artifact.device == "cuda":
        raise NotRun("needs as many GPUs as ranks; run --device cpu")
    found, targets, own = [], len(a.base.nats), a.artifact.settings
    # Batches so small that every rank has some; no score may depend on that either.
    env = {
        name: value
        for name, value in (("TTT_BATCH_SIZE", 2), ("VAL_BATCH_TOKENS", 2 * own.get("eval_seq_len", 0)))
        if name.lower() in own
    }
    for world in (2, 3):
        scored = a.artifact.score(a.excerpt, world, env)
        if len(scored.nats) != targets:
            return FAIL, f"{world} ranks: {len(scored.nats):,} entries instead of {targets:,}"
        found.append((world, scored, float(np.abs(scored.nats - a.base.nats).max())))
    ours = a.excerpt.sizes[1:].sum() if a.excerpt.sizes is not None else 3 * targets
    differ = [abs(float(s.nats.sum() - a.base.nats.sum())) / math.log(2) / ours for _, s, _ in found]
    what = (
        ", ".join(
            f"{world} ranks: {bpb:.1g} BPB (a target at most {most:.1g} nats)"
            for (world, _, most), bpb in zip(found, differ)
        )
        + " from 1 rank"
    )
    return verdict_of([what] if max(differ) > WORLD_TOLERANCE or np.isnan(differ).any() else [], what)


# ---------------------------------------------------------------- training and packaging


def short_trainings(a: Audit) -> tuple[dict, dict, bytes]:
    """Two trainings of a few steps, by the shipped script and by its unpacked source, with different validation data -> both artifacts, the shipped script."""
    settings = a.artifact.settings
    if not settings:
        raise NotRun("no result.json with the settings to train with")
    if not shard_paths(a.data.folder, "train"):
        raise NotRun(f"{a.data.folder}: no training shards")
    text = {name.upper(): int(value) if isinstance(value, bool) else value for name, value in settings.items()}
    env = {**text, "ITERATIONS": 3, "MAX_WALLCLOCK_SECONDS": 0, "WARMUP_STEPS": 1, "GPTQ_CALIBRATION_BATCHES": 2}
    if a.artifact.device == "cpu" and "train_seq_len" in settings:  # few tokens show a dependence as well as many
        env |= dict.fromkeys(
            ("TRAIN_BATCH_TOKENS", "MICRO_BATCH_TOKENS"),
            min(2 * settings["train_seq_len"], settings.get("micro_batch_tokens", 1 << 30)),
        )
    shipped = (a.folder / "train_gpt.py").read_bytes()
    data = a.excerpt
    few = data.of_documents(data.documents()[:4])
    poisoned = a.replaced(
        data.of_documents(data.documents()[-3:]), np.arange(sum(e - s for s, e in data.documents()[-3:])), seed=3
    )
    return a.artifact.train(shipped, few, env), a.artifact.train(a.source.encode(), poisoned, env), shipped


@check
def training(a: Audit) -> tuple[str, str]:
    """C3: two trainings with different validation data, by steps and not by the clock, give the same model.bin."""
    one, two, _ = a.once("trainings", lambda: short_trainings(a))
    same = one["model.bin"] == two["model.bin"]
    if a.artifact.device == "cuda" and not same:
        return DISPUTED, "model.bin differs; GPU kernels need not be bit-reproducible: run --device cpu"
    return verdict_of(
        [] if same else ["model.bin depends on the validation data (or is not reproducible)"],
        f"3 steps, other validation data: the same {len(one['model.bin']):,} bytes of model.bin",
    )


@check
def pack(a: Audit) -> tuple[str, str]:
    """The shipped script, trained again, ships itself; and its unpacked source packs to the same bytes."""
    one, two, shipped = a.once("trainings", lambda: short_trainings(a))
    faults = [
        f"{who} ships {len(made['train_gpt.py']):,} other bytes of train_gpt.py"
        for who, made in (("the packed script", one), ("its unpacked source", two))
        if made["train_gpt.py"] != shipped
    ]
    return verdict_of(faults, f"packed again, and unpacked and packed: the same {len(shipped):,} bytes")


def small(a: Audit) -> bool:
    return len(a.data.tokens) <= 1_000_000


def full_run(a: Audit) -> Scored:
    return a.once("full", lambda: a.artifact.score(a.data_path, blocked=True))


@check
def reload(a: Audit) -> tuple[str, str]:
    """The two files alone, in an empty folder, without network (on a CPU also without any program on the path), give the reported BPB."""
    how = "two files, no network" + (
        ", empty PATH" if a.artifact.device == "cpu" else " (the GPU's compiler is allowed)"
    )
    if not small(a):
        scored = a.once("reload", lambda: a.artifact.score(a.excerpt, blocked=True))
        changed = moved(scored.nats, a.base.nats, max(LENGTH_TOLERANCE, a.tolerance))
        return verdict_of(
            [f"{len(changed):,} targets of the excerpt changed"] if len(changed) else [],
            f"{how}: the excerpt's scores are the same; the full set was not run",
        )
    scored = full_run(a)
    stages, claimed = scored.result["bpb"], a.artifact.result.get("bpb", {})
    faults = [
        f"{stage}: {stages[stage]:.6f} BPB, result.json has {claimed[stage]:.6f}"
        for stage in stages
        if stage in claimed and abs(stages[stage] - claimed[stage]) > 1e-5
    ]
    headline, now = a.artifact.result.get("val_bpb"), list(stages.values())[-1]
    if headline is not None and abs(headline - now) > 1e-5:
        faults.append(f"val_bpb: {now:.6f} by the artifact's own settings, result.json has {headline:.6f}")
    settings = {k: v for k, v in scored.result.get("settings", {}).items() if a.artifact.settings.get(k, v) != v}
    if settings:
        faults.append(f"result.json was scored with other settings than the artifact holds: {', '.join(settings)}")
    return verdict_of(faults, f"{how}: {now:.6f} BPB" + ("" if claimed else " (no result.json to compare with)"))


@check
def size(a: Audit) -> tuple[str, str]:
    """Sizes by stat against the cap and against what the run printed; files that the script names and does not count."""
    sizes = {name: (a.folder / name).stat().st_size for name in ("train_gpt.py", "model.bin")}
    total, claimed = sum(sizes.values()), a.artifact.result.get("bytes", {})
    faults = [f"{total:,} bytes are over the cap of {CAP:,}"] if total > CAP else []
    for name, key in (("train_gpt.py", "code"), ("model.bin", "model")):
        if key in claimed and claimed[key] != sizes[name]:
            faults.append(f"{name} has {sizes[name]:,} bytes, result.json counts {claimed[key]:,}")
    helpers = [
        p
        for p in a.folder.iterdir()
        if p.suffix in (".py", ".c", ".cu", ".cpp", ".so", ".json", ".npy", ".pkl")
        and p.name
        not in (
            *sizes,
            "result.json",
            "eval_result.json",
            "audit.json",
            "submission.json",
            "baselines.json",
            "manifest.json",
        )
    ]
    faults += [
        f"{p.name} ({p.stat().st_size:,} bytes) is named by the script and not counted"
        for p in helpers
        if re.search(rf"[\"'/]{re.escape(p.name)}[\"']", a.source)
    ]
    raw = len(a.source.encode())
    return verdict_of(
        faults,
        f"{sizes['train_gpt.py']:,} + {sizes['model.bin']:,} = {total:,} of {CAP:,} (source unpacked: {raw:,}; tokenizer not counted)",
    )


@check
def source(a: Audit) -> tuple[str, str]:
    """The source can be read, compiles, is the one that made the log, loads nothing executable and imports no network."""
    script, text = (a.folder / "train_gpt.py").read_bytes(), a.source
    faults = (
        ["train_gpt.py begins with a byte order mark"]
        if script.startswith(b"\xef\xbb\xbf") or text.startswith("\ufeff")
        else []
    )
    try:
        tree = ast.parse(text.removeprefix("\ufeff"))
    except SyntaxError as error:
        return FAIL, f"the source does not compile on Python {sys.version_info.major}.{sys.version_info.minor}: {error}"
    digest, claimed = hashlib.sha256(text.encode()).hexdigest(), a.artifact.result.get("source_sha256")
    if claimed and claimed != digest:
        faults.append(f"result.json is of another source ({claimed[:12]}, the shipped one is {digest[:12]})")
    modules = {
        name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in ([n.name for n in node.names] if isinstance(node, ast.Import) else [node.module or ""])
    }
    doubts = [
        f"imports {module}"
        for module in sorted(
            modules & {"requests", "urllib", "http", "socket", "huggingface_hub", "datasets", "subprocess", "pickle"}
        )
    ]
    calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    doubts += [
        f"calls {call}: a pickle runs code when it is loaded"
        for call in sorted(calls & {"torch.load", "pickle.load", "pickle.loads"})
    ]
    doubts += ["FORCE_STOP_STEP stops by step, not by clock"] if "FORCE_STOP_STEP" in text else []
    head = (a.folder / "model.bin").read_bytes()[:4]
    if head[:2] in (b"PK", b"\x80\x02", b"\x80\x04", b"\x80\x05"):
        doubts.append("model.bin is a pickle")
    return verdict_of(
        faults,
        f"readable, {text.count(chr(10)):,} lines, sha256 {digest[:12]}"
        + (", the one in result.json" if claimed else ""),
        doubts,
    )


NOT_SETTINGS = re.compile(
    r"PATH|HOME|PYTHON.*|PIP_.*|OMP_.*|CUDA_.*|NCCL_.*|LD_.*|TORCH.*|PYTORCH_.*|TRITON_.*|TOKENIZERS_.*|S|RUN_ID"
)


@check
def settings(a: Audit) -> tuple[str, str]:
    """Every variable that the README or a recipe sets for train_gpt.py is one that the script reads, and a misspelt one is refused."""
    here = (
        a.folder / "README.md"
    ).is_file() or ROOT not in a.folder.resolve().parents  # a run of this repository: its README and recipes
    readme = (a.folder if here else ROOT) / "README.md"
    files = [readme, *sorted((readme.parent / "recipes").glob("*.env"))]
    named = collections.defaultdict(set)
    for path in files:
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
            if line.startswith("#") or (
                path.suffix != ".env" and "train_gpt.py" not in line and not line.strip().startswith("export ")
            ):
                continue
            for name in re.findall(r"(?<![\w$])([A-Z][A-Z0-9_]*)=", line):
                if not NOT_SETTINGS.fullmatch(name):
                    named[name].add(path.name)
    if not named:
        raise NotRun("no README or recipe that sets a variable")
    known = (
        set(re.findall(r"[\"']([A-Z][A-Z0-9_]+)[\"']", a.source))
        | {name.upper() for name in a.artifact.settings}
        | {name.upper() for name in re.findall(r"^\s+(\w+): (?:int|float|bool|str)\b", a.source, re.M)}
    )
    faults = [
        f"{name} ({', '.join(sorted(where))}) is not read by the script"
        for name, where in sorted(named.items())
        if name not in known
    ]
    folder = a.artifact.clean_folder(None, "train_gpt.py", "model.bin")
    bogus = a.artifact.environment(folder, {"TTT_EVAL_ONLY": 1, "TTT_NO_SUCH_SETTING": 1, "DATA_PATH": folder / "none"})
    code, _ = a.artifact.launcher(folder, bogus, 1, False, a.artifact.timeout)
    accepted = ["an unknown variable ends the run with status 0"] if code == 0 else []
    return verdict_of(
        faults,
        f"{len(named)} variables of {', '.join(path.name for path in files if path.is_file())}: all are read",
        accepted,
    )


# ---------------------------------------------------------------- data


@check
def stream(a: Audit) -> tuple[str, str]:
    """Shards are whole, documents begin with BOS, the sidecar fits, and no space is spelt as three byte tokens."""
    data = a.data
    starts, tokens = data.starts, data.tokens
    faults = [] if len(starts) and starts[0] == 0 else [f"the stream does not begin with BOS ({data.bos})"]
    if int(tokens.max()) >= a.vocab:
        faults.append(f"token {tokens.max()} is outside the vocabulary of {a.vocab:,}")
    if len(tokens) in KNOWN and len(starts) != 50_000:
        faults.append(f"{len(starts):,} documents, the contest's set has 50,000")
    if data.sizes is not None:
        if len(data.sizes) != len(tokens):
            faults.append(f"the byte sidecar has {len(data.sizes):,} entries for {len(tokens):,} tokens")
        elif data.sizes[starts].any():
            faults.append("the byte sidecar gives bytes to BOS")
        empty = (
            int((~np.array([data.sizes[s + 1 : e].any() for s, e in data.documents() if e - s > 4], bool)).sum())
            if len(data.sizes) == len(tokens)
            else 0
        )
        faults += [f"{empty} documents have no bytes at all in the sidecar"] if empty else []
    if (model := next(data.folder.glob("*.model"), None)) is not None:
        import sentencepiece

        sp = sentencepiece.SentencePieceProcessor(model_file=str(model))
        e2, b96, b81 = (sp.piece_to_id(f"<0x{byte:02X}>") for byte in (0xE2, 0x96, 0x81))
        if sp.is_byte(e2):
            runs = int(((tokens[:-2] == e2) & (tokens[1:-1] == b96) & (tokens[2:] == b81)).sum())
            faults += (
                [f"{runs:,} spaces are spelt as the bytes E2 96 81: the vocabulary lacks a standalone space"]
                if runs > len(tokens) // 10_000
                else []
            )
    lengths_ = np.diff(np.append(starts, len(tokens)))
    return verdict_of(
        faults,
        f"{len(tokens):,} tokens, {len(starts):,} documents ({int((lengths_ == 1).sum())} empty, longest {int(lengths_.max(initial=0)):,})",
    )


def spelt_texts(data: Dataset, sp) -> list[str]:
    """What the tokens of each document decode to, CaseOps undone."""
    import lossless_caps

    caseops = all(not sp.is_unknown(sp.piece_to_id(operator)) for operator in lossless_caps.OPERATORS)
    texts = []
    for start, end in data.documents():
        text = sp.decode(data.tokens[start + 1 : end].tolist())
        try:
            texts.append(lossless_caps.decode(text) if caseops else text)
        except (
            lossless_caps.CaseOpsError
        ):  # normalisation joined a capital and its accent: the operators say nothing any more
            texts.append(text.translate(dict.fromkeys(map(ord, lossless_caps.OPERATORS))))
    return texts


def source_texts(data: Dataset) -> list[str] | None:
    """The original text of the validation documents where the manifest's source is on this machine, unchanged; documents without tokens left out."""
    manifest = read_json(data.folder / "manifest.json")
    origin = manifest.get("source", {})
    import prepare_data

    if origin.get("kind") == "stdlib":
        lines = prepare_data.stdlib_documents()
        if hashlib.sha256(b"\n".join(lines)).hexdigest() != origin.get("sha256"):
            return None
        found = prepare_data.Source("stdlib", documents=lines)
    elif origin.get("kind") == "jsonl" and all(
        Path(f["path"]).is_file() and hashlib.sha256(Path(f["path"]).read_bytes()).hexdigest() == f["sha256"]
        for f in origin["files"]
    ):
        found = prepare_data.Source("jsonl", tuple(Path(f["path"]) for f in origin["files"]))
    else:
        return None
    wanted = manifest.get("options", {}).get("val_docs", manifest["val"]["documents"])
    return [prepare_data.parse_document(line) for line, _ in zip(found.lines(), range(wanted))]


@check
def bytes_(a: Audit) -> tuple[str, str]:
    """Bytes per document, counted from the source text less what SentencePiece strips at its ends; else from the decoded tokens, within 1 %."""
    data = a.data
    if data.sizes is None or len(data.sizes) != len(data.tokens):
        raise NotRun("no byte sidecar that fits; the script counts by its tokenizer's table")
    model = next(data.folder.glob("*.model"), None)
    if model is None:
        raise NotRun(f"{data.folder}: no tokenizer")
    import sentencepiece

    sp, spans = sentencepiece.SentencePieceProcessor(model_file=str(model)), data.documents()
    held = np.array([data.sizes[start:end].sum(dtype=np.int64) for start, end in spans])
    special = np.array(
        [sp.is_control(i) or sp.id_to_piece(i) in "\ue001\ue002\ue003\ue004" for i in range(sp.vocab_size())]
    )
    paid = int(data.sizes[special[data.tokens]].sum(dtype=np.int64))
    faults = [f"operators and control tokens hold {paid:,} bytes"] if paid else []
    decoded, texts = spelt_texts(data, sp), source_texts(data)
    if texts is None:
        spelt = np.array([len(text.encode("utf-8", "replace")) for text in decoded])
        off = (int(held.sum()) - int(spelt.sum())) / max(int(spelt.sum()), 1)
        what = f"{held.sum():,} bytes, {100 * off:+.3f} % of what the tokens spell (the source text is not at hand)"
        return verdict_of(faults + ([what] if abs(off) > 0.01 else []), what)
    import prepare_data

    ends, bare = prepare_data.StrippedEnds(sp), lambda text: "".join(unicodedata.normalize("NFKC", text).split())
    kept = [text for text in texts if len(text.encode()) > ends.count(text)]
    true = np.array([len(text.encode()) - ends.count(text) for text in kept])
    if len(true) != len(held):
        return FAIL, f"{len(held):,} documents, the source has {len(true):,} that hold text"
    wrong = np.flatnonzero(true != held)
    if len(wrong):
        faults.append(
            f"{len(wrong):,} of {len(held):,} documents: {held[wrong].sum():,} bytes in the sidecar, {true[wrong].sum():,} in the source"
            f" (total {100 * (held.sum() / true.sum() - 1):+.3f} %)"
        )
    lossy = sum(bare(text) != bare(spelt) for text, spelt in zip(kept, decoded))
    doubts = (
        [f"LOSSY: {lossy:,} of {len(kept):,} documents do not decode to their text, white space and NFKC aside (#1604)"]
        if lossy > len(kept) // 20
        else []
    )
    return verdict_of(faults, f"{held.sum():,} bytes, each of {len(held):,} documents equals its source text", doubts)


@check
def identity(a: Audit) -> tuple[str, str]:
    """The files are those of the manifest, the run was on them, and their counts are no known accident."""
    data, faults, doubts = a.data, [], []
    count, total = len(data.tokens), None if data.sizes is None else int(data.sizes.sum(dtype=np.int64))
    digest = hashlib.sha256(np.ascontiguousarray(data.tokens)).hexdigest()
    label = "a known public export" if count in KNOWN else "no known export"
    if count in ALARMS:
        faults.append(f"{count:,} validation tokens: {ALARMS[count]}")
    if (
        count in KNOWN
        and total is not None
        and KNOWN[count]
        and min(abs(total / known - 1) for known in KNOWN[count]) > 0.001
    ):
        faults.append(f"{total:,} bytes for the export of {count:,} tokens, which has {KNOWN[count][0]:,}")
    if (shards := len(shard_paths(data.folder, "train"))) in ALARM_TRAIN_SHARDS:
        doubts.append(f"{shards} training shards, as in local preparations that leaked (#2130)")
    ran = a.artifact.result.get("data", {})
    if ran.get("val_sha256", digest) != digest:
        faults.append("result.json is of other validation tokens")
    manifest = read_json(data.folder / "manifest.json")
    if not manifest:
        doubts += [] if count in KNOWN else ["no manifest, and no known export: nothing to compare with"]
        return verdict_of(faults, f"{label}, {count:,} tokens, sha256 {digest[:12]}; no manifest", doubts)
    promised = {name: entry["sha256"] for name, entry in manifest["files"].items()} | {
        manifest["tokenizer"]["file"]: manifest["tokenizer"]["sha256"]
    }
    for name, sha in promised.items():
        path = data.folder / name
        if not path.is_file() or file_sha256(path) != sha:
            faults.append(f"{name} is {'not the file of the manifest' if path.is_file() else 'missing'}")
    extra = {path.name for path in data.folder.glob("fineweb_*.bin")} - set(promised)
    faults += [f"{name} is not in the manifest" for name in sorted(extra)]
    if manifest["val"]["first_document"] != 0 or manifest["train"]["first_document"] < manifest["val"]["documents"]:
        faults.append("the manifest's document ranges of training and validation overlap")
    return verdict_of(
        faults, f"{label}, {count:,} tokens, {len(promised)} files as in the manifest, sha256 {digest[:12]}", doubts
    )


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@check
def disjoint(a: Audit) -> tuple[str, str]:
    """No validation document of eight tokens or more is a training document; up to 1 % of repeated ones is what the web holds."""
    paths, shortest = shard_paths(a.data.folder, "train"), 8
    if not paths:
        raise NotRun(f"{a.data.folder}: no training shards")
    val = {digest for digest, tokens in document_hashes([a.data.tokens], a.data.bos) if tokens >= shortest}
    seen, trained = set(), 0
    for digest, tokens in document_hashes([read_shard(p) for p in paths], a.data.bos):
        trained += 1
        if tokens >= shortest and digest in val:
            seen.add(digest)
    what = f"{len(seen):,} of {len(val):,} validation documents are among {trained:,} training documents"
    return verdict_of([what] if len(seen) > max(1, len(val) // 100) else [], what)


# ---------------------------------------------------------------- clocks, seeds and evidence

TRAIN_PHASES, OUTSIDE_PHASES = ("steps", "calibrate", "quantize"), ("setup", "warmup", "diagnostic", "write")


@check
def budget(a: Audit) -> tuple[str, str]:
    """The run's own clocks against its limit (at most 600 s), in the narrow reading, in ours, and with everything else that the process did."""
    seconds, limit = a.artifact.result.get("seconds", {}), a.artifact.settings.get("max_wallclock_seconds", 0)
    if not limit or "steps" not in seconds:
        raise NotRun("no result.json of a run by the clock")
    phases = {name: value for name, value in seconds.items() if name not in ("train", "eval")}
    evaluation = {name: value for name, value in phases.items() if name not in (*TRAIN_PHASES, *OUTSIDE_PHASES)}
    train, score = sum(phases.get(name, 0.0) for name in TRAIN_PHASES), sum(evaluation.values())
    wide = train + phases.get("write", 0.0), score + phases.get("setup", 0.0) + phases.get("diagnostic", 0.0)
    faults = [f"a limit of {limit:.0f} s is above {BUDGET_SECONDS}"] if limit > BUDGET_SECONDS else []
    faults += [
        f"{name} takes {value:.1f} of {limit:.0f} s"
        for name, value in (("training", train), ("evaluation", score))
        if value >= limit
    ]
    faults += [
        f"result.json counts {seconds[key]:.1f} s of {key}, its phases add up to {value:.1f}"
        for key, value in (("train", train), ("eval", score))
        if key in seconds and seconds[key] < value - 0.5
    ]
    readings = (
        f"training {phases['steps']:.1f} s of steps, {train:.1f} with calibration and quantisation, {wide[0]:.1f} with writing; evaluation "
        f"{max(evaluation.values(), default=0.0):.1f} s of scoring, {score:.1f} with loading, {wide[1]:.1f} with set-up and diagnostics; limit {limit:.0f}"
    )
    doubts = [readings] if max(wide) >= limit else []
    return verdict_of(faults, readings, doubts)


def t_tail(t: float, df: float) -> float:
    """P(T > t) of Student's t, by the midpoint rule on x = t + u / (1 - u)."""
    u = (np.arange(20_000) + 0.5) / 20_000
    log_c = math.lgamma((df + 1) / 2) - math.lgamma(df / 2) - 0.5 * math.log(df * math.pi)
    density = lambda x: np.exp(log_c - (df + 1) / 2 * np.log1p(x * x / df))
    upper = float((density(abs(t) + u / (1 - u)) / (1 - u) ** 2).mean())
    return upper if t >= 0 else 1 - upper


def t_quantile(tail_share: float, df: float) -> float:
    """The t above which ``tail_share`` lies."""
    low, high = 0.0, 1000.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if t_tail(middle, df) > tail_share else (low, middle)
    return low


def welch(a: list[float], b: list[float]) -> tuple[float, float, float]:
    """(t, degrees of freedom, one-sided p) that the mean of ``a`` is below that of ``b``; a single value of ``b`` is taken as exact."""
    va, vb = statistics.variance(a) / len(a), statistics.variance(b) / len(b) if len(b) > 1 else 0.0
    if va + vb == 0:
        return math.inf, math.inf, 0.0 if statistics.fmean(a) < statistics.fmean(b) else 1.0
    t = (statistics.fmean(b) - statistics.fmean(a)) / math.sqrt(va + vb)
    df = (va + vb) ** 2 / (va**2 / (len(a) - 1) + (vb**2 / (len(b) - 1) if len(b) > 1 else 0.0))
    return t, df, t_tail(t, df)


@check
def seeds(a: Audit) -> tuple[str, str]:
    """Several seeds of one configuration: mean, sample deviation, both units, and what difference they could show; a claim to beat a baseline needs Welch's p < 0.25."""
    results = [a.artifact.result, *(read_json(folder / "result.json") for folder in a.seeds)]
    if len(results) < 2:
        raise NotRun("one seed; name the folders of others with --seeds")
    if missing := [i for i, r in enumerate(results) if "val_bpb" not in r]:
        return FAIL, f"{len(missing)} of {len(results)} runs have no val_bpb"
    faults, bpb = [], [r["val_bpb"] for r in results]
    for key in ("source_sha256", "hardware"):
        if len({r.get(key) for r in results}) > 1:
            faults.append(f"runs differ in {key}")
    plain = [{k: v for k, v in r["settings"].items() if k != "seed"} for r in results]
    if other := sorted({k for p in plain for k in p if p[k] != plain[0].get(k)}):
        faults.append(f"runs differ in {', '.join(other)}")
    if len({r["seed"] for r in results}) < len(results):
        faults.append("a seed occurs twice")
    if (most := max(r["bytes"]["total"] for r in results)) > CAP:
        faults.append(f"a seed has {most:,} bytes, over the cap of {CAP:,}")
    mean, std, n = statistics.fmean(bpb), statistics.stdev(bpb), len(bpb)
    ratio = results[0]["data"]["val_bytes"] / results[0]["data"]["val_targets"]
    smallest = (t_quantile(0.01, 2 * n - 2) + t_quantile(0.2, 2 * n - 2)) * std * math.sqrt(2 / n)
    what = (
        f"{n} seeds: {mean:.6f} BPB, sample std {std:.6f}; {mean * math.log(2):.5f} nats per byte, {mean * math.log(2) * ratio:.5f} per token; "
        f"a difference of {smallest:.5f} BPB would show at p < 0.01 with power 0.8; at most {most:,} bytes"
    )
    if a.baseline:
        t, df, p = welch(bpb, list(a.baseline))
        gain = statistics.fmean(a.baseline) - mean
        what += (
            f"; {gain:+.6f} BPB below the baseline of {len(a.baseline)}, {gain * math.log(2):+.5f} nats per byte, {gain * math.log(2) * ratio:+.5f} per token: "
            f"Welch t {t:.2f}, {df:.1f} degrees of freedom, p {p:.2g}"
        )
        if p >= 0.25:
            faults.append("no better than the baseline: " + what)
    return verdict_of(faults, what)


@check
def evidence(a: Audit) -> tuple[str, str]:
    """README.md and submission.json of the folder against the logs and results there and of the other seeds; logs without tracebacks and private paths."""
    claim, readme, folders = a.folder / "submission.json", a.folder / "README.md", (a.folder, *a.seeds)
    logs = {
        f"{folder.name}/{p.name}" if folder in a.seeds else p.name: p.read_text(encoding="utf-8", errors="replace")
        for folder in folders
        for p in sorted(folder.glob("*.log"))
    }
    faults = [f"{name} holds a traceback" for name, text in logs.items() if "Traceback (most recent call last)" in text]
    faults += [
        f"{name} holds a private path"
        for name, text in logs.items()
        if re.search(r"(?<![\w.])/(?:home|root|Users)/\w+", text)
    ]
    if not claim.is_file() and not readme.is_file():
        if faults:
            return FAIL, "; ".join(faults)
        raise NotRun(
            f"no README.md or submission.json in {a.folder.name} ({len(logs)} logs without traceback or private path)"
        )
    found = read_json(claim)
    own, *others = ([read_json(p) for p in sorted(folder.glob("*result*.json"))] for folder in folders)
    results = sum(others, own)
    text = "\n".join(logs.values()) + json.dumps(results)
    shown = {float(number) for number in re.findall(r"\d+\.\d{3,}", text)}
    sizes = {int(number.replace(",", "")) for number in re.findall(r"\d[\d,]{3,}", text)}
    backed = lambda number: any(
        abs(float(number) - value) <= 0.5 * 10 ** -len(number.split(".")[1]) + 1e-12 for value in shown
    )
    bpb, runs = found.get("val_bpb"), found.get("seed_results", {})
    if not logs and not results:
        faults.append("no log and no result.json: nothing shows the claim")
    if not isinstance(bpb, (int, float)):
        faults.append(f"submission.json: val_bpb is {bpb!r}")
    elif runs and abs(statistics.fmean(run["val_bpb"] for run in runs.values()) - bpb) > 2e-5:
        faults.append(f"submission.json: val_bpb {bpb} is not the mean of its seed_results")
    for seed, run in {**runs, **({} if runs or bpb is None else {"": found})}.items():
        if isinstance(run.get("val_bpb"), float) and not backed(f"{run['val_bpb']:.5f}"):
            faults.append(f"submission.json: seed {seed} val_bpb {run['val_bpb']} is in no log or result")
    largest = max(
        (size for size in (r.get("bytes", {}).get("total", 0) for r in own)), default=0
    )  # those of other seeds: check seeds
    if "bytes_total" in found and (found["bytes_total"] < largest or found["bytes_total"] not in sizes):
        faults.append(
            f"submission.json: bytes_total {found['bytes_total']:,} is {'below the largest run' if found['bytes_total'] < largest else 'in no log or result'}"
        )
    if re.search(r"\b(TBD|TODO|PENDING)\b", json.dumps(found)):
        faults.append("submission.json holds a placeholder")
    shown |= {float(v) for v in re.findall(r"\d+\.\d{3,}", json.dumps(found))}
    quoted = re.findall(r"(?<![\d.])[01]\.\d{4,}(?!\d)", readme.read_text(encoding="utf-8")) if readme.is_file() else []
    stale = [
        number for number in quoted if isinstance(bpb, float) and abs(float(number) - bpb) < 0.05 and not backed(number)
    ]
    faults += [f"README.md: {', '.join(stale[:4])} in no log, result or submission.json"] if stale else []
    named = re.search(r"(?<!\d)([01]\.\d{3,})", a.folder.resolve().name)
    if named and isinstance(bpb, float) and abs(float(named[1]) - bpb) > 0.5 * 10 ** -len(named[1].split(".")[1]):
        faults.append(f"the folder is named {named[1]}, its val_bpb is {bpb}")
    return verdict_of(
        faults,
        f"{len(logs)} logs, {len(results)} results: {len(quoted)} numbers of the README and submission.json agree with them",
    )


# ---------------------------------------------------------------- command line


def run_check(a: Audit, name: str) -> dict:
    begun = time.perf_counter()
    try:
        verdict, said = CHECKS[name](a)
    except NotRun as reason:
        verdict, said = NOT_RUN, str(reason)
    except Broken as reason:
        verdict, said = FAIL, str(reason)
    except Exception as error:  # a stranger's file may be anything: the audit goes on
        verdict, said = FAIL, f"the check could not be done: {type(error).__name__}: {error}"
    return {"verdict": verdict, "evidence": said, "seconds": round(time.perf_counter() - begun, 1)}


def condition_verdicts(found: dict[str, dict]) -> dict[str, dict]:
    """The conditions of result.json: the worst verdict of the checks that each rests on."""
    order, verdicts = (FAIL, DISPUTED, NOT_RUN, PASS), {}
    for condition, names in CONDITIONS.items():
        rows = [(name, row) for name, row in found.items() if name.startswith(names)]
        if rows:
            worst = min(rows, key=lambda row: order.index(row[1]["verdict"]))
            verdicts[condition] = {"verdict": worst[1]["verdict"], "reason": f"{worst[0]}: {worst[1]['evidence']}"}
    return verdicts


def run_checks(a: Audit, names: list[str], say: Callable = lambda line: None, workers: int = 1) -> dict[str, dict]:
    """Every named check, in parallel; results in the order of the names."""
    begun = time.perf_counter()

    def one(name):
        row = run_check(a, name)
        say(f"[{time.perf_counter() - begun:5.0f} s] {name}: {row['verdict']} ({row['seconds']:.0f} s)")
        return row

    # The longest first, so that none is left over alone.
    costly = sorted(
        names, key=lambda name: -int(re.sub(r"\D", "", name) or (2 if name in ("reload", "worlds", "training") else 0))
    )
    with ThreadPoolExecutor(workers) as pool:
        rows = dict(zip(costly, pool.map(one, costly)))
    return {name: rows[name] for name in names}


def table(found: dict[str, dict], width: int = 110) -> str:
    lines = [f"{'check':16s} {'verdict':9s} {'s':>5s}  evidence"]
    for name, row in found.items():
        words, rows = row["evidence"].split(), [""]
        for word in words:
            if len(rows[-1]) + len(word) > width:
                rows.append("")
            rows[-1] += (" " if rows[-1] else "") + word
        lines.append(f"{name:16s} {row['verdict']:9s} {row['seconds']:5.1f}  {rows[0]}")
        lines += [" " * 34 + rest for rest in rows[1:]]
    return "\n".join(lines)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT_DIR", help="folder with train_gpt.py and model.bin")
    parser.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="the data folder it was scored on (default: DATA_PATH of the environment)",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", action="store_true", help="print audit.json instead of the table")
    parser.add_argument("--only", nargs="+", metavar="CHECK", help=f"of {', '.join(CHECKS)}")
    parser.add_argument("--skip", nargs="+", metavar="CHECK", default=[])
    parser.add_argument(
        "--targets", type=int, default=6000, help="validation targets of the tampered runs (default 6000)"
    )
    parser.add_argument(
        "--timeout", type=float, default=3600.0, metavar="SECONDS", help="longest single run of the script"
    )
    parser.add_argument(
        "--workers", type=int, default=0, help="checks at a time (default: the cores, at most 4; 1 on a GPU)"
    )
    parser.add_argument(
        "--seeds",
        nargs="+",
        type=Path,
        default=[],
        metavar="DIR",
        help="folders of other seeds of the same configuration",
    )
    parser.add_argument(
        "--baseline", default="", metavar="BPB,...", help="BPB of a baseline's seeds, for the Welch test"
    )
    args = parser.parse_args(argv)
    for name in (args.only or []) + args.skip:
        if name not in CHECKS:
            parser.error(f"{name} is no check; there are {', '.join(CHECKS)}")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    data = args.data or (Path(os.environ["DATA_PATH"]) if os.environ.get("DATA_PATH") else None)
    names = [name for name in args.only or CHECKS if name not in args.skip]
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="golf_audit_") as work:
        try:
            artifact = Artifact(args.artifact, Path(work), args.device, args.timeout)
            baseline = tuple(float(value) for value in args.baseline.split(",") if value)
            audit = Audit(artifact, data.resolve() if data else None, args.targets, tuple(args.seeds), baseline)
        except (NotRun, Broken, ValueError) as error:
            print(f"audit.py: {error}", file=sys.stderr)
            return 2
        workers = args.workers or (
            min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(), 4)
            if args.device == "cpu"
            else 1
        )
        found = run_checks(audit, names, lambda line: print(line, file=sys.stderr, flush=True), workers)
    files = {
        name: {"sha256": file_sha256(args.artifact / name), "bytes": (args.artifact / name).stat().st_size}
        for name in ("train_gpt.py", "model.bin")
    }
    report = {
        "artifact": files,
        "device": args.device,
        "data": str(data) if data else None,
        "checks": found,
        "verdicts": condition_verdicts(found),
    }
    part = args.artifact / "audit.json.part"
    part.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    os.replace(part, args.artifact / "audit.json")
    if args.json:
        print(json.dumps(report, indent=1))
    else:
        print(table(found))
        counts = collections.Counter(row["verdict"] for row in found.values())
        print(
            f"\n{args.artifact}: {', '.join(f'{count} {verdict}' for verdict, count in counts.items())} in {time.perf_counter() - begun:.0f} s; "
            f"train_gpt.py {files['train_gpt.py']['sha256'][:12]}, model.bin {files['model.bin']['sha256'][:12]}"
        )
    return 1 if any(row["verdict"] == FAIL for row in found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
