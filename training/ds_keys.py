"""The keys of a ds_config: verified, unverified, without effect here, or refused.

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
        why: It is refused.
        remedy: Of that; empty: remove it.
    """

    acts_at: str = "0b123"
    state: str = "verified"
    default: str = ""
    why: str = ""
    remedy: str = ""

    def differs_from_default(self, value: Any) -> bool:
        """Return whether a value asks for something that does not happen without the key."""
        if value == "auto":
            return False
        return value not in ([json.loads(self.default)] if self.default else NOTHING)


SWITCHES = {"enabled", "device"}
NOTHING = (False, 0, "none", {}, [])
with Path(__file__).with_name("ds_keys.csv").open(encoding="utf-8", newline="") as table:
    KEYS = {row.pop("key"): Key(**row) for row in csv.DictReader(table)}
BLOCKS = {key.partition(".")[0] for key in KEYS if "." in key}


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
            keys, remedy = ", ".join(self.unverified), "remove them, or check an export yourself"
            lines.append(f"{name}: never verified here: {keys}. Fix: {remedy}")
        return lines


def review_keys(raw: dict[str, Any], case: str, name: str) -> Review:
    """Remove the keys that have no effect in this case, and name them.

    Args:
        raw: The ds_config.
        case: Letters as in `Key.acts_at`.
        name: Of the file.

    Raises:
        ValueError: A key would make wrong numbers or unreadable checkpoints, or is unknown.
    """
    kept, ignored, unverified = copy.deepcopy(raw), _without_switch(raw), []
    for path, value in list(_settings(raw)):
        dotted = ".".join(path)
        key = KEYS.get(dotted, Key())
        if dotted not in KEYS and path[0] in BLOCKS:
            refuse_unknown(name, dotted, [k for k in KEYS if k.startswith(f"{path[0]}.")])
        if not key.differs_from_default(value):
            continue
        if key.state == "refused":
            raise ValueError(f"{name}: {dotted}: {key.why}. Fix: {key.remedy or 'remove it'}")
        if not set(case) & set(key.acts_at):
            ignored.append(dotted)
            _take_out(kept, path)
        elif key.state == "unverified":
            unverified.append(dotted)
    for block in ("comms_logger", *HALF_BLOCKS):  # DeepSpeed logs even for {}; half is off
        kept.pop(block, None)
    return Review(kept, ignored, unverified)


def refuse_unknown(name: str, key: str, known: Collection[str]) -> NoReturn:
    """Refuse a key that is in no table: DeepSpeed would overlook most of them.

    Raises:
        ValueError: Names it and the nearest known one, or all.
    """
    nearest = difflib.get_close_matches(key, known, 1)
    hint = f"did you mean {nearest[0]!r}?" if nearest else f"take one of {', '.join(known)}"
    raise ValueError(f"{name}: unknown key {key!r}. Fix: {hint}")


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
    for name in ("offload_optimizer", "offload_param"):
        blocks[f"zero_optimization.{name}"] = raw.get("zero_optimization", {}).get(name)
    return [
        k for k, block in blocks.items() if isinstance(block, dict) and not SWITCHES & set(block)
    ]


def _take_out(block: dict[str, Any], path: tuple[str, ...]) -> None:
    for name in path[:-1]:
        block = block[name]
    del block[path[-1]]


def refuse_fp16(raw: dict[str, Any], name: str) -> None:
    """Refuse half precision in every form; a block that is off or "auto" asks for none.

    Raises:
        ValueError: Names the key, and what there is instead.
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
        raise ValueError(
            f"{name}: {asked[0]}: fp16 is not supported. Fix: use bf16 (ds_configs/zero1.json); on "
            "GPUs without bf16 leave it out: fp32"
        )
