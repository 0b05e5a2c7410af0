"""Read whole fp32 tensors from a step folder, one parameter at a time, whatever ds_config wrote it.

DeepSpeed's own readers cannot read stage 1 with fp32 accumulation, cannot convert stage 1 to 3 or
to 0, and load everything at once. The layouts that it writes are few and simple.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checkpoint.manifest import Manifest, read_manifest, verify_files
from errors import BadInput

if TYPE_CHECKING:
    from torch import Size, Tensor

    # Rank, number of its flat tensor, start and length in it.
    Part = tuple[int, int, int, int]
    Placed = tuple[str, Size, list[Part]]  # name, shape and parts of one parameter

WEIGHT = "weight"
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's names
MODEL_STATES = "mp_rank_00_model_states.pt"
RankFile = dict[str, Any]  # one rank's part of the optimizer


def step_weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield every whole fp32 weight of a step folder, after each of its files is verified.

    Raises:
        BadInput: A file is missing, altered, or has other contents; after the last weight: some
            are not those that the model computed with, by their fingerprints.
    """
    from checkpoint.fingerprints import DTYPES, verified

    manifest = read_manifest(folder)
    verify_files(folder, manifest)
    weights = ((name, weight) for name, (weight,) in whole_states(folder, manifest, WEIGHT))
    dtype = DTYPES[manifest.precision]
    yield from verified(weights, manifest.fingerprints, dtype, folder, manifest.unverified)


def whole_states(
    folder: Path, manifest: Manifest, *keys: str
) -> Iterator[tuple[str, list[Tensor]]]:
    """Yield each parameter's name and whole fp32 tensors, one per key, always in the same order.

    Args:
        folder: A step folder whose files are verified.
        manifest: Its manifest.
        keys: WEIGHT or some of MOMENTS.

    Raises:
        BadInput: A file is missing or has other contents.
    """
    import torch

    with _naming_folder(folder):
        if manifest.zero_stage == 0:
            yield from _unsharded(_load(folder / MODEL_STATES), keys)
            return
        is_stage3 = manifest.zero_stage == 3
        first = f"zero_pp_rank_0_{MODEL_STATES}" if is_stage3 else MODEL_STATES
        groups = _load(folder / first)["param_shapes"]
        files = _rank_files(folder, manifest)  # mapped: memory holds only what is concatenated
        placed = _equal_parts(files, groups) if is_stage3 else _slices(files, groups)
        for name, shape, parts in placed:
            states = []
            for key in keys:
                flats = [_flats(file, key) for file in files]
                pieces = [flats[rank][i].narrow(0, start, n) for rank, i, start, n in parts]
                states.append(torch.cat(pieces)[: shape.numel()].view(shape))
            yield name, states


def optimizer_steps(folder: Path, manifest: Manifest) -> int:
    """Return AdamW's own count of steps, which skipped steps do not increase.

    Raises:
        BadInput: A file is missing or has other contents.
    """
    with _naming_folder(folder):
        if manifest.zero_stage == 0:
            state = _load(folder / MODEL_STATES)["optimizer"]["state"]
        else:
            state = _optimizer_state(_rank_files(folder, manifest)[0])
        return int(next(iter(state.values()))["step"])


@contextlib.contextmanager
def _naming_folder(folder: Path) -> Iterator[None]:
    """Turn the errors of reading other contents than expected into one line."""
    try:
        yield
    except (LookupError, StopIteration, RuntimeError, TypeError, AttributeError) as error:
        what = f"not a checkpoint that this version wrote ({error!r})"
        remedy = "start from a Hugging Face folder of it with --init_from"
        raise BadInput(f"{folder}", what, remedy) from error


def _load(path: Path) -> dict[str, Any]:
    from checkpoint.unpickling import allow_deepspeed_types, load_weights_only

    allow_deepspeed_types()
    return load_weights_only(path)


def _rank_files(folder: Path, manifest: Manifest) -> list[RankFile]:
    files = []
    for rank in range(manifest.world_size):
        path = next(folder.glob(f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"))
        files.append(_load(path)["optimizer_state_dict"])
    return files


def _optimizer_state(file: RankFile) -> dict[int, dict[str, Any]]:
    is_wrapped = "base_optimizer_state" in file  # stages 1 and 2
    return file["base_optimizer_state" if is_wrapped else "optimizer_state_dict"]["state"]


def _flats(file: RankFile, key: str) -> list[Tensor]:
    """Return the flat tensors that one rank holds of all parameters, in order."""
    if key == WEIGHT:
        return file.get("fp32_flat_groups") or file["single_partition_of_fp32_groups"]
    return [state[key] for _, state in sorted(_optimizer_state(file).items())]


def _unsharded(file: dict[str, Any], keys: tuple[str, ...]) -> Iterator[tuple[str, list[Tensor]]]:
    """Stage 0: whole tensors; the optimizer numbers the decayed parameters before the others."""
    weights = file["module"]
    numbered = sorted(weights, key=lambda name: weights[name].dim() < 2)
    for name, weight in weights.items():
        state = file["optimizer"]["state"].get(numbered.index(name), {}) | {WEIGHT: weight}
        yield name, [state[key] for key in keys]


def _slices(files: list[RankFile], groups: list[dict[str, Size]]) -> Iterator[Placed]:
    """Stages 1 and 2: each rank holds a range of each group's flat tensor, and says of what."""
    for i, shapes in enumerate(groups):
        for name, shape in shapes.items():
            parts = []
            for rank, file in enumerate(files):
                address = file["param_slice_mappings"][i].get(name)
                if address:  # else it lies on other ranks
                    parts.append((rank, i, address.start, address.numel))
            yield name, shape, parts


def _equal_parts(files: list[RankFile], groups: list[dict[str, Size]]) -> Iterator[Placed]:
    """Stage 3: each rank holds an equal part of every parameter, padded, in the groups' order."""
    sizes = [flat.numel() for flat in _flats(files[0], WEIGHT)]
    flat = start = 0
    for shapes in groups:
        for name, shape in shapes.items():
            if start == sizes[flat]:  # a group may fill several flat tensors (sub_group_size)
                flat, start = flat + 1, 0
            length = -(-shape.numel() // len(files))
            yield name, shape, [(rank, flat, start, length) for rank in range(len(files))]
            start += length
