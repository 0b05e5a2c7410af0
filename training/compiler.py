"""Try the C++ compiler before a run depends on it. This file imports no torch: it starts fast."""

import ctypes
import fcntl
import mmap
import os
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from errors import MACHINE_ERROR, BadInput, remedy_of
from training.extension_locks import extensions_folder

PROGRAM = "#include <Python.h>\n#include <vector>\n"
AIO_PROGRAM = "#include <libaio.h>\nint main() { return io_submit(0, 0, 0); }\n"
LOCKED_BYTES = 2**30  # of the buffers that DeepSpeed locks in memory by default, in bf16


def check_compile() -> None:
    """Refuse a --compile that has no compiler, or whose kernels cannot be written.

    Raises:
        BadInput: Says why.
    """
    folder = os.environ.get("TORCHINDUCTOR_CACHE_DIR") or tempfile.gettempdir()
    remedy = "set TORCHINDUCTOR_CACHE_DIR to a writable folder"
    _try_compiler("--compile", "g++", Path(folder), remedy)


def check_offload() -> None:
    """Refuse an offload whose optimizer, which is written in C++, cannot be built.

    Raises:
        BadInput: Says why.
    """
    if not shutil.which("ninja"):  # it may be in an environment that is not activated
        os.environ["PATH"] += os.pathsep + sysconfig.get_path("scripts")
    if not shutil.which("ninja"):
        raise BadInput("offload", "there is no ninja", "pip install ninja")
    folder, remedy = extensions_folder(), "set HOME or TORCH_EXTENSIONS_DIR to a writable folder"
    if str(folder).startswith("~"):
        raise BadInput("HOME", f"not set, and user {os.getuid()} is not in /etc/passwd", remedy)
    if not any(folder.rglob("cpu_adam.so")):
        _try_compiler("offload", "c++", folder, remedy)


def check_nvme(block: dict[str, Any], where: str) -> None:
    """Refuse an offload to NVMe without a folder, libaio, or permission to lock memory.

    The folder is this process's until it ends: another run would write to the same files.

    Args:
        block: offload_param.
        where: The name of the ds_config and of the block.

    Raises:
        BadInput: Says what is missing.
    """
    path = block.get("nvme_path")
    try:  # as DeepSpeed opens its files: not every file system allows O_DIRECT
        lock = os.open(Path(str(path or None), "lock"), os.O_CREAT | os.O_RDWR | os.O_DIRECT)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        why = "another run uses it" if isinstance(error, BlockingIOError) else error.strerror
        what = f"must be a writable folder on an NVMe disk, got {path!r} ({why})"
        remedy = remedy_of(what, 'mkdir /FOLDER, and add "nvme_path": "/FOLDER"')
        raise BadInput(f"{where}.nvme_path", what, remedy) from error
    region = mmap.mmap(-1, LOCKED_BYTES)
    address = ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(region)))
    # 1, MLOCK_ONFAULT: this asks for the permission and takes no memory.
    if ctypes.CDLL(None).mlock2(address, ctypes.c_size_t(LOCKED_BYTES), 1):
        what = "DeepSpeed locks 1 GiB of memory for its buffers, which this user may not"
        raise BadInput(where, what, "ulimit -l unlimited, or docker run --ulimit memlock=-1")
    check_offload()
    _try_compiler(f"{where}.device", "c++", extensions_folder(), "", AIO_PROGRAM, "-laio")


def _try_compiler(
    flag: str, default: str, folder: Path, remedy: str, program: str = PROGRAM, option: str = "-c"
) -> None:
    """Compile a small program into a folder, as PyTorch will."""
    compiler = os.environ.get("CXX", default)
    if not shutil.which(compiler):
        fix = "install g++, and unset CXX or set it to one program without arguments"
        raise BadInput(flag, f"there is no C++ compiler {compiler!r}", fix)
    environment = sysconfig.get_path("purelib")
    if " " in f"{folder}{environment}":  # PyTorch splits its commands there
        what = f"a blank in the path {folder}, or in {environment}"
        raise BadInput(flag, what, f"{remedy} without blanks, or move the environment")
    command = [compiler, f"-I{sysconfig.get_path('include')}", "-xc++", "-", option, "-o"]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as out:
            done = subprocess.run(
                [*command, f"{out}/o"], input=program.encode(), capture_output=True
            )
    except OSError as error:
        what = f"{error.filename or folder}: {error.strerror}"
        raise BadInput(flag, what, remedy_of(what, remedy)) from error
    if done.returncode:
        lines = os.fsdecode(done.stderr).splitlines() or [f"ends with status {done.returncode}"]
        what = f"{compiler}: {next(filter(MACHINE_ERROR.search, lines), lines[0])}"
        raise BadInput(flag, what, remedy_of(what, "install or repair g++, or name another in CXX"))
