"""README.md tells the truth: its losses, its commands' flags, its example, the copied files."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "extras"))

import baselines
import bench
import figures
import separation
import study

import eval as evaluation
import train

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)
COMMANDS = re.findall(r"python ((?:extras/)?\w+\.py -?[^#`\n]*)", README)
CORE = {"losses": [], "model": [], "data": [], "federated": [], "eval": ["data", "model"]}
SCRIPTS = {
    "train.py": train,
    "mine.py": train,  # the README's example
    "eval.py": evaluation,
    "extras/baselines.py": baselines,
    "extras/bench.py": bench,
    "extras/figures.py": figures,
    "extras/separation.py": separation,
    "extras/study.py": study,
}


class Parsed(Exception):
    pass


def test_the_losses_are_verbatim():
    source = (ROOT / "losses.py").read_text()
    source = re.sub(r'    """.*?"""\n', "", source, flags=re.S)  # docstrings are left out
    functions = BLOCKS[0].strip().split("\n\n\n")
    assert len(functions) >= 3 and all(function in source for function in functions)


@pytest.mark.parametrize("command", sorted(set(COMMANDS)))
def test_every_command_has_flags_that_exist(command, monkeypatch):
    """Each script is run until it has parsed its flags; study.py until it has planned its rows."""

    def stop(*_):
        raise Parsed

    script, *flags = shlex.split(command)
    if script.removesuffix(".py") in CORE and script != "eval.py":
        assert not flags  # a demonstration
        return
    monkeypatch.setattr(sys, "argv", [script, *flags])
    if "--help" in flags:
        assert flags == ["--help"]
    elif SCRIPTS[script] in (train, baselines):
        SCRIPTS[script].build_parser().parse_args(flags)
    elif script == "extras/study.py":
        monkeypatch.setattr(study, "train_one", stop)
        with pytest.raises(Parsed):
            study.main()
    else:
        parse = evaluation.OneLineParser.parse_args
        monkeypatch.setattr(
            evaluation.OneLineParser,
            "parse_args",
            lambda self, argv=None: stop(parse(self, argv)),
        )
        with pytest.raises(Parsed):
            SCRIPTS[script].main()


def test_the_example_of_a_new_method_trains(tmp_path):
    """As a reader would: a file of one's own beside the project, train.py's flags."""
    (tmp_path / "mine.py").write_text(BLOCKS[1])
    flags = "--dataset shapes --width 2 --limit 90 --clients 3 --alpha 1 --batch-size 16".split()
    flags += "--rounds 2 --local-epochs 1 --lr 0.01 --device cpu --no-amp --out runs/mine".split()
    done = subprocess.run(
        [sys.executable, "mine.py", *flags],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "round   2/2" in done.stdout and "  spread 0." in done.stdout
    assert len(BLOCKS[1].splitlines()) <= 25 and (tmp_path / "runs/mine/last.pt").exists()


@pytest.mark.parametrize("name", CORE)
def test_the_example_of_a_copied_file_works(name, tmp_path):
    """Alone in a folder, but for what it says that it needs."""
    for file in (name, *CORE[name]):
        (tmp_path / f"{file}.py").write_text((ROOT / f"{file}.py").read_text())
    code = f"import doctest, {name}; print(doctest.testmod({name}))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert re.fullmatch(r"TestResults\(failed=0, attempted=[3-9].*\)\n", done.stdout), done


@pytest.mark.parametrize("record", ["ablation", "choices", "silo", "local", "device"])
def test_a_table_of_results_is_that_of_its_runs(record):
    """assets/*.jsonl are study.py's scores.jsonl: a line a run."""
    rows = {}
    for line in map(json.loads, (ROOT / f"assets/{record}.jsonl").read_text().splitlines()):
        rows.setdefault(line["row"], []).append(line)
    assert study.table(rows) in README


@pytest.mark.parametrize(
    "name, shown",
    [
        ("losses", "step 5: inter-client -L_uniform 1.787"),
        ("federated", "round 6: w = 2.9531"),  # 3 (1 - 2^-6)
        ("model", "encoder 11.17 M, projector 2.10 M"),
        ("data", "all" + 10 * "      500" + "    5000"),
    ],
)
def test_a_demonstration_runs_alone_in_an_empty_folder(name, shown, tmp_path):
    assert f"`python {name}.py`" in README
    (tmp_path / f"{name}.py").write_text((ROOT / f"{name}.py").read_text())
    command = [sys.executable, f"{name}.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and shown in done.stdout, done


def test_every_file_that_is_linked_is_there():
    links = re.findall(r"\]\(([\w./-]+)\)", README) + re.findall(r'src="([\w./-]+)"', README)
    assert links and all((ROOT / link).exists() for link in links)
