"""`<|endoftext|>` in a .txt parts documents, wherever blocks are cut; elsewhere it is text."""

import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.index import ShardIndex
from data.mpi import Alone
from data.preparation import prepare
from data.prepare import build_parser, main
from data.tokenizer import END_OF_TEXT, EOT_TOKEN, load_tokenizer

STORIES = [
    "Once upon a time.\nThe end.\n",
    "one",
    "  Two words ",
    "Ünïcode, 日本語。",
    "x" * 90,
    "A story with\n\n\nparagraphs.",
    "!<|",
    "|>?",
]


def run(*arguments: object) -> ShardIndex:
    common = ["--quiet", "--workers", "2"]
    return prepare(build_parser().parse_args([*common, *map(str, arguments)]), Alone())


def tokens(folder: Path, split: str = "*") -> list[int]:
    files = sorted(folder.glob(f"*_{split}_*.npy"), key=lambda path: path.name[-10:])
    return [token for path in files for token in np.load(path).tolist()]


def stories(seed: int, n: int = 200) -> str:
    """A file as TinyStories' is: the separator on a line of its own, in one word, twice."""
    rng = random.Random(seed)
    text = ""
    for story in rng.choices(STORIES, k=n):
        text += story + rng.choice(["", "\n"])
        text += rng.choice([END_OF_TEXT, END_OF_TEXT, f"{END_OF_TEXT}\n{END_OF_TEXT}"])
        marks = ["\ufeff", "\ufeff\n ", "\r\n\ufeff"]  # of files that were joined
        text += rng.choice(["", "\n", *marks])
    return text + rng.choice(["", STORIES[0], "\n"])


def documents(text: str) -> list[str]:
    parts = [re.sub(r"\A([ \t\r\n\v\f]*)\ufeff", r"\1", part) for part in text.split(END_OF_TEXT)]
    return [part for part in parts if part.strip(" \t\n\r\x0b\x0c")]


def encoded(parts: list[str]) -> list[int]:
    text = "".join(END_OF_TEXT + part for part in parts)
    return load_tokenizer().encode(text, allowed_special={END_OF_TEXT})


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("shard_tokens", [37, 1000, 10**6])  # blocks are as small
def test_separators_are_the_special_token_wherever_blocks_are_cut(
    tmp_path: Path, seed: int, shard_tokens: int
) -> None:
    text = stories(seed)
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    index = run(
        tmp_path / "a.txt",
        "--out_dir",
        tmp_path / "out",
        "--val_tokens",
        50,
        "--shard_tokens",
        shard_tokens,
    )
    assert tokens(tmp_path / "out") == encoded(documents(text))
    n_documents = sum(shard.documents for shard in index.shards)
    assert n_documents == len(documents(text)) > 150


def test_one_word_documents_can_be_cut(tmp_path: Path) -> None:
    words = [f"{i:x}" * 30 for i in range(3000)]
    (tmp_path / "a.txt").write_text(END_OF_TEXT.join(words), encoding="utf-8")
    run(
        tmp_path / "a.txt",
        "--out_dir",
        tmp_path / "out",
        "--val_tokens",
        50,
        "--shard_tokens",
        5000,
        "--max_line_bytes",
        10_000,
    )
    assert tokens(tmp_path / "out") == encoded(words)


@pytest.mark.parametrize("shard_tokens", [37, 10**6])
def test_every_nth_document_of_a_file_is_validation(tmp_path: Path, shard_tokens: int) -> None:
    text = stories(7)
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    (tmp_path / "b.txt").write_text("another", encoding="utf-8")
    run(tmp_path, "--out_dir", tmp_path / "out", "--val_every", 5, "--shard_tokens", shard_tokens)
    parts = [*enumerate(documents(text)), (1, "another")]
    for split, is_val in (("val", True), ("train", False)):
        chosen = [part for number, part in parts if (number % 5 == 0) == is_val]
        assert tokens(tmp_path / "out", split) == encoded(chosen)


def test_stopped_in_a_file_it_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text(stories(3), encoding="utf-8")
    options = [tmp_path / "a.txt", "--val_every", 3, "--shard_tokens", 60, "--out_dir"]
    run(*options, tmp_path / "whole")
    from data.writing import write_index

    for limit in (2, 5, 9):

        def die(folder: Path, index: ShardIndex, limit: int = limit) -> None:
            write_index(folder, index)
            if len(index.shards) >= limit:
                raise RuntimeError("killed")

        with monkeypatch.context() as patch:
            patch.setattr("data.writing.write_index", die)
            with pytest.raises(RuntimeError, match="killed"):
                run(*options, tmp_path / "out")
    run(*options, tmp_path / "out")
    assert tokens(tmp_path / "out") == tokens(tmp_path / "whole")


@pytest.mark.parametrize(
    "start", ["\ufeff\n", "\ufeff ", "\ufeff", "\n\n", f"\n{END_OF_TEXT}\ufeff\n"]
)
@pytest.mark.parametrize("flags", [[], ["--literal_endoftext"], ["--val_every", 2]])
def test_whatever_a_file_begins_with_it_begins_a_document(
    tmp_path: Path, start: str, flags: list[Any]
) -> None:
    """Also where no block can be cut but there."""
    texts = [f"{letter}{'日本語' * 30}" for letter in "abcd"]
    for text in texts:
        (tmp_path / f"{text[0]}.txt").write_text(start + text, encoding="utf-8")
    sizes = ["--shard_tokens", 40] + ["--val_tokens", 20] * ("--val_every" not in flags)
    index = run(tmp_path, "--out_dir", tmp_path / "out", *sizes, *flags)
    assert sum(shard.documents for shard in index.shards) == 4
    assert tokens(tmp_path / "out").count(EOT_TOKEN) == 4


def test_a_flag_keeps_the_literal_reading(tmp_path: Path) -> None:
    text = stories(1)
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    options = [tmp_path / "a.txt", "--val_tokens", 50, "--out_dir", tmp_path / "out"]
    index = run(*options, "--literal_endoftext")
    expected = [EOT_TOKEN, *load_tokenizer().encode_ordinary(text)]
    assert tokens(tmp_path / "out") == expected
    assert sum(shard.documents for shard in index.shards) == 1
    with pytest.raises(
        ValueError,
        match=r"made of other files or with other options \(literal_endoftext True, not F",
    ):
        run(*options)


@pytest.mark.parametrize("val_every", [2, 3, 5])
def test_texts_of_both_splits_are_counted(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    val_every: int,
) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "some <|endoftext|> words"}\n' * 20, "utf-8")
    argv = ["prepare.py", str(tmp_path / "a.jsonl"), "--out_dir", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", [*argv, "--val_every", str(val_every)])
    assert main() == 0
    assert "; 20 texts with <|endoftext|> as text" in capsys.readouterr().err


@pytest.mark.parametrize("stopped", [False, True])
def test_lines_stay_literal_and_are_counted(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    stopped: bool,
) -> None:
    from data.writing import write_index

    line = '{"text": "some <|endoftext|> words"}\n{"text": "others, and more of them"}\n'
    (tmp_path / "a.jsonl").write_text(line * 40, encoding="utf-8")
    argv = [
        "prepare.py",
        str(tmp_path / "a.jsonl"),
        "--out_dir",
        str(tmp_path / "out"),
        "--val_tokens",
        "50",
        "--shard_tokens",
        "200",
    ]
    monkeypatch.setattr("sys.argv", argv)
    if stopped:
        with monkeypatch.context() as patch:

            def die(folder: Path, index: ShardIndex) -> None:
                write_index(folder, index)
                if len(index.shards) == 2:
                    raise RuntimeError("killed")

            patch.setattr("data.writing.write_index", die)
            with pytest.raises(RuntimeError, match="killed"):
                main()
    assert main() == 0
    said = capsys.readouterr().err
    assert "80 documents" in said
    assert "40 texts with <|endoftext|> as text" in said
    assert "left out" not in said
    each: Any = load_tokenizer().encode_ordinary
    both = [
        EOT_TOKEN,
        *each("some <|endoftext|> words"),
        EOT_TOKEN,
        *each("others, and more of them"),
    ]
    assert tokens(tmp_path / "out") == both * 40
