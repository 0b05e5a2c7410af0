"""Map sample numbers to windows of the token stream, by arithmetic alone: no index in memory.

A window is `[i·T, i·T + T + 1)`: neighbours share one token, the target of one and the input of the
next. Each epoch visits the windows in a keyed permutation: a Feistel network over the smallest
domain of 2^(2h) that holds them, walked until it lands inside (Black and Rogaway, "Ciphers with
arbitrary finite domains", CT-RSA 2002).
"""

import hashlib
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from errors import BadInput

ROUNDS = 6
MIX = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: Fibonacci hashing


@lru_cache(maxsize=8)
def _round_keys(seed: int, epoch: int) -> NDArray[np.uint64]:
    digest = hashlib.blake2b(f"{seed}/{epoch}".encode(), digest_size=8 * ROUNDS).digest()
    return np.frombuffer(digest, dtype="<u8").astype(np.uint64)


def permute(index: NDArray[np.int64], n: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Map indices in [0, n) through the bijection of [0, n) that (seed, epoch) keys."""
    half_bits = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    keys = _round_keys(seed, epoch)
    result = index.astype(np.uint64)
    walking = np.ones(len(result), dtype=bool)
    # The domain is smaller than 4n, so an index needs fewer than 4 walks on average.
    while walking.any():
        left, right = result[walking] >> half_bits, result[walking] & mask
        for key in keys:
            # uint64 products overflow on purpose; the shifts bring the well-mixed high bits down.
            hashed = (right ^ key) * MIX
            hashed ^= hashed >> np.uint64(29)
            hashed = (hashed * MIX) >> np.uint64(32)
            left, right = right, left ^ (hashed & mask)
        result[walking] = (left << half_bits) | right
        walking[walking] = result[walking] >= n
    return result.astype(np.int64)


@dataclass(frozen=True)
class Order:
    """The order of the windows of a stream, epoch after epoch.

    Args:
        n_tokens: Length of the stream.
        seq_len: T.
        seed: Keys the permutation.
        shuffle: False visits the windows in stream order, as build-nanogpt does.

    Raises:
        BadInput: The stream is shorter than one window.
    """

    n_tokens: int
    seq_len: int
    seed: int = 0
    shuffle: bool = True

    def __post_init__(self) -> None:
        if self.n_windows < 1:
            what = f"{self.n_tokens} tokens are less than one window of seq_len + 1 tokens"
            raise BadInput(f"--seq_len {self.seq_len}", what, "give more text, or a smaller one")

    @property
    def n_windows(self) -> int:
        """Windows in one epoch: all tokens but the last partial window."""
        return (self.n_tokens - 1) // self.seq_len

    def windows(self, first: int, count: int) -> NDArray[np.int64]:
        """Return the windows of the samples [first, first + count), counted over all epochs."""
        samples = np.arange(first, first + count, dtype=np.int64)
        epochs, index = np.divmod(samples, self.n_windows)
        if not self.shuffle:
            return index
        windows = np.empty_like(index)
        for epoch in np.unique(epochs):
            of_epoch = epochs == epoch
            windows[of_epoch] = permute(index[of_epoch], self.n_windows, self.seed, int(epoch))
        return windows
