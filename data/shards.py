"""Read token shards, ours and other people's, as one stream: memory-mapped uint16, in place.

*_{split}_*.npy                build-nanogpt, and ours
*_{split}_*.bin, *_{split}.bin llm.c: 256 int32 of header (magic, version, tokens), then uint16
{split}.bin                    nanoGPT: uint16 and nothing else
"""

import hashlib
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data.index import INDEX_NAME, ShardIndex, ShardRecord, hash_file, read_index
from data.remedies import how_to_get_shards
from data.tokenizer import MERGES_SHA256
from errors import BadInput

Tokens = NDArray[np.uint16]

SPLITS = ("train", "val")
DTYPE = np.dtype("<u2")
HEADER_BYTES = 128  # of a .npy of one dimension, as numpy writes it
CHECKED_TOKENS = 2**20  # of a shard without index, when it is opened; the rest when it is read
FINGERPRINT_TOKENS = 2**15  # of either end of a shard
TEXT_TOKENS = 8  # whose bytes are hardly ever all printable: pointers and web pages are
NPY_MAGIC = b"\x93NUMPY"
LLM_C_MAGIC, LLM_C_VERSION, LLM_C_HEADER_BYTES = 20240520, 1, 1024
MOVE_AWAY = "move it out of the folder"


def _bad_shard(path: Path, what: str) -> BadInput:
    return BadInput(str(path), what, "prepare the text with data/prepare.py")


def find_shards(data_dir: Path, split: str) -> list[Path]:
    """Return the shards of one split in order, without hidden files.

    Raises:
        BadInput: There is none, they are of several kinds, or one has the name of a copy, as
            "x_train_1 (1).npy" beside "x_train_1.npy".
    """
    patterns = (f"*_{split}_*.npy", f"*_{split}_*.bin", f"*_{split}.bin", f"{split}.bin")
    if data_dir.is_dir():
        next(data_dir.iterdir(), None)  # raises where it cannot be read: glob finds nothing there
    files = {p: [f for f in data_dir.glob(p) if not f.name.startswith(".")] for p in patterns}
    found = {pattern: shards for pattern, shards in files.items() if shards}
    where = f"--data_dir {data_dir}"
    if not found:
        held, remedy = how_to_get_shards(data_dir)
        raise BadInput(where, f"no shard {' or '.join(patterns)}{held}", remedy)
    if len(found) > 1:
        raise BadInput(where, f"holds {' and '.join(found)}", "give each dataset its own folder")
    (shards,) = found.values()
    by_stem = sorted(shards, key=lambda path: path.stem)
    copies = [(path, copy) for path, copy in pairwise(by_stem) if _is_copy(copy.stem, path.stem)]
    if copies:
        path, copy = copies[0]
        raise BadInput(str(copy), f"named like a copy of {path.name}", MOVE_AWAY)
    return sorted(shards)


def _is_copy(stem: str, original: str) -> bool:
    """Return whether a name continues another, but for longer numbers: 1 (1), not 10 after 1."""
    return stem.startswith(original) and not stem[len(original)].isalnum()


def open_shard(path: Path) -> Tokens:
    """Memory-map one shard.

    Raises:
        BadInput: Not a shard of a known format that fills its file exactly; says what it is.
    """
    with path.open("rb") as file:
        start = file.read(12)
    if path.suffix == ".npy":
        if not start.startswith(NPY_MAGIC):  # numpy would take it for a pickle
            raise _bad_shard(path, f"not a .npy file, begins with {start!r}")
        return _open_npy(path)
    header = np.frombuffer(start[: len(start) // 4 * 4], "<i4")
    if len(header) == 3 and LLM_C_MAGIC in (header[0], header[0].byteswap()):
        return _open_llm_c(path, *map(int, header))
    if path.stem not in SPLITS:
        raise _bad_shard(path, f"no llm.c header, magic {LLM_C_MAGIC}")
    return _open_nanogpt(path)


def _open_npy(path: Path) -> Tokens:
    try:
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # numpy answers damage with many types, zipfile's among them
        raise _bad_shard(path, f"not a readable .npy file ({error})") from error
    if not isinstance(tokens, np.memmap) or tokens.ndim != 1 or tokens.dtype != DTYPE:
        found = f"{tokens.dtype.str} {tokens.shape}" if isinstance(tokens, np.ndarray) else "npz"
        raise _bad_shard(path, f"holds {found}; a shard is one dimension of {DTYPE.str}")
    size = path.stat().st_size
    if size != tokens.offset + tokens.nbytes:
        raise _bad_shard(path, f"header says {len(tokens)} tokens, the file has {size} bytes")
    if not len(tokens):
        raise _bad_shard(path, "holds no token")
    return tokens


def _open_llm_c(path: Path, magic: int, version: int, n_tokens: int) -> Tokens:
    if magic != LLM_C_MAGIC:
        raise _bad_shard(path, "an llm.c file in big-endian order")
    if version != LLM_C_VERSION:
        what = f"llm.c version {version}; GPT-2 tokens are version {LLM_C_VERSION}"
        raise _bad_shard(path, what)
    size = path.stat().st_size
    if n_tokens < 1 or size != LLM_C_HEADER_BYTES + DTYPE.itemsize * n_tokens:
        raise _bad_shard(path, f"header says {n_tokens} tokens, the file has {size} bytes")
    return np.memmap(path, DTYPE, "r", offset=LLM_C_HEADER_BYTES)


def _open_nanogpt(path: Path) -> Tokens:
    size = path.stat().st_size
    if not size or size % DTYPE.itemsize:
        raise _bad_shard(path, f"{size} bytes are not uint16 tokens")
    if (path.parent / "meta.pkl").exists():  # nanoGPT writes it beside tokens that are characters
        raise _bad_shard(path, "tokens of another vocabulary (meta.pkl beside it)")
    tokens = np.memmap(path, DTYPE, "r")
    head = tokens[:CHECKED_TOKENS]
    start = head[:TEXT_TOKENS].tobytes()
    if len(head) >= TEXT_TOKENS and re.fullmatch(rb"[\t\n\r -~]*", start):
        raise _bad_shard(path, f"begins with the text {start!r}")
    # Of wider integers all parts but the lowest are 0; int64 first: it would pass for int32.
    widths = [n for n in (4, 2) if len(head) >= n and not np.delete(head, np.s_[::n]).any()]
    if widths:
        raise _bad_shard(path, f"{16 * widths[0]}-bit tokens, it seems")
    return tokens


class TokenStream:
    """All shards of one split as one stream of tokens, memory-mapped.

    Args:
        data_dir: Folder of shards.
        split: "train" or "val".
        vocab_size: Every token must be below it.
        verify: Compare every byte with `shards.json`, where there is one.

    Raises:
        BadInput: No folder, no shard of this split, a damaged shard, one that `shards.json` does
            not know, or a token out of range.
    """

    def __init__(self, data_dir: Path, split: str, vocab_size: int, verify: bool = False) -> None:
        self.paths = find_shards(data_dir, split)
        self.vocab_size = vocab_size
        self.shards = [open_shard(path) for path in self.paths]
        # Shard i holds the tokens [edges[i], edges[i + 1]).
        self.edges = np.cumsum([0, *map(len, self.shards)])
        index = read_index(data_dir)
        if index:
            self._compare(index, data_dir, split, verify)
        else:
            for i, shard in enumerate(self.shards):
                self._check_vocabulary(shard[:CHECKED_TOKENS], i)

    def __len__(self) -> int:
        """Return the number of tokens."""
        return int(self.edges[-1])

    def fingerprint(self) -> str:
        """Return a SHA-256 of each shard's length and ends: cheap, and another for other data."""
        digest = hashlib.sha256()
        for shard in self.shards:
            digest.update(_ends(shard))
        return digest.hexdigest()

    def digests(self) -> dict[str, str]:
        """Return the first digits of a SHA-256 of each shard's length and ends, by its name."""
        pairs = zip(self.paths, self.shards, strict=True)
        return {path.name: hashlib.sha256(_ends(shard)).hexdigest()[:16] for path, shard in pairs}

    def copies(self) -> list[str]:
        """Return a line for each shard that has the length and the ends of another."""
        first: dict[str, str] = {}
        pairs = [(name, first.setdefault(digest, name)) for name, digest in self.digests().items()]
        folder, end = self.paths[0].parent, "by length and ends. Fix: remove one"
        return [f"{folder / a}: a copy of {b}, {end}" for a, b in pairs if a != b]

    def read(self, start: int, length: int) -> Tokens:
        """Copy the tokens `[start, start + length)`, across shard edges.

        Raises:
            BadInput: A token is out of range; names the shard.
        """
        assert 0 <= start <= start + length <= len(self)
        parts = [np.empty(0, DTYPE)]
        shard, offset = self._find(start)
        while length > 0:
            part = np.array(self.shards[shard][offset : offset + length])
            self._check_vocabulary(part, shard)
            parts.append(part)
            length -= len(part)
            shard, offset = shard + 1, 0
        return np.concatenate(parts)

    def locate(self, position: int) -> tuple[Path, int]:
        """Return the shard that holds a token, and the number of the token in it."""
        shard, offset = self._find(position)
        return self.paths[shard], offset

    def _find(self, position: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self.edges, position, side="right")) - 1
        return shard, position - int(self.edges[shard])

    def _compare(self, index: ShardIndex, data_dir: Path, split: str, verify: bool) -> None:
        if index.resume:
            raise BadInput(f"--data_dir {data_dir}", "not finished", "run its preparation again")
        made_with = index.recipe.get("tokenizer", {}).get("merges_sha256", MERGES_SHA256)
        if made_with != MERGES_SHA256:
            raise _bad_shard(data_dir / INDEX_NAME, "made with another tokenizer")
        records = {shard.name: shard for shard in index.shards if shard.split == split}
        missing = sorted(records.keys() - {path.name for path in self.paths})
        if missing:
            raise _bad_shard(data_dir / missing[0], f"missing, {INDEX_NAME} names it")
        for path, tokens in zip(self.paths, self.shards, strict=True):
            self._compare_shard(path, tokens, records.get(path.name), verify)

    def _compare_shard(
        self, path: Path, tokens: Tokens, record: ShardRecord | None, verify: bool
    ) -> None:
        if not record:
            raise BadInput(str(path), f"not in {INDEX_NAME}", MOVE_AWAY)
        if len(tokens) != record.tokens:
            raise _bad_shard(path, f"{len(tokens)} tokens, {INDEX_NAME} says {record.tokens}")
        if record.max_token >= self.vocab_size:
            raise self._beyond_vocabulary(path, record.max_token, "")
        if verify and hash_file(path) != record.sha256:
            raise _bad_shard(path, "damaged (SHA-256)")

    def _check_vocabulary(self, tokens: Tokens, shard: int) -> None:
        largest = int(tokens.max(initial=0))
        if largest >= self.vocab_size:
            swapped = int(tokens.byteswap().max()) < self.vocab_size
            note = " (big-endian, it seems)" if swapped else ""
            raise self._beyond_vocabulary(self.paths[shard], largest, note)

    def _beyond_vocabulary(self, path: Path, token: int, note: str) -> BadInput:
        return _bad_shard(path, f"token {token}, the vocabulary has {self.vocab_size}{note}")


def require_targets(stream: TokenStream, eval_tokens: int, is_given: bool = True) -> int:
    """Return how many targets of a validation split to use: `eval_tokens`.

    If nobody asked for these, a shorter split is used as a whole.

    Raises:
        BadInput: It does not hold them; names its last shard.
    """
    most = len(stream) - 1  # nothing predicts the first token
    if most and not is_given:
        return min(eval_tokens, most)
    if eval_tokens > most:
        remedy = f"give --eval_tokens {most}" if most else "prepare more validation tokens"
        needed = f"--eval_tokens {eval_tokens} + 1"
        what = f"the validation split has {len(stream)} tokens, not {needed}"
        raise BadInput(str(stream.paths[-1]), what, remedy)
    return eval_tokens


def _ends(shard: Tokens) -> bytes:
    ends = shard[:FINGERPRINT_TOKENS].tobytes() + shard[-FINGERPRINT_TOKENS:].tobytes()
    return f"{len(shard)} ".encode() + ends
