"""Next-token cross-entropy that never holds fp32 logits for the whole batch.

The rows go through the head in chunks: matrix products in the dtype of the activations,
log-softmax in fp32, gradients formed at once in the forward pass, so that a chunk's logits are
computed once and freed. docs/LOG.md holds the measurements against the alternatives.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.config import CHUNK_LOGITS
from model.linear import is_widened, linear, matmul_dtype

IGNORE_INDEX = -100  # PyTorch's convention for targets that do not count
CACHED_ROWS = 16  # of fp32 logits: 3 MiB
CACHED_PRODUCT_ROWS = 4096  # of the head's gradient
EVAL_CHUNK_LOGITS = 2**24  # without a gradient: 64 MiB, and as fast


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype) -> Tensor:
        N, V = x.shape[0], weight.shape[0]
        head = weight.to(dtype)  # (V, C)
        counts = targets != IGNORE_INDEX  # (N,)
        scale = counts / counts.sum().clamp(min=1)  # (N,) weight of each row in the mean
        n_chunks = -(-N * V // CHUNK_LOGITS)
        rows = -(-N // n_chunks)
        buffer = torch.empty(rows, V, device=x.device, dtype=dtype)  # one for all chunks
        losses = torch.empty(N, device=x.device)
        dx = torch.empty_like(x)
        dw = [torch.zeros(part.shape, device=x.device) for part in _product_parts(weight)]
        for start in range(0, N, rows):
            part = slice(start, start + rows)
            x_part = x[part].to(dtype)  # (n, C)
            logits = torch.mm(x_part, head.T, out=buffer[: len(x_part)])  # (n, V)
            target = targets[part].clamp(min=0)[:, None]  # (n, 1); an ignored row weighs 0
            losses[part] = _to_gradient_(logits, target)
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
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # the decorator hides names
        ctx: Any, *grad_outputs: Any
    ) -> tuple[Tensor, Tensor, None, None]:
        (grad,) = grad_outputs
        dx, *dw = ctx.saved_tensors
        dweight = torch.empty(ctx.shape, dtype=ctx.dtype, device=dx.device)
        for dweight_part, part in zip(_product_parts(dweight), dw, strict=True):
            torch.mul(part, grad, out=dweight_part)
        return dx * grad, dweight, None, None


def _to_gradient_(logits: Tensor, target: Tensor) -> Tensor:
    # (n, V) and (n, 1): returns each row's loss, (n,), and leaves its gradient in `logits`.
    losses = []
    rows = CACHED_ROWS if logits.device.type == "cpu" else len(logits)
    for some, its_target in zip(logits.split(rows), target.split(rows), strict=True):
        log_probs = some.log_softmax(1, dtype=torch.float32)
        losses.append(-log_probs.gather(1, its_target)[:, 0])
        gradient = log_probs.exp_()  # probabilities, less 1 at the target
        some.copy_(gradient.scatter_add_(1, its_target, -torch.ones_like(its_target).float()))
    return torch.cat(losses)


def _product_parts(rows: Tensor) -> tuple[Tensor, ...]:
    # On a CPU so few rows of the head that their product is cached when it is added, and that
    # glibc finds room for their gradient between the activations.
    return rows.split(CACHED_PRODUCT_ROWS if rows.device.type == "cpu" else len(rows))


def _product_dtype(x: Tensor) -> torch.dtype:
    return torch.float32 if is_widened(x) else matmul_dtype(x)


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, n_tokens: int | None = None
) -> Tensor:
    """Return the mean cross-entropy of `x @ weight.T` against `targets`, in nats (fp32 scalar).

    Args:
        x: (N, C) final hidden states.
        weight: (V, C) head.
        targets: (N,) token ids; -100 does not count. With no target at all the loss is 0.
        n_tokens: Of the head's rows these first ones count; default: all.
    """
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        dtype = _product_dtype(x)
        with torch.autocast(x.device.type, enabled=False):
            head = weight if n_tokens is None else weight[:n_tokens]
            return _ChunkedCrossEntropy.apply(x, head, targets, dtype)
    counted = (targets != IGNORE_INDEX).sum().clamp(min=1)
    return token_losses(x, weight, targets, n_tokens).sum() / counted


@torch.no_grad()
def token_losses(x: Tensor, weight: Tensor, targets: Tensor, n_tokens: int | None = None) -> Tensor:
    """Return the cross-entropy of each row in nats, (N,) fp32, 0 where the target is -100.

    Args as in `linear_cross_entropy`; no gradient.
    """
    dtype = _product_dtype(x)
    if x.device.type == "cpu":  # a GPU's product is faster with all rows: a multiple of 128
        weight = weight[:n_tokens]
    x, head = x.to(dtype), weight.to(dtype)
    rows = max(1, EVAL_CHUNK_LOGITS // len(weight))
    with torch.autocast(x.device.type, enabled=False):
        losses = [
            F.cross_entropy(linear(x_part, head)[:, :n_tokens].float(), target, reduction="none")
            for x_part, target in zip(x.split(rows), targets.split(rows), strict=True)
        ]
    return torch.cat(losses)
