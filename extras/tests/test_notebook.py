"""extras/walkthrough.ipynb: committed with its outputs, and it still runs as it says."""

import ast
import json
import re
from pathlib import Path

import pytest

import losses

ROOT = Path(__file__).parent.parent.parent
NOTEBOOK = ROOT / "extras" / "walkthrough.ipynb"
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
PICTURES = 7
ANSWER = re.compile(
    r"<details><summary>Answer</summary>\n\n```python\n(.*?)```\n\n```text\n(.*?)```\n\n\S.*?</details>",
    re.S,
)


def code_cells(notebook):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def outputs(cells):
    """All text printed, and the number of pictures; no error and no warning among them."""
    found = [output for cell in cells for output in cell["outputs"]]
    assert not [o for o in found if o["output_type"] == "error" or o.get("name") == "stderr"]
    text = "".join("".join(o.get("text", "")) for o in found)
    return text, sum("image/png" in o.get("data", {}) for o in found)


def answers(notebook):
    """(code, what it prints) of every exercise, from the last cell."""
    text = "".join(notebook["cells"][-1]["source"])
    found = ANSWER.findall(text)
    numbers = [int(n) for n in re.findall(r"^(\d+)\. \*\*", text, re.M)]
    assert numbers == list(range(1, len(found) + 1)) and 6 <= len(found) <= 8
    return found


def check(text):
    """What the notebook's words claim, by the numbers that it printed."""
    for name, away in (("with", 0), ("without", 4)):
        assert f"{name} stopgrad: {away} of 24 points move away from the own axis" in text
    assert "every weight and statistic equal, bit by bit: True" in text
    shares = {}
    for name, line in re.findall(r"(\w+): own share untrained 33 %, then (.*)", text):
        shares[name] = [int(share) for share in re.findall(r"(\d+) %", line)]
    assert [len(rounds) for rounds in shares.values()] == [3, 3]
    for name, line in re.findall(r"(\w+): the average's share in .*: (.*)", text):
        lean = [int(share) for share in re.findall(r"(\d+) %", line)]
        assert len(lean) == 3 and 98 <= sum(lean) <= 102
        least = min(lean[:2]) - lean[2]  # client 2 has the fewest images
        assert least > 5 if name == "SSD" else max(lean) - min(lean) < 15
    assert max(shares["FedAlignUniform"]) < 50 < 60 < min(shares["SSD"])
    rows = [[*map(int, row.split())] for row in re.findall(r"network of client \d([ \d]+)", text)]
    assert len(rows) == 3 and all(50 < share for row in rows for share in row)
    scores = re.findall(r"kNN untrained ([\d.]+) %, after 8 rounds ([\d.]+) %", text)
    assert len(scores) == 2
    assert all(float(before) < float(after) for before, after in scores)


def test_committed_whole_with_no_method_of_its_own():
    notebook = json.loads(NOTEBOOK.read_text())
    cells = code_cells(notebook)
    assert NOTEBOOK.stat().st_size < 1_000_000 and notebook["metadata"] == METADATA
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    sources = ["".join(cell["source"]) for cell in cells]
    imports, source = len(sources[0].splitlines()), "\n".join(sources)
    assert imports <= 42 and not re.search(r"^(import|from) ", source[len(sources[0]) :], re.M)
    assert not re.search(r"argparse|parser|config", source)
    nodes = list(ast.walk(ast.parse(source)))
    assert not [node for node in nodes if isinstance(node, (ast.ClassDef, ast.Lambda))]
    made = {node.name: node for node in nodes if isinstance(node, ast.FunctionDef)}
    assert made.keys() == {"local_loss", "own_share"}
    for node in made.values():  # a docstring and at most three lines, none of them a loop
        assert len(node.body) <= 4
        assert not [part for part in ast.walk(node) if isinstance(part, (ast.For, ast.While))]
    called = {
        node.func.id for node in nodes if isinstance(node, ast.Call) and "id" in vars(node.func)
    }
    assert {name for name in vars(losses) if name.endswith("_loss")} <= called
    text, pictures = outputs(cells)
    assert pictures == PICTURES
    check(text)
    assert answers(notebook)


@pytest.mark.parametrize("folder", [ROOT / "extras", ROOT], ids=["extras", "root"])
def test_runs_in_both_folders(folder):
    """Whole in extras/, with the answers; in the root as far as the first picture."""
    for package in ("nbclient", "ipykernel", "matplotlib"):
        pytest.importorskip(package, reason=f"the notebook needs {package}")
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(NOTEBOOK, 4)
    solved, cells = answers(notebook), len(notebook.cells)
    if folder == ROOT:
        solved, cells = (
            [],
            1 + next(i for i, cell in enumerate(notebook.cells) if "= two_views(" in cell.source),
        )
    notebook.cells = notebook.cells[:cells]
    notebook.cells += [nbformat.v4.new_code_cell(code) for code, _ in solved]
    for cell in code_cells(notebook):
        cell.outputs = []
    NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": folder}}).execute()
    text, pictures = outputs(code_cells({"cells": notebook.cells[:cells]}))
    assert pictures == (1 if folder == ROOT else PICTURES)
    if folder != ROOT:
        check(text)
    for cell, (_, printed) in zip(notebook.cells[cells:], solved, strict=True):
        words, kept = (re.sub(r"[-+\d. ]+", "#", text) for text in (outputs([cell])[0], printed))
        assert words.strip("#\n") == kept.strip("#\n")  # the same, but for the numbers
