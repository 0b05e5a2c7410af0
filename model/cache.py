"""Cache the keys and values of attention, so that sampling computes them once."""

from torch import Tensor


class LayerCache:
    """Keys and values of one layer, (B, H, capacity, D) each, allocated at the first append."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self.k: Tensor
        self.v: Tensor

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append T keys and values, (B, H, T, D) each; return all S so far, (B, H, S, D)."""
        B, H, T, D = k.shape
        if self.length == 0:
            self.k, self.v = (x.new_empty(B, H, self.capacity, D) for x in (k, v))
        start = self.length
        self.length += T
        self.k[:, :, start : self.length] = k
        self.v[:, :, start : self.length] = v
        return self.k[:, :, : self.length], self.v[:, :, : self.length]


class KVCache:
    """One LayerCache per layer, for sequences of up to `capacity` tokens."""

    def __init__(self, n_layer: int, capacity: int) -> None:
        self.layers = [LayerCache(capacity) for _ in range(n_layer)]

    @property
    def length(self) -> int:
        """Number of tokens cached."""
        return self.layers[0].length
