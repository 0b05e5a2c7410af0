"""What the evaluation commands share: --ckpt as a model on this rank's device, sums over ranks."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from model import GPTConfig
from training.ranks import Ranks, leave, ranks_or_exit, say_once
from training.streams import outlive_readers

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from model import GPT

TIMEOUT_S = 1800  # until a rank that waits for others gives up, as in training
CKPT_HELP = "run, step or Hugging Face folder, hub name, build-nanogpt or nanoGPT .pt, llm.c .bin"

Command = Callable[[argparse.Namespace, Ranks], dict[str, Any] | None]


@dataclass(frozen=True)
class Session:
    """A model in evaluation mode where this rank computes.

    Args:
        model: A GPT, an engine of one, or a callable around it.
        device: Where it is.
        ranks: This process and the others, which have the model too.
        precision: To compute in; an engine has its own.
    """

    model: Callable[..., Tensor]
    device: torch.device
    ranks: Ranks
    precision: str = "fp32"

    @property
    def share(self) -> dict[str, Any]:
        """Where the work is done, and which part of it by this rank: arguments of `sum_losses`."""
        ranks = self.ranks
        return {"device": self.device, "rank": ranks.rank, "world_size": ranks.world_size}

    def context(self) -> contextlib.AbstractContextManager[object]:
        """Return the context in which forwards have the session's precision."""
        from checkpoint.reader import precision_context

        return precision_context(self.precision, self.device.type)

    def sum(self, values: Tensor) -> Tensor:
        """Sum each value over the ranks (all ranks)."""
        if self.ranks.world_size == 1:
            return values
        from training.rendezvous import sum_tensor

        return sum_tensor(values, self.device)


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say which model, and in which precision."""
    parser.add_argument("--ckpt", required=True, help=CKPT_HELP)
    parser.add_argument(
        "--dtype", choices=("fp32", "autocast", "bf16"),
        help="default: the run's precision, fp32 outside a run",
    )  # fmt: skip
    # The deepspeed launcher appends it; training.ranks knows better.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)


def check_gpt2_tokens(config: GPTConfig) -> None:
    """Refuse a model that does not know GPT-2's tokens.

    Raises:
        ValueError: Its vocabulary is smaller.
    """
    if config.vocab_size < GPTConfig.vocab_size:
        raise ValueError(
            f"--ckpt: the model has {config.vocab_size} tokens, GPT-2's tokenizer "
            f"{GPTConfig.vocab_size}. Fix: give one that was trained on GPT-2's tokens"
        )


def start_session(model: GPT, precision: str, ranks: Ranks) -> Session:
    """Join the other ranks, if there are any (all ranks), and send the model to the device."""
    import torch

    from training.rendezvous import choose_device

    device = choose_device(ranks)
    if ranks.world_size > 1:
        from training.rendezvous import init_process_group

        init_process_group(ranks, TIMEOUT_S)
    model = model.to(device, torch.bfloat16 if precision == "bf16" else torch.float32)
    return Session(model.eval(), device, ranks, precision)


def run_command(parser: argparse.ArgumentParser, command: Command) -> int:
    """Run a command on all ranks; print its result as one JSON line; return the exit status."""
    args, ranks = parser.parse_args(), ranks_or_exit()
    try:
        result = command(args, ranks)
    except ValueError as error:
        say_once(ranks, f"error: {error}")
        return 2
    if ranks.is_main and result is not None:
        print(json.dumps(result), flush=True)
    return 0


def run_as_program(parser: argparse.ArgumentParser, command: Command) -> NoReturn:
    """Run a command as the whole of this process, which ends with its exit status."""
    outlive_readers()
    leave(run_command(parser, command))


def say(ranks: Ranks, line: str) -> None:
    """Tell people something, once."""
    if ranks.is_main:
        print(line, file=sys.stderr, flush=True)
