"""Half an hour on a machine with GPUs, as one queue of runs that outlives the call that started it.

    lease.py unpack  ROOT FOLDER...                 corpus files, FlashAttention kit and wheels that were carried, to ROOT
    lease.py prepare ROOT --prepare-data FILE ...   documents in one fixed random order -> shards in ROOT/data
    lease.py start   ROOT QUEUE.json                start the queue in a session of its own and return at once
    lease.py status  ROOT [--wait SECONDS]          one line for each run; waits until the queue ends, at most that long
    lease.py stop    ROOT                           end every run and the queue
    lease.py collect ROOT OUT [--ledgers]           logs.tar.xz, runs.json, docs.npz (bits of each document) in OUT
    lease.py score   SCRIPT OUT.npy                 nats of the trained weights in ARTIFACT_DIR, one per validation target
    lease.py report  FOLDER...                      tables of what was collected

A queue is {"seconds": limit, "gpus": 4, "env": {...}, "runs": [...]}. A run has a `name` (GROUP_sSEED where groups are to be
compared), a `script`, and optionally: `scale` (third: 4 GPUs, 400 s, 786,432 tokens a step; tenth: 1 GPU, 480 s, 196,608),
`gpus`, `seed`, `env_file` and `env` (NAME=value words; later ones win), `after` (conditions to start), `gate` (conditions under
which its start-up, waiting for the file LEASE_GATE, may go on; it holds no GPU while it waits), `frees` (a pattern of its log from
which on it needs no GPU), `shares` (runs beside whatever is there), `continues` (a run whose ARTIFACT_DIR it uses; its score is
that run's `pass`), `command` (words in place of the script). A condition is NAME (it has ended) or NAME:PATTERN (its log says so).
"""

import argparse
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
import statistics
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
NO_MULTICAST = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NVSHMEM_DISABLE_NVLS": "1"}


# ---------------------------------------------------------------- the machine's folder


def unpack(root: Path, folders: list[Path]) -> None:
    """Puts what was carried where later steps look: *.jsonl.xz in corpus/, the FlashAttention kit in fa3/, wheels in site/."""
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
            subprocess.run(
                [
                    sys.executable,
                    "-m",
                    "pip",
                    "install",
                    "-q",
                    "--no-index",
                    "--no-deps",
                    "--no-compile",
                    "--target",
                    str(root / "site"),
                    str(path),
                ],
                check=True,
            )


def numeric(path: Path) -> list:
    """docs-2 before docs-10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)]


def read_lines(path: Path) -> list[bytes]:
    return [line for line in lzma.decompress(path.read_bytes()).splitlines(keepends=True) if not line.isspace()]


def write_documents(corpus: Path, pattern: str, out: Path, seed: int) -> int:
    """Writes val.jsonl (as it is) and train.jsonl (files in numeric order, then one shuffle by `seed`); returns the number of
    validation documents."""
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
    command = [
        sys.executable,
        str(args.prepare_data),
        "--source",
        str(text / "val.jsonl"),
        str(text / "train.jsonl"),
        "--val-docs",
        str(val_docs),
        "--tokenizer",
        str(args.tokenizer),
        "--shard-tokens",
        str(args.shard_tokens),
        "--out",
        str(root / args.out),
    ]
    subprocess.run(command + args.more.split(), check=True)
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
        return (
            self.state == "runs" and "gate" in self.entry and not (self.folder / "gate").exists() and self.says(WAITING)
        )

    @property
    def busy(self) -> bool:
        """Whether others must stay away from its GPUs."""
        frees = self.entry.get("frees")
        return (
            self.state == "runs"
            and not self.entry.get("shares")
            and not self.gated
            and not (frees and self.says(frees))
        )

    def words(self) -> dict[str, str]:
        """Its own settings."""
        file = Path(self.entry["env_file"]).read_text() if "env_file" in self.entry else ""
        lines = [line for line in file.splitlines() if not line.startswith("#")] + [
            self.scale_words,
            self.entry.get("env", ""),
        ]
        return dict(word.split("=", 1) for line in lines for word in shlex.split(line))

    def start(self, root: Path, queue: dict, gpus: list[int]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        site, threads = root / "site", max((os.cpu_count() or 1) // queue.get("gpus", 1), 1)
        env = (
            NO_MULTICAST
            | os.environ
            | {
                "PYTHONUNBUFFERED": "1",
                "OMP_NUM_THREADS": str(threads),
                "CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus)),
                "PYTHONPATH": f"{site}:{os.environ.get('PYTHONPATH', '')}",
                "PATH": f"{os.environ['PATH']}:{site}/bin",
                "TORCHINDUCTOR_CACHE_DIR": str(root / "cache" / "inductor"),
                "TRITON_CACHE_DIR": str(root / "cache" / "triton"),
                "DATA_PATH": str(root / "data"),
                "ARTIFACT_DIR": str(self.artifacts),
            }
        )
        if (root / "fa3" / "fa3.so").exists():
            env |= {
                "FA3_LIBRARY": str(root / "fa3" / "fa3.so"),
                "LD_LIBRARY_PATH": f"{root}/fa3:{os.environ.get('LD_LIBRARY_PATH', '')}",
            }
        env |= {"SEED": str(self.entry["seed"])} if "seed" in self.entry else {}
        env |= {"LEDGER_PATH": str(self.folder / "ledger.npy")} if "script" in self.entry else {}
        env |= {"LEASE_GATE": str(self.folder / "gate")} if "gate" in self.entry else {}
        env |= queue.get("env", {}) | self.words()
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={len(gpus)}"]
        command = self.entry.get("command") or [
            *(launcher if len(gpus) > 1 else [sys.executable]),
            self.entry["script"],
        ]
        with open(self.folder / "console.log", "ab") as log:
            self.child = subprocess.Popen(
                command, env=env, cwd=self.folder, stdout=log, stderr=log, start_new_session=True
            )
        self.state, self.gpus, self.begun = "runs", gpus, time.time()

    def poll(self) -> None:
        """Notes its end, and keeps its result beside its log: a later run may overwrite the one in the artifact folder."""
        if self.state == "runs" and (rc := self.child.poll()) is not None:
            self.state, self.rc, self.ended = "ended" if rc == 0 else f"failed({rc})", rc, time.time()
            path = self.artifacts / ("eval_result.json" if "continues" in self.entry else "result.json")
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
        return {
            "entry": self.entry,
            "state": self.state,
            "gated": self.gated,
            "gpus": self.gpus,
            "begun": self.begun,
            "ended": self.ended,
            "rc": self.rc,
        }


def descendants(pid: int) -> list[int]:
    """Children of a process and theirs: torchrun's workers lead sessions of their own."""
    try:
        children = [
            int(word) for path in Path(f"/proc/{pid}/task").glob("*/children") for word in path.read_text().split()
        ]
    except OSError:
        return []
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

    def holds(self, conditions: list[str]) -> bool:
        return all(
            self.jobs[name].ended or (pattern and self.jobs[name].says(pattern))
            for name, _, pattern in (condition.partition(":") for condition in conditions)
        )

    def free(self) -> list[int]:
        taken = {gpu for job in self.jobs.values() if job.busy for gpu in job.gpus}
        return [gpu for gpu in range(self.queue.get("gpus", 1)) if gpu not in taken]

    def turn(self) -> bool:
        """Starts and releases what may go on, in the queue's order; True while something is left to do."""
        for job in self.jobs.values():
            job.poll()
        for job in self.jobs.values():
            if job.gated and self.holds(job.entry["gate"]) and set(job.gpus) <= set(self.free()):
                (job.folder / "gate").touch()
        for job in self.jobs.values():
            if job.state != "waits" or not self.holds(
                [*job.entry.get("after", []), *filter(None, [job.entry.get("continues")])]
            ):
                continue
            gpus = list(range(self.queue.get("gpus", 1))) if job.entry.get("shares") else self.free()
            if len(gpus) < job.gpus_wanted:
                break  # nothing behind it in the queue may take the GPUs that it waits for
            job.start(self.root, self.queue, gpus[: job.gpus_wanted])
        state = {name: job.describe() for name, job in self.jobs.items()}
        left = any(job.state in ("waits", "runs") for job in self.jobs.values())
        part = self.root / "state.json.part"
        part.write_text(
            json.dumps({"pid": os.getpid(), "begun": self.begun, "ended": not left, "runs": state}, indent=1)
        )
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
        subprocess.Popen(
            [sys.executable, __file__, "run", str(root)],
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )


def status(root: Path, wait: float) -> bool:
    """Prints one line for each run; True when the queue has ended."""
    deadline = time.time() + wait
    while True:
        path = root / "state.json"
        state = json.loads(path.read_text()) if path.exists() else {"begun": time.time(), "ended": False, "runs": {}}
        if state["ended"] or time.time() >= deadline:
            break
        time.sleep(min(1.0, max(deadline - time.time(), 0.0)))
    print(f"queue: {'ended' if state['ended'] else 'on its way'}, {time.time() - state['begun']:.0f} s")
    for name, run in state["runs"].items():
        log = root / "runs" / name / "console.log"
        lines = log.read_text(errors="replace").split("\n") if log.exists() else []
        last = next((line for line in reversed(lines) if line.strip()), "")
        seconds = (run["ended"] or time.time()) - run["begun"] if run["begun"] else 0
        print(
            f"{name:24s} {'at its gate' if run['gated'] else run['state']:12s} {seconds:6.0f} s  {last.strip()[:150]}"
        )
    return state["ended"]


# ---------------------------------------------------------------- what comes back


def read_shards(folder: Path, pattern: str) -> np.ndarray:
    return np.concatenate([np.fromfile(path, "<u2", offset=1024) for path in sorted(folder.glob(pattern))])


class Documents:
    """The validation documents: bytes of each, and the half each belongs to by a hash of its tokens."""

    def __init__(self, data: Path):
        tokens, sizes = read_shards(data, "fineweb_val_0*.bin"), read_shards(data, "fineweb_val_bytes_0*.bin")
        starts = np.flatnonzero(tokens == 1)
        ends = np.append(starts[1:], len(tokens))
        self.document = np.repeat(np.arange(len(starts)), ends - starts)[
            :-1
        ]  # of each target: that of the token before it
        self.bytes = np.bincount(self.document, sizes[1:], len(starts))
        self.in_b = np.array(
            [hashlib.sha256(tokens[start:end].tobytes()).digest()[0] & 1 for start, end in zip(starts, ends)], bool
        )

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


def collect(root: Path, out: Path, ledgers: bool) -> None:
    state = json.loads((root / "state.json").read_text())
    out.mkdir(parents=True, exist_ok=True)
    manifest = json.loads((root / "data" / "manifest.json").read_text())
    documents = Documents(root / "data")
    arrays, runs = {"bytes": documents.bytes, "in_b": documents.in_b}, {}
    for name, run in state["runs"].items():
        folder, parent = root / "runs" / name, run["entry"].get("continues", name)
        runs[name] = run | summarize(folder)
        found = {path.stem.removeprefix("nats_"): path for path in folder.glob("nats_*.npy")}
        if (folder / "ledger.npy").exists() and (folder / "ledger.npy").stat().st_size:
            found[run["entry"].get("pass") or next(p for p in reversed(PASSES) if p in runs[name]["bpb"])] = (
                folder / "ledger.npy"
            )
        for which, path in found.items():
            nats = np.load(path)
            arrays[f"{parent}/{which}"] = documents.bits(nats)
            if ledgers:
                with lzma.open(out / f"{parent}_{which}.f32.xz", "wb", preset=1) as file:
                    file.write(nats.astype("<f4").tobytes())
    np.savez_compressed(out / "docs.npz", **arrays)
    gpus = (
        subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout
        if shutil.which("nvidia-smi")
        else ""
    )
    data = {key: manifest[key] for key in ("train", "val", "duplicates_dropped")}
    (out / "runs.json").write_text(
        json.dumps({"gpus": re.sub(r" \(UUID.*?\)", "", gpus), "data": data, "runs": runs}, indent=1)
    )
    with tarfile.open(out / "logs.tar.xz", "w:xz") as tar:
        for path in [
            root / "queue.json",
            root / "queue.log",
            *sorted((root / "runs").glob("*/*.log")),
            *sorted((root / "runs").glob("*/*.json")),
        ]:
            if path.exists():
                tar.add(path, path.relative_to(root))


def score(script: Path, out: Path) -> None:
    """Nats of the trained weights in ARTIFACT_DIR by the scoring of our script."""
    spec = importlib.util.spec_from_file_location("scored_train_gpt", script)
    ours = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = ours
    spec.loader.exec_module(ours)
    import torch

    cfg = ours.configure(os.environ | {"QUANTIZE_ONLY": "1"})
    run = ours.Run(cfg)
    kind = torch.bfloat16 if run.ranks.device.type == "cuda" else torch.float32
    model = ours.GPT(cfg, run.attention, kind).to(run.ranks.device)
    ours.load_trained(run, model)
    ledger = run.ledger("trained")
    print(f"trained: {ours.Scorer(model, cfg, run.ranks, run.log).score(run.val, ledger, cfg.eval_stride):.6f} BPB")
    np.save(out, ledger.nats)


# ---------------------------------------------------------------- tables


def load(folders: list[Path]) -> tuple[dict, dict, dict]:
    """Runs, bits of documents by RUN/PASS, and the data of several collected folders, which must have scored the same documents."""
    runs, bits, data = {}, {}, None
    for folder in folders:
        found, arrays = json.loads((folder / "runs.json").read_text()), dict(np.load(folder / "docs.npz"))
        if data and (data["val"] != found["data"]["val"] or (bits["bytes"] != arrays["bytes"]).any()):
            raise SystemExit(f"{folder}: scored other documents than {folders[0]}")
        data, runs, bits = found["data"] | {"gpus": found["gpus"]}, runs | found["runs"], bits | arrays
    return runs, bits, data


def split_name(name: str) -> tuple[str, str]:
    """Group and seed of GROUP_sSEED."""
    match = re.fullmatch(r"(.*)_s(\d+)", name)
    return (match[1], match[2]) if match else (name, "")


def difference(a: dict[str, float], b: dict[str, float]) -> tuple[float, float | None, str]:
    """Mean of a less mean of b over seeds, its standard error, and how it was found: paired by seed where at least two are shared and
    none is left over, else Welch's; none from a single run."""
    if set(a) == set(b) and len(a) > 1:
        pairs = [a[seed] - b[seed] for seed in a]
        return statistics.mean(pairs), statistics.stdev(pairs) / math.sqrt(len(pairs)), f"{len(pairs)} pairs of seeds"
    mean = statistics.mean(a.values()) - statistics.mean(b.values())
    if min(len(a), len(b)) < 2:
        return mean, None, f"{len(a)} against {len(b)}, no standard error over seeds"
    return (
        mean,
        math.sqrt(sum(statistics.variance(x.values()) / len(x) for x in (a, b))),
        f"{len(a)} against {len(b)}, Welch",
    )


def over_documents(a: np.ndarray, b: np.ndarray, size: np.ndarray) -> float:
    """Standard error of the difference in BPB over the documents, for these very weights."""
    gap = a - b
    rest = gap - gap.sum() / size.sum() * size
    return float(math.sqrt(len(gap) / (len(gap) - 1) * (rest**2).sum()) / size.sum())


def report(folders: list[Path]) -> None:
    runs, bits, data = load(folders)
    keys = [key for key in bits if "/" in key]
    whole = ~np.isnan(np.stack([bits[key] for key in keys])).any(0) if keys else np.ones(len(bits["bytes"]), bool)
    halves = {"all": whole, "A": whole & ~bits["in_b"], "B": whole & bits["in_b"]}
    bpb = {
        key: {half: bits[key][mask].sum() / bits["bytes"][mask].sum() for half, mask in halves.items()} for key in keys
    }
    tokens = data["train"]["tokens"]
    print(
        f"{data['gpus'].strip()}\ntraining {data['train']['documents']:,} documents, {tokens:,} tokens; validation "
        f"{data['val']['documents']:,} documents, {data['val']['bytes']:,} bytes; documents compared: "
        + ", ".join(f"{half} {mask.sum():,}" for half, mask in halves.items())
    )
    print("\n| run | steps | ms/step | passes | bytes | seconds |\n|---|---|---|---|---|---|")
    for name, run in runs.items():
        seconds = ", ".join(f"{phase} {value:.1f}" for phase, value in run["seconds"].items() if value >= 0.05)
        steps, spent = run["steps"], run["seconds"].get("steps")
        cells = (
            (f"{steps:,}", f"{1000 * spent / steps:.1f}", f"{run['tokens'] / tokens:.2f}")
            if steps and spent
            else ("", "", "")
        )
        print(f"| {name} ({run['state']}) | {' | '.join(cells)} | {run['bytes'] or 0:,} | {seconds} |")
    print("\n| run | pass | as its script prints it | all | A | B |\n|---|---|---|---|---|---|")
    for key in keys:
        name, which = key.split("/")
        own = runs[name]["bpb"].get(which) or next(
            (
                r["bpb"].get("adapted")
                for r in runs.values()
                if r["entry"].get("continues") == name and r["entry"].get("pass", "adapted") == which
            ),
            None,
        )
        print(
            f"| {name} | {which} | {f'{own:.5f}' if own else ''} | "
            + " | ".join(f"{bpb[key][half]:.5f}" for half in halves)
            + " |"
        )
    for key_a, key_b in itertools.combinations(
        sorted({(split_name(key.split("/")[0])[0], key.split("/")[1]) for key in keys}), 2
    ):
        if key_a[1] == key_b[1]:
            sides = [
                {
                    split_name(key.split("/")[0])[1]: key
                    for key in keys
                    if (split_name(key.split("/")[0])[0], key.split("/")[1]) == side
                }
                for side in (key_a, key_b)
            ]
            print(f"\n{key_a[1]}: {key_a[0]} less {key_b[0]}")
            for half, mask in halves.items():
                mean, error, how = difference(*({seed: bpb[key][half] for seed, key in side.items()} for side in sides))
                a, b = (np.mean([bits[key][mask] for key in side.values()], axis=0) for side in sides)
                print(
                    f"  {half:3s} {mean:+.5f}" + (f" +- {error:.5f}" if error is not None else "") + f" ({how}; +- "
                    f"{over_documents(a, b, bits['bytes'][mask]):.5f} over documents)"
                )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, more in {
        "unpack": ["folders+"],
        "prepare": [],
        "start": ["queue"],
        "run": [],
        "status": [],
        "stop": [],
        "collect": ["out"],
        "score": ["out"],
        "report": [],
    }.items():
        command = commands.add_parser(name)
        command.add_argument("root", type=Path, nargs="+" if name == "report" else None)
        for word in more:
            command.add_argument(word.rstrip("+"), type=Path, nargs="+" if word.endswith("+") else None)
        if name == "status":
            command.add_argument("--wait", type=float, default=0.0)
        elif name == "collect":
            command.add_argument("--ledgers", action="store_true", help="also the nats of every target, float32")
        elif name == "prepare":
            command.add_argument("--prepare-data", type=Path, required=True, help="the prepare_data.py to run")
            command.add_argument("--tokenizer", type=Path, required=True)
            command.add_argument(
                "--docs", default="docs-*.jsonl.xz", help="training files in ROOT/corpus (default: %(default)s)"
            )
            command.add_argument("--out", default="data", help="folder in ROOT (default: %(default)s)")
            command.add_argument(
                "--seed", type=int, default=0, help="of the order of the training documents (default: %(default)s)"
            )
            command.add_argument(
                "--shard-tokens", type=int, default=20_000_000, help="public scripts want a shard for each rank"
            )
            command.add_argument("--more", default="", help="further options of prepare_data.py, in one word")
    args = parser.parse_args(argv)
    if args.command == "stop":
        (args.root / "stop").touch()
    elif args.command == "run":
        Queue(args.root, json.loads((args.root / "queue.json").read_text())).run()
    else:
        {
            "unpack": lambda: unpack(args.root, args.folders),
            "prepare": lambda: prepare(args.root, args),
            "start": lambda: start(args.root, args.queue),
            "status": lambda: status(args.root, args.wait),
            "collect": lambda: collect(args.root, args.out, args.ledgers),
            "score": lambda: score(args.root, args.out),
            "report": lambda: report(args.root),
        }[args.command]()
    return 0


if __name__ == "__main__":
    sys.exit(main())
