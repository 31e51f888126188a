"""extras/flower for real, over loopback: one superlink, three supernodes, TLS and registered keys.

Needs flwr (pip install "flwr>=1.42"); without it everything here is skipped.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("flwr", reason='flwr is not installed: pip install "flwr>=1.42"')
ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "extras" / "flower"))

import demo  # noqa: E402

import train  # noqa: E402
from data import dirichlet_split, draw_patterns  # noqa: E402

K, WIDTH = 3, 16
TRAIN = f"--width {WIDTH} --clients {K} --local-epochs 1 --batch-size 16 --lr 0.03".split()


@pytest.fixture(scope="module")
def federation(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flower")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that it, too, ends the processes
    try:
        yield Federation(folder)
    finally:
        demo.end(demo.STARTED)
        assert not left_running(folder)


class Federation:
    """A superlink that knows four keys, images, and their split over three clients."""

    def __init__(self, folder):
        os.environ["OMP_NUM_THREADS"] = "1"
        self.folder, self.nodes = folder, []
        self.dataset, self.split = folder / "images", folder / "split.json"
        data = draw_patterns(150, 50)
        for part, images, labels in (
            ("train", data.train_x, data.train_y),
            ("test", data.test_x, data.test_y),
        ):
            for i, (image, label) in enumerate(zip(images, labels)):
                path = self.dataset / part / str(int(label)) / f"{i:03d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
        labels = np.sort(data.train_y.numpy())  # as a folder is read: class by class
        parts = dirichlet_split(labels, K, alpha=1.0)
        self.split.write_text(json.dumps([part.tolist() for part in parts]))
        self.address = demo.prepare(folder, K + 2)  # the last key is not registered
        demo.start_superlink(folder, self.address)
        for k in range(K + 1):
            demo.flwr(folder, "supernode", "register", f"{folder}/client-{k}.pub", check=True)

    def start_node(self, key, node_config=None, path=ROOT):
        """A node with the key of that number, by default as the client of that number."""
        node_config = node_config or f'client={key} split="{self.split}" dataset="{self.dataset}"'
        return demo.start_node(self.folder, self.address, f"client-{key}", node_config, path=path)

    def start_run(self, name, **config):
        """Start the app -> the process that writes its log to name.log."""
        config = {
            "width": WIDTH,
            "local-epochs": 1,
            "batch-size": 16,
            "lr": 0.03,
            "dataset": str(self.dataset),
            "split-file": str(self.split),
            "out": str(self.folder / name),
        } | {key.replace("_", "-"): value for key, value in config.items()}
        text = " ".join(f"{key}={json.dumps(value)}" for key, value in config.items())
        command = "flwr", "run", str(demo.APP), "--stream", "--run-config", text
        return demo.start(self.folder, name, *command)

    def run(self, name, **config):
        """Run the app to its end -> what it has said."""
        self.start_run(name, **config).wait(600)
        return self.log(name)

    def log(self, name):
        path = self.folder / f"{name}.log"
        return path.read_text() if path.exists() else ""

    def metrics(self, name):
        path = self.folder / name / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def model(self, name):
        return torch.load(self.folder / name / "last.pt", weights_only=True)["model"]


def wait_for(condition, seconds=300):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "waited in vain"
        time.sleep(0.5)


def left_running(folder, seconds=20):
    """Processes of this Flower home that still run after so many seconds."""
    mark, end = f"FLWR_HOME={folder}".encode(), time.time() + seconds
    while True:
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if mark in (process / "environ").read_bytes().split(b"\0"):
                    found.append((process / "cmdline").read_bytes())
            except OSError:
                pass
        if not found or time.time() > end:
            return found
        time.sleep(0.5)


def test_prepare_goes_on_with_what_this_app_trains_and_nothing_else(monkeypatch, tmp_path):
    import server_app

    monkeypatch.setattr("data.draw_patterns", lambda: draw_patterns(120, 40))
    monkeypatch.chdir(tmp_path)
    flags = "--dataset patterns --width 2 --clients 3 --alpha 1 --batch-size 16 --rounds 2".split()
    flags += ["--device", "cpu"]
    for out, more in (
        ("dsr", ["--method", "dsr", "--local-epochs", "1"]),
        ("hsd", ["--method", "hsd", "--rounds", "0"]),
        ("bare", ["--no-projector", "--rounds", "0"]),
    ):
        train.main([*flags, "--out", out, *more])
    monkeypatch.setattr(sys, "argv", ["mine.py"])
    train.main([*flags, "--out", "mine", "--rounds", "0"], objective=lambda *_, **__: None)
    config, split, model, history = server_app.prepare({"rounds": ""}, "dsr/last.pt")
    assert (config["rounds"], config["gamma"], config["out"]) == (2, 1.0, "dsr")
    assert len(split) == 3 and len(history) == 2
    assert server_app.prepare({"rounds": 7}, "dsr/last.pt")[0]["rounds"] == 7
    assert server_app.prepare({"rounds": "", "clients": 4}, "")[0]["rounds"] == 100
    for rounds, checkpoint, words in (
        (1, "dsr/last.pt", "rounds=1: 2 are done already"),
        ("", "hsd/last.pt", "is of another method"),
        ("", "bare/last.pt", "is of another method"),
        ("", "mine/last.pt", "is of another method"),
    ):
        with pytest.raises(ValueError, match=words):
            server_app.prepare({"rounds": rounds}, checkpoint)


def test_no_node_is_one_line(federation):
    out = federation.run("none", node_timeout=3)
    assert "no node within 3 s" in out and "Traceback" not in out
    assert not (federation.folder / "none").exists()


def test_a_node_without_a_registered_key_is_refused(federation):
    node = federation.start_node(K + 1)
    assert node.wait(120) != 0
    assert "Failed to initialize the connection" in federation.log(f"client-{K + 1}")


def test_mistakes_of_nodes_stop_the_run_before_training(federation):
    images = f'images="{federation.dataset}"'
    clients = {0: 0, 1: 0, 2: 7}  # key -> the client that the node says it is
    nodes = [federation.start_node(key, f"client={k} {images}") for key, k in clients.items()]
    nodes.append(federation.start_node(K, f"client=1 {images}", path=federation.folder))
    wait_for(lambda: all("SuperNode ID" in federation.log(f"client-{k}") for k in range(K + 1)))
    out = federation.run("mistakes")
    demo.end(nodes)
    assert "is client 0 already" in out and "client 7 is not one of 0 to 2" in out
    assert "data.py is not on this machine's PYTHONPATH" in out
    assert "Traceback" not in out and not (federation.folder / "mistakes").exists()


def test_same_weights_as_train_py_and_resume(federation):
    for k in range(K):
        federation.nodes.append(federation.start_node(k))
    federation.run("two", rounds=2)
    flags = f"--dataset {federation.dataset} --split-file {federation.split} --no-amp --device cpu"
    command = [sys.executable, str(ROOT / "train.py"), *TRAIN, *flags.split()]
    for rounds in (2, 3):
        folder = federation.folder / f"train-{rounds}"
        subprocess.run([*command, "--rounds", str(rounds), "--out", str(folder)], check=True)
    assert_equal(federation, "two", "train-2")
    federation.run("more", rounds=3, lr=1.0, resume=f"{federation.folder}/two/last.pt")
    assert_equal(federation, "two", "train-3")


def assert_equal(federation, one, two):
    """The same weights, bit by bit, and in metrics.jsonl the same numbers but for the seconds."""
    for a, b in zip(federation.metrics(one), federation.metrics(two), strict=True):
        assert {**a, "seconds": 0} == {**{name: b[name] for name in a}, "seconds": 0}
    one, two = federation.model(one), federation.model(two)
    assert list(one) == list(two)
    for name, value in one.items():
        assert value.dtype == two[name].dtype and torch.equal(value, two[name]), name


def test_a_killed_node_is_missed_and_comes_back(federation):
    seen = federation.log("client-2").count("train message")
    federation.start_run("killed", rounds=1000)
    wait_for(lambda: federation.log("client-2").count("train message") > seen)
    os.killpg(federation.nodes[2].pid, signal.SIGKILL)
    wait_for(lambda: federation.metrics("killed"))
    assert federation.metrics("killed")[0]["left_out"] == [2]
    said = "round 1: client 2 left out, no answer"  # the log comes a little behind
    wait_for(lambda: said in federation.log("killed"))

    def is_back():
        if federation.nodes[2].poll() is not None:  # refused while the old one counts as online
            federation.nodes[2] = federation.start_node(2)
        return federation.metrics("killed")[-1]["left_out"] == []

    wait_for(is_back)
    run = federation.log("killed").split("started run ")[1].split()[0]
    demo.flwr(federation.folder, "stop", run, check=True)


def test_answers_that_cannot_be_averaged_or_do_not_come_are_left_out(federation, tmp_path):
    demo.end(federation.nodes)
    seconds = 10 + 2 * int(max(line["seconds"] for line in federation.metrics("two")))
    (tmp_path / "nan").mkdir()
    (tmp_path / "nan" / "losses.py").write_text(
        "import torch\n\n\ndef ssd_loss(h, *_, **__):\n    return h.sum() * torch.nan, {}\n"
    )
    (tmp_path / "shapes").mkdir()
    (tmp_path / "shapes" / "model.py").write_text(
        (ROOT / "model.py").read_text().split("if __name__")[0]
        + "\n\nplain = SSDNet.state_dict\nSSDNet.state_dict = "
        "lambda self, *a, **b: {**plain(self, *a, **b), 'projector.0.bias': torch.zeros(3)}\n"
        "import torch\n"
    )
    (tmp_path / "slow").mkdir()
    (tmp_path / "slow" / "losses.py").write_text(
        "import time\n\n\ndef ssd_loss(*_, **__):\n    time.sleep(3600)\n"
    )
    federation.start_node(0, f'client=0 images="{federation.dataset}/train/3"')
    federation.start_node(1, path=f"{tmp_path}/nan:{ROOT}")
    federation.start_node(2, path=f"{tmp_path}/shapes:{ROOT}")
    images = f'images="{federation.dataset}"'
    federation.start_node(3, f"client=3 {images}", path=f"{tmp_path}/slow:{ROOT}")
    no_split = {"clients": 4, "dataset": "federation", "split_file": ""}
    out = federation.run("faulty", rounds=1, round_timeout=seconds, **no_split)
    assert [line["left_out"] for line in federation.metrics("faulty")] == [[1, 2, 3]], out
    assert "client 1 left out, refused: its loss or its weights are not finite" in out
    assert "client 2 left out, refused: the weights have other names, shapes or types" in out
    assert "client 3 left out, no answer" in out
    assert federation.metrics("faulty")[0]["seconds"] < seconds + 30
    evaluation = f"eval.py {federation.folder}/faulty/last.pt --epochs 1 --finetune --dataset"
    command = [sys.executable, *evaluation.split(), str(federation.dataset)]
    subprocess.run(command, cwd=ROOT, check=True)


def test_demo_ends_everything_on_ctrl_c(tmp_path):
    command = [sys.executable, str(ROOT / "extras" / "flower" / "demo.py")]
    options = {"stdout": subprocess.PIPE, "text": True, "cwd": tmp_path, "start_new_session": True}
    restore = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731
    process = subprocess.Popen(command, preexec_fn=restore, **options)
    try:
        for line in process.stdout:
            if "process" in line and "serverapp" in line:
                break
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(60) == 130
    finally:
        process.kill()
    (folder,) = (tmp_path / "runs").iterdir()
    assert not left_running(folder)
