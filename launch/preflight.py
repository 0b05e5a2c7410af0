"""Is this cluster fit to start? train.py's own command, with this file in its place.

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

from training.config import parse_flags
from training.ranks import leave, ranks_or_exit, say_once
from training.run import resolve_run
from training.supervise import BAD_INPUT, FAILED, FINISHED, error_line
from training.watchdog import parse_timeouts

if TYPE_CHECKING:  # it imports torch, for which --help does not wait
    from launch.checks.checklist import Outcome
    from launch.checks.compare import Facts

TIMEOUT_S = 120  # for each part of the survey, unless --timeouts gives another


def main(argv: list[str]) -> int:
    """Run the command line (all ranks); return the exit status, the same on all."""
    ranks = ranks_or_exit()
    try:
        run = resolve_run(parse_flags(argv, __doc__ or ""), ranks)
    except ValueError as error:  # every rank of a machine finds the same
        say_once(ranks, f"error: {error_line(error)}")
        return BAD_INPUT
    os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")  # else NCCL's time limit kills the rank
    from launch.checks.checklist import compare_all
    from launch.checks.survey import Survey, survey_all
    from training.rendezvous import meet, part

    is_given = "start=" in run.config.timeouts
    timeout_s = parse_timeouts(run.config.timeouts)["start"] if is_given else TIMEOUT_S
    try:
        survey = Survey(meet(ranks, timeout_s), ranks, timeout_s)
        with contextlib.suppress(TimeoutError):  # whose answer is missing is among the facts
            survey_all(run, survey)
        outcomes = compare_all(survey.facts)
        if ranks.is_main:
            print(format_checks(outcomes), file=sys.stderr, flush=True)
            print(json.dumps(checks_to_json(outcomes, survey.facts)), flush=True)
        part(survey.store, ranks, timeout_s)
    except (OSError, ValueError, RuntimeError) as error:  # the last c10d's, when rank 0 is gone
        print(f"error: {socket.gethostname()}: {error_line(error)}", file=sys.stderr, flush=True)
        return BAD_INPUT if isinstance(error, ValueError) else FAILED
    return FAILED if any(outcome.findings for outcome in outcomes) else FINISHED


def format_checks(outcomes: list[Outcome]) -> str:
    """Return a line for each check, and one for each finding."""
    lines = []
    for outcome in outcomes:
        result = "ok" if outcome.seen else "-"
        if outcome.findings:
            result = "UNFIT"
        lines.append(f"{outcome.check:<18} {result:<5}  {outcome.seen or 'not measured'}")
    for outcome in outcomes:
        lines += [f"error: {finding}" for finding in outcome.findings]
    return "\n".join(lines)


def checks_to_json(outcomes: list[Outcome], facts: list[Facts]) -> dict[str, object]:
    """Return what was found, and the facts of every rank, as JSON values in bytes and seconds."""
    findings = []
    for outcome in outcomes:
        findings += [asdict(finding) for finding in outcome.findings]
    seen = {outcome.check: outcome.seen for outcome in outcomes}
    return {"fit": not findings, "findings": findings, "seen": seen, "ranks": facts}


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
