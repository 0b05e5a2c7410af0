"""Read the curves of a run, and compare them with published ones."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from errors import BadInput

T = TypeVar("T")
Curve = list[tuple[int, float]]

# Keys of metrics.jsonl that are drawn, with the labels of their axes.
SCALARS = {
    "perf/tokens_per_s": "tokens/s",
    "perf/mfu": "MFU (6N + 12·L·d·T FLOPs per token)",
    "train/grad_norm": "gradient norm before clipping",
    "train/lr": "learning rate",
}
PUBLISHED = Path(__file__).parent / "published"
ROUNDING = 1e-9  # logs have four digits: a difference of exactly the tolerance is on track
# OpenAI's GPT-2 124M on FineWeb-Edu's shard 0 (build-nanogpt).
GPT2_VAL_LOSS = 3.2924


@dataclass(frozen=True)
class RunCurves:
    """What a run left: curves by name, (step, value) in order, and its last samples.

    `train`, `val` and `hella` are log.txt's; the others are those of metrics.jsonl, by their keys.
    """

    name: str
    model: str
    curves: dict[str, Curve]
    samples: list[str]

    @property
    def last_step(self) -> int:
        """The last step that the run has logged."""
        return max(curve[-1][0] for curve in self.curves.values())


def read_run(path: Path) -> RunCurves:
    """Read a run folder, or a folder or log.txt of build-nanogpt's.

    Raises:
        BadInput: There is no log, it is empty, or a line is damaged; names it.
    """
    log = path if path.is_file() else path / "log.txt"
    curves = read_log(log)
    samples: list[str] = []
    metrics = log.parent / "metrics.jsonl"
    if metrics.is_file():
        points = []
        for row in _parse_lines(metrics, _parse_row):
            samples = row.get("samples", samples)
            points += [(row["step"], key, row[key]) for key in SCALARS if row.get(key) is not None]
        curves |= _drop_rewound_steps(points)
    if not curves:
        raise BadInput(str(path), "the log is empty", "leave it out")
    model = _read_model(log.parent / "config.json")
    return RunCurves(str(path), model, curves, list(map(str, samples)))


def _read_model(config: Path) -> str:
    """Return the preset of a run; build-nanogpt, which writes no configuration, has one only."""
    try:
        if not config.is_file():
            return "gpt2"
        return str(json.loads(config.read_text(encoding="utf-8-sig"))["model"])
    except (ValueError, KeyError, TypeError) as error:
        what = f"is not the configuration of a run ({error!r})"
        raise BadInput(str(config), what, "give a run folder") from error


def read_log(path: Path) -> dict[str, Curve]:
    """Read a log.txt, ours or build-nanogpt's.

    Raises:
        BadInput: No such file, or a line that is not `{step} {kind} {value}`; names the line.
    """
    return _drop_rewound_steps(_parse_lines(path, _parse_log_line))


def _parse_lines(path: Path, parse: Callable[[str], T]) -> list[T]:
    """Parse the lines of a file; a last one that a kill has cut off is left out."""
    try:
        lines = path.read_text(errors="replace", encoding="utf-8-sig").splitlines(keepends=True)
    except OSError as error:
        what = f"cannot be read ({error.strerror})"
        raise BadInput(str(path), what, "give a run folder") from error
    parsed = []
    for number, line in enumerate(lines, 1):
        if not line.endswith("\n"):
            break
        try:
            parsed.append(parse(line))
        except ValueError as error:
            what = f"is not a line of a log: {line.rstrip()!r}"
            raise BadInput(f"{path}:{number}", what, "delete the line") from error
    return parsed


def _parse_log_line(line: str) -> tuple[int, str, float]:
    step, kind, value = line.split()
    if int(step) < 0:
        raise ValueError(line)
    return int(step), kind, float(value)


def _parse_row(line: str) -> dict[str, Any]:
    row = json.loads(line)
    has_step = isinstance(row, dict) and type(row.get("step")) is int
    if not has_step or not all(isinstance(row.get(k), int | float | None) for k in SCALARS):
        raise ValueError(line)
    return row


def _drop_rewound_steps(points: list[tuple[int, str, float]]) -> dict[str, Curve]:
    """Group points by name, without the steps that a restart went back behind."""
    curves: dict[str, dict[int, float]] = {}
    earliest = math.inf
    for step, name, value in reversed(points):
        # A smaller step further down: a restart went back, and this point is of the time before.
        if step <= earliest:
            earliest = step
            curves.setdefault(name, {}).setdefault(step, value)  # what was written last counts
    return {name: sorted(curve.items()) for name, curve in curves.items()}


def read_golden(name: str) -> dict[str, Curve]:
    """Read a published curve: `val`, `hella` and `train` (the mean of 100 steps)."""
    text = (PUBLISHED / f"{name}.csv").read_text(encoding="utf-8-sig")
    rows = list(csv.DictReader(line for line in text.splitlines() if not line.startswith("#")))
    columns = {"val": "val_loss", "hella": "hellaswag_acc_norm", "train": "train_mean"}
    curves = {}
    for key, column in columns.items():
        curves[key] = [(int(row["step"]), float(row[column])) for row in rows]
    return curves


def published_scores(model: str) -> dict[str, float]:
    """Return the published HellaSwag scores at the size of a preset; at 124M for one without."""
    scores = json.loads((PUBLISHED / "hellaswag_scores.json").read_text(encoding="utf-8"))
    return scores.get(model, scores["gpt2"])


def tolerance(step: int) -> float:
    """Return how far the validation loss may be from the golden one, in nats.

    Early the curve falls fast. At 124M other seeds and data orders move the loss less than that.
    """
    return 0.02 if step >= 1000 else 0.03


def compare_with_golden(run: RunCurves, name: str) -> dict[str, Any]:
    """Compare validation losses with a published curve at its steps.

    Returns:
        `verdict` ("on track", "off by x at step n" for the first such step, "no step to compare"),
        `on_track` (true, false, null), and every comparison.
    """
    found = dict(run.curves.get("val", []))
    steps = []
    for step, golden in read_golden(name)["val"]:
        if step in found and step > 0:  # step 0 is before training: chance
            difference = found[step] - golden
            comparison = {
                "step": step,
                "val_loss": _json_number(found[step]),
                "golden": golden,
                "difference": _json_number(round(difference, 4)),
                "tolerance": tolerance(step),
                "on_track": abs(difference) <= tolerance(step) + ROUNDING,
            }
            steps.append(comparison)
    off = [comparison for comparison in steps if not comparison["on_track"]]
    verdict = "on track" if steps else "no step to compare"
    if off:
        verdict = f"off by {off[0]['difference']} at step {off[0]['step']}"
    on_track = not off if steps else None
    summary = {"run": run.name, "curve": name, "verdict": verdict, "on_track": on_track}
    return summary | {"steps": steps}


def _json_number(value: float) -> float | str:
    """Return a value that JSON can hold."""
    return value if math.isfinite(value) else str(value)


def best_values(run: RunCurves) -> dict[str, dict[str, float]]:
    """Return the smallest losses and the largest HellaSwag score of a run, with their steps."""
    best = {}
    for name, choose in (("train", min), ("val", min), ("hella", max)):
        finite = [(value, step) for step, value in run.curves.get(name, []) if math.isfinite(value)]
        if finite:
            value, step = choose(finite)
            best[f"{choose.__name__}_{name}"] = {"value": value, "step": step}
    return best
