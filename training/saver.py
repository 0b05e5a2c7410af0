"""Save the checkpoints of a run, at most once for each step."""

from dataclasses import dataclass
from typing import Any

from checkpoint.manifest import step_name
from checkpoint.saving import save_checkpoint
from training.ds_config import precision
from training.health import Health
from training.run import Run
from training.watchdog import Watchdog


@dataclass
class Saver:
    """Saves an engine into a run's folder (all ranks).

    Attributes:
        run: The run.
        order: What decides on which tokens a step is taken.
        engine: DeepSpeed's.
        health: Of the steps so far.
        watchdog: Has a timeout for saving.
        saved_step: Of the last checkpoint; a run without one has nothing to save at step 0.
        timed_step: Of the last checkpoint if only the time called for it; the next one replaces it.
    """

    run: Run
    order: dict[str, Any]
    engine: Any
    health: Health
    watchdog: Watchdog
    saved_step: int
    timed_step: int = 0

    def save(self, step: int, *, is_timed: bool = False) -> None:
        """Save a checkpoint after `step` updates, unless there is one (all ranks)."""
        if step == self.saved_step:
            return
        self.watchdog.phase("save")
        config = self.run.config
        # The checkpoints of a run that goes wrong must not replace the good ones: 0 keeps all.
        goes_wrong = self.health.last_was_bad()  # all ranks: a sum
        save_checkpoint(
            self.engine,
            config.run_dir / "checkpoints",
            step=step,
            precision=precision(self.run.ds_config),
            order=self.order,
            keep=0 if goes_wrong else config.keep_checkpoints,
            keep_every=config.keep_every,
            replaced_step=0 if goes_wrong else self.timed_step,
            unverified=self.run.unverified,
        )
        self.saved_step = step
        self.timed_step = step if is_timed else 0

    def describe(self) -> str:
        """Say where the last checkpoint is."""
        folder = self.run.config.run_dir / "checkpoints" / step_name(self.saved_step)
        return f"saved {folder}" if self.saved_step else "nothing to save"
