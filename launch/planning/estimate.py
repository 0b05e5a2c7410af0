"""Estimate what a run takes on some machines, and which ds_config serves it best."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoint.manifest import checkpoint_bytes
from errors import BadInput
from launch.planning import speed
from model.config import MEMORY_USES
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
CHECKPOINTING = "activation_checkpointing"
ADDED = f'"{CHECKPOINTING}": {{}}'  # to a ds_config, as a user writes it
FRAGMENTATION = 0.04  # of the memory: what the allocator cannot use
MARGIN = 0.1  # of the memory, for speed that costs memory only: a run must not fail for its sake
SPEED_TIE = 0.05  # slower counts as equal: estimates are no finer
STAGE_PREFERENCE = (1, 0, 2, 3)  # of equals: train.py's default, then the simpler
DAY_S = 86_400
STORAGE_BYTES_S = 2e9  # from each machine to the shared storage: an assumption
DEVICE_HOURS_A_FAULT = 45_000  # Llama 3 (2024), section 3.3.4: 466 in 54 days of 16,384 H100


@dataclass(frozen=True)
class Cluster:
    """Machines, each with the same devices; one rank on each device.

    Raises:
        BadInput: Less than one of either.
    """

    device: Device
    nodes: int
    gpus_per_node: int

    def __post_init__(self) -> None:
        for name in ("nodes", "gpus_per_node"):
            value = getattr(self, name)
            if value < 1:
                raise BadInput(f"--{name} {value}", "out of range", "give one above 0")

    @property
    def world_size(self) -> int:
        """Return the ranks of all machines."""
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True)
class Candidate:
    """A ds_config to plan with.

    Attributes:
        raw: The JSON of its file.
        file: The name of that, for people; "": the run's own.
        checkpointing: Whether activation checkpointing is added to it.
    """

    raw: dict[str, Any]
    file: str = ""
    checkpointing: bool = False

    def __str__(self) -> str:
        """Return what a user has to write."""
        return f"{self.file} with {ADDED}" if self.checkpointing else self.file

    @property
    def ds_config(self) -> dict[str, Any]:
        """Return the JSON, with what is added to it."""
        return self.raw | {CHECKPOINTING: {}} if self.checkpointing else self.raw


def shipped_candidates() -> list[Candidate]:
    """Return the files of ds_configs/, each without and with activation checkpointing."""
    found = []
    for path in sorted(DS_CONFIGS.glob("*.json")):
        plain = Candidate(load_ds_config(path), path.name)
        found += [plain, dataclasses.replace(plain, checkpointing=True)]
    return found


@dataclass(frozen=True)
class Estimate:
    """One run on some devices, and what follows: every property is a figure.

    Attributes:
        config: Resolved, and so is `batch`.
        candidate: The ds_config.
        cluster: The cluster that it runs on.
        share: What one rank trains; with the resolved ds_config, and the fastest memory use for
            which the devices have space.
    """

    config: TrainConfig
    batch: BatchArithmetic
    candidate: Candidate
    cluster: Cluster
    share: memory.RankShare

    @property
    def seconds(self) -> dict[str, float]:
        """Return the seconds of one optimizer step, by what they go to."""
        device, nodes = self.cluster.device, self.cluster.nodes
        return speed.step_seconds(self.share, self.batch, self.config.seq_len, device, nodes)

    @property
    def sent_bytes(self) -> float:
        """Return what one rank sends in one optimizer step."""
        return speed.sent_bytes(self.share, self.batch)

    @property
    def host_bytes(self) -> float:
        """Return what a rank keeps in its machine's memory."""
        return memory.host_bytes(self.share)

    @property
    def parts_bytes(self) -> memory.Parts:
        """Return what a rank holds at its fullest moment; on a CPU also what is offloaded."""
        offloaded = 0 if self.cluster.device.on_gpu else self.host_bytes
        more = {"offloaded": offloaded, "reserved": memory.RESERVED_BYTES}
        return memory.peak(self.share) | more

    @property
    def peak_bytes(self) -> float:
        """Return what a rank holds at its fullest moment."""
        return sum(self.parts_bytes.values())

    @property
    def spare_bytes(self) -> float:
        """Return what is left of a device's memory; below 0 the run does not fit."""
        return self.cluster.device.memory_bytes * (1 - FRAGMENTATION) - self.peak_bytes

    @property
    def lacking_bytes(self) -> float:
        """Return the bytes short of fitting, on a device or in its machine's memory; 0: it fits."""
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
        return checkpoint_bytes(precision(self.share.ds_config), self.config.gpt_config.n_params())

    @property
    def save_s(self) -> float:
        """Return the seconds that a checkpoint takes: each machine writes its share."""
        return self.checkpoint_bytes / (STORAGE_BYTES_S * self.cluster.nodes)

    @property
    def checkpoint_every(self) -> int:
        """Return the steps between checkpoints that lose the least time (Young 1974)."""
        fault_s = 3600 * DEVICE_HOURS_A_FAULT / self.cluster.world_size
        best = round(math.sqrt(2 * self.save_s * fault_s) / self.step_s)
        return min(max(1, best), self.config.max_steps)


def estimate(config: TrainConfig, candidate: Candidate, cluster: Cluster) -> Estimate:
    """Estimate a resolved run with a ds_config on a cluster.

    Raises:
        BadInput: The batch does not divide, or the ds_config cannot be; names flag or key.
    """
    batch = resolve_batch(config, cluster.world_size)
    config = dataclasses.replace(config, micro_batch_size=batch.micro_batch_size)
    ds_config = resolve_ds_config(candidate.ds_config, config, batch).ds_config
    device = cluster.device
    found = []
    for use in MEMORY_USES if device.on_gpu else MEMORY_USES[-1:]:  # the fastest first
        share = memory.RankShare(config, batch, ds_config, device.on_gpu, use)
        found.append(Estimate(config, batch, candidate, cluster, share))
    with_margin = [e for e in found if e.spare_bytes >= MARGIN * device.memory_bytes]
    return with_margin[0] if with_margin else found[-1]


def largest_fitting(
    config: TrainConfig, candidate: Candidate, cluster: Cluster, limit: int | None = None
) -> Estimate:
    """Estimate with the largest micro-batch that fits, at most `limit`; of one sequence if none.

    Raises:
        BadInput: As `estimate`.
    """
    found = estimate(dataclasses.replace(config, micro_batch_size=1), candidate, cluster)
    for size in divisors(found.batch.batch_sequences // cluster.world_size)[1:]:
        if limit and size > limit:
            break
        sized = dataclasses.replace(config, micro_batch_size=size)
        larger = estimate(sized, candidate, cluster)
        if not larger.fits:
            break
        found = larger
    return found


def rank_candidates(
    config: TrainConfig, candidates: list[Candidate], cluster: Cluster
) -> list[Estimate]:
    """Estimate with every candidate; what fits first, then the cheaper first.

    The micro-batch is that of `config`; where it has none, the largest that fits.
    Of those that are hardly slower than the fastest stage 1 comes first, then the lowest. Offload
    comes behind: how fast a machine's processors update is the least certain.
    """
    if config.micro_batch_size:
        found = [estimate(config, candidate, cluster) for candidate in candidates]
    else:
        limit = largest_micro_batch(config.seq_len, cluster.device.on_gpu)
        found = [largest_fitting(config, candidate, cluster, limit) for candidate in candidates]

    def cost(e: Estimate) -> tuple[float, bool, float]:
        return e.lacking_bytes, offloads(e.share.ds_config, "optimizer"), e.step_s

    tie_s = min(map(cost, found))[2] * (1 + SPEED_TIE)

    def order(e: Estimate) -> tuple[float, ...]:
        lacking_bytes, is_offloaded, step_s = cost(e)
        place = (
            STAGE_PREFERENCE.index(zero_stage(e.share.ds_config)) if step_s <= tie_s else math.inf
        )
        return lacking_bytes, is_offloaded, place, step_s

    return sorted(found, key=order)
