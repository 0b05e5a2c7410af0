"""Read and write a GPT as a Hugging Face GPT-2 folder.

The names are GPT-2's own. Hugging Face adds the prefix `transformer.` and stores the four matrices
of a block as Conv1D, which is transposed; its vocabulary is not padded.
"""

import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from checkpoint.manifest import PARTIAL_SUFFIX
from checkpoint.run_folder import write_json
from data.tokenizer import EOT_TOKEN, save_hf_tokenizer
from errors import BadInput
from model import GPT, GPTConfig

PREFIX = "transformer."
CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
MASKS = (".attn.bias", ".attn.masked_bias")  # buffers of older versions
LM_HEAD = "lm_head.weight"  # a second name of wte in some files
FIX_GIVE_GPT2 = "give a whole GPT-2"
FIX_GIVE_HF_FOLDER = "give a Hugging Face GPT-2 folder (of a run: consolidated/step_…)"
SHARD_BYTES = 5 * 10**9  # Hugging Face's own limit for one file
ACTIVATIONS = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "none"}  # -> our `gelu`
# What our network computes: a folder whose config.json has other values is another network.
HF_INVARIANTS = {
    "model_type": "gpt2",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}


def hf_config(config: GPTConfig) -> dict[str, Any]:
    """Return the `config.json` of a Hugging Face GPT-2 of this shape, weights in fp32."""
    last_token = min(EOT_TOKEN, config.vocab_size - 1)
    return HF_INVARIANTS | {
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
        _check_network(raw, path)
        shape = {key: raw[key] for key in ("n_layer", "n_head", "n_embd", "vocab_size")}
        gelu = ACTIVATIONS[raw.get("activation_function", "gelu_new")]
        return GPTConfig(**shape, block_size=raw["n_positions"], gelu=gelu)
    except FileNotFoundError:
        raise BadInput(f"{folder}", "no config.json", FIX_GIVE_HF_FOLDER) from None
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, KeyError, TypeError) as error:
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


def weight_shapes(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every weight by name, `wte` at `vocab_size`, in the model's order."""
    d = config.n_embd
    shapes: dict[str, tuple[int, ...]] = {}
    shapes["wte.weight"] = (config.vocab_size, d)
    shapes["wpe.weight"] = (config.block_size, d)
    linear = {"attn.c_attn": (3 * d, d), "attn.c_proj": (d, d)}
    linear |= {"mlp.c_fc": (4 * d, d), "mlp.c_proj": (d, 4 * d)}
    for layer in range(config.n_layer):
        for part in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"):
            shape = linear.get(part, (d,))
            shapes[f"h.{layer}.{part}.weight"] = shape
            shapes[f"h.{layer}.{part}.bias"] = shape[:1]
    return shapes | {"ln_f.weight": (d,), "ln_f.bias": (d,)}


def _files_by_key(folder: Path) -> dict[str, Path]:
    files = sorted(folder.glob("[!.]*.safetensors"))
    if not files:
        raise BadInput(f"{folder}", "no .safetensors file", FIX_GIVE_HF_FOLDER)
    keys: dict[str, Path] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                found = dict.fromkeys(tensors.keys(), file)
        except Exception as error:  # safetensors raises its own type for every kind of damage
            what = f"not a readable safetensors file ({error})"
            raise BadInput(f"{file}", what, "copy it again") from error
        twice = sorted(keys.keys() & found.keys())
        if twice:
            what = f"{twice[0]} is in {keys[twice[0]].name} too"
            raise BadInput(f"{file}", what, "move one of them away")
        keys |= found
    return {key: file for key, file in keys.items() if not key.endswith(MASKS)}


def _read_tensor(key: str, file: Path) -> Tensor:
    with safe_open(file, framework="pt") as tensors:
        return tensors.get_tensor(key)


def check_tied(head: Tensor, wte: Tensor, source: Path) -> None:
    """Refuse a head that is not `wte`; `source` is named in the error."""
    if head.data_ptr() != wte.data_ptr() and not torch.equal(head, wte):
        what = "lm_head is not tied to wte, as it is in GPT-2"
        raise BadInput(f"{source}", what, FIX_GIVE_GPT2)


def load_hf_weights(folder: Path, config: GPTConfig) -> Iterator[tuple[str, Tensor]]:
    """Yield every weight in our name, layout and padding, one at a time, in the model's order.

    Raises:
        BadInput: A weight is missing, unknown, or has another shape than `config` says.
    """
    keys = {key.removeprefix(PREFIX): (key, file) for key, file in _files_by_key(folder).items()}
    shapes = weight_shapes(config)
    if LM_HEAD in keys and "wte.weight" in keys:
        check_tied(_read_tensor(*keys.pop(LM_HEAD)), _read_tensor(*keys["wte.weight"]), folder)
    _check_names(keys, shapes, folder)
    for name, shape in shapes.items():
        key, file = keys[name]
        weight = _read_tensor(key, file)
        if name.endswith(CONV1D):
            weight = weight.t().contiguous()
        if tuple(weight.shape) != shape:
            what = f"{key} is {tuple(weight.shape)}, but config.json says {shape}"
            raise BadInput(f"{file}", what, FIX_GIVE_GPT2)
        yield name, pad_vocabulary(weight, config) if name == "wte.weight" else weight


def _check_names(found: Iterable[str], expected: Iterable[str], source: Path) -> None:
    missing, unknown = set(expected) - set(found), set(found) - set(expected)
    if missing or unknown:
        kind = "missing" if missing else "unknown"
        names = ", ".join(sorted(missing or unknown)[:5])
        raise BadInput(f"{source}", f"{kind} weights: {names}", FIX_GIVE_GPT2)


def load_hf_folder(folder: Path) -> GPT:
    """Build the GPT of a Hugging Face folder, in fp32, in evaluation mode."""
    config = load_hf_config(folder)
    return fill_model(config, load_hf_weights(folder, config), folder)


def fill_model(config: GPTConfig, weights: Iterable[tuple[str, Tensor]], source: Path) -> GPT:
    """Build a GPT in evaluation mode from copies of the given weights, by our names, in fp32.

    Raises:
        BadInput: A weight is missing, unknown, of another shape, or not finite; names `source`.
    """
    shapes = weight_shapes(config) | {"wte.weight": (config.padded_vocab_size, config.n_embd)}
    held: dict[str, Tensor] = {}
    for name, weight in weights:
        if weight.layout != torch.strided or weight.is_meta or not weight.is_floating_point():
            what = f"{name} is {weight.dtype}, {weight.layout}; needs dense floating-point numbers"
            raise BadInput(f"{source}", what, FIX_GIVE_GPT2)
        if name == "wte.weight":
            weight = pad_vocabulary(weight, config)
        found = tuple(weight.shape)
        expected = shapes.get(name, found)
        if found != expected:
            what = f"{name} is {found}, the model needs {expected}"
            raise BadInput(f"{source}", what, FIX_GIVE_GPT2)
        if not weight.isfinite().all():
            raise BadInput(f"{source}", f"{name} is not finite (NaN or inf)", FIX_GIVE_GPT2)
        held[name] = weight.to(torch.float32, copy=True)
    _check_names(held, shapes, source)
    with torch.device("meta"):  # takes no memory, and has no values
        model = GPT(config)
    model.load_state_dict(held, assign=True)
    return model.eval()


def pad_vocabulary(wte: Tensor, config: GPTConfig) -> Tensor:
    """Pad `wte` of `vocab_size` rows or more to `padded_vocab_size`.

    The rows added are the mean of the others: by Jensen's inequality such a column is at most as
    likely as the average token, so training starts within 0.001 nats of the unpadded loss.
    """
    padding = config.padded_vocab_size - len(wte)
    if len(wte) < config.vocab_size or padding <= 0:
        return wte
    return torch.cat([wte, wte.mean(0, keepdim=True).expand(padding, -1)])


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
