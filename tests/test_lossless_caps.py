"""CaseOps: golden vectors of the published transform, reversibility, and byte counts for any cut into pieces."""

import json
import pickle
from itertools import pairwise
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

import prepare_data
from lossless_caps import ALLCAPS as A
from lossless_caps import BEFORE_SPACE, BEHIND_SPACE, OPERATORS, CaseOpsError, decode, encode, piece_bytes
from lossless_caps import CAPNEXT as N
from lossless_caps import ESC as E
from lossless_caps import TITLE as T

GOLDEN = Path(__file__).parent / "golden"
TEXT = [json.loads(line) for line in (GOLDEN / "caseops_text.jsonl").open(encoding="utf-8")]
TOKENS = [json.loads(line) for line in (GOLDEN / "caseops_tokens.jsonl").open(encoding="utf-8")]
# The second form: the published encodings with operators and spaces swapped character by character, with the tokens
# and bytes of the public tokenizer for some.
BEFORE = [json.loads(line) for line in (GOLDEN / "caseops_before_space.jsonl").open(encoding="utf-8")]
# Letters, operators and their neighbours are likely; so is everything that makes UTF-8 lengths differ.
CHARACTERS = st.one_of(
    st.sampled_from("abzABZ" + OPERATORS),
    st.sampled_from(" .'1\n\0\ue000\ue005\u00e9\u00c9\u0130\u0131\u212a\U0001f600"),
    st.characters(exclude_categories=["Cs"]),
)
STRINGS = st.lists(CHARACTERS, max_size=40).map("".join)
FORMS = st.sampled_from([BEHIND_SPACE, BEFORE_SPACE])


@pytest.mark.parametrize("row", TEXT, ids=range(len(TEXT)))
def test_golden_text(row):
    assert encode(row["text"]) == row["encoded"]
    assert decode(row["encoded"]) == row["text"]


def test_golden_tokens():
    sp = sentencepiece.SentencePieceProcessor(model_file=str(GOLDEN / "fineweb_8192_caseops.model"))
    for row in TOKENS:
        ids, surfaces = prepare_data.encode_pieces(sp, encode(row["text"]))
        assert (ids, piece_bytes(surfaces), len(row["text"].encode())) == (row["ids"], row["bytes"], row["utf8"]), row[
            "text"
        ]


@pytest.mark.parametrize(
    ("text", "encoded"),
    [
        ("the", "the"),
        ("The", T + "the"),
        ("THE", A + "the"),
        ("I", T + "i"),
        ("iPhone", f"i{N}phone"),
        ("McDONALD", f"{T}mc{N}d{N}o{N}n{N}a{N}l{N}d"),
        ("aBCd", f"a{N}b{N}cd"),
        ("XYz", f"{T}x{N}yz"),
        ("DON'T", f"{A}don'{T}t"),
        ("A1B", f"{T}a1{T}b"),
        ("ÉCOLE", f"É{A}cole"),
        (f"x{T}y", f"x{E}{T}y"),
        (E * 2, E * 4),
        ("\ue000A", f"\ue000{T}a"),
        ("", ""),
        ("\u212aELVIN", f"\u212a{A}elvin"),
        ("\ud800A", f"\ud800{T}a"),
    ],
)
def test_rules(text, encoded):
    assert encode(text) == encoded
    assert decode(encoded) == text


@pytest.mark.parametrize(
    ("text", "encoded"),
    [
        ("a The", f"a{T} the"),
        (" NASA", f"{A} nasa"),
        ("The", f"{T}the"),
        ("  I", f" {T} i"),
        ("\nThe", f"\n{T}the"),
        (" iPhone", f" i{N}phone"),
        (" McDonald", f"{T} mc{N}donald"),
        ("A THE", f"{T}a{A} the"),
        (f"{T} the", f"{E}{T} the"),  # raw operators: ESC tells that the space is the text's own
        (f"{T} The", f"{E}{T}{T} the"),
        (f"{E} The", f"{E}{E}{T} the"),
        ("\u00a0The", f"\u00a0{T}the"),  # only U+0020 moves
    ],
)
def test_rules_of_the_operator_before_the_space(text, encoded):
    assert encode(text, BEFORE_SPACE) == encoded
    assert decode(encoded, BEFORE_SPACE) == text


@pytest.mark.parametrize("row", BEFORE, ids=range(len(BEFORE)))
def test_golden_vectors_of_the_second_form(row):
    assert encode(row["text"], BEFORE_SPACE) == row["encoded"]
    assert decode(row["encoded"], BEFORE_SPACE) == row["text"]
    if "ids" in row:
        sp = sentencepiece.SentencePieceProcessor(model_file=str(GOLDEN / "fineweb_8192_caseops.model"))
        ids, surfaces = prepare_data.encode_pieces(sp, row["encoded"])
        assert (ids, piece_bytes(surfaces, BEFORE_SPACE)) == (row["ids"], row["bytes"])


@pytest.mark.parametrize("row", TEXT, ids=range(len(TEXT)))
def test_forms_differ_only_in_where_an_operator_stands(row):
    before = encode(row["text"], BEFORE_SPACE)
    assert decode(before, BEFORE_SPACE) == row["text"]
    assert sorted(before) == sorted(row["encoded"])
    assert [c for c in before if c in OPERATORS] == [c for c in row["encoded"] if c in OPERATORS]


def test_one_form_is_no_spelling_of_the_other():
    with pytest.raises(CaseOpsError, match="TITLE is not followed by an ASCII letter at character 1"):
        decode(encode("1 The", BEFORE_SPACE))


@given(STRINGS, FORMS)
def test_round_trip(text, form):
    assert decode(encode(text, form), form) == text


@given(st.text(st.characters(), max_size=40), FORMS)  # lone surrogates too
def test_round_trip_of_any_string(text, form):
    assert decode(encode(text, form), form) == text


@given(STRINGS, st.lists(st.integers(0, 80)), FORMS)
def test_bytes_of_any_partition(text, cuts, form):
    encoded = encode(text, form)
    cuts = [0, *sorted(min(cut, len(encoded)) for cut in cuts), len(encoded)]
    surfaces = [encoded[start:end] for start, end in pairwise(cuts)]
    counts = piece_bytes(surfaces, form)
    assert len(counts) == len(surfaces)
    assert sum(counts) == len(text.encode())
    # Cut at every character: an operator counts 0 unless ESC stands before it, everything else its own UTF-8 length.
    escaped = False
    for char, count in zip(encoded, piece_bytes(list(encoded), form), strict=True):
        is_operator = char in OPERATORS and not escaped
        assert count == (0 if is_operator else len(char.encode()))
        escaped = is_operator and char == E


@given(st.lists(st.sampled_from("abA 1\u00e9\ue000" + OPERATORS), max_size=10).map("".join), FORMS)
def test_decode_and_piece_bytes_accept_the_same_strings(encoded, form):
    try:
        text = decode(encoded, form)
    except CaseOpsError as error:
        assert encoded[error.position] in OPERATORS
        with pytest.raises(CaseOpsError):
            piece_bytes(list(encoded), form)
    else:
        assert sum(piece_bytes(list(encoded), form)) == len(text.encode())


@pytest.mark.parametrize(
    ("encoded", "position"),
    [
        (T, 0),
        ("a " + A, 2),
        ("ab" + N, 2),
        (f"{E}{E}{E}", 2),  # dangling
        (f"{T}{T}a", 0),
        (f"{A}{T}a", 0),
        (f"a{N}{N}b", 1),
        (f"{N}{T}a", 0),  # doubled
        (f"ab{T}c", 2),
        (f"{A}ab{A}c", 3),
        (f"{T}1", 0),
        (f"a {A} b", 2),
        (f"{N}é", 0),  # misplaced
        (f"{E}a", 0),
        (f"{T}{E}{T}", 0),
        (f"{N}{E}{T}a", 0),
        (f"{E}{T}{T}.", 2),  # around an escape
    ],
)
def test_malformed(encoded, position):
    for function in (decode, lambda text: piece_bytes([text[:1], text[1:]])):
        with pytest.raises(CaseOpsError, match=str(position)) as caught:
            function(encoded)
        assert caught.value.position == position
        assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("encoded", "text"),
    [
        (N + "a", "A"),
        (A + "a", "A"),
        (f"{T}{N}ab", "Ab"),
        (f"{A}a{N}b", "AB"),
        ("The", "The"),
        (f"{A}ab{E}{T}c", f"AB{T}c"),
    ],
)
def test_unusual_spellings_are_read(encoded, text):
    assert decode(encoded) == text
    assert piece_bytes([encoded]) == [len(text.encode())]


def test_state_is_carried_across_pieces():
    assert piece_bytes([T, "the", " ", E, T, ".", A, "", "ab"]) == [0, 3, 1, 0, 3, 1, 0, 0, 2]
    assert piece_bytes([]) == []


def test_lone_surrogate_has_no_bytes():
    with pytest.raises(CaseOpsError, match="surrogate") as caught:
        piece_bytes(["ab ", T + "c\ud800"])
    assert caught.value.position == 5


def test_error_survives_pickling():
    error = pickle.loads(pickle.dumps(CaseOpsError("TITLE is lost", 7)))
    assert (str(error), error.position) == ("TITLE is lost at character 7", 7)
