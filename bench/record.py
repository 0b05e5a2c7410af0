"""What a measurement leaves: a table on stdout, and an entry of a JSON file for bench/page.py."""

import json
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench.ratios import describe_machine

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = ("torch", "deepspeed", "transformers", "numpy")

Rows = list[dict[str, str]]  # of a table, each by the names of its columns


def record(out: Path, title: str, rows: Rows, values: Any, *, quiet: bool = False) -> None:
    """Add a result to the JSON file `out` under its title, and print its table.

    Args:
        out: Entries with other titles stay.
        title: Of the table.
        rows: For people.
        values: All that was measured, for programs.
        quiet: Do not print the table.
    """
    results = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
    results[title] = {
        "command": f"python {shlex.join(sys.argv)}",
        **stamp(),
        "table": rows,
        "values": values,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if not quiet:
        print(f"{title}\n\n{markdown(rows)}", flush=True)


def stamp() -> dict[str, str]:
    """Return where something is measured: commit, machine and versions."""
    return {
        "commit": _git("describe", "--always", "--dirty", "--exclude=*"),
        "machine": describe_machine(),
        "versions": ", ".join(f"{name} {version(name)}" for name in LIBRARIES),
    }


def markdown(rows: Rows) -> str:
    """Return a table of the rows; columns in the order in which they first appear."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [columns, ["---"] * len(columns), *([row.get(c, "") for c in columns] for row in rows)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=ROOT, capture_output=True, text=True, encoding="utf-8"
    )
    return done.stdout.strip() or "no commit"
