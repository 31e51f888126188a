"""What several test files of extras/ share: small data, a small run, what a mistake looks like."""

import json
import os
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # the networks here are too small for more, also in scripts

import pytest
import torch

import data

FLAGS = "--dataset patterns --width 2 --batch-size 16 --clients 3 --alpha 1 --rounds 1"
FLAGS += " --local-epochs 1 --device cpu --no-amp --lr 0.03"
draw_patterns = data.draw_patterns


@pytest.fixture(scope="session")
def patterns():
    """120 drawn training images and 40 test images."""
    return draw_patterns(120, 40)


@pytest.fixture
def small(monkeypatch, tmp_path, patterns):
    """`--dataset patterns` is small, and the working folder is empty -> a run's flags."""
    monkeypatch.setattr(data, "draw_patterns", lambda: patterns)
    monkeypatch.chdir(tmp_path)
    return FLAGS.split()


@pytest.fixture
def run(small):
    """(module, flags, folder): a small run of its main -> its weights, the lines of its metrics."""

    def start(module, flags="", out="runs/a"):
        module.main([*small, "--out", out, *flags.split()])
        state = torch.load(f"{out}/last.pt", weights_only=True)["model"]
        return state, [json.loads(line) for line in Path(out, "metrics.jsonl").open()]

    return start


@pytest.fixture
def mistake(capsys):
    """(main, flags, words): exit status 2 and one line with these words."""

    def check(main, flags, words):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main(flags)
        line = capsys.readouterr().err.strip()
        assert stop.value.code == 2 and len(line.splitlines()) == 1 and words in line, line

    return check
