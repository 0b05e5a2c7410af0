"""Load weights with torch.load, and nothing else; turn what it refuses into one line."""

import contextlib
import os
import pickle
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from errors import BadInput

ZIP_MAGIC = b"PK\x03\x04"  # of torch.save's files since PyTorch 1.6
PICKLE_MAGIC = b"\x80"  # of those before
FIX_COPY_AGAIN = "copy or download it again"
# What PyTorch's readers raise on damaged files and on files of another format.
DAMAGE = (RuntimeError, EOFError, KeyError, TypeError, ValueError, AttributeError, IndexError)
REFUSED = re.compile(r"GLOBAL (\S+) was not an allowed")


class Stranger:
    """Stands for an object of any other class: it has its fields, and none of its code is run."""

    def __init__(self, *_: Any) -> None:
        """Take and drop what the constructor would have been given."""

    def __setstate__(self, state: Any) -> None:
        """Take the fields of an object that keeps them in its `__dict__`."""
        if isinstance(state, dict):
            vars(self).update(state)


def _empty_dict(*_: Any) -> dict[Any, Any]:
    return {}


@contextlib.contextmanager
def naming_pickled_code(path: Path) -> Iterator[None]:
    """Turn PyTorch's refusal of a pickled object into one line.

    Raises:
        BadInput: The file, or one in the folder, holds more than tensors and plain values.
    """
    try:
        yield
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL (\S+)|error:\s*(\S.*)", str(error))
        found = f"the pickled object {refused[1] or refused[2]}" if refused else "pickled objects"
        what = f"holds {found}, but only tensors are loaded"
        remedy = "save the model's state_dict() alone with the program that wrote it"
        raise BadInput(f"{path}", what, remedy) from error


def load_weights_only(path: Path, mmap: bool = True) -> Any:
    """Load a file of `torch.save` without running code from it.

    Args:
        path: The file.
        mmap: Tensors stay mapped to the file.

    Raises:
        BadInput: The file is missing or damaged, or holds more than tensors and plain values.
    """
    with naming_pickled_code(path):
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        except FileNotFoundError:
            raise BadInput(f"{path}", "missing", FIX_COPY_AGAIN) from None
        except DAMAGE as error:
            what = f"damaged ({(str(error) or repr(error)).splitlines()[0][:80]})"
            raise BadInput(f"{path}", what, FIX_COPY_AGAIN) from error


def load_strangers_file(path: Path) -> Any:
    """Load another program's file of `torch.save`, in the format of any version of PyTorch.

    Objects beside the tensors become `Stranger`s: numpy's numbers, states of random generators,
    options. Their classes are neither imported nor run.

    Raises:
        BadInput: The file is damaged, or holds what cannot be read so.
    """
    with path.open("rb") as file:
        is_zip = file.read(len(ZIP_MAGIC)) == ZIP_MAGIC
    if is_zip:
        _check_zip(path)
    stand_ins: dict[str, Any] = {}
    while True:
        with torch.serialization.safe_globals([(it, name) for name, it in stand_ins.items()]):
            try:
                return load_weights_only(path, mmap=is_zip)
            except BadInput as error:
                refused = REFUSED.search(str(error.__cause__))
                if not refused:
                    raise
        # PyTorch leaves out the module of Python's own classes.
        name = refused[1] if "." in refused[1] else f"builtins.{refused[1]}"
        if name in stand_ins:
            raise BadInput(f"{path}", f"holds {name} in a form that cannot be read", FIX_COPY_AGAIN)
        is_dict = name == "collections.defaultdict"  # entries follow, which only a dict may take
        stand_ins[name] = _empty_dict if is_dict else type(name, (Stranger,), {})


def _check_zip(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as container:
            broken = container.testzip()
    except zipfile.BadZipFile as error:
        raise BadInput(f"{path}", f"damaged ({error})", FIX_COPY_AGAIN) from error
    if broken:
        raise BadInput(f"{path}", f"damaged (checksum of {broken})", FIX_COPY_AGAIN)


def allow_deepspeed_types() -> None:
    """Let `torch.load` load the types in DeepSpeed's files, and no others, from now on."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it guessed
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    torch.serialization.add_safe_globals([LossScaler, ZeroStageEnum, fragment_address])
