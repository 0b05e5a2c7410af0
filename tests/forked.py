"""Processes that start in milliseconds: forked from one that has imported torch and DeepSpeed.

For tests of what ranks do together. How launchers start ranks is tested with the launchers.
"""

import contextlib
import multiprocessing
import os
import runpy
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from training.rendezvous import free_port

ROOT = Path(__file__).resolve().parents[1]
# The server itself must compute nothing: threads of OpenMP do not survive a fork.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "deepspeed", "train", "training.engine", "eval.hellaswag"])


def launch(
    n_ranks: int,
    arguments: Sequence[object],
    folder: Path,
    script: str | Path = "train.py",
    timeout_s: float = 120,
) -> subprocess.CompletedProcess[str]:
    """Run a script on some ranks of this machine, as torchrun would.

    Args:
        n_ranks: How many.
        arguments: Of the script.
        folder: For what the ranks print.
        script: Relative to the repository root.
        timeout_s: After which all ranks are killed, and TimeoutError is raised.

    Returns:
        The status of a rank that failed, or 0; what all printed, rank after rank.
    """
    folder.mkdir(parents=True, exist_ok=True)
    world = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(n_ranks),
        "LOCAL_WORLD_SIZE": str(n_ranks),
        "OMP_NUM_THREADS": "1",
    }
    argv = [str(ROOT / script), *map(str, arguments)]
    ranks = []
    for rank in range(n_ranks):
        environment = dict(os.environ) | world | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        child = (argv, environment, str(folder / f"rank_{rank}"))
        ranks.append(CONTEXT.Process(target=_become, args=child, daemon=True))
    for process in ranks:
        process.start()
    deadline = time.monotonic() + timeout_s
    for process in ranks:
        process.join(max(0.0, deadline - time.monotonic()))
    is_late = any(process.is_alive() for process in ranks)
    for process in ranks:
        process.kill()
        process.join()
    out, err = (
        "".join((folder / f"rank_{rank}.{end}").read_text() for rank in range(n_ranks))
        for end in ("out", "err")
    )
    if is_late:
        raise TimeoutError(err)
    status = max((process.exitcode or 0 for process in ranks), key=abs)
    return subprocess.CompletedProcess(argv, status, out, err)


def _become(argv: list[str], environment: Mapping[str, str], printed: str) -> None:
    """Become a process that runs a script as if it had been typed."""
    for end, descriptor in (("out", 1), ("err", 2)):
        with Path(f"{printed}.{end}").open("wb") as file:
            os.dup2(file.fileno(), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    import torch

    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    sys.argv = argv
    with contextlib.suppress(KeyboardInterrupt):
        runpy.run_path(argv[0], run_name="__main__")
