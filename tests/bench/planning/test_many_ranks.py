"""The real engine as rank 0 of many, on PyTorch's fake process group, against the plan."""

import json
import re
from pathlib import Path

import pytest

from tests import forked

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize(
    ("side", "n_ranks"),
    [("zero0", 8), ("zero1", 8), ("zero2", 8), ("zero3", 8), ("zero1", 1024), ("zero3", 1024)],
)
def test_partitions_and_bytes_sent_are_the_plans(side: str, n_ranks: int, tmp_path: Path) -> None:
    arguments = ["--side", side, "--ranks", n_ranks]
    done = forked.launch(1, arguments, tmp_path, "bench/planning/many_ranks.py")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    for what in ("moment_bytes", "sent_bytes"):
        assert found[what] == pytest.approx(found[f"planned_{what}"], rel=0.01)
    page = (ROOT / "docs" / "GPU.md").read_text(encoding="utf-8")
    rows = re.findall(rf"^\| {side[-1]} \| `(\S+)` \| (\d+) \|", page, re.M)
    assert found["transfers"] == {place: int(times) for place, times in rows}
    assert bool(rows) == (side in ("zero2", "zero3"))
