"""Compute the loss of every ending of a context, with one pass over the context.

The endings are packed behind their context into one sequence, each with the positions that it would
have alone and a mask that hides it from the others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from errors import BadInput

if TYPE_CHECKING:
    from torch import Tensor

    from eval.session import Session

N_ENDINGS = 4
FORWARD_TOKENS = 8192  # of a batch: few enough for the memory of a laptop
LENGTH_MULTIPLE = 16  # batches have few lengths, so few shapes to compile


@dataclass(frozen=True)
class Example:
    """One row as tokens; the label is None where a split hides it."""

    context: list[int]
    endings: list[list[int]]
    label: int | None

    @property
    def packed_tokens(self) -> int:
        """Tokens that the model sees: of each ending all but the last, which is only predicted."""
        return len(self.context) + sum(len(ending) - 1 for ending in self.endings)


def crop_contexts(examples: Sequence[Example], block_size: int) -> list[Example]:
    """Drop the first tokens of contexts that are too long for the model with their endings.

    Raises:
        BadInput: An ending alone is longer than the model.
    """
    cropped = []
    for number, example in enumerate(examples, 1):
        longest = max(map(len, example.endings))
        context_tokens = block_size + 1 - longest  # the last token is not an input
        if context_tokens < 1:
            what = f"row {number} has an ending of {longest} tokens, the block size is {block_size}"
            raise BadInput("--data", what, "use fewer rows, or a larger model")
        cropped.append(replace(example, context=example.context[-context_tokens:]))
    return cropped


def group_by_length(
    examples: Sequence[Example], forward_tokens: int
) -> list[tuple[int, list[int]]]:
    """Sort rows by length into batches: (tokens per row, row numbers), longest first."""
    order = sorted(range(len(examples)), key=lambda i: -examples[i].packed_tokens)
    batches = []
    while order:
        longest = examples[order[0]].packed_tokens
        T = math.ceil(longest / LENGTH_MULTIPLE) * LENGTH_MULTIPLE
        n_rows = max(1, forward_tokens // T)
        batches.append((T, order[:n_rows]))
        order = order[n_rows:]
    return batches


@dataclass(frozen=True)
class Packed:
    """A batch as the model's inputs; prediction n belongs to ending `ending[n]` of the batch."""

    tokens: Tensor  # (B, T)
    position_ids: Tensor  # (B, T)
    branch: Tensor  # (B, T) 0: context, 1 to 4: endings, 5: padding
    predict_at: Tensor  # (N,) into B·T
    targets: Tensor  # (N,)
    ending: Tensor  # (N,) row · 4 + number of the ending


def pack(examples: Sequence[Example], T: int) -> Packed:
    """Lay each example out as its context and then its endings, in one sequence of T tokens."""
    import numpy as np
    import torch

    shape = (len(examples), T)
    tokens = np.zeros(shape, np.int64)
    position_ids = np.zeros(shape, np.int64)
    branch = np.full(shape, N_ENDINGS + 1)
    predict_at, targets, of_ending = [], [], []
    for row, example in enumerate(examples):
        C = len(example.context)
        tokens[row, :C] = example.context
        position_ids[row, :C] = range(C)
        branch[row, :C] = 0
        start = C
        for i, ending in enumerate(example.endings):
            end = start + len(ending) - 1  # the last token is only predicted
            tokens[row, start:end] = ending[:-1]
            position_ids[row, start:end] = range(C, C + end - start)
            branch[row, start:end] = i + 1
            # The last token of the context predicts the first of each ending.
            predict_at += [row * T + at for at in (C - 1, *range(start, end))]
            targets += ending
            of_ending += [row * N_ENDINGS + i] * len(ending)
            start = end
    columns = (tokens, position_ids, branch, predict_at, targets, of_ending)
    return Packed(*(torch.as_tensor(column) for column in columns))


def sum_ending_losses(
    session: Session,
    examples: Sequence[Example],
    *,
    forward_tokens: int = FORWARD_TOKENS,
    show_progress: bool = False,
) -> Tensor:
    """Return the summed cross-entropy of every ending in nats, (n, 4) fp64, on the CPU.

    Rows of other ranks are 0: the sum over all ranks is the whole. Every rank does the same number
    of forwards; what is in a batch does not depend on the ranks.

    Args:
        session: Its model is `model(tokens, targets, predict_at=…, position_ids=…, attn_mask=…)`
            -> the loss at each of N positions.
        examples: Rows that fit the model (`crop_contexts`).
        forward_tokens: Tokens of a batch, padding included.
        show_progress: Draw a bar, on a terminal.
    """
    import torch
    from tqdm import tqdm

    ranks, device = session.ranks, session.device
    losses = torch.zeros(len(examples), N_ENDINGS, dtype=torch.float64)
    batches = group_by_length(examples, forward_tokens)
    rounds = range(0, len(batches), ranks.world_size)
    for first in tqdm(rounds, desc="HellaSwag", disable=None if show_progress else True):
        # In the last round some ranks have no batch of their own. They do the last one, too, and
        # drop it: each forward of a sharded engine (ZeRO-3) is a collective.
        is_mine = first + ranks.rank < len(batches)
        T, rows = batches[first + ranks.rank if is_mine else -1]
        batch = pack([examples[i] for i in rows], T)
        branch = batch.branch.to(device)
        is_context = branch[:, None] == 0  # (B, 1, T)
        is_visible = is_context | (branch[:, None] == branch[:, :, None])  # (B, T, T)
        with torch.no_grad():
            token_losses = session.model(
                batch.tokens.to(device),
                batch.targets.to(device),
                predict_at=batch.predict_at.to(device),
                position_ids=batch.position_ids.to(device),
                attn_mask=is_visible.tril()[:, None],
            )  # (N,)
        if is_mine:
            sums = torch.zeros(len(rows) * N_ENDINGS, dtype=torch.float64)
            sums.index_add_(0, batch.ending, token_losses.double().cpu())
            losses[rows] = sums.view(-1, N_ENDINGS)
    return losses
