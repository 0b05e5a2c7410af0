"""Start a run on many machines: `deepspeed`, once what reaches their shells has been checked.

    python launch/cluster.py --hostfile hostfile train.py --ds_config ds_configs/zero3.json

Takes what `deepspeed` takes. DeepSpeed hands host names to ssh, and arguments and variables to a
shell on every machine, as they stand, and reads a .deepspeed_env of whoever left one in the current
folder. Here whatever a shell would act upon is refused, and pdsh does not wait for a machine that
is cut off.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: import from the repository root, exactly as train.py does
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from command_line import OneLineParser
from errors import BadInput
from exit_status import BAD_INPUT, FINISHED
from launch.environment import check_variable, read_environment_file
from launch.hostfile import read_hostfile

SSH_OPTIONS = "-o ServerAliveInterval=5"  # three silent intervals, and ssh gives a machine up
ARGUMENT = re.compile(r"[\w@%+=:,./ -]*")  # DeepSpeed puts one with a space between double quotes


def check_arguments(arguments: list[str]) -> None:
    """Refuse what the shell of another machine would act upon.

    Raises:
        BadInput: Names the argument.
    """
    for argument in arguments:
        if not ARGUMENT.fullmatch(argument):
            what = "a shell on another machine would act upon it"
            remedy = "use letters, digits, spaces and _@%+=:,./- only"
            raise BadInput(repr(argument[:60]), what, remedy)


def main(argv: list[str]) -> int:
    """Check, then be `deepspeed`; return the exit status."""
    parser = OneLineParser(description=__doc__)
    parser.add_argument("arguments", nargs="+", help="those of deepspeed: deepspeed --help")
    if argv[:1] in ([], ["-h"], ["--help"]):
        parser.parse_args(argv)
    from deepspeed.accelerator import get_accelerator
    from deepspeed.launcher import runner

    # DeepSpeed makes a parser of its own; a bad flag is one line there, too.
    setattr(argparse.ArgumentParser, "error", OneLineParser.error)  # noqa: B010
    args = runner.parse_args(argv)
    try:
        hosts = {}
        if args.hostfile != runner.DLTS_HOSTFILE or Path(args.hostfile).is_file():
            hosts = read_hostfile(Path(args.hostfile))
        elif args.launcher != runner.PDSH_LAUNCHER:  # DeepSpeed would start here, without it
            raise BadInput(f"--launcher {args.launcher}", "no hosts", "give a --hostfile")
        # The operator's own options of ssh, pdsh or mpirun: no shell sees them.
        own = (args.launcher_args, f"--launcher_args={args.launcher_args}")
        check_arguments([given for given in argv if given not in own])
        accelerator: Any = get_accelerator()
        for name, value in os.environ.items():
            if name.startswith((*runner.EXPORT_ENVS, *accelerator.export_envs())):
                check_variable(name, value)
        for folder in runner.DEEPSPEED_ENVIRONMENT_PATHS:
            path = Path(folder, runner.DEEPSPEED_ENVIRONMENT_NAME)
            if path.is_file():
                read_environment_file(path)
        os.environ.setdefault("PDSH_SSH_ARGS_APPEND", SSH_OPTIONS)
        with tempfile.NamedTemporaryFile("w", prefix="hostfile_", encoding="utf-8") as file:
            if hosts:  # as it was read: DeepSpeed and mpirun know no byte order mark
                file.writelines(f"{host} slots={slots}\n" for host, slots in hosts.items())
                file.flush()
                args.hostfile = file.name
                setattr(runner, "parse_args", lambda _: args)  # noqa: B010
            runner.main(argv)
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    except (ValueError, OSError, RuntimeError, subprocess.CalledProcessError) as error:
        what = str(error).rstrip(".")  # DeepSpeed's own
        print(f"error: {what}. Fix: see that ssh reaches every host", file=sys.stderr)
        return BAD_INPUT
    return FINISHED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
