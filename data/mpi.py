"""Find the processes that one MPI launcher or srun started, and connect them."""

import os
import re
import sys
from collections.abc import Callable
from types import TracebackType
from typing import Any, NamedTuple

from errors import BadInput

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
# Older Slurms have only these; srun gives each task those of its step.
OLDER_NAMES = {
    "SLURM_STEP_NUM_TASKS": ("SLURM_NTASKS", "SLURM_NPROCS"),
    "SLURM_STEP_TASKS_PER_NODE": ("SLURM_TASKS_PER_NODE",),
}
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

    Raises:
        BadInput: A variable is not a number, or several processes were started and do not know
            their rank; names it.
    """
    # mpi4py would know too, but importing it starts MPI.
    incomplete: list[str] = []
    is_single = False
    for launcher, names in LAUNCHERS.items():
        # Batch scripts and shells have some of Slurm's variables too: only a step has ranks.
        if launcher == "Slurm" and not _is_in_slurm_step():
            continue
        names = tuple(map(_given_name, names))
        given = {name: read_number(name) for name in names[:3] if name in os.environ}
        if launcher == "Slurm" and names[3] in os.environ:
            given.setdefault(names[2], sum(_slurm_task_counts(names[3])))
        missing = [name for name in names if name not in os.environ and name not in given]
        if given.get(names[2]) == 1 and not given.get(names[0]):
            is_single = True
        elif given and missing:
            # Perhaps another launcher, whose names are partly the same, has set all of its own.
            incomplete = incomplete or missing
        elif given:
            local_size = (_slurm_local_size if launcher == "Slurm" else read_number)(names[3])
            rank, local_rank, size = given.values()
            return Tasks(launcher, rank, local_rank, size, local_size)
    if "PMIX_RANK" in os.environ and not is_single and not incomplete:
        incomplete = ["a number of processes beside PMIX_RANK"]
    if incomplete:
        what = "not set, but a launcher started several processes"
        remedy = f"start train.py with torchrun or {BY_HAND}; data/prepare.py with mpirun or srun"
        raise BadInput(", ".join(incomplete), what, remedy)
    return None


def read_number(name: str) -> int:
    """Return a variable of the environment that is a number.

    Raises:
        BadInput: It is not; names it.
    """
    value = os.environ.get(name, "not set")
    if not re.fullmatch(r"[0-9]+", value):
        raise BadInput(name, f"is {value!r}, not a number", "give one, or unset it")
    return int(value)


def _given_name(name: str) -> str:
    """Return the older name of a variable of Slurm where only that is set; else the name."""
    names = (name, *OLDER_NAMES.get(name, ()))
    return next((each for each in names if each in os.environ), name)


def _is_in_slurm_step() -> bool:
    return "SLURM_STEP_ID" in os.environ and read_number("SLURM_STEP_ID") < FIRST_SPECIAL_STEP


def _slurm_task_counts(name: str) -> list[int]:
    """Return the tasks of each machine, of a list such as "2(x2),1"."""
    listed = re.findall(r"(?:^|,)([0-9]+)(?:\(x([0-9]+)\))?(?=,|$)", os.environ[name])
    counts: list[int] = []
    for count, times in listed:
        counts += [int(count)] * int(times or 1)
    return counts


def _slurm_local_size(name: str) -> int:
    """Return the tasks of this machine."""
    counts = _slurm_task_counts(name)
    node = read_number("SLURM_NODEID") if len(counts) > 1 else 0
    if node >= len(counts):
        raise BadInput(name, f"{os.environ[name]!r} has no node {node}", BY_HAND)
    return counts[node]


class Alone:
    """A communicator of one process, with the method names of mpi4py."""

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
        BadInput: What rank 0 has raised, on all ranks.
    """
    result = None
    if comm.rank == 0:
        try:
            result = work()
        except BadInput as error:
            result = error
    result = comm.bcast(result)  # all ranks
    if isinstance(result, BadInput):
        raise result
    return result


def connect() -> Any:
    """Return MPI's communicator where a launcher started several processes, else `Alone`.

    Raises:
        BadInput: No mpi4py, or for another MPI; variables are missing, or they are torchrun's.
    """
    tasks = find_tasks()
    if not tasks:
        if os.environ.get("RANK", "0") != "0" or os.environ.get("WORLD_SIZE", "1") != "1":
            what = "set, but this program's ranks are MPI's, not torchrun's or deepspeed's"
            remedy = "start it with mpirun or srun, or alone without these variables"
            raise BadInput("RANK, WORLD_SIZE", what, remedy)
        return Alone()
    mpi = start_mpi(tasks)

    # A rank that fails alone would leave the others waiting for ever in their next collective.
    def abort(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        sys.__excepthook__(kind, error, trace)
        mpi.COMM_WORLD.Abort(1)

    sys.excepthook = abort
    return mpi.COMM_WORLD


def start_mpi(tasks: Tasks) -> Any:
    """Return mpi4py's MPI, which knows all processes that the launcher has started (all ranks).

    Raises:
        BadInput: There is no mpi4py or no MPI library, or it is another launcher's.
    """
    started = f"started {tasks.size} processes"
    without = "for train.py it is enough to set MASTER_ADDR and MASTER_PORT on every machine"
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        what = f"{started}, and there is no mpi4py ({error})"
        remedy = f"pip install -c constraints.txt -e '.[mpi]', and an MPI library; {without}"
        raise BadInput(tasks.launcher, what, remedy) from error
    if MPI.COMM_WORLD.size != tasks.size:
        what = f"{started}, but mpi4py sees {MPI.COMM_WORLD.size}"
        remedy = f"use the mpirun of mpi4py's library (Slurm: srun --mpi=pmix); {without}"
        raise BadInput(tasks.launcher, what, remedy)
    return MPI
