"""Checkpoints of other trainers as a GPT: build-nanogpt and nanoGPT .pt, llm.c .bin.

llm.c's format: its train_gpt2.py, write_model. nanoGPT trains with the exact GELU, the two others
with GPT-2's approximation.
"""

import math
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from checkpoint.hf_folder import HEAD, MASKS, NOT_TIED, PREFIX, fill_model, weight_shapes
from checkpoint.unpickling import load_weights_only
from model import GPT, GPTConfig

ACCEPTED = (
    "Fix: give a run, step or Hugging Face folder, a hub name, a build-nanogpt or nanoGPT .pt "
    "or an llm.c .bin (version 3 or 5)"
)
COPY_AGAIN = "Fix: copy or download it again"
ZIP_MAGIC = b"PK\x03\x04"  # torch.save's container
LLM_C_MAGIC = 20240326
LLM_C_DTYPES = {3: torch.float32, 5: torch.bfloat16}
LLM_C_HEADER = 256  # int32 values
WRAPPERS = ("_orig_mod.", "module.", PREFIX)  # torch.compile's, DDP's, GPT-2's
NANOGPT_OPTIONS = {"n_layer", "n_head", "n_embd", "block_size", "vocab_size", "bias", "dropout"}


class ConfigFields:
    """Takes the fields of build-nanogpt's pickled GPTConfig; nothing of that class is run."""

    n_head: int


def load_foreign(path: Path) -> GPT:
    """Build the model of another trainer's checkpoint file, fp32 weights, in evaluation mode.

    Raises:
        ValueError: No such format, or a damaged file; names what was found.
    """
    with path.open("rb") as file:
        start = file.read(4 * LLM_C_HEADER)
    if start.startswith(ZIP_MAGIC):
        return _load_pt(path)
    header = np.frombuffer(start, "<i4", len(start) // 4)
    if len(header) == LLM_C_HEADER and header[0] == LLM_C_MAGIC:
        return _load_llm_c(path, header)
    raise ValueError(f"{path}: begins with {start[:8]!r}, no format of weights. {ACCEPTED}")


def _load_pt(path: Path) -> GPT:
    try:
        with zipfile.ZipFile(path) as container:
            broken = container.testzip()
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path}: damaged ({error}). {COPY_AGAIN}") from error
    if broken:
        raise ValueError(f"{path}: damaged (checksum of {broken}). {COPY_AGAIN}")
    content = load_weights_only(path, (ConfigFields, "GPTConfig"))
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        found = list(map(str, content))[:5] if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{path}: holds {found}, no 'model'. {ACCEPTED}")
    weights = {_plain_name(str(k)): w for k, w in content["model"].items()}
    weights = {name: w for name, w in weights.items() if not name.endswith(MASKS)}
    if odd := [name for name, w in weights.items() if not isinstance(w, Tensor)]:
        raise ValueError(f"{path}: {odd[0]} is no tensor. {ACCEPTED}")
    try:
        options, gelu = _options(content)
        wte, wpe = weights["wte.weight"], weights["wpe.weight"]
        n_layer = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("h."))
        sizes = (wte.shape[-1], wpe.shape[0], _vocab_size(len(wte)))
        config = GPTConfig(n_layer, options["n_head"], *sizes, gelu=gelu)
    except KeyError as error:
        raise ValueError(f"{path}: not a GPT-2, it lacks {error}. {ACCEPTED}") from error
    except (ValueError, TypeError, IndexError) as error:
        raise ValueError(f"{path}: not a GPT-2 ({error}). {ACCEPTED}") from error
    head = weights.pop(HEAD, wte)
    if head.data_ptr() != wte.data_ptr() and not torch.equal(head, wte):
        raise ValueError(f"{path}: {NOT_TIED}")
    if not options.get("bias", True):  # nanoGPT without biases is GPT-2 with biases of 0
        for name, shape in weight_shapes(config).items():
            if name.endswith(".bias"):
                weights[name] = torch.zeros(shape)
    return fill_model(config, weights.items(), path)


def _options(content: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Return what the shapes of the weights do not say, and the GELU."""
    if "model_args" not in content:
        fields = content["config"]
        return vars(fields) if isinstance(fields, ConfigFields) else dict(fields), "tanh"
    options = dict(content["model_args"])
    if unknown := sorted(options.keys() - NANOGPT_OPTIONS):
        raise ValueError(f"options that GPT-2 does not have: {', '.join(unknown)}")
    return options, "none"


def _plain_name(name: str) -> str:
    while wrapper := next((w for w in WRAPPERS if name.startswith(w)), None):
        name = name.removeprefix(wrapper)
    return name


def _vocab_size(rows: int) -> int:
    """Return the real tokens of a head: trainers pad GPT-2's 50,257 up to 50,304."""
    gpt2 = GPTConfig(1, 1, 1)
    return gpt2.vocab_size if gpt2.vocab_size < rows <= gpt2.padded_vocab_size else rows


def _load_llm_c(path: Path, header: np.ndarray) -> GPT:
    version, block_size, vocab_size, n_layer, n_head, n_embd, rows = header[1:8].tolist()
    if version not in LLM_C_DTYPES:
        raise ValueError(f"{path}: llm.c version {version}. {ACCEPTED}")
    try:
        config = GPTConfig(n_layer, n_head, n_embd, block_size, vocab_size)
    except ValueError as error:
        raise ValueError(f"{path}: damaged header ({error}). {COPY_AGAIN}") from error
    dtype, shapes = LLM_C_DTYPES[version], weight_shapes(config)
    shapes["wte.weight"] = (rows, n_embd)
    n_values = sum(map(math.prod, shapes.values()))
    n_bytes = 4 * LLM_C_HEADER + n_values * dtype.itemsize
    if path.stat().st_size != n_bytes:
        found = path.stat().st_size
        raise ValueError(
            f"{path}: damaged: the header says {n_bytes:,} bytes, it has {found:,}. {COPY_AGAIN}"
        )
    integers = np.int32 if dtype.itemsize == 4 else np.int16
    mapped = np.memmap(path, integers, "c", offset=4 * LLM_C_HEADER)  # "c": not written back
    return fill_model(config, _llm_c_weights(torch.from_numpy(mapped).view(dtype), shapes), path)


def _llm_c_weights(
    flat: Tensor, shapes: dict[str, tuple[int, ...]]
) -> Iterator[tuple[str, Tensor]]:
    """Yield each weight; llm.c lays out one kind of weight for all layers, then the next kind."""

    def kind(name: str) -> tuple[int, str]:
        room, *rest = name.split(".", 2)
        place = ("wte", "wpe", "h", "ln_f").index(room)
        return place, rest[1] if room == "h" else ""

    names = list(shapes)
    kinds = list(dict.fromkeys(map(kind, names)))  # in the order of GPT-2's block
    start = 0
    for name in sorted(names, key=lambda name: kinds.index(kind(name))):  # stable: by layer
        n_values = math.prod(shapes[name])
        yield name, flat[start : start + n_values].view(shapes[name])
        start += n_values
