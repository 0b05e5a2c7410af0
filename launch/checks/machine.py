"""What one rank reads about its machine and its folders, as JSON values (launch/preflight.py)."""

from __future__ import annotations

import errno
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import resource
import shutil
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from checkpoint.manifest import checkpoint_bytes
from launch.planning.fitting import advice, plan_here
from training.config import to_json
from training.credentials import refuse_credentials
from training.devices import machine_bytes
from training.ds_config import precision
from training.extension_locks import check_extension_locks
from training.rendezvous import choose_device
from training.run import Run
from training.supervise import error_line

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "deepspeed", "numpy", "tiktoken")
# Those of launch/environment.py that must be the same everywhere; none of them is a credential.
VARIABLES = ("NCCL_", "TORCH_NCCL_", "GLOO_", "OMP_NUM_THREADS", "DS_ACCELERATOR")


def look(run: Run) -> dict[str, Any]:
    """Return what this rank finds by itself; under "errors" what it could not, by check."""
    reads: dict[str, Callable[[Run], Any]] = {
        "device": read_device,
        "versions": read_versions,
        "flags": read_flags,
        "variables": read_variables,
        "names": resolve_names,
        "shards": read_shards,
        "run folder": read_room,
        "limits": read_limits,
        "jit locks": read_locks,
        "plan": read_plan,
    }
    found: dict[str, Any] = {"errors": {}}
    for check, read in reads.items():
        try:
            found[check] = read(run)
        except (ValueError, OSError, RuntimeError) as error:  # the last is CUDA's
            found["errors"][check] = error_line(error)
    return found


def read_device(run: Run) -> dict[str, str]:
    """Return the kind and the name of the device that this rank computes on.

    Raises:
        ValueError: As training.rendezvous.choose_device does.
    """
    device = choose_device(run.ranks)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {"kind": device.type, "name": name}


def read_versions(_: Run) -> dict[str, str]:
    """Return the versions of all that decides on a result, and a hash of our own code."""
    versions = {"python": platform.python_version()}
    versions |= {name: read_version(name) for name in PACKAGES}
    versions |= {"commit": read_commit(), "code": hash_code()}
    if torch.cuda.is_available():
        from torch.cuda import nccl

        versions |= {"CUDA": str(torch.version.cuda), "NCCL": ".".join(map(str, nccl.version()))}
    return versions


def read_version(package: str) -> str:
    """Return the version of a package, without importing it."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def read_commit() -> str:
    """Return the commit of this checkout, "none" without git or where it is not one."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    if not shutil.which("git"):
        return "none"
    return subprocess.run(command, capture_output=True, encoding="utf-8").stdout.strip() or "none"


def hash_code() -> str:
    """Return a hash of the files that train.py runs: also without git, and of changes."""
    digest = hashlib.sha256()
    rooms = ("model", "data", "checkpoint", "training", "eval", "launch")
    paths = [*ROOT.glob("train.py"), *ROOT.glob("ds_configs/*.json")]
    for path in sorted([*paths, *(p for room in rooms for p in (ROOT / room).rglob("*.py"))]):
        digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def read_flags(run: Run) -> dict[str, str]:
    """Return every value of the resolved run but its folders, which may be mounted elsewhere.

    Raises:
        ValueError: One is a credential.
    """
    flags = to_json(run.config)
    refuse_credentials(flags, "--")
    engine = json.dumps(run.ds_config, sort_keys=True).encode()
    flags["ds_config"] = hashlib.sha256(engine).hexdigest()[:12]
    return {k: str(v) for k, v in flags.items() if k not in ("data_dir", "run_dir", "init_from")}


def read_variables(_: Run) -> dict[str, str]:
    """Return the variables of this process that the libraries of all ranks must agree about."""
    return {k: v for k, v in sorted(os.environ.items()) if k.startswith(VARIABLES)}


def resolve_names(run: Run) -> list[str]:
    """Return the addresses that this machine's own name stands for.

    Raises:
        OSError: It, or rank 0's, stands for none.
    """
    del run
    addresses: list[str] = []
    for name in (os.environ["MASTER_ADDR"], socket.gethostname()):
        try:
            addresses = sorted({str(info[4][0]) for info in socket.getaddrinfo(name, None)})
        except socket.gaierror as error:
            raise OSError(
                f"{name}: does not resolve ({error.strerror}). Fix: add it to DNS or /etc/hosts"
            ) from error
    return addresses


def read_shards(run: Run) -> dict[str, str]:
    """Return the fingerprint of each split; with --verify every byte is compared before.

    Raises:
        ValueError: As data.shards.TokenStream does, or too few tokens for --eval_tokens.
    """
    from data.shards import SPLITS, TokenStream, require_targets

    config, verify = run.config, run.config.verify and run.ranks.local_rank == 0
    streams = {
        split: TokenStream(config.data_dir, split, config.gpt_config.vocab_size, verify)
        for split in SPLITS
    }
    require_targets(streams["val"], config.eval_tokens)
    return {split: stream.fingerprint()[:12] for split, stream in streams.items()}


def read_room(run: Run) -> dict[str, int]:
    """Return the bytes that the run may fill, with what it has, and those that it will.

    Raises:
        OSError: It cannot be written to.
    """
    run_dir, host = run.config.run_dir, socket.gethostname()
    path = run_dir / f".preflight-{host}-{run.ranks.rank}"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        try:
            with path.open("wb") as file:
                file.write(bytes(resource.getpagesize()))
                os.fsync(file.fileno())
        finally:
            path.unlink(missing_ok=True)
    except OSError as error:
        what = f"{run_dir} cannot be written to: {error.strerror}"
        remedy = "make room" if error.errno in (errno.ENOSPC, errno.EFBIG) else "see who may"
        raise OSError(f"{what}. Fix: {remedy}, or give another --run_dir") from error
    saved = sum(p.stat().st_size for p in run_dir.glob("checkpoints/step_*/*"))
    free = shutil.disk_usage(run_dir).free
    return {"room_bytes": free + saved, "needed_bytes": needed_bytes(run)}


def needed_bytes(run: Run) -> int:
    """Return what all checkpoints that are kept take, and one that is being written."""
    config = run.config
    saves = math.ceil(config.max_steps / config.checkpoint_every)
    kept = min(config.keep_checkpoints or saves, saves)
    one = checkpoint_bytes(precision(run.ds_config), config.gpt_config.n_params())
    return (kept + 1) * one


def read_limits(run: Run) -> dict[str, int]:
    """Return this process's limits, and the shards that it will hold open."""
    shm = Path("/dev/shm")
    return {
        "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],  # -1: no limit
        "memlock_bytes": resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
        "shm_bytes": shutil.disk_usage(shm).free if shm.is_dir() else 0,
        "has_infiniband": any(Path("/sys/class/infiniband").glob("*")),
        "shards": sum(p.suffix in (".npy", ".bin") for p in run.config.data_dir.glob("*")),
    }


def read_locks(run: Run) -> str:
    """Return "none".

    Raises:
        ValueError: As training.extension_locks.check_extension_locks does.
    """
    check_extension_locks(run.ranks)
    return "none"


def read_plan(run: Run) -> str:
    """Return "fits".

    Raises:
        ValueError: The plan says that the run does not; names the nearest setting that does.
    """
    if warning := advice(plan_here(run, choose_device(run.ranks))):
        raise ValueError(warning)
    return "fits"


def read_memory(device: torch.device) -> int:
    """Return the bytes that are free on a GPU, or that the machine lets this process have."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return machine_bytes()
