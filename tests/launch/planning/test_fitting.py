"""Which micro-batch is taken when nobody gave one."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from launch.planning import fitting
from launch.planning.estimate import Candidate, Cluster, estimate
from launch.planning.fitting import choose_micro_batch
from model.config import MEMORY_USES, MemoryUse
from train import main
from training.config import parse_flags, resolve_train_config
from training.devices import DEVICES, GIB
from training.ds_config import load_ds_config
from training.ranks import Ranks
from training.run import Run, resolve_run

GPU, CPU = torch.device("cuda"), torch.device("cpu")


def run_of(ranks: Ranks | None = None, **fields: object) -> Run:
    return resolve_run(fields, ranks or Ranks())


@pytest.mark.parametrize(
    ("model", "gib", "sequences"),
    [
        ("gpt2", 80, 64),  # 65,536 tokens, and no more
        ("gpt2", 16, 32),
        ("gpt2", 6, 4),
        ("gpt2-xl", 80, 16),
        ("gpt3-1.3b", 24, 1),  # nothing fits: the warning says so
    ],
)
def test_gpus_take_the_largest_that_their_memory_holds(
    model: str, gib: int, sequences: int
) -> None:
    run = run_of(model=model)
    assert choose_micro_batch(run, GPU, gib * GIB, resumes=False) == sequences


def test_a_cpu_takes_16_sequences_at_most() -> None:
    run = run_of(model="gpt2", batch_tokens=2**19)
    assert choose_micro_batch(run, CPU, 2**40, resumes=False) == run.batch.micro_batch_size == 16


@pytest.mark.parametrize(
    ("saved", "resumes", "sequences"),
    [
        ('{"micro_batch_size": 4}', True, 4),
        ('{"micro_batch_size": 4}', False, 64),
        ('{"micro_batch_size": 3}', True, 64),
        ('{"micro_batch_size"', True, 64),
        ("{}", True, 64),
        ("[]", True, 64),
    ],
)
def test_a_run_that_goes_on_keeps_what_divides(
    saved: str, resumes: bool, sequences: int, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(saved, encoding="utf-8")
    run = run_of(model="gpt2", run_dir=tmp_path)
    assert choose_micro_batch(run, GPU, 80 * GIB, resumes=resumes) == sequences


def test_a_new_micro_batch_changes_the_split_and_what_the_engine_is_told() -> None:
    run = run_of(Ranks(0, 0, 8, 8), model="gpt2")
    run.take_micro_batch(64)
    assert (run.config.micro_batch_size, run.batch.grad_accum_steps) == (64, 1)
    assert run.ds_config["train_micro_batch_size_per_gpu"] == 64
    assert run.ds_config["gradient_accumulation_steps"] == 1


@pytest.mark.parametrize(("flags", "says"), [([], True), (["--micro_batch_size", "8"], False)])
def test_dry_run_says_that_a_gpu_may_take_more(
    data_dir: Path, tmp_path: Path, flags: list[str], says: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*flags, "--data_dir", str(data_dir), "--run_dir", str(tmp_path / "run")]
    assert main(["--dry_run", "--model", "gpt2", *flags]) == 0
    assert ("16, or more where the GPU holds it" in capsys.readouterr().out) == says


@pytest.mark.parametrize(
    ("gib", "use"), [(80, MEMORY_USES[0]), (23, MEMORY_USES[1]), (20, MEMORY_USES[3])]
)
def test_the_loss_and_gelu_take_what_leaves_a_tenth_free(gib: float, use: MemoryUse) -> None:
    config = resolve_train_config(model="gpt2", micro_batch_size=64)
    raw = load_ds_config(config.ds_config)
    device = dataclasses.replace(DEVICES["h100"], memory_bytes=int(gib * GIB))
    planned = estimate(config, Candidate(raw), Cluster(device, 1, 1))
    assert planned.fits
    assert planned.share.memory_use == use


def test_ranks_take_what_rank_0_chooses_for_the_smallest(monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(Ranks(1, 1, 2, 2), model="gpt2")
    seen = []

    def gather(sizes: list[int], own: int) -> None:
        sizes[:] = [16 * GIB, own]

    def broadcast(chosen: list[int]) -> None:
        seen.append(chosen[0])
        chosen[0] = 4  # rank 0 says so

    monkeypatch.setattr(fitting, "device_bytes", lambda *_: 80 * GIB)
    monkeypatch.setattr(dist, "all_gather_object", gather)
    monkeypatch.setattr(dist, "broadcast_object_list", broadcast)
    fitting.settle_micro_batch(run, GPU, resumes=False)
    assert seen == [choose_micro_batch(run_of(run.ranks, model="gpt2"), GPU, 16 * GIB, False)]
    assert (run.batch.micro_batch_size, run.is_settled) == (4, True)
    fitting.settle_micro_batch(run, GPU, resumes=False)  # for good
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("flags", "value"),
    [
        ([], "false"),
        (["--compile"], "true"),
        (["--compile", "AUTO"], "auto"),
        (["--compile", "--model", "debug"], "true"),
    ],
)
def test_compile_alone_means_true(flags: list[str], value: str) -> None:
    assert resolve_train_config(**parse_flags(flags, "")).compile == value


@pytest.mark.usefixtures("one_rank")
def test_a_resume_keeps_the_saved_micro_batch(data_dir: Path, tmp_path: Path) -> None:
    command = ["--model", "debug", "--data_dir", str(data_dir), "--run_dir", str(tmp_path / "r")]
    command += ["--eval_tokens", "64", "--sample_tokens", "1", "--decay_steps", "2"]
    assert main([*command, "--max_steps", "1", "--micro_batch_size", "2"]) == 0
    for flags, sequences in (([], 2), (["--micro_batch_size", "4"], 4)):
        assert main([*command, "--max_steps", "2", *flags]) == 0
        saved = json.loads((tmp_path / "r" / "config.json").read_text(encoding="utf-8"))
        assert saved["micro_batch_size"] == sequences
