"""--ckpt -> model, for every format that people have."""

from pathlib import Path

import torch

from checkpoint.foreign import ACCEPTED, load_foreign
from checkpoint.hf_folder import fill_model, load_hf_folder
from checkpoint.hub import locate_hf_folder
from checkpoint.layouts import step_weights
from checkpoint.manifest import MANIFEST, newest_step, read_manifest
from checkpoint.run_folder import STATUS
from model import GPT, GPTConfig


def resolve_ckpt(ckpt: str) -> str:
    """Return `ckpt`, of a run folder the newest complete step in it.

    Raises:
        ValueError: A run without a complete step.
    """
    try:
        path = Path(ckpt)
        is_run = (path / "checkpoints").is_dir() or (path / STATUS).is_file()
        is_run = is_run and not (path / MANIFEST).exists()
    except OSError:  # load_model says what is wrong with it
        return ckpt
    return str(newest_step(Path(ckpt))) if is_run else ckpt


def load_model(ckpt: str) -> tuple[GPT, str]:
    """Build the model of a checkpoint, fp32 weights in evaluation mode, on the CPU.

    Args:
        ckpt: A run folder (its newest complete step), a step folder, a Hugging Face folder or hub
            name, a build-nanogpt or nanoGPT .pt, or an llm.c .bin.

    Returns:
        The model, and the precision of the run that it is from ("fp32" outside a run).

    Raises:
        ValueError: Nothing that can be read; names what was found and what is accepted.
    """
    try:
        return _load(Path(resolve_ckpt(ckpt)), ckpt)
    except OSError as error:
        raise ValueError(f"{ckpt}: cannot be read ({error.strerror}). {ACCEPTED}") from error


def _load(path: Path, ckpt: str) -> tuple[GPT, str]:
    if path.is_file():
        return load_foreign(path), "fp32"
    if (path / MANIFEST).is_file():
        manifest = read_manifest(path)
        return fill_model(GPTConfig(**manifest.model), step_weights(path), path), manifest.precision
    if path.is_dir() and not (path / "config.json").is_file():
        names = ", ".join(sorted(p.name for p in path.iterdir())[:5]) or "nothing"
        raise ValueError(f"{path}: a folder that holds {names}. {ACCEPTED}")
    try:
        folder = locate_hf_folder(ckpt).resolve()
    except ValueError as error:
        what = str(error).partition(". Fix: ")[0]
        raise ValueError(f"{what}. {ACCEPTED}") from error
    step = folder.parents[1] / "checkpoints" / folder.name  # where a run's own folder is from
    is_ours = (step / MANIFEST).is_file()
    return load_hf_folder(folder), read_manifest(step).precision if is_ours else "fp32"


def precision_context(precision: str, device: str) -> torch.autocast:
    """Return the autocast that a run's precision means; "bf16" weights need none."""
    return torch.autocast(device, torch.bfloat16, enabled=precision == "autocast")
