"""List what each kind of device can do by its data sheet, and what share of it a GPT gets."""

import contextlib
from dataclasses import dataclass
from pathlib import Path

import psutil

from errors import BadInput

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """One device in the machine that it is usually sold in.

    Attributes:
        kind: Its name here.
        memory_bytes: That its driver shows.
        flops: Dense bf16 peak with fp32 sums, FLOP/s.
        memory_bytes_s: Of its own memory.
        peer_bytes_s: To the other devices of its machine, in each direction.
        network_bytes_s: To other machines, for each device and direction.
        host_bytes: Of its machine's own memory, for each device.
        host_bytes_s: To that memory, in each direction.
        matmul_share: Of `flops` that a GPT's matrix products get, in the long run.
        attention_share: The same for attention.
        on_gpu: Whether it is one.
    """

    kind: str
    memory_bytes: int
    flops: float
    memory_bytes_s: float
    peer_bytes_s: float
    network_bytes_s: float
    host_bytes: int
    host_bytes_s: float
    matmul_share: float
    attention_share: float
    on_gpu: bool = True


# Sources: NVIDIA's data sheets of A100 (40GB and 80GB SXM), H100 SXM, H200 SXM, DGX B200 and L40S,
# its Ada GPU architecture paper (4090), AMD's data sheet of MI300X; memory as drivers show it.
# Machines of eight. Networks and memory of the machine are those of DGX A100 (200 Gbit/s and 128 or
# 256 GiB for each device), H100 and H200 (400, 256), B200 (400, 512) and their like; of the PCIe
# cards a guess: 100 Gbit/s, 64 GiB. PCIe gives 25 GB/s in generation 4 and 50 in generation 5.
# The shares of A100 and H100 are fitted to llm.c's runs (docs/SCALING.md); the others have those of
# the nearest, MI300X and B200 less, for want of such runs. On two AVX-512 cores in bf16 (AMD EPYC,
# docs/BENCHMARKS.md) it is what products reach that stands for the peak.
_DEVICES = (
    Device("a100-40", 40 * GIB, 312e12, 1.555e12, 300e9, 25e9, 128 * GIB, 25e9, 0.73, 0.4),
    Device("a100", 80 * GIB, 312e12, 2.039e12, 300e9, 25e9, 256 * GIB, 25e9, 0.73, 0.4),
    Device("h100", 80 * GIB, 989e12, 3.35e12, 450e9, 50e9, 256 * GIB, 50e9, 0.54, 0.35),
    Device("h200", 140 * GIB, 989e12, 4.8e12, 450e9, 50e9, 256 * GIB, 50e9, 0.54, 0.35),
    Device("b200", 179 * GIB, 2250e12, 8e12, 900e9, 50e9, 512 * GIB, 50e9, 0.5, 0.3),
    Device("l40s", 45 * GIB, 362e12, 0.864e12, 25e9, 12.5e9, 64 * GIB, 25e9, 0.73, 0.4),
    Device("4090", 24 * GIB, 165e12, 1.008e12, 25e9, 12.5e9, 64 * GIB, 25e9, 0.73, 0.4),
    Device("mi300x", 192 * GIB, 1307e12, 5.3e12, 448e9, 50e9, 256 * GIB, 50e9, 0.4, 0.3),
    Device("cpu", 24 * GIB, 0.4e12, 20e9, 5e9, 1e9, 24 * GIB, 20e9, 0.75, 0.4, on_gpu=False),
)
DEVICES = {device.kind: device for device in _DEVICES}
SLOWER = {"H100 PCIe": 756e12, "H100 NVL": 835e12}  # NVIDIA H100 data sheet, FLOP/s


def get_device(kind: str) -> Device:
    """Return the device called `kind`, in lower or upper case.

    Raises:
        BadInput: No such kind; the message lists them all.
    """
    if kind.lower() not in DEVICES:
        raise BadInput(f"--device {kind}", "unknown", f"choose from {', '.join(DEVICES)}")
    return DEVICES[kind.lower()]


def flops_of(name: str) -> float | None:
    """Return the peak in FLOP/s of a GPU by the name it gives itself; None if not known."""
    peaks = SLOWER | {kind.upper(): gpu.flops for kind, gpu in DEVICES.items() if gpu.on_gpu}
    return next((flops for part, flops in peaks.items() if part in name), None)


def machine_bytes(
    groups: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> int:
    """Return the memory of this machine, or what its control groups let this process have.

    Args:
        groups: Lists them, a line `number:controllers:path` each; version 2 names no controllers.
        root: Where they are mounted.
    """
    limits = [psutil.virtual_memory().total]
    lines = groups.read_text(encoding="utf-8").splitlines() if groups.exists() else []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        is_version_1 = bool(controllers)
        if is_version_1 and "memory" not in controllers.split(","):
            continue
        name = "memory.limit_in_bytes" if is_version_1 else "memory.max"
        group = root / ("memory" if is_version_1 else "") / path.lstrip("/")
        for folder in (group, *group.parents):
            with contextlib.suppress(OSError, ValueError):  # no limit there; or "max"
                limits.append(int((folder / name).read_text(encoding="utf-8")))
    return min(limits)
