"""Measure training: speed of each side, parity, host waits, profiles, curves, offload."""

from __future__ import annotations

import argparse
import collections
import gc
import itertools
import resource
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from bench.fidelity.parity import largest_difference
from bench.gpu.device import (
    Options,
    Row,
    Sizes,
    device,
    on_gpu,
    run_program,
    take_memory_peaks,
    wait,
)
from bench.processes import flags
from bench.record import load_json_lines
from bench.speed.side import build_run, run_engine, run_plain
from training.ranks import Ranks
from training.run import Run

if TYPE_CHECKING:
    from bench.speed.side import Turns

LINEAR = F.linear  # zero.Init replaces it and does not put it back
TOLERANCE = 2e-3  # nats over 25 steps in bf16; on a CPU up to 4.2e-4, and 9.3e-4 over 200
ENGINES = ("zero0", "zero1", "zero2", "zero3")


def train(options: Options, side: str, sizes: Sizes, turns: Turns) -> tuple[Run, list[float]]:
    """Train a side of bench/speed/side.py in this process, a step for each turn."""
    F.linear = LINEAR
    losses: list[float] = []
    args = argparse.Namespace(side=side, data_dir=options.data_dir, **vars(sizes))
    with tempfile.TemporaryDirectory() as run_dir:
        run = build_run(args, Path(run_dir), Ranks())
        if side.startswith("zero"):
            run_engine(run, losses, turns)
        else:
            run_plain(run, side, losses, turns)
    gc.collect()
    return run, losses


def steps_of(n: int) -> Turns:
    """Return turns for n steps."""
    return lambda *_: itertools.repeat(None, n)


def speed(options: Options, side: str, steps: int = 10, **more: int | str) -> Row:
    """Time a side: three blocks of steps, after five."""
    sizes = options.sizes("speed", **more)
    steps, blocks, warm_up = (4, 2, 1) if options.tiny else (steps, 3, 5)
    times: list[float] = []

    def turns(*_: object) -> Iterator[None]:
        take_memory_peaks()
        yield from [None] * warm_up
        while len(times) < blocks:
            wait()
            started = time.perf_counter()
            yield from [None] * steps
            wait()
            times.append((time.perf_counter() - started) / steps)

    run, losses = train(options, side, sizes, turns)
    per_second = round(sizes.tokens / statistics.median(times))
    found: Row = {
        "side": side,
        **vars(sizes),
        "tokens_per_s": per_second,
        "ms": round(1e3 * statistics.median(times), 2),
        "blocks_ms": [round(1e3 * t, 2) for t in times],
        "losses": [round(loss, 5) for loss in losses],
        **take_memory_peaks(),
    }
    return found | _against_the_plan(run, side, per_second)


def _against_the_plan(run: Run, side: str, tokens_per_s: int) -> Row:
    from launch.planning.fitting import plan_here
    from training import memory
    from training.metrics import peak_flops

    peak = peak_flops(device())
    flops = run.config.gpt_config.flops_per_token(run.config.seq_len)
    found: Row = {"mfu_palm": round(tokens_per_s * flops / peak, 4) if peak else None}
    if side.startswith("zero"):
        planned = plan_here(run, device())
        found |= {
            "planned_gib": round(sum(memory.peak(planned.share).values()) / 2**30, 2),
            "memory_use": str(planned.share.memory_use),
        }
    return found


def parity(options: Options) -> Row:
    """zero0 to zero3 against plain loops: the same weights, the same batches, 25 steps."""
    steps = 4 if options.tiny else 25

    def losses_of(side: str) -> list[float]:
        return train(options, side, options.sizes("parity"), steps_of(steps))[1]

    plain = {side: losses_of(side) for side in ("seed", "bare1")}
    found: Row = {}
    for side in ENGINES:
        same_arithmetic = plain["seed" if side == "zero0" else "bare1"]
        found[side] = largest_difference(losses_of(side), same_arithmetic)
    ok = all(found[side] < TOLERANCE for side in ENGINES)
    found["plain loops"] = largest_difference(plain["seed"], plain["bare1"])
    return found | {"last": plain["seed"][-1], "ok": ok}


def host_waits(options: Options) -> Row:
    """Where and how often a step of each stage makes the host wait for the GPU."""
    found: Row = {}
    for side in ENGINES:
        waits: collections.Counter[str] = collections.Counter()

        def turns(*_: object, waits: collections.Counter[str] = waits) -> Iterator[None]:
            yield from [None] * 3
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                if on_gpu():
                    torch.cuda.set_sync_debug_mode("warn")
                yield
                if on_gpu():
                    torch.cuda.set_sync_debug_mode("default")
            for warning in caught:
                path = Path(warning.filename)
                is_own_sum = path.parts[-2:] == ("training", "rendezvous.py")  # sum_tensor
                if "synchroniz" in str(warning.message) and not is_own_sum:
                    waits[f"{'/'.join(path.parts[-3:])}:{warning.lineno}"] += 1

        train(options, side, options.sizes("parity"), turns)
        found[side] = dict(waits.most_common(20))
    return found


def profile(options: Options) -> Row:
    """Which kernels two steps launch, and how long they keep the GPU busy."""
    from torch._C._autograd import DeviceType
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as trace

    found: Row = {}
    for side in ("zero1", "zero1+compile"):

        def turns(*_: object, side: str = side) -> Iterator[None]:
            yield from [None] * 4
            wait()
            kinds = [ProfilerActivity.CPU]
            if on_gpu():
                kinds.append(ProfilerActivity.CUDA)
            started = time.perf_counter()
            with trace(activities=kinds) as traced:
                yield
                yield
                wait()
            wall_ms = 1e3 * (time.perf_counter() - started)
            which = "self_device_time_total" if on_gpu() else "self_cpu_time_total"
            kind = DeviceType.CUDA if on_gpu() else DeviceType.CPU
            events = [event for event in traced.key_averages() if event.device_type == kind]
            events = [event for event in events if not event.is_user_annotation]
            events.sort(key=lambda e: -getattr(e, which))
            top = [(e.key[:60], e.count, round(getattr(e, which) / 1e3, 2)) for e in events[:28]]
            busy_ms = sum(getattr(e, which) for e in events) / 1e3
            found[side] = {"wall_ms": round(wall_ms, 1), "busy_ms": round(busy_ms, 1), "top": top}

        train(options, side, options.sizes(), turns)
    return found


def curve(options: Options) -> Row:
    """`train.py`, compiled, on real text, against the seed's plain loop on the same batches."""
    sizes = options.sizes()
    steps = 6 if options.tiny else options.curve_steps
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        command = flags(
            model=sizes.model,
            data_dir=options.data_dir,
            run_dir=run_dir,
            seq_len=sizes.seq_len,
            micro_batch_size=sizes.micro_batch_size,
            batch_tokens=sizes.tokens,
            max_steps=steps,
            warmup_steps=0,
            min_lr_ratio=1.0,
            lr=6e-4,
            eval_every=steps,
            hellaswag_every=0,
            eval_tokens=640 if options.tiny else 262_144,
            sample_tokens=4,
            compile="auto",
        )
        program = run_program(["train.py", *command], timeout_s=250)
        rows = load_json_lines(run_dir / "metrics.jsonl")
    steps_logged = [row for row in rows if "train/loss" in row]
    ours = [row["train/loss"] for row in steps_logged]
    theirs = train(options, "seed", sizes, steps_of(steps))[1]
    # Of the steps that both have: a run that failed has fewer.
    differences = [abs(a - b) for a, b in zip(ours[1:], theirs[1:], strict=False)]
    return {
        "status": program["status"],
        "stderr": program["stderr"][-400:],
        "ours": ours,
        "seed": theirs,
        "tokens_per_s": [row["perf/tokens_per_s"] for row in steps_logged][-3:],
        "val": [row["val/loss"] for row in rows if "val/loss" in row],
        "largest_apart": max(differences, default=None),
        "ok": program["status"] == 0 and len(ours) == steps,
    }


def offload(options: Options) -> Row:
    """gpt3-2.7b with optimizer and weights in the machine's memory, and its peak."""
    sizes = {"model": "gpt3-2.7b", "seq_len": 2048, "micro_batch_size": 4}
    found = speed(options, "zero3_offload", 1, **sizes)
    host_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return found | {"host_gib": round(host_gib, 1)}
