"""Rendezvous of all ranks: name the missing ones, choose devices, make the process group."""

import contextlib
import datetime
import json
import os
import re
import socket
import subprocess
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, Store, TCPStore  # pyright: ignore[reportPrivateImportUsage]  # documented
from torch.distributed.rendezvous import rendezvous as open_launchers_store

from data.mpi import BY_HAND, Tasks, find_tasks, read_number, start_mpi
from errors import BadInput
from training import deepspeed_fixes as fixes
from training.ranks import Ranks

MAX_NAMED_RANKS = 8  # in an error about missing ones
MAX_ERROR_CHARS = 120  # of c10d's errors, which can be long
POLL_S = 0.02
GRACE_S = 5  # for rank 0, which names the missing ranks, before the others give up on it
LEAVE_S = 2  # for the others to read that rank 0 leaves


def choose_device(ranks: Ranks) -> torch.device:
    """Return this rank's device, made the current one, and set how it computes.

    Products of fp32 take TF32 on a GPU, as in the recipe. Ranks of a machine share its cores.

    Raises:
        BadInput: The GPU of this rank does not exist, or the accelerator is Apple's MPS or absent.
    """
    wants_cpu = os.environ.get("DS_ACCELERATOR") == "cpu"
    if torch.backends.mps.is_available() and not wants_cpu:
        raise BadInput("Apple's MPS", "is not supported", "set DS_ACCELERATOR=cpu")
    found = "cuda" if torch.cuda.is_available() else "cpu"
    accelerator = os.environ.setdefault("DS_ACCELERATOR", found)  # DeepSpeed warns if it guesses
    if accelerator not in (found, "cpu"):
        what = f"is {accelerator!r}, but PyTorch finds {found} here"
        raise BadInput("DS_ACCELERATOR", what, f"set {found}, or unset it")
    # Ranks that all take every core starve each other; libgomp ignores what is no number above 0.
    if not re.match("[1-9]", os.environ.get("OMP_NUM_THREADS", "")):
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks.local_world_size))
    if accelerator == "cpu":
        return torch.device("cpu")
    n_gpus = torch.cuda.device_count()
    if ranks.local_rank >= n_gpus:
        what = f"rank {ranks.rank} needs GPU {ranks.local_rank}, this machine has {n_gpus}"
        raise BadInput("--num_gpus", what, "start no more ranks than GPUs")
    torch.cuda.set_device(ranks.local_rank)
    torch.set_float32_matmul_precision("high")  # TF32
    return torch.device("cuda", ranks.local_rank)


def rendezvous(ranks: Ranks, timeout_s: float) -> Store:
    """Wait for every rank at MASTER_ADDR:MASTER_PORT (all ranks) and return their common store.

    Raises:
        OSError: Not all came in time; names those that did not.
        BadInput: No launcher has named rank 0's address, and nothing here can find it.
    """
    if "RANK" not in os.environ:  # no launcher
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    _name_address(ranks)
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    remedy = f"start it, or give it more time with --timeouts start={2 * round(timeout_s)}"
    try:
        store = _open_store(ranks, datetime.timedelta(seconds=timeout_s))
        came = all_gather_json(store, ranks, "came", True, timeout_s)  # all ranks
    except RuntimeError as error:  # c10d's errors of store and network
        if "failed to bind" in str(error) or "failed to listen" in str(error):
            what = "in use" if "EADDRINUSE" in str(error) else "no port that this user may take"
            remedy = f"free it, or give another in MASTER_PORT or --master_port, e.g. {free_port()}"
            raise OSError(f"{address}: {what}. Fix: {remedy}") from error
        _check_name(os.environ["MASTER_ADDR"])
        cause = str(error).splitlines()[0][:MAX_ERROR_CHARS]
        what = f"rank 0 at {address} did not gather all ranks within {timeout_s:.0f} s ({cause})"
        raise OSError(f"{what}. Fix: {remedy}") from error
    missing = [rank for rank, has_come in enumerate(came) if not has_come]
    if missing:
        names = ", ".join(map(str, missing[:MAX_NAMED_RANKS]))
        n_more = len(missing) - MAX_NAMED_RANKS
        more = f" and {n_more} more" if n_more > 0 else ""
        raise OSError(f"rank {names}{more} never came to {address}. Fix: {remedy}")
    return store


def _check_name(name: str) -> None:
    try:
        socket.getaddrinfo(name, None)
    except (socket.gaierror, UnicodeError) as error:
        what = f"MASTER_ADDR {name}: does not resolve ({error})"
        raise OSError(f"{what}. Fix: add it to DNS or /etc/hosts") from error


def _name_address(ranks: Ranks) -> None:
    """Set MASTER_ADDR and MASTER_PORT where the launcher, mpirun or srun, did not (all ranks)."""
    if os.environ.get("MASTER_ADDR") and os.environ.get("MASTER_PORT"):
        return
    tasks = find_tasks()
    if not tasks:
        raise BadInput("MASTER_ADDR, MASTER_PORT", "not both set, but RANK is", BY_HAND)
    if tasks.launcher == "Slurm":
        _name_slurm_address(ranks)
    else:
        _name_mpi_address(ranks, tasks)


def _name_slurm_address(ranks: Ranks) -> None:
    """Take the machine on which srun was typed, and a port from the numbers of job and step."""
    name = "MASTER_ADDR" if os.environ.get("MASTER_ADDR") else "SLURM_LAUNCH_NODE_IPADDR"
    address = os.environ.get(name, "")
    if not address or (ranks.is_main and not _is_own(address)):
        remedy = (
            "in the job, export "
            'MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)'
        )
        raise BadInput(name, f"{address!r} is not rank 0's address", remedy)
    # Every task computes the same one, below those that the system gives to other programs.
    port = 20000 + (read_number("SLURM_JOB_ID") + 89 * read_number("SLURM_STEP_ID")) % 10000
    os.environ |= {"MASTER_ADDR": address, "MASTER_PORT": os.environ.get("MASTER_PORT", str(port))}


def _is_own(address: str) -> bool:
    """Return whether an address or name is this machine's."""
    with contextlib.suppress(OSError), socket.create_server((address, 0)):
        return True
    return False


def _name_mpi_address(ranks: Ranks, tasks: Tasks) -> None:
    """Send rank 0's address to the others, through MPI (all ranks)."""
    found = None
    # Before MPI starts, after which no process should be forked.
    if ranks.is_main:
        addresses = subprocess.run(["hostname", "-I"], capture_output=True, encoding="utf-8").stdout
        found = {"MASTER_ADDR": (addresses.split() or ["127.0.0.1"])[0]}
        found["MASTER_PORT"] = str(free_port())
        found |= {name: os.environ[name] for name in found if name in os.environ}
    mpi = start_mpi(tasks)  # all ranks
    os.environ |= mpi.COMM_WORLD.bcast(found)
    mpi.Finalize()  # here, where no rank hangs: at the end of a run that has failed one could


def join_process_group(
    store: Store, ranks: Ranks, device: torch.device, timeout: datetime.timedelta
) -> str:
    """Make the process group of all ranks (all ranks) and return its backend."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend,
        timeout=timeout,
        world_size=ranks.world_size,
        rank=ranks.rank,
        store=store,
        device_id=device if device.type == "cuda" else None,
    )
    return backend


def init_process_group(
    ranks: Ranks, timeout_s: float, start_timeout_s: float | None = None
) -> torch.device:
    """Join the process group (all ranks) and return this rank's device.

    Args:
        ranks: Of this process.
        timeout_s: Until a collective gives up.
        start_timeout_s: Until a rank gives up that others come; default: the same.

    Raises:
        OSError: Not all ranks came.
        BadInput: The GPU of this rank does not exist, or the accelerator is Apple's MPS.
    """
    device = choose_device(ranks)
    import deepspeed  # after DS_ACCELERATOR is set

    fixes.quiet_deepspeed(device)
    if not dist.is_initialized():
        timeout = datetime.timedelta(seconds=timeout_s)
        store = rendezvous(ranks, start_timeout_s or timeout_s)  # all ranks
        backend = join_process_group(store, ranks, device, timeout)  # all ranks
        deepspeed.init_distributed(backend, timeout=timeout, verbose=False)
        fixes.give_timeout_to_clone(timeout)  # all ranks
    return device


def all_gather_json(
    store: Store, ranks: Ranks, name: str, value: Any, timeout_s: float
) -> list[Any]:
    """Return what each rank gives under a name (all ranks), None for those that are too late.

    It works before there is a process group, and unlike a collective it survives missing ranks.

    Args:
        store: Of all ranks.
        ranks: Of this process.
        name: Another one each time.
        value: A JSON value.
        timeout_s: Until rank 0 waits no longer.

    Raises:
        RuntimeError: Rank 0 is too late or gone (c10d's error).
    """
    keys = [f"{name}/{rank}" for rank in range(ranks.world_size)]
    store.set(keys[ranks.rank], json.dumps(value))
    if ranks.is_main:
        deadline = time.monotonic() + timeout_s
        values = []
        for key in keys:
            while not store.check([key]) and time.monotonic() < deadline:
                time.sleep(POLL_S)
            values.append(json.loads(store.get(key)) if store.check([key]) else None)
        store.set(name, json.dumps(values))
    store.wait([name], datetime.timedelta(seconds=timeout_s + GRACE_S))
    return json.loads(store.get(name))


def leave_together(store: Store, ranks: Ranks, timeout_s: float) -> None:
    """Shut down together (all ranks): rank 0 hosts the store, so it leaves last."""
    if not ranks.is_main:
        store.wait(["over"], datetime.timedelta(seconds=timeout_s))
        store.add("left", 1)
        return
    store.set("over", "")
    deadline = time.monotonic() + LEAVE_S
    while store.add("left", 0) < ranks.world_size - 1 and time.monotonic() < deadline:
        time.sleep(POLL_S)


def sum_tensor(values: Tensor, device: torch.device) -> Tensor:
    """Sum each element over the ranks (all ranks), on `device`; return the sums on the CPU."""
    sums = values.to(device)
    dist.all_reduce(sums)
    return sums.cpu()


def free_port() -> int:
    """Return a port of this machine that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _open_store(ranks: Ranks, timeout: datetime.timedelta) -> Store:
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # torchrun keeps it
        handler = open_launchers_store("env://", ranks.rank, ranks.world_size, timeout=timeout)
        store, _, _ = next(handler)
        # It outlives a restart: what the ranks before have left in it must not be found.
        return PrefixStore(f"attempt {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return TCPStore(host, port, ranks.world_size, ranks.is_main, timeout, wait_for_workers=False)
