"""Every ZeRO stage and rank count against one plain PyTorch loop, on identical data.

    python bench/parity.py --out runs/parity.json

Each cell is one run of `deepspeed --num_gpus N train.py`; the reference shares no code with it: its
own GPT-2, batches, schedule and loop. Resumable: cells in --out are not run again.
"""

import argparse
import json
import math
import os
import platform
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: import from the repository root, exactly as train.py does
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

ROOT = Path(__file__).resolve().parents[1]
N_LAYER, N_HEAD, N_EMBD = 2, 2, 64  # --model debug
SEQ_LEN, N_SEQUENCES, GRAD_ACCUM = 64, 8, 2  # 8 sequences divide among 4 ranks
VOCAB_SIZE, PADDED_VOCAB_SIZE = 50257, 50304
LR, WARMUP, WEIGHT_DECAY, CLIP = 1e-3, 5, 0.1, 1.0
TOLERANCE = {"fp32": 2e-6, "bf16": 2e-3}
LAUNCH_TIMEOUT_S = 300


def write_inputs(folder: Path, n_tokens: int) -> None:
    """Write tokens of a skewed distribution, and a random GPT-2 of the debug preset's shape."""
    rng = np.random.default_rng(7)
    tokens = np.minimum(rng.zipf(1.2, size=n_tokens), VOCAB_SIZE - 1).astype("<u2")
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
    return F.linear(F.layer_norm(x, (C,), w["ln_f.weight"], w["ln_f.bias"]), w["wte.weight"])


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
        norm = torch.stack([g.double().norm() for g in sums]).norm()  # fp32 sums are off by 1e-6
        torch.nn.utils.clip_grads_with_norm_(masters, CLIP, norm.float())
        for group in optimizer.param_groups:
            group["lr"] = _lr_at(step, steps)
        optimizer.step()
        with torch.no_grad():
            for weight, master in zip(weights, masters, strict=True):
                weight.copy_(master)
        losses.append(total)
    return losses


def write_ds_config(folder: Path, stage: int, precision: str) -> Path:
    """Write the shipped ds_config of a stage, in fp32 if that is asked for."""
    ds_config = json.loads((ROOT / "ds_configs" / f"zero{stage}.json").read_text())
    if precision == "fp32":
        ds_config.pop("bf16", None)
        ds_config.pop("torch_autocast", None)
    path = folder / f"zero{stage}_{precision}.json"
    path.write_text(json.dumps(ds_config))
    return path


def launch(n_ranks: int, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """Run `deepspeed --num_gpus N train.py …` on the CPU with a free port and a time limit."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(n_ranks)]
    command += ["--master_addr", "127.0.0.1", "--master_port", str(port), "train.py", *arguments]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
        timeout=LAUNCH_TIMEOUT_S,
    )  # fmt: skip


def engine_losses(
    folder: Path, stage: int, n_ranks: int, precision: str, steps: int
) -> list[float]:
    """Train through the `deepspeed` launcher; return the loss of each step, in nats."""
    run_dir = folder / f"zero{stage}_{n_ranks}_{precision}"
    done = launch(
        n_ranks,
        ["--model", "debug", "--init_from", str(folder / "init"), "--shuffle", "false",
         "--data_dir", str(folder / "data"), "--run_dir", str(run_dir), "--resume", "none",
         "--ds_config", str(write_ds_config(folder, stage, precision)),
         "--batch_tokens", str(N_SEQUENCES * SEQ_LEN),
         "--micro_batch_size", str(N_SEQUENCES // GRAD_ACCUM // n_ranks),
         "--max_steps", str(steps), "--warmup_steps", str(WARMUP), "--decay_steps", str(steps),
         "--lr", str(LR), "--weight_decay", str(WEIGHT_DECAY), "--grad_clip", str(CLIP),
         "--eval_every", str(steps), "--eval_tokens", str(SEQ_LEN), "--sample_tokens", "1"],
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"zero{stage}, {n_ranks} ranks:\n{done.stdout}{done.stderr}")
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row["train/loss"] for row in rows if "train/loss" in row]


def reference_precision(stage: int, precision: str) -> str:
    """Name the arithmetic that a shipped ds_config means: stage 0 has fp32 weights."""
    return "autocast" if stage == 0 and precision == "bf16" else precision


def largest_difference(a: list[float], b: list[float]) -> float:
    """Return the largest difference of two curves of the same length."""
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def print_table(cells: dict[str, Any]) -> None:
    """Print one row per precision and stage, one column per rank count."""
    print("| precision | stage | 1 rank | 2 ranks | 4 ranks |\n|---|---|---|---|---|")
    for precision in TOLERANCE:
        for stage in range(4):
            row = [cells.get(f"{precision}/zero{stage}/{n}") for n in (1, 2, 4)]
            shown = " | ".join("" if c is None else f"{c['difference']:.1e}" for c in row)
            print(f"| {precision} | {stage} | {shown} |")


def main() -> int:
    """Run the command line; status 1 if a cell is outside its tolerance."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--out", type=Path, default=Path("runs/parity.json"), help="JSON")
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    cells = json.loads(args.out.read_text())["cells"] if args.out.exists() else {}
    result = {"torch": torch.__version__, "machine": platform.machine(), "cells": cells}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_inputs(folder, n_tokens=args.steps * N_SEQUENCES * SEQ_LEN + 1)
        kinds = ("fp32", "autocast", "bf16")
        references = {p: reference_losses(folder, p, args.steps) for p in kinds}
        for precision, tolerance in TOLERANCE.items():
            for stage in range(4):
                for n_ranks in (1, 2, 4):
                    name = f"{precision}/zero{stage}/{n_ranks}"
                    if name in cells:
                        continue
                    losses = engine_losses(folder, stage, n_ranks, precision, args.steps)
                    expected = references[reference_precision(stage, precision)]
                    difference = largest_difference(losses, expected)
                    cells[name] = {"difference": difference, "ok": difference <= tolerance}
                    args.out.write_text(json.dumps(result, indent=1))
                    print(name, f"{difference:.2e}", file=sys.stderr, flush=True)
    print_table(cells)
    return 0 if all(cell["ok"] for cell in cells.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
