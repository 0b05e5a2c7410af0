import pytest

from model import GPT, PRESETS, GPTConfig
from model.presets import get_preset

# GPT-2: Radford et al. 2019 as counted by Hugging Face; GPT-3: Brown et al. 2020, Table 2.1, dense
# attention, learned positions, vocabulary 50,257.
PUBLISHED = {
    "gpt2": (124_439_808, 12, 12, 768, 1024, 2**19, 6.0e-4),
    "gpt2-medium": (354_823_168, 24, 16, 1024, 1024, 2**19, 3.0e-4),
    "gpt2-large": (774_030_080, 36, 20, 1280, 1024, 2**19, 2.5e-4),
    "gpt2-xl": (1_557_611_200, 48, 25, 1600, 1024, 2**20, 2.0e-4),
    "gpt3-125m": (125_226_240, 12, 12, 768, 2048, 2**19, 6.0e-4),
    "gpt3-350m": (355_871_744, 24, 16, 1024, 2048, 2**19, 3.0e-4),
    "gpt3-760m": (760_300_032, 24, 16, 1536, 2048, 2**19, 2.5e-4),
    "gpt3-1.3b": (1_315_723_264, 24, 16, 2048, 2048, 2**20, 2.0e-4),
    "gpt3-2.7b": (2_651_553_280, 32, 32, 2560, 2048, 2**20, 1.6e-4),
    "gpt3-6.7b": (6_658_404_352, 32, 32, 4096, 2048, 2**21, 1.2e-4),
    "gpt3-13b": (12_853_386_240, 40, 40, 5120, 2048, 2**21, 1.0e-4),
    "gpt3-175b": (174_604_259_328, 96, 96, 12288, 2048, 3_145_728, 0.6e-4),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_are_the_published_models(name: str) -> None:
    preset = PRESETS[name]
    c = preset.config
    shape = (c.n_params(), c.n_layer, c.n_head, c.n_embd, c.block_size)
    assert (*shape, preset.batch_tokens, preset.lr) == PUBLISHED[name]


def test_n_params_counts_the_module() -> None:
    config = GPTConfig(3, 2, 32, 16, vocab_size=130)
    model = GPT(config)
    padding = (config.padded_vocab_size - 130) * 32
    assert config.padded_vocab_size == 256
    assert sum(p.numel() for p in model.parameters()) - padding == config.n_params()


def test_flops_follow_the_palm_count() -> None:
    config = PRESETS["gpt2"].config
    expected = 6 * 124_439_808 + 12 * 12 * 768 * 1024  # PaLM, App. B
    assert config.flops_per_token(1024) == expected


def test_unknown_preset_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"--model gpt5: .*gpt2-xl.*gpt3-175b"):
        get_preset("gpt5")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_layer": 0}, "n_layer = 0"),
        ({"n_head": 3}, "not a multiple of n_head = 3"),
        ({"dropout": 1.0}, "dropout = 1.0"),
    ],
)
def test_impossible_shapes_are_refused(change: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GPTConfig(**({"n_layer": 2, "n_head": 2, "n_embd": 64} | change))  # pyright: ignore[reportArgumentType]  # values are mixed on purpose
