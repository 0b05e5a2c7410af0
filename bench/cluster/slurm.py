"""Run Slurm on the machines of bench/cluster/hosts.py: a controller on the first, a daemon on each.

This needs root, slurmctld, slurmd, slurm-client and munge (`make slurm`). The machines have as many
GPUs as ranks, in name only.
"""

from __future__ import annotations

import secrets
import shutil

from bench.cluster.hosts import Hosts
from bench.processes import wait_until

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch")
START_S = 30
VARIABLES = {"SBATCH_WAIT": "1"}  # sbatch ends with its job, and with its status
SETTINGS = """\
ClusterName=nanospeed
SlurmctldHost={first}
SlurmUser=root
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdSpoolDir={folder}/spool.%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/affinity
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdTimeout=20
SlurmdParameters=config_overrides
MpiDefault=none
GresTypes=gpu
NodeName={names} CPUs={slots} Gres=gpu:{slots}
PartitionName=all Nodes=ALL Default=YES
"""


def lacks_slurm() -> str:
    """Return why there can be no Slurm here, or ""."""
    lacking = [name for name in NEEDED if not shutil.which(name)]
    return f"lacks {', '.join(lacking)}: make slurm" if lacking else ""


def start_slurm(hosts: Hosts, slots: int) -> None:
    """Start Slurm on all machines, until they are taken down.

    Args:
        hosts: The machines; what is started on them finds Slurm.
        slots: Ranks that each may run.

    Raises:
        RuntimeError: It did not come up.
    """
    folder = hosts.folder
    first = hosts.names[0]
    names = ",".join(hosts.names)
    settings = SETTINGS.format(folder=folder, first=first, names=names, slots=slots)
    (folder / "slurm.conf").write_text(settings, encoding="utf-8")
    gpus = [folder / f"gpu{i}" for i in range(slots)]
    lines = [f"Name=gpu File={gpu}\n" for gpu in gpus]
    (folder / "gres.conf").write_text("".join(lines), encoding="utf-8")
    for path in gpus:
        path.touch()
    # Slurm wants to know the version, although it then uses no cgroups.
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n", encoding="utf-8")
    (folder / "state").mkdir()
    (folder / "munge.key").write_bytes(secrets.token_bytes(128))
    (folder / "munge.key").chmod(0o600)
    hosts.variables |= VARIABLES | {"SLURM_CONF": str(folder / "slurm.conf")}
    log = folder / "slurm.log"
    munge_files = {
        "socket": "munge.socket",
        "key-file": "munge.key",
        "pid-file": "munge.pid",
        "log-file": "munge.log",
        "seed-file": "munge.seed",
    }
    files = [f"--{option}={folder / name}" for option, name in munge_files.items()]
    hosts.serve(first, ["munged", "--force", "--foreground", *files], log)
    hosts.serve(first, ["slurmctld", "-D"], log)
    for name in hosts.names:
        hosts.serve(name, ["slurmd", "-D", "-N", name], log)
    states = folder / "states"
    idle = ["idle"] * len(hosts.names)

    def is_up() -> bool:
        states.unlink(missing_ok=True)
        hosts.popen(first, ["sinfo", "--noheader", "--Node", "--format=%T"], states).wait(START_S)
        return states.read_text(encoding="utf-8").split() == idle

    if not wait_until(is_up, START_S):
        raise RuntimeError(f"Slurm did not start: {log.read_text(encoding='utf-8')}")
