"""Write the documents that hold measurements.

    python bench/page.py runs/bench/*.json --out docs/BENCHMARKS.md    a table for each measurement
    python bench/page.py docs/SCALING.md                               run its commands again

In the second form a command stands in a comment of the document, `<!-- python launch/plan.py -->`.
What the command prints replaces what is between that comment and the next `<!-- end -->`: a table
as it is, anything else as a block of code.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

if not __package__:  # run as a file: import from the repository root, exactly as train.py does
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from bench.record import markdown
from command_line import OneLineParser

ROOT = Path(__file__).resolve().parents[1]
COMMAND_BLOCK = re.compile(
    r"(<!-- python (?P<command>[^\n]*) -->\n).*?(<!-- end -->)", flags=re.DOTALL
)
HEAD = """# Benchmarks

Written by `make bench` (`bench/page.py`): do not edit. Each table bears the command, machine,
versions and commit that it was measured with. Sides took turns on the same data and threads, after
their losses had been compared; a ratio is the median of paired ones with its bootstrap 95 %
interval. [`LOG.md`](LOG.md) says where the time goes, and why.
"""


def benchmarks(results: list[Path]) -> str:
    """Return the page of all measurements in some JSON files."""
    sections = [HEAD]
    for path in results:
        for title, entry in json.loads(path.read_text(encoding="utf-8")).items():
            where = f"{entry['machine']}; {entry['versions']}; commit {entry['commit']}."
            command = f"`{entry['command']}`"
            sections.append(f"## {title}\n{command}\n\n{where}\n\n{markdown(entry['table'])}")
    return "\n".join(sections)


def fill(document: str) -> str:
    """Return a document with the output of its commands in place."""

    def filled(block: re.Match[str]) -> str:
        return f"{block[1]}{output_of(block['command'])}{block[3]}"

    return COMMAND_BLOCK.sub(filled, document)


def output_of(command: str) -> str:
    """Return what a command prints: a table as it is, anything else as a block of code."""
    done = subprocess.run(
        [sys.executable, *shlex.split(command)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    if "Traceback" in done.stderr:
        raise RuntimeError(f"python {command}: {done.stderr}")
    printed = (done.stdout or done.stderr).strip("\n")
    if printed.startswith("|"):
        return f"\n{printed}\n\n"
    return f"```\n$ python {command}\n{printed}\n```\n"


def main() -> None:
    """Run the command line."""
    parser = OneLineParser(description=__doc__)
    parser.add_argument("files", type=Path, nargs="+", help="JSON files, or Markdown files")
    parser.add_argument("--out", type=Path, help="the page of the JSON files")
    args = parser.parse_args()
    if args.out:
        args.out.write_text(benchmarks(args.files), encoding="utf-8")
        return
    for path in args.files:
        path.write_text(fill(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
