"""Stop and resume a run at random steps, or on other ranks and stages: it must stay the same.

    python bench/faults/resumes.py --folder runs/faults

Stops: ZeRO stages 0 to 3 in fp32 and bf16, two ranks, dropout, two micro-batches per step. After
stops by a signal at random steps, the losses and the weights of the last checkpoint must have the
bits of the undisturbed run. Layouts: other ranks, other stages or both on the way, in fp32 without
dropout. The losses must be those of the undisturbed run to 1e-5. A case that the JSON holds is not
tried again.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import random
import signal
import sys
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: import from the repository root, exactly as train.py does
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from bench.processes import flags
from bench.record import Results, Rows, run_cases
from command_line import OneLineParser

N_STEPS = 60
N_RANKS = 2
TOLERANCE = 1e-5
STEPS_EACH = 5  # on one layout
LAYOUTS = {  # ranks and stage of each start
    "ranks 2, 1, 4, 2 at stage 1": ((2, 1), (1, 1), (4, 1), (2, 1)),
    "ranks 2, 1, 4, 2 at stage 2": ((2, 2), (1, 2), (4, 2), (2, 2)),
    "ranks 2, 1, 4, 2 at stage 3": ((2, 3), (1, 3), (4, 3), (2, 3)),
    "stages 1, 3, 0, 2 on 2 ranks": ((2, 1), (2, 3), (2, 0), (2, 2)),
    "2 ranks at stage 1, 1 at stage 3, 2 at stage 0": ((2, 1), (1, 3), (2, 0)),
    "both at once": ((1, 0), (4, 3), (2, 2), (4, 1), (1, 3), (2, 0)),
}
STOPPED = {
    f"stage {stage}, {precision}": (stage, precision)
    for stage, precision in itertools.product(range(4), ("fp32", "bf16"))
}
CASES = [*LAYOUTS, *STOPPED]


def arguments(folder: Path, name: str, stage: int, precision: str) -> list[str]:
    """Return the command line of a run in its own folder."""
    from bench.faults.kills import arguments
    from bench.fidelity.parity import write_ds_config

    ds_config = write_ds_config(folder, stage, precision)
    command = arguments(folder, folder / name, stage, N_STEPS)
    return [*command, *flags(ds_config=ds_config)]


def train(folder: Path, name: str, n_ranks: int, command: list[str]) -> None:
    """Train to the end."""
    from bench.faults.forks import Run

    Run(command, n_ranks, folder / f"{name}.log").wait(600)


def train_with_stops(
    folder: Path, name: str, command: list[str], n_stops: int, rng: random.Random
) -> list[int]:
    """Train to the end, stopped by a signal to a rank at random steps; return them."""
    from bench.faults.forks import Run
    from bench.faults.kills import losses, newest_step

    stops = sorted(rng.sample(range(1, N_STEPS - 1), n_stops))
    for stop in [*stops, N_STEPS]:
        if newest_step(folder / name) > stop:
            continue
        run = Run(command, N_RANKS, folder / f"{name}.log")
        run.wait_until(lambda last=stop - 1: last in losses(folder / name))
        if stop < N_STEPS:
            number = rng.choice([signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
            run.kill([rng.randrange(N_RANKS)], number)
        run.wait(120)
    return stops


def hash_weights(run_dir: Path) -> str:
    """Return the SHA-256 of the fp32 weights of the newest checkpoint."""
    from checkpoint.layouts import step_weights
    from checkpoint.manifest import newest_step

    digest = hashlib.sha256()
    for name, weight in step_weights(newest_step(run_dir)):
        digest.update(name.encode() + weight.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


def stop_and_compare(
    folder: Path, stage: int, precision: str, n_stops: int, rng: random.Random
) -> dict[str, Any]:
    """Compare a stopped run with an undisturbed one, bit for bit."""
    from bench.faults.kills import losses

    whole, stopped = f"whole_{stage}_{precision}", f"stopped_{stage}_{precision}"
    train(folder, whole, N_RANKS, arguments(folder, whole, stage, precision))
    command = arguments(folder, stopped, stage, precision)
    stops = train_with_stops(folder, stopped, command, n_stops, rng)
    expected = losses(folder / whole)
    same_losses = losses(folder / stopped) == expected and len(expected) == N_STEPS
    sha256 = hash_weights(folder / whole)
    same_weights = hash_weights(folder / stopped) == sha256
    return {
        "stops": stops,
        "losses": same_losses,
        "weights": same_weights,
        "sha256": sha256,
        "ok": same_losses and same_weights,
    }


def change_layouts(folder: Path, case: str) -> dict[str, Any]:
    """Compare a run that changes ranks or stages with one that does not."""
    from bench.faults.kills import losses

    layouts = LAYOUTS[case]
    name = case.replace(" ", "_").replace(",", "")
    whole = f"{name}_whole"
    n_steps = STEPS_EACH * len(layouts)

    def train_until(step: int, name: str, n_ranks: int, stage: int) -> None:
        fixed = flags(dropout=0, micro_batch_size=2, max_steps=step)
        train(folder, name, n_ranks, [*arguments(folder, name, stage, "fp32"), *fixed])

    train_until(n_steps, whole, N_RANKS, stage=1)
    for i, (n_ranks, stage) in enumerate(layouts):
        train_until(STEPS_EACH * (i + 1), name, n_ranks, stage)
    expected = losses(folder / whole)
    found = losses(folder / name)
    largest = max(abs(expected[step] - found.get(step, math.inf)) for step in range(n_steps))
    return {"largest": largest, "ok": largest <= TOLERANCE}


def main() -> int:
    """Run the command line; status 1 if a run became another."""
    parser = OneLineParser(description=__doc__)
    parser.add_argument("--cases", nargs="+", default=CASES, help="of these: " + "; ".join(CASES))
    parser.add_argument("--stops", type=int, default=10, help="of each run (default: 10)")
    parser.add_argument("--seed", type=int, default=0, help="of the stops (default: 0)")
    parser.add_argument("--folder", type=Path, required=True, help="for runs and faults.json")
    args = parser.parse_args()
    from bench.faults.forks import import_everything
    from bench.faults.kills import open_folder

    import_everything()
    out = open_folder(args.folder)

    def run_case(case: str) -> dict[str, Any]:
        if case in LAYOUTS:
            return change_layouts(args.folder, case)
        stage, precision = STOPPED[case]
        rng = random.Random(f"{args.seed}/{case}")
        return stop_and_compare(args.folder, stage, precision, args.stops, rng)

    return run_cases(out, "Resumed runs", args.cases, run_case, summary)


def summary(done: Results) -> Rows:
    """Return the table."""
    rows = []
    for case, result in done.items():
        if "largest" in result:
            found = f"losses within {result['largest']:.1e}"
        else:
            found = f"{len(result['stops'])} stops; the same bits: {result['ok']}"
        rows.append({"run": case, "against the undisturbed run": found})
    return rows


if __name__ == "__main__":
    sys.exit(main())
