"""Our weights as a Hugging Face GPT-2 folder, and back.

The names are GPT-2's own. Hugging Face adds the prefix `transformer.` and stores the four matrices
of a block as Conv1D, which is transposed; its vocabulary is not padded.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from model.config import GPTConfig
from model.gpt import GPT

PREFIX = "transformer."
CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
MASKS = (".attn.bias", ".attn.masked_bias")  # buffers of older versions
NOT_TIED = "lm_head is not tied to wte, as GPT-2's is. Fix: give a GPT-2"
OTHER = "Fix: give a whole GPT-2"
HEAD = "lm_head.weight"  # a second name of wte in some files
SHARD_BYTES = 5 * 10**9  # Hugging Face's own limit for one file
EOT_TOKEN = 50256
ACTIVATIONS = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "none"}  # -> our `gelu`
# What our network computes; a folder that says otherwise is not this model.
FIXED = {
    "model_type": "gpt2",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}


def hf_config(config: GPTConfig) -> dict[str, object]:
    """Return the `config.json` of a Hugging Face GPT-2 of this shape, weights in fp32."""
    last_token = min(EOT_TOKEN, config.vocab_size - 1)
    return FIXED | {
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
    """Read the shape from a Hugging Face GPT-2 folder; its dropout is not taken over.

    Raises:
        ValueError: No `config.json`, not JSON, or not a GPT-2 that our network computes.
    """
    path = folder / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8-sig"))
        for key, ours in FIXED.items():
            if raw.get(key, ours) != ours:
                raise ValueError(
                    f"{path}: {key} = {raw[key]!r}, only {ours!r} is supported. {OTHER}"
                )
        if raw.get("n_inner") not in (None, 4 * raw["n_embd"]):
            raise ValueError(
                f"{path}: n_inner = {raw['n_inner']}, only 4·n_embd is supported. {OTHER}"
            )
        activation = raw.get("activation_function", "gelu_new")
        if activation not in ACTIVATIONS:
            supported = ", ".join(map(repr, ACTIVATIONS))
            raise ValueError(
                f"{path}: activation_function = {activation!r}, only {supported} are supported. "
                f"{OTHER}"
            )
        shape = {key: raw[key] for key in ("n_layer", "n_head", "n_embd", "vocab_size")}
        return GPTConfig(**shape, block_size=raw["n_positions"], gelu=ACTIVATIONS[activation])
    except FileNotFoundError:
        raise ValueError(
            f"{folder}: no config.json. Fix: give a Hugging Face GPT-2 folder "
            "(of a run: consolidated/step_…)"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: not a GPT-2 configuration ({error!r}). Fix: give a Hugging Face "
            "GPT-2 folder (of a run: consolidated/step_…)"
        ) from error


def weight_shapes(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every weight by name, `wte` at `vocab_size`, in the model's order."""
    d = config.n_embd
    shapes: dict[str, tuple[int, ...]] = {
        "wte.weight": (config.vocab_size, d),
        "wpe.weight": (config.block_size, d),
    }
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
        raise ValueError(f"{folder}: no .safetensors file. Fix: give a Hugging Face GPT-2 folder")
    keys: dict[str, Path] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                found = dict.fromkeys(tensors.keys(), file)
        except Exception as error:  # safetensors raises its own type for every kind of damage
            raise ValueError(
                f"{file}: not a readable safetensors file ({error}). Fix: copy it again"
            ) from error
        twice = sorted(keys.keys() & found.keys())
        if twice:
            other = keys[twice[0]].name
            raise ValueError(f"{file}: {twice[0]} is in {other} too. Fix: move one of them away")
        keys |= found
    return {k: f for k, f in keys.items() if not k.endswith(MASKS)}


def _check_head(folder: Path, files: dict[str, tuple[str, Path]]) -> None:
    """Take the head out of `files`; refuse one that is not `wte`."""
    if HEAD not in files or "wte.weight" not in files:
        return
    weights = []
    for key, file in (files.pop(HEAD), files["wte.weight"]):
        with safe_open(file, framework="pt") as tensors:
            weights.append(tensors.get_tensor(key))
    if not torch.equal(*weights):
        raise ValueError(f"{folder}: {NOT_TIED}")


def load_hf_weights(folder: Path, config: GPTConfig) -> Iterator[tuple[str, Tensor]]:
    """Yield every weight in our name, layout and padding, one at a time, in the model's order.

    Raises:
        ValueError: A weight is missing, unknown, or has another shape than `config` says.
    """
    files = {key.removeprefix(PREFIX): (key, file) for key, file in _files_by_key(folder).items()}
    _check_head(folder, files)
    shapes = weight_shapes(config)
    for problem, names in (("missing", shapes.keys() - files), ("unknown", files.keys() - shapes)):
        if names:
            raise ValueError(
                f"{folder}: {problem} weights: {', '.join(sorted(names)[:5])}. {OTHER}"
            )
    for name, shape in shapes.items():
        key, file = files[name]
        with safe_open(file, framework="pt") as tensors:
            weight = tensors.get_tensor(key)
        if name.endswith(CONV1D):
            weight = weight.t().contiguous()
        if tuple(weight.shape) != shape:
            raise ValueError(
                f"{file}: {key} is {tuple(weight.shape)}, config.json says {shape}. {OTHER}"
            )
        yield name, pad_vocabulary(weight, config) if name == "wte.weight" else weight


def load_hf_folder(folder: Path) -> GPT:
    """Build the GPT of a Hugging Face folder, in fp32, in evaluation mode."""
    config = load_hf_config(folder)
    return fill_model(config, load_hf_weights(folder, config), folder)


def fill_model(config: GPTConfig, weights: Iterable[tuple[str, Tensor]], source: Path) -> GPT:
    """Build a GPT in evaluation mode of copies of the given weights, by our names, in fp32.

    Raises:
        ValueError: A weight is missing, unknown, of another shape, or not of finite numbers; names
            `source`.
    """
    shapes, held = weight_shapes(config), {}
    for name, weight in weights:
        if name not in shapes:
            raise ValueError(f"{source}: unknown weights: {name}. {OTHER}")
        if weight.layout != torch.strided or weight.is_meta or not weight.is_floating_point():
            kind = f"{weight.dtype}, {weight.layout}"
            raise ValueError(
                f"{source}: {name} is {kind}; needs dense floating-point numbers. {OTHER}"
            )
        if name == "wte.weight":
            weight = pad_vocabulary(weight, config)
            shapes[name] = (config.padded_vocab_size, config.n_embd)
        if tuple(weight.shape) != shapes[name]:
            raise ValueError(
                f"{source}: {name} is {tuple(weight.shape)}, the model needs {shapes[name]}. "
                f"{OTHER}"
            )
        if not weight.isfinite().all():
            raise ValueError(f"{source}: {name} holds values that are no finite numbers. {OTHER}")
        held[name] = weight.to(torch.float32, copy=True)
    if missing := sorted(shapes.keys() - held):
        raise ValueError(f"{source}: missing weights: {', '.join(missing[:5])}. {OTHER}")
    with torch.device("meta"):  # neither memory nor values of its own
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


def save_hf_folder(
    folder: Path,
    config: GPTConfig,
    weights: Iterable[tuple[str, Tensor]],
    save_tokenizer: Callable[[Path], None],
) -> None:
    """Write a Hugging Face folder; it appears whole or not at all.

    Args:
        folder: Replaced if it exists.
        config: Shape of the model.
        weights: Every weight in our name and layout; taken one at a time, so that at most one
            file's worth (5 GB) is held.
        save_tokenizer: Writes the tokenizer's files into a folder.
    """
    partial = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    (partial / "config.json").write_text(
        json.dumps(hf_config(config), indent=2) + "\n", encoding="utf-8"
    )
    shards: list[list[str]] = []
    held: dict[str, Tensor] = {}
    n_bytes = total_bytes = 0

    def write_shard() -> None:
        save_file(held, partial / f"{len(shards)}.safetensors", metadata={"format": "pt"})
        shards.append(list(held))
        held.clear()

    for name, weight in weights:
        weight = weight[: config.vocab_size] if name == "wte.weight" else weight
        weight = weight.t() if name.endswith(CONV1D) else weight
        weight = weight.to("cpu", torch.float32, copy=True).contiguous()
        if held and n_bytes + weight.nbytes > SHARD_BYTES:
            write_shard()
            n_bytes = 0
        held[PREFIX + name] = weight
        n_bytes, total_bytes = n_bytes + weight.nbytes, total_bytes + weight.nbytes
    write_shard()
    _name_shards(partial, shards, total_bytes)
    save_tokenizer(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def _name_shards(folder: Path, shards: list[list[str]], total_bytes: int) -> None:
    if len(shards) == 1:
        (folder / "0.safetensors").rename(folder / "model.safetensors")
        return
    weight_map = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"{i}.safetensors").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps(index, indent=2) + "\n", encoding="utf-8"
    )
