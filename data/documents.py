"""Blocks -> documents, each checked; what is wrong is named by file and line."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import orjson

from data.blocks import BYTE_ORDER_MARK, SKIP, BadInputError, Block, Reading, split_documents
from data.index import LITERAL
from data.sources import LINES, TEXT, SourceFile
from data.tokenizer import EOT_BYTES

LEADING_MARK = re.compile(rb"\A(\s*)" + BYTE_ORDER_MARK)  # of a file that was joined to others


class Documents(NamedTuple):
    """Documents of one block, in UTF-8; the first may continue the last one of the block before."""

    texts: list[bytes]
    continues: bool
    bad: Counter[str]  # what was left out, and how often; and LITERAL
    messages: list[str]  # the same with file and line


def read_documents(
    block: Block, file: SourceFile, how: Reading, val_every: int, split: str
) -> Documents:
    """Return the documents of a block that belong to a split.

    Args:
        block: With its data.
        file: Where it is from.
        how: Limits and names.
        val_every: One document in so many is validation: by line, row, or the sum of the numbers of
            the `.txt` file and of the document in it; 0 takes all of them for any split.
        split: "train" or "val".

    Raises:
        BadInputError: A bad document, unless `how` says to leave it out.
        ValueError: The file could not be read.
    """
    texts, bad, messages = [], Counter[str](), []
    first = block.position.file + block.position.record
    goes_on = file.kind == TEXT and block.position.offset > 0  # with the rest of a document

    def is_of_split(record: int) -> bool:
        return not val_every or (split == "val") == (record % val_every == 0)

    for record, text in _records(block, file, how):
        if isinstance(text, BadInputError):
            if not how.skip_bad:
                raise text
            bad[text.what] += 1
            messages.append(str(text))
            continue
        bad[LITERAL] += EOT_BYTES in text and file.kind != TEXT
        if is_of_split(record):
            is_rest = goes_on and record == first
            texts.append(text if is_rest else LEADING_MARK.sub(rb"\1", text))
    continues = goes_on and is_of_split(first)
    return Documents(texts, continues, +bad, messages)


def _records(
    block: Block, file: SourceFile, how: Reading
) -> Iterator[tuple[int, bytes | BadInputError]]:
    """Yield the number of each record and its text, or what is wrong with it."""
    first = block.position.record
    if isinstance(block.data, BadInputError):
        yield first, block.data
    elif file.kind == TEXT:
        at, goes_on = block.position, block.position.offset > 0
        pieces = [block.data] if how.literal_endoftext else split_documents(block.data, goes_on)
        for number, text in enumerate(pieces, at.file + at.record):
            yield number, text
    elif file.kind == LINES:
        for number, line in enumerate(block.data.split(b"\n"), first):
            if line and not line.isspace():
                yield number, _text_of_line(line, f"{file.url}:{number + 1}", how)
    else:
        for number, cell in enumerate(_cells(block.data), first):
            yield number, _text_of_cell(cell, f"{file.url}:row {number + 1}", how)


def _text_of_line(line: bytes, where: str, how: Reading) -> bytes | BadInputError:
    if len(line) > how.max_line_bytes:
        return _too_long(where, how)
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError:  # or a lone surrogate, or a byte order mark at the beginning
        try:
            record = json.loads(line.decode("utf-8-sig"))
        except UnicodeDecodeError:
            return BadInputError(where, "not UTF-8")
        except (ValueError, RecursionError):
            return BadInputError(where, "not JSON")
    if not isinstance(record, dict) or how.text_column not in record:
        return BadInputError(where, f'no "{how.text_column}" in this line')
    text = record[how.text_column]
    if not isinstance(text, str):
        kind = "null" if text is None else type(text).__name__
        return BadInputError(where, f'"{how.text_column}" is {kind}, not a string')
    if "\0" in text:
        return BadInputError(where, "NUL in text")
    try:
        return text.encode()
    except UnicodeEncodeError:  # surrogates: joined or replaced, as tiktoken does
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()


def _text_of_cell(cell: bytes | None, where: str, how: Reading) -> bytes | BadInputError:
    if cell is None:
        return BadInputError(where, f'"{how.text_column}" is null, not a string')
    if len(cell) > how.max_line_bytes:
        return _too_long(where, how)
    try:
        cell.decode()  # Parquet's strings are not checked when they are read
    except UnicodeDecodeError:
        return BadInputError(where, "not UTF-8")
    return cell


def _cells(column: Any) -> list[bytes | None]:
    import pyarrow

    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pyarrow.types.is_string_view(column.type):  # which has no cast to bytes
        column = column.cast(pyarrow.large_string())
    return column.cast(pyarrow.large_binary()).to_pylist()


def _too_long(where: str, how: Reading) -> BadInputError:
    what = f"longer than {how.max_line_bytes:,} bytes"
    return BadInputError(where, what, f"raise --max_line_bytes, or {SKIP}")
