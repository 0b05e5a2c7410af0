"""Take one optimizer step through the engine, and measure its time."""

import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.profiler import record_function

from training.config import TrainConfig
from training.schedule import lr_at

NORM_ELEMENTS = 2**20  # at a time: PyTorch makes an fp64 copy of them, 8 MiB


class StepClock:
    """Wall time of the optimizer steps since the last log, without evaluation and saving."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.spent_s = 0.0
        self.started_s: float | None = None

    def pause(self) -> None:
        """Stop, once the device has done what is queued: it is part of the steps."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.spent_s += self._running_s()
        self.started_s = None

    def resume(self) -> None:
        """Go on, if it has stopped."""
        if self.started_s is None:
            self.started_s = time.perf_counter()

    def lap(self) -> float:
        """Return the seconds since the last lap, in which the host has waited for the device."""
        lap_s = self.spent_s + self._running_s()
        self.spent_s, self.started_s = 0.0, time.perf_counter()
        return lap_s

    def _running_s(self) -> float:
        return 0.0 if self.started_s is None else time.perf_counter() - self.started_s


def take_step(
    engine: Any,
    config: TrainConfig,
    step: int,
    grad_accum_steps: int,
    batches: Iterator[tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor | float, float]:
    """Do optimizer step `step` on the next micro-batches, tokens and targets (B, T) (all ranks).

    Returns:
        The sum of this rank's losses in nats and the gradient norm, both still on the device, and
        the learning rate.
    """
    lr = lr_at(step, config.lr, config.warmup_steps, config.decay_steps, config.min_lr_ratio)
    set_optimizer(engine, config, lr)
    loss_sum = torch.zeros((), device=engine.device)
    for micro_step in range(grad_accum_steps):
        with record_function("data"):
            tokens, targets = next(batches)
        with record_function("forward"):
            loss = engine(tokens, targets)
        with record_function("backward"):
            engine.backward(loss)  # divides by grad_accum_steps
            loss_sum += loss.detach()
            if micro_step + 1 < grad_accum_steps:
                engine.step()  # counts the micro-step; the weights stay
    with record_function("optimizer"):
        return loss_sum, optimizer_step(engine, config.grad_clip), lr


def set_optimizer(engine: Any, config: TrainConfig, lr: float) -> None:
    """Set what the run owns of the optimizer; loading a checkpoint brings back its own values."""
    if engine.zero_optimization_stage() > 0:  # at stage 0 `optimizer_step` clips
        engine.optimizer.clip_grad = config.grad_clip
    decays = (config.weight_decay, 0.0)  # the order of decay_groups
    for group, weight_decay in zip(engine.optimizer.param_groups, decays, strict=True):
        group |= {"lr": lr, "betas": (config.beta1, config.beta2), "eps": config.eps}
        group["weight_decay"] = weight_decay


def optimizer_step(engine: Any, grad_clip: float) -> Tensor | float:
    """Update the weights at the accumulation boundary (all ranks); return the gradient norm.

    The norm is global and taken before clipping. If it is not finite, no weight and no moment
    changes.
    """
    if engine.zero_optimization_stage() > 0:
        engine.step()
        return engine.get_global_grad_norm()
    params = list(engine.module.parameters())
    norm = global_norm([p.grad for p in params if p.grad is not None])
    if grad_clip:
        nn.utils.clip_grads_with_norm_(params, grad_clip, norm)
    engine.optimizer.found_inf = (~norm.isfinite()).float()  # the fused step is skipped: no sync
    engine.step()
    return norm


def global_norm(tensors: Sequence[Tensor], group: dist.ProcessGroup | None = None) -> Tensor:
    """Return the 2-norm of all elements, summed in fp64 as DeepSpeed does, as an fp32 scalar.

    Args:
        tensors: On one device.
        group: Each of its ranks has others (all ranks); default: these are all.
    """
    n = NORM_ELEMENTS if tensors[0].device.type == "cpu" else 16 * NORM_ELEMENTS  # fewer kernels
    pieces: list[Tensor] = []
    for tensor in tensors:
        pieces += tensor.flatten().split(n)
    norms = torch.stack([torch.linalg.vector_norm(p, dtype=torch.float64) for p in pieces])
    squares = norms.square().sum()
    if group is not None:
        dist.all_reduce(squares, group=group)
    return squares.sqrt().float()
