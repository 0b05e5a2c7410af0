"""Plan a run on the devices that it has found; choose its micro-batch, or advise what fits."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

from checkpoint.run_folder import read_json
from launch.planning.estimate import (
    ADDED,
    MARGIN,
    Candidate,
    Cluster,
    Estimate,
    estimate,
    largest_fitting,
    shipped_candidates,
)
from training.config import divisors, largest_micro_batch
from training.devices import DEVICES, GIB, machine_bytes
from training.ds_config import without_derived

if TYPE_CHECKING:
    import torch

    from training.ranks import Ranks
    from training.run import Run


def device_bytes(device: torch.device, ranks: Ranks) -> int:
    """Return the memory of a GPU, or a rank's share of the machine's."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return machine_bytes() // ranks.local_world_size


def found_cluster(device: torch.device, ranks: Ranks, memory_bytes: int) -> Cluster:
    """Return the machines that a run has found: a device with such memory, and as many as ranks.

    Their speed is a guess; nothing here depends on it.
    """
    kind = "h100" if device.type == "cuda" else "cpu"
    host_bytes = machine_bytes() // ranks.local_world_size
    found = dataclasses.replace(DEVICES[kind], memory_bytes=memory_bytes, host_bytes=host_bytes)
    nodes, rest = divmod(ranks.world_size, ranks.local_world_size)
    if rest:  # machines of several sizes
        return Cluster(found, ranks.world_size, 1)
    return Cluster(found, nodes, ranks.local_world_size)


def plan_here(run: Run, device: torch.device) -> Estimate:
    """Estimate a run on the machines that it has found.

    Raises:
        BadInput: As `estimate`.
    """
    config = run.config
    memory_bytes = device_bytes(device, run.ranks)
    if not run.is_settled:
        size = choose_micro_batch(run, device, memory_bytes, resumes=False)
        config = dataclasses.replace(config, micro_batch_size=size)
    cluster = found_cluster(device, run.ranks, memory_bytes)
    return estimate(config, Candidate(without_derived(run.ds_config)), cluster)


@dataclass(frozen=True)
class Advice:
    """What a run lacks, and the nearest setting that fits."""

    need_bytes: float
    has_bytes: float
    where: str
    remedy: str

    @property
    def what(self) -> str:
        """Return what is wrong."""
        sizes = f"{self.need_bytes / GIB:.1f} GiB {self.where} {self.has_bytes / GIB:.1f}"
        return f"this run needs {sizes} (launch/plan.py)"

    def __str__(self) -> str:
        """Return the line that is printed."""
        return f"{self.what}. Fix: {self.remedy}"


def advice(planned: Estimate) -> Advice | None:
    """Return the nearest setting that fits if the planned run does not; else None.

    Near is, in this order: a smaller micro-batch, activation checkpointing, another ds_config.
    """
    if planned.fits:
        return None
    device, remedy = planned.cluster.device, _remedy(planned)
    if planned.spare_bytes < 0:
        return Advice(planned.peak_bytes, device.memory_bytes, "on each device of", remedy)
    where = "of the machine's memory for each device, which has"
    return Advice(planned.host_bytes, device.host_bytes, where, remedy)


def _remedy(planned: Estimate) -> str:
    config = dataclasses.replace(planned.config, compile="false")  # which stage 3 would refuse
    limit = config.micro_batch_size
    own = Candidate(without_derived(planned.share.ds_config))
    candidates = [own, dataclasses.replace(own, checkpointing=True), *shipped_candidates()]
    plans = (largest_fitting(config, each, planned.cluster, limit) for each in candidates)
    found = next((plan for plan in plans if plan.fits), None)
    if found is None:
        return "take more devices: no ds_config fits"
    candidate, size = found.candidate, found.batch.micro_batch_size
    flags = []
    if candidate.file:
        flags.append(f"--ds_config ds_configs/{candidate.file}")
    if size != limit:
        flags.append(f"--micro_batch_size {size}")
    if candidate.checkpointing:
        flags.append(f"add {ADDED} to {candidate.file or config.ds_config}")
    return ", ".join(flags)


def explain_out_of_memory(error: Exception, run: Run) -> Exception:
    """Return an error with what the plan says of a run, if this one says that memory ran out."""
    from training.rendezvous import choose_device

    of_gpu = type(error).__name__ == "OutOfMemoryError"
    if not of_gpu and "can't allocate memory" not in str(error):  # the words of PyTorch's CPU
        return error
    planned = plan_here(run, choose_device(run.ranks))
    return MemoryError(
        f"out of memory at --micro_batch_size {run.batch.micro_batch_size}: the plan says "
        f"{planned.peak_bytes / GIB:.1f} GiB of {planned.cluster.device.memory_bytes / GIB:.1f}. "
        "Fix: give a smaller one, or another ds_config (launch/plan.py)"
    )


def choose_micro_batch(run: Run, device: torch.device, memory_bytes: int, resumes: bool) -> int:
    """Return the sequences of a run's micro-batch.

    A resumed run keeps its saved size if that still divides. Otherwise GPUs take the largest size,
    up to 65,536 tokens, that fits on the one with the least memory with a margin.

    Args:
        run: As its command line says.
        device: Of any rank.
        memory_bytes: Of the smallest device.
        resumes: Whether the run goes on from a checkpoint.
    """
    config, batch = run.config, run.batch
    if resumes:
        saved = read_json(config.run_dir / "config.json").get("micro_batch_size")
        if saved in divisors(batch.batch_sequences // batch.world_size):
            return saved
    if device.type == "cpu":
        return batch.micro_batch_size
    cluster = found_cluster(device, run.ranks, round(memory_bytes * (1 - MARGIN)))
    limit = largest_micro_batch(config.seq_len, on_gpu=True)
    planned = largest_fitting(config, Candidate(without_derived(run.ds_config)), cluster, limit)
    return planned.batch.micro_batch_size


def settle_micro_batch(run: Run, device: torch.device, resumes: bool) -> None:
    """Take the micro-batch that rank 0 chooses, unless the command line gave one (all ranks).

    Args:
        run: Its micro-batch changes.
        device: Of this rank.
        resumes: Whether the run goes on from a checkpoint.
    """
    import torch.distributed as dist

    if run.is_settled:
        return
    sizes = [0] * run.ranks.world_size
    dist.all_gather_object(sizes, device_bytes(device, run.ranks))
    chosen = [choose_micro_batch(run, device, min(sizes), resumes)]
    dist.broadcast_object_list(chosen)
    run.take_micro_batch(chosen[0])
