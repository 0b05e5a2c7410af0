"""Print what a folder of shards holds, or the documents of one optimizer step."""

import json
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.index import ShardIndex, hash_file, read_index
from data.order import Order
from data.shards import SPLITS, TokenStream
from data.tokenizer import EOT_TOKEN, VOCAB_SIZE, load_tokenizer
from errors import BadInput

PART_TOKENS = 2**22  # read at once
SAMPLE_TOKENS = 120  # of a document that is shown
BAR_LETTERS = 40
PERCENTILES = (50, 90, 99)


def show_folder(data_dir: Path, quiet: bool) -> bool:
    """Print what a folder holds and whether it is undamaged; return the latter.

    Raises:
        BadInput: No shards, or shards that cannot be opened.
    """
    index = read_index(data_dir)
    streams = [TokenStream(data_dir, split, VOCAB_SIZE) for split in SPLITS]
    print(f"{data_dir}: {_source_line(index)}")
    damaged = _damaged_shards(data_dir, index, quiet) if index else set()
    state = "whole" if index else "readable"
    for split, stream in zip(SPLITS, streams, strict=True):
        lengths, documents = _count_documents(stream)
        counts = f"{len(stream):,} tokens, {sum(documents):,} documents"
        print(f"{split}: {len(stream.paths)} shards, {counts}")
        for path, shard, n in zip(stream.paths, stream.shards, documents, strict=True):
            said = "DAMAGED (SHA-256)" if path.name in damaged else state
            print(f"  {path.name}: {len(shard):,} tokens, {n:,} documents, {said}")
        _show_lengths(lengths)
        middle = len(stream) // 2
        begin, end = next(documents_in(stream, middle, middle + 1))
        text = _decode(stream, begin, min(end, begin + SAMPLE_TOKENS))
        print(f"  a document from the middle:\n    {text!r}")
    return not damaged


def _source_line(index: ShardIndex | None) -> str:
    if not index:
        return "no shards.json; sizes and tokens are checked, content cannot be"
    files = index.recipe["files"]
    n_bytes = sum(file["n_bytes"] for file in files)
    source = index.recipe.get("dataset") or ""
    counts = f"{source} {len(files)} files of {n_bytes:,} bytes".strip()
    return ", ".join([counts, *index.remarks()])


def _damaged_shards(data_dir: Path, index: ShardIndex, quiet: bool) -> set[str]:
    damaged = set()
    total = sum((data_dir / shard.name).stat().st_size for shard in index.shards)
    with tqdm(total=total, unit="B", unit_scale=True, desc="SHA-256", disable=quiet) as bar:
        for shard in index.shards:
            path = data_dir / shard.name
            if hash_file(path) != shard.sha256:
                damaged.add(shard.name)
            bar.update(path.stat().st_size)
    return damaged


def _count_documents(stream: TokenStream) -> tuple[Counter[int], list[int]]:
    """Return how many documents have how many tokens, and how many begin in each shard."""
    lengths = Counter[int]()
    documents = np.zeros(len(stream.shards), np.int64)
    begin = 0
    for start in range(0, len(stream), PART_TOKENS):
        part = stream.read(start, min(PART_TOKENS, len(stream) - start))
        separators = np.flatnonzero(part == EOT_TOKEN) + start
        lengths.update(np.diff(separators, prepend=begin).tolist())
        documents += np.histogram(separators, stream.edges)[0]
        if len(separators):
            begin = int(separators[-1])
    lengths[len(stream) - begin] += 1
    del lengths[0]  # of what is before a separator that stands first
    return lengths, documents.tolist()


def _show_lengths(lengths: Counter[int]) -> None:
    """Print the distribution of document lengths in tokens, the separator included."""
    ordered = sorted(lengths)
    n_up_to = np.cumsum([lengths[length] for length in ordered])
    n_documents = int(n_up_to[-1])
    mean = sum(length * count for length, count in lengths.items()) / n_documents
    shown = [f"mean {mean:,.0f}, least {ordered[0]:,}"]
    for percent in PERCENTILES:
        place = np.searchsorted(100 * n_up_to, percent * n_documents)
        shown.append(f"{percent} % {ordered[place]:,}")
    print(f"  tokens per document: {', '.join(shown)}, most {ordered[-1]:,}")
    bins = Counter[int]()
    for length, count in lengths.items():
        bins[length.bit_length()] += count
    for bits in range(min(bins), max(bins) + 1):
        bar = "#" * round(BAR_LETTERS * bins[bits] / max(bins.values()))
        print(f"    below {2**bits:>11,}: {bins[bits]:>11,} {bar}")


def _decode(stream: TokenStream, begin: int, end: int) -> str:
    tokens = stream.read(begin, end - begin)
    return load_tokenizer().decode(tokens[tokens != EOT_TOKEN].tolist(), errors="replace")


def documents_in(stream: TokenStream, first: int, last: int) -> Iterator[tuple[int, int]]:
    """Yield begin and end of every document that has a token in `[first, last)`.

    The begin is where its `<|endoftext|>` stands, be it before `first`; the end is cut at `last`.
    """
    others = np.flatnonzero(stream.read(first + 1, last - first - 1) == EOT_TOKEN) + first + 1
    yield from pairwise([_begin_of_document(stream, first), *others.tolist(), last])


def _begin_of_document(stream: TokenStream, position: int) -> int:
    """Return the place of the last separator up to a position; 0: there is none."""
    end = position + 1
    while end:
        start = max(0, end - PART_TOKENS)
        separators = np.flatnonzero(stream.read(start, end - start) == EOT_TOKEN)
        if len(separators):
            return start + int(separators[-1])
        end = start
    return 0


def show_step(data_dir: Path, step: int, config_path: Path) -> None:
    """Print the documents of the batch that optimizer update `step`, counted from 0, saw.

    Raises:
        BadInput: Not the configuration of a run, or a step that it does not have.
    """
    try:
        config = json.loads(config_path.read_text(encoding="utf-8-sig"))
        seq_len, max_steps = config["seq_len"], config["max_steps"]
        batch = config["batch_tokens"] // seq_len
        seed, shuffle = config["seed"], config["shuffle"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = f"not a run's config.json ({error!r})"
        raise BadInput(f"--config {config_path}", what, "give RUN/config.json") from error
    if not 0 <= step < max_steps:
        what = f"the run has the steps 0 to {max_steps - 1}"
        raise BadInput(f"--step {step}", what, "give one of them")
    stream = TokenStream(data_dir, "train", VOCAB_SIZE)
    first_sample = step * batch
    last_sample = first_sample + batch - 1
    print(f"step {step}: samples {first_sample} to {last_sample}, {seq_len} tokens each")
    windows = Order(len(stream), seq_len, seed, shuffle).windows(first_sample, batch)
    for sample, window in enumerate(windows.tolist(), first_sample):
        first = window * seq_len
        shard, offset = stream.locate(first)
        print(f"sample {sample}: {shard.name}, tokens {offset} to {offset + seq_len - 1}")
        for begin, end in documents_in(stream, first, first + seq_len):
            shard, offset = stream.locate(begin)
            seen = max(begin, first)
            text = _decode(stream, seen, min(end, seen + SAMPLE_TOKENS))
            print(f"  {end - seen:>6} tokens of the document at {shard.name}:{offset}  {text!r}")
