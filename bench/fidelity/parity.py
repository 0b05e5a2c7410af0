"""Compare every ZeRO stage and rank count with one plain PyTorch loop, on identical data.

    python bench/fidelity/parity.py --out runs/parity.json

Each cell is one run of `deepspeed --num_gpus N train.py`; the reference is
bench/fidelity/reference.py. Resumable: cells that --out holds are not run again.
"""

import itertools
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: import from the repository root, exactly as train.py does
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from bench.processes import environment_without_ranks, flags, free_port
from bench.record import load_json, load_json_lines, save_json
from command_line import OneLineParser

ROOT = Path(__file__).resolve().parents[2]
TOLERANCE = {"fp32": 2e-6, "bf16": 2e-3}
LAUNCH_TIMEOUT_S = 280  # less than pytest allows a test

Start = Callable[[int, list[str]], subprocess.CompletedProcess[str]]


def write_ds_config(folder: Path, stage: int, precision: str) -> Path:
    """Write the shipped ds_config of a stage, in fp32 if that is asked for."""
    ds_config = json.loads((ROOT / "ds_configs" / f"zero{stage}.json").read_text(encoding="utf-8"))
    if precision == "fp32":
        ds_config.pop("bf16", None)
        ds_config.pop("torch_autocast", None)
    path = folder / f"zero{stage}_{precision}.json"
    path.write_text(json.dumps(ds_config), encoding="utf-8")
    return path


def run_with_children(command: list[str], timeout_s: int) -> subprocess.CompletedProcess[str]:
    """Run a launcher from the repository root on the CPU; a timeout ends its ranks, too.

    Raises:
        subprocess.TimeoutExpired: It ran longer than `timeout_s`.
    """
    environment = environment_without_ranks()
    environment |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        encoding="utf-8",
    )
    try:
        out, err = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # its session: the launcher and the ranks
        process.communicate()
        raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def launcher(n_ranks: int) -> list[str]:
    """Return `deepspeed --num_gpus N` with a free port."""
    command = [sys.executable, "-m", "deepspeed.launcher.runner"]
    return command + flags(num_gpus=n_ranks, master_addr="127.0.0.1", master_port=free_port())


def launch(
    n_ranks: int, arguments: list[str], script: str = "train.py"
) -> subprocess.CompletedProcess[str]:
    """Run `deepspeed --num_gpus N train.py …` within a time limit."""
    return run_with_children([*launcher(n_ranks), script, *arguments], LAUNCH_TIMEOUT_S)


def engine_losses(
    folder: Path,
    stage: int,
    n_ranks: int,
    precision: str,
    steps: int,
    *more: str,
    start: Start = launch,
) -> list[float]:
    """Train through the engine; return the loss of each step, in nats.

    Args:
        folder: Holds what `reference.write_inputs` wrote.
        stage: Of ZeRO.
        n_ranks: How many processes.
        precision: "fp32" or "bf16".
        steps: Optimizer steps.
        more: Other flags of train.py.
        start: Starts so many ranks of train.py with these arguments; by default `deepspeed` does.
    """
    from bench.fidelity import reference as r

    run_dir = folder / f"zero{stage}_{n_ranks}_{precision}"
    command = flags(
        model="debug",
        init_from=folder / "init",
        shuffle="false",
        data_dir=folder / "data",
        run_dir=run_dir,
        resume="none",
        ds_config=write_ds_config(folder, stage, precision),
        batch_tokens=r.N_SEQUENCES * r.SEQ_LEN,
        micro_batch_size=r.N_SEQUENCES // r.GRAD_ACCUM // n_ranks,
        max_steps=steps,
        warmup_steps=r.WARMUP,
        decay_steps=steps,
        lr=r.LR,
        weight_decay=r.WEIGHT_DECAY,
        grad_clip=r.CLIP,
        eval_every=steps,
        eval_tokens=r.SEQ_LEN,
        sample_tokens=1,
    )
    done = start(n_ranks, [*command, *more])
    if done.returncode:
        raise RuntimeError(f"zero{stage}, {n_ranks} ranks:\n{done.stdout}{done.stderr}")
    rows = load_json_lines(run_dir / "metrics.jsonl")
    return [row["train/loss"] for row in rows if "train/loss" in row]


def reference_precision(stage: int, precision: str) -> str:
    """Name the arithmetic that a shipped ds_config means: stage 0 has fp32 weights."""
    return "autocast" if stage == 0 and precision == "bf16" else precision


def largest_difference(a: list[float], b: list[float]) -> float:
    """Return the largest difference of two curves of the same length."""
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def print_table(cells: dict[str, Any]) -> None:
    """Print one row per precision and stage, one column per rank count."""
    print("| precision | stage | 1 rank | 2 ranks | 4 ranks |\n|---|---|---|---|---|")
    for precision in TOLERANCE:
        for stage in range(4):
            found = [cells.get(f"{precision}/zero{stage}/{n}") for n in (1, 2, 4)]
            shown = [f"{cell['difference']:.1e}" if cell else "" for cell in found]
            print(f"| {precision} | {stage} | {' | '.join(shown)} |")


def main() -> int:
    """Run the command line; status 1 if a cell is outside its tolerance."""
    parser = OneLineParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="(default: 1 2 4)")
    parser.add_argument("--precisions", nargs="+", default=list(TOLERANCE), choices=TOLERANCE)
    parser.add_argument("--compile", action="store_true", help="stages 0 to 2, blocks compiled")
    parser.add_argument("--out", type=Path, default=Path("runs/parity.json"), help="JSON")
    args = parser.parse_args()
    import torch

    from bench.fidelity.reference import N_SEQUENCES, SEQ_LEN, reference_losses, write_inputs

    cells = load_json(args.out).get("cells", {})
    result = {"torch": torch.__version__, "machine": platform.machine(), "cells": cells}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_inputs(folder, n_tokens=args.steps * N_SEQUENCES * SEQ_LEN + 1)
        kinds = ("fp32", "autocast", "bf16")
        references = {p: reference_losses(folder, p, args.steps) for p in kinds}
        more = ["--compile"] if args.compile else []
        stages = range(3 if args.compile else 4)
        for precision, stage, n_ranks in itertools.product(args.precisions, stages, args.ranks):
            name = "/".join([precision, f"zero{stage}", str(n_ranks), *more])
            if name in cells:
                continue
            losses = engine_losses(folder, stage, n_ranks, precision, args.steps, *more)
            expected = references[reference_precision(stage, precision)]
            difference = largest_difference(losses, expected)
            ok = difference <= TOLERANCE[precision]
            cells[name] = {"difference": difference, "ok": ok}
            save_json(args.out, result)
            print(name, f"{difference:.2e}", file=sys.stderr, flush=True)
    print_table(cells)
    return 0 if all(cell["ok"] for cell in cells.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
