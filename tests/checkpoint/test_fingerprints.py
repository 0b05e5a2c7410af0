"""Weights that leave the engine: each is the one that the model computes with, or none leaves."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from checkpoint.consolidate import consolidate_engine
from checkpoint.fingerprints import BLOCK, fingerprint, partial_fingerprint
from checkpoint.layouts import step_weights
from checkpoint.manifest import read_manifest, record_file, step_name, write_manifest
from checkpoint.reader import load_model
from checkpoint.saving import save_checkpoint
from tests.training.test_engine import CONFIG, batch, engine_of
from training.ranks import Ranks
from training.step import optimizer_step, set_optimizer

MASK = 2**64 - 1
ORDER = {"batch_tokens": 128, "seq_len": 32}


def mix(index: int) -> int:
    """SplitMix64's output for a counter, in Python's own whole numbers, made odd."""
    z = (index + 1) * 0x9E3779B97F4A7C15 & MASK
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ z >> 27) * 0x94D049BB133111EB & MASK
    return z ^ z >> 31 | 1


def test_it_is_the_sum_of_the_bits_times_a_mix_of_the_index() -> None:
    values = torch.randn(3, BLOCK // 2, generator=torch.Generator().manual_seed(0))
    for dtype, bits in (
        (torch.float32, values.view(torch.int32)),
        (torch.bfloat16, values.bfloat16().view(torch.int16)),
    ):
        total = 0
        for i, value in enumerate(bits.flatten().tolist()):
            total += value * mix(i // BLOCK) * mix(i % BLOCK)
        assert fingerprint(values, dtype) == f"{total & MASK:016x}"


@pytest.mark.parametrize("n", [0, 1, BLOCK, BLOCK + 1, 3 * BLOCK + 7])
@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_ranks_share_the_work_without_a_trace(n: int, world_size: int) -> None:
    values = torch.randn(n, generator=torch.Generator().manual_seed(0))
    parts = [
        partial_fingerprint(values, torch.float32, rank, world_size) for rank in range(world_size)
    ]
    assert f"{sum(parts) & MASK:016x}" == fingerprint(values, torch.float32)


def test_a_bit_a_swap_and_a_move_are_seen() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(2 * BLOCK + 5, generator=generator).bfloat16()
    known = fingerprint(values, torch.bfloat16)
    bits = values.view(torch.int16)
    seen = {known}
    for i in torch.randint(len(bits), (50,), generator=generator).tolist():
        bits[i] ^= 1 << (i % 15)
        seen.add(fingerprint(values, torch.bfloat16))
        bits[i] ^= 1 << (i % 15)
    assert len(seen) == 51
    for shift in (1, 3, BLOCK):
        assert fingerprint(values.roll(shift), torch.bfloat16) != known
    assert fingerprint(values.clone(), torch.bfloat16) == known


def train_and_save(ranks: Ranks, stage: int, folder: Path, fp32: bool) -> tuple[object, Path]:
    """Save an engine after a step; return it and the step folder."""
    engine = engine_of(ranks, stage, fp32)
    set_optimizer(engine, CONFIG, lr=1e-3)
    engine.backward(engine(*batch()))
    optimizer_step(engine, grad_clip=1.0)
    mixed = "bf16" if stage else "autocast"
    precision = "fp32" if fp32 else mixed
    save_checkpoint(engine, folder, step=1, precision=precision, order=ORDER, unverified=["x.y"])
    return engine, folder / step_name(1)


def swap(step: Path, one: Tensor, other: Tensor) -> None:
    """Swap the bytes of two tensors in the file that holds them, and make the manifest agree."""
    a, b = (tensor.detach().contiguous().numpy().tobytes() for tensor in (one, other))
    (path,) = [*step.glob("*optim_states.pt")] or step.glob("mp_rank_00_model_states.pt")
    raw = bytearray(path.read_bytes())
    i, j = raw.index(a), raw.index(b)
    raw[i : i + len(a)], raw[j : j + len(b)] = b, a
    path.write_bytes(raw)
    manifest = read_manifest(step)
    files = manifest.files | {path.name: record_file(path)}
    write_manifest(step, dataclasses.replace(manifest, files=files))


@pytest.mark.parametrize("fp32", [True, False])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_swapped_weights_and_rows_in_the_files_are_found(
    one_rank: Ranks, tmp_path: Path, stage: int, fp32: bool
) -> None:
    _, step = train_and_save(one_rank, stage, tmp_path, fp32)
    weights = dict(step_weights(step))
    first, second = (f"h.{i}.attn.c_proj.weight" for i in (0, 1))
    wte = weights["wte.weight"]
    for one, other, names in (
        (weights[first].clone(), weights[second].clone(), [first, second]),
        (wte[3].clone(), wte[50300].clone(), ["wte.weight"]),  # a row of the padding too
    ):
        swap(step, one, other)
        said = f"{names[0]} is not the weight that was trained: {len(names)} of 28 fingerprints d"
        with pytest.raises(ValueError, match=said) as error:
            list(step_weights(step))
        assert "; train without unverified x.y" in str(error.value)
        with pytest.raises(ValueError, match=names[0]):
            load_model(str(step))
        swap(step, other, one)
    list(step_weights(step))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_what_the_optimizer_does_not_compute_with_is_not_exported(
    one_rank: Ranks, tmp_path: Path, stage: int
) -> None:
    engine, _ = train_and_save(one_rank, stage, tmp_path, False)
    consolidate_engine(engine, tmp_path, 1, [])
    optimizer = engine.optimizer  # pyright: ignore[reportAttributeAccessIssue]  # an engine
    name = {
        1: "fp32_groups_flat_partition",
        2: "single_partition_of_fp32_groups",
        3: "fp32_partitioned_groups_flat",
    }[stage]
    flat = getattr(optimizer, name)[0].data
    flat[100:200] = flat[100:200].flip(0).clone()
    with pytest.raises(ValueError, match=r"wte.weight is not .* 1 of 28 fingerprints differ"):
        consolidate_engine(engine, tmp_path, 2, [])
    assert [p.name for p in (tmp_path / "consolidated").iterdir()] == [step_name(1)]


def test_checkpoints_without_fingerprints_are_read_with_a_word(
    one_rank: Ranks, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, step = train_and_save(one_rank, 1, tmp_path, False)
    weights = dict(step_weights(step))
    assert "warning" not in capsys.readouterr().err
    write_manifest(step, dataclasses.replace(read_manifest(step), fingerprints={}))
    again = dict(step_weights(step))
    assert all(torch.equal(again[name], weights[name]) for name in weights)
    assert f"warning: {step}: has no fingerprints" in capsys.readouterr().err
