"""Prepare shards in this process, and read their tokens, for tests of what a source file may be."""

from pathlib import Path

import numpy as np

from bench.fidelity.seed_prepare import tokenize
from data.index import ShardIndex
from data.mpi import Alone
from data.preparation import prepare
from data.prepare import build_parser


def run(*arguments: object) -> ShardIndex:
    """Run data/prepare.py's command line on few tokens."""
    common = ["--quiet", "--workers", "1", "--val_tokens", "5", "--tokenizer", "tiktoken"]
    return prepare(build_parser().parse_args([*common, *map(str, arguments)]), Alone())


def tokens(folder: Path) -> list[int]:
    """Return the tokens of all shards of a folder, in order."""
    files = sorted(folder.glob("*.npy"), key=lambda path: path.name[-10:])
    return [token for path in files for token in np.load(path).tolist()]


def expected(texts: list[str]) -> list[int]:
    """Return the tokens of documents as build-nanogpt's own script makes them."""
    return [token for text in texts for token in tokenize(text).tolist()]
