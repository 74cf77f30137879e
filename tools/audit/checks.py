"""The list of all checks, the conditions that rest on them, and how they are run."""

import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from tools.audit import causality, data, package, papers
from tools.audit.outcome import Broken, NotRun
from tools.audit.shared import Audit
from tools.runs import shown
from tools.verdicts import FAIL, NOT_RUN, worst

# In the order of the table. A check returns a verdict and what it rests on; its docstring says what it does.
CHECKS: dict[str, Callable[[Audit], tuple[str, str]]] = {
    **{f"sum_to_one_{length}": partial(causality.sum_to_one, length=length) for length in causality.PREFIXES},
    "future": causality.future,
    "tail": causality.tail,
    "documents": causality.documents,
    "lengths": causality.lengths,
    "ledger": causality.ledger,
    "worlds": causality.worlds,
    "training": package.training,
    "pack": package.pack,
    "reload": package.reload,
    "size": package.size,
    "source": package.source,
    "settings": package.settings,
    "stream": data.stream,
    "bytes": data.bytes_,
    "identity": data.identity,
    "disjoint": data.disjoint,
    "budget": papers.budget,
    "seeds": papers.seeds,
    "evidence": papers.evidence,
}
CONDITIONS = {
    "C1": ("sum_to_one", "future", "tail", "documents", "lengths"),
    "C2": ("sum_to_one",),
    "C3": ("future", "tail", "training"),
    "C4": ("ledger", "worlds", "reload"),
    "bytes": ("size",),
    "train_budget": ("budget",),
    "eval_budget": ("budget",),
    "packaging": ("reload", "pack", "source", "settings"),
    "data": ("stream", "bytes", "identity", "disjoint"),
}


def run_check(a: Audit, name: str) -> dict:
    begun = time.perf_counter()
    try:
        verdict, said = CHECKS[name](a)
    except NotRun as reason:
        verdict, said = NOT_RUN, str(reason)
    except Broken as reason:
        verdict, said = FAIL, str(reason)
    except Exception as error:  # a stranger's file may be anything: the audit goes on
        verdict, said = FAIL, f"the check could not be done: {type(error).__name__}: {error}"
    return {"verdict": verdict, "evidence": shown(said), "seconds": round(time.perf_counter() - begun, 1)}


def condition_verdicts(found: dict[str, dict]) -> dict[str, dict]:
    """The conditions of result.json: the worst verdict of the checks that each rests on."""
    verdicts = {}
    for condition, names in CONDITIONS.items():
        rows = [(name, row) for name, row in found.items() if name.startswith(names)]
        if rows:
            name, row = worst(rows, lambda entry: entry[1]["verdict"])
            verdicts[condition] = {"verdict": row["verdict"], "reason": f"{name}: {row['evidence']}"}
    return verdicts


def run_checks(a: Audit, names: list[str], say: Callable = lambda line: None, workers: int = 1) -> dict[str, dict]:
    """Every named check, in parallel; results in the order of the names."""
    begun = time.perf_counter()

    def one(name):
        row = run_check(a, name)
        say(f"[{time.perf_counter() - begun:5.0f} s] {name}: {row['verdict']} ({row['seconds']:.0f} s)")
        return row

    # The longest first, so that none is left over alone.
    costly = sorted(
        names, key=lambda name: -int(re.sub(r"\D", "", name) or (2 if name in ("reload", "worlds", "training") else 0))
    )
    with ThreadPoolExecutor(workers) as pool:
        rows = dict(zip(costly, pool.map(one, costly)))
    return {name: rows[name] for name in names}
