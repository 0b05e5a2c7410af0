import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiktoken

from data.prepare import build_parser, prepare
from data.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
TEXTS = ["first document\n", "", "third " * 50, "fourth: ñ 日本", "fifth <|endoftext|> text"]


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for i, text in enumerate(TEXTS[:2]):
        (folder / f"{i}.txt").write_text(text)
    lines = [json.dumps({"text": text, "id": 1}) for text in TEXTS[2:]]
    (folder / "z.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def expected_tokens(documents: list[str], tokenizer: tiktoken.Encoding) -> list[int]:
    return [t for text in documents for t in [50256, *tokenizer.encode_ordinary(text)]]


def run(*arguments: object) -> dict[str, int]:
    common = ["--quiet", "--processes", "2"]
    return prepare(build_parser().parse_args([*common, *map(str, arguments)]))


def read(folder: Path, split: str) -> list[int]:
    return [t for p in sorted(folder.glob(f"*_{split}_*.npy")) for t in np.load(p).tolist()]


def test_every_nth_document_is_validation(texts: Path, tmp_path: Path) -> None:
    counts = run(texts, "--out_dir", tmp_path / "out", "--val_every", 3, "--shard_tokens", 20)
    tokenizer = load_tokenizer()
    val = expected_tokens([TEXTS[0], TEXTS[3]], tokenizer)
    train = expected_tokens([TEXTS[1], TEXTS[2], TEXTS[4]], tokenizer)
    assert read(tmp_path / "out", "val") == val
    assert read(tmp_path / "out", "train") == train
    assert counts == {"train": len(train), "val": len(val)}
    sizes = [len(np.load(p)) for p in sorted((tmp_path / "out").glob("*_train_*.npy"))]
    assert all(size == 20 for size in sizes[:-1])
    assert not list((tmp_path / "out").glob("*.tmp"))


def test_by_default_the_first_shard_is_validation(texts: Path, tmp_path: Path) -> None:
    run(texts, "--out_dir", tmp_path / "out", "--shard_tokens", 10)
    whole = expected_tokens(TEXTS, load_tokenizer())
    files = sorted((tmp_path / "out").glob("*.npy"), key=lambda p: p.name[-10:])
    assert files[0].name == "text_val_000000.npy"
    assert all("_train_" in p.name for p in files[1:])
    assert [t for p in files for t in np.load(p).tolist()] == whole
    assert all(np.load(p).dtype == np.uint16 for p in files)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\nnot json\n', r"a\.jsonl:2: not a JSON object"),
        ("a.jsonl", b'{"body": "x"}\n', r"a\.jsonl:1: not a JSON object with a \"text\""),
        ("a.jsonl", b'{"text": null}\n', r"a\.jsonl:1: \"text\" is NoneType"),
        ("a.txt", b"\xff\xfe", r"a\.txt: not UTF-8"),
        ("a.pdf", b"x", r"a\.pdf: not one of \.txt, \.jsonl"),
    ],
)
def test_bad_input_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        run(tmp_path / name, "--out_dir", tmp_path / "out", "--val_every", 2)


def test_a_command_line_mistake_is_one_line_and_status_2(texts: Path, tmp_path: Path) -> None:
    command = [sys.executable, "data/prepare.py", str(texts), "--out_dir", str(tmp_path / "out")]
    done = subprocess.run(
        [*command, "--quiet"], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 2
    assert "no tokens for the train split; give --val_every" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not list((tmp_path / "out").iterdir())  # the remedy works in the same folder
    run(texts, "--out_dir", tmp_path / "out", "--val_every", 2)
    with pytest.raises(ValueError, match="holds shards already"):
        run(texts, "--out_dir", tmp_path / "out", "--val_every", 2)


@pytest.mark.parametrize(
    ("option", "value"),
    [("--shard_tokens", 0), ("--processes", 0), ("--val_every", 1), ("--val_every", -1)],
)
def test_impossible_options_are_refused(
    texts: Path, tmp_path: Path, option: str, value: int
) -> None:
    with pytest.raises(ValueError, match=f"{option} {value}: must be"):
        run(texts, "--out_dir", tmp_path / "out", option, value)
