"""Audit an artifact folder as a black box: conditions C1-C4, bytes, data, budgets, packaging and evidence.

    python tools/audit.py runs/demo --data data/demo                       every check that the folder allows
    python tools/audit.py runs/1337 --data data/caseops --device cuda      on one GPU
    python tools/audit.py runs/1337 --seeds runs/42 runs/314 --baseline 1.0611,1.0608,1.0614
    python tools/audit.py runs/demo --data data/demo --only sum_to_one_64 future

Wanted of the folder: train_gpt.py and model.bin; beside them, where they exist, result.json, logs, README.md and
submission.json are checked too. A folder without model.bin, as records are published, is audited by its papers: what
needs the artifact is NOT RUN. Run alone with TTT_EVAL_ONLY=1, DATA_PATH and LEDGER_PATH, train_gpt.py must score the
fineweb_val_*.bin of that folder, write the nats of every target to LEDGER_PATH (float64 .npy, stream order) and
eval_result.json (bpb, settings; `segments` where state crosses documents) beside itself. The auditor tampers with the
validation data and compares ledgers.

Verdicts: PASS, FAIL, DISPUTED (people disagree, or the artifact does not declare enough), NOT RUN. Exit status: 1 with
a FAIL, else 0. audit.json in the folder holds all of it, bound to the SHA-256 of both files. A PASS says what these
experiments showed on this machine, and no more.
"""

import argparse
import collections
import json
import os
import sys
import tempfile
import time
from pathlib import Path

from prepare_data import sha256_file, write_file
from tools.audit.checks import CHECKS, condition_verdicts, run_checks
from tools.audit.outcome import Broken, NotRun
from tools.audit.run import Artifact
from tools.audit.shared import Audit
from tools.runs import ARTIFACT, show_all_text, shown
from tools.verdicts import FAIL


def table(found: dict[str, dict], width: int = 110) -> str:
    lines = [f"{'check':16s} {'verdict':9s} {'s':>5s}  evidence"]
    for name, row in found.items():
        words, rows = row["evidence"].split(), [""]
        for word in words:
            if len(rows[-1]) + len(word) > width:
                rows.append("")
            rows[-1] += (" " if rows[-1] else "") + word
        lines.append(f"{name:16s} {row['verdict']:9s} {row['seconds']:5.1f}  {rows[0]}")
        lines += [" " * 34 + rest for rest in rows[1:]]
    return "\n".join(lines)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT_DIR", help="folder with train_gpt.py and model.bin")
    parser.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="the data folder it was scored on (default: DATA_PATH of the environment)",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", action="store_true", help="print audit.json instead of the table")
    parser.add_argument("--only", nargs="+", metavar="CHECK", help=f"of {', '.join(CHECKS)}")
    parser.add_argument("--skip", nargs="+", metavar="CHECK", default=[])
    parser.add_argument(
        "--targets", type=int, default=6000, help="validation targets of the tampered runs (default 6000)"
    )
    parser.add_argument(
        "--timeout", type=float, default=3600.0, metavar="SECONDS", help="longest single run of the script"
    )
    parser.add_argument(
        "--workers", type=int, default=0, help="checks at a time (default: the cores, at most 4; 1 on a GPU)"
    )
    parser.add_argument(
        "--seeds",
        nargs="+",
        type=Path,
        default=[],
        metavar="DIR",
        help="folders of other seeds of the same configuration",
    )
    parser.add_argument(
        "--baseline", default="", metavar="BPB,...", help="BPB of a baseline's seeds, for the Welch test"
    )
    args = parser.parse_args(argv)
    for name in (args.only or []) + args.skip:
        if name not in CHECKS:
            parser.error(f"{name} is no check; there are {', '.join(CHECKS)}")
    return args


def main(argv: list[str] | None = None) -> int:
    show_all_text()
    args = parse_args(argv)
    data = args.data or (Path(os.environ["DATA_PATH"]) if os.environ.get("DATA_PATH") else None)
    if args.data and not any(args.data.glob("fineweb_val_*.bin")):  # a typo would leave most checks NOT RUN
        print(f"audit.py: {shown(args.data)}: no file fineweb_val_*.bin there; name the data's folder", file=sys.stderr)
        return 2
    names = [name for name in args.only or CHECKS if name not in args.skip]
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="golf_audit_") as work:
        try:
            artifact = Artifact(args.artifact, Path(work), args.device, args.timeout)
            baseline = tuple(float(value) for value in args.baseline.split(",") if value)
            audit = Audit(artifact, data.resolve() if data else None, args.targets, tuple(args.seeds), baseline)
        except (NotRun, Broken, ValueError) as error:
            print(f"audit.py: {shown(str(error))}", file=sys.stderr)
            return 2
        workers = args.workers or (
            min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(), 4)
            if args.device == "cpu"
            else 1
        )
        found = run_checks(audit, names, lambda line: print(line, file=sys.stderr, flush=True), workers)
    files = {
        name: {"sha256": sha256_file(args.artifact / name), "bytes": (args.artifact / name).stat().st_size}
        for name in ARTIFACT
        if (args.artifact / name).is_file()
    }
    report = {
        "artifact": files,
        "device": args.device,
        "data": shown(data) if data else None,
        "checks": found,
        "verdicts": condition_verdicts(found),
    }
    write_file(args.artifact / "audit.json", (json.dumps(report, indent=1) + "\n").encode())
    if args.json:
        print(json.dumps(report, indent=1))
    else:
        print(table(found))
        counts = collections.Counter(row["verdict"] for row in found.values())
        said = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
        print(
            f"\n{shown(args.artifact)}: {said} in {time.perf_counter() - begun:.0f} s; "
            + ", ".join(f"{name} {files[name]['sha256'][:12]}" if name in files else f"no {name}" for name in ARTIFACT)
        )
    return 1 if any(row["verdict"] == FAIL for row in found.values()) else 0
