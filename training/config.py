"""Define TrainConfig, what the engine's JSON does not own of a run, with one flag per field."""

import argparse
import dataclasses
import math
import re
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from command_line import OneLineParser
from data.fineweb import OUT_DIRS
from errors import BadInput
from model import GPTConfig
from model.presets import EVAL_TOKENS, PROMPT, Preset, get_preset
from training.watchdog import parse_timeouts

# Of a micro-batch that nobody asked for: on a CPU, and on a GPU, where larger matrix products and
# fewer sums of gradients are faster.
MAX_SEQUENCES = 16
MAX_GPU_TOKENS = 65_536
FROM_PRESET: Any = dataclasses.MISSING  # `resolve_train_config` fills it in


def _flag(default: object, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run; a flag for each field but `preset`.

    Counts are tokens or optimizer steps, as their names say; paths are relative to the working
    folder. `resolve_train_config` makes one from the flags of a command line.
    """

    preset: Preset
    model: str = _flag("gpt2", "preset: the model, its batch and its learning rate")
    data_dir: Path = _flag(Path(OUT_DIRS["sample-10BT"]), "folder of token shards")
    verify: bool = _flag(False, "compare every byte of the shards with shards.json at the start")
    run_dir: Path = _flag(FROM_PRESET, "folder for everything the run writes (runs/MODEL)")
    ds_config: Path = _flag(Path("ds_configs/zero1.json"), "the engine's JSON")
    resume: str = _flag("auto", "auto: if there is a checkpoint; must; none: start over")
    init_from: str = _flag("", "start from these weights: all that evaluation takes as --ckpt")
    batch_tokens: int = _flag(FROM_PRESET, "tokens per optimizer step, over all ranks (preset's)")
    micro_batch_size: int = _flag(
        0, "sequences per forward and rank; 0: a GPU takes what fits, a CPU 16"
    )
    seq_len: int = _flag(FROM_PRESET, "tokens per sequence (the model's block_size)")
    max_steps: int = _flag(FROM_PRESET, "optimizer steps (preset's tokens / batch_tokens)")
    lr: float = _flag(FROM_PRESET, "peak learning rate (preset's)")
    warmup_steps: int = _flag(FROM_PRESET, "steps of linear warm-up (preset's, or decay_steps)")
    decay_steps: int = _flag(FROM_PRESET, "step at which the cosine ends (preset's, or max_steps)")
    min_lr_ratio: float = _flag(0.1, "learning rate after decay_steps, as a fraction of lr")
    beta1: float = _flag(0.9, "AdamW")
    beta2: float = _flag(0.95, "AdamW")
    eps: float = _flag(1e-8, "AdamW")
    weight_decay: float = _flag(0.1, "AdamW, on tensors of two dimensions; 0 on the others")
    grad_clip: float = _flag(1.0, "largest global gradient norm; 0 does not clip")
    dropout: float = _flag(0.0, "probability, in embeddings, attention and residuals")
    seed: int = _flag(1337, "of initial weights, data order, dropout and samples")
    shuffle: bool = _flag(True, "permute the windows in each epoch; false: in stream order")
    eval_every: int = _flag(250, "steps between validations and samples")
    eval_tokens: int = _flag(FROM_PRESET, f"first validation tokens ({EVAL_TOKENS}, or all)")
    hellaswag_every: int = _flag(FROM_PRESET, "steps between HellaSwag scores; 0: none (preset's)")
    hellaswag_limit: int = _flag(10_042, "HellaSwag rows, the first of the validation set")
    sample_tokens: int = _flag(32, "tokens of each in-loop sample")
    sample_prompt: str = _flag(PROMPT, "prompt of the in-loop samples")
    checkpoint_every: int = _flag(5000, "steps between checkpoints")
    checkpoint_minutes: float = _flag(30, "minutes to a checkpoint that the next replaces; 0: off")
    keep_checkpoints: int = _flag(0, "checkpoints to keep, the newest; 0: all")
    keep_every: int = _flag(0, "of older ones keep those of a multiple of this step; 0: none")
    log_every: int = _flag(1, "steps between log lines")
    compile: str = _flag("false", "compile each block's training pass; auto: on GPUs, stages 0-2")
    deterministic: bool = _flag(False, "deterministic kernels: the same bits on a GPU too, slower")
    profile: str = _flag("", "FIRST:END: trace steps FIRST to END - 1 into RUN_DIR/profile")
    max_bad_steps: int = _flag(10, "steps in a row without a finite loss, then the run stops")
    timeouts: str = _flag(
        "", "seconds after which a phase is hung: start=1800,step=1800,eval=7200,save=3600, or some"
    )
    debug: bool = _flag(False, "print the traceback of an error")
    dry_run: bool = _flag(False, "print the resolved run, refuse what a run would refuse, and stop")

    @property
    def gpt_config(self) -> GPTConfig:
        """The shape of the model, with this run's dropout."""
        return dataclasses.replace(self.preset.config, dropout=self.dropout)


@dataclass(frozen=True)
class BatchArithmetic:
    """How one optimizer step is split over ranks and micro-batches."""

    batch_sequences: int
    micro_batch_size: int
    grad_accum_steps: int
    world_size: int

    @property
    def losses_per_step(self) -> int:
        """Count the micro-batches of all ranks in one step: each has one mean loss."""
        return self.grad_accum_steps * self.world_size


def resolve_train_config(
    *, model: str = "gpt2", preset: Preset | None = None, **given: Any
) -> TrainConfig:
    """Return the complete run of some flags; the preset has what they leave open.

    Args:
        model: Name of the preset.
        preset: In place of the one called `model`.
        given: Fields of TrainConfig.

    Raises:
        BadInput: A value is out of range; names the flag and the limit.
    """
    preset = preset or get_preset(model)
    batch_tokens = given.get("batch_tokens", preset.batch_tokens)
    if batch_tokens < 1:
        raise BadInput(f"--batch_tokens {batch_tokens}", "out of range", "give one above 0")
    usual_steps = max(1, preset.max_tokens // batch_tokens)
    max_steps = given.get("max_steps", usual_steps)
    decay_steps = max(1, preset.decay_tokens // batch_tokens)
    if max_steps != usual_steps:
        decay_steps = max_steps
    decay_steps = given.get("decay_steps", decay_steps)
    fields: dict[str, Any] = {
        "run_dir": Path("runs") / model,
        "batch_tokens": batch_tokens,
        "seq_len": preset.config.block_size,
        "max_steps": max_steps,
        "lr": preset.lr,
        "warmup_steps": min(max(1, preset.warmup_tokens // batch_tokens), decay_steps),
        "decay_steps": decay_steps,
        "eval_tokens": EVAL_TOKENS,
        "hellaswag_every": preset.hellaswag_every,
    }
    config = TrainConfig(model=model, preset=preset, **(fields | given))
    _check_ranges(config)
    return config


CHOICES = {"resume": ("auto", "must", "none"), "compile": ("auto", "true", "false")}
# Fields, what must hold of their values, and the words for it.
RANGES: tuple[tuple[tuple[str, ...], Callable[[float], bool], str], ...] = (
    (("batch_tokens", "seq_len", "max_steps", "lr", "eps", "eval_every",
      "eval_tokens", "hellaswag_limit", "sample_tokens", "checkpoint_every", "log_every",
      "max_bad_steps"), lambda x: x > 0, "above 0"),
    (("lr", "eps", "weight_decay", "grad_clip", "min_lr_ratio"), math.isfinite, "that is finite"),
    (("decay_steps", "warmup_steps", "weight_decay", "grad_clip", "min_lr_ratio", "seed",
      "hellaswag_every", "keep_checkpoints", "keep_every", "micro_batch_size",
      "checkpoint_minutes"), lambda x: x >= 0, "of at least 0"),
    (("seed",), lambda x: x < 2**32, "below 2^32"),
    (("batch_tokens", "checkpoint_minutes"), lambda x: x <= 2**50, "of at most 2^50"),
    (("beta1", "beta2", "dropout"), lambda x: 0 <= x < 1, "in [0, 1)"),
    (("sample_prompt",), lambda x: x == str(x).encode(errors="ignore").decode(),
     "of UTF-8 (LC_ALL=C.UTF-8)"),
)  # fmt: skip


def _check_ranges(config: TrainConfig) -> None:
    for names, is_within, words in RANGES:
        for name in names:
            value = getattr(config, name)
            if not is_within(value):
                raise BadInput(f"--{name} {value}", "out of range", f"give one {words}")
    for name, choices in CHOICES.items():
        value = getattr(config, name)
        if value not in choices:
            raise BadInput(f"--{name} {value}", "unknown", f"give {', '.join(choices)}")
    run_dir = str(config.run_dir)
    # DeepSpeed passes the path to glob, for which *, ? and [ are patterns.
    if run_dir == "." or not run_dir.isprintable() or set(run_dir) & set("*?["):
        what = "not a usable path: it must be printable, without *, ? and ["
        raise BadInput(f"--run_dir {run_dir!r}", what, "e.g. runs/x")
    parse_timeouts(config.timeouts)
    first, end = profiled_steps(config)
    if config.profile and not first < end <= config.max_steps:
        remedy = f"give FIRST below END, and END of at most --max_steps {config.max_steps}"
        raise BadInput(f"--profile {config.profile}", "out of range", remedy)
    block_size = config.preset.config.block_size
    if config.seq_len > block_size:
        what = f"{config.model} has a block_size of {block_size}"
        raise BadInput(f"--seq_len {config.seq_len}", what, f"give at most {block_size}")


def profiled_steps(config: TrainConfig) -> tuple[int, int]:
    """Return first and end of the steps to trace; the same number twice for none.

    Raises:
        BadInput: `profile` is not two numbers.
    """
    match = re.fullmatch(r"([0-9]+):([0-9]+)", config.profile or "0:0")
    if not match:
        raise BadInput(f"--profile {config.profile}", "must be FIRST:END", "e.g. 10:13")
    return int(match[1]), int(match[2])


def resolve_batch(config: TrainConfig, world_size: int, resumes: bool = False) -> BatchArithmetic:
    """Split `batch_tokens` over `world_size` ranks.

    Raises:
        BadInput: It does not divide; the message suggests a value that does, or ranks: a run that
            resumes keeps its batch.
    """
    batch_tokens, seq_len = config.batch_tokens, config.seq_len
    where = f"--batch_tokens {batch_tokens}"
    sequences, rest = divmod(batch_tokens, seq_len)
    if rest or not sequences:
        nearest = max(1, round(batch_tokens / seq_len)) * seq_len
        what = f"is not a multiple of --seq_len {seq_len}"
        saved = f"give both as {config.run_dir}/config.json has them"
        raise BadInput(where, what, saved if resumes else f"--batch_tokens {nearest}")
    per_rank, rest = divmod(sequences, world_size)
    if rest or not per_rank:
        below = per_rank * world_size * seq_len
        above = below + world_size * seq_len
        nearest = f"{below} or {above}" if below else f"{above}"
        what = f"{sequences} sequences do not divide among {world_size} ranks"
        near = sorted(divisors(sequences), key=lambda n: abs(n - world_size))[:2]
        fitting = f"start {' or '.join(map(str, near))} ranks: a resumed run keeps its batch"
        raise BadInput(where, what, fitting if resumes else f"--batch_tokens {nearest}")
    sizes = divisors(per_rank)
    micro_batch_size = config.micro_batch_size or max(n for n in sizes if n <= MAX_SEQUENCES)
    if micro_batch_size not in sizes:
        nearest = max(n for n in sizes if n <= micro_batch_size)
        what = f"does not divide the {per_rank} sequences of a rank and step"
        where = f"--micro_batch_size {micro_batch_size}"
        raise BadInput(where, what, f"--micro_batch_size {nearest}")
    grad_accum_steps = per_rank // micro_batch_size
    return BatchArithmetic(sequences, micro_batch_size, grad_accum_steps, world_size)


def divisors(n: int) -> list[int]:
    """Return the divisors of n above 0, the smallest first."""
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


def _parse_bool(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text}: must be true or false")
    return text.lower() == "true"


def build_parser(description: str) -> argparse.ArgumentParser:
    """Return a parser with one flag for each field of TrainConfig but `preset`."""
    parser = OneLineParser(description=description)
    hints = typing.get_type_hints(TrainConfig)
    for f in dataclasses.fields(TrainConfig):
        if f.name == "preset":
            continue
        hint = hints[f.name]
        text = f.metadata["help"].replace("%", "%%")
        if f.default is not dataclasses.MISSING:
            shown = str(f.default).lower() if hint is bool else f.default
            text += f" (default: {shown})"
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": text, "type": hint}
        if hint is bool:
            options |= {"type": _parse_bool, "nargs": "?", "const": True, "metavar": "true|false"}
        if f.name == "compile":  # alone it means true
            options |= {"type": str.lower, "nargs": "?", "const": "true"}
            options["metavar"] = "|".join(CHOICES["compile"])
        parser.add_argument(f"--{f.name}", **options)
    # The deepspeed launcher appends --local_rank; the environment's LOCAL_RANK is what counts.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    return parser


def parse_flags(argv: list[str], description: str) -> dict[str, Any]:
    """Return what a command line gives of TrainConfig's fields; `resolve_train_config` takes it."""
    given = vars(build_parser(description).parse_args(argv))
    given.pop("local_rank", None)
    return given


def to_json(config: TrainConfig) -> dict[str, object]:
    """Return the values of all flags as JSON values."""
    values = vars(config).items()
    flags = {name: value for name, value in values if name != "preset"}
    return {name: str(v) if isinstance(v, Path) else v for name, v in flags.items()}


def largest_micro_batch(seq_len: int, on_gpu: bool) -> int:
    """Return the most sequences of a micro-batch that nobody asked for."""
    return max(1, MAX_GPU_TOKENS // seq_len) if on_gpu else MAX_SEQUENCES
