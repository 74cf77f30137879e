"""Files that somebody else made: what no decoder may trust ends in one line, before it costs memory."""

import copy
import functools
import hashlib
import json
import lzma
import math
import multiprocessing
import os
import random
import resource
import shutil
import struct
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import RUN, base_run, config, environment, gpt, main, own_data, ranks, result, tokenizer

import train_gpt
from tools import runs
from train_gpt import MATRICES, UserError

EVERYTHING = dict(rate_distortion=False, lqer_enabled=True, lqer_rank=2, gated_attn_quant_gate=True)
TOKENIZER = "0" * 64


@functools.cache
def tiny() -> bytes:
    """A model.bin with a part of every kind, of random weights."""
    cfg = train_gpt.Config.from_env(environment({**RUN, **EVERYTHING}))
    model = gpt(cfg)
    hessians = {}
    for name, kind in MATRICES.items():
        w = getattr(model, name)
        hessians[kind.hessian] = torch.eye(w.size(-1)).expand(w[None].shape[-3] if w.ndim == 2 else len(w), -1, -1)
    quantized = train_gpt.Quantizer(model, hessians, cfg, ranks(cfg)).quantize()
    quantized = quantized._replace(logit_calibration=np.zeros(15, np.float32))
    meta = {"settings": cfg.settings(), "tokenizer_sha256": TOKENIZER}
    return train_gpt.encode_artifact(train_gpt.flatten(quantized), meta)


class Parts:
    """A model file taken apart: the header, the stacks' own header, and bytes."""

    def __init__(self, data: bytes):
        fixed = train_gpt.FIXED
        _, _, _, header, code = fixed.unpack_from(data)
        body = data[fixed.size : -4]
        self.header = json.loads(zlib.decompress(body[:header]))
        code, self.rest = body[header : header + code], body[header + code :]
        side, *self.sizes = struct.unpack("<4I", code[:16])
        self.stacks = json.loads(zlib.decompress(code[16 : 16 + side]))
        self.tail = code[16 + side :]

    def join(self, header: bytes | None = None, side: bytes | None = None) -> bytes:
        """The file again, its lengths and checksum right; `header` and `side` stand for the compressed JSON."""
        side = side or zlib.compress(json.dumps(self.stacks).encode())
        code = struct.pack("<4I", len(side), *self.sizes) + side + self.tail
        header = header or zlib.compress(json.dumps(self.header).encode())
        body = header + code + self.rest
        total = train_gpt.FIXED.size + len(body) + 4
        out = train_gpt.FIXED.pack(train_gpt.MAGIC, train_gpt.VERSION, total, len(header), len(code)) + body
        return out + struct.pack("<I", zlib.crc32(out))


def prepared_run(settings: dict, folder: Path) -> train_gpt.Run:
    """A run as it is once its data is read."""
    run = train_gpt.Run(train_gpt.configure(environment(settings, folder)))
    run.attention_backend = "reference"
    run.result["data"] = {"tokenizer_sha256": TOKENIZER}
    return run


def load(folder: Path):
    """As TTT_EVAL_ONLY=1 does it, up to the model on the device."""
    return train_gpt.load_quantized(prepared_run({"ttt_eval_only": True}, folder))[0]


def refused(folder: Path, content: bytes) -> str:
    """The one line about a model.bin of that content, or nothing where it loads."""
    (folder / "model.bin").write_bytes(content)
    try:
        load(folder)
    except UserError as error:
        line = str(error)
        assert line.isprintable() and len(line) < 900, line
        assert "allocate" not in line, line  # the size was noticed by the machine, not by the loader
        return line
    return ""


@pytest.fixture
def little_memory():
    """3 GiB beside what the process has: an array of a size that only the file claims ends in "allocate"."""
    if not Path("/proc/self/statm").exists():
        pytest.skip("needs /proc")
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (3 << 30), hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


HOSTILE = (
    None,
    True,
    -1,
    0,
    1,
    3,
    2.5,
    1e308,
    2**31,
    10**12,
    10**400,
    "",
    "x",
    "|O",
    "<U9",
    [],
    [1],
    [[1]],
    {},
    "qkv.0.symbols",
)


def places(tree, path=()):
    """Paths of all nodes of a JSON tree."""
    yield path
    children = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in children:
        yield from places(value, (*path, key))


def mutate(tree, rng: random.Random):
    """One node replaced, removed or doubled."""
    tree = copy.deepcopy(tree)
    by_depth = {}
    for path in places(tree):
        by_depth.setdefault(len(path), []).append(path)
    path = rng.choice(by_depth[rng.choice(list(by_depth))])
    if not path:
        return rng.choice(HOSTILE)
    node = functools.reduce(lambda at, key: at[key], path[:-1], tree)
    how = rng.random()
    if how < 0.15:
        del node[path[-1]]
    elif how < 0.25 and isinstance(node, list):
        node.insert(path[-1], copy.deepcopy(node[path[-1]]))
    elif how < 0.4 and type(node[path[-1]]) in (int, float):
        node[path[-1]] *= rng.choice((2, 1000, 10**6, -1))
    else:
        node[path[-1]] = rng.choice(HOSTILE)
    return tree


@pytest.mark.parametrize("part", ("header", "stacks", "settings", "bytes"))
def test_no_header_that_is_altered_ends_otherwise_than_in_one_line(part, tmp_path, little_memory):
    """Checksum and lengths are right, so nothing but the loader itself stands against it."""
    rng = random.Random(part)
    assert not refused(tmp_path, Parts(tiny()).join())  # as it is, it loads
    refusals = 0
    for _ in range(80):
        parts = Parts(tiny())
        if part == "settings":
            parts.header["meta"]["settings"] = mutate(parts.header["meta"]["settings"], rng)
        elif part == "bytes":
            name = rng.choice(("tail", "rest"))
            content = bytearray(getattr(parts, name))
            content[rng.randrange(min(len(content), 400))] ^= 1 << rng.randrange(8)
            setattr(parts, name, bytes(content))
        else:
            setattr(parts, part, mutate(getattr(parts, part), rng))
        refusals += bool(refused(tmp_path, parts.join()))
    assert refusals > 20


def settings_of(**changes):
    return lambda header: header["meta"]["settings"].update(changes)


HEADERS = {
    "no meta": (lambda header: header.pop("meta"), "settings"),
    "meta that is a list": (lambda header: header.update(meta=[]), "settings"),
    "no settings": (lambda header: header["meta"].pop("settings"), "settings"),
    "settings that are text": (lambda header: header["meta"].update(settings="ab"), "settings"),
    "a null setting": (settings_of(model_dim=None), "MODEL_DIM=None"),
    "a number as text": (settings_of(num_layers="5"), "NUM_LAYERS='5'"),
    "wide": (settings_of(model_dim=1048576), "MODEL_DIM=1048576"),
    "wide, allowed": (settings_of(model_dim=4096, mlp_mult=64.0), "settings ask for"),
    "deep": (settings_of(num_layers=10**9), "NUM_LAYERS=1000000000"),
    "deep, allowed": (settings_of(num_layers=1000), "settings ask for"),
    "many loops": (settings_of(num_loops=10**9), "NUM_LOOPS=1000000000"),
    "a name that steers the terminal": (settings_of(**{"\x1b[2J\nerror": 1}), r"\x1b[2J\nerror"),
    "negative shape": (lambda header: header["plain"][0][1][0].__setitem__(1, [-4]), "shape"),
    "enormous shape": (lambda header: header["plain"][0][1][0].__setitem__(1, [10**6, 10**6]), "128,000,000 values"),
    "enormous stack": (lambda header: header["coded"][0].__setitem__(1, [10**5, 10**5]), "128,000,000 values"),
    "objects": (lambda header: header["plain"][0].__setitem__(0, "|O8"), "|O8"),
    "one name twice": (lambda header: header["coded"][0][2].__setitem__(0, header["coded"][0][2][1]), "one name"),
    "a missing array": (lambda header: header["plain"][0][1].pop(), "decoded|holds"),
    "a coder's entry missing": (lambda header: header["coded"].pop(), "decoded"),
    "bytes that are elsewhere": (lambda header: header.update(ridden=0), "decoded"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers_that_no_script_of_ours_writes(name, tmp_path, little_memory):
    change, words = HEADERS[name]
    parts = Parts(tiny())
    change(parts.header)
    line = refused(tmp_path, parts.join())
    assert "model.bin" in line or "=" in line
    assert any(word in line for word in words.split("|") if word) or words in line, line


TEXTS = {
    "no JSON": b"hello",
    "a list": b"[]",
    "NaN": b'{"meta": NaN}',
    "nested without end": b"[" * 200_000,
    "not UTF-8": b'{"\xff": 1}',
    "3 kB that become 3 MB": b" " * 3_000_000 + b"{}",
    "6 kB that become 6 MB": b" " * 6_000_000 + b"{}",
}


@pytest.mark.parametrize("name", TEXTS)
def test_headers_that_are_no_object(name, tmp_path):
    for where in ("header", "side"):
        assert "model.bin" in refused(tmp_path, Parts(tiny()).join(**{where: zlib.compress(TEXTS[name])}))


STACKS = {
    "wider than the coder's sums are exact": dict(shape=[1, 8, 5000]),
    "more rows than any model": dict(shape=[1, 10**9, 32]),
    "more members than variances": dict(shape=[10**7, 1, 1]),
    "moments of gigabytes": dict(shape=[40, 1, 4096], log2_variance=[0] * 40),
    "copies beyond the end": dict(copies=[[10**6], [0]]),
    "no rows": dict(shape=[5, 0, 32]),
    "a variance that overflows": dict(log2_variance=[10**5] * 5),
    "no trust": dict(trust=[0, 0]),
    "another key": dict(other=1),
}


@pytest.mark.parametrize("name", STACKS)
def test_stacks_that_no_script_of_ours_writes(name, tmp_path, little_memory):
    parts = Parts(tiny())
    parts.stacks[0] |= STACKS[name]
    assert "cannot be decoded" in refused(tmp_path, parts.join())


@pytest.mark.parametrize("member", range(3))
def test_sizes_that_the_file_does_not_have(member, tmp_path):
    """Lengths of escaped values, states and words that reach beyond the end."""
    parts = Parts(tiny())
    parts.sizes[member] = 2**31
    assert "cannot be decoded" in refused(tmp_path, parts.join())


@pytest.mark.parametrize("what", ("header", "side", "escaped", "rest"))
def test_what_is_unpacked_has_a_limit(what, tmp_path, monkeypatch):
    """Every compressed part becomes 256 MB, in place of what it should be; the model may have a million values."""
    monkeypatch.setattr(train_gpt, "most_values", lambda cap: 1_000_000)
    packer = zlib.compressobj(1)
    if what == "rest":
        packer = lzma.LZMACompressor(lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2, "preset": 0}])
    bomb = b"".join(packer.compress(bytes(1 << 20)) for _ in range(256)) + packer.flush()
    parts = Parts(tiny())
    if what == "escaped":
        parts.tail = bomb + parts.tail[parts.sizes[0] :]
        parts.sizes[0] = len(bomb)
    elif what == "rest":
        parts.rest = bomb
        parts.header["ridden"] = 0
    content = parts.join(**{what: bomb} if what in ("header", "side") else {})
    tracemalloc.start()
    line = refused(tmp_path, content)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "bytes unpacked" in line and peak < 100 << 20  # of which LZMA takes 64 in any case


@pytest.mark.parametrize(
    "change, words",
    (
        (lambda a: a.pop("qkv.1.symbols"), "decoded|do not fit"),
        (lambda a: a.update({"qkv.1.symbols": a["qkv.1.symbols"][:, :-1]}), "decoded"),
        (lambda a: a.update({"qkv.1.step": a["qkv.1.step"][:-1]}), "qkv.1 do not fit"),
        (lambda a: a.update({"o.0.step": a["o.0.step"][:1]}), "o.0 do not fit"),
        (lambda a: a.update({"o.0.step": np.full(32, 30_000, np.int16)}), "decoded"),
        (lambda a: a["q_gain"].__setitem__((0, 0), np.nan), "q_gain holds a value that is not finite"),
        (lambda a: a["attn_gate.scale"].__setitem__((0, 0), np.inf), "attn_gate holds a value that is not finite"),
        (lambda a: a.pop("attn_gate.scale"), "attn_gate.scale"),
        (lambda a: a.update({"attn_gate.scale": np.ones((90, 90, 90), np.float16)}), "decoded"),
        (lambda a: a.update({"extra": np.ones(3, np.float16)}), "extra"),
        (lambda a: a.update({"qkv.9.symbols": a["qkv.0.symbols"], "qkv.9.step": a["qkv.0.step"]}), "names of no array"),
        (lambda a: a.update({"symbols": np.ones((3, 3), np.int8)}), "decoded"),
        (lambda a: a.update({"logit_calibration": np.full(15, np.nan, np.float32)}), "calibration"),
        (lambda a: a.update({"logit_calibration": np.zeros(14, np.float32)}), "calibration"),
        (lambda a: a.pop("skip_gates"), "skip_gates"),
    ),
)
def test_arrays_that_are_no_model(change, words, tmp_path):
    (tmp_path / "model.bin").write_bytes(tiny())
    arrays, meta = train_gpt.load_artifact(tmp_path / "model.bin")
    arrays = {name: a.copy() for name, a in arrays.items()}
    change(arrays)
    line = refused(tmp_path, train_gpt.encode_artifact(arrays, meta))
    assert any(word in line for word in words.split("|")), line


def test_a_file_does_not_say_how_large_it_may_be(tmp_path):
    (tmp_path / "model.bin").write_bytes(tiny())
    arrays, meta = train_gpt.load_artifact(tmp_path / "model.bin")
    meta["settings"]["artifact_cap"] = 10**12
    train_gpt.save_artifact(tmp_path / "model.bin", arrays, meta)
    configured = lambda **env: train_gpt.configure(environment({"ttt_eval_only": True, **env}, tmp_path))
    assert configured().artifact_cap == 16_000_000
    assert configured(artifact_cap=20_000_000).artifact_cap == 20_000_000  # the caller says it
    with pytest.raises(UserError, match="model.bin: over 9,000 bytes; set ARTIFACT_CAP"):
        configured(artifact_cap=9_000, artifact_margin=0)
    noise = np.frombuffer(np.random.default_rng(0).bytes(16_000_000), np.float16)
    train_gpt.save_artifact(tmp_path / "model.bin", {"x": noise}, meta)
    with pytest.raises(UserError, match="model.bin: over 16,000,000 bytes; set ARTIFACT_CAP"):
        configured()


# ---- trained.npz ----


@functools.cache
def weights() -> dict:
    """What a trained.npz holds, of random weights."""
    cfg = train_gpt.Config.from_env(environment(RUN))
    arrays = {name: p.detach().numpy() for name, p in gpt(cfg).named_parameters()}
    meta = {
        "settings": cfg.settings(),
        "tokenizer_sha256": TOKENIZER,
        "training": {"steps": 1},
        "seconds": {"steps": 1},
    }
    return arrays | {"meta": np.array(json.dumps(meta))}


def npz(folder: Path, meta: object = None, pack=np.savez, **changes):
    """A trained.npz with some arrays replaced, None removes one, and other text in "meta"."""
    arrays = weights() | changes
    if meta is not None:
        arrays["meta"] = np.array(meta)
    pack(folder / "trained.npz", **{name: a for name, a in arrays.items() if a is not None})


def meta_of(**changes) -> str:
    return json.dumps({**json.loads(str(weights()["meta"])), **changes})


def load_weights(folder: Path):
    """As QUANTIZE_ONLY=1 does it."""
    run = prepared_run({**RUN, "quantize_only": True}, folder)
    train_gpt.load_trained(run, run.new_model())
    return run


WEIGHTS = {
    "no JSON": lambda to: npz(to, "hello"),
    "a list": lambda to: npz(to, "[]"),
    "meta that is a number": lambda to: npz(to, 5),
    "no meta": lambda to: np.savez(to / "trained.npz", q_gain=np.ones(3, np.float32)),
    "null settings": lambda to: npz(to, meta_of(settings=None)),
    "null training": lambda to: npz(to, meta_of(training=None)),
    "no seconds": lambda to: npz(to, meta_of(seconds={})),
    "NaN seconds": lambda to: npz(to, meta_of(seconds={"steps": math.nan})),
    "a NaN weight": lambda to: npz(to, q_gain=np.full((5, 4), np.nan, np.float32)),
    "pickled objects": lambda to: npz(to, q_gain=np.array([{}], object)),
    "text": lambda to: npz(to, q_gain=np.array("x")),
    "float64": lambda to: npz(to, q_gain=np.ones((5, 4))),
    "a wrong shape": lambda to: npz(to, q_gain=np.ones((4, 5), np.float32)),
    "a missing weight": lambda to: npz(to, q_gain=None),
    "an unknown weight": lambda to: npz(to, extra=np.ones(3, np.float32)),
    "compressed": lambda to: npz(to, pack=np.savez_compressed, q_gain=np.zeros(10**7, np.float32)),
    "an array alone": lambda to: np.save((to / "trained.npz").open("wb"), np.ones(3)),
    "a folder": lambda to: (to / "trained.npz").mkdir(),
    "a zip of text": lambda to: zipfile.ZipFile(to / "trained.npz", "w").writestr("meta.npy", "hello"),
    "another tokenizer": lambda to: npz(to, meta_of(tokenizer_sha256="1" * 64)),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_trained_weights_that_cannot_be_used(name, tmp_path):
    WEIGHTS[name](tmp_path)
    with pytest.raises(UserError) as error:
        load_weights(tmp_path)
    assert "trained.npz" in str(error.value) and str(error.value).isprintable()


def test_trained_weights_come_back(tmp_path):
    npz(tmp_path)
    assert load_weights(tmp_path).phases.seconds["steps"] == 1


# ---- files of a run ----


def dead_pid() -> int:
    """The number of a process that has ended."""
    child = multiprocessing.get_context("fork").Process(target=int)
    child.start()
    child.join()
    return child.pid


def test_what_killed_runs_left_goes_and_nothing_else(tmp_path):
    dead, ours = dead_pid(), os.getpid()
    gone = [f"trained.npz.part{dead}", f"model.bin.part{dead}", f"preflight.part{dead}", f"result.json.part{ours}"]
    kept = [
        f"model.bin.part{os.getppid()}",
        "model.bin.part",
        "model.bin.partner",
        f"notes.part{dead}",
        "model.bin.part1x",
    ]
    ledger = tmp_path / "led[g]er.npy"
    for name in (*gone, *kept, f"{ledger.name}.part{dead}", f"ledger.npy.part{dead}"):
        (tmp_path / name).write_text("half")
    main({**RUN, "check_only": True, "ledger_path": ledger}, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir() if ".part" in path.name) == sorted(
        (*kept, f"ledger.npy.part{dead}")
    )


def copied(folder: Path, *names: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name in names:
        shutil.copy(base_run() / name, folder)
    return folder


def hashes(folder: Path) -> dict:
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in ("train_gpt.py", "model.bin")}


def test_results_hold_the_hashes_of_their_artifact(tmp_path):
    """Of what was scored; and the tools find another file beside them."""
    assert result(base_run())["artifact_sha256"] == hashes(base_run())
    folder = copied(tmp_path, "train_gpt.py", "model.bin", "result.json")
    main({"ttt_eval_only": True}, folder).ok()
    for name in ("result.json", "eval_result.json"):
        found = result(folder, name)
        assert found["artifact_sha256"] == hashes(folder)
        assert not runs.other_artifact(found, folder / name)
    (folder / "train_gpt.py").write_text("other")
    assert "another train_gpt.py" in runs.other_artifact(found, folder / "result.json")[0]


def test_a_new_artifact_takes_the_score_of_the_last_one_away(tmp_path):
    folder = copied(tmp_path, "trained.npz")
    (folder / "eval_result.json").write_text("{}")
    main({**RUN, "quantize_only": True}, folder).ok()
    assert not (folder / "eval_result.json").exists() and (folder / "result.json").exists()


@pytest.mark.parametrize("name", ("model.bin", "train_gpt.py"))
def test_a_file_that_another_run_has_replaced_is_not_scored(name, tmp_path, monkeypatch):
    folder = copied(tmp_path, "trained.npz")
    written = train_gpt.write_artifact

    def replaced(run, model):
        written(run, model)
        (folder / name).write_bytes(tiny())

    monkeypatch.setattr(train_gpt, "write_artifact", replaced)
    outcome = main({**RUN, "quantize_only": True}, folder)
    assert outcome.code == 2 and "another run has written" in outcome.err and outcome.err.count("\n") == 1
    assert not (folder / "result.json").exists()


def other_tokenizer(folder: Path, manifest: bool) -> Path:
    """The data with another tokenizer of as many pieces."""
    folder = own_data(folder)
    model = folder / "tokenizer.model"
    digest = hashlib.sha256(model.read_bytes()).hexdigest()
    shutil.copy(
        tokenizer(("some other text for another tokenizer of as many pieces " * 3,), hard_vocab_limit=False), model
    )
    path = folder / "manifest.json"
    if manifest:
        path.write_text(path.read_text().replace(digest, hashlib.sha256(model.read_bytes()).hexdigest()))
    else:
        path.unlink()
    return folder


@pytest.mark.parametrize("manifest", (True, False))
def test_shards_of_another_tokenizer_are_refused(manifest, tmp_path):
    folder = copied(tmp_path / "artifact", "train_gpt.py", "model.bin")
    outcome = main({"ttt_eval_only": True}, folder, other_tokenizer(tmp_path / "data", manifest))
    assert (
        outcome.code == 2
        and "model.bin: made for data of tokenizer_sha256" in outcome.err
        and outcome.err.count("\n") == 1
    )
    assert not (folder / "eval_result.json").exists()


def test_shards_of_an_unknown_tokenizer_are_labelled(tmp_path):
    folder = copied(tmp_path / "artifact", "train_gpt.py", "model.bin")
    where = own_data(tmp_path / "data")
    for name in ("tokenizer.model", "manifest.json"):
        (where / name).unlink()
    main({"ttt_eval_only": True}, folder, where).ok()
    verdict = result(folder, "eval_result.json")["verdicts"]["C4"]
    assert verdict["verdict"] == "DISPUTED" and "TOKENIZER_PATH" in verdict["reason"]


def test_an_artifact_in_a_folder_that_can_only_be_read(tmp_path, monkeypatch):
    """The log says where the results go; the folder is not written to."""
    folder, here = copied(tmp_path / "artifact", "train_gpt.py", "model.bin"), tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setattr(train_gpt.os, "access", lambda path, mode: Path(path) != folder)  # root may write anywhere
    outcome = main({"ttt_eval_only": True}, folder).ok()
    assert f"eval_result.json go to {here}" in outcome.out
    assert {path.name for path in here.iterdir()} == {"eval.log", "eval_result.json"}
    assert {path.name for path in folder.iterdir()} == {"train_gpt.py", "model.bin"}
    assert result(here, "eval_result.json")["artifact_sha256"] == hashes(folder)


# ---- manifest.json ----


def check_data(folder: Path) -> str:
    """The line that refuses a data folder."""
    cfg = config(RUN, data_path=str(folder))
    with pytest.raises(UserError) as error:
        train_gpt.fingerprint(cfg, train_gpt.ValidationStream(cfg))
    return str(error.value)


@pytest.mark.parametrize("name", ("../secret", "/etc/passwd", "sub/../../secret", "..", "a\nb", ""))
def test_a_manifest_names_files_of_its_folder(name, tmp_path, monkeypatch):
    folder = own_data(tmp_path / "data")
    (tmp_path / "secret").write_text("secret")
    path = folder / "manifest.json"
    promised = json.loads(path.read_text())
    promised["files"] = {name: {"sha256": hashlib.sha256(b"secret").hexdigest(), "tokens": 3}}
    path.write_text(json.dumps(promised))
    line = check_data(folder)
    assert "manifest.json" in line and "\n" not in line
    assert "names" in line or name in ("..", "")


@pytest.mark.parametrize("content", (None, "[]", "[" * 100_000, '{"val": NaN}', '{"val": []}', "\xff"))
def test_a_manifest_that_is_none(content, tmp_path):
    folder = own_data(tmp_path / "data")
    path = folder / "manifest.json"
    path.unlink()
    path.mkdir() if content is None else path.write_bytes(content.encode("latin-1"))
    assert "manifest.json: damaged" in check_data(folder)
