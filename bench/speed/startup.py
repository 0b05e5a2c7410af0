"""What a user waits for: `--help`, the first step, and compilation.

python bench/speed/startup.py --out runs/bench/startup.json
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

if not __package__:  # run as a file: import from the repository root, exactly as train.py does
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from bench.record import record
from bench.speed.train_step import Side, write_tokens

ROOT = Path(__file__).resolve().parents[2]
FIRST_STEP = "step     0 | loss"
WARM_UP = 2  # the first finds no file in the page cache


def seconds_to(marker: str, command: list[str], environment: dict[str, str]) -> float:
    """Run a command from the repository root until it prints `marker`; return the seconds."""
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, env=os.environ | environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    encoding="utf-8")  # fmt: skip
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
    data = ["--data_dir", str(folder), "--eval_tokens", "64", "--sample_tokens", "1"]
    debug = ["train.py", "--model", "debug", *data, "--run_dir", f"{folder}/run"]
    results = {}
    for name, marker, command in (("--help", "usage", ["train.py", "--help"]),
                                  ("first step of debug", FIRST_STEP, debug)):  # fmt: skip
        times = [seconds_to(marker, command, {}) for _ in range(WARM_UP + repeats)]
        results[name] = times[WARM_UP:]
    run = ["train.py", "--model", model, *data, "--run_dir", f"{folder}/big"]
    run += ["--seq_len", "64", "--micro_batch_size", "1", "--batch_tokens", "64"]
    run += ["--hellaswag_every", "0"]
    cache = {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor"}
    for name, more in (("eager", []), ("cold compile", ["--compile"]),
                       ("warm compile", ["--compile"])):  # fmt: skip
        results[f"first step of {model}, {name}"] = [seconds_to(FIRST_STEP, [*run, *more], cache)]
    return results


def compilations(folder: Path, model: str) -> dict[str, list[float]]:
    """Time the first step itself, with a cold cache: eager, each block compiled, all as one."""
    flags = ["--model", model, "--data_dir", str(folder)]
    flags += ["--seq_len", "64", "--micro_batch_size", "1"]
    results = {}
    for name, what in (("bare1", "eager"), ("bare1+compile", "blocks compiled"),
                       ("bare1+whole", "whole model compiled")):  # fmt: skip
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{folder}/{name}"
        with Side(name, flags) as side:
            results[f"a loop's first step of {model}, {what}"] = [side.steps(1)["seconds"]]
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5, help="of each start (default: 5)")
    parser.add_argument("--model", default="gpt2", help="preset to compile (default: gpt2)")
    parser.add_argument("--out", type=Path, required=True, help="JSON file; results are added")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_tokens(folder)
        results = starts(folder, args.model, args.repeats) | compilations(folder, args.model)
    rows = [
        {"until": what, "median seconds": f"{statistics.median(seconds):.2f}",
         "lowest": f"{min(seconds):.2f}", "highest": f"{max(seconds):.2f}"}
        for what, seconds in results.items()
    ]  # fmt: skip
    record(args.out, "Start", rows, results)


if __name__ == "__main__":
    main()
