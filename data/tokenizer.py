"""Build GPT-2's byte-pair encoding from the merges in this folder, without network."""

import hashlib
import json
from functools import cache
from pathlib import Path

import tiktoken

from errors import BadInput

MERGES = Path(__file__).parent / "gpt2" / "vocab.bpe"
MERGES_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
VOCAB_SIZE = 50257
END_OF_TEXT = "<|endoftext|>"
EOT_BYTES = END_OF_TEXT.encode()
EOT_TOKEN = 50256


def _byte_symbols() -> dict[str, int]:
    """Map GPT-2's printable symbol of each byte to the byte, in the order of their ids.

    Printable latin-1 bytes stand for themselves; the others are shifted to U+0100 and on.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1)]
    printable += range(ord("®"), ord("ÿ") + 1)
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


@cache
def _load_merges() -> list[str]:
    """Return the token that each merge makes, in GPT-2's symbols and in the order of their ids."""
    raw = MERGES.read_bytes()
    if hashlib.sha256(raw).hexdigest() != MERGES_SHA256:
        raise BadInput(str(MERGES), "not GPT-2's merges (wrong SHA-256)", "restore it from git")
    lines = raw.decode().splitlines()[1:]  # the first line is "#version: 0.2"
    return [line.replace(" ", "") for line in lines]


@cache
def load_tokens() -> list[bytes]:
    """Return the bytes of every token but the special one, in the order of their ids."""
    symbols = _byte_symbols()
    to_latin_1 = {ord(symbol): byte for symbol, byte in symbols.items()}
    merged = [token.translate(to_latin_1).encode("latin-1") for token in _load_merges()]
    return [bytes([byte]) for byte in symbols.values()] + merged


def build_tokenizer() -> tiktoken.Encoding:
    """Return GPT-2's tokenizer; ids are the same as `tiktoken.get_encoding("gpt2")`'s."""
    return tiktoken.Encoding(
        "gpt2",
        pat_str=PATTERN,
        mergeable_ranks={token: rank for rank, token in enumerate(load_tokens())},
        special_tokens={END_OF_TEXT: EOT_TOKEN},
        explicit_n_vocab=VOCAB_SIZE,
    )


# One for all callers; threads need their own: two that share one are no faster than one thread.
load_tokenizer = cache(build_tokenizer)


def save_hf_tokenizer(folder: Path, block_size: int) -> None:
    """Write the tokenizer files that `AutoTokenizer.from_pretrained(folder)` reads."""
    tokens = [*_byte_symbols(), *_load_merges(), END_OF_TEXT]
    vocab = {token: rank for rank, token in enumerate(tokens)}
    config = {
        "tokenizer_class": "GPT2Tokenizer",
        "model_max_length": block_size,
        "add_prefix_space": False,
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "unk_token": END_OF_TEXT,
    }
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_bytes(MERGES.read_bytes())
    text = json.dumps(config, indent=2) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
