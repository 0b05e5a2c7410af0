"""Open --ckpt on this rank's device for the evaluation commands, and sum over the ranks."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from command_line import OneLineParser
from errors import BadInput, error_line, exit_status_of
from exit_status import FINISHED
from model import GPTConfig
from training.broken_pipes import ignore_broken_pipes
from training.ranks import Ranks, leave, ranks_or_exit, say_once

if TYPE_CHECKING:
    import torch
    from torch import Tensor

TIMEOUT_S = 1800  # until a rank that waits for others gives up, as in training
CKPT_HELP = "run, step or Hugging Face folder, hub name, build-nanogpt or nanoGPT .pt, llm.c .bin"

Command = Callable[[argparse.Namespace, Ranks], dict[str, Any]]


@dataclass(frozen=True)
class Session:
    """A model in evaluation mode on this rank's device.

    Args:
        model: A GPT, an engine of one, or a callable around it.
        config: Of the model.
        device: Where the model is.
        ranks: This process and the others, which have the model too.
        precision: To compute in; an engine has its own.
        ckpt: Where the model is from; empty in a training run.
    """

    model: Callable[..., Tensor]
    config: GPTConfig
    device: torch.device
    ranks: Ranks
    precision: str = "fp32"
    ckpt: str = ""

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """Join the other ranks, if any (all ranks); forwards in here have the session's precision.

        Enter after the flags are checked: a rank must not wait for others to say what is wrong.
        """
        from checkpoint.reader import precision_context

        if self.ranks.world_size > 1:
            from training.rendezvous import init_process_group

            init_process_group(self.ranks, TIMEOUT_S)
        with precision_context(self.precision, self.device.type):
            yield

    def sum(self, values: Tensor) -> Tensor:
        """Sum each value over the ranks (all ranks)."""
        if self.ranks.world_size == 1:
            return values
        from training.rendezvous import sum_tensor

        return sum_tensor(values, self.device)

    def say(self, text: str, end: str = "\n") -> None:
        """Print to stderr, on rank 0 only."""
        if self.ranks.is_main:
            print(text, end=end, file=sys.stderr, flush=True)


def open_session(args: argparse.Namespace, ranks: Ranks) -> Session:
    """Load --ckpt onto this rank's device, in --dtype or the precision of its run.

    Raises:
        BadInput: There is nothing that can be read, or this rank has no GPU.
    """
    import torch

    from checkpoint.reader import load_model, resolve_ckpt
    from training.rendezvous import choose_device

    ckpt = resolve_ckpt(args.ckpt)  # once: a run that goes on writes a newer step meanwhile
    model, run_precision = load_model(ckpt)
    precision = args.dtype or run_precision
    device = choose_device(ranks)
    on_device = model.to(device, torch.bfloat16 if precision == "bf16" else torch.float32)
    return Session(on_device.eval(), model.config, device, ranks, precision, ckpt)


def check_gpt2_tokens(config: GPTConfig) -> None:
    """Refuse a model that does not know GPT-2's tokens.

    Raises:
        BadInput: Its vocabulary is smaller.
    """
    if config.vocab_size < GPTConfig.vocab_size:
        what = f"the model has {config.vocab_size} tokens, GPT-2's tokenizer {GPTConfig.vocab_size}"
        raise BadInput("--ckpt", what, "give one that was trained on GPT-2's tokens")


def check_at_least_1(args: argparse.Namespace, *names: str) -> None:
    """Refuse flags below 1; one that is not given (None) passes.

    Raises:
        BadInput: Names the flag.
    """
    for name in names:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise BadInput(f"--{name} {value}", "out of range", "give at least 1")


def model_parser(description: str) -> argparse.ArgumentParser:
    """Return a parser with the flags that say which model, and in which precision."""
    parser = OneLineParser(description=description)
    parser.add_argument("--ckpt", required=True, help=CKPT_HELP)
    dtype_help = "default: the run's precision, fp32 outside a run"
    parser.add_argument("--dtype", choices=("fp32", "autocast", "bf16"), help=dtype_help)
    # The deepspeed launcher appends it; training.ranks does without.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    return parser


def run_command(parser: argparse.ArgumentParser, command: Command) -> int:
    """Run a command on all ranks; print its result as one JSON line; return the exit status."""
    args, ranks = parser.parse_args(), ranks_or_exit()
    try:
        result = command(args, ranks)
    except (BadInput, OSError) as error:
        say_once(ranks, f"error: {error_line(error)}")
        return exit_status_of(error)
    if ranks.is_main:
        print(json.dumps(result), flush=True)
    return FINISHED


def run_main(parser: argparse.ArgumentParser, command: Command) -> NoReturn:
    """Run a command as the whole of this process, which ends with its exit status."""
    ignore_broken_pipes()
    leave(run_command(parser, command))
