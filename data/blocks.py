"""Read source files as blocks, in order and in bounded memory.

A block is about a MiB of one file: whole lines, whole rows, or a part of a `.txt` file that ends
where no token can reach across. Blocks are numbered in order; of several ranks, each takes its own.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple

from data.fields import find_field, name_fields
from data.index import Position
from data.opening import HEAD_BYTES, UNPACK_ERRORS, Opener, unpack
from data.plain_text import check_text, last_cut, split_documents
from data.remedies import FIX_OR_SKIP, refuse_other_forms
from data.sources import HUB, LINES, ROWS, TEXT, SourceFile
from errors import BadInput

MAX_ROWS = 1024  # of a block: repeated cells are stored once, and are longer than the sizes say
TEXT_TYPES = ("string", "large_string", "string_view", "binary", "large_binary")  # of pyarrow


@dataclass(frozen=True)
class ReadOptions:
    """How files are read.

    Args:
        text_column: Key of a JSON line, or column of a table, that holds the text.
        block_bytes: Of text in a block, but for a longer line.
        table_bytes: The same for tables: a usual row group is one block.
        max_line_bytes: Of one line, table cell, or word of a `.txt`: this bounds the memory.
        max_bytes: Of one compressed file when decompressed.
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


class Cells(NamedTuple):
    """Some cells of a table's column of text."""

    column: Any  # a pyarrow.Array, which has no types


# What is wrong is data too: every rank hears of it in its place. None: another rank loads it.
Data = bytes | Cells | BadInput | None


class FileBlock(NamedTuple):
    """A part of one file.

    Args:
        number: Counted over all files.
        position: Where it begins.
        stored_bytes: Of the file, up to about the end of this block.
    """

    number: int
    position: Position
    data: Data
    stored_bytes: int


@dataclass
class Reader:
    """Read the blocks of all files from a position on.

    Args:
        files: All of them, in order.
        opener: Opens them.
        options: Limits and names.
        rank: Loads every world_size-th block from this one on; the others have no data.
        world_size: Ranks that share the work.
    """

    files: list[SourceFile]
    opener: Opener
    options: ReadOptions
    rank: int
    world_size: int
    n_blocks: int = 0

    def blocks(self, start: Position) -> Iterator[FileBlock]:
        """Yield the blocks in order: the same ones on every rank, whatever it loads.

        Raises:
            OSError: The network fails.
        """
        self.n_blocks = 0
        read = {TEXT: self._read_text, LINES: self._read_lines, ROWS: self._read_rows}
        for number in range(start.file, len(self.files)):
            file = self.files[number]
            at = start if number == start.file else Position(number)
            try:
                if not file.n_bytes:
                    raise BadInput(file.url, "empty file", FIX_OR_SKIP)
                with self.opener.open(number) as raw:
                    refuse_other_forms(raw.read(HEAD_BYTES), file)
                    raw.seek(0)
                    yield from read[file.kind](raw, file, at)
            except BadInput as error:
                yield self._next_block(at, error, file.n_bytes)
            except UNPACK_ERRORS as error:
                # The network's fault is no fault of the file: it is never left out.
                if file.url.startswith(HUB):
                    raise OSError(f"{file.url}: {error}. Fix: start again") from error
                yield self._next_block(at, _unreadable(file.url, error), file.n_bytes)

    def _is_mine(self, number: int) -> bool:
        return number % self.world_size == self.rank

    def _next_block(self, position: Position, data: Data, stored_bytes: int) -> FileBlock:
        number = self.n_blocks
        self.n_blocks += 1
        return FileBlock(number, position, data if self._is_mine(number) else None, stored_bytes)

    def _read_text(self, raw: BinaryIO, file: SourceFile, at: Position) -> Iterator[FileBlock]:
        literal = self.options.literal_endoftext
        check_text(raw, file, literal, self.options.max_line_bytes)
        raw.seek(at.offset)
        record, offset = at.record, at.offset
        size = self.options.block_bytes
        held = b""
        while True:
            # Up to a multiple of the size beyond the last cut: 0.3 MiB held, 0.7 MiB more. A
            # restart there, with nothing held, reads a whole MiB and cuts alike.
            more = raw.read(size - len(held) % size)
            if not more:
                break
            held += more
            cut = last_cut(held, literal)
            if cut:
                part = held[:cut]
                yield self._next_block(Position(at.file, record, offset), part, offset + cut)
                # The last document of the part continues in the next block.
                if not literal:
                    record += len(split_documents(part, offset > 0)) - 1
                offset += cut
                held = held[cut:]
        if held:
            yield self._next_block(Position(at.file, record, offset), held, file.n_bytes)

    def _read_lines(self, raw: BinaryIO, file: SourceFile, at: Position) -> Iterator[FileBlock]:
        record, offset = at.record, at.offset
        stream = unpack(raw, file.packing)
        if stream.seek(offset) != offset:  # decompresses up to there
            what = f"ends before byte {offset:,} of its lines, where the preparation stopped"
            raise BadInput(file.url, what, "put back the whole file, or give an empty --out_dir")
        while True:
            data = stream.read(self.options.block_bytes)
            if not data:
                return
            end = offset + len(data)
            n_lines = data.count(b"\n")
            if not data.endswith(b"\n"):
                rest = stream.readline(self.options.max_line_bytes)
                data += rest
                end += len(rest)
                # The line is too long: its beginning is enough to say so, its rest is not kept.
                while rest and not rest.endswith(b"\n"):
                    rest = stream.readline(self.options.block_bytes)
                    end += len(rest)
                    self._check_size(file, end)
                n_lines += 1
            self._check_size(file, end)
            if not offset:
                refuse_other_forms(data, file)
            yield self._next_block(Position(at.file, record, offset), data, raw.tell())
            record += n_lines
            offset = end

    def _check_size(self, file: SourceFile, n_bytes: int) -> None:
        if n_bytes > max(file.n_bytes, self.options.max_bytes):
            what = f"expands beyond {self.options.max_bytes:,} bytes"
            raise BadInput(file.url, what, "raise --max_bytes if it is meant to")

    def _read_rows(self, raw: BinaryIO, file: SourceFile, at: Position) -> Iterator[FileBlock]:
        from pyarrow import ArrowException, parquet

        try:
            table = parquet.ParquetFile(raw, pre_buffer=False)
        except ArrowException as error:
            raise OSError(error) from error
        path = _text_path(table, file.url, self.options.text_column)
        column = [leaf.path for leaf in table.schema].index(".".join(path))
        n_rows = max(1, table.metadata.num_rows)
        first = 0
        for group in range(table.num_row_groups):
            size = table.metadata.row_group(group)
            mean_bytes = size.column(column).total_uncompressed_size / max(1, size.num_rows)
            rows = min(MAX_ROWS, max(1, int(self.options.table_bytes / max(1, mean_bytes))))
            begins = range(first, first + size.num_rows, rows)
            # After a restart, the blocks before that row are there already and have no numbers.
            n_wanted = sum(begin >= at.record for begin in begins)
            numbers = range(self.n_blocks, self.n_blocks + n_wanted)
            data: Iterable[Data] = [None] * len(begins)
            if any(self._is_mine(number) for number in numbers):
                data = self._read_group(table, file.url, group, rows, path)
            for begin, cells in zip(begins, data, strict=True):
                if begin >= at.record:
                    stored_bytes = file.n_bytes * min(n_rows, begin + rows) // n_rows
                    yield self._next_block(Position(at.file, begin), cells, stored_bytes)
            first += size.num_rows

    def _read_group(
        self, table: Any, name: str, group: int, rows: int, path: list[str]
    ) -> Iterator[Cells | BadInput]:
        """Yield the column of text, `rows` at a time; from damage on, what is wrong instead."""
        from pyarrow import ArrowException, compute

        left = table.metadata.row_group(group).num_rows
        wrong: Exception = EOFError("too few rows")
        try:
            for batch in table.iter_batches(rows, [group], [".".join(path)]):
                if not left or len(batch) != min(rows, left):
                    break
                left -= len(batch)
                yield Cells(compute.struct_field(batch.to_struct_array(), path))  # type: ignore
        except (ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno:  # the disk's or the network's fault
                raise
            wrong = error
        # One for each block that is missing: ranks that do not read the group count them too.
        for _ in range(0, left, rows):
            yield _unreadable(f"{name}:row group {group + 1}", wrong)


def _unreadable(where: str, error: Exception) -> BadInput:
    return BadInput(where, f"cannot be read ({' '.join(str(error).split())})", FIX_OR_SKIP)


def _text_path(table: Any, name: str, text_column: str) -> list[str]:
    """Return the names that lead to the column of text in an open Parquet file."""
    import pyarrow

    tree = _field_tree(pyarrow.struct(list(table.schema_arrow)))
    path, kind = find_field(tree, text_column)
    if not isinstance(kind, str):
        kind = "a struct" if isinstance(kind, dict) else kind
        wrong = f'column "{text_column}" is {kind}' if path else f'no column "{text_column}"'
        raise BadInput(name, f"{wrong}, it has {name_fields(tree)}", "name one with --text_column")
    return path


def _field_tree(kind: Any) -> Any:
    """Return a type as find_field reads it: structs are dictionaries, and only texts strings."""
    from pyarrow.types import is_dictionary, is_struct

    if is_struct(kind):
        return {field.name: _field_tree(field.type) for field in kind}
    if is_dictionary(kind):
        kind = kind.value_type
    return str(kind) if str(kind) in TEXT_TYPES else kind
