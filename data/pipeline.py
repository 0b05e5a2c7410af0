"""Turn blocks into tokens and tokens into shards: reading, tokenising and writing overlap."""

import sys
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import numpy as np

from data.blocks import FileBlock, Reader
from data.documents import read_documents
from data.encode import Encoder
from data.index import Position
from data.shards import DTYPE, Tokens
from data.sources import SourceFile
from data.writing import Part, ShardWriter
from errors import BadInput

MAX_MESSAGES = 10  # documents left out that are named
CHECK_EVERY = 64  # blocks, beside the first of each file, on which the tokenizers are compared
BAR_FORMAT = "{percentage:3.0f}% {bar:20} {elapsed}, {remaining} left{postfix}"


@dataclass(frozen=True)
class Pipeline:
    """What turns the blocks of all files into shards.

    Args:
        reader: Reads the blocks.
        encoder: Tokenises them.
        workers: Threads that tokenise.
        val_every: Every val_every-th document is validation; 0 where shard 0 is.
        comm: The ranks that share the work.
        progress: Counts and shows.
    """

    reader: Reader
    encoder: Encoder
    workers: int
    val_every: int
    comm: Any
    progress: "ProgressBar"

    def write_split(self, writer: ShardWriter, start: Position) -> None:
        """Write the documents of the writer's split, from a position on (all ranks).

        At most 2 · workers + 1 blocks are in memory.

        Raises:
            BadInput: Damage; the same on every rank.
        """
        waiting: deque[tuple[list[FileBlock], Future[tuple[Tokens, Part]]]] = deque()
        with ThreadPoolExecutor(self.workers) as pool:
            for blocks in _rounds(self.reader.blocks(start), self.comm.size):
                future = pool.submit(self._encode, blocks, writer.split)
                # Without data: the worker frees the text, only its tokens wait here.
                waiting.append(([block._replace(data=None) for block in blocks], future))
                if len(waiting) > 2 * self.workers:
                    self._write(writer, *waiting.popleft())
            while waiting:
                self._write(writer, *waiting.popleft())

    def _encode(self, blocks: list[FileBlock], split: str) -> tuple[Tokens, Part]:
        """Tokenise this rank's block of a round."""
        positions = [block.position for block in blocks]
        no_tokens = np.empty(0, DTYPE)
        if self.comm.rank >= len(blocks):
            return no_tokens, Part(positions)
        block = blocks[self.comm.rank]
        file = self.reader.files[block.position.file]
        try:
            found = read_documents(block, file, self.reader.options, self.val_every, split)
        except BadInput as error:
            return no_tokens, Part(positions, error=error)
        begins_file = block.position.record == block.position.offset == 0
        if begins_file or block.number % CHECK_EVERY == 0:
            self.encoder.compare_with_tiktoken(found.texts, file.name)
        tokens = self.encoder.encode(found.texts, found.continues)
        text_bytes = sum(map(len, found.texts))
        messages = found.messages[:MAX_MESSAGES]
        return tokens, Part(positions, len(tokens), text_bytes, found.bad, messages)

    def _write(
        self, writer: ShardWriter, blocks: list[FileBlock], future: Future[tuple[Tokens, Part]]
    ) -> None:
        tokens, part = future.result()
        parts = self.comm.allgather(part)  # all ranks: the sizes say where each one writes
        errors = [other.error for other in parts if other.error]
        if errors:
            raise errors[0]
        if any(other.positions != part.positions for other in parts):
            what = "the ranks do not read the same files"
            raise BadInput("INPUT", what, "put them on shared storage")
        if blocks:
            writer.add(tokens, parts)
            self.progress.show(blocks[-1], parts, writer)


class ProgressBar:
    """Counts, and a bar over the stored bytes of all files.

    Args:
        files: In order.
        quiet: No bar.
        is_main: Rank 0, which also names the first documents that are left out.
    """

    def __init__(self, files: list[SourceFile], quiet: bool, is_main: bool) -> None:
        from tqdm import tqdm

        self.ends = np.cumsum([0, *(file.n_bytes for file in files)]).tolist()
        self.tokens = self.text_bytes = self.messages = 0
        self.is_main = is_main
        self.began = time.perf_counter()
        hidden = quiet or not is_main
        self.bar = tqdm(
            total=self.ends[-1], disable=hidden, unit="B", unit_scale=True, bar_format=BAR_FORMAT
        )

    def show(self, block: FileBlock, parts: list[Part], writer: ShardWriter) -> None:
        """Advance to the end of a block."""
        for message in chain.from_iterable(part.messages for part in parts):
            self.messages += 1
            if self.messages <= MAX_MESSAGES and self.is_main:
                what, _, _ = message.partition(". ")
                self.bar.write(f"left out: {what}", file=sys.stderr)
        self.tokens += sum(part.n_tokens for part in parts)
        self.text_bytes += sum(part.text_bytes for part in parts)
        if self.bar.disable:
            return
        done = self.ends[block.position.file] + block.stored_bytes
        n_shards = writer.expected_shards(done / max(1, self.ends[-1]))
        shown = f"shard {len(writer.index.shards)} of about {n_shards}, {self.rates()}"
        self.bar.set_postfix_str(shown, refresh=False)
        self.bar.update(done - self.bar.n)

    def rates(self) -> str:
        """Return tokens and bytes of text per second, as text."""
        elapsed_s = time.perf_counter() - self.began
        mb_per_s = self.text_bytes / elapsed_s / 1e6
        return f"{self.tokens / elapsed_s:,.0f} tokens/s, {mb_per_s:.1f} MB/s of text"


def _rounds(blocks: Iterator[FileBlock], n_ranks: int) -> Iterator[list[FileBlock]]:
    """Yield a block for each rank, and at last none, so that all ranks end together."""
    while True:
        round_ = list(islice(blocks, n_ranks))
        yield round_
        if not round_:
            return
