"""A chunk of logits becomes its gradient in one pass on a GPU: the loss's kernel, in Triton.

PyTorch's own operations would read and write the logits some ten times. Triton comes with PyTorch
for CUDA; its interpreter runs the kernel on a CPU for the tests (TRITON_INTERPRET=1).
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor, float32
from torch.library import custom_op

READS, WRITES = 2, 1  # of each logit by one launch
COLUMNS = 4096  # that a program holds at a time
OPTIONS = {"num_warps": 8, "enable_fp_fusion": True}  # Triton 3.9 warns where the second is absent


@triton.jit
def to_gradient(logits, targets, losses, row_stride, V: tl.constexpr, COLUMNS: tl.constexpr):
    # The arguments of `to_gradient_`, and the losses, (n,) fp32, which are written.
    row = tl.program_id(0).to(tl.int64)  # one program each
    logits += row * row_stride
    target = tl.load(targets + row)
    # A target outside [0, V) gives NaN; unmasked, it would silently read another row. Read before
    # the loops, whose reductions are barriers: the last loop overwrites it.
    is_column = (target >= 0) & (target < V)
    at_target = tl.load(logits + target, is_column, float("nan")).to(tl.float32)
    # Online log-sum-exp: the running sum is rescaled whenever a larger logit appears.
    largest = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    for start in range(0, V, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        values = tl.load(logits + columns, columns < V, float("-inf")).to(tl.float32)
        larger = tl.maximum(largest, tl.max(values, 0))
        total = total * tl.exp(largest - larger) + tl.sum(tl.exp(values - larger), 0)
        largest = larger
    tl.store(losses + row, largest + tl.log(total) - at_target)
    for start in range(0, V, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        values = tl.load(logits + columns, columns < V).to(tl.float32)
        gradient = tl.exp(values - largest) / total  # probabilities, less 1 at the target
        gradient = tl.where(columns == target, gradient - 1, gradient)
        tl.store(logits + columns, gradient, columns < V)


@custom_op("nanospeed::to_gradient_", mutates_args=("logits",))
def to_gradient_(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the loss of each row of `logits`, (n,) fp32, and leave its gradient in their place.

    Args:
        logits: (n, V), each row contiguous.
        targets: (n,) token ids; for one outside [0, V) the loss is NaN.
    """
    n, V = logits.shape
    losses = logits.new_empty(n, dtype=float32)
    launch: Any = to_gradient[(n,)]
    launch(logits, targets, losses, logits.stride(0), V, COLUMNS, **OPTIONS)
    return losses


@to_gradient_.register_fake
def _(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.new_empty(len(logits), dtype=float32)
