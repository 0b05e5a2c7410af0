"""A checkpoint exists if and only if its manifest does.

checkpoints/step_000250/   the engine's files + manifest.json, written last
checkpoints/latest         the name of the newest complete one, replaced atomically
"""

import dataclasses
import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model import GPTConfig

MANIFEST = "manifest.json"
PRECISIONS = ("fp32", "autocast", "bf16")
LATEST = "latest"
PARTIAL_SUFFIX = ".tmp"
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
        model: Fields of GPTConfig.
        files: Every other file of the folder, by name.
    """

    step: int
    samples: int
    world_size: int
    zero_stage: int
    precision: str
    model: dict[str, Any]
    files: dict[str, FileRecord]


def step_name(step: int) -> str:
    """Return the folder name of a step."""
    return f"step_{step:06d}"


def record_file(path: Path) -> FileRecord:
    """Measure and hash one file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileRecord(path.stat().st_size, digest)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest: from here on the checkpoint is complete."""
    text = json.dumps(dataclasses.asdict(manifest), indent=1)
    write_atomically(folder / MANIFEST, text)


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a step folder.

    Raises:
        ValueError: There is none, or it is not one; names the file.
    """
    path = folder / MANIFEST
    try:
        raw = json.loads(path.read_text())
        files = {name: FileRecord(**record) for name, record in raw.pop("files").items()}
        GPTConfig(**raw["model"])
        known = raw["precision"] in PRECISIONS and raw["zero_stage"] in range(4)
        if not known or type(raw["world_size"]) is not int:
            raise ValueError("precision, zero_stage or world_size")
        return Manifest(**raw, files=files)
    except FileNotFoundError:
        raise ValueError(f"{folder}: no {MANIFEST}: not a complete checkpoint") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: damaged ({error!r}); delete {folder} to go back one") from error


def verify_files(folder: Path, manifest: Manifest, rank: int = 0, world_size: int = 1) -> None:
    """Compare this rank's share of the files with the manifest, byte for byte.

    Raises:
        ValueError: A file is missing or altered; names it.
    """
    for name in sorted(manifest.files)[rank::world_size]:
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{path}: missing; delete {folder} to go back one checkpoint")
        if record_file(path) != manifest.files[name]:
            raise ValueError(
                f"{path}: damaged (SHA-256); delete {folder} to go back one checkpoint"
            )


def complete_steps(checkpoints: Path) -> list[Path]:
    """Return the folders of complete checkpoints, oldest first."""
    folders = [p for p in checkpoints.glob("step_*") if STEP_NAME.fullmatch(p.name)]
    complete = [p for p in folders if (p / MANIFEST).is_file()]
    return sorted(complete, key=lambda p: int(p.name.removeprefix("step_")))


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
            f"--ckpt {path}: neither a step folder nor a run with a complete checkpoint"
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
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    sync_folder(path.parent)


def publish(partial: Path, manifest: Manifest) -> Path:
    """Turn a finished `.tmp` folder into the checkpoint that `latest` names; return it."""
    for name in manifest.files:
        sync_file(partial / name)
    write_manifest(partial, manifest)
    folder = partial.with_name(partial.name.removesuffix(PARTIAL_SUFFIX))
    partial.rename(folder)
    sync_folder(folder.parent)
    write_atomically(folder.parent / LATEST, folder.name)
    return folder
