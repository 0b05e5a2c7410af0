"""Compare timings that were taken in turns: paired ratios with a bootstrap interval."""

import random
import statistics
from dataclasses import dataclass

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
    """Return how many times ours theirs is, pair by pair, with its bootstrap interval."""
    ratios = [a / b for a, b in zip(theirs, ours, strict=True)]
    rng = random.Random(0)
    medians = sorted(
        statistics.median(rng.choices(ratios, k=len(ratios))) for _ in range(RESAMPLES)
    )
    low, high = medians[int(0.025 * RESAMPLES)], medians[int(0.975 * RESAMPLES)]
    return Ratio(statistics.median(ratios), low, high)


def in_turns(sides: list[str], blocks: int) -> list[str]:
    """Return who is timed when: all forwards, all backwards, all forwards … one block each."""
    there_and_back = sides + sides[::-1]
    return (there_and_back * blocks)[: len(sides) * blocks]
