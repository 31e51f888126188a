"""A run cannot be lost: kills of the real script, signals, full disks.

KILLS=20 python -m pytest tests/test_robust.py     # the long form, by default one kill
"""

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
from conftest import lines, same, weights

import train
from model import load_checkpoint

ROOT = Path(__file__).parent.parent
KILLS = int(os.environ.get("KILLS", 1))
SCRIPT = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import data, train
draw, data.draw_patterns = data.draw_patterns, lambda: draw(120, 40)
train.main()
"""


def count_lines():
    path = Path("runs/killed/metrics.jsonl")
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_kills_at_any_moment_change_nothing(small):
    Path("train.py").write_text(SCRIPT)
    flags = [*small, "--width", "4", "--rounds", str(3 + 3 * KILLS), "--out"]
    begin, go_on = [*flags, "runs/killed"], ["--resume", "runs/killed/last.pt"]
    rng = random.Random(0)
    for _ in range(KILLS):
        there = Path("runs/killed").exists()
        command = [sys.executable, "train.py", *(go_on if there else begin)]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        if rng.random() < 0.8:  # in a round, else while it starts
            before = count_lines()
            while process.poll() is None and count_lines() <= before:
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.3))
        else:
            time.sleep(rng.uniform(0, 3))
        assert process.poll() is None, "it ended before it could be killed"
        process.kill()
        process.wait()
        if Path("runs/killed/last.pt").exists():  # whatever the moment: a valid checkpoint
            load_checkpoint("runs/killed/last.pt")
        else:  # killed before its first line
            shutil.rmtree("runs/killed", ignore_errors=True)
    train.main(go_on if Path("runs/killed").exists() else begin)
    train.main([*flags, "runs/whole"])
    assert same(weights("runs/killed/last.pt"), weights("runs/whole/last.pt"))
    assert [line["round"] for line in lines("runs/killed")] == list(range(1, 4 + 3 * KILLS))
    assert not list(Path("runs/killed").glob("*.tmp"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_in_order(number, run, monkeypatch, capsys):
    ctrl_c = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's & ignores it
    terminate = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    step = train.ssd_step

    def interrupted(*arguments):
        if len(lines()) == 3:  # in the fourth round
            signal.raise_signal(number)
        return step(*arguments)

    monkeypatch.setattr(train, "ssd_step", interrupted)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(SystemExit) as stop:
        train.main(["--resume", run, "--rounds", "9"])
    signal.signal(signal.SIGINT, ctrl_c)
    signal.signal(signal.SIGTERM, terminate)
    assert stop.value.code == 130
    said = capsys.readouterr().err.strip()
    assert said == "stopped; go on with: python train.py --resume runs/a/last.pt"
    assert len(load_checkpoint(run)[0]["history"]) == len(lines()) == 3


@pytest.fixture
def fill_disk():
    """Once called no file of this process grows beyond 20,000 bytes, as on a disk without space."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(
    run, small, fill_disk, monkeypatch, mistake
):
    step, before = train.ssd_step, weights(run)

    def fills(*arguments):
        fill_disk()
        return step(*arguments)

    monkeypatch.setattr(train, "ssd_step", fills)
    in_a_round = ["--resume", run, "--rounds", "3"]
    mistake(train.main, in_a_round, "File too large; go on with: .*--resume runs/a/last.pt")
    at_its_start = [*small, "--out", "runs/b"]
    mistake(train.main, at_its_start, "error: .*File too large")
    assert same(weights(run), before)
