"""Measure time and peak memory of cross-entropies, forward and backward, each in a process.

python bench/speed/cross_entropy.py --out cross_entropy.json
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # run as a file: import from the repository root, exactly as train.py does
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from bench.processes import flags
from bench.record import record
from command_line import OneLineParser

if TYPE_CHECKING:
    from torch import Tensor

    Loss = Callable[[Tensor, Tensor, Tensor], Tensor]

NAMES = (
    "full_fp32_logits",
    "full_bf16_logits",
    "checkpointed_chunks",
    "torch_linear_cross_entropy",
    "deepspeed_chunked",
    "ours",
)


def candidate(name: str) -> Loss:
    """Return the loss called `name`: (N, C) hidden states, (V, C) head, (N,) targets -> scalar."""
    import torch
    import torch.nn.functional as F
    from torch.utils.checkpoint import checkpoint

    from model.loss import linear_cross_entropy

    def checkpointed(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
        def chunk_loss(x: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy((x @ w.T).float(), y, reduction="sum")

        chunks = zip(x.split(256), y.split(256), strict=True)
        losses = [checkpoint(chunk_loss, *chunk, use_reentrant=False) for chunk in chunks]
        return torch.stack(losses).sum() / len(y)

    def deepspeed_chunked(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
        from deepspeed.runtime.chunked_cross_entropy import chunked_cross_entropy

        return chunked_cross_entropy(x @ w.T, y)

    losses: dict[str, Loss] = {
        "full_fp32_logits": lambda x, w, y: F.cross_entropy((x @ w.T).float(), y),
        "full_bf16_logits": lambda x, w, y: F.cross_entropy(x @ w.T, y),
        "checkpointed_chunks": checkpointed,
        # Only new versions of PyTorch have it.
        "torch_linear_cross_entropy": lambda x, w, y: F.linear_cross_entropy(x, w, y),
        "deepspeed_chunked": deepspeed_chunked,
        "ours": linear_cross_entropy,
    }
    return losses[name]


def measure(name: str, batch: int, seq_len: int, n_embd: int, repeats: int) -> dict[str, object]:
    """Time forward and backward of one candidate; return the medians and the equality proof."""
    import torch

    from training.ranks import Ranks
    from training.rendezvous import choose_device

    loss_of = candidate(name)
    device = choose_device(Ranks()).type
    torch.manual_seed(0)
    x = torch.randn(batch * seq_len, n_embd, device=device)
    w = torch.randn(50304, n_embd, device=device) * 0.02
    y = torch.randint(50257, (batch * seq_len,), device=device)
    x, w = (t.bfloat16().requires_grad_() for t in (x, w))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times: list[float] = []
    loss = torch.tensor(0.0)
    for _ in range(repeats + 1):
        x.grad = w.grad = None
        start = time.perf_counter()
        loss = loss_of(x, w, y)
        loss.backward()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    peak_mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    if device == "cuda":
        peak_mib = torch.cuda.max_memory_allocated() / 2**20
    assert x.grad is not None
    assert w.grad is not None
    return {
        "candidate": name,
        "loss": loss.item(),
        "grad_norm_x": x.grad.float().norm().item(),
        "grad_norm_w": w.grad.float().norm().item(),
        "median_s": statistics.median(times[1:]),
        "peak_mib": round(peak_mib),
    }


def main() -> None:
    parser = OneLineParser(description=__doc__)
    parser.add_argument("--candidate", choices=NAMES, help="measure one, in this process")
    parser.add_argument("--batch", type=int, default=4, help="sequences")
    parser.add_argument("--seq_len", type=int, default=1024, help="tokens per sequence")
    parser.add_argument("--n_embd", type=int, default=768)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="JSON file; results are added")
    args = parser.parse_args()
    if args.candidate:
        found = measure(args.candidate, args.batch, args.seq_len, args.n_embd, args.repeats)
        print(json.dumps(found))
        return
    sizes = flags(batch=args.batch, seq_len=args.seq_len, n_embd=args.n_embd, repeats=args.repeats)
    results = []
    for name in NAMES:  # a process each: peak memory is the process's
        command = [sys.executable, __file__, "--candidate", name, *sizes]
        done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
        if done.returncode:
            print(f"{name}: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
            continue
        results.append(json.loads(done.stdout.splitlines()[-1]))
        print(results[-1], file=sys.stderr)
    if args.out:
        rows = [
            {
                "candidate": result["candidate"],
                "loss": f"{result['loss']:.5f}",
                "seconds": f"{result['median_s']:.2f}",
                "peak MiB": f"{result['peak_mib']:,}",
            }
            for result in results
        ]
        shape = f"{args.batch} × {args.seq_len} tokens of width {args.n_embd}"
        record(args.out, f"Cross-entropy, forward and backward, {shape}", rows, results)


if __name__ == "__main__":
    main()
