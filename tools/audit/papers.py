"""The papers of a run: its clocks, its seeds, and what its README and submission.json claim."""

import json
import math
import re
import statistics

from tools.audit.outcome import NotRun, verdict_of
from tools.audit.package import CAP
from tools.audit.run import read_json
from tools.audit.shared import Audit
from tools.audit.stats import t_quantile, welch
from tools.runs import OUTSIDE_PHASES, TRAIN_PHASES
from tools.verdicts import FAIL

BUDGET_SECONDS = 600


def budget(a: Audit) -> tuple[str, str]:
    """The run's own clocks against its limit, at most 600 s.

    Three readings: the narrow one, ours, and with everything else that the process did.
    """
    seconds = a.artifact.result.get("seconds", {})
    limit = a.artifact.settings.get("max_wallclock_seconds", 0)
    if not limit or "steps" not in seconds:
        raise NotRun("no result.json of a run by the clock")
    phases = {name: value for name, value in seconds.items() if name not in ("train", "eval")}
    evaluation = {name: value for name, value in phases.items() if name not in (*TRAIN_PHASES, *OUTSIDE_PHASES)}
    train = sum(phases.get(name, 0.0) for name in TRAIN_PHASES)
    score = sum(evaluation.values())
    wide_train = train + phases.get("write", 0.0)
    wide_score = score + phases.get("setup", 0.0) + phases.get("diagnostic", 0.0)
    faults = [f"a limit of {limit:.0f} s is above {BUDGET_SECONDS}"] if limit > BUDGET_SECONDS else []
    for name, key, value in (("training", "train", train), ("evaluation", "eval", score)):
        if value >= limit:
            faults.append(f"{name} takes {value:.1f} of {limit:.0f} s")
        if key in seconds and seconds[key] < value - 0.5:
            faults.append(f"result.json counts {seconds[key]:.1f} s of {key}, its phases add up to {value:.1f}")
    readings = (
        f"training {phases['steps']:.1f} s of steps, {train:.1f} with calibration and quantisation, "
        f"{wide_train:.1f} with writing; evaluation {max(evaluation.values(), default=0.0):.1f} s of scoring, "
        f"{score:.1f} with loading, {wide_score:.1f} with set-up and diagnostics; limit {limit:.0f}"
    )
    return verdict_of(faults, readings, [readings] if max(wide_train, wide_score) >= limit else [])


def unlike(results: list[dict]) -> list[str]:
    """In what several runs of one configuration differ, seeds aside."""
    faults = []
    for key in ("source_sha256", "hardware"):
        if len({r.get(key) for r in results}) > 1:
            faults.append(f"runs differ in {key}")
    plain = [{k: v for k, v in r["settings"].items() if k != "seed"} for r in results]
    if other := sorted({k for p in plain for k in p if p[k] != plain[0].get(k)}):
        faults.append(f"runs differ in {', '.join(other)}")
    if len({r["seed"] for r in results}) < len(results):
        faults.append("a seed occurs twice")
    return faults


def seeds(a: Audit) -> tuple[str, str]:
    """Several seeds of one configuration: mean, sample deviation, both units, and what difference they could show.

    A claim to beat a baseline needs Welch's p < 0.25.
    """
    results = [a.artifact.result, *(read_json(folder / "result.json") for folder in a.seeds)]
    if len(results) < 2:
        raise NotRun("one seed; name the folders of others with --seeds")
    if missing := [i for i, r in enumerate(results) if "val_bpb" not in r]:
        return FAIL, f"{len(missing)} of {len(results)} runs have no val_bpb"
    faults = unlike(results)
    if (most := max(r["bytes"]["total"] for r in results)) > CAP:
        faults.append(f"a seed has {most:,} bytes, over the cap of {CAP:,}")
    bpb = [r["val_bpb"] for r in results]
    mean, std, n = statistics.fmean(bpb), statistics.stdev(bpb), len(bpb)
    per_byte = math.log(2)  # nats of one bit per byte
    per_token = per_byte * results[0]["data"]["val_bytes"] / results[0]["data"]["val_targets"]
    smallest = (t_quantile(0.01, 2 * n - 2) + t_quantile(0.2, 2 * n - 2)) * std * math.sqrt(2 / n)
    what = (
        f"{n} seeds: {mean:.6f} BPB, sample std {std:.6f}; {mean * per_byte:.5f} nats per byte, "
        f"{mean * per_token:.5f} per token; "
        f"a difference of {smallest:.5f} BPB would show at p < 0.01 with power 0.8; at most {most:,} bytes"
    )
    if a.baseline:
        t, df, p = welch(bpb, list(a.baseline))
        gain = statistics.fmean(a.baseline) - mean
        what += (
            f"; {gain:+.6f} BPB below the baseline of {len(a.baseline)}, {gain * per_byte:+.5f} nats per byte, "
            f"{gain * per_token:+.5f} per token: Welch t {t:.2f}, {df:.1f} degrees of freedom, p {p:.2g}"
        )
        if p >= 0.25:
            faults.append("no better than the baseline: " + what)
    return verdict_of(faults, what)


def logs_of(a: Audit) -> dict[str, str]:
    """Name -> text of every log of the folder and of the other seeds."""
    return {
        f"{folder.name}/{path.name}" if folder in a.seeds else path.name: path.read_text("utf-8", errors="replace")
        for folder in (a.folder, *a.seeds)
        for path in sorted(folder.glob("*.log"))
    }


def log_faults(logs: dict[str, str]) -> list[str]:
    """Logs are published: no traceback, no private path."""
    private = re.compile(r"(?<![\w.])/(?:home|root|Users)/\w+")
    faults = [f"{name} holds a traceback" for name, text in logs.items() if "Traceback (most recent call last)" in text]
    return faults + [f"{name} holds a private path" for name, text in logs.items() if private.search(text)]


class Shown:
    """The numbers that logs and results show, against which those of the papers are held."""

    def __init__(self, text: str):
        self.numbers = decimals(text)
        self.sizes = {int(number.replace(",", "")) for number in re.findall(r"\d[\d,]{3,}", text)}

    def backs(self, number: str) -> bool:
        """Whether a decimal, as it is printed, is one of these numbers, rounded."""
        half = 0.5 * 10 ** -len(number.split(".")[1])
        return any(abs(float(number) - value) <= half + 1e-12 for value in self.numbers)


def decimals(text: str) -> set[float]:
    """The numbers of a text with at least three digits behind the point."""
    return {float(number) for number in re.findall(r"\d+\.\d{3,}", text)}


def claim_faults(claim: dict, shown: Shown, largest: int) -> list[str]:
    """What submission.json says and nothing shows; `largest`: bytes of the largest run in the folder."""
    faults = []
    bpb, runs = claim.get("val_bpb"), claim.get("seed_results", {})
    if not isinstance(bpb, int | float):
        faults.append(f"submission.json: val_bpb is {bpb!r}")
    elif runs and abs(statistics.fmean(run["val_bpb"] for run in runs.values()) - bpb) > 2e-5:
        faults.append(f"submission.json: val_bpb {bpb} is not the mean of its seed_results")
    alone = {"": claim} if not runs and bpb is not None else {}
    for seed, run in {**runs, **alone}.items():
        if isinstance(run.get("val_bpb"), float) and not shown.backs(f"{run['val_bpb']:.5f}"):
            faults.append(f"submission.json: seed {seed} val_bpb {run['val_bpb']} is in no log or result")
    total = claim.get("bytes_total")
    if total is not None and total < largest:
        faults.append(f"submission.json: bytes_total {total:,} is below the largest run")
    elif total is not None and total not in shown.sizes:
        faults.append(f"submission.json: bytes_total {total:,} is in no log or result")
    if re.search(r"\b(TBD|TODO|PENDING)\b", json.dumps(claim)):
        faults.append("submission.json holds a placeholder")
    return faults


def evidence(a: Audit) -> tuple[str, str]:
    """README.md and submission.json of the folder against the logs and results there and of the other seeds."""
    readme, papers = a.folder / "README.md", a.folder / "submission.json"
    logs = logs_of(a)
    faults = log_faults(logs)
    if not papers.is_file() and not readme.is_file():
        if faults:
            return FAIL, "; ".join(faults)
        clean = f"{len(logs)} logs without traceback or private path"
        raise NotRun(f"no README.md or submission.json in {a.folder.name} ({clean})")
    claim = read_json(papers)
    own, *others = (
        [read_json(path) for path in sorted(folder.glob("*result*.json"))] for folder in (a.folder, *a.seeds)
    )
    results = sum(others, own)
    if not logs and not results:
        faults.append("no log and no result.json: nothing shows the claim")
    shown = Shown("\n".join(logs.values()) + json.dumps(results))
    largest = max((r.get("bytes", {}).get("total", 0) for r in own), default=0)  # of other seeds: check seeds
    faults += claim_faults(claim, shown, largest)
    shown.numbers |= decimals(json.dumps(claim))  # the README may quote it
    bpb = claim.get("val_bpb")
    quoted = re.findall(r"(?<![\d.])[01]\.\d{4,}(?!\d)", readme.read_text(encoding="utf-8")) if readme.is_file() else []
    if isinstance(bpb, float):
        stale = [number for number in quoted if abs(float(number) - bpb) < 0.05 and not shown.backs(number)]
        faults += [f"README.md: {', '.join(stale[:4])} in no log, result or submission.json"] if stale else []
        named = re.search(r"(?<!\d)([01]\.\d{3,})", a.folder.resolve().name)
        if named and abs(float(named[1]) - bpb) > 0.5 * 10 ** -len(named[1].split(".")[1]):
            faults.append(f"the folder is named {named[1]}, its val_bpb is {bpb}")
    what = f"{len(quoted)} numbers of the README and submission.json agree with them"
    return verdict_of(faults, f"{len(logs)} logs, {len(results)} results: {what}")
