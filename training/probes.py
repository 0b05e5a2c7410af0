"""Measure how fast a device multiplies matrices, and latency and bandwidth of all-reduces."""

import datetime
import functools
import math
import time
from typing import Any

import torch
import torch.distributed as dist

# Rows and columns of the matrix, and its dtype.
MATMUL = {"cpu": (512, torch.float32), "cuda": (8192, torch.bfloat16)}
MATMUL_S = 0.3  # of repetitions, of which the fastest counts: others may use the machine too
ALLREDUCE_ELEMENTS = {"cpu": 2**20, "cuda": 2**26}  # fp32
ALLREDUCE_TIMEOUT_S = 20
REPEATS_SMALL = 50
REPEATS = 10


def multiply(a: torch.Tensor) -> None:
    """Multiply a square matrix by itself and wait for the result."""
    torch.mm(a, a)
    if a.is_cuda:
        torch.cuda.synchronize()


def measure_matmul(device: torch.device) -> float:
    """Return the floating-point operations per second of the fastest product."""
    n, dtype = MATMUL[device.type]
    a = torch.randn(n, n, device=device, dtype=dtype)
    multiply(a)  # loads the library
    fastest_s = math.inf
    deadline = time.perf_counter() + MATMUL_S
    while time.perf_counter() < deadline:
        started = time.perf_counter()
        multiply(a)
        fastest_s = min(fastest_s, time.perf_counter() - started)
    return 2 * n**3 / fastest_s


def measure_allreduce(
    name: str, group_ranks: list[int], device: torch.device
) -> dict[str, float] | None:
    """Return latency and bus bandwidth of an all-reduce in a group (all ranks).

    Each rank gives its own group; a group of one rank measures nothing and returns None.

    Args:
        name: The same name gives the same process group again.
        group_ranks: The group of this rank.
        device: Of this rank.

    Raises:
        RuntimeError: It failed, or took longer than ALLREDUCE_TIMEOUT_S.
    """
    group = _group(name, tuple(group_ranks))
    if len(group_ranks) == 1:
        return None
    large = torch.ones(ALLREDUCE_ELEMENTS[device.type], device=device)
    latency_s = _fastest_allreduce_s(large[:1], group, REPEATS_SMALL)
    seconds = _fastest_allreduce_s(large, group, REPEATS)
    sent_bytes = 2 * (1 - 1 / len(group_ranks)) * large.nbytes  # from each rank, in a ring
    return {"bytes_per_s": sent_bytes / seconds, "latency_s": latency_s}


@functools.cache
def _group(name: str, ranks: tuple[int, ...]) -> Any:
    # All ranks make as many groups: PyTorch names a group after its ranks and how many there are.
    # Without local synchronization each of them would wait for all ranks.
    del name  # only the cache distinguishes by it
    timeout = datetime.timedelta(seconds=ALLREDUCE_TIMEOUT_S)
    return dist.new_group(list(ranks), timeout, use_local_synchronization=True)


def better_allreduce(one: dict[str, float], other: dict[str, float]) -> dict[str, float]:
    """Return the higher bandwidth and the lower latency of two measurements."""
    return {
        "bytes_per_s": max(one["bytes_per_s"], other["bytes_per_s"]),
        "latency_s": min(one["latency_s"], other["latency_s"]),
    }


def _fastest_allreduce_s(tensor: torch.Tensor, group: Any, repeats: int) -> float:
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group)  # the ranks of the group
        if tensor.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return min(times)
