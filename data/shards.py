"""Token shards, ours and other people's, as one stream: memory-mapped uint16, read in place.

*_{split}_*.npy                build-nanogpt, and ours
*_{split}_*.bin, *_{split}.bin llm.c: 256 int32 of header (magic, version, tokens), then uint16
{split}.bin                    nanoGPT: uint16 and nothing else
"""

import hashlib
import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data.index import MANIFEST, PARTIAL_SUFFIX, Manifest, hash_file, read_manifest
from data.tokenizer import MERGES_SHA256

Tokens = NDArray[np.uint16]

SPLITS = ("train", "val")
DTYPE = np.dtype("<u2")
HEADER_BYTES = 128  # of a .npy of one dimension, as numpy writes it
CHECKED_TOKENS = 2**20  # of a shard without manifest, when it is opened; the rest when it is read
FINGERPRINT_TOKENS = 2**15  # of either end of a shard
TEXT_TOKENS = 8  # whose bytes are hardly ever all printable: pointers and web pages are
NPY_MAGIC = b"\x93NUMPY"
LLM_C_MAGIC, LLM_C_VERSION, LLM_C_HEADER_BYTES = 20240520, 1, 1024
PREPARE = "Fix: prepare the text with data/prepare.py"


def find_shards(data_dir: Path, split: str) -> list[Path]:
    """Return the shards of one split in order; hidden files are none.

    Raises:
        ValueError: There is none, they are of several kinds, or one has the name of a copy, as
            "x_train_1 (1).npy" beside "x_train_1.npy".
    """
    patterns = (f"*_{split}_*.npy", f"*_{split}_*.bin", f"*_{split}.bin", f"{split}.bin")
    files = {p: [f for f in sorted(data_dir.glob(p)) if f.name[0] != "."] for p in patterns}
    found = {pattern: shards for pattern, shards in files.items() if shards}
    if not found:
        raise ValueError(
            f"--data_dir {data_dir}: no shard {' or '.join(patterns)}. "
            f"Fix: python data/prepare.py TEXT… --out_dir {data_dir}"
        )
    if len(found) > 1:
        raise ValueError(
            f"--data_dir {data_dir}: holds {' and '.join(found)}. "
            "Fix: give each dataset its own folder"
        )
    (shards,) = found.values()
    original = ""
    for path in sorted(shards, key=lambda path: path.stem):
        if original and path.stem.startswith(original) and not path.stem[len(original)].isalnum():
            raise ValueError(
                f"{path}: named like a copy of {original}{path.suffix}. "
                "Fix: move it out of the folder"
            )
        original = path.stem
    return shards


def open_shard(path: Path) -> Tokens:
    """Memory-map one shard.

    Raises:
        ValueError: Not a shard of a known format that fills its file exactly; says what it is.
    """
    with path.open("rb") as file:
        start = file.read(12)
    if path.name.removesuffix(PARTIAL_SUFFIX).endswith(".npy"):
        if not start.startswith(NPY_MAGIC):  # numpy would take it for a pickle
            raise ValueError(f"{path}: not a .npy file, begins with {start!r}. {PREPARE}")
        return _open_npy(path)
    header = np.frombuffer(start[: len(start) // 4 * 4], "<i4")
    if len(header) == 3 and LLM_C_MAGIC in (header[0], header[0].byteswap()):
        return _open_llm_c(path, *map(int, header))
    if path.stem not in SPLITS:
        raise ValueError(f"{path}: no llm.c header, magic {LLM_C_MAGIC}. {PREPARE}")
    return _open_nanogpt(path)


def _open_npy(path: Path) -> Tokens:
    try:
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # numpy answers damage with many types, zipfile's among them
        raise ValueError(f"{path}: not a readable .npy file ({error}). {PREPARE}") from error
    if not isinstance(tokens, np.memmap) or tokens.ndim != 1 or tokens.dtype != DTYPE:
        found = f"{tokens.dtype.str} {tokens.shape}" if isinstance(tokens, np.ndarray) else "npz"
        raise ValueError(
            f"{path}: holds {found}; a shard is one dimension of {DTYPE.str}. {PREPARE}"
        )
    size, header_size = path.stat().st_size, tokens.offset
    if size != header_size + tokens.nbytes:
        raise ValueError(
            f"{path}: header says {len(tokens)} tokens, the file has {size} bytes. {PREPARE}"
        )
    if not len(tokens):
        raise ValueError(f"{path}: holds no token. {PREPARE}")
    return tokens


def _open_llm_c(path: Path, magic: int, version: int, n_tokens: int) -> Tokens:
    if magic != LLM_C_MAGIC:
        raise ValueError(f"{path}: an llm.c file in big-endian order. {PREPARE}")
    if version != LLM_C_VERSION:
        raise ValueError(
            f"{path}: llm.c version {version}; GPT-2 tokens are version {LLM_C_VERSION}. {PREPARE}"
        )
    size = path.stat().st_size
    if n_tokens < 1 or size != LLM_C_HEADER_BYTES + DTYPE.itemsize * n_tokens:
        raise ValueError(
            f"{path}: header says {n_tokens} tokens, the file has {size} bytes. {PREPARE}"
        )
    return np.memmap(path, DTYPE, "r", offset=LLM_C_HEADER_BYTES)


def _open_nanogpt(path: Path) -> Tokens:
    size = path.stat().st_size
    if not size or size % DTYPE.itemsize:
        raise ValueError(f"{path}: {size} bytes are not uint16 tokens. {PREPARE}")
    if (path.parent / "meta.pkl").exists():  # nanoGPT writes it beside tokens that are characters
        raise ValueError(f"{path}: tokens of another vocabulary (meta.pkl beside it). {PREPARE}")
    tokens = np.memmap(path, DTYPE, "r")
    head = tokens[:CHECKED_TOKENS]
    start = head[:TEXT_TOKENS].tobytes()
    if len(start) == 2 * TEXT_TOKENS and re.fullmatch(rb"[\t\n\r -~]*", start):
        raise ValueError(f"{path}: begins with the text {start[:24]!r}. {PREPARE}")
    for width in (4, 2):  # int64 first: it would pass for int32
        if len(head) >= width and not np.delete(head, np.s_[::width]).any():
            raise ValueError(f"{path}: {16 * width}-bit tokens, it seems. {PREPARE}")
    return tokens


class TokenStream:
    """All shards of one split as one stream of tokens, memory-mapped.

    Args:
        data_dir: Folder of shards.
        split: "train" or "val".
        vocab_size: Every token must be below it.
        verify: Compare every byte with `shards.json`, where there is one.

    Raises:
        ValueError: No folder, no shard of this split, a damaged shard, one that `shards.json` does
            not know, or a token out of range.
    """

    def __init__(self, data_dir: Path, split: str, vocab_size: int, verify: bool = False) -> None:
        self.paths = find_shards(data_dir, split)
        self.vocab_size = vocab_size
        self.shards = [open_shard(path) for path in self.paths]
        self.ends = np.cumsum([len(shard) for shard in self.shards])
        if manifest := read_manifest(data_dir):
            self._compare(manifest, data_dir, split, verify)
        else:
            for i, shard in enumerate(self.shards):
                self._check(shard[:CHECKED_TOKENS], i)

    def __len__(self) -> int:
        """Return the number of tokens."""
        return int(self.ends[-1])

    def fingerprint(self) -> str:
        """Return a SHA-256 of each shard's length and ends: cheap, and another for other data."""
        digest = hashlib.sha256()
        for shard in self.shards:
            digest.update(_ends(shard))
        return digest.hexdigest()

    def copies(self) -> list[str]:
        """Return a line for each shard that has the length and the ends of another."""
        known: dict[bytes, Path] = {}
        lines = []
        for path, shard in zip(self.paths, self.shards, strict=True):
            other = known.setdefault(hashlib.sha256(_ends(shard)).digest(), path)
            if other != path:
                lines.append(f"{path}: a copy of {other.name}, by length and ends. Fix: remove one")
        return lines

    def read(self, start: int, length: int) -> Tokens:
        """Copy the tokens `[start, start + length)`, across shard edges.

        Raises:
            ValueError: A token is out of range; the message names the shard.
        """
        assert 0 <= start <= start + length <= len(self)
        parts = []
        i = int(np.searchsorted(self.ends, start, side="right"))
        while length > 0:
            begin = start - (int(self.ends[i]) - len(self.shards[i]))
            part = np.array(self.shards[i][begin : begin + length])
            self._check(part, i)
            parts.append(part)
            start, length, i = start + len(part), length - len(part), i + 1
        return np.concatenate(parts) if parts else np.empty(0, DTYPE)

    def locate(self, position: int) -> tuple[Path, int]:
        """Return the shard that holds a token, and the number of the token in it."""
        i = int(np.searchsorted(self.ends, position, side="right"))
        return self.paths[i], position - (int(self.ends[i]) - len(self.shards[i]))

    def _compare(self, manifest: Manifest, data_dir: Path, split: str, verify: bool) -> None:
        if manifest.resume:
            raise ValueError(f"--data_dir {data_dir}: not finished. Fix: run its preparation again")
        made_with = manifest.recipe.get("tokenizer", {}).get("merges_sha256", MERGES_SHA256)
        if made_with != MERGES_SHA256:
            raise ValueError(f"{data_dir / MANIFEST}: made with another tokenizer. {PREPARE}")
        records = {shard.name: shard for shard in manifest.shards if shard.split == split}
        for missing in sorted(records.keys() - {path.name for path in self.paths}):
            raise ValueError(f"{data_dir / missing}: missing, {MANIFEST} names it. {PREPARE}")
        for path, tokens in zip(self.paths, self.shards, strict=True):
            record = records.get(path.name)
            if not record:
                raise ValueError(f"{path}: not in {MANIFEST}. Fix: move it out of the folder")
            if len(tokens) != record.tokens:
                said = f"{len(tokens)} tokens, {MANIFEST} says {record.tokens}"
                raise ValueError(f"{path}: {said}. {PREPARE}")
            if record.max_token >= self.vocab_size:
                raise ValueError(
                    f"{path}: token {record.max_token}, the vocabulary has {self.vocab_size}. "
                    f"{PREPARE}"
                )
            if verify and hash_file(path) != record.sha256:
                raise ValueError(f"{path}: damaged (SHA-256). {PREPARE}")

    def _check(self, tokens: Tokens, shard: int) -> None:
        largest = int(tokens.max(initial=0))
        if largest >= self.vocab_size:
            swapped = int(tokens.byteswap().max()) < self.vocab_size
            raise ValueError(
                f"{self.paths[shard]}: token {largest}, the vocabulary has {self.vocab_size}"
                f"{' (big-endian, it seems)' if swapped else ''}. {PREPARE}"
            )


def require_targets(stream: TokenStream, eval_tokens: int) -> None:
    """Refuse a validation split that does not hold `eval_tokens` targets.

    Raises:
        ValueError: It does not; names its last shard.
    """
    if eval_tokens >= len(stream):  # one more is the first token, which nothing predicts
        most = len(stream) - 1
        remedy = f"give --eval_tokens {most}" if most else "prepare more validation tokens"
        raise ValueError(
            f"{stream.paths[-1]}: the validation split has {len(stream)} tokens, not "
            f"--eval_tokens {eval_tokens} + 1. Fix: {remedy}"
        )


def _ends(shard: Tokens) -> bytes:
    ends = shard[:FINGERPRINT_TOKENS].tobytes() + shard[-FINGERPRINT_TOKENS:].tobytes()
    return f"{len(shard)} ".encode() + ends
