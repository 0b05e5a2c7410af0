"""Text from a prompt.

python eval/sample.py --ckpt runs/x --prompt "Hello, I'm a language model," --top_k 50
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # run as a file: import from the repository root, exactly as train.py does
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from model import GPTConfig

if TYPE_CHECKING:
    import torch
    from torch import Tensor

PROMPT = "Hello, I'm a language model,"  # build-nanogpt's


def sample_texts(
    model: Callable[..., Tensor],
    config: GPTConfig,
    prompt: str,
    *,
    n_samples: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 42,
    device: torch.device | str = "cpu",
) -> list[str]:
    """Return `n_samples` continuations, prompt included, of a fixed number of tokens.

    On several ranks each does the same forwards and draws the same tokens.

    Args:
        model: GPT or engine of one, in eval mode.
        config: Its shape.
        prompt: Text; empty starts at `<|endoftext|>`.
        n_samples: Sequences, in one batch.
        max_new_tokens: Tokens drawn for each.
        temperature: Divides the logits; 0 takes the best token.
        top_k: Draw from the k best only.
        top_p: Draw from the smallest set of probability p or more.
        seed: Of the draws.
        device: Where the model is.
    """
    import torch

    from data.tokenizer import EOT_TOKEN, load_tokenizer
    from model.generate import generate

    tokenizer = load_tokenizer()
    prompt_tokens = tokenizer.encode_ordinary(prompt) or [EOT_TOKEN]
    tokens = torch.tensor([prompt_tokens] * n_samples, device=device)  # (n_samples, T)
    drawn = generate(
        model,
        tokens,
        max_new_tokens,
        config,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
    )
    new_tokens = torch.stack(list(drawn), dim=1)  # (n_samples, max_new_tokens)
    return [prompt + tokenizer.decode(row) for row in new_tokens.tolist()]


def until_end_of_text(texts: list[str]) -> Iterator[str]:
    """Cut each text at its first `<|endoftext|>`."""
    from data.tokenizer import END_OF_TEXT

    for text in texts:
        yield text.split(END_OF_TEXT)[0]


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ckpt", required=True, help="run, step or Hugging Face folder, hub name")
    parser.add_argument("--prompt", default=PROMPT, help="text (default: %(default)s)")
    parser.add_argument("--n_samples", type=int, default=4, help="sequences (default: 4)")
    parser.add_argument("--max_new_tokens", type=int, default=32, help="(default: 32)")
    parser.add_argument("--temperature", type=float, default=1.0, help="0: best (default: 1)")
    parser.add_argument("--top_k", type=int, help="draw from the k best (default: all)")
    parser.add_argument("--top_p", type=float, help="draw from probability p (default: 1)")
    parser.add_argument("--seed", type=int, default=42, help="(default: 42)")
    return parser


def check_options(args: argparse.Namespace) -> None:
    """Refuse values that nothing can be drawn with.

    Raises:
        ValueError: A value out of range; names the flag.
    """
    for name in ("n_samples", "max_new_tokens", "top_k"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise ValueError(f"--{name} {value}: must be at least 1")
    if args.temperature < 0:
        raise ValueError(f"--temperature {args.temperature}: must not be negative")
    if args.top_p is not None and not 0 < args.top_p <= 1:
        raise ValueError(f"--top_p {args.top_p}: must be above 0 and at most 1")


def main() -> int:
    """Run the command line; return the exit status."""
    args = build_parser().parse_args()
    import torch

    from checkpoint.reader import load_model

    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        check_options(args)
        model, _ = load_model(args.ckpt)
        texts = sample_texts(
            model.to(device),
            model.config,
            args.prompt,
            n_samples=args.n_samples,
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            seed=args.seed,
            device=device,
        )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps({"ckpt": args.ckpt, "samples": list(until_end_of_text(texts))}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
