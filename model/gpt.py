"""GPT-2 (Radford et al. 2019), weight for weight: names, shapes and initial values."""

import contextlib

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from model.cache import KVCache, LayerCache
from model.config import MEMORY_USES, GPTConfig, MemoryUse
from model.linear import Linear, linear, linear_gelu_linear
from model.loss import linear_cross_entropy, token_losses

# Without cuDNN, which plans each new shape for up to a second: evaluation has many shapes.
EVAL_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
INIT_STD = 0.02  # GPT-2's N(0, 0.02) for Linear and Embedding weights


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = Linear(config.n_embd, config.n_embd)
        self.n_head = config.n_head
        self.dropout = config.dropout

    def forward(self, x: Tensor, cache: LayerCache | None, mask: Tensor | None) -> Tensor:
        B, T, C = x.shape
        H, D = self.n_head, C // self.n_head
        q, k, v = self.c_attn(x).split(C, dim=2)
        q = q.view(B, T, H, D).transpose(1, 2)  # (B, H, T, D)
        k = k.view(B, T, H, D).transpose(1, 2)  # (B, H, T, D)
        v = v.view(B, T, H, D).transpose(1, 2)  # (B, H, T, D)
        if cache is not None:
            k, v = cache.append(k, v)  # (B, H, S, D), S = cached + T
        S = k.shape[2]
        is_causal = mask is None and T == S > 1
        if mask is None and 1 < T < S:
            # New tokens after cached ones: token t sees the first S - T + t + 1 keys. `is_causal`
            # would align the triangle with the first key.
            mask = torch.ones(T, S, dtype=torch.bool, device=x.device).tril(S - T)
        dropout = self.dropout if self.training else 0.0
        has_gradient = torch.is_grad_enabled()
        with contextlib.nullcontext() if has_gradient else sdpa_kernel(EVAL_KERNELS):
            y = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=is_causal
            )
        y = y.transpose(1, 2).reshape(B, T, C)  # (B, T, C)
        return F.dropout(self.c_proj(y), self.dropout, self.training)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)
        self.gelu = config.gelu
        self.dropout = config.dropout
        self.keeps_gelu = False  # for the backward pass, which otherwise computes it again

    def forward(self, x: Tensor) -> Tensor:
        x = linear_gelu_linear(x, self.c_fc, self.c_proj, self.gelu, self.keeps_gelu)
        return F.dropout(x, self.dropout, self.training)


class Block(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cache: LayerCache | None, mask: Tensor | None) -> Tensor:
        x = x + self.attn(self.ln_1(x), cache, mask)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """GPT with a tied head; the head reads `wte`, so there is no second weight.

    Args:
        config: The shape.
        seed: Seed of the initial values; they do not depend on the global generator.
    """

    def __init__(self, config: GPTConfig, seed: int = 1337) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.padded_vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        self.use_memory(MEMORY_USES[1])  # training chooses another by the plan
        self._initialise(seed)

    def _initialise(self, seed: int) -> None:
        # Through Module.apply, the one path on which zero.Init gathers the weights, and in float32
        # from a generator of our own: the same values at every ZeRO stage and dtype. By
        # torch.normal, because under zero.Init torch.empty and the like make bf16 tensors.
        device = self.ln_f.weight.device
        if device.type == "meta":  # a shape without values
            return
        generator = torch.Generator(device).manual_seed(seed)
        residual_std = INIT_STD * (2 * self.config.n_layer) ** -0.5
        residual = {m for name, m in self.named_modules() if name.endswith(".c_proj")}

        def init(module: nn.Module) -> None:
            if isinstance(module, nn.Linear | nn.Embedding):
                std = residual_std if module in residual else INIT_STD
                shape = module.weight.shape
                values = torch.normal(
                    0.0, std, shape, generator=generator, device=device, dtype=torch.float32
                )
                with torch.no_grad():
                    module.weight.copy_(values)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

        self.apply(init)

    def use_memory(self, use: MemoryUse) -> None:
        """Set what a training pass keeps in a GPU's memory."""
        self.chunk_rows = use.chunk_rows
        for module in self.modules():
            if isinstance(module, MLP):
                module.keeps_gelu = use.keeps_gelu

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        *,
        predict_at: Tensor | None = None,
        position_ids: Tensor | None = None,
        attn_mask: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Compute the loss, or logits over the `vocab_size` real tokens.

        Args:
            tokens: (B, T) token ids.
            targets: (B, T) ids to predict; -100 is ignored. In training mode the softmax runs
                over all padded columns, otherwise over `vocab_size`. With predict_at: (N,).
            predict_at: (N,) indices into the flattened B·T positions to predict at; else all.
            position_ids: (B, T) positions, for sequences that share a prefix; else 0 to T - 1.
            attn_mask: (B, 1, T, T), True where a token (row) sees another; causal without.
            cache: Keys and values of the tokens before these; extended in place.

        Returns:
            The logits, (B, T, V), or (N, V) with predict_at. With targets: the mean cross-entropy
            in nats (scalar, fp32), or with predict_at too each one's (N,), without a gradient.

        Raises:
            ValueError: More tokens than `block_size`.
        """
        B, T = tokens.shape
        if position_ids is None:
            past = 0 if cache is None else cache.length
            limit = self.config.block_size
            if past + T > limit:
                raise ValueError(f"{past + T} tokens: the model's block_size is {limit}")
            position_ids = torch.arange(past, past + T, device=tokens.device)
        x = self.wte(tokens) + self.wpe(position_ids)  # (B, T, C)
        x = F.dropout(x, self.config.dropout, self.training)
        for i, block in enumerate(self.h):
            x = block(x, None if cache is None else cache.layers[i], attn_mask)
        x = self.ln_f(x).flatten(0, 1)  # (B·T, C)
        head = self.wte.weight
        V = self.config.vocab_size
        if targets is not None and self.training:
            return linear_cross_entropy(x, head, targets.flatten(), gpu_rows=self.chunk_rows)
        if predict_at is not None:
            x = x[predict_at]  # (N, C)
            return linear(x, head[:V]) if targets is None else token_losses(x, head, targets, V)
        if targets is not None:
            return linear_cross_entropy(x, head, targets.flatten(), V)
        return linear(x, head[:V]).view(B, T, -1)  # (B, T, V)
