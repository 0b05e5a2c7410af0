"""What is said about a GPU, without one: counts and their bounds, the page, the stages."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.fill import fill
from bench.gpu.counts import Work, count_pass, counted
from bench.gpu.run import main
from model import GPTConfig

ROOT = Path(__file__).resolve().parents[2]
GPT2 = GPTConfig(12, 12, 768)
GB = 1e9


@pytest.fixture(scope="module")
def parts() -> dict[str, Work]:
    pytest.importorskip("triton")
    return count_pass(GPT2)


@pytest.mark.parametrize(("part", "launches", "moved"), [
    ("loss", 200, 32 * GB), ("loss without Triton", 700, 100 * GB),
    ("blocks", 360, 72 * GB), ("validation, forward", 240, 45 * GB),
])  # fmt: skip
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
    command = [sys.executable, "bench/gpu/run.py", "--out", str(tmp_path), "--tiny", "--slack", "3",
               "--stages", "setup,gradients,losses,zero1"]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = (tmp_path / "results.jsonl").read_text(encoding="utf-8").splitlines()
    rows = {row["stage"]: row for row in map(json.loads, lines) if row["stage"] != "begin"}
    assert list(rows) == ["setup", "gradients", "losses", "zero1"]
    assert rows["gradients"]["ok"]
    assert rows["zero1"]["tokens_per_s"] > 0
    assert rows["zero1"]["losses"][-1] < rows["zero1"]["losses"][0]


def test_a_stage_that_dies_or_hangs_costs_itself_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.gpu.run.__file__", str(tmp_path / "child.py"))
    (tmp_path / "child.py").write_text(
        "import json, os, sys, time\n"
        "out = sys.argv[sys.argv.index('--out') + 1]\n"
        "for name in sys.argv[-1].split(','):\n"
        "    with open(f'{out}/results.jsonl', 'a') as file:\n"
        "        print(json.dumps({'stage': 'begin', 'name': name}), file=file, flush=True)\n"
        "        time.sleep(60 if name == 'seed' else 0)\n"
        "        if name == 'zero1':\n"
        "            os.abort()\n"
        "        print(json.dumps({'stage': name}), file=file, flush=True)\n",
        encoding="utf-8",
    )
    arguments = ["run.py", "--out", str(tmp_path / "out"), "--data_dir", str(tmp_path), "--slack",
                 "0.05", "--stages", "zero0,zero1,seed,zero2"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", arguments)
    assert main() == 1
    lines = (tmp_path / "out" / "results.jsonl").read_text(encoding="utf-8").splitlines()
    rows = {row["stage"]: row for row in map(json.loads, lines)}
    assert "error" in rows["zero1"]
    assert "error" in rows["seed"]
    assert rows["zero0"] == {"stage": "zero0"}
    assert rows["zero2"] == {"stage": "zero2"}
