"""What is handed in: submission.json, a folder for records/, the generated parts of texts; and the proof that they
say what the runs say.

Everything but the words (author, name, blurb, date, the result it is compared with) comes from result.json, audit.json
and the logs. Verification makes all of it again and compares; the words are taken from the file that is verified.
"""

import difflib
import hashlib
import json
import math
import re
import statistics
from collections.abc import Callable
from pathlib import Path

from tools.audit.outcome import Broken
from tools.audit.run import unpack
from tools.runs import ARTIFACT, ROOT, STAGES, ReportError, Run, load_run, read_json, shown
from tools.verdicts import NOT_RUN, worst

WORDS = ("author", "github_id", "name", "blurb", "date", "comparison_baseline_pr", "comparison_baseline_bpb")
# What a run owes to whom, and whether it was on: asked of the settings and of the data of its result.json. Without a
# question it is in every run of this script.
ATTRIBUTION: dict[str, tuple[str, Callable[[dict, dict], bool] | None]] = {
    "CaseOps": ("#1729", lambda s, data: data.get("transform", "none") != "none"),
    "GPTQ of embeddings": ("#1394", None),
    "clip by row deviation": ("#1394", lambda s, data: not s.get("rate_distortion")),
    "Muon with Polar Express": ("#1344", lambda s, data: s.get("muon_coefficients") == "polar_express"),
    "XSA": ("#265", None),
    "LoRA per document": ("#1530", lambda s, data: s.get("ttt_enabled") and s.get("ttt_method") == "lora"),
    "score-first SGD": ("#549", lambda s, data: s.get("ttt_enabled") and s.get("ttt_method") == "sgd"),
    "global SGD in phases": (
        "#1626",
        lambda s, data: s.get("ttt_enabled") and s.get("ttt_method") == "lora" and s.get("phased_ttt_num_phases"),
    ),
    "n-gram tilt": ("#1145 and #1420", lambda s, data: s.get("ngram_enabled")),
    "two-lane decoder": ("#1529", lambda s, data: side_by_side(s) and s.get("parallel_mode") == "lanes"),
    "attention and MLP from one input": (
        "#1493",
        lambda s, data: side_by_side(s) and s.get("parallel_mode") == "gptj",
    ),
    "SmearGate": ("#1667", lambda s, data: s.get("smear_gate_enabled")),
    "attention output gate": ("#1667", lambda s, data: s.get("attn_out_gate_enabled")),
    "sparse attention gate": ("#1787", lambda s, data: s.get("sparse_attn_gate_enabled")),
    "LQER": ("#1797", lambda s, data: s.get("lqer_enabled")),
    "AWQ-lite": ("#1908", lambda s, data: s.get("awq_lite_enabled")),
    "logit calibration": ("#1884", lambda s, data: s.get("logit_calibration_enabled")),
    "the stack it follows": ("#1855", None),
}
CONDITIONS = {
    "C1": "causal",
    "C2": "normalised",
    "C3": "score before update",
    "C4": "single pass",
    "bytes": "artifact below the cap",
    "train_budget": "training time",
    "eval_budget": "evaluation time",
    "packaging": "the packed files alone give the score",
    "data": "training and validation disjoint, bytes true",
}


def side_by_side(settings: dict) -> bool:
    """Whether any layer has attention and MLP side by side."""
    return 0 < settings.get("parallel_start_layer", 0) < settings.get("num_layers", 0)


def attribution(run: Run) -> dict[str, str]:
    """Credit for what was on in a run: its seeds differ in nothing else."""
    settings, data = run.result["settings"], run.result["data"]
    return {what: number for what, (number, on) in ATTRIBUTION.items() if on is None or on(settings, data)}


# ---------------------------------------------------------------- several seeds, one system


def configurations(runs: list[Run]) -> dict[str, list[Run]]:
    """The runs of each configuration, by what sets it apart from the others (nothing, where there is one alone)."""
    groups = {}
    for run in runs:
        found = {name.upper(): value for name, value in run.result["settings"].items() if name != "seed"}
        found |= {"source": str(run.result.get("source_sha256"))[:12]}
        found |= {"validation": str(run.result["data"].get("val_sha256"))[:12]}
        groups.setdefault(json.dumps(found, sort_keys=True), (found, []))[1].append(run)
    each = [found for found, _ in groups.values()]
    names = [
        name for name in dict.fromkeys(name for found in each for name in found)
        if len({json.dumps(found.get(name)) for found in each}) > 1
    ]  # fmt: skip
    return {
        " ".join(f"{name}={found[name]}" for name in names if name in found) or "as elsewhere" * (len(groups) > 1): mine
        for found, mine in groups.values()
    }


def different_seeds(runs: list[Run]) -> bool:
    """Whether a mean over these runs of one configuration is one over seeds."""
    return len(runs) > 1 and len({run.result["seed"] for run in runs}) == len(runs)


def check_together(runs: list[Run]) -> None:
    """Seeds of one system: different seeds, all else equal."""
    first = runs[0]
    without_seed = lambda run: {name: value for name, value in run.result["settings"].items() if name != "seed"}
    for run in runs[1:]:
        if changed := sorted(
            name.upper() for name, value in without_seed(run).items() if without_seed(first).get(name) != value
        ):
            raise ReportError(
                f"{run.folder}: other settings than {first.folder} ({', '.join(changed)}); a mean is over seeds of "
                "one configuration"
            )
        for what, value in (("source_sha256", "another train_gpt.py"), ("val_sha256", "other validation data")):
            if (run.result | run.result["data"]).get(what) != (first.result | first.result["data"]).get(what):
                raise ReportError(
                    f"{run.folder}: made with {value} than {first.folder}; a mean is over seeds of one configuration"
                )
    if len({run.result["seed"] for run in runs}) < len(runs):
        raise ReportError("a seed is given twice; a mean is over different seeds")


def joined_verdicts(runs: list[Run]) -> dict[str, tuple[str, str]]:
    """The worst verdict of any run on every condition that one of them names; PASS only if every run passes."""
    return {
        condition: worst((run.verdicts.get(condition, (NOT_RUN, "")) for run in runs), lambda found: found[0])
        for condition in dict.fromkeys(condition for run in runs for condition in run.verdicts)
    }


def spread(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


# ---------------------------------------------------------------- submission.json


def submission(runs: list[Run], words: dict) -> dict:
    """The union of the keys that merged records use. Refused where there is no val_bpb on the full validation set, so
    no null ever stands in it."""
    check_together(runs)
    for run in runs:
        if run.val_bpb is None:
            failed = (
                ", ".join(f"{name}: {reason}" for name, (verdict, reason) in run.verdicts.items() if verdict == "FAIL")
                or "the run has none"
            )
            raise ReportError(f"{run.folder}: no val_bpb to hand in ({failed})")
    runs = sorted(runs, key=lambda run: run.result["seed"])
    first, bpb, loss, size = (
        runs[0].result,
        [run.val_bpb for run in runs],
        [run.val_loss for run in runs],
        [run.result["bytes"]["total"] for run in runs],
    )
    contest = first["data"]["dataset"] == "contest"
    entry = {
        **{word: words[word] for word in ("author", "github_id", "name", "blurb", "date")},
        "track": "track_10min_16mb"
        if contest and first["settings"]["max_wallclock_seconds"] == 600
        else "track_non_record_16mb",
        "dataset": first["data"]["dataset"],
        "val_loss": round(statistics.fmean(loss), 8),
        "val_bpb": round(statistics.fmean(bpb), 8),
        "val_loss_std": round(spread(loss), 8),
        "val_bpb_std": round(spread(bpb), 8),
        "seeds": [run.result["seed"] for run in runs],
        "seed_results": {str(run.result["seed"]): seed_result(run) for run in runs},
        "bytes_total": max(size),
        "bytes_code": max(run.result["bytes"]["code"] for run in runs),
        "artifact_bytes_mean": round(statistics.fmean(size)),
        "artifact_bytes_max": max(size),
        **{
            f"{stage}_bpb_mean": round(statistics.fmean(run.stages[stage] for run in runs), 8)
            for stage in runs[0].stages
        },
        "train_steps_mean": round(statistics.fmean(run.result["training"]["steps"] for run in runs), 1),
        "val_targets": first["data"]["val_targets"],
        "val_bytes": first["data"]["val_bytes"],
        "val_documents": first["data"]["val_documents"],
        "val_sha256": first["data"]["val_sha256"],
        "source_sha256": first["source_sha256"],
        "hardware": first["hardware"],
        "pytorch_version": first["versions"]["torch"],
        "cuda_version": first["versions"].get("cuda") or "none",
        "flash_attn_version": first.get("attention", "unknown"),
        "technique_summary": changed_settings(runs[0]),
        "compliance": {
            name: {"verdict": verdict, "reason": reason} for name, (verdict, reason) in joined_verdicts(runs).items()
        },
        "attribution": attribution(runs[0]),
    }
    if words.get("comparison_baseline_pr"):
        entry |= comparison(entry, words, contest)
    return entry


def seed_result(run: Run) -> dict:
    result, training = run.result, run.result["training"]
    return {
        "val_loss": round(run.val_loss, 8),
        "val_bpb": round(run.val_bpb, 8),
        "artifact_bytes": result["bytes"]["total"],
        "steps": training["steps"],
        "step_avg_ms": round(1e3 * training["seconds"] / max(training["steps"], 1), 2),
        "train_time_s": round(result["seconds"]["train"], 1),
        "eval_time_s": round(result["seconds"]["eval"], 1),
        **{f"{stage}_bpb": round(value, 8) for stage, value in run.stages.items()},
    }


def comparison(entry: dict, words: dict, contest: bool) -> dict:
    if not contest:
        raise ReportError(
            "--baseline: the runs are not on the contest's validation set, so no published figure compares with them"
        )
    delta = entry["val_bpb"] - words["comparison_baseline_bpb"]
    nats = delta * math.log(2) * entry["val_bytes"] / entry["val_targets"]
    return {
        "comparison_baseline_pr": words["comparison_baseline_pr"],
        "comparison_baseline_bpb": words["comparison_baseline_bpb"],
        "delta_vs_baseline_bpb": round(delta, 8),
        "delta_vs_baseline_nats_per_token": round(nats, 8),
    }


def changed_settings(run: Run) -> str:
    """The settings that differ from the script's defaults, as its log says."""
    found = re.search(r"changed from their defaults: (.*)", run.log)
    if not found:
        raise ReportError(
            f"{run.folder}: its train.log is missing or does not name the changed settings; hand in runs with their "
            "logs"
        )
    names = [text for text in found[1].split() if not text.startswith("SEED=")]
    return " ".join(names) if names and names != ["none"] else "the defaults of train_gpt.py"


def words_of(path: Path) -> dict:
    """The words of a submission.json that exists."""
    found = read_json(path)
    if missing := [word for word in WORDS[:5] if not isinstance(found.get(word), str)]:
        raise ReportError(f"{path}: lacks {', '.join(missing)}; write it again with tools/report.py --submission")
    return {word: found[word] for word in WORDS if word in found}


def as_json(value) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


# ---------------------------------------------------------------- Markdown


def markdown(rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]]) + "\n"


def results_table(runs: list[Run]) -> str:
    """Seeds as rows, what was measured as columns, the mean and the sample standard deviation of the BPB below;
    hardware and data in the line above."""
    runs = sorted(runs, key=lambda run: run.result["seed"])
    stages = [stage for stage in dict.fromkeys([*STAGES, *runs[0].stages]) if all(stage in run.stages for run in runs)]
    rows = [["seed", "steps", "ms/step", *stages, "**val_bpb**", "train s", "eval s", "bytes"]]
    for run in runs:
        result, training = run.result, run.result["training"]
        rows.append(
            [
                str(result["seed"]),
                f"{training['steps']:,}",
                f"{1e3 * training['seconds'] / max(training['steps'], 1):.1f}",
                *(f"{run.stages[stage]:.5f}" for stage in stages),
                f"**{run.val_bpb:.5f}**" if run.val_bpb is not None else "none, see the verdicts",
                f"{result['seconds']['train']:.1f}",
                f"{result['seconds']['eval']:.1f}",
                f"{result['bytes']['total']:,}",
            ]
        )
    if len(configurations(runs)) == 1 and different_seeds(runs):
        columns = [[run.stages[stage] for run in runs] for stage in stages] + [[run.val_bpb for run in runs]]
        for name, function in (("mean", statistics.fmean), ("std", statistics.stdev)):
            rows.append([name, "", "", *(f"{function(c):.5f}" if None not in c else "" for c in columns), "", "", ""])
    return f"{runs[0].hardware}; {runs[0].documents}.\n\n{markdown(rows)}"


def verdict_table(runs: list[Run]) -> str:
    rows = [["condition", "", "verdict", "evidence"]]
    rows += [
        [name, CONDITIONS.get(name, ""), verdict, reason.replace("|", "\\|")]
        for name, (verdict, reason) in joined_verdicts(runs).items()
    ]
    return markdown(rows)


def as_code(value: object) -> str:
    """A value as a variable of the environment has it; nothing for an empty text."""
    return f"`{int(value) if isinstance(value, bool) else value}`" if value != "" else ""


def recipe_values() -> tuple[dict[str, str], dict[str, dict[str, list[str]]]]:
    """The recipes of published systems by a short name that no other begins with; and of each setting that some of them
    change, value -> short names."""
    from tools.sweep import read_recipe
    from train_gpt import Config, parse_setting

    paths = [path for path in sorted((ROOT / "recipes").glob("*.env")) if not path.stem.startswith(("best", "scale_"))]
    width = next(n for n in range(3, 99) if len({path.stem[:n] for path in paths}) == len(paths))
    defaults, values = Config(), {}
    for path in paths:
        for name, text in read_recipe(path).items():
            default = getattr(defaults, name.lower(), None)
            value = parse_setting(name, text, type(default)) if default is not None else None
            if value != default:
                values.setdefault(name, {}).setdefault(as_code(value) or "empty", []).append(path.stem[:width])
    return {path.stem[:width]: path.stem for path in paths}, values


def settings_table() -> str:
    """Every setting of train_gpt.py by group, from its source; and what the recipes have in place of its default."""
    from train_gpt import SOURCE, Config

    recipes, values = recipe_values()
    spelt = lambda names: "all" if len(names) == len(recipes) > 1 else " ".join(names)
    rows, group, defaults = [], "", Config()
    body = SOURCE[SOURCE.index("class Config:") : SOURCE.index("@classmethod", SOURCE.index("class Config:"))]
    for line in body.splitlines():
        if found := re.match(r"    # (.*)", line):
            group = found[1]
        elif found := re.match(r"    (\w+): \w+ = setting\(", line):
            name = found[1].upper()
            meaning = Config.__dataclass_fields__[found[1]].metadata["meaning"].replace("|", "\\|")
            others = "; ".join(f"{value} {spelt(names)}" for value, names in values.get(name, {}).items())
            rows.append((group, [f"`{name}`", as_code(getattr(defaults, found[1])), meaning, others]))
    legend = ", ".join(f"{short} `{name}`" for short, name in recipes.items())
    parts = [f"Recipes, where they differ from the defaults: {legend}.\n"]
    for group in dict.fromkeys(group for group, _ in rows):
        parts.append(
            f"**{group[0].upper()}{group[1:]}**\n\n"
            + markdown([["setting", "default", "meaning", "in recipes"], *(row for g, row in rows if g == group)])
        )
    return "\n".join(parts)


BLOCK = re.compile(r"(<!-- report: (\w+)((?: [^\s>]+)*) -->\n)(.*?)(<!-- /report -->)", re.S)


def with_blocks(text: str, folder: Path) -> str:
    """A text with its generated parts made again: <!-- report: settings -->, <!-- report: results RUN_DIR... --> and
    <!-- report: verdicts RUN_DIR... -->, each up to <!-- /report -->."""
    makers = {"results": results_table, "verdicts": verdict_table}

    def made(match: re.Match) -> str:
        kind, paths = match[2], match[3].split()
        if kind == "settings":
            return f"{match[1]}\n{settings_table()}\n{match[5]}"
        if kind not in makers or not paths:
            raise ReportError(
                f"<!-- report: {kind}{match[3]} -->: must be settings, or results or verdicts with the folders of runs"
            )
        return f"{match[1]}\n{makers[kind]([load_run(folder / path) for path in paths])}\n{match[5]}"

    return BLOCK.sub(made, text)


# ---------------------------------------------------------------- a folder for records/


def record_files(runs: list[Run], words: dict) -> dict[str, bytes]:
    """Name -> content of everything that is handed in."""
    runs = sorted(runs, key=lambda run: run.result["seed"])
    entry = submission(runs, words)
    files = {
        "submission.json": as_json(entry).encode(),
        "README.md": record_readme(runs, entry).encode(),
        "requirements.txt": (ROOT / "requirements.txt").read_bytes(),
    }
    scripts = {(run.folder / "train_gpt.py").read_bytes() for run in runs}
    if len(scripts) > 1:
        raise ReportError(
            f"{runs[0].folder.parent}: the seeds were packed into different train_gpt.py; hand in runs of one script"
        )
    files["train_gpt.py"] = scripts.pop()
    for run in runs:
        seed = run.result["seed"]
        files[f"train_seed{seed}.log"] = run.log.encode()
        for name in ("result.json", "eval_result.json", "audit.json"):
            if (run.folder / name).exists():
                stem, suffix = name.split(".")
                files[f"{stem}_seed{seed}.{suffix}"] = (run.folder / name).read_bytes()
    if journal := journal_of(runs):
        files["runs.jsonl"] = journal.read_bytes()
    return files


def journal_of(runs: list[Run]) -> Path | None:
    """The sweep's list of all its runs, where these are of one sweep."""
    journals = {run.folder.parent / "runs.jsonl" for run in runs}
    return next((path for path in journals if len(journals) == 1 and path.exists()), None)


def record_readme(runs: list[Run], entry: dict) -> str:
    data, first = runs[0].result["data"], runs[0].result
    changed = "" if entry["technique_summary"].startswith("the defaults") else entry["technique_summary"] + " "
    versus = ""
    if "comparison_baseline_pr" in entry:
        versus = (
            f"Against {entry['comparison_baseline_pr']} ({entry['comparison_baseline_bpb']:.5f}): "
            f"{entry['delta_vs_baseline_bpb']:+.5f} BPB, "
            f"{entry['delta_vs_baseline_nats_per_token']:+.5f} nats per token.\n\n"
        )
    disclosed = (
        "`runs.jsonl` lists every run that was started in that folder, failed and bad ones too.\n"
        if journal_of(runs)
        else ""
    )
    held = lambda name: any((run.folder / f"{name}.json").exists() for run in runs)
    shipped = "".join(f", `{name}_seed*.json`" for name in ("eval_result", "audit") if held(name))
    seeds = f"seed {first['seed']} alone"
    if len(runs) > 1:
        seeds = f"mean of {len(runs)} seeds, sample standard deviation {entry['val_bpb_std']:.5f}"
    verdict, reason = joined_verdicts(runs).get("data", (NOT_RUN, ""))
    disjoint = f"{verdict}" + (f" ({reason})" if reason else "")
    manifest = (
        "The run held the data against its manifest.json" if data.get("manifest") else "There was no manifest.json"
    )
    device = "DEVICE=cpu " if first["hardware"].startswith("CPU") else ""
    return f"""# {entry["name"]}

**val_bpb {entry["val_bpb"]:.5f}** ({seeds}),
{entry["val_loss"]:.5f} nats per token,
at most {entry["bytes_total"]:,} bytes. {entry["blurb"]}

{versus}{results_table(runs)}
Every number here is read from the logs and `result_seed*.json` by `tools/report.py`,
and `tools/report.py --verify` makes them again.

## Conditions

{verdict_table(runs)}
NOT RUN means that nobody has shown it; `tools/audit.py` does.

## Command

    DATA_PATH=DATA SEED={first["seed"]} {device}{changed}{launcher(first["hardware"])} train_gpt.py

DATA is the folder of the data described below.
`train_gpt.py` is the file that was counted ({entry["bytes_code"]:,} bytes, with `model.bin` {entry["bytes_total"]:,}).
`python3 train_gpt.py --unpack train_gpt.py` prints its source without running it.
Source SHA-256 {first["source_sha256"]}, settings SHA-256 {first["settings_sha256"]} (seed {first["seed"]}).

## Data

{data["val_documents"]:,} validation documents, {data["val_targets"]:,} targets, {data["val_bytes"]:,} bytes,
dataset: {data["dataset"]},
SHA-256 of the tokens {data["val_sha256"]}.
Training and validation disjoint, bytes true: {disjoint}.
{manifest}.

## Files

`train_seed*.log` and `result_seed*.json`{shipped} as they were written, `requirements.txt`. {disclosed}
## Credits

{", ".join(f"{what} {number}" for what, number in entry["attribution"].items())}.
"""


def launcher(hardware: str) -> str:
    """What started the run: torchrun for the number of ranks that its hardware line names."""
    ranks = re.search(r"^(\d+) x |x (\d+) rank", hardware)
    world = int(ranks[1] or ranks[2]) if ranks else 1
    return f"torchrun --standalone --nproc_per_node={world}" if world > 1 else "python"


# ---------------------------------------------------------------- verification


# What is verified and handed in of a result, beyond what the tables need.
HANDED = {
    "settings_sha256": lambda result: result,
    "source_sha256": lambda result: result,
    "val_targets": lambda result: result["data"],
    "val_sha256": lambda result: result["data"],
    "code": lambda result: result["bytes"],
    "model": lambda result: result["bytes"],
    "total": lambda result: result["bytes"],
    "train": lambda result: result["seconds"],
    "eval": lambda result: result["seconds"],
    "steps": lambda result: result["training"],
    "seconds": lambda result: result["training"],
    "max_wallclock_seconds": lambda result: result["settings"],
    "torch": lambda result: result["versions"],
}


def compared(run: Run) -> list[str]:
    """What --verify holds against what, and what it cannot know."""
    there = [name for name in ARTIFACT if (run.folder / name).exists()]
    claimed = run.result.get("artifact_sha256", {}) if run.bound else {}
    parts = ["result.json with every figure in train.log, and with itself"]
    parts += [f"the SHA-256 of {name}" for name in there if name in claimed]
    parts += [f"the size of {name} alone (result.json holds no hash of it)" for name in there if name not in claimed]
    parts += ["the source inside train_gpt.py by its hash"] if "train_gpt.py" in there else []
    parts += [f"not {name}, which is not there" for name in ARTIFACT if name not in there]
    reload = (run.audit or {}).get("checks", {}).get("reload", {}).get("verdict")
    said = f"its audit.json says reload {reload}" if reload else f"python tools/audit.py {shown(run.folder)}"
    return [
        f"{shown(run.folder)}: compared {'; '.join(parts)}",
        f"  Who edits result.json and train.log alike passes: only the audit's reload scores model.bin again; {said}",
    ]


def script_faults(run: Run) -> list[str]:
    """The packed script is the one whose source the result names."""
    script = run.folder / "train_gpt.py"
    if not script.exists():
        return []
    try:
        source = unpack(script.read_bytes())
    except (Broken, SyntaxError, ValueError) as error:
        return [f"{script}: cannot be unpacked ({error})"]
    held = hashlib.sha256(source.encode("utf-8", "replace")).hexdigest() == run.result["source_sha256"]
    return [] if held else [f"{script}: holds another source than the one that result.json names"]


def verify_run(run: Run) -> list[str]:
    """Where result.json disagrees with the log, with itself, or with the files beside it; one line each."""
    result, lines, at = run.result, set(run.log.splitlines()), run.folder / "result.json"
    if missing := [name for name, holder in HANDED.items() if name not in holder(result)]:
        return [f"{at}: lacks {', '.join(missing)}; it is not a result of train_gpt.py, or damaged: run again"]
    if not run.log:
        return [*run.doubts, f"{run.folder}: has no train.log, so nothing bears out its result.json"]
    told = [f"  {name + ' BPB':24s} {value:.6f}" for name, value in result["bpb"].items()]
    told += [f"  {name + ' bytes':24s} {size:,}" for name, size in result["bytes"].items()]
    told += [f"  {name + ' seconds':24s} {value:.1f}" for name, value in result["seconds"].items()]
    told += [
        f"  {name:24s} {entry['verdict']:9s} {entry['reason']}".rstrip() for name, entry in result["verdicts"].items()
    ]
    failed = [name for name, entry in result["verdicts"].items() if entry["verdict"] == "FAIL"]
    told.append(
        f"val_bpb {result.get('val_bpb', math.nan):.6f} on all {result['data']['val_targets']:,} targets, dataset "
        f"{result['data']['dataset']}"
        if not failed
        else f"no val_bpb: {', '.join(failed)} failed"
    )
    told += [
        f"source sha256 {result['source_sha256']}",
        "data: " + ", ".join(f"{k} {v}" for k, v in result["data"].items()),
        "all settings: " + json.dumps(result["settings"]),
    ]
    stripped = {line.rstrip() for line in lines}
    faults = [
        f"{at}: says '{line.strip()[:150]}', its train.log does not" for line in told if line.rstrip() not in stripped
    ]
    faults += [
        f"{at}: step {step} has a loss of {loss:.4f}, its train.log does not"
        for step, _, loss, _ in result["training"].get("curve", ())
        if not re.search(rf"^step +{step}  .*loss {loss:.4f} ", run.log, re.M)
    ]
    faults += [
        f"{at}: step {step} has {bpb:.4f} BPB, its train.log does not"
        for step, _, bpb in result.get("val_curve", ())
        if not re.search(rf"^step +{step}: {bpb:.4f} BPB ", run.log, re.M)
    ]
    return faults + inner_faults(run, failed)


def inner_faults(run: Run, failed: list[str]) -> list[str]:
    """Contradictions inside result.json, and with the files that lie beside it."""
    result, at = run.result, run.folder / "result.json"
    faults = [*run.doubts, *script_faults(run)]
    size, cap = result["bytes"], result["settings"].get("artifact_cap", 0)
    headline = result["bpb"].get("adapted", result["bpb"].get("quantized"))
    tests = [
        (
            hashlib.sha256(json.dumps(result["settings"], sort_keys=True).encode()).hexdigest()
            == result["settings_sha256"],
            "settings_sha256 is not the hash of its settings",
        ),
        (size.get("total") == size.get("code", 0) + size.get("model", 0), "its bytes do not add up"),
        (
            size.get("total", 0) <= cap or "bytes" in failed,
            f"{size.get('total', 0):,} bytes are over the cap of {cap:,} and nothing failed",
        ),
        (("val_bpb" in result) == (not failed), "a val_bpb beside a FAIL" if failed else "no val_bpb and no FAIL"),
        ("val_bpb" not in result or result["val_bpb"] == headline, "val_bpb is not the BPB of its last stage"),
        (result["seed"] == result["settings"].get("seed"), "seed is not the seed of its settings"),
    ]
    faults += [f"{at}: {what}" for holds, what in tests if not holds]
    for key, name in (("code", "train_gpt.py"), ("model", "model.bin")):
        if (file := run.folder / name).exists() and file.stat().st_size != size.get(key):
            faults.append(f"{at}: says {size.get(key, 0):,} bytes of {name}, the file has {file.stat().st_size:,}")
    if run.rescored and not run.rescored_equal():
        faults.append(f"{run.folder / 'eval_result.json'}: another BPB than result.json")
    for name, row in run.audit["checks"].items() if run.audit else ():
        if row["verdict"] == "FAIL":
            faults.append(f"{run.folder / 'audit.json'}: {name} FAIL: {' '.join(row['evidence'].split())[:200]}")
    return faults


def difference(path: Path, found: str, wanted: str) -> list[str]:
    """The first line in which a file is not what the runs give."""
    if found == wanted:
        return []
    lines = [
        line
        for line in difflib.unified_diff(found.splitlines(), wanted.splitlines(), lineterm="", n=0)
        if line[:1] in "+-" and line[:3] not in ("+++", "---")
    ]
    has = next((line[1:] for line in lines if line[0] == "-"), "")
    ought = next((line[1:] for line in lines if line[0] == "+"), "")
    return [f"{path}: has '{has.strip()[:120]}', the runs give '{ought.strip()[:120]}'"]


def verify_submission(path: Path, runs: list[Run]) -> list[str]:
    found, wanted = read_json(path), submission(runs, words_of(path))
    shown = lambda entry, key: json.dumps(entry[key])[:100] if key in entry else "nothing"
    faults = [
        f"{path}: {key} is {shown(found, key)}, the runs give {shown(wanted, key)}"
        for key in dict.fromkeys([*wanted, *found])
        if shown(found, key) != shown(wanted, key) or found.get(key) != wanted.get(key)
    ]
    return faults or difference(path, path.read_text(encoding="utf-8"), as_json(wanted))


def verify_record(folder: Path, runs: list[Run]) -> list[str]:
    wanted, faults = record_files(runs, words_of(folder / "submission.json")), []
    for name in sorted(set(wanted) | {path.name for path in folder.iterdir()}):
        if name not in wanted:
            faults.append(f"{folder / name}: no part of the record")
        elif not (folder / name).exists():
            faults.append(f"{folder / name}: missing")
        elif name == "submission.json":
            faults += verify_submission(folder / name, runs)
        elif (found := (folder / name).read_bytes()) != wanted[name]:
            faults += difference(
                folder / name, found.decode("utf-8", "replace"), wanted[name].decode("utf-8", "replace")
            ) or [f"{folder / name}: other bytes"]
    return faults


def verify_generated(path: Path) -> list[str]:
    text = path.read_text(encoding="utf-8")
    return difference(path, text, with_blocks(text, path.resolve().parent))
