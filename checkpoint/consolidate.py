"""Write an engine or a step folder as a Hugging Face folder, one parameter at a time.

python checkpoint/consolidate.py --ckpt runs/x --out_dir x_hf
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:  # run as a file: import from the repository root, exactly as train.py does
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from checkpoint.layouts import step_weights
from checkpoint.manifest import newest_step, read_manifest, step_name
from checkpoint.run_folder import check_empty
from command_line import OneLineParser
from exit_status import BAD_INPUT, FINISHED
from model import GPTConfig

if TYPE_CHECKING:
    from torch import Tensor


def engine_weights(engine: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield every whole fp32 weight of an engine (all ranks: each next() gathers one weight)."""
    from deepspeed.utils import safe_get_full_fp32_param

    sharded = engine.zero_optimization_stage() > 0
    for name, param in engine.module.named_parameters():
        weight = safe_get_full_fp32_param(param) if sharded else param.detach()
        assert weight is not None, name
        yield name, weight


def consolidate_engine(engine: Any, run_dir: Path, step: int, unverified: list[str]) -> Path:
    """Write an engine as `run_dir/consolidated/step_…` (all ranks); return the folder.

    Raises:
        BadInput: The optimizer's weights are not those that the model computes with; on all
            ranks, and nothing is written.
    """
    import torch.distributed as dist

    from checkpoint.fingerprints import engine_fingerprints, verified
    from checkpoint.hf_folder import save_hf_folder

    folder = run_dir / "consolidated" / step_name(step)
    expected = engine_fingerprints(engine)
    dtype = next(engine.module.parameters()).dtype
    weights = verified(engine_weights(engine), expected, dtype, folder, unverified)
    if dist.get_rank() == 0:
        save_hf_folder(folder, engine.module.config, weights)
    for _ in weights:  # the other ranks take part in gathering each weight
        pass
    dist.barrier()  # all ranks: the folder is written
    return folder


def main() -> int:
    """Run the command line; return the exit status."""
    parser = OneLineParser(description=__doc__)
    parser.add_argument("--ckpt", type=Path, required=True, help="run or step folder")
    parser.add_argument("--out_dir", type=Path, help="default: consolidated/step_… of the run")
    args = parser.parse_args()
    from checkpoint.hf_folder import save_hf_folder

    try:
        folder = newest_step(args.ckpt.resolve())
        if args.out_dir:
            check_empty(args.out_dir, "--out_dir")
        out_dir = args.out_dir or folder.parents[1] / "consolidated" / folder.name
        save_hf_folder(out_dir, GPTConfig(**read_manifest(folder).model), step_weights(folder))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    print(out_dir)
    return FINISHED


if __name__ == "__main__":
    sys.exit(main())
