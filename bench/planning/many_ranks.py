"""Run the engine as rank 0 of many, without the others: compare what it holds with the plan.

    python bench/planning/many_ranks.py --side zero1 --ranks 1024

PyTorch's fake process group takes every collective and returns at once, with whatever is in the
buffers: the losses mean nothing, but the tensors have their sizes and the collectives their bytes.
The engine issues the collectives that it uses with NCCL, as for every backend but gloo. The second
optimizer step is counted.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: import from the repository root, exactly as train.py does
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from command_line import OneLineParser

ROOT = Path(__file__).resolve().parents[2]
RANKS_OF_A_MACHINE = 8
# What a GPU's host waits for: a value that is read, and one that is sent (torch.tensor).
TRANSFERS = (
    "aten::_local_scalar_dense",
    "aten::equal",
    "aten::nonzero",
    "aten::masked_select",
    "aten::lift_fresh",
)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Return the bytes of the optimizer's moments on rank 0, what it sends and waits for."""
    import deepspeed
    import torch
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from bench.speed.side import build_run
    from bench.speed.traffic import Traffic
    from launch.planning.speed import sent_bytes
    from training.engine import build_engine, build_model
    from training.memory import RankShare
    from training.ranks import Ranks
    from training.rendezvous import init_process_group
    from training.step import take_step

    ranks = Ranks(0, 0, args.ranks, RANKS_OF_A_MACHINE)
    run = build_run(args, Path("run"), ranks)
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(args.ranks)}
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=args.ranks)
    device = init_process_group(ranks, timeout_s=60)  # sets all but the group
    deepspeed.init_distributed("fake", dist_init_required=False, verbose=False)
    model = build_model(run.config, run.ds_config, device)
    engine, _ = build_engine(model, run.config, run.ds_config, ranks)
    engine.train()
    tokens = torch.zeros(args.micro_batch_size, args.seq_len, dtype=torch.long)
    batches = iter([(tokens, tokens)] * (2 * args.grad_accum))
    take_step(engine, run.config, 0, args.grad_accum, batches)
    with Traffic() as traffic, host_transfers() as transfers:
        take_step(engine, run.config, 1, args.grad_accum, batches)
    shard = RankShare(run.config, run.batch, run.ds_config, on_gpu=True)
    state = engine.basic_optimizer.state.values()
    share = args.ranks if shard.stage else 1
    return {
        "moment_bytes": sum(s["exp_avg"].nbytes + s["exp_avg_sq"].nbytes for s in state),
        "planned_moment_bytes": 8 * shard.n_params / share,
        "sent_bytes": traffic.sent_bytes,
        "planned_sent_bytes": sent_bytes(shard, run.batch),
        "transfers": dict(transfers),
    }


@contextlib.contextmanager
def host_transfers() -> Iterator[collections.Counter[str]]:
    """Count by file and line what reads or sends a tensor's value."""
    import deepspeed
    from torch.utils._python_dispatch import TorchDispatchMode

    # Whose lines are named, and the folder that their paths are relative to.
    deepspeed_folder = Path(deepspeed.__file__).parent
    bases = {ROOT / "training": ROOT, deepspeed_folder: deepspeed_folder.parent}
    transfers: collections.Counter[str] = collections.Counter()

    class Transfers(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func._schema.name in TRANSFERS:
                transfers[caller(sys._getframe(1))] += 1
            return func(*args, **(kwargs or {}))

    def caller(frame: Any) -> str:
        while True:
            path = Path(frame.f_code.co_filename)
            for folder, base in bases.items():
                if path.is_relative_to(folder):
                    return f"{path.relative_to(base)}:{frame.f_lineno}"
            frame = frame.f_back

    with Transfers():
        yield transfers


def main() -> None:
    """Run the command line."""
    parser = OneLineParser(description=__doc__)
    add = parser.add_argument
    add("--side", default="zero1", help="zero0 to zero3 (default: zero1)")
    add("--ranks", type=int, default=8, help="of the run (default: 8)")
    add("--model", default="debug", help="preset (default: debug)")
    add("--micro_batch_size", type=int, default=1, help="sequences (default: 1)")
    add("--seq_len", type=int, default=64, help="tokens (default: 64)")
    add("--grad_accum", type=int, default=2, help="micro-batches (default: 2)")
    args = parser.parse_args()
    args.data_dir = Path()
    print(json.dumps(measure(args)))


if __name__ == "__main__":
    main()
