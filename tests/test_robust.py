"""A run cannot be lost: kills, signals, full disks. The script runs for real.

KILLS=20 python -m pytest tests/test_robust.py     # the long form, by default one kill
"""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from model import load_checkpoint

ROOT = Path(__file__).parent.parent
KILLS = int(os.environ.get("KILLS", 1))
FLAGS = "--dataset patterns --width 4 --batch-size 16 --clients 4 --alpha 1".split()
FLAGS += "--local-epochs 1 --device cpu --no-amp".split()


# train.py, but `patterns` are 120 images, which are drawn at once
SCRIPT = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import data, train
draw, data.draw_patterns = data.draw_patterns, lambda: draw(120, 40)
train.main()
"""


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch, tmp_path):
    (tmp_path / "here").mkdir()
    (tmp_path / "train.py").write_text(SCRIPT)
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def script(*flags, **options):
    command = [sys.executable, "../train.py", *flags]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a child inherits SIG_IGN
    try:
        return subprocess.Popen(command, **options)
    finally:
        signal.signal(signal.SIGINT, before)


def finish(process, status=0, timeout=120):
    out, err = process.communicate(timeout=timeout)
    assert process.returncode == status, out + err
    return out, err


def metrics(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def count_lines(folder):
    path = Path(folder) / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for_a_line(process, folder, more_than=0):
    while process.poll() is None and count_lines(folder) <= more_than:
        time.sleep(0.01)


def weights(folder):
    return load_checkpoint(f"{folder}/last.pt")[0]["model"]


def largest_difference(one, two):
    return max((value.double() - two[name].double()).abs().max() for name, value in one.items())


def test_kills_at_any_moment_change_nothing():
    rounds, rng, kills = str(3 + 3 * KILLS), random.Random(0), 0
    finish(script(*FLAGS, "--rounds", rounds, "--out", "whole"))
    begin = [*FLAGS, "--rounds", rounds, "--out", "killed"]
    while kills < KILLS:
        there = Path("killed").exists()
        process = script(*(["--resume", "killed/last.pt"] if there else begin))
        if rng.random() < 0.8:  # in a round, else while it starts
            wait_for_a_line(process, "killed", more_than=count_lines("killed"))
            time.sleep(rng.uniform(0, 0.3))
        else:
            time.sleep(rng.uniform(0, 3))
        assert process.poll() is None, "it ended before it could be killed"
        process.kill()
        process.communicate()
        kills += 1
        if Path("killed/last.pt").exists():  # whatever the moment: a valid checkpoint
            load_checkpoint("killed/last.pt")
        else:  # killed before its first line
            shutil.rmtree("killed", ignore_errors=True)
    again = ["--resume", "killed/last.pt"]
    finish(script(*(again if Path("killed").exists() else begin)))
    assert largest_difference(weights("killed"), weights("whole")) == 0
    assert [line["round"] for line in metrics("killed")] == list(range(1, int(rounds) + 1))
    assert not list(Path("killed").glob("*.tmp"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_in_order(number):
    process = script(*FLAGS, "--rounds", "500", "--out", "run")
    wait_for_a_line(process, "run")
    process.send_signal(number)
    _, err = finish(process, status=130)
    assert err.strip() == "stopped; go on with: python ../train.py --resume run/last.pt"
    done = len(load_checkpoint("run/last.pt")[0]["history"])
    assert len(metrics("run")) - done in (0, 1)


def limited(size):
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(last_pt):
    process = script(*FLAGS, "--rounds", "1", "--out", "run", preexec_fn=limited(20_000))
    _, err = finish(process, status=2)
    assert len(err.splitlines()) == 1 and "File too large" in err
    Path("before").mkdir()
    Path("before/last.pt").write_bytes(last_pt)
    process = script("--resume", "before/last.pt", "--rounds", "3", preexec_fn=limited(20_000))
    _, err = finish(process, status=2)
    assert len(err.splitlines()) == 1 and "File too large" in err
    assert Path("before/last.pt").read_bytes() == last_pt
