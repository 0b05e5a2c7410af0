"""Record a measurement: a table on stdout, and an entry of a JSON file for bench/page.py."""

import itertools
import json
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = ("torch", "deepspeed", "transformers", "numpy")

Rows = list[dict[str, str]]  # of a table, each by the names of its columns
Results = dict[str, dict[str, Any]]  # what was found, by the name of the case; "ok" says whether


def load_json(path: Path) -> dict[str, Any]:
    """Return the object of a JSON file, an empty one if there is no file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def save_json(path: Path, values: Any) -> None:
    """Write a JSON file for people and programs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def load_json_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a file that is written line by line; none if there is no file."""
    if not path.exists():
        return []
    # The last line may be half written: by a run that is alive, or that was killed.
    lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line.endswith("}")]


def record(out: Path, title: str, rows: Rows, values: Any, *, quiet: bool = False) -> None:
    """Add a result to the JSON file `out` under its title, and print its table.

    Args:
        out: Entries with other titles stay.
        title: Of the table.
        rows: For people.
        values: All that was measured, for programs.
        quiet: Do not print the table.
    """
    results = load_json(out)
    results[title] = {
        "command": f"python {shlex.join(sys.argv)}",
        **stamp(),
        "table": rows,
        "values": values,
    }
    save_json(out, results)
    if not quiet:
        print(f"{title}\n\n{markdown(rows)}", flush=True)


def run_cases(
    out: Path,
    title: str,
    cases: Iterable[str],
    run_case: Callable[[str], dict[str, Any]],
    summary: Callable[[Results], Rows],
) -> int:
    """Run the cases that `out` does not hold yet; return the exit status, 1 if one is not ok.

    Each result is recorded as soon as it is known: an interrupted command goes on where it was.
    """
    done: Results = load_json(out).get(title, {}).get("values", {})
    for case in cases:
        if case not in done:
            done[case] = run_case(case)
            print(case, done[case], file=sys.stderr, flush=True)
            record(out, title, summary(done), done, quiet=True)
    record(out, title, summary(done), done)
    return 0 if all(result["ok"] for result in done.values()) else 1


def stamp() -> dict[str, str]:
    """Return where something is measured: commit, machine and versions."""
    return {
        "commit": _git("describe", "--always", "--dirty", "--exclude=*"),
        "machine": describe_machine(),
        "versions": ", ".join(f"{name} {version(name)}" for name in LIBRARIES),
    }


def describe_machine() -> str:
    """Return processor, cores and Python for people."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    name = models[0] if models else platform.processor()
    return f"{len(models)} x {name}, Python {platform.python_version()}"


def markdown(rows: Rows) -> str:
    """Return a table of the rows; columns in the order in which they first appear."""
    columns = list(dict.fromkeys(itertools.chain.from_iterable(rows)))
    cells = [[row.get(column, "") for column in columns] for row in rows]
    lines = [columns, ["---"] * len(columns), *cells]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=ROOT, capture_output=True, text=True, encoding="utf-8"
    )
    return done.stdout.strip() or "no commit"
