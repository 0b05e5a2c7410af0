"""Linear layers; their arithmetic is tested with the model's in test_gpt.py."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from deepspeed.runtime.zero.linear import zero3_linear_wrap
from torch.utils._python_dispatch import TorchDispatchMode

from model.linear import linear, linear_of_gelu


def test_a_gpu_adds_the_bias_in_the_product_also_where_zero_3_has_replaced_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Counted on the meta device, which takes a GPU's way."""
    monkeypatch.setattr(F, "linear", zero3_linear_wrap)
    ops: list[str] = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            ops.append(str(func))
            return func(*args, **(kwargs or {}))

    x, weight, bias = (torch.empty(s, device="meta") for s in ((2, 3, 8), (16, 8), (16,)))
    with Count():
        assert linear(x, weight, bias).shape == (2, 3, 16)
        assert linear_of_gelu(x, weight, bias, "none").shape == (2, 3, 16)
    assert ops.count("aten.addmm.default") == 2
    assert not [op for op in ops if op.startswith("aten.add") and "addmm" not in op]
