"""Linear layers with a GELU before or after them, each with less than PyTorch's own would take.

Where no gradient is wanted, fp32 products on a CPU go to oneDNN, with the GELU in the same pass:
PyTorch sends them to MKL, which is 1.3 to 1.9 times slower on AMD's processors (docs/LOG.md); in
bf16 it takes oneDNN by itself. Where one is wanted, the GELU is not kept but computed again.
"""

from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, gelu: str | None = None
) -> Tensor:
    """Return `x @ weight.T + bias`: (..., C) by (V, C) to (..., V); its GELU, if one is named."""
    takes_onednn = (
        HAS_ONEDNN
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
    )
    if takes_onednn:
        after = ("none", [], "") if gelu is None else ("gelu", [], gelu)
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, *after)
    y = F.linear(x, weight, bias)
    return y if gelu is None else F.gelu(y, approximate=gelu)


class _LinearOfGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, gelu: str) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.gelu = gelu
        return F.linear(F.gelu(x, approximate=gelu), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # the decorator hides names
        ctx: Any, *grad_outputs: Any
    ) -> tuple[Tensor, Tensor, Tensor, None]:
        (grad,) = grad_outputs  # (..., V)
        x, weight = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        activation = F.gelu(x, approximate=ctx.gelu).flatten(0, -2).to(grad.dtype)
        dweight = (rows.T @ activation).to(weight.dtype)
        dactivation = (grad @ weight.to(grad.dtype)).to(x.dtype)
        dx = torch.ops.aten.gelu_backward(dactivation, x, approximate=ctx.gelu)
        return dx, dweight, rows.sum(0).to(weight.dtype), None


def linear_of_gelu(x: Tensor, weight: Tensor, bias: Tensor, gelu: str) -> Tensor:
    """Return `gelu(x) @ weight.T + bias`, keeping x for the backward pass, but not its GELU.

    A quarter of a block's activations less, for one more GELU: little beside the products.
    """
    if torch.compiler.is_compiling():  # the compiler chooses for itself what to compute again
        return F.linear(F.gelu(x, approximate=gelu), weight, bias)
    return _LinearOfGelu.apply(x, weight, bias, gelu)


class Linear(nn.Linear):
    """nn.Linear with a GELU `before` or `after` it, one of PyTorch's names."""

    def forward(self, input: Tensor, before: str | None = None, after: str | None = None) -> Tensor:
        if before is not None:
            return linear_of_gelu(input, self.weight, self.bias, before)
        return linear(input, self.weight, self.bias, after)
