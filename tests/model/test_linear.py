"""Linear layers; their arithmetic is tested with the model's in test_gpt.py."""

import contextlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from deepspeed.runtime.zero.linear import zero3_linear_wrap
from torch.utils._python_dispatch import TorchDispatchMode

import model.loss
from model import GPT, GPTConfig
from model.linear import linear, linear_of_gelu


class Watch(TorchDispatchMode):
    """Notes the operators that PyTorch's kernels are called for, and the shapes of products."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.products: list[torch.Size] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        result = func(*args, **(kwargs or {}))
        if "mm" in str(func):
            self.products.append(result.shape)
        return result


def test_a_gpu_adds_the_bias_in_the_product_also_where_zero_3_has_replaced_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Counted on the meta device, which takes a GPU's way."""
    monkeypatch.setattr(F, "linear", zero3_linear_wrap)
    x, weight, bias = (torch.empty(s, device="meta") for s in ((2, 3, 8), (16, 8), (16,)))
    with Watch() as watch:
        assert linear(x, weight, bias).shape == (2, 3, 16)
        assert linear_of_gelu(x, weight, bias, "none").shape == (2, 3, 16)
    assert watch.names.count("aten.addmm.default") == 2
    assert not [op for op in watch.names if op.startswith("aten.add") and "addmm" not in op]


@pytest.mark.parametrize(("device", "columns"), [("meta", 256), ("cpu", 130)])
def test_a_gpu_evaluates_with_the_padded_head(
    device: str, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.loss, "_product_dtype", lambda x: x.dtype)  # meta has no autocast
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    config = GPTConfig(n_layer=1, n_head=2, n_embd=32, block_size=16, vocab_size=130)
    assert config.padded_vocab_size == 256
    with torch.device(device):
        gpt, tokens = GPT(config).eval(), torch.zeros(2, 8, dtype=torch.long)
    gpt.bfloat16()  # whose products on a CPU are PyTorch's, as on a GPU
    with torch.no_grad(), Watch() as watch:
        gpt(tokens, tokens)
    assert watch.products[-1] == (16, columns)
