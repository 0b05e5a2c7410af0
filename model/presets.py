"""The published GPT-2 and GPT-3 models by name, each with its published batch and learning rate.

GPT-3: Brown et al. 2020, Table 2.1 and App. B. Two rows of that table contradict themselves: 1.3B
lists 24 heads of 128 at width 2048 (16 heads fit, as Megatron-DeepSpeed, GPT-NeoX and llm.c have
it) and 13B lists width 5140 (40 heads of 128 are 5120). GPT-2's paper gives neither batch nor
learning rate: its sizes take the row of the GPT-3 model of the same size, as build-nanogpt does.
"""

from dataclasses import dataclass

from errors import BadInput
from model.config import GPTConfig

GPT2_TOKENS = 10_000_000_000  # FineWeb-Edu sample-10BT, one epoch: 19,073 steps of 2^19 tokens
GPT3_TOKENS = 300_000_000_000
GPT3_DECAY_TOKENS = 260_000_000_000
EVAL_TOKENS = 10_485_760  # build-nanogpt: 20 batches of 64 x 1,024 tokens on 8 GPUs
PROMPT = "Hello, I'm a language model,"  # build-nanogpt's
WARMUP_TOKENS = 375_000_000  # 715 steps of 2^19 tokens
HALF_M, ONE_M, TWO_M = 2**19, 2**20, 2**21
GPT3_175B_BATCH = 1536 * 2048  # "3.2M" of the table, in whole sequences


@dataclass(frozen=True)
class Preset:
    """One model with the recipe that it is trained with; counts are tokens, intervals steps."""

    config: GPTConfig
    batch_tokens: int
    lr: float
    max_tokens: int
    decay_tokens: int
    warmup_tokens: int = WARMUP_TOKENS
    hellaswag_every: int = 250


def _gpt2(n_layer: int, n_head: int, n_embd: int, batch_tokens: int, lr: float) -> Preset:
    config = GPTConfig(n_layer, n_head, n_embd)
    return Preset(config, batch_tokens, lr, GPT2_TOKENS, GPT2_TOKENS)


def _gpt3(n_layer: int, n_head: int, n_embd: int, batch_tokens: int, lr: float) -> Preset:
    config = GPTConfig(n_layer, n_head, n_embd, block_size=2048)
    return Preset(config, batch_tokens, lr, GPT3_TOKENS, GPT3_DECAY_TOKENS)


def _small(config: GPTConfig, batch_tokens: int, lr: float, steps: int, warmup: int) -> Preset:
    tokens = steps * batch_tokens
    return Preset(
        config, batch_tokens, lr, tokens, tokens, warmup * batch_tokens, hellaswag_every=0
    )


PRESETS: dict[str, Preset] = {
    "debug": _small(GPTConfig(2, 2, 64, 64), 512, 1e-3, steps=20, warmup=5),
    "quickstart": _small(GPTConfig(4, 4, 256, 256), 2048, 2e-3, steps=150, warmup=20),
    "gpt2": _gpt2(12, 12, 768, HALF_M, 6.0e-4),
    "gpt2-medium": _gpt2(24, 16, 1024, HALF_M, 3.0e-4),
    "gpt2-large": _gpt2(36, 20, 1280, HALF_M, 2.5e-4),
    "gpt2-xl": _gpt2(48, 25, 1600, ONE_M, 2.0e-4),
    "gpt3-125m": _gpt3(12, 12, 768, HALF_M, 6.0e-4),
    "gpt3-350m": _gpt3(24, 16, 1024, HALF_M, 3.0e-4),
    "gpt3-760m": _gpt3(24, 16, 1536, HALF_M, 2.5e-4),
    "gpt3-1.3b": _gpt3(24, 16, 2048, ONE_M, 2.0e-4),
    "gpt3-2.7b": _gpt3(32, 32, 2560, ONE_M, 1.6e-4),
    "gpt3-6.7b": _gpt3(32, 32, 4096, TWO_M, 1.2e-4),
    "gpt3-13b": _gpt3(40, 40, 5120, TWO_M, 1.0e-4),
    "gpt3-175b": _gpt3(96, 96, 12288, GPT3_175B_BATCH, 0.6e-4),
}


def get_preset(name: str) -> Preset:
    """Return the preset called `name`.

    Raises:
        BadInput: There is no such preset; the message lists all.
    """
    if name not in PRESETS:
        raise BadInput(f"--model {name}", "unknown", f"choose from {', '.join(PRESETS)}")
    return PRESETS[name]
