"""The notebooks of `examples/` run from top to bottom, and are committed without outputs."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a kernel that is this Python, registered in a temporary folder."""
    folder = tmp_path / "jupyter" / "kernels" / "this-python"
    folder.mkdir(parents=True)
    arguments = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (folder / "kernel.json").write_text(json.dumps({"argv": arguments, "display_name": "this", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return folder.name


def outputs(name: str, kernel: str, folder: Path) -> str:
    """Run a notebook in `folder`, and return the plain text of all its outputs."""
    notebook: Any = nbformat.read(EXAMPLES / f"{name}.ipynb", as_version=4)
    NotebookClient(notebook, kernel_name=kernel, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
    printed = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not [output for output in printed if output.get("output_type") == "error"]
    return "\n".join(output.get("text") or output.get("data", {}).get("text/plain", "") for output in printed)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.ipynb")), ids=lambda path: path.stem)
def test_no_outputs_are_committed(path: Path) -> None:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert code
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)


@pytest.mark.full
def test_demo(finished_run: Path, cohort: Path, kernel: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CTX_RUN", str(finished_run))
    monkeypatch.setenv("CTX_DATA", str(cohort))
    text = outputs("demo", kernel, tmp_path)
    assert "zero-shot macro AUROC, CT test" in text
    assert "Prediction(CT" in text
    assert "axial slice" in text
    assert "PIL.Image" in text


@pytest.mark.full
def test_your_own_scans(
    finished_run: Path, cohort: Path, kernel: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CTX_RUN", str(finished_run))
    monkeypatch.setenv("CTX_SCANS", str(cohort / "ct"))
    monkeypatch.setenv("CTX_OUT", str(tmp_path / "own"))
    assert "Prediction(CT" in outputs("your_own_scans", kernel, tmp_path)
    table = pd.read_csv(tmp_path / "own" / "predictions" / "probabilities.csv")
    assert len(table) == 8
    assert set(table["status"]) == {"read"}
