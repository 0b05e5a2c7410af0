"""Build a DeepSpeed engine from a TrainConfig: zero.Init, parameter groups, compilation."""

import functools
import os
import shutil
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.gpt import GPT
from training import deepspeed_fixes as fixes
from training.config import TrainConfig
from training.ds_config import offloads, zero_stage
from training.ranks import Ranks

Forward = Callable[..., Tensor]

# A C++20 compiler, which Inductor needs, knows the instructions of this processor: trying each of
# them out is half of a cold compilation.
INDUCTOR_OPTIONS: dict[str, Any] = {"cpp.vec_isa_ok": True}


def ask_for_determinism() -> None:
    """Have PyTorch take deterministic kernels only, from here on; it raises where it has none."""
    # Else cuBLAS may choose another algorithm at each call.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # Filling finds errors in programs, and takes time.
    setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # noqa: B010


def build_model(config: TrainConfig, ds_config: dict[str, Any], device: torch.device) -> GPT:
    """Build the model with its initial values, under zero.Init at stage 3 (all ranks)."""
    import deepspeed

    if zero_stage(ds_config) < 3:
        with device:  # where zero.Init builds too: the same generator, the same values
            return GPT(config.gpt_config, config.seed)
    with fixes.one_line_key_errors(config), deepspeed.zero.Init(config_dict_or_path=ds_config):
        model = GPT(config.gpt_config, config.seed)
    # The head reads wte outside wte's own forward: gather it for the whole of GPT.forward.
    deepspeed.zero.register_external_parameter(model, model.wte.weight)
    return model


def load_weights(model: GPT, weights: Iterable[tuple[str, Tensor]], stage: int) -> None:
    """Copy weights into the model, one at a time (all ranks; at stage 3 rank 0's count)."""
    import deepspeed

    params = dict(model.named_parameters())
    for name, weight in weights:
        param = params.pop(name)
        with (
            deepspeed.zero.GatheredParameters([param], modifier_rank=0, enabled=stage == 3),
            torch.no_grad(),
        ):
            param.copy_(weight)
    assert not params, f"weights without a value: {sorted(params)}"


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split the parameters: decay for two dimensions and more, none for the rest.

    Under zero.Init a parameter's own shape is (0,); `ds_shape` is the real one.
    """
    decayed: dict[str, Any] = {"params": [], "weight_decay": weight_decay}
    undecayed: dict[str, Any] = {"params": [], "weight_decay": 0.0}
    for param in model.parameters():
        group = decayed if len(real_shape(param)) > 1 else undecayed
        group["params"].append(param)
    return [decayed, undecayed]


def real_shape(param: Tensor) -> torch.Size:
    """Return the shape of the whole parameter, sharded by ZeRO-3 or not."""
    return getattr(param, "ds_shape", param.shape)


def describe_groups(groups: list[dict[str, Any]]) -> str:
    """Count tensors and parameters (padded vocabulary) with and without weight decay."""
    counts = []
    for group, what in zip(groups, ("decayed", "undecayed"), strict=True):
        n_params = sum(real_shape(p).numel() for p in group["params"])
        counts.append(f"{what}: {len(group['params'])} tensors, {n_params:,} parameters")
    return " | ".join(counts)


def build_engine(
    model: GPT, config: TrainConfig, ds_config: dict[str, Any], ranks: Ranks
) -> tuple[Any, str]:
    """Hand the model to DeepSpeed (all ranks); return the engine and a line about its groups."""
    import deepspeed

    if offloads(ds_config, "optimizer"):
        fixes.build_cpu_adam(ranks)
    can_compile = model.ln_f.weight.is_cuda and zero_stage(ds_config) < 3 and shutil.which("gcc")
    groups = decay_groups(model, config.weight_decay)
    n_padded = config.gpt_config.padded_vocab_size - config.gpt_config.vocab_size
    description = f"{describe_groups(groups)} | with wte's {n_padded} rows of padding"
    if config.compile == "true" or (config.compile == "auto" and can_compile):
        compile_blocks(model)
        description += " | blocks compiled"
    if "activation_checkpointing" in ds_config:
        for block in model.h:
            block.forward = functools.partial(
                checkpoint,
                block.forward,
                use_reentrant=False,
                preserve_rng_state=config.dropout > 0,
            )
    torch.manual_seed(config.seed + ranks.rank)  # dropout: each rank draws its own
    with fixes.building_engine(config):
        engine, *_ = deepspeed.initialize(
            model=model,
            model_parameters=groups,  # pyright: ignore[reportArgumentType]  # annotated too narrowly
            config=ds_config,
            dist_init_required=False,
        )
    fixes.fix_engine(engine)
    named = torch.profiler.record_function("reduce")(engine.allreduce_gradients)
    setattr(engine, "allreduce_gradients", named)  # noqa: B010  # pyright: a method
    return engine, description


def compile_blocks(model: GPT) -> None:
    """Compile the training pass of each block in place; one graph serves all blocks.

    The names of the weights stay. Evaluation, with its many shapes, masks and caches, stays eager.
    """
    for block in model.h:
        compiled = torch.compile(block.forward, options=INDUCTOR_OPTIONS)
        block.forward = functools.partial(_forward, block, compiled, block.forward)


def _forward(block: nn.Module, compiled: Forward, eager: Forward, *args: Any) -> Tensor:
    forward = compiled if block.training else eager
    return forward(*args)
