"""Every failure of the machine is one line with its cause and a remedy."""

import errno
import os
from itertools import pairwise
from pathlib import Path

import pytest

from errors import BadInput, error_line, exit_status_of


def failed_build(*causes: Exception) -> Exception:
    """Return DeepSpeed's error, raised from the last cause, that one from the one before."""
    chain = [*causes, RuntimeError("DeepSpeedCPUAdam requires the cpu_adam op, which failed.")]
    for cause, error in pairwise(chain):
        error.__cause__ = cause
    return chain[-1]


class InductorError(RuntimeError):
    """As torch.compile's, which hides its cause from `raise … from`."""

    def __init__(self, inner: Exception) -> None:
        super().__init__(f"{type(inner).__name__}: {inner}")
        self.inner_exception = inner


NINJA = "Error building extension 'x':\n[1/2] c++ …\nx.h:3:10: fatal error: {}\ncompilation ended"
ENDED = RuntimeError("Command '['ninja', '-v']' returned non-zero exit status 1.")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (BadInput("--x", "is wrong", "give y"), "--x: is wrong. Fix: give y"),
        (
            failed_build(ENDED, RuntimeError(NINJA.format("Python.h: No such file"))),
            r"x.h:3:10: fatal error: Python.h: No such file. Fix: install Python's headers",
        ),
        (
            failed_build(ENDED, RuntimeError(NINJA.format("no such type"))),
            "x.h:3:10: fatal error: no such type. Fix: install or repair g",
        ),
        (
            InductorError(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))),
            "No space left on device. Fix: free disk space",
        ),
        (OSError(errno.EMFILE, os.strerror(errno.EMFILE)), "this machine: Too many .*: ulimit -n"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), "/x: Permission denied. Fix: g"),
        (RuntimeError("ours\nand more"), "RuntimeError: ours. Fix: see the traceback"),
        (RuntimeError("CUDA error: out of memory"), "RuntimeError: CUDA error: out of .*traceback"),
    ],
)
def test_the_root_cause_is_one_line(error: Exception, line: str) -> None:
    assert "\n" not in error_line(error)
    with pytest.raises(ValueError, match=line):
        raise ValueError(error_line(error))


def test_only_bad_input_is_the_users() -> None:
    assert exit_status_of(BadInput("--x", "is wrong", "give y")) == 2
    assert exit_status_of(ValueError("a library's")) == 1


def test_a_folder_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "f").touch()
    with pytest.raises(OSError, match="Not a directory") as raised:
        os.listdir(tmp_path / "f")
    assert error_line(raised.value).startswith(f"{tmp_path / 'f'}: Not a directory. Fix: ")


def test_the_error_that_names_the_file_is_told() -> None:
    nameless = OSError(errno.EFBIG, "File too large")
    named = OSError(errno.EFBIG, "File too large", "/x")
    named.__cause__ = nameless
    assert error_line(named).startswith("/x: File too large. Fix: ")
