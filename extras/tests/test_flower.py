"""extras/flower: its rules with nodes in this process, then real processes over loopback.

Needs flwr (pip install "flwr>=1.42"); without it everything here is skipped.
"""

import json
import logging
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import tomllib
import torch
from PIL import Image

pytest.importorskip("flwr", reason='flwr is not installed: pip install "flwr>=1.42"')
ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "extras" / "flower"))

import client_app  # noqa: E402
import core  # noqa: E402
import demo  # noqa: E402
import server_app  # noqa: E402
from flwr.app import ArrayRecord, Context, Error, Message, RecordDict  # noqa: E402
from flwr.supercore.task_identity import TaskIdentity  # noqa: E402

import train  # noqa: E402
from data import draw_patterns, read_images  # noqa: E402

FLAGS = "--clients 2 --width 16 --local-epochs 1 --batch-size 16 --lr 0.03".split()


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """A folder of 60 training and 40 test images, and their split over two clients."""
    folder = tmp_path_factory.mktemp("images")
    data = draw_patterns(60, 40)
    parts = {"train": (data.train_x, data.train_y), "test": (data.test_x, data.test_y)}
    for part, (pictures, labels) in parts.items():
        for i, (picture, label) in enumerate(zip(pictures, labels)):
            path = folder / part / str(int(label)) / f"{i:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture.permute(1, 2, 0).numpy()).save(path)
    (folder / "split.json").write_text(json.dumps([list(range(0, 40)), list(range(40, 60))]))
    return folder


@pytest.fixture(scope="session")
def expected(images, tmp_path_factory):
    """Run folders of train.py after two rounds and after three."""
    folder = tmp_path_factory.mktemp("train")
    flags = [*FLAGS, "--no-amp", "--device", "cpu", "--dataset", str(images)]
    flags += ["--split-file", f"{images}/split.json"]
    for rounds in ("2", "3"):
        train.main([*flags, "--rounds", rounds, "--out", str(folder / rounds)])
    return folder


def run_config(images, out, **changes):
    """The run config of a demonstration with two clients, with FLAGS."""
    text = (ROOT / "extras" / "flower" / "pyproject.toml").read_text()
    config = tomllib.loads(text)["tool"]["flwr"]["app"]["config"]
    config |= {"clients": 2, "rounds": 2, "width": 16, "local-epochs": 1, "batch-size": 16}
    config |= {"lr": 0.03, "dataset": str(images), "split-file": f"{images}/split.json"}
    changes = {name.replace("_", "-"): value for name, value in changes.items()}
    return config | {"out": str(out)} | changes


def node_config(images, k):
    return {"client": k, "split": f"{images}/split.json", "dataset": str(images), "device": "cpu"}


def assert_equal(one, two):
    """Two run folders: the same weights, bit by bit, and the same numbers but for the seconds."""
    metrics = [(folder / "metrics.jsonl").read_text().splitlines() for folder in (one, two)]
    for a, b in zip(*metrics, strict=True):
        a, b = json.loads(a), json.loads(b)
        assert {**a, "seconds": 0} == {**{name: b[name] for name in a}, "seconds": 0}
    one, two = (torch.load(folder / "last.pt", weights_only=True)["model"] for folder in (one, two))
    assert list(one) == list(two)
    for name, value in one.items():
        assert value.dtype == two[name].dtype and torch.equal(value, two[name]), name


class Here:
    """A grid whose nodes are in this process; `answer(node, reply)` may change or drop a reply."""

    def __init__(self, node_configs, config, answer=lambda node, reply: reply):
        TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1  # as Flower's process
        self.contexts, self.config, self.answer = {}, config, answer
        for node, node_config in enumerate(node_configs):
            self.contexts[node] = Context(1, node, node_config, RecordDict(), config)

    def get_node_ids(self):
        return list(self.contexts)

    def send_and_receive(self, messages, timeout):
        for message in messages:
            node = message.metadata.dst_node_id
            try:
                reply = client_app.app(message, self.contexts[node])
            except Exception as error:  # as Flower's own process does
                reply = Message(Error(0, f"{type(error)}:<'{error}'>"), reply_to=message)
            if reply := self.answer(node, reply):
                yield reply

    def run(self):
        server_app.app(self, Context(1, 0, {}, RecordDict(), self.config))


def test_same_weights_as_train_py_and_resume(images, expected, tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(client_app, "read_images", lambda *a: read.append(a) or read_images(*a))
    nodes = [node_config(images, k) for k in (1, 0)]
    Here(nodes, run_config(images, tmp_path / "run")).run()
    assert_equal(tmp_path / "run", expected / "2")
    more = run_config(images, "", rounds=3, lr=1.0, resume=f"{tmp_path}/run/last.pt")
    Here(nodes, more).run()
    assert_equal(tmp_path / "run", expected / "3")
    nodes = [{"partition-id": k, "num-partitions": 2} for k in (0, 1)]  # of a simulation
    Here(nodes, run_config(images, tmp_path / "simulated")).run()
    assert_equal(tmp_path / "simulated", expected / "2")
    nodes = [{"client": k, "images": f"{images}/train/{k}", "device": "cpu"} for k in (0, 1)]
    Here(nodes, run_config(images, tmp_path / "own", split_file="", dataset="federation")).run()
    assert len(read) == 2  # two rounds, two clients: each decodes its images once


def test_prepare_goes_on_with_what_this_app_trains_and_nothing_else(monkeypatch, tmp_path):
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


@pytest.mark.parametrize(
    "nodes, changes, words",
    [
        ([], {"node_timeout": 1}, "no node within 1 s"),
        ([0, 0], {}, "node 0 is client 0 already"),
        ([0, 7], {}, "client 7 is not one of 0 to 1"),
        ([{"images": "folder"}], {}, "--node-config must be  client=ID"),
        ([{"partition-id": 0}], {"split_file": ""}, "a simulation needs the run config"),
        ([0], {"lr": -1}, "run config: argument --lr: -1 is not"),
        ([0], {"clients": 3}, "clients=3, the split has 2"),
        ([0], {"resume": "nowhere/last.pt"}, "nowhere/last.pt"),
    ],
)
def test_a_mistake_is_one_line_and_starts_no_run(images, tmp_path, nodes, changes, words):
    configs = [{"client": k, "images": "x"} if type(k) is int else k for k in nodes]
    with pytest.raises(core.Mistake, match=words):
        Here(configs, run_config(images, tmp_path / "run", **changes)).run()
    assert not (tmp_path / "run").exists()


def test_only_a_mistake_loses_its_traceback():
    for error, text in ((core.Mistake("no images"), "no images"), (ValueError("bug"), "raised")):
        info = (type(error), error, None)
        record = logging.LogRecord("flwr", logging.ERROR, "", 0, "%s raised", ("it",), info)
        assert core.in_one_line(record)
        assert text in record.getMessage() and bool(record.exc_info) == (text == "raised")


def test_answers_that_cannot_be_averaged_or_do_not_come_are_left_out(images, tmp_path, capsys):
    def answer(node, reply):
        if reply.has_error() or "arrays" not in reply.content or node == 0:
            return reply
        arrays = reply.content["arrays"].to_torch_state_dict()
        if node == 1:
            arrays["encoder.conv1.weight"][0] = torch.nan
        if node == 2:
            arrays["projector.0.bias"] = torch.zeros(3)
        if node == 3:
            return None
        if node == 4:
            reply.content["metrics"]["num-examples"] = 0
        reply.content["arrays"] = ArrayRecord(arrays)
        return reply

    nodes = [{"client": k, "images": f"{images}/train/{k}"} for k in range(5)]
    nodes.append({"client": 5, "images": "nowhere"})
    changes = {"clients": 6, "dataset": "federation", "split_file": "", "rounds": 1}
    changes["node_timeout"] = 1  # for the second run, which misses a node
    grid = Here(nodes, run_config(images, tmp_path / "run", **changes), answer)
    grid.run()
    (line,) = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["left_out"] == [1, 2, 3, 4, 5]
    out = capsys.readouterr().out
    assert "client 1 left out, refused: its loss or its weights are not finite" in out
    assert "client 2 left out, refused: the weights have other names, shapes or types" in out
    assert "client 3 left out, no answer" in out
    assert "client 4 left out, refused: its report is" in out
    assert "client 5 left out, refused: <class 'core.Mistake'>:<'nowhere has 0 images" in out
    grid.contexts.pop(0)
    grid.config["resume"], grid.config["rounds"] = f"{tmp_path}/run/last.pt", 2
    with pytest.raises(core.Mistake, match="round 2: no client has an answer that can be used"):
        grid.run()


class Federation:
    """Processes that belong together: a superlink, nodes, runs; on leaving, all of them end."""

    def __init__(self, folder, images, registered=2):
        self.folder, self.images, self.registered = folder, images, registered

    def __enter__(self):
        self.address = demo.prepare(self.folder, 3)
        demo.start_superlink(self.folder, self.address)
        for k in range(self.registered):
            key = f"{self.folder}/client-{k}.pub"
            demo.flwr(self.folder, "supernode", "register", key, check=True)
        return self

    def __exit__(self, *error):
        demo.end(self.folder)
        assert not left_running(self.folder)

    def start_node(self, k):
        """Client k's node, which has the key of that number."""
        source = node_config(self.images, k)
        text = " ".join(f"{name}={json.dumps(value)}" for name, value in source.items())
        return demo.start_node(self.folder, self.address, f"client-{k}", text)

    def start_run(self, *flags, **changes):
        """Start the app -> the process, which writes run.log; the run folder is `run`."""
        config = run_config(self.images, self.folder / "run", **changes)
        text = " ".join(f"{name}={json.dumps(value)}" for name, value in config.items())
        command = "flwr", "run", str(demo.APP), "--stream", *flags, "--run-config", text
        return demo.start(self.folder, "run", *command)

    def log(self, name):
        return (self.folder / f"{name}.log").read_text()

    def metrics(self):
        path = self.folder / "run" / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_for(condition, seconds=300):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "waited in vain"
        time.sleep(0.2)


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
        time.sleep(0.2)


def test_real_nodes_with_keys_give_the_same_weights(images, expected, tmp_path):
    with Federation(tmp_path, images) as federation:
        federation.start_node(0)
        federation.start_node(1)
        stranger = federation.start_node(2)  # its key is not registered
        assert federation.start_run().wait(300) == 0
        assert_equal(tmp_path / "run", expected / "2")
        assert stranger.wait(60) != 0
        assert "Failed to initialize the connection" in federation.log("client-2")


def test_a_killed_node_is_missed_and_comes_back(images, tmp_path):
    with Federation(tmp_path, images) as federation:
        federation.start_node(0)
        node = federation.start_node(1)
        federation.start_run(rounds=1000)
        wait_for(lambda: "train message" in federation.log("client-1"))
        os.killpg(node.pid, signal.SIGKILL)
        wait_for(federation.metrics)
        assert federation.metrics()[0]["left_out"] == [1]
        said = "round 1: client 1 left out, no answer"  # the log comes a little behind
        wait_for(lambda: said in federation.log("run"))
        federation.start_node(1)
        wait_for(lambda: federation.metrics()[-1]["left_out"] == [])
