"""A run's own evaluation, as it trains: validation loss, HellaSwag and samples, on all ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from data.shards import TokenStream
    from eval.packing import Example
    from model import GPTConfig

N_SAMPLES, TOP_K = 4, 50  # as in build-nanogpt


@dataclass(frozen=True)
class Evaluator:
    """Evaluates one model, in eval mode, on all ranks in step.

    Args:
        model: A GPT, an engine of one, or a callable around it.
        config: Its shape.
        device: Where it is.
        rank: This process.
        world_size: All processes.
        sum: Sums each element of a tensor over the ranks.
    """

    model: Callable[..., Tensor]
    config: GPTConfig
    device: torch.device
    rank: int
    world_size: int
    sum: Callable[[Tensor], Tensor]

    def val_loss(
        self, stream: TokenStream, *, seq_len: int, eval_tokens: int, batch_size: int
    ) -> float:
        """Return the mean cross-entropy in nats per token (all ranks)."""
        import torch

        from eval.val_loss import evaluate

        sums = evaluate(
            self.model,
            stream,
            seq_len=seq_len,
            eval_tokens=eval_tokens,
            batch_size=batch_size,
            device=self.device,
            rank=self.rank,
            world_size=self.world_size,
        )
        loss, n_tokens = self.sum(torch.tensor(sums, dtype=torch.float64)).tolist()
        return loss / n_tokens

    def hellaswag(self, examples: list[Example]) -> dict[str, Any]:
        """Return the HellaSwag score (all ranks)."""
        from eval.hellaswag import score
        from eval.packing import evaluate

        losses = evaluate(
            self.model, examples, device=self.device, rank=self.rank, world_size=self.world_size
        )
        return score(self.sum(losses), examples)

    def samples(self, prompt: str, max_new_tokens: int, seed: int) -> list[str]:
        """Return sampled texts, the same on all ranks."""
        from eval.sample import sample_texts

        return sample_texts(
            self.model,
            self.config,
            prompt,
            n_samples=N_SAMPLES,
            max_new_tokens=max_new_tokens,
            top_k=TOP_K,
            seed=seed,
            device=self.device,
        )
