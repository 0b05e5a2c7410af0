"""Tables of docs/GPU.md: what one H100 should reach by arithmetic, and what it reached.

    python bench/gpu/page.py

Measured are the lines of docs/gpu.jsonl, the results.jsonl of bench/gpu/run.py, once there are any.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:  # run as a file: import from the repository root, exactly as train.py does
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from bench.record import Rows, markdown

if TYPE_CHECKING:
    from bench.gpu.counts import Work

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "gpu.jsonl"
SLOW, FAST = 0, 1
# Assumed of an H100, slow and fast: what people measure on such shapes (docs/GPU.md).
PRODUCT_FLOPS_S = 560e12, 660e12
MOVED_BYTES_S = 2.45e12, 2.85e12
ATTENTION_FLOPS_S = 210e12, 344e12  # FlashAttention 2; cuDNN
UPDATE_BYTES = 40  # a parameter: its gradient is added to the fp32 sum (10), and AdamW (30)
# Beside what zero1 moves: stage 0 has an fp32 residual stream, and autocast's copies; the compiler
# fuses LayerNorm, sums and GELU with their neighbours. Estimates.
MORE_BYTES = {"zero1": 0, "zero1+compile": -26e9, "zero0": 49e9, "zero0+compile": 20e9}
GOALS = {"zero1+compile": "520,000"}


def predict(work: Work, n_params: int, more_bytes: float, speed: int) -> float:
    """Return the seconds of an optimizer step of one micro-batch."""
    moved = work.moved + UPDATE_BYTES * n_params + more_bytes
    return (
        work.product_flops / PRODUCT_FLOPS_S[speed]
        + work.attention_flops / ATTENTION_FLOPS_S[speed]
        + moved / MOVED_BYTES_S[speed]
    )


def speeds(measured: list[dict[str, Any]]) -> Rows:
    """Return a row for each side that is predicted or was timed."""
    from bench.gpu.counts import BATCH, SEQ_LEN, count_pass
    from model.presets import get_preset

    config = get_preset("gpt2").config
    work, tokens = count_pass(config)["all"], BATCH * SEQ_LEN
    timed = {row["stage"]: row for row in measured if "tokens_per_s" in row and "ms" in row}
    rows = []
    for side in dict.fromkeys([*MORE_BYTES, *timed]):
        row = {"side": side, "predicted ms": "", "predicted tokens/s": "",
               "goal": GOALS.get(side, "")}  # fmt: skip
        if side in MORE_BYTES:
            slow, fast = (
                predict(work, config.n_params(), MORE_BYTES[side], s) for s in (SLOW, FAST)
            )
            row["predicted ms"] = f"{1e3 * fast:.0f} to {1e3 * slow:.0f}"
            row["predicted tokens/s"] = f"{tokens / slow:,.0f} to {tokens / fast:,.0f}"
        if side in timed:
            seen = timed[side]
            row |= {"measured ms": f"{seen['ms']:.1f}", "tokens/s": f"{seen['tokens_per_s']:,}",
                    "MFU": f"{seen['mfu_palm'] or 0:.1%}",
                    "GiB": str(seen.get("peak_gib")),
                    "planned": str(seen.get("planned_gib"))}  # fmt: skip
        rows.append(row)
    return rows


def others(measured: list[dict[str, Any]]) -> Rows:
    """Return a row for each stage that is not about speed."""
    return [
        {"stage": row["stage"], "found": _cell(row)}
        for row in measured
        if row["stage"] != "begin" and "ms" not in row
    ]


def _cell(row: dict[str, Any]) -> str:
    shown = {k: v for k, v in row.items() if k not in ("stage", "smi", "stdout", "stderr")}
    return json.dumps(shown).replace("|", "\\|")


def main() -> None:
    """Run the command line."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    lines = RESULTS.read_text(encoding="utf-8").splitlines() if RESULTS.exists() else []
    measured = [json.loads(line) for line in lines]
    print(markdown(speeds(measured)))
    print(markdown(others(measured)) if measured else "No run on a GPU exists: none is measured.")


if __name__ == "__main__":
    main()
