"""Find steps whose loss or gradient norm is not finite, or far from those of other steps."""

import collections
import math
import statistics
from typing import NamedTuple

import torch
from torch import Tensor
from torch.profiler import record_function

from training.rendezvous import sum_tensor

# OLMo-core and llm.c use the same two.
WINDOW = 128  # steps that the next one is compared with
SIGMAS = 6  # standard deviations


class Verdict(NamedTuple):
    """One step: its mean loss in nats, gradient norm before clipping, and what is wrong, or ""."""

    step: int
    loss: float
    norm: float
    complaint: str


class Health:
    """Judges every step, the same on every rank; waits for the device only in `judge`.

    Args:
        max_bad_steps: Steps in a row without a finite loss and norm after which a run is lost.
    """

    def __init__(self, max_bad_steps: int) -> None:
        self.max_bad_steps = max_bad_steps
        self.bad_in_row = 0
        self.pending: list[tuple[int, Tensor, Tensor]] = []
        self.losses = collections.deque[float](maxlen=WINDOW)
        self.norms = collections.deque[float](maxlen=WINDOW)

    @property
    def is_lost(self) -> bool:
        """Whether too many steps in a row were bad."""
        return self.bad_in_row >= self.max_bad_steps

    def last_was_bad(self) -> bool:
        """Return whether the newest step was not finite (all ranks)."""
        if not self.pending:
            return self.bad_in_row > 0
        _, loss_sum, norm = self.pending[-1]
        numbers = torch.stack([loss_sum, norm.to(loss_sum.dtype)])
        return not bool(sum_tensor(numbers, numbers.device).isfinite().all())

    def why_lost(self, step: int) -> str:
        """Return why a run ends after `step` updates, and what to do."""
        return (
            f"{self.bad_in_row} steps in a row were not finite. Fix: delete the checkpoints after "
            f"step {step - self.bad_in_row} and go on with a lower --lr; without earlier ones "
            "start in another --run_dir"
        )

    def add(self, step: int, loss_sum: Tensor, norm: Tensor | float) -> None:
        """Add a step: the sum of this rank's losses, and the global norm."""
        self.pending.append((step, loss_sum, torch.as_tensor(norm, device=loss_sum.device)))

    def judge(self, n_losses: int) -> list[Verdict]:
        """Return the verdicts on the steps since the last call (all ranks); syncs host and device.

        Args:
            n_losses: Losses in a step, over all ranks.
        """
        steps, loss_sums, norms = zip(*self.pending, strict=True)
        self.pending = []
        with record_function("log"):  # its name in a trace
            sums = torch.stack(loss_sums).double()
            losses = (sum_tensor(sums, sums.device) / n_losses).tolist()  # all ranks
            grad_norms = torch.stack(norms).double().tolist()
        return [self._judge(*row) for row in zip(steps, losses, grad_norms, strict=True)]

    def _judge(self, step: int, loss: float, norm: float) -> Verdict:
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self.bad_in_row += 1
            return Verdict(step, loss, norm, "skipped: the loss or the gradient is not finite")
        self.bad_in_row = 0
        complaints = []
        for name, value, recent in (("loss", loss, self.losses), ("norm", norm, self.norms)):
            if len(recent) == WINDOW:
                distance = abs(value - statistics.fmean(recent))
                if distance > SIGMAS * statistics.pstdev(recent):
                    complaints.append(f"{name} {value:.4f} is beyond {SIGMAS} standard deviations")
            recent.append(value)
        return Verdict(step, loss, norm, ", ".join(complaints))
