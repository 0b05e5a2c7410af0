"""Linear layers that take oneDNN's fp32 product on a CPU where no gradient is wanted.

PyTorch sends fp32 products to MKL, which is 1.3 to 1.9 times slower than oneDNN on AMD's processors
(docs/LOG.md); in bf16 it takes oneDNN by itself.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

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


class Linear(nn.Linear):
    def forward(self, input: Tensor, gelu: str | None = None) -> Tensor:
        return linear(input, self.weight, self.bias, gelu)
