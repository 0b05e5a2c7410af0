"""Write, find, verify and delete checkpoints: step folders with a manifest.

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

from errors import BadInput
from model import GPTConfig

MANIFEST = "manifest.json"
# By precision, what a parameter takes on disk: its weight and AdamW's fp32 state.
BYTES_PER_PARAMETER = {"fp32": 12, "autocast": 12, "bf16": 14}
LATEST = "latest"
PARTIAL_SUFFIX = ".tmp"
DELETED_SUFFIX = ".deleted"
STEP_NAME = re.compile(r"step_\d{6,}")


class UnknownFileError(BadInput):
    """A step folder holds a file that its manifest does not list."""


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
        world_size: Ranks that wrote it.
        zero_stage: 0 to 3.
        precision: "fp32", "autocast" or "bf16".
        optimizer: The classes of the engine's optimizer and of the one within.
        model: Fields of GPTConfig.
        order: What decides, besides `step`, on which tokens the next step is taken.
        files: Every other file of the folder, by name.
        partition: How the optimizer's flat tensors hold the weights; "": not recorded.
        fingerprints: Of each weight that the model computed with; empty: not recorded.
        unverified: Keys of the ds_config that were never verified.
    """

    step: int
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

    @property
    def samples(self) -> int:
        """Samples that all ranks have consumed: the state of the data loader.

        It follows from the step, because a run cannot be resumed with another batch.
        """
        return self.step * self.order["batch_tokens"] // self.order["seq_len"]


def step_name(step: int) -> str:
    """Return the folder name of a step."""
    return f"step_{step:06d}"


def step_of(folder: Path) -> int:
    """Return the step of a step folder."""
    return int(folder.name.removeprefix("step_"))


def checkpoint_bytes(precision: str, n_params: int) -> int:
    """Return what one checkpoint of a model takes on disk."""
    return BYTES_PER_PARAMETER[precision] * n_params


def record_file(path: Path) -> FileRecord:
    """Measure and hash one file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileRecord(path.stat().st_size, digest)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest: from here on the checkpoint is complete."""
    fields = {"samples": manifest.samples} | dataclasses.asdict(manifest)
    text = json.dumps({"sha256": _digest(fields)} | fields, indent=1)
    write_atomically(folder / MANIFEST, text)


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a step folder.

    Raises:
        BadInput: It is missing or damaged.
    """
    path = folder / MANIFEST
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if raw.pop("sha256") != _digest(raw):
            raise ValueError("SHA-256")
        raw.pop("samples")  # Manifest.samples computes it
        files = {name: FileRecord(**record) for name, record in raw.pop("files").items()}
        if not all(re.fullmatch(r"[\w.-]*\w", name) for name in files):
            raise ValueError("a file elsewhere")
        GPTConfig(**raw["model"])
        known = raw["precision"] in BYTES_PER_PARAMETER and raw["zero_stage"] in range(4)
        if not known or type(raw["world_size"]) is not int:
            raise ValueError("precision, zero_stage or world_size")
        return Manifest(**raw, files=files)
    except FileNotFoundError:
        raise BadInput(f"{folder}", f"has no {MANIFEST}: incomplete", "delete it") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, f"damaged ({error!r})") from error


def _digest(fields: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _damaged(path: Path, what: str) -> BadInput:
    remedy = f"rm -r {path.parent}, to resume from the checkpoint before it"
    return BadInput(f"{path}", what, remedy)


def writer_of(name: str) -> int:
    """Return the rank that wrote a file of a checkpoint: the first rank in its name."""
    found = re.search(r"rank_(\d+)", name)
    return int(found[1]) if found else 0


def verify_files(folder: Path, manifest: Manifest, rank: int = 0, world_size: int = 1) -> None:
    """Compare this rank's share of the files with the manifest, byte for byte.

    Raises:
        BadInput: A file is missing or damaged; names it.
        UnknownFileError: The manifest does not list a file. Hidden files do not count: operating
            and file systems leave them (.DS_Store, ._x, .nfs…).
    """
    extra = sorted({p.name for p in folder.glob("[!.]*")} - {MANIFEST, *manifest.files})
    if extra:
        where = f"{folder / extra[0]}"
        raise UnknownFileError(where, f"not in {MANIFEST}", "move it out of the folder")
    for name, record in manifest.files.items():
        path = folder / name
        if writer_of(name) % world_size != rank:
            continue
        if not path.is_file():
            raise _damaged(path, "missing")
        if record_file(path) != record:
            raise _damaged(path, "damaged (SHA-256)")


def complete_steps(checkpoints: Path) -> list[Path]:
    """Return the folders of complete checkpoints, oldest first."""
    return [folder for folder in _step_folders(checkpoints) if (folder / MANIFEST).is_file()]


def _step_folders(checkpoints: Path) -> list[Path]:
    folders = [p for p in checkpoints.glob("step_*") if STEP_NAME.fullmatch(p.name)]
    return sorted(folders, key=step_of)


def find_checkpoints(run_dir: Path, resume: str) -> list[Path]:
    """Return the step folders to resume from, the newest first; none to start a new run.

    Args:
        run_dir: The run.
        resume: "auto", "must" or "none".

    Raises:
        BadInput: "must" without a checkpoint, or all step folders are incomplete. Unfinished saves
            (.tmp) do not count.
    """
    if resume == "none":
        return []
    checkpoints = run_dir / "checkpoints"
    folders = _step_folders(checkpoints)
    complete = complete_steps(checkpoints)
    if folders and not complete:
        raise BadInput(f"{folders[-1]}", f"no {MANIFEST}", f"rm -r {folders[-1]}, for a new run")
    if resume == "must" and not complete:
        raise BadInput("--resume must", f"no checkpoint in {checkpoints}", "give --resume auto")
    return complete[::-1]


def newest_step(path: Path) -> Path:
    """Return `path` if it is a step folder; of a run folder the newest complete step.

    Raises:
        BadInput: It is neither.
    """
    if (path / MANIFEST).is_file():
        return path
    steps = complete_steps(path / "checkpoints")
    if not steps:
        what = "neither a step folder nor a run with a complete checkpoint"
        raise BadInput(f"--ckpt {path}", what, "give one of them")
    return steps[-1]


def sync(path: Path) -> None:
    """Flush a file's bytes, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, text: str) -> None:
    """Replace a small file: at any moment either its old or its new text is there."""
    partial = path.with_name(path.name + PARTIAL_SUFFIX)
    partial.write_text(text, encoding="utf-8")
    sync(partial)
    partial.replace(path)
    sync(path.parent)


def publish_step(partial: Path, manifest: Manifest) -> Path:
    """Turn a `.tmp` folder, its files flushed, into the checkpoint that `latest` names."""
    write_manifest(partial, manifest)
    folder = partial.with_name(partial.name.removesuffix(PARTIAL_SUFFIX))
    if folder.exists():  # damaged: the run went back to an older one and came here again
        delete_step(folder)
    partial.rename(folder)
    sync(folder.parent)
    write_atomically(folder.parent / LATEST, folder.name)
    return folder


def prune(checkpoints: Path, keep: int, keep_every: int, replaced_step: int = 0) -> None:
    """Delete all but the newest `keep` checkpoints and the multiples of `keep_every` steps.

    With `keep` 0 all but that of `replaced_step` are kept, which never counts among the newest;
    with `keep_every` 0 there are no such multiples.
    """
    folders = complete_steps(checkpoints)
    kept = [folder for folder in folders if step_of(folder) != replaced_step][-keep:]
    for folder in [folder for folder in folders if folder not in kept]:
        if not keep_every or step_of(folder) % keep_every:
            delete_step(folder)


def delete_step(folder: Path) -> None:
    """Delete a checkpoint; it ceases to be one before its first file is deleted."""
    deleted = folder.with_name(folder.name + DELETED_SUFFIX)
    shutil.rmtree(deleted, ignore_errors=True)
    folder.rename(deleted)
    sync(folder.parent)
    shutil.rmtree(deleted, ignore_errors=True)  # files still open elsewhere: at the next start


def sweep(checkpoints: Path) -> None:
    """Delete what interrupted saves and deletions left; no other process may be writing."""
    for suffix in (PARTIAL_SUFFIX, DELETED_SUFFIX):
        for folder in checkpoints.glob(f"step_*{suffix}"):
            shutil.rmtree(folder, ignore_errors=True)
