"""Many ranks give the files of one; killed runs go on. Real processes, Debian's Open MPI."""

import fcntl
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from data.mpi import LAUNCHERS

ROOT = Path(__file__).resolve().parents[2]
needs_mpi = pytest.mark.skipif(
    not shutil.which("mpirun"), reason="no mpirun: make debian installs Open MPI"
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Lines and rows of many sizes, and a text that is longer than a shard."""
    import pyarrow
    from pyarrow import parquet

    folder, rng = tmp_path_factory.mktemp("source"), random.Random(0)
    texts = ["some words " * rng.choice([0, 1, 20, 900]) for _ in range(400)]
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    parquet.write_table(pyarrow.table({"text": texts}), folder / "b.parquet", row_group_size=30)
    (folder / "c.txt").write_text("A long text, word by word. " * 40_000)
    return folder


def prepare(
    source: Path, out_dir: Path, n_ranks: int, *options: str
) -> subprocess.CompletedProcess[str]:
    launcher = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", str(n_ranks)]
    command = [
        sys.executable,
        "data/prepare.py",
        str(source),
        "--out_dir",
        str(out_dir),
        "--shard_tokens",
        "20000",
        "--quiet",
        "--workers",
        "1",
        *options,
    ]
    return subprocess.run(
        [*launcher, *command] if n_ranks > 1 else command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def hashes(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


@needs_mpi
@pytest.mark.parametrize("split", [["--val_tokens", "7001"], ["--val_every", "5"]])
def test_three_ranks_write_the_bytes_of_one(source: Path, tmp_path: Path, split: list[str]) -> None:
    for n_ranks in (1, 3):
        done = prepare(source, tmp_path / str(n_ranks), n_ranks, *split)
        assert done.returncode == 0, done.stderr
    files = hashes(tmp_path / "1")
    assert len(files) > 20
    assert hashes(tmp_path / "3") == files  # shards.json included


@needs_mpi
def test_what_one_rank_finds_all_ranks_say_once(source: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text((source / "a.jsonl").read_text() + "no json\n")
    done = prepare(bad, tmp_path / "out", 3, "--val_tokens", "7001")
    assert done.returncode == 2
    assert done.stderr.count("bad.jsonl:401: not JSON") == 1


@needs_mpi
def test_ranks_agree_on_damage_that_one_of_them_reads(source: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    data = bytearray((source / "b.parquet").read_bytes())
    middle = len(data) // 2
    data[middle : middle + 400] = bytes(400)
    (tmp_path / "in" / "b.parquet").write_bytes(data)
    shutil.copy(source / "a.jsonl", tmp_path / "in" / "c.jsonl")
    for n_ranks in (1, 3):
        done = prepare(tmp_path / "in", tmp_path / "fail", n_ranks, "--val_tokens", "7001")
        assert done.returncode == 2, done.stderr
        assert done.stderr.count("b.parquet:row group ") == 1
        shutil.rmtree(tmp_path / "fail")
        options = ["--val_tokens", "7001", "--on_error", "skip"]
        done = prepare(tmp_path / "in", tmp_path / str(n_ranks), n_ranks, *options)
        assert done.returncode == 0, done.stderr
    assert hashes(tmp_path / "1") == hashes(tmp_path / "3")


@needs_mpi
def test_ranks_that_read_different_files_end_together(source: Path, tmp_path: Path) -> None:
    code = (
        "import os, sys; rank = os.environ['OMPI_COMM_WORLD_RANK']; "
        "import data.opening as s; whole = s.Opener.open; "
        f"s.Opener.open = lambda self, i: open('{source}/c.txt', 'rb') if rank == '1' "
        "else whole(self, i); import data.prepare as p; sys.exit(p.main())"
    )
    options = [
        f"{source}/a.jsonl",
        "--out_dir",
        str(tmp_path / "out"),
        "--val_tokens",
        "7001",
        "--quiet",
        "--on_error",
        "skip",
        "--shard_tokens",
        "20000",
    ]
    launcher = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", "3", sys.executable, "-c"]
    done = subprocess.run(
        [*launcher, code, *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 2
    assert done.stderr.count("the ranks do not read the same files") == 1


@needs_mpi
def test_ranks_end_together_where_another_job_writes(source: Path, tmp_path: Path) -> None:
    held = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    done = prepare(source, tmp_path, 3, "--val_tokens", "7001")
    os.close(held)
    assert done.returncode == 2
    assert done.stderr.count("another process writes here") == 1


def test_a_launcher_without_mpi4py_is_refused(source: Path, tmp_path: Path) -> None:
    names = LAUNCHERS["Open MPI"]
    code = (
        f"import os, sys; os.environ |= dict(zip({names}, '0033')); sys.modules['mpi4py'] = None; "
        f"sys.argv[1:] = ['{source}', '--out_dir', '{tmp_path}']; import data.prepare as p; "
        "sys.exit(p.main())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert "error: Open MPI: started 3 processes, and there is no mpi4py" in done.stderr
