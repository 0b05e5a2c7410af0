"""Find out which ranks reach each other, and which ranks measure their all-reduce at a time.

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

Groups = list[list[int]]  # of ranks; no rank is in two


@contextlib.contextmanager
def listening() -> Iterator[tuple[str, int]]:
    """Take connections on a free port while the context lasts; give this rank's address and port.

    The address is the one from which this machine connects to rank 0.
    """
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    with socket.create_server(("", 0), family=family, backlog=1024, dualstack_ipv6=dual) as server:

        def accept_all() -> None:
            with contextlib.suppress(OSError):  # the context has ended and closed the server
                while True:
                    server.accept()[0].close()

        threading.Thread(target=accept_all, name="listening", daemon=True).start()
        yield _own_address(), server.getsockname()[1]


def _own_address() -> str:
    master, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    family, kind, _, _, address = socket.getaddrinfo(master, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as s:
        s.connect(address)  # of a datagram socket: it sends nothing
        own = str(s.getsockname()[0])
    # Rank 0's machine may know its name as 127.0.1.1: the others know it better.
    return master if ipaddress.ip_address(own).is_loopback else own


def unreached(addresses: list[tuple[str, int]]) -> list[int]:
    """Return the ranks that cannot be connected to from here."""

    def reaches(address: tuple[str, int]) -> bool:
        try:
            socket.create_connection(address, CONNECT_S).close()
        except OSError:
            return False
        return True

    with concurrent.futures.ThreadPoolExecutor(CONNECTIONS) as pool:
        return [rank for rank, ok in enumerate(pool.map(reaches, addresses)) if not ok]


def has_token(file: Path, token: str) -> bool:
    """Return whether this is the file that rank 0 wrote."""
    try:
        return file.read_text(encoding="utf-8") == token
    except OSError:
        return False


def pairs_within_machines(nodes: list[list[int]]) -> list[Groups]:
    """Return which two ranks of each machine measure at the same time: one pair a machine."""
    rounds: list[Groups] = [[] for _ in range(max(map(len, nodes)))]
    for node in nodes:
        for i, pair in enumerate(_ring(len(node))):
            rounds[i].append([node[j] for j in pair])
    return [pairs for pairs in rounds if pairs]


def pairs_between_machines(nodes: list[list[int]]) -> list[Groups]:
    """Return which two machines measure at the same time, all their ranks in one group."""
    rounds: list[Groups] = [[], [], []]
    for i, (one, other) in enumerate(_ring(len(nodes))):
        # Neighbours on the ring take turns; of an odd number the last pair is left over.
        last_of_odd = i == len(nodes) - 1 and len(nodes) % 2 == 1
        rounds[2 if last_of_odd else i % 2].append(nodes[one] + nodes[other])
    return [pairs for pairs in rounds if pairs]


def _ring(n: int) -> list[tuple[int, int]]:
    return [(i, (i + 1) % n) for i in range(n if n > 2 else n - 1)]
