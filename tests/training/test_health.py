import math

import pytest
import torch

from training.health import WINDOW, Health
from training.ranks import Ranks


@pytest.fixture(autouse=True)
def group(one_rank: Ranks) -> None:
    pass


def judge(health: Health, *rows: tuple[float, float]) -> list[str]:
    """Judge steps of (loss, norm), two losses each."""
    for step, (loss, norm) in enumerate(rows):
        health.add(step, torch.tensor(2 * loss), norm)
    return [verdict.complaint for verdict in health.judge(n_losses=2)]


def test_a_loss_is_the_mean_over_micro_batches_and_ranks() -> None:
    health = Health(max_bad_steps=3)
    health.add(7, torch.tensor(6.0), torch.tensor(0.5))
    assert health.judge(n_losses=2) == [(7, 3.0, 0.5, "")]


@pytest.mark.parametrize("bad", [(math.nan, 1.0), (1.0, math.inf), (-math.inf, math.nan)])
def test_bad_steps_count_only_in_a_row(bad: tuple[float, float]) -> None:
    health = Health(max_bad_steps=3)
    complaints = judge(health, bad, bad, (1.0, 1.0), bad, bad)
    assert [bool(c) for c in complaints] == [True, True, False, True, True]
    assert not health.is_lost
    judge(health, bad)
    assert health.is_lost


@pytest.mark.parametrize("which", ["loss", "norm"])
def test_outliers_are_named_once_there_is_something_to_compare_with(which: str) -> None:
    health = Health(max_bad_steps=3)
    usual = [(3.0 + 0.1 * (-1) ** i, 1.0 + 0.1 * (-1) ** i) for i in range(WINDOW)]
    outlier = (3.7, 1.0) if which == "loss" else (3.0, 1.7)
    inlier = (3.5, 1.5)
    assert judge(health, *usual[:-1], outlier, *usual[:1]) == [""] * (WINDOW + 1)
    health = Health(max_bad_steps=3)
    assert judge(health, *usual, inlier) == [""] * (WINDOW + 1)
    health = Health(max_bad_steps=3)
    *before, last = judge(health, *usual, outlier)
    assert before == [""] * WINDOW
    assert (
        last
        == f"{which} {max(outlier) if which == 'loss' else 1.7:.4f} is beyond 6 standard deviations"
    )
