"""README.md: its code runs, its commands parse, its links lead on; each core file stands alone."""

import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision

import eval as evaluation
import model
import train
from model import SSDNet

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)
COMMANDS = re.findall(r"python ((?:train|eval)\.py -?[^#`\n]*)", README)


def block(words):
    """The README's Python block that has these words."""
    (found,) = (text for text in BLOCKS if words in text)
    return found


def test_the_losses_are_those_of_the_file():
    """Every line beside a formula stands in losses.py; its input checks are left out."""
    source = [line.split("  #")[0].strip() for line in (ROOT / "losses.py").open()]
    method = README[README.index("## The method") : README.index("## Results")]
    blocks = re.findall(r"```python\n(.*?)```", method, re.S)
    lines = [line.split("  #")[0].strip() for text in blocks for line in text.splitlines()]
    assert len(blocks) == 3 and len(lines) >= 8
    assert [line for line in lines if line not in source] == []


def test_the_block_of_the_first_screen_runs():
    names = {}
    exec(block("loss.backward()"), names)
    assert sorted(names["terms"]) == ["align", "distill", "dsr", "uniform"]


def test_the_encoder_is_torchvisions_as_the_readme_loads_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/NAME").mkdir(parents=True)
    config = {"width": 64, "embed_dim": None, "projector": True}
    model.save_checkpoint("runs/NAME/last.pt", config, [], SSDNet(), [])
    (line,) = re.findall(r"`(model\.load_checkpoint.*?)`", README)
    encoder = eval(line, {"model": model})
    net = torchvision.models.resnet18()
    net.conv1 = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False)
    net.fc = torch.nn.Identity()
    net.load_state_dict(encoder.state_dict())


@pytest.mark.parametrize("command", sorted(set(COMMANDS)))
def test_every_command_has_flags_that_exist(command):
    script, *flags = shlex.split(command)
    {"train.py": train, "eval.py": evaluation}[script].build_parser().parse_args(flags)


def test_the_example_of_an_own_loss_trains(small, monkeypatch, capsys):
    """As a reader would: a file of one's own, train.py's flags."""
    Path("mine.py").write_text(block("mine.py"))
    monkeypatch.setattr(sys, "argv", ["mine.py", *small, "--lr", "0.01"])
    runpy.run_path("mine.py", run_name="__main__")
    printed = capsys.readouterr().out
    assert "round   1/1" in printed and "  spread 0." in printed
    assert Path("runs/patterns-mine-k3-seed0/last.pt").exists()


ALONE = {  # what a copied core file needs beside it, and a part of what it prints
    "losses": ([], "step 5: inter-client -L_uniform 1.787"),
    "federated": ([], "round 6: w = 2.9531"),  # 3 (1 - 2^-6)
    "model": ([], "encoder 11.17 M, projector 2.10 M"),
    "data": ([], "columns sum to 500"),
    "eval": (["data", "model"], None),  # a script, no demonstration
}
COPIES = """  # one process for all, which forgets every file before the next
import doctest, importlib, runpy, sys
names = sys.argv[1:]
for name in names:
    sys.path[0] = name
    failed = doctest.testmod(importlib.import_module(name)).failed
    print(f"{name}: {failed} failed")
    if name != "eval":
        runpy.run_path(f"{name}/{name}.py", run_name="__main__")
    for other in names:
        sys.modules.pop(other, None)
"""


def test_a_copied_file_works_alone_its_example_and_its_demonstration(tmp_path):
    """In a folder with nothing but what it says that it needs, and without a warning."""
    for name, (needs, _) in ALONE.items():
        (tmp_path / name).mkdir()
        for file in (name, *needs):
            shutil.copy(ROOT / f"{file}.py", tmp_path / name)
    strict = [f"-Werror::{kind}Warning" for kind in ("Deprecation", "Future", "User")]
    command = [sys.executable, *strict, "-c", COPIES, *ALONE]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done
    for name, (_, shown) in ALONE.items():
        assert f"{name}: 0 failed" in done.stdout
        assert shown is None or (shown in done.stdout and f"`python {name}.py`" in README)


def anchors(page):
    """What its headings are called in links: lower case, hyphens for spaces, no other signs."""
    titles = re.findall("^#+ (.*)", page, flags=re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", ["README.md", "extras/RESULTS.md", "extras/SPEED.md"])
def test_every_relative_link_and_anchor_resolves(name):
    text = (ROOT / name).read_text()
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    links = [link for link in links if "://" not in link]
    assert links
    for link in links:
        path, _, anchor = link.partition("#")
        file = (ROOT / name).parent / path if path else ROOT / name
        assert file.exists(), link
        assert not anchor or anchor in anchors(file.read_text()), link
