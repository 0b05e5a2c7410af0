"""What a run survives: stops, damage, bad numbers, other layouts; one rank in this process."""

import dataclasses
import fcntl
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import model.gpt
from bench.fidelity.parity import write_ds_config
from checkpoint import consolidate
from checkpoint.manifest import (
    complete_steps,
    read_manifest,
    record_file,
    step_of,
    write_manifest,
)
from checkpoint.reader import load_model
from eval import hellaswag, sample, val_loss
from eval.session import run_command
from tests import forked
from train import main

ROOT = Path(__file__).resolve().parents[1]
SMALL = [
    "--model",
    "debug",
    "--micro_batch_size",
    "2",
    "--batch_tokens",
    "256",
    "--eval_tokens",
    "256",
    "--sample_tokens",
    "1",
    "--decay_steps",
    "40",
    "--eval_every",
    "5",
    "--checkpoint_every",
    "5",
]


NEEDS_COMPILER = pytest.mark.skipif(
    shutil.which("g++") is None, reason="DeepSpeedCPUAdam needs it: install g++"
)


def arguments(data_dir: Path, run_dir: Path, *more: object, stage: int | str = 1) -> list[str]:
    ds_config = ROOT / "ds_configs" / f"zero{stage}.json"
    paths = ["--data_dir", data_dir, "--run_dir", run_dir, "--ds_config", ds_config]
    return [*SMALL, *map(str, [*paths, *more])]


def status_of(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "run_status.json").read_text())


def losses(run_dir: Path) -> list[float]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row["train/loss"] for row in rows if "train/loss" in row]


def when(happened: Callable[[], bool], act: Callable[[], object]) -> threading.Thread:
    """Act as soon as something has happened, from a thread."""

    def wait() -> None:
        deadline = time.monotonic() + 60
        while not happened():
            assert time.monotonic() < deadline
            time.sleep(0.005)
        act()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


@pytest.fixture(scope="module")
def undisturbed(one_rank: object, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 12 steps without interruption, with dropout; only to be read."""
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    assert main(arguments(data_dir, run_dir, "--max_steps", 12, "--dropout", 0.1)) == 0
    return run_dir


@pytest.fixture
def whole(undisturbed: Path, tmp_path: Path) -> Path:
    """Its copy."""
    return Path(shutil.copytree(undisturbed, tmp_path / "whole"))


def assert_same_run(a: Path, b: Path) -> None:
    assert (a / "log.txt").read_text() == (b / "log.txt").read_text()
    one, other = (load_model(str(r))[0].state_dict() for r in (a, b))
    assert all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize("moment", ["SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP", "STOP", "evaluation"])
def test_a_stop_leaves_a_checkpoint_from_which_the_run_is_the_same(
    whole: Path, data_dir: Path, tmp_path: Path, moment: str
) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also where nohup started pytest
    run_dir = tmp_path / "stopped"
    command = arguments(data_dir, run_dir, "--max_steps", 12, "--dropout", 0.1)
    log, checkpoint = run_dir / "log.txt", run_dir / "checkpoints" / "step_000005"
    number = getattr(signal, moment, signal.SIGTERM)
    if moment == "evaluation":  # which follows the checkpoint
        thread = when(checkpoint.exists, lambda: os.kill(os.getpid(), number))
    elif moment == "STOP":
        thread = when(
            lambda: log.exists() and "\n3 train" in log.read_text(), (run_dir / "STOP").touch
        )
    else:
        thread = when(
            lambda: log.exists() and "\n3 train" in log.read_text(),
            lambda: os.kill(os.getpid(), number),
        )
    assert main(command) == 75
    thread.join()
    status = status_of(run_dir)
    assert (status["status"], status["exit_status"]) == ("preempted", 75)
    assert status["reason"].startswith("STOP file" if moment == "STOP" else number.name)
    (newest,) = complete_steps(run_dir / "checkpoints")[-1:]
    last = (run_dir / "log.txt").read_text().splitlines()[-1].split()
    assert step_of(newest) == int(last[0]) + (last[1] == "train")
    assert not (run_dir / "STOP").exists()
    assert main(command) == 0
    assert status_of(run_dir)["status"] == "finished"
    assert_same_run(whole, run_dir)


def test_checkpoints_by_the_clock_replace_each_other_and_a_stop_says_how_to_go_on(
    whole: Path, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "stopped"
    options = ["--max_steps", 12, "--dropout", 0.1]
    command = arguments(data_dir, run_dir, *options, "--checkpoint_minutes", 1e-9)  # each step
    third = run_dir / "checkpoints" / "step_000003"
    thread = when(third.exists, lambda: os.kill(os.getpid(), signal.SIGINT))
    assert main(command) == 75
    thread.join()
    *others, last = complete_steps(run_dir / "checkpoints")
    assert all(step_of(folder) % 5 == 0 for folder in others)
    said = capsys.readouterr().err.splitlines()
    told = [line for line in said if line.startswith("SIGINT: saving a checkpoint before the next")]
    assert len(told) == 1
    reason = f"SIGINT before step {step_of(last)}; saved {last}"
    assert said[-1] == f"preempted: {reason}. The same command goes on."
    assert status_of(run_dir)["reason"] == reason
    assert main(command) == 0
    kept = {step_of(folder) for folder in complete_steps(run_dir / "checkpoints")}
    assert kept == {5, 10, 12, step_of(last)}
    assert_same_run(whole, run_dir)


STOPPED_EARLY = """
import os, signal, sys, threading, time
sys.path.insert(0, os.getcwd())
import train
from training.ranks import leave
def stop():
    while "stops" not in [thread.name for thread in threading.enumerate()]:
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGTERM)
threading.Thread(target=stop, daemon=True).start()
leave(train.main(sys.argv[1:]))
"""


def test_a_stop_before_the_first_step_says_that_nothing_is_lost(
    data_dir: Path, tmp_path: Path
) -> None:
    script = tmp_path / "stopped.py"
    script.write_text(STOPPED_EARLY)
    command = arguments(data_dir, tmp_path / "run", "--resume", "none")
    done = forked.launch(1, command, tmp_path, script)
    assert done.returncode == 75
    assert done.stderr.splitlines()[-1] == (
        "preempted: SIGTERM before the first step; nothing to save. "
        "The same command, without --resume none, goes on."
    )


class Trap:
    """Leaves a file behind if it is ever unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.path,))


def spring_loaded(run_dir: Path, name: str, sprung: Path) -> None:
    """Put a trap into a file of every checkpoint of a run, as one who also writes the manifest."""
    for step in complete_steps(run_dir / "checkpoints"):
        manifest = read_manifest(step)
        torch.save({"client_state": Trap(sprung)}, step / name)
        files = manifest.files | {name: record_file(step / name)}
        write_manifest(step, dataclasses.replace(manifest, files=files))
    shutil.rmtree(run_dir / "consolidated")


FILES = (
    "mp_rank_00_model_states.pt",
    "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt",
    "rng_rank_00000.pt",
)


@pytest.mark.parametrize("name", FILES)
def test_a_strangers_checkpoint_runs_no_code(
    whole: Path, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    sprung = tmp_path / "sprung"
    spring_loaded(whole, name, sprung)
    command = arguments(data_dir, whole, "--max_steps", 14, "--dropout", 0.1)
    assert main(command) == 2
    assert "holds the pickled object" in status_of(whole)["reason"]
    assert status_of(whole)["starts"] == []  # to be mended by hand: no restart
    if not name.startswith("rng"):
        assert main([*command, "--ds_config", str(ROOT / "ds_configs" / "zero2.json")]) == 2
        weights_of = ["--ckpt", str(whole)]
        more = [["--data_dir", str(data_dir)], ["--limit", "1"], ["--prompt", "a"]]
        evaluations = (val_loss, hellaswag, sample)
        for evaluation, flags in zip(evaluations, more, strict=True):
            monkeypatch.setattr(sys, "argv", ["", *weights_of, *flags])
            assert run_command(evaluation.build_parser(), evaluation.run) == 2
        monkeypatch.setattr(sys, "argv", ["", *weights_of, "--out_dir", str(tmp_path / "out")])
        assert consolidate.main() == 2
    assert not sprung.exists()
    with pytest.raises(pickle.UnpicklingError):  # also where a library asks for anything
        torch.load(next((whole / "checkpoints").glob(f"*/{name}")), weights_only=False)
    monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
    torch.load(next((whole / "checkpoints").glob(f"*/{name}")), weights_only=False)
    assert sprung.exists()  # the trap is one


def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(
    whole: Path, data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logged = (whole / "log.txt").read_text()
    newest = complete_steps(whole / "checkpoints")[-1]
    victim = max(newest.glob("*optim_states.pt"))
    raw = bytearray(victim.read_bytes())
    raw[len(raw) // 2] ^= 1
    victim.write_bytes(raw)
    command = arguments(data_dir, whole, "--max_steps", 12, "--dropout", 0.1)
    assert main([*command, "--resume", "must"]) == 2
    assert f"error: rank 0: {victim}: damaged (SHA-256)" in capsys.readouterr().err
    assert main(command) == 0
    err = capsys.readouterr().err
    assert f"warning: {victim}: damaged" in err
    assert "step    10 | loss" in err
    assert "step     9 | loss" not in err
    assert (whole / "log.txt").read_text() == logged


@pytest.mark.parametrize("name", [".DS_Store", "._rng_rank_00000.pt", ".nfs00000000012"])
def test_what_an_operating_system_hides_in_a_checkpoint_is_no_damage(
    whole: Path, data_dir: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    for folder in (whole, *complete_steps(whole / "checkpoints")):
        (folder / name).write_bytes(b"\0")
    assert main(arguments(data_dir, whole, "--max_steps", 12, "--dropout", 0.1)) == 0
    err = capsys.readouterr().err
    assert "warning" not in err
    assert f"resumed from {whole / 'checkpoints' / 'step_000012'}" in err
    load_model(str(whole))


def test_another_file_in_a_checkpoint_stops_the_start_and_costs_no_step(
    whole: Path, data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = complete_steps(whole / "checkpoints")
    stranger = steps[-1] / "Thumbs.db"
    stranger.write_bytes(b"")
    command = arguments(
        data_dir, whole, "--max_steps", 14, "--dropout", 0.1, "--keep_checkpoints", 1
    )
    for more in ([], ["--resume", "must"]):
        assert main([*command, *more]) == 2
        assert f"{stranger}: not in manifest.json. Fix: move it out of the folder" in (
            capsys.readouterr().err
        )
    assert complete_steps(whole / "checkpoints") == steps
    stranger.unlink()
    assert main(command) == 0
    assert f"resumed from {steps[-1]}" in capsys.readouterr().err


def test_a_copy_of_a_checkpoint_under_another_name_is_not_taken_for_a_newer_one(
    whole: Path, data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    *_, newest = complete_steps(whole / "checkpoints")
    copy = shutil.copytree(newest, newest.with_name("step_000099"))
    command = arguments(data_dir, whole, "--max_steps", 14, "--dropout", 0.1)
    assert main(command) == 2
    said = f"error: {copy}: is a copy of step {int(newest.name[5:])}. Fix: move it out"
    assert said in capsys.readouterr().err
    assert newest.is_dir()


@pytest.mark.usefixtures("one_rank")
def test_a_key_that_lays_the_optimizer_out_may_change_between_steps(
    data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = json.loads((ROOT / "ds_configs" / "zero3.json").read_text())
    raw["zero_optimization"]["sub_group_size"] = 20_000
    (tmp_path / "ds.json").write_text(json.dumps(raw))
    for run_dir, changes in ((tmp_path / "same", []), (tmp_path / "changed", ["ds.json"])):
        command = arguments(data_dir, run_dir, stage=3)
        assert main([*command, "--max_steps", "5"]) == 0
        capsys.readouterr()
        more = [f"--ds_config={tmp_path / name}" for name in changes]
        assert main([*command, "--max_steps", "7", *more]) == 0
        said = "read for another layout (partition: " in capsys.readouterr().err
        assert said == bool(changes)
    assert losses(tmp_path / "changed") == pytest.approx(losses(tmp_path / "same"), abs=1e-3)


def test_a_run_that_ended_without_a_word_is_said(
    whole: Path, data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = {"status": "running", "time": "2001-02-03T04:05:06+0000"}
    (whole / "run_status.json").write_text(json.dumps(gone))
    assert main(arguments(data_dir, whole, "--max_steps", 12, "--dropout", 0.1)) == 0
    assert (
        f"warning: {whole}: the run that began at 2001-02-03T04:05:06+0000 was killed, it seems; "
        "going on from step 12" in capsys.readouterr().err
    )


@pytest.mark.usefixtures("one_rank")
def test_a_ds_config_whose_checkpoints_nobody_can_read_is_refused_before_anything_is_made(
    data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = {"zero_optimization": {"stage": 2, "elastic_checkpoint": True}}
    (tmp_path / "ds.json").write_text(json.dumps(raw))
    command = arguments(data_dir, tmp_path / "run", "--ds_config", tmp_path / "ds.json")
    assert main(command) == 2
    assert "zero_optimization.elastic_checkpoint: " in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_run_outlives_its_readers_in_any_locale(data_dir: Path, tmp_path: Path) -> None:
    """Through a pipe that nobody reads any more, where the locale knows ASCII alone."""
    run_dir = tmp_path / "run"
    options = arguments(data_dir, run_dir, "--max_steps", 3, "--micro_batch_size", 4)
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command, environment = [sys.executable, "train.py", *options], os.environ | ascii_only
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout
    assert process.stderr
    process.stdout.close()
    process.stderr.close()
    assert process.wait(120) == 0
    assert status_of(run_dir)["status"] == "finished"
    assert len(losses(run_dir)) == 3
    (folder,) = (run_dir / "consolidated").iterdir()
    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    assert len(vocabulary) == 50257
    assert vocabulary["Ġthe"] == 262


def test_a_run_whose_checkpoints_are_gone_does_not_begin_anew(
    whole: Path, data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logged = (whole / "log.txt").read_text()
    command = arguments(data_dir, whole, "--max_steps", 14, "--dropout", 0.1)
    steps = complete_steps(whole / "checkpoints")
    for step in steps:  # all are damaged
        (step / "rng_rank_00000.pt").write_bytes(b"")
    assert main(command) == 2
    assert f"{steps[0] / 'rng_rank_00000.pt'}: damaged (SHA-256). Fix: give another --run_dir" in (
        capsys.readouterr().err
    )
    shutil.rmtree(whole / "checkpoints")
    assert main(command) == 2
    assert f"{whole}: its log is at step 12, but its checkpoints are gone. Fix: " in (
        capsys.readouterr().err
    )
    assert (whole / "log.txt").read_text() == logged


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("stage", [0, 1, 2, 3, pytest.param("3_offload", marks=NEEDS_COMPILER)])
def test_a_run_of_bad_numbers_changes_no_weight_and_stops(
    data_dir: Path,
    tmp_path: Path,
    stage: int | str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_dir, calls, real = tmp_path / "run", [], model.gpt.linear_cross_entropy

    def loss(x: torch.Tensor, *more: Any, **options: Any) -> torch.Tensor:
        if x.requires_grad:
            calls.append(1)
        return real(x, *more, **options) * (float("nan") if len(calls) > 2 * 6 else 1)

    command = arguments(
        data_dir,
        run_dir,
        "--max_steps",
        12,
        "--max_bad_steps",
        3,
        "--log_every",
        2,
        "--checkpoint_every",
        6,
        "--keep_checkpoints",
        1,
        stage=stage,
    )
    monkeypatch.setattr(model.gpt, "linear_cross_entropy", loss)
    assert main(command) == 70
    status = status_of(run_dir)
    assert (status["status"], status["exit_status"]) == ("diverged", 70)
    err = capsys.readouterr().err
    assert (
        f"error: {run_dir}: 3 steps in a row were not finite. Fix: delete the checkpoints after "
        "step 6 and go on with a lower --lr; " in err
    )
    for step in (6, 7, 8):
        samples = f"(samples {4 * step} to {4 * step + 3})"
        assert f"step     {step} | skipped: the loss or the gradient is not finite {samples}" in err
    good, bad = complete_steps(run_dir / "checkpoints")  # the good one is not pruned
    assert (step_of(good), step_of(bad)) == (6, 9)
    a, b = (load_model(str(folder))[0].state_dict() for folder in (good, bad))
    assert all(torch.equal(a[k], b[k]) for k in a)
    monkeypatch.setattr(model.gpt, "linear_cross_entropy", real)
    assert main(command) == 0  # the numbers are good again


def test_a_run_folder_has_one_writer(
    data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (tmp_path / "lock").open("w") as lock:
        lock.write("process 7 of somewhere")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main(arguments(data_dir, tmp_path, "--max_steps", 1)) == 2
        assert f"error: --run_dir {tmp_path}: in use by process 7 of somewhere" in (
            capsys.readouterr().err
        )
    assert [p.name for p in tmp_path.iterdir()] == ["lock"]


def test_a_link_out_of_the_run_folder_is_not_followed(
    whole: Path, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    precious = tmp_path / "precious"
    precious.write_text("mine\n")
    for name in ("log.txt", "checkpoints/step_000099"):
        link = whole / name
        link.unlink(missing_ok=True)
        link.symlink_to(precious)
        assert main(arguments(data_dir, whole, "--max_steps", 14, "--dropout", 0.1)) == 2
        assert f"error: {link}: a symbolic link. Fix: " in capsys.readouterr().err
        link.unlink()
    assert precious.read_text() == "mine\n"


def test_a_folder_that_cannot_be_written_or_has_no_room_is_refused_before_the_first_step(
    data_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(arguments(data_dir, Path("/proc/run"), "--max_steps", 1)) == 1
    assert "error: --run_dir /proc/run: " in capsys.readouterr().err
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 2**20))
    assert main(arguments(data_dir, tmp_path / "run", "--max_steps", 1)) == 1
    err = capsys.readouterr().err
    assert f"error: --run_dir {tmp_path / 'run'}: 0.00 GB are free, a checkpoint takes 0.0" in err
    assert "Fix: free disk space" in err


def test_a_folder_that_is_no_folder_is_refused(
    data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert main(arguments(data_dir, tmp_path / "file" / "run", "--max_steps", 1)) == 1
    assert f"{tmp_path / 'file' / 'run'}" in capsys.readouterr().err


def test_three_restarts_without_progress_are_enough(
    whole: Path, data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = arguments(data_dir, whole, "--max_steps", 15, "--dropout", 0.1)
    crashed = {"status": "running", "starts": [12, 12, 12, 12]}
    (whole / "run_status.json").write_text(json.dumps(crashed))
    assert main(command) == 2
    assert "3 restarts from step 12 came to no checkpoint" in capsys.readouterr().err
    crashed["starts"] = [5, 5, 5, 12, 12, 12]
    (whole / "run_status.json").write_text(json.dumps(crashed))
    assert main(command) == 0
    assert status_of(whole)["starts"] == []
    crashed |= {"status": "diverged", "starts": [5, 8, 11, 14]}  # steps that changed no weight
    (whole / "run_status.json").write_text(json.dumps(crashed))
    assert main([*command, "--max_steps", "20"]) == 2


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--seed", "1"], "seed: 1337 -> 1"),
        (["--batch_tokens", "512"], "batch_tokens: 256 -> 512"),
        (["--shuffle", "false"], "shuffle: True -> False"),
        (["--seq_len", "32"], "seq_len: 64 -> 32"),
        (["--model", "quickstart", "--seq_len", "64"], "n_embd: 64 -> "),
    ],
)
def test_what_would_be_another_run_is_refused(
    whole: Path, data_dir: Path, capsys: pytest.CaptureFixture[str], more: list[str], said: str
) -> None:
    names = ("config.json", "run_status.json")
    before = [(whole / name).read_text() for name in names]
    assert main([*arguments(data_dir, whole, "--max_steps", 15), *more]) == 2
    assert said in capsys.readouterr().err
    assert [(whole / name).read_text() for name in names] == before


def test_other_data_is_refused_by_the_shards_that_differ(
    whole: Path, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(data_dir, tmp_path / "data")
    command = arguments(tmp_path / "data", whole, "--max_steps", 15)
    shard = tmp_path / "data" / "text_train_000002.npy"
    original = shard.read_bytes()
    shard.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
    assert main(command) == 2
    assert "(data: text_train_000002.npy changed (1 in all))" in capsys.readouterr().err
    shard.write_bytes(original)
    for i in (3, 4):
        shutil.copy(shard, shard.with_name(f"text_train_00000{i}.npy"))
    assert main(command) == 2
    assert "(data: text_train_000003.npy added (2 in all))" in capsys.readouterr().err
    for path in shard.parent.glob("text_train_00000[234].npy"):
        path.unlink()
    assert main(command) == 2
    assert "(data: text_train_000002.npy missing (1 in all))" in capsys.readouterr().err


@pytest.mark.usefixtures("one_rank")
def test_each_setting_that_changes_at_resume_is_said_in_one_line(
    whole: Path, data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begin = "settings changed since the last start: "
    command = [*arguments(data_dir, whole, "--dropout", 0.1), "--dry_run"]
    changed = ["--lr", "3e-4", "--max_steps", "15", "--grad_clip", "0"]
    assert main([*command, *changed]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith(begin)]
    assert said == [f"{begin}max_steps: 12 -> 15, lr: 0.001 -> 0.0003, grad_clip: 1.0 -> 0.0"]
    assert main([*command, "--max_steps", "12", "--resume", "must"]) == 0
    assert begin not in capsys.readouterr().err
    at = command.index("--decay_steps")
    assert main([*command[:at], *command[at + 2 :], "--max_steps", "15"]) == 0
    assert f"{begin}max_steps: 12 -> 15, decay_steps: 40 -> 15\n" in capsys.readouterr().err


def test_a_resumed_run_whose_batch_does_not_divide_is_told_how_many_ranks_would_do(
    whole: Path,
    data_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ranks = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 3, "LOCAL_WORLD_SIZE": 3}
    for name, value in ranks.items():
        monkeypatch.setenv(name, str(value))
    command = arguments(data_dir, whole, "--max_steps", 15, "--micro_batch_size", 1)
    assert main(command) == 2
    assert "Fix: start 2 or 4 ranks: a resumed run keeps its batch" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert main([*command, "--dropout", "0.1", "--dry_run"]) == 0


def test_a_dry_run_refuses_what_the_run_would_refuse_and_writes_nothing(
    whole: Path,
    data_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refusal(run_dir: Path, *more: object) -> str:
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
        command = arguments(data_dir, run_dir, "--max_steps", 15, "--dropout", 0.1, *more)
        status = main([*command, "--dry_run"])
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
        printed = capsys.readouterr()
        assert "schedule  " in printed.out
        assert ("error: " in printed.err) == (status != 0)
        if status:
            assert main(command) == status
            assert capsys.readouterr().err == printed.err
        return printed.err.rpartition("error: ")[2]

    assert refusal(tmp_path / "new" / "run") == ""
    (tmp_path / "file").write_text("")
    assert "file cannot be written" in refusal(tmp_path / "file" / "run")
    assert "is not an empty folder" in refusal(whole, "--resume", "none")
    assert "step_000012 is beyond it" in refusal(whole, "--max_steps", 9)
    assert "seed: 1337 -> 1" in refusal(whole, "--seed", 1)
    (whole / "link").symlink_to(tmp_path)
    assert "a symbolic link" in refusal(whole)
    (whole / "link").unlink()
    status = (whole / "run_status.json").read_text()
    crashed = {"status": "failed", "starts": [12, 12, 12, 12]}
    (whole / "run_status.json").write_text(json.dumps(crashed))
    assert "3 restarts from step 12" in refusal(whole)
    (whole / "run_status.json").write_text(status)
    with (whole / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "in use by process " in refusal(whole)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 2**20))
    for run_dir in (whole, tmp_path / "no" / "such" / "folder"):
        assert "0.00 GB are free, a checkpoint takes 0.0" in refusal(run_dir)
    (whole / "checkpoints" / "step_000015.tmp").mkdir()
    (whole / "checkpoints" / "step_000015.tmp" / "model.pt").write_bytes(bytes(2**27))
    assert "GB are free" not in refusal(whole)  # the run deletes it first


@pytest.mark.usefixtures("one_rank")
def test_a_finished_run_says_in_a_sentence_what_it_has_done(undisturbed: Path) -> None:
    folder = undisturbed / "consolidated" / "step_000012"
    reason = f"all 12 steps are done, the weights are in {folder}"
    assert status_of(undisturbed)["reason"] == reason


@pytest.mark.usefixtures("one_rank")
def test_what_may_change_takes_effect_at_every_stage(data_dir: Path, tmp_path: Path) -> None:
    """DeepSpeed's checkpoints bring lr, betas and clipping back; stage 0 clips in our own code."""
    curves = []
    for stage in range(4):
        config, run_dir = write_ds_config(tmp_path, stage, "fp32"), tmp_path / f"run{stage}"
        command = [*arguments(data_dir, run_dir), "--ds_config", str(config)]
        assert main([*command, "--max_steps", "5"]) == 0
        changed = ["--lr", "5e-3", "--grad_clip", "1e-3", "--beta1", "0.8", "--eps", "1e-3"]
        assert main([*command, "--max_steps", "10", *changed]) == 0
        curves.append(losses(run_dir))
    for curve in curves[1:]:
        assert curve == pytest.approx(curves[0], abs=1e-5)


@pytest.mark.usefixtures("one_rank")
def test_stages_may_change_between_steps(data_dir: Path, tmp_path: Path) -> None:
    def command(run_dir: Path, stage: int, steps: int) -> list[str]:
        config = write_ds_config(tmp_path, stage, "fp32")
        return [*arguments(data_dir, run_dir, "--max_steps", steps), "--ds_config", str(config)]

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(command(whole, 1, 15)) == 0
    for i, stage in enumerate((1, 3, 0, 2, 1)):
        assert main(command(parts, stage, 3 * i + 3)) == 0
    assert losses(parts) == pytest.approx(losses(whole), abs=1e-5)


def test_torchrun_restarts_a_run_that_lost_a_rank_not_one_that_was_stopped(
    data_dir: Path, tmp_path: Path
) -> None:
    run_dir, log = tmp_path / "run", tmp_path / "log"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "--max-restarts",
        "3",
        "train.py",
    ]
    command += arguments(data_dir, run_dir, "--max_steps", 100_000, "--eval_every", 100_000)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with log.open("w") as file:
        agent = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file)
    try:
        when(
            lambda: "step     7 | loss" in log.read_text(),
            lambda: os.kill(max(children_of(agent.pid)), signal.SIGKILL),
        ).join()
        when(
            lambda: log.read_text().count("step     7 | loss") == 2, (run_dir / "STOP").touch
        ).join()
        assert agent.wait(60) == 0, log.read_text()
    finally:
        agent.kill()
        agent.wait()
    said = log.read_text()
    assert said.count("step     6 | loss") == 2
    assert said.count("step     4 | loss") == 1
    status = status_of(run_dir)
    assert (status["status"], status["exit_status"]) == ("preempted", 75)
    (newest,) = complete_steps(run_dir / "checkpoints")[-1:]
    assert len(losses(run_dir)) == step_of(newest) < 100_000


def children_of(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("can't allocate memory")]
)
def test_out_of_memory_names_the_flag_and_the_plan(
    data_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
) -> None:
    def fail(*args: object, **options: object) -> torch.Tensor:
        raise error

    monkeypatch.setattr(model.gpt, "linear_cross_entropy", fail)
    assert main(arguments(data_dir, tmp_path / "run", "--eval_every", 100)) == 1
    err = capsys.readouterr().err
    assert re.search(
        r"error: rank 0: out of memory at --micro_batch_size \d+: the plan says "
        r"\d+\.\d GiB of \d+\.\d. Fix: give a smaller one",
        err,
    )
