"""bench/speed/train_step.py as people run it: the sides train to the same losses, in turns."""

import json
import statistics
import sys
from pathlib import Path

from bench.fidelity import parity

SIDES = ["seed", "trainer", "bare1", "zero1"]


def test_all_sides_train_to_the_same_losses(tmp_path: Path) -> None:
    out = tmp_path / "train_step.json"
    command = [sys.executable, "bench/speed/train_step.py", "--model", "debug", "--seq_len", "16"]
    command += ["--micro_batch_size", "2", "--grad_accum", "2", "--blocks", "2", "--steps", "1"]
    done = parity.run_with_children([*command, "--sides", *SIDES, "--out", str(out)], 240)
    assert done.returncode == 0, done.stderr
    (entry,) = json.loads(out.read_text()).values()
    losses = entry["values"]["losses"]
    assert list(losses) == SIDES
    for curve in losses.values():
        assert len(curve) == 3
        assert max(abs(a - b) for a, b in zip(curve, losses["seed"], strict=True)) < 2e-2
        assert curve[-1] < curve[0]
    seconds = entry["values"]["seconds_per_step"]
    assert all(len(times) == 2 and min(times) > 0 for times in seconds.values())
    ratio = statistics.median(a / b for a, b in zip(seconds["seed"], seconds["zero1"], strict=True))
    assert entry["table"][-1]["over seed"].startswith(f"{ratio:.2f} (")
    assert "| zero1 |" in done.stdout
