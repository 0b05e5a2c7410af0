"""--ckpt -> model: a run, step or consolidated folder, a Hugging Face folder or hub name."""

from pathlib import Path

import torch

from checkpoint.consolidate import step_weights
from checkpoint.manifest import MANIFEST, newest_step, read_manifest
from model import GPT, GPTConfig
from model.weights import load_hf_folder, locate_hf_folder


def load_model(ckpt: str) -> tuple[GPT, str]:
    """Build the model of a checkpoint, fp32 weights in evaluation mode, on the CPU.

    Returns:
        The model, and the precision of the run that it is from ("fp32" outside a run).

    Raises:
        ValueError: Nothing that can be read; names what was found.
    """
    path = Path(ckpt)
    if (path / MANIFEST).is_file() or (path / "checkpoints").is_dir():
        step = newest_step(path)
        return _load_step(step), read_manifest(step).precision
    folder = locate_hf_folder(ckpt).resolve()
    step = folder.parents[1] / "checkpoints" / folder.name  # where a run's own folder is from
    is_ours = (step / MANIFEST).is_file()
    return load_hf_folder(folder), read_manifest(step).precision if is_ours else "fp32"


def _load_step(folder: Path) -> GPT:
    model = GPT(GPTConfig(**read_manifest(folder).model))
    params = dict(model.named_parameters())
    with torch.no_grad():
        for name, weight in step_weights(folder):
            params.pop(name).copy_(weight)
    if params:
        raise ValueError(f"{folder}: lacks the weights {', '.join(sorted(params)[:5])}")
    return model.eval()


def precision_context(precision: str, device: str) -> torch.autocast:
    """Return the autocast that a run's precision means; "bf16" weights need none."""
    return torch.autocast(device, torch.bfloat16, enabled=precision == "autocast")
