"""Ranks of a command as forks of one process that has imported everything: a run in seconds.

What a kill leaves is the same as with a launcher; that nobody survives one is shown elsewhere,
through the launchers themselves.
"""

from __future__ import annotations

import importlib
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

IMPORTS = ("deepspeed", "torch.utils.tensorboard", "checkpoint.consolidate", "checkpoint.resuming",
           "data.loader", "eval.packing", "eval.sample", "eval.val_loss", "training.engine",
           "training.health", "training.stops", "train")  # fmt: skip
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
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        self.statuses: dict[int, int] = {}  # by rank, of those that have ended
        self.pids = []
        for rank in range(n_ranks):
            pid = os.fork()
            if not pid:
                _become_rank(rank, n_ranks, port, log)
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

    def wait(self, timeout_s: float) -> float | None:
        """Return after how many seconds all had ended; None: some had to be killed."""
        started = time.monotonic()
        while not self.poll():
            if time.monotonic() - started > timeout_s:
                self.kill(range(len(self.pids)))
                while not self.poll():
                    time.sleep(0.01)
                return None
            time.sleep(0.01)
        return time.monotonic() - started

    def kill(self, ranks: range | list[int], number: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal to those of the ranks that still run."""
        for rank in ranks:
            if rank not in self.statuses:
                os.kill(self.pids[rank], number)


def _become_rank(rank: int, n_ranks: int, port: int, log: Path) -> None:
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": n_ranks, "LOCAL_WORLD_SIZE": n_ranks}
    os.environ |= {name: str(number) for name, number in numbers.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
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
