"""What commit b0924dd wrote (tests/samples) is read, continued and exported as it was there."""

import hashlib
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from bench.fidelity.parity import run_with_children
from checkpoint.reader import load_model
from data.shards import TokenStream
from data.tokenizer import VOCAB_SIZE, load_tokenizer
from model import PRESETS, GPTConfig
from tests import forked
from tests.samples import train as sample

ROOT = Path(__file__).resolve().parents[1]
SAMPLES = ROOT / "tests" / "samples"
# What b0924dd itself made of them: the sha256 of model.safetensors at step 3, and log.txt of the
# next two steps, which was the same on one and on two ranks.
EXPORTED = {
    "zero1": "2450fc2336ba3402127d601342937725f09b3a6d5892dd6881fbebbdbdff5c39",
    "zero3": "fa778de2e4efbfa41380cb6404fa23d52cac2816fe5ec7e76d3e4b000b3267db",
}
CONTINUED = {
    "zero1": {"3 train": 5.387396, "4 train": 5.306803, "5 val": 5.2342},
    "zero3": {"3 train": 5.387409, "4 train": 5.306850, "5 val": 5.2342},
}


@pytest.mark.parametrize("stage", EXPORTED)
def test_a_checkpoint_of_b0924dd_is_consolidated_to_the_same_bytes(
    stage: str, tmp_path: Path
) -> None:
    out_dir = tmp_path / "exported"
    command = [sys.executable, "checkpoint/consolidate.py", "--out_dir", str(out_dir)]
    done = run_with_children([*command, "--ckpt", str(SAMPLES / stage)], timeout_s=100)
    assert done.returncode == 0, done.stderr
    exported = (out_dir / "model.safetensors").read_bytes()
    assert hashlib.sha256(exported).hexdigest() == EXPORTED[stage]
    model, _ = load_model(str(SAMPLES / stage))
    assert model.config == GPTConfig(2, 2, 8, block_size=32, vocab_size=250)


@pytest.mark.parametrize("n_ranks", [1, 2])
@pytest.mark.parametrize("stage", CONTINUED)
def test_a_checkpoint_of_b0924dd_is_continued_as_it_was_there(
    stage: str,
    n_ranks: int,
    one_rank: object,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(PRESETS, "sample", sample.PRESET)
    shutil.copytree(SAMPLES / stage, tmp_path / "run")
    arguments = [
        "--model",
        "sample",
        "--data_dir",
        str(SAMPLES / "tokens"),
        "--resume",
        "must",
        "--run_dir",
        str(tmp_path / "run"),
        "--ds_config",
        str(ROOT / "ds_configs" / f"{stage}.json"),
        "--max_steps",
        "5",
        "--decay_steps",
        "8",
        "--micro_batch_size",
        "2",
        "--eval_tokens",
        "256",
        "--eval_every",
        "100",
        "--sample_prompt",
        "A",
        "--sample_tokens",
        "1",
    ]
    if n_ranks == 1:
        assert sample.main(arguments) == 0
    else:
        done = forked.launch(n_ranks, arguments, tmp_path, sample.__file__)
        assert done.returncode == 0, done.stderr
    lines = (tmp_path / "run" / "log.txt").read_text().splitlines()
    logged = {key: float(value) for key, _, value in (line.rpartition(" ") for line in lines)}
    assert logged == pytest.approx(CONTINUED[stage], abs=5e-5)


def test_shards_of_b0924dd_hold_the_text_that_they_were_made_of() -> None:
    folder = SAMPLES / "shards" / "finished"
    streams = [TokenStream(folder, split, VOCAB_SIZE, verify=True) for split in ("val", "train")]
    tokens = np.concatenate([stream.read(0, len(stream)) for stream in streams])
    texts = [
        json.loads(line)["text"]
        for path in sorted((SAMPLES / "shards" / "text").glob("*.jsonl"))
        for line in path.read_text().splitlines()
    ]
    assert load_tokenizer().decode(tokens.tolist()).split("<|endoftext|>") == ["", *texts]


def test_a_preparation_that_b0924dd_left_unfinished_is_finished(tmp_path: Path) -> None:
    shutil.copytree(SAMPLES / "shards" / "interrupted", tmp_path / "tokens")
    texts = sorted(map(str, (SAMPLES / "shards" / "text").glob("*.jsonl")))
    sizes = ["--shard_tokens", "256", "--val_tokens", "128"]
    command = [sys.executable, "data/prepare.py", *texts, *sizes]
    done = run_with_children([*command, "--out_dir", str(tmp_path / "tokens")], timeout_s=100)
    assert done.returncode == 0, done.stderr
    for path in (SAMPLES / "shards" / "finished").iterdir():
        assert (tmp_path / "tokens" / path.name).read_bytes() == path.read_bytes(), path.name
