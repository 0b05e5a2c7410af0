"""Check the text of a `.txt` file, cut it where no token reaches across, split its documents."""

import re
from functools import partial
from typing import BinaryIO

from data.remedies import FIX_OR_SKIP, SKIP, not_utf8
from data.sources import SourceFile
from data.tokenizer import EOT_BYTES
from errors import BadInput

# GPT-2's pattern joins white space only to what follows it, and looks ahead only past white space:
# before a space or newline that follows anything else (Unicode's white space in UTF-8 excluded),
# a text can be cut and its parts tokenised alone. Not after a byte order mark: it may be all.
SAFE_CUT = re.compile(
    rb"(?<=[!-~\x80-\xff])(?<!\xc2[\x85\xa0])(?<!\xe1\x9a\x80)(?<!\xe2\x80[\x80-\x8a\xa8\xa9\xaf])"
    rb"(?<!\xe2\x81\x9f)(?<!\xe3\x80\x80)(?<!\xef\xbb\xbf)[ \n]"
)
SEPARATOR = re.escape(EOT_BYTES)
# The same where the separator parts documents: also before one, but not right after it, where the
# next block would seem to continue a document that may be white space alone.
SAFE_CUT_OR_SEPARATOR = re.compile(rb"(?<!%b)%b|(?=%b)" % (SEPARATOR, SAFE_CUT.pattern, SEPARATOR))
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
BLANK = BYTE_ORDER_MARK + b" \t\n\r\v\f"
TAIL_BYTES = 4096  # of a part, which usually hold a place to cut


def _safe_cuts(literal_endoftext: bool) -> re.Pattern[bytes]:
    return SAFE_CUT if literal_endoftext else SAFE_CUT_OR_SEPARATOR


def check_text(raw: BinaryIO, file: SourceFile, literal_endoftext: bool, max_bytes: int) -> None:
    """Read a whole `.txt` once, so that a bad one is left out as a whole.

    Raises:
        BadInput: It is not UTF-8, holds NUL, or cannot be cut in `max_bytes`; names the line.
    """
    cuts = _safe_cuts(literal_endoftext)
    held = b""  # the beginning of a character that the last part cut in two
    line = 1
    uncut_bytes = 0  # since the last place where the text can be cut
    for more in iter(partial(raw.read, 2**20), b""):
        data = held + more
        uncut_bytes = 0 if cuts.search(data) else uncut_bytes + len(more)
        n_good = len(data)
        try:
            data.decode()
        except UnicodeDecodeError as error:
            n_good = error.start
            if error.reason != "unexpected end of data":
                line += data.count(b"\n", 0, n_good)
                raise not_utf8(f"{file.url}:{line}", file) from error
        if b"\0" in data:
            line += data.count(b"\n", 0, data.index(b"\0"))
            raise BadInput(f"{file.url}:{line}", "NUL in text", FIX_OR_SKIP)
        if uncut_bytes > max_bytes:
            what = f"no white space in {max_bytes:,} bytes"
            raise BadInput(f"{file.url}:{line}", what, f"raise --max_line_bytes, or {SKIP}")
        line += data.count(b"\n", 0, n_good)
        held = data[n_good:]
    if held:
        raise BadInput(f"{file.url}:{line}", "not UTF-8 (cut off)", FIX_OR_SKIP)


def last_cut(data: bytes, literal_endoftext: bool) -> int:
    """Return the last place where `data` can be cut, or 0."""
    cuts = _safe_cuts(literal_endoftext)
    for begin in (max(0, len(data) - TAIL_BYTES), 0):
        places = [found.start() for found in cuts.finditer(data, begin)]
        if places:
            return places[-1]
    return 0


def split_documents(data: bytes, is_continued: bool) -> list[bytes]:
    """Return the documents of a part of a `.txt`; white space alone is none.

    Args:
        data: The part.
        is_continued: It begins with the rest, perhaps empty, of a document: the first result.
    """
    pieces = data.split(EOT_BYTES)
    documents = [piece for piece in pieces[1:] if piece.strip(BLANK)]
    if is_continued or pieces[0].strip(BLANK):
        documents.insert(0, pieces[0])
    return documents
