"""What an artifact says: text that goes on where a prompt ends, printed as it is made.

    python tools/sample.py runs/demo --prompt "Once upon a time" --tokens 200
    python tools/sample.py runs/demo --prompt "def " "class " --temperature 0.7 --top-p 0.9 --seed 3
    python tools/sample.py runs/demo --temperature 0                the likeliest token each time

RUN_DIR holds the model.bin that a run wrote. It is loaded and run by train_gpt.py's own code: the trunk, with keys and
values of earlier tokens kept. Nothing adapts to the text. Without --prompt a document begins. A text ends with --tokens
or where the model ends the document.

The tokenizer is --tokenizer, TOKENIZER_PATH, or tokenizer.model in DATA_PATH; otherwise the one in the folder of the
run or in data/ with the hash that result.json names.
"""

import argparse
import codecs
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

if not __package__:  # run as a file
    import anywhere  # noqa: F401

import lossless_caps
import train_gpt
from lossless_caps import ALLCAPS, CAPNEXT, ESC, OPERATORS, TITLE
from train_gpt import GPT, Cache, Config, Seq, UserError, require

ROOT = Path(__file__).resolve().parents[1]
FORMS = (lossless_caps.BEHIND_SPACE, lossless_caps.BEFORE_SPACE)


# ---------------------------------------------------------------- tokens


def empty_cache(model: GPT, cfg: Config) -> Cache:
    """A cache of one row that holds nothing yet."""
    visits = len(model.schedules[cfg.looped])
    device = model.tok_emb.device
    nothing = torch.zeros(visits, 1, 0, cfg.num_kv_heads, model.head_dim, dtype=model.dtype, device=device)
    return Cache(nothing, nothing, torch.full((1,), cfg.bos_id, device=device))


def read_on(model: GPT, cfg: Config, tokens: Tensor, cache: Cache, position: int) -> tuple[Tensor, Cache]:
    """The hidden state (1, d) of the last of tokens (n,) int64, the first of which stands at `position` of its
    document, and the cache with them. It keeps the last EVAL_SEQ_LEN - 1: with the next token the longest context of
    scoring."""
    older = cache.keys.shape[2]
    ends = lambda keys: torch.tensor([0, keys], dtype=torch.int32, device=tokens.device)
    positions = torch.arange(position, position + len(tokens), dtype=torch.int32, device=tokens.device)
    seq = Seq(ends(len(tokens)), ends(older + len(tokens)), len(tokens), older + len(tokens), positions)
    hidden, new = model.trunk(tokens, seq, looped=cfg.looped, cache=cache)
    keep = cfg.eval_seq_len - 1
    grown = lambda old, added: torch.cat((old, added), 2)[:, :, max(older + len(tokens) - keep, 0) :]
    return hidden[-1:], Cache(grown(cache.keys, new.keys), grown(cache.values, new.values), new.last)


def next_logits(model: GPT, hidden: Tensor) -> Tensor:
    """hidden (1, d) -> logits (V,) fp32 as they are scored: behind the softcap, calibrated where the artifact is."""
    logits = train_gpt.softcap(model.logits(hidden), model.caps)[0]
    if model.logit_calibration is not None:
        logits = model.logit_calibration.scale * logits + model.logit_calibration.bias
    return logits


def pick(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """A token from logits (V,): the likeliest at temperature 0, else one of the fewest that together have top_p."""
    if temperature == 0:
        return int(logits.argmax())
    p = (logits.double().cpu() / temperature).softmax(-1)
    p, tokens = p.sort(descending=True, stable=True)
    p = torch.where(p.cumsum(-1) - p < top_p, p, 0)  # the likeliest token always stays
    return int(tokens[torch.multinomial(p, 1, generator=generator)])


@torch.no_grad()
def continuation(
    model: GPT, cfg: Config, prompt: list[int], temperature: float, top_p: float, generator: torch.Generator
) -> Iterator[int]:
    """Tokens behind those of a prompt, which begins with BOS, one after the other without end."""
    device = model.tok_emb.device
    cache, position, tokens = empty_cache(model, cfg), 0, prompt
    while True:
        span = tokens[: cfg.eval_seq_len]  # a long prompt is read piece by piece
        hidden, cache = read_on(model, cfg, torch.tensor(span, device=device), cache, position)
        position += len(span)
        tokens = tokens[len(span) :]
        if not tokens:
            tokens = [pick(next_logits(model, hidden), temperature, top_p, generator)]
            yield tokens[0]


# ---------------------------------------------------------------- tokens to text, as they come


class CaseDecoder:
    """lossless_caps.decode for text that comes in pieces. It takes operators in either form, and passes over those that
    make no sense: a model may write some."""

    def __init__(self):
        self.pending = (
            ""  # an operator that waits for its letter, or ESC for its operator; ALLCAPS while the word lasts
        )
        self.inside = False  # whether the word of ALLCAPS has begun

    def __call__(self, text: str) -> str:
        return "".join(map(self.character, text))

    def character(self, c: str) -> str:
        if self.pending == ESC and c in OPERATORS:
            self.pending = ""
            return c
        if c in OPERATORS:
            if not (self.pending == ALLCAPS and c == CAPNEXT):  # ALLCAPS says the same of every letter
                self.pending, self.inside = c, False
            return ""
        if c.isascii() and c.isalpha():
            if self.pending == ALLCAPS:
                self.inside = True
                return c.upper()
            capital = self.pending in (TITLE, CAPNEXT) and self.pending
            self.pending = ""
            return c.upper() if capital else c
        before_space = c == " " and self.pending in (TITLE, ALLCAPS) and not self.inside
        if not before_space:  # the operator may stand before the space of its word
            self.pending = ""
        return c


class TextDecoder:
    """Text of tokens as they come: never half a character, and CaseOps undone where the tokenizer has its operators."""

    def __init__(self, sp):
        self.sp = sp
        self.bytes = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.cases = CaseDecoder() if has_caseops(sp) else str
        # A tokenizer may put a space of its own before a text.
        self.begins = sp.encode("a", out_type=str)[0].startswith("\u2581")

    def __call__(self, token: int) -> str:
        if self.sp.is_control(token) or self.sp.is_unused(token):
            return ""
        piece = self.sp.id_to_piece(token)
        raw = bytes([int(piece[1:-1], 16)]) if self.sp.is_byte(token) else piece.replace("\u2581", " ").encode()
        text = self.bytes.decode(raw)
        if self.begins and text:
            self.begins = False
            text = text.removeprefix(" ")
        return self.cases(text)

    def close(self) -> str:
        """What is left: a sign for a character that did not end."""
        return self.cases(self.bytes.decode(b"", final=True))


def has_caseops(sp) -> bool:
    return not any(sp.is_unknown(sp.piece_to_id(operator)) for operator in OPERATORS)


# ---------------------------------------------------------------- the artifact and its tokenizer


def load_model(folder: Path, tokenizer: Path) -> tuple[GPT, Config]:
    """The model of model.bin, on the device of the environment (DEVICE), and its settings. Logit calibration reads the
    tokenizer."""
    env = {name: os.environ[name] for name in ("DEVICE", "ATTENTION", "FA3_LIBRARY") if name in os.environ}
    env |= {"TTT_EVAL_ONLY": "1", "ARTIFACT_DIR": str(folder), "TOKENIZER_PATH": str(tokenizer)}
    cfg = train_gpt.configure(env)
    run = train_gpt.Run(cfg)
    torch.set_float32_matmul_precision("high")
    run.attention_backend = train_gpt.choose_attention(cfg, run.ranks.device)
    return train_gpt.load_quantized(run)[0], cfg


def facts_of_data(folder: Path) -> dict:
    """What result.json beside the artifact says of its data; empty where there is none."""
    try:
        return json.loads((folder / "result.json").read_text(encoding="utf-8")).get("data", {})
    except (OSError, ValueError, AttributeError):
        return {}


def find_tokenizer(folder: Path, given: Path | None) -> Path:
    """The tokenizer by the rules at the top of this file."""
    if given:
        return given
    if os.environ.get("TOKENIZER_PATH"):
        return Path(os.environ["TOKENIZER_PATH"])
    if "DATA_PATH" in os.environ:
        return Path(os.environ["DATA_PATH"]) / "tokenizer.model"
    wanted = facts_of_data(folder).get("tokenizer_sha256")
    near = [
        folder / "tokenizer.model",
        *sorted(ROOT.glob("data/tokenizer.model")),
        *sorted(ROOT.glob("data/*/*.model")),
    ]
    for path in near:
        if path.is_file() and (not wanted or hashlib.sha256(path.read_bytes()).hexdigest() == wanted):
            return path
    raise UserError(f"{folder}: its tokenizer is not in {folder} or data/; give it: --tokenizer FILE")


def open_tokenizer(path: Path, cfg: Config, facts: dict):
    """The SentencePieceProcessor at `path`; UserError if it cannot be the artifact's."""
    import sentencepiece

    require(path.is_file(), f"{path}: no such tokenizer; give it: --tokenizer FILE")
    try:
        sp = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError):
        raise UserError(f"{path}: not a SentencePiece model, or a damaged one") from None
    pieces = sp.vocab_size()
    require(pieces == cfg.vocab_size, f"{path}: {pieces} pieces, but the artifact has {cfg.vocab_size}; give the run's")
    wanted = facts.get("tokenizer_sha256")
    if wanted and hashlib.sha256(path.read_bytes()).hexdigest() != wanted:
        print(f"warning: {path} is not the tokenizer of this run: the text may mean nothing", file=sys.stderr)
    return sp


def prompt_tokens(prompt: str, sp, cfg: Config, facts: dict) -> list[int]:
    """BOS and the tokens of a prompt, its case in operators where the tokenizer has them."""
    form = facts.get("transform") if facts.get("transform") in FORMS else lossless_caps.NAME
    text = lossless_caps.encode(prompt, form) if has_caseops(sp) else prompt
    return [cfg.bos_id, *sp.encode(text)]


# ---------------------------------------------------------------- command line


def say(model: GPT, cfg: Config, sp, facts: dict, prompt: str, args: argparse.Namespace) -> int:
    """Print one prompt and what follows; returns how many tokens that were."""
    tokens = prompt_tokens(prompt, sp, cfg, facts)
    decoder = TextDecoder(sp)
    for token in tokens:
        decoder(token)  # it is printed as the user gave it; its last operator may concern what follows
    write(prompt)
    generator = torch.Generator().manual_seed(args.seed)
    count = 0
    for token in continuation(model, cfg, tokens, args.temperature, args.top_p, generator):
        if token == cfg.bos_id or count == args.tokens:
            break
        count += 1
        write(decoder(token))
    write(decoder.close() + "\n")
    return count


def write(text: str):
    sys.stdout.write(text)
    sys.stdout.flush()


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    def number(kind, least, most, what):
        def parse(text: str):
            value = kind(text)
            if not least <= value <= most:
                raise ValueError
            return value

        parse.__name__ = what  # argparse names it: "invalid number of 1 or more value: '0'"
        return parse

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="folder with model.bin")
    parser.add_argument(
        "--prompt", nargs="+", default=[""], metavar="TEXT", help="what to go on from; several: in turn"
    )
    parser.add_argument("--tokens", type=number(int, 1, 10**9, "count"), default=200, help="at most (default: 200)")
    parser.add_argument(
        "--temperature",
        type=number(float, 0.0, 1e9, "temperature"),
        default=0.8,
        help="divides the logits: below 1 likely tokens become likelier, 0 takes the likeliest (default: 0.8)",
    )
    parser.add_argument(
        "--top-p",
        type=number(float, 1e-9, 1.0, "share"),
        default=0.95,
        help="choose among the likeliest tokens that have this probability together (default: 0.95)",
    )
    parser.add_argument("--seed", type=number(int, 0, 2**63, "seed"), default=0, help="of the choice (default: 0)")
    parser.add_argument("--tokenizer", type=Path, metavar="FILE", help="the SentencePiece model of the run's data")
    return parser.parse_args(argv)


def sample(args: argparse.Namespace):
    require((args.run_dir / "model.bin").is_file(), f"{args.run_dir}: has no model.bin; give the folder of a run")
    facts = facts_of_data(args.run_dir)
    path = find_tokenizer(args.run_dir, args.tokenizer)
    model, cfg = load_model(args.run_dir, path)
    sp = open_tokenizer(path, cfg, facts)
    for number, prompt in enumerate(args.prompt):
        write("\n" * (number > 0))
        say(model, cfg, sp, facts, prompt, args)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal may lack a character that the model has
    try:
        sample(args)
        return 0
    except UserError as error:
        print(f"sample.py: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader has enough: `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print()
        return 130


if __name__ == "__main__":
    sys.exit(main())
