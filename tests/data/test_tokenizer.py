import tiktoken

from data.tokenizer import load_tokenizer


def test_known_ids() -> None:
    tokenizer = load_tokenizer()
    # build-nanogpt's prompt, and the ids that it prints
    assert tokenizer.encode("Hello, I'm a language model,") == [
        15496,
        11,
        314,
        1101,
        257,
        3303,
        2746,
        11,
    ]
    assert tokenizer.eot_token == 50256
    assert tokenizer.n_vocab == 50257


def test_every_text_survives() -> None:
    tokenizer = load_tokenizer()
    text = "".join(chr(c) for c in range(1, 0x2000)) + "  \n\n\t日本語 🙂 don't 1234 x_y"
    tokens = tokenizer.encode_ordinary(text)
    assert tokenizer.decode(tokens) == text
    assert max(tokens) < 50256


def test_end_of_text_in_a_document_is_ordinary_text() -> None:
    tokens = load_tokenizer().encode_ordinary("a<|endoftext|>b")
    assert 50256 not in tokens
    assert isinstance(load_tokenizer(), tiktoken.Encoding)
