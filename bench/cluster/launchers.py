"""Start every launcher as launch/README.md says, on two machines (bench/cluster/hosts.py)."""

from __future__ import annotations

import contextlib
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from bench.cluster.hosts import Hosts
from bench.cluster.slurm import start_slurm
from bench.processes import flags, wait_until

SLURM = "--nodes 2 --ntasks-per-node 8 --gpus-per-node 8 --cpus-per-task 12"
COMMANDS = {
    "pdsh": "deepspeed --hostfile hostfile train.py …",
    "cluster.py": "python launch/cluster.py --hostfile hostfile train.py …",
    "openmpi": "deepspeed --hostfile hostfile --launcher openmpi "
    "--launcher_args=--allow-run-as-root train.py …",
    "no_ssh": "deepspeed --hostfile hostfile --no_ssh --node_rank 0 --master_addr node-1 "
    "train.py …",
    "torchrun": "torchrun --nnodes 2 --node_rank 0 --nproc_per_node 8 --master_addr node-1 "
    "train.py …",
    "slurm": f"sbatch {SLURM} launch/slurm.sbatch …",
    "srun": f"srun {SLURM} python train.py …",
    "slurm by cluster.py": "python launch/cluster.py --hostfile hostfile --launcher slurm "
    "train.py …",
}
WITH_SLURM = ("slurm", "srun", "slurm by cluster.py")
MACHINES = ["node-1", "node-2"]
SLOTS = 2  # ranks of each
STARTED = {"RANK", "OMPI_COMM_WORLD_RANK", "SLURM_STEP_ID"}  # variables that only ranks have


def arguments(data_dir: Path, run_dir: Path, ds_config: Path, *more: object) -> list[str]:
    """Return train.py's command line; what is added last wins."""
    shape = flags(
        model="debug",
        data_dir=data_dir,
        run_dir=run_dir,
        ds_config=ds_config,
        batch_tokens=512,
        micro_batch_size=1,
        decay_steps=40,
        eval_tokens=256,
        eval_every=100_000,
        sample_tokens=1,
    )
    return [*shape, *map(str, more)]


def start(
    hosts: Hosts,
    launcher: str,
    machines: list[str],
    command: list[str],
    log: Path,
    program: str = "train.py",
) -> list[subprocess.Popen[bytes]]:
    """Start a program with a launcher's documented command, on the first machine or on each."""
    hostfile = hosts.folder / "hostfile"
    hostfile.write_text("".join(f"{name} slots={SLOTS}\n" for name in machines), encoding="utf-8")
    hosts.variables |= {"PROGRAM": program, "SBATCH_OUTPUT": str(log)}  # sbatch's
    words = shlex.split(COMMANDS[launcher])[:-1]
    started = []
    for i, name in enumerate(machines if "--node_rank" in words else machines[:1]):
        # The documented machines have 8 GPUs and 12 cores per GPU.
        ours = {"hostfile": str(hostfile), "8": str(SLOTS), "12": "1", "0": str(i)}
        ours["train.py"] = program
        launcher_command = [ours.get(word, word) for word in words]
        started.append(hosts.popen(name, [*launcher_command, *command], log))
    return started


def wait_for_jobs(
    condition: Callable[[], bool], jobs: list[subprocess.Popen[bytes]], limit_s: float
) -> None:
    """Wait until a condition holds, every launcher has ended, or the time is over."""
    wait_until(lambda: condition() or all(job.poll() is not None for job in jobs), limit_s)


def write_environment(hosts: Hosts) -> None:
    """Write .deepspeed_env into the machines' home, with its command."""
    command = ["python", "launch/environment.py", "--out", str(hosts.home / ".deepspeed_env")]
    if hosts.popen("node-1", command, hosts.folder / "environment.log").wait(30):
        raise RuntimeError((hosts.folder / "environment.log").read_text(encoding="utf-8"))


def ranks_of(run_dir: Path) -> list[int]:
    """Return the ranks, of every machine and launcher, that train into a folder."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):  # it has just ended
            is_rank = STARTED & process.environ().keys()
            if is_rank and str(run_dir) in process.cmdline():
                found.append(process.pid)
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


@contextlib.contextmanager
def machines(folder: Path, launcher: str) -> Any:
    """Yield two machines with what a launcher needs; delete what the case before has left."""
    shutil.rmtree(folder / "run", ignore_errors=True)
    (folder / "run.log").unlink(missing_ok=True)
    shutil.rmtree(folder / "machines", ignore_errors=True)
    (folder / "machines").mkdir()
    with Hosts((folder / "machines").resolve(), len(MACHINES)) as hosts:
        write_environment(hosts)
        if launcher in WITH_SLURM:
            start_slurm(hosts, SLOTS)
        yield hosts
