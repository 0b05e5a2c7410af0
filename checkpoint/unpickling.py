"""torch.load of weights only; whatever it refuses becomes one line."""

import contextlib
import os
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

# What PyTorch's readers raise on files that are damaged or not theirs.
DAMAGE = (RuntimeError, EOFError, KeyError, TypeError, ValueError, AttributeError, IndexError)


@contextlib.contextmanager
def naming_pickled_code(path: Path) -> Iterator[None]:
    """Turn PyTorch's refusal of a pickled object into one line.

    Raises:
        ValueError: The file, or one in the folder, holds more than tensors and plain values.
    """
    try:
        yield
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))
        what = f"the pickled object {refused[1]}" if refused else "pickled objects"
        raise ValueError(
            f"{path}: holds {what}, only tensors are loaded. Fix: consolidate it where it is from"
        ) from error


def load_weights_only(path: Path, stand_in: tuple[type, str] | None = None) -> Any:
    """Load a file of `torch.save` without running anything in it; tensors stay mapped.

    Args:
        path: The file.
        stand_in: (class, "Name"): the class takes the fields of pickled objects whose own class,
            in whatever module, has that name; that class is neither imported nor run.

    Raises:
        ValueError: A missing or damaged file, or one that holds more than tensors and plain values.
    """
    allowed: list[Any] = []
    with naming_pickled_code(path):
        try:
            if stand_in:
                names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
                allowed = [(stand_in[0], n) for n in names if n.endswith(f".{stand_in[1]}")]
            with torch.serialization.safe_globals(allowed):
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except FileNotFoundError:
            raise ValueError(f"{path}: missing. Fix: copy it again") from None
        except DAMAGE as error:
            raise ValueError(
                f"{path}: damaged ({str(error).splitlines()[0][:80]}). Fix: copy it again"
            ) from error


def allow_deepspeed_types() -> None:
    """Let `torch.load` take what DeepSpeed puts into its files, and nothing else, from here on."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it guessed
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    torch.serialization.add_safe_globals([LossScaler, ZeroStageEnum, fragment_address])
