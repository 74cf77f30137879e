"""The shape of Python files in figures: how much there is, how dense it stands on the page, how much is explained.

    python tools/shape.py train_gpt.py tools/*.py            one row a file
    python tools/shape.py --check train_gpt.py               exit with status 1 above a limit (`make lint`)

A code line is neither blank, comment nor docstring. A node is one of `ast.walk`, so it does not depend on the layout:
nodes a line says how dense a page is. A tuple assignment is `a, b = x, y`; unpacking a call is none. Comments are
lines or line ends with one, without banners and directives. Packed bytes are what the cap of the contest counts.
"""

import argparse
import ast
import importlib.util
import io
import re
import signal
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

# What --check allows, at most. A mechanism may raise the nodes of train_gpt.py, up to 62,000, in the commit whose
# measurement justifies it. Of other files ruff checks the width, and this the functions. Behind the readable 52,000:
#   + 4,700   faults of the environment, of data and of strangers' files, each shown by a test (docs/FAULTS.md)
#   + 1,000   CaseOps' second form and JOIN_OPERATORS
#   + 1,400   a plan over the whole stream, its time estimated before the first score
#   + 500     scores on the way (VAL_EVERY_STEPS), a changing line of progress, names of other scripts; no help packed
#   + 450     the entropy coder in 0.7 of the CPU time: columns at once, a second thread
#   + 1,450   dependent quantisation on a trellis: 0.84 of the loss by rounding at equal bytes
LIMITS = {
    "train_gpt.py": {
        "nodes": 61_550,
        "nodes_per_line": 12.0,
        "tuple_percent": 3.0,
        "widest": 120,
        "longest": 70,
        "packed": 62_000,
    },
}
OTHERS = {"widest": 120}
TITLES = {
    "lines": "lines",
    "code_lines": "code lines",
    "nodes": "nodes",
    "nodes_per_line": "nodes a code line",
    "tuple_percent": "tuple assignments in % of statements",
    "comments_per_100": "comments a 100 code lines",
    "widest": "columns of the widest line",
    "longest": "lines of the longest function",
    "packed": "packed bytes",
}
PRAGMA = re.compile(r"  # type: ignore\[[^]]*\]$")  # counts for no width, as with ruff
DIRECTIVE = re.compile(r"#\s*(noqa|fmt:|type:|ruff:|pragma|-{4,}|={4,})")


class Shape(NamedTuple):
    """The figures of one file, and where its widest line and its longest function are."""

    lines: int
    code_lines: int
    nodes: int
    nodes_per_line: float
    tuple_percent: float
    comments_per_100: float
    widest: int
    longest: int
    packed: int | None  # of train_gpt.py alone
    widest_at: int
    longest_name: str


def docstring_lines(tree: ast.Module) -> set[int]:
    """Numbers of the lines that docstrings cover."""
    covered = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if ast.get_docstring(node, clean=False) is not None:
                string = node.body[0]
                covered.update(range(string.lineno, string.end_lineno + 1))
    return covered


def code_and_comments(source: str) -> tuple[set[int], int]:
    """Numbers of the lines on which a token of the program stands, and how many comments say something."""
    layout = (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    code, comments = set(), 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments += not DIRECTIVE.match(token.string)
        elif token.type not in layout:
            code.update(range(token.start[0], token.end[0] + 1))
    return code, comments


def pairs_tuples(statement: ast.stmt) -> bool:
    """Whether a statement is `a, b = x, y`."""
    return (
        isinstance(statement, ast.Assign)
        and isinstance(statement.targets[0], ast.Tuple)
        and isinstance(statement.value, ast.Tuple)
    )


def functions(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(lines, name) of every function, methods and inner ones too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.end_lineno - node.lineno + 1, node.name


def packed_bytes(path: Path, source: str) -> int:
    """The size of the script that a run of this train_gpt.py ships: the file packs itself."""
    spec = importlib.util.spec_from_file_location("shape_of_train_gpt", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look their module up
    try:
        spec.loader.exec_module(module)
        return len(module.pack_script(source))
    finally:
        del sys.modules[spec.name]


def shape(path: Path) -> Shape:
    """Measure a file.

    Raises SyntaxError where it is not Python.
    """
    source = path.read_text(encoding="utf-8")
    tree = ast.parse(source, str(path))
    lines = source.splitlines()
    code, comments = code_and_comments(source)
    blank = {number for number, line in enumerate(lines, 1) if not line.strip()}
    code_lines = len(code - blank - docstring_lines(tree))
    nodes = list(ast.walk(tree))
    statements = [node for node in nodes if isinstance(node, ast.stmt)]
    longest, longest_name = max(functions(tree), default=(0, ""))
    widest, widest_at = max(((len(PRAGMA.sub("", line)), n) for n, line in enumerate(lines, 1)), default=(0, 0))
    return Shape(
        lines=len(lines),
        code_lines=code_lines,
        nodes=len(nodes),
        nodes_per_line=len(nodes) / max(code_lines, 1),
        tuple_percent=100 * sum(map(pairs_tuples, statements)) / max(len(statements), 1),
        comments_per_100=100 * comments / max(code_lines, 1),
        widest=widest,
        longest=longest,
        packed=packed_bytes(path, source) if path.name == "train_gpt.py" else None,
        widest_at=widest_at,
        longest_name=longest_name,
    )


def faults(path: Path, found: Shape) -> list[str]:
    """What is above the limits of a file, one line each."""
    where = {"widest": f" (line {found.widest_at})", "longest": f" ({found.longest_name})"}
    return [
        f"{path}: {getattr(found, name):,.6g} {TITLES[name]}{where.get(name, '')}, at most {limit:,.6g}"
        for name, limit in LIMITS.get(path.name, OTHERS).items()
        if getattr(found, name) > limit
    ]


def table(shapes: dict[Path, Shape]) -> str:
    """One row a file, its figures to the right."""
    titles = ("file", "lines", "code", "nodes", "a line", "tuples", "comments", "widest", "longest function", "packed")
    rows = [titles]
    for path, s in shapes.items():
        density = (f"{s.nodes_per_line:.1f}", f"{s.tuple_percent:.1f} %", f"{s.comments_per_100:.0f} %")
        function = f"{s.longest_name} {s.longest}" if s.longest else ""
        packed = f"{s.packed:,}" if s.packed else ""
        rows.append(
            (str(path), f"{s.lines:,}", f"{s.code_lines:,}", f"{s.nodes:,}", *density, str(s.widest), function, packed)
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(zip(row, widths)))
        for row in rows
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--check", action="store_true", help="exit with status 1 where a figure is above its limit")
    args = parser.parse_args(argv)
    try:
        shapes = {path: shape(path) for path in args.files}
    except (OSError, SyntaxError) as error:
        print(f"shape.py: {error}", file=sys.stderr)
        return 2
    print(table(shapes))
    above = [fault for path, found in shapes.items() for fault in faults(path, found)] if args.check else []
    for fault in above:
        print(f"check failed: {fault}", file=sys.stderr)
    return 1 if above else 0


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # a reader like `head` may leave before the end
    sys.exit(main())
