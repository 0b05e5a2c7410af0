"""Train on two machines with every launcher, and let one of them fail (bench/cluster/hosts.py).

    python bench/cluster/launches.py --folder runs/launches

Each launcher of launch/README.md, in its words, trains `debug` with ZeRO stages 1 and 3 in fp32
on two machines of two ranks: the losses must be those of one machine with four ranks. Then a
machine is cut off, or its ranks are killed: every rank must end, and the other machine goes on from
the newest checkpoint. A Slurm job comes to the end of its time. And each starts preflight.
As root. Resumable: cases in the JSON are not tried again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: import from the repository root, exactly as train.py does
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from bench.cluster.hosts import missing
from bench.cluster.launchers import (
    COMMANDS,
    MACHINES,
    SLOTS,
    WITH_SLURM,
    arguments,
    end,
    machines,
    ranks_of,
    start,
    wait_until,
)
from bench.cluster.slurm import lacks_slurm
from bench.faults.kills import losses, newest_step, open_folder

STEPS, TOLERANCE = 6, 1e-5
STEP_S, GRACE_S = 10, 45  # --timeouts step; what ranks may live beyond it
START_S, LINGER_S = 120, 20  # for a start and some steps; for the launchers to follow the ranks
REQUEUE_S = 400  # until a Slurm job runs again
EQUAL, LOST, LATE = "Two machines as one", "A machine lost", "A job out of time"
FIT = "Preflight"
OUT_OF_TIME = {"SBATCH_TIMELIMIT": "2", "SBATCH_SIGNAL": "USR1@60"}  # minutes; what, seconds before
CASES = {f"{launcher}, stage {stage}": (EQUAL, launcher, stage)
         for stage in (1, 3) for launcher in COMMANDS}  # fmt: skip
CASES |= {f"{launcher}, {fault}": (LOST, launcher, fault)
          for fault in ("link cut", "ranks killed") for launcher in COMMANDS}  # fmt: skip
CASES |= {"slurm, out of time": (LATE, "slurm", "")}
CASES |= {f"{launcher}, preflight": (FIT, launcher, "") for launcher in COMMANDS}

Result = dict[str, Any]


def train_as_one(folder: Path, launcher: str, stage: int) -> Result:
    """Compare the losses of two machines with those of one that has as many ranks."""
    from bench.fidelity.parity import launch, write_ds_config

    run_dir, alone = folder / "run", folder / f"alone{stage}"
    ds_config = write_ds_config(folder, stage, "fp32")
    limit = ["--max_steps", STEPS]
    if len(losses(alone)) < STEPS:
        shutil.rmtree(alone, ignore_errors=True)
        done = launch(len(MACHINES) * SLOTS, arguments(folder / "data", alone, ds_config, *limit))
        assert done.returncode == 0, done.stderr
    with machines(folder, launcher) as hosts:
        started = time.monotonic()
        command = arguments(folder / "data", run_dir, ds_config, *limit)
        jobs = start(hosts, launcher, MACHINES, command, run_dir.with_suffix(".log"))
        statuses = end(jobs, START_S)
    ours, theirs = losses(run_dir), losses(alone)
    difference = max((abs(ours[k] - theirs[k]) for k in ours), default=0.0)
    ok = ours.keys() == theirs.keys() and difference <= TOLERANCE and set(statuses) == {0}
    return {"seconds": round(time.monotonic() - started, 1), "steps": len(ours),
            "difference": difference, "statuses": statuses, "ok": ok}  # fmt: skip


def lose(folder: Path, launcher: str, fault: str) -> Result:
    """Let the second machine fail in mid-run at stage 3; then go on with the first."""
    from bench.fidelity.parity import write_ds_config

    run_dir, log = folder / "run", folder / "run.log"
    ds_config = write_ds_config(folder, 3, "fp32")
    long = ["--max_steps", 100_000, "--checkpoint_every", 3, "--timeouts", f"step={STEP_S}"]
    with machines(folder, launcher) as hosts:
        command = arguments(folder / "data", run_dir, ds_config, *long)
        jobs = start(hosts, launcher, MACHINES, command, log)
        wait_until(lambda: newest_step(run_dir) >= STEPS, jobs, START_S)
        there = hosts.pids("node-2")
        if fault == "link cut":
            hosts.cut("node-2")
        else:
            for pid in there.intersection(ranks_of(run_dir)):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        lost_s, ended_s = time.monotonic(), {"node-1": 0.0, "node-2": 0.0}
        while (left := ranks_of(run_dir)) and time.monotonic() - lost_s < STEP_S + GRACE_S:
            for pid in left:
                name = "node-2" if pid in there else "node-1"
                ended_s[name] = round(time.monotonic() - lost_s, 1)
            time.sleep(0.2)
        statuses = end(jobs, LINGER_S)
        steps = len(losses(run_dir))
        again = arguments(folder / "data", run_dir, ds_config, "--max_steps", steps + 2)
        survivor = end(start(hosts, "cluster.py", MACHINES[:1], again, log), START_S)
    ok = not left and survivor == [0] and len(losses(run_dir)) == steps + 2 > STEPS
    return {"ended_s": ended_s, "statuses": statuses, "steps": steps, "survivor": survivor,
            "ok": ok}  # fmt: skip


def run_out_of_time(folder: Path, launcher: str, _: str) -> Result:
    """Let a job's time come to its end: it saves, queues itself again, and goes on; then end it."""
    from bench.fidelity.parity import write_ds_config

    run_dir, log = folder / "run", folder / "run.log"
    ds_config = write_ds_config(folder, 3, "fp32")
    with machines(folder, launcher) as hosts:
        hosts.variables |= OUT_OF_TIME
        command = arguments(folder / "data", run_dir, ds_config, "--max_steps", 100_000)
        jobs = start(hosts, launcher, MACHINES, command, log)
        started = time.monotonic()
        wait_until(lambda: newest_step(run_dir) > 0, jobs, START_S)
        warned_s, saved = round(time.monotonic() - started, 1), newest_step(run_dir)
        wait_until(lambda: len(losses(run_dir)) > saved + STEPS, jobs, REQUEUE_S)
        again_s = round(time.monotonic() - started, 1)
        hosts.popen(MACHINES[0], ["scancel", "1"], log).wait(LINGER_S)
        statuses = end(jobs, START_S)
    steps = list(losses(run_dir))
    status = json.loads((run_dir / "run_status.json").read_text(encoding="utf-8"))["status"]
    ok = 0 < saved < len(steps) == newest_step(run_dir) and steps == list(range(len(steps)))
    return {"warned_s": warned_s, "saved": saved, "again_s": again_s, "steps": len(steps),
            "statuses": statuses, "status": status, "ok": ok and status == "preempted"}  # fmt: skip


def look(folder: Path, launcher: str, _: str) -> Result:
    """Start preflight in train.py's place."""
    log = folder / "run.log"
    with machines(folder, launcher) as hosts:
        started = time.monotonic()
        command = arguments(folder / "data", folder / "run", Path("ds_configs/zero3.json"))
        jobs = start(hosts, launcher, MACHINES, command, log, "launch/preflight.py")
        statuses = end(jobs, START_S)
    found = [line for line in log.read_text(encoding="utf-8").splitlines() if '{"fit": ' in line]
    ok = len(found) == 1 and '{"fit": true' in found[0] and set(statuses) == {0}
    return {"seconds": round(time.monotonic() - started, 1), "statuses": statuses, "ok": ok}


def main() -> int:
    """Run the command line; status 1 if a case went otherwise."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", default=list(CASES), help="; ".join(CASES))
    parser.add_argument("--folder", type=Path, required=True, help="for runs and logs")
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the results")
    args = parser.parse_args()
    needs_slurm = any(CASES[case][1] in WITH_SLURM for case in args.cases)
    if why_not := missing() or (needs_slurm and lacks_slurm()):
        print(f"error: {why_not}. Fix: run that, and this as root", file=sys.stderr)
        return 2
    from bench.record import record

    folder = args.folder.resolve()
    open_folder(folder)
    results = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else {}
    done: dict[str, dict[str, Result]] = {title: {} for title in ACTS}
    for title, cases in done.items():
        before = results.get(title, {}).get("values", {})
        cases |= {case: before[case] for case in CASES if case in before}
    for case in args.cases:
        title, launcher, kind = CASES[case]
        if case not in done[title]:
            done[title][case] = ACTS[title](folder, launcher, kind)
            print(case, done[title][case], file=sys.stderr, flush=True)
            record(args.out, title, summary(done[title]), done[title], quiet=True)
    return 0 if all(result["ok"] for cases in done.values() for result in cases.values()) else 1


ACTS: dict[str, Callable[..., Result]] = {
    EQUAL: train_as_one, LOST: lose, LATE: run_out_of_time, FIT: look
}  # fmt: skip


def summary(done: dict[str, Result]) -> list[dict[str, str]]:
    """Return the table."""
    return [
        {"case": case} | {name.removesuffix("_s"): str(value) for name, value in result.items()}
        for case, result in done.items()
    ]


if __name__ == "__main__":
    sys.exit(main())
