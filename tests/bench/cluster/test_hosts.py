"""Machines that are network namespaces of this one; with every launcher: make launches."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.cluster.hosts import Hosts, missing
from bench.cluster.launchers import (
    COMMANDS,
    MACHINES,
    arguments,
    end,
    ranks_of,
    start,
    wait_for_jobs,
    write_environment,
)
from bench.cluster.launches import STEPS
from bench.faults.kills import losses, newest_step
from bench.fidelity.parity import write_ds_config
from train import main as train

ROOT = Path(__file__).resolve().parents[3]
WHY_NOT = missing()
on_machines = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT or "there are machines")


@pytest.mark.parametrize("command", COMMANDS.values())
def test_what_is_run_on_machines_is_what_is_documented(command: str) -> None:
    assert f"`{command}`" in (ROOT / "launch" / "README.md").read_text()


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    with Hosts(tmp_path_factory.mktemp("machines"), len(MACHINES)) as hosts:
        write_environment(hosts)
        yield hosts


@pytest.fixture
def alone(one_rank: object, data_dir: Path, tmp_path: Path) -> list[float]:
    """The losses of one machine, in this process; of one with four ranks: make launches."""
    ds_config = write_ds_config(tmp_path, 3, "fp32")
    command = arguments(data_dir, tmp_path / "alone", ds_config, "--max_steps", STEPS)
    assert train(command) == 0
    return list(losses(tmp_path / "alone").values())


@on_machines
def test_two_machines_train_as_one_and_a_lost_one_ends_the_run(
    hosts: Hosts, alone: list[float], data_dir: Path, tmp_path: Path
) -> None:
    run_dir, log = tmp_path / "run", tmp_path / "log"
    ds_config = write_ds_config(tmp_path, 3, "fp32")
    long = ["--max_steps", 100_000, "--checkpoint_every", 3, "--timeouts", "step=10"]
    command = arguments(data_dir, run_dir, ds_config, *long)
    (job,) = start(hosts, "cluster.py", MACHINES, command, log)
    wait_for_jobs(lambda: newest_step(run_dir) >= STEPS, [job], 120)
    assert list(losses(run_dir).values())[:STEPS] == pytest.approx(alone, abs=1e-5)
    assert "node-2: " in log.read_text()
    hosts.cut("node-2")
    cut_s = time.monotonic()
    while ranks_of(run_dir):
        assert time.monotonic() - cut_s < 10 + 45, ranks_of(run_dir)
        time.sleep(0.2)
    assert end([job], 45) == [255], log.read_text()[-2000:]  # ssh's
    steps = len(losses(run_dir))
    command = arguments(data_dir, run_dir, ds_config, "--max_steps", steps + 2)
    survivor = hosts.popen("node-1", ["python", "train.py", *command], log)
    assert end([survivor], 60) == [0], log.read_text()
    assert len(losses(run_dir)) == steps + 2
