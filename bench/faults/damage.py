"""Damage to checkpoints of every kind, and a shard cut while it is read (for mishaps.py)."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CUTS = (0, 1, 0.3, 0.999)  # bytes, or parts of a file
FLIPS = 50
START_S = 60  # to say no

Result = dict[str, Any]


def damage(step: Path, other_step: Path, copy: Path, rng: random.Random) -> Result:
    """Damage each file of a checkpoint in every way; each must be named by somebody."""
    from checkpoint.manifest import read_manifest, verify_files

    def is_named(name: str) -> bool:
        try:
            manifest = read_manifest(copy)
            for rank in range(manifest.world_size):
                verify_files(copy, manifest, rank, manifest.world_size)
        except ValueError as error:
            return name in str(error)
        return False

    n_tries, missed = 0, []
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
        yield f"cut to {cut}", raw[: cut if isinstance(cut, int) else int(cut * len(raw))]
    for i in range(FLIPS):
        yield f"bit flip {i}", flip(raw, rng)
    if path.name != MANIFEST:
        yield "of another step", (other_step / path.name).read_bytes()


def flip(raw: bytes, rng: random.Random) -> bytes:
    """Return the bytes with one bit flipped."""
    position = rng.randrange(len(raw))
    return raw[:position] + bytes([raw[position] ^ 1 << rng.randrange(8)]) + raw[position + 1 :]


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

    data, log = run_dir.with_suffix(".data"), run_dir.with_suffix(".log")
    for path in (run_dir, data):
        shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(folder / "data", data)
    shard = min(data.glob("*_train_*"))
    command = [*arguments(folder, run_dir, 1, 10**6), "--data_dir", str(data)]
    run = Run(command, 2, log)
    while newest_step(run_dir) < 3 and not run.poll():
        time.sleep(0.05)
    os.truncate(shard, 4096)
    ended_s = run.wait(END_S)
    result = judge(run_dir, ended_s, run.statuses)
    if -signal.SIGBUS not in run.statuses.values() or "Fatal Python error" not in log.read_text(
        encoding="utf-8"
    ):
        result |= {"ok": False, "problem": "no rank died of SIGBUS with its stack"}
    log.unlink()
    again = Run(command, 2, log)
    again.wait(START_S)
    if set(again.statuses.values()) != {2} or f"error: {shard}: " not in log.read_text(
        encoding="utf-8"
    ):
        result |= {"ok": False, "problem": "the next start did not name the shard"}
    return result
