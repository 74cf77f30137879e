"""Speed of two checkouts of train_gpt.py on one GPU, in turns: a change of layout or wording must cost nothing.

    compare_speed.py train A B            steps of 98,304 tokens, plain and looped, in one process; needs DATA_PATH
    compare_speed.py ttt   A B ARTIFACT   test-time training of ARTIFACT/model.bin by both scripts: A, B, B, A

A and B are folders that hold a train_gpt.py. Blocks of five steps alternate, so that a GPU that slows down slows both;
the first block compiles and is not counted. FA3_LIBRARY and the like are read from the environment; --set gives both
further settings.
"""

import argparse
import importlib.util
import inspect
import json
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

BLOCK = 5
PASSED_ON = ("DATA_PATH", "FA3_LIBRARY", "ATTENTION", "DEVICE")  # of the environment, to the in-process sides


def load(folder: Path, name: str) -> ModuleType:
    """The checkout's script as a module of its own name."""
    spec = importlib.util.spec_from_file_location(name, folder / "train_gpt.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def construct(kind: type, **offered):
    """An instance of `kind` from those of the offered arguments that it takes: versions differ in them."""
    wanted = inspect.signature(kind).parameters
    missing = [name for name, p in wanted.items() if p.default is p.empty and name not in offered]
    if missing:
        raise SystemExit(
            f"{kind.__module__}.{kind.__name__} wants {', '.join(missing)}: teach compare_speed.py to make it"
        )
    return kind(**{name: value for name, value in offered.items() if name in wanted})


class Side:
    """One checkout, set up to train."""

    def __init__(self, folder: Path, name: str, settings: dict[str, str]):
        self.name, self.module = name, load(folder, f"{name}_train_gpt")
        m = self.module
        self.cfg = cfg = m.Config.from_env({key: os.environ[key] for key in PASSED_ON if key in os.environ} | settings)
        self.ranks = ranks = m.Ranks(cfg)
        log = m.Log(ranks)
        backend = m.choose_attention(cfg, ranks.device)
        dtype = torch.bfloat16 if ranks.device.type == "cuda" else torch.float32
        model = construct(m.GPT, cfg=cfg, attention=backend, attention_backend=backend, dtype=dtype).to(ranks.device)
        model.init_weights(cfg.seed)
        phases = construct(m.Phases, ranks=ranks, log=log)
        self.trainer = construct(m.Trainer, model=model, cfg=cfg, ranks=ranks, log=log, phases=phases)
        print(f"{name}: {folder}, attention {backend}, {sum(p.numel() for p in model.parameters()):,} parameters")

    def batches(self, step: int) -> list:
        found = self.trainer.stream.step(step, self.cfg.train_seq_len, 0, 1)
        return [self.module.to_device(batch, self.ranks.device) for batch in found]

    def block(self, first: int, looped: bool) -> tuple[float, list[float]]:
        """Milliseconds of a step, as in training: nothing waits for the GPU between two steps. And the losses."""
        steps = [(step, self.batches(step)) for step in range(first, first + BLOCK)]
        self.ranks.synchronize()
        begun, losses = time.perf_counter(), []
        for step, batches in steps:
            losses.append(self.trainer.gradients(batches, looped))
            self.trainer.optimizer.step(step, 1.0)
        self.ranks.synchronize()
        return 1e3 * (time.perf_counter() - begun) / BLOCK, [loss.item() for loss in losses]


def train(a: Path, b: Path, blocks: int, settings: dict[str, str]) -> None:
    torch.set_float32_matmul_precision("high")
    settings = {"TRAIN_BATCH_TOKENS": "98304"} | settings
    sides = [Side(a, "A", settings), Side(b, "B", settings)]
    step = 0
    for looped in (False, True):
        times, losses = ({side.name: [] for side in sides} for _ in range(2))
        for block in range(blocks + 1):
            for side in sides if block % 2 else sides[::-1]:
                spent, found = side.block(step, looped)
                losses[side.name] += found
                if block:
                    times[side.name].append(spent)
            step += BLOCK
        print(f"{'looped' if looped else 'plain'}: {blocks} blocks of {BLOCK} steps each")
        for name, found in times.items():
            middle, listed = statistics.median(found), " ".join(f"{value:.2f}" for value in found)
            print(f"  {name} median {middle:8.2f} ms/step, {min(found):.2f} to {max(found):.2f}: {listed}")
        ratios = [y / x for x, y in zip(*times.values())]
        middle = statistics.median(ratios)
        print(f"  B over A by block: median {middle:.4f}, {min(ratios):.4f} to {max(ratios):.4f}")
        gap = max(abs(x - y) for x, y in zip(*losses.values()))
        print(f"  losses differ by at most {gap:.6f}; the last are {losses['A'][-1]:.5f} and {losses['B'][-1]:.5f}")


def adapt(
    folder: Path, artifact: Path, work: Path, settings: dict[str, str]
) -> tuple[float, dict[str, float], np.ndarray]:
    """One pass in a process of its own: targets per second, BPB by pass, and the nats of every target."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    shutil.copy(artifact / "model.bin", work)
    own = {"TTT_EVAL_ONLY": "1", "ARTIFACT_DIR": str(work), "LEDGER_PATH": str(work / "nats.npy")}
    script = [sys.executable, str(folder.resolve() / "train_gpt.py")]
    done = subprocess.run(script, env=os.environ | own | settings, cwd=work, capture_output=True, text=True)
    rate = re.search(r"targets in \S+ s: ([\d,.]+) targets/s over", done.stdout)
    if done.returncode or not rate:
        raise SystemExit(f"{folder}: {(done.stderr or done.stdout)[-1500:]}")
    bpb = json.loads((work / "eval_result.json").read_text())["bpb"]
    return float(rate[1].replace(",", "")), bpb, np.load(work / "nats.npy")


def ttt(a: Path, b: Path, artifact: Path, rounds: int, settings: dict[str, str]) -> None:
    rates, scores = {"A": [], "B": []}, {}
    with tempfile.TemporaryDirectory() as work:
        for name in "ABBA" * (rounds // 2) or "AB":
            begun = time.perf_counter()
            rate, bpb, nats = adapt(a if name == "A" else b, artifact, Path(work) / name, settings)
            rates[name].append(rate)
            scores[name] = (bpb, nats)
            listed = ", ".join(f"{key} {value:.6f}" for key, value in bpb.items())
            print(f"  {name} {rate:9,.0f} targets/s, {listed}, {time.perf_counter() - begun:.0f} s in all", flush=True)
    for name, found in rates.items():
        print(f"{name} mean {statistics.mean(found):9,.0f} targets/s, {min(found):,.0f} to {max(found):,.0f}")
    print(f"B over A: {statistics.mean(rates['B']) / statistics.mean(rates['A']):.4f}")
    (bpb_a, nats_a), (bpb_b, nats_b) = scores["A"], scores["B"]
    gaps = ", ".join(f"{key} {bpb_b[key] - bpb_a[key]:+.6f}" for key in bpb_a)
    print(f"BPB of B less A: {gaps}; nats of a target differ by {np.abs(nats_a - nats_b).max():.6f} at most")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "ttt"))
    parser.add_argument("a", type=Path, metavar="A")
    parser.add_argument("b", type=Path, metavar="B")
    parser.add_argument("artifact", type=Path, nargs="?", metavar="ARTIFACT", help="folder with model.bin (ttt)")
    parser.add_argument("--blocks", type=int, default=8, help="timed blocks of each side and graph (default: 8)")
    parser.add_argument("--rounds", type=int, default=2, help="passes of each side, an even number or 1 (default: 2)")
    parser.add_argument("--set", default="", help="NAME=value words for both sides")
    args = parser.parse_args(argv)
    settings = dict(word.split("=", 1) for word in shlex.split(args.set))
    if torch.cuda.is_available():
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    if args.what == "train":
        train(args.a, args.b, args.blocks, settings)
    elif args.artifact is None:
        parser.error("ttt needs the folder of an artifact")
    else:
        ttt(args.a, args.b, args.artifact, args.rounds, settings)
    return 0


if __name__ == "__main__":
    sys.exit(main())
