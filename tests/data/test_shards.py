from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data.index import Position, Resume, ShardIndex, ShardRecord, hash_file, write_index
from data.shards import TokenStream, open_shard


def write(folder: Path, *shards: np.ndarray, split: str = "train") -> np.ndarray:
    for i, tokens in enumerate(shards):
        np.save(folder / f"text_{split}_{i:06d}.npy", tokens.astype(np.uint16))
    return np.concatenate(shards)


def test_reads_cross_shard_edges(tmp_path: Path) -> None:
    whole = write(tmp_path, np.arange(10), np.arange(100, 103), np.arange(200, 220))
    stream = TokenStream(tmp_path, "train", 50257)
    assert len(stream) == 33
    for start in range(33):
        for length in range(33 - start + 1):
            expected = whole[start : start + length]
            assert stream.read(start, length).tolist() == expected.tolist()


def test_other_tokens_have_another_fingerprint(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 50257, 100_000)
    path = tmp_path / "text_train_000000.npy"

    def fingerprint(tokens: np.ndarray) -> str:
        np.save(path, tokens.astype(np.uint16))
        return TokenStream(tmp_path, "train", 50257).fingerprint()

    original = fingerprint(tokens)
    assert fingerprint(tokens) == original
    for position in (0, 1000, 99_999):
        changed = tokens.copy()
        changed[position] ^= 1
        assert fingerprint(changed) != original
    assert fingerprint(tokens[:-1]) != original
    fingerprint(tokens)
    path.rename(tmp_path / "moved_train_000007.npy")
    assert TokenStream(tmp_path, "train", 50257).fingerprint() == original


def test_build_nanogpt_names_are_read_in_order(tmp_path: Path) -> None:
    for i in (2, 10, 1):
        np.save(tmp_path / f"edufineweb_train_{i:06d}.npy", np.array([i], dtype=np.uint16))
    np.save(tmp_path / "edufineweb_val_000000.npy", np.array([99], dtype=np.uint16))
    assert TokenStream(tmp_path, "train", 50257).read(0, 3).tolist() == [1, 2, 10]


def test_nothing_is_copied_into_memory_before_it_is_read(tmp_path: Path) -> None:
    write(tmp_path, np.zeros(1000))
    assert isinstance(open_shard(next(tmp_path.glob("*.npy"))), np.memmap)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (np.zeros(5, np.int32), "holds <i4"),
        (np.zeros(5, ">u2"), "holds >u2"),
        (np.zeros((5, 2), np.uint16), r"holds <u2 \(5, 2\)"),
    ],
)
def test_other_arrays_are_refused(tmp_path: Path, tokens: np.ndarray, message: str) -> None:
    path = tmp_path / "text_train_000000.npy"
    np.save(path, tokens)
    with pytest.raises(ValueError, match=f"{path.name}: {message}"):
        open_shard(path)


def test_an_archive_under_the_name_of_a_shard_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", tokens=np.zeros(5, np.uint16))
    path = (tmp_path / "a.npz").rename(tmp_path / "text_train_000000.npy")
    with pytest.raises(ValueError, match=r"text_train_000000\.npy: not a \.npy file, begins"):
        open_shard(path)


def test_a_header_that_says_less_than_the_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "text_train_000000.npy"
    np.save(path, np.arange(100, dtype=np.uint16))
    path.write_bytes(path.read_bytes().replace(b"(100,)", b"(50,) "))
    with pytest.raises(ValueError, match="header says 50 tokens, the file has 328 bytes"):
        open_shard(path)


@pytest.mark.parametrize("damage", ["cut", "grown", "empty", "garbage", "pickle"])
def test_damaged_shards_are_refused_by_name(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "text_train_000000.npy"
    np.save(path, np.arange(100, dtype=np.uint16))
    whole = path.read_bytes()
    altered = {"cut": whole[:-7], "grown": whole + b"12", "empty": b"", "garbage": b"x" * 99}
    if damage == "pickle":
        np.save(path, np.array([object()], dtype=object), allow_pickle=True)
    else:
        path.write_bytes(altered[damage])
    with pytest.raises(ValueError, match=r"text_train_000000\.npy: "):
        open_shard(path)


def test_tokens_beyond_the_vocabulary_name_their_shard(tmp_path: Path) -> None:
    write(tmp_path, np.zeros(10), np.array([1, 60000, 2]))
    with pytest.raises(ValueError, match=r"text_train_000001\.npy: token 60000"):
        TokenStream(tmp_path, "train", 50257)


def test_a_folder_without_shards_says_how_to_make_them(tmp_path: Path) -> None:
    write(tmp_path, np.zeros(10))
    with pytest.raises(ValueError, match=r"no shard \*_val_\*.*data/prepare\.py"):
        TokenStream(tmp_path, "val", 50257)


TOKENS = np.random.default_rng(0).integers(0, 50257, 1000).astype("<u2")


def llm_c(tokens: np.ndarray, magic: int = 20240520, version: int = 1, order: str = "<") -> bytes:
    header = np.zeros(256, f"{order}i4")
    header[:3] = magic, version, len(tokens)
    return header.tobytes() + tokens.tobytes()


@pytest.mark.parametrize(
    ("names", "pack"),
    [
        (("fineweb_{}_000001.bin", "fineweb_{}_000002.bin"), llm_c),
        (("TinyStories_{}.bin",), llm_c),
        (("{}.bin",), lambda tokens: tokens.tobytes()),
        (("{}.bin",), llm_c),
    ],
)
def test_other_peoples_shards_are_read_in_place(
    tmp_path: Path, names: tuple[str, ...], pack: Callable[[np.ndarray], bytes]
) -> None:
    for split in ("train", "val"):
        for name, part in zip(names, np.array_split(TOKENS, len(names)), strict=True):
            (tmp_path / name.format(split)).write_bytes(pack(part))
    for split in ("train", "val"):
        stream = TokenStream(tmp_path, split, 50257)
        assert stream.read(0, len(stream)).tolist() == TOKENS.tolist()
        assert all(isinstance(shard, np.memmap) for shard in stream.shards)


REFUSED = {
    "cut": (llm_c(TOKENS)[:-2], "header says 1000 tokens, the file has 3022 bytes"),
    "grown": (llm_c(TOKENS) + b"12", "header says 1000 tokens, the file has 3026 bytes"),
    "llama": (llm_c(TOKENS, version=7), "llm.c version 7; GPT-2 tokens are version 1"),
    "big-endian header": (llm_c(TOKENS, order=">"), "an llm.c file in big-endian order"),
    "empty": (b"", "0 bytes are not uint16 tokens"),
    "odd": (TOKENS.tobytes() + b"1", "2001 bytes are not uint16 tokens"),
    "wide": (TOKENS.astype("<u4").tobytes(), "32-bit tokens, it seems"),
    "int64": (TOKENS.astype("<i8").tobytes(), "64-bit tokens, it seems"),
    "big-endian": (
        TOKENS.astype(">u2").tobytes(),
        r"token \d+, the vocabulary has 50257 \(big-end",
    ),
    "beyond": (np.full(9, 60000, "<u2").tobytes(), "token 60000, the vocabulary has 50257"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_what_does_not_fit_is_refused_by_name(tmp_path: Path, fault: str) -> None:
    data, message = REFUSED[fault]
    (tmp_path / "train.bin").write_bytes(data)
    with pytest.raises(ValueError, match=rf"train\.bin: {message}"):
        TokenStream(tmp_path, "train", 50257)


def test_a_numbered_bin_without_header_is_refused(tmp_path: Path) -> None:
    (tmp_path / "fineweb_train_000001.bin").write_bytes(llm_c(TOKENS, magic=0))
    with pytest.raises(ValueError, match=r"fineweb_train_000001\.bin: no llm\.c header"):
        TokenStream(tmp_path, "train", 50257)


def test_no_token_and_another_tokenizer_are_refused(folder: Path, tmp_path: Path) -> None:
    records = read_records(folder)
    recipe = {"tokenizer": {"merges_sha256": "0" * 64}}
    write_index(folder, ShardIndex(recipe, records, {}, None))
    with pytest.raises(ValueError, match=r"shards\.json: made with another tokenizer"):
        TokenStream(folder, "train", 50257)
    np.save(tmp_path / "text_val_000000.npy", np.zeros(0, np.uint16))
    with pytest.raises(ValueError, match=r"text_val_000000\.npy: holds no token"):
        TokenStream(tmp_path, "val", 50257)


def test_characters_as_tokens_are_refused(tmp_path: Path) -> None:
    (tmp_path / "train.bin").write_bytes(np.arange(65, dtype="<u2").tobytes())
    (tmp_path / "meta.pkl").write_bytes(b"")  # nanoGPT's shakespeare_char
    with pytest.raises(ValueError, match=r"train\.bin: tokens of another vocabulary \(meta\.pkl"):
        TokenStream(tmp_path, "train", 50257)


def test_two_kinds_in_a_folder_are_refused(tmp_path: Path) -> None:
    write(tmp_path, np.zeros(10))
    (tmp_path / "train.bin").write_bytes(bytes(20))
    with pytest.raises(ValueError, match=r"holds \*_train_\*\.npy and train\.bin"):
        TokenStream(tmp_path, "train", 50257)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards and the index that fits them."""
    write(tmp_path, np.arange(10), np.arange(20, 35))
    write_index(tmp_path, ShardIndex({}, read_records(tmp_path), {}, None))
    return tmp_path


def read_records(folder: Path) -> list[ShardRecord]:
    return [
        ShardRecord(path.name, "train", len(np.load(path)), 0, 34, hash_file(path))
        for path in sorted(folder.glob("*.npy"))
    ]


def test_shards_that_fit_their_manifest_are_taken(folder: Path) -> None:
    assert len(TokenStream(folder, "train", 50257, verify=True)) == 25


def test_a_changed_byte_is_found_by_verify(folder: Path) -> None:
    path = folder / "text_train_000001.npy"
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)
    TokenStream(folder, "train", 50257)
    with pytest.raises(ValueError, match=r"text_train_000001\.npy: damaged \(SHA-256\)"):
        TokenStream(folder, "train", 50257, verify=True)


def test_what_the_manifest_does_not_know_is_refused(folder: Path) -> None:
    np.save(folder / "text_train_000002.npy", np.zeros(4, np.uint16))
    with pytest.raises(ValueError, match=r"text_train_000002\.npy: not in shards\.json"):
        TokenStream(folder, "train", 50257)
    (folder / "text_train_000002.npy").unlink()
    np.save(folder / "text_train_000001.npy", np.zeros(4, np.uint16))
    with pytest.raises(ValueError, match=r"000001\.npy: 4 tokens, shards\.json says 15"):
        TokenStream(folder, "train", 50257)
    (folder / "text_train_000001.npy").unlink()
    with pytest.raises(ValueError, match=r"text_train_000001\.npy: missing, shards\.json names it"):
        TokenStream(folder, "train", 50257)


def test_the_largest_token_is_known_without_reading(folder: Path) -> None:
    with pytest.raises(
        ValueError, match=r"text_train_000000\.npy: token 34, the vocabulary has 30"
    ):
        TokenStream(folder, "train", 30)


def test_an_unfinished_or_damaged_manifest_is_refused(folder: Path) -> None:
    write_index(folder, ShardIndex({}, [], {}, Resume("", Position(), 0, {})))
    with pytest.raises(ValueError, match=r"not finished\. Fix: run its preparation again"):
        TokenStream(folder, "train", 50257)
    (folder / "shards.json").write_text('{"shards": 1}')
    with pytest.raises(ValueError, match=r"shards\.json: damaged"):
        TokenStream(folder, "train", 50257)


@pytest.mark.parametrize("name", ["{} (1)", "{} copy", "{} - Copy", "{}_copy", "{}-1", "{}.old"])
def test_a_copy_beside_a_shard_is_refused(tmp_path: Path, name: str) -> None:
    write(tmp_path, np.arange(50), np.arange(60))
    path = tmp_path / f"{name.format('text_train_000001')}.npy"
    np.save(path, np.arange(50).astype("<u2"))
    with pytest.raises(ValueError, match=r"a copy of text_train_000001.npy. Fix: move it out"):
        TokenStream(tmp_path, "train", 50257)


def test_numbers_of_other_lengths_are_no_copies(tmp_path: Path) -> None:
    for number in (1, 10, 100, 2):
        np.save(tmp_path / f"text_train_{number}.npy", np.arange(number + 5).astype("<u2"))
    assert len(TokenStream(tmp_path, "train", 50257)) == 113 + 4 * 5


@pytest.mark.parametrize("name", ["._text_train_000000.npy", ".text_train_000009.npy"])
def test_hidden_files_are_no_shards(tmp_path: Path, name: str) -> None:
    tokens = write(tmp_path, np.arange(50), np.arange(60))
    (tmp_path / name).write_bytes(b"Mac OS X")
    (tmp_path / ".DS_Store").write_bytes(b"")
    assert len(TokenStream(tmp_path, "train", 50257)) == len(tokens)


@pytest.mark.parametrize(
    "text",
    [
        b"version https://git-lfs.github.com/spec/v1\noid sha256:"
        + b"4d7a" * 16
        + b"\nsize 1234\n",
        b"<!DOCTYPE html>\n<html><head><title>404 Not Found</title></head><body></body></html>\n",
    ],
)
def test_text_under_the_name_of_a_bin_is_refused(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "train.bin").write_bytes(text + b"\n" * (len(text) % 2))
    with pytest.raises(ValueError, match=r"train.bin: begins with the text b'.*. Fix"):
        TokenStream(tmp_path, "train", 50257)


def test_shards_that_hold_the_same_are_told(tmp_path: Path) -> None:
    tokens = np.random.default_rng(0).integers(0, 50257, 100_000).astype(np.uint16)
    for name, shard in {"a": tokens, "b": tokens[:-1], "c": tokens[::-1], "d": tokens}.items():
        np.save(tmp_path / f"{name}_train_000000.npy", shard)
    told = TokenStream(tmp_path, "train", 50257).copies()
    first, last = tmp_path / "a_train_000000.npy", tmp_path / "d_train_000000.npy"
    assert told == [f"{last}: a copy of {first.name}, by length and ends. Fix: remove one"]
