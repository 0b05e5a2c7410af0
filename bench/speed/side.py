"""Train as one side of a comparison of train steps: a process that takes steps when it is told to.

Each line of stdin asks for a number of steps; "count" after the number also counts the bytes that
they send to other ranks and that tensors hold. Each answer is a line of JSON on stdout: seconds,
losses in nats, peak memory so far, bytes sent and held. `Side` of train_step.py starts such
processes, for scaling.py, startup.py and bench/planning/memory.py too.

Sides: seed (build-nanogpt's way), hf (GPT2LMHeadModel in the same loop), trainer (Hugging Face's),
bare0 and bare1 (our model without the engine, in the arithmetic of zero0 and of zero1), ddp (bare0
on many ranks), zero0 to zero3 (the engine, on one or many). With +compile the blocks are compiled
(bare0 to zero2), with +whole the model as one (seed, bare0, bare1), with +checkpointing the
engine's blocks keep no activations.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # run as a file: import from the repository root, exactly as train.py does
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from command_line import OneLineParser
from model import GPTConfig, Preset
from model.presets import PRESETS, get_preset
from training.config import resolve_batch, resolve_train_config
from training.ds_config import load_ds_config, resolve_ds_config
from training.ranks import Ranks, read_ranks

if TYPE_CHECKING:
    import torch

    from data.loader import Loader
    from training.run import Run

    Turns = Callable[[torch.device, list[float]], Iterator[None]]

ROOT = Path(__file__).resolve().parents[2]
SIDES = ("seed", "hf", "trainer", "bare0", "bare1", "ddp", "zero0", "zero1", "zero2", "zero3")
OWN_PRESETS = {"30m": replace(PRESETS["gpt2"], config=GPTConfig(6, 6, 384))}  # nanoGPT's smallest


def preset_of(model: str) -> Preset:
    """Return a preset of ours, or of the measurements alone.

    Raises:
        BadInput: There is none of that name.
    """
    return OWN_PRESETS.get(model) or get_preset(model)


def asked_for(device: torch.device, losses: list[float]) -> Iterator[None]:
    """Yield once for every step that stdin asks for, and answer each line."""
    import torch

    from bench.speed.held import Held
    from bench.speed.traffic import Traffic
    from training.metrics import peak_memory_gib

    for line in sys.stdin:
        n_steps, *count = line.split()
        started = time.perf_counter()
        with ExitStack() as counting:
            traffic = counting.enter_context(Traffic()) if count else None
            held = counting.enter_context(Held()) if count else None
            for _ in range(int(n_steps)):
                yield
        if device.type == "cuda":
            torch.cuda.synchronize()
        answer = {
            "seconds": time.perf_counter() - started,
            "losses": losses,
            "peak_gib": peak_memory_gib(device),
            "sent_bytes": traffic and traffic.sent_bytes,
            "held_bytes": held and held.peak_bytes,
        }
        print(json.dumps(answer), flush=True)
        losses.clear()


def build_run(args: argparse.Namespace, run_dir: Path, ranks: Ranks) -> Run:
    """Resolve the run that the engine's sides train, and whose batches the others take."""
    from bench.speed.plain_train import LR
    from training.run import Run

    side, _, option = args.side.partition("+")
    name = side if side.startswith("zero") else "zero1"
    ds_config = ROOT / "ds_configs" / f"{name}.json"
    tokens = args.micro_batch_size * args.seq_len * args.grad_accum * ranks.world_size
    config = resolve_train_config(
        model=args.model,
        preset=preset_of(args.model),
        data_dir=args.data_dir,
        run_dir=run_dir,
        ds_config=ds_config,
        batch_tokens=tokens,
        micro_batch_size=args.micro_batch_size,
        seq_len=args.seq_len,
        lr=LR,
        warmup_steps=0,
        min_lr_ratio=1.0,
        eval_tokens=args.seq_len,
        hellaswag_every=0,
        compile="true" if option == "compile" else "false",
    )
    batch = resolve_batch(config, ranks.world_size)
    raw = load_ds_config(ds_config)
    if option == "checkpointing":
        raw["activation_checkpointing"] = {}
    return Run(config, batch, resolve_ds_config(raw, config, batch).ds_config, ranks)


def run_engine(run: Run, losses: list[float], turns: Turns = asked_for) -> None:
    """Train through the engine, a step for each turn, as train.py does."""
    from data.loader import split_windows
    from train import start_engine
    from training.rendezvous import init_process_group, sum_tensor
    from training.run import open_inputs
    from training.step import take_step
    from training.watchdog import group_timeout_s

    inputs = open_inputs(run)
    device = init_process_group(run.ranks, group_timeout_s(run.config.timeouts))
    engine, _ = start_engine(run, inputs, device)
    engine.train()
    batches = (split_windows(windows, device) for windows in open_loader(run))
    n_micro = run.batch.grad_accum_steps
    for step, _ in enumerate(turns(device, losses)):
        loss_sum, *_ = take_step(engine, run.config, step, n_micro, batches)
        total = float(sum_tensor(loss_sum.double(), device))  # all ranks
        losses.append(total / n_micro / run.ranks.world_size)


def open_loader(run: Run) -> Loader:
    """Open the batches of the run."""
    from data.loader import Loader
    from data.order import Order
    from data.shards import TokenStream

    config, batch = run.config, run.batch
    stream = TokenStream(config.data_dir, "train", config.gpt_config.vocab_size)
    order = Order(len(stream), config.seq_len, config.seed, config.shuffle)
    per_rank = (batch.micro_batch_size, batch.grad_accum_steps)
    return Loader(stream, order, *per_rank, run.ranks.rank, run.ranks.world_size)


def run_plain(run: Run, side: str, losses: list[float], turns: Turns = asked_for) -> None:
    """Train with a loop of plain_train.py, from the same weights on the same batches."""
    import torch
    from torch.nn.parallel import DistributedDataParallel

    from bench.speed import plain_train as plain
    from launch.planning.fitting import plan_here
    from model import GPT
    from training.engine import compile_blocks
    from training.rendezvous import choose_device, init_process_group
    from training.watchdog import group_timeout_s

    name, _, compiled = side.partition("+")
    device = choose_device(run.ranks)
    if name == "ddp":
        init_process_group(run.ranks, group_timeout_s(run.config.timeouts))
    torch.set_float32_matmul_precision("high")  # as the seed does
    config = run.config.gpt_config
    on_gpu = device.type == "cuda"
    loop = (open_loader(run), turns(device, losses), losses, run.batch.grad_accum_steps)
    ours = GPT(config, run.config.seed).to(device)
    if on_gpu:
        ours.use_memory(plan_here(run, device).share.memory_use)  # as the engine's sides do
    if compiled == "compile":
        compile_blocks(ours)
    elif compiled == "whole":
        ours.compile()
    if name == "seed":
        seed = plain.PlainGPT(config).to(device)
        seed.load_state_dict(ours.state_dict())
        if compiled == "whole":
            seed.compile()
        plain.autocast_loop(seed, seed, *loop, fused=on_gpu)
    elif name == "bare0":
        plain.autocast_loop(ours, ours, *loop, fused=True)
    elif name == "ddp":
        in_ddp = DistributedDataParallel(ours)
        plain.autocast_loop(in_ddp, in_ddp, *loop, fused=True)
    elif name == "bare1":
        plain.masters_loop(ours, *loop)
    else:
        theirs = plain.hf_twin(ours)
        if name == "trainer":
            plain.trainer_loop(theirs, *loop)
        else:
            loss_of = partial(plain.hf_loss, theirs)
            plain.autocast_loop(theirs, loss_of, *loop, fused=on_gpu)


def main() -> None:
    parser = OneLineParser(description=__doc__)
    parser.add_argument("--side", required=True, help="one of those above")
    parser.add_argument("--model", default="gpt2", help="30m or a preset (default: gpt2)")
    parser.add_argument("--data_dir", type=Path, required=True, help="folder of token shards")
    parser.add_argument("--seq_len", type=int, default=256, help="(default: 256)")
    parser.add_argument("--micro_batch_size", type=int, default=4, help="(default: 4)")
    parser.add_argument("--grad_accum", type=int, default=1, help="micro-batches (default: 1)")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side.partition("+")[0] not in SIDES:
        parser.error(f"--side {args.side} is unknown: give one of {' '.join(SIDES)}")
    losses: list[float] = []
    with tempfile.TemporaryDirectory() as run_dir:
        run = build_run(args, Path(run_dir), read_ranks())
        if args.side.startswith("zero"):
            run_engine(run, losses)
        else:
            run_plain(run, args.side, losses)


if __name__ == "__main__":
    main()
