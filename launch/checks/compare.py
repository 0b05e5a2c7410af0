"""Compare what all ranks have read: pure functions, and every threshold.

A value is compared with that of most ranks, or with the median: the better of the two middle
values, so that of two ranks the slower one is found.
"""

from __future__ import annotations

import collections
import ipaddress
import statistics
from typing import Any

from training.devices import GIB

CLOCK_S = 1.0
MEMORY = 0.9  # of the median
MATMUL = {"cpu": 0.5, "cuda": 0.85}  # of the median: the cores of a CPU are shared with others
BANDWIDTH = {"cpu": 0.33, "cuda": 0.7}  # of the median
LATENCY = {"cpu": 10.0, "cuda": 3.0}  # times the median
FILES = 256  # of libraries and logs
FILES_PER_RANK = 8  # connections to one rank
SHM_BYTES = 2**30  # NVIDIA's advice for containers; NCCL takes it between the GPUs of a machine

Facts = dict[str, Any]  # of one rank: rank, host, errors by check, and its value by check
Values = dict[int, Any]  # of one check, by rank
Faults = dict[int, str]  # what is wrong, by rank


def differs_from_majority(values: Values, _: list[Facts]) -> tuple[str, Faults]:
    """Find the ranks whose value, a dict, differs from that of most ranks."""
    majority: dict[str, str] = {}
    differences = collections.defaultdict(list)
    for name in sorted(set().union(*values.values())):
        by_rank = {rank: value.get(name, "not set") for rank, value in values.items()}
        majority[name] = statistics.mode(by_rank.values())
        for rank, value in by_rank.items():
            if value != majority[name]:
                differences[rank].append(f"{name} {value}, most have {majority[name]}")
    seen = " | ".join(f"{name} {value}" for name, value in majority.items())
    return seen or "none set", {rank: "; ".join(each) for rank, each in differences.items()}


def flags(values: Values, facts: list[Facts]) -> tuple[str, Faults]:
    """Find the ranks whose flags differ from those of most ranks; there are too many to show."""
    _, faults = differs_from_majority(values, facts)
    return f"{len(next(iter(values.values())))} compared", faults


def clock(values: Values, _: list[Facts]) -> tuple[str, Faults]:
    """Find the ranks whose clock is more than CLOCK_S from the median."""
    median = statistics.median_low(values.values())
    off_s = {rank: time - median for rank, time in values.items()}
    faults = {rank: f"{s:+.1f} s from the median" for rank, s in off_s.items() if abs(s) > CLOCK_S}
    return f"within {max(values.values()) - min(values.values()):.3f} s", faults


def hostnames(values: Values, facts: list[Facts]) -> tuple[str, Faults]:
    """Find machines whose own name resolves to 127.0.0.1: gloo tells the others that address."""
    n_machines = len({facts[rank]["host"] for rank in values})
    faults = {}
    for rank, addresses in values.items():
        asks_for_name = "GLOO_SOCKET_IFNAME" not in facts[rank].get("variables", {})
        uses_gloo = _device_kind(facts[rank]) == "cpu"
        is_loopback = all(ipaddress.ip_address(address).is_loopback for address in addresses)
        if n_machines > 1 and uses_gloo and asks_for_name and is_loopback:
            faults[rank] = f"its own name resolves to {', '.join(addresses)}"
    return f"{n_machines} {'machine' if n_machines == 1 else 'machines'}", faults


def connections(values: Values, _: list[Facts]) -> tuple[str, Faults]:
    """Of two ranks that cannot connect, blame the one with more failed connections."""
    pairs = [(rank, other) for rank, others in values.items() for other in others]
    count = collections.Counter(rank for pair in pairs for rank in pair)
    unreached = collections.defaultdict(list)
    for pair in pairs:
        one, other = sorted(pair, key=lambda rank: count[rank])
        unreached[other].append(str(one))
    faults = {
        rank: f"no connection with rank {', '.join(each)}" for rank, each in unreached.items()
    }
    total = len(values) ** 2
    return f"{total - len(pairs)} of {total} connections", faults


def disk_space(values: Values, _: list[Facts]) -> tuple[str, Faults]:
    """Find the ranks whose run folder has less free space than the run will fill."""
    faults = {
        rank: f"{_gib(value['free_bytes'])} free, checkpoints take {_gib(value['needed_bytes'])}"
        for rank, value in values.items()
        if value["free_bytes"] < value["needed_bytes"]
    }
    least = min(value["free_bytes"] for value in values.values())
    needed = max(value["needed_bytes"] for value in values.values())
    return f"{_gib(least)} free, {_gib(needed)} needed", faults


def shared_folder(values: Values, _: list[Facts]) -> tuple[str, Faults]:
    """Find the ranks that do not see what rank 0 wrote."""
    blind = [rank for rank, sees in values.items() if not sees]
    seen = f"{len(values) - len(blind)} of {len(values)} ranks see what rank 0 writes"
    return seen, dict.fromkeys(blind, "not the folder that rank 0 writes to")


def limits(values: Values, facts: list[Facts]) -> tuple[str, Faults]:
    """Find the ranks whose limits of open files, locked or shared memory are too low."""
    faults = {}
    for rank, value in values.items():
        too_low = []
        files = FILES + FILES_PER_RANK * len(values) + value["shards"]
        if 0 <= value["open_files"] < files:
            too_low.append(f"{value['open_files']} open files, {files} may be needed")
        if value["has_infiniband"] and value["memlock_bytes"] >= 0:
            locked = value["memlock_bytes"]
            too_low.append(f"{locked} bytes of locked memory, InfiniBand needs no limit")
        if _device_kind(facts[rank]) == "cuda" and value["shm_bytes"] < SHM_BYTES:
            too_low.append(f"{_gib(value['shm_bytes'])} free in /dev/shm, NCCL needs 1 GiB")
        if too_low:
            faults[rank] = "; ".join(too_low)
    least = min(value["open_files"] for value in values.values())
    return f"{least} open files" if least >= 0 else "open files without limit", faults


def below_median_memory(values: Values, _: list[Facts]) -> tuple[str, Faults]:
    """Find the ranks with less memory than most."""
    return _below_median(values, MEMORY, GIB, "GiB")


def below_median_matmul(values: Values, facts: list[Facts]) -> tuple[str, Faults]:
    """Find the ranks that multiply matrices slower than most."""
    return _below_median(values, MATMUL[_device_kind(facts[0])], 1e12, "TFLOP/s")


def below_median_allreduce(values: Values, facts: list[Facts]) -> tuple[str, Faults]:
    """Find the ranks whose all-reduces have less bandwidth or more latency than those of most."""
    kind = _device_kind(facts[0])
    bandwidths = {rank: value["bytes_per_s"] for rank, value in values.items()}
    seen, slow = _below_median(bandwidths, BANDWIDTH[kind], 1e9, "GB/s")
    latencies = {rank: value["latency_s"] * 1e6 for rank, value in values.items()}
    median = statistics.median_low(latencies.values())
    late = {rank: us for rank, us in latencies.items() if us > LATENCY[kind] * median}
    faults = {rank: f"{us:.0f} µs, the median is {median:.0f}" for rank, us in late.items()}
    return f"{seen}; median {median:.0f} µs", faults | slow


def allreduce_of_all(values: Values, facts: list[Facts]) -> tuple[str, Faults]:
    """Return the speed of an all-reduce that all ranks take part in: the same for all of them."""
    return below_median_allreduce(values, facts)[0], {}


def _below_median(values: Values, share: float, unit: float, name: str) -> tuple[str, Faults]:
    shown = {rank: value / unit for rank, value in values.items()}
    median = statistics.median_high(shown.values())
    low = {rank: value for rank, value in shown.items() if value < share * median}
    faults = {
        rank: f"{value:.3g} {name}, the median is {median:.3g}" for rank, value in low.items()
    }
    return f"{min(shown.values()):.3g} to {max(shown.values()):.3g} {name}", faults


def _device_kind(fact: Facts) -> str:
    return fact.get("device", {}).get("kind", "")


def _gib(n_bytes: float) -> str:
    return f"{n_bytes / GIB:.2f} GiB"
