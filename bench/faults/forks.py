"""Fork the ranks of a command from a process that has imported everything: a run takes seconds.

What a kill leaves is the same as with a launcher. That no process survives one is shown elsewhere,
through the launchers themselves.
"""

from __future__ import annotations

import importlib
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from bench.processes import free_port, rank_variables, wait_until

IMPORTS = (
    "deepspeed",
    "torch.utils.tensorboard",
    "checkpoint.consolidate",
    "checkpoint.resuming",
    "data.loader",
    "eval.packing",
    "eval.sample",
    "eval.val_loss",
    "training.engine",
    "training.health",
    "training.stops",
    "train",
)
KILLED = -signal.SIGKILL


def import_everything() -> None:
    """Import what a run imports, without starting a thread or touching a tensor."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    for name in IMPORTS:
        importlib.import_module(name)


class Run:
    """Some ranks of a command on this machine.

    Args:
        argv: Of the command.
        n_ranks: Processes.
        log: File for what they print.
        sabotage: Called with the rank in each process, before it begins.
        module: Of the command; its main is run.
    """

    def __init__(
        self,
        argv: list[str],
        n_ranks: int,
        log: Path,
        sabotage: Callable[[int], None] = lambda rank: None,
        module: str = "train",
    ) -> None:
        port = free_port()
        self.statuses: dict[int, int] = {}  # by rank, of those that have ended
        self.pids = []
        for rank in range(n_ranks):
            pid = os.fork()
            if not pid:
                os.environ |= rank_variables(rank, n_ranks, port)
                _redirect_output(log)
                sabotage(rank)
                _run(module, argv)
            self.pids.append(pid)

    def poll(self) -> bool:
        """Return whether all have ended."""
        for rank, pid in enumerate(self.pids):
            if rank not in self.statuses:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    self.statuses[rank] = os.waitstatus_to_exitcode(status)
        return len(self.statuses) == len(self.pids)

    def wait_until(self, condition: Callable[[], object], timeout_s: float = math.inf) -> bool:
        """Return whether a condition comes to hold in time, while a rank runs."""
        wait_until(lambda: condition() or self.poll(), timeout_s)
        return bool(condition())

    def wait(self, timeout_s: float) -> float | None:
        """Return after how many seconds all had ended; None: some had to be killed."""
        started = time.monotonic()
        if wait_until(self.poll, timeout_s):
            return time.monotonic() - started
        self.kill(range(len(self.pids)))
        wait_until(self.poll, math.inf)
        return None

    def kill(self, ranks: range | list[int], number: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal to those of the ranks that still run."""
        for rank in ranks:
            if rank not in self.statuses:
                os.kill(self.pids[rank], number)


def _redirect_output(log: Path) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)


def _run(module: str, argv: list[str]) -> None:
    status = 1
    try:
        status = importlib.import_module(module).main(argv)
    except SystemExit as error:
        status = int(error.code or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
