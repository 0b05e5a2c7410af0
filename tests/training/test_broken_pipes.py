"""A run goes on whatever becomes of its output."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

PROGRAM = """
import os, sys
from training.broken_pipes import ignore_broken_pipes
ignore_broken_pipes()
for stream in (sys.stdout, sys.stderr):
    print("more than a pipe holds " * 10_000, file=stream, flush=True)
with open("LICENSE") as file:
    assert file.fileno() > 2
os._exit(7)
"""


@pytest.mark.parametrize("where", [">&-", "2>&-", ">&- 2>&-", ">/dev/full 2>&1", "2>&1 | :"])
def test_what_is_written_to_nowhere_is_dropped(where: str) -> None:
    script = f'"$0" -c "$1" {where}; exit ${{PIPESTATUS[0]}}'
    command = ["bash", "-c", script, sys.executable, PROGRAM]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", timeout=60)
    assert ended.returncode == 7, ended.stderr


def test_what_is_read_arrives() -> None:
    command = [sys.executable, "-c", PROGRAM]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", timeout=60)
    assert ended.stdout == ended.stderr == "more than a pipe holds " * 10_000 + "\n"
