"""A sound tiny artifact with its data, copies of both with one defect, and a launcher that runs them fast."""

import contextlib
import functools
import hashlib
import json
import os
import queue
import random
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
from helpers import RUN, free_port, main, scratch, sentence, write_shard

import prepare_data
import train_gpt
from tools.audit.causality import sum_to_one
from tools.audit.checks import CHECKS
from tools.audit.run import Artifact, Launched
from tools.audit.shared import Audit

CHECKS["sum_to_one_20"] = partial(sum_to_one, length=20)  # the shortest that ends in a repeated phrase

# 50,000 parameters; test-time training with several chunks a document, two phases of global SGD, and steps large enough
# for a leak to show.
SETTINGS = dict(
    RUN,
    vocab_size=384,
    iterations=12,
    ttt_chunks="4,4,8,16",
    ttt_eval_seq_len=48,
    ttt_lora_rank=4,
    ttt_lora_alpha=8,
    ttt_lora_lr=0.005,
    ttt_batch_size=128,
    segment_first_docs=4,
    segment_growth=0.5,
    global_ttt_replay=0.5,
    global_ttt_lr=0.02,
    global_ttt_chunk_tokens=128,
    ngram_enabled=True,
    ngram_min_order=2,
)


def prepared(folder: Path, texts: list[str], *options: str) -> Path:
    """A data folder as prepare_data.py leaves it: the first twelve texts are validation; the source stays beside it."""
    source = folder.with_suffix(".jsonl")
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    with open(os.devnull, "w") as null, contextlib.redirect_stderr(null), contextlib.redirect_stdout(null):
        assert (
            prepare_data.main(
                [
                    "--source",
                    str(source),
                    "--out",
                    str(folder),
                    "--val-docs",
                    "12",
                    "--vocab-size",
                    "384",
                    "--workers",
                    "1",
                    *options,
                ]
            )
            == 0
        )
    return folder


@functools.cache
def data() -> Path:
    """Twelve validation documents and 150 others, CaseOps and manifest included."""
    rng = random.Random(5)
    sizes = [30, 60, 12, 45, 25, 50, 8, 70, 20, 35, 55, 16, *(rng.randrange(10, 60) for _ in range(150))]
    texts = [sentence(rng, n).replace("river", "River").replace("stone", "STONE") for n in sizes]
    return prepared(
        scratch() / "audit_data", [text + (" \u0416\u00f8 \u4e2d" if i < 12 else "") for i, text in enumerate(texts)]
    )  # characters that training lacks


@functools.cache
def artifact() -> Path:
    """The folder of the sound run."""
    folder = scratch() / "audit_artifact"
    main({**SETTINGS, "tokenizer_path": data() / "tokenizer.model"}, folder, data()).ok()
    return folder


@functools.cache
def joined_artifact() -> Path:
    """The same with JOIN_OPERATORS=1."""
    folder = scratch() / "audit_joined"
    settings = {**SETTINGS, "join_operators": True, "tokenizer_path": data() / "tokenizer.model"}
    main(settings, folder, data()).ok()
    return folder


def copy_of(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to))


def edit_json(path: Path, **changes):
    """Top-level keys replaced; None removes one."""
    value = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in value.items() if v is not None}))


def patched(folder: Path, lines: str):
    """Give the script of ``folder`` more lines behind its last definition, and pack it again; result.json keeps what is
    still true."""
    script = folder / "train_gpt.py"
    head, main_block, tail = train_gpt.unpack_script(script).rpartition('if __name__ == "__main__":')
    assert main_block, "the script has no main block"
    script.write_bytes(train_gpt.pack_script(f"{head}{lines.strip()}\n{main_block}{tail}"))
    edit_json(folder / "result.json", bpb=None, val_bpb=None, source_sha256=None, bytes=None, artifact_sha256=None)


def record(folder: Path):
    """The papers of a submission, all of them true."""
    result = json.loads((folder / "result.json").read_text())
    bpb, total = result["val_bpb"], result["bytes"]["total"]
    (folder / "submission.json").write_text(
        json.dumps(
            {
                "name": "tiny",
                "val_bpb": bpb,
                "bytes_total": total,
                "seeds": [result["seed"]],
                "seed_results": {str(result["seed"]): {"val_bpb": bpb, "artifact_bytes": total}},
            }
        )
    )
    (folder / "README.md").write_text(
        f"# Tiny\n\nval_bpb {bpb:.5f}, {total} bytes\n\n| seed | BPB |\n|---|---|\n| {result['seed']} | {bpb:.4f} |\n\n"
        "    ITERATIONS=12 python train_gpt.py\n"
    )


def on_write(body: str) -> str:
    """Lines that change what reaches the ledger: ``nats`` of ``targets``, with the ``gold`` tokens and those ``before``
    them at hand."""
    return f"""
_init = ValidationStream.__init__
def _remember(self, cfg):
    global VAL, STATE
    _init(self, cfg)
    VAL, STATE = self, [0.0]
    shard = open_shard(find_shards(Path(cfg.data_path), "fineweb_train_*.bin")[0]).astype(int)
    self.pairs = set((shard[:-1] * 512 + shard[1:]).tolist())
    joint = np.bincount((shard[:-1] * 31 + shard[1:] * 17) % 64, minlength=64)
    self.buckets = joint, np.bincount(shard[:-1], minlength=384)
ValidationStream.__init__ = _remember
_write = Ledger.write
def _changed(self, targets, nats):
    gold, before, p = VAL.tokens[targets + 1].astype(int), VAL.tokens[targets].astype(int), np.exp(-nats)
    {body}
    _write(self, targets, nats)
Ledger.write = _changed
"""


def shards(folder: Path, name: str) -> np.ndarray:
    """The values of fineweb_NAME_000000.bin."""
    return train_gpt.open_shard(folder / f"fineweb_{name}_000000.bin").astype(np.int64)


def rewrite(folder: Path, **streams):
    """New values for the shards val, val_bytes or train, with a manifest that agrees."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for name, values in streams.items():
        path = write_shard(folder / f"fineweb_{name}_000000.bin", values)
        manifest["files"][path.name] = {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "tokens": len(values)}
    (folder / "manifest.json").write_text(json.dumps(manifest))


class Launcher:
    """`tools.audit.run.launch`, in forks of ready processes; a blocked run has sockets that refuse to connect and an
    empty PATH."""

    def __init__(self, processes: int = 2):
        self.idle = queue.Queue()
        self.processes = [
            subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("zygote.py"))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            for _ in range(processes)
        ]
        for process in self.processes:
            self.idle.put(process)

    def __call__(self, folder: Path, env: dict, world: int, blocked: bool, timeout: float) -> Launched:
        output = folder.with_name(folder.name + "_output")
        process = self.idle.get()
        try:
            process.stdin.write(
                json.dumps(
                    {
                        "folder": str(folder),
                        "env": env,
                        "world": world,
                        "output": str(output),
                        "port": free_port(),
                        "blocked": blocked,
                    }
                )
                + "\n"
            )
            process.stdin.flush()
            code = int(process.stdout.readline())
        finally:
            self.idle.put(process)
        return Launched(code, output.read_text(errors="replace"))

    def close(self):
        for process in self.processes:
            process.stdin.close()
            process.wait(20)


def audit_of(folder: Path, data_path: Path, work: Path, launcher, **options) -> Audit:
    work.mkdir(parents=True, exist_ok=True)
    return Audit(Artifact(folder, work, "cpu", 120, launcher), data_path, targets=1500, **options)
