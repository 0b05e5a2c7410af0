"""Datasets by name: a local folder laid out as the hub's are, and a stand-in for the hub itself."""

import hashlib
import json
import os
import subprocess
import sys
import threading
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from bench.fidelity.seed_prepare import tokenize, write_shards

ROOT = Path(__file__).resolve().parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = "HuggingFaceFW/fineweb-edu"
CARD = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/*/*
- config_name: sample-10BT
  data_files:
  - split: train
    path: sample/10BT/*
---
"""
DOCUMENTS = [f"Document number {i}. " * (1 + i * 7 % 50) for i in range(120)]


def make_hub_folder(folder: Path) -> Path:
    """Lay out two configurations as FineWeb-Edu's are."""
    for path, first, last in (
        ("sample/10BT/000_00000.parquet", 0, 50),
        ("sample/10BT/001_00000.parquet", 50, 120),
        ("data/CC-MAIN-2024-10/train-00000-of-00001.parquet", 0, 70),
    ):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        texts = DOCUMENTS[first:last]
        table = pyarrow.table({"text": texts, "id": [str(i) for i in range(len(texts))]})
        parquet.write_table(table, folder / path, row_group_size=20)
    (folder / "README.md").write_text(CARD)
    return folder


def fineweb(
    tmp_path: Path, *arguments: object, **environment: str
) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "data/fineweb.py",
        "--quiet",
        "--out_dir",
        str(tmp_path / "out"),
        "--val_tokens",
        "500",
        "--shard_tokens",
        "2000",
        *map(str, arguments),
    ]
    home = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    return subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | home | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.npy")}


def expected(tmp_path: Path, documents: list[str]) -> dict[str, bytes]:
    write_shards(map(tokenize, documents), tmp_path / "seed", "edufineweb", 500, 2000)
    return contents(tmp_path / "seed")


def test_fineweb_from_a_folder_has_the_seeds_names_and_bytes(tmp_path: Path) -> None:
    folder = make_hub_folder(tmp_path / "fineweb-edu")
    done = fineweb(tmp_path, "--dataset", folder, HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    shards = contents(tmp_path / "out")
    assert shards == expected(tmp_path, DOCUMENTS)
    assert min(shards) == "edufineweb_train_000001.npy"
    assert "edufineweb_val_000000.npy" in shards
    recipe = json.loads((tmp_path / "out" / "shards.json").read_text())["recipe"]
    assert recipe["files"][0]["name"] == "sample/10BT/000_00000.parquet"


def test_configurations_and_splits_are_named(tmp_path: Path) -> None:
    folder = make_hub_folder(tmp_path / "fineweb-edu")
    done = fineweb(tmp_path, "--dataset", folder, "--name", "sample-9BT")
    assert done.returncode == 2
    assert "sample-9BT" in done.stderr
    assert "'sample-10BT'" in done.stderr
    done = fineweb(tmp_path, "--dataset", folder, "--name", "default")
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "out") == expected(tmp_path, DOCUMENTS[:70])
    done = fineweb(tmp_path, "--dataset", tmp_path / "nowhere")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1, done.stderr


class Hub(BaseHTTPRequestHandler):
    """The hub's protocol for one dataset, with ranges and checksums."""

    folder: Path
    wrong_checksum = False
    asked: list[str]

    def do_HEAD(self) -> None:  # the base class's name
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def do_POST(self) -> None:
        form = urllib.parse.parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
        self.send_json([e for p in form["paths"] for e in self.tree() if e["path"] == p])

    def tree(self) -> list[dict[str, object]]:
        entries: list[dict[str, object]] = []
        for path in sorted(self.folder.rglob("*")):
            name = str(path.relative_to(self.folder))
            if path.is_dir():
                entries.append({"type": "directory", "path": name, "size": 0, "oid": COMMIT})
                continue
            oid = hashlib.sha256(path.read_bytes()).hexdigest()
            size = path.stat().st_size
            lfs = {"oid": oid, "size": size, "pointerSize": 130}
            entries.append({"type": "file", "path": name, "size": size, "oid": oid, "lfs": lfs})
        return entries

    def answer(self, with_body: bool) -> None:
        path = urllib.parse.unquote(self.path.partition("?")[0])
        self.asked.append(f"{self.command} {path}")
        if "/tree/" in path:
            under = path.split("/tree/")[1].partition("/")[2]
            recursive = "recursive=True" in self.path or "recursive=true" in self.path
            self.send_json(
                [
                    e
                    for e in self.tree()
                    if str(e["path"]).startswith(f"{under}/" if under else "")
                    and (recursive or "/" not in str(e["path"])[len(under) + bool(under) :])
                ]
            )
        elif path.startswith("/api/datasets/"):
            files = [{"rfilename": e["path"]} for e in self.tree() if e["type"] == "file"]
            self.send_json({"id": REPO, "sha": COMMIT, "siblings": files, "tags": []})
        else:
            self.send_file(self.folder / path.split("/resolve/")[1].partition("/")[2], with_body)

    def send_json(self, value: object) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def send_file(self, path: Path, with_body: bool) -> None:
        if not path.is_file():
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        body = path.read_bytes()
        digest = hashlib.sha256(body + b"x" * self.wrong_checksum).hexdigest()
        first, last = 0, len(body) - 1
        given = self.headers.get("Range")
        if given:
            begin, _, end = given.removeprefix("bytes=").partition("-")
            first, last = int(begin), min(int(end or last), last)
        self.send_response(206 if given else 200)
        self.send_header("ETag", f'"{digest}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Range", f"bytes {first}-{last}/{len(body)}")
        self.send_header("Content-Length", str(last - first + 1))
        self.end_headers()
        if with_body:
            self.wfile.write(body[first : last + 1])

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[str]:
    Hub.folder, Hub.wrong_checksum, Hub.asked = make_hub_folder(tmp_path / "hub"), False, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("streaming", [False, True])
def test_fineweb_from_the_hub_is_the_same(hub: str, tmp_path: Path, streaming: bool) -> None:
    done = fineweb(tmp_path, *["--streaming"] * streaming, HF_ENDPOINT=hub)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "out") == expected(tmp_path, DOCUMENTS)
    recipe = json.loads((tmp_path / "out" / "shards.json").read_text())["recipe"]
    assert recipe["revision"] == COMMIT
    blobs = [p for p in (tmp_path / "home").rglob("blobs/*") if p.stat().st_size > 1000]
    assert len(blobs) == (0 if streaming else 2)


def test_a_download_with_a_wrong_checksum_is_refused(hub: str, tmp_path: Path) -> None:
    Hub.wrong_checksum = True
    done = fineweb(tmp_path, HF_ENDPOINT=hub)
    assert done.returncode == 1, done.stderr
    assert "000_00000.parquet does not have the hub's checksum. " in done.stderr
    assert len(done.stderr.splitlines()) == 1
