"""The checks of launch/preflight.py: what each reads, how it compares ranks, and its remedy."""

from __future__ import annotations

import collections
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from errors import BadInput
from launch.checks import compare, machine
from launch.checks.compare import Facts, Faults, Values
from training.extension_locks import check_extension_locks
from training.run import Run


@dataclass(frozen=True)
class Check:
    """Something that must hold on every rank.

    Attributes:
        name: In the printed table and in the JSON.
        read: Returns a JSON value of this rank, or raises what is wrong with it. None: it takes
            other ranks too, and launch/checks/survey.py measures it.
        compare: Returns what was seen on all ranks, and which ranks are unfit. None: a rank is
            unfit only by an error.
        remedy: Also of an error that has none of its own.
    """

    name: str
    read: Callable[[Run], Any] | None
    compare: Callable[[Values, list[Facts]], tuple[str, Faults]] | None
    remedy: str


NETWORK = "check NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME and the firewall"
CHECKS = [
    Check("answers", None, None, "find out which process hangs there"),
    Check("device", machine.read_device, compare.differs_from_majority,
          "check nvidia-smi, DS_ACCELERATOR and CUDA_VISIBLE_DEVICES there"),
    Check("versions", machine.read_versions, compare.differs_from_majority,
          "install the same everywhere, from constraints.txt"),
    Check("flags", machine.read_flags, compare.flags, "give the same on every machine"),
    Check("variables", machine.read_variables, compare.differs_from_majority,
          "set it for all: launch/environment.py"),
    Check("clock", None, compare.clock, "let chrony or ntpd set it"),
    Check("hostnames", machine.read_addresses, compare.hostnames,
          "set GLOO_SOCKET_IFNAME, or fix /etc/hosts"),
    Check("connections", None, compare.connections, "open the firewall, check its network"),
    Check("shards", machine.read_shards, compare.differs_from_majority,
          "copy the shards again, or give the same --data_dir"),
    Check("run folder", machine.read_disk_space, compare.disk_space,
          "free disk space, or keep fewer checkpoints: --keep_checkpoints"),
    Check("run folder shared", None, compare.shared_folder,
          "mount the same storage everywhere, give the same --run_dir"),
    Check("limits", machine.read_limits, compare.limits,
          "ulimit -n, ulimit -l unlimited; docker --shm-size, or a larger emptyDir"),
    Check("jit locks", lambda run: check_extension_locks(run.ranks), None, "delete the lock"),
    Check("plan", machine.check_plan, None, "see launch/plan.py"),
    Check("memory", None, compare.below_median_memory, "stop the other processes there"),
    Check("matmul", None, compare.below_median_matmul,
          "check for other processes, heat, lower clocks; leave it out of the hostfile"),
    Check("process group", None, None, NETWORK),
    Check("pairs in a machine", None, compare.below_median_allreduce,
          "check its PCIe and NVLink, and for other processes"),
    Check("pairs of machines", None, compare.below_median_allreduce,
          "check its network cards and cables, NCCL_SOCKET_IFNAME, NCCL_IB_HCA"),
    Check("all ranks", None, compare.allreduce_of_all, NETWORK),
]  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """What is wrong with some ranks of one machine."""

    check: str
    host: str
    ranks: list[int]
    what: str
    remedy: str

    def __str__(self) -> str:
        """Return the line that is printed."""
        ranks = ", ".join(map(str, self.ranks))
        return f"{self.host} (rank {ranks}): {self.check}: {self.what}. Fix: {self.remedy}"


@dataclass(frozen=True)
class Outcome:
    """What was seen by each check on all ranks ("": not measured), and what is wrong."""

    seen: dict[str, str]
    findings: list[Finding]


def read_all(run: Run) -> Facts:
    """Return what this rank reads by itself, by check; "errors" says what is wrong with it."""
    facts: Facts = {"errors": {}}
    for check in CHECKS:
        if check.read is None:
            continue
        try:
            facts[check.name] = check.read(run)
        except (ValueError, OSError, RuntimeError) as error:  # the last is CUDA's
            facts["errors"][check.name] = what_and_remedy(error)
    return facts


def what_and_remedy(error: Exception) -> tuple[str, str]:
    """Return what is wrong, and what to do; "" if the error does not say."""
    if isinstance(error, BadInput):
        return f"{error.where}: {error.what}", error.remedy
    return (str(error) or type(error).__name__).splitlines()[0], ""


def compare_all(facts: list[Facts]) -> Outcome:
    """Compare the facts of all ranks; ranks of a machine with the same fault are one finding."""
    outcome = Outcome({}, [])
    for check in CHECKS:
        values = {fact["rank"]: fact[check.name] for fact in facts if check.name in fact}
        seen = "no error" if values else ""
        faults: Faults = {}
        if values and check.compare is not None:
            seen, faults = check.compare(values, facts)
        outcome.seen[check.name] = seen
        ranks = collections.defaultdict(list)
        for fact in facts:
            what, remedy = fact["errors"].get(check.name, (faults.get(fact["rank"]), ""))
            if what:
                ranks[fact["host"], what, remedy or check.remedy].append(fact["rank"])
        for (host, what, remedy), together in ranks.items():
            outcome.findings.append(Finding(check.name, host, together, what, remedy))
    return outcome
