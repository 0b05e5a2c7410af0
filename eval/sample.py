"""Continue a prompt with tokens drawn from a model.

python eval/sample.py --ckpt runs/x --prompt "Hello, I'm a language model," --top_k 50
python eval/sample.py --ckpt runs/x --prompt_file prompt.txt --temperature 0.8 --top_p 0.95
"""

from __future__ import annotations

import argparse
import codecs
import math
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:  # run as a file: import from the repository root, exactly as train.py does
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from data.tokenizer import END_OF_TEXT, EOT_TOKEN, VOCAB_SIZE, load_tokenizer
from errors import BadInput
from eval.session import check_at_least_1, check_gpt2_tokens, model_parser, open_session, run_main
from model.presets import PROMPT
from training.ranks import Ranks

if TYPE_CHECKING:
    from torch import Tensor

    from eval.session import Session

N_SAMPLES, TOP_K = 4, 50  # of a run's own samples, as in build-nanogpt
UNKNOWN_BYTE = b"\xff"  # shown as U+FFFD: a column of the model beyond GPT-2's vocabulary


def encode_prompt(prompt: str) -> list[int]:
    """Return the tokens of a prompt; `<|endoftext|>` is the special token, and so is no prompt."""
    return load_tokenizer().encode(prompt, allowed_special={END_OF_TEXT}) or [EOT_TOKEN]


def draw(
    session: Session, prompt: str, n_samples: int, max_new_tokens: int, **options: Any
) -> Iterator[Tensor]:
    """Yield what is drawn after a prompt, (n_samples,) tokens at a time.

    On several ranks each does the same forwards and draws the same tokens.

    Args:
        session: The model.
        prompt: Text; empty starts at `<|endoftext|>`.
        n_samples: How many texts.
        max_new_tokens: Tokens drawn for each.
        options: Of `model.generate.generate`.
    """
    import torch

    from model.generate import generate

    tokens = torch.tensor([encode_prompt(prompt)] * n_samples, device=session.device)  # (n, T)
    return generate(session.model, tokens, max_new_tokens, session.config, **options)


def sample_texts(session: Session, prompt: str, max_new_tokens: int, seed: int) -> list[str]:
    """Return N_SAMPLES texts: the prompt, and `max_new_tokens` drawn after it (all ranks)."""
    import torch

    drawn = draw(session, prompt, N_SAMPLES, max_new_tokens, top_k=TOP_K, seed=seed)
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
    token_bytes = load_tokenizer().decode_single_token_bytes
    # A character may be spread over several tokens: it is shown when its last byte is there.
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    new_bytes = [b""] * n_samples
    unfinished = set(range(n_samples))
    show(prompt)
    for tokens in drawn:
        for i, token in enumerate(tokens.tolist()):
            if token == EOT_TOKEN:
                unfinished.discard(i)
            if i in unfinished:
                piece = token_bytes(token) if token < VOCAB_SIZE else UNKNOWN_BYTE
                new_bytes[i] += piece
                if i == 0:
                    show(decoder.decode(piece))
        if not unfinished:
            break
    show(decoder.decode(b"", final=True))
    texts = [prompt + new.decode(errors="replace") for new in new_bytes]
    for text in texts[1:]:
        show(f"\n---------------\n{text}")
    show("\n")
    return texts


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = model_parser(__doc__ or "")
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", default=PROMPT, help="text (default: %(default)s)")
    prompt.add_argument("--prompt_file", type=Path, help="file that holds the prompt, UTF-8")
    parser.add_argument("--n_samples", type=int, default=4, help="sequences (default: 4)")
    parser.add_argument("--max_new_tokens", type=int, default=32, help="(default: 32)")
    temperature_help = "below 1 sharper, 0: the best token (default: 1)"
    parser.add_argument("--temperature", type=float, default=1.0, help=temperature_help)
    parser.add_argument("--top_k", type=int, help="draw from the k best (default: all)")
    top_p_help = "draw from the best of probability p (default: 1)"
    parser.add_argument("--top_p", type=float, help=top_p_help)
    parser.add_argument("--seed", type=int, default=42, help="(default: 42)")
    return parser


def check_options(args: argparse.Namespace) -> None:
    """Refuse values that nothing can be drawn with.

    Raises:
        BadInput: A value is out of range; names the flag.
    """
    check_at_least_1(args, "n_samples", "max_new_tokens", "top_k")
    temperature, top_p, seed = args.temperature, args.top_p, args.seed
    if not 0 <= temperature < math.inf:
        raise BadInput(f"--temperature {temperature}", "out of range", "give a number, at least 0")
    if top_p is not None and not 0 < top_p <= 1:
        raise BadInput(f"--top_p {top_p}", "out of range", "give one above 0 and at most 1")
    if not 0 <= seed < 2**64:
        raise BadInput(f"--seed {seed}", "out of range", "give one of at least 0 and below 2^64")


def read_prompt(args: argparse.Namespace) -> str:
    """Return the prompt, from its flag or its file.

    Raises:
        BadInput: There is no such file, or the prompt is not UTF-8.
    """
    if not args.prompt_file:
        # Python hands over bytes that are none in the locale's encoding as lone surrogates.
        if args.prompt != args.prompt.encode(errors="ignore").decode():
            raise BadInput("--prompt", "not UTF-8 in this locale", "set LC_ALL=C.UTF-8")
        return args.prompt
    try:
        return args.prompt_file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        where, what = f"--prompt_file {args.prompt_file}", f"cannot be read ({error})"
        raise BadInput(where, what, "give a text file") from error


def run(args: argparse.Namespace, ranks: Ranks) -> dict[str, Any]:
    """Draw texts, show them on stderr as they come, and return them.

    Raises:
        BadInput: The checkpoint, the prompt or a flag cannot be used; names it.
    """
    check_options(args)
    prompt = read_prompt(args)
    session = open_session(args, ranks)
    check_gpt2_tokens(session.config)
    n_tokens, block_size = len(encode_prompt(prompt)), session.config.block_size
    if n_tokens > block_size:
        what = f"has {n_tokens} tokens, the model's block size is {block_size}"
        raise BadInput("--prompt", what, "give a shorter one")
    options = {name: getattr(args, name) for name in ("temperature", "top_k", "top_p", "seed")}
    with session.computing():
        drawn = draw(session, prompt, args.n_samples, args.max_new_tokens, **options)
        texts = stream_texts(prompt, drawn, args.n_samples, partial(session.say, end=""))
    return {"ckpt": session.ckpt, "prompt": prompt, "samples": texts}


if __name__ == "__main__":
    run_main(build_parser(), run)
