import tracemalloc

import numpy as np
import pytest

from data.order import Order, permute


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 16, 17, 63, 64, 65, 1000, 4097, 65_537])
@pytest.mark.parametrize("seed", [0, 1337])
def test_permutation_is_a_bijection(n: int, seed: int) -> None:
    image = permute(np.arange(n), n, seed, epoch=3)
    assert np.array_equal(np.sort(image), np.arange(n))


def test_permutation_mixes_as_a_random_one_does() -> None:
    n = 10_000
    image = permute(np.arange(n), n, 1, 0)
    assert (image == np.arange(n)).sum() < 10  # a random permutation has 1 fixed point on average
    steps = np.diff(image)
    assert (np.abs(steps) == 1).sum() < 15  # and 2 neighbours that stay neighbours
    assert abs(np.corrcoef(np.arange(n), image)[0, 1]) < 0.04  # 4 standard errors


def test_seed_and_epoch_key_the_permutation() -> None:
    orders = {tuple(permute(np.arange(50), 50, s, e)) for s in range(5) for e in range(5)}
    assert len(orders) == 25


def test_an_image_does_not_depend_on_what_is_asked_with_it() -> None:
    whole = permute(np.arange(1000), 1000, 1, 1)
    assert [int(permute(np.array([i]), 1000, 1, 1)[0]) for i in range(100)] == list(whole[:100])


def test_every_window_of_an_epoch_comes_exactly_once() -> None:
    order = Order(n_tokens=1000, seq_len=7, seed=5)
    assert order.n_windows == 142  # 142 * 7 + 1 = 995: the last partial window is left out
    for epoch in range(3):
        windows = order.windows(epoch * 142, 142)
        assert sorted(windows) == list(range(142))
    across = order.windows(100, 142)
    assert list(across) == [*order.windows(100, 42), *order.windows(142, 100)]


def test_unshuffled_order_is_sequential() -> None:
    assert list(Order(50, 7, shuffle=False).windows(4, 6)) == [4, 5, 6, 0, 1, 2]


def test_300_billion_tokens_cost_no_index() -> None:
    order = Order(n_tokens=300_000_000_000, seq_len=2048)
    tracemalloc.start()
    windows = order.windows(123_456_789, 512)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(set(windows.tolist())) == 512
    assert peak < 200_000  # bytes


def test_a_stream_shorter_than_a_window_is_refused() -> None:
    with pytest.raises(ValueError, match="--seq_len 64: 64 tokens are less than one window"):
        Order(64, 64)
