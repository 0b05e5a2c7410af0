"""Measure what people run: the command lines, evaluation, sampling, resume, export."""

from __future__ import annotations

import gc
import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.fidelity.parity import largest_difference
from bench.gpu.device import ROOT, Options, Row, Sizes, device, run_program, seconds
from bench.gpu.training import LINEAR
from bench.processes import flags
from bench.speed.side import preset_of
from model import GPT, GPTConfig
from model.presets import get_preset
from training.ranks import Ranks

TOLERANCE = 1e-2  # of logits in fp32, with TF32
ONE_IN = 20  # rows of HellaSwag are scored one at a time


def commands(options: Options) -> Row:
    """The launcher, training, a resume at another stage, HellaSwag; what stdout holds."""
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        arguments = flags(
            model="debug",
            data_dir=options.data_dir,
            run_dir=run_dir,
            eval_tokens=640,
            eval_every=10,
            checkpoint_every=10,
            sample_tokens=4,
        )
        launcher = ["-m", "deepspeed.launcher.runner", "--num_gpus", "1", "train.py"]
        start = [*launcher, *arguments, *flags(max_steps=10)]
        other_stage = flags(ds_config="ds_configs/zero0.json", max_steps=20)
        hellaswag = ["eval/hellaswag.py", *flags(ckpt=run_dir, limit=40)]
        found = {
            "launcher": run_program(start, 90),
            "resume": run_program(["train.py", *arguments, *other_stage], 60),
            "hellaswag": run_program(hellaswag, 60),
        }
    scores = found["hellaswag"]["stdout"].splitlines()
    ok = all(program["status"] == 0 for program in found.values())
    return found | {"stdout_is_one_json_line": len(scores) == 1 and scores[0][:1] == "{", "ok": ok}


def evaluation(options: Options) -> Row:
    """HellaSwag packed against one example at a time; first and second call; sampling."""
    from eval.hellaswag import load_examples, predict
    from eval.packing import crop_contexts, sum_ending_losses
    from eval.sample import sample_texts
    from eval.session import Session

    config = get_preset("debug" if options.tiny else "gpt2").config
    model = _model(config).bfloat16()
    examples = crop_contexts(load_examples(limit=20 if options.tiny else None), config.block_size)
    session = Session(model, config, device(), Ranks())
    found: Row = {}
    ours = torch.empty(0)

    def score() -> None:
        nonlocal ours
        ours = sum_ending_losses(session, examples)

    for call in ("first", "second"):
        found[f"hellaswag_{call}_s"] = seconds(score)
    index = range(0, len(examples), 1 if options.tiny else ONE_IN)
    some = [examples[i] for i in index]
    single = torch.zeros(len(some), 4, dtype=torch.float64)

    def score_singly() -> None:
        for i, example in enumerate(some):
            single[i] = _losses_of_one(model, example)

    found["one_at_a_time_s"] = round(seconds(score_singly) * len(examples) / len(some), 1)
    packed = ours[list(index)]
    pairs = zip(predict(packed, some), predict(single, some), strict=True)
    found["other_predictions"] = [int((a != b).sum()) for a, b in pairs]  # acc, acc_norm
    found |= {"rows": len(some), "largest_apart": (packed - single).abs().max().item()}
    prompt = "Hello, I'm a language model,"
    for call in ("first", "second"):
        found[f"sample_{call}_s"] = seconds(
            lambda: sample_texts(session, prompt, 8 if options.tiny else 32, 7)
        )
    return found | {"ok": found["other_predictions"] == [0, 0]}


def _model(config: GPTConfig) -> GPT:
    with device():
        return GPT(config).eval()


@torch.no_grad()
def _losses_of_one(model: GPT, example: Any) -> Tensor:
    # The summed loss of each of the four endings, (4,) in nats, from full logits.
    rows = [torch.tensor([*example.context, *ending]) for ending in example.endings]
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device())  # (4, T)
    log_probs = model(tokens).float().log_softmax(-1).cpu()  # (4, T, V)
    sums = []
    for j, ending in enumerate(example.endings):
        positions = torch.arange(len(ending)) + len(example.context) - 1
        sums.append(-log_probs[j, positions, torch.tensor(ending)].double().sum())
    return torch.stack(sums)


def resume(options: Options) -> Row:
    """Save, go on, load, go on again: the largest difference of the losses, by kind of kernels."""
    from training.rendezvous import init_process_group

    init_process_group(Ranks(), 300)
    found: Row = {}
    for stage, is_exact in itertools.product(("zero0", "zero1", "zero3"), (False, True)):
        name = f"{stage} {'deterministic' if is_exact else 'default'}"
        torch.use_deterministic_algorithms(is_exact)
        try:
            found[name] = _difference_after_resume(options, stage)
        except RuntimeError as error:  # no deterministic kernel
            found[name] = str(error).splitlines()[0][:200]
        finally:
            torch.use_deterministic_algorithms(False)
    return found | {"ok": all(v == 0 for name, v in found.items() if "deterministic" in name)}


def _batches(sizes: Sizes, first: int) -> Iterator[tuple[Tensor, Tensor]]:
    # Random tokens of each step from `first` on: a resumed run finds the same.
    for step in itertools.count(first):
        generator = torch.Generator().manual_seed(step)
        shape = (sizes.micro_batch_size, sizes.seq_len + 1)
        windows = torch.randint(1000, shape, generator=generator).to(device())
        yield windows[:, :-1], windows[:, 1:]


def _difference_after_resume(options: Options, stage: str) -> float:
    from checkpoint.manifest import read_manifest, step_name
    from checkpoint.resuming import load_checkpoint
    from checkpoint.saving import save_checkpoint
    from training.config import resolve_batch, resolve_train_config
    from training.ds_config import load_ds_config, precision, resolve_ds_config
    from training.engine import build_engine, build_model
    from training.step import take_step

    sizes = options.sizes("parity", grad_accum=1)
    config = resolve_train_config(
        model=sizes.model,
        preset=preset_of(sizes.model),
        seq_len=sizes.seq_len,
        batch_tokens=sizes.tokens,
        micro_batch_size=sizes.micro_batch_size,
        dropout=0.1,
        ds_config=ROOT / f"ds_configs/{stage}.json",
    )
    batch = resolve_batch(config, 1)
    ds_config = resolve_ds_config(load_ds_config(config.ds_config), config, batch).ds_config

    def build() -> Any:
        F.linear = LINEAR  # zero.Init has replaced it
        gc.collect()
        model = build_model(config, ds_config, device())
        engine, _ = build_engine(model, config, ds_config, Ranks())
        engine.train()
        return engine

    def train(engine: Any, steps: range) -> list[float]:
        batches = _batches(sizes, steps.start)
        return [float(take_step(engine, config, step, 1, batches)[0]) for step in steps]

    with tempfile.TemporaryDirectory() as folder:
        engine = build()
        of_weights = precision(ds_config)
        train(engine, range(3))
        order = {"batch_tokens": sizes.tokens, "seq_len": sizes.seq_len}
        save_checkpoint(engine, Path(folder), step=3, precision=of_weights, order=order)
        before = train(engine, range(3, 7))
        del engine
        engine = build()
        saved = Path(folder) / step_name(3)
        load_checkpoint(engine, saved, read_manifest(saved), of_weights)
        after = train(engine, range(3, 7))
    return largest_difference(before, after)


def export(options: Options) -> Row:
    """A consolidated folder in transformers: the largest difference of its logits from ours."""
    from transformers import AutoModelForCausalLM

    from checkpoint.hf_folder import save_hf_folder

    config = get_preset("debug" if options.tiny else "gpt2").config
    model = _model(config)
    with tempfile.TemporaryDirectory() as folder:
        save_hf_folder(Path(folder) / "hf", config, model.named_parameters())
        theirs = AutoModelForCausalLM.from_pretrained(Path(folder) / "hf").eval()
    to: Any = theirs.to  # transformers hides its types
    tokens = torch.randint(50_257, (2, min(64, config.block_size)), device=device())
    with torch.no_grad():
        difference = (model(tokens) - to(device())(tokens).logits).abs().max().item()
    return {"largest_apart": difference, "ok": difference < TOLERANCE}
