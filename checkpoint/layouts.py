"""Step folder -> whole fp32 tensors, one parameter at a time, whatever ds_config wrote it.

DeepSpeed's own readers cannot read stage 1 with fp32 accumulation, nor lead from stage 1 to 3 or
to 0, and load everything at once; the layouts that it writes are few and plain.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checkpoint.manifest import Manifest, read_manifest, verify_files

if TYPE_CHECKING:
    from torch import Tensor

WEIGHT, MOMENTS = "weight", ("exp_avg", "exp_avg_sq")  # the moments by AdamW's names
MODEL_STATES = "mp_rank_00_model_states.pt"
Shard = dict[str, Any]


def step_weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield every whole fp32 weight of a step folder, once each of its files is verified.

    Raises:
        ValueError: A file is missing, altered, or holds something else; after the last weight:
            some are not those that the model computed with, by their fingerprints.
    """
    manifest = read_manifest(folder)
    verify_files(folder, manifest)
    yield from verified_weights(folder, manifest)


def verified_weights(folder: Path, manifest: Manifest) -> Iterator[tuple[str, Tensor]]:
    """Yield the same of a folder whose files are verified, with its own manifest."""
    from checkpoint.fingerprints import DTYPES, checked

    weights = step_tensors(folder, manifest, WEIGHT)
    dtype = DTYPES[manifest.precision]
    yield from checked(weights, manifest.fingerprints, dtype, folder, manifest.unverified)


def step_tensors(folder: Path, manifest: Manifest, key: str) -> Iterator[tuple[str, Tensor]]:
    """Yield name and whole fp32 tensor of every parameter, always in the same order.

    Args:
        folder: A step folder, verified.
        manifest: Its own.
        key: WEIGHT or one of MOMENTS.

    Raises:
        ValueError: A file is missing or holds something else.
    """
    with _naming_folder(folder):
        if manifest.zero_stage == 0:
            yield from _unsharded(_load(folder / MODEL_STATES), key)
        elif manifest.zero_stage < 3:
            shapes = _load(folder / MODEL_STATES)["param_shapes"]
            yield from _merge_slices(_shards(folder, manifest), shapes, key)
        else:
            shapes = _load(folder / f"zero_pp_rank_0_{MODEL_STATES}")["param_shapes"]
            yield from _merge_stage3(_shards(folder, manifest), shapes, key)


def optimizer_steps(folder: Path, manifest: Manifest) -> int:
    """Return AdamW's own count of steps: skipped ones are not in it.

    Raises:
        ValueError: A file is missing or holds something else.
    """
    with _naming_folder(folder):
        if manifest.zero_stage == 0:
            state = _load(folder / MODEL_STATES)["optimizer"]["state"]
        else:
            state = _optimizer_state(_shards(folder, manifest)[0])
        return int(next(iter(state.values()))["step"])


@contextlib.contextmanager
def _naming_folder(folder: Path) -> Iterator[None]:
    """Turn what other contents than expected raise into one line."""
    try:
        yield
    except (LookupError, StopIteration, RuntimeError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{folder}: not a checkpoint that this version wrote ({error!r}). "
            "Fix: go on from a Hugging Face folder of it with --init_from"
        ) from error


def _load(path: Path) -> dict[str, Any]:
    from checkpoint.unpickling import allow_deepspeed_types, load_weights_only

    allow_deepspeed_types()
    return load_weights_only(path)


def _shards(folder: Path, manifest: Manifest) -> list[Shard]:
    files = [
        next(folder.glob(f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"))
        for rank in range(manifest.world_size)
    ]
    return [_load(path)["optimizer_state_dict"] for path in files]


def _optimizer_state(shard: Shard) -> dict[int, dict[str, Any]]:
    inner = shard[
        "base_optimizer_state" if "base_optimizer_state" in shard else "optimizer_state_dict"
    ]
    return inner["state"]


def _flats(shard: Shard, key: str) -> list[Tensor]:
    """Return the flat tensors that one rank holds of all parameters, in order."""
    if key == WEIGHT:
        return shard.get("fp32_flat_groups") or shard["single_partition_of_fp32_groups"]
    return [state[key] for _, state in sorted(_optimizer_state(shard).items())]


def _unsharded(states: dict[str, Any], key: str) -> Iterator[tuple[str, Tensor]]:
    """Stage 0: whole tensors; the optimizer numbers the decayed parameters before the others."""
    weights = states["module"]
    moments = sorted(weights, key=lambda name: weights[name].dim() < 2)
    for name, weight in weights.items():
        yield (
            name,
            weight if key == WEIGHT else states["optimizer"]["state"][moments.index(name)][key],
        )


def _merge_slices(
    shards: list[Shard], groups: list[dict[str, Any]], key: str
) -> Iterator[tuple[str, Tensor]]:
    """Stages 1 and 2: each rank holds a run of each flat group, and says which part of which."""
    import torch

    flats = [_flats(shard, key) for shard in shards]
    for i, shapes in enumerate(groups):
        for name, shape in shapes.items():
            parts = []
            for shard, its_flats in zip(shards, flats, strict=True):
                if address := shard["param_slice_mappings"][i].get(name):
                    parts.append(its_flats[i].narrow(0, address.start, address.numel))
            yield name, torch.cat(parts).view(shape)


def _merge_stage3(
    shards: list[Shard], groups: list[dict[str, Any]], key: str
) -> Iterator[tuple[str, Tensor]]:
    """Stage 3: each rank holds an equal part of every parameter, padded, in the groups' order."""
    import torch

    cursors = [_Cursor(_flats(shard, key)) for shard in shards]
    for shapes in groups:
        for name, shape in shapes.items():
            part = -(-shape.numel() // len(shards))
            whole = torch.cat([cursor.take(part) for cursor in cursors])
            yield name, whole[: shape.numel()].view(shape)


class _Cursor:
    """Reads a list of flat tensors as one; a read never crosses from one into the next."""

    def __init__(self, flats: list[Tensor]) -> None:
        self.flats, self.start = list(flats), 0

    def take(self, n: int) -> Tensor:
        if self.start == self.flats[0].numel():
            self.flats.pop(0)
            self.start = 0
        self.start += n
        return self.flats[0].narrow(0, self.start - n, n)
