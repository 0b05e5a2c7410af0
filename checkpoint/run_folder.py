"""Lock a run folder, check its disk space, and record the run's outcome in run_status.json."""

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
from errors import BadInput

LOCK = "lock"
STATUS = "run_status.json"
MAX_RESTARTS = 3  # without a further checkpoint


def check_empty(folder: Path, flag: str) -> None:
    """Refuse a file, and a folder that is not empty; hidden files do not count.

    Raises:
        BadInput: Names `flag` and the folder.
    """
    is_file = folder.exists() and not folder.is_dir()
    if is_file or any(folder.glob("[!.]*")):
        raise BadInput(flag, f"{folder} is not an empty folder", "give another")


def check_not_lost(run_dir: Path) -> None:
    """Refuse to start a new run where a run saved checkpoints that are gone.

    Raises:
        BadInput: Its log is beyond its first checkpoint; names the folder.
    """
    try:
        every = read_json(run_dir / "config.json")["checkpoint_every"]
        lines = (run_dir / "log.txt").read_text(encoding="utf-8").splitlines()
        last = max((int(line.split()[0]) for line in lines), default=0)
    except (OSError, ValueError, KeyError, IndexError):
        return  # no run, or one that had not begun
    if read_json(run_dir / STATUS).get("status") == "finished" or last >= every:
        what = f"its log is at step {last}, but its checkpoints are gone"
        raise BadInput(f"{run_dir}", what, "put them back, or give another --run_dir")


def refuse_links(run_dir: Path) -> None:
    """Refuse symbolic links in a run folder: the run would write through them, to other folders.

    Raises:
        BadInput: Names the first.
    """
    paths = (*run_dir.glob("*"), *(run_dir / "checkpoints").glob("*"))
    links = [path for path in paths if path.is_symlink()]
    if links:
        raise BadInput(f"{links[0]}", "a symbolic link", "delete it (--run_dir itself may be one)")


def check_run_dir(run_dir: Path, needed_bytes: int, resume_step: int) -> list[int]:
    """Check that a run can write into its folder, which need not exist; write nothing.

    Args:
        run_dir: Of the run.
        needed_bytes: Disk space that a checkpoint takes.
        resume_step: The step from which the run goes on.

    Returns:
        As `count_starts`.

    Raises:
        BadInput: Another run has locked it, it holds symbolic links, or MAX_RESTARTS is exceeded.
        OSError: It cannot be written, or has no disk space for a checkpoint.
    """
    folder = next(path for path in (run_dir, *run_dir.parents) if path.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise OSError(f"--run_dir {run_dir}: {folder} cannot be written. Fix: give another folder")
    refuse_links(run_dir)
    if (run_dir / LOCK).exists():
        with (run_dir / LOCK).open(encoding="utf-8") as lock:
            _lock(lock, run_dir)
    unfinished = run_dir.glob("checkpoints/step_*.*/*")  # `sweep` deletes them
    free = shutil.disk_usage(folder).free + sum(file.stat().st_size for file in unfinished)
    if free < needed_bytes:
        raise OSError(
            f"--run_dir {run_dir}: {free / 1e9:.2f} GB are free, a checkpoint takes "
            f"{needed_bytes / 1e9:.2f}. Fix: free disk space or give another folder"
        )
    return count_starts(run_dir, resume_step)


def lock_run_dir(run_dir: Path, starts: list[int]) -> IO[str]:
    """Lock the folder until the returned file is closed or this process ends; status "running".

    Args:
        run_dir: Created if it does not exist; what an interrupted save left in it is deleted.
        starts: What `check_run_dir` returned.

    Raises:
        BadInput: Another run has locked it.
        OSError: It cannot be written.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as undo:
        lock = undo.enter_context((run_dir / LOCK).open("a+", encoding="utf-8"))
        _lock(lock, run_dir)
        lock.truncate(0)
        lock.write(f"process {os.getpid()} of {socket.gethostname()} since {time.ctime()}\n")
        lock.flush()
        os.fsync(lock.fileno())
        sweep(run_dir / "checkpoints")
        write_status(run_dir, "running", starts=starts)
        undo.pop_all()  # the lock is kept
    return lock


def _lock(lock: IO[str], run_dir: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        what = f"in use by {lock.read().strip() or 'another run'}"
        remedy = "stop that run, or give another folder"
        raise BadInput(f"--run_dir {run_dir}", what, remedy) from None
    except OSError as error:  # a file system without locks
        print(f"warning: {lock.name}: {error.strerror}; start no second run here", file=sys.stderr)


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Replace a small JSON file atomically."""
    write_atomically(path, json.dumps(values, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a small JSON file; {} if it is missing or damaged."""
    with contextlib.suppress(OSError, ValueError):
        values = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(values, dict):
            return values
    return {}


def write_status(run_dir: Path, status: str, **more: Any) -> None:
    """Replace `run_status.json`: running, finished, preempted, failed, hung or diverged."""
    old = read_json(run_dir / STATUS)
    kept = {"starts": old.get("starts", []), "exit_status": None, "reason": None}
    now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    write_json(run_dir / STATUS, kept | {"status": status, "time": now} | more)


def count_starts(run_dir: Path, resume_step: int) -> list[int]:
    """Return the steps at which the last starts began that crashed, and the step of this one.

    Raises:
        BadInput: MAX_RESTARTS restarts from this step have saved no further checkpoint.
    """
    old = read_json(run_dir / STATUS)
    if old.get("status") == "running":  # but nobody holds the lock
        what = f"the run that began at {old.get('time')} was killed, it seems"
        print(f"warning: {run_dir}: {what}; going on from step {resume_step}", file=sys.stderr)
    crashed = old.get("status") in ("running", "hung", "failed", "diverged")
    starts = old.get("starts", []) if crashed else []
    if old.get("status") == "diverged":  # its last steps changed no weight: they are no progress
        starts = [resume_step for _ in starts]
    starts = [*starts, resume_step]
    if starts.count(resume_step) > 1 + MAX_RESTARTS:
        reason = old.get("reason") or "killed"
        what = f"{MAX_RESTARTS} restarts from step {resume_step} came to no checkpoint ({reason})"
        raise BadInput(f"{run_dir / STATUS}", what, "fix the cause, then delete this file")
    return starts
