"""Save an engine as a step folder: its own files, the random states and the manifest."""

import contextlib
import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from checkpoint.fingerprints import engine_fingerprints
from checkpoint.manifest import (
    PARTIAL_SUFFIX,
    FileRecord,
    Manifest,
    prune,
    publish_step,
    record_file,
    step_name,
    sync,
    writer_of,
)

RECOVERY_SCRIPTS = "zero_to_*.py"  # DeepSpeed copies executable code beside its files


def rng_file(rank: int) -> str:
    """Return the name of the file that holds a rank's random states."""
    return f"rng_rank_{rank:05d}.pt"


def layout_of(engine: Any, precision: str) -> dict[str, Any]:
    """Return what the engine's files depend on: fields of the manifest."""
    return {
        "world_size": dist.get_world_size(),
        "zero_stage": engine.zero_optimization_stage(),
        "precision": precision,
        "optimizer": f"{type(engine.optimizer).__name__}, {type(engine.basic_optimizer).__name__}",
        "partition": _partition_of(engine),
    }


def _partition_of(engine: Any) -> str:
    """Say which weights lie in which of the optimizer's flat tensors, in which order."""
    if engine.zero_optimization_stage() == 0:
        return ""
    flats = [list(shapes) for shapes in engine._get_zero_param_shapes()]
    paddings = getattr(engine.optimizer, "round_robin_bit16_padding", [])
    digest = hashlib.sha256(json.dumps([flats, paddings]).encode()).hexdigest()
    return f"{len(flats)} flat tensors, hash {digest[:8]}"


def save_checkpoint(
    engine: Any,
    checkpoints: Path,
    *,
    step: int,
    precision: str,
    order: dict[str, Any],
    keep: int = 0,
    keep_every: int = 0,
    replaced_step: int = 0,
    unverified: list[str] | None = None,
) -> None:
    """Write `checkpoints/step_…`; it becomes visible only when it is complete (all ranks).

    Args:
        engine: At a step boundary.
        checkpoints: Folder of the step folders.
        step: As in Manifest, like `precision`, `order` and `unverified`.
        keep: How many checkpoints to keep, the newest; 0: all.
        keep_every: Older ones stay if their step is a multiple of this; 0: none stays.
        replaced_step: Of a checkpoint that this one replaces; 0: of none.

    Raises:
        OSError: A rank could not write, on all ranks; names the file.
    """
    rank = dist.get_rank()
    partial = checkpoints / (step_name(step) + PARTIAL_SUFFIX)
    if rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
    dist.barrier()  # all ranks: the unfinished save of an earlier run is deleted
    write_files(engine, partial)
    fingerprints = engine_fingerprints(engine)  # all ranks
    dist.barrier()  # all ranks: every file is written
    files: dict[str, FileRecord] = {}
    for share in on_all_ranks(lambda: record_share(partial, rank)):  # all ranks
        files |= share
    manifest = Manifest(
        step=step,
        **layout_of(engine, precision),
        model=asdict(engine.module.config),
        order=order,
        files=files,
        fingerprints=fingerprints,
        unverified=unverified or [],
    )
    on_all_ranks(lambda: _finish(partial, manifest, keep, keep_every, replaced_step))  # all ranks


def _finish(partial: Path, manifest: Manifest, *pruning: int) -> None:
    if dist.get_rank() == 0:
        for script in partial.parent.glob(RECOVERY_SCRIPTS):
            script.unlink()
        publish_step(partial, manifest)
        prune(partial.parent, *pruning)


def write_files(engine: Any, partial: Path) -> None:
    """Write the engine's files and this rank's random states into `partial` (all ranks)."""
    rank = dist.get_rank()
    states = {"cpu": torch.get_rng_state()}
    if engine.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state()
    try:
        with contextlib.redirect_stdout(sys.stderr):
            engine.save_checkpoint(str(partial.parent), tag=partial.name, save_latest=False)
        torch.save(states, partial / rng_file(rank))
    except RuntimeError as error:  # PyTorch's writer on a full disk
        what = str(error).splitlines()[0]
        raise OSError(f"{partial}: {what}. Fix: free disk space, then start again") from error


def record_share(partial: Path, rank: int) -> dict[str, FileRecord]:
    """Flush and hash the files that this rank wrote."""
    paths = sorted(partial.glob("[!.]*"))  # hidden files are not ours
    own = [path for path in paths if writer_of(path.name) == rank]
    for path in own:
        sync(path)
    return {path.name: record_file(path) for path in own}


def on_all_ranks(work: Callable[[], Any]) -> list[Any]:
    """Do `work` on every rank; return the result of each (all ranks).

    Raises:
        OSError: `work` raised one on some rank: then all ranks raise it, and none waits for ever.
    """
    failure, result = "", None
    try:
        result = work()
    except OSError as error:
        failure = f"rank {dist.get_rank()}: {error}"
    outcomes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, (failure, result))  # all ranks
    failures = [failure for failure, _ in outcomes if failure]
    if failures:
        raise OSError(failures[0])
    return [result for _, result in outcomes]
