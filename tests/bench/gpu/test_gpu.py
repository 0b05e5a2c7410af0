"""What is said about a GPU, without one: counts and their bounds, the page, the stages."""

import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from bench.gpu.counts import Work, count_pass, counted
from bench.gpu.run import main
from bench.page import fill
from model import GPTConfig

ROOT = Path(__file__).resolve().parents[3]
GPT2 = GPTConfig(12, 12, 768)
GB = 1e9


@pytest.fixture(scope="module")
def parts() -> dict[str, Work]:
    pytest.importorskip("triton")
    return count_pass(GPT2)


@pytest.mark.parametrize(
    ("part", "launches", "moved"),
    [
        ("loss", 200, 32 * GB),
        ("loss without Triton", 700, 100 * GB),
        ("blocks", 360, 72 * GB),
        ("validation, forward", 240, 45 * GB),
    ],
)
def test_a_pass_at_64_times_1024_stays_within_its_bounds(
    parts: dict[str, Work], part: str, launches: int, moved: float
) -> None:
    assert 0 < parts[part].launches <= launches
    assert 0.7 * moved < parts[part].moved <= moved  # what it says, and no less


def test_flops_are_those_of_the_formula(parts: dict[str, Work]) -> None:
    tokens = 64 * 1024
    blocks = 6 * tokens * 12 * 12 * 768**2
    head = 6 * tokens * GPT2.padded_vocab_size * 768
    assert parts["all"].product_flops == blocks + head
    causal = tokens * 12 * 768 * 1024 * 2  # half of 4·T·C in each block
    assert parts["all"].attention_flops == pytest.approx(3.5 * causal, rel=1e-3)


@pytest.mark.parametrize("rows", [4096, 8192, 16_384])
def test_every_chunk_is_whole_tiles(rows: int, parts: dict[str, Work]) -> None:
    import torch

    from model.loss import linear_cross_entropy

    heights = []
    with torch.device("meta"):
        x = torch.empty(20_000, 8, dtype=torch.bfloat16, requires_grad=True)
        w = torch.empty(50_304, 8, dtype=torch.bfloat16, requires_grad=True)
        y = torch.empty(20_000, dtype=torch.long)
    real = torch.mm

    def mm(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        heights.append(len(a))
        return real(a, b, out=out)

    with counted(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "mm", mm)
        linear_cross_entropy(x, w, y, gpu_rows=rows)
    assert sum(heights) == 20_000
    assert all(height == rows for height in heights[:-1])


def test_the_page_says_what_its_commands_print() -> None:
    pytest.importorskip("triton")
    page = (ROOT / "docs" / "GPU.md").read_text(encoding="utf-8")
    assert fill(page) == page


def test_stages_run_at_small_sizes_and_leave_their_rows(tmp_path: Path) -> None:
    """The other stages: make gpu-tiny."""
    command = [sys.executable, "bench/gpu/run.py", "--out", str(tmp_path), "--tiny"]
    command += ["--slack", "3", "--stages", "setup,gradients,losses,zero1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = (tmp_path / "results.jsonl").read_text(encoding="utf-8").splitlines()
    rows = {row["stage"]: row for row in map(json.loads, lines) if row["stage"] != "begin"}
    assert list(rows) == ["setup", "gradients", "losses", "zero1"]
    assert rows["gradients"]["ok"]
    assert rows["zero1"]["tokens_per_s"] > 0
    assert rows["zero1"]["losses"][-1] < rows["zero1"]["losses"][0]


CHILD = """
import json, os, sys, time
out = sys.argv[sys.argv.index("--out") + 1]
for name in sys.argv[-1].split(","):
    with open(f"{out}/results.jsonl", "a") as file:
        print(json.dumps({"stage": "begin", "name": name}), file=file, flush=True)
        time.sleep(60 if name == "seed" else 0)
        if name == "zero1":
            os.abort()
        print(json.dumps({"stage": name}), file=file, flush=True)
"""


def run_with_child(folder: Path, monkeypatch: pytest.MonkeyPatch, *flags: str) -> int:
    """Run the command line in this process, with a child that measures nothing."""
    (folder / "child.py").write_text(CHILD, encoding="utf-8")
    monkeypatch.setattr("bench.gpu.run.__file__", str(folder / "child.py"))
    arguments = ["run.py", "--out", str(folder / "out"), "--tiny", *flags]
    monkeypatch.setattr(sys, "argv", arguments)
    return main()


def rows_in(folder: Path) -> dict[str, dict[str, str]]:
    lines = (folder / "out" / "results.jsonl").read_text(encoding="utf-8").splitlines()
    return {row["stage"]: row for row in map(json.loads, lines)}


def test_a_stage_that_dies_or_hangs_costs_itself_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--slack", "0.05", "--stages", "zero0,zero1,seed,zero2"]
    assert run_with_child(tmp_path, monkeypatch, *flags) == 1
    rows = rows_in(tmp_path)
    assert rows["zero1"]["error"] == "died with status -6"
    assert rows["seed"]["error"] == "over its 2 s"
    assert rows["zero0"] == {"stage": "zero0"}
    assert rows["zero2"] == {"stage": "zero2"}


def test_what_the_budget_leaves_out_is_said_and_comes_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("bench.gpu.run.LEAST_S", 1)
    flags = ["--stages", "zero0,seed,zero2"]
    assert run_with_child(tmp_path, monkeypatch, *flags, "--budget", "3") == 1
    assert "left out: zero2. Fix: the same command again goes on" in capsys.readouterr().err
    assert rows_in(tmp_path)["seed"]["error"] == "the budget is used up"
    assert run_with_child(tmp_path, monkeypatch, *flags) == 1  # for seed has an error
    begun = (tmp_path / "out" / "results.jsonl").read_text(encoding="utf-8").count("begin")
    assert begun == 3  # each stage once


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--stages", "zero9"], "--stages zero9: is not a stage. Fix: choose from setup, "),
        (["--budget", "9"], "--budget 9: is too short for a stage. Fix: give more than 15"),
        (["--data_dir", "no_such"], "--data_dir no_such: "),
    ],
)
def test_what_would_waste_a_gpus_time_is_refused(
    flags: list[str],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run_with_child(tmp_path, monkeypatch, *flags) == 2
    line = capsys.readouterr().err
    assert line.startswith(f"error: {says}")
    assert "Fix: " in line


def test_a_stop_ends_the_child_too(tmp_path: Path) -> None:
    command = [sys.executable, "bench/gpu/run.py", "--out", str(tmp_path), "--tiny"]
    command += ["--stages", "setup,parity,profile,curve"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert process.stderr
    assert process.stderr.readline() == "setup\n"
    (child,) = psutil.Process(process.pid).children()
    process.terminate()
    process.communicate(timeout=20)
    child.wait(timeout=20)
    assert not child.is_running()
