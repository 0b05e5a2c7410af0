"""What a preparation makes: all that the bytes of the shards depend on, and what is there of it."""

import argparse
import sys
from pathlib import Path
from typing import Any

from data.index import Manifest, Position, Resume, read_manifest
from data.sources import MAX_NAMED, TEXT, SourceFile
from data.tokenizer import MERGES_SHA256


def build_recipe(
    args: argparse.Namespace, files: list[SourceFile], commit: str, prefix: str
) -> dict[str, Any]:
    """Return everything that the bytes of the shards depend on, as JSON values."""
    names = ["dataset", "name", "split"] if args.dataset else []
    names += ["text_column", "shard_tokens", "val_every"]
    if any(file.kind == TEXT for file in files):
        names.append("literal_endoftext")
    identities = [file.identity() for file in files]
    warn_of_copies(files, identities)
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


def find_manifest(out_dir: Path, recipe: dict[str, Any]) -> Manifest:
    """Return the manifest of an unfinished or finished preparation, or a fresh one."""
    manifest = read_manifest(out_dir)
    holds_shards = any(out_dir.glob("*.npy")) or any(out_dir.glob("*.bin"))
    if not manifest and holds_shards:
        raise ValueError(f"--out_dir {out_dir}: holds shards already. Fix: give an empty folder")
    if not manifest or not (manifest.shards or holds_shards):
        first = "val" if recipe["val_every"] else ""
        return Manifest(recipe, [], {}, Resume(first, Position(), 0, {}))
    keys = [key for key in recipe if manifest.recipe.get(key) != recipe[key]]
    if keys:
        what = ", ".join(
            key if key == "files" else f"{key} {manifest.recipe.get(key)}, not {recipe[key]}"
            for key in keys
        )
        raise ValueError(
            f"--out_dir {out_dir}: was made of other files or with other options ({what}). "
            "Fix: give an empty folder"
        )
    for shard in manifest.shards:
        if not (out_dir / shard.name).is_file():
            raise ValueError(f"{out_dir / shard.name}: missing. Fix: give an empty folder")
    return manifest


def warn_of_copies(files: list[SourceFile], identities: list[dict[str, Any]]) -> None:
    """Say in one line which files hold what others do, as "a (1).txt", or "a.jsonl.gz"."""
    known: dict[Any, str] = {}
    copies = []
    for file, identity in zip(files, identities, strict=True):
        content = file.n_bytes, identity.get("sha256_of_ends", file.url)
        unpacked = file.url[: len(file.url) - len(file.packing)]
        originals = [known.setdefault(key, file.name) for key in (content, unpacked)]
        copies += [f"{file.name} = {name}" for name in sorted({*originals} - {file.name})[:1]]
    if copies:
        named = ", ".join(copies[:MAX_NAMED]) + ", …" * (len(copies) > MAX_NAMED)
        what = f"{len(copies)} files look like copies, by size and ends or name: {named}"
        print(f"warning: {what}. Fix: remove them: their text counts twice", file=sys.stderr)
