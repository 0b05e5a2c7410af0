"""The notebook, run cell by cell in a kernel of its own, without a network."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from checkpoint.hf_folder import save_hf_folder
from model import GPT, PRESETS

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"


def test_every_cell_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, folder = PRESETS["debug"].config, tmp_path / "hf"
    save_hf_folder(folder, config, GPT(config).named_parameters())
    for name, value in {"CKPT": folder, "HF_HUB_OFFLINE": 1, "MPLBACKEND": "agg"}.items():
        monkeypatch.setenv(name, str(value))
    notebook = nbformat.read(NOTEBOOKS / "play.ipynb", as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells)  # none is committed
    NotebookClient(
        notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": NOTEBOOKS}}
    ).execute()
    printed = "".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", [])
    )
    assert printed.count("> My fellow citizens,") == 6  # three of either way
    pictures = [o for c in notebook.cells for o in c.get("outputs", []) if "image/png" in str(o)]
    assert pictures
