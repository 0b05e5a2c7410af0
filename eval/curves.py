"""The curves of a run, what is published to compare them with, and whether they agree."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Curve = list[tuple[int, float]]

SCALARS = ("perf/tokens_per_s", "perf/mfu", "train/grad_norm", "train/lr")  # of metrics.jsonl
PUBLISHED = Path(__file__).parent / "published"
# Tolerances of validation loss in nats by first step: early the curve falls fast. At 124M other
# seeds and data orders move the loss less than that.
TOLERANCES = {250: 0.03, 1000: 0.02}
# OpenAI's GPT-2 124M on FineWeb-Edu's shard 0 (build-nanogpt).
GPT2_VAL_LOSS = 3.2924
# HellaSwag in completion style: GPT-2 from build-nanogpt and its hellaswag.py, GPT-3 zero-shot from
# Brown et al. 2020, Table H.1.
HELLASWAG_LINES: dict[str, dict[str, float]] = {
    "gpt2": {"GPT-2 124M": 0.294463, "GPT-3 125M": 0.337},
    "gpt2-medium": {"GPT-2 350M": 0.375224, "GPT-3 350M": 0.436},
    "gpt2-large": {"GPT-2 774M": 0.431986, "GPT-3 760M": 0.510},
    "gpt2-xl": {"GPT-2 1558M": 0.488946, "GPT-3 1.3B": 0.547},
    "gpt3-2.7b": {"GPT-3 2.7B": 0.628},
    "gpt3-6.7b": {"GPT-3 6.7B": 0.674},
    "gpt3-13b": {"GPT-3 13B": 0.709},
    "gpt3-175b": {"GPT-3 175B": 0.789},
}
SAME_SIZE = {"gpt3-125m": "gpt2", "gpt3-350m": "gpt2-medium", "gpt3-760m": "gpt2-large",
             "gpt3-1.3b": "gpt2-xl"}  # fmt: skip


@dataclass(frozen=True)
class RunCurves:
    """What a run left: curves by name, (step, value) in order, and its last samples.

    `train`, `val` and `hella` are log.txt's; the others are those of metrics.jsonl, by their keys.
    """

    name: str
    model: str
    curves: dict[str, Curve]
    samples: list[str]


def read_run(path: Path) -> RunCurves:
    """Read a run folder, or a folder or log.txt of build-nanogpt's.

    Raises:
        ValueError: No log, or a damaged line; names it.
    """
    log = path if path.is_file() else path / "log.txt"
    curves, samples = read_log(log), []
    if (log.parent / "metrics.jsonl").is_file():
        rows = [json.loads(line) for line in _whole_lines(log.parent / "metrics.jsonl", _is_json)]
        points = [
            (row["step"], key, value)
            for row in rows
            for key, value in row.items()
            if key in SCALARS and value is not None
        ]
        curves |= _forget_what_was_redone(points)
        samples = next((row["samples"] for row in reversed(rows) if "samples" in row), [])
    model = _read_model(log.parent / "config.json") or "gpt2"
    return RunCurves(str(path), model, curves, list(map(str, samples)))


def _read_model(config: Path) -> str | None:
    try:
        if not config.is_file():
            return None
        return str(json.loads(config.read_text(encoding="utf-8-sig"))["model"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{config}: not the configuration of a run ({error!r}). Fix: give a run folder"
        ) from error


def read_log(path: Path) -> dict[str, Curve]:
    """Read a log.txt, ours or build-nanogpt's.

    Raises:
        ValueError: No such file, or a line that is not `{step} {kind} {value}`; names the line.
    """
    points = []
    for line in _whole_lines(path, _is_log_line):
        step, kind, value = line.split()
        points.append((int(step), kind, float(value)))
    return _forget_what_was_redone(points)


def _whole_lines(path: Path, is_whole: Callable[[str], bool]) -> Iterator[str]:
    """Yield the lines of a file; a last one that a kill has torn is left out."""
    try:
        lines = path.read_text(errors="replace", encoding="utf-8-sig").splitlines(keepends=True)
    except OSError as error:
        raise ValueError(
            f"{path}: cannot be read ({error.strerror}). Fix: give a run folder"
        ) from error
    for number, line in enumerate(lines, 1):
        if not line.endswith("\n"):
            return
        if is_whole(line):
            yield line
        else:
            raise ValueError(
                f"{path}:{number}: not a line of a log: {line.rstrip()!r}. Fix: delete the line"
            )


def _is_log_line(line: str) -> bool:
    try:
        step, _, value = line.split()
        return int(step) >= 0 and float(value) is not None
    except ValueError:
        return False


def _is_json(line: str) -> bool:
    try:
        row = json.loads(line)
    except ValueError:
        return False
    if not isinstance(row, dict) or type(row.get("step")) is not int:
        return False
    return all(isinstance(row.get(key), int | float | None) for key in SCALARS)


def _forget_what_was_redone(points: list[tuple[int, str, float]]) -> dict[str, Curve]:
    """Group points by name; where a restart goes back in steps, what came after goes."""
    curves: dict[str, dict[int, float]] = {}
    newest = 0
    for step, name, value in points:
        if step < newest:
            curves = {n: {s: v for s, v in c.items() if s <= step} for n, c in curves.items()}
        newest = step
        curves.setdefault(name, {})[step] = value
    return {name: list(curve.items()) for name, curve in curves.items() if curve}


def read_golden(name: str) -> dict[str, Curve]:
    """Read a published curve: `val`, `hella` and `train` (the mean of 100 steps)."""
    text = (PUBLISHED / f"{name}.csv").read_text(encoding="utf-8-sig")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    columns = {"val": "val_loss", "hella": "hellaswag_acc_norm", "train": "train_mean"}
    rows = list(csv.DictReader(lines))
    return {k: [(int(r["step"]), float(r[c])) for r in rows] for k, c in columns.items()}


def hellaswag_lines(model: str) -> dict[str, float]:
    """Return the published scores at the size of a preset; at 124M for one without any."""
    return HELLASWAG_LINES.get(SAME_SIZE.get(model, model), HELLASWAG_LINES["gpt2"])


def tolerance(step: int) -> float | None:
    """Return how far the validation loss may be from the golden one; None before the first step."""
    reached = [nats for first, nats in TOLERANCES.items() if first <= step]
    return reached[-1] if reached else None


def check(run: RunCurves, name: str) -> dict[str, Any]:
    """Compare validation losses with a published curve at its steps.

    Returns:
        `verdict` ("on track", "off by x at step n" for the first such step, "no step to compare"),
        `on_track` (true, false, null), and every comparison.
    """
    golden, found = dict(read_golden(name)["val"]), dict(run.curves.get("val", []))
    steps = []
    for step, expected in golden.items():
        if step in found and (allowed := tolerance(step)) is not None:
            off_by = found[step] - expected
            steps.append({
                "step": step, "val_loss": _number(found[step]), "golden": expected,
                "difference": _number(round(off_by, 4)), "tolerance": allowed,
                "on_track": abs(off_by) <= allowed + 1e-9,
            })  # fmt: skip
    off = next((s for s in steps if not s["on_track"]), None)
    verdict = f"off by {off['difference']} at step {off['step']}" if off else "on track"
    return {
        "run": run.name,
        "curve": name,
        "verdict": verdict if steps else "no step to compare",
        "on_track": off is None if steps else None,
        "steps": steps,
    }


def _number(value: float) -> float | str:
    """Return a value that JSON can hold."""
    return value if math.isfinite(value) else str(value)


def extremes(run: RunCurves) -> dict[str, dict[str, float]]:
    """Return the smallest losses and the largest HellaSwag score of a run, with their steps."""
    found = {}
    for name, best in (("train", min), ("val", min), ("hella", max)):
        finite = [(value, step) for step, value in run.curves.get(name, []) if math.isfinite(value)]
        if finite:
            value, step = best(finite)
            found[f"{best.__name__}_{name}"] = {"value": value, "step": step}
    return found
