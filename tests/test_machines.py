"""Programs as other machines start them: real processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DRY = ["--model", "debug", "--dry_run"]


def start(program: Path, *flags: str, cwd: Path, **variables: str) -> str:
    done = subprocess.run(
        [sys.executable, *flags, program, *DRY],
        cwd=cwd,
        env=os.environ | variables,
        capture_output=True,
        encoding="utf-8",
        timeout=60,
    )
    assert done.returncode == 2, (
        done.stderr
    )  # there is no data, and the run is printed all the same
    assert done.stderr.endswith("Fix: python data/fineweb.py\n")
    return done.stdout


@pytest.mark.parametrize("flags", [[], ["-I"], ["-P"]])
def test_from_another_folder_the_shipped_ds_config_is_found(
    tmp_path: Path, flags: list[str]
) -> None:
    (tmp_path / "link.py").symlink_to(ROOT / "train.py")
    assert "ds_config.json" in start(tmp_path / "link.py", *flags, cwd=tmp_path)


def test_a_ds_config_below_the_working_folder_comes_first(tmp_path: Path) -> None:
    (tmp_path / "ds_configs").mkdir()
    text = '{"zero_optimization": {"stage": 2}}'
    (tmp_path / "ds_configs" / "zero1.json").write_text(text, encoding="utf-8")
    assert '"stage": 2' in start(ROOT / "train.py", cwd=tmp_path)
