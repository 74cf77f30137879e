"""The texts say what is there: every link leads somewhere, every command in them names targets, tools, options, recipes
and settings that exist, the README stays a first page, and its figures are those of the logs.

Commands are read, not run: a tool's own parser takes the words, and is stopped behind its `parse_args`.
"""

import argparse
import importlib
import itertools
import json
import re
import shlex
import signal
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import ROOT
from packaging.requirements import Requirement
from torch.distributed.run import get_args_parser

from tools import submission
from tools.audit.readme import NOT_SETTINGS, variables_of_file
from train_gpt import Config

README = ROOT / "README.md"
TEXTS = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
HISTORY = "LOG.md"  # its commands and tools were those of their day
SETTINGS = {name.upper() for name in Config.__dataclass_fields__}
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
TARGETS = set(re.search(r"^\.PHONY: (.*)", MAKEFILE, re.M)[1].split())
MAKE_VARIABLES = set(re.findall(r"^(\w+) \?=", MAKEFILE, re.M))
PYTHON = re.compile(r"(?:\.venv/bin/)?python[\d.]*")
ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)=(.*)", re.S)
STARTERS = re.compile(rf"(?:[A-Z_]+=\S* )*(?:make|{PYTHON.pattern}|torchrun|\.|export) ")

# ---------------------------------------------------------------- reading a text


def prose_and_blocks(text: str) -> tuple[str, str]:
    """The text without its code blocks, and these alone; both keep the lines."""
    prose, code, fenced = [], [], False
    for line in text.splitlines():
        fence = line.lstrip().startswith("```")
        inside = not fence and (fenced or line.startswith("    "))
        fenced ^= fence
        prose.append("" if inside or fence else line)
        code.append(line if inside else "")
    return "\n".join(prose), "\n".join(code)


def anchors(text: str) -> set[str]:
    """Anchors that GitHub gives the headings."""
    headings = re.findall(r"^#+ (.*)", prose_and_blocks(text)[0], re.M)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


def link_faults(text: str, folder: Path) -> list[str]:
    """Relative links that lead to no file, or to a file without such a heading."""
    faults = []
    prose = re.sub(r"`[^`\n]*`", "", prose_and_blocks(text)[0])
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if re.match(r"\w+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = folder / name
        if name and not path.exists():
            faults.append(f"{target}: no such file")
        elif anchor and anchor not in anchors(path.read_text(encoding="utf-8") if name else text):
            faults.append(f"{target}: no such heading")
    return faults


def expanded(pattern: str) -> Iterator[str]:
    """A path with {a,b} in it -> one for each choice."""
    parts = [part.split(",") for part in re.split(r"[{}]", pattern)]
    return map("".join, itertools.product(*(part if i % 2 else [",".join(part)] for i, part in enumerate(parts))))


def path_faults(text: str, folders: str) -> list[str]:
    """Paths in backticks below these folders (a pattern) that are not there; NAME stands for any."""
    named = re.findall(rf"`((?:{folders})/[\w./*{{}},-]*)`", prose_and_blocks(text)[0])
    return [
        path
        for path in named
        if not all(any(ROOT.glob(each)) for each in expanded(path.rstrip("/").replace("NAME", "*")))
    ]


def commands(text: str) -> Iterator[list[str]]:
    """Simple commands, as words: of the code blocks, and of spans in the prose that begin like one."""
    prose, code = prose_and_blocks(text)
    spans = re.findall(r"`([^`\n]+)`", prose.replace("\n", " "))
    for line in [*re.sub(r"\\\n", " ", code).splitlines(), *spans]:
        if not STARTERS.search(f"{line.strip()} "):
            continue
        lexer = shlex.shlex(line, posix=True, punctuation_chars="();&|")
        lexer.whitespace_split = True
        for separator, words in itertools.groupby(lexer, lambda word: not word.strip("();&|")):
            if not separator:
                yield list(words)


# ---------------------------------------------------------------- what a command names


class ParsedError(BaseException):
    """The parser took all words; carries the namespace. No tool catches it."""


@pytest.fixture
def stop_at_parse(monkeypatch):
    """`parse_args` of every parser raises ParsedError where it would return."""
    parse = argparse.ArgumentParser.parse_args

    def stop(*words):
        raise ParsedError(parse(*words))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def parser_faults(module: str, words: list[str]) -> list[str]:
    """What a tool's parser has against the words."""
    tool = importlib.import_module(module)
    if not hasattr(tool, "argparse"):
        return [f"{module}: has no options" for word in words[:1] if word.startswith("-")]
    sys.argv = [module, *words]
    try:
        tool.main()
    except ParsedError:
        return []
    except SystemExit as stopped:
        return [] if stopped.code in (0, None) else [f"{module}: refuses {' '.join(words)}"]
    return [f"{module}: asks no parser"]


def script_faults(name: str, words: list[str]) -> list[str]:
    """A script of this repository and its arguments; train_gpt.py has no parser."""
    if not (ROOT / name).is_file():
        return [f"{name}: no such file"]
    if Path(name).name == "train_gpt.py":
        known = set(re.findall(r'"(--[a-z-]+)"', (ROOT / "train_gpt.py").read_text(encoding="utf-8")))
        return [f"{name}: no option {word}" for word in words if word.startswith("-") and word not in known]
    module = name.removesuffix(".py").replace("/", ".")
    return parser_faults(module + ".cli" if (ROOT / name).with_suffix("").is_dir() else module, words)


def python_faults(words: list[str]) -> list[str]:
    if words[:1] == ["-m"]:
        module = words[1]
        if not module.startswith("tools."):
            return []  # pip, pytest
        name = module.replace(".", "/")
        folder = (ROOT / name).is_dir()
        if not folder and not (ROOT / f"{name}.py").is_file():
            return [f"{module}: no such module"]
        return parser_faults(f"{module}.cli" if folder else module, words[2:])
    return script_faults(words[0], words[1:]) if words and words[0].endswith(".py") else []


def make_faults(words: list[str]) -> list[str]:
    faults = []
    for word in words:
        variable = ASSIGNMENT.fullmatch(word)
        if variable and variable[1] not in MAKE_VARIABLES:
            faults.append(f"make: no variable {variable[1]}")
        if not variable and word not in TARGETS:
            faults.append(f"make: no target {word}")
    return faults


def name_faults(words: list[str]) -> list[str]:
    """Recipes, scales and settings that options name; a name in capitals stands for one."""
    faults, option = [], ""
    for word in words:
        if word.startswith("--"):
            option = word
        elif option == "--set":
            settings = re.findall(r"(?:^|\s)(\w+)=", word)
            faults += [f"--set {name}: no such setting" for name in settings if name not in SETTINGS]
        elif option in ("--recipe", "--scale") and not word.isupper():
            file = f"recipes/{'scale_' if option == '--scale' else ''}{word}.env"
            faults += [] if (ROOT / file).is_file() else [f"{file}: no such file"]
    return faults


def torchrun_faults(words: list[str]) -> list[str]:
    try:
        get_args_parser().parse_args(words)
    except SystemExit:
        return [f"torchrun: refuses {' '.join(words)}"]
    except ParsedError as parsed:
        run = parsed.args[0]
        return script_faults(run.training_script, run.training_script_args)


def command_faults(words: list[str]) -> list[str]:
    """What does not exist of all that a simple command names."""
    words = words[1:] if words[0] == "export" else words
    setting = list(itertools.takewhile(ASSIGNMENT.fullmatch, words))
    names = [ASSIGNMENT.fullmatch(word)[1] for word in setting]
    unknown = [name for name in names if name.isupper() and name not in SETTINGS and not NOT_SETTINGS.fullmatch(name)]
    faults = [f"{name}: no such setting" for name in unknown]
    program, *rest = words[len(setting) :] or [""]
    if program == "make":
        faults += make_faults(rest)
    elif PYTHON.fullmatch(program):
        faults += python_faults(rest) + name_faults(rest)
    elif program == "torchrun":
        faults += torchrun_faults(rest)
    elif program == "." and not rest[0].startswith(".venv/"):
        faults += [] if (ROOT / rest[0]).is_file() else [f"{rest[0]}: no such file"]
    return faults


# ---------------------------------------------------------------- the texts


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_links_and_paths(path):
    text = path.read_text(encoding="utf-8")
    folders = "logs|docs" if path.name == HISTORY else r"logs|docs|tools|tests|recipes|\.ci"
    assert link_faults(text, path.parent) + path_faults(text, folders) == []


@pytest.mark.parametrize("path", [path for path in TEXTS if path.name != HISTORY], ids=lambda path: path.name)
def test_commands(path, stop_at_parse, monkeypatch):
    monkeypatch.setattr(sys, "argv", sys.argv)
    found = list(commands(path.read_text(encoding="utf-8")))
    assert [fault for words in found for fault in command_faults(words)] == []
    assert variables_of_file(path.name, path.read_text(encoding="utf-8")) <= SETTINGS  # what the audit asks
    assert len(found) >= {"README.md": 25, "USAGE.md": 20, "INSTALL.md": 8}.get(path.name, 0)


@pytest.mark.parametrize(
    "line, fault",
    [
        ("make demo nonsense", "make: no target nonsense"),
        ("make demo PITHON=python3", "make: no variable PITHON"),
        ("python tools/reports.py RUN_DIR", "tools/reports.py: no such file"),
        ("python tools/report.py RUN_DIR --nonsense", "tools.report: refuses RUN_DIR --nonsense"),
        ("python tools/audit.py DIR --dta DATA", "tools.audit.cli: refuses DIR --dta DATA"),
        ("python -m tools.benches train", "tools.benches: no such module"),
        ("python -m tools.bench trains", "tools.bench.cli: refuses trains"),
        ("python prepare_data.py --source", "prepare_data: refuses --source"),
        ("python train_gpt.py --unpacked FILE", "train_gpt.py: no option --unpacked"),
        ("torchrun --nprocs=8 train_gpt.py", "torchrun: refuses --nprocs=8 train_gpt.py"),
        ("torchrun --nproc_per_node=8 train.py", "train.py: no such file"),
        ("MATRIXLR=1 python train_gpt.py", "MATRIXLR: no such setting"),
        ("export MATRIXLR=1", "MATRIXLR: no such setting"),
        ("set -a; . recipes/bst.env; set +a; python train_gpt.py", "recipes/bst.env: no such file"),
        ("python tools/sweep.py --recipe best --set MATRIXLR=1,2", "--set MATRIXLR: no such setting"),
        ("python tools/sweep.py --recipe bst", "recipes/bst.env: no such file"),
        ("(cd runs && TTT_EVALONLY=1 python train_gpt.py)", "TTT_EVALONLY: no such setting"),
    ],
)
def test_a_wrong_command_is_found(line, fault, stop_at_parse, monkeypatch):
    monkeypatch.setattr(sys, "argv", sys.argv)
    for text in (f"Text:\n\n    {line}  # it's a comment\n", f"```\n{line}\n```\n"):
        assert fault in [fault for words in commands(text) for fault in command_faults(words)]


def test_a_wrong_link_is_found(tmp_path):
    (tmp_path / "other.md").write_text("# One: `two`, three\n\n    # no heading\n")
    good = "[a](other.md) [b](other.md#one-two-three) [c](https://example.com/x) [d](#here) `[e](none.md)`\n\n## Here\n"
    assert link_faults(good, tmp_path) == []
    bad = "[a](others.md) [b](other.md#no-heading) ![c](none.png) [d](#there)"
    assert [fault.split(":")[0] for fault in link_faults(bad, tmp_path)] == re.findall(r"\((.*?)\)", bad)
    assert path_faults("`logs/README.md` `logs/runs/h200_best_seed{42,314}/` `logs/bench/h200_*.log`", "logs") == []
    assert path_faults("`logs/none.log` `logs/runs/h200_best_seed{42,5}/`", "logs") == [
        "logs/none.log",
        "logs/runs/h200_best_seed{42,5}/",
    ]


def test_the_readme_is_a_first_page():
    data = README.read_bytes()
    lines = data.decode().splitlines()
    assert len(lines) <= 230 and len(data) <= 15_000
    assert [line for line in lines if len(line) > 120] == []


def test_the_readmes_commands_find_their_programs():
    """make has the interpreter by its path; python, pip and torchrun need the environment active, or a path."""
    code = prose_and_blocks(README.read_text(encoding="utf-8"))[1]
    before, active, _ = code.partition(". .venv/bin/activate")
    assert active and not re.search(r"^\s*(?:\w+=\S+ )*(?:python|pip|torchrun) ", before, re.M)


def test_the_readme_names_sections_of_the_script():
    banners = re.findall(r"^# =+ ([^:=]+)", (ROOT / "train_gpt.py").read_text(encoding="utf-8"), re.M)
    known = {re.sub(r" backends$", "", banner.strip()) for banner in banners}
    steps = re.search(r"## How it works\n(.*?)\n## ", README.read_text(encoding="utf-8"), re.S)[1]
    named = [name for names in re.findall(r"\*\* \((.*?)\):", steps, re.S) for name in re.findall(r"\*(.*?)\*", names)]
    assert set(named) == known


def listed_logs(folder: Path) -> set[Path]:
    """What the first column of the table of a folder's README names in backticks, a path each."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert link_faults(text, folder) == []
    cells = [line.split(" | ")[0] for line in text.splitlines() if line.startswith("| `")]
    named = [each for cell in cells for span in re.findall(r"`([^`]+)`", cell) for each in expanded(span.rstrip("/"))]
    assert [each for each in named if not any(folder.glob(each))] == []
    return {path for each in named for path in folder.glob(each)}


def test_every_log_is_in_the_index_and_in_the_table_of_its_theme():
    logs = ROOT / "logs"
    assert (logs / "README.md").read_text(encoding="utf-8").count("\n| `") <= 20
    themes = [path for path in logs.iterdir() if path.is_dir()]
    assert {path.name for path in themes} == {"runs", "bench", "ttt", "quant", "retired"}
    there = {path for theme in themes for path in theme.iterdir() if path.name != "README.md"}
    assert listed_logs(logs) == there
    own = {path for path in there if (path / "README.md").exists()}  # a folder that has its own table
    assert set().union(*map(listed_logs, themes)) | own == there


def test_the_readmes_figures_are_those_of_the_logs():
    text = README.read_text(encoding="utf-8")
    runs = [json.loads((ROOT / f"logs/runs/h200_best_seed{seed}/result.json").read_text()) for seed in (42, 314, 1337)]
    adapted = [run["bpb"]["adapted"] for run in runs]
    third = json.loads((ROOT / "logs/runs/third/lease_2/runs.json").read_text())["runs"]
    ours, public = third["ours_s1337"], third["1855_s42"]
    later = json.loads((ROOT / "logs/runs/third/lease_3/runs.json").read_text())["runs"]  # on that run's weights
    earlier = (ROOT / "logs/runs/third/ours_72a935b_seed42.log").read_text()  # all that is left of that run
    first = {name: float(re.search(rf"{name} BPB +(\S+)", earlier)[1]) for name in ("trained", "quantized")}
    quantized = statistics.fmean((first["quantized"], ours["bpb"]["quantized"]))
    figures = [
        f"**{statistics.fmean(adapted):.5f}** ({statistics.stdev(adapted):.4f}) |",
        f"| {statistics.fmean(run['bpb']['trained'] for run in runs):.5f} |",
        *(f"**{first[name]:.5f}**, **{ours['bpb'][name]:.5f}** | {public['bpb'][name]:.5f} |" for name in first),
        f"**{later['trellis']['bpb']['quantized']:.5f}** (seed 1337)",
        f"**{later['o1']['bpb']['adapted']:.5f}** (seed 1337)",
        f"{ours['steps']:,} | {public['steps']:,} |",
        f"| {ours['bytes']:,} | {public['bytes']:,} by brotli |",
        f"**Result: {quantized:.4f} BPB beside {public['bpb']['quantized']:.4f} of #1855**",
    ]
    assert [figure for figure in figures if figure not in text] == []


def test_the_table_of_settings_is_up_to_date():
    """After a change of settings: python tools/report.py --settings."""
    assert submission.verify_generated(ROOT / "docs" / "SETTINGS.md") == []


def test_the_lock_satisfies_the_requirements():
    """Every line of requirements.txt, on every system and Python that its markers know; and one version of each."""
    read = lambda name: [
        Requirement(line) for text in (ROOT / name).read_text().splitlines() if (line := text.split("#")[0].strip())
    ]
    locked = read("requirements.lock")
    assert len(locked) > 40 and all(re.fullmatch(r"==[\w.]+", str(pin.specifier)) for pin in locked)
    for python, system in itertools.product(("3.11", "3.12", "3.14"), ("linux", "darwin", "win32")):
        name = {"linux": "Linux", "darwin": "Darwin", "win32": "Windows"}[system]
        machine = {"python_version": python, "python_full_version": f"{python}.1", "sys_platform": system}
        machine["platform_system"] = name
        here = [pin for pin in locked if not pin.marker or pin.marker.evaluate(machine)]
        versions = {pin.name: str(pin.specifier)[2:] for pin in here}
        assert len(versions) == len(here)
        for wanted in read("requirements.txt"):
            if not wanted.marker or wanted.marker.evaluate(machine):
                assert wanted.specifier.contains(versions[wanted.name]), wanted


def test_make_help_lists_every_target():
    listed = re.findall(r"^## (.+)\n([a-z-]+):", MAKEFILE, re.M)
    assert {name for _, name in listed} == TARGETS
    assert all(len(text) <= 100 for text, _ in listed)


def test_the_tests_of_every_fault_are_there():
    """docs/FAULTS.md names them."""
    named = set(re.findall(r"\b(test_\w+)(?!\.py)\b", (ROOT / "docs" / "FAULTS.md").read_text(encoding="utf-8")))
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")]
    files = {path.stem for path in (ROOT / "tests").rglob("test_*.py")}
    known = set(re.findall(r"def (test_\w+)", "\n".join(sources))) | files
    assert len(named) > 100 and named <= known, named - known
