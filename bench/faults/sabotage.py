"""Change a rank from within, for kills.py: report its saves, slow them, die at a point of one."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Points of a save, with the ranks that reach them.
POINTS = {
    "first file": (0, 1),
    "all files": (0, 1),
    "hashed": (0, 1),
    "manifest": (0,),
    "rename": (0,),
    "latest": (0,),
    "prune": (0,),
}


def report_saves(writer: int, rank: int) -> None:
    """Have rank 0 write a byte where a save begins, and one where it ends."""
    import checkpoint.saving as saving

    real = saving.save_checkpoint

    def save(*args: Any, **kwargs: Any) -> None:
        os.write(writer, b"b")
        real(*args, **kwargs)
        os.write(writer, b"e")

    if rank == 0:
        saving.save_checkpoint = save


def slow_saves() -> None:
    """Have each part of a save last another second."""
    import checkpoint.manifest as manifest
    import checkpoint.saving as saving

    def slowed(real: Callable[..., Any]) -> Callable[..., Any]:
        def slow(*args: Any) -> Any:
            time.sleep(1)
            return real(*args)

        return slow

    saving.write_files = slowed(saving.write_files)
    saving.record_share = slowed(saving.record_share)
    manifest.write_manifest = slowed(manifest.write_manifest)


def die_at(point: str) -> None:
    """Have this process kill itself at a point of its second save."""
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

    import checkpoint.manifest as manifest
    import checkpoint.saving as saving

    n_saves = [0]
    write_files = saving.write_files

    def counted(*args: Any) -> None:
        n_saves[0] += 1
        write_files(*args)

    def always(first: Any) -> bool:
        return True

    def is_renamed(path: Path) -> bool:
        return path.name.endswith(".deleted") and path.exists()

    saving.write_files = counted
    # What to replace, whether to die before its call, and with which first arguments.
    points: dict[str, tuple[Any, str, bool, Callable[..., bool]]] = {
        "first file": (TorchCheckpointEngine, "save", False, always),
        "all files": (saving, "write_files", False, always),
        "hashed": (saving, "record_share", False, always),
        "manifest": (manifest, "write_manifest", True, always),
        "rename": (Path, "rename", True, lambda path: path.name.endswith(".tmp")),
        "latest": (manifest, "write_atomically", True, lambda path: path.name == "latest"),
        "prune": (shutil, "rmtree", True, is_renamed),
    }
    owner, name, before, is_meant = points[point]
    real = getattr(owner, name)

    def die(first: Any, *args: Any, **kwargs: Any) -> Any:
        is_fatal = n_saves[0] == 2 and is_meant(first)
        if is_fatal and before:
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(first, *args, **kwargs)
        if is_fatal and not before:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, die)
