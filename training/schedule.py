"""Compute the learning rate of a step: linear warm-up, cosine to a floor, then constant.

The recipe of build-nanogpt and of GPT-3 (Brown et al. 2020, App. B).
"""

import math


def lr_at(step: int, lr: float, warmup_steps: int, decay_steps: int, min_lr_ratio: float) -> float:
    """Return the learning rate of update `step`, counted from 0.

    Args:
        step: Updates done before this one.
        lr: The peak.
        warmup_steps: Updates until the peak.
        decay_steps: Update from which the floor `min_lr_ratio * lr` holds.
        min_lr_ratio: The floor as a fraction of the peak.
    """
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    if step > decay_steps or decay_steps <= warmup_steps:
        return lr * min_lr_ratio
    progress = (step - warmup_steps) / (decay_steps - warmup_steps)
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
    return lr * (min_lr_ratio + cosine * (1.0 - min_lr_ratio))
