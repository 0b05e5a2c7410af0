"""Ranks that find each other; with real launchers: tests/launch/test_hosts.py."""

import socket

import pytest

from launch.meeting import meet
from launch.ranks import Ranks


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def first_of(n_ranks: int, address: str, port: int, monkeypatch: pytest.MonkeyPatch) -> Ranks:
    given = {"RANK": 0, "WORLD_SIZE": n_ranks, "MASTER_ADDR": address, "MASTER_PORT": port}
    for name, value in given.items():
        monkeypatch.setenv(name, str(value))
    return Ranks(rank=0, local_rank=0, world_size=n_ranks, local_world_size=n_ranks)


def test_ranks_that_never_come_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    expected = (
        rf"rank 1, 2, 3, 4, 5, 6, 7, 8 and 2 more never came to 127\.0\.0\.1:{port}\. "
        "Fix: start it, or give it more time with --timeouts start=2"
    )
    with pytest.raises(OSError, match=expected):
        meet(first_of(11, "127.0.0.1", port, monkeypatch), timeout_s=1)


def test_a_port_that_is_taken_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=rf"127.0.0.1:{port}: in use. Fix: free it, or give anot"):
            meet(first_of(1, "127.0.0.1", port, monkeypatch), timeout_s=5)


def test_an_address_that_is_none_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    first_of(2, "no.such.host.invalid", free_port(), monkeypatch)
    with pytest.raises(
        OSError, match=r"MASTER_ADDR no\.such\.host\.invalid: does not resolve .*Fix"
    ):
        meet(Ranks(rank=1, local_rank=1, world_size=2, local_world_size=2), timeout_s=1)
