"""tools/sample.py: continuations by an artifact."""

import dataclasses
import itertools

import pytest
import torch
from helpers import VOCAB, base_run, config, encode, network, packed_seq, processor, tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

import lossless_caps
import train_gpt
from tools import sample

PROMPT = [1, 40, 41, 42, 43, 44, 45, 46, 47, 48]
STORY = "the river said nothing 🐎 漢字 École ж"  # some of it in no piece of the tokenizer


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def recomputed_logits(model, cfg, tokens: list[int]) -> torch.Tensor:
    """Logits (V,) behind tokens, by one pass over all of them."""
    with torch.no_grad():
        hidden = model.trunk(torch.tensor(tokens), packed_seq([len(tokens)]), looped=cfg.looped)
        return sample.next_logits(model, hidden[-1:])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attn_window": 0, "num_loops": 0},
        {"parallel_mode": "gptj", "smear_gate_enabled": False, "asym_logit_rescale": True},
    ],
    ids=["windows, loops, lanes", "whole attention", "gptj, two caps"],
)
def test_greedy_text_with_the_cache_is_that_of_full_recomputation(changes):
    cfg = config(eval_seq_len=64, **changes)
    model = network(cfg)
    with torch.no_grad():
        model.down.mul_(60)  # so that it does not repeat the last token on and on
        model.o.mul_(60)
    tokens = list(PROMPT)
    made = itertools.islice(sample.continuation(model, cfg, PROMPT, 0, 1.0, generator()), 40)
    for token in made:
        logits = recomputed_logits(model, cfg, tokens)
        assert token == int(logits.argmax())
        tokens.append(token)
    assert len(set(tokens[len(PROMPT) :])) > 5


def test_a_prompt_in_one_piece_and_token_by_token_leave_the_same():
    cfg = config(eval_seq_len=64)
    model = network(cfg)
    with torch.no_grad():
        cache = sample.empty_cache(model, cfg)
        for position, token in enumerate(PROMPT):
            hidden, cache = sample.read_on(model, cfg, torch.tensor([token]), cache, position)
        whole, at_once = sample.read_on(model, cfg, torch.tensor(PROMPT), sample.empty_cache(model, cfg), 0)
    torch.testing.assert_close(hidden, whole, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(cache.keys, at_once.keys, rtol=1e-4, atol=1e-4)


def test_context_is_at_most_that_of_scoring():
    cfg = config(eval_seq_len=8)
    model = network(cfg)
    with torch.no_grad():
        _, cache = sample.read_on(model, cfg, torch.tensor(PROMPT), sample.empty_cache(model, cfg), 0)
    assert cache.keys.shape[2] == 7
    made = list(itertools.islice(sample.continuation(model, cfg, PROMPT * 3, 0, 1.0, generator()), 20))
    assert len(made) == 20


@pytest.mark.parametrize("calibrated", [False, True])
def test_probabilities_are_those_of_scoring(calibrated):
    cfg = config(asym_logit_rescale=True)
    model = network(cfg)
    if calibrated:
        model.logit_calibration = train_gpt.LogitCalibration(torch.tensor(0.93), torch.linspace(-0.5, 0.5, VOCAB))
    hidden, targets = torch.randn(1, cfg.model_dim), torch.tensor([17])
    with torch.no_grad():
        nats = model.nll(hidden, targets).nats[0]
        assert -sample.next_logits(model, hidden).log_softmax(-1)[17] == pytest.approx(nats.item(), abs=1e-5)


def test_choosing_a_token():
    logits = torch.tensor([0.1, 0.2, 0.05, 0.65]).log()
    assert sample.pick(logits, 0, 0.1, generator()) == 3
    draws = lambda temperature, top_p: [sample.pick(logits, temperature, top_p, g) for g in [generator(7)] * 400]
    assert set(draws(1.0, 1.0)) == {0, 1, 2, 3}
    assert set(draws(1.0, 0.6)) == {3}
    assert set(draws(1.0, 0.8)) == {1, 3}
    assert set(draws(1.0, 1e-9)) == {3}
    assert draws(1.0, 1.0).count(3) < draws(0.5, 1.0).count(3)
    assert draws(1.0, 1.0) == draws(1.0, 1.0)


TEXT = st.text(alphabet=["a", "B", "z", "I", "É", " ", " ", ".", "1", "\n", *lossless_caps.OPERATORS], max_size=24)


@settings(max_examples=400, deadline=None)
@given(text=TEXT, form=st.sampled_from(sample.FORMS))
def test_case_comes_out_of_pieces_as_out_of_the_whole(text, form):
    encoded = lossless_caps.encode(text, form)
    assert "".join(map(sample.CaseDecoder(), encoded)) == text


@settings(max_examples=200, deadline=None)
@given(text=TEXT)
def test_operators_without_a_meaning_are_passed_over(text):
    decoder = sample.CaseDecoder()
    shown = "".join(map(decoder, text))
    letters = lambda s: [c.lower() for c in s if c not in lossless_caps.OPERATORS]
    assert letters(shown) == letters(text)


def test_text_comes_in_whole_characters():
    sp = processor(tokenizer())
    tokens = encode(STORY)[0]
    assert any(sp.is_byte(token) for token in tokens)
    decoder = sample.TextDecoder(sp)
    parts = [decoder(token) for token in tokens]
    assert "".join(parts) == STORY and decoder.close() == ""
    assert not any("\ufffd" in part for part in parts)

    cut = sample.TextDecoder(sp)
    last_byte = max(i for i, token in enumerate(tokens) if sp.is_byte(token))
    for token in tokens[:last_byte]:
        assert "\ufffd" not in cut(token)
    assert cut.close() == "\ufffd"


def printed(capsys, *argv) -> str:
    assert sample.main([str(base_run()), "--tokenizer", str(tokenizer()), *argv]) == 0
    return capsys.readouterr().out


def test_an_artifact_says_something(capsys):
    words = ("--tokens", "30", "--prompt", "the river ", "Home")
    out = printed(capsys, *words)
    first, second = out.split("\n\n")
    assert first.startswith("the river ") and second.startswith("Home")
    assert len(first) > len("the river ") + 10
    assert out == printed(capsys, *words)
    assert out != printed(capsys, *words, "--seed", "1")
    assert printed(capsys, "--tokens", "5", "--temperature", "0") == printed(
        capsys, "--tokens", "5", "--temperature", "0", "--seed", "9"
    )


def test_it_stops_where_the_model_ends_the_document(monkeypatch, capsys):
    monkeypatch.setattr(sample, "continuation", lambda *_: iter([40, 41, 1, 42]))
    spelt = sample.TextDecoder(processor(tokenizer()))
    assert printed(capsys) == f"{spelt(40)}{spelt(41)}\n"


def test_each_token_is_printed_when_it_is_made(monkeypatch, capsys):
    seen = []

    def slowly(*_):
        for token in (40, 41, 42):
            seen.append(capsys.readouterr().out)
            yield token

    monkeypatch.setattr(sample, "continuation", slowly)
    printed(capsys, "--prompt", "so")
    assert seen[0] == "so" and all(seen)


def test_the_tokenizer_is_found_by_its_hash(tmp_path, monkeypatch):
    monkeypatch.delenv("TOKENIZER_PATH", raising=False)
    monkeypatch.delenv("DATA_PATH", raising=False)
    monkeypatch.setattr(sample, "ROOT", tmp_path)
    folder = tmp_path / "data" / "b"
    (tmp_path / "data" / "a").mkdir(parents=True)
    folder.mkdir()
    (tmp_path / "data" / "a" / "tokenizer.model").write_bytes(b"another")
    (folder / "tokenizer.model").write_bytes(tokenizer().read_bytes())
    assert sample.find_tokenizer(base_run(), None) == folder / "tokenizer.model"
    (folder / "tokenizer.model").unlink()
    with pytest.raises(train_gpt.UserError, match="--tokenizer"):
        sample.find_tokenizer(base_run(), None)


@pytest.mark.parametrize("fault", ["no artifact", "no tokenizer", "not a tokenizer", "another vocabulary"])
def test_bad_input_is_one_line(fault, tmp_path, capsys):
    bad = tmp_path / "bad.model"
    if fault == "not a tokenizer":
        bad.write_bytes(b"nothing")
    if fault == "another vocabulary":
        bad = tokenizer(vocab_size=VOCAB + 1)
    folder = tmp_path if fault == "no artifact" else base_run()
    assert sample.main([str(folder), "--tokenizer", str(bad)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("sample.py: ") and captured.err.count("\n") == 1


@pytest.mark.parametrize("option", [("--tokens", "0"), ("--temperature", "-1"), ("--top-p", "0"), ("--top-p", "nan")])
def test_options_out_of_range_are_refused(option, capsys):
    with pytest.raises(SystemExit):
        sample.parse_args([str(base_run()), *option])
    assert option[0] in capsys.readouterr().err


def test_settings_of_the_artifact_are_used_whatever_is_exported(monkeypatch):
    monkeypatch.setenv("NUM_LAYERS", "3")
    monkeypatch.setenv("TRAIN_SEQ_LEN", "7")
    _, cfg = sample.load_model(base_run(), tokenizer())
    assert dataclasses.replace(cfg).num_layers == 5
