"""torch.load of weights only; whatever it refuses becomes one line."""

import pickle
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch


def load_weights_only(path: Path, stand_ins: Sequence[tuple[type, str]] = ()) -> Any:
    """Load a file of `torch.save` without running anything in it; tensors stay mapped.

    Args:
        path: The file.
        stand_ins: (class, "module.Name"): the class takes the fields of pickled objects of that
            name, whose own class is neither imported nor run.

    Raises:
        ValueError: A missing or damaged file, or one that holds more than tensors and plain values.
    """
    try:
        with torch.serialization.safe_globals([*stand_ins]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise ValueError(f"{path}: missing") from None
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))
        what = f"the pickled object {refused[1]}" if refused else "pickled objects"
        raise ValueError(f"{path}: holds {what}; only tensors are loaded") from error
    except (RuntimeError, EOFError, OSError, KeyError) as error:
        raise ValueError(f"{path}: damaged ({str(error).splitlines()[0][:80]})") from error
