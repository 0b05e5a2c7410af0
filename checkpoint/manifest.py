"""A checkpoint exists if and only if its manifest does.

checkpoints/step_000250/   the engine's files + manifest.json, written last
checkpoints/latest         the name of the newest complete one, replaced atomically
"""

import dataclasses
import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from model import GPTConfig

MANIFEST = "manifest.json"
# By precision, what a parameter takes on disk: its weight and AdamW's fp32 state.
BYTES_PER_PARAMETER = {"fp32": 12, "autocast": 12, "bf16": 14}
LATEST = "latest"
PARTIAL_SUFFIX = ".tmp"
DELETED_SUFFIX = ".deleted"
STEP_NAME = re.compile(r"step_\d{6,}")


@dataclass(frozen=True)
class FileRecord:
    """One file of a checkpoint."""

    n_bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds.

    Args:
        step: Optimizer updates done.
        samples: Samples consumed by all ranks: the loader's whole state.
        world_size: Ranks that wrote it.
        zero_stage: 0 to 3.
        precision: "fp32", "autocast" or "bf16".
        optimizer: The classes of the engine's optimizer and of the one within.
        partition: How the optimizer's flat tensors hold the weights; "": not recorded.
        model: Fields of GPTConfig.
        order: What decides, besides `samples`, on which tokens the next step is taken.
        files: Every other file of the folder, by name.
        fingerprints: Of each weight that the model computed with; empty: not recorded.
        unverified: Keys of the ds_config that were never verified.
    """

    step: int
    samples: int
    world_size: int
    zero_stage: int
    precision: str
    optimizer: str
    model: dict[str, Any]
    order: dict[str, Any]
    files: dict[str, FileRecord]
    partition: str = ""
    fingerprints: dict[str, str] = field(default_factory=dict)
    unverified: list[str] = field(default_factory=list)


def step_name(step: int) -> str:
    """Return the folder name of a step."""
    return f"step_{step:06d}"


def step_of(folder: Path) -> int:
    """Return the step of a step folder."""
    return int(folder.name.removeprefix("step_"))


def record_file(path: Path) -> FileRecord:
    """Measure and hash one file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileRecord(path.stat().st_size, digest)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest: from here on the checkpoint is complete."""
    fields = dataclasses.asdict(manifest)
    text = json.dumps({"sha256": _digest(fields)} | fields, indent=1)
    write_atomically(folder / MANIFEST, text)


def _digest(fields: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def checkpoint_bytes(precision: str, n_params: int) -> int:
    """Return what one checkpoint of a model takes on disk."""
    return BYTES_PER_PARAMETER[precision] * n_params


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a step folder.

    Raises:
        ValueError: There is none, or it is not one; names the file.
    """
    path = folder / MANIFEST
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if raw.pop("sha256") != _digest(raw):
            raise ValueError("SHA-256")
        files = {name: FileRecord(**record) for name, record in raw.pop("files").items()}
        if not all(re.fullmatch(r"[\w.-]*\w", name) for name in files):
            raise ValueError("a file elsewhere")
        GPTConfig(**raw["model"])
        known = raw["precision"] in BYTES_PER_PARAMETER and raw["zero_stage"] in range(4)
        if not known or type(raw["world_size"]) is not int:
            raise ValueError("precision, zero_stage or world_size")
        return Manifest(**raw, files=files)
    except FileNotFoundError:
        raise ValueError(f"{folder}: no {MANIFEST}: incomplete. Fix: delete it") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: damaged ({error!r}). Fix: rm -r {folder}, to go back") from error


def writer_of(name: str) -> int:
    """Return the rank that wrote a file of a checkpoint: the first that its name bears."""
    found = re.search(r"rank_(\d+)", name)
    return int(found[1]) if found else 0


def unknown_files(folder: Path, manifest: Manifest) -> list[Path]:
    """Return the files that the manifest does not list.

    Hidden ones are ignored: operating and file systems leave them (.DS_Store, ._x, .nfs…).
    """
    known = {MANIFEST, *manifest.files}
    found = [p for p in folder.iterdir() if p.name not in known and not p.name.startswith(".")]
    return sorted(found)


def verify_files(folder: Path, manifest: Manifest, rank: int = 0, world_size: int = 1) -> None:
    """Compare this rank's share of the files with the manifest, byte for byte.

    Raises:
        ValueError: A file is missing, altered or unknown; names it.
    """
    extra = unknown_files(folder, manifest)
    if extra:
        raise ValueError(f"{extra[0]}: not in {MANIFEST}. Fix: move it out of the folder")
    for name in manifest.files:
        path = folder / name
        if writer_of(name) % world_size != rank:
            continue
        if not path.is_file():
            raise ValueError(f"{path}: missing. Fix: rm -r {folder}, to go back")
        if record_file(path) != manifest.files[name]:
            raise ValueError(f"{path}: damaged (SHA-256). Fix: rm -r {folder}, to go back")


def complete_steps(checkpoints: Path) -> list[Path]:
    """Return the folders of complete checkpoints, oldest first."""
    folders = [p for p in checkpoints.glob("step_*") if STEP_NAME.fullmatch(p.name)]
    complete = [p for p in folders if (p / MANIFEST).is_file()]
    return sorted(complete, key=step_of)


def newest_step(path: Path) -> Path:
    """Return the step folder that `path` is, or the newest complete one of the run that it is.

    Raises:
        ValueError: Neither.
    """
    if (path / MANIFEST).is_file():
        return path
    steps = complete_steps(path / "checkpoints")
    if not steps:
        raise ValueError(
            f"--ckpt {path}: neither a step folder nor a run with a complete checkpoint. "
            "Fix: give one of them"
        )
    return steps[-1]


def incomplete_steps(checkpoints: Path) -> list[Path]:
    """Return the step folders without a manifest, unfinished saves (.tmp) left out."""
    folders = [p for p in checkpoints.glob("step_*") if STEP_NAME.fullmatch(p.name)]
    return sorted(p for p in folders if not (p / MANIFEST).is_file())


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Flush a file's bytes to the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def write_atomically(path: Path, text: str) -> None:
    """Replace a small file: its old or its new text is there at any moment."""
    partial = path.with_name(path.name + PARTIAL_SUFFIX)
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    sync_folder(path.parent)


def publish(partial: Path, manifest: Manifest) -> Path:
    """Turn a `.tmp` folder, its files on the disk, into the checkpoint that `latest` names."""
    write_manifest(partial, manifest)
    folder = partial.with_name(partial.name.removesuffix(PARTIAL_SUFFIX))
    if folder.exists():  # damaged: the run went back behind it
        delete_step(folder)
    partial.rename(folder)
    sync_folder(folder.parent)
    write_atomically(folder.parent / LATEST, folder.name)
    return folder


def prune(checkpoints: Path, keep: int, keep_every: int) -> None:
    """Delete all but the newest `keep` checkpoints (0: none) and those of `keep_every` steps."""
    for folder in complete_steps(checkpoints)[:-keep] if keep else []:
        if not keep_every or step_of(folder) % keep_every:
            delete_step(folder)


def delete_step(folder: Path) -> None:
    """Delete a checkpoint; it ceases to be one before its first file goes."""
    deleted = folder.with_name(folder.name + DELETED_SUFFIX)
    shutil.rmtree(deleted, ignore_errors=True)
    folder.rename(deleted)
    sync_folder(folder.parent)
    shutil.rmtree(deleted, ignore_errors=True)  # what somebody still holds goes at the next start


def sweep(checkpoints: Path) -> None:
    """Delete what an interrupted save or deletion left; nobody may be writing."""
    for suffix in (PARTIAL_SUFFIX, DELETED_SUFFIX):
        for folder in checkpoints.glob(f"step_*{suffix}"):
            shutil.rmtree(folder, ignore_errors=True)
