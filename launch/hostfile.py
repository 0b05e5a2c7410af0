"""Write a hostfile: one machine and its number of GPUs per line, as in `node-1 slots=8`.

python launch/hostfile.py node-1 node-2 --slots 8 > hostfile
python launch/hostfile.py --list machines.txt --slots 8 > hostfile     one name per line
python launch/hostfile.py > hostfile                                   those of a Slurm allocation
"""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
from pathlib import Path

if not __package__:  # run as a file: import from the repository root, exactly as train.py does
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from command_line import OneLineParser
from errors import BadInput
from exit_status import BAD_INPUT, FINISHED

HOST = r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?"
LINE = re.compile(rf"(?P<host>{HOST})\s+slots=(?P<slots>[1-9][0-9]{{0,4}})")
MAX_BYTES = 2**20


def read_hostfile(path: Path) -> dict[str, int]:
    """Return the slots of each host, in order.

    Raises:
        BadInput: No file, everybody can write to it, or a line is something else; names it.
    """
    if not path.is_file():
        raise BadInput(f"--hostfile {path}", "no such file", "python launch/hostfile.py writes one")
    check_not_open_to_all(path)
    if path.stat().st_size > MAX_BYTES:
        raise BadInput(str(path), f"over {MAX_BYTES:,} bytes", "give one line per machine")
    return parse_hostfile(path.read_text(errors="replace", encoding="utf-8-sig"), str(path))


def parse_hostfile(text: str, name: str) -> dict[str, int]:
    """Return the slots of each host, in order.

    Raises:
        BadInput: A line is something else; names it.
    """
    hosts: dict[str, int] = {}
    for number, line in enumerate(map(str.strip, text.splitlines()), 1):
        if not line or line.startswith("#"):
            continue
        match = LINE.fullmatch(line)
        if not match or match["host"] in hosts:
            what = "given before" if match else "not a host and its slots"
            remedy = f"give a line like node-{number} slots=8"
            raise BadInput(f"{name}:{number}", f"{line[:60]!r} is {what}", remedy)
        hosts[match["host"]] = int(match["slots"])
    if not hosts:
        raise BadInput(name, "names no host", "give lines like node-1 slots=8")
    return hosts


def check_not_open_to_all(path: Path) -> None:
    """Refuse a file that every user of the machine can write to.

    Raises:
        BadInput: It is such a file.
    """
    if path.stat().st_mode & stat.S_IWOTH:
        raise BadInput(str(path), "every user can write to it", f"chmod o-w {path}")


def slurm_hosts() -> list[str]:
    """Return the machines of the Slurm allocation that this process is in.

    Raises:
        BadInput: It is in none, or Slurm does not name them.
    """
    nodes = os.environ.get("SLURM_JOB_NODELIST")
    if not nodes:
        raise BadInput("HOST", "none given, and no Slurm allocation", "name the machines")
    command = ["scontrol", "show", "hostnames", nodes]
    try:
        done = subprocess.run(command, check=True, capture_output=True, encoding="utf-8")
    except (OSError, subprocess.CalledProcessError) as error:
        raise BadInput(" ".join(command), "failed", "name the machines") from error
    return done.stdout.split()


def listed_hosts(path: Path) -> list[str]:
    """Return the words of a file, without comments.

    Raises:
        BadInput: It cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"--list {path}", "cannot be read", "give a text file of names") from error
    return re.sub("#.*", "", text).split()


def main() -> int:
    """Run the command line; return the exit status."""
    parser = OneLineParser(description=__doc__)
    parser.add_argument("hosts", nargs="*", metavar="HOST")
    parser.add_argument("--list", type=Path, help="file with one host per line")
    slots = os.environ.get("SLURM_GPUS_ON_NODE")
    parser.add_argument("--slots", type=int, default=slots, help="ranks per machine (Slurm's GPUs)")
    args = parser.parse_args()
    try:
        listed = listed_hosts(args.list) if args.list else []
        hosts = [*args.hosts, *listed] or slurm_hosts()
        if args.slots is None or args.slots < 1:
            what = f"must be the ranks of a machine, got {args.slots}"
            raise BadInput("--slots", what, "give 1 or more")
        text = "".join(f"{host} slots={args.slots}\n" for host in hosts)
        parse_hostfile(text, "HOST")
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    print(text, end="")
    return FINISHED


if __name__ == "__main__":
    sys.exit(main())
