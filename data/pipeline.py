"""Blocks -> tokens -> shards: reading, tokenising in threads and writing overlap, in order."""

import sys
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np

from data.blocks import Block, Reader, Reading
from data.documents import read_documents
from data.encode import Encoder
from data.index import Position
from data.opening import Opener
from data.shards import DTYPE, Tokens
from data.sources import SourceFile
from data.writing import Part, ShardWriter

MAX_MESSAGES = 10  # documents left out that are named
CHECK_EVERY = 64  # blocks, beside the first of each file, on which the tokenizers are compared


@dataclass(frozen=True)
class Pipeline:
    """What turns the blocks of all files into shards.

    Args:
        files: In order.
        reading: Limits and names.
        opener: Opens the files.
        encoder: Tokenises.
        workers: Threads that tokenise.
        val_every: One document in so many is validation; 0 where shard 0 is.
        comm: The ranks that share the work.
        progress: Counts and shows.
    """

    files: list[SourceFile]
    reading: Reading
    opener: Opener
    encoder: Encoder
    workers: int
    val_every: int
    comm: Any
    progress: "Progress"

    def write_split(self, writer: ShardWriter, start: Position) -> None:
        """Write the documents of the writer's split, from a position on (all ranks).

        At most 2 · workers + 1 blocks are in memory.

        Raises:
            ValueError: Bad input; the same on every rank.
        """
        reader = Reader(self.files, self.opener, self.reading, self.comm.rank, self.comm.size)
        waiting: deque[tuple[list[Block], Future[tuple[Tokens, Part]]]] = deque()
        with ThreadPoolExecutor(self.workers) as pool:
            for blocks in _rounds(reader.blocks(start), self.comm.size):
                future = pool.submit(self._encode, blocks, writer.split)
                waiting.append(([block._replace(data=None) for block in blocks], future))
                if len(waiting) > 2 * self.workers:
                    self._write(writer, *waiting.popleft())
            while waiting:
                self._write(writer, *waiting.popleft())

    def _encode(self, blocks: list[Block], split: str) -> tuple[Tokens, Part]:
        """Tokenise this rank's block of a round."""
        part = Part([block.position for block in blocks])
        if self.comm.rank >= len(blocks):
            return np.empty(0, DTYPE), part
        block = blocks[self.comm.rank]
        file = self.files[block.position.file]
        try:
            found = read_documents(block, file, self.reading, self.val_every, split)
        except ValueError as error:
            return np.empty(0, DTYPE), replace(part, error=str(error))
        if block.position.record == block.position.offset == 0 or block.number % CHECK_EVERY == 0:
            self.encoder.check(found.texts, file.name)
        tokens = self.encoder.encode(found.texts, found.continues)
        text_bytes = sum(map(len, found.texts))
        return tokens, replace(part, n_tokens=len(tokens), text_bytes=text_bytes, bad=found.bad,
                               messages=found.messages[:MAX_MESSAGES])  # fmt: skip

    def _write(
        self, writer: ShardWriter, blocks: list[Block], future: Future[tuple[Tokens, Part]]
    ) -> None:
        tokens, part = future.result()
        parts = self.comm.allgather(part)  # all ranks: the sizes say where each one writes
        for error in (p.error for p in parts if p.error):
            raise ValueError(error)
        if any(p.positions != part.positions for p in parts):
            raise ValueError(
                "the ranks do not read the same files. Fix: put them on shared storage"
            )
        if blocks:
            writer.add(tokens, parts)
            self.progress.show(blocks[-1], parts, writer)


class Progress:
    """Counts, and a bar over the stored bytes of all files.

    Args:
        files: In order.
        quiet: No bar.
        is_main: Rank 0, which also names the first documents that are left out.
    """

    def __init__(self, files: list[SourceFile], quiet: bool, is_main: bool) -> None:
        from tqdm import tqdm

        self.ends = np.cumsum([0, *(file.n_bytes for file in files)])
        self.tokens = self.text_bytes = self.messages = 0
        self.is_main = is_main
        self.began = time.perf_counter()
        self.bar = tqdm(
            total=int(self.ends[-1]), disable=quiet or not is_main, unit="B", unit_scale=True,
            bar_format="{percentage:3.0f}% {bar:20} {elapsed}, {remaining} left{postfix}",
        )  # fmt: skip

    def show(self, block: Block, parts: list[Part], writer: ShardWriter) -> None:
        """Advance to the end of a block."""
        for message in (message for part in parts for message in part.messages):
            self.messages += 1
            if self.messages <= MAX_MESSAGES and self.is_main:
                self.bar.write(f"left out: {message.partition('. ')[0]}", file=sys.stderr)
        self.tokens += sum(part.n_tokens for part in parts)
        self.text_bytes += sum(part.text_bytes for part in parts)
        if self.bar.disable:
            return
        done = int(self.ends[block.position.file]) + block.stored_bytes
        n_shards = writer.expected_shards(done / max(1, int(self.ends[-1])))
        self.bar.set_postfix_str(
            f"shard {len(writer.manifest.shards)} of about {n_shards}, {self.rates()}",
            refresh=False,
        )
        self.bar.update(done - self.bar.n)

    def rates(self) -> str:
        """Return what was done per second, for people."""
        elapsed_s = time.perf_counter() - self.began
        tokens_per_s, mb_per_s = self.tokens / elapsed_s, self.text_bytes / elapsed_s / 1e6
        return f"{tokens_per_s:,.0f} tokens/s, {mb_per_s:.1f} MB/s of text"


def _rounds(blocks: Iterator[Block], n_ranks: int) -> Iterator[list[Block]]:
    """Yield a block for each rank, and at last none, so that all ranks end together."""
    while round_ := list(islice(blocks, n_ranks)):
        yield round_
    yield []
