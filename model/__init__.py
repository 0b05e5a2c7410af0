"""The shape, the presets and the network of a GPT, in pure PyTorch."""

from typing import TYPE_CHECKING

from model.config import GPTConfig
from model.presets import PRESETS, Preset

if TYPE_CHECKING:
    from model.gpt import GPT

__all__ = ["GPT", "PRESETS", "GPTConfig", "Preset"]


def __getattr__(name: str) -> object:
    # GPT is imported at its first use: shapes and presets need no torch (--help, --dry_run).
    if name == "GPT":
        from model.gpt import GPT

        return GPT
    raise AttributeError(f"module 'model' has no attribute {name!r}")
