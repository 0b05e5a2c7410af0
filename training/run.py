"""Check what a run reads and where it writes, before any process group exists."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checkpoint import run_folder
from checkpoint.manifest import checkpoint_bytes, find_checkpoints, read_manifest, step_of
from errors import BadInput
from model.presets import EVAL_TOKENS, PRESETS
from training.compiler import check_compile, check_nvme, check_offload
from training.config import (
    BatchArithmetic,
    TrainConfig,
    resolve_batch,
    resolve_train_config,
    to_json,
)
from training.credentials import refuse_credentials
from training.ds_config import (
    load_ds_config,
    offloads,
    precision,
    resolve_ds_config,
    without_derived,
)
from training.ds_keys import KEYS
from training.extension_locks import check_extension_locks
from training.ranks import Ranks

if TYPE_CHECKING:
    from checkpoint.weights import Weights
    from data.shards import TokenStream


@dataclass
class Run:
    """One resolved run on these ranks; of its values two may change.

    They are the micro-batch, which depends on devices, and `eval_tokens`, on the validation split.

    Attributes:
        config: Resolved, and so are `batch` and `ds_config`.
        remarks: Warnings about keys of the ds_config.
        unverified: Keys of the ds_config that nobody has verified.
        is_settled: Whether the micro-batch is final; else launch/planning/fitting.py chooses it.
        is_eval_given: Whether the command line gives `eval_tokens`; else a shorter split will do.
    """

    config: TrainConfig
    batch: BatchArithmetic
    ds_config: dict[str, Any]
    ranks: Ranks
    remarks: list[str] = field(default_factory=list)
    unverified: list[str] = field(default_factory=list)
    is_settled: bool = True
    is_eval_given: bool = True

    def take_micro_batch(self, micro_batch_size: int) -> None:
        """Split the batch into such micro-batches, for good."""
        self.is_settled = True
        self.config = replace(self.config, micro_batch_size=micro_batch_size)
        self.batch = resolve_batch(self.config, self.ranks.world_size)
        engine = without_derived(self.ds_config)
        self.ds_config = resolve_ds_config(engine, self.config, self.batch).ds_config


@dataclass(frozen=True)
class Inputs:
    """What a run reads: data, and the weights that it starts from, if they are not fresh."""

    train_stream: TokenStream
    val_stream: TokenStream
    init_weights: Weights | None
    checkpoints: list[Path]  # to go on from, the newest first; none for a new run
    order: dict[str, Any]  # what decides on which tokens a step is taken


def resolve_run(flags: dict[str, Any], ranks: Ranks) -> Run:
    """Return the run of a command line, with every value filled in; `parse_flags` gives `flags`.

    Raises:
        BadInput: A value is out of range, or contradicts another; names the flag or file.
    """
    config = resolve_train_config(**flags)
    is_settled = config.micro_batch_size > 0
    resumes = bool(find_checkpoints(config.run_dir, config.resume))
    batch = resolve_batch(config, ranks.world_size, resumes)
    config = replace(config, micro_batch_size=batch.micro_batch_size)
    found = resolve_ds_config(load_ds_config(config.ds_config), config, batch)
    remarks = found.remarks(f"--ds_config {config.ds_config}")
    return Run(
        config,
        batch,
        found.ds_config,
        ranks,
        remarks,
        found.unverified,
        is_settled=is_settled,
        is_eval_given="eval_tokens" in flags,
    )


def describe_run(run: Run) -> str:
    """Return the resolved run for people: model, batch, schedule, config.json, ds_config.json."""
    config, batch = run.config, run.batch
    gpt = config.gpt_config
    tokens = config.max_steps * config.batch_tokens
    min_lr = config.lr * config.min_lr_ratio
    is_whole = not run.is_eval_given and config.eval_tokens != EVAL_TOKENS
    lines = (
        f"model     {config.model}: {gpt.n_params():,} parameters, "
        f"{gpt.flops_per_token(config.seq_len):.4g} training FLOPs per token",
        f"batch     {config.batch_tokens:,} tokens = {batch.micro_batch_size} sequences x "
        f"{config.seq_len} tokens x {batch.grad_accum_steps} micro-batches x "
        f"{batch.world_size} ranks",
        f"schedule  {config.max_steps:,} steps = {tokens:,} tokens; lr {config.lr:g} after "
        f"{config.warmup_steps:,} steps, {min_lr:g} from step {config.decay_steps:,}",
        f"eval      {config.eval_tokens:,} validation tokens{', the whole split' * is_whole}",
        f"config.json     {json.dumps(to_json(config))}",
        f"ds_config.json  {json.dumps(run.ds_config)}",
    )
    if not run.is_settled:
        n = batch.micro_batch_size
        lines += (f"micro-batch     {n}, or more where the GPU holds it, or fewer",)
    return "\n".join(lines)


def open_inputs(run: Run) -> Inputs:
    """Open and check everything that the run reads, before any process group exists.

    Raises:
        BadInput: Whatever cannot be trained on or started from; names the file or flag.
    """
    from data.order import Order
    from data.shards import TokenStream, require_targets

    config, gpt = run.config, run.config.gpt_config
    refuse_credentials(to_json(config), "--")
    refuse_credentials(run.ds_config, f"{config.ds_config}: ")
    _check_gpu_keys(run)
    check_extension_locks(run.ranks)
    if config.compile == "true":
        check_compile()
    if offloads(run.ds_config, "optimizer"):
        check_offload()
    param = run.ds_config.get("zero_optimization", {}).get("offload_param") or {}
    if param.get("device") == "nvme" and run.ranks.local_rank == 0:
        check_nvme(param, f"--ds_config {config.ds_config}: zero_optimization.offload_param")
    if config.run_dir.exists() and not config.run_dir.is_dir():
        raise BadInput(f"--run_dir {config.run_dir}", "is a file", "give a folder")
    verify = config.verify and run.ranks.local_rank == 0  # once per machine
    train_stream = TokenStream(config.data_dir, "train", gpt.vocab_size, verify)
    val_stream = TokenStream(config.data_dir, "val", gpt.vocab_size, verify)
    for line in train_stream.copies() if run.ranks.is_main else []:
        print(f"warning: {line}", file=sys.stderr)
    Order(len(train_stream), config.seq_len)
    eval_tokens = require_targets(val_stream, config.eval_tokens, run.is_eval_given)
    run.config = config = replace(config, eval_tokens=eval_tokens)
    order = {name: getattr(config, name) for name in ("seed", "shuffle", "seq_len", "batch_tokens")}
    order |= {"data": train_stream.fingerprint(), "shards": train_stream.digests()}
    checkpoints = find_checkpoints(config.run_dir, config.resume)
    _check_same_run(run, checkpoints, order)
    changed = _changed_settings(run) if checkpoints else ""
    if changed and run.ranks.is_main:
        print(f"settings changed since the last start: {changed}", file=sys.stderr)
    init_weights = None
    if config.init_from and not checkpoints:
        init_weights = _open_init_weights(config)
    return Inputs(train_stream, val_stream, init_weights, checkpoints, order)


def _open_init_weights(config: TrainConfig) -> Weights:
    from checkpoint.reader import open_weights

    weights = open_weights(config.init_from)
    found = replace(weights.config, dropout=config.dropout)
    if found != config.gpt_config:
        what = f"is {found}, but --model {config.model} is {config.gpt_config}"
        names = [f"--model {name}" for name in PRESETS if PRESETS[name].config == weights.config]
        remedy = "give " + (names[0] if names else "weights of a preset's shape")
        raise BadInput(f"--init_from {config.init_from}", what, remedy)
    return weights


def _check_gpu_keys(run: Run) -> None:
    """Refuse keys of the ds_config that need a GPU where there is none."""
    needy = [key for key in run.unverified if KEYS[key].why]
    if needy:
        import torch

        if not torch.cuda.is_available() or os.environ.get("DS_ACCELERATOR") == "cpu":
            where = f"--ds_config {run.config.ds_config}: {needy[0]}"
            raise BadInput(where, KEYS[needy[0]].why, "remove it")


def _check_same_run(run: Run, checkpoints: list[Path], order: dict[str, Any]) -> None:
    gpt, max_steps = run.config.gpt_config, run.config.max_steps
    if not checkpoints:
        return
    from checkpoint.resuming import check_same_run  # it imports torch, for seconds

    for folder in checkpoints:
        try:
            manifest = read_manifest(folder)
        except ValueError:
            continue  # `newest_intact` names the damaged ones: it reads every byte
        if manifest.step != step_of(folder):
            what = f"is a copy of step {manifest.step}"
            raise BadInput(str(folder), what, "move it out of the folder")
        check_same_run(manifest, precision=precision(run.ds_config), model=gpt, order=order)
        if manifest.step > max_steps:
            what = f"{folder} is beyond it"
            raise BadInput(f"--max_steps {max_steps}", what, f"give at least {manifest.step}")
        return  # the newest one that can be read is enough


def _changed_settings(run: Run) -> str:
    """Return which flags differ from those of the run's last start, as `key: saved -> given`."""
    saved = run_folder.read_json(run.config.run_dir / "config.json")
    ignored = ["run_dir", "resume", "init_from", "verify", "debug", "dry_run"]  # of one start
    ignored += ["micro_batch_size"] * (not run.is_settled)
    given = {k: v for k, v in to_json(run.config).items() if k not in ignored}
    return ", ".join(f"{k}: {saved[k]} -> {v}" for k, v in given.items() if saved.get(k, v) != v)


def take_run_dir(run: Run, inputs: Inputs) -> contextlib.AbstractContextManager[Any]:
    """Lock the run folder until the returned context ends, and record that it runs (rank 0).

    A dry run only checks it.

    Raises:
        BadInput: Another run has it, it should be empty and is not, or restarts come no further.
        OSError: It cannot be written, or the disk space is not enough for a checkpoint.
    """
    run_dir, gpt = run.config.run_dir, run.config.gpt_config
    if run.config.resume == "none":
        run_folder.check_empty(run_dir, "--resume none")
    if not inputs.checkpoints:
        run_folder.check_not_lost(run_dir)
    step = step_of(inputs.checkpoints[0]) if inputs.checkpoints else 0
    needed_bytes = checkpoint_bytes(precision(run.ds_config), gpt.n_params())
    starts = run_folder.check_run_dir(run_dir, needed_bytes, step)
    if run.config.dry_run:
        return contextlib.nullcontext()
    return run_folder.lock_run_dir(run_dir, starts)
