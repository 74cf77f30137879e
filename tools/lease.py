"""Half an hour on a machine with GPUs, as one queue of runs that outlives the call that started it.

    lease.py unpack  ROOT FOLDER...                 carried corpus files, FlashAttention kit and wheels, to ROOT
    lease.py prepare ROOT --prepare-data FILE ...   documents in one fixed random order -> shards in ROOT/data
    lease.py start   ROOT QUEUE.json                start the queue in a session of its own and return at once
    lease.py status  ROOT [--wait SECONDS] [--out OUT]   one line for each run, when the queue ends or the time is over;
                                                    fails at once where there is no queue: the machine is another one
    lease.py stop    ROOT                           end every run and the queue
    lease.py collect ROOT OUT [--ledgers]           logs.tar.xz, runs.json, docs.npz (bits of each document) in OUT
    lease.py score   SCRIPT OUT.npy                 nats of the trained weights in ARTIFACT_DIR, one per target

A machine that is idle for half a minute between two calls is given back with all that lies on it. So every call is
written beforehand and all are sent together; the queue holds everything; the calls after `start` are the same `status
ROOT --wait 570 --out $OUT` again and again, and each brings back what there is so far. tools/lease_report.py prints the
tables.

A queue is {"seconds": limit, "gpus": 4, "env": {...}, "runs": [...]}. A run has a `name` (GROUP_sSEED where groups are
to be compared), a `script`, and optionally
    scale       third: 4 GPUs, 400 s, 786,432 tokens a step; tenth: 1 GPU, 480 s, 196,608 (`gpus` overrides)
    seed, env_file, env     settings, NAME=value words; later ones win
    after       conditions to start: NAME (that run has ended) or NAME:PATTERN (its log says so)
    gate        conditions under which it may leave its start-up, where it waits for the file LEASE_GATE, using no GPU
    shares      true: runs beside whatever is there, as far as memory goes
    memory      GiB it may take on each of its GPUs (48; 24 where it shares them; at its gate 6). It starts, and leaves
                its gate, where the sum over the runs of each GPU stays within the queue's `memory` (78)
    continues   a run whose ARTIFACT_DIR it uses; its score is that run's `pass` (adapted)
    command     words to run in place of the script
    curve       NAME@BUDGET: its trained BPB belongs to that point of that curve (tools/lease_report.py --curve)
"""

import argparse
import copy
import hashlib
import importlib.util
import itertools
import json
import lzma
import math
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

SCALES = {
    "third": (4, "MAX_WALLCLOCK_SECONDS=400 TRAIN_BATCH_TOKENS=786432"),
    "tenth": (1, "MAX_WALLCLOCK_SECONDS=480 TRAIN_BATCH_TOKENS=196608"),
}
WAITING = "lease: waiting at the gate"  # a script with a gate prints it
PASSES = ("trained", "quantized", "adapted")
CARD_MEMORY, ALONE_MEMORY, SHARED_MEMORY, GATED_MEMORY = 78, 48, 24, 6  # GiB: of an H100, and of runs on it
NO_MULTICAST = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NVSHMEM_DISABLE_NVLS": "1"}


# ---------------------------------------------------------------- the machine's folder


def unpack(root: Path, folders: list[Path]) -> None:
    """Puts what was carried where later steps look: *.jsonl.xz in corpus/, FlashAttention in fa3/, wheels in site/."""
    for path in (path for folder in folders for path in sorted(folder.iterdir())):
        if path.name.endswith(".jsonl.xz"):
            (root / "corpus").mkdir(parents=True, exist_ok=True)
            shutil.copy(path, root / "corpus" / path.name)
        elif path.name == "fa3.so.xz":
            (root / "fa3").mkdir(parents=True, exist_ok=True)
            with open(root / "fa3" / "fa3.so", "wb") as file:
                subprocess.run(["xz", "-dc", "-T8", str(path)], stdout=file, check=True)
        elif path.name.startswith("libcudart"):
            (root / "fa3").mkdir(parents=True, exist_ok=True)
            shutil.copy(path, root / "fa3" / path.name)
        elif path.suffix == ".whl":
            options = "-m pip install -q --no-index --no-deps --no-compile --target".split()
            subprocess.run([sys.executable, *options, root / "site", path], check=True)


def numeric(path: Path) -> list:
    """docs-2 before docs-10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)]


def read_lines(path: Path) -> list[bytes]:
    return [line for line in lzma.decompress(path.read_bytes()).splitlines(keepends=True) if not line.isspace()]


def write_documents(corpus: Path, pattern: str, out: Path, seed: int) -> int:
    """Writes val.jsonl (as it is) and train.jsonl (files in numeric order, then one shuffle by `seed`).

    Returns the number of validation documents."""
    paths = sorted(corpus.glob(pattern), key=numeric)
    if not paths or not (corpus / "val-web.jsonl.xz").exists():
        raise SystemExit(f"{corpus}: needs val-web.jsonl.xz and files {pattern}")
    with ThreadPoolExecutor(16) as pool:
        val, *parts = pool.map(read_lines, [corpus / "val-web.jsonl.xz", *paths])
    train = list(itertools.chain(*parts))
    random.Random(seed).shuffle(train)
    out.mkdir(parents=True, exist_ok=True)
    (out / "val.jsonl").write_bytes(b"".join(val))
    with open(out / "train.jsonl", "wb") as file:
        file.writelines(train)
    return len(val)


def prepare(root: Path, args: argparse.Namespace) -> None:
    text = root / f"text-{args.out}"
    val_docs = write_documents(root / "corpus", args.docs, text, args.seed)
    command = [sys.executable, args.prepare_data, "--source", text / "val.jsonl", text / "train.jsonl"]
    command += ["--val-docs", str(val_docs), "--tokenizer", args.tokenizer, "--out", root / args.out]
    command += ["--shard-tokens", str(args.shard_tokens), *args.more.split()]
    subprocess.run(command, check=True)
    shutil.rmtree(text)


# ---------------------------------------------------------------- the queue


class Job:
    """One run of the queue and what it is doing."""

    def __init__(self, root: Path, entry: dict):
        self.entry, self.name, self.folder = entry, entry["name"], root / "runs" / entry["name"]
        self.artifacts = root / "runs" / entry.get("continues", entry["name"])
        scale = SCALES.get(entry.get("scale", ""), (1, ""))
        self.gpus_wanted, self.scale_words = entry.get("gpus", scale[0]), scale[1]
        self.state, self.gpus, self.child, self.begun, self.ended, self.rc = "waits", [], None, 0.0, 0.0, None

    def says(self, pattern: str) -> bool:
        path = self.folder / "console.log"
        return path.exists() and re.search(pattern, path.read_text(errors="replace")) is not None

    @property
    def gated(self) -> bool:
        closed = "gate" in self.entry and not (self.folder / "gate").exists()
        return self.state == "runs" and closed and self.says(WAITING)

    @property
    def memory(self) -> float:
        return self.entry.get("memory", SHARED_MEMORY if self.entry.get("shares") else ALONE_MEMORY)

    def cards(self, gpus: list[int]) -> list[int]:
        """The GPUs that it will use, where its own settings name them."""
        named = self.words().get("CUDA_VISIBLE_DEVICES")
        return [int(gpu) for gpu in named.split(",")] if named else gpus

    @property
    def busy(self) -> bool:
        """Whether others must stay away from its GPUs."""
        return self.state == "runs" and not self.entry.get("shares") and not self.gated

    def words(self) -> dict[str, str]:
        """Its own settings."""
        file = Path(self.entry["env_file"]).read_text() if "env_file" in self.entry else ""
        lines = [line for line in file.splitlines() if not line.startswith("#")]
        lines += [self.scale_words, self.entry.get("env", "")]
        return dict(word.split("=", 1) for line in lines for word in shlex.split(line))

    def start(self, root: Path, queue: dict, gpus: list[int]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        site, threads = root / "site", max((os.cpu_count() or 1) // queue.get("gpus", 1), 1)
        env = NO_MULTICAST | os.environ
        env["PYTHONUNBUFFERED"], env["OMP_NUM_THREADS"] = "1", str(threads)
        env["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, gpus))
        env["PYTHONPATH"] = f"{site}:{os.environ.get('PYTHONPATH', '')}"
        env["PATH"] = f"{os.environ['PATH']}:{site}/bin"
        env["TORCHINDUCTOR_CACHE_DIR"], env["TRITON_CACHE_DIR"] = f"{root}/cache/inductor", f"{root}/cache/triton"
        env["DATA_PATH"], env["ARTIFACT_DIR"] = str(root / "data"), str(self.artifacts)
        if (root / "fa3" / "fa3.so").exists():
            env["FA3_LIBRARY"] = f"{root}/fa3/fa3.so"
            env["LD_LIBRARY_PATH"] = f"{root}/fa3:{os.environ.get('LD_LIBRARY_PATH', '')}"
        if "seed" in self.entry:
            env["SEED"] = str(self.entry["seed"])
        if "script" in self.entry:
            env["LEDGER_PATH"] = str(self.folder / "ledger.npy")
        if "gate" in self.entry:
            env["LEASE_GATE"] = str(self.folder / "gate")
        env |= queue.get("env", {}) | self.words()
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={len(gpus)}"]
        launcher = launcher if len(gpus) > 1 else [sys.executable]
        command = self.entry.get("command") or [*launcher, self.entry["script"]]
        with open(self.folder / "console.log", "ab") as log:
            where = {"cwd": self.folder, "stdout": log, "stderr": log, "start_new_session": True}
            self.child = subprocess.Popen(command, env=env, **where)
        self.state, self.gpus, self.begun = "runs", gpus, time.time()

    def poll(self) -> None:
        """Notes its end, and keeps its result beside its log: a later run may overwrite that in the artifact folder."""
        if self.state == "runs" and (rc := self.child.poll()) is not None:
            self.state, self.rc, self.ended = "ended" if rc == 0 else f"failed({rc})", rc, time.time()
            evaluates = self.words().get("TTT_EVAL_ONLY") == "1"
            path = self.artifacts / ("eval_result.json" if evaluates else "result.json")
            if "script" in self.entry and path.exists() and path != self.folder / "result.json":
                shutil.copy(path, self.folder / "result.json")

    def stop(self, grace: float = 8.0) -> None:
        if self.state == "runs":
            family = descendants(self.child.pid)
            os.killpg(self.child.pid, signal.SIGTERM)
            try:
                self.child.wait(grace)
            except subprocess.TimeoutExpired:
                pass
            for pid in [*family, self.child.pid]:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            self.child.wait()
            self.poll()

    def describe(self) -> dict:
        return {key: getattr(self, key) for key in ("entry", "state", "gated", "gpus", "begun", "ended", "rc")}


def descendants(pid: int) -> list[int]:
    """Children of a process and theirs: torchrun's workers lead sessions of their own."""
    try:
        listings = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    except OSError:
        return []
    children = [int(word) for listing in listings for word in listing.split()]
    return children + [below for child in children for below in descendants(child)]


class Queue:
    def __init__(self, root: Path, queue: dict):
        self.root, self.queue, self.begun = root, queue, time.time()
        self.jobs = {entry["name"]: Job(root, entry) for entry in queue["runs"]}
        for job in self.jobs.values():
            wanted = [*job.entry.get("after", []), *job.entry.get("gate", []), job.entry.get("continues", job.name)]
            if unknown := [name for name in wanted if name.split(":")[0] not in self.jobs]:
                raise SystemExit(f"{job.name}: no run is called {unknown[0].split(':')[0]}")
            if job.gpus_wanted > queue.get("gpus", 1):
                raise SystemExit(f"{job.name}: wants {job.gpus_wanted} GPUs of {queue.get('gpus', 1)}")
            if job.memory > queue.get("memory", CARD_MEMORY):
                raise SystemExit(f"{job.name}: wants {job.memory} GiB of {queue.get('memory', CARD_MEMORY)}")

    def holds(self, conditions: list[str]) -> bool:
        return all(
            self.jobs[name].ended or (pattern and self.jobs[name].says(pattern))
            for name, _, pattern in (condition.partition(":") for condition in conditions)
        )

    def free(self) -> list[int]:
        taken = {gpu for job in self.jobs.values() if job.busy for gpu in job.gpus}
        return [gpu for gpu in range(self.queue.get("gpus", 1)) if gpu not in taken]

    def fits(self, job: Job, gpus: list[int]) -> bool:
        """Whether the job would find its memory on all of these GPUs beside the others that are there."""
        held = dict.fromkeys(gpus, job.memory)
        for other in self.jobs.values():
            if other.state == "runs" and other is not job:
                for gpu in set(held) & set(other.cards(other.gpus)):
                    held[gpu] += GATED_MEMORY if other.gated else other.memory
        return max(held.values(), default=0) <= self.queue.get("memory", CARD_MEMORY)

    def turn(self) -> bool:
        """Starts and releases what may go on, in the queue's order; True while something is left to do."""
        for job in self.jobs.values():
            job.poll()
        for job in self.jobs.values():
            ready = job.gated and self.holds(job.entry["gate"]) and set(job.gpus) <= set(self.free())
            if ready and self.fits(job, job.gpus):
                (job.folder / "gate").touch()
        for job in self.jobs.values():
            parent = [job.entry["continues"]] if "continues" in job.entry else []
            if job.state != "waits" or not self.holds(job.entry.get("after", []) + parent):
                continue
            gpus = list(range(self.queue.get("gpus", 1))) if job.entry.get("shares") else self.free()
            gpus = gpus[: job.gpus_wanted]
            if len(gpus) < job.gpus_wanted or not self.fits(job, job.cards(gpus)):
                if job.entry.get("shares"):
                    continue
                break  # nothing behind it in the queue may take the GPUs that it waits for
            job.start(self.root, self.queue, gpus)
        state = {name: job.describe() for name, job in self.jobs.items()}
        left = any(job.state in ("waits", "runs") for job in self.jobs.values())
        part = self.root / "state.json.part"
        about = {"pid": os.getpid(), "begun": self.begun, "ended": not left, "runs": state}
        part.write_text(json.dumps(about, indent=1))
        part.replace(self.root / "state.json")
        return left

    def run(self) -> None:
        """Until all runs have ended, the limit is reached, or ROOT/stop appears."""
        while self.turn():
            if time.time() - self.begun > self.queue.get("seconds", math.inf) or (self.root / "stop").exists():
                for job in self.jobs.values():
                    job.stop()
                    job.state = "left out" if job.state == "waits" else job.state
            time.sleep(0.3)


def start(root: Path, path: Path) -> None:
    Queue(root, json.loads(path.read_text()))  # refuses a bad one here, where it is read
    root.mkdir(parents=True, exist_ok=True)
    for stale in ("stop", "state.json"):
        (root / stale).unlink(missing_ok=True)
    shutil.copy(path, root / "queue.json")
    with open(root / "queue.log", "ab") as log:
        detached = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log, "start_new_session": True}
        subprocess.Popen([sys.executable, __file__, "run", str(root)], **detached)


def status(root: Path, wait: float, out: Path | None) -> None:
    """Prints one line for each run, once the queue has ended or `wait` seconds are over, and collects in `out`."""
    if not (root / "queue.json").exists():
        raise SystemExit(f"{root}: no queue was started here; if one was, this is another machine: give it back")
    deadline, state = time.time() + wait, read_state(root)
    while not state["ended"] and time.time() < deadline:
        time.sleep(min(1.0, max(deadline - time.time(), 0.0)))
        state = read_state(root)
    print(f"queue: {'ended' if state['ended'] else 'on its way'}, {time.time() - state['begun']:.0f} s")
    for name, run in state["runs"].items():
        log = root / "runs" / name / "console.log"
        lines = log.read_text(errors="replace").split("\n") if log.exists() else []
        last = next((line for line in reversed(lines) if line.strip()), "")
        seconds = (run["ended"] or time.time()) - run["begun"] if run["begun"] else 0
        doing = "at its gate" if run["gated"] else run["state"]
        print(f"{name:24s} {doing:12s} {seconds:6.0f} s  {last.strip()[:150]}")
    if out:
        collect(root, out, ledgers=False)


def read_state(root: Path) -> dict:
    path = root / "state.json"
    return json.loads(path.read_text()) if path.exists() else {"begun": time.time(), "ended": False, "runs": {}}


# ---------------------------------------------------------------- what comes back


def read_shards(folder: Path, pattern: str) -> np.ndarray:
    return np.concatenate([np.fromfile(path, "<u2", offset=1024) for path in sorted(folder.glob(pattern))])


class Documents:
    """The validation documents: bytes of each, and the half each belongs to by a hash of its tokens."""

    def __init__(self, data: Path):
        tokens, sizes = read_shards(data, "fineweb_val_0*.bin"), read_shards(data, "fineweb_val_bytes_0*.bin")
        self.tokens = tokens
        starts = np.flatnonzero(tokens == 1)
        ends = np.append(starts[1:], len(tokens))
        # Of each target: that of the token before it.
        self.document = np.repeat(np.arange(len(starts)), ends - starts)[:-1]
        self.bytes = np.bincount(self.document, sizes[1:], len(starts))
        self.in_b = np.array(
            [hashlib.sha256(tokens[start:end].tobytes()).digest()[0] & 1 for start, end in zip(starts, ends)], bool
        )

    def joined(self, space: int, operators: list[int]) -> "Documents":
        """The documents as a run with JOIN_OPERATORS reads them: a space and the operator behind it are one target."""
        pairs = (self.tokens[:-1] == space) & np.isin(self.tokens[1:], operators)
        other = copy.copy(self)
        other.document = self.document[~pairs]
        return other

    def bits(self, nats: np.ndarray) -> np.ndarray:
        """Bits of each document; NaN where a target of it was not scored."""
        whole = np.full(len(self.document), np.nan)
        whole[: len(nats)] = nats
        return np.bincount(self.document, whole / math.log(2), len(self.bytes))


PUBLIC = {  # what #1855 and its kin print
    "steps": r"stopping_early: .*step: (\d+)/",
    "train_ms": r"stopping_early: .*train_time: (\d+)ms",
    "loops_on": r"layer_loop:enabled step:(\d+)",
    "trained": r"post-ema val_loss:\S+ val_bpb:(\S+)",
    "trained_ms": r"post-ema .*eval_time:(\d+)ms",
    "quantized": r"diagnostic quantized val_loss:\S+ val_bpb:(\S+)",
    "quantized_ms": r"diagnostic quantized .*eval_time:(\d+)ms",
    "adapted": r"quantized_ttt_phased val_loss:\S+ val_bpb:(\S+)",
    "adapted_ms": r"quantized_ttt_phased .*eval_time:(\d+)ms",
    "bytes": r"Total submission size [^:]*: (\d+) bytes",
    "hessians_s": r"Hessians in (\S+)s",
    "gptq_s": r"GPTQ and LQER (\S+)s",
    "compression_s": r"lease: compression (\S+)s",
}


def summarize(folder: Path) -> dict:
    """Counts, seconds, bytes and BPB of a run: from result.json where there is one, else from the log."""
    if (path := folder / "result.json").exists():
        result = json.loads(path.read_text())
        training = result.get("training", {})
        return {
            "bpb": result["bpb"],
            "bytes": result["bytes"].get("total"),
            "seconds": result["seconds"],
            "steps": training.get("steps"),
            "tokens": training.get("tokens"),
            "hardware": result.get("hardware"),
            "source_sha256": result.get("source_sha256"),
        }
    log = folder / "console.log"
    text = log.read_text(errors="replace") if log.exists() else ""
    found = {key: float(match[1]) for key, pattern in PUBLIC.items() if (match := re.search(pattern, text))}
    batch = re.search(r"train_batch_tokens: (\d+)", text)
    seconds = {
        key[:-2].rstrip("_"): value / (1000 if key.endswith("_ms") else 1)
        for key, value in found.items()
        if key.endswith(("_s", "_ms"))
    }
    steps = int(found["steps"]) if "steps" in found else None
    return {
        "bpb": {name: found[name] for name in PASSES if name in found},
        "bytes": int(found["bytes"]) if "bytes" in found else None,
        "seconds": seconds | ({"steps": seconds.pop("train")} if "train" in seconds else {}),
        "steps": steps,
        "tokens": steps * int(batch[1]) if steps and batch else None,
    }


def found_nats(folder: Path, entry: dict, bpb: dict) -> dict[str, Path]:
    """Files of nats that a run left, by pass. The ledger of our script is that of its last pass."""
    found = {path.stem.removeprefix("nats_"): path for path in folder.glob("nats_*.npy")}
    ledger = folder / "ledger.npy"
    if bpb and ledger.exists() and ledger.stat().st_size:
        found[entry.get("pass") or [name for name in PASSES if name in bpb][-1]] = ledger
    return found


def space_and_operators(model: Path) -> tuple[int, list[int]]:
    """Ids of the space and of the operators that JOIN_OPERATORS joins to it."""
    import sentencepiece

    sp = sentencepiece.SentencePieceProcessor(model_file=str(model))
    space, *operators = sp.piece_to_id(["\u2581", "\ue001", "\ue002"])
    return space, operators


def documents_of(run: Path, documents: Documents, model: Path) -> Documents:
    """The documents as this run has read them."""
    path = run / "result.json"
    if not path.exists() or not json.loads(path.read_text()).get("settings", {}).get("join_operators"):
        return documents
    return documents.joined(*space_and_operators(model))


def collect(root: Path, out: Path, ledgers: bool) -> None:
    """What there is so far, in few and small files; logs alone where no data were prepared."""
    out.mkdir(parents=True, exist_ok=True)
    with tarfile.open(out / "logs.tar.xz", "w:xz") as tar:
        logs = [path for pattern in ("runs/*/*.log", "runs/*/*.json", "queue.*") for path in sorted(root.glob(pattern))]
        for path in logs:
            tar.add(path, path.relative_to(root))
    if not (root / "data" / "manifest.json").exists():
        return
    manifest, documents = json.loads((root / "data" / "manifest.json").read_text()), Documents(root / "data")
    arrays, runs = {"bytes": documents.bytes, "in_b": documents.in_b}, {}
    for name, run in read_state(root)["runs"].items():
        folder, parent = root / "runs" / name, run["entry"].get("continues", name)
        runs[name] = run | summarize(folder)
        for which, path in found_nats(folder, run["entry"], runs[name]["bpb"]).items():
            try:
                nats = np.load(path)
            except (ValueError, EOFError):  # it is being written
                continue
            read = documents_of(folder, documents, root / "data" / "tokenizer.model")
            arrays[f"{parent}/{which}"] = read.bits(nats)
            if ledgers:
                data = nats.astype("<f4").tobytes()
                (out / f"{parent}_{which}.f32.xz").write_bytes(lzma.compress(data, preset=1))
    np.savez_compressed(out / "docs.npz", **arrays)
    listing = ["nvidia-smi", "-L"] if shutil.which("nvidia-smi") else ["true"]
    gpus = re.sub(r" \(UUID.*?\)", "", subprocess.run(listing, capture_output=True, text=True).stdout)
    about = {"gpus": gpus, "data": {key: manifest[key] for key in ("train", "val", "duplicates_dropped")}, "runs": runs}
    (out / "runs.json").write_text(json.dumps(about, indent=1))


def score(script: Path, out: Path) -> None:
    """Nats of the trained weights in ARTIFACT_DIR by the scoring of our script."""
    spec = importlib.util.spec_from_file_location("scored_train_gpt", script)
    ours = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = ours
    spec.loader.exec_module(ours)
    cfg = ours.configure(os.environ | {"QUANTIZE_ONLY": "1"})
    run = ours.Run(cfg)
    run.prepare()
    model = run.new_model()
    ours.load_trained(run, model)
    scoring = run.scoring(model, "trained")
    print(f"trained: {ours.score_stream(scoring):.6f} BPB")
    np.save(out, scoring.ledger.nats)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    unpacking, preparing, starting, running, asking, stopping, collecting, scoring = (
        commands.add_parser(name)
        for name in ("unpack", "prepare", "start", "run", "status", "stop", "collect", "score")
    )
    for command in (unpacking, preparing, starting, running, asking, stopping, collecting):
        command.add_argument("root", type=Path)
    unpacking.add_argument("folders", type=Path, nargs="+")
    preparing.add_argument("--prepare-data", type=Path, required=True, help="the prepare_data.py to run")
    preparing.add_argument("--tokenizer", type=Path, required=True)
    preparing.add_argument("--docs", default="docs-*.jsonl.xz", help="training files in ROOT/corpus")
    preparing.add_argument("--out", default="data", help="folder in ROOT")
    preparing.add_argument("--seed", type=int, default=0, help="of the order of the training documents")
    preparing.add_argument("--shard-tokens", type=int, default=20_000_000, help="public scripts want a shard a rank")
    preparing.add_argument("--more", default="", help="further options of prepare_data.py, in one word")
    starting.add_argument("queue", type=Path)
    asking.add_argument("--wait", type=float, default=0.0)
    asking.add_argument("--out", type=Path, help="also collect there")
    collecting.add_argument("out", type=Path)
    collecting.add_argument("--ledgers", action="store_true", help="also the nats of every target, float32")
    scoring.add_argument("script", type=Path)
    scoring.add_argument("out", type=Path)
    args = parser.parse_args(argv)
    if args.command == "stop":
        (args.root / "stop").touch()
    elif args.command == "run":
        Queue(args.root, json.loads((args.root / "queue.json").read_text())).run()
    elif args.command == "unpack":
        unpack(args.root, args.folders)
    elif args.command == "prepare":
        prepare(args.root, args)
    elif args.command == "start":
        start(args.root, args.queue)
    elif args.command == "status":
        status(args.root, args.wait, args.out)
    elif args.command == "collect":
        collect(args.root, args.out, args.ledgers)
    else:
        score(args.script, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
