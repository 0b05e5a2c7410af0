"""Draw the pictures of a report with matplotlib."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from eval.curves import GPT2_VAL_LOSS, SCALARS, Curve, RunCurves, published_scores, read_golden

GOLDEN = "gpt2-124m-fineweb-edu"


def draw_all(runs: Sequence[RunCurves], folder: Path) -> list[Path]:
    """Write one PNG for each kind of curve that a run has; return the files."""
    pictures = [folder / "loss.png"]
    with _picture(pictures[0], "loss (nats per token)") as axes:
        _draw_losses(axes, runs)
    if any("hella" in run.curves for run in runs):
        pictures.append(folder / "hellaswag.png")
        with _picture(pictures[-1], "HellaSwag acc_norm") as axes:
            _draw_hellaswag(axes, runs)
    for key, label in SCALARS.items():
        if any(key in run.curves for run in runs):
            pictures.append(folder / f"{key.rpartition('/')[2]}.png")
            with _picture(pictures[-1], label) as axes:
                for run in runs:
                    _draw(axes, run.curves.get(key, []), run.name)
    return pictures


@contextlib.contextmanager
def _picture(path: Path, label: str) -> Iterator[Any]:
    """Yield axes to draw on; write them as a PNG afterwards."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5))  # not pyplot's: it would look for a display
    axes = figure.subplots()
    yield axes
    axes.set(xlabel="step", ylabel=label)
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120, bbox_inches="tight")


def _draw_losses(axes: Any, runs: Sequence[RunCurves]) -> None:
    for run in runs:
        _draw(axes, run.curves.get("train", []), f"{run.name} train")
        _draw(axes, run.curves.get("val", []), f"{run.name} val", marker="o", markersize=3)
    _draw_golden(axes, "val", runs)
    axes.axhline(GPT2_VAL_LOSS, color="gray", linestyle="--", label="OpenAI GPT-2 124M, val")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:.1f}")
    axes.yaxis.set_minor_formatter("{x:.1f}")


def _draw_hellaswag(axes: Any, runs: Sequence[RunCurves]) -> None:
    scores: dict[str, float] = {}
    for run in runs:
        _draw(axes, run.curves.get("hella", []), run.name, marker="o", markersize=3)
        scores |= published_scores(run.model)
    _draw_golden(axes, "hella", runs)
    for i, (label, score) in enumerate(scores.items()):
        axes.axhline(score, color="gray", linestyle=("--", ":", "-.")[i % 3], label=label)


def _draw_golden(axes: Any, key: str, runs: Sequence[RunCurves]) -> None:
    last_step = max(run.last_step for run in runs)
    points = [(step, value) for step, value in read_golden(GOLDEN)[key] if step <= last_step]
    if len(points) > 1:  # its first is before training
        _draw(axes, points, f"golden, {key}", color="goldenrod", alpha=1, linewidth=1.5)


def _draw(axes: Any, curve: Curve, label: str, **style: Any) -> None:
    finite = [point for point in curve if math.isfinite(point[1])]
    if finite:
        steps, values = zip(*finite, strict=True)
        plain_label = label.replace("$", r"\$")  # a pair of dollars would be a formula
        options = {"alpha": 0.8, "linewidth": 1, "label": plain_label} | style
        axes.plot(steps, values, **options)
