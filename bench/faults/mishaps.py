"""Make faults other than a kill: full disks, hung or missing ranks, damaged files.

    python bench/faults/mishaps.py --folder runs/faults

Each fault comes to a run of two ranks at a step after its first checkpoint. The run must end in
time, with the status and the line that say what happened, and with whole checkpoints. Damaged files
must be named before anything is loaded. A case that the JSON holds is not tried again.
"""

from __future__ import annotations

import itertools
import os
import random
import re
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

if not __package__:  # run as a file: import from the repository root, exactly as train.py does
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from bench.record import Results, Rows, run_cases
from command_line import OneLineParser

HUNG = 70  # exit status of a rank whose phase has taken too long
N_EXPORTS = 20
LIMIT_S = 6  # of a phase of the runs here
GRACE_S = 45  # that a hang may last beyond it
TIMEOUTS = ["--timeouts", f"start=60,step={LIMIT_S},eval=60,save={LIMIT_S}"]
Result = dict[str, Any]


def in_second_save(act: Callable[[], None]) -> None:
    """Have this process act where its second save begins."""
    import checkpoint.saving as saving

    saving.write_files = acting_in_call(2, act, saving.write_files)


def in_step(act: Callable[[], None]) -> None:
    """Have this process act in its fifth step."""
    import training.step as step

    step.optimizer_step = acting_in_call(5, act, step.optimizer_step)


def acting_in_call(
    number: int, act: Callable[[], None], real: Callable[..., Any]
) -> Callable[..., Any]:
    """Return a function that acts in one of its calls, and then does what it did."""
    calls = itertools.count(1)

    def acting(*args: Any) -> Any:
        if next(calls) == number:
            act()
        return real(*args)

    return acting


def fill_disk(n_bytes: int) -> None:
    """Let no file grow beyond so many bytes, as a full disk does."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, n_bytes))


def hold_interpreter() -> None:
    """Hang in C code that lets no Python thread run."""
    re.match("(a+)+$", "a" * 40 + "b")


def stop() -> None:
    """Hang as a stopped process does: no thread of it runs, no signal but SIGKILL ends it."""
    os.kill(os.getpid(), signal.SIGSTOP)


class Fault(NamedTuple):
    """What one rank does, and when: `in_step` or `in_second_save` takes the deed."""

    when: Callable[[Callable[[], None]], None]
    act: Callable[[], None]
    victim: int


def faults() -> dict[str, Fault]:
    """Return the faults in a running rank by the name of their case."""
    found = {}
    # Bytes to which a file may grow: the model's or the manifest's does not fit.
    for name, n_bytes, rank in (
        ("the model", 2**20, 0),
        ("the optimizer", 8 * 2**20, 0),
        ("the optimizer", 2**20, 1),
        ("the manifest", 700, 0),
    ):
        full = partial(fill_disk, n_bytes)
        found[f"disk full for {name} of rank {rank}"] = Fault(in_second_save, full, rank)
    found["disk full for the logs"] = Fault(in_step, partial(fill_disk, 700), 0)
    for rank in (0, 1):
        found[f"sleep of rank {rank}"] = Fault(in_step, partial(time.sleep, 1000), rank)
        found[f"hang in C of rank {rank}"] = Fault(in_step, hold_interpreter, rank)
        found[f"stop of rank {rank}"] = Fault(in_step, stop, rank)
    return found


FAULTS = faults()
ALONE = {f"only rank {rank} of two": rank for rank in (0, 1)}
EXPORTS = "exports of a live run"
CUT = "a shard is cut while it is read"
DAMAGED = "damaged files"
CASES = [*FAULTS, *ALONE, DAMAGED, CUT, EXPORTS]


def run_with_fault(folder: Path, run_dir: Path, case: str) -> Result:
    """Make a fault in a run; return what it left, with `ok`."""
    from bench.faults.forks import KILLED, Run
    from bench.faults.kills import arguments, judge, newest_step

    fault = FAULTS[case]
    shutil.rmtree(run_dir, ignore_errors=True)
    log = run_dir.with_suffix(".log")
    log.unlink(missing_ok=True)

    def sabotage(rank: int) -> None:
        if rank == fault.victim:
            fault.when(fault.act)

    run = Run([*arguments(folder, run_dir, 1, 10**6), *TIMEOUTS], 2, log, sabotage)
    run.wait_until(lambda: newest_step(run_dir) >= 3)
    # A stopped process does not end by itself: launchers kill it.
    mortal = {0, 1} - ({fault.victim} if fault.act is stop else set())
    started = time.monotonic()
    in_time = run.wait_until(lambda: mortal <= run.statuses.keys(), LIMIT_S + GRACE_S)
    ended_s = time.monotonic() - started
    run.wait(0)
    result = judge(run_dir, ended_s if in_time else None, run.statuses)
    is_full = case.startswith("disk full")
    allowed = {1} if is_full else {1, HUNG}
    for rank, status in run.statuses.items():
        if status not in (allowed if rank in mortal else {KILLED}):
            result |= {"ok": False, "problem": f"rank {rank} ended with {status}"}
    # Where the disk has no space for the logs, it has none for what the process prints either.
    status_file = run_dir / "run_status.json"
    printed = log.read_text(encoding="utf-8") + status_file.read_text(encoding="utf-8")
    expected = f"({run_dir}|this machine).*Fix: " if is_full else f"not done after {LIMIT_S} s"
    if not re.search(expected, printed):
        result |= {"ok": False, "problem": f"the log does not say {expected!r}"}
    return result


def start_one_of_two(folder: Path, run_dir: Path, present: int) -> Result:
    """Start one rank of two: it must end and name the other."""
    from bench.faults.forks import Run
    from bench.faults.kills import arguments

    log = run_dir.with_suffix(".log")
    command = [*arguments(folder, run_dir, 1, 10), "--timeouts", "start=10"]

    def sabotage(rank: int) -> None:
        if rank != present:
            os._exit(0)

    run = Run(command, 2, log, sabotage)
    ended_s = run.wait(40)
    expected = "rank 1 never came" if present == 0 else "did not gather all ranks"
    is_named = expected in log.read_text(encoding="utf-8")
    ok = ended_s is not None and run.statuses[present] == 1 and is_named
    return {"ended_s": ended_s, "statuses": run.statuses, "ok": ok}


def export_live(folder: Path, run_dir: Path) -> Result:
    """Export a run again and again while it trains, saves and prunes."""
    from bench.faults.forks import Run
    from bench.faults.kills import arguments, newest_step
    from checkpoint import consolidate
    from checkpoint.hf_folder import load_hf_folder

    log = run_dir.with_suffix(".log")
    run = Run(arguments(folder, run_dir, 1, 10**6), 2, log)
    run.wait_until(lambda: newest_step(run_dir) >= 3)
    statuses = []
    for i in range(N_EXPORTS):
        out = run_dir / "exports" / str(i)
        child = os.fork()
        if not child:
            sys.argv = ["", "--ckpt", str(run_dir), "--out_dir", str(out)]
            status = consolidate.main()
            if status == 0:
                load_hf_folder(out)  # raises if it is not whole
            os._exit(status)
        statuses.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    steps = newest_step(run_dir)
    run.wait(0)
    # Status 2: what was to be exported was pruned meanwhile, and the command said so.
    ok = statuses.count(0) > 0 and set(statuses) <= {0, 2} and steps > 6
    return {"tries": N_EXPORTS, "statuses": statuses, "steps": steps, "ok": ok}


def main() -> int:
    """Run the command line; status 1 if a case went otherwise."""
    parser = OneLineParser(description=__doc__)
    parser.add_argument("--cases", nargs="+", default=CASES, help="of these: " + "; ".join(CASES))
    parser.add_argument("--folder", type=Path, required=True, help="for runs and faults.json")
    args = parser.parse_args()
    from bench.faults.damage import cut_shard, damage, two_checkpoints
    from bench.faults.forks import import_everything
    from bench.faults.kills import open_folder

    import_everything()
    folder = args.folder
    out = open_folder(folder)

    def run_case(case: str) -> Result:
        if case in FAULTS:
            return run_with_fault(folder, folder / "mishaps", case)
        if case in ALONE:
            return start_one_of_two(folder, folder / "alone", ALONE[case])
        if case == CUT:
            return cut_shard(folder, folder / "cut")
        if case == EXPORTS:
            return export_live(folder, folder / "live")
        older, newer = two_checkpoints(folder)
        return damage(newer, older, folder / "damaged", random.Random(0))

    return run_cases(out, "Mishaps", args.cases, run_case, summary)


def summary(done: Results) -> Rows:
    """Return the table."""
    return [
        {"mishap": case, "tries": str(result.get("tries", 1)), "as it must be": str(result["ok"])}
        for case, result in done.items()
    ]


if __name__ == "__main__":
    sys.exit(main())
