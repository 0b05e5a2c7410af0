import json
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from training.config import TrainConfig, resolve_train_config
from training.health import Verdict
from training.metrics import Metrics, peak_flops
from training.ranks import Ranks


def config_of(run_dir: Path) -> TrainConfig:
    return resolve_train_config(model="debug", max_steps=10, run_dir=run_dir)


def write_steps(run_dir: Path, resume_step: int, first: int, last: int, sign: int) -> None:
    """Write what a run with an evaluation at every second step writes."""
    metrics = Metrics(config_of(run_dir), resume_step, Ranks(), torch.device("cpu"))
    for step in range(first, last):
        if step % 2 == 0:
            metrics.evaluation(step, sign * step + 0.5, [f"text {sign * step}"])
        metrics.train([Verdict(step, float(sign * step), 0.1, "")], 1e-3, dt_s=0.5)
    metrics.close()


def test_log_has_build_nanogpts_format(tmp_path: Path) -> None:
    write_steps(tmp_path, 0, 0, 3, 1)
    assert (tmp_path / "log.txt").read_text().splitlines() == [
        "0 val 0.5000",
        "0 train 0.000000",
        "1 train 1.000000",
        "2 val 2.5000",
        "2 train 2.000000",
    ]


def test_resume_leaves_no_gap_and_no_double(tmp_path: Path) -> None:
    write_steps(tmp_path, 0, 0, 8, 1)
    with (tmp_path / "log.txt").open("a") as log:
        log.write("garbage\n8 tra")  # torn by a kill
    write_steps(tmp_path, 4, 4, 7, -1)
    rows = [line.split() for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert [(int(s), float(v)) for s, kind, v in rows if kind == "train"] == [
        (0, 0),
        (1, 1),
        (2, 2),
        (3, 3),
        (4, -4),
        (5, -5),
        (6, -6),
    ]
    assert [(int(s), float(v)) for s, kind, v in rows if kind == "val"] == [
        (0, 0.5),
        (2, 2.5),
        (4, -3.5),
        (6, -5.5),
    ]
    json_rows = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in json_rows if "train/loss" in r] == list(range(7))


def test_tensorboard_reads_back_every_step_once(tmp_path: Path) -> None:
    write_steps(tmp_path, 0, 0, 8, 1)
    write_steps(tmp_path, 4, 4, 7, -1)
    events = EventAccumulator(str(tmp_path), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    tags = events.Tags()
    assert set(tags["scalars"]) >= {
        "train/loss",
        "train/lr",
        "train/grad_norm",
        "val/loss",
        "perf/tokens_per_s",
    }
    train = [(e.step, e.value) for e in events.Scalars("train/loss")]
    assert train == [(0, 0), (1, 1), (2, 2), (3, 3), (4, -4), (5, -5), (6, -6)]
    assert [(e.step, e.value) for e in events.Scalars("val/loss")] == [
        (0, 0.5),
        (2, 2.5),
        (4, -3.5),
        (6, -5.5),
    ]
    # This reader purges scalars only (TensorBoard's own server purges texts too): the last counts.
    texts = events.Tensors("samples/0/text_summary")
    last = {e.step: e.tensor_proto.string_val[0].decode() for e in texts}
    assert last == {0: "text 0", 2: "text 2", 4: "text -4", 6: "text -6"}
    assert "_hparams_/experiment" in str(events.summary_metadata)


def test_console_line_has_all_that_people_watch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = Metrics(config_of(tmp_path), 0, Ranks(), torch.device("cpu"))
    metrics.train([Verdict(3, 2.5, 0.25, "")], 1e-3, dt_s=0.5)
    bad = Verdict(4, float("nan"), float("inf"), "skipped")
    metrics.train([bad, bad._replace(step=5, complaint="")], 1e-3, dt_s=600.0)
    metrics.close()
    *_, last, complaint = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert complaint == {"step": 4, "complaint": "skipped (samples 32 to 39)"}
    assert last["train/loss"] is last["train/grad_norm"] is None  # NaN is not JSON
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith(
        "step     3 | loss: 2.500000 | lr 1.0000e-03 | norm: 0.2500 | dt: 500.00ms | "
        "tok/sec: 1024.00 | mfu: n/a | mem: "
    )
    assert lines[0].endswith("left: 0:00:03")
    assert lines[1].endswith("left: 0:40:00")
    assert lines[2] == "step     4 | skipped (samples 32 to 39)"


def test_mfu_is_not_guessed_for_an_unknown_device() -> None:
    assert peak_flops(torch.device("cpu")) is None
