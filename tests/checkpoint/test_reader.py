"""Every format that --ckpt takes gives the logits of Hugging Face's model with the same weights."""

import argparse
import collections
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from checkpoint.reader import load_model, resolve_ckpt

V = 50257
SEED_SCRIPT = """
import sys
from dataclasses import dataclass
import torch

@dataclass
class GPTConfig:
    block_size: int = 32
    vocab_size: int = 50304
    n_layer: int = 2
    n_head: int = 2
    n_embd: int = 32

content = torch.load(sys.argv[1], weights_only=True)
torch.save(content | {"config": GPTConfig(), "step": 5, "val_loss": 3.3}, sys.argv[2])
"""


def build_hf(activation: str = "gelu_new", biases: bool = True) -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=V, n_positions=32, n_embd=32, n_layer=2, n_head=2, activation_function=activation
    )
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, param in model.named_parameters():
            if param.dim() > 1:
                param.mul_(3)
            else:
                param.add_(torch.randn_like(param) * 0.1)
            if name.endswith(".bias") and not biases:
                param.zero_()
    return model


def linear_weights(hf: GPT2LMHeadModel) -> dict[str, Tensor]:
    """The names and orientation of nn.Linear, which all three trainers have."""
    state = hf.state_dict()
    conv1d = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    return {k: (w.t() if k.endswith(conv1d) else w).contiguous() for k, w in state.items()}


def padded(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    wte = torch.cat([weights["transformer.wte.weight"], torch.randn(47, 32)])
    return weights | {"transformer.wte.weight": wte, "lm_head.weight": wte}


def assert_same_logits(path: Path, hf: GPT2LMHeadModel) -> None:
    model, precision = load_model(str(path))
    tokens = torch.randint(V, (2, 32))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), hf(tokens).logits, rtol=1e-4, atol=1e-4)
    assert precision == "fp32"
    assert not model.training


@pytest.fixture(scope="module")
def seed_pt(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, GPT2LMHeadModel]:
    """A file as build-nanogpt saves it: its config is an object of a class of that script."""
    torch.manual_seed(0)
    folder, hf = tmp_path_factory.mktemp("seed"), build_hf()
    torch.save({"model": padded(linear_weights(hf))}, folder / "weights.pt")
    (folder / "train_gpt2.py").write_text(SEED_SCRIPT)
    command = [sys.executable, "train_gpt2.py", "weights.pt", "model_00005.pt"]
    subprocess.run(command, cwd=folder, check=True, timeout=60)
    return folder / "model_00005.pt", hf


def test_build_nanogpts_pt_is_read(seed_pt: tuple[Path, GPT2LMHeadModel]) -> None:
    assert_same_logits(*seed_pt)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("compiled", [True, False])
def test_nanogpts_pt_is_read_with_its_exact_gelu(
    tmp_path: Path, bias: bool, compiled: bool
) -> None:
    hf = build_hf("gelu", biases=bias)
    weights = padded(linear_weights(hf))
    if not bias:
        weights = {k: w for k, w in weights.items() if not k.endswith(".bias")}
    weights["transformer.h.0.attn.bias"] = torch.ones(1, 1, 32, 32)  # its mask, without flash
    args = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 32, "bias": bias}
    args |= {"vocab_size": 50304, "dropout": 0.0}
    prefix = "_orig_mod." if compiled else ""
    content = {"model": {prefix + k: w for k, w in weights.items()}, "model_args": args}
    content |= {"optimizer": {}, "iter_num": 5, "best_val_loss": torch.tensor(3.0), "config": {}}
    torch.save(content, tmp_path / "ckpt.pt")
    assert_same_logits(tmp_path / "ckpt.pt", hf)


def write_llm_c(path: Path, hf: GPT2LMHeadModel, version: int) -> None:
    header = np.zeros(256, "<i4")
    header[:8] = (20240326, version, 32, V, 2, 2, 32, 50304)
    weights = {k.removeprefix("transformer."): w for k, w in padded(linear_weights(hf)).items()}
    parts = [weights["wte.weight"], weights["wpe.weight"]]
    for part in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"):
        for kind in ("weight", "bias"):
            parts += [weights[f"h.{layer}.{part}.{kind}"] for layer in range(2)]
    parts += [weights["ln_f.weight"], weights["ln_f.bias"]]
    flat = torch.cat([part.flatten() for part in parts])
    body = flat.bfloat16().view(torch.int16) if version == 5 else flat
    path.write_bytes(header.tobytes() + body.numpy().tobytes())


def test_llm_cs_fp32_is_read(tmp_path: Path) -> None:
    hf = build_hf()
    write_llm_c(tmp_path / "model.bin", hf, 3)
    assert_same_logits(tmp_path / "model.bin", hf)


def test_llm_cs_bf16_is_read(tmp_path: Path) -> None:
    hf = build_hf()
    write_llm_c(tmp_path / "model.bin", hf, 5)
    assert_same_logits(tmp_path / "model.bin", hf.bfloat16().float())


def test_a_hugging_face_folder_with_the_exact_gelu_is_read(tmp_path: Path) -> None:
    hf = build_hf("gelu")
    hf.save_pretrained(tmp_path / "hf")
    assert_same_logits(tmp_path / "hf", hf)


class Trap:
    """Leaves a file behind if it is ever unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (shutil.copy, (__file__, self.path))


def nanogpt_content(hf: GPT2LMHeadModel) -> dict[str, object]:
    args = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 32, "bias": True}
    return {"model": padded(linear_weights(hf)), "model_args": args}


@pytest.mark.parametrize("is_zip", [True, False])
def test_objects_beside_the_weights_are_passed_over_and_their_code_is_not_run(
    tmp_path: Path, is_zip: bool
) -> None:
    hf, sprung = build_hf("gelu"), tmp_path / "sprung"
    options = argparse.Namespace(out_dir=tmp_path, device=torch.device("cpu"), trap=Trap(sprung))
    beside = {
        "args": options,
        "best_val_loss": np.float64(3.5),
        "rng": [random.getstate(), np.random.get_state(), torch.get_rng_state()],
        "seen": collections.defaultdict(list, {"a": [1]}),
        "scheduler": torch.optim.lr_scheduler.CosineAnnealingLR(
            torch.optim.AdamW(hf.parameters()), 10
        ),
    }
    torch.save(
        nanogpt_content(hf) | beside,
        tmp_path / "x.pt",
        _use_new_zipfile_serialization=is_zip,  # False: the format before PyTorch 1.6
    )
    assert_same_logits(tmp_path / "x.pt", hf)
    assert not sprung.exists()


def test_a_file_without_weights_by_name_is_refused_and_nothing_runs(tmp_path: Path) -> None:
    sprung = tmp_path / "sprung"
    for content, message in (
        ({"model": {}, "config": Trap(sprung)}, "not a GPT-2"),
        (build_hf(), r"holds a .*GPT2LMHeadModel, but no weights by name.* state_dict\(\)"),
        ({"model": {}, "run": Blocked()}, r"holds the pickled object .*system"),
        ({"model": {}, "run": Method(sprung)}, r"holds the pickled object .*builtins\.getattr"),
        (linear_weights(build_hf()), "no 'model'"),
    ):
        torch.save(content, tmp_path / "x.pt")
        with pytest.raises(ValueError, match=message) as caught:
            load_model(str(tmp_path / "x.pt"))
        assert "\n" not in str(caught.value)
    assert not sprung.exists()


class Method(Trap):
    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.path,))


class Blocked:
    """Would run a command when it is unpickled."""

    def __reduce__(self) -> tuple[object, ...]:
        return (os.system, ("false",))


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "module"])
def test_lightnings_names_and_hugging_faces_orientation_are_read_in_a_pt(
    tmp_path: Path, key: str
) -> None:
    hf = build_hf()
    weights = {f"model.{name}": weight for name, weight in hf.state_dict().items()}
    options = argparse.Namespace(n_head=2, n_layer=2)
    torch.save({key: weights, "hyper_parameters": options}, tmp_path / "last.ckpt")
    assert_same_logits(tmp_path / "last.ckpt", hf)


def test_an_average_beside_the_model_is_no_guess(tmp_path: Path) -> None:
    hf = build_hf("gelu")
    content = nanogpt_content(hf)
    weights = linear_weights(hf)
    content["model"] = weights | {f"ema.{name}": weight for name, weight in weights.items()}
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="are the same weight of two models"):
        load_model(str(tmp_path / "x.pt"))


WRAPPED: dict[str, Callable[[str], str]] = {
    "torch.compile": lambda name: f"_orig_mod.{name}",
    "DDP": lambda name: f"module._orig_mod.{name}",
    "FSDP": lambda name: name.replace(".h.0.", ".h.0._fsdp_wrapped_module."),
    "activation checkpointing": lambda name: name.replace(
        ".attn.", "._checkpoint_wrapped_module.attn."
    ),
    "compiled blocks": lambda name: name.replace(".h.1.", ".h.1._orig_mod."),
    "a module of one's own": lambda name: f"network.gpt.{name}",
    "GPT2Model": lambda name: name.removeprefix("transformer."),
}


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_prefixes_of_wrappers_are_taken_off(tmp_path: Path, wrapper: str) -> None:
    hf = build_hf()
    hf.save_pretrained(tmp_path / "hf")
    file = tmp_path / "hf" / "model.safetensors"
    weights = {WRAPPED[wrapper](name): weight for name, weight in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})
    assert_same_logits(tmp_path / "hf", hf)
    assert_same_logits(file, hf)


def test_a_head_serves_for_embeddings_that_are_not_stored(tmp_path: Path) -> None:
    hf = build_hf()
    hf.save_pretrained(tmp_path / "hf")
    file = tmp_path / "hf" / "model.safetensors"
    weights = load_file(file)
    weights["lm_head.weight"] = weights.pop("transformer.wte.weight")
    save_file(weights, file, metadata={"format": "pt"})
    assert_same_logits(tmp_path / "hf", hf)


def move_into_pickles(folder: Path, is_zip: bool, n_files: int) -> None:
    """Replace a folder's safetensors by what Hugging Face wrote before."""
    hf = GPT2LMHeadModel.from_pretrained(folder)
    masks = {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 32, 32) for i in range(2)}
    items = list((hf.state_dict() | masks).items())
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for i in range(n_files):
        name = f"pytorch_model-{i + 1:05d}-of-{n_files:05d}.bin"
        name = name if n_files > 1 else "pytorch_model.bin"
        part = dict(items[i::n_files])
        torch.save(part, folder / name, _use_new_zipfile_serialization=is_zip)
        weight_map |= dict.fromkeys(part, name)
    if n_files > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    torch.save({}, folder / "training_args.bin")


@pytest.mark.parametrize(("is_zip", "n_files"), [(True, 1), (True, 3), (False, 1), (False, 2)])
def test_a_hugging_face_folder_with_pickles_alone_is_read(
    tmp_path: Path, is_zip: bool, n_files: int
) -> None:
    hf = build_hf()
    hf.save_pretrained(tmp_path / "hf")
    move_into_pickles(tmp_path / "hf", is_zip, n_files)
    assert_same_logits(tmp_path / "hf", hf)
    if n_files > 1:
        last = tmp_path / "hf" / f"pytorch_model-{n_files:05d}-of-{n_files:05d}.bin"
        last.unlink()
        with pytest.raises(ValueError, match=rf"{last.name}: missing, but pytorch_model\.bin\.ind"):
            load_model(str(tmp_path / "hf"))


@pytest.mark.parametrize(
    "change",
    [
        {"n_positions": None, "n_ctx": 32},
        {"n_positions": None, "max_position_embeddings": 32, "n_embd": None, "hidden_size": 32},
        {"n_layer": None, "num_hidden_layers": 2, "n_head": None, "num_attention_heads": 2},
        {"reorder_and_upcast_attn": True},
        {"tie_word_embeddings": False},
        {"activation_function": "gelu_fast"},
        {"n_inner": 128, "summary_type": "mean", "attn_pdrop": 0.3, "use_cache": False},
        {"architectures": ["GPT2Model"], "torch_dtype": "bfloat16", "model_type": None},
    ],
)
def test_entries_of_a_configuration_that_change_no_result_are_taken(
    tmp_path: Path, change: dict[str, object]
) -> None:
    hf = build_hf()
    hf.save_pretrained(tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    changed = json.loads(path.read_text()) | change
    path.write_text(json.dumps({key: v for key, v in changed.items() if v is not None}))
    assert_same_logits(tmp_path / "hf", hf)


def test_an_impossible_shape_names_its_file(tmp_path: Path) -> None:
    build_hf().save_pretrained(tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    path.write_text(path.read_text().replace('"n_head": 2', '"n_head": 5'))
    with pytest.raises(ValueError, match=r"config\.json: not a GPT-2 configuration .*n_head"):
        load_model(str(tmp_path / "hf"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda b: b[:-100], "damaged"),
        (lambda b: b[:700], "damaged"),
        (lambda b: b[:5000] + bytes([b[5000] ^ 1]) + b[5001:], r"damaged \(checksum of "),
        (lambda b: b[:-3000] + bytes([b[-3000] ^ 1]) + b[-2999:], r"damaged \(checksum of "),
        (lambda b: b"GGUF" + b[4:], r"begins with b'GGUF.*Fix: give a run, step"),
        (lambda b: b"", r"begins with b''.*Fix: give"),
    ],
)
def test_a_damaged_pt_is_one_line(
    seed_pt: tuple[Path, GPT2LMHeadModel],
    tmp_path: Path,
    damage: Callable[[bytes], bytes],
    message: str,
) -> None:
    (tmp_path / "x.pt").write_bytes(damage(seed_pt[0].read_bytes()))
    with pytest.raises(ValueError, match=rf"x\.pt: {message}") as caught:
        load_model(str(tmp_path / "x.pt"))
    assert "\n" not in str(caught.value)


def test_a_cut_or_old_llm_c_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    write_llm_c(path, build_hf(), 3)
    content = path.read_bytes()
    path.write_bytes(content[:-4])
    with pytest.raises(ValueError, match=r"model\.bin: damaged: the header says"):
        load_model(str(path))
    path.write_bytes(content[:4] + b"\x01" + content[5:])
    with pytest.raises(ValueError, match=r"llm\.c version 1\. Fix: give .*version 3 or 5"):
        load_model(str(path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_args": {"n_head": 2, "use_rmsnorm": True}}, "does not have: use_rmsnorm"),
        ({"model_args": {"n_layer": 2}}, "n_head"),
        ({"weights": 1, "model": None}, "no 'model'"),
        ({"model_args": {"n_head": "2"}}, "n_head = '2'"),
        ({"model_args": None}, "not a GPT-2"),
        ({"config": 3}, "not a GPT-2"),
        ({"model": {"wte.weight": torch.zeros(3), "wpe.weight": torch.tensor(1)}}, "not a GPT-2"),
        ({"model": {1: 2}}, "1 is not a tensor"),
    ],
)
def test_another_network_is_refused(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    content = {"model": linear_weights(build_hf("gelu"))}
    torch.save(content | change, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=message):
        load_model(str(tmp_path / "x.pt"))


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.full((32,), torch.nan), r"is not finite \(NaN or inf\)"),
        (torch.zeros(32, dtype=torch.int32), "is torch.int32, .*needs dense floating-point"),
        (torch.zeros(32).to_sparse(), "is .*sparse_coo; needs dense floating-point"),
        (torch.zeros(33), r"is \(33,\), the model needs \(32,\)"),
    ],
)
def test_values_that_are_no_weights_are_named(tmp_path: Path, weight: Tensor, message: str) -> None:
    weights = linear_weights(build_hf("gelu")) | {"transformer.ln_f.bias": weight}
    torch.save({"model_args": {"n_head": 2}, "model": weights}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=rf"x\.pt: ln_f\.bias {message}"):
        load_model(str(tmp_path / "x.pt"))


def test_a_vocabulary_padded_otherwise_is_read(tmp_path: Path) -> None:
    hf = build_hf("gelu")
    weights = padded(linear_weights(hf))
    for name in ("transformer.wte.weight", "lm_head.weight"):
        weights[name] = weights[name][: V + 20]
    torch.save({"model_args": {"n_head": 2}, "model": weights}, tmp_path / "x.pt")
    assert_same_logits(tmp_path / "x.pt", hf)


def test_a_hugging_face_folder_with_a_head_of_its_own_is_refused(tmp_path: Path) -> None:
    hf = build_hf()
    hf.save_pretrained(tmp_path / "hf")
    file = tmp_path / "hf" / "model.safetensors"
    weights = load_file(file)
    for head, refused in (
        (weights["transformer.wte.weight"].clone(), False),
        (torch.zeros(V, 32), True),
    ):
        save_file(weights | {"lm_head.weight": head}, file, metadata={"format": "pt"})
        if refused:
            with pytest.raises(ValueError, match="hf: lm_head is not tied to wte"):
                load_model(str(tmp_path / "hf"))
        else:
            assert_same_logits(tmp_path / "hf", hf)


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    weights = linear_weights(build_hf("gelu"))
    content = {"model_args": {"n_head": 2}, "model": dict(weights)}
    content["model"].pop("transformer.h.1.ln_2.bias")
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"x\.pt: missing weights: h\.1\.ln_2\.bias"):
        load_model(str(tmp_path / "x.pt"))
    content["model"] = weights | {"lm_head.weight": torch.zeros(V, 32)}
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="not tied"):
        load_model(str(tmp_path / "x.pt"))


def test_what_is_there_and_what_is_accepted_is_said(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match=r"holds notes\.txt\. Fix: give a run"):
        load_model(str(tmp_path))
    with pytest.raises(ValueError, match=r"no such folder.*Fix: give a run"):
        load_model(str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match=r"cannot be read \(File name too long\)\. Fix: give"):
        load_model(resolve_ckpt("x" * 300))


def test_a_run_without_a_checkpoint_is_said_to_be_one(tmp_path: Path) -> None:
    for name in ("run_status.json", "config.json"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match=r"nor a run with a complete checkpoint\. Fix: "):
        load_model(str(tmp_path))


def test_a_path_whose_folder_is_there_is_no_hub_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"^runs/gpt2: no such folder. Fix: give a run"):
        load_model("runs/gpt2")
