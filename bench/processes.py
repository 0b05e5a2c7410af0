"""Start the processes of a measurement: flags, ports, environments; wait for them."""

import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

RANK_VARIABLES = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)


def flags(**values: object) -> list[str]:
    """Return a command line: --name and value of each."""
    words = []
    for name, value in values.items():
        words += [f"--{name}", str(value)]
    return words


def free_port() -> int:
    """Return a TCP port of this machine that nothing listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def rank_variables(rank: int, world_size: int, port: int) -> dict[str, str]:
    """Return the environment of a rank on this machine, as a launcher sets it."""
    numbers = (rank, rank, world_size, world_size)
    values = [*map(str, numbers), "127.0.0.1", str(port)]
    return dict(zip(RANK_VARIABLES, values, strict=True))


def environment_without_ranks() -> dict[str, str]:
    """Return this process's environment as it was before a launcher made it a rank."""
    return {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}


def wait_until(condition: Callable[[], object], timeout_s: float) -> bool:
    """Return whether a condition comes to hold in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def memory_mib(field: str) -> float:
    """Return resident memory ("VmRSS") of this process or its peak ("VmHWM"), on Linux."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    raise OSError(f"/proc/self/status has no {field}. Fix: measure on Linux")
