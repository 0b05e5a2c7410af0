import os
import time
from pathlib import Path

import pytest

from training import extension_locks
from training.extension_locks import check_extension_locks
from training.ranks import Ranks


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (tmp_path / "builder.py").write_text("FileBaton()", encoding="utf-8")  # before PyTorch 2.15
    monkeypatch.setattr(extension_locks, "_builder", lambda: tmp_path / "builder.py")
    (tmp_path / "py311_cpu" / "cpu_adam").mkdir(parents=True)
    path = tmp_path / "py311_cpu" / "cpu_adam" / "lock"
    path.touch()
    return path


def test_a_lock_without_a_builder_is_reported_at_once(lock: Path) -> None:
    with pytest.raises(ValueError, match=r"cpu_adam/lock: left by a build that was killed"):
        check_extension_locks(Ranks(0, 0, 1, 1))


def test_a_lock_of_pytorch_2_15_blocks_nobody(lock: Path) -> None:
    (lock.parents[2] / "builder.py").write_text("FileLock(path)", encoding="utf-8")
    check_extension_locks(Ranks())


def test_the_builder_is_pytorchs() -> None:
    text = extension_locks._builder().read_text(encoding="utf-8")
    assert ("FileLock(" in text) != ("FileBaton(" in text)


def test_a_lock_that_a_builder_holds_is_not_stale(lock: Path) -> None:
    with lock.open():
        check_extension_locks(Ranks(0, 0, 1, 1))


def test_on_a_shared_folder_a_young_lock_may_be_another_machines(lock: Path) -> None:
    ranks = Ranks(rank=0, local_rank=0, world_size=16, local_world_size=8)
    check_extension_locks(ranks)
    os.utime(lock, (0, time.time() - 601))
    with pytest.raises(ValueError, match="Fix: rm "):
        check_extension_locks(ranks)


def test_a_user_without_a_home_has_no_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HOME", "TORCH_EXTENSIONS_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 54321)  # nobody has it in /etc/passwd
    check_extension_locks(Ranks())
