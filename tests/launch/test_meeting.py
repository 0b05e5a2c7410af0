"""Ranks that find each other; with real launchers: tests/launch/test_hosts.py."""

import socket

import pytest

from launch.meeting import meet
from launch.ranks import Ranks


def test_ranks_that_never_come_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    given = {"RANK": "0", "WORLD_SIZE": "11", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    expected = (
        rf"rank 1, 2, 3, 4, 5, 6, 7, 8 and 2 more never came to 127\.0\.0\.1:{port}\. "
        "Fix: start it, or give it more time with --timeouts start=2"
    )
    with pytest.raises(OSError, match=expected):
        meet(Ranks(rank=0, local_rank=0, world_size=11, local_world_size=11), timeout_s=1)
