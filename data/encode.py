"""Tokenise documents, `<|endoftext|>` before each, with gigatoken where it is installed."""

import sys
import tempfile
from binascii import b2a_base64
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue

import numpy as np
from numpy.typing import NDArray

from data.shards import Tokens
from data.tokenizer import EOT_BYTES, EOT_TOKEN, build_tokenizer, load_tokenizer, load_tokens

SAMPLE_BYTES = 2**15  # of a block, on which the tokenizers are compared
RENEW_BYTES = 2**28  # gigatoken remembers every word: a fresh one bounds its memory
# What tokenizers get wrong: white space, contractions, digits, scripts, the separator as text.
TRICKY = (
    "  two  spaces\n\n\ttab \u00a0\u3000 end   ", "", " ", "I'll don't 'S 'twas o''clock I'M",
    "3.14 ²⅞Ⅷ ٣٤ 10000000",
    "naïve e\u0301 日本語テキスト한국어עברית", "🙂👩‍👩‍👧 \ufeff\u200b\x1c\x85",
    "<|endoftext|", "x" * 5000, "\r\n\r\n end\n",
)  # fmt: skip


# Returns the tokens of documents with separators; serves one thread at a time.
Encode = Callable[[bytes], NDArray[np.uint32]]


class Encoder:
    """Tokenise lists of documents, from several threads at once.

    Args:
        tokenizer: "auto" takes gigatoken if it is installed and agrees with tiktoken on hard
            texts; "tiktoken" is always tiktoken.
    """

    def __init__(self, tokenizer: str = "auto") -> None:
        # Idle tokenizers, each with the bytes that it has seen.
        self._idle: SimpleQueue[tuple[Encode, int]] = SimpleQueue()
        self._build: Callable[[], Encode] = build_tiktoken
        if tokenizer == "auto":
            with suppress(ImportError):
                import gigatoken  # noqa: F401 # it is there

                self._build = build_gigatoken
            tricky = [text.encode() for text in TRICKY]
            self.compare_with_tiktoken(tricky, "texts that are hard to tokenise")

    @property
    def name(self) -> str:
        """The library that is in use."""
        return self._build.__name__.removeprefix("build_")

    def encode(self, texts: list[bytes], continues: bool = False) -> Tokens:
        """Return the tokens of UTF-8 texts, `<|endoftext|>` before each but one that continues."""
        joined = EOT_BYTES + EOT_BYTES.join(texts)
        if joined.count(EOT_BYTES) == len(texts):
            tokens = self._encode_joined(joined)
        else:  # one of them holds the separator as text
            tokens = _encode_each(texts)
        return tokens[1:] if continues else tokens

    def compare_with_tiktoken(self, texts: list[bytes], where: str) -> None:
        """Check gigatoken, if it is used, on the first texts; warn and drop it where it differs."""
        if self._build is build_tiktoken:
            return
        sample: list[bytes] = []
        left = SAMPLE_BYTES
        for text in texts:
            # `errors="ignore"`: the sample may end within a character.
            sample.append(text[:left].decode(errors="ignore").encode())
            left -= len(text)
            if left <= 0:
                break
        if not np.array_equal(self.encode(sample), _encode_each(sample)):
            self._build = build_tiktoken  # first: what is built after it goes into the new queue
            self._idle = SimpleQueue()
            what = f"gigatoken differs from tiktoken on {where}; using tiktoken"
            print(f"warning: {what}", file=sys.stderr)

    def _encode_joined(self, joined: bytes) -> Tokens:
        idle = self._idle
        try:
            encode, seen_bytes = idle.get_nowait()
        except Empty:
            encode, seen_bytes = self._build(), 0
        tokens = encode(joined).astype(np.uint16)
        seen_bytes += len(joined)
        if seen_bytes < RENEW_BYTES:
            idle.put((encode, seen_bytes))
        return tokens


def build_tiktoken() -> Encode:
    """Return a new tokenizer of the reference library."""
    encoding = build_tokenizer()
    return lambda joined: encoding.encode_to_numpy(joined.decode(), allowed_special="all")


def build_gigatoken() -> Encode:
    """Return a new tokenizer of the fast library."""
    from gigatoken import BytesSource, Tokenizer

    tokens = enumerate(load_tokens())
    lines = [b"%b %d\n" % (b2a_base64(token, newline=False), i) for i, token in tokens]
    with tempfile.TemporaryDirectory(prefix="nanospeed_") as folder:
        path = Path(folder) / "gpt2.tiktoken"
        path.write_bytes(b"".join(lines))
        tokenizer = Tokenizer.from_tiktoken(path, "gpt2", {EOT_BYTES.decode(): EOT_TOKEN})

    def encode(joined: bytes) -> NDArray[np.uint32]:
        # One row, so no padding. Unlike gigatoken's `encode`, this lets other threads run.
        rows, _ = tokenizer.encode_batch_padded(BytesSource(joined), 0, parallel=False)
        return rows[0]

    return encode


def _encode_each(texts: list[bytes]) -> Tokens:
    encode = load_tokenizer().encode_ordinary
    tokens: list[int] = []
    for text in texts:
        tokens += [EOT_TOKEN, *encode(text.decode())]
    return np.array(tokens, np.uint16)
