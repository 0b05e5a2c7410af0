"""Print the tables of docs/GPU.md: what one H100 should reach by arithmetic, and what it reached.

    python bench/gpu/page.py

What was measured is in docs/gpu.jsonl, if there is one: the results.jsonl of bench/gpu/run.py.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:  # run as a file: import from the repository root, exactly as train.py does
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from bench.record import Rows, load_json_lines, markdown
from command_line import OneLineParser

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
    work = count_pass(config)["all"]
    tokens = BATCH * SEQ_LEN
    timed = {row["stage"]: row for row in measured if "tokens_per_s" in row and "ms" in row}
    rows = []
    for side in dict.fromkeys([*MORE_BYTES, *timed]):
        row = {"side": side, "predicted ms": "", "predicted tokens/s": ""}
        if side in MORE_BYTES:
            slow = predict(work, config.n_params(), MORE_BYTES[side], SLOW)
            fast = predict(work, config.n_params(), MORE_BYTES[side], FAST)
            row["predicted ms"] = f"{1e3 * fast:.0f} to {1e3 * slow:.0f}"
            row["predicted tokens/s"] = f"{tokens / slow:,.0f} to {tokens / fast:,.0f}"
        if side in timed:
            seen = timed[side]
            row |= {
                "measured ms": f"{seen['ms']:.1f}",
                "tokens/s": f"{seen['tokens_per_s']:,}",
                "MFU": f"{seen['mfu_palm']:.1%}" if seen["mfu_palm"] else "n/a",
                "GiB": str(seen.get("peak_gib", "n/a")),
                "planned": str(seen.get("planned_gib", "n/a")),
            }
        rows.append(row)
    return rows


def goals(measured: dict[str, dict[str, Any]]) -> Rows:
    """Return a row for each goal: what was found, and whether it is reached."""

    def value(stage: str, key: str) -> float:
        return measured.get(stage, {}).get(key) or math.nan

    compiled, plain = value("zero1+compile", "tokens_per_s"), value("seed+whole", "tokens_per_s")
    slower = 1 - value("zero1", "tokens_per_s") / value("bare1", "tokens_per_s")
    faster = value("evaluation", "one_at_a_time_s") / value("evaluation", "hellaswag_second_s")
    found = {
        "zero1+compile: 520,000 tokens/s": (f"{compiled:,.0f}", compiled >= 520_000),
        "zero1+compile over seed+whole: 1": (f"{compiled / plain:.2f}", compiled >= plain),
        "zero1 slower than bare1: 2 % at most": (f"{slower:.1%}", slower <= 0.02),
        "HellaSwag over one at a time: 20": (f"{faster:.1f}", faster >= 20),
    }
    for stage, row in measured.items():
        if "ok" in row:
            found[f"{stage}: ok"] = (str(row["ok"]), row["ok"])
    rows = []
    for goal, (text, is_reached) in found.items():
        row = {"goal": goal, "found": "", "reached": ""}
        if "nan" not in text:  # else a stage that it needs has not run
            row |= {"found": text, "reached": "yes" if is_reached else "no"}
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
    OneLineParser(description=__doc__).parse_args()
    rows = {row["stage"]: row for row in load_json_lines(RESULTS) if row["stage"] != "begin"}
    card = rows.get("setup", {})
    if rows and "device" not in card:
        remedy = "copy what bench/gpu/run.py wrote on a GPU"
        raise SystemExit(f"error: {RESULTS}: was not measured on a GPU. Fix: {remedy}")
    print(markdown(speeds(list(rows.values()))))
    if not rows:
        print("No run on a GPU exists: none is measured.")
        return
    print(f"Measured on {card['device']}, {card['versions']}, commit {card['commit']}.\n")
    print(markdown(goals(rows)))
    print(markdown(others(list(rows.values()))))


if __name__ == "__main__":
    main()
