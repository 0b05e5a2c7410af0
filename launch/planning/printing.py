"""Print an estimate: for people in lines or as a row of a table, for programs as JSON values."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from launch.planning.estimate import (
    DEVICE_HOURS_A_FAULT,
    FRAGMENTATION,
    SPEED_TIE,
    Estimate,
    largest_fitting,
)
from model import PRESETS
from training.devices import GIB

# Such keys of zero_optimization change memory or traffic, which the plan does not count.
NOT_COUNTED = ("zero_hpz_partition_size", "mics_shard_size", "zero_quantized_")


def format_estimate(chosen: Estimate, others: list[Estimate], price: float | None) -> str:
    """Return an estimate in lines, and why it was chosen before the others.

    Args:
        chosen: The estimate.
        others: With other ds_configs; none if it was given.
        price: Of a device for an hour.
    """
    config, batch, cluster = chosen.config, chosen.batch, chosen.cluster
    step_s, hours = chosen.step_s, chosen.device_hours
    cost = f", {price * hours:,.0f} at {price:g} an hour" if price else ""
    lines = {
        config.model: f"{config.gpt_config.n_params():,} parameters on "
        f"{cluster.nodes} x {cluster.gpus_per_node} {cluster.device.kind}, {chosen.candidate}: "
        f"{_whether_fits(chosen)}",
        "memory": f"{_gib(chosen.peak_bytes)} a device: {_shares(chosen.parts_bytes, _gib)}; "
        f"{_gib(FRAGMENTATION * cluster.device.memory_bytes)} are kept for fragments",
        "batch": f"{config.batch_tokens:,} tokens = {batch.micro_batch_size} sequences x "
        f"{config.seq_len} tokens x {batch.grad_accum_steps} micro-batches x {batch.world_size} "
        f"ranks{_largest(chosen)}",
        "step": f"{_short(step_s)} s: {_shares(chosen.seconds, lambda s: f'{s / step_s:.0%}')}",
        "speed": f"{chosen.tokens_per_s:,.0f} tokens/s, "
        f"{chosen.tokens_per_s / batch.world_size:,.0f} a device, MFU {chosen.mfu:.0%}",
        "run": f"{config.max_steps:,} steps: {_short(chosen.days)} days, {hours:,.0f} device-hours"
        f"{cost}",
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
    zero = chosen.share.ds_config.get("zero_optimization", {})
    keys = [key for key, value in zero.items() if value and key.startswith(NOT_COUNTED)]
    left_out = ", ".join(["evaluation", "saving", "faults", *keys])
    lines["without"] = f"{left_out} and waiting for data"
    return "\n".join(f"{name:<11} {text}" for name, text in lines.items())


def _whether_fits(chosen: Estimate) -> str:
    device = chosen.cluster.device
    spare = f"{_gib(abs(chosen.spare_bytes))} of {_gib(device.memory_bytes)}"
    if chosen.fits:
        return f"fits, {spare} spare"
    if chosen.spare_bytes < 0:
        return f"does not fit by {spare}"
    lacking = f"{_gib(chosen.lacking_bytes)} of the {_gib(device.host_bytes)}"
    return f"does not fit by {lacking} that a machine has for each device"


def _largest(chosen: Estimate) -> str:
    if not chosen.fits:
        return ""
    batch = largest_fitting(chosen.config, chosen.candidate, chosen.cluster).batch
    is_all = batch.grad_accum_steps == 1
    largest = batch.micro_batch_size
    return f"; up to {largest} sequences fit{', all that a rank has' if is_all else ''}"


def _reason(chosen: Estimate, others: list[Estimate]) -> str:
    if not chosen.fits:
        return "none of ds_configs/ fits, with or without activation checkpointing"
    fitting = 1 + sum(e.fits for e in others)
    reason = (
        f"{fitting} of {len(others) + 1} tried fit; of those within {SPEED_TIE:.0%} of the fastest "
        "zero1, else the lowest stage"
    )
    faster = [e for e in others if e.step_s < chosen.step_s and not e.fits]
    missing = [f"{e.candidate} lacks {_gib(e.lacking_bytes)}" for e in faster]
    return "; ".join([reason, *missing[:2]])


def _flags(chosen: Estimate) -> str:
    config, preset, candidate = chosen.config, chosen.config.preset, chosen.candidate
    flags: dict[str, Any] = {"model": config.model, "ds_config": f"ds_configs/{candidate.file}"}
    remark = ""
    if candidate.checkpointing:
        flags["ds_config"] = f"my_{candidate.file}"
        remark = f"; my_{candidate.file} is ds_configs/{candidate}"
    flags["micro_batch_size"] = chosen.batch.micro_batch_size
    usual = {
        "batch_tokens": preset.batch_tokens,
        "seq_len": preset.config.block_size,
        "max_steps": preset.max_tokens // config.batch_tokens,
    }
    own = {name: getattr(config, name) for name in usual}
    flags |= {name: value for name, value in own.items() if value != usual[name]}
    return " ".join(f"--{name} {value}" for name, value in flags.items()) + remark


def _short(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _gib(n_bytes: float) -> str:
    return f"{_short(n_bytes / GIB)} GiB"


def _shares(parts: dict[str, float], show: Callable[[float], str]) -> str:
    return " | ".join(f"{name} {show(value)}" for name, value in parts.items() if value)


def format_estimates(estimates: list[Estimate], price: float | None) -> str:
    """Return a Markdown table with a row for each estimate."""
    rows = [_row(e, price) for e in estimates]
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _row(best: Estimate, price: float | None) -> dict[str, str]:
    checkpointing = " + checkpointing" if best.candidate.checkpointing else ""
    row = {
        "model": best.config.model,
        "devices": f"{best.cluster.world_size:,}",
        "batch, tokens": f"{best.config.batch_tokens:,}",
        "ds_config": f"{best.candidate.file}{checkpointing}",
        "micro-batch": str(best.batch.micro_batch_size),
        "GiB a device": f"{best.peak_bytes / GIB:.1f}",
        "tokens/s": f"{best.tokens_per_s:,.0f}",
        "MFU": f"{best.mfu:.0%}",
        "days": _short(best.days),
        "device-hours": f"{best.device_hours:,.0f}",
    }
    if price:
        row["cost"] = f"{price * best.device_hours:,.0f}"
    if not best.fits:
        shown = ("model", "devices", "batch, tokens", "GiB a device")
        row |= {name: "" for name in row if name not in shown}
        row["ds_config"] = f"none fits: lacks {_gib(best.lacking_bytes)}"
    return row


def estimate_to_json(chosen: Estimate, price: float | None) -> dict[str, Any]:
    """Return an estimate as JSON values, in bytes and seconds."""
    figures = [name for name, value in vars(Estimate).items() if isinstance(value, property)]
    return {
        "model": chosen.config.model,
        "n_params": chosen.config.gpt_config.n_params(),
        "device": chosen.cluster.device.kind,
        "nodes": chosen.cluster.nodes,
        "devices": chosen.cluster.world_size,
        "ds_config": str(chosen.candidate),
        "batch": dataclasses.asdict(chosen.batch),
        "max_steps": chosen.config.max_steps,
        "cost": price * chosen.device_hours if price else None,
    } | {name: getattr(chosen, name) for name in figures}
