"""The hostfile: one machine and its number of GPUs per line, as in `node-1 slots=8`.

python launch/hostfile.py node-1 node-2 --slots 8 > hostfile
python launch/hostfile.py --list machines.txt --slots 8 > hostfile     one name per line
python launch/hostfile.py > hostfile                                   those of a Slurm allocation
"""

from __future__ import annotations

import argparse
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

HOST = r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?"
LINE = re.compile(rf"(?P<host>{HOST})\s+slots=(?P<slots>[1-9][0-9]{{0,4}})")
MAX_BYTES = 2**20


def read_hostfile(path: Path) -> dict[str, int]:
    """Return the slots of each host, in order.

    Raises:
        ValueError: No file, everybody can write to it, or a line is something else; names it.
    """
    if not path.is_file():
        raise ValueError(
            f"--hostfile {path}: no such file. Fix: python launch/hostfile.py writes one"
        )
    check_not_open_to_all(path)
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path}: over {MAX_BYTES:,} bytes. Fix: one line per machine")
    return parse_hostfile(path.read_text(errors="replace", encoding="utf-8-sig"), str(path))


def parse_hostfile(text: str, name: str) -> dict[str, int]:
    """Return the slots of each host, in order.

    Raises:
        ValueError: A line is something else; names it.
    """
    hosts: dict[str, int] = {}
    for number, line in enumerate(map(str.strip, text.splitlines()), 1):
        if not line or line.startswith("#"):
            continue
        match = LINE.fullmatch(line)
        if not match or match["host"] in hosts:
            what = "given before" if match else "not a host and its slots"
            raise ValueError(
                f"{name}:{number}: {line[:60]!r} is {what}. Fix: a line like node-{number} slots=8"
            )
        hosts[match["host"]] = int(match["slots"])
    if not hosts:
        raise ValueError(f"{name}: no host in it. Fix: lines like node-1 slots=8")
    return hosts


def check_not_open_to_all(path: Path) -> None:
    """Refuse a file that every user of the machine can write to.

    Raises:
        ValueError: It is such a file.
    """
    if path.stat().st_mode & stat.S_IWOTH:
        raise ValueError(f"{path}: every user can write to it. Fix: chmod o-w {path}")


def slurm_hosts() -> list[str]:
    """Return the machines of the Slurm allocation that this process is in.

    Raises:
        ValueError: It is in none, or Slurm does not name them.
    """
    nodes = os.environ.get("SLURM_JOB_NODELIST")
    if not nodes:
        raise ValueError("HOST: none given, and no Slurm allocation. Fix: name the machines")
    command = ["scontrol", "show", "hostnames", nodes]
    try:
        done = subprocess.run(command, check=True, capture_output=True, encoding="utf-8")
        return done.stdout.split()
    except (OSError, subprocess.CalledProcessError) as error:
        raise ValueError(f"{' '.join(command)}: failed. Fix: name the machines") from error


def listed_hosts(path: Path) -> list[str]:
    """Return the words of a file, without comments.

    Raises:
        ValueError: It cannot be read.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
        return [word for line in lines for word in line.partition("#")[0].split()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--list {path}: cannot be read. Fix: give a file of names") from error


def main() -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("hosts", nargs="*", metavar="HOST")
    parser.add_argument("--list", type=Path, help="file with one host per line")
    parser.add_argument(
        "--slots", type=int, default=os.environ.get("SLURM_GPUS_ON_NODE"),
        help="ranks per machine (default: the GPUs of a Slurm allocation)",
    )  # fmt: skip
    args = parser.parse_args()
    try:
        listed = listed_hosts(args.list) if args.list else []
        hosts = [*args.hosts, *listed] or slurm_hosts()
        if args.slots is None:
            raise ValueError("--slots: not given. Fix: give the ranks per machine")
        if int(args.slots) < 1:
            raise ValueError(f"--slots {args.slots}: not a number of ranks. Fix: give 1 or more")
        text = "".join(f"{host} slots={args.slots}\n" for host in hosts)
        parse_hostfile(text, "HOST")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
