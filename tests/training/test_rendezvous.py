"""Ranks that find each other; with real launchers: tests/bench/cluster/test_hosts.py."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from training.ranks import Ranks
from training.rendezvous import choose_device, free_port, rendezvous


def first_of(n_ranks: int, address: str, port: int, monkeypatch: pytest.MonkeyPatch) -> Ranks:
    given = {"RANK": 0, "WORLD_SIZE": n_ranks, "MASTER_ADDR": address, "MASTER_PORT": port}
    for name, value in given.items():
        monkeypatch.setenv(name, str(value))
    return Ranks(rank=0, local_rank=0, world_size=n_ranks, local_world_size=n_ranks)


def test_ranks_that_never_come_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    expected = (
        rf"rank 1, 2, 3, 4, 5, 6, 7, 8 and 2 more never came to 127\.0\.0\.1:{port}\. "
        "Fix: start it, or give it more time with --timeouts start=2"
    )
    with pytest.raises(OSError, match=expected):
        rendezvous(first_of(11, "127.0.0.1", port, monkeypatch), timeout_s=1)


def test_a_port_that_is_taken_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=rf"127.0.0.1:{port}: in use. Fix: free it, or give anot"):
            rendezvous(first_of(1, "127.0.0.1", port, monkeypatch), timeout_s=5)


def test_an_address_that_is_none_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    first_of(2, "no.such.host.invalid", free_port(), monkeypatch)
    with pytest.raises(
        OSError, match=r"MASTER_ADDR no\.such\.host\.invalid: does not resolve .*Fix"
    ):
        rendezvous(Ranks(rank=1, local_rank=1, world_size=2, local_world_size=2), timeout_s=1)


OURS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # of one_rank
TASK = """
from training.rendezvous import all_gather_json, free_port, leave_together, rendezvous
from training.ranks import read_ranks
ranks = read_ranks()
store = rendezvous(ranks, 30)
print(all_gather_json(store, ranks, "numbers", ranks.rank, 30))
leave_together(store, ranks, 30)
"""


def slurm_step(task: int, address: str) -> dict[str, str]:
    """Return what srun says to one of two tasks on one machine."""
    return {
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "SLURM_PROCID": str(task),
        "SLURM_LOCALID": str(task),
        "SLURM_NODEID": "0",
        "SLURM_LAUNCH_NODE_IPADDR": address,
    }


def test_the_tasks_of_srun_are_the_ranks_of_one_run() -> None:
    bare = {k: v for k, v in os.environ.items() if k not in OURS}
    tasks = [
        subprocess.Popen(
            [sys.executable, "-c", TASK],
            cwd=Path(__file__).resolve().parents[2],
            env=bare | slurm_step(task, "127.0.0.1"),
            stdout=subprocess.PIPE,
            text=True,
        )
        for task in range(2)
    ]
    assert [task.communicate(timeout=60)[0] for task in tasks] == ["[0, 1]\n"] * 2


def test_srun_that_was_typed_elsewhere_says_how_to_name_rank_0(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in OURS:
        monkeypatch.delenv(name, raising=False)
    for name, value in slurm_step(0, "192.0.2.1").items():  # of nobody (RFC 5737)
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(
        ValueError,
        match=r"SLURM_LAUNCH_NODE_IPADDR: .*not rank 0's address. "
        r"Fix: in the job, export MASTER_ADDR=",
    ):
        rendezvous(Ranks(rank=0, local_rank=0, world_size=2, local_world_size=2), timeout_s=1)


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"MASTER_ADDR": "127.0.0.1"},
        {"MASTER_PORT": "1234"},
        {"MASTER_ADDR": "", "MASTER_PORT": "1234"},
        {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": ""},
    ],
)
def test_half_an_address_is_named(given: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (given | {"RANK": "1"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=r"MASTER_.* Fix: "):
        rendezvous(Ranks(rank=1, local_rank=1, world_size=2, local_world_size=2), timeout_s=1)


@pytest.mark.parametrize("name", ["", "tpu", "xpu"])
def test_an_accelerator_that_is_not_here_is_named(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", name)
    with pytest.raises(ValueError, match=rf"DS_ACCELERATOR: is '{name}', but PyTorch.*Fix: set "):
        choose_device(Ranks())
