"""The server of a federation: federated.py's steps 1, 2 and 5, as a strategy of Flower.

It sends weights, the round's number, the settings and, once to every node, its d_k; without
split-file it sees no image. It writes the run folder that train.py writes, for eval.py, and goes on
from it with the run config  resume="runs/NAME/last.pt".
"""

import time
from pathlib import Path

import core  # first: it makes mistakes one line
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg

import train
from data import load_dataset, read_split
from federated import average_states, choose_clients, keyed_generator, mean_terms
from losses import scaling_vectors
from model import load_checkpoint

OWN = ("resume", "round-timeout", "node-timeout")  # the run config's other keys are train.py's
SENT = "beta gamma delta lr momentum weight_decay local_epochs batch_size width seed".split()
SENT += ["image_size"]
TERMS = ("loss", "align", "uniform", "dsr", "distill")  # what a client reports
app = ServerApp()


@app.main()
def main(grid, context):
    """Run config -> network and nodes -> rounds -> run folder."""
    run_config = dict(context.run_config)
    resume, round_timeout, node_timeout = (run_config.pop(key) for key in OWN)
    with core.user_input():
        config, split, model, history = prepare(run_config, resume)
        strategy = SSD(config, split, model, history, node_timeout, round_timeout)
        strategy.wait_for_nodes(grid)
        if not resume:
            train.open_run(config, {"history": []}, split, model)
    arrays = ArrayRecord(model.state_dict())
    strategy.start(grid, arrays, config["rounds"] - len(history), timeout=round_timeout)
    data = "" if split else " --dataset DATA"
    out = config["out"]
    print(f"run folder {out}/  next: python eval.py {out}/last.pt{data}", flush=True)


def prepare(run_config, resume):
    """Flags of train.py and "" or a last.pt -> config, split (or []), network, history."""
    parser = train.build_parser()
    parser.error = refuse
    flags = [f"--{key}={value}" for key, value in run_config.items() if value != ""]
    config = {**vars(parser.parse_args(flags)), "amp": False}
    if resume:  # its settings hold, but that rounds may be raised
        checkpoint, model = load_checkpoint(resume)
        saved, history = checkpoint["config"], checkpoint["history"]
        known = saved["method"] in train.METHODS.keys() - {"hsd"} and saved["projector"]
        if not known or saved.keys() - config.keys():
            raise ValueError(f"{resume} is of another method than this app trains")
        rounds = config["rounds"] if run_config["rounds"] != "" else saved["rounds"]
        if rounds < len(history):
            raise ValueError(f"run config: rounds={rounds}: {len(history)} are done already")
        config = {**saved, "amp": False, "rounds": rounds, "out": str(Path(resume).parent)}
        return config, [part.numpy() for part in checkpoint["split"]], model, history
    split = read_split(config["split_file"]) if config["split_file"] else []
    if split and len(split) != config["clients"]:
        raise ValueError(f"run config: clients={config['clients']}, the split has {len(split)}")
    return config, split, train.make_model(config).to(memory_format=torch.channels_last), []


def refuse(message):
    """A wrong value in the run config, in argparse's words."""
    raise ValueError(f"run config: {message}")


class SSD(FedAvg):
    """FedAvg whose clients have ids of their own, each with its d_k, and average_states inside."""

    def __init__(self, config, split, model, history, node_timeout, round_timeout):
        share, one = config["participation"], {"min_train_nodes": 1, "min_available_nodes": 1}
        super().__init__(fraction_train=share, fraction_evaluate=0.0, **one)
        self.config, self.split, self.model, self.history = config, split, model, history
        self.node_timeout, self.round_timeout = node_timeout, round_timeout
        d = config["clients"], 8 * config["width"], config["scale"], config["seed"]
        self.d, self.monitor = scaling_vectors(*d), lambda model: {}
        self.nodes, self.have_d = {}, set()  # client -> its node; clients whose node keeps d_k
        if split:  # a demonstration: the server has the labelled data
            data = load_dataset(config["dataset"], config["data_dir"], config["image_size"])
            config["images"] = data.fingerprint()
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
        print(f"nodes of client {sorted(self.nodes)} are here", flush=True)

    def greet(self, grid):
        """Ask every new node which client it is -> mistakes, a line each."""
        online, mistakes = list(grid.get_node_ids()), []
        new = [node for node in online if node not in self.nodes.values()]
        questions = [Message(RecordDict(), node, MessageType.QUERY) for node in new]
        for reply in grid.send_and_receive(questions, timeout=self.node_timeout):
            node = reply.metadata.src_node_id
            try:
                k = content_of(reply)["metrics"]["client"]
                if k not in range(self.config["clients"]):
                    raise ValueError(f"client {k} is not one of 0 to {self.config['clients'] - 1}")
                if self.nodes.get(k) in online:
                    raise ValueError(f"node {self.nodes[k]} is client {k} already")
                self.nodes[k] = node
                self.have_d.discard(k)
            except Exception as error:  # whatever an unknown node answers
                mistakes.append(f"node {node}: {error}")
        return mistakes

    def configure_train(self, server_round, arrays, config, grid):
        """The round's messages, one for every chosen client that is there."""
        self.began, r = time.time(), len(self.history)
        for mistake in self.greet(grid):
            print(f"not let in: {mistake}", flush=True)
        # 1. Choose: the server draws this round's clients.
        generator = keyed_generator(self.config["seed"], "clients", r)
        share = self.config["participation"]
        self.clients = choose_clients(self.config["clients"], share, generator)
        # 2. Send: every client starts from the same global weights.
        online, messages = set(grid.get_node_ids()), []
        for k in self.clients:
            settings = {"client": k, "round": r, **{name: self.config[name] for name in SENT}}
            if k not in self.have_d:
                settings["d_k"] = self.d[k].tolist()
            content = RecordDict({"arrays": arrays, "config": ConfigRecord(settings)})
            if (node := self.nodes.get(k)) in online:
                ttl = self.round_timeout  # a node that comes back later does not begin it
                messages.append(Message(content, node, MessageType.TRAIN, ttl=ttl))
        return messages

    def aggregate_train(self, server_round, replies):
        """The clients' answers -> the new global weights; a line of metrics.jsonl, last.pt."""
        r, client_of = len(self.history) + 1, {node: k for k, node in self.nodes.items()}
        states, reports, why = {}, {}, {}
        for reply in replies:
            k = client_of.get(reply.metadata.src_node_id)
            try:
                states[k], reports[k] = self.check(content_of(reply))
            except Exception as error:  # whatever a node answers
                why[k] = f"refused: {error}"
        kept = sorted(states)
        left_out = [k for k in self.clients if k not in kept]
        self.have_d = self.have_d.difference(left_out).union(kept)
        for k in left_out:
            print(f"round {r}: client {k} left out, {why.get(k, 'no answer')}", flush=True)
        if not kept:
            go_on = f'go on with run config resume="{self.config["out"]}/last.pt"'
            raise core.Mistake(f"round {r}: no client has an answer that can be used; {go_on}")
        # 5. Average: in ascending order of the clients, as train.py does, so the sums are equal.
        weights = [reports[k].pop("num-examples") for k in kept]
        self.model.load_state_dict(average_states([states[k] for k in kept], weights))
        terms = mean_terms([reports[k] for k in kept], weights)
        line = {"round": r, "lr": self.config["lr"], "seconds": time.time() - self.began}
        line |= {"clients": self.clients, "left_out": left_out}
        self.history.append({**line, **terms, **self.monitor(self.model)})
        train.save_round(self.config, self.split, self.model, self.history)
        return ArrayRecord(self.model.state_dict()), MetricRecord(terms)

    def check(self, content):
        """An answer's content -> its state dict and its report; ValueError with what is wrong."""
        state, report = content["arrays"].to_torch_state_dict(), dict(content["metrics"])
        sent = self.model.state_dict()
        if list(map(describe, state.items())) != list(map(describe, sent.items())):
            raise ValueError("the weights have other names, shapes or types than those sent")
        numbers = [torch.tensor(float(value)) for value in report.values()]
        if not all(value.isfinite().all() for value in [*state.values(), *numbers]):
            raise ValueError("its loss or its weights are not finite")
        if report.keys() != {"num-examples", *TERMS} or not report["num-examples"] >= 1:
            raise ValueError(f"its report is {report}")
        return state, report


def describe(entry):
    """Name, shape and dtype of a state dict's entry."""
    return entry[0], entry[1].shape, entry[1].dtype


def content_of(reply):
    """A reply's content; ValueError with the reason if the node could not do it."""
    if reply.has_error():
        raise ValueError(reply.error.reason)
    return reply.content
