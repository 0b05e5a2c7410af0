import json
import lzma
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import GPT2LMHeadModel

import eval.hellaswag as hellaswag
from bench.fidelity.reference_hellaswag import reference_losses
from checkpoint.hf_folder import save_hf_folder
from eval.hellaswag import VALIDATION, load_examples, score
from eval.packing import Example, crop_contexts, group_by_length, sum_ending_losses
from eval.session import Session, check_gpt2_tokens
from model import GPT, GPTConfig
from training.ranks import Ranks

ROOT = Path(__file__).resolve().parents[2]
CONFIG = GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=256)
CPU = torch.device("cpu")
ROW = {"ctx": "A man sits. He", "endings": ["runs.", "eats it.", "is a cat.", "x"], "label": 2}


@pytest.fixture(scope="module")
def lines() -> list[bytes]:
    """Every 50th row of the validation set: 201."""
    return lzma.decompress(VALIDATION.read_bytes()).splitlines()[::50]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder of a small model whose predictions are far from even."""
    model = GPT(CONFIG)
    with torch.no_grad():
        for param in model.parameters():
            param.mul_(3)
    path = tmp_path_factory.mktemp("model") / "hf"
    save_hf_folder(path, CONFIG, model.named_parameters())
    return path


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_losses_are_those_of_one_ending_at_a_time(
    folder: Path, lines: list[bytes], tmp_path: Path
) -> None:
    from checkpoint.reader import load_model

    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(lines[:60]))
    hf = GPT2LMHeadModel.from_pretrained(folder).eval()  # pyright: ignore[reportArgumentType]  # takes paths too
    expected = reference_losses(lambda tokens: hf(tokens).logits, lines[:60])
    model, _ = load_model(str(folder))
    session = Session(model, model.config, CPU, Ranks())
    losses = sum_ending_losses(session, load_examples(tmp_path / "rows.jsonl"))
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-4)
    assert torch.equal(losses.argmin(1), expected.argmin(1))


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_stay_in_step_and_change_no_bit(world_size: int) -> None:
    model, examples = GPT(CONFIG).eval(), load_examples(limit=40)
    session = Session(model, CONFIG, CPU, Ranks())
    alone = sum_ending_losses(session, examples, forward_tokens=800)
    forwards = [0] * world_size
    parts = []
    for rank in range(world_size):

        def counting(*args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
            forwards[rank] += 1  # noqa: B023  # called within this round
            return model(*args, **kwargs)

        session = Session(counting, CONFIG, CPU, Ranks(rank=rank, world_size=world_size))
        parts.append(sum_ending_losses(session, examples, forward_tokens=800))
    assert len(set(forwards)) == 1
    assert len(group_by_length(examples, 800)) % world_size  # so that some rank had to wait
    assert torch.equal(sum(parts, torch.zeros_like(alone)), alone)


def test_batches_hold_every_row_once_in_few_lengths() -> None:
    examples = load_examples()
    batches = group_by_length(examples, 8192)
    assert sorted(row for _, rows in batches for row in rows) == list(range(10_042))
    assert len({T for T, _ in batches}) <= 20
    padded = sum(T * len(rows) for T, rows in batches)
    assert padded < 1.06 * sum(e.packed_tokens for e in examples)
    assert all(examples[row].packed_tokens <= T for T, rows in batches for row in rows)


def test_the_validation_set_is_the_published_one() -> None:
    examples = load_examples()
    labels = [e.label for e in examples]
    assert [labels.count(i) for i in range(4)] == [2515, 2485, 2584, 2458]
    always_2 = torch.tensor([[1.0, 1.0, 0.0, 1.0]], dtype=torch.float64).expand(10_042, 4)
    result = score(always_2, examples)
    assert result["n"] == 10_042
    assert result["acc"] == result["acc_norm"] == pytest.approx(0.2573, abs=5e-5)
    assert result["acc_stderr"] == pytest.approx(math.sqrt(0.2573 * 0.7427 / 10_042), abs=1e-6)


def test_an_altered_validation_set_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: list[bytes]
) -> None:
    path = tmp_path / "hellaswag_val.jsonl.xz"
    path.write_bytes(lzma.compress(b"\n".join(lines)))
    monkeypatch.setattr(hellaswag, "VALIDATION", path)
    with pytest.raises(ValueError, match="is not the published validation set"):
        load_examples(path)


def test_acc_takes_the_sum_and_acc_norm_the_mean() -> None:
    example = Example([1], [[5] * 2, [5] * 10, [5] * 4, [5] * 4], label=1)
    losses = torch.tensor([[3.0, 9.0, 7.0, 8.0]], dtype=torch.float64)  # means 1.5, 0.9, 1.75, 2
    result = score(losses, [example])
    assert (result["acc"], result["acc_norm"]) == (0.0, 1.0)


def test_endings_are_tokenised_apart_with_a_space(tmp_path: Path) -> None:
    from data.tokenizer import load_tokenizer

    (example,) = load_examples(write(tmp_path / "a.jsonl", ROW))
    tokenizer = load_tokenizer()
    assert tokenizer.decode(example.context) == "A man sits. He"
    assert [tokenizer.decode(e) for e in example.endings] == [
        " runs.",
        " eats it.",
        " is a cat.",
        " x",
    ]


def test_long_contexts_lose_their_beginning(tmp_path: Path) -> None:
    (example,) = load_examples(write(tmp_path / "a.jsonl", ROW | {"ctx": "word " * 40}))
    longest = max(map(len, example.endings))
    (cropped,) = crop_contexts([example], 16)
    assert cropped.context == example.context[-(17 - longest) :]
    assert len(cropped.context) + longest - 1 == 16
    with pytest.raises(ValueError, match=r"row 1 has an ending of 4 tokens.*block size is 3"):
        crop_contexts([example], 3)
    with pytest.raises(ValueError, match="the model has 65 tokens"):
        check_gpt2_tokens(GPTConfig(1, 1, 8, vocab_size=65))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"ctx": "a", "endings": ["b"] * 3, "label": 0}, r"a\.jsonl:2: is not a HellaSwag row"),
        ({"ctx": "a", "endings": ["b"] * 4, "label": 4}, r"a\.jsonl:2: is not a HellaSwag row"),
        ({"ctx": "a", "endings": "bcde", "label": 0}, r"a\.jsonl:2: is not a HellaSwag row"),
        ({"ctx": "a", "endings": ["b"] * 4, "label": 2.7}, r"a\.jsonl:2: .*label 2\.7"),
        ({"ctx": "a", "endings": ["b"] * 4, "label": True}, r"a\.jsonl:2: .*label True"),
        ({"ctx": "", "endings": ["b"] * 4, "label": 0}, r"a\.jsonl:2: is not a HellaSwag row"),
        ({"text": "a"}, r"a\.jsonl:2: is not a HellaSwag row"),
        ([], r"a\.jsonl:2: is not a HellaSwag row"),
        ({"ctx": "a", "endings": ["b"] * 4}, "some rows have a label, some have none"),
    ],
)
def test_rows_that_are_none_are_named(tmp_path: Path, row: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_examples(write(tmp_path / "a.jsonl", ROW, row))


def test_files_that_are_none_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "damaged.jsonl.xz").write_bytes(VALIDATION.read_bytes()[:5000])
    (tmp_path / "text.jsonl.gz").write_bytes(b"\x1f\x8b\x08" + b"\xff" * 40)
    for name, message in (
        ("empty.jsonl", "no rows"),
        ("text.jsonl.gz", "cannot be read"),
        ("damaged.jsonl.xz", "cannot be read"),
        ("none.jsonl", "cannot be read"),
    ):
        with pytest.raises(ValueError, match=f"{name}.*{message}"):
            load_examples(tmp_path / name)


def test_the_command_prints_one_json_line_and_the_details(folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "eval/hellaswag.py", "--ckpt", folder, "--limit", "9"]
    command += ["--details", tmp_path / "details.jsonl"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    result = json.loads(done.stdout)
    details = list(map(json.loads, (tmp_path / "details.jsonl").read_text().splitlines()))
    assert result["n"] == len(details) == 9
    assert result["dtype"] == "fp32"
    assert result["acc"] == sum(d["pred"] == d["label"] for d in details) / 9
    for d in details:
        means = [a / n for a, n in zip(d["loss_sums"], d["ending_tokens"], strict=True)]
        assert d["pred"] == d["loss_sums"].index(min(d["loss_sums"]))
        assert d["pred_norm"] == means.index(min(means))


def test_a_split_without_labels_gives_predictions_only(folder: Path, tmp_path: Path) -> None:
    hidden = {k: v for k, v in ROW.items() if k != "label"}
    data, details = write(tmp_path / "test.jsonl", hidden, hidden), tmp_path / "details.jsonl"
    command = [sys.executable, "eval/hellaswag.py", "--ckpt", folder, "--data", data]
    command += ["--details", details]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    assert json.loads(done.stdout)["acc"] is None
    assert len(details.read_text().splitlines()) == 2
