"""What --compile and offload lack is said before a run begins; real compilers, real folders."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from train import main
from training import compiler
from training.compiler import check_compile, check_nvme, check_offload

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="no g++")


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    return tmp_path


def test_a_machine_with_a_compiler_passes_and_keeps_nothing(own_folders: Path) -> None:
    check_compile()
    check_offload()
    assert not list((own_folders / "inductor").iterdir())


@pytest.mark.parametrize("check", [check_compile, check_offload])
@pytest.mark.parametrize("given", ["no-such-compiler", "g++ -O1", ""])
def test_cxx_is_one_program(check: object, given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", given)
    with pytest.raises(ValueError, match=r"there is no C\+\+ compiler .* Fix: install g\+\+"):
        check()  # pyright: ignore[reportCallIssue]  # a parameter of pytest


def test_a_compiler_that_fails_says_why(own_folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = own_folders / "broken"
    broken.write_text("#!/bin/sh\necho note >&2\necho 'x: error: no cc1plus' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(ValueError, match=r"--compile: .*broken: x: error: no cc1plus. Fix: inst"):
        check_compile()


def test_without_pythons_headers_it_says_so(
    own_folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = sysconfig.get_paths() | {"include": str(own_folders)}
    monkeypatch.setattr(compiler.sysconfig, "get_path", paths.get)
    with pytest.raises(ValueError, match=r"Python\.h: No such file.* Fix: install Python's head"):
        check_compile()


@pytest.mark.parametrize("variable", ["TORCHINDUCTOR_CACHE_DIR", "TORCH_EXTENSIONS_DIR"])
def test_a_folder_that_cannot_be_written_is_named(
    own_folders: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    (own_folders / "file").touch()
    monkeypatch.setenv(variable, str(own_folders / "file" / "x"))
    with pytest.raises(ValueError, match=r"file/x: Not a directory\. Fix: "):
        check_compile() if variable.startswith("TORCHIND") else check_offload()


def test_a_blank_in_a_path_is_named(own_folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(own_folders / "a b"))
    with pytest.raises(
        ValueError, match=r"--compile: a blank in the path .*a b, .*Fix: set TORCHIND"
    ):
        check_compile()


def test_ninja_is_found_beside_an_environments_python(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = os.fspath(Path(sys.prefix) / "lib")
    monkeypatch.setenv("CXX", shutil.which("g++") or "")
    monkeypatch.setenv("PATH", empty)
    monkeypatch.setattr(compiler, "_try_compiler", lambda *_, **__: None)
    check_offload()
    assert shutil.which("ninja") == os.path.join(sysconfig.get_path("scripts"), "ninja")


def test_nvme_without_a_writable_folder_is_refused_before_anything_starts(
    own_folders: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (own_folders / "file").touch()
    for path in (None, "", 5, f"{own_folders}/missing", f"{own_folders}/file", "/proc"):
        param = {"device": "nvme", "nvme_path": path}
        ds_config = own_folders / "ds.json"
        ds_config.write_text(
            json.dumps({"zero_optimization": {"stage": 3, "offload_param": param}})
        )
        flags = ["--data_dir", "/missing", "--run_dir", f"{own_folders}/run"]
        assert main(["--model", "debug", "--ds_config", str(ds_config), *flags]) == 2
        *_, line = capsys.readouterr().err.splitlines()
        where = f"--ds_config {ds_config}: zero_optimization.offload_param.nvme_path"
        assert line.startswith(f"error: {where}: must be a writable folder on an NVMe disk, got")
        assert line.endswith('Fix: mkdir /FOLDER, and add "nvme_path": "/FOLDER"')
        assert not (own_folders / "run").exists()


def test_a_second_run_in_a_folder_for_nvme_is_refused(own_folders: Path) -> None:
    with (own_folders / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match=r"nvme_path: must be .* got .*another run uses it"):
            check_nvme({"nvme_path": str(own_folders)}, "offload_param")


@pytest.mark.parametrize(
    "command", ['g++ -nostdinc "$@"', 'g++ $(echo "$@" | sed s/-laio/-laio_missing/)']
)
def test_without_libaio_it_says_what_to_install(
    own_folders: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    compiler_without = own_folders / "without"  # without header files, or without libraries
    compiler_without.write_text(f"#!/bin/sh\nexec {command}\n")
    compiler_without.chmod(0o755)
    (own_folders / "extensions").mkdir()
    (own_folders / "extensions" / "cpu_adam.so").touch()  # DeepSpeed's Adam is built
    monkeypatch.setenv("CXX", str(compiler_without))
    with pytest.raises(ValueError, match=r"nvme\.device: .*aio.* Fix: apt install libaio-dev"):
        check_nvme({"nvme_path": str(own_folders)}, "nvme")


def test_nvme_without_the_permission_to_lock_memory_is_refused(own_folders: Path) -> None:
    program = "import sys; from training.compiler import check_nvme as check; "
    program += f"check({{'nvme_path': {str(own_folders)!r}}}, 'x')"
    command = [sys.executable, "-c", program]
    if os.geteuid() == 0:  # root may lock whatever the limit is
        command = ["setpriv", "--bounding-set=-ipc_lock", "--inh-caps=-ipc_lock", *command]
    done = subprocess.run(
        ["sh", "-c", 'ulimit -l 64; exec "$@"', "sh", *command], capture_output=True, text=True
    )
    assert "x: DeepSpeed locks 1 GiB of memory for its buffers" in done.stderr
    assert "Fix: ulimit -l unlimited" in done.stderr
