from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from model import GPT, GPTConfig
from model.config import MEMORY_USES, MemoryUse
from model.gpt import MLP
from model.linear import Linear, linear

TINY = GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=130)


def test_loss_ignores_future_tokens() -> None:
    model = GPT(TINY)
    tokens = torch.randint(130, (1, 12))
    embedded: list[torch.Tensor] = []

    def keep(module: nn.Module, inputs: object, output: torch.Tensor) -> None:
        output.retain_grad()
        embedded.append(output)

    model.wte.register_forward_hook(keep)
    logits = model(tokens)  # (1, 12, V)
    logits[0, 5].sum().backward()
    assert embedded[0].grad is not None
    norms = embedded[0].grad[0].norm(dim=-1)  # (12,)
    assert (norms[:6] > 0).all()
    assert (norms[6:] == 0).all()


def test_initial_values_follow_the_table() -> None:
    config = GPTConfig(n_layer=8, n_head=4, n_embd=256, block_size=64, vocab_size=1000)
    for name, param in GPT(config).named_parameters():
        residual = name.endswith(("attn.c_proj.weight", "mlp.c_proj.weight"))
        if "ln_" in name:
            assert (param == (1 if name.endswith("weight") else 0)).all(), name
        elif name.endswith("bias"):
            assert (param == 0).all(), name
        else:
            expected = 0.02 * 16**-0.5 if residual else 0.02
            assert param.std().item() == pytest.approx(expected, rel=0.02), name
            assert abs(param.mean().item()) < 0.05 * expected, name


def test_initial_values_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    first = GPT(TINY, seed=5)
    torch.manual_seed(2)
    same, other = GPT(TINY, seed=5), GPT(TINY, seed=6)
    assert all(
        torch.equal(a, b) for a, b in zip(first.parameters(), same.parameters(), strict=True)
    )
    assert not torch.equal(first.wte.weight, other.wte.weight)


def test_first_loss_is_that_of_a_uniform_guess() -> None:
    config = GPTConfig(2, 2, 64, 32, vocab_size=50257)
    tokens = torch.randint(50257, (4, 32))
    loss = GPT(config)(tokens, tokens.roll(1, 1))
    assert loss.item() == pytest.approx(10.825, abs=0.05)  # ln 50,257 = 10.825


def test_one_batch_is_overfitted_below_a_twentieth_of_a_nat() -> None:
    model = GPT(TINY)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    rows = torch.randint(130, (4, 17))
    loss = torch.tensor(torch.inf)
    for _ in range(300):
        loss = model(rows[:, :-1], rows[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05


def test_predict_at_selects_rows_of_the_full_logits() -> None:
    model = GPT(TINY).eval()
    tokens = torch.randint(130, (3, 10))
    positions = torch.tensor([0, 9, 17, 29])
    full = model(tokens).flatten(0, 1)  # (30, 130)
    torch.testing.assert_close(model(tokens, predict_at=positions), full[positions])


def test_padded_columns_count_in_training_only() -> None:
    model = GPT(TINY)
    tokens, targets = torch.randint(130, (2, 2, 10))
    logits = model(tokens)  # (2, 10, 130)
    assert logits.shape[-1] == 130
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(model.eval()(tokens, targets), expected)
    assert model.train()(tokens, targets) > expected + 0.5  # 126 more columns of 130


def test_dropout_draws_in_training_only() -> None:
    model = GPT(GPTConfig(2, 2, 32, 16, vocab_size=130, dropout=0.5))
    tokens = torch.randint(130, (2, 16))
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


def test_too_long_a_sequence_is_refused() -> None:
    with pytest.raises(ValueError, match="17 tokens: the model's block_size is 16"):
        GPT(TINY)(torch.zeros(1, 17, dtype=torch.long))


def test_branches_after_a_shared_beginning_are_sequences_of_their_own() -> None:
    model = GPT(TINY).eval()
    start, branches = torch.randint(130, (5,)), torch.randint(130, (3, 4))
    alone = model(torch.cat([start.expand(3, 5), branches], 1))  # (3, 9, 130)
    packed = torch.cat([start, branches.flatten()])[None]  # (1, 17)
    position_ids = torch.cat([torch.arange(5), torch.arange(5, 9).repeat(3)])[None]
    branch = torch.cat([torch.zeros(5), torch.arange(1, 4).repeat_interleave(4)])  # (17,)
    sees = (branch == 0) | (branch == branch[:, None])  # (17, 17)
    logits = model(packed, position_ids=position_ids, attn_mask=sees.tril()[None, None])[0]
    torch.testing.assert_close(logits[:5], alone[0, :5])
    torch.testing.assert_close(logits[5:].view(3, 4, -1), alone[:, 5:])


def test_losses_of_chosen_positions_are_those_of_the_full_logits() -> None:
    model = GPT(TINY).eval()
    tokens, targets = torch.randint(130, (3, 10)), torch.randint(130, (5,))
    at = torch.tensor([0, 9, 9, 17, 29])
    expected = nn.functional.cross_entropy(
        model(tokens).flatten(0, 1)[at], targets, reduction="none"
    )
    torch.testing.assert_close(model(tokens, targets, predict_at=at), expected)


def test_exact_gelu_is_pytorchs() -> None:
    mlp, x = MLP(replace(TINY, gelu="none")), torch.randn(4, 32)
    torch.testing.assert_close(mlp(x), mlp.c_proj(nn.GELU()(mlp.c_fc(x))))
    assert not torch.equal(mlp(x), mlp.c_proj(nn.GELU("tanh")(mlp.c_fc(x))))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("gelu", ["none", "tanh"])
def test_gelu_computed_again_gives_pytorchs_gradients_and_is_not_kept(
    gelu: str, autocast: bool
) -> None:
    layer, x = Linear(64, 32), torch.randn(4, 8, 64, requires_grad=True)
    inputs = (x, layer.weight, layer.bias)
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = nn.functional.linear(nn.functional.gelu(x, approximate=gelu), layer.weight, layer.bias)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            ours = layer(x, before=gelu)
    # The same bf16 but for its last bit.
    torch.testing.assert_close(ours, y, rtol=2**-7, atol=2**-9)
    assert all(any(t is i for i in inputs) for t in kept)
    upstream = torch.randn_like(y)
    expected = torch.autograd.grad(y, inputs, upstream)
    for mine, theirs in zip(torch.autograd.grad(ours, inputs, upstream), expected, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("gelu", ["none", "tanh"])
def test_products_without_a_gradient_are_pytorchs(gelu: str) -> None:
    x, layer = torch.randn(3, 5, 32), Linear(32, 100)
    expected = nn.functional.gelu(
        nn.functional.linear(x, layer.weight, layer.bias), approximate=gelu
    )
    torch.testing.assert_close(layer(x, after=gelu), expected)
    with torch.no_grad():  # another library computes these
        torch.testing.assert_close(layer(x, after=gelu), expected, rtol=1e-4, atol=1e-4)
        plain = nn.functional.linear(x, layer.weight)
        torch.testing.assert_close(linear(x, layer.weight), plain, rtol=1e-5, atol=1e-5)


def test_no_kernel_with_a_plan_for_each_shape_where_no_gradient_is_wanted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked, attention = [], F.scaled_dot_product_attention

    def watched(*args: Any, **options: Any) -> torch.Tensor:
        asked.append(torch.backends.cuda.cudnn_sdp_enabled())
        return attention(*args, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    config = TINY
    model, tokens = GPT(config), torch.zeros(1, 8, dtype=torch.long)
    model(tokens, tokens)
    with torch.no_grad():
        model(tokens)
    assert asked == [True] * config.n_layer + [False] * config.n_layer


@pytest.mark.parametrize("use", MEMORY_USES)
def test_what_a_gpu_keeps_changes_no_number(use: MemoryUse) -> None:
    config = GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=50)
    tokens = torch.randint(50, (3, 8))

    def numbers(model: GPT) -> list[torch.Tensor]:
        loss = model.train()(tokens, tokens)
        return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]

    other = GPT(config)
    other.use_memory(use)
    keeps = [module.keeps_gelu for module in other.modules() if isinstance(module, MLP)]
    assert keeps == [use.keeps_gelu] * 2
    assert other.chunk_rows == use.chunk_rows
    torch.testing.assert_close(numbers(other), numbers(GPT(config)))
