"""The loss as a GPU computes it, without one: in Triton's interpreter, compiled, and counted."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import model.loss
from model.loss import linear_cross_entropy, token_losses

ROOT = Path(__file__).resolve().parents[2]
BF16_UNIT = 2**-7  # the interpreter cuts off where a GPU rounds

# Runs in a process of its own: Triton decides on its interpreter when the kernel is defined.
INTERPRETED = """
import json, numpy, torch, triton.runtime.interpreter as interpreter
import torch.nn.functional as F
import model.loss
from model import loss_kernel

moved = {"create_masked_load": 0, "create_masked_store": 0}
for name in moved:
    real = getattr(interpreter.interpreter_builder, name)
    def counted(*arguments, real=real, name=name):
        mask = arguments[2 if "store" in name else 1]
        moved[name] += int(mask.data.sum()) * (mask.data.size == loss_kernel.COLUMNS)
        return real(*arguments)
    setattr(interpreter.interpreter_builder, name, counted)

torch.manual_seed(0)
n, V = 7, 10_000  # three programs' widths, the last not full
padded = (3 * torch.randn(n, V + 48)).bfloat16()
targets = torch.randint(V, (n,))
exact = padded[:, :V].double().requires_grad_()
loss = F.cross_entropy(exact, targets, reduction="none")
loss.sum().backward()
found = padded.clone()
got = loss_kernel.to_gradient_(found[:, :V], targets)
reads, writes = (total / (n * V) for total in moved.values())
special = torch.tensor([[1.0, 2.0], [1.0, float("nan")], [float("inf"), 1.0], [1.0, 2.0]])
classes = torch.tensor([0, 0, 0, 2])  # the last is outside the vocabulary

# The whole loss, its last chunk not full, the way it goes on a GPU.
model.loss._is_on_gpu = lambda x: True
x = torch.randn(40, 16, requires_grad=True)
w = torch.randn(384, 16, requires_grad=True)
y = torch.randint(380, (40,))
y[::5] = -100
def grads(value):
    return [value.detach(), *torch.autograd.grad(value, (x, w))]
ours = grads(model.loss.linear_cross_entropy(x, w, y, gpu_rows=16))
full = grads(F.cross_entropy(x @ w.T, y))
each = model.loss.token_losses(x, w, y, 380)
full_each = F.cross_entropy((x @ w.T)[:, :380], y, reduction="none")
print(json.dumps({
    "loss": (got - loss).abs().max().item(),
    "gradient": ((found[:, :V] - exact.grad).abs() / exact.grad.abs()).max().item(),
    "padding": torch.equal(found[:, V:], padded[:, V:]),
    "special": loss_kernel.to_gradient_(special, classes).isnan().tolist(),
    "reads": reads, "writes": writes,
    "whole": max((a - b).abs().max().item() for a, b in zip(ours, full)),
    "each": (each - full_each).abs().max().item(),
}))
"""


def test_interpreted_kernel_gives_losses_and_gradients_of_fp64() -> None:
    kernel = pytest.importorskip("model.loss_kernel")
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", "-c", INTERPRETED]
    done = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["reads"], found["writes"]) == (kernel.READS, kernel.WRITES)
    assert found["loss"] < 1e-5
    assert found["gradient"] <= BF16_UNIT
    assert found["padding"]
    assert found["special"] == [False, True, True, True]
    assert found["whole"] < 1e-5
    assert found["each"] < 1e-5


@pytest.mark.filterwarnings("ignore:the loss goes without")
@pytest.mark.parametrize("gpu_rows", [16, 1000])
def test_without_triton_the_loss_is_the_same(
    gpu_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.loss, "_is_on_gpu", lambda x: True)
    monkeypatch.setattr(model.loss, "ROWS_WITHOUT_KERNEL", 12)
    x, w = torch.randn(50, 24, requires_grad=True), torch.randn(97, 24, requires_grad=True)
    targets = torch.randint(90, (50,))
    targets[::5] = -100
    loss = linear_cross_entropy(x, w, targets, gpu_rows=gpu_rows)
    full = F.cross_entropy(x @ w.T, targets)
    torch.testing.assert_close(loss, full)
    ours, theirs = (torch.autograd.grad(value, (x, w)) for value in (loss, full))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    each = F.cross_entropy((x @ w.T)[:, :90], targets, reduction="none")
    torch.testing.assert_close(token_losses(x, w, targets, 90), each)


def test_a_kernel_that_does_not_compile_is_said_in_one_line() -> None:
    model.loss._kernel.cache_clear()
    with pytest.warns(UserWarning, match=r"^the loss goes without .* Fix: install Triton, a C"):
        assert model.loss._kernel(torch.device("cpu")) is None  # Triton has no CPU
    model.loss._kernel.cache_clear()


@pytest.mark.parametrize("capability", [80, 90])
def test_kernel_compiles_for_gpus(capability: int) -> None:
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from model.loss_kernel import COLUMNS, OPTIONS, to_gradient

    signature = {"logits": "*bf16", "targets": "*i64", "losses": "*fp32", "row_stride": "i32"}
    source = ASTSource(
        to_gradient,  # pyright: ignore[reportArgumentType]  # a JITFunction
        signature | {"V": "constexpr", "COLUMNS": "constexpr"},
        constexprs={"V": 50_304, "COLUMNS": COLUMNS},
    )
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options=OPTIONS)
    assert len(compiled.asm["cubin"]) > 1000
    # The target's logit is read before the warps meet for the first time, and so before any of them
    # overwrites it.
    ptx = compiled.asm["ptx"]
    before_the_loops, _, rest = ptx.partition("\n$L__BB")
    assert before_the_loops.count("ld.global.b16") == 1
    assert "bar.sync" not in before_the_loops
    assert rest.index("bar.sync") < rest.index("st.global")
