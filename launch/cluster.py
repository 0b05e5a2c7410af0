"""Start a run on many machines: `deepspeed`, once what reaches their shells has been checked.

    python launch/cluster.py --hostfile hostfile train.py --ds_config ds_configs/zero3.json

Takes what `deepspeed` takes. DeepSpeed hands host names to ssh, and arguments and variables to a
shell on every machine, as they stand, and reads a .deepspeed_env of whoever left one in the current
folder. Here whatever a shell would act upon is refused.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: import from the repository root, exactly as train.py does
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from launch.hostfile import check_not_open_to_all, read_hostfile

BAD_INPUT = 2
ARGUMENT = re.compile(r"[\w@%+=:,./ -]*")  # DeepSpeed puts one with a space between double quotes
VARIABLE = re.compile(r"[A-Za-z_]\w*")
ACTIVE = re.compile(r"[$`\"\\\n]")  # what a shell acts upon between double quotes


def check_arguments(arguments: list[str]) -> None:
    """Refuse what the shell of another machine would act upon.

    Raises:
        ValueError: Names the argument.
    """
    for argument in arguments:
        if not ARGUMENT.fullmatch(argument):
            raise ValueError(
                f"{argument[:60]!r}: a shell on another machine would act upon it. "
                "Fix: use letters, digits, spaces and _@%+=:,./- only"
            )


def check_variables(variables: dict[str, str], prefixes: list[str]) -> None:
    """Refuse a variable that is sent along and that a shell would act upon.

    Raises:
        ValueError: Names it.
    """
    for name, value in variables.items():
        if name.startswith(tuple(prefixes)) and (
            not VARIABLE.fullmatch(name) or ACTIVE.search(value)
        ):
            raise ValueError(f"{name}: a shell would act upon its value. Fix: unset {name}")


def check_environment_file(path: Path) -> None:
    """Refuse a .deepspeed_env of somebody else, or with what a shell would act upon.

    Raises:
        ValueError: Names the file and the line.
    """
    check_not_open_to_all(path)
    if path.stat().st_uid not in (0, os.getuid()):
        raise ValueError(f"{path}: belongs to another user. Fix: delete it, or cp it to your own")
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
        name, equals, value = line.partition("=")
        if not equals or not VARIABLE.fullmatch(name) or ACTIVE.search(value):
            raise ValueError(f"{path}:{number}: {line[:60]!r}. Fix: a line like NAME=value")


def main(argv: list[str]) -> int:
    """Check, then be `deepspeed`; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("arguments", nargs="+", help="those of deepspeed: deepspeed --help")
    if argv[:1] in ([], ["-h"], ["--help"]):
        parser.parse_args(argv)
    from deepspeed.accelerator import get_accelerator
    from deepspeed.launcher import runner

    args = runner.parse_args(argv)
    try:
        if Path(args.hostfile).is_file():
            read_hostfile(Path(args.hostfile))
        # The operator's own options of ssh or pdsh: no shell sees them.
        check_arguments([given for given in argv if given != args.launcher_args])
        accelerator: Any = get_accelerator()
        check_variables(dict(os.environ), runner.EXPORT_ENVS + accelerator.export_envs())
        for folder in runner.DEEPSPEED_ENVIRONMENT_PATHS:
            path = Path(folder, runner.DEEPSPEED_ENVIRONMENT_NAME)
            if path.is_file():
                check_environment_file(path)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    runner.main(argv)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
