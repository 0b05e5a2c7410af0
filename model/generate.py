"""Sample from a GPT with a key/value cache."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from model.cache import KVCache
from model.config import GPTConfig


def filter_logits(logits: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """Set to -inf all (B, V) logits but the `top_k` best and the smallest set of mass `top_p`."""
    if top_k is not None:
        kth_best = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < kth_best, -torch.inf)
    if top_p is not None:
        ranked, order = logits.sort(descending=True)  # (B, V)
        mass_before = ranked.softmax(-1).cumsum(-1) - ranked.softmax(-1)
        # The best token has no mass before it: it stays, however small top_p is.
        is_dropped = (mass_before >= top_p) & (mass_before > 0)
        is_dropped = is_dropped.scatter(-1, order, is_dropped)  # from ranks to token ids
        logits = logits.masked_fill(is_dropped, -torch.inf)
    return logits


@torch.no_grad()
def generate(
    model: Callable[..., Tensor],
    tokens: Tensor,
    max_new_tokens: int,
    config: GPTConfig,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 42,
    use_cache: bool = True,
) -> Iterator[Tensor]:
    """Yield `max_new_tokens` sampled tokens, one (B,) tensor at a time.

    The number of forwards does not depend on what is drawn, so ranks stay in step. Beyond
    `block_size` tokens the model sees the last `block_size` only, without a cache: the position of
    every token changes.

    Args:
        model: `model(tokens, predict_at=…, cache=…) -> logits (N, V)`: a GPT or an engine of one.
        tokens: (B, T) prompt, T at least 1.
        temperature: Divides the logits; 0 takes the best token.
        top_k: Draw from the k best only.
        top_p: Draw from the smallest set of best tokens whose probabilities sum to p or more.
        seed: Seed of a generator of its own; the global one is not used.
        use_cache: False computes every context again.
    """
    generator = torch.Generator(tokens.device).manual_seed(seed)
    cache = KVCache(config.n_layer, config.block_size) if use_cache else None
    for _ in range(max_new_tokens):
        if tokens.shape[1] > config.block_size:
            cache = None
        context = tokens[:, cache.length :] if cache else tokens[:, -config.block_size :]
        B, T = context.shape
        last = torch.arange(1, B + 1, device=tokens.device) * T - 1  # (B,) flat positions
        logits = model(context, predict_at=last, cache=cache).float()  # (B, V)
        if temperature == 0:
            drawn = logits.argmax(-1)  # (B,)
        else:
            # The largest becomes 0, so that a small temperature cannot overflow.
            logits = (logits - logits.amax(-1, keepdim=True)) / temperature
            logits = filter_logits(logits, top_k, top_p)
            drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]  # (B,)
        tokens = torch.cat([tokens, drawn[:, None]], dim=1)  # (B, T + 1)
        yield drawn
