"""The pictures of a report, with matplotlib."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from eval.curves import GPT2_VAL_LOSS, RunCurves, hellaswag_lines, read_golden

GOLDEN = "gpt2-124m-fineweb-edu"
SCALARS = {
    "perf/tokens_per_s": ("tokens_per_s", "tokens/s"),
    "perf/mfu": ("mfu", "MFU (6N + 12·L·d·T FLOPs per token)"),
    "train/grad_norm": ("grad_norm", "gradient norm before clipping"),
    "train/lr": ("lr", "learning rate"),
}


def draw_all(runs: Sequence[RunCurves], folder: Path) -> list[Path]:
    """Write one PNG for each kind of curve that a run has; return the files."""
    pictures = [_picture(folder / "loss.png", "loss (nats per token)", _draw_losses, runs)]
    if any("hella" in run.curves for run in runs):
        path = folder / "hellaswag.png"
        pictures.append(_picture(path, "HellaSwag acc_norm", _draw_hellaswag, runs))
    for key, (name, label) in SCALARS.items():
        if any(key in run.curves for run in runs):

            def draw(axes: Any, runs: Sequence[RunCurves], key: str = key) -> None:
                for run in runs:
                    _line(axes, run, key, run.name)

            pictures.append(_picture(folder / f"{name}.png", label, draw, runs))
    return pictures


def _picture(
    path: Path,
    label: str,
    draw: Callable[[Any, Sequence[RunCurves]], None],
    runs: Sequence[RunCurves],
) -> Path:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5))
    draw(axes, runs)
    axes.set(xlabel="step", ylabel=label)
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)
    return path


def _draw_losses(axes: Any, runs: Sequence[RunCurves]) -> None:
    for run in runs:
        _line(axes, run, "train", f"{run.name} train")
        _line(axes, run, "val", f"{run.name} val", marker="o", markersize=3)
    _golden(axes, "val", runs)
    axes.axhline(GPT2_VAL_LOSS, color="gray", linestyle="--", label="OpenAI GPT-2 124M, val")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:.1f}")
    axes.yaxis.set_minor_formatter("{x:.1f}")


def _draw_hellaswag(axes: Any, runs: Sequence[RunCurves]) -> None:
    for run in runs:
        _line(axes, run, "hella", run.name, marker="o", markersize=3)
    _golden(axes, "hella", runs)
    published = {k: v for run in runs for k, v in hellaswag_lines(run.model).items()}
    for i, (label, score) in enumerate(published.items()):
        axes.axhline(score, color="gray", linestyle=("--", ":", "-.")[i % 3], label=label)


def _line(axes: Any, run: RunCurves, key: str, label: str, **style: Any) -> None:
    if points := [(s, v) for s, v in run.curves.get(key, []) if math.isfinite(v)]:
        steps, values = zip(*points, strict=True)
        plain = label.replace("$", r"\$")  # a pair of dollars would be a formula
        axes.plot(steps, values, label=plain, alpha=0.8, linewidth=1, **style)


def _golden(axes: Any, key: str, runs: Sequence[RunCurves]) -> None:
    last = max(step for run in runs for curve in run.curves.values() for step, _ in curve)
    points = [(step, value) for step, value in read_golden(GOLDEN)[key] if step <= last]
    if len(points) > 1:  # its first is before training
        steps, values = zip(*points, strict=True)
        axes.plot(steps, values, color="goldenrod", linewidth=1.5, label=f"golden, {key}")
