"""Time what a user waits for: `--help`, the first step, and compilation.

python bench/speed/startup.py --out runs/bench/startup.json
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

if not __package__:  # run as a file: import from the repository root, exactly as train.py does
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from bench.processes import flags
from bench.record import record
from bench.speed.train_step import Side, write_tokens
from command_line import OneLineParser

ROOT = Path(__file__).resolve().parents[2]
COMPILED = {
    "bare1": "eager",
    "bare1+compile": "blocks compiled",
    "bare1+whole": "whole model compiled",
}
FIRST_STEP = "step     0 | loss"
WARM_UP = 2  # the first finds no file in the page cache


def seconds_to(marker: str, command: list[str], environment: dict[str, str]) -> float:
    """Run a command from the repository root until it prints `marker`; return the seconds."""
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
    )
    assert process.stdout
    for line in process.stdout:
        if line.startswith(marker):
            seconds = time.perf_counter() - started
            process.kill()
            process.communicate()
            return seconds
    raise RuntimeError(f"{' '.join(command)} ended with {process.wait()} and no {marker!r}")


def starts(folder: Path, model: str, repeats: int) -> dict[str, list[float]]:
    """Time train.py: seconds to `--help` and to the first step, eager, compiled cold and warm."""
    inputs = flags(data_dir=folder, eval_tokens=64, sample_tokens=1)
    debug = ["train.py", *inputs, *flags(model="debug", run_dir=folder / "run")]
    shape = flags(seq_len=64, micro_batch_size=1, batch_tokens=64, hellaswag_every=0)
    eager = ["train.py", *inputs, *flags(model=model, run_dir=folder / "big"), *shape]
    # One cache for all: the second compiled start finds there what the first has compiled.
    cache = {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor"}

    def repeated(marker: str, command: list[str]) -> list[float]:
        return [seconds_to(marker, command, {}) for _ in range(WARM_UP + repeats)][WARM_UP:]

    return {
        "--help": repeated("usage", ["train.py", "--help"]),
        "first step of debug": repeated(FIRST_STEP, debug),
        f"first step of {model}, eager": [seconds_to(FIRST_STEP, eager, cache)],
        f"first step of {model}, cold compile": [
            seconds_to(FIRST_STEP, [*eager, "--compile"], cache)
        ],
        f"first step of {model}, warm compile": [
            seconds_to(FIRST_STEP, [*eager, "--compile"], cache)
        ],
    }


def compilations(folder: Path, model: str) -> dict[str, list[float]]:
    """Time the first step itself, with a cold cache: eager, each block compiled, all as one."""
    command = flags(model=model, data_dir=folder, seq_len=64, micro_batch_size=1)
    results = {}
    for name, what in COMPILED.items():
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{folder}/{name}"
        with Side(name, command) as side:
            results[f"a loop's first step of {model}, {what}"] = [side.steps(1)["seconds"]]
    return results


def main() -> None:
    parser = OneLineParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5, help="of each start (default: 5)")
    parser.add_argument("--model", default="gpt2", help="preset to compile (default: gpt2)")
    parser.add_argument("--out", type=Path, required=True, help="JSON file; results are added")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_tokens(folder)
        results = starts(folder, args.model, args.repeats) | compilations(folder, args.model)
    rows = [
        {
            "until": what,
            "median seconds": f"{statistics.median(seconds):.2f}",
            "lowest": f"{min(seconds):.2f}",
            "highest": f"{max(seconds):.2f}",
        }
        for what, seconds in results.items()
    ]
    record(args.out, "Start", rows, results)


if __name__ == "__main__":
    main()
