"""A file that is not what its name says is read, or named with the command that mends it."""

import bz2
import gzip
import json
import lzma
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from data.remedies import how_to_get_shards
from data.shards import TokenStream
from tests.prepared import expected, run, tokens

ROOT = Path(__file__).resolve().parents[2]
TEXTS = ["first document, of several words ", "café “quoted” and more of it ", "third"]
RECORDS = [{"text": text, "id": i} for i, text in enumerate(TEXTS)]
LINES = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS)
OR_SKIP = ", or leave it out with --on_error skip"


ARRAY = json.dumps(RECORDS).encode()
INDENTED = "\n".join(json.dumps(record, indent=2) for record in RECORDS).encode()
PARTED = "".join(f'{{"text": {json.dumps(text)},\r\n  "id": 1}}\r\n' for text in TEXTS).encode()
OLD_MAC = LINES.replace("\n", "\r").encode()
WRONG = {
    "a.json": (ARRAY, "a JSON array, not one object per line"),
    "b.jsonl": (b"\xef\xbb\xbf[\n" + ARRAY[1:-1] + b"\n]\n", "a JSON array, not one object"),
    "c d's.jsonl": (json.dumps(TEXTS, indent=1).encode(), "a JSON array of strings"),
    "e.jsonl.gz": (gzip.compress(ARRAY), "a JSON array, not one object per line"),
    "f.jsonl": (INDENTED, "JSON objects over several lines"),
    "g.jsonl": (PARTED, "JSON objects over several lines"),
    "h.jsonl": (OLD_MAC, r"lines that end in \r"),
    "i.ndjson.gz": (gzip.compress(OLD_MAC), r"lines that end in \r"),
    "j.jsonl": (LINES.encode("utf-16"), "UTF-16"),
    "k.jsonl": (LINES.encode("utf-16-le"), "UTF-16"),
    "l.ndjson.bz2": (bz2.compress(b"\xfe\xff" + LINES.encode("utf-16-be")), "UTF-16"),
    "m.jsonl.xz": (lzma.compress(LINES.encode("utf-16")), "UTF-16"),
    "n.jsonl": (LINES.encode("cp1252"), "not UTF-8"),
    "o.txt": ("<|endoftext|>".join(TEXTS).encode("utf-16"), "UTF-16"),
    "p.txt": ("<|endoftext|>".join(TEXTS).encode("cp1252"), "not UTF-8"),
    "q.txt": (gzip.compress("<|endoftext|>".join(TEXTS).encode()), "a gzip file"),
}


@pytest.mark.parametrize("name", WRONG)
def test_the_command_that_is_named_makes_the_file_readable(tmp_path: Path, name: str) -> None:
    content, what = WRONG[name]
    folder = tmp_path / "my texts"
    folder.mkdir()
    (folder / name).write_bytes(content)
    given = folder / name if name == "a.json" else folder
    with pytest.raises(ValueError, match="Fix: ") as caught:
        run(given, "--out_dir", tmp_path / "out")
    said = str(caught.value)
    assert said.startswith(str(folder / name))
    assert what in said
    assert len(said.splitlines()) == 1
    if "jq" in said and not shutil.which("jq"):
        pytest.skip("no jq")
    command = said.split("Fix: ")[1].removeprefix("if it is Windows-1252: ").removesuffix(OR_SKIP)
    subprocess.run(command, shell=True, check=True, timeout=20)
    run(given, "--out_dir", tmp_path / "out")
    assert tokens(tmp_path / "out") == expected(TEXTS)
    (old,) = folder.glob("*.old")
    assert old.read_bytes() == content


PACK = {".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress, "": bytes}


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("packing", PACK)
def test_compressed_lines_are_known_by_their_content(
    tmp_path: Path, suffix: str, packing: str
) -> None:
    (tmp_path / f"a.jsonl{suffix}").write_bytes(PACK[packing](LINES.encode()))
    run(tmp_path, "--out_dir", tmp_path / "out")
    assert tokens(tmp_path / "out") == expected(TEXTS)


def test_a_compressed_file_without_its_suffix_stops_at_max_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(gzip.compress(LINES.encode() * 999))
    with pytest.raises(ValueError, match=r"a\.jsonl: expands beyond 10,000 bytes"):
        run(tmp_path, "--out_dir", tmp_path / "out", "--max_bytes", 10_000)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_a_page_in_place_of_a_file_is_named_or_left_out(tmp_path: Path, name: str) -> None:
    (tmp_path / "good.txt").write_text(TEXTS[0], encoding="utf-8")
    (tmp_path / name).write_bytes(b"\n<!DOCTYPE html>\n<html>Not Found</html>\n")
    inputs = (tmp_path / "good.txt", tmp_path / name, "--out_dir", tmp_path / "out")
    with pytest.raises(ValueError, match=rf"{name}: an HTML or XML page\. Fix: download the file"):
        run(*inputs)
    assert run(*inputs, "--on_error", "skip").bad == {"an HTML or XML page": 1}
    assert tokens(tmp_path / "out") == expected(TEXTS[:1])


def test_a_page_is_text_where_it_is_meant_to_be(tmp_path: Path) -> None:
    texts = ["<!DOCTYPE html>\n<html>text</html>\n", "[\n{ a text }]", "{\n a text\r\r{"]
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_bytes(text.encode())
    run(tmp_path, "--out_dir", tmp_path / "out")
    assert tokens(tmp_path / "out") == expected(texts)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n", "\r\n \t\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_lines_of_every_system_are_read(tmp_path: Path, end: str, mark: str) -> None:
    (tmp_path / "a.jsonl").write_bytes((mark + LINES.replace("\n", end)).encode())
    run(tmp_path, "--out_dir", tmp_path / "out")
    assert tokens(tmp_path / "out") == expected(TEXTS)


def test_a_long_run_of_white_space_takes_no_time(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b" \n" * 2**20 + b'{"a": "' + b"}, [" * 2**18 + b"\n")
    with pytest.raises(ValueError, match=r"a\.jsonl:1048577: not JSON"):
        run(tmp_path, "--out_dir", tmp_path / "out")


def test_a_pointer_comes_with_a_command_for_its_folder(tmp_path: Path) -> None:
    (tmp_path / "b.parquet").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match=f"with: cd {tmp_path} && git lfs pull, or leave it"):
        run(tmp_path, "--out_dir", tmp_path / "out")
    (tmp_path / "b.parquet").write_bytes(b"/annex/objects/SHA256E-s12345--4d7a.txt\n")
    with pytest.raises(ValueError, match=rf"with: cd {tmp_path} && git annex get \., or leave it"):
        run(tmp_path, "--out_dir", tmp_path / "out")


@pytest.mark.parametrize("n_files", [1, 3, 12])
def test_a_folder_of_text_comes_with_commands_that_make_shards_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_files: int
) -> None:
    texts = tmp_path / "my texts" / "inner"
    texts.mkdir(parents=True)
    for i in range(n_files):
        (texts / f"{i}.txt").write_text(f"Document {i} has a few words. " * 20)
    monkeypatch.chdir(tmp_path)
    where = rf"--data_dir my texts: no shard .*; it holds {n_files} \.txt\. Fix: python "
    with pytest.raises(ValueError, match=where) as refused:
        TokenStream(Path("my texts"), "train", 50257)
    command, _, flag = refused.value.args[2].partition(", then ")
    assert flag == "--data_dir 'my texts_tokens'"
    program, script, *argv = shlex.split(command)
    done = subprocess.run([sys.executable, ROOT / script, *argv], capture_output=True, timeout=60)
    assert (program, done.returncode) == ("python", 0), done.stderr
    for split in ("train", "val"):
        assert len(TokenStream(Path("my texts_tokens"), split, 50257)) > 1


def test_other_places_without_shards_come_with_a_command_too(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n')
    (tmp_path / "nothing").mkdir()
    assert how_to_get_shards(Path("edu_fineweb10B")) == ("", "python data/fineweb.py")
    remedy = f"python data/prepare.py TEXT… --out_dir {tmp_path}/nothing"
    assert how_to_get_shards(tmp_path / "nothing") == ("", remedy)
    assert how_to_get_shards(tmp_path / "missing")[1].endswith("/missing")
    for place in (tmp_path, tmp_path / "a.jsonl"):
        what, remedy = how_to_get_shards(place)
        assert what == "; it holds 1 .jsonl"
        assert remedy.startswith(f"python data/prepare.py {place} --out_dir {place}_tokens ")
