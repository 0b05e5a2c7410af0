"""Read and write `shards.json`: what a folder of shards holds and what it was made of."""

import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from errors import BadInput

INDEX_NAME = "shards.json"
TEMPORARY_SUFFIX = ".tmp"
LITERAL = "with <|endoftext|> as text"  # counted beside bad documents, but kept


@dataclass(frozen=True)
class ShardRecord:
    """One shard.

    Args:
        name: File name.
        split: "train" or "val".
        tokens: In the file.
        documents: That begin in it.
        max_token: Largest id.
        sha256: Of the file.
    """

    name: str
    split: str
    tokens: int
    documents: int
    max_token: int
    sha256: str


@dataclass(frozen=True)
class Position:
    """A place in the source files.

    Args:
        file: Its number.
        record: Lines or rows of the file before it; in a `.txt`, documents before it.
        offset: Uncompressed bytes of the file before it; 0 in a table.
    """

    file: int = 0
    record: int = 0
    offset: int = 0


@dataclass(frozen=True)
class Resume:
    """Where an unfinished preparation continues, after its last complete shard.

    Args:
        split: Being written, where every N-th document is validation; else "".
        position: Of the block that holds the next token.
        skip_tokens: Tokens of that block that are in a shard already.
        bad: Documents left out before that block, by reason.
    """

    split: str
    position: Position = Position()
    skip_tokens: int = 0
    bad: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class ShardIndex:
    """The content of `shards.json`.

    Args:
        recipe: Sources, tokenizer and options: the same recipe gives the same bytes.
        shards: In order.
        bad: Number of documents left out, by reason, and of those that are LITERAL.
        resume: None when the preparation is complete.
    """

    recipe: dict[str, Any]
    shards: list[ShardRecord]
    bad: dict[str, int]
    resume: Resume | None

    def tokens(self, split: str) -> int:
        """Return the tokens of a split."""
        return sum(shard.tokens for shard in self.shards if shard.split == split)

    def remarks(self) -> list[str]:
        """Return one remark on what was left out and one on LITERAL texts, where there are any."""
        reasons = [f"{n} {what}" for what, n in self.bad.items() if what != LITERAL]
        remarks = []
        if reasons:
            remarks.append(f"left out: {', '.join(reasons)}")
        if LITERAL in self.bad:
            remarks.append(f"{self.bad[LITERAL]:,} texts {LITERAL}")
        return remarks


def read_index(folder: Path) -> ShardIndex | None:
    """Read the index of a folder; None: there is none, as with shards of other projects.

    Raises:
        BadInput: It is damaged.
    """
    path = folder / INDEX_NAME
    if not path.is_file():
        return None
    try:
        raw = json.loads(path.read_text(encoding="utf-8-sig"))
        shards = [ShardRecord(**shard) for shard in raw["shards"]]
        resume = raw["resume"]
        if resume:
            resume = Resume(**resume | {"position": Position(**resume["position"])})
        return ShardIndex(raw["recipe"], shards, raw["bad"], resume)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        remedy = "prepare the data in a new folder"
        raise BadInput(str(path), f"damaged ({error!r})", remedy) from error


def write_index(folder: Path, index: ShardIndex) -> None:
    """Write the index atomically."""
    path = folder / INDEX_NAME
    temporary = path.with_name(INDEX_NAME + TEMPORARY_SUFFIX)
    with temporary.open("w", encoding="utf-8") as file:
        file.write(json.dumps(dataclasses.asdict(index), indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    rename_durably(temporary, path)


def rename_durably(temporary: Path, path: Path) -> None:
    """Rename a file that is complete on disk, so that a power failure keeps its new name."""
    temporary.rename(path)
    # The name is in the folder, which has to reach the disk too.
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
