import pytest
import torch
from torch import Tensor

from model import GPT, GPTConfig
from model.generate import filter_logits, generate

CONFIG = GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=130)


@pytest.fixture
def model() -> GPT:
    gpt = GPT(CONFIG).eval()
    with torch.no_grad():
        for p in gpt.parameters():
            p.mul_(5)  # sharp distributions, so that a wrong position would be seen
    return gpt


def draw(model: GPT, tokens: Tensor, n: int, **options: object) -> Tensor:
    return torch.stack(list(generate(model, tokens, n, CONFIG, **options)), 1)  # pyright: ignore[reportArgumentType]  # options are mixed on purpose


@pytest.mark.parametrize("n_prompt", [1, 7, 16, 20])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_cache_changes_nothing_also_beyond_block_size(
    model: GPT, n_prompt: int, temperature: float
) -> None:
    tokens = torch.randint(130, (3, n_prompt))
    cached = draw(model, tokens, 24, temperature=temperature)
    assert torch.equal(cached, draw(model, tokens, 24, temperature=temperature, use_cache=False))
    assert cached.shape == (3, 24)


def test_chunks_after_a_cache_see_what_one_forward_sees(model: GPT) -> None:
    from model.cache import KVCache

    tokens = torch.randint(130, (2, 12))
    cache = KVCache(CONFIG.n_layer, CONFIG.block_size)
    parts = [model(part, cache=cache) for part in tokens.split([5, 1, 6], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), model(tokens), rtol=1e-4, atol=1e-5)


def test_zero_temperature_takes_the_best_token(model: GPT) -> None:
    tokens = torch.randint(130, (2, 5))
    best = model(tokens)[:, -1].argmax(-1)
    assert torch.equal(draw(model, tokens, 1, temperature=0)[:, 0], best)


def test_padded_rows_are_never_drawn(model: GPT) -> None:
    with torch.no_grad():
        model.wte.weight[130:] = 100 * model.wte.weight[:1]  # would win every draw
    assert draw(model, torch.zeros(64, 1, dtype=torch.long), 12, temperature=2.0).max() < 130


def test_seed_decides_and_the_global_generator_does_not(model: GPT) -> None:
    tokens = torch.zeros(2, 3, dtype=torch.long)
    first = draw(model, tokens, 10, seed=1)
    state = torch.get_rng_state()
    assert torch.equal(draw(model, tokens, 10, seed=1), first)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(draw(model, tokens, 10, seed=2), first)


def test_extreme_options_take_the_best_token(model: GPT) -> None:
    tokens = torch.randint(130, (2, 5))
    best = draw(model, tokens, 3, temperature=0)
    assert torch.equal(draw(model, tokens, 3, temperature=1e-40), best)
    assert torch.equal(draw(model, tokens, 3, top_p=1e-300), best)


def test_top_k_and_top_p_keep_the_best() -> None:
    logits = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).log()
    kept = lambda k, p: filter_logits(logits, k, p)[0].isfinite().tolist()  # noqa: E731
    assert kept(1, None) == [False, True, False, False]
    assert kept(3, None) == [False, True, True, True]
    assert kept(None, 0.4) == [False, True, False, False]
    assert kept(None, 0.65) == [False, True, False, True]
    assert kept(None, 1.0) == [True, True, True, True]
    assert kept(99, 0.71) == [False, True, True, True]
