"""Paired ratios of timings that were taken in turns, with a bootstrap interval."""

import platform
import random
import statistics
from dataclasses import dataclass
from pathlib import Path

RESAMPLES = 10_000


@dataclass(frozen=True)
class Ratio:
    """A median of paired ratios and its 95 % interval."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


def paired_ratio(theirs: list[float], ours: list[float]) -> Ratio:
    """Return how many times theirs is ours, pair by pair; bootstrap interval."""
    ratios = [a / b for a, b in zip(theirs, ours, strict=True)]
    rng = random.Random(0)
    medians = sorted(
        statistics.median(rng.choices(ratios, k=len(ratios))) for _ in range(RESAMPLES)
    )
    low, high = medians[int(0.025 * RESAMPLES)], medians[int(0.975 * RESAMPLES)]
    return Ratio(statistics.median(ratios), low, high)


def in_turns(names: list[str], blocks: int) -> list[list[str]]:
    """Return the order of each block: forwards, backwards, forwards …"""
    return [names if block % 2 == 0 else names[::-1] for block in range(blocks)]


def describe_machine() -> str:
    """Return processor, cores and Python for people."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    name = models[0] if models else platform.processor()
    return f"{len(models)} x {name}, Python {platform.python_version()}"
