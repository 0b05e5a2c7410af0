"""What bench/faults/kills.py does to a rank from within: tell of saves, die at a point of one."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Points of a save, with the ranks that come by.
POINTS = {"first file": (0, 1), "all files": (0, 1), "hashed": (0, 1), "manifest": (0,),
          "rename": (0,), "latest": (0,), "prune": (0,)}  # fmt: skip


def tell_of_saves(writer: int, rank: int) -> None:
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

    for owner, name in ((saving, "write_files"), (saving, "record_share"),
                        (manifest, "write_manifest")):  # fmt: skip
        setattr(owner, name, slowed(getattr(owner, name)))


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

    def fatal(owner: Any, name: str, *, before: bool, only: Callable[..., bool]) -> None:
        real = getattr(owner, name)

        def dies(*args: Any, **kwargs: Any) -> Any:
            if n_saves[0] == 2 and before and only(*args):
                os.kill(os.getpid(), signal.SIGKILL)
            result = real(*args, **kwargs)
            if n_saves[0] == 2 and not before and only(*args):
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(owner, name, dies)

    def always(*args: Any) -> bool:
        return True

    def is_deleted(path: Path, **_: Any) -> bool:
        return path.name.endswith(".deleted") and path.exists()

    saving.write_files = counted
    where: dict[str, tuple[Any, str, bool, Callable[..., bool]]] = {
        "first file": (TorchCheckpointEngine, "save", False, always),
        "all files": (saving, "write_files", False, always),
        "hashed": (saving, "record_share", False, always),
        "manifest": (manifest, "write_manifest", True, always),
        "rename": (Path, "rename", True, lambda path, _: path.name.endswith(".tmp")),
        "latest": (manifest, "write_atomically", True, lambda path, _: path.name == "latest"),
        "prune": (
            shutil,
            "rmtree",
            True,
            lambda path, **_: path.name.endswith(".deleted") and path.exists(),
        ),
    }
    owner, name, before, only = where[point]
    fatal(owner, name, before=before, only=only)
