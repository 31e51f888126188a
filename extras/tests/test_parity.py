"""extras/parity.py, where the environment variable SSD_AUTHORS names a clone of their code."""

import os
import subprocess
import sys

import parity
import pytest

needs_their_code = pytest.mark.skipif(
    "SSD_AUTHORS" not in os.environ, reason="SSD_AUTHORS names no clone of github.com/hc-fang/ssd"
)


@needs_their_code
@pytest.mark.parametrize("temperature, status", [(0.5, 0), (0.6, 1)])
def test_the_ladder_holds_and_a_broken_rung_is_seen(temperature, status, monkeypatch, capsys):
    monkeypatch.setattr(parity, "TEMPERATURE", temperature)
    monkeypatch.setattr(parity, "SPLIT", [range(0, 64), range(64, 96)])
    with pytest.raises(SystemExit) as stop:
        parity.main([os.environ["SSD_AUTHORS"]])
    assert stop.value.code == status
    assert len(capsys.readouterr().out.splitlines()) == 11


def test_another_folder_is_one_line(tmp_path):
    command = [sys.executable, parity.__file__, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "needs a clone" in done.stderr
