"""What a folder of shards holds; or which documents were in one optimizer step of a run.

    python data/show.py DIR
    python data/show.py DIR --step 1234 --config runs/x/config.json

Every token is read and every SHA-256 of `shards.json` compared; a difference is exit status 1.
"""

import argparse
import io
import json
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # run as a file: import from the repository root, exactly as train.py does
    sys.path[0] = str(Path(__file__).resolve().parents[1])

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from data.index import Manifest
    from data.shards import TokenStream

PART_TOKENS = 2**22  # read at once
SAMPLE_TOKENS = 120  # of a document that is shown
BAR = 40  # characters


def show_folder(data_dir: Path, quiet: bool) -> bool:
    """Print what a folder holds and whether it is whole; return the latter.

    Raises:
        ValueError: No shards, or shards that cannot be opened.
    """
    from data.index import read_manifest
    from data.shards import SPLITS, TokenStream
    from data.tokenizer import VOCAB_SIZE

    manifest = read_manifest(data_dir)
    streams = [TokenStream(data_dir, split, VOCAB_SIZE) for split in SPLITS]
    print(f"{data_dir}: {_describe(manifest)}")
    bad = _compare_hashes(data_dir, manifest, quiet) if manifest else set()
    for split, stream in zip(SPLITS, streams, strict=True):
        lengths = _show_split(split, stream, manifest, bad)
        _show_lengths(lengths)
        print(f"  a document from the middle:\n    {_sample(stream, len(stream) // 2)!r}")
    return not bad


def _describe(manifest: "Manifest | None") -> str:
    if not manifest:
        return "no shards.json; sizes and tokens are checked, content cannot be"
    files = manifest.recipe["files"]
    n_bytes = sum(file["n_bytes"] for file in files)
    source = manifest.recipe.get("dataset") or ""
    remarks = "".join(f", {remark}" for remark in manifest.remarks())
    return f"{source} {len(files)} files of {n_bytes:,} bytes{remarks}".strip()


def _compare_hashes(data_dir: Path, manifest: "Manifest", quiet: bool) -> set[str]:
    from tqdm import tqdm

    from data.index import hash_file

    paths = {shard.name: data_dir / shard.name for shard in manifest.shards}
    total = sum(path.stat().st_size for path in paths.values())
    with tqdm(total=total, unit="B", unit_scale=True, desc="SHA-256", disable=quiet) as bar:
        found = {name: hash_file(path, bar.update) for name, path in paths.items()}
    return {shard.name for shard in manifest.shards if found[shard.name] != shard.sha256}


def _show_split(
    split: str, stream: "TokenStream", manifest: "Manifest | None", bad: set[str]
) -> Counter[int]:
    """Print the shards of a split; return how many documents have how many tokens."""
    import numpy as np

    lengths, documents, begin = Counter[int](), Counter[Path](), 0
    for eots in _separators(stream):
        found, counts = np.unique(np.diff(eots, prepend=begin), return_counts=True)
        lengths.update(dict(zip(found.tolist(), counts.tolist(), strict=True)))
        documents.update(stream.locate(eot)[0] for eot in eots.tolist())
        begin = int(eots[-1]) if len(eots) else begin
    lengths[len(stream) - begin] += 1
    del lengths[0]  # of what is before a separator that stands first
    n_documents = documents.total()
    print(f"{split}: {len(stream.paths)} shards, {len(stream):,} tokens, {n_documents:,} documents")
    for path, shard in zip(stream.paths, stream.shards, strict=True):
        state = "DAMAGED (SHA-256)" if path.name in bad else "whole" if manifest else "readable"
        print(f"  {path.name}: {len(shard):,} tokens, {documents[path]:,} documents, {state}")
    return lengths


def _separators(stream: "TokenStream") -> Iterator["NDArray[np.int64]"]:
    """Yield the places of all separators in order, part by part."""
    import numpy as np

    from data.tokenizer import EOT_TOKEN

    for start in range(0, len(stream), PART_TOKENS):
        part = stream.read(start, min(PART_TOKENS, len(stream) - start))
        yield np.flatnonzero(part == EOT_TOKEN) + start


def _show_lengths(lengths: Counter[int]) -> None:
    """Print the distribution of document lengths in tokens, the separator included."""
    n = lengths.total()
    ordered, seen, quantiles = sorted(lengths), 0, {}
    for length in ordered:
        seen += lengths[length]
        for percent in (50, 90, 99):
            if percent not in quantiles and 100 * seen >= percent * n:
                quantiles[percent] = length
    mean = sum(length * count for length, count in lengths.items()) / n
    shown = ", ".join(f"{p} % {length:,}" for p, length in quantiles.items())
    print(f"  tokens per document: mean {mean:,.0f}, least {ordered[0]:,}, {shown}, "
          f"most {ordered[-1]:,}")  # fmt: skip
    bins = Counter[int]()
    for length, count in lengths.items():
        bins[length.bit_length()] += count
    for bits in range(min(bins), max(bins) + 1):
        bar = "#" * round(BAR * bins[bits] / max(bins.values()))
        print(f"    below {2**bits:>11,}: {bins[bits]:>11,} {bar}")


def _sample(stream: "TokenStream", position: int) -> str:
    """Return the beginning of the document at a position."""
    begin, end = next(documents_in(stream, position, position + 1))
    return _decode(stream, begin, min(end, begin + SAMPLE_TOKENS))


def _decode(stream: "TokenStream", begin: int, end: int) -> str:
    from data.tokenizer import EOT_TOKEN, load_tokenizer

    tokens = stream.read(begin, end - begin)
    return load_tokenizer().decode(tokens[tokens != EOT_TOKEN].tolist(), errors="replace")


def documents_in(stream: "TokenStream", first: int, last: int) -> Iterator[tuple[int, int]]:
    """Yield begin and end of every document that has a token in `[first, last)`.

    The begin is where its `<|endoftext|>` stands, be it before `first`; the end is cut at `last`.
    """
    import numpy as np

    from data.tokenizer import EOT_TOKEN

    begins: list[int] = []
    stop = first + 1
    while stop and not begins:  # backwards to where the first of them begins
        start = max(0, stop - PART_TOKENS)
        eots = np.flatnonzero(stream.read(start, stop - start) == EOT_TOKEN)
        begins, stop = [start + int(eots[-1])] if len(eots) else [], start
    inside = np.flatnonzero(stream.read(first + 1, last - first - 1) == EOT_TOKEN) + first + 1
    edges = [*(begins or [0]), *inside.tolist(), last]
    yield from pairwise(edges)


def show_step(data_dir: Path, step: int, config_path: Path) -> None:
    """Print the documents of the batch that optimizer update `step`, counted from 0, saw.

    Raises:
        ValueError: Not the configuration of a run, or a step that it does not have.
    """
    from data.order import Order
    from data.shards import TokenStream
    from data.tokenizer import VOCAB_SIZE

    try:
        config = json.loads(config_path.read_text(encoding="utf-8-sig"))
        seq_len, batch_tokens = config["seq_len"], config["batch_tokens"]
        seed, shuffle, max_steps = config["seed"], config["shuffle"], config["max_steps"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"--config {config_path}: not a run's config.json ({error!r}). "
            "Fix: give RUN/config.json"
        ) from error
    if not 0 <= step < max_steps:
        raise ValueError(
            f"--step {step}: the run has the steps 0 to {max_steps - 1}. Fix: give one of them"
        )
    stream = TokenStream(data_dir, "train", VOCAB_SIZE)
    order = Order(len(stream), seq_len, seed, shuffle)
    batch = batch_tokens // seq_len
    windows = order.windows(step * batch, batch)
    print(f"step {step}: samples {step * batch} to {(step + 1) * batch - 1}, {seq_len} tokens each")
    for sample, window in enumerate(windows.tolist(), step * batch):
        first = window * seq_len
        shard, offset = stream.locate(first)
        print(f"sample {sample}: {shard.name}, tokens {offset} to {offset + seq_len - 1}")
        for begin, end in documents_in(stream, first, first + seq_len):
            shard, offset = stream.locate(begin)
            seen = max(begin, first)
            text = _decode(stream, seen, min(end, seen + SAMPLE_TOKENS))
            print(f"  {end - seen:>6} tokens of the document at {shard.name}:{offset}  {text!r}")


def main() -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data_dir", type=Path, help="folder of token shards")
    parser.add_argument("--step", type=int, help="optimizer update, counted from 0 as in log.txt")
    parser.add_argument("--config", type=Path, help="config.json of the run")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    args = parser.parse_args()
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it without a word
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # in a locale without these letters
    try:
        if (args.step is None) != (args.config is None):
            raise ValueError("--step and --config: belong together. Fix: give both or neither")
        if args.step is not None:
            show_step(args.data_dir, args.step, args.config)
            return 0
        return 0 if show_folder(args.data_dir, args.quiet) else 1
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
