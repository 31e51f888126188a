"""extras/walkthrough.ipynb: committed with its outputs, its words agree with them, and it runs."""

import re
from pathlib import Path

import pytest

nbclient = pytest.importorskip("nbclient", reason="the notebook needs nbclient")
nbformat = pytest.importorskip("nbformat", reason="the notebook needs nbclient")
for package in ("ipykernel", "matplotlib"):
    pytest.importorskip(package, reason=f"the notebook needs {package}")

ROOT = Path(__file__).parent.parent.parent
NOTEBOOK = ROOT / "extras" / "walkthrough.ipynb"
PICTURES = 5
ANSWER = re.compile(r"(?s)<details>.*```python\n(.*?)```\n\n```text\n(.*?)```\n\n(.*)\n\n</.*")
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
FIGURE = re.compile(r"(?<![-.\w])(?:\d+\.\d+|\d\d+)")  # a number in prose that was measured


def answers(notebook):
    """(code, what it prints, why) of every exercise."""
    found = [ANSWER.fullmatch(cell.source) for cell in notebook.cells]
    return [match.groups() for match in found if match]


def printed(cells, pictures=None):
    """All that cells printed; no error and no warning among it."""
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    if pictures is not None:
        assert sum("image/png" in output.get("data", {}) for output in outputs) == pictures
    return "".join(output.get("text", "") for output in outputs)


def rows(text, count, pattern):
    """Of every line that begins with the pattern, of which there are count, the numbers behind."""
    lines = re.findall(rf"^{pattern}(.*)$", text, re.M)
    assert len(lines) == count, pattern
    return [[float(number) for number in NUMBER.findall(line)] for line in lines]


def check(text):
    """What the notebook says in words, by the numbers that it and its answers printed."""
    assert "with stopgrad: a step lowers the own share nowhere" in text
    assert "without stopgrad: a step lowers the own share up to 9.1 %" in text
    assert "every weight and statistic equal, bit by bit: True" in text
    # Steps 4 and 5: a network leans alike whoever owns the image, and so does the average.
    table = rows(text, 6, r"(?:network|dimensions) of client \d, images of client 0, 1, 2:")
    assert min(map(min, table[:3])) > 60 and all(max(row) - min(row) <= 5 for row in table)
    for name, low, high in (("FedAlignUniform", 20, 50), ("DSR", 55, 100), ("SSD", 55, 100)):
        (own,) = rows(text, 1, f"{name}: own share of the networks ")
        (of_h,) = rows(text, 1, f"{name}: own share of h .*mean ")
        (lean,) = rows(text, 1, f"{name}: the average's share .*0, 1, 2: ")
        assert low < min(own) and max(own) < high and 20 < of_h[0] < 50
        assert low == 20 or lean[1] > lean[0] > lean[2]
    parts = ("nothing", "encoder", "all but the last layer", "last layer alone", "everything")
    swapped = [rows(text, 1, rf"{part} (?=\d)")[0] for part in parts]
    assert swapped == sorted(swapped)
    for row in rows(text, 2, "SSD, (?:by images|all the same): law "):
        assert row[1] > row[0] > row[2] and row[4] > row[3] > row[5] and row[6] < 9
    for own, same, average in rows(text, 3, ".*: own networks "):
        assert abs(own - same) < 0.3 and average < same - 0.3
    assert all(after > before for before, _, after in rows(text, 2, ".*: kNN untrained "))
    untrained, *trained = rows(text, 3, ".*: squared distance of two views of one image ")
    assert all(row[0] > untrained[0] and row[1] > 1.5 > untrained[1] for row in trained)
    spread, *collapsed = rows(text, 3, r"beta \d, gamma \d: ")
    assert all(row[0] < spread[0] and row[1] < spread[1] / 2 for row in collapsed)
    without, both, into_u = rows(text, 3, "delta [^:]*: ")
    assert both[1] > max(without[1], into_u[1]) + 5 and without[0] > both[0] > into_u[0]
    strong, *weak = rows(text, 3, "gamma .*: own share ")
    assert all(row[0] < strong[0] - 15 for row in weak)


def test_committed_whole():
    notebook = nbformat.read(NOTEBOOK, 4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert max(len(cell.source.splitlines()) for cell in cells) <= 25
    assert NOTEBOOK.stat().st_size < 1_000_000
    assert not re.search(r"/(root|home|work|tmp)/", NOTEBOOK.read_text())
    images = re.findall(r"!\[.*?\]\((.*?)\)", notebook.cells[0].source)
    assert images and all((NOTEBOOK.parent / path).exists() for path in images)
    assert (ROOT / "extras" / "one_page.py").read_text() in printed(cells[-1:])
    check(printed(cells, PICTURES) + "".join(text for _, text, _ in answers(notebook)))


def test_every_measured_number_is_printed_beside_it():
    notebook = nbformat.read(NOTEBOOK, 4)
    beside = [(why, text + code) for code, text, why in answers(notebook)]
    assert 6 <= len(beside) <= 8
    for i, cell in enumerate(notebook.cells):
        for paragraph in cell.source.split("\n\n"):
            if paragraph.startswith("**Measured:**"):
                beside.append((paragraph, printed([notebook.cells[i - 1]])))
    assert len(beside) > 16
    for prose, shown in beside:
        numbers = FIGURE.findall(re.sub(r"\$.*?\$", "", prose))  # formulas left out
        assert set(numbers) <= set(NUMBER.findall(shown)), prose


@pytest.mark.parametrize("folder", [ROOT / "extras", ROOT], ids=["extras", "root"])
def test_runs_in_both_folders(folder):
    """Whole in extras/, with the answers; in the root as far as the first picture."""
    notebook = nbformat.read(NOTEBOOK, 4)
    kept = answers(notebook)
    if folder == ROOT:
        kept, notebook.cells = [], notebook.cells[:7]
    solved = [nbformat.v4.new_code_cell(code) for code, _, _ in kept]
    notebook.cells += solved
    place = {"metadata": {"path": folder}}
    nbclient.NotebookClient(notebook, timeout=1800, resources=place).execute()
    text = printed(notebook.cells, PICTURES if folder != ROOT else 1)
    if folder != ROOT:
        check(text)
    for cell, (_, text, _) in zip(solved, kept, strict=True):
        words = [NUMBER.sub("#", shown).split() for shown in (printed([cell]), text)]
        assert words[0] == words[1]  # the same, but for the numbers
