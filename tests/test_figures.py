"""extras/figures.py: five files from run folders, and one line for every mistake."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "extras"))

import figures

import eval as evaluation
import train
from data import draw_shapes

SMALL = "--dataset shapes --width 2 --batch-size 16 --clients 3 --alpha 1 --rounds 2".split()
SMALL += "--local-epochs 1 --device cpu --no-amp".split()
NAMES = ["rounds.svg", "sphere.svg", "split.svg", "trade_off.svg", "views.png"]


@pytest.fixture
def runs(monkeypatch, tmp_path):
    """Two scored runs of one row and one of another, and a run without scores."""
    monkeypatch.setattr("data.draw_shapes", lambda: draw_shapes(120, 40))
    monkeypatch.chdir(tmp_path)
    for row, seed in (("ssd", 0), ("ssd", 1), ("pd", 0), ("dsr", 0)):
        out = f"runs/{row}-seed{seed}"
        train.main([*SMALL, "--method", row, "--seed", str(seed), "--out", out])
        if row != "dsr":
            evaluation.main([f"{out}/last.pt", "--epochs", "1", "--finetune", "--device", "cpu"])


def test_five_figures_the_same_again(runs):
    pytest.importorskip("matplotlib")
    figures.main(["runs", "--out", "one"])
    figures.main(["runs", "--out", "two"])
    assert sorted(path.name for path in Path("one").iterdir()) == NAMES
    for name in NAMES:
        assert Path("one", name).read_bytes() == Path("two", name).read_bytes()
    rounds = Path("one/rounds.svg").read_text()
    assert ">SSD (both)<" in rounds and ">+ PD<" in rounds and ">+ DSR<" not in rounds
    figures.main(["runs", "--out", "one", "--rows", "pd"])
    assert ">SSD (both)<" not in Path("one/rounds.svg").read_text()


def test_a_figure_shows_the_scores_on_the_runs_own_data_set(runs):
    run = Path("runs/ssd-seed0")
    own = figures.own_scores(run)
    with (run / "eval.jsonl").open("a") as file:
        file.write(json.dumps({**own, "dataset": "elsewhere", "uniformity_z": -9.0}) + "\n")
    assert figures.own_scores(run) == own and -8 <= own["uniformity_z"] <= 0
    assert {row: len(found) for row, found in figures.find_runs(Path("runs")).items()} == {
        "pd": 1,
        "ssd": 2,
    }


def test_mistakes_are_one_line(runs, capsys):
    pytest.importorskip("matplotlib")
    capsys.readouterr()
    Path("empty").mkdir()
    for flags, words in (
        (["nowhere"], "nowhere holds no scored runs"),
        (["empty"], "empty holds no scored runs"),
        (["runs", "--rows", "dsr"], "no row dsr in runs: it has pd, ssd"),
    ):
        with pytest.raises(SystemExit) as stop:
            figures.main([*flags, "--out", "figures"])
        err = capsys.readouterr().err
        assert stop.value.code == 2 and words in err and len(err.strip().splitlines()) == 1
    assert not Path("figures").exists()
