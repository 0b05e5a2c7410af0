"""Write the variables of this shell that ranks on other machines need, for DeepSpeed.

    python launch/environment.py --out .deepspeed_env

DeepSpeed sends this file, from your home or the current folder, to every machine of a hostfile, and
by itself only PYTHON…, NCCL…, UCX… and MV2… . Credentials are left out; lines of the file with
names that this shell does not have, such as MASTER_ADDR, stay.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

if not __package__:  # run as a file: import from the repository root, exactly as train.py does
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from command_line import OneLineParser
from errors import BadInput
from exit_status import BAD_INPUT, FINISHED
from launch.hostfile import check_not_open_to_all
from training.credentials import refuse_credentials

# Libraries, threads, networks and caches; a name that ends in _ stands for all that begin so.
NEEDED = (
    "LD_LIBRARY_PATH", "CUDA_HOME", "OMP_NUM_THREADS", "MALLOC_", "DS_ACCELERATOR", "NCCL_", "FI_",
    "TORCH_EXTENSIONS_DIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "TORCH_NCCL_", "HF_",
    "GLOO_SOCKET_IFNAME", "XDG_CACHE_HOME", "CUBLAS_WORKSPACE_CONFIG", "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF", "TORCH_CUDNN_SDPA_", "CUDA_DEVICE_MAX_CONNECTIONS",
)  # fmt: skip
NAME = re.compile(r"[A-Za-z_]\w*")
ACTIVE = re.compile(r"[$`\"\\\n]")  # what a shell acts upon between double quotes


def needed_variables() -> dict[str, str]:
    """Return those of this process, without credentials.

    Raises:
        BadInput: A shell would act upon a value.
    """
    prefixes = tuple(name for name in NEEDED if name.endswith("_"))
    found = {}
    for name, value in sorted(os.environ.items()):
        if name not in NEEDED and not name.startswith(prefixes):
            continue
        try:
            refuse_credentials({name: value}, "")
        except ValueError:
            print(f"{name}: left out, a credential", file=sys.stderr)
            continue
        check_variable(name, value)
        found[name] = value
    return found


def check_variable(name: str, value: str) -> None:
    """Refuse a variable that a shell on another machine would act upon.

    Raises:
        BadInput: Names it.
    """
    if not NAME.fullmatch(name) or ACTIVE.search(value):
        raise BadInput(name, "a shell would act upon its value", f"unset {name}")


def read_environment_file(path: Path) -> dict[str, str]:
    """Return the variables of a .deepspeed_env.

    Raises:
        BadInput: It is somebody else's, or a shell would act upon a line; names file and line.
    """
    check_not_open_to_all(path)
    if path.stat().st_uid not in (0, os.getuid()):
        raise BadInput(str(path), "belongs to another user", "delete it, or cp it to your own")
    found = {}
    for number, line in enumerate(os.fsdecode(path.read_bytes()).splitlines(), 1):
        name, equals, value = line.partition("=")
        if not equals or not NAME.fullmatch(name) or ACTIVE.search(value):
            raise BadInput(f"{path}:{number}", repr(line[:60]), "give a line like NAME=value")
        found[name] = value
    return found


def main() -> int:
    """Run the command line; return the exit status."""
    parser = OneLineParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="usually .deepspeed_env")
    args = parser.parse_args()
    try:
        needed = needed_variables()
        others = read_environment_file(args.out) if args.out.exists() else {}
        others = {name: value for name, value in others.items() if name not in needed}
        text = "".join(f"{name}={value}\n" for name, value in (others | needed).items())
        # In the encoding of the environment, in which DeepSpeed reads it.
        args.out.write_bytes(os.fsencode(text))
        args.out.chmod(0o600)
    except OSError as error:
        print(f"error: --out {args.out}: {error.strerror}. Fix: give another", file=sys.stderr)
        return BAD_INPUT
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    for name, value in needed.items():
        print(f"{name}={value}", file=sys.stderr)
    if others:
        print(f"left as they were: {', '.join(others)}", file=sys.stderr)
    return FINISHED


if __name__ == "__main__":
    sys.exit(main())
