import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest

from checkpoint.manifest import (
    Manifest,
    complete_steps,
    find_checkpoints,
    prune,
    publish_step,
    read_manifest,
    record_file,
    step_name,
    step_of,
    sweep,
    verify_files,
    write_manifest,
)
from checkpoint.resuming import check_same_run
from checkpoint.run_folder import check_empty
from model import GPTConfig

MODEL = GPTConfig(2, 2, 64, 64)
ORDER = {"seed": 1337, "batch_tokens": 512, "seq_len": 64}


def save(checkpoints: Path, step: int) -> Path:
    partial = checkpoints / f"{step_name(step)}.tmp"
    partial.mkdir(parents=True)
    (partial / "a.pt").write_bytes(b"weights" * step)
    (partial / "b.pt").write_bytes(b"moments" * step)
    files = {name: record_file(partial / name) for name in ("a.pt", "b.pt")}
    manifest = Manifest(step, 2, 1, "bf16", "Adam", MODEL.__dict__, ORDER, files)
    return publish_step(partial, manifest)


def test_manifest_survives_the_disk(tmp_path: Path) -> None:
    folder = save(tmp_path, 250)
    manifest = read_manifest(folder)
    assert folder.name == "step_000250"
    assert (manifest.step, manifest.samples, manifest.zero_stage) == (250, 2000, 1)
    assert GPTConfig(**manifest.model) == MODEL
    assert json.loads((folder / "manifest.json").read_text())["samples"] == 8 * 250
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
        "step_000009",
        "step_000010",
        "step_1000000",
    ]
    assert find_checkpoints(tmp_path, "auto") == complete_steps(checkpoints)[::-1]


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


def test_the_newest_is_that_of_the_largest_step_whatever_the_clock_says(tmp_path: Path) -> None:
    older, newer = (save(tmp_path / "checkpoints", step) for step in (3, 6))
    os.utime(newer, (0, 0))
    assert find_checkpoints(tmp_path, "auto") == [newer, older]


@pytest.mark.parametrize("latest", [None, "", "step_000003", "step_000009", "../../x", "\0"])
def test_what_latest_says_decides_nothing(tmp_path: Path, latest: str | None) -> None:
    older, newer = (save(tmp_path / "checkpoints", step) for step in (3, 6))
    pointer = tmp_path / "checkpoints" / "latest"
    pointer.unlink()
    if latest is not None:
        pointer.write_text(latest)
    assert find_checkpoints(tmp_path, "auto") == [newer, older]


@pytest.mark.parametrize("name", ["../a.pt", "/etc/hostname", "..", ""])
def test_a_manifest_names_files_of_its_folder_only(tmp_path: Path, name: str) -> None:
    folder = save(tmp_path, 3)
    manifest = read_manifest(folder)
    files = manifest.files | {name: manifest.files["a.pt"]}
    write_manifest(folder, dataclasses.replace(manifest, files=files))
    with pytest.raises(ValueError, match=r"manifest\.json: damaged .*a file elsewhere"):
        read_manifest(folder)


def test_auto_starts_anew_only_where_there_is_no_checkpoint(tmp_path: Path) -> None:
    assert find_checkpoints(tmp_path, "auto") == []
    assert find_checkpoints(tmp_path, "none") == []
    (tmp_path / "checkpoints" / "step_000005.tmp").mkdir(parents=True)
    assert find_checkpoints(tmp_path, "auto") == []  # a first save that was killed
    with pytest.raises(
        ValueError, match=r"--resume none: .* is not an empty folder\. Fix: give another"
    ):
        check_empty(tmp_path, "--resume none")
    with pytest.raises(ValueError, match=r"--resume must: no checkpoint in "):
        find_checkpoints(tmp_path, "must")
    (tmp_path / "checkpoints" / "step_000005").mkdir()
    with pytest.raises(ValueError, match=r"step_000005: no manifest\.json"):
        find_checkpoints(tmp_path, "auto")


def test_another_run_is_refused_key_by_key(tmp_path: Path) -> None:
    manifest = read_manifest(save(tmp_path, 3))
    same: dict[str, Any] = {"precision": "bf16", "model": MODEL, "order": ORDER}
    check_same_run(manifest, **same)
    check_same_run(manifest, **dict(same, precision="autocast"))  # both have fp32 masters
    check_same_run(manifest, **dict(same, model=GPTConfig(2, 2, 64, 64, dropout=0.1)))
    with pytest.raises(ValueError, match=r"seed: 1337 -> 1, batch_tokens: 512 -> 1024"):
        check_same_run(manifest, **dict(same, order={"seed": 1, "batch_tokens": 1024}))
    with pytest.raises(ValueError, match=r"precision: bf16 -> fp32"):
        check_same_run(manifest, **dict(same, precision="fp32"))
    with pytest.raises(ValueError, match=r"n_layer: 2 -> 3"):
        check_same_run(manifest, **dict(same, model=GPTConfig(3, 2, 64, 64)))


def test_pruning_keeps_the_newest_and_the_milestones(tmp_path: Path) -> None:
    for step in range(1, 11):
        save(tmp_path, step)
    prune(tmp_path, keep=0, keep_every=4)
    assert len(complete_steps(tmp_path)) == 10
    prune(tmp_path, keep=2, keep_every=4)
    assert [step_of(p) for p in complete_steps(tmp_path)] == [4, 8, 9, 10]
    prune(tmp_path, keep=3, keep_every=0)
    assert [step_of(p) for p in complete_steps(tmp_path)] == [8, 9, 10]


@pytest.mark.parametrize(
    ("keep", "keep_every", "left"), [(0, 0, [1, 2, 4]), (2, 0, [2, 4]), (0, 3, [1, 2, 3, 4])]
)
def test_a_replaced_checkpoint_goes_and_does_not_count_among_those_to_keep(
    tmp_path: Path, keep: int, keep_every: int, left: list[int]
) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    for _ in range(2):  # one that is gone is no error
        prune(tmp_path, keep, keep_every, replaced_step=3)
        assert [step_of(p) for p in complete_steps(tmp_path)] == left


def test_what_interrupted_saves_left_is_swept(tmp_path: Path) -> None:
    folder = save(tmp_path, 3)
    for name in ("step_000004.tmp", "step_000002.deleted"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.pt").write_bytes(b"torn")
    sweep(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", folder.name]


def test_a_checkpoint_is_on_the_disk_before_its_name_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Power may fail between any two of these."""
    events = []
    fsync, replace, rename = os.fsync, Path.replace, Path.rename

    def record_sync(descriptor: int) -> None:
        events.append(("sync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        fsync(descriptor)

    def record_rename(path: Path, target: Path) -> Path:
        events.append(("name", Path(target).name))
        return (replace if path.is_file() else rename)(path, target)

    monkeypatch.setattr(os, "fsync", record_sync)
    monkeypatch.setattr(Path, "replace", record_rename)
    monkeypatch.setattr(Path, "rename", record_rename)
    save(tmp_path, 3)
    partial = "step_000003.tmp"
    assert events == [
        ("sync", "manifest.json.tmp"),
        ("name", "manifest.json"),
        ("sync", partial),
        ("name", "step_000003"),
        ("sync", tmp_path.name),
        ("sync", "latest.tmp"),
        ("name", "latest"),
        ("sync", tmp_path.name),
    ]
