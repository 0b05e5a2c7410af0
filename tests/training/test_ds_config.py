import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from training.config import TrainConfig, resolve_batch, resolve_train_config
from training.ds_config import load_ds_config, precision, resolve_ds_config, zero_stage

SHIPPED = sorted((Path(__file__).resolve().parents[2] / "ds_configs").glob("*.json"))
CONFIG = resolve_train_config(model="gpt2", lr=1e-3, grad_clip=0.5)


def resolve(raw: dict[str, Any], config: TrainConfig = CONFIG) -> dict[str, Any]:
    return resolve_ds_config(raw, config, resolve_batch(config, 8)).ds_config


def write(folder: Path, text: str) -> Path:
    (folder / "ds.json").write_text(text)
    return folder / "ds.json"


def test_compile_is_refused_at_stage_3() -> None:
    with pytest.raises(ValueError, match=r"--compile: .*\. Fix: use stage 0, 1 or 2"):
        resolve({"zero_optimization": {"stage": 3}}, replace(CONFIG, compile="true"))


def test_five_configs_are_shipped_each_short() -> None:
    names = [path.stem for path in SHIPPED]
    assert names == ["zero0", "zero1", "zero2", "zero3", "zero3_offload"]
    assert all(len(path.read_text().splitlines()) < 30 for path in SHIPPED)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_shipped_configs_resolve_without_a_rest(path: Path) -> None:
    resolved = resolve(load_ds_config(path))
    assert '"auto"' not in json.dumps(resolved)
    assert resolved["train_batch_size"] == 512
    assert resolved["train_micro_batch_size_per_gpu"] == 16
    assert resolved["gradient_accumulation_steps"] == 4
    assert resolved["optimizer"]["params"]["lr"] == 1e-3
    assert resolved["timers"]["throughput"]["enabled"] is False
    if zero_stage(resolved):
        assert resolved["gradient_clipping"] == 0.5
        assert resolved["data_types"]["grad_accum_dtype"] == "fp32"
        assert resolved["communication_data_type"] == "fp32"
        assert precision(resolved) == "bf16"
    else:
        assert precision(resolved) == "autocast"


def test_buckets_grow_with_the_model_up_to_deepspeeds_own() -> None:
    raw = load_ds_config(SHIPPED[3])
    sizes = []
    for model in ("gpt2", "gpt2-xl", "gpt3-175b"):
        zero = resolve(raw, resolve_train_config(model=model))["zero_optimization"]
        sizes.append(zero["reduce_bucket_size"])
    assert sizes[0] == 4 * 12 * 768**2
    assert sizes[0] < sizes[1] < sizes[2] == 500_000_000


def test_sizes_that_deepspeed_takes_are_taken() -> None:
    zero = {
        "stage": 3,
        "reduce_bucket_size": 5e8,
        "stage3_param_persistence_threshold": 0,
        "stage3_prefetch_bucket_size": 0,
        "stage3_max_reuse_distance": 0,
    }
    assert resolve({"zero_optimization": zero})["zero_optimization"] == zero


@pytest.mark.parametrize("block", ["offload_optimizer", "offload_param"])
def test_offload_is_a_block(block: str) -> None:
    with pytest.raises(
        ValueError, match=rf"zero_optimization.{block}: must be an object, got 'cpu'"
    ):
        resolve({"zero_optimization": {"stage": 3, block: "cpu"}})


@pytest.mark.parametrize("value", ["5e8", -5, 0, 0.5, True, float("nan"), float("inf")])
def test_a_bucket_is_a_number_of_elements(value: Any) -> None:
    raw = {"zero_optimization": {"stage": 1, "reduce_bucket_size": value}}
    message = "zero_optimization.reduce_bucket_size: must be a number of elements, .*Fix: give one"
    with pytest.raises(ValueError, match=message):
        resolve(raw)


@pytest.mark.parametrize("stage", [True, 4, "1", 1.0])
def test_a_stage_is_0_to_3(stage: Any) -> None:
    with pytest.raises(ValueError, match=r"zero_optimization.stage: must be 0, 1, 2 or 3, got"):
        resolve({"zero_optimization": {"stage": stage}})


@pytest.mark.parametrize("key", ["train_batch_size", "gradient_clipping", "optimizer"])
def test_derived_keys_may_only_be_auto(tmp_path: Path, key: str) -> None:
    assert load_ds_config(write(tmp_path, f'{{"{key}": "auto"}}')) == {key: "auto"}
    with pytest.raises(ValueError, match=rf"{key} belongs to --"):
        load_ds_config(write(tmp_path, f'{{"{key}": 1}}'))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"zero_optimisation": {"stage": 2}}', "did you mean 'zero_optimization'"),
        ('{"bf61": {"enabled": true}}', "did you mean 'bf16'"),
        ('{"elasticity": {}}', "unknown key 'elasticity'"),
        ('{"bf16": {"enabled": true}, "bf16": {}}', "duplicate key 'bf16'"),
        ('{"zero_optimization": {"stage": 1, "stage": 2}}', "duplicate key 'stage'"),
        ('{"zero_optimization": null}', "zero_optimization: must be an object, got None"),
        ('{"bf16": true}', "bf16: must be an object, got True"),
        ('{"bf16": {"enabled": "auto"}}', r"bf16\.enabled: must be true or false, got 'auto'"),
        ("[1]", "is a list, expected a JSON object"),
        ("{", "is not JSON"),
    ],
)
def test_mistakes_in_the_file_are_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_ds_config(write(tmp_path, text))


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"bf16": {"enabled": True}}, "stage 0 with bf16 .*zero0.json"),
        ({"zero_optimization": {"stage": 4}}, "stage: must be 0, 1, 2 or 3, got 4"),
        ({"zero_optimization": {"stage": 1, "sub_group_size": "auto"}}, 'sub_group_size.*"auto"'),
        (
            {
                "zero_optimization": {"stage": 1},
                "bf16": {"enabled": True},
                "torch_autocast": {"enabled": True},
            },
            "exclude each other",
        ),
    ],
)
def test_what_would_train_wrongly_is_refused(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve(raw)


def test_a_missing_file_names_the_flag(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--ds_config .*nowhere\.json: no such file"):
        load_ds_config(tmp_path / "nowhere.json")
    with pytest.raises(ValueError, match=r"--ds_config .*cannot be read \(Is a directory\)"):
        load_ds_config(tmp_path)
