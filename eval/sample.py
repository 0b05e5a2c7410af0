"""Text from a prompt.

python eval/sample.py --ckpt runs/x --prompt "Hello, I'm a language model," --top_k 50
python eval/sample.py --ckpt runs/x --prompt_file prompt.txt --temperature 0.8 --top_p 0.95
"""

from __future__ import annotations

import argparse
import codecs
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:  # run as a file: import from the repository root, exactly as train.py does
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from eval.session import add_model_flags, check_gpt2_tokens, run_as_program, start_session
from model import GPTConfig
from model.presets import PROMPT
from training.ranks import Ranks

if TYPE_CHECKING:
    from torch import Tensor

    from eval.session import Session

N_SAMPLES, TOP_K = 4, 50  # of a run's own samples, as in build-nanogpt
UNKNOWN_BYTE = b"\xff"  # shown as U+FFFD: a column of the model beyond GPT-2's vocabulary


def encode_prompt(prompt: str) -> list[int]:
    """Return the tokens of a prompt; `<|endoftext|>` is the special token, and so is no prompt."""
    from data.tokenizer import END_OF_TEXT, EOT_TOKEN, load_tokenizer

    return load_tokenizer().encode(prompt, allowed_special={END_OF_TEXT}) or [EOT_TOKEN]


def sample_texts(
    session: Session, config: GPTConfig, prompt: str, max_new_tokens: int, seed: int
) -> list[str]:
    """Return N_SAMPLES texts: the prompt, and a fixed number of tokens drawn after it (all ranks).

    On several ranks each does the same forwards and draws the same tokens.

    Args:
        session: The model.
        config: Of the model.
        prompt: Text; empty starts at `<|endoftext|>`.
        max_new_tokens: Tokens drawn for each.
        seed: Of the draws.
    """
    import torch

    from data.tokenizer import load_tokenizer
    from model.generate import generate

    tokens = torch.tensor([encode_prompt(prompt)] * N_SAMPLES, device=session.device)  # (n, T)
    drawn = generate(session.model, tokens, max_new_tokens, config, top_k=TOP_K, seed=seed)
    new_tokens = torch.stack(list(drawn), dim=1)  # (n, max_new_tokens)
    return [prompt + load_tokenizer().decode(row) for row in new_tokens.tolist()]


def stream_texts(
    prompt: str, drawn: Iterator[Tensor], n_samples: int, show: Callable[[str], None]
) -> list[str]:
    """Decode tokens as they come; each text ends at its `<|endoftext|>`, the drawing with the last.

    Args:
        prompt: What the texts begin with.
        drawn: (n_samples,) tokens at a time, as `model.generate.generate` yields them.
        n_samples: How many texts.
        show: Is given the first text piece by piece, and the others when all is drawn.
    """
    from data.tokenizer import EOT_TOKEN, VOCAB_SIZE, load_tokenizer

    token_bytes = load_tokenizer().decode_single_token_bytes
    show(prompt)
    decoders = [codecs.getincrementaldecoder("utf-8")("replace") for _ in range(n_samples)]
    texts, going_on = [prompt] * n_samples, set(range(n_samples))
    for tokens in drawn:
        for i, token in enumerate(tokens.tolist()):
            if token == EOT_TOKEN:
                going_on.discard(i)
            if i in going_on:  # a character may be spread over several tokens
                known = token < VOCAB_SIZE
                piece = decoders[i].decode(token_bytes(token) if known else UNKNOWN_BYTE)
                texts[i] += piece
                if i == 0:
                    show(piece)
        if not going_on:
            break
    for i, decoder in enumerate(decoders):
        rest = decoder.decode(b"", final=True)
        texts[i] += rest
        show(rest if i == 0 else f"\n---------------\n{texts[i]}")
    show("\n")
    return texts


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_flags(parser)
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", default=PROMPT, help="text (default: %(default)s)")
    prompt.add_argument("--prompt_file", type=Path, help="file that holds the prompt, UTF-8")
    parser.add_argument("--n_samples", type=int, default=4, help="sequences (default: 4)")
    parser.add_argument("--max_new_tokens", type=int, default=32, help="(default: 32)")
    parser.add_argument(
        "--temperature",
        type=float,
        default=1.0,
        help="below 1 sharper, 0: the best token (default: 1)",
    )
    parser.add_argument("--top_k", type=int, help="draw from the k best (default: all)")
    parser.add_argument(
        "--top_p", type=float, help="draw from the best of probability p (default: 1)"
    )
    parser.add_argument("--seed", type=int, default=42, help="(default: 42)")
    return parser


def check_options(args: argparse.Namespace) -> None:
    """Refuse values that nothing can be drawn with.

    Raises:
        ValueError: A value out of range; names the flag.
    """
    for name in ("n_samples", "max_new_tokens", "top_k"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise ValueError(f"--{name} {value}: out of range. Fix: give at least 1")
    if not (math.isfinite(args.temperature) and args.temperature >= 0):
        raise ValueError(
            f"--temperature {args.temperature}: out of range. Fix: give a number of at least 0"
        )
    if args.top_p is not None and not 0 < args.top_p <= 1:
        raise ValueError(f"--top_p {args.top_p}: out of range. Fix: give one above 0 and at most 1")
    if args.prompt != args.prompt.encode(errors="ignore").decode():
        raise ValueError("--prompt: not UTF-8 in this locale. Fix: set LC_ALL=C.UTF-8")
    if not 0 <= args.seed < 2**64:
        raise ValueError(
            f"--seed {args.seed}: out of range. Fix: give one of at least 0 and below 2^64"
        )


def read_prompt(args: argparse.Namespace) -> str:
    """Return the prompt, from its flag or its file.

    Raises:
        ValueError: No such file, or not UTF-8.
    """
    if not args.prompt_file:
        return args.prompt
    try:
        return args.prompt_file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"--prompt_file {args.prompt_file}: cannot be read ({error}). Fix: give a text file"
        ) from error


def run(args: argparse.Namespace, ranks: Ranks) -> dict[str, Any]:
    """Draw texts, show them on stderr as they come, and return them.

    Raises:
        ValueError: Bad checkpoint, prompt or flag; names it.
    """
    import torch

    from checkpoint.reader import load_model, resolve_ckpt
    from model.generate import generate

    check_options(args)
    prompt = read_prompt(args)
    ckpt = resolve_ckpt(args.ckpt)
    model, run_precision = load_model(ckpt)
    check_gpt2_tokens(model.config)
    prompt_tokens = encode_prompt(prompt)
    if len(prompt_tokens) > model.config.block_size:
        raise ValueError(
            f"--prompt: has {len(prompt_tokens)} tokens, the model's block_size is "
            f"{model.config.block_size}. Fix: give a shorter one"
        )
    session = start_session(model, args.dtype or run_precision, ranks)
    tokens = torch.tensor([prompt_tokens] * args.n_samples, device=session.device)  # (n, T)
    options = {name: getattr(args, name) for name in ("temperature", "top_k", "top_p", "seed")}
    drawn = generate(session.model, tokens, args.max_new_tokens, model.config, **options)

    def show(piece: str) -> None:
        if ranks.is_main:
            print(piece, end="", file=sys.stderr, flush=True)

    with session.context():
        texts = stream_texts(prompt, drawn, args.n_samples, show)
    return {"ckpt": ckpt, "prompt": prompt, "samples": texts}


if __name__ == "__main__":
    run_as_program(build_parser(), run)
