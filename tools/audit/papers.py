"""The papers of a run: its clocks, its seeds, and what its README and submission.json claim."""

import json
import math
import re
import statistics

from tools.audit.logs import claim_of, claimed_bpb, clocks, means, number, read_logs, seed_names, seed_scores
from tools.audit.outcome import NotRun, verdict_of
from tools.audit.package import CAP
from tools.audit.readme import figures
from tools.audit.run import read_json
from tools.audit.shared import Audit
from tools.audit.stats import t_quantile, welch
from tools.runs import OUTSIDE_PHASES, TRAIN_PHASES, other_artifact
from tools.verdicts import FAIL

BUDGET_SECONDS = 600


def budget(a: Audit) -> tuple[str, str]:
    """The run's own clocks against its limit, at most 600 s.

    Three readings: the narrow one, ours, and with everything else that the process did.
    """
    seconds = a.artifact.result.get("seconds", {})
    limit = a.artifact.settings.get("max_wallclock_seconds", 0)
    if not a.artifact.result:
        return budget_by_logs(a)
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


def budget_by_logs(a: Audit) -> tuple[str, str]:
    """Without result.json: the clocks that the logs print."""
    _, claim = claim_of(a.folder)
    if "non_record" in f"{claim.get('track')} {a.folder.resolve().parent.name}":
        raise NotRun("no result.json; records of the track without limits have no budget")
    read = {name: clocks(text) for name, text in read_logs(a.folder).items()}
    read = {name: pair for name, pair in read.items() if pair != (None, None)}
    if not read:
        raise NotRun("no result.json of a run by the clock, and no log that prints one")
    notes, over, doubts = [], [], []
    for i, what in enumerate(("training", "evaluation")):
        spent = {name: pair[i] for name, pair in read.items() if pair[i] is not None}
        notes += [f"{what} at most {max(spent.values()):.1f} s by {len(spent)} log(s)"] if spent else []
        late = [
            f"{name}: {what} takes {value:.1f} of {BUDGET_SECONDS} s"
            for name, value in spent.items()
            if value >= BUDGET_SECONDS
        ]
        # The step that was running when the time was up is counted, and some logs may be of trials.
        plain = len(late) == len(spent) and min(spent.values(), default=0.0) >= BUDGET_SECONDS * 1.01
        over += late if plain else []
        doubts += [] if plain else late
    return verdict_of(over, f"no result.json; {', '.join(notes)}; limit {BUDGET_SECONDS}", doubts)


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
    if not a.artifact.result:
        return seeds_by_claim(a)
    if len(results) < 2:
        raise NotRun("one seed; name the folders of others with --seeds")
    if missing := [i for i, r in enumerate(results) if "val_bpb" not in r]:
        return FAIL, f"{len(missing)} of {len(results)} runs have no val_bpb"
    faults = unlike(results)
    faults += [
        line for folder, result in zip(a.seeds, results[1:]) for line in other_artifact(result, folder / "result.json")
    ]
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


def seeds_by_claim(a: Audit) -> tuple[str, str]:
    """Without result.json: the statistics of the seeds that submission.json lists."""
    name, claim = claim_of(a.folder)
    bpb = [*seed_scores(claim).values()]
    if len(bpb) < 2:
        raise NotRun(f"no result.json, and no {name} that lists the BPB of several seeds")
    mean, std, n, faults = statistics.fmean(bpb), statistics.stdev(bpb), len(bpb), []
    what = f"no result.json; {n} seeds of {name}: {mean:.6f} BPB, sample std {std:.6f}"
    if a.baseline:
        t, df, p = welch(bpb, list(a.baseline))
        what += (
            f"; baseline {statistics.fmean(a.baseline):.6f}: Welch t {t:.2f}, {df:.1f} degrees of freedom, p {p:.2g}"
        )
        faults += ["no better than the baseline: " + what] if p >= 0.25 else []
    return verdict_of(faults, what)


def logs_of(a: Audit) -> dict[str, str]:
    """Name -> text of every log of the folder and of the other seeds."""
    others = {f"{folder.name}/{name}": text for folder in a.seeds for name, text in read_logs(folder).items()}
    return read_logs(a.folder) | others


def log_faults(logs: dict[str, str]) -> list[str]:
    """Logs are published: no traceback, no private path."""
    private = re.compile(r"(?<![\w.])/(?:home|root|Users)/\w+")
    # At the start of a line, behind a rank's name: a log that holds its script's source may quote the words.
    traceback = re.compile(r"^(?:\[[\w:]+\]:? ?)?Traceback \(most recent call last\)", re.M)
    faults = [f"{name} holds a traceback" for name, text in logs.items() if traceback.search(text)]
    return faults + [f"{name} holds a private path" for name, text in logs.items() if private.search(text)]


class Shown:
    """The numbers that logs and results show, against which those of the papers are held."""

    def __init__(self, text: str):
        self.numbers = decimals(text)
        self.sizes = {int(size.replace(",", "")) for size in re.findall(r"\d[\d,]{3,}", text)}

    def backs(self, figure: str) -> bool:
        """Whether a decimal, as it is printed, is one of these numbers, rounded."""
        half = 0.5 * 10 ** -len(figure.split(".")[1])
        return any(abs(float(figure) - value) <= half + 1e-12 for value in self.numbers)

    def holds(self, value: float) -> bool:
        """Whether one of these numbers is this one, to as many places as it has, five at most."""
        return any(abs(value - other) <= half_unit(value) + 1e-12 for other in self.numbers)


def decimals(text: str) -> set[float]:
    """The numbers of a text with at least three digits behind the point."""
    return {float(figure) for figure in re.findall(r"\d+\.\d{3,}", text)}


def half_unit(value: float, most: int = 5) -> float:
    """Half of the last place of a BPB as it was printed: of the fourth at least, since JSON drops zeros at the end, and
    of at most that many."""
    return 0.5 * 10 ** -min(max(len(repr(value).partition(".")[2]), 4), most)


def claim_faults(
    name: str, claim: dict, shown: Shown, largest: int, logs: dict[str, str]
) -> tuple[list[str], list[str]]:
    """What a submission.json says and nothing shows: faults, and doubts where it may only be worded otherwise.

    `largest`: bytes of the largest run in the folder; 0 where it holds no result.json."""
    faults, doubts = [], []
    bpb, scores = claimed_bpb(claim), seed_scores(claim)
    if number(bpb) is None:
        faults.append(f"{name}: val_bpb is {bpb!r}" if bpb is not None else f"{name}: has no val_bpb")
    elif scores:
        # Both are rounded: the mean by half a unit, and so is each seed.
        room = max(2e-5, half_unit(bpb) + max(map(half_unit, scores.values())))
        if abs(statistics.fmean(scores.values()) - bpb) > room:
            faults.append(f"{name}: val_bpb {bpb} is not the mean of its seed_results")
    for seed, value in scores.items():
        if not shown.holds(value):
            faults.append(f"{name}: seed {seed} val_bpb {value} is in no log or result")
    if number(bpb) is not None and not scores and not shown.holds(bpb):
        if any(abs(mean - bpb) <= half_unit(bpb) + 1e-6 for mean in means(logs)):
            pass  # seeds are not listed, and the logs have them
        elif len(seed_names(claim)) > 1 or any("std" in key for key in claim):
            doubts.append(f"{name}: val_bpb {bpb} is a mean of seeds that it does not list, and no mean of the logs")
        else:
            faults.append(f"{name}: val_bpb {bpb} is in no log or result")
    total = claim.get("bytes_total")
    if number(total) is None:
        pass
    elif total < largest:
        faults.append(f"{name}: bytes_total {total:,} is below the largest run")
    elif total not in shown.sizes:
        # Without result.json the logs are another script's, which may count its code elsewhere.
        (faults if largest else doubts).append(f"{name}: bytes_total {total:,} is in no log or result")
    if re.search(r"\b(TBD|TODO|PENDING)\b", json.dumps(claim)):
        faults.append(f"{name} holds a placeholder")
    return faults, doubts


def evidence(a: Audit) -> tuple[str, str]:
    """README.md and submission.json of the folder against the logs and results there and of the other seeds."""
    readme = a.folder / "README.md"
    name, claim = claim_of(a.folder)
    logs = logs_of(a)
    faults, doubts = log_faults(logs), []
    if not (a.folder / name).is_file() and not readme.is_file():
        if faults:
            return FAIL, "; ".join(faults)
        clean = f"{len(logs)} logs without traceback or private path"
        raise NotRun(f"no README.md or submission.json in {a.folder.name} ({clean})")
    own, *others = (
        [read_json(path) for path in sorted(folder.glob("*result*.json"))] for folder in (a.folder, *a.seeds)
    )
    results = sum(others, own)
    if not logs and not results:
        faults.append("no log and no result.json: nothing shows the claim")
    shown = Shown("\n".join(logs.values()) + json.dumps(results))
    largest = max((total_of(r) for r in own), default=0)  # of other seeds: check seeds
    if claim:
        wrong, unclear = claim_faults(name, claim, shown, largest, logs)
        faults += wrong
        doubts += unclear
    shown.numbers |= decimals(json.dumps(claim))  # the README may quote it
    shown.numbers |= set(means(logs))
    bpb = number(claimed_bpb(claim))
    text = readme.read_text(encoding="utf-8", errors="replace") if readme.is_file() else ""
    mine, rest = figures(text, seed_names(claim), shown.backs)
    if bpb is not None:
        near = lambda found: [
            figure for figure in dict.fromkeys(found) if abs(float(figure) - bpb) < 0.05 and not shown.backs(figure)
        ]
        if stale := near(mine):
            faults.append(f"README.md: {', '.join(stale[:4])} in no log, result or submission.json")
        if unknown := near(rest):
            doubts.append(
                f"README.md: {', '.join(unknown[:4])} may be another record's; no log or result here shows it"
            )
        named = re.search(r"(?<!\d)([01]\.\d{3,})", a.folder.resolve().name)
        if named and abs(float(named[1]) - bpb) > 0.5 * 10 ** -len(named[1].split(".")[1]) + half_unit(bpb, 9):
            faults.append(f"the folder is named {named[1]}, its val_bpb is {bpb}")
    what = f"{len(mine) + len(rest)} numbers of the README and submission.json agree with them"
    return verdict_of(faults, f"{len(logs)} logs, {len(results)} results: {what}", doubts)


def total_of(result: dict) -> int:
    """The bytes of a result of train_gpt.py; 0 of another JSON whose name says result."""
    sizes = result.get("bytes")
    return int(number(sizes.get("total")) or 0) if isinstance(sizes, dict) else 0
