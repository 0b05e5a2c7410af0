"""The curves of one or more runs as pictures and a page, or a verdict on one.

python eval/report.py runs/a runs/b --out report
python eval/report.py runs/a --check gpt2-124m-fineweb-edu    status 0: on track, 1: off, 2: no step
"""

from __future__ import annotations

import argparse
import base64
import html
import json
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a file: import from the repository root, exactly as train.py does
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from eval.curves import PUBLISHED, RunCurves, check, extremes, hellaswag_lines, read_run

STYLE = "body{font:16px/1.5 sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
STYLE += "img{max-width:100%}td,th{padding:.2rem .8rem;text-align:right}pre{white-space:pre-wrap}"


def write_page(runs: Sequence[RunCurves], pictures: Sequence[Path], path: Path) -> None:
    """Write one HTML file that holds the pictures, the numbers and the last samples themselves."""
    parts = ["<!doctype html><html lang='en'><head><meta charset='utf-8'>"]
    parts += [f"<title>Runs</title><style>{STYLE}</style></head><body><h1>Runs</h1>", _table(runs)]
    for picture in pictures:
        encoded = base64.b64encode(picture.read_bytes()).decode()
        name = html.escape(picture.stem)
        parts.append(f"<h2>{name}</h2><img alt='{name}' src='data:image/png;base64,{encoded}'>")
    for run in runs:
        if run.samples:
            parts.append(f"<h2>Last samples of {html.escape(run.name)}</h2>")
            parts += [f"<pre>{html.escape(text)}</pre>" for text in run.samples]
    parts.append("</body></html>\n")
    path.write_text("\n".join(parts), encoding="utf-8")


def _table(runs: Sequence[RunCurves]) -> str:
    """Return the extremes of each run, and the published HellaSwag scores at its size."""
    heads = ("run", "last step", "lowest train loss", "lowest val loss", "highest HellaSwag",
             "published at this size")  # fmt: skip
    rows = ["".join(f"<th>{head}</th>" for head in heads)]
    for run in runs:
        best = extremes(run)
        cells = [run.name, str(last_step(run))]
        for key in ("min_train", "min_val", "max_hella"):
            cells.append("{value:.4f} at {step}".format(**best[key]) if key in best else "")
        cells.append(", ".join(f"{k}: {v:.4f}" for k, v in hellaswag_lines(run.model).items()))
        rows.append("".join(f"<td>{html.escape(cell)}</td>" for cell in cells))
    return "<table>" + "".join(f"<tr>{row}</tr>" for row in rows) + "</table>"


def last_step(run: RunCurves) -> int:
    """Return the last step that the run has logged."""
    return max(step for curve in run.curves.values() for step, _ in curve)


def write_report(runs: Sequence[RunCurves], out: Path) -> dict[str, object]:
    """Write the pictures and the page into `out`; return where they are and the extremes."""
    from eval.plots import draw_all

    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"--out {out}: cannot be made ({error.strerror}). Fix: give another"
        ) from error
    write_page(runs, draw_all(runs, out), out / "index.html")
    return {"page": str(out / "index.html"), "runs": {run.name: extremes(run) for run in runs}}


def main() -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "runs", nargs="+", type=Path, help="run folders, or build-nanogpt's log.txt"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("report"), help="folder of the page (default: report)"
    )
    known = sorted(path.stem for path in PUBLISHED.glob("*.csv"))
    parser.add_argument("--check", choices=known, help="compare validation losses with this curve")
    args = parser.parse_args()
    try:
        runs = [read_run(path) for path in args.runs]
        for run in runs:
            if not run.curves:
                raise ValueError(f"{run.name}: the log is empty. Fix: leave it out")
        if args.check and len(runs) > 1:
            raise ValueError("--check compares one run. Fix: give one")
        result = check(runs[0], args.check) if args.check else write_report(runs, args.out)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for run in runs:
        best = extremes(run).items()
        found = ", ".join(
            f"{k.replace('_', ' ')} {v['value']:.4f} (step {v['step']})" for k, v in best
        )
        print(f"{run.name}: {found}", file=sys.stderr)
    print(json.dumps(result))
    return {True: 0, False: 1, None: 2}[result["on_track"]] if args.check else 0


if __name__ == "__main__":
    sys.exit(main())
