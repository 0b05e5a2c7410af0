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

import itertools
import os
import random
import select
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:  # run as a file: import from the repository root, exactly as train.py does
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from bench.processes import flags
from bench.record import Rows, load_json, load_json_lines, record
from command_line import OneLineParser

ROOT = Path(__file__).resolve().parents[2]
N_RANKS = 2
INTERVAL = 3  # steps between checkpoints
START_S = 120  # for a start and some steps
END_S = 15  # for the others to follow a killed rank

Result = dict[str, Any]

if TYPE_CHECKING:
    from bench.faults.forks import Run


def arguments(folder: Path, run_dir: Path, stage: int, max_steps: int) -> list[str]:
    """Return the command line of the run: dropout, and two micro-batches per step and rank."""
    return flags(
        model="debug",
        data_dir=folder / "data",
        run_dir=run_dir,
        ds_config=ROOT / "ds_configs" / f"zero{stage}.json",
        dropout=0.1,
        batch_tokens=512,
        micro_batch_size=2,
        max_steps=max_steps,
        decay_steps=1000,
        eval_every=1_000_000,
        eval_tokens=64,
        sample_tokens=1,
        checkpoint_every=INTERVAL,
        keep_checkpoints=3,
    )


def losses(run_dir: Path) -> dict[int, float]:
    """Return the loss of every step that the run has logged."""
    rows = load_json_lines(run_dir / "metrics.jsonl")
    return {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}


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
    return {
        "ended_s": ended_s,
        "statuses": statuses,
        "lost": lost,
        "problem": problem,
        "ok": not problem,
    }


def start(
    folder: Path, run_dir: Path, sabotage: Callable[[int], None] = lambda rank: None, stage: int = 1
) -> Run:
    """Start the ranks of a long run; `sabotage` is called with the rank in each."""
    from bench.faults.forks import Run

    return Run(
        arguments(folder, run_dir, stage, 10**6), N_RANKS, run_dir.with_suffix(".log"), sabotage
    )


def kill_in_step(folder: Path, run_dir: Path, rng: random.Random) -> Result:
    """Kill one rank or both at any moment of a few steps."""
    begun = newest_step(run_dir)
    run = start(folder, run_dir)
    step = begun + rng.randint(INTERVAL + 1, 3 * INTERVAL)
    reached = run.wait_until(lambda: step in losses(run_dir), START_S)
    time.sleep(rng.uniform(0, 0.4))
    victims = rng.choice([[0], [1], [0, 1]])
    run.kill(victims)
    return {"victims": victims, "step": step} | judge_end(run_dir, run, reached)


def kill_in_save(folder: Path, run_dir: Path, rng: random.Random) -> Result:
    """Kill one rank or both at any moment of the second save and the time thereafter."""
    from bench.faults.sabotage import report_saves

    reader, writer = os.pipe()
    run = start(folder, run_dir, lambda rank: report_saves(writer, rank))
    os.close(writer)  # the ranks have theirs: when they end, so does the pipe
    events_s = []
    for _ in range(3):  # begin, end, begin
        readable, _, _ = select.select([reader], [], [], START_S)
        if readable and os.read(reader, 1):
            events_s.append(time.monotonic())
    reached = len(events_s) == 3
    duration_s = events_s[1] - events_s[0] if reached else 0.0
    victims = rng.choice([[0], [1], [0, 1]])
    share = rng.uniform(0, 1.2)
    time.sleep(share * duration_s)
    run.kill(victims)
    os.close(reader)
    result = {"victims": victims, "share_of_save": share, "save_s": duration_s}
    return result | judge_end(run_dir, run, reached)


def kill_after_grace(folder: Path, run_dir: Path, rng: random.Random) -> Result:
    """Ask both ranks to stop, and kill them while they still save."""
    from bench.faults.sabotage import slow_saves

    step = newest_step(run_dir) + INTERVAL + 1
    run = start(folder, run_dir, lambda rank: slow_saves())
    reached = run.wait_until(lambda: step in losses(run_dir), START_S)
    run.kill(range(N_RANKS), signal.SIGTERM)
    grace_s = rng.uniform(0.1, 4)
    time.sleep(grace_s)
    run.kill(range(N_RANKS))
    return {"grace_s": grace_s} | judge_end(run_dir, run, reached)


def kill_at_point(folder: Path, run_dir: Path, stage: int, point: str, victim: int) -> Result:
    """Have one rank die at a point of the second save."""
    from bench.faults.forks import KILLED
    from bench.faults.sabotage import die_at

    def sabotage(rank: int) -> None:
        if rank == victim:
            die_at(point)

    run = start(folder, run_dir, sabotage, stage)
    reached = run.wait_until(lambda: run.statuses, START_S)
    result = {"stage": stage, "point": point, "victim": victim}
    result |= judge_end(run_dir, run, reached)
    if run.statuses.get(victim) != KILLED:
        result |= {"ok": False, "problem": "the point was never reached"}
    return result


def judge_end(run_dir: Path, run: Run, reached: bool) -> Result:
    """Wait for the end of a run; return what the kill left, not `ok` if its moment never came."""
    ended_s = run.wait(END_S)
    result = judge(run_dir, ended_s, run.statuses)
    if not reached:
        result |= {"ok": False, "problem": "the moment of the kill never came"}
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


def open_folder(folder: Path) -> Path:
    """Write data to train on into a folder; return the JSON file there for the results."""
    from bench.speed.train_step import write_tokens

    write_tokens(folder / "data")
    return folder / "faults.json"


KILLS: dict[str, Callable[..., Result]] = {
    "step": kill_in_step,
    "save": kill_in_save,
    "grace": kill_after_grace,
}
Try = tuple[str, Callable[..., Result], tuple[Any, ...]]


def tries_of(campaign: str, n_tries: int, seed: int) -> list[Try]:
    """Return name of the run, function and arguments of every try."""
    from bench.faults.sabotage import POINTS

    if campaign == "points":
        tries = []
        for stage, (point, victims) in itertools.product(range(4), POINTS.items()):
            for victim in victims:
                if (stage, point, victim) != (0, "first file", 1):  # there it writes none
                    tries.append((f"points{stage}", kill_at_point, (stage, point, victim)))
        return tries
    kill = KILLS[campaign]
    return [(campaign, kill, (random.Random(f"{seed}/{i}"),)) for i in range(n_tries)]


def main() -> int:
    """Run the command line; status 1 if anything was lost."""
    parser = OneLineParser(description=__doc__)
    parser.add_argument("--campaign", choices=(*KILLS, "points"), required=True)
    parser.add_argument("--tries", type=int, default=20, help="kills (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="of the kills (default: 0)")
    parser.add_argument("--folder", type=Path, required=True, help="for runs and faults.json")
    args = parser.parse_args()
    from bench.faults.forks import import_everything

    import_everything()
    folder = args.folder
    out = open_folder(folder)
    title = f"Kills: {args.campaign}"
    done: list[Result] = load_json(out).get(title, {}).get("values", {}).get("tries", [])
    tries = tries_of(args.campaign, args.tries, args.seed)
    values: dict[str, Any] = {"tries": done}
    for i in range(len(done), len(tries)):
        name, kill, more = tries[i]
        done.append(kill(folder, folder / name, *more))
        print(i, done[-1], file=sys.stderr, flush=True)
        record(out, title, summary(args.campaign, values), values, quiet=True)
    traces: dict[str, Result] = {}
    for name in dict.fromkeys(name for name, *_ in tries):
        stage = int(name[-1]) if name[-1].isdigit() else 1
        traces[name] = compare_with_undisturbed(folder, folder / name, stage)
    values["traces"] = traces
    record(out, title, summary(args.campaign, values), values)
    are_same = all(not trace["differing"] and not trace["gaps"] for trace in traces.values())
    return 0 if are_same and all(result["ok"] for result in done) else 1


def summary(campaign: str, values: dict[str, Any]) -> Rows:
    """Return the table: tries and survivals, and the steps compared at the end."""
    tries, traces = values["tries"], values.get("traces", {})
    differing = sum(len(trace["differing"]) + len(trace["gaps"]) for trace in traces.values())
    row = {
        "kills": campaign,
        "tries": str(len(tries)),
        "nothing lost": str(sum(result["ok"] for result in tries)),
        "steps compared": str(sum(trace["steps"] for trace in traces.values())),
        "with other bits": str(differing) if traces else "",
    }
    return [row]


if __name__ == "__main__":
    sys.exit(main())
