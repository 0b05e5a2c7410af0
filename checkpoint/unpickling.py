"""Load weights with torch.load, and nothing else; turn what it refuses into one line."""

import contextlib
import os
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from errors import BadInput

# What PyTorch's readers raise on damaged files and on files of another format.
DAMAGE = (RuntimeError, EOFError, KeyError, TypeError, ValueError, AttributeError, IndexError)


@contextlib.contextmanager
def naming_pickled_code(path: Path) -> Iterator[None]:
    """Turn PyTorch's refusal of a pickled object into one line.

    Raises:
        BadInput: The file, or one in the folder, holds more than tensors and plain values.
    """
    try:
        yield
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))
        found = f"the pickled object {refused[1]}" if refused else "pickled objects"
        what = f"holds {found}, but only tensors are loaded"
        raise BadInput(f"{path}", what, "consolidate it with the program that wrote it") from error


def load_weights_only(path: Path, stand_in: tuple[type, str] | None = None) -> Any:
    """Load a file of `torch.save` without running code from it; tensors stay mapped to the file.

    Args:
        path: The file.
        stand_in: (class, "Name"): the class takes the fields of pickled objects whose own class
            has that name, in any module; their class is neither imported nor run.

    Raises:
        BadInput: The file is missing or damaged, or holds more than tensors and plain values.
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
            raise BadInput(f"{path}", "missing", "copy it again") from None
        except DAMAGE as error:
            what = f"damaged ({str(error).splitlines()[0][:80]})"
            raise BadInput(f"{path}", what, "copy it again") from error


def allow_deepspeed_types() -> None:
    """Let `torch.load` load the types in DeepSpeed's files, and no others, from now on."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it guessed
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    torch.serialization.add_safe_globals([LossScaler, ZeroStageEnum, fragment_address])
