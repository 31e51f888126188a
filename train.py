r"""Train SSD, or one of its ablations, on K simulated clients: from data to checkpoint.

    python train.py --clients 10 --alpha 0.1             # the paper's run: CIFAR-10, 100 rounds
    python train.py --dataset patterns --width 16 --clients 5 --alpha 1 --rounds 10 \
        --local-epochs 1 --batch-size 64 --lr 0.03       # no download, two to three minutes
    python train.py --resume runs/NAME/last.pt
    torchrun --nproc-per-node 4 train.py --clients 10    # clients shared out over processes

Read `main` first, at the end: flags, data, split, network, loss, loop over rounds. A run writes
runs/NAME/: config.json (flags, versions, device), split.json (client -> indices of training
images) and, after every round, last.pt and metrics.jsonl (a line a round).
`python eval.py runs/NAME/last.pt` evaluates it.
"""

import argparse
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

from data import check_split, dirichlet_split, draw_views, load_dataset, make_views, read_split
from eval import (
    OneLineParser,
    bf16_is_fast,
    load_checkpoint,
    number,
    open_run,
    pick_device,
    quick_scores,
    save_checkpoint,
)
from federated import gather, keyed_generator, processes, train_federated
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
TERMINAL = sys.stdout.isatty()
CLEAR = "\r\033[K" if TERMINAL else ""  # wipes the line that shows the progress


# ---------------------------------------------------------------------------- flags


# fmt: off
def build_parser(methods=METHODS):
    """Every flag, in four groups; the defaults are the paper's run."""
    count, positive, weight = number(int, 1), number(float, above=0), number(float, 0)
    share, switch = number(float, above=0, high=1), argparse.BooleanOptionalAction
    parser = OneLineParser(Path(sys.argv[0]).name, description=__doc__.splitlines()[0])
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
        help="of all draws but of --limit, patterns, the kNN's test images (%(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 ... (%(default)s)")
    add("--amp", action=switch, help="bfloat16 (where it is fast)")
    add("--compile", action=switch, default=False, help="torch.compile, CUDA graphs (%(default)s)")
    add("--out", help="run folder (a new one under runs/)")
    add("--resume", metavar="LAST_PT", help="go on with a run's last.pt; --rounds may be raised")
    return parser
# fmt: on


def read_config(parser, argv=None, methods=METHODS):
    """Flags -> config, a dict, and when resuming the checkpoint, whose flags are the defaults."""
    config, checkpoint = vars(parser.parse_args(argv)), None
    if config["resume"]:
        checkpoint, _ = load_checkpoint(config["resume"])
        saved = {**checkpoint["config"], "out": str(Path(config["resume"]).parent)}
        if (script := saved.pop("script", parser.prog)) != parser.prog:
            raise ValueError(f"{config['resume']} was trained by {script}: go on with that")
        if odd := ", ".join(sorted(saved.keys() ^ config.keys())):
            raise ValueError(f"{config['resume']} is another script's: they differ in {odd}")
        # as text, so that a checkpoint's values are checked like a user's
        texts = {f: v if v is None or type(v) is bool else str(v) for f, v in saved.items()}
        parser.set_defaults(**{**texts, "device": "auto"})
        config = vars(parser.parse_args(argv))
        for flag in config.keys() - MAY_CHANGE:
            if config[flag] != saved[flag]:
                text = f"--{flag.replace('_', '-')} {config[flag]} contradicts the checkpoint's"
                raise ValueError(f"{text} {saved[flag]}: leave it out, or start without --resume")
        if config["rounds"] < (done := len(checkpoint["history"])):
            raise ValueError(f"--rounds {config['rounds']}: {done} are done already")
    if config["method"] not in methods:  # argparse does not check a default
        raise ValueError(f"--method {config['method']}: {parser.prog} does not have it")
    weights = methods[config["method"]].items()
    config.update((name, value) for name, value in weights if config[name] is None)
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
    d = scaling_vectors(num_clients, 8 * config["width"], config["scale"], config["seed"])
    d = d.to(device)

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


# ---------------------------------------------------------------------------- how long, and the end


def make_progress(optimizer, config, split, history):
    """Say how long it will take: returns `federated_round`'s progress, and counts the steps.

    On a terminal once a second: client, step, time left of round and run. Elsewhere one line, once
    20 steps are done. Only the clock is read: no step waits for the device.
    """
    steps = [config["local_epochs"] * max(1, len(part) // config["batch_size"]) for part in split]
    who, done, of = "", 0, 0  # client, steps of this round
    count, start, shown = 0, 0.0, 0.0  # steps since the start, seconds

    def progress(k, mine):
        nonlocal who, done, of
        if k == mine[0]:
            done, of = 0, sum(steps[i] for i in mine)
        who = f"client {mine.index(k) + 1} of {len(mine)}"

    def after_step(*_):
        nonlocal count, start, shown, done
        count, done, now = count + 1, done + 1, time.time()
        if count == 1:  # the first step, which may compile, is not like the others
            start = shown = now
        elif (now > shown + 1) if TERMINAL else (count == 20):
            shown, more = now, of * (config["rounds"] - len(history) - 1)
            seconds = (n * (now - start) / (count - 1) for n in (of, of - done, of - done + more))
            whole, left, rest = (timedelta(seconds=round(s)) for s in seconds)
            if TERMINAL:
                text = f"{who}, step {done} of {of}, left: {left} of the round, {rest} of the run"
                print(CLEAR + text, end="", flush=True)
            else:
                print(f"after 20 steps: about {whole} a round, {rest} for the run", flush=True)

    optimizer.register_step_post_hook(after_step)
    return progress


def leave(error, folder, prog):
    """End a run that has begun with one line, why and how to go on, and an exit status."""
    status, go_on = 1, f"Go on with: python {prog} --resume {folder}/last.pt" if folder else ""
    no_memory = isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
    if isinstance(error, KeyboardInterrupt):  # Ctrl-C, or SIGTERM
        status, why = 130, f"stopped. {go_on}" if folder else "stopped before the first round"
    elif isinstance(error, FloatingPointError):
        why = f"{error}. {folder} keeps the rounds before: start anew with a lower --lr"
    elif no_memory:
        why = "out of memory: start anew with a smaller --batch-size or --width"
    elif isinstance(error, OSError):
        why = f"{error}. The last checkpoint is whole. {go_on}"
    elif isinstance(error, dist.DistError) or "/gloo/" in str(error):  # gloo's are RuntimeErrors
        why = f"another process is not there ({str(error).splitlines()[0]}). {go_on}"
    else:  # a fault of the code itself
        raise error
    if not processes()[0] or isinstance(error, OSError) or no_memory:
        print(f"{CLEAR}{why}", file=sys.stderr, flush=True)
    os._exit(status) if dist.is_initialized() else sys.exit(status)  # no waiting for the others


# ---------------------------------------------------------------------------- the run


def main(argv=None, parser=None, methods=METHODS, make_model=make_model, make_options=None):
    """Flags -> data -> split -> network -> loss -> the loop over rounds -> run folder.

    A script that trains another method hands over what differs: its flags, its rows beside
    METHODS, its network, and make_options, (config, images, split) -> keyword arguments of
    `federated.train_federated`, its loss and rules; extras/baselines.py does.
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
            gather({})  # waits for all
        config, checkpoint = read_config(parser, argv, methods)
        config["script"] = parser.prog  # which alone resumes the run
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
        optimizer = torch.optim.SGD(model.parameters(), **sgd, fused=device.type == "cuda")

        names = ("rounds", "participation", "local_epochs", "batch_size", "seed")
        options = {name: config[name] for name in names}
        options["loss"] = make_loss(config, len(split), device)
        options |= make_options(config, images, split) if make_options else {}
        if world > 1 and "average" in options:
            raise ValueError("this rule of averaging needs all states: run one process")
        options["progress"] = make_progress(optimizer, config, split, history)
        monitor = make_monitor(config, data, split)
        if not rank:
            folder = Path(config["out"]) if checkpoint else open_run(config, split, model)
            gather({})  # now the others begin
        folder = folder or Path("runs")  # not None: training has begun
        sizes = [len(part) for part in split]
        text = f"{config['method']} on {config['dataset']}: {sum(sizes):,} images, {len(split)} "
        text += f"clients with {min(sizes):,} to {max(sizes):,}, {device}, "
        text += ("bfloat16" if config["amp"] else "float32") + f", {world} processes" * (world > 1)
        print(text, flush=True)
        done = len(history)
        began = last = time.time()
        for r, report in train_federated(model, optimizer, images, split, start=done, **options):
            if rank:
                continue  # the first process scores and writes
            scores, terms = monitor(model), report.pop("terms")
            seconds, last = time.time() - last, time.time()
            line = {"round": r + 1, "lr": optimizer.param_groups[0]["lr"], "seconds": seconds}
            history.append({**line, **report, **terms, **scores})
            save_checkpoint(folder, config, split, model, history)  # last.pt, metrics.jsonl
            left = (time.time() - began) / (r + 1 - done) * (config["rounds"] - r - 1)
            text = "  ".join(f"{name} {value:.3f}" for name, value in terms.items())
            text = text.replace("uniform -", "-uniform ")  # -L_uniform, as the paper has it
            text += f"  kNN {scores['knn']:.1f} %  {seconds:.1f} s  "
            text += f"{timedelta(seconds=round(left))} left"
            if report["left_out"]:
                text += f"  left out, not finite: client {report['left_out']}"
            print(f"{CLEAR}round {r + 1:3d}/{config['rounds']}  {text}", flush=True)
        if not rank:
            untrained = make_model(config).to(device, memory_format=torch.channels_last)
            more = f"{folder}/last.pt --rounds {2 * config['rounds'] or 10}"
            print(f"""
kNN {monitor(model)["knn"]:.1f} %, of the untrained encoder {monitor(untrained)["knn"]:.1f} % \
({min(MONITOR_TEST, len(data.test_y)):,} test images)
run folder {folder}/: last.pt, metrics.jsonl, split.json, config.json
next: python eval.py {folder}/last.pt
      (linear probe, fine-tuning, kNN, uniformity, effective rank: on all images)""")
            if "lr" not in options:  # more rounds would change a schedule
                print(f"      python {parser.prog} --resume {more}")
    except (KeyboardInterrupt, ValueError, ArithmeticError, OSError, RuntimeError) as error:
        if not folder and isinstance(error, (ValueError, OSError)):
            parser.error(str(error))  # a user's mistake, found before the first round: status 2
        leave(error, folder, parser.prog)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
