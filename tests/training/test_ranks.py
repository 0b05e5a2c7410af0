import os
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import pytest

from data.mpi import LAUNCHERS, connect
from train import main
from training.ranks import RANK_VARIABLES, Ranks, read_ranks

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment in which no launcher has left a word."""
    prefixes = ("OMPI_", "MV2_", "PMI", "MPI_", "SLURM_", "MASTER_", "TORCHELASTIC_")
    for name in (*os.environ, *RANK_VARIABLES, "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        if name.startswith(prefixes) or name in (*RANK_VARIABLES, "LOCAL_SIZE"):
            monkeypatch.setenv(name, "")  # to have it restored
            monkeypatch.delenv(name)
    return monkeypatch


def give(environment: pytest.MonkeyPatch, names: Iterable[str], values: Iterable[object]) -> None:
    for name, value in zip(names, values, strict=True):
        environment.setenv(name, str(value))


def test_ranks_come_from_the_launchers_environment(bare: pytest.MonkeyPatch) -> None:
    assert read_ranks() == Ranks(0, 0, 1, 1)
    give(bare, RANK_VARIABLES[:3], (5, 1, 8))
    assert read_ranks() == Ranks(5, 1, 8, 8)
    assert not read_ranks().is_main
    bare.setenv("LOCAL_SIZE", "4")  # deepspeed's name
    assert read_ranks().local_world_size == 4
    bare.setenv("LOCAL_WORLD_SIZE", "2")  # torchrun's
    assert read_ranks().local_world_size == 2


@pytest.mark.parametrize("launcher", [name for name in LAUNCHERS if name != "Slurm"])
def test_ranks_that_mpirun_started_have_torchruns_names(
    bare: pytest.MonkeyPatch, launcher: str
) -> None:
    give(bare, LAUNCHERS[launcher], (5, 1, 8, 4))
    assert read_ranks() == Ranks(rank=5, local_rank=1, world_size=8, local_world_size=4)
    assert [os.environ[name] for name in RANK_VARIABLES] == list("5184")
    bare.setenv("RANK", "0")  # deepspeed or torchrun, started by mpirun
    assert read_ranks().rank == 0


@pytest.mark.parametrize(("node", "n_local"), [(0, 3), (1, 3), (2, 2)])
def test_the_tasks_of_a_slurm_step_are_ranks(
    bare: pytest.MonkeyPatch, node: int, n_local: int
) -> None:
    give(bare, LAUNCHERS["Slurm"], (6, 0, 8, "3(x2),2"))
    give(bare, ("SLURM_STEP_ID", "SLURM_NODEID", "PMIX_RANK"), (0, node, 6))
    assert read_ranks() == Ranks(rank=6, local_rank=0, world_size=8, local_world_size=n_local)


@pytest.mark.parametrize(
    "given",
    [
        {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "4", "SLURM_TASKS_PER_NODE": "2(x2)"},
        {"SLURM_STEP_ID": "0", "SLURM_NPROCS": "4", "SLURM_TASKS_PER_NODE": "2(x2)"},
        {"SLURM_STEP_ID": "0", "SLURM_TASKS_PER_NODE": "2(x2)"},
        {"SLURM_STEP_ID": "0", "SLURM_STEP_TASKS_PER_NODE": "2(x2)"},
        # A step that is smaller than its job.
        {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
         "SLURM_NTASKS": "8", "SLURM_TASKS_PER_NODE": "4(x2)"},
    ],
)  # fmt: skip
def test_the_variables_of_older_slurms_are_understood(
    bare: pytest.MonkeyPatch, given: dict[str, str]
) -> None:
    for name, value in given.items():
        bare.setenv(name, value)
    give(bare, ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID"), (3, 1, 1))
    assert read_ranks() == Ranks(rank=3, local_rank=1, world_size=4, local_world_size=2)


@pytest.mark.parametrize(
    "left",
    [
        {},  # the batch script: no step
        {"SLURM_STEP_ID": "4294967290"},  # an interactive shell, as Slurm numbers it
        {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1"},  # srun --pty bash
        {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1", "PMIX_RANK": "0"},
        {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1", "PMI_RANK": "0", "PMI_SIZE": "1"},
    ],
)
def test_within_an_allocation_one_process_is_alone(
    bare: pytest.MonkeyPatch, left: dict[str, str]
) -> None:
    job = {
        "SLURM_JOB_ID": "7",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_NTASKS": "4",
        "SLURM_STEP_NUM_TASKS": "4",
        "SLURM_STEP_TASKS_PER_NODE": "4",
    }
    if "SLURM_STEP_ID" not in left:
        del job["SLURM_STEP_NUM_TASKS"], job["SLURM_STEP_TASKS_PER_NODE"]
    give(bare, *zip(*(job | left).items(), strict=True))
    assert read_ranks() == Ranks(0, 0, 1, 1)
    assert connect().size == 1


def test_what_mpich_says_counts_within_a_slurm_step(bare: pytest.MonkeyPatch) -> None:
    """Its mpirun has srun start one proxy for each machine."""
    give(bare, LAUNCHERS["Slurm"], (0, 0, 2, "1(x2)"))
    give(bare, ("SLURM_STEP_ID", "SLURM_NODEID"), (3, 0))
    give(bare, LAUNCHERS["MPICH or Intel MPI"], (5, 1, 8, 4))
    assert read_ranks() == Ranks(5, 1, 8, 4)
    for name in ("MPI_LOCALRANKID", "MPI_LOCALNRANKS"):  # srun --mpi=pmi2: Slurm knows the rest
        bare.delenv(name)
    give(bare, ("PMI_RANK", "PMI_SIZE"), (0, 2))
    bare.delenv("RANK")
    assert read_ranks() == Ranks(0, 0, 2, 1)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"RANK": ""}, "RANK: is '', not a number"),
        ({"RANK": "1"}, "RANK: set without LOCAL_RANK, WORLD_SIZE"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE: set without RANK, LOCAL_RANK"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "RANK, WORLD_SIZE: set without LOCAL_RANK"),
        ({"LOCAL_RANK": "1"}, "LOCAL_RANK: set without RANK, WORLD_SIZE"),
        ({"RANK": "", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}, "RANK: is '', not a number"),
        ({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "two"}, "WORLD_SIZE: is 'two', not a n"),
        ({"RANK": "-1", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}, "RANK: is '-1', not a number"),
        ({"OMPI_COMM_WORLD_SIZE": ""}, "OMPI_COMM_WORLD_SIZE: is '', not a number"),
        ({"PMI_SIZE": "2", "PMI_RANK": "0"}, "MPI_LOCALRANKID, MPI_LOCALNRANKS: not set, but"),
        (
            {"PMIX_RANK": "1"},
            "a number of processes beside PMIX_RANK: not set, but a launcher started",
        ),
        ({"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2"}, "SLURM_PROCID, SLURM_LOCALID"),
        ({"SLURM_STEP_ID": "0", "SLURM_PROCID": "1"}, "SLURM_LOCALID, SLURM_STEP_NUM_TASKS"),
        ({"PMI_RANK": "1"}, "MPI_LOCALRANKID, PMI_SIZE, MPI_LOCALNRANKS: not set, but"),
        ({"OMPI_COMM_WORLD_RANK": "1"}, "OMPI_COMM_WORLD_LOCAL_RANK, OMPI_COMM_WORLD_SIZE, "),
        ({"MPI_LOCALRANKID": "0"}, "PMI_RANK, PMI_SIZE, MPI_LOCALNRANKS: not set, but"),
        ({"RANK": "2", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}, "RANK 2, LOCAL_RANK 0, WORLD_SIZE 2"),
        ({"RANK": "0", "LOCAL_RANK": "2", "WORLD_SIZE": "2"}, "RANK 0, LOCAL_RANK 2, WORLD_SIZE 2"),
        ({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "0"}, "RANK 0, LOCAL_RANK 0, WORLD_SIZE 0"),
        ({"RANK": "0", "LOCAL_RANK": "1", "WORLD_SIZE": "1"}, "RANK 0, LOCAL_RANK 1, WORLD_SIZE 1"),
        ({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "4"}, "RANK 0, L"),
        (
            {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "a"},
            "MASTER_PORT: is",
        ),
        (
            {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "99999"},
            "MASTER_PORT",
        ),
    ],
)
def test_half_a_launcher_is_one_line_and_status_2(
    bare: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], given: dict[str, str], said: str
) -> None:
    give(bare, *zip(*given.items(), strict=True))
    with pytest.raises(SystemExit, match="2"):
        main([])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {said}")
    assert ". Fix: " in line


@pytest.mark.parametrize("text", ["", "two", "3,1", "-2", "2(x", "1,,1"])
def test_a_list_of_tasks_that_lacks_this_machine_is_named(
    bare: pytest.MonkeyPatch, text: str
) -> None:
    give(bare, LAUNCHERS["Slurm"], (1, 0, 2, text))
    give(bare, ("SLURM_STEP_ID", "SLURM_NODEID"), (0, 7))
    with pytest.raises(ValueError, match=r"SLURM_STEP_TASKS_PER_NODE: .* has no node \d. Fix: "):
        read_ranks()


@pytest.mark.parametrize(
    "given", [{"RANK": "1", "WORLD_SIZE": "2"}, {"RANK": ""}, {"WORLD_SIZE": "2"}, {"RANK": "x"}]
)
def test_text_is_not_prepared_by_ranks_of_torchrun_each_alone(
    bare: pytest.MonkeyPatch, given: dict[str, str]
) -> None:
    give(bare, *zip(*given.items(), strict=True))
    with pytest.raises(
        ValueError, match=r"RANK, WORLD_SIZE: set, but .* Fix: start it with mpirun"
    ):
        connect()


@pytest.mark.parametrize("port", ["", "a", "-1", "99999"])
def test_a_port_that_is_none_is_named(bare: pytest.MonkeyPatch, port: str) -> None:
    give(bare, (*RANK_VARIABLES, "MASTER_PORT"), (0, 0, 2, 2, port))
    with pytest.raises(ValueError, match=r"MASTER_PORT.*(is|out of range).* Fix: give"):
        read_ranks()


LEAVING = """
import time
import torch.distributed as dist
from training.ranks import leave
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
def destroy():
    print("destroyed", flush=True)
    time.sleep({seconds})
dist.destroy_process_group = destroy
print("left", end="")
leave({status})
"""


@pytest.mark.parametrize("status", [0, 75, 1, 2])
def test_a_rank_that_fails_does_not_wait_for_the_group(status: int) -> None:
    """NCCL's end would wait for ranks that wait for this one: a sleep stands in for it."""
    failed = status in (1, 2)
    program = LEAVING.format(status=status, seconds=1000 if failed else 0)
    command = [sys.executable, "-c", program]
    began = time.monotonic()
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", timeout=60)
    assert ended.returncode == status, ended.stderr
    assert ended.stdout == ("left" if failed else "leftdestroyed\n")
    assert time.monotonic() - began < 30
