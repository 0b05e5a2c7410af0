"""Work around DeepSpeed 0.19.8 and glibc, each time with the reason: an upgrade begins here."""

import contextlib
import ctypes
import datetime
import functools
import gc
import hashlib
import inspect
import io
import logging
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from errors import BadInput
from training.config import TrainConfig
from training.extension_locks import check_extension_locks
from training.ranks import Ranks
from training.step import global_norm

# Of the two files of DeepSpeed in which `update_by_parts` replaces methods.
UPDATE_SHA256 = "23c204f6af81602ae3544a2ebb6909dd5b5079e367b935b4ffe0f78d440cce2b"
# mallopt's options in malloc.h.
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
M_MMAP_MAX = -4


def quiet_deepspeed(device: torch.device) -> None:
    """Silence what every run would print and nobody can act on."""
    import deepspeed.ops
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    # It calls PyTorch's collectives by their old names, at stage 3 many times in each step.
    old_names = ".*(all_gather_into|reduce_scatter)_tensor. is deprecated"
    warnings.filterwarnings("ignore", old_names, FutureWarning)
    if device.type == "cpu":
        # DeepSpeed's shared-memory all-reduce serves inference only; compiling it takes a minute.
        # Not on a GPU: there reading this table makes DeepSpeed try every operator, on stdout.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


@contextlib.contextmanager
def one_line_key_errors(config: TrainConfig) -> Iterator[None]:
    """Turn DeepSpeed's error about a nested key, which has many lines, into one line."""
    from pydantic import ValidationError

    try:
        yield
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        where = f"--ds_config {config.ds_config}: {key}"
        raise BadInput(where, first["msg"], "correct or remove it") from error


@contextlib.contextmanager
def building_engine(config: TrainConfig) -> Iterator[None]:
    """Have DeepSpeed build an engine fast and silently.

    It prints while it builds. It imports Inductor, which takes seconds, for Muon alone, which no
    run uses. For its memory reports it collects garbage, and would search all that was imported.
    """
    from deepspeed.runtime import compiler

    theirs = compiler.compile
    setattr(compiler, "compile", lambda: lambda function: function)  # noqa: B010
    gc.freeze()
    try:
        with one_line_key_errors(config), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        gc.unfreeze()
        setattr(compiler, "compile", theirs)  # noqa: B010


def fix_engine(engine: Any) -> None:
    """Replace what is slow or wrong in an engine that has just been built (all ranks)."""
    from deepspeed.runtime import bf16_optimizer
    from deepspeed.runtime.zero import stage_1_and_2

    if dist.get_backend() == "gloo":
        for module in (bf16_optimizer, stage_1_and_2):
            setattr(module, "all_gather_dp_groups", gather_by_broadcasts)  # noqa: B010
    if getattr(engine.optimizer, "round_robin_gradients", False):
        link_in_round_robin_order(engine.optimizer)
    if isinstance(engine.optimizer, bf16_optimizer.BF16_Optimizer):
        update_by_parts(engine)
    if not torch.cuda.is_initialized():
        keep_freed_memory_after_a_step(engine.basic_optimizer)


def keep_freed_memory_after_a_step(optimizer: Any) -> None:
    """Have malloc keep what is freed, from the first step on, which makes the moments.

    glibc hands large tensors back to the kernel at every step, and their page faults cost a quarter
    of it (docs/LOG.md). The same as MALLOC_MMAP_MAX_=0 and MALLOC_TRIM_THRESHOLD_=-1 in the
    environment (mallopt(3)). The moments, which live as long as the run, keep pages of their own.
    """
    libc = ctypes.CDLL(None)
    if sys.platform != "linux" or not hasattr(libc, "mallopt"):
        return

    def keep(*_: Any) -> None:
        libc.malloc_trim(0)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)
        hook.remove()

    libc.mallopt(M_MMAP_THRESHOLD, 2**17)  # glibc's first value; else it grows to 32 MiB
    hook = optimizer.register_step_post_hook(keep)


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
    works = []
    for parts, group in zip(partitioned_param_groups, dp_process_group, strict=True):
        for rank, part in enumerate(parts):
            works.append(dist.broadcast(part, group=group, group_src=rank, async_op=True))
    for work in works:
        assert work
        work.wait()


def link_in_round_robin_order(optimizer: Any) -> None:
    """Correct the map from weights to the optimizer's flat tensors under round_robin_gradients.

    DeepSpeed's map assumes another order than these tensors have then: weights and moments that are
    read or set through it would be those of other parameters.
    """
    groups = optimizer.bit16_groups
    link = optimizer._link_all_hp_params

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
        with contextlib.redirect_stdout(io.StringIO()):  # the compiler's
            DeepSpeedCPUAdam([nn.Parameter(torch.zeros(1))])
    dist.barrier()  # all ranks
