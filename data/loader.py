"""Read this rank's batches ahead in a thread."""

import threading
from collections.abc import Iterator
from queue import SimpleQueue

import numpy as np
import torch
from torch import Tensor

from data.order import Order
from data.shards import Tokens, TokenStream

READ_AHEAD = 8  # micro-batches


def read_windows(stream: TokenStream, windows: np.ndarray, seq_len: int) -> Tokens:
    """Read windows of T + 1 tokens: (len(windows), T + 1)."""
    return np.stack([stream.read(int(w) * seq_len, seq_len + 1) for w in windows])


def split_windows(windows: Tensor, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Send (B, T + 1) uint16 to the device and widen there: tokens and targets, (B, T) int64.

    The two are views of one tensor: replace values with `where`, never in place.
    """
    on_device = windows.to(device, non_blocking=True).long()
    return on_device[:, :-1], on_device[:, 1:]


def rank_samples(
    first: int, micro_batch_size: int, grad_accum_steps: int, rank: int, world_size: int
) -> Iterator[range]:
    """Yield the sample numbers of each micro-batch of one rank in the batch that starts at `first`.

    Micro-batch m of rank r is the m·world_size + r-th run of `micro_batch_size` samples, so the
    micro-batches of all ranks, side by side, are the global batch in order.
    """
    for m in range(grad_accum_steps):
        start = first + (m * world_size + rank) * micro_batch_size
        yield range(start, start + micro_batch_size)


class Loader:
    """Iterate over this rank's micro-batches, (micro_batch_size, T + 1) uint16, for ever.

    Args:
        stream: Tokens of the split.
        order: Order of their windows.
        micro_batch_size: Sequences per forward.
        grad_accum_steps: Micro-batches per rank and optimizer step.
        rank: This process.
        world_size: All processes.
        samples: Samples consumed so far, by all ranks: the whole state.
    """

    def __init__(
        self,
        stream: TokenStream,
        order: Order,
        micro_batch_size: int,
        grad_accum_steps: int,
        rank: int = 0,
        world_size: int = 1,
        samples: int = 0,
    ) -> None:
        self.stream, self.order = stream, order
        self.batch = (micro_batch_size, grad_accum_steps, rank, world_size)
        self.pin_memory = torch.cuda.is_initialized()
        # The queue has no maxsize: a full one would wake the reader for every batch that is taken,
        # which costs more than taking it. `_wanted` wakes it once, to refill half of the queue.
        self._ahead: SimpleQueue[Tensor | Exception] = SimpleQueue()
        self._wanted = threading.Event()
        self._closed = False
        self._thread = threading.Thread(target=self._read_ahead, args=(samples,), daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Tensor:
        if self._ahead.qsize() <= READ_AHEAD // 2:
            self._wanted.set()
        item = self._ahead.get()
        if isinstance(item, Exception):
            raise item
        return item

    def close(self) -> None:
        """End the reading thread."""
        self._closed = True
        self._wanted.set()
        self._thread.join()

    def _read_ahead(self, samples: int) -> None:
        micro_batch_size, grad_accum_steps, _, world_size = self.batch
        while not self._closed:
            for part in rank_samples(samples, *self.batch):
                self._ahead.put(self._read(part))
                # Clear before the two tests: a `set` that comes between them is not lost.
                self._wanted.clear()
                if self._ahead.qsize() >= READ_AHEAD and not self._closed:
                    self._wanted.wait()
                if self._closed:
                    return
            samples += micro_batch_size * grad_accum_steps * world_size

    def _read(self, samples: range) -> Tensor | Exception:
        try:
            windows = self.order.windows(samples.start, len(samples))
            batch = torch.from_numpy(read_windows(self.stream, windows, self.order.seq_len))
            return batch.pin_memory() if self.pin_memory else batch
        except Exception as error:  # raised where the batch is taken: else the loop would wait
            return error
