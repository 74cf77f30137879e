"""The packed script: it is the source, it runs alone, and a file on disk is always whole."""

import ast
import dataclasses
import importlib
import os
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, RUN, base_run, clean_environ, environment, main, result

import train_gpt
from train_gpt import UserError, pack_script, strip_source, unpack_script, without_meanings

SOURCE = (ROOT / "train_gpt.py").read_text()


def bare(source: str) -> str:
    """The syntax tree without docstrings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if (
            isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
            and ast.get_docstring(node) is not None
            and len(node.body) > 1
        ):
            del node.body[0]
    return ast.dump(tree)


def run_alone(folder: Path, *args, **settings) -> subprocess.CompletedProcess:
    """The folder's train_gpt.py from inside it, where nothing of the repository can be imported."""
    env = clean_environ(environment(settings)) if settings else clean_environ({})
    return subprocess.run(
        [sys.executable, "train_gpt.py", *args], cwd=folder, env=env, capture_output=True, text=True, timeout=120
    )


# ---- the source ----


def test_stripping_keeps_the_program():
    stripped = strip_source(SOURCE)
    assert bare(stripped) == bare(SOURCE)
    assert strip_source(stripped) == stripped and len(stripped) < 0.9 * len(SOURCE)
    assert pack_script(stripped) == pack_script(SOURCE) == pack_script(SOURCE)


HOSTILE = {
    "hash in strings": 'x = "# no comment"  # a comment\ny = \'#\' # "\nz = f"{x}#{y}"  # end\n',
    "comment between decorators": (
        "import functools\n\n\n@functools.cache\n# why\ndef f():\n    # first\n    return 1  # one\n"
    ),
    "blank lines in a string": 'x = """one\n\n  two  \n\n# three\n"""\n',
    "trailing blanks in a string": "x = '''a   \nb\t\n'''\n",
    "only a docstring": 'def f():\n    """All there is."""\n\n\nclass A:\n    "Nothing else."\n',
    "docstring and body on one line": 'def f(): "doc"; return 1\nclass A: "doc"; x = 1\n',
    "docstring then semicolon": 'def f():\n    "doc"; x = 1\n    return x\n',
    "long docstring": 'def f():\n    """One\n\n    # two\n    """\n    return 1\n',
    "strings that are no docstrings": 'def f():\n    x = 1\n    "just a string"\n    return x\n',
    "joined lines": "x = (1 +  # one\n     # two\n\n     2)\ny = 1 + \\\n    2\n",
    "async": 'async def f():\n    """Doc."""\n    return 1\n',
    "unusual white space": 'x = "a\x0cb"\ny = "c\u2028d"  # e\n\x0c\nz = 1  # f\n',
    "escapes": 'x = "\\\\ \\" \\n"\ny = r"\\n"\nz = b"\\x00\\xff"\n',
}


@pytest.mark.parametrize("name", HOSTILE)
def test_stripping_keeps_any_program(name):
    stripped = strip_source(HOSTILE[name])
    assert bare(stripped) == bare(HOSTILE[name]) and strip_source(stripped) == stripped


@pytest.mark.parametrize(
    "source, packed",
    [
        ('a: str = setting("x, y",\n    "è: (\\"b\\"), "\n    "c",\n  "what, means")\n', '"",\n  "what, means")\n'),
        ('a: int = setting(1,  # why\n    # so\n    "b "  # two\n    "c")\n', '"")\n'),
        ('a: int = setting(1, "one", "[0, 1]")\n', '"one", "[0, 1]")\n'),  # of another form: all of it stays
        ('a: int = setting(1,\n    "b" + c)\n', '"b" + c)\n'),
        ('a: int = setting(1,\n    "b".c())\n', '"b".c())\n'),
        ('fail(1,\n    "b")\nraise UserError(\n    "c")\nx: int = other.setting(1,\n    "d")\n', '"d")\n'),
    ],
)
def test_a_packed_script_has_no_meanings_of_settings(source, packed, tmp_path):
    path = tmp_path / "train_gpt.py"
    path.write_bytes(pack_script(source))
    there = unpack_script(path)
    assert there.endswith(packed) and there.count("\n") <= source.count("\n")
    assert there[: -len(packed)].split() == strip_source(source)[: len(there) - len(packed)].split()
    assert pack_script(there) == path.read_bytes()


def test_nothing_but_the_meanings_is_gone(tmp_path, monkeypatch):
    """What decides a run stays: names, types, defaults and limits; so does all else, the texts of errors among it."""
    shipped = without_meanings(strip_source(SOURCE))
    fields = dataclasses.fields(train_gpt.Config)
    assert not [f.name for f in fields if f.metadata["meaning"] in shipped]
    (tmp_path / "shipped.py").write_text(shipped)
    monkeypatch.syspath_prepend(tmp_path)
    there = dataclasses.fields(importlib.import_module("shipped").Config)
    facts = lambda f: (f.name, f.type, f.default, f.metadata["within"])
    assert list(map(facts, there)) == list(map(facts, fields)) and not any(f.metadata["meaning"] for f in there)
    trees = [ast.parse(text) for text in (shipped, SOURCE)]
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "setting":
                node.args[1] = ast.Constant("")
    assert bare(ast.unparse(trees[0])) == bare(ast.unparse(trees[1]))


def test_unpack_prints_what_packs_to_the_shipped_bytes():
    shipped = (base_run() / "train_gpt.py").read_bytes()
    out = main({}, argv=["--unpack", str(base_run() / "train_gpt.py")]).ok()
    assert out.out == without_meanings(strip_source(SOURCE)) and pack_script(out.out) == shipped


NOT_PACKED = {
    "nothing.py": None,
    "other.py": "print(1)\n",
    "train_gpt.py": SOURCE,
    "broken.py": 's=lzma.decompress("abc".encode("latin-1"))\n',
    "empty.py": "",
}


@pytest.mark.parametrize("name", NOT_PACKED)
def test_unpack_refuses_what_is_not_packed(name, tmp_path):
    if NOT_PACKED[name] is not None:
        (tmp_path / name).write_text(NOT_PACKED[name])
    out = main({}, argv=["--unpack", str(tmp_path / name)])
    assert out.code == 2 and out.out == "" and out.err.count("\n") == 1 and name in out.err


@pytest.mark.parametrize("seed", range(3))
def test_any_source_survives_packing(seed, tmp_path):
    """Sizes and contents that put every byte value into the compressed stream, quotes, backslashes, returns and zeros
    among them."""
    rng = random.Random(seed)
    source = (
        "x = [\n"
        + "".join(f'"{rng.getrandbits(256):064x}",\n' for _ in range(300))
        + "]\nprint(len(x), sum(int(v, 16) for v in x) % 1000003)\n"
    )
    packed = pack_script(source)
    assert set(range(1, 256)) - {10, 13} <= set(packed)
    (tmp_path / "train_gpt.py").write_bytes(packed)
    assert unpack_script(tmp_path / "train_gpt.py") == source
    want = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True).stdout
    got = run_alone(tmp_path)
    assert got.stdout == want != "" and got.stderr == ""


# ---- the packed script, alone ----

JIT = textwrap.dedent('''
    """A script with a decorator that reads the source of what it decorates, as triton.jit does."""
    import inspect

    def jit(function):
        function.source = inspect.getsource(function)
        return function

    class Holder:
        """Doc."""
        @jit
        def method(self):
            return 2

    @jit
    def kernel(x, y: "tl.constexpr"):
        """Doc."""
        # a comment
        return x + y  # another

    if __name__ == "__main__":
        print(kernel.source + Holder.method.source, end="")
''')


def test_getsource_works_in_a_packed_script(tmp_path):
    (tmp_path / "train_gpt.py").write_bytes(pack_script(JIT))
    out = run_alone(tmp_path)
    assert out.stderr == ""
    kernel = '@jit\ndef kernel(x, y: "tl.constexpr"):\n    return x + y\n'
    method = "    @jit\n    def method(self):\n        return 2\n"
    assert out.stdout == kernel + method


def test_a_packed_script_leaves_no_file(tmp_path, monkeypatch):
    """Not even while it runs, so there is none that somebody else could have put there or changed; an error tells the
    line of the source all the same."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    source = JIT.replace("print(kernel", 'import os; print(os.listdir(os.environ["TMPDIR"])); 1 / 0; print(kernel')
    (tmp_path / "train_gpt.py").write_bytes(pack_script(source))
    out = run_alone(tmp_path)
    assert out.stdout == "[]\n" and "1 / 0" in out.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["temporary", "train_gpt.py"]
    assert not list((tmp_path / "temporary").iterdir())


DAMAGES = {
    "a byte altered": lambda packed: packed.replace(packed[600:604], b"abcd", 1),
    "some missing": lambda packed: packed[:600] + packed[620:],
    "no payload": lambda packed: packed[: packed.index(b'("') + 2] + packed[packed.index(b'".encode') :],
    "no latin-1": lambda packed: packed.replace(b'".encode', rb'\u4e2d".encode'),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_payload_is_one_line(name, tmp_path):
    path = tmp_path / "train_gpt.py"
    source = "x = '" + "".join(f"{n * 7919 % 100003:x}" for n in range(2000)) + "'\n"
    good = pack_script(source)
    damaged = DAMAGES[name](good)
    assert damaged != good
    path.write_bytes(damaged)
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(path), run_name="__main__")
    line = end.value.code
    assert line.startswith(f"error: {path}: damaged") and "\n" not in line


@pytest.mark.skipif(sys.platform != "linux", reason="needs Triton")
def test_triton_compiles_kernels_that_no_file_holds(tmp_path, capsys):
    """To machine code, with the lines of the source in it."""
    source = textwrap.dedent("""
        import triton
        import triton.language as tl
        from triton.backends.compiler import GPUTarget

        @triton.jit
        def kernel(a, b, N: tl.constexpr):
            i = tl.arange(0, N)
            tl.store(b + i, tl.load(a + i))

        ast = triton.compiler.ASTSource(kernel, {"a": "*fp32", "b": "*fp32", "N": "constexpr"}, {(2,): 64})
        made = triton.compile(ast, target=GPUTarget("cuda", 90, 32)).asm
        print(len(made["cubin"]) > 0, "(unpacked)" in made["ptx"])
    """)
    (tmp_path / "train_gpt.py").write_bytes(pack_script(source))
    runpy.run_path(str(tmp_path / "train_gpt.py"), run_name="__main__")
    assert capsys.readouterr().out == "True True\n"


def test_unpack_has_a_limit(tmp_path, monkeypatch):
    """Kilobytes can become gigabytes."""
    path = tmp_path / "train_gpt.py"
    path.write_bytes(pack_script("x = '" + "a" * 100_000 + "'\n"))
    assert len(path.read_bytes()) < 2000 and len(unpack_script(path)) > 100_000
    monkeypatch.setattr(train_gpt, "MOST_SOURCE", 99_999)
    with pytest.raises(UserError, match="--unpack .*train_gpt.py"):
        unpack_script(path)


def test_help_from_an_empty_folder(tmp_path):
    """The repository cannot be imported there, and running the packed script does not change it or leave files beside
    it."""
    shutil.copy(base_run() / "train_gpt.py", tmp_path)
    before = (tmp_path / "train_gpt.py").read_bytes()
    out = run_alone(tmp_path, "--help")
    assert (
        out.returncode == 0
        and out.stderr == ""
        and "TRAIN_BATCH_TOKENS" in out.stdout
        and "MUON_MOMENTUM" in out.stdout
        and "A packed script has no meanings" in out.stdout
        and not re.search(r"[ ;]$", out.stdout, re.M)
    )
    assert "A packed script" not in train_gpt.help_text()
    assert f"{train_gpt.Config().train_batch_tokens}   (0, inf)" in out.stdout  # a default and its limits
    assert [path.name for path in tmp_path.iterdir()] == ["train_gpt.py"] and (
        tmp_path / "train_gpt.py"
    ).read_bytes() == before
    probe = subprocess.run(
        [sys.executable, "-c", "import lossless_caps"], cwd=tmp_path, env=clean_environ({}), capture_output=True
    )
    assert probe.returncode != 0


def test_the_artifact_alone_gives_the_same_number(tmp_path):
    """train_gpt.py and model.bin in an empty folder, without one setting of the model: every BPB of the run to the last
    digit."""
    for name in ("train_gpt.py", "model.bin"):
        shutil.copy(base_run() / name, tmp_path)
    out = run_alone(tmp_path, ttt_eval_only=True)
    assert out.returncode == 0, out.stderr
    ran, again = result(base_run()), result(tmp_path, "eval_result.json")
    assert again["bpb"] and all(again["bpb"][name] == ran["bpb"][name] for name in again["bpb"])
    assert (
        again["val_bpb"] == ran["val_bpb"]
        and again["bytes"] == ran["bytes"]
        and again["settings_sha256"] == ran["settings_sha256"]
    )
    for name in ("train_gpt.py", "model.bin"):
        assert (tmp_path / name).read_bytes() == (base_run() / name).read_bytes()


def test_the_packed_script_trains_the_same_artifact(tmp_path):
    """In its own folder, without touching itself: the same two files as the run that packed it."""
    shutil.copy(base_run() / "train_gpt.py", tmp_path)
    out = run_alone(tmp_path, **RUN)
    assert out.returncode == 0, out.stderr
    assert (tmp_path / "train_gpt.py").read_bytes() == (base_run() / "train_gpt.py").read_bytes()
    assert result(tmp_path)["bpb"] == result(base_run())["bpb"]
    assert not list(tmp_path.glob("*.part*"))


def test_the_total_is_the_size_of_the_two_files():
    sizes = {
        name: (base_run() / file).stat().st_size for name, file in (("code", "train_gpt.py"), ("model", "model.bin"))
    }
    assert result(base_run())["bytes"] == {**sizes, "total": sum(sizes.values())}


def test_the_running_script_is_never_overwritten(tmp_path, monkeypatch):
    """ARTIFACT_DIR is the folder of the unpacked script: refused before training, by a line that names the setting, the
    file as it was."""
    shutil.copy(ROOT / "train_gpt.py", tmp_path)
    monkeypatch.setattr(train_gpt, "RUNNING", tmp_path / "train_gpt.py")
    monkeypatch.setattr(train_gpt, "train", lambda *_: pytest.fail("trained"))
    out = main({**RUN, "check_only": True}, tmp_path)
    assert (tmp_path / "train_gpt.py").read_text() == SOURCE
    assert out.code == 2 and "ARTIFACT_DIR" in out.err and out.err.count("\n") == 1


# ---- files appear whole ----


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "model.bin"
    path.write_bytes(b"old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(train_gpt.os, "fsync", full)
    with pytest.raises(UserError, match=r"model\.bin: cannot be written \(No space left on device\)"):
        with train_gpt.whole_file(path) as f:
            f.write(b"new")
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["model.bin"]


def test_an_error_while_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / "model.bin"
    path.write_bytes(b"old")
    with pytest.raises(ZeroDivisionError):
        with train_gpt.whole_file(path) as f:
            f.write(b"new")
            raise ZeroDivisionError
    with pytest.raises(SystemExit):  # as SIGTERM's handler ends a run
        with train_gpt.whole_file(path) as f:
            f.write(b"new")
            sys.exit(143)
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["model.bin"]


def test_a_new_file_never_touches_the_old_one(tmp_path):
    """It appears by rename: another name of the old file still holds the old bytes."""
    path, other = tmp_path / "model.bin", tmp_path / "other_name"
    train_gpt.save_artifact(path, {"x": np.zeros(3, np.float16)}, {"version": 1})
    os.link(path, other)
    old = path.read_bytes()
    train_gpt.save_artifact(path, {"x": np.ones(3, np.float16)}, {"version": 2})
    assert other.read_bytes() == old != path.read_bytes()
    with train_gpt.whole_file(path) as f:
        f.write(b"third")
        f.flush()
        assert train_gpt.load_artifact(path)[1] == {"version": 2}
    assert path.read_bytes() == b"third" and other.read_bytes() == old


def write_for_ever(path: Path, versions, slow: bool):
    if slow:  # long enough that most kills fall between the write and the rename
        fsync = os.fsync
        train_gpt.os.fsync = lambda number: (fsync(number), time.sleep(0.02))
    while True:
        for arrays, meta in versions:
            train_gpt.save_artifact(path, arrays, meta)


@pytest.mark.parametrize("slow", (False, True))
def test_kill_9_leaves_the_old_or_the_new_file_whole(slow, tmp_path):
    rng = np.random.default_rng(0)
    make = lambda n: (
        {"o.symbols": rng.integers(-9, 10, (2, n, 8)).astype(np.int8), "o.step": np.ones((2, n), np.float16)},
        {"version": n},
    )
    versions, path = [make(16), make(48)], tmp_path / "model.bin"
    began = time.perf_counter()
    train_gpt.save_artifact(path, *versions[0])
    one_save, pause, seen = time.perf_counter() - began + 0.02 * slow, random.Random(1), set()
    identity = lambda: (path.stat().st_ino, path.stat().st_mtime_ns)
    for i in range(64):  # 8, or more until both versions have been found
        if i >= 8 and seen == {16, 48}:
            break
        writer, before = (
            get_context("fork").Process(target=write_for_ever, args=(path, versions[:: -1 if i % 2 else 1], slow)),
            identity(),
        )
        writer.start()
        while identity() == before:  # it has written one, however busy the machine is
            assert writer.is_alive()
            time.sleep(0.001)
        time.sleep(3 * one_save * pause.random())
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        arrays, meta = train_gpt.load_artifact(path)
        wanted = {m["version"]: a for a, m in versions}[meta["version"]]
        assert all((arrays[name] == wanted[name]).all() for name in wanted)
        seen.add(meta["version"])
    assert seen == {16, 48}
