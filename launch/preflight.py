"""Check every host before a run; name the bad one. train.py's command, with this file in its place.

python launch/preflight.py --model debug --data_dir DIR
deepspeed --hostfile hostfile launch/preflight.py --model gpt3-13b --data_dir DIR --run_dir DIR
torchrun --nproc_per_node 8 launch/preflight.py --model gpt2 --data_dir DIR

A table on stderr, every figure as one JSON line on stdout. Status: 0 fit, 1 not, 2 bad usage.
The flags below are the run's, and must be the same on all ranks; --timeouts start=SECONDS is how
long to wait for a rank (default here: 120).
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # run as a file: import from the repository root, exactly as train.py does
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from errors import BadInput, error_line, exit_status_of
from exit_status import FAILED, FINISHED
from training.config import parse_flags
from training.ranks import leave, ranks_or_exit, say_once
from training.run import resolve_run
from training.watchdog import parse_timeouts

if TYPE_CHECKING:  # it imports torch, for which --help does not wait
    from launch.checks.checklist import Outcome

TIMEOUT_S = 120  # for each part of the survey, unless --timeouts gives another


def main(argv: list[str]) -> int:
    """Run the command line (all ranks); return the exit status, the same on all."""
    ranks = ranks_or_exit()
    try:
        run = resolve_run(parse_flags(argv, __doc__ or ""), ranks)
    except (BadInput, OSError) as error:  # every rank of a machine finds the same
        say_once(ranks, f"error: {error_line(error)}")
        return exit_status_of(error)
    os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")  # else NCCL's time limit kills the rank
    from launch.checks.checklist import compare_all
    from launch.checks.survey import StopSurvey, Survey, survey_all
    from training.rendezvous import leave_together, rendezvous

    is_given = "start=" in run.config.timeouts
    timeout_s = parse_timeouts(run.config.timeouts)["start"] if is_given else TIMEOUT_S
    try:
        survey = Survey(rendezvous(ranks, timeout_s), ranks, timeout_s)
        with contextlib.suppress(StopSurvey):  # why is among the facts
            survey_all(run, survey)
        outcome = compare_all(survey.facts)
        if ranks.is_main:
            print(format_checks(outcome), file=sys.stderr, flush=True)
            result = {"fit": not outcome.findings, **asdict(outcome), "ranks": survey.facts}
            print(json.dumps(result), flush=True)
        leave_together(survey.store, ranks, timeout_s)
    except (OSError, ValueError, RuntimeError) as error:  # the last c10d's, when rank 0 is gone
        print(f"error: {socket.gethostname()}: {error_line(error)}", file=sys.stderr, flush=True)
        return exit_status_of(error)
    return FAILED if outcome.findings else FINISHED


def format_checks(outcome: Outcome) -> str:
    """Return a line for each check, and one for each finding."""
    unfit = {finding.check for finding in outcome.findings}
    lines = []
    for check, seen in outcome.seen.items():
        result = "ok" if seen else "-"
        if check in unfit:
            result = "UNFIT"
        lines.append(f"{check:<18} {result:<5}  {seen or 'not measured'}")
    lines += [f"error: {finding}" for finding in outcome.findings]
    return "\n".join(lines)


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
