"""Turn blocks into checked documents; name what is wrong by file and line."""

import json
import re
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

import orjson

from data.blocks import Cells, FileBlock, ReadOptions
from data.fields import find_field, name_fields
from data.index import LITERAL
from data.plain_text import BYTE_ORDER_MARK, split_documents
from data.remedies import FIX_OR_SKIP, SKIP, not_utf8
from data.sources import LINES, ROWS, TEXT, SourceFile
from data.tokenizer import EOT_BYTES
from errors import BadInput

LEADING_MARK = re.compile(rb"\A(\s*)" + BYTE_ORDER_MARK)  # of a file that was joined to others


Record = bytes | BadInput | None  # None: a cell that is null


class Documents(NamedTuple):
    """Documents of one block, in UTF-8; the first may continue the last one of the block before."""

    texts: list[bytes]
    continues: bool
    bad: Counter[str]  # what was left out, and how often; and LITERAL
    messages: list[str]  # the same with file and line


def read_documents(
    block: FileBlock, file: SourceFile, options: ReadOptions, val_every: int, split: str
) -> Documents:
    """Return the documents of a block that belong to a split.

    Args:
        block: With its data.
        file: Where it is from.
        options: Limits and names.
        val_every: Every val_every-th document is validation: by line, row, or the sum of the
            numbers of the `.txt` file and of the document in it; 0 takes all for any split.
        split: "train" or "val".

    Raises:
        BadInput: A bad document or file, unless the options say to leave it out.
    """
    first = block.position.record
    if file.kind == TEXT:
        first += block.position.file
    is_continued = file.kind == TEXT and block.position.offset > 0

    def is_of_split(number: int) -> bool:
        return not val_every or (split == "val") == (number % val_every == 0)

    found = Documents([], is_continued and is_of_split(first), Counter(), [])
    for number, record in _records(block, file, options, first):
        try:
            text = _text_of(record, file, number, options)
        except BadInput as error:
            if not options.skip_bad:
                raise
            found.bad[error.what] += 1
            found.messages.append(str(error))
            continue
        # Also adds 0: the key stands where the first good document is, as in every shards.json.
        found.bad[LITERAL] += file.kind != TEXT and EOT_BYTES in text
        if is_of_split(number):
            is_rest = is_continued and number == first
            found.texts.append(text if is_rest else LEADING_MARK.sub(rb"\1", text))
    return found._replace(bad=+found.bad)  # without zeros


def _records(
    block: FileBlock, file: SourceFile, options: ReadOptions, first: int
) -> Iterable[tuple[int, Record]]:
    """Return the records of a block with their numbers, from `first` on."""
    data = block.data
    assert data is not None
    if isinstance(data, BadInput):
        return [(first, data)]
    if isinstance(data, Cells):
        import pyarrow

        return enumerate(data.column.cast(pyarrow.large_binary()).to_pylist(), first)
    if file.kind == LINES:
        lines = enumerate(data.split(b"\n"), first)
        return [(number, line) for number, line in lines if line.strip()]
    if options.literal_endoftext:
        return [(first, data)]
    return enumerate(split_documents(data, block.position.offset > 0), first)


def _text_of(record: Record, file: SourceFile, number: int, options: ReadOptions) -> bytes:
    if isinstance(record, BadInput):
        raise record
    row = "row " if file.kind == ROWS else ""
    where = f"{file.url}:{row}{number + 1}"
    if record is None:
        raise BadInput(where, f'"{options.text_column}" is null, not a string', FIX_OR_SKIP)
    if file.kind == TEXT:
        return record
    if len(record) > options.max_line_bytes:
        what = f"longer than {options.max_line_bytes:,} bytes"
        raise BadInput(where, what, f"raise --max_line_bytes, or {SKIP}")
    if file.kind == LINES:
        return _text_of_line(record, where, file, options.text_column)
    try:
        record.decode()  # Parquet's strings are not checked when they are read
    except UnicodeDecodeError as error:
        raise BadInput(where, "not UTF-8", FIX_OR_SKIP) from error
    return record


def _text_of_line(line: bytes, where: str, file: SourceFile, column: str) -> bytes:
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError:  # Python accepts lone surrogates, and a byte order mark here
        try:
            record = json.loads(line.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise not_utf8(where, file) from error
        except (ValueError, RecursionError) as error:
            raise BadInput(where, "not JSON", FIX_OR_SKIP) from error
    path, text = find_field(record, column)
    if not isinstance(text, str):
        kind = "null" if text is None else type(text).__name__
        what = f'"{column}" is {kind}, not a string' if path else f'no "{column}" in this line'
        fields = name_fields(record)
        raise BadInput(where, what, f"name one with --text_column ({fields}), or {SKIP}")
    if "\0" in text:
        raise BadInput(where, "NUL in text", FIX_OR_SKIP)
    try:
        return text.encode()
    except UnicodeEncodeError:  # surrogates: joined or replaced, as tiktoken does
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()
