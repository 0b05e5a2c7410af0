"""Bad input: named by file and line, or left out and counted."""

import gzip
import json
import lzma
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from bench.fidelity.seed_prepare import tokenize
from data.index import ShardIndex
from data.mpi import Alone
from data.preparation import prepare
from data.prepare import build_parser

GOOD = [f"document {i} " * 20 for i in range(4)]


def run(*arguments: object) -> ShardIndex:
    common = ["--quiet", "--workers", "2", "--val_tokens", "20"]
    return prepare(build_parser().parse_args([*common, *map(str, arguments)]), Alone())


def all_tokens(folder: Path) -> list[int]:
    files = sorted(folder.glob("*.npy"), key=lambda path: path.name[-10:])
    return [token for path in files for token in np.load(path).tolist()]


def line(text: object, key: str = "text") -> bytes:
    return json.dumps({key: text}).encode() + b"\n"


BAD_LINES = [
    (b"not json\n", "not JSON"),
    (b"\xef\xbb\xbf\xef\xbb\xbf{}\n", "not JSON"),
    (b'{"text": "cut\n', "not JSON"),
    (b"[" * 100_000 + b"\n", "not JSON"),
    (b'["text"]\n', 'no "text" in this line'),
    (line("x", "body"), 'no "text" in this line'),
    (line(None), '"text" is null, not a string'),
    (line(7), '"text" is int, not a string'),
    (b'{"text": "\xff\xfe"}\n', "not UTF-8"),
    (b'{"text": "\xed\xa0\x80"}\n', "not UTF-8"),  # a surrogate, as if it were a character
    (line("a\0b"), "NUL in text"),
    (b'{"text": "a\0b"}\n', "not JSON"),
    (line("x" * 200_000), "longer than 150,000 bytes"),
]


@pytest.mark.parametrize(("bad", "what"), BAD_LINES, ids=[f"{i}" for i in range(len(BAD_LINES))])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_bad_line_is_named_or_left_out(
    tmp_path: Path, bad: bytes, what: str, suffix: str
) -> None:
    data = line(GOOD[0]) + b"\n" + line(GOOD[1]) + bad + line(GOOD[2]) + line(GOOD[3])
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(gzip.compress(data) if suffix else data)
    options = (path, "--out_dir", tmp_path / "out", "--max_line_bytes", 150_000)
    with pytest.raises(ValueError, match=rf"/a\.jsonl{suffix}:4: {what}\. .*--on_error skip"):
        run(*options)
    assert not list((tmp_path / "out").iterdir())
    index = run(*options, "--on_error", "skip")
    assert index.bad == {what: 1}
    assert all_tokens(tmp_path / "out") == [t for text in GOOD for t in tokenize(text).tolist()]


BAD_TEXTS = [
    (b"fine\nfine \xff\xfe no\n", "bad.txt:2: not UTF-8"),
    (b"fine\n" * 30 + b"cut \xe6\x97", "bad.txt:31: not UTF-8 (cut off)"),
    (b"one\ntwo\nthree\0\n", "bad.txt:3: NUL in text"),
    (b"", "bad.txt: empty file"),
    (b"x" * 3_000_000, "bad.txt:1: no white space in 150,000 bytes"),
]


@pytest.mark.parametrize(("data", "message"), BAD_TEXTS, ids=[m for _, m in BAD_TEXTS])
def test_a_bad_text_is_named_or_left_out_as_a_whole(
    tmp_path: Path, data: bytes, message: str
) -> None:
    (tmp_path / "bad.txt").write_bytes(data)
    (tmp_path / "good.txt").write_text(GOOD[0])
    options = (
        tmp_path,
        "--out_dir",
        tmp_path / "out",
        "--max_line_bytes",
        150_000,
        "--shard_tokens",
        40,
    )
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)")):
        run(*options)
    assert run(*options, "--on_error", "skip").bad == {message.split(": ")[1]: 1}
    assert all_tokens(tmp_path / "out") == tokenize(GOOD[0]).tolist()


@pytest.mark.parametrize("name", ["b.jsonl.gz", "b.jsonl.xz", "b.jsonl.zst", "b.parquet"])
@pytest.mark.parametrize("damage", ["cut", "junk", "empty"])
def test_a_file_that_cannot_be_read_is_named_or_left_out(
    tmp_path: Path, name: str, damage: str
) -> None:
    path = tmp_path / name
    if name == "b.parquet":
        parquet.write_table(pyarrow.table({"text": GOOD}), path)
    else:
        noise = np.random.default_rng(0).integers(97, 122, 300_000, np.uint8).tobytes()
        data = line("".join(map(chr, noise)))
        pack = {"gz": gzip.compress, "xz": lzma.compress}.get(
            name.split(".")[-1], lambda b: pyarrow.compress(b, "zstd", asbytes=True)
        )
        path.write_bytes(pack(data))
    whole = path.read_bytes()
    path.write_bytes({"cut": whole[: len(whole) // 2], "junk": b"junk" * 999, "empty": b""}[damage])
    (tmp_path / "a.jsonl").write_bytes(line(GOOD[0]))
    message = f"{name}: (cannot be read|empty file)"
    options = (tmp_path / "a.jsonl", path, "--out_dir", tmp_path / "out")
    with pytest.raises(ValueError, match=message):
        run(*options)
    assert run(*options, "--on_error", "skip").bad.keys() != set()
    assert all_tokens(tmp_path / "out") == tokenize(GOOD[0]).tolist()


def test_an_archive_without_end_stops_at_max_bytes(tmp_path: Path) -> None:
    (tmp_path / "zeros.jsonl.gz").write_bytes(gzip.compress(bytes(50_000_000)))
    (tmp_path / "lines.jsonl.gz").write_bytes(gzip.compress(line(GOOD[0]) * 100_000))
    for name in ("zeros", "lines"):
        with pytest.raises(
            ValueError, match=rf"{name}.*expands beyond 1,000,000 bytes\. Fix: raise --max"
        ):
            run(tmp_path / f"{name}.jsonl.gz", "--out_dir", tmp_path / "out", "--max_bytes", 10**6)


def test_tables_name_row_and_column(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": [*GOOD, None, "x" * 500], "n": range(6)}), path)
    options = (path, "--out_dir", tmp_path / "out")
    with pytest.raises(ValueError, match=r'a\.parquet:row 5: "text" is null'):
        run(*options)
    with pytest.raises(ValueError, match=r'no column "body", it has text, n\. Fix: name one'):
        run(*options, "--text_column", "body")
    with pytest.raises(ValueError, match='column "n" is int64'):
        run(*options, "--text_column", "n")
    index = run(*options, "--on_error", "skip", "--max_line_bytes", 400)
    assert index.bad == {'"text" is null, not a string': 1, "longer than 400 bytes": 1}
    assert all_tokens(tmp_path / "out") == [t for text in GOOD for t in tokenize(text).tolist()]


def test_strings_of_a_table_that_are_not_utf8_are_named(tmp_path: Path) -> None:
    values = pyarrow.array([b"good", b"\xff\xfe"], pyarrow.binary())
    broken = pyarrow.StringArray.from_buffers(2, values.buffers()[1], values.buffers()[2])
    parquet.write_table(pyarrow.table({"text": broken}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet:row 2: not UTF-8"):
        run(tmp_path / "a.parquet", "--out_dir", tmp_path / "out")
    parquet.write_table(pyarrow.table({"text": values}), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match=r"b\.parquet:row 2: not UTF-8"):
        run(tmp_path / "b.parquet", "--out_dir", tmp_path / "out")


def test_lone_surrogates_are_read_as_tiktoken_reads_them(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a \\ud800 b \\ud83d\\ude42"}\n' * 30)
    run(tmp_path / "a.jsonl", "--out_dir", tmp_path / "out")
    assert all_tokens(tmp_path / "out") == tokenize("a \ud800 b 🙂").tolist() * 30


def test_a_byte_order_mark_at_the_beginning_is_taken(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + line(GOOD[0]))
    run(tmp_path / "a.jsonl", "--out_dir", tmp_path / "out")
    assert all_tokens(tmp_path / "out") == tokenize(GOOD[0]).tolist()


def test_what_is_left_out_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"no\n" * 30 + line(GOOD[0]) + b"no\n")
    assert run(tmp_path / "a.jsonl", "--out_dir", tmp_path / "out", "--on_error", "skip").bad == {
        "not JSON": 31
    }
    named = [f"left out: {tmp_path}/a.jsonl:{i}: not JSON" for i in range(1, 11)]
    assert capsys.readouterr().err.splitlines() == named
    (tmp_path / "b.jsonl").write_bytes(b"no\n" * 3)
    with pytest.raises(ValueError, match=r"left out: 3 not JSON\): no text in it"):
        run(tmp_path / "b.jsonl", "--out_dir", tmp_path / "out2", "--on_error", "skip")
