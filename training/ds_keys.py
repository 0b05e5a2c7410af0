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

from errors import BadInput

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
        why: Of a refused key: what is wrong with it.
        remedy: Of a refused key: what to do; empty: remove it.
    """

    acts_at: str = "0b123"
    state: str = "verified"
    default: str = ""
    why: str = ""
    remedy: str = ""

    def differs_from_default(self, value: Any) -> bool:
        """Return whether a value asks for something that does not happen without the key."""
        defaults = [json.loads(self.default)] if self.default else OFF
        return value not in ("auto", *defaults)


SWITCHES = {"enabled", "device"}
OFF = (False, 0, "none", {}, [])
with Path(__file__).with_name("ds_keys.csv").open(encoding="utf-8", newline="") as table:
    KEYS = {row.pop("key"): Key(**row) for row in csv.DictReader(table)}
CHECKED_BLOCKS = {key.partition(".")[0] for key in KEYS if "." in key}  # any other key is unknown


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


def review_keys(raw: dict[str, Any], case: str, name: str) -> Review:
    """Remove the keys that have no effect in this case, and name them.

    Args:
        raw: The ds_config.
        case: Letters as in `Key.acts_at`.
        name: Of the file.

    Raises:
        BadInput: A key would make wrong numbers or unreadable checkpoints, or is unknown.
    """
    kept = copy.deepcopy(raw)
    ignored = _without_switch(raw)
    unverified = []
    for path, value in list(_settings(raw)):
        dotted = ".".join(path)
        key = KEYS.get(dotted, Key())
        if dotted not in KEYS and path[0] in CHECKED_BLOCKS:
            refuse_unknown(name, dotted, [k for k in KEYS if k.startswith(f"{path[0]}.")])
        if not key.differs_from_default(value):
            continue
        if key.state == "refused":
            raise BadInput(f"{name}: {dotted}", key.why, key.remedy or "remove it")
        if not set(case) & set(key.acts_at):
            ignored.append(dotted)
            block = kept
            for part in path[:-1]:
                block = block[part]
            del block[path[-1]]
        elif key.state == "unverified":
            unverified.append(dotted)
    for unused in ("comms_logger", *HALF_BLOCKS):  # DeepSpeed logs even for {}; half is off
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


def refuse_fp16(raw: dict[str, Any], name: str) -> None:
    """Refuse half precision in every form; a block that is off or "auto" asks for none.

    Raises:
        BadInput: Names the key, and what there is instead.
    """
    autocast = raw.get("torch_autocast") or {}
    dtypes = {f"data_types.{key}": value for key, value in (raw.get("data_types") or {}).items()}
    dtypes["communication_data_type"] = raw.get("communication_data_type")
    dtypes["torch_autocast.dtype"] = autocast.get("dtype") if autocast.get("enabled") else None
    asked = [k for k, dtype in dtypes.items() if str(dtype).lower().removeprefix("torch.") in FP16]
    for block in HALF_BLOCKS:
        value = raw.get(block)
        is_on = value.get("enabled") if isinstance(value, dict) else value
        if is_on not in (None, False, "auto"):
            asked.append(f"{block}.enabled")
    if asked:
        remedy = "use bf16 (ds_configs/zero1.json); on GPUs without bf16 leave it out: fp32"
        raise BadInput(f"{name}: {asked[0]}", "fp16 is not supported", remedy)
