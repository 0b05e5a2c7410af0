"""Train a GPT-2 or GPT-3 with DeepSpeed.

python train.py --model debug --data_dir DIR
deepspeed --num_gpus 8 train.py --ds_config ds_configs/zero2.json --model gpt2 --data_dir DIR
torchrun --nproc_per_node 8 train.py --model gpt2 --data_dir DIR
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.config import (
    BatchArithmetic,
    TrainConfig,
    describe_run,
    parse_train_config,
    profiled_steps,
    resolve_batch,
    resolve_train_config,
    to_json,
)
from launch.ds_config import load_ds_config, precision, resolve_ds_config, zero_stage
from launch.ranks import Ranks, check_extension_locks, read_ranks, say_once

if TYPE_CHECKING:
    import torch

    from checkpoint.manifest import Manifest
    from data.shards import TokenStream
    from eval.packing import Example

N_SAMPLES, TOP_K = 4, 50  # of the in-loop samples, as in build-nanogpt


@dataclass(frozen=True)
class Run:
    """One resolved run on these ranks."""

    config: TrainConfig
    batch: BatchArithmetic
    ds_config: dict[str, Any]
    ranks: Ranks


@dataclass(frozen=True)
class Inputs:
    """What a run reads: data, and the weights that it starts from, if they are not fresh."""

    train_stream: TokenStream
    val_stream: TokenStream
    hellaswag: list[Example]  # none where it is off
    init_folder: Path | None
    checkpoint: tuple[Path, Manifest] | None


def main(argv: list[str]) -> int:
    """Run the command line; return the exit status."""
    ranks = read_ranks()
    try:
        config = resolve_train_config(parse_train_config(argv, __doc__ or ""))
        batch = resolve_batch(config, ranks.world_size)
        config = replace(config, micro_batch_size=batch.micro_batch_size)
        ds_config = resolve_ds_config(load_ds_config(config.ds_config), config, batch)
        if config.dry_run:
            print(describe_run(config, batch, ds_config))
            return 0
        run = Run(config, batch, ds_config, ranks)
        inputs = open_inputs(run)
    except ValueError as error:  # every rank of a machine finds the same
        say_once(ranks, f"error: {error}")
        return 2
    try:
        train(run, inputs)
    except ValueError as error:  # found by this rank in its own share
        print(f"error: rank {ranks.rank}: {error}", file=sys.stderr)
        return 2
    return 0


def open_inputs(run: Run) -> Inputs:
    """Open and check everything that the run reads, before any process group exists.

    Raises:
        ValueError: Whatever cannot be trained on or started from; names the file or flag.
    """
    from checkpoint.resuming import check_layout, find_checkpoint
    from data.order import Order
    from data.shards import TokenStream
    from eval.hellaswag import load_examples
    from eval.packing import crop_contexts
    from eval.val_loss import check_eval_tokens
    from model.hub import locate_hf_folder
    from model.weights import load_hf_config

    config, gpt = run.config, run.config.gpt_config
    check_extension_locks(run.ranks)
    if config.run_dir.exists() and not config.run_dir.is_dir():
        raise ValueError(f"--run_dir {config.run_dir}: is a file; give a folder")
    verify = config.verify and run.ranks.local_rank == 0  # once per machine
    train_stream = TokenStream(config.data_dir, "train", gpt.vocab_size, verify)
    val_stream = TokenStream(config.data_dir, "val", gpt.vocab_size, verify)
    Order(len(train_stream), config.seq_len)
    check_eval_tokens(val_stream, config.eval_tokens)
    rows = load_examples(limit=config.hellaswag_limit) if config.hellaswag_every else []
    data = (train_stream, val_stream, crop_contexts(rows, gpt.block_size))
    if folder := find_checkpoint(run.config.run_dir, config.resume):
        manifest = check_layout(
            folder,
            world_size=run.ranks.world_size,
            zero_stage=zero_stage(run.ds_config),
            precision=precision(run.ds_config),
            model=gpt,
        )
        if manifest.step > config.max_steps:
            raise ValueError(f"--max_steps {config.max_steps}: {folder} is beyond it")
        return Inputs(*data, None, (folder, manifest))
    if not config.init_from:
        return Inputs(*data, None, None)
    init_folder = locate_hf_folder(config.init_from)
    found = replace(load_hf_config(init_folder), dropout=config.dropout)
    if found != gpt:
        raise ValueError(
            f"--init_from {config.init_from} is {found}, --model {config.model} is {gpt}"
        )
    return Inputs(*data, init_folder, None)


def start_engine(run: Run, inputs: Inputs, device: torch.device) -> Any:
    """Build the engine, with fresh, given or resumed weights (all ranks)."""
    from checkpoint.resuming import load_checkpoint
    from launch.engine import build_engine, build_model, load_weights
    from model.weights import load_hf_weights

    model = build_model(run.config, run.ds_config, device)
    if inputs.init_folder:
        weights = load_hf_weights(inputs.init_folder, run.config.gpt_config)
        load_weights(model, weights, zero_stage(run.ds_config))
    engine, groups = build_engine(model, run.config, run.ds_config, run.ranks)
    if inputs.checkpoint:
        load_checkpoint(engine, *inputs.checkpoint)
    if run.ranks.is_main:
        print(describe_run(run.config, run.batch, run.ds_config), file=sys.stderr)
        print(groups, file=sys.stderr)
    return engine


def write_configs(run: Run) -> None:
    """Write the resolved configuration into the run folder."""
    run.config.run_dir.mkdir(parents=True, exist_ok=True)
    for name, values in (("config", to_json(run.config)), ("ds_config", run.ds_config)):
        (run.config.run_dir / f"{name}.json").write_text(json.dumps(values, indent=2) + "\n")


def evaluate_and_sample(
    engine: Any, run: Run, val_stream: TokenStream, device: torch.device
) -> tuple[float, list[str]]:
    """Return the validation loss in nats per token, and sampled texts (all ranks, in step)."""
    from eval.sample import sample_texts
    from eval.val_loss import evaluate
    from launch.engine import sum_over_ranks

    config = run.config
    engine.eval()
    sums = evaluate(
        engine,
        val_stream,
        seq_len=config.seq_len,
        eval_tokens=config.eval_tokens,
        batch_size=run.batch.micro_batch_size,
        device=device,
        rank=run.ranks.rank,
        world_size=run.ranks.world_size,
    )
    loss, n_tokens = sum_over_ranks(sums, device)
    texts = sample_texts(
        engine,
        config.gpt_config,
        config.sample_prompt,
        n_samples=N_SAMPLES,
        max_new_tokens=config.sample_tokens,
        top_k=TOP_K,
        seed=config.seed,
        device=device,
    )
    engine.train()
    return loss / n_tokens, texts


def score_hellaswag(engine: Any, run: Run, examples: list[Example], device: torch.device) -> Any:
    """Return the HellaSwag score (all ranks, in step)."""
    from eval.hellaswag import score
    from eval.packing import evaluate
    from launch.engine import sum_tensor

    engine.eval()
    rank, world_size = run.ranks.rank, run.ranks.world_size
    losses = evaluate(engine, examples, device=device, rank=rank, world_size=world_size)
    engine.train()
    return score(sum_tensor(losses, device), examples)


def train(run: Run, inputs: Inputs) -> None:
    """Train until `max_steps`, then leave a consolidated folder (all ranks).

    Raises:
        ValueError: Damaged data, checkpoint or initial weights; names the file.
    """
    import torch

    from checkpoint.consolidate import consolidate_engine
    from checkpoint.saving import save_checkpoint
    from data.loader import Loader, split_windows
    from data.order import Order
    from launch.engine import init_process_group, sum_over_ranks
    from launch.metrics import Metrics
    from launch.step import take_step
    from launch.tracing import Trace

    config, batch, ranks = run.config, run.batch, run.ranks
    device = init_process_group(ranks, config.dist_timeout_s)
    engine = start_engine(run, inputs, device)
    manifest = inputs.checkpoint[1] if inputs.checkpoint else None
    resumed = manifest.step if manifest else None
    step, samples = (manifest.step, manifest.samples) if manifest else (0, 0)
    if ranks.is_main:
        write_configs(run)
    metrics = Metrics(config, resumed, ranks.world_size, device) if ranks.is_main else None
    order = Order(len(inputs.train_stream), config.seq_len, config.seed, config.shuffle)
    loader = Loader(inputs.train_stream, order, batch.micro_batch_size, batch.grad_accum_steps,
                    ranks.rank, ranks.world_size, samples)  # fmt: skip
    batches = (split_windows(windows, device) for windows in loader)
    engine.train()
    trace = None
    if config.profile:
        trace = Trace(*profiled_steps(config), config.run_dir / "profile", ranks.rank)

    def is_due(every: int) -> bool:
        return step != resumed and (step == config.max_steps or step % every == 0)

    while True:
        if is_due(config.eval_every):
            val_loss, texts = evaluate_and_sample(engine, run, inputs.val_stream, device)
            if metrics:
                metrics.evaluation(step, val_loss, texts)
        if inputs.hellaswag and is_due(config.hellaswag_every):
            result = score_hellaswag(engine, run, inputs.hellaswag, device)
            if metrics:
                metrics.hellaswag(step, result)
        if step > 0 and is_due(config.checkpoint_every):
            save_checkpoint(engine, run.config.run_dir / "checkpoints", step=step, samples=samples,
                            precision=precision(run.ds_config))  # fmt: skip
        if step == config.max_steps:
            break
        if trace:
            trace.before(step)
        started = time.perf_counter()
        loss_sum, grad_norm, lr = take_step(engine, config, step, batch.grad_accum_steps, batches)
        if step % config.log_every == 0:
            n_losses = batch.grad_accum_steps * ranks.world_size
            with torch.profiler.record_function("log"):
                loss = sum_over_ranks([loss_sum], device)[0] / n_losses
            if metrics:
                metrics.train(step, loss, lr, float(grad_norm), time.perf_counter() - started)
        if trace:
            trace.after(step)
        step += 1
        samples += batch.batch_sequences
    loader.close()
    consolidate_engine(engine, run.config.run_dir, step)
    if metrics:
        metrics.close()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
