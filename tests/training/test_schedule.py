import math

import pytest

from training.schedule import lr_at


@pytest.mark.parametrize("step", [0, 1, 713, 714, 715, 716, 9_000, 19_072, 19_073, 19_074, 50_000])
def test_schedule_is_the_recipe(step: int) -> None:
    # build-nanogpt: lr·(step+1)/715, then cosine to a tenth at step 19,073, then constant
    if step < 715:
        expected = 6e-4 * (step + 1) / 715
    elif step > 19_073:
        expected = 6e-5
    else:
        ratio = (step - 715) / (19_073 - 715)
        expected = 6e-5 + 0.5 * (1 + math.cos(math.pi * ratio)) * (6e-4 - 6e-5)
    got = lr_at(step, 6e-4, warmup_steps=715, decay_steps=19_073, min_lr_ratio=0.1)
    assert got == pytest.approx(expected, rel=1e-12)


def test_no_warmup_starts_at_the_peak() -> None:
    assert lr_at(0, 1.0, warmup_steps=0, decay_steps=10, min_lr_ratio=0.1) == 1.0


def test_no_decay_after_warmup_stays_at_the_floor() -> None:
    assert lr_at(5, 1.0, warmup_steps=5, decay_steps=5, min_lr_ratio=0.1) == 0.1
