"""How good is a representation? Measures on frozen features, and a script that takes a checkpoint.

    knn_accuracy       weighted k-nearest-neighbour vote, cosine similarity     per cent
    linear_probe       a linear classifier on frozen features                   per cent
    fine_tune          the whole network, on a few labels                       per cent
    uniformity         log E exp(-t ||z - z'||^2)                               [-4t, 0]
    mean_parts         the same, t = 2, and within and between clients          [-8, 0]
    alignment          E ||z1 - z2||^2 over two views                           [0, 4]
    effective_rank     exp(entropy of the normalised singular values)           [1, D]

A protocol is fixed beforehand and its last epoch reported: nothing is chosen by its test score.
Below the measures stands what train.py needs too: device, flags, run folder, checkpoint.
Needs data.py and model.py beside it. In another project:

    >>> h, y = torch.eye(10).repeat(20, 1), torch.arange(10).repeat(20)     # your features, labels
    >>> knn_accuracy(h, y, h, y, k=20), linear_probe(h, y, h, y, epochs=20)
    (100.0, 100.0)
    >>> round(effective_rank(h), 3)
    10.0

    python eval.py runs/NAME/last.pt                                 # every protocol of the paper
    python eval.py runs/NAME/last.pt --finetune                      # without fine-tuning
    python eval.py runs/NAME/last.pt --dataset cifar100              # transfer
"""

import argparse
import copy
import io
import json
import math
import os
import platform
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision

from data import crop, draw_params, load_dataset, two_views
from model import SSDNet

# ---------------------------------------------------------------------------- measures


def knn_accuracy(train_h, train_y, test_h, test_y, k=200, temperature=0.1):
    """Weighted kNN (Wu et al. 2018): the k most similar training rows vote by exp(cosine / T).

    train_h (N, D), test_h (M, D): features of any length; train_y (N,), test_y (M,): int64 labels.
    Returns the per cent of test rows whose class wins. k is lowered to N where N is smaller.
    """
    bank, queries = F.normalize(train_h.float(), dim=1), F.normalize(test_h.float(), dim=1)
    classes, correct = int(train_y.max()) + 1, 0
    for query, label in zip(queries.split(1000), test_y.split(1000)):
        similarity, nearest = (query @ bank.T).topk(min(k, len(bank)))
        votes = query.new_zeros(len(query), classes)
        votes.scatter_add_(1, train_y[nearest], (similarity / temperature).exp())
        correct = correct + (votes.argmax(1) == label).sum()  # on the device: no wait in between
    return 100 * int(correct) / len(test_y)


def linear_probe(train_h, train_y, test_h, test_y, epochs=200, lr=3e-3, batch_size=512, seed=0):
    """Linear classifier on frozen features, softmax cross-entropy, Adam: per cent on the test rows.

    Features (N, D) as they come, labels int64 (N,). The defaults are the paper's protocol. The
    head starts at zero and `seed` shuffles; the last epoch is what is reported.
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
    with torch.no_grad():
        return 100 * (head(test_h).argmax(1) == test_y).float().mean().item()


def stratified(labels, fraction, seed=0):
    """Indices of round(fraction * n_c) of each class's n_c samples, at least one: sorted int64."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    by_class = [order[labels[order] == c] for c in labels.unique()]
    return torch.cat([own[: max(1, round(fraction * len(own)))] for own in by_class]).sort().values


def fine_tune(
    model, train_x, train_y, test_x, test_y, epochs=200, lr=1e-3, batch_size=128, seed=0, amp=None
):
    """Train a copy of the encoder and a linear head on labelled images: per cent on the test set.

    Images uint8 (N, 3, H, W), labels int64 (N,), all on the CPU. The paper's protocol: SGD with
    momentum 0.9, lr 1e-3 for the encoder and 0.3 for the head, cross-entropy, RandomResizedCrop
    with scale (0.64, 1) and flip. The head starts at zero, `seed` shuffles and crops; the
    last epoch is what is reported. The model itself is not changed.
    """
    device = next(model.parameters()).device
    amp = bf16_is_fast(device) if amp is None else amp
    model, train_x, train_y = copy.deepcopy(model), train_x.to(device), train_y.to(device)
    head = _zero_head(encode(model, test_x[:1], amp)[0], train_y)
    groups = [{"params": model.encoder.parameters()}, {"params": head.parameters(), "lr": 0.3}]
    optimizer = torch.optim.SGD(groups, lr, momentum=0.9)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(epochs):
        order = torch.randperm(len(train_x), generator=generator).to(device)
        for batch in order.split(batch_size):
            drawn = draw_params(len(batch), *train_x.shape[2:], generator, scale=(0.64, 1.0))
            box, flip = drawn["box"].to(device), drawn["flip"].to(device)
            x = crop(train_x[batch].float() / 255, box, flip)
            with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                h = model.encoder(x)
            optimizer.zero_grad()
            F.cross_entropy(head(h.float()), train_y[batch]).backward()
            optimizer.step()
    with torch.no_grad():
        predicted = head(encode(model, test_x, amp)[0]).argmax(1)
    return 100 * (predicted == test_y.to(device)).float().mean().item()


def _zero_head(h, labels):
    """A linear classifier of features like h (N, D) that starts at zero."""
    head = torch.nn.Linear(h.shape[1], int(labels.max()) + 1).to(h.device)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    return head


def uniformity_parts(h, client, t=2.0):
    """Global uniformity, and what each client and each pair of clients contributes to it.

        total = log( sum_k w_kk E_kk + sum_{i != j} w_ij E_ij )
        E_ij  = E exp(-t ||z - z'||^2), z of client i, z' of client j, two different rows

    where z are h's rows on the unit sphere and w_ij is the share of the pairs (i, j).
    h (N, D), client (N,) int64 ids below K -> total (), in [-4t, 0], lower is more uniform;
    intra (K,), the terms w_kk E_kk; inter (K, K), the terms w_ij E_ij with a zero diagonal:
    total = log(intra.sum() + inter.sum()). ValueError for fewer than two rows.
    The paper prints this equation with a leading minus, which does not fit its own tables. This is
    the sign of Wang & Isola (2020), and the tables show -total.
    """
    if h.ndim != 2 or len(h) < 2 or client.shape != h.shape[:1]:
        raise ValueError(
            "uniformity needs h (N, D) with N >= 2 and one client id a row, "
            f"got {tuple(h.shape)} and {tuple(client.shape)}"
        )
    z, member = F.normalize(h.float(), dim=1), F.one_hot(client.long()).float()
    sums = 0
    for rows in torch.arange(len(z), device=z.device).split(1000):
        kernel = (t * (2 * z[rows] @ z.T - 2)).exp()
        kernel[rows - rows[0], rows] = 0  # a row is no pair with itself
        sums = sums + (member[rows].T @ (kernel @ member)).double()
    shares = sums / (len(z) * (len(z) - 1))
    intra = shares.diagonal().clone()
    return shares.sum().log(), intra, shares - intra.diag()


def mean_parts(h, client):
    """Uniformity, and its mean over pairs within a client and over pairs of two: floats.

    log E exp(-2 ||z - z'||^2), E over all pairs of rows, over the intra- and over the inter-client
    pairs; h, client as in `uniformity_parts`. NaN for a kind that has no pairs.
    """
    total, intra, inter = uniformity_parts(h, client)
    sizes = torch.bincount(client).double()
    own = (sizes * (sizes - 1)).sum() / (len(h) * (len(h) - 1))  # share of intra-client pairs
    return total.item(), (intra.sum() / own).log().item(), (inter.sum() / (1 - own)).log().item()


def uniformity(h, t=2.0):
    """log mean of exp(-t ||z - z'||^2) over pairs of rows z = h / ||h||: (N, D) -> [-4t, 0]."""
    return uniformity_parts(h, torch.zeros(len(h), dtype=torch.long, device=h.device), t)[0].item()


def alignment(h1, h2):
    """mean ||z1 - z2||^2, z = h / ||h||: two views' features (N, D) -> [0, 4], lower is closer."""
    z1, z2 = F.normalize(h1.float(), dim=1), F.normalize(h2.float(), dim=1)
    return (z1 - z2).square().sum(1).mean().item()


def effective_rank(h):
    """exp(-sum p log p), p = singular values of the unit rows of h (N, D) over their sum: [1, D].

    Roy & Vetterli 2007; the rows are not centred.
    """
    singular = torch.linalg.svdvals(F.normalize(h.double(), dim=1))
    return torch.special.entr(singular / singular.sum()).sum().exp().item()


@torch.no_grad()
def encode(model, images, amp=None):
    """Frozen features h, u (N, D), float32, of images (N, 3, H, W), uint8 or float in [0, 1].

    BatchNorm uses its running statistics; amp: bfloat16 autocast, by default where it is fast.
    """
    device = next(model.parameters()).device
    amp = bf16_is_fast(device) if amp is None else amp
    was_training, features = model.training, []
    model.eval()
    for batch in images.split(500):
        batch = batch.to(device)
        batch = batch if batch.is_floating_point() else batch.float() / 255
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            features.append([part.float() for part in model(batch)])
    model.train(was_training)
    return tuple(torch.cat(part) for part in zip(*features))


# ---------------------------------------------------------------------------- device, flags, runs


def pick_device(name="auto"):
    """A name -> torch.device, ValueError if it is not there; "auto": CUDA, else the CPU.

    Under torchrun "auto" and "cuda" are the process's own GPU.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        hint = "take --device cpu or auto, or fewer processes"
        raise ValueError(f"device {name!r} is not there: {hint}") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device {name!r} is not supported: take --device cpu, cuda or auto")
    return device


def bf16_is_fast(device):
    """Whether bfloat16 autocast pays: CUDA from Ampere on, CPUs with AMX, AMD's with AVX512-BF16.

    On an Intel Xeon with AVX512-BF16 and without AMX a step takes 1.3 times as long in bfloat16.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    return "amx_bf16" in text or ("avx512_bf16" in text and "AuthenticAMD" in text)


class OneLineParser(argparse.ArgumentParser):
    """argparse that reports a mistake in one line, exit status 2, and takes no flag abbreviated."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message):
        """Print what is wrong and leave."""
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def number(kind, low=None, high=math.inf, above=None):
    """An argparse type: a finite int or float, at least `low` or above `above`, at most `high`."""
    bound = f"above {above}" if low is None else f"at least {low}"
    bound += f" and at most {high}" if high < math.inf else ""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        inside = value > above if low is None else value >= low
        if not (inside and value <= high and value < math.inf):
            noun = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"must be {noun} {bound}, got {text!r}")
        return value

    return parse


def open_run(config, split, model):
    """Make config["out"], whole or not at all, with a checkpoint of the untrained network: Path.

    Where "out" is None it is set to a new folder under runs/. ValueError if it has files.
    """
    if config["out"] is None:
        name = f"{Path(config['dataset']).name}-{config['method']}-k{config['clients']}"
        name = f"runs/{name}-seed{config['seed']}"
        names = [name] + [f"{name}-{i}" for i in range(2, 1000)]
        config["out"] = next(out for out in names if not Path(out).exists())
    folder, device = Path(config["out"]), next(model.parameters()).device
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not empty: choose another --out, or --resume its last.pt")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    versions = {module.__name__: module.__version__ for module in (np, torch, torchvision)}
    record = {
        **config,
        "versions": {"python": platform.python_version(), **versions},
        "device_name": f"{device} {name}",
        "threads": torch.get_num_threads(),
        "processes": int(os.environ.get("WORLD_SIZE", 1)),
    }
    clients = {k: part.tolist() for k, part in enumerate(split)}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, ignore_cleanup_errors=True) as parent:
        unfinished = Path(parent) / "run"
        unfinished.mkdir()
        write_whole(unfinished / "config.json", json.dumps(record, indent=1).encode())
        write_whole(unfinished / "split.json", json.dumps(clients).encode())
        save_checkpoint(unfinished, config, split, model, [])
        unfinished.replace(folder)
    return folder


def save_checkpoint(folder, config, split, model, history):
    """Write metrics.jsonl, a line a round, then last.pt, all that --resume and eval.py need.

    Weights and rounds done are enough to go on exactly: every client begins with a fresh optimiser,
    and all random numbers are keyed by seed, round and client.
    """
    lines = "".join(json.dumps(line) + "\n" for line in history)
    state = {"config": {**config, "resume": None}, "history": history}
    state["split"] = [torch.from_numpy(part) for part in split]
    state["model"] = {name: value.cpu() for name, value in model.state_dict().items()}
    content = io.BytesIO()
    torch.save(state, content)
    write_whole(folder / "metrics.jsonl", lines.encode())
    write_whole(folder / "last.pt", content.getvalue())


def write_whole(path, content):
    """Write a file completely or not at all: beside it, out to the disk, then into its place."""
    partial = path.with_name(path.name + ".tmp")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def load_checkpoint(path):
    """A checkpoint of train.py -> its dict, and its network on the CPU, in evaluation mode.

    No code in it is run. Where a method has more parts than encoder and projector, they are left
    aside. ValueError if the file is no checkpoint, or its weights do not fit its own config.
    """
    if not Path(path).is_file():
        raise ValueError(f"no checkpoint at {path}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        config, split = checkpoint["config"], checkpoint["split"]
        if not {"dataset", "method", "seed", "width", "projector"} <= config.keys():
            raise ValueError("its config is not one")
        if not all(type(line) is dict for line in checkpoint["history"]):
            raise ValueError("its history is not one")
        if any(part.ndim != 1 or part.dtype != torch.int64 or part.min() < 0 for part in split):
            raise ValueError("its split is not one")
        with torch.device("meta"):  # no memory is taken before the shapes are known to fit
            model = SSDNet(config["width"], projector=config["projector"])
        own = ("encoder.", "projector.")
        state = {name: v for name, v in checkpoint["model"].items() if name.startswith(own)}
        model.load_state_dict(state, assign=True)
        return checkpoint, model.eval().to(memory_format=torch.channels_last)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:100]
        raise ValueError(f"{path} is not a checkpoint of this train.py ({reason})") from error


# ---------------------------------------------------------------------------- script


def evaluate(model, data, client_of=None, epochs=200, seed=0, fractions=(), amp=None):
    """All measures of one network on `data` (`data.Images`), as a flat dict of floats.

    Accuracies train on all training images (fine-tuning: on these fractions of them) and test on
    all test images. Uniformity, effective rank and norm of h and of u, the projector's output: on
    all test images; alignment: on two views of 5,000 random ones. Intra- and inter-client parts: on
    at most 5,000 training images, client_of (N,) telling the client that holds each, -1 for none;
    each is log E over the pairs of its kind, so that it compares with the whole. amp: as `encode`.
    """
    device = next(model.parameters()).device
    train_y, test_y = data.train_y.to(device), data.test_y.to(device)
    train_h, train_u = encode(model, data.train_x, amp)
    test_h, test_u = encode(model, data.test_x, amp)
    generator = torch.Generator().manual_seed(seed)
    some = torch.randperm(len(data.test_x), generator=generator)[:5000]
    views = two_views(data.test_x[some].to(device), generator)
    (h1, u1), (h2, u2) = (encode(model, view, amp) for view in views)
    scores = {
        "linear_probe": linear_probe(train_h, train_y, test_h, test_y, epochs, seed=seed),
        "knn": knn_accuracy(train_h, train_y, test_h, test_y),
    }
    for fraction in fractions:
        some = stratified(data.train_y, fraction, seed)
        four = data.train_x[some], data.train_y[some], data.test_x, data.test_y
        scores[f"finetune_{fraction:g}"] = fine_tune(model, *four, epochs, seed=seed, amp=amp)
    for part, test, one, two in (("h", test_h, h1, h2), ("z", test_u, u1, u2)):
        scores[f"uniformity_{part}"] = uniformity(test)
        scores[f"alignment_{part}"] = alignment(one, two)
        scores[f"effective_rank_{part}"] = effective_rank(test)
        scores[f"norm_{part}"] = test.norm(dim=1).mean().item()
    if client_of is not None and client_of.max() > 0:
        held = (client_of >= 0).nonzero()[:, 0]
        held = held[torch.randperm(len(held), generator=generator)[:5000]]
        for part, train in (("h", train_h), ("z", train_u)):
            _, intra, inter = mean_parts(train[held.to(device)], client_of[held].to(device))
            scores[f"uniformity_intra_{part}"] = intra
            scores[f"uniformity_inter_{part}"] = inter
    return scores


def quick_scores(model, train_x, train_y, test_x, test_y, amp=None):
    """kNN and the uniformity of h and z of these images: what train.py shows after every round."""
    (train_h, _), (test_h, test_u) = (encode(model, x, amp) for x in (train_x, test_x))
    knn = knn_accuracy(train_h, train_y.to(train_h.device), test_h, test_y.to(test_h.device))
    return {"knn": knn, "uniformity_h": uniformity(test_h), "uniformity_z": uniformity(test_u)}


def print_scores(scores):
    """The table of `evaluate`; uniformity with the sign of the paper's tables."""
    print(f"  linear probe      {scores['linear_probe']:6.2f} %")
    for key in (key for key in scores if key.startswith("finetune_")):
        print(f"  fine-tuned, {100 * float(key[9:]):3g} % {scores[key]:6.2f} %")
    print(f"  kNN (k=200)       {scores['knn']:6.2f} %\n")
    print("                        h        z\n                  encoder  projector")
    rows = (
        ("-L_uniform", "uniformity", -1),
        ("  intra-client", "uniformity_intra", -1),
        ("  inter-client", "uniformity_inter", -1),
        ("alignment", "alignment", 1),
        ("effective rank", "effective_rank", 1),
        ("norm of h, u", "norm", 1),
    )
    for label, key, sign in rows:
        if f"{key}_h" in scores:
            values = (sign * scores[f"{key}_{part}"] for part in "hz")
            print(f"  {label:15s}" + "".join(f"{value:9.3f}" for value in values))


# fmt: off
def build_parser():
    """Every flag; the defaults are the paper's protocol."""
    parser = OneLineParser("eval.py", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("checkpoint", help="runs/NAME/last.pt, as train.py wrote it")
    add("--dataset", help="another data set than the checkpoint's (transfer)")
    add("--data-dir", help="where downloaded data sets are kept (the run's)")
    add("--epochs", type=number(int, 1), default=200,
        help="of probe and fine-tuning (%(default)s, as paper)")
    add("--finetune", type=number(float, above=0, high=1), nargs="*", default=[0.01, 0.1],
        metavar="SHARE",
        help="shares of the labels to fine-tune on, none to leave it out (0.01 0.1, as the paper)")
    add("--own-images", action="store_true",
        help="take labels only of the images that the run's clients hold (a run with --limit)")
    add("--seed", type=number(int, 0, 2**63 - 1), default=0,
        help="of label subsets, shuffling, views (%(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 ... (%(default)s)")
    return parser
# fmt: on


def main(argv=None):
    """Evaluate a checkpoint: print a table, append one line to eval.jsonl beside it."""
    parser = build_parser()
    args = parser.parse_args(argv)
    start, client_of = time.time(), None
    try:
        device = pick_device(args.device)
        checkpoint, model = load_checkpoint(args.checkpoint)
        config, record = checkpoint["config"], Path(args.checkpoint).parent / "eval.jsonl"
        if not os.access(record if record.exists() else record.parent, os.W_OK):
            raise ValueError(f"{record} cannot be written: copy the checkpoint elsewhere")
        dataset = args.dataset or config["dataset"]
        data = load_dataset(dataset, args.data_dir or config.get("data_dir", "data"))
        if Path(dataset) == Path(config["dataset"]):
            client_of = torch.full((len(data.train_y),), -1)
            for k, index in enumerate(checkpoint["split"]):
                client_of[index] = k
        if args.own_images:
            if client_of is None:
                raise ValueError(f"--own-images: the run's clients hold none of {dataset}")
            own, client_of = client_of >= 0, client_of[client_of >= 0]
            data = data._replace(train_x=data.train_x[own], train_y=data.train_y[own])
    except (ValueError, OSError, IndexError) as error:
        parser.error(str(error))
    print(
        f"{args.checkpoint}: {config['method']}, {len(checkpoint['history'])} rounds on "
        f"{config['dataset']}, seed {config['seed']}\nevaluated on {dataset}: "
        f"{len(data.train_y):,} training and {len(data.test_y):,} test images\n"
    )
    asked = args.epochs, args.seed, args.finetune, config.get("amp")  # the precision of training
    try:
        scores = evaluate(model.to(device), data, client_of, *asked)
    except KeyboardInterrupt:
        parser.exit(130, "stopped\n")
    print_scores(scores)
    flags = {name: getattr(args, name) for name in ("epochs", "finetune", "own_images", "seed")}
    line = {
        "dataset": dataset,
        "round": len(checkpoint["history"]),
        "flags": flags,
        **scores,
        "labels": len(data.train_y),
        "device": str(device),
        "torch": torch.__version__,
        "seconds": round(time.time() - start, 1),
    }
    with record.open("a") as file:
        file.write(json.dumps(line) + "\n")
    print(f"\n  {time.time() - start:.0f} s; one line added to {record}")


if __name__ == "__main__":
    main()
