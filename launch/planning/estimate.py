"""What a run takes on some machines: memory, time, bytes; and which ds_config serves it best."""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoint.manifest import checkpoint_bytes
from launch.planning import speed
from model.config import MEMORY_USES, MemoryUse
from training import memory
from training.config import (
    BatchArithmetic,
    TrainConfig,
    divisors,
    largest_micro_batch,
    resolve_batch,
)
from training.devices import Device
from training.ds_config import load_ds_config, offloads, precision, resolve_ds_config, zero_stage

DS_CONFIGS = Path(__file__).resolve().parents[2] / "ds_configs"
CHECKPOINTING, WITH = "activation_checkpointing", " with "
FRAGMENTS = 0.04  # of the memory: what the allocator cannot use
MARGIN = 0.1  # of it stays free too, for what nobody asked for: that must not fail
HARDLY = 0.05  # slower: estimates are no finer
PREFERRED = 1, 0, 2, 3  # stages: what train.py takes by itself, then the simpler
DAY_S = 86_400
STORAGE_BYTES_S = 2e9  # from each machine to the shared storage: an assumption
DEVICE_HOURS_A_FAULT = 45_000  # Llama 3 (2024), section 3.3.4: 466 in 54 days of 16,384 H100


@dataclass(frozen=True)
class Cluster:
    """Machines, each with the same devices; one rank on each device.

    Raises:
        ValueError: Less than one of either.
    """

    device: Device
    nodes: int
    gpus_per_node: int

    def __post_init__(self) -> None:
        for name in ("nodes", "gpus_per_node"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"--{name} {getattr(self, name)}: out of range. Fix: give one above 0"
                )

    @property
    def world_size(self) -> int:
        """Return the ranks of all machines."""
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True)
class Estimate:
    """One run on some devices, and what follows.

    Attributes:
        config: Resolved, and so are `batch` and `ds_config`.
        name: Of the ds_config, for people.
        cluster: It runs on.
        memory_use: The fastest for which the devices have room.
        parts: Bytes that a rank holds at its fullest moment, by what they are.
        seconds: Of one optimizer step, by what they go to.
        host_bytes: That a rank keeps in its machine's memory.
        sent_bytes: From one rank in one optimizer step.
    """

    config: TrainConfig
    batch: BatchArithmetic
    ds_config: dict[str, Any]
    name: str
    cluster: Cluster
    memory_use: MemoryUse
    parts: memory.Parts
    seconds: dict[str, float]
    host_bytes: float
    sent_bytes: float

    @property
    def all_parts(self) -> memory.Parts:
        """Return the parts, what the framework reserves, and on a CPU what is offloaded: there."""
        offloaded = 0 if self.cluster.device.on_gpu else self.host_bytes
        return self.parts | {"offloaded": offloaded, "reserved": memory.RESERVED_BYTES}

    @property
    def peak_bytes(self) -> float:
        """Return what a rank holds at its fullest moment."""
        return sum(self.all_parts.values())

    @property
    def spare_bytes(self) -> float:
        """Return what is left of a device's memory; below 0 the run does not fit."""
        return self.cluster.device.memory_bytes * (1 - FRAGMENTS) - self.peak_bytes

    @property
    def lacking_bytes(self) -> float:
        """Return what a device, or its share of the machine's memory, has too little; 0: fits."""
        return max(0.0, -self.spare_bytes, self.host_bytes - self.cluster.device.host_bytes)

    @property
    def fits(self) -> bool:
        """Return whether devices and their machines have memory enough."""
        return self.lacking_bytes == 0

    @property
    def step_s(self) -> float:
        """Return the seconds of one optimizer step."""
        return sum(self.seconds.values())

    @property
    def tokens_per_s(self) -> float:
        """Return the tokens that all ranks together train in a second."""
        return self.config.batch_tokens / self.step_s

    @property
    def mfu(self) -> float:
        """Return the share of the peak that goes into 6N + 12·L·C·T FLOPs per token (PaLM)."""
        flops = self.config.gpt_config.flops_per_token(self.config.seq_len)
        return self.tokens_per_s * flops / (self.cluster.world_size * self.cluster.device.flops)

    @property
    def days(self) -> float:
        """Return the days that all steps take."""
        return self.config.max_steps * self.step_s / DAY_S

    @property
    def device_hours(self) -> float:
        """Return the hours of all devices that all steps take."""
        return self.days * 24 * self.cluster.world_size

    @property
    def checkpoint_bytes(self) -> float:
        """Return what one checkpoint takes on disk."""
        return checkpoint_bytes(precision(self.ds_config), self.config.gpt_config.n_params())

    @property
    def save_s(self) -> float:
        """Return the seconds that a checkpoint takes: each machine writes its share."""
        return self.checkpoint_bytes / (STORAGE_BYTES_S * self.cluster.nodes)

    @property
    def checkpoint_every(self) -> int:
        """Return the steps between checkpoints with which saving and faults cost least (Young)."""
        fault_s = 3600 * DEVICE_HOURS_A_FAULT / self.cluster.world_size
        best = round(math.sqrt(2 * self.save_s * fault_s) / self.step_s)
        return min(max(1, best), self.config.max_steps)


def estimate(config: TrainConfig, raw: dict[str, Any], name: str, cluster: Cluster) -> Estimate:
    """Estimate a resolved run with an engine's JSON, called `name`, on a cluster.

    Raises:
        ValueError: The batch does not divide, or the ds_config cannot be; names flag or key.
    """
    batch = resolve_batch(config, cluster.world_size)
    config = dataclasses.replace(config, micro_batch_size=batch.micro_batch_size)
    ds_config = resolve_ds_config(raw, config, batch).ds_config
    device = cluster.device
    found = []
    for use in MEMORY_USES if device.on_gpu else MEMORY_USES[-1:]:
        shard = memory.shard_of(config, batch, ds_config, device.on_gpu, use)
        seconds = speed.step_seconds(shard, batch, config.seq_len, device, cluster.nodes)
        found.append(
            Estimate(config, batch, ds_config, name, cluster, use, memory.peak(shard), seconds,
                     memory.host_bytes(shard), speed.sent_bytes(shard, batch))
        )  # fmt: skip
    return next((e for e in found if e.spare_bytes >= MARGIN * device.memory_bytes), found[-1])


def largest_fitting(
    config: TrainConfig, raw: dict[str, Any], name: str, cluster: Cluster, limit: int | None = None
) -> Estimate:
    """Estimate with the largest micro-batch that fits, at most `limit`; of one sequence if none.

    Raises:
        ValueError: As `estimate`.
    """
    found = estimate(dataclasses.replace(config, micro_batch_size=1), raw, name, cluster)
    sizes = divisors(found.batch.batch_sequences // cluster.world_size)
    for size in (n for n in sizes[1:] if n <= (limit or n)):
        sized = dataclasses.replace(config, micro_batch_size=size)
        larger = estimate(sized, raw, name, cluster)
        if not larger.fits:
            break
        found = larger
    return found


def candidates(own: dict[str, Any] | None = None) -> dict[str, dict[str, Any]]:
    """Return ds_configs by name, each also with activation checkpointing: `own`, called "", first.

    The others are those of ds_configs/.
    """
    found = {} if own is None else _with_and_without("", own)
    for path in sorted(DS_CONFIGS.glob("*.json")):
        found |= _with_and_without(path.name, load_ds_config(path))
    return found


def _with_and_without(name: str, raw: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: raw, f'{name}{WITH}"{CHECKPOINTING}": {{}}': raw | {CHECKPOINTING: {}}}


def rank_candidates(config: TrainConfig, cluster: Cluster) -> list[Estimate]:
    """Estimate with every candidate, each at its best; what fits first, then the cheaper first.

    Of those that are hardly slower than the fastest stage 1 comes first, then the lowest. Offload
    comes behind: how fast a machine's processors update is the least certain.
    """
    limit = largest_micro_batch(config.seq_len, cluster.device.on_gpu)
    size = functools.partial(largest_fitting, limit=limit)
    plan = estimate if config.micro_batch_size else size
    found = [plan(config, raw, name, cluster) for name, raw in candidates().items()]
    first = [(e.lacking_bytes, offloads(e.ds_config, "optimizer"), e.step_s) for e in found]
    hardly_slower = min(first)[2] * (1 + HARDLY)

    def order(e: Estimate) -> tuple[float, ...]:
        place = PREFERRED.index(zero_stage(e.ds_config))
        return (e.lacking_bytes, offloads(e.ds_config, "optimizer"),
                place if e.step_s <= hardly_slower else math.inf, e.step_s)  # fmt: skip

    return sorted(found, key=order)
