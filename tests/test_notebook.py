"""extras/walkthrough.ipynb: committed with its outputs, and it still runs as it says."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "extras" / "walkthrough.ipynb"
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def code_cells(notebook):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def outputs(notebook):
    """All text printed, and the number of pictures; no error and no warning among them."""
    found = [output for cell in code_cells(notebook) for output in cell["outputs"]]
    assert not [o for o in found if o["output_type"] == "error" or o.get("name") == "stderr"]
    text = "".join("".join(o.get("text", "")) for o in found)
    return text, sum("image/png" in o.get("data", {}) for o in found)


def test_committed_whole_with_no_method_of_its_own():
    notebook = json.loads(NOTEBOOK.read_text())
    cells = code_cells(notebook)
    assert NOTEBOOK.stat().st_size < 1_000_000 and notebook["metadata"] == METADATA
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    source = "\n".join("".join(cell["source"]) for cell in cells)
    assert not re.search(r"^\s*(def|class) |\blambda\b", source, re.M)
    text, pictures = outputs(notebook)
    assert pictures == 6 and "bit by bit: True" in text


@pytest.mark.parametrize("folder", [ROOT / "extras", ROOT], ids=["extras", "root"])
def test_runs_in_both_folders(folder):
    """Whole in extras/, the round by hand included; in the root as far as the first picture."""
    for package in ("nbclient", "ipykernel", "matplotlib"):
        pytest.importorskip(package, reason=f"the notebook needs {package}")
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(NOTEBOOK, 4)
    first = next(i for i, cell in enumerate(notebook.cells) if "two_views(" in cell.source)
    if folder == ROOT:
        notebook.cells = notebook.cells[: first + 1]
    for cell in code_cells(notebook):
        cell.outputs = []
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": folder}}).execute()
    text, pictures = outputs(notebook)
    assert pictures == (1 if folder == ROOT else 6)
    scores = re.findall(r"kNN untrained ([\d.]+) %, after \d+ rounds ([\d.]+) %", text)
    assert len(scores) == (0 if folder == ROOT else 2)
    assert all(float(before) < float(after) for before, after in scores)
