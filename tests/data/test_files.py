"""What is read of a folder, and what is said of the rest."""

import bz2
import gzip
import json
import lzma
import os
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
from data.sources import find_files

TEXT = "Some words, and more of them. " * 20


def run(*arguments: object) -> ShardIndex:
    common = ["--quiet", "--workers", "2", "--val_tokens", "20"]
    return prepare(build_parser().parse_args([*common, *map(str, arguments)]), Alone())


def tokens(folder: Path) -> list[int]:
    files = sorted(folder.glob("*.npy"), key=lambda path: path.name[-10:])
    return [token for path in files for token in np.load(path).tolist()]


def line(text: str) -> bytes:
    return json.dumps({"text": text}).encode() + b"\n"


def test_files_are_known_in_any_case_and_packing(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    contents = {
        "a.TXT": TEXT.encode(),
        "b.JSONL": line(TEXT),
        "c.ndjson": line(TEXT),
        "d.NdJson.GZ": gzip.compress(line(TEXT)),
        "e.jsonl.bz2": bz2.compress(line(TEXT)),
        "f.json.bz2": bz2.compress(line(TEXT)),
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    parquet.write_table(pyarrow.table({"text": [TEXT]}), folder / "g.PARQUET")
    run(folder, "--out_dir", tmp_path / "out")
    assert tokens(tmp_path / "out") == tokenize(TEXT).tolist() * 7


def test_what_is_left_out_is_named_counted_and_sized_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "texts"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.txt").write_text(TEXT, encoding="utf-8")
    (folder / "b.csv").write_bytes(b"x" * 1_000_000)
    (folder / "deep" / "c.csv").write_bytes(b"x" * 500_000)
    (folder / "deep" / "noname").write_bytes(b"x" * 10)
    (folder / "settings.json").write_bytes(b"{}")
    (folder / "gone.txt").symlink_to(folder / "nowhere")
    assert [file.name for file in find_files([str(folder)])] == ["a.txt"]
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("warning: left out 5 files, 1.5 MB (2 .csv, 1 ")
    names = ("b.csv", "deep/c.csv", "deep/noname", "settings.json", "gone.txt")
    assert said.endswith(
        ": " + ", ".join(str(folder / name) for name in names)
    )  # the largest first
    (folder / "a.txt").unlink()
    with pytest.raises(ValueError, match="no file that ends in"):
        find_files([str(folder)])


def test_copies_that_editors_and_systems_keep_are_no_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "texts"
    (folder / ".ipynb_checkpoints").mkdir(parents=True)
    for name in ("a.txt", ".ipynb_checkpoints/a-checkpoint.txt", "._a.txt", ".hidden.jsonl"):
        (folder / name).write_text(TEXT, encoding="utf-8")
    run(folder, "--out_dir", tmp_path / "out")
    assert tokens(tmp_path / "out") == tokenize(TEXT).tolist()
    (folder / "__MACOSX" / "deep").mkdir(parents=True)
    (folder / "__MACOSX" / "deep" / "a.txt").write_text(TEXT, encoding="utf-8")
    (folder / "~$a.txt").write_text(TEXT, encoding="utf-8")
    assert [file.name for file in find_files([str(folder)])] == ["a.txt"]
    assert "left out 3 files, 0.0018 MB (3 hidden): " in capsys.readouterr().err
    assert [f.name for f in find_files([str(folder / ".hidden.jsonl")])] == [".hidden.jsonl"]


def test_links_are_followed_once(tmp_path: Path) -> None:
    folder, other = tmp_path / "texts", tmp_path / "other"
    for place in (folder, other):
        place.mkdir()
        (place / f"{place.name}.txt").write_text(place.name, encoding="utf-8")
    (folder / "link").symlink_to(other)
    (other / "back").symlink_to(folder)
    (folder / "again").symlink_to(other)
    found = [file.name for file in find_files([str(folder)])]
    assert sorted(Path(name).name for name in found) == ["other.txt", "texts.txt"]
    (folder / "twice.txt").symlink_to(other / "other.txt")
    with pytest.raises(ValueError, match="given 2 times"):
        find_files([str(folder)])


def test_a_glob_takes_folders_whole(tmp_path: Path) -> None:
    for name in ("a.txt", "deep/b.txt", "deep/deeper/c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(name, encoding="utf-8")
    for pattern in ("*", "**", "**/*.txt"):
        found = find_files([str(tmp_path / pattern)])
        assert sorted(Path(file.url).name for file in found) == ["a.txt", "b.txt", "c.txt"]


def test_a_folder_that_cannot_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("a", encoding="utf-8")
    (tmp_path / "closed").mkdir()
    real = os.scandir

    def scandir(path: str) -> object:
        if path.endswith("closed"):  # as the system answers whoever is not root
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(ValueError, match=r"closed: cannot be read \(Permission denied\). Fix: chm"):
        find_files([str(tmp_path)])


@pytest.mark.parametrize("copy", ["a (1).txt", "b/a.txt", "a - Copy.TXT", "a.jsonl.gz"])
def test_copies_of_files_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], copy: str
) -> None:
    folder = tmp_path / "texts"
    name = "a.jsonl" if copy == "a.jsonl.gz" else "a.txt"
    contents = {name: line(TEXT), copy: line(TEXT), "c.txt": b"another"}
    if copy == "a.jsonl.gz":  # as gzip -k and zstd leave both
        contents[copy] = gzip.compress(line(TEXT))
    for path, content in contents.items():
        (folder / path).parent.mkdir(exist_ok=True, parents=True)
        (folder / path).write_bytes(content)
    run(folder, "--out_dir", tmp_path / "out")
    said = capsys.readouterr().err
    assert "warning: 1 files look like copies, " in said
    assert f"{copy} = {name}" in said or f"{name} = {copy}" in said


@pytest.mark.parametrize("packing", ["xz", "bz2"])
@pytest.mark.parametrize("rest", [b"\0\0\0\0", b"junk", "damaged"])
def test_what_follows_a_packed_stream_is_read_or_named(
    tmp_path: Path, packing: str, rest: bytes | str
) -> None:
    """Python's own readers end there in silence."""
    pack = {"xz": lzma.compress, "bz2": bz2.compress}[packing]
    stream = pack(line(TEXT))
    path = tmp_path / f"a.jsonl.{packing}"
    path.write_bytes(stream + stream)
    run(path, "--out_dir", tmp_path / "out")
    assert tokens(tmp_path / "out") == tokenize(TEXT).tolist() * 2
    path.write_bytes(stream + (rest if isinstance(rest, bytes) else b"x" + stream[1:]))
    with pytest.raises(ValueError, match=rf"a\.jsonl\.{packing}: cannot be read"):
        run(path, "--out_dir", tmp_path / "other")


def test_an_empty_name_is_not_the_folder_one_is_in() -> None:
    with pytest.raises(ValueError, match="no such file or folder"):
        find_files([""])


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT, encoding="utf-8-sig")
    (tmp_path / "b.jsonl").write_bytes(b"\xef\xbb\xbf" + line(TEXT) + line("b"))
    run(tmp_path / "a.txt", tmp_path / "b.jsonl", "--out_dir", tmp_path / "out")
    texts = [TEXT, TEXT, "b"]
    assert tokens(tmp_path / "out") == [t for text in texts for t in tokenize(text).tolist()]


@pytest.mark.parametrize("name", ["b.txt", "b.jsonl", "b.jsonl.gz", "b.parquet"])
@pytest.mark.parametrize(
    ("pointer", "tool"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "Git LFS"),
        (b"\xef\xbb\xbf\r\nversion https://hawser.github.com/spec/v1\n", "Git LFS"),
        (b"/annex/objects/SHA256E-s12345--4d7a.txt\n", "git-annex"),
        (b"../.git/annex/objects/Gm/x4/SHA256E-s12345--4d7a.txt", "git-annex"),
    ],
)
def test_a_pointer_is_not_the_file(tmp_path: Path, name: str, pointer: bytes, tool: str) -> None:
    (tmp_path / "a.txt").write_text(TEXT, encoding="utf-8")
    (tmp_path / name).write_bytes(pointer)
    inputs = [tmp_path / "a.txt", tmp_path / name, "--out_dir", tmp_path / "out"]
    with pytest.raises(ValueError, match=rf"{name}: a {tool} pointer, .* Fix: get the file with"):
        run(*inputs)
    index = run(*inputs, "--on_error", "skip")
    assert index.bad == {f"a {tool} pointer, not the file": 1}
    assert tokens(tmp_path / "out") == tokenize(TEXT).tolist()
