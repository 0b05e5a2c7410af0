"""Documents -> tokens: `<|endoftext|>` before each, with the fast tokenizer where it is there."""

import sys
import tempfile
from binascii import b2a_base64
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np

from data.shards import Tokens
from data.tokenizer import END_OF_TEXT, EOT_TOKEN, load_tokenizer, load_tokens

EOT_BYTES = END_OF_TEXT.encode()
SAMPLE_BYTES = 2**15  # compared on the first block of every file
RENEW_BYTES = 2**28  # gigatoken remembers every word: a fresh one bounds its memory
# What tokenizers stumble over: white space, contractions, digits, scripts, the separator as text.
TRICKY = (
    "  two  spaces\n\n\ttab \u00a0\u3000 end   ", "", " ", "I'll don't 'S 'twas o''clock I'M",
    "3.14 ²⅞Ⅷ ٣٤ 10000000",
    "naïve e\u0301 日本語テキスト한국어עברית", "🙂👩‍👩‍👧 \ufeff\u200b\x1c\x85",
    "<|endoftext|", "x" * 5000, "\r\n\r\n end\n",
)  # fmt: skip


class Encoder:
    """Tokenise lists of documents, from several threads at once.

    Args:
        tokenizer: "auto" takes gigatoken if it is installed and agrees with tiktoken on hard
            texts; "tiktoken" does not ask.
    """

    def __init__(self, tokenizer: str = "auto") -> None:
        self._reference = load_tokenizer()
        self._idle: SimpleQueue[tuple[Any, int]] = SimpleQueue()  # gigatokens and bytes seen
        self.name = "tiktoken"
        if tokenizer == "auto" and _has_gigatoken():
            self.name = "gigatoken"
            self.check([text.encode() for text in TRICKY], "texts that are hard to tokenise")

    def encode(self, texts: list[bytes], continues: bool = False) -> Tokens:
        """Return the tokens of UTF-8 texts, `<|endoftext|>` before each but one that continues."""
        joined = EOT_BYTES + EOT_BYTES.join(texts)
        if joined.count(EOT_BYTES) != len(texts):  # one of them holds the separator as text
            tokens = self._encode_each(texts)
        elif self.name == "gigatoken":
            tokens = self._encode_fast(joined)
        else:
            whole = self._reference.encode_to_numpy(joined.decode(), allowed_special={END_OF_TEXT})
            tokens = whole.astype(np.uint16)
        return tokens[1:] if continues else tokens

    def check(self, texts: list[bytes], where: str) -> None:
        """Compare both tokenizers on the first texts; warn and use tiktoken if they differ."""
        sample, size = [], 0
        for text in texts:
            sample.append(text[: SAMPLE_BYTES - size].decode(errors="ignore").encode())
            size += len(text)
            if size >= SAMPLE_BYTES:
                break
        if self.name == "gigatoken" and not np.array_equal(
            self.encode(sample), self._encode_each(sample)
        ):
            self.name = "tiktoken"
            print(f"warning: gigatoken differs from tiktoken on {where}; using tiktoken",
                  file=sys.stderr)  # fmt: skip

    def _encode_each(self, texts: list[bytes]) -> Tokens:
        encode = self._reference.encode_ordinary
        tokens = [token for text in texts for token in [EOT_TOKEN, *encode(text.decode())]]
        return np.array(tokens, np.uint16)

    def _encode_fast(self, joined: bytes) -> Tokens:
        from gigatoken import BytesSource

        try:
            tokenizer, seen_bytes = self._idle.get_nowait()
        except Empty:  # one object serves one thread at a time
            tokenizer, seen_bytes = _load_gigatoken(), 0
        # One row, so no padding; unlike `encode`, this call leaves the interpreter to others.
        rows, _ = tokenizer.encode_batch_padded(BytesSource(joined), pad_id=0, parallel=False)
        if seen_bytes + len(joined) < RENEW_BYTES:
            self._idle.put((tokenizer, seen_bytes + len(joined)))
        return rows[0].astype(np.uint16)


def _load_gigatoken() -> Any:
    import gigatoken

    lines = [b"%b %d\n" % (b2a_base64(t, newline=False), i) for i, t in enumerate(load_tokens())]
    with tempfile.TemporaryDirectory(prefix="nanospeed_") as folder:
        path = Path(folder) / "gpt2.tiktoken"
        path.write_bytes(b"".join(lines))
        return gigatoken.Tokenizer.from_tiktoken(path, "gpt2", {END_OF_TEXT: EOT_TOKEN})


def _has_gigatoken() -> bool:
    try:
        import gigatoken  # noqa: F401 # the question is whether it can be
    except ImportError:
        return False
    return True
