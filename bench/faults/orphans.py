"""Ask a run to stop in every way, through the deepspeed launcher, and look for what lives on.

    python bench/faults/orphans.py --folder runs/faults

Each variant is a signal to one process of the run (the runner `deepspeed`, its launcher, a rank,
or all) at one moment (training, evaluation). The run must leave one checkpoint, at the step that it
had reached, and `run_status.json` = preempted; no process may be there 45 s later; started again,
it must go on with the very next step. Resumable: variants in the JSON are not tried again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
if not __package__:  # run as a file: import from the repository root, exactly as train.py does
    sys.path[0] = str(ROOT)

PROCESSES = ("runner", "launcher", "rank 0", "rank 1", "all")
SIGNALS = ("SIGTERM", "SIGINT")
MOMENTS = ("training", "evaluation")
VARIANTS = [f"{s} to {p} in {m}" for p in PROCESSES for s in SIGNALS for m in MOMENTS]
START_S, END_S = 120, 45


def descendants(pid: int) -> dict[int, psutil.Process]:
    """Return a process and all below it that are no zombies."""
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


def start(folder: Path, run_dir: Path, moment: str, *more: str) -> subprocess.Popen[bytes]:
    """Start two ranks of a long run; its evaluation is long where that is the moment."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2",
               "--master_addr", "127.0.0.1", "--master_port", str(port), "train.py",
               "--model", "debug", "--data_dir", str(folder / "data"), "--run_dir", str(run_dir),
               "--batch_tokens", "512", "--micro_batch_size", "4", "--max_steps", "100000",
               "--decay_steps", "1000", "--sample_tokens", "1", "--eval_every",
               "7" if moment == "evaluation" else "100000",
               "--eval_tokens", "9984" if moment == "evaluation" else "64", *more]  # fmt: skip
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    environment |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    with run_dir.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log,
                                start_new_session=True)  # fmt: skip


def wait_for(what: Any, timeout_s: float) -> bool:
    """Return whether `what()` became true in time."""
    deadline = time.monotonic() + timeout_s
    while not what():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def stop_once(folder: Path, variant: str) -> dict[str, Any]:
    """Stop a run in one way; return what it left, with `ok`."""
    from bench.faults.kills import losses, newest_step

    sent, _, rest = variant.partition(" to ")
    whom, _, moment = rest.partition(" in ")
    run_dir = folder / variant.replace(" ", "_")
    shutil.rmtree(run_dir, ignore_errors=True)
    runner = start(folder, run_dir, moment)
    step = 6 if moment == "evaluation" else 8  # evaluation follows the checkpoint after step 6
    reached = wait_for(lambda: step in losses(run_dir), START_S)
    if moment == "evaluation":
        time.sleep(0.3)
    processes = name_processes(runner.pid) if reached else {"runner": runner.pid}
    everyone = descendants(runner.pid)
    number = signal.Signals[sent]
    for name, pid in processes.items():
        if whom in (name, "all"):
            os.kill(pid, number)
    started = time.monotonic()
    gone = wait_for(lambda: runner.poll() is not None and not alive(everyone), END_S)
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
    return {"ok": not problem, "problem": problem, "ended_s": round(ended_s, 1), "steps": done,
            "reason": status.get("reason"), "exit_status": runner.returncode}  # fmt: skip


def alive(processes: dict[int, psutil.Process]) -> list[int]:
    """Return those of the processes that still run."""
    from training.stops import is_alive

    return [pid for pid, process in processes.items() if is_alive(process)]


def summary(done: dict[str, Any]) -> list[dict[str, str]]:
    """Return the table."""
    stopped = sum(result["ok"] for result in done.values())
    return [{"variants": str(len(done)), "checkpoint left, no process": str(stopped)}]


def main() -> int:
    """Run the command line; status 1 if anything lived on or was lost."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--variants", nargs="+", default=VARIANTS, help="default: all 20")
    parser.add_argument("--folder", type=Path, required=True, help="for runs and faults.json")
    args = parser.parse_args()
    from bench.faults.kills import open_folder
    from bench.record import record

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    title = "Stops through deepspeed"
    out, results = open_folder(args.folder)
    done = results.get(title, {}).get("values", {})
    for variant in args.variants:
        if variant not in done:
            done[variant] = stop_once(args.folder, variant)
            print(variant, done[variant], file=sys.stderr, flush=True)
            record(out, title, summary(done), done, quiet=True)
    record(out, title, summary(done), done)
    return 0 if all(result["ok"] for result in done.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
