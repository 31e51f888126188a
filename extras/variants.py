"""SSD with one thing changed: what the paper leaves open, or its authors' code has otherwise.

    dsr-literal    DSR's target as printed, not put back on the sphere
    dsr-authors    DSR as the authors' code has it                        authors_dsr
    ssd-reverse    distillation in the other direction, KL(softmax(u) || softmax(h))
    ssd-half       distillation at temperature 0.5
    ssd-into-h     distillation whose gradient reaches h alone
    ssd-authors    DSR and distillation as the authors' code has them
    ssd-cosine     the learning rate falls to 0, as half a cosine over the rounds
    ssd-common     every client has client 0's d_k: DSR that cannot part clients

Flags as train.py's, whose methods are here as well, and three more, for the authors' split and
first weights and for a wider u:

    python extras/variants.py --method ssd-authors --split authors --init pytorch
"""

import functools
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))

import train  # noqa: E402
from federated import federated_round  # noqa: E402
from losses import at_least_float32, distill_loss, dsr_loss, ssd_loss  # noqa: E402

DSR = {"gamma": 1.0, "delta": 0.0}
SSD = {"gamma": 1.0, "delta": 0.1}
METHODS = {
    **train.METHODS,
    "dsr-literal": DSR,
    "dsr-authors": DSR,
    "ssd-reverse": SSD,
    "ssd-half": SSD,
    "ssd-into-h": SSD,
    "ssd-authors": SSD,
    "ssd-cosine": SSD,
    "ssd-common": SSD,
}


def random_axes(dim):
    """An orthonormal basis (D, D), float32, always the same one for its size."""
    draws = torch.randn(dim, dim, generator=torch.Generator().manual_seed(0))
    return torch.linalg.qr(draws).Q


def authors_dsr(z, d_k, axes):
    """DSR as the authors' code has it: ||z - stopgrad(target)||_F / B, z unit rows (B, D) -> ().

    target = q (q^T z * d_k), back on the sphere, q the axes (D, D). The norm is of the whole batch
    and not squared: the gradient for z is (z - target) / (B ||z - target||_F).
    """
    axes = axes.to(z.dtype)
    target = F.normalize((z.detach() @ axes * d_k) @ axes.T, dim=1)
    return (z - target).norm() / len(z)


def make_objective(method, dim, device):
    """The method's objective, to be called as `losses.ssd_loss`; dim: of u."""
    dsr, distill = dsr_loss, distill_loss
    if method == "dsr-literal":
        dsr = functools.partial(dsr_loss, on_sphere=False)
    if method in ("dsr-authors", "ssd-authors"):
        dsr = functools.partial(authors_dsr, axes=random_axes(dim).to(device))
    if method == "ssd-reverse":
        distill = reversed_distill_loss
    if method == "ssd-half":
        distill = functools.partial(distill_loss, temperature=0.5)
    if method == "ssd-authors":
        distill = functools.partial(reversed_distill_loss, temperature=0.5)
    if method == "ssd-into-h":
        distill = distill_into_h
    if method in (*train.METHODS, "ssd-common"):
        return ssd_loss

    def objective(h1, u1, h2, u2, d_k, beta, gamma, delta, hard):
        total, terms = ssd_loss(h1, u1, h2, u2, d_k, beta, gamma=0.0, delta=0.0)
        h = at_least_float32(torch.stack([h1, h2]))
        u = at_least_float32(torch.stack([u1, u2]))
        z1, z2 = F.normalize(u[0], dim=1), F.normalize(u[1], dim=1)
        terms["dsr"] = (dsr(z1, d_k) + dsr(z2, d_k)) / 2
        terms["distill"] = (distill(h[0], u[0]) + distill(h[1], u[1])) / 2
        total = total + gamma * terms["dsr"] + delta * terms["distill"]
        return total, {name: term.detach() for name, term in terms.items()}

    return objective


def reversed_distill_loss(h, u, temperature=1.0):
    """KL( softmax(u/T) || softmax(h/T) )."""
    return distill_loss(u, h, temperature)


def distill_into_h(h, u):
    """Distillation that leaves u alone."""
    return distill_loss(h, u.detach())


def reset_like_pytorch(model, seed):
    """First weights as the authors' code has them: PyTorch's defaults for every layer, in place.

    torchvision's ResNet draws most convolutions wider (kaiming_normal_, fan out): the standard
    deviation of a 3x3 convolution of 64 channels is 0.059, PyTorch's 0.024. Not so the first one.
    """
    torch.manual_seed(seed)
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()


def authors_counts(num_images):
    """Images (10, 10) of each class at each client, in the authors' split of CIFAR-10, K = 10.

    num_images of a class are dealt by largest remainders of the shares that numpy's legacy
    generator draws from Dirichlet(0.1) with seed 17. The clients are unusually even: 2,920 to
    7,520 images for 5,000 a class.
    """
    quotas = np.random.RandomState(17).dirichlet([0.1] * 10, size=10) * num_images
    counts = np.floor(quotas).astype(int)
    for row, quota in zip(counts, quotas):
        largest = np.argsort(row - quota, kind="stable")
        row[largest[: num_images - row.sum()]] += 1
    return counts


def equal_counts(num_images, num_clients, num_classes, alpha, seed):
    """Images (classes, clients) from a Dirichlet table whose clients all have as many.

    The seed's table is scaled, columns and rows in turn, until all sums agree, and rounded down.
    What is missing goes, an image at a time, to the largest remainder whose class and client both
    lack images.
    """
    table = np.random.default_rng(seed).dirichlet(np.full(num_clients, alpha), num_classes)
    per_client = num_classes / num_clients
    for _ in range(200_000):
        table = table / table.sum(0) * per_client
        table = table / table.sum(1, keepdims=True)
        if np.abs(table.sum(0) - per_client).max() < 1e-9:
            break
    quotas = table * num_images
    counts = np.floor(quotas).astype(int)
    while counts.sum() < num_images * num_classes:
        class_lacks = counts.sum(1) < num_images
        client_lacks = counts.sum(0) < num_images * per_client
        remainders = np.where(class_lacks[:, None] & client_lacks, quotas - counts, -np.inf)
        counts[np.unravel_index(remainders.argmax(), counts.shape)] += 1
    return counts


def deal(labels, counts, seed):
    """Index arrays of K clients: counts (classes, K) images, which ones the seed draws.

    An index counts the training images as `data.load_dataset` has them: a split for `cifar10` does
    not fit a folder of the same images.
    """
    rng = np.random.default_rng(seed)
    parts = [[] for _ in range(counts.shape[1])]
    for label, row in zip(np.unique(labels), counts):
        shuffled = rng.permutation(np.flatnonzero(labels == label))
        for k, part in enumerate(np.split(shuffled, row.cumsum()[:-1])):
            parts[k].append(part)
    return [np.sort(np.concatenate(part)) for part in parts]


def make_split(config, labels):
    """The split that --split names, of a data set with as many images of each class."""
    labels = np.asarray(labels)
    sizes = np.bincount(labels)
    clients = config["clients"] or 10
    if config["limit"] or config["split_file"] or sizes.min() != sizes.max():
        raise ValueError(f"--split {config['split']} needs all images, classes of one size")
    if config["split"] == "equal":
        counts = equal_counts(sizes[0], clients, len(sizes), config["alpha"], config["seed"])
        return deal(labels, counts, config["seed"])
    if clients != 10 or len(sizes) != 10:
        raise ValueError(f"--split authors has 10 clients and 10 classes, not {clients}")
    return deal(labels, authors_counts(sizes[0]), config["seed"])


def build_parser():
    """train.py's flags, and three more."""
    parser = train.build_parser(METHODS)
    add = parser.add_argument_group("variants").add_argument
    add("--init", choices=["torchvision", "pytorch"], default="torchvision", help="first weights")
    add("--split", choices=["dirichlet", "authors", "equal"], default="dirichlet",
        help="clients as drawn, as in the authors' file, or of one size")  # fmt: skip
    add("--embed-dim", type=train.number(int, 1), help="dimensions of u (h's)")
    return parser


def make_model(config):
    """train.py's network, with the first weights that --init names."""
    model = train.make_model(config)
    if config["init"] == "pytorch":
        reset_like_pytorch(model, config["seed"])
    return model


def make_loss(config, images, split):
    """The method's local loss, for federated.py."""
    dim = config["embed_dim"] or 8 * config["width"]
    if config["delta"] and dim != 8 * config["width"]:
        raise ValueError(f"--embed-dim {dim}: distillation needs u as wide as h, take --delta 0")
    objective = make_objective(config["method"], dim, images.device)
    loss = train.make_loss(config, len(split), images.device, objective)
    if config["method"] == "ssd-common":
        return lambda model, batch, k, *rest: loss(model, batch, 0, *rest)
    return loss


def make_round(config):
    """`federated_round`, for ssd-cosine with the round's learning rate."""

    def cosine_round(model, optimizer, samples, split, loss, r, **options):
        for group in optimizer.param_groups:
            group["lr"] = config["lr"] * (1 + math.cos(math.pi * r / config["rounds"])) / 2
        return federated_round(model, optimizer, samples, split, loss, r, **options)

    if config["method"] == "ssd-cosine":
        return cosine_round
    return federated_round


def main(argv=None):
    """train.py's main, with this file's split, first weights, loss and round."""
    parser = build_parser()
    try:
        config, checkpoint = train.read_config(parser, argv, METHODS)
        if config["method"] == "ssd-cosine" and config["resume"]:
            rounds = checkpoint["config"]["rounds"]
            if config["rounds"] != rounds:
                raise ValueError(f"--rounds: the schedule is of {rounds} rounds, start a new run")
        device, data, split = train.prepare(config, checkpoint)
        if config["split"] != "dirichlet" and not config["resume"]:
            split = make_split(config, data.train_y)
            config["clients"] = len(split)
        model = train.place(make_model(config), checkpoint, device)
        loss = make_loss(config, data.train_x, split)
        train.open_run(config, checkpoint, split, model)
    except (ValueError, OSError) as error:
        parser.error(" ".join(str(error).split()))
    train.run_rounds(config, checkpoint, data, split, model, loss, make_round(config))


if __name__ == "__main__":
    main()
