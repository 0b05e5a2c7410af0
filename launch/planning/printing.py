"""What an estimate says: to people in lines, or as a row of a table; to programs as JSON values."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launch.planning.estimate import (
    CHECKPOINTING,
    DEVICE_HOURS_A_FAULT,
    FRAGMENTS,
    HARDLY,
    WITH,
    Estimate,
    largest_fitting,
)
from model import PRESETS
from training.devices import GIB

# Keys of zero_optimization that change memory or traffic, which the plan does not count.
NOT_COUNTED = ("zero_hpz_partition_size", "mics_shard_size", "zero_quantized_weights",
               "zero_quantized_gradients")  # fmt: skip
FIGURES = ("fits", "spare_bytes", "lacking_bytes", "peak_bytes", "host_bytes", "checkpoint_bytes",
           "checkpoint_every", "save_s", "sent_bytes", "seconds", "step_s", "tokens_per_s", "mfu",
           "days", "device_hours")  # fmt: skip
COLUMNS = ["model", "devices", "batch, tokens", "ds_config", "micro-batch", "GiB a device",
           "tokens/s", "MFU", "days", "device-hours"]  # fmt: skip


def describe(chosen: Estimate, others: list[Estimate], price: float | None) -> str:
    """Return an estimate in lines, and why it was chosen before the others.

    Args:
        chosen: The estimate.
        others: With other ds_configs; none if it was given.
        price: Of a device for an hour.
    """
    config, batch, cluster = chosen.config, chosen.batch, chosen.cluster
    step_s, hours = chosen.step_s, chosen.device_hours
    lines = {
        config.model: f"{config.gpt_config.n_params():,} parameters on {cluster.nodes} x "
        f"{cluster.gpus_per_node} {cluster.device.kind}, {chosen.name}: {_verdict(chosen)}",
        "memory": f"{_gib(chosen.peak_bytes)} a device: {_shares(chosen.all_parts, _gib)}; "
        f"{_gib(FRAGMENTS * cluster.device.memory_bytes)} are kept for fragments",
        "batch": f"{config.batch_tokens:,} tokens = {batch.micro_batch_size} sequences x "
        f"{config.seq_len} tokens x {batch.grad_accum_steps} micro-batches x {batch.world_size} "
        f"ranks{_largest(chosen)}",
        "step": f"{_short(step_s)} s: {_shares(chosen.seconds, lambda s: f'{s / step_s:.0%}')}",
        "speed": f"{chosen.tokens_per_s:,.0f} tokens/s, "
        f"{chosen.tokens_per_s / batch.world_size:,.0f} a device, MFU {chosen.mfu:.0%}",
        "run": f"{config.max_steps:,} steps: {_short(chosen.days)} days, {hours:,.0f} device-hours"
        + (f", {price * hours:,.0f} at {price:g} an hour" if price else ""),
        "sent": f"{_gib(chosen.sent_bytes)} from each rank in a step",
        "checkpoint": f"{_gib(chosen.checkpoint_bytes)} on disk each, {chosen.save_s:,.1f} s; "
        f"--checkpoint_every {chosen.checkpoint_every} costs least with a fault in "
        f"{DEVICE_HOURS_A_FAULT:,} device-hours",
    }
    if chosen.host_bytes:
        lines["host"] = f"{_gib(chosen.host_bytes)} of a machine's memory for each rank"
    if others:
        lines["why"] = _reason(chosen, others)
    if others and chosen.fits and PRESETS.get(config.model) == config.preset:  # train.py takes it
        lines["flags"] = _flags(chosen)
    zero = chosen.ds_config.get("zero_optimization", {})
    left_out = ["evaluation", "saving", "faults", *(key for key in NOT_COUNTED if zero.get(key))]
    lines["without"] = f"{', '.join(left_out)} and waiting for data"
    return "\n".join(f"{name:<11} {text}" for name, text in lines.items())


def _verdict(chosen: Estimate) -> str:
    device = chosen.cluster.device
    if chosen.spare_bytes >= 0 and not chosen.fits:
        has = f"{_gib(chosen.lacking_bytes)} of the {_gib(device.host_bytes)} that a machine has"
        return f"does not fit by {has} for each device"
    spare = f"{_gib(abs(chosen.spare_bytes))} of {_gib(device.memory_bytes)}"
    return f"fits, {spare} spare" if chosen.fits else f"does not fit by {spare}"


def _largest(chosen: Estimate) -> str:
    if not chosen.fits:
        return ""
    config, batch = chosen.config, chosen.batch
    largest = largest_fitting(config, chosen.ds_config, "", chosen.cluster).batch.micro_batch_size
    whole = largest == batch.batch_sequences // batch.world_size
    return f"; up to {largest} sequences fit{', all that a rank has' if whole else ''}"


def _reason(chosen: Estimate, others: list[Estimate]) -> str:
    if not chosen.fits:
        return "none of ds_configs/ fits, with or without activation checkpointing"
    fitting = 1 + sum(e.fits for e in others)
    reason = (
        f"{fitting} of {len(others) + 1} tried fit; of those within {HARDLY:.0%} of the fastest "
        "zero1, else the lowest stage"
    )
    faster = [e for e in others if e.step_s < chosen.step_s and not e.fits]
    missing = [f"{e.name} lacks {_gib(e.lacking_bytes)}" for e in faster]
    return "; ".join([reason, *missing[:2]])


def _flags(chosen: Estimate) -> str:
    config, preset = chosen.config, chosen.config.preset
    file, _, checkpointing = chosen.name.partition(WITH)
    shipped = Path("ds_configs", file)
    flags = {"model": config.model, "ds_config": f"my_{file}" if checkpointing else shipped}
    flags["micro_batch_size"] = chosen.batch.micro_batch_size
    usual = {"batch_tokens": preset.batch_tokens, "seq_len": preset.config.block_size,
             "max_steps": preset.max_tokens // config.batch_tokens}  # fmt: skip
    flags |= {k: getattr(config, k) for k, v in usual.items() if getattr(config, k) != v}
    words = " ".join(f"--{name} {value}" for name, value in flags.items())
    copy = f"; my_{file} is {shipped}{WITH}{checkpointing}" if checkpointing else ""
    return words + copy


def _short(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _gib(n_bytes: float) -> str:
    return f"{_short(n_bytes / GIB)} GiB"


def _shares(parts: dict[str, float], show: Callable[[float], str]) -> str:
    return " | ".join(f"{name} {show(value)}" for name, value in parts.items() if value)


def table(rows: list[Estimate], price: float | None) -> str:
    """Return a Markdown table of estimates."""
    columns = [*COLUMNS, "cost"] if price else COLUMNS
    lines = [columns, ["---"] * len(columns), *(_row(row, price) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _row(best: Estimate, price: float | None) -> list[str]:
    row = [best.config.model, f"{best.cluster.world_size:,}", f"{best.config.batch_tokens:,}"]
    held = f"{best.peak_bytes / GIB:.1f}"
    if not best.fits:
        lacks = f"none fits: lacks {_gib(best.lacking_bytes)}"
        return [*row, lacks, "", held, *[""] * (5 if price else 4)]
    what = best.name.replace(f'{WITH}"{CHECKPOINTING}": {{}}', " + checkpointing")
    row += [what, str(best.batch.micro_batch_size), held, f"{best.tokens_per_s:,.0f}"]
    row += [f"{best.mfu:.0%}", _short(best.days), f"{best.device_hours:,.0f}"]
    return [*row, f"{price * best.device_hours:,.0f}"] if price else row


def to_json(chosen: Estimate, price: float | None) -> dict[str, Any]:
    """Return an estimate as JSON values, in bytes and seconds."""
    cluster = chosen.cluster
    return {
        "model": chosen.config.model,
        "n_params": chosen.config.gpt_config.n_params(),
        "device": cluster.device.kind,
        "nodes": cluster.nodes,
        "devices": cluster.world_size,
        "ds_config": chosen.name,
        "parts_bytes": chosen.all_parts,
        "batch": dataclasses.asdict(chosen.batch),
        "max_steps": chosen.config.max_steps,
        "cost": price * chosen.device_hours if price else None,
    } | {name: getattr(chosen, name) for name in FIGURES}
