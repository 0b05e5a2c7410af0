"""Train on two machines with every launcher, and let one of them fail (bench/hosts.py).

    python bench/launches.py --folder runs/launches

Each launcher of launch/README.md, in its words, trains `debug` with ZeRO stages 1 and 3 in fp32
on two machines of two ranks: the losses must be those of one machine with four ranks. Then a
machine is cut off, or its ranks are killed: every rank must end, and the other machine goes on from
the newest checkpoint. As root. Resumable: cases in the JSON are not tried again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: import from the repository root, exactly as train.py does
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from bench.faults import losses, newest_step, open_folder
from bench.hosts import Hosts, missing

COMMANDS = {
    "pdsh": "deepspeed --hostfile hostfile train.py …",
    "cluster.py": "python launch/cluster.py --hostfile hostfile train.py …",
    "pdsh, ssh that asks": "env 'PDSH_SSH_ARGS_APPEND=-o ServerAliveInterval=5' "
                           "deepspeed --hostfile hostfile train.py …",
    "openmpi": "deepspeed --hostfile hostfile --launcher openmpi "
               "--launcher_args=--allow-run-as-root train.py …",
    "no_ssh": "deepspeed --hostfile hostfile --no_ssh --node_rank 0 --master_addr node-1 "
              "train.py …",
    "torchrun": "torchrun --nnodes 2 --node_rank 0 --nproc_per_node 8 --master_addr node-1 "
                "train.py …",
}  # fmt: skip
MACHINES, SLOTS, STEPS, TOLERANCE = ["node-1", "node-2"], 2, 6, 1e-5
STEP_S, GRACE_S = 10, 45  # --timeouts step; what ranks may live beyond it
START_S, LINGER_S = 120, 20  # for a start and some steps; for the launchers to follow the ranks
EQUAL, LOST = "Two machines as one", "A machine lost"
CASES = {f"{launcher}, stage {stage}": (EQUAL, launcher, stage)
         for stage in (1, 3) for launcher in COMMANDS if "asks" not in launcher}  # fmt: skip
CASES |= {f"{launcher}, {fault}": (LOST, launcher, fault)
          for fault in ("link cut", "ranks killed") for launcher in COMMANDS
          if launcher != "cluster.py"}  # fmt: skip

Result = dict[str, Any]


def arguments(data_dir: Path, run_dir: Path, ds_config: Path, *more: object) -> list[str]:
    """Return train.py's command line, with more of it behind."""
    return ["--model", "debug", "--data_dir", str(data_dir), "--run_dir", str(run_dir),
            "--ds_config", str(ds_config), "--batch_tokens", "512", "--micro_batch_size", "1",
            "--decay_steps", "40", "--eval_tokens", "256", "--eval_every", "100000",
            "--sample_tokens", "1", *map(str, more)]  # fmt: skip


def start(
    hosts: Hosts, launcher: str, machines: list[str], command: list[str], log: Path
) -> list[subprocess.Popen[bytes]]:
    """Start train.py with a launcher's documented words, on the first machine or on each."""
    hostfile = hosts.folder / "hostfile"
    hostfile.write_text("".join(f"{name} slots={SLOTS}\n" for name in machines))
    words = shlex.split(COMMANDS[launcher])[:-1]
    started = []
    for i, name in enumerate(machines if "--node_rank" in words else machines[:1]):
        small = {"hostfile": str(hostfile), "8": str(SLOTS), "0": str(i)}
        here = [small.get(word, word) for word in words]
        started.append(hosts.popen(name, [*here, *command], log))
    return started


def write_environment(hosts: Hosts) -> None:
    """Write .deepspeed_env into the machines' home, with its command."""
    command = ["python", "launch/environment.py", "--out", str(hosts.home / ".deepspeed_env")]
    if hosts.popen("node-1", command, hosts.folder / "environment.log").wait(30):
        raise RuntimeError((hosts.folder / "environment.log").read_text())


def ranks_of(run_dir: Path) -> list[int]:
    """Return the ranks, of every machine and launcher, that train into a folder."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            names = {entry.partition(b"=")[0] for entry in
                     (folder / "environ").read_bytes().split(b"\0")}  # fmt: skip
        except OSError:  # it has just ended
            continue
        if str(run_dir).encode() in words and names & {b"RANK", b"OMPI_COMM_WORLD_RANK"}:
            found.append(int(folder.name))
    return found


def end(jobs: list[subprocess.Popen[bytes]], limit_s: float) -> list[int | None]:
    """Return the launchers' statuses; None for one that had to be killed."""
    deadline = time.monotonic() + limit_s
    statuses: list[int | None] = []
    for job in jobs:
        try:
            statuses.append(job.wait(max(0, deadline - time.monotonic())))
        except subprocess.TimeoutExpired:
            job.kill()  # nothing gentler: pdsh's handler would end every job of this interpreter
            job.wait()
            statuses.append(None)
    return statuses


def train_as_one(folder: Path, launcher: str, stage: int) -> Result:
    """Compare the losses of two machines with those of one that has as many ranks."""
    from bench.parity import launch, write_ds_config

    run_dir, alone = folder / "run", folder / f"alone{stage}"
    ds_config = write_ds_config(folder, stage, "fp32")
    limit = ["--max_steps", STEPS]
    if len(losses(alone)) < STEPS:
        shutil.rmtree(alone, ignore_errors=True)
        done = launch(len(MACHINES) * SLOTS, arguments(folder / "data", alone, ds_config, *limit))
        assert done.returncode == 0, done.stderr
    with machines(folder) as hosts:
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
    from bench.parity import write_ds_config

    run_dir, log = folder / "run", folder / "run.log"
    ds_config = write_ds_config(folder, 3, "fp32")
    long = ["--max_steps", 100_000, "--checkpoint_every", 3, "--timeouts", f"step={STEP_S}"]
    with machines(folder) as hosts:
        command = arguments(folder / "data", run_dir, ds_config, *long)
        jobs = start(hosts, launcher, MACHINES, command, log)
        deadline = time.monotonic() + START_S
        while newest_step(run_dir) < STEPS and time.monotonic() < deadline:
            if all(job.poll() is not None for job in jobs):
                break
            time.sleep(0.1)
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


@contextlib.contextmanager
def machines(folder: Path) -> Any:
    """Yield two machines, with nothing left of the case before."""
    shutil.rmtree(folder / "run", ignore_errors=True)
    (folder / "run.log").unlink(missing_ok=True)
    shutil.rmtree(folder / "machines", ignore_errors=True)
    (folder / "machines").mkdir()
    with Hosts((folder / "machines").resolve(), len(MACHINES)) as hosts:
        write_environment(hosts)
        yield hosts


def main() -> int:
    """Run the command line; status 1 if a case went otherwise."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", default=list(CASES), help="; ".join(CASES))
    parser.add_argument("--folder", type=Path, required=True, help="for runs and logs")
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the results")
    args = parser.parse_args()
    if why_not := missing():
        print(f"error: {why_not}. Fix: as root, with what make debian installs", file=sys.stderr)
        return 2
    from bench.record import record

    folder = args.folder.resolve()
    open_folder(folder)
    results = json.loads(args.out.read_text()) if args.out.exists() else {}
    done: dict[str, dict[str, Result]] = {title: {} for title in (EQUAL, LOST)}
    for title, cases in done.items():
        before = results.get(title, {}).get("values", {})
        cases |= {case: before[case] for case in CASES if case in before}
    for case in args.cases:
        title, launcher, kind = CASES[case]
        if case not in done[title]:
            act: Any = train_as_one if title == EQUAL else lose
            done[title][case] = act(folder, launcher, kind)
            print(case, done[title][case], file=sys.stderr, flush=True)
            record(args.out, title, summary(done[title]), done[title], quiet=True)
    return 0 if all(result["ok"] for cases in done.values() for result in cases.values()) else 1


def summary(done: dict[str, Result]) -> list[dict[str, str]]:
    """Return the table."""
    return [
        {"case": case} | {name.removesuffix("_s"): str(value) for name, value in result.items()}
        for case, result in done.items()
    ]


if __name__ == "__main__":
    sys.exit(main())
