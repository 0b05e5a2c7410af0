from pathlib import Path

import numpy as np
import pytest

from data.shards import TokenStream, open_shard, write_shard


def write(folder: Path, *shards: np.ndarray, split: str = "train") -> np.ndarray:
    for i, tokens in enumerate(shards):
        write_shard(folder / f"text_{split}_{i:06d}.npy", tokens.astype(np.uint16))
    return np.concatenate(shards)


def test_reads_cross_shard_edges(tmp_path: Path) -> None:
    whole = write(tmp_path, np.arange(10), np.arange(100, 103), np.arange(200, 220))
    stream = TokenStream(tmp_path, "train", 50257)
    assert len(stream) == 33
    for start in range(33):
        for length in range(33 - start + 1):
            expected = whole[start : start + length]
            assert stream.read(start, length).tolist() == expected.tolist()


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


@pytest.mark.parametrize("damage", ["cut", "grown", "empty", "garbage", "pickle"])
def test_damaged_shards_are_refused_by_name(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "text_train_000000.npy"
    write_shard(path, np.arange(100, dtype=np.uint16))
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
