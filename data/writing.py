"""Tokens -> shards: cut at fixed places of one long stream, each shard written by all ranks.

A shard is filled under a temporary name; whole and on disk, it gets its own name, and then its
record in `shards.json`, beside the place in the source where the next one begins.
"""

import fcntl
import hashlib
import math
import os
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from data.index import (
    MANIFEST,
    PARTIAL_SUFFIX,
    Manifest,
    Position,
    Resume,
    ShardRecord,
    publish,
    write_manifest,
)
from data.mpi import on_first_rank
from data.shards import DTYPE, HEADER_BYTES, Tokens
from data.tokenizer import EOT_TOKEN

PART_BYTES = 2**21  # of a shard, looked at together


@dataclass(frozen=True)
class Part:
    """What one rank says in a round: where all blocks begin, and what its own one holds."""

    positions: list[Position]
    n_tokens: int = 0
    text_bytes: int = 0
    bad: Counter[str] = field(default_factory=Counter)
    messages: list[str] = field(default_factory=list)
    error: str = ""


class ShardWriter:
    """Write the shards of one folder (all ranks of `comm` together).

    Args:
        out_dir: The folder.
        manifest: What is there already, and the recipe: prefix of the file names
            `{prefix}_{split}_{number:06d}.npy`; tokens of a shard, of which the last one of a split
            holds the rest; tokens of shard 0, the validation split, or 0 where documents are dealt
            one by one.
        comm: mpi4py's communicator, or `data.mpi.Alone`.
    """

    def __init__(self, out_dir: Path, manifest: Manifest, comm: Any) -> None:
        self.out_dir, self.manifest, self.comm = out_dir, manifest, comm
        self.prefix: str = manifest.recipe["prefix"]
        self.shard_tokens: int = manifest.recipe["shard_tokens"]
        self.val_tokens: int = manifest.recipe["val_tokens"]
        self.split = manifest.resume.split if manifest.resume else ""
        self.skip_tokens = manifest.resume.skip_tokens if manifest.resume else 0
        self.bad = Counter(manifest.bad)
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
            self._remove_partial()
            if not self.manifest.shards:
                (self.out_dir / MANIFEST).unlink(missing_ok=True)
            os.close(self._lock)

    def _take_folder(self) -> None:
        self._lock = os.open(self.out_dir, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"--out_dir {self.out_dir}: another process writes here. Fix: wait for it (under "
                "Slurm, srun --mpi=pmix makes the ranks of one job find each other)"
            ) from error
        except OSError:  # a file system without locks on folders
            pass
        self._remove_partial()
        if not self.manifest.shards:
            write_manifest(self.out_dir, self.manifest)  # before a shard: none is ever without it

    def _remove_partial(self) -> None:
        for path in self.out_dir.glob(f"*{PARTIAL_SUFFIX}"):
            path.unlink()

    def add(self, tokens: Tokens, parts: list[Part]) -> None:
        """Append one block of every rank (all ranks).

        Args:
            tokens: Of this rank's block.
            parts: What every rank said, in order.
        """
        skip = self.skip_tokens  # of the first block after a restart
        self.skip_tokens = 0
        starts = np.cumsum([self._held - skip, *(part.n_tokens for part in parts)]).tolist()
        begin = starts[self.comm.rank]
        if begin < self._held:  # only what is not in a shard yet
            tokens, begin = tokens[self._held - begin :], self._held
        number, first = len(self.manifest.shards), 0
        while len(tokens):
            size = self._size(number)
            here = tokens[: max(0, first + size - begin)]
            self._write(number, here, begin - first)
            tokens, begin = tokens[len(here) :], begin + len(here)
            number, first = number + 1, first + size
        self._held = starts[-1]
        if self._held < 0:
            raise ValueError(f"--out_dir {self.out_dir}: the source has changed. Fix: start anew")
        while self._held >= (size := self._size(len(self.manifest.shards))):
            last = int(np.searchsorted(starts[1:], size))  # the block that fills the shard
            bad = self.bad + sum((part.bad for part in parts[:last]), Counter())
            position = parts[0].positions[last]
            resume = Resume(self.split, position, size - starts[last], dict(bad))
            starts = [start - size for start in starts]
            self._held -= size
            self._finish_shard(size, resume)
        self.bad += sum((part.bad for part in parts), Counter())

    def end_split(self, next_split: str | None) -> None:
        """Write the last, partial shard of a split (all ranks); None: of all."""
        resume = None if next_split is None else Resume(next_split, Position(), 0, {})
        if self._held:
            size, self._held = self._held, 0
            self._finish_shard(size, resume)
        else:
            self._save(self.manifest.shards, resume)
        self.split = next_split or ""
        if next_split is not None:
            self.bad = Counter()  # the next split reads the same documents again

    def expected_shards(self, fraction: float) -> int:
        """Return how many shards there will be, if the rest of the source is like this part."""
        n_tokens = sum(shard.tokens for shard in self.manifest.shards) + self._held
        rest = max(0.0, n_tokens / max(fraction, 1e-9) - n_tokens - self.shard_tokens + self._held)
        return len(self.manifest.shards) + 1 + math.ceil(rest / self.shard_tokens)

    def remove(self) -> None:
        """Remove every shard and the manifest (all ranks)."""
        self.comm.barrier()  # all ranks: nobody still reads the manifest
        if self.comm.rank == 0:
            for path in [*(shard.name for shard in self.manifest.shards), MANIFEST]:
                (self.out_dir / path).unlink()

    def _size(self, number: int) -> int:
        return self.val_tokens if self.val_tokens and number == 0 else self.shard_tokens

    def _path(self, number: int) -> Path:
        first_is_val = bool(self.val_tokens)
        split = self.split if not first_is_val else "val" if number == 0 else "train"
        return self.out_dir / f"{self.prefix}_{split}_{number:06d}.npy"

    def _write(self, number: int, tokens: Tokens, offset: int) -> None:
        if number not in self._files:
            path = f"{self._path(number)}{PARTIAL_SUFFIX}"
            self._files[number] = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        data = memoryview(tokens.astype(DTYPE, copy=False).data).cast("B")
        place = HEADER_BYTES + DTYPE.itemsize * offset
        try:
            while data:
                written = os.pwrite(self._files[number], data, place)
                data, place = data[written:], place + written
        except OSError as error:  # a call on a descriptor does not know the name
            raise OSError(error.errno, error.strerror, str(self._path(number))) from error

    def _finish_shard(self, n_tokens: int, resume: Resume | None) -> None:
        number = len(self.manifest.shards)
        path = self._path(number)
        if (descriptor := self._files.pop(number, None)) is not None:
            os.fsync(descriptor)
            os.close(descriptor)
        self.comm.barrier()  # all ranks: the tokens of each are on disk
        record = None
        if number % self.comm.size == self.comm.rank:
            record = _publish_shard(path, n_tokens)
        records = self.comm.allgather(record)  # all ranks: each learns what one has measured
        self._save([*self.manifest.shards, records[number % self.comm.size]], resume)

    def _save(self, shards: list[ShardRecord], resume: Resume | None) -> None:
        bad = dict(resume.bad if resume else self.bad)
        self.manifest = replace(self.manifest, shards=shards, resume=resume, bad=bad)
        if self.comm.rank == 0:
            write_manifest(self.out_dir, self.manifest)


def _publish_shard(path: Path, n_tokens: int) -> ShardRecord:
    partial = path.with_name(path.name + PARTIAL_SUFFIX)
    with partial.open("r+b") as file:
        header = {"descr": DTYPE.str, "fortran_order": False, "shape": (n_tokens,)}
        np.lib.format.write_array_header_1_0(file, header)
        assert file.tell() == HEADER_BYTES
        file.flush()
        os.fsync(file.fileno())
    documents = max_token = 0
    digest = hashlib.sha256()
    with partial.open("rb") as file:
        digest.update(file.read(HEADER_BYTES))
        while part := file.read(PART_BYTES):
            digest.update(part)
            tokens = np.frombuffer(part, DTYPE)
            documents += int(np.count_nonzero(tokens == EOT_TOKEN))
            max_token = max(max_token, int(tokens.max()))
    publish(partial, path)
    split = path.name.split("_")[-2]
    return ShardRecord(path.name, split, n_tokens, documents, max_token, digest.hexdigest())
