"""Describe what a preparation makes, and find what is there of it."""

import argparse
import sys
from pathlib import Path
from typing import Any

from data.index import Position, Resume, ShardIndex, read_index
from data.sources import TEXT, SourceFile, name_first
from data.tokenizer import MERGES_SHA256
from errors import BadInput

EMPTY_FOLDER = "give an empty folder"


def build_recipe(
    args: argparse.Namespace, files: list[SourceFile], commit: str, prefix: str
) -> dict[str, Any]:
    """Return everything that the bytes of the shards depend on, as JSON values."""
    names = ["dataset", "name", "split"] if args.dataset else []
    names += ["text_column", "shard_tokens", "val_every"]
    if any(file.kind == TEXT for file in files):
        names.append("literal_endoftext")
    identities = [file.identity() for file in files]
    _warn_of_copies(files, identities)
    return {
        "prefix": prefix,
        "tokenizer": {"name": "gpt2", "merges_sha256": MERGES_SHA256},
        **{name: getattr(args, name) for name in names},
        "val_tokens": validation_tokens(args),
        "revision": commit,
        "files": identities,
    }


def validation_tokens(args: argparse.Namespace) -> int:
    """Return the tokens of shard 0 as the validation split; 0 where every N-th document is."""
    return 0 if args.val_every else args.val_tokens or args.shard_tokens


def find_index(out_dir: Path, recipe: dict[str, Any]) -> ShardIndex:
    """Return the index of an unfinished or finished preparation, or an empty one.

    Raises:
        BadInput: The folder holds something else, or lacks a shard.
    """
    index = read_index(out_dir)
    where = f"--out_dir {out_dir}"
    holds_shards = any(out_dir.glob("*.npy")) or any(out_dir.glob("*.bin"))
    if not index and holds_shards:
        raise BadInput(where, "holds shards already", EMPTY_FOLDER)
    if not index or not (index.shards or holds_shards):
        first_split = "val" if recipe["val_every"] else ""
        return ShardIndex(recipe, [], {}, Resume(first_split, Position(), 0, {}))
    differences = [
        _difference(key, index.recipe.get(key), value)
        for key, value in recipe.items()
        if index.recipe.get(key) != value
    ]
    if differences:
        said = ", ".join(differences)
        what = f"was made of other files or with other options ({said})"
        raise BadInput(where, what, EMPTY_FOLDER)
    missing = [shard.name for shard in index.shards if not (out_dir / shard.name).is_file()]
    if missing:
        raise BadInput(str(out_dir / missing[0]), "missing", EMPTY_FOLDER)
    return index


def _difference(key: str, there: object, asked: object) -> str:
    return key if key == "files" else f"{key} {there}, not {asked}"


def _warn_of_copies(files: list[SourceFile], identities: list[dict[str, Any]]) -> None:
    """Say in one line which files hold what others do, as "a (1).txt", or "a.jsonl.gz"."""
    known: dict[Any, str] = {}
    copies = []
    for file, identity in zip(files, identities, strict=True):
        content = (file.n_bytes, identity.get("sha256_of_ends", file.url))
        unpacked = file.url[: len(file.url) - len(file.packing)]  # the suffix in any case
        originals = {known.setdefault(key, file.name) for key in (content, unpacked)}
        others = sorted(originals - {file.name})
        if others:
            copies.append(f"{file.name} = {others[0]}")
    if copies:
        what = f"{len(copies)} files look like copies, by size and ends or name"
        remedy = "remove them: their text counts twice"
        print(f"warning: {what}: {name_first(copies)}. Fix: {remedy}", file=sys.stderr)
