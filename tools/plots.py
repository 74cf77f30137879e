"""Plots of finished runs, one PNG each, and narrow ones for the page on a phone.

A colour has one meaning in a figure: that of a run in RUN_COLOURS, that of a phase in PHASE_COLOURS.
"""

import io
import math
import re
import warnings
from collections.abc import Callable

import numpy as np

from tools.runs import OUTSIDE_PHASES, Run, budget_parts

INK, QUIET, LIMIT = "#1f2933", "#616e7c", "#b91c1c"
RUN_COLOURS = ("#2563eb", "#ea580c", "#059669", "#db2777", "#0891b2", "#ca8a04", "#1f2933", "#65a30d")
# Of the training budget blues, of evaluation oranges, outside both greys; within a budget from dark to light.
PHASE_COLOURS = {
    "steps": "#1e3a8a",
    "calibrate": "#3b82f6",
    "quantize": "#93c5fd",
    "adapt": "#9a3412",
    "score": "#c2410c",
    "prequant": "#ea580c",
    "load": "#fb923c",
    "prepare": "#fdba74",
    "read": "#fed7aa",
    "diagnostic": "#374151",
    "subset": "#4b5563",
    "warmup": "#6b7280",
    "setup": "#9ca3af",
    "save": "#c3c8d0",
    "write": "#e5e7eb",
    "other": "#facc15",
}
WIDE, NARROW = (11, 4.6), (4.6, 3.9)  # inches: of a figure whose panels lie side by side, of each panel of a narrow one


def new_figure(title: str, subtitle: str, narrow: bool, widths: tuple[float, ...] = (1, 1)):
    """A figure of panels side by side, one for each width; narrow: of two, one above the other."""
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
    if narrow:  # the page has title and subtitle as text
        size = (NARROW[0], 2 * NARROW[1])
        return pyplot.subplots(2, 1, figsize=size, dpi=170, layout="constrained")
    figure, axes = pyplot.subplots(1, len(widths), figsize=WIDE, dpi=150, width_ratios=widths, layout="constrained")
    figure.suptitle(f"{title}\n", fontsize=13, fontweight="bold", x=0.01, ha="left")
    figure.text(0.01, 0.925, subtitle, fontsize=9, color=QUIET, ha="left", va="center")
    return figure, axes


def as_png(figure) -> bytes:
    from matplotlib import pyplot

    picture = io.BytesIO()
    with warnings.catch_warnings():  # a folder may be named in letters that the font lacks: boxes, no news
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        figure.savefig(picture, format="png", metadata={"Software": None})
    pyplot.close(figure)
    return picture.getvalue()


def describe(runs: list[Run]) -> str:
    return " | ".join(dict.fromkeys(f"{run.hardware}; {run.documents}" for run in runs))


def coloured(runs: list[Run]) -> zip:
    return zip(runs, RUN_COLOURS * len(runs))


# ---------------------------------------------------------------- training loss


def smoothed(values: np.ndarray) -> tuple[np.ndarray, int]:
    """Running mean of values (n,) over a window centred on each, and the window: a twentieth of them, and odd. At the
    ends the window is as wide on both sides as there is room, so that a falling loss is not bent."""
    window = max(len(values) // 20, 1) | 1
    sums = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    half = np.minimum(np.minimum(at, at[::-1]), window // 2)
    return (sums[at + half + 1] - sums[at - half]) / (2 * half + 1), window


def plot_loss(runs: list[Run], narrow: bool = False) -> bytes | None:
    """Training loss over steps and over seconds: what was logged as points, their running mean as a line. Events of the
    first run's log (loops on, a new attention span) are dotted lines. BPB of VAL_EVERY_STEPS, where runs have it, as
    joined diamonds on an axis of its own at the right."""
    empty = np.zeros((0, 4))
    # step, seconds, loss, learning-rate factor
    curves = [np.array(run.result["training"].get("curve") or empty, dtype=float) for run in runs]
    if not any(len(curve) > 1 for curve in curves):
        return None
    figure, axes = new_figure("Training loss", describe(runs), narrow)
    window = 1
    for axis, column, label in zip(axes, (0, 1), ("step", "seconds of training"), strict=True):
        for (run, colour), curve in zip(coloured(runs), curves):
            if not len(curve):
                continue
            mean, window = smoothed(curve[:, 2])
            faint = 0.35 if window > 1 else 1
            axis.plot(curve[:, column], curve[:, 2], ".", color=colour, alpha=faint, markersize=6, markeredgewidth=0)
            axis.plot(
                curve[:, column], mean, color=colour, linewidth=1.6, label=f"{run.name}, seed {run.result['seed']}"
            )
        mark_events(runs[0], curves[0], column, axis)
        axis.set(xlabel=label, xlim=(0, None), ylabel="loss (nats per token)")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(axis="y")
        plot_val_curves(runs, column, axis)
    how = "points: as logged" + (f"; line: mean of {window} in a row" if window > 1 else ", joined")
    # Below the panels: within them it would hide a curve or the name of an event.
    marks = axes[0].get_legend_handles_labels()
    place = {"loc": "outside lower center", "ncols": 1 if narrow else 3}
    figure.legend(*marks, fontsize=8, title=how, title_fontsize=8, **place)
    return as_png(figure)


def plot_val_curves(runs: list[Run], column: int, axis) -> None:
    """BPB of the first validation documents over steps (column 0) or seconds (1)."""
    curves = [np.array(run.result.get("val_curve") or np.zeros((0, 3)), dtype=float) for run in runs]
    if not any(len(curve) for curve in curves):
        return
    right = axis.twinx()
    for (run, colour), curve in zip(coloured(runs), curves):
        right.plot(curve[:, column], curve[:, 2], "D--", color=colour, linewidth=0.8, markersize=4, label=run.name)
    right.set_ylabel("dashed: BPB of the first validation documents")
    right.spines["right"].set_visible(True)


def mark_events(run: Run, curve: np.ndarray, column: int, axis) -> None:
    """Dotted lines where the log of a run says that something changed."""
    for step, event in re.findall(r"^step (\d+): (loops on|attention span \d+)", run.log, re.M):
        if int(step) == 0 or not len(curve):
            continue
        at = np.interp(int(step), curve[:, 0], curve[:, column])
        axis.axvline(at, color=QUIET, linestyle=":", linewidth=1)
        axis.annotate(
            event,
            (at, 1),
            xycoords=("data", "axes fraction"),
            xytext=(3, -2),
            textcoords="offset points",
            fontsize=8,
            color=QUIET,
            rotation=90,
            va="top",
        )


# ---------------------------------------------------------------- phases and budgets


def plot_phases(runs: list[Run], narrow: bool = False) -> bytes:
    """BPB of the stages beside the baselines, and where the time budgets went (of the first run)."""
    title = "Bits per byte of each stage, and the time budgets"
    figure, (left, right) = new_figure(title, describe(runs), narrow, (1, 1.15))
    plot_stages(runs, left)
    plot_budgets(runs[0], right)
    return as_png(figure)


def spread_of(runs: list[Run]) -> list[float]:
    """Where the points of each run stand beside the middle of their category, so that none hides another."""
    count = len(runs)
    return [0.0] if count == 1 else [0.5 * (i / (count - 1) - 0.5) for i in range(count)]


def plot_stages(runs: list[Run], axis) -> None:
    stages = list(runs[0].stages)
    for (run, colour), beside in zip(coloured(runs), spread_of(runs)):
        values = [run.stages.get(stage, math.nan) for stage in stages]
        places = [x + beside for x in range(len(stages))]
        axis.plot(places, values, "o", color=colour, markersize=7, zorder=3, label=run.name)
        for x, value in enumerate(values if len(runs) == 1 else ()):
            axis.annotate(
                f"{value:.4f}",
                (x, value),
                xytext=(0, 8),
                textcoords="offset points",
                ha="center",
                fontweight="bold",
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.0},
            )
    baselines = (runs[0].baselines or {"bpb": {}})["bpb"]
    for name, value in baselines.items():
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
    names = 0.9 if baselines else 0.0  # room at the right, where no point hides the name of a baseline
    axis.set(xlim=(-0.5, len(stages) - 0.5 + names), ylabel="validation bits per byte (lower is better)")
    axis.set_xticks(range(len(stages)), stages)
    axis.grid(axis="y")
    if len(runs) > 1:
        axis.legend(fontsize=8)


def plot_budgets(run: Run, axis) -> None:
    """A bar for each budget, its phases in their colours, and what each took in a legend below."""
    seconds, limit = run.result["seconds"], run.result["settings"].get("max_wallclock_seconds") or 0
    outside = [(name, seconds[name]) for name in OUTSIDE_PHASES if seconds.get(name, 0) > 0]
    bars = {
        "training": budget_parts(seconds, "train"),
        "evaluation": budget_parts(seconds, "eval"),
        "in neither": outside,
    }
    handles = []
    for y, parts in enumerate(bars.values()):
        at = 0.0
        for name, value in sorted(parts, key=lambda part: list(PHASE_COLOURS).index(colour_name(part[0]))):
            colour = PHASE_COLOURS[colour_name(name)]
            bar = axis.barh(y, value, left=at, height=0.5, color=colour, label=f"{name} {value:,.1f} s")
            handles += [bar] if value >= 0.05 else []  # below, nothing is seen of it
            at += value
        white = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}  # the line of the limit ends behind it
        axis.annotate(
            f"{at:,.1f} s",
            (at, y),
            xytext=(6, 0),
            textcoords="offset points",
            fontsize=9,
            va="center",
            fontweight="bold",
            bbox=white,
        )
    longest = max([limit, *(sum(value for _, value in parts) for parts in bars.values())])
    if limit:
        axis.plot([limit, limit], [-0.4, 1.4], color=LIMIT, linewidth=1.4)
        axis.annotate(
            f"limit {limit:,.0f} s",
            (limit, -0.4),
            xytext=(0, 3),
            textcoords="offset points",
            ha="right",
            color=LIMIT,
            fontsize=9,
        )
    axis.set(xlabel=f"seconds ({run.name})", xlim=(0, longest * 1.18), ylim=(2.4, -0.75))
    axis.set_yticks(range(3), list(bars))
    axis.grid(axis="x")
    axis.legend(
        handles=handles, fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.45, -0.16), columnspacing=1.2
    )


def colour_name(phase: str) -> str:
    return phase if phase in PHASE_COLOURS else "other"


# ---------------------------------------------------------------- documents


def plot_documents(runs: list[Run], narrow: bool = False) -> bytes | None:
    """BPB of the headline pass by length of the document and by position in it, from bpb_by_length and
    bpb_by_position."""
    parts = (
        ("bpb_by_length", "documents", "tokens of the document, at most; below: documents"),
        ("bpb_by_position", "targets", "position in the document, at most; below: targets"),
    )
    if not all(runs[0].anatomy.get(key) for key, _, _ in parts):
        return None
    figure, axes = new_figure("Bits per byte by document length and by position", describe(runs), narrow)
    for axis, (key, counted, label) in zip(axes, parts, strict=True):
        bins = runs[0].anatomy[key]
        for (run, colour), beside in zip(coloured(runs), spread_of(runs)):
            values = [entry["bpb"] for entry in run.anatomy.get(key, ())]
            axis.plot([x + beside for x in range(len(values))], values, "o", color=colour, markersize=6, label=run.name)
        axis.set_xticks(range(len(bins)), [f"{bound(entry)}\n{short(entry.get(counted))}" for entry in bins])
        axis.tick_params(axis="x", labelsize=8)
        axis.set(xlim=(-0.6, len(bins) - 0.4), ylabel="validation bits per byte")
        axis.set_xlabel(label, fontsize=9)
        axis.margins(y=0.15)
        axis.grid(axis="y")
    if len(runs) > 1:
        axes[1].legend(fontsize=8)
    return as_png(figure)


def bound(entry: dict) -> str:
    return short(entry["upto"]) if entry["upto"] < 1e9 else "longer"


def short(count: int | None) -> str:
    """A count in at most five characters: 940, 12.3k, 1.2M; nothing where it is not known."""
    if count is None:
        return ""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if count >= 10 * size or unit == "M" and count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:,}"


# ---------------------------------------------------------------- bytes


def plot_bits(bits: dict[str, dict], title: str, narrow: bool = False) -> bytes | None:
    """Bytes of every kind of tensor in model.bin, which add up to the file, and bits per weight."""
    if not bits:
        return None
    figure, (left, right) = new_figure("Where the bytes of model.bin are", title, narrow)
    total = sum(entry["bits"] for entry in bits.values()) / 8
    sizes = {name: entry["bits"] / 8 for name, entry in bits.items()}
    per_weight = {name: entry["bits"] / entry["weights"] for name, entry in bits.items() if entry["weights"]}
    share = lambda size: f"{size:,.0f} ({size / total:.1%})" if total else f"{size:,.0f}"
    horizontal_bars(left, sizes, f"bytes, {total:,.0f} in all", share, 1.5)
    horizontal_bars(right, per_weight, "bits per weight", "{:.2f}".format, 1.18)
    left.locator_params(axis="x", nbins=4)
    left.xaxis.set_major_formatter(lambda value, _: short(round(value)))
    return as_png(figure)


def horizontal_bars(axis, values: dict[str, float], label: str, shown: Callable[[float], str], room: float) -> None:
    axis.barh(range(len(values)), values.values(), height=0.6, color=RUN_COLOURS[0])
    for y, value in enumerate(values.values()):
        axis.text(value, y, f" {shown(value)}", va="center", fontsize=8)
    axis.set(xlabel=label, ylim=(len(values) - 0.4, -0.6), xlim=(0, room * max(values.values(), default=1)))
    axis.set_yticks(range(len(values)), list(values), fontsize=8)
    axis.grid(axis="x")
