"""End a rank whose phase exceeds its timeout, and write the stacks of its threads."""

import faulthandler
import os
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path

from errors import BadInput
from exit_status import HUNG
from training.broken_pipes import STDERR

TIMEOUTS_S = {"start": 1800, "step": 1800, "eval": 7200, "save": 3600}
GRACE_S = 20  # for the thread; then C code, which needs no interpreter, ends the process
POLL_S = 1


def parse_timeouts(text: str) -> dict[str, int]:
    """Return the seconds of each phase: TIMEOUTS_S, with some replaced, as `step=600,eval=3600`.

    Raises:
        BadInput: Not of that form, or an unknown phase.
    """
    timeouts = dict(TIMEOUTS_S)
    for part in filter(None, text.split(",")):
        match = re.fullmatch(r"([a-z]+)=([0-9]+)", part)
        if not match or match[1] not in TIMEOUTS_S or not int(match[2]):
            remedy = f"give phases of {', '.join(TIMEOUTS_S)}: e.g. step=600,eval=3600"
            raise BadInput(f"--timeouts {text}", "must be PHASE=SECONDS,...", remedy)
        timeouts[match[1]] = int(match[2])
    return timeouts


def group_timeout_s(text: str) -> int:
    """Return when a collective gives up: after every phase's timeout, whose stacks say more."""
    return max(parse_timeouts(text).values()) + 2 * GRACE_S


class Watchdog:
    """Ends this process with status HUNG if a phase exceeds its timeout; begins with "start".

    Args:
        timeouts_s: Of each phase.
        stacks: File to which the stacks of all threads are added.
        on_expiry: Called with one line about it, before the end.
    """

    def __init__(
        self, timeouts_s: dict[str, int], stacks: Path, on_expiry: Callable[[str], None]
    ) -> None:
        self.timeouts_s, self.stacks, self.on_expiry = timeouts_s, stacks, on_expiry
        self._stopped = threading.Event()
        self.phase("start")
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def phase(self, name: str, times: int = 1) -> None:
        """Begin a phase, which may last `times` its timeout."""
        seconds = times * self.timeouts_s[name]
        self._current = name, time.monotonic() + seconds
        # Also works where no Python thread runs: in C code that keeps the interpreter's lock.
        faulthandler.dump_traceback_later(seconds + GRACE_S, exit=True, file=STDERR)

    def stop(self) -> None:
        """Watch no longer."""
        self._stopped.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        while not self._stopped.wait(max(0, min(self._left_s(), POLL_S))):
            if self._left_s() <= 0:
                self._expire()

    def _left_s(self) -> float:
        return self._current[1] - time.monotonic()

    def _expire(self) -> None:
        phase = self._current[0]
        limit_s = self.timeouts_s[phase]
        line = (
            f"{phase}: not done after {limit_s} s; stacks are in {self.stacks}. "
            f"Fix: for more time, --timeouts {phase}={2 * limit_s}"
        )
        try:
            self.stacks.parent.mkdir(parents=True, exist_ok=True)
            with self.stacks.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
            self.on_expiry(line)
        finally:
            os._exit(HUNG)
