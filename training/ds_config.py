"""The engine's JSON and a TrainConfig -> the dict for `deepspeed.initialize`.

Each value has one owner. The JSON owns the engine; the keys that follow from the run are derived
here and may only be absent or "auto" in the file.
"""

import json
import math
from pathlib import Path
from typing import Any

from model import GPTConfig
from training.config import BatchArithmetic, TrainConfig
from training.ds_keys import (
    BF16,
    FP32,
    HALF_BLOCKS,
    KEYS,
    Review,
    refuse_fp16,
    refuse_unknown,
    review_keys,
)

ENGINE_KEYS = dict.fromkeys(key.partition(".")[0] for key in KEYS)
BLOCKS = ("zero_optimization", "bf16", "torch_autocast", "data_types", "activation_checkpointing")
OFFLOADS = ("offload_optimizer", "offload_param")
# Keys that DeepSpeed wants and the run owns, with the flag that sets each.
DERIVED_KEYS = {
    "train_batch_size": "--batch_tokens",
    "train_micro_batch_size_per_gpu": "--micro_batch_size",
    "gradient_accumulation_steps": "--batch_tokens and --micro_batch_size",
    "gradient_clipping": "--grad_clip",
    "optimizer": "--lr, --beta1, --beta2, --eps and --weight_decay",
    "steps_per_print": "--log_every",
}
MAX_REUSE = "stage3_max_reuse_distance"
MAX_BUCKET = 500_000_000  # elements: DeepSpeed's own default for reduce_bucket_size
BLOCKS_PER_BUCKET = 4


def load_ds_config(path: Path) -> dict[str, Any]:
    """Read an engine JSON and check its top-level keys.

    Raises:
        ValueError: No such file, not JSON, a duplicate key, an unknown key (with the nearest
            known one), a derived key with a value of its own, or fp16.
    """
    raw = _read_json(path)
    if not isinstance(raw, dict):
        raise ValueError(
            f"{path}: holds {type(raw).__name__}, no object. Fix: begin and end it with braces"
        )
    for key, value in raw.items():
        if key in BLOCKS and not isinstance(value, dict):
            raise ValueError(f"{path}: {key} is {value!r}, no block. Fix: put it in braces")
        if key in BLOCKS and not isinstance(value.get("enabled", True), bool):
            raise ValueError(
                f"{path}: {key}.enabled is {value['enabled']!r}, no answer. Fix: true or false"
            )
        if key in DERIVED_KEYS and value != "auto":
            raise ValueError(
                f'{path}: {key} belongs to {DERIVED_KEYS[key]}. Fix: remove it or say "auto"'
            )
        if key not in (*ENGINE_KEYS, *DERIVED_KEYS, *HALF_BLOCKS):
            refuse_unknown(str(path), key, ENGINE_KEYS)
    refuse_fp16(raw, str(path))
    return raw


def _read_json(path: Path) -> Any:
    def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        for key in keys:
            if keys.count(key) > 1:
                raise ValueError(f"{path}: duplicate key {key!r}. Fix: keep one")
        return dict(pairs)

    try:
        return json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=refuse_duplicates)
    except FileNotFoundError:
        raise ValueError(
            f"--ds_config {path}: no such file. Fix: give one of ds_configs/"
        ) from None
    except OSError as error:
        raise ValueError(
            f"--ds_config {path}: cannot be read ({error.strerror}). Fix: give one that can"
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error}). Fix: correct it there") from error


def zero_stage(ds_config: dict[str, Any]) -> int:
    """Return the ZeRO stage of a ds_config, 0 if it has none."""
    return ds_config.get("zero_optimization", {}).get("stage", 0)


def precision(ds_config: dict[str, Any]) -> str:
    """Return "bf16" (weights), "autocast" (fp32 weights, bf16 products) or "fp32"."""
    if ds_config.get("bf16", {}).get("enabled"):
        return "bf16"
    return "autocast" if ds_config.get("torch_autocast", {}).get("enabled") else "fp32"


def offload_device(ds_config: dict[str, Any], what: str) -> str:
    """Return where the "optimizer" or "param" lies: cpu, nvme or none (on the device)."""
    block = ds_config.get("zero_optimization", {}).get(f"offload_{what}")
    return block.get("device", "none") if isinstance(block, dict) else "none"


def offloads(ds_config: dict[str, Any], what: str) -> bool:
    """Say whether the "optimizer" or "param" lies in the machine's memory, or on its disk."""
    return offload_device(ds_config, what) != "none"


def _auto_sizes(gpt: GPTConfig) -> dict[str, int]:
    # In elements. Buckets hold a few blocks: large enough to fill a link, small beside the model
    # (the defaults cost 1-2 GB even at 124M). Stage 3 prefetches one block and keeps vectors.
    block = 12 * gpt.n_embd**2
    bucket = min(MAX_BUCKET, BLOCKS_PER_BUCKET * block)
    return {
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        "stage3_prefetch_bucket_size": min(MAX_BUCKET, block),
        "stage3_param_persistence_threshold": 10 * gpt.n_embd,
    }


def _resolve_sizes(zero: dict[str, Any], gpt: GPTConfig, name: str) -> dict[str, Any]:
    sizes, resolved = _auto_sizes(gpt), dict(zero)
    for key, value in zero.items():
        if value == "auto":
            if key not in sizes:
                raise ValueError(f'{name}: zero_optimization.{key} cannot be "auto". Fix: set it')
            resolved[key] = sizes[key]
        elif key in (*sizes, MAX_REUSE) and not _is_count(value, key == "reduce_bucket_size"):
            raise ValueError(
                f"{name}: zero_optimization.{key} is {value!r}, no number of elements. "
                "Fix: give one, as 5e8"
            )
    return resolved


def _is_count(value: Any, above_0: bool) -> bool:
    is_number = type(value) in (int, float) and math.isfinite(value)
    return is_number and value == int(value) and value >= above_0


def resolve_ds_config(raw: dict[str, Any], config: TrainConfig, batch: BatchArithmetic) -> Review:
    """Return the complete dict for `deepspeed.initialize`, and its ignored and unverified keys.

    `config` is resolved.

    Raises:
        ValueError: Stage 0 with bf16, stage 3 with --compile, bf16 with autocast, autocast to
            another dtype, an "auto" without a rule, or as `review_ds_config`; names the key.
    """
    name = f"--ds_config {config.ds_config}"
    review = review_ds_config(raw, name)
    raw = review.ds_config
    if zero_stage(raw) == 0 and precision(raw) == "bf16":
        raise ValueError(
            f"{name}: ZeRO stage 0 with bf16 takes a step on zero gradients at its start and "
            "trains a wrong curve. Fix: use torch_autocast (ds_configs/zero0.json) or stage 1"
        )
    if config.compile == "true" and zero_stage(raw) == 3:
        raise ValueError(
            f"--compile: the compiler cannot trace ZeRO-3's hooks ({name}). "
            "Fix: use stage 0, 1 or 2"
        )
    if precision(raw) == "bf16" and raw.get("torch_autocast", {}).get("enabled"):
        raise ValueError(f"{name}: bf16 and torch_autocast exclude each other. Fix: enable one")
    if precision(raw) != "autocast":
        raw.pop("torch_autocast", None)
    elif raw["torch_autocast"].setdefault("dtype", "bfloat16") not in BF16:  # PyTorch's: fp16
        dtype = raw["torch_autocast"]["dtype"]
        raise ValueError(f'{name}: torch_autocast.dtype is {dtype!r}. Fix: set "bfloat16"')
    zero = _resolve_sizes(raw.get("zero_optimization", {}), config.gpt_config, name)
    derived: dict[str, Any] = {
        "train_batch_size": batch.batch_sequences,
        "train_micro_batch_size_per_gpu": batch.micro_batch_size,
        "gradient_accumulation_steps": batch.grad_accum_steps,
        # At stage 0 training/engine.py clips: it needs the norm, which DeepSpeed keeps to itself.
        "gradient_clipping": config.grad_clip if zero_stage(raw) else 0.0,
        "optimizer": _optimizer(config, offloads(raw, "optimizer")),
        "steps_per_print": 2**62,  # never: training/metrics.py prints the steps
    }
    resolved = {k: v for k, v in raw.items() if k not in DERIVED_KEYS}
    resolved |= ({"zero_optimization": zero} if zero else {}) | derived
    return review._replace(ds_config=resolved)


def review_ds_config(raw: dict[str, Any], name: str) -> Review:
    """Return a ds_config without the keys that have no effect, and its ignored and unverified keys.

    Raises:
        ValueError: An unknown stage, or a key that is unknown or refused; names it.
    """
    stage = zero_stage(raw)
    if type(stage) is not int or stage not in range(4):
        raise ValueError(f"{name}: zero_optimization.stage is {stage!r}. Fix: give 0, 1, 2 or 3")
    for key in OFFLOADS:
        value = raw.get("zero_optimization", {}).get(key)
        if not isinstance(value, dict | None):
            raise ValueError(
                f"{name}: zero_optimization.{key} is {value!r}, no block. Fix: put it in braces"
            )
    devices = [offload_device(raw, what) for what in ("optimizer", "param")]
    if devices[0] == "nvme":
        raise ValueError(
            f"{name}: zero_optimization.offload_optimizer.device is nvme: its checkpoints could "
            'not be read again. Fix: set it to "cpu"'
        )
    sums_in_fp32 = raw.get("data_types", {}).get("grad_accum_dtype") in FP32
    case = str(stage)
    if stage == 1 and precision(raw) == "bf16" and sums_in_fp32 and devices[0] != "cpu":
        case = "b"
    review = review_keys(raw, case + "n" * ("nvme" in devices), name)
    block = raw.get("activation_checkpointing", {})
    if "activation_checkpointing" in raw:  # recompute each block, unless all is false
        del review.ds_config["activation_checkpointing"]
        if block.get("enabled", not block or any(block.values())):
            review.ds_config["activation_checkpointing"] = {}
    return review


def _optimizer(config: TrainConfig, offload: bool) -> dict[str, Any]:
    params: dict[str, Any] = {
        "lr": config.lr,
        "betas": [config.beta1, config.beta2],
        "eps": config.eps,
        "weight_decay": config.weight_decay,
    }
    if not offload:  # offload runs DeepSpeedCPUAdam, which is fused too
        params |= {"torch_adam": True, "fused": True}
    return {"type": "AdamW", "params": params}
