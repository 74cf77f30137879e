"""Tables, plots and one web page from finished runs, read from their result.json and the files beside it.

    python tools/report.py runs/1337                          one run: table, plots and report.html in its folder
    python tools/report.py runs/1337 runs/42 --out report     several: one row each, their mean, plots over each other
    python tools/report.py runs/demo --baselines data/demo --check
                                      also gzip -9, xz and token n-grams on the same validation documents
    python tools/report.py runs/sweep/best-* --submission submission.json --author NAME --github-id ID
                                      what is handed in: mean over seeds, worst bytes, joined verdicts
    python tools/report.py runs/sweep/best-* --record records/2026-05-01_Name
                                      the same as a folder, with README, logs and the counted script
    python tools/report.py runs/sweep/best-* --verify --submission submission.json
                                      make everything again and fail on any difference
    python tools/report.py --settings          write the generated parts of docs/SETTINGS.md; with --verify: compare

--baselines decodes the validation documents to text and measures what general compressors and counting reach on it, in
bits per byte over the same bytes that the run is scored on; the figures are kept as baselines.json in the folder of the
run. Where a ledger.npy lies there too (LEDGER_PATH), the BPB by length of the document and by position is computed over
the same data and kept as anatomy.json. --check fails unless the trained model is below gzip -9 and below the token
bigram, and unless eval_result.json (the packed script, run alone) holds the same BPB as result.json to the last printed
digit. audit.json in a run's folder (tools/audit.py) is joined with the run's own verdicts; a condition that either
fails leaves no val_bpb.
"""

import argparse
import base64
import html
import json
import math
import re
import signal
import statistics
import sys
from collections.abc import Iterable
from datetime import date
from pathlib import Path
from typing import NamedTuple

if not __package__:  # run as a file
    import anywhere  # noqa: F401

from prepare_data import DataError, write_file
from tools import submission
from tools.anatomy import add_anatomy
from tools.baselines import COMPRESSORS, add_baselines
from tools.plots import INK, plot_bits, plot_documents, plot_loss, plot_phases
from tools.runs import (
    ROOT,
    STAGES,
    ReportError,
    Run,
    bits_by_tensor,
    budget_parts,
    load_run,
    show_all_text,
    shown,
)

# ---------------------------------------------------------------- tables


def align(rows: list[tuple[str, ...]]) -> str:
    """Columns padded with spaces: numbers to the right, words to the left, the last column ragged."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    number = re.compile(r"[-+]?[\d,.]*\d%?")
    padded = (
        (
            cell.rjust(width) if number.fullmatch(cell) else cell.ljust(width)
            for cell, width in zip(row, widths, strict=True)
        )
        for row in rows
    )
    return "\n".join("  ".join(row).rstrip() for row in padded)


def one_run_table(run: Run) -> str:
    result, training = run.result, run.result["training"]
    verdicts = ", ".join(f"{name} {verdict}" for name, (verdict, _) in run.verdicts.items() if verdict != "NOT RUN")
    headline = f"val_bpb {run.val_bpb:.6f}" if run.val_bpb is not None else "no val_bpb: a condition failed"
    if run.doubts:
        headline = "no val_bpb: a result is older than what lies beside it"
    steps = (
        "steps",
        f"{training.get('steps', 0):,}",
        f"{training.get('tokens', 0):,} tokens, {training.get('epochs', 0):.2f} passes over the training data",
    )
    table = align([*bpb_rows(run), *byte_rows(result), *second_rows(result), steps])
    head = f"{shown(run.folder)}: {run.hardware}, seed {result['seed']}\n{run.documents}"
    return "\n\n".join([head, table, *run.doubts, f"{headline}; {verdicts}"])


def bpb_rows(run: Run) -> list[tuple[str, str, str]]:
    rows = [("", "BPB", "")] + [(stage, f"{value:.6f}", STAGES.get(stage, "")) for stage, value in run.stages.items()]
    if run.rescored:
        stage, value = list(run.rescored["bpb"].items())[-1]
        same = "the same" if run.rescored_equal() else "DIFFERENT"
        rows.append(
            (
                f"{stage}, alone",
                f"{value:.6f}",
                f"train_gpt.py and model.bin scored by themselves: {same}",
            )
        )
    if run.baselines:
        text = f"validation text, {run.baselines['text_bytes']:,} bytes as the tokenizer spells it"
        notes = dict.fromkeys(COMPRESSORS, text) | {"token bigram": run.baselines["bigram"]}
        rows += [(name, f"{value:.6f}", notes.get(name, "")) for name, value in run.baselines["bpb"].items()]
    return rows


def byte_rows(result: dict) -> list[tuple[str, str, str]]:
    cap = result["settings"].get("artifact_cap", 0)
    return [("", "bytes", "")] + [
        (name, f"{size:,}", f"limit {cap:,}" if name == "total" and cap else "")
        for name, size in result["bytes"].items()
    ]


def second_rows(result: dict) -> list[tuple[str, str, str]]:
    limit, rows = result["settings"].get("max_wallclock_seconds") or 0, [("", "seconds", "")]
    for budget in ("train", "eval"):
        if budget in result["seconds"]:
            parts = ", ".join(
                f"{name} {seconds:.1f}" for name, seconds in budget_parts(result["seconds"], budget) if seconds >= 0.05
            )
            rows.append((budget, f"{result['seconds'][budget]:.1f}", f"limit {limit:.0f}: {parts}" if limit else parts))
    return rows


def many_runs_table(runs: list[Run]) -> str:
    stages = [stage for stage in STAGES if any(stage in run.stages for run in runs)]
    rows = [("run", "seed", *stages, "val_bpb", "bytes", "steps", "train s", "eval s")]
    scores = [[run.stages.get(stage) for stage in stages] + [run.val_bpb] for run in runs]
    figure = lambda value: "-" if value is None else f"{value:.6f}"
    for run, score in zip(runs, scores, strict=True):
        r = run.result
        rows.append(
            (
                run.name,
                str(r["seed"]),
                *map(figure, score),
                f"{r['bytes'].get('total', 0):,}",
                f"{r['training'].get('steps', 0):,}",
                f"{r['seconds'].get('train', 0):.1f}",
                f"{r['seconds'].get('eval', 0):.1f}",
            )
        )
    groups = submission.configurations(runs)
    for label, members in groups.items():
        if not submission.different_seeds(members):
            continue
        mine = [score for run, score in zip(runs, scores, strict=True) if any(run is member for member in members)]
        columns = zip(*mine, strict=True)
        held = [[value for value in column if value is not None] for column in columns]
        for name, function in (("mean", statistics.fmean), ("std", statistics.stdev)):
            means = (figure(function(column) if len(column) > 1 else None) for column in held)
            rows.append((f"{name} {label}".rstrip(), "", *means, "", "", "", ""))
    notes = [] if len(groups) == 1 else [f"{len(groups)} configurations: a mean is over the seeds of one of them"]
    return "\n\n".join([align(rows), *notes, *(doubt for run in runs for doubt in run.doubts)])


# ---------------------------------------------------------------- the page

VERDICT_COLOURS = {"PASS": "#047857", "FAIL": "#b91c1c", "DISPUTED": "#b45309", "NOT RUN": "#7b8794"}
CAPTIONS = {
    "loss": "Training loss",
    "phases": "Bits per byte through the phases, time budgets",
    "documents": "Bits per byte by document length and position",
    "bits": "Where the bytes of model.bin are",
}
STYLE = f"""
body {{ font: 15px/1.5 system-ui, sans-serif; color: {INK}; max-width: 76em; margin: 2em auto; padding: 0 1.5em }}
h1 {{ font-size: 1.5em; margin-bottom: 0 }}
h2 {{ font-size: 1.1em; margin-top: 2em }}
.quiet {{ color: #616e7c; margin-top: 0.2em }}
.headline {{ font-size: 2.2em; font-weight: 600; margin: 0.4em 0 0 }}
table {{ border-collapse: collapse }}
td {{ padding: 0.25em 1.2em 0.25em 0; vertical-align: top; border-top: 1px solid #e4e7eb }}
td.verdict {{ font-weight: 600; white-space: nowrap }}
pre {{ background: #f5f7fa; padding: 1em; overflow-x: auto; font-size: 13px; line-height: 1.4 }}
img {{ width: 100%; margin: 0.5em 0 1.5em }}
details {{ margin: 0.4em 0 }}
summary {{ cursor: pointer }}
details pre {{ max-height: 40em; overflow-y: auto }}
h3 {{ display: none }}
@media (max-width: 720px) {{
  body {{ margin: 1em auto; padding: 0 0.8em }}
  h3 {{ display: block; font-size: 1em; margin: 1.5em 0 0 }}
  .headline {{ font-size: 1.7em }}
  h1, td, .quiet, summary {{ overflow-wrap: anywhere }}
  table, tbody, td {{ display: block }}
  tr {{ display: block; border-top: 1px solid #e4e7eb; padding: 0.5em 0 }}
  td {{ border: 0; padding: 0 }}
  td:first-child {{ font-weight: 600 }}
  td:empty {{ display: none }}
  pre {{ font-size: 11px; padding: 0.7em }}
}}"""


def headline_of(runs: list[Run]) -> tuple[str, str]:
    """The number in large type, and what it is."""
    scores = [run.val_bpb for run in runs]
    if any(run.doubts for run in runs):
        return "no val_bpb", "a result is older than what lies beside it: see the figures"
    if len(groups := submission.configurations(runs)) > 1:
        return f"{len(runs)} runs", f"of {len(groups)} configurations, so without a mean: {', '.join(groups)}"
    if None in scores:
        return "no val_bpb", "a condition failed: see the verdicts"
    if len(runs) == 1:
        interval = runs[0].anatomy.get("bpb_interval")
        return f"{scores[0]:.5f} BPB", "validation bits per byte" + (
            f", 95 % interval over documents {interval[0]:.5f} to {interval[1]:.5f}" if interval else ""
        )
    if not submission.different_seeds(runs):
        return f"{len(runs)} runs", "a seed occurs twice, so without a mean: that is over different seeds"
    return (
        f"{statistics.fmean(scores):.5f} BPB",
        f"mean of {len(runs)} runs, sample standard deviation {statistics.stdev(scores):.5f}",
    )


def verdict_rows(runs: list[Run]) -> str:
    cells = ((name, verdict, reason) for name, (verdict, reason) in submission.joined_verdicts(runs).items())
    return "\n".join(
        f"<tr><td>{html.escape(name)}</td><td>{html.escape(submission.CONDITIONS.get(name, ''))}</td>"
        f'<td class="verdict" style="color: {VERDICT_COLOURS[verdict]}">{verdict}</td>'
        f"<td>{html.escape(reason)}</td></tr>"
        for name, verdict, reason in cells
    )


class Picture(NamedTuple):
    """A plot as PNG: wide for a file and a screen, narrow for a phone."""

    name: str
    wide: bytes
    narrow: bytes


def draw(runs: list[Run]) -> list[Picture]:
    """The plots that these runs have something for."""
    bits = bits_by_tensor(runs[0])
    bits_of = f"{runs[0].name}, {runs[0].result['bytes'].get('model', 0):,} bytes"
    plots = {
        "loss": lambda narrow: plot_loss(runs, narrow),
        "phases": lambda narrow: plot_phases(runs, narrow),
        "documents": lambda narrow: plot_documents(runs, narrow),
        "bits": lambda narrow: plot_bits(bits, bits_of, narrow),
    }
    return [Picture(name, wide, plot(True)) for name, plot in plots.items() if (wide := plot(False))]


def as_html(picture: Picture) -> str:
    data = lambda png: f"data:image/png;base64,{base64.b64encode(png).decode()}"
    caption = CAPTIONS[picture.name]
    return (
        f'<h3>{caption}</h3>\n<picture><source media="(max-width: 720px)" srcset="{data(picture.narrow)}">'
        f'<img alt="{caption}" src="{data(picture.wide)}"></picture>'
    )


def write_page(runs: list[Run], table: str, pictures: Iterable[Picture], path: Path) -> None:
    """One HTML file with everything in it."""
    images = "\n".join(map(as_html, pictures))
    texts = [
        (f"{shown(run.folder)}: {name}", text)
        for run in runs
        for name, text in (("result.json", json.dumps(run.result, indent=1)), ("train.log", run.log))
        if text
    ]
    details = "\n".join(
        f"<details><summary>{html.escape(title)}</summary><pre>{html.escape(text)}</pre></details>"
        for title, text in texts
    )
    title, (number, meaning) = html.escape(", ".join(run.name for run in runs)), headline_of(runs)
    where = "<br>".join(html.escape(text) for text in dict.fromkeys(f"{run.hardware}; {run.documents}" for run in runs))
    write_file(
        path,
        f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{STYLE}</style>
<h1>{title}</h1>
<p class="quiet">{where}</p>
<p class="headline">{number}</p>
<p class="quiet">{html.escape(meaning)}</p>
<h2>Conditions</h2>
<table>
{verdict_rows(runs)}
</table>
<h2>Figures</h2>
<pre>{html.escape(table)}</pre>
{images}
<h2>Results and logs, as written</h2>
{details}
</html>
""".encode("utf-8", "replace"),
    )


# ---------------------------------------------------------------- command line


def check(run: Run) -> list[str]:
    """What --check finds wrong with a run, one line each."""
    faults = [*run.doubts]
    if run.baselines is None:
        faults.append(f"{run.folder}: has no baselines.json; pass --baselines DATA_PATH")
    else:
        trained = run.result["bpb"].get("trained", math.inf)
        faults += [
            f"{run.folder}: trained BPB {trained:.6f} is not below {name} {run.baselines['bpb'][name]:.6f} after "
            f"{run.result['training']['steps']:,} steps; a slow or busy machine makes few: train for longer "
            "(the demo: make demo DEMO_SECONDS=600)"
            for name in ("gzip -9", "token bigram")
            if not trained < run.baselines["bpb"][name]
        ]
    if run.rescored is not None and not run.rescored_equal():
        faults.append(
            f"{run.folder}: eval_result.json has BPB {run.rescored['bpb']}, result.json has {run.result['bpb']}"
        )
    return faults


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN_DIR", help="folder with a result.json")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="where the plots and report.html go (default: the folder of the run; of several: report)",
    )
    parser.add_argument(
        "--baselines",
        type=Path,
        metavar="DATA_PATH",
        help="dataset of the runs: compute gzip, xz and n-gram BPB on its validation documents",
    )
    parser.add_argument(
        "--check", action="store_true", help="exit with status 1 unless the runs hold what they must (see above)"
    )
    parser.add_argument("--submission", type=Path, metavar="FILE", help="write submission.json there")
    parser.add_argument("--record", type=Path, metavar="DIR", help="make a folder for records/ there")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="write nothing: make everything again and exit with status 1 on any difference",
    )
    parser.add_argument("--settings", action="store_true", help="write the generated parts of --into")
    parser.add_argument(
        "--into",
        type=Path,
        default=ROOT / "docs" / "SETTINGS.md",
        metavar="FILE",
        help="text with marked parts for --settings (default: docs/SETTINGS.md)",
    )
    for word, text in (
        ("author", "anonymous"),
        ("github-id", "anonymous"),
        ("name", "Parameter Golf in one file"),
        ("blurb", ""),
        ("date", f"{date.today()}"),
    ):
        parser.add_argument(f"--{word}", default=text, help=f"for submission.json (default: {text or 'empty'})")
    parser.add_argument(
        "--baseline",
        metavar="PR:BPB",
        help="a published result to compare with, for example '#1855:1.06108'; on the contest's data only",
    )
    args = parser.parse_args(argv)
    if not args.runs and not args.settings:
        parser.error("give the folders of runs, or --settings")
    return args


def words_of(args: argparse.Namespace) -> dict:
    """What submission.json says that no log knows."""
    words = {
        "author": shown(args.author),
        "github_id": shown(args.github_id),
        "name": shown(args.name),
        "blurb": shown(args.blurb),
        "date": args.date,
    }
    if args.baseline:
        pr, _, bpb = args.baseline.rpartition(":")
        try:
            words |= {"comparison_baseline_pr": pr, "comparison_baseline_bpb": float(bpb)}
        except ValueError:
            raise ReportError(f"--baseline {args.baseline}: must be like '#1855:1.06108'") from None
    return words


def verify(args: argparse.Namespace, runs: list[Run]) -> int:
    faults = [fault for run in runs for fault in submission.verify_run(run)]
    for path, compare in ((args.submission, submission.verify_submission), (args.record, submission.verify_record)):
        if path:
            faults += compare(path, runs)
    if args.settings:
        faults += submission.verify_generated(args.into)
    for run in runs:
        print("\n".join(submission.compared(run)))
    said = [str(path) for path in (args.submission, args.record, args.settings and args.into) if path]
    where = ", ".join([*(["the run(s)"] if runs else []), *said])
    print(f"verified {where}: {'no difference' if not faults else f'{len(faults)} difference(s)'}")
    return print_faults(faults)


def print_faults(faults: list[str]) -> int:
    for fault in faults:
        print(f"check failed: {fault}", file=sys.stderr)
    return 1 if faults else 0


def hand_in(args: argparse.Namespace, runs: list[Run]) -> None:
    """submission.json and the folder for records/, from runs that hold together."""
    words = words_of(args)
    if (args.submission or args.record) and (faults := [fault for run in runs for fault in submission.verify_run(run)]):
        raise ReportError(
            f"not handed in: {faults[0]}"
            + (f" (and {len(faults) - 1} more; --verify lists them)" if len(faults) > 1 else "")
        )
    if args.submission:
        write_file(args.submission, submission.as_json(submission.submission(runs, words)).encode())
        print(f"wrote {args.submission}")
    if args.record:
        files = submission.record_files(runs, words)
        if args.record.exists() and any(args.record.iterdir()):
            raise ReportError(f"{args.record}: is not empty; name a new folder")
        args.record.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            write_file(args.record / name, data)
        print(f"wrote {args.record}: {', '.join(files)}")


def write_report(args: argparse.Namespace, runs: list[Run]) -> int:
    for run in runs if args.baselines else ():
        add_baselines(run, args.baselines)
        add_anatomy(run, args.baselines)
    table = one_run_table(runs[0]) if len(runs) == 1 else many_runs_table(runs)
    print(table, end="\n\n")
    out = args.out or (runs[0].folder if len(runs) == 1 else Path("report"))
    out.mkdir(parents=True, exist_ok=True)
    pictures = draw(runs)
    for picture in pictures:
        write_file(out / f"{picture.name}.png", picture.wide)
    write_page(runs, table, pictures, out / "report.html")
    print("wrote " + ", ".join(str(out / name) for name in (*(f"{p.name}.png" for p in pictures), "report.html")))
    return print_faults([fault for run in runs for fault in check(run)] if args.check else [])


def report(args: argparse.Namespace) -> int:
    runs = [load_run(folder, other_files=args.verify) for folder in args.runs]
    if args.verify:
        return verify(args, runs)
    if args.settings:
        write_file(
            args.into,
            submission.with_blocks(args.into.read_text(encoding="utf-8"), args.into.resolve().parent).encode(),
        )
        print(f"wrote the generated parts of {args.into}")
    if runs:
        hand_in(args, runs)
    return write_report(args, runs) if runs else 0


def main(argv: list[str] | None = None) -> int:
    show_all_text()
    try:
        return report(parse_args(argv))
    except (ReportError, DataError, OSError) as error:
        print(f"report.py: {shown(str(error))}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # a reader like `head` may leave before the end
    sys.exit(main())
