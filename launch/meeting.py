"""The ranks of a run find each other, or say who is missing."""

from __future__ import annotations

import datetime
import os
import socket
import subprocess
import time

from torch.distributed import PrefixStore, Store, TCPStore  # pyright: ignore[reportPrivateImportUsage]  # documented
from torch.distributed.rendezvous import rendezvous

from launch.ranks import Ranks

NAMED = 8  # of missing ranks
POLL_S = 0.2


def meet(ranks: Ranks, timeout_s: float) -> Store:
    """Wait for every rank at MASTER_ADDR:MASTER_PORT (all ranks) and return their common store.

    Raises:
        OSError: Not all came in time; rank 0 names those that did not.
        ValueError: mpirun started them, and there is no mpi4py.
    """
    _name_address(ranks)
    timeout = datetime.timedelta(seconds=timeout_s)
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    remedy = f"start it, or give it more time with --timeouts start={2 * round(timeout_s)}"
    deadline = time.monotonic() + timeout_s
    try:
        store = _open_store(ranks, timeout)
        store.set(f"came/{ranks.rank}", "")
        if not ranks.is_main:
            store.wait(["all came"], timeout)
            return store
    except RuntimeError as error:  # c10d's errors of store and network
        raise OSError(
            f"rank 0 at {address} did not gather all ranks within {timeout_s:.0f} s. Fix: {remedy}"
        ) from error
    missing = [f"came/{rank}" for rank in range(ranks.world_size)]
    while missing := [key for key in missing if not store.check([key])]:
        if time.monotonic() > deadline:
            names = ", ".join(key.removeprefix("came/") for key in missing[:NAMED])
            more = f" and {len(missing) - NAMED} more" if len(missing) > NAMED else ""
            raise OSError(f"rank {names}{more} never came to {address}. Fix: {remedy}")
        time.sleep(POLL_S)
    store.set("all came", "")
    return store


def _name_address(ranks: Ranks) -> None:
    """Set MASTER_ADDR and MASTER_PORT where the launcher, mpirun, did not (all ranks).

    Raises:
        ValueError: There is no mpi4py, which brings them from rank 0.
    """
    if "MASTER_ADDR" in os.environ and "MASTER_PORT" in os.environ:
        return
    try:
        import mpi4py

        mpi4py.rc.initialize = False
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise ValueError(
            f"mpirun: names no address, and no mpi4py ({error}). Fix: pip install -c "
            "constraints.txt -e '.[mpi]', or set MASTER_ADDR and MASTER_PORT on every machine"
        ) from error
    found = None
    if ranks.is_main:
        addresses = subprocess.run(["hostname", "-I"], capture_output=True, text=True).stdout
        found = {"MASTER_ADDR": (addresses.split() or ["127.0.0.1"])[0]}
        found["MASTER_PORT"] = str(free_port())
        found |= {name: os.environ[name] for name in found if name in os.environ}
    MPI.Init()  # all ranks
    os.environ |= MPI.COMM_WORLD.bcast(found)
    MPI.Finalize()  # while nobody hangs: at the end of a run that has failed it would


def _open_store(ranks: Ranks, timeout: datetime.timedelta) -> Store:
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # torchrun keeps it
        store, _, _ = next(rendezvous("env://", ranks.rank, ranks.world_size, timeout=timeout))
        # The same store after a restart: what the ranks before left in it must not be found.
        return PrefixStore(f"attempt {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return TCPStore(host, port, ranks.world_size, ranks.is_main, timeout, wait_for_workers=False)


def free_port() -> int:
    """Return a port on which nobody listens."""
    with socket.socket() as s:
        s.bind(("", 0))
        return s.getsockname()[1]
