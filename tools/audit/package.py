"""Training and packaging: what is shipped, that it can be read, and that it alone gives the score."""

import ast
import collections
import hashlib
import re
import sys

import numpy as np

from tools.audit.causality import LENGTH_TOLERANCE
from tools.audit.logs import code_bytes, read_logs, total_bytes
from tools.audit.outcome import NotRun, verdict_of
from tools.audit.readme import variables_of_file
from tools.audit.shared import Audit, full_run, moved, small
from tools.runs import ROOT, other_artifact
from tools.streams import shard_paths
from tools.verdicts import DISPUTED, FAIL

CAP = 16_000_000


def short_trainings(a: Audit) -> tuple[dict, dict, bytes]:
    """Two trainings of a few steps, by the shipped script and by its unpacked source, with different validation data ->
    both artifacts, the shipped script."""
    settings = a.artifact.settings
    if not settings:
        raise NotRun("no result.json with the settings to train with")
    if not shard_paths(a.data.folder, "train"):
        raise NotRun(f"{a.data.folder}: no training shards")
    text = {name.upper(): int(value) if isinstance(value, bool) else value for name, value in settings.items()}
    env = {**text, "ITERATIONS": 3, "MAX_WALLCLOCK_SECONDS": 0, "WARMUP_STEPS": 1, "GPTQ_CALIBRATION_BATCHES": 2}
    if a.artifact.device == "cpu" and "train_seq_len" in settings:  # few tokens show a dependence as well as many
        env |= dict.fromkeys(
            ("TRAIN_BATCH_TOKENS", "MICRO_BATCH_TOKENS"),
            min(2 * settings["train_seq_len"], settings.get("micro_batch_tokens", 1 << 30)),
        )
    shipped = (a.folder / "train_gpt.py").read_bytes()
    data = a.excerpt
    few = data.of_documents(data.documents()[:4])
    poisoned = a.replaced(
        data.of_documents(data.documents()[-3:]), np.arange(sum(e - s for s, e in data.documents()[-3:])), seed=3
    )
    return a.artifact.train(shipped, few, env), a.artifact.train(a.source.encode(), poisoned, env), shipped


def training(a: Audit) -> tuple[str, str]:
    """C3: two trainings with different validation data, by steps and not by the clock, give the same model.bin."""
    one, two, _ = a.once("trainings", lambda: short_trainings(a))
    same = one["model.bin"] == two["model.bin"]
    if a.artifact.device == "cuda" and not same:
        return DISPUTED, "model.bin differs; GPU kernels need not be bit-reproducible: run --device cpu"
    return verdict_of(
        [] if same else ["model.bin depends on the validation data (or is not reproducible)"],
        f"3 steps, other validation data: the same {len(one['model.bin']):,} bytes of model.bin",
    )


def pack(a: Audit) -> tuple[str, str]:
    """The shipped script, trained again, ships itself; and its unpacked source packs to the same bytes."""
    one, two, shipped = a.once("trainings", lambda: short_trainings(a))
    faults = [
        f"{who} ships {len(made['train_gpt.py']):,} other bytes of train_gpt.py"
        for who, made in (("the packed script", one), ("its unpacked source", two))
        if made["train_gpt.py"] != shipped
    ]
    return verdict_of(faults, f"packed again, and unpacked and packed: the same {len(shipped):,} bytes")


def reload(a: Audit) -> tuple[str, str]:
    """The two files alone, in an empty folder, without network (on a CPU also without any program on the path), give
    the reported BPB."""
    how = "two files, no network" + (
        ", empty PATH" if a.artifact.device == "cpu" else " (the GPU's compiler is allowed)"
    )
    if not small(a):
        scored = a.once("reload", lambda: a.artifact.score(a.excerpt, blocked=True))
        changed = moved(scored.nats, a.base.nats, max(LENGTH_TOLERANCE, a.tolerance))
        return verdict_of(
            [f"{len(changed):,} targets of the excerpt changed"] if len(changed) else [],
            f"{how}: the excerpt's scores are the same; the full set was not run",
        )
    scored = full_run(a)
    stages, claimed = scored.result["bpb"], a.artifact.result.get("bpb", {})
    faults = [
        f"{stage}: {stages[stage]:.6f} BPB, result.json has {claimed[stage]:.6f}"
        for stage in stages
        if stage in claimed and abs(stages[stage] - claimed[stage]) > 1e-5
    ]
    headline, now = a.artifact.result.get("val_bpb"), list(stages.values())[-1]
    if headline is not None and abs(headline - now) > 1e-5:
        faults.append(f"val_bpb: {now:.6f} by the artifact's own settings, result.json has {headline:.6f}")
    settings = {k: v for k, v in scored.result.get("settings", {}).items() if a.artifact.settings.get(k, v) != v}
    settings.pop("max_wallclock_seconds", None)  # the audit's own runs have no budget
    if settings:
        faults.append(f"result.json was scored with other settings than the artifact holds: {', '.join(settings)}")
    return verdict_of(faults, f"{how}: {now:.6f} BPB" + ("" if claimed else " (no result.json to compare with)"))


HELPERS = (".py", ".c", ".cu", ".cpp", ".so", ".json", ".npy", ".pkl")  # files that a script could lean on
WRITTEN = (  # by a run and the tools
    "result.json",
    "eval_result.json",
    "audit.json",
    "submission.json",
    "baselines.json",
    "manifest.json",
)


def size(a: Audit) -> tuple[str, str]:
    """Sizes by stat against the cap and against what the run printed; files that the script names and does not
    count."""
    if not (a.folder / "model.bin").is_file():
        return size_by_logs(a)
    sizes = {name: (a.folder / name).stat().st_size for name in ("train_gpt.py", "model.bin")}
    total, claimed = sum(sizes.values()), a.artifact.result.get("bytes", {})
    faults = [f"{total:,} bytes are over the cap of {CAP:,}"] if total > CAP else []
    for name, key in (("train_gpt.py", "code"), ("model.bin", "model")):
        if key in claimed and claimed[key] != sizes[name]:
            faults.append(f"{name} has {sizes[name]:,} bytes, result.json counts {claimed[key]:,}")
    faults += [
        f"{p.name} ({p.stat().st_size:,} bytes) is named by the script and not counted"
        for p in a.folder.iterdir()
        if p.suffix in HELPERS
        and p.name not in (*sizes, *WRITTEN)
        and re.search(rf"[\"'/]{re.escape(p.name)}[\"']", a.source)
    ]
    faults += other_artifact(a.artifact.result, a.folder / "result.json")
    raw = len(a.source.encode())
    return verdict_of(
        faults,
        f"{sizes['train_gpt.py']:,} + {sizes['model.bin']:,} = {total:,} of {CAP:,} "
        f"(source unpacked: {raw:,}; tokenizer not counted)",
    )


def size_by_logs(a: Audit) -> tuple[str, str]:
    """Without model.bin: the totals that the logs print, against the cap."""
    logs = read_logs(a.folder)
    totals = {name: total for name, text in logs.items() if (total := total_bytes(text))}
    if not totals:
        raise NotRun("no model.bin, and no log that prints a total")
    over = [f"{name} counts {total:,} bytes, over the cap of {CAP:,}" for name, total in totals.items() if total > CAP]
    script = a.folder / "train_gpt.py"
    if over and script.is_file():  # a run may count the source that was packed only for the record
        shipped = script.stat().st_size
        packed = [total - code_bytes(logs[name]) + shipped for name, total in totals.items() if code_bytes(logs[name])]
        if len(packed) == len(totals) and max(packed) <= CAP:
            return DISPUTED, "; ".join([*over, f"with the {shipped:,} bytes of train_gpt.py here {max(packed):,}"])
    what = f"no model.bin; {len(totals)} log(s) count at most {max(totals.values()):,} of {CAP:,} bytes"
    # Of several logs some may be of trials that were not handed in.
    return verdict_of(over if len(over) == len(totals) else [], what, over)


def source(a: Audit) -> tuple[str, str]:
    """The source can be read, compiles, is the one that made the log, loads nothing executable and imports no
    network."""
    text = a.source
    script = (a.folder / "train_gpt.py").read_bytes()
    faults = (
        ["train_gpt.py begins with a byte order mark"]
        if script.startswith(b"\xef\xbb\xbf") or text.startswith("\ufeff")
        else []
    )
    digest, claimed = hashlib.sha256(text.encode()).hexdigest(), a.artifact.result.get("source_sha256")
    if claimed and claimed != digest:
        faults.append(f"result.json is of another source ({claimed[:12]}, the shipped one is {digest[:12]})")
    try:
        tree = ast.parse(text.removeprefix("\ufeff"))
    except (SyntaxError, ValueError, RecursionError) as error:
        if faults:
            return FAIL, "; ".join(faults)
        # This Python can only say that the text is not its own: a later one has syntax that it does not know.
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        raise NotRun(
            f"Python {version} does not read it ({error}); audit with the version that the record names"
        ) from None
    modules = {
        name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in ([n.name for n in node.names] if isinstance(node, ast.Import) else [node.module or ""])
    }
    doubts = [
        f"imports {module}"
        for module in sorted(
            modules & {"requests", "urllib", "http", "socket", "huggingface_hub", "datasets", "subprocess", "pickle"}
        )
    ]
    calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    doubts += [
        f"calls {call}: a pickle runs code when it is loaded"
        for call in sorted(calls & {"torch.load", "pickle.load", "pickle.loads"})
    ]
    doubts += ["FORCE_STOP_STEP stops by step, not by clock"] if "FORCE_STOP_STEP" in text else []
    model = a.folder / "model.bin"
    head = model.read_bytes()[:4] if model.is_file() else b""
    if head[:2] in (b"PK", b"\x80\x02", b"\x80\x04", b"\x80\x05"):
        doubts.append("model.bin is a pickle")
    return verdict_of(
        faults,
        f"readable, {text.count(chr(10)):,} lines, sha256 {digest[:12]}"
        + (", the one in result.json" if claimed else ""),
        doubts,
    )


def settings(a: Audit) -> tuple[str, str]:
    """Every variable that README, docs or a recipe set for train_gpt.py is one that the script reads; a misspelt one
    is refused."""
    here = (
        a.folder / "README.md"
    ).is_file() or ROOT not in a.folder.resolve().parents  # a run of this repository: its README, docs and recipes
    readme = (a.folder if here else ROOT) / "README.md"
    files = [
        readme,
        *sorted(path for path in (readme.parent / "docs").glob("*.md") if path.name != "LOG.md"),  # that is history
        *sorted((readme.parent / "recipes").glob("*.env")),
        *(sorted(a.folder.glob("*.sh")) if here else ()),
    ]
    named = collections.defaultdict(set)
    for path in files:
        text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        for name in variables_of_file(path.name, text):
            named[name].add(path.name)
    if not named:
        raise NotRun("no README or recipe that sets a variable")
    helpers = (path.read_text(encoding="utf-8", errors="replace") for path in sorted(a.folder.glob("*.py")))
    sources = "\n".join([a.source, *helpers])  # modules beside the script read variables too
    known = (
        set(re.findall(r"[\"']([A-Z][A-Z0-9_]+)[\"']", sources))
        | {name.upper() for name in a.artifact.settings}
        | {name.upper() for name in re.findall(r"^\s+(\w+): (?:int|float|bool|str)\b", sources, re.M)}
    )
    faults = [
        f"{name} ({', '.join(sorted(where))}) is not read by the script"
        for name, where in sorted(named.items())
        if name not in known
    ]
    what = f"{len(named)} variables of {', '.join(path.name for path in files if path.is_file())}: all are read"
    if not (a.folder / "model.bin").is_file():
        return verdict_of(faults, f"{what} (no model.bin, so the script was not run with an unknown one)")
    folder = a.artifact.clean_folder(None, "train_gpt.py", "model.bin")
    bogus = a.artifact.environment(folder, {"TTT_EVAL_ONLY": 1, "TTT_NO_SUCH_SETTING": 1, "DATA_PATH": folder / "none"})
    code, _ = a.artifact.launcher(folder, bogus, 1, False, a.artifact.timeout)
    accepted = ["an unknown variable ends the run with status 0"] if code == 0 else []
    return verdict_of(faults, what, accepted)
