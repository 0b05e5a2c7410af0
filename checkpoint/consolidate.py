"""Engine or step folder -> Hugging Face folder, one parameter at a time.

    python checkpoint/consolidate.py --ckpt runs/x --out_dir x_hf

DeepSpeed's own zero_to_fp32 cannot read stage 1 with fp32 accumulation, and loads everything at
once; the layouts that it writes are few and plain, and are read here.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:  # run as a file: import from the repository root, exactly as train.py does
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from checkpoint.manifest import newest_step, read_manifest, step_name, verify_files
from model import GPTConfig

if TYPE_CHECKING:
    from torch import Tensor


def engine_weights(engine: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield every fp32 weight of a live engine (all ranks, in step; each gets the whole)."""
    from deepspeed.utils import safe_get_full_fp32_param

    sharded = engine.zero_optimization_stage() > 0
    for name, param in engine.module.named_parameters():
        weight = safe_get_full_fp32_param(param) if sharded else param.detach()
        assert weight is not None, name
        yield name, weight


def consolidate_engine(engine: Any, run_dir: Path, step: int) -> None:
    """Write `run_dir/consolidated/step_…` from a live engine (all ranks; rank 0 writes)."""
    import torch.distributed as dist

    weights = engine_weights(engine)
    if dist.get_rank() == 0:
        save_consolidated(run_dir / "consolidated" / step_name(step), engine.module.config, weights)
    for _ in weights:  # the other ranks take part in gathering each weight
        pass
    dist.barrier()  # all ranks: the folder is there


def save_consolidated(
    folder: Path, config: GPTConfig, weights: Iterable[tuple[str, Tensor]]
) -> None:
    """Write weights and tokenizer as a Hugging Face folder."""
    from data.tokenizer import save_hf_tokenizer
    from model.weights import save_hf_folder

    save_hf_folder(
        folder, config, weights, lambda partial: save_hf_tokenizer(partial, config.block_size)
    )


def step_weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield every fp32 weight of a step folder, whatever ds_config wrote it; files stay mapped.

    Raises:
        ValueError: A file is missing or holds something else.
    """
    manifest = read_manifest(folder)
    verify_files(folder, manifest)
    try:
        if manifest.zero_stage == 0:
            yield from _load(folder / "mp_rank_00_model_states.pt")["module"].items()
            return
        shards = [
            _load(next(folder.glob(f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")))
            for rank in range(manifest.world_size)
        ]
        shards = [shard["optimizer_state_dict"] for shard in shards]
        if manifest.zero_stage < 3:
            yield from _merge_slices(shards, _param_shapes(folder / "mp_rank_00_model_states.pt"))
        else:
            states = folder / "zero_pp_rank_0_mp_rank_00_model_states.pt"
            yield from _merge_stage3(shards, _param_shapes(states))
    except (KeyError, StopIteration, RuntimeError) as error:
        raise ValueError(
            f"{folder}: not a checkpoint that this version wrote ({error!r})"
        ) from error


def _load(path: Path) -> dict[str, Any]:
    from checkpoint.resuming import allow_deepspeed_types
    from checkpoint.unpickling import load_weights_only

    allow_deepspeed_types()
    return load_weights_only(path)


def _param_shapes(path: Path) -> list[dict[str, Any]]:
    return _load(path)["param_shapes"]


def _merge_slices(
    shards: list[dict[str, Any]], groups: list[dict[str, Any]]
) -> Iterator[tuple[str, Tensor]]:
    """Stages 1 and 2: each rank holds a run of each flat group, and says which part of which."""
    import torch

    for i, shapes in enumerate(groups):
        for name, shape in shapes.items():
            parts = []
            for shard in shards:
                if address := shard["param_slice_mappings"][i].get(name):
                    flat = shard["single_partition_of_fp32_groups"][i]
                    parts.append(flat.narrow(0, address.start, address.numel))
            yield name, torch.cat(parts).view(shape)


def _merge_stage3(
    shards: list[dict[str, Any]], groups: list[dict[str, Any]]
) -> Iterator[tuple[str, Tensor]]:
    """Stage 3: each rank holds an equal part of every parameter, padded, in the groups' order."""
    import torch

    cursors = [_Cursor(shard["fp32_flat_groups"]) for shard in shards]
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


def check_empty(out_dir: Path) -> None:
    """Refuse to write over anything.

    Raises:
        ValueError: `out_dir` is a file, or a folder that holds something.
    """
    if out_dir.exists() and not (out_dir.is_dir() and not any(out_dir.iterdir())):
        raise ValueError(f"--out_dir {out_dir}: exists and is not an empty folder; give another")


def main() -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ckpt", type=Path, required=True, help="run or step folder")
    parser.add_argument("--out_dir", type=Path, help="default: consolidated/step_… of the run")
    args = parser.parse_args()
    try:
        folder = newest_step(args.ckpt.resolve())
        if args.out_dir:
            check_empty(args.out_dir)
        out_dir = args.out_dir or folder.parents[1] / "consolidated" / folder.name
        save_consolidated(out_dir, GPTConfig(**read_manifest(folder).model), step_weights(folder))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(out_dir)
    return 0


if __name__ == "__main__":
    sys.exit(main())
