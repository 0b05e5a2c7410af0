"""Ask a run to stop in every way, through the deepspeed launcher, and look for surviving processes.

    python bench/faults/orphans.py --folder runs/faults

Each variant is a signal to one process of the run (the runner `deepspeed`, its launcher, a rank,
or all) at one moment (training, evaluation). The run must leave a checkpoint at the step that it
had reached and `preempted` in `run_status.json`; no process may be there 45 s later. A variant that
the JSON holds is not tried again.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import psutil

if not __package__:  # run as a file: import from the repository root, exactly as train.py does
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from bench.processes import environment_without_ranks, flags, wait_until
from bench.record import Results, Rows, run_cases
from command_line import OneLineParser

PROCESSES = ("runner", "launcher", "rank 0", "rank 1", "all")
SIGNALS = ("SIGTERM", "SIGINT")
MOMENTS = ("training", "evaluation")
VARIANTS = [
    f"{number} to {process} in {moment}"
    for process, number, moment in itertools.product(PROCESSES, SIGNALS, MOMENTS)
]
START_S = 120  # for a start and some steps
END_S = 45  # until no process may be there
ROOT = Path(__file__).resolve().parents[2]


def descendants(pid: int) -> dict[int, psutil.Process]:
    """Return a process and its descendants by process id, without zombies."""
    from training.stops import is_alive

    runner = psutil.Process(pid)
    found = [runner, *runner.children(recursive=True)]
    return {process.pid: process for process in found if is_alive(process)}


def name_processes(runner: int) -> dict[str, int]:
    """Return the processes of a run of two ranks by name."""
    from training.stops import DEEPSPEED_LAUNCHER

    below = descendants(runner).values()
    (launcher,) = [p for p in below if DEEPSPEED_LAUNCHER in p.cmdline()]
    by_rank = {f"rank {p.environ()['RANK']}": p.pid for p in launcher.children()}
    return {"runner": runner, "launcher": launcher.pid} | dict(sorted(by_rank.items()))


def start(folder: Path, run_dir: Path, moment: str) -> subprocess.Popen[bytes]:
    """Start two ranks of a long run; its evaluation is long where that is the moment."""
    from bench.fidelity.parity import launcher

    in_evaluation = moment == "evaluation"
    arguments = flags(
        model="debug",
        data_dir=folder / "data",
        run_dir=run_dir,
        batch_tokens=512,
        micro_batch_size=4,
        max_steps=100_000,
        decay_steps=1000,
        sample_tokens=1,
        eval_every=7 if in_evaluation else 100_000,
        eval_tokens=9984 if in_evaluation else 64,
    )
    environment = environment_without_ranks() | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    with run_dir.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(
            [*launcher(2), "train.py", *arguments],
            cwd=ROOT,
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def stop_once(folder: Path, variant: str) -> dict[str, Any]:
    """Stop a run in one way; return what it left, with `ok`."""
    from bench.faults.kills import losses, newest_step

    sent, _, rest = variant.partition(" to ")
    whom, _, moment = rest.partition(" in ")
    run_dir = folder / variant.replace(" ", "_")
    shutil.rmtree(run_dir, ignore_errors=True)
    runner = start(folder, run_dir, moment)
    step = 6 if moment == "evaluation" else 8  # evaluation follows the checkpoint after step 6
    reached = wait_until(lambda: step in losses(run_dir), START_S)
    if moment == "evaluation":
        time.sleep(0.3)
    processes = name_processes(runner.pid) if reached else {"runner": runner.pid}
    everyone = descendants(runner.pid)
    for name, pid in processes.items():
        if whom in (name, "all"):
            os.kill(pid, signal.Signals[sent])
    started = time.monotonic()
    gone = wait_until(lambda: runner.poll() is not None and not alive(everyone), END_S)
    ended_s = time.monotonic() - started
    for pid in alive(everyone):
        os.kill(pid, signal.SIGKILL)
    status = json.loads((run_dir / "run_status.json").read_text(encoding="utf-8"))
    done = max(losses(run_dir), default=-1) + 1
    problem = ""
    if not reached:
        problem = "the moment never came"
    elif not gone:
        problem = f"processes lived on for {END_S} s"
    elif status["status"] != "preempted" or newest_step(run_dir) != done:
        problem = f"{status['status']} with a checkpoint of step {newest_step(run_dir)} of {done}"
    return {
        "ok": not problem,
        "problem": problem,
        "ended_s": round(ended_s, 1),
        "steps": done,
        "reason": status.get("reason"),
        "exit_status": runner.returncode,
    }


def alive(processes: dict[int, psutil.Process]) -> list[int]:
    """Return those of the processes that still run."""
    from training.stops import is_alive

    return [pid for pid, process in processes.items() if is_alive(process)]


def summary(done: Results) -> Rows:
    """Return the table."""
    stopped = sum(result["ok"] for result in done.values())
    return [{"variants": str(len(done)), "checkpoint left, no process": str(stopped)}]


def main() -> int:
    """Run the command line; status 1 if a process survived or anything was lost."""
    parser = OneLineParser(description=__doc__)
    parser.add_argument("--variants", nargs="+", default=VARIANTS, help="default: all 20")
    parser.add_argument("--folder", type=Path, required=True, help="for runs and faults.json")
    args = parser.parse_args()
    from bench.faults.kills import open_folder

    # A shell's background job ignores SIGINT, and so would what it starts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    out = open_folder(args.folder)
    stop_variant = partial(stop_once, args.folder)
    return run_cases(out, "Stops through deepspeed", args.variants, stop_variant, summary)


if __name__ == "__main__":
    sys.exit(main())
