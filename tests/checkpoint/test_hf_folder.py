import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

import checkpoint.hf_folder
from checkpoint.hf_folder import load_hf_config, load_hf_folder, save_hf_folder
from checkpoint.hub import locate_hf_folder
from data.tokenizer import load_tokenizer
from model import GPT, GPTConfig

CONFIG = GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=64)


@pytest.fixture
def hf_folder(tmp_path: Path) -> Path:
    config = GPT2Config(n_layer=2, n_head=2, n_embd=32, n_positions=64)
    hf = GPT2LMHeadModel(config)
    with torch.no_grad():
        for p in hf.parameters():
            p.add_(torch.randn_like(p) * 0.1)  # biases and LayerNorms too
    hf.save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


def hf_logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    hf = AutoModelForCausalLM.from_pretrained(folder)
    assert isinstance(hf, GPT2LMHeadModel)
    return hf.eval()(tokens).logits


def test_logits_survive_import_and_export(hf_folder: Path, tmp_path: Path) -> None:
    tokens = torch.randint(50257, (2, 40))
    expected = hf_logits(hf_folder, tokens)
    ours = load_hf_folder(hf_folder)
    torch.testing.assert_close(ours(tokens), expected, rtol=1e-5, atol=1e-5)
    save_hf_folder(tmp_path / "ours", ours.config, ours.named_parameters())
    torch.testing.assert_close(hf_logits(tmp_path / "ours", tokens), expected, rtol=0, atol=1e-6)
    again = load_hf_folder(tmp_path / "ours")
    torch.testing.assert_close(again(tokens), expected, rtol=1e-5, atol=1e-5)


def test_exported_tokenizer_gives_our_ids(tmp_path: Path) -> None:
    gpt = GPT(CONFIG)
    save_hf_folder(tmp_path / "ours", CONFIG, gpt.named_parameters())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "ours")
    text = "Hello, I'm  a language model; ñandú 日本 123\n\n<|endoftext|>"
    expected = load_tokenizer().encode(text, allowed_special="all")
    assert tokenizer(text).input_ids == expected
    assert tokenizer.decode(expected) == text


def test_large_exports_are_split_with_an_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint.hf_folder, "SHARD_BYTES", 40_000)
    gpt = GPT(CONFIG).eval()
    save_hf_folder(tmp_path / "ours", CONFIG, gpt.named_parameters())
    files = list((tmp_path / "ours").glob("model-*-of-*.safetensors"))
    index = json.loads((tmp_path / "ours" / "model.safetensors.index.json").read_text())
    assert len(files) > 2
    assert set(index["weight_map"].values()) == {f.name for f in files}
    tokens = torch.randint(50257, (1, 8))
    torch.testing.assert_close(hf_logits(tmp_path / "ours", tokens), gpt(tokens), rtol=0, atol=1e-6)


def test_import_pads_the_vocabulary_almost_for_free(hf_folder: Path) -> None:
    ours = load_hf_folder(hf_folder)
    assert ours.wte.weight.shape[0] == 50304
    tokens = torch.randint(50257, (2, 40))
    unpadded = ours.eval()(tokens, tokens)
    padded = ours.train()(tokens, tokens)
    assert unpadded < padded < unpadded + 1e-3


def test_a_weight_in_two_files_is_refused_and_hidden_files_are_none(hf_folder: Path) -> None:
    expected = load_hf_folder(hf_folder).state_dict()
    shutil.copy(hf_folder / "model.safetensors", hf_folder / "._model.safetensors")
    (hf_folder / ".DS_Store").write_bytes(b"\0")
    assert all(
        torch.equal(w, expected[k]) for k, w in load_hf_folder(hf_folder).state_dict().items()
    )
    shutil.copy(hf_folder / "model.safetensors", hf_folder / "model (1).safetensors")
    with pytest.raises(ValueError, match=r"is in model.* too. Fix: move one of them away"):
        load_hf_folder(hf_folder)


def test_a_configuration_may_begin_with_a_byte_order_mark(hf_folder: Path) -> None:
    path = hf_folder / "config.json"
    expected = load_hf_config(hf_folder)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert load_hf_config(hf_folder) == expected


def test_a_folder_that_is_not_the_model_is_refused(hf_folder: Path) -> None:
    path = hf_folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"activation_function": "relu"}))
    with pytest.raises(ValueError, match=r"activation_function = 'relu'.*'gelu_new'"):
        load_hf_config(hf_folder)
    path.write_text(json.dumps(config | {"n_positions": 32}))
    with pytest.raises(ValueError, match=r"wpe.weight is \(64, 32\).*\(32, 32\)"):
        load_hf_folder(hf_folder)
    path.write_text(json.dumps(config | {"n_layer": 3}))
    with pytest.raises(ValueError, match=r"missing weights: h\.2\.attn"):
        load_hf_folder(hf_folder)
    path.write_text(json.dumps(config | {"n_layer": 1}))
    with pytest.raises(ValueError, match=r"unknown weights: h\.1\."):
        load_hf_folder(hf_folder)
    (hf_folder / "model.safetensors").write_bytes(b"not safetensors")
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"model\.safetensors: not a readable safetensors"):
        load_hf_folder(hf_folder)
    with pytest.raises(ValueError, match=r"no config\.json"):
        load_hf_config(hf_folder.parent)


def test_a_name_that_is_neither_folder_nor_hub_name_is_refused() -> None:
    with pytest.raises(ValueError, match="no such folder"):
        locate_hf_folder("no_such_thing")
