"""The hostfile: one machine and its number of GPUs per line, as in `node-1 slots=8`."""

from __future__ import annotations

import re
import stat
from pathlib import Path

HOST = r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?"
LINE = re.compile(rf"(?P<host>{HOST})\s+slots=(?P<slots>[1-9][0-9]{{0,4}})")
MAX_BYTES = 2**20


def read_hostfile(path: Path) -> dict[str, int]:
    """Return the slots of each host, in order.

    Raises:
        ValueError: Everybody can write to the file, or a line is something else; names it.
    """
    check_not_open_to_all(path)
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path}: over {MAX_BYTES:,} bytes. Fix: one line per machine")
    hosts: dict[str, int] = {}
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        match = LINE.fullmatch(text)
        if not match or match["host"] in hosts:
            what = "given before" if match else f"not a host and its slots: {text[:60]!r}"
            raise ValueError(f"{path}:{number}: {what}. Fix: a line like node-{number} slots=8")
        hosts[match["host"]] = int(match["slots"])
    if not hosts:
        raise ValueError(f"{path}: no host in it. Fix: lines like node-1 slots=8")
    return hosts


def check_not_open_to_all(path: Path) -> None:
    """Refuse a file that every user of the machine can write to.

    Raises:
        ValueError: It is such a file.
    """
    if path.stat().st_mode & stat.S_IWOTH:
        raise ValueError(f"{path}: every user can write to it. Fix: chmod o-w {path}")
