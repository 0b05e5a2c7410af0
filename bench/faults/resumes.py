"""A run that is stopped and resumed at random steps, or on other ranks and stages, stays the same.

    python bench/faults/resumes.py --folder runs/faults

Stops: ZeRO stages 0 to 3 in fp32 and bf16, two ranks, dropout, two micro-batches per step: stopped
by a signal at random steps, the losses and the weights of the last checkpoint must have the bits of
the undisturbed run. Layouts: 2, 1, 4, 2 ranks, and stages 1, 3, 0, 2, in fp32 without dropout: the
losses must be those of the undisturbed run to 1e-5. Resumable: cases in the JSON stay.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if not __package__:  # run as a file: import from the repository root, exactly as train.py does
    sys.path[0] = str(ROOT)

N_STEPS, N_RANKS = 60, 2
TOLERANCE = 1e-5
STEPS_EACH = 5  # on one layout
LAYOUTS = {
    "ranks 2, 1, 4, 2 at stage 1": ((2, 1), (1, 1), (4, 1), (2, 1)),
    "ranks 2, 1, 4, 2 at stage 2": ((2, 2), (1, 2), (4, 2), (2, 2)),
    "ranks 2, 1, 4, 2 at stage 3": ((2, 3), (1, 3), (4, 3), (2, 3)),
    "stages 1, 3, 0, 2 on 2 ranks": ((2, 1), (2, 3), (2, 0), (2, 2)),
    "2 ranks at stage 1, 1 at stage 3, 2 at stage 0": ((2, 1), (1, 3), (2, 0)),
    "both at once": ((1, 0), (4, 3), (2, 2), (4, 1), (1, 3), (2, 0)),
}
STOPPED = {f"stage {stage}, {precision}": (stage, precision)
           for stage in range(4) for precision in ("fp32", "bf16")}  # fmt: skip
CASES = [*LAYOUTS, *STOPPED]


def arguments(folder: Path, name: str, stage: int, precision: str, *more: object) -> list[str]:
    """Return the command line of a run in its own folder."""
    from bench.faults.kills import arguments
    from bench.fidelity.parity import write_ds_config

    ds_config = write_ds_config(folder, stage, precision)
    command = arguments(folder, folder / name, stage, N_STEPS)
    return [*command, "--ds_config", str(ds_config), *map(str, more)]


def train(folder: Path, name: str, n_ranks: int, command: list[str]) -> int:
    """Train to the end; return the status of rank 0."""
    from bench.faults.forks import Run

    run = Run(command, n_ranks, folder / f"{name}.log")
    run.wait(600)
    return run.statuses[0]


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
        while stop - 1 not in losses(folder / name) and not run.poll():
            time.sleep(0.01)
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

    names = f"whole_{stage}_{precision}", f"stopped_{stage}_{precision}"
    whole, stopped = (arguments(folder, name, stage, precision) for name in names)
    train(folder, names[0], N_RANKS, whole)
    stops = train_with_stops(folder, names[1], stopped, n_stops, rng)
    a, b = (losses(folder / name) for name in names)
    same = a == b and len(a) == N_STEPS
    hashes = [hash_weights(folder / name) for name in names]
    return {"stops": stops, "losses": same, "weights": hashes[0] == hashes[1], "sha256": hashes[0],
            "ok": same and hashes[0] == hashes[1]}  # fmt: skip


def change_layouts(folder: Path, case: str) -> dict[str, Any]:
    """Compare a run that changes ranks or stages with one that does not."""
    from bench.faults.kills import losses

    layouts, name = LAYOUTS[case], case.replace(" ", "_").replace(",", "")
    n_steps = STEPS_EACH * len(layouts)
    fixed = ["--dropout", 0, "--micro_batch_size", 2]
    whole = [*arguments(folder, name + "_whole", 1, "fp32", *fixed), "--max_steps", str(n_steps)]
    train(folder, name + "_whole", N_RANKS, whole)
    for i, (n_ranks, stage) in enumerate(layouts):
        until = ["--max_steps", str(STEPS_EACH * (i + 1))]
        train(folder, name, n_ranks, [*arguments(folder, name, stage, "fp32", *fixed), *until])
    a, b = losses(folder / (name + "_whole")), losses(folder / name)
    largest = max(abs(a[step] - b.get(step, float("inf"))) for step in range(n_steps))
    return {"largest": largest, "ok": largest <= TOLERANCE}


def main() -> int:
    """Run the command line; status 1 if a run became another."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", default=CASES, help="of these: " + "; ".join(CASES))
    parser.add_argument("--stops", type=int, default=10, help="of each run (default: 10)")
    parser.add_argument("--seed", type=int, default=0, help="of the stops (default: 0)")
    parser.add_argument("--folder", type=Path, required=True, help="for runs and faults.json")
    args = parser.parse_args()
    from bench.faults.forks import import_everything
    from bench.faults.kills import open_folder
    from bench.record import record

    import_everything()
    title = "Resumed runs"
    out, results = open_folder(args.folder)
    done: dict[str, Any] = results.get(title, {}).get("values", {})

    for case in args.cases:
        if case in done:
            continue
        if case in LAYOUTS:
            done[case] = change_layouts(args.folder, case)
        else:
            stage, precision = STOPPED[case]
            rng = random.Random(f"{args.seed}/{case}")
            done[case] = stop_and_compare(args.folder, stage, precision, args.stops, rng)
        print(case, done[case], file=sys.stderr, flush=True)
        record(out, title, summary(done), done, quiet=True)
    record(out, title, summary(done), done)
    return 0 if all(result["ok"] for result in done.values()) else 1


def summary(done: dict[str, Any]) -> list[dict[str, str]]:
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
