"""A process of bench/speed/side.py, which trains as train.py does."""

import itertools
import sys
from pathlib import Path

import pytest

from bench.speed.train_step import Side, write_tokens
from model import PRESETS


@pytest.mark.skipif(sys.platform != "linux", reason="/proc counts page faults")
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_step_takes_no_new_pages_from_the_kernel(tmp_path: Path, stage: int) -> None:
    write_tokens(tmp_path)
    flags = ["--model", "debug", "--seq_len", "64", "--data_dir", str(tmp_path)]
    with Side(f"zero{stage}", flags) as side:  # without the allocator's environment variables
        side.steps(4)
        stat = Path(f"/proc/{side.ranks[0].pid}/stat")
        counts = [minor_faults(stat)]
        for _ in range(3):  # in one of them the heap may still grow
            side.steps(1)
            counts.append(minor_faults(stat))
    logits_pages = 4 * 64 * PRESETS["debug"].config.padded_vocab_size * 2 // 4096  # of one buffer
    assert min(b - a for a, b in itertools.pairwise(counts)) < logits_pages / 2, counts


def minor_faults(stat: Path) -> int:
    """Return proc(5)'s minflt: pages taken without reading a disk."""
    return int(stat.read_text().rpartition(")")[2].split()[7])
