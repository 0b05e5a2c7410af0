"""Save the checkpoints of a run, at most once for each step."""

from typing import Any

from checkpoint.saving import save_checkpoint
from training.ds_config import precision
from training.health import Health
from training.run import Run
from training.watchdog import Watchdog


class Saver:
    """Saves an engine into a run's folder (all ranks).

    Args:
        run: The run.
        order: What decides on which tokens a step is taken.
        engine: DeepSpeed's.
        health: Of the steps so far.
        watchdog: Has a time limit for saving.
        saved_step: Of the last checkpoint; a run without one has nothing to save at step 0.
    """

    def __init__(
        self,
        run: Run,
        order: dict[str, Any],
        engine: Any,
        health: Health,
        watchdog: Watchdog,
        saved_step: int,
    ) -> None:
        self.run, self.order, self.engine = run, order, engine
        self.health, self.watchdog = health, watchdog
        self.saved_step = saved_step

    def save(self, step: int) -> None:
        """Save a checkpoint after `step` updates, unless there is one (all ranks)."""
        if step == self.saved_step:
            return
        self.watchdog.phase("save")
        config = self.run.config
        # Checkpoints of a run that goes wrong must not push the good ones out: 0 keeps all.
        goes_wrong = self.health.last_was_bad()  # all ranks: a sum
        save_checkpoint(
            self.engine,
            config.run_dir / "checkpoints",
            step=step,
            samples=step * self.run.batch.batch_sequences,
            precision=precision(self.run.ds_config),
            order=self.order,
            keep=0 if goes_wrong else config.keep_checkpoints,
            keep_every=config.keep_every,
            unverified=self.run.unverified,
        )
        self.saved_step = step
