"""Memory, time and cost of a run before it starts: a calculation, on any laptop.

python launch/plan.py --model gpt3-13b --ds_config ds_configs/zero3.json --nodes 4
python launch/plan.py --model gpt3-13b --nodes 4                    which ds_config?
python launch/plan.py --model all --gpus 8,64,1024

Without --ds_config every file of ds_configs/ is tried, with and without activation checkpointing,
and the cheapest that fits is shown. docs/SCALING.md says how far measurements are from plans.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: import from the repository root, exactly as train.py does
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from launch import memory
from launch.config import MAX_DERIVED_MICRO_BATCH, TrainConfig, resolve_train_config
from launch.devices import DEVICES, GIB, get_device
from launch.ds_config import load_ds_config
from launch.estimate import (
    CHECKPOINTING,
    DEVICE_HOURS_A_FAULT,
    Cluster,
    Estimate,
    estimate,
    largest_fitting,
    rank_candidates,
)
from model import PRESETS
from model.presets import get_preset

SHAPE = ("n_layer", "n_head", "n_embd", "block_size")


def main(argv: list[str]) -> int:
    """Run the command line; return the exit status."""
    args = build_parser().parse_args(argv)
    try:
        check(args)
        if args.gpus or args.model == "all":
            rows = plan_table(args)
            print(json.dumps([to_json(e) for e in rows]) if args.json else table(rows, args))
            return 0
        nodes = 1 if args.nodes is None else args.nodes
        cluster = Cluster(get_device(args.device), nodes, args.gpus_per_node)
        chosen, *others = plan(resolve(shape(args), args), cluster, args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(to_json(chosen)) if args.json else describe(chosen, others, args))
    return 0 if chosen.fits else 1


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="gpt2", help="preset, or all (default: gpt2)")
    for name in SHAPE:
        add(f"--{name}", type=int, help="of a shape of your own (preset's)")
    add("--ds_config", type=Path, help="the engine's JSON (the cheapest that fits)")
    add("--device", default="h100", help=f"{', '.join(DEVICES)} (default: h100)")
    add("--nodes", type=int, help="machines (default: 1)")
    add("--gpus_per_node", type=int, default=8, help="devices of each (default: 8)")
    add("--gpus", help="a table for these numbers of devices: 8,64,1024 (with all: these)")
    add("--micro_batch_size", type=int, help="sequences (the largest that fits, at most 16)")
    add("--seq_len", type=int, help="tokens (the model's block_size)")
    add("--batch_tokens", type=int, help="tokens per optimizer step (preset's)")
    add("--max_steps", type=int, help="optimizer steps (preset's tokens / batch_tokens)")
    add("--price_per_gpu_hour", type=float, help="of one device, in any currency")
    add("--json", action="store_true", help="print JSON")
    return parser


def check(args: argparse.Namespace) -> None:
    """Refuse a price that is none, and flags of which one would count for nothing.

    Raises:
        ValueError: Names the flag.
    """
    price = args.price_per_gpu_hour
    if price is not None and not 0 < price < float("inf"):
        raise ValueError(f"--price_per_gpu_hour {price:g}: out of range. Fix: give one above 0")
    if (args.gpus or args.model == "all") and args.nodes is not None:
        raise ValueError("--nodes: a table has numbers of devices. Fix: give --gpus instead")
    if args.model == "all" and (given := given_shape(args)):
        raise ValueError(f"--{next(iter(given))}: all has the presets' shapes. Fix: leave it out")


def given_shape(args: argparse.Namespace) -> dict[str, int]:
    """Return what the command line says of a shape of one's own."""
    return {name: value for name in SHAPE if (value := getattr(args, name)) is not None}


def shape(args: argparse.Namespace) -> str:
    """Return the preset's name; a shape of one's own becomes a preset of this process.

    Raises:
        ValueError: There is no such preset, or no such shape.
    """
    preset, given = get_preset(args.model), given_shape(args)
    if not given:
        return args.model
    try:
        config = dataclasses.replace(preset.config, **given)
    except ValueError as error:
        flags = " or ".join(f"--{name}" for name in given)
        raise ValueError(f"{error}. Fix: correct {flags}") from error
    name = f"{config.n_layer} layers x {config.n_embd}"
    PRESETS[name] = dataclasses.replace(preset, config=config)
    return name


def resolve(model: str, args: argparse.Namespace) -> TrainConfig:
    """Return the resolved run of the command line."""
    names = ("micro_batch_size", "seq_len", "batch_tokens", "max_steps")
    return resolve_train_config(
        TrainConfig(
            model=model, ds_config=args.ds_config or Path(), **{n: getattr(args, n) for n in names}
        )
    )


def plan(config: TrainConfig, cluster: Cluster, args: argparse.Namespace) -> list[Estimate]:
    """Return the estimate with the given ds_config, or with each of ds_configs/, the best first.

    Raises:
        ValueError: The batch does not divide, or there is no such ds_config; names the flag.
    """
    if args.ds_config is None:
        return rank_candidates(config, cluster)
    raw, name = load_ds_config(args.ds_config), args.ds_config.name
    if args.micro_batch_size:
        return [estimate(config, raw, name, cluster)]
    return [largest_fitting(config, raw, name, cluster, MAX_DERIVED_MICRO_BATCH)]


def describe(chosen: Estimate, others: list[Estimate], args: argparse.Namespace) -> str:
    """Return an estimate for people, and why it was chosen before the others."""
    config, batch = chosen.config, chosen.batch
    price, cluster, step_s = args.price_per_gpu_hour, chosen.cluster, chosen.step_s
    hours = chosen.days * 24 * cluster.world_size
    parts = chosen.parts | {"reserved": memory.RESERVED_BYTES}
    largest = largest_fitting(config, chosen.ds_config, "", cluster).batch.micro_batch_size
    lines = {
        config.model: f"{config.gpt_config.n_params():,} parameters on {cluster.nodes} x "
        f"{cluster.gpus_per_node} {args.device}, {chosen.name}: {_verdict(chosen)}",
        "memory": f"{_gib(chosen.peak_bytes)} a device: {_shares(parts, _gib)}",
        "batch": f"{config.batch_tokens:,} tokens = {batch.micro_batch_size} sequences x "
        f"{config.seq_len} tokens x {batch.grad_accum_steps} micro-batches x {batch.world_size} "
        f"ranks" + (f"; up to {largest} sequences fit" if chosen.fits else ""),
        "step": f"{step_s:.3g} s: {_shares(chosen.seconds, lambda s: f'{s / step_s:.0%}')}",
        "speed": f"{chosen.tokens_per_s:,.0f} tokens/s, "
        f"{chosen.tokens_per_s / batch.world_size:,.0f} a device, MFU {chosen.mfu:.0%}",
        "run": f"{config.max_steps:,} steps: {chosen.days:.3g} days, {hours:,.0f} device-hours"
        + (f", {price * hours:,.0f} at {price:g} an hour" if price else ""),
        "sent": f"{_gib(chosen.sent_bytes)} from each rank in a step",
        "checkpoint": f"{_gib(chosen.checkpoint_bytes)} on disk each, {chosen.save_s:,.1f} s; "
        f"--checkpoint_every {chosen.checkpoint_every} costs least with a fault in "
        f"{DEVICE_HOURS_A_FAULT:,} device-hours",
    }
    if chosen.host_bytes:
        lines["host"] = f"{_gib(chosen.host_bytes)} of a machine's memory for each rank"
    if others:
        lines["why"] = _reason(chosen, others)
    lines["without"] = "evaluation, saving, faults and waiting for data"
    return "\n".join(f"{name:<11} {text}" for name, text in lines.items())


def _verdict(chosen: Estimate) -> str:
    if chosen.spare_bytes >= 0 and not chosen.fits:
        return (
            f"does not fit: a machine has {_gib(chosen.cluster.device.host_bytes)} for each device"
        )
    spare = f"{_gib(abs(chosen.spare_bytes))} of {_gib(chosen.cluster.device.memory_bytes)}"
    return f"fits, {spare} spare" if chosen.fits else f"does not fit by {spare}"


def _reason(chosen: Estimate, others: list[Estimate]) -> str:
    if not chosen.fits:
        return "none of ds_configs/ fits, with or without activation checkpointing"
    fitting = sum(e.fits for e in others)
    faster = [e for e in others if e.step_s < chosen.step_s and not e.fits]
    missing = [f"{e.name} lacks {_gib(e.lacking_bytes)}" for e in faster]
    reason = f"{fitting + 1} of {len(others) + 1} tried fit; of the fastest the lowest stage"
    return "; ".join([reason, *missing[:2]])


def _gib(n_bytes: float) -> str:
    gib = n_bytes / GIB
    return f"{gib:,.0f} GiB" if gib >= 100 else f"{gib:.3g} GiB"


def _shares(parts: dict[str, float], show: Callable[[float], str]) -> str:
    return " | ".join(f"{name} {show(value)}" for name, value in parts.items() if value)


def split(n_devices: int, args: argparse.Namespace) -> Cluster:
    """Return the machines that so many devices are.

    Raises:
        ValueError: The last machine would have fewer than the others.
    """
    per_node = min(n_devices, args.gpus_per_node)
    if n_devices < 1 or n_devices % per_node:
        raise ValueError(
            f"--gpus {n_devices}: no whole machines of --gpus_per_node {args.gpus_per_node}. "
            "Fix: give a multiple"
        )
    return Cluster(get_device(args.device), n_devices // per_node, per_node)


def plan_table(args: argparse.Namespace) -> list[Estimate]:
    """Return the best for each model and number of devices.

    A preset's batch that does not divide is taken up to the next that does.

    Raises:
        ValueError: Names the flag.
    """
    try:
        numbers = [int(number) for number in (args.gpus or "8,64,1024").split(",")]
    except ValueError as error:
        raise ValueError(f"--gpus {args.gpus}: no numbers. Fix: give such as 8,64,1024") from error
    is_all = args.model == "all"
    found = []
    for model in [n for n in PRESETS if n.startswith("gpt")] if is_all else [shape(args)]:
        for n_devices in numbers:
            cluster, config = split(n_devices, args), resolve(model, args)
            whole = config.seq_len * cluster.world_size
            args_here = argparse.Namespace(**vars(args))
            args_here.batch_tokens = -(-config.batch_tokens // whole) * whole
            found.append(plan(resolve(model, args_here), cluster, args)[0])
    return found


def table(rows: list[Estimate], args: argparse.Namespace) -> str:
    """Return a Markdown table of estimates."""
    price = args.price_per_gpu_hour
    columns = ["model", "devices", "batch, tokens", "ds_config", "micro-batch", "GiB a device",
               "tokens/s", "MFU", "days", "device-hours"]  # fmt: skip
    columns += ["cost"] if price else []
    lines = [columns, ["---"] * len(columns), *(_row(row, price) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _row(best: Estimate, price: float | None) -> list[str]:
    n_devices = best.cluster.world_size
    row = [best.config.model, f"{n_devices:,}", f"{best.config.batch_tokens:,}"]
    fits, hours = f"{best.peak_bytes / GIB:.1f}", best.days * 24 * n_devices
    if not best.fits:
        return [*row, "none fits", "", fits, *[""] * (5 if price else 4)]
    what = best.name.replace(f'with "{CHECKPOINTING}": {{}}', "+ checkpointing")
    row += [what, str(best.batch.micro_batch_size), fits, f"{best.tokens_per_s:,.0f}"]
    row += [f"{best.mfu:.0%}", f"{best.days:,.3g}", f"{hours:,.0f}"]
    return [*row, f"{price * hours:,.0f}"] if price else row


def to_json(chosen: Estimate) -> dict[str, Any]:
    """Return an estimate as JSON values, in bytes and seconds."""
    return {
        "model": chosen.config.model,
        "devices": chosen.cluster.world_size,
        "ds_config": chosen.name,
        "fits": chosen.fits,
        "spare_bytes": chosen.spare_bytes,
        "peak_bytes": chosen.peak_bytes,
        "parts_bytes": chosen.parts,
        "host_bytes": chosen.host_bytes,
        "checkpoint_bytes": chosen.checkpoint_bytes,
        "checkpoint_every": chosen.checkpoint_every,
        "sent_bytes": chosen.sent_bytes,
        "batch": dataclasses.asdict(chosen.batch),
        "seconds": chosen.seconds,
        "tokens_per_s": chosen.tokens_per_s,
        "mfu": chosen.mfu,
        "days": chosen.days,
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
