"""One client of a federation: local training on its own images, as federated.py's steps 3 and 4.

A node is started with  --node-config 'client=3 images="folder"'  and reads all images below that
folder; for a demonstration  'client=3 split="split.json" dataset="patterns"'  reads client 3's part
of a data set. What leaves the node: weights, number of images, the loss terms' means.
"""

from pathlib import Path

import core  # noqa: F401, first: it makes mistakes one line
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
    metrics = MetricRecord({"client": own_id(context.node_config)})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)


@app.train()
def train(message, context):
    """The round's global weights -> this client's weights after local training, and a report."""
    config, k = message.content["config"], own_id(context.node_config)
    if k != config["client"]:
        raise ValueError(f"this node is client {k}, no longer {config['client']}")
    if "d_k" in config:
        context.state["kept"] = ConfigRecord({"d_k": config["d_k"]})  # it is sent once
    if "kept" not in context.state:
        raise ValueError("a node that was started anew has no d_k: the next round sends it")
    device = pick_device(context.node_config.get("device", "auto"))
    d_k = torch.tensor(context.state["kept"]["d_k"], device=device)
    images = own_images(context.node_config, k, config["image_size"]).to(device)
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


def own_id(config):
    """Node config -> the client's id; ValueError without one, or with no place to find images."""
    source = config.keys() & {"images", "split", "dataset"}
    if type(config.get("client")) is not int or source not in ({"images"}, {"split", "dataset"}):
        raise ValueError(f'--node-config must be  client=ID images="FOLDER", not {dict(config)}')
    return config["client"]


def own_images(config, k, size):
    """Node config -> uint8 (n, 3, size, size): all images below a folder, or part k of a split."""
    if "split" in config:
        part = sorted(read_split(config["split"])[k].tolist())  # the order that train.py has
        return load_dataset(config["dataset"]).train_x[part]
    paths = [str(path) for path in sorted(Path(config["images"]).rglob("*"))]
    paths = [path for path in paths if path.lower().endswith(EXTENSIONS)]
    if len(paths) < 2:
        raise ValueError(f"{config['images']} has {len(paths)} images, a client needs 2 at least")
    return read_images(paths, size)
