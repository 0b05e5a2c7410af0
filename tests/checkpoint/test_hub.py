"""Weights by hub name, from a server on this machine that speaks the hub's protocol."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from transformers import GPT2Config, GPT2LMHeadModel

ROOT = Path(__file__).resolve().parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = "openai-community/gpt2"


class Hub(BaseHTTPRequestHandler):
    folder: Path
    wrong_checksum = False

    def do_HEAD(self) -> None:  # the base class's name
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, with_body: bool) -> None:
        if self.path.startswith("/api/models/"):
            files = list(self.folder.iterdir())
            info = {"id": REPO, "sha": COMMIT, "siblings": [{"rfilename": p.name} for p in files]}
            tree = [
                {"type": "file", "path": p.name, "size": p.stat().st_size, "oid": COMMIT}
                for p in files
            ]
            body = json.dumps(tree if "/tree/" in self.path else info).encode()
            headers = {"Content-Type": "application/json"}
        else:
            body = (self.folder / self.path.split("/")[-1]).read_bytes()
            hashed = body + b"x" if self.wrong_checksum else body
            digest = hashlib.sha256(hashed).hexdigest()
            headers = {"ETag": f'"{digest}"', "X-Repo-Commit": COMMIT}
        self.send_response(200)
        for key, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(key, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[str]:
    config = GPT2Config(n_layer=1, n_head=1, n_embd=8, n_positions=16, vocab_size=64)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "hub")
    (tmp_path / "hub" / "evil.bin").write_bytes(b"a pickle")
    Hub.folder, Hub.wrong_checksum = tmp_path / "hub", False
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def locate(hub: str, home: Path, name: str) -> subprocess.CompletedProcess[str]:
    code = "import sys; from checkpoint.hub import locate_hf_folder as f; print(f(sys.argv[1]))"
    environment = os.environ | {"HF_ENDPOINT": hub, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    return subprocess.run(
        [sys.executable, "-c", code, name],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_the_four_names_mean_openais_weights(hub: str, tmp_path: Path) -> None:
    done = locate(hub, tmp_path / "home", "gpt2")
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.strip())
    assert f"models--{REPO.replace('/', '--')}" in str(folder)
    names = {p.name for p in folder.iterdir()}
    assert {"config.json", "model.safetensors"} <= names
    assert "evil.bin" not in names
    original = (tmp_path / "hub" / "model.safetensors").read_bytes()
    assert (folder / "model.safetensors").read_bytes() == original


def test_a_model_without_safetensors_comes_as_pickles(hub: str, tmp_path: Path) -> None:
    (tmp_path / "hub" / "model.safetensors").rename(tmp_path / "hub" / "pytorch_model.bin")
    done = locate(hub, tmp_path / "home", REPO)
    assert done.returncode == 0, done.stderr
    names = {p.name for p in Path(done.stdout.strip()).iterdir()}
    assert {"config.json", "pytorch_model.bin"} <= names
    assert "evil.bin" not in names


def test_a_wrong_checksum_is_refused_and_the_file_deleted(hub: str, tmp_path: Path) -> None:
    Hub.wrong_checksum = True
    done = locate(hub, tmp_path / "home", REPO)
    assert done.returncode != 0
    assert "does not have the hub's SHA-256" in done.stderr
    assert not list((tmp_path / "home").rglob("*/model.safetensors"))


def test_a_hub_out_of_reach_is_one_clear_error(tmp_path: Path) -> None:
    done = locate("http://127.0.0.1:9", tmp_path / "home", "gpt2-xl")
    assert "BadInput: gpt2-xl: is not a local folder, and the hub could not provide" in done.stderr
