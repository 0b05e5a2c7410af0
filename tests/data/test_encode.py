import random
from pathlib import Path

import pytest

from bench.fidelity.seed_prepare import tokenize
from data import encode
from data.encode import TRICKY, Encoder

PIECES = [
    *TRICKY,
    "a",
    " the",
    "<|",
    "endoftext",
    "|>",
    "<|endoftext|>",
    "\n",
    " ",
    "é",
    "日本",
    "'s",
    "\u2028",
    "Ⅷ",
    "ſ",
    "\U0010ffff",
]


def reference(texts: list[str]) -> list[int]:
    return [token for text in texts for token in tokenize(text).tolist()]


@pytest.mark.parametrize("tokenizer", ["auto", "tiktoken"])
def test_tokens_are_the_seeds(tokenizer: str) -> None:
    encoder, rng = Encoder(tokenizer), random.Random(0)
    if tokenizer == "auto":
        pytest.importorskip("gigatoken")
        assert encoder.name == "gigatoken"
    for _ in range(300):
        texts = [
            "".join(rng.choices(PIECES, k=rng.randint(0, 5))) for _ in range(rng.randint(1, 9))
        ]
        utf8 = [text.encode() for text in texts]
        assert encoder.encode(utf8).tolist() == reference(texts)
        assert encoder.encode(utf8, continues=True).tolist() == reference(texts)[1:]
    assert encoder.encode([]).tolist() == []


def test_every_character_is_tokenised_alike() -> None:
    text = "".join(f"{chr(c)}a {chr(c)}" for c in range(0x110000) if not 0xD800 <= c < 0xE000)
    expected = reference([text])
    for tokenizer in ("auto", "tiktoken"):
        assert Encoder(tokenizer).encode([text.encode()]).tolist() == expected


def test_a_tokenizer_that_differs_is_not_used(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gigatoken")

    def build_gigatoken() -> encode.Encode:
        right = build()
        return lambda joined: right(joined)[:-1] if wrong else right(joined)

    build, wrong = encode.build_gigatoken, True
    monkeypatch.setattr(encode, "build_gigatoken", build_gigatoken)
    assert Encoder("auto").name == "tiktoken"
    assert "differs from tiktoken on texts that are hard" in capsys.readouterr().err
    wrong = False
    encoder = Encoder("auto")
    assert encoder.name == "gigatoken"
    wrong = True  # from here on: a sample tells
    encoder.compare_with_tiktoken([b"some text"], "b.jsonl")
    assert encoder.name == "tiktoken"
    assert "differs from tiktoken on b.jsonl" in capsys.readouterr().err
    assert encoder.encode([b"some text"]).tolist() == reference(["some text"])


def test_without_gigatoken_tiktoken_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gigatoken", None)
    assert Encoder("auto").name == "tiktoken"


def test_the_memory_of_words_is_bounded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("gigatoken")
    encoder = Encoder("auto")
    monkeypatch.setattr(encode, "RENEW_BYTES", 1000)
    for _ in range(5):
        assert encoder.encode([b"word " * 100]).tolist() == reference(["word " * 100])
    assert encoder._idle.empty() or encoder._idle.get()[1] < 1000
