"""Count the bytes that PyTorch's tensors hold, whoever made them.

It counts as on a device with bf16 units: a CPU without them would widen the operands.
"""

from __future__ import annotations

import gc
import warnings
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model import linear

aten = torch.ops.aten
PRODUCTS = {product.default: product.default for product in (aten.mm, aten.addmm, aten.bmm)}
PRODUCTS[aten.mm.out] = aten.mm.default


class Held(TorchDispatchMode):
    """A context; `peak_bytes` is the most that live storages held in it, those before it too."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}  # of live storages, in bytes
        self.held_bytes = self.peak_bytes = 0
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # isinstance touches deprecated attributes
            for tensor in [thing for thing in gc.get_objects() if isinstance(thing, Tensor)]:
                self._count(tensor)
                if tensor.is_leaf and tensor.grad is not None:
                    self._count(tensor.grad)

    def __enter__(self) -> Held:
        self.had_bf16 = linear.HAS_BF16
        linear.HAS_BF16 = True
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        linear.HAS_BF16 = self.had_bf16

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        named = kwargs or {}
        results = _in_fp32(func, *args, **named) if func in PRODUCTS else func(*args, **named)
        for leaf in tree_leaves((args, results)):  # an argument's storage may have been resized
            if isinstance(leaf, Tensor):
                self._count(leaf)
        return results

    def _count(self, tensor: Tensor) -> None:
        if tensor.device.type == "meta":
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        n_bytes = storage.nbytes()
        if key not in self.sizes:
            weakref.finalize(storage, self._forget, key)
        self.held_bytes += n_bytes - self.sizes.get(key, 0)
        self.sizes[key] = n_bytes
        self.peak_bytes = max(self.peak_bytes, self.held_bytes)

    def _forget(self, key: int) -> None:
        self.held_bytes -= self.sizes.pop(key, 0)


def _in_fp32(product: Any, *operands: Tensor, out: Tensor | None = None) -> Tensor:
    # As large, and many times as fast on a CPU without bf16 units.
    result = PRODUCTS[product](*(operand.float() for operand in operands))
    return result.to(operands[0].dtype) if out is None else out.copy_(result)
