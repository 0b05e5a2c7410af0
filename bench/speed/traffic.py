"""Count what a rank sends through collectives, whoever calls them: the engine, DDP, ours."""

from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# What a ring sends from each rank, in (W - 1) / W of the tensor's bytes, by torch.ops.c10d's names.
RING = {
    "allreduce_": 2,
    "allreduce_coalesced_": 2,
    "allgather_": 1,
    "_allgather_base_": 1,
    "allgather_coalesced_": 1,
    "allgather_into_tensor_coalesced_": 1,
    "reduce_scatter_": 1,
    "_reduce_scatter_base_": 1,
    "reduce_scatter_tensor_coalesced_": 1,
    "broadcast_": 1,
    "reduce_": 1,
    "barrier": 0,
}


class Traffic(TorchDispatchMode):
    """A context; `sent_bytes` is what rings would have sent from this rank in it."""

    sent_bytes = 0.0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "c10d":
            factor = RING[func.__name__.split(".")[0]]
            largest = max(_nbytes(arg) for arg in args)
            self.sent_bytes += factor * largest * (1 - 1 / dist.get_world_size())
        return func(*args, **(kwargs or {}))


def _nbytes(arg: Any) -> int:
    return sum(t.nbytes for t in tree_leaves(arg) if isinstance(t, Tensor))
