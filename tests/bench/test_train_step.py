"""bench/train_step.py as people run it: every side trains to the same losses, in turns."""

import json
import sys
from pathlib import Path

from bench import parity

SIDES = ["seed", "hf", "trainer", "bare0", "bare1", "zero0", "zero1"]


def test_all_sides_train_to_the_same_losses(tmp_path: Path) -> None:
    out = tmp_path / "train_step.json"
    command = [sys.executable, "bench/train_step.py", "--model", "debug", "--seq_len", "64"]
    command += ["--micro_batch_size", "2", "--grad_accum", "2", "--blocks", "2", "--steps", "1"]
    done = parity.run_with_children([*command, "--sides", *SIDES, "--out", str(out)], 240)
    assert done.returncode == 0, done.stderr
    (result,) = json.loads(out.read_text()).values()
    losses = result["losses"]
    assert list(losses) == SIDES
    for curve in losses.values():
        assert len(curve) == 3
        assert max(abs(a - b) for a, b in zip(curve, losses["seed"], strict=True)) < 2e-2
        assert curve[-1] < curve[0]
    assert result["times_faster"]["seed"]["zero1"]["median"] > 0
    assert "| zero1 |" in done.stdout
