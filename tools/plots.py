"""Plots of finished runs, one PNG each."""

import io
import math
import re
import warnings
from pathlib import Path

import numpy as np

from prepare_data import write_file
from tools.runs import OUTSIDE_PHASES, Run, budget_parts

INK, QUIET, COLOURS = (
    "#1f2933",
    "#7b8794",
    ("#2563eb", "#ea580c", "#059669", "#9333ea", "#dc2626", "#0891b2", "#ca8a04", "#4b5563"),
)


def new_figure(columns: int, title: str, subtitle: str, widths: tuple[float, ...] | None = None):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update(
        {
            "font.size": 10,
            "text.color": INK,
            "axes.labelcolor": INK,
            "xtick.color": INK,
            "ytick.color": INK,
            "axes.edgecolor": QUIET,
            "grid.color": "#e4e7eb",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.axisbelow": True,
            "legend.frameon": False,
        }
    )
    figure, axes = pyplot.subplots(1, columns, figsize=(11, 4.6), dpi=150, width_ratios=widths, layout="constrained")
    figure.suptitle(f"{title}\n", fontsize=13, fontweight="bold", x=0.01, ha="left")
    figure.text(0.01, 0.925, subtitle, fontsize=9, color=QUIET, ha="left", va="center")
    return figure, axes


def save_figure(figure, path: Path) -> Path:
    from matplotlib import pyplot

    picture = io.BytesIO()
    with warnings.catch_warnings():  # a folder may be named in letters that the font lacks: boxes, no news
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        figure.savefig(picture, format="png", metadata={"Software": None})
    write_file(path, picture.getvalue())
    pyplot.close(figure)
    return path


def describe(runs: list[Run]) -> str:
    return " | ".join(dict.fromkeys(f"{run.hardware}; {run.documents}" for run in runs))


def plot_loss(runs: list[Run], path: Path) -> Path | None:
    """Training loss over steps and over seconds; events of the first run's log (loops on, a new attention span) are
    dotted lines."""
    curves = [
        np.array(run.result["training"].get("curve") or np.zeros((0, 4)), dtype=float) for run in runs
    ]  # step, seconds, loss, learning-rate factor
    if not any(len(curve) > 1 for curve in curves):
        return None
    figure, axes = new_figure(2, "Training loss", describe(runs))
    for axis, column, label in zip(axes, (0, 1), ("step", "seconds of training"), strict=True):
        for run, curve, colour in zip(runs, curves, COLOURS * len(runs)):
            marker = "o" if len(curve) < 40 else None
            axis.plot(
                curve[:, column],
                curve[:, 2],
                color=colour,
                linewidth=1.6,
                marker=marker,
                markersize=3,
                label=f"{run.name}, seed {run.result['seed']}",
            )
        for step, event in re.findall(r"^step (\d+): (loops on|attention span \d+)", runs[0].log, re.M):
            if int(step) > 0 and len(curves[0]):
                at = np.interp(int(step), curves[0][:, 0], curves[0][:, column])
                axis.axvline(at, color=QUIET, linestyle=":", linewidth=1)
                axis.annotate(
                    event,
                    (at, 1),
                    xycoords=("data", "axes fraction"),
                    xytext=(4, -4),
                    textcoords="offset points",
                    fontsize=8,
                    color=QUIET,
                    va="top",
                )
        axis.set(xlabel=label, xlim=(0, None))
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(axis="y")
    axes[0].set_ylabel("loss (nats per token)")
    if len(runs) > 1:
        axes[1].legend(fontsize=8)
    return save_figure(figure, path)


def plot_phases(runs: list[Run], path: Path) -> Path:
    """BPB through the stages beside the baselines, and where the time budgets went (of the first run)."""
    figure, (left, right) = new_figure(
        2, "Bits per byte through the phases, and the time budgets", describe(runs), (1, 1.15)
    )
    plot_stages(runs, left)
    plot_budgets(runs[0], right)
    return save_figure(figure, path)


def plot_stages(runs: list[Run], axis) -> None:
    stages = list(runs[0].stages)
    for run, colour in zip(runs, COLOURS * len(runs)):
        values = [run.stages.get(stage, math.nan) for stage in stages]
        axis.plot(range(len(stages)), values, color=colour, marker="o", linewidth=1.8, zorder=3, label=run.name)
        for x, value in enumerate(values if len(runs) == 1 else ()):
            axis.annotate(
                f"{value:.4f}",
                (x, value),
                xytext=(0, 8),
                textcoords="offset points",
                ha="center",
                fontweight="bold",
                color=colour,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.0},
            )
    for name, value in (runs[0].baselines or {"bpb": {}})["bpb"].items():
        if name != "token unigram":  # far above the rest: it would flatten them
            axis.axhline(value, color=QUIET, linestyle="--", linewidth=1)
            axis.annotate(
                f"{name} {value:.3f}",
                (1, value),
                xycoords=("axes fraction", "data"),
                xytext=(-2, 3),
                textcoords="offset points",
                ha="right",
                fontsize=8,
                color=QUIET,
            )
    axis.margins(y=0.2)
    axis.set(xlim=(-0.5, len(stages) - 0.1), xlabel="stage", ylabel="validation bits per byte (lower is better)")
    axis.set_xticks(range(len(stages)), stages)
    axis.grid(axis="y")
    if len(runs) > 1:
        axis.legend(fontsize=8)


def plot_budgets(run: Run, axis) -> None:
    seconds, limit = run.result["seconds"], run.result["settings"].get("max_wallclock_seconds") or 0
    outside = [(name, seconds[name]) for name in OUTSIDE_PHASES if seconds.get(name, 0) > 0]
    bars = [
        ("training", budget_parts(seconds, "train")),
        ("evaluation", budget_parts(seconds, "eval")),
        ("in neither", outside),
    ]
    longest = max(limit, *(sum(value for _, value in parts) for _, parts in bars))
    for y, (_, parts) in enumerate(bars):
        at = 0.0
        for i, (name, value) in enumerate(parts):
            axis.barh(y, value, left=at, height=0.5, color=COLOURS[i % len(COLOURS)], alpha=0.85, edgecolor="white")
            if value > 0.14 * longest:
                axis.text(
                    at + value / 2, y, f"{name}\n{value:.1f}", ha="center", va="center", fontsize=8, color="white"
                )
            at += value
        small = [f"{name} {value:.1f}" for name, value in parts if 0.05 <= value <= 0.14 * longest]
        axis.text(
            0,
            y + 0.36,
            f"{at:.1f} s" + (f"  (with {', '.join(small)})" if small else ""),
            fontsize=8,
            color=INK,
            va="center",
        )
    if limit:
        axis.plot([limit, limit], [-0.35, 1.35], color="#dc2626", linewidth=1.4)
        axis.annotate(
            f"limit {limit:.0f} s",
            (limit, -0.35),
            xytext=(-3, 4),
            textcoords="offset points",
            ha="right",
            color="#dc2626",
            fontsize=8,
        )
    axis.set(xlabel=f"seconds ({run.name})", xlim=(0, longest * 1.04), ylim=(2.55, -0.6))
    axis.set_yticks(range(3), [name for name, _ in bars])
    axis.grid(axis="x")


def plot_documents(runs: list[Run], path: Path) -> Path | None:
    """BPB of the headline pass by length of the document and by position in it, from bpb_by_length and
    bpb_by_position."""
    keys = (
        ("bpb_by_length", "length of the document (tokens, up to; in grey: how many documents)"),
        ("bpb_by_position", "position in the document (tokens, up to)"),
    )
    if not all(runs[0].anatomy.get(key) for key, _ in keys):
        return None
    figure, axes = new_figure(2, "Bits per byte by document length and by position", describe(runs))
    for axis, (key, label) in zip(axes, keys, strict=True):
        bins = runs[0].anatomy[key]
        for run, colour in zip(runs, COLOURS * len(runs)):
            values = [entry["bpb"] for entry in run.anatomy.get(key, ())]
            axis.plot(range(len(values)), values, color=colour, marker="o", markersize=4, linewidth=1.6, label=run.name)
        axis.set_xticks(
            range(len(bins)),
            [f"{entry['upto']:,}" if entry["upto"] < 1e9 else "longer" for entry in bins],
            rotation=30,
            ha="right",
        )
        if key == "bpb_by_length":
            for x, entry in enumerate(bins):
                axis.annotate(
                    f"{entry['documents']:,}",
                    (x, 0),
                    xycoords=("data", "axes fraction"),
                    xytext=(0, 3),
                    textcoords="offset points",
                    ha="center",
                    fontsize=7,
                    color=QUIET,
                )
        axis.set(xlabel=label)
        axis.margins(y=0.15)
        axis.grid(axis="y")
    axes[0].set_ylabel("validation bits per byte")
    if len(runs) > 1:
        axes[1].legend(fontsize=8)
    return save_figure(figure, path)


def plot_bits(bits: dict[str, dict], title: str, path: Path) -> Path | None:
    """Bits per weight of every kind of tensor in model.bin, beside its share of the file."""
    if not bits:
        return None
    names = list(bits)
    figure, (left, right) = new_figure(2, "Where the bytes of model.bin are", title, (1, 1))
    values = [bits[name]["bits"] / bits[name]["weights"] if bits[name]["weights"] else 0.0 for name in names]
    sizes = [bits[name]["bits"] / 8 for name in names]
    for axis, numbers, label, shown in (
        (left, values, "bits per weight", "{:.2f}"),
        (right, sizes, "bytes", "{:,.0f}"),
    ):
        axis.barh(range(len(names)), numbers, height=0.6, color=COLOURS[0], alpha=0.85)
        for y, number in enumerate(numbers):
            axis.text(number, y, " " + shown.format(number) if number else "", va="center", fontsize=8, color=INK)
        axis.set(xlabel=label, ylim=(len(names) - 0.4, -0.6), xlim=(0, 1.18 * max(numbers)))
        axis.grid(axis="x")
    left.set_yticks(range(len(names)), names, fontsize=8)
    right.set_yticks(range(len(names)), [""] * len(names))
    right.xaxis.set_major_formatter("{x:,.0f}")
    return save_figure(figure, path)
