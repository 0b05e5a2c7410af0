"""Read what bench/fidelity/keys.py compares: logs, exports, evaluations and every moment."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.record import load_json_lines

if TYPE_CHECKING:
    from torch import Tensor

    Moments = dict[str, Tensor]  # by "parameter/moment"


def keep_moments(path: Path, module: str, function: str, step: int) -> Callable[[int], None]:
    """Have rank 0 write every moment to a file once a function has been called at a step."""

    def sabotage(rank: int) -> None:
        import torch

        owner: Any = importlib.import_module(module)
        real = getattr(owner, function)

        def keeping(engine: Any, *args: Any, **kwargs: Any) -> None:
            real(engine, *args, **kwargs)
            if engine.global_steps in (0, step):  # 0: a checkpoint of another layout was loaded
                moments = read_moments(engine)  # all ranks
                if rank == 0:
                    torch.save(moments, path)

        setattr(owner, function, keeping)

    return sabotage


def read_moments(engine: Any) -> Moments:
    """Return both moments of every parameter, whole (all ranks)."""
    from deepspeed.utils import safe_get_full_optimizer_state

    state = engine.basic_optimizer.state
    stage = engine.zero_optimization_stage()
    if stage in (1, 2):
        # DeepSpeed 0.19.8 links the moments after the step of the first parameter group, before the
        # second has any. So link them again.
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    moments: Moments = {}
    for name, param in engine.module.named_parameters():
        for key in ("exp_avg", "exp_avg_sq"):
            moment = safe_get_full_optimizer_state(param, key) if stage else state[param][key]
            assert moment is not None, name
            moments[f"{name}/{key}"] = moment.clone()
    return moments


def load_moments(path: Path) -> Moments:
    """Read what `keep_moments` wrote."""
    import torch

    return torch.load(path, weights_only=True)


def are_equal(a: Moments, b: Moments) -> bool:
    """Return whether every element of every moment is the same."""
    import torch

    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def largest_moment_difference(a: Moments, b: Moments) -> float:
    """Return the largest difference of a parameter's moment, as a fraction of its 2-norm."""
    return max(float((a[name] - b[name]).norm() / b[name].norm()) for name in b)


def read_rows(run_dir: Path) -> list[dict[str, Any]]:
    """Return what a run has logged, without its speed."""
    rows = load_json_lines(run_dir / "metrics.jsonl")
    return [{k: v for k, v in row.items() if not k.startswith("perf/")} for row in rows]


def losses(run_dir: Path) -> list[float]:
    """Return the losses of all steps, and the last validation loss."""
    rows = read_rows(run_dir)
    train_losses = [row["train/loss"] for row in rows if "train/loss" in row]
    val_losses = [row["val/loss"] for row in rows if "val/loss" in row]
    return [*train_losses, val_losses[-1]]


def is_exported(run_dir: Path) -> bool:
    """Return whether the exported weights, from the live engine, are those of the files."""
    import torch

    from checkpoint.reader import load_model
    from data.tokenizer import VOCAB_SIZE

    (folder,) = (run_dir / "consolidated").iterdir()
    live = load_model(str(folder))[0].state_dict()
    read = load_model(str(run_dir))[0].state_dict()
    return all(torch.equal(live[k][:VOCAB_SIZE], read[k][:VOCAB_SIZE]) for k in live)


def validation_loss(folder: Path, run_dir: Path) -> float:
    """Return the validation loss of the newest step folder, in fp32."""
    import torch

    from checkpoint.reader import load_model
    from data.shards import TokenStream
    from data.tokenizer import VOCAB_SIZE
    from eval.session import Session
    from eval.val_loss import mean_loss
    from training.ranks import Ranks

    model, _ = load_model(str(run_dir))
    stream = TokenStream(folder / "data", "val", VOCAB_SIZE)
    session = Session(model, model.config, torch.device("cpu"), Ranks())
    return mean_loss(session, stream, seq_len=64, eval_tokens=256, batch_size=4)
