"""Mean cross-entropy in nats per token over the first tokens of the validation split.

python eval/val_loss.py --ckpt runs/x --data_dir edu_fineweb10B
deepspeed --num_gpus 8 eval/val_loss.py --ckpt runs/x --data_dir edu_fineweb10B
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:  # run as a file: import from the repository root, exactly as train.py does
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from eval.session import add_model_flags, run_as_program, say, start_session
from model.presets import EVAL_TOKENS
from training.ranks import Ranks

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from data.shards import TokenStream
    from eval.session import Session

LARGEST_EXPONENT = 700  # of e, in fp64


def sum_losses(
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
        seq_len: T; the last window may hold fewer targets.
        eval_tokens: Targets over all ranks.
        batch_size: Sequences per forward.
        device: Where the model is.
        rank: This process.
        world_size: All processes.
    """
    import numpy as np
    import torch

    from data.loader import split_windows

    n_windows = -(-eval_tokens // seq_len)
    total, n_tokens = 0.0, 0
    for first in range(0, n_windows, batch_size * world_size):
        windows = np.zeros((batch_size, seq_len + 1), np.uint16)
        counted = np.zeros(batch_size, np.int64)  # targets; with none a row keeps this rank in step
        for row in range(batch_size):
            start = (first + rank * batch_size + row) * seq_len
            if start < eval_tokens:
                counted[row] = min(seq_len, eval_tokens - start)
                windows[row, : counted[row] + 1] = stream.read(start, int(counted[row]) + 1)
        tokens, targets = split_windows(torch.from_numpy(windows), device)  # (B, T) each
        real = torch.arange(seq_len) < torch.from_numpy(counted)[:, None]  # (B, T)
        targets = targets.where(real.to(device), -100)
        with torch.no_grad():
            loss = model(tokens, targets).item()
        in_batch = int(counted.sum())
        total, n_tokens = total + loss * in_batch, n_tokens + in_batch
    return total, n_tokens


def mean_loss(
    session: Session, stream: TokenStream, *, seq_len: int, eval_tokens: int, batch_size: int
) -> float:
    """Return the mean cross-entropy in nats per token; as `sum_losses` (all ranks)."""
    import torch

    sizes = {"seq_len": seq_len, "eval_tokens": eval_tokens, "batch_size": batch_size}
    sums = sum_losses(session.model, stream, **sizes, **session.share)
    total, n_tokens = session.sum(torch.tensor(sums, dtype=torch.float64)).tolist()
    return total / n_tokens


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
    add_model_flags(parser)
    parser.add_argument("--data_dir", type=Path, default=Path("edu_fineweb10B"), help="shards")
    parser.add_argument(
        "--eval_tokens", type=int, default=EVAL_TOKENS, help="tokens (default: %(default)s)"
    )
    parser.add_argument("--seq_len", type=int, help="tokens (default: the model's block_size)")
    parser.add_argument("--batch_size", type=int, default=8, help="sequences (default: 8)")
    return parser


def run(args: argparse.Namespace, ranks: Ranks) -> dict[str, Any]:
    """Evaluate the checkpoint (all ranks) and return the result.

    Raises:
        ValueError: Bad checkpoint, data or flag; names it.
    """
    for name in ("eval_tokens", "seq_len", "batch_size"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise ValueError(f"--{name} {value}: out of range. Fix: give at least 1")
    from checkpoint.reader import load_model, resolve_ckpt
    from data.shards import TokenStream, require_targets

    ckpt = resolve_ckpt(args.ckpt)
    model, run_precision = load_model(ckpt)
    seq_len = args.seq_len or model.config.block_size
    if seq_len > model.config.block_size:
        raise ValueError(
            f"--seq_len {seq_len}: block_size is {model.config.block_size}. Fix: give no more"
        )
    stream = TokenStream(args.data_dir, "val", model.config.vocab_size)
    require_targets(stream, args.eval_tokens)
    session = start_session(model, args.dtype or run_precision, ranks)
    with session.context():
        sizes = {"eval_tokens": args.eval_tokens, "batch_size": args.batch_size}
        loss = mean_loss(session, stream, seq_len=seq_len, **sizes)
    if not math.isfinite(loss):
        raise ValueError(
            f"{ckpt}: gives a loss that is no finite number. Fix: evaluate an earlier step"
        )
    entropy = unigram_entropy(stream, args.eval_tokens)
    say(
        ranks,
        f"validation loss {loss:.4f}, unigram entropy of the same {args.eval_tokens:,} tokens "
        f"{entropy:.4f} (nats per token)",
    )
    perplexity = math.exp(loss) if loss < LARGEST_EXPONENT else None
    result = {"ckpt": ckpt, "val_loss": loss, "perplexity": perplexity}
    result |= {"unigram_entropy": entropy, "tokens": args.eval_tokens, "seq_len": seq_len}
    return result | {"dtype": session.precision}


if __name__ == "__main__":
    run_as_program(build_parser(), run)
