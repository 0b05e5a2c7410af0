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


def main(argv: list[str]) -> int:
    """Run the command line; return the exit status."""
    args = build_parser().parse_args(argv)
    try:
        if args.gpus or args.model == "all":
            names = [name for name in PRESETS if name.startswith("gpt")]
            names = names if args.model == "all" else [shape(args)]
            print(table(names, args))
            return 0
        cluster = Cluster(get_device(args.device), args.nodes, args.gpus_per_node)
        config = resolve(shape(args), args)
        if args.ds_config:
            given = load_ds_config(args.ds_config)
            limit = args.micro_batch_size or MAX_DERIVED_MICRO_BATCH
            chosen = largest_fitting(config, given, args.ds_config.name, cluster, limit)
            if args.micro_batch_size:
                chosen = estimate(config, given, args.ds_config.name, cluster)
            others = []
        else:
            chosen, *others = rank_candidates(config, cluster)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(to_json(chosen)))
    else:
        print(describe(chosen, others, args))
    return 0 if chosen.fits else 1


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="gpt2", help="preset, or all (default: gpt2)")
    for name in ("n_layer", "n_head", "n_embd", "block_size"):
        add(f"--{name}", type=int, help="of a shape of your own (preset's)")
    add("--ds_config", type=Path, help="the engine's JSON (the cheapest that fits)")
    add("--device", default="h100", help=f"{', '.join(DEVICES)} (default: h100)")
    add("--nodes", type=int, default=1, help="machines (default: 1)")
    add("--gpus_per_node", type=int, default=8, help="devices of each (default: 8)")
    add("--gpus", type=_numbers, help="a table for these numbers of devices: 8,64,1024")
    add("--micro_batch_size", type=int, help="sequences (the largest that fits, at most 16)")
    add("--seq_len", type=int, help="tokens (the model's block_size)")
    add("--batch_tokens", type=int, help="tokens per optimizer step (preset's)")
    add("--max_steps", type=int, help="optimizer steps (preset's tokens / batch_tokens)")
    add("--price_per_gpu_hour", type=float, help="of one device, in any currency")
    add("--json", action="store_true", help="print JSON")
    return parser


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def shape(args: argparse.Namespace) -> str:
    """Return the preset's name; a shape of one's own becomes a preset of this process."""
    names = ("n_layer", "n_head", "n_embd", "block_size")
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    preset = get_preset(args.model)
    if not given:
        return args.model
    config = dataclasses.replace(preset.config, **given)
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


def table(models: list[str], args: argparse.Namespace) -> str:
    """Return a Markdown table: a row for each model and number of devices, at its cheapest.

    A preset's batch that does not divide is taken up to the next that does.
    """
    columns = ["model", "devices", "batch, tokens", "ds_config", "micro-batch", "GiB a device",
               "tokens/s", "MFU", "days", "device-hours"]  # fmt: skip
    rows = [columns, ["---"] * len(columns)]
    for model in models:
        for n_devices in args.gpus or [8, 64, 1024]:
            cluster = split(n_devices, args)
            config = resolve(model, args)
            whole = config.seq_len * cluster.world_size
            args_here = argparse.Namespace(**vars(args))
            args_here.batch_tokens = -(-config.batch_tokens // whole) * whole
            best = rank_candidates(resolve(model, args_here), cluster)[0]
            rows.append(_row(best, n_devices))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _row(best: Estimate, n_devices: int) -> list[str]:
    what = best.name.replace(f'with "{CHECKPOINTING}": {{}}', "+ checkpointing")
    fits = f"{best.peak_bytes / GIB:.1f}"
    if not best.fits:
        return [best.config.model, f"{n_devices:,}", f"{best.config.batch_tokens:,}",
                "none fits", "", fits, "", "", "", ""]  # fmt: skip
    return [best.config.model, f"{n_devices:,}", f"{best.config.batch_tokens:,}", what,
            str(best.batch.micro_batch_size), fits, f"{best.tokens_per_s:,.0f}",
            f"{best.mfu:.0%}", f"{best.days:,.3g}",
            f"{best.days * 24 * n_devices:,.0f}"]  # fmt: skip


def to_json(chosen: Estimate) -> dict[str, Any]:
    """Return an estimate as JSON values, in bytes and seconds."""
    return {
        "model": chosen.config.model,
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
