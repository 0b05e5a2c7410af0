"""Time causal attention, forward and backward, by each backend that this device has.

python bench/speed/attention.py --out runs/bench/6_attention.json

First comes each backend's error against fp64, then its time; a GPU's is taken by device events.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # run as a file: import from the repository root, exactly as train.py does
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from bench.record import Rows, record
from command_line import OneLineParser

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn.attention import SDPBackend

WARM_UP = 3  # passes


def attend(qkv: Tensor, n_head: int, backend: SDPBackend) -> tuple[Tensor, Tensor]:
    """Return the output (B, H, T, D) and the gradient of its sum of squares, (B, T, 3·C)."""
    import torch
    import torch.nn.functional as F
    from torch.nn.attention import sdpa_kernel

    B, T, three_c = qkv.shape
    leaf = qkv.detach().requires_grad_()
    q, k, v = leaf.view(B, T, 3, n_head, three_c // 3 // n_head).permute(2, 0, 3, 1, 4)
    with sdpa_kernel(backend):
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, H, T, D)
        (gradient,) = torch.autograd.grad(y.square().sum(), leaf)
    return y.detach(), gradient


def relative_error(value: Tensor, exact: Tensor) -> float:
    """Return the 2-norm of the difference over that of the exact value."""
    return ((value.double() - exact).norm() / exact.norm()).item()


def median_ms(
    run: Callable[[], object], device: str, repeats: int, warm_up: int = WARM_UP
) -> float:
    """Return the median time of a call, on a GPU between events."""
    import torch

    times = []
    for _ in range(warm_up + repeats):
        if device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        else:
            started = time.perf_counter()
            run()
            times.append(1000 * (time.perf_counter() - started))
    return statistics.median(times[warm_up:])


def measure(B: int, T: int, C: int, n_head: int, repeats: int) -> Rows:
    """Return a row for each backend."""
    import torch
    from torch.nn.attention import SDPBackend

    from training.ranks import Ranks
    from training.rendezvous import choose_device

    device = choose_device(Ranks()).type
    generator = torch.Generator(device).manual_seed(1)
    qkv = torch.randn(B, T, 3 * C, device=device, generator=generator).bfloat16()
    exact = attend(qkv[:1].double(), n_head, SDPBackend.MATH)
    rows: Rows = []
    for name, backend in SDPBackend.__members__.items():
        try:
            found = attend(qkv[:1], n_head, backend)
        except RuntimeError as e:  # no such kernel here
            print(f"{name}: {str(e).splitlines()[0]}", file=sys.stderr)
            continue
        errors = [relative_error(a, b) for a, b in zip(found, exact, strict=True)]
        ms = median_ms(lambda backend=backend: attend(qkv, n_head, backend), device, repeats)
        rows.append(
            {
                "backend": name,
                "error of the output": f"{errors[0]:.1e}",
                "of the gradient": f"{errors[1]:.1e}",
                "ms": f"{ms:.2f}",
            }
        )
    return rows


def main() -> None:
    parser = OneLineParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=4, help="sequences (default: 4)")
    parser.add_argument("--seq_len", type=int, default=1024, help="tokens (default: 1024)")
    parser.add_argument("--n_embd", type=int, default=768, help="width (default: 768)")
    parser.add_argument("--n_head", type=int, default=12, help="(default: 12)")
    parser.add_argument("--repeats", type=int, default=20, help="timed passes (default: 20)")
    parser.add_argument("--out", type=Path, required=True, help="JSON file; results are added")
    args = parser.parse_args()
    rows = measure(args.batch, args.seq_len, args.n_embd, args.n_head, args.repeats)
    shape = f"{args.batch} × {args.seq_len} tokens, width {args.n_embd}, {args.n_head} heads"
    record(args.out, f"Attention, forward and backward, {shape}", rows, rows)


if __name__ == "__main__":
    main()
