"""Documents -> CaseOps -> SentencePiece -> token shards, byte sidecar, manifest.

    OUT/fineweb_train_000000.bin ...      header of 256 int32 (magic, version, token count), then uint16 tokens
    OUT/fineweb_val_000000.bin ...        the first --val-docs documents of the source, and nothing else
    OUT/fineweb_val_bytes_000000.bin ...  same format: bytes of the original text for each validation token
    OUT/tokenizer.model                   the SentencePiece model
    OUT/manifest.json                     counts, hashes, options; comes last: a folder without it is unfinished

A run writes in OUT/UNFINISHED and moves its files into OUT once all are complete. Of what lies in OUT it removes only
what an earlier run wrote.

Every document starts with BOS (id 1) and ends without EOS; a document may continue in the next shard. Documents that
hold no token (empty, only spaces) are skipped and counted. A training document whose tokens equal those of a validation
document is dropped and counted, so the splits are disjoint as the model sees them. For each validation document the
bytes of its tokens must equal the UTF-8 length of the source text less what SentencePiece strips at its ends, or
nothing is finished. Training text has no sidecar: its `bytes` in the manifest are its `utf8_bytes`.
"""

import argparse
import contextlib
import errno
import gzip
import hashlib
import io
import json
import lzma
import multiprocessing
import os
import re
import shutil
import signal
import sys
import sysconfig
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cache
from itertools import chain, compress, islice, pairwise
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import sentencepiece

import lossless_caps

MAGIC, VERSION, HEADER_BYTES = 20240520, 1, 1024
BOS_ID = 1
FORMAT = 1
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.model"
UNFINISHED = "UNFINISHED"  # the folder of a run at work
LOCK = "lock"  # in it
WRITTEN = "written.json"  # in it: what earlier runs wrote in OUT
OUR_NAMES = re.compile(r"manifest\.json|tokenizer\.model|fineweb_(?:train|val|val_bytes)_\d{6,}\.bin")
CHUNK_BYTES = 1 << 20  # documents travel to the workers in batches of about this size
FINEWEB_REPO = "willdepueoai/parameter-golf"
CASEOPS_REPO = "romeerp/parameter-golf-caseops-v1"
FORMS = {"behind-space": lossless_caps.BEHIND_SPACE, "before-space": lossless_caps.BEFORE_SPACE}
DEFAULT_VARIANT = {FINEWEB_REPO: "sp1024", CASEOPS_REPO: "sp8192_lossless_caps_caseops_v1_reserved"}
CONTEST_VAL_TOKENS = {CASEOPS_REPO: 47_853_344}  # the published validation export, BOS included
GIVE_MORE = "give more text: a .txt file is one document, a JSONL file one for each line"
VAL_DOCS = 50_000  # of the contest
STDLIB_VAL_DOCS = 150
STDLIB_DOCUMENT_CHARS = 3000
# Not on every machine (distributions package them apart), bulky tables, or tests.
STDLIB_SKIP = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "__pycache__",
    "encodings",
    "idlelib",
    "lib2to3",
    "tkinter",
    "turtledemo",
    "distutils",
    "ensurepip",
    "venv",
    "pydoc_data",
}


class DataError(Exception):
    """A problem that the user can act on; printed as one line."""


def explain(error: OSError) -> str:
    """One line for what the system refused."""
    remedy = "check its permissions or name another place"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        remedy = "free space there or choose another --out"
    return f"{error.filename or 'a file'}: {error.strerror or error}; {remedy}"


# ---------------------------------------------------------------- files


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name `path` in an OSError of the block: a failed read or write (a full disk) does not know its file."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None


def write_file(path: Path, *parts: bytes | memoryview) -> str:
    """Write `path` whole, by rename, and return its SHA-256."""
    digest = hashlib.sha256()
    part_path = path.with_name(path.name + ".part")
    with naming(path), open(part_path, "wb") as file:
        try:
            for part in parts:
                file.write(part)
                digest.update(part)
            file.flush()
            os.fsync(file.fileno())
        except OSError:  # a full disk gets its space back
            part_path.unlink()
            raise
    os.replace(part_path, path)
    return digest.hexdigest()


def sha256_file(path: Path) -> str:
    with naming(path), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_files(paths: list[Path]) -> list[str]:
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashlib releases the GIL
        return list(pool.map(sha256_file, paths))


def parse_json(data: bytes):
    """The value of a JSON text; ValueError for whatever is wrong with it."""
    try:
        return json.loads(data.decode("utf-8-sig"))
    except RecursionError:  # a few kilobytes of brackets
        raise ValueError("nested too deeply") from None


def json_object(path: Path) -> dict:
    """The JSON object that a file holds."""
    try:
        value = parse_json(path.read_bytes())
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise DataError(f"{path}: holds no JSON object")
    return value


def portable(path: Path) -> str:
    """A path as text, the same in every locale: LC_ALL=C reads letters outside ASCII as surrogates."""
    return os.fsencode(path).decode("utf-8", "surrogateescape")


def read_shard(path: Path) -> np.ndarray:
    """Memory-map the uint16 tokens of a shard after checking magic, version and size."""
    with open(path, "rb") as file:
        data = file.read(HEADER_BYTES)
    header = np.frombuffer(data, "<i4") if len(data) == HEADER_BYTES else np.zeros(3, "<i4")
    if header[0] != MAGIC or header[1] != VERSION:
        raise DataError(f"{path}: not a token shard (magic {MAGIC}, version {VERSION} expected); download it again")
    if path.stat().st_size != HEADER_BYTES + 2 * int(header[2]):
        raise DataError(
            f"{path}: {path.stat().st_size} bytes, but its header promises {int(header[2])} tokens; download it again"
        )
    return np.memmap(path, "<u2", "r", HEADER_BYTES, (int(header[2]),)) if header[2] else np.zeros(0, "<u2")


class ShardWriter:
    """Collects the tokens of one split and writes a shard whenever `shard_tokens` are there. Keeps at most one shard in
    memory."""

    def __init__(self, out: Path, names: tuple[str, ...], shard_tokens: int):
        self.out, self.names, self.shard_tokens = out, names, shard_tokens
        self.streams: list[list[np.ndarray]] = [[] for _ in names]
        self.held = self.shards = 0
        self.files: dict[str, dict] = {}

    def add(self, *streams: np.ndarray) -> None:
        """One uint16 array for each name, all of one length."""
        while (room := self.shard_tokens - self.held) <= len(streams[0]):
            self._hold(array[:room] for array in streams)
            self._flush()
            streams = tuple(array[room:] for array in streams)
        self._hold(streams)

    def close(self) -> None:
        if self.held:
            self._flush()

    def _hold(self, streams: Iterable[np.ndarray]) -> None:
        for held, array in zip(self.streams, streams, strict=True):
            held.append(array)
        self.held += len(self.streams[0][-1])

    def _flush(self) -> None:
        header = np.zeros(256, "<i4")
        header[:3] = MAGIC, VERSION, self.held
        for name, held in zip(self.names, self.streams, strict=True):
            file_name = f"fineweb_{name}_{self.shards:06d}.bin"
            tokens = np.concatenate(held).astype("<u2", copy=False)
            sha256 = write_file(self.out / file_name, memoryview(header).cast("B"), memoryview(tokens).cast("B"))
            self.files[file_name] = {"sha256": sha256, "tokens": self.held}
            held.clear()
        self.held, self.shards = 0, self.shards + 1


# ---------------------------------------------------------------- sources: every source is a stream of JSON lines


class Line(NamedTuple):
    path: str
    number: int  # from 1; 0: the document is the whole file
    data: bytes

    @property
    def place(self) -> str:
        return f"{self.path} line {self.number}" if self.number else self.path


@dataclass
class Source:
    """Documents as JSON lines, in a fixed order."""

    kind: str
    paths: tuple[Path, ...] = ()
    name: str = ""  # repository of a downloaded source
    documents: tuple[bytes, ...] = ()  # of the built-in source
    expected_sha256: str | None = None
    position: int = 0  # compressed bytes read so far
    closed: bool = False  # stops what hashes the source in the background

    @property
    def size(self) -> int:
        return sum(path.stat().st_size for path in self.paths) or sum(map(len, self.documents))

    def lines(self) -> Iterator[Line]:
        self.position = 0
        for number, document in enumerate(self.documents, 1):
            self.position += len(document)
            yield Line("stdlib", number, document)
        done = 0
        for path in self.paths:
            for number, data, position in whole_text(path) if is_text(path) else json_lines(path):
                self.position = done + position
                yield Line(str(path), number, data)
            done += path.stat().st_size

    def close(self) -> None:
        self.closed = True

    def sha256(self, path: Path) -> str:
        """SHA-256 of a file of the source, unless the run ends meanwhile: 48 GB must not hold up Ctrl-C."""
        digest = hashlib.sha256()
        with naming(path), open(path, "rb", 0) as file:
            while not self.closed and (data := file.read(1 << 22)):
                digest.update(data)
        return digest.hexdigest()

    def describe(self) -> dict:
        """The manifest's account of the source; hashes it."""
        if self.documents:
            return {
                "kind": self.kind,
                "python": ".".join(map(str, sys.version_info[:3])),
                "documents": len(self.documents),
                "sha256": hashlib.sha256(b"\n".join(self.documents)).hexdigest(),
            }
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashlib releases the GIL
            hashes = list(pool.map(self.sha256, self.paths))
        if self.expected_sha256 not in (None, hashes[0]):
            raise DataError(
                f"{self.paths[0]}: SHA-256 {hashes[0]} is not the published {self.expected_sha256}; delete it and "
                "run the same command again"
            )
        files = [
            {"path": portable(path) if self.kind == "jsonl" else path.name, "bytes": path.stat().st_size, "sha256": sha}
            for path, sha in zip(self.paths, hashes, strict=True)
        ]
        return {"kind": self.kind} | ({"repo": self.name} if self.name else {}) | {"files": files}


def open_compressed(path: Path, raw: BinaryIO):
    if path.suffix == ".xz":
        return lzma.open(raw)
    if path.suffix == ".gz":
        return gzip.open(raw)
    if path.suffix == ".zst":
        try:
            import zstandard
        except ImportError:
            raise DataError(f"{path}: .zst needs the zstandard package: pip install zstandard") from None
        return io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True), 1 << 20)
    return raw


def content_suffix(path: Path) -> str:
    """The suffix below that of the compression."""
    return (path.with_suffix("") if path.suffix in (".xz", ".gz", ".zst") else path).suffix


def is_text(path: Path) -> bool:
    return content_suffix(path) == ".txt"


def whole_text(path: Path) -> Iterator[tuple[int, bytes, int]]:
    """A text file as one document, in the form of `json_lines`."""
    data = b"".join(line for _, line, _ in file_lines(path))
    if re.match(rb'\s*\{\s*"text"', data):
        raise DataError(f"{path}: holds JSON lines, but a .txt file is one document; rename it to .jsonl")
    try:
        yield 0, json.dumps(data.decode("utf-8-sig")).encode(), path.stat().st_size
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error}); convert it") from None


def json_lines(path: Path) -> Iterator[tuple[int, bytes, int]]:
    """Lines of a file, less the blank ones."""
    return (line for line in file_lines(path) if not line[1].isspace())


def file_lines(path: Path) -> Iterator[tuple[int, bytes, int]]:
    """Yield (line number, line, compressed bytes read) of a plain or compressed file."""
    number = 0
    with naming(path), open(path, "rb", 1 << 20) as raw, open_compressed(path, raw) as file:
        try:
            for number, line in enumerate(file, 1):
                yield number, line, raw.tell()
        except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile, *zstd_errors()) as error:  # type: ignore[misc]
            raise DataError(
                f"{path}: truncated or corrupt after line {number} ({error}); fetch the file again"
            ) from None


def zstd_errors() -> tuple[type[Exception], ...]:
    return (sys.modules["zstandard"].ZstdError,) if "zstandard" in sys.modules else ()


def parse_document(line: Line) -> str:
    """The text of `{"text": ...}` or of a bare JSON string."""
    try:
        value = parse_json(line.data)
    except ValueError as error:
        raise DataError(
            f"{line.place}: not valid JSON ({error}); the file is damaged, truncated or of another format"
        ) from None
    text = value.get("text") if isinstance(value, dict) else value
    if not isinstance(text, str):
        raise DataError(f'{line.place}: no document: expected {{"text": "..."}} or a JSON string')
    return text


def stdlib_documents() -> tuple[bytes, ...]:
    """The Python standard library as documents: its sources and the language reference that `help()` shows, cut between
    paragraphs into pieces of about STDLIB_DOCUMENT_CHARS characters and ordered by a hash of their content. The same on
    every machine with the same Python version."""
    root = Path(sysconfig.get_path("stdlib"))
    texts = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if (
            not STDLIB_SKIP & set(parts)
            and not parts[0].startswith("config-")
            and not parts[-1].startswith(("_sysconfigdata", "__phello__"))
        ):
            texts.append(path.read_bytes().decode("utf-8", "replace"))
    with contextlib.suppress(ImportError):
        from pydoc_data.topics import topics

        texts += [topics[name] for name in sorted(topics)]
    documents = {piece for text in texts for piece in cut_text(text, STDLIB_DOCUMENT_CHARS)}
    if not documents:
        raise DataError(f"no Python sources under {root}; give --source a JSONL file")
    lines = [json.dumps({"text": document}, ensure_ascii=False).encode("utf-8") for document in documents]
    return tuple(sorted(lines, key=lambda line: hashlib.sha256(line).digest()))


def cut_text(text: str, limit: int) -> Iterator[str]:
    """Pieces of whole paragraphs, or of whole lines where one paragraph is too long, of at most `limit` characters
    unless one line is longer."""
    piece = ""
    for paragraph in re.findall(r"(?:.*\S.*\n?)+|(?:\s*\n)+", text):
        for part in [paragraph] if len(paragraph) <= limit else paragraph.splitlines(keepends=True):
            if piece.strip() and len(piece) + len(part) > limit:
                yield piece.strip("\n")
                piece = ""
            piece += part
    if piece.strip():
        yield piece.strip("\n")


def open_source(args: argparse.Namespace) -> Source:
    if args.source == ["stdlib"]:
        return Source("stdlib", documents=stdlib_documents())
    if args.source == ["fineweb"]:
        repo = args.repo or FINEWEB_REPO
        path = "datasets/docs_selected.source_manifest.json"
        expected = hub_json(repo, path).get("docs_sha256")
        if not isinstance(expected, str):
            raise DataError(f"{repo}: {path} names no docs_sha256, so it is no manifest of documents; check --repo")
        return Source("fineweb", (hub_file(repo, "datasets/docs_selected.jsonl"),), repo, expected_sha256=expected)
    return Source("jsonl", tuple(file for given in args.source for file in source_files(expand(given))))


def source_files(given: Path) -> list[Path]:
    """The file, or the files of a folder in the order of their names: either JSON lines or texts."""
    if given.is_file():
        return [given]
    if not given.is_dir():
        if given.exists():
            raise DataError(f"{given}: not a plain file; it is read more than once, so save it to one first")
        raise DataError(
            f"{given}: no such file; --source takes JSONL and .txt files (.xz, .gz, .zst too), folders of them, "
            "fineweb, shards or stdlib"
        )
    files = {".jsonl": [], ".txt": []}
    for path in sorted(given.iterdir()):
        if path.is_file() and not path.name.startswith("."):
            files.get(content_suffix(path), []).append(path)
    if all(files.values()):
        raise DataError(f"{given}: a folder with both *.jsonl and *.txt; name the files of one kind")
    if not any(files.values()):
        raise DataError(f"{given}: a folder without *.jsonl or *.txt; name its files")
    return files[".jsonl"] or files[".txt"]


# ---------------------------------------------------------------- tokens and bytes


def encode_pieces(sp: sentencepiece.SentencePieceProcessor, text: str) -> tuple[list[int], list[str]]:
    """Token ids and, for each, the part of `text` it stands for. When bytes stand for one character, the last one has
    it all."""
    if hasattr(sp, "encode_as_offset_mapping"):  # 0.2.2 and later
        pieces = sp.encode_as_offset_mapping(text)
        return pieces["ids"], [text[start:end] for start, end in pieces["offsets"]]
    pieces = sp.encode_as_immutable_proto(text).pieces  # type: ignore[attr-defined]
    return [piece.id for piece in pieces], [piece.surface for piece in pieces]


class StrippedEnds:
    """Counts the bytes that SentencePiece's normaliser drops at both ends of a text: white space in the wide sense of
    the model's rules (no-break space, zero-width space, ...) and the control characters that vanish next to it. Looks
    only at characters, never at pieces."""

    def __init__(self, sp: sentencepiece.SentencePieceProcessor):
        self.sp = sp
        self.kinds: dict[str, str] = {}
        self.leading_kinds: dict[str, str] = {}
        self.strips_spaces = sp.normalize("a  a") == sp.normalize("a a")
        self.dummy_prefix = len(sp.normalize("a")) > 1

    def kind(self, char: str) -> str:
        if char not in self.kinds:
            normal = self.sp.normalize(f"a{char}a").lstrip(" \u2581")
            is_space = normal in ("a a", "a\u2581a") and self.strips_spaces
            self.kinds[char] = "space" if is_space else "gone" if normal == "aa" else "solid"
        return self.kinds[char]

    def leading_kind(self, char: str) -> str:
        """As `kind`, before the first solid character. There only what the rules turn into a space is dropped: a
        U+2581 that they leave alone looks like an escaped space, is stripped at the end of a text, and stays here."""
        if char not in self.leading_kinds:
            kind = self.kind(char)
            stays = kind == "space" and self.sp.normalize(f"{char}a") != self.sp.normalize("a")
            self.leading_kinds[char] = "solid" if stays else kind
        return self.leading_kinds[char]

    def count(self, text: str) -> int:
        if all(self.kind(char) != "solid" for char in text):
            # Where spaces are kept, an added space is a token of its own and takes what vanishes.
            return 0 if self.dummy_prefix and not self.strips_spaces else len(text.encode())
        start, end = 0, len(text)
        while self.leading_kind(text[start]) != "solid":
            start += 1
        while self.kind(text[end - 1]) != "solid":
            end -= 1
        while (
            end < len(text) and self.kind(text[end]) != "space"
        ):  # what vanishes before the first space belongs to the last piece
            end += 1
        if self.dummy_prefix:  # the added space takes what vanishes behind the leading spaces
            start = next(i for i, char in enumerate(text) if self.leading_kind(char) != "space")
        return len(text[:start].encode()) + len(text[end:].encode())


def load_model(path: Path) -> sentencepiece.SentencePieceProcessor:
    """A model read by Python: SentencePiece itself opens no path outside ASCII under LC_ALL=C."""
    sp = sentencepiece.SentencePieceProcessor()
    try:
        sp.LoadFromSerializedProto(path.read_bytes())
    except RuntimeError:
        raise DataError(f"{path}: not a SentencePiece model") from None
    return sp


class Encoder:
    """A SentencePiece model with a form of CaseOps in front, or without (None)."""

    def __init__(self, model: Path, form: str | None):
        self.sp = load_model(model)
        self.form = form
        self.ends = StrippedEnds(self.sp)
        self.ids = getattr(self.sp, "encode_as_numpy", self.sp.encode_as_ids)

    def tokens(self, text: str) -> np.ndarray:
        """uint16 ids, without BOS."""
        return np.asarray(self.ids(lossless_caps.encode(text, self.form) if self.form else text), np.uint16)

    def tokens_and_bytes(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """uint16 ids, without BOS, and the bytes of the original text for each; every check that a validation document
        must pass."""
        encoded = lossless_caps.encode(text, self.form) if self.form else text
        if self.form and lossless_caps.decode(encoded, self.form) != text:
            raise DataError("the case transform does not give the text back")
        ids, surfaces = encode_pieces(self.sp, encoded)
        sizes = np.array(
            lossless_caps.piece_bytes(surfaces, self.form)
            if self.form
            else [len(surface.encode()) for surface in surfaces],
            np.int64,
        )
        expected = len(text.encode()) - self.ends.count(text)
        if sizes.sum() != expected:
            raise DataError(
                f"its tokens account for {sizes.sum()} bytes, its text for {expected}: the tokenizer's normalisation "
                "is not understood; drop the document, or leave out --tokenizer to have one trained"
            )
        if sizes.max(initial=0) > 65535:
            raise DataError(
                f"one token stands for {sizes.max()} bytes, more than the sidecar's 65535; shorten its run of white "
                "space or drop it"
            )
        return np.asarray(ids, np.uint16), sizes.astype(np.uint16)


def check_tokenizer(encoder: Encoder, name: str) -> None:
    sp = encoder.sp
    if sp.vocab_size() > 65536:
        raise DataError(f"{name}: {sp.vocab_size()} pieces do not fit in uint16 shards; use at most 65536")
    if sp.bos_id() != BOS_ID:
        raise DataError(
            f"{name}: BOS id is {sp.bos_id()}, shards need {BOS_ID}; train it with pad_id=0, bos_id=1, eos_id=2, "
            "unk_id=3"
        )
    named = named_form(sp)
    if encoder.form and named not in (None, encoder.form):
        option = next(option for option, form in FORMS.items() if form == named)
        raise DataError(
            f"{name}: made for {named}, not for {encoder.form}; pass --case-ops {option} or another tokenizer"
        )
    if encoder.form and any(sp.is_unknown(sp.piece_to_id(operator)) for operator in lossless_caps.OPERATORS):
        raise DataError(f"{name}: holds no CaseOps operators U+E001..U+E004; pass --no-caseops or another tokenizer")
    if not any(map(sp.is_byte, range(sp.vocab_size()))):
        raise DataError(
            f"{name}: has no byte fallback, so some text would be lost as unknown; train it with byte_fallback=True"
        )
    if sp.normalize("a").endswith("\u2581"):
        raise DataError(
            f"{name}: adds its space behind the text, where the bytes of white space cannot be told; train it with "
            "treat_whitespace_as_suffix=False or add_dummy_prefix=False"
        )
    if sp.is_unknown(sp.piece_to_id("\u2581")):
        raise DataError(
            f"{name}: has no piece '\u2581', so it would spell some spaces in three bytes; train it on text with spaces"
        )


def with_name(model: bytes, form: str | None) -> bytes:
    """A model that names its form of CaseOps where the published one does: in trainer_spec.model_prefix, a field that
    SentencePiece keeps and does not use. Fields behind a protocol buffer are merged into it."""
    if form is None:
        return model
    prefix = b"\x12" + bytes([len(form)]) + form.encode()  # TrainerSpec field 2, a string
    return model + b"\x12" + bytes([len(prefix)]) + prefix  # ModelProto field 2, the TrainerSpec


def named_form(sp: sentencepiece.SentencePieceProcessor) -> str | None:
    """The form of CaseOps that a model was trained for; None where it does not say."""
    model = sp.serialized_model_proto()
    return next((form for form in FORMS.values() if form.encode() in model), None)


@cache
def load_encoder(model: str, form: str | None) -> Encoder:
    return Encoder(Path(model), form)


class Chunk(NamedTuple):
    """Documents of one split on their way to a worker."""

    lines: list[Line]
    is_val: bool


class Encoded(NamedTuple):
    """Documents of one chunk on their way back: BOS + tokens of each, joined."""

    is_val: bool
    tokens: np.ndarray  # uint16
    sizes: np.ndarray | None  # uint16, validation only: bytes of each token
    lengths: list[int]  # tokens of each document, BOS included
    hashes: list[bytes]
    utf8: list[int]  # bytes of each document less its stripped ends
    empty: int
    source_bytes: int


def encode_chunk(model: str, form: str | None, chunk: Chunk) -> Encoded:
    encoder = load_encoder(model, form)
    bos = np.array([BOS_ID], np.uint16)
    tokens, sizes, lengths, hashes, utf8, empty, source_bytes = [], [], [], [], [], 0, 0
    for line in chunk.lines:
        text = parse_document(line)
        try:
            size = len(text.encode())
            ids, piece_sizes = encoder.tokens_and_bytes(text) if chunk.is_val else (encoder.tokens(text), None)
        except UnicodeEncodeError:
            raise DataError(
                f"{line.place}: holds a lone surrogate, which UTF-8 cannot store; repair or drop it"
            ) from None
        except (DataError, lossless_caps.CaseOpsError) as error:
            raise DataError(f"{line.place}: {error}") from None
        source_bytes += size
        if not len(ids):
            empty += 1
            continue
        tokens += [bos, ids]
        lengths.append(1 + len(ids))
        hashes.append(hashlib.blake2b(ids, digest_size=16).digest())
        utf8.append(size - encoder.ends.count(text))
        if chunk.is_val:
            sizes += [np.zeros(1, np.uint16), piece_sizes]
    nothing = np.zeros(0, np.uint16)
    return Encoded(
        chunk.is_val,
        np.concatenate(tokens or [nothing]),
        np.concatenate(sizes or [nothing]) if chunk.is_val else None,  # type: ignore[arg-type]
        lengths,
        hashes,
        utf8,
        empty,
        source_bytes,
    )


# ---------------------------------------------------------------- tokenizer training


def content_hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def tokenizer_text(source: Source, args: argparse.Namespace) -> Iterator[str]:
    """The first --tokenizer-mb of training documents, transformed; validation documents and their duplicates are passed
    over."""
    lines = source.lines()
    val = {content_hash(parse_document(line)) for line in islice(lines, args.val_docs)}
    left = args.tokenizer_mb * 1_000_000
    for line in islice(lines, args.max_train_docs):
        text = parse_document(line)
        if left <= 0:
            return
        if content_hash(text) in val or not text.strip():
            continue
        text = text.encode("utf-8", "replace").decode().replace("\0", " ")
        left -= len(text.encode())
        yield lossless_caps.encode(text, args.form) if args.form else text


def keeping(texts: Iterable[str], errors: list[BaseException]) -> Iterator[str]:
    """Pass `texts` on and keep what ends them early: SentencePiece hides it in an error of its own."""
    try:
        yield from texts
    except BaseException as error:
        errors.append(error)
        raise


def train_tokenizer(source: Source, args: argparse.Namespace) -> bytes:
    """A byte-fallback BPE model: pad 0, BOS 1, EOS 2, unknown 3, then the four operators (with CaseOps), 256 bytes, and
    learned pieces."""
    text = tokenizer_text(source, args)
    if (first := next(text, None)) is None:
        remedy = "pass a smaller --val-docs or more text" if args.val_docs > 1 else GIVE_MORE
        raise DataError(f"no training document is left behind the first {args.val_docs:,} of --val-docs; {remedy}")
    model = io.BytesIO()
    errors: list[BaseException] = []
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=keeping(chain([first], text), errors),
            model_writer=model,
            model_type="bpe",
            vocab_size=args.vocab_size,
            character_coverage=0.999,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="nmt_nfkc",
            add_dummy_prefix=False,
            hard_vocab_limit=False,
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            user_defined_symbols=list(lossless_caps.OPERATORS) if args.form else [],
            max_sentence_length=1 << 24,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        if errors:
            raise errors[0] from None
        raise DataError(
            f"--vocab-size {args.vocab_size}: SentencePiece cannot train it: {' '.join(str(error).split())}"
        ) from None
    return with_name(model.getvalue(), args.form)


def train_tokenizer_apart(source: Source, args: argparse.Namespace) -> bytes:
    """`train_tokenizer` in a process of its own: SentencePiece heeds no Ctrl-C while it learns, and memory that runs
    out ends only that process."""
    log(
        f"training a tokenizer of {args.vocab_size} pieces on at most the first {args.tokenizer_mb} MB of training text"
    )
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=send_tokenizer, args=(sender, source, args), daemon=True)
    process.start()
    sender.close()  # the child's end is the only one, so its death is the end of the file
    try:
        outcome = receiver.recv()
    except EOFError:
        raise DataError(
            "the process that trains the tokenizer was killed (out of memory?); run again with a smaller --tokenizer-mb"
        ) from None
    finally:
        process.kill()
        process.join()
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def send_tokenizer(sender, source: Source, args: argparse.Namespace) -> None:
    """The child's part: sends the model, or the error."""
    init_worker()
    try:
        sender.send(train_tokenizer(source, args))
    except Exception as error:  # noqa: BLE001 - the parent raises it
        sender.send(error)


# ---------------------------------------------------------------- the pipeline


def log(message: str, end: str = "\n") -> None:
    with contextlib.suppress(BrokenPipeError):  # a reader that has gone (`| head`) must not end the work of hours
        print(message, end=end, file=sys.stderr, flush=True)


class Progress:
    """One line on stderr: documents, MB/s of source text, time left by the share of the source that has been read."""

    def __init__(self, source: Source, doc_limit: int | None):
        self.source, self.doc_limit, self.size = source, doc_limit, max(source.size, 1)
        self.started = self.shown = time.monotonic()
        self.docs = self.bytes = 0

    def update(self, docs: int, size: int) -> None:
        self.docs, self.bytes = self.docs + docs, self.bytes + size
        if time.monotonic() - self.shown >= (0.5 if sys.stderr.isatty() else 10):
            self.show("\r" if sys.stderr.isatty() else "\n")

    def show(self, end: str) -> None:
        self.shown = time.monotonic()
        seconds = self.shown - self.started
        share = max(self.source.position / self.size, self.docs / self.doc_limit if self.doc_limit else 0, 1e-9)
        left = f"{seconds * (1 - share) / share:,.0f} s left" if share < 1 else f"{seconds:.1f} s"
        rate = self.bytes / 1e6 / max(seconds, 1e-9)
        log(f"{self.docs:,} docs  {self.bytes / 1e6:,.1f} MB  {rate:.1f} MB/s  {left}   ", end)


def chunks(source: Source, val_docs: int, max_train_docs: int | None) -> Iterator[Chunk]:
    """The documents in order, in batches that never mix the splits."""
    lines = source.lines()
    for is_val, split in ((True, islice(lines, val_docs)), (False, islice(lines, max_train_docs))):
        batch, size = [], 0
        for line in split:
            batch.append(line)
            size += len(line.data)
            if size >= CHUNK_BYTES:
                yield Chunk(batch, is_val)
                batch, size = [], 0
        if batch:
            yield Chunk(batch, is_val)


def init_worker() -> None:
    """Leave Ctrl-C to the parent, and end a worker whose parent was killed: it would wait for work for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None  # this is a child
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()  # type: ignore[func-returns-value]


def encode_all(batches: Iterable[Chunk], model: Path, form: str | None, workers: int) -> Iterator[Encoded]:
    """Encode chunks on `workers` processes and yield them in order; a few are in flight per worker, so memory stays
    bounded."""
    load_encoder.cache_clear()  # the path may hold another model by now
    if workers == 1:
        yield from (encode_chunk(str(model), form, chunk) for chunk in batches)
        return
    pending: deque[Future] = deque()
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), init_worker)
    try:
        for chunk in batches:
            pending.append(pool.submit(encode_chunk, str(model), form, chunk))
            if len(pending) > 4 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool:
        raise DataError("a worker process was killed (out of memory?); run again with fewer --workers") from None
    finally:
        pool.shutdown(cancel_futures=True)


class Split:
    """Writes one split and keeps its counts."""

    def __init__(self, out: Path, names: tuple[str, ...], first_document: int, shard_tokens: int):
        self.writer = ShardWriter(out, names, shard_tokens)
        self.counts = {
            "first_document": first_document,
            "documents": 0,
            "tokens": 0,
            "bos": 0,
            "bytes": 0,
            "utf8_bytes": 0,
        }
        self.empty = 0

    def add(self, chunk: Encoded) -> None:
        self.writer.add(*(stream for stream in (chunk.tokens, chunk.sizes) if stream is not None))
        documents, utf8 = len(chunk.lengths), sum(chunk.utf8)
        for key, value in (
            ("documents", documents),
            ("tokens", len(chunk.tokens)),
            ("bos", documents),
            ("utf8_bytes", utf8),
            ("bytes", utf8 if chunk.sizes is None else int(chunk.sizes.sum(dtype=np.int64))),
        ):
            self.counts[key] += value
        self.empty += chunk.empty


def without_documents(chunk: Encoded, hashes: set[bytes]) -> Encoded:
    """`chunk` (of the training split) without the documents whose hash is in `hashes`."""
    keep = [digest not in hashes for digest in chunk.hashes]
    if all(keep):
        return chunk
    return chunk._replace(
        tokens=chunk.tokens[np.repeat(keep, chunk.lengths)],
        **{field: list(compress(getattr(chunk, field), keep)) for field in ("lengths", "hashes", "utf8")},  # type: ignore[arg-type]
    )


def too_few_documents(found: int, val_docs: int) -> DataError:
    return DataError(
        f"the source has {found:,} documents, no more than the {val_docs:,} of --val-docs, so none would be left to "
        "train on; "
        + (f"pass a smaller --val-docs (for example {max(1, found // 20)}) or more text" if found > 1 else GIVE_MORE)
    )


def write_splits(source: Source, args: argparse.Namespace, out: Path) -> dict:
    """Tokenise the source into OUT's shards; return the manifest's counts and files."""
    val = Split(out, ("val", "val_bytes"), 0, args.shard_tokens)
    train = Split(out, ("train",), args.val_docs, args.shard_tokens)
    val_hashes: set[bytes] = set()
    duplicates = 0
    progress = Progress(source, args.max_train_docs and args.val_docs + args.max_train_docs)
    batches = chunks(source, args.val_docs, args.max_train_docs)
    for chunk in encode_all(batches, out / TOKENIZER, args.form, args.workers):
        progress.update(len(chunk.lengths) + chunk.empty, chunk.source_bytes)
        if chunk.is_val:
            val_hashes.update(chunk.hashes)
            val.add(chunk)
        else:
            unique = without_documents(chunk, val_hashes)
            duplicates += len(chunk.lengths) - len(unique.lengths)
            train.add(unique)
    progress.show("\n")
    if progress.docs <= args.val_docs:
        raise too_few_documents(progress.docs, args.val_docs)
    for name, split in (("validation", val), ("training", train)):
        if not split.counts["documents"]:
            raise DataError(
                f"no {name} document is left (empty: {val.empty + train.empty}, duplicates of validation: "
                f"{duplicates}); give more text"
            )
        split.writer.close()
    return {
        "train": train.counts,
        "val": val.counts,
        "duplicates_dropped": duplicates,
        "empty_skipped": val.empty + train.empty,
        "files": train.writer.files | val.writer.files,
    }


# ---------------------------------------------------------------- the output folder


def names_in(record: Path) -> set[str]:
    """Names of the files that this script wrote by a manifest or by the list of a run at work; no name where the record
    is missing or another program's."""
    try:
        found = json_object(record)
    except (DataError, OSError):
        return set()
    files = found.get("files")
    if found.get("format") != FORMAT or not isinstance(files, (dict, list)):
        return set()
    own = {MANIFEST, TOKENIZER} if record.name == MANIFEST else set()
    return own | {name for name in files if isinstance(name, str) and OUR_NAMES.fullmatch(name)}


def written_before(out: Path) -> set[str]:
    """Names of OUT's files that earlier runs wrote; a DataError where anything else stands in the way. Touches
    nothing."""
    if not out.is_dir():
        if out.exists() or out.is_symlink():
            raise DataError(f"{out}: not a folder; choose another --out")
        return set()
    work = out / UNFINISHED
    written = names_in(out / MANIFEST) | names_in(work / WRITTEN)
    foreign = [path for path in out.iterdir() if OUR_NAMES.fullmatch(path.name) and path.name not in written]
    if work.is_dir():
        parts = {LOCK, WRITTEN, f"{WRITTEN}.part"}
        foreign += [
            path
            for path in work.iterdir()
            if path.name not in parts and not OUR_NAMES.fullmatch(path.name.removesuffix(".part"))
        ]
    elif work.exists():
        foreign.append(work)
    if foreign:
        more = f" (and {len(foreign) - 1} more)" if len(foreign) > 1 else ""
        raise DataError(
            f"{min(foreign)}{more}: in the way, and by no record written by this script, so it stays; move it "
            "elsewhere or choose another --out"
        )
    return written


def clear(work: Path) -> None:
    for path in work.iterdir():
        if path.name not in (LOCK, WRITTEN):
            path.unlink()


def write_record(work: Path, names: set[str]) -> None:
    write_file(work / WRITTEN, json.dumps({"format": FORMAT, "files": sorted(names)}).encode())


@contextlib.contextmanager
def new_dataset(out: Path) -> Iterator[Path]:
    """The folder where a run writes its files. Once all are complete they move into OUT and take the place of what
    earlier runs wrote there; until then, and where the run fails, OUT stays as it was. A lock keeps a second run
    out."""
    written_before(out)
    missing = [folder for folder in (out, *out.parents) if not folder.exists()]
    work = out / UNFINISHED
    work.mkdir(parents=True, exist_ok=True)
    with open(work / LOCK, "w") as lock:
        try:
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"{out}: another prepare_data.py is writing there; choose another --out") from None
        except (ImportError, OSError):
            pass  # no such locks on Windows and on some network disks
        written = written_before(out)  # by now the run that held the lock may have ended
        try:
            clear(work)
            write_record(work, written)
            yield work
        except BaseException:
            clear(work)
            # A run killed while its files moved left some that only this record knows.
            if (out / MANIFEST).exists() or not any((out / name).exists() for name in written):
                remove_work(work)
                with contextlib.suppress(OSError):  # somebody else has put something there
                    for folder in missing:
                        folder.rmdir()
            raise
        move_in(work, out)
        remove_work(work)


def move_in(work: Path, out: Path) -> None:
    """Move the finished files into OUT, the manifest last. The record is complete before the first one moves, so that
    the next run can go on wherever this one is killed."""
    written = written_before(out)
    new = {path.name for path in work.iterdir()} - {LOCK, WRITTEN}
    write_record(work, written | new)
    (out / MANIFEST).unlink(missing_ok=True)
    for name in written - new:
        (out / name).unlink(missing_ok=True)
    for name in sorted(new, key=lambda name: (name == MANIFEST, name)):
        os.replace(work / name, out / name)


def remove_work(work: Path) -> None:
    (work / WRITTEN).unlink(missing_ok=True)
    with contextlib.suppress(PermissionError):  # Windows removes no open file; the next run takes the folder over
        (work / LOCK).unlink()
        work.rmdir()


def identity(source: dict) -> dict:
    """What makes two sources the same: not where the files lie, but whether each is one document."""
    return {
        key: [file["sha256"] + " text" * is_text(Path(file["path"])) for file in value] if key == "files" else value
        for key, value in source.items()
    }


def is_finished(out: Path, wanted: dict) -> bool:
    """True if OUT holds a finished and undamaged dataset made from `wanted`; an error if it holds another one."""
    path = out / MANIFEST
    if not path.exists():
        return False
    try:
        manifest = json_object(path)
        files = {TOKENIZER: manifest["tokenizer"]["sha256"]} | {
            name: entry["sha256"] for name, entry in manifest["files"].items()
        }
        found = identity(manifest["source"]) | manifest["options"] | {"transform": manifest["transform"]}
        if not files.keys() <= names_in(path):  # names of no file of ours: "../../etc/passwd"
            raise ValueError
    except (DataError, OSError, ValueError, KeyError, TypeError, AttributeError):
        raise DataError(f"{path}: not a manifest of this program; move it elsewhere or choose another --out") from None
    wanted = identity(wanted["source"]) | wanted["options"] | {"transform": wanted["transform"]}
    if changed := [
        f"{key}: {found.get(key)} there, {wanted.get(key)} now"
        for key in wanted | found
        if found.get(key) != wanted.get(key)
    ]:
        raise DataError(
            f"{out}: finished with other options ({'; '.join(changed)}); choose another --out or pass --overwrite"
        )
    for name in files:
        if not (out / name).exists():
            raise DataError(
                f"{out / name}: named in the manifest but missing; pass --overwrite to make the folder again"
            )
    for name, sha in zip(files, sha256_files([out / name for name in files]), strict=True):
        if sha != files[name]:
            raise DataError(
                f"{out / name}: differs from its hash in the manifest; pass --overwrite to make the folder again"
            )
    return True


def write_manifest(out: Path, manifest: dict) -> None:
    write_file(out / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())


def prepare(args: argparse.Namespace) -> None:
    """The whole job for a source of documents."""
    source = open_source(args)
    given_model = read_tokenizer(args.tokenizer, args.form) if args.tokenizer else None
    options = {key: getattr(args, key) for key in ("val_docs", "max_train_docs", "caseops", "shard_tokens")}
    transform = args.form or "none"
    if given_model:
        options["tokenizer_sha256"] = hashlib.sha256(given_model).hexdigest()
    else:
        options |= {"vocab_size": args.vocab_size, "tokenizer_mb": args.tokenizer_mb}
    with ThreadPoolExecutor(1) as background, contextlib.closing(source):
        description = background.submit(source.describe)  # hashing the source costs no time beside tokenising it
        if (
            not args.overwrite
            and (args.out / MANIFEST).exists()
            and is_finished(args.out, {"source": description.result(), "options": options, "transform": transform})
        ):
            log(f"{args.out}: already finished with these options, hashes verified")
            return
        with new_dataset(args.out) as folder:
            model = given_model or train_tokenizer_apart(source, args)
            tokenizer_sha256 = write_file(folder / TOKENIZER, model)
            encoder = Encoder(folder / TOKENIZER, args.form)
            check_tokenizer(encoder, "the trained tokenizer")
            if not given_model and encoder.sp.vocab_size() < args.vocab_size:
                log(
                    f"--vocab-size {args.vocab_size}: the training text gives only {encoder.sp.vocab_size()} pieces, "
                    f"so train with VOCAB_SIZE={encoder.sp.vocab_size()}; more text gives more"
                )
            result = write_splits(source, args, folder)
            write_manifest(
                folder,
                {
                    "format": FORMAT,
                    "source": description.result(),
                    "transform": transform,
                    "vocab_size": encoder.sp.vocab_size(),
                    "bos_id": BOS_ID,
                    "tokenizer": {"file": TOKENIZER, "sha256": tokenizer_sha256, "transform": transform},
                    **result,
                    "options": options,
                    "sentencepiece": sentencepiece.__version__,
                },
            )
    for name in ("val", "train"):
        counts = result[name]
        log(
            f"{name:5} {counts['documents']:,} documents  {counts['tokens']:,} tokens  {counts['utf8_bytes']:,} bytes  "
            f"{counts['utf8_bytes'] / max(counts['tokens'] - counts['bos'], 1):.3f} bytes/token"
        )
    log(
        f"dropped {result['duplicates_dropped']} duplicates of validation documents, skipped "
        f"{result['empty_skipped']} empty ones; "
        f"wrote {args.out / MANIFEST}"
    )


def read_tokenizer(path: str, form: str | None) -> bytes:
    """The bytes of a model, read before OUT is touched: it may lie there."""
    file = expand(path)
    if not file.is_file():
        what = "a folder" if file.is_dir() else "not a plain file" if file.exists() else "no such file"
        raise DataError(f"{path}: {what}; --tokenizer takes a SentencePiece model")
    check_tokenizer(Encoder(file, form), path)
    return file.read_bytes()


# ---------------------------------------------------------------- published shards


def hub_file(repo: str, path: str, *, again: bool = False) -> Path:
    """A file of a Hugging Face dataset repository, downloaded (or resumed) into the hub's own cache; `again`: even
    where the cache has one."""
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise DataError("downloads need the huggingface_hub package: pip install huggingface_hub") from None
    try:
        options = {"force_download": True} if again else {}
        return Path(hf_hub_download(repo_id=repo, filename=path, repo_type="dataset", **options)).resolve(strict=True)
    except Exception as error:  # noqa: BLE001 - network, disk and hub errors have no common base
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(f"{repo}: cannot download {path} ({reason[0]}); run the same command again to resume") from None


def checked_hub_file(repo: str, path: str, check: Callable[[Path], object]) -> Path:
    """`hub_file` that `check` accepts. The cache would serve a damaged file for ever, so that one is fetched anew."""
    file = hub_file(repo, path)
    try:
        check(file)
        return file
    except DataError as error:
        log(f"{error.args[0].split(';')[0]}: fetching {path} again")
    file = hub_file(repo, path, again=True)
    try:
        check(file)
        return file
    except DataError as error:
        raise DataError(
            f"{repo}: {path} is damaged where it is published ({error.args[0].split(';')[0]}); tell its owner or use "
            "another --repo or --variant"
        ) from None


def hub_json(repo: str, path: str) -> dict:
    return json_object(checked_hub_file(repo, path, json_object))


def install(source: Path, target: Path) -> None:
    """Link a downloaded file into OUT, or copy it where the cache lies on another disk."""
    part = target.with_name(target.name + ".part")
    try:
        os.link(source, part)
    except OSError:
        with naming(target):
            shutil.copyfile(source, part)
    os.replace(part, target)


def document_hashes(shards: list[np.ndarray]) -> Iterator[bytes]:
    """Hash of the tokens of each document, BOS excluded; a document may continue in the next shard."""
    rest = np.zeros(0, "<u2")
    for shard in shards:
        tokens = np.concatenate([rest, shard])
        starts = np.flatnonzero(tokens == BOS_ID)
        for start, end in pairwise(starts):
            yield hashlib.blake2b(tokens[start + 1 : end], digest_size=16).digest()
        rest = tokens[starts[-1] :] if len(starts) else tokens
    if len(rest):
        yield hashlib.blake2b(rest[1:], digest_size=16).digest()


class Export(NamedTuple):
    """One export of a publisher's manifest."""

    name: str
    tokenizer: str  # path of its model
    stats: dict
    has_sidecar: bool


def find_export(repo: str, variant: str) -> Export:
    name = f"fineweb10B_{variant}"
    path = "datasets/manifest.json"
    remote = hub_json(repo, path)
    try:
        entries = {entry["name"]: entry for entry in remote["datasets"]}
        models = {model.get("name"): model.get("model_path") for model in remote["tokenizers"]}
        if name not in entries:
            known = ", ".join(key.removeprefix("fineweb10B_") for key in entries)
            raise DataError(f"{repo}: has no {name}; pass --variant with one of: {known}")
        entry = entries[name]
        stats = {**entry["stats"]}
        if not all(type(stats[key]) is int and stats[key] > 0 for key in ("files_val", "files_train")):
            raise ValueError
        model = models.get(entry.get("tokenizer_name"))
        has_sidecar = bool(entry.get("val_bytes_glob"))
    except (KeyError, TypeError, ValueError, AttributeError):
        raise DataError(
            f"{repo}: {path} is no manifest of exports (names, tokenizers and numbers of files); check --repo"
        ) from None
    if not isinstance(model, str):
        raise DataError(f"{repo}: {name} comes with no SentencePiece model; choose another --variant")
    return Export(name, model, stats, has_sidecar)


def download_shards(repo: str, variant: str, train_shards: int, out: Path) -> tuple[dict, dict[str, list[str]]]:
    """Fetch shards, sidecar and tokenizer of one published export into OUT; return its counts in the publisher's
    manifest and the file names of each split."""
    export = find_export(repo, variant)
    counts = {"val": export.stats["files_val"], "train": min(train_shards, export.stats["files_train"])}
    if counts["train"] < train_shards:
        log(f"--train-shards {train_shards}: {repo} has only {counts['train']} of this variant")
    if export.has_sidecar:
        counts["val_bytes"] = counts["val"]
    names = {split: [f"fineweb_{split}_{i:06d}.bin" for i in range(count)] for split, count in counts.items()}
    install(checked_hub_file(repo, f"datasets/{export.tokenizer}", load_model), out / TOKENIZER)
    files = [file for split in names.values() for file in split]
    for number, file in enumerate(files, 1):
        log(f"{number}/{len(files)} {file}")
        install(checked_hub_file(repo, f"datasets/datasets/{export.name}/{file}", read_shard), out / file)
    return export.stats, names


def check_shards(repo: str, variant: str, vocab_size: int, shards: dict[str, list[np.ndarray]]) -> dict:
    """Count both splits and prove them disjoint; a DataError names what is wrong with the export."""
    counts = {}
    for split in ("val", "train"):
        tokens = sum(map(len, shards[split]))
        bos = sum(int(np.count_nonzero(shard == BOS_ID)) for shard in shards[split])
        filled = [shard for shard in shards[split] if len(shard)]
        if not bos or filled[0][0] != BOS_ID:
            raise DataError(
                f"{repo}: the {split} shards do not start with BOS ({BOS_ID}); this export marks no documents"
            )
        if max(int(shard.max()) for shard in filled) >= vocab_size:
            raise DataError(
                f"{repo}: the {split} shards hold tokens beyond the tokenizer's {vocab_size} pieces; they do not "
                "belong together"
            )
        counts[split] = {
            "first_document": 0,
            "documents": bos,
            "tokens": tokens,
            "bos": bos,
            "bytes": None,
            "utf8_bytes": None,
        }
    counts["train"]["first_document"] = counts["val"]["documents"]
    if (
        (expected := CONTEST_VAL_TOKENS.get(repo))
        and variant == DEFAULT_VARIANT[repo]
        and counts["val"]["tokens"] != expected
    ):
        raise DataError(f"{repo}: {counts['val']['tokens']:,} validation tokens instead of the contest's {expected:,}")
    if "val_bytes" in shards:
        if [*map(len, shards["val"])] != [*map(len, shards["val_bytes"])]:
            raise DataError(f"{repo}: validation shards and byte sidecar differ in length")
        if any(sizes[tokens == BOS_ID].any() for tokens, sizes in zip(shards["val"], shards["val_bytes"], strict=True)):
            raise DataError(f"{repo}: the byte sidecar gives bytes to BOS; it does not belong to these shards")
        counts["val"]["bytes"] = sum(int(sizes.sum(dtype=np.int64)) for sizes in shards["val_bytes"])
    val_hashes = set(document_hashes(shards["val"]))
    shared = sum(digest in val_hashes for digest in document_hashes(shards["train"]))
    if shared > max(1, len(val_hashes) // 100):
        raise DataError(
            f"{repo}: {shared:,} training documents are validation documents; this export leaks as in parameter-golf "
            "issue #2127, "
            "use another"
        )
    return counts | {"duplicates_kept": shared}


def prepare_shards(args: argparse.Namespace) -> None:
    """Download published shards in place of making them."""
    repo = args.repo or CASEOPS_REPO
    variant = args.variant or DEFAULT_VARIANT.get(repo, "sp1024")
    source, options = {"kind": "shards", "repo": repo, "variant": variant}, {"train_shards": args.train_shards}
    transform = next((form for form in FORMS.values() if form in variant), "none")
    if not args.overwrite and is_finished(args.out, {"source": source, "options": options, "transform": transform}):
        log(f"{args.out}: already finished with these options, hashes verified")
        return
    with new_dataset(args.out) as folder:
        published, names = download_shards(repo, variant, args.train_shards, folder)
        sp = load_model(folder / TOKENIZER)
        shards = {split: [read_shard(folder / name) for name in files] for split, files in names.items()}
        log("checking hashes, counts and that no training document is a validation document")
        counts = check_shards(repo, variant, sp.vocab_size(), shards)
        files = [name for split in names.values() for name in split]
        tokenizer_sha256, *hashes = sha256_files([folder / name for name in (TOKENIZER, *files)])
        lengths = [len(shard) for split in shards.values() for shard in split]
        write_manifest(
            folder,
            {
                "format": FORMAT,
                "source": source,
                "transform": transform,
                "vocab_size": sp.vocab_size(),
                "bos_id": BOS_ID,
                "tokenizer": {"file": TOKENIZER, "sha256": tokenizer_sha256, "transform": transform},
                "train": counts["train"],
                "val": counts["val"],
                "duplicates_dropped": 0,
                "duplicates_kept": counts["duplicates_kept"],
                "published": published,
                "files": {
                    name: {"sha256": sha, "tokens": length}
                    for name, sha, length in zip(files, hashes, lengths, strict=True)
                },
                "options": options,
                "sentencepiece": sentencepiece.__version__,
            },
        )
    log(
        f"val {counts['val']['tokens']:,} tokens, train {counts['train']['tokens']:,} tokens; wrote "
        f"{args.out / MANIFEST}"
    )


# ---------------------------------------------------------------- command line


def positive(text: str) -> int:
    value = int(text.replace("_", ""))
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return value


def expand(text: str) -> Path:
    """A path of the command line; a shell leaves the ~ of --out=~/x alone."""
    try:
        return Path(text).expanduser()
    except RuntimeError:  # no home directory, as in many containers
        return Path(text)


KEYWORDS = {"fineweb", "shards", "stdlib"}
DOCUMENT_OPTIONS = (
    "val_docs",
    "max_train_docs",
    "shard_tokens",
    "tokenizer",
    "vocab_size",
    "tokenizer_mb",
    "caseops",
    "case_ops",
)
SHARD_OPTIONS = ("variant", "train_shards")
DEFAULTS = {
    "shard_tokens": 100_000_000,
    "vocab_size": 8192,
    "tokenizer_mb": 64,
    "caseops": True,
    "case_ops": "behind-space",
    "train_shards": 80,
}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""examples:
  python prepare_data.py --source docs-*.jsonl.xz --val-docs 2000 --tokenizer caseops.model --out data/mine
  python prepare_data.py --source stdlib --vocab-size 1024 --out data/demo          a small corpus on every machine
  python prepare_data.py --source fineweb --tokenizer caseops.model --out data/fw   the contest's documents (48 GB)
  python prepare_data.py --source fineweb --case-ops before-space --out data/fw2    the same, its own tokenizer
  python prepare_data.py --source shards --train-shards 80 --out data/caseops       its CaseOps shards (16 GB)""",
    )
    parser.add_argument(
        "--source",
        nargs="+",
        required=True,
        metavar="FILE",
        help='JSONL files ({"text": ...} or a JSON string per line), .txt files (one document each), .xz, .gz or .zst '
        "of them, or folders of either, read in this order; or one of: fineweb, shards, stdlib",
    )
    parser.add_argument("--out", type=expand, required=True, metavar="DIR", help="folder of the dataset")
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace what an earlier run with other options wrote in DIR, once the new files are complete",
    )
    parser.add_argument(
        "--workers",
        type=positive,
        default=available_cpus(),
        metavar="N",
        help="processes; the output does not depend on it (default: %(default)s)",
    )
    documents = parser.add_argument_group("documents")
    documents.add_argument(
        "--val-docs",
        type=positive,
        metavar="N",
        help=f"the first N documents are validation (default: {VAL_DOCS}; stdlib: {STDLIB_VAL_DOCS})",
    )
    documents.add_argument(
        "--max-train-docs", type=positive, metavar="N", help="use only the first N documents behind them (default: all)"
    )
    documents.add_argument(
        "--shard-tokens", type=positive, metavar="N", help=f"tokens in a shard (default: {DEFAULTS['shard_tokens']})"
    )
    tokenizer = parser.add_argument_group("tokenizer")
    tokenizer.add_argument(
        "--tokenizer",
        metavar="MODEL",
        help="a SentencePiece model; without it one is trained on the first training documents",
    )
    tokenizer.add_argument(
        "--vocab-size",
        type=positive,
        metavar="N",
        help=f"pieces of the trained model (default: {DEFAULTS['vocab_size']})",
    )
    tokenizer.add_argument(
        "--tokenizer-mb",
        type=positive,
        metavar="MB",
        help=f"training text for it (default: {DEFAULTS['tokenizer_mb']})",
    )
    tokenizer.add_argument(
        "--no-caseops", dest="caseops", action="store_const", const=False, help="tokenise the text as it is"
    )
    tokenizer.add_argument(
        "--case-ops",
        choices=FORMS,
        help="where a word's CaseOps operator stands, behind the space before the word or before that space (default: "
        f"{DEFAULTS['case_ops']}, the published form)",
    )
    downloads = parser.add_argument_group("downloads")
    downloads.add_argument(
        "--repo",
        metavar="OWNER/NAME",
        help=f"Hugging Face dataset repository (default: {FINEWEB_REPO} for fineweb, {CASEOPS_REPO} for shards)",
    )
    downloads.add_argument(
        "--variant",
        metavar="NAME",
        help="export to take from it (default: the CaseOps export of its repository, else sp1024)",
    )
    downloads.add_argument(
        "--train-shards",
        type=positive,
        metavar="N",
        help=f"training shards to fetch (default: {DEFAULTS['train_shards']})",
    )
    args = parser.parse_args(argv)
    kind = args.source[0] if args.source[0] in KEYWORDS else "files"
    if len(args.source) > 1 and KEYWORDS & set(args.source):
        parser.error("--source takes either files or one of fineweb, shards, stdlib")
    without_meaning = {"shards": DOCUMENT_OPTIONS, "fineweb": SHARD_OPTIONS}.get(kind, (*SHARD_OPTIONS, "repo"))
    for option in without_meaning + (("vocab_size", "tokenizer_mb") if args.tokenizer else ()):
        if getattr(args, option) is not None:
            flag = "no-caseops" if option == "caseops" else option.replace("_", "-")
            parser.error(
                f"--{flag} has no meaning with --{'source ' + kind if option in without_meaning else 'tokenizer'}"
            )
    if args.case_ops and args.caseops is False:
        parser.error("--case-ops has no meaning with --no-caseops")
    for option, default in (DEFAULTS | {"val_docs": STDLIB_VAL_DOCS if kind == "stdlib" else VAL_DOCS}).items():
        if getattr(args, option) is None:
            setattr(args, option, default)
    args.form = FORMS[args.case_ops] if args.caseops else None
    # What the format cannot hold is refused before hours of work.
    for option, most in (("vocab_size", 1 << 16), ("shard_tokens", (1 << 31) - 1)):
        if getattr(args, option) > most:
            parser.error(f"--{option.replace('_', '-')} {getattr(args, option)}: at most {most}")
    return args


def available_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0, 2 after one line about what is wrong, 130 after Ctrl-C."""
    args = parse_args(argv)
    try:
        prepare_shards(args) if args.source == ["shards"] else prepare(args)
    except (DataError, OSError) as error:
        log(f"prepare_data.py: {explain(error) if isinstance(error, OSError) else error}")
        return 2
    except KeyboardInterrupt:
        log(f"prepare_data.py: interrupted; {args.out} is not finished: run the same command again")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
