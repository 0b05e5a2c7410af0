"""Prepare a folder of token shards, or continue where its preparation ended."""

import argparse
import sys
from pathlib import Path
from typing import Any

from data.encode import Encoder
from data.index import Position, ShardIndex
from data.mpi import on_first_rank
from data.opening import Opener
from data.pipeline import Pipeline, ProgressBar
from data.read_options import ReadOptions
from data.recipe import build_recipe, find_index, validation_tokens
from data.sources import SourceFile, find_dataset, find_files
from data.writing import ShardWriter
from errors import BadInput

BLOCK_BYTES, TABLE_BYTES = 2**20, 2**23
COUNTS = ("shard_tokens", "workers", "max_line_bytes", "max_bytes", "val_tokens")
HUB_FLAGS = ("name", "revision", "streaming")


def prepare(args: argparse.Namespace, comm: Any, prefix: str = "text") -> ShardIndex:
    """Tokenise what `args` names into `args.out_dir` (all ranks); return what is there.

    Raises:
        ValueError: Bad input or options, another dataset in the folder, or an empty split.
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
    return files, find_index(args.out_dir, build_recipe(args, files, commit, prefix))


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
    opener, encoder = Opener(files, args.streaming), Encoder(args.tokenizer)
    progress = ProgressBar(files, args.quiet, comm.rank == 0)
    pipeline = Pipeline(
        files, options, opener, encoder, args.workers, args.val_every, comm, progress
    )
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
    if args.val_every:
        empty = "val" if train_tokens else "train"
        remedy = "give --val_every N with N from 2 to the number of documents"
        raise BadInput(where, f"no tokens for the {empty} split", remedy)
    raise BadInput(
        where,
        f"{val_tokens:,} tokens are not more than --val_tokens, which is "
        f"{validation_tokens(args):,}; no tokens for the train split",
        f"give --val_tokens {max(1, val_tokens // 10)}, or --val_every 10",
    )


def print_summary(out_dir: Path, index: ShardIndex, elapsed_s: float) -> None:
    """Print in one line what a folder holds."""
    summary = (
        f"{out_dir}: {index.tokens('train'):,} train and {index.tokens('val'):,} val tokens, "
        f"{sum(shard.documents for shard in index.shards):,} documents, "
        f"{len(index.shards)} shards, {elapsed_s:.1f} s"
    )
    print("; ".join([summary, *index.remarks()]), file=sys.stderr)
