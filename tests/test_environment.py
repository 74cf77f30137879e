"""What surrounds a run: variables, launchers, signals, folders and consoles. Each fault is one line before anything is
touched (issue #26, 5a to 12)."""

import contextlib
import io
import json
import os
import pwd
import re
import shutil
import signal
import subprocess
import sys
import time
from multiprocessing import get_context
from pathlib import Path

import pytest
from helpers import (
    ROOT,
    RUN,
    base_run,
    clean_environ,
    config,
    data,
    environment,
    forked,
    main,
    replaced_environ,
    write_data,
)

import train_gpt
from train_gpt import Config, UserError

CHECK = {**RUN, "check_only": True}


def refusal(outcome, *names):
    """Status 2 and one line that says all of `names`."""
    assert outcome.code == 2, outcome.out[-2000:] + outcome.err[-2000:]
    assert outcome.err.startswith("error: ") and outcome.err.count("\n") == 1 and outcome.err.isprintable() is False
    for name in names:
        assert str(name) in outcome.err, outcome.err


def refused(env: dict[str, str]) -> str:
    """The message about these variables."""
    with pytest.raises(UserError) as error:
        Config.from_env(env)
    return str(error.value)


# ---- names and values ----


@pytest.mark.parametrize(
    "name, near",
    (("MODLE_DIM", "MODEL_DIM"), ("NUMLAYERS", "NUM_LAYERS"), ("MATRIXLR", "MATRIX_LR"), ("ITERATOINS", "ITERATIONS")),
)
@pytest.mark.parametrize("beside", (False, True), ids=("alone", "beside the right name"))
def test_a_setting_s_letters_are_meant_as_the_setting(name, near, beside):
    env = {name: "4", **({near: str(getattr(Config(), near.lower()))} if beside else {})}
    assert refused(env).startswith(f"{name} is not a setting; did you mean {near}?")


@pytest.mark.parametrize("beside", (False, True), ids=("alone", "beside the right name"))
def test_another_near_miss_always_warns(beside, capsys):
    Config.from_env({"NUM_LAYER": "5", **({"NUM_LAYERS": "11"} if beside else {})})
    err = capsys.readouterr().err
    assert "NUM_LAYER," in err and "NUM_LAYERS?" in err and err.count("\n") == 1


def test_what_launchers_set_is_no_near_miss(capsys):
    """GLOBAL_RANK stands beside LOCAL_RANK in every run of some launchers."""
    Config.from_env({"GLOBAL_RANK": "0", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"})
    assert capsys.readouterr().err == ""


def test_all_bad_names_and_values_come_at_once(tmp_path):
    """Pasted commands of other scripts: one round, not one for each name."""
    wrong = {"ttt_foo": 1, "numlayers": 4, "seed": "x", "ttt_enabled": "", "ema_decay": 2, "xsa_last_n": 4, "beta1": -1}
    out = main({**RUN, **wrong}, tmp_path / "out")
    refusal(out, *map(str.upper, wrong))
    assert not (tmp_path / "out").exists()


def test_all_conflicts_come_at_once():
    assert re.search(
        "NUM_HEADS.*ROPE_DIMS.*EVAL_STRIDE", refused({"NUM_HEADS": "7", "ROPE_DIMS": "5", "EVAL_STRIDE": "9999"})
    )


def test_a_continued_run_names_them_at_once_too(tmp_path):
    shutil.copy(base_run() / "trained.npz", tmp_path)
    refusal(main({"quantize_only": True, "numlayers": 4, "ema_decay": "x"}, tmp_path), "NUMLAYERS", "EMA_DECAY")


def test_the_page_of_settings_says_what_the_code_does():
    text = re.sub(r"\s+", " ", (ROOT / "docs" / "SETTINGS.md").read_text())
    assert "A variable that begins like a setting, or has the letters of one, and is none is an error" in text
    assert "one that only resembles a setting is a warning" in text


@pytest.mark.parametrize(
    "name", ("ARTIFACT_DIR", "DATA_PATH", "LEDGER_PATH", "SEED", "TTT_ENABLED", "MATRIX_LR", "DEVICE")
)
@pytest.mark.parametrize("around", ("{}\r", " {}", "{}\n", "{}\t", "\u00a0{}"))
def test_white_space_around_a_value_is_refused_and_shown(name, around):
    default = getattr(Config(), name.lower())
    value = around.format(int(default) if isinstance(default, bool) else default or "x.npy")
    message = refused({name: value})
    assert f"{name}={value!r}" in message and message.isprintable()


def test_a_line_end_inside_a_value_is_refused():
    assert refused({"ARTIFACT_DIR": "a\nb"}).isprintable()


@pytest.mark.parametrize(
    "name", ("TTT_ENABLED", "SEED", "MATRIX_LR", "DATA_PATH", "DEVICE", "TTT_CHUNKS", "WORLD_SIZE")
)
def test_an_empty_value_is_no_value(name):
    assert refused({name: ""}).startswith(name)


def test_an_empty_value_that_means_something_stays():
    assert Config.from_env({"ARTIFACT_DIR": "", "TOKENIZER_PATH": "", "ATTN_FULL_LAYERS": ""}).attn_full_layers == ""


@pytest.mark.parametrize("name", train_gpt.PATHS)
def test_a_home_in_a_path_is_the_home(name, monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    assert getattr(Config.from_env({name.upper(): "~/x.npy"}), name) == "/home/somebody/x.npy"
    assert f"{name.upper()}=~nobody_here/x.npy" in refused({name.upper(): "~nobody_here/x.npy"})


def test_every_path_is_among_the_paths():
    named = {name for name in Config.__dataclass_fields__ if name.endswith(("_path", "_dir", "_library"))}
    assert named == set(train_gpt.PATHS)


@pytest.mark.parametrize("backend", ("fa3", "fa4", "torch"))
def test_a_backend_that_a_cpu_lacks_is_refused(backend, tmp_path):
    refusal(main({**CHECK, "attention": backend}, tmp_path), f"ATTENTION={backend}", "GPU")


def test_the_reference_may_be_asked_for(tmp_path):
    assert "attention reference" in main({**CHECK, "attention": "reference"}, tmp_path).ok().out


def test_a_library_that_is_not_there(tmp_path):
    refusal(main({**CHECK, "fa3_library": tmp_path / "none.so"}, tmp_path), "FA3_LIBRARY", "no such file")


def test_a_reserve_beyond_the_budget_says_what_would_do():
    """Everyone who shortens the demo's 400 s meets it."""
    env = {"MAX_WALLCLOCK_SECONDS": "60", "GPTQ_RESERVE_SECONDS": "345"}
    message = refused(env)
    assert message.startswith("GPTQ_RESERVE_SECONDS=345.0 must be below MAX_WALLCLOCK_SECONDS=60")
    Config.from_env(env | {"GPTQ_RESERVE_SECONDS": message.split()[-1]})


# ---- packages that are missing ----


def test_no_sentencepiece(tmp_path, monkeypatch):
    folder = write_data(tmp_path / "data", train_documents=40, sidecar=False)
    data()  # needs it, too
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    refusal(main(CHECK, tmp_path / "out", folder), "sentencepiece", "pip install")
    refusal(main({**CHECK, "logit_calibration_enabled": True}, tmp_path / "out"), "sentencepiece", "pip install")


def start(folder: Path, torch: str, **options) -> subprocess.CompletedProcess:
    """train_gpt.py --help with a module torch of this source."""
    folder.mkdir(exist_ok=True)
    (folder / "torch.py").write_text(torch)
    env = clean_environ({"PYTHONPATH": str(folder)})
    command = [sys.executable, str(ROOT / "train_gpt.py"), "--help"]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, **options)


MISSING = "raise ModuleNotFoundError('No module named torch', name='torch')\n"
SIGNAL = "import os, signal, time\nos.kill(os.getpid(), signal.{})\ntime.sleep(0.2)\n"


def test_no_torch(tmp_path):
    done = start(tmp_path, MISSING)
    assert done.returncode == 1 and done.stderr == "error: no Python package torch; pip install -r requirements.txt\n"


@pytest.mark.parametrize("name, code", (("SIGINT", 130), ("SIGTERM", 143)))
def test_a_signal_while_torch_is_imported(name, code, tmp_path):
    done = start(tmp_path, SIGNAL.format(name))
    assert (done.returncode, done.stderr, done.stdout) == (code, "interrupted while starting\n", "")


def test_what_ignores_ctrl_c_goes_on_ignoring_it(tmp_path):
    """A job in the background, whose terminal sends Ctrl-C to another."""
    deaf = lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)
    assert "no Python package" in start(tmp_path, SIGNAL.format("SIGINT") + MISSING, preexec_fn=deaf).stderr


# ---- launchers ----


@pytest.mark.parametrize(
    "env, named",
    (
        ({"WORLD_SIZE": "2"}, ("WORLD_SIZE=2", "LOCAL_RANK, RANK")),
        ({"WORLD_SIZE": "2", "RANK": "1"}, ("without LOCAL_RANK:",)),
        ({"RANK": "1"}, ("RANK=1", "WORLD_SIZE=1")),
        ({"LOCAL_RANK": "1"}, ("LOCAL_RANK=1", "WORLD_SIZE=1")),
        ({"WORLD_SIZE": "2", "RANK": "2", "LOCAL_RANK": "0"}, ("RANK=2", "WORLD_SIZE=2")),
        ({"WORLD_SIZE": "2", "RANK": "-1", "LOCAL_RANK": "0"}, ("RANK=-1",)),
        ({"WORLD_SIZE": "two", "RANK": "0", "LOCAL_RANK": "0"}, ("WORLD_SIZE='two'",)),
        ({"WORLD_SIZE": "0"}, ("WORLD_SIZE=0",)),
    ),
)
def test_half_a_launcher(env, named):
    message = refused(env)
    assert all(text in message for text in named), message


@pytest.mark.parametrize(
    "env", ({"WORLD_SIZE": "1"}, {"RANK": "0"}, {"WORLD_SIZE": "8", "RANK": "7", "LOCAL_RANK": "3"})
)
def test_a_launcher_that_sets_enough(env):
    Config.from_env(env)


def wait_alone(rank: int, world: int, folder: Path, alone: int):
    settings = {**RUN, "world_size": 2, "rank": alone, "local_rank": 0, "rendezvous_seconds": 6}
    outcome = main(settings, folder)
    *waiting, last = outcome.err.splitlines()
    assert outcome.code == 2 and waiting == [f"rank {alone} of WORLD_SIZE=2 has waited 5 of 6 s for the others"]
    assert last.startswith(f"error: rank {alone} of WORLD_SIZE=2") and "RENDEZVOUS_SECONDS=6" in last
    del os.environ["MASTER_ADDR"]
    refusal(main(settings, folder), "MASTER_ADDR")


@pytest.mark.parametrize("alone", (0, 1))
def test_a_rank_whose_partner_never_comes(alone, tmp_path):
    forked(wait_alone, 1, tmp_path / "out", alone)
    assert not (tmp_path / "out").exists()


# ---- signals during a run ----


def interrupted(monkeypatch, where: str, settings: dict, folder: Path, *numbers: int):
    """A run that these signals reach, one as it unwinds from the other, in the function `where`."""

    def struck(*_):
        with contextlib.ExitStack() as stack:
            for number in reversed(numbers):
                stack.callback(os.kill, os.getpid(), number)

    monkeypatch.setattr(train_gpt, where, struck)
    return main(settings, folder)


GOES_ON = "; `QUANTIZE_ONLY=1` goes on from trained.npz"


@pytest.mark.parametrize(
    "where, settings, line",
    (
        ("preflight", RUN, "interrupted in setup"),
        ("preflight", {"ttt_eval_only": True}, "interrupted in setup"),
        ("write_artifact", {**RUN, "quantize_only": True}, f"interrupted in diagnostic{GOES_ON}"),
    ),
)
@pytest.mark.parametrize("number, code", ((signal.SIGTERM, 143), (signal.SIGINT, 130)))
def test_a_signal_says_where_and_what_goes_on(number, code, where, settings, line, tmp_path, monkeypatch):
    for name in ("trained.npz", "model.bin", "train_gpt.py"):
        shutil.copy(base_run() / name, tmp_path)
    before = {path.name for path in tmp_path.iterdir()}
    outcome = interrupted(monkeypatch, where, settings, tmp_path, number)
    assert (outcome.code, outcome.err) == (code, line + "\n")
    assert {path.name for path in tmp_path.iterdir()} - before <= {"train.log"}
    if where != "preflight":
        assert (tmp_path / "train.log").read_text().endswith(line + "\n")


def test_after_training_a_signal_says_that_the_weights_are_saved(tmp_path, monkeypatch):
    outcome = interrupted(monkeypatch, "collect_hessians", {**RUN, "iterations": 2}, tmp_path, signal.SIGTERM)
    assert (outcome.code, outcome.err) == (143, f"interrupted in calibrate{GOES_ON}\n")
    assert (tmp_path / "trained.npz").exists() and not (tmp_path / "run.lock").exists()


def test_a_second_signal_changes_nothing(tmp_path, monkeypatch):
    """Launchers send SIGTERM behind the terminal's Ctrl-C."""
    outcome = interrupted(monkeypatch, "preflight", RUN, tmp_path / "out", signal.SIGINT, signal.SIGTERM, signal.SIGINT)
    assert (outcome.code, outcome.err) == (130, "interrupted in setup\n") and not (tmp_path / "out").exists()


# ---- files of the user ----


@pytest.mark.parametrize("mode", ({}, {"data_path": "nowhere"}), ids=("a check", "a check that fails"))
def test_a_check_touches_no_file_that_is_there(mode, tmp_path):
    kept = {name: tmp_path / name for name in ("ledger.npy", "train.log", "eval.log", "model.bin", "result.json")}
    for path in kept.values():
        path.write_text(f"what {path.name} holds")
    main({**CHECK, "ledger_path": kept["ledger.npy"], **mode}, tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {name: f"what {name} holds" for name in kept}


@pytest.mark.parametrize("name, said", (("folder.npy", "a folder"), ("model.bin", "must end in .npy")))
def test_a_ledger_path_that_would_fail_or_replace_another_file(name, said, tmp_path):
    (tmp_path / "folder.npy").mkdir()
    refusal(main({**CHECK, "ledger_path": tmp_path / name}, tmp_path), "LEDGER_PATH", said)


def test_a_codec_that_fails_leaves_no_trial(tmp_path, monkeypatch):
    monkeypatch.setattr(train_gpt, "load_artifact", lambda path: train_gpt.require(False, f"{path}: no"))
    refusal(main(CHECK, tmp_path / "out"), "no")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("wrong", ({"data_path": "nowhere"}, {"ledger_path": "nowhere/x.npy"}, {"attention": "fa4"}))
def test_what_fails_before_training_leaves_no_folder_of_its_own(wrong, tmp_path):
    (tmp_path / "mine").mkdir()
    for folder in (tmp_path / "runs" / "deep", tmp_path / "mine"):
        assert main({**RUN, **wrong}, folder).code == 2
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_an_artifact_dir_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("mine")
    refusal(main(RUN, tmp_path / "file"), f"ARTIFACT_DIR={tmp_path / 'file'}", "a file, not a folder", "name another")
    assert (tmp_path / "file").read_text() == "mine"


# ---- two runs, one folder ----


@pytest.mark.parametrize("mode", (RUN, CHECK, {"ttt_eval_only": True}, {**RUN, "quantize_only": True}), ids=str)
def test_a_second_run_in_a_folder_is_refused(mode, tmp_path):
    for name in ("trained.npz", "model.bin", "train_gpt.py", "train.log"):
        shutil.copy(base_run() / name, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with train_gpt.claimed(tmp_path):
        refusal(main(mode, tmp_path), f"ARTIFACT_DIR={tmp_path}", f"process {os.getpid()} on {os.uname().nodename}")
        assert (tmp_path / "run.lock").exists()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def claim_until_killed(folder: Path):
    with train_gpt.claimed(folder):
        time.sleep(60)


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path):
    process = get_context("fork").Process(target=claim_until_killed, args=(tmp_path,))
    process.start()
    lock = tmp_path / "run.lock"
    for _ in range(3000):
        if lock.exists() and lock.read_text():
            break
        time.sleep(0.01)
    refusal(main(CHECK, tmp_path), f"process {process.pid}")
    process.kill()
    process.join()
    assert lock.exists()
    main(CHECK, tmp_path).ok()
    assert not lock.exists()


def test_a_lock_whose_file_its_owner_removes_meanwhile_is_no_lock(tmp_path, monkeypatch):
    flock, path = train_gpt.fcntl.flock, tmp_path / "run.lock"
    calls = []

    def slow(file, how):
        calls.append(path.unlink() if not calls else None)  # between opening and locking
        flock(file, how)

    monkeypatch.setattr(train_gpt.fcntl, "flock", slow)
    with train_gpt.open_lock(path), pytest.raises(UserError, match="is writing there"):
        train_gpt.open_lock(path)
    assert len(calls) == 3


def test_a_file_system_without_locks_is_no_obstacle(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(train_gpt.fcntl, "flock", none)
    main(CHECK, tmp_path).ok()


# ---- places without a home, a console or UTF-8 ----


def test_neither_home_nor_password_entry(tmp_path, monkeypatch):
    """A container that runs as a bare number."""

    def nobody(number):
        raise KeyError(f"getpwuid(): uid not found: {number}")

    monkeypatch.setattr(pwd, "getpwuid", nobody)
    monkeypatch.delenv("HOME")
    main(CHECK, tmp_path).ok()
    assert "no such home" in refused({"ARTIFACT_DIR": "~/x"})


@pytest.mark.parametrize("home", ("/", "", "/home/me", "/home/me/"))
def test_a_log_shortens_paths_at_home_and_nothing_else(home, monkeypatch, capsys):
    monkeypatch.setenv("HOME", home)
    train_gpt.Log(train_gpt.Ranks(config(device="cpu")))("tokens/s of /home/me/x and /data/y")
    inside = "~/x" if "me" in home else "/home/me/x"
    assert capsys.readouterr().out == f"tokens/s of {inside} and /data/y\n"


@contextlib.contextmanager
def closed_console():
    """stdout is a pipe whose reader has left."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as console, contextlib.redirect_stdout(console):
        yield  # closing it writes what is left, as Python does at its end


@pytest.mark.parametrize(
    "argv", (["--help"], ["--unpack", str(ROOT / "packed")], []), ids=("--help", "--unpack", "the log of a run")
)
def test_a_reader_that_leaves_early(argv, tmp_path):
    if "--unpack" in argv:
        argv = ["--unpack", str(base_run() / "train_gpt.py")]
    with replaced_environ(environment(CHECK, tmp_path)), closed_console():
        assert train_gpt.main(argv) == 0


@pytest.mark.parametrize("words", (["shape.py", "train_gpt.py"], ["report.py", "--help"]), ids=str)
def test_a_tool_s_table_whose_reader_leaves_early(words):
    """As `cat` and `ls` end: by SIGPIPE, without a word."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, str(ROOT / "tools" / words[0]), *words[1:]]
    done = subprocess.run(command, env=clean_environ({}), stdout=writer, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    os.close(writer)
    assert (done.returncode, done.stderr) == (-signal.SIGPIPE, "")


class Terminal(io.StringIO):
    """What a run writes, and what a terminal then shows of it."""

    def isatty(self) -> bool:
        return True

    def shown(self) -> list[str]:
        rows = []
        for line in self.getvalue().split("\n"):
            row = ""
            for part in line.split("\r"):  # each begins at the left again; \033[K erases what stands behind it
                text, erases, behind = part.partition("\033[K")
                row = text + behind if erases else text + row[len(text) :]
            rows.append(row)
        return rows


def test_a_terminal_shows_one_line_of_progress_that_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    log = train_gpt.Log(train_gpt.Ranks(config(device="cpu")))
    log.open(tmp_path / "log", "w")
    lines = [
        ("begins", False),
        ("one " * 20, True),
        ("two", True),
        ("a long line that stays " * 3, False),
        ("six", True),
    ]
    terminal, pipe = Terminal(), io.StringIO()
    for console in (terminal, pipe):
        with contextlib.redirect_stdout(console):
            for line, fleeting in lines:
                log(line, fleeting=fleeting)
    assert terminal.shown() == ["begins", lines[3][0], "six"]
    assert ("one " * 20)[:39] + "\033[K\r" in terminal.getvalue()  # one more column would begin another row
    plain = "".join(f"{line}\n" for line, _ in lines)
    assert pipe.getvalue() == plain and (tmp_path / "log").read_text() == 2 * plain


def test_an_error_on_a_terminal_stands_alone(monkeypatch, tmp_path):
    """Not among what is left of a line of progress."""
    terminal = Terminal()

    def fails(run, model):
        run.log("step 1, and so on", fleeting=True)
        raise UserError("no")

    monkeypatch.setattr(train_gpt, "train", fails)
    with replaced_environ(environment({**RUN, "ttt_enabled": False}, tmp_path)):
        with contextlib.redirect_stdout(terminal), contextlib.redirect_stderr(terminal):
            assert train_gpt.main([]) == 2
    assert terminal.shown()[-2:] == ["error: no", ""]


def test_steps_and_scores_in_a_file_are_plain_lines():
    log = (base_run() / "train.log").read_text()
    assert not re.search(r"[\r\033]", log) and len(re.findall("^step ", log, re.M)) >= RUN["iterations"]


def test_the_log_s_file_is_whole_without_a_console(tmp_path):
    log = train_gpt.Log(train_gpt.Ranks(config(device="cpu")))
    log.open(tmp_path / "log", "w")
    with closed_console():
        log("one")
        log("two")
    assert (tmp_path / "log").read_text() == "one\ntwo\n"


def test_a_console_and_a_log_that_cannot_show_a_name(tmp_path):
    """LC_ALL=C: the console is ASCII, and a name that is not becomes surrogates."""
    log = train_gpt.Log(train_gpt.Ranks(config(device="cpu")))
    log.open(tmp_path / "log", "w")
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    with contextlib.redirect_stdout(out):
        log("é " + b"\xc3\xa9".decode("ascii", "surrogateescape"))
    assert out.buffer.getvalue() == b"\\xe9 \\udcc3\\udca9\n"
    assert (tmp_path / "log").read_text(encoding="utf-8") == "é \\udcc3\\udca9\n"


def test_paths_outside_ascii_without_utf8(tmp_path):
    """Data, artifact, ledger and log of a run with LC_ALL=C and no UTF-8 mode; a manifest that is not ASCII."""
    place = tmp_path / "Zürich"
    data = write_data(place / "data", train_documents=40)
    manifest = json.loads((data / "manifest.json").read_text())
    text = json.dumps(manifest | {"source": {"kind": "Zürich"}}, ensure_ascii=False)
    (data / "manifest.json").write_text(text, encoding="utf-8")
    settings = {**RUN, "iterations": 1, "ttt_enabled": False, "ledger_path": place / "ledger.npy"}
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    env = clean_environ(environment(settings, place / "out", data) | locale)
    done = subprocess.run([sys.executable, str(ROOT / "train_gpt.py")], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "val_bpb" in (place / "out" / "train.log").read_text(encoding="utf-8") and (place / "ledger.npy").exists()
