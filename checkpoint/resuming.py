"""Step folder -> engine, at the same layout."""

import contextlib
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from checkpoint.manifest import (
    Manifest,
    complete_steps,
    incomplete_steps,
    read_manifest,
    verify_files,
)
from checkpoint.saving import rng_file
from model import GPTConfig


def find_checkpoint(run_dir: Path, resume: str) -> Path | None:
    """Return the step folder to go on from, or None to start anew.

    Args:
        run_dir: The run.
        resume: "auto", "must" or "none".

    Raises:
        ValueError: "none" in a folder that is not empty, "must" without a checkpoint, or step
            folders that are all incomplete.
    """
    checkpoints = run_dir / "checkpoints"
    if resume == "none":
        if run_dir.is_dir() and any(run_dir.iterdir()):
            raise ValueError(f"--resume none: {run_dir} is not empty; give another --run_dir")
        return None
    steps = complete_steps(checkpoints)
    if steps:
        return steps[-1]
    if broken := incomplete_steps(checkpoints):
        raise ValueError(f"{broken[-1]}: no manifest.json; delete it to start anew")
    if resume == "must":
        raise ValueError(f"--resume must: {checkpoints} holds no complete checkpoint")
    return None


def check_layout(
    folder: Path, *, world_size: int, zero_stage: int, precision: str, model: GPTConfig
) -> Manifest:
    """Read the manifest of `folder` and refuse a layout that is not the run's.

    Raises:
        ValueError: Lists every difference as `key: saved -> given`.
    """
    manifest = read_manifest(folder)
    given = {"world_size": world_size, "zero_stage": zero_stage, "precision": precision}
    given |= {k: v for k, v in asdict(model).items() if k != "dropout"}
    saved = asdict(manifest) | asdict(GPTConfig(**manifest.model))
    differences = [f"{k}: {saved[k]} -> {v}" for k, v in given.items() if saved[k] != v]
    if differences:
        raise ValueError(
            f"{folder} was saved with another layout ({', '.join(differences)}); resume with the "
            "saved one, or consolidate it and start a new run with --init_from"
        )
    return manifest


def load_checkpoint(engine: Any, folder: Path, manifest: Manifest) -> None:
    """Load weights, optimizer and random states of every rank (all ranks).

    Raises:
        ValueError: A file of this rank's share is missing or altered; names it.
        SystemExit: Another rank found such a file, and says so.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    problem = ""
    try:
        verify_files(folder, manifest, rank, world_size)
    except ValueError as error:
        problem = str(error)
    problems = [""] * world_size
    dist.all_gather_object(problems, problem)  # all ranks
    if problem:
        raise ValueError(problem)
    if any(problems):
        raise SystemExit(2)
    allow_deepspeed_types()
    with contextlib.redirect_stdout(sys.stderr):
        engine.load_checkpoint(str(folder.parent), tag=folder.name)
    states = torch.load(folder / rng_file(rank), weights_only=True)
    torch.set_rng_state(states["cpu"])
    if engine.device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])


def allow_deepspeed_types() -> None:
    """Let `torch.load` take what DeepSpeed puts into its files, and nothing else, from here on.

    DeepSpeed itself asks for weights_only=False, which runs any code; PyTorch puts this variable
    above what a caller asks for.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it guessed
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    torch.serialization.add_safe_globals([LossScaler, ZeroStageEnum, fragment_address])
