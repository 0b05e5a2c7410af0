"""What a run takes on some machines: memory, time, bytes; and which ds_config serves it best."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch import memory, throughput
from launch.config import MAX_DERIVED_MICRO_BATCH, BatchArithmetic, TrainConfig, resolve_batch
from launch.devices import DEVICES, GIB, Device
from launch.ds_config import load_ds_config, precision, resolve_ds_config, uses_offload

if TYPE_CHECKING:
    import torch

    from launch.ranks import Ranks

DS_CONFIGS = Path(__file__).resolve().parents[1] / "ds_configs"
CHECKPOINTING = "activation_checkpointing"
FRAGMENTS = 0.04  # of the memory: what the allocator cannot use
DAY_S = 86_400


@dataclass(frozen=True)
class Estimate:
    """One run on some devices, and what follows.

    Attributes:
        config: Resolved, and so are `batch` and `ds_config`.
        name: Of the ds_config, for people.
        device: Of each rank.
        parts: Bytes that a rank holds at its fullest moment, by what they are.
        seconds: Of one optimizer step, by what they go to.
        host_bytes: That a rank keeps in its machine's memory.
        sent_bytes: From one rank in one optimizer step.
    """

    config: TrainConfig
    batch: BatchArithmetic
    ds_config: dict[str, Any]
    name: str
    device: Device
    parts: memory.Parts
    seconds: dict[str, float]
    host_bytes: float
    sent_bytes: float

    @property
    def peak_bytes(self) -> float:
        """Return what a rank holds at its fullest moment, and what the framework reserves."""
        return sum(self.parts.values()) + memory.RESERVED_BYTES

    @property
    def spare_bytes(self) -> float:
        """Return what is left of a device's memory; below 0 the run does not fit."""
        return self.device.memory_bytes * (1 - FRAGMENTS) - self.peak_bytes

    @property
    def lacking_bytes(self) -> float:
        """Return what a device, or its share of the machine's memory, has too little; 0: fits."""
        return max(0.0, -self.spare_bytes, self.host_bytes - self.device.host_bytes)

    @property
    def fits(self) -> bool:
        """Return whether devices and their machines have memory enough."""
        return self.lacking_bytes == 0

    @property
    def tokens_per_s(self) -> float:
        """Return the tokens that all ranks together train in a second."""
        return self.config.batch_tokens / sum(self.seconds.values())

    @property
    def mfu(self) -> float:
        """Return the share of the peak that goes into 6N + 12·L·C·T FLOPs per token (PaLM)."""
        flops = self.config.gpt_config.flops_per_token(self.config.seq_len)
        return self.tokens_per_s * flops / (self.batch.world_size * self.device.flops)

    @property
    def days(self) -> float:
        """Return the days that all steps take."""
        return self.config.max_steps * sum(self.seconds.values()) / DAY_S

    @property
    def checkpoint_bytes(self) -> float:
        """Return what one checkpoint takes on disk."""
        kind = precision(self.ds_config)
        return memory.CHECKPOINT_BYTES[kind] * self.config.gpt_config.n_params()


@dataclass(frozen=True)
class Cluster:
    """Machines, each with the same devices; one rank on each device."""

    device: Device
    nodes: int
    gpus_per_node: int

    @property
    def world_size(self) -> int:
        """Return the ranks of all machines."""
        return self.nodes * self.gpus_per_node


def estimate(config: TrainConfig, raw: dict[str, Any], name: str, cluster: Cluster) -> Estimate:
    """Estimate a resolved run with an engine's JSON, called `name`, on a cluster.

    Raises:
        ValueError: The batch does not divide, or the ds_config cannot be; names flag or key.
    """
    batch = resolve_batch(config, cluster.world_size)
    config = dataclasses.replace(config, micro_batch_size=batch.micro_batch_size)
    ds_config = resolve_ds_config(raw, config, batch)
    device = cluster.device
    shard = memory.shard_of(config, batch, ds_config, device.on_gpu)
    seconds = throughput.step_seconds(shard, batch, config.seq_len, device, cluster.nodes)
    return Estimate(config, batch, ds_config, name, device, memory.peak(shard), seconds,
                memory.host_bytes(shard), throughput.sent_bytes(shard, batch))  # fmt: skip


def largest_fitting(
    config: TrainConfig, raw: dict[str, Any], name: str, cluster: Cluster, limit: int | None = None
) -> Estimate:
    """Estimate with the largest micro-batch that fits, at most `limit`; of one sequence if none.

    Raises:
        ValueError: As `estimate`.
    """
    found = estimate(dataclasses.replace(config, micro_batch_size=1), raw, name, cluster)
    sequences = config.batch_tokens // config.seq_len // cluster.world_size
    sizes = [n for n in range(1, min(limit or sequences, sequences) + 1) if sequences % n == 0]
    for size in sizes[1:]:
        sized = dataclasses.replace(config, micro_batch_size=size)
        larger = estimate(sized, raw, name, cluster)
        if not larger.fits:
            break
        found = larger
    return found


def candidates() -> dict[str, dict[str, Any]]:
    """Return the shipped ds_configs by name, each also with activation checkpointing."""
    found = {}
    for path in sorted(DS_CONFIGS.glob("*.json")):
        raw = load_ds_config(path)
        found[path.name] = raw
        found[f'{path.name} with "{CHECKPOINTING}": {{}}'] = raw | {CHECKPOINTING: {}}
    return found


def rank_candidates(config: TrainConfig, cluster: Cluster) -> list[Estimate]:
    """Estimate with every candidate, each at its best; what fits first, then the cheaper first.

    Offload comes behind: how fast a machine's processors update is the least certain.
    """
    limit = config.micro_batch_size or MAX_DERIVED_MICRO_BATCH
    fixed = config.micro_batch_size is not None
    found = [
        estimate(config, raw, name, cluster)
        if fixed
        else largest_fitting(config, raw, name, cluster, limit)
        for name, raw in candidates().items()
    ]
    return sorted(
        found,
        key=lambda e: (e.lacking_bytes, uses_offload(e.ds_config), sum(e.seconds.values())),
    )


def found_cluster(device: torch.device, ranks: Ranks) -> Cluster:
    """Return the machines that a run has found: rank 0's device, and as many of it as ranks."""
    import torch

    if device.type == "cuda":
        kind, memory_bytes = "h100", torch.cuda.get_device_properties(device).total_memory
    else:
        kind, pages = "cpu", os.sysconf("SC_PHYS_PAGES")
        memory_bytes = pages * os.sysconf("SC_PAGE_SIZE") // ranks.local_world_size
    found = dataclasses.replace(DEVICES[kind], memory_bytes=memory_bytes)  # only this counts here
    return Cluster(found, ranks.world_size // ranks.local_world_size, ranks.local_world_size)


def advice(config: TrainConfig, ds_config: dict[str, Any], cluster: Cluster) -> str | None:
    """Return a line with the nearest setting that fits if the run, resolved, does not; else None.

    Near is, in this order: a smaller micro-batch, activation checkpointing, another ds_config.
    """
    config = dataclasses.replace(config, compile=False)  # which stage 3 would refuse
    planned = estimate(config, ds_config, str(config.ds_config), cluster)
    if planned.fits:
        return None
    limit = config.micro_batch_size
    near = {"": ds_config, CHECKPOINTING: ds_config | {CHECKPOINTING: {}}} | candidates()
    fitting = (
        (name, found)
        for name, raw in near.items()
        if (found := largest_fitting(config, raw, name, cluster, limit)).fits
    )
    name, found = next(fitting, ("nothing", None))
    if found is None:
        remedy = "more devices: no ds_config fits"
    elif name == CHECKPOINTING:
        remedy = f'add "{CHECKPOINTING}": {{}} to {config.ds_config}'
    else:
        remedy = f"--ds_config ds_configs/{name}" if name else ""
    if found and found.batch.micro_batch_size != limit:
        remedy += f" --micro_batch_size {found.batch.micro_batch_size}"
    return (
        f"warning: this run needs {planned.peak_bytes / GIB:.1f} GiB on each device of "
        f"{cluster.device.memory_bytes / GIB:.1f} (launch/plan.py). Fix: {remedy.strip()}"
    )
