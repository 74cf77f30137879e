"""A sound tiny artifact with its data, copies of both with one defect, and a launcher that runs them fast."""
import contextlib
import functools
import json
import os
import queue
import random
import shutil
import subprocess
import sys
from pathlib import Path

from helpers import ROOT, RUN, environment, free_port, main, scratch, sentence

import prepare_data
import train_gpt

sys.path.insert(0, str(ROOT / "tools"))
import audit  # noqa: E402

# 50,000 parameters; test-time training with several chunks a document, two phases of global SGD, and steps large enough for a leak to show.
SETTINGS = dict(RUN, vocab_size=384, iterations=12, ttt_chunks="4,4,8,16", ttt_eval_seq_len=48, ttt_lora_rank=4, ttt_lora_alpha=8, ttt_lora_lr=0.005, ttt_batch_size=128,
                phased_ttt_num_phases=2, phased_ttt_prefix_docs=10, global_ttt_lr=0.02, global_ttt_chunk_tokens=128)
WORDS_OF_VALIDATION = (30, 60, 12, 45, 25, 50, 8, 70, 20, 35, 55, 16)


@functools.cache
def data() -> Path:
    """Twelve validation documents as prepare_data.py leaves them, CaseOps and manifest included; the source text stays beside them."""
    folder, rng = scratch() / "audit_data", random.Random(5)
    texts = [sentence(rng, n) for n in WORDS_OF_VALIDATION] + [sentence(rng, rng.randrange(10, 60)) for _ in range(150)]
    source = scratch() / "audit_source.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    with open(os.devnull, "w") as null, contextlib.redirect_stderr(null), contextlib.redirect_stdout(null):
        assert prepare_data.main(["--source", str(source), "--out", str(folder), "--val-docs", str(len(WORDS_OF_VALIDATION)), "--vocab-size", "384", "--workers", "1"]) == 0
    return folder


@functools.cache
def artifact() -> Path:
    """The folder of the sound run."""
    folder = scratch() / "audit_artifact"
    main({**SETTINGS, "tokenizer_path": data() / "tokenizer.model"}, folder, data()).ok()
    return folder


def copy_of(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to))


def patched(to: Path, lines: str, train: bool = False) -> Path:
    """A copy of the artifact whose script has ``lines`` behind its last definition, packed again; ``train``: and trained again."""
    folder = copy_of(artifact(), to)
    script = folder / "train_gpt.py"
    source = train_gpt.unpack_script(script)
    head, end, tail = source.rpartition('if __name__ == "__main__":')
    assert end, "the script has no main block"
    script.write_bytes(train_gpt.pack_script(f"{head}{lines.strip()}\n{end}{tail}"))
    return folder


class Launcher:
    """audit.launch, in forks of ready processes; blocked runs are real processes, since a namespace has to be theirs."""

    def __init__(self, processes: int = 2):
        self.idle = queue.Queue()
        self.processes = [subprocess.Popen([sys.executable, str(Path(__file__).with_name("zygote.py"))], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                           env={**os.environ, "OMP_NUM_THREADS": "1"}) for _ in range(processes)]
        for process in self.processes:
            self.idle.put(process)

    def __call__(self, folder: Path, env: dict, world: int, blocked: bool, timeout: float) -> audit.Launched:
        if blocked and env.get("REALLY"):
            return audit.launch(folder, env, world, blocked, timeout)
        output = folder.with_name(folder.name + "_output")
        process = self.idle.get()
        try:
            process.stdin.write(json.dumps({"folder": str(folder), "env": env, "world": world, "output": str(output), "port": free_port()}) + "\n")
            process.stdin.flush()
            code = int(process.stdout.readline())
        finally:
            self.idle.put(process)
        return audit.Launched(code, output.read_text(errors="replace"))

    def close(self):
        for process in self.processes:
            process.stdin.close()
            process.wait(20)


def audit_of(folder: Path, data_path: Path, work: Path, launcher, **options) -> audit.Audit:
    work.mkdir(parents=True, exist_ok=True)
    return audit.Audit(audit.Artifact(folder, work, "cpu", 120, launcher), data_path, targets=1500, **options)
