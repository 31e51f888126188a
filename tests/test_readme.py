"""README.md and extras/RESULTS.md tell the truth: code, flags, example, files, tables, links."""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision

sys.path.insert(0, str(Path(__file__).parent.parent / "extras"))

import baselines
import bench
import figures
import separation
import study

import eval as evaluation
import train
from model import SSDNet

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)
RESULTS = (ROOT / "extras/RESULTS.md").read_text()
COMMANDS = re.findall(r"python ((?:extras/)?\w+\.py -?[^#`\n]*)", README + RESULTS)
DEMONSTRATIONS = {"losses.py", "model.py", "data.py", "federated.py"}
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


def block(words):
    """The README's Python block that has these words."""
    (found,) = (text for text in BLOCKS if words in text)
    return found


def test_the_losses_are_those_of_the_file():
    """Every line beside a formula stands in losses.py; its input checks are left out."""
    source = [line.split("  #")[0].strip() for line in (ROOT / "losses.py").open()]
    method = README[README.index("## The method") : README.index("## The algorithm")]
    blocks = re.findall(r"```python\n(.*?)```", method, re.S)
    lines = [line.split("  #")[0].strip() for text in blocks for line in text.splitlines()]
    assert len(blocks) == 4 and len(lines) >= 8
    assert [line for line in lines if line not in source] == []


def test_the_encoder_is_torchvisions_as_the_readme_loads_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ours, names = SSDNet().eval(), {"torch": torch, "torchvision": torchvision}
    (tmp_path / "runs/NAME").mkdir(parents=True)
    torch.save({"model": ours.state_dict()}, "runs/NAME/last.pt")
    exec(block("torchvision.models.resnet18()"), names)
    x = torch.rand(2, 3, 32, 32)
    assert torch.allclose(names["net"](x), ours(x)[0], atol=1e-6)


@pytest.mark.parametrize("command", sorted(set(COMMANDS)))
def test_every_command_has_flags_that_exist(command, monkeypatch, tmp_path):
    """Each script is run until it has parsed its flags; study.py until it has planned its rows."""

    def stop(*_):
        raise Parsed

    script, *flags = shlex.split(command)
    if script in DEMONSTRATIONS:
        assert not flags  # a demonstration
        return
    monkeypatch.setattr(sys, "argv", [script, *flags])
    if "--help" in flags:
        assert flags == ["--help"]
    elif SCRIPTS[script] in (train, baselines):
        SCRIPTS[script].build_parser().parse_args(flags)
    elif script == "extras/study.py":
        monkeypatch.setattr(study, "train_one", stop)
        monkeypatch.setattr(study, "renew", stop)
        (tmp_path / "extras").symlink_to(ROOT / "extras")
        monkeypatch.chdir(tmp_path)
        with pytest.raises(Parsed):
            study.main()
    else:
        parse = argparse.ArgumentParser.parse_args
        monkeypatch.setattr(
            argparse.ArgumentParser,
            "parse_args",
            lambda self, argv=None: stop(parse(self, argv)),
        )
        with pytest.raises(Parsed):
            SCRIPTS[script].main()


def test_the_example_of_a_new_method_trains(tmp_path):
    """As a reader would: a file of one's own beside the project, train.py's flags."""
    (tmp_path / "mine.py").write_text(block("mine.py"))
    flags = "--dataset patterns --width 2 --limit 90 --clients 3 --alpha 1 --batch-size 16".split()
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
    assert len(block("mine.py").splitlines()) <= 30 and (tmp_path / "runs/mine/last.pt").exists()


def test_the_tables_of_results_are_those_of_their_runs():
    """assets/*.jsonl are study.py's scores.jsonl or separation.py's, but for one. All are shown."""
    shown = set(re.findall(r"<!-- assets/(\w.*\.jsonl) -->", RESULTS))
    records = {file.name for file in (ROOT / "assets").glob("*.jsonl")}
    measured = {name for name in records if name.startswith("separation")}
    assert measured and shown == records - measured - {"first_run.jsonl"}
    assert study.renew(RESULTS) == RESULTS, "python extras/study.py extras/RESULTS.md"
    for name in measured:
        lines = list(map(json.loads, (ROOT / "assets" / name).read_text().splitlines()))
        assert all(separation.table(lines, part) in RESULTS for part in "hz"), name


def test_the_readmes_results_are_those_of_their_runs():
    rows = {"FedAlignUniform": "fedalignuniform", "+ distillation": "pd", "+ DSR": "dsr"}
    rows |= {"SSD: both": "ssd", "SSD, gamma 0.2": "ssd --gamma 0.2", "HSD": "hsd"}
    made = study.tables((ROOT / "assets/regime.jsonl").read_text().splitlines()).splitlines()
    for start, row in rows.items():
        (line,) = (line for line in README.splitlines() if line.startswith(f"| {start}"))
        own = " ".join(found for found in made if found.startswith(f"| {row} |"))
        cells = re.findall(r"[+−]?\d+\.\d+ ± \d+\.\d+", line)
        assert len(cells) >= 2 and all(f"| {cell} " in own for cell in cells), start


def prose(page):
    """A page's lines, without what stands in ``` blocks."""
    return re.sub(r"^```.*?^```", "", page, flags=re.S | re.M).splitlines()


@pytest.mark.parametrize("page, columns", [(README, 6), (RESULTS, 8)])
def test_tables_are_narrow_and_lines_short(page, columns):
    lines = prose(page)
    tables = [line.replace(r"\|", "") for line in lines if line.startswith("|")]
    assert len(tables) > 20 and max(line.count("|") - 1 for line in tables) <= columns
    assert all(len(line) <= 120 for line in lines if not line.startswith(("|", "<img")))


def test_the_readme_is_read_to_the_end():
    assert len(README.encode()) <= 14 * 1024 and len(README.splitlines()) <= 265


@pytest.mark.parametrize(
    "name, needs, shown",
    [
        ("losses", [], "step 5: inter-client -L_uniform 1.787"),
        ("federated", [], "round 6: w = 2.9531"),  # 3 (1 - 2^-6)
        ("model", [], "encoder 11.17 M, projector 2.10 M"),
        ("data", [], "all" + 10 * "      500" + "    5000"),
        ("eval", ["data", "model"], None),  # a script, no demonstration
    ],
)
def test_a_copied_file_works_alone_its_example_and_its_demonstration(name, needs, shown, tmp_path):
    """In a folder with nothing but what it says that it needs, and without a warning."""
    for file in (name, *needs):
        (tmp_path / f"{file}.py").write_text((ROOT / f"{file}.py").read_text())
    code = f"import doctest, runpy, {name}; print(doctest.testmod({name}))"
    code += f"; runpy.run_path('{name}.py', run_name='__main__')" * bool(shown)
    strict = [f"-Werror::{kind}Warning" for kind in ("Deprecation", "Future", "User")]
    command = [sys.executable, *strict, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert re.match(r"TestResults\(failed=0, attempted=[3-9]", done.stdout), done
    assert done.returncode == 0 and done.stderr == "", done
    if shown:
        assert f"`python {name}.py`" in README
        assert shown in done.stdout and len(done.stdout.splitlines()) >= 4


def anchors(page):
    """What its headings are called in links: lower case, hyphens for spaces, no other signs."""
    titles = [line.lstrip("#").strip() for line in prose(page) if re.match("#+ ", line)]
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", ["README.md", "extras/RESULTS.md"])
def test_every_relative_link_and_anchor_resolves(name):
    text = "\n".join(prose((ROOT / name).read_text()))
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    links = [link for link in links if "://" not in link]
    assert len(links) > 5
    for link in links:
        path, _, anchor = link.partition("#")
        file = (ROOT / name).parent / path if path else ROOT / name
        assert file.exists(), link
        assert not anchor or anchor in anchors(file.read_text()), link
