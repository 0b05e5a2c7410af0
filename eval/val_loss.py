"""Mean cross-entropy in nats per token over the first tokens of the validation split.

python eval/val_loss.py --ckpt runs/x --data_dir edu_fineweb10B
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:  # run as a file: import from the repository root, exactly as train.py does
    sys.path[0] = str(Path(__file__).resolve().parents[1])

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from data.shards import TokenStream

EVAL_TOKENS = 10_485_760  # build-nanogpt's 20 batches of 64 x 1,024 on 8 GPUs


def count_windows(stream: TokenStream, seq_len: int, eval_tokens: int) -> int:
    """Return how many windows of `seq_len` tokens are evaluated: `eval_tokens` tokens.

    Raises:
        ValueError: Not even one, or the validation split is shorter.
    """
    if eval_tokens < seq_len:
        raise ValueError(f"--eval_tokens {eval_tokens}: less than one window of {seq_len}")
    n_windows = eval_tokens // seq_len
    if n_windows * seq_len >= len(stream):  # one more is the last target
        most = (len(stream) - 1) // seq_len * seq_len
        remedy = f"give --eval_tokens {most}" if most else "prepare more validation tokens"
        raise ValueError(
            f"{stream.paths[-1]}: the validation split has {len(stream)} tokens, not "
            f"--eval_tokens {eval_tokens} + 1; {remedy}"
        )
    return n_windows


def evaluate(
    model: Callable[[Tensor, Tensor], Tensor],
    stream: TokenStream,
    *,
    seq_len: int,
    eval_tokens: int,
    batch_size: int,
    device: torch.device | str = "cpu",
    rank: int = 0,
    world_size: int = 1,
) -> tuple[float, int]:
    """Return this rank's summed cross-entropy in nats and the number of tokens in it.

    Every rank does the same number of forwards; the sums over all ranks do not depend on how many
    there are.

    Args:
        model: `model(tokens, targets) -> mean loss`, targets of -100 left out; in eval mode.
        stream: The validation split; its first tokens are used, in order.
        seq_len: T.
        eval_tokens: Tokens over all ranks, rounded down to whole windows.
        batch_size: Sequences per forward.
        device: Where the model is.
        rank: This process.
        world_size: All processes.
    """
    import numpy as np
    import torch

    from data.loader import read_windows, split_windows

    n_windows = count_windows(stream, seq_len, eval_tokens)
    total, n_tokens = 0.0, 0
    for first in range(0, n_windows, batch_size * world_size):
        windows = np.arange(batch_size) + first + rank * batch_size
        real = windows < n_windows  # the rest keeps this rank in step and does not count
        batch = torch.from_numpy(read_windows(stream, np.where(real, windows, 0), seq_len))
        tokens, targets = split_windows(batch, device)  # (B, T) each
        targets = targets.where(torch.from_numpy(real).to(device)[:, None], -100)
        with torch.no_grad():
            loss = model(tokens, targets).item()
        counted = int(real.sum()) * seq_len
        total, n_tokens = total + loss * counted, n_tokens + counted
    return total, n_tokens


def unigram_entropy(stream: TokenStream, n_tokens: int) -> float:
    """Return the entropy in nats of the token frequencies of the first `n_tokens` targets.

    No model that ignores the context can have a lower loss on these tokens.
    """
    import numpy as np

    counts = np.bincount(stream.read(1, n_tokens))
    p = counts[counts > 0] / n_tokens
    return float(-(p * np.log(p)).sum())


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ckpt", required=True, help="run, step or Hugging Face folder, hub name")
    parser.add_argument("--data_dir", type=Path, default=Path("edu_fineweb10B"), help="shards")
    parser.add_argument(
        "--eval_tokens", type=int, default=EVAL_TOKENS, help="tokens (default: %(default)s)"
    )
    parser.add_argument("--seq_len", type=int, help="tokens (default: the model's block_size)")
    parser.add_argument("--batch_size", type=int, default=8, help="sequences (default: 8)")
    parser.add_argument(
        "--dtype", choices=("fp32", "autocast", "bf16"),
        help="default: the run's precision, fp32 outside a run",
    )  # fmt: skip
    return parser


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Evaluate the checkpoint and return the result.

    Raises:
        ValueError: Bad checkpoint or data; names it.
    """
    import torch

    from checkpoint.reader import load_model, precision_context
    from data.shards import TokenStream

    for name in ("eval_tokens", "seq_len", "batch_size"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise ValueError(f"--{name} {value}: must be at least 1")
    model, run_precision = load_model(args.ckpt)
    precision = args.dtype or run_precision
    seq_len = args.seq_len or model.config.block_size
    if seq_len > model.config.block_size:
        raise ValueError(f"--seq_len {seq_len}: block_size is {model.config.block_size}")
    stream = TokenStream(args.data_dir, "val", model.config.vocab_size)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model.to(device, torch.bfloat16 if precision == "bf16" else torch.float32)
    with precision_context(precision, device):
        total, n_tokens = evaluate(
            model,
            stream,
            seq_len=seq_len,
            eval_tokens=args.eval_tokens,
            batch_size=args.batch_size,
            device=device,
        )
    loss = total / n_tokens
    return {
        "ckpt": args.ckpt,
        "val_loss": loss,
        "perplexity": math.exp(loss),
        "unigram_entropy": unigram_entropy(stream, n_tokens),
        "tokens": n_tokens,
        "dtype": precision,
    }


def main() -> int:
    """Run the command line; return the exit status."""
    args = build_parser().parse_args()
    try:
        result = run(args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(
        "validation loss {val_loss:.4f}, unigram entropy of the same {tokens:,} tokens "
        "{unigram_entropy:.4f} (nats per token)".format(**result),
        file=sys.stderr,
    )
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
