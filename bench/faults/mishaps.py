"""Faults other than a kill, made on purpose: full disks, hung or missing ranks, damaged files.

    python bench/faults/mishaps.py --folder runs/faults

A run of two ranks meets each of them at a step after its first checkpoint. It must end in time with
the status and the line that say what happened, its checkpoints whole; the damaged ones must be
named before anything is loaded. Resumable: cases in the JSON are not tried again.
"""

from __future__ import annotations

import argparse
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
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if not __package__:  # run as a file: import from the repository root, exactly as train.py does
    sys.path[0] = str(ROOT)

HUNG = 70
TITLE = "Mishaps"
EXPORTED = 20
LIMIT_S, GRACE_S = 6, 45  # a phase of the runs here; what a hang may last beyond it
TIMEOUTS = ["--timeouts", f"start=60,step={LIMIT_S},eval=60,save={LIMIT_S}"]
FULL = (("the model", 2**20, 0), ("the optimizer", 8 * 2**20, 0), ("the optimizer", 2**20, 1),
        ("the manifest", 700, 0))  # bytes to which a file can grow  # fmt: skip

Result = dict[str, Any]


def in_second_save(act: Callable[[], None]) -> None:
    """Have this process act where its second save begins."""
    import checkpoint.saving as saving

    real, calls = saving.write_files, []

    def write_files(*args: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            act()
        real(*args)

    saving.write_files = write_files


def in_step(act: Callable[[], None]) -> None:
    """Have this process act in its fifth step."""
    import training.step as step

    real, calls = step.optimizer_step, []

    def optimizer_step(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 5:
            act()
        return real(*args)

    step.optimizer_step = optimizer_step


def fill_disk(n_bytes: int) -> None:
    """Let no file grow beyond so many bytes, as a full disk does."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, n_bytes))


def hold_interpreter() -> None:
    """Hang in C code that lets no Python thread run."""
    re.match("(a+)+$", "a" * 40 + "b")


def stop() -> None:
    """Hang as a stopped process does: no thread of it runs, no signal but SIGKILL ends it."""
    os.kill(os.getpid(), signal.SIGSTOP)


# What each rank does where.
MEETINGS: dict[str, tuple[Callable[..., None], Callable[[], None], int]] = {
    f"disk full for {name} of rank {rank}": (in_second_save, partial(fill_disk, n_bytes), rank)
    for name, n_bytes, rank in FULL
} | {
    "disk full for the logs": (in_step, partial(fill_disk, 700), 0),
} | {
    f"{name} of rank {rank}": (in_step, act, rank)
    for rank in (0, 1)
    for name, act in (("sleep", partial(time.sleep, 1000)), ("hang in C", hold_interpreter),
                      ("stop", stop))
}  # fmt: skip
ALONE = {f"only rank {rank} of two": rank for rank in (0, 1)}
EXPORTS = "exports of a live run"
CUT = "a shard is cut while it is read"
CASES = [*MEETINGS, *ALONE, "damaged files", CUT, EXPORTS]


def meet(folder: Path, run_dir: Path, case: str) -> Result:
    """Let a run meet with a mishap; return what it left, with `ok`."""
    from bench.faults.forks import KILLED, Run
    from bench.faults.kills import arguments, judge, newest_step

    where, act, victim = MEETINGS[case]
    shutil.rmtree(run_dir, ignore_errors=True)
    log = run_dir.with_suffix(".log")
    log.unlink(missing_ok=True)
    command = [*arguments(folder, run_dir, 1, 10**6), *TIMEOUTS]
    run = Run(command, 2, log, lambda rank: where(act) if rank == victim else None)
    while newest_step(run_dir) < 3 and not run.poll():
        time.sleep(0.05)
    mortal = [rank for rank in (0, 1) if rank != victim or act is not stop]
    started = time.monotonic()
    while not run.poll() and not all(rank in run.statuses for rank in mortal):
        if time.monotonic() - started > LIMIT_S + GRACE_S:
            break
        time.sleep(0.05)
    ended_s = time.monotonic() - started
    run.wait(0)  # launchers kill a stopped process
    result = judge(run_dir, ended_s if ended_s < LIMIT_S + GRACE_S else None, run.statuses)
    is_full = case.startswith("disk full")
    allowed = {1} if is_full else {1, HUNG}
    said = f"({run_dir}|stderr).*Fix: " if is_full else f"not done after {LIMIT_S} s"
    for rank, status in run.statuses.items():
        if status not in (allowed if rank in mortal else {KILLED}):
            result |= {"ok": False, "problem": f"rank {rank} ended with {status}"}
    # Where the logs find no room, what the process prints finds none either.
    if not re.search(
        said,
        log.read_text(encoding="utf-8") + (run_dir / "run_status.json").read_text(encoding="utf-8"),
    ):
        result |= {"ok": False, "problem": f"the log does not say {said!r}"}
    return result


def miss(folder: Path, run_dir: Path, present: int) -> Result:
    """Start one rank of two."""
    from bench.faults.forks import Run
    from bench.faults.kills import arguments

    log = run_dir.with_suffix(".log")
    command = [*arguments(folder, run_dir, 1, 10), "--timeouts", "start=10"]
    run = Run(command, 2, log, lambda rank: None if rank == present else os._exit(0))
    ended_s = run.wait(40)
    said = "rank 1 never came" if present == 0 else "did not gather all ranks"
    ok = (
        ended_s is not None
        and run.statuses[present] == 1
        and said in log.read_text(encoding="utf-8")
    )
    return {"ended_s": ended_s, "statuses": run.statuses, "ok": ok}


def export_live(folder: Path, run_dir: Path) -> Result:
    """Export a run again and again while it trains, saves and prunes."""
    from bench.faults.forks import Run
    from bench.faults.kills import arguments, newest_step
    from checkpoint import consolidate
    from checkpoint.hf_folder import load_hf_folder

    log = run_dir.with_suffix(".log")
    run = Run(arguments(folder, run_dir, 1, 10**6), 2, log)
    while newest_step(run_dir) < 3 and not run.poll():
        time.sleep(0.05)
    statuses = []
    for i in range(EXPORTED):
        out = run_dir / "exports" / str(i)
        child = os.fork()
        if not child:
            sys.argv = ["", "--ckpt", str(run_dir), "--out_dir", str(out)]
            status = consolidate.main()
            if status == 0:
                load_hf_folder(out)  # whole, or it raises
            os._exit(status)
        statuses.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    steps = newest_step(run_dir)
    run.wait(0)
    # Status 2: what was to be exported was pruned meanwhile, and the command said so.
    ok = statuses.count(0) > 0 and set(statuses) <= {0, 2} and steps > 6
    return {"tries": EXPORTED, "statuses": statuses, "steps": steps, "ok": ok}


def main() -> int:
    """Run the command line; status 1 if a case went otherwise."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", default=CASES, help="of these: " + "; ".join(CASES))
    parser.add_argument("--folder", type=Path, required=True, help="for runs and faults.json")
    args = parser.parse_args()
    from bench.faults.damage import cut_shard, damage, two_checkpoints
    from bench.faults.forks import import_everything
    from bench.faults.kills import open_folder
    from bench.record import record

    import_everything()
    out, results = open_folder(args.folder)
    done: dict[str, Result] = results.get(TITLE, {}).get("values", {})
    for case in args.cases:
        if case in done:
            continue
        if case in MEETINGS:
            done[case] = meet(args.folder, args.folder / "mishaps", case)
        elif case in ALONE:
            done[case] = miss(args.folder, args.folder / "alone", ALONE[case])
        elif case == CUT:
            done[case] = cut_shard(args.folder, args.folder / "cut")
        elif case == EXPORTS:
            done[case] = export_live(args.folder, args.folder / "live")
        else:
            older, newer = two_checkpoints(args.folder)
            done[case] = damage(newer, older, args.folder / "damaged", random.Random(0))
        print(case, done[case], file=sys.stderr, flush=True)
        record(out, TITLE, summary(done), done, quiet=True)
    record(out, TITLE, summary(done), done)
    return 0 if all(result["ok"] for result in done.values()) else 1


def summary(done: dict[str, Result]) -> list[dict[str, str]]:
    """Return the table."""
    return [
        {"mishap": case, "tries": str(result.get("tries", 1)), "as it must be": str(result["ok"])}
        for case, result in done.items()
    ]


if __name__ == "__main__":
    sys.exit(main())
