r"""Train SSD, or one of its ablations, on K simulated clients: from data to checkpoint.

    python train.py --clients 10 --alpha 0.1             # the paper's run: CIFAR-10, 100 rounds
    python train.py --dataset patterns --width 8 --clients 3 --alpha 1 --rounds 8 \
        --local-epochs 2 --batch-size 32 --lr 0.05       # no download, three minutes on two cores
    python train.py --resume runs/NAME/last.pt           # goes on; --rounds, --lr ... may change
    torchrun --nproc-per-node 4 train.py --clients 10    # clients shared out over processes

Read `main` first, at the end. A run writes runs/NAME/: config.json (flags, versions, device),
split.json (client -> indices of training images) and, after every round, last.pt and metrics.jsonl
(a line a round). `python eval.py runs/NAME/last.pt` evaluates it.
"""

import argparse
import io
import json
import os
import signal
import sys
import time
import warnings
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torchvision

from data import check_split, dirichlet_split, draw_views, load_dataset, make_views, read_split
from eval import as_shown, one_line_parser, pick_device, quick_scores
from federated import gather, keyed_generator, processes, train_federated
from losses import scaling_vectors, ssd_loss
from model import SSDNet, load_checkpoint

# Rows of the paper's ablation: gamma of DSR, delta of distillation; hsd has hard_separation for z.
METHODS = {
    "fedalignuniform": {"gamma": 0.0, "delta": 0.0},
    "pd": {"gamma": 0.0, "delta": 0.1},
    "dsr": {"gamma": 1.0, "delta": 0.0},
    "ssd": {"gamma": 1.0, "delta": 0.1},
    "hsd": {"gamma": 0.0, "delta": 0.0},
}
# What a run is: flags beside --resume may change the others.
RUN = "method dataset limit clients alpha split_file seed width projector out "
RUN += "beta gamma delta scale"
MONITOR_TRAIN, MONITOR_TEST = 2000, 1000  # images of each round's kNN; eval.py takes all
TERMINAL = sys.stdout.isatty()
CLEAR = "\r\033[K" if TERMINAL else ""  # wipes the line that shows who trains


def number(kind, low, high=sys.float_info.max):
    """An argparse type: an int or a float in [low, high]."""

    def parse(text):
        if not low <= (value := kind(text)) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not at least {low} and at most {high:g}")
        return value

    parse.__name__ = {int: "whole number", float: "number"}[kind]  # argparse says "invalid ..."
    return parse


# fmt: off
def build_parser(methods=METHODS):
    """Every flag, in four groups; the defaults are the paper's run."""
    count, weight, positive = number(int, 1), number(float, 0), number(float, 1e-12)
    share, switch = number(float, 1e-12, 1), argparse.BooleanOptionalAction
    parser = one_line_parser(Path(sys.argv[0]).name, __doc__.splitlines()[0])
    add = parser.add_argument_group("federated").add_argument
    add("--dataset", default="cifar10", help="cifar10, cifar100, tinyimagenet, patterns, or a "
        "folder with train/<class>/ and test/<class>/ or val/<class>/ (%(default)s)")
    add("--data-dir", default="data", help="where downloaded data sets are kept (%(default)s)")
    add("--limit", type=count, help="train on a fixed random subset of N images (all)")
    add("--clients", type=count, help="K, number of clients (10, or the split file's)")
    add("--alpha", type=positive, default=0.1, help="Dirichlet's; small = skewed (%(default)s)")
    add("--split-file", help="use this split instead: JSON, client -> indices, as split.json")
    add("--participation", type=share, default=1.0, help="share of clients a round (%(default)s)")
    add("--rounds", type=number(int, 0), default=100, help="0: the untrained network (%(default)s)")
    add("--local-epochs", type=count, default=5, help="in a round (%(default)s)")
    add = parser.add_argument_group("align + beta uniform + gamma DSR + delta distill").add_argument
    add("--method", choices=methods, default="ssd", help="row of the ablation (%(default)s)")
    add("--beta", type=weight, default=1.0, help="weight of uniformity (%(default)s)")
    add("--gamma", type=weight, help="weight of DSR, instead of the method's; the paper's is 1, "
        "its authors' code at batch 128 has about 0.05")
    add("--delta", type=weight, help="weight of distillation, instead of the method's")
    add("--scale", type=positive, default=10.0, help="a, factor on own dimensions (%(default)s)")
    add("--projector", action=switch, default=True, help="without it u is h itself (with)")
    add = parser.add_argument_group("optimiser: SGD, fresh on every client").add_argument
    add("--lr", type=positive, default=0.1, help="constant; paper: 0.2 x batch / 256 (%(default)s)")
    add("--momentum", type=number(float, 0, 1), default=0.9, help="of SGD (%(default)s)")
    add("--weight-decay", type=weight, default=1e-4, help="on all parameters (%(default)s)")
    add("--batch-size", type=number(int, 2), default=128, help="images a step (%(default)s)")
    add = parser.add_argument_group("system").add_argument
    add("--width", type=count, default=64, help="channels at first; 64: ResNet-18 (%(default)s)")
    add("--seed", type=number(int, 0, 2**63 - 1), default=0,
        help="of all draws but of --limit, patterns, the log's kNN (%(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 ... (%(default)s)")
    add("--amp", action=switch, help="bfloat16 (where it is fast)")
    add("--compile", action=switch, default=False, help="faster on a GPU, after a minute (off)")
    add("--out", help="run folder (a new one under runs/)")
    add("--resume", metavar="LAST_PT", help="go on with a run; --rounds, --lr ... may change")
    return parser
# fmt: on


def read_config(parser, argv=None, methods=METHODS):
    """Flags -> config, a dict, and when resuming the checkpoint, whose flags are the defaults."""
    config, checkpoint = vars(parser.parse_args(argv)), None
    if path := config["resume"]:
        checkpoint, _ = load_checkpoint(path)
        saved = {**checkpoint["config"], "out": str(Path(path).parent)}
        if odd := saved.keys() - config.keys():
            raise ValueError(f"{path} is another script's: {parser.prog} has no {min(odd)}")
        parser.set_defaults(**{**saved, "device": "auto"})
        config = vars(parser.parse_args(argv))
        if odd := [name for name in RUN.split() if config[name] != saved[name]]:
            flag, value = f"--{odd[0].replace('_', '-')} {config[odd[0]]}", saved[odd[0]]
            raise ValueError(f"{flag}: {path} has {value}, leave it out or start a new run")
    if config["method"] not in methods:  # argparse does not check a default
        raise ValueError(f"--method {config['method']}: {parser.prog} does not have it")
    for name, value in methods[config["method"]].items():
        config[name] = value if config[name] is None else config[name]
    return config, checkpoint


def make_split(config, labels, checkpoint):
    """K index arrays: the checkpoint's, --split-file's, or a Dirichlet split; of --limit images."""
    limit, clients = config["limit"], config["clients"]
    if limit and limit > len(labels):
        raise ValueError(f"--limit {limit}: there are only {len(labels)} training images")
    pool = torch.randperm(len(labels), generator=keyed_generator("limit"))[:limit].sort().values
    if not (checkpoint or config["split_file"]):
        parts = dirichlet_split(labels[pool], clients or 10, config["alpha"], config["seed"])
        return [pool.numpy()[part] for part in parts]
    split = checkpoint["split"] if checkpoint else read_split(config["split_file"])
    source = config["resume"] or f"split file {config['split_file']}"
    return check_split(split, pool, clients, source)


def make_model(config):
    """The network with its first weights, the same for the same seed."""
    torch.manual_seed(config["seed"])
    return SSDNet(config["width"], projector=config["projector"])


def make_loss(config, num_clients, device, objective=ssd_loss):
    """The local loss for federated.py: two views -> the network -> SSD's objective with d_k."""
    hard = config["method"] == "hsd"
    if hard and np.float32(config["scale"]) == 1:
        raise ValueError("--method hsd needs --scale other than 1, which marks no dimension")
    weights = {name: config[name] for name in ("beta", "gamma", "delta")}
    own = num_clients, 8 * config["width"], config["scale"], config["seed"]
    d = scaling_vectors(*own).to(device)

    def compute(model, images, drawn, d_k):
        x1, x2 = make_views(images, drawn)
        with torch.autocast(device.type, torch.bfloat16, enabled=config["amp"]):
            (h1, u1), (h2, u2) = model(x1), model(x2)  # BatchNorm sees one view at a time
        return objective(h1, u1, h2, u2, d_k, **weights, hard=hard)

    compiled = compute
    if config["compile"]:  # all of it is one graph, but for random numbers and a short batch
        compiled = torch.compile(compute, mode="reduce-overhead", dynamic=False, fullgraph=True)

    def loss(model, images, k, generator, global_state):
        run = compiled if len(images) == config["batch_size"] else compute
        return run(model, images, draw_views(images, generator), d[k])

    return loss


def make_monitor(config, data, split):
    """A cheap score of the model for every round, always on the same random images."""
    held = torch.from_numpy(np.concatenate(split))
    train = held[torch.randperm(len(held), generator=keyed_generator("monitor"))[:MONITOR_TRAIN]]
    test = torch.randperm(len(data.test_y), generator=keyed_generator("monitor"))[:MONITOR_TEST]
    some = (data.train_x[train], data.train_y[train], data.test_x[test], data.test_y[test])
    return lambda model: quick_scores(model, *some, config["amp"])


def open_run(config, split, model):
    """A new folder, config["out"] or one under runs/, with the untrained network's last.pt."""
    name = f"{Path(config['dataset']).name}-{config['method']}-k{config['clients']}"
    name = f"runs/{name}-seed{config['seed']}"
    names = [config["out"]] if config["out"] else [name, *(f"{name}-{i}" for i in range(2, 1000))]
    free = [f for f in map(Path, names) if not f.exists() or f.is_dir() and not any(f.iterdir())]
    if not free:
        raise ValueError(f"{names[0]} is not empty: choose another --out, or --resume its last.pt")
    folder, device = free[0], next(model.parameters()).device
    config["out"] = str(folder)
    record = {**config, "threads": torch.get_num_threads(), "processes": processes()[1]}
    record["device_name"] = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    record["versions"] = {m.__name__: m.__version__ for m in (np, torch, torchvision)}
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "config.json").open("x") as file:  # of two runs at once one gets the folder
        json.dump(record, file, indent=1)
    (folder / "split.json").write_text(json.dumps({k: p.tolist() for k, p in enumerate(split)}))
    save_checkpoint(folder, config, split, model, [])
    return folder


def save_checkpoint(folder, config, split, model, history):
    """Write metrics.jsonl, a line a round, then last.pt, all that --resume and eval.py need.

    Weights and rounds done are enough to go on exactly: every client's optimiser is fresh, random
    numbers are keyed by seed, round and client. A kill leaves the old last.pt or the new one.
    """
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in history))
    checkpoint = {"config": {**config, "resume": None}, "history": history}
    checkpoint["split"] = [torch.from_numpy(part) for part in split]
    checkpoint["model"] = {name: value.cpu() for name, value in model.state_dict().items()}
    content = io.BytesIO()  # torch.save into a full disk is no OSError
    torch.save(checkpoint, content)
    (folder / "last.pt.tmp").write_bytes(content.getbuffer())
    (folder / "last.pt.tmp").replace(folder / "last.pt")


def make_progress(config, split, history):
    """`federated_round`'s progress on a terminal: who trains, time left, from the images done."""
    start, seen = time.time(), 0

    def progress(k, mine):
        nonlocal seen
        place, sizes = mine.index(k), [len(split[i]) for i in mine]
        text, this_round = f"client {place + 1} of {len(mine)}", sum(sizes[place:])
        if seen:
            run = this_round + sum(sizes) * (config["rounds"] - len(history) - 1)
            pace = (time.time() - start) / seen
            left = (timedelta(seconds=round(pace * images)) for images in (this_round, run))
            text += ", left: {} of the round, {} of the run".format(*left)
        print(CLEAR + text, end="", flush=True)
        seen += sizes[place]

    return progress if TERMINAL else None


def leave(error, folder, prog):
    """End with one line, why and how to go on, and an exit status; raise a fault of the code."""
    text = (str(error).strip() or "stopped").splitlines()[0]
    status = 130 if isinstance(error, KeyboardInterrupt) else 1 if folder else 2  # a mistake
    ours = KeyboardInterrupt, FloatingPointError, OSError, MemoryError, dist.DistError
    theirs = ("allocate memory", "out of memory", "/gloo/", "Compiler")  # RuntimeErrors, by text
    known = isinstance(error, ours) or any(words in text for words in theirs)
    if not (known or status == 2 and isinstance(error, ValueError)):
        raise error
    go_on = f"; go on with: python {prog} --resume {folder}/last.pt" if folder else ""
    hints = {"memory": " --batch-size N", "finite": " --lr X", "Compiler": " --no-compile"}
    go_on += next((hint for word, hint in hints.items() if word in text and folder), "")
    echo = isinstance(error, (KeyboardInterrupt, FloatingPointError, dist.DistError))
    if not (processes()[0] and (echo or "/gloo/" in text)):  # the first, or who has the cause
        print(f"{CLEAR}{prog}: {text}{go_on}", file=sys.stderr, flush=True)
    os._exit(status) if dist.is_initialized() else sys.exit(status)  # no waiting for the others


def main(argv=None, parser=None, methods=METHODS, make_model=make_model, make_options=None):
    """Flags -> data -> split -> network -> loss -> the loop over rounds -> run folder.

    A script of one's own, as extras/baselines.py, hands over flags, rows beside METHODS, network,
    make_options: (config, images, split) -> `federated.train_federated`'s keywords, as its loss.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"  # one line
    parser, folder = parser or build_parser(methods), None
    try:
        if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():  # torchrun
            dist.init_process_group(timeout=timedelta(days=1))
        rank, world = processes()
        if rank:  # the first process speaks, and checks everything before the others begin
            sys.stdout = None
            told = gather({})  # waits for the first
        config, checkpoint = read_config(parser, argv, methods)
        device = pick_device(config["device"])
        if config["amp"] is None:  # bfloat16 from Ampere on; a CPU computes in float32
            config["amp"] = device.type == "cuda" and torch.cuda.get_device_capability()[0] >= 8
        torch.backends.cudnn.benchmark = True  # the shapes of training are fixed
        data = load_dataset(config["dataset"], config["data_dir"])
        images = data.train_x.to(device)
        split = make_split(config, data.train_y, checkpoint)
        config["clients"] = len(split)
        model = make_model(config).to(device, memory_format=torch.channels_last)
        if checkpoint and checkpoint["model"].keys() != model.state_dict().keys():
            raise ValueError(f"{config['resume']} is not of --method {config['method']}")
        if checkpoint:
            model.load_state_dict(checkpoint["model"])
        history = checkpoint["history"] if checkpoint else []
        sgd = {name: config[name] for name in ("lr", "momentum", "weight_decay")}
        optimizer = torch.optim.SGD(model.parameters(), **sgd, fused=device.type == "cuda")
        names = ("rounds", "participation", "local_epochs", "batch_size", "seed")
        options = {name: config[name] for name in names}
        options["loss"] = make_loss(config, len(split), device)
        options["progress"] = make_progress(config, split, history)
        own = make_options(config, images, split) if make_options else {}
        if config["method"] in METHODS and own.keys() & {"loss", "average"}:
            row = "what differs needs a row of its own in main's methods"
            raise ValueError(f"--method {config['method']} is train.py's: {row}")
        if world > 1 and "average" in own:
            raise ValueError("this rule of averaging needs all states: run one process")
        options |= own
        monitor = make_monitor(config, data, split)
        if not rank:
            folder = Path(config["out"]) if checkpoint else open_run(config, split, model)
            told = gather({"folder": folder})  # now the others begin
        folder = told["folder"]
        sizes = sorted(len(part) for part in split)
        text = f"{sum(sizes):,} images, {len(split)} clients with {sizes[0]:,} to {sizes[-1]:,}, "
        text += f"{device}, " + ("bfloat16" if config["amp"] else "float32")
        text += f", {world} processes" * (world > 1)
        print(f"{config['method']} on {config['dataset']}: {text}", flush=True)
        done, began, last = len(history), time.time(), time.time()
        for r, report in train_federated(model, optimizer, images, split, start=done, **options):
            if rank:
                continue  # the first process scores and writes
            scores, terms = monitor(model), report.pop("terms")
            seconds, last = time.time() - last, time.time()
            line = {"round": r + 1, "lr": optimizer.param_groups[0]["lr"], "seconds": seconds}
            history.append({**line, **report, **terms, **scores})
            save_checkpoint(folder, config, split, model, history)  # last.pt, metrics.jsonl
            left = (time.time() - began) / (r + 1 - done) * (config["rounds"] - r - 1)
            shown = (as_shown(name, value) for name, value in terms.items())
            text = "  ".join(f"{name} {value:.3f}" for name, value in shown)
            rest = f"{seconds:.1f} s  {timedelta(seconds=round(left))} left"
            text += f"  kNN {scores['knn']:.1f} %  {rest}"
            text += f"  left out, not finite: {report['left_out']}" * bool(report["left_out"])
            print(f"{CLEAR}round {r + 1:3d}/{config['rounds']}  {text}", flush=True)
        if not rank:
            before = monitor(make_model(config).to(device, memory_format=torch.channels_last))
            after, of = monitor(model)["knn"], f"of the untrained encoder {before['knn']:.1f} %"
            print(
                f"\nkNN {after:.1f} %, {of} ({min(MONITOR_TEST, len(data.test_y)):,} test images)"
            )
            print(f"run folder {folder}/: config.json, split.json, metrics.jsonl, last.pt")
            print(f"next: python eval.py {folder}/last.pt, or --resume {folder}/last.pt --rounds N")
    except (KeyboardInterrupt, Exception) as error:
        leave(error, folder, parser.prog)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
