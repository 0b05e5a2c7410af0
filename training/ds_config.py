"""Make the dict for `deepspeed.initialize` from the engine's JSON and a TrainConfig.

Each value has one owner. The JSON owns the engine; the keys that follow from the run are derived
here and may only be absent or "auto" in the file.
"""

import collections
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from errors import BadInput, Complaints
from model import GPTConfig
from training import ds_keys
from training.config import BatchArithmetic, TrainConfig
from training.ds_keys import DERIVED_KEYS, Review

ROOT = Path(__file__).resolve().parents[1]
MAX_REUSE = "stage3_max_reuse_distance"
MAX_BUCKET = 500_000_000  # elements: DeepSpeed's own default for reduce_bucket_size
BLOCKS_PER_BUCKET = 4


def load_ds_config(path: Path) -> dict[str, Any]:
    """Read an engine JSON; `resolve_ds_config` checks what is in it.

    Raises:
        BadInput: No such file, not a JSON object, or a duplicate key.
    """
    is_shipped = path.parts[:1] == ("ds_configs",) and not os.path.exists(path)
    raw = _read_json(ROOT / path if is_shipped else path)
    if not isinstance(raw, dict):
        what = f"is a {type(raw).__name__}, expected a JSON object"
        raise BadInput(str(path), what, "wrap it in { }")
    return raw


def _read_json(path: Path) -> Any:
    def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        counts = collections.Counter(key for key, _ in pairs)
        duplicates = [key for key, count in counts.items() if count > 1]
        if duplicates:
            raise BadInput(str(path), f"duplicate key {duplicates[0]!r}", "keep one")
        return dict(pairs)

    try:
        return json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=refuse_duplicates)
    except OSError as error:
        is_missing = isinstance(error, FileNotFoundError)
        what = "no such file" if is_missing else f"cannot be read ({error.strerror})"
        raise BadInput(f"--ds_config {path}", what, f"give one of {ROOT}/ds_configs") from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadInput(str(path), f"is not JSON ({error})", "correct it") from error


def zero_stage(ds_config: dict[str, Any]) -> int:
    """Return the ZeRO stage of a ds_config, 0 if it has none."""
    return ds_config.get("zero_optimization", {}).get("stage", 0)


def precision(ds_config: dict[str, Any]) -> str:
    """Return "bf16" (weights), "autocast" (fp32 weights, bf16 products) or "fp32"."""
    if ds_config.get("bf16", {}).get("enabled"):
        return "bf16"
    return "autocast" if ds_config.get("torch_autocast", {}).get("enabled") else "fp32"


def offload_device(ds_config: dict[str, Any], what: str) -> str:
    """Return where the "optimizer" or "param" is: cpu, nvme or none (on the device)."""
    block = ds_config.get("zero_optimization", {}).get(f"offload_{what}")
    return block.get("device", "none") if isinstance(block, dict) else "none"


def offloads(ds_config: dict[str, Any], what: str) -> bool:
    """Return whether the "optimizer" or "param" is in the machine's memory, or on its disk."""
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


def _resolve_sizes(
    zero: dict[str, Any], gpt: GPTConfig, name: str, complaints: Complaints
) -> dict[str, Any]:
    sizes = _auto_sizes(gpt)
    resolved = dict(zero)
    for key, value in zero.items():
        where = f"{name}: zero_optimization.{key}"
        with complaints:
            if value == "auto" and key not in sizes:
                raise BadInput(where, 'cannot be "auto"', "set it")
            if value == "auto":
                resolved[key] = sizes[key]
            elif key in (*sizes, MAX_REUSE):
                _check_count(where, value, at_least=1 if key == "reduce_bucket_size" else 0)
    return resolved


def _check_count(where: str, value: Any, at_least: int) -> None:
    # JSON has no integers with an exponent: 5e8 is a float.
    is_number = type(value) in (int, float) and math.isfinite(value)
    if not is_number or value != int(value) or value < at_least:
        what = f"must be a number of elements, at least {at_least}, got {value!r}"
        raise BadInput(where, what, "give one, e.g. 5e8")


def resolve_ds_config(raw: dict[str, Any], config: TrainConfig, batch: BatchArithmetic) -> Review:
    """Return the complete dict for `deepspeed.initialize`, and its ignored and unverified keys.

    Raises:
        BadInput: All that is wrong: stage 0 with bf16, stage 3 with --compile, bf16 with autocast,
            autocast to another dtype, an "auto" without a rule, a value that the run owns and that
            is another, or as `review_ds_config`; names each key.
    """
    name = f"--ds_config {config.ds_config}"
    complaints = Complaints()
    review = review_ds_config(raw, name, complaints)
    engine = without_derived(review.ds_config)
    stage = zero_stage(engine)
    with complaints:
        _refuse_combinations(engine, config, name)
    if precision(engine) == "autocast":
        autocast = engine["torch_autocast"]
        dtype = autocast.setdefault("dtype", "bfloat16")  # PyTorch's default is fp16
        with complaints:
            if dtype not in ds_keys.BF16 and not ds_keys.is_fp16(dtype):  # which was refused
                what = f"must be bfloat16, got {dtype!r}"
                raise BadInput(f"{name}: torch_autocast.dtype", what, 'set "bfloat16"')
    else:
        engine.pop("torch_autocast", None)
    if "zero_optimization" in engine:
        zero = engine["zero_optimization"]
        engine["zero_optimization"] = _resolve_sizes(zero, config.gpt_config, name, complaints)
    derived = {
        "train_batch_size": batch.batch_sequences,
        "train_micro_batch_size_per_gpu": batch.micro_batch_size,
        "gradient_accumulation_steps": batch.grad_accum_steps,
        # At stage 0 training/step.py clips: it needs the norm, which DeepSpeed keeps to itself.
        "gradient_clipping": config.grad_clip if stage else 0.0,
        "optimizer": _optimizer(config, offloads(engine, "optimizer")),
        "steps_per_print": 2**62,  # never: training/metrics.py prints the steps
    }
    owned = derived | {"gradient_clipping": config.grad_clip, "steps_per_print": config.log_every}
    _check_owned(raw, owned | {"scheduler": _scheduler(config)}, name, complaints)
    complaints.raise_all()
    return review._replace(ds_config=engine | derived)


def without_derived(ds_config: dict[str, Any]) -> dict[str, Any]:
    """Return what a file may own of a ds_config, which can be resolved for another batch."""
    return {key: value for key, value in ds_config.items() if key not in DERIVED_KEYS}


def _check_owned(
    raw: dict[str, Any], owned: dict[str, Any], name: str, complaints: Complaints
) -> None:
    """Collect the values that the run owns where a file gives others."""
    if isinstance(raw.get("scheduler"), dict):  # which one it is makes no difference
        owned["scheduler"]["type"] = raw["scheduler"].get("type")
    for key, flags in DERIVED_KEYS.items():
        for path, given, own in _differences(key, raw.get(key, "auto"), owned[key]):
            with complaints:
                what = f"is {given!r}, but belongs to {flags}"
                if own is not None:
                    what += f" (here {own!r})"
                raise BadInput(f"{name}: {path}", what, 'remove it, or set it to "auto"')


def _differences(path: str, given: Any, own: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield path, value and the run's own value (None: it has none) of all that differs."""
    if given in ("auto", own):
        return
    if isinstance(given, dict) and isinstance(own, dict):
        for key, value in given.items():
            yield from _differences(f"{path}.{key}", value, own.get(key))
    else:
        yield path, given, own


def _refuse_combinations(raw: dict[str, Any], config: TrainConfig, name: str) -> None:
    stage = zero_stage(raw)
    is_bf16 = precision(raw) == "bf16"
    if stage == 0 and is_bf16:
        what = (
            "ZeRO stage 0 with bf16 takes a step on zero gradients at its start and trains a "
            "wrong curve"
        )
        raise BadInput(name, what, "use torch_autocast (ds_configs/zero0.json) or stage 1")
    if stage == 3 and config.compile == "true":
        what = f"the compiler cannot trace ZeRO-3's hooks ({name})"
        raise BadInput("--compile", what, "use stage 0, 1 or 2")
    if is_bf16 and raw.get("torch_autocast", {}).get("enabled"):
        raise BadInput(name, "bf16 and torch_autocast exclude each other", "enable one")


def review_ds_config(raw: dict[str, Any], name: str, complaints: Complaints) -> Review:
    """Return a ds_config without the keys that have no effect, and its ignored and unverified keys.

    The complaints collect what is of another form, an unknown stage, and each key that is unknown
    or refused.
    """
    raw = ds_keys.well_formed(raw, name, complaints)
    with complaints:
        ds_keys.refuse_fp16(raw, name)
    stage = zero_stage(raw)
    if raw.get("bf16", {}).get("enabled") == "auto":  # on wherever it is supported
        is_autocast = raw.get("torch_autocast", {}).get("enabled", False)
        raw["bf16"]["enabled"] = stage > 0 and not is_autocast
    optimizer_device = offload_device(raw, "optimizer")
    with complaints:
        if optimizer_device == "nvme":
            where = f"{name}: zero_optimization.offload_optimizer.device"
            what = "is nvme: DeepSpeed reads gradients back wrong"
            raise BadInput(where, what, 'set it to "cpu"')
    # The letters of `Key.acts_at`.
    case = str(stage)
    sums_in_fp32 = raw.get("data_types", {}).get("grad_accum_dtype") in ds_keys.FP32
    if stage == 1 and precision(raw) == "bf16" and sums_in_fp32 and optimizer_device != "cpu":
        case = "b"
    if offload_device(raw, "param") == "nvme":
        case += "n"
    review = ds_keys.review_keys(raw, case, name, complaints)
    if "activation_checkpointing" in raw:
        # For us it means: recompute each block. It is on unless all in it is false.
        given = raw["activation_checkpointing"]
        del review.ds_config["activation_checkpointing"]
        if given.get("enabled", not given or any(given.values())):
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


def _scheduler(config: TrainConfig) -> dict[str, Any]:
    """Return the values of the run's schedule by the names of DeepSpeed's schedulers."""
    return {
        "params": {
            "warmup_min_lr": 0,
            "warmup_max_lr": config.lr,
            "warmup_num_steps": config.warmup_steps,
            "total_num_steps": config.decay_steps,
            "cos_min_ratio": config.min_lr_ratio,
        }
    }
