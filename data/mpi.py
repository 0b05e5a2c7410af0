"""The processes that one MPI launcher or srun started, and how they talk to each other."""

import os
import re
import sys
from collections.abc import Callable
from types import TracebackType
from typing import Any, NamedTuple

# Rank, local rank, world size, local world size.
LAUNCHERS = {
    "Open MPI": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_SIZE",
                 "OMPI_COMM_WORLD_LOCAL_SIZE"),
    "MVAPICH": ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_SIZE",
                "MV2_COMM_WORLD_LOCAL_SIZE"),
    "MPICH or Intel MPI": ("PMI_RANK", "MPI_LOCALRANKID", "PMI_SIZE", "MPI_LOCALNRANKS"),
    "Cray PALS": ("PMI_RANK", "PMI_LOCAL_RANK", "PMI_SIZE", "PMI_LOCAL_SIZE"),
    "Slurm": ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_TASKS_PER_NODE"),
}  # fmt: skip
BY_HAND = "set RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT for each"
FIRST_SPECIAL_STEP = 0xFFFFFF00  # of Slurm: batch scripts, interactive shells


class Tasks(NamedTuple):
    """Rank and world size of this process, as the variables of a launcher give them."""

    launcher: str
    rank: int
    local_rank: int
    size: int
    local_size: int


def find_tasks() -> Tasks | None:
    """Return the tasks of an MPI launcher or srun, from the environment; None: there is none.

    Asking mpi4py itself would start MPI. Slurm's variables count within a step of several tasks
    only: batch scripts and shells have some of them too.

    Raises:
        ValueError: A variable is not a number, or several processes were started and do not know
            their place; names it.
    """
    missing: list[str] = []
    is_single = False
    for launcher, names in LAUNCHERS.items():
        if launcher == "Slurm" and not _is_in_slurm_step():
            continue
        given = {name: read_number(name) for name in names[:3] if name in os.environ}
        if given.get(names[2]) == 1 and not given.get(names[0]):
            is_single = True
        elif given:
            lacking = [name for name in names if name not in os.environ]
            if not lacking:
                local_size = _slurm_local_size() if launcher == "Slurm" else read_number(names[3])
                rank, local_rank, size = given.values()
                return Tasks(launcher, rank, local_rank, size, local_size)
            missing = missing or lacking
    if "PMIX_RANK" in os.environ and not is_single:
        missing = missing or ["a number of processes beside PMIX_RANK"]
    if missing:
        raise ValueError(
            f"{', '.join(missing)}: not set, but a launcher started several processes. Fix: start "
            f"train.py with torchrun or {BY_HAND}; data/prepare.py with Open MPI's mpirun or srun"
        )
    return None


def read_number(name: str) -> int:
    """Return a variable of the environment that is a number.

    Raises:
        ValueError: It is not; names it.
    """
    value = os.environ.get(name, "not set")
    if not re.fullmatch(r"[0-9]+", value):
        raise ValueError(f"{name}: is {value!r}, not a number. Fix: give one, or unset it")
    return int(value)


def _is_in_slurm_step() -> bool:
    return "SLURM_STEP_ID" in os.environ and read_number("SLURM_STEP_ID") < FIRST_SPECIAL_STEP


def _slurm_local_size() -> int:
    """Return the tasks of this machine, of a list as in "2(x2),1"."""
    text = os.environ["SLURM_STEP_TASKS_PER_NODE"]
    listed = re.findall(r"(?:^|,)([0-9]+)(?:\(x([0-9]+)\))?(?=,|$)", text)
    counts = [int(count) for count, times in listed for _ in range(int(times or 1))]
    node = read_number("SLURM_NODEID") if len(counts) > 1 else 0
    if node >= len(counts):
        raise ValueError(f"SLURM_STEP_TASKS_PER_NODE: {text!r} has no node {node}. Fix: {BY_HAND}")
    return counts[node]


class Alone:
    """A communicator of one process, with mpi4py's names."""

    rank, size = 0, 1

    def allgather(self, value: Any) -> list[Any]:
        """Return the value of every rank."""
        return [value]

    def bcast(self, value: Any) -> Any:
        """Return the value of rank 0."""
        return value

    def barrier(self) -> None:
        """Wait for nobody."""


def on_first_rank(comm: Any, work: Callable[[], Any]) -> Any:
    """Do something on rank 0 and return its result on all ranks; they wait for it.

    Raises:
        ValueError: What rank 0 has raised, on all ranks.
    """
    result = None
    if comm.rank == 0:
        try:
            result = work()
        except ValueError as error:
            result = ValueError(str(error))
    result = comm.bcast(result)  # all ranks
    if isinstance(result, ValueError):
        raise result
    return result


def connect() -> Any:
    """Return MPI's communicator where a launcher started several processes, else `Alone`.

    Raises:
        ValueError: No mpi4py, or for another MPI; variables are missing, or they are torchrun's.
    """
    tasks = find_tasks()
    if not tasks:
        if os.environ.get("RANK", "0") != "0" or os.environ.get("WORLD_SIZE", "1") != "1":
            raise ValueError(
                "RANK, WORLD_SIZE: set, but this program's ranks are MPI's, not torchrun's or "
                "deepspeed's. Fix: start it with mpirun or srun, or alone without these variables"
            )
        return Alone()
    mpi = start_mpi(tasks)

    def abort(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        sys.__excepthook__(kind, error, trace)
        mpi.COMM_WORLD.Abort(1)

    sys.excepthook = abort  # a rank that dies alone would leave the others waiting
    return mpi.COMM_WORLD


def start_mpi(tasks: Tasks) -> Any:
    """Return mpi4py's MPI, which knows all processes that the launcher has started (all ranks).

    Raises:
        ValueError: There is no mpi4py or no library, or it is another launcher's.
    """
    started = f"{tasks.launcher}: started {tasks.size} processes"
    alone = "; for train.py MASTER_ADDR and MASTER_PORT on every machine will do"
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise ValueError(
            f"{started}, and there is no mpi4py ({error}). Fix: pip install -c constraints.txt "
            f"-e '.[mpi]', and an MPI library{alone}"
        ) from error
    if MPI.COMM_WORLD.size != tasks.size:
        raise ValueError(
            f"{started}, mpi4py sees {MPI.COMM_WORLD.size}. Fix: start them with the mpirun of "
            f"mpi4py's library (Slurm: srun --mpi=pmix){alone}"
        )
    return MPI
