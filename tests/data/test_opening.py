"""zstd as other programs write it: long windows, several frames, skippable ones, cut ones."""

import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pytest

from data.index import ShardIndex, write_index
from tests.prepared import expected, run, tokens

ROOT = Path(__file__).resolve().parents[2]
TEXTS = ["first document, of several words ", "second and more of it ", "third"]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
SKIPPABLE = struct.pack("<II", 0x184D2A50, 5) + b"notes"
needs_zstd = pytest.mark.skipif(not shutil.which("zstd"), reason="no zstd program")


def zstd(data: bytes, *options: str) -> bytes:
    if not options:
        packed = pyarrow.compress(data, "zstd", asbytes=True)
        assert isinstance(packed, bytes)
        return packed
    command = ["zstd", "-q", "-1", *options]
    return subprocess.run(command, input=data, check=True, capture_output=True, timeout=60).stdout


@needs_zstd
@pytest.mark.parametrize("options", [["--long=31"], ["--long=28"], ["--ultra", "-22", "--long=31"]])
def test_long_windows_are_read(tmp_path: Path, options: list[str]) -> None:
    packed = zstd(LINES * 999, *options)  # from a pipe: zstd does not know that it is short
    assert packed[5] >> 3 >= 18  # of the header: the window has more than 128 MiB
    (tmp_path / "a.jsonl.zst").write_bytes(packed)
    run(tmp_path, "--out_dir", tmp_path / "out")
    assert tokens(tmp_path / "out") == expected(TEXTS) * 999


@pytest.mark.parametrize("between", [b"", SKIPPABLE, zstd(b"")], ids=["", "skippable", "empty"])
def test_all_frames_are_read(tmp_path: Path, between: bytes) -> None:
    frames = [zstd(LINES[:50]), zstd(LINES[50:]), zstd(LINES)]
    (tmp_path / "a.jsonl.zst").write_bytes(between + between.join(frames) + between)
    run(tmp_path, "--out_dir", tmp_path / "out")
    assert tokens(tmp_path / "out") == expected(TEXTS * 2)


RESTS = [zstd(LINES)[:-1], zstd(LINES)[:3], SKIPPABLE[:9], b"junk", b"\0\0"]


@pytest.mark.parametrize("rest", RESTS, ids=["cut", "begun", "cut notes", "junk", "zeros"])
def test_what_is_cut_or_damaged_is_named(tmp_path: Path, rest: bytes) -> None:
    (tmp_path / "a.jsonl.zst").write_bytes(zstd(LINES) + rest)
    with pytest.raises(ValueError, match=r"a\.jsonl\.zst: cannot be read \(.*\)\. Fix: "):
        run(tmp_path, "--out_dir", tmp_path / "out")


def noisy_lines(n: int, seed: int) -> bytes:
    rows = np.random.default_rng(seed).integers(0, 10**6, (n, 20))
    return b"".join(json.dumps({"text": " ".join(map(str, r))}).encode() + b"\n" for r in rows)


def stop_at(out: Path, n_shards: int, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    def die(folder: Path, index: ShardIndex) -> None:
        write_index(folder, index)
        if len(index.shards) == n_shards:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("data.writing.write_index", die)
        with pytest.raises(KeyboardInterrupt):
            run(*arguments, "--out_dir", out)


def test_a_stopped_preparation_goes_on_in_the_middle_of_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the file is another one then, though its size and its ends are the same."""
    path = tmp_path / "a.jsonl.zst"
    frames = [zstd(noisy_lines(1200, seed)) for seed in range(4)]
    path.write_bytes(b"".join(frames))
    options = (path, "--shard_tokens", 50_000)
    run(*options, "--out_dir", tmp_path / "whole")
    stop_at(tmp_path / "out", 5, monkeypatch, *options)
    shutil.copytree(tmp_path / "out", tmp_path / "other")
    run(*options, "--out_dir", tmp_path / "out")
    names = sorted(p.name for p in (tmp_path / "whole").iterdir())
    assert names == sorted(p.name for p in (tmp_path / "out").iterdir())
    for name in names:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    gap = len(frames[1] + frames[2]) - 8
    path.write_bytes(frames[0] + struct.pack("<II", 0x184D2A50, gap) + bytes(gap) + frames[3])
    what = r"zst: ends before byte [\d,]+ of its lines, where .* Fix: put back the whole file, or"
    with pytest.raises(ValueError, match=what):
        run(*options, "--out_dir", tmp_path / "other")


def test_without_a_reader_one_line_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.zst").write_bytes(zstd(LINES))
    code = (
        "import sys; sys.modules.update({'backports.zstd': None, 'compression.zstd': None}); "
        f"sys.argv[1:] = [{str(tmp_path)!r}, '--out_dir', {str(tmp_path / 'out')!r}, '--quiet']; "
        "import data.prepare as p; sys.exit(p.main())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert "Fix: pip install -c constraints.txt" in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
