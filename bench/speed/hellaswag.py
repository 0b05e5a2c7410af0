"""Compare HellaSwag with Hugging Face's GPT-2, one example per forward with full logits.

    python bench/speed/hellaswag.py --model 30m --every 1 --out hellaswag.json       all predictions
    python bench/speed/hellaswag.py --model gpt2 --dtype bf16 --out hellaswag.json   time and memory

Time and memory are those of 201 rows, whose predictions are compared first. With --reference own
our network takes Hugging Face's place: in bf16 it rounds as ours does.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:  # run as a file: import from the repository root, exactly as train.py does
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from bench.fidelity.reference_hellaswag import reference_losses
from bench.processes import flags, memory_mib
from bench.ratios import in_turns, paired_ratio
from bench.record import describe_machine, load_json, save_json
from command_line import OneLineParser

if TYPE_CHECKING:
    from torch import Tensor

    from bench.fidelity.reference_hellaswag import Logits
    from model import GPT

EVERY = 50  # rows between those of the small set: 201 of 10,042
CHUNK = 500  # rows of the full set between two writes
CLOSE = 1e-5  # nats: two endings nearer than this may change places in fp32


def build_models(args: argparse.Namespace) -> tuple[GPT, Logits]:
    """Build our model of a preset with fresh weights, and the reference with the same."""
    import torch

    from bench.speed.plain_train import hf_twin
    from bench.speed.side import preset_of
    from model import GPT
    from training.ranks import Ranks
    from training.rendezvous import choose_device

    config = preset_of(args.model).config
    dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
    model = GPT(config).eval().to(choose_device(Ranks()))
    if args.reference == "own":
        return model.to(dtype), lambda tokens: model(tokens)
    theirs = hf_twin(model).eval().to(dtype=dtype)
    return model.to(dtype), lambda tokens: theirs(tokens, use_cache=False).logits


def read_rows(every: int) -> list[bytes]:
    """Return the JSON lines of the validation set, every n-th of them."""
    import lzma

    from eval.hellaswag import VALIDATION

    return lzma.decompress(VALIDATION.read_bytes()).splitlines()[::every]


def our_losses(model: GPT, lines: list[bytes], path: Path) -> Tensor:
    """Return the summed loss of each ending, (n, 4), by eval/; the rows go through a file."""
    from eval.hellaswag import load_examples
    from eval.packing import crop_contexts, sum_ending_losses
    from eval.session import Session
    from training.ranks import Ranks

    path.write_bytes(b"\n".join(lines) + b"\n")
    examples = crop_contexts(load_examples(path), model.config.block_size)
    session = Session(model, model.config, next(model.parameters()).device, Ranks())
    return sum_ending_losses(session, examples)


def compare(theirs: Tensor, ours: Tensor, lines: list[bytes], path: Path) -> dict[str, Any]:
    """Count the predictions that differ, and those that differ where the reference is clear."""
    import torch

    from eval.hellaswag import load_examples, score

    path.write_bytes(b"\n".join(lines) + b"\n")
    examples = load_examples(path)
    lengths = torch.tensor([[len(ending) for ending in e.endings] for e in examples])
    result: dict[str, Any] = {"rows": len(lines)}
    result["largest_difference_of_a_sum"] = (theirs - ours).abs().max().item()
    for name, a, b in (("acc", theirs, ours), ("acc_norm", theirs / lengths, ours / lengths)):
        best = a.topk(2, dim=1, largest=False).values  # (n, 2)
        differ = a.argmin(1) != b.argmin(1)
        clear = best[:, 1] - best[:, 0] > CLOSE
        result[name] = {
            "reference": score(theirs, examples)[name],
            "ours": score(ours, examples)[name],
            "predictions_differ": int(differ.sum()),
            "differ_where_clear": int((differ & clear).sum()),
            "unclear": int((~clear).sum()),
        }
    return result


def compare_rows(args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Run both sides, equality only; the reference is written down chunk by chunk."""
    import torch

    model, theirs = build_models(args)
    lines = read_rows(args.every)
    started = time.perf_counter()
    ours = our_losses(model, lines, scratch)
    ours_s = time.perf_counter() - started
    kind = f"{args.model}.{args.dtype}.{args.reference}"
    written = args.out.with_suffix(f".{kind}.{args.every}.json")
    rows = []
    reference_s = 0.0
    if written.exists():
        rows, reference_s = json.loads(written.read_text(encoding="utf-8"))
    while len(rows) < len(lines):
        started = time.perf_counter()
        rows += reference_losses(theirs, lines[len(rows) : len(rows) + CHUNK]).tolist()
        reference_s += time.perf_counter() - started
        written.write_text(json.dumps([rows, reference_s]), encoding="utf-8")
        print(f"{len(rows)} rows: {reference_s:.0f} s, ours {ours_s:.0f} s", file=sys.stderr)
    losses = torch.tensor(rows, dtype=torch.float64)
    return compare(losses, ours, lines, scratch) | {"reference_s": reference_s, "ours_s": ours_s}


def compare_in_turns(args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Time both sides in turns on the small set, end to end from JSON lines to losses."""
    model, theirs = build_models(args)
    lines = read_rows(EVERY)
    sides = {
        "reference": lambda: reference_losses(theirs, lines),
        "ours": lambda: our_losses(model, lines, scratch),
    }
    losses = {name: side() for name, side in sides.items()}  # warm-up
    times: dict[str, list[float]] = {name: [] for name in sides}
    for name in in_turns(list(sides), args.blocks):
        started = time.perf_counter()
        sides[name]()
        times[name].append(time.perf_counter() - started)
    equality = compare(losses["reference"], losses["ours"], lines, scratch)
    ratio = asdict(paired_ratio(times["reference"], times["ours"]))
    return equality | {"times_faster": ratio, "times_s": times, "peak_mib": peaks(args)}


def peaks(args: argparse.Namespace) -> dict[str, int]:
    """Return the peak memory in MiB of each side, above what it held before, a process each."""
    found = {}
    for side in ("reference", "ours"):
        kind = flags(model=args.model, dtype=args.dtype, reference=args.reference, out=args.out)
        command = [sys.executable, __file__, "--side", side, *kind]
        done = subprocess.run(command, capture_output=True, text=True, check=True, encoding="utf-8")
        found[side] = int(done.stdout)
    return found


def run_side(args: argparse.Namespace, scratch: Path) -> None:
    """Run one side and print how far this process's memory rose meanwhile, in MiB."""
    import torch

    model, theirs = build_models(args)
    lines = read_rows(EVERY)
    before = memory_mib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # Linux: resets the peak
    if args.side == "reference":
        reference_losses(theirs, lines)
    else:
        our_losses(model, lines, scratch)
    rise = memory_mib("VmHWM") - before
    if torch.cuda.is_available():
        rise = torch.cuda.max_memory_allocated() / 2**20
    print(round(rise))


def main() -> None:
    parser = OneLineParser(description=__doc__)
    parser.add_argument("--model", default="30m", help="30m or a preset (default: 30m)")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="(default: fp32)")
    whose_help = "whose network (default: hf)"
    parser.add_argument("--reference", choices=("hf", "own"), default="hf", help=whose_help)
    parser.add_argument("--blocks", type=int, default=7, help="pairs of timings (default: 7)")
    every_help = "compare predictions only, of every n-th row; 1: all; resumable"
    parser.add_argument("--every", type=int, help=every_help)
    parser.add_argument("--side", choices=("reference", "ours"), help="in this process")
    parser.add_argument("--out", type=Path, required=True, help="JSON file; results are added")
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    scratch = args.out.with_suffix(".rows.jsonl")
    if args.side:
        run_side(args, scratch)
        return
    import torch

    result = compare_rows(args, scratch) if args.every else compare_in_turns(args, scratch)
    result |= {"model": args.model, "dtype": args.dtype, "machine": describe_machine()}
    result |= {"torch": torch.__version__, "threads": torch.get_num_threads()}
    results = load_json(args.out)
    what = "equality" if args.every else "times"
    results[f"{what}: {args.model} {args.dtype} {args.reference} {result['rows']} rows"] = result
    save_json(args.out, results)
    print(json.dumps({k: v for k, v in result.items() if k != "times_s"}), file=sys.stderr)


if __name__ == "__main__":
    main()
