"""`shards.json`: what a folder of shards holds and what it was made of."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MANIFEST = "shards.json"
PARTIAL_SUFFIX = ".tmp"
LITERAL = "with <|endoftext|> as text"  # texts that are taken as they are


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
    """Where an unfinished preparation goes on, after its last whole shard.

    Args:
        split: Being written, where documents are dealt to splits one by one; else "".
        position: Of the block in which the next token is.
        skip_tokens: Of that block, already in a shard.
        bad: Documents left out before that block, by reason.
    """

    split: str
    position: Position
    skip_tokens: int
    bad: dict[str, int]


@dataclass(frozen=True)
class Manifest:
    """Everything about a folder of shards.

    Args:
        recipe: Sources, tokenizer and options: the same recipe gives the same bytes.
        shards: In order.
        bad: Documents left out, by reason, and those that are LITERAL.
        resume: None when all is done.
    """

    recipe: dict[str, Any]
    shards: list[ShardRecord]
    bad: dict[str, int]
    resume: Resume | None

    def tokens(self, split: str) -> int:
        """Return the tokens of a split."""
        return sum(shard.tokens for shard in self.shards if shard.split == split)

    def remarks(self) -> list[str]:
        """Return what was left out, and how many texts are LITERAL, where there are any."""
        left_out = ", ".join(f"{n} {what}" for what, n in self.bad.items() if what != LITERAL)
        literal = [f"{self.bad[LITERAL]:,} texts {LITERAL}"] if LITERAL in self.bad else []
        return [f"left out: {left_out}", *literal] if left_out else literal


def read_manifest(folder: Path) -> Manifest | None:
    """Read the manifest of a folder; None where there is none, as with other people's shards.

    Raises:
        ValueError: It is damaged.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        raw = json.loads(path.read_text(encoding="utf-8-sig"))
        shards = [ShardRecord(**shard) for shard in raw["shards"]]
        resume = raw["resume"]
        if resume:
            resume = Resume(**resume | {"position": Position(**resume["position"])})
        return Manifest(raw["recipe"], shards, raw["bad"], resume)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path}: damaged ({error!r}). Fix: prepare the data in a new folder"
        ) from error


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest, whole or not at all."""
    path = folder / MANIFEST
    partial = path.with_name(MANIFEST + PARTIAL_SUFFIX)
    with partial.open("w", encoding="utf-8") as file:
        file.write(json.dumps(dataclasses.asdict(manifest), indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    publish(partial, path)


def publish(partial: Path, path: Path) -> None:
    """Give a whole file on disk its own name, for good."""
    partial.rename(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def hash_file(path: Path, progress: Callable[[int], object] | None = None) -> str:
    """Return the SHA-256 of a file; `progress` is told the bytes of each part."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(2**22):
            digest.update(part)
            if progress:
                progress(len(part))
    return digest.hexdigest()
