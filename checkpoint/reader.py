"""Load the model that --ckpt names, whatever its format."""

import functools
import os
from dataclasses import replace
from pathlib import Path

import torch

from checkpoint.foreign import FIX_GIVE_ACCEPTED, open_foreign
from checkpoint.hf_folder import open_hf_folder
from checkpoint.hub import locate_hf_folder
from checkpoint.layouts import step_weights
from checkpoint.manifest import MANIFEST, newest_step, read_manifest
from checkpoint.run_folder import STATUS
from checkpoint.weights import Weights, fill_model
from errors import BadInput
from model import GPT, GPTConfig


def resolve_ckpt(ckpt: str) -> str:
    """Return `ckpt`; for a run folder the newest complete step in it.

    Raises:
        BadInput: The run has no complete step.
    """
    # With os.path, for which an unreadable path does not exist: load_model says what is wrong.
    is_step = os.path.exists(f"{ckpt}/{MANIFEST}")
    is_run = os.path.isdir(f"{ckpt}/checkpoints") or os.path.isfile(f"{ckpt}/{STATUS}")
    return str(newest_step(Path(ckpt))) if is_run and not is_step else ckpt


def load_model(ckpt: str) -> tuple[GPT, str]:
    """Build the model of a checkpoint, fp32 weights in evaluation mode, on the CPU.

    Returns:
        The model, and the precision of the run that trained it ("fp32" if no run of ours did).

    Raises:
        BadInput: As `open_weights`, or a weight is missing, unknown, or not finite.
    """
    weights = open_weights(ckpt)
    return fill_model(weights), weights.precision


def open_weights(ckpt: str) -> Weights:
    """Open the weights of a checkpoint.

    Args:
        ckpt: A run folder (its newest complete step), a step folder, a Hugging Face folder, one of
            its files, or hub name, a .pt of build-nanogpt, nanoGPT and their like, or an llm.c
            .bin.

    Raises:
        BadInput: It cannot be read; says what was found and what is accepted.
    """
    try:
        return _open(Path(resolve_ckpt(ckpt)), ckpt)
    except OSError as error:
        raise BadInput(ckpt, f"cannot be read ({error.strerror})", FIX_GIVE_ACCEPTED) from error


def _open(path: Path, ckpt: str) -> Weights:
    is_of_folder = path.name.endswith(".safetensors") or path.match("pytorch_model*.bin")
    if is_of_folder and (path.parent / "config.json").is_file():
        path, ckpt = path.parent, str(path.parent)
    if path.is_file():
        return open_foreign(path)
    if (path / MANIFEST).is_file():
        manifest = read_manifest(path)
        read = functools.partial(step_weights, path)
        return Weights(GPTConfig(**manifest.model), path, read, manifest.precision)
    if path.is_dir() and not (path / "config.json").is_file():
        names = ", ".join(sorted(p.name for p in path.iterdir())[:5]) or "nothing"
        raise BadInput(f"{path}", f"a folder that holds {names}", FIX_GIVE_ACCEPTED)
    try:
        folder = locate_hf_folder(ckpt).resolve()
    except BadInput as error:
        raise BadInput(error.where, error.what, FIX_GIVE_ACCEPTED) from error
    weights = open_hf_folder(folder)
    step = folder.parents[1] / "checkpoints" / folder.name  # if it is a run's consolidated folder
    if not (step / MANIFEST).is_file():
        return weights
    return replace(weights, precision=read_manifest(step).precision)


def precision_context(precision: str, device: str) -> torch.autocast:
    """Return the autocast of a run's precision; "bf16" weights need none."""
    return torch.autocast(device, torch.bfloat16, enabled=precision == "autocast")
