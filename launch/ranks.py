"""Where this process stands among all, and what it shares with the others of its machine."""

import contextlib
import glob
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

STALE_LOCK_S = 600  # a C++ extension of DeepSpeed builds in about a minute
NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
OPEN_MPI = tuple(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "LOCAL_RANK", "SIZE", "LOCAL_SIZE"))


@dataclass(frozen=True)
class Ranks:
    """Where this process stands among all processes."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes for all."""
        return self.rank == 0


def read_ranks() -> Ranks:
    """Read what the launcher (deepspeed, torchrun, mpirun or none) put into the environment.

    What mpirun says gets there also under torchrun's names, for everybody else.
    """
    if "RANK" not in os.environ and all(name in os.environ for name in OPEN_MPI):
        os.environ |= {
            ours: os.environ[theirs] for ours, theirs in zip(NAMES, OPEN_MPI, strict=True)
        }
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    local_size = os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", world_size))
    return Ranks(
        rank=int(os.environ.get("RANK", 0)),
        local_rank=int(os.environ.get("LOCAL_RANK", 0)),
        world_size=world_size,
        local_world_size=int(local_size),
    )


def say_once(ranks: Ranks, line: str) -> None:
    """Print a line that every rank of this machine would print; the others wait for it.

    Launchers end all ranks when one ends: the one that speaks goes first.
    """
    if ranks.local_rank == 0:
        print(line, file=sys.stderr, flush=True)
    else:
        time.sleep(2)


def check_extension_locks(ranks: Ranks) -> None:
    """Refuse to wait for ever behind a lock that a killed C++ build left.

    Raises:
        ValueError: No process of this machine holds the lock and, where other machines may share
            the folder, it is older than ten minutes. Names the file.
    """
    home = os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions"
    shared = ranks.local_world_size < ranks.world_size
    for lock in Path(home).rglob("lock"):
        with contextlib.suppress(FileNotFoundError):  # its build has just ended
            age_s = time.time() - lock.stat().st_mtime
            stale = not _is_held(lock) and (not shared or age_s > STALE_LOCK_S)
            if stale and lock.exists():  # the build may have ended while its holder was sought
                raise ValueError(f"{lock}: left by a build that was killed. Fix: rm {lock}")


def _is_held(lock: Path) -> bool:
    target = str(lock.resolve())
    return any(_link_target(fd) == target for fd in glob.glob("/proc/[0-9]*/fd/*"))


def _link_target(link: str) -> str | None:
    try:
        return os.readlink(link)
    except OSError:  # the process or its file has just gone, or is another user's
        return None
