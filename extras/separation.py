"""Whose is the separation, the images' or the networks'? One round's networks, seen crosswise.

    python extras/separation.py runs/regime/*/last.pt     # trains a round for each

Every client trains the run's common network for one more round; `measure` says which of the local
networks, their average and the common one then embeds whose images. The file gets a line for each
checkpoint, variant and space (h, z), and a checkpoint that it holds is not measured again:

    total, intra, inter   -log E exp(-2 ||z - z'||^2), higher is more uniform, as in the paper's
                          tables: over all pairs, pairs of one client, pairs of two clients
    cosine                of two clients' mean directions, mean over the pairs of clients
    own_share             of ||z||^2, in the client's own dimensions, those that d_k scales

If the d_k differ, a network that treats all images alike has a mean own share of at most 1 / K.
Where it leans shares (K, K) tells: of ||z||^2 of client i's images, in client j's dimensions.
Lines of z with shares have matrix, -log E_ij, and weights, each client's share of the images, too.
"""

import functools
import json
import re
import statistics
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "extras")]

import baselines  # noqa: E402
from study import CROSSWISE, crosswise  # noqa: E402

from data import load_dataset, two_views  # noqa: E402
from eval import encode, one_line_parser, pick_device, uniformity_parts  # noqa: E402
from federated import average_states, copy_state, federated_round, keyed_generator  # noqa: E402
from losses import scaling_vectors  # noqa: E402
from model import load_checkpoint  # noqa: E402
from train import make_loss  # noqa: E402

PICTURED = ("own", "same-images", "average", "average-equal")  # their lines of z hold matrices
IMAGES = 400  # of each client, at most; as many test images
POOLED = 5000  # training images of all clients, from which BatchNorm's statistics are measured anew


def local_states(model, config, images, split, rounds):
    """Each client's state dict after its part of round `rounds`, before they are averaged."""
    config = {**config, "compile": False}  # one round is too short for it
    own = baselines.make_options({"client": None, **config}, images, split)
    loss, states = own.get("loss") or make_loss(config, len(split), images.device), []
    rates = {name: config[name] for name in ("lr", "momentum", "weight_decay")}
    if "lr" in own:  # a schedule
        rates["lr"] = own["lr"](min(rounds, config["rounds"] - 1))
    sgd = torch.optim.SGD(model.parameters(), **rates)

    def keep(sent, weights, global_state, *_):
        states.extend(sent)
        return global_state

    flags = {name: config[name] for name in ("local_epochs", "batch_size", "seed")}
    report = federated_round(model, sgd, images, split, loss, rounds, average=keep, **flags)
    if report["left_out"]:
        raise ValueError(f"clients {report['left_out']} diverge in the round: nothing to measure")
    return states


@torch.no_grad()
def recalibrate(model, images, generator, batch_size=250):
    """Measure BatchNorm's running statistics anew, in place; the weights stay as they are.

    images uint8 (N, 3, H, W), in random order and in batches of about batch_size, two views of each
    in one batch. A statistic is the mean over the batches (momentum None), as each has seen it.
    """
    layers = [part for part in model.modules() if hasattr(part, "running_mean")]
    momenta, was_training = [layer.momentum for layer in layers], model.training
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None
    model.train()
    order = torch.randperm(len(images), generator=generator)
    for batch in order.tensor_split(max(1, len(images) // batch_size)):
        model(torch.cat(two_views(images[batch], generator)))
    model.train(was_training)
    for layer, momentum in zip(layers, momenta):
        layer.momentum = momentum


def geometry(z, client, own):
    """A line's values, -log E_ij and shares (K, K): of z unit rows (N, D), client (N,) ids below K.

    E_ij = mean exp(-2 ||z - z'||^2), z of client i, z' of client j, different rows. own (K, D)
    marks the clients' own dimensions. What needs two clients is left out for one.
    """
    total, intra, inter = uniformity_parts(z, client)
    sizes = torch.bincount(client).double()
    pairs = (sizes[:, None] * sizes - sizes.diag()) / (len(z) * (len(z) - 1))
    same = pairs.diag().sum()
    member = F.one_hot(client).T.double()
    means = F.normalize(member @ z.double(), dim=1)
    shares = member @ z.double().square() @ own.T.double() / sizes[:, None]
    i, j = torch.triu_indices(len(means), len(means), 1)
    values = {
        "total": -total,
        "intra": -(intra.sum() / same).log(),
        "inter": -(inter.sum() / (1 - same)).log(),
        "cosine": (means[i] * means[j]).sum(1).mean(),
        "own_share": (z.square() * own[client]).sum(1).mean(),
    }
    values = {name: value.item() for name, value in values.items() if not value.isnan()}
    return values, -((intra.diag() + inter) / pairs).log(), shares


def measure(checkpoint, model, data):
    """Yields a dict for each variant, which network embeds which images, and space, h and z.

    A client is the images', whose own dimensions own_share takes; in same-images the network's.
    """
    config, split, rounds = checkpoint["config"], checkpoint["split"], len(checkpoint["history"])
    own = scaling_vectors(len(split), 8 * config["width"], config["scale"], config["seed"]) != 1
    if config["method"] == "ssd-common":
        own = own[:1].expand_as(own)
    images = data.train_x.to(next(model.parameters()).device)
    draws = keyed_generator(config["seed"], "separation")

    def some(index, count):
        return index[torch.randperm(len(index), generator=draws)[:count]]

    def embed(state, images, whose):
        """h and z, unit rows (2, n, D), by the state's network; hsd's z as clients `whose` do."""
        model.load_state_dict(state)
        h, u = (part.cpu() for part in encode(model, images, config["amp"]))
        z = u * own[whose] if config["method"] == "hsd" else u
        return F.normalize(torch.stack([h, z]), dim=2)

    def anew(state):
        model.load_state_dict(state)
        recalibrate(model, pooled, keyed_generator(config["seed"], "recalibrate"))
        return copy_state(model)

    chosen, clients = [some(index, IMAGES) for index in split], range(len(split))
    held, client = images[torch.cat(chosen)], torch.tensor([k for k in clients for _ in chosen[k]])
    pooled = images[some(torch.cat(split), POOLED)]
    test = data.test_x[some(torch.arange(len(data.test_x)), IMAGES)]
    network = torch.arange(len(split)).repeat_interleave(len(test))

    start, sizes = copy_state(model), list(map(len, split))
    states = local_states(model, config, images, split, rounds)
    average, even = (average_states(states, n) for n in (sizes, [1] * len(split)))
    local = [embed(state, held, client) for state in states]
    moved = [*local[1:], local[0]]
    for variant, embeddings in {
        # each client's images by its own local network
        "own": [torch.cat([local[k][:, client == k] for k in clients], 1)],
        # all images by the average of the local networks, as it is and with new statistics
        "average": [embed(average, held, client)],
        "average-recalibrated": [embed(anew(average), held, client)],
        # by their average with equal weights
        "average-equal": [embed(even, held, client)],
        # the same test images by every local network
        "same-images": [torch.cat([embed(states[k], test, k) for k in clients], 1)],
        # client k's images by the local network of client k + 1
        "next-network": [torch.cat([moved[k][:, client == k] for k in clients], 1)],
        # all images by one local network: the mean of the values over the networks
        "one-network": local,
        # all images by the common network before the round
        "start": [embed(start, held, client)],
        "start-recalibrated": [embed(anew(start), held, client)],
    }.items():
        for i, space in enumerate("hz"):
            whose = network if variant == "same-images" else client
            found = [geometry(rows[i], whose, own) for rows in embeddings]
            line, (values, matrix, shares) = {"variant": variant, "space": space}, found[0]
            for key in values:
                line[key] = round(statistics.mean(values[key] for values, *_ in found), 4)
            if space == "z" and variant in PICTURED:  # chance: the share of evenly spread z
                line["chance"] = own[0].double().mean().item()
                line["weights"] = [round(size / sum(sizes), 4) for size in sizes]
                line["matrix"] = [[round(value, 2) for value in row] for row in matrix.tolist()]
                line["shares"] = [[round(value, 3) for value in row] for row in shares.tolist()]
            yield line


def main(argv=None):
    """Checkpoints -> lines in a file -> tables of all that it holds."""
    parser = one_line_parser("extras/separation.py", __doc__.splitlines()[0])
    add = parser.add_argument
    add("checkpoints", nargs="*", help="of train.py; a row's runs are named NAME-seedN")
    add("--minus", metavar="ROW", help="print differences to this row")
    add("--out", type=Path, default=Path("controls.jsonl"), help="(%(default)s)")
    add("--data-dir", help="(the run's)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 ... (%(default)s)")
    args = parser.parse_args(argv)
    load = functools.cache(load_dataset)
    try:
        device, text = pick_device(args.device), args.out.read_text() if args.out.exists() else ""
        lines = [json.loads(line) for line in text.splitlines()]
        if not all("variant" in line for line in lines):
            raise ValueError(f"{args.out} holds something else: choose another --out")
        for path in args.checkpoints:
            checkpoint, model = load_checkpoint(path)
            config, run = checkpoint["config"], Path(path).parent
            if config["method"] not in baselines.METHODS.keys() - baselines.NAMES:
                raise ValueError(f"{path} is of {config['method']}, not SSD or one of its rows")
            known = {"run": str(run), "row": re.sub(r"-seed\d+$", "", run.name)}
            known |= {"seed": config["seed"], "round": len(checkpoint["history"])}
            known["epochs"] = config["local_epochs"]
            if any(known.items() <= line.items() for line in lines):
                continue
            data = load(config["dataset"], args.data_dir or config["data_dir"])
            new = [{**known, **line} for line in measure(checkpoint, model.to(device), data)]
            with args.out.open("a") as file:
                file.writelines(json.dumps(line) + "\n" for line in new)
            lines += new
            print(f"{run}: measured", flush=True)
    except (ValueError, OSError, IndexError, FloatingPointError) as error:
        parser.error(str(error))
    for heading in CROSSWISE:
        print(crosswise(lines, heading, args.minus), end="\n\n")


if __name__ == "__main__":
    main()
