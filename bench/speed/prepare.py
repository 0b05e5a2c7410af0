"""Compare text to shards with the seed's (build-nanogpt's) way: seconds, memory, bytes.

    python bench/speed/prepare.py CORPUS.jsonl[.xz] --out prepare.json

Each side makes shards of a .jsonl and of a .parquet file, a process of its own, in turns; the bytes
are compared first. The seed does not wait for the disk; ours does (fsync).
"""

import hashlib
import json
import lzma
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: import from the repository root, exactly as train.py does
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from bench.processes import flags
from bench.ratios import in_turns, paired_ratio
from bench.record import Rows, record
from command_line import OneLineParser

ROOT = Path(__file__).resolve().parents[2]
VAL_TOKENS, SHARD_TOKENS = 1_000_000, 5_000_000
SIDES = ["seed", "ours", "ours with tiktoken"]
ROWS_PER_GROUP = 1000  # as `datasets` writes them


def write_sources(corpus: Path, folder: Path, copies: int) -> list[Path]:
    """Write the corpus as .jsonl and as .parquet, several times over; read it through once."""
    import pyarrow
    from pyarrow import parquet

    opened = lzma.open if corpus.suffix == ".xz" else open
    with opened(corpus, "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines] * copies
    with (folder / "corpus.jsonl").open("w", encoding="utf-8") as file:
        for text in texts:
            file.write(json.dumps({"text": text}) + "\n")
    table = pyarrow.table({"text": pyarrow.array(texts, pyarrow.large_string())})
    parquet.write_table(table, folder / "corpus.parquet", row_group_size=ROWS_PER_GROUP)
    return [folder / "corpus.jsonl", folder / "corpus.parquet"]


def command(side: str, source: Path, out_dir: Path) -> list[str]:
    """Return the command of one side."""
    if side == "seed":
        sizes = [str(VAL_TOKENS), str(SHARD_TOKENS)]
        return [sys.executable, "bench/fidelity/seed_prepare.py", str(source), str(out_dir), *sizes]
    tokenizer = "tiktoken" if side == "ours with tiktoken" else "auto"
    sizes = flags(val_tokens=VAL_TOKENS, shard_tokens=SHARD_TOKENS, tokenizer=tokenizer)
    options = ["--out_dir", str(out_dir), "--quiet", *sizes]
    return [sys.executable, "data/prepare.py", str(source), *options]


def measure(side: str, source: Path, out_dir: Path) -> tuple[float, float]:
    """Run one side; return seconds and the peak memory of its largest process in MiB."""
    shutil.rmtree(out_dir, ignore_errors=True)
    started = time.perf_counter()
    process = subprocess.Popen(command(side, source, out_dir), cwd=ROOT)
    _, status, usage = os.wait4(process.pid, 0)
    elapsed_s = time.perf_counter() - started
    assert status == 0, side
    return elapsed_s, usage.ru_maxrss / 1024


def digests(out_dir: Path) -> dict[str, str]:
    """Return the SHA-256 of every shard."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in out_dir.glob("*.npy")}


def compare(source: Path, folder: Path, blocks: int) -> dict[str, Any]:
    """Measure all sides on one source."""
    for side in SIDES:  # and warm the file cache
        measure(side, source, folder / side)
    expected = digests(folder / "seed")
    assert all(digests(folder / side) == expected for side in SIDES), "the bytes differ"
    times: dict[str, list[float]] = {side: [] for side in SIDES}
    memory: dict[str, list[float]] = {side: [] for side in SIDES}
    for side in in_turns(SIDES, blocks):
        elapsed_s, peak_mib = measure(side, source, folder / side)
        times[side].append(elapsed_s)
        memory[side].append(peak_mib)
    result: dict[str, Any] = {
        "source": source.name,
        "bytes": source.stat().st_size,
        "shards": len(expected),
        "same_bytes": True,
    }
    for side in SIDES:
        result[side] = {"seconds": times[side], "peak_mib": max(memory[side])}
    return result


def table(results: list[dict[str, Any]]) -> Rows:
    """Return a row for each source and side."""
    rows: Rows = []
    for result in results:
        for side in SIDES:
            seconds = result[side]["seconds"]
            rows.append(
                {
                    "source": result["source"],
                    "side": side,
                    "seconds": f"{statistics.median(seconds):.2f}",
                    "times faster": str(paired_ratio(result["seed"]["seconds"], seconds)),
                    "peak MiB": f"{result[side]['peak_mib']:,.0f}",
                }
            )
    return rows


def main() -> None:
    """Run the command line."""
    parser = OneLineParser(description=__doc__)
    parser.add_argument("corpus", type=Path, help=".jsonl or .jsonl.xz with a text per line")
    parser.add_argument("--copies", type=int, default=1, help="of the corpus (default: 1)")
    parser.add_argument("--blocks", type=int, default=7, help="of turns (default: 7)")
    parser.add_argument("--out", type=Path, required=True, help="JSON file; results are added")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="nanospeed_") as name:
        folder = Path(name)
        # In a process of its own: a child's peak memory begins at that of its parent.
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            sources = pool.submit(write_sources, args.corpus, folder, args.copies).result()
        results = [compare(source, folder, args.blocks) for source in sources]
    title = f"Text to shards: {args.corpus.name}, {args.copies} times over"
    record(args.out, title, table(results), results)


if __name__ == "__main__":
    main()
