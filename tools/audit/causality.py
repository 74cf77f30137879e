"""Conditions C1 to C4: the scorer as a black box, run on data that was tampered with."""

import math

import numpy as np

from tools.audit.outcome import Broken, NotRun, verdict_of
from tools.audit.shared import Audit, agreement, full_run, moved, small
from tools.audit.tamper import KNOWN, Dataset
from tools.verdicts import FAIL

PREFIXES = (64, 300, 1000)


SUM_TOLERANCE = {"cpu": 1e-4, "cuda": 1e-3}


LENGTH_TOLERANCE = 1e-5  # nats: other batch shapes round differently


WORLD_TOLERANCE = 1e-5  # BPB


def telling_prefix(a: Audit, length: int) -> np.ndarray:
    """About ``length`` tokens of validation text behind BOS, ending where the longest run of tokens occurs a second
    time: there the hints of an n-gram model fire."""
    text = a.scored.tokens[a.scored.tokens != a.scored.bos][:length].astype(np.int64)
    if len(text) < length // 2:
        raise NotRun(f"the validation set is shorter than {length} tokens")
    best, at = -1, len(text)
    for end in range(int(0.8 * len(text)), len(text) + 1):
        last = text[end - 1]
        for other in np.flatnonzero(text[: end - 1] == last)[-20:]:
            run = 1
            while run <= other and run < 12 and text[end - 1 - run] == text[other - run]:
                run += 1
            if run > best:
                best, at = run, end
    while text[at - 1] in a.scored.apart:  # behind a space, an operator would be no token of its own
        at -= 1
    return np.concatenate([[a.scored.bos], text[:at]]).astype(np.uint16)


def sum_to_one(a: Audit, length: int) -> tuple[str, str]:
    """C1, C2: the probabilities of every token of the vocabulary behind one prefix sum to 1.

    Each is scored as the end of a document of its own; BOS ends the document without continuation. Short documents come
    first, so that all the continuations lie in one segment behind every change of the base weights.
    """
    vocab = a.vocab
    if vocab > 1024:
        wanted = f"a vocabulary of {vocab:,} would take {vocab * length:,} targets"
        raise NotRun(f"{wanted}; audit a model of at most 1,024 by the same script")
    prefix = telling_prefix(a, length)
    fillers, env = documents_before_one_segment(a.artifact.settings, vocab)
    data, first, ends = continuations(a, prefix, fillers)
    nats = a.artifact.score(data, env=env).nats
    if len(nats) != len(data.tokens) - 1 or np.isnan(nats).any():
        raise Broken("the ledger lacks targets")
    same = nats[ends[1:, None] - np.arange(1, len(prefix))]  # the prefix itself, scored once per document
    total = float(np.exp(-nats[ends]).sum())
    spread = float(np.ptp(same, axis=0).max())
    where = f"sum over {vocab} tokens behind {len(prefix)} = {total:.7f}, behind {fillers} documents"
    if env:
        where += f", one segment by {' and '.join(env)}"
    faults = [] if abs(total - 1) <= SUM_TOLERANCE[a.artifact.device] else [where]
    if spread > max(LENGTH_TOLERANCE, 10 * a.tolerance):
        faults.append(f"the same prefix is scored differently before different tokens (by {spread:.2g} nats)")
    return verdict_of(faults, where)


def documents_before_one_segment(settings: dict, vocab: int) -> tuple[int, dict]:
    """How many documents must come first, so that the next `vocab` share a segment, and the settings for that."""
    if "segment_first_docs" in settings and not settings.get("phased_ttt_prefix_docs"):  # segments grow
        return vocab, {"SEGMENT_DOCS": 1 << 20, "SEGMENT_FIRST_DOCS": vocab}
    span, env = settings.get("segment_docs", 1 << 30), {}
    if span < vocab + 1:
        span, env = 1 << 20, {"SEGMENT_DOCS": 1 << 20}
    fillers = settings.get("phased_ttt_prefix_docs", 2500) if settings.get("phased_ttt_num_phases", 1) else 1
    if fillers // span != (fillers + vocab) // span:
        fillers = -(-fillers // span) * span
    return fillers, env


def continuations(a: Audit, prefix: np.ndarray, fillers: int) -> tuple[Dataset, int, np.ndarray]:
    """Short documents, the bare prefix, then the prefix with each token but BOS behind it.

    Returns the stream, the target of the BOS behind the bare prefix, and it with the last target of each document.
    """
    bos = a.scored.bos
    others = np.setdiff1d(np.arange(a.vocab), [bos]).astype(np.uint16)
    text = a.scored.tokens[a.scored.tokens != bos][:60]
    filler = [np.concatenate([[bos], text[i % 50 : i % 50 + 6]]) for i in range(fillers)]
    tokens = np.concatenate([*filler, prefix, *(np.append(prefix, token) for token in others)]).astype(np.uint16)
    sizes = None if a.scored.sizes is None else np.where(tokens == bos, 0, 1)
    first = sum(map(len, filler)) + len(prefix) - 1
    ends = first + np.append(0, len(prefix) + np.arange(len(others)) * (len(prefix) + 1))
    return Dataset(tokens, sizes, bos, a.scored.folder), first, ends


def future(a: Audit) -> tuple[str, str]:
    """C1, C3: later tokens of each document are replaced, lengths kept; what stands before them keeps its score."""
    data, rng = a.excerpt, np.random.default_rng(1)
    first, last, declared = a.segment()
    documents = data.documents()
    cuts = [int(rng.integers(2, end - start)) for start, end in documents[first:last]]
    places = np.concatenate([np.arange(start + cut, end) for (start, end), cut in zip(documents[first:last], cuts)])
    nats = a.artifact.score(a.replaced(data, places)).nats
    before = np.concatenate(
        [
            np.arange(documents[first][0]),
            *(np.arange(start, start + cut - 1) for (start, _), cut in zip(documents[first:last], cuts)),
        ]
    )
    changed = moved(nats[before], a.base.nats[before], a.tolerance)
    after = places[places < len(nats) + 1] - 1
    if not len(moved(nats[after], a.base.nats[after], a.tolerance)):
        raise Broken("replaced tokens keep their scores: the ledger is not of the data that was given")
    what = f"{len(before):,} targets before the replaced ends of {last - first} document(s)" + (
        "" if declared else " (no segments declared)"
    )
    return verdict_of(
        [f"{len(changed):,} of {what} moved, by up to {np.abs(nats[before] - a.base.nats[before]).max():.2g} nats"]
        if len(changed)
        else [],
        f"{what}: {agreement(a)}",
    )


def tail(a: Audit) -> tuple[str, str]:
    """C1, C3: the last tenth of the stream is replaced; everything before it keeps its score."""
    data = a.excerpt
    cut = int(0.9 * len(data.tokens))
    nats = a.artifact.score(a.replaced(data, np.arange(cut, len(data.tokens)))).nats
    changed = moved(nats[: cut - 1], a.base.nats[: cut - 1], a.tolerance)
    return verdict_of(
        [f"{len(changed):,} of {cut - 1:,} earlier targets moved, from target {changed[0]:,} on"]
        if len(changed)
        else [],
        f"{cut - 1:,} targets before the replaced tenth: {agreement(a)}",
    )


def documents(a: Audit) -> tuple[str, str]:
    """C1: one document is replaced, length kept. No earlier one moves, and none of the same declared segment; a leak
    over BOS alone moves the next one."""
    data = a.excerpt
    first, last, declared = a.segment()
    spans = data.documents()
    other = (first + last - 1) // 2 if declared else 1
    start, end = spans[other]
    nats = a.artifact.score(a.replaced(data, np.arange(start + 1, end))).nats
    changed = moved(nats, a.base.nats, a.tolerance)
    earlier = changed[changed < start]
    later = sorted(
        {int(d) for d in np.searchsorted(data.starts, changed, side="right") - 1 if d > other}
    )  # of the inputs: BOS is the last target before it
    faults = [f"{len(earlier):,} targets of earlier documents moved"] if len(earlier) else []
    mates = [d for d in later if d < last] if declared else []
    if mates:
        faults.append(f"documents {mates[:5]} moved with document {other} of the same segment")
    if not declared and later == [other + 1]:
        faults.append(f"only document {other + 1} moved with document {other}: something leaks over BOS")
    doubts = (
        [f"{len(later)} later documents moved; no segments are declared, so state crosses documents unannounced"]
        if not declared and later
        else []
    )
    return verdict_of(
        faults,
        f"document {other} replaced: no other of its segment of {last - first} moved"
        + ("" if declared else " (no segments declared)"),
        doubts,
    )


def lengths(a: Audit) -> tuple[str, str]:
    """C1: documents end earlier; what is left keeps its score, so no schedule looks at a document's length."""
    data, rng = a.excerpt, np.random.default_rng(2)
    first, last, _ = a.segment()
    spans = data.documents()
    cuts = [
        int(rng.integers(max(2, (end - start) // 3), end - start)) if first <= d < last else end - start
        for d, (start, end) in enumerate(spans)
    ]
    nats = a.artifact.score(data.of_documents([(start, start + cut) for (start, _), cut in zip(spans, cuts)])).nats
    begins = np.cumsum([0, *cuts])
    pairs = [
        (nats[new : new + cut - 1], a.base.nats[start : start + cut - 1])
        for d, ((start, _), cut, new) in enumerate(zip(spans, cuts, begins))
        if d < last
    ]
    worst = max(float(np.abs(x - y).max()) for x, y in pairs)
    what = f"{sum(len(x) for x, _ in pairs):,} targets of documents cut short: off by at most {worst:.2g} nats"
    return verdict_of([what] if not worst <= max(LENGTH_TOLERANCE, 4 * a.tolerance) else [], what)


def ledger(a: Audit) -> tuple[str, str]:
    """C4: one score per target, none missing, and the reported BPB is their sum over the bytes of the data."""
    faults, notes = [], []
    runs = [("excerpt", a.excerpt, a.base)]
    if small(a) and len(a.excerpt.tokens) != len(a.scored.tokens):
        runs.append(("full set", a.scored, full_run(a)))
    for name, data, scored in runs:
        nats, targets = scored.nats, len(data.tokens) - 1
        if nats.shape != (targets,):
            faults.append(f"{name}: {nats.size:,} entries for {targets:,} targets")
            continue
        infinite, negative = int((~np.isfinite(nats)).sum()), int((nats < 0).sum())
        if infinite or negative:
            faults.append(f"{name}: {infinite:,} targets have no finite score, {negative:,} a probability above 1")
            continue
        reported = scored.result.get("val_bpb", list(scored.result["bpb"].values())[-1])
        if data.sizes is not None:
            bpb = float(nats.sum(dtype=np.float64) / math.log(2) / data.sizes[1:].sum(dtype=np.int64))
            notes.append(f"{name}: {targets:,} targets once each, BPB {bpb:.6f} from the ledger")
            if abs(bpb - reported) > 1e-6 * bpb:
                faults.append(f"{name}: reports {reported:.8f} BPB, its ledger and the sidecar give {bpb:.8f}")
        if reported < 0.1 or (reported < 0.95 and targets + 1 in KNOWN):
            faults.append(f"{name}: {reported:.6f} BPB is implausible")
    return verdict_of(faults, "; ".join(notes))


def worlds(a: Audit) -> tuple[str, str]:
    """C4: 1, 2 and 3 ranks give the same BPB, so no score depends on which rank is free."""
    if a.artifact.device == "cuda":
        raise NotRun("needs as many GPUs as ranks; run --device cpu")
    found, targets, own = [], len(a.base.nats), a.artifact.settings
    # Batches so small that every rank has some; no score may depend on that either.
    env = {
        name: value
        for name, value in (("TTT_BATCH_SIZE", 2), ("VAL_BATCH_TOKENS", 2 * own.get("eval_seq_len", 0)))
        if name.lower() in own
    }
    for world in (2, 3):
        scored = a.artifact.score(a.excerpt, world, env)
        if len(scored.nats) != targets:
            return FAIL, f"{world} ranks: {len(scored.nats):,} entries instead of {targets:,}"
        found.append((world, scored, float(np.abs(scored.nats - a.base.nats).max())))
    ours = a.excerpt.sizes[1:].sum() if a.excerpt.sizes is not None else 3 * targets
    differ = [abs(float(s.nats.sum() - a.base.nats.sum())) / math.log(2) / ours for _, s, _ in found]
    what = (
        ", ".join(
            f"{world} ranks: {bpb:.1g} BPB (a target at most {most:.1g} nats)"
            for (world, _, most), bpb in zip(found, differ)
        )
        + " from 1 rank"
    )
    return verdict_of([what] if max(differ) > WORLD_TOLERANCE or np.isnan(differ).any() else [], what)
