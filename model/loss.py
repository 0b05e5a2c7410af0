"""Next-token cross-entropy that never holds fp32 logits for the whole batch.

The rows go through the head in chunks: matrix products in the dtype of the activations,
log-softmax in fp32, gradients already in the forward pass, so that a chunk's logits are computed
once and freed. docs/LOG.md holds the measurements against the alternatives.

On a CPU a chunk fits into the caches; on a GPU it is large enough for fast products, and one kernel
turns its logits into losses and gradients (model/loss_kernel.py).
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.config import MEMORY_USES, chunk_rows
from model.linear import is_widened, linear, matmul_dtype

IGNORE_INDEX = -100  # PyTorch's convention for targets that do not count
CACHED_ROWS = 16  # of fp32 logits: 3 MiB
ROWS_WITHOUT_KERNEL = 1024  # of fp32 logits on a GPU: 200 MB
CACHED_PRODUCT_ROWS = 4096  # of the head's gradient
EVAL_CHUNK_LOGITS = 2**24  # without a gradient: 64 MiB, and as fast


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype, rows: int
    ) -> Tensor:
        N, V = x.shape[0], weight.shape[0]
        head = weight.to(dtype)  # (V, C)
        is_counted = targets != IGNORE_INDEX  # (N,)
        scale = is_counted / is_counted.sum().clamp(min=1)  # (N,) weight of each row in the mean
        buffer = torch.empty(rows, V, device=x.device, dtype=dtype)  # one for all chunks
        losses = torch.empty(N, device=x.device)
        dx = torch.empty_like(x)
        dw = [torch.zeros(part.shape, device=x.device) for part in _product_parts(weight)]
        classes = targets.clamp(min=0)  # an ignored row weighs 0
        for start in range(0, N, rows):
            part = slice(start, start + rows)
            x_part = x[part].to(dtype)  # (n, C)
            logits = torch.mm(x_part, head.T, out=buffer[: len(x_part)])  # (n, V)
            losses[part] = _to_gradient_(logits, classes[part])
            dx[part] = (logits @ head * scale[part, None]).to(x.dtype)
            x_scaled = (x_part * scale[part, None]).to(dtype)
            for dw_part, dlogits in zip(dw, _product_parts(logits.T), strict=True):
                dw_part += dlogits @ x_scaled
        loss = (losses * scale).sum()
        ctx.save_for_backward(dx, *dw)
        ctx.shape, ctx.dtype = weight.shape, weight.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]  # the decorator hides names
        dx, *dw = ctx.saved_tensors
        dweight = torch.empty(ctx.shape, dtype=ctx.dtype, device=dx.device)
        for dweight_part, part in zip(_product_parts(dweight), dw, strict=True):
            torch.mul(part, grad, out=dweight_part)
        return dx * grad, dweight, None, None, None


def _to_gradient_(logits: Tensor, targets: Tensor) -> Tensor:
    # (n, V) and (n,): returns each row's loss, (n,), and writes its gradient over `logits`.
    on_gpu = _is_on_gpu(logits)
    kernel = _kernel(logits.device) if on_gpu else None
    if kernel:
        return kernel(logits, targets)
    losses = []
    rows = ROWS_WITHOUT_KERNEL if on_gpu else CACHED_ROWS
    for chunk, target in zip(logits.split(rows), targets[:, None].split(rows), strict=True):
        log_probs = chunk.log_softmax(1, dtype=torch.float32)
        losses.append(-log_probs.gather(1, target)[:, 0])
        gradient = log_probs.exp_()  # probabilities, less 1 at the target
        chunk.copy_(gradient.scatter_add_(1, target, -torch.ones_like(target).float()))
    return torch.cat(losses)


@functools.cache
def _kernel(device: torch.device) -> Callable[[Tensor, Tensor], Tensor] | None:
    # Run once to see whether it works: it is compiled for this GPU, which needs a C compiler and
    # Python's headers.
    try:
        from model.loss_kernel import to_gradient_

        target = torch.zeros(1, dtype=torch.int64, device=device)
        to_gradient_(torch.zeros(1, 1, device=device), target)
    except Exception as error:  # of Triton, the compiler or the driver: each has its own type
        what = f"the loss goes without its Triton kernel, and is slower: {error!r}"
        warnings.warn(f"{what}. Fix: install Triton, a C compiler, Python's headers", stacklevel=1)
        return None
    return to_gradient_


def _product_parts(rows: Tensor) -> tuple[Tensor, ...]:
    # On a CPU so few rows of the head that their product is still cached when it is added, and that
    # glibc can place their gradient in the gaps between the activations.
    return rows.split(len(rows) if _is_on_gpu(rows) else CACHED_PRODUCT_ROWS)


def _is_on_gpu(x: Tensor) -> bool:
    return x.device.type != "cpu"


def _product_dtype(x: Tensor) -> torch.dtype:
    return torch.float32 if is_widened(x) else matmul_dtype(x)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    n_tokens: int | None = None,
    gpu_rows: int = MEMORY_USES[0].chunk_rows,  # the fastest
) -> Tensor:
    """Return the mean cross-entropy of `x @ weight.T` against `targets`, in nats (fp32 scalar).

    Args:
        x: (N, C) final hidden states.
        weight: (V, C) head.
        targets: (N,) token ids; -100 does not count. With no target at all the loss is 0.
        n_tokens: How many of the head's rows count, from the first; default: all.
        gpu_rows: Rows of logits that a GPU holds at a time; fewer take less memory and more time.
    """
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        dtype = _product_dtype(x)
        with torch.autocast(x.device.type, enabled=False):
            head = weight if n_tokens is None else weight[:n_tokens]
            rows = chunk_rows(len(x), len(head), _is_on_gpu(x), gpu_rows)
            return _ChunkedCrossEntropy.apply(x, head, targets, dtype, rows)
    counted = (targets != IGNORE_INDEX).sum().clamp(min=1)
    return token_losses(x, weight, targets, n_tokens).sum() / counted


@torch.no_grad()
def token_losses(x: Tensor, weight: Tensor, targets: Tensor, n_tokens: int | None = None) -> Tensor:
    """Return the cross-entropy of each row in nats, (N,) fp32, 0 where the target is -100.

    Args as in `linear_cross_entropy`; no gradient.
    """
    dtype = _product_dtype(x)
    on_gpu = _is_on_gpu(x)
    if not on_gpu:  # on a GPU the product of all rows is faster: their number is a multiple of 128
        weight = weight[:n_tokens]
    x, head = x.to(dtype), weight.to(dtype)
    rows = MEMORY_USES[-1].chunk_rows if on_gpu else max(1, EVAL_CHUNK_LOGITS // len(weight))
    with torch.autocast(x.device.type, enabled=False):
        losses = [
            _losses(linear(x_part, head)[:, :n_tokens], target)
            for x_part, target in zip(x.split(rows), targets.split(rows), strict=True)
        ]
    return torch.cat(losses)


def _losses(logits: Tensor, targets: Tensor) -> Tensor:
    if not _is_on_gpu(logits):
        return F.cross_entropy(logits.float(), targets, reduction="none")
    losses = _to_gradient_(logits, targets.clamp(min=0))  # the gradient is not used
    return losses.where(targets != IGNORE_INDEX, 0)
