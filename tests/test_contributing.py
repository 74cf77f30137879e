"""CONTRIBUTING.md: each of its five changes, made on a copy of the repository, takes effect there.

A change is a list of insertions at anchors: what a stranger would type, at the places that the guide names.
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from helpers import ROOT, RUN, clean_environ, environment

GUIDE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


class Insertion(NamedTuple):
    """Text before the first line that matches, or behind it; with `instead`, the match itself is replaced."""

    file: str
    anchor: str
    text: str
    where: str = "before"


def insert(folder: Path, insertions: list[Insertion]):
    for file, anchor, text, where in insertions:
        path = folder / file
        source = path.read_text(encoding="utf-8")
        assert re.search(anchor, source, re.M), f"{file}: no {anchor}"
        change = {"before": lambda m, t=text: t + m[0], "behind": lambda m, t=text: m[0] + t, "instead": text}[where]
        path.write_text(re.sub(anchor, change, source, count=1, flags=re.M), encoding="utf-8")


@pytest.fixture
def copy(tmp_path) -> Path:
    """What a clone holds, less what no change here touches."""
    folder = tmp_path / "clone"
    left = shutil.ignore_patterns(".git", ".venv", "data", "runs", "logs", "shared", "__pycache__", ".*_cache")
    return Path(shutil.copytree(ROOT, folder, ignore=left))


def run(folder: Path, *arguments: str, settings: dict | None = None, status: int = 0) -> str:
    """Output of a Python command in the copy, under settings in lower case."""
    env = clean_environ(environment(settings or {}))
    done = subprocess.run([sys.executable, *arguments], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == status, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout + done.stderr


TINY_GPT = f"""
import dataclasses, torch, train_gpt as t
cfg = dataclasses.replace(t.Config(), **{RUN!r})
model = t.GPT(cfg, "reference", torch.float32)
model.init_weights(1)
"""


# ---------------------------------------------------------------- a setting

SETTING = [
    Insertion(
        "train_gpt.py",
        r"^    tied_embed_init_std: float = setting\(",
        '    embed_scale: float = setting(1.0, "factor of the first embedding", "(0, inf)")\n',
    ),
    Insertion("train_gpt.py", r"\* self\.cfg\.tied_embed_init_std", " * self.cfg.embed_scale", "behind"),
]


def test_a_new_setting(copy):
    """It is in the help and in the generated table, refuses what its interval excludes, and changes the weights."""
    insert(copy, SETTING)
    assert "EMBED_SCALE" in run(copy, "train_gpt.py", "--help")
    assert "EMBED_SCALE" in run(copy, "train_gpt.py", settings={"embed_scale": 0}, status=2)
    norm = (
        TINY_GPT
        + """
other = t.GPT(dataclasses.replace(cfg, embed_scale=3.0), "reference", torch.float32)
other.init_weights(1)
print(other.tok_emb.norm().item() / model.tok_emb.norm().item())
"""
    )
    assert float(run(copy, "-c", norm)) == pytest.approx(3.0)
    run(copy, "tools/report.py", "--settings")
    assert "| `EMBED_SCALE` | `1.0` | factor of the first embedding |" in (copy / "docs" / "SETTINGS.md").read_text()


# ---------------------------------------------------------------- an attention backend

NAIVE = '''
def naive_forward(q, k, v, cu_q, cu_k, max_q=0, max_k=0, window=-1):
    """Attention of one sequence and one head after another."""
    out = torch.empty_like(q)
    group = q.size(1) // k.size(1)
    for (a, b), (c, d) in zip(itertools.pairwise(cu_q.tolist()), itertools.pairwise(cu_k.tolist())):
        queries = torch.arange(d - c - b + a, d - c, device=q.device)  # the last keys are those of the queries
        behind = queries[:, None] - torch.arange(d - c, device=q.device)
        seen = (behind >= 0) & ((behind <= window) if window >= 0 else True)
        for head in range(q.size(1)):
            scores = q[a:b, head].float() @ k[c:d, head // group].float().T * q.size(-1) ** -0.5
            p = scores.masked_fill(~seen, -torch.inf).softmax(-1)
            out[a:b, head] = (p @ v[c:d, head // group].float()).to(q.dtype)
    return out, q.new_empty(0, dtype=torch.float32)


def naive_backward(dout, q, k, v, out, lse, cu_q, cu_k, max_q=0, max_k=0, window=-1):
    """The gradients, by autograd through the forward pass."""
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    with torch.enable_grad():
        again, _ = naive_forward(*leaves, cu_q, cu_k, window=window)
    return torch.autograd.grad(again, leaves, dout)


'''
BACKEND = [
    Insertion("train_gpt.py", r"^BACKENDS = ", NAIVE),
    Insertion(
        "train_gpt.py",
        r'^    "reference": (Backend)?\(reference_forward, reference_backward\),\n',
        r'\g<0>    "naive": \1(naive_forward, naive_backward),\n',
        "instead",
    ),
    Insertion("train_gpt.py", r'"auto, fa3, fa4, torch, reference', ", naive", "behind"),
]


def test_a_new_attention_backend(copy):
    """The check that every backend must pass before it is used takes it, and the setting names it."""
    insert(copy, BACKEND)
    checked = (
        TINY_GPT
        + """
t.check_backend("naive", cfg, torch.device("cpu"))
dataclasses.replace(cfg, attention="naive").validate()
wrong = lambda *arguments: (1.1 * t.naive_forward(*arguments)[0], None)
t.BACKENDS["naive"] = t.Backend(wrong, t.naive_backward)
try:
    t.check_backend("naive", cfg, torch.device("cpu"))
except RuntimeError as error:
    print("refused:", error)
"""
    )
    assert "refused:" in run(copy, "-c", checked)


# ---------------------------------------------------------------- a gate

GATE = [
    Insertion(
        "train_gpt.py",
        r"^    sparse_attn_gate_scale: float = setting\(",
        '    mlp_gate_enabled: bool = setting(False, "gate the MLP\'s output by channel")\n',
    ),
    Insertion(
        "train_gpt.py",
        r"^        self\.mlp_scale = .*\n|^        self\.resid_mix = ",
        "        self.mlp_gate = parameter(cfg.num_layers, cfg.model_dim, value=0) if cfg.mlp_gate_enabled else None\n",
    ),
    Insertion(
        "train_gpt.py",
        r'^        return site\.adapted\("mlp", ',
        "        if self.mlp_gate is not None:\n"
        "            out = out * (2 * torch.sigmoid(self.mlp_gate[site.visit.layer])).to(out.dtype)\n",
    ),
]


def test_a_new_gate_in_the_model(copy, tmp_path):
    """It learns, it is in the artifact, and the artifact scores the same when it is read back."""
    insert(copy, GATE)
    out = tmp_path / "run"
    settings = {**RUN, "iterations": 4, "artifact_dir": out, "ttt_enabled": False}
    run(copy, "train_gpt.py", settings=settings)
    plain = json.loads((out / "result.json").read_text())["bpb"]["trained"]
    run(copy, "train_gpt.py", settings={**settings, "mlp_gate_enabled": True})
    gated = json.loads((out / "result.json").read_text())["bpb"]
    assert gated["trained"] != plain
    stored = "import pathlib, train_gpt as t; "
    stored += f"print(abs(t.load_artifact(pathlib.Path({str(out / 'model.bin')!r}))[0]['mlp_gate']).max() > 0)"
    assert run(copy, "-c", stored).strip() == "True"
    run(out, "train_gpt.py", settings={"ttt_eval_only": True})
    again = json.loads((out / "eval_result.json").read_text())["bpb"]
    assert again["quantized"] == pytest.approx(gated["quantized"], abs=1e-9)


# ---------------------------------------------------------------- a recipe


def test_a_new_recipe(copy):
    """A file in recipes/ is all that the tools need; the defaults stand for what it does not name."""
    (copy / "recipes" / "wide_windows.env").write_text("# wide_windows: spans twice as long\nATTN_WINDOW=512\n")
    planned = run(copy, "tools/sweep.py", "--recipe", "wide_windows", "--scale", "demo", "--dry-run")
    assert "wide_windows-demo" in planned
    (copy / "recipes" / "wide_windows.env").write_text("ATTN_WINDOWS=512\n")
    assert "ATTN_WINDOW" in run(copy, "tools/sweep.py", "--recipe", "wide_windows", "--dry-run", status=2)


# ---------------------------------------------------------------- a verdict

VERDICT = [
    Insertion("train_gpt.py", r'"packaging", "data"(?=,?\)[^\n]*\n)', ', "steps"', "behind"),
    Insertion(
        "train_gpt.py",
        r"^    failed = run\.verdicts\.failed\(\)\n",
        '    steps = run.result.get("training", {}).get("steps", 0)\n'
        '    run.verdicts.set("steps", "PASS" if steps else "NOT RUN", f"{steps} steps")\n',
    ),
    Insertion(
        "tools/audit/papers.py",
        r"^def budget\(",
        'def steps(a: Audit) -> tuple[str, str]:\n    """The run has trained for at least five steps."""\n'
        '    count = a.artifact.result.get("training", {}).get("steps", 0)\n'
        '    return verdict_of([] if count >= 5 else [f"only {count} steps"], f"{count} steps")\n\n\n',
    ),
    Insertion("tools/audit/checks.py", r'^    "budget": papers\.budget,\n', '    "steps": papers.steps,\n'),
    Insertion("tools/audit/checks.py", r"^CONDITIONS = \{\n", '    "steps": ("steps",),\n', "behind"),
    Insertion("tools/submission.py", r"^CONDITIONS = \{\n", '    "steps": "trained at all",\n', "behind"),
]


def test_a_new_verdict(copy, tmp_path):
    """The run gives it, the audit may overrule it, the report shows it, and a FAIL leaves no val_bpb."""
    insert(copy, VERDICT)
    out = tmp_path / "run"
    run(copy, "train_gpt.py", settings={**RUN, "iterations": 4, "artifact_dir": out, "ttt_enabled": False})
    assert json.loads((out / "result.json").read_text())["verdicts"]["steps"]["verdict"] == "PASS"
    run(copy, "-m", "tools.audit", str(out), "--only", "steps", "size", status=1)
    shown = run(copy, "tools/report.py", str(out))
    assert "steps FAIL" in shown and "no val_bpb: a condition failed" in shown
    assert "trained at all" in (out / "report.html").read_text()


# ---------------------------------------------------------------- the guide


def test_the_guide_is_short():
    assert len(GUIDE.splitlines()) <= 80


@pytest.mark.parametrize("file", sorted({i.file for i in [*SETTING, *BACKEND, *GATE, *VERDICT]}) + ["recipes/"])
def test_the_guide_names_every_file_that_is_touched(file):
    assert f"`{file}" in GUIDE


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`((?:tests|tools|docs)/[\w/.]*)`", GUIDE))))
def test_what_the_guide_names_is_there(path):
    assert (ROOT / path).exists()
