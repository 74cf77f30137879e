"""Bad input of every kind: one line that names the file or setting and the remedy, status 2, no traceback, nothing
lost. And bytes counted from a tokenizer's table."""

import json
import os
import shutil

import numpy as np
import pytest
from helpers import (
    BOS,
    RUN,
    VOCAB,
    base_run,
    config,
    data,
    encode,
    main,
    own_data,
    processor,
    result,
    spawn,
    tokenizer,
    write_shard,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt

CHECK = {**RUN, "check_only": True}


def refusal(outcome, *names: str) -> str:
    """The one line of a refused run, which must hold every one of the names."""
    assert outcome.code == 2, outcome.out[-2000:]
    lines = outcome.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), outcome.err
    for name in names:
        assert str(name) in lines[0], lines[0]
    return lines[0]


def read(path) -> np.ndarray:
    return np.frombuffer(path.read_bytes()[1024:], "<u2").copy()


# ---- damaged folders: (what is done to a copy of a good folder, what the line must name) ----


def edit(name: str, change):
    def damage(folder):
        path = folder / name
        write_shard(path, change(read(path)))

    return damage


def put(index: int, value: int):
    def change(values):
        values[index] = value
        return values

    return change


def manifest(change):
    def damage(folder):
        path = folder / "manifest.json"
        promised = json.loads(path.read_text())
        change(promised)
        path.write_text(json.dumps(promised))

    return damage


def cut(name: str, size: int):
    return lambda folder: os.truncate(folder / name, size)


def remove(*patterns: str):
    return lambda folder: [path.unlink() for pattern in patterns for path in folder.glob(pattern)]


TRAIN, VAL, SIDECAR = "fineweb_train_000000.bin", "fineweb_val_000000.bin", "fineweb_val_bytes_000000.bin"
DAMAGE = {
    "no train shards": (remove("fineweb_train_*"), ("fineweb_train_000000.bin", "manifest.json", "prepare")),
    "no validation shards, only the sidecar": (remove("fineweb_val_0*"), ("DATA_PATH", "fineweb_val_*.bin")),
    "train shard truncated": (cut(TRAIN, 3000), (TRAIN, "3000", "truncated")),
    "second train shard truncated": (cut("fineweb_train_000001.bin", 1500), ("fineweb_train_000001.bin", "truncated")),
    "validation shard truncated": (cut(VAL, 1100), (VAL, "truncated")),
    "sidecar truncated": (cut(SIDECAR, 1100), (SIDECAR, "truncated")),
    "shard shorter than its header": (cut(TRAIN, 100), (TRAIN,)),
    "shard of no bytes": (cut(TRAIN, 0), (TRAIN,)),
    "shard of no tokens": (edit(TRAIN, lambda values: values[:0]), (TRAIN,)),
    "shard longer than its header": (lambda f: (f / TRAIN).write_bytes((f / TRAIN).read_bytes() + b"xx"), (TRAIN,)),
    "wrong magic": (lambda f: write_shard(f / TRAIN, [BOS, 5, 6], magic=20240521), (TRAIN, "magic")),
    "wrong version": (lambda f: write_shard(f / VAL, [BOS, 5, 6], version=2), (VAL, "version")),
    "negative count": (lambda f: write_shard(f / TRAIN, [BOS, 5, 6], count=-3), (TRAIN,)),
    "shard is a folder": (lambda f: ((f / TRAIN).unlink(), (f / TRAIN).mkdir()), (TRAIN,)),
    "no BOS at the start of training": (edit(TRAIN, put(0, 9)), (TRAIN, "BOS_ID=1", "prepare")),
    "no BOS at the start of validation": (edit(VAL, put(0, 9)), ("BOS_ID=1", "prepare")),
    "no BOS anywhere in validation": (
        lambda f: [edit(f"fineweb_val_00000{i}.bin", lambda v: np.where(v == BOS, 9, v))(f) for i in (0, 1)],
        ("BOS_ID=1",),
    ),
    "train token outside the vocabulary": (edit(TRAIN, put(50, VOCAB)), (TRAIN, str(VOCAB), "VOCAB_SIZE")),
    "train token of the second shard outside the vocabulary": (
        edit("fineweb_train_000001.bin", put(-1, 65535)),
        ("fineweb_train_000001.bin", "65535", "VOCAB_SIZE"),
    ),
    "validation token outside the vocabulary": (
        edit("fineweb_val_000001.bin", put(-1, VOCAB + 7)),
        (str(VOCAB + 7), "VOCAB_SIZE"),
    ),
    "sidecar too short": (edit(SIDECAR, lambda v: v[:-1]), ("sidecar",)),
    "sidecar too long": (edit("fineweb_val_bytes_000001.bin", lambda v: np.append(v, 0)), ("sidecar",)),
    "sidecar counts BOS": (edit(SIDECAR, put(0, 1)), ("sidecar", "BOS")),
    "sidecar of other bytes": (edit(SIDECAR, lambda v: np.where(v == v.max(), v + 1, v)), ("manifest.json", "bytes")),
    "sidecar of no bytes": (
        lambda f: (
            [edit(f"fineweb_val_bytes_00000{i}.bin", lambda v: v * 0)(f) for i in (0, 1)],
            (f / "manifest.json").unlink(),
        ),
        ("bytes",),
    ),
    "manifest promises other tokens": (manifest(lambda m: m["val"].update(tokens=7)), ("manifest.json", "tokens")),
    "manifest promises other documents": (
        manifest(lambda m: m["val"].update(documents=7)),
        ("manifest.json", "documents"),
    ),
    "manifest of another vocabulary": (manifest(lambda m: m.update(vocab_size=8192)), ("manifest.json", "VOCAB_SIZE")),
    "manifest of another BOS": (manifest(lambda m: m.update(bos_id=2)), ("manifest.json", "BOS_ID")),
    "manifest is not JSON": (lambda f: (f / "manifest.json").write_text("{"), ("manifest.json",)),
    "manifest is empty": (lambda f: (f / "manifest.json").write_text("{}"), ("manifest.json",)),
    "other tokenizer": (lambda f: (f / "tokenizer.model").write_bytes(b"something else"), ("tokenizer.model",)),
    "no tokenizer": (remove("tokenizer.model"), ("TOKENIZER_PATH", "tokenizer.model")),
    "validation shard altered, counts kept": (edit(VAL, put(5, 77)), (VAL, "manifest.json")),
    "training shard of another length": (edit(TRAIN, lambda v: np.append(v, 5)), (TRAIN, "manifest.json")),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_data_is_refused(name, tmp_path):
    damage, names = DAMAGE[name]
    folder = own_data(tmp_path / "data")
    damage(folder)
    refusal(main(CHECK, tmp_path / "out", folder), *names)


@pytest.mark.parametrize("place", [(1 << 20) + 7, -1], ids=["behind the first block", "last"])
def test_a_check_reads_every_training_token(place, tmp_path):
    """A token outside the vocabulary, wherever it stands: a run would meet it in the middle of training."""
    folder = own_data(tmp_path / "data")
    (folder / "manifest.json").unlink()
    tokens = np.full((1 << 20) + 900, 7)
    tokens[0], tokens[place] = BOS, VOCAB
    write_shard(folder / TRAIN, tokens)
    refusal(main(CHECK, tmp_path / "out", folder), TRAIN, str(VOCAB), "VOCAB_SIZE")
    with pytest.raises(train_gpt.UserError, match=str(VOCAB)):
        train_gpt.TrainStream(config(RUN, data_path=str(folder))).read(place % len(tokens) - 5, 10)


@pytest.mark.parametrize(
    ("tokens", "sizes"),
    [
        ([BOS] * 9, None),
        ([BOS] * 9, [0] * 9),
        ([BOS], None),
        ([BOS, 2, 2, BOS], None),  # control tokens
        ([BOS, 9, 9, BOS], [0] * 4),
    ],
)
def test_a_validation_stream_without_text(tokens, sizes, tmp_path):
    """Nothing to divide the nats by: refused when it is read, not after training."""
    folder = own_data(tmp_path / "data")
    remove("fineweb_val_*", "manifest.json")(folder)
    write_shard(folder / VAL, tokens)
    if sizes:
        write_shard(folder / SIDECAR, sizes)
    refusal(main(CHECK, tmp_path / "out", folder), "fineweb_val", "no text", "prepare")


# ---- training shards, held against the manifest while the model trains ----


def other_tokens(folder):
    """The first training shard overwritten by validation tokens: its length stays."""
    edit(TRAIN, lambda values: np.resize(read(folder / VAL), len(values)))(folder)


OTHER_SHARDS = {
    "overwritten by validation tokens": other_tokens,
    "one token": edit("fineweb_train_000001.bin", put(-1, 9)),
    "a bit of its header": lambda folder: _flip(folder / TRAIN, 1000),
}


def _flip(path, place: int):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", OTHER_SHARDS)
def test_training_shards_that_are_not_the_manifests(name, tmp_path):
    folder = own_data(tmp_path / "data")
    OTHER_SHARDS[name](folder)
    refusal(main(CHECK, tmp_path / "out", folder), "DATA_PATH", "fineweb_train_00000", "manifest.json")
    hashes = train_gpt.TrainingHashes(config(RUN, data_path=str(folder)))
    verdicts = train_gpt.Verdicts()
    hashes.judge(verdicts)
    assert verdicts.failed() == ["data"] and "fineweb_train_00000" in verdicts.table["data"][1]


def test_a_run_on_other_training_shards_keeps_its_files_and_has_no_val_bpb(tmp_path):
    folder = own_data(tmp_path / "data")
    other_tokens(folder)
    outcome = main(RUN, tmp_path / "out", folder).ok()
    found = result(tmp_path / "out")
    assert found["verdicts"]["data"]["verdict"] == "FAIL" and "val_bpb" not in found and "data failed" in outcome.out
    assert (tmp_path / "out" / "model.bin").is_file() and TRAIN in found["verdicts"]["data"]["reason"]


def test_the_verdict_says_which_files_were_checked(tmp_path):
    assert "2 training shards have the SHA-256" in result(base_run())["verdicts"]["data"]["reason"]
    folder = own_data(tmp_path / "data")
    (folder / "manifest.json").unlink()
    verdicts = train_gpt.Verdicts()
    train_gpt.TrainingHashes(config(RUN, data_path=str(folder))).judge(verdicts)
    assert verdicts.table["data"] == (
        "NOT RUN",
        "shown by tools/audit.py; no training shard has been held against a manifest.json",
    )


def test_a_shard_that_the_manifest_does_not_name(tmp_path):
    """A validation shard under the name of a training shard would be trained on."""
    folder = own_data(tmp_path / "data")
    shutil.copy(folder / VAL, folder / "fineweb_train_000007.bin")
    refusal(main(CHECK, tmp_path / "out", folder), "fineweb_train_000007.bin", "not in manifest.json")


def test_a_missing_folder(tmp_path):
    refusal(main(CHECK, tmp_path / "out", tmp_path / "nowhere"), "DATA_PATH", "nowhere", "prepare_data.py")
    refusal(main(CHECK, tmp_path / "out", tokenizer()), "DATA_PATH", tokenizer().name)


def test_too_few_training_tokens(tmp_path):
    folder = own_data(tmp_path / "data")
    (folder / "fineweb_train_000001.bin").unlink()
    write_shard(folder / TRAIN, [BOS, *range(5, 105)])
    (folder / "manifest.json").unlink()
    refusal(main(CHECK, tmp_path / "out", folder), "101", "MICRO_BATCH_TOKENS")


def test_a_real_process_prints_one_line_and_exits_with_2(tmp_path):
    refusal(spawn(CHECK, tmp_path / "out", data_path=tmp_path / "nowhere"), "DATA_PATH")


def test_a_failed_check_loses_nothing(tmp_path):
    """A run's folder is as it was after a refused run, and after a successful check: the log of the run included."""
    shutil.copytree(base_run(), tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    folder = own_data(tmp_path / "data")
    os.truncate(folder / TRAIN, 1000)
    refusal(main(RUN, tmp_path / "out", folder), TRAIN)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    main(CHECK, tmp_path / "out").ok()
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_validation_shards_are_not_mixed_with_the_sidecar():
    """fineweb_val_*.bin matches fineweb_val_bytes_*.bin, and must not: each stream has exactly its own files."""
    val = train_gpt.ValidationStream(config(RUN, data_path=str(data())))
    tokens = np.concatenate([read(data() / f"fineweb_val_00000{i}.bin") for i in (0, 1)])
    sizes = np.concatenate([read(data() / f"fineweb_val_bytes_00000{i}.bin") for i in (0, 1)])
    assert (val.tokens == tokens).all() and (val.bytes == sizes).all()
    assert val.targets == len(tokens) - 1 and (val.target_bytes == sizes[1:]).all() and val.byte_source == "sidecar"
    assert (val.starts == np.flatnonzero(tokens == BOS)).all()


def test_files_that_are_no_shards_are_left_alone(tmp_path):
    folder = own_data(tmp_path / "data")
    for name in ("fineweb_val_bytes_x.bin", "fineweb_train_old.bin", "fineweb_val_000000.bin.part", "notes.txt"):
        (folder / name).write_bytes(b"not a shard")
    main(CHECK, tmp_path / "out", folder).ok()


def test_the_fingerprint(tmp_path):
    cfg = config(RUN, data_path=str(data()))
    found = train_gpt.fingerprint(cfg, train_gpt.ValidationStream(cfg))
    promised = json.loads((data() / "manifest.json").read_text())
    assert (
        found["val_documents"] == promised["val"]["documents"]
        and found["val_bytes"] == promised["val"]["bytes"]
        and found["manifest"]
    )
    assert found["dataset"] == "other" and found["val_targets"] == found["val_tokens"] - 1
    folder = own_data(tmp_path / "data")
    (folder / "manifest.json").unlink()
    edit(VAL, put(5, 77))(folder)
    cfg = config(RUN, data_path=str(folder))
    other = train_gpt.fingerprint(cfg, train_gpt.ValidationStream(cfg))
    assert other["val_sha256"] != found["val_sha256"] and not other["manifest"]


# ---- bytes of a plain tokenizer, without a sidecar ----


def byte_counts(texts, tmp_path, model=None, vocab: int = VOCAB) -> tuple[np.ndarray, np.ndarray]:
    """(bytes by the program, document starts) of the texts as a validation stream without a sidecar."""
    streams = [encode(text, model)[0] for text in texts]
    folder = tmp_path / "plain"
    folder.mkdir(exist_ok=True)
    write_shard(folder / VAL, np.concatenate(streams))
    cfg = config(RUN, data_path=str(folder), tokenizer_path=str(model or tokenizer()), vocab_size=vocab)
    val = train_gpt.ValidationStream(cfg)
    assert val.byte_source == "tokenizer"
    return val.bytes, val.starts


HOSTILE = [
    "plain words here",
    "",
    " ",
    "a",
    " leading",
    "trailing ",
    "  two  spaces   inside ",
    "tabs\tand\nlines\r\n\n",
    "北京 said 🙂🙂",
    "\u00a0nbsp\u00a0",
    "e\u0301 combining",
    "\u200bzero\u200bwidth",
    "\x00nul\x01",
    "\ufb01 ligature",
    "👨\u200d👩\u200d👧",
    "x" * 300,
    "<s>",
    "</s> <unk> <0x41>",
    "ÀÈÌ" * 40,
    "\ufeffbom",
    "\U0010ffff",
    "…—“”",
]


def test_plain_tokenizer_bytes_on_hostile_text(tmp_path):
    """An identity-normalising tokenizer with byte fallback: every document's bytes are its UTF-8 bytes, BOS counts
    nothing."""
    counts, starts = byte_counts(HOSTILE, tmp_path)
    assert not counts[starts].any()
    for text, part in zip(HOSTILE, np.split(counts, starts[1:])):
        assert part.sum() == len(text.encode()), repr(text)


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(
        st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\u2581"), max_size=60),
        min_size=1,
        max_size=5,
    ).filter(any)  # a stream without bytes is refused
)
def test_plain_tokenizer_bytes_on_any_text(texts, tmp_path_factory):
    counts, starts = byte_counts(texts, tmp_path_factory.mktemp("any"))
    for text, part in zip(texts, np.split(counts, starts[1:])):
        assert part.sum() == len(text.encode()), repr(text)


def test_stripping_tokenizer_bytes(tmp_path):
    """SentencePiece's usual rules (extra white space removed) lose only what they strip at the ends, when there is none
    inside."""
    model = tokenizer(remove_extra_whitespaces=True)
    texts = ["plain words here", "  leading", "trailing   ", " both ", "北京 🙂", "a"]
    counts, starts = byte_counts(texts, tmp_path, model)
    for text, part in zip(texts, np.split(counts, starts[1:])):
        assert part.sum() == len(text.strip().encode()), repr(text)


def test_pieces_with_spaces_inside(tmp_path):
    """Pieces that span words hold spaces that are not at their beginning: one byte each, not the three of
    SentencePiece's marker."""
    model = tokenizer(
        lines=(
            "the of and river stone",
            "quietly home again said nothing",
            "of the of the of the",
            "北京 the naive zebra under over light maybe",
        )
        * 20,
        split_by_whitespace=False,
        vocab_size=VOCAB,
        hard_vocab_limit=False,
    )
    texts = ["the of and river stone", "of the of the of the", "stone of the river"]
    assert any("\u2581" in piece[1:] for piece in processor(model).encode(texts[1], out_type=str))
    counts, starts = byte_counts(texts, tmp_path, model)
    for text, part in zip(texts, np.split(counts, starts[1:])):
        assert part.sum() == len(text.encode()), repr(text)


def test_a_tokenizer_without_a_dummy_prefix(tmp_path):
    """It adds no space of its own, so a space that opens a document is the document's."""
    model = tokenizer(add_dummy_prefix=False)
    texts = ["the river", " the river", "  the", "a"]
    counts, starts = byte_counts(texts, tmp_path, model)
    for text, part in zip(texts, np.split(counts, starts[1:])):
        assert part.sum() == len(text.encode()), repr(text)


UNSPACED = ("theofandriverstone", "quietlyhomeagain") * 20
WHITE_SPACE = {
    "prefix": {},
    "no prefix": {"add_dummy_prefix": False},
    "suffix": {"treat_whitespace_as_suffix": True},
    "suffix, none added": {"treat_whitespace_as_suffix": True, "add_dummy_prefix": False},
    "unigram": {"model_type": "unigram", "hard_vocab_limit": False},
    "characters": {"model_type": "char", "hard_vocab_limit": False},
    "trained without spaces": {"lines": UNSPACED, "add_dummy_prefix": False, "hard_vocab_limit": False},
    "user-defined symbols": {"user_defined_symbols": "the,\u2581of,\u2581"},
}
NOT_ESCAPED = b"\x1a\x02\x28\x00"  # merged into a model: normalizer_spec { escape_whitespaces: false }


def respelt(name: str, spelling: str, folder):
    """A tokenizer of WHITE_SPACE; with spaces that have no piece, so that bytes spell them; that stay spaces."""
    model = tokenizer(**WHITE_SPACE[name]).read_bytes()
    if "in bytes" in spelling:
        model = model.replace("\u2581".encode(), "\u25a1".encode())
    if "not escaped" in spelling:
        model += NOT_ESCAPED
    (folder / "respelt.model").write_bytes(model)
    return folder / "respelt.model"


@pytest.mark.parametrize("spelling", ["escaped", "not escaped", "in bytes", "in bytes, not escaped"])
@pytest.mark.parametrize("name", WHITE_SPACE)
@settings(max_examples=8, deadline=None)
@given(
    texts=st.lists(
        st.text(
            st.sampled_from("  the of\n.é北🙂")
            | st.characters(exclude_categories=("Cs",), exclude_characters="\u2581\u25a1"),
            max_size=40,
        ),
        min_size=1,
        max_size=4,
    ).filter(any)
)
def test_bytes_whatever_a_tokenizer_does_with_spaces(name, spelling, texts, tmp_path_factory):
    """The table gives the UTF-8 bytes of the text."""
    folder = tmp_path_factory.mktemp("options")
    model = respelt(name, spelling, folder)
    counts, starts = byte_counts(texts, folder, model, len(processor(model)))
    assert not counts[starts].any()
    for text, part in zip(texts, np.split(counts, starts[1:])):
        assert part.sum() == len(text.encode()), (text, processor(model).encode(text, out_type=str))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"byte_fallback": False, "hard_vocab_limit": False}, "the ☃"),
        ({"user_defined_symbols": "\ue001,\ue002,\ue003,\ue004"}, "the"),
        ({"user_defined_symbols": "one,two,three,four,five,\ue001"}, "the"),
    ],
)
def test_a_tokenizer_whose_pieces_do_not_tell_the_bytes(options, text, tmp_path):
    """What stands for unknown text has bytes that no table knows; CaseOps operators have none, wherever they stand."""
    model = tokenizer(**options)
    with pytest.raises(train_gpt.UserError, match="needs a byte sidecar"):
        byte_counts([text, "of"], tmp_path, model, len(processor(model)))


def test_tokenizer_of_another_size(tmp_path):
    folder = own_data(tmp_path / "data")
    remove("fineweb_val_bytes_*", "manifest.json")(folder)
    refusal(main({**CHECK, "vocab_size": 512}, tmp_path / "out", folder), "TOKENIZER_PATH", "320", "VOCAB_SIZE=512")
    (folder / "tokenizer.model").unlink()
    refusal(main(CHECK, tmp_path / "out", folder), "TOKENIZER_PATH", "tokenizer.model")


def test_a_damaged_tokenizer(tmp_path):
    folder = own_data(tmp_path / "data")
    remove("fineweb_val_bytes_*", "manifest.json")(folder)
    (folder / "tokenizer.model").write_bytes(b"not a model")
    refusal(main(CHECK, tmp_path / "out", folder), "TOKENIZER_PATH")
