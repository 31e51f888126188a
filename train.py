"""Train SSD, or one of its ablations, on K simulated clients: from data to checkpoint.

    python train.py --clients 10 --alpha 0.1             # the paper's run: CIFAR-10, 100 rounds
    python train.py --dataset shapes --width 16 --clients 5 --alpha 1 --rounds 10 \\
        --local-epochs 1 --batch-size 64 --lr 0.03       # no download, two minutes on two cores
    python train.py --resume runs/NAME/last.pt
    torchrun --nproc-per-node 4 train.py --clients 10    # clients shared out over processes

A run writes runs/NAME/: config.json (flags, versions, device), split.json (client -> indices of
training images), metrics.jsonl (a line a round) and last.pt (after every round), which
`python eval.py runs/NAME/last.pt` evaluates.
"""

import argparse
import contextlib
import io
import json
import math
import os
import platform
import signal
import sys
import tempfile
import time
import warnings
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torchvision

from data import DATASETS, dirichlet_split, load_dataset, two_views
from eval import OneLineParser, encode, knn_accuracy, load_checkpoint, pick_device, uniformity
from federated import keyed_generator, processes, train_federated
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
CLEAR = "\r\033[K" if sys.stderr.isatty() else ""  # wipes the progress line of a terminal
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


def build_parser(methods=METHODS):
    """Every flag, in four groups; the defaults are the paper's run."""
    parser = OneLineParser(Path(sys.argv[0]).name, description=__doc__.splitlines()[0])
    add = parser.add_argument_group("federated").add_argument
    add(
        "--dataset",
        default="cifar10",
        help=f"{', '.join(DATASETS)}, or a folder that holds train/<class>/ and test/<class>/ "
        "or val/<class>/ (%(default)s)",
    )
    add("--data-dir", default="data", help="where downloaded data sets are kept (%(default)s)")
    add("--limit", type=number(int, 1), help="train on a fixed random subset of N images (all)")
    add("--clients", type=number(int, 1), help="K, number of clients (10, or the split file's)")
    add(
        "--alpha",
        type=number(float, above=0),
        default=0.1,
        help="of the Dirichlet split of each class over the clients; small = skewed (%(default)s)",
    )
    add("--split-file", help="use this split instead: JSON, client -> indices, as split.json")
    add(
        "--participation",
        type=number(float, above=0, high=1),
        default=1.0,
        help="share of the clients that take part in a round (%(default)s)",
    )
    add(
        "--rounds",
        type=number(int, 0),
        default=100,
        help="communication rounds; 0 leaves the untrained network, to compare (%(default)s)",
    )
    add(
        "--local-epochs",
        type=number(int, 1),
        default=5,
        help="epochs on a client in a round (%(default)s)",
    )
    add = parser.add_argument_group(
        "loss: align + beta uniform + gamma DSR + delta distill"
    ).add_argument
    add(
        "--method",
        choices=methods,
        default="ssd",
        help="row of the paper's ablation, sets gamma and delta (%(default)s: 1 and 0.1)",
    )
    add("--beta", type=number(float, 0), default=1.0, help="weight of uniformity (%(default)s)")
    add("--gamma", type=number(float, 0), help="weight of DSR, instead of the method's")
    add("--delta", type=number(float, 0), help="weight of distillation, instead of the method's")
    add(
        "--scale",
        type=number(float, above=0),
        default=10.0,
        help="a, the scale of a client's own dimensions in d_k (%(default)s)",
    )
    add(
        "--projector",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="the projector; without it z is the normalised h (with)",
    )
    add = parser.add_argument_group("optimiser: SGD, fresh on every client").add_argument
    add(
        "--lr",
        type=number(float, above=0),
        default=0.1,
        help="learning rate, constant; the paper's 0.2 x batch / 256 (%(default)s)",
    )
    add("--momentum", type=number(float, 0, 1), default=0.9, help="of SGD (%(default)s)")
    add("--weight-decay", type=number(float, 0), default=1e-4, help="on all (%(default)s)")
    add(
        "--batch-size",
        type=number(int, 2),
        default=128,
        help="images, each in two views (%(default)s)",
    )
    add = parser.add_argument_group("system").add_argument
    add(
        "--width",
        type=number(int, 1),
        default=64,
        help="channels of the first stage, 64 is ResNet-18 (%(default)s)",
    )
    add(
        "--seed",
        type=number(int, 0),
        default=0,
        help="of split, initial weights, d_k, batches and views (%(default)s)",
    )
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 ... (%(default)s)")
    add("--amp", action=argparse.BooleanOptionalAction, help="bfloat16 (where it is fast)")
    add(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="torch.compile and CUDA graphs (%(default)s)",
    )
    add("--out", help="run folder (a new one under runs/)")
    add(
        "--resume",
        metavar="LAST_PT",
        help="go on with a checkpoint and its flags; --rounds may be raised",
    )
    return parser


def read_config(parser, argv, methods=METHODS):
    """Flags -> config dict, and the checkpoint when resuming (else None)."""
    defaults, unset = vars(parser.parse_args([])), object()
    given = vars(parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(defaults, unset))))
    given = {flag: value for flag, value in given.items() if value is not unset}
    if "resume" not in given:
        method = methods[given.get("method", defaults["method"])]
        return {**defaults, **method, **given}, None
    checkpoint, _ = load_checkpoint(given["resume"])
    config = vars(parser.parse_args(as_flags(checkpoint["config"])))  # as strict as with a user
    config |= {"out": str(Path(given["resume"]).parent), "device": "auto"}
    for flag in given.keys() - MAY_CHANGE:
        if given[flag] != config[flag]:
            name = flag.replace("_", "-")
            raise ValueError(
                f"--{name} {given[flag]} contradicts the checkpoint, which has "
                f"{config[flag]}: leave it out, or start without --resume"
            )
    config |= given
    if config["rounds"] < checkpoint["round"]:
        raise ValueError(f"--rounds {config['rounds']}: {checkpoint['round']} are done already")
    return config, checkpoint


def as_flags(config):
    """A config dict as the command line that gives it."""
    return [
        f"--{flag.replace('_', '-')}={value}"
        if type(value) is not bool
        else f"--{'' if value else 'no-'}{flag.replace('_', '-')}"
        for flag, value in config.items()
        if value is not None
    ]


# -------------------------------------------------------------------- split, model, loss, monitor


def make_split(config, labels, checkpoint):
    """Clients' index arrays over all training images, or --limit of them.

    From the checkpoint, if any, else from --split-file, else by Dirichlet.
    """
    pool, limit = np.arange(len(labels)), config["limit"]
    if limit:
        if limit > len(labels):
            raise ValueError(f"--limit {limit}: there are only {len(labels)} training images")
        pool = torch.randperm(len(labels), generator=keyed_generator("limit"))[:limit]
        pool = pool.sort().values.numpy()
    if not (checkpoint or config["split_file"]):
        parts = dirichlet_split(
            labels.numpy()[pool], config["clients"] or 10, config["alpha"], config["seed"]
        )
        return [pool[part] for part in parts]
    where = config["resume"] if checkpoint else f"split file {config['split_file']}"
    parts = checkpoint["split"] if checkpoint else read_split(config["split_file"])
    split = [np.sort(np.asarray(part)) for part in parts]
    if not split or min(map(len, split)) < 2:
        raise ValueError(f"{where}: every client needs at least 2 images")
    index, count = np.unique(np.concatenate(split), return_counts=True)
    for which, what in (
        (index[count > 1], "names twice"),
        (np.setdiff1d(index, pool), "names, though it is not trained on,"),
        (np.setdiff1d(pool, index), "leaves out"),
    ):
        if len(which):
            raise ValueError(
                f"{where} {what} image {which[0]} ({len(which)} such): it must be a "
                f"partition of the {len(pool)} training images"
            )
    if config["clients"] not in (None, len(split)):
        raise ValueError(f"--clients {config['clients']}: {where} has {len(split)}")
    return split


def read_split(path):
    """JSON, list or object of index lists -> list of int64 arrays; ValueError if it is another."""
    try:
        parts = json.loads(Path(path).read_text())
        parts = list(parts.values()) if isinstance(parts, dict) else parts
        if not all(type(index) is int for part in parts for index in part):
            raise TypeError
        return [np.array(part, dtype=np.int64) for part in parts]
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"split file {path} must be JSON, a list of lists of indices") from error


def make_model(config):
    """The network with its first weights, the same for the same seed."""
    torch.manual_seed(config["seed"])
    return SSDNet(config["width"], projector=config["projector"])


def make_method(config, images, split):
    """What makes the method: keyword arguments of `federated.train_federated`, here its loss."""
    return {"loss": make_loss(config, len(split), images.device)}


def make_loss(config, num_clients, device, objective=ssd_loss):
    """The local loss for federated.py: two views -> the network -> SSD's objective with d_k."""
    d = scaling_vectors(num_clients, 8 * config["width"], config["scale"], config["seed"])
    d = d.to(device)
    weights = {name: config[name] for name in ("beta", "gamma", "delta")}

    def from_views(model, x1, x2, d_k):
        with torch.autocast(device.type, torch.bfloat16, enabled=config["amp"]):
            (h1, u1), (h2, u2) = model(x1), model(x2)  # BatchNorm sees one view at a time
        return objective(h1, u1, h2, u2, d_k, **weights, hard=config["method"] == "hsd")

    compiled = (
        torch.compile(from_views, mode="reduce-overhead", dynamic=False)
        if config["compile"]
        else from_views
    )

    def loss(model, images, k, generator, global_state):
        # random numbers stay out of compiled code, and so does a small client's short batch
        full = len(images) == config["batch_size"]
        return (compiled if full else from_views)(model, *two_views(images, generator), d[k])

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
        return {
            "knn": knn_accuracy(train_h, train_y, test_h, test_y),
            "uniformity_h": uniformity(test_h),
            "uniformity_z": uniformity(test_u),
        }

    return monitor


# ---------------------------------------------------------------------------- run folder


def open_run(config, split, model, device):
    """Make the run folder, whole or not at all, with a checkpoint of the untrained network."""
    if config["out"] is None:
        name = Path(config["dataset"]).name
        name = f"runs/{name}-{config['method']}-k{len(split)}-seed{config['seed']}"
        names = [name] + [f"{name}-{i}" for i in range(2, 1000)]
        config["out"] = next(out for out in names if not Path(out).exists())
    folder = Path(config["out"])
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not empty: choose another --out, or --resume its last.pt")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    versions = {
        "python": platform.python_version(),
        "numpy": np.__version__,
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
    }
    record = {
        **config,
        "versions": versions,
        "device_name": f"{device} {name}",
        "threads": torch.get_num_threads(),
        "processes": processes()[1],
    }
    clients = {k: part.tolist() for k, part in enumerate(split)}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, ignore_cleanup_errors=True) as parent:
        unfinished = Path(parent) / "run"
        unfinished.mkdir()
        (unfinished / "config.json").write_text(json.dumps(record, indent=1) + "\n")
        (unfinished / "split.json").write_text(json.dumps(clients) + "\n")
        (unfinished / "metrics.jsonl").touch()
        save(unfinished, 0, config, split, model)
        unfinished.replace(folder)
    return folder


def reopen_run(config, rounds_done):
    """The checkpoint's run folder, with metrics.jsonl cut back to the rounds that it holds."""
    metrics = Path(config["out"]) / "metrics.jsonl"
    lines = metrics.read_bytes() if metrics.exists() else b""
    lines = lines.splitlines(keepends=True)[:rounds_done]
    write_whole(metrics, b"".join(lines))
    return metrics.parent


def save(folder, rounds_done, config, split, model):
    """Write folder/last.pt: tensors and plain values, all that --resume and eval.py need."""
    state = {
        "round": rounds_done,
        "config": config,
        "split": [torch.from_numpy(part) for part in split],
        "model": {name: value.cpu() for name, value in model.state_dict().items()},
    }
    content = io.BytesIO()
    torch.save(state, content)
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


@contextlib.contextmanager
def leave_in_order(folder, script):
    """Turn what can end a run early into one line that says how to go on, and an exit status."""
    go_on = f"Go on with: python {script} --resume {folder}/last.pt"
    try:
        yield
        return
    except KeyboardInterrupt:  # Ctrl-C, or SIGTERM
        status, why = 130, f"stopped. {go_on}"
    except FloatingPointError as error:
        status, why = 1, f"{error}. {folder} keeps the rounds before: start anew with a lower --lr"
    except torch.OutOfMemoryError:
        status, why = 1, "out of GPU memory: start anew with a smaller --batch-size or --width"
    except OSError as error:
        status, why = 1, f"{error}. The last checkpoint is whole. {go_on}"
    except RuntimeError as error:  # gloo's are plain ones
        if not (isinstance(error, dist.DistError) or "/gloo/" in str(error)):
            raise
        status, why = 1, f"another process has died ({str(error).splitlines()[0]}). {go_on}"
    if not processes()[0]:
        print(f"{CLEAR}{why}", file=sys.stderr, flush=True)
    os._exit(status) if dist.is_initialized() else sys.exit(status)  # no waiting for the others


def meet():
    """Wait for all processes; leave, silently, if one has found a mistake and gone."""
    try:
        dist.all_reduce(torch.zeros(1))
    except RuntimeError:
        sys.exit(2)


# ---------------------------------------------------------------------------- training


def run(config, rounds_done, model, monitor, method, images, split, folder):
    """All rounds that are left: train, score, print a line, append it to metrics.jsonl, save."""
    optimizer = torch.optim.SGD(
        model.parameters(), config["lr"], config["momentum"], weight_decay=config["weight_decay"]
    )
    rank, _ = processes()

    def progress(done, of):
        if CLEAR and not rank:
            print(f"{CLEAR}client {done + 1} of {of}", end="", file=sys.stderr, flush=True)

    begun = tick = time.time()
    for r, report in train_federated(
        model,
        optimizer,
        images,
        split,
        rounds=config["rounds"],
        start=rounds_done,
        participation=config["participation"],
        local_epochs=config["local_epochs"],
        batch_size=config["batch_size"],
        seed=config["seed"],
        progress=progress,
        **method,
    ):
        if rank:
            continue  # the first process scores and writes
        terms, left_out = report["terms"], report["left_out"]
        scores = monitor(model)
        seconds, tick = time.time() - tick, time.time()
        line = {
            "round": r + 1,
            "lr": optimizer.param_groups[0]["lr"],
            "clients": report["clients"],
            "left_out": left_out,
            "seconds": round(seconds, 2),
            **terms,
            **scores,
        }
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        save(folder, r + 1, config, split, model)
        minutes = (time.time() - begun) / (r + 1 - rounds_done) * (config["rounds"] - r - 1) / 60
        print(CLEAR, end="", file=sys.stderr, flush=True)
        print(
            f"round {r + 1:3d}/{config['rounds']}  "
            + "  ".join(f"{name} {value:.3f}" for name, value in terms.items())
            + f"  kNN {scores['knn']:.1f} %  {seconds:.1f} s  {minutes:.1f} min left"
            + (f"  left out, not finite: client {left_out}" if left_out else ""),
            flush=True,
        )


def prepare(argv, parser, methods, make_model, make_method):
    """Flags -> config, rounds done, data, split, network, method, run folder."""
    config, checkpoint = read_config(parser, argv, methods)
    rank, count = processes()
    if count > 1 and torch.cuda.is_available() and config["device"] in ("auto", "cuda"):
        config["device"] = f"cuda:{os.environ['LOCAL_RANK']}"
    device = pick_device(config["device"])
    if config["amp"] is None:
        config["amp"] = bf16_is_fast(device)
    if config["method"] == "hsd" and config["scale"] == 1:
        raise ValueError("--method hsd needs --scale other than 1: it marks own dimensions")
    data = load_dataset(config["dataset"], config["data_dir"])
    split = make_split(config, data.train_y, checkpoint)
    model, rounds_done = make_model(config).to(device, memory_format=torch.channels_last), 0
    if checkpoint:
        try:
            model.load_state_dict(checkpoint["model"])
        except RuntimeError as error:
            raise ValueError(
                f"{config['resume']} has weights that --method {config['method']} "
                "does not have: it is not a checkpoint of this script"
            ) from error
        rounds_done = checkpoint["round"]
    data = data._replace(train_x=data.train_x.to(device))
    method = make_method(config, data.train_x, split)
    if rank:
        folder = None
    else:
        folder = (
            reopen_run(config, rounds_done)
            if checkpoint
            else open_run(config, split, model, device)
        )
    return config, rounds_done, data, split, model, method, folder


def main(argv=None, parser=None, methods=METHODS, make_model=make_model, make_method=make_method):
    """Flags -> data, split, network -> rounds -> run folder.

    A script that trains another method hands over what differs: its flags, its rows beside
    METHODS, its network, its loss and rules; extras/baselines.py does.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"  # one line
    parser = parser or build_parser(methods)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():  # torchrun
        dist.init_process_group(timeout=timedelta(days=1))
    rank, count = processes()
    if rank:
        sys.stdout = None  # one process speaks, and checks everything before the others begin
        meet()
    try:
        config, rounds_done, data, split, model, method, folder = prepare(
            argv, parser, methods, make_model, make_method
        )
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        parser.exit(130, "stopped before the first round\n")
    if count > 1 and not rank:
        meet()  # lets the others begin
    device, sizes = next(model.parameters()).device, [len(part) for part in split]
    with leave_in_order(folder, parser.prog):
        print(
            f"{config['method']} on {config['dataset']}: {sum(sizes):,} images, {len(sizes)} "
            f"clients with {min(sizes):,} to {max(sizes):,}, {device}, "
            f"{'bfloat16' if config['amp'] else 'float32'}"
            + (f", {count} processes" if count > 1 else ""),
            flush=True,
        )
        monitor = make_monitor(config, data, np.concatenate(split))
        run(config, rounds_done, model, monitor, method, data.train_x, split, folder)
        untrained = make_model(config).to(device, memory_format=torch.channels_last)
        print(f"""
kNN {monitor(model)["knn"]:.1f} %, of the untrained encoder {monitor(untrained)["knn"]:.1f} % \
({min(MONITOR_TEST, len(data.test_y)):,} test images)
run folder {folder}/: last.pt, metrics.jsonl, split.json, config.json
next: python eval.py {folder}/last.pt
      (linear probe, fine-tuning, kNN, uniformity, effective rank: on all images)
      python {parser.prog} --resume {folder}/last.pt --rounds {2 * config["rounds"] or 10}""")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
