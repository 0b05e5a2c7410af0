"""Estimate memory, time and cost of a run before it starts, on any laptop.

python launch/plan.py --model gpt3-13b --ds_config ds_configs/zero3.json --nodes 4
python launch/plan.py --model gpt3-13b --nodes 4                    which ds_config?
python launch/plan.py --model all --gpus 8,64,1024

Without --ds_config every file of ds_configs/ is tried, with and without activation checkpointing,
and the cheapest that fits is shown. docs/SCALING.md says how far measurements are from plans.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: import from the repository root, exactly as train.py does
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from command_line import OneLineParser
from errors import BadInput, error_line, exit_status_of
from exit_status import FAILED, FINISHED
from launch.planning.estimate import (
    Candidate,
    Cluster,
    Estimate,
    rank_candidates,
    shipped_candidates,
)
from launch.planning.printing import estimate_to_json, format_estimate, format_estimates
from model import PRESETS, Preset
from model.presets import get_preset
from training.config import TrainConfig, resolve_train_config
from training.devices import DEVICES, get_device
from training.ds_config import load_ds_config

SHAPE = ("n_layer", "n_head", "n_embd", "block_size")
RUN = ("micro_batch_size", "seq_len", "batch_tokens", "max_steps", "ds_config")
GPUS = "8,64,1024"


def main(argv: list[str]) -> int:
    """Run the command line; return the exit status."""
    args = build_parser().parse_args(argv)
    price = args.price_per_gpu_hour
    try:
        check_flags(args)
        nodes = 1 if args.nodes is None else args.nodes
        cluster = Cluster(get_device(args.device), nodes, args.gpus_per_node)
        models, flags, candidates = models_of(args), given(args, RUN), shipped_candidates()
        if args.ds_config is not None:
            candidates = [Candidate(load_ds_config(args.ds_config), args.ds_config.name)]
        if is_table(args):
            rows = plan_table(models, args.gpus or number_list(GPUS), flags, candidates, cluster)
            value: Any = [estimate_to_json(row, price) for row in rows]
            text = format_estimates(rows, price)
        else:
            ((model, preset),) = models.items()
            config = resolve_train_config(model=model, preset=preset, **flags)
            rows = rank_candidates(config, candidates, cluster)
            value = estimate_to_json(rows[0], price)
            text = format_estimate(rows[0], rows[1:], price)
    except (BadInput, OSError) as error:
        print(f"error: {error_line(error)}", file=sys.stderr)
        return exit_status_of(error)
    print(json.dumps(value) if args.json else text)
    return FINISHED if any(row.fits for row in rows) else FAILED


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
    add(
        "--gpus",
        type=number_list,
        help=f"a table for these numbers of devices: {GPUS} (with all: these)",
    )
    add("--micro_batch_size", type=int, help="sequences (the largest that fits)")
    add("--seq_len", type=int, help="tokens (the model's block_size)")
    add("--batch_tokens", type=int, help="tokens per optimizer step (preset's)")
    add("--max_steps", type=int, help="optimizer steps (preset's tokens / batch_tokens)")
    add("--price_per_gpu_hour", type=float, help="of one device, in any currency")
    add("--json", action="store_true", help="print JSON")
    return parser


def check_flags(args: argparse.Namespace) -> None:
    """Refuse a price out of range, and flags that would have no effect.

    Raises:
        BadInput: Names the flag.
    """
    price, shape = args.price_per_gpu_hour, given(args, SHAPE)
    if price is not None and not 0 < price < float("inf"):
        raise BadInput(f"--price_per_gpu_hour {price:g}", "out of range", "give one above 0")
    if is_table(args) and args.nodes is not None:
        raise BadInput(f"--nodes {args.nodes}", "a table has numbers of devices", "give --gpus")
    if args.model == "all" and shape:
        flag = f"--{next(iter(shape))}"
        raise BadInput(flag, "--model all has the presets' shapes", f"leave {flag} out")


def given(args: argparse.Namespace, names: tuple[str, ...]) -> dict[str, Any]:
    """Return the flags of these names that the command line gives."""
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def models_of(args: argparse.Namespace) -> dict[str, Preset]:
    """Return names and presets of --model, with the shape that the other flags give.

    Raises:
        BadInput: There is no such preset, or no such shape.
    """
    if args.model == "all":
        return {name: preset for name, preset in PRESETS.items() if name.startswith("gpt")}
    preset, shape = get_preset(args.model), given(args, SHAPE)
    if not shape:
        return {args.model: preset}
    try:
        config = replace(preset.config, **shape)
    except ValueError as error:
        flags = ", ".join(f"--{name} {value}" for name, value in shape.items())
        raise BadInput(flags, str(error), "give numbers that go together") from error
    return {f"{config.n_layer} layers x {config.n_embd}": replace(preset, config=config)}


def whole_machines(n_devices: int, cluster: Cluster) -> Cluster:
    """Return as many machines of a cluster as so many devices are.

    Raises:
        BadInput: The last machine would have fewer than the others.
    """
    per_node = min(n_devices, cluster.gpus_per_node)
    if n_devices < 1 or n_devices % per_node:
        what = f"not whole machines of --gpus_per_node {cluster.gpus_per_node}"
        raise BadInput(f"--gpus {n_devices}", what, "give a multiple")
    return Cluster(cluster.device, n_devices // per_node, per_node)


def next_batch(config: TrainConfig, world_size: int) -> int:
    """Return the tokens of the run's batch, or of a larger one that the ranks can share.

    Each has so many sequences that micro-batches can be large, for which a prime number is no good:
    a multiple of a power of two, at most a quarter beyond the next that divides.
    """
    of_each = -(-config.batch_tokens // (config.seq_len * world_size))
    multiple = 2 ** max(0, of_each.bit_length() - 3)
    return -(-of_each // multiple) * multiple * config.seq_len * world_size


def number_list(text: str) -> list[int]:
    """Return the numbers of a list with commas."""
    return [int(number) for number in text.split(",")]


def plan_table(
    models: dict[str, Preset],
    numbers: list[int],
    flags: dict[str, Any],
    candidates: list[Candidate],
    cluster: Cluster,
) -> list[Estimate]:
    """Return the best for each model and number of a cluster's devices.

    A preset's batch that does not divide is taken up to one that does.

    Raises:
        BadInput: Names the flag.
    """
    found = []
    for (model, preset), n_devices in itertools.product(models.items(), numbers):
        machines = whole_machines(n_devices, cluster)
        try:
            config = resolve_train_config(model=model, preset=preset, **flags)
            if "batch_tokens" not in flags:
                more = {"batch_tokens": next_batch(config, n_devices)}
                config = resolve_train_config(model=model, preset=preset, **flags, **more)
            found.append(rank_candidates(config, candidates, machines)[0])
        except BadInput as error:
            where = f"{model} on {n_devices}: {error.where}"
            raise BadInput(where, error.what, error.remedy) from error
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
