"""Locks that a killed build of a C++ extension has left: PyTorch would wait behind them for ever.

This file imports no torch: a run looks for such locks before it takes the seconds for that.
"""

import contextlib
import glob
import importlib.util
import os
import time
from pathlib import Path
from typing import Any

from training.ranks import Ranks

STALE_LOCK_S = 600  # a C++ extension of DeepSpeed builds in about a minute


def check_extension_locks(ranks: Ranks) -> None:
    """Refuse to wait for ever behind a lock that a killed C++ build left.

    Raises:
        ValueError: No process of this machine holds the lock and, where other machines may share
            the folder, it is older than ten minutes. Names the file.
    """
    if "FileLock(" in _builder().read_text(encoding="utf-8"):
        return  # from PyTorch 2.15 on the kernel frees the lock, and its file stays
    home = os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions"
    shared = ranks.local_world_size < ranks.world_size
    for lock in Path(home).rglob("lock"):
        with contextlib.suppress(FileNotFoundError):  # its build has just ended
            age_s = time.time() - lock.stat().st_mtime
            stale = not _is_held(lock) and (not shared or age_s > STALE_LOCK_S)
            if stale and lock.exists():  # the build may have ended while its holder was sought
                raise ValueError(f"{lock}: left by a build that was killed. Fix: rm {lock}")


def _builder() -> Path:
    torch: Any = importlib.util.find_spec("torch")  # which takes seconds to import
    return Path(torch.origin).parent / "utils" / "cpp_extension.py"


def _is_held(lock: Path) -> bool:
    target = str(lock.resolve())
    return any(_link_target(fd) == target for fd in glob.glob("/proc/[0-9]*/fd/*"))


def _link_target(link: str) -> str | None:
    try:
        return os.readlink(link)
    except OSError:  # the process or its file has just gone, or is another user's
        return None
