"""Write tokens to shards, cut at fixed places of one long stream, each shard by all ranks.

A shard is filled under a temporary name; complete and on disk, it gets its own name, and then its
record in `shards.json`, beside the place in the source where the next one begins.
"""

import fcntl
import hashlib
import math
import os
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data.index import (
    INDEX_NAME,
    TEMPORARY_SUFFIX,
    Position,
    Resume,
    ShardIndex,
    ShardRecord,
    rename_durably,
    write_index,
)
from data.mpi import on_first_rank
from data.shards import DTYPE, HEADER_BYTES, Tokens
from data.tokenizer import EOT_TOKEN
from errors import BadInput

PART_BYTES = 2**21  # of a shard, read at once


@dataclass(frozen=True)
class Part:
    """What one rank says in a round: where all blocks begin, and what its own one holds."""

    positions: list[Position]
    n_tokens: int = 0
    text_bytes: int = 0
    bad: Counter[str] = field(default_factory=Counter)
    messages: list[str] = field(default_factory=list)
    error: BadInput | None = None


class ShardWriter:
    """Write the shards of one folder (all ranks of `comm` together).

    Args:
        out_dir: The folder.
        index: What is there already, and the recipe: prefix of the file names
            `{prefix}_{split}_{number:06d}.npy`; tokens of a shard, of which the last one of a split
            holds the rest; tokens of shard 0, the validation split, or 0 where every N-th document
            is validation.
        comm: mpi4py's communicator, or `data.mpi.Alone`.
    """

    def __init__(self, out_dir: Path, index: ShardIndex, comm: Any) -> None:
        self.out_dir, self.index, self.comm = out_dir, index, comm
        self.prefix: str = index.recipe["prefix"]
        self.shard_tokens: int = index.recipe["shard_tokens"]
        self.val_tokens: int = index.recipe["val_tokens"]
        resume = index.resume or Resume("")
        self.split, self.skip_tokens = resume.split, resume.skip_tokens
        self.bad = Counter(index.bad)
        self._held = 0  # tokens of the shard that is being filled
        self._files: dict[int, int] = {}  # shard number -> descriptor
        self._lock = -1

    def __enter__(self) -> "ShardWriter":
        """Lock the folder and remove what a killed run left half-written (all ranks)."""
        on_first_rank(self.comm, self._take_folder)  # nobody writes before it is clean
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)
        if self.comm.rank == 0:
            self._remove_temporary()
            if not self.index.shards:
                (self.out_dir / INDEX_NAME).unlink(missing_ok=True)
            os.close(self._lock)

    def _take_folder(self) -> None:
        self._lock = os.open(self.out_dir, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            what = "another process writes here"
            remedy = "wait for it (Slurm: srun --mpi=pmix makes one job of the ranks)"
            raise BadInput(f"--out_dir {self.out_dir}", what, remedy) from error
        except OSError:  # a file system without locks on folders
            pass
        self._remove_temporary()
        if not self.index.shards:
            write_index(self.out_dir, self.index)  # before a shard: none is ever without it

    def _remove_temporary(self) -> None:
        for path in self.out_dir.glob(f"*{TEMPORARY_SUFFIX}"):
            path.unlink()

    def add(self, tokens: Tokens, parts: list[Part]) -> None:
        """Append one block of every rank (all ranks).

        Args:
            tokens: Of this rank's block.
            parts: What every rank said, in order.
        """
        starts = self._place(parts)
        self._write_span(tokens, starts[self.comm.rank])
        self._held = starts[-1]
        if self._held < 0:
            raise BadInput(f"--out_dir {self.out_dir}", "the source has changed", "start anew")
        self._finish_full_shards(starts, parts)
        self.bad += sum((part.bad for part in parts), Counter())

    def _place(self, parts: list[Part]) -> list[int]:
        """Return where each block begins, in tokens of the shard being filled, and the end.

        After a restart the first block begins before the shard: its first tokens are in the last.
        """
        starts = [self._held - self.skip_tokens]
        self.skip_tokens = 0
        for part in parts:
            starts.append(starts[-1] + part.n_tokens)
        return starts

    def _write_span(self, tokens: Tokens, begin: int) -> None:
        """Write tokens into the shard being filled, from `begin` on, and into those that follow.

        Places are tokens from the beginning of the shard being filled. With shards of 100 tokens
        and 60 held, a block of 90 tokens begins at 60: 40 tokens go into this shard, 50 into the
        next one.
        """
        end = begin + len(tokens)
        number = len(self.index.shards)
        shard_begin = 0
        while shard_begin < end:
            shard_end = shard_begin + self._size(number)
            # What is before `_held` is in a complete shard: of a block that a restart reads again.
            first = max(begin, shard_begin, self._held)
            last = min(end, shard_end)
            if first < last:
                self._write(number, tokens[first - begin : last - begin], first - shard_begin)
            number += 1
            shard_begin = shard_end

    def _finish_full_shards(self, starts: list[int], parts: list[Part]) -> None:
        """Give the shards that are full their names and records (all ranks)."""
        size = self._size(len(self.index.shards))
        while self._held >= size:
            # A restart continues with the block that fills the shard; `bad` is of those before it.
            last = int(np.searchsorted(starts[1:], size))
            bad = self.bad + sum((part.bad for part in parts[:last]), Counter())
            position = parts[0].positions[last]
            resume = Resume(self.split, position, size - starts[last], dict(bad))
            starts = [start - size for start in starts]
            self._held -= size
            self._finish_shard(size, resume)
            size = self._size(len(self.index.shards))

    def end_split(self, next_split: str | None) -> None:
        """Write the last, partial shard of a split (all ranks); None: of all."""
        resume = None if next_split is None else Resume(next_split)
        if self._held:
            size = self._held
            self._held = 0
            self._finish_shard(size, resume)
        else:
            self._save(self.index.shards, resume)
        self.split = next_split or ""
        if next_split is not None:
            self.bad = Counter()  # the next split reads the same documents again

    def expected_shards(self, fraction: float) -> int:
        """Return how many shards there will be, if the rest of the source is like this part."""
        n_tokens = sum(shard.tokens for shard in self.index.shards) + self._held
        expected = n_tokens / max(fraction, 1e-9)
        beyond = max(0.0, expected - n_tokens - self.shard_tokens + self._held)
        return len(self.index.shards) + 1 + math.ceil(beyond / self.shard_tokens)

    def remove(self) -> None:
        """Remove every shard and the index (all ranks)."""
        self.comm.barrier()  # all ranks: nobody still reads the index
        if self.comm.rank == 0:
            for name in [*(shard.name for shard in self.index.shards), INDEX_NAME]:
                (self.out_dir / name).unlink()

    def _size(self, number: int) -> int:
        return self.val_tokens if self.val_tokens and number == 0 else self.shard_tokens

    def _path(self, number: int) -> Path:
        split = self.split
        if self.val_tokens:
            split = "val" if number == 0 else "train"
        return self.out_dir / f"{self.prefix}_{split}_{number:06d}.npy"

    def _write(self, number: int, tokens: Tokens, offset: int) -> None:
        if number not in self._files:
            path = f"{self._path(number)}{TEMPORARY_SUFFIX}"
            self._files[number] = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        data = memoryview(tokens.astype(DTYPE, copy=False).data).cast("B")
        place = HEADER_BYTES + DTYPE.itemsize * offset
        try:
            while data:
                written = os.pwrite(self._files[number], data, place)
                data = data[written:]
                place += written
        except OSError as error:  # a call on a descriptor does not know the name
            raise OSError(error.errno, error.strerror, str(self._path(number))) from error

    def _finish_shard(self, n_tokens: int, resume: Resume | None) -> None:
        number = len(self.index.shards)
        path = self._path(number)
        descriptor = self._files.pop(number, None)
        if descriptor is not None:
            os.fsync(descriptor)
            os.close(descriptor)
        self.comm.barrier()  # all ranks: the tokens of each are on disk
        record = None
        owner = number % self.comm.size  # in turns: reading it again takes time
        if owner == self.comm.rank:
            record = _complete_shard(path, n_tokens)
        records = self.comm.allgather(record)  # all ranks: each learns what the owner has measured
        self._save([*self.index.shards, records[owner]], resume)

    def _save(self, shards: list[ShardRecord], resume: Resume | None) -> None:
        bad = dict(resume.bad if resume else self.bad)
        self.index = replace(self.index, shards=shards, resume=resume, bad=bad)
        if self.comm.rank == 0:
            write_index(self.out_dir, self.index)


def _complete_shard(path: Path, n_tokens: int) -> ShardRecord:
    """Write the header of a filled shard, measure it and give it its name."""
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    documents = max_token = 0
    with temporary.open("r+b") as file:
        header = {"descr": DTYPE.str, "fortran_order": False, "shape": (n_tokens,)}
        np.lib.format.write_array_header_1_0(file, header)
        assert file.tell() == HEADER_BYTES
        file.flush()
        os.fsync(file.fileno())
        file.seek(0)
        digest = hashlib.sha256(file.read(HEADER_BYTES))
        for data in iter(partial(file.read, PART_BYTES), b""):
            digest.update(data)
            tokens = np.frombuffer(data, DTYPE)
            documents += int(np.count_nonzero(tokens == EOT_TOKEN))
            max_token = max(max_token, int(tokens.max()))
    rename_durably(temporary, path)
    split = path.name.split("_")[-2]
    return ShardRecord(path.name, split, n_tokens, documents, max_token, digest.hexdigest())
