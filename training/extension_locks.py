"""Find locks that a killed build of a C++ extension has left: PyTorch would wait for them forever.

This file imports no torch: a run looks for such locks before it spends the seconds for that.
"""

import contextlib
import importlib.util
import os
import time
from pathlib import Path
from typing import Any

import psutil

from errors import BadInput
from training.ranks import Ranks

STALE_LOCK_S = 600  # a C++ extension of DeepSpeed builds in about a minute


def check_extension_locks(ranks: Ranks) -> None:
    """Refuse to wait forever for a lock that a killed C++ build left.

    Raises:
        BadInput: No process of this machine holds the lock and, where other machines may share
            the folder, it is older than ten minutes. Names the file.
    """
    if "FileLock(" in _builder().read_text(encoding="utf-8"):
        return  # from PyTorch 2.15 on the kernel frees the lock, and its file stays
    is_shared = ranks.local_world_size < ranks.world_size
    for lock in extensions_folder().rglob("lock"):
        with contextlib.suppress(FileNotFoundError):  # its build has just ended
            age_s = time.time() - lock.stat().st_mtime
            is_stale = not _is_held(lock) and (not is_shared or age_s > STALE_LOCK_S)
            # The build may have ended while the processes were searched for its holder.
            if is_stale and lock.exists():
                raise BadInput(str(lock), "left by a build that was killed", f"rm {lock}")


def extensions_folder() -> Path:
    """Return where PyTorch builds extensions; it begins with ~ where nobody knows the home."""
    cache = os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache"))
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path(cache, "torch_extensions"))


def _builder() -> Path:
    torch: Any = importlib.util.find_spec("torch")  # importing it takes seconds
    return Path(torch.origin).parent / "utils" / "cpp_extension.py"


def _is_held(lock: Path) -> bool:
    path = str(lock.resolve())
    for process in psutil.process_iter(["open_files"]):
        files = process.info["open_files"] or []  # None: another user's
        if any(file.path == path for file in files):
            return True
    return False
