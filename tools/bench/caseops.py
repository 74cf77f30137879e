"""CaseOps beside per-character loops that give the same results."""

import argparse
from collections.abc import Iterator

import lossless_caps
from tools.bench.table import Row, compare
from tools.runs import ROOT


def encode_by_character(text: str) -> str:
    """CaseOps as a scan over characters: the plain reading of the rules in lossless_caps.py."""
    out, i = [], 0
    while i < len(text):
        if not (text[i].isascii() and text[i].isalpha()):
            out.append("\ue004" + text[i] if "\ue001" <= text[i] <= "\ue004" else text[i])
            i += 1
            continue
        end = i
        while end < len(text) and text[end].isascii() and text[end].isalpha():
            end += 1
        word, i = text[i:end], end
        if len(word) > 1 and word.isupper():
            out.append("\ue002" + word.lower())
            continue
        for k, letter in enumerate(word):
            if letter.isupper():
                out.append("\ue003" if k else "\ue001")
            out.append(letter.lower())
    return "".join(out)


def decode_by_character(text: str) -> str:
    """A state machine over the characters of well-formed text."""
    out, allcaps, capital, escaped = [], False, False, False
    for char in text:
        if escaped:
            out.append(char)
            escaped = allcaps = False
        elif char == "\ue004":
            escaped = True
        elif char == "\ue002":
            allcaps = True
        elif char in "\ue001\ue003":
            capital = True
        elif char.isascii() and char.isalpha():
            out.append(char.upper() if allcaps or capital else char)
            capital = False
        else:
            out.append(char)
            allcaps = False
    return "".join(out)


def piece_bytes_by_character(surfaces: list[str]) -> list[int]:
    """Bytes of each surface without operators, an escaped one counted."""
    counts, escaped = [], False
    for surface in surfaces:
        count = 0
        for char in surface:
            if not escaped and "\ue001" <= char <= "\ue004":
                escaped = char == "\ue004"
            else:
                count += len(char.encode())
                escaped = False
        counts.append(count)
    return counts


def caseops(args: argparse.Namespace) -> Iterator[Row]:
    """MB/s of encode, decode and piece_bytes beside per-character loops that give the same results."""
    import sentencepiece

    from prepare_data import Source, encode_pieces, parse_document, stdlib_documents

    source = Source("jsonl", (args.file,)) if args.file else Source("stdlib", documents=stdlib_documents())
    texts, size = [], 0
    for line in source.lines():
        texts.append(parse_document(line))
        size += len(texts[-1].encode())
        if size >= args.mb * 1e6:
            break
    encoded = [lossless_caps.encode(text) for text in texts]
    sp = sentencepiece.SentencePieceProcessor(model_file=str(ROOT / "tests/golden/fineweb_8192_caseops.model"))
    surfaces = [encode_pieces(sp, text)[1] for text in encoded]
    jobs = (
        ("encode", encode_by_character, lossless_caps.encode, texts),
        ("decode", decode_by_character, lossless_caps.decode, encoded),
        ("piece_bytes", piece_bytes_by_character, lossless_caps.piece_bytes, surfaces),
    )
    for what, reference, ours, inputs in jobs:
        if [*map(reference, inputs)] != [*map(ours, inputs)]:
            raise SystemExit(f"{what}: the two variants disagree")
        yield from compare(
            what,
            {
                "per character": lambda f=reference, x=inputs: [*map(f, x)],
                "lossless_caps": lambda f=ours, x=inputs: [*map(f, x)],
            },
            amount=size / 1e6,
            unit="MB/s",
            repeats=args.repeats,
        )
