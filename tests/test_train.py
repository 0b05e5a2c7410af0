"""`train.py` as people run it; one rank in this process, several through the launchers."""

import gzip
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2LMHeadModel

import eval.hellaswag as hellaswag
import eval.val_loss
import training.step
from bench.fidelity import parity, reference
from bench.fidelity.reference_hellaswag import reference_row
from checkpoint.hf_folder import load_hf_folder, save_hf_folder
from checkpoint.manifest import complete_steps
from checkpoint.reader import load_model
from checkpoint.run_folder import check_empty
from data.shards import TokenStream
from data.tokenizer import VOCAB_SIZE
from eval.packing import sum_ending_losses
from eval.session import Session
from eval.val_loss import build_parser, run
from model import GPT, PRESETS
from tests import forked
from train import main
from training.ranks import Ranks, read_ranks
from training.rendezvous import free_port

ROOT = Path(__file__).resolve().parents[1]
NEEDS_COMPILER = pytest.mark.skipif(
    shutil.which("g++") is None, reason="DeepSpeedCPUAdam and --compile need it: install g++"
)
SMALL = [
    "--model",
    "debug",
    "--micro_batch_size",
    "4",
    "--sample_tokens",
    "2",
    "--eval_tokens",
    "2944",
]


def arguments(data_dir: Path, run_dir: Path, stage: int | str, *more: object) -> list[str]:
    paths = ["--data_dir", data_dir, "--run_dir", run_dir]
    ds_config = ROOT / "ds_configs" / f"zero{stage}.json"
    return [*SMALL, *map(str, [*paths, "--ds_config", ds_config, *more])]


def rows(run_dir: Path, key: str) -> dict[int, float]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    found = [(r["step"], r[key]) for r in map(json.loads, lines) if key in r]
    assert len(found) == len(dict(found)), "a step stands twice"
    return dict(found)


def assert_step_is_consolidated(run_dir: Path) -> None:
    """The weights that the live engine gave are those in the files of its ranks."""
    (live,) = (run_dir / "consolidated").iterdir()
    a, b = load_hf_folder(live).state_dict(), load_model(str(run_dir))[0].state_dict()
    assert all(torch.equal(a[name][:VOCAB_SIZE], b[name][:VOCAB_SIZE]) for name in a)


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_resumed_run_has_the_same_bits(data_dir: Path, tmp_path: Path, stage: int) -> None:
    options = [
        "--max_steps",
        8,
        "--decay_steps",
        20,
        "--eval_every",
        4,
        "--checkpoint_every",
        4,
        "--dropout",
        0.1,
        "--batch_tokens",
        256,
        "--micro_batch_size",
        2,
        "--eval_tokens",
        256,
    ]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(arguments(data_dir, whole, stage, *options)) == 0
    first = [*options, "--max_steps", 4]
    assert main(arguments(data_dir, parts, stage, *first)) == 0
    torch.manual_seed(12345)  # what was saved counts, not what is left from before
    assert main(arguments(data_dir, parts, stage, *options, "--resume", "must")) == 0
    for key in ("train/loss", "train/grad_norm", "train/lr", "val/loss"):
        assert rows(parts, key) == rows(whole, key), key
    assert (parts / "log.txt").read_text() == (whole / "log.txt").read_text()
    a, b = (load_model(str(r))[0].state_dict() for r in (whole, parts))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert [p.name for p in complete_steps(parts / "checkpoints")] == ["step_000004", "step_000008"]


def same_predictions_as_hugging_face(folder: Path) -> None:
    """On every 50th row of HellaSwag's validation set, 201, cut to 32 tokens each."""
    hf, model = AutoModelForCausalLM.from_pretrained(folder).eval(), load_hf_folder(folder)
    examples = [
        replace(e, context=e.context[-14:], endings=[ending[:18] for ending in e.endings])
        for e in hellaswag.load_examples()[::50]
    ]
    expected = torch.stack(
        [reference_row(lambda t: hf(t).logits, e.context, e.endings) for e in examples]
    )
    session = Session(model, model.config, torch.device("cpu"), Ranks())
    losses = sum_ending_losses(session, examples)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-4)
    for a, b in zip(
        hellaswag.predict(expected, examples), hellaswag.predict(losses, examples), strict=True
    ):
        assert len(a) == 201
        assert torch.equal(a, b)


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("stage", [0, 1, 2, 3, pytest.param("3_offload", marks=NEEDS_COMPILER)])
def test_consolidated_folder_is_the_model_that_was_trained(
    data_dir: Path, tmp_path: Path, stage: int | str
) -> None:
    run_dir = tmp_path / "run"
    assert main(arguments(data_dir, run_dir, stage, "--max_steps", 3)) == 0
    live = run_dir / "consolidated" / "step_000003"
    hf = AutoModelForCausalLM.from_pretrained(live)
    assert isinstance(hf, GPT2LMHeadModel)
    from_step, _ = load_model(str(run_dir))
    from_live = load_hf_folder(live)
    tokens = torch.randint(50257, (2, 64))
    torch.testing.assert_close(from_live(tokens), hf.eval()(tokens).logits, rtol=1e-5, atol=1e-5)
    assert torch.equal(from_live(tokens), from_step(tokens))


@pytest.mark.usefixtures("one_rank")
def test_a_consolidated_folder_scores_as_the_run_and_as_hugging_face(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    assert main(arguments(data_dir, run_dir, 3, "--max_steps", 3)) == 0
    live = run_dir / "consolidated" / "step_000003"
    args = build_parser().parse_args(
        ["--ckpt", str(live), "--data_dir", str(data_dir), "--eval_tokens", "2944"]
    )
    assert run(args, read_ranks())["val_loss"] == pytest.approx(
        rows(run_dir, "val/loss")[3], abs=1e-3
    )
    out = subprocess.run(
        [
            sys.executable,
            "checkpoint/consolidate.py",
            "--ckpt",
            run_dir,
            "--out_dir",
            tmp_path / "x",
        ],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert out.stdout.strip() == str(tmp_path / "x")
    with pytest.raises(ValueError, match="is not an empty folder"):
        check_empty(tmp_path / "x", "--out_dir")
    files = ("model.safetensors", "config.json", "vocab.json")
    same_predictions_as_hugging_face(live)
    monkeypatch.chdir(tmp_path)
    exported, kept = load_model("x")[0].state_dict(), load_hf_folder(live).state_dict()
    assert all(torch.equal(exported[name], kept[name]) for name in kept)
    assert all((tmp_path / "x" / f).read_bytes() == (live / f).read_bytes() for f in files)


def write_foreign(tokens: np.ndarray, split: str, folder: Path, kind: str) -> None:
    """Write one split as build-nanogpt, llm.c or nanoGPT do."""
    folder.mkdir(exist_ok=True)
    if kind == "build-nanogpt":
        for i, part in enumerate(np.array_split(tokens, 3)):
            np.save(folder / f"edufineweb_{split}_{i:06d}.npy", part)
    elif kind == "llm.c":
        for i, part in enumerate(np.array_split(tokens, 2)):
            header = np.zeros(256, np.int32)
            header[:3] = 20240520, 1, len(part)
            path = folder / f"fineweb_{split}_{i:06d}.bin"
            path.write_bytes(header.tobytes() + part.tobytes())
    else:
        tokens.tofile(folder / f"{split}.bin")


@pytest.mark.usefixtures("one_rank")
def test_other_peoples_shards_train_to_the_same_losses(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "Some words, again and again. Or not."}\n' * 3000)
    command = [
        sys.executable,
        "data/prepare.py",
        path,
        "--out_dir",
        tmp_path / "ours",
        "--quiet",
        "--val_tokens",
        "4000",
        "--shard_tokens",
        "9000",
    ]
    subprocess.run(command, cwd=ROOT, check=True, timeout=60)
    kinds = ("build-nanogpt", "llm.c", "nanoGPT")
    for split in ("train", "val"):
        stream = TokenStream(tmp_path / "ours", split, VOCAB_SIZE)
        for kind in kinds:
            write_foreign(stream.read(0, len(stream)), split, tmp_path / kind, kind)
    losses = {}
    for kind in ("ours", *kinds):
        run_dir = tmp_path / "runs" / kind
        options = ["--max_steps", 5, "--eval_every", 5, "--verify"]
        assert main(arguments(tmp_path / kind, run_dir, 0, *options)) == 0
        losses[kind] = rows(run_dir, "train/loss"), rows(run_dir, "val/loss")
        assert len(losses[kind][0]) == 5
    assert all(losses[kind] == losses["ours"] for kind in kinds)


@pytest.mark.parametrize(
    ("precision", "stage", "n_ranks"),
    [("fp32", 3, 2), ("bf16", 1, 2)],  # the rest of the matrix: make parity
)
def test_parity_with_plain_pytorch(
    tmp_path: Path, precision: str, stage: int, n_ranks: int
) -> None:
    reference.write_inputs(tmp_path, n_tokens=20 * 8 * 64 + 1)
    kind = parity.reference_precision(stage, precision)
    expected = reference.reference_losses(tmp_path, kind, 20)
    start = partial(forked.launch, folder=tmp_path)
    got = parity.engine_losses(tmp_path, stage, n_ranks, precision, 20, start=start)
    assert expected[0] - expected[-1] > 1  # it learns
    assert parity.largest_difference(got, expected) < parity.TOLERANCE[precision]
    assert_step_is_consolidated(tmp_path / f"zero{stage}_{n_ranks}_{precision}")


@pytest.mark.usefixtures("one_rank")
def test_zero0_is_the_seeds_own_arithmetic(tmp_path: Path) -> None:
    reference.write_inputs(tmp_path, n_tokens=30 * 8 * 64 + 1)
    expected = reference.reference_losses(tmp_path, "autocast", 30)
    options = [
        "--init_from",
        tmp_path / "init",
        "--shuffle",
        "false",
        "--max_steps",
        30,
        "--warmup_steps",
        5,
        "--decay_steps",
        30,
        "--eval_tokens",
        64,
    ]
    assert main(arguments(tmp_path / "data", tmp_path / "run", 0, *options)) == 0
    got = list(rows(tmp_path / "run", "train/loss").values())
    assert parity.largest_difference(got, expected) < 2e-3


@pytest.mark.usefixtures("one_rank")
def test_a_run_starts_from_all_that_can_be_evaluated(data_dir: Path, tmp_path: Path) -> None:
    first = tmp_path / "first"
    options = ["--batch_tokens", 256, "--eval_tokens", 256, "--lr", 0.01, "--warmup_steps", 0]
    assert main(arguments(data_dir, first, 1, *options, "--max_steps", 2)) == 0
    model, _ = load_model(str(first))
    fields = {"n_head": model.config.n_head, "bias": True}
    torch.save({"model": model.state_dict(), "config": fields}, tmp_path / "seed.pt")
    losses = rows(first, "val/loss")
    assert losses[2] < losses[0] - 0.01
    for stage, given in ((1, first), (3, first / "checkpoints/step_000002"), (1, "seed.pt")):
        run = tmp_path / f"from_{Path(given).name}"
        more = [*options, "--max_steps", 1, "--init_from", tmp_path / given]
        assert main(arguments(data_dir, run, stage, *more)) == 0
        assert rows(run, "val/loss")[0] == pytest.approx(losses[2], abs=1e-3), given


@pytest.mark.usefixtures("one_rank")
def test_three_ranks_evaluate_in_step(data_dir: Path, tmp_path: Path) -> None:
    options = [
        "--max_steps",
        2,
        "--batch_tokens",
        6 * 64,
        "--micro_batch_size",
        2,
        "--hellaswag_every",
        2,
        "--hellaswag_limit",
        51,
    ]
    three, one = tmp_path / "three", tmp_path / "one"
    done = forked.launch(3, arguments(data_dir, three, 3, *options), tmp_path)
    assert done.returncode == 0, done.stderr
    assert "is deprecated" not in done.stderr
    assert main(arguments(data_dir, one, 3, *options)) == 0
    # 46 windows of 64 tokens over 3 ranks of 2: the last round is two thirds empty
    losses = [rows(run_dir, "val/loss") for run_dir in (three, one)]
    assert losses[0][0] == pytest.approx(losses[1][0], abs=1e-5)
    assert losses[0][2] == pytest.approx(losses[1][2], abs=2e-3)
    for key in ("eval/hellaswag_acc", "eval/hellaswag_acc_norm"):
        scores = [rows(run_dir, key) for run_dir in (three, one)]
        assert list(scores[0]) == [0, 2]
        assert scores[0][0] == scores[1][0]  # the weights differ after the first step only
        assert scores[0][2] == pytest.approx(scores[1][2], abs=2.5 / 51)
    assert (three / "log.txt").read_text().count(" hella ") == 2
    assert_step_is_consolidated(three)
    in_loop = rows(three, "eval/hellaswag_acc_norm")[2]
    for ckpt in (three, three / "consolidated" / "step_000002"):
        args = hellaswag.build_parser().parse_args(["--ckpt", str(ckpt), "--limit", "51"])
        assert hellaswag.run(args, read_ranks())["acc_norm"] == in_loop


def test_evaluation_on_several_ranks_gives_the_numbers_of_one(
    data_dir: Path, tmp_path: Path
) -> None:
    config = PRESETS["debug"].config
    save_hf_folder(tmp_path / "hf", config, GPT(config).named_parameters())
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    on_rows = ["--ckpt", str(tmp_path / "hf"), "--limit", "51", "--details"]
    on_tokens = ["--ckpt", str(tmp_path / "hf"), "--data_dir", str(data_dir)]
    on_tokens += ["--eval_tokens", "2999"]
    port = str(free_port())
    deepspeed = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2"]
    deepspeed += ["--master_port", port]
    commands = (
        parity.run_with_children([*deepspeed, "eval/hellaswag.py", *on_rows, str(two)], 100),
        forked.launch(3, on_tokens, tmp_path, "eval/val_loss.py"),
    )
    results = []
    for done in commands:
        assert done.returncode == 0, done.stderr
        (line,) = [line for line in done.stdout.splitlines() if line.startswith("{")]
        results.append(json.loads(line))
    args = hellaswag.build_parser().parse_args([*on_rows, str(one)])
    assert hellaswag.run(args, read_ranks()) == results[0]
    assert one.read_text() == two.read_text()
    alone = run(build_parser().parse_args(on_tokens), read_ranks())
    assert alone["tokens"] == results[1]["tokens"] == 2999
    assert alone["val_loss"] == pytest.approx(results[1]["val_loss"], abs=1e-5)


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_trace_names_the_phases_of_the_chosen_steps(
    data_dir: Path, tmp_path: Path, stage: int
) -> None:
    options = ["--max_steps", 4, "--profile", "1:3", "--eval_every", 2]
    assert main(arguments(data_dir, tmp_path / "run", stage, *options)) == 0
    (file,) = (tmp_path / "run" / "profile").iterdir()
    assert file.name.startswith("rank0.")
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    names = [event.get("name") for event in events if event.get("cat") == "user_annotation"]
    phases = ("data", "forward", "backward", "reduce", "optimizer", "log")
    micro_steps = 2 * 2  # of two steps
    expected = {"optimizer": 2, "log": 2} | dict.fromkeys(phases[:4], micro_steps)
    assert {name: names.count(name) for name in phases} == expected


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("steps", ["1:3", "0:1"])
def test_trace_of_a_resumed_run_begins_where_it_does(
    data_dir: Path, tmp_path: Path, steps: str
) -> None:
    run_dir = tmp_path / "run"
    assert main(arguments(data_dir, run_dir, 1, "--max_steps", 2)) == 0
    assert main(arguments(data_dir, run_dir, 1, "--max_steps", 4, "--profile", steps)) == 0
    assert (run_dir / "profile").exists() == (steps == "1:3")


@pytest.mark.usefixtures("one_rank")
@NEEDS_COMPILER  # other stages: bench/fidelity/parity.py --compile
def test_compiled_run_is_the_eager_one(data_dir: Path, tmp_path: Path) -> None:
    options = ["--max_steps", 4, "--eval_every", 2, "--hellaswag_every", 2]
    options += ["--hellaswag_limit", 8, "--checkpoint_every", 2]
    eager, compiled = tmp_path / "eager", tmp_path / "compiled"
    assert main(arguments(data_dir, eager, 1, *options)) == 0
    command = [sys.executable, "train.py", *arguments(data_dir, compiled, 1, *options)]
    done = parity.run_with_children([*command, "--compile"], timeout_s=120)
    assert done.returncode == 0, done.stderr
    for key in ("train/loss", "val/loss"):
        assert rows(compiled, key) == pytest.approx(rows(eager, key), abs=2e-3), key
    a, b = (load_model(str(run))[0].state_dict() for run in (eager, compiled))
    assert a.keys() == b.keys()


@pytest.mark.parametrize("model", PRESETS)
def test_dry_run_prints_the_resolved_run_though_there_is_no_data(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    ds_config = str(ROOT / "ds_configs" / "zero3.json")
    assert main(["--dry_run", "--model", model, "--ds_config", ds_config]) == 2
    printed = capsys.readouterr().out
    assert f"{PRESETS[model].config.n_params():,} parameters" in printed
    for part in ("micro-batches", "schedule", '"batch_tokens"', '"bf16"', '"stage": 3'):
        assert part in printed


def test_without_eval_tokens_a_short_split_is_used_whole_and_said(
    data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = ["--data_dir", str(data_dir), "--run_dir", str(tmp_path / "run")]
    assert main(["--model", "debug", *paths, "--dry_run"]) == 0
    printed = capsys.readouterr().out
    assert "eval      2,999 validation tokens, the whole split\n" in printed
    assert '"eval_tokens": 2999, ' in printed


def test_dry_run_of_a_new_run_imports_neither_torch_nor_deepspeed(
    data_dir: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-X", "importtime", "train.py", "--dry_run"]
    command += map(str, arguments(data_dir, tmp_path / "run", 1))
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=20)
    assert " torch\n" not in done.stderr
    assert " deepspeed\n" not in done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "gpt9"], "error: --model gpt9: unknown"),
        (["--data_dir", "nowhere"], "error: --data_dir nowhere: no shard"),
        (["--ds_config", "nowhere.json"], "error: --ds_config nowhere.json: no such file"),
        (["--micro_batch_size", "3"], "error: --micro_batch_size 3: does not divide"),
        (["--resume", "must"], "error: --resume must: "),
        (["--init_from", "nowhere"], "error: nowhere: no such folder"),
        (["--model", "quickstart", "--init_from", "INIT"], "error: --init_from "),
        (["--eval_tokens", "0"], "error: --eval_tokens 0"),
        (["--eval_tokens", "10485760"], "error: DATA/text_val_000000.npy: the validation split"),
        (["--hellaswag_every", "9", "--hellaswag_limit", "600"], "error: --data: row 581 has an"),
        (["--profile", "3"], "error: --profile 3: must be FIRST:END. Fix: e.g. 10:13"),
        (["--profile", "3:3"], "error: --profile 3:3: out of range. Fix: give FIRST below"),
        (["--profile", "3:99"], "error: --profile 3:99: out of range. Fix: give FIRST below"),
        (["--compile"], "error: --compile: there is no C++ compiler 'no-such-compiler'. Fix: "),
        (["--run_dir", __file__], f"error: --run_dir {__file__}: is a file"),
    ],
)
def test_mistakes_cost_one_line_and_status_2(
    data_dir: Path,
    tmp_path: Path,
    options: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    if "INIT" in options:
        reference.write_inputs(tmp_path, n_tokens=600)
        options = [str(tmp_path / "init") if o == "INIT" else o for o in options]
    capsys.readouterr()
    for more in ([], ["--dry_run"]):
        assert main(arguments(data_dir, tmp_path / "run", 1, *options, *more)) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        assert lines[0].startswith(message.replace("DATA", str(data_dir)))
        assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("stage", [1, 3])
def test_a_value_that_deepspeed_does_not_take_is_named(
    data_dir: Path, tmp_path: Path, stage: int, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": stage, "overlap_comm": "perhaps"}}))
    command = arguments(data_dir, tmp_path / "run", 1, "--ds_config", str(path))
    assert main(command) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"error: rank 0: --ds_config {path}: overlap_comm: Input should be ")
    assert ". Fix: " in said


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("log_every", [1, 3])
def test_the_speed_is_that_of_the_steps_for_every_log_every(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log_every: int
) -> None:
    take_step, mean_loss = training.step.take_step, eval.val_loss.mean_loss

    now = [0.0]
    monkeypatch.setattr(training.step, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def slow_step(*args: Any) -> Any:
        now[0] += 0.5
        return take_step(*args)

    def slow_loss(*args: Any, **options: Any) -> float:
        now[0] += 100
        return mean_loss(*args, **options)

    monkeypatch.setattr(training.step, "take_step", slow_step)
    monkeypatch.setattr(eval.val_loss, "mean_loss", slow_loss)
    run_dir = tmp_path / "run"
    options = ("--max_steps", 8, "--eval_every", 4, "--log_every", log_every, "--sample_tokens", 1)
    assert main(arguments(data_dir, run_dir, 1, *options)) == 0
    config = json.loads((run_dir / "config.json").read_text())
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    rates = {row["step"]: row["perf/tokens_per_s"] for row in rows if "perf/tokens_per_s" in row}
    seconds = [config["batch_tokens"] / rate for step, rate in rates.items() if step > 0]
    assert len(seconds) == 7 // log_every
    assert seconds == pytest.approx([0.5] * len(seconds))


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("asked", [False, True])
def test_deterministic_kernels_are_asked_for_and_recorded(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: bool
) -> None:
    take_step, seen = training.step.take_step, []

    def watched(*args: Any) -> Any:
        seen.append(torch.are_deterministic_algorithms_enabled())
        return take_step(*args)

    monkeypatch.setattr(training.step, "take_step", watched)
    options = ("--max_steps", 1, *["--deterministic"] * asked)
    try:
        assert main(arguments(data_dir, tmp_path / "run", 1, *options)) == 0
    finally:
        torch.use_deterministic_algorithms(False)
    assert seen == [asked]
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["deterministic"] == asked
