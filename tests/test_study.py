"""extras/study.py: a table of methods and seeds that goes on where it was stopped."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "extras"))

import baselines
import study

import eval as evaluation
import train
from data import draw_shapes

SMALL = "--dataset shapes --width 2 --batch-size 16 --clients 3 --alpha 1 --rounds 1".split()
SCRIPTS = {
    "train": train.main,
    "eval": evaluation.main,
    "baselines": baselines.main,
}
SMALL += "--local-epochs 1 --device cpu --no-amp".split()


@pytest.fixture
def calls(monkeypatch, tmp_path):
    """The scripts run in this process, on 120 shapes; what was run is listed."""
    monkeypatch.setattr("data.draw_shapes", lambda: draw_shapes(120, 40))
    monkeypatch.chdir(tmp_path)
    listed = []

    def run(command, check):
        script, flags = Path(command[1]).stem, [str(part) for part in command[2:]]
        listed.append(script)
        SCRIPTS[script](flags)

    monkeypatch.setattr(study.subprocess, "run", run)
    return listed


def test_every_run_is_made_once_and_the_table_has_mean_and_spread(calls, capsys):
    command = ["runs", "--rows", "pd", "dsr --no-projector", "--seeds", "0", "1"]
    command += ["--evaluation", "--epochs 1 --finetune 0.5", "--", *SMALL]
    study.main(command)
    assert calls == ["train", "eval"] * 4
    assert sorted(path.name for path in Path("runs").iterdir() if path.is_dir()) == [
        "dsr-no-projector-seed0",
        "dsr-no-projector-seed1",
        "pd-seed0",
        "pd-seed1",
    ]
    printed = capsys.readouterr().out
    study.main(command)
    assert calls == ["train", "eval"] * 4  # all was there
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert rows == [line for line in printed.splitlines() if line.startswith("|")]
    assert rows[0].startswith("| | LP % | kNN %") and len(rows) == 4
    assert rows[2].startswith("| pd | ") and rows[2].endswith("| 2 |") and rows[2].count("±") >= 5
    lines = [json.loads(line) for line in Path("runs/scores.jsonl").read_text().splitlines()]
    assert [(line["row"], line["seed"]) for line in lines] == [
        ("pd", 0),
        ("pd", 1),
        ("dsr --no-projector", 0),
        ("dsr --no-projector", 1),
    ]
    assert f"| pd | {(lines[0]['linear_probe'] + lines[1]['linear_probe']) / 2:.2f} " in rows[2]
    study.main([*command, "--rounds", "2"])  # goes on with the same runs
    assert calls[8:] == ["train", "eval"] * 4


def test_scores_of_another_protocol_are_no_scores_and_runs_of_other_flags_no_runs(calls, capsys):
    command = ["runs", "--rows", "pd", "--seeds", "0", "--evaluation"]
    study.main([*command, "--epochs 1 --finetune --own-images", "--", *SMALL])
    study.main([*command, "--epochs 1 --finetune 0.1", "--", *SMALL])
    study.main([*command, "--epochs 1 --finetune --own-images", "--", *SMALL])
    assert calls == ["train", "eval", "eval"]
    table = capsys.readouterr().out.split("own data set")
    assert "FT 10 %" in table[2] and "FT 10 %" not in table[1] + table[3]
    for other, words in (
        ([flag for flag in SMALL if flag not in ("--width", "2")], "width 2, not 64"),
        ([*SMALL, "--limit", "60"], "limit None, not 60"),
    ):
        with pytest.raises(SystemExit) as stop:
            study.main([*command, "--epochs 1 --finetune", "--", *other])
        assert stop.value.code == 2 and words in capsys.readouterr().err
    assert len(calls) == 3


def test_local_has_the_clients_of_a_split_file(tmp_path):
    (tmp_path / "split.json").write_text("[[0, 1], [2, 3], [4, 5]]")
    flags = ["--split-file", str(tmp_path / "split.json")]
    runs = study.plan("local", 0, Path("runs"), flags)
    assert [folder.name for _, _, folder in runs] == ["client-0", "client-1", "client-2"]
    ((script, flags, _),) = study.plan("fedalignuniform --client 1", 0, Path("runs"), [])
    assert script == "extras/baselines.py" and flags[-4:-2] == ["--client", "1"]


def test_an_untrained_row(calls, capsys):
    flags = ["--evaluation", "--epochs 1 --finetune", "--", *SMALL]
    study.main(["runs", "--rows", "ssd --rounds 0", "--seeds", "3", *flags])
    assert calls == ["train", "eval"] and "| ssd --rounds 0 | " in capsys.readouterr().out


def test_rows_of_other_scripts_and_the_two_bounds(calls, capsys):
    rows = ["ldawa", "ssd-reverse", "local", "fedalignuniform --clients 1"]
    command = ["runs", "--rows", *rows, "--seeds", "0", "--evaluation", "--epochs 1 --finetune"]
    study.main([*command, "--", *SMALL])
    assert calls[::2] == ["baselines", "baselines", "baselines", "baselines", "eval", "train"]
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert [line.split(" | ")[0] for line in table[2:]] == [f"| {row}" for row in rows]
    own = [
        json.loads(Path(f"runs/local-seed0/client-{k}/eval.jsonl").read_text()) for k in (0, 1, 2)
    ]
    mean = sum(line["knn"] for line in own) / 3
    assert f"| {mean:.2f} | " in table[4]
    inter = table[0].split(" | ").index("inter z")  # one client has no others
    assert table[5].split(" | ")[inter] == "–" != table[4].split(" | ")[inter]


def test_the_table_by_hand():
    rows = {"a": [{"linear_probe": 40.0, "uniformity_h": -1.0}] * 1}
    rows["b"] = [{"linear_probe": x, "uniformity_h": -x} for x in (1.0, 2.0, 3.0)]
    assert study.table(rows).splitlines()[2:] == [
        "| a | 40.00 | 1.000 | 1 |",
        "| b | 2.00 ± 1.00 | 2.000 ± 1.000 | 3 |",
    ]


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--rows", "fedavg"], "fedavg"),
        (["--rows", ""], "--method"),
        (["--rows", "'ssd"], "quotation"),
        (["--evaluation", "--epochs x"], "--epochs"),
        (["--evaluation", "--dataset shapes"], "--transfer"),
        (["--evaluation=--own-images", "--transfer", "shapes"], "--own-images"),
        (["--rows", "ssd --lr 0"], "--lr"),
        (["--seeds", "x"], "'x'"),
        (["--", "--no-such-flag"], "--no-such-flag"),
    ],
)
def test_a_mistake_is_found_before_the_first_run(calls, flags, words, capsys):
    with pytest.raises(SystemExit) as stop:
        study.main(["runs", *flags])
    assert stop.value.code == 2 and words in capsys.readouterr().err and not calls
