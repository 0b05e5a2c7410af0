import math
from pathlib import Path

import numpy as np
import pytest
import torch

from data.shards import TokenStream, require_targets
from eval.session import Session
from eval.val_loss import build_parser, run, sum_token_losses, unigram_entropy
from model import GPT, GPTConfig
from training.ranks import Ranks, read_ranks

CONFIG = GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=64)
CPU = torch.device("cpu")


@pytest.fixture
def model() -> GPT:
    return GPT(CONFIG).eval()


def test_loss_is_the_mean_over_all_tokens_of_the_windows(model: GPT, data_dir: Path) -> None:
    stream = TokenStream(data_dir, "val", 50257)
    session = Session(model, CONFIG, CPU, Ranks())
    total, n_tokens = sum_token_losses(
        session, stream, seq_len=64, eval_tokens=46 * 64 + 55, batch_size=7
    ).tolist()
    tokens = torch.from_numpy(stream.read(0, 3000).astype(np.int64))  # all: the last has no target
    whole = model(tokens[: 46 * 64].view(46, 64)).flatten(0, 1)
    rest = model(tokens[46 * 64 : -1][None])[0]
    expected = torch.nn.functional.cross_entropy(
        torch.cat([whole, rest]), tokens[1:], reduction="sum"
    ).item()
    assert n_tokens == 2999
    assert total == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("batch_size", "world_size"), [(1, 1), (5, 1), (64, 1), (2, 3), (7, 4)])
def test_result_does_not_depend_on_batches_or_ranks(
    model: GPT, data_dir: Path, batch_size: int, world_size: int
) -> None:
    stream = TokenStream(data_dir, "val", 50257)
    forwards = []

    def counting(tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        forwards[-1] += 1
        return model(tokens, targets)

    sums = []
    for rank in range(world_size):
        forwards.append(0)
        session = Session(counting, CONFIG, CPU, Ranks(rank=rank, world_size=world_size))
        sums.append(
            sum_token_losses(session, stream, seq_len=64, eval_tokens=2000, batch_size=batch_size)
        )
    assert len(set(forwards)) == 1  # in lock-step
    total, n_tokens = torch.stack(sums).sum(0).tolist()
    session = Session(model, CONFIG, CPU, Ranks())
    alone, n_alone = sum_token_losses(
        session, stream, seq_len=64, eval_tokens=2000, batch_size=31
    ).tolist()
    assert n_tokens == n_alone == 2000
    assert total / n_tokens == pytest.approx(alone / n_alone, abs=1e-5)


def test_unigram_entropy_is_that_of_the_counts(tmp_path: Path) -> None:
    np.save(tmp_path / "text_val_000000.npy", np.array([9, 1, 1, 2, 3], np.uint16))
    stream = TokenStream(tmp_path, "val", 50257)
    assert unigram_entropy(stream, 4) == pytest.approx(1.5 * math.log(2))  # 1/2, 1/4, 1/4


@pytest.mark.parametrize("name", ["eval_tokens", "seq_len", "batch_size"])
def test_values_out_of_range_name_their_flag(name: str) -> None:
    args = build_parser().parse_args(["--ckpt", "x", f"--{name}", "0"])
    with pytest.raises(ValueError, match=f"--{name} 0: out of range. Fix: give at least 1"):
        run(args, read_ranks())


def test_too_few_tokens_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "text_val_000000.npy", np.zeros(129, np.uint16))
    stream = TokenStream(tmp_path, "val", 50257)
    require_targets(stream, 128)
    message = r"text_val_000000\.npy: the validation split has 129 tokens.*give --eval_tokens 128$"
    with pytest.raises(ValueError, match=message):
        require_targets(stream, 129)
    with pytest.raises(ValueError, match=message):
        require_targets(stream, 129, is_given=True)


@pytest.mark.parametrize(("asked", "used"), [(100, 100), (128, 128), (129, 128), (10**7, 128)])
def test_a_default_is_at_most_the_whole_split(tmp_path: Path, asked: int, used: int) -> None:
    np.save(tmp_path / "text_val_000000.npy", np.zeros(129, np.uint16))
    stream = TokenStream(tmp_path, "val", 50257)
    assert require_targets(stream, asked, is_given=False) == used


def test_a_split_without_a_target_is_refused_in_any_case(tmp_path: Path) -> None:
    np.save(tmp_path / "text_val_000000.npy", np.zeros(1, np.uint16))
    stream = TokenStream(tmp_path, "val", 50257)
    with pytest.raises(ValueError, match="Fix: prepare more validation tokens"):
        require_targets(stream, 10, is_given=False)
