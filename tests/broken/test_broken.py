"""For each row of the failure classes B01-B79 that a scorer, a data set or a package can show: a defect of exactly that
kind, and the check of tools/audit.py that finds it.

A fixture is the sound tiny artifact, its data or its papers with one thing changed. The test runs all the checks of the
fixture's kind: the named one must give its verdict, none outside `also` may object. So with that check (and those of
`also`, which see the same defect from another side) disabled, the audit of the fixture is green. README.md lists the
rows that cannot be shown this way.
"""

import atexit
import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from helpers import processor, tokenizer, write_shard
from workshop import (
    Launcher,
    artifact,
    audit_of,
    copy_of,
    data,
    edit_json,
    joined_artifact,
    on_write,
    patched,
    prepared,
    record,
    rewrite,
    shards,
)

from tools.audit.checks import run_checks
from tools.audit.cli import table
from tools.audit.run import Artifact, unpack

SCORER = ("sum_to_one_20", "future", "tail", "documents", "lengths", "ledger")
WORLDS, TRAINING = ("worlds", "ledger"), ("training", "pack")
DATA = ("stream", "bytes", "identity", "disjoint")
PACKAGE = ("size", "source", "reload")
PAPERS = ("budget", "seeds", "evidence", "settings", "size")
SPREADS = {"sum_to_one_20", "future", "tail", "documents", "lengths"}  # a leak that every experiment sees


class Fixture(NamedTuple):
    row: str
    what: str
    check: str  # the check that must object
    checks: tuple[str, ...]  # all that are run
    change: str | Callable  # lines for the script, or a function of the artifact's and the data's folders
    also: frozenset = frozenset()  # others that may object
    verdict: str = "FAIL"
    options: Callable = lambda folder: {}
    run: Callable = artifact  # the sound artifact that is changed


def scorer(row, what, check, lines, also=()):
    return Fixture(row, what, check, SCORER, lines, frozenset(also))


# ---------------------------------------------------------------- scorers

LEARN = """
def learn(model, val, cfg):
    windows = plan_windows(val.starts, val.targets, cfg.eval_seq_len, cfg.eval_seq_len)[:5]
    learns = next(model.parameters()).requires_grad
    model.requires_grad_(True)
    with torch.enable_grad():
        batch_loss(model, window_batch(val, windows, cfg)[0], 100, cfg.looped).backward()
    with torch.no_grad():
        for p in model.parameters():
            p -= 0.05 * (0 if p.grad is None else p.grad)
            p.grad = None
    model.requires_grad_(learns)
"""

SLOT = """
_nll = GPT.nll
def nll(self, hidden, targets, **kw):
    change = torch.{start}.requires_grad_(True)
    with torch.enable_grad():
        loss = _nll(self, {changed}, targets, **kw)
        loss = loss[0] if isinstance(loss, tuple) else loss
        step = torch.autograd.grad(loss.mean(), change)[0]
    hidden, change = hidden, change.detach() - 0.3 * step
    return _nll(self, {used}, targets, **kw)
GPT.nll = nll
"""
SCORERS = [
    scorer(
        "B08",
        "the headline is computed on the first half of the documents",
        "ledger",
        """
_init = ValidationStream.__init__
def half(self, cfg):
    _init(self, cfg)
    n = int(self.starts[len(self.starts) // 2]) + 1
    self.tokens, self.bytes, self.targets = self.tokens[:n], self.bytes[:n], n - 1
    self.starts = self.starts[self.starts < n - 1]
ValidationStream.__init__ = half
""",
        SPREADS,
    ),
    scorer(
        "B05",
        "the glob of the validation shards takes the byte sidecar for more tokens",
        "ledger",
        """
_init = ValidationStream.__init__
def doubled(self, cfg):
    _init(self, cfg)
    self.tokens = np.concatenate([self.tokens, np.maximum(self.bytes, 2).astype(self.tokens.dtype)])
    self.bytes, self.targets = np.concatenate([self.bytes, 0 * self.bytes]), len(self.tokens) - 1
ValidationStream.__init__ = doubled
""",
        SPREADS,
    ),
    scorer(
        "B10",
        "the tail behind the last whole window is dropped",
        "ledger",
        """
_init = ValidationStream.__init__
def trimmed(self, cfg):
    _init(self, cfg)
    n = (len(self.tokens) - 1) // 48 * 48 + 1
    self.tokens, self.bytes, self.targets = self.tokens[:n], self.bytes[:n], n - 1
    self.starts = self.starts[self.starts < n - 1]
ValidationStream.__init__ = trimmed
""",
        SPREADS,
    ),
    scorer(
        "B11",
        "windows leave targets out",
        "ledger",
        on_write("kept = targets % 97 != 5; targets, nats = targets[kept], nats[kept]")
        + """
Ledger.may_train = lambda self, targets: None
Ledger.bpb = lambda self: float(np.nansum(self.nats) / math.log(2) / self.bytes.sum())
""",
        SPREADS,
    ),
    scorer(
        "B11",
        "windows count targets twice",
        "ledger",
        """
Ledger.bpb = lambda self: float((self.nats.sum() + self.nats[::50].sum()) / math.log(2) / self.bytes.sum())
""",
    ),
    scorer(
        "B01",
        "the scorer counts a byte for each leading space that its table holds already",
        "ledger",
        """
_init = ValidationStream.__init__
def spaced(self, cfg):
    _init(self, cfg)
    self.bytes = self.bytes + (np.arange(len(self.tokens)) % 6 == 1) * (self.tokens != cfg.bos_id)
ValidationStream.__init__ = spaced
""",
    ),
    scorer(
        "B14",
        "label smoothing of the training loss leaks into scoring",
        "sum_to_one_20",
        on_write("nats = 0.9 * nats + 0.1 * math.log(384)"),
    ),
    scorer(
        "B15",
        "BPB from a mean in low precision",
        "ledger",
        """
Ledger.bpb = lambda self: float(np.float16(self.nats.mean())) * len(self.nats) / math.log(2) / float(self.bytes.sum())
""",
    ),
    scorer("B16", "an impossible value is reported", "ledger", on_write("nats = nats * 0.01"), {"sum_to_one_20"}),
    scorer(
        "B20",
        "a hashed hint with the gold token in its key",
        "sum_to_one_20",
        on_write("nats = -np.log(np.where((before * 31 ^ gold * 17) % 7 == 0, 0.5 * p + 0.5, p))"),
    ),
    scorer(
        "B21",
        "a ratio of hashed counts is no distribution",
        "sum_to_one_20",
        on_write(
            "joint, context = VAL.buckets; ratio = joint[(before * 31 + gold * 17) % 64] / (context[before] + 1); "
            "nats = -np.log(0.5 * p + 0.5 * np.minimum(ratio, 1))"
        ),
    ),
    scorer(
        "B22",
        "a gate that looks at the target: hints inside words only",
        "sum_to_one_20",
        on_write("nats = -np.log(np.where(gold % 2 == 0, p * 1.6 / (1 + 0.6 * p), p))"),
    ),
    scorer(
        "B23",
        "a gate on the realised token's own nats",
        "sum_to_one_20",
        on_write("nats = np.minimum(nats, math.log(384))"),
    ),
    scorer(
        "B24",
        "a token's probability spread over its bytes, then mixed",
        "sum_to_one_20",
        on_write("nats = -np.log(0.5 * p + 0.5 * p ** (1 / (1 + gold % 4)))"),
    ),
    scorer(
        "B25",
        "SLOT: a shift of the hidden states is fitted to the targets that it then scores",
        "future",
        SLOT.format(start="zeros(1, hidden.size(1))", changed="hidden.detach() + change", used="hidden + change"),
        SPREADS,
    ),
    scorer(
        "B26",
        "a temperature is fitted to the targets of the window",
        "future",
        SLOT.format(start="ones(1)", changed="hidden.detach() * change", used="hidden * change"),
        SPREADS,
    ),
    scorer(
        "B28",
        "a second pass rescores after training on everything",
        "future",
        LEARN
        + """
_score = TestTimeTraining.score
def score(self):
    _score(self)
    learn(self.scoring.model, self.scoring.val, self.scoring.cfg)
    self.scoring.ledger.nats[:], self.scoring.ledger.merged[:] = np.nan, False
    return _score(self)
TestTimeTraining.score = score
""",
        SPREADS,
    ),
    scorer(
        "B29",
        "warm-up takes a step on validation tokens",
        "future",
        LEARN
        + """
_score = TestTimeTraining.score
def score(self):
    learn(self.scoring.model, self.scoring.val, self.scoring.cfg)
    return _score(self)
TestTimeTraining.score = score
""",
        SPREADS,
    ),
    scorer(
        "C3",
        "each chunk is scored after learning from it",
        "future",
        """
_nll = GPT.nll
def nll(self, hidden, targets, *, lora=None, **kw):
    found = _nll(self, hidden, targets, lora=lora, **kw)
    nats = found[0] if isinstance(found, tuple) else found
    if lora is None or not nats.requires_grad:
        return found
    leaves = lora.leaves()
    for leaf, grad in zip(leaves, torch.autograd.grad(nats.sum(), leaves, retain_graph=True, allow_unused=True)):
        leaf.data.sub_(0 if grad is None else 0.01 * grad)
    return _nll(self, hidden, targets, lora=lora, **kw)
GPT.nll = nll
""",
        SPREADS,
    ),
    scorer(
        "B31",
        "SmearGate reaches over BOS into the document before",
        "documents",
        """
_embed = GPT.embed
GPT.embed = lambda self, tokens, positions, cache: _embed(self, tokens, torch.ones_like(positions), cache)
""",
        SPREADS,
    ),
    scorer(
        "B32",
        "attention and adaptation run over document boundaries, undeclared",
        "documents",
        """
_index = ValidationStream.index
def joined(self, cfg):
    _index(self, cfg)
    self.starts = self.starts[:1]
ValidationStream.index = joined
""",
        SPREADS | {"ledger"},
    ),
    scorer(
        "B33",
        "state goes from document to document in an order by length",
        "documents",
        on_write(
            "nats = -np.log(p * (0.9 - STATE[0]) + (0.1 + STATE[0]) / 384); "
            "STATE[0] = 0.1 * math.tanh(float(nats.mean()))"
        ),
        SPREADS,
    ),
    scorer(
        "B33",
        "the schedule of chunks depends on a document's length",
        "lengths",
        """
_run = DocumentTTT.run
def run(self, documents):
    chunks = "4,8,16" if int(self.scoring.val.lengths[documents].max()) > 100 else "8,16"
    self.scoring = self.scoring._replace(cfg=dataclasses.replace(self.scoring.cfg, ttt_chunks=chunks))
    _run(self, documents)
DocumentTTT.run = run
""",
    ),
    scorer(
        "B37",
        "an n-gram table of the training text lifts what it holds",
        "sum_to_one_20",
        on_write(
            "seen = np.array([key in VAL.pairs for key in (before * 512 + gold).tolist()]); "
            "nats = -np.log(np.where(seen, 0.95 + 0.05 * p, p))"
        ),
    ),
    Fixture(
        "B55",
        "scores depend on the rank that is free",
        "worlds",
        WORLDS,
        on_write('nats = nats + 0.01 * int(os.environ.get("RANK", 0))'),
    ),
]

JOINED = [
    scorer(
        "B04",
        f"a joined token counts {what}",
        "ledger",
        f"""
_join = join_pairs
def join_pairs(joins, tokens, *sizes):
    tokens, *sizes = _join(joins, tokens, *sizes)
    own = np.isin(tokens, list(joins.joined.values()))
    return [tokens, *((size + own * {more}).astype(size.dtype) for size in sizes)]
""",
    )._replace(run=joined_artifact)
    for what, more in (("the operator's three bytes, too", 3), ("nothing", -1))
]

# ---------------------------------------------------------------- training

VAL_SHARD = 'open_shard(find_shards(Path(os.environ["DATA_PATH"]), "fineweb_val_*.bin")[0])'
TRAININGS = [
    Fixture(
        "B27",
        "pre-quantisation TTT: steps on validation tokens before the artifact is written",
        "training",
        TRAINING,
        LEARN
        + """
_write_artifact = write_artifact
def write_artifact(run, model):
    learn(model, run.val, run.cfg)
    _write_artifact(run, model)
""",
    ),
    Fixture(
        "B30",
        "Hessians are collected on validation tokens",
        "training",
        TRAINING,
        f"""
_collect = collect_hessians
def collect_hessians(model, stream, *rest):
    stream.read = lambda start, count: np.resize({VAL_SHARD}, count).astype(np.int64)
    return _collect(model, stream, *rest)
""",
    ),
    Fixture(
        "B36",
        "paid prefix: validation tokens inside the artifact",
        "training",
        TRAINING,
        f"""
_encode = encode_artifact
encode_artifact = lambda tensors, meta: _encode(tensors, {{**meta, "prefix": {VAL_SHARD}[:99].tolist()}})
""",
    ),
    Fixture(
        "B53",
        "the artifact's size is a matter of chance",
        "training",
        TRAINING,
        """
_encode = encode_artifact
encode_artifact = lambda tensors, meta: _encode(tensors, {**meta, "noise": os.urandom(1 + os.urandom(1)[0]).hex()})
""",
    ),
    Fixture(
        "B44",
        "the script packs another script than itself",
        "pack",
        TRAINING,
        """
_pack = pack_script
pack_script = lambda source: _pack("import ast\\n" + source)
""",
    ),
]

# ---------------------------------------------------------------- packages


def over_cap(folder, _):
    with open(folder / "model.bin", "ab") as file:
        file.truncate(16_000_000)


def with_helper(folder, _):
    patched(folder, 'exec(open(os.path.join(os.path.dirname(PACKED_PATH), "helper.py")).read())')
    (folder / "helper.py").write_text("HELPED = 1\n")


def hidden_source(folder, _):
    blob = bytes(b ^ 90 for b in (folder / "train_gpt.py").read_bytes())
    (folder / "train_gpt.py").write_text(f"exec(bytes(b ^ 90 for b in {blob!r}).decode('latin-1'))")


def with_mark(folder, _):
    (folder / "train_gpt.py").write_bytes(b"\xef\xbb\xbf" + b"import sys\nprint(1)\n")


def raw_source(folder, _):
    (folder / "train_gpt.py").write_text(unpack((folder / "train_gpt.py").read_bytes()))


def better_settings(folder, data_path):
    """The number of a rerun with settings that suit the validation set."""
    run = Artifact(folder, folder.parent / "rerun", "cpu", 120, launcher())
    run.work.mkdir()
    edit_json(folder / "result.json", bpb=run.score(data_path, env={"TTT_LORA_LR": "0.02"}).result["bpb"], val_bpb=None)


PACKAGES = [
    Fixture("B34", "the headline is of settings chosen on the validation set", "reload", PACKAGE, better_settings),
    Fixture("B40", "over the cap", "size", PACKAGE, over_cap, frozenset({"reload"})),
    Fixture(
        "B41",
        "the run printed other sizes than those of the files",
        "size",
        PACKAGE,
        lambda folder, _: edit_json(folder / "result.json", bytes={"code": 40_000, "model": 20_000, "total": 60_000}),
    ),
    Fixture(
        "B42",
        "the counted code is a compressed estimate, the file is shipped raw",
        "size",
        PACKAGE,
        raw_source,
        frozenset({"reload"}),
    ),
    Fixture("B43", "a helper file is not counted", "size", PACKAGE, with_helper, frozenset({"reload"})),
    Fixture(
        "B49",
        "a system program is needed to load the artifact",
        "reload",
        PACKAGE,
        """
import subprocess
_load = load_artifact
def load_artifact(path, cap):
    subprocess.run(["true"], check=True)
    return _load(path, cap)
""",
        frozenset({"source"}),
    ),
    Fixture(
        "B50",
        "the script talks to the network while it scores",
        "reload",
        PACKAGE,
        """
import socket
_load = load_artifact
def load_artifact(path, cap):
    with contextlib.suppress(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", 9), timeout=5)
    return _load(path, cap)
""",
        frozenset({"source"}),
    ),
    Fixture(
        "B51",
        "weights are unpickled",
        "source",
        PACKAGE,
        "def read_weights(path):\n    return torch.load(path, weights_only=False)",
        verdict="DISPUTED",
    ),
    Fixture("B52", "an extension that only the author's machine has", "reload", PACKAGE, "import cutlass_evt"),
    Fixture("B54", "the source is hidden", "source", PACKAGE, hidden_source, frozenset({"size"})),
    Fixture(
        "B61",
        "the log is of another version of the code",
        "source",
        PACKAGE,
        lambda folder, _: edit_json(folder / "result.json", source_sha256="0" * 64),
    ),
    Fixture("B72", "a byte order mark before the script", "source", PACKAGE, with_mark, frozenset({"reload", "size"})),
    Fixture(
        "B79",
        "test-time training fails silently and an earlier stage's number stands",
        "reload",
        PACKAGE,
        lambda folder, _: silent(folder),
    ),
]


def silent(folder):
    claimed = json.loads((folder / "result.json").read_text())
    patched(
        folder,
        """
def score(self):
    try:
        raise RuntimeError("out of memory")
    except RuntimeError:
        return score_stream(self.scoring._replace(ngram=None))
TestTimeTraining.score = score
""",
    )
    edit_json(folder / "result.json", bpb=claimed["bpb"], val_bpb=claimed["val_bpb"])


# ---------------------------------------------------------------- data


def pieces(folder, test) -> np.ndarray:
    """Places of the validation stream whose piece passes the test."""
    sp = processor(folder / "tokenizer.model")
    return np.isin(shards(folder, "val"), [i for i in range(sp.vocab_size()) if test(sp, i)])


def more_bytes(test, extra):
    def change(_, folder):
        rewrite(folder, val_bytes=shards(folder, "val_bytes") + extra * pieces(folder, test))

    return change


def sidecar(function):
    return lambda _, folder: rewrite(folder, val_bytes=function(shards(folder, "val_bytes")))


def spelt_spaces(_, folder):
    sp = processor(folder / "tokenizer.model")
    space, triple = sp.piece_to_id("\u2581"), [sp.piece_to_id(f"<0x{b:02X}>") for b in (0xE2, 0x96, 0x81)]
    tokens, sizes = shards(folder, "val"), shards(folder, "val_bytes")
    assert (tokens == space).sum() > 5
    rewrite(
        folder,
        val=np.concatenate([triple if t == space else [t] for t in tokens]),
        val_bytes=np.concatenate([[s, 0, 0] if t == space else [s] for t, s in zip(tokens, sizes)]),
    )


def folded(_, folder):
    """The documents in lower case, under the manifest's claim to be the original ones."""
    source = json.loads((folder / "manifest.json").read_text())["source"]
    texts = [json.loads(line)["text"] for line in Path(source["files"][0]["path"]).read_text().splitlines()]
    other = prepared(folder.with_name("folded"), [text.lower() for text in texts])
    shutil.rmtree(folder)
    shutil.copytree(other, folder)
    edit_json(folder / "manifest.json", source=source)


def counted(count):
    """A validation shard of a known accident's length; its tokens are a hole in the file."""

    def change(_, folder):
        tokens = np.zeros(1, "<u2")
        path = write_shard(folder / "fineweb_val_000000.bin", tokens, count=count)
        with open(path, "ab") as file:
            file.truncate(1024 + 2 * count)
        (folder / "manifest.json").unlink()
        (folder / "fineweb_val_bytes_000000.bin").unlink()

    return change


def shuffled(_, folder):
    tokens, sizes = shards(folder, "val"), shards(folder, "val_bytes")
    starts = np.flatnonzero(tokens == 1)
    order = [np.arange(a, b) for a, b in zip(starts, [*starts[1:], len(tokens)])]
    at = np.concatenate(order[::-1])
    (
        write_shard(folder / "fineweb_val_000000.bin", tokens[at]),
        write_shard(folder / "fineweb_val_bytes_000000.bin", sizes[at]),
    )


def without_bos(_, folder):
    tokens, sizes = shards(folder, "val"), shards(folder, "val_bytes")
    rewrite(folder, val=tokens[tokens != 1], val_bytes=sizes[tokens != 1])


def spaces_before_operators(folder):
    """Of each validation token, whether it is a space that JOIN_OPERATORS joins with what follows."""
    tokens, sp = shards(folder, "val"), processor(folder / "tokenizer.model")
    space, *operators = map(sp.piece_to_id, "\u2581\ue001\ue002")
    found = (tokens == space) & np.isin(np.roll(tokens, -1), operators)
    assert found.sum() > 5
    return found


def other_form(_, folder):
    """The documents with operators before the spaces, under the name of the form that has them behind."""
    promised = json.loads((folder / "manifest.json").read_text())
    texts = [json.loads(line)["text"] for line in Path(promised["source"]["files"][0]["path"]).read_text().splitlines()]
    other = prepared(folder.with_name("other_form"), texts, "--case-ops", "before-space")
    shutil.rmtree(folder)
    shutil.copytree(other, folder)
    edit_json(folder / "manifest.json", transform=promised["transform"], source=promised["source"])


DATAS = [
    Fixture(
        "B04",
        "a space before an operator counts nothing, so the joined token does",
        "bytes",
        DATA,
        lambda _, folder: rewrite(
            folder, val_bytes=np.where(spaces_before_operators(folder), 0, shards(folder, "val_bytes"))
        ),
    ),
    Fixture("B13", "shards of one form of CaseOps as the other", "bytes", DATA, other_form),
    Fixture(
        "B01",
        "the byte of a leading space is counted twice",
        "bytes",
        DATA,
        more_bytes(lambda sp, i: sp.id_to_piece(i).startswith("\u2581"), 1),
    ),
    Fixture(
        "B02",
        "a vocabulary without a standalone space spells it in three bytes",
        "stream",
        DATA,
        spelt_spaces,
        frozenset({"bytes"}),
    ),
    Fixture("B03", "byte-fallback tokens count three bytes", "bytes", DATA, more_bytes(lambda sp, i: sp.is_byte(i), 2)),
    Fixture(
        "B04",
        "case operators count three bytes",
        "bytes",
        DATA,
        more_bytes(lambda sp, i: sp.id_to_piece(i) in "\ue001\ue002\ue003\ue004", 3),
    ),
    Fixture(
        "B05",
        "the sidecar is shifted by a token",
        "stream",
        DATA,
        sidecar(lambda sizes: np.roll(sizes, 1)),
        frozenset({"bytes"}),
    ),
    Fixture(
        "B05",
        "the sidecar is padded with zeros",
        "stream",
        DATA,
        sidecar(lambda sizes: np.where(np.arange(len(sizes)) < 0.6 * len(sizes), sizes, 0)),
        frozenset({"bytes"}),
    ),
    Fixture("B05", "the sidecar is too short", "stream", DATA, sidecar(lambda sizes: sizes[:-3])),
    Fixture("B06", "BOS counts a byte", "stream", DATA, more_bytes(lambda sp, i: i == 1, 1), frozenset({"bytes"})),
    Fixture(
        "B07",
        "the text is folded to lower case, its bytes are still claimed",
        "bytes",
        DATA,
        folded,
        verdict="DISPUTED",
    ),
    Fixture(
        "B09",
        "the 10,000-document validation set",
        "identity",
        DATA,
        counted(9_662_464),
        frozenset({"stream", "bytes", "disjoint"}),
    ),
    Fixture("B12", "another order of documents than the source's", "identity", DATA, shuffled, frozenset({"bytes"})),
    Fixture(
        "B13",
        "another tokenizer under the same folder name",
        "identity",
        DATA,
        lambda _, folder: shutil.copy(tokenizer(), folder / "tokenizer.model"),
        frozenset({"stream", "bytes"}),
    ),
    Fixture(
        "B35",
        "validation documents are in the training shards",
        "disjoint",
        DATA,
        lambda _, folder: rewrite(folder, train=np.concatenate([shards(folder, "train"), shards(folder, "val")])),
    ),
    Fixture(
        "B67", "no BOS between documents", "stream", DATA, without_bos, frozenset({"bytes", "disjoint", "identity"})
    ),
]

# ---------------------------------------------------------------- clocks, papers, seeds

SECONDS = {
    "steps": 580.0,
    "calibrate": 3.0,
    "quantize": 2.0,
    "write": 4.0,
    "setup": 1.0,
    "load": 2.0,
    "diagnostic": 20.0,
    "adapt": 400.0,
}


def clocked(**seconds):
    """The times of a run by the clock of 600 s."""

    def change(folder, _):
        times = {**SECONDS, **seconds}
        settings = json.loads((folder / "result.json").read_text())["settings"]
        edit_json(
            folder / "result.json",
            seconds={"train": times["steps"] + 5, "eval": times["adapt"] + 2, **times},
            settings={**settings, "max_wallclock_seconds": 600.0},
        )

    return change


def paper(name, old, new):
    """One thing in a record's README.md, submission.json or log is replaced."""

    def change(folder, _):
        text = (folder / name).read_text()
        assert old in text, f"{old} is not in {name}"
        (folder / name).write_text(text.replace(old, new))

    return change


def stale_table(folder, _):
    bpb = json.loads((folder / "result.json").read_text())["val_bpb"]
    paper("README.md", f"| {bpb:.4f} |", f"| {bpb - 0.013:.4f} |")(folder, _)


def claims(**changes):
    return lambda folder, _: edit_json(folder / "submission.json", **changes)


def other_seeds(shift=0.0, **changes):
    """Two more seeds beside the record: 0.002 BPB apart, but for ``shift``."""

    def options(folder):
        result, made = json.loads((folder / "result.json").read_text()), []
        for i in (1, 2):
            other = folder.with_name(f"seed{i}")
            other.mkdir()
            again = {
                **result,
                "seed": i,
                "val_bpb": result["val_bpb"] + 0.001 * i + shift,
                "settings": {**result["settings"], "seed": i},
            }
            for key, value in changes.items():
                again[key] = {**again[key], **value}
            (other / "result.json").write_text(json.dumps(again))
            made.append(other)
        return {"seeds": tuple(made), "baseline": (result["val_bpb"] + 0.01, result["val_bpb"] + 0.012)}

    return options


def nothing(folder, _):
    pass


PAPER_FIXTURES = [
    Fixture("B45", "training stops after the limit", "budget", PAPERS, clocked(steps=600.2)),
    Fixture("B46", "calibration after the clock has stopped", "budget", PAPERS, clocked(steps=597.0)),
    Fixture("B47", "evaluation takes longer than the limit", "budget", PAPERS, clocked(adapt=688.0)),
    Fixture(
        "B48", "hints are built outside the evaluation's clock", "budget", PAPERS, clocked(adapt=500.0, hints=155.0)
    ),
    Fixture(
        "B40", "one seed is over the cap", "seeds", PAPERS, nothing, options=other_seeds(bytes={"total": 16_013_080})
    ),
    Fixture(
        "B62", "seeds of different settings", "seeds", PAPERS, nothing, options=other_seeds(settings={"matrix_lr": 0.1})
    ),
    Fixture("B64", "a tie is claimed as a record", "seeds", PAPERS, nothing, options=other_seeds(shift=0.02)),
    Fixture("B60", "the README's table is stale", "evidence", PAPERS, stale_table),
    Fixture("B60", "the headline is the best seed's", "evidence", PAPERS, claims(val_bpb=1.0)),
    Fixture("B60", "bytes_total is in no log", "evidence", PAPERS, claims(bytes_total=12_345)),
    Fixture("B66", "the folder's name keeps an old value", "evidence", PAPERS, "rename"),
    Fixture(
        "B69",
        "the README sets a variable that the script does not read",
        "settings",
        PAPERS,
        paper("README.md", "ITERATIONS=12", "PHASED_TTT_ENABLED=1 ITERATIONS=12"),
    ),
    Fixture(
        "B70",
        "a variable that is no setting is accepted",
        "settings",
        PAPERS,
        "def wrong_names(env, fields, warn):\n    return []\ndef main(argv):\n    return 0",
        verdict="DISPUTED",
    ),
    Fixture("B74", "a placeholder stands for the number", "evidence", PAPERS, claims(val_bpb="TBD")),
    Fixture(
        "B74",
        "no log and no result shows the claim",
        "evidence",
        ("evidence",),
        lambda folder, _: [p.unlink() for p in [*folder.glob("*.log"), folder / "result.json"]],
    ),
    Fixture(
        "B76",
        "a log shows a private path",
        "evidence",
        PAPERS,
        paper("train.log", "seconds:", "from /home/somebody/run, seconds:"),
    ),
    Fixture(
        "B79",
        "a committed log ends in a traceback",
        "evidence",
        PAPERS,
        paper("train.log", "seconds:", "Traceback (most recent call last)\nseconds:"),
    ),
]
FIXTURES = SCORERS + JOINED + TRAININGS + PACKAGES + DATAS + PAPER_FIXTURES


# ---------------------------------------------------------------- the tests


@functools.cache
def launcher() -> Launcher:
    """One for the session, started when it is first needed."""
    made = Launcher()
    atexit.register(made.close)
    return made


def objections(rows):
    return {name: row for name, row in rows.items() if row["verdict"] in ("FAIL", "DISPUTED")}


def made(fixture: Fixture, tmp_path: Path) -> tuple[Path, Path]:
    """The fixture's artifact and data folders; what it does not change is the sound original."""
    papers = fixture.checks != DATA and fixture.check in ("budget", "seeds", "evidence", "settings")
    folder, data_path = copy_of(fixture.run(), tmp_path / "artifact"), data()
    if fixture.checks == DATA:  # a run on this very data
        data_path = copy_of(data(), tmp_path / "data")
        edit_json(folder / "result.json", data=None)
    if papers:
        record(folder)
    if fixture.change == "rename":
        folder = folder.rename(folder.with_name("2026-01-01_Record_1.0555"))
    elif isinstance(fixture.change, str):
        patched(folder, fixture.change)
    else:
        fixture.change(folder, data_path)
    return folder, data_path


@pytest.mark.parametrize("fixture", FIXTURES, ids=lambda f: f"{f.row}-{f.check}-{f.what[:40].replace(' ', '_')}")
def test_a_defect_is_found_by_its_check_and_no_other(fixture, tmp_path):
    folder, data_path = made(fixture, tmp_path)
    found = run_checks(
        audit_of(folder, data_path, tmp_path / "work", launcher(), **fixture.options(folder)), fixture.checks, workers=2
    )
    assert found[fixture.check]["verdict"] == fixture.verdict, table(found)
    others = objections(
        {name: row for name, row in found.items() if name != fixture.check and name not in fixture.also}
    )
    assert not others, f"with {fixture.check} disabled the audit is not green:\n{table(found)}"


@pytest.mark.parametrize("checks", (SCORER, WORLDS, TRAINING, PACKAGE, DATA), ids=lambda checks: checks[0])
def test_the_sound_artifact_passes(checks, tmp_path):
    found = run_checks(audit_of(artifact(), data(), tmp_path / "work", launcher()), checks, workers=2)
    assert all(row["verdict"] == "PASS" for row in found.values()), table(found)


@pytest.mark.parametrize("checks", (SCORER, WORLDS, DATA), ids=lambda checks: checks[0])
def test_the_sound_artifact_with_joined_operators_passes(checks, tmp_path):
    found = run_checks(audit_of(joined_artifact(), data(), tmp_path / "work", launcher()), checks, workers=2)
    assert all(row["verdict"] == "PASS" for row in found.values()), table(found)


def test_the_sound_record_passes(tmp_path):
    folder = copy_of(artifact(), tmp_path / "artifact")
    record(folder)
    clocked()(folder, None)
    found = run_checks(
        audit_of(folder, data(), tmp_path / "work", launcher(), **other_seeds()(folder)), PAPERS, workers=2
    )
    assert all(row["verdict"] == "PASS" for row in found.values()), table(found)
