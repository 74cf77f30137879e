"""prepare_data.py end to end on small corpora: what is written, that every byte is accounted for, and that every
failure says what to do."""

import errno
import gzip
import hashlib
import io
import json
import lzma
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import types
import unicodedata
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

import lossless_caps
import prepare_data
from prepare_data import DataError, Encoder
from tools.streams import document_texts

ROOT = Path(__file__).resolve().parents[1]
MODEL = Path(__file__).parent / "golden" / "fineweb_8192_caseops.model"
WORDS = [
    "the",
    "of",
    "NASA",
    "Kitten",
    "river",
    "iPhone",
    "1984",
    "quietly",
    "École",
    "…",
    "don't",
    "stop,",
    "said",
    "Alice",
    "to",
    "北京",
    "and",
    "walked",
    "home.",
]
CASEOPS, PLAIN = Encoder(MODEL, lossless_caps.NAME), Encoder(MODEL, None)


def sentences(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [f"{i} " + " ".join(rng.choices(WORDS, k=rng.randrange(5, 60))) for i in range(count)]


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def prepare(
    out: Path, *sources: Path | str, val_docs: int = 5, options: tuple[str, ...] = (), model: Path | None = MODEL
) -> int:
    tokenizer = ["--tokenizer", str(model)] if model else []
    return prepare_data.main(
        [
            "--source",
            *map(str, sources),
            "--out",
            str(out),
            "--val-docs",
            str(val_docs),
            "--workers",
            "1",
            *tokenizer,
            *options,
        ]
    )


def manifest(out: Path) -> dict:
    return json.loads((out / "manifest.json").read_text(encoding="utf-8"))


def tokens(out: Path, split: str) -> np.ndarray:
    """Reads shards with nothing of the program: header and payload by the published format."""
    arrays = []
    for path in sorted(out.glob(f"fineweb_{split}_[0-9]*.bin")):
        data = path.read_bytes()
        header = np.frombuffer(data[:1024], "<i4")
        assert header[0] == 20240520 and header[1] == 1 and not header[3:].any()
        assert len(data) == 1024 + 2 * header[2]
        arrays.append(np.frombuffer(data[1024:], "<u2"))
    return np.concatenate(arrays)


def documents(out: Path, split: str) -> list[list[int]]:
    ids = tokens(out, split)
    starts = [*np.flatnonzero(ids == 1), len(ids)]
    assert starts[0] == 0
    return [ids[start + 1 : end].tolist() for start, end in pairwise(starts)]


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()}


def test_shards_and_manifest(tmp_path):
    texts = sentences(40)
    source = write_jsonl(tmp_path / "docs.jsonl", texts)
    assert prepare(tmp_path / "out", source, options=("--shard-tokens", "100")) == 0
    out = tmp_path / "out"
    expected = [CASEOPS.sp.encode(lossless_caps.encode(text)) for text in texts]
    assert documents(out, "val") == expected[:5]
    assert documents(out, "train") == expected[5:]
    assert len(list(out.glob("fineweb_train_*.bin"))) > 5  # documents continue in the next shard
    found = manifest(out)
    sizes = tokens(out, "val_bytes")
    assert len(sizes) == len(tokens(out, "val")) and not sizes[tokens(out, "val") == 1].any()
    utf8 = [sum(len(text.encode()) for text in part) for part in (texts[:5], texts[5:])]
    assert found["val"] == {
        "first_document": 0,
        "documents": 5,
        "tokens": len(sizes),
        "bos": 5,
        "bytes": sizes.sum(),
        "utf8_bytes": utf8[0],
    }
    assert found["val"]["bytes"] == utf8[0]
    assert found["train"] == {
        "first_document": 5,
        "documents": 35,
        "tokens": len(tokens(out, "train")),
        "bos": 35,
        "bytes": utf8[1],
        "utf8_bytes": utf8[1],
    }
    assert (found["format"], found["transform"], found["vocab_size"], found["bos_id"]) == (
        1,
        "lossless_caps_caseops_v1",
        8192,
        1,
    )
    assert found["source"]["files"][0]["sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()
    assert found["tokenizer"] == {
        "file": "tokenizer.model",
        "sha256": hashlib.sha256(MODEL.read_bytes()).hexdigest(),
        "transform": "lossless_caps_caseops_v1",
    }
    assert set(found["files"]) == {path.name for path in out.glob("fineweb_*.bin")}
    for name, entry in found["files"].items():
        assert entry["sha256"] == hashlib.sha256((out / name).read_bytes()).hexdigest()
        assert (out / name).stat().st_size == 1024 + 2 * entry["tokens"]
    assert {path.name for path in out.iterdir()} == {*found["files"], "tokenizer.model", "manifest.json"}
    assert (
        found["options"]["val_docs"] == 5
        and found["options"]["shard_tokens"] == 100
        and found["sentencepiece"] == sentencepiece.__version__
    )


def test_output_does_not_depend_on_workers(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_data, "CHUNK_BYTES", 1000)  # many chunks
    texts = sentences(60)
    source = write_jsonl(
        tmp_path / "docs.jsonl", [*texts, texts[2], texts[40], " ", "<s> is no control token in text </s><unk><pad>"]
    )
    for workers in ("1", "3"):
        assert prepare(tmp_path / workers, source, options=("--workers", workers, "--shard-tokens", "500")) == 0
    assert contents(tmp_path / "1") == contents(tmp_path / "3")
    assert len(documents(tmp_path / "1", "train")) == 57 and min(map(min, documents(tmp_path / "1", "train"))) > 3


def test_error_in_a_worker_process_names_the_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(prepare_data, "CHUNK_BYTES", 1000)
    source = write_jsonl(tmp_path / "docs.jsonl", [*sentences(20), "\ud83d alone"])
    assert prepare(tmp_path / "out", source, options=("--workers", "2")) == 2
    assert "docs.jsonl line 21: holds a lone surrogate" in capsys.readouterr().err


def test_duplicates_of_validation_are_dropped(tmp_path):
    texts = sentences(30)
    spaced = texts[1].replace(" ", "   ")  # other text, same tokens
    source = write_jsonl(tmp_path / "docs.jsonl", [*texts, texts[0], texts[20], spaced, texts[4] + "\n"])
    assert prepare(tmp_path / "out", source) == 0
    found = manifest(tmp_path / "out")
    assert found["duplicates_dropped"] == 3
    assert found["train"]["documents"] == 26  # texts[20] twice: only validation is protected
    val = {tuple(ids) for ids in documents(tmp_path / "out", "val")}
    assert not val & {tuple(ids) for ids in documents(tmp_path / "out", "train")}


def test_empty_documents_are_skipped_and_counted(tmp_path):
    texts = ["", *sentences(10), " \n\u200b", "\x01"]
    assert prepare(tmp_path / "out", write_jsonl(tmp_path / "docs.jsonl", texts)) == 0
    found = manifest(tmp_path / "out")
    assert found["empty_skipped"] == 3
    assert (found["val"]["documents"], found["train"]["documents"]) == (
        4,
        6,
    )  # positions count: the first five lines are validation
    assert all(
        documents(tmp_path / "out", split) and all(documents(tmp_path / "out", split)) for split in ("val", "train")
    )


@pytest.mark.parametrize("count", [5, 3])
def test_too_few_documents(tmp_path, capsys, count):
    source = write_jsonl(tmp_path / "docs.jsonl", sentences(count))
    for options in ((), ("--vocab-size", "300")):
        assert prepare(tmp_path / "out", source, options=options, model=None if options else MODEL) == 2
        assert "smaller --val-docs" in capsys.readouterr().err
        assert not (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.parametrize("options", [(), ("--vocab-size", "300")])
@pytest.mark.parametrize("count", [1, 0])
def test_one_document_needs_no_smaller_val_docs(tmp_path, capsys, count, options):
    source = write_jsonl(tmp_path / "docs.jsonl", sentences(count))
    assert prepare(tmp_path / "out", source, val_docs=1, options=options, model=None if options else MODEL) == 2
    error = capsys.readouterr().err
    assert "give more text" in error and "smaller" not in error and "for example" not in error


def test_max_train_docs(tmp_path):
    source = write_jsonl(tmp_path / "docs.jsonl", sentences(30))
    assert prepare(tmp_path / "out", source, options=("--max-train-docs", "7")) == 0
    assert manifest(tmp_path / "out")["train"]["documents"] == 7


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "cut of', "line 12: not valid JSON"),
        (b'{"text": "a"} {"text": "b"}', "line 12: not valid JSON"),
        (b'{"text": "\xff"}', "line 12: not valid JSON"),
        (b'{"txt": "a"}', "line 12: no document"),
        (b'{"text": 5}', "line 12: no document"),
        (b"[]", "line 12: no document"),
        (b"[" * 100_000, "line 12: not valid JSON (nested too deeply)"),
        (b'{"text": "a", "more": ' + b'{"a":' * 100_000, "line 12: not valid JSON (nested too deeply)"),
        (b"9" * 5000, "line 12: not valid JSON"),
        (b'{"text": "\\ud800"}', "line 12: holds a lone surrogate"),
    ],
)
def test_bad_lines_are_named(tmp_path, capsys, line, message):
    source = write_jsonl(tmp_path / "docs.jsonl", sentences(10))
    source.write_bytes(source.read_bytes() + b"\n" + line + b"\n")  # a blank line holds no document
    assert prepare(tmp_path / "out", source) == 2
    error = capsys.readouterr().err
    assert f"{source} {message}" in error and "Traceback" not in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("line", [b"5", b'{"txt": "a"}', b'{"text": "\xff"}', b"[" * 100_000])
def test_bad_lines_are_named_while_the_tokenizer_trains(tmp_path, capsys, line):
    source = write_jsonl(tmp_path / "docs.jsonl", sentences(10))
    source.write_bytes(source.read_bytes() + line + b"\n")
    assert prepare(tmp_path / "out", source, model=None, options=("--vocab-size", "300")) == 2
    error = capsys.readouterr().err
    assert f"prepare_data.py: {source} line 11: " in error and "--vocab-size" not in error


def test_a_source_that_cannot_be_read_is_named_while_the_tokenizer_trains(tmp_path, capsys):
    packed = tmp_path / "docs.jsonl.gz"
    write_jsonl(tmp_path / "docs.jsonl", sentences(2000))
    packed.write_bytes(gzip.compress((tmp_path / "docs.jsonl").read_bytes())[:-30])
    assert prepare(tmp_path / "out", packed, model=None, options=("--vocab-size", "300")) == 2
    error = capsys.readouterr().err
    assert f"prepare_data.py: {packed}: truncated or corrupt" in error and "--vocab-size" not in error


@pytest.mark.parametrize(("suffix", "compress"), [(".xz", lzma.compress), (".gz", gzip.compress)])
def test_compressed_sources(tmp_path, capsys, suffix, compress):
    texts = sentences(40)
    plain = write_jsonl(tmp_path / "docs.jsonl", texts)
    packed = tmp_path / f"docs.jsonl{suffix}"
    packed.write_bytes(compress(plain.read_bytes()))
    assert prepare(tmp_path / "plain", plain) == prepare(tmp_path / "packed", packed) == 0
    assert manifest(tmp_path / "plain")["files"] == manifest(tmp_path / "packed")["files"]
    packed.write_bytes(packed.read_bytes()[:-30])
    assert prepare(tmp_path / "cut", packed) == 2
    assert f"{packed}: truncated or corrupt after line" in capsys.readouterr().err
    packed.write_bytes(b"\0" * 100)
    assert prepare(tmp_path / "zeros", packed) == 2
    assert f"{packed}: truncated or corrupt after line 0" in capsys.readouterr().err


def test_zst_sources(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    plain = write_jsonl(tmp_path / "docs.jsonl", sentences(40))
    packed = tmp_path / "docs.jsonl.zst"
    packed.write_bytes(zstandard.compress(plain.read_bytes()))
    assert prepare(tmp_path / "plain", plain) == prepare(tmp_path / "packed", packed) == 0
    assert manifest(tmp_path / "plain")["files"] == manifest(tmp_path / "packed")["files"]
    packed.write_bytes(packed.read_bytes()[:-30])
    assert prepare(tmp_path / "cut", packed) == 2


def test_zst_without_its_package(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    (tmp_path / "docs.jsonl.zst").write_bytes(b"")
    assert prepare(tmp_path / "out", tmp_path / "docs.jsonl.zst") == 2
    assert "pip install zstandard" in capsys.readouterr().err


def test_several_files_and_bare_strings(tmp_path):
    texts = sentences(20)
    first = tmp_path / "b.jsonl"
    first.write_text("".join(json.dumps(text, ensure_ascii=False) + "\r\n" for text in texts[:8]), encoding="utf-8-sig")
    second = write_jsonl(tmp_path / "a.jsonl", texts[8:])
    assert prepare(tmp_path / "out", first, second) == 0
    expected = [CASEOPS.sp.encode(lossless_caps.encode(text)) for text in texts]
    assert documents(tmp_path / "out", "val") + documents(tmp_path / "out", "train") == expected


def test_texts_and_folders_of_them(tmp_path):
    texts = [text + "\n\n" + text for text in sentences(20)]
    folder = tmp_path / "texts"
    folder.mkdir()
    for number, text in enumerate(texts):
        (folder / f"{number:02}.txt").write_text(text, encoding="utf-8-sig" if number % 2 else "utf-8")
    (folder / "03.txt").unlink()
    (folder / "03.txt.gz").write_bytes(gzip.compress(texts[3].encode()))
    (folder / ".hidden.txt").write_text("left out")
    assert prepare(tmp_path / "out", folder) == 0
    expected = [CASEOPS.sp.encode(lossless_caps.encode(text)) for text in texts]
    assert documents(tmp_path / "out", "val") + documents(tmp_path / "out", "train") == expected
    lines = tmp_path / "lines"
    lines.mkdir()
    write_jsonl(lines / "b.jsonl", texts[8:])
    write_jsonl(lines / "a.jsonl", texts[:8])
    assert prepare(tmp_path / "from_lines", lines) == 0
    assert manifest(tmp_path / "from_lines")["files"] == manifest(tmp_path / "out")["files"]


def test_sources_of_another_kind_are_named(tmp_path, capsys):
    both, neither = tmp_path / "both", tmp_path / "neither"
    for folder in (both, neither):
        folder.mkdir()
        (folder / "notes.md").write_text("x")
    write_jsonl(both / "a.jsonl", sentences(9))
    (both / "b.txt").write_text("x")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    write_jsonl(tmp_path / "lines.txt", sentences(9))
    os.mkfifo(tmp_path / "pipe")
    for source, message in (
        (both, "a folder with both *.jsonl and *.txt; name the files"),
        (neither, "a folder without *.jsonl or *.txt; name its files"),
        (tmp_path / "latin.txt", "not UTF-8 text"),
        (tmp_path / "lines.txt", "rename it to .jsonl"),
        (tmp_path / "pipe", "not a plain file"),
    ):
        assert prepare(tmp_path / "out", source) == 2
        assert f"prepare_data.py: {source}: " in (error := capsys.readouterr().err) and message in error
    assert prepare(tmp_path / "out", both / "a.jsonl", model=both) == 2
    assert f"{both}: a folder; --tokenizer takes" in capsys.readouterr().err


# ---------------------------------------------------------------- interrupted and repeated runs


def test_kill_and_rerun(tmp_path):
    source = write_jsonl(tmp_path / "docs.jsonl", sentences(4000))
    out = tmp_path / "out"
    command = [
        sys.executable,
        str(ROOT / "prepare_data.py"),
        "--source",
        str(source),
        "--out",
        str(out),
        "--val-docs",
        "5",
        "--tokenizer",
        str(MODEL),
        "--shard-tokens",
        "1000",
        "--workers",
        "2",
    ]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while (
        not list(out.glob("UNFINISHED/fineweb_train_*.bin")) and process.poll() is None and time.monotonic() < deadline
    ):
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "manifest.json").exists()
    for path in out.rglob("fineweb_*.bin"):
        assert len(prepare_data.read_shard(path))  # whole, or not there
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    assert prepare(tmp_path / "fresh", source, options=("--shard-tokens", "1000")) == 0
    assert contents(out) == contents(tmp_path / "fresh")


def test_finished_folder_is_verified_and_kept(tmp_path, capsys):
    source, out = write_jsonl(tmp_path / "docs.jsonl", sentences(20)), tmp_path / "out"
    assert prepare(out, source) == 0
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    source = source.rename(tmp_path / "elsewhere.jsonl")
    assert prepare(out, source, options=("--workers", "2")) == 0
    assert "already finished" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before

    assert prepare(out, source, val_docs=6) == 2
    assert "val_docs: 5 there, 6 now" in capsys.readouterr().err
    write_jsonl(source, sentences(20, seed=1))
    assert prepare(out, source) == 2
    assert "other options" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    assert prepare(out, source, val_docs=6, options=("--overwrite",)) == 0
    assert manifest(out)["val"]["documents"] == 6

    shard = out / "fineweb_train_000000.bin"
    shard.write_bytes(shard.read_bytes()[:-2] + b"\0\0")
    assert prepare(out, source, val_docs=6) == 2
    assert f"{shard}: differs" in capsys.readouterr().err
    shard.unlink()
    assert prepare(out, source, val_docs=6) == 2
    assert "missing" in capsys.readouterr().err


def test_shards_of_others_are_not_cleared(tmp_path, capsys):
    source, out = write_jsonl(tmp_path / "docs.jsonl", sentences(20)), tmp_path / "out"
    out.mkdir()
    (out / "fineweb_train_000000.bin").write_bytes(b"precious")
    assert prepare(out, source) == 2
    assert "choose another --out" in capsys.readouterr().err
    assert (out / "fineweb_train_000000.bin").read_bytes() == b"precious"


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("options", [(), ("--overwrite",)])
@pytest.mark.parametrize(
    "name",
    [
        "tokenizer.model",
        "fineweb_val_bytes_000000.bin",
        "fineweb_train_000007.bin",
        "manifest.json",
        "UNFINISHED",
        "UNFINISHED/notes.txt",
    ],
)
def test_what_no_run_wrote_is_never_removed(tmp_path, capsys, name, options):
    source, out = write_jsonl(tmp_path / "docs.jsonl", sentences(20)), tmp_path / "out"
    (out / name).parent.mkdir(parents=True)
    (out / name).write_text('{"mine": 1}')
    before = snapshot(out)
    assert prepare(out, source, options=options) == 2
    error = capsys.readouterr().err
    assert str(out / name) in error and "choose another --out" in error and len(error.splitlines()) == 1
    assert snapshot(out) == before


@pytest.mark.parametrize("name", ["tokenizer.model.part", "mine.part", "fineweb_notes.bin", "other.model"])
def test_other_files_stay_beside_the_dataset(tmp_path, name):
    source, out = write_jsonl(tmp_path / "docs.jsonl", sentences(20)), tmp_path / "out"
    out.mkdir()
    (out / name).write_text("mine")
    for options in ((), ("--overwrite",)):
        assert prepare(out, source, options=options) == 0
        assert (out / name).read_text() == "mine"
    (out / name).unlink()
    assert prepare(tmp_path / "fresh", source) == 0
    assert contents(out) == contents(tmp_path / "fresh")


@pytest.mark.parametrize(
    ("lines", "model", "options"),
    [
        ("[5]\n", MODEL, ()),  # found after the first shards
        ("", None, ("--vocab-size", "10")),  # found by the training of the tokenizer
        ("", Path("no.model"), ()),
    ],
)
def test_a_run_that_fails_leaves_the_folder_as_it_was(tmp_path, lines, model, options):
    source, out = write_jsonl(tmp_path / "docs.jsonl", sentences(40)), tmp_path / "new" / "out"
    bad = tmp_path / "bad.jsonl"
    bad.write_text(source.read_text() + lines)
    options += ("--shard-tokens", "100")
    assert prepare(out, bad, model=model, options=options) == 2
    assert not (tmp_path / "new").exists()
    assert prepare(out, source) == 0
    before = snapshot(out)
    assert prepare(out, bad, model=model, options=(*options, "--overwrite")) == 2
    assert snapshot(out) == before


@pytest.mark.parametrize("moves", [1, 2, 4])
def test_a_run_killed_while_its_files_move_is_taken_over(tmp_path, monkeypatch, moves):
    source, out = write_jsonl(tmp_path / "docs.jsonl", sentences(40)), tmp_path / "out"
    assert prepare(out, source, options=("--shard-tokens", "100")) == 0
    replace = os.replace
    left = moves

    def killed(old, new):
        nonlocal left
        if Path(new).parent == out:
            if not left:
                raise SystemExit
            left -= 1
        replace(old, new)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(SystemExit):
        prepare(out, source, val_docs=7, options=("--overwrite",))
    monkeypatch.undo()
    assert not (out / "manifest.json").exists()
    assert prepare(out, tmp_path / "none.jsonl") == 2  # changes nothing, and keeps the record
    (out / "UNFINISHED" / "fineweb_val_000000.bin.part").write_bytes(b"half")
    options = ("--shard-tokens", "10", "--max-train-docs", "1")
    assert prepare(out, source, val_docs=3, options=options) == 0
    assert prepare(tmp_path / "fresh", source, val_docs=3, options=options) == 0
    assert contents(out) == contents(tmp_path / "fresh")


@pytest.mark.parametrize("name", ["../precious.bin", "/etc/passwd", "notes.txt"])
def test_a_manifest_gives_no_leave_to_remove_other_files(tmp_path, capsys, name):
    source, out = write_jsonl(tmp_path / "docs.jsonl", sentences(20)), tmp_path / "out"
    assert prepare(out, source) == 0
    (tmp_path / "precious.bin").write_text("precious")
    (out / "notes.txt").write_text("precious")
    found = manifest(out)
    found["files"][name] = {"sha256": hashlib.sha256(b"precious").hexdigest(), "tokens": 1}
    (out / "manifest.json").write_text(json.dumps(found))
    assert prepare(out, source) == 2
    assert "not a manifest of this program" in capsys.readouterr().err
    assert prepare(out, source, options=("--overwrite",)) == 0
    assert (tmp_path / "precious.bin").read_text() == (out / "notes.txt").read_text() == "precious"


def test_a_manifest_nested_too_deeply_is_named(tmp_path, capsys):
    source, out = write_jsonl(tmp_path / "docs.jsonl", sentences(20)), tmp_path / "out"
    out.mkdir()
    (out / "manifest.json").write_text("[" * 100_000)
    assert prepare(out, source) == 2
    assert f"{out / 'manifest.json'}: not a manifest of this program" in capsys.readouterr().err


def script(*arguments: str | Path, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "prepare_data.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, **options)


def test_ctrl_c_while_the_tokenizer_trains(tmp_path):
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnop", k=rng.randrange(2, 9))) for _ in range(60_000)]
    texts = [" ".join(rng.choices(words, k=500)) for _ in range(4000)]  # ten seconds of training
    source, out = write_jsonl(tmp_path / "docs.jsonl", texts), tmp_path / "out"
    command = [sys.executable, str(ROOT / "prepare_data.py"), "--source", source, "--out", out, "--val-docs", "5"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert "training a tokenizer" in process.stderr.readline()
    time.sleep(4)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    sent = time.monotonic()
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and error.splitlines()[-1].startswith("prepare_data.py: interrupted")
    assert time.monotonic() - sent < 3 and "Traceback" not in error and not out.exists()


def test_an_interrupt_is_no_fault_of_the_vocabulary(tmp_path, monkeypatch):
    def interrupted(*_):
        yield "some text"
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare_data, "tokenizer_text", interrupted)
    args = types.SimpleNamespace(vocab_size=300, tokenizer_mb=1, form=lossless_caps.NAME, val_docs=1)
    with pytest.raises(KeyboardInterrupt):
        prepare_data.train_tokenizer(None, args)


def die(*_):
    os._exit(9)


def test_a_tokenizer_training_that_is_killed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(prepare_data, "send_tokenizer", die)
    source = write_jsonl(tmp_path / "docs.jsonl", sentences(20))
    assert prepare(tmp_path / "out", source, model=None) == 2
    assert "run again with a smaller --tokenizer-mb" in capsys.readouterr().err


def test_hashing_the_source_does_not_hold_up_an_error(tmp_path, monkeypatch):
    def endless(source, path):
        while not source.closed:
            time.sleep(0.01)

    monkeypatch.setattr(prepare_data.Source, "sha256", endless)
    source = write_jsonl(tmp_path / "docs.jsonl", sentences(20))
    source.write_bytes(source.read_bytes() + b"[5]\n")
    assert prepare(tmp_path / "out", source) == 2
    monkeypatch.undo()
    closed = prepare_data.Source("jsonl", (source,), closed=True)
    assert closed.sha256(source) == hashlib.sha256().hexdigest()  # nothing was read


def test_tokenizer_of_the_folder_itself_survives_overwrite(tmp_path):
    source, out = write_jsonl(tmp_path / "docs.jsonl", sentences(20)), tmp_path / "out"
    assert prepare(out, source) == 0
    assert prepare(out, source, val_docs=3, model=out / "tokenizer.model", options=("--overwrite",)) == 0
    assert manifest(out)["tokenizer"]["sha256"] == hashlib.sha256(MODEL.read_bytes()).hexdigest()


def test_second_run_in_the_same_folder_is_refused(tmp_path, capsys):
    fcntl = pytest.importorskip("fcntl")
    source, out = write_jsonl(tmp_path / "docs.jsonl", sentences(20)), tmp_path / "out"
    (out / "UNFINISHED").mkdir(parents=True)
    with open(out / "UNFINISHED" / "lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert prepare(out, source) == 2
    assert "another prepare_data.py" in capsys.readouterr().err
    assert prepare(out, source) == 0


# ---------------------------------------------------------------- bytes

HOSTILE = (
    "aB.1 "
    "\n\t\r\0\x01\x0b\x1f\x7f\x85\x8f\u00a0\u00a8\u00ad\u00bd\u00c9\u0301\u0308\u0345\u037a\u0e33"
    "\u1100\u1161\u11a8\u115f"
    "\u1680\u180e\u200b\u200c\u200d\u200e\u2026\u2028\u2029\u202f\u2060\u2581\u3000\u304b\u3099"
    "\ue000\ue001\ue002\ue003\ue004"
    "\ufb01\ufdfa\ufeff\uff21\uffa0\ufffd\U0001f468\U0001f600"
)
HOSTILE_TEXT = st.lists(st.one_of(st.sampled_from(HOSTILE), st.characters(exclude_categories=["Cs"])), max_size=30).map(
    "".join
)


@pytest.mark.parametrize("encoder", [CASEOPS, PLAIN], ids=["caseops", "plain"])
@settings(max_examples=300, deadline=None)
@given(text=HOSTILE_TEXT)
def test_every_byte_of_hostile_text_is_accounted_for(encoder, text):
    ids, sizes = encoder.tokens_and_bytes(text)  # raises where tokens and text disagree
    assert ids.tolist() == encoder.tokens(text).tolist()
    assert sizes.sum() == len(text.encode()) - encoder.ends.count(text)


@pytest.mark.parametrize(
    ("text", "stripped"),
    [
        ("", 0),
        ("a", 0),
        (" a", 1),
        ("a \r\n\t", 4),
        ("\n\n \u00a0The end\u3000 ", 9),
        ("\ufeffa\u200b", 6),
        (" \x01 a\x01", 3),
        ("a \x01", 2),
        ("a\x01 ", 1),
        ("   ", 3),
        ("\u0301", 0),
        (" \u0301x", 1),
        ("\u00a8", 0),
        ("\u200da", 0),
        ("\U0001f468\u200d\U0001f469 ", 1),
        ("\ue001 ", 1),
        ("a\r\nb", 0),
        ("\u2581a", 3),
    ],
)
def test_stripped_ends(text, stripped):
    assert CASEOPS.ends.count(text) == stripped
    for encoder in (CASEOPS, PLAIN):
        assert encoder.tokens_and_bytes(text)[1].sum() == len(text.encode()) - stripped


def train_model(path: Path, **options) -> Path:
    """A small CaseOps tokenizer with options that the script does not choose but takes from others."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=map(lossless_caps.encode, sentences(60)),
        model_writer=model,
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        hard_vocab_limit=False,
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        user_defined_symbols=list(lossless_caps.OPERATORS),
        minloglevel=2,
        **options,
    )
    path.write_bytes(model.getvalue())
    return path


NORMALISERS = [
    {"normalization_rule_name": "identity", "add_dummy_prefix": True},  # the published 10,240 pieces
    {"normalization_rule_name": "nfkc_cf", "add_dummy_prefix": False},
    {"normalization_rule_name": "nmt_nfkc", "add_dummy_prefix": True, "remove_extra_whitespaces": False},
    {"normalization_rule_name": "identity", "add_dummy_prefix": False, "treat_whitespace_as_suffix": True},
]


@pytest.mark.parametrize("options", NORMALISERS, ids=lambda options: "-".join(map(str, options.values())))
def test_bytes_are_exact_whatever_the_normaliser(tmp_path, options):
    encoder = Encoder(train_model(tmp_path / "t.model", **options), lossless_caps.NAME)
    rng = random.Random(0)
    texts = ["\u2581a", "\u2581\u2581 a", " \u2581a", "a\u2581", "\u2581", "\x8f", "\x01", "a\x01", ""]
    texts += ["".join(rng.choices(HOSTILE, k=rng.randrange(1, 9))) for _ in range(1000)]
    for text in texts:
        assert encoder.tokens_and_bytes(text)[1].sum() == len(text.encode()) - encoder.ends.count(text)


def test_space_behind_the_text_is_refused_before_the_documents(tmp_path, capsys):
    model = train_model(tmp_path / "t.model", add_dummy_prefix=True, treat_whitespace_as_suffix=True)
    assert prepare(tmp_path / "out", write_jsonl(tmp_path / "docs.jsonl", sentences(20)), model=model) == 2
    assert f"{model}: adds its space behind the text" in capsys.readouterr().err


def test_hostile_documents_end_to_end(tmp_path):
    rng = random.Random(0)
    texts = ["".join(rng.choices(HOSTILE, k=rng.randrange(1, 50))) + f" {i}" for i in range(200)]
    assert prepare(tmp_path / "out", write_jsonl(tmp_path / "docs.jsonl", texts), val_docs=100) == 0
    found = manifest(tmp_path / "out")
    assert (
        found["val"]["bytes"]
        == found["val"]["utf8_bytes"]
        == sum(len(text.encode()) - CASEOPS.ends.count(text) for text in texts[:100])
    )


def test_wrong_byte_count_aborts_and_names_the_document(tmp_path, capsys, monkeypatch):
    right = lossless_caps.piece_bytes

    def wrong(surfaces, form):  # charges operators three bytes, as one published script did
        return [
            3 if surface in lossless_caps.OPERATORS else count
            for surface, count in zip(surfaces, right(surfaces, form), strict=True)
        ]

    monkeypatch.setattr(lossless_caps, "piece_bytes", wrong)
    source = write_jsonl(tmp_path / "docs.jsonl", ["all lower case", "One capital", *sentences(10)])
    assert prepare(tmp_path / "out", source) == 2
    assert f"{source} line 2: its tokens account for 14 bytes, its text for 11" in capsys.readouterr().err
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_token_of_more_than_65535_bytes(tmp_path, capsys):
    long = "a" + " " * 70_000 + "b"
    assert (
        prepare(tmp_path / "train", write_jsonl(tmp_path / "t.jsonl", [*sentences(10), long])) == 0
    )  # no sidecar for training text
    source = write_jsonl(tmp_path / "v.jsonl", [long, *sentences(10)])
    assert prepare(tmp_path / "val", source) == 2
    assert f"{source} line 1: one token stands for" in capsys.readouterr().err


def test_no_caseops(tmp_path):
    texts = sentences(40)
    source, out = write_jsonl(tmp_path / "docs.jsonl", texts), tmp_path / "out"
    assert prepare(out, source, model=None, options=("--no-caseops", "--vocab-size", "400")) == 0
    sp = sentencepiece.SentencePieceProcessor(model_file=str(out / "tokenizer.model"))
    assert sp.is_unknown(sp.piece_to_id(lossless_caps.TITLE))
    assert documents(out, "val") == [sp.encode(text) for text in texts[:5]]
    found = manifest(out)
    assert found["transform"] == "none"
    assert found["val"]["bytes"] == tokens(out, "val_bytes").sum() == sum(len(text.encode()) for text in texts[:5])


# ---------------------------------------------------------------- the two forms of CaseOps

BEFORE = ("--case-ops", "before-space", "--vocab-size", "420")


@pytest.mark.parametrize("form", prepare_data.FORMS)
def test_each_form_is_named_everywhere_and_counts_every_byte(tmp_path, form):
    texts = ["He said The End,  NASA \ue001 a\n iPhone", *sentences(40)]
    source, out = write_jsonl(tmp_path / "docs.jsonl", texts), tmp_path / "out"
    assert prepare(out, source, model=None, options=("--case-ops", form, "--vocab-size", "420")) == 0
    name, found = prepare_data.FORMS[form], manifest(out)
    model = out / "tokenizer.model"
    assert found["transform"] == found["tokenizer"]["transform"] == name
    assert prepare_data.named_form(prepare_data.load_model(model)) == name
    encoder = Encoder(model, name)
    assert documents(out, "val") == [encoder.sp.encode(lossless_caps.encode(text, name)) for text in texts[:5]]
    sizes = np.add.reduceat(tokens(out, "val_bytes"), np.flatnonzero(tokens(out, "val") == 1), dtype=np.int64)
    assert sizes.tolist() == [len(text.encode()) - encoder.ends.count(text) for text in texts[:5]]
    plain = [" ".join(unicodedata.normalize("NFKC", text).split()) for text in texts[:5]]
    assert [" ".join(text.split()) for text in document_texts(tokens(out, "val"), model)] == plain


def test_a_word_keeps_its_piece_behind_an_operator_in_the_second_form(tmp_path):
    source, out = (
        write_jsonl(tmp_path / "docs.jsonl", [f"{i} the river The river THE river" for i in range(40)]),
        tmp_path / "out",
    )
    assert prepare(out, source, model=None, options=BEFORE) == 0
    sp = prepare_data.load_model(out / "tokenizer.model")
    ids = sp.encode(lossless_caps.encode("a the The THE", lossless_caps.BEFORE_SPACE), out_type=str)
    assert ids.count("\u2581the") == 3 and ids.count("\u2581") == 0


def test_forms_are_not_confused(tmp_path, capsys):
    """A tokenizer that names one form is refused for the other, as is a finished dataset of the other form."""
    source, out = write_jsonl(tmp_path / "docs.jsonl", sentences(40)), tmp_path / "out"
    assert prepare(out, source, model=None, options=BEFORE) == 0
    assert prepare(out, source, model=None, options=BEFORE) == 0
    assert "already finished" in capsys.readouterr().err
    assert prepare(out, source, model=None, options=("--vocab-size", "420")) == 2
    assert "transform: lossless_caps_before_space_v1 there, lossless_caps_caseops_v1 now" in capsys.readouterr().err
    assert prepare(tmp_path / "other", source, model=out / "tokenizer.model") == 2
    assert "pass --case-ops before-space" in (error := capsys.readouterr().err) and error.count("\n") == 1
    assert prepare(tmp_path / "other", source, options=("--case-ops", "before-space")) == 2  # the published tokenizer
    assert "pass --case-ops behind-space" in capsys.readouterr().err
    assert prepare(tmp_path / "other", source, model=out / "tokenizer.model", options=BEFORE[:2]) == 0
    assert (tmp_path / "other" / "tokenizer.model").read_bytes() == (out / "tokenizer.model").read_bytes()


def test_naming_a_model_changes_nothing_else():
    named = prepare_data.with_name(MODEL.read_bytes(), lossless_caps.BEFORE_SPACE)
    sp = sentencepiece.SentencePieceProcessor(model_proto=named)
    assert prepare_data.named_form(sp) == lossless_caps.BEFORE_SPACE
    assert prepare_data.named_form(CASEOPS.sp) == lossless_caps.BEHIND_SPACE  # as published
    assert [sp.encode(text) for text in sentences(20)] == [CASEOPS.sp.encode(text) for text in sentences(20)]


# ---------------------------------------------------------------- tokenizers


def test_trained_tokenizer(tmp_path):
    texts = ["Zyzzyva zyzzyva " * 50, *sentences(40), "Zyzzyva zyzzyva " * 50]
    source = write_jsonl(tmp_path / "docs.jsonl", texts)
    for name in ("one", "two"):
        assert prepare(tmp_path / name, source, model=None, val_docs=1, options=("--vocab-size", "420")) == 0
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    sp = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "one" / "tokenizer.model"))
    assert (sp.pad_id(), sp.bos_id(), sp.eos_id(), sp.unk_id()) == (0, 1, 2, 3)
    assert [sp.id_to_piece(i) for i in range(4, 8)] == list(lossless_caps.OPERATORS)
    assert sp.is_byte(8) and sp.is_byte(263) and not sp.is_byte(264)
    pieces = [sp.id_to_piece(i) for i in range(264, sp.vocab_size())]
    assert any("kitten" in piece for piece in pieces)
    assert not any("zy" in piece for piece in pieces)  # validation text, and its duplicate, is not learned from
    assert not any(operator in piece for piece in pieces for operator in lossless_caps.OPERATORS)
    assert manifest(tmp_path / "one")["vocab_size"] == sp.vocab_size() <= 420


def test_fewer_pieces_than_asked_for_are_announced(tmp_path, capsys):
    source = write_jsonl(tmp_path / "docs.jsonl", sentences(20))
    assert prepare(tmp_path / "out", source, model=None, options=("--vocab-size", "5000")) == 0
    pieces = manifest(tmp_path / "out")["vocab_size"]
    assert f"--vocab-size 5000: the training text gives only {pieces} pieces" in (error := capsys.readouterr().err)
    assert f"VOCAB_SIZE={pieces}" in error and "at most the first 64 MB" in error
    assert prepare(tmp_path / "small", source, model=None, options=("--vocab-size", "300")) == 0
    assert "gives only" not in capsys.readouterr().err


def test_unusable_tokenizers(tmp_path, capsys):
    source = write_jsonl(tmp_path / "docs.jsonl", sentences(40))
    plain = tmp_path / "plain"
    assert prepare(plain, source, model=None, options=("--no-caseops", "--vocab-size", "400")) == 0
    prefix = tmp_path / "other"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences(40)),
        model_prefix=str(prefix),
        vocab_size=90,
        model_type="bpe",
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        minloglevel=2,
        user_defined_symbols=list(lossless_caps.OPERATORS),
    )
    (tmp_path / "not.model").write_bytes(b"hello")
    for model, message in (
        (plain / "tokenizer.model", "--no-caseops"),
        (prefix.with_suffix(".model"), "byte fallback"),
        (tmp_path / "not.model", "not a SentencePiece model"),
        (tmp_path / "none.model", "no such file"),
    ):
        assert prepare(tmp_path / "out", source, model=model) == 2
        error = capsys.readouterr().err
        assert message in error and str(model) in error
    assert prepare(tmp_path / "out", source, model=None, options=("--vocab-size", "10")) == 2
    assert "--vocab-size 10" in capsys.readouterr().err


# ---------------------------------------------------------------- built-in and downloaded sources


def test_stdlib(tmp_path):
    documents_ = prepare_data.stdlib_documents()
    assert documents_ == prepare_data.stdlib_documents()
    texts = [json.loads(document)["text"] for document in documents_]
    assert len(set(texts)) == len(texts) > 1000
    assert 2e6 < sum(map(len, texts)) < 20e6
    assert all(text.strip() for text in texts) and any("Guido" in text for text in texts)
    assert sum(len(text) > 1.5 * prepare_data.STDLIB_DOCUMENT_CHARS for text in texts) < len(texts) / 100
    assert (
        prepare(tmp_path / "out", "stdlib", model=None, options=("--vocab-size", "512", "--max-train-docs", "100")) == 0
    )
    found = manifest(tmp_path / "out")
    assert found["source"]["kind"] == "stdlib" and found["val"]["documents"] == 5 and found["train"]["documents"] == 100


def test_pieces_of_a_text_lose_only_line_ends():
    text = "\n\n".join(f"def f{i}():\n    return {i}\n" for i in range(300)) + "\n" + "x = 1\n" * 900
    pieces = list(prepare_data.cut_text(text, 500))
    assert "".join("".join(pieces).split()) == "".join(text.split())
    assert max(map(len, pieces)) <= 500


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A stand-in for huggingface_hub that serves a folder, laid out like the published dataset repositories, and counts
    what is asked of it."""
    root = tmp_path / "hub"
    (root / "datasets").mkdir(parents=True)
    asked = []
    whole = {}  # what is published, where the cache holds something else

    def hf_hub_download(repo_id, filename, *, repo_type, force_download=False):
        assert repo_type == "dataset"
        asked.append(filename)
        if force_download and filename in whole:
            (root / filename).unlink()  # a new file: the old one may be linked into OUT
            (root / filename).write_bytes(whole[filename])
        if not (root / filename).exists():
            raise FileNotFoundError(f"404: {repo_id} has no {filename}")
        return str(root / filename)

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(hf_hub_download=hf_hub_download))
    return types.SimpleNamespace(root=root, asked=asked, whole=whole)


def publish(hub, made: Path, name: str = "fineweb10B_sp8192_lossless_caps_caseops_v1_reserved") -> Path:
    """Publishes a prepared folder the way the contest's exporter does."""
    folder = hub.root / "datasets" / "datasets" / name
    folder.mkdir(parents=True)
    for path in made.glob("fineweb_*.bin"):
        (folder / path.name).write_bytes(path.read_bytes())
    (hub.root / "datasets" / "tokenizers").mkdir()
    (hub.root / "datasets" / "tokenizers" / "t.model").write_bytes(MODEL.read_bytes())
    stats = {
        "files_train": len(list(made.glob("fineweb_train_*.bin"))),
        "files_val": len(list(made.glob("fineweb_val_[0-9]*.bin"))),
        "docs_val": 5,
    }
    (hub.root / "datasets" / "manifest.json").write_text(
        json.dumps(
            {
                "tokenizers": [{"name": "t", "model_path": "tokenizers/t.model"}],
                "datasets": [
                    {
                        "name": name,
                        "tokenizer_name": "t",
                        "val_bytes_glob": "datasets/x/fineweb_val_bytes_*.bin",
                        "stats": stats,
                    }
                ],
            }
        )
    )
    return folder


def fetch(out: Path, *options: str, repo: str = "someone/parameter-golf") -> int:
    variant = "sp8192_lossless_caps_caseops_v1_reserved"
    return prepare_data.main(["--source", "shards", "--repo", repo, "--variant", variant, "--out", str(out), *options])


def test_published_shards(tmp_path, hub, capsys):
    made, out = tmp_path / "made", tmp_path / "out"
    assert prepare(made, write_jsonl(tmp_path / "docs.jsonl", sentences(60)), options=("--shard-tokens", "400")) == 0
    publish(hub, made)
    assert fetch(out, "--train-shards", "2") == 0
    found, original = manifest(out), manifest(made)
    assert {name for name in found["files"] if "train" in name} == {
        "fineweb_train_000000.bin",
        "fineweb_train_000001.bin",
    }
    assert all(original["files"][name] == entry for name, entry in found["files"].items())
    assert found["val"] == original["val"] | {"utf8_bytes": None}
    assert (
        found["transform"] == "lossless_caps_caseops_v1"
        and found["tokenizer"] == original["tokenizer"]
        and found["train"]["first_document"] == 5
    )
    hub.asked.clear()
    assert fetch(out, "--train-shards", "2") == 0 and not hub.asked  # finished: nothing is asked for
    assert fetch(out, "--train-shards", "3") == 2
    assert "train_shards: 2 there, 3 now" in capsys.readouterr().err
    assert (
        prepare_data.main(["--source", "shards", "--repo", "a/b", "--variant", "sp4096", "--out", str(tmp_path / "no")])
        == 2
    )
    assert "pass --variant with one of: sp8192_lossless" in capsys.readouterr().err


def test_published_shards_that_are_wrong(tmp_path, hub, capsys):
    made = tmp_path / "made"
    assert prepare(made, write_jsonl(tmp_path / "docs.jsonl", sentences(60))) == 0
    folder = publish(hub, made)
    val, sidecar, train = (folder / f"fineweb_{name}_000000.bin" for name in ("val", "val_bytes", "train"))

    def fails(message: str, repo: str = "someone/parameter-golf") -> None:
        assert fetch(tmp_path / "out", repo=repo) == 2
        error = capsys.readouterr().err
        assert message in error and "Traceback" not in error
        assert not (tmp_path / "out" / "manifest.json").exists()

    fails("instead of the contest's 47,853,344", repo="romeerp/parameter-golf-caseops-v1")
    whole = {path: path.read_bytes() for path in (val, sidecar, train)}

    def damage(path: Path, data: bytes, message: str) -> None:
        path.unlink()
        path.write_bytes(data)  # a new file: the old one is linked into OUT
        fails(message)
        path.unlink()
        path.write_bytes(whole[path])

    damage(train, whole[train][:-6], "its header promises")
    damage(train, b"\0" * 2000, "not a token shard")
    damage(train, whole[val], "documents are validation documents")
    damage(sidecar, whole[train], "differ in length")
    damage(sidecar, whole[sidecar][:1024] + b"\1\0" + whole[sidecar][1026:], "gives bytes to BOS")
    damage(val, whole[val][:1026] + b"\xff\xff" + whole[val][1028:], "beyond the tokenizer's 8192")
    train.unlink()
    fails(
        "cannot download "
        "datasets/datasets/fineweb10B_sp8192_lossless_caps_caseops_v1_reserved/fineweb_train_000000.bin (404"
    )
    train.write_bytes(whole[train])
    assert fetch(tmp_path / "out") == 0  # the same command resumes


EXPORT = "datasets/datasets/fineweb10B_sp8192_lossless_caps_caseops_v1_reserved/"


@pytest.mark.parametrize(
    "name",
    [
        EXPORT + "fineweb_train_000000.bin",
        EXPORT + "fineweb_val_bytes_000000.bin",
        "datasets/manifest.json",
        "datasets/tokenizers/t.model",
    ],
)
@pytest.mark.parametrize(
    "damage", [lambda data: data[:-3], lambda data: b"<html>try later</html>"], ids=["cut", "html"]
)
def test_a_damaged_download_is_not_served_again(tmp_path, hub, capsys, name, damage):
    made = tmp_path / "made"
    assert prepare(made, write_jsonl(tmp_path / "docs.jsonl", sentences(60))) == 0
    publish(hub, made)
    hub.whole[name] = (hub.root / name).read_bytes()
    (hub.root / name).write_bytes(damage(hub.whole[name]))
    assert fetch(tmp_path / "out") == 0
    assert f"fetching {name} again" in capsys.readouterr().err and hub.asked.count(name) == 2
    assert contents(tmp_path / "out").keys() == contents(made).keys()
    hub.whole[name] = damage(hub.whole[name])  # published like this
    (hub.root / name).write_bytes(hub.whole[name])
    assert fetch(tmp_path / "none") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"someone/parameter-golf: {name} is damaged where it is published" in error and "another --repo" in error
    assert not (tmp_path / "none").exists()


STATS = {"files_train": 1, "files_val": 1}


@pytest.mark.parametrize(
    "answer",
    [
        {},
        {"error": "not found"},
        {"datasets": None, "tokenizers": None},
        {"datasets": ["a"], "tokenizers": []},
        {"datasets": [{"name": ["a"]}], "tokenizers": []},
        {"datasets": [{"name": EXPORT[18:-1]}], "tokenizers": []},
        {"datasets": [{"name": EXPORT[18:-1], "stats": STATS | {"files_val": "1"}}], "tokenizers": []},
        {"datasets": [{"name": EXPORT[18:-1], "stats": STATS | {"files_train": -1}}], "tokenizers": []},
        {"datasets": [{"name": EXPORT[18:-1], "stats": STATS}], "tokenizers": ["t"]},
        {"datasets": [{"name": EXPORT[18:-1], "stats": STATS}], "tokenizers": [{"name": None, "model_path": 5}]},
    ],
    ids=json.dumps,
)
def test_hub_answers_that_are_no_manifest(tmp_path, hub, capsys, answer):
    (hub.root / "datasets" / "manifest.json").write_text(json.dumps(answer))
    assert fetch(tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "someone/parameter-golf: " in error and ("is no manifest of exports" in error or "--variant" in error)
    assert len(error.splitlines()) == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize("answer", ["<html></html>", "", "[1]", "{}", '{"docs_sha256": 5}', "[" * 100_000, "\xe9"])
def test_hub_answers_that_are_no_manifest_of_documents(tmp_path, hub, capsys, answer):
    write_jsonl(hub.root / "datasets" / "docs_selected.jsonl", sentences(30))
    (hub.root / "datasets" / "docs_selected.source_manifest.json").write_bytes(answer.encode("latin-1"))
    assert prepare(tmp_path / "out", "fineweb") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "datasets/docs_selected.source_manifest.json" in error and "--repo" in error


def test_fewer_shards_than_asked_for_are_announced(tmp_path, hub, capsys):
    made = tmp_path / "made"
    assert prepare(made, write_jsonl(tmp_path / "docs.jsonl", sentences(60))) == 0
    publish(hub, made)
    assert fetch(tmp_path / "out", "--train-shards", "9") == 0
    assert "--train-shards 9: someone/parameter-golf has only 1" in capsys.readouterr().err


@pytest.mark.parametrize("split", ["val", "train"])
def test_a_published_shard_without_a_token(tmp_path, hub, split):
    made = tmp_path / "made"
    assert prepare(made, write_jsonl(tmp_path / "docs.jsonl", sentences(60))) == 0
    folder = publish(hub, made)
    listed = hub.root / "datasets" / "manifest.json"
    found = json.loads(listed.read_text())
    found["datasets"][0]["stats"][f"files_{split}"] = 2
    listed.write_text(json.dumps(found))
    for name in (split, "val_bytes")[: 1 + (split == "val")]:
        (folder / f"fineweb_{name}_000000.bin").rename(folder / f"fineweb_{name}_000001.bin")
        empty = np.array([20240520, 1, 0] + [0] * 253, "<i4")
        (folder / f"fineweb_{name}_000000.bin").write_bytes(empty.tobytes())
    assert fetch(tmp_path / "out") == 0
    assert manifest(tmp_path / "out")[split]["tokens"] == manifest(made)[split]["tokens"]


def test_fineweb_documents(tmp_path, hub, capsys):
    source = write_jsonl(hub.root / "datasets" / "docs_selected.jsonl", sentences(30))
    sidecar = hub.root / "datasets" / "docs_selected.source_manifest.json"
    sidecar.write_text(json.dumps({"docs_sha256": hashlib.sha256(source.read_bytes()).hexdigest()}))
    assert prepare(tmp_path / "out", "fineweb") == 0
    found = manifest(tmp_path / "out")
    assert found["source"]["repo"] == "willdepueoai/parameter-golf" and found["val"]["documents"] == 5
    assert prepare(tmp_path / "second", "fineweb", model=None, options=BEFORE) == 0
    assert manifest(tmp_path / "second")["transform"] == lossless_caps.BEFORE_SPACE
    sidecar.write_text(json.dumps({"docs_sha256": "0" * 64}))
    assert prepare(tmp_path / "other", "fineweb") == 2
    assert "is not the published" in capsys.readouterr().err
    assert not (tmp_path / "other" / "manifest.json").exists()


def test_downloads_without_their_package(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert fetch(tmp_path / "out") == 2
    assert "pip install huggingface_hub" in capsys.readouterr().err


# ---------------------------------------------------------------- command line


def test_command_line(tmp_path, capsys):
    for arguments, code, message in (
        (["--help"], 0, "--val-docs"),
        (["--source", "stdlib", "x.jsonl", "--out", "o"], 2, "either files or one of"),
        (["--source", "x", "--out", "o", "--val-docs", "0"], 2, "not positive"),
        (["--source", "x", "--out", "o", "--tokenizer", "m", "--vocab-size", "9"], 2, "no meaning with --tokenizer"),
        (["--source", "shards", "--out", "o", "--no-caseops"], 2, "--no-caseops has no meaning with --source shards"),
        (["--source", "shards", "--out", "o", *BEFORE[:2]], 2, "--case-ops has no meaning with --source shards"),
        (["--source", "x", "--out", "o", "--no-caseops", *BEFORE[:2]], 2, "no meaning with --no-caseops"),
        (["--source", "x", "--out", "o", "--vocab-size", "65537"], 2, "--vocab-size 65537: at most 65536"),
        (["--source", "x", "--out", "o", "--shard-tokens", str(1 << 31)], 2, "at most 2147483647"),
        (["--source", "stdlib", "--out", "o", "--repo", "a/b"], 2, "--repo has no meaning with --source stdlib"),
    ):
        with pytest.raises(SystemExit) as ended:
            prepare_data.main(arguments)
        assert ended.value.code == code
        captured = capsys.readouterr()
        assert message in captured.out + captured.err
    assert prepare(tmp_path / "out", tmp_path / "none.jsonl") == 2
    assert "none.jsonl: no such file" in capsys.readouterr().err


def test_unwritable_folder_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    assert prepare(tmp_path / "file" / "out", write_jsonl(tmp_path / "docs.jsonl", sentences(20))) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and "file" in error[0] and os.sep in error[0]


@pytest.mark.parametrize(("limit", "name"), [(100, "written.json"), (100_000, "tokenizer.model")])
def test_a_full_disk_names_the_file(tmp_path, limit, name):
    resource = pytest.importorskip("resource")
    source, out = write_jsonl(tmp_path / "docs.jsonl", sentences(20)), tmp_path / "out"
    assert prepare(out, source) == 0
    before = snapshot(out)
    arguments = "--source", source, "--out", out, "--tokenizer", MODEL, "--val-docs", "3", "--workers", "1"

    def cap():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    done = script(*arguments, "--overwrite", preexec_fn=cap)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert f"{out / 'UNFINISHED' / name}: File too large; free space there" in done.stderr
    assert snapshot(out) == before


def test_a_failed_write_or_read_names_its_file(tmp_path, capsys, monkeypatch, hub):
    source = write_jsonl(tmp_path / "docs.jsonl", sentences(20))
    assert prepare(tmp_path / "made", source) == 0
    publish(hub, tmp_path / "made")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "link", full)
    monkeypatch.setattr(shutil, "copyfile", full)
    assert fetch(tmp_path / "out") == 2
    end = "UNFINISHED/tokenizer.model: No space left on device; free space there or choose another --out"
    assert capsys.readouterr().err.splitlines()[-1].endswith(end)
    monkeypatch.setattr(os, "fsync", full)
    assert prepare(tmp_path / "out", source) == 2
    assert "out/UNFINISHED/written.json: No space left" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setattr(prepare_data, "open_compressed", full)
    assert prepare(tmp_path / "out", source) == 2
    assert f"{source}: No space left" in capsys.readouterr().err


def test_paths_outside_ascii_in_a_locale_without_them(tmp_path):
    folder = tmp_path / "d\u00f6cs \u5317"
    folder.mkdir()
    source, out = write_jsonl(folder / "d\u00f6cs.jsonl", sentences(20)), folder / "\u00e9"
    model = folder / "t\u00f6.model"
    model.write_bytes(MODEL.read_bytes())
    locale = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    for workers in ("1", "2"):
        arguments = "--source", source, "--out", out / workers, "--tokenizer", model, "--workers", workers
        done = script(*arguments, "--val-docs", "5", env=locale)
        assert done.returncode == 0, done.stderr
        assert manifest(out / workers)["source"]["files"][0]["path"] == str(source)  # as in any other locale
        assert prepare(out / workers, source, model=model) == 0  # the same dataset
    arguments = "--source", source, "--out", out / "own", "--vocab-size", "300", "--val-docs", "5"
    assert script(*arguments, env=locale).returncode == 0
    for arguments in (
        ("--source", folder / "n\u00f6.jsonl", "--out", out / "own"),
        ("--source", source, "--out", out / "x", "--tokenizer", folder / "n\u00f6.model"),
        ("--source", source, "--out", out / "own", "--val-docs", "4"),
        ("--source", source, "--out", model),
    ):
        done = script(*arguments, env=locale)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr


def test_a_reader_of_the_log_that_has_gone(tmp_path):
    source, out = write_jsonl(tmp_path / "docs.jsonl", sentences(20)), tmp_path / "out"
    reader, writer = os.pipe()
    os.close(reader)
    arguments = ["--source", source, "--out", out, "--tokenizer", MODEL, "--val-docs", "5", "--workers", "1"]
    command = [sys.executable, str(ROOT / "prepare_data.py"), *map(str, arguments)]
    status = subprocess.run(command, stderr=writer, check=False, timeout=120).returncode
    os.close(writer)
    assert status == 0
    assert manifest(out)["val"]["documents"] == 5


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "docs.jsonl", sentences(20))
    (tmp_path / "t.model").write_bytes(MODEL.read_bytes())
    assert prepare(Path("~/out"), "~/docs.jsonl", model=Path("~/t.model")) == 0
    assert (tmp_path / "out" / "manifest.json").exists() and not (tmp_path / "~").exists()


def test_shard_reader_refuses_what_it_does_not_know(tmp_path):
    path = tmp_path / "fineweb_val_000000.bin"
    path.write_bytes(b"short")
    with pytest.raises(DataError, match="not a token shard"):
        prepare_data.read_shard(path)
