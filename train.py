"""Train SSD, or one of its ablations, on K simulated clients: from data to checkpoint.

    python train.py --clients 10 --alpha 0.1      # the paper's run: CIFAR-10, 100 rounds
    python train.py --dataset shapes --width 16 --rounds 5 --local-epochs 1     # no download
    python train.py --resume runs/NAME/last.pt

A run writes runs/NAME/: config.json (flags, versions, device), split.json (client -> indices of
training images), metrics.jsonl (a line a round) and last.pt (after every round), which
`python eval.py runs/NAME/last.pt` evaluates.
"""
import argparse
import json
import math
import os
import platform
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torchvision

from data import DATASETS, dirichlet_split, load_dataset, two_views
from eval import OneLineParser, encode, knn_accuracy, load_checkpoint, pick_device, uniformity
from federated import keyed_generator, train_federated
from losses import scaling_vectors, ssd_loss
from model import SSDNet, bf16_is_fast

# The rows of the paper's ablation are choices of weights: gamma of DSR, delta of distillation.
# hsd, besides, replaces z by losses.hard_separation.
METHODS = {
    "fedalignuniform": {"gamma": 0.0, "delta": 0.0},
    "pd": {"gamma": 0.0, "delta": 0.1},
    "dsr": {"gamma": 1.0, "delta": 0.0},
    "ssd": {"gamma": 1.0, "delta": 0.1},
    "hsd": {"gamma": 0.0, "delta": 0.0},
}
MAY_CHANGE = {"resume", "rounds", "device", "data_dir"}  # on --resume; the rest is the checkpoint's
MONITOR_TRAIN, MONITOR_TEST = 2000, 1000  # images of each round's kNN; eval.py takes all

# ---------------------------------------------------------------------------- flags


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
        if not (inside and value <= high and math.isfinite(value)):
            noun = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"must be {noun} {bound}, got {text!r}")
        return value
    return parse


def build_parser():
    """Every flag, in four groups; the defaults are the paper's run."""
    parser = OneLineParser(description=__doc__.splitlines()[0])
    add = parser.add_argument_group("federated").add_argument
    add("--dataset", default="cifar10",
        help=f"{', '.join(DATASETS)}, or a folder that holds train/<class>/ and test/<class>/ "
        "or val/<class>/ (%(default)s)")
    add("--data-dir", default="data", help="where downloaded data sets are kept (%(default)s)")
    add("--limit", type=number(int, 1), help="train on a fixed random subset of N images (all)")
    add("--clients", type=number(int, 1), help="K, number of clients (10, or the split file's)")
    add("--alpha", type=number(float, above=0), default=0.1,
        help="of the Dirichlet split of each class over the clients; small = skewed (%(default)s)")
    add("--split-file", help="use this split instead: JSON, client -> indices, as split.json")
    add("--participation", type=number(float, above=0, high=1), default=1.0,
        help="share of the clients that take part in a round (%(default)s)")
    add("--rounds", type=number(int, 1), default=100, help="communication rounds (%(default)s)")
    add("--local-epochs", type=number(int, 1), default=5,
        help="epochs on a client in a round (%(default)s)")
    add = parser.add_argument_group(
        "loss: align + beta uniform + gamma DSR + delta distill").add_argument
    add("--method", choices=METHODS, default="ssd",
        help="row of the paper's ablation, sets gamma and delta (%(default)s: 1 and 0.1)")
    add("--beta", type=number(float, 0), default=1.0, help="weight of uniformity (%(default)s)")
    add("--gamma", type=number(float, 0), help="weight of DSR, instead of the method's")
    add("--delta", type=number(float, 0), help="weight of distillation, instead of the method's")
    add("--scale", type=number(float, above=0), default=10.0,
        help="a, the scale of a client's own dimensions in d_k (%(default)s)")
    add("--projector", action=argparse.BooleanOptionalAction, default=True,
        help="the projector; without it z is the normalised h (with)")
    add = parser.add_argument_group("optimiser: SGD, fresh on every client").add_argument
    add("--lr", type=number(float, above=0), default=0.1,
        help="learning rate, constant; the paper's 0.2 x batch / 256 (%(default)s)")
    add("--momentum", type=number(float, 0, 1), default=0.9, help="of SGD (%(default)s)")
    add("--weight-decay", type=number(float, 0), default=1e-4, help="on all (%(default)s)")
    add("--batch-size", type=number(int, 2), default=128,
        help="images, each in two views (%(default)s)")
    add = parser.add_argument_group("system").add_argument
    add("--width", type=number(int, 1), default=64,
        help="channels of the first stage, 64 is ResNet-18 (%(default)s)")
    add("--seed", type=number(int, 0), default=0,
        help="of split, initial weights, d_k, batches and views (%(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 ... (%(default)s)")
    add("--amp", action=argparse.BooleanOptionalAction, help="bfloat16 (where it is fast)")
    add("--out", help="run folder (a new one under runs/)")
    add("--resume", metavar="LAST_PT", help="go on with a checkpoint and its flags; "
        "--rounds may be raised")
    return parser


def read_config(parser, argv):
    """Flags -> config dict, and checkpoint and network when resuming (else None, None)."""
    defaults, unset = vars(parser.parse_args([])), object()
    given = vars(parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(defaults, unset))))
    given = {flag: value for flag, value in given.items() if value is not unset}
    if "resume" not in given:
        method = METHODS[given.get("method", defaults["method"])]
        return {**defaults, **method, **given}, None, None
    checkpoint, model = load_checkpoint(given["resume"])
    folder = str(Path(given["resume"]).parent)
    config = {**defaults, **checkpoint["config"], "out": folder, "device": "auto"}
    for flag in given.keys() - MAY_CHANGE:
        if given[flag] != config[flag]:
            name = flag.replace("_", "-")
            raise ValueError(f"--{name} {given[flag]} contradicts the checkpoint, which has "
                             f"{config[flag]}: leave it out, or start without --resume")
    config |= given
    if config["rounds"] < checkpoint["round"]:
        raise ValueError(f"--rounds {config['rounds']}: {checkpoint['round']} are done already")
    return config, checkpoint, model


# ---------------------------------------------------------------------------- split, loss, monitor


def make_split(config, labels):
    """Clients' index arrays over all training images, or --limit of them: Dirichlet or a file."""
    pool, limit = np.arange(len(labels)), config["limit"]
    if limit:
        if limit > len(labels):
            raise ValueError(f"--limit {limit}: there are only {len(labels)} training images")
        pool = torch.randperm(len(labels), generator=keyed_generator("limit"))[:limit]
        pool = pool.sort().values.numpy()
    if config["split_file"]:
        split = read_split(config["split_file"], pool)
        if config["clients"] not in (None, len(split)):
            raise ValueError(f"--clients {config['clients']}: the split file has {len(split)}")
        return split
    parts = dirichlet_split(labels.numpy()[pool], config["clients"] or 10, config["alpha"],
                            config["seed"])
    return [pool[part] for part in parts]


def read_split(path, pool):
    """JSON list or object of index lists -> arrays; ValueError if they are no partition of pool."""
    try:
        parts = json.loads(Path(path).read_text())
        parts = list(parts.values()) if isinstance(parts, dict) else parts
        if not all(type(index) is int for part in parts for index in part):
            raise TypeError
        parts = [np.array(sorted(part), dtype=np.int64) for part in parts]
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"split file {path} must be JSON, a list of lists of indices") from error
    if not parts or min(map(len, parts)) < 2:
        raise ValueError(f"split file {path}: every client needs at least 2 images")
    index, count = np.unique(np.concatenate(parts), return_counts=True)
    for which, what in ((index[count > 1], "names twice"),
                        (np.setdiff1d(index, pool), "names, though it is not trained on,"),
                        (np.setdiff1d(pool, index), "leaves out")):
        if len(which):
            raise ValueError(f"split file {path} {what} image {which[0]} ({len(which)} such): it "
                             f"must be a partition of the {len(pool)} training images")
    return parts


def make_loss(config, num_clients, device):
    """The local objective for federated.py: two views -> the network -> SSD's loss with d_k."""
    d = scaling_vectors(num_clients, 8 * config["width"], config["scale"], config["seed"])
    d = d.to(device)
    weights = {name: config[name] for name in ("beta", "gamma", "delta")}

    def loss(model, images, k, generator):
        x1, x2 = two_views(images, generator)
        with torch.autocast(device.type, torch.bfloat16, enabled=config["amp"]):
            (h1, u1), (h2, u2) = model(x1), model(x2)  # BatchNorm sees one view at a time
        return ssd_loss(h1, u1, h2, u2, d[k], **weights, hard=config["method"] == "hsd")
    return loss


def make_monitor(config, data, pool):
    """A cheap score of the model for every round, on a fixed random part of the images."""
    def some(index, count):
        return index[torch.randperm(len(index), generator=keyed_generator("monitor"))[:count]]
    train = some(torch.from_numpy(pool), MONITOR_TRAIN)
    test = some(torch.arange(len(data.test_y)), MONITOR_TEST)

    def monitor(model):
        train_h, _ = encode(model, data.train_x[train], config["amp"])
        test_h, test_u = encode(model, data.test_x[test], config["amp"])
        train_y, test_y = (y.to(test_h.device) for y in (data.train_y[train], data.test_y[test]))
        return {"knn": knn_accuracy(train_h, train_y, test_h, test_y),
                "uniformity_h": uniformity(test_h), "uniformity_z": uniformity(test_u)}
    return monitor


# ---------------------------------------------------------------------------- run folder


def open_run(config, split, device):
    """Make a new run folder with config.json, split.json and an empty metrics.jsonl."""
    if config["out"] is None:
        name = Path(config["dataset"]).name
        name = f"runs/{name}-{config['method']}-k{len(split)}-seed{config['seed']}"
        names = [name] + [f"{name}-{i}" for i in range(2, 1000)]
        config["out"] = next(out for out in names if not Path(out).exists())
    folder = Path(config["out"])
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not empty: choose another --out, or --resume its last.pt")
    folder.mkdir(parents=True, exist_ok=True)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    versions = {"python": platform.python_version(), "numpy": np.__version__,
                "torch": torch.__version__, "torchvision": torchvision.__version__}
    record = {**config, "versions": versions, "device_name": f"{device} {name}",
              "threads": torch.get_num_threads()}
    clients = {k: part.tolist() for k, part in enumerate(split)}
    (folder / "config.json").write_text(json.dumps(record, indent=1) + "\n")
    (folder / "split.json").write_text(json.dumps(clients) + "\n")
    (folder / "metrics.jsonl").touch()
    return folder


def reopen_run(config, rounds_done):
    """The checkpoint's run folder, with metrics.jsonl cut back to the rounds that it holds."""
    metrics = Path(config["out"]) / "metrics.jsonl"
    lines = metrics.read_bytes().splitlines(keepends=True)[:rounds_done]
    write_whole(metrics, lambda file: file.writelines(lines))
    return metrics.parent


def write_whole(path, write):
    """Write a file completely or not at all: beside it, out to the disk, then into its place."""
    partial = path.with_name(path.name + ".tmp")
    with partial.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


# ---------------------------------------------------------------------------- training


def run(config, checkpoint, model, monitor, loss, data, split, device, folder):
    """All rounds: train, score, print a line, append it to metrics.jsonl, write last.pt."""
    optimizer = torch.optim.SGD(model.parameters(), config["lr"], config["momentum"],
                                weight_decay=config["weight_decay"])
    terminal = sys.stderr.isatty()

    def progress(done, of):
        if terminal:
            print(f"\r\033[Kclient {done + 1} of {of}", end="", file=sys.stderr, flush=True)

    first = checkpoint["round"] if checkpoint else 0
    begun = tick = time.time()
    for r, report in train_federated(
            model, optimizer, data.train_x.to(device), split, loss, config["rounds"], first,
            participation=config["participation"], local_epochs=config["local_epochs"],
            batch_size=config["batch_size"], seed=config["seed"], progress=progress):
        terms = report["terms"]
        if not all(map(math.isfinite, terms.values())):
            sys.exit(f"round {r + 1}: the loss is not finite ({terms}): lower --lr. {folder} keeps "
                     f"the {r} rounds before")
        scores = monitor(model)
        seconds, tick = time.time() - tick, time.time()
        line = {"round": r + 1, "lr": config["lr"], "clients": report["clients"],
                "seconds": round(seconds, 2), **terms, **scores}
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        state = {"round": r + 1, "config": config,
                 "split": [torch.from_numpy(part) for part in split],
                 "model": {name: value.cpu() for name, value in model.state_dict().items()}}
        write_whole(folder / "last.pt", lambda file: torch.save(state, file))
        minutes = (time.time() - begun) / (r + 1 - first) * (config["rounds"] - r - 1) / 60
        print("\r\033[K" if terminal else "", end="", file=sys.stderr, flush=True)
        print(f"round {r + 1:3d}/{config['rounds']}  "
              + "  ".join(f"{name} {value:.3f}" for name, value in terms.items())
              + f"  kNN {scores['knn']:.1f} %  {seconds:.1f} s  {minutes:.1f} min left", flush=True)


def main(argv=None):
    """Flags -> data, split, network -> rounds -> run folder."""
    parser = build_parser()
    try:
        config, checkpoint, model = read_config(parser, argv)
        device = pick_device(config["device"])
        if config["amp"] is None:
            config["amp"] = bf16_is_fast(device)
        if config["method"] == "hsd" and config["scale"] == 1:
            raise ValueError("--method hsd needs --scale other than 1: it marks own dimensions")
        data = load_dataset(config["dataset"], config["data_dir"])
        if checkpoint:
            split = [part.numpy() for part in checkpoint["split"]]
            if max(part.max() for part in split) >= len(data.train_y):
                raise ValueError(f"{config['dataset']} has fewer images than the run's split")
            folder = reopen_run(config, checkpoint["round"])
        else:
            split = make_split(config, data.train_y)
            folder = open_run(config, split, device)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    torch.manual_seed(config["seed"])
    untrained = SSDNet(config["width"], projector=config["projector"])
    untrained = untrained.to(device, memory_format=torch.channels_last)
    monitor = make_monitor(config, data, np.concatenate(split))
    knn_before = monitor(untrained)["knn"]
    sizes = [len(part) for part in split]
    precision = "bfloat16" if config["amp"] else "float32"
    print(f"{config['method']} on {config['dataset']}: {sum(sizes):,} images, {len(sizes)} clients "
          f"with {min(sizes):,} to {max(sizes):,}, {device}, {precision}")
    model = model.to(device) if checkpoint else untrained
    loss = make_loss(config, len(split), device)
    run(config, checkpoint, model, monitor, loss, data, split, device, folder)
    print(f"""
kNN {monitor(model)['knn']:.1f} %, of the untrained encoder {knn_before:.1f} % \
({min(MONITOR_TEST, len(data.test_y)):,} test images)
run folder {folder}/: last.pt, metrics.jsonl, split.json, config.json
next: python eval.py {folder}/last.pt
      (linear probe, kNN on all images, uniformity, effective rank)
      python train.py --resume {folder}/last.pt --rounds {2 * config['rounds']}""")


if __name__ == "__main__":
    main()
