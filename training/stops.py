"""Turn requests to stop, on any rank, into one stop of all ranks at a step boundary."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import psutil
import torch
import torch.distributed as dist

from exit_status import INTERRUPTED

SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP}
# Reasons beside the numbers of signals: all ranks agree on the largest.
STOP_FILE = 1000
LAUNCHER_GONE = 1001
REASONS = {STOP_FILE: "STOP file", LAUNCHER_GONE: "launcher gone"} | {s: s.name for s in SIGNALS}
POLL_S = 0.5
DEEPSPEED_LAUNCHER = "deepspeed.launcher.launch"


class StopRequested(Exception):  # noqa: N818  # a request, not an error
    """Some rank was asked to stop, and all ranks know it; the text is the reason."""


class Stops:
    """Watches for signals, a STOP file in the run folder, and a launcher that has ended.

    The signals are SIGTERM, SIGINT, SIGUSR1 and, unless it is ignored from the start (nohup), the
    SIGHUP of a terminal that is closed. A thread reads them, so that this works while the main
    thread waits for data or for other ranks; a second SIGINT ends the process at once. The main
    thread must enter it: Python lets no other set signal handlers.

    Args:
        run_dir: Where a STOP file may appear.
        on_early_stop: Called from the thread with the reason, for requests outside
            `at_step_boundaries`: there is nothing to save, and `check` may be far away.
        on_second_interrupt: Called from the thread before the process ends at once.
    """

    def __init__(
        self,
        run_dir: Path,
        on_early_stop: Callable[[str], None],
        on_second_interrupt: Callable[[], None],
    ) -> None:
        self.stop_file = run_dir / "STOP"
        self.on_early_stop = on_early_stop
        self.on_second_interrupt = on_second_interrupt
        self._wait_for_check = False
        self._reason = 0  # why this rank was asked to stop: a key of REASONS, or 0
        self._interrupts = 0
        self._earlier: tuple[torch.Tensor, torch.cuda.Event] | None = None
        self._launchers = _watched_launchers()
        self._closing = threading.Event()

    def __enter__(self) -> Stops:
        self._read_fd, self._write_fd = os.pipe()
        os.set_blocking(self._write_fd, False)
        signals = set(SIGNALS)
        if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
            signals.remove(signal.SIGHUP)
        self._old_handlers = {s: signal.signal(s, _leave_to_thread) for s in signals}
        self._old_fd = signal.set_wakeup_fd(self._write_fd, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch, name="stops", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._old_fd)
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)
        self._closing.set()
        os.write(self._write_fd, b"\0")
        self._thread.join()
        os.close(self._read_fd)
        os.close(self._write_fd)

    @contextlib.contextmanager
    def at_step_boundaries(self) -> Iterator[None]:
        """Leave requests to `check`, which the training loop calls before each step."""
        self._wait_for_check = True
        yield

    def check(self, device: torch.device) -> None:
        """Raise if any rank was asked to stop since the start (all ranks).

        Raises:
            StopRequested: On every rank at the same call.
        """
        if dist.get_rank() == 0 and not self._reason and self.stop_file.exists():
            self._reason = STOP_FILE
        reason = self._largest_of_all(device)
        if reason:
            raise StopRequested(REASONS[reason])

    def _largest_of_all(self, device: torch.device) -> int:
        if dist.get_world_size() == 1:
            return self._reason
        reason = torch.full((), self._reason, device=device)  # torch.tensor would wait for the GPU
        dist.all_reduce(reason, dist.ReduceOp.MAX)  # all ranks
        if device.type == "cpu":
            return int(reason)
        # On a GPU the answer is that of the call before: waiting for this one would keep the
        # host from running ahead.
        answer = torch.empty_like(reason, device="cpu", pin_memory=True)
        event = torch.cuda.Event()
        answer.copy_(reason, non_blocking=True)
        event.record()
        earlier, self._earlier = self._earlier, (answer, event)
        if not earlier:
            return 0
        earlier_answer, earlier_event = earlier
        earlier_event.synchronize()
        return int(earlier_answer)

    def _watch(self) -> None:
        while not self._closing.is_set():
            readable, _, _ = select.select([self._read_fd], [], [], POLL_S)
            received = os.read(self._read_fd, 64) if readable else b""  # a byte for each signal
            for number in received:
                if number in SIGNALS:
                    self._reason = self._reason or number
            self._interrupts += received.count(signal.SIGINT)
            if self._interrupts > 1:
                try:
                    self.on_second_interrupt()
                finally:
                    os._exit(INTERRUPTED)
            if not all(map(is_alive, self._launchers)):
                self._reason = self._reason or LAUNCHER_GONE
            if self._reason and not self._wait_for_check:
                self.on_early_stop(REASONS[self._reason])


def _leave_to_thread(number: int, frame: FrameType | None) -> None:
    """Do nothing: the number is in the pipe that the thread reads."""


def _watched_launchers() -> list[psutil.Process]:
    """Return the launcher of this rank, and DeepSpeed's runner, which outlives its launcher."""
    if "RANK" not in os.environ:
        return []
    try:
        launcher, *above = psutil.Process().parents()
        is_deepspeeds = any(DEEPSPEED_LAUNCHER in part for part in launcher.cmdline())
    except (psutil.Error, ValueError):
        return []  # the launcher has just ended: then a signal comes
    watched = [launcher, *above[:1]] if is_deepspeeds else [launcher]
    return [process for process in watched if process.pid > 1]


def is_alive(process: psutil.Process) -> bool:
    """Return whether a process runs, and is not a later one with its number."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
