"""One client of a federation: local training on its own images, as federated.py's steps 3 and 4.

A node is started with  --node-config 'client=3 images="folder"'  and reads all images below that
folder; for a demonstration  'client=3 split="split.json" dataset="patterns"'  reads client 3's part
of a data set. A node of Flower's simulation is the client of its partition-id, and the run config
names split and data set. What leaves the node: weights, number of images, the loss terms' means.
"""

from pathlib import Path

import core  # first: it makes mistakes one line
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from data import EXTENSIONS, load_dataset, read_images, read_split, two_views
from federated import keyed_generator, train_client
from losses import ssd_loss
from model import SSDNet, pick_device

app = ClientApp()


@app.query()
def hello(message, context):
    """Which client this node is."""
    metrics = MetricRecord({"client": find_source(context)["client"]})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)


@app.train()
def train(message, context):
    """The round's global weights -> this client's weights after local training, and a report."""
    config, source = message.content["config"], find_source(context)
    k = source["client"]
    if k != config["client"]:
        raise core.Mistake(f"this node is client {k}, no longer {config['client']}")
    # What a node keeps until the run ends; Flower starts a process for every message.
    kept = context.state
    if "d_k" in config:
        kept["d_k"] = ConfigRecord({"d_k": config["d_k"]})  # it is sent once
    if "d_k" not in kept:
        raise core.Mistake("a node that was started anew has no d_k: the next round sends it")
    if "images" not in kept:  # so they are decoded once
        kept["images"] = ArrayRecord({"images": read_source(source, config["image_size"])})
    with core.user_input():
        device = pick_device(source.get("device", "auto"))
    d_k = torch.tensor(kept["d_k"]["d_k"], device=device)
    images = kept["images"].to_torch_state_dict()["images"].to(device)
    weights = {name: config[name] for name in ("beta", "gamma", "delta")}

    def loss(model, batch, k, generator, global_state):
        x1, x2 = two_views(batch, generator)
        (h1, u1), (h2, u2) = model(x1), model(x2)  # BatchNorm sees one view at a time
        return ssd_loss(h1, u1, h2, u2, d_k, **weights)

    # 2. Send: what has arrived are the round's global weights.
    model = SSDNet(config["width"]).to(device, memory_format=torch.channels_last)
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    sgd = {name: config[name] for name in ("lr", "momentum", "weight_decay")}
    optimizer = torch.optim.SGD(model.parameters(), **sgd)
    # 3. Train locally, on the client's own images alone.
    rng = keyed_generator(config["seed"], "client", config["round"], k)
    epochs, batch_size, index = config["local_epochs"], config["batch_size"], range(len(images))
    terms = train_client(model, optimizer, images, index, loss, k, rng, epochs, batch_size)
    # 4. Return the weights and the sample count.
    report = MetricRecord({**terms, "num-examples": len(images)})
    content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": report})
    return Message(content, reply_to=message)


def find_source(context):
    """Which client this node is and where its images are: the node config, or a simulation's."""
    source, run_config = dict(context.node_config), context.run_config
    if "partition-id" in source and "client" not in source:
        source["client"] = source["partition-id"]
        source |= {"split": run_config["split-file"], "dataset": run_config["dataset"]}
        if not source["split"]:
            text = 'a simulation needs the run config  dataset="patterns" split-file="split.json"'
            raise core.Mistake(text)
    place = source.keys() & {"images", "split", "dataset"}
    if type(source.get("client")) is not int or place not in ({"images"}, {"split", "dataset"}):
        raise core.Mistake(f'--node-config must be  client=ID images="FOLDER", not {source}')
    return source


@core.user_input()
def read_source(source, size):
    """-> uint8 (n, 3, size, size): all images below a folder, or the client's part of a split."""
    if "split" in source:
        split, k = read_split(source["split"]), source["client"]
        if k >= len(split):
            raise ValueError(f"{source['split']} has {len(split)} clients, none of id {k}")
        part = sorted(split[k].tolist())  # the order that train.py has
        return load_dataset(source["dataset"], image_size=size).train_x[part]
    paths = [str(path) for path in sorted(Path(source["images"]).rglob("*"))]
    paths = [path for path in paths if path.lower().endswith(EXTENSIONS)]
    if len(paths) < 2:
        raise ValueError(f"{source['images']} has {len(paths)} images, a client needs 2 at least")
    return read_images(paths, size)
