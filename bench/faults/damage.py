"""Damage checkpoints in every way, and cut a shard while it is read (for mishaps.py)."""

from __future__ import annotations

import os
import random
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CUTS = (0, 1, 0.3, 0.999)  # bytes, or parts of a file
FLIPS = 50
START_S = 60  # for a start that must be refused

Result = dict[str, Any]


def damage(step: Path, other_step: Path, copy: Path, rng: random.Random) -> Result:
    """Damage each file of a checkpoint in every way; an error must name each."""
    from checkpoint.manifest import read_manifest, verify_files

    def is_named(name: str) -> bool:
        try:
            manifest = read_manifest(copy)
            for rank in range(manifest.world_size):
                verify_files(copy, manifest, rank, manifest.world_size)
        except ValueError as error:
            return name in str(error)
        return False

    n_tries = 0
    missed = []
    for path in sorted(step.iterdir()):
        for way, changed in damages(path, other_step, rng):
            shutil.copytree(step, copy)
            (copy / path.name).unlink()
            if changed is not None:
                (copy / path.name).write_bytes(changed)
            n_tries += 1
            if not is_named(path.name):
                missed.append(f"{path.name}: {way}")
            shutil.rmtree(copy)
    return {"tries": n_tries, "missed": missed, "ok": not missed}


def damages(path: Path, other_step: Path, rng: random.Random) -> Iterator[tuple[str, bytes | None]]:
    """Yield ways to damage a file of a checkpoint, with what is left of it."""
    from checkpoint.manifest import MANIFEST

    raw = path.read_bytes()
    yield "missing", None
    for cut in CUTS:
        size = cut if isinstance(cut, int) else int(cut * len(raw))
        yield f"cut to {cut}", raw[:size]
    for i in range(FLIPS):
        yield f"bit flip {i}", flip(raw, rng)
    if path.name != MANIFEST:
        yield "of another step", (other_step / path.name).read_bytes()


def flip(raw: bytes, rng: random.Random) -> bytes:
    """Return the bytes with one bit flipped."""
    flipped = bytearray(raw)
    position = rng.randrange(len(raw))
    flipped[position] ^= 1 << rng.randrange(8)
    return bytes(flipped)


def two_checkpoints(folder: Path) -> list[Path]:
    """Train two ranks for six steps; return the two step folders."""
    from bench.faults.forks import Run
    from bench.faults.kills import arguments
    from checkpoint.manifest import complete_steps

    run_dir = folder / "undamaged"
    Run(arguments(folder, run_dir, 1, 6), 2, run_dir.with_suffix(".log")).wait(120)
    return complete_steps(run_dir / "checkpoints")


def cut_shard(folder: Path, run_dir: Path) -> Result:
    """Cut a shard under a run, which dies of it; the next start must name the file."""
    from bench.faults.forks import Run
    from bench.faults.kills import END_S, arguments, judge, newest_step

    data = run_dir.with_suffix(".data")
    log = run_dir.with_suffix(".log")
    for path in (run_dir, data):
        shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(folder / "data", data)
    shard = min(data.glob("*_train_*"))
    command = [*arguments(folder, run_dir, 1, 10**6), "--data_dir", str(data)]
    run = Run(command, 2, log)
    run.wait_until(lambda: newest_step(run_dir) >= 3)
    os.truncate(shard, 4096)
    ended_s = run.wait(END_S)
    result = judge(run_dir, ended_s, run.statuses)
    has_stack = "Fatal Python error" in log.read_text(encoding="utf-8")
    if -signal.SIGBUS not in run.statuses.values() or not has_stack:
        result |= {"ok": False, "problem": "no rank died of SIGBUS with its stack"}
    log.unlink()
    again = Run(command, 2, log)
    again.wait(START_S)
    is_named = f"error: {shard}: " in log.read_text(encoding="utf-8")
    if set(again.statuses.values()) != {2} or not is_named:
        result |= {"ok": False, "problem": "the next start did not name the shard"}
    return result
