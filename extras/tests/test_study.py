"""extras/study.py: a table of methods and seeds that goes on where it was stopped."""

import datetime
import functools
import json
import math
import subprocess
import sys
from pathlib import Path

import claims
import numpy as np
import pytest
import study
import tables
import torch

import eval as evaluation
import train
from data import draw_patterns
from losses import ssd_loss

SMALL = "--dataset patterns --width 2 --batch-size 16 --clients 3 --alpha 1 --rounds 1".split()
SMALL += "--local-epochs 1 --device cpu --no-amp".split()


@pytest.fixture
def calls(monkeypatch, tmp_path):
    """The scripts run in this process, on 120 patterns; what was run is listed."""
    monkeypatch.setattr("data.draw_patterns", lambda: draw_patterns(120, 40))
    monkeypatch.setattr(study, "SCRIPTS", dict(study.SCRIPTS))
    monkeypatch.chdir(tmp_path)
    listed, run_process = [], subprocess.run

    def run(command, **options):
        if command[0] == "git":
            return run_process(command, **options)
        script, flags = Path(command[1]), [str(part) for part in command[2:]]
        listed.append(script.stem)
        if script == study.ROOT / "mine.py":
            monkeypatch.setattr(sys, "argv", ["mine.py"])
            return train.main(flags, objective=functools.partial(ssd_loss))
        scripts = {**study.SCRIPTS, "eval.py": evaluation}
        scripts[script.relative_to(study.ROOT).as_posix()].main(flags)

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
    assert [row.split(" | ")[0][2:] for row in rows[::4]] == [
        "accuracy",
        "geometry of h",
        "geometry of z",
        "minus pd",
    ]
    assert rows[0] == "| accuracy | LP % | kNN % | s/round | n |" and len(rows) == 16
    assert rows[2].startswith("| pd | ") and rows[2].endswith("| 2 |") and rows[2].count("±") == 3
    assert rows[14].startswith("| itself | ") and rows[15].startswith("| dsr --no-projector | ")
    assert rows[15].count(" to ") == 5
    lines = tables.read("runs/scores.jsonl")
    assert [(line["row"], line["seed"]) for line in lines] == [
        ("pd", 0),
        ("dsr --no-projector", 0),
        ("pd", 1),
        ("dsr --no-projector", 1),
    ]
    metrics = list(map(json.loads, Path("runs/pd-seed1/metrics.jsonl").read_text().splitlines()))
    assert all(lines[2][f"{key}_rounds"] == [metrics[0][key]] for key in tables.CURVES)
    assert f"| pd | {(lines[0]['linear_probe'] + lines[2]['linear_probe']) / 2:.2f} " in rows[2]
    study.main([*command, "--rounds", "2"])  # goes on with the same runs
    assert calls[8:] == ["train", "eval"] * 4


def test_a_record_says_how_a_line_was_made_and_keeps_the_others(calls):
    """An own loss is a row. A second command, of other rows or rounds, adds and replaces lines."""
    command = ["runs", "--script", "mine.py", "--record", "mine.jsonl", "--seeds", "0"]
    flags = ["--evaluation", "--epochs 1 --finetune", "--", *SMALL]
    study.main([*command, "--rows", "ssd", "mine", *flags])
    study.main([*command, "--rows", "mine", "--transfer", "patterns", *flags, "--rounds", "2"])
    lines = tables.read("mine.jsonl")
    found = [(line["row"], line["transfer"], line["rounds"]) for line in lines]
    assert found == [("ssd", None, 1), ("mine", None, 2), ("mine", "patterns", 2)]
    assert [line["method"] for line in lines] == ["ssd", "mine", "mine"]
    for line in lines:
        assert line["commit"] == tables.current_commit() and line["torch"] == torch.__version__
        assert line["device"] == "cpu" and line["threads"] == torch.get_num_threads()
        assert line["date"] == datetime.date.today().isoformat() and line["knn"] > 0
    assert lines[1]["flags"].startswith("mine.py --dataset patterns --width 2")
    assert lines[0]["command"].startswith("python extras/study.py runs --script mine.py --record")
    assert lines[0]["command"] != lines[1]["command"]


def test_scores_of_another_protocol_are_no_scores_and_runs_of_other_flags_no_runs(calls, capsys):
    command = ["runs", "--rows", "pd", "--seeds", "0", "--evaluation"]
    study.main([*command, "--epochs 1 --finetune", "--", *SMALL])
    study.main([*command, "--epochs 1 --finetune 0.1", "--", *SMALL])
    study.main([*command, "--epochs 1 --finetune", "--", *SMALL])
    assert calls == ["train", "eval", "eval"]
    table = capsys.readouterr().out.split("| accuracy |")
    assert "FT 10 %" in table[2] and "FT 10 %" not in table[1] + table[3]
    for other, words in (
        ([flag for flag in SMALL if flag not in ("--width", "2")], "width 2, not 64"),
        ([*SMALL, "--limit", "60"], "limit None, not 60"),
        ([*SMALL[:6], *SMALL[8:]], "clients 3, not 10"),
        ([*SMALL, "--clients", "4"], "clients 3, not 4"),
        ([*SMALL, "--gamma", "0.2"], "gamma 0.0, not 0.2"),
        ([*SMALL, "--amp"], "amp False, not True"),
    ):
        with pytest.raises(SystemExit) as stop:
            study.main([*command, "--epochs 1 --finetune", "--", *other])
        assert stop.value.code == 2 and words in capsys.readouterr().err
    assert len(calls) == 3


def test_several_at_a_time(tmp_path, monkeypatch):
    """Real processes: scores in the order of the rows; what they print is in their files."""
    monkeypatch.chdir(tmp_path)
    rows = ["ssd --rounds 0", "pd --rounds 0"]
    command = [sys.executable, study.__file__, "runs", "--jobs", "2", "--seeds", "3"]
    flags = ["--rows", *rows, "--evaluation", "--epochs 1 --finetune", "--", *SMALL]
    done = subprocess.run([*command, *flags], capture_output=True, text=True)
    assert done.returncode == 0 and "next: python" not in done.stdout
    lines = Path("runs/scores.jsonl").read_text().splitlines()
    assert [json.loads(line)["row"] for line in lines] == rows
    assert (
        "python eval.py runs/pd-rounds-0-seed3/last.pt"
        in Path("runs/pd-rounds-0-seed3.txt").read_text()
    )
    other = ["--rows", "dsr", "hsd", "--", *SMALL, "--dataset", "nowhere"]
    failed = subprocess.run([*command, *other], capture_output=True, text=True)
    assert failed.returncode == 2 and failed.stderr == "a run has failed: runs/*.txt say why\n"
    assert "'nowhere' is neither" in Path("runs/dsr-seed3.txt").read_text()


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


def test_a_run_that_there_is_may_have_resolved_what_was_left_open(calls):
    """--amp and, with a split file, --clients are the run's to find out."""
    Path("split.json").write_text(json.dumps([list(range(60)), list(range(60, 120))]))
    open_flags = [flag for flag in SMALL if flag not in ("--clients", "3", "--no-amp")]
    flags = [*open_flags, "--method", "pd", "--split-file", "split.json"]
    study.train_one("train.py", flags, Path("run"))
    study.train_one("train.py", [*flags, "--delta", "0.1", "--gamma", "0"], Path("run"))
    study.train_one("train.py", [*flags, "--clients", "2", "--device", "auto"], Path("run"))
    assert calls == ["train"]
    study.train_one("train.py", [*flags, "--rounds", "2"], Path("run"))
    assert calls == ["train", "train"]
    with pytest.raises(ValueError, match="method pd, not dsr"):
        study.train_one(
            "train.py", [*flags, "--method", "dsr", "--gamma", "0", "--delta", "0.1"], Path("run")
        )


def test_a_row_is_trained_by_the_script_that_has_its_method():
    for module in study.SCRIPTS.values():
        for method in module.METHODS:
            ((script, _, _),) = study.plan(method, 0, Path("runs"), [])
            assert method in study.SCRIPTS[script].METHODS


def test_rows_of_other_scripts_and_the_two_bounds(calls, capsys):
    rows = ["ldawa", "local", "fedalignuniform --clients 1"]
    command = ["runs", "--rows", *rows, "--seeds", "0", "--evaluation", "--epochs 1 --finetune"]
    study.main([*command, "--", *SMALL])
    assert calls[::2] == ["baselines", "baselines", "baselines", "eval", "train"]
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert [line.split(" | ")[0] for line in table[2:5]] == [f"| {row}" for row in rows]
    own = [
        json.loads(Path(f"runs/local-seed0/client-{k}/eval.jsonl").read_text()) for k in (0, 1, 2)
    ]
    mean = sum(line["knn"] for line in own) / 3
    assert f"| {mean:.2f} | " in table[3]
    inter = table[10].split(" | ").index("inter-client z")  # one client has no others
    assert table[14].split(" | ")[inter] == "–" != table[13].split(" | ")[inter]


def scores_lines(rows, transfer=None):
    """{row: {seed: scores}} as the lines of a record."""
    return [
        {"row": row, "seed": seed, "transfer": transfer, **scores}
        for row, runs in rows.items()
        for seed, scores in runs.items()
    ]


def test_the_tables_by_hand():
    rows = {"a": {0: {"linear_probe": 40.0, "uniformity_h": -1.0}}}
    rows["b"] = {s: {"linear_probe": s + 1.0, "uniformity_h": -1.0 - s} for s in (0, 1, 2)}
    assert tables.tables(scores_lines(rows)).splitlines() == [
        "| accuracy | LP % | n |",
        "| --- | --- | --- |",
        "| a | 40.00 | 1 |",
        "| b | 2.00 ± 1.00 | 3 |",
        "",
        "| geometry of h | −L_uniform h | n |",
        "| --- | --- | --- |",
        "| a | 1.000 | 1 |",
        "| b | 2.000 ± 1.000 | 3 |",
        "",
        "| minus a | LP % | −L_uniform h | n |",
        "| --- | --- | --- | --- |",
        "| itself | 40.00 | 1.000 | 1 |",
        "| b | −39.00 | +0.000 | 1 |",
    ]


def test_paired_differences_by_hand():
    """LP: 2 - 4, 5 - 5, 9 - 10, mean -1, std 1; -L: 2 - 1, 4 - 1, 1 - 2, mean 1, std 2.

    Half the interval is 4.303 std / sqrt(3): 2.48 and 4.97.
    """
    first = {seed: {"linear_probe": 4.0 + seed, "uniformity_z": -1.0} for seed in (0, 1)}
    first[6] = {"linear_probe": 10.0, "uniformity_z": -2.0}
    other = {  # in another order, and with a seed that the first row lacks
        6: {"linear_probe": 9.0, "uniformity_z": -1.0},
        7: {"linear_probe": 99.0, "uniformity_z": -9.0},
        1: {"linear_probe": 5.0, "uniformity_z": -4.0},
        0: {"linear_probe": 2.0, "uniformity_z": -2.0},
    }
    rows = {"a": first, "b": other, "c": {7: {"linear_probe": 1.0}}}
    assert tables.tables(scores_lines(rows)).splitlines()[-4:] == [
        "| minus a | LP % | −L_uniform z | n |",
        "| --- | --- | --- | --- |",
        "| itself | 6.33 | 1.333 | 3 |",
        "| b | −1.00 (−3.48 to +1.48) | +1.000 (−3.969 to +5.969) | 3 |",
    ]


@pytest.mark.parametrize("n", range(2, 11))
def test_the_interval_has_students_quantile(n):
    """The density of Student's t, summed up to it, is 0.975: x = tan(a), da = 0.5 / 400,000."""
    half = tables.T[n - 2]
    assert tables.interval([-1.0, 1.0] * (n // 2) + [0.0] * (n % 2))[0] == 0
    _, found = tables.interval(list(range(n)))
    assert found == pytest.approx(half * np.std(range(n), ddof=1) / n**0.5)
    x = np.linspace(0, half, 400_001)
    scale = math.gamma(n / 2) / math.gamma((n - 1) / 2) / math.sqrt((n - 1) * math.pi)
    density = scale * (1 + x**2 / (n - 1)) ** (-n / 2)
    assert 0.5 + np.trapezoid(density, x) == pytest.approx(0.975, abs=2e-5)


def test_no_table_has_more_than_eight_columns():
    every = {key: 1.0 for key, _, _ in tables.COLUMNS.values()}
    lines = scores_lines({"a": {0: every}, "b": {0: every}})
    lines += scores_lines({"a": {0: every}}, transfer="patterns")
    found = tables.tables(lines).split("\n\n")
    assert len(found) == 7 and "accuracy, transfer to patterns" in found[4]
    headings = [table.splitlines()[0].split(" | ") for table in found]
    assert max(map(len, headings)) == 8
    shown = {heading.strip("| ") for line in headings for heading in line[1:]}
    assert shown == {*tables.COLUMNS, "n"}  # no score is left out


def test_a_page_gets_its_tables_anew(tmp_path, capsys, monkeypatch):
    """One study on two machines; seed 1 of b is a repeat, and c is compared on its own machine."""
    monkeypatch.setattr(claims, "ASSETS", tmp_path / "assets")
    one = {"a": {0: {"knn": 10.0}, 1: {"knn": 20.0}}, "b": {0: {"knn": 12.0}, 1: {"knn": 26.0}}}
    two = {"a": {1: {"knn": 50.0}}, "b": {1: {"knn": 99.0}}, "c": {1: {"knn": 51.0}}}
    tables.update(tmp_path / "one.jsonl", scores_lines(one))
    tables.update(tmp_path / "two.jsonl", scores_lines(two))
    three = {"a": {0: {"knn": 1.0}}, "b": {0: {"knn": 4.0}}}
    tables.update(tmp_path / "three.jsonl", scores_lines(three, "else"))
    marks = "n > 1: one.jsonl two.jsonl", "n = 1: one.jsonl two.jsonl, three.jsonl"
    marks += ("a minus b: one.jsonl",)
    text = "Before\n" + "\n".join(f"<!-- {mark} -->\nold\n<!-- end -->" for mark in marks)
    (tmp_path / "page.md").write_text(text + "\nafter <!-- first run -->")
    study.main([str(tmp_path / "page.md")])
    page = (tmp_path / "page.md").read_text()
    made = (
        "| minus a | kNN % | n |\n| --- | --- | --- |\n| itself | 15.00 | 2 |\n"
        "| b | +4.00 (−21.41 to +29.41) | 2 |",  # 2 and 6: 12.706 x 2.83 / 1.41
        "| difference | kNN % | n |\n| --- | --- | --- |\n| one: c minus a | +1.00 | 1 |\n"
        "| three on else: b minus a | +3.00 | 1 |",
        "| difference | kNN % | n |\n| --- | --- | --- |\n"
        "| one: a minus b | −4.00 (−29.41 to +21.41) | 2 |",
    )
    parts = [f"<!-- {m} -->\n\n{t}\n\n<!-- end -->" for m, t in zip(marks, made)]
    assert page == "Before\n" + "\n".join(parts) + "\nafter <!-- first run -->"
    assert claims.renew(page) == page
    with pytest.raises(SystemExit) as stop:
        study.main([str(tmp_path / "other.md")])
    assert stop.value.code == 2 and "other.md" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--rows", "fedavg"], "fedavg"),
        (["--rows", ""], "--method"),
        (["--rows", "'ssd"], "quotation"),
        (["--evaluation", "--epochs x"], "--epochs"),
        (["--evaluation", "--dataset patterns"], "--transfer"),
        (["--rows", "ssd --lr 0"], "--lr"),
        (["--seeds", "x"], "'x'"),
        (["--", "--no-such-flag"], "--no-such-flag"),
    ],
)
def test_a_mistake_is_found_before_the_first_run(calls, flags, words, capsys):
    with pytest.raises(SystemExit) as stop:
        study.main(["runs", *flags])
    assert stop.value.code == 2 and words in capsys.readouterr().err and not calls
