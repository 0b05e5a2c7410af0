"""Where this process stands among all, and what it shares with the others of its machine."""

import gc
import os
import sys
import time
from dataclasses import dataclass
from typing import NoReturn

from data.mpi import BY_HAND, find_tasks, read_number

LAST_PORT = 2**16 - 1
NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")  # torchrun's


@dataclass(frozen=True)
class Ranks:
    """Where this process stands among all processes; by default it is alone."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes for all."""
        return self.rank == 0


def read_ranks() -> Ranks:
    """Read what the launcher (deepspeed, torchrun, mpirun, srun or none) put into the environment.

    mpirun's and srun's values are copied to torchrun's variables, for the libraries.

    Raises:
        ValueError: Variables are missing, contradict each other, or are no numbers; names them.
    """
    tasks = find_tasks() if "RANK" not in os.environ else None
    if tasks:
        os.environ |= dict(zip(NAMES, map(str, tasks[1:]), strict=True))
    given = {name: read_number(name) for name in NAMES if name in os.environ}
    if not given or given == {"LOCAL_RANK": 0}:
        return Ranks()
    needed = NAMES[:3] if given.get("WORLD_SIZE") != 1 else ("RANK", "WORLD_SIZE")
    missing = [name for name in needed if name not in given]
    if missing:
        raise ValueError(
            f"{', '.join(given)}: set without {', '.join(missing)}. Fix: {BY_HAND}, or unset all"
        )
    local_sizes = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "WORLD_SIZE")  # the second is deepspeed's
    local_size = next(name for name in local_sizes if name in os.environ)
    rank, local_rank, world_size = given["RANK"], given.get("LOCAL_RANK", 0), given["WORLD_SIZE"]
    n_local = read_number(local_size)
    if rank >= world_size or local_rank >= n_local or n_local > world_size:
        said = ", ".join(f"{name} {value}" for name, value in given.items())
        raise ValueError(f"{said}: contradict each other. Fix: {BY_HAND}, or unset them")
    if "MASTER_PORT" in os.environ and read_number("MASTER_PORT") > LAST_PORT:
        port = os.environ["MASTER_PORT"]
        raise ValueError(f"MASTER_PORT {port}: out of range. Fix: give at most {LAST_PORT}")
    return Ranks(rank, local_rank, world_size, n_local)


def ranks_or_exit() -> Ranks:
    """Return `read_ranks`; where it raises end with its line and status 2."""
    try:
        return read_ranks()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def leave(exit_status: int) -> NoReturn:
    """End this process; after a failure (1) or bad input (2) at once.

    The end of NCCL's group waits for the other ranks of the machine, and these may wait for this
    one in a collective.
    """
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.flush()
    if exit_status in (1, 2):
        os._exit(exit_status)
    distributed = sys.modules.get("torch.distributed")
    if distributed and distributed.is_initialized():
        distributed.destroy_process_group()
    gc.freeze()  # else the interpreter searches all that was imported for garbage: over a second
    sys.exit(exit_status)


def say_once(ranks: Ranks, line: str) -> None:
    """Print a line that every rank of this machine would print; the others wait for it.

    Launchers end all ranks when one ends: the one that speaks goes first.
    """
    if ranks.local_rank == 0:
        print(line, file=sys.stderr, flush=True)
    else:
        time.sleep(2)
