"""The server of a federation: federated.py's steps 1, 2 and 5, as a strategy of Flower.

It sends weights, the round's number, the settings and, once to every node, its d_k; it never sees
an image. It writes the run folder that train.py writes, for eval.py, and goes on from it with the
run config  resume="runs/NAME/last.pt".
"""

import math
import time
from pathlib import Path

import core  # noqa: F401, first: it makes mistakes one line
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg

import train
from data import load_dataset, read_split
from eval import load_checkpoint
from federated import average_states, choose_clients, keyed_generator
from losses import scaling_vectors

OWN = ("resume", "round-timeout", "node-timeout")  # the run config's other keys are train.py's
SENT = "beta gamma delta lr momentum weight_decay local_epochs batch_size width seed".split()
app = ServerApp()


@app.main()
def main(grid, context):
    """Run config -> network and nodes -> rounds -> run folder."""
    run_config = dict(context.run_config)
    resume, round_timeout, node_timeout = (run_config.pop(key) for key in OWN)
    parser = train.build_parser()
    parser.error = refuse
    flags = [f"--{key}={value}" for key, value in run_config.items() if value != ""]
    config = {**vars(parser.parse_args(flags)), "amp": False}
    split, history, model = [], [], train.make_model(config)
    if config["split_file"]:
        split = read_split(config["split_file"])
    if resume:  # its settings hold, but for the number of rounds
        checkpoint, model = load_checkpoint(resume)
        own = {"rounds": config["rounds"], "out": str(Path(resume).parent)}
        config, history = {**checkpoint["config"], **own}, checkpoint["history"]
        split = [part.numpy() for part in checkpoint["split"]]
    if split and len(split) != config["clients"]:
        raise ValueError(f"run config: clients={config['clients']}, the split has {len(split)}")
    strategy = SSD(config, split, model, history, node_timeout, round_timeout)
    strategy.wait_for_nodes(grid)
    if not resume:
        train.open_run(config, split, model, torch.device("cpu"))
    arrays = ArrayRecord(model.state_dict())
    strategy.start(grid, arrays, config["rounds"] - len(history), timeout=round_timeout)
    print(f"run folder {config['out']}/  next: python eval.py {config['out']}/last.pt", flush=True)


def refuse(message):
    """A wrong value in the run config, in argparse's words."""
    raise ValueError(f"run config: {message}")


class SSD(FedAvg):
    """FedAvg whose clients have ids of their own, each with its d_k, and average_states inside."""

    def __init__(self, config, split, model, history, node_timeout, round_timeout):
        super().__init__(fraction_evaluate=0.0)
        self.config, self.split, self.model, self.history = config, split, model, history
        self.node_timeout, self.round_timeout = node_timeout, round_timeout
        self.d = scaling_vectors(
            config["clients"], 8 * config["width"], config["scale"], config["seed"]
        )
        self.nodes, self.have_d = {}, set()  # client id -> node id; nodes that keep their d_k
        self.monitor = lambda model: {}
        if split:  # a demonstration: the server has the labelled data
            data = load_dataset(config["dataset"], config["data_dir"])
            self.monitor = train.make_monitor(config, data, split)

    def wait_for_nodes(self, grid):
        """Until every client has a node, or for node-timeout seconds; at least one is needed."""
        end = time.time() + self.node_timeout
        while len(self.nodes) < self.config["clients"] and time.time() < end:
            if mistakes := self.greet(grid):
                raise ValueError("; ".join(mistakes))
            time.sleep(1)
        if not self.nodes:
            raise ValueError(f"no node within {self.node_timeout} s: start flower-supernode first")

    def greet(self, grid):
        """Ask every new node which client it is -> mistakes, a line each."""
        online, mistakes = list(grid.get_node_ids()), []
        new = [node for node in online if node not in self.nodes.values()]
        questions = [Message(RecordDict(), node, MessageType.QUERY) for node in new]
        for reply in grid.send_and_receive(questions, timeout=self.node_timeout):
            node = reply.metadata.src_node_id
            if reply.has_error():
                mistakes.append(f"node {node}: {reply.error.reason}")
                continue
            k = reply.content["metrics"]["client"]
            if not 0 <= k < self.config["clients"]:
                mistakes.append(f"node {node} is client {k}, not one of 0 to {len(self.d) - 1}")
            elif self.nodes.get(k) in online:
                mistakes.append(f"nodes {self.nodes[k]} and {node} are both client {k}")
            else:
                self.nodes[k] = node
        return mistakes

    def configure_train(self, server_round, arrays, config, grid):
        """The round's messages, one for every chosen client that is there."""
        self.began, r = time.time(), len(self.history)
        for mistake in self.greet(grid):
            print(f"left aside: {mistake}", flush=True)
        # 1. Choose: the server draws this round's clients.
        share, generator = (
            self.config["participation"],
            keyed_generator(self.config["seed"], "clients", r),
        )
        self.clients = choose_clients(self.config["clients"], share, generator)
        # 2. Send: every client starts from the same global weights.
        online, messages = set(grid.get_node_ids()), []
        for k in self.clients:
            if (node := self.nodes.get(k)) in online:
                settings = {"round": r, **{name: self.config[name] for name in SENT}}
                if node not in self.have_d:
                    settings["d_k"] = self.d[k].tolist()
                content = RecordDict({"arrays": arrays, "config": ConfigRecord(settings)})
                ttl = self.round_timeout
                messages.append(Message(content, node, MessageType.TRAIN, ttl=ttl))
        return messages

    def aggregate_train(self, server_round, replies):
        """The clients' answers -> the new global weights; a line of metrics.jsonl, last.pt."""
        client_of = {node: k for k, node in self.nodes.items()}
        states, terms, counts, why = {}, {}, {}, {}
        for reply in replies:
            k = client_of.get(reply.metadata.src_node_id)
            try:
                states[k], terms[k] = self.check(reply, k)
                counts[k] = terms[k].pop("num-examples")
            except (ValueError, KeyError, TypeError) as error:
                why[k] = str(error)
        self.have_d = {self.nodes[k] for k in states}
        left_out = [k for k in self.clients if k not in states]
        for k in left_out:
            print(f"left out: client {k}, {why.get(k, 'missing: no answer in time')}", flush=True)
        if not states:
            go_on = f'; go on with run config resume="{self.config["out"]}/last.pt"'
            raise ValueError(
                f"round {len(self.history) + 1}: no client's answer can be used{go_on}"
            )
        # 5. Average: in ascending order of the ids, as train.py does, so the sums are the same.
        kept = sorted(states)
        state = average_states([states[k] for k in kept], [counts[k] for k in kept])
        self.model.load_state_dict(state)
        total = sum(counts.values())
        means = {
            name: sum(counts[k] * terms[k][name] for k in kept) / total for name in terms[kept[0]]
        }
        self.history.append(
            {
                "round": len(self.history) + 1,
                "lr": self.config["lr"],
                "clients": self.clients,
                "left_out": left_out,
                "seconds": round(time.time() - self.began, 2),
                **means,
                **self.monitor(self.model),
            }
        )
        train.save(Path(self.config["out"]), self.config, self.split, self.model, self.history)
        return ArrayRecord(self.model.state_dict()), MetricRecord(means)

    def check(self, reply, k):
        """An answer -> its state dict and its metrics; ValueError with the reason to refuse it."""
        if reply.has_error():
            raise ValueError(reply.error.reason)
        state = reply.content["arrays"].to_torch_state_dict()
        metrics = dict(reply.content["metrics"])
        sent = self.model.state_dict()
        if metrics.pop("client") != k:
            raise ValueError("refused: it now says that it is another client")
        if {name: (value.shape, value.dtype) for name, value in state.items()} != {
            name: (value.shape, value.dtype) for name, value in sent.items()
        }:
            raise ValueError(
                "refused: its weights have other names, shapes or types than were sent"
            )
        if not (math.isfinite(metrics["loss"]) and all(v.isfinite().all() for v in state.values())):
            raise ValueError("its loss or weights are not finite")
        return state, metrics
