import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2LMHeadModel

from checkpoint.hf_folder import save_hf_folder
from data.tokenizer import EOT_TOKEN, load_tokenizer
from eval.sample import (
    build_parser,
    check_options,
    encode_prompt,
    run,
    sample_texts,
    stream_texts,
)
from eval.session import Session
from model import GPT, GPTConfig
from training.ranks import read_ranks

CONFIG = GPTConfig(n_layer=1, n_head=2, n_embd=32, block_size=32)


def test_texts_start_with_the_prompt_and_differ_by_seed() -> None:
    session = Session(GPT(CONFIG).eval(), CONFIG, torch.device("cpu"), read_ranks())
    texts = sample_texts(session, "Hello there", 8, seed=1)
    assert len(texts) == 4
    assert all(text.startswith("Hello there") for text in texts)
    assert texts == sample_texts(session, "Hello there", 8, seed=1)
    assert texts != sample_texts(session, "Hello there", 8, seed=2)


def test_end_of_text_in_a_prompt_and_an_empty_prompt_start_a_document() -> None:
    assert encode_prompt("") == encode_prompt("<|endoftext|>") == [EOT_TOKEN]
    assert encode_prompt("a<|endoftext|>b") == [64, EOT_TOKEN, 65]
    assert encode_prompt("<|endoftext") != [EOT_TOKEN]  # only whole


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("n_samples", 0),
        ("max_new_tokens", 0),
        ("top_k", 0),
        ("top_p", 0.0),
        ("temperature", -1.0),
        ("temperature", math.nan),
        ("seed", -1),
    ],
)
def test_values_out_of_range_name_their_flag(option: str, value: float) -> None:
    args = build_parser().parse_args(["--ckpt", "x", f"--{option}", str(value)])
    with pytest.raises(ValueError, match=f"--{option} {value}: out of range"):
        check_options(args)


def test_a_text_ends_at_end_of_text_and_the_drawing_with_the_last() -> None:
    rows = [[464, 464], [EOT_TOKEN, 3290], [464, EOT_TOKEN], [464, 464]]
    drawn = iter(map(torch.tensor, rows))
    assert stream_texts("> ", drawn, 2, lambda _: None) == ["> The", "> The dog"]
    assert next(drawn).tolist() == [464, 464]  # not drawn


def test_the_first_text_is_shown_as_it_comes() -> None:
    shown: list[str] = []
    seen_at_each_token = []
    tokens = load_tokenizer().encode_ordinary("A cat. \N{THUMBS UP SIGN}!")

    def draw() -> Iterator[torch.Tensor]:
        for token in tokens:
            seen_at_each_token.append("".join(shown))
            yield torch.tensor([token])

    assert stream_texts("", draw(), 1, shown.append) == ["A cat. \N{THUMBS UP SIGN}!"]
    assert seen_at_each_token[:3] == ["", "A", "A cat"]
    assert "".join(shown) == "A cat. \N{THUMBS UP SIGN}!\n"  # its four bytes are several tokens


def test_an_unfinished_character_and_an_unknown_token_are_marked() -> None:
    tokens = [*load_tokenizer().encode_ordinary("\N{THUMBS UP SIGN}")[:1], 50_300]
    drawn = iter(torch.tensor([token]) for token in tokens)
    assert set(stream_texts("", drawn, 1, lambda _: None)[0]) == {"\N{REPLACEMENT CHARACTER}"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "hf"
    save_hf_folder(path, CONFIG, GPT(CONFIG).named_parameters())
    return path


def run_with(folder: Path, *options: str) -> dict[str, Any]:
    args = build_parser().parse_args(["--ckpt", str(folder), "--n_samples", "2", *options])
    return run(args, read_ranks())


def test_a_prompt_from_a_file_is_the_prompt(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("Two cats\nsat.")
    from_file = run_with(folder, "--prompt_file", str(tmp_path / "prompt.txt"))
    assert from_file == run_with(folder, "--prompt", "Two cats\nsat.")
    assert len(from_file["samples"]) == 2
    assert from_file["samples"][0] != from_file["samples"][1]


def test_the_best_token_is_hugging_faces(folder: Path) -> None:
    hf = GPT2LMHeadModel.from_pretrained(folder).eval()  # pyright: ignore[reportArgumentType]  # takes paths too
    tokens = torch.tensor([load_tokenizer().encode_ordinary("Two cats")])
    for _ in range(8):
        best = hf(tokens).logits[:, -1].argmax(-1)
        tokens = torch.cat([tokens, best[None]], dim=1)
    result = run_with(folder, "--prompt", "Two cats", "--temperature", "0", "--max_new_tokens", "8")
    assert result["samples"][0] == load_tokenizer().decode(tokens[0].tolist())


def test_bad_prompts_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--prompt: not UTF-8 in this locale\. Fix: set LC_ALL="):
        run_with(folder, "--prompt", "\udcc3\udc9cber")  # as Python reads it where ASCII is all
    with pytest.raises(ValueError, match="--prompt: has 40 tokens, the model's block size is 32"):
        run_with(folder, "--prompt", "cat " * 39 + "cat")
    (tmp_path / "latin").write_bytes(b"\xe9")
    for name in ("none", "latin"):
        with pytest.raises(ValueError, match=f"--prompt_file .*{name}: cannot be read"):
            run_with(folder, "--prompt_file", str(tmp_path / name))
