"""The curves of one or more runs as pictures and a page, or a verdict on one.

python eval/report.py runs/a runs/b --out report
python eval/report.py runs/a --check gpt2-124m-fineweb-edu    status 0: on track, 1: off, 2: no step
"""

from __future__ import annotations

import base64
import html
import json
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a file: import from the repository root, exactly as train.py does
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from command_line import OneLineParser
from errors import BadInput, error_line, exit_status_of
from eval import curves
from eval.curves import RunCurves, best_values

STYLE = "body{font:16px/1.5 sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
STYLE += "img{max-width:100%}td,th{padding:.2rem .8rem;text-align:right}pre{white-space:pre-wrap}"
HEADS = ("run", "last step", "lowest train loss", "lowest val loss", "highest HellaSwag")
STATUSES = {True: 0, False: 1, None: 2}  # of --check, by `on_track`


def write_page(runs: Sequence[RunCurves], pictures: Sequence[Path], path: Path) -> None:
    """Write one HTML file that holds the pictures, the numbers and the last samples themselves."""
    parts = ["<!doctype html><html lang='en'><head><meta charset='utf-8'>"]
    parts.append(f"<title>Runs</title><style>{STYLE}</style></head><body><h1>Runs</h1>")
    parts.append(_best_values_table(runs))
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


def _best_values_table(runs: Sequence[RunCurves]) -> str:
    """Return the best values of each run, and the published HellaSwag scores at its size."""
    heads = "".join(f"<th>{head}</th>" for head in (*HEADS, "published at this size"))
    rows = [f"<tr>{heads}</tr>"]
    for run in runs:
        best = best_values(run)
        cells = [run.name, str(run.last_step)]
        for key in ("min_train", "min_val", "max_hella"):
            cells.append("{value:.4f} at {step}".format(**best[key]) if key in best else "")
        cells.append(
            ", ".join(f"{k}: {v:.4f}" for k, v in curves.published_scores(run.model).items())
        )
        row = "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
        rows.append(f"<tr>{row}</tr>")
    return f"<table>{''.join(rows)}</table>"


def write_report(runs: Sequence[RunCurves], out: Path) -> dict[str, object]:
    """Write the pictures and the page into `out`; return where they are and the best values."""
    from eval.plots import draw_all

    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        what = f"cannot be created ({error.strerror})"
        raise BadInput(f"--out {out}", what, "give another folder") from error
    page = out / "index.html"
    write_page(runs, draw_all(runs, out), page)
    return {"page": str(page), "runs": {run.name: best_values(run) for run in runs}}


def main() -> int:
    """Run the command line; return the exit status."""
    parser = OneLineParser(description=__doc__)
    runs_help = "run folders, or build-nanogpt's log.txt"
    parser.add_argument("runs", nargs="+", type=Path, help=runs_help)
    out_help = "folder of the page (default: %(default)s)"
    parser.add_argument("--out", type=Path, default=Path("report"), help=out_help)
    known = sorted(path.stem for path in curves.PUBLISHED.glob("*.csv"))
    parser.add_argument("--check", choices=known, help="compare validation losses with this curve")
    args = parser.parse_args()
    status = 0
    try:
        runs = [curves.read_run(path) for path in args.runs]
        if args.check and len(runs) > 1:
            raise BadInput("--check", f"compares one run, not {len(runs)}", "give one")
        if args.check:
            result = curves.compare_with_golden(runs[0], args.check)
            status = STATUSES[result["on_track"]]
        else:
            result = write_report(runs, args.out)
    except (BadInput, OSError) as error:
        print(f"error: {error_line(error)}", file=sys.stderr)
        return exit_status_of(error)
    for run in runs:
        best = []
        for key, found in best_values(run).items():
            best.append(f"{key.replace('_', ' ')} {found['value']:.4f} (step {found['step']})")
        print(f"{run.name}: {', '.join(best)}", file=sys.stderr)
    print(json.dumps(result))
    return status


if __name__ == "__main__":
    sys.exit(main())
