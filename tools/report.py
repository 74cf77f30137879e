"""Tables, plots and one web page from finished runs, read from their result.json (eval_result.json, baselines.json and train.log too, where they are there).

    python tools/report.py runs/1337                                     one run: table, loss.png, phases.png, report.html in its folder
    python tools/report.py runs/1337 runs/42 --out report                several: one row each, their mean, and the plots over each other
    python tools/report.py runs/demo --baselines data/demo --check       also gzip -9, xz and token n-grams on the same validation documents

--baselines decodes the validation documents to text and measures what general compressors and counting reach on it, in bits per byte over the same bytes that the
run is scored on; the figures are kept as baselines.json in the folder of the run. --check fails unless the trained model is below gzip -9 and below the token bigram,
and unless eval_result.json (the packed script, run alone) holds the same BPB as result.json to the last printed digit.
"""
import argparse
import base64
import gzip
import hashlib
import html
import json
import lzma
import math
import os
import re
import statistics
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

REQUIRED = {"bpb": dict, "bytes": dict, "seconds": dict, "training": dict, "settings": dict, "data": dict, "verdicts": dict, "versions": dict,
            "hardware": str, "seed": int}
STAGES = {"trained": "weights in memory", "quantized": "model.bin, read back from disk", "adapted": "model.bin, with test-time training"}
TRAIN_PHASES = ("steps", "calibrate", "quantize")                   # what counts against the training budget
OUTSIDE_PHASES = ("setup", "warmup", "diagnostic", "write")         # in neither budget; every other phase is evaluation
BIGRAM_TOKENS = 100_000_000                                         # the n-grams are fitted on at most this many training tokens
COMPRESSORS = {"gzip -9": lambda text: gzip.compress(text, 9, mtime=0),
               "xz -9e": lambda text: lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)}


class ReportError(Exception):
    """A problem that the user can act on; printed as one line."""


# ---------------------------------------------------------------- runs

@dataclass
class Run:
    folder: Path
    result: dict                     # result.json
    rescored: dict | None = None     # eval_result.json: the artifact scored again, by TTT_EVAL_ONLY=1
    baselines: dict | None = None    # baselines.json
    log: str = ""                    # train.log

    @property
    def stages(self) -> dict[str, float]:
        """BPB by stage, in the order of the pipeline."""
        bpb = self.result["bpb"]
        return {stage: bpb[stage] for stage in STAGES if stage in bpb} | {stage: value for stage, value in bpb.items() if stage not in STAGES}

    @property
    def hardware(self) -> str:
        return f"{self.result['hardware']}, torch {self.result['versions'].get('torch', '?')}"

    @property
    def documents(self) -> str:
        data = self.result["data"]
        whose = "of the contest" if data["dataset"] == "contest" else "not the contest's"
        return f"{data['val_documents']:,} validation documents, {data['val_bytes']:,} bytes, {whose}"

    def rescored_equal(self) -> bool:
        """Whether every BPB of eval_result.json equals that of result.json as printed, to six decimals."""
        again = self.rescored["bpb"]
        return bool(again) and all(f"{value:.6f}" == f"{self.result['bpb'].get(stage, math.nan):.6f}" for stage, value in again.items())


def read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ReportError(f"{path}: no such file; give the folder of a finished run of train_gpt.py") from None
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError
        raise ReportError(f"{path}: not JSON ({error}); the file is damaged, run again") from None
    except OSError as error:
        raise ReportError(f"{path}: cannot be read ({error.strerror}); give the folder of a finished run of train_gpt.py") from None
    if not isinstance(value, dict):
        raise ReportError(f"{path}: not a JSON object; the file is damaged, run again")
    return value


def check_result(result: dict, path: Path, required: dict[str, type]) -> dict:
    for key, kind in required.items():
        if not isinstance(result.get(key), kind):
            raise ReportError(f"{path}: holds no {key}; it is not a result of train_gpt.py, or damaged: run again")
    if not result["bpb"] or not all(isinstance(value, float) and math.isfinite(value) for value in result["bpb"].values()):
        raise ReportError(f"{path}: its bpb is empty or not finite; run again")
    return result


def load_run(folder: Path) -> Run:
    run = Run(folder, check_result(read_json(folder / "result.json"), folder / "result.json", REQUIRED))
    if missing := [key for key in ("dataset", "val_documents", "val_bytes") if key not in run.result["data"]]:
        raise ReportError(f"{folder / 'result.json'}: its data lacks {', '.join(missing)}; it is damaged, run again")
    if (path := folder / "eval_result.json").exists():
        run.rescored = check_result(read_json(path), path, {"bpb": dict})
    if (path := folder / "baselines.json").exists():
        run.baselines = check_result(read_json(path), path, {"bpb": dict, "fingerprint": dict})
    if (path := folder / "train.log").exists():
        run.log = path.read_text(encoding="utf-8", errors="replace")
    return run


def write_file(path: Path, data: bytes) -> None:
    """Writes `path` whole, by rename."""
    part = path.with_name(path.name + ".part")
    with open(part, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


# ---------------------------------------------------------------- baselines

class Bigram:
    """Interpolated modified Kneser-Ney bigram over token ids (Chen and Goodman 1998), down to a uniform distribution.

    p(w | h) = (c(h, w) - D(c)) / c(h) + lambda(h) p1(w), where p1 counts the different tokens seen before w, and D(1), D(2), D(3+) come from the counts of counts.
    """

    def __init__(self, tokens: np.ndarray, vocab_size: int):
        """tokens: uint16 (n,), n > 1."""
        self.vocab_size = vocab_size
        self.keys, counts = np.unique(pair_keys(tokens[:-1], tokens[1:], vocab_size), return_counts=True)
        heads, tails = self.keys // vocab_size, self.keys % vocab_size
        discounts = kneser_ney_discounts(counts)[np.minimum(counts, 3)]
        total = np.bincount(heads, counts, vocab_size)
        self.left_over = np.where(total > 0, np.bincount(heads, discounts, vocab_size) / np.maximum(total, 1), 1.0)
        self.kept = (counts - discounts) / total[heads]
        before = np.bincount(tails, minlength=vocab_size)            # different tokens before each token
        spread = 0.75 * np.count_nonzero(before) / before.sum()
        self.lower = np.maximum(before - 0.75, 0) / before.sum() + spread / vocab_size

    def probability(self, heads: np.ndarray, tails: np.ndarray) -> np.ndarray:
        """p(tails | heads), elementwise: uint16 (n,), uint16 (n,) -> float64 (n,)."""
        keys = pair_keys(heads, tails, self.vocab_size)
        at = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        return np.where(self.keys[at] == keys, self.kept[at], 0.0) + self.left_over[heads] * self.lower[tails]


def pair_keys(heads: np.ndarray, tails: np.ndarray, vocab_size: int) -> np.ndarray:
    """One uint32 per pair of ids below 65536."""
    return heads.astype(np.uint32) * np.uint32(vocab_size) + tails.astype(np.uint32)


def kneser_ney_discounts(counts: np.ndarray) -> np.ndarray:
    """(0, D1, D2, D3+) from the counts of counts; 0.75 where there is too little data for the estimate."""
    n = [np.count_nonzero(counts == i) for i in range(1, 5)]
    if min(n) == 0:
        return np.array([0, 0.75, 0.75, 0.75])
    ratio = n[0] / (n[0] + 2 * n[1])
    estimates = [i - (i + 1) * ratio * n[i] / n[i - 1] for i in (1, 2, 3)]
    return np.array([0, *(min(max(estimate, 0.01), i - 0.01) for i, estimate in enumerate(estimates, 1))])


def read_stream(data_path: Path, name: str, limit: int | None = None) -> np.ndarray:
    """The uint16 values of all shards fineweb_NAME_*.bin in order, at most `limit`."""
    from prepare_data import DataError, read_shard
    pattern = re.compile(rf"fineweb_{name}_\d+\.bin")              # val_* must not take val_bytes_*
    paths = sorted(path for path in data_path.glob("fineweb_*.bin") if pattern.fullmatch(path.name))
    if not paths:
        raise ReportError(f"{data_path}: no fineweb_{name}_*.bin there; give --baselines the folder that the run was trained on")
    values, held = [], 0
    for path in paths:
        try:
            values.append(read_shard(path)[: None if limit is None else limit - held])
        except DataError as error:
            raise ReportError(str(error)) from None
        held += len(values[-1])
        if limit is not None and held >= limit:
            break
    return np.concatenate(values)


def document_texts(tokens: np.ndarray, model: Path) -> list[str]:
    """The validation documents as the tokens spell them: what SentencePiece normalises away (runs of spaces, line breaks) is not there."""
    import sentencepiece

    import lossless_caps
    from prepare_data import BOS_ID
    try:
        sp = sentencepiece.SentencePieceProcessor(model_file=str(model))
    except (OSError, RuntimeError):
        raise ReportError(f"{model}: not a SentencePiece model; the tokenizer of the data is needed to turn tokens into text") from None
    caseops = not any(sp.is_unknown(sp.piece_to_id(operator)) for operator in lossless_caps.OPERATORS)
    texts = []
    for start, end in pairwise([*np.flatnonzero(tokens == BOS_ID), len(tokens)]):
        text = sp.decode(tokens[start + 1:end].tolist())
        try:
            texts.append(lossless_caps.decode(text) if caseops else text)
        except lossless_caps.CaseOpsError:  # normalisation made a capital and its accent one character: the operators say nothing any more
            texts.append(text.translate(dict.fromkeys(map(ord, lossless_caps.OPERATORS))))
    return texts


def fingerprint(data_path: Path) -> dict:
    """What the figures depend on."""
    train = sum((path.stat().st_size - 1024) // 2 for path in data_path.glob("fineweb_train_*.bin"))
    val = read_stream(data_path, "val")
    return {"val_sha256": hashlib.sha256(np.ascontiguousarray(val)).hexdigest(), "train_tokens": train}


def compute_baselines(data_path: Path, model: Path) -> dict:
    """BPB of compressors on the concatenated validation text, and of token n-grams on the validation tokens, all over the bytes of the sidecar."""
    started = time.perf_counter()
    tokens, train = read_stream(data_path, "val"), read_stream(data_path, "train", BIGRAM_TOKENS)
    size = int(read_stream(data_path, "val_bytes").sum(dtype=np.int64))
    text = "".join(document_texts(tokens, model)).encode("utf-8", "replace")
    bpb = {name: 8 * len(compress(text)) / size for name, compress in COMPRESSORS.items()}
    vocab_size = int(max(train.max(), tokens.max())) + 1
    bigram = Bigram(train, vocab_size).probability(tokens[:-1], tokens[1:])
    counts = np.bincount(train, minlength=vocab_size) + 1
    unigram = counts[tokens[1:]] / counts.sum()
    bpb |= {name: float(-np.log2(p).sum() / size) for name, p in (("token bigram", bigram), ("token unigram", unigram))}
    return {"bpb": bpb, "bytes": size, "text_bytes": len(text), "bigram": f"interpolated modified Kneser-Ney, {len(train):,} training tokens",
            "fingerprint": fingerprint(data_path), "seconds": round(time.perf_counter() - started, 1)}


def add_baselines(run: Run, data_path: Path) -> None:
    """Takes baselines.json if it belongs to this data, else computes and writes it."""
    now = fingerprint(data_path)
    if run.result["data"].get("val_sha256", now["val_sha256"]) != now["val_sha256"]:
        raise ReportError(f"{data_path}: not the validation documents that {run.folder} was scored on; give --baselines the right folder")
    if run.baselines is None or run.baselines["fingerprint"] != now:
        run.baselines = compute_baselines(data_path, data_path / "tokenizer.model")
        write_file(run.folder / "baselines.json", json.dumps(run.baselines, indent=1).encode())


# ---------------------------------------------------------------- tables

def align(rows: list[tuple[str, ...]]) -> str:
    """Columns padded with spaces: numbers to the right, words to the left, the last column ragged."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    number = re.compile(r"[-+]?[\d,.]*\d%?")
    padded = ((cell.rjust(width) if number.fullmatch(cell) else cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join("  ".join(row).rstrip() for row in padded)


def one_run_table(run: Run) -> str:
    result, training = run.result, run.result["training"]
    verdicts = ", ".join(f"{name} {entry['verdict']}" for name, entry in result["verdicts"].items() if entry["verdict"] != "NOT RUN")
    headline = f"val_bpb {result['val_bpb']:.6f}" if "val_bpb" in result else "no val_bpb: a condition failed"
    steps = ("steps", f"{training.get('steps', 0):,}", f"{training.get('tokens', 0):,} tokens, {training.get('epochs', 0):.2f} passes over the training data")
    table = align([*bpb_rows(run), *byte_rows(result), *second_rows(result), steps])
    return f"{run.folder}: {run.hardware}, seed {result['seed']}\n{run.documents}\n\n{table}\n\n{headline}; {verdicts}"


def bpb_rows(run: Run) -> list[tuple[str, str, str]]:
    rows = [("", "BPB", "")] + [(stage, f"{value:.6f}", STAGES.get(stage, "")) for stage, value in run.stages.items()]
    if run.rescored:
        stage, value = list(run.rescored["bpb"].items())[-1]
        rows.append((f"{stage}, alone", f"{value:.6f}", f"train_gpt.py and model.bin scored by themselves: {'the same' if run.rescored_equal() else 'DIFFERENT'}"))
    if run.baselines:
        text = f"validation text, {run.baselines['text_bytes']:,} bytes as the tokenizer spells it"
        notes = dict.fromkeys(COMPRESSORS, text) | {"token bigram": run.baselines["bigram"]}
        rows += [(name, f"{value:.6f}", notes.get(name, "")) for name, value in run.baselines["bpb"].items()]
    return rows


def byte_rows(result: dict) -> list[tuple[str, str, str]]:
    cap = result["settings"].get("artifact_cap", 0)
    return [("", "bytes", "")] + [(name, f"{size:,}", f"limit {cap:,}" if name == "total" and cap else "") for name, size in result["bytes"].items()]


def second_rows(result: dict) -> list[tuple[str, str, str]]:
    limit, rows = result["settings"].get("max_wallclock_seconds") or 0, [("", "seconds", "")]
    for budget in ("train", "eval"):
        if budget in result["seconds"]:
            parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in budget_parts(result["seconds"], budget) if seconds >= 0.05)
            rows.append((budget, f"{result['seconds'][budget]:.1f}", f"limit {limit:.0f}: {parts}" if limit else parts))
    return rows


def many_runs_table(runs: list[Run]) -> str:
    stages = [stage for stage in STAGES if any(stage in run.stages for run in runs)]
    rows = [("run", "seed", *stages, "val_bpb", "bytes", "steps", "train s", "eval s")]
    scores = [[run.stages.get(stage) for stage in stages] + [run.result.get("val_bpb")] for run in runs]
    shown = lambda value: "-" if value is None else f"{value:.6f}"
    for run, score in zip(runs, scores, strict=True):
        r = run.result
        rows.append((run.folder.name, str(r["seed"]), *map(shown, score), f"{r['bytes'].get('total', 0):,}", f"{r['training'].get('steps', 0):,}",
                     f"{r['seconds'].get('train', 0):.1f}", f"{r['seconds'].get('eval', 0):.1f}"))
    columns = [[value for value in column if value is not None] for column in zip(*scores, strict=True)]
    for name, function in (("mean", statistics.fmean), ("std", statistics.stdev)):
        rows.append((name, "", *(shown(function(column) if len(column) > 1 else None) for column in columns), "", "", "", ""))
    return align(rows)


def budget_parts(seconds: dict[str, float], budget: str) -> list[tuple[str, float]]:
    """The phases of one budget, in the order they ran; what they leave unexplained is `other`."""
    inside = {name: value for name, value in seconds.items() if name not in ("train", "eval", *OUTSIDE_PHASES)}
    parts = [(name, value) for name, value in inside.items() if (name in TRAIN_PHASES) == (budget == "train")]
    rest = seconds.get(budget, 0.0) - sum(value for _, value in parts)
    return parts + [("other", rest)] if rest > 0.05 else parts


# ---------------------------------------------------------------- plots

INK, QUIET, COLOURS = "#1f2933", "#7b8794", ("#2563eb", "#ea580c", "#059669", "#9333ea", "#dc2626", "#0891b2", "#ca8a04", "#4b5563")


def new_figure(columns: int, title: str, subtitle: str, widths: tuple[float, ...] | None = None):
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    pyplot.rcParams.update({
        "font.size": 10, "text.color": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.edgecolor": QUIET, "grid.color": "#e4e7eb",
        "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True, "legend.frameon": False})
    figure, axes = pyplot.subplots(1, columns, figsize=(11, 4.6), dpi=150, width_ratios=widths, layout="constrained")
    figure.suptitle(f"{title}\n", fontsize=13, fontweight="bold", x=0.01, ha="left")
    figure.text(0.01, 0.925, subtitle, fontsize=9, color=QUIET, ha="left", va="center")
    return figure, axes


def save_figure(figure, path: Path) -> Path:
    from matplotlib import pyplot
    part = path.with_name(path.name + ".part")
    figure.savefig(part, format="png", metadata={"Software": None})
    os.replace(part, path)
    pyplot.close(figure)
    return path


def describe(runs: list[Run]) -> str:
    return " | ".join(dict.fromkeys(f"{run.hardware}; {run.documents}" for run in runs))


def plot_loss(runs: list[Run], path: Path) -> Path | None:
    """Training loss over steps and over seconds; events of the first run's log (loops on, a new attention span) are dotted lines."""
    curves = [np.array(run.result["training"].get("curve") or np.zeros((0, 4)), dtype=float) for run in runs]    # step, seconds, loss, learning-rate factor
    if not any(len(curve) > 1 for curve in curves):
        return None
    figure, axes = new_figure(2, "Training loss", describe(runs))
    for axis, column, label in zip(axes, (0, 1), ("step", "seconds of training"), strict=True):
        for run, curve, colour in zip(runs, curves, COLOURS * len(runs)):
            marker = "o" if len(curve) < 40 else None
            axis.plot(curve[:, column], curve[:, 2], color=colour, linewidth=1.6, marker=marker, markersize=3, label=f"{run.folder.name}, seed {run.result['seed']}")
        for step, event in re.findall(r"^step (\d+): (loops on|attention span \d+)", runs[0].log, re.M):
            if int(step) > 0 and len(curves[0]):
                at = np.interp(int(step), curves[0][:, 0], curves[0][:, column])
                axis.axvline(at, color=QUIET, linestyle=":", linewidth=1)
                axis.annotate(event, (at, 1), xycoords=("data", "axes fraction"), xytext=(4, -4), textcoords="offset points", fontsize=8, color=QUIET, va="top")
        axis.set(xlabel=label, xlim=(0, None))
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(axis="y")
    axes[0].set_ylabel("loss (nats per token)")
    if len(runs) > 1:
        axes[1].legend(fontsize=8)
    return save_figure(figure, path)


def plot_phases(runs: list[Run], path: Path) -> Path:
    """BPB through the stages beside the baselines, and where the time budgets went (of the first run)."""
    figure, (left, right) = new_figure(2, "Bits per byte through the phases, and the time budgets", describe(runs), (1, 1.15))
    plot_stages(runs, left)
    plot_budgets(runs[0], right)
    return save_figure(figure, path)


def plot_stages(runs: list[Run], axis) -> None:
    stages = list(runs[0].stages)
    for run, colour in zip(runs, COLOURS * len(runs)):
        values = [run.stages.get(stage, math.nan) for stage in stages]
        axis.plot(range(len(stages)), values, color=colour, marker="o", linewidth=1.8, zorder=3, label=run.folder.name)
        for x, value in enumerate(values if len(runs) == 1 else ()):
            axis.annotate(f"{value:.4f}", (x, value), xytext=(0, 8), textcoords="offset points", ha="center", fontweight="bold", color=colour,
                          bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.0})
    for name, value in (runs[0].baselines or {"bpb": {}})["bpb"].items():
        if name != "token unigram":                                 # far above the rest: it would flatten them
            axis.axhline(value, color=QUIET, linestyle="--", linewidth=1)
            axis.annotate(f"{name} {value:.3f}", (1, value), xycoords=("axes fraction", "data"), xytext=(-2, 3), textcoords="offset points",
                          ha="right", fontsize=8, color=QUIET)
    axis.margins(y=0.2)
    axis.set(xlim=(-0.5, len(stages) - 0.1), xlabel="stage", ylabel="validation bits per byte (lower is better)")
    axis.set_xticks(range(len(stages)), stages)
    axis.grid(axis="y")
    if len(runs) > 1:
        axis.legend(fontsize=8)


def plot_budgets(run: Run, axis) -> None:
    seconds, limit = run.result["seconds"], run.result["settings"].get("max_wallclock_seconds") or 0
    outside = [(name, seconds[name]) for name in OUTSIDE_PHASES if seconds.get(name, 0) > 0]
    bars = [("training", budget_parts(seconds, "train")), ("evaluation", budget_parts(seconds, "eval")), ("in neither", outside)]
    longest = max(limit, *(sum(value for _, value in parts) for _, parts in bars))
    for y, (_, parts) in enumerate(bars):
        at = 0.0
        for i, (name, value) in enumerate(parts):
            axis.barh(y, value, left=at, height=0.5, color=COLOURS[i % len(COLOURS)], alpha=0.85, edgecolor="white")
            if value > 0.14 * longest:
                axis.text(at + value / 2, y, f"{name}\n{value:.1f}", ha="center", va="center", fontsize=8, color="white")
            at += value
        small = [f"{name} {value:.1f}" for name, value in parts if 0.05 <= value <= 0.14 * longest]
        axis.text(0, y + 0.36, f"{at:.1f} s" + (f"  (with {', '.join(small)})" if small else ""), fontsize=8, color=INK, va="center")
    if limit:
        axis.plot([limit, limit], [-0.35, 1.35], color="#dc2626", linewidth=1.4)
        axis.annotate(f"limit {limit:.0f} s", (limit, -0.35), xytext=(-3, 4), textcoords="offset points", ha="right", color="#dc2626", fontsize=8)
    axis.set(xlabel=f"seconds ({run.folder.name})", xlim=(0, longest * 1.04), ylim=(2.55, -0.6))
    axis.set_yticks(range(3), [name for name, _ in bars])
    axis.grid(axis="x")


# ---------------------------------------------------------------- the page

def write_page(runs: list[Run], table: str, pictures: Iterable[Path], path: Path) -> None:
    """One HTML file with everything in it."""
    encoded = {picture.stem: base64.b64encode(picture.read_bytes()).decode() for picture in pictures}
    images = "\n".join(f'<img alt="{name}" src="data:image/png;base64,{data}">' for name, data in encoded.items())
    texts = [(f"{run.folder}: {name}", text) for run in runs for name, text in (("result.json", json.dumps(run.result, indent=1)), ("train.log", run.log)) if text]
    details = "\n".join(f"<details><summary>{html.escape(title)}</summary><pre>{html.escape(text)}</pre></details>" for title, text in texts)
    title = html.escape(", ".join(run.folder.name for run in runs))
    write_file(path, f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>body {{ font: 15px/1.5 system-ui, sans-serif; color: {INK}; max-width: 72em; margin: 2em auto; padding: 0 1em }}
pre {{ background: #f5f7fa; padding: 1em; overflow-x: auto; font-size: 13px }} img {{ width: 100%; margin: 1em 0 }} summary {{ cursor: pointer }}</style>
<pre>{html.escape(table)}</pre>
{images}
{details}
</html>
""".encode())


# ---------------------------------------------------------------- command line

def check(run: Run) -> list[str]:
    """What --check finds wrong with a run, one line each."""
    faults = []
    if run.baselines is None:
        faults.append(f"{run.folder}: has no baselines.json; pass --baselines DATA_PATH")
    else:
        trained = run.result["bpb"].get("trained", math.inf)
        faults += [f"{run.folder}: trained BPB {trained:.6f} is not below {name} {run.baselines['bpb'][name]:.6f}"
                   for name in ("gzip -9", "token bigram") if not trained < run.baselines["bpb"][name]]
    if run.rescored is not None and not run.rescored_equal():
        faults.append(f"{run.folder}: eval_result.json has BPB {run.rescored['bpb']}, result.json has {run.result['bpb']}")
    return faults


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR", help="folder with a result.json")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the plots and report.html go (default: the folder of the run; of several: report)")
    parser.add_argument("--baselines", type=Path, metavar="DATA_PATH", help="dataset of the runs: compute gzip, xz and n-gram BPB on its validation documents")
    parser.add_argument("--check", action="store_true", help="exit with status 1 unless the runs hold what they must (see above)")
    return parser.parse_args(argv)


def report(args: argparse.Namespace) -> int:
    runs = [load_run(folder) for folder in args.runs]
    for run in runs if args.baselines else ():
        add_baselines(run, args.baselines)
    table = one_run_table(runs[0]) if len(runs) == 1 else many_runs_table(runs)
    print(table, end="\n\n")
    out = args.out or (runs[0].folder if len(runs) == 1 else Path("report"))
    out.mkdir(parents=True, exist_ok=True)
    pictures = [path for path in (plot_loss(runs, out / "loss.png"), plot_phases(runs, out / "phases.png")) if path]
    write_page(runs, table, pictures, out / "report.html")
    print("wrote " + ", ".join(str(path) for path in (*pictures, out / "report.html")))
    faults = [fault for run in runs for fault in check(run)] if args.check else []
    for fault in faults:
        print(f"check failed: {fault}", file=sys.stderr)
    return 1 if faults else 0


def main(argv: list[str] | None = None) -> int:
    try:
        return report(parse_args(argv))
    except (ReportError, OSError) as error:
        print(f"report.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
