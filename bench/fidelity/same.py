"""Check that training still gives the same bits: curves and weights, with those of docs/same.json.

    make same                                      compare; status 1 names what differs
    python bench/fidelity/same.py --record         write docs/same.json

For changes that alter no result. It takes the curve of the last `make quickstart`, two cells of the
parity table, and the weights of 20-step checkpoints. The last digits depend on the processor: on
another kind than the recorded one, record at the commit before the change first.
"""

import hashlib
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: import from the repository root, exactly as train.py does
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from bench.fidelity.parity import engine_losses, launch, run_with_children
from bench.processes import flags
from bench.record import load_json, save_json, stamp
from command_line import OneLineParser

ROOT = Path(__file__).resolve().parents[2]
PARITY_CELLS = (("fp32", 1, 2), ("bf16", 3, 2))  # precision, ZeRO stage, ranks
PARITY_STEPS = 30
CHECKPOINT_STEPS = 20


def quickstart_curve() -> list[str]:
    """Return the lines of the quickstart's log.txt."""
    return (ROOT / "runs/quickstart/log.txt").read_text(encoding="utf-8").splitlines()


def parity_curves(folder: Path) -> dict[str, list[float]]:
    """Return the losses of every cell of PARITY_CELLS."""
    from bench.fidelity.reference import N_SEQUENCES, SEQ_LEN, write_inputs

    write_inputs(folder, n_tokens=PARITY_STEPS * N_SEQUENCES * SEQ_LEN + 1)
    curves = {}
    for precision, stage, n_ranks in PARITY_CELLS:
        losses = engine_losses(folder, stage, n_ranks, precision, PARITY_STEPS)
        curves[f"{precision}/zero{stage}/{n_ranks}"] = losses
    return curves


def checkpoint_hash(folder: Path, stage: int, n_ranks: int) -> str:
    """Train, save and consolidate a checkpoint; return the SHA-256 of its weights."""
    run_dir, exported = folder / f"run_zero{stage}", folder / f"exported_zero{stage}"
    command = flags(
        model="debug",
        data_dir=folder / "data",
        run_dir=run_dir,
        ds_config=f"ds_configs/zero{stage}.json",
        micro_batch_size=2,
        max_steps=CHECKPOINT_STEPS,
        checkpoint_every=CHECKPOINT_STEPS,
        eval_tokens=256,
        sample_tokens=1,
        dropout=0.1,
    )
    trained = launch(n_ranks, command)
    if trained.returncode:
        raise RuntimeError(trained.stderr)
    export = [sys.executable, "checkpoint/consolidate.py", *flags(ckpt=run_dir, out_dir=exported)]
    done = run_with_children(export, timeout_s=100)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return hashlib.sha256((exported / "model.safetensors").read_bytes()).hexdigest()


def measure() -> dict[str, Any]:
    """Return every curve and hash by its name."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        found: dict[str, Any] = {"quickstart": quickstart_curve(), **parity_curves(folder)}
        for stage in (1, 3):
            name = f"weights of zero{stage}, 2 ranks, step {CHECKPOINT_STEPS}"
            found[name] = checkpoint_hash(folder, stage, n_ranks=2)
    return found


def main() -> int:
    """Run the command line; status 1 if something is not the same."""
    parser = OneLineParser(description=__doc__)
    parser.add_argument("--record", action="store_true", help="write --json in place of comparing")
    parser.add_argument("--json", type=Path, default=ROOT / "docs/same.json", help="the values")
    args = parser.parse_args()
    here = {**stamp(), "threads": os.environ.get("OMP_NUM_THREADS", "")}
    found = measure()
    if args.record:
        save_json(args.json, {**here, "values": found})
        return 0
    recorded = load_json(args.json)
    print(f"recorded: {recorded['machine']}, commit {recorded['commit']}")
    print(f"here:     {here['machine']}, commit {here['commit']}")
    differing = [name for name in found if found[name] != recorded["values"][name]]
    for name in found:
        print(f"{'DIFFERENT' if name in differing else 'same':9}  {name}")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
