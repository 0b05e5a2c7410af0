import gzip
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from data.blocks import FileBlock, Reader, ReadOptions
from data.documents import read_documents
from data.index import Position
from data.opening import Opener
from data.plain_text import SAFE_CUT
from data.sources import find_files
from data.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
PIECES = [
    "a",
    "b's",
    "'",
    "  ",
    " ",
    "\n",
    "\n\n",
    "\t",
    "\u3000",
    "\u00a0",
    "\u2009",
    "\u2028",
    "\u202f",
    "\u205f",
    "\u1680",
    "\x85",
    "\x1c",
    "\x7f",
    "12",
    "!",
    "é",
    "日本。",
    "🙂",
    "\u200b",
    "don't",
]


def reading(block_bytes: int = 50, **changes: object) -> ReadOptions:
    values = {
        "text_column": "text",
        "block_bytes": block_bytes,
        "table_bytes": block_bytes,
        "max_line_bytes": 10**6,
        "max_bytes": 10**9,
        "skip_bad": False,
    } | changes
    return ReadOptions(**values)  # type: ignore[arg-type] # by name


def read(
    path: Path,
    options: ReadOptions,
    start: Position | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[FileBlock]:
    files = find_files([str(path)])
    yield from Reader(files, Opener(files), options, rank, world_size).blocks(start or Position())


def texts(
    path: Path, blocks: Iterator[FileBlock] | list[FileBlock], options: ReadOptions
) -> list[bytes]:
    files = find_files([str(path)])
    found = [read_documents(b, files[b.position.file], options, 0, "") for b in blocks]
    return [text for documents in found for text in documents.texts]


def test_a_text_cut_anywhere_gives_the_same_tokens() -> None:
    tokenizer, rng = load_tokenizer(), random.Random(0)
    n_cuts = 0
    for _ in range(20_000):
        text = "".join(rng.choices(PIECES, k=rng.randint(2, 12))).encode()
        whole = tokenizer.encode_ordinary(text.decode())
        for cut in SAFE_CUT.finditer(text):
            parts = [text[: cut.start()], text[cut.start() :]]
            assert [t for p in parts for t in tokenizer.encode_ordinary(p.decode())] == whole
            n_cuts += 1
    assert n_cuts > 5000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, rng = tmp_path_factory.mktemp("blocks"), random.Random(1)
    documents = ["x " * rng.randint(0, 60) for _ in range(90)]
    data = "".join(json.dumps({"text": text}) + "\n" for text in documents).encode()
    (folder / "a.jsonl").write_bytes(data)
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(data))
    packed = pyarrow.compress(data, "zstd", asbytes=True)
    assert isinstance(packed, bytes)
    (folder / "c.jsonl.zst").write_bytes(packed)
    parquet.write_table(pyarrow.table({"text": documents}), folder / "d.parquet", row_group_size=25)
    (folder / "e.txt").write_text(" ".join(documents))
    return folder


def test_reading_goes_on_from_any_block(folder: Path) -> None:
    blocks = list(read(folder, reading()))
    assert len(blocks) > 100
    for i in range(0, len(blocks), 3):
        rest = list(read(folder, reading(), blocks[i].position))
        assert [b.position for b in rest] == [b.position for b in blocks[i:]]
        assert texts(folder, rest, reading()) == texts(folder, blocks[i:], reading())


def test_ranks_share_the_blocks(folder: Path) -> None:
    blocks = list(read(folder, reading()))
    shares = [list(read(folder, reading(), rank=rank, world_size=3)) for rank in range(3)]
    for number, block in enumerate(blocks):
        held = [share[number].data is not None for share in shares]
        assert held == [rank == number % 3 for rank in range(3)]
        mine = [shares[number % 3][number]]
        assert texts(folder, mine, reading()) == texts(folder, [block], reading())
        assert {share[number].position for share in shares} == {block.position}


def test_the_size_of_blocks_changes_no_document(folder: Path) -> None:
    files = ["a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.parquet"]
    expected = texts(folder / "a.jsonl", read(folder / "a.jsonl", reading(10**6)), reading())
    assert len(expected) == 90
    for name in files:
        for block_bytes in (1, 77, 1000):
            options = reading(block_bytes)
            assert texts(folder / name, read(folder / name, options), options) == expected
    whole = (folder / "e.txt").read_bytes()
    for block_bytes in (1, 77, 1000):
        parts = texts(folder / "e.txt", read(folder / "e.txt", reading(block_bytes)), reading())
        assert b"".join(parts) == whole


needs_proc = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc"
)


def peak_mib(*arguments: str) -> float:
    """Run data/prepare.py and return its peak resident memory."""
    code = (
        f"import sys; sys.argv[1:] = {list(arguments)}; import data.prepare as p; "
        "status = p.main(); print(open('/proc/self/status').read()); sys.exit(status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split("VmHWM:")[1].split()[0]) / 1024


@needs_proc
def test_memory_does_not_grow_with_the_document(tmp_path: Path) -> None:
    peaks = []
    for n_mib in (4, 100):
        path = tmp_path / f"{n_mib}.txt"
        path.write_text("Some words of one very long document. " * (n_mib * 2**20 // 38))
        peaks.append(
            peak_mib(
                str(path),
                "--out_dir",
                f"{tmp_path}/{n_mib}",
                "--quiet",
                "--val_tokens",
                "1000",
                "--workers",
                "2",
            )
        )
    assert peaks[1] < peaks[0] + 60, peaks  # MiB, for 96 MiB more of text


@needs_proc
def test_memory_does_not_grow_with_the_number_of_lines(tmp_path: Path) -> None:
    peaks = []
    for n_mib in (4, 100):
        line = json.dumps({"text": "Some words of a line. " * 3000}) + "\n"
        with gzip.open(tmp_path / f"{n_mib}.jsonl.gz", "wt", compresslevel=1) as file:
            for _ in range(n_mib * 2**20 // len(line)):
                file.write(line)
        peaks.append(
            peak_mib(
                f"{tmp_path}/{n_mib}.jsonl.gz",
                "--out_dir",
                f"{tmp_path}/{n_mib}",
                "--quiet",
                "--val_tokens",
                "1000",
                "--workers",
                "2",
            )
        )
    assert peaks[1] < peaks[0] + 60, peaks
