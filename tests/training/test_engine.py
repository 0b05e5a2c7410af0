"""The engine at every stage, on one rank; several ranks are in tests/test_train.py."""

import datetime
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from deepspeed.runtime import compiler
from deepspeed.utils import groups

from model import GPT, GPTConfig
from model.presets import PRESETS
from training.config import resolve_batch, resolve_train_config
from training.ds_config import load_ds_config, resolve_ds_config, zero_stage
from training.engine import (
    build_engine,
    build_model,
    decay_groups,
    describe_groups,
    load_weights,
)
from training.ranks import Ranks
from training.step import optimizer_step, set_optimizer

ROOT = Path(__file__).resolve().parents[2]
CONFIG = resolve_train_config(model="debug", batch_tokens=4 * 64, micro_batch_size=4)
STAGES = [0, 1, 2, 3]
CPU = torch.device("cpu")


def ds_config(stage: int, fp32: bool = True, **more: Any) -> dict[str, Any]:
    raw = load_ds_config(ROOT / "ds_configs" / f"zero{stage}.json")
    if fp32:
        raw.pop("bf16", None)
        raw.pop("torch_autocast", None)
    return resolve_ds_config(raw | more, CONFIG, resolve_batch(CONFIG, 1)).ds_config


def engine_of(ranks: Ranks, stage: int, fp32: bool = True, **more: Any) -> Any:
    resolved = ds_config(stage, fp32, **more)
    engine, _ = build_engine(build_model(CONFIG, resolved, CPU), CONFIG, resolved, ranks)
    return engine


def weights_of(engine: Any) -> dict[str, torch.Tensor]:
    from checkpoint.consolidate import engine_weights

    return {name: weight.float().clone() for name, weight in engine_weights(engine)}


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    rows = torch.randint(50, (4, 65), generator=torch.Generator().manual_seed(3))
    return rows[:, :-1], rows[:, 1:]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("fp32", [True, False])
def test_initial_weights_are_the_plain_models(one_rank: Ranks, stage: int, fp32: bool) -> None:
    engine = engine_of(one_rank, stage, fp32)
    plain = dict(GPT(CONFIG.gpt_config, CONFIG.seed).named_parameters())
    rounded = stage > 0 and not fp32
    for name, weight in weights_of(engine).items():
        expected = plain[name].bfloat16().float() if rounded else plain[name]
        assert torch.equal(weight, expected), name


@pytest.mark.parametrize("stage", [1, 3])
def test_initial_weights_of_odd_sizes_are_the_plain_models_too(one_rank: Ranks, stage: int) -> None:
    """zero.Init makes bf16 tensors of torch.empty, whose normal_ draws others at such sizes."""
    config = GPTConfig(n_layer=1, n_head=2, n_embd=50, block_size=64)
    run = replace(CONFIG, preset=replace(PRESETS["debug"], config=config))
    resolved = ds_config(stage, fp32=False)
    engine, _ = build_engine(build_model(run, resolved, CPU), run, resolved, one_rank)
    plain = dict(GPT(config, run.seed).named_parameters())
    for name, weight in weights_of(engine).items():
        assert torch.equal(weight, plain[name].bfloat16().float()), name


def test_stage_3_has_the_same_deviation_of_each_kind_of_weight(one_rank: Ranks) -> None:
    stds = [
        {k: w.std().item() for k, w in weights_of(engine_of(one_rank, s)).items() if w.dim() > 1}
        for s in (0, 3)
    ]
    assert stds[0] == pytest.approx(stds[1])
    assert stds[1]["h.0.attn.c_proj.weight"] == pytest.approx(0.02 / 2, rel=0.05)  # (2·2)^-0.5
    assert stds[1]["h.0.mlp.c_fc.weight"] == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_nothing_is_compiled_that_no_run_takes(
    one_rank: Ranks, stage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("muon_optimizer", "original_muon"):  # imported once a process
        monkeypatch.delitem(sys.modules, f"deepspeed.runtime.zero.muon.{module}", raising=False)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "compile", lambda *_, **__: pytest.fail("it imports Inductor: 2 s"))
        engine_of(one_rank, stage)
    assert compiler.compile() is torch.compile


@pytest.mark.parametrize("stage", STAGES)
def test_decay_groups_go_by_the_whole_shape(one_rank: Ranks, stage: int) -> None:
    groups = decay_groups(build_model(CONFIG, ds_config(stage), CPU), 0.1)
    # wte, wpe and 4 matrices per block; 4 LayerNorms and 4 biases per block, 2 of ln_f
    n_decayed = (50304 + 64) * 64 + 2 * 12 * 64**2
    n_rest = 2 * 13 * 64 + 2 * 64
    assert describe_groups(groups) == (
        f"decayed: 10 tensors, {n_decayed:,} parameters | "
        f"undecayed: 18 tensors, {n_rest:,} parameters"
    )
    assert [g["weight_decay"] for g in groups] == [0.1, 0.0]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("fp32", [True, False])
def test_norm_is_taken_before_clipping(one_rank: Ranks, stage: int, fp32: bool) -> None:
    model = GPT(CONFIG.gpt_config, CONFIG.seed)
    model(*batch()).backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    expected = torch.nn.utils.get_total_norm(grads).item()
    engine = engine_of(one_rank, stage, fp32)
    engine.backward(engine(*batch()))
    norm = float(optimizer_step(engine, grad_clip=1.0))
    assert expected > 1.2  # clipping would show
    assert norm == pytest.approx(expected, rel=1e-4 if fp32 else 2e-2)


def moments_of(engine: Any) -> list[torch.Tensor]:
    """Both moments and the step count of every parameter that the optimizer has updated."""
    optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    return [value.clone() for state in optimizer.state.values() for value in state.values()]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("fp32", [True, False])
def test_a_gradient_that_is_not_finite_changes_no_weight(
    one_rank: Ranks, stage: int, fp32: bool
) -> None:
    engine = engine_of(one_rank, stage, fp32)
    for bad in (False, True, False):
        before, moments = weights_of(engine), moments_of(engine)
        set_optimizer(engine, CONFIG, lr=1e-3)
        loss = engine(*batch())
        engine.backward(loss * float("nan") if bad else loss)
        norm = float(optimizer_step(engine, grad_clip=1.0))
        assert torch.isfinite(torch.tensor(norm)) == (not bad)
        changed = [k for k, w in weights_of(engine).items() if not torch.equal(w, before[k])]
        assert bool(changed) == (not bad), changed
        assert not bad or all(
            torch.equal(a, b) for a, b in zip(moments, moments_of(engine), strict=True)
        )


def loss_and_saved_numbers(engine: Any) -> tuple[torch.Tensor, int]:
    saved: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = engine(*batch())
    return loss, sum(saved)


@pytest.mark.parametrize("stage", [0, 3])
def test_activation_checkpointing_changes_no_gradient(one_rank: Ranks, stage: int) -> None:
    norms, losses = [], []
    for more in ({}, {"activation_checkpointing": {}}):
        engine = engine_of(one_rank, stage, True, **more)
        loss, n_saved = loss_and_saved_numbers(engine)
        losses.append((loss.item(), n_saved))
        engine.backward(loss)
        norms.append(float(optimizer_step(engine, grad_clip=1.0)))
    assert losses[0][0] == losses[1][0]
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)
    assert losses[1][1] < losses[0][1]  # fewer numbers are kept for the backward pass


@pytest.mark.parametrize("stage", [1, 3])
def test_given_weights_reach_every_stage(one_rank: Ranks, stage: int) -> None:
    given = GPT(CONFIG.gpt_config, seed=99)
    resolved = ds_config(stage)
    model = build_model(CONFIG, resolved, CPU)
    load_weights(model, ((n, p.detach()) for n, p in given.named_parameters()), stage)
    engine, _ = build_engine(model, CONFIG, resolved, one_rank)
    expected = dict(given.named_parameters())
    assert all(torch.equal(w, expected[name]) for name, w in weights_of(engine).items())


def test_stage_3_shards_every_matrix(one_rank: Ranks) -> None:
    resolved = ds_config(3)
    assert zero_stage(resolved) == 3
    model = build_model(CONFIG, resolved, CPU)
    assert all(p.numel() == 0 for p in model.parameters() if len(p.ds_shape) > 1)  # pyright: ignore[reportAttributeAccessIssue]  # zero.Init adds it


def test_the_groups_of_zero_have_the_time_limit_of_the_run(one_rank: Ranks) -> None:
    world: list[Any] = [dist.group.WORLD, groups._clone_world_group()]
    limits = [group._get_backend(torch.device("cpu")).options._timeout for group in world]
    assert limits == [datetime.timedelta(seconds=60)] * 2  # of tests/conftest.py
