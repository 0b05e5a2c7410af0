import hashlib
import random
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from data.loader import Loader, rank_samples, split_windows
from data.order import Order
from data.shards import TokenStream

T, BATCH = 16, 8


def global_batches(
    data_dir: Path, micro: int, world_size: int, first: int, count: int, shuffle: bool = True
) -> Iterator[str]:
    """Hash each global batch, its rows in order, as all ranks together see it."""
    stream = TokenStream(data_dir, "train", 50257)
    order = Order(len(stream), T, seed=3, shuffle=shuffle)
    accum = BATCH // micro // world_size
    loaders = [
        Loader(stream, order, micro, accum, rank, world_size, first * BATCH)
        for rank in range(world_size)
    ]
    for _ in range(count):
        rows = [next(loader) for _ in range(accum) for loader in loaders]
        yield hashlib.sha256(torch.cat(rows).numpy().tobytes()).hexdigest()
    for loader in loaders:
        loader.close()


@pytest.fixture(scope="module")
def expected(data_dir: Path) -> list[str]:
    return list(global_batches(data_dir, BATCH, 1, 0, 50))


@pytest.mark.parametrize(
    ("micro", "world_size"),
    [(m, w) for w in (1, 2, 4) for m in (1, 2, 4, 8) if m * w <= BATCH],
)
def test_global_batches_do_not_depend_on_the_split(
    data_dir: Path, expected: list[str], micro: int, world_size: int
) -> None:
    assert list(global_batches(data_dir, micro, world_size, 0, 50)) == expected


def test_resume_continues_the_same_list(data_dir: Path, expected: list[str]) -> None:
    for first in random.Random(0).sample(range(1, 49), 20):
        world_size = random.Random(first).choice([1, 2, 4])
        got = list(global_batches(data_dir, 2, world_size, first, 50 - first))
        assert got == expected[first:]


def test_rows_are_windows_of_the_stream(data_dir: Path) -> None:
    stream = TokenStream(data_dir, "train", 50257)
    whole = np.concatenate([np.load(path) for path in stream.paths])
    loader = Loader(stream, Order(len(stream), T, shuffle=False), 4, 1)
    for k in range(450):  # 27,777 tokens: over the edge of the shards and into the second epoch
        rows = next(loader)
        for j in range(4):
            i = (4 * k + j) % 1736
            assert np.array_equal(rows[j].numpy(), whole[i * T : i * T + T + 1])
    loader.close()


def test_targets_follow_tokens() -> None:
    windows = torch.tensor([[1, 2, 65535], [4, 5, 6]], dtype=torch.uint16)
    tokens, targets = split_windows(windows, "cpu")
    assert tokens.tolist() == [[1, 2], [4, 5]]
    assert targets.tolist() == [[2, 65535], [5, 6]]
    assert tokens.dtype == torch.int64


def test_micro_batches_of_all_ranks_tile_the_batch() -> None:
    parts = [list(rank_samples(100, 3, 4, rank, 2)) for rank in range(2)]
    side_by_side = [s for step in zip(*parts, strict=True) for part in step for s in part]
    assert side_by_side == list(range(100, 124))


def test_memory_does_not_grow_with_the_number_of_shards(tmp_path: Path) -> None:
    peaks = []
    for n_shards in (1, 40):
        folder = tmp_path / str(n_shards)
        folder.mkdir()
        for i in range(n_shards):
            np.save(folder / f"text_train_{i:06d}.npy", np.full(200_000, i, np.uint16))
        tracemalloc.start()
        stream = TokenStream(folder, "train", 50257)
        loader = Loader(stream, Order(len(stream), 64), 4, 1)
        for _ in range(20):
            next(loader)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        loader.close()
    assert peaks[1] < peaks[0] + 400_000  # bytes: 39 more shards hold 15.6 MB


def test_a_bad_token_is_raised_where_its_batch_is_taken(tmp_path: Path) -> None:
    tokens = np.zeros(2**20 + 200, np.uint16)
    tokens[-50] = 60000  # beyond what is checked when the shard is opened
    np.save(tmp_path / "text_train_000000.npy", tokens)
    stream = TokenStream(tmp_path, "train", 50257)
    order = Order(len(stream), 64, shuffle=False)
    loader = Loader(stream, order, 1, 1, samples=order.n_windows - 1)
    with pytest.raises(ValueError, match=r"text_train_000000\.npy: token 60000"):
        next(loader)
    loader.close()
