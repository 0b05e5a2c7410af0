"""Mean cross-entropy in nats per token over the first tokens of the validation split.

python eval/val_loss.py --ckpt runs/x --data_dir edu_fineweb10B
deepspeed --num_gpus 8 eval/val_loss.py --ckpt runs/x --data_dir edu_fineweb10B
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:  # run as a file: import from the repository root, exactly as train.py does
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from errors import BadInput
from eval.session import Session, check_at_least_1, model_parser, open_session, run_main
from model.presets import EVAL_TOKENS
from training.ranks import Ranks

if TYPE_CHECKING:
    from torch import Tensor

    from data.shards import TokenStream

LARGEST_EXPONENT = 700  # of e, in fp64


def sum_token_losses(
    session: Session, stream: TokenStream, *, seq_len: int, eval_tokens: int, batch_size: int
) -> Tensor:
    """Return this rank's summed cross-entropy in nats and its number of targets: (2,) fp64.

    Every rank does the same number of forwards. The sums over all ranks do not depend on how many
    there are.

    Args:
        session: Its model is `model(tokens, targets) -> mean loss`, targets of -100 left out.
        stream: The validation split; its first tokens are used, in order.
        seq_len: T; the last window may hold fewer targets.
        eval_tokens: Targets over all ranks.
        batch_size: Sequences per forward.
    """
    import numpy as np
    import torch

    ranks, device = session.ranks, session.device
    B, T = batch_size, seq_len
    loss_sum = 0.0
    n_targets = 0
    for first in range(0, eval_tokens, B * T * ranks.world_size):
        start = first + ranks.rank * B * T
        # A rank that has no target left does the forward, too: it may be a collective (ZeRO-3).
        n = min(max(0, eval_tokens - start), B * T)
        tokens = np.zeros(B * T, np.int64)
        targets = np.full(B * T, -100)
        if n > 0:
            window = stream.read(start, n + 1)
            tokens[:n] = window[:-1]
            targets[:n] = window[1:]
        batch = torch.from_numpy(np.stack([tokens, targets])).to(device)  # (2, B·T)
        with torch.no_grad():
            loss = session.model(*batch.view(2, B, T)).item()
        loss_sum += loss * n
        n_targets += n
    return torch.tensor([loss_sum, n_targets], dtype=torch.float64)


def mean_loss(session: Session, stream: TokenStream, **sizes: int) -> float:
    """Return the mean cross-entropy in nats per token (all ranks); as `sum_token_losses`."""
    loss_sum, n_targets = session.sum(sum_token_losses(session, stream, **sizes)).tolist()
    return loss_sum / n_targets


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
    parser = model_parser(__doc__ or "")
    parser.add_argument("--data_dir", type=Path, default=Path("edu_fineweb10B"), help="shards")
    tokens_help = f"tokens (default: {EVAL_TOKENS}, or all of a shorter split)"
    parser.add_argument("--eval_tokens", type=int, help=tokens_help)
    parser.add_argument("--seq_len", type=int, help="tokens (default: the model's block_size)")
    parser.add_argument("--batch_size", type=int, default=8, help="sequences (default: 8)")
    return parser


def run(args: argparse.Namespace, ranks: Ranks) -> dict[str, Any]:
    """Evaluate the checkpoint (all ranks) and return the result.

    Raises:
        BadInput: The checkpoint, the data or a flag cannot be used; names it.
    """
    check_at_least_1(args, "eval_tokens", "seq_len", "batch_size")
    from data.shards import TokenStream, require_targets

    session = open_session(args, ranks)
    block_size = session.config.block_size
    seq_len = args.seq_len or block_size
    if seq_len > block_size:
        what = f"the model has a block size of {block_size}"
        raise BadInput(f"--seq_len {seq_len}", what, f"give at most {block_size}")
    stream = TokenStream(args.data_dir, "val", session.config.vocab_size)
    is_given = args.eval_tokens is not None
    n_tokens = require_targets(stream, args.eval_tokens or EVAL_TOKENS, is_given)
    whole = "" if is_given or n_tokens == EVAL_TOKENS else " (the whole split)"
    sizes = {"seq_len": seq_len, "eval_tokens": n_tokens, "batch_size": args.batch_size}
    with session.computing():
        loss = mean_loss(session, stream, **sizes)
    if not math.isfinite(loss):
        raise BadInput(session.ckpt, f"gives a loss of {loss}", "evaluate an earlier step")
    entropy = unigram_entropy(stream, n_tokens)
    session.say(
        f"validation loss {loss:.4f}, unigram entropy of the same {n_tokens:,} tokens{whole} "
        f"{entropy:.4f} (nats per token)"
    )
    return {
        "ckpt": session.ckpt,
        "val_loss": loss,
        "perplexity": math.exp(loss) if loss < LARGEST_EXPONENT else None,
        "unigram_entropy": entropy,
        "tokens": n_tokens,
        "seq_len": seq_len,
        "dtype": session.precision,
    }


if __name__ == "__main__":
    run_main(build_parser(), run)
