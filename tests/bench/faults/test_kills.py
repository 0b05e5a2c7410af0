"""Short versions of the campaigns of `make faults`, each through its own command."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]


def campaign(folder: Path, name: str, *more: str) -> dict[str, Any]:
    """Run a campaign; return what it recorded."""
    command = [sys.executable, f"bench/faults/{name}.py", "--folder", str(folder), *more]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    (entry,) = json.loads((folder / "faults.json").read_text()).values()
    return entry["values"]


def test_a_run_killed_in_a_save_loses_nothing(tmp_path: Path) -> None:
    values = campaign(tmp_path, "kills", "--campaign", "save", "--tries", "1")
    assert all(t["ok"] and -9 in t["statuses"].values() for t in values["tries"])
    (trace,) = values["traces"].values()
    assert trace["steps"] >= 4
    assert not trace["differing"]


@pytest.mark.parametrize("case", ["disk full for the optimizer of rank 1", "stop of rank 1"])
def test_a_mishap_ends_in_time_and_says_what_it_was(tmp_path: Path, case: str) -> None:
    (result,) = campaign(tmp_path, "mishaps", "--cases", case).values()
    assert result["ended_s"] < 6 + 45


SHORT = "2 ranks at stage 1, 1 at stage 3, 2 at stage 0"


def test_ranks_and_stages_may_change(tmp_path: Path) -> None:
    (result,) = campaign(tmp_path, "resumes", "--cases", SHORT).values()
    assert 0 < result["largest"] <= 1e-5
