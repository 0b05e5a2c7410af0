"""The variables of this shell that ranks on other machines need, for DeepSpeed's launcher.

    python launch/environment.py --out .deepspeed_env

DeepSpeed sends this file, from your home or the current folder, to every machine of a hostfile, and
by itself only PYTHON…, NCCL…, UCX… and MV2… . Credentials are left out; lines of the file with
names that this shell does not have, such as MASTER_ADDR, stay.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path

if not __package__:  # run as a file: import from the repository root, exactly as train.py does
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from launch.hostfile import check_not_open_to_all
from training.credentials import refuse_credentials

# Libraries, threads, networks and caches; a name that ends in _ stands for all that begin so.
NEEDED = ("LD_LIBRARY_PATH", "CUDA_HOME", "OMP_NUM_THREADS", "MALLOC_", "DS_ACCELERATOR",
          "TORCH_EXTENSIONS_DIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "TORCH_NCCL_",
          "NCCL_", "FI_", "GLOO_SOCKET_IFNAME", "HF_", "XDG_CACHE_HOME", "CUBLAS_WORKSPACE_CONFIG",
          "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "TORCH_CUDNN_SDPA_",
          "CUDA_DEVICE_MAX_CONNECTIONS")  # fmt: skip
NAME = re.compile(r"[A-Za-z_]\w*")
ACTIVE = re.compile(r"[$`\"\\\n]")  # what a shell acts upon between double quotes


def needed_variables() -> dict[str, str]:
    """Return those of this process, without credentials.

    Raises:
        ValueError: A shell would act upon a value.
    """
    found = {}
    for name, value in sorted(os.environ.items()):
        if name in NEEDED or name.startswith(tuple(n for n in NEEDED if n.endswith("_"))):
            try:
                refuse_credentials({name: value}, "")
            except ValueError:
                print(f"{name}: left out, a credential", file=sys.stderr)
                continue
            check_variable(name, value)
            found[name] = value
    return found


def other_lines(path: Path, names: Iterable[str]) -> dict[str, str]:
    """Return the lines of a .deepspeed_env, if there is one, by name, but those of `names`.

    Raises:
        ValueError: As `check_environment_file`.
    """
    if not path.exists():
        return {}
    check_environment_file(path)
    lines = os.fsdecode(path.read_bytes()).splitlines()
    found = {line.partition("=")[0]: f"{line}\n" for line in lines}
    return {name: line for name, line in found.items() if name not in names}


def check_variable(name: str, value: str) -> None:
    """Refuse a variable that a shell on another machine would act upon.

    Raises:
        ValueError: Names it.
    """
    if not NAME.fullmatch(name) or ACTIVE.search(value):
        raise ValueError(f"{name}: a shell would act upon its value. Fix: unset {name}")


def check_environment_file(path: Path) -> None:
    """Refuse a .deepspeed_env of somebody else, or with what a shell would act upon.

    Raises:
        ValueError: Names the file and the line.
    """
    check_not_open_to_all(path)
    if path.stat().st_uid not in (0, os.getuid()):
        raise ValueError(f"{path}: belongs to another user. Fix: delete it, or cp it to your own")
    for number, line in enumerate(os.fsdecode(path.read_bytes()).splitlines(), 1):
        name, equals, value = line.partition("=")
        if not equals or not NAME.fullmatch(name) or ACTIVE.search(value):
            raise ValueError(f"{path}:{number}: {line[:60]!r}. Fix: a line like NAME=value")


def main() -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="usually .deepspeed_env")
    args = parser.parse_args()
    try:
        found = needed_variables()
        lines = [f"{name}={value}\n" for name, value in found.items()]
        others = other_lines(args.out, found)
        # In the encoding of the environment, in which DeepSpeed reads it.
        args.out.write_bytes(os.fsencode("".join([*others.values(), *lines])))
        args.out.chmod(0o600)
    except OSError as error:
        print(f"error: --out {args.out}: {error.strerror}. Fix: give another", file=sys.stderr)
        return 2
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("".join(lines), end="", file=sys.stderr)
    if others:
        print(f"left as they were: {', '.join(others)}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
