r"""Train SSD, or one of its ablations, on K simulated clients: from data to checkpoint.

    python train.py --clients 10 --alpha 0.1             # the paper's run: CIFAR-10, 100 rounds
    python train.py --dataset patterns --width 8 --clients 3 --alpha 1 --rounds 8 \
        --local-epochs 2 --batch-size 32 --lr 0.05       # no download, three to six minutes
    python train.py --resume runs/NAME/last.pt           # goes on; --rounds, --lr ... may change

The functions come in the order in which `main`, at the end, calls them, helpers beside their
callers. A run writes runs/NAME/: config.json (flags of the last start, versions), split.json
(client -> indices of training images) and, after every round, last.pt and metrics.jsonl (a line a
round). eval.py evaluates last.pt.
"""

import argparse
import json
import signal
import sys
import time
import warnings
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torchvision

from data import check_split, dirichlet_split, draw_views, load_dataset, make_views, read_split
from eval import quick_scores
from federated import federated_round, keyed_generator
from losses import scaling_vectors, ssd_loss
from model import SSDNet, load_checkpoint, load_weights, pick_device, save_checkpoint

# Rows of the paper's ablation: gamma of DSR, delta of distillation. hsd cuts z to own dimensions.
METHODS = {
    "ssd": {"gamma": 1.0, "delta": 0.1},
    "dsr": {"gamma": 1.0, "delta": 0.0},
    "pd": {"gamma": 0.0, "delta": 0.1},
    "fedalignuniform": {"gamma": 0.0, "delta": 0.0},
    "hsd": {"gamma": 0.0, "delta": 0.0},
}
# With --resume only these flags may change; a line of metrics.jsonl has the values of its round.
# The data set may lie elsewhere: `prepare` checks that its images are the same.
MAY_CHANGE = ("rounds", "lr", "local_epochs", "batch_size", "participation", "momentum")
MAY_CHANGE += ("weight_decay", "amp", "compile", "device", "dataset", "data_dir")


def number(kind, low, high=sys.float_info.max):
    """An argparse type: an int or a float from low to high."""

    def parse(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not at least {low} and at most {high:g}")
        return value

    parse.__name__ = kind.__name__  # argparse says: invalid int value
    return parse


def own_methods(objective):
    """METHODS; for your own objective one row, named after your script, with SSD's weights."""
    script = Path(sys.argv[0])
    if objective is ssd_loss:
        return METHODS
    if script.stem in METHODS:
        print(f"{script}: a row of train.py has this name, take another", file=sys.stderr)
        sys.exit(2)
    return {script.stem: METHODS["ssd"]}


# fmt: off
def build_parser(methods=METHODS):
    """Every flag, in four groups; the defaults are the paper's run."""
    switch = argparse.BooleanOptionalAction
    count, weight = number(int, 1), number(float, 0)
    positive, share = number(float, 1e-12), number(float, 1e-12, 1)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False,
        usage=argparse.SUPPRESS)  # so that an error is one line
    parser.set_defaults(images=None, embed_dim=None)  # not flags: set in `prepare`, variants.py
    add = parser.add_argument_group("federated").add_argument
    add("--dataset", default="cifar10", help="cifar10, cifar100, patterns, or a folder with "
        "train/<class>/ and test/<class>/ (%(default)s)")
    add("--data-dir", default="data", help="where downloaded data sets are kept (%(default)s)")
    add("--image-size", type=count, default=32, help="pixels a side, of a folder (%(default)s)")
    add("--limit", type=count, help="train on a fixed random subset of N images (all)")
    add("--clients", type=count, help="K, number of clients (10, or the split file's)")
    add("--alpha", type=positive, default=0.1, help="of Dirichlet; small = skewed (%(default)s)")
    add("--split-file", help="a split of your own: JSON, client -> indices, as split.json")
    add("--participation", type=share, default=1.0, help="share of clients a round (%(default)s)")
    add("--rounds", type=number(int, 0), default=100, help="0: untrained network (%(default)s)")
    add("--local-epochs", type=count, default=5, help="of a client in a round (%(default)s)")
    add = parser.add_argument_group("align + beta uniform + gamma DSR + delta distill").add_argument
    add("--method", choices=methods, default=[*methods][0], help="its gamma, delta (%(default)s)")
    add("--beta", type=weight, default=1.0, help="weight of uniformity (%(default)s)")
    add("--gamma", type=weight, help="weight of DSR, instead of the method's (authors ran ~0.05)")
    add("--delta", type=weight, help="weight of distillation, instead of the method's")
    add("--scale", type=positive, default=10.0, help="a, factor on own dimensions (%(default)s)")
    add("--projector", action=switch, default=True, help="without it u is h (with)")
    add = parser.add_argument_group("optimiser: SGD, fresh on every client").add_argument
    add("--lr", type=positive, default=0.1, help="constant; paper: 0.2 x batch / 256 (%(default)s)")
    add("--momentum", type=number(float, 0, 1), default=0.9, help="of SGD (%(default)s)")
    add("--weight-decay", type=weight, default=1e-4, help="on all parameters (%(default)s)")
    add("--batch-size", type=number(int, 2), default=128, help="images a step (%(default)s)")
    add = parser.add_argument_group("system").add_argument
    add("--width", type=count, default=64, help="first channels; 64: ResNet-18 (%(default)s)")
    add("--seed", type=number(int, 0, 2**63 - 1), default=0, help="of all its draws (%(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 ... (%(default)s)")
    add("--amp", action=switch, help="bfloat16 (on GPUs that are fast at it)")
    add("--compile", action=switch, help="compile the step, about a minute (on a GPU, if it can)")
    add("--out", help="run folder (a new one under runs/)")
    add("--resume", metavar="LAST_PT", help="go on with a run; --rounds, --lr ... may change")
    return parser
# fmt: on


def read_config(parser, argv=None, methods=METHODS):
    """Flags -> config, a dict, and the checkpoint to go on from, of a new run an empty one."""
    config = vars(parser.parse_args(argv))
    checkpoint = {"split": None, "model": None, "history": []}
    saved = {}
    if config["resume"]:
        path = config["resume"]
        if Path(path).name != "last.pt":  # the run would go on in the last.pt beside it
            raise ValueError(f"--resume {path}: call it last.pt, in a folder of its own")
        checkpoint, _ = load_checkpoint(path)
        saved = {**checkpoint["config"], "resume": path, "out": str(Path(path).parent)}
        if saved["method"] not in methods or saved.keys() - config.keys():  # flags unknown here
            raise ValueError(f"{path} is another script's run, of method {saved['method']}")
        parser.set_defaults(**saved)  # parsed again: what is not said stays as it was
        config = vars(parser.parse_args(argv))
    for name in saved:
        if config[name] != saved[name] and name not in MAY_CHANGE:
            flag = f"--{name.replace('_', '-')} {config[name]}"
            raise ValueError(f"{flag}: the run has {saved[name]}, leave it out or start a new run")
    done = len(checkpoint["history"])
    if config["rounds"] < done:
        raise ValueError(f"--rounds {config['rounds']}: the run has {done} already")
    for name, value in methods[config["method"]].items():
        if config[name] is None:
            config[name] = value
    return config, checkpoint


def prepare(config, checkpoint):
    """Config -> device, data (the training images there), split; config gets what was left open."""
    device = pick_device(config["device"])
    torch.backends.cudnn.benchmark = True  # the shapes of training are fixed
    if config["amp"] is None:  # at first: from Ampere on, not on a CPU; a resumed run keeps it
        config["amp"] = device.type == "cuda" and torch.cuda.get_device_capability()[0] >= 8
    data = load_dataset(config["dataset"], config["data_dir"], config["image_size"])
    if config["images"] not in (None, data.fingerprint()):
        raise ValueError(f"{config['dataset']} has other images than those the run began with")
    config["images"] = data.fingerprint()
    split = make_split(config, data.train_y, checkpoint)
    config["clients"] = len(split)
    return device, data._replace(train_x=data.train_x.to(device)), split


def make_split(config, labels, checkpoint):
    """K index arrays: the checkpoint's, --split-file's, or a Dirichlet split; of --limit images."""
    limit = config["limit"]
    if limit and limit > len(labels):
        raise ValueError(f"--limit {limit}: there are only {len(labels)} training images")
    shuffled = torch.randperm(len(labels), generator=keyed_generator("limit"))
    pool = shuffled[:limit].sort().values.numpy()
    if checkpoint["split"]:
        return check_split(checkpoint["split"], pool, config["clients"], config["resume"])
    if config["split_file"]:
        source = f"split file {config['split_file']}"
        return check_split(read_split(config["split_file"]), pool, config["clients"], source)
    parts = dirichlet_split(labels[pool], config["clients"] or 10, config["alpha"], config["seed"])
    return [pool[part] for part in parts]


def make_model(config):
    """The network with its first weights, the same for the same seed."""
    torch.manual_seed(config["seed"])
    return SSDNet(config["width"], config["embed_dim"], config["projector"])


def place(model, checkpoint, device):
    """The network on its device, with the checkpoint's weights if it has any."""
    if checkpoint["model"]:
        load_weights(model, checkpoint["model"], "the checkpoint")
    return model.to(device, memory_format=torch.channels_last)


def ssd_step(model, images, drawn, d_k, objective, weights, amp):
    """The loss of a client's batch and its terms: two views -> network -> objective."""
    x1, x2 = make_views(images, drawn)
    with torch.autocast(images.device.type, torch.bfloat16, enabled=amp):
        h1, u1 = model(x1)  # BatchNorm sees one view at a time
        h2, u2 = model(x2)
        return objective(h1, u1, h2, u2, d_k, **weights)


def compile_step(must):
    """`ssd_step` as one graph. Where that fails: a warning and the plain step, unless `must`."""
    step = torch.compile(ssd_step, mode="reduce-overhead", dynamic=False, fullgraph=True)
    print("the first step compiles, about a minute", flush=True)

    def compiled_step(*arguments):
        nonlocal step
        try:
            return step(*arguments)
        except Exception as error:  # no Triton, no C compiler; or a bug, which comes again below
            if must or step is ssd_step:
                raise
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            warnings.warn(f"not compiled, training is slower: {reason}", stacklevel=2)
            step = ssd_step
            return step(*arguments)

    return compiled_step


def make_loss(config, num_clients, device, objective=ssd_loss):
    """The local loss for federated.py: `ssd_step` with the client's d_k and the flags' weights."""
    dim = config["embed_dim"] or 8 * config["width"]
    d = scaling_vectors(num_clients, dim, config["scale"], config["seed"]).to(device)
    hard = config["method"] == "hsd"
    if hard and np.float32(config["scale"]) == 1:  # in the precision of d_k
        raise ValueError("--method hsd needs --scale other than 1, which marks no dimension")
    weights = {"hard": hard} | {name: config[name] for name in ("beta", "gamma", "delta")}
    fast_step = ssd_step
    if config["compile"] or (config["compile"] is None and device.type == "cuda"):
        fast_step = compile_step(must=config["compile"])

    def loss(model, images, k, generator, global_state):
        step = ssd_step  # of a client that has less than a full batch
        if len(images) == config["batch_size"]:
            step = fast_step
        drawn = draw_views(images, generator)  # outside the graph, which would repeat its numbers
        return step(model, images, drawn, d[k], objective, weights, config["amp"])

    return loss


def open_run(config, checkpoint, split, model):
    """The run's folder, config["out"] or a new one under runs/, with its four files."""
    name = f"{Path(config['dataset']).name}-{config['method']}-k{config['clients']}"
    name += f"-seed{config['seed']}"
    folder = Path(config["out"] or f"runs/{name}")
    number = 1
    while config["out"] is None and folder.exists():
        number += 1
        folder = Path(f"runs/{name}-{number}")
    folder.mkdir(parents=True, exist_ok=config["out"] is not None)
    if not config["resume"] and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty: choose another --out, or --resume its last.pt")
    config["out"] = str(folder)
    record = {**config, "threads": torch.get_num_threads(), "device_name": "cpu"}
    if torch.cuda.is_available():
        record["device_name"] = torch.cuda.get_device_name()
    record["versions"] = {"torch": torch.__version__, "torchvision": torchvision.__version__}
    (folder / "config.json").write_text(json.dumps(record, indent=1))
    (folder / "split.json").write_text(json.dumps({k: p.tolist() for k, p in enumerate(split)}))
    save_round(config, split, model, checkpoint["history"])


def save_round(config, split, model, history):
    """metrics.jsonl, a line a round, then last.pt, from which metrics.jsonl can be written anew."""
    folder = Path(config["out"])
    lines = [json.dumps(line) + "\n" for line in history]
    (folder / "metrics.jsonl").write_text("".join(lines))
    save_checkpoint(folder / "last.pt", config, split, model, history)


def make_optimizer(config, model):
    """SGD; federated.py clears its state for every client."""
    sgd = {name: config[name] for name in ("lr", "momentum", "weight_decay")}
    on_gpu = next(model.parameters()).device.type == "cuda"
    return torch.optim.SGD(model.parameters(), **sgd, fused=on_gpu)


def make_monitor(config, data, split):
    """A cheap score of the model for every round, always on the same random images."""
    held = torch.from_numpy(np.concatenate(split))
    train = held[torch.randperm(len(held), generator=keyed_generator("monitor"))[:2000]]
    test = torch.randperm(len(data.test_y), generator=keyed_generator("monitor"))[:1000]
    some = (data.train_x[train], data.train_y[train], data.test_x[test], data.test_y[test])
    return lambda model: quick_scores(model, *some, config["amp"])


def show_client(model, k):
    """What a round calls as client k starts: on a terminal, a line that the round's line wipes."""
    if sys.stdout.isatty():
        print(f"client {k} trains ", end="\r", flush=True)


def round_options(config):
    """The keyword arguments of `federated_round`."""
    names = ("participation", "local_epochs", "batch_size", "seed")
    options = {name: config[name] for name in names}
    return {**options, "on_client_start": show_client}


def print_round(config, line, terms):
    """One line of a round: the loss terms, kNN, seconds, time left."""
    text = f"round {line['round']:3d}/{config['rounds']}"
    for name, value in terms.items():
        text += f"  {name} {value:.3f}"
    left = timedelta(seconds=round(line["seconds"] * (config["rounds"] - line["round"])))
    print(f"{text}  kNN {line['knn']:.1f} %  {line['seconds']:.1f} s  {left} left", flush=True)


def run_rounds(config, checkpoint, data, split, model, loss, one_round=federated_round):
    """Every round of an opened run: train, score, save, print.

    one_round: called as `federated_round`, to take its place: a method's own choice of clients,
    average or schedule (extras/baselines.py), many processes (extras/parallel.py). Exit status 1
    when all clients diverge, 2 when a file cannot be written, 130 at Ctrl-C or SIGTERM.
    """
    history = checkpoint["history"]
    optimizer, options = make_optimizer(config, model), round_options(config)
    monitor = make_monitor(config, data, split)
    sizes = [len(part) for part in split]
    print(f"{config['method']} on {config['dataset']}: {sum(sizes):,} images, ", end="")
    print(f"{len(split)} clients with {min(sizes):,} to {max(sizes):,}; ", end="")
    print(f"{data.train_x.device}, {'bfloat16' if config['amp'] else 'float32'}; {config['out']}/")
    knn = monitor(model)["knn"]
    print(f"round {len(history):3d}/{config['rounds']}  kNN {knn:.1f} %", flush=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    try:
        for r in range(len(history), config["rounds"]):
            start = time.time()
            report = one_round(model, optimizer, data.train_x, split, loss, r, **options)
            terms = report.pop("terms")
            line = {**terms, "round": r + 1, **monitor(model), **report}
            line["seconds"] = time.time() - start
            line |= {name: config[name] for name in MAY_CHANGE}
            line["lr"] = optimizer.param_groups[0]["lr"]  # a schedule's, of this round
            history.append(line)
            save_round(config, split, model, history)
            print_round(config, line, terms)
    except (KeyboardInterrupt, FloatingPointError, OSError) as error:
        status = {KeyboardInterrupt: 130, FloatingPointError: 1}.get(type(error), 2)
        go_on = f"python {sys.argv[0]} --resume {config['out']}/last.pt"
        print(f"\n{str(error) or 'stopped'}; go on with: {go_on}", file=sys.stderr)
        sys.exit(status)
    print(f"next: python eval.py {config['out']}/last.pt, or --resume it with --rounds N")


def main(argv=None, objective=ssd_loss):
    """Flags -> data, split -> network -> loss -> run folder -> rounds.

    objective: a loss of your own, called as `ssd_loss`; its runs bear the name of your script.
    """
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"  # in one line
    methods = own_methods(objective)
    parser = build_parser(methods)
    try:
        config, checkpoint = read_config(parser, argv, methods)
        device, data, split = prepare(config, checkpoint)
        model = place(make_model(config), checkpoint, device)
        loss = make_loss(config, len(split), device, objective)
        open_run(config, checkpoint, split, model)
    except (ValueError, OSError) as error:
        parser.error(" ".join(str(error).split()))
    run_rounds(config, checkpoint, data, split, model, loss)


if __name__ == "__main__":
    main()
