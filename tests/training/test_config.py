import dataclasses
from pathlib import Path

import pytest

from model import PRESETS
from training.config import (
    TrainConfig,
    build_parser,
    parse_flags,
    resolve_batch,
    resolve_train_config,
)


def resolve(*argv: str) -> TrainConfig:
    return resolve_train_config(**parse_flags(list(argv), ""))


def test_short_command_is_the_published_recipe() -> None:
    config = resolve()
    assert (config.model, config.run_dir) == ("gpt2", Path("runs/gpt2"))
    assert (config.batch_tokens, config.lr, config.seq_len) == (524_288, 6e-4, 1024)
    # build-nanogpt: 19,073 steps, warm-up 715
    assert (config.max_steps, config.warmup_steps, config.decay_steps) == (19_073, 715, 19_073)


def test_gpt3_presets_bring_their_own_schedule() -> None:
    config = resolve("--model", "gpt3-1.3b")
    assert (config.batch_tokens, config.lr, config.seq_len) == (2**20, 2e-4, 2048)
    # Brown et al. 2020, App. B: 300B tokens, cosine over 260B, warm-up over 375M
    assert config.max_steps == 300_000_000_000 // 2**20
    assert config.decay_steps == 260_000_000_000 // 2**20
    assert config.warmup_steps == 375_000_000 // 2**20


def test_a_flag_beats_the_preset() -> None:
    config = resolve("--model", "gpt3-1.3b", "--lr", "1e-3", "--warmup_steps", "0")
    assert (config.lr, config.warmup_steps) == (1e-3, 0)


@pytest.mark.parametrize(
    ("argv", "schedule"),
    [
        (["--max_steps", "19073"], (19_073, 715, 19_073)),
        (["--max_steps", "76294"], (76_294, 715, 76_294)),
        (["--max_steps", "100"], (100, 100, 100)),
        (["--max_steps", "100", "--decay_steps", "2000"], (100, 715, 2000)),
        (["--max_steps", "100", "--warmup_steps", "7"], (100, 7, 100)),
        (["--model", "gpt3-1.3b", "--max_steps", "24800"], (24_800, 357, 24_800)),
        (["--batch_tokens", "1048576"], (9536, 357, 9536)),
    ],
)
def test_the_rate_decays_until_the_last_step_unless_told_otherwise(
    argv: list[str], schedule: tuple[int, int, int]
) -> None:
    config = resolve(*argv)
    assert (config.max_steps, config.warmup_steps, config.decay_steps) == schedule


def test_there_is_one_flag_per_field_and_at_most_55() -> None:
    fields = [f.name for f in dataclasses.fields(TrainConfig)]
    flags = {a.dest for a in build_parser("")._actions} - {"help", "local_rank"}
    assert set(fields) == flags | {"preset"}
    assert len(fields) <= 55


def test_the_launchers_local_rank_is_accepted_and_ignored() -> None:
    assert parse_flags(["--local_rank", "3"], "") == {}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model", "gpt9"], "--model gpt9"),
        (["--lr", "-1"], r"--lr -1\.0: out of range"),
        (["--lr", "nan"], "--lr nan: out of range"),
        (["--checkpoint_minutes", "-1"], r"--checkpoint_minutes -1\.0: out of range"),
        (["--checkpoint_minutes", "nan"], "--checkpoint_minutes nan: out of range"),
        (["--checkpoint_minutes", "inf"], "--checkpoint_minutes inf: out of range"),
        (["--decay_steps", "-5"], "--decay_steps -5"),
        (["--seed", str(2**32)], "--seed 4294967296: out of range. Fix: give one below"),
        (["--run_dir", ""], r"--run_dir '\.': not a usable path: .*\. Fix: "),
        (["--run_dir", "a\nb"], r"--run_dir 'a\\nb': not a usable path"),
        (
            ["--run_dir", "runs/x[1]"],
            r"--run_dir 'runs/x\[1\]': not a usable path: it must be printable, without \*",
        ),
        (["--sample_prompt", "\udcc3\udc9cber"], r"--sample_prompt .* Fix: give one of UTF-8"),
        (["--batch_tokens", "0"], "--batch_tokens 0: out of range"),
        (["--max_steps", "0"], "--max_steps 0: out of range"),
        (["--beta2", "1"], r"--beta2 1\.0"),
        (["--resume", "maybe"], "--resume maybe"),
        (["--seq_len", "2048"], "--seq_len 2048: gpt2 has a block_size of 1024"),
        (["--micro_batch_size", "-1"], "--micro_batch_size -1"),
        (["--warmup_steps", "-1"], "--warmup_steps -1"),
    ],
)
def test_bad_values_name_their_flag(argv: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve(*argv)


@pytest.mark.parametrize("world_size", [1, 2, 4, 8, 64])
def test_the_batch_does_not_depend_on_the_ranks(world_size: int) -> None:
    batch = resolve_batch(resolve(), world_size)
    per_rank = batch.micro_batch_size * batch.grad_accum_steps
    assert per_rank * world_size == batch.batch_sequences == 512
    assert batch.micro_batch_size <= 16


@pytest.mark.parametrize("model", PRESETS)
def test_every_preset_divides_among_one_rank(model: str) -> None:
    resolve_batch(resolve("--model", model), 1)


@pytest.mark.parametrize(
    ("argv", "world_size", "message"),
    [
        (["--batch_tokens", "500000"], 1, "Fix: --batch_tokens 499712"),
        (
            [],
            3,
            r"512 sequences do not divide among 3 ranks\. Fix: .* 522240 or 525312",
        ),
        (["--micro_batch_size", "48"], 8, "Fix: --micro_batch_size 32"),
        (["--batch_tokens", "1024"], 2, "Fix: --batch_tokens 2048"),
    ],
)
def test_impossible_batches_suggest_one_that_works(
    argv: list[str], world_size: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        resolve_batch(resolve(*argv), world_size)


@pytest.mark.parametrize(
    ("argv", "world_size", "remedy"),
    [
        ([], 3, "start 2 or 4 ranks: "),
        ([], 1024, "start 512 or 256 ranks: "),
        (["--batch_tokens", "1024"], 3, "start 1 ranks: "),
        (["--batch_tokens", "500000"], 1, "give both as runs/gpt2/config.json has them"),
    ],
)
def test_a_resumed_run_is_told_what_does_not_change_its_batch(
    argv: list[str], world_size: int, remedy: str
) -> None:
    with pytest.raises(ValueError, match=f"Fix: {remedy}"):
        resolve_batch(resolve(*argv), world_size, resumes=True)


def test_a_batch_beyond_the_presets_tokens_is_one_step() -> None:
    assert resolve("--model", "debug", "--batch_tokens", "16384").max_steps == 1


def test_the_suggested_batch_works() -> None:
    config = resolve("--batch_tokens", "525312")
    assert resolve_batch(config, 3).batch_sequences == 513


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--bogus", "1"], "error: unrecognized arguments: --bogus 1. Fix: "),
        (["--seed", "x"], "error: argument --seed: invalid int value: 'x'. Fix: "),
    ],
)
def test_what_is_no_flag_is_one_line(
    argv: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_flags(argv, "")
    assert ended.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith(said)
    assert err.count("\n") == 1
