"""Our weights as a Hugging Face GPT-2 folder, and back.

The names are GPT-2's own. Hugging Face adds the prefix `transformer.` and stores the four matrices
of a block as Conv1D, which is transposed; its vocabulary is not padded.
"""

import hashlib
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
NOT_WEIGHTS = (".attn.bias", ".attn.masked_bias", "lm_head.weight")  # masks, and the tied head
SHARD_BYTES = 5 * 10**9  # Hugging Face's own limit for one file
EOT_TOKEN = 50256
HUB_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
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
        raw = json.loads(path.read_text())
        for key, ours in FIXED.items():
            if raw.get(key, ours) != ours:
                raise ValueError(f"{path}: {key} = {raw[key]!r}, only {ours!r} is supported")
        if raw.get("n_inner") not in (None, 4 * raw["n_embd"]):
            raise ValueError(f"{path}: n_inner = {raw['n_inner']}, only 4·n_embd is supported")
        activation = raw.get("activation_function", "gelu_new")
        if activation not in ACTIVATIONS:
            supported = ", ".join(map(repr, ACTIVATIONS))
            raise ValueError(
                f"{path}: activation_function = {activation!r}, only {supported} are supported"
            )
        shape = {key: raw[key] for key in ("n_layer", "n_head", "n_embd", "vocab_size")}
        return GPTConfig(**shape, block_size=raw["n_positions"], gelu=ACTIVATIONS[activation])
    except FileNotFoundError:
        raise ValueError(
            f"{folder}: no config.json; give a Hugging Face GPT-2 folder "
            "(of a run: consolidated/step_…)"
        ) from None
    except (json.JSONDecodeError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: not a GPT-2 configuration ({error!r}); give a Hugging Face "
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
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder}: no .safetensors file; give a Hugging Face GPT-2 folder")
    keys = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                keys |= dict.fromkeys(tensors.keys(), file)
        except Exception as error:  # safetensors raises its own type for every kind of damage
            raise ValueError(f"{file}: not a readable safetensors file ({error})") from error
    return {k: f for k, f in keys.items() if not k.endswith(NOT_WEIGHTS)}


def load_hf_weights(folder: Path, config: GPTConfig) -> Iterator[tuple[str, Tensor]]:
    """Yield every weight in our name, layout and padding, one at a time, in the model's order.

    Raises:
        ValueError: A weight is missing, unknown, or has another shape than `config` says.
    """
    files = {key.removeprefix(PREFIX): (key, file) for key, file in _files_by_key(folder).items()}
    shapes = weight_shapes(config)
    for problem, names in (("missing", shapes.keys() - files), ("unknown", files.keys() - shapes)):
        if names:
            raise ValueError(f"{folder}: {problem} weights: {', '.join(sorted(names)[:5])}")
    for name, shape in shapes.items():
        key, file = files[name]
        with safe_open(file, framework="pt") as tensors:
            weight = tensors.get_tensor(key)
        if name.endswith(CONV1D):
            weight = weight.t().contiguous()
        if tuple(weight.shape) != shape:
            raise ValueError(f"{file}: {key} is {tuple(weight.shape)}, config.json says {shape}")
        yield name, pad_vocabulary(weight, config) if name == "wte.weight" else weight


def load_hf_folder(folder: Path) -> GPT:
    """Build the GPT of a Hugging Face folder, in fp32, in evaluation mode."""
    config = load_hf_config(folder)
    return fill_model(config, load_hf_weights(folder, config), folder)


def fill_model(config: GPTConfig, weights: Iterable[tuple[str, Tensor]], source: Path) -> GPT:
    """Build a GPT in evaluation mode with the given weights, by our names, in fp32.

    Raises:
        ValueError: A weight is missing, unknown, or has another shape; names `source`.
    """
    model = GPT(config).eval()
    params = dict(model.named_parameters())
    with torch.no_grad():
        for name, weight in weights:
            if name not in params:
                raise ValueError(f"{source}: unknown weights: {name}")
            if name == "wte.weight":
                weight = pad_vocabulary(weight, config)
            if weight.shape != params[name].shape:
                found, needed = tuple(weight.shape), tuple(params[name].shape)
                raise ValueError(f"{source}: {name} is {found}, the model needs {needed}")
            params.pop(name).copy_(weight)
    if params:
        raise ValueError(f"{source}: missing weights: {', '.join(sorted(params)[:5])}")
    return model


def pad_vocabulary(wte: Tensor, config: GPTConfig) -> Tensor:
    """Pad `wte` of exactly `vocab_size` rows to `padded_vocab_size`; else return it as it is.

    The rows added are the mean of the others: by Jensen's inequality such a column is at most as
    likely as the average token, so training starts within 0.001 nats of the unpadded loss.
    """
    if len(wte) != config.vocab_size:
        return wte
    padding = config.padded_vocab_size - config.vocab_size
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
    (partial / "config.json").write_text(json.dumps(hf_config(config), indent=2) + "\n")
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
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def locate_hf_folder(name: str) -> Path:
    """Return the folder that `name` says: a local path, or a hub name, which is downloaded.

    A download takes `config.json` and the safetensors files only; each safetensors file is
    checked against the SHA-256 that the hub states for it.

    Raises:
        ValueError: Neither a folder nor a hub name that can be had, or a wrong checksum.
    """
    if Path(name).is_dir():
        return Path(name)
    repo = f"openai-community/{name}" if name in HUB_NAMES else name
    if repo.count("/") != 1 or repo.startswith((".", "/")):
        raise ValueError(
            f"{name}: no such folder; hub names are {', '.join(HUB_NAMES)}, owner/name"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        folder = Path(snapshot_download(repo, allow_patterns=["config.json", "*.safetensors"]))
    except (OSError, HfHubHTTPError) as error:
        raise ValueError(
            f"{name}: neither a folder nor to be had from the hub ({error})"
        ) from error
    for file in folder.glob("*.safetensors"):
        blob = file.resolve()  # the hub's cache names a large file by the SHA-256 that it states
        with blob.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        if digest != blob.name:
            file.unlink()
            blob.unlink()
            raise ValueError(f"{repo}: {file.name} does not have the hub's SHA-256; try again")
    return folder
