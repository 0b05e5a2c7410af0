import gzip
import json
import lzma
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from bench.fidelity.seed_prepare import tokenize, write_shards
from data.index import ShardIndex, read_index, write_index
from data.mpi import Alone
from data.preparation import prepare
from data.prepare import build_parser

ROOT = Path(__file__).resolve().parents[2]
LONG = "One word and another.\n\n  Ünïcode, 日本語。 Don't stop 12345!  " * 300
TEXTS = ["first document\n", "third " * 50, "", "fourth: ñ 日本", "fifth <|endoftext|> text", LONG]


def lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"id": 1, "text": text}) + "\n" for text in texts).encode()


def zstd(data: bytes) -> bytes:
    packed = pyarrow.compress(data, "zstd", asbytes=True)
    assert isinstance(packed, bytes)
    return packed


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every kind of file, three times TEXTS each, and .txt files in nested folders."""
    folder = tmp_path_factory.mktemp("sources")
    (folder / "a").mkdir()
    (folder / "a" / "0.txt").write_bytes(LONG.encode())
    (folder / "a" / "1.txt").write_bytes(b"one")
    (folder / "b.jsonl").write_bytes(lines(TEXTS * 3) + b"\n  \n")
    (folder / "c.jsonl.gz").write_bytes(
        gzip.compress(lines(TEXTS)) + gzip.compress(lines(TEXTS * 2))
    )
    (folder / "d.jsonl.xz").write_bytes(lzma.compress(lines(TEXTS * 3)[:-1]))
    (folder / "e.jsonl.zst").write_bytes(zstd(lines(TEXTS * 3)))
    table = pyarrow.table({"id": range(18), "text": TEXTS * 3})
    parquet.write_table(table, folder / "f.parquet", row_group_size=7)
    large = pyarrow.array(TEXTS * 3, pyarrow.large_string())
    parquet.write_table(pyarrow.table({"text": large.dictionary_encode()}), folder / "g.parquet")
    (folder / "notes.md").write_text("not for us")
    (folder / "settings.json").write_text('{"text": "nor this"}')
    return folder


DOCUMENTS = [LONG, "one", *TEXTS * 3 * 6]


def run(*arguments: object) -> ShardIndex:
    common = ["--quiet", "--workers", "2"]
    return prepare(build_parser().parse_args([*common, *map(str, arguments)]), Alone())


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.npy"))}


def seed(
    out_dir: Path, documents: list[str], val_tokens: int, shard_tokens: int
) -> dict[str, bytes]:
    write_shards(map(tokenize, documents), out_dir, "text", val_tokens, shard_tokens)
    return contents(out_dir)


@pytest.mark.parametrize("tokenizer", ["auto", "tiktoken"])
@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize(("val_tokens", "shard_tokens"), [(5000, 20_000), (30_000, 7), (1, 10**6)])
def test_shards_are_the_seeds_byte_for_byte(
    sources: Path, tmp_path: Path, tokenizer: str, workers: int, val_tokens: int, shard_tokens: int
) -> None:
    if shard_tokens == 7:
        shard_tokens = 701  # many shards of less than a document, each document over many
    expected = seed(tmp_path / "seed", DOCUMENTS, val_tokens, shard_tokens)
    run(
        sources,
        "--out_dir",
        tmp_path / "out",
        "--val_tokens",
        val_tokens,
        "--shard_tokens",
        shard_tokens,
        "--workers",
        workers,
        "--tokenizer",
        tokenizer,
    )
    assert contents(tmp_path / "out") == expected
    assert {p.name for p in (tmp_path / "out").iterdir()} == {*expected, "shards.json"}


def test_the_manifest_tells_what_is_there(sources: Path, tmp_path: Path) -> None:
    index = run(sources, "--out_dir", tmp_path / "out", "--val_tokens", 9000)
    assert index == read_index(tmp_path / "out")
    assert index.resume is None
    for shard in index.shards:
        tokens = np.load(tmp_path / "out" / shard.name)
        assert (len(tokens), tokens.max()) == (shard.tokens, shard.max_token)
        assert shard.documents == (tokens == 50256).sum()
    assert sum(shard.documents for shard in index.shards) == len(DOCUMENTS)
    first = index.recipe["files"][0]
    assert (first["name"], first["n_bytes"]) == ("a/0.txt", len(LONG.encode()))


def test_globs_folders_and_files_come_in_the_order_given(sources: Path, tmp_path: Path) -> None:
    expected = seed(tmp_path / "seed", [*TEXTS * 3, LONG, "one", *TEXTS * 3], 500, 10**6)
    given = [sources / "b.jsonl", sources / "a", f"{sources}/*.zst"]
    run(*given, "--out_dir", tmp_path / "out", "--val_tokens", 500)
    assert contents(tmp_path / "out") == expected


def test_another_column_holds_the_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"body": LONG}))
    expected = seed(tmp_path / "seed", [LONG], 500, 10**6)
    run(
        tmp_path / "a.jsonl",
        "--out_dir",
        tmp_path / "out",
        "--val_tokens",
        500,
        "--text_column",
        "body",
    )
    assert contents(tmp_path / "out") == expected


def read(folder: Path, split: str) -> list[int]:
    return [t for p in sorted(folder.glob(f"*_{split}_*.npy")) for t in np.load(p).tolist()]


def test_every_nth_document_is_validation(sources: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    index = run(
        sources / "a",
        sources / "b.jsonl",
        "--out_dir",
        out,
        "--val_every",
        4,
        "--shard_tokens",
        400,
    )
    documents = [(0, LONG), (1, "one"), *enumerate(TEXTS * 3)]  # by file, then by line
    for split, is_val in (("val", True), ("train", False)):
        chosen = [text for number, text in documents if (number % 4 == 0) == is_val]
        assert read(out, split) == [t for text in chosen for t in tokenize(text).tolist()]
        assert index.tokens(split) == len(read(out, split))
        sizes = [len(np.load(p)) for p in sorted(out.glob(f"*_{split}_*.npy"))]
        assert all(size == 400 for size in sizes[:-1])


def test_the_same_command_again_changes_nothing(sources: Path, tmp_path: Path) -> None:
    options = (sources, "--out_dir", tmp_path / "out", "--val_tokens", 9000)
    first = run(*options)
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    assert run(*options) == first
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()} == times
    with pytest.raises(ValueError, match=r"with other options \(val_tokens 9000, not 8000\)"):
        run(sources, "--out_dir", tmp_path / "out", "--val_tokens", 8000)
    with pytest.raises(ValueError, match=r"with other options \(files\)"):
        run(sources / "a", "--out_dir", tmp_path / "out", "--val_tokens", 9000)


def test_killed_between_the_first_shard_and_its_record_it_goes_on(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--val_tokens", "500", "--shard_tokens", "700", "--out_dir"]
    run(sources / "b.jsonl", *options, tmp_path / "whole")

    def die_at_a_record(folder: Path, index: ShardIndex) -> None:
        if index.shards:
            raise RuntimeError("killed")
        write_index(folder, index)

    with monkeypatch.context() as patch:
        patch.setattr("data.writing.write_index", die_at_a_record)
        with pytest.raises(RuntimeError, match="killed"):
            run(sources / "b.jsonl", *options, tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.npy"))) == 1
    run(sources / "b.jsonl", *options, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_source_that_has_changed_is_another_dataset(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines([LONG]))
    run(path, "--out_dir", tmp_path / "out", "--val_tokens", 900)
    path.write_bytes(lines([LONG.replace("word", "wort")]))
    with pytest.raises(ValueError, match=r"with other options \(files\)"):
        run(path, "--out_dir", tmp_path / "out", "--val_tokens", 900)


def test_shards_of_others_are_not_mixed_with(sources: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "edufineweb_train_000001.npy", np.zeros(5, np.uint16))
    with pytest.raises(ValueError, match=r"holds shards already\. Fix: give an empty folder"):
        run(sources, "--out_dir", tmp_path)


def test_a_split_that_would_be_empty_is_refused_and_leaves_nothing(
    sources: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        ValueError, match=r"no tokens for the train split\. Fix: give --val_tokens \d+, or"
    ):
        run(sources, "--out_dir", tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())  # the remedy works in the same folder
    with pytest.raises(
        ValueError, match=r"no tokens for the train split\. Fix: give --val_every N"
    ):
        run(sources / "a" / "1.txt", "--out_dir", tmp_path / "out", "--val_every", 2)
    assert not list((tmp_path / "out").iterdir())
    run(sources, "--out_dir", tmp_path / "out", "--val_every", 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shard_tokens", 0], "--shard_tokens 0: out of range"),
        (["--workers", 0], "--workers 0: out of range"),
        (["--val_tokens", 0], "--val_tokens 0: out of range"),
        (["--val_every", 1], "--val_every 1: out of range"),
        (["--val_every", 2, "--val_tokens", 5], "give one of them"),
        (["--streaming"], "--streaming: is for the hub only"),
        (["--dataset", "x/y"], "give files and folders, or --dataset"),
        (["no/such/place"], "no/such/place: no such file or folder"),
        (["README.md"], r"README\.md: not one of \.txt"),
        (["tests/data"], r"tests/data: no file that ends in \.txt"),
    ],
)
def test_impossible_options_are_refused(
    tmp_path: Path, options: list[object], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    inputs = [] if str(options[0])[0] != "-" else ["data/gpt2"]
    with pytest.raises(ValueError, match=message):
        run(*inputs, *options, "--out_dir", tmp_path / "out")


def test_a_file_given_twice_is_refused(sources: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"b\.jsonl: given 2 times"):
        run(sources, sources / "a" / ".." / "b.jsonl", "--out_dir", tmp_path)


def errors(said: str) -> int:
    """Count the lines on stderr, but for the one about the files that are left out."""
    lines = said.splitlines()
    assert lines[0].startswith("warning: left out 2 files, ")
    return len(lines) - 1


def test_a_mistake_is_one_line_and_status_2(sources: Path, tmp_path: Path) -> None:
    command = [sys.executable, "data/prepare.py", str(sources), "--out_dir", str(tmp_path / "out")]
    done = subprocess.run(
        [*command, "--quiet"], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 2
    assert "no tokens for the train split. Fix: give --val_tokens" in done.stderr
    assert errors(done.stderr) == 1


def test_progress_and_summary_say_what_was_done(sources: Path, tmp_path: Path) -> None:
    command = [sys.executable, "data/prepare.py", str(sources), "--out_dir", str(tmp_path / "out")]
    done = subprocess.run(
        [*command, "--val_tokens", "5000", "--shard_tokens", "9000"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert "100%" in done.stderr
    for text in ("tokens/s", "MB/s", "left", r"shard \d+ of about \d+", "110 documents"):
        assert re.search(text, done.stderr), text


def test_two_writers_do_not_meet(sources: Path, tmp_path: Path) -> None:
    import fcntl
    import os

    held = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    with pytest.raises(ValueError, match="another process writes here"):
        run(sources, "--out_dir", tmp_path, "--val_tokens", 9000)
    os.close(held)


def test_a_full_disk_is_one_line_status_1_and_nothing_half_written(
    sources: Path, tmp_path: Path
) -> None:
    limit = "import resource as r; r.setrlimit(r.RLIMIT_FSIZE, (60_000, 60_000)); import signal; "
    ignore = "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    options = [
        str(sources),
        "--out_dir",
        str(tmp_path),
        "--val_tokens",
        "5000",
        "--quiet",
        "--shard_tokens",
        "40000",
        "--tokenizer",
        "tiktoken",
    ]
    code = f"{limit}{ignore}import sys; sys.argv[1:] = {options}; import data.prepare as p; "
    done = subprocess.run(
        [sys.executable, "-c", code + "sys.exit(p.main())"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 1
    assert "File too large" in done.stderr
    assert "text_train_000001.npy" in done.stderr
    assert errors(done.stderr) == 1
    assert {p.name for p in tmp_path.iterdir()} == {"text_val_000000.npy", "shards.json"}
    run(*options)
    assert contents(tmp_path) == seed(tmp_path / "seed", DOCUMENTS, 5000, 40_000)
