"""What several test files share: small data, a small run, and what a user's mistake looks like."""

import json
import os
import re
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # the networks here are too small for more, also in scripts

import pytest
import torch

import data
import train
from model import load_checkpoint

SMALL = "--dataset patterns --width 2 --batch-size 16 --clients 3 --alpha 1 --rounds 1"
SMALL = [*SMALL.split(), "--local-epochs", "1", "--device", "cpu", "--no-amp"]
draw_patterns = data.draw_patterns


@pytest.fixture(scope="session")
def patterns():
    """120 drawn training images and 40 test images."""
    return draw_patterns(120, 40)


@pytest.fixture
def small(monkeypatch, tmp_path, patterns):
    """`--dataset patterns` is small, and the working folder is empty -> SMALL, a run's flags."""
    monkeypatch.setattr(data, "draw_patterns", lambda: patterns)
    monkeypatch.chdir(tmp_path)
    return list(SMALL)


@pytest.fixture(scope="session")
def last_pt(tmp_path_factory, patterns):
    """The bytes of the last.pt of one small run of one round."""
    folder = tmp_path_factory.mktemp("once") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "draw_patterns", lambda: patterns)
        train.main([*SMALL, "--out", str(folder)])
    return (folder / "last.pt").read_bytes()


@pytest.fixture
def run(small, last_pt, tmp_path):
    """A copy of that run, runs/a in the working folder -> the path of its last.pt."""
    (tmp_path / "runs" / "a").mkdir(parents=True)
    (tmp_path / "runs" / "a" / "last.pt").write_bytes(last_pt)
    return "runs/a/last.pt"


@pytest.fixture
def mistake(capsys):
    """(main, flags, words): exit status 2, one line with these words (a pattern) -> the line."""

    def check(main, flags, words):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main(flags)
        line = capsys.readouterr().err.strip()
        assert stop.value.code == 2, line
        assert len(line.splitlines()) == 1, line
        assert re.search(words, line), line
        return line

    return check


def same(one, two):
    """Are two state dicts equal, bit for bit?"""
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def weights(path="runs/a/last.pt"):
    """The state dict in a checkpoint."""
    return load_checkpoint(path)[0]["model"]


def lines(folder="runs/a"):
    """A run's metrics.jsonl, a dict a line."""
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def files():
    """What lies in the working folder: the bytes of every file by its path."""
    return {path: path.is_file() and path.read_bytes() for path in Path().rglob("*")}
