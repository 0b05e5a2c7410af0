"""The ranks of a run find each other, or say who is missing, and each finds its device."""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import os
import socket
import subprocess
import time
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, Store, TCPStore  # pyright: ignore[reportPrivateImportUsage]  # documented
from torch.distributed.rendezvous import rendezvous

from data.mpi import BY_HAND, Tasks, find_tasks, read_number, start_mpi
from training import deepspeed_fixes as fixes
from training.ranks import Ranks

NAMED, NOTED = 8, 120  # of missing ranks; characters of another's error
POLL_S = 0.02
GRACE_S = 5  # for rank 0, who says which rank is missing, before the others give up on it
LEAVE_S = 2  # for the others to hear that it is over


def choose_device(ranks: Ranks) -> torch.device:
    """Return this rank's device, made the current one, and set how it computes.

    Products of fp32 take TF32 on a GPU, as in the recipe. Ranks of a machine share its cores.

    Raises:
        ValueError: The GPU of this rank does not exist, or the accelerator is Apple's MPS.
    """
    if torch.backends.mps.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu":
        raise ValueError("Apple's MPS: not supported. Fix: set DS_ACCELERATOR=cpu")
    if "OMP_NUM_THREADS" not in os.environ:  # ranks that all take every core starve each other
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks.local_world_size))
    if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu":
        if ranks.local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"--num_gpus: rank {ranks.rank} needs GPU {ranks.local_rank}, this machine has "
                f"{torch.cuda.device_count()}. Fix: start no more ranks"
            )
        torch.cuda.set_device(ranks.local_rank)
        torch.set_float32_matmul_precision("high")  # TF32
        return torch.device("cuda", ranks.local_rank)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it guessed
    return torch.device("cpu")


def meet(ranks: Ranks, timeout_s: float) -> Store:
    """Wait for every rank at MASTER_ADDR:MASTER_PORT (all ranks) and return their common store.

    Raises:
        OSError: Not all came in time; names those that did not.
        ValueError: No launcher has named rank 0's address, and nothing here can find it.
    """
    if "RANK" not in os.environ:  # no launcher
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    _name_address(ranks)
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    remedy = f"start it, or give it more time with --timeouts start={2 * round(timeout_s)}"
    try:
        store = _open_store(ranks, datetime.timedelta(seconds=timeout_s))
        came = exchange(store, ranks, "came", True, timeout_s)
    except RuntimeError as error:  # c10d's errors of store and network
        if "EADDRINUSE" in str(error):
            raise OSError(
                f"{address}: in use. Fix: free it, or give another --master_port"
            ) from error
        _check_name(os.environ["MASTER_ADDR"])
        what = f"rank 0 at {address} did not gather all ranks within {timeout_s:.0f} s"
        raise OSError(f"{what} ({str(error).splitlines()[0][:NOTED]}). Fix: {remedy}") from error
    if missing := [rank for rank, has_come in enumerate(came) if not has_come]:
        names = ", ".join(map(str, missing[:NAMED]))
        more = f" and {len(missing) - NAMED} more" if len(missing) > NAMED else ""
        raise OSError(f"rank {names}{more} never came to {address}. Fix: {remedy}")
    return store


def _check_name(name: str) -> None:
    try:
        socket.getaddrinfo(name, None)
    except (socket.gaierror, UnicodeError) as error:
        raise OSError(
            f"MASTER_ADDR {name}: does not resolve ({error}). Fix: add it to DNS or /etc/hosts"
        ) from error


def _name_address(ranks: Ranks) -> None:
    """Set MASTER_ADDR and MASTER_PORT where the launcher, mpirun or srun, did not (all ranks).

    Raises:
        ValueError: They are half set, or nothing here can find rank 0's address.
    """
    if os.environ.get("MASTER_ADDR") and os.environ.get("MASTER_PORT"):
        return
    tasks = find_tasks()
    if not tasks:
        raise ValueError(f"MASTER_ADDR, MASTER_PORT: not both set, but RANK is. Fix: {BY_HAND}")
    if tasks.launcher == "Slurm":
        _name_slurm_address(ranks)
    else:
        _name_mpi_address(ranks, tasks)


def _name_slurm_address(ranks: Ranks) -> None:
    """Take the machine on which srun was typed, and a port from the numbers of job and step.

    The port is below those that the system gives to others.

    Raises:
        ValueError: That machine is not rank 0's.
    """
    name = "MASTER_ADDR" if os.environ.get("MASTER_ADDR") else "SLURM_LAUNCH_NODE_IPADDR"
    address = os.environ.get(name, "")
    port = 20000 + (read_number("SLURM_JOB_ID") + 89 * read_number("SLURM_STEP_ID")) % 10000
    if not address or (ranks.is_main and not _is_own(address)):
        raise ValueError(
            f"{name}: {address!r} is not rank 0's address. Fix: in the job, export "
            'MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)'
        )
    os.environ |= {"MASTER_ADDR": address, "MASTER_PORT": os.environ.get("MASTER_PORT", str(port))}


def _is_own(address: str) -> bool:
    """Return whether an address or name is this machine's."""
    with contextlib.suppress(OSError), socket.create_server((address, 0)):
        return True
    return False


def _name_mpi_address(ranks: Ranks, tasks: Tasks) -> None:
    """Let rank 0 tell the others, through MPI (all ranks).

    Raises:
        ValueError: There is no mpi4py, or it is another MPI's.
    """
    found = None
    if ranks.is_main:  # before MPI starts, after which no process should be forked
        addresses = subprocess.run(["hostname", "-I"], capture_output=True, encoding="utf-8").stdout
        found = {"MASTER_ADDR": (addresses.split() or ["127.0.0.1"])[0]}
        found["MASTER_PORT"] = str(_free_port())
        found |= {name: os.environ[name] for name in found if name in os.environ}
    mpi = start_mpi(tasks)  # all ranks
    os.environ |= mpi.COMM_WORLD.bcast(found)
    mpi.Finalize()  # while nobody hangs: at the end of a run that has failed it would


def join(store: Store, ranks: Ranks, device: torch.device, timeout: datetime.timedelta) -> str:
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
        ValueError: The GPU of this rank does not exist, or the accelerator is Apple's MPS.
    """
    device = choose_device(ranks)
    import deepspeed
    import deepspeed.ops
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    # It calls PyTorch's collectives by their old names, at stage 3 many times in each step.
    old_names = ".*(all_gather_into|reduce_scatter)_tensor. is deprecated"
    warnings.filterwarnings("ignore", old_names, FutureWarning)
    if device.type == "cpu":
        # DeepSpeed's shared-memory all-reduce serves inference only; compiling it takes a minute.
        # Not on a GPU: there the question alone has DeepSpeed look for every operator, on stdout.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not dist.is_initialized():
        timeout = datetime.timedelta(seconds=timeout_s)
        store = meet(ranks, start_timeout_s or timeout_s)  # all ranks
        backend = join(store, ranks, device, timeout)  # all ranks
        deepspeed.init_distributed(backend, timeout=timeout, verbose=False)
        fixes.give_timeout_to_clone(timeout)  # all ranks
    return device


def exchange(store: Store, ranks: Ranks, name: str, value: Any, timeout_s: float) -> list[Any]:
    """Return what each rank gives under a name (all ranks), None for those that are too late.

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
        deadline, given = time.monotonic() + timeout_s, []
        for key in keys:
            while not (is_there := store.check([key])) and time.monotonic() < deadline:
                time.sleep(POLL_S)
            given.append(json.loads(store.get(key)) if is_there else None)
        store.set(name, json.dumps(given))
    store.wait([name], datetime.timedelta(seconds=timeout_s + GRACE_S))
    return json.loads(store.get(name))


def part(store: Store, ranks: Ranks, timeout_s: float) -> None:
    """Leave once rank 0 has come here, which goes last (all ranks): the store ends with it."""
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


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _open_store(ranks: Ranks, timeout: datetime.timedelta) -> Store:
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # torchrun keeps it
        store, _, _ = next(rendezvous("env://", ranks.rank, ranks.world_size, timeout=timeout))
        # The same store after a restart: what the ranks before left in it must not be found.
        return PrefixStore(f"attempt {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return TCPStore(host, port, ranks.world_size, ranks.is_main, timeout, wait_for_workers=False)
