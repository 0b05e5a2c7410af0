import base64
import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from eval.curves import (
    best_values,
    compare_with_golden,
    published_scores,
    read_golden,
    read_log,
    read_run,
)

ROOT = Path(__file__).resolve().parents[2]
NAME = "gpt2-124m-fineweb-edu"
SAMPLE = "Hello, I'm <b>a</b> model"


def write_run(folder: Path, first: int = 0) -> Path:
    """A run of 20 steps as train.py leaves it."""
    folder.mkdir()
    log, rows = [], []
    for step in range(first, 21):
        if step % 10 == 0:
            log += [f"{step} val {11 - step / 10:.4f}", f"{step} hella {0.25 + step / 1000:.4f}"]
            rows.append({"step": step, "val/loss": 11 - step / 10, "samples": [SAMPLE]})
        log.append(f"{step} train {11 - step / 10:.6f}")
        rows.append({"step": step, "train/loss": 1.0, "train/lr": 1e-3, "train/grad_norm": 2.0})
        rows[-1] |= {"perf/tokens_per_s": 1000.0 + step, "perf/mfu": 0.4}
    (folder / "log.txt").write_text("\n".join(log) + "\n")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.json").write_text(json.dumps({"model": "gpt3-350m"}))
    return folder


def write_golden(folder: Path, shift: float = 0.0, at: int = -1, last: int = 19_072) -> Path:
    folder.mkdir()
    golden = [(step, value) for step, value in read_golden(NAME)["val"] if step <= last]
    lines = [f"{step} val {value + (shift if step == at else 0):.4f}" for step, value in golden]
    (folder / "log.txt").write_text("\n".join(lines) + "\n")
    return folder


def report(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "eval/report.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [v or "" for k, v in attrs if k in ("src", "href", "action", "data")]
        assert tag not in ("script", "link", "iframe", "object")

    def handle_data(self, data: str) -> None:
        self.words += data + "\n"


def test_the_page_holds_pictures_and_numbers_and_no_address(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b & $c$ é")]
    done = report(*runs, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "out" / "index.html").read_text()
    page = Page(text)
    names = {"loss", "hellaswag", "tokens_per_s", "mfu", "grad_norm", "lr"}
    assert {p.stem for p in (tmp_path / "out").glob("*.png")} == names
    assert len(page.addresses) == len(names)
    for address in page.addresses:
        kind, _, content = address.partition(",")
        assert kind == "data:image/png;base64"
        assert base64.b64decode(content)[:8] == b"\x89PNG\r\n\x1a\n"
    assert "://" not in text
    for word in (
        str(runs[0]),
        str(runs[1]),
        "9.0000 at 20",
        "0.2700 at 20",
        "GPT-2 350M: 0.3752",
        "GPT-3 350M: 0.4360",
        SAMPLE,
    ):
        assert word in page.words
    best = json.loads(done.stdout)["runs"][str(runs[0])]
    assert best == {
        "min_train": {"value": 9.0, "step": 20},
        "min_val": {"value": 9.0, "step": 20},
        "max_hella": {"value": 0.27, "step": 20},
    }
    assert "min val 9.0000 (step 20), max hella 0.2700 (step 20)" in done.stderr


def test_build_nanogpts_log_is_read_and_a_restart_is_drawn_once(tmp_path: Path) -> None:
    lines = [
        "0 val 10.9",
        "0 hella 0.25",
        "0 train 10.9",
        "1 train 9.5",
        "2 val 9.4",
        "2 train 9.4",
        "3 train 9.3",
        "1 train 9.0",
        "2 val 8.9",
        "2 train 8.8",
    ]
    (tmp_path / "log.txt").write_text("\n".join(lines) + "\n")
    expected = {
        "val": [(0, 10.9), (2, 8.9)],
        "hella": [(0, 0.25)],
        "train": [(0, 10.9), (1, 9.0), (2, 8.8)],
    }
    for path in (tmp_path, tmp_path / "log.txt"):
        assert read_run(path).curves == expected
    assert report(tmp_path / "log.txt", "--out", tmp_path / "out").returncode == 0


def test_what_a_restart_has_not_reached_again_is_forgotten(tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_text("0 val 9\n5 train 8\n10 val 7\n10 train 7\n5 train 7.5\n")
    assert read_log(tmp_path / "log.txt") == {"val": [(0, 9.0)], "train": [(5, 7.5)]}


def test_damage_is_named_and_a_torn_end_left_out(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    log.write_text("0 val 10.9\n1 train\n2 train 3.0\n")
    with pytest.raises(ValueError, match=r"log\.txt:2: is not a line of a log: '1 train'"):
        read_log(log)
    log.write_text("0 val 10.9\n1 tra")
    assert read_log(log) == {"val": [(0, 10.9)]}
    with pytest.raises(ValueError, match=r"none/log\.txt: cannot be read .*give a run folder"):
        read_run(tmp_path / "none")
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n[]\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: is not a line of a log"):
        read_run(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"st')
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: is not the configuration of a run"):
        read_run(tmp_path)
    (tmp_path / "config.json").unlink()
    log.write_text("")
    assert "the log is empty" in report(tmp_path).stderr


def test_values_that_are_not_numbers_are_no_extremes(tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_text("0 val 5.0\n1 val nan\n2 val -inf\n3 val 6.0\n")
    assert best_values(read_run(tmp_path)) == {"min_val": {"value": 5.0, "step": 0}}
    assert report(tmp_path, "--out", tmp_path / "out").returncode == 0


def test_the_golden_curve_is_the_published_one() -> None:
    golden = read_golden(NAME)
    val, hella = dict(golden["val"]), dict(golden["hella"])
    assert [val[step] for step in (250, 1000, 5000, 19_072)] == [
        6.1732,
        4.1585,
        3.3573,
        3.0729,
    ]
    assert min(step for step, loss in val.items() if loss < 3.2924) == 6500
    assert min(step for step, score in hella.items() if score > 0.2945) == 11_000


@pytest.mark.parametrize(
    ("shift", "at", "last", "status", "verdict"),
    [
        (0.0, 0, 19_072, 0, "on track"),
        (0.03, 250, 19_072, 0, "on track"),
        (-0.031, 250, 19_072, 1, "off by -0.031 at step 250"),
        (0.02, 1000, 19_072, 0, "on track"),
        (0.021, 1000, 2500, 1, "off by 0.021 at step 1000"),
        (0.021, 2500, 2500, 1, "off by 0.021 at step 2500"),
        (-0.05, 19_072, 19_072, 1, "off by -0.05 at step 19072"),
        (5.0, 0, 250, 0, "on track"),  # before training: chance
        (0.0, 0, 0, 2, "no step to compare"),
    ],
)
def test_the_verdict_and_its_exit_status(
    tmp_path: Path, shift: float, at: int, last: int, status: int, verdict: str
) -> None:
    run = write_golden(tmp_path / "run", shift, at, last)
    result = compare_with_golden(read_run(run), NAME)
    assert result["verdict"] == verdict
    assert result["on_track"] is {0: True, 1: False, 2: None}[status]
    if at in (250, 0):
        done = report(run, "--check", NAME)
        assert json.loads(done.stdout) == result
        assert done.returncode == status


def test_a_loss_that_is_no_number_is_off(tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_text("250 val nan\n")
    assert compare_with_golden(read_run(tmp_path), NAME)["verdict"] == "off by nan at step 250"


def test_an_unknown_curve_is_refused_with_those_that_there_are(tmp_path: Path) -> None:
    done = report(write_golden(tmp_path / "run"), "--check", "gpt5")
    assert done.returncode == 2
    assert "invalid choice: 'gpt5'" in done.stderr
    assert NAME in done.stderr


def test_published_lines_are_those_of_the_models_size() -> None:
    assert published_scores("gpt3-1.3b") == published_scores("gpt2-xl")
    assert published_scores("quickstart") == published_scores("gpt2")
    assert list(published_scores("gpt3-175b")) == ["GPT-3 175B"]
