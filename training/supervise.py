"""Run the loop under timeouts and stop requests; record the outcome in run_status.json."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING

from checkpoint.run_folder import write_status
from errors import error_line, exit_status_of
from exit_status import BAD_INPUT, FINISHED, HUNG, INTERRUPTED, PREEMPTED
from training.broken_pipes import STDERR
from training.run import Run
from training.watchdog import Watchdog, parse_timeouts

if TYPE_CHECKING:
    from training.stops import Stops

# Of the ways in which `train` returns.
EXIT_STATUSES = {"finished": FINISHED, "preempted": PREEMPTED, "diverged": HUNG}


def supervise(run: Run, train: Callable[[Watchdog, Stops], tuple[str, str]]) -> int:
    """Train with a timeout per phase and stop requests honoured (all ranks).

    Args:
        run: Its folder is locked.
        train: Returns how it ended, a key of EXIT_STATUSES, and why.

    Returns:
        The exit status.
    """
    from training.stops import Stops

    run_dir, ranks = run.config.run_dir, run.ranks
    without = ", without --resume none," if run.config.resume == "none" else ""
    goes_on = f"The same command{without} goes on."
    faulthandler.enable(STDERR)  # a stack also of what ends a process at once, as SIGBUS does

    def on_expiry(line: str) -> None:
        print(f"error: rank {ranks.rank}: {line}", file=sys.stderr, flush=True)
        write_status(run_dir, "hung", reason=line, exit_status=HUNG)

    def on_early_stop(reason: str) -> None:
        if ranks.is_main:
            write_status(run_dir, "preempted", reason=reason, exit_status=PREEMPTED)
            print(f"preempted: {reason}. {goes_on}", file=sys.stderr, flush=True)
        os._exit(_status_for_launcher("preempted"))  # nothing is lost: no step has been taken

    def on_second_interrupt() -> None:
        reason = "a second interrupt ended it at once"
        if ranks.is_main:
            write_status(run_dir, "failed", reason=reason, exit_status=INTERRUPTED, starts=[])

    stacks = run_dir / "stacks" / f"rank_{ranks.rank:05d}.txt"
    watchdog = Watchdog(parse_timeouts(run.config.timeouts), stacks, on_expiry)
    try:
        minutes = run.config.checkpoint_minutes
        with Stops(run_dir, on_early_stop, on_second_interrupt, minutes) as stops:
            status, reason = train(watchdog, stops)
    finally:
        watchdog.stop()
    if ranks.is_main:
        stops.stop_file.unlink(missing_ok=True)  # the request was met
        # The starts of a run that diverged still count as restarts, which are limited.
        more = {} if status == "diverged" else {"starts": []}
        write_status(run_dir, status, reason=reason, exit_status=EXIT_STATUSES[status], **more)
        begin = f"error: {run_dir}" if status == "diverged" else status
        end = f". {goes_on}" if status == "preempted" else ""
        print(f"{begin}: {reason}{end}", file=sys.stderr, flush=True)
    return _status_for_launcher(status)


def _status_for_launcher(status: str) -> int:
    # torchrun starts again whatever does not end with 0, and whoever asks for a stop means it.
    n_restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    max_restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))
    if status == "preempted" and n_restarts < max_restarts:
        return FINISHED
    return EXIT_STATUSES[status]


def report(run: Run, error: Exception) -> int:
    """Print in one line what ended the run; return the exit status."""
    line = error_line(error)
    exit_status = exit_status_of(error)
    if run.ranks.is_main:
        # Needs a human: does not count as a restart.
        more = {"starts": []} if exit_status == BAD_INPUT else {}
        with contextlib.suppress(OSError):  # the disk may be what failed
            write_status(run.config.run_dir, "failed", reason=line, exit_status=exit_status, **more)
    with contextlib.suppress(OSError):  # also stderr may be what failed
        if run.config.debug:
            traceback.print_exc()
        print(f"error: rank {run.ranks.rank}: {line}", file=sys.stderr, flush=True)
    return exit_status
