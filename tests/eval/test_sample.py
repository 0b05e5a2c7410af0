import pytest

from eval.sample import build_parser, check_options, sample_texts, until_end_of_text
from model import GPT, GPTConfig

CONFIG = GPTConfig(n_layer=1, n_head=2, n_embd=32, block_size=32)


def test_texts_start_with_the_prompt_and_differ_by_seed() -> None:
    model = GPT(CONFIG).eval()
    texts = sample_texts(model, CONFIG, "Hello there", n_samples=3, max_new_tokens=8, seed=1)
    assert len(texts) == 3
    assert all(text.startswith("Hello there") for text in texts)
    same = sample_texts(model, CONFIG, "Hello there", n_samples=3, max_new_tokens=8, seed=1)
    other = sample_texts(model, CONFIG, "Hello there", n_samples=3, max_new_tokens=8, seed=2)
    assert texts == same != other


def test_an_empty_prompt_starts_a_document() -> None:
    texts = sample_texts(GPT(CONFIG).eval(), CONFIG, "", n_samples=1, max_new_tokens=4)
    assert len(texts) == 1


@pytest.mark.parametrize(
    ("option", "value"),
    [("n_samples", 0), ("max_new_tokens", 0), ("top_k", 0), ("top_p", 0.0), ("temperature", -1.0)],
)
def test_values_out_of_range_name_their_flag(option: str, value: float) -> None:
    args = build_parser().parse_args(["--ckpt", "x", f"--{option}", str(value)])
    with pytest.raises(ValueError, match=f"--{option} {value}: must"):
        check_options(args)


def test_texts_end_at_end_of_text() -> None:
    assert list(until_end_of_text(["a b<|endoftext|>c", "d"])) == ["a b", "d"]
