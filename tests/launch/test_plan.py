"""launch/plan.py as people run it, and what train.py says when a run does not fit."""

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from launch.plan import main, next_batch
from launch.planning import speed
from launch.planning.estimate import (
    SPEED_TIE,
    Candidate,
    Cluster,
    estimate,
    rank_candidates,
    shipped_candidates,
)
from launch.planning.fitting import advice, device_bytes, found_cluster
from train import main as train
from training.config import parse_flags, resolve_batch, resolve_train_config
from training.devices import DEVICES, GIB, flops_of, get_device, machine_bytes
from training.ds_config import load_ds_config
from training.ranks import Ranks
from training.run import resolve_run

ROOT = Path(__file__).resolve().parents[2]
OF_175B = ["--model", "gpt3-175b", "--json"]


def timed_run(*arguments: str) -> tuple[subprocess.CompletedProcess[str], float]:
    command = [sys.executable, "-X", "importtime", "launch/plan.py", *arguments]
    started = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    return done, time.perf_counter() - started


@pytest.mark.parametrize(
    "where",
    [
        ["--nodes", "128", "--batch_tokens", "4194304"],
        ["--nodes", "8", "--device", "h200"],
    ],
)
def test_175b_is_planned_in_a_second_without_torch(where: list[str]) -> None:
    done, seconds = min((timed_run(*OF_175B, *where) for _ in range(3)), key=lambda r: r[1])
    assert seconds < 1
    assert " torch\n" not in done.stderr
    plan = json.loads(done.stdout)
    assert done.returncode == 0
    assert plan["fits"]
    assert plan["ds_config"].startswith("zero3.json")
    assert plan["seconds"].keys() >= {"matrix products", "communication"}


def test_a_batch_that_does_not_divide_is_refused_with_the_nearest(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([*OF_175B, "--nodes", "128"]) == 2
    assert (
        "1536 sequences do not divide among 1024 ranks. Fix: --batch_tokens 2097152 or 4194304"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--device", "tpu"], "--device tpu: unknown. Fix: choose from a100-40, a100"),
        (["--model", "gpt5"], "--model gpt5: unknown"),
        (["--ds_config", "none.json"], "--ds_config none.json: no such file"),
        (
            ["--gpus", "9"],
            "--gpus 9: not whole machines of --gpus_per_node 8. Fix: give a multiple",
        ),
        (["--nodes", "0"], "--nodes 0: out of range. Fix: give one above 0"),
        (["--price_per_gpu_hour", "-3"], "--price_per_gpu_hour -3: out of range. Fix: "),
        (["--price_per_gpu_hour", "inf"], "--price_per_gpu_hour inf: out of range. Fix: "),
        (["--gpus", "8", "--nodes", "1"], "--nodes 1: a table has numbers of devices. Fix: "),
        (
            ["--model", "all", "--n_layer", "4"],
            "--n_layer: --model all has the presets' shapes. Fix: ",
        ),
        (["--gpus", "8", "--gpus_per_node", "0"], "--gpus_per_node 0: out of range. Fix: "),
        (["--batch_tokens", str(2**51)], f"--batch_tokens {2**51}: out of range. Fix: "),
        (
            ["--gpus", "8,1024", "--batch_tokens", "524288"],
            "gpt2 on 1024: --batch_tokens 524288: 512 sequences do not divide among 1024 ranks",
        ),
        (["--n_head", "7"], "--n_head 7: n_embd = 768 is not a multiple of n_head = 7. Fix: "),
    ],
)
def test_bad_input_gets_one_line(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert err.startswith(f"error: {words}")
    assert err.count("\n") == 1
    assert not out


@pytest.mark.parametrize("numbers", ["8,x", ""])
def test_a_list_without_numbers_gets_one_line(
    numbers: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--gpus", numbers])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: argument --gpus: invalid number_list value: {numbers!r}. Fix")


def test_what_does_not_fit_ends_with_1_and_says_by_how_much(
    capsys: pytest.CaptureFixture[str],
) -> None:
    large = ["--model", "gpt3-13b", "--ds_config", str(ROOT / "ds_configs" / "zero0.json")]
    assert main(large) == 1
    assert "does not fit by " in capsys.readouterr().out
    assert main([*large[:2], "--device", "4090", "--gpus_per_node", "1"]) == 1
    assert "none of ds_configs/ fits" in capsys.readouterr().out


def test_a_table_in_which_nothing_fits_ends_with_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", "gpt3-175b", "--gpus", "8,64"]) == 0
    assert main(["--model", "gpt3-175b", "--gpus", "8"]) == 1
    assert "none fits: lacks " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("asked", "n_ranks"),
    [
        (["--model", "gpt3-13b", "--nodes", "4"], 32),
        (["--model", "gpt2", "--nodes", "1", "--max_steps", "100", "--seq_len", "512"], 8),
        (["--model", "gpt3-175b", "--nodes", "128", "--batch_tokens", "4194304"], 1024),
    ],
)
def test_the_flags_of_a_plan_are_the_run_that_it_is(
    asked: list[str],
    n_ranks: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert main([*asked, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    main(asked)
    (line,) = [s for s in capsys.readouterr().out.splitlines() if s.startswith("flags ")]
    flags, _, copy = line.removeprefix("flags ").partition("; ")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ds_configs").symlink_to(ROOT / "ds_configs")
    if copy:
        name, _, rest = copy.partition(" is ")
        path, _, more = rest.partition(" with ")
        Path(name).write_text(json.dumps(load_ds_config(Path(path)) | json.loads(f"{{{more}}}")))
    run = resolve_run(parse_flags(flags.split(), ""), Ranks(0, 0, n_ranks, 8))
    assert asdict(run.batch) == plan["batch"]
    assert run.config.max_steps == plan["max_steps"]
    assert ("activation_checkpointing" in run.ds_config) == bool(copy)
    assert plan["ds_config"].partition(" ")[0] == run.config.ds_config.name.removeprefix("my_")


@pytest.mark.parametrize("where", [[], ["--device", "cpu", "--model", "gpt2"]])
def test_json_has_the_cost_and_parts_that_add_up(
    where: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    offload = ["--ds_config", str(ROOT / "ds_configs" / "zero3_offload.json")]
    main(["--model", "gpt3-13b", "--json", "--price_per_gpu_hour", "2.5", *offload, *where])
    plan = json.loads(capsys.readouterr().out)
    assert sum(plan["parts_bytes"].values()) == pytest.approx(plan["peak_bytes"])
    assert plan["cost"] == pytest.approx(2.5 * 24 * plan["days"] * plan["devices"])


def test_a_batch_beyond_all_reason_is_planned_too() -> None:
    started = time.perf_counter()
    zero1 = str(ROOT / "ds_configs" / "zero1.json")
    assert main(["--batch_tokens", str(2**50), "--ds_config", zero1]) == 0
    assert time.perf_counter() - started < 5


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_collective_waits_for_a_ring(stage: int) -> None:
    config = resolve_train_config(model="gpt2", batch_tokens=1024 * 1024)
    raw = load_ds_config(ROOT / "ds_configs" / f"zero{stage}.json")
    step = estimate(config, Candidate(raw), Cluster(get_device("h100"), 128, 8))
    ring_s = speed.HOP_S * 1023  # at least one all-reduce, or a gather of each of 12 blocks
    assert step.seconds["communication"] > (12 if stage == 3 else 2) * ring_s


def test_a_shape_of_ones_own_is_planned(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--n_layer", "24", "--n_head", "16", "--n_embd", "1024", "--json"]) == 0
    own = json.loads(capsys.readouterr().out)
    assert main(["--model", "gpt2-medium", "--json"]) == 0
    assert own | {"model": ""} == json.loads(capsys.readouterr().out) | {"model": ""}


def test_the_table_has_a_row_for_each_model_and_number(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", "all", "--gpus", "8,1024"]) == 0
    rows = capsys.readouterr().out.splitlines()[2:]
    assert len(rows) == 2 * 12
    assert any("gpt3-175b | 8 |" in row and "none fits" in row for row in rows)


@pytest.mark.parametrize("n_devices", [1, 3, 8, 12, 48, 72, 1024])
def test_a_batch_is_taken_up_to_one_that_many_devices_share(n_devices: int) -> None:
    config = resolve_train_config(model="gpt2")  # 512 sequences
    batch_tokens = next_batch(config, n_devices)
    assert batch_tokens % (n_devices * config.seq_len) == 0
    assert 1 <= batch_tokens / config.batch_tokens <= max(1.25, 2 * n_devices / 512)
    split = resolve_batch(replace(config, batch_tokens=batch_tokens), n_devices)
    assert split.micro_batch_size >= min(8, 256 // n_devices)


def test_the_table_is_of_the_ds_config_that_is_given(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--gpus", "8,64", "--ds_config", str(ROOT / "ds_configs" / "zero3.json")]
    assert main([*given, "--price_per_gpu_hour", "2"]) == 0
    header, _, *rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()]
    assert [row[3] for row in rows] == ["zero3.json"] * 2
    assert header[-1] == "cost |"
    for row in rows:
        assert float(row[-1][:-2]) == pytest.approx(2 * float(row[-2]), abs=2)
    assert main([*given, "--json"]) == 0
    plans = json.loads(capsys.readouterr().out)
    assert [(p["devices"], p["ds_config"]) for p in plans] == [
        (8, "zero3.json"),
        (64, "zero3.json"),
    ]


def test_the_cheapest_fits_and_hardly_one_that_fits_is_faster() -> None:
    cluster = Cluster(get_device("h100"), 4, 8)
    config = resolve_train_config(model="gpt3-13b")
    best, *others = rank_candidates(config, shipped_candidates(), cluster)
    assert best.fits
    in_memory = [e for e in others if e.fits and not e.host_bytes]
    assert in_memory
    assert best.tokens_per_s * (1 + SPEED_TIE) >= max(e.tokens_per_s for e in in_memory)
    assert best.mfu < 1


@pytest.mark.parametrize(
    ("gib", "remedy"),
    [
        (80, None),
        (24, "--micro_batch_size 8"),
        (9, "--micro_batch_size 1"),
        (8, '--micro_batch_size 2, add "activation_checkpointing": {} to zero1.json'),
        (7, "--ds_config ds_configs/zero2.json, --micro_batch_size 1"),
        (5, "--ds_config ds_configs/zero3_offload.json, --micro_batch_size 1"),
        (3, "take more devices: no ds_config fits"),
    ],
)
def test_advice_names_the_nearest_that_fits(gib: float, remedy: str | None) -> None:
    fields = {"model": "gpt2-large", "micro_batch_size": 16, "ds_config": Path("zero1.json")}
    config = resolve_train_config(**fields)
    cluster = Cluster(replace(DEVICES["h100"], memory_bytes=int(gib * GIB)), 1, 8)
    raw = load_ds_config(ROOT / "ds_configs" / "zero1.json")
    planned = estimate(config, Candidate(raw, "zero1.json"), cluster)
    found = advice(planned)
    assert (found is None) == planned.fits
    assert (found.remedy if found else None) == remedy


@pytest.mark.usefixtures("one_rank")
def test_train_warns_in_one_line_when_the_run_cannot_fit(
    data_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("launch.planning.fitting.machine_bytes", lambda: GIB)
    arguments = ["--model", "debug", "--data_dir", str(data_dir), "--run_dir", str(tmp_path / "r")]
    arguments += ["--max_steps", "1", "--eval_tokens", "64", "--sample_tokens", "1"]
    assert train(arguments) == 0
    lines = [s for s in capfd.readouterr().err.splitlines() if s.startswith("warning: this run")]
    assert len(lines) == 1
    assert "GiB on each device of 1.0 (launch/plan.py). Fix: " in lines[0]


def test_advice_counts_the_memory_of_the_machine_too() -> None:
    config = resolve_train_config(model="gpt3-6.7b", micro_batch_size=1)
    raw = load_ds_config(ROOT / "ds_configs" / "zero3_offload.json")
    small = replace(DEVICES["4090"], host_bytes=64 * GIB)
    line = str(advice(estimate(config, Candidate(raw), Cluster(small, 1, 1))))
    assert "GiB of the machine's memory for each device, which has 64.0 " in line
    large = replace(small, host_bytes=256 * GIB)
    assert advice(estimate(config, Candidate(raw), Cluster(large, 1, 1))) is None


def test_found_machines_are_those_of_the_ranks() -> None:
    cpu, ranks = torch.device("cpu"), Ranks(0, 0, 8, 4)
    cluster = found_cluster(cpu, ranks, device_bytes(cpu, ranks))
    assert (cluster.nodes, cluster.gpus_per_node) == (2, 4)
    uneven = found_cluster(cpu, Ranks(0, 0, 6, 4), 8 * GIB)
    assert uneven.world_size == 6  # 4 and 2
    assert 4 * cluster.device.memory_bytes <= os.sysconf("SC_PAGE_SIZE") * os.sysconf(
        "SC_PHYS_PAGES"
    )


@pytest.mark.parametrize(
    ("listed", "limit"),
    [
        ("0::/slice/job_5/task_0", "slice/job_5/memory.max"),
        ("1:name=systemd:/slice/job_5\n7:cpu:/a\n8:memory:/a/b", "memory/a/memory.limit_in_bytes"),
    ],
)
def test_a_limit_of_a_control_group_is_the_memory_of_the_machine(
    listed: str, limit: str, tmp_path: Path
) -> None:
    (tmp_path / "groups").write_text(f"{listed}\n")
    assert machine_bytes(tmp_path / "groups", tmp_path) == machine_bytes(tmp_path / "none")
    (tmp_path / limit).parent.mkdir(parents=True)
    (tmp_path / limit).write_text("1048576\n")
    (tmp_path / "slice/job_5/task_0").mkdir(parents=True)
    (tmp_path / "slice/job_5/task_0/memory.max").write_text("max\n")
    if "systemd" in listed:  # no limit of ours
        (tmp_path / "slice/job_5/memory.max").write_text("4096\n")
    assert machine_bytes(tmp_path / "groups", tmp_path) == 2**20


def test_peaks_are_found_by_the_names_that_devices_give_themselves() -> None:
    names = {
        "NVIDIA H100 80GB HBM3": 989e12,
        "NVIDIA H100 PCIe": 756e12,
        "NVIDIA H200": 989e12,
        "NVIDIA A100-SXM4-80GB": 312e12,
        "NVIDIA GeForce RTX 4090": 165e12,
        "AMD Instinct MI300X": 1307e12,
        "Tesla T4": None,
    }
    assert {name: flops_of(name) for name in names} == names
