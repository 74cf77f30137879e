"""Validation data that can be tampered with: other tokens, other documents, other lengths, written as a data folder."""

import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from prepare_data import MAGIC, VERSION, DataError
from tools.audit.outcome import Broken, NotRun
from tools.streams import join_ids, join_operators, read_stream, shard_paths

# trust.md A6: validation tokens -> bytes of the known public exports (none where no exact count is published). Two of
# them stand in train_gpt.py and prepare_data.py as well: an audit that asked what it audits would believe its word.
KNOWN = {
    62_021_632: (),
    63_779_840: (),
    40_540_160: (151_078_222, 151_080_891),
    40_548_352: (),
    40_546_304: (),
    40_542_208: (),
    40_538_112: (),
    47_853_344: (151_074_309, 151_080_645),
    45_508_608: (),
    45_514_752: (),
}


@dataclass
class Dataset:
    """A validation stream: uint16 tokens and the bytes of each (None without a sidecar)."""

    tokens: np.ndarray
    sizes: np.ndarray | None
    bos: int
    folder: Path  # training shards, tokenizer and manifest lie here
    apart: tuple[int, ...] = ()  # tokens that no tampering may put beside others: the scorer would join them

    @property
    def starts(self) -> np.ndarray:
        return np.flatnonzero(self.tokens == self.bos)

    def documents(self) -> list[tuple[int, int]]:
        return list(pairwise([*self.starts.tolist(), len(self.tokens)]))

    def with_tokens(self, tokens: np.ndarray) -> "Dataset":
        """Other tokens at the same places; BOS has no bytes."""
        sizes = None if self.sizes is None else np.where(tokens == self.bos, 0, self.sizes)
        return Dataset(tokens, sizes, self.bos, self.folder)

    def of_documents(self, pieces: list[tuple[int, int]]) -> "Dataset":
        """The stream of the given stretches of this one, each beginning with BOS."""
        places = np.concatenate([np.arange(*piece) for piece in pieces])
        sizes = None if self.sizes is None else self.sizes[places]
        return Dataset(self.tokens[places], sizes, self.bos, self.folder)

    def joined(self) -> "Dataset":
        """The stream as a scorer with JOIN_OPERATORS=1 reads it, which leaves it as it is when it reads it again."""
        model = next(self.folder.glob("*.model"), None)
        if model is None:
            raise NotRun(f"{self.folder}: no tokenizer, which JOIN_OPERATORS=1 needs")
        joined = join_operators(self.tokens, self.sizes, model)
        return Dataset(*joined, self.bos, self.folder, apart=join_ids(model)[:3])

    def write(self, folder: Path) -> Path:
        """A data folder without a manifest: this stream, and links to the training shards and the tokenizer."""
        folder.mkdir(parents=True)
        for path in (*shard_paths(self.folder, "train"), *self.folder.glob("*.model")):
            (folder / path.name).symlink_to(path.resolve())
        for name, values in (("val", self.tokens), ("val_bytes", self.sizes)):
            if values is not None:
                header = np.zeros(256, "<i4")
                header[:3] = MAGIC, VERSION, len(values)
                (folder / f"fineweb_{name}_000000.bin").write_bytes(header.tobytes() + values.astype("<u2").tobytes())
        return folder


def load_dataset(folder: Path) -> Dataset:
    """The validation stream of a data folder.

    Raises `NotRun` where there is none, `Broken` where a shard is damaged.
    """
    if not shard_paths(folder, "val"):
        raise NotRun(f"{folder}: no fineweb_val_*.bin there")
    manifest = folder / "manifest.json"
    try:
        bos = json.loads(manifest.read_text()).get("bos_id", 1) if manifest.exists() else 1
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise Broken(f"{manifest}: no JSON object ({error})") from None
    try:
        sizes = read_stream(folder, "val_bytes") if shard_paths(folder, "val_bytes") else None
        return Dataset(read_stream(folder, "val"), sizes, bos, folder)
    except DataError as error:
        raise Broken(str(error)) from None
