from pathlib import Path
from typing import Any

import pytest

from checkpoint.manifest import (
    Manifest,
    complete_steps,
    incomplete_steps,
    publish,
    read_manifest,
    record_file,
    step_name,
    verify_files,
)
from checkpoint.resuming import check_layout, find_checkpoint
from model import GPTConfig

MODEL = GPTConfig(2, 2, 64, 64)


def save(checkpoints: Path, step: int) -> Path:
    partial = checkpoints / f"{step_name(step)}.tmp"
    partial.mkdir(parents=True)
    (partial / "a.pt").write_bytes(b"weights" * step)
    (partial / "b.pt").write_bytes(b"moments" * step)
    files = {name: record_file(partial / name) for name in ("a.pt", "b.pt")}
    manifest = Manifest(step, 8 * step, 2, 1, "bf16", MODEL.__dict__, files)
    return publish(partial, manifest)


def test_manifest_survives_the_disk(tmp_path: Path) -> None:
    folder = save(tmp_path, 250)
    manifest = read_manifest(folder)
    assert folder.name == "step_000250"
    assert (manifest.step, manifest.samples, manifest.zero_stage) == (250, 2000, 1)
    assert GPTConfig(**manifest.model) == MODEL
    verify_files(folder, manifest)
    assert (tmp_path / "latest").read_text() == "step_000250"
    assert not list(tmp_path.rglob("*.tmp"))


def test_only_folders_with_a_manifest_are_checkpoints(tmp_path: Path) -> None:
    checkpoints = tmp_path / "checkpoints"
    for step in (10, 9, 1_000_000):
        save(checkpoints, step)
    (checkpoints / "step_000011.tmp").mkdir()
    (checkpoints / "step_000012").mkdir()
    assert [p.name for p in complete_steps(checkpoints)] == [
        "step_000009", "step_000010", "step_1000000",
    ]  # fmt: skip
    assert [p.name for p in incomplete_steps(checkpoints)] == ["step_000012"]
    found = find_checkpoint(tmp_path, "auto")
    assert found == checkpoints / "step_1000000"


@pytest.mark.parametrize("name", ["a.pt", "b.pt"])
@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_damage_is_named_before_anything_is_loaded(tmp_path: Path, name: str, damage: str) -> None:
    folder = save(tmp_path, 3)
    path = folder / name
    raw = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(raw[:-1])
    else:
        raw[5] ^= 1
        path.write_bytes(raw)
    with pytest.raises(ValueError, match=f"{name}: (missing|damaged)"):
        verify_files(folder, read_manifest(folder))


@pytest.mark.parametrize("text", ["", "{", "[]", '{"step": 1}', "\x00"])
def test_a_damaged_manifest_is_named(tmp_path: Path, text: str) -> None:
    folder = save(tmp_path, 3)
    (folder / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match=r"manifest\.json: damaged"):
        read_manifest(folder)


def test_auto_starts_anew_only_where_there_is_no_checkpoint(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path, "auto") is None
    assert find_checkpoint(tmp_path, "none") is None
    (tmp_path / "checkpoints" / "step_000005.tmp").mkdir(parents=True)
    assert find_checkpoint(tmp_path, "auto") is None  # a first save that was killed
    with pytest.raises(ValueError, match="is not empty; give another --run_dir"):
        find_checkpoint(tmp_path, "none")
    with pytest.raises(ValueError, match=r"--resume must: .* no complete checkpoint"):
        find_checkpoint(tmp_path, "must")
    (tmp_path / "checkpoints" / "step_000005").mkdir()
    with pytest.raises(ValueError, match=r"step_000005: no manifest\.json"):
        find_checkpoint(tmp_path, "auto")


def test_another_layout_is_refused_key_by_key(tmp_path: Path) -> None:
    folder = save(tmp_path, 3)
    same: dict[str, Any] = {"world_size": 2, "zero_stage": 1, "precision": "bf16", "model": MODEL}
    assert check_layout(folder, **same).step == 3
    assert check_layout(folder, **dict(same, model=GPTConfig(2, 2, 64, 64, dropout=0.1)))
    with pytest.raises(ValueError, match=r"world_size: 2 -> 4, zero_stage: 1 -> 3"):
        check_layout(folder, **dict(same, world_size=4, zero_stage=3))
    with pytest.raises(ValueError, match=r"n_layer: 2 -> 3"):
        check_layout(folder, **dict(same, model=GPTConfig(3, 2, 64, 64)))
