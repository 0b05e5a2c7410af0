"""nn.Linear fused with GELU: less memory in training, faster fp32 on CPUs.

Without a gradient, fp32 products on a CPU go to oneDNN, with the GELU in the same pass: PyTorch
sends them to MKL, which is 1.3 to 1.9 times slower on AMD's processors (docs/LOG.md); in bf16
PyTorch takes oneDNN by itself. With a gradient, the GELU is not kept but computed again.
On a CPU for which oneDNN has no bf16 (below AVX-512), operands are widened to fp32 for the product:
PyTorch's own loops for bf16 are 6 to 160 times slower there.
"""

from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
HAS_BF16 = HAS_ONEDNN and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def matmul_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of a product with `x`: autocast's, or its own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def is_widened(x: Tensor) -> bool:
    """Return whether a product with `x` is computed in fp32 though its operands are bf16."""
    return not HAS_BF16 and x.device.type == "cpu" and matmul_dtype(x) == torch.bfloat16


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, gelu: str | None = None
) -> Tensor:
    """Return `x @ weight.T + bias`, (..., C) by (V, C) to (..., V), or its GELU if one is named."""
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
    y = _Linear.apply(x, weight, bias, None) if is_widened(x) else _fused(x, weight, bias)
    return y if gelu is None else F.gelu(y, approximate=gelu)


def _fused(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # On a GPU in two dimensions: with three, the F.linear that ZeRO-3 puts in place of PyTorch's
    # adds the bias in a kernel of its own.
    if x.device.type == "cpu":
        return F.linear(x, weight, bias)
    return F.linear(x.flatten(0, -2), weight, bias).unflatten(0, x.shape[:-1])


class _Linear(torch.autograd.Function):
    # A linear layer of x, or of the GELU of x, which is computed again in the backward pass.
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, gelu: str | None
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.gelu, ctx.has_bias = gelu, bias is not None
        activation = _activation(x, gelu)
        if not is_widened(x):
            return _fused(activation, weight, bias)
        dtype = matmul_dtype(x)
        operands: list[Any] = [activation, weight, bias]
        operands = [t if t is None else t.to(dtype).float() for t in operands]
        with torch.autocast("cpu", enabled=False):
            return F.linear(*operands).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]  # the decorator hides names
        x, weight = ctx.saved_tensors  # grad: (..., V)
        rows = grad.flatten(0, -2)
        activation = _activation(x, ctx.gelu).flatten(0, -2).to(grad.dtype)
        dweight = _product(rows.T, activation).to(weight.dtype)
        dx = _product(grad, weight.to(grad.dtype)).to(x.dtype)
        if ctx.gelu is not None:
            dx = torch.ops.aten.gelu_backward(dx, x, approximate=ctx.gelu)
        dbias = rows.sum(0).to(weight.dtype) if ctx.has_bias else None
        return dx, dweight, dbias, None


def _activation(x: Tensor, gelu: str | None) -> Tensor:
    return x if gelu is None else F.gelu(x, approximate=gelu)


def _product(a: Tensor, b: Tensor) -> Tensor:
    return (a.float() @ b.float()).to(a.dtype) if is_widened(a) else a @ b


def linear_of_gelu(x: Tensor, weight: Tensor, bias: Tensor, gelu: str) -> Tensor:
    """Return `gelu(x) @ weight.T + bias`; keep x for the backward pass, but not its GELU.

    This saves a quarter of a block's activations and costs one more GELU, which is cheap beside
    the products.
    """
    if torch.compiler.is_compiling():  # the compiler itself chooses what to compute again
        return F.linear(F.gelu(x, approximate=gelu), weight, bias)
    return _Linear.apply(x, weight, bias, gelu)


class Linear(nn.Linear):
    """nn.Linear with a GELU `before` or `after` it, one of PyTorch's names."""

    def forward(self, input: Tensor, before: str | None = None, after: str | None = None) -> Tensor:
        if before is not None:
            return linear_of_gelu(input, self.weight, self.bias, before)
        return linear(input, self.weight, self.bias, after)


def linear_gelu_linear(
    x: Tensor, first: Linear, second: Linear, gelu: str, keeps_gelu: bool
) -> Tensor:
    """Return `second(gelu(first(x)))`; `keeps_gelu` for the backward pass, or compute it again."""
    # Both layers are called as modules: in the hooks of a call ZeRO-3 gathers a module's weights.
    if torch.is_grad_enabled() and not keeps_gelu:
        return second(first(x), before=gelu)
    return second(first(x, after=gelu))
