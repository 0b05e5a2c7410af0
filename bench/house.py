"""Measures the code itself: lines, comments and imports of each folder, as CONTRIBUTING.md shows.

    python bench/house.py             the table of the folders
    python bench/house.py --files     the share of comments in each file of the product

A code line is one that is neither blank, comment nor docstring.
"""

from __future__ import annotations

import argparse
import ast
import io
import subprocess
import tokenize
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOP = "(top folder)"
# The product's folders: each imports only those before it. eval and launch do not know each other.
FLOORS = {TOP: 5, "data": 1, "model": 1, "checkpoint": 2, "training": 3, "eval": 4, "launch": 4}
LAYOUT_TOKENS = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


@dataclass(frozen=True)
class File:
    """What one file holds."""

    path: Path
    folder: str
    code_lines: int
    comment_lines: int
    all_lines: int
    longest_function: tuple[int, str]  # its lines and name
    imported_folders: frozenset[str]
    walruses: int
    unformatted: int  # places that the formatter skips


def measure(path: Path) -> File:
    """Measure a file of the checkout."""
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    code: set[int] = set()
    comments: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            comments.add(token.start[0])
        elif token.type not in LAYOUT_TOKENS:
            code.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(tree):
        code -= _docstring_lines(node)
    functions = [
        ((node.end_lineno or 0) - node.lineno + 1, node.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
    ]
    relative = path.relative_to(ROOT)
    return File(
        relative,
        folder=relative.parts[0] if len(relative.parts) > 1 else TOP,
        code_lines=len(code),
        comment_lines=len(comments),
        all_lines=text.count("\n"),
        longest_function=max(functions, default=(0, "")),
        imported_folders=frozenset(_imported_folders(tree)),
        walruses=sum(isinstance(node, ast.NamedExpr) for node in ast.walk(tree)),
        unformatted=text.count("# fmt: " + "skip"),
    )


def _docstring_lines(node: ast.AST) -> set[int]:
    if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
        return set()
    if ast.get_docstring(node, clean=False) is None:
        return set()
    return set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))


def _imported_folders(tree: ast.Module) -> Iterable[str]:
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        yield from (name.partition(".")[0] for name in names)


def row(name: str, files: list[File]) -> str:
    """Return a line of the table."""
    code = sum(file.code_lines for file in files)
    comments = sum(file.comment_lines for file in files)
    longest = max(files, key=lambda file: file.all_lines)
    lines, function = max(file.longest_function for file in files)
    cells = [name, len(files), f"{code:,}", f"{100 * comments / max(1, code):.0f} %"]
    cells += [f"{longest.path.name} {longest.all_lines}", f"{function} {lines}"]
    return f"| {' | '.join(map(str, cells))} |"


def arrows_up(files: list[File]) -> list[str]:
    """Return the imports of a folder that stands on the same floor or above."""
    found = []
    for file in files:
        for folder in file.imported_folders & FLOORS.keys():
            if folder != file.folder and FLOORS[folder] >= FLOORS[file.folder]:
                found.append(f"{file.path} -> {folder}")
    return found


def count_exceptions() -> int:
    """Return how many imports tests/test_house.py allows by name."""
    tree = ast.parse((ROOT / "tests" / "test_house.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "EXCEPTIONS":
            return len(ast.literal_eval(node.value))
    raise ValueError("tests/test_house.py: no EXCEPTIONS")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--files", action="store_true", help="the share of comments by file")
    args = parser.parse_args()
    listed = subprocess.run(
        ["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, check=True, encoding="utf-8"
    ).stdout
    files = [measure(ROOT / name) for name in listed.split() if (ROOT / name).exists()]
    product = [file for file in files if file.folder in FLOORS]
    if args.files:
        for file in sorted(product, key=lambda file: file.path):
            share = file.comment_lines / max(1, file.code_lines)
            print(f"{file.path}: {share:.0%} comments, {file.code_lines} code lines")
        return
    print("| folder | files | code lines | comments | longest file | longest function |")
    print("|---|---|---|---|---|---|")
    for folder in [*FLOORS, "bench", "tests"]:
        print(row(folder, [file for file in files if file.folder == folder]))
    print(row("the product: all but bench and tests", product))
    print()
    print(f"- Imports of a folder on the same floor or above: {len(arrows_up(product))}.")
    print(f"- Exceptions from that and from the table above: {count_exceptions()}.")
    print(f"- Walrus operators in all files: {sum(file.walruses for file in files)}.")
    print(f"- Places that the formatter skips: {sum(file.unformatted for file in files)}.")


if __name__ == "__main__":
    main()
