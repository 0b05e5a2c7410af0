"""Train, save, export, evaluate and resume with weights on NVMe, on one rank and on two.

    python bench/fidelity/nvme.py --folder runs/nvme

What bench/fidelity/keys.py checks of a key is checked of each offload. Besides, the run must log
and export the same bits as one whose offload is to the machine's memory. First DeepSpeed's async_io
and its Adam for the CPU are compiled, which takes minutes. A case that the JSON holds is not run
again.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

if not __package__:  # run as a file: import from the repository root, exactly as train.py does
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from bench.fidelity import keys
from bench.record import run_cases
from command_line import OneLineParser

BUILD = """
from deepspeed.ops.op_builder.cpu import AsyncIOBuilder, CPUAdamBuilder
CPUAdamBuilder().load()
AsyncIOBuilder().load()
"""
BUILD_TIMEOUT_S = 1800
# Several weights of this model are large enough for NVMe; most begin at no multiple of 512 bytes.
CONFIG = (2, 2, 366, 64)
ON_NVME = {"device": "nvme", "max_in_cpu": 0, "buffer_size": 20_000_000, "buffer_count": 8}
AIO = {
    "block_size": 262_144,
    "queue_depth": 4,
    "intra_op_parallelism": 2,
    "single_submit": True,
    "overlap_events": False,
}


class Case(NamedTuple):
    """One offload of the weights to NVMe.

    Args:
        precision: As for bench/fidelity/keys.py.
        n_ranks: Processes.
        optimizer: offload_optimizer.device.
        param: Keys of offload_param besides ON_NVME.
        aio: The block of that name.
    """

    precision: str
    n_ranks: int
    optimizer: str = "cpu"
    param: Mapping[str, int] = {}
    aio: Mapping[str, int] = {}


CASES = {
    "bf16, 1 rank": Case("bf16", 1),
    "bf16, 2 ranks": Case("bf16", 2),
    "fp32, 1 rank": Case("fp32", 1),
    "fp32, 2 ranks": Case("fp32", 2),
    "bf16, 2 ranks, optimizer on the device": Case("bf16", 2, "none"),
    "fp32, 1 rank, optimizer on the device": Case("fp32", 1, "none"),
    "bf16, 1 rank, some weights in memory": Case("bf16", 1, param={"max_in_cpu": 19_000_000}),
    "bf16, 1 rank, all keys of aio": Case("bf16", 1, aio=AIO),
}


def write_ds_config(folder: Path, case: Case, *, on_nvme: bool) -> Path:
    """Write the ds_config of a case, or of its offload to the machine's memory."""
    path = keys.write_ds_config(folder, 3, case.precision)
    ds_config = json.loads(path.read_text(encoding="utf-8"))
    nvme_path = folder / "nvme"
    nvme_path.mkdir(exist_ok=True)
    param: dict[str, Any] = {"device": "cpu"}
    if on_nvme:
        param = {**ON_NVME, "nvme_path": str(nvme_path), **case.param}
        ds_config["aio"] = dict(case.aio)
    # A sub-group for each large weight: it is written back by its own.
    blocks = {"offload_param": param, "offload_optimizer": {"device": case.optimizer}}
    ds_config["zero_optimization"] |= {"sub_group_size": 500_000, **blocks}
    path = folder / "with_offload.json"
    path.write_text(json.dumps(ds_config), encoding="utf-8")
    return path


def try_case(folder: Path, case: Case) -> dict[str, Any]:
    """Compare an offload to NVMe with stage 0 and with the same offload to memory."""
    from bench.fidelity.compare import read_rows

    twin = folder / "twin"
    shutil.rmtree(twin, ignore_errors=True)
    ds_config = write_ds_config(folder, case, on_nvme=False)
    keys.train(keys.arguments(folder, twin, ds_config), case.n_ranks, folder / "log")
    shutil.rmtree(folder / "nvme", ignore_errors=True)
    ds_config = write_ds_config(folder, case, on_nvme=True)
    result = keys.try_ds_config(folder, case.precision, ds_config, case.n_ranks)
    whole = folder / "cell" / "whole"
    equalities = {key: value for key, value in result.items() if type(value) is bool}
    near_stage_0 = equalities.pop("ok")
    equalities |= {
        "weights were on NVMe": any((folder / "nvme").rglob("*.swp")),
        "same rows as in memory": read_rows(whole) == read_rows(twin),
        "same export as in memory": exported(whole) == exported(twin),
    }
    # In bf16 this model rounds to more than the tolerance, with its offload in memory as well.
    is_near = near_stage_0 or case.precision == "bf16"
    return result | equalities | {"ok": is_near and all(equalities.values())}


def exported(run_dir: Path) -> list[bytes]:
    """Return the bytes of the exported weights."""
    return [path.read_bytes() for path in sorted(run_dir.glob("consolidated/*/*.safetensors"))]


def main() -> int:
    """Run the command line; status 1 if something differs."""
    parser = OneLineParser(description=__doc__)
    parser.add_argument("--cases", nargs="+", help="names of some, as the JSON has them")
    parser.add_argument("--folder", type=Path, required=True, help="for runs and nvme.json")
    parser.add_argument("--out", type=Path, help="JSON (default: FOLDER/nvme.json)")
    args = parser.parse_args()
    subprocess.run([sys.executable, "-c", BUILD], check=True, timeout=BUILD_TIMEOUT_S)
    keys.prepare(args.folder)
    from dataclasses import replace

    from model import GPTConfig
    from model.presets import PRESETS

    PRESETS[keys.MODEL] = replace(PRESETS[keys.MODEL], config=GPTConfig(*CONFIG))

    def run_case(name: str) -> dict[str, Any]:
        try:
            return try_case(args.folder, CASES[name])
        except (RuntimeError, ValueError) as error:
            return {"problem": str(error), "ok": False}

    out = args.out or args.folder / "nvme.json"
    return run_cases(out, "Offload to NVMe", args.cases or CASES, run_case, keys.summary)


if __name__ == "__main__":
    sys.exit(main())
