"""Train a GPT-2 or GPT-3 with DeepSpeed.

python train.py --model debug --data_dir DIR
deepspeed --num_gpus 8 train.py --ds_config ds_configs/zero2.json --model gpt2 --data_dir DIR
torchrun --nproc_per_node 8 train.py --model gpt2 --data_dir DIR
"""

from __future__ import annotations

import contextlib
import functools
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from checkpoint.run_folder import write_json
from launch.planning.fitting import advice, explain_out_of_memory, plan_here, settle_micro_batch
from training.config import TrainConfig, parse_flags, profiled_steps, to_json
from training.ds_config import precision, zero_stage
from training.ranks import leave, ranks_or_exit, say_once
from training.run import Inputs, Run, describe_run, open_inputs, resolve_run, take_run_dir
from training.streams import outlive_readers
from training.supervise import BAD_INPUT, FAILED, FINISHED, error_line, report, supervise
from training.watchdog import Watchdog, group_timeout_s

if TYPE_CHECKING:
    import torch

    from checkpoint.manifest import Manifest
    from data.loader import Loader
    from eval.packing import Example
    from eval.session import Session
    from training.health import Health
    from training.metrics import Metrics
    from training.stops import Stops


@dataclass
class Progress:
    """Where a run stands: updates done, samples consumed, and the step of its last checkpoint."""

    step: int
    samples: int
    saved_step: int


def main(argv: list[str]) -> int:
    """Run the command line; return the exit status."""
    ranks = ranks_or_exit()
    try:
        run = resolve_run(parse_flags(argv, __doc__ or ""), ranks)
        for remark in run.remarks if ranks.is_main else []:
            print(f"warning: {remark}", file=sys.stderr)
        if run.config.dry_run:
            print(describe_run(run.config, run.batch, run.ds_config))
            if not run.is_settled:
                n = run.batch.micro_batch_size
                print(f"micro-batch     {n}, or more where the GPU holds it, or fewer")
            return FINISHED
        inputs = open_inputs(run)
        examples = open_hellaswag(run.config)
        folder = take_run_dir(run, inputs) if ranks.is_main else contextlib.nullcontext()
    except (ValueError, OSError) as error:  # every rank of a machine finds the same
        say_once(ranks, f"error: {error_line(error)}")
        return BAD_INPUT if isinstance(error, ValueError) else FAILED
    with folder:
        try:
            return supervise(run, functools.partial(train, run, inputs, examples))
        except Exception as error:  # of any kind: one line, and a status to act on
            return report(run, explain_out_of_memory(error, run))


def open_hellaswag(config: TrainConfig) -> list[Example]:
    """Return the rows that the run is scored on, cropped to the model; none where that is off.

    Raises:
        ValueError: The rows do not fit the model.
    """
    from eval.hellaswag import load_examples
    from eval.packing import crop_contexts

    if not config.hellaswag_every:
        return []
    rows = load_examples(limit=config.hellaswag_limit)
    return crop_contexts(rows, config.gpt_config.block_size)


def start_engine(run: Run, inputs: Inputs, device: torch.device) -> tuple[Any, Manifest | None]:
    """Build the engine, with fresh, given or resumed weights (all ranks)."""
    from checkpoint.hf_folder import load_hf_weights
    from checkpoint.resuming import load_checkpoint, newest_intact
    from training.engine import (
        ask_for_determinism,
        build_engine,
        build_model,
        load_weights,
        set_clipping,
    )

    settle_micro_batch(run, device, resumes=bool(inputs.checkpoints))
    config, stage = run.config, zero_stage(run.ds_config)
    planned = plan_here(run, device)
    warning = advice(planned)
    if warning and run.ranks.is_main:
        print(f"warning: {warning}", file=sys.stderr)
    checkpoint = newest_intact(inputs.checkpoints, config.resume)
    if config.deterministic:
        ask_for_determinism()
    model = build_model(config, run.ds_config, device)
    model.use_memory(planned.memory_use)
    if inputs.init_folder:
        load_weights(model, load_hf_weights(inputs.init_folder, config.gpt_config), stage)
    engine, groups = build_engine(model, config, run.ds_config, run.ranks)
    if checkpoint:
        load_checkpoint(engine, *checkpoint, precision(run.ds_config))
        if run.ranks.is_main:
            print(f"resumed from {checkpoint[0]}", file=sys.stderr)
        set_clipping(engine, config.grad_clip)
    if run.ranks.is_main:
        print(describe_run(config, run.batch, run.ds_config), file=sys.stderr)
        print(groups, file=sys.stderr)
    return engine, checkpoint[1] if checkpoint else None


def open_session(run: Run, engine: Any, stops: Stops, device: torch.device) -> Session:
    """Return a session that looks for a request to stop before each forward (all ranks)."""
    from eval.session import Session

    def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
        stops.check(device)  # all ranks: each does the same number of forwards
        return engine(*args, **kwargs)

    return Session(forward, device, run.ranks)


def evaluate(
    run: Run,
    inputs: Inputs,
    examples: list[Example],
    session: Session,
    step: int,
    metrics: Metrics | None,
) -> None:
    """Do the evaluations that are due after `step` updates (all ranks, in step)."""
    from eval import hellaswag, packing
    from eval.sample import sample_texts
    from eval.val_loss import mean_loss

    config = run.config
    if is_due(config, step, config.eval_every):
        loss = mean_loss(
            session,
            inputs.val_stream,
            seq_len=config.seq_len,
            eval_tokens=config.eval_tokens,
            batch_size=run.batch.micro_batch_size,
        )
        texts = sample_texts(
            session, config.gpt_config, config.sample_prompt, config.sample_tokens, config.seed
        )
        if metrics:
            metrics.evaluation(step, loss, texts)
    if examples and is_due(config, step, config.hellaswag_every):
        losses = packing.evaluate(session.model, examples, **session.share)
        result = hellaswag.score(session.sum(losses), examples)
        if metrics:
            metrics.hellaswag(step, result)


def is_due(config: TrainConfig, step: int, every: int) -> bool:
    """Return whether what happens every so many steps, and at the end, happens after `step`."""
    return step == config.max_steps or step % every == 0


def is_pause_due(config: TrainConfig, step: int) -> bool:
    """Return whether a checkpoint or an evaluation happens after `step`."""
    intervals = (config.checkpoint_every, config.eval_every, config.hellaswag_every)
    return any(is_due(config, step, every) for every in intervals if every)


def save(
    run: Run, inputs: Inputs, engine: Any, progress: Progress, health: Health, watchdog: Watchdog
) -> None:
    """Leave a checkpoint of this step, unless there is one (all ranks)."""
    from checkpoint.saving import save_checkpoint

    if progress.step == progress.saved_step:
        return
    watchdog.phase("save")
    save_checkpoint(
        engine,
        run.config.run_dir / "checkpoints",
        step=progress.step,
        samples=progress.samples,
        precision=precision(run.ds_config),
        order=inputs.order,
        keep=0 if health.last_was_bad() else run.config.keep_checkpoints,  # 0: all, good ones too
        keep_every=run.config.keep_every,
        unverified=run.unverified,
    )
    progress.saved_step = progress.step


def open_loader(run: Run, inputs: Inputs, samples: int) -> Loader:
    """Return this rank's micro-batches after so many samples of the run."""
    from data.loader import Loader
    from data.order import Order

    config, batch, ranks = run.config, run.batch, run.ranks
    order = Order(len(inputs.train_stream), config.seq_len, config.seed, config.shuffle)
    return Loader(inputs.train_stream, order, batch.micro_batch_size, batch.grad_accum_steps,
                  ranks.rank, ranks.world_size, samples)  # fmt: skip


def train(
    run: Run, inputs: Inputs, examples: list[Example], watchdog: Watchdog, stops: Stops
) -> tuple[str, str]:
    """Train until `max_steps`, then leave a consolidated folder (all ranks).

    Returns:
        How it ended, a key of STATUS, and why.

    Raises:
        ValueError: Damaged data, checkpoint or initial weights; names the file.
    """
    import torch

    from checkpoint.consolidate import consolidate_engine
    from data.loader import split_windows
    from training.health import Health
    from training.metrics import Metrics
    from training.rendezvous import init_process_group
    from training.step import StepClock, take_step
    from training.stops import StopRequested
    from training.tracing import Trace

    start_s, limit_s = watchdog.timeouts_s["start"], group_timeout_s(run.config.timeouts)
    watchdog.phase("start", times=3)  # whoever does not come is named before this clock runs out
    device = init_process_group(run.ranks, limit_s, start_s)
    watchdog.phase("start")
    engine, manifest = start_engine(run, inputs, device)
    config, batch, ranks = run.config, run.batch, run.ranks
    resumed = manifest.step if manifest else None
    progress = Progress(resumed or 0, manifest.samples if manifest else 0, resumed or 0)
    metrics = None
    if ranks.is_main:
        write_json(config.run_dir / "config.json", to_json(config))
        write_json(config.run_dir / "ds_config.json", run.ds_config)
        metrics = Metrics(config, resumed, ranks.world_size, device)
    loader = open_loader(run, inputs, progress.samples)
    batches = (split_windows(windows, device) for windows in loader)
    session = open_session(run, engine, stops, device)
    health = Health(config.max_bad_steps)
    trace = Trace(*profiled_steps(config), config.run_dir / "profile", ranks.rank)
    stops.wait_for_check, clock = True, StepClock()
    try:
        while True:
            step = progress.step
            stops.check(device)
            if is_pause_due(config, step):
                clock.pause(device)
            if is_due(config, step, config.checkpoint_every):  # first: evaluation may be stopped
                save(run, inputs, engine, progress, health, watchdog)
            watchdog.phase("eval")
            engine.eval()
            evaluate(run, inputs, examples, session, step, metrics)
            engine.train()
            if step == config.max_steps:
                break
            watchdog.phase("step")
            trace.before(step)
            clock.resume()
            loss_sum, norm, lr = take_step(engine, config, step, batch.grad_accum_steps, batches)
            health.add(step, loss_sum, norm)
            if step % config.log_every == 0:
                with torch.profiler.record_function("log"):
                    verdicts = health.judge(batch.grad_accum_steps * ranks.world_size)
                if metrics:
                    metrics.train(verdicts, lr, clock.lap() / len(verdicts))
            trace.after(step)
            progress.step += 1
            progress.samples += batch.batch_sequences
            if health.is_lost:
                save(run, inputs, engine, progress, health, watchdog)
                return "diverged", health.farewell(step)
    except StopRequested as stop:
        save(run, inputs, engine, progress, health, watchdog)
        return "preempted", f"{stop} before step {progress.step}"
    finally:
        loader.close()
        if metrics:
            metrics.close()
    watchdog.phase("save")
    folder = consolidate_engine(engine, config.run_dir, progress.step, run.unverified)
    return "finished", str(folder)


if __name__ == "__main__":
    outlive_readers()
    leave(main(sys.argv[1:]))
