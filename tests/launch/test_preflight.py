"""launch/preflight.py: what its facts amount to, and what it says on 4 ranks, healthy and not."""

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launch.checks.checklist import compare_all, read_all
from launch.checks.compare import Facts
from launch.checks.machine import needed_bytes, read_flags
from launch.checks.network import pairs_between_machines, pairs_within_machines
from model import PRESETS
from training.ranks import Ranks
from training.run import resolve_run

ROOT = Path(__file__).resolve().parents[2]
LIMITS = {
    "open_files": 65536,
    "memlock_bytes": -1,
    "shm_bytes": 2**34,
    "has_infiniband": True,
    "shards": 100,
}
LINK = {"bytes_per_s": 1e11, "latency_s": 20e-6}


def healthy(n_nodes: int = 4, per_node: int = 2) -> list[Facts]:
    """Return what ranks of a cluster without fault find."""
    facts: list[Facts] = []
    for rank in range(n_nodes * per_node):
        node = rank // per_node + 1
        facts.append(
            {
                "rank": rank,
                "host": f"node-{node}",
                "errors": {},
                "answers": None,
                "device": {"kind": "cuda", "name": "H100"},
                "versions": {"torch": "2.13", "git": "d7"},
                "flags": {"lr": "0.1"},
                "variables": {"NCCL_DEBUG": "WARN"},
                "plan": None,
                "clock": 1e9 + rank * 1e-3,
                "hostnames": [f"10.0.0.{node}"],
                "connections": [],
                "shards": {"train": "ab", "val": "cd"},
                "run folder": {"free_bytes": 2**40, "needed_bytes": 2**38},
                "run folder shared": True,
                "limits": LIMITS,
                "jit locks": None,
                "memory": 80e9,
                "matmul": 650e12 + 1e12 * rank,
                "process group": "nccl",
                "pairs in a machine": LINK,
                "pairs of machines": LINK,
                "all ranks": LINK,
            }
        )
    return copy.deepcopy(facts)


def found(facts: list[Facts]) -> list[tuple[str, str, list[int]]]:
    return [(each.check, each.host, each.ranks) for each in compare_all(facts).findings]


def test_a_healthy_cluster_has_no_findings() -> None:
    for n_nodes, per_node in ((1, 1), (1, 2), (2, 1), (4, 2)):
        outcome = compare_all(healthy(n_nodes, per_node))
        assert all(outcome.seen.values())
        assert not outcome.findings


@pytest.mark.parametrize(
    ("check", "value"),
    [
        ("versions", {"torch": "2.12", "git": "d7"}),
        ("versions", {"torch": "2.13"}),
        ("flags", {"lr": "0.2"}),
        ("variables", {}),
        ("device", {"kind": "cuda", "name": "A100"}),
        ("clock", 1e9 - 1.1),
        ("connections", [0, 1, 2]),
        ("shards", {"train": "ab", "val": "ce"}),
        ("run folder", {"free_bytes": 2**37, "needed_bytes": 2**38}),
        ("run folder shared", False),
        ("limits", LIMITS | {"open_files": 256}),
        ("limits", LIMITS | {"memlock_bytes": 65536}),
        ("limits", LIMITS | {"shm_bytes": 2**26}),
        ("memory", 60e9),
        ("matmul", 500e12),
        ("pairs in a machine", LINK | {"bytes_per_s": 6e10}),
        ("pairs of machines", LINK | {"latency_s": 70e-6}),
    ],
)
def test_what_is_off_on_one_rank_is_found_there_and_nowhere_else(check: str, value: Any) -> None:
    facts = healthy()
    facts[3][check] = value
    assert found(facts) == [(check, "node-2", [3])]


def test_the_ranks_of_a_machine_with_one_fault_are_one_finding() -> None:
    facts = healthy()
    for fact in facts[2:4]:
        fact["pairs of machines"] = LINK | {"bytes_per_s": 1e10}
    assert found(facts) == [("pairs of machines", "node-2", [2, 3])]
    (finding,) = compare_all(facts).findings
    assert str(finding).startswith(
        "node-2 (rank 2, 3): pairs of machines: 10 GB/s, the median is 100. Fix:"
    )


def test_of_two_ranks_the_slow_one_is_found() -> None:
    facts = healthy(2, 1)
    facts[0]["matmul"] = 300e12
    assert found(facts) == [("matmul", "node-1", [0])]


def test_an_error_and_a_missing_answer_name_their_rank() -> None:
    facts = healthy()
    facts[1]["errors"] = {"jit locks": ("/x/lock: left by a build", "rm /x/lock")}
    facts[4]["errors"] = {"all ranks": ("timed out", "")}
    facts[6]["errors"] = {"answers": ("no answer about memory within 9 s", "")}
    for fact in facts:
        del fact["matmul"]
    expected = [("answers", "node-4", [6]), ("jit locks", "node-1", [1])]
    assert found(facts) == [*expected, ("all ranks", "node-3", [4])]
    outcome = compare_all(facts)
    assert outcome.seen["matmul"] == ""
    assert outcome.findings[1].remedy == "rm /x/lock"
    assert outcome.findings[2].remedy.startswith("check NCCL_SOCKET_IFNAME")


def test_a_name_that_resolves_to_loopback_matters_to_gloo_on_several_machines() -> None:
    for kind, expected in (("cuda", []), ("cpu", [("hostnames", "node-1", [0])])):
        facts = healthy(2, 1)
        for fact in facts:
            fact["device"]["kind"] = kind
        facts[0]["hostnames"] = ["127.0.1.1"]
        assert found(facts) == expected


@pytest.mark.parametrize("sizes", [[1], [2], [8], [3, 3], [4, 2, 4], [2] * 5, [8] * 6])
def test_everybody_is_in_two_pairs_and_in_one_at_a_time(sizes: list[int]) -> None:
    nodes, first = [], 0
    for size in sizes:
        nodes.append(list(range(first, first + size)))
        first += size
    within, between = pairs_within_machines(nodes), pairs_between_machines(nodes)
    for rounds, units in ((within, sizes), (between, [len(nodes)])):
        times = dict.fromkeys(range(first), 0)
        for pairs in rounds:
            taking_part = [rank for pair in pairs for rank in pair]
            assert len(taking_part) == len(set(taking_part))
            for rank in taking_part:
                times[rank] += 1
        expected = [min(n, 3) - 1 for n in units for _ in range(n if units is sizes else first)]
        assert list(times.values()) == expected


def test_disk_space_is_asked_for_as_many_checkpoints_as_are_kept(tmp_path: Path) -> None:
    config = {"model": "debug", "run_dir": tmp_path, "max_steps": 100, "checkpoint_every": 10}
    ranks = Ranks(0, 0, 1, 1)
    one = needed_bytes(resolve_run(config, ranks)) / 11
    assert one == 14 * PRESETS["debug"].config.n_params()  # bf16 weights, fp32 masters and moments
    assert needed_bytes(resolve_run(config | {"keep_checkpoints": 2}, ranks)) == 3 * one
    milestones = config | {"keep_checkpoints": 2, "keep_every": 40}
    assert needed_bytes(resolve_run(milestones, ranks)) == 5 * one  # 40, 80, 90, 100 and one more


def test_shards_that_cannot_be_read_are_an_error_with_its_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    config = {"model": "debug", "data_dir": tmp_path, "run_dir": tmp_path / "run"}
    what, remedy = read_all(resolve_run(config, Ranks(0, 0, 1, 1)))["errors"]["shards"]
    assert "no shard" in what
    assert remedy
    assert list((tmp_path / "run").iterdir()) == []


def test_a_run_that_cannot_start_or_fit_is_found(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    config = {
        "model": "gpt3-175b",
        "data_dir": data_dir,
        "run_dir": tmp_path,
        "eval_tokens": 10_000,
    }
    errors = read_all(resolve_run(config, Ranks(0, 0, 1, 1)))["errors"]
    assert "10000" in errors["shards"][0]
    what, remedy = errors["plan"]
    assert "this run needs " in what
    assert remedy.startswith("take more devices")


def test_flags_that_are_credentials_are_not_told(tmp_path: Path) -> None:
    config = {"model": "debug", "run_dir": tmp_path, "init_from": "https://me:secret@host/x"}
    with pytest.raises(ValueError, match="--init_from: looks like a password") as refused:
        read_flags(resolve_run(config, Ranks(0, 0, 1, 1)))
    assert "secret" not in str(refused.value)


def test_each_fault_is_found_on_its_rank(tmp_path: Path) -> None:
    command = [sys.executable, "bench/cluster/unfit.py", "--folder", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="root mounts a small file system")
def test_a_full_disk_is_named(data_dir: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    inside = 'mount -t tmpfs -o size=64k none "$1" && head -c 64k /dev/zero > "$1/full"'
    inside += ' && shift && exec "$@"'
    command = ["unshare", "--mount", "sh", "-c", inside, "sh", str(run_dir), sys.executable]
    command += ["launch/preflight.py", "--model", "debug", "--eval_tokens", "256"]
    command += ["--data_dir", str(data_dir), "--run_dir", str(run_dir)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert f"{run_dir}: cannot be written to: No space left on device. Fix: free disk space" in line


def test_bad_usage_ends_with_status_2() -> None:
    command = [sys.executable, "launch/preflight.py", "--model", "gpt5"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
