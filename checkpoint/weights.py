"""Read the weights of a GPT by GPT-2's own names, wherever they are from, one at a time."""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from errors import BadInput
from model import GPT, GPTConfig

Entry = TypeVar("Entry")

FIX_GIVE_GPT2 = "give a whole GPT-2"
# Parts of a key that torch.compile, DDP, FSDP, Lightning and checkpointing of activations add.
WRAPPERS = {
    "_orig_mod",
    "module",
    "_forward_module",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
}
ROOTS = {"wte", "wpe", "h", "ln_f", "lm_head"}  # GPT-2's names begin with these
LM_HEAD = "lm_head.weight"  # a second name of wte
MASKS = (".attn.bias", ".attn.masked_bias")  # buffers of older versions
CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
MAX_NAMED = 5  # weights in one error


@dataclass(frozen=True)
class Weights:
    """The weights of one GPT; iterating reads them, checks them and yields them with our names.

    Attributes:
        config: Shape of the model.
        source: The file or folder, for errors.
        read: Yields each weight by its name, as nn.Linear lays it out.
        precision: Of the run that trained it ("fp32" if no run of ours did).
    """

    config: GPTConfig
    source: Path
    read: Callable[[], Iterable[tuple[str, Tensor]]]
    precision: str = "fp32"

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every weight, `wte` padded.

        Raises:
            BadInput: A weight is missing, unknown, of another shape, or not finite.
        """
        config, source = self.config, str(self.source)
        shapes = weight_shapes(config) | {"wte.weight": (config.padded_vocab_size, config.n_embd)}
        found = []
        for name, weight in self.read():
            if weight.layout != torch.strided or weight.is_meta or not weight.is_floating_point():
                kind = f"{weight.dtype}, {weight.layout}"
                what = f"{name} is {kind}; needs dense floating-point numbers"
                raise BadInput(source, what, FIX_GIVE_GPT2)
            if name == "wte.weight":
                weight = pad_vocabulary(weight, config)
            shape = tuple(weight.shape)
            if shape != shapes.get(name, shape):
                what = f"{name} is {shape}, the model needs {shapes[name]}"
                raise BadInput(source, what, FIX_GIVE_GPT2)
            if not weight.isfinite().all():
                raise BadInput(source, f"{name} is not finite (NaN or inf)", FIX_GIVE_GPT2)
            found.append(name)
            yield name, weight
        check_names(found, config, self.source)


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


def check_names(found: Iterable[str], config: GPTConfig, source: Path) -> None:
    """Refuse weights that are not those of a GPT of this shape.

    Raises:
        BadInput: Names up to five that are missing or unknown.
    """
    expected = weight_shapes(config).keys()
    missing, unknown = expected - set(found), set(found) - expected
    if missing or unknown:
        kind = "missing" if missing else "unknown"
        names = ", ".join(sorted(missing or unknown)[:MAX_NAMED])
        raise BadInput(str(source), f"{kind} weights: {names}", FIX_GIVE_GPT2)


def by_gpt2_names(entries: Mapping[str, Entry], source: Path) -> dict[str, Entry]:
    """Return the entries of a file by GPT-2's names: without prefixes, wrappers and masks.

    Raises:
        BadInput: Two keys are the same weight, as those of a model and of its average.
    """
    keys: dict[str, str] = {}
    for key in entries:
        parts = [part for part in key.split(".") if part not in WRAPPERS]
        roots = [place for place, part in enumerate(parts) if part in ROOTS]
        name = ".".join(parts[roots[0] :] if roots else parts)
        if name.endswith(MASKS):
            continue
        if name in keys:
            what = f"{keys[name]} and {key} are the same weight of two models"
            raise BadInput(str(source), what, "save one of the models alone")
        keys[name] = key
    return {name: entries[key] for name, key in keys.items()}


def tensor_readers(content: Mapping[Any, Any], source: Path) -> dict[str, Callable[[], Tensor]]:
    """Return a reader of each tensor that a file holds by its key.

    Raises:
        BadInput: A value is not a tensor.
    """
    readers: dict[str, Callable[[], Tensor]] = {}
    for key, tensor in content.items():
        if not isinstance(tensor, Tensor):
            what = f"{key} is not a tensor but of type {type(tensor).__name__}"
            raise BadInput(str(source), what, FIX_GIVE_GPT2)
        readers[str(key)] = functools.partial(Tensor.detach, tensor)
    return readers


def name_weights(
    tensors: Mapping[str, Callable[[], Tensor]], config: GPTConfig, source: Path
) -> Weights:
    """Return tensors as the weights of a GPT.

    Args:
        tensors: A reader of each tensor, by GPT-2's names.
        config: Shape of the model.
        source: The file or folder, for errors.

    Raises:
        BadInput: A tensor is missing or unknown, or the head is not `wte`.
    """
    tensors = dict(tensors)
    head = tensors.pop(LM_HEAD, None)
    if head:
        wte = tensors.setdefault("wte.weight", head)
        check_tied(head(), wte(), source)
    check_names(tensors, config, source)
    return Weights(config, source, functools.partial(_read_in_order, tensors, config))


def _read_in_order(
    tensors: Mapping[str, Callable[[], Tensor]], config: GPTConfig
) -> Iterator[tuple[str, Tensor]]:
    """Yield tensors in the model's order, as nn.Linear lays them out.

    Hugging Face's Conv1D has the transposed matrix. A file has either all of them so or none, and
    c_attn, which is not square, tells which.
    """
    is_conv1d = tensors["h.0.attn.c_attn.weight"]().shape[:1] == (config.n_embd,)
    for name in weight_shapes(config):
        weight = tensors[name]()
        if is_conv1d and name.endswith(CONV1D) and weight.dim() == 2:
            weight = weight.t()
        yield name, weight


def check_tied(head: Tensor, wte: Tensor, source: Path) -> None:
    """Refuse a head that is not `wte`; `source` is named in the error."""
    if head.data_ptr() != wte.data_ptr() and not torch.equal(head, wte):
        what = "lm_head is not tied to wte, as it is in GPT-2"
        raise BadInput(f"{source}", what, FIX_GIVE_GPT2)


def fill_model(weights: Weights) -> GPT:
    """Build a GPT in evaluation mode from copies of the weights, in fp32."""
    held = {name: weight.to(torch.float32, copy=True) for name, weight in weights}
    with torch.device("meta"):  # takes no memory, and has no values
        model = GPT(weights.config)
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
