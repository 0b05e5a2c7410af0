"""Count what a training pass does on a GPU, without one: launches, bytes and FLOPs.

    python bench/gpu/counts.py

On the meta device tensors have shapes and no values. The model takes the same code path as on a
GPU; reading a value raises.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

if not __package__:  # run as a file: import from the repository root, exactly as train.py does
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from bench.record import markdown
from command_line import OneLineParser

if TYPE_CHECKING:
    from torch import Tensor

    from model import GPTConfig

BATCH, SEQ_LEN = 64, 1024
ATTENTION_BACKWARD = 2.5  # times the forward's FLOPs


@dataclass
class Work:
    """What some operations come to.

    Attributes:
        launches: Kernels.
        moved: Bytes that all but matrix products and attention read and write.
        product_flops: Of matrix products.
        attention_flops: Of attention, the causal half.
    """

    launches: int = 0
    moved: int = 0
    product_flops: int = 0
    attention_flops: int = 0

    def __sub__(self, other: Work) -> Work:
        """Return the work without that of the other."""
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Work(*(a - b for a, b in pairs))

    def __mul__(self, n: int) -> Work:
        """Return the work of n such passes."""
        return Work(*(n * value for value in vars(self).values()))


@contextlib.contextmanager
def counted(with_kernel: bool = True) -> Iterator[Work]:
    """Count the operations on meta tensors, which go a GPU's way, in a context.

    Args:
        with_kernel: Whether the loss has its Triton kernel.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    import model.gpt
    import model.loss

    work = Work()

    def tensors(tree: Any) -> list[Tensor]:
        return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]

    class Counter(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            out = func(*args, **(kwargs or {}))
            name = func._schema.name.split("::")[1].rstrip("_")
            inputs, outputs = tensors((args, kwargs)), tensors(out)
            if name in NO_LAUNCH or not outputs:
                return out
            work.launches += 1
            if name in PRODUCTS:
                a, b = tensors(args)[-2:]  # the first of addmm is the bias
                work.product_flops += 2 * a.shape[-2] * a.shape[-1] * b.shape[-1]
            else:
                work.moved += _moved(name, inputs, outputs)
            return out

    kernel = model.loss._kernel(torch.device("meta"))  # tried out before it is counted
    with contextlib.ExitStack() as patches:
        for owner, name, ours in (
            # The meta device has no autocast.
            (model.loss, "_product_dtype", lambda x: x.dtype),
            (torch, "autocast", lambda *_, **__: contextlib.nullcontext()),
            (model.gpt.F, "scaled_dot_product_attention", _attention(work)),
            (model.loss, "_kernel", lambda _: kernel if with_kernel else None),
        ):
            patches.enter_context(mock.patch.object(owner, name, ours))
        with Counter():
            yield work


PRODUCTS = {"mm", "addmm"}
NO_LAUNCH = {"view", "t", "slice", "detach", "expand", "transpose", "unsqueeze", "split", "alias",
             "_unsafe_view", "select", "as_strided", "permute", "empty", "new_empty", "empty_like",
             "empty_strided", "split_with_sizes", "lift_fresh"}  # fmt: skip
WRITES_ONLY = {
    "zeros",
    "zero",
    "fill",
    "ones",
    "full",
    "ones_like",
    "zeros_like",
    "new_zeros",
    "arange",
}


def _moved(name: str, inputs: list[Tensor], outputs: list[Tensor]) -> int:
    written = sum(t.nbytes for t in outputs)
    if name in WRITES_ONLY:
        return written
    if name == "to_gradient":
        from model.loss_kernel import READS, WRITES

        return (READS + WRITES) * inputs[0].nbytes
    if name == "copy":  # the first is only written
        return inputs[1].nbytes + written
    if name in ("gather", "embedding"):  # reads only the rows that it takes
        return 2 * written
    if name == "scatter_add":  # reads the addend, reads and writes where it goes
        return 3 * inputs[-1].nbytes
    # A broadcast tensor is read once: its storage is smaller than its shape.
    return written + sum(min(t.nbytes, t.untyped_storage().nbytes()) for t in inputs)


def _attention(work: Work) -> Any:
    # One kernel forward and one backward, as FlashAttention and cuDNN have; no scores are kept.
    import torch

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            ctx.save_for_backward(q, k, v)
            B, H, T, D = q.shape
            work.launches += 1
            work.attention_flops += 2 * B * H * T * T * D
            return torch.empty_like(q)

        @staticmethod
        def backward(ctx: Any, *_: Any) -> Any:
            q, k, v = ctx.saved_tensors
            B, H, T, D = q.shape
            work.launches += 1
            work.attention_flops += int(ATTENTION_BACKWARD * 2 * B * H * T * T * D)
            return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)

    return lambda q, k, v, **_: Attention.apply(q, k, v)


def count_pass(config: GPTConfig, batch: int = BATCH, seq_len: int = SEQ_LEN) -> dict[str, Work]:
    """Return the work of one micro-batch, forward and backward, in bf16, by part."""
    import torch

    from model import GPT
    from model.config import MEMORY_USES
    from model.loss import linear_cross_entropy

    with torch.device("meta"):
        gpt = GPT(config).bfloat16().train()
        gpt.use_memory(MEMORY_USES[0])
        tokens = torch.empty(batch, seq_len, dtype=torch.long)
        x = torch.empty(batch, seq_len, config.n_embd, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.empty_like(gpt.wte.weight).requires_grad_()
    with counted() as whole:
        gpt(tokens, tokens).backward()
    gpt.zero_grad()
    with counted() as block:
        y = gpt.h[0](x, cache=None, mask=None)
        y.backward(torch.empty_like(y))
    with counted() as loss:
        linear_cross_entropy(x.flatten(0, 1), weight, tokens.flatten()).backward()
    with counted(with_kernel=False) as plain_loss:
        linear_cross_entropy(x.flatten(0, 1), weight, tokens.flatten()).backward()
    gpt.eval()
    with counted() as validation, torch.no_grad():
        gpt(tokens, tokens)
    return {
        "blocks": block * config.n_layer,
        "loss": loss,
        "embeddings and final LayerNorm": whole - block * config.n_layer - loss,
        "all": whole,
        "loss without Triton": plain_loss,
        "validation, forward": validation,
    }


def row(part: str, work: Work) -> dict[str, str]:
    """Return a row of the table."""
    return {
        "part": part,
        "launches": f"{work.launches:,}",
        "GB moved": f"{work.moved / 1e9:.1f}",
        "products, TFLOP": f"{work.product_flops / 1e12:.1f}",
        "attention, TFLOP": f"{work.attention_flops / 1e12:.1f}",
    }


def main() -> None:
    """Run the command line."""
    parser = OneLineParser(description=__doc__)
    parser.add_argument("--model", default="gpt2", help="preset (default: gpt2)")
    args = parser.parse_args()
    from model.presets import get_preset

    parts = count_pass(get_preset(args.model).config)
    print(markdown([row(part, work) for part, work in parts.items()]))


if __name__ == "__main__":
    main()
