"""Time the device of this process; hold the sizes that stages train at."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.processes import environment_without_ranks
from bench.speed import attention
from training.ranks import Ranks
from training.rendezvous import choose_device

ROOT = Path(__file__).resolve().parents[2]
Row = dict[str, Any]  # what a stage found, for JSON


@dataclass(frozen=True)
class Sizes:
    """What a side of bench/speed/side.py trains; the names are its flags."""

    model: str = "gpt2"
    seq_len: int = 1024
    micro_batch_size: int = 64
    grad_accum: int = 1

    @property
    def tokens(self) -> int:
        """Return the tokens of an optimizer step."""
        return self.micro_batch_size * self.seq_len * self.grad_accum


@dataclass(frozen=True)
class Options:
    """What the command line gives to a stage.

    Attributes:
        data_dir: Folder of token shards.
        tiny: Whether to take sizes for a CPU.
        curve_steps: Of the stage curve.
    """

    data_dir: Path
    tiny: bool = False
    curve_steps: int = 180

    def sizes(self, kind: str = "speed", **more: Any) -> Sizes:
        """Return the sizes to time ("speed") or to compare ("parity"), with some changed."""
        if self.tiny:
            return Sizes("debug", 32, 2, 1)
        sizes = Sizes() if kind == "speed" else Sizes("30m", 256, 8, 2)
        return dataclasses.replace(sizes, **more)


def device() -> torch.device:
    """Return the device of this process."""
    return choose_device(Ranks())


def on_gpu() -> bool:
    """Return whether it is a GPU."""
    return device().type == "cuda"


def wait() -> None:
    """Wait until the device has done what is queued."""
    if on_gpu():
        torch.cuda.synchronize()


def median_ms(run: Callable[[], object], repeats: int = 20, warm_up: int = 3) -> float:
    """Return the median time of a call."""
    return round(attention.median_ms(run, device().type, repeats, warm_up), 4)


def seconds(run: Callable[[], object]) -> float:
    """Return the time of one call, until the device has done it."""
    started = time.perf_counter()
    run()
    wait()
    return round(time.perf_counter() - started, 3)


def take_memory_peaks() -> Row:
    """Return the peaks of a GPU's memory in GiB, and reset them; nothing on a CPU."""
    if not on_gpu():
        return {}
    peaks = {
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2),
    }
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return peaks


def run_program(command: list[str], timeout_s: float) -> Row:
    """Run a program in the repository root, not as a rank; return its status and its output."""
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=environment_without_ranks(),
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        timeout=timeout_s,
    )
    return {
        "status": done.returncode,
        "s": round(time.perf_counter() - started, 1),
        "stdout": done.stdout[-2000:],
        "stderr": done.stderr[-3000:],
    }
