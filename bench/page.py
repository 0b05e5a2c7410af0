"""Writes docs/BENCHMARKS.md from the JSON files of the measurements; `make bench` ends with it.

python bench/page.py runs/bench/*.json --out docs/BENCHMARKS.md
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

if not __package__:  # run as a file: import from the repository root, exactly as train.py does
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from bench.record import markdown

HEAD = """# Benchmarks

Written by `make bench` (`bench/page.py`): do not edit. Each table bears the command, machine,
versions and commit that it was measured with. Sides took turns on the same data and threads, after
their losses had been compared; a ratio is the median of paired ones with its bootstrap 95 %
interval. [`LOG.md`](LOG.md) says where the time goes, and why.
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, nargs="+", help="JSON files")
    parser.add_argument("--out", type=Path, required=True, help="Markdown file")
    args = parser.parse_args()
    sections = [HEAD]
    for path in args.results:
        for title, entry in json.loads(path.read_text(encoding="utf-8")).items():
            where = f"{entry['machine']}; {entry['versions']}; commit {entry['commit']}."
            command = f"`{entry['command']}`"
            sections.append(f"## {title}\n{command}\n\n{where}\n\n{markdown(entry['table'])}")
    args.out.write_text("\n".join(sections), encoding="utf-8")


if __name__ == "__main__":
    main()
