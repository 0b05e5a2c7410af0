"""Make a fault on one rank each, and check what launch/preflight.py says.

    python bench/cluster/unfit.py --folder runs/unfit --healthy 10

Each start has 4 ranks on this machine, as forks of one process. Status 1 if a fault was not found
where it was made, or something was found where there was none.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: import from the repository root, exactly as train.py does
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from bench.processes import flags
from bench.record import Rows, record
from command_line import OneLineParser

HEALTHY = "healthy"
FAULTS = "a fault on each rank"
HANG = "a rank hangs"
DEAD_LINK = "a collective never returns"
N_RANKS = 4
LIMIT_S = 60
HANG_S = 4  # to wait for the one that hangs

Acts = dict[int, Callable[[], None]]  # by rank
Found = list[tuple[str, list[int]]]  # checks and ranks


def nothing() -> None:
    """Be a healthy rank."""


def install_another_torch() -> None:
    """Report another version of torch on this rank."""
    import importlib.metadata as metadata

    real = metadata.version
    setattr(metadata, "version", lambda name: "2.0.1" if name == "torch" else real(name))  # noqa: B010


def slow_down(seconds: float) -> None:
    """Let each matrix product of this rank take longer."""
    from training import probes

    real = probes.multiply

    def multiply(a: Any) -> None:
        time.sleep(seconds)
        real(a)

    probes.multiply = multiply


def hang() -> None:
    """Never return from reading the memory."""

    from launch.checks import machine

    machine.read_memory = lambda device: time.sleep(1000) or 0


def hang_in_collectives() -> None:
    """Hang in the first all-reduce, as NCCL does when a link is dead."""
    from launch.checks import survey
    from training import probes

    survey.ATTEMPT_S = 2
    probes.measure_allreduce = lambda *args: time.sleep(1000)


def starts(argv: list[str], elsewhere: Path) -> dict[str, tuple[Found, Acts]]:
    """Return for each kind of start what must be found, and what is done to which rank.

    Args:
        argv: Of the command; a rank may change its own.
        elsewhere: A folder that is not the run's.
    """
    from bench.faults.mishaps import fill_disk

    def move() -> None:
        argv[argv.index("--run_dir") + 1] = str(elsewhere)

    four = {
        0: install_another_torch,
        1: partial(fill_disk, 0),
        2: partial(slow_down, 0.05),
        3: move,
    }
    found = [("versions", [0]), ("run folder", [1]), ("run folder shared", [3]), ("matmul", [2])]
    dead = dict.fromkeys(range(N_RANKS), hang_in_collectives)
    return {
        HEALTHY: ([], {}),
        FAULTS: (found, four),
        HANG: ([("answers", [2])], {2: hang}),
        DEAD_LINK: ([("pairs in a machine", [0, 1, 2, 3])], dead),
    }


def start(folder: Path, kind: str) -> dict[str, Any]:
    """Start 4 ranks of preflight; return what came of it, with `ok`."""
    from bench.faults.forks import Run

    log = folder / f"{kind.replace(' ', '_')}.log"
    log.unlink(missing_ok=True)
    timeout_s = HANG_S if kind == HANG else LIMIT_S
    argv = flags(
        model="debug",
        data_dir=folder / "data",
        run_dir=folder / "run",
        eval_tokens=4096,
        timeouts=f"start={timeout_s}",
    )
    expected, acts = starts(argv, folder / "elsewhere")[kind]
    run = Run(argv, N_RANKS, log, lambda rank: acts.get(rank, nothing)(), "launch.preflight")
    began = time.monotonic()
    run.wait_until(lambda: 0 in run.statuses, LIMIT_S)
    run.wait(0 if kind == HANG else 2)  # launchers end whoever is left
    lines = log.read_text(encoding="utf-8").splitlines()
    results = [json.loads(line) for line in lines if line.startswith("{")]
    result = results[0] if results else {"findings": []}
    found = [(finding["check"], finding["ranks"]) for finding in result["findings"]]
    return {
        "ok": found == expected and run.statuses[0] == bool(expected),
        "ended_s": round(time.monotonic() - began, 1),
        "statuses": run.statuses,
        "errors": [line for line in lines if line.startswith("error: ")],
        "result": result,
    }


def main() -> int:
    """Run the command line; return the exit status."""
    parser = OneLineParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="for data, logs, unfit.json")
    parser.add_argument("--healthy", type=int, default=1, help="starts without a fault (1)")
    args = parser.parse_args()
    os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    import launch.checks.survey  # noqa: F401  # once, before the forks
    from bench.speed.train_step import write_tokens

    write_tokens(args.folder / "data")
    done = []
    for kind in [HEALTHY] * args.healthy + [FAULTS, HANG, DEAD_LINK]:
        done.append({"kind": kind} | start(args.folder, kind))
        print({k: v for k, v in done[-1].items() if k != "result"}, file=sys.stderr, flush=True)
    rows: Rows = []
    for kind in (HEALTHY, FAULTS, HANG, DEAD_LINK):
        tries = [result["ok"] for result in done if result["kind"] == kind]
        row = {"start": kind, "tries": str(len(tries)), "as it should be": str(sum(tries))}
        rows.append(row)
    record(args.folder / "unfit.json", "Preflight on 4 ranks", rows, done)
    return 0 if all(result["ok"] for result in done) else 1


if __name__ == "__main__":
    sys.exit(main())
