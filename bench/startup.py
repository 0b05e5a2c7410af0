"""What a user waits for before the first step: `--help`, a start, a cold and a warm compilation.

python bench/startup.py --out runs/startup.json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

if not __package__:  # run as a file: import from the repository root, exactly as train.py does
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from bench.ratios import describe_machine
from bench.train_step import write_tokens

ROOT = Path(__file__).resolve().parents[1]
WARM_UP = 2  # the first finds no file in the page cache


def seconds_to(marker: str, command: list[str], environment: dict[str, str]) -> float:
    """Run a command from the repository root until it prints `marker`; return the seconds."""
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, env=os.environ | environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert process.stdout
    for line in process.stdout:
        if line.startswith(marker):
            seconds = time.perf_counter() - started
            process.kill()
            process.communicate()
            return seconds
    raise RuntimeError(f"{' '.join(command)} ended with {process.wait()} and no {marker!r}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5, help="of each start (default: 5)")
    parser.add_argument("--model", default="gpt2", help="preset to compile (default: gpt2)")
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    args = parser.parse_args()
    results: dict[str, object] = {"machine": describe_machine()}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_tokens(folder)
        data = ["--data_dir", temporary, "--eval_tokens", "64", "--sample_tokens", "1"]
        debug = ["train.py", "--model", "debug", *data, "--run_dir", f"{temporary}/run"]
        starts = {"--help": ("usage", ["train.py", "--help"]),
                  "first step of debug": ("step     0 | loss", debug)}  # fmt: skip
        for name, (marker, command) in starts.items():
            times = [seconds_to(marker, command, {}) for _ in range(WARM_UP + args.repeats)]
            results[name] = {"median_s": statistics.median(times[WARM_UP:]), "all_s": times}
        shape = ["--seq_len", "64", "--micro_batch_size", "1", "--batch_tokens", "64"]
        run = ["train.py", "--model", args.model, *data, *shape, "--run_dir", f"{temporary}/big"]
        run += ["--hellaswag_every", "0"]
        cache = {"TORCHINDUCTOR_CACHE_DIR": f"{temporary}/inductor"}
        for name, more in (("eager", []), ("cold compile", ["--compile"]),
                           ("warm compile", ["--compile"])):  # fmt: skip
            seconds = seconds_to("step     0 | loss", [*run, *more], cache)
            results[f"first step of {args.model}, {name}"] = seconds
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
