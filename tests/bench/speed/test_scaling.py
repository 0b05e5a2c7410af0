"""bench/speed/scaling.py and bench/page.py as people run them; bytes against closed forms."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.fidelity import parity


def test_bytes_of_two_ranks_are_those_of_the_algorithms(tmp_path: Path) -> None:
    out, page = tmp_path / "scaling.json", tmp_path / "BENCHMARKS.md"
    command = [sys.executable, "bench/speed/scaling.py", "--model", "debug", "--seq_len", "64"]
    command += ["--ranks", "2", "--sides", "zero1", "--blocks", "1", "--steps", "1"]
    done = parity.run_with_children([*command, "--out", str(out)], 240)
    assert done.returncode == 0, done.stderr
    (entry,) = json.loads(out.read_text()).values()
    (zero1,) = entry["table"]  # the other stages: test_many_ranks.py
    half = 0.5  # (W - 1) / W of two ranks
    all_reduce_fp32, all_gather_bf16 = 2 * 4 * half, 2 * half
    rounded = 0.02
    assert float(zero1["DDP's"]) == pytest.approx(all_reduce_fp32, abs=rounded)
    expected = all_reduce_fp32 + all_gather_bf16
    assert float(zero1["bytes per parameter"]) == pytest.approx(expected, abs=rounded)
    command = [sys.executable, "bench/page.py", str(out), "--out", str(page)]
    subprocess.run(command, check=True, timeout=30)
    text = page.read_text()
    assert f"commit {entry['commit']}" in text
    assert f"| 2 | zero1 | {zero1['s/step']} |" in text
