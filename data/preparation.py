"""Prepare a folder of token shards, or continue where its preparation ended."""

import argparse
import sys
from pathlib import Path
from typing import Any

from data.blocks import Reader, ReadOptions
from data.encode import Encoder
from data.index import Position, Resume, ShardIndex, read_index
from data.mpi import on_first_rank
from data.opening import Opener
from data.pipeline import Pipeline, ProgressBar
from data.sources import TEXT, SourceFile, find_dataset, find_files, name_first
from data.tokenizer import MERGES_SHA256
from data.writing import ShardWriter
from errors import BadInput

BLOCK_BYTES, TABLE_BYTES = 2**20, 2**23
COUNTS = ("shard_tokens", "workers", "max_line_bytes", "max_bytes", "val_tokens")
HUB_FLAGS = ("name", "revision", "streaming")
EMPTY_FOLDER = "give an empty folder"


def prepare(args: argparse.Namespace, comm: Any, prefix: str = "text") -> ShardIndex:
    """Tokenise what `args` names into `args.out_dir` (all ranks); return what is there.

    Raises:
        BadInput: Bad input or options, another dataset in the folder, or an empty split.
    """
    check_options(args)
    files, index = on_first_rank(comm, lambda: _find_source(args, prefix))
    if index.resume:
        index = _write(args, comm, files, index)
    elif comm.rank == 0 and not args.quiet:
        print("complete already", file=sys.stderr)
    return index


def check_options(args: argparse.Namespace) -> None:
    """Refuse options that are out of range, or that do not go together.

    Raises:
        BadInput: Names the flag.
    """
    counts = {name: getattr(args, name) for name in COUNTS}
    too_small = [f"--{name} {n}" for name, n in counts.items() if n is not None and n < 1]
    if too_small:
        raise BadInput(too_small[0], "out of range", "give at least 1")
    if args.val_every < 0 or args.val_every == 1:
        raise BadInput(f"--val_every {args.val_every}", "out of range", "give 0, or 2 and more")
    if args.val_every and args.val_tokens:
        raise BadInput("--val_tokens and --val_every", "exclude each other", "give one of them")
    if bool(args.inputs) == bool(args.dataset):
        raise BadInput("INPUT", "none or twice", "give files and folders, or --dataset NAME")
    needless = [f"--{name}" for name in HUB_FLAGS if getattr(args, name) and not args.dataset]
    if needless:
        raise BadInput(needless[0], "is for the hub only", "give --dataset too")
    if args.out_dir.exists() and not args.out_dir.is_dir():
        raise BadInput(f"--out_dir {args.out_dir}", "is a file", "give a folder")


def _find_source(args: argparse.Namespace, prefix: str) -> tuple[list[SourceFile], ShardIndex]:
    """Return the files of the source and what is already made of them."""
    if args.dataset:
        files, commit = find_dataset(args.dataset, args.name, args.split, args.revision)
    else:
        files, commit = find_files(args.inputs), ""
    recipe = build_recipe(args, files, prefix, commit)
    _warn_of_copies(files, recipe["files"])
    return files, find_index(args.out_dir, recipe)


def build_recipe(
    args: argparse.Namespace, files: list[SourceFile], prefix: str, commit: str
) -> dict[str, Any]:
    """Return everything that the bytes of the shards depend on, as JSON values."""
    names = ["dataset", "name", "split"] if args.dataset else []
    names += ["text_column", "shard_tokens", "val_every"]
    if any(file.kind == TEXT for file in files):
        names.append("literal_endoftext")
    return {
        "prefix": prefix,
        "tokenizer": {"name": "gpt2", "merges_sha256": MERGES_SHA256},
        **{name: getattr(args, name) for name in names},
        "val_tokens": _validation_tokens(args),
        "revision": commit,
        "files": [file.identity() for file in files],
    }


def _validation_tokens(args: argparse.Namespace) -> int:
    """Return the tokens of shard 0 as the validation split; 0 where every N-th document is."""
    return 0 if args.val_every else args.val_tokens or args.shard_tokens


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
        return ShardIndex(recipe, [], {}, Resume("val" if recipe["val_every"] else ""))
    there = index.recipe
    differing = [key for key in recipe if there.get(key) != recipe[key]]
    if differing:
        said = [f"{key} {there.get(key)}, not {recipe[key]}" for key in differing if key != "files"]
        if "files" in differing:
            said.append("files")
        what = f"was made of other files or with other options ({', '.join(said)})"
        raise BadInput(where, what, EMPTY_FOLDER)
    missing = [shard.name for shard in index.shards if not (out_dir / shard.name).is_file()]
    if missing:
        raise BadInput(str(out_dir / missing[0]), "missing", EMPTY_FOLDER)
    return index


def _write(
    args: argparse.Namespace, comm: Any, files: list[SourceFile], index: ShardIndex
) -> ShardIndex:
    options = ReadOptions(
        text_column=args.text_column,
        block_bytes=min(BLOCK_BYTES, args.shard_tokens),  # a token has a byte or more
        table_bytes=min(TABLE_BYTES, args.shard_tokens),
        max_line_bytes=args.max_line_bytes,
        max_bytes=args.max_bytes,
        skip_bad=args.on_error == "skip",
        literal_endoftext=args.literal_endoftext,
    )
    reader = Reader(files, Opener(files, args.streaming), options, comm.rank, comm.size)
    encoder = Encoder(args.tokenizer)
    progress = ProgressBar(files, args.quiet, comm.rank == 0)
    pipeline = Pipeline(reader, encoder, args.workers, args.val_every, comm, progress)
    try:
        args.out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        what = str(error.strerror)
        raise BadInput(f"--out_dir {args.out_dir}", what, "give another place") from error
    writer = ShardWriter(args.out_dir, index, comm)
    start = index.resume.position if index.resume else Position()
    try:
        with writer:
            if writer.split == "val":
                pipeline.write_split(writer, start)
                writer.end_split("train")
                start = Position()
            pipeline.write_split(writer, start)
            writer.end_split(None)
            _check_splits(args, writer)
    finally:
        progress.bar.close()
    if comm.rank == 0 and not args.quiet:
        print(f"{encoder.name}: {progress.rates()}", file=sys.stderr)
    return writer.index


def _check_splits(args: argparse.Namespace, writer: ShardWriter) -> None:
    """Refuse a result with an empty split, and remove it: other options may go there."""
    index = writer.index
    train_tokens, val_tokens = index.tokens("train"), index.tokens("val")
    if train_tokens and val_tokens:
        return
    writer.remove()
    where = ", ".join(args.inputs) or args.dataset
    remarks = index.remarks()
    if remarks:
        where += f" ({'; '.join(remarks)})"
    if train_tokens + val_tokens < 2:
        raise BadInput(where, "no text in it", "give files that hold some")
    what = f"no tokens for the {'val' if train_tokens else 'train'} split"
    if args.val_every:
        remedy = "give --val_every N with N from 2 to the number of documents"
        raise BadInput(where, what, remedy)
    limit = f"{val_tokens:,} tokens are not more than --val_tokens {_validation_tokens(args):,}"
    remedy = f"give --val_tokens {max(1, val_tokens // 10)}, or --val_every 10"
    raise BadInput(where, f"{limit}; {what}", remedy)


def print_summary(out_dir: Path, index: ShardIndex, elapsed_s: float) -> None:
    """Print in one line what a folder holds."""
    summary = (
        f"{out_dir}: {index.tokens('train'):,} train and {index.tokens('val'):,} val tokens, "
        f"{sum(shard.documents for shard in index.shards):,} documents, "
        f"{len(index.shards)} shards, {elapsed_s:.1f} s"
    )
    print("; ".join([summary, *index.remarks()]), file=sys.stderr)
