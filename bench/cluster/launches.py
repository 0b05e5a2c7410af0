"""Train on two machines with every launcher, and let one of them fail (bench/cluster/hosts.py).

    python bench/cluster/launches.py --folder runs/launches

Each launcher, with the command of launch/README.md, trains `debug` with ZeRO stages 1 and 3 in fp32
on two machines of two ranks: the losses must be those of one machine with four ranks. Then a
machine is cut off, or its ranks are killed: every rank must end, and the other machine goes on from
the newest checkpoint. A Slurm job comes to the end of its time. Each launcher starts preflight.
This needs root. A case that the JSON holds is not tried again.
"""

from __future__ import annotations

import contextlib
import itertools
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
    wait_for_jobs,
)
from bench.cluster.slurm import lacks_slurm
from bench.faults.kills import losses, newest_step, open_folder
from bench.processes import wait_until
from bench.record import Results, Rows, load_json, record
from command_line import OneLineParser

STEPS = 6
TOLERANCE = 1e-5  # nats
STEP_S = 10  # --timeouts step
GRACE_S = 45  # that ranks may live beyond it
START_S = 120  # for a start and some steps
END_S = 20  # for the launchers to end after the ranks
REQUEUE_S = 400  # until a Slurm job runs again
EQUAL = "Two machines as one"
LOST = "A machine lost"
LATE = "A job out of time"
FIT = "Preflight"
OUT_OF_TIME = {"SBATCH_TIMELIMIT": "2", "SBATCH_SIGNAL": "USR1@60"}  # minutes; what, seconds before


def find_cases() -> dict[str, tuple[str, str, Any]]:
    """Return what is tried, with which launcher and how, by the name of the case."""
    cases: dict[str, tuple[str, str, Any]] = {}
    for stage, launcher in itertools.product((1, 3), COMMANDS):
        cases[f"{launcher}, stage {stage}"] = (EQUAL, launcher, stage)
    for fault, launcher in itertools.product(("link cut", "ranks killed"), COMMANDS):
        cases[f"{launcher}, {fault}"] = (LOST, launcher, fault)
    cases["slurm, out of time"] = (LATE, "slurm", "")
    for launcher in COMMANDS:
        cases[f"{launcher}, preflight"] = (FIT, launcher, "")
    return cases


CASES = find_cases()
Result = dict[str, Any]


def train_as_one(folder: Path, launcher: str, stage: int) -> Result:
    """Compare the losses of two machines with those of one that has as many ranks."""
    from bench.fidelity.parity import launch, write_ds_config

    run_dir = folder / "run"
    alone = folder / f"alone{stage}"
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
    return {
        "seconds": round(time.monotonic() - started, 1),
        "steps": len(ours),
        "difference": difference,
        "statuses": statuses,
        "ok": ok,
    }


def lose_machine(folder: Path, launcher: str, fault: str) -> Result:
    """Let the second machine fail in mid-run at stage 3; then go on with the first."""
    from bench.fidelity.parity import write_ds_config

    run_dir = folder / "run"
    log = folder / "run.log"
    ds_config = write_ds_config(folder, 3, "fp32")
    long = ["--max_steps", 100_000, "--checkpoint_every", 3, "--timeouts", f"step={STEP_S}"]
    with machines(folder, launcher) as hosts:
        command = arguments(folder / "data", run_dir, ds_config, *long)
        jobs = start(hosts, launcher, MACHINES, command, log)
        wait_for_jobs(lambda: newest_step(run_dir) >= STEPS, jobs, START_S)
        on_node_2 = hosts.pids("node-2")
        if fault == "link cut":
            hosts.cut("node-2")
        else:
            for pid in on_node_2.intersection(ranks_of(run_dir)):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        lost_s = time.monotonic()
        ended_s = {"node-1": 0.0, "node-2": 0.0}

        def have_ended() -> bool:
            left = ranks_of(run_dir)
            for pid in left:
                name = "node-2" if pid in on_node_2 else "node-1"
                ended_s[name] = round(time.monotonic() - lost_s, 1)
            return not left

        all_ended = wait_until(have_ended, STEP_S + GRACE_S)
        statuses = end(jobs, END_S)
        steps = len(losses(run_dir))
        again = arguments(folder / "data", run_dir, ds_config, "--max_steps", steps + 2)
        survivor = end(start(hosts, "cluster.py", MACHINES[:1], again, log), START_S)
    ok = all_ended and survivor == [0] and len(losses(run_dir)) == steps + 2 > STEPS
    return {
        "ended_s": ended_s,
        "statuses": statuses,
        "steps": steps,
        "survivor": survivor,
        "ok": ok,
    }


def run_out_of_time(folder: Path, launcher: str, _: str) -> Result:
    """Let a job's time come to its end: it saves, queues itself again, and goes on; then end it."""
    from bench.fidelity.parity import write_ds_config

    run_dir = folder / "run"
    log = folder / "run.log"
    ds_config = write_ds_config(folder, 3, "fp32")
    with machines(folder, launcher) as hosts:
        hosts.variables |= OUT_OF_TIME
        command = arguments(folder / "data", run_dir, ds_config, "--max_steps", 100_000)
        jobs = start(hosts, launcher, MACHINES, command, log)
        started = time.monotonic()
        wait_for_jobs(lambda: newest_step(run_dir) > 0, jobs, START_S)
        warned_s = round(time.monotonic() - started, 1)
        saved = newest_step(run_dir)
        wait_for_jobs(lambda: len(losses(run_dir)) > saved + STEPS, jobs, REQUEUE_S)
        again_s = round(time.monotonic() - started, 1)
        hosts.popen(MACHINES[0], ["scancel", "1"], log).wait(END_S)
        statuses = end(jobs, START_S)
    steps = list(losses(run_dir))
    status = json.loads((run_dir / "run_status.json").read_text(encoding="utf-8"))["status"]
    ok = 0 < saved < len(steps) == newest_step(run_dir) and steps == list(range(len(steps)))
    return {
        "warned_s": warned_s,
        "saved": saved,
        "again_s": again_s,
        "steps": len(steps),
        "statuses": statuses,
        "status": status,
        "ok": ok and status == "preempted",
    }


def run_preflight(folder: Path, launcher: str, _: str) -> Result:
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
    parser = OneLineParser(description=__doc__)
    parser.add_argument("--cases", nargs="+", default=list(CASES), help="; ".join(CASES))
    parser.add_argument("--folder", type=Path, required=True, help="for runs and logs")
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the results")
    args = parser.parse_args()
    needs_slurm = any(CASES[case][1] in WITH_SLURM for case in args.cases)
    why_not = missing() or (needs_slurm and lacks_slurm())
    if why_not:
        print(f"error: {why_not}. Fix: run that, and this as root", file=sys.stderr)
        return 2
    folder = args.folder.resolve()
    open_folder(folder)
    results = load_json(args.out)
    done: dict[str, Results] = {}
    for title in ACTS:
        before = results.get(title, {}).get("values", {})
        done[title] = {case: before[case] for case in CASES if case in before}
    for case in args.cases:
        title, launcher, kind = CASES[case]
        if case not in done[title]:
            done[title][case] = ACTS[title](folder, launcher, kind)
            print(case, done[title][case], file=sys.stderr, flush=True)
            record(args.out, title, summary(done[title]), done[title], quiet=True)
    every = itertools.chain.from_iterable(cases.values() for cases in done.values())
    return 0 if all(result["ok"] for result in every) else 1


ACTS: dict[str, Callable[..., Result]] = {
    EQUAL: train_as_one,
    LOST: lose_machine,
    LATE: run_out_of_time,
    FIT: run_preflight,
}


def summary(done: Results) -> Rows:
    """Return the table."""
    return [
        {"case": case} | {name.removesuffix("_s"): str(value) for name, value in result.items()}
        for case, result in done.items()
    ]


if __name__ == "__main__":
    sys.exit(main())
