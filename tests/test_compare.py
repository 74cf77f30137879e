"""tools/compare.py on checkouts whose train_gpt.py is a stub: what it runs, what it calls equal, and what it names."""

import json
import subprocess

import pytest

from tools import compare

STUB = """import json
import os
import pathlib
import sys

import numpy as np

SOURCE = "x" * {length}
setting = lambda default: default


class Config:
    iterations: int = setting(8)
    artifact_margin: int = setting(0)
    artifact_dir: str = setting("")
    ledger_path: str = setting("")
    data_path: str = setting("")


def pack_script(source):
    return source.encode()


def encode_artifact(tensors, meta):
    return json.dumps(meta["settings"]).encode()


def load_artifact(path):
    return dict(np.load(path.with_suffix(".stub.npz"))), {{"settings": json.loads(path.read_bytes())}}


def main(argv):
    if "NUM_LAYERS" in os.environ:
        sys.exit("an unknown setting")
    out = pathlib.Path(os.environ["ARTIFACT_DIR"])
    np.savez(out / "trained.npz", w=np.arange(4.0), meta=np.array(["{length}"]))
    np.savez(out / "model.stub.npz", **{tensors})
    (out / "model.bin").write_bytes(encode_artifact({{}}, {{"settings": {{"of": {length}}}}}))
    np.save(os.environ["LEDGER_PATH"], np.full(3, {nats}))
    with open(pathlib.Path(__file__).with_name("ran.jsonl"), "a") as ran:
        settings = {{name: value for name, value in os.environ.items() if name.isupper()}}
        settings["header"] = (out / "model.bin").read_text()
        ran.write(json.dumps(settings) + "\\n")


if __name__ == "__main__":
    main([])
"""


def checkout(folder, length=100, tensors="{'a': np.zeros(2, np.int8)}", nats=1.0):
    (folder / "recipes").mkdir(parents=True)
    (folder / "train_gpt.py").write_text(STUB.format(length=length, tensors=tensors, nats=nats))
    for name in ("best", "ngram_progressive", "scale_demo"):
        (folder / "recipes" / f"{name}.env").write_text("ITERATIONS=99  # overlaid\nNUM_LAYERS=11\n")
    return folder


def ran(folder):
    return [json.loads(line) for line in (folder / "ran.jsonl").read_text().splitlines()]


def test_equal_checkouts_are_equal_and_base_is_run_once(tmp_path, capsys):
    base, head = checkout(tmp_path / "base"), checkout(tmp_path / "head", length=130)
    arguments = [str(base), str(head), "best", "ngram_low", "--cache", str(tmp_path / "cache"), "--data", str(tmp_path)]
    for _ in range(2):
        assert compare.main(arguments) == 0
        said = capsys.readouterr().out
        assert said.count("EQUAL") == 2 and "2 of 2 variants are equal" in said
        assert "does not know" in said and "NUM_LAYERS" in said  # dropped, and named
    assert len(ran(base)) == 2 and len(ran(head)) == 4
    # The packed script of HEAD is 30 bytes longer: the same bytes are left for its model.
    assert ran(base)[0]["ARTIFACT_MARGIN"] == "12000" and ran(head)[0]["ARTIFACT_MARGIN"] == "11970"
    # Settings in the header count as bytes too: HEAD writes those of BASE.
    assert ran(base)[0]["header"] == ran(head)[0]["header"] == '{"of": 100}'
    assert ran(head)[0]["ITERATIONS"] == "8" and ran(head)[0]["DATA_PATH"] == str(tmp_path)


@pytest.mark.parametrize(
    "change,words",
    [
        ({"nats": 1.5}, "ledger: nats"),
        ({"tensors": "{'a': np.ones(2, np.int8)}"}, "model: a"),
        ({"tensors": "{'a': np.zeros(2, np.int16)}"}, "model: a has another form"),
        ({"tensors": "{'b': np.zeros(2, np.int8)}"}, "model: a is gone, model: b is new"),
    ],
)
def test_a_difference_is_named(tmp_path, capsys, change, words):
    base, head = checkout(tmp_path / "base"), checkout(tmp_path / "head", **change)
    assert compare.main([str(base), str(head), "best", "--data", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert f"DIFFER: {words}" in said and "0 of 1 variants are equal" in said


def test_another_base_is_run_again(tmp_path):
    """What lies in the cache is of the script and the settings that made it."""
    head = checkout(tmp_path / "head")
    for name, length in (("one", 100), ("two", 101)):
        base = checkout(tmp_path / name, length=length)
        more = ["--cache", str(tmp_path / "cache"), "--data", str(tmp_path)]
        assert compare.main([str(base), str(head), "best", *more]) == 0
        assert len(ran(base)) == 1


def test_what_is_no_checkout_is_one_line(tmp_path, capsys):
    assert compare.main([str(tmp_path), str(tmp_path)]) == 2
    assert "holds no train_gpt.py" in capsys.readouterr().err
    assert compare.main(["no-such-revision", str(tmp_path)]) == 2
    assert "neither a folder nor a git revision" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        compare.main([".", ".", "no_such_variant"])


def test_a_revision_is_checked_out_and_removed(tmp_path, monkeypatch):
    repository = checkout(tmp_path / "repository")
    monkeypatch.setattr(compare, "ROOT", repository)
    identity = ["-c", "user.name=n", "-c", "user.email=e"]
    for command in (["init", "-q"], ["add", "."], [*identity, "commit", "-qm", "one"]):
        subprocess.run(["git", "-C", str(repository), *command], check=True)
    assert compare.main(["HEAD", str(repository), "best", "--data", str(tmp_path)]) == 0
    listed = subprocess.run(["git", "-C", str(repository), "worktree", "list"], capture_output=True, text=True).stdout
    assert len(listed.splitlines()) == 1
