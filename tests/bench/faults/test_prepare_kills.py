"""data/prepare.py, killed; make kills does it fifty times."""

import random
import shutil
from pathlib import Path

from bench.faults.prepare_kills import WAYS, campaign


def test_killed_at_random_it_ends_with_the_same_bytes(tmp_path: Path) -> None:
    ways = WAYS if shutil.which("mpirun") else WAYS[:1]
    kills = campaign(3, tmp_path / "kills.json", ways, seed=random.randrange(10**6))
    assert all(kill.same_bytes for kill in kills), kills
    assert all(kill.rewritten_shards <= 1 for kill in kills), kills
    assert any(kill.hit for kill in kills), kills
