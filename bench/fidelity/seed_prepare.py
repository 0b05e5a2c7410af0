"""Make shards as build-nanogpt's `fineweb.py` does, written from its description.

Its bytes are the reference for ours. It has one tiktoken worker per two cores, a list and an array
for each document, and one buffer for a shard.

    python bench/fidelity/seed_prepare.py SOURCE OUT_DIR VAL_TOKENS SHARD_TOKENS
"""

import json
import multiprocessing
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

if not __package__:  # run as a file: import from the repository root, exactly as train.py does
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from data.tokenizer import EOT_TOKEN, load_tokenizer


def tokenize(text: str) -> np.ndarray:
    """Return one document: the separator, then its tokens."""
    tokens = np.array([EOT_TOKEN, *load_tokenizer().encode_ordinary(text)])
    assert (tokens >= 0).all()
    assert (tokens < 2**16).all()
    return tokens.astype(np.uint16)


def read_rows(source: str) -> Iterator[str]:
    """Yield the texts of a .jsonl or .parquet file, row by row, as `datasets` hands them out."""
    if source.endswith(".parquet"):
        from pyarrow import parquet

        for batch in parquet.ParquetFile(source).iter_batches():
            yield from (row["text"] for row in batch.to_pylist())
    else:
        with open(source, encoding="utf-8") as lines:
            yield from (json.loads(line)["text"] for line in lines)


def write_shards(
    documents: Iterable[np.ndarray],
    out_dir: Path,
    prefix: str,
    val_tokens: int,
    shard_tokens: int,
) -> None:
    """Fill one buffer after another; the first is validation, the last is what is left."""
    out_dir.mkdir(parents=True, exist_ok=True)
    buffer = np.empty(max(val_tokens, shard_tokens), np.uint16)
    n_held = 0  # tokens in the buffer
    number = 0  # of the shard

    def save() -> None:
        split = "val" if number == 0 else "train"
        np.save(out_dir / f"{prefix}_{split}_{number:06d}.npy", buffer[:n_held])

    for tokens in documents:
        while len(tokens):
            size = val_tokens if number == 0 else shard_tokens
            part = tokens[: size - n_held]
            buffer[n_held : n_held + len(part)] = part
            n_held += len(part)
            tokens = tokens[len(part) :]
            if n_held == size:
                save()
                n_held = 0
                number += 1
    if n_held:
        save()


def main() -> None:
    """Run the command line."""
    source, out_dir, val_tokens, shard_tokens = sys.argv[1:]
    with multiprocessing.Pool(max(1, (os.cpu_count() or 1) // 2)) as pool:
        documents = pool.imap(tokenize, read_rows(source), chunksize=16)
        write_shards(documents, Path(out_dir), "text", int(val_tokens), int(shard_tokens))


if __name__ == "__main__":
    main()
