"""Workarounds for DeepSpeed 0.19.8 and for glibc, each with its reason: an upgrade begins here."""

import contextlib
import ctypes
import datetime
import functools
import gc
import hashlib
import inspect
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from training.config import TrainConfig
from training.extension_locks import check_extension_locks
from training.ranks import Ranks
from training.step import global_norm

# Of the two files of DeepSpeed in which `update_by_parts` replaces methods.
UPDATE_SHA256 = "23c204f6af81602ae3544a2ebb6909dd5b5079e367b935b4ffe0f78d440cce2b"
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # malloc.h


def keep_freed_memory_after_a_step(optimizer: Any) -> None:
    """Have malloc keep what is freed, from the first step on, which makes the moments.

    glibc hands large tensors back to the kernel at every step, and their page faults cost a quarter
    of it (docs/LOG.md). mallopt(3): no mmap, and never trim; the environment's MALLOC_MMAP_MAX_ and
    MALLOC_TRIM_THRESHOLD_, for those who did not set them. The moments, which live as long as the
    run, keep pages of their own.
    """

    def keep(*_: Any) -> None:
        libc.malloc_trim(0)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)
        hook.remove()

    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, 2**17)  # glibc's first value; else it grows to 32 MiB
        hook = optimizer.register_step_post_hook(keep)


@contextlib.contextmanager
def one_line_key_errors(config: TrainConfig) -> Iterator[None]:
    """Turn DeepSpeed's complaint about a nested key into one line."""
    from pydantic import ValidationError

    try:
        yield
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise ValueError(
            f"--ds_config {config.ds_config}: {key}: {first['msg']}. Fix: correct or remove it"
        ) from error


def update_by_parts(engine: Any) -> None:
    """Have each rank reduce, measure and clip only its own part of BF16_Optimizer's gradients.

    DeepSpeed averages all gradients on every rank, in a copy, and takes their norm and clips them
    in some 150 small kernels, with three values for which the host waits. Reduction and step are
    replaced together, for after this reduction only a rank's own part is the average. (Through gloo
    every rank still receives all sums.) DeepSpeed's own count of skipped steps stays 0.
    """
    from deepspeed.runtime import bf16_optimizer
    from deepspeed.runtime import engine as deepspeed_engine

    sources = inspect.getsource(bf16_optimizer) + inspect.getsource(deepspeed_engine)
    if hashlib.sha256(sources.encode()).hexdigest() != UPDATE_SHA256:
        what = "this DeepSpeed is not 0.19.8: its own update, which sends more, is taken"
        warnings.warn(f"{what}. Fix: install deepspeed==0.19.8", stacklevel=1)
        return
    optimizer = engine.optimizer
    setattr(engine, "buffered_allreduce_fallback", functools.partial(_reduce_parts, optimizer))  # noqa: B010
    optimizer.step = functools.partial(_step_on_parts, optimizer)


def _reduce_parts(optimizer: Any, **_: Any) -> None:
    # Averages each flat fp32 gradient, (n,), into this rank's part of it (all ranks).
    group = optimizer.dp_process_group
    if dist.get_world_size(group) == 1:
        return
    flats = optimizer.fp32_groups_gradients_flat
    for flat, part in zip(flats, optimizer.fp32_groups_gradient_flat_partition, strict=True):
        if dist.get_backend(group) == "gloo":  # its reduce-scatter takes twice as long
            flat /= dist.get_world_size(group)
            dist.all_reduce(flat, group=group)
        else:
            dist.reduce_scatter_tensor(part, flat, dist.ReduceOp.AVG, group)


@torch.no_grad()
def _step_on_parts(optimizer: Any) -> None:
    # No value leaves the device: AdamW's fused kernel skips a step whose norm is not finite.
    parts = optimizer.fp32_groups_gradient_flat_partition
    norm = global_norm(parts, optimizer.dp_process_group)  # all ranks
    scale = (optimizer.clip_grad / (norm + 1e-6)).clamp(max=1) if optimizer.clip_grad else 1
    for weights, part in zip(optimizer.fp32_groups_flat_partition, parts, strict=True):
        weights.grad = part.mul_(scale)
    optimizer.optimizer.found_inf = (~norm.isfinite()).float()
    optimizer.optimizer.step()
    optimizer._global_grad_norm = norm
    optimizer._lazy_init_hp_params_optimizer_state()
    optimizer.update_lp_params()  # all ranks: gathers
    optimizer.clear_hp_grads()


def gather_by_broadcasts(
    partitioned_param_groups: list[list[Tensor]], dp_process_group: list[Any], **_: Any
) -> None:
    """Give each rank the parts of all: of each group a list by rank of (n,) tensors (all ranks).

    gloo's all-gather goes through copies of everything, in new memory each time: a fifth of a step
    of two ranks (docs/LOG.md).
    """
    works = [
        dist.broadcast(part, group=group, group_src=rank, async_op=True)
        for parts, group in zip(partitioned_param_groups, dp_process_group, strict=True)
        for rank, part in enumerate(parts)
    ]
    for work in works:
        assert work
        work.wait()


def link_in_round_robin_order(optimizer: Any) -> None:
    """Correct the map from weights to the optimizer's flat tensors under round_robin_gradients.

    DeepSpeed's map assumes another order than these tensors have then: weights and moments that are
    read or set through it would be those of other parameters.
    """
    groups, link = optimizer.bit16_groups, optimizer._link_all_hp_params

    def link_all() -> None:
        optimizer.bit16_groups = optimizer.round_robin_bit16_groups
        link()
        optimizer.bit16_groups = groups

    optimizer._link_all_hp_params = link_all  # DeepSpeed calls it again after a load
    link_all()
    optimizer._param_slice_mappings = optimizer._create_param_mapping()


def give_timeout_to_clone(timeout: datetime.timedelta) -> None:
    """Give the run's time limit to the clone of the world that ZeRO talks through (all ranks).

    DeepSpeed makes it with NCCL's default of 10 minutes, after which NCCL ends the process.
    """
    from deepspeed.utils import groups

    set_timeout = getattr(dist, "set_timeout", dist.distributed_c10d._set_pg_timeout)  # before 2.15
    clone: Any = groups._clone_world_group()
    set_timeout(timeout, clone)


def build_cpu_adam(ranks: Ranks) -> None:
    """Compile DeepSpeed's Adam for the CPU once for each machine (all ranks)."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    check_extension_locks(ranks)
    dist.barrier()  # all ranks: nobody mistakes the build for one that was killed
    if ranks.local_rank == 0:  # its constructor compiles it; the others find it built
        with quiet_stdout():
            DeepSpeedCPUAdam([nn.Parameter(torch.zeros(1))])
    dist.barrier()  # all ranks


@contextlib.contextmanager
def quiet_stdout() -> Iterator[None]:
    """Drop what is printed: DeepSpeed prints while it compiles and while it builds an engine."""
    with (
        Path(os.devnull).open("w", encoding="utf-8") as nowhere,
        contextlib.redirect_stdout(nowhere),
    ):
        yield


@contextlib.contextmanager
def without_old_garbage() -> Iterator[None]:
    """Keep what was imported out of the garbage that DeepSpeed collects for its memory reports."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextlib.contextmanager
def without_inductor() -> Iterator[None]:
    """Do without the import of Inductor, which DeepSpeed needs for Muon alone: no run uses it."""
    from deepspeed.runtime import compiler

    theirs = compiler.compile
    setattr(compiler, "compile", lambda: lambda function: function)  # noqa: B010
    try:
        yield
    finally:
        setattr(compiler, "compile", theirs)  # noqa: B010
