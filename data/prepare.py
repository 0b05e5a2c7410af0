"""Text files -> token shards: `<|endoftext|>` before every document, GPT-2's tokenizer.

    python data/prepare.py speeches/*.txt --out_dir speeches_tokens --val_every 10

A `.txt` file is one document; each line of a `.jsonl` file is one, under the key "text". By
default the first shard is the validation split, as in build-nanogpt's FineWeb-Edu.
"""

import argparse
import json
import multiprocessing
import os
import sys
from collections.abc import Iterator
from pathlib import Path

if not __package__:  # run as a file: import from the repository root, exactly as train.py does
    sys.path[0] = str(Path(__file__).resolve().parents[1])

SHARD_TOKENS = 100_000_000  # build-nanogpt's shard
CHUNK_DOCUMENTS = 8  # per task of a tokenising process
PREFIX = "text"  # of the file names
SUFFIXES = (".txt", ".jsonl")


def find_files(inputs: list[Path]) -> list[Path]:
    """Return the text files of `inputs` in order; a folder gives its own, sorted.

    Raises:
        ValueError: An input does not exist, is of another kind, or there is none at all.
    """
    files: list[Path] = []
    for path in inputs:
        if path.is_dir():
            files += sorted(p for p in path.iterdir() if p.suffix in SUFFIXES)
        elif not path.is_file():
            raise ValueError(f"{path}: no such file or folder")
        elif path.suffix not in SUFFIXES:
            raise ValueError(f"{path}: not one of {', '.join(SUFFIXES)}")
        else:
            files.append(path)
    if not files:
        raise ValueError(f"{', '.join(map(str, inputs))}: no {' or '.join(SUFFIXES)} file")
    return files


def read_documents(files: list[Path]) -> Iterator[str]:
    """Yield the documents of the files in order, one in memory at a time.

    Raises:
        ValueError: Not UTF-8, not JSON, or a line without a string under "text"; names the line.
    """
    for path in files:
        try:
            if path.suffix == ".txt":
                yield path.read_text(encoding="utf-8")
                continue
            with path.open(encoding="utf-8") as lines:
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        yield _document(line, f"{path}:{number}")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 text ({error})") from error


def _document(line: str, where: str) -> str:
    try:
        text = json.loads(line)["text"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f'{where}: not a JSON object with a "text" ({error!r})') from error
    if not isinstance(text, str):
        raise ValueError(f'{where}: "text" is {type(text).__name__}, not a string')
    return text


def encode_document(text: str) -> bytes:
    """Return `<|endoftext|>` and the tokens of `text`, as little-endian uint16 bytes."""
    import numpy as np

    from data.tokenizer import EOT_TOKEN, load_tokenizer

    tokens = [EOT_TOKEN, *load_tokenizer().encode_ordinary(text)]
    return np.array(tokens, dtype="<u2").tobytes()


class ShardWriter:
    """Cut the tokens of each split into shards, numbered over both splits.

    Args:
        out_dir: Folder of the shards.
        shard_tokens: Tokens per shard; the last one of a split holds the rest.
        first_is_val: The first shard is the validation split, whatever `add` says.
    """

    def __init__(self, out_dir: Path, shard_tokens: int, first_is_val: bool) -> None:
        self.out_dir = out_dir
        self.shard_bytes = 2 * shard_tokens
        self.first_is_val = first_is_val
        self.held = {"train": bytearray(), "val": bytearray()}
        self.tokens = {"train": 0, "val": 0}
        self.written: list[Path] = []

    def add(self, split: str, tokens: bytes) -> None:
        """Append the tokens of one document (uint16 bytes); write the shards that they fill."""
        self.held[split] += tokens
        while len(self.held[split]) >= self.shard_bytes:
            self._write(split)

    def finish(self) -> None:
        """Write the last, partial shards."""
        for split, held in self.held.items():
            if held:
                self._write(split)

    def _write(self, held_as: str) -> None:
        import numpy as np

        from data.shards import write_shard

        tokens = np.frombuffer(bytes(self.held[held_as][: self.shard_bytes]), dtype="<u2")
        del self.held[held_as][: self.shard_bytes]
        number = len(self.written)
        split = "val" if self.first_is_val and number == 0 else held_as
        path = self.out_dir / f"{PREFIX}_{split}_{number:06d}.npy"
        write_shard(path, tokens)
        self.written.append(path)
        self.tokens[split] += len(tokens)


def prepare(args: argparse.Namespace) -> dict[str, int]:
    """Tokenise `args.inputs` into `args.out_dir`; return the tokens of each split.

    Raises:
        ValueError: Bad input, shards already there, or a split that would be empty.
    """
    _check_options(args)
    files = find_files(args.inputs)
    args.out_dir.mkdir(parents=True, exist_ok=True)
    writer = ShardWriter(args.out_dir, args.shard_tokens, args.val_every == 0)
    try:
        _tokenise(args, files, writer)
        for split, n_tokens in writer.tokens.items():
            if not n_tokens:
                raise ValueError(
                    f"{', '.join(map(str, args.inputs))}: no tokens for the {split} split; "
                    "give --val_every N with N from 2 to the number of documents"
                )
    except BaseException:  # Ctrl-C too: half a set of shards would look like a whole one
        for path in writer.written:
            path.unlink()
        raise
    return writer.tokens


def _check_options(args: argparse.Namespace) -> None:
    for name in ("shard_tokens", "processes"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)}: must be at least 1")
    if args.val_every < 0 or args.val_every == 1:
        raise ValueError(f"--val_every {args.val_every}: must be 0, or 2 and more")
    if args.out_dir.exists() and not args.out_dir.is_dir():
        raise ValueError(f"--out_dir {args.out_dir}: is a file; give a folder")
    if any(args.out_dir.glob("*.npy")):
        raise ValueError(f"--out_dir {args.out_dir}: holds shards already; give an empty folder")


def _tokenise(args: argparse.Namespace, files: list[Path], writer: ShardWriter) -> None:
    from tqdm import tqdm

    # spawn: forking a process that holds the tokenizer's threads can deadlock
    with multiprocessing.get_context("spawn").Pool(args.processes) as pool:
        encoded = pool.imap(encode_document, read_documents(files), chunksize=CHUNK_DOCUMENTS)
        for number, tokens in enumerate(tqdm(encoded, unit="doc", disable=args.quiet)):
            is_val = args.val_every and number % args.val_every == 0
            writer.add("val" if is_val else "train", tokens)
    writer.finish()


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("inputs", nargs="+", type=Path, help=".txt or .jsonl files, or folders")
    parser.add_argument("--out_dir", type=Path, required=True, help="folder for the shards")
    parser.add_argument(
        "--shard_tokens", type=int, default=SHARD_TOKENS, help="tokens (default: %(default)s)"
    )
    parser.add_argument(
        "--val_every", type=int, default=0,
        help="every N-th document, from the first, is validation (default: 0, the first shard is)",
    )  # fmt: skip
    parser.add_argument(
        "--processes", type=int, default=os.cpu_count(), help="tokenising (default: every core)"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser


def main() -> int:
    """Run the command line; return the exit status."""
    args = build_parser().parse_args()
    try:
        tokens = prepare(args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(
        f"{args.out_dir}: {tokens['train']:,} train and {tokens['val']:,} val tokens",
        file=sys.stderr,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
