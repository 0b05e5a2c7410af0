"""Around the loop: clocks, signals, and what is left in run_status.json however it ends."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING

from checkpoint.run_folder import write_status
from training.run import Run
from training.watchdog import HUNG, STDERR, Watchdog, parse_timeouts

if TYPE_CHECKING:
    from training.stops import Stops

FINISHED, FAILED, BAD_INPUT = 0, 1, 2  # exit statuses
STATUS = {"finished": FINISHED, "preempted": 75, "diverged": HUNG}  # of how a run ends by itself


def supervise(run: Run, train: Callable[[Watchdog, Stops], tuple[str, str]]) -> int:
    """Train with a clock for every phase and an ear for signals (all ranks).

    Args:
        run: Its folder is locked.
        train: Returns how it ended, a key of STATUS, and why.

    Returns:
        The exit status.
    """
    from training.stops import INTERRUPTED, Stops

    config, ranks = run.config, run.ranks
    faulthandler.enable(STDERR)  # a stack also of what ends a process at once, as SIGBUS does

    def on_expiry(line: str) -> None:
        print(f"error: rank {ranks.rank}: {line}", file=sys.stderr, flush=True)
        write_status(config.run_dir, "hung", reason=line, exit_status=HUNG)

    def on_early_stop(reason: str) -> None:
        if ranks.is_main:
            write_status(
                config.run_dir, "preempted", reason=reason, exit_status=STATUS["preempted"]
            )
        os._exit(_status_for_launcher("preempted"))  # nothing is lost: no step has been taken

    def on_second_interrupt() -> None:
        if ranks.is_main:
            reason = "a second interrupt ended it at once"
            write_status(
                config.run_dir, "failed", reason=reason, exit_status=INTERRUPTED, starts=[]
            )

    stacks = config.run_dir / "stacks" / f"rank_{ranks.rank:05d}.txt"
    watchdog = Watchdog(parse_timeouts(config.timeouts), stacks, on_expiry)
    try:
        with Stops(config.run_dir, on_early_stop, on_second_interrupt) as stops:
            status, reason = train(watchdog, stops)
    finally:
        watchdog.stop()
    if ranks.is_main:
        stops.stop_file.unlink(missing_ok=True)  # the request was met
        more = {"starts": []} if status != "diverged" else {}
        write_status(config.run_dir, status, reason=reason, exit_status=STATUS[status], **more)
        line = f"error: {config.run_dir}: " if status == "diverged" else f"{status}: "
        print(line + reason, file=sys.stderr, flush=True)
    return _status_for_launcher(status)


def _status_for_launcher(status: str) -> int:
    # torchrun starts again whatever does not end with 0, and whoever asks for a stop means it.
    count, limit = (int(os.environ.get(f"TORCHELASTIC_{name}", 0))
                    for name in ("RESTART_COUNT", "MAX_RESTARTS"))  # fmt: skip
    return FINISHED if status == "preempted" and count < limit else STATUS[status]


def error_line(error: Exception) -> str:
    """Return `file: what. Fix: remedy` of an error."""
    line = (str(error) or type(error).__name__).splitlines()[0]
    if isinstance(error, OSError) and error.errno:
        name = error.filename or "stdout or stderr"  # all other files have their names
        return f"{name}: {error.strerror}. Fix: mend that, then start again"
    if "Fix: " in line:
        return line
    return f"{type(error).__name__}: {line}. Fix: see the traceback, --debug"


def report(run: Run, error: Exception) -> int:
    """Say in one line what ended the run; return the exit status."""
    line = error_line(error)
    exit_status = BAD_INPUT if isinstance(error, ValueError) else FAILED
    if run.ranks.is_main:
        # To be mended by hand: no start that counts among the restarts.
        more = {"starts": []} if exit_status == BAD_INPUT else {}
        with contextlib.suppress(OSError):  # the disk may be what failed
            write_status(run.config.run_dir, "failed", reason=line, exit_status=exit_status, **more)
    with contextlib.suppress(OSError):  # also that of what is printed
        if run.config.debug:
            traceback.print_exc()
        print(f"error: rank {run.ranks.rank}: {line}", file=sys.stderr, flush=True)
    return exit_status
