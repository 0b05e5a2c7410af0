"""Puts what commands print into the document that names them.

python bench/fill.py docs/SCALING.md

A command stands in a comment of its own, `<!-- python launch/plan.py -->`; what is between it and
`<!-- end -->` is what it printed: a table as it is, anything else as a block of code.
"""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"(<!-- python (?P<command>[^\n]*) -->\n).*?(<!-- end -->)", re.DOTALL)


def fill(text: str) -> str:
    """Return a document with the output of its commands in place."""
    return BLOCK.sub(lambda found: f"{found[1]}{_output(found['command'])}{found[3]}", text)


def _output(command: str) -> str:
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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("document", type=Path, help="Markdown file, changed in place")
    document = parser.parse_args().document
    document.write_text(fill(document.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
