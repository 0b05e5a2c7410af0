"""Compare the plan with published data-parallel runs: tokens/s of each device.

python bench/planning/published.py

Sources: the run scripts of llm.c and its discussions 481 and 677; llm-foundry,
scripts/train/benchmarking/README.md, also for micro-batches and checkpointing. llm.c shards the
optimizer, as zero1 does; llm-foundry's FULL_SHARD is what zero3 does.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path

if not __package__:  # run as a file: import from the repository root, exactly as train.py does
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from bench.record import markdown
from command_line import OneLineParser
from launch.planning.estimate import DS_CONFIGS, Candidate, Cluster, estimate
from model import GPTConfig
from model.presets import PRESETS
from training.config import resolve_train_config
from training.devices import get_device
from training.ds_config import load_ds_config

TOLERANCE = 0.20
PUBLISHED_PRESETS = PRESETS | {
    "30b": replace(PRESETS["gpt3-13b"], config=GPTConfig(48, 56, 7168, 2048)),
    "70b": replace(PRESETS["gpt3-13b"], config=GPTConfig(80, 64, 8192, 2048)),
}


@dataclass(frozen=True)
class Published:
    """One published run, on `n_devices` of a kind, eight to a machine.

    Attributes:
        who: Published it.
        model: Preset of the same shape.
        micro_batch_size: Sequences, and `grad_accum` micro-batches in a step.
        checkpointing: Of activations.
        tokens_per_s: Of one device.
        reason: Why it is further than TOLERANCE from the plan, if it is.
    """

    who: str
    model: str
    device: str
    n_devices: int
    seq_len: int
    micro_batch_size: int
    grad_accum: int
    tokens_per_s: float
    checkpointing: bool = False
    reason: str = ""


# Why a run is far from the plan. For small models the plan expects what llm.c reached.
SMALL = "small: logits in fp32 and hundreds of unfused kernels count most; llm.c reaches the plan"
ODD = "not known; the same table has 68,551 on 16 devices"
RUNS = (
    Published("llm.c", "gpt2", "h100", 8, 1024, 64, 1, 475e3),
    Published("llm.c", "gpt2-medium", "h100", 8, 1024, 64, 1, 188e3),
    Published("llm.c", "gpt2-xl", "h100", 8, 1024, 16, 8, 47.6e3),
    Published("llm.c", "gpt2", "a100", 8, 1024, 64, 1, 218e3),
    Published("llm.c", "gpt2-medium", "a100", 8, 1024, 64, 1, 79.9e3),
    Published("llm.c", "gpt2-large", "a100", 8, 1024, 32, 2, 38.6e3),
    Published("llm-foundry", "gpt3-125m", "a100", 8, 1024, 64, 2, 156e3, reason=SMALL),
    Published("llm-foundry", "gpt3-125m", "a100-40", 8, 2048, 26, 3, 136e3, reason=SMALL),
    Published("llm-foundry", "gpt3-125m", "a100-40", 128, 2048, 26, 1, 124e3, reason=SMALL),
    Published("llm-foundry", "gpt3-350m", "a100", 8, 1024, 64, 2, 64.8e3, reason=SMALL),
    Published("llm-foundry", "gpt3-1.3b", "a100", 8, 1024, 18, 4, 22.1e3),
    Published("llm-foundry", "gpt3-760m", "h100", 8, 1024, 48, 2, 78.6e3),
    Published("llm-foundry", "gpt3-760m", "h100", 8, 2048, 24, 2, 63.1e3, reason=ODD),
    Published("llm-foundry", "gpt3-1.3b", "h100", 8, 2048, 14, 1, 45.5e3),
    Published("llm-foundry", "gpt3-1.3b", "h100", 64, 2048, 20, 1, 44.4e3),
    Published("llm-foundry", "gpt3-1.3b", "h100", 512, 2048, 20, 1, 39.8e3),
    Published("llm-foundry", "gpt3-2.7b", "h100", 16, 2048, 10, 3, 24.1e3),
    Published("llm-foundry", "gpt3-6.7b", "h100", 8, 2048, 6, 1, 10.6e3),
    Published("llm-foundry", "gpt3-13b", "h100", 8, 2048, 2, 1, 4.8e3),
    Published("llm-foundry", "30b", "h100", 32, 2048, 14, 3, 2.3e3, True),
    Published("llm-foundry", "70b", "h100", 64, 2048, 8, 4, 1.04e3, True),
)


def planned(run: Published) -> float:
    """Return the tokens that the plan expects of one device in a second."""
    file = "zero1.json" if run.who == "llm.c" else "zero3.json"
    candidate = Candidate(load_ds_config(DS_CONFIGS / file), file, run.checkpointing)
    sequences = run.n_devices * run.micro_batch_size * run.grad_accum
    config = resolve_train_config(
        model=run.model,
        preset=PUBLISHED_PRESETS[run.model],
        seq_len=run.seq_len,
        batch_tokens=sequences * run.seq_len,
        micro_batch_size=run.micro_batch_size,
    )
    cluster = Cluster(get_device(run.device), run.n_devices // 8, 8)
    return estimate(config, candidate, cluster).tokens_per_s / run.n_devices


def row(run: Published) -> dict[str, str]:
    """Return a row of the table."""
    n_params = PUBLISHED_PRESETS[run.model].config.n_params()
    off = planned(run) / run.tokens_per_s - 1
    return {
        "run": f"{run.who} {n_params / 1e6:,.0f}M [{run.seq_len}]",
        "devices": f"{run.n_devices} x {run.device}",
        "tokens/s a device": f"{run.tokens_per_s:,.0f}",
        "planned": f"{planned(run):,.0f}",
        "off by": f"{off:+.0%}",
        "why more than 20%": run.reason,
    }


def main() -> None:
    """Print the table."""
    OneLineParser(description=__doc__).parse_args()
    print(markdown([row(run) for run in RUNS]))


if __name__ == "__main__":
    main()
