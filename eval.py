"""How good is a representation? Measures on frozen features, and a script that takes a checkpoint.

A protocol is fixed beforehand and its last epoch reported: nothing is chosen by its test score.
This file needs data.py and model.py beside it. Its measures of features, copied out, torch alone:

    >>> y = torch.arange(10).repeat(20)     # your labels
    >>> h = torch.eye(10)[y]                # your features
    >>> knn_accuracy(h, y, h, y, k=20), linear_probe(h, y, h, y, epochs=20), round(uniformity(h), 3)
    (100.0, 100.0, -2.189)

    python eval.py runs/NAME/last.pt                                 # every protocol of the paper
    python eval.py runs/NAME/last.pt --finetune                      # without fine-tuning
    python eval.py runs/NAME/last.pt --dataset cifar100              # transfer
"""

import argparse
import copy
import json
import os
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from data import crop, draw_params, load_dataset, two_views, unit_range
from model import load_checkpoint


def knn_accuracy(train_h, train_y, test_h, test_y, k=200, temperature=0.1):
    """Weighted kNN (Wu et al. 2018): the k most similar training rows vote by exp(cosine / T).

    Features (N, D) and (M, D) of any length, int64 labels -> per cent of test rows whose class
    wins. k is lowered to N where N is smaller; the paper's 200 is for thousands of rows a class.
    """
    bank, queries = F.normalize(train_h.float(), dim=1), F.normalize(test_h.float(), dim=1)
    classes, predicted = int(train_y.max()) + 1, []
    for query in queries.split(1000):
        similarity, nearest = (query @ bank.T).topk(min(k, len(bank)))
        votes = query.new_zeros(len(query), classes)
        nearer = similarity - similarity[:, :1]  # to the nearest's, so that no T overflows
        votes.scatter_add_(1, train_y[nearest], (nearer / temperature).exp())
        predicted.append(votes.argmax(1))
    return accuracy(torch.cat(predicted), test_y)


def accuracy(predicted, labels):
    """Per cent of rows whose class is the label: (N,) twice; ValueError for labels (N, 1)."""
    if predicted.shape != labels.shape:
        raise ValueError(f"labels must be {tuple(predicted.shape)}, got {tuple(labels.shape)}")
    return 100 * int((predicted == labels).sum()) / len(labels)


@torch.enable_grad()
def linear_probe(train_h, train_y, test_h, test_y, epochs=200, lr=3e-3, batch_size=512, seed=0):
    """Linear classifier on frozen features, softmax cross-entropy, Adam: per cent on the test rows.

    Features (N, D) as they come, labels int64 (N,); the paper's protocol. `seed` shuffles.
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
    by_class = [order[labels[order] == c] for c in labels.unique()]
    return torch.cat([own[: max(1, round(fraction * len(own)))] for own in by_class]).sort().values


@torch.enable_grad()
def fine_tune(
    model, train_x, train_y, test_x, test_y, epochs=200, lr=1e-3, batch_size=128, seed=0, amp=False
):
    """Train a copy of the encoder and a linear head on labelled images: per cent on the test set.

    model: SSDNet or an encoder, not changed. Images uint8 (N, 3, H, W), else ValueError; labels
    int64 (N,); all on the CPU. The paper's: SGD with momentum 0.9, lr 1e-3 for the encoder and 0.3
    for the head, RandomResizedCrop with scale (0.64, 1) and flip. `seed` shuffles and crops.
    """
    device = next(model.parameters()).device
    model = copy.deepcopy(getattr(model, "encoder", model)).requires_grad_()
    train_x, train_y = train_x.to(device), train_y.to(device)
    head = _zero_head(encode(model, test_x[:1], amp)[0], train_y)
    groups = [{"params": model.parameters()}, {"params": head.parameters(), "lr": 0.3}]
    optimizer = torch.optim.SGD(groups, lr, momentum=0.9)
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
    return accuracy(head(encode(model, test_x, amp)[0]).argmax(1), test_y.to(device))


def _zero_head(h, labels):
    """A linear classifier of features like h (N, D) that starts at zero."""
    head = torch.nn.Linear(h.shape[1], int(labels.max()) + 1, device=h.device)
    head.load_state_dict({name: 0 * value for name, value in head.state_dict().items()})
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
        got = f"got {tuple(h.shape)}, {tuple(client.shape)}"
        raise ValueError(f"uniformity needs h (N, D), N >= 2, and client ids (N,), {got}")
    z, member = F.normalize(h.float(), dim=1), F.one_hot(client.long()).float()
    length, sums = z.square().sum(1), 0  # 1, of a zero row 0: collapse is not uniform
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
    return total.item(), (intra.sum() / own).log().item(), (inter.sum() / (1 - own)).log().item()


def uniformity(h, t=2.0):
    """log mean of exp(-t ||z - z'||^2) over pairs of rows z = h / ||h||: (N, D) -> [-4t, 0]."""
    return uniformity_parts(h, torch.zeros(len(h), dtype=torch.long, device=h.device), t)[0].item()


def alignment(h1, h2):
    """mean ||z1 - z2||^2, z = h / ||h||: two views' features (N, D) -> [0, 4], lower is closer."""
    return (F.normalize(h1.float()) - F.normalize(h2.float())).square().sum(1).mean().item()


def effective_rank(h):
    """exp(-sum p log p), p: singular values of h's unit rows (N, D) over their sum -> [1, D]."""
    singular = torch.linalg.svdvals(F.normalize(h.double(), dim=1))
    return torch.special.entr(singular / singular.sum()).sum().exp().item()


@torch.no_grad()
def encode(model, images, amp=False):
    """Frozen features h, u (N, D), float32, of images (N, 3, H, W), uint8 or float in [0, 1].

    A model that returns h alone: u is h. BatchNorm's statistics: the running ones. amp: bfloat16.
    """
    device = next(model.parameters()).device
    modes, features = [(module, module.training) for module in model.modules()], []
    model.eval()
    for batch in images.split(500):
        batch = batch.to(device) if batch.is_floating_point() else unit_range(batch.to(device))
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            out = model(batch)
        features.append([v.float() for v in ((out, out) if torch.is_tensor(out) else out)])
    for module, mode in modes:  # one that was frozen stays so
        module.training = mode
    return tuple(torch.cat(part) for part in zip(*features))


def pick_device(name="auto"):
    """A name -> torch.device, made current, or ValueError; "auto": CUDA (torchrun's), else CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.zeros(1, device=name).device
        if device.type == "cuda":
            torch.cuda.set_device(device)
        elif device.type != "cpu":
            raise RuntimeError
    except (RuntimeError, AssertionError) as error:
        hint = "take --device cpu, cuda or auto, or fewer processes"
        raise ValueError(f"device {name!r} is not there or not supported: {hint}") from error
    return device


def one_line_parser(prog, description):
    """argparse that reports a mistake in one line, exit status 2; no flag may be abbreviated."""
    parser = argparse.ArgumentParser(prog, description=description, allow_abbrev=False)
    parser.error = lambda text: parser.exit(2, f"{parser.prog}: error: {' '.join(text.split())}\n")
    return parser


def evaluate(model, data, client_of=None, epochs=200, seed=0, fractions=(), amp=False):
    """All measures of one network on `data` (`data.Images`), as a flat dict of numbers.

    Accuracies train on all training images (fine-tuning: on these fractions of them). All is
    measured on all test images, alignment on two views of 5,000; but uniformity in total, within
    (intra) and between (inter) clients on one set of at most 5,000 training images, whose client is
    client_of (N,), -1 for none. amp: as `encode`.
    """
    device, generator = next(model.parameters()).device, torch.Generator().manual_seed(seed)
    train_y, test_y = data.train_y.to(device), data.test_y.to(device)
    train, test = encode(model, data.train_x, amp), encode(model, data.test_x, amp)
    some = torch.randperm(len(data.test_x), generator=generator)[:5000]
    one, two = (encode(model, x, amp) for x in two_views(data.test_x[some].to(device), generator))
    h, k = (train[0], train_y, test[0], test_y), min(200, len(train_y))
    scores = {"linear_probe": linear_probe(*h, epochs, seed=seed)}
    scores |= {"knn": knn_accuracy(*h, k), "k": k}
    for fraction in fractions:
        few = stratified(data.train_y, fraction, seed)
        four = data.train_x[few], data.train_y[few], data.test_x, data.test_y
        scores[f"finetune_{fraction:g}"] = fine_tune(model, *four, epochs, seed=seed, amp=amp)
    held = torch.tensor([]) if client_of is None else (client_of >= 0).nonzero()[:, 0]
    held = held[torch.randperm(len(held), generator=generator)[:5000]]
    for i, part in enumerate("hz"):
        scores[f"uniformity_{part}"] = uniformity(test[i])
        if len(held) and client_of.max() > 0:
            own = train[i][held.to(device)], client_of[held].to(device)
            for kind, value in zip(("total", "intra", "inter"), mean_parts(*own)):
                scores[f"uniformity_{kind}_{part}"] = value
        scores[f"alignment_{part}"] = alignment(one[i], two[i])
        scores[f"effective_rank_{part}"] = effective_rank(test[i])
        scores[f"norm_{part}"] = test[i].norm(dim=1).mean().item()
    return scores


def quick_scores(model, train_x, train_y, test_x, test_y, amp=False):
    """kNN (k = 20) and uniformity of h and z: what train.py shows after every round."""
    (train_h, _), (test_h, test_u) = (encode(model, x, amp) for x in (train_x, test_x))
    knn = knn_accuracy(train_h, train_y.to(train_h.device), test_h, test_y.to(test_h.device), k=20)
    return {"knn": knn, "uniformity_h": uniformity(test_h), "uniformity_z": uniformity(test_u)}


def as_shown(name, value):
    """A name and a value as they are printed: -L_uniform, the sign of the paper's tables."""
    return (f"-{name}", -value) if name.startswith("uniform") else (name, value)


def print_scores(scores):
    """The table of `evaluate`: accuracies, then a row a measure with h and z beside each other."""
    print(f"{'linear probe':20s}{scores['linear_probe']:9.2f} %")
    for key in (key for key in scores if key.startswith("finetune_")):
        print(f"fine-tuned, {100 * float(key[9:]):3g} %   {scores[key]:9.2f} %")
    print(f"kNN (k = {scores['k']})".ljust(20) + f"{scores['knn']:9.2f} %\n\n{'h':>29}{'z':>9}")
    for name in (key[:-2] for key in scores if key.endswith("_h")):
        h, z = (as_shown(name, scores[f"{name}_{part}"])[1] for part in "hz")
        print(f"{as_shown(name, h)[0]:20s}{h:9.3f}{z:9.3f}")
    if "uniformity_total_h" in scores:
        print("uniformity: of test images; its total, intra, inter: of images that clients hold")


# fmt: off
def build_parser():
    """Every flag; the defaults are the paper's protocol."""
    parser = one_line_parser("eval.py", __doc__.splitlines()[0])
    add = parser.add_argument
    add("checkpoint", help="runs/NAME/last.pt, as train.py wrote it")
    add("--dataset", help="another data set than the checkpoint's (transfer)")
    add("--data-dir", help="where downloaded data sets are kept (the run's)")
    add("--epochs", type=int, default=200, help="of probe and fine-tuning (%(default)s, as paper)")
    add("--finetune", type=float, nargs="*", default=[0.01, 0.1], metavar="SHARE",
        help="shares of the labels to fine-tune on, none to leave it out (0.01 0.1, as the paper)")
    add("--own-images", action="store_true",
        help="take labels only of the images that the run's clients hold (a run with --limit)")
    add("--seed", type=int, default=0, help="of label subsets, shuffling, views (%(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 ... (%(default)s)")
    return parser
# fmt: on


def main(argv=None):
    """Evaluate a checkpoint: print a table, append one line to eval.jsonl beside it."""
    parser = build_parser()
    args, start, client_of = parser.parse_args(argv), time.time(), None
    try:
        if args.epochs < 1 or not all(0 < share <= 1 for share in args.finetune):
            what = f"got {args.epochs} and {args.finetune}"
            raise ValueError(f"--epochs is at least 1, --finetune in (0, 1], {what}")
        device = pick_device(args.device)
        checkpoint, model = load_checkpoint(args.checkpoint)
        config, record = checkpoint["config"], Path(args.checkpoint).parent / "eval.jsonl"
        if not os.access(record if record.exists() else record.parent, os.W_OK):
            raise ValueError(f"{record} cannot be written: copy the checkpoint elsewhere")
        rounds, dataset = len(checkpoint["history"]), args.dataset or config["dataset"]
        data = load_dataset(dataset, args.data_dir or config["data_dir"])
        if Path(dataset) == Path(config["dataset"]):
            client_of = torch.full((len(data.train_y),), -1)
            for k, index in enumerate(checkpoint["split"]):
                client_of[index] = k
        if args.own_images:
            if client_of is None:
                raise ValueError(f"--own-images: the run's clients hold none of {dataset}")
            own, client_of = client_of >= 0, client_of[client_of >= 0]
            data = data._replace(train_x=data.train_x[own], train_y=data.train_y[own])
        sizes = f"{len(data.train_y):,} training and {len(data.test_y):,} test images"
        trained = f"{config['method']}, {rounds} rounds on {config['dataset']}, seed"
        print(f"{args.checkpoint}: {trained} {config['seed']}\nevaluated on {dataset}: {sizes}\n")
        asked = args.epochs, args.seed, args.finetune, config["amp"]  # the precision of training
        scores = evaluate(model.to(device), data, client_of, *asked)
    except KeyboardInterrupt:
        parser.exit(130, "stopped\n")
    except (ValueError, OSError, IndexError) as error:
        parser.error(str(error))
    print_scores(scores)
    flags = {name: getattr(args, name) for name in ("epochs", "finetune", "own_images", "seed")}
    line = {"dataset": dataset, "round": rounds, "flags": flags, **scores}
    line |= {"labels": len(data.train_y), "device": str(device), "torch": torch.__version__}
    with record.open("a") as file:
        file.write(json.dumps(line) + "\n")
    print(f"\n  {time.time() - start:.0f} s; one line added to {record}")


if __name__ == "__main__":
    main()
