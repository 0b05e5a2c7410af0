"""Score HellaSwag one example per forward, from full logits: eval/ is compared with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    Logits = Callable[[Tensor], Tensor]  # (B, T) tokens -> (B, T, V)


def reference_losses(model: Logits, lines: list[bytes]) -> Tensor:
    """Return the summed loss of each ending, (n, 4): one example per forward, full logits."""
    import torch

    from data.tokenizer import load_tokenizer

    encode = load_tokenizer().encode_ordinary
    sums = []
    for row in map(json.loads, lines):
        endings = [encode(" " + ending) for ending in row["endings"]]
        sums.append(reference_row(model, encode(row["ctx"]), endings))
    return torch.stack(sums)


def reference_row(model: Logits, context: list[int], endings: list[list[int]]) -> Tensor:
    """Return the summed loss of each ending of one example, (4,) fp64."""
    import torch
    import torch.nn.functional as F

    from training.ranks import Ranks
    from training.rendezvous import choose_device

    T = len(context) + max(map(len, endings))
    tokens = torch.zeros(4, T, dtype=torch.long)
    counts = torch.zeros(4, T)
    for i, ending in enumerate(endings):
        tokens[i, : len(context) + len(ending)] = torch.tensor(context + ending)
        counts[i, len(context) : len(context) + len(ending)] = 1
    device = choose_device(Ranks()).type
    tokens, counts = tokens.to(device), counts.to(device)
    with torch.no_grad():
        logits = model(tokens)[:, :-1].flatten(0, 1)  # (4 · (T - 1), V)
    targets = tokens[:, 1:].flatten()
    losses = F.cross_entropy(logits.float(), targets, reduction="none").view(4, -1)
    return (losses * counts[:, 1:]).sum(1).double().cpu()
