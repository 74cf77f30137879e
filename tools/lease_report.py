"""Tables of what tools/lease.py collected: counts and seconds of each run, BPB on the halves of the validation
documents, and differences between groups of runs (GROUP_sSEED) with their standard errors.

    lease_report.py FOLDER... [--curve PNG]         a picture of the runs whose queue entry names a `curve`

A document belongs to half A or B by a hash of its tokens: A chooses, B is reported. Only documents that every pass
scored whole are compared. The standard error over seeds says what other seeds might give, that over documents what
other documents might, with these weights.
"""

import argparse
import itertools
import json
import math
import re
import signal
import statistics
from pathlib import Path

import numpy as np

if not __package__:  # run as a file
    import anywhere  # noqa: F401

from prepare_data import write_file
from tools import plots


def load(folders: list[Path]) -> tuple[dict, dict, dict]:
    """Runs, bits of documents by RUN/PASS, and the data of collected folders, which must have scored the same text."""
    runs, bits, data = {}, {}, None
    for folder in folders:
        found, arrays = json.loads((folder / "runs.json").read_text()), dict(np.load(folder / "docs.npz"))
        if data and (data["val"] != found["data"]["val"] or (bits["bytes"] != arrays["bytes"]).any()):
            raise SystemExit(f"{folder}: scored other documents than {folders[0]}")
        data, runs, bits = found["data"] | {"gpus": found["gpus"]}, runs | found["runs"], bits | arrays
    return runs, bits, data


def split_key(key: str) -> tuple[str, str, str]:
    """Group, seed and pass of GROUP_sSEED/PASS."""
    name, which = key.split("/")
    match = re.fullmatch(r"(.*)_s(\d+)", name)
    return (match[1], match[2], which) if match else (name, "", which)


def difference(a: dict[str, float], b: dict[str, float]) -> tuple[float, float | None, str]:
    """Mean of a less mean of b over seeds, its standard error, and how it was found.

    Paired where the seeds are the same, else Welch's; none where a side has one run."""
    mean = statistics.mean(a.values()) - statistics.mean(b.values())
    if min(len(a), len(b)) < 2:
        return mean, None, f"{len(a)} against {len(b)}, no standard error over seeds"
    if set(a) == set(b):
        pairs = [a[seed] - b[seed] for seed in a]
        return mean, statistics.stdev(pairs) / math.sqrt(len(pairs)), f"{len(pairs)} pairs of seeds"
    error = math.sqrt(sum(statistics.variance(side.values()) / len(side) for side in (a, b)))
    return mean, error, f"{len(a)} against {len(b)}, Welch"


def signed(gap: float, error: float | None) -> str:
    return f"{gap:+.5f}" + ("" if error is None else f" +- {error:.5f}")


def over_documents(a: np.ndarray, b: np.ndarray, size: np.ndarray) -> float:
    """Standard error of the difference in BPB over the documents, for these very weights."""
    gap = a - b
    rest = gap - gap.sum() / size.sum() * size
    return float(math.sqrt(len(gap) / (len(gap) - 1) * (rest**2).sum()) / size.sum())


def own_bpb(runs: dict, name: str, which: str) -> float | None:
    """What the script itself printed: of the run, or of the one that continued it for this pass."""
    later = [run for run in runs.values() if run["entry"].get("continues") == name]
    adapted = [run["bpb"].get("adapted") for run in later if run["entry"].get("pass", "adapted") == which]
    return runs[name]["bpb"].get(which) or (adapted[0] if adapted else None)


def print_runs(runs: dict, tokens: int) -> None:
    print("\n| run | steps | ms/step | passes | bytes | seconds |\n|---|---|---|---|---|---|")
    for name, run in runs.items():
        seconds = ", ".join(f"{phase} {value:.1f}" for phase, value in run["seconds"].items() if value >= 0.05)
        steps, spent = run["steps"], run["seconds"].get("steps")
        cells = ("", "", "")
        if steps and spent:
            cells = (f"{steps:,}", f"{1000 * spent / steps:.1f}", f"{run['tokens'] / tokens:.2f}")
        print(f"| {name} ({run['state']}) | {' | '.join(cells)} | {run['bytes'] or 0:,} | {seconds} |")


def points(runs: dict, tokens: int) -> dict[str, list[tuple[float, ...]]]:
    """Of each curve (GPU-seconds of steps, steps, passes over the data, trained BPB, half its range), one a budget.

    Runs of one NAME@BUDGET are seeds of one point, which is their mean."""
    seeds = {}
    for run in runs.values():
        if run["entry"].get("curve") and run["bpb"].get("trained"):
            seconds = run["seconds"]["steps"] * len(run["gpus"])
            values = seconds, run["steps"], run["tokens"] / tokens, run["bpb"]["trained"]
            seeds.setdefault(run["entry"]["curve"], []).append(values)
    curves = {}
    for key, point in sorted(seeds.items(), key=lambda item: item[1][0][0]):
        columns = list(zip(*point))
        reach = (max(columns[-1]) - min(columns[-1])) / 2
        curves.setdefault(key.split("@")[0], []).append((*map(statistics.mean, columns), reach))
    return curves


def draw_curves(runs: dict, tokens: int, out: Path) -> None:
    """Trained BPB against what it took, one line a curve; bars are the range over seeds."""
    from matplotlib import ticker

    curves = points(runs, tokens)
    if not curves:
        raise SystemExit("no run names a curve")
    title, subtitle = "BPB of the trained weights", "each point is a run of its own with its whole schedule"
    figure, axes = plots.new_figure(title, subtitle, narrow=False, widths=(1, 1, 1))
    labels = "GPU-seconds of training steps", "steps", "passes over the training data"
    for column, (axis, label) in enumerate(zip(axes, labels)):
        for (name, curve), colour in zip(curves.items(), plots.RUN_COLOURS):
            x, bpb, reach = ([point[i] for point in curve] for i in (column, -2, -1))
            axis.errorbar(x, bpb, reach, marker="o", markersize=5, linewidth=1.6, color=colour, label=name, capsize=2)
        axis.set(xlabel=label, xscale="log")
        axis.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:,.0f}"))
        axis.xaxis.set_minor_formatter(ticker.NullFormatter())
        axis.grid(axis="y")
    axes[0].set_ylabel("bits per byte")
    axes[-1].legend()
    write_file(out, plots.as_png(figure))


def print_printed(runs: dict) -> None:
    """Differences of what the scripts themselves print, where ledgers of a pass did not come back on both sides."""
    sides = {}  # by pass and group: BPB of each seed
    for name, run in runs.items():
        group, seed, _ = split_key(f"{name}/")
        for which, value in run["bpb"].items():
            if seed:
                sides.setdefault((which, group), {})[seed] = value
    for a, b in itertools.combinations(sides, 2):
        if a[0] == b[0]:
            gap, error, how = difference(sides[a], sides[b])
            print(f"{a[0]}, as printed: {a[1]} less {b[1]} {signed(gap, error)} ({how})")


def report(folders: list[Path], curve: Path | None = None) -> None:
    runs, bits, data = load(folders)
    size, keys = bits["bytes"], [key for key in bits if "/" in key]
    whole = np.ones(len(size), bool)
    for key in keys:
        whole &= ~np.isnan(bits[key])
    halves = {"all": whole, "A": whole & ~bits["in_b"], "B": whole & bits["in_b"]}
    bpb = {key: {half: bits[key][mask].sum() / size[mask].sum() for half, mask in halves.items()} for key in keys}
    train, val = data["train"], data["val"]
    counted = ", ".join(f"{half} {mask.sum():,}" for half, mask in halves.items())
    print(f"{data['gpus'].strip()}\ntraining {train['documents']:,} documents, {train['tokens']:,} tokens")
    print(f"validation {val['documents']:,} documents, {val['bytes']:,} bytes; documents compared: {counted}")
    print_runs(runs, train["tokens"])
    print("\n| run | pass | as its script prints it | all | A | B |\n|---|---|---|---|---|---|")
    sides = {}  # by pass and group: the key of each seed
    for key in keys:
        name, which = key.split("/")
        own, cells = own_bpb(runs, name, which), " | ".join(f"{value:.5f}" for value in bpb[key].values())
        print(f"| {name} | {which} | {f'{own:.5f}' if own else ''} | {cells} |")
        group, seed, _ = split_key(key)
        sides.setdefault((which, group), {})[seed] = key
    for a, b in itertools.combinations(sides, 2):
        if a[0] != b[0]:
            continue
        print(f"\n{a[0]}: {a[1]} less {b[1]}")
        for half, mask in halves.items():
            values = [{seed: bpb[key][half] for seed, key in sides[side].items()} for side in (a, b)]
            means = [np.mean([bits[key][mask] for key in sides[side].values()], axis=0) for side in (a, b)]
            gap, error, how = difference(*values)
            over = over_documents(*means, size[mask])
            print(f"  {half:3s} {signed(gap, error)} ({how}; +- {over:.5f} over documents)")
    print()
    print_printed(runs)
    if curve:
        draw_curves(runs, train["tokens"], curve)


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # a reader like `head` may leave before the end
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", help="what tools/lease.py collected")
    parser.add_argument("--curve", type=Path, metavar="PNG", help="draw trained BPB against seconds, steps and passes")
    args = parser.parse_args()
    report(args.folders, args.curve)
