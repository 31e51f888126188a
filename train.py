"""Train SSD, or one of its ablations, on K simulated clients: from data to checkpoint.

    python train.py --clients 10 --alpha 0.1             # the paper's run: CIFAR-10, 100 rounds
    python train.py --dataset shapes --width 16 --clients 5 --alpha 1 --rounds 10 \\
        --local-epochs 1 --batch-size 64 --lr 0.03       # no download, two minutes on two cores
    python train.py --resume runs/NAME/last.pt
    torchrun --nproc-per-node 4 train.py --clients 10    # clients shared out over processes

Read `main` first, at the end: flags, data, split, network, loss, loop over rounds. A run writes
runs/NAME/: config.json (flags, versions, device), split.json (client -> indices of training
images) and, after every round, last.pt and metrics.jsonl (a line a round).
`python eval.py runs/NAME/last.pt` evaluates it.
"""

import argparse
import io
import json
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

from data import (
    DATASETS,
    augment,
    check_split,
    dirichlet_split,
    draw_params,
    load_dataset,
    pack,
    read_split,
    unpack,
)
from eval import OneLineParser, bf16_is_fast, load_checkpoint, number, pick_device, quick_scores
from federated import keyed_generator, processes, train_federated
from losses import scaling_vectors, ssd_loss
from model import SSDNet

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
TERMINAL = sys.stderr.isatty() and os.environ.get("RANK", "0") == "0"
CLEAR = "\r\033[K" if TERMINAL else ""  # wipes the line that shows the progress


# ---------------------------------------------------------------------------- flags


# fmt: off
def build_parser(methods=METHODS):
    """Every flag, in four groups; the defaults are the paper's run."""
    parser = OneLineParser(Path(sys.argv[0]).name, description=__doc__.splitlines()[0])
    add = parser.add_argument_group("federated").add_argument
    add("--dataset", default="cifar10", help=f"{', '.join(DATASETS)}, or a folder that holds "
        "train/<class>/ and test/<class>/ or val/<class>/ (%(default)s)")
    add("--data-dir", default="data", help="where downloaded data sets are kept (%(default)s)")
    add("--limit", type=number(int, 1), help="train on a fixed random subset of N images (all)")
    add("--clients", type=number(int, 1), help="K, number of clients (10, or the split file's)")
    add("--alpha", type=number(float, above=0), default=0.1,
        help="of the Dirichlet split of each class over the clients; small = skewed (%(default)s)")
    add("--split-file", help="use this split instead: JSON, client -> indices, as split.json")
    add("--participation", type=number(float, above=0, high=1), default=1.0,
        help="share of the clients that take part in a round (%(default)s)")
    add("--rounds", type=number(int, 0), default=100,
        help="communication rounds; 0 leaves the untrained network, to compare (%(default)s)")
    add("--local-epochs", type=number(int, 1), default=5, help="in a round (%(default)s)")
    add = parser.add_argument_group(
        "loss: align + beta uniform + gamma DSR + delta distill").add_argument
    add("--method", choices=methods, default="ssd",
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
    add("--batch-size", type=number(int, 2), default=128, help="in two views each (%(default)s)")
    add = parser.add_argument_group("system").add_argument
    add("--width", type=number(int, 1), default=64,
        help="channels of the first stage, 64 is ResNet-18 (%(default)s)")
    add("--seed", type=number(int, 0), default=0,
        help="of split, initial weights, d_k, batches and views (%(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 ... (%(default)s)")
    add("--amp", action=argparse.BooleanOptionalAction, help="bfloat16 (where it is fast)")
    add("--compile", action=argparse.BooleanOptionalAction, default=False,
        help="torch.compile and CUDA graphs (%(default)s)")
    add("--out", help="run folder (a new one under runs/)")
    add("--resume", metavar="LAST_PT",
        help="go on with a checkpoint and its flags; --rounds may be raised")
    return parser
# fmt: on


def read_config(parser, argv=None, methods=METHODS):
    """Flags -> config, a dict, and when resuming the checkpoint, whose flags are the defaults."""
    config, checkpoint = vars(parser.parse_args(argv)), None
    if config["resume"]:
        checkpoint, _ = load_checkpoint(config["resume"])
        done = len(checkpoint["history"])
        saved = {**checkpoint["config"], "out": str(Path(config["resume"]).parent)}
        if saved.keys() != config.keys():
            odd = ", ".join(sorted(saved.keys() ^ config.keys()))
            raise ValueError(f"{config['resume']} is another script's: they differ in {odd}")
        # as text, so that a checkpoint's values are checked like a user's
        plain = (bool, type(None))
        texts = {f: v if isinstance(v, plain) else str(v) for f, v in saved.items()}
        parser.set_defaults(**{**texts, "device": "auto"})
        config = vars(parser.parse_args(argv))
        for flag in config.keys() - MAY_CHANGE:
            if config[flag] != saved[flag]:
                raise ValueError(
                    f"--{flag.replace('_', '-')} {config[flag]} contradicts the checkpoint, which "
                    f"has {saved[flag]}: leave it out, or start without --resume"
                )
        if config["rounds"] < done:
            raise ValueError(f"--rounds {config['rounds']}: {done} are done already")
    if config["method"] not in methods:
        raise ValueError(f"--method {config['method']}: {parser.prog} does not have it")
    for weight, value in methods[config["method"]].items():
        config[weight] = value if config[weight] is None else config[weight]
    if config["method"] == "hsd" and config["scale"] == 1:
        raise ValueError("--method hsd needs --scale other than 1: it marks own dimensions")
    return config, checkpoint


# ---------------------------------------------------------------------------- split, network, loss


def make_split(config, labels, checkpoint):
    """K index arrays: the checkpoint's, --split-file's, or a Dirichlet split; of --limit images."""
    limit, clients = config["limit"], config["clients"]
    if limit and limit > len(labels):
        raise ValueError(f"--limit {limit}: there are only {len(labels)} training images")
    # whatever the seed, the same images; without a limit all of them
    pool = torch.randperm(len(labels), generator=keyed_generator("limit"))[:limit].sort().values
    if not (checkpoint or config["split_file"]):
        parts = dirichlet_split(labels[pool], clients or 10, config["alpha"], config["seed"])
        return [pool.numpy()[part] for part in parts]
    split = checkpoint["split"] if checkpoint else read_split(config["split_file"])
    source = config["resume"] or f"split file {config['split_file']}"
    split = check_split(split, pool.numpy(), source)
    if clients not in (None, len(split)):
        raise ValueError(f"--clients {clients}: {source} has {len(split)}")
    return split


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

    def step(model, images, packed, d_k):
        x1, x2 = augment(images.repeat(2, 1, 1, 1), unpack(packed)).chunk(2)
        with torch.autocast(device.type, torch.bfloat16, enabled=config["amp"]):
            (h1, u1), (h2, u2) = model(x1), model(x2)  # BatchNorm sees one view at a time
        return objective(h1, u1, h2, u2, d_k, **weights, hard=config["method"] == "hsd")

    compiled = step
    if config["compile"]:  # all of it is one graph, but for random numbers and a short batch
        compiled = torch.compile(step, mode="reduce-overhead", dynamic=False, fullgraph=True)

    def loss(model, images, k, generator, global_state):
        params = draw_params(2 * len(images), *images.shape[2:], generator)
        run = (
            compiled if len(images) == config["batch_size"] else step
        )  # no graph for a short batch
        return run(model, images, pack(params, device), d[k])

    return loss


def make_monitor(config, data, split):
    """A cheap score of the model for every round, on a fixed random part of the images."""
    held = torch.from_numpy(np.concatenate(split))
    train = held[torch.randperm(len(held), generator=keyed_generator("monitor"))[:MONITOR_TRAIN]]
    test = torch.randperm(len(data.test_y), generator=keyed_generator("monitor"))[:MONITOR_TEST]
    some = (data.train_x[train], data.train_y[train], data.test_x[test], data.test_y[test])
    return lambda model: quick_scores(model, *some, config["amp"])


# ---------------------------------------------------------------------------- run folder


def open_run(config, split, model, device):
    """Make the run folder, whole or not at all, with a checkpoint of the untrained network."""
    if config["out"] is None:
        name = f"{Path(config['dataset']).name}-{config['method']}-k{config['clients']}"
        name = f"runs/{name}-seed{config['seed']}"
        names = [name] + [f"{name}-{i}" for i in range(2, 1000)]
        config["out"] = next(out for out in names if not Path(out).exists())
    folder = Path(config["out"])
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not empty: choose another --out, or --resume its last.pt")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    versions = {module.__name__: module.__version__ for module in (np, torch, torchvision)}
    versions = {"python": platform.python_version(), **versions}
    machine = {"device_name": f"{device} {name}", "threads": torch.get_num_threads()}
    record = {**config, "versions": versions, **machine, "processes": processes()[1]}
    clients = {k: part.tolist() for k, part in enumerate(split)}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, ignore_cleanup_errors=True) as parent:
        unfinished = Path(parent) / "run"
        unfinished.mkdir()
        write_whole(unfinished / "config.json", json.dumps(record, indent=1).encode())
        write_whole(unfinished / "split.json", json.dumps(clients).encode())
        save(unfinished, config, split, model, [])
        unfinished.replace(folder)
    return folder


def save(folder, config, split, model, history):
    """Write last.pt, all that --resume and eval.py need, then metrics.jsonl.

    Weights and rounds done are enough to go on exactly: every client begins with a fresh optimiser,
    and all random numbers are keyed by seed, round and client.
    """
    state = {"config": {**config, "resume": None}, "history": history}
    state["split"] = [torch.from_numpy(part) for part in split]
    state["model"] = {name: value.cpu() for name, value in model.state_dict().items()}
    content = io.BytesIO()
    torch.save(state, content)
    write_whole(folder / "last.pt", content.getvalue())
    write_metrics(folder, history)


def write_metrics(folder, history):
    """Write metrics.jsonl, a line a round."""
    lines = "".join(json.dumps(line) + "\n" for line in history)
    write_whole(folder / "metrics.jsonl", lines.encode())


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


# ---------------------------------------------------------------------------- how long, and the end


def make_progress(loss, config, split, history):
    """Say how long it will take: `federated_round`'s progress, and the loss, called once a step.

    On a terminal once a second: client, step, time left of round and run. Elsewhere one line, once
    20 steps are done. Only the clock is read: no step waits for the device.
    """
    steps = [config["local_epochs"] * max(1, len(part) // config["batch_size"]) for part in split]
    client, done, of = "", 0, 0  # steps of this round
    count, start, shown = 0, 0.0, 0.0  # steps since the start, seconds

    def progress(k, mine):
        nonlocal client, done, of
        if k == mine[0]:
            done, of = 0, sum(steps[i] for i in mine)
        client = f"client {mine.index(k) + 1} of {len(mine)}"

    def counting_loss(*arguments):
        nonlocal count, start, shown, done
        if count == 1:  # the first step, which may compile, is not like the others
            start = shown = time.time()
        due = (count > 1 and time.time() > shown + 1) if TERMINAL else count == 20
        if due:
            shown, a_step = time.time(), (time.time() - start) / (count - 1)
            rounds = config["rounds"] - len(history) - 1
            left, all_left = (of - done) * a_step, (of - done + of * rounds) * a_step
            if TERMINAL:
                line = f"{CLEAR}{client}, step {done} of {of}, left: {span(left)} of the round, "
                print(f"{line}{span(all_left)} of the run", end="", file=sys.stderr, flush=True)
            else:
                line = f"after 20 steps: about {span(of * a_step)} a round, "
                print(f"{line}{span(all_left)} for the run", flush=True)
        count, done = count + 1, done + 1
        return loss(*arguments)

    return progress, counting_loss


def span(seconds):
    """Seconds as hours:minutes:seconds."""
    return timedelta(seconds=round(seconds))


def leave(error, folder, parser):
    """End the run with one line, why and how to go on, and an exit status.

    folder: None before training has begun. A fault of the code itself is raised as it is.
    """
    go_on = f"Go on with: python {parser.prog} --resume {folder}/last.pt"
    if not folder and isinstance(error, (ValueError, OSError)):
        parser.error(str(error))  # a user's mistake, found before the first round: status 2
    elif isinstance(error, KeyboardInterrupt):  # Ctrl-C, or SIGTERM
        status, why = 130, f"stopped. {go_on}" if folder else "stopped before the first round"
    elif isinstance(error, FloatingPointError):
        status, why = 1, f"{error}. {folder} keeps the rounds before: start anew with a lower --lr"
    elif isinstance(error, torch.OutOfMemoryError):
        status, why = 1, "out of GPU memory: start anew with a smaller --batch-size or --width"
    elif isinstance(error, OSError):
        status, why = 1, f"{error}. The last checkpoint is whole. {go_on}"
    elif isinstance(error, dist.DistError) or "/gloo/" in str(error):  # gloo's are RuntimeErrors
        status, why = 1, f"another process has died ({str(error).splitlines()[0]}). {go_on}"
    else:
        raise error
    if not processes()[0] or isinstance(error, (OSError, torch.OutOfMemoryError)):
        print(f"{CLEAR}{why}", file=sys.stderr, flush=True)
    os._exit(status) if dist.is_initialized() else sys.exit(status)  # no waiting for the others


def wait_for_all():
    """Return once all processes are here."""
    if dist.is_initialized():
        dist.all_reduce(torch.zeros(1))


# ---------------------------------------------------------------------------- the run


def main(argv=None, parser=None, methods=METHODS, make_model=make_model, make_method=make_method):
    """Flags -> data -> split -> network -> loss -> the loop over rounds -> run folder.

    A script that trains another method hands over what differs: its flags, its rows beside
    METHODS, its network, its loss and rules; extras/baselines.py does.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"  # one line
    parser, folder = parser or build_parser(methods), None
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():  # torchrun
        dist.init_process_group(timeout=timedelta(days=1))
    rank, count = processes()
    try:
        if rank:  # the first process speaks, and checks everything before the others begin
            sys.stdout = None
            wait_for_all()
        config, checkpoint = read_config(parser, argv, methods)
        device = pick_device(config["device"])
        config["amp"] = bf16_is_fast(device) if config["amp"] is None else config["amp"]

        data = load_dataset(config["dataset"], config["data_dir"])
        images = data.train_x.to(device)
        split = make_split(config, data.train_y, checkpoint)
        config["clients"] = len(split)

        model, history = make_model(config).to(device, memory_format=torch.channels_last), []
        if checkpoint:
            if checkpoint["model"].keys() != model.state_dict().keys():
                raise ValueError(f"{config['resume']} is not of --method {config['method']}")
            model.load_state_dict(checkpoint["model"])
            history = checkpoint["history"]
        sgd = {name: config[name] for name in ("lr", "momentum", "weight_decay")}
        fused = True if device.type == "cuda" else None  # one launch for all tensors
        optimizer = torch.optim.SGD(model.parameters(), **sgd, fused=fused)

        options = ("rounds", "participation", "local_epochs", "batch_size", "seed")
        options = {name: config[name] for name in options} | make_method(config, images, split)
        if count > 1 and "average" in options:
            raise ValueError("this rule of averaging needs all states: run one process")
        progress, options["loss"] = make_progress(options["loss"], config, split, history)
        monitor = make_monitor(config, data, split)

        if not rank:
            folder = Path(config["out"]) if checkpoint else open_run(config, split, model, device)
            write_metrics(folder, history)  # a kill may have come between it and last.pt
            wait_for_all()
        folder = folder or Path("runs")  # elsewhere: training has begun
        sizes = [len(part) for part in split]
        print(
            f"{config['method']} on {config['dataset']}: {sum(sizes):,} images, {len(split)} "
            f"clients with {min(sizes):,} to {max(sizes):,}, {device}, "
            f"{'bfloat16' if config['amp'] else 'float32'}" + f", {count} processes" * (count > 1),
            flush=True,
        )
        done = len(history)
        start = last = time.time()
        for r, report in train_federated(
            model, optimizer, images, split, start=done, progress=progress, **options
        ):
            if rank:
                continue  # the first process scores and writes
            scores, terms = monitor(model), report.pop("terms")
            seconds, last = time.time() - last, time.time()
            line = {"round": r + 1, "lr": optimizer.param_groups[0]["lr"], "seconds": seconds}
            history.append({**line, **report, **terms, **scores})
            save(folder, config, split, model, history)
            left = (time.time() - start) / (r + 1 - done) * (config["rounds"] - r - 1)
            print(CLEAR, end="", file=sys.stderr, flush=True)
            print(
                f"round {r + 1:3d}/{config['rounds']}  "
                + "  ".join(
                    f"-uniform {-value:.3f}" if name == "uniform" else f"{name} {value:.3f}"
                    for name, value in terms.items()  # -L_uniform, as in the paper's tables
                )
                + f"  kNN {scores['knn']:.1f} %  {seconds:.1f} s  {span(left)} left"
                + f"  left out, not finite: client {report['left_out']}" * bool(report["left_out"]),
                flush=True,
            )
        if not rank:
            untrained = make_model(config).to(device, memory_format=torch.channels_last)
            more = f"{folder}/last.pt --rounds {2 * config['rounds'] or 10}"
            print(f"""
kNN {monitor(model)["knn"]:.1f} %, of the untrained encoder {monitor(untrained)["knn"]:.1f} % \
({min(MONITOR_TEST, len(data.test_y)):,} test images)
run folder {folder}/: last.pt, metrics.jsonl, split.json, config.json
next: python eval.py {folder}/last.pt
      (linear probe, fine-tuning, kNN, uniformity, effective rank: on all images)""")
            if "lr" not in options:  # a schedule is that of its rounds
                print(f"      python {parser.prog} --resume {more}")
    except (KeyboardInterrupt, ValueError, ArithmeticError, OSError, RuntimeError) as error:
        leave(error, folder, parser)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
