"""Walk the table of ds_configs/README.md: train, export, evaluate, resume with each verified key.

    python bench/fidelity/keys.py --folder runs/keys

A run of two ranks with the key is compared with one of a single rank at stage 0 without it, whose
moments no flat tensor holds: the losses, and after a resume at that layout every moment, element
for element. The resume at the same layout must have the same bits; the export and the weights that
are read from the files those of the live engine. Resumable: cells in the JSON are not run again.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from bench.fidelity.compare import Moments

ROOT = Path(__file__).resolve().parents[2]
if not __package__:  # run as a file: import from the repository root, exactly as train.py does
    sys.path[0] = str(ROOT)

NET = "a wrong map is refused"
MODEL = "keys"  # of sizes that are no multiples of an alignment
N_STEPS, SAVED_AT, TIMEOUT_S = 4, 2, 200
COLUMNS = ("b", "1", "2", "3")  # of the table, as training/ds_keys.py names them
# Largest differences: of a loss to stage 0, and of a parameter's moment, of its 2-norm.
TOLERANCES = {"fp32": (1e-5, 1e-4), "bf16": (5e-3, 0.2)}


class Cell(NamedTuple):
    """One value of a key at one stage, in one precision."""

    key: str
    value: Any
    stage: int
    precision: str

    @property
    def name(self) -> str:
        """What the JSON calls it."""
        return f"{self.key} = {json.dumps(self.value)}, stage {self.stage}, {self.precision}"


def read_table() -> dict[str, tuple[list[Any], dict[str, str]]]:
    """Return the values that each key of the table is tried with, and what it says by column."""
    rows = {}
    for line in (ROOT / "ds_configs" / "README.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 2 + len(COLUMNS) and cells[0].startswith("`"):
            values = [json.loads(text) for text in re.findall(r"`([^`]+)`", cells[1])]
            rows[cells[0].strip("`")] = values, dict(zip(COLUMNS, cells[2:], strict=True))
    return rows


def find_cells() -> list[Cell]:
    """Return everything that the table says is verified."""
    precisions = {"b": ["bf16"], "1": ["fp32"], "2": ["bf16", "fp32"], "3": ["bf16", "fp32"]}
    return [
        Cell(key, value, int(column.replace("b", "1")), precision)
        for key, (values, states) in read_table().items()
        for value in values
        for column in COLUMNS
        if states[column] == "verified"
        for precision in precisions[column]
    ]  # fmt: skip


def write_ds_config(
    folder: Path, stage: int, precision: str, key: str = "", value: Any = 0
) -> Path:
    """Write the shipped ds_config of a stage in a precision, with a key of zero_optimization."""
    from bench.fidelity import parity

    path = parity.write_ds_config(folder, stage, precision)
    if key:
        ds_config = json.loads(path.read_text(encoding="utf-8"))
        block = ds_config["zero_optimization"]
        *outer, name = key.split(".")
        for part in outer:
            block = block.setdefault(part, {"device": "cpu"})
        block[name] = value
        path = folder / "with_key.json"
        path.write_text(json.dumps(ds_config), encoding="utf-8")
    return path


def arguments(folder: Path, run_dir: Path, ds_config: Path) -> list[str]:
    """Return the command line of a run."""
    return [
        "--model", MODEL, "--data_dir", str(folder / "data"), "--run_dir", str(run_dir),
        "--ds_config", str(ds_config), "--batch_tokens", "512", "--micro_batch_size", "2",
        "--max_steps", str(N_STEPS), "--decay_steps", "100", "--warmup_steps", "1",
        "--eval_every", str(N_STEPS), "--eval_tokens", "256", "--sample_tokens", "1",
        "--checkpoint_every", str(SAVED_AT),
    ]  # fmt: skip


def train(
    argv: list[str], n_ranks: int, log: Path, sabotage: Callable[[int], None] = lambda rank: None
) -> None:
    """Run train.py on some ranks.

    Raises:
        RuntimeError: It failed; with what it printed last.
    """
    from bench.faults.forks import Run

    log.unlink(missing_ok=True)
    run = Run(argv, n_ranks, log, sabotage)
    if run.wait(TIMEOUT_S) is None or any(run.statuses.values()):
        said = log.read_text(encoding="utf-8", errors="replace").splitlines()
        raise RuntimeError("; ".join([line for line in said if "rror" in line][-2:] or said[-2:]))


def go_back(run_dir: Path, copy: Path) -> Path:
    """Copy a run as it was at SAVED_AT."""
    shutil.copytree(run_dir, copy)
    shutil.rmtree(copy / "checkpoints" / f"step_{N_STEPS:06d}")
    shutil.rmtree(copy / "consolidated")
    return copy


def reference(folder: Path, precision: str) -> tuple[Moments, list[float]]:
    """Train one rank at stage 0 without any key; return moments at SAVED_AT, and losses."""
    from bench.fidelity.compare import keep_moments, load_moments, losses

    run_dir, moments = folder / f"reference_{precision}", folder / f"moments_{precision}.pt"
    if not moments.exists():
        shutil.rmtree(run_dir, ignore_errors=True)
        argv = arguments(folder, run_dir, write_ds_config(folder, 0, precision))
        keep = keep_moments(moments, "checkpoint.saving", "save_checkpoint", SAVED_AT)
        train(argv, 1, folder / "log", keep)
    return load_moments(moments), losses(run_dir)


def try_cell(folder: Path, cell: Cell) -> dict[str, Any]:
    """Do with a key all that verified means; return the differences, and the problem, if any."""
    from bench.fidelity.compare import (
        are_equal,
        evaluate,
        is_exported,
        keep_moments,
        largest,
        largest_difference,
        load_moments,
        losses,
        read_rows,
    )

    moments, expected = reference(folder, cell.precision)
    here = folder / "cell"
    shutil.rmtree(here, ignore_errors=True)
    here.mkdir()
    ds_config = write_ds_config(folder, cell.stage, cell.precision, cell.key, cell.value)
    whole, log = here / "whole", here / "log"
    keep = keep_moments(here / "saved.pt", "checkpoint.saving", "save_checkpoint", SAVED_AT)
    train(arguments(folder, whole, ds_config), 2, log, keep)
    same = go_back(whole, here / "same")
    train(arguments(folder, same, ds_config), 2, log)
    other = go_back(whole, here / "other")
    plain = write_ds_config(folder, 0, cell.precision)
    keep = keep_moments(here / "loaded.pt", "checkpoint.resuming", "load_checkpoint", SAVED_AT)
    train(arguments(folder, other, plain), 1, log, keep)
    loaded = load_moments(here / "loaded.pt")
    found = {
        "loss": largest(losses(whole), expected),
        "loss of the resumed": largest(losses(other), expected),
        "moment": largest_difference(loaded, moments),
        "evaluation": abs(evaluate(folder, whole) - losses(whole)[-1]),
        "same bits": read_rows(same) == read_rows(whole),
        "same moments": are_equal(loaded, load_moments(here / "saved.pt")),
        "same export": is_exported(whole),
    }
    most, most_of_moments = TOLERANCES[cell.precision]
    ok = all(found[name] for name in ("same bits", "same moments", "same export"))
    ok = ok and found["moment"] <= most_of_moments
    ok = ok and all(found[k] <= most for k in ("loss", "loss of the resumed", "evaluation"))
    return found | {"ok": ok}


def try_net(folder: Path) -> dict[str, Any]:
    """Take a mend of DeepSpeed's map out: whoever reads weights by the wrong one must refuse."""
    from checkpoint.manifest import newest_step
    from checkpoint.reader import load_model

    here = folder / "cell"
    shutil.rmtree(here, ignore_errors=True)
    here.mkdir()
    run_dir, log, said = here / "run", here / "log", []
    ds_config = write_ds_config(folder, 2, "bf16", "round_robin_gradients", True)
    plain = write_ds_config(folder, 1, "bf16")
    for config, n_ranks in ((ds_config, 2), (plain, 1)):
        try:
            train(arguments(folder, run_dir, config), n_ranks, log, without_mend)
        except RuntimeError as error:
            said.append(str(error))
    try:
        load_model(str(newest_step(run_dir)))
    except ValueError as error:
        said.append(str(error))
    exported = list((run_dir / "consolidated").iterdir())
    ok = len(said) == 3 and not exported
    ok = ok and all("is not the weight that was trained" in line for line in said)
    return {"problem": "; ".join(said), "ok": ok}


def without_mend(rank: int) -> None:
    """Leave DeepSpeed's map from weights to flat tensors as it is."""
    import training.deepspeed_fixes as fixes

    fixes.link_in_round_robin_order = lambda optimizer: None


def prepare(folder: Path) -> None:
    """Write data to train on, and make the model known to this process and its forks."""
    from bench.faults.forks import import_everything

    import_everything()  # before PyTorch starts a thread, which no fork would have
    from dataclasses import replace

    from bench.speed.train_step import write_tokens
    from model import GPTConfig
    from model.presets import PRESETS

    PRESETS[MODEL] = replace(PRESETS["debug"], config=GPTConfig(2, 2, 50, 64))
    (folder / "data").mkdir(parents=True, exist_ok=True)
    write_tokens(folder / "data")


def main() -> int:
    """Run the command line; status 1 if a key is not as the table says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cells", nargs="+", help="names of some, as the JSON has them")
    parser.add_argument("--folder", type=Path, required=True, help="for runs and keys.json")
    parser.add_argument("--out", type=Path, help="JSON (default: FOLDER/keys.json)")
    args = parser.parse_args()
    from bench.record import record

    cells = {cell.name: cell for cell in find_cells()}
    prepare(args.folder)
    out, title = args.out or args.folder / "keys.json", "Keys of zero_optimization"
    results = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
    done: dict[str, Any] = results.get(title, {}).get("values", {})
    for name in args.cells or [*cells, NET]:
        if name not in done:
            try:
                done[name] = (
                    try_net(args.folder) if name == NET else try_cell(args.folder, cells[name])
                )
            except (RuntimeError, ValueError) as error:
                done[name] = {"problem": str(error), "ok": False}
            print(name, done[name], file=sys.stderr, flush=True)
            record(out, title, summary(done), done, quiet=True)
    record(out, title, summary(done), done)
    return 0 if all(result["ok"] for result in done.values()) else 1


def summary(done: dict[str, Any]) -> list[dict[str, str]]:
    """Return the table."""
    rows = []
    for name, result in done.items():
        found = [f"{k} {v:.1e}" for k, v in result.items() if type(v) is float]
        rows.append({"key": name, "ok": str(result["ok"]),
                     "largest differences": result.get("problem") or ", ".join(found)})  # fmt: skip
    return rows


if __name__ == "__main__":
    sys.exit(main())
