"""tools/shape.py: every figure on files whose figures are plain to see, and a limit that is passed fails."""

import subprocess
import sys

import pytest
from helpers import ROOT

from tools import shape

SOURCE = '''"""A module.

Two lines."""

import os  # said


# ---------------- banner


def pair(x):
    """Doc."""
    a, b = x, 1  # a tuple assignment
    c, d = divmod(a, b)
    text = """
# no comment

"""
    # why
    return c, d, text, os
'''


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "some.py"
    path.write_text(SOURCE)
    return path


def test_the_figures_of_a_small_file(file):
    found = shape.shape(file)
    assert found.lines == 20
    # import, def, two assignments, three lines of text that are not blank, return
    assert found.code_lines == 8
    assert found.comments_per_100 == pytest.approx(100 * 3 / 8)
    # statements: two docstrings, import, def, three assignments, return
    assert found.tuple_percent == pytest.approx(100 / 8)
    assert (found.longest, found.longest_name) == (10, "pair")
    assert (found.widest, found.widest_at) == (37, 13)
    assert found.packed is None
    assert found.nodes_per_line == pytest.approx(found.nodes / 8)


def test_nodes_do_not_depend_on_the_layout(file, tmp_path):
    other = tmp_path / "other.py"
    other.write_text(SOURCE.replace("divmod(a, b)", "divmod(\n        a,\n        b,\n    )"))
    assert shape.shape(other).nodes == shape.shape(file).nodes
    assert shape.shape(other).code_lines == shape.shape(file).code_lines + 3


@pytest.mark.parametrize("name", shape.LIMITS["train_gpt.py"])
def test_a_limit_that_is_passed_fails(file, monkeypatch, capsys, name):
    found = shape.shape(file)._replace(packed=1000)
    monkeypatch.setattr(shape, "shape", lambda path: found)
    monkeypatch.setattr(shape, "LIMITS", {"some.py": {name: getattr(found, name)}})
    assert shape.main(["--check", str(file)]) == 0
    monkeypatch.setattr(shape, "LIMITS", {"some.py": {name: getattr(found, name) - 0.5}})
    assert shape.main([str(file)]) == 0
    assert shape.main(["--check", str(file)]) == 1
    assert shape.TITLES[name] in capsys.readouterr().err


def test_a_file_that_is_not_there_is_one_line(tmp_path, capsys):
    assert shape.main([str(tmp_path / "none.py")]) == 2
    assert "none.py" in capsys.readouterr().err


def test_a_script_that_packs_itself_is_measured_packed(tmp_path):
    """From the command line, as `make lint` calls it."""
    path = tmp_path / "train_gpt.py"
    path.write_text("def pack_script(source):\n    return source.encode() * 2\n")
    said = subprocess.run(
        [sys.executable, str(ROOT / "tools/shape.py"), "--check", str(path)], capture_output=True, text=True
    )
    assert said.returncode == 0, said.stderr
    assert said.stdout.split()[-1] == str(2 * len(path.read_bytes()))
