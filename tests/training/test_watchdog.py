import subprocess
import sys
import time
from pathlib import Path

import pytest

from exit_status import HUNG
from training.watchdog import GRACE_S, TIMEOUTS_S, group_timeout_s, parse_timeouts

ROOT = Path(__file__).resolve().parents[2]
HANG = """
import re, sys, time
from pathlib import Path
import training.watchdog as watchdog
watchdog.GRACE_S = int(sys.argv[3])
limits = dict(start=60, step=1, eval=60, save=60)
dog = watchdog.Watchdog(limits, Path(sys.argv[1]), lambda line: print(line, flush=True))
def hanging_step():
    if sys.argv[2] == "sleep":
        time.sleep(60)
    while sys.argv[2] == "spin":
        pass
    while sys.argv[2] == "hold the interpreter":
        re.match("(a+)+$", "a" * 40 + "b")
for _ in range(3):
    dog.phase("step")
    time.sleep(0.5)
dog.phase("eval")
time.sleep(1.5)
if sys.argv[2] == "stop":
    dog.phase("step")
    dog.stop()
    time.sleep(2)
    sys.exit(0)
dog.phase("step")
hanging_step()
"""


@pytest.mark.parametrize("how", ["sleep", "spin"])
def test_a_hang_ends_with_the_stacks(tmp_path: Path, how: str) -> None:
    stacks = tmp_path / "stacks" / "rank_00000.txt"
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", HANG, stacks, how, "20"],
        cwd=ROOT,
        timeout=60,
        capture_output=True,
        text=True,
    )
    assert done.returncode == HUNG == 70
    assert time.monotonic() - started < 1.5 + 1.5 + 1 + GRACE_S
    assert done.stdout.startswith(f"step: not done after 1 s; stacks are in {stacks}")
    assert "in hanging_step" in stacks.read_text()


def test_a_hang_in_c_that_lets_no_thread_run_ends(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HANG, tmp_path / "stacks", "hold the interpreter", "2"]
    done = subprocess.run(command, cwd=ROOT, timeout=30, capture_output=True, text=True)
    assert done.returncode == 1  # faulthandler's
    assert "Timeout (0:00:03)!" in done.stderr
    assert "in hanging_step" in done.stderr


def test_a_stopped_clock_ends_nothing(tmp_path: Path) -> None:
    stacks = tmp_path / "stacks"
    done = subprocess.run([sys.executable, "-c", HANG, stacks, "stop", "20"], cwd=ROOT, timeout=60)
    assert done.returncode == 0
    assert not stacks.exists()


def test_timeouts_are_defaults_with_some_replaced() -> None:
    assert parse_timeouts("") == TIMEOUTS_S
    assert parse_timeouts("step=5,eval=9000") == TIMEOUTS_S | {"step": 5, "eval": 9000}
    assert group_timeout_s("step=5,eval=9000") > 9000 + GRACE_S


@pytest.mark.parametrize(
    "text", ["step", "step=0", "step=x", "train=5", "step=5;eval=6", "step=-1"]
)
def test_other_timeouts_are_refused(text: str) -> None:
    with pytest.raises(
        ValueError, match=f"--timeouts {text}: must be PHASE=SECONDS,.*e.g. step=600"
    ):
        parse_timeouts(text)
