"""Read this rank's machine and folders, as JSON values; raise what is wrong with them."""

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
import tempfile
from pathlib import Path

import torch

from checkpoint.manifest import checkpoint_bytes
from data.shards import SPLITS, TokenStream, require_targets
from errors import BadInput
from launch.planning.fitting import advice, plan_here
from training.config import to_json
from training.credentials import refuse_credentials
from training.devices import machine_bytes
from training.ds_config import precision
from training.rendezvous import choose_device
from training.run import Run

ROOT = Path(__file__).resolve().parents[2]
CODE = ("model", "data", "checkpoint", "training", "eval", "launch")
PACKAGES = ("torch", "deepspeed", "numpy", "tiktoken")
FOLDERS = ("data_dir", "run_dir", "init_from")  # may be mounted elsewhere on another machine
# Those of launch/environment.py that must be the same everywhere; none of them is a credential.
VARIABLES = ("NCCL_", "TORCH_NCCL_", "GLOO_", "OMP_NUM_THREADS", "DS_ACCELERATOR")


def read_device(run: Run) -> dict[str, str]:
    """Return the kind and the name of the device that this rank computes on."""
    device = choose_device(run.ranks)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {"kind": device.type, "name": name}


def read_versions(_: Run) -> dict[str, str]:
    """Return the versions of all that decides on a result, and a hash of our own code."""
    versions = {"python": platform.python_version(), "commit": _read_commit(), "code": _hash_code()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    if torch.cuda.is_available():
        from torch.cuda import nccl

        versions |= {"CUDA": str(torch.version.cuda), "NCCL": ".".join(map(str, nccl.version()))}
    return versions


def _read_commit() -> str:
    if not shutil.which("git"):
        return "none"
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8")
    return done.stdout.strip() or "none"  # the folder may be no checkout


def _hash_code() -> str:
    # Of the files that train.py runs: it tells of changes, and is there without git, too.
    paths = [*ROOT.glob("*.py"), *ROOT.glob("ds_configs/*.json")]
    for folder in CODE:
        paths += (ROOT / folder).rglob("*.py")
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def read_flags(run: Run) -> dict[str, str]:
    """Return every value of the resolved run but its folders.

    Raises:
        BadInput: One is a credential, which must not be sent to other machines.
    """
    flags = to_json(run.config)
    refuse_credentials(flags, "--")
    ds_config = json.dumps(run.ds_config, sort_keys=True).encode()
    flags["ds_config"] = hashlib.sha256(ds_config).hexdigest()[:12]
    return {name: str(value) for name, value in flags.items() if name not in FOLDERS}


def read_variables(_: Run) -> dict[str, str]:
    """Return the variables of this process that the libraries of all ranks must agree about."""
    return {k: v for k, v in sorted(os.environ.items()) if k.startswith(VARIABLES)}


def read_addresses(_: Run) -> list[str]:
    """Return the addresses that this machine's own name resolves to.

    Raises:
        BadInput: It, or rank 0's name, does not resolve.
    """
    addresses: list[str] = []
    for name in (os.environ["MASTER_ADDR"], socket.gethostname()):
        try:
            addresses = sorted({str(info[4][0]) for info in socket.getaddrinfo(name, None)})
        except socket.gaierror as error:
            what = f"does not resolve ({error.strerror})"
            raise BadInput(name, what, "add it to DNS or /etc/hosts") from error
    return addresses


def read_shards(run: Run) -> dict[str, str]:
    """Return the fingerprint of each split; with --verify every byte is compared before."""
    config = run.config
    verify = config.verify and run.ranks.local_rank == 0  # once on each machine
    vocab_size = config.gpt_config.vocab_size
    streams = {split: TokenStream(config.data_dir, split, vocab_size, verify) for split in SPLITS}
    require_targets(streams["val"], config.eval_tokens, run.is_eval_given)
    return {split: stream.fingerprint()[:12] for split, stream in streams.items()}


def read_disk_space(run: Run) -> dict[str, int]:
    """Return free bytes plus those of the run's checkpoints, and the bytes that all will need.

    Raises:
        BadInput: The run folder cannot be written to.
    """
    run_dir = run.config.run_dir
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        # Unbuffered: on a full disk an empty file can be made, and only its first byte fails.
        with tempfile.NamedTemporaryFile("w+b", 0, prefix=".preflight-", dir=run_dir) as file:
            file.write(bytes(resource.getpagesize()))
            os.fsync(file.fileno())
    except OSError as error:
        is_full = error.errno in (errno.ENOSPC, errno.EFBIG)
        remedy = "free disk space" if is_full else "check its permissions"
        what = f"cannot be written to: {error.strerror}"
        raise BadInput(str(run_dir), what, f"{remedy}, or give another --run_dir") from error
    saved = sum(path.stat().st_size for path in run_dir.glob("checkpoints/step_*/*"))
    free_bytes = shutil.disk_usage(run_dir).free + saved
    return {"free_bytes": free_bytes, "needed_bytes": needed_bytes(run)}


def needed_bytes(run: Run) -> int:
    """Return what all checkpoints that are kept take, and one that is being written."""
    config = run.config
    # One by --checkpoint_minutes needs no more: it is replaced before all others are there.
    saves = math.ceil(config.max_steps / config.checkpoint_every)
    kept = saves
    if config.keep_checkpoints:
        milestones = 0
        if config.keep_every:
            milestones = config.max_steps // math.lcm(config.keep_every, config.checkpoint_every)
        kept = min(saves, config.keep_checkpoints + milestones)
    return (kept + 1) * checkpoint_bytes(precision(run.ds_config), config.gpt_config.n_params())


def read_limits(run: Run) -> dict[str, int]:
    """Return this process's limits, and the shards that it will hold open."""
    shm = Path("/dev/shm")
    return {
        "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],  # -1: no limit
        "memlock_bytes": resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
        "shm_bytes": shutil.disk_usage(shm).free if shm.is_dir() else 0,
        "has_infiniband": any(Path("/sys/class/infiniband").glob("*")),
        "shards": sum(path.suffix in (".npy", ".bin") for path in run.config.data_dir.glob("*")),
    }


def check_plan(run: Run) -> None:
    """Refuse a run that does not fit, by the plan; name the nearest setting that does.

    Raises:
        BadInput: It does not fit.
    """
    refusal = advice(plan_here(run, choose_device(run.ranks)))
    if refusal is not None:
        raise BadInput("launch/plan.py", refusal.what, refusal.remedy)


def read_memory(device: torch.device) -> int:
    """Return the bytes that are free on a GPU, or that the machine lets this process have."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return machine_bytes()
