"""Engine -> step folder: the engine's own files, this run's random states, and the manifest."""

import contextlib
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from checkpoint.manifest import (
    PARTIAL_SUFFIX,
    FileRecord,
    Manifest,
    publish,
    record_file,
    step_name,
)

RECOVERY_SCRIPTS = "zero_to_*.py"  # DeepSpeed copies executable code beside its files


def rng_file(rank: int) -> str:
    """Return the name of the file that holds a rank's random states."""
    return f"rng_rank_{rank:05d}.pt"


def save_checkpoint(
    engine: Any, checkpoints: Path, *, step: int, samples: int, precision: str
) -> None:
    """Write `checkpoints/step_…`; it becomes visible only when it is complete (all ranks).

    Raises:
        OSError: The disk refused. Rank 0's own refusal is raised on every rank.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    partial = checkpoints / (step_name(step) + PARTIAL_SUFFIX)
    if rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
    dist.barrier()  # all ranks: the old attempt is gone
    with contextlib.redirect_stdout(sys.stderr):
        engine.save_checkpoint(str(checkpoints), tag=partial.name, save_latest=False)
    states = {"cpu": torch.get_rng_state()}
    if engine.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state()
    torch.save(states, partial / rng_file(rank))
    dist.barrier()  # all ranks: every file is written
    names = sorted(path.name for path in partial.iterdir())
    mine = {name: record_file(partial / name) for name in names[rank::world_size]}
    shares: list[dict[str, FileRecord]] = [{} for _ in range(world_size)]
    dist.all_gather_object(shares, mine)  # all ranks
    files = {name: record for share in shares for name, record in share.items()}
    manifest = Manifest(
        step=step,
        samples=samples,
        world_size=world_size,
        zero_stage=engine.zero_optimization_stage(),
        precision=precision,
        model=asdict(engine.module.config),
        files=dict(sorted(files.items())),
    )
    failure: list[str | None] = [None]
    if rank == 0:
        try:
            for script in checkpoints.glob(RECOVERY_SCRIPTS):
                script.unlink()
            shutil.rmtree(checkpoints / step_name(step), ignore_errors=True)
            publish(partial, manifest)
        except OSError as error:
            failure = [f"{partial}: {error}"]
    dist.broadcast_object_list(failure, src=0)  # all ranks
    if failure[0]:
        raise OSError(failure[0])
