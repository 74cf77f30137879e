"""JOIN_OPERATORS: a space and the CaseOps operator behind it as one token, in training and validation alike. And an
artifact that knows the form of its data."""

import dataclasses
import functools
import json
import shutil
from itertools import pairwise

import numpy as np
import pytest
import torch
from helpers import BOS, ROOT, RUN, VOCAB, base_run, config, main, own_data, scratch, tokenizer, write_shard
from hypothesis import given, settings
from hypothesis import strategies as st

import lossless_caps
import train_gpt
from tools.streams import join_operators, scored_stream

SPACE, TITLE, ALLCAPS, CAPNEXT = 9, 4, 5, 6
JOINED_TITLE, JOINED_ALLCAPS = 200, 201
CASED = ["the River", "THE stone of Home", "a iPhone said AGAIN", "quietly McDonald home"]


def joins() -> "train_gpt.Joins":
    return train_gpt.Joins(SPACE, {TITLE: JOINED_TITLE, ALLCAPS: JOINED_ALLCAPS})


@functools.cache
def case_tokenizer():
    return tokenizer(
        tuple(map(lossless_caps.encode, CASED * 40)),
        user_defined_symbols=",".join(lossless_caps.OPERATORS),
        add_dummy_prefix=False,
        hard_vocab_limit=False,
    )


def case_config(folder, **changes):
    import sentencepiece

    model = case_tokenizer()
    shutil.copy(model, folder / "tokenizer.model")
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(model)).vocab_size()
    return config(RUN, data_path=str(folder), vocab_size=pieces, join_operators=True, **changes)


def one_by_one(tokens, sizes):
    """The same, token by token."""
    out = []
    for token, size in zip(tokens, sizes):
        if out and out[-1][0] == SPACE and token in (TITLE, ALLCAPS):
            joined = JOINED_TITLE if token == TITLE else JOINED_ALLCAPS
            out[-1] = joined, out[-1][1] + size
        else:
            out.append((token, size))
    return [list(column) for column in zip(*out)] or [[], []]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from([SPACE, TITLE, ALLCAPS, CAPNEXT, BOS, 20, JOINED_TITLE]), max_size=30))
def test_pairs_become_one_token_and_keep_their_bytes(values):
    tokens = np.array(values, np.uint16)
    sizes = np.arange(len(tokens), dtype=np.uint16)
    before = tokens.copy(), sizes.copy()
    joined, joined_sizes = train_gpt.join_pairs(joins(), tokens, sizes)
    assert [joined.tolist(), joined_sizes.tolist()] == one_by_one(values, sizes.tolist())
    assert joined.dtype == joined_sizes.dtype == np.uint16 and joined_sizes.sum() == sizes.sum()
    assert (tokens == before[0]).all() and (sizes == before[1]).all()  # shards are only read
    again = train_gpt.join_pairs(joins(), joined)[0]
    assert (again == joined).all()  # an audit writes the joined stream and has it read again


def test_without_the_setting_the_stream_is_what_the_shard_holds():
    tokens = np.array([BOS, SPACE, TITLE], np.uint16)
    assert train_gpt.join_pairs(None, tokens)[0] is tokens and train_gpt.operator_joins(config()) is None


def test_the_joined_ids_are_those_of_bytes_that_no_text_holds(tmp_path):
    import sentencepiece

    cfg = case_config(tmp_path)
    sp = sentencepiece.SentencePieceProcessor(model_file=str(case_tokenizer()))
    found = train_gpt.operator_joins(cfg)
    assert sp.id_to_piece(found.space) == "\u2581"
    pieces = {sp.id_to_piece(operator): sp.id_to_piece(token) for operator, token in found.joined.items()}
    assert pieces == {lossless_caps.TITLE: "<0xC0>", lossless_caps.ALLCAPS: "<0xC1>"}
    with pytest.raises(train_gpt.UserError, match="JOIN_OPERATORS=1: .* no CaseOps tokenizer"):
        train_gpt.operator_joins(dataclasses.replace(cfg, tokenizer_path=str(tokenizer()), vocab_size=VOCAB))


def written(folder, texts: int = 60):
    """Shards of cased text: (config, all validation tokens, their bytes)."""
    import prepare_data

    cfg = case_config(folder)
    encoder = prepare_data.Encoder(case_tokenizer(), lossless_caps.NAME)
    rows = [encoder.tokens_and_bytes(CASED[i % 4]) for i in range(texts)]
    tokens = np.concatenate([np.append(BOS, ids) for ids, _ in rows]).astype(np.uint16)
    sizes = np.concatenate([np.append(0, counts) for _, counts in rows]).astype(np.uint16)
    third = len(tokens) // 3
    for i, (start, end) in enumerate(pairwise((0, third, 2 * third, len(tokens)))):
        write_shard(folder / f"fineweb_train_{i:06d}.bin", tokens[start:end])
    write_shard(folder / "fineweb_val_000000.bin", tokens)
    write_shard(folder / "fineweb_val_bytes_000000.bin", sizes)
    return cfg, tokens, sizes


def test_the_validation_stream_and_its_documents(tmp_path):
    """Tokens, bytes and documents after joining; tools/streams.py joins by code of its own."""
    cfg, tokens, sizes = written(tmp_path)
    val = train_gpt.ValidationStream(cfg)
    assert (val.tokens == tokens).all()  # the data is identified by its tokens as they are
    val.join(cfg)
    expected = join_operators(tokens, sizes, case_tokenizer())
    assert len(tokens) - len(val.tokens) == 60  # an operator behind a space in every text
    assert (val.tokens == expected[0]).all() and (val.bytes == expected[1]).all()
    assert val.bytes.sum() == sizes.sum() and val.targets == len(val.tokens) - 1
    assert (val.starts == np.flatnonzero(val.tokens == BOS)).all() and len(val.starts) == 60
    assert val.lengths.sum() == val.targets
    again = scored_stream(tmp_path, val.targets)
    assert (again[0] == val.tokens).all() and (again[1] == val.bytes).all()
    assert (scored_stream(tmp_path, len(tokens) - 1)[0] == tokens).all()


@pytest.mark.parametrize("size", (7, 1 << 20))
def test_training_reads_joined_blocks_anywhere_in_the_stream(size, tmp_path, monkeypatch):
    cfg, tokens, _ = written(tmp_path)
    cut = train_gpt.train_blocks
    monkeypatch.setattr(train_gpt, "train_blocks", lambda cfg: cut(cfg, size))
    train_gpt.count_pairs.cache_clear()
    stream = train_gpt.TrainStream(dataclasses.replace(cfg, micro_batch_tokens=50))
    whole = np.concatenate([join_operators(block, None, case_tokenizer())[0] for _, block in cut(cfg, size)])
    assert stream.tokens == len(whole) < len(tokens)
    for start, count in ((0, 40), (31, 100), (len(whole) - 9, 30), (3 * len(whole) + 5, 1), (0, 2 * len(whole))):
        assert (stream.read(start, count) == np.take(whole, np.arange(start, start + count), mode="wrap")).all()
    batch = stream.micro_batch(10, 50, 20)
    assert batch.tokens.tolist() == whole[10:60].tolist() and batch.targets.tolist() == whole[11:61].tolist()
    train_gpt.count_pairs.cache_clear()


def test_rows_of_joined_tokens_start_from_their_parts():
    embedding = torch.randn(300, 8)
    before = embedding.clone()
    train_gpt.init_joined(embedding, joins())
    for operator, row in ((TITLE, JOINED_TITLE), (ALLCAPS, JOINED_ALLCAPS)):
        parts = 0.4 * before[SPACE] + 0.6 * before[operator]
        torch.testing.assert_close(embedding[row], parts / parts.norm() * before[operator].norm())
    others = np.setdiff1d(np.arange(300), [JOINED_TITLE, JOINED_ALLCAPS])
    assert torch.equal(embedding[others], before[others])


def test_no_recipe_of_a_published_system_joins():
    assert not train_gpt.Config().join_operators
    assert not [path.name for path in (ROOT / "recipes").glob("*.env") if "JOIN_OPERATORS" in path.read_text()]


# ---- an artifact and data of another form ----


def refusal(outcome) -> str:
    lines = outcome.err.strip().splitlines()
    assert outcome.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), outcome.err
    return lines[0]


def other_manifest(folder, **changes):
    path = own_data(folder) / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


def test_data_of_another_form_is_not_scored(tmp_path):
    stored = train_gpt.read_artifact(base_run() / "model.bin")[0]["meta"]
    assert stored["transform"] == "none" and len(stored["tokenizer_sha256"]) == 64
    artifact = shutil.copytree(base_run(), tmp_path / "artifact")
    data = other_manifest(tmp_path / "data", transform=lossless_caps.BEFORE_SPACE)
    line = refusal(main({"ttt_eval_only": True}, artifact, data))
    assert "model.bin" in line and "transform none" in line and lossless_caps.BEFORE_SPACE in line, line
    assert not (artifact / "eval_result.json").exists()


def test_joining_needs_the_first_form(tmp_path):
    assert train_gpt.BEHIND_SPACE == lossless_caps.BEHIND_SPACE
    data = other_manifest(tmp_path / "data", transform=lossless_caps.BEFORE_SPACE)
    line = refusal(main({**RUN, "check_only": True, "join_operators": True}, scratch() / "joins", data))
    assert "JOIN_OPERATORS=1" in line and lossless_caps.BEFORE_SPACE in line and "set JOIN_OPERATORS=0" in line
