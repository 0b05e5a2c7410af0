import os
import time
from pathlib import Path

import pytest

from launch.ranks import NAMES, OPEN_MPI, Ranks, check_extension_locks, read_ranks


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (tmp_path / "py311_cpu" / "cpu_adam").mkdir(parents=True)
    path = tmp_path / "py311_cpu" / "cpu_adam" / "lock"
    path.touch()
    return path


def test_a_lock_without_a_builder_is_reported_at_once(lock: Path) -> None:
    with pytest.raises(ValueError, match=r"cpu_adam/lock: left by a build that was killed"):
        check_extension_locks(Ranks(0, 0, 1, 1))


def test_a_lock_that_a_builder_holds_is_not_stale(lock: Path) -> None:
    with lock.open():
        check_extension_locks(Ranks(0, 0, 1, 1))


def test_on_a_shared_folder_a_young_lock_may_be_another_machines(lock: Path) -> None:
    ranks = Ranks(rank=0, local_rank=0, world_size=16, local_world_size=8)
    check_extension_locks(ranks)
    os.utime(lock, (0, time.time() - 601))
    with pytest.raises(ValueError, match="Fix: rm "):
        check_extension_locks(ranks)


def test_ranks_come_from_the_launchers_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert read_ranks() == Ranks(0, 0, 1, 1)
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert read_ranks() == Ranks(5, 1, 8, 8)
    assert not read_ranks().is_main
    monkeypatch.setenv("LOCAL_SIZE", "4")  # deepspeed's name
    assert read_ranks().local_world_size == 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # torchrun's
    assert read_ranks().local_world_size == 2


def test_ranks_that_mpirun_started_have_torchruns_names(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.setenv(name, "")  # to have it restored
        monkeypatch.delenv(name)
    for name, value in zip(OPEN_MPI, "5184", strict=True):
        monkeypatch.setenv(name, value)
    assert read_ranks() == Ranks(rank=5, local_rank=1, world_size=8, local_world_size=4)
    assert [os.environ[name] for name in NAMES] == list("5184")
    monkeypatch.setenv("RANK", "0")  # deepspeed or torchrun, started by mpirun
    assert read_ranks().rank == 0
