"""The train step through the engine against the loops that people write, in turns.

python bench/train_step.py --sides seed trainer zero1 --out runs/train_step.json

Each side (bench/side.py lists them) is a process with the same fresh weights and the same batches;
only one works at a time. First the losses are compared, then the times. Every side runs as people
run it; seed_tuned, bare0 and bare1 have the allocator's settings that the engine's sides set.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: import from the repository root, exactly as train.py does
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from bench.ratios import describe_machine, in_turns, paired_ratio

ROOT = Path(__file__).resolve().parents[1]
ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}
WARM_UP = 3  # steps, whose losses are compared
TOLERANCE = 2e-2  # nats: bf16 products in other orders, a vocabulary with and without padding


class Side:
    """The processes of one side, one per rank; a context that ends them."""

    def __init__(self, name: str, flags: list[str], n_ranks: int = 1) -> None:
        self.name = name
        environment = {k: v for k, v in os.environ.items() if k not in ALLOCATOR}
        if name.startswith(("seed_tuned", "bare")):
            environment |= ALLOCATOR
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        environment |= {"WORLD_SIZE": str(n_ranks), "LOCAL_WORLD_SIZE": str(n_ranks)}
        command = [sys.executable, str(ROOT / "bench" / "side.py"), *flags]
        command += ["--side", name.replace("seed_tuned", "seed")]
        pipe = subprocess.PIPE
        self.ranks = [
            subprocess.Popen(
                command, cwd=ROOT, env=environment | {"RANK": str(r), "LOCAL_RANK": str(r)},
                stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True,
            )
            for r in range(n_ranks)
        ]  # fmt: skip

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *_: object) -> None:
        for rank in self.ranks:
            rank.kill()
            rank.communicate()

    def steps(self, n: int) -> dict[str, Any]:
        """Train n steps; return rank 0's answer, the seconds of the slowest and all memory."""
        for rank in self.ranks:
            assert rank.stdin
            rank.stdin.write(f"{n}\n")
            rank.stdin.flush()
        answers = [self._answer(rank) for rank in self.ranks]
        seconds = max(answer["seconds"] for answer in answers)
        peak_gib = sum(answer["peak_gib"] for answer in answers)
        return answers[0] | {"seconds": seconds, "peak_gib": peak_gib}

    def _answer(self, rank: subprocess.Popen[str]) -> dict[str, Any]:
        assert rank.stdout
        for line in rank.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError(f"{self.name} ended: run bench/side.py by hand to see why")


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Run all sides in turns: losses first, then seconds per step and paired ratios."""
    flags = [f"--{name}={getattr(args, name)}" for name in
             ("model", "data_dir", "seq_len", "micro_batch_size", "grad_accum")]  # fmt: skip
    with ExitStack() as stack:
        sides = {name: stack.enter_context(Side(name, flags)) for name in args.sides}
        losses = {name: side.steps(WARM_UP)["losses"] for name, side in sides.items()}
        first = losses[args.sides[0]]
        for name, curve in losses.items():
            apart = max(abs(a - b) for a, b in zip(first, curve, strict=True))
            print(f"{name}: losses {curve}, {apart:.1e} apart", file=sys.stderr, flush=True)
            if apart > TOLERANCE:
                raise SystemExit(f"error: {name} is {apart:.3g} nats from {args.sides[0]}")
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        peaks = {}
        for block in in_turns(args.sides, args.blocks):
            for name in block:
                answer = sides[name].steps(args.steps)
                seconds[name].append(answer["seconds"] / args.steps)
                peaks[name] = answer["peak_gib"]
            print({k: round(v[-1], 3) for k, v in seconds.items()}, file=sys.stderr, flush=True)
    return summarise(args, losses, seconds, peaks)


def summarise(
    args: argparse.Namespace,
    losses: dict[str, list[float]],
    seconds: dict[str, list[float]],
    peaks: dict[str, float],
) -> dict[str, Any]:
    """Return what was measured; `times_faster["a"]["b"]` says how much faster b is than a."""
    tokens = args.micro_batch_size * args.seq_len * args.grad_accum
    ratios = {
        a: {b: asdict(paired_ratio(seconds[a], seconds[b])) for b in args.sides[i + 1 :]}
        for i, a in enumerate(args.sides[:-1])
    }
    return {
        "tokens_per_step": tokens,
        "losses": losses,
        "seconds_per_step": seconds,
        "tokens_per_s": {name: tokens / statistics.median(s) for name, s in seconds.items()},
        "peak_gib": peaks,
        "times_faster": ratios,
    }


def print_table(result: dict[str, Any]) -> None:
    """Print one row per side, one column of ratios per side before it."""
    ratios = result["times_faster"]
    print("| side | tokens/s | peak GiB | " + " | ".join(f"times {a}" for a in ratios) + " |")
    print("|---|---|---|" + "---|" * len(ratios))
    for name, rate in result["tokens_per_s"].items():
        cells = []
        for faster in ratios.values():
            r = faster.get(name)
            cells.append(f"{r['median']:.2f} ({r['low']:.2f} to {r['high']:.2f})" if r else "")
        print(f"| {name} | {rate:.0f} | {result['peak_gib'][name]:.2f} | {' | '.join(cells)} |")


def write_tokens(folder: Path) -> None:
    """Write shards of a skewed distribution: losses fall, and no token is rare."""
    import numpy as np

    rng = np.random.default_rng(7)
    for name, n in (("train_000001", 2_000_000), ("val_000000", 10_000)):
        np.save(folder / f"text_{name}.npy", (rng.zipf(1.2, size=n) % 1000).astype("<u2"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sides", nargs="+", required=True, help="two or more, references first")
    parser.add_argument("--model", default="gpt2", help="30m or a preset (default: gpt2)")
    parser.add_argument("--seq_len", type=int, default=256, help="tokens (default: 256)")
    parser.add_argument("--micro_batch_size", type=int, default=4, help="sequences (default: 4)")
    parser.add_argument("--grad_accum", type=int, default=1, help="micro-batches (default: 1)")
    parser.add_argument("--blocks", type=int, default=7, help="turns of each side (default: 7)")
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps a turn (default: 3)")
    parser.add_argument("--out", type=Path, required=True, help="JSON file; results are added")
    args = parser.parse_args()
    import torch

    with tempfile.TemporaryDirectory() as folder:
        args.data_dir = Path(folder)
        write_tokens(args.data_dir)
        result = compare(args)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True,
                            text=True, check=False).stdout.strip()  # fmt: skip
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else describe_machine()
    result |= {"device": device, "threads": torch.get_num_threads(), "torch": torch.__version__}
    result |= {"commit": commit}
    results = json.loads(args.out.read_text()) if args.out.exists() else {}
    shape = f"{args.model} {args.micro_batch_size} x {args.seq_len} x {args.grad_accum}"
    results[f"{shape}: {' '.join(args.sides)}"] = result
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(results, indent=1) + "\n")
    print_table(result)


if __name__ == "__main__":
    main()
