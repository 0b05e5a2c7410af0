import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import model.config
from model.loss import linear_cross_entropy


def inputs(n: int, c: int, v: int) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(n, c, requires_grad=True)
    w = (torch.randn(v, c) * 0.3).requires_grad_()
    return x, w, torch.randint(v, (n,))


@pytest.mark.parametrize("chunk_rows", [1, 7, 1000])
def test_loss_and_gradients_equal_full_cross_entropy(
    chunk_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.config, "CHUNK_LOGITS", chunk_rows * 97)
    x, w, y = inputs(50, 24, 97)
    y[::5] = -100
    loss = linear_cross_entropy(x, w, y)
    (3 * loss).backward()
    got = (loss.detach(), x.grad, w.grad)
    x.grad = w.grad = None
    expected = F.cross_entropy(x @ w.T, y)
    (3 * expected).backward()
    for ours, full in zip(got, (expected.detach(), x.grad, w.grad), strict=True):
        torch.testing.assert_close(ours, full, rtol=1e-5, atol=1e-6)


def test_loss_without_targets_is_zero_and_moves_nothing() -> None:
    x, w, y = inputs(8, 4, 11)
    loss = linear_cross_entropy(x, w, torch.full_like(y, -100))
    loss.backward()
    assert loss.item() == 0
    assert x.grad is not None
    assert not x.grad.any()


@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_is_as_close_to_fp32_as_full_bf16_cross_entropy(autocast: bool) -> None:
    x, w, y = inputs(200, 64, 500)
    exact = F.cross_entropy(x @ w.T, y)
    dx, dw = torch.autograd.grad(exact, (x, w))
    if autocast:
        with torch.autocast("cpu", torch.bfloat16):
            loss = linear_cross_entropy(x, w, y)
        ours_x, ours_w = torch.autograd.grad(loss, (x, w))
    else:
        xb, wb = x.detach().bfloat16().requires_grad_(), w.detach().bfloat16().requires_grad_()
        loss = linear_cross_entropy(xb, wb, y)
        ours_x, ours_w = torch.autograd.grad(loss, (xb, wb))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), abs=5e-3)
    for ours, reference in ((ours_x, dx), (ours_w, dw)):
        assert (ours.float() - reference).norm() < 1e-2 * reference.norm()


def test_no_fp32_tensor_holds_the_logits_of_the_whole_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(model.config, "CHUNK_LOGITS", 10 * 512)
    sizes: list[int] = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.dtype == torch.float32:
                sizes.append(out.numel())
            return out

    x, w, y = inputs(300, 8, 512)
    with Recorder():
        linear_cross_entropy(x, w, y).backward()
    assert max(sizes) == 10 * 512  # a chunk; the weights and their gradient are 8 x 512
