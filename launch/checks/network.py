"""What ranks find out together: who reaches whom, which folder they share, how fast they add up.

All-reduces run in pairs along a ring, of the ranks of a machine and then of machines. Each is in
two pairs and counts with the better one: what is slow in both is slow itself, not its neighbour.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import ipaddress
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

CONNECT_S, CONNECTIONS = 5, 32  # to wait for one; at a time
TOKEN = ".preflight"

Pairs = list[list[int]]  # of ranks; no rank is in two


@contextlib.contextmanager
def listening() -> Iterator[list[object]]:
    """Take connections on a free port while the context lasts; give this rank's address and port.

    The address is the one that this machine talks to rank 0 from.
    """
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    with socket.create_server(("", 0), family=family, backlog=1024, dualstack_ipv6=dual) as server:

        def take() -> None:
            with contextlib.suppress(OSError):  # closed: it is over
                while True:
                    server.accept()[0].close()

        threading.Thread(target=take, name="listening", daemon=True).start()
        yield [_own_address(), server.getsockname()[1]]


def _own_address() -> str:
    master, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    family, kind, _, _, address = socket.getaddrinfo(master, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as s:
        s.connect(address)  # sends nothing
        own = str(s.getsockname()[0])
    # Rank 0's machine may know its name as 127.0.1.1: the others know it better.
    return master if ipaddress.ip_address(own).is_loopback else own


def unreached(addresses: list[list[object]]) -> list[int]:
    """Return the ranks that cannot be connected to from here."""

    def reaches(address: list[object]) -> bool:
        try:
            socket.create_connection((str(address[0]), int(str(address[1]))), CONNECT_S).close()
        except OSError:
            return False
        return True

    with concurrent.futures.ThreadPoolExecutor(CONNECTIONS) as pool:
        return [rank for rank, ok in enumerate(pool.map(reaches, addresses)) if not ok]


def leave_token(folder: Path, token: str) -> None:
    """Write what tells this folder from every other; rank 0 does."""
    with contextlib.suppress(OSError):  # that it cannot be written to is said elsewhere
        (folder / TOKEN).write_text(token, encoding="utf-8")


def find_token(folder: Path, token: str) -> bool:
    """Return whether this is the folder in which rank 0 wrote."""
    try:
        return (folder / TOKEN).read_text(encoding="utf-8") == token
    except OSError:
        return False


def remove_token(folder: Path) -> None:
    """Remove what rank 0 wrote."""
    with contextlib.suppress(OSError):
        (folder / TOKEN).unlink()


def nodes_of(hosts: list[str]) -> list[list[int]]:
    """Return the ranks of each machine, from each rank's host name."""
    nodes: dict[str, list[int]] = {}
    for rank, host in enumerate(hosts):
        nodes.setdefault(host, []).append(rank)
    return list(nodes.values())


def pairs_within_machines(nodes: list[list[int]]) -> list[Pairs]:
    """Return which two ranks of each machine add up at the same time: one pair a machine."""
    rounds: list[Pairs] = [[] for _ in range(max(map(len, nodes)))]
    for node in nodes:
        for i, pair in enumerate(_ring(len(node))):
            rounds[i].append([node[j] for j in pair])
    return [pairs for pairs in rounds if pairs]


def pairs_between_machines(nodes: list[list[int]]) -> list[Pairs]:
    """Return which two machines add up at the same time, all their ranks in one group."""
    rounds: list[Pairs] = [[], [], []]
    for i, pair in enumerate(_ring(len(nodes))):
        last_of_odd = i == len(nodes) - 1 and len(nodes) % 2 == 1
        rounds[2 if last_of_odd else i % 2].append([rank for j in pair for rank in nodes[j]])
    return [pairs for pairs in rounds if pairs]


def _ring(n: int) -> list[tuple[int, int]]:
    return [(i, (i + 1) % n) for i in range(n if n > 2 else n - 1)]
