"""The plan's bytes against those that PyTorch was seen to hold and to send."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from bench.planning import memory as bench

ROOT = Path(__file__).resolve().parents[3]
MEASURED = json.loads((ROOT / "docs" / "measured_memory.json").read_text())


def assert_close(seen: dict[str, Any], plan: dict[str, float]) -> None:
    assert plan["held_bytes"] == pytest.approx(seen["held_bytes"], rel=bench.MEMORY_TOLERANCE)
    assert plan["sent_bytes"] == pytest.approx(seen["sent_bytes"], rel=bench.SENT_TOLERANCE)


@pytest.mark.parametrize("case", MEASURED)
def test_plan_is_near_what_was_measured(case: str) -> None:
    model, side, n_ranks = case.split()
    assert_close(MEASURED[case], bench.planned(model, side, int(n_ranks)))


def test_every_case_was_measured() -> None:
    cases = itertools.product(bench.SHAPES, bench.SIDES, (1, 2))
    assert set(MEASURED) == {f"{model} {side} {n_ranks}" for model, side, n_ranks in cases}


def test_plan_is_near_what_a_run_holds_and_sends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bench.SHAPES, "quickstart", (2, 64))
    case = ("quickstart", "zero3+checkpointing", 2)
    assert_close(bench.measure(*case), bench.planned(*case))
