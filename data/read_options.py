"""How source files are read, and what a user can do about bad ones."""

from dataclasses import dataclass

SKIP = "leave it out with --on_error skip"
FIX_OR_SKIP = f"correct it, or {SKIP}"


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
