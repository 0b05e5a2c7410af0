"""What one rank of a run holds, in bytes, at the moments when it holds most.

Each part is one of the engine's real buffers, or a tensor that autograd keeps; `make plan` compares
the sums with what PyTorch was seen to hold (docs/SCALING.md). Not counted: what the framework
itself takes (RESERVED_BYTES), fragments, dropout's masks on a CPU, and compiled blocks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from model.config import MEMORY_USES, GPTConfig, MemoryUse, chunk_rows
from training.config import BatchArithmetic, TrainConfig
from training.ds_config import MAX_REUSE, offloads, precision, zero_stage

# DeepSpeed 0.19.8: what its copies of gradients hold at stage 0, in elements, and three of its
# defaults for stage 3: weights that are used again within so many elements stay gathered; so many
# are updated at a time.
MAX_REDUCED = 500_000_000
MAX_REUSE_DISTANCE = 1_000_000_000
SUB_GROUP_SIZE = 1_000_000_000
RESERVED_BYTES = 3 * 2**29  # CUDA's context, cuBLAS's workspaces and NCCL's buffers; or Python

Parts = dict[str, float]  # bytes by what they are


@dataclass(frozen=True)
class Shard:
    """What one rank trains, in the numbers that its memory follows from; counts are elements."""

    gpt: GPTConfig
    ds_config: dict[str, Any]
    tokens: int  # of a micro-batch
    accumulates: bool
    world_size: int
    on_gpu: bool
    memory_use: MemoryUse

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


def shard_of(
    config: TrainConfig,
    batch: BatchArithmetic,
    ds_config: dict[str, Any],
    on_gpu: bool,
    use: MemoryUse = MEMORY_USES[-1],
) -> Shard:
    """Return what one rank of a resolved run trains."""
    tokens = batch.micro_batch_size * config.seq_len
    accumulates = batch.grad_accum_steps > 1
    return Shard(config.gpt_config, ds_config, tokens, accumulates, batch.world_size, on_gpu, use)


def peak(shard: Shard) -> Parts:
    """Return what the rank holds at its fullest moment, by part, in bytes."""
    return max(moments(shard).values(), key=lambda parts: sum(parts.values()))


def moments(shard: Shard) -> dict[str, Parts]:
    """Return what the rank holds at each moment that can be its fullest, by part, in bytes."""
    states = _states(shard)
    before = dict(states)  # of the first backward pass: stages 0 and 2 free their gradients
    if not shard.accumulates and shard.stage in (0, 2):
        before["gradients"] = 0
    kept, block = _activations(shard)
    return {
        "loss": before | kept | {"logits": _loss(shard), "gathered": _gathered(shard)},
        "first block's backward": states | {
            "activations": kept["activations"] + block,
            "weights": states["weights"] + _casts(shard, in_backward=True),
            "logits": shard.weight_bytes * shard.head,  # the head's gradient waits for wte's
            "gathered": _gathered(shard),
            "buckets": states["buckets"] + _filled_buckets(shard),
        },
        "end of backward": states | {
            "logits": _head_gradients(shard),
            "gathered": _gathered(shard, blocks=1),
            "buckets": states["buckets"] + _filled_buckets(shard),
        },
        "reduction": states | {"buckets": states["buckets"] + _reduced_copies(shard)},
        "update": states | {"gradients": states["gradients"] + _norm(shard)},
    }  # fmt: skip


def host_bytes(shard: Shard) -> float:
    """Return what the rank keeps in its machine's memory because it is offloaded."""
    share, optimizer, params = shard.n_params / shard.world_size, 0.0, 0.0
    if offloads(shard.ds_config, "optimizer"):
        optimizer = 16 * share  # weights, moments and gradients in fp32
        if shard.stage == 3:  # gradients once more in one buffer of all; these two are pinned
            groups = math.ceil(share / shard.zero_option("sub_group_size", SUB_GROUP_SIZE))
            pinned = groups * _pinned(shard, "optimizer", 4 * share / groups)
            optimizer = 12 * share + pinned + _pinned(shard, "optimizer", 4 * share)
    if offloads(shard.ds_config, "param"):
        params = _pinned(shard, "param", shard.weight_bytes * share)
    return optimizer + params


def _pinned(shard: Shard, what: str, n_bytes: float) -> float:
    # PyTorch's allocator of pinned memory rounds up to a power of two.
    pins = shard.on_gpu and shard.zero_option(f"offload_{what}", {}).get("pin_memory", True)
    return 2.0 ** math.ceil(math.log2(n_bytes)) if pins else n_bytes


def _states(shard: Shard) -> Parts:
    P, W, stage, w = shard.n_params, shard.world_size, shard.stage, shard.weight_bytes
    is_offloaded = offloads(shard.ds_config, "optimizer")
    weights = w * P / (W if stage == 3 else 1)
    if offloads(shard.ds_config, "param"):
        weights = 0
    if stage == 0:
        gradients, optimizer = 4 * P, 8 * P
    else:  # fp32 masters and two moments
        optimizer = 12 * P / W
        if shard.has_flat_gradients:
            immediate = shard.ds_config["bf16"].get("immediate_grad_update", False)
            gradients = (4 if immediate else 4 + w) * P
        elif stage == 1:
            gradients = w * P
        else:
            gradients = (4 if shard.sums_fp32 else w) * P / W
    if is_offloaded:
        gradients, optimizer = 0, 0
    # Stage 3's lives as long as the engine; the others come and go.
    bucket = comm_bytes(shard) * _bucket_size(shard) if stage == 3 else 0
    return {"weights": weights, "gradients": gradients, "optimizer": optimizer, "buckets": bucket}


def _activations(shard: Shard) -> tuple[Parts, float]:
    # What autograd keeps of all blocks, and what one block's backward holds beside it. In elements
    # of width C for each token and block: x, ln_1, q, k, v, y, x, ln_2 and four of the MLP; with
    # autocast the two x are fp32. Its backward: gradient, gelu, and the gradients of both.
    width = shard.tokens * shard.gpt.n_embd
    wide, narrow = activation_bytes(shard)
    one = (2 * wide + 10 * narrow) * width
    one += 4 * narrow * width * shard.memory_use.keeps_gelu
    backward = (wide + 13 * narrow) * width
    ends = 2 * wide * width
    if shard.gpt.dropout:
        one += 2 * width  # a byte each: after attention and after the MLP
    n_layer = shard.gpt.n_layer
    casts = _casts(shard, in_backward=False)
    states = {"weights": _states(shard)["weights"] + casts}
    if "activation_checkpointing" in shard.ds_config:
        return states | {"activations": n_layer * wide * width + ends}, one + backward
    return states | {"activations": n_layer * one + ends}, backward


def activation_bytes(shard: Shard) -> tuple[int, int]:
    """Return the bytes of an element of the residual stream, and of matrix products' operands."""
    return {"bf16": (2, 2), "autocast": (4, 2), "fp32": (4, 4)}[precision(shard.ds_config)]


def _casts(shard: Shard, in_backward: bool) -> float:
    # autocast's bf16 copies of what it multiplies with
    if precision(shard.ds_config) != "autocast":
        return 0
    if not in_backward:
        return 2 * (shard.gpt.n_layer * shard.block + shard.head)
    blocks = 1 if "activation_checkpointing" in shard.ds_config else shard.gpt.n_layer
    return 2 * blocks * shard.block


def _loss(shard: Shard) -> float:
    # model/loss.py: a chunk's logits, both gradients, and on a GPU what is added to the head's.
    narrow = activation_bytes(shard)[1]
    logits = shard.loss_rows * shard.gpt.padded_vocab_size
    hidden = narrow * shard.tokens * shard.gpt.n_embd
    return narrow * logits + (4 + narrow * shard.on_gpu) * shard.head + 2 * hidden


def _head_gradients(shard: Shard) -> float:
    # The head's, wte's, and their sum; or the sum and the copy in which it is reduced.
    w = shard.weight_bytes
    if shard.stage == 3 and shard.world_size > 1:
        copies = 1 if shard.on_gpu else 2  # gloo reduces in a copy of its own
        return max(3 * w, w + copies * comm_bytes(shard)) * shard.head
    return 3 * w * shard.head


def _gathered(shard: Shard, blocks: int | None = None) -> float:
    # Stage 3: wte is whole from the forward's begin to the backward's end, a block while it
    # computes, the next ones ahead of it, and the last ones in between, for they are near.
    if shard.stage < 3 or (shard.world_size == 1 and not offloads(shard.ds_config, "param")):
        return 0
    ahead = shard.zero_option("stage3_prefetch_bucket_size", 0)
    elements = elements_kept_near(shard) + ahead if blocks is None else blocks * shard.block
    return shard.weight_bytes * (shard.head + min(elements, shard.gpt.n_layer * shard.block))


def elements_kept_near(shard: Shard) -> int:
    """Return how many weights of blocks stay gathered between forward and backward at stage 3."""
    distance = shard.zero_option(MAX_REUSE, MAX_REUSE_DISTANCE)
    return shard.block * min(shard.gpt.n_layer, 1 + distance // (2 * shard.block))


def _bucket_size(shard: Shard) -> int:
    return min(int(shard.zero_option("reduce_bucket_size", MAX_REDUCED)), shard.n_params)


def _filled_buckets(shard: Shard) -> float:
    # Stages 1 and 2 fill a bucket while the backward runs, and reduce it in a copy.
    if shard.stage in (0, 3) or shard.has_flat_gradients:
        return 0
    copies = 2 if shard.zero_option("overlap_comm", False) else 1
    return shard.weight_bytes * copies * _bucket_size(shard)


def _reduced_copies(shard: Shard) -> float:
    if shard.stage == 0 and shard.world_size > 1:
        return 4 * min(shard.n_params, MAX_REDUCED)
    return 0


def _norm(shard: Shard) -> float:
    # Stages 2 and 3 take each gradient's norm in an fp64 copy of what this rank has of it.
    if shard.stage < 2:
        return 0
    if shard.stage == 2:
        return 8 * min(shard.head, shard.n_params / shard.world_size)
    return 8 * shard.head / shard.world_size


def comm_bytes(shard: Shard) -> int:
    """Return the bytes of one gradient's element as it is sent."""
    named = {"fp32": 4, "fp16": 2, "bf16": 2, "bfp16": 2}
    name = shard.ds_config.get("communication_data_type")
    return named.get(name, shard.weight_bytes) if name else shard.weight_bytes
