"""extras/parallel.py: several processes end at one process's weights. The scripts run for real.

A process that dies ends the run, and train.py goes on from its last round.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import parallel
import pytest
import torch

import train
from model import load_checkpoint

ROOT = Path(__file__).parent.parent.parent
FLAGS = "--dataset patterns --width 2 --batch-size 16 --alpha 1 --local-epochs 1".split()
FLAGS += ["--device", "cpu", "--no-amp", "--clients"]

# the script, but `patterns` are 120 images, which are drawn at once
SCRIPT = f"""
import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "extras")!r}]
import data, parallel, train
draw, data.draw_patterns = data.draw_patterns, lambda: draw(120, 40)
"""


@pytest.fixture(autouse=True)
def elsewhere(small, tmp_path):
    (tmp_path / "parallel.py").write_text(SCRIPT + "parallel.main()\n")


def start(*flags):
    """Two processes."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command = [sys.executable, *launcher, "parallel.py", *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finished(folder):
    """The history and the weights of a run."""
    checkpoint, _ = load_checkpoint(f"{folder}/last.pt")
    return checkpoint["history"], checkpoint["model"]


def test_clients_go_to_the_process_with_least_to_do():
    sizes = [5, 9, 8, 7, 5]
    assert parallel.share_out([0, 1, 2, 3, 4], sizes, 2) == [[1, 0, 4], [2, 3]]
    assert parallel.share_out([1, 2], sizes, 3) == [[1], [2], []]


@pytest.mark.parametrize("more", [["4"], ["5", "--participation", "0.2"]])
def test_two_processes_equal_one_and_write_once(more):
    """Five clients of 20 % take part: one a round, so that a process has nothing to do."""
    flags = [*FLAGS, *more, "--rounds", "2"]
    train.main([*flags, "--out", "one"])
    process = start(*flags, "--out", "two")
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0 and out.count("round   2/2") == 1, out + err
    (lines, state), (other_lines, other) = finished("one"), finished("two")
    for name, value in state.items():
        assert torch.allclose(value, other[name], rtol=0, atol=1e-5), name
    for line, other_line in zip(lines, other_lines, strict=True):
        assert line["clients"] == other_line["clients"]
        assert line["loss"] == pytest.approx(other_line["loss"], abs=1e-5)


def process_of_rank(launcher, rank):
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            variables = (folder / "environ").read_text().split("\0")
            if parent == launcher and f"RANK={rank}" in variables:
                return int(folder.name)
        except OSError:
            continue


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds a process by /proc")
def test_a_process_that_dies_ends_the_run_and_one_process_goes_on():
    process = start(*FLAGS, "4", "--rounds", "500", "--out", "run")
    while process.poll() is None and not (
        Path("run/metrics.jsonl").exists() and Path("run/metrics.jsonl").read_text()
    ):
        time.sleep(0.01)
    os.kill(process_of_rank(process.pid, 1), signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode != 0
    done = len(load_checkpoint("run/last.pt")[0]["history"])
    train.main(["--resume", "run/last.pt", "--rounds", str(done + 1)])
    assert [line["round"] for line in finished("run")[0]] == list(range(1, done + 2))


def test_a_mistake_is_said_once(mistake):
    _, err = start(*FLAGS, "119").communicate(timeout=200)
    assert err.count("parallel.py: error: ") == 1 and "119 clients" in err
    assert not list(Path().glob("runs"))
    mistake(parallel.main, [*FLAGS, "4"], "start it with torchrun")
