"""The data: whole shards, true bytes, the files of the manifest, and no validation document in training."""

import hashlib
import unicodedata
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np

from prepare_data import read_shard, sha256_file
from tools.audit.outcome import NotRun, verdict_of
from tools.audit.run import read_json
from tools.audit.shared import Audit
from tools.audit.tamper import KNOWN, Dataset
from tools.streams import decoded_documents, shard_paths, transform_of
from tools.verdicts import FAIL

ALARMS = {
    9_662_464: "the 10,000-document CaseOps set (#1854)",
    9_661_440: "the 10,000-document CaseOps set, trimmed (#1854)",
    36_562_944: "a broken parallel preparation (#2109)",
    36_335_616: "casefolded text under the plain name (#1670)",
}


ALARM_TRAIN_SHARDS = {1499, 1502, 1600, 488}  # local preparations with validation documents in training (#2130)


def stream(a: Audit) -> tuple[str, str]:
    """Shards are whole, documents begin with BOS, the sidecar fits, and no space is spelt as three byte tokens."""
    data = a.data
    starts, tokens = data.starts, data.tokens
    faults = [] if len(starts) and starts[0] == 0 else [f"the stream does not begin with BOS ({data.bos})"]
    if int(tokens.max()) >= a.vocab:
        faults.append(f"token {tokens.max()} is outside the vocabulary of {a.vocab:,}")
    if len(tokens) in KNOWN and len(starts) != 50_000:
        faults.append(f"{len(starts):,} documents, the contest's set has 50,000")
    if data.sizes is not None:
        if len(data.sizes) != len(tokens):
            faults.append(f"the byte sidecar has {len(data.sizes):,} entries for {len(tokens):,} tokens")
        elif data.sizes[starts].any():
            faults.append("the byte sidecar gives bytes to BOS")
        empty = (
            int((~np.array([data.sizes[s + 1 : e].any() for s, e in data.documents() if e - s > 4], bool)).sum())
            if len(data.sizes) == len(tokens)
            else 0
        )
        faults += [f"{empty} documents have no bytes at all in the sidecar"] if empty else []
    if (model := next(data.folder.glob("*.model"), None)) is not None:
        import sentencepiece

        sp = sentencepiece.SentencePieceProcessor(model_file=str(model))
        e2, b96, b81 = (sp.piece_to_id(f"<0x{byte:02X}>") for byte in (0xE2, 0x96, 0x81))
        if sp.is_byte(e2):
            runs = int(((tokens[:-2] == e2) & (tokens[1:-1] == b96) & (tokens[2:] == b81)).sum())
            faults += (
                [f"{runs:,} spaces are spelt as the bytes E2 96 81: the vocabulary lacks a standalone space"]
                if runs > len(tokens) // 10_000
                else []
            )
    lengths = np.diff(np.append(starts, len(tokens)))
    empty = int((lengths == 1).sum())
    return verdict_of(
        faults,
        f"{len(tokens):,} tokens, {len(starts):,} documents ({empty} empty, longest {int(lengths.max(initial=0)):,})",
    )


def source_texts(data: Dataset) -> list[str] | None:
    """The original text of the validation documents where the manifest's source is on this machine, unchanged;
    documents without tokens left out."""
    manifest = read_json(data.folder / "manifest.json")
    origin = manifest.get("source", {})
    import prepare_data

    if origin.get("kind") == "stdlib":
        lines = prepare_data.stdlib_documents()
        if hashlib.sha256(b"\n".join(lines)).hexdigest() != origin.get("sha256"):
            return None
        found = prepare_data.Source("stdlib", documents=lines)
    elif origin.get("kind") == "jsonl" and all(
        Path(f["path"]).is_file() and hashlib.sha256(Path(f["path"]).read_bytes()).hexdigest() == f["sha256"]
        for f in origin["files"]
    ):
        found = prepare_data.Source("jsonl", tuple(Path(f["path"]) for f in origin["files"]))
    else:
        return None
    wanted = manifest.get("options", {}).get("val_docs", manifest["val"]["documents"])
    return [prepare_data.parse_document(line) for line, _ in zip(found.lines(), range(wanted))]


def bytes_(a: Audit) -> tuple[str, str]:
    """Bytes per document, counted from the source text less what SentencePiece strips at its ends; else from the
    decoded tokens, within 1 %."""
    data = a.data
    if data.sizes is None or len(data.sizes) != len(data.tokens):
        raise NotRun("no byte sidecar that fits; the script counts by its tokenizer's table")
    model = next(data.folder.glob("*.model"), None)
    if model is None:
        raise NotRun(f"{data.folder}: no tokenizer")
    import sentencepiece

    sp, spans = sentencepiece.SentencePieceProcessor(model_file=str(model)), data.documents()
    held = np.array([data.sizes[start:end].sum(dtype=np.int64) for start, end in spans])
    special = np.array(
        [sp.is_control(i) or sp.id_to_piece(i) in "\ue001\ue002\ue003\ue004" for i in range(sp.vocab_size())]
    )
    paid = int(data.sizes[special[data.tokens]].sum(dtype=np.int64))
    faults = [f"operators and control tokens hold {paid:,} bytes"] if paid else []
    documents = decoded_documents(data.tokens, model, data.bos)
    decoded = [text for text, _ in documents]
    malformed = sum(not well_formed for _, well_formed in documents)
    if malformed > len(documents) // 20:
        faults.append(
            f"{malformed:,} of {len(documents):,} documents are no text of the transform {transform_of(model)}: the "
            "tokens are of another form"
        )
    texts = source_texts(data)
    if texts is None:
        spelt = np.array([len(text.encode("utf-8", "replace")) for text in decoded])
        off = (int(held.sum()) - int(spelt.sum())) / max(int(spelt.sum()), 1)
        what = f"{held.sum():,} bytes, {100 * off:+.3f} % of what the tokens spell (the source text is not at hand)"
        return verdict_of(faults + ([what] if abs(off) > 0.01 else []), what)
    import prepare_data

    ends, bare = prepare_data.StrippedEnds(sp), lambda text: "".join(unicodedata.normalize("NFKC", text).split())
    kept = [text for text in texts if len(text.encode()) > ends.count(text)]
    true = np.array([len(text.encode()) - ends.count(text) for text in kept])
    if len(true) != len(held):
        return FAIL, f"{len(held):,} documents, the source has {len(true):,} that hold text"
    wrong = np.flatnonzero(true != held)
    if len(wrong):
        faults.append(
            f"{len(wrong):,} of {len(held):,} documents: {held[wrong].sum():,} bytes in the sidecar, "
            f"{true[wrong].sum():,} in the source (total {100 * (held.sum() / true.sum() - 1):+.3f} %)"
        )
    lossy = sum(bare(text) != bare(spelt) for text, spelt in zip(kept, decoded))
    doubts = (
        [f"LOSSY: {lossy:,} of {len(kept):,} documents do not decode to their text, white space and NFKC aside (#1604)"]
        if lossy > len(kept) // 20
        else []
    )
    return verdict_of(faults, f"{held.sum():,} bytes, each of {len(held):,} documents equals its source text", doubts)


def identity(a: Audit) -> tuple[str, str]:
    """The files are those of the manifest, the run was on them, and their counts are no known accident."""
    data, faults, doubts = a.data, [], []
    count, total = len(data.tokens), None if data.sizes is None else int(data.sizes.sum(dtype=np.int64))
    digest = hashlib.sha256(np.ascontiguousarray(data.tokens)).hexdigest()
    label = "a known public export" if count in KNOWN else "no known export"
    if count in ALARMS:
        faults.append(f"{count:,} validation tokens: {ALARMS[count]}")
    if (
        count in KNOWN
        and total is not None
        and KNOWN[count]
        and min(abs(total / known - 1) for known in KNOWN[count]) > 0.001
    ):
        faults.append(f"{total:,} bytes for the export of {count:,} tokens, which has {KNOWN[count][0]:,}")
    if (shards := len(shard_paths(data.folder, "train"))) in ALARM_TRAIN_SHARDS:
        doubts.append(f"{shards} training shards, as in local preparations that leaked (#2130)")
    ran = a.artifact.result.get("data", {})
    if ran.get("val_sha256", digest) != digest:
        faults.append("result.json is of other validation tokens")
    manifest = read_json(data.folder / "manifest.json")
    if not manifest:
        doubts += [] if count in KNOWN else ["no manifest, and no known export: nothing to compare with"]
        return verdict_of(faults, f"{label}, {count:,} tokens, sha256 {digest[:12]}; no manifest", doubts)
    promised = {name: entry["sha256"] for name, entry in manifest["files"].items()} | {
        manifest["tokenizer"]["file"]: manifest["tokenizer"]["sha256"]
    }
    for name, sha in promised.items():
        path = data.folder / name
        if path.name != name:  # "../../etc/passwd" is not read
            faults.append(f"the manifest names {name!r}, which is no file of its folder")
        elif not path.is_file() or sha256_file(path) != sha:
            faults.append(f"{name} is {'not the file of the manifest' if path.is_file() else 'missing'}")
    extra = {path.name for path in data.folder.glob("fineweb_*.bin")} - set(promised)
    faults += [f"{name} is not in the manifest" for name in sorted(extra)]
    if manifest["val"]["first_document"] != 0 or manifest["train"]["first_document"] < manifest["val"]["documents"]:
        faults.append("the manifest's document ranges of training and validation overlap")
    return verdict_of(
        faults, f"{label}, {count:,} tokens, {len(promised)} files as in the manifest, sha256 {digest[:12]}", doubts
    )


def document_hashes(shards: Iterable[np.ndarray], bos: int) -> Iterator[tuple[bytes, int]]:
    """(hash, tokens) of every document, BOS excluded; a document may continue in the next shard.

    prepare_data.py has one of its own: a search for leaks must not rest on the code that may have leaked.
    """
    rest = np.zeros(0, "<u2")
    for shard in shards:
        tokens = np.concatenate([rest, shard])
        starts = np.flatnonzero(tokens == bos)
        for start, end in pairwise(starts):
            yield hashlib.blake2b(tokens[start + 1 : end], digest_size=16).digest(), end - start - 1
        rest = tokens[starts[-1] :] if len(starts) else tokens
    yield hashlib.blake2b(rest[1:], digest_size=16).digest(), len(rest) - 1


def disjoint(a: Audit) -> tuple[str, str]:
    """No validation document of eight tokens or more is a training document.

    Up to 1 % of repeated ones is what the web holds.
    """
    shortest = 8
    paths = shard_paths(a.data.folder, "train")
    if not paths:
        raise NotRun(f"{a.data.folder}: no training shards")
    val = {digest for digest, tokens in document_hashes([a.data.tokens], a.data.bos) if tokens >= shortest}
    seen, trained = set(), 0
    for digest, tokens in document_hashes(map(read_shard, paths), a.data.bos):
        trained += 1
        if tokens >= shortest and digest in val:
            seen.add(digest)
    what = f"{len(seen):,} of {len(val):,} validation documents are among {trained:,} training documents"
    return verdict_of([what] if len(seen) > max(1, len(val) // 100) else [], what)
