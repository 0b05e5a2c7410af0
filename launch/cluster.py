"""Start a run on many machines: `deepspeed`, once what reaches their shells has been checked.

    python launch/cluster.py --hostfile hostfile train.py --ds_config ds_configs/zero3.json

Takes what `deepspeed` takes. DeepSpeed hands host names to ssh, and arguments and variables to a
shell on every machine, as they stand, and reads a .deepspeed_env of whoever left one in the current
folder. Here whatever a shell would act upon is refused, so is a run whose hosts ssh does not all
reach, and pdsh does not wait for a machine that is cut off.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from subprocess import DEVNULL, PIPE, CalledProcessError, run
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
# `timeout` ends a ProxyCommand, too; the master of a ControlPersist would outlive it.
SSH = "timeout -k 1 7 ssh -o BatchMode=yes -o ConnectTimeout=5 -o ControlPersist=no"


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


def resolve_hosts(args: argparse.Namespace, hosts: dict[str, int]) -> dict[str, list[int]]:
    """Return the slots that take part by host, as DeepSpeed resolves them.

    Raises:
        BadInput: --include or --exclude names what is not in the hostfile, or leaves nothing.
    """
    from deepspeed.launcher import runner

    # Without users: in --include and --exclude, @ stands between two hosts.
    names = {host.rpartition("@")[2]: host for host in hosts}
    slots = {name: hosts[host] for name, host in names.items()}
    where = f"--include {args.include}" if args.include else f"--exclude {args.exclude}"
    remedy = f"give hosts as in {'@'.join(list(names)[:2])}:0"
    try:
        active = runner.parse_inclusion_exclusion(slots, args.include, args.exclude)
    except ValueError as error:
        raise BadInput(where, str(error).rstrip("."), remedy) from error
    if not active:
        raise BadInput(where, "leaves no host", remedy)
    active = runner.apply_num_nodes_and_gpus(active, args.num_nodes, args.num_gpus)
    return {names[name]: slots for name, slots in active.items()}


def check_reach(args: argparse.Namespace, hosts: list[str]) -> None:
    """Print which hosts ssh does not reach, of those that the run needs it for.

    Raises:
        BadInput: There are such hosts, or the launcher takes no users.
    """
    launcher = args.launcher.lower()
    if "@" in "".join(hosts) and launcher not in ("pdsh", "openmpi"):
        raise BadInput(f"--launcher {launcher}", "takes no user@host", "set User in ~/.ssh/config")
    alone = not args.force_multi and hosts in (["localhost"], ["127.0.0.1"], [os.uname().nodename])
    if alone or args.no_ssh or launcher == "slurm":
        args.no_ssh_check = True
        # Without an address, DeepSpeed would ask the first host for it through ssh.
        args.master_addr = args.master_addr or hosts[0].rpartition("@")[2]
    if args.no_ssh_check:
        return
    command = SSH.split()
    if launcher == "pdsh":
        command += os.environ["PDSH_SSH_ARGS_APPEND"].split()  # pdsh knows no quotes
    command += [] if args.ssh_port is None else ["-p", str(args.ssh_port)]
    with ThreadPoolExecutor(256) as pool:  # more would be slowed down by one another
        unreached = list(filter(None, pool.map(lambda host: failure_of(command, host), hosts)))
    if unreached:
        print(*unreached, sep="\n", file=sys.stderr)
        what = f"ssh does not reach {len(unreached)} of {len(hosts)} hosts"
        remedy = f"mend `{' '.join(command)} HOST true`, leave them out, or --no_ssh_check"
        raise BadInput(f"--hostfile {args.hostfile}", what, remedy)


def failure_of(command: list[str], host: str) -> str:
    """Return the host and the last line of an ssh that does not reach it, else nothing."""
    done = run([*command, host, "true"], stdin=DEVNULL, stdout=DEVNULL, stderr=PIPE)
    if done.returncode in (124, 137, -9):  # of `timeout`
        return f"{host}: no answer within 7 s"
    lines = done.stderr.decode(errors="replace").strip().splitlines() or ["ssh fails"]
    return f"{host}: {lines[-1]}" if done.returncode else ""


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
        active = resolve_hosts(args, hosts or {"localhost": 99999})  # DeepSpeed counts its GPUs
        if hosts:
            check_reach(args, list(active))
        with tempfile.NamedTemporaryFile("w", prefix="hostfile_", encoding="utf-8") as file:
            if hosts:  # as they were read: DeepSpeed and mpirun know fewer forms of a line
                file.writelines(f"{host} slots={slots}\n" for host, slots in hosts.items())
                file.flush()
                args.hostfile = file.name
                setattr(runner, "parse_args", lambda _: args)  # noqa: B010
                setattr(runner, "parse_inclusion_exclusion", lambda *_: active)  # noqa: B010
            runner.main(argv)
    except (ValueError, OSError, RuntimeError, AssertionError, CalledProcessError) as error:
        remedy = "" if isinstance(error, BadInput) else ". Fix: deepspeed --help lists the flags"
        print(f"error: {str(error).rstrip('.')}{remedy}", file=sys.stderr)
        return BAD_INPUT
    return FINISHED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
