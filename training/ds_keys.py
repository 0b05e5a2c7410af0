"""Tell which keys of a ds_config are verified, unverified, without effect here, or refused.

ds_keys.csv lists them all. bench/fidelity/keys.py trains, exports, evaluates and resumes with each
verified key of zero_optimization; the other verified keys lay no weight out.
"""

import copy
import csv
import difflib
import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from errors import BadInput, Complaints

FP16 = ("fp16", "float16", "half", "f16")  # in any case, and behind "torch."
HALF_BLOCKS = ("fp16", "amp")
# The names that DeepSpeed 0.19.8 takes for a dtype.
FP32 = ("torch.float32", "fp32", "float32", "float")
BF16 = ("torch.bfloat16", "bf16", "bfloat16")


class Key(NamedTuple):
    """Where a key does something, and whether that was tested.

    Args:
        acts_at: ZeRO stages 0, 1, 2 and 3; b, stage 1 with bf16 weights and fp32 accumulation, as
            in zero1.json, for which DeepSpeed has an optimizer that reads fewer keys; and n, an
            offload to NVMe.
        state: verified, unverified, inert (it has no effect anywhere) or refused.
        default: What happens without the key, as JSON; empty: false, 0 or none.
        why: Of a refused key: what is wrong with it; of an unverified one: what it needs.
        remedy: Of a refused key: what to do; empty: remove it.
    """

    acts_at: str = "0b123"
    state: str = "verified"
    default: str = ""
    why: str = ""
    remedy: str = ""

    def differs_from_default(self, value: Any) -> bool:
        """Return whether a value asks for something that does not happen without the key."""
        if isinstance(value, dict) and value.get("enabled") in (False, "auto"):
            return False
        defaults = [json.loads(self.default)] if self.default else OFF
        return value not in ("auto", *defaults)


SWITCHES = {"enabled", "device"}
OFF = (False, 0, "none", {}, [])
with Path(__file__).with_name("ds_keys.csv").open(encoding="utf-8", newline="") as table:
    KEYS = {row.pop("key"): Key(**row) for row in csv.DictReader(table)}
UNSUPPORTED = [key for key, row in KEYS.items() if row.state == "refused" and "." not in key]
CHECKED_BLOCKS = {key.partition(".")[0] for key in KEYS if "." in key}  # any other key is unknown


ENGINE_KEYS = dict.fromkeys(key.partition(".")[0] for key in KEYS)
# The values of these keys must be JSON objects.
OBJECTS = ("zero_optimization", "bf16", "torch_autocast", "data_types", "activation_checkpointing")
# Keys that DeepSpeed wants and the run owns, with the flag that sets each.
DERIVED_KEYS = {
    "train_batch_size": "--batch_tokens",
    "train_micro_batch_size_per_gpu": "--micro_batch_size",
    "gradient_accumulation_steps": "--batch_tokens and --micro_batch_size",
    "gradient_clipping": "--grad_clip",
    "optimizer": "--lr, --beta1, --beta2, --eps and --weight_decay",
    "steps_per_print": "--log_every",
    "scheduler": "--lr, --warmup_steps, --decay_steps and --min_lr_ratio",
}


class Review(NamedTuple):
    """A ds_config without the keys that have no effect, these keys, and the unverified ones."""

    ds_config: dict[str, Any]
    ignored: list[str]
    unverified: list[str]

    def remarks(self, name: str) -> list[str]:
        """Return a warning for each of the two kinds of keys; `name` is that of the file."""
        lines = []
        if self.ignored:
            lines.append(f"{name}: no effect here: {', '.join(self.ignored)}. Fix: remove them")
        if self.unverified:
            what = f"{name}: never verified here: {', '.join(self.unverified)}"
            lines.append(f"{what}. Fix: remove them, or check an export yourself")
        return lines


def well_formed(raw: dict[str, Any], name: str, complaints: Complaints) -> dict[str, Any]:
    """Return a ds_config without what is not of the right form, which the complaints collect."""
    known = (*ENGINE_KEYS, *DERIVED_KEYS, *HALF_BLOCKS)
    kept = copy.deepcopy(raw)
    for key in raw:
        with complaints:
            if key not in known:
                del kept[key]
                refuse_unknown(name, key, ENGINE_KEYS)
            elif key in OBJECTS:
                _check_object(f"{name}: {key}", kept, key)
    zero = kept.get("zero_optimization", {})
    for key in ("offload_optimizer", "offload_param"):
        with complaints:
            if zero.get(key) is not None:
                _check_object(f"{name}: zero_optimization.{key}", zero, key)
    stage = zero.get("stage", 0)
    with complaints:
        if type(stage) is not int or stage not in range(4):
            del zero["stage"]
            what = f"must be 0, 1, 2 or 3, got {stage!r}"
            raise BadInput(f"{name}: zero_optimization.stage", what, "give one of them")
    return kept


def _check_object(where: str, block: dict[str, Any], key: str) -> None:
    value = block[key]
    if not isinstance(value, dict):
        del block[key]
        raise BadInput(where, f"must be an object, got {value!r}", "wrap it in { }")
    is_enabled = value.get("enabled", True)
    if key == "bf16" and is_enabled == "auto":  # Hugging Face's word: `review_ds_config` decides
        return
    if not isinstance(is_enabled, bool):
        del block[key]
        what = f"must be true or false, got {is_enabled!r}"
        raise BadInput(f"{where}.enabled", what, "give one of them")


def review_keys(raw: dict[str, Any], case: str, name: str, complaints: Complaints) -> Review:
    """Remove the keys that have no effect in this case, and name them.

    Args:
        raw: The ds_config.
        case: Letters as in `Key.acts_at`.
        name: The file.
        complaints: Collect keys that would make wrong numbers or unreadable checkpoints, and those
            that are unknown.
    """
    kept = copy.deepcopy(raw)
    ignored = _without_switch(raw)
    unverified = []
    for path, value in list(_settings(raw)):
        dotted = ".".join(path)
        key = KEYS.get(dotted, Key())
        with complaints:
            if dotted not in KEYS and path[0] in CHECKED_BLOCKS:
                refuse_unknown(name, dotted, [k for k in KEYS if k.startswith(f"{path[0]}.")])
            if key.state == "refused" and key.differs_from_default(value):
                raise BadInput(f"{name}: {dotted}", key.why, key.remedy or "remove it")
        if not key.differs_from_default(value) or key.state == "refused":
            continue
        if not set(case) & set(key.acts_at):
            ignored.append(dotted)
            block = kept
            for part in path[:-1]:
                block = block[part]
            del block[path[-1]]
        elif key.state == "unverified":
            unverified.append(dotted)
    ignored += [key for key in (*HALF_BLOCKS, "scheduler") if key in raw]
    for unused in ("comms_logger", *HALF_BLOCKS, *UNSUPPORTED):  # DeepSpeed logs even for {}
        kept.pop(unused, None)
    return Review(kept, ignored, unverified)


def refuse_unknown(name: str, key: str, known: Collection[str]) -> NoReturn:
    """Refuse a key that is in no table: DeepSpeed would ignore most of them.

    Raises:
        BadInput: Names it and the nearest known one, or all.
    """
    nearest = difflib.get_close_matches(key, known, 1)
    hint = f"did you mean {nearest[0]!r}?" if nearest else f"take one of {', '.join(known)}"
    raise BadInput(name, f"unknown key {key!r}", hint)


def _settings(block: dict[str, Any], *above: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield the path of each value and the value, without the blocks of offloads that are off."""
    for name, value in block.items():
        path = (*above, name)
        if isinstance(value, dict) and ".".join(path) not in KEYS:
            if not name.startswith("offload_") or value.get("device", "none") != "none":
                yield from _settings(value, *path)
        elif value is not None:
            yield path, value


def _without_switch(raw: dict[str, Any]) -> list[str]:
    """Return the blocks that would be on or off by a key that they lack."""
    blocks = {name: raw.get(name) for name in ("bf16", "torch_autocast", "flops_profiler")}
    zero = raw.get("zero_optimization", {})
    for name in ("offload_optimizer", "offload_param"):
        blocks[f"zero_optimization.{name}"] = zero.get(name)
    given = {name: block for name, block in blocks.items() if isinstance(block, dict)}
    return [name for name, block in given.items() if not SWITCHES & set(block)]


def is_fp16(dtype: Any) -> bool:
    """Return whether a value is a name of half precision."""
    return str(dtype).lower().removeprefix("torch.") in FP16


def refuse_fp16(raw: dict[str, Any], name: str) -> None:
    """Refuse half precision in every form; a block that is off or "auto" asks for none.

    Raises:
        BadInput: Names the key, and what there is instead.
    """
    autocast = raw.get("torch_autocast") or {}
    dtypes = {f"data_types.{key}": value for key, value in (raw.get("data_types") or {}).items()}
    dtypes["communication_data_type"] = raw.get("communication_data_type")
    dtypes["torch_autocast.dtype"] = autocast.get("dtype") if autocast.get("enabled") else None
    asked = [key for key, dtype in dtypes.items() if is_fp16(dtype)]
    for block in HALF_BLOCKS:
        value = raw.get(block)
        is_on = value.get("enabled") if isinstance(value, dict) else value
        if is_on not in (None, False, "auto"):
            asked.append(f"{block}.enabled")
    if asked:
        remedy = "use bf16 (ds_configs/zero1.json); on GPUs without bf16 leave it out: fp32"
        raise BadInput(f"{name}: {', '.join(asked)}", "fp16 is not supported", remedy)
