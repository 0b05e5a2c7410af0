"""The processes that prepare data together: one alone, or the ranks of an MPI job."""

import os
import sys
from collections.abc import Callable
from types import TracebackType
from typing import Any

# Set by Open MPI, MPICH and its kin, PMIx, and Slurm's srun. Asking mpi4py itself starts MPI.
LAUNCHED = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK", "SLURM_STEP_NUM_TASKS")


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
    """Return MPI's communicator under an MPI launcher, else `Alone`.

    Raises:
        ValueError: A launcher started several processes, but mpi4py or its library is not there.
    """
    if not any(name in os.environ for name in LAUNCHED):
        return Alone()
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        n_processes = max(int(os.environ.get(name, 1)) for name in LAUNCHED if "RANK" not in name)
        if n_processes == 1:
            return Alone()
        raise ValueError(
            f"started as {n_processes} MPI processes without mpi4py ({error}). "
            "Fix: pip install -c constraints.txt -e '.[mpi]', and an MPI library"
        ) from error

    def abort(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        sys.__excepthook__(kind, error, trace)
        MPI.COMM_WORLD.Abort(1)

    sys.excepthook = abort  # a rank that dies alone would leave the others waiting
    return MPI.COMM_WORLD
