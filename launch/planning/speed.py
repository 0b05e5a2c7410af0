"""Estimate what one optimizer step costs: bytes that a rank sends, and seconds by their cause.

A roofline: matrix products and attention at the share of the peak that long runs reach, everything
else at the speed of memory. docs/SCALING.md compares it with published runs, and the bytes with
those that were counted.
"""

from __future__ import annotations

import math

from training.config import BatchArithmetic
from training.devices import Device
from training.ds_config import offloads
from training.memory import MAX_REDUCED, RankShare, activation_bytes, comm_bytes, elements_kept_near

# Passes over the residual stream's width C, for each token and block, forward and backward. In its
# own dtype: two LayerNorms (2 and 4), two sums (6 and 6). In that of the products: what LayerNorm
# returns (2 and 4), GELU over 4C (8; again 8, and 12), the biases' gradients (9).
RESIDUAL_FORWARD, RESIDUAL_BACKWARD = 8, 10
MATMUL_FORWARD, MATMUL_BACKWARD = 10, 33
GELU_AGAIN = 8  # of those in the backward pass
# Passes over the logits: written, read twice, replaced by their gradient, and read by two products;
# and for each chunk of them over the head's gradient: two in the products' dtype, two in fp32.
LOGIT_PASSES = 6
HEAD_PASSES = 2
UPDATE_BYTES = 30  # a parameter: gradient, master, two moments; all but the first written; weight
LINK_SHARE = 0.8  # of a link's bandwidth that NCCL's large collectives get
HOP_S = 3.5e-6  # of a ring for each rank: fitted to llm-foundry's 1B on 8, 64 and 512 H100
ZERO3_OVERLAP = 0.5  # of ZeRO-3's communication with computation
LAUNCH_S = 300e-6  # for the 40 kernels of a block, forward and backward, by Python: an assumption
HOST_MEMORY_BYTES_S = 200e9  # of a machine with two processors, for the optimizer on the CPU


def sent_bytes(share: RankShare, batch: BatchArithmetic) -> float:
    """Return what rings send from one rank in one optimizer step, in bytes."""
    n_params, weight_bytes = share.n_params, share.weight_bytes
    gradient_bytes, micro_steps = comm_bytes(share), batch.grad_accum_steps
    if share.stage == 0:
        per_step = 2 * gradient_bytes * n_params
    elif share.stage == 1:
        reduce_bytes = 2 * gradient_bytes
        if share.has_flat_gradients:
            reduce_bytes = 4 if share.on_gpu else 2 * 4  # NCCL scatters sums; gloo all-reduces
        per_step = (reduce_bytes + weight_bytes) * n_params
    elif share.stage == 2:  # every micro-batch reduces; whole buckets, unless told otherwise
        times = 2 if share.zero_option("use_multi_rank_bucket_allreduce", True) else 1
        per_step = (micro_steps * times * gradient_bytes + weight_bytes) * n_params
    else:  # weights are gathered forward, and backward too if they did not stay
        again = n_params - share.head - elements_kept_near(share)
        per_step = micro_steps * (gradient_bytes * n_params + weight_bytes * (n_params + again))
    return per_step * (1 - 1 / share.world_size)


def step_seconds(
    share: RankShare, batch: BatchArithmetic, seq_len: int, device: Device, nodes: int
) -> dict[str, float]:
    """Return the seconds of one optimizer step by what they go to.

    Args:
        share: What one rank trains.
        batch: How the step is split.
        seq_len: Tokens of a sequence.
        device: The device of each rank.
        nodes: Number of machines, each with as many ranks.
    """
    gpt, tokens = share.gpt, share.tokens * batch.grad_accum_steps
    # FLOPs of a token. Checkpointing runs the forward, a third of a step, twice.
    forwards = 2 if "activation_checkpointing" in share.ds_config else 1
    recompute_factor = 4 / 3 if forwards == 2 else 1
    matmul_flops = 6 * (recompute_factor * 12 * gpt.n_layer * gpt.n_embd**2 + share.head)
    attention_flops = recompute_factor * 6 * gpt.n_layer * gpt.n_embd * seq_len  # the causal half
    # Bytes of a token that go to and from memory: in the blocks, then over the logits.
    residual, matmul = activation_bytes(share)
    matmul_backward = MATMUL_BACKWARD
    if share.memory_use.keeps_gelu:
        matmul_backward -= GELU_AGAIN
    residual_bytes = residual * (forwards * RESIDUAL_FORWARD + RESIDUAL_BACKWARD)
    matmul_bytes = matmul * (forwards * MATMUL_FORWARD + matmul_backward)
    streamed_bytes = gpt.n_layer * gpt.n_embd * (residual_bytes + matmul_bytes)
    logit_bytes = LOGIT_PASSES * matmul + HEAD_PASSES * (matmul + 4) * gpt.n_embd / share.loss_rows
    updated = share.n_params / (share.world_size if share.stage else 1)
    flops = device.flops * (2 / matmul)  # TF32 has half the peak of bf16
    seconds = {
        "matrix products": tokens * matmul_flops / (flops * device.matmul_share),
        "attention": tokens * attention_flops / (flops * device.attention_share),
        "elementwise": tokens * streamed_bytes / device.memory_bytes_s,
        "loss": tokens * logit_bytes * gpt.padded_vocab_size / device.memory_bytes_s,
        "optimizer": UPDATE_BYTES * updated / device.memory_bytes_s,
    }
    # Python launches kernels while the GPU computes: only what takes longer than that counts.
    launches = 0.0
    if device.on_gpu:
        launches = LAUNCH_S * gpt.n_layer * batch.grad_accum_steps * recompute_factor
    seconds["launches"] = max(0.0, launches - sum(seconds.values()))
    seconds["communication"] = _communication(share, batch, device, nodes)
    if offloads(share.ds_config, "optimizer"):
        per_node = batch.world_size // nodes
        seconds["optimizer"] = UPDATE_BYTES * updated / (HOST_MEMORY_BYTES_S / per_node)
        seconds["offload"] = _offloaded_bytes(share, batch) / device.host_bytes_s
    return seconds


def _communication(share: RankShare, batch: BatchArithmetic, device: Device, nodes: int) -> float:
    # Each machine's devices share its links: what all of them gather enters it once.
    per_node = share.world_size // nodes
    link = device.peer_bytes_s
    if nodes > 1 and per_node > 1:
        link = min(link, device.network_bytes_s * per_node)
    elif nodes > 1:
        link = device.network_bytes_s
    seconds = sent_bytes(share, batch) / (LINK_SHARE * link)
    if share.stage == 3:
        seconds *= 1 - ZERO3_OVERLAP
    return seconds + HOP_S * (share.world_size - 1) * _rings(share, batch)


def _rings(share: RankShare, batch: BatchArithmetic) -> int:
    # How often a step goes around: once for a gather or a scatter, twice for an all-reduce.
    n_params, micro_steps = share.n_params, batch.grad_accum_steps
    if share.stage == 3:
        return 3 * share.gpt.n_layer * micro_steps
    if share.has_flat_gradients and share.on_gpu:
        return 2 * 2 + 2  # two groups of weights, each scattered and gathered; and the norm
    reductions = math.ceil(n_params / MAX_REDUCED)
    if share.stage and not share.has_flat_gradients:
        reductions = math.ceil(n_params / share.zero_option("reduce_bucket_size", MAX_REDUCED))
    if share.stage == 2:
        reductions *= micro_steps
    gathers = math.ceil(n_params / max(1, share.zero_option("allgather_bucket_size", MAX_REDUCED)))
    return 2 * reductions + (gathers if share.stage else 0)


def _offloaded_bytes(share: RankShare, batch: BatchArithmetic) -> float:
    # Gradients to the machine's memory, weights back; offloaded weights twice a micro-batch, too.
    n_params = share.n_params / share.world_size
    moved = comm_bytes(share) * batch.grad_accum_steps + share.weight_bytes
    if offloads(share.ds_config, "param"):
        moved += 2 * share.weight_bytes * batch.grad_accum_steps
    return n_params * moved
