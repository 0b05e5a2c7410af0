"""The ranks of a run find each other, or say who is missing."""

from __future__ import annotations

import datetime
import os
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
    """
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


def _open_store(ranks: Ranks, timeout: datetime.timedelta) -> Store:
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # torchrun keeps it
        store, _, _ = next(rendezvous("env://", ranks.rank, ranks.world_size, timeout=timeout))
        # The same store after a restart: what the ranks before left in it must not be found.
        return PrefixStore(f"attempt {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return TCPStore(host, port, ranks.world_size, ranks.is_main, timeout, wait_for_workers=False)
