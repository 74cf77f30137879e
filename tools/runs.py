"""Finished runs of train_gpt.py as the other tools read them: result.json, the logs, and audit.json bound to the
artifact by its hashes."""

import codecs
import hashlib
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from prepare_data import sha256_file, write_file
from tools.verdicts import FAIL, NOT_RUN, VERDICTS, overrules

ROOT = Path(__file__).resolve().parents[1]

REQUIRED = {
    "bpb": dict,
    "bytes": dict,
    "seconds": dict,
    "training": dict,
    "settings": dict,
    "data": dict,
    "verdicts": dict,
    "versions": dict,
    "hardware": str,
    "seed": int,
}
DATA_COUNTS = ("val_documents", "val_targets", "val_bytes", "val_tokens")
ANATOMY = ("bpb_interval", "bpb_by_length", "bpb_by_position")  # of anatomy.json: tools/anatomy.py
STAGES = {
    "trained": "weights in memory",
    "prequant": "weights trained on the validation set: no result",
    "quantized": "model.bin, read back from disk",
    "adapted": "model.bin, with test-time training",
}
TRAIN_PHASES = ("steps", "calibrate", "quantize")  # what counts against the training budget
# In neither budget; every other phase is evaluation.
OUTSIDE_PHASES = ("setup", "warmup", "save", "subset", "diagnostic", "write")
ARTIFACT = ("train_gpt.py", "model.bin")
# How much newer than its result a file may be: copying a folder gives new times, in any order. A run takes longer.
COPY_SECONDS = 2.0


class ReportError(Exception):
    """A problem that the user can act on; printed as one line."""


@dataclass
class Run:
    folder: Path
    result: dict  # result.json
    rescored: dict | None = None  # eval_result.json: the artifact scored again, by TTT_EVAL_ONLY=1
    baselines: dict | None = None  # baselines.json
    log: str = ""  # train.log
    audit: dict | None = None  # audit.json, of this very artifact
    anatomy: dict = field(default_factory=dict)  # anatomy.json, or what an older result.json holds of it
    doubts: list[str] = field(default_factory=list)  # results that are older than the model.bin beside them

    @property
    def name(self) -> str:
        """The folder's name as text that any encoding of the locale can show."""
        return shown(self.folder.name)

    @property
    def bound(self) -> bool:
        """Whether result.json names its artifact by hash."""
        return isinstance(self.result.get("artifact_sha256"), dict)

    @property
    def verdicts(self) -> dict[str, tuple[str, str]]:
        """Condition -> (verdict, reason): the run's own, joined with the audit's. FAIL beats DISPUTED beats PASS beats
        NOT RUN."""
        table = {name: (entry["verdict"], entry["reason"]) for name, entry in self.result["verdicts"].items()}
        for condition, entry in self.audit["verdicts"].items() if self.audit else ():
            if overrules(entry["verdict"], table.get(condition, (NOT_RUN, ""))[0]):
                table[condition] = (entry["verdict"], f"audit, {' '.join(entry['reason'].split())}")
        return table

    @property
    def val_bpb(self) -> float | None:
        """The headline, only while no condition is FAIL, the audit's verdicts included."""
        return None if any(verdict == FAIL for verdict, _ in self.verdicts.values()) else self.result.get("val_bpb")

    @property
    def val_loss(self) -> float | None:
        """Nats per token of the headline: BPB is nats over ln 2 over bytes."""
        data = self.result["data"]
        return None if self.val_bpb is None else self.val_bpb * math.log(2) * data["val_bytes"] / data["val_targets"]

    @property
    def stages(self) -> dict[str, float]:
        """BPB by stage, in the order of the pipeline."""
        bpb = self.result["bpb"]
        return {stage: bpb[stage] for stage in STAGES if stage in bpb} | {
            stage: value for stage, value in bpb.items() if stage not in STAGES
        }

    @property
    def hardware(self) -> str:
        return f"{self.result['hardware']}, torch {self.result['versions'].get('torch', '?')}"

    @property
    def documents(self) -> str:
        data = self.result["data"]
        whose = "of the contest" if data["dataset"] == "contest" else "not the contest's"
        return f"{data['val_documents']:,} validation documents, {data['val_bytes']:,} bytes, {whose}"

    def rescored_equal(self) -> bool:
        """Whether every BPB of eval_result.json equals that of result.json as printed, to six decimals."""
        again = self.rescored["bpb"]
        return bool(again) and all(
            f"{value:.6f}" == f"{self.result['bpb'].get(stage, math.nan):.6f}" for stage, value in again.items()
        )


class NotFinite(ValueError):
    """A JSON file holds NaN or an infinity."""


def refuse_constant(name: str) -> None:
    """For json.loads: NaN and the infinities are no JSON, and Python would read, compare and print them as numbers."""
    raise NotFinite(f"holds {name}, which is not finite")


def shown(text: str | Path) -> str:
    """A path or its name as plain text: bytes that the locale's encoding did not know are read as UTF-8, and what that
    leaves is replaced, so that no page, picture or terminal refuses it."""
    return str(text).encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def show_all_text() -> None:
    """No text ends the program because the locale cannot spell it: ASCII, which every terminal of today extends, is
    written as UTF-8, as Python itself does under the locale C; other encodings get escapes."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not where a notebook has put a file of its own
            if codecs.lookup(stream.encoding or "ascii").name in ("ascii", "utf-8"):
                stream.reconfigure(encoding="utf-8", errors="surrogateescape")
            else:
                stream.reconfigure(errors="backslashreplace")


def read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse_constant)
    except NotFinite as error:
        raise ReportError(f"{path}: {error}; no such number is a result: run again") from None
    except FileNotFoundError:
        raise ReportError(f"{path}: no such file; give the folder of a finished run of train_gpt.py") from None
    except (ValueError, RecursionError) as error:  # JSONDecodeError, UnicodeDecodeError
        raise ReportError(f"{path}: not JSON ({error}); the file is damaged, run again") from None
    except OSError as error:
        raise ReportError(
            f"{path}: cannot be read ({error.strerror}); give the folder of a finished run of train_gpt.py"
        ) from None
    if not isinstance(value, dict):
        raise ReportError(f"{path}: not a JSON object; the file is damaged, run again")
    return value


def check_result(result: dict, path: Path, required: dict[str, type]) -> dict:
    """What the tables and pages read of a result is of the kind that they take for granted."""
    for key, kind in required.items():
        if not isinstance(result.get(key), kind):
            raise ReportError(f"{path}: holds no {key}; it is not a result of train_gpt.py, or damaged: run again")
    if not result["bpb"] or not all(isinstance(value, float) and finite(value) for value in result["bpb"].values()):
        raise ReportError(f"{path}: its bpb is empty or not finite; run again")
    if wrong := next(odd_entries(result, required), None):
        raise ReportError(f"{path}: {wrong}; it is not a result of train_gpt.py, or damaged: run again")
    return result


def finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def odd_entries(result: dict, required: dict[str, type]) -> Iterator[str]:
    """Numbers that are none, and verdicts that nobody gives."""
    if "val_bpb" in result and not finite(result["val_bpb"]):
        yield f"its val_bpb is {result['val_bpb']!r}, no number"
    for group in {"bytes", "seconds"} & set(required):
        for name, value in result[group].items():
            if not finite(value) or value < 0:
                yield f"its {group} of {name} are {value!r}, no number"
    if "training" in required:
        training, settings = result["training"], result["settings"]
        numbers = {name: training[name] for name in ("steps", "tokens", "epochs", "seconds") if name in training}
        numbers |= {name: settings[name] for name in ("max_wallclock_seconds", "artifact_cap") if name in settings}
        yield from (f"its {name} is {value!r}, no number" for name, value in numbers.items() if not finite(value))
        curves = {"curve": (training.get("curve", []), 4), "val_curve": (result.get("val_curve", []), 3)}
        for name, (curve, width) in curves.items():
            if not isinstance(curve, list) or not all(
                isinstance(row, list) and len(row) == width and all(map(finite, row)) for row in curve
            ):
                yield f"its {name} is not rows of {width} numbers"
    if "data" in required:
        counts = {name: value for name, value in result["data"].items() if name in DATA_COUNTS}
        yield from (
            f"its {name} is {value!r}, no count"
            for name, value in counts.items()
            if type(value) is not int or value < 1
        )
    if "verdicts" in required:
        for condition, entry in result["verdicts"].items():
            if not isinstance(entry, dict) or not isinstance(entry.get("reason"), str):
                yield f"its verdict on {condition} has no reason"
            elif entry.get("verdict") not in VERDICTS:
                yield f"its verdict on {condition} is {entry.get('verdict')!r}, none of {', '.join(VERDICTS)}"


def load_run(folder: Path, other_files: bool = False) -> Run:
    """A run's folder as its tools wrote it.

    A result of other files than lie beside it is refused, or where `other_files` are asked for, kept among the doubts.
    """
    path = folder / "result.json"
    run = Run(folder, check_result(read_json(path), path, REQUIRED))
    if missing := [key for key in ("dataset", "val_documents", "val_bytes") if key not in run.result["data"]]:
        raise ReportError(f"{path}: its data lacks {', '.join(missing)}; it is damaged, run again")
    if others := other_artifact(run.result, path):
        if not other_files:
            raise ReportError(others[0])
        run.doubts += others
    run.doubts += older_than_model(run.result, path)
    if (path := folder / "eval_result.json").exists():
        rescored = check_result(read_json(path), path, {"bpb": dict})
        stale = [*other_artifact(rescored, path), *older_than_model(rescored, path)]
        run.doubts += [f"{line}; it is left aside" for line in stale]
        run.rescored = None if stale else rescored
    if (path := folder / "baselines.json").exists():
        wanted = {"bpb": dict, "fingerprint": dict, "text_bytes": int, "bigram": str}
        run.baselines = check_result(read_json(path), path, wanted)
    if (path := folder / "anatomy.json").exists():
        run.anatomy = check_anatomy(read_json(path), path)
    else:
        run.anatomy = {key: run.result[key] for key in ANATOMY if key in run.result}
    if (path := folder / "train.log").exists():
        run.log = path.read_text(encoding="utf-8", errors="replace")
    if (path := folder / "audit.json").exists():
        run.audit = check_audit(read_json(path), path)
    return run


def other_artifact(result: dict, path: Path) -> list[str]:
    """The files beside a result whose hashes are not those that it holds: a later run has replaced them, or somebody
    has changed them. Older results hold no hashes."""
    claimed = result.get("artifact_sha256", {})
    if not isinstance(claimed, dict):
        return [f"{path}: its artifact_sha256 is no table of hashes; it is damaged, run again"]
    return [
        f"{path}: is of another {name} than lies beside it; score what lies there (TTT_EVAL_ONLY=1), or run again"
        for name in ARTIFACT
        if name in claimed and (file := path.parent / name).exists() and sha256_file(file) != claimed[name]
    ]


def older_than_model(result: dict, path: Path) -> list[str]:
    """A result without hashes speaks of the model.bin that was there when it was written; a newer one is another's."""
    model = path.parent / "model.bin"
    if "artifact_sha256" in result or not model.exists():
        return []
    behind = model.stat().st_mtime - path.stat().st_mtime
    return [f"{path}: stale, model.bin is {behind:.0f} s newer"] if behind > COPY_SECONDS else []


def check_anatomy(found: dict, path: Path) -> dict:
    """An anatomy is of the ledger whose hash it holds; beside another one it is left aside, to be made again."""
    ledger = path.parent / "ledger.npy"
    stale = ledger.exists() and sha256_file(ledger) != found.get("ledger_sha256")
    return {} if stale else {key: found[key] for key in ANATOMY if key in found}


def check_audit(audit: dict, path: Path) -> dict:
    """An audit speaks for the files whose hashes it holds; beside other files it is refused."""
    files, tables = audit.get("artifact", {}), (audit.get("verdicts"), audit.get("checks"))
    sound = all(isinstance(table, dict) and table for table in tables) and isinstance(files, dict)
    for table, words in zip(tables, ("reason", "evidence")) if sound else ():
        sound &= all(
            isinstance(row, dict) and row.get("verdict") in VERDICTS and isinstance(row.get(words), str)
            for row in table.values()
        )
    if not sound or not all(isinstance(file, dict) for file in files.values()):
        raise ReportError(f"{path}: holds no checks and verdicts; run tools/audit.py again")
    for name in ARTIFACT:
        file, claimed = path.parent / name, files.get(name, {}).get("sha256")
        if file.exists() and hashlib.sha256(file.read_bytes()).hexdigest() != claimed:
            raise ReportError(f"{path}: is the audit of another {name}; run tools/audit.py on this folder")
    return audit


def budget_parts(seconds: dict[str, float], budget: str) -> list[tuple[str, float]]:
    """The phases of one budget, in the order they ran; what they leave unexplained is `other`."""
    inside = {name: value for name, value in seconds.items() if name not in ("train", "eval", *OUTSIDE_PHASES)}
    parts = [(name, value) for name, value in inside.items() if (name in TRAIN_PHASES) == (budget == "train")]
    rest = seconds.get(budget, 0.0) - sum(value for _, value in parts)
    return parts + [("other", rest)] if rest > 0.05 else parts


def bits_by_tensor(run: Run) -> dict[str, dict]:
    """Kind of matrix -> coded bits (its steps and corrections included) and weights, from model.bin; the bits add up to
    the file. Kept as bits.json, bound to the file's hash.

    Empty where there is no model.bin that this train_gpt.py reads.
    """
    model, kept = run.folder / "model.bin", run.folder / "bits.json"
    if not model.exists():
        return {}
    sha256 = hashlib.sha256(model.read_bytes()).hexdigest()
    if kept.exists() and (found := read_json(kept)).get("sha256") == sha256 and found.get("whole"):
        return found["bits"]
    try:
        bits = measured_bits(model)
    except Exception:  # another version's file: its own script reads it, this one shows no plot of it
        return {}
    write_file(kept, json.dumps({"sha256": sha256, "whole": True, "bits": bits}, indent=1).encode())
    return bits


def measured_bits(model: Path) -> dict[str, dict]:
    """Each kind's stacks are coded once more, by themselves. In the file they share what is known of correlations and
    are a little shorter, so their shares are scaled to what the file has for all of them."""
    import numpy as np

    import train_gpt

    head, code, rest = train_gpt.read_artifact(model)
    arrays, alone, weights = train_gpt.load_artifact(model)[0], {}, {}
    for _, _, members, centres in head["coded"]:
        kind = members[0].split(".")[0]
        stack = np.stack(
            [train_gpt.as_matrix(arrays[name].astype(np.int64) - centre) for name, centre in zip(members, centres)]
        )
        # What would ride along for nothing is not charged.
        own, ridden = train_gpt.encode_stacks([stack], bytes(1 << 20))
        alone[kind] = alone.get(kind, 0) + len(own) - ridden
        weights[kind] = weights.get(kind, 0) + sum(arrays[name].size for name in members if name.endswith(".symbols"))
    coded = len(code) - head["ridden"]
    scale = 8.0 * coded / sum(alone.values()) if alone else 0.0
    bits = {kind: {"bits": scale * size, "weights": weights[kind]} for kind, size in alone.items()}
    uncoded = len(rest) + head["ridden"]  # of which some rides in the code
    names_and_settings = model.stat().st_size - len(code) - len(rest)
    return bits | {
        "stored as they are": {"bits": 8.0 * uncoded, "weights": 0},
        "names, settings": {"bits": 8.0 * names_and_settings, "weights": 0},
    }
