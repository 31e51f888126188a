"""What averaging does to the separation of the clients: their images before and after FedAvg.

    python extras/separation.py runs/regime/*/last.pt     # for each the time of one round

Every client trains the run's global network for one more round. Its training images are embedded by
its own local network (before) and by the average of all (after); hsd's z is separated as in
training. The file gets a line a measurement, and what it holds is not measured again; the tables
are mean ± std over the seeds of a row. Without more training, all images in two views:

    python extras/separation.py runs/ablation/*/last.pt --epochs 0 --images 4000 --views
"""

import functools
import json
import re
import statistics
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "extras")]

import baselines  # noqa: E402

from data import load_dataset, two_views  # noqa: E402
from eval import (  # noqa: E402
    OneLineParser,
    alignment,
    encode,
    load_checkpoint,
    mean_parts,
    number,
    pick_device,
    uniformity_parts,
)
from federated import average_states, copy_state, federated_round, keyed_generator  # noqa: E402
from losses import hard_separation, scaling_vectors  # noqa: E402
from train import METHODS, make_loss  # noqa: E402

VALUES = {  # key of a line: heading
    "total": "−L_uniform",
    "intra": "intra-client",
    "inter": "inter-client",
    "cosine": "cosine of clients' means",
    "alignment": "alignment",
}


def local_states(model, config, images, split, rounds, epochs):
    """Each client's state dict after `epochs` local epochs: round `rounds`, but for its average."""
    if epochs == 0:
        return [copy_state(model)] * len(split)
    config = {**config, "compile": False}  # one round is too short for it
    own = baselines.make_options({"client": None, **config}, images, split)
    loss, states = own.get("loss") or make_loss(config, len(split), images.device), []
    rates = {name: config[name] for name in ("lr", "momentum", "weight_decay")}
    if "lr" in own:  # a schedule
        rates["lr"] = own["lr"](min(rounds, config["rounds"] - 1))
    sgd = torch.optim.SGD(model.parameters(), **rates)
    flags = {"local_epochs": epochs, **{name: config[name] for name in ("batch_size", "seed")}}

    def keep(sent, weights, global_state, r):
        states.extend(sent)
        return global_state

    report = federated_round(model, sgd, images, split, loss, rounds, average=keep, **flags)
    if report["left_out"]:
        raise ValueError(f"clients {report['left_out']} diverge in the round: nothing to measure")
    return states


def embed(model, config, d_k, views):
    """One client's views (V, n, 3, H, W) -> unit rows h (V, n, 8 width) and z (V, n, D)."""
    h, u = encode(model, views.flatten(0, 1), config["amp"])
    z = hard_separation(u, d_k) if config["method"] == "hsd" else u
    return [F.normalize(rows, dim=1).cpu().view(*views.shape[:2], -1) for rows in (h, z)]


def geometry(z, client):
    """-L_uniform and its parts, the mean cosine of two clients' mean directions, -log E_ij.

    z unit rows (N, D), client (N,) below K, each at least twice. E_ij = mean exp(-2 ||z - z'||^2),
    z of client i, z' of client j, different rows. What needs two clients is left out for one.
    """
    _, own, others = uniformity_parts(z, client)
    sizes = torch.bincount(client).double()
    pairs = (sizes[:, None] * sizes - sizes.diag()) / (len(z) * (len(z) - 1))
    matrix = -((own.diag() + others) / pairs).log()
    means = F.normalize(F.one_hot(client).T.double() @ z.double(), dim=1)
    i, j = torch.triu_indices(len(means), len(means), 1)
    values = dict(zip(("total", "intra", "inter"), (-part for part in mean_parts(z, client))))
    values["cosine"] = (means[i] * means[j]).sum(1).mean().item()
    values = {name: value for name, value in values.items() if value == value}
    return {**values, "matrix": [[round(value, 4) for value in row] for row in matrix.tolist()]}


def measure(checkpoint, model, images, epochs, count, two):
    """Yields {"when", "part", values of `geometry`, with two views "alignment"}: four dicts."""
    config, split, rounds = checkpoint["config"], checkpoint["split"], len(checkpoint["history"])
    d = scaling_vectors(len(split), 8 * config["width"], config["scale"], config["seed"])
    chosen, view_draws = [], torch.Generator().manual_seed(0)
    for k, index in enumerate(split):
        draws = keyed_generator(config["seed"], "separation", k)
        some = images[index[torch.randperm(len(index), generator=draws)[:count].sort().values]]
        chosen.append(torch.stack(two_views(some, view_draws)) if two else some[None])
    client = torch.arange(len(split)).repeat_interleave(torch.tensor([x.shape[1] for x in chosen]))
    states = local_states(model, config, images, split, rounds, epochs)
    average = average_states(states, [len(index) for index in split])
    for when, networks in (("before", states), ("after", [average] * len(split))):
        parts = []
        for state, d_k, views in zip(networks, d.to(images.device), chosen):
            model.load_state_dict(state)
            parts.append(embed(model, config, d_k, views))
        for part, rows in zip("hz", zip(*parts)):
            views = torch.cat(rows, dim=1)
            values = {"when": when, "part": part, **geometry(views[0], client)}
            yield {**values, "alignment": alignment(*views)} if two else values


def row_name(line):
    """A row's name in tables and figures: the run without folder and seed, its rounds, E."""
    row = re.sub(r"-seed\d+$", "", Path(line["run"]).name)
    return f"{row}, round {line['rounds']}, E = {line['epochs']}"


def table(lines, part):
    """Markdown of the lines of h or z, mean ± std over the seeds of a row."""
    columns = {key: name for key, name in VALUES.items() if any(key in line for line in lines)}
    text = [f"| {part} | " + " | ".join(columns.values()) + " | n |"]
    text.append("|---" * (len(columns) + 2) + "|")
    rows = {}
    for line in (line for line in lines if line["part"] == part):
        rows.setdefault(f"{row_name(line)}, {line['when']}", []).append(line)
    for row, runs in rows.items():
        cells = [row]
        for key in columns:
            values = [run[key] for run in runs if key in run]
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.3f}{spread}" if values else "–")
        text.append("| " + " | ".join([*cells, str(len(runs))]) + " |")
    return "\n".join(text)


def main(argv=None):
    """Checkpoints -> lines in a file -> a table of h and one of z."""
    parser = OneLineParser("extras/separation.py", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("checkpoints", nargs="+", help="of train.py; a row's runs are named NAME-seedN")
    add("--epochs", type=number(int, 0), default=1, help="local epochs of the round (%(default)s)")
    add("--images", type=number(int, 2), default=500, help="of a client, at most (%(default)s)")
    add("--views", action="store_true", help="embed two random views of each, not the image")
    add("--out", type=Path, default=Path("separation.jsonl"), help="(%(default)s)")
    add("--data-dir", help="(the run's)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 ... (%(default)s)")
    args = parser.parse_args(argv)
    load = functools.cache(load_dataset)
    try:
        device, text = pick_device(args.device), args.out.read_text() if args.out.exists() else ""
        lines = [json.loads(line) for line in text.splitlines()]
        if not all("matrix" in line for line in lines):
            raise ValueError(f"{args.out} holds something else: choose another --out")
        for path in args.checkpoints:
            checkpoint, model = load_checkpoint(path)
            config, run = checkpoint["config"], str(Path(path).parent)
            if config["method"] not in METHODS.keys() | baselines.CHOICES:
                raise ValueError(f"{path} is of {config['method']}, not SSD or one of its rows")
            asked = {"epochs": args.epochs, "images": args.images, "views": args.views}
            known = {"run": run, "rounds": len(checkpoint["history"]), **asked}
            same = [line for line in lines if row_name(line) == row_name(known)]
            if any(known.items() <= line.items() for line in same):
                continue
            kinds = [(Path(x["run"]).parent, x["images"], x["views"]) for x in (known, *same)]
            if len(set(kinds)) > 1:
                what = f"{row_name(known)} of another folder, --images or --views"
                raise ValueError(f"{args.out} has {what}: choose another --out")
            images = load(config["dataset"], args.data_dir or config["data_dir"]).train_x.to(device)
            measured = measure(checkpoint, model.to(device), images, *asked.values())
            lines += (new := [{**known, **values} for values in measured])
            with args.out.open("a") as file:
                file.writelines(json.dumps(line) + "\n" for line in new)
            print(f"{run}: measured", flush=True)
    except (ValueError, OSError, IndexError, FloatingPointError) as error:
        parser.error(str(error))
    print(table(lines, "h"), table(lines, "z"), sep="\n\n")


if __name__ == "__main__":
    main()
