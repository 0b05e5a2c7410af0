"""Compare the plan with PyTorch: what tensors hold at most in a step, and what a rank sends.

python bench/planning/memory.py --out docs/measured_memory.json        resumable, about an hour
python bench/planning/memory.py --out docs/measured_memory.json --table

Each case is a run through the engine (bench/speed/side.py) on the CPU. "Held" is the most that all
live tensors of a rank hold together (bench/speed/held.py). "Sent" is what rings would send
(bench/speed/traffic.py).
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: import from the repository root, exactly as train.py does
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from bench.processes import flags
from bench.record import load_json, markdown, save_json, stamp
from bench.speed.side import build_run
from bench.speed.train_step import Side, write_tokens
from command_line import OneLineParser
from launch.planning.speed import sent_bytes
from training.memory import RankShare, peak
from training.ranks import Ranks

SHAPES = {"30m": (4, 256), "gpt2": (2, 128)}  # sequences and tokens of a micro-batch
ZERO = [f"zero{stage}" for stage in range(4)]
SIDES = ZERO + [f"{side}+checkpointing" for side in ZERO]
GRAD_ACCUM = 2
MEMORY_TOLERANCE, SENT_TOLERANCE = 0.10, 0.05


def shape(model: str) -> dict[str, Any]:
    """Return the flags of bench/speed/side.py for one model."""
    micro_batch_size, seq_len = SHAPES[model]
    return {
        "model": model,
        "micro_batch_size": micro_batch_size,
        "seq_len": seq_len,
        "grad_accum": GRAD_ACCUM,
    }


def measure(model: str, side: str, n_ranks: int) -> dict[str, float]:
    """Return what a rank held and sent in an optimizer step, in bytes: the second of a run."""
    with tempfile.TemporaryDirectory() as folder:
        write_tokens(Path(folder))
        with Side(side, flags(**shape(model), data_dir=folder), n_ranks) as ranks:
            ranks.steps(1, count=True)
            answer = ranks.steps(1, count=True)
    return {"held_bytes": answer["held_bytes"], "sent_bytes": answer["sent_bytes"]}


def planned(model: str, side: str, n_ranks: int) -> dict[str, float]:
    """Return what the plan says of the same, in bytes."""
    args = argparse.Namespace(**shape(model), side=side, data_dir=Path())
    run = build_run(args, Path("run"), Ranks(0, 0, n_ranks, n_ranks))
    shard = RankShare(run.config, run.batch, run.ds_config, on_gpu=False)
    return {"held_bytes": sum(peak(shard).values()), "sent_bytes": sent_bytes(shard, run.batch)}


def row(case: str, measured: dict[str, Any]) -> dict[str, str]:
    """Return a row of the table: measured, planned and their ratio."""
    model, side, n_ranks = case.split()
    plan = planned(model, side, int(n_ranks))
    cells = {"model": model, "ds_config": side, "ranks": n_ranks}
    for name in ("held", "sent"):
        n_measured = measured[f"{name}_bytes"]
        n_planned = plan[f"{name}_bytes"]
        cells[f"{name}, MB"] = f"{n_measured / 1e6:,.1f}"
        cells[f"planned {name}"] = f"{n_planned / 1e6:,.1f}"
        cells[f"{name}: off by"] = f"{n_planned / n_measured - 1:+.1%}" if n_measured else "n/a"
    return cells


def main() -> None:
    parser = OneLineParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON file; goes on where it was")
    parser.add_argument("--table", action="store_true", help="print what it holds, measure nothing")
    args = parser.parse_args()
    cells = load_json(args.out)
    for model, n_ranks, side in itertools.product(SHAPES, (1, 2), SIDES):
        case = f"{model} {side} {n_ranks}"
        if case not in cells and not args.table:
            cells[case] = measure(model, side, n_ranks) | stamp()
            save_json(args.out, cells)
            print(row(case, cells[case]), file=sys.stderr, flush=True)
    print(markdown([row(case, measured) for case, measured in cells.items()]))


if __name__ == "__main__":
    main()
