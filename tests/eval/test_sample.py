from eval.sample import sample_texts, until_end_of_text
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


def test_texts_end_at_end_of_text() -> None:
    assert list(until_end_of_text(["a b<|endoftext|>c", "d"])) == ["a b", "d"]
