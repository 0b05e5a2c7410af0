"""Time the train step through the engine and the loops that people write, in turns.

python bench/speed/train_step.py --sides seed trainer zero1 --out runs/train_step.json

Each side (bench/speed/side.py lists them) is a process with the same fresh weights and the same
batches; only one works at a time. First the losses are compared, then the times. Every side runs
as people run it; seed_tuned, bare0, bare1 and ddp have the allocator's settings that the engine's
sides set.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: import from the repository root, exactly as train.py does
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from bench.fidelity.parity import largest_difference
from bench.processes import flags, free_port, rank_variables
from bench.ratios import in_turns, paired_ratio
from bench.record import Rows, record
from bench.speed.side import preset_of
from command_line import OneLineParser

ROOT = Path(__file__).resolve().parents[2]
ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}
SHAPE = ("model", "seq_len", "micro_batch_size", "grad_accum")  # flags of side.py
WARM_UP = 3  # steps, whose losses are compared
TOLERANCE = 2e-2  # nats: bf16 products in other orders, a vocabulary with and without padding


class Side:
    """The processes of one side, one per rank; a context that ends them."""

    def __init__(self, name: str, flags: list[str], n_ranks: int = 1) -> None:
        self.name = name
        environment = {k: v for k, v in os.environ.items() if k not in ALLOCATOR}
        if name.startswith(("seed_tuned", "bare", "ddp")):
            environment |= ALLOCATOR
        if n_ranks > 1:
            environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // n_ranks))
        program = str(ROOT / "bench" / "speed" / "side.py")
        command = [sys.executable, program, *flags, "--side", name.replace("seed_tuned", "seed")]
        port = free_port()
        self.errors = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115
        self.ranks = [
            subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment | rank_variables(rank, n_ranks, port),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.errors,
                encoding="utf-8",
            )
            for rank in range(n_ranks)
        ]

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *_: object) -> None:
        for rank in self.ranks:
            rank.kill()
            rank.communicate()
        self.errors.close()

    def steps(self, n: int, count: bool = False) -> dict[str, Any]:
        """Train n steps; return rank 0's answer, the seconds of the slowest and all memory."""
        # All ranks are told before any answer is read: they wait for each other in a step.
        for rank in self.ranks:
            assert rank.stdin
            rank.stdin.write(f"{n} count\n" if count else f"{n}\n")
            rank.stdin.flush()
        answers = [self._answer(rank) for rank in self.ranks]
        seconds = max(answer["seconds"] for answer in answers)
        peak_gib = sum(answer["peak_gib"] for answer in answers)
        return answers[0] | {"seconds": seconds, "peak_gib": peak_gib}

    def _answer(self, rank: subprocess.Popen[str]) -> dict[str, Any]:
        assert rank.stdout
        for line in rank.stdout:
            if line.startswith("{"):  # libraries print to stdout, too
                return json.loads(line)
        self.errors.seek(0)
        lines = [line.strip() for line in self.errors if line.strip()]
        raise SystemExit(
            f"error: {self.name} ended: {lines[-1] if lines else 'it printed nothing'}"
        )


def compare(args: argparse.Namespace, names: list[str], n_ranks: int = 1) -> dict[str, Any]:
    """Measure the losses of each side, what it sends, and its seconds per step.

    The sides run in turns, because other programs may take a CPU at any time. On a GPU, whose
    memory holds one of them, they run one after the other.
    """
    from training.ranks import Ranks
    from training.rendezvous import choose_device

    shape = {name: getattr(args, name) for name in SHAPE}
    is_gpu = choose_device(Ranks()).type == "cuda"
    losses: dict[str, list[float]] = {}
    sent_bytes, peak_gib = {}, {}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        write_tokens(Path(folder))
        command = flags(**shape, data_dir=folder)
        for group in [[name] for name in names] if is_gpu else [names]:
            with ExitStack() as stack:
                sides = {name: stack.enter_context(Side(name, command, n_ranks)) for name in group}
                losses |= {name: side.steps(WARM_UP)["losses"] for name, side in sides.items()}
                check_losses(losses)
                for name, side in sides.items():
                    sent_bytes[name] = side.steps(1, count=True)["sent_bytes"]
                for name in in_turns(group, args.blocks):
                    answer = sides[name].steps(args.steps)
                    seconds[name].append(answer["seconds"] / args.steps)
                    peak_gib[name] = answer["peak_gib"]
                    print(f"{name}: {seconds[name][-1]:.3f} s", file=sys.stderr, flush=True)
    return {
        "shape": shape | {"ranks": n_ranks},
        "losses": losses,
        "seconds_per_step": seconds,
        "peak_gib": peak_gib,
        "sent_bytes": sent_bytes,
    }


def check_losses(losses: dict[str, list[float]]) -> None:
    """End the program if a side is not near the first one."""
    first = next(iter(losses))
    for name, curve in losses.items():
        difference = largest_difference(losses[first], curve)
        print(f"{name}: losses {curve}, {difference:.1e} apart", file=sys.stderr, flush=True)
        if difference > TOLERANCE:
            raise SystemExit(f"error: {name} is {difference:.3g} nats from {first}")


def table(result: dict[str, Any]) -> Rows:
    """Return a row for each side; a column "over a" says how much faster it is than a."""
    from training.metrics import peak_flops
    from training.ranks import Ranks
    from training.rendezvous import choose_device

    shape, seconds = result["shape"], result["seconds_per_step"]
    tokens = shape["micro_batch_size"] * shape["seq_len"] * shape["grad_accum"]
    flops = preset_of(shape["model"]).config.flops_per_token(shape["seq_len"])
    peak = peak_flops(choose_device(Ranks()))
    rows = []
    for name, times in seconds.items():
        rate = tokens / statistics.median(times)  # tokens/s
        row = {"side": name, "tokens/s": f"{rate:,.0f}", "TFLOP/s": f"{rate * flops / 1e12:.3g}"}
        row["MFU"] = f"{rate * flops / peak:.1%}" if peak else "n/a"
        row["peak GiB"] = f"{result['peak_gib'][name]:.2f}"
        before = list(seconds)[: len(rows)]
        rows.append(row | {f"over {a}": str(paired_ratio(seconds[a], times)) for a in before})
    return rows


def write_tokens(folder: Path) -> None:
    """Write shards of a skewed distribution, if there are none: losses fall, no token is rare."""
    import numpy as np

    if (folder / "text_val_000000.npy").exists():  # the last one
        return
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(7)
    for name, n in (("train_000001", 2_000_000), ("val_000000", 10_000)):
        np.save(folder / f"text_{name}.npy", (rng.zipf(1.2, size=n) % 1000).astype("<u2"))


def add_shape(parser: argparse.ArgumentParser, model: str) -> None:
    """Add the flags that say what each side trains, how often, and where the result goes."""
    parser.add_argument("--model", default=model, help=f"30m or a preset (default: {model})")
    parser.add_argument("--seq_len", type=int, default=256, help="tokens (default: 256)")
    parser.add_argument("--micro_batch_size", type=int, default=4, help="sequences (default: 4)")
    parser.add_argument("--grad_accum", type=int, default=1, help="micro-batches (default: 1)")
    parser.add_argument("--blocks", type=int, default=7, help="turns of each side (default: 7)")
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps a turn (default: 3)")
    parser.add_argument("--out", type=Path, required=True, help="JSON file; results are added")


def main() -> None:
    parser = OneLineParser(description=__doc__)
    parser.add_argument("--sides", nargs="+", required=True, help="two or more, references first")
    add_shape(parser, model="gpt2")
    args = parser.parse_args()
    title = f"Train step: {args.model}, {args.micro_batch_size} × {args.seq_len} tokens"
    if args.grad_accum > 1:
        title += f", {args.grad_accum} micro-batches"
    result = compare(args, args.sides)
    record(args.out, f"{title}: {', '.join(args.sides)}", table(result), result)


if __name__ == "__main__":
    main()
