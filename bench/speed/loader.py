"""Compare our loader with build-nanogpt's: first batch, shard edge, memory, time of `next`.

    python bench/speed/loader.py --out loader.json

Shards have 100M tokens, micro-batches 64 sequences of 1,024. The seed (build-nanogpt) reads a whole
shard into int64 and slices it; ours maps the files and reads windows ahead in a thread. Between two
batches one core multiplies matrices for 50 ms, in the place of a training step.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

if not __package__:  # run as a file: import from the repository root, exactly as train.py does
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from bench.processes import flags, memory_mib
from bench.ratios import in_turns, paired_ratio
from bench.record import Rows, record
from command_line import OneLineParser

ROOT = Path(__file__).resolve().parents[2]
SHARD_TOKENS = 100_000_000
N_SHARDS = 3
B, T = 64, 1024
STEP_S = 0.05
BATCHES = 40  # on either side of a shard edge
SIDES = ["seed", "ours"]


def write_shards(folder: Path) -> None:
    """Write shards of random tokens."""
    import numpy as np

    rng = np.random.default_rng(0)
    for i in range(N_SHARDS):
        split = "val" if i == 0 else "train"
        tokens = rng.integers(0, 50257, SHARD_TOKENS, dtype=np.uint16)
        np.save(folder / f"text_{split}_{i:06d}.npy", tokens)


def seed_batches(folder: Path, first: int) -> Iterator[object]:
    """Yield inputs as build-nanogpt's loader hands them out: a shard at a time, as int64."""
    import numpy as np
    import torch

    for path in sorted(folder.glob("*_train_*.npy")):
        tokens = torch.tensor(np.load(path).astype(np.int32), dtype=torch.long)
        for i in range(first * B * T, len(tokens) - B * T, B * T):
            window = tokens[i : i + B * T + 1]
            yield window[:-1].view(B, T), window[1:].view(B, T)
        first = 0


def our_batches(folder: Path, first: int) -> Iterator[object]:
    """Yield windows in stream order, so that the shard edge comes where the seed's comes."""
    from data.loader import Loader
    from data.order import Order
    from data.shards import TokenStream

    stream = TokenStream(folder, "train", 50257)
    yield from Loader(stream, Order(len(stream), T, shuffle=False), B, 1, samples=first * B)


def measure_side(side: str, folder: Path) -> dict[str, float]:
    """Take batches over a shard edge; return seconds and MiB."""
    import torch

    import data.loader
    import data.order  # noqa: F401 # loaded before the clock starts

    torch.set_num_threads(1)
    first = SHARD_TOKENS // (B * T) - BATCHES
    before_mib = memory_mib("VmRSS")
    started = time.perf_counter()
    open_batches = seed_batches if side == "seed" else our_batches
    batches = open_batches(folder, first)
    next(batches)
    first_batch_s = time.perf_counter() - started
    waits = []
    weights = torch.rand(256, 256)
    for _ in range(2 * BATCHES):
        step_ends = time.perf_counter() + STEP_S
        while time.perf_counter() < step_ends:
            torch.mm(weights, weights)
        started = time.perf_counter()
        next(batches)
        waits.append(time.perf_counter() - started)
    return {
        "first_batch_s": first_batch_s,
        "longest_next_s": max(waits),  # the shard edge
        "median_next_s": median(waits),
        "memory_mib": memory_mib("VmHWM") - before_mib,  # mapped pages of files included
    }


def compare(folder: Path, blocks: int) -> dict[str, list[dict[str, float]]]:
    """Measure both sides in turns, each in a process of its own."""
    values: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for side in in_turns(SIDES, blocks):
        command = [sys.executable, __file__, *flags(side=side, folder=folder)]
        done = subprocess.run(
            command, check=True, capture_output=True, text=True, timeout=300, encoding="utf-8"
        )
        values[side].append(json.loads(done.stdout))
    return values


def table(values: dict[str, list[dict[str, float]]]) -> Rows:
    """Return a row for each thing measured."""
    rows = []
    for name in values["ours"][0]:
        theirs = [value[name] for value in values["seed"]]
        ours = [value[name] for value in values["ours"]]
        rows.append(
            {
                "what": name,
                "seed": f"{median(theirs):.6f}",
                "ours": f"{median(ours):.6f}",
                "times less": str(paired_ratio(theirs, ours)),
            }
        )
    return rows


def main() -> None:
    """Run the command line."""
    parser = OneLineParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="JSON file; results are added")
    parser.add_argument("--blocks", type=int, default=7, help="of turns (default: 7)")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(measure_side(args.side, args.folder)))
        return
    if not args.out:
        parser.error("--out is missing: it takes the results")
    with tempfile.TemporaryDirectory(prefix="nanospeed_") as name:
        write_shards(Path(name))
        values = compare(Path(name), args.blocks)
    record(args.out, "Loader", table(values), values)


if __name__ == "__main__":
    main()
