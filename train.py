"""Train a GPT-2 or GPT-3 with DeepSpeed.

python train.py --model debug --data_dir DIR
deepspeed --num_gpus 8 train.py --ds_config ds_configs/zero2.json --model gpt2 --data_dir DIR
torchrun --nproc_per_node 8 train.py --model gpt2 --data_dir DIR
"""

from __future__ import annotations

import contextlib
import functools
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if sys.flags.safe_path:  # python -I, -P: this folder is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parent))

from checkpoint.run_folder import write_json
from errors import error_line, exit_status_of
from exit_status import FINISHED
from launch.planning.fitting import advice, explain_out_of_memory, plan_here, settle_micro_batch
from training.broken_pipes import ignore_broken_pipes
from training.config import TrainConfig, parse_flags, to_json
from training.ds_config import precision, zero_stage
from training.ranks import leave, ranks_or_exit, say_once
from training.run import Inputs, Run, describe_run, open_inputs, resolve_run, take_run_dir
from training.supervise import report, supervise
from training.watchdog import Watchdog, group_timeout_s

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from eval.packing import Example
    from eval.session import Session
    from training.health import Health
    from training.metrics import Metrics
    from training.saver import Saver
    from training.step import StepClock
    from training.stops import Stops


def main(argv: list[str]) -> int:
    """Run the command line; return the exit status."""
    ranks = ranks_or_exit()
    try:
        run = resolve_run(parse_flags(argv, __doc__ or ""), ranks)
        for remark in run.remarks if ranks.is_main else []:
            print(f"warning: {remark}", file=sys.stderr)
        try:
            inputs = open_inputs(run)
            examples = open_hellaswag(run.config)
            folder = take_run_dir(run, inputs) if ranks.is_main else contextlib.nullcontext()
        finally:
            if run.config.dry_run and ranks.is_main:  # one that is refused, too
                print(describe_run(run))
        if run.config.dry_run:
            return FINISHED
    except Exception as error:  # of any kind: every rank of a machine finds the same
        if "--debug" in argv:
            traceback.print_exc()
        say_once(ranks, f"error: {error_line(error)}")
        return exit_status_of(error)
    with folder:
        try:
            return supervise(run, functools.partial(train, run, inputs, examples))
        except Exception as error:  # of any kind: one line, and a status to act on
            return report(run, explain_out_of_memory(error, run))


def open_hellaswag(config: TrainConfig) -> list[Example]:
    """Return the rows that the run is scored on, cropped to the model; none where that is off.

    Raises:
        BadInput: The rows do not fit the model.
    """
    from eval.hellaswag import load_examples
    from eval.packing import crop_contexts

    if not config.hellaswag_every:
        return []
    rows = load_examples(limit=config.hellaswag_limit)
    return crop_contexts(rows, config.gpt_config.block_size)


def join_ranks(run: Run, watchdog: Watchdog) -> torch.device:
    """Wait for all ranks, form the process group (all ranks), and return this rank's device."""
    from training.rendezvous import init_process_group

    start_s, limit_s = watchdog.timeouts_s["start"], group_timeout_s(run.config.timeouts)
    watchdog.phase("start", times=3)  # a missing rank is named before this clock runs out
    device = init_process_group(run.ranks, limit_s, start_s)
    watchdog.phase("start")
    return device


def start_engine(run: Run, inputs: Inputs, device: torch.device) -> tuple[Any, int]:
    """Build the engine, with fresh, given or resumed weights (all ranks).

    Returns:
        The engine, and the optimizer steps that are done: 0 where no checkpoint was loaded.
    """
    from checkpoint.resuming import load_checkpoint, newest_intact
    from training.engine import ask_for_determinism, build_engine, build_model, load_weights

    settle_micro_batch(run, device, resumes=bool(inputs.checkpoints))
    config, ds_config = run.config, run.ds_config
    planned = plan_here(run, device)
    warning = advice(planned)
    if warning and run.ranks.is_main:
        print(f"warning: {warning}", file=sys.stderr)
    checkpoint = newest_intact(inputs.checkpoints, config.resume)
    if config.deterministic:
        ask_for_determinism()
    model = build_model(config, ds_config, device)
    model.use_memory(planned.share.memory_use)
    if inputs.init_weights:
        load_weights(model, inputs.init_weights, zero_stage(ds_config))
    engine, groups = build_engine(model, config, ds_config, run.ranks)
    if checkpoint:
        load_checkpoint(engine, *checkpoint, precision(ds_config))
    if run.ranks.is_main:
        if checkpoint:
            print(f"resumed from {checkpoint[0]}", file=sys.stderr)
        print(describe_run(run), file=sys.stderr)
        print(groups, file=sys.stderr)
        write_json(config.run_dir / "config.json", to_json(config))
        write_json(config.run_dir / "ds_config.json", ds_config)
    return engine, checkpoint[1].step if checkpoint else 0


def build_session(run: Run, engine: Any, stops: Stops, device: torch.device) -> Session:
    """Return a session that checks for a request to stop before each forward (all ranks)."""
    from eval.session import Session

    def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
        stops.check(device)  # all ranks: each does the same number of forwards
        return engine(*args, **kwargs)

    return Session(forward, run.config.gpt_config, device, run.ranks)


@dataclass
class Parts:
    """What the loop works with; every rank has its own."""

    engine: Any  # DeepSpeed's
    session: Session  # the engine as evaluations take it
    batches: Iterator[tuple[Tensor, Tensor]]  # tokens and targets of the next micro-batch
    saver: Saver
    metrics: Metrics
    health: Health
    profile: torch.profiler.profile
    clock: StepClock
    device: torch.device


@contextlib.contextmanager
def start(
    run: Run, inputs: Inputs, watchdog: Watchdog, stops: Stops
) -> Iterator[tuple[Parts, int]]:
    """Prepare what the loop works with; return the steps that are done, too (all ranks)."""
    from data.loader import Loader, split_windows
    from data.order import Order
    from training.health import Health
    from training.metrics import Metrics
    from training.saver import Saver
    from training.step import StepClock
    from training.tracing import profile_steps

    device = join_ranks(run, watchdog)
    engine, step = start_engine(run, inputs, device)
    config, batch, ranks = run.config, run.batch, run.ranks
    health = Health(config.max_bad_steps)
    order = Order(len(inputs.train_stream), config.seq_len, config.seed, config.shuffle)
    loader = Loader(
        inputs.train_stream,
        order,
        batch.micro_batch_size,
        batch.grad_accum_steps,
        ranks.rank,
        ranks.world_size,
        samples=step * batch.batch_sequences,
    )
    with (
        contextlib.closing(loader),
        contextlib.closing(Metrics(config, step, ranks, device)) as metrics,
        profile_steps(config, step, ranks.rank) as profile,
        stops.at_step_boundaries(),
    ):
        parts = Parts(
            engine=engine,
            session=build_session(run, engine, stops, device),
            batches=(split_windows(windows, device) for windows in loader),
            saver=Saver(run, inputs.order, engine, health, watchdog, saved_step=step),
            metrics=metrics,
            health=health,
            profile=profile,
            clock=StepClock(device),
            device=device,
        )
        yield parts, step


@contextlib.contextmanager
def evaluating(parts: Parts, watchdog: Watchdog) -> Iterator[Session]:
    """Put the engine into evaluation mode; the time does not count as that of training steps."""
    parts.clock.pause()
    watchdog.phase("eval")
    parts.engine.eval()
    yield parts.session
    parts.engine.train()


def validate(run: Run, inputs: Inputs, session: Session) -> tuple[float, list[str]]:
    """Return the validation loss in nats, and samples (all ranks, the same forwards)."""
    from eval.sample import sample_texts
    from eval.val_loss import mean_loss

    config = run.config
    loss = mean_loss(
        session,
        inputs.val_stream,
        seq_len=config.seq_len,
        eval_tokens=config.eval_tokens,
        batch_size=run.batch.micro_batch_size,
    )
    texts = sample_texts(session, config.sample_prompt, config.sample_tokens, config.seed)
    return loss, texts


def train(
    run: Run, inputs: Inputs, examples: list[Example], watchdog: Watchdog, stops: Stops
) -> tuple[str, str]:
    """Train until `max_steps`, then write a consolidated folder (all ranks); return how and why."""
    from checkpoint.consolidate import consolidate_engine
    from eval.hellaswag import score_model
    from training.step import take_step
    from training.stops import StopRequested

    with start(run, inputs, watchdog, stops) as (parts, step):
        config, metrics, health = run.config, parts.metrics, parts.health

        def is_due(every: int) -> bool:
            return every > 0 and (step == config.max_steps or step % every == 0)

        try:
            while True:
                stops.check(parts.device)  # all ranks: a request to one stops all at this step

                # once in a while: a checkpoint (all ranks); first, as a stop may cut evaluation
                if is_due(config.checkpoint_every) or stops.checkpoint_is_due:
                    parts.clock.pause()
                    parts.saver.save(step, is_timed=not is_due(config.checkpoint_every))
                    stops.restart_clock()

                # once in a while: validation loss and samples (all ranks, the same forwards)
                if is_due(config.eval_every):
                    with evaluating(parts, watchdog) as session:
                        metrics.evaluation(step, *validate(run, inputs, session))

                # once in a while: HellaSwag (all ranks, the same forwards)
                if is_due(config.hellaswag_every):
                    with evaluating(parts, watchdog) as session:
                        metrics.hellaswag(step, score_model(session, examples))

                if step == config.max_steps:
                    watchdog.phase("save")
                    folder = consolidate_engine(parts.engine, config.run_dir, step, run.unverified)
                    return "finished", f"all {step} steps are done, the weights are in {folder}"

                # one optimizer step: micro-batches forward and backward, then the update
                watchdog.phase("step")
                parts.clock.resume()
                loss_sum, norm, lr = take_step(
                    parts.engine, config, step, run.batch.grad_accum_steps, parts.batches
                )
                health.add(step, loss_sum, norm)
                if step % config.log_every == 0:  # all ranks: sums; the host waits for the device
                    verdicts = health.judge(run.batch.losses_per_step)
                    metrics.train(verdicts, lr, parts.clock.lap() / len(verdicts))
                parts.profile.step()  # does nothing outside --profile
                step += 1
                if health.is_lost:
                    parts.saver.save(step)
                    return "diverged", health.why_lost(step)
        except StopRequested as stop:
            parts.saver.save(step)
            return "preempted", f"{stop} before step {step}; {parts.saver.describe()}"


if __name__ == "__main__":
    ignore_broken_pipes()
    leave(main(sys.argv[1:]))
