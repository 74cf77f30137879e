"""What the checks share: the list of them, the runs that several of them look at, and how they word a verdict."""

import collections
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tools.audit.outcome import Broken, NotRun
from tools.audit.run import Artifact, Scored, unpack
from tools.audit.tamper import Dataset, load_dataset


class Audit:
    """One artifact, one data folder, and the runs that several checks look at."""

    def __init__(
        self,
        artifact: Artifact,
        data: Path | None,
        targets: int = 6000,
        seeds: tuple[Path, ...] = (),
        baseline: tuple[float, ...] = (),
    ):
        self.artifact = artifact
        self.folder = artifact.folder
        self.data_path = data
        self.targets = targets
        self.seeds = seeds
        self.baseline = baseline
        self.kept = {}  # name -> what `once` has made, or the exception that making it raised
        self.locks = collections.defaultdict(threading.Lock)
        self.lock = threading.Lock()

    def once(self, name: str, make: Callable):
        """make(), computed once for all the checks that ask."""
        with self.lock:
            lock = self.locks[name]
        with lock:
            if name not in self.kept:
                try:
                    self.kept[name] = make()
                except Exception as error:
                    self.kept[name] = error
        if isinstance(self.kept[name], Exception):
            raise self.kept[name]
        return self.kept[name]

    @property
    def data(self) -> Dataset:
        if self.data_path is None:
            raise NotRun("no --data")
        return self.once("data", lambda: load_dataset(self.data_path))

    @property
    def scored(self) -> Dataset:
        """The data as the artifact's scorer reads it, which is what its ledger holds a score of."""
        joins = self.artifact.settings.get("join_operators")
        return self.once("scored", self.data.joined) if joins else self.data

    @property
    def source(self) -> str:
        if not (self.folder / "train_gpt.py").is_file():
            raise NotRun("no train_gpt.py in the folder")
        return self.once("source", lambda: unpack((self.folder / "train_gpt.py").read_bytes()))

    @property
    def excerpt(self) -> Dataset:
        """Whole documents from the start of the stream, the long ones cut short: about ``targets`` targets."""

        def cut():
            data, pieces, longest = self.scored, [], self.targets // 4
            for start, end in data.documents():
                if end - start > 8:
                    pieces.append((start, min(end, start + longest)))
                if sum(b - a for a, b in pieces) > self.targets and len(pieces) > 5:
                    break
            if len(pieces) < 4:
                raise NotRun(f"{data.folder}: fewer than four documents to tamper with")
            return data.of_documents(pieces)

        return self.once("excerpt", cut)

    @property
    def base(self) -> Scored:
        """The scores of the excerpt as it is: what every tampered run is compared with."""
        return self.once("base", lambda: self.artifact.score(self.excerpt))

    @property
    def vocab(self) -> int:
        """Size of the vocabulary by the settings, else by the tokenizer, else by the tokens that occur."""
        size = self.artifact.settings.get("vocab_size")
        if not size and self.data_path and (model := next(self.data_path.glob("*.model"), None)):
            import sentencepiece

            size = sentencepiece.SentencePieceProcessor(model_file=str(model)).vocab_size()
        return size or int(self.data.tokens.max()) + 1

    @property
    def tolerance(self) -> float:
        """Nats within which two scores of the same thing agree: none on a CPU; on a GPU, four times what a second
        identical run differs by."""
        if self.artifact.device == "cpu":
            return 0.0
        again = self.once("again", lambda: self.artifact.score(self.excerpt))
        return 4 * float(np.abs(again.nats - self.base.nats).max()) + 1e-6

    def replaced(self, data: Dataset, places: np.ndarray, seed: int = 0) -> Dataset:
        """Other tokens at ``places`` (BOS stays), drawn from those that the validation set holds."""
        pool = np.unique(self.scored.tokens[:1_000_000])
        pool = pool[~np.isin(pool, [data.bos, *self.scored.apart])]
        rank = np.searchsorted(pool, data.tokens[places])
        other = pool[(rank + np.random.default_rng(seed).integers(1, len(pool), len(places))) % len(pool)]
        tokens = data.tokens.copy()
        tokens[places] = np.where(tokens[places] == data.bos, data.bos, other)
        return data.with_tokens(tokens)

    def segment(self) -> tuple[int, int, bool]:
        """Documents first..last of the excerpt's largest declared segment, and whether segments are declared at all
        (else the first document alone)."""
        count, segments = len(self.excerpt.starts), self.base.result.get("segments")
        if segments is None:
            return 0, 1, False
        if sum(segments) != count or min(segments) < 1:
            raise Broken(f"declares segments of {segments} documents for {count} documents")
        largest = int(np.argmax(segments))
        return sum(segments[:largest]), sum(segments[: largest + 1]), True


def moved(a: np.ndarray, b: np.ndarray, tolerance: float) -> np.ndarray:
    """Indices at which two ledgers differ."""
    return np.flatnonzero(~(np.abs(a - b) <= tolerance))


def small(a: Audit) -> bool:
    """Whether the whole validation set can be scored in an audit."""
    return len(a.scored.tokens) <= 1_000_000


def full_run(a: Audit) -> Scored:
    """The whole validation set, scored once without network."""
    return a.once("full", lambda: a.artifact.score(a.data_path, blocked=True))


def agreement(a: Audit) -> str:
    """How equal two scores had to be."""
    return f"equal within {a.tolerance:.1g}" if a.tolerance else "bit-equal"
