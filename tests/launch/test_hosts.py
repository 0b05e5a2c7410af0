"""`launch/cluster.py` on machines that are network namespaces of this one (bench/hosts.py)."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from bench.hosts import Hosts, missing
from bench.parity import launch, write_ds_config

ROOT = Path(__file__).resolve().parents[2]
WHY_NOT = missing()
pytestmark = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT or "there are machines")


def arguments(data_dir: Path, run_dir: Path, ds_config: Path, *more: object) -> list[str]:
    return ["--model", "debug", "--data_dir", str(data_dir), "--run_dir", str(run_dir),
            "--ds_config", str(ds_config), "--batch_tokens", "512", "--micro_batch_size", "1",
            "--decay_steps", "40", "--eval_tokens", "256", "--eval_every", "100000",
            "--sample_tokens", "1", *map(str, more)]  # fmt: skip


def losses(run_dir: Path) -> list[float]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row["train/loss"] for row in rows if "train/loss" in row]


def start(hosts: Hosts, slots: dict[str, int], command: list[str], log: Path) -> Any:
    """Start train.py through launch/cluster.py, as somebody on the first machine would."""
    hostfile = hosts.folder / "hostfile"
    hostfile.write_text("".join(f"{name} slots={n}\n" for name, n in slots.items()))
    variables = {"GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    (hosts.home / ".deepspeed_env").write_text("".join(f"{k}={v}\n" for k, v in variables.items()))
    starter = [sys.executable, str(ROOT / "launch" / "cluster.py"), "--hostfile", str(hostfile)]
    return hosts.popen(
        "node-1", [*starter, "--master_addr", "10.77.0.1", "train.py", *command], log
    )


def test_two_machines_train_as_one_and_a_lost_one_ends_the_run(
    data_dir: Path, tmp_path: Path
) -> None:
    run_dir, log = tmp_path / "run", tmp_path / "log"
    ds_config = write_ds_config(tmp_path, 3, "fp32")
    alone = launch(4, arguments(data_dir, tmp_path / "alone", ds_config, "--max_steps", 6))
    assert alone.returncode == 0, alone.stderr
    long = ["--max_steps", 100_000, "--checkpoint_every", 3, "--timeouts", "step=10"]
    with Hosts(tmp_path, 2) as hosts:
        command = arguments(data_dir, run_dir, ds_config, *long)
        job = start(hosts, {"node-1": 2, "node-2": 2}, command, log)
        deadline = time.monotonic() + 120
        while not (run_dir / "checkpoints" / "step_000009").exists():
            assert job.poll() is None, log.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert losses(run_dir)[:6] == pytest.approx(losses(tmp_path / "alone"), abs=1e-5)
        assert "node-2: " in log.read_text()
        hosts.cut("node-2")
        cut_s = time.monotonic()
        while ranks := ranks_of(run_dir):
            assert time.monotonic() - cut_s < 10 + 45, ranks
            time.sleep(0.2)
        job.kill()
        job.wait()
        steps = len(losses(run_dir))
        command = arguments(data_dir, run_dir, ds_config, "--max_steps", steps + 2)
        again = start(hosts, {"node-1": 2}, command, log)
        assert again.wait(100) == 0, log.read_text()
        assert len(losses(run_dir)) == steps + 2


def ranks_of(run_dir: Path) -> list[int]:
    """Return the ranks, of every machine, that train into a folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:  # it has just ended
            continue
        if str(run_dir).encode() in words and any(w.startswith(b"--local_rank") for w in words):
            found.append(int(path.parent.name))
    return found
