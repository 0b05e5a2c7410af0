"""The shard format: `.npy` files of uint16 tokens, `*_{split}_{index:06d}.npy`, as one stream.

The format and the names are build-nanogpt's; its shards are read in place.
"""

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.uint16]

SPLITS = ("train", "val")
DTYPE = np.dtype("<u2")
CHECKED_TOKENS = 2**20  # of each shard, checked when it is opened; the rest when it is read


def write_shard(path: Path, tokens: Tokens) -> None:
    """Write one shard; the file appears whole or not at all."""
    partial = path.with_suffix(".tmp")
    with partial.open("wb") as file:
        np.save(file, tokens.astype(DTYPE, copy=False), allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)


def open_shard(path: Path) -> Tokens:
    """Memory-map one shard.

    Raises:
        ValueError: Not a `.npy` file, or not exactly one dimension of uint16 that fills the file.
    """
    try:
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # numpy answers damage with many types, zipfile's among them
        raise ValueError(f"{path}: not a readable .npy file ({error})") from error
    if not isinstance(tokens, np.memmap) or tokens.ndim != 1 or tokens.dtype != DTYPE:
        found = f"{tokens.dtype.str} {tokens.shape}" if isinstance(tokens, np.ndarray) else "npz"
        raise ValueError(f"{path}: holds {found}; a shard is one dimension of {DTYPE.str}")
    size, header_size = path.stat().st_size, tokens.offset
    if size != header_size + tokens.nbytes:
        raise ValueError(f"{path}: header says {len(tokens)} tokens, the file has {size} bytes")
    return tokens


class TokenStream:
    """All shards of one split as one stream of tokens, memory-mapped.

    Args:
        data_dir: Folder of shards.
        split: "train" or "val".
        vocab_size: Every token must be below it.

    Raises:
        ValueError: No folder, no shard of this split, a damaged shard, or a token out of range.
    """

    def __init__(self, data_dir: Path, split: str, vocab_size: int) -> None:
        self.paths = sorted(data_dir.glob(f"*_{split}_*.npy"))
        if not self.paths:
            raise ValueError(
                f"--data_dir {data_dir}: no shard *_{split}_*.npy; "
                f"make some: python data/prepare.py TEXT… --out_dir {data_dir}"
            )
        self.vocab_size = vocab_size
        self.shards = [open_shard(path) for path in self.paths]
        self.ends = np.cumsum([len(shard) for shard in self.shards])
        for i, shard in enumerate(self.shards):
            self._check(shard[:CHECKED_TOKENS], i)

    def __len__(self) -> int:
        """Return the number of tokens."""
        return int(self.ends[-1])

    def read(self, start: int, length: int) -> Tokens:
        """Copy the tokens `[start, start + length)`, across shard edges.

        Raises:
            ValueError: A token is out of range; the message names the shard.
        """
        assert 0 <= start <= start + length <= len(self)
        parts = []
        i = int(np.searchsorted(self.ends, start, side="right"))
        while length > 0:
            begin = start - (int(self.ends[i]) - len(self.shards[i]))
            part = np.array(self.shards[i][begin : begin + length])
            self._check(part, i)
            parts.append(part)
            start, length, i = start + len(part), length - len(part), i + 1
        return np.concatenate(parts) if parts else np.empty(0, DTYPE)

    def _check(self, tokens: Tokens, shard: int) -> None:
        largest = int(tokens.max(initial=0))
        if largest >= self.vocab_size:
            raise ValueError(
                f"{self.paths[shard]}: token {largest}, the vocabulary has {self.vocab_size}; "
                "prepare the shards with GPT-2's tokenizer"
            )
