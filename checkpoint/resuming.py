"""Step folder -> engine, at the same layout or another."""

import contextlib
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from checkpoint.layouts import MOMENTS, WEIGHT, optimizer_steps, step_tensors
from checkpoint.manifest import (
    Manifest,
    complete_steps,
    incomplete_steps,
    read_manifest,
    verify_files,
)
from checkpoint.saving import layout_of, rng_file
from checkpoint.unpickling import allow_deepspeed_types, load_weights_only, naming_pickled_code
from model import GPTConfig


def find_checkpoints(run_dir: Path, resume: str) -> list[Path]:
    """Return the step folders to go on from, the newest first; none to start anew.

    Args:
        run_dir: The run.
        resume: "auto", "must" or "none".

    Raises:
        ValueError: "must" without a checkpoint, or step folders that are all incomplete.
    """
    checkpoints = run_dir / "checkpoints"
    if resume == "none":
        return []
    steps = complete_steps(checkpoints)
    if steps:
        return steps[::-1]
    if broken := incomplete_steps(checkpoints):
        raise ValueError(f"{broken[-1]}: no manifest.json. Fix: rm -r {broken[-1]}, to start anew")
    if resume == "must":
        raise ValueError(
            f"--resume must: {checkpoints} holds no complete checkpoint. Fix: --resume auto"
        )
    return []


def check_same_run(
    manifest: Manifest, *, precision: str, model: GPTConfig, order: dict[str, Any]
) -> None:
    """Refuse to go on with another model, arithmetic or order of the data than the saved ones.

    Raises:
        ValueError: Lists every difference as `key: saved -> given`.
    """
    saved = {"fp32": manifest.precision == "fp32"} | manifest.order | _shape(manifest.model)
    given = {"fp32": precision == "fp32"} | order | _shape(asdict(model))
    differences = [f"{k}: {saved.get(k)} -> {v}" for k, v in given.items() if saved.get(k) != v]
    if differences:
        raise ValueError(
            f"--resume: step {manifest.step} was saved with other settings "
            f"({', '.join(differences)}). Fix: resume with the saved ones, or consolidate it and "
            "start a new run with --init_from"
        )


def _shape(model: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in asdict(GPTConfig(**model)).items() if k != "dropout"}


def newest_intact(folders: list[Path], resume: str) -> tuple[Path, Manifest] | None:
    """Return the first folder whose every byte is as its manifest says (all ranks).

    Raises:
        ValueError: The first is damaged and "must" be taken, or all are; names the file.
    """
    for folder in folders:
        problem, manifest = "", None
        try:
            manifest = read_manifest(folder)
            verify_files(folder, manifest, dist.get_rank(), dist.get_world_size())
        except ValueError as error:
            problem = str(error)
        problems = [""] * dist.get_world_size()
        dist.all_gather_object(problems, problem)  # all ranks
        found = next(filter(None, problems), "")
        if not found and manifest:
            return folder, manifest
        if resume == "must" or folder == folders[-1]:
            what = found.partition(". Fix: ")[0]
            remedy = "--resume auto" if folder != folders[-1] else "give another --run_dir"
            raise ValueError(f"{what}. Fix: {remedy}")
        if dist.get_rank() == 0:
            print(f"warning: {found}", file=sys.stderr)
    return None


def load_checkpoint(engine: Any, folder: Path, manifest: Manifest, precision: str) -> None:
    """Load weights, optimizer and random states of every rank (all ranks).

    The engine's own files serve only the layout that wrote them; with another number of ranks,
    ZeRO stage or optimizer, whole weights and moments are read from all of them.
    """
    now = layout_of(engine, precision)
    saved = {key: getattr(manifest, key) for key in now}
    if saved == now:
        allow_deepspeed_types()
        with contextlib.redirect_stdout(sys.stderr), naming_pickled_code(folder):
            engine.load_checkpoint(str(folder.parent), tag=folder.name)
    else:
        if dist.get_rank() == 0:
            changes = ", ".join(f"{k}: {saved[k]} -> {v}" for k, v in now.items() if saved[k] != v)
            print(f"{folder}: read for another layout ({changes})", file=sys.stderr)
        load_whole_tensors(engine, folder, manifest)
    if saved["world_size"] == now["world_size"]:
        states = load_weights_only(folder / rng_file(dist.get_rank()))
        torch.set_rng_state(states["cpu"])
        if engine.device.type == "cuda" and "cuda" in states:
            torch.cuda.set_rng_state(states["cuda"])
    else:  # dropout draws anew, not what it drew from step 0 on
        torch.manual_seed(torch.initial_seed() + (manifest.step << 20))


def load_whole_tensors(engine: Any, folder: Path, manifest: Manifest) -> None:
    """Load weights and moments into an engine of any layout (all ranks, each reads all files).

    Raises:
        ValueError: A file holds something else.
    """
    import deepspeed
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    stage, states = engine.zero_optimization_stage(), engine.basic_optimizer.state
    make_moments(engine, optimizer_steps(folder, manifest))
    params = dict(engine.module.named_parameters())
    tensors = (step_tensors(folder, manifest, key) for key in (WEIGHT, *MOMENTS))
    for (name, weight), *named in zip(*tensors, strict=True):
        param = params[name]
        moments = zip(MOMENTS, (moment.to(engine.device) for _, moment in named), strict=True)
        if stage > 0:
            safe_set_full_fp32_param(param, weight.to(engine.device))
        for key, moment in moments:
            if stage > 0:
                safe_set_full_optimizer_state(param, moment, key)
            else:
                states[param][key].copy_(moment)
        whole = deepspeed.zero.GatheredParameters([param], modifier_rank=0, enabled=stage == 3)
        with whole, torch.no_grad():
            param.copy_(weight)


def make_moments(engine: Any, n_steps: int) -> None:
    """Give the optimizer the state that its first step would make, after `n_steps` steps."""
    optimizer, adam = engine.optimizer, engine.basic_optimizer
    if engine.zero_optimization_stage() == 3:
        flats = optimizer.fp32_partitioned_groups_flat
    else:
        flats = [param for group in adam.param_groups for param in group["params"]]
    for flat in flats:
        adam.state[flat] = {key: torch.zeros_like(flat) for key in MOMENTS}
        in_tensor = isinstance(adam, torch.optim.AdamW)  # DeepSpeed's own count in Python
        adam.state[flat]["step"] = (
            torch.tensor(float(n_steps), device=flat.device) if in_tensor else n_steps
        )
    if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):  # stages 1 and 2
        optimizer._lazy_init_hp_params_optimizer_state()
