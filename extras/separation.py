"""Whose is the separation, the images' or the networks'? One round's networks, seen crosswise.

    python extras/separation.py runs/regime/*/last.pt    # a round for each: on a CPU, minutes

From a checkpoint every client trains the common network for one more round. Then client k's images
are embedded by k's network (own) or by an average of all; the same test images by every network
(same-images) and by mixtures of it and the common one (swap). Of z, and the first three of h:

    total, intra, inter   -log E exp(-2 ||z - z'||^2): all pairs, pairs of one client, of two
    own_share             of ||z||^2, in the client's own dimensions, those that d_k scales
    shares (K, K)         of ||z||^2 of client i's images, in client j's dimensions
"""

import argparse
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.optim.swa_utils import update_bn

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "extras")]

import law  # noqa: E402
import variants  # noqa: E402
from tables import current_commit  # noqa: E402

from data import load_dataset, two_views  # noqa: E402
from eval import encode, mean_parts  # noqa: E402
from federated import average_states, copy_state, keyed_generator  # noqa: E402
from losses import scaling_vectors  # noqa: E402
from model import load_checkpoint, pick_device  # noqa: E402
from train import make_optimizer, round_options  # noqa: E402

IMAGES = 400  # of each client, at most; as many test images
POOLED = 5000  # training images of all clients, from which BatchNorm's statistics are measured anew
LAST = "projector.3."  # the projector's last layer


def local_states(model, config, images, split, r):
    """Each client's state dict after its part of round r, before they are averaged."""
    states = []

    def keep(sent, weights, global_state, r, clients):
        states.extend(sent)
        return global_state

    config = {**config, "compile": False}  # one round is too short for it
    loss, one_round = variants.make_loss(config, images, split), variants.make_round(config)
    options = {**round_options(config), "participation": 1.0, "average": keep}
    report = one_round(model, make_optimizer(config, model), images, split, loss, r, **options)
    if report["left_out"]:
        raise ValueError(f"clients {report['left_out']} diverge in the round: nothing to measure")
    return states


def swap(state, other, part):
    """The state dict with the other's weights where their names begin with part."""
    return {name: (other if name.startswith(part) else state)[name] for name in state}


def recalibrate(model, images, generator, batch_size=250):
    """Measure BatchNorm's running statistics anew, in place: means over batches of two views.

    images uint8 (N, 3, H, W), in random order; both views of about batch_size of them are a batch.
    """
    order = torch.randperm(len(images), generator=generator)
    parts = order.tensor_split(max(1, len(images) // batch_size))
    update_bn((torch.cat(two_views(images[part], generator)) for part in parts), model)


def own_dimensions(config, num_clients):
    """(K, D) that marks the clients' own dimensions, and the basis (D, D) whose axes they are."""
    dim = config["embed_dim"] or 8 * config["width"]
    own = scaling_vectors(num_clients, dim, config["scale"], config["seed"]) != 1
    if config["method"] == "ssd-common":
        own = own[:1].expand_as(own)
    if config["method"] in ("dsr-authors", "ssd-authors"):
        return own, variants.random_axes(dim)
    return own, torch.eye(dim)


def networks_and_images(checkpoint, model, data, states=None):
    """{variant: (a state dict for each client, images for each client)}, what is to be embedded.

    The model holds the common network. states: the local ones, if that round has been trained.
    """
    config, split = checkpoint["config"], checkpoint["split"]
    everyone, common = len(split), copy_state(model)
    images = data.train_x.to(next(model.parameters()).device)
    draws = keyed_generator(config["seed"], "separation")

    def some(index, count):
        return index[torch.randperm(len(index), generator=draws)[:count]]

    mine = [images[some(index, IMAGES)] for index in split]
    pooled = images[some(torch.cat(split), POOLED)]
    test = [data.test_x[some(torch.arange(len(data.test_x)), IMAGES)]] * everyone
    if states is None:
        states = local_states(model, config, images, split, len(checkpoint["history"]))
    average = average_states(states, [len(index) for index in split])
    model.load_state_dict(average)
    recalibrate(model, pooled, keyed_generator(config["seed"], "recalibrate"))
    found = {
        "own": (states, mine),
        "average": ([average] * everyone, mine),
        "average-equal": ([average_states(states, [1] * everyone)] * everyone, mine),
        "average-recalibrated": ([copy_state(model)] * everyone, mine),
        "swap-none": ([common] * everyone, test),
    }
    if config["projector"]:
        found["swap-encoder"] = ([swap(common, state, "encoder.") for state in states], test)
        found["swap-all-but-last"] = ([swap(state, common, LAST) for state in states], test)
        found["swap-last"] = ([swap(common, state, LAST) for state in states], test)
    found["same-images"] = (states, test)
    return found


def measure(checkpoint, model, data, states=None):
    """Yields a dict for each variant and space; the model, on its device, is the checkpoint's."""
    config, sizes = checkpoint["config"], [len(index) for index in checkpoint["split"]]
    own, basis = own_dimensions(config, len(sizes))
    for variant, seen in networks_and_images(checkpoint, model, data, states).items():
        h, z, client, shares = [], [], [], []
        for k, (state, images) in enumerate(zip(*seen, strict=True)):
            model.load_state_dict(state)
            h_k, u_k = encode(model, images, config["amp"])
            h.append(h_k.cpu())
            z.append(F.normalize(u_k.cpu() @ basis, dim=1))
            client.append(torch.full((len(images),), k))
            shares.append((z[k].square() @ own.T.float()).mean(0))  # (K,)
        client, shares = torch.cat(client), torch.stack(shares)
        for space, rows in {"h": h, "z": z}.items():
            parts = mean_parts(torch.cat(rows), client)  # NaN where there is no pair
            line = {name: round(-value, 4) for name, value in parts.items() if value == value}
            if space == "z":
                line["own_share"] = round(shares[client, client].mean().item(), 4)
                line["weights"] = [round(size / sum(sizes), 4) for size in sizes]
                line["shares"] = [[round(value, 3) for value in row] for row in shares.tolist()]
            yield {"variant": variant, "space": space, **line}


def describe(path, checkpoint, device):
    """What every line says of a checkpoint: its row, as in a study, and where it was measured."""
    config, row = checkpoint["config"], checkpoint["config"]["method"]
    if row not in variants.METHODS:
        raise ValueError(f"{path} is of {row}, not SSD or one of its rows")
    for name, value in variants.METHODS[row].items():
        if config[name] != value:
            row += f" --{name} {config[name]:g}"
    return {
        "run": str(Path(path).parent),
        "row": row,
        "seed": config["seed"],
        "round": len(checkpoint["history"]),
        "epochs": config["local_epochs"],
        "command": f"python extras/separation.py {path}",
        "commit": current_commit(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def main(argv=None):
    """Checkpoints -> lines of a record, those that it does not have -> the tables of all lines."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.usage = argparse.SUPPRESS  # so that an error is one line
    add = parser.add_argument
    add("checkpoints", nargs="*", help="last.pt of train.py's runs or extras/variants.py's")
    add("--record", type=Path, default=Path("separation.jsonl"), help="(%(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 ... (%(default)s)")
    args = parser.parse_args(argv)
    try:
        device = pick_device(args.device)
        lines = law.read(args.record) if args.record.exists() else []
        for path in args.checkpoints:
            checkpoint, model = load_checkpoint(path)
            config, about = checkpoint["config"], describe(path, checkpoint, device)
            if (about["run"], about["round"]) in {(line["run"], line["round"]) for line in lines}:
                continue
            data = load_dataset(config["dataset"], config["data_dir"], config["image_size"])
            new = [{**about, **line} for line in measure(checkpoint, model.to(device), data)]
            with args.record.open("a") as file:
                file.writelines(json.dumps(line) + "\n" for line in new)
            lines += new
            print(f"{path}: measured", flush=True)
    except (ValueError, OSError) as error:
        parser.error(" ".join(str(error).split()))
    print("\n\n".join(law.tables(lines).values()))


if __name__ == "__main__":
    main()
