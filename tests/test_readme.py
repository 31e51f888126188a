"""README.md tells the truth: its losses stand in losses.py, its commands have flags that exist."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from train import build_parser

ROOT = Path(__file__).parent.parent
CORE = {"losses": [], "model": [], "data": [], "federated": [], "eval": ["data", "model"]}
README = (ROOT / "README.md").read_text()


def test_the_losses_are_verbatim():
    shown = re.search(r"```python\n(.*?)```", README, re.S)[1]
    source = (ROOT / "losses.py").read_text()
    source = re.sub(r'    """.*?"""\n', "", source, flags=re.S)  # docstrings are left out
    functions = shown.strip().split("\n\n\n")
    assert len(functions) >= 3 and all(function in source for function in functions)


@pytest.mark.parametrize(
    "command", sorted(set(re.findall(r"python (train\.py -[^#`\n]*)", README)))
)
def test_every_training_command_has_flags_that_exist(command):
    arguments = shlex.split(command)[1:]
    if arguments != ["--help"]:
        build_parser().parse_args(arguments)


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


def test_every_file_that_is_linked_is_there():
    links = re.findall(r"\]\(([\w./-]+)\)", README)
    assert links and all((ROOT / link).exists() for link in links)
