"""Measure everything that needs a GPU with one command, in stages, the most important first.

    python bench/gpu/run.py --out runs/gpu --data_dir my_tokens --budget 560
    python bench/gpu/run.py --out runs/gpu --tiny                            on a CPU: do they work?

Each stage adds a line of JSON to OUT/results.jsonl when it ends. A stage that takes too long or
dies costs only itself. The same command again goes on with the stages that have no line yet.
bench/gpu/page.py prints the tables of docs/GPU.md from these lines.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: import from the repository root, exactly as train.py does
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from bench.record import load_json_lines
from command_line import OneLineParser
from errors import BadInput

Row = dict[str, Any]
# Seconds that each may take on an H100: guesses, for none has run on one.
FIRST = {
    "setup": 60, "commands": 110, "gradients": 40, "parity": 75, "zero1": 40, "seed": 30,
    "losses": 40, "attention": 20, "zero1+compile": 70, "zero0": 30, "bare1": 25,
    "zero1 at 16": 25, "evaluation": 60, "resume": 70, "seed+whole": 100, "zero0+compile": 60,
    "zero2": 25, "zero3": 30, "zero1 at 32": 20, "export": 40, "host_waits": 30, "profile": 60,
}  # fmt: skip
SECOND = {"curve": 150, "zero1 of gpt2-xl": 60, "offload": 160}
SECONDS = FIRST | SECOND
START_S = 120  # until the first stage of a process begins
VOCABULARY = 50_257  # GPT-2's
LEAST_S = 15  # in less time no other stage begins
LOST = 3  # exit status of a process whose GPU context is lost


def run_stage(name: str, args: argparse.Namespace) -> Row:
    """Run one stage in this process; return what it found."""
    from bench.gpu import kernels, programs, training
    from bench.gpu.device import Options

    options = Options(args.data_dir, args.tiny, args.curve_steps)
    for module in (kernels, programs, training):
        if hasattr(module, name):
            return getattr(module, name)(options)
    side, _, sizes = name.partition(" ")
    if sizes == "of gpt2-xl":
        return training.speed(options, side, 3, model="gpt2-xl", micro_batch_size=16)
    if sizes.startswith("at "):
        return training.speed(options, side, 20, micro_batch_size=int(sizes.removeprefix("at ")))
    return training.speed(options, side)


def run_stages(names: list[str], args: argparse.Namespace) -> None:
    """Run stages one after the other and write a line for each (the child)."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for deterministic kernels
    for name in names:
        write(args.out, "begin", {"name": name})
        started = time.perf_counter()
        try:
            row = run_stage(name, args)
        except Exception as error:  # of any kind: the next stage is worth trying
            row = {"error": f"{type(error).__name__}: {error}"[:600]}
        write(args.out, name, row | {"s": round(time.perf_counter() - started, 1)})
        if "CUDA error" in row.get("error", ""):
            os._exit(LOST)  # nothing works any more in this process


def write(out: Path, stage: str, row: Row) -> None:
    """Add a line to the results, safe on the disk."""
    with (out / "results.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"stage": stage} | row, default=str) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read(out: Path) -> list[Row]:
    """Return the lines of the results so far."""
    return load_json_lines(out / "results.jsonl")


def supervise(names: list[str], args: argparse.Namespace) -> None:
    """Have children run the stages until all are done or the time is up (the parent)."""
    deadline = time.monotonic() + args.budget
    while time.monotonic() < deadline - LEAST_S:
        todo = left_of(names, args.out)
        if not todo:
            return
        n_begun = len(_begun(args.out))
        command = [sys.executable, __file__, *sys.argv[1:], "--child", ",".join(todo)]
        with (args.out / "log.txt").open("ab") as log:
            child = subprocess.Popen(command, start_new_session=True, stdout=log, stderr=log)
        try:
            why = watch(child, args, deadline)
        finally:  # a signal that stops this process stops the child, too
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            status = child.wait()
        begun = _begun(args.out)
        if len(begun) == n_begun:
            raise SystemExit(f"error: {args.out / 'log.txt'}: no stage began. Fix: read it")
        if left_of(begun[-1:], args.out):
            write(args.out, begun[-1], {"error": why or f"died with status {status}"})


def watch(child: subprocess.Popen[bytes], args: argparse.Namespace, deadline: float) -> str:
    """Wait until a child has ended; return why it must be ended before, or ""."""
    n_begun = len(_begun(args.out))
    seconds = START_S
    started = time.monotonic()
    while time.monotonic() < min(started + seconds, deadline):
        begun = _begun(args.out)
        if len(begun) > n_begun:
            n_begun = len(begun)
            started = time.monotonic()
            seconds = SECONDS[begun[-1]] * args.slack
            print(begun[-1], file=sys.stderr, flush=True)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(0.25)
            return ""
    return "the budget is used up" if time.monotonic() >= deadline else f"over its {seconds:.0f} s"


def _begun(out: Path) -> list[str]:
    return [row["name"] for row in read(out) if row["stage"] == "begin"]


def left_of(names: list[str], out: Path) -> list[str]:
    """Return those of the stages that have no line yet."""
    done = {row["stage"] for row in read(out)}
    return [name for name in names if name not in done]


def check(args: argparse.Namespace, names: list[str]) -> None:
    """Refuse what would waste a GPU's time.

    Raises:
        BadInput: Names the flag.
    """
    import torch

    from data.shards import TokenStream

    unknown = [name for name in names if name not in SECONDS]
    if unknown:
        known = f"choose from {', '.join(SECONDS)}"
        raise BadInput(f"--stages {unknown[0]}", "is not a stage", known)
    if args.budget <= LEAST_S:
        where = f"--budget {args.budget:g}"
        raise BadInput(where, "is too short for a stage", f"give more than {LEAST_S}")
    is_gpu = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
    if not args.tiny and not is_gpu:
        version = f"PyTorch {torch.__version__}"
        raise BadInput(version, "does not see a GPU here", "--tiny takes sizes for a CPU")
    for split in ("train", "val"):
        TokenStream(args.data_dir, split, VOCABULARY)


def main() -> int:
    """Run the command line; return 1 if a stage failed."""
    parser = OneLineParser(description=__doc__)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder for results.jsonl and log.txt")
    add("--data_dir", type=Path, help="folder of token shards (made-up tokens)")
    add("--budget", type=float, default=560, help="seconds for all stages (default: 560)")
    add("--slack", type=float, default=1.0, help="times what each stage may take (default: 1)")
    add("--stages", default="first", help="first, second, all, or names with commas between")
    add("--curve_steps", type=int, default=180, help="of the stage curve (default: 180)")
    add("--tiny", action="store_true", help="sizes for a CPU")
    add("--child", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.data_dir is None:
        from bench.speed.train_step import write_tokens

        args.data_dir = args.out / "tokens"
        write_tokens(args.data_dir)
    if args.child:
        run_stages(args.child.split(","), args)
        return 0
    groups = {"first": list(FIRST), "second": list(SECOND), "all": list(SECONDS)}
    names = groups.get(args.stages) or args.stages.split(",")
    try:
        check(args, names)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(1))  # SystemExit: `finally` ends the child
    with contextlib.suppress(KeyboardInterrupt):
        supervise(names, args)
    rows = [row for row in read(args.out) if row["stage"] in names]
    print("\n".join(json.dumps(row)[:700] for row in rows))
    left = left_of(names, args.out)
    if left:
        print(f"left out: {', '.join(left)}. Fix: the same command again goes on", file=sys.stderr)
    failed = [row["stage"] for row in rows if "error" in row or row.get("ok") is False]
    return 1 if failed or left else 0


if __name__ == "__main__":
    sys.exit(main())
