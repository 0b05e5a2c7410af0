"""Turn text into token shards: GPT-2's tokenizer, `<|endoftext|>` before every document.

    python data/prepare.py speeches/ --out_dir speeches_tokens --val_every 10
    python data/prepare.py 'dump/*.jsonl.zst' more.parquet --out_dir dump_tokens
    python data/prepare.py --dataset HuggingFaceFW/fineweb-edu --name sample-10BT --out_dir tokens
    mpirun -n 8 python data/prepare.py 'dump/*.parquet' --out_dir dump_tokens

A .txt file is one document, or several with <|endoftext|> between them; so is each line of a .jsonl
and each row of a .parquet. Shard 0 is the validation split, as in build-nanogpt. After a stop or a
kill, the same command continues.
"""

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: import from the repository root, exactly as train.py does
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from command_line import OneLineParser
from errors import BadInput
from exit_status import BAD_INPUT, FAILED, FINISHED, INTERRUPTED

SHARD_TOKENS = 100_000_000  # build-nanogpt's shard
MAX_LINE_BYTES, MAX_BYTES = 2**26, 2**36


def add_options(parser: OneLineParser) -> None:
    """Add the options that `prepare` reads, whatever the source is."""
    add = parser.add_argument
    add("--shard_tokens", type=int, default=SHARD_TOKENS, help="tokens (default: %(default)s)")
    add("--val_tokens", type=int, help="tokens of shard 0, the validation split (shard_tokens)")
    add("--val_every", type=int, default=0, help="every N-th document is validation (0: shard 0)")
    add("--text_column", default="text", help="key or column, as meta.text (default: %(default)s)")
    add("--literal_endoftext", action="store_true", help="<|endoftext|> in a .txt is just text")
    add("--streaming", action="store_true", help="read hub files over the network, keep none")
    on_error = "bad documents end the run, or are left out and counted (default: %(default)s)"
    add("--on_error", choices=("fail", "skip"), default="fail", help=on_error)
    line = "longest line, cell, or word of a .txt; bounds the memory (default: %(default)s)"
    add("--max_line_bytes", type=int, default=MAX_LINE_BYTES, help=line)
    compressed = "largest size of a compressed file, decompressed (default: %(default)s)"
    add("--max_bytes", type=int, default=MAX_BYTES, help=compressed)
    add("--workers", type=int, default=_n_cores(), help="tokenising threads (default: every core)")
    tokenizer = "auto: gigatoken where it is installed (default: %(default)s)"
    add("--tokenizer", choices=("auto", "tiktoken"), default="auto", help=tokenizer)
    add("--quiet", action="store_true", help="no progress bar, no summary")


def _n_cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # an MPI launcher gives each rank its own
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def build_parser() -> OneLineParser:
    """Return the parser of the command line."""
    parser = OneLineParser(description=__doc__)
    add = parser.add_argument
    inputs = ".txt, .jsonl or .ndjson (.gz .xz .zst .bz2), .parquet; folders; globs"
    add("inputs", nargs="*", help=inputs)
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
        # Not at the top: --help and a wrong flag do not wait for numpy and tiktoken.
        from data.preparation import prepare, print_summary

        comm = connect()
        index = prepare(args, comm, prefix)
    except BadInput as error:  # the same on every rank: one speaks
        if comm.rank == 0:
            print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    except (OSError, ImportError, KeyboardInterrupt) as error:  # of this rank only, perhaps
        is_stop = isinstance(error, KeyboardInterrupt)
        what, status = ("stopped", INTERRUPTED) if is_stop else (error, FAILED)
        print(f"error: {what}. Whole shards stay; the same command continues", file=sys.stderr)
        if comm.size > 1:
            comm.Abort(status)
        return status
    if comm.rank == 0 and not args.quiet:
        print_summary(args.out_dir, index, time.perf_counter() - began)
    return FINISHED


def main() -> int:
    """Run the command line; return the exit status."""
    return run(build_parser().parse_args(), "text")


if __name__ == "__main__":
    sys.exit(main())
