"""What a README says, read as a person would: the commands that run train_gpt.py, and which figures are its own."""

import re
from collections.abc import Callable, Iterator
from itertools import zip_longest

# Variables of the machine and of other programs, not of the script.
NOT_SETTINGS = re.compile(
    r"PATH|HOME|PYTHON.*|PIP_.*|UV_.*|HF_.*|OMP_.*|MKL_.*|CUDA_.*|NCCL_.*|LD_.*|TORCH.*|PYTORCH_.*|TRITON_.*|"
    r"TOKENIZERS_.*|S|RUN_ID|LC_ALL|LANG"
)
VALUE = r"(?:\"[^\"]*\"|'[^']*'|\$\([^)]*\)|[^\s\"'])*"
ASSIGNMENTS = re.compile(rf"\s*((?:[A-Z][A-Z0-9_]*={VALUE}\s+)*)")
NAME = re.compile(rf"(?<![\w$-])([A-Z][A-Z0-9_]*)={VALUE}")
RUNS = re.compile(r"(?<![\w-])train_gpt\.py(?!\w)")
# A figure beside such words is another record's.
CITES = re.compile(
    r"#\d{2,}|\b(?:PR|SOTA|baseline|leaderboard|previous|prior|record|base|vs\.?|versus|over|was|from|threshold)\b",
    re.I,
)
FIGURE = re.compile(r"(?<![\d.])[01]\.\d{4,}(?!\d)")


def code_of(markdown: str) -> Iterator[str]:
    """The pieces of a README that somebody could paste: fenced blocks, indented ones, and spans in the prose that run
    the script. What is merely mentioned, like `BOS_ID=1`, is no command."""
    fence, block, indented = "", [], []
    for line in [*markdown.splitlines(), ""]:
        mark = re.match(r"\s*(```+|~~~+)", line)
        if fence:
            if mark and mark[1].startswith(fence):
                yield "\n".join(block)
                fence, block = "", []
            else:
                block.append(line)
            continue
        if re.match(r" {4}|\t", line):
            indented.append(line)
        elif indented:
            yield "\n".join(indented)
            indented = []
        if mark:
            fence = mark[1]
        else:
            yield from (span for span in re.findall(r"`([^`\n]+)`", line) if RUNS.search(span))
    if block:  # a fence that nobody closed
        yield "\n".join(block)


def logical_lines(code: str) -> Iterator[str]:
    """The commands of a piece of shell: continued lines joined, comments and prompts dropped, lists taken apart."""
    joined = re.sub(r"\\[ \t]*\r?\n", " ", code)
    for line in joined.splitlines():
        bare = re.sub(r"(?:^|\s)#.*", "", line).strip().removeprefix("$ ")
        yield from (part for part in re.split(r"&&|\|\||[;|]|\bdo\b", bare) if part.strip())


def variables_of(code: str) -> set[str]:
    """The variables that a piece of shell sets for a run of train_gpt.py: before it on its line, by `env`, by
    `-e NAME=` of a container, or exported beforehand."""
    named, exported, runs = set(), set(), False
    for line in logical_lines(code):
        words = line.strip()
        if words.startswith("export "):
            exported |= set(NAME.findall(words))
        elif RUNS.search(words) and re.search(r"\b(?:python[\d.]*|torchrun|accelerate|uv)\b", words):
            runs = True
            named |= set(NAME.findall(words[: RUNS.search(words).start()]))
    return {name for name in named | (exported if runs else set()) if not NOT_SETTINGS.fullmatch(name)}


def variables_of_file(name: str, text: str) -> set[str]:
    """What a README, a shell script or a recipe (`NAME=value` lines) sets."""
    if name.endswith(".env"):
        lines = (line for line in text.splitlines() if not line.startswith("#"))
        found = {variable for line in lines for variable in NAME.findall(line)}
        return {variable for variable in found if not NOT_SETTINGS.fullmatch(variable)}
    return variables_of(text if name.endswith(".sh") else "\n".join(code_of(text)))


def figures(markdown: str, seeds: set[str], backed: Callable[[str], bool]) -> tuple[list[str], list[str]]:
    """The figures of a README like a BPB: those that it gives for its own seeds or as its val_bpb, and all others that
    it does not lay to another record.

    In a seed's row one figure that something shows (`backed`) is the seed's; the others may be of what it is compared
    with."""
    own, others, heads = [], [], []
    for line in markdown.splitlines():
        numbers = FIGURE.findall(line)
        row = line.strip().strip("|").split("|") if line.strip().startswith("|") else []
        heads = heads if row and heads else row
        if row and re.sub(r"[*`\s]|seed", "", row[0], flags=re.I) in seeds:
            mine = [cell for cell, head in zip_longest(row, heads, fillvalue="") if not CITES.search(head)]
            numbers = FIGURE.findall(" ".join(mine))
            if any(map(backed, numbers)):
                others += numbers
            else:
                own += numbers
        elif CITES.search(line):
            continue
        elif re.search(r"\bval_bpb\b", line) and len(numbers) == 1:
            own += numbers
        else:
            others += numbers
    return own, others
