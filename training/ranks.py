"""Read the ranks of this process from its launcher; leave together with the others."""

import gc
import os
import sys
import time
from dataclasses import dataclass
from typing import NoReturn

from data.mpi import BY_HAND, find_tasks, read_number
from errors import BadInput
from exit_status import BAD_INPUT, FAILED

LAST_PORT = 2**16 - 1
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")  # torchrun's


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
        BadInput: Variables are missing, contradict each other, or are not numbers; names them.
    """
    tasks = find_tasks() if "RANK" not in os.environ else None
    if tasks:
        os.environ |= dict(zip(RANK_VARIABLES, map(str, tasks[1:]), strict=True))
    given = {name: read_number(name) for name in RANK_VARIABLES if name in os.environ}
    if not given or given == {"LOCAL_RANK": 0}:
        return Ranks()
    needed = ("RANK", "WORLD_SIZE") if given.get("WORLD_SIZE") == 1 else RANK_VARIABLES[:3]
    missing = [name for name in needed if name not in given]
    if missing:
        what = f"set without {', '.join(missing)}"
        raise BadInput(", ".join(given), what, f"{BY_HAND}, or unset all")
    sizes = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "WORLD_SIZE")  # torchrun's, deepspeed's, one machine
    n_local = read_number(next(name for name in sizes if name in os.environ))
    ranks = Ranks(given["RANK"], given.get("LOCAL_RANK", 0), given["WORLD_SIZE"], n_local)
    fits = ranks.rank < ranks.world_size and ranks.local_rank < n_local <= ranks.world_size
    if not fits:
        values = ", ".join(f"{name} {value}" for name, value in given.items())
        raise BadInput(values, "contradict each other", f"{BY_HAND}, or unset them")
    port = read_number("MASTER_PORT") if "MASTER_PORT" in os.environ else 0
    if port > LAST_PORT:
        raise BadInput(f"MASTER_PORT {port}", "out of range", f"give at most {LAST_PORT}")
    return ranks


def ranks_or_exit() -> Ranks:
    """Return `read_ranks`; where it raises, print its line and exit."""
    try:
        return read_ranks()
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(BAD_INPUT)


def leave(exit_status: int) -> NoReturn:
    """End this process; after a failure or bad input at once.

    Destroying NCCL's group waits for the other ranks of the machine, and these may wait for this
    one in a collective.
    """
    for stream in filter(None, (sys.stdout, sys.stderr)):  # None: closed from the start
        stream.flush()
    if exit_status in (FAILED, BAD_INPUT):
        os._exit(exit_status)
    distributed = sys.modules.get("torch.distributed")
    if distributed and distributed.is_initialized():
        distributed.destroy_process_group()
    # Else the interpreter searches all that was imported for garbage, for over a second.
    gc.freeze()
    sys.exit(exit_status)


def say_once(ranks: Ranks, line: str) -> None:
    """Print a line that every rank of this machine would print; the others wait for it.

    Launchers end all ranks when one ends: the one that prints ends first.
    """
    if ranks.local_rank == 0:
        print(line, file=sys.stderr, flush=True)
    else:
        time.sleep(2)
