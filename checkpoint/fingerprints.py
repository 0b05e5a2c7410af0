"""Fingerprints of whole weights: the same bits give the same number, in any layout.

The fingerprint of a tensor is the sum of bits(i) · h(i) modulo 2^64 over its flat index i, where
bits(i) is the value's bits as an integer and h a fixed hash of the index. A sum of integers does
not depend on its order, so blocks and ranks can share the work. A save records the fingerprints of
the tensors that the model computes with. Code that reads the fp32 weights of the optimizer rounds
each to the same dtype and compares.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from errors import BadInput

BLOCK = 2**16  # values: a block's integers and its part of h stay in the processor's cache
MASK = 2**64 - 1
BITS = {2: torch.int16, 4: torch.int32}  # by bytes per value
DTYPES = {"bf16": torch.bfloat16, "autocast": torch.float32, "fp32": torch.float32}


def _mix(index: np.ndarray) -> np.ndarray:
    """Return SplitMix64 of each index (Steele et al. 2014), made odd: no bit of a value is lost."""
    x = (index.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((x ^ (x >> np.uint64(31))) | np.uint64(1)).astype(np.int64)


@cache
def _mix_within_block(device: torch.device) -> Tensor:
    return torch.from_numpy(_mix(np.arange(BLOCK))).to(device)


def partial_fingerprint(
    tensor: Tensor, dtype: torch.dtype, rank: int = 0, world_size: int = 1
) -> int:
    """Return this rank's part of a fingerprint, a signed 64-bit integer.

    The parts of all ranks add up to it, modulo 2^64.

    Args:
        tensor: Whole, of any shape.
        dtype: bf16 or fp32; the tensor is rounded to it, block by block.
        rank: Takes every world_size-th block, from block `rank` on.
        world_size: Ranks that share the work.
    """
    flat = tensor.detach().reshape(-1)
    n_blocks = -(-len(flat) // BLOCK)
    across_blocks = _mix(np.arange(n_blocks))  # h(i) = across(i // BLOCK) · within(i % BLOCK)
    within_block = _mix_within_block(flat.device)
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for number in range(rank, n_blocks, world_size):
        block = flat[number * BLOCK : (number + 1) * BLOCK].to(dtype)
        bits = block.view(BITS[block.element_size()]).long()
        total += (bits * within_block[: len(bits)]).sum() * int(across_blocks[number])
    return int(total)


def fingerprint(tensor: Tensor, dtype: torch.dtype) -> str:
    """Return the fingerprint of a whole tensor, rounded to `dtype`, as 16 hexadecimal digits."""
    return f"{partial_fingerprint(tensor, dtype) & MASK:016x}"


def engine_fingerprints(engine: Any) -> dict[str, str]:
    """Return the fingerprint of every weight that forward uses, in the engine's dtype (all ranks).

    At stage 3 one parameter at a time is gathered. All ranks then hold the same tensors, so each
    takes its share of the blocks.
    """
    import deepspeed

    rank, world_size = dist.get_rank(), dist.get_world_size()
    is_sharded = engine.zero_optimization_stage() == 3
    if is_sharded:
        engine.optimizer._partition_all_parameters()  # a forward may have left some gathered
    parts = {}
    for name, param in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([param], enabled=is_sharded):  # all ranks
            parts[name] = partial_fingerprint(param, param.dtype, rank, world_size)
    sums = torch.tensor(list(parts.values()), device=engine.device)
    dist.all_reduce(sums)  # all ranks
    return {name: f"{value & MASK:016x}" for name, value in zip(parts, sums.tolist(), strict=True)}


def verified(
    weights: Iterable[tuple[str, Tensor]],
    expected: dict[str, str],
    dtype: torch.dtype,
    where: Path,
    unverified: list[str],
) -> Iterator[tuple[str, Tensor]]:
    """Yield whole fp32 weights; after the last, check the fingerprints of all, rounded to `dtype`.

    Args and Raises as in `check_fingerprints`.
    """
    found = {}
    for name, weight in weights:
        found[name] = fingerprint(weight, dtype) if expected else ""
        yield name, weight
    check_fingerprints(found, expected, where, unverified)


def check_fingerprints(
    found: dict[str, str], expected: dict[str, str], where: Path, unverified: list[str]
) -> None:
    """Refuse weights with other fingerprints than expected; warn if none at all are expected.

    Args:
        found: By name of the weight.
        expected: By name of the weight.
        where: Folder to name in the error.
        unverified: Keys of the ds_config that may be the cause.

    Raises:
        BadInput: Names the first that differs, how many do, and the unverified keys.
    """
    names = list(expected | found)
    wrong = [name for name in names if found.get(name) != expected.get(name)]
    if not expected and os.environ.get("RANK", "0") == "0":
        line = f"warning: {where}: has no fingerprints: its weights are not verified"
        print(line, file=sys.stderr)
    elif expected and wrong:
        keys = f"; train without unverified {', '.join(unverified)}" if unverified else ""
        raise BadInput(
            f"{where}",
            f"{wrong[0]} is not the weight that was trained: {len(wrong)} of {len(names)} "
            "fingerprints differ",
            "resume with the number of ranks and the ds_config of the save; if they are the same, "
            f"move the checkpoint away, to resume from the one before it{keys}",
        )
