"""Text -> token shards: `<|endoftext|>` before every document, GPT-2's tokenizer.

    python data/prepare.py speeches/ --out_dir speeches_tokens --val_every 10
    python data/prepare.py 'dump/*.jsonl.zst' more.parquet --out_dir dump_tokens
    python data/prepare.py --dataset HuggingFaceFW/fineweb-edu --name sample-10BT --out_dir tokens
    mpirun -n 8 python data/prepare.py 'dump/*.parquet' --out_dir dump_tokens

A .txt file is one document, or several with <|endoftext|> between them; so is each line of a .jsonl
and each row of a .parquet. Shard 0 is the validation split, as in build-nanogpt. Stopped or killed,
the same command goes on where it was.
"""

import argparse
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:  # run as a file: import from the repository root, exactly as train.py does
    sys.path[0] = str(Path(__file__).resolve().parents[1])

if TYPE_CHECKING:
    from data.index import Manifest
    from data.sources import SourceFile
    from data.writing import ShardWriter

SHARD_TOKENS = 100_000_000  # build-nanogpt's shard
BLOCK_BYTES, TABLE_BYTES = 2**20, 2**23
MAX_LINE_BYTES = 2**26
MAX_BYTES = 2**36


def prepare(args: argparse.Namespace, comm: Any, prefix: str = "text") -> "Manifest":
    """Tokenise what `args` names into `args.out_dir` (all ranks); return what is there.

    Raises:
        ValueError: Bad input or options, another dataset in the folder, or an empty split.
    """
    from data.mpi import on_first_rank

    check_options(args)
    files, manifest = on_first_rank(comm, lambda: _look(args, prefix))
    if manifest.resume:
        manifest = _write(args, comm, files, manifest)
    elif comm.rank == 0 and not args.quiet:
        print("complete already", file=sys.stderr)
    return manifest


def _look(args: argparse.Namespace, prefix: str) -> "tuple[list[SourceFile], Manifest]":
    """Return the files of the source and what is already made of them."""
    from data.recipe import build_recipe, find_manifest
    from data.sources import find_dataset, find_files

    if args.dataset:
        files, commit = find_dataset(args.dataset, args.name, args.split, args.revision)
    else:
        files, commit = find_files(args.inputs), ""
    return files, find_manifest(args.out_dir, build_recipe(args, files, commit, prefix))


def _write(
    args: argparse.Namespace, comm: Any, files: list["SourceFile"], manifest: "Manifest"
) -> "Manifest":
    from data.blocks import Reading
    from data.encode import Encoder
    from data.index import Position
    from data.opening import Opener
    from data.pipeline import Pipeline, Progress
    from data.writing import ShardWriter

    reading = Reading(
        text_column=args.text_column,
        block_bytes=min(BLOCK_BYTES, args.shard_tokens),  # a token has a byte or more
        table_bytes=min(TABLE_BYTES, args.shard_tokens),
        max_line_bytes=args.max_line_bytes,
        max_bytes=args.max_bytes,
        skip_bad=args.on_error == "skip",
        literal_endoftext=args.literal_endoftext,
    )
    opener, encoder = Opener(files, args.streaming), Encoder(args.tokenizer)
    progress = Progress(files, args.quiet, comm.rank == 0)
    pipeline = Pipeline(
        files, reading, opener, encoder, args.workers, args.val_every, comm, progress
    )
    try:
        args.out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"--out_dir {args.out_dir}: {error.strerror}. Fix: give another place"
        ) from error
    writer = ShardWriter(args.out_dir, manifest, comm)
    start = manifest.resume.position if manifest.resume else Position()
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
    return writer.manifest


def check_options(args: argparse.Namespace) -> None:
    """Refuse what cannot be.

    Raises:
        ValueError: Names the flag.
    """
    for name in ("shard_tokens", "workers", "max_line_bytes", "max_bytes"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)}: out of range. Fix: give at least 1")
    if args.val_tokens is not None and args.val_tokens < 1:
        raise ValueError(f"--val_tokens {args.val_tokens}: out of range. Fix: give at least 1")
    if args.val_every < 0 or args.val_every == 1:
        raise ValueError(f"--val_every {args.val_every}: out of range. Fix: give 0, or 2 and more")
    if args.val_every and args.val_tokens:
        raise ValueError("--val_tokens and --val_every: exclude each other. Fix: give one of them")
    if bool(args.inputs) == bool(args.dataset):
        raise ValueError("INPUT: none or twice. Fix: give files and folders, or --dataset NAME")
    for name in ("name", "revision", "streaming"):
        if getattr(args, name) and not args.dataset:
            raise ValueError(f"--{name}: is for the hub only. Fix: give --dataset too")
    if args.out_dir.exists() and not args.out_dir.is_dir():
        raise ValueError(f"--out_dir {args.out_dir}: is a file. Fix: give a folder")


def _check_splits(args: argparse.Namespace, writer: "ShardWriter") -> None:
    """Refuse a result with an empty split, and remove it: other options may go there."""
    from data.recipe import validation_tokens

    manifest = writer.manifest
    train_tokens, val_tokens = manifest.tokens("train"), manifest.tokens("val")
    if train_tokens and val_tokens:
        return
    writer.remove()
    where = ", ".join(args.inputs) or args.dataset
    remarks = manifest.remarks()
    if remarks:
        where += f" ({'; '.join(remarks)})"
    if train_tokens + val_tokens < 2:
        raise ValueError(f"{where}: no text in it. Fix: give files that hold some")
    if args.val_every:
        raise ValueError(
            f"{where}: no tokens for the {'val' if train_tokens else 'train'} split. "
            "Fix: give --val_every N with N from 2 to the number of documents"
        )
    raise ValueError(
        f"{where}: {val_tokens:,} tokens are not more than --val_tokens, which is "
        f"{validation_tokens(args):,}; no tokens for the train split. "
        f"Fix: give --val_tokens {max(1, val_tokens // 10)}, or --val_every 10"
    )


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that `prepare` reads, whatever the source is."""
    add = parser.add_argument
    add("--shard_tokens", type=int, default=SHARD_TOKENS, help="tokens (default: %(default)s)")
    add("--val_tokens", type=int, help="tokens of shard 0, the validation split (shard_tokens)")
    add("--val_every", type=int, default=0, help="every N-th line, row or .txt document is "
        "validation (default: 0, shard 0 is)")  # fmt: skip
    add("--text_column", default="text", help="key or column of the text (default: %(default)s)")
    add("--literal_endoftext", action="store_true", help="<|endoftext|> in a .txt is text; "
        "otherwise it parts documents")  # fmt: skip
    add("--streaming", action="store_true", help="read hub files over the network, keep none")
    add("--on_error", choices=("fail", "skip"), default="fail", help="bad documents end the run, "
        "or are left out and counted (default: %(default)s)")  # fmt: skip
    add("--max_line_bytes", type=int, default=MAX_LINE_BYTES, help="longest line, cell, or word "
        "of a .txt; bounds the memory (default: %(default)s)")  # fmt: skip
    add("--max_bytes", type=int, default=MAX_BYTES, help="largest size of a compressed file, "
        "unpacked (default: %(default)s)")  # fmt: skip
    add("--workers", type=int, default=_n_cores(), help="tokenising threads (default: every core)")
    add("--tokenizer", choices=("auto", "tiktoken"), default="auto",
        help="auto: gigatoken where it is installed (default: %(default)s)")  # fmt: skip
    add("--quiet", action="store_true", help="no progress bar, no summary")


def _n_cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # an MPI launcher gives each rank its own
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("inputs", nargs="*", help=".txt, .jsonl or .ndjson (.gz .xz .zst .bz2), "
        ".parquet; folders; globs")  # fmt: skip
    add("--out_dir", type=Path, required=True, help="folder for the shards")
    add("--dataset", help="Hugging Face dataset: hub name, or a folder laid out as the hub's")
    add("--name", help="configuration of the dataset")
    add("--split", default="train", help="split of the dataset (default: %(default)s)")
    add("--revision", help="branch, tag or commit of the dataset (its main branch)")
    add_options(parser)
    return parser


def run(args: argparse.Namespace, prefix: str) -> int:
    """Prepare the data, say what was done, return the exit status."""
    from data.mpi import Alone, connect

    began = time.perf_counter()
    comm: Any = Alone()
    try:
        comm = connect()
        manifest = prepare(args, comm, prefix)
    except ValueError as error:  # the same on every rank: one speaks
        if comm.rank == 0:
            print(f"error: {error}", file=sys.stderr)
        return 2
    except (OSError, KeyboardInterrupt) as error:  # on this rank only, perhaps: a full disk
        what, status = (error, 1) if isinstance(error, OSError) else ("stopped", 130)
        print(f"error: {what}. Whole shards stay; the same command goes on there", file=sys.stderr)
        if comm.size > 1:
            comm.Abort(status)
        return status
    if comm.rank == 0 and not args.quiet:
        _summarise(args.out_dir, manifest, time.perf_counter() - began)
    return 0


def _summarise(out_dir: Path, manifest: "Manifest", elapsed_s: float) -> None:
    said = (
        f"{out_dir}: {manifest.tokens('train'):,} train and {manifest.tokens('val'):,} val tokens, "
        f"{sum(shard.documents for shard in manifest.shards):,} documents, "
        f"{len(manifest.shards)} shards, {elapsed_s:.1f} s"
    )
    print("; ".join([said, *manifest.remarks()]), file=sys.stderr)


def main() -> int:
    """Run the command line; return the exit status."""
    return run(build_parser().parse_args(), "text")


if __name__ == "__main__":
    sys.exit(main())
