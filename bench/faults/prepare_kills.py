"""Kill data/prepare.py at random moments, start it again, and compare every byte.

    python bench/faults/prepare_kills.py --kills 50 --out kills.json

A kill hits the only process, or under MPI one rank or all of them. Started again, the same command
must end with the bytes of a run that nobody disturbed, and must not write a finished shard again.
The JSON is written after every kill; an interrupted campaign goes on where it was.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

if not __package__:  # run as a file: import from the repository root, exactly as train.py does
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from bench.processes import flags, wait_until
from bench.record import load_json, save_json
from command_line import OneLineParser

ROOT = Path(__file__).resolve().parents[2]
WAYS = ("alone", "one rank", "all ranks")
N_RANKS = 3
N_DOCUMENTS, DOCUMENT_WORDS = 6000, 300
TIMEOUT_S = 120


@dataclass(frozen=True)
class Kill:
    """What one kill left and what the second start made of it."""

    way: str
    after_s: float
    hit: bool  # the run was not over yet
    finished_shards: int  # named in shards.json when it was killed
    rewritten_shards: int  # whole files that the second start wrote again
    same_bytes: bool


def make_source(folder: Path) -> Path:
    """Write a .jsonl of random words, about 10 MB."""
    from data.tokenizer import load_tokenizer

    rng = random.Random(0)
    words = [load_tokenizer().decode([i]) for i in rng.sample(range(1000, 50000), 5000)]
    path = folder / "words.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for _ in range(N_DOCUMENTS):
            text = "".join(rng.choices(words, k=rng.randint(0, 2 * DOCUMENT_WORDS)))
            file.write(json.dumps({"text": text}) + "\n")
    return path


def command(source: Path, out_dir: Path, way: str) -> list[str]:
    """Return the command that prepares `source`."""
    launcher = []
    if way != "alone":
        launcher = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", str(N_RANKS)]
    # tiktoken is the slower tokenizer: there is more time to be killed in.
    options = flags(val_tokens=20_000, shard_tokens=30_000, workers=1, tokenizer="tiktoken")
    program = [sys.executable, "data/prepare.py", str(source), "--out_dir", str(out_dir)]
    return [*launcher, *program, "--quiet", *options]


def digests(out_dir: Path) -> dict[str, str]:
    """Return the SHA-256 of every file, temporary ones included."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in out_dir.iterdir()}


def run(source: Path, out_dir: Path, way: str) -> float:
    """Prepare without disturbance; return the seconds."""
    started = time.perf_counter()
    subprocess.run(command(source, out_dir, way), cwd=ROOT, check=True, timeout=TIMEOUT_S)
    return time.perf_counter() - started


def kill(source: Path, out_dir: Path, way: str, after_s: float) -> bool:
    """Start, kill after some seconds, wait until all is over; return whether it was running."""
    import psutil

    process = subprocess.Popen(
        command(source, out_dir, way),
        cwd=ROOT,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    time.sleep(after_s)
    running = process.poll() is None
    ranks = []
    if running and way == "one rank":
        ranks = psutil.Process(process.pid).children()  # none if mpirun has not started them yet
    if ranks:
        random.choice(ranks).kill()  # mpirun ends the others
    elif running:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(TIMEOUT_S)
    wait_for_session(process.pid)
    return running


def wait_for_session(session: int) -> None:
    """Wait until no process of a session is left."""
    import psutil

    def is_over() -> bool:
        return all(_session(pid) != session for pid in psutil.pids())

    if not wait_until(is_over, TIMEOUT_S):
        os.killpg(session, signal.SIGKILL)
        raise TimeoutError(f"processes of session {session} live on")


def _session(pid: int) -> int:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return -1


def kill_and_start_again(
    source: Path, out_dir: Path, way: str, after_s: float, expected: dict[str, str]
) -> Kill:
    """Kill one run, complete it, compare."""
    hit = kill(source, out_dir, way, after_s)
    whole = {p.name: p.stat().st_mtime_ns for p in out_dir.glob("*.npy")} if hit else {}
    manifest = out_dir / "shards.json"
    finished = len(load_json(manifest).get("shards", []))
    run(source, out_dir, way)
    rewritten = sum((out_dir / name).stat().st_mtime_ns != when for name, when in whole.items())
    return Kill(way, round(after_s, 3), hit, finished, rewritten, digests(out_dir) == expected)


def campaign(n_kills: int, out: Path, ways: tuple[str, ...], seed: int = 0) -> list[Kill]:
    """Kill until `out` holds `n_kills` results; each kill has its own random moment."""
    done: list[Kill] = []
    if out.exists():
        done = [Kill(**kill) for kill in json.loads(out.read_text(encoding="utf-8"))]
    with tempfile.TemporaryDirectory(prefix="nanospeed_") as name:
        folder = Path(name)
        source = make_source(folder)
        duration_s = {way: run(source, folder / way, way) for way in ways}
        expected = digests(folder / ways[0])
        assert all(digests(folder / way) == expected for way in ways)
        while len(done) < n_kills:
            rng = random.Random(f"{seed}/{len(done)}")
            way = ways[len(done) % len(ways)]
            after_s = rng.uniform(0.1, 1) * duration_s[way]
            result = kill_and_start_again(source, folder / "out", way, after_s, expected)
            shutil.rmtree(folder / "out")
            print(result, file=sys.stderr)
            done.append(result)
            save_json(out, [asdict(kill) for kill in done])
    return done


def main() -> int:
    """Run the command line; return 0 if every kill left the same bytes."""
    parser = OneLineParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50, help="in all (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="JSON of the results")
    args = parser.parse_args()
    ways = WAYS if shutil.which("mpirun") else WAYS[:1]
    results = campaign(args.kills, args.out, ways)
    good = [r for r in results if r.same_bytes and r.rewritten_shards <= 1]
    counts = {
        "kills": len(results),
        "same_bytes_and_at_most_one_shard_rewritten": len(good),
        "while_running": sum(r.hit for r in results),
        "between_shards": sum(r.hit and r.finished_shards > 0 for r in results),
    }
    print(json.dumps(counts))
    return 0 if len(good) == len(results) else 1


if __name__ == "__main__":
    sys.exit(main())
