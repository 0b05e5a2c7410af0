"""Try each verified key of the table in ds_configs/README.md: train, export, evaluate, resume.

    python bench/fidelity/keys.py --folder runs/keys

A run of two ranks with the key is compared with one of a single rank at stage 0 without it, whose
moments are in no flat tensor: their losses, and, after a resume at the layout of the latter, every
element of every moment. A resume at the same layout must have the same bits. The export and the
weights that are read from the files must be those of the live engine. A cell that the JSON holds is
not run again.
"""

from __future__ import annotations

import itertools
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from bench.fidelity.compare import Moments

if not __package__:  # run as a file: import from the repository root, exactly as train.py does
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from bench.processes import flags
from bench.record import Results, Rows, run_cases
from command_line import OneLineParser

ROOT = Path(__file__).resolve().parents[2]
WRONG_MAP = "a wrong map is refused"
MODEL = "keys"  # its sizes are not multiples of an alignment
N_STEPS = 4
SAVED_AT = 2
TIMEOUT_S = 200  # of one run
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
    cells = []
    for key, (values, states) in read_table().items():
        for value, column in itertools.product(values, COLUMNS):
            stage = 1 if column == "b" else int(column)
            if states[column] == "verified":
                cells += [Cell(key, value, stage, precision) for precision in precisions[column]]
    return cells


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
    return flags(
        model=MODEL,
        data_dir=folder / "data",
        run_dir=run_dir,
        ds_config=ds_config,
        batch_tokens=512,
        micro_batch_size=2,
        max_steps=N_STEPS,
        decay_steps=100,
        warmup_steps=1,
        eval_every=N_STEPS,
        eval_tokens=256,
        sample_tokens=1,
        checkpoint_every=SAVED_AT,
    )


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
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        errors = [line for line in lines if "rror" in line]  # Error or error
        raise RuntimeError("; ".join(errors[-2:] or lines[-2:]))


def go_back(run_dir: Path, copy: Path) -> Path:
    """Copy a run as it was at SAVED_AT."""
    shutil.copytree(run_dir, copy)
    shutil.rmtree(copy / "checkpoints" / f"step_{N_STEPS:06d}")
    shutil.rmtree(copy / "consolidated")
    return copy


def reference(folder: Path, precision: str) -> tuple[Moments, list[float]]:
    """Train one rank at stage 0 without any key; return moments at SAVED_AT, and losses."""
    from bench.fidelity.compare import keep_moments, load_moments, losses

    run_dir = folder / f"reference_{precision}"
    moments = folder / f"moments_{precision}.pt"
    if not moments.exists():
        shutil.rmtree(run_dir, ignore_errors=True)
        argv = arguments(folder, run_dir, write_ds_config(folder, 0, precision))
        keep = keep_moments(moments, "checkpoint.saving", "save_checkpoint", SAVED_AT)
        train(argv, 1, folder / "log", keep)
    return load_moments(moments), losses(run_dir)


def new_folder(folder: Path) -> Path:
    """Return an empty folder for the runs of one cell."""
    cell_folder = folder / "cell"
    shutil.rmtree(cell_folder, ignore_errors=True)
    cell_folder.mkdir()
    return cell_folder


def try_ds_config(folder: Path, precision: str, ds_config: Path, n_ranks: int) -> dict[str, Any]:
    """Do all that verified means; return the differences, and whether they are small."""
    from bench.fidelity.compare import (
        are_equal,
        is_exported,
        keep_moments,
        largest_moment_difference,
        load_moments,
        losses,
        read_rows,
        validation_loss,
    )
    from bench.fidelity.parity import largest_difference

    moments, expected = reference(folder, precision)
    cell_folder = new_folder(folder)
    log = cell_folder / "log"
    whole = cell_folder / "whole"
    keep = keep_moments(cell_folder / "saved.pt", "checkpoint.saving", "save_checkpoint", SAVED_AT)
    train(arguments(folder, whole, ds_config), n_ranks, log, keep)

    same = go_back(whole, cell_folder / "same")
    train(arguments(folder, same, ds_config), n_ranks, log)

    other = go_back(whole, cell_folder / "other")
    plain = write_ds_config(folder, 0, precision)
    path = cell_folder / "loaded.pt"
    keep = keep_moments(path, "checkpoint.resuming", "load_checkpoint", SAVED_AT)
    train(arguments(folder, other, plain), 1, log, keep)
    loaded = load_moments(path)

    differences = {
        "loss": largest_difference(losses(whole), expected),
        "loss of the resumed": largest_difference(losses(other), expected),
        "moment": largest_moment_difference(loaded, moments),
        "evaluation": abs(validation_loss(folder, whole) - losses(whole)[-1]),
    }
    equalities = {
        "same bits": read_rows(same) == read_rows(whole),
        "same moments": are_equal(loaded, load_moments(cell_folder / "saved.pt")),
        "same export": is_exported(whole),
    }
    of_loss, of_moment = TOLERANCES[precision]
    tolerances = dict.fromkeys(differences, of_loss) | {"moment": of_moment}
    are_small = all(differences[name] <= tolerances[name] for name in differences)
    return differences | equalities | {"ok": are_small and all(equalities.values())}


def try_wrong_map(folder: Path) -> dict[str, Any]:
    """Undo a fix of DeepSpeed's map: whoever reads weights by the wrong map must refuse them."""
    from checkpoint.manifest import newest_step
    from checkpoint.reader import load_model

    cell_folder = new_folder(folder)
    run_dir, log = cell_folder / "run", cell_folder / "log"
    saved_with = write_ds_config(folder, 2, "bf16", "round_robin_gradients", True)
    resumed_with = write_ds_config(folder, 1, "bf16")
    errors = []
    for ds_config, n_ranks in ((saved_with, 2), (resumed_with, 1)):
        try:
            train(arguments(folder, run_dir, ds_config), n_ranks, log, without_fix)
        except RuntimeError as error:
            errors.append(str(error))
    try:
        load_model(str(newest_step(run_dir)))
    except ValueError as error:
        errors.append(str(error))
    is_exported = any((run_dir / "consolidated").iterdir())
    are_named = all("is not the weight that was trained" in error for error in errors)
    ok = len(errors) == 3 and are_named and not is_exported
    return {"problem": "; ".join(errors), "ok": ok}


def without_fix(rank: int) -> None:
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

    # In the global table, and only here: the forks parse the flags of train.py, where a preset is a
    # name. Nothing else runs in this process.
    PRESETS[MODEL] = replace(PRESETS["debug"], config=GPTConfig(2, 2, 50, 64))
    write_tokens(folder / "data")


def main() -> int:
    """Run the command line; status 1 if a key is not as the table says."""
    parser = OneLineParser(description=__doc__)
    parser.add_argument("--cells", nargs="+", help="names of some, as the JSON has them")
    parser.add_argument("--folder", type=Path, required=True, help="for runs and keys.json")
    parser.add_argument("--out", type=Path, help="JSON (default: FOLDER/keys.json)")
    args = parser.parse_args()
    cells = {cell.name: cell for cell in find_cells()}
    prepare(args.folder)

    def try_case(name: str) -> dict[str, Any]:
        try:
            if name == WRONG_MAP:
                return try_wrong_map(args.folder)
            cell = cells[name]
            ds_config = write_ds_config(args.folder, *cell[2:], *cell[:2])
            return try_ds_config(args.folder, cell.precision, ds_config, 2)
        except (RuntimeError, ValueError) as error:
            return {"problem": str(error), "ok": False}

    out = args.out or args.folder / "keys.json"
    names = args.cells or [*cells, WRONG_MAP]
    return run_cases(out, "Keys of zero_optimization", names, try_case, summary)


def summary(done: Results) -> Rows:
    """Return the table."""
    rows = []
    for name, result in done.items():
        differences = [f"{k} {v:.1e}" for k, v in result.items() if type(v) is float]
        largest = result.get("problem") or ", ".join(differences)
        rows.append({"key": name, "ok": str(result["ok"]), "largest differences": largest})
    return rows


if __name__ == "__main__":
    sys.exit(main())
