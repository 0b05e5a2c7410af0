import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bench.fidelity.seed_prepare import tokenize
from data.contents import documents_in
from data.loader import read_windows
from data.order import Order
from data.shards import TokenStream

ROOT = Path(__file__).resolve().parents[2]
TEXTS = [f"Text number {i} has some words. " * (1 + i % 9) for i in range(60)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    command = [
        sys.executable,
        "data/prepare.py",
        str(tmp_path / "a.jsonl"),
        "--quiet",
        "--out_dir",
        str(tmp_path / "out"),
        "--val_tokens",
        "300",
        "--shard_tokens",
        "900",
    ]
    subprocess.run(command, cwd=ROOT, check=True, timeout=60)
    return tmp_path / "out"


def test_texts_are_shown_in_an_ascii_locale(folder: Path) -> None:
    for path in folder.glob("*.npy"):
        np.save(path, np.tile(np.array(tokenize("日本"), np.uint16), 31))
    (folder / "shards.json").unlink()
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = show(folder, "--quiet", environment=os.environ | ascii_only)
    assert done.returncode == 0, done.stderr
    assert r"\u65e5" in done.stdout


def show(
    *arguments: object, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "data/show.py", *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        encoding="utf-8",
        check=False,
        timeout=60,
    )


def test_a_folder_is_shown_and_verified(folder: Path) -> None:
    done = show(folder)
    assert done.returncode == 0, done.stderr
    n_tokens = sum(len(tokenize(text)) for text in TEXTS)
    assert f"{n_tokens - 300:,} tokens" in done.stdout
    assert "text_val_000000.npy: 300 tokens" in done.stdout
    assert "Text number" in done.stdout
    assert "SHA-256: 100%" in done.stderr
    lengths = [len(tokenize(text)) for text in TEXTS[10:]]
    assert f"most {max(lengths)}" in done.stdout


def test_damage_is_shown_as_status_1(folder: Path) -> None:
    path = folder / "text_train_000001.npy"
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)
    done = show(folder, "--quiet")
    assert done.returncode == 1
    assert "text_train_000001.npy: 900 tokens" in done.stdout
    assert done.stdout.count("DAMAGED (SHA-256)") == 1
    assert show(folder.parent / "nowhere").returncode == 2


def test_shards_without_a_manifest_are_shown(folder: Path) -> None:
    (folder / "shards.json").unlink()
    done = show(folder, "--quiet")
    assert done.returncode == 0
    assert "no shards.json" in done.stdout


def test_documents_of_a_window_are_found_across_shards(folder: Path) -> None:
    stream = TokenStream(folder, "train", 50257)
    whole = stream.read(0, len(stream))
    begins = [0, *np.flatnonzero(whole == 50256).tolist()]
    for first in range(0, len(stream) - 100, 37):
        found = list(documents_in(stream, first, first + 100))
        edges = [b for b in begins if first < b < first + 100]
        start = max(b for b in begins if b <= first)
        assert found == list(zip([start, *edges], [*edges, first + 100], strict=True))


def test_a_step_shows_the_batch_that_the_run_saw(folder: Path, tmp_path: Path) -> None:
    values = {"seq_len": 32, "batch_tokens": 128, "seed": 5, "shuffle": True, "max_steps": 20}
    config = tmp_path / "config.json"
    config.write_text(json.dumps(values))
    done = show(folder, "--step", 7, "--config", config)
    assert done.returncode == 0, done.stderr
    stream = TokenStream(folder, "train", 50257)
    windows = Order(len(stream), 32, 5).windows(28, 4)
    rows = read_windows(stream, windows, 32)[:, :32]
    shown = done.stdout.split("\nsample ")[1:]
    assert len(shown) == 4
    for row, text in zip(rows, shown, strict=True):
        parts = [line.split()[0] for line in text.splitlines()[1:]]
        n_documents = int((row[1:] == 50256).sum()) + 1
        assert len(parts) == n_documents
        assert sum(map(int, parts)) == 32
    for bad in (["--step", 20, "--config", config], ["--step", 1], ["--step", 1, "--config", "x"]):
        assert show(folder, *bad).returncode == 2
