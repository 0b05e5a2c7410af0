"""Sampling from a GPT with a key/value cache."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from model.cache import KVCache
from model.config import GPTConfig


def filter_logits(logits: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """Set to -inf all but the `top_k` best and the smallest set of mass `top_p`; (B, V)."""
    if top_k is not None:
        kth_best = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < kth_best, -torch.inf)
    if top_p is not None:
        ranked, order = logits.sort(descending=True)  # (B, V)
        mass_before = ranked.softmax(-1).cumsum(-1) - ranked.softmax(-1)
        is_rest = (mass_before >= top_p) & (mass_before > 0)  # the best stays, however small top_p
        outside = is_rest.scatter(-1, order, is_rest)
        logits = logits.masked_fill(outside, -torch.inf)
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

    The number of forwards depends on nothing that is drawn, so ranks stay in step. Past
    `block_size` tokens the model sees the last `block_size` only, without a cache.

    Args:
        model: `model(tokens, predict_at=…, cache=…) -> logits (N, V)`: a GPT or an engine of one.
        tokens: (B, T) prompt, T at least 1.
        max_new_tokens: How many tokens to draw.
        config: The model's shape: layers to cache, `block_size` to stay within.
        temperature: Divides the logits; 0 takes the best token.
        top_k: Draw from the k best only.
        top_p: Draw from the smallest set of best tokens whose probabilities sum to p or more.
        seed: Seed of a generator of its own; the global one is left alone.
        use_cache: False computes every context anew.
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
            logits = (logits - logits.amax(-1, keepdim=True)) / temperature  # never overflows
            logits = filter_logits(logits, top_k, top_p)
            drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]  # (B,)
        tokens = torch.cat([tokens, drawn[:, None]], dim=1)  # (B, T + 1)
        yield drawn
