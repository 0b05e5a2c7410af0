"""Time ZeRO-0 to ZeRO-3 on the ranks of one machine and PyTorch's DDP, in turns.

python bench/speed/scaling.py --out runs/bench/scaling.json

Each rank takes micro-batches of the same size, whatever the number of ranks. Bytes are those that
ring collectives send from each rank in one optimizer step (bench/speed/traffic.py), per parameter.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

if not __package__:  # run as a file: import from the repository root, exactly as train.py does
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from bench.ratios import paired_ratio
from bench.record import Rows, record
from bench.speed.side import preset_of
from bench.speed.train_step import add_shape, compare
from command_line import OneLineParser

SIDES = ["zero0", "zero1", "zero2", "zero3"]


def main() -> None:
    parser = OneLineParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="(default: 1 2 4)")
    sides_help = "each alone against ddp (default: zero0 to zero3)"
    parser.add_argument("--sides", nargs="+", default=SIDES, help=sides_help)
    add_shape(parser, model="30m")
    args = parser.parse_args()
    n_params = preset_of(args.model).config.n_params()
    shape = f"{args.model}, {args.micro_batch_size} × {args.seq_len} tokens × {args.grad_accum}"
    rows: Rows = []
    results = []
    for n_ranks in args.ranks:
        for side in args.sides:
            result = compare(args, ["ddp", side], n_ranks)
            theirs, ours = result["seconds_per_step"].values()
            their_bytes, our_bytes = result["sent_bytes"].values()
            rows.append(
                {
                    "ranks": str(n_ranks),
                    "side": side,
                    "s/step": f"{statistics.median(ours):.2f}",
                    "time / DDP's": str(paired_ratio(ours, theirs)),
                    "bytes per parameter": f"{our_bytes / n_params:.2f}",
                    "DDP's": f"{their_bytes / n_params:.2f}",
                }
            )
            results.append(result)
            record(args.out, f"Ranks against DDP: {shape} per rank", rows, results)


if __name__ == "__main__":
    main()
