"""Kill a run again and again, in every way, and show that nothing of it is lost.

    python bench/faults/kills.py --campaign step --tries 100 --folder runs/faults

One run of two ranks is killed, started again and killed again. After each kill its newest
checkpoint must be whole, `latest` must name a whole one, no more steps may be lost than lie
between two checkpoints, and no rank may live on; at the end every loss must have the bits of a run
that nobody disturbed. Campaigns: step (at any moment of training), save (at any moment of a save),
points (at each point of a save, every ZeRO stage, either rank), grace (SIGTERM, then killed before
the slow save that it asks for is done).

Resumable: the JSON and the run in --folder go on where they were. `make faults` runs all.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import select
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if not __package__:  # run as a file: import from the repository root, exactly as train.py does
    sys.path[0] = str(ROOT)

N_RANKS, INTERVAL = 2, 3  # steps between checkpoints
START_S, END_S = 120, 15  # for a start and some steps; for the others to follow a killed rank

Result = dict[str, Any]


def arguments(folder: Path, run_dir: Path, stage: int, max_steps: int) -> list[str]:
    """Return the command line of the run: dropout, and two micro-batches per step and rank."""
    return [
        "--model", "debug", "--data_dir", str(folder / "data"), "--run_dir", str(run_dir),
        "--ds_config", str(ROOT / "ds_configs" / f"zero{stage}.json"), "--dropout", "0.1",
        "--batch_tokens", "512", "--micro_batch_size", "2", "--max_steps", str(max_steps),
        "--decay_steps", "1000", "--eval_every", "1000000", "--eval_tokens", "64",
        "--sample_tokens", "1", "--checkpoint_every", str(INTERVAL), "--keep_checkpoints", "3",
    ]  # fmt: skip


def losses(run_dir: Path) -> dict[int, float]:
    """Return the loss of every step that the run has logged."""
    found, path = {}, run_dir / "metrics.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        if line.endswith("}") and "train/loss" in line:
            row = json.loads(line)
            found[row["step"]] = row["train/loss"]
    return found


def newest_step(run_dir: Path) -> int:
    """Return the step of the newest complete checkpoint, or 0."""
    from checkpoint.manifest import complete_steps, step_of

    steps = complete_steps(run_dir / "checkpoints")
    return step_of(steps[-1]) if steps else 0


def judge(run_dir: Path, ended_s: float | None, statuses: dict[int, int]) -> Result:
    """Return what a kill left, with `ok`."""
    from checkpoint.manifest import complete_steps, read_manifest, verify_files

    steps = complete_steps(run_dir / "checkpoints")
    problem = "" if ended_s is not None else f"a rank lived on for {END_S} s"
    if 0 in statuses.values():
        problem = "a rank ended with status 0"
    try:
        for folder in steps:
            verify_files(folder, read_manifest(folder))
    except ValueError as error:
        problem = str(error)
    latest = run_dir / "checkpoints" / "latest"
    if latest.exists() and latest.read_text(encoding="utf-8") not in [p.name for p in steps]:
        problem = f"latest names {latest.read_text(encoding='utf-8')!r}"
    lost = max(losses(run_dir), default=-1) + 1 - newest_step(run_dir)
    if lost > INTERVAL:
        problem = f"{lost} steps lost"
    statuses = dict(sorted(statuses.items()))
    return {"ended_s": ended_s, "statuses": statuses, "lost": lost, "problem": problem,
            "ok": not problem}  # fmt: skip


def kill_in_step(folder: Path, run_dir: Path, rng: random.Random) -> Result:
    """Kill one rank or both at any moment of a few steps."""
    from bench.faults.forks import Run

    begun = newest_step(run_dir)
    run = Run(arguments(folder, run_dir, 1, 10**6), N_RANKS, run_dir.with_suffix(".log"))
    steps = rng.randint(INTERVAL + 1, 3 * INTERVAL)
    deadline = time.monotonic() + START_S
    while begun + steps not in losses(run_dir) and time.monotonic() < deadline and not run.poll():
        time.sleep(0.02)
    reached = begun + steps in losses(run_dir)
    time.sleep(rng.uniform(0, 0.4))
    victims = rng.choice([[0], [1], [0, 1]])
    run.kill(victims)
    result = {"victims": victims, "step": begun + steps}
    return result | _after(run_dir, run, reached)


def kill_in_save(folder: Path, run_dir: Path, rng: random.Random) -> Result:
    """Kill one rank or both at any moment of the second save and the time thereafter."""
    from bench.faults.forks import Run
    from bench.faults.sabotage import tell_of_saves

    reader, writer = os.pipe()
    run = Run(arguments(folder, run_dir, 1, 10**6), N_RANKS, run_dir.with_suffix(".log"),
              lambda rank: tell_of_saves(writer, rank))  # fmt: skip
    os.close(writer)
    events = [at for _ in range(3) if (at := _next_event(reader))]  # begin, end, begin
    duration_s = events[1] - events[0] if len(events) == 3 else 0.0
    victims = rng.choice([[0], [1], [0, 1]])
    share = rng.uniform(0, 1.2)
    time.sleep(share * duration_s)
    run.kill(victims)
    os.close(reader)
    result = {"victims": victims, "share_of_save": share, "save_s": duration_s}
    return result | _after(run_dir, run, len(events) == 3)


def kill_after_grace(folder: Path, run_dir: Path, rng: random.Random) -> Result:
    """Ask both ranks to stop, and kill them while they still save."""
    from bench.faults.forks import Run
    from bench.faults.sabotage import slow_saves

    step = newest_step(run_dir) + INTERVAL + 1
    run = Run(arguments(folder, run_dir, 1, 10**6), N_RANKS, run_dir.with_suffix(".log"),
              lambda rank: slow_saves())  # fmt: skip
    deadline = time.monotonic() + START_S
    while step not in losses(run_dir) and time.monotonic() < deadline and not run.poll():
        time.sleep(0.02)
    reached = step in losses(run_dir)
    run.kill(range(N_RANKS), signal.SIGTERM)
    grace_s = rng.uniform(0.1, 4)
    time.sleep(grace_s)
    run.kill(range(N_RANKS))
    return {"grace_s": grace_s} | _after(run_dir, run, reached)


def _after(run_dir: Path, run: Any, reached: bool) -> Result:
    ended_s = run.wait(END_S)
    result = judge(run_dir, ended_s, run.statuses)
    if not reached:
        result |= {"ok": False, "problem": "the moment of the kill never came"}
    return result


def _next_event(reader: int) -> float | None:
    readable, _, _ = select.select([reader], [], [], START_S)
    return time.monotonic() if readable and os.read(reader, 1) else None


def kill_at_point(folder: Path, run_dir: Path, stage: int, point: str, victim: int) -> Result:
    """Have one rank die at a point of the second save."""
    from bench.faults.forks import KILLED, Run
    from bench.faults.sabotage import die_at

    run = Run(arguments(folder, run_dir, stage, 10**6), N_RANKS, run_dir.with_suffix(".log"),
              lambda rank: die_at(point) if rank == victim else None)  # fmt: skip
    deadline = time.monotonic() + START_S
    while not run.statuses and time.monotonic() < deadline:
        run.poll()
        time.sleep(0.01)
    result = {"stage": stage, "point": point, "victim": victim}
    result |= _after(run_dir, run, bool(run.statuses))
    if run.statuses.get(victim) != KILLED:
        result |= {"ok": False, "problem": "the point was never reached"}
    return result


def compare_with_undisturbed(folder: Path, run_dir: Path, stage: int) -> Result:
    """Return whether every loss of a killed run has the bits of one that nobody killed."""
    from bench.faults.forks import Run

    reference = run_dir.with_name(run_dir.name + "_reference")
    killed = losses(run_dir)
    command = arguments(folder, reference, stage, max(killed) + 1)
    Run(command, N_RANKS, reference.with_suffix(".log")).wait(3600)
    undisturbed = losses(reference)
    differing = [step for step in killed if killed[step] != undisturbed.get(step)]
    gaps = sorted(set(range(max(killed) + 1)) - killed.keys())
    return {"steps": len(killed), "differing": differing, "gaps": gaps}


def open_folder(folder: Path) -> tuple[Path, dict[str, Any]]:
    """Return the JSON file of a folder with data to train on, and what it holds."""
    from bench.speed.train_step import write_tokens

    if not (folder / "data").exists():
        (folder / "data").mkdir(parents=True)
        write_tokens(folder / "data")
    out = folder / "faults.json"
    return out, json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}


def tries_of(
    campaign: str, n_tries: int, seed: int
) -> list[tuple[str, Callable[..., Result], Any]]:
    """Return name of the run, function and arguments of every try."""
    from bench.faults.sabotage import POINTS

    if campaign == "points":
        return [
            (f"points{stage}", kill_at_point, (stage, point, victim))
            for stage in range(4) for point, victims in POINTS.items() for victim in victims
            if (stage, point, victim) != (0, "first file", 1)  # it writes none
        ]  # fmt: skip
    kill = {"step": kill_in_step, "save": kill_in_save, "grace": kill_after_grace}[campaign]
    return [(campaign, kill, (random.Random(f"{seed}/{i}"),)) for i in range(n_tries)]


def main() -> int:
    """Run the command line; status 1 if anything was lost."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--campaign", choices=("step", "save", "grace", "points"), required=True)
    parser.add_argument("--tries", type=int, default=20, help="kills (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="of the kills (default: 0)")
    parser.add_argument("--folder", type=Path, required=True, help="for runs and faults.json")
    args = parser.parse_args()
    from bench.faults.forks import import_everything
    from bench.record import record

    import_everything()
    folder = args.folder
    out, results = open_folder(folder)
    title = f"Kills: {args.campaign}"
    done: list[Result] = results.get(title, {}).get("values", {}).get("tries", [])
    tries = tries_of(args.campaign, args.tries, args.seed)
    values: dict[str, Any] = {"tries": done}
    for i, (name, kill, more) in enumerate(tries):
        if i < len(done):
            continue
        done.append(kill(folder, folder / name, *more))
        print(i, done[-1], file=sys.stderr, flush=True)
        record(out, title, summary(args.campaign, values), values, quiet=True)
    values["traces"] = {
        name: compare_with_undisturbed(
            folder, folder / name, int(name[-1]) if name[-1].isdigit() else 1
        )
        for name in dict.fromkeys(name for name, *_ in tries)
    }
    record(out, title, summary(args.campaign, values), values)
    broken = [t for t in values["traces"].values() if t["differing"] or t["gaps"]]
    return 1 if broken or not all(result["ok"] for result in done) else 0


def summary(campaign: str, values: dict[str, Any]) -> list[dict[str, str]]:
    """Return the table: tries and survivals, and the steps compared at the end."""
    tries, traces = values["tries"], values.get("traces", {})
    differing = sum(len(t["differing"]) + len(t["gaps"]) for t in traces.values())
    return [{
        "kills": campaign,
        "tries": str(len(tries)),
        "nothing lost": str(sum(result["ok"] for result in tries)),
        "steps compared": str(sum(t["steps"] for t in traces.values())),
        "with other bits": str(differing) if traces else "",
    }]  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
