"""What a rank holds against closed forms; tests/bench/planning has what was measured."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from training.config import resolve_batch, resolve_train_config
from training.ds_config import load_ds_config, resolve_ds_config
from training.memory import RankShare, host_bytes, memory_by_phase, peak

ROOT = Path(__file__).resolve().parents[2]


def rank_share(
    ds_config: str, world_size: int, *, more: dict[str, Any] | None = None, **fields: Any
) -> RankShare:
    config = resolve_train_config(**fields)
    batch = resolve_batch(config, world_size)
    raw = load_ds_config(ROOT / "ds_configs" / ds_config) | (more or {})
    return RankShare(config, batch, resolve_ds_config(raw, config, batch).ds_config, on_gpu=True)


@pytest.mark.parametrize(
    ("stage", "bytes_each"),
    [
        (0, lambda W: 16),
        (1, lambda W: 6 + 12 / W),
        (2, lambda W: 2 + 16 / W),
        (3, lambda W: 18 / W),
    ],
)
def test_states_of_a_large_model_are_the_closed_form(stage: int, bytes_each: Any) -> None:
    # ZeRO (Rajbhandari et al. 2020), section 3, with gradients in fp32.
    for world_size in (8, 64):
        one = rank_share(f"zero{stage}.json", world_size, model="gpt3-13b")
        states = memory_by_phase(one)["reduction"]
        held = states["weights"] + states["gradients"] + states["optimizer"]
        assert held == pytest.approx(bytes_each(world_size) * one.n_params)
        assert states["buckets"] == (4 * 500_000_000 if stage in (0, 3) else 0)


def test_activations_grow_with_tokens_and_checkpointing_keeps_one_in_twelve() -> None:
    def activations(one: RankShare) -> float:
        return memory_by_phase(one)["loss"]["activations"]

    small = rank_share("zero1.json", 8, model="gpt2", micro_batch_size=8)
    large = rank_share("zero1.json", 8, model="gpt2", micro_batch_size=16)
    assert activations(large) == 2 * activations(small)
    saving = {"activation_checkpointing": {}}
    spared = rank_share("zero1.json", 8, more=saving, model="gpt2", micro_batch_size=16)
    ends = 4 * large.tokens * 768
    assert activations(large) - ends == 12 * (activations(spared) - ends)


def test_offload_moves_the_states_to_the_machine() -> None:
    held, offloaded = (rank_share(f"zero3{o}.json", 8, model="gpt3-13b") for o in ("", "_offload"))
    assert host_bytes(held) == 0
    share = offloaded.n_params / 8
    # Weights and moments in fp32 are 12 bytes; gradients twice, and bf16 weights, are pinned: in
    # powers of two. Of gradients two groups of at most 1e9 elements, and one buffer of all.
    assert 1e9 < share < 2e9
    pinned = 2 * 2**32 + 2**33 + 2**32
    assert host_bytes(offloaded) == pytest.approx(12 * share + pinned)
    on_cpu = replace(offloaded, on_gpu=False)
    assert host_bytes(on_cpu) == pytest.approx(22 * share)
    assert peak(offloaded)["optimizer"] == peak(offloaded)["weights"] == 0
