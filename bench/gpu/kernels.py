"""Measure single operations: what the card reaches, and whether the numbers are right."""

from __future__ import annotations

import functools
import itertools
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu.device import Options, Row, device, median_ms, on_gpu, seconds, take_memory_peaks
from bench.record import stamp
from bench.speed.attention import relative_error

HEAD_ROWS, REAL_TOKENS = 50_304, 50_257  # of GPT-2's vocabulary, with padding and without
TOLERANCE = 2e-2  # of bf16 against fp64, relative

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def setup(options: Options) -> Row:
    """Versions, which attention is taken, and what the card reaches on the model's products."""
    found: Row = {"python": sys.version.split()[0], **stamp()}
    if on_gpu():
        found |= _card()
    batch, seq_len = (2, 32) if options.tiny else (64, 1024)
    tokens = torch.randint(REAL_TOKENS, (batch, seq_len + 1)).to(torch.uint16)
    moved = tokens.to(device(), non_blocking=True).long().cpu()
    found["uint16_ok"] = bool((moved == tokens.long()).all())
    found |= _attention_choices(batch, seq_len)
    found["ok"] = found["uint16_ok"]
    return found | {"tflops": _products(batch * seq_len, 64 if options.tiny else 768)}


def _card() -> Row:
    card = torch.cuda.get_device_properties(0)
    smi = subprocess.run(["nvidia-smi"], capture_output=True, encoding="utf-8", timeout=20)
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy_ms = median_ms(lambda: target.copy_(source))
    return {
        "device": card.name,
        "memory_gib": round(card.total_memory / 2**30, 1),
        "cudnn": torch.backends.cudnn.version(),
        "sms": card.multi_processor_count,
        "nccl": str(vars(torch.cuda)["nccl"].version()),
        "smi": smi.stdout[:1500],
        "copy_tb_s": round(2 * source.numel() / copy_ms / 1e9, 2),
    }


def _attention_choices(batch: int, seq_len: int) -> Row:
    # Which kernel each use takes, and how long its first call is, in which cuDNN makes its plans.
    from torch.nn.attention import SDPBackend

    backends: dict[str, Any] = dict(SDPBackend.__members__)
    names = {int(backend): name for name, backend in backends.items()}
    mask = torch.ones(batch, 1, seq_len, seq_len, dtype=torch.bool, device=device()).tril()
    uses = {
        "training": (seq_len, seq_len, None, True),
        "masked": (seq_len, seq_len, mask, False),
        "decoding": (1, seq_len // 2, None, False),
    }
    found: Row = {}
    for use, (queries, keys, its_mask, trains) in uses.items():
        qkv = [
            torch.randn(batch, 12, T, 64, device=device(), dtype=torch.bfloat16)
            for T in (queries, keys, keys)
        ]
        q, k, v = (tensor.requires_grad_(trains) for tensor in qkv)
        choice = int(torch.ops.aten._fused_sdp_choice(q, k, v, its_mask, 0.0, trains))
        attend = functools.partial(
            F.scaled_dot_product_attention, q, k, v, attn_mask=its_mask, is_causal=trains
        )
        found[f"attention_{use}"] = names.get(choice, choice)
        found[f"attention_{use}_first_s"] = seconds(attend)
    return found


def _products(M: int, C: int) -> dict[str, float]:
    # TFLOP/s of (m, k) by (k, n), in the model's own shapes.
    shapes = {"qkv": (M, C, 3 * C), "proj": (M, C, C), "fc": (M, C, 4 * C), "c_proj": (M, 4 * C, C)}
    if on_gpu():
        V = HEAD_ROWS
        shapes["square 8192"] = (8192, 8192, 8192)
        shapes["validation 50257"] = (4096, C, REAL_TOKENS)
        shapes["validation 50304"] = (4096, C, V)
        chunks = {f"chunk {rows}": rows for rows in (662, 4096, 8192, 16_384)}  # 662: 2^25 logits
        for name, rows in ({"head": M} | chunks).items():
            shapes |= {
                name: (rows, C, V),
                f"{name} dx": (rows, V, C),
                f"{name} dw": (V, rows, C),
            }
    found = {}
    for name, (m, k, n) in shapes.items():
        x = torch.randn(m, k, device=device(), dtype=torch.bfloat16)
        w = torch.randn(n, k, device=device(), dtype=torch.bfloat16)
        ms = median_ms(functools.partial(torch.mm, x, w.T), repeats=10)
        found[name] = round(2 * m * k * n / ms / 1e9, 1)
    return found


def gradients(options: Options) -> Row:
    """The loss and the linear layer of a GELU, in bf16, against fp64."""
    from model.linear import linear_of_gelu

    generator = torch.Generator(device()).manual_seed(3)

    def randn(*shape: int, std: float = 1.0) -> Tensor:
        values = torch.randn(*shape, device=device(), generator=generator) * std
        return values.bfloat16().requires_grad_()

    N, C = (64, 64) if options.tiny else (4096, 768)
    x, w, h, w_out = randn(N, C), randn(HEAD_ROWS, C, std=0.02), randn(N, 4 * C), randn(C, 4 * C)
    bias = torch.zeros(C, device=device(), dtype=torch.bfloat16)
    y = torch.randint(REAL_TOKENS, (N,), device=device(), generator=generator)
    y[::7] = -100
    exact = [t.detach().double().requires_grad_() for t in (x, w, h, w_out)]
    full = F.cross_entropy(exact[0] @ exact[1].T, y)
    full.backward()
    F.linear(F.gelu(exact[2], approximate="tanh"), exact[3]).square().mean().backward()
    found: Row = {}
    for name, loss_of in _losses().items():
        x.grad = w.grad = None
        loss = loss_of(x, w, y)
        loss.backward()
        found[name] = {"loss": abs(loss.item() - full.item())} | _errors((x, w), exact[:2])
    linear_of_gelu(h, w_out, bias, "tanh").square().mean().backward()
    found["linear_of_gelu"] = _errors((h, w_out), exact[2:])
    errors = itertools.chain.from_iterable(part.values() for part in found.values())
    return found | {"ok": all(error < TOLERANCE for error in errors)}


def _errors(ours: tuple[Tensor, Tensor], exact: list[Tensor]) -> dict[str, float]:
    found = {}
    for name, a, b in zip(("dx", "dw"), ours, exact, strict=True):
        assert a.grad is not None
        assert b.grad is not None
        found[name] = relative_error(a.grad, b.grad)
    return found


def _losses() -> dict[str, Loss]:
    from model.config import MEMORY_USES
    from model.loss import linear_cross_entropy

    chunks = sorted({use.chunk_rows for use in MEMORY_USES})
    return {
        f"ours, {rows} rows": functools.partial(linear_cross_entropy, gpu_rows=rows)
        for rows in chunks
    }


def losses(options: Options) -> Row:
    """The loss and others' at the real size, forward and backward: ms and peak GiB."""
    from bench.speed.cross_entropy import candidate

    N, C = (64, 64) if options.tiny else (65_536, 768)
    x = torch.randn(N, C, device=device()).bfloat16().requires_grad_()
    w = (torch.randn(HEAD_ROWS, C, device=device()) * 0.02).bfloat16().requires_grad_()
    y = torch.randint(REAL_TOKENS, (N,), device=device())
    others = {name: candidate(name) for name in ("deepspeed_chunked", "full_bf16_logits")}
    found: Row = {}
    for name, loss_of in (_losses() | others).items():

        def run(loss_of: Loss = loss_of) -> None:
            x.grad = w.grad = None
            loss_of(x, w, y).backward()

        take_memory_peaks()
        try:
            ms = median_ms(run, repeats=3 if options.tiny else 8, warm_up=2)
            found[name] = {"ms": ms} | take_memory_peaks()
        except RuntimeError as error:  # out of memory, for example
            found[name] = {"error": str(error).splitlines()[0][:200]}
    return found


def attention(options: Options) -> Row:
    """Every backend of causal attention, forward and backward: error and ms."""
    from bench.speed.attention import measure

    shape = (2, 32, 64, 2) if options.tiny else (64, 1024, 768, 12)
    return {"rows": measure(*shape, 3 if options.tiny else 10)}
