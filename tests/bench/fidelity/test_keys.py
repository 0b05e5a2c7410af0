"""A part of `make keys`, in a process of its own: it forks ranks before torch starts a thread."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
CELLS = ["round_robin_gradients = true, stage 2, bf16", "a wrong map is refused"]


def test_some_keys_are_as_the_table_says(tmp_path: Path) -> None:
    command = [sys.executable, "bench/fidelity/keys.py", "--folder", tmp_path, "--cells", *CELLS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    (section,) = json.loads((tmp_path / "keys.json").read_text(encoding="utf-8")).values()
    assert list(section["values"]) == CELLS
    assert all(result["ok"] for result in section["values"].values())
