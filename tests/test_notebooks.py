"""The notebooks of the docs run from top to bottom, and are kept without what they gave."""

import copy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "docs").rglob("*.ipynb"))

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")
pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.filterwarnings("ignore")  # of the kernel's libraries, not of ours


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def executed(notebook: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A copy that was run in a kernel of its own, in an empty folder, with this source."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("IPYTHONDIR", str(folder))
    client = nbclient.NotebookClient(
        copy.deepcopy(notebook), timeout=600, resources={"metadata": {"path": str(folder)}}
    )
    return client.execute()


def test_there_is_one() -> None:
    assert [path.name for path in NOTEBOOKS] == ["digits.ipynb"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = [cell for cell in executed(read(path), tmp_path, monkeypatch).cells if cell.cell_type == "code"]
    shown = [output.data for cell in cells for output in cell.outputs if "data" in output]
    tables = [data["text/html"] for data in shown if "text/html" in data]
    assert len(tables) >= 3, "report, sensitivity, acceleration"
    assert any("linear-gradient" in table for table in tables), "bars"
    text = "\n".join(data.get("text/plain", "") for data in shown)
    for said in ("dense: 9", "calibrated: 9", "from the file: 9", "times as fast"):
        assert said in text


def test_control_a_wrong_cell_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("import fxprune\nfxprune.fly")])
    with pytest.raises(nbclient.exceptions.CellExecutionError, match="fly"):
        executed(notebook, tmp_path, monkeypatch)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_is_kept_without_its_outputs(path: Path) -> None:
    for cell in read(path).cells:
        assert cell.get("outputs", []) == []
        assert cell.get("execution_count") is None
