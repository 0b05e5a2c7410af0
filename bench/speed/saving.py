"""Time a checkpoint: the engine's own save and ours in turns, and the parts of ours.

python bench/speed/saving.py --out runs/bench/saving.json
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: import from the repository root, exactly as train.py does
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from bench.ratios import in_turns, paired_ratio
from bench.record import record
from command_line import OneLineParser

PARTS = ("flushing", "hashing", "fingerprints")  # of our save


def build_engine(folder: Path, model: str) -> Any:
    """Return an engine of one rank after a step, so that its moments exist."""
    from bench.speed.side import build_run, open_loader
    from bench.speed.train_step import write_tokens
    from data.loader import split_windows
    from train import start_engine
    from training.ranks import read_ranks
    from training.rendezvous import init_process_group
    from training.run import open_inputs
    from training.step import take_step

    write_tokens(folder)
    shape = {"micro_batch_size": 1, "seq_len": 64, "grad_accum": 1}
    args = argparse.Namespace(side="zero1", model=model, data_dir=folder, **shape)
    run_dir = folder / "run"
    run_dir.mkdir()  # train.py does so when it takes the run folder
    run = build_run(args, run_dir, read_ranks())
    device = init_process_group(run.ranks, 600)
    engine, _ = start_engine(run, open_inputs(run), device)
    batches = (split_windows(windows, device) for windows in open_loader(run))
    take_step(engine, run.config, 0, 1, batches)
    return engine


def compare(engine: Any, folder: Path, blocks: int) -> dict[str, list[float]]:
    """Save in turns; return the seconds of each block by what was done."""
    import checkpoint.fingerprints as fingerprints
    import checkpoint.manifest as manifest
    import checkpoint.saving as saving

    spent: dict[str, float] = {}

    def timed(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            started = time.perf_counter()
            result = work(*args)
            spent[name] = spent.get(name, 0.0) + time.perf_counter() - started
            return result

        return run

    saving.sync = timed("flushing", manifest.sync)
    saving.record_file = timed("hashing", manifest.record_file)
    saving.engine_fingerprints = timed("fingerprints", fingerprints.engine_fingerprints)

    def ours() -> None:
        order = {"batch_tokens": 1, "seq_len": 1}
        saving.save_checkpoint(engine, folder / "ours", step=1, precision="bf16", order=order)

    def engines() -> None:
        engine.save_checkpoint(str(folder / "engine"), tag="step", save_latest=True)

    saves = {"engine": engines, "ours": ours}
    times: dict[str, list[float]] = {name: [] for name in (*saves, *PARTS)}
    for name in in_turns(list(saves), blocks):
        spent.clear()
        shutil.rmtree(folder / name, ignore_errors=True)
        started = time.perf_counter()
        saves[name]()
        times[name].append(time.perf_counter() - started)
        for part, seconds in spent.items():
            times[part].append(seconds)
    return times


def main() -> None:
    parser = OneLineParser(description=__doc__)
    parser.add_argument("--model", default="gpt2", help="30m or a preset (default: gpt2)")
    parser.add_argument("--blocks", type=int, default=7, help="turns of each side (default: 7)")
    parser.add_argument("--out", type=Path, required=True, help="JSON file; results are added")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        times = compare(build_engine(folder, args.model), folder, args.blocks)
    parts = zip(*(times[name] for name in PARTS), strict=True)
    rest = [ours - sum(each) for ours, each in zip(times["ours"], parts, strict=True)]
    rows = [
        {
            "what": what,
            "seconds": f"{statistics.median(values):.2f}",
            "of the engine's": str(paired_ratio(values, times["engine"])),
            "of ours": str(paired_ratio(values, times["ours"])),
        }
        for what, values in (times | {"ours without these three": rest}).items()
    ]
    record(args.out, f"Checkpoint of {args.model}", rows, times)


if __name__ == "__main__":
    main()
