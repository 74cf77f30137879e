"""Whether two versions of train_gpt.py do the same, to the byte: every recipe at the demo's scale, on the CPU.

    python tools/compare.py 72a935b HEAD                      two revisions of this repository, all variants
    python tools/compare.py ../base . best ngram_low          two folders, two variants
    python tools/compare.py 72a935b . --cache /tmp/base       BASE is run once and kept there

Each variant trains by steps, not by the clock, quantises, adapts and scores. Equal must be: the trained weights, every
tensor of model.bin (name, dtype, bytes) and the ledger. BASE gives the recipes and the scale for both. The search for a
rate starts from ARTIFACT_MARGIN, so that of HEAD is shifted by the difference in packed length, and HEAD writes BASE's
header into model.bin: both search for the same bytes. A setting that a side does not know is dropped
there, and named. Exit status 1 on any difference.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

if not __package__:  # run as a file
    import anywhere  # noqa: F401

from tools.runs import ROOT
from tools.sweep import SweepError, read_recipe

MARGIN = 12000  # of BASE: HEAD may pack to so many bytes more
SMALL = {  # laid over every recipe: few steps, and every mechanism begins within them
    "ITERATIONS": "8",
    "MAX_WALLCLOCK_SECONDS": "0",
    "WARMUP_STEPS": "1",
    "MUON_MOMENTUM_WARMUP_STEPS": "6",
    "GPTQ_CALIBRATION_BATCHES": "3",
    "PHASED_TTT_PREFIX_DOCS": "9",
    "GLOBAL_TTT_REPLAY": "1",  # as before there was a choice; an earlier script does not know the name
    "TTT_BATCH_SIZE": "6",
    "ATTN_WINDOW": "0",
}
WINDOWED = {"ATTN_WINDOW": "64"}
SKINNY = {  # other shapes: five layers, odd places of loops and lanes, a warm start, three phases
    "NUM_LAYERS": "5",
    "XSA_LAST_N": "11",  # the demo says 2; later versions have it in every layer
    "PARALLEL_START_LAYER": "3",
    "LOOP_START": "1",
    "LOOP_END": "2",
    "ATTN_FULL_LAYERS": "1,4",
    "MODEL_DIM": "64",
    "TTT_WARM_START": "0.5",
    "PHASED_TTT_NUM_PHASES": "3",
}
LOW_ORDERS = {"NGRAM_MIN_ORDER": "3", "NGRAM_MIN_COUNT": "2", "NGRAM_THRESHOLD": "0.5", "NGRAM_BOOST": "1"}
# Name -> recipe, and the settings laid over it.
VARIANTS = {
    "best": ("best", WINDOWED),
    "best_tight": ("best", {**WINDOWED, "ARTIFACT_CAP": "330000"}),  # the cap is below what the first rate gives
    "best_skinny": ("best", {**WINDOWED, **SKINNY}),
    "caseops_prequant": ("caseops_prequant", {}),
    "logit_calibration": ("logit_calibration", {}),
    "multi_phase_sgd": ("multi_phase_sgd", {}),
    "neural_score_first": ("neural_score_first", {}),
    "ngram_progressive": ("ngram_progressive", {}),
    "ngram_low": ("ngram_progressive", LOW_ORDERS),
}
HEADER = "header.json"
# Runs a script with what another one's artifact says of itself in the header, where it counts as bytes.
UNDER_HEADER = """import json, pathlib, sys, train_gpt
encode = train_gpt.encode_artifact
header = json.loads(pathlib.Path(sys.argv[1]).read_text())
train_gpt.encode_artifact = lambda tensors, meta: encode(tensors, header)
sys.exit(train_gpt.main([]))"""
ENVIRONMENT = {"OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"}  # of a recipe or a scale, and no setting of the script


class CompareError(Exception):
    """A problem that the user can act on; printed as one line."""


class Variant(NamedTuple):
    """One run's settings, without margin and paths."""

    name: str
    settings: dict[str, str]


class Arrays(NamedTuple):
    """What a run must reproduce, by part and name, and the size of its model.bin."""

    parts: dict[str, dict[str, np.ndarray]]
    size: int

    def tensors(self) -> int:
        return sum(len(arrays) for arrays in self.parts.values())


# ---------------------------------------------------------------- one checkout


def python(checkout: Path, code: str) -> str:
    """What a line of Python prints that runs in a checkout."""
    done = subprocess.run([sys.executable, "-c", code], cwd=checkout, capture_output=True, text=True)
    if done.returncode:
        raise CompareError(f"{checkout}: {(done.stderr.strip().splitlines() or ['no output'])[-1]}")
    return done.stdout.strip()


class Checkout:
    """A folder with a train_gpt.py: the settings it knows, the length of its packed script, and its runs."""

    def __init__(self, folder: Path):
        if not (folder / "train_gpt.py").is_file():
            raise CompareError(f"{folder}: holds no train_gpt.py; give a checkout or a git revision")
        self.folder = folder.resolve()
        source = (folder / "train_gpt.py").read_text(encoding="utf-8")
        fields = re.findall(r"^    (\w+): (?:bool|int|float|str) = setting\(", source, re.M)
        self.known = {name.upper() for name in fields}
        self.packed = int(python(folder, "import train_gpt; print(len(train_gpt.pack_script(train_gpt.SOURCE)))"))

    def run(self, variant: Variant, out: Path, margin: int, data: Path, header: Path | None = None) -> list[str]:
        """Train and score into `out`, with the header from a file if one is named; returns the settings
        that this version does not know."""
        out.mkdir(parents=True, exist_ok=True)
        own = {"ARTIFACT_MARGIN": str(margin), "ARTIFACT_DIR": str(out), "LEDGER_PATH": str(out / "ledger.npy")}
        wanted = {**variant.settings, **own, "DATA_PATH": str(data), "CUDA_VISIBLE_DEVICES": ""}
        unknown = sorted(set(wanted) - self.known - ENVIRONMENT)
        inherited = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}
        env = inherited | {name: value for name, value in wanted.items() if name not in unknown}
        program = ["-c", UNDER_HEADER, str(header)] if header else ["train_gpt.py"]
        with open(out / "console.log", "w", encoding="utf-8") as console:
            command = [sys.executable, *program]
            done = subprocess.run(command, cwd=self.folder, env=env, stdout=console, stderr=subprocess.STDOUT)
        if done.returncode:
            last = (out / "console.log").read_text(errors="replace").strip().splitlines()[-1:]
            raise CompareError(f"{self.folder}, {variant.name}: exit status {done.returncode}: {' '.join(last)}")
        return unknown

    def arrays(self, out: Path) -> Arrays:
        """The results of a run, its model.bin read by this version's own code; the header goes into a file."""
        flat = out / "model.npz"
        python(
            self.folder,
            "import json, numpy, pathlib, train_gpt; "
            f"tensors, meta = train_gpt.load_artifact(pathlib.Path({str(out / 'model.bin')!r})); "
            f"numpy.savez({str(flat)!r}, **tensors); "
            f"pathlib.Path({str(out / HEADER)!r}).write_text(json.dumps(meta))",
        )
        parts = {"trained": dict(np.load(out / "trained.npz")), "model": dict(np.load(flat))}
        parts["trained"].pop("meta", None)  # settings, which may lose names
        parts["ledger"] = {"nats": np.load(out / "ledger.npy")}
        return Arrays(parts, (out / "model.bin").stat().st_size)


@contextlib.contextmanager
def checked_out(name: str, work: Path) -> Iterator[Checkout]:
    """A folder as it is, or a git revision in a worktree that is there only now."""
    if Path(name).is_dir():
        yield Checkout(Path(name))
        return
    folder = work / f"revision_{re.sub(r'[^0-9A-Za-z._-]', '_', name)}"
    git = ["git", "-C", str(ROOT), "worktree"]
    made = subprocess.run([*git, "add", "--detach", str(folder), name], capture_output=True, text=True)
    if made.returncode:
        raise CompareError(f"{name}: neither a folder nor a git revision ({made.stderr.strip().splitlines()[-1]})")
    try:
        yield Checkout(folder)
    finally:
        subprocess.run([*git, "remove", "--force", str(folder)], capture_output=True)


# ---------------------------------------------------------------- both


def variants(base: Path, names: list[str]) -> list[Variant]:
    """The settings of the named variants: BASE's recipe and scale, and what is laid over them."""
    scale = read_recipe(base / "recipes" / "scale_demo.env")
    found = []
    for name in names:
        recipe, more = VARIANTS[name]
        found.append(Variant(name, {**read_recipe(base / "recipes" / f"{recipe}.env"), **scale, **SMALL, **more}))
    return found


def prepare(folder: Path) -> Path:
    """A small data folder: documents of the Python standard library."""
    options = ["--source", "stdlib", "--vocab-size", "1024", "--val-docs", "16", "--max-train-docs", "300"]
    command = [sys.executable, str(ROOT / "prepare_data.py"), *options, "--out", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise CompareError(f"prepare_data.py: {(done.stderr.strip().splitlines() or ['no output'])[-1]}")
    return folder


def differences(base: Arrays, head: Arrays) -> list[str]:
    """Names of the tensors that are not the same: missing on a side, of another dtype or shape, or of other bytes."""
    found = []
    for part, arrays in base.parts.items():
        other = head.parts[part]
        for name in sorted(set(arrays) | set(other)):
            if name not in other:
                found.append(f"{part}: {name} is gone")
            elif name not in arrays:
                found.append(f"{part}: {name} is new")
            elif arrays[name].dtype != other[name].dtype or arrays[name].shape != other[name].shape:
                found.append(f"{part}: {name} has another form")
            elif arrays[name].tobytes() != other[name].tobytes():
                found.append(f"{part}: {name}")
    return found


def compare(base: Checkout, head: Checkout, variant: Variant, cache: Path, data: Path) -> bool:
    """Run what is not cached, print one row, and return whether all is equal."""
    kept = cache / variant.name
    stamp = kept / "compared.json"
    asked = {"packed": base.packed, "settings": variant.settings, "data": str(data)}
    if not stamp.is_file() or json.loads(stamp.read_text()) != asked:
        shutil.rmtree(kept, ignore_errors=True)
        base.run(variant, kept, MARGIN, data)
        stamp.write_text(json.dumps(asked))
    before = base.arrays(kept)
    with tempfile.TemporaryDirectory(prefix="compare_") as out:
        dropped = head.run(variant, Path(out), MARGIN + base.packed - head.packed, data, kept / HEADER)
        now = head.arrays(Path(out))
    unlike = differences(before, now)
    verdict = f"{len(unlike)} DIFFER: {', '.join(unlike[:6])}" if unlike else "EQUAL"
    gone = f"; HEAD does not know {', '.join(dropped)}" if dropped else ""
    sizes = f"{before.size:,} {now.size:,} bytes"
    print(f"{variant.name:20s} {now.tensors():5,d} tensors  {sizes:>23s}  {verdict}{gone}", flush=True)
    return not unlike


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", metavar="BASE", help="a checkout's folder or a git revision")
    parser.add_argument("head", metavar="HEAD", help="the other one")
    parser.add_argument("variants", nargs="*", metavar="VARIANT", help=f"of {', '.join(VARIANTS)}; default: all")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="keep BASE's results there, and the data")
    parser.add_argument("--data", type=Path, metavar="DIR", help="a data folder (default: one made of the stdlib)")
    args = parser.parse_args(argv)
    if unknown := sorted(set(args.variants) - set(VARIANTS)):
        parser.error(f"{', '.join(unknown)}: no variant; there are {', '.join(VARIANTS)}")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="compare_") as scratch, contextlib.ExitStack() as stack:
        work = Path(scratch)
        try:
            base = stack.enter_context(checked_out(args.base, work / "base"))
            head = stack.enter_context(checked_out(args.head, work / "head"))
            wanted = variants(base.folder, args.variants or list(VARIANTS))
            cache = (args.cache or work / "cache").resolve()
            data = args.data.resolve() if args.data else cache / "data"
            if not args.data and not (data / "manifest.json").is_file():
                prepare(data)
            print(f"BASE {args.base}, HEAD {args.head}: packed {base.packed:,} and {head.packed:,} bytes", flush=True)
            equal = [compare(base, head, variant, cache, data) for variant in wanted]
        except (CompareError, SweepError, OSError) as error:
            print(f"compare.py: {error}", file=sys.stderr)
            return 2
    print(f"{sum(equal)} of {len(equal)} variants are equal")
    return 0 if all(equal) else 1


if __name__ == "__main__":
    sys.exit(main())
