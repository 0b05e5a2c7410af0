import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from errors import BadInput
from training.config import TrainConfig, resolve_batch, resolve_train_config
from training.ds_config import load_ds_config, precision, resolve_ds_config, zero_stage
from training.ds_keys import DERIVED_KEYS

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


@pytest.mark.parametrize("key", sorted(DERIVED_KEYS))
def test_what_the_run_owns_may_be_auto_or_the_runs_own_value(tmp_path: Path, key: str) -> None:
    own = {
        "train_batch_size": 512,
        "train_micro_batch_size_per_gpu": 16,
        "gradient_accumulation_steps": 4,
        "gradient_clipping": 0.5,
        "steps_per_print": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "betas": [0.9, 0.95], "eps": "auto"}},
        "scheduler": {"type": "WarmupDecayLR", "params": {"warmup_max_lr": 1e-3}},
    }[key]
    autos = {"type": "AdamW", "params": dict.fromkeys(("lr", "betas", "weight_decay"), "auto")}
    for given in ("auto", own, autos if key == "optimizer" else "auto"):
        raw = load_ds_config(write(tmp_path, json.dumps(shipped(1) | {key: given})))
        assert resolve(raw) == resolve(shipped(1))
    for other in (7, {"params": {"lr": 7, "warmup_max_lr": 7}}):
        with pytest.raises(ValueError, match=rf"x?{key}.* is .*7.*, but belongs to --.*\. Fix: "):
            resolve(shipped(1) | {key: other})


def shipped(stage: int) -> dict[str, Any]:
    return load_ds_config(SHIPPED[stage])


# As Hugging Face's documentation shows them for its Trainer, with fp16 and bf16 both "auto".
HUGGING_FACE: dict[str, Any] = {
    "fp16": {"enabled": "auto", "loss_scale": 0, "initial_scale_power": 16},
    "bf16": {"enabled": "auto"},
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
    },
    "scheduler": {
        "type": "WarmupLR",
        "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"},
    },
    "zero_optimization": {
        "stage": 3,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "sub_group_size": 1e9,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_max_live_parameters": 1e9,
        "stage3_max_reuse_distance": 1e9,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
    "zero_allow_untested_optimizer": True,
    "tensorboard": {"enabled": False, "output_path": "x"},
    "prescale_gradients": False,
}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_hugging_faces_ds_config_is_taken(stage: int) -> None:
    zero = HUGGING_FACE["zero_optimization"] | {"stage": stage}
    found = resolve_ds_config(
        HUGGING_FACE | {"zero_optimization": zero}, CONFIG, resolve_batch(CONFIG, 8)
    )
    assert precision(found.ds_config) == "bf16"
    assert {"fp16", "scheduler"} <= set(found.ignored)
    assert not {"fp16", "scheduler", "tensorboard"} & set(found.ds_config)
    assert '"auto"' not in json.dumps(found.ds_config)


def test_all_that_is_wrong_is_said_at_once() -> None:
    zero = {"stage": 3, "mics_shard_size": 8, "overlap_com": True, "stage3_max_reuse_distance": "x"}
    raw = HUGGING_FACE | {
        "fp16": {"enabled": True},
        "zero_optimization": zero,
        "gradient_clipping": 1.0,
        "train_batch_size": 8,
        "optimizer": {"type": "Lion", "params": {"lr": 3e-5, "betas": "auto"}},
        "steps_per_print": 2000,
        "elasticity": {"enabled": True},
        "zero_optimisation": {},
    }
    with pytest.raises(BadInput) as caught:
        resolve(raw)
    lines = str(caught.value).split("\nerror: ")
    expected = (
        "fp16.enabled: fp16 is not supported",
        "mics_shard_size: DeepSpeed has removed it",
        "unknown key 'zero_optimization.overlap_com'",
        "stage3_max_reuse_distance: must be a number of elements",
        "gradient_clipping: is 1.0, but belongs to --grad_clip (here 0.5)",
        "train_batch_size: is 8, but belongs to --batch_tokens (here 512)",
        "optimizer.type: is 'Lion', but belongs to",
        "optimizer.params.lr: is 3e-05, but belongs to --lr",
        "steps_per_print: is 2000, but belongs to --log_every (here 1)",
        "elasticity: DeepSpeed has removed it",
        "unknown key 'zero_optimisation'. Fix: did you mean 'zero_optimization'",
    )
    for what in expected:
        assert sum(what in line for line in lines) == 1, (what, lines)
    assert len(lines) == len(expected)
    assert all(". Fix: " in line for line in lines)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"zero_optimisation": {"stage": 2}}', "did you mean 'zero_optimization'"),
        ('{"bf61": {"enabled": true}}', "did you mean 'bf16'"),
        ('{"elasticity": {"enabled": true}}', "elasticity: DeepSpeed has removed it"),
        ('{"wandb": {"enabled": true, "project": "x"}}', "wandb: not supported. Fix: .*wandb sync"),
        ('{"bf16": {"enabled": true}, "bf16": {}}', "duplicate key 'bf16'"),
        ('{"zero_optimization": {"stage": 1, "stage": 2}}', "duplicate key 'stage'"),
        ('{"zero_optimization": null}', "zero_optimization: must be an object, got None"),
        ('{"bf16": true}', "bf16: must be an object, got True"),
        ('{"bf16": {"enabled": "yes"}}', r"bf16\.enabled: must be true or false, got 'yes'"),
        ("[1]", "is a list, expected a JSON object"),
        ("{", "is not JSON"),
    ],
)
def test_mistakes_in_the_file_are_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve(load_ds_config(write(tmp_path, text)))


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
