"""The loss curves of one or more runs, as a picture.

python eval/report.py runs/a runs/b --out report
"""

import argparse
import json
import sys
from pathlib import Path

if not __package__:  # run as a file: import from the repository root, exactly as train.py does
    sys.path[0] = str(Path(__file__).resolve().parents[1])

Curve = list[tuple[int, float]]


def read_log(path: Path) -> dict[str, Curve]:
    """Read a log.txt, ours or build-nanogpt's; of a step that a restart repeats the last counts.

    Raises:
        ValueError: No such file, or a line that is not `{step} {kind} {value}`; names the line.
    """
    curves: dict[str, dict[int, float]] = {}
    try:
        lines = path.read_text().splitlines()
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; give a run folder") from None
    for number, line in enumerate(lines, 1):
        try:
            step, kind, value = line.split()
            curves.setdefault(kind, {})[int(step)] = float(value)
        except ValueError:
            raise ValueError(f"{path}:{number}: not 'step kind value': {line!r}") from None
    return {kind: sorted(points.items()) for kind, points in curves.items()}


def plot_losses(runs: dict[str, dict[str, Curve]], path: Path) -> None:
    """Draw train and validation loss of each run, in nats per token on a log axis."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5))
    for name, curves in runs.items():
        for kind, marker in (("train", ""), ("val", "o")):
            if kind in curves:
                steps, losses = zip(*curves[kind], strict=True)
                axes.plot(steps, losses, label=f"{name} {kind}", marker=marker, alpha=0.7)
    axes.set(xlabel="step", ylabel="loss (nats per token)", yscale="log")
    axes.yaxis.set_major_formatter("{x:.1f}")
    axes.yaxis.set_minor_formatter("{x:.1f}")
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)


def main() -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    parser.add_argument("--out", type=Path, help="folder for loss.png (default: the first run)")
    args = parser.parse_args()
    try:
        runs = {str(run): read_log(run / "log.txt") for run in args.runs}
        out = args.out or args.runs[0]
        if out.exists() and not out.is_dir():
            raise ValueError(f"--out {out}: is a file; give a folder")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    out.mkdir(parents=True, exist_ok=True)
    plot_losses(runs, out / "loss.png")
    lowest = {
        name: {kind: min(value for _, value in curve) for kind, curve in curves.items()}
        for name, curves in runs.items()
    }
    print(json.dumps({"picture": str(out / "loss.png"), "lowest": lowest}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
