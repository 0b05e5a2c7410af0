"""Train with the loops that people write without DeepSpeed: train_step.py compares with them.

Each loop takes micro-batches, (B, T + 1) uint16, does one optimizer step per turn, and appends the
loss of each step, in nats, to `losses`.
"""

import tempfile
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from checkpoint.hf_folder import save_hf_folder
from data.loader import split_windows
from model import GPT, GPTConfig

LR, BETAS, EPS, WEIGHT_DECAY, CLIP = 6e-4, (0.9, 0.95), 1e-8, 0.1, 1.0

Loss = Callable[[Tensor, Tensor], Tensor]  # tokens and targets, (B, T) each -> scalar


class _Block(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        C = config.n_embd
        self.n_head = config.n_head
        self.ln_1, self.ln_2 = nn.LayerNorm(C), nn.LayerNorm(C)
        self.attn = nn.ModuleDict({"c_attn": nn.Linear(C, 3 * C), "c_proj": nn.Linear(C, C)})
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(C, 4 * C), "c_proj": nn.Linear(4 * C, C)})

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        heads = self.attn["c_attn"](self.ln_1(x)).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = heads.permute(2, 0, 3, 1, 4)  # (B, H, T, D) each
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attn["c_proj"](y.transpose(1, 2).reshape(B, T, C))
        y = F.gelu(self.mlp["c_fc"](self.ln_2(x)), approximate="tanh")
        return x + self.mlp["c_proj"](y)


class PlainGPT(nn.Module):
    """GPT-2 in the seed's way: logits and cross-entropy over the whole vocabulary at once."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.padded_vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(_Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.h:
            x = block(x)
        logits = F.linear(self.ln_f(x), self.wte.weight)  # (B, T, V)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def autocast_loop(
    module: nn.Module,
    loss_of: Loss,
    micro_batches: Iterator[Tensor],
    turns: Iterator[None],
    losses: list[float],
    grad_accum: int,
    fused: bool,
) -> None:
    """Train fp32 weights under bf16 autocast, as the seed does.

    Args:
        module: Its parameters are trained; in DDP all ranks take part.
        loss_of: The module's loss.
        micro_batches: In order, without end.
        turns: One element per step.
        losses: Takes the loss of each step.
        grad_accum: Micro-batches per step.
        fused: Of AdamW.
    """
    device = next(module.parameters()).device
    optimizer = torch.optim.AdamW(
        _groups(list(module.parameters())), lr=LR, betas=BETAS, eps=EPS, fused=fused
    )
    for _ in turns:
        optimizer.zero_grad()
        total = torch.zeros((), device=device)
        for micro_step, windows in enumerate(islice(micro_batches, grad_accum)):
            if isinstance(module, DistributedDataParallel):
                module.require_backward_grad_sync = micro_step == grad_accum - 1
            tokens, targets = split_windows(windows, device)
            with torch.autocast(device.type, torch.bfloat16):
                loss = loss_of(tokens, targets)
            loss = loss / grad_accum
            total += loss.detach()
            loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), CLIP)
        optimizer.step()
        if isinstance(module, DistributedDataParallel):
            dist.all_reduce(total)
            total /= dist.get_world_size()
        losses.append(total.item())


def masters_loop(
    model: GPT,
    micro_batches: Iterator[Tensor],
    turns: Iterator[None],
    losses: list[float],
    grad_accum: int,
) -> None:
    """Train bf16 weights with fp32 masters and fp32 accumulation, as zero1 to zero3 do.

    Args as in `autocast_loop`; the weights become bf16.
    """
    device = model.wte.weight.device
    weights = list(model.bfloat16().parameters())
    masters = [nn.Parameter(w.detach().float()) for w in weights]
    sums = [torch.zeros_like(m) for m in masters]
    for master, gradient in zip(masters, sums, strict=True):
        master.grad = gradient
    optimizer = torch.optim.AdamW(_groups(masters), lr=LR, betas=BETAS, eps=EPS, fused=True)
    for _ in turns:
        for gradient in sums:
            gradient.zero_()
        total = torch.zeros((), device=device)
        for windows in islice(micro_batches, grad_accum):
            loss = model(*split_windows(windows, device)) / grad_accum
            total += loss.detach()
            loss.backward()
            for gradient, weight in zip(sums, weights, strict=True):
                assert weight.grad is not None
                gradient += weight.grad
            model.zero_grad()
        nn.utils.clip_grad_norm_(masters, CLIP)
        optimizer.step()
        with torch.no_grad():
            for weight, master in zip(weights, masters, strict=True):
                weight.copy_(master)
        losses.append(total.item())


def trainer_loop(
    model: nn.Module,
    micro_batches: Iterator[Tensor],
    turns: Iterator[None],
    losses: list[float],
    grad_accum: int,
) -> None:
    """Run Hugging Face's Trainer; args as in `autocast_loop`."""
    from transformers import Trainer, TrainerCallback

    first = next(micro_batches)

    class Rows(torch.utils.data.IterableDataset):
        def __iter__(self) -> Iterator[dict[str, Tensor]]:
            windows = first
            while True:
                for row in windows.long():
                    yield {"input_ids": row[:-1], "labels": row[:-1], "shift_labels": row[1:]}
                windows = next(micro_batches)

    class TakeTurns(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if next(turns, "no more turns") == "no more turns":  # a turn is None
                control.should_training_stop = True

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            losses.append(sum(loss.item() for loss in micro_losses))
            micro_losses.clear()

    micro_losses: list[Tensor] = []
    model.register_forward_hook(lambda _m, _a, out: micro_losses.append(out.loss.detach()))
    with tempfile.TemporaryDirectory() as folder:
        arguments = _trainer_arguments(folder, len(first), grad_accum)
        Trainer(model=model, args=arguments, train_dataset=Rows(), callbacks=[TakeTurns()]).train()


def _trainer_arguments(folder: str, micro_batch_size: int, grad_accum: int) -> Any:
    from transformers import TrainingArguments

    return TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=micro_batch_size,
        max_steps=10**6,
        gradient_accumulation_steps=grad_accum,
        learning_rate=LR,
        weight_decay=WEIGHT_DECAY,
        lr_scheduler_type="constant",
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        adam_epsilon=EPS,
        max_grad_norm=CLIP,
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        remove_unused_columns=False,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def hf_twin(model: GPT) -> nn.Module:
    """Return Hugging Face's GPT-2 in training mode with the same weights, on the same device."""
    from transformers import GPT2LMHeadModel

    with tempfile.TemporaryDirectory() as folder:
        save_hf_folder(Path(folder) / "hf", model.config, model.named_parameters())
        twin = GPT2LMHeadModel.from_pretrained(Path(folder) / "hf")
    to: dict[str, Any] = {"device": model.wte.weight.device}  # transformers hides `to`'s types
    return twin.train().to(**to)


def hf_loss(model: nn.Module, tokens: Tensor, targets: Tensor) -> Tensor:
    """Return the loss of Hugging Face's GPT-2 on targets that are already shifted."""
    return model(tokens, labels=tokens, shift_labels=targets.contiguous(), use_cache=False).loss


def _groups(params: list[Any]) -> list[dict[str, Any]]:
    return [
        {"params": [p for p in params if p.dim() >= 2], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
    ]
