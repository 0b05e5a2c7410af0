"""The planner against published runs, and the page that shows it."""

from pathlib import Path

import pytest

from bench.page import fill
from bench.planning import published

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("published_run", published.RUNS, ids=str)
def test_published_runs_are_within_a_fifth_or_have_a_reason(
    published_run: published.Published,
) -> None:
    off = published.planned(published_run) / published_run.tokens_per_s - 1
    assert bool(published_run.reason) == (abs(off) > published.TOLERANCE), off


def test_the_scaling_page_says_what_its_commands_print() -> None:
    page = (ROOT / "docs" / "SCALING.md").read_text()
    assert fill(page) == page
