"""Estimate what one rank of a run holds, in bytes, at the moments when it holds most.

Each part is one of the engine's real buffers, or a tensor that autograd keeps; `make plan` compares
the sums with what PyTorch was seen to hold (docs/SCALING.md). Not counted: what the framework
itself takes (RESERVED_BYTES), fragments, dropout's masks on a CPU, and compiled blocks.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

from model.config import MEMORY_USES, GPTConfig, MemoryUse, chunk_rows
from training.config import BatchArithmetic, TrainConfig
from training.devices import GIB
from training.ds_config import MAX_REUSE, offloads, precision, zero_stage

# Defaults of DeepSpeed 0.19.8, in elements.
MAX_REDUCED = 500_000_000  # of a copy of gradients at stage 0
MAX_REUSE_DISTANCE = 1_000_000_000  # stage 3: weights that are used again sooner stay gathered
SUB_GROUP_SIZE = 1_000_000_000  # stage 3: updated at a time
# An allowance for CUDA's context, cuBLAS's workspaces and NCCL's buffers; or for Python.
RESERVED_BYTES = 3 * GIB // 2

Parts = dict[str, float]  # bytes by what they are


@dataclass(frozen=True)
class RankShare:
    """What one rank of a resolved run trains; counts are elements."""

    config: TrainConfig
    batch: BatchArithmetic
    ds_config: dict[str, Any]
    on_gpu: bool
    memory_use: MemoryUse = MEMORY_USES[-1]  # the least memory, until one is chosen

    @functools.cached_property
    def gpt(self) -> GPTConfig:
        """Return the shape of the model."""
        return self.config.gpt_config

    @property
    def tokens(self) -> int:
        """Return the tokens of a micro-batch."""
        return self.batch.micro_batch_size * self.config.seq_len

    @property
    def world_size(self) -> int:
        """Return the number of ranks."""
        return self.batch.world_size

    @property
    def head(self) -> int:
        """Return the elements of `wte`."""
        return self.gpt.padded_vocab_size * self.gpt.n_embd

    @property
    def block(self) -> int:
        """Return the elements of one block."""
        return 12 * self.gpt.n_embd**2 + 13 * self.gpt.n_embd

    @property
    def n_params(self) -> int:
        """Return all parameters, with the padded rows of `wte`."""
        return self.gpt.n_params() + self.head - self.gpt.vocab_size * self.gpt.n_embd

    @property
    def stage(self) -> int:
        """Return the ZeRO stage."""
        return zero_stage(self.ds_config)

    @property
    def weight_bytes(self) -> int:
        """Return the bytes of one weight that the model computes with."""
        return 2 if precision(self.ds_config) == "bf16" else 4

    @property
    def sums_fp32(self) -> bool:
        """Return whether gradients are accumulated in fp32."""
        types = self.ds_config.get("data_types", {})
        return self.weight_bytes == 4 or types.get("grad_accum_dtype") == "fp32"

    @property
    def has_flat_gradients(self) -> bool:
        """Return whether DeepSpeed takes its BF16_Optimizer."""
        return self.stage == 1 and self.weight_bytes == 2 and self.sums_fp32

    @property
    def loss_rows(self) -> int:
        """Return the rows of logits that the loss holds at a time."""
        vocab_size = self.gpt.padded_vocab_size
        return chunk_rows(self.tokens, vocab_size, self.on_gpu, self.memory_use.chunk_rows)

    def zero_option(self, name: str, default: Any) -> Any:
        """Return a value of the zero_optimization block."""
        return self.ds_config.get("zero_optimization", {}).get(name, default)


def peak(share: RankShare) -> Parts:
    """Return what the rank holds at its fullest moment, by part, in bytes."""
    return max(memory_by_phase(share).values(), key=lambda parts: sum(parts.values()))


def memory_by_phase(share: RankShare) -> dict[str, Parts]:
    """Return what the rank holds at each moment that can be its fullest, by part, in bytes."""
    states = _states(share)
    # Of the first backward pass: stages 0 and 2 free their gradients.
    before = dict(states)
    if share.batch.grad_accum_steps == 1 and share.stage in (0, 2):
        before["gradients"] = 0
    kept, block = _activations(share)
    gathered = _gathered(share)
    loss = before | kept | {"logits": _loss(share), "gathered": gathered}
    backward = states | {"buckets": states["buckets"] + _filled_buckets(share)}
    first_block = backward | {
        "activations": kept["activations"] + block,
        "weights": states["weights"] + _casts(share, in_backward=True),
        "logits": share.weight_bytes * share.head,  # the head's gradient waits for wte's
        "gathered": gathered,
    }
    end = {"logits": _head_gradients(share), "gathered": _gathered(share, blocks=1)}
    return {
        "loss": loss,
        "first block's backward": first_block,
        "end of backward": backward | end,
        "reduction": states | {"buckets": states["buckets"] + _reduced_copies(share)},
        "update": states | {"gradients": states["gradients"] + _norm(share)},
    }


def host_bytes(share: RankShare) -> float:
    """Return what the rank keeps in its machine's memory because it is offloaded."""
    n_params = share.n_params / share.world_size
    optimizer = 0.0
    params = 0.0
    if offloads(share.ds_config, "optimizer"):
        optimizer = 16 * n_params  # weights, two moments and gradients in fp32
        if share.stage == 3:
            # Gradients once more in one buffer of all; this and the first are pinned.
            groups = math.ceil(n_params / share.zero_option("sub_group_size", SUB_GROUP_SIZE))
            in_groups = groups * _pinned(share, "optimizer", 4 * n_params / groups)
            optimizer = 12 * n_params + in_groups + _pinned(share, "optimizer", 4 * n_params)
    if offloads(share.ds_config, "param"):
        params = _pinned(share, "param", share.weight_bytes * n_params)
    return optimizer + params


def _pinned(share: RankShare, what: str, n_bytes: float) -> float:
    # PyTorch's allocator of pinned memory rounds up to a power of two.
    is_pinned = share.on_gpu and share.zero_option(f"offload_{what}", {}).get("pin_memory", True)
    return 2.0 ** math.ceil(math.log2(n_bytes)) if is_pinned else n_bytes


def _states(share: RankShare) -> Parts:
    n_params, world_size = share.n_params, share.world_size
    weight_bytes, stage = share.weight_bytes, share.stage
    weights = weight_bytes * n_params / (world_size if stage == 3 else 1)
    if offloads(share.ds_config, "param"):
        weights = 0
    # An optimizer has fp32 masters and two moments; at stage 0 the weights are the masters.
    optimizer = 8 * n_params if stage == 0 else 12 * n_params / world_size
    if stage == 0:
        gradients = 4 * n_params
    elif share.has_flat_gradients:
        immediate = share.ds_config["bf16"].get("immediate_grad_update", False)
        gradients = (4 if immediate else 4 + weight_bytes) * n_params
    elif stage == 1:
        gradients = weight_bytes * n_params
    else:
        gradients = (4 if share.sums_fp32 else weight_bytes) * n_params / world_size
    if offloads(share.ds_config, "optimizer"):
        gradients, optimizer = 0, 0
    # Stage 3's lives as long as the engine; the others come and go.
    bucket = comm_bytes(share) * _bucket_size(share) if stage == 3 else 0
    return {"weights": weights, "gradients": gradients, "optimizer": optimizer, "buckets": bucket}


def _activations(share: RankShare) -> tuple[Parts, float]:
    # What autograd keeps of all blocks, and what one block's backward holds beside it. In elements
    # of width C for each token and block: x, ln_1, q, k, v, y, x, ln_2 and four of the MLP; with
    # autocast the two x are fp32. Its backward: gradient, gelu, and the gradients of both.
    width = share.tokens * share.gpt.n_embd
    residual_bytes, matmul_bytes = activation_bytes(share)
    one = (2 * residual_bytes + 10 * matmul_bytes) * width
    if share.memory_use.keeps_gelu:
        one += 4 * matmul_bytes * width
    if share.gpt.dropout:
        one += 2 * width  # a byte each: after attention and after the MLP
    backward = (residual_bytes + 13 * matmul_bytes) * width
    kept_of_block = one
    if "activation_checkpointing" in share.ds_config:  # only its input; the rest comes again
        kept_of_block = residual_bytes * width
        backward += one
    ends = 2 * residual_bytes * width  # what the first block gets, and what the last one gives
    weights = _states(share)["weights"] + _casts(share, in_backward=False)
    activations = share.gpt.n_layer * kept_of_block + ends
    return {"weights": weights, "activations": activations}, backward


def activation_bytes(share: RankShare) -> tuple[int, int]:
    """Return the bytes of an element of the residual stream, and of matrix products' operands."""
    return {"bf16": (2, 2), "autocast": (4, 2), "fp32": (4, 4)}[precision(share.ds_config)]


def _casts(share: RankShare, in_backward: bool) -> float:
    # autocast's bf16 copies of what it multiplies with
    if precision(share.ds_config) != "autocast":
        return 0
    if not in_backward:
        return 2 * (share.gpt.n_layer * share.block + share.head)
    blocks = 1 if "activation_checkpointing" in share.ds_config else share.gpt.n_layer
    return 2 * blocks * share.block


def _loss(share: RankShare) -> float:
    # model/loss.py: a chunk's logits, both gradients (the head's in fp32), and on a GPU what is
    # added to the head's.
    _, matmul_bytes = activation_bytes(share)
    logits = share.loss_rows * share.gpt.padded_vocab_size
    hidden = matmul_bytes * share.tokens * share.gpt.n_embd
    head_bytes = 4 + matmul_bytes if share.on_gpu else 4
    return matmul_bytes * logits + head_bytes * share.head + 2 * hidden


def _head_gradients(share: RankShare) -> float:
    # The head's, wte's, and their sum; or the sum and the copy in which it is reduced.
    weight_bytes = share.weight_bytes
    copies_bytes = 0
    if share.stage == 3 and share.world_size > 1:
        # gloo reduces in a copy of its own.
        copies_bytes = comm_bytes(share) * (1 if share.on_gpu else 2)
    return max(3 * weight_bytes, weight_bytes + copies_bytes) * share.head


def _gathered(share: RankShare, blocks: int | None = None) -> float:
    # Stage 3: wte is whole from the forward's start to the backward's end, a block while it
    # computes, the next ones before it does, and the last ones between forward and backward.
    if share.stage < 3 or (share.world_size == 1 and not offloads(share.ds_config, "param")):
        return 0
    ahead = share.zero_option("stage3_prefetch_bucket_size", 0)
    elements = elements_kept_near(share) + ahead if blocks is None else blocks * share.block
    return share.weight_bytes * (share.head + min(elements, share.gpt.n_layer * share.block))


def elements_kept_near(share: RankShare) -> int:
    """Return how many weights of blocks stay gathered between forward and backward at stage 3."""
    distance = share.zero_option(MAX_REUSE, MAX_REUSE_DISTANCE)
    return share.block * min(share.gpt.n_layer, 1 + distance // (2 * share.block))


def _bucket_size(share: RankShare) -> int:
    return min(int(share.zero_option("reduce_bucket_size", MAX_REDUCED)), share.n_params)


def _filled_buckets(share: RankShare) -> float:
    # Stages 1 and 2 fill a bucket while the backward runs, and reduce it in a copy.
    if share.stage in (0, 3) or share.has_flat_gradients:
        return 0
    copies = 2 if share.zero_option("overlap_comm", False) else 1
    return share.weight_bytes * copies * _bucket_size(share)


def _reduced_copies(share: RankShare) -> float:
    if share.stage == 0 and share.world_size > 1:
        return 4 * min(share.n_params, MAX_REDUCED)
    return 0


def _norm(share: RankShare) -> float:
    # Stages 2 and 3 take each gradient's norm in an fp64 copy of what this rank has of it.
    if share.stage < 2:
        return 0
    if share.stage == 2:
        return 8 * min(share.head, share.n_params / share.world_size)
    return 8 * share.head / share.world_size


def comm_bytes(share: RankShare) -> int:
    """Return the bytes of one gradient's element as it is sent."""
    named = {"fp32": 4, "fp16": 2, "bf16": 2, "bfp16": 2}
    name = share.ds_config.get("communication_data_type")
    return named.get(name, share.weight_bytes) if name else share.weight_bytes
