"""A run cannot be lost: kills, signals, full disks, and processes that die. Scripts run for real.

KILLS=20 python -m pytest tests/test_robust.py     # the long form, by default 2 kills
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
KILLS = int(os.environ.get("KILLS", 2))
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


def script(*flags, processes=1, **options):
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), "../train.py", *flags]
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
    rounds, rng, kills = str(8 + 6 * KILLS), random.Random(0), 0
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
    finish(script("--resume", "killed/last.pt"))
    assert largest_difference(weights("killed"), weights("whole")) == 0
    assert [line["round"] for line in metrics("killed")] == list(range(1, int(rounds) + 1))
    assert not list(Path("killed").glob("*.tmp"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_in_order(number):
    process = script(*FLAGS, "--rounds", "500", "--out", "run")
    wait_for_a_line(process, "run")
    process.send_signal(number)
    _, err = finish(process, status=130)
    assert err == "train.py: stopped; go on with: python train.py --resume run/last.pt\n"
    done = len(load_checkpoint("run/last.pt")[0]["history"])
    assert len(metrics("run")) - done in (0, 1)


def limited(size):
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays():
    process = script(*FLAGS, "--rounds", "1", "--out", "run", preexec_fn=limited(20_000))
    _, err = finish(process, status=2)
    assert len(err.splitlines()) == 1 and "File too large" in err
    finish(script(*FLAGS, "--rounds", "1", "--out", "again"))
    Path("run").rename("full")
    Path("again").rename("run")
    before = Path("run/last.pt").read_bytes()
    process = script("--resume", "run/last.pt", "--rounds", "3", preexec_fn=limited(20_000))
    _, err = finish(process, status=1)
    assert len(err.splitlines()) == 1 and "File too large" in err and "--resume" in err
    assert Path("run/last.pt").read_bytes() == before
    finish(script("--resume", "run/last.pt", "--rounds", "2"))
    assert [line["round"] for line in metrics("run")] == [1, 2]


def test_two_processes_equal_one_and_write_once():
    """Five clients of 20 % take part: one a round, so that a process has nothing to do."""
    for name, count, flags in (
        ("all", 2, FLAGS),
        ("few", 2, [*FLAGS, "--clients", "5", "--participation", "0.2"]),
    ):
        flags = [*flags, "--rounds", "2"]
        finish(script(*flags, "--out", f"{name}-1"))
        out, _ = finish(script(*flags, "--out", f"{name}-n", processes=count))
        assert out.count("round   2/2") == 1 and f"{count} processes" in out
        assert largest_difference(weights(f"{name}-1"), weights(f"{name}-n")) < 1e-5
        for one, many in zip(metrics(f"{name}-1"), metrics(f"{name}-n"), strict=True):
            assert one["clients"] == many["clients"]
            assert one["loss"] == pytest.approx(many["loss"], abs=1e-5)


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
    process = script(*FLAGS, "--rounds", "500", "--out", "run", processes=2)
    wait_for_a_line(process, "run")
    os.kill(process_of_rank(process.pid, 1), signal.SIGKILL)
    start = time.time()
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0 and time.time() - start < 60
    assert "go on with: python train.py --resume run/last.pt" in err
    done = len(load_checkpoint("run/last.pt")[0]["history"])
    finish(script("--resume", "run/last.pt", "--rounds", str(done + 1)))
    assert [line["round"] for line in metrics("run")] == list(range(1, done + 2))


def test_a_mistake_under_torchrun_is_said_once():
    _, err = script(*FLAGS, "--clients", "119", processes=2).communicate(timeout=300)
    assert err.count("train.py: ") == 1 and "119 clients" in err
    assert list(Path().iterdir()) == []
