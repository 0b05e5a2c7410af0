"""Read checkpoints of other trainers: build-nanogpt and nanoGPT .pt, llm.c .bin.

llm.c's format is that of `write_model` in its train_gpt2.py. nanoGPT trains with the exact GELU,
the two others with GPT-2's approximation.
"""

import functools
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from checkpoint.unpickling import (
    FIX_COPY_AGAIN,
    PICKLE_MAGIC,
    ZIP_MAGIC,
    Stranger,
    load_strangers_file,
)
from checkpoint.weights import Weights, by_gpt2_names, name_weights, tensor_readers, weight_shapes
from errors import BadInput
from model import GPTConfig

FIX_GIVE_ACCEPTED = (
    "give a run, step or Hugging Face folder, a hub name, a build-nanogpt or nanoGPT .pt "
    "or an llm.c .bin (version 3 or 5)"
)
LLM_C_MAGIC = 20240326
LLM_C_DTYPES = {3: torch.float32, 5: torch.bfloat16}
LLM_C_HEADER = 256  # int32 values
NANOGPT_OPTIONS = {"n_layer", "n_head", "n_embd", "block_size", "vocab_size", "bias", "dropout"}
# Under which names trainers keep the weights, and the options that the weights do not show.
WEIGHTS = ("model", "state_dict", "model_state_dict", "module")
OPTIONS = ("config", "args", "hparams", "hyper_parameters")


def open_foreign(path: Path) -> Weights:
    """Open another trainer's checkpoint file.

    Raises:
        BadInput: The file is damaged or has no such format; says what was found.
    """
    with path.open("rb") as file:
        start = file.read(4 * LLM_C_HEADER)
    if start.startswith((ZIP_MAGIC, PICKLE_MAGIC)):
        return _open_pt(path)
    header = np.frombuffer(start, "<i4", len(start) // 4)
    if len(header) == LLM_C_HEADER and header[0] == LLM_C_MAGIC:
        return _open_llm_c(path, header)
    what = f"begins with {start[:8]!r}, which is not a known format"
    raise BadInput(f"{path}", what, FIX_GIVE_ACCEPTED)


def _open_pt(path: Path) -> Weights:
    content = load_strangers_file(path)
    if not isinstance(content, dict):
        what = f"holds a {type(content).__name__}, but no weights by name"
        raise BadInput(f"{path}", what, "save a dict with the model's state_dict() as 'model'")
    given = next((content[key] for key in WEIGHTS if isinstance(content.get(key), dict)), None)
    if given is None:
        found = ", ".join(map(str, list(content)[:5]))
        raise BadInput(f"{path}", f"holds {found}, but no 'model'", FIX_GIVE_ACCEPTED)
    tensors = by_gpt2_names(tensor_readers(given, path), path)
    try:
        options, gelu = _options(content)
        wte, wpe = tensors["wte.weight"](), tensors["wpe.weight"]()
        n_layer = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("h."))
        sizes = (wte.shape[-1], wpe.shape[0], _vocab_size(len(wte)))
        config = GPTConfig(n_layer, options["n_head"], *sizes, gelu=gelu)
    except KeyError as error:
        raise BadInput(f"{path}", f"not a GPT-2: it lacks {error}", FIX_GIVE_ACCEPTED) from error
    except (ValueError, TypeError, IndexError) as error:
        raise BadInput(f"{path}", f"not a GPT-2 ({error})", FIX_GIVE_ACCEPTED) from error
    if not options.get("bias", True):  # nanoGPT without biases is GPT-2 with biases of 0
        for name, shape in weight_shapes(config).items():
            if name.endswith(".bias"):
                tensors[name] = functools.partial(torch.zeros, shape)
    return name_weights(tensors, config, path)


def _options(content: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Return the options, for what the shapes of the weights do not say, and the GELU."""
    if "model_args" in content:  # nanoGPT's
        options = dict(content["model_args"])
        unknown = sorted(options.keys() - NANOGPT_OPTIONS)
        if unknown:
            raise ValueError(f"options that GPT-2 does not have: {', '.join(unknown)}")
        return options, "none"
    for key in OPTIONS:
        fields = content.get(key)
        options = vars(fields) if isinstance(fields, Stranger) else fields
        if isinstance(options, dict) and "n_head" in options:
            return options, "tanh"
    raise KeyError("n_head")


def _vocab_size(rows: int) -> int:
    """Return how many rows of a head are tokens: trainers pad GPT-2's 50,257 up to 50,304."""
    gpt2 = GPTConfig(1, 1, 1)
    return gpt2.vocab_size if gpt2.vocab_size < rows <= gpt2.padded_vocab_size else rows


def _open_llm_c(path: Path, header: np.ndarray) -> Weights:
    version, block_size, vocab_size, n_layer, n_head, n_embd, rows = header[1:8].tolist()
    if version not in LLM_C_DTYPES:
        raise BadInput(f"{path}", f"llm.c version {version}", FIX_GIVE_ACCEPTED)
    try:
        config = GPTConfig(n_layer, n_head, n_embd, block_size, vocab_size)
    except ValueError as error:
        raise BadInput(f"{path}", f"damaged header ({error})", FIX_COPY_AGAIN) from error
    dtype = LLM_C_DTYPES[version]
    shapes = weight_shapes(config) | {"wte.weight": (rows, n_embd)}
    n_values = sum(map(math.prod, shapes.values()))
    n_bytes = 4 * LLM_C_HEADER + n_values * dtype.itemsize
    found = path.stat().st_size
    if found != n_bytes:
        what = f"damaged: the header says {n_bytes:,} bytes, the file has {found:,}"
        raise BadInput(f"{path}", what, FIX_COPY_AGAIN)
    integers = np.int32 if dtype.itemsize == 4 else np.int16
    mapped = np.memmap(path, integers, "c", offset=4 * LLM_C_HEADER)  # "c": not written back
    flat = torch.from_numpy(mapped).view(dtype)
    return Weights(config, path, functools.partial(_llm_c_weights, flat, shapes))


def _llm_c_weights(
    flat: Tensor, shapes: dict[str, tuple[int, ...]]
) -> Iterator[tuple[str, Tensor]]:
    """Yield each weight; llm.c lays out one kind of weight for all layers, then the next kind."""
    kinds = {name: re.sub(r"\.\d+\.", ".", name) for name in shapes}  # h.3.ln_1.bias: h.ln_1.bias
    order = list(dict.fromkeys(kinds.values()))  # as in GPT-2's block
    start = 0
    for name in sorted(shapes, key=lambda name: order.index(kinds[name])):  # stable: by layer
        n_values = math.prod(shapes[name])
        yield name, flat[start : start + n_values].view(shapes[name])
        start += n_values
