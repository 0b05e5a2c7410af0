"""Read and write a GPT as a Hugging Face GPT-2 folder.

The names are GPT-2's own. Hugging Face adds the prefix `transformer.` and stores the four matrices
of a block as Conv1D, which is transposed; its vocabulary is not padded.
"""

import functools
import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from checkpoint.manifest import PARTIAL_SUFFIX
from checkpoint.run_folder import write_json
from checkpoint.unpickling import FIX_COPY_AGAIN, load_strangers_file
from checkpoint.weights import (
    CONV1D,
    FIX_GIVE_GPT2,
    Weights,
    by_gpt2_names,
    fill_model,
    name_weights,
    tensor_readers,
    weight_shapes,
)
from data.tokenizer import EOT_TOKEN, save_hf_tokenizer
from errors import BadInput
from model import GPT, GPTConfig

PREFIX = "transformer."
FIX_GIVE_HF_FOLDER = "give a Hugging Face GPT-2 folder (of a run: consolidated/step_…)"
SHARD_BYTES = 5 * 10**9  # Hugging Face's own limit for one file
INDEX = ".index.json"
# Hugging Face's names of a GELU -> PyTorch's name, the first of each for our own folders.
ACTIVATIONS = {
    "gelu_new": "tanh",
    "gelu": "none",
    "gelu_pytorch_tanh": "tanh",
    "gelu_fast": "tanh",
    "gelu_accurate": "tanh",
    "gelu_python": "none",
}
# Names that Hugging Face takes too, and one of its first versions.
OTHER_NAMES = {
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "n_ctx": "n_positions",
}
# What our network computes: a folder whose config.json has other values is another network.
HF_INVARIANTS = {
    "model_type": "gpt2",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}


def hf_config(config: GPTConfig) -> dict[str, Any]:
    """Return the `config.json` of a Hugging Face GPT-2 of this shape, weights in fp32."""
    last_token = min(EOT_TOKEN, config.vocab_size - 1)
    return HF_INVARIANTS | {
        "tie_word_embeddings": True,  # the weights themselves tell whether they are tied
        "architectures": ["GPT2LMHeadModel"],
        "activation_function": next(k for k, v in ACTIVATIONS.items() if v == config.gelu),
        "vocab_size": config.vocab_size,
        "n_positions": config.block_size,
        "n_embd": config.n_embd,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
        "bos_token_id": last_token,
        "eos_token_id": last_token,
        "dtype": "float32",
    }


def load_hf_config(folder: Path) -> GPTConfig:
    """Read the shape from a Hugging Face GPT-2 folder; its dropout is ignored.

    Raises:
        BadInput: `config.json` is missing or damaged, or describes another network than ours.
    """
    path = folder / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8-sig"))
        for other, name in OTHER_NAMES.items():
            if other in raw:
                raw.setdefault(name, raw[other])
        _check_network(raw, path)
        shape = {key: raw[key] for key in ("n_layer", "n_head", "n_embd", "vocab_size")}
        gelu = ACTIVATIONS[raw.get("activation_function", "gelu_new")]
        return GPTConfig(**shape, block_size=raw["n_positions"], gelu=gelu)
    except FileNotFoundError:
        raise BadInput(f"{folder}", "no config.json", FIX_GIVE_HF_FOLDER) from None
    except BadInput:
        raise
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        what = f"not a GPT-2 configuration ({error!r})"
        raise BadInput(f"{path}", what, FIX_GIVE_HF_FOLDER) from error


def _check_network(raw: dict[str, Any], path: Path) -> None:
    supported = {key: [value] for key, value in HF_INVARIANTS.items()}
    supported["n_inner"] = [None, 4 * raw.get("n_embd", 0)]
    supported["activation_function"] = list(ACTIVATIONS)
    wrong = [key for key in supported if raw.get(key, supported[key][0]) not in supported[key]]
    if wrong:
        values = ", ".join(map(repr, supported[wrong[0]]))
        what = f"{wrong[0]} = {raw[wrong[0]]!r}; supported: {values}"
        raise BadInput(f"{path}", what, FIX_GIVE_GPT2)


def open_hf_folder(folder: Path) -> Weights:
    """Open a Hugging Face GPT-2 folder: safetensors files or, without any, PyTorch's.

    Raises:
        BadInput: A file is missing or damaged, or it holds another network.
    """
    config = load_hf_config(folder)
    found = by_gpt2_names(_find_tensors(folder), folder)
    return name_weights(found, config, folder)


def _find_tensors(folder: Path) -> dict[str, Callable[[], Tensor]]:
    """Return a reader of each tensor by its key."""
    files = sorted(folder.glob("[!.]*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        what = "no .safetensors file and no pytorch_model.bin"
        raise BadInput(f"{folder}", what, FIX_GIVE_HF_FOLDER)
    _check_index(folder, files)
    tensors: dict[str, Callable[[], Tensor]] = {}
    origin: dict[str, Path] = {}
    for file in files:
        found = _open_pickle(file) if file.suffix == ".bin" else _open_safetensors(file)
        twice = sorted(tensors.keys() & found.keys())
        if twice:
            what = f"{twice[0]} is in {origin[twice[0]].name} too"
            raise BadInput(f"{file}", what, "move one of them away")
        tensors |= found
        origin |= dict.fromkeys(found, file)
    return tensors


def _check_index(folder: Path, files: list[Path]) -> None:
    """Refuse a folder that lacks a file which its index names."""
    for index in folder.glob(f"[!.]*{files[0].suffix}{INDEX}"):
        try:
            names = set(json.loads(index.read_text(encoding="utf-8-sig"))["weight_map"].values())
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise BadInput(f"{index}", f"damaged ({error!r})", FIX_COPY_AGAIN) from error
        missing = sorted(names - {file.name for file in files})
        if missing:
            what = f"missing, but {index.name} names it"
            raise BadInput(f"{folder / missing[0]}", what, FIX_COPY_AGAIN)


def _open_safetensors(file: Path) -> dict[str, Callable[[], Tensor]]:
    try:
        with safe_open(file, framework="pt") as tensors:
            keys = list(tensors.keys())
    except Exception as error:  # safetensors raises its own type for every kind of damage
        what = f"not a readable safetensors file ({error})"
        raise BadInput(f"{file}", what, FIX_COPY_AGAIN) from error
    return {key: functools.partial(_read_tensor, key, file) for key in keys}


def _read_tensor(key: str, file: Path) -> Tensor:
    with safe_open(file, framework="pt") as tensors:
        return tensors.get_tensor(key)


def _open_pickle(file: Path) -> dict[str, Callable[[], Tensor]]:
    content = load_strangers_file(file)
    if not isinstance(content, dict):
        what = f"holds a {type(content).__name__}, expected tensors by name"
        raise BadInput(f"{file}", what, FIX_GIVE_HF_FOLDER)
    return tensor_readers(content, file)


def load_hf_folder(folder: Path) -> GPT:
    """Build the GPT of a Hugging Face folder, in fp32, in evaluation mode."""
    return fill_model(open_hf_folder(folder))


def save_hf_folder(folder: Path, config: GPTConfig, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Write weights and tokenizer as a Hugging Face folder; it appears whole or not at all.

    Args:
        folder: Replaced if it exists.
        config: Shape of the model.
        weights: Every weight in our name and layout; taken one at a time, so that memory holds at
            most one file of them (5 GB). What it raises is passed on.
    """
    partial = folder.with_name(folder.name + PARTIAL_SUFFIX)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write_json(partial / "config.json", hf_config(config))
    save_hf_tokenizer(partial, config.block_size)
    try:
        _save_weights(partial, config, weights)
    except ValueError:  # the weights are wrong, which is known after the last: delete them all
        shutil.rmtree(partial)
        raise
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def _save_weights(folder: Path, config: GPTConfig, weights: Iterable[tuple[str, Tensor]]) -> None:
    shapes = weight_shapes(config)
    empty = {PREFIX + name: torch.empty(shapes[name], device="meta") for name in shapes}
    planned = split_torch_state_dict_into_shards(
        empty, filename_pattern="model{suffix}.safetensors", max_shard_size=SHARD_BYTES
    )
    held: dict[str, dict[str, Tensor]] = {}
    for name, weight in weights:
        file = planned.tensor_to_filename[PREFIX + name]
        weight = weight[: config.vocab_size] if name == "wte.weight" else weight
        weight = weight.t() if name.endswith(CONV1D) else weight
        weight = weight.to("cpu", torch.float32, copy=True).contiguous()
        held.setdefault(file, {})[PREFIX + name] = weight
        if len(held[file]) == len(planned.filename_to_tensors[file]):
            save_file(held.pop(file), folder / file, metadata={"format": "pt"})
    assert not held, f"{folder} lacks weights"
    if planned.is_sharded:
        index = {"metadata": planned.metadata, "weight_map": planned.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", index)
