"""The artifact in clean folders and clean processes, and its source read without running it."""

import ast
import base64
import bz2
import json
import lzma
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tools.audit.outcome import Broken, NotRun
from tools.audit.tamper import Dataset
from tools.runs import refuse_constant

LARGEST_SOURCE = 32 << 20


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
    """The last line that a rank wrote and, under torchrun, which rank failed first and how; torchrun's own report
    follows and hides both."""
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
    """train_gpt.py and model.bin of a folder, run in clean folders and clean processes.

    A folder without them, as records are published, is only read."""

    def __init__(self, folder: Path, work: Path, device: str, timeout: float, launcher: Callable = launch):
        if not any(next(folder.glob(pattern), None) for pattern in ("train_gpt.py", "*.log", "README.md", "*.json")):
            raise NotRun(f"{folder}: holds no train_gpt.py, log or README.md; give the folder of a finished run")
        self.folder = folder
        self.work = work
        self.device = device
        self.timeout = timeout
        self.launcher = launcher
        self.result = read_json(folder / "result.json")
        self.settings = self.result.get("settings", {})
        self.runs = 0
        self.lock = threading.Lock()

    def environment(self, data: Path, env: dict) -> dict[str, str]:
        """What a run sees: the machine's own variables, the data, one thread, and `env`; no setting of the caller's."""
        kept = {
            name: value
            for name, value in os.environ.items()
            if name in ("PATH", "TMPDIR", "LD_LIBRARY_PATH", "LANG")
            or name.startswith(("CUDA_", "NVIDIA_", "NCCL_"))
            or (name in ("ATTENTION", "FA3_LIBRARY") and self.device != "cpu")  # a CPU has one backend
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
        """A new folder that holds this script, or the named files of the artifact, and nothing else.

        Raises `NotRun` where the artifact lacks one of them."""
        for name in names:
            if not (self.folder / name).is_file():
                raise NotRun(f"no {name} in the folder")
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
        """Run the script of a clean folder; raises `Broken` with its last words where it fails."""
        code, output = self.launcher(folder, env, world, blocked, self.timeout)
        if code != 0:
            raise Broken(f"exit status {code}: {last_words(output)}")

    def score(self, data: Dataset | Path, world: int = 1, env: dict | None = None, blocked: bool = False) -> Scored:
        """Score a validation stream; ``data`` is a folder that lies ready, or is written to one."""
        folder = self.clean_folder(None, "train_gpt.py", "model.bin")
        path = data if isinstance(data, Path) else data.write(folder.with_name(folder.name + "_data"))
        ledger = folder / "ledger.npy"
        # Several run at once, so no clock of theirs is that of a run: no budget.
        wanted = {"TTT_EVAL_ONLY": 1, "MAX_WALLCLOCK_SECONDS": 0, "LEDGER_PATH": ledger}
        wanted |= {**self.short_segments(data), **(env or {})}
        self.run(folder, self.environment(path.resolve(), wanted), world, blocked)
        if not ledger.is_file():
            raise Broken("no ledger at LEDGER_PATH")
        result = read_json(folder / "eval_result.json")
        if not result.get("bpb"):
            raise Broken("no eval_result.json with a bpb")
        return Scored(np.load(ledger, allow_pickle=False), result)

    def short_segments(self, data: Dataset | Path) -> dict:
        """An excerpt that would lie within the first segment gets some four, so that state crosses documents in it."""
        growing = "segment_first_docs" in self.settings and not self.settings.get("phased_ttt_prefix_docs")
        if isinstance(data, Path) or not growing or len(data.starts) > self.settings["segment_first_docs"]:
            return {}
        return {"SEGMENT_FIRST_DOCS": -(-len(data.starts) // 4)}

    def train(self, script: bytes, data: Dataset, env: dict) -> dict[str, bytes]:
        """The files of a short training with this script and this validation stream: {"train_gpt.py", "model.bin"}."""
        folder = self.clean_folder(script)
        out = folder.with_name(folder.name + "_out")
        path = data.write(folder.with_name(folder.name + "_data"))
        self.run(folder, self.environment(path, {**env, "ARTIFACT_DIR": out}))
        return {name: (out / name).read_bytes() for name in ("train_gpt.py", "model.bin")}


def read_json(path: Path) -> dict:
    """The object of a JSON file, empty where there is no such file; raises `Broken` where it is something else."""
    try:
        text = path.read_text(encoding="utf-8") if path.exists() else "{}"
        value = json.loads(text, parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:
        raise Broken(f"{path.name}: not JSON ({error})") from None
    except OSError as error:  # a folder of that name, for one
        raise Broken(f"{path.name}: cannot be read ({error.strerror})") from None
    if not isinstance(value, dict):
        raise Broken(f"{path.name}: not a JSON object")
    return value


def unpack(script: bytes) -> str:
    """The readable source of a script, without running it.

    It is the script itself, or the largest compressed string in it: latin-1, base85 or base64; LZMA, bz2 or zlib.
    Raises `Broken` where the script executes a string that cannot be read so. What this Python does not parse is taken
    as it is: it may be in the syntax of a newer one.
    """
    try:
        text = script.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = script.decode("latin-1")
    try:
        blob = max(byte_strings(text), key=len, default=b"")
    except (SyntaxError, ValueError, RecursionError):
        return text
    for decode in (bytes, base64.b85decode, base64.a85decode, base64.b64decode):
        for decompressor in (lzma.LZMADecompressor, bz2.BZ2Decompressor, zlib.decompressobj, raw_lzma):
            try:
                if source := inflate(decompressor(), decode(blob)).decode("utf-8"):  # else a beginning of nothing
                    return source
            except Broken:
                raise
            except Exception:  # another coding, or no code at all
                continue
    if "exec(" in text and len(blob) > 0.5 * len(script):
        raise Broken("the source is hidden: its largest string is executed and is no LZMA, bz2 or zlib stream")
    return text


def byte_strings(text: str) -> Iterator[bytes]:
    """The constants of a program that can hold bytes."""
    if text.startswith("# coding"):
        text = text.split("\n", 1)[1]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Constant):
            if isinstance(node.value, bytes):
                yield node.value
            elif isinstance(node.value, str) and node.value and max(map(ord, node.value)) < 256:
                yield node.value.encode("latin-1")


def raw_lzma() -> lzma.LZMADecompressor:
    """LZMA2 without a header, as minifiers write it."""
    return lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2, "preset": 9}])


def inflate(decompressor, blob: bytes) -> bytes:
    """What a stream holds. Raises `Broken` where that is no source by its size: a stranger's kilobytes can become
    gigabytes; and ValueError where the stream is cut short."""
    text = decompressor.decompress(blob, LARGEST_SOURCE + 1)
    if len(text) > LARGEST_SOURCE:
        raise Broken(f"its {len(blob):,} packed bytes hold more than {LARGEST_SOURCE:,} of source")
    if not decompressor.eof:
        raise ValueError("cut short")
    return text
