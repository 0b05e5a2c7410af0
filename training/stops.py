"""Turn requests to stop, and the time for a checkpoint, into one decision of all ranks."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import psutil
import torch
import torch.distributed as dist

from exit_status import INTERRUPTED

SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP}
CHECKPOINT_DUE, LAUNCHER_GONE, STOP_FILE = "checkpoint due", "launcher gone", "STOP file"
# All ranks agree on the last of these that one of them has. Launchers send SIGTERM, or end,
# whatever they were sent themselves: every other signal says more.
REASONS = ["", CHECKPOINT_DUE, LAUNCHER_GONE, "SIGTERM", "SIGHUP", "SIGUSR1", "SIGINT", STOP_FILE]
POLL_S = 0.5
# DeepSpeed's launcher sends SIGTERM right after a Ctrl-C, other wrappers SIGINT once more, and the
# kernel delivers signals that wait together in any order: those that come within this time count as
# one request.
TOGETHER_S = 0.05
DEEPSPEED_LAUNCHER = "deepspeed.launcher.launch"


class StopRequested(Exception):  # noqa: N818  # a request, not an error
    """Some rank was asked to stop, and all ranks know it; the text is the reason."""


class Stops:
    """Watches for signals, a STOP file in the run folder, a launcher that has ended, and the time.

    The signals are SIGTERM, SIGINT, SIGUSR1 and, unless it is ignored from the start (nohup), the
    SIGHUP of a terminal that is closed. A thread reads them, so that this works while the main
    thread waits for data or for other ranks; a second SIGINT ends the process at once. The main
    thread must enter it: Python lets no other set signal handlers.

    Args:
        run_dir: Where a STOP file may appear.
        on_early_stop: Called from the thread with the reason, for requests outside
            `at_step_boundaries`: there is nothing to save, and `check` may be far away.
        on_second_interrupt: Called from the thread before the process ends at once.
        checkpoint_minutes: From one checkpoint to the next, by rank 0's clock; 0: none is due.

    Attributes:
        checkpoint_is_due: Whether that time has passed; the same on all ranks.
    """

    def __init__(
        self,
        run_dir: Path,
        on_early_stop: Callable[[str], None],
        on_second_interrupt: Callable[[], None],
        checkpoint_minutes: float = 0,
    ) -> None:
        self.stop_file = run_dir / "STOP"
        self.on_early_stop = on_early_stop
        self.on_second_interrupt = on_second_interrupt
        self.checkpoint_s = 60 * checkpoint_minutes or float("inf")
        self.restart_clock()
        self._wait_for_check = False
        self._reason = ""  # why this rank was asked to stop: one of REASONS
        self._is_told = False
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

    def restart_clock(self) -> None:
        """Count the time to the next checkpoint from now (all ranks)."""
        self.checkpoint_is_due = False
        self._due_s = time.monotonic() + self.checkpoint_s

    def check(self, device: torch.device) -> None:
        """Raise if any rank was asked to stop; find out if a checkpoint is due (all ranks).

        Raises:
            StopRequested: On every rank at the same call.
        """
        if dist.get_rank() == 0 and not self._reason and self.stop_file.exists():
            self._reason = STOP_FILE
        own = self._reason
        if dist.get_rank() == 0 and not own and time.monotonic() >= self._due_s:
            own = CHECKPOINT_DUE
            self._due_s = float("inf")  # sent once: on a GPU the answer comes with the next call
        reason = REASONS[self._largest_of_all(REASONS.index(own), device)]
        if reason == CHECKPOINT_DUE:  # stays so: an evaluation, which saves nothing, checks too
            self.checkpoint_is_due = True
        elif reason:
            self._tell(reason)
            raise StopRequested(reason)

    def _tell(self, reason: str) -> None:
        is_first, self._is_told = not self._is_told, True
        if is_first and dist.get_rank() == 0:
            again = "; a second SIGINT ends at once, without" if reason == "SIGINT" else ""
            print(f"{reason}: saving a checkpoint before the next step{again}", file=sys.stderr)

    def _largest_of_all(self, own: int, device: torch.device) -> int:
        if dist.get_world_size() == 1:
            return own
        reason = torch.full((), own, device=device)  # torch.tensor would wait for the GPU
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
            if readable:
                self._closing.wait(TOGETHER_S)
            received = os.read(self._read_fd, 64) if readable else b""  # a byte for each signal
            names = [s.name for s in SIGNALS if s in received]
            self._reason = self._reason or max(names, key=REASONS.index, default="")
            self._interrupts += signal.SIGINT in received
            if self._interrupts > 1:
                try:
                    self.on_second_interrupt()
                finally:
                    os._exit(INTERRUPTED)
            if not all(map(is_alive, self._launchers)):
                self._reason = self._reason or LAUNCHER_GONE
            if self._reason and not self._wait_for_check:
                self.on_early_stop(f"{self._reason} before the first step; nothing to save")
            elif self._reason and not self._is_told:
                # From another thread: printing may block, and this one must hear the next SIGINT.
                threading.Thread(target=self._tell, args=(self._reason,), daemon=True).start()


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
