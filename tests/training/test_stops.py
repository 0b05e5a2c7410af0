import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests import forked
from training.ranks import Ranks
from training.stops import SIGNALS, StopRequested, Stops

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
WAIT = """
import sys, time
from pathlib import Path
from training.ranks import Ranks
from training.rendezvous import init_process_group
from training.stops import Stops
init_process_group(Ranks(), timeout_s=60)
with Stops(Path(sys.argv[1]), print, lambda: print("again", flush=True)) as stops:
    stops._wait_for_check = True
    print("ready", flush=True)
    time.sleep(60)
"""

# Two ranks: rank 1's clock is always behind. After three checkpoints each gets its signal.
RANKS = """
import json, os, signal, sys, time
from pathlib import Path
import torch
from training.ranks import read_ranks
from training.rendezvous import init_process_group
from training.stops import StopRequested, Stops
ranks = read_ranks()
init_process_group(ranks, timeout_s=60)
minutes = 0.2 / 60 if ranks.is_main else 1e-9
due = []
with Stops(Path(sys.argv[1]), print, print, minutes) as stops, stops.at_step_boundaries():
    try:
        for step in range(10_000):
            stops.check(torch.device("cpu"))
            if stops.checkpoint_is_due:
                due.append(step)
                stops.restart_clock()
                mine = sys.argv[2 + ranks.rank]
                if len(due) == 3 and mine:
                    os.kill(os.getpid(), signal.Signals[mine])
                    time.sleep(0.2)
            time.sleep(0.001)
    except StopRequested as stop:
        print(json.dumps({"due": due, "step": step, "reason": str(stop)}), flush=True)
"""

# A runner that starts a launcher that starts a rank: each the same program, at its depth.
CHAIN = """
import os, subprocess, sys, time
from pathlib import Path
program, folder, command_line, *names = sys.argv[1:]
if names == ["rank"]:
    from training.stops import Stops
    with Stops(Path(folder), print, print) as stops:
        stops._wait_for_check = stops._is_told = True
        print("rank", os.getpid(), flush=True)
        while not stops._reason:
            time.sleep(0.1)
        Path(folder, "asked").write_text(stops._reason)
else:
    print(names[0], os.getpid(), flush=True)
    command_line = "deepspeed.launcher.launch" if names[1] == "launcher" else "a rank"
    subprocess.run([sys.executable, "-c", program, program, folder, command_line, *names[1:]])
"""


@pytest.fixture
def stops(one_rank: Ranks, tmp_path: Path) -> Iterator[Stops]:
    with Stops(tmp_path, pytest.fail, pytest.fail) as stops:
        stops._wait_for_check = True
        stops.check(CPU)  # nobody has asked
        yield stops


@pytest.fixture(autouse=True)
def terminal() -> Iterator[None]:
    """SIGHUP as in a terminal, also where nohup started pytest."""
    old = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, old)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"])
def test_a_signal_stops_at_the_next_check(stops: Stops, name: str) -> None:
    os.kill(os.getpid(), signal.Signals[name])
    time.sleep(0.2)
    for _ in range(2):  # a request is not forgotten
        with pytest.raises(StopRequested, match=name):
            stops.check(CPU)


def test_a_hangup_that_is_ignored_stays_ignored(one_rank: Ranks, tmp_path: Path) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup and setsid leave it
    with Stops(tmp_path, pytest.fail, pytest.fail) as stops:
        stops._wait_for_check = True
        os.kill(os.getpid(), signal.SIGHUP)
        time.sleep(0.2)
        stops.check(CPU)
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_a_file_stops(stops: Stops) -> None:
    stops.stop_file.touch()
    with pytest.raises(StopRequested, match="STOP file"):
        stops.check(CPU)


def test_before_the_first_check_a_stop_is_told_at_once(tmp_path: Path) -> None:
    told: list[str] = []
    with Stops(tmp_path, told.append, pytest.fail):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.2)
    assert told[0] == "SIGTERM before the first step; nothing to save"


def test_old_handlers_come_back(one_rank: Ranks, tmp_path: Path) -> None:
    before = [signal.getsignal(s) for s in SIGNALS]
    with Stops(tmp_path, pytest.fail, pytest.fail):
        pass
    after = [signal.getsignal(s) for s in SIGNALS]
    assert before == after


def test_a_ctrl_c_is_told_by_its_name_and_the_second_ends_at_once(tmp_path: Path) -> None:
    """Also if the launcher's SIGTERM waits beside it: the kernel hands that over first."""
    process = subprocess.Popen(
        [sys.executable, "-c", WAIT, tmp_path],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        assert process.stdout
        assert process.stderr
        assert process.stdout.readline() == "ready\n"
        for number in (signal.SIGSTOP, signal.SIGINT, signal.SIGTERM, signal.SIGCONT):
            process.send_signal(number)
        process.send_signal(signal.SIGINT)  # that of a wrapper, as `timeout`, which passes it on
        assert process.stderr.readline() == (
            "SIGINT: saving a checkpoint before the next step; "
            "a second SIGINT ends at once, without\n"
        )
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1)
        process.send_signal(signal.SIGINT)
        assert process.wait(5) == 130
        assert process.stdout.read() == "again\n"
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(("first", "second"), [("SIGTERM", "SIGINT"), ("", "SIGUSR1")])
def test_ranks_agree_on_the_time_of_rank_0_and_on_one_reason(
    tmp_path: Path, first: str, second: str
) -> None:
    (tmp_path / "ranks.py").write_text(RANKS)
    done = forked.launch(2, [tmp_path, first, second], tmp_path, tmp_path / "ranks.py")
    assert done.returncode == 0, done.stderr
    told = [line for line in done.stderr.splitlines() if "saving" in line]
    assert len(told) == 1
    assert told[0].startswith(f"{first or second}: saving a checkpoint before the next step")
    by_rank = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert by_rank[0] == by_rank[1]
    assert by_rank[0]["reason"] == second
    assert len(by_rank[0]["due"]) == 3


@pytest.mark.parametrize("killed", ["launcher", "runner"])
def test_a_launcher_that_is_gone_stops(tmp_path: Path, killed: str) -> None:
    """DeepSpeed's runner and its launcher: without either, ranks would train on as orphans."""
    names = ["runner", "launcher", "rank"]
    environment = os.environ | {"RANK": "0", "WORLD_SIZE": "1"}
    command = [sys.executable, "-c", CHAIN, CHAIN, tmp_path, "a runner", *names]
    runner = subprocess.Popen(command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE)
    pids = {}
    try:
        assert runner.stdout
        for _ in names:
            name, pid = runner.stdout.readline().split()
            pids[name] = int(pid)
        assert list(pids) == names
        os.kill(pids[killed], signal.SIGKILL)
        deadline = time.monotonic() + 30
        while not (tmp_path / "asked").exists():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert (tmp_path / "asked").read_text() == "launcher gone"
    finally:
        for pid in pids.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        runner.communicate()
