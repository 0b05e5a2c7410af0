"""Requests to stop, from whoever makes them, turned into one agreed stop at a step boundary."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, TracebackType

import psutil
import torch
import torch.distributed as dist

SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP}
STOP_FILE, LAUNCHER_GONE = 1000, 1001  # besides numbers of signals
REASONS = {STOP_FILE: "STOP file", LAUNCHER_GONE: "launcher gone"} | {s: s.name for s in SIGNALS}
POLL_S = 0.5
INTERRUPTED = 128 + signal.SIGINT
DEEPSPEED_LAUNCHER = "deepspeed.launcher.launch"


class StopRequested(Exception):  # noqa: N818  # a request, not an error
    """Some rank was asked to stop, and all know it; says by what."""


class Stops:
    """Notes signals, a STOP file in the run folder, and a launcher that is gone.

    The signals are SIGTERM, SIGINT, SIGUSR1 and, unless it is ignored from the start (nohup), the
    SIGHUP of a terminal that is closed. A thread of its own takes notice, so that it works while
    the main thread waits for data or for other ranks; a second SIGINT ends the process at once. To
    be entered by the main thread.

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
        self.stop_file, self.on_early_stop = run_dir / "STOP", on_early_stop
        self.on_second_interrupt = on_second_interrupt
        self._wait_for_check = False
        self._asked = 0  # why this rank was
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

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
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
        if dist.get_rank() == 0 and not self._asked and self.stop_file.exists():
            self._asked = STOP_FILE
        if code := self._largest_of_all(device):
            raise StopRequested(REASONS[code])

    def _largest_of_all(self, device: torch.device) -> int:
        # On a GPU the answer is that of the call before: waiting for this one would keep the
        # host from running ahead.
        if dist.get_world_size() == 1:
            return self._asked
        code = torch.full((), self._asked, device=device)  # torch.tensor would wait for the GPU
        dist.all_reduce(code, dist.ReduceOp.MAX)  # all ranks
        if device.type == "cpu":
            return int(code)
        answer, event = torch.empty_like(code, device="cpu", pin_memory=True), torch.cuda.Event()
        answer.copy_(code, non_blocking=True)
        event.record()
        earlier, self._earlier = self._earlier, (answer, event)
        if not earlier:
            return 0
        earlier[1].synchronize()
        return int(earlier[0])

    def _watch(self) -> None:
        while not self._closing.is_set():
            readable, _, _ = select.select([self._read_fd], [], [], POLL_S)
            for number in os.read(self._read_fd, 64) if readable else b"":
                if number in SIGNALS:
                    self._asked = self._asked or number
                    self._interrupts += number == signal.SIGINT
            if self._interrupts > 1:
                try:
                    self.on_second_interrupt()
                finally:
                    os._exit(INTERRUPTED)
            if not all(map(is_alive, self._launchers)):
                self._asked = self._asked or LAUNCHER_GONE
            if self._asked and not self._wait_for_check:
                self.on_early_stop(REASONS[self._asked])


def _leave_to_thread(number: int, frame: FrameType | None) -> None:
    """Do nothing: the number is in the pipe that the thread reads."""


def _watched_launchers() -> list[psutil.Process]:
    """Return the launcher of this rank, and that of DeepSpeed's launcher, which outlives it."""
    if "RANK" not in os.environ:
        return []
    try:
        above = psutil.Process().parents()
        is_deepspeeds = any(DEEPSPEED_LAUNCHER in part for part in above[0].cmdline())
    except (psutil.Error, IndexError):
        return []  # the launcher has just gone: then a signal comes
    return [process for process in above[: 1 + is_deepspeeds] if process.pid > 1]


def is_alive(process: psutil.Process) -> bool:
    """Return whether a process runs, and is not a later one of its number."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
