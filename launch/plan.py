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
from pathlib import Path

if not __package__:  # run as a file: import from the repository root, exactly as train.py does
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from command_line import OneLineParser
from launch.planning.estimate import Cluster, Estimate, estimate, largest_fitting, rank_candidates
from launch.planning.printing import describe, table, to_json
from model import PRESETS, Preset
from model.presets import get_preset
from training.config import TrainConfig, largest_micro_batch, resolve_train_config
from training.devices import DEVICES, get_device
from training.ds_config import load_ds_config

SHAPE = ("n_layer", "n_head", "n_embd", "block_size")


def main(argv: list[str]) -> int:
    """Run the command line; return the exit status."""
    args = build_parser().parse_args(argv)
    try:
        check(args)
        price, nodes = args.price_per_gpu_hour, 1 if args.nodes is None else args.nodes
        cluster = Cluster(get_device(args.device), nodes, args.gpus_per_node)
        if is_table(args):
            rows = plan_table(cluster, args)
            said = [to_json(row, price) for row in rows]
            print(json.dumps(said) if args.json else table(rows, price))
            return 0 if any(row.fits for row in rows) else 1
        config = resolve(*preset_of(args), args, args.batch_tokens)
        chosen, *others = plan(config, cluster, args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(to_json(chosen, price)) if args.json else describe(chosen, others, price))
    return 0 if chosen.fits else 1


def is_table(args: argparse.Namespace) -> bool:
    """Return whether several models or numbers of devices are asked for."""
    return args.gpus is not None or args.model == "all"


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = OneLineParser(description=__doc__)
    add = parser.add_argument
    add("--model", default="gpt2", help="preset, or all (default: gpt2)")
    for name in SHAPE:
        add(f"--{name}", type=int, help="of a shape of your own (preset's)")
    add("--ds_config", type=Path, help="the engine's JSON (the cheapest that fits)")
    add("--device", default="h100", help=f"{', '.join(DEVICES)} (default: h100)")
    add("--nodes", type=int, help="machines (default: 1)")
    add("--gpus_per_node", type=int, default=8, help="devices of each (default: 8)")
    add("--gpus", help="a table for these numbers of devices: 8,64,1024 (with all: these)")
    add("--micro_batch_size", type=int, help="sequences (the largest that fits)")
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
    if is_table(args) and args.nodes is not None:
        raise ValueError("--nodes: a table has numbers of devices. Fix: give --gpus instead")
    if args.model == "all" and (given := given_shape(args)):
        raise ValueError(f"--{next(iter(given))}: all has the presets' shapes. Fix: leave it out")


def given_shape(args: argparse.Namespace) -> dict[str, int]:
    """Return what the command line says of a shape of one's own."""
    return {name: value for name in SHAPE if (value := getattr(args, name)) is not None}


def preset_of(args: argparse.Namespace) -> tuple[str, Preset]:
    """Return name and preset of --model, with the shape that the other flags give.

    Raises:
        ValueError: There is no such preset, or no such shape.
    """
    preset, given = get_preset(args.model), given_shape(args)
    if not given:
        return args.model, preset
    try:
        config = dataclasses.replace(preset.config, **given)
    except ValueError as error:
        flags = " or ".join(f"--{name}" for name in given)
        raise ValueError(f"{error}. Fix: correct {flags}") from error
    name = f"{config.n_layer} layers x {config.n_embd}"
    return name, dataclasses.replace(preset, config=config)


def resolve(
    model: str, preset: Preset, args: argparse.Namespace, batch_tokens: int | None
) -> TrainConfig:
    """Return the run of a preset with the flags of the command line."""
    flags = {name: getattr(args, name) for name in ("micro_batch_size", "seq_len", "max_steps")}
    flags |= {"batch_tokens": batch_tokens, "ds_config": args.ds_config}
    given = {name: value for name, value in flags.items() if value is not None}
    return resolve_train_config(model=model, preset=preset, **given)


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
    limit = largest_micro_batch(config.seq_len, cluster.device.on_gpu)
    return [largest_fitting(config, raw, name, cluster, limit)]


def split(n_devices: int, cluster: Cluster) -> Cluster:
    """Return as many machines of a cluster as so many devices are.

    Raises:
        ValueError: The last machine would have fewer than the others.
    """
    per_node = min(n_devices, cluster.gpus_per_node)
    if n_devices < 1 or n_devices % per_node:
        raise ValueError(
            f"--gpus {n_devices}: no whole machines of --gpus_per_node {cluster.gpus_per_node}. "
            "Fix: give a multiple"
        )
    return Cluster(cluster.device, n_devices // per_node, per_node)


def next_batch(config: TrainConfig, world_size: int) -> int:
    """Return the tokens of the run's batch, or of a larger one that the ranks can share.

    Each has so many sequences that micro-batches can be large, for which a prime number is no good:
    a multiple of a power of two, at most a quarter beyond the next that divides.
    """
    of_each = -(-config.batch_tokens // (config.seq_len * world_size))
    multiple = 2 ** max(0, of_each.bit_length() - 3)
    return -(-of_each // multiple) * multiple * config.seq_len * world_size


def plan_table(cluster: Cluster, args: argparse.Namespace) -> list[Estimate]:
    """Return the best for each model and number of a cluster's devices.

    A preset's batch that does not divide is taken up to one that does.

    Raises:
        ValueError: Names the flag.
    """
    try:
        gpus = "8,64,1024" if args.gpus is None else args.gpus
        numbers = [int(number) for number in gpus.split(",")]
    except ValueError as error:
        raise ValueError(f"--gpus {args.gpus}: no numbers. Fix: give such as 8,64,1024") from error
    if args.model == "all":
        models = {name: preset for name, preset in PRESETS.items() if name.startswith("gpt")}
    else:
        models = dict([preset_of(args)])
    found = []
    for model, preset in models.items():
        for n_devices in numbers:
            there, batch_tokens = split(n_devices, cluster), args.batch_tokens
            if batch_tokens is None:
                batch_tokens = next_batch(resolve(model, preset, args, None), n_devices)
            try:
                found.append(plan(resolve(model, preset, args, batch_tokens), there, args)[0])
            except ValueError as error:
                what, _, remedy = str(error).partition(". Fix: ")
                raise ValueError(f"{model} on {n_devices}: {what}. Fix: {remedy}") from error
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
