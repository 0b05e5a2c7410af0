"""Every key of a ds_config acts, is named as ignored or unverified, or is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.offload_config import (
    DeepSpeedZeroOffloadOptimizerConfig,
    DeepSpeedZeroOffloadParamConfig,
)

from bench.fidelity import nvme
from bench.fidelity.keys import COLUMNS, find_cells, read_table
from errors import Complaints
from train import main
from training.config import resolve_batch, resolve_train_config
from training.ds_config import load_ds_config, resolve_ds_config, review_ds_config
from training.ds_keys import BF16, FP16, KEYS, Review

ROOT = Path(__file__).resolve().parents[2]
CONFIG = resolve_train_config(model="debug")
ZERO = {
    key.removeprefix("zero_optimization."): row
    for key, row in KEYS.items()
    if key.startswith("zero_optimization.")
}
# Of an offload to NVMe, described below the table; those of the optimizer's are ignored.
NVME = {key for key, row in ZERO.items() if row.acts_at == "n"}
for name in ("nvme_path", "buffer_count", "pipeline_read", "pipeline_write", "fast_init"):
    NVME.add(f"offload_optimizer.{name}")


def shipped(stage: int) -> dict[str, Any]:
    return json.loads((ROOT / "ds_configs" / f"zero{stage}.json").read_text(encoding="utf-8"))


def review(stage: int, zero: dict[str, Any], **more: Any) -> Review:
    raw = shipped(stage) | more
    raw["zero_optimization"] = raw["zero_optimization"] | zero
    complaints = Complaints()
    found = review_ds_config(raw, "x.json", complaints)
    complaints.raise_all()
    return found


def fields(model: Any, prefix: str = "") -> set[str]:
    return {prefix + (field.alias or name) for name, field in model.model_fields.items()}


def test_every_key_that_deepspeed_knows_is_in_the_table() -> None:
    known = fields(DeepSpeedZeroConfig) - {"offload_optimizer", "offload_param"}
    known |= fields(DeepSpeedZeroOffloadOptimizerConfig, "offload_optimizer.")
    known |= fields(DeepSpeedZeroOffloadParamConfig, "offload_param.")
    removed = {key for key, row in ZERO.items() if row.why == "DeepSpeed has removed it"}
    assert known == set(ZERO) - (removed - {"legacy_stage1"})


def test_the_table_of_the_readme_says_what_the_program_does() -> None:
    states = {key: row for key, (_, row) in read_table().items()}
    for key, row in states.items():
        for column in COLUMNS:
            acts = column in ZERO[key].acts_at
            said = row[column]
            if not (key.startswith("offload_optimizer") and column == "b"):  # no such case
                assert said == (ZERO[key].state if acts else "ignored"), (key, column)
    text = (ROOT / "ds_configs" / "README.md").read_text(encoding="utf-8")
    for key, row in ZERO.items():
        assert f"`{key}" in text or f"`{key.rpartition('.')[2]}`" in text, key
        is_told_elsewhere = row.state in ("refused", "unverified") or key in ("stage", *NVME)
        assert key in states or is_told_elsewhere, key
    for key, (values, row) in read_table().items():
        assert ("verified" in row.values()) == bool(values), key


def test_whatever_is_verified_is_tried() -> None:
    tried = {(cell.key, cell.stage) for cell in find_cells()}
    for key, row in ZERO.items():
        if row.state == "verified" and row.acts_at != "n" and key != "stage":
            stages = {int(letter.replace("b", "1")) for letter in row.acts_at}
            assert {(key, stage) for stage in stages} <= tried


def test_whatever_is_verified_of_nvme_is_tried() -> None:
    tried = {f"zero_optimization.offload_param.{key}" for key in (*nvme.ON_NVME, "nvme_path")}
    tried |= {f"aio.{key}" for key in nvme.AIO}
    of_nvme = {key for key, row in KEYS.items() if row.state == "verified" and row.acts_at == "n"}
    assert of_nvme == tried - {"zero_optimization.offload_param.device"}


REFUSED = [
    ("elastic_checkpoint", True),
    ("load_from_fp32_weights", False),
    ("override_module_apply", False),
    ("compute_grad_norm", False),
    ("stage3_module_granularity_threshold", 1000),
    ("zenflow", {"topk_ratio": 0.1}),
    ("legacy_stage1", True),
    ("mics_shard_size", 8),
    ("mics_hierarchical_params_gather", True),
    ("cpu_offload", True),
    ("cpu_offload_param", True),
    ("cpu_offload_use_pin_memory", True),
    ("offload_optimizer", {"device": "nvme", "nvme_path": "/tmp"}),
]


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize(("key", "value"), REFUSED)
def test_what_makes_wrong_numbers_or_lost_checkpoints_is_refused(
    stage: int, key: str, value: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = shipped(stage)
    raw["zero_optimization"][key] = value
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(raw), encoding="utf-8")
    assert main(["--model", "debug", "--ds_config", str(path), "--dry_run"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: --ds_config {path}: zero_optimization.{key}")
    assert ". Fix: " in line


@pytest.mark.parametrize("key", ["zero_quantized_weights", "zero_quantized_gradients"])
def test_what_needs_a_gpu_is_refused_before_a_run_without_one_starts(
    key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = shipped(3)
    raw["zero_optimization"][key] = True
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(raw), encoding="utf-8")
    run_dir = tmp_path / "run"
    assert main(["--model", "debug", "--ds_config", str(path), "--run_dir", str(run_dir)]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"zero_optimization.{key}: needs a GPU. Fix: remove it" in line
    assert not run_dir.exists()


def test_every_refused_key_is_tried() -> None:
    refused = {key for key, row in ZERO.items() if row.state == "refused"}
    assert refused == {key for key, _ in REFUSED} - {"offload_optimizer"}


@pytest.mark.parametrize("key", [key for key, row in KEYS.items() if row.default])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_what_happens_anyway_needs_no_word(key: str, stage: int) -> None:
    raw = shipped(stage)
    *blocks, name = key.split(".")
    block = raw
    for part in blocks:
        block = block.setdefault(part, {"device": "cpu"} if "offload" in part else {})
    block[name] = json.loads(KEYS[key].default)
    found = review_ds_config(raw, "x.json", Complaints())
    assert key not in (*found.ignored, *found.unverified)


def test_keys_that_do_nothing_are_named_and_taken_out() -> None:
    found = review(
        2,
        {
            "offload_param": {"device": "cpu", "pin_memory": True},
            "stage3_max_live_parameters": 1e9,
            "allgather_partitions": False,
            "stage3_gather_16bit_weights_on_model_save": True,
        },
        comms_logger={"enabled": True, "verbose": False},
        wall_clock_breakdown=True,
        aio={"block_size": 1048576, "thread_count": 1},
    )
    zero = "zero_optimization."
    assert set(found.ignored) == {
        f"{zero}offload_param.device",
        f"{zero}stage3_max_live_parameters",
        f"{zero}allgather_partitions",
        f"{zero}stage3_gather_16bit_weights_on_model_save",
        "comms_logger.enabled",
        "wall_clock_breakdown",
        "aio.block_size",
        "aio.thread_count",
    }
    kept = found.ds_config
    assert kept["zero_optimization"] == shipped(2)["zero_optimization"] | {
        "offload_param": {"pin_memory": True}
    }
    assert "comms_logger" not in kept
    (line,) = found.remarks("--ds_config x.json")
    assert line.startswith("--ds_config x.json: no effect here: zero_opt")


def test_a_block_without_its_switch_is_named() -> None:
    given = {"bf16": {}, "flops_profiler": {"detailed": True}, "torch_autocast": {"enabled": False}}
    found = review(1, {"offload_optimizer": {"pin_memory": True}, "offload_param": None}, **given)
    assert found.ignored == ["bf16", "flops_profiler", "zero_optimization.offload_optimizer"]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_optimizers_that_read_fewer_keys_are_known(stage: int) -> None:
    asked = {"overlap_comm": True, "contiguous_gradients": False, "reduce_scatter": False}
    names = {f"zero_optimization.{key}" for key in asked}
    assert set(review(stage, asked).ignored) == (names if stage == 1 else set())
    fp32 = {"bf16": {"enabled": False}, "communication_data_type": "bf16"}
    assert review(stage, asked, **fp32).ignored == []
    both = review(stage, {}, communication_data_type="bf16", bf16={"enabled": True}).ignored
    assert both == (["communication_data_type"] if stage == 1 else [])
    assert review(stage, {}, bf16={"enabled": True, "immediate_grad_update": True}).ignored == (
        [] if stage == 1 else ["bf16.immediate_grad_update"]
    )


def test_keys_without_a_test_are_named_and_remembered() -> None:
    found = review(3, {"zero_hpz_partition_size": 8, "sub_group_size": 1e9})
    assert found.unverified == ["zero_optimization.zero_hpz_partition_size"]
    (line,) = found.remarks("x.json")
    assert line.startswith("x.json: never verified here: zero_optimization.z")


@pytest.mark.parametrize(
    ("block", "kept", "ignored"),
    [
        ({}, {}, []),
        ({"enabled": True}, {}, []),
        ({"partition_activations": True}, {}, ["partition_activations"]),
        (
            {"cpu_checkpointing": True, "number_checkpoints": 4},
            {},
            ["cpu_checkpointing", "number_checkpoints"],
        ),
        ({"partition_activations": False, "cpu_checkpointing": False}, None, []),
        ({"enabled": False}, None, []),
        ({"number_checkpoints": None, "profile": False}, None, []),
    ],
)
def test_activation_checkpointing_is_on_unless_all_of_it_is_off(
    block: dict[str, Any], kept: dict[str, Any] | None, ignored: list[str]
) -> None:
    found = review(1, {}, activation_checkpointing=block)
    assert found.ds_config.get("activation_checkpointing") == kept
    assert found.ignored == [f"activation_checkpointing.{key}" for key in ignored]


@pytest.mark.parametrize(
    ("block", "near"),
    [
        ({"data_types": {"grad_acum_dtype": "fp32"}}, "data_types.grad_accum_dtype"),
        ({"torch_autocast": {"enabled": True, "dtyp": "bf16"}}, "torch_autocast.dtype"),
        (
            {"activation_checkpointing": {"partitioned_activations": True}},
            "activation_checkpointing.partition_activations",
        ),
        ({"flops_profiler": {"profile_steps": 3}}, "flops_profiler.profile_step"),
        (
            {"zero_optimization": {"stage": 1, "overlap_com": True}},
            "zero_optimization.overlap_comm",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu", "pin": True}}},
            "zero_optimization.offload_param.pin_memory",
        ),
        ({"bf16": {"enabled": True, "imediate_grad_update": True}}, "bf16.immediate_grad_update"),
        ({"flops_profiler": True}, "flops_profiler.enabled"),
        ({"timers": {"thruput": {"enabled": True}}}, "timers.throughput"),
    ],
)
def test_a_misspelt_key_is_refused(block: dict[str, Any], near: str) -> None:
    with pytest.raises(ValueError, match=rf"unknown key .* Fix: did you mean '{near}'"):
        review(1, {}, **block)


@pytest.mark.parametrize(
    "asked",
    [
        {"fp16": {"enabled": True}},
        {"fp16": {"enabled": True, "loss_scale": 0}, "bf16": {"enabled": False}},
        {"fp16": True},
        *({"torch_autocast": {"enabled": True, "dtype": name}} for name in FP16),
        *({"data_types": {"grad_accum_dtype": name}} for name in FP16),
        {"data_types": {"param_dtype": "fp16"}},
        {"communication_data_type": "fp16"},
        {"communication_data_type": "FP16"},
        {"data_types": {"grad_accum_dtype": "Torch.Half"}},
        {"torch_autocast": {"enabled": True, "dtype": "Float16"}},
        {"amp": {"enabled": True, "opt_level": "O1"}},
    ],
    ids=json.dumps,
)
def test_fp16_is_refused_by_name_in_every_form(tmp_path: Path, asked: dict[str, Any]) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}} | asked), encoding="utf-8")
    with pytest.raises(ValueError, match=r"fp16 is not supported. Fix: use bf16 .*fp32") as error:
        resolve_ds_config(load_ds_config(path), CONFIG, resolve_batch(CONFIG, 1))
    assert "did you mean" not in str(error.value)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    "off",
    [
        {"fp16": {"enabled": False, "loss_scale": 0}},
        {"fp16": {"enabled": "auto"}},
        {"fp16": {}},
        {"fp16": "auto"},
        {"fp16": False},
        {"amp": {"enabled": "auto"}},
        {"torch_autocast": {"enabled": False, "dtype": "float16"}},
    ],
    ids=json.dumps,
)
def test_fp16_that_is_off_is_no_fp16(tmp_path: Path, off: dict[str, Any]) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(shipped(2) | off), encoding="utf-8")
    resolved = resolve_ds_config(load_ds_config(path), CONFIG, resolve_batch(CONFIG, 1)).ds_config
    assert not {"fp16", "amp"} & set(resolved)


@pytest.mark.parametrize("dtype", [None, *BF16])
def test_autocast_means_bf16(dtype: str | None) -> None:
    block = {"enabled": True} | ({"dtype": dtype} if dtype else {})
    raw = {"zero_optimization": {"stage": 0}, "torch_autocast": block}
    resolved = resolve_ds_config(raw, CONFIG, resolve_batch(CONFIG, 1)).ds_config
    assert resolved["torch_autocast"]["dtype"] in BF16
    raw["torch_autocast"] = {"enabled": True, "dtype": "fp32"}
    with pytest.raises(
        ValueError, match=r"torch_autocast.dtype: must be bfloat16, got 'fp32'. Fix: set"
    ):
        resolve_ds_config(raw, CONFIG, resolve_batch(CONFIG, 1))


def test_a_step_that_is_not_finite_cannot_be_let_through() -> None:
    with pytest.raises(ValueError, match=r"bf16.check_grad_overflow: a step whose gradient"):
        review(2, {}, bf16={"enabled": True, "check_grad_overflow": False})
