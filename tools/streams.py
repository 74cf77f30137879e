"""Token streams as they lie in a data folder: shards, their values, and the text that the tokens spell."""

import re
from itertools import pairwise
from pathlib import Path

import numpy as np

import lossless_caps
from prepare_data import BOS_ID, DataError, read_shard


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


def document_texts(tokens: np.ndarray, model: Path, bos: int = BOS_ID) -> list[str]:
    """The documents as their tokens spell them, CaseOps undone: what SentencePiece normalises away is not there.

    Raises `DataError` where `model` is no SentencePiece model.
    """
    import sentencepiece

    try:
        sp = sentencepiece.SentencePieceProcessor(model_file=str(model))
    except (OSError, RuntimeError):
        raise DataError(
            f"{model}: not a SentencePiece model; the tokenizer of the data is needed to turn tokens into text"
        ) from None
    caseops = not any(sp.is_unknown(sp.piece_to_id(operator)) for operator in lossless_caps.OPERATORS)
    texts = []
    for start, end in pairwise([*np.flatnonzero(tokens == bos), len(tokens)]):
        text = sp.decode(tokens[start + 1 : end].tolist())
        try:
            texts.append(lossless_caps.decode(text) if caseops else text)
        except lossless_caps.CaseOpsError:
            # Normalisation made a capital and its accent one character: the operators say nothing any more.
            texts.append(text.translate(dict.fromkeys(map(ord, lossless_caps.OPERATORS))))
    return texts
