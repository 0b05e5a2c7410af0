"""Load the newest intact checkpoint into an engine of the same layout or another."""

import contextlib
import functools
import itertools
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from checkpoint.fingerprints import DTYPES, check_fingerprints, engine_fingerprints, fingerprint
from checkpoint.layouts import MOMENTS, WEIGHT, optimizer_steps, whole_states
from checkpoint.manifest import Manifest, UnknownFileError, read_manifest, verify_files
from checkpoint.saving import layout_of, on_all_ranks, rng_file
from checkpoint.unpickling import allow_deepspeed_types, load_weights_only, naming_pickled_code
from errors import BadInput
from model import GPTConfig


def check_same_run(
    manifest: Manifest, *, precision: str, model: GPTConfig, order: dict[str, Any]
) -> None:
    """Refuse to resume with another model, arithmetic or order of the data than the saved ones.

    Raises:
        BadInput: Lists every difference as `key: saved -> given`, and the shards that differ.
    """
    saved = manifest.order | _shape(manifest.model)
    given = order | _shape(asdict(model))
    changes = {k: f"{saved.get(k)} -> {v}" for k, v in given.items() if saved.get(k) != v}
    changes.pop("shards", None)  # whose names may change: "data" is the hash of what they hold
    if "data" in changes and "shards" in manifest.order:  # not in an old one
        changes["data"] = _changed_shards(manifest.order["shards"], order["shards"])
    if (precision == "fp32") != (manifest.precision == "fp32"):  # bf16 and autocast go together
        changes["precision"] = f"{manifest.precision} -> {precision}"
    if changes:
        differences = ", ".join(f"{k}: {change}" for k, change in changes.items())
        what = f"step {manifest.step} was saved with other settings ({differences})"
        remedy = "resume with these, or consolidate it and start a new run with --init_from"
        raise BadInput("--resume", what, remedy)


def _changed_shards(saved: dict[str, str], given: dict[str, str]) -> str:
    missing, added = saved.keys() - given, given.keys() - saved
    changed = dict(saved.items() - given.items()).keys() - missing
    kinds = {"changed": changed, "missing": missing, "added": added}
    return "; ".join(f"{min(v)} {k} ({len(v)} in all)" for k, v in kinds.items() if v)


def _shape(model: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in asdict(GPTConfig(**model)).items() if k != "dropout"}


def newest_intact(folders: list[Path], resume: str) -> tuple[Path, Manifest] | None:
    """Return the first folder whose every byte is as its manifest says (all ranks).

    Raises:
        BadInput: All are damaged, or the first is and `resume` is "must"; or one holds an unknown
            file, which the user may want to keep: then no older one is taken. Names the file.
    """
    for folder in folders:
        found = on_all_ranks(functools.partial(_problem_of, folder))  # all ranks
        problems = [problem for problem in found if problem]
        if not problems:
            return folder, read_manifest(folder)
        unknown = [problem for problem in problems if isinstance(problem, UnknownFileError)]
        if unknown:
            raise unknown[0]
        is_last = folder == folders[-1]
        if resume == "must" or is_last:
            remedy = "give another --run_dir" if is_last else "give --resume auto"
            raise BadInput(problems[0].where, problems[0].what, remedy)
        if dist.get_rank() == 0:
            print(f"warning: {problems[0]}", file=sys.stderr)
    return None


def _problem_of(folder: Path) -> BadInput | None:
    try:
        verify_files(folder, read_manifest(folder), dist.get_rank(), dist.get_world_size())
    except BadInput as error:
        return error
    return None


def load_checkpoint(engine: Any, folder: Path, manifest: Manifest, precision: str) -> None:
    """Load weights, optimizer and random states of every rank (all ranks).

    DeepSpeed can load its files only into the layout that wrote them. With another number of
    ranks, ZeRO stage or optimizer, we read whole weights and moments from the files of all ranks.

    Raises:
        BadInput: A file has other contents, or the weights in the engine are not those that were
            saved, by their fingerprints.
    """
    now = layout_of(engine, precision)
    saved = {key: getattr(manifest, key) for key in now}
    saved["partition"] = manifest.partition or now["partition"]  # old manifests do not record it
    expected = manifest.fingerprints
    # DeepSpeed 0.19.8 fails to load into weights that are on NVMe.
    if saved == now and not getattr(engine.optimizer, "params_in_nvme_and_cpu", False):
        allow_deepspeed_types()
        with contextlib.redirect_stdout(sys.stderr), naming_pickled_code(folder):
            engine.load_checkpoint(str(folder.parent), tag=folder.name)
    else:
        if saved != now and dist.get_rank() == 0:
            changes = ", ".join(f"{k}: {saved[k]} -> {v}" for k, v in now.items() if saved[k] != v)
            print(f"{folder}: read for another layout ({changes})", file=sys.stderr)
        expected = load_whole_tensors(engine, folder, manifest)
    refresh_weights(engine)  # all ranks
    found = engine_fingerprints(engine)  # all ranks
    check_fingerprints(found, expected, folder, manifest.unverified)
    if saved["world_size"] == now["world_size"]:
        states = load_weights_only(folder / rng_file(dist.get_rank()))
        torch.set_rng_state(states["cpu"])
        if engine.device.type == "cuda" and "cuda" in states:
            torch.cuda.set_rng_state(states["cuda"])
    else:  # dropout draws new numbers, not again those that it drew from step 0 on
        torch.manual_seed(torch.initial_seed() + (manifest.step << 20))


def load_whole_tensors(engine: Any, folder: Path, manifest: Manifest) -> dict[str, str]:
    """Load weights and moments into an engine of any layout (all ranks, each reads all files).

    Returns:
        The fingerprints of the weights in the engine's dtype.

    Raises:
        BadInput: A file has other contents, or a weight is not the one that was saved.
    """
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    is_sharded = engine.zero_optimization_stage() > 0
    make_moments(engine, optimizer_steps(folder, manifest))
    params = dict(engine.module.named_parameters())
    saved_dtype = DTYPES[manifest.precision]
    saved, given = {}, {}
    for name, (weight, exp_avg, exp_avg_sq) in whole_states(folder, manifest, WEIGHT, *MOMENTS):
        param = params[name]
        saved[name] = fingerprint(weight, saved_dtype)
        given[name] = fingerprint(weight, param.dtype)
        if is_sharded:
            safe_set_full_fp32_param(param, weight.to(engine.device))
            safe_set_full_optimizer_state(param, exp_avg.to(engine.device), "exp_avg")
            safe_set_full_optimizer_state(param, exp_avg_sq.to(engine.device), "exp_avg_sq")
        else:
            param.data.copy_(weight)
            state = engine.basic_optimizer.state[param]
            state["exp_avg"].copy_(exp_avg)
            state["exp_avg_sq"].copy_(exp_avg_sq)
    check_fingerprints(saved, manifest.fingerprints, folder, manifest.unverified)
    return given


def refresh_weights(engine: Any) -> None:
    """Copy the optimizer's fp32 weights to those of forward, as each step does (all ranks).

    This changes nothing, unless the optimizer holds them in another order than that of the file:
    then the fingerprints show it.
    """
    optimizer = engine.optimizer
    stage = engine.zero_optimization_stage()
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
    """Create the optimizer's state, as its first step would, with a count of `n_steps` steps."""
    optimizer = engine.optimizer
    adam = engine.basic_optimizer
    if engine.zero_optimization_stage() == 3:
        flats = optimizer.fp32_partitioned_groups_flat
    else:
        flats = list(itertools.chain(*(group["params"] for group in adam.param_groups)))
    # PyTorch's AdamW counts in a tensor, DeepSpeed's in a Python integer.
    in_tensor = isinstance(adam, torch.optim.AdamW)
    for flat in flats:
        count = torch.tensor(float(n_steps), device=flat.device) if in_tensor else n_steps
        adam.state[flat] = {key: torch.zeros_like(flat) for key in MOMENTS} | {"step": count}
    if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):  # stages 1 and 2
        optimizer._lazy_init_hp_params_optimizer_state()
