"""What many tests share: small shards, and one process group of one rank on the CPU."""

import os

os.environ["DS_ACCELERATOR"] = "cpu"  # before anything imports deepspeed
os.environ.setdefault("OMP_NUM_THREADS", "2")

from pathlib import Path

import numpy as np
import pytest
import torch

from training.ranks import Ranks
from training.rendezvous import init_process_group

ONE_RANK = Ranks(rank=0, local_rank=0, world_size=1, local_world_size=1)


@pytest.fixture(scope="session")
def one_rank() -> Ranks:
    init_process_group(ONE_RANK, timeout_s=60)
    del os.environ["RANK"], os.environ["WORLD_SIZE"]  # processes that tests start are no part of it
    return ONE_RANK


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two train shards and a val shard of tokens with a skewed distribution."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for name, n in (("val_000000", 3_000), ("train_000001", 20_000), ("train_000002", 7_777)):
        tokens = np.minimum(rng.zipf(1.3, size=n), 50256).astype("<u2")
        np.save(folder / f"text_{name}.npy", tokens)
    return folder


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
