"""Source files -> blocks: read in order, in bounded memory.

A block is about a MiB of one file: whole lines, whole rows, or a part of a `.txt` file that ends
where no token can reach across. Blocks are numbered in order; of several ranks, each takes its own.
"""

import lzma
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, repeat
from typing import Any, BinaryIO, NamedTuple

from data.index import Position
from data.opening import Opener, unpack
from data.sources import HUB, LINES, ROWS, TEXT, SourceFile
from data.tokenizer import EOT_BYTES

# GPT-2's pattern joins white space only to what follows it, and looks ahead only past white space:
# before a space or newline that follows anything else (Unicode's white space in UTF-8 excluded),
# a text can be cut and its parts tokenised alone. Not after a byte order mark: it may be all.
CUT = re.compile(
    rb"(?<=[!-~\x80-\xff])(?<!\xc2[\x85\xa0])(?<!\xe1\x9a\x80)(?<!\xe2\x80[\x80-\x8a\xa8\xa9\xaf])"
    rb"(?<!\xe2\x81\x9f)(?<!\xe3\x80\x80)(?<!\xef\xbb\xbf)[ \n]"
)
SEPARATOR = re.escape(EOT_BYTES)
# The same where the separator parts documents: also before one, but not right after it, where the
# next block would seem to go on with a document that may be white space alone.
CUT_AT_SEPARATORS = re.compile(rb"(?<!%b)%b|(?=%b)" % (SEPARATOR, CUT.pattern, SEPARATOR))
POINTERS = {
    "Git LFS": re.compile(rb"version https?://(git-lfs|hawser)\.github\.com/spec/"),
    "git-annex": re.compile(rb"[./]*(\.git)?/annex/objects/"),
}
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
BLANK = BYTE_ORDER_MARK + b" \t\n\r\v\f"
POINTER_BYTES = 100  # more than a pointer's beginning
MAX_ROWS = 1024  # of a block: repeated cells are stored once, and longer than they look
SKIP = "leave it out with --on_error skip"
MEND = f"mend it, or {SKIP}"


class BadInputError(ValueError):
    """What is wrong with one document or file, where, and what to do about it."""

    def __init__(self, where: str, what: str, remedy: str = MEND) -> None:
        super().__init__(f"{where}: {what}. Fix: {remedy}")
        self.what = what


@dataclass(frozen=True)
class Reading:
    """How files are read.

    Args:
        text_column: Key of a JSON line, or column of a table, that holds the text.
        block_bytes: Of text in a block, but for a longer line.
        table_bytes: The same for tables: a usual row group is one block.
        max_line_bytes: Of one line, table cell, or word of a `.txt`: this bounds the memory.
        max_bytes: Of one compressed file when uncompressed.
        skip_bad: Leave bad documents out and count them, instead of failing.
        literal_endoftext: `<|endoftext|>` in a `.txt` is text, and parts no documents.
    """

    text_column: str
    block_bytes: int
    table_bytes: int
    max_line_bytes: int
    max_bytes: int
    skip_bad: bool
    literal_endoftext: bool = False

    @property
    def cut(self) -> re.Pattern[bytes]:
        """Where a `.txt` can be cut."""
        return CUT if self.literal_endoftext else CUT_AT_SEPARATORS


class Block(NamedTuple):
    """A part of one file: bytes, a column of a table, or what is wrong; None for another rank."""

    number: int
    position: Position
    data: Any
    stored_bytes: int  # of the file, up to about the end of this block


class Reader:
    """Read the blocks of all files from a position on.

    Args:
        files: All of them, in order.
        opener: Opens them.
        how: Limits and names.
        rank: Loads every world_size-th block from this one on; the others have no data.
        world_size: Ranks that share the work.
    """

    def __init__(
        self, files: list[SourceFile], opener: Opener, how: Reading, rank: int, world_size: int
    ) -> None:
        self.files, self.opener, self.how = files, opener, how
        self.rank, self.world_size = rank, world_size
        self.n_blocks = 0

    def blocks(self, start: Position) -> Iterator[Block]:
        """Yield the blocks in order: the same ones on every rank, whatever it loads.

        Raises:
            OSError: The network fails.
        """
        read = {TEXT: self._read_text, LINES: self._read_lines, ROWS: self._read_rows}
        for number in range(start.file, len(self.files)):
            file, at = self.files[number], start if number == start.file else Position(number)
            try:
                if not file.n_bytes:
                    raise BadInputError(file.url, "empty file")
                with self.opener.open(number) as raw:
                    _refuse_pointer(raw, file.url)
                    yield from read[file.kind](raw, file, at)
            except BadInputError as error:
                yield self._block(at, error, file.n_bytes)
            except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
                if file.url.startswith(HUB):  # the network's fault: never left out
                    raise OSError(f"{file.url}: {error}. Fix: start again") from error
                yield self._block(at, _unreadable(file.url, error), file.n_bytes)

    def _block(self, position: Position, data: Any, stored_bytes: int) -> Block:
        number = self.n_blocks
        self.n_blocks += 1
        mine = number % self.world_size == self.rank
        return Block(number, position, data if mine else None, stored_bytes)

    def _read_text(self, raw: BinaryIO, file: SourceFile, at: Position) -> Iterator[Block]:
        _check_text(raw, file.url, self.how)
        raw.seek(at.offset)
        number, record, offset = at.file, at.record, at.offset
        held, size = b"", self.how.block_bytes
        while more := raw.read(size - len(held) % size):  # cuts depend on the position alone
            held += more
            cut = _last_cut(held, self.how.cut)
            if cut:
                yield self._block(Position(number, record, offset), held[:cut], offset + cut)
                if not self.how.literal_endoftext:
                    record += len(split_documents(held[:cut], offset > 0)) - 1
                offset += cut
                held = held[cut:]
        if held:
            yield self._block(Position(number, record, offset), held, file.n_bytes)

    def _read_lines(self, raw: BinaryIO, file: SourceFile, at: Position) -> Iterator[Block]:
        number, record, offset = at.file, at.record, at.offset
        stream = unpack(raw, file.packing)
        _skip(stream, offset)
        while data := stream.read(self.how.block_bytes):
            n_bytes, n_lines = len(data), data.count(b"\n")
            if not data.endswith(b"\n"):
                data += (rest := stream.readline(self.how.max_line_bytes))
                n_bytes += len(rest)
                while rest and not rest.endswith(b"\n"):  # too long: its head is enough to say so
                    rest = stream.readline(self.how.block_bytes)
                    n_bytes += len(rest)
                    self._check_size(file, offset + n_bytes)
                n_lines += 1
            self._check_size(file, offset + n_bytes)
            yield self._block(Position(number, record, offset), data, raw.tell())
            record, offset = record + n_lines, offset + n_bytes

    def _check_size(self, file: SourceFile, n_bytes: int) -> None:
        if file.packing and n_bytes > self.how.max_bytes:
            what = f"expands beyond {self.how.max_bytes:,} bytes"
            raise BadInputError(file.url, what, "raise --max_bytes if it is meant to")

    def _read_rows(self, raw: BinaryIO, file: SourceFile, at: Position) -> Iterator[Block]:
        from pyarrow import ArrowException, parquet

        try:
            table = parquet.ParquetFile(raw, pre_buffer=False)
        except ArrowException as error:
            raise OSError(error) from error
        column = _text_column(table, file.url, self.how.text_column)
        n_rows, first = max(1, table.metadata.num_rows), 0
        for group in range(table.num_row_groups):
            size = table.metadata.row_group(group)
            mean_bytes = size.column(column).total_uncompressed_size / max(1, size.num_rows)
            rows = min(MAX_ROWS, max(1, int(self.how.table_bytes / max(1, mean_bytes))))
            parts = [p for p in range(0, size.num_rows, rows) if first + p >= at.record]
            mine = [(self.n_blocks + i) % self.world_size == self.rank for i in range(len(parts))]
            skipped = (size.num_rows + rows - 1) // rows - len(parts)
            batches = self._read_group(table, file.url, group, rows) if any(mine) else repeat(None)
            for part, data in zip(parts, islice(batches, skipped, None), strict=False):  # no end
                stored = file.n_bytes * min(n_rows, first + part + rows) // n_rows
                yield self._block(Position(at.file, first + part), data, stored)
            first += size.num_rows

    def _read_group(self, table: Any, name: str, group: int, rows: int) -> Iterator[Any]:
        """Yield the column of text, `rows` at a time; after damage, what is wrong, without end."""
        from pyarrow import ArrowException

        left, wrong = table.metadata.row_group(group).num_rows, EOFError("too few rows")
        try:
            for batch in table.iter_batches(rows, [group], [self.how.text_column]):
                if len(batch) != min(rows, left):
                    break
                left -= len(batch)
                yield batch.column(0)
        except (ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno:  # the disk's or the network's fault
                raise
            wrong = error
        yield from repeat(_unreadable(f"{name}:row group {group + 1}", wrong))


def split_documents(data: bytes, goes_on: bool) -> list[bytes]:
    """Return the documents of a part of a `.txt`; white space alone is none.

    Args:
        data: The part.
        goes_on: It goes on with a document, whose rest, perhaps empty, is the first result.
    """
    pieces = data.split(EOT_BYTES)
    return [p for i, p in enumerate(pieces) if p.strip(BLANK) or (goes_on and i == 0)]


def _unreadable(where: str, error: Exception) -> BadInputError:
    return BadInputError(where, f"cannot be read ({' '.join(str(error).split())})")


def _skip(stream: BinaryIO, n_bytes: int) -> None:
    if stream.seekable():
        stream.seek(n_bytes)  # in a .gz or .xz: reads up to there
        return
    while n_bytes:
        n_bytes -= len(stream.read(min(n_bytes, 2**20)))


def _refuse_pointer(raw: BinaryIO, name: str) -> None:
    head = raw.read(POINTER_BYTES).lstrip(BLANK)
    for tool, start in POINTERS.items():
        if start.match(head):
            raise BadInputError(
                name, f"a {tool} pointer, not the file", f"get the file with {tool}, or {SKIP}"
            )
    raw.seek(0)


def _check_text(raw: BinaryIO, name: str, how: Reading) -> None:
    """Read a whole `.txt` once, so that a bad one is left out as a whole."""
    held, line, uncut = b"", 1, 0
    while more := raw.read(2**20):
        data = held + more
        uncut = 0 if how.cut.search(data) else uncut + len(more)
        try:
            good = len(data)
            data.decode()
        except UnicodeDecodeError as error:
            good = error.start
            if error.reason != "unexpected end of data":
                raise BadInputError(_at(name, line, data, good), "not UTF-8") from error
        if b"\0" in data:
            raise BadInputError(_at(name, line, data, data.index(b"\0")), "NUL in text")
        if uncut > how.max_line_bytes:
            what = f"no white space in {how.max_line_bytes:,} bytes"
            raise BadInputError(f"{name}:{line}", what, f"raise --max_line_bytes, or {SKIP}")
        line, held = line + data.count(b"\n", 0, good), data[good:]
    if held:
        raise BadInputError(f"{name}:{line}", "not UTF-8 (cut off)")


def _at(name: str, line: int, data: bytes, offset: int) -> str:
    lines = data.count(b"\n", 0, offset)
    return f"{name}:{line + lines}"


def _last_cut(data: bytes, where: re.Pattern[bytes]) -> int:
    """Return the last place where `data` can be cut, or 0."""
    for begin in (max(0, len(data) - 4096), 0):
        if cuts := [found.start() for found in where.finditer(data, begin)]:
            return cuts[-1]
    return 0


def _text_column(table: Any, name: str, text_column: str) -> int:
    """Return the number of the column of text in an open Parquet file."""
    from pyarrow import types

    schema = table.schema_arrow
    if text_column not in schema.names:
        what = f'no column "{text_column}", it has {", ".join(schema.names)}'
        raise BadInputError(name, what, "name one with --text_column")
    kind = schema.field(text_column).type
    kind = kind.value_type if types.is_dictionary(kind) else kind
    tests = (types.is_string, types.is_large_string, types.is_string_view, types.is_binary,
             types.is_large_binary)  # fmt: skip
    if not any(test(kind) for test in tests):
        raise BadInputError(name, f'column "{text_column}" is {kind}', "name one of strings")
    return [table.schema.column(i).path for i in range(len(table.schema))].index(text_column)
