"""Train GPT-2 in plain PyTorch, written out: parity.py compares the engine with it.

It shares no code with the product: its own forward pass, batches, schedule and loop.
"""

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

N_LAYER, N_HEAD, N_EMBD = 2, 2, 64  # --model debug
VOCAB_SIZE, PADDED_VOCAB_SIZE = 50257, 50304
N_TOKENS = 1000
SEQ_LEN, N_SEQUENCES, GRAD_ACCUM = 64, 8, 2  # 8 sequences divide among 4 ranks
LR, WARMUP, WEIGHT_DECAY, CLIP = 1e-3, 5, 0.1, 1.0


def write_inputs(folder: Path, n_tokens: int) -> None:
    """Write tokens of a skewed distribution, and a random GPT-2 of the debug preset's shape.

    The tokens are below N_TOKENS: one that comes once in a run has an embedding of noise, and its
    loss can depend on the last digits of every weight (docs/LOG.md).
    """
    rng = np.random.default_rng(7)
    tokens = (rng.zipf(1.2, size=n_tokens) % N_TOKENS).astype("<u2")
    (folder / "data").mkdir(parents=True, exist_ok=True)
    np.save(folder / "data" / "text_train_000001.npy", tokens)
    np.save(folder / "data" / "text_val_000000.npy", tokens[: 4 * SEQ_LEN + 1])
    torch.manual_seed(11)
    config = GPT2Config(n_layer=N_LAYER, n_head=N_HEAD, n_embd=N_EMBD, n_positions=SEQ_LEN)
    GPT2LMHeadModel(config).save_pretrained(folder / "init")


def reference_weights(folder: Path) -> dict[str, Tensor]:
    """Load the random GPT-2 and pad its vocabulary with the mean row, as training does."""
    weights = load_file(folder / "init" / "model.safetensors")
    weights = {name.removeprefix("transformer."): w for name, w in weights.items()}
    wte = weights["wte.weight"]
    padding = wte.mean(0, keepdim=True).expand(PADDED_VOCAB_SIZE - VOCAB_SIZE, -1)
    return weights | {"wte.weight": torch.cat([wte, padding])}


def reference_logits(w: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """Run GPT-2, written out: (B, T) token ids -> (B, T, V) logits; matrices in Conv1D layout."""
    B, T = tokens.shape
    x = w["wte.weight"][tokens] + w["wpe.weight"][:T]  # (B, T, C)
    C = x.shape[-1]
    for i in range(N_LAYER):
        p = {k.removeprefix(f"h.{i}."): v for k, v in w.items() if k.startswith(f"h.{i}.")}
        y = F.layer_norm(x, (C,), p["ln_1.weight"], p["ln_1.bias"])
        y = F.linear(y, p["attn.c_attn.weight"].T, p["attn.c_attn.bias"])  # (B, T, 3C)
        q, k, v = y.view(B, T, 3, N_HEAD, C // N_HEAD).permute(2, 0, 3, 1, 4)  # (B, H, T, D)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        y = y.transpose(1, 2).reshape(B, T, C)
        x = x + F.linear(y, p["attn.c_proj.weight"].T, p["attn.c_proj.bias"])
        y = F.layer_norm(x, (C,), p["ln_2.weight"], p["ln_2.bias"])
        y = F.gelu(F.linear(y, p["mlp.c_fc.weight"].T, p["mlp.c_fc.bias"]), approximate="tanh")
        x = x + F.linear(y, p["mlp.c_proj.weight"].T, p["mlp.c_proj.bias"])
    x = F.layer_norm(x, (C,), w["ln_f.weight"], w["ln_f.bias"])
    dtype = torch.bfloat16 if torch.is_autocast_enabled("cpu") else x.dtype
    # Products of bf16 are summed in fp32. Written as fp32, they take seconds on a CPU without bf16
    # units; in bf16 they would take minutes.
    x, wte = (t.to(dtype).float() for t in (x, w["wte.weight"]))
    with torch.autocast("cpu", enabled=False):
        return F.linear(x, wte).to(dtype)


def _batches(folder: Path, step: int) -> Iterator[tuple[Tensor, Tensor]]:
    tokens = torch.from_numpy(np.load(folder / "data" / "text_train_000001.npy").astype(np.int64))
    first = step * N_SEQUENCES
    rows = torch.stack(
        [tokens[i * SEQ_LEN : (i + 1) * SEQ_LEN + 1] for i in range(first, first + N_SEQUENCES)]
    )
    for part in rows.chunk(GRAD_ACCUM):
        yield part[:, :-1], part[:, 1:]


def _lr_at(step: int, steps: int) -> float:
    if step < WARMUP:
        return LR * (step + 1) / WARMUP
    ratio = (step - WARMUP) / (steps - WARMUP)
    return 0.1 * LR + 0.5 * (1 + math.cos(math.pi * ratio)) * 0.9 * LR


def reference_losses(folder: Path, precision: str, steps: int) -> list[float]:
    """Train in plain PyTorch; return the loss of each step, in nats.

    Args:
        folder: What `write_inputs` wrote.
        precision: "fp32"; "autocast": fp32 weights, bf16 products; "bf16": bf16 weights, fp32
            masters, fp32 accumulation.
        steps: Optimizer steps.
    """
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    named = {n: w.to(dtype).requires_grad_() for n, w in reference_weights(folder).items()}
    weights = list(named.values())
    masters = [w.detach().float().clone().requires_grad_() for w in weights]
    groups = [
        {"params": [m for m in masters if m.dim() >= 2], "weight_decay": WEIGHT_DECAY},
        {"params": [m for m in masters if m.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), eps=1e-8)
    losses = []
    for step in range(steps):
        total = 0.0
        sums = [torch.zeros_like(m) for m in masters]
        for tokens, targets in _batches(folder, step):
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
                logits = reference_logits(named, tokens)  # (B, T, V)
            loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
            (loss / GRAD_ACCUM).backward()
            total += loss.item() / GRAD_ACCUM
            for gradient, weight in zip(sums, weights, strict=True):
                assert weight.grad is not None
                gradient += weight.grad.float()
                weight.grad = None
        for master, gradient in zip(masters, sums, strict=True):
            master.grad = gradient
        # In fp64: fp32 sums are off by 1e-6, as much as parity.py allows.
        norm = torch.stack([g.double().norm() for g in sums]).norm()
        torch.nn.utils.clip_grads_with_norm_(masters, CLIP, norm.float())
        for group in optimizer.param_groups:
            group["lr"] = _lr_at(step, steps)
        optimizer.step()
        with torch.no_grad():
            for weight, master in zip(weights, masters, strict=True):
                weight.copy_(master)
        losses.append(total)
    return losses
