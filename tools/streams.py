"""Token streams as they lie in a data folder: shards, their values, and the text that the tokens spell."""

import json
import re
from itertools import pairwise
from pathlib import Path

import numpy as np

import lossless_caps
from prepare_data import BOS_ID, MANIFEST, TOKENIZER, DataError, named_form, read_shard


def shard_paths(folder: Path, split: str) -> list[Path]:
    """fineweb_SPLIT_*.bin in name order; `val` never takes the shards of `val_bytes`."""
    pattern = re.compile(rf"fineweb_{split}_\d+\.bin")
    return sorted(path for path in folder.glob("fineweb_*.bin") if pattern.fullmatch(path.name))


def read_stream(folder: Path, split: str, limit: int | None = None) -> np.ndarray:
    """The uint16 values of all shards of a split in order, at most `limit`.

    Raises `DataError` where there is no shard or a damaged one.
    """
    paths = shard_paths(folder, split)
    if not paths:
        raise DataError(f"{folder}: no fineweb_{split}_*.bin there; give the folder that the run was trained on")
    values, held = [], 0
    for path in paths:
        values.append(read_shard(path)[: None if limit is None else limit - held])
        held += len(values[-1])
        if limit is not None and held >= limit:
            break
    return np.concatenate(values)


def load_tokenizer(model: Path):
    """The SentencePieceProcessor of a file; raises `DataError` where it holds none."""
    import sentencepiece

    try:
        return sentencepiece.SentencePieceProcessor(model_file=str(model))
    except (OSError, RuntimeError):
        raise DataError(
            f"{model}: not a SentencePiece model; the tokenizer of the data is needed to turn tokens into text"
        ) from None


def transform_of(model: Path) -> str:
    """The name of the form of CaseOps in which the tokens of a data folder spell its documents, or "none": by the
    manifest beside the tokenizer, else by the tokenizer's own name, else by its operators."""
    manifest = model.with_name(MANIFEST)
    if manifest.is_file() and (named := json.loads(manifest.read_text()).get("transform")):
        return named
    sp = load_tokenizer(model)
    if any(sp.is_unknown(sp.piece_to_id(operator)) for operator in lossless_caps.OPERATORS):
        return "none"
    return named_form(sp) or lossless_caps.NAME


def document_texts(tokens: np.ndarray, model: Path, bos: int = BOS_ID) -> list[str]:
    """The documents as their tokens spell them, CaseOps undone: what SentencePiece normalises away is not there.

    Raises `DataError` where `model` is no SentencePiece model.
    """
    return [text for text, _ in decoded_documents(tokens, model, bos)]


def decoded_documents(tokens: np.ndarray, model: Path, bos: int = BOS_ID) -> list[tuple[str, bool]]:
    """`document_texts`, and of each whether it is well-formed text of the transform: where it is not, the operators
    are dropped."""
    sp = load_tokenizer(model)
    form = transform_of(model)
    found = []
    for start, end in pairwise([*np.flatnonzero(tokens == bos), len(tokens)]):
        text = sp.decode(tokens[start + 1 : end].tolist())
        try:
            found.append((text if form == "none" else lossless_caps.decode(text, form), True))
        except lossless_caps.CaseOpsError:
            # Normalisation made a capital and its accent one character: the operators say nothing any more.
            found.append((text.translate(dict.fromkeys(map(ord, lossless_caps.OPERATORS))), False))
    return found


def join_ids(model: Path) -> tuple[int, ...]:
    """Tokens of a space, TITLE, ALLCAPS, and of the bytes 0xC0 and 0xC1."""
    sp = load_tokenizer(model)
    return tuple(map(sp.piece_to_id, ("\u2581", *lossless_caps.OPERATORS[:2], "<0xC0>", "<0xC1>")))


def join_operators(tokens: np.ndarray, sizes: np.ndarray | None, model: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """The stream that a run with JOIN_OPERATORS=1 reads: a space and TITLE are the token of byte 0xC0, a space and
    ALLCAPS that of 0xC1, with the bytes of both. It is written apart from train_gpt.py, so that each shows the other's
    mistakes."""
    space, title, allcaps, c0, c1 = join_ids(model)
    follows = np.append(tokens[1:], 0)
    titles, capitals = ((tokens == space) & (follows == operator) for operator in (title, allcaps))
    pairs = titles | capitals
    kept = ~np.append(False, pairs[:-1])
    joined = np.where(titles, c0, np.where(capitals, c1, tokens)).astype(tokens.dtype)[kept]
    if sizes is None:
        return joined, None
    return joined, np.add.reduceat(sizes, np.flatnonzero(kept), dtype=sizes.dtype)


def scored_stream(folder: Path, targets: int) -> tuple[np.ndarray, np.ndarray]:
    """Validation tokens and their bytes as a run that scored so many targets has read them: JOIN_OPERATORS leaves fewer
    than the shards hold."""
    tokens, sizes = read_stream(folder, "val"), read_stream(folder, "val_bytes")
    model = folder / TOKENIZER
    if targets < len(tokens) - 1 and model.is_file() and transform_of(model) == lossless_caps.BEHIND_SPACE:
        joined = join_operators(tokens, sizes, model)
        if len(joined[0]) == targets + 1:
            return joined
    return tokens, sizes
