"""The run folder as the property of one run at a time: its lock, its room, how the run stands."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import socket
import sys
import time
from pathlib import Path
from typing import IO, Any

from checkpoint.manifest import sweep, write_atomically

LOCK, STATUS = "lock", "run_status.json"
MAX_RESTARTS = 3  # without one more checkpoint


def check_unused(run_dir: Path) -> None:
    """Refuse a folder in which something is, but for hidden files.

    Raises:
        ValueError: Names it.
    """
    if run_dir.is_dir() and any(not path.name.startswith(".") for path in run_dir.iterdir()):
        raise ValueError(f"--resume none: {run_dir} is not empty. Fix: give another --run_dir")


def check_not_lost(run_dir: Path) -> None:
    """Refuse to begin anew where a run has saved checkpoints that are gone.

    Raises:
        ValueError: Its log is beyond its first checkpoint; names the folder.
    """
    try:
        config = json.loads((run_dir / "config.json").read_text(encoding="utf-8"))
        every = config["checkpoint_every"]
        lines = (run_dir / "log.txt").read_text(encoding="utf-8").splitlines()
        steps = [int(line.split()[0]) for line in lines]
    except (OSError, ValueError, KeyError, IndexError):
        return  # no run, or one that had not begun
    if read_status(run_dir).get("status") == "finished" or max(steps, default=0) >= every:
        raise ValueError(
            f"{run_dir}: its log is at step {max(steps, default=0)}, its checkpoints are gone. "
            "Fix: put them back, or give another --run_dir"
        )


def refuse_links(run_dir: Path) -> None:
    """Refuse symbolic links in a run folder: it may be somebody else's, and is written to.

    Raises:
        ValueError: Names the first.
    """
    for path in (*run_dir.glob("*"), *(run_dir / "checkpoints").glob("*")):
        if path.is_symlink():
            raise ValueError(f"{path}: a symbolic link. Fix: delete it (--run_dir may be one)")


def lock_run_dir(run_dir: Path, needed_bytes: int, resume_step: int) -> IO[str]:
    """Make the folder this process's alone until the returned file is closed, or it dies.

    `run_status.json` says "running" then.

    Args:
        run_dir: Made if it is not there; what an interrupted save left in it is deleted.
        needed_bytes: Of the first checkpoint.
        resume_step: From which the run goes on.

    Raises:
        ValueError: Another run writes there, it holds symbolic links, or restarts lead nowhere.
        OSError: It cannot be written, or there is no room for a checkpoint.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"--run_dir {run_dir}: {error.strerror}. Fix: give another folder") from error
    refuse_links(run_dir)
    with contextlib.ExitStack() as undo:
        lock = undo.enter_context((run_dir / LOCK).open("a+", encoding="utf-8"))
        _lock(lock, run_dir)
        sweep(run_dir / "checkpoints")
        free = shutil.disk_usage(run_dir).free
        if free < needed_bytes:
            raise OSError(
                f"--run_dir {run_dir}: {free / 2**30:.2f} GiB are free, a checkpoint takes "
                f"{needed_bytes / 2**30:.2f}. Fix: make room or give another folder"
            )
        write_status(run_dir, "running", starts=count_starts(run_dir, resume_step))
        undo.pop_all()  # it stays locked
    return lock


def _lock(lock: IO[str], run_dir: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        raise ValueError(
            f"--run_dir {run_dir}: in use by {lock.read().strip() or 'another run'}. "
            "Fix: stop that run, or give another folder"
        ) from None
    except OSError as error:
        print(f"warning: {lock.name}: {error.strerror}; start no second run here", file=sys.stderr)
    lock.truncate(0)
    lock.write(f"process {os.getpid()} of {socket.gethostname()} since {time.ctime()}\n")
    lock.flush()
    os.fsync(lock.fileno())


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Replace a small file of the run: its old or its new text is there at any moment."""
    write_atomically(path, json.dumps(values, indent=2) + "\n")


def read_status(run_dir: Path) -> dict[str, Any]:
    """Return what `run_status.json` says; nothing where there is none or it is not one."""
    with contextlib.suppress(OSError, ValueError):
        status = json.loads((run_dir / STATUS).read_text(encoding="utf-8"))
        if isinstance(status, dict):
            return status
    return {}


def write_status(run_dir: Path, status: str, **more: Any) -> None:
    """Replace `run_status.json`: running, finished, preempted, failed, hung or diverged."""
    old = read_status(run_dir)
    kept = {"starts": old.get("starts", []), "exit_status": None, "reason": None}
    now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    write_json(run_dir / STATUS, kept | {"status": status, "time": now} | more)


def count_starts(run_dir: Path, resume_step: int) -> list[int]:
    """Return the steps of the starts that ended without notice, the last ones, and of this one.

    Raises:
        ValueError: MAX_RESTARTS restarts from this step have come no checkpoint further.
    """
    old = read_status(run_dir)
    if old.get("status") == "running":  # nobody holds the lock: it is gone
        what = f"the run that began at {old.get('time')} was killed, it seems"
        print(f"warning: {run_dir}: {what}; going on from step {resume_step}", file=sys.stderr)
    crashed = old.get("status") in ("running", "hung", "failed", "diverged")
    starts = old.get("starts", []) if crashed else []
    if old.get("status") == "diverged":  # its steps changed no weight: they are no progress
        starts = [resume_step for _ in starts]
    starts = [*starts, resume_step]
    if starts.count(resume_step) > 1 + MAX_RESTARTS:
        raise ValueError(
            f"{run_dir / STATUS}: {MAX_RESTARTS} restarts from step {resume_step} came to no "
            f"checkpoint ({old.get('reason') or 'killed'}). "
            "Fix: mend the cause, then delete this file"
        )
    return starts
