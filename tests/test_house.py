"""The rooms, their doors and their sizes (CONTRIBUTING.md)."""

import ast
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("model", "data", "checkpoint", "training", "eval", "launch")
FILES = sorted(p for room in (*ROOMS, "bench") for p in (ROOT / room).rglob("*.py"))
FILES += sorted(ROOT.glob("*.py"))
ALLOWED = {
    "model": {"model"},
    "data": {"data"},
    # A Hugging Face folder is weights and tokenizer.
    "checkpoint": {"checkpoint", "model", "data.tokenizer"},
    "training": {"training", "model", "data", "checkpoint"},
    # An evaluation command runs on one rank or on many.
    "eval": {"eval", "model", "data", "checkpoint", "training.ranks", "training.rendezvous"},
    "launch": {"launch", "training", "model", "data", "checkpoint"},
}
EXCEPTIONS = {("eval/session.py", "training.broken_pipes")}  # output that nobody reads any more
TESTS = [p for p in (ROOT / "tests").rglob("*.py") if ROOT / "tests" / "bench" not in p.parents]
# bench/speed/prepare.py alone starts it.
PROGRAMS = [
    str(path.relative_to(ROOT))
    for path in FILES
    if "__main__" in path.read_text() and path.name != "seed_prepare.py"
]


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_rooms_import_only_through_their_doors(path: Path) -> None:
    file = path.relative_to(ROOT)
    room = file.parts[0]
    for name in imports(path):
        if room in ALLOWED and name.split(".")[0] in (*ROOMS, "train", "bench"):
            allowed = any(name == a or name.startswith(a + ".") for a in ALLOWED[room])
            assert allowed or (str(file), name) in EXCEPTIONS, name
        if room in ("model", "data", "eval"):
            assert name.split(".")[0] != "deepspeed"
            assert not name.startswith("torch.distributed")
    if room in ("model", "data", "eval") and path.name != "mpi.py":  # which looks for MPI's ranks
        assert "environ" not in path.read_text()


def test_there_are_few_exceptions_and_each_is_needed() -> None:
    assert len(EXCEPTIONS) <= 3
    for file, name in EXCEPTIONS:
        assert name in imports(ROOT / file)


@pytest.mark.parametrize("path", TESTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_tests_share_only_references_with_the_measurements(path: Path) -> None:
    for name in imports(path):
        assert not name.startswith("bench") or name.startswith("bench.fidelity"), name


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_stay_small(path: Path) -> None:
    assert path.read_text().count("\n") <= 300
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno is not None
            limit = 60 if (path.name, node.name) == ("train.py", "train") else 50
            assert node.end_lineno - node.lineno < limit, node.name
    assert path.stem not in sys.stdlib_module_names
    assert path.stem not in ("utils", "common", "helpers", "misc", "base", "manager")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_is_unpickled_or_passed_to_a_shell(path: Path) -> None:
    text = path.read_text()
    for banned in (
        "shell=True",
        "trust_remote_code",
        "os.system",
        "pickle.load",
        "allow_pickle=True",
        "yaml.load",
    ):
        assert banned not in text
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in ("eval", "exec")
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            assert any(
                k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords
            )


TEXT_FILES = {"open", "read_text", "write_text", "NamedTemporaryFile", "TemporaryFile"}
NO_TEXT = {"os.open", "self.opener.open"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_text_is_utf_8_by_name(path: Path) -> None:
    """Else it is what the locale says, and a run fails where it writes its vocabulary."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            assert is_utf_8_or_bytes(node), f"line {node.lineno}: {ast.unparse(node)}"


def is_utf_8_or_bytes(call: ast.Call) -> bool:
    keywords = {k.arg: ast.unparse(k.value) for k in call.keywords}
    if keywords.get("encoding", "").startswith("'utf-8"):
        return True
    if {"text", "universal_newlines"} & set(keywords):  # of subprocess
        return False
    function = ast.unparse(call.func)
    modes = [ast.unparse(arg) for arg in call.args] + [keywords.get("mode", "")]
    is_bytes = any(re.fullmatch("'[rwax+]*b[rwax+]*'", mode) for mode in modes)
    return is_bytes or function in NO_TEXT or function.rpartition(".")[2] not in TEXT_FILES


@pytest.mark.parametrize(
    ("line", "fits"),
    [
        ("open(path)", False),
        ("path.open('w')", False),
        ("path.read_text()", False),
        ("path.write_text(text, encoding='latin-1')", False),
        ("subprocess.run(command, text=True)", False),
        ("path.open('a', encoding='utf-8')", True),
        ("path.read_text(encoding='utf-8-sig')", True),
        ("path.open('r+b')", True),
        ("open(path, mode='rb')", True),
        ("subprocess.run(command, encoding='utf-8')", True),
    ],
)
def test_that_would_find_one_that_is_not(line: str, fits: bool) -> None:
    call = ast.parse(line).body[0]
    assert isinstance(call, ast.Expr)
    assert isinstance(call.value, ast.Call)
    assert is_utf_8_or_bytes(call.value) == fits


# These say what is wrong with a part of a file or a shape; their callers turn that into a BadInput.
INNER = {
    "checkpoint/foreign.py",
    "checkpoint/manifest.py",
    "data/pipeline.py",
    "eval/curves.py",
    "eval/hellaswag.py",
    "model/config.py",
    "model/gpt.py",
}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_an_error_says_where_what_and_the_remedy(path: Path) -> None:
    if path.is_relative_to(ROOT / "bench"):
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            text = ast.unparse(node.exc)
            if text.startswith("ValueError("):
                assert str(path.relative_to(ROOT)) in INNER, text
            if text.startswith("BadInput("):
                assert len(node.exc.args) == 3, text
            if text.startswith("OSError(") and isinstance(node.exc.args[0], ast.JoinedStr):
                assert "Fix: " in text


@pytest.mark.parametrize("entry", [entry for entry in PROGRAMS if not entry.startswith("bench/")])
def test_a_bad_flag_is_one_line_with_a_remedy(entry: str) -> None:
    command = [sys.executable, entry, "--no_such_flag", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", timeout=20)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert "Fix: " in line


@pytest.mark.parametrize("entry", PROGRAMS)
def test_help_is_fast_and_imports_no_torch(entry: str) -> None:
    command = [sys.executable, "-X", "importtime", entry, "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=10)
    assert " torch\n" not in done.stderr
    assert "usage:" in done.stdout
    assert any(_time_help(entry) < 0.5 for _ in range(3))  # others may have the CPU


def _time_help(entry: str) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, entry, "--help"], cwd=ROOT, capture_output=True, check=True)
    return time.perf_counter() - started
