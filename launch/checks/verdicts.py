"""What is unfit among the facts that all ranks gave: pure functions, and every threshold.

A fact is compared with that of most ranks, or with the better of the two middle ones: with two
ranks, with the other one.
"""

from __future__ import annotations

import collections
import ipaddress
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

CLOCK_S = 1.0
MEMORY = 0.9  # of the median
MATMUL = {"cpu": 0.5, "cuda": 0.85}  # of the median: the cores of a CPU are shared with others
BANDWIDTH = {"cpu": 0.33, "cuda": 0.7}  # of the median
LATENCY = {"cpu": 10.0, "cuda": 3.0}  # times the median
FILES, FILES_PER_RANK = 256, 8  # libraries; connections to one rank; and a file for each shard
SHM_BYTES = 2**30  # NVIDIA's advice for containers; NCCL takes it between the GPUs of a machine
GIB = 2**30

Facts = dict[str, Any]  # of one rank: rank, host, errors by check, and by check what it found
Faults = dict[int, tuple[str, str]]  # by rank: what is wrong, and the remedy


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
        ranks = f"rank {_numbers(self.ranks)}"
        return f"{self.host} ({ranks}): {self.check}: {self.what}. Fix: {self.remedy}"


@dataclass(frozen=True)
class Verdict:
    """One check: what was seen on all ranks, and what is wrong."""

    check: str
    seen: str
    findings: list[Finding]


def judge(facts: list[Facts]) -> list[Verdict]:
    """Return the verdict of each check on the facts of all ranks; "" was seen: not measured."""
    verdicts = []
    for check, compare in CHECKS.items():
        given = [fact for fact in facts if check in fact]
        seen, faults = compare(check, given) if given else ("", {})
        for fact in facts:
            if error := fact["errors"].get(check):
                what, _, remedy = error.partition(". Fix: ")
                faults[fact["rank"]] = (what, remedy or REMEDIES[check])
        verdicts.append(Verdict(check, seen, by_host(check, facts, faults)))
    return verdicts


def by_host(check: str, facts: list[Facts], faults: Faults) -> list[Finding]:
    """Join the ranks of a machine that have the same fault."""
    groups: dict[tuple[str, str, str], list[int]] = {}
    for rank, fault in sorted(faults.items()):
        groups.setdefault((facts[rank]["host"], *fault), []).append(rank)
    return [Finding(check, host, ranks, *fault) for (host, *fault), ranks in groups.items()]


def same(check: str, facts: list[Facts]) -> tuple[str, Faults]:
    """Find the ranks that say something else than most."""
    usual, faults = {}, collections.defaultdict(list)
    for name in sorted({name for fact in facts for name in fact[check]}):
        values = {fact["rank"]: fact[check].get(name, "not set") for fact in facts}
        usual[name] = collections.Counter(values.values()).most_common(1)[0][0]
        for rank, value in values.items():
            if value != usual[name]:
                faults[rank].append(f"{name} {value}, most have {usual[name]}")
    seen = " | ".join(f"{name} {value}" for name, value in usual.items()) or "none set"
    remedy = REMEDIES[check]
    return seen, {rank: ("; ".join(whats), remedy) for rank, whats in faults.items()}


def alike(check: str, facts: list[Facts]) -> tuple[str, Faults]:
    """Find the ranks that say something else than most, where there is much to say."""
    return f"{len(facts[0][check])} compared", same(check, facts)[1]


def clock(check: str, facts: list[Facts]) -> tuple[str, Faults]:
    """Find the ranks whose clock is more than CLOCK_S from the median."""
    median = statistics.median_low(fact[check] for fact in facts)
    ahead_s = {fact["rank"]: fact[check] - median for fact in facts}
    faults = {
        rank: (f"{seconds:+.1f} s from the median", "let chrony or ntpd set it")
        for rank, seconds in ahead_s.items()
        if abs(seconds) > CLOCK_S
    }
    return f"within {max(ahead_s.values()) - min(ahead_s.values()):.3f} s", faults


def names(check: str, facts: list[Facts]) -> tuple[str, Faults]:
    """Find machines that take themselves for 127.0.0.1: gloo would tell the others so."""
    faults: Faults = {}
    hosts = {fact["host"] for fact in facts}
    for fact in facts:
        is_loopback = all(ipaddress.ip_address(a).is_loopback for a in fact[check])
        chosen = "GLOO_SOCKET_IFNAME" in fact.get("variables", {})
        if len(hosts) > 1 and is_loopback and not chosen and is_on(fact, "cpu"):
            what = f"its own name stands for {', '.join(fact[check])}"
            faults[fact["rank"]] = (what, "set GLOO_SOCKET_IFNAME, or mend /etc/hosts")
    return f"{len(hosts)} {'machine' if len(hosts) == 1 else 'machines'}", faults


def reach(check: str, facts: list[Facts]) -> tuple[str, Faults]:
    """Find the rank of each pair without a connection that has more such pairs."""
    pairs = [(fact["rank"], other) for fact in facts for other in fact[check]]
    count = collections.Counter(rank for pair in pairs for rank in pair)
    cut = collections.defaultdict(list)
    for pair in pairs:
        one, other = sorted(pair, key=lambda rank: count[rank])
        cut[other].append(one)
    faults = {
        rank: (f"no connection with rank {_numbers(others)}", "open the firewall, see its network")
        for rank, others in cut.items()
    }
    total = len(facts) ** 2
    return f"{total - len(pairs)} of {total} connections", faults


def room(check: str, facts: list[Facts]) -> tuple[str, Faults]:
    """Find the ranks whose run folder has no room for what the run will write."""
    faults: Faults = {}
    for fact in facts:
        free, needed = fact[check]["room_bytes"], fact[check]["needed_bytes"]
        if free < needed:
            what = f"room for {free / GIB:.2f} GiB, its checkpoints take {needed / GIB:.2f}"
            faults[fact["rank"]] = (what, "make room, or keep fewer: --keep_checkpoints")
    least = min(fact[check]["room_bytes"] for fact in facts)
    needed = max(fact[check]["needed_bytes"] for fact in facts)
    return f"room for {least / GIB:.2f} GiB, {needed / GIB:.2f} needed", faults


def shared(check: str, facts: list[Facts]) -> tuple[str, Faults]:
    """Find the ranks that do not see what rank 0 wrote."""
    fault = "not the folder that rank 0 writes to", REMEDIES[check]
    faults: Faults = {fact["rank"]: fault for fact in facts if not fact[check]}
    return f"{len(facts) - len(faults)} of {len(facts)} ranks see what rank 0 writes", faults


def limits(check: str, facts: list[Facts]) -> tuple[str, Faults]:
    """Find what a process may take too little of."""
    found: dict[int, list[tuple[str, str]]] = collections.defaultdict(list)
    for fact in facts:
        limit, rank = fact[check], fact["rank"]
        files = FILES + FILES_PER_RANK * len(facts) + limit["shards"]
        if 0 <= limit["open_files"] < files:
            what = f"{limit['open_files']} open files, {files} may be needed"
            found[rank].append((what, f"ulimit -n {files}"))
        if limit["has_infiniband"] and limit["memlock_bytes"] >= 0:
            what = f"{limit['memlock_bytes']} bytes of locked memory, InfiniBand needs all"
            found[rank].append((what, "ulimit -l unlimited"))
        if is_on(fact, "cuda") and limit["shm_bytes"] < SHM_BYTES:
            what = f"{limit['shm_bytes'] / GIB:.2f} GiB free in /dev/shm, NCCL needs 1"
            found[rank].append((what, "docker --shm-size, or a larger emptyDir"))
    open_files = min(fact[check]["open_files"] for fact in facts)
    seen = f"{open_files} open files" if open_files >= 0 else "open files without limit"
    return seen, {
        rank: ("; ".join(what for what, _ in each), "; ".join(remedy for _, remedy in each))
        for rank, each in found.items()
    }


def no_error(check: str, facts: list[Facts]) -> tuple[str, Faults]:
    """Return what was seen of a check whose only faults are errors."""
    return ", ".join(sorted({fact[check] for fact in facts})), {}


def little(check: str, facts: list[Facts]) -> tuple[str, Faults]:
    """Find the ranks with less memory than most."""
    return _below_median(check, {f["rank"]: f[check] for f in facts}, MEMORY, GIB, "GiB")


def slow(check: str, facts: list[Facts]) -> tuple[str, Faults]:
    """Find the ranks that multiply matrices slower than most."""
    values = {fact["rank"]: fact[check] for fact in facts}
    return _below_median(check, values, MATMUL[facts[0]["device"]["kind"]], 1e12, "TFLOP/s")


def apart(check: str, facts: list[Facts]) -> tuple[str, Faults]:
    """Find the ranks whose all-reduces are slower, or later, than most."""
    device = facts[0]["device"]["kind"]
    speeds = {fact["rank"]: fact[check]["bytes_per_s"] for fact in facts}
    seen, faults = _below_median(check, speeds, BANDWIDTH[device], 1e9, "GB/s")
    delays = {fact["rank"]: fact[check]["latency_s"] for fact in facts}
    median = statistics.median_low(delays.values())
    for rank, delay in delays.items():
        if delay > LATENCY[device] * median and rank not in faults:
            what = f"{delay * 1e6:.0f} µs, the median is {median * 1e6:.0f}"
            faults[rank] = (what, REMEDIES[check])
    return f"{seen}; median {median * 1e6:.0f} µs", faults


def together(check: str, facts: list[Facts]) -> tuple[str, Faults]:
    """Return the speed of an all-reduce that all ranks take part in."""
    return apart(check, facts)[0], {}


def _below_median(
    check: str, values: dict[int, float], share: float, unit: float, name: str
) -> tuple[str, Faults]:
    median = statistics.median_high(values.values())
    faults = {
        rank: (f"{v / unit:.3g} {name}, the median is {median / unit:.3g}", REMEDIES[check])
        for rank, v in values.items()
        if v < share * median
    }
    low, high = min(values.values()) / unit, max(values.values()) / unit
    return f"{low:.3g} to {high:.3g} {name}", faults


def is_on(fact: Facts, kind: str) -> bool:
    """Return whether a rank computes on such a device."""
    return fact.get("device", {}).get("kind") == kind


def _numbers(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks))


REMEDIES = {
    "device": "see nvidia-smi, DS_ACCELERATOR and CUDA_VISIBLE_DEVICES there",
    "versions": "install the same everywhere, from constraints.txt",
    "flags": "give the same on every machine",
    "variables": "set it for all: launch/environment.py",
    "shards": "copy the shards again, or give the same --data_dir",
    "run folder shared": "mount the same storage everywhere, give the same --run_dir",
    "memory": "end what else runs there",
    "matmul": "look for other processes, heat, lower clocks; leave it out of the hostfile",
    "process group": "see NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME and the firewall",
    "all ranks": "see NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME and the firewall",
    "pairs in a machine": "look at its PCIe and NVLink, or for other processes",
    "pairs of machines": "look at its network cards and cables, NCCL_SOCKET_IFNAME, NCCL_IB_HCA",
}
CHECKS: dict[str, Callable[[str, list[Facts]], tuple[str, Faults]]] = {
    "answers": no_error,
    "device": same,
    "versions": same,
    "flags": alike,
    "variables": same,
    "clock": clock,
    "names": names,
    "reach": reach,
    "shards": same,
    "run folder": room,
    "run folder shared": shared,
    "limits": limits,
    "jit locks": no_error,
    "plan": no_error,
    "memory": little,
    "matmul": slow,
    "process group": no_error,
    "pairs in a machine": apart,
    "pairs of machines": apart,
    "all ranks": together,
}
