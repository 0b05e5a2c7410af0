import json
import subprocess
import sys
from pathlib import Path

import pytest

from eval.report import read_log

ROOT = Path(__file__).resolve().parents[2]


def test_build_nanogpts_log_is_read_and_a_restart_counts_once(tmp_path: Path) -> None:
    lines = ["0 val 10.9", "0 train 10.9", "1 train 9.5", "2 train 9.4", "1 train 9.0"]
    (tmp_path / "log.txt").write_text("\n".join(lines) + "\n")
    curves = read_log(tmp_path / "log.txt")
    assert curves == {"val": [(0, 10.9)], "train": [(0, 10.9), (1, 9.0), (2, 9.4)]}


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_text("0 val 10.9\n1 train\n")
    with pytest.raises(ValueError, match=r"log\.txt:2: "):
        read_log(tmp_path / "log.txt")


def test_the_picture_is_written_and_the_minima_printed(tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_text("0 val 10.9\n0 train 10.9\n1 train 9.5\n2 val 9.1\n")
    command = [sys.executable, "eval/report.py", str(tmp_path), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    result = json.loads(done.stdout)
    assert result["lowest"] == {str(tmp_path): {"val": 9.1, "train": 9.5}}
    assert (tmp_path / "out" / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
