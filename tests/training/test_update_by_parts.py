"""ZeRO-1's reduction and step on each rank's own part of the gradients."""

import json
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from tests import forked
from training import deepspeed_fixes, step

# Each rank prints what one good step, one with a NaN on the last rank, and one good one left.
PROGRAM = """
import hashlib, json, os, sys
import torch, torch.distributed as dist
from training import deepspeed_fixes
from training.config import TrainConfig, resolve_batch, resolve_train_config
from training.ds_config import load_ds_config, resolve_ds_config
from training.engine import build_engine, build_model
from training.rendezvous import init_process_group
from training.health import Health
from training.ranks import read_ranks
from training.step import optimizer_step, set_optimizer

ranks, backend = read_ranks(), sys.argv[1]
device = init_process_group(ranks, 60)
if backend == "nccl":  # a stand-in: the average of all, and of it each rank's own part
    def reduce_scatter_tensor(part, flat, op, group):
        assert op == dist.ReduceOp.AVG and group is not None
        whole = flat / ranks.world_size
        dist.all_reduce(whole, group=group)
        part.copy_(whole.chunk(ranks.world_size)[ranks.rank])
    dist.reduce_scatter_tensor = reduce_scatter_tensor
config = resolve_train_config(model="debug", seq_len=16, micro_batch_size=1,
                                          batch_tokens=16 * ranks.world_size)
batch = resolve_batch(config, ranks.world_size)
ds_config = resolve_ds_config(load_ds_config(config.ds_config), config, batch).ds_config
engine, _ = build_engine(build_model(config, ds_config, device), config, ds_config, ranks)
if backend == "nccl":
    dist.get_backend = lambda group=None: "nccl"
optimizer = engine.optimizer.optimizer

def digest(tensors):
    parts = [t.detach().float().contiguous().numpy().tobytes() for t in tensors]
    return hashlib.sha256(b"".join(parts)).hexdigest()

said, health = [], Health(10)
for step, bad in enumerate((False, True, False)):
    set_optimizer(engine, config, lr=1e-3)
    torch.manual_seed(100 * step + ranks.rank)
    tokens = torch.randint(500, (1, 17))
    loss = engine(tokens[:, :-1], tokens[:, 1:])
    broken = bad and ranks.rank == ranks.world_size - 1
    engine.backward(loss * float("nan") if broken else loss)
    norm = optimizer_step(engine, 1.0)
    health.add(step, loss.detach(), norm)
    verdict = health.judge(ranks.world_size)[-1]
    states = [value for state in optimizer.state.values() for value in state.values()]
    said.append({
        "weights": digest(engine.module.parameters()), "moments": digest(states),
        "masters": digest(p for group in optimizer.param_groups for p in group["params"]),
        "steps": [float(s["step"]) for s in optimizer.state.values()],
        "complaint": verdict.complaint, "norm": str(float(norm)),
    })
print(json.dumps(said))
"""


def run_ranks(tmp_path: Path, n_ranks: int, backend: str) -> list[list[dict[str, Any]]]:
    """Run the program on some ranks; return what each of them said."""
    script = tmp_path / "program.py"
    script.write_text(PROGRAM, encoding="utf-8")
    ended = forked.launch(n_ranks, [backend], tmp_path, script)
    assert ended.returncode == 0, ended.stderr
    return [json.loads(line) for line in ended.stdout.splitlines() if line.startswith("[{")]


@pytest.mark.parametrize(("n_ranks", "backends"), [(2, ("gloo", "nccl")), (4, ("gloo",))])
def test_a_nan_on_another_rank_changes_nothing_on_any(
    n_ranks: int, backends: tuple[str, ...], tmp_path: Path
) -> None:
    first, *others = (run_ranks(tmp_path, n_ranks, backend) for backend in backends)
    assert all(other == first for other in others)  # NCCL's way, and gloo's: the same bits
    for ranks in zip(*first, strict=True):
        assert len({rank["weights"] for rank in ranks}) == 1
        assert len({rank["norm"] for rank in ranks}) == 1
    for rank, (good, bad, last) in enumerate(first):
        assert float(good["norm"]) > 1  # it is clipped
        for name in ("weights", "moments", "masters", "steps"):
            assert bad[name] == good[name], (rank, name)
            assert last[name] != good[name], (rank, name)
        assert "not finite" in bad["complaint"]
        assert (good["complaint"], last["complaint"]) == ("", "")
        assert set(good["steps"]) == {1.0}
        assert set(last["steps"]) == {2.0}


def test_another_deepspeed_keeps_its_own_way(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = types.SimpleNamespace(optimizer=types.SimpleNamespace())
    monkeypatch.setattr(deepspeed_fixes, "UPDATE_SHA256", "of another version")
    with pytest.warns(UserWarning, match=r"its own update, .* Fix: install deepspeed==0.19.8"):
        deepspeed_fixes.update_by_parts(engine)
    assert vars(engine) == {"optimizer": engine.optimizer}
    assert not vars(engine.optimizer)


def stand_in(
    gradients: list[torch.Tensor], weights: list[torch.Tensor], clip: float
) -> types.SimpleNamespace:
    """Return what the step sees of a BF16_Optimizer; its calls are in `calls`."""
    calls: list[str] = []
    return types.SimpleNamespace(
        fp32_groups_gradient_flat_partition=gradients,
        fp32_groups_flat_partition=weights,
        dp_process_group="of the ranks",
        clip_grad=clip,
        calls=calls,
        optimizer=types.SimpleNamespace(step=lambda: calls.append("step")),
        _lazy_init_hp_params_optimizer_state=lambda: calls.append("link"),
        update_lp_params=lambda: calls.append("gather"),
        clear_hp_grads=lambda: calls.append("clear"),
    )


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_no_value_leaves_the_device(clip: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device, where reading a value raises."""
    gradients, weights = ([torch.empty(8, device="meta")] for _ in range(2))
    optimizer = stand_in(gradients, weights, clip)
    monkeypatch.setattr(dist, "all_reduce", lambda *_, **__: None)
    deepspeed_fixes._step_on_parts(optimizer)
    assert optimizer.calls == ["step", "link", "gather", "clear"]
    assert optimizer._global_grad_norm.device.type == "meta"
    with pytest.raises(RuntimeError, match="meta"):
        float(optimizer._global_grad_norm)


def test_the_norm_needs_no_copy_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dtype == torch.float64:
                sizes.append(out.numel())
            return out

    monkeypatch.setattr(step, "NORM_ELEMENTS", 100)
    monkeypatch.setattr(dist, "all_reduce", lambda *_, **__: None)
    gradients = [torch.randn(1234), torch.randn(77)]
    expected = torch.cat(gradients).norm()
    optimizer = stand_in(gradients, [torch.randn(1234), torch.randn(77)], clip=0.0)
    with Copies():
        deepspeed_fixes._step_on_parts(optimizer)
    torch.testing.assert_close(optimizer._global_grad_norm, expected)
    assert max(sizes) <= 100
