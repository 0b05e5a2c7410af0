"""Step folder -> engine, at the same layout or another."""

import contextlib
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from checkpoint.fingerprints import compare, engine_fingerprints, fingerprint
from checkpoint.layouts import MOMENTS, optimizer_steps, step_tensors, verified_weights
from checkpoint.manifest import (
    Manifest,
    complete_steps,
    incomplete_steps,
    read_manifest,
    unknown_files,
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
        raise ValueError(f"--resume must: no checkpoint in {checkpoints}. Fix: --resume auto")
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
        ValueError: The first is damaged and "must" be taken, or all are; or one holds an unknown
            file: then no older one is taken. Names the file.
    """
    for folder in folders:
        problem, manifest, extra = "", None, []
        try:
            manifest = read_manifest(folder)
            extra = unknown_files(folder, manifest)
            verify_files(folder, manifest, dist.get_rank(), dist.get_world_size())
        except ValueError as error:
            problem = str(error)
        outcomes = [(problem, bool(extra))] * dist.get_world_size()
        dist.all_gather_object(outcomes, (problem, bool(extra)))  # all ranks
        found = next((problem for problem, _ in outcomes if problem), "")
        if not found and manifest:
            return folder, manifest
        if any(is_strange for _, is_strange in outcomes):
            raise ValueError(next(problem for problem, is_strange in outcomes if is_strange))
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

    Raises:
        ValueError: A file holds something else, or the weights that the engine goes on with are
            not those that were saved, by their fingerprints.
    """
    now = layout_of(engine, precision)
    saved = {key: getattr(manifest, key) or now[key] for key in now}
    expected = manifest.fingerprints
    if saved == now:
        allow_deepspeed_types()
        with contextlib.redirect_stdout(sys.stderr), naming_pickled_code(folder):
            engine.load_checkpoint(str(folder.parent), tag=folder.name)
    else:
        if dist.get_rank() == 0:
            changes = ", ".join(f"{k}: {saved[k]} -> {v}" for k, v in now.items() if saved[k] != v)
            print(f"{folder}: read for another layout ({changes})", file=sys.stderr)
        expected = load_whole_tensors(engine, folder, manifest)
    refresh_weights(engine)  # all ranks
    compare(engine_fingerprints(engine), expected, folder, manifest.unverified)  # all ranks
    if saved["world_size"] == now["world_size"]:
        states = load_weights_only(folder / rng_file(dist.get_rank()))
        torch.set_rng_state(states["cpu"])
        if engine.device.type == "cuda" and "cuda" in states:
            torch.cuda.set_rng_state(states["cuda"])
    else:  # dropout draws anew, not what it drew from step 0 on
        torch.manual_seed(torch.initial_seed() + (manifest.step << 20))


def load_whole_tensors(engine: Any, folder: Path, manifest: Manifest) -> dict[str, str]:
    """Load weights and moments into an engine of any layout (all ranks, each reads all files).

    Returns:
        The fingerprints of the weights in the engine's dtype.

    Raises:
        ValueError: A file holds something else.
    """
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    is_sharded, states = engine.zero_optimization_stage() > 0, engine.basic_optimizer.state
    make_moments(engine, optimizer_steps(folder, manifest))
    params = dict(engine.module.named_parameters())
    fingerprints = {}
    weights = verified_weights(folder, manifest)
    moments = [step_tensors(folder, manifest, key) for key in MOMENTS]
    for (name, weight), *named in zip(weights, *moments, strict=True):
        param = params[name]
        fingerprints[name] = fingerprint(weight, param.dtype)
        if is_sharded:
            safe_set_full_fp32_param(param, weight.to(engine.device))
        else:
            param.data.copy_(weight)
        for key, (_, moment) in zip(MOMENTS, named, strict=True):
            if is_sharded:
                safe_set_full_optimizer_state(param, moment.to(engine.device), key)
            else:
                states[param][key].copy_(moment)
    return fingerprints


def refresh_weights(engine: Any) -> None:
    """Make the weights of forward anew from the fp32 ones, as each step does (all ranks).

    This changes nothing, unless the optimizer holds them in another order than they were loaded in.
    """
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage in (1, 2):
        optimizer.update_lp_params()
    elif stage == 3:
        optimizer._partition_all_parameters()
        for group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
        optimizer.invalidate_secondary_tensor()


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
