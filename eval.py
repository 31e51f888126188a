"""How good is a representation? Measures on frozen features, and a script that takes a checkpoint.

A protocol is fixed beforehand and its last epoch is reported: nothing is chosen by a test score.
This file needs data.py and model.py beside it. Its measures of features need torch alone:

    >>> y = torch.arange(10).repeat(20)     # your labels
    >>> h = torch.eye(10)[y]                # your features
    >>> knn_accuracy(h, y, h, y, k=20), linear_probe(h, y, h, y, epochs=20), round(uniformity(h), 3)
    (100.0, 100.0, -2.189)

    python eval.py runs/NAME/last.pt                        # every protocol of the paper
    python eval.py runs/NAME/last.pt --dataset cifar100     # transfer
"""

import argparse
import copy
import json
import time
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F

from data import NAMES, crop, draw_params, load_dataset, two_views, unit_range
from model import SSDNet, load_checkpoint, pick_device


def accuracy(predicted, labels):
    """Per cent of rows whose class is the label: (N,) twice; ValueError for labels (N, 1)."""
    if predicted.shape != labels.shape:
        raise ValueError(f"labels must be {tuple(predicted.shape)}, got {tuple(labels.shape)}")
    return 100 * int((predicted == labels).sum()) / len(labels)


def knn_accuracy(train_h, train_y, test_h, test_y, k=200, temperature=0.1):
    """Weighted kNN (Wu et al. 2018): the k most similar training rows vote by exp(cosine / T).

    Features (N, D) and (M, D) of any length, int64 labels -> per cent of test rows whose class
    wins. k is lowered to N where N is smaller; the paper's 200 is for thousands of rows a class.
    """
    bank = F.normalize(train_h.float(), dim=1)
    queries = F.normalize(test_h.float(), dim=1)
    num_classes = int(train_y.max()) + 1
    predicted = []
    for query in queries.split(1000):
        similarity, nearest = (query @ bank.T).topk(min(k, len(bank)))
        nearer = similarity - similarity[:, :1]  # to the nearest's, so that no T overflows
        votes = query.new_zeros(len(query), num_classes)
        votes.scatter_add_(1, train_y[nearest], (nearer / temperature).exp())
        predicted.append(votes.argmax(1))
    return accuracy(torch.cat(predicted), test_y)


@torch.enable_grad()
def linear_probe(train_h, train_y, test_h, test_y, epochs=200, lr=3e-3, batch_size=512, seed=0):
    """Linear classifier on frozen features, softmax cross-entropy, Adam: per cent on the test rows.

    The paper's protocol: features (N, D) as they come, labels int64 (N,); `seed` shuffles. Where
    methods differ in their features' length, divide each by its training features' mean norm.
    """
    train_h, test_h = train_h.float(), test_h.float()
    head = _zero_head(train_h, train_y)
    optimizer = torch.optim.Adam(head.parameters(), lr=lr)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        order = torch.randperm(len(train_h), generator=generator).to(train_h.device)
        for batch in order.split(batch_size):
            optimizer.zero_grad()
            F.cross_entropy(head(train_h[batch]), train_y[batch]).backward()
            optimizer.step()
    return accuracy(head(test_h).argmax(1), test_y)


def stratified(labels, fraction, seed=0):
    """Indices of round(fraction * n_c) of each class's n_c samples, at least one: sorted int64."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    chosen = []
    for c in labels.unique():
        of_class = order[labels[order] == c]
        chosen.append(of_class[: max(1, round(fraction * len(of_class)))])
    return torch.cat(chosen).sort().values


@torch.enable_grad()
def fine_tune(
    model, train_x, train_y, test_x, test_y, epochs=200, lr=1e-3, batch_size=128, seed=0, amp=False
):
    """Train a copy of the encoder and a linear head on labelled images: per cent on the test set.

    model: SSDNet, of which the encoder is taken, or an encoder; it is not changed. Images uint8
    (N, 3, H, W), labels int64 (N,). The paper's: SGD with momentum 0.9, lr 1e-3 for the encoder and
    0.3 for the head, RandomResizedCrop with scale (0.64, 1) and flip. The crop's ratio is 3/4 to
    4/3, as torchvision's; differs from the authors' code: 1. `seed` shuffles and crops.
    """
    device = next(model.parameters()).device
    if isinstance(model, SSDNet):
        model = model.encoder
    model = copy.deepcopy(model).requires_grad_()
    train_x, train_y = train_x.to(device), train_y.to(device)
    head = _zero_head(encode(model, test_x[:1], amp)[0], train_y)
    groups = [{"params": model.parameters()}, {"params": head.parameters(), "lr": 0.3}]
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.9)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(epochs):
        order = torch.randperm(len(train_x), generator=generator).to(device)
        for batch in order.split(batch_size):
            drawn = draw_params(len(batch), *train_x.shape[2:], generator, scale=(0.64, 1.0))
            box, flip = drawn["box"].to(device), drawn["flip"].to(device)
            x = crop(unit_range(train_x[batch]), box, flip)
            with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                h = model(x)
            optimizer.zero_grad()
            F.cross_entropy(head(h.float()), train_y[batch]).backward()
            optimizer.step()
    test_h, _ = encode(model, test_x, amp)
    return accuracy(head(test_h).argmax(1), test_y.to(device))


def _zero_head(h, labels):
    """A linear classifier of features like h (N, D) that starts at zero."""
    head = torch.nn.Linear(h.shape[1], int(labels.max()) + 1, device=h.device)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    return head


def uniformity_parts(h, client, t=2.0):
    """Global uniformity, and what each client and each pair of clients contributes to it.

        total = log( sum_k w_kk E_kk + sum_{i != j} w_ij E_ij )
        E_ij  = E exp(-t ||z - z'||^2), z of client i, z' of client j, two different rows

    z = h / ||h||, 0 for h = 0, w_ij: the share of the pairs (i, j). h (N, D), client (N,) int64
    ids below K -> total (), in [-4t, 0], lower is more uniform; intra (K,), the terms w_kk E_kk;
    inter (K, K), the terms w_ij E_ij, zero diagonal. ValueError for fewer than two rows.
    The paper prints a leading minus, which does not fit its own tables; they show -total.
    """
    if h.ndim != 2 or len(h) < 2 or client.shape != h.shape[:1]:
        raise ValueError(f"needs h (N, D), N >= 2, client ids (N,), got {h.shape}, {client.shape}")
    z = F.normalize(h.float(), dim=1)
    member = F.one_hot(client.long()).float()
    length = z.square().sum(1)  # 1, of a zero row 0: collapse is not uniform
    sums = 0
    for rows in torch.arange(len(z), device=z.device).split(1000):
        kernel = (t * (2 * z[rows] @ z.T - length[rows, None] - length)).exp()
        kernel[rows - rows[0], rows] = 0  # a row is no pair with itself
        sums = sums + (member[rows].T @ (kernel @ member)).double()
    shares = sums / (len(z) * (len(z) - 1))
    intra = shares.diagonal().clone()
    return shares.sum().log(), intra, shares - intra.diag()


def mean_parts(h, client):
    """log E exp(-2 ||z - z'||^2), E over all, intra-, inter-client pairs: floats, NaN for none."""
    total, intra, inter = uniformity_parts(h, client)
    sizes = torch.bincount(client).double()
    own = (sizes * (sizes - 1)).sum() / (len(h) * (len(h) - 1))  # share of intra-client pairs
    return {
        "total": total.item(),
        "intra": (intra.sum() / own).log().item(),
        "inter": (inter.sum() / (1 - own)).log().item(),
    }


def uniformity(h, t=2.0):
    """log mean of exp(-t ||z - z'||^2) over pairs of rows z = h / ||h||: (N, D) -> [-4t, 0]."""
    one_client = torch.zeros(len(h), dtype=torch.long, device=h.device)
    total, _, _ = uniformity_parts(h, one_client, t)
    return total.item()


def alignment(h1, h2):
    """mean ||z1 - z2||^2, z = h / ||h||: two views' features (N, D) -> [0, 4], lower is closer."""
    if h1.shape != h2.shape or h1.ndim != 2:
        raise ValueError(f"alignment needs two (N, D) of one shape, got {h1.shape}, {h2.shape}")
    z1, z2 = F.normalize(h1.float(), dim=1), F.normalize(h2.float(), dim=1)
    return (z1 - z2).square().sum(1).mean().item()


def effective_rank(h):
    """exp(-sum p log p), p: singular values of h's unit rows (N, D) over their sum -> [1, D].

    0 if all rows are zeros.
    """
    singular = torch.linalg.svdvals(F.normalize(h.double(), dim=1))
    if singular.sum() == 0:
        return 0.0
    return torch.special.entr(singular / singular.sum()).sum().exp().item()


@torch.no_grad()
def encode(model, images, amp=False):
    """Frozen features h, u (N, D), float32, of images (N, 3, H, W), uint8 or float in [0, 1].

    A model that returns h alone: u is h. BatchNorm's statistics: the running ones. amp: bfloat16.
    """
    device = next(model.parameters()).device
    modes = [(module, module.training) for module in model.modules()]
    all_h, all_u = [], []
    model.eval()
    try:
        for batch in images.split(500):
            batch = batch.to(device)
            if not batch.is_floating_point():
                batch = unit_range(batch)
            with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                out = model(batch)
            h, u = (out, out) if torch.is_tensor(out) else out
            all_h.append(h.float())
            all_u.append(u.float())
    finally:
        for module, training in modes:  # one that was frozen stays so
            module.training = training
    return torch.cat(all_h), torch.cat(all_u)


def quick_scores(model, train_x, train_y, test_x, test_y, amp=False):
    """kNN (k = 20) and uniformity of h and z: what train.py shows after every round."""
    train_h, _ = encode(model, train_x, amp)
    test_h, test_u = encode(model, test_x, amp)
    train_y, test_y = train_y.to(train_h.device), test_y.to(test_h.device)
    return {
        "knn": knn_accuracy(train_h, train_y, test_h, test_y, k=20),
        "uniformity_h": uniformity(test_h),
        "uniformity_z": uniformity(test_u),
    }


def evaluate(model, data, client_of=None, epochs=200, seed=0, fractions=(), amp=False):
    """All measures of one network on `data` (`data.Images`), as a flat dict of numbers.

    Accuracies train on all training images (fine-tuning: on these fractions of them). All is
    measured on the test images, alignment on two views of 5,000; but uniformity in total, within
    (intra) and between (inter) clients client_of (N,) on one set of 5,000 training images.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    train_y, test_y = data.train_y.to(device), data.test_y.to(device)
    train_h, train_u = encode(model, data.train_x, amp)
    test_h, test_u = encode(model, data.test_x, amp)
    some = torch.randperm(len(data.test_x), generator=generator)[:5000]
    x1, x2 = two_views(data.test_x[some].to(device), generator)
    h1, u1 = encode(model, x1, amp)
    h2, u2 = encode(model, x2, amp)

    k = min(200, len(train_y))
    probe = linear_probe(train_h, train_y, test_h, test_y, epochs=epochs, seed=seed)
    knn = knn_accuracy(train_h, train_y, test_h, test_y, k=k)
    scores = {"linear_probe": probe, "knn": knn, "k": k}
    for fraction in fractions:
        few = stratified(data.train_y, fraction, seed)
        x, y = data.train_x[few], data.train_y[few]
        tuned = fine_tune(model, x, y, data.test_x, data.test_y, epochs=epochs, seed=seed, amp=amp)
        scores[f"finetune_{fraction:g}"] = tuned

    some = torch.randperm(len(train_y), generator=generator)[:5000]
    views = {"h": (train_h, test_h, h1, h2), "z": (train_u, test_u, u1, u2)}
    for name, (train, test, one, two) in views.items():
        scores[f"uniformity_{name}"] = uniformity(test)
        if client_of is not None and client_of.max() > 0:
            parts = mean_parts(train[some.to(device)], client_of[some].to(device))
            for part, value in parts.items():
                scores[f"uniformity_{part}_{name}"] = value
        scores[f"alignment_{name}"] = alignment(one, two)
        scores[f"effective_rank_{name}"] = effective_rank(test)
        scores[f"norm_{name}"] = test.norm(dim=1).mean().item()
    return scores


def print_scores(scores):
    """The numbers of `evaluate`, a line each; the paper's tables have uniformity with a minus."""
    for name, value in scores.items():
        print(f"{name:24s}{value:10.3f}")
    print("total, intra, inter: of training images; accuracies in %, else of test images")


def build_parser():
    """Every flag; the defaults are the paper's protocol."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.usage = argparse.SUPPRESS  # so that an error is one line
    add = parser.add_argument
    add("checkpoint", help="runs/NAME/last.pt, as train.py wrote it")
    add("--dataset", help="another data set than the checkpoint's (transfer), or its new place")
    add("--data-dir", help="where downloaded data sets are kept (the run's)")
    add("--epochs", type=int, default=200, help="of probe and fine-tuning (%(default)s, as paper)")
    share = {"type": float, "nargs": "*", "metavar": "SHARE", "default": [0.01, 0.1]}
    add("--finetune", **share, help="shares of the labels to fine-tune on, or none (0.01 0.1)")
    add("--seed", type=int, default=0, help="of label subsets, shuffling, views (%(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 ... (%(default)s)")
    return parser


def load_images(args, checkpoint):
    """The data set to evaluate on, and the client of each training image, or None.

    Of the run's own data set only the training images that its clients hold (--limit) are taken.
    It is its own by its fingerprint, whatever its path.
    """
    config, split = checkpoint["config"], checkpoint["split"]
    dataset, image_size = args.dataset or config["dataset"], config["image_size"]
    if dataset in NAMES:
        image_size = 32  # the encoder takes any size
    data = load_dataset(dataset, args.data_dir or config["data_dir"], image_size)
    if data.fingerprint() != config["images"]:
        if not args.dataset:
            raise ValueError(f"{dataset} has other images than those the run began with")
        return data, None
    held, order = torch.cat(split).sort()
    client_of = torch.cat([torch.full_like(part, k) for k, part in enumerate(split)])[order]
    return data._replace(train_x=data.train_x[held], train_y=data.train_y[held]), client_of


def main(argv=None):
    """Evaluate a checkpoint: print a table, append one line to eval.jsonl beside it."""
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"  # in one line
    parser = build_parser()
    args = parser.parse_args(argv)
    start = time.time()
    try:
        if args.epochs < 1 or not all(0 < share <= 1 for share in args.finetune):
            given = f"{args.epochs} and {args.finetune}"
            raise ValueError(f"--epochs is at least 1, --finetune in (0, 1], got {given}")
        device = pick_device(args.device)
        checkpoint, model = load_checkpoint(args.checkpoint)
        config, rounds = checkpoint["config"], len(checkpoint["history"])
        data, client_of = load_images(args, checkpoint)
        record = Path(args.checkpoint).parent / "eval.jsonl"
        record.open("a").close()  # can it be written?
    except (ValueError, OSError) as error:
        parser.error(" ".join(str(error).split()))
    dataset = args.dataset or config["dataset"]
    print(f"{args.checkpoint}: {config['method']}, {rounds} rounds on ", end="")
    print(f"{config['dataset']}, seed {config['seed']}\nevaluated on {dataset}: ", end="")
    print(f"{len(data.train_y):,} training and {len(data.test_y):,} test images\n", flush=True)
    scores = evaluate(
        model.to(device),
        data,
        client_of,
        epochs=args.epochs,
        seed=args.seed,
        fractions=args.finetune,
        amp=config["amp"],  # the precision of training
    )
    flags = {name: getattr(args, name) for name in ("epochs", "finetune", "seed")}
    machine = {"device": str(device), "torch": torch.__version__}
    line = {"dataset": dataset, "round": rounds, "flags": flags, **scores, **machine}
    with record.open("a") as file:
        file.write(json.dumps(line) + "\n")
    print_scores(scores)
    print(f"{time.time() - start:.0f} s; one line added to {record}")


if __name__ == "__main__":
    main()
