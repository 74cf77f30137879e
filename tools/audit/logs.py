"""The logs of a folder, of this project's script and of published ones: their figures, sizes and clocks."""

import itertools
import re
import statistics
from pathlib import Path

from tools.audit.outcome import Broken
from tools.audit.run import read_json

NO_LOGS = re.compile(r"requirements.*|.*licen[cs]e.*|readme.*|.*vocab.*|.*prompt.*|.*notes.*", re.I)
LARGE = 64 << 20  # a text larger than this is no log


def log_files(folder: Path) -> list[Path]:
    """The logs of a folder and of those inside it: *.log, tables, and what text is not known as something else."""
    found = [path for pattern in ("*.log", "*/*.log") for path in sorted(folder.glob(pattern))]
    texts = [path for pattern in ("*.txt", "*/*.txt", "*.tsv", "*.csv") for path in sorted(folder.glob(pattern))]
    return [
        path
        for path in found + [path for path in texts if not NO_LOGS.fullmatch(path.name)]
        if path.is_file() and path.stat().st_size <= LARGE
    ]


def claim_of(folder: Path) -> tuple[str, dict]:
    """The name and content of a folder's submission.json; of a record that has one such file under a longer name, of
    that."""
    path = folder / "submission.json"
    longer = sorted(folder.glob("submission_*.json"))
    if not path.is_file() and len(longer) == 1:
        path = longer[0]
    return path.name, read_json(path)


def number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def claimed_bpb(claim: dict) -> object:
    """The headline of a submission.json, under the names that published ones use."""
    names = ("val_bpb", "mean_val_bpb", "val_bpb_mean", "mean_bpb")
    return next((claim[name] for name in names if claim.get(name) is not None), None)


def seed_scores(claim: dict) -> dict[str, float]:
    """Seed -> BPB of a submission.json: `seed_results` or `seeds` as a table of numbers or records; or `seeds` beside
    `seed_scores`."""
    for key in ("seed_results", "seeds"):
        if isinstance(table := claim.get(key), dict):
            scores = {
                str(seed): number(entry if not isinstance(entry, dict) else claimed_bpb(entry) or entry.get("bpb"))
                for seed, entry in table.items()
            }
            if scores and None not in scores.values():
                return scores
    lists = claim.get("seeds"), claim.get("seed_scores")
    if all(isinstance(entry, list) for entry in lists) and len(lists[0]) == len(lists[1]):
        scores = {str(seed): number(value) for seed, value in zip(*lists)}
        return {} if None in scores.values() else scores
    return {}


def seed_names(claim: dict) -> set[str]:
    """The seeds that a submission.json names in any way."""
    seeds = claim.get("seeds", [])
    return {str(seed) for seed in (*(seeds if isinstance(seeds, list | dict) else ()), *seed_scores(claim))}


def last_scores(text: str) -> dict[str, float]:
    """What a log calls a score -> the last such BPB: the word that begins the line is its name."""
    found = re.findall(r"^\s*(\S+?)[ :].*?\bval_bpb[:= ]\s*(\d+\.\d+)", text, re.M)
    return {name: float(value) for name, value in found if not re.match(r"(?:step:)?\d+/", name)}


def means(logs: dict[str, str]) -> list[float]:
    """The means over logs that a headline could be: of each kind of score, over any two or more of the logs."""
    scores = [last_scores(text) for text in logs.values()][:10]
    kinds = dict.fromkeys(kind for score in scores for kind in score)
    return [
        statistics.fmean(some)
        for kind in kinds
        for count in range(2, len(scores) + 1)
        for some in itertools.combinations([score[kind] for score in scores if kind in score], count)
    ]


def total_bytes(text: str) -> int | None:
    """The smallest total that a log counts: published scripts print one of the raw weights before the coded one."""
    totals = [
        int(size.replace(",", "")) for size in re.findall(r"^.*?otal submission size.*?: *([\d,]+) bytes", text, re.M)
    ]
    totals += [int(size.replace(",", "")) for size in re.findall(r"^  total bytes +([\d,]+)$", text, re.M)]
    return min(totals, default=None)


def code_bytes(text: str) -> int | None:
    """What a log counts for the script."""
    found = re.findall(r"^Code size[^:\n]*: *([\d,]+) bytes", text, re.M)
    return int(found[-1].replace(",", "")) if found else None


def clocks(text: str) -> tuple[float | None, float | None]:
    """Seconds of training and of the last evaluation by a log's own clocks."""
    train = re.findall(r"train_time: ?(\d+)ms", text)
    score = re.findall(r"\beval_time: ?(\d+)ms", text)
    whole = re.findall(r"total_eval_time: ?([\d.]+) ?s", text)
    last = float(whole[-1]) if whole else int(score[-1]) / 1000 if score else None
    return (int(train[-1]) / 1000 if train else None), last


def read_logs(folder: Path) -> dict[str, str]:
    """Name -> text of the logs of a folder."""
    try:
        return {str(path.relative_to(folder)): path.read_text("utf-8", errors="replace") for path in log_files(folder)}
    except OSError as error:
        raise Broken(f"a log cannot be read: {error}") from None
