"""What --compile and offload lack is said before a run begins; real compilers, real folders."""

import os
import shutil
import sys
import sysconfig
from pathlib import Path

import pytest

from training import compiler
from training.compiler import check_compile, check_offload

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
