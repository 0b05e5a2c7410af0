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

NAME = r"[A-Za-z0-9_]([A-Za-z0-9_.-]{0,251}[A-Za-z0-9_])?"
MAX_SLOTS = r"(\s+max[_-]slots\s*=\s*[0-9]+)?"  # Open MPI's; never reached, for slots is the number
SLOTS = r"\s+slots\s*=\s*(?P<slots>[1-9][0-9]{0,4})"
LINE = re.compile(rf"(?P<host>({NAME}@)?(?P<name>{NAME})){MAX_SLOTS}{SLOTS}{MAX_SLOTS}")
FAULTS = {  # the first one that a line begins with
    r"(\S+@)?\[?[0-9A-Fa-f]*:[0-9A-Fa-f]*:": "is an IPv6 address, which DeepSpeed does not take",
    r"[\w.@-]+:[0-9]": "has a colon: a port is given as --ssh_port, slots as slots=8",
    r"\S*?(?P<bad>[^\w.@\s-])": "has {bad!r} in its name, which takes A-Z, a-z, 0-9, _, . and -",
    r"": "is not a host (or user@host) and slots=1 to slots=99999",
}
MAX_BYTES = 2**20


def read_hostfile(path: Path) -> dict[str, int]:
    """Return the slots of each host, in order.

    Raises:
        BadInput: No text, everybody can write to it, or a line is something else; names it.
    """
    if not path.exists():
        raise BadInput(f"--hostfile {path}", "no such file", "python launch/hostfile.py writes one")
    check_not_open_to_all(path)
    if path.stat().st_size > MAX_BYTES:
        raise BadInput(str(path), f"over {MAX_BYTES:,} bytes", "give one line per machine")
    return parse_hostfile(text_of("--hostfile", path), str(path))


def parse_hostfile(text: str, name: str) -> dict[str, int]:
    """Return the slots of each host, in order.

    Raises:
        BadInput: A line is something else; names it.
    """
    hosts: dict[str, int] = {}
    machines = set()  # without users, in lower case
    for number, commented in enumerate(text.splitlines(), 1):
        line = commented.partition("#")[0].strip()
        if not line:
            continue
        match = LINE.fullmatch(line)
        machine = match["name"].lower() if match else ""
        if not match or machine in machines:
            what = "is given before" if match else fault_of(line[:400])
            remedy = f"give a line like node-{number} slots=8"
            raise BadInput(f"{name}:{number}", f"{line[:60]!r} {what}", remedy)
        machines.add(machine)
        hosts[match["host"]] = int(match["slots"])
    if not hosts:
        raise BadInput(name, "names no host", "give lines like node-1 slots=8")
    return hosts


def fault_of(line: str) -> str:
    """Return what is wrong with a line that is not a host and its slots."""
    matches = [(re.match(pattern, line, re.ASCII), what) for pattern, what in FAULTS.items()]
    return next(what.format(**match.groupdict()) for match, what in matches if match)


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
    return re.sub("#.*", "", text_of("--list", path)).split()


def text_of(flag: str, path: Path) -> str:
    """Return the text of a file in UTF-8, without a byte order mark.

    Raises:
        BadInput: It is no such file, or not this user's to read.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{flag} {path}", "cannot be read", "give a text file in UTF-8") from error


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
