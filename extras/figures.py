"""The README's figures, as small SVG files: `pip install matplotlib`, then

    python extras/figures.py                              # those that need no run: seconds, CPU
    python extras/figures.py runs/ablation/scores.jsonl   # a study's as well

where extras/study.py wrote that file. --first-run takes runs of the first run's command and keeps
their rounds in first_run.jsonl, from which their curve is drawn again; --separation takes the file
that extras/separation.py writes:

    python extras/figures.py --forest     # forest.svg of extras/RESULTS.md, from assets/claims.json
"""

import argparse
import itertools
import json
import re
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "extras")]

import claims  # noqa: E402
from diagrams import COLOURS, STYLE, legend, pipeline, scales, stopgrad  # noqa: E402
from law import compare  # noqa: E402
from tables import cell, interval, read  # noqa: E402

from data import load_dataset  # noqa: E402
from train import make_model, make_monitor  # noqa: E402


def shorten(svg):
    """An SVG file with its numbers rounded, coordinates to a tenth of a point.

    Ids of clip paths are hashes of coordinates whose last digit the layout leaves open: counted.
    """
    ids = {}
    svg = re.sub(r"\bp[0-9a-f]{10}\b", lambda name: ids.setdefault(name[0], f"p{len(ids)}"), svg)
    svg = re.sub(r"\d{2,}\.\d{2,}", lambda number: f"{float(number[0]):.1f}", svg)
    return re.sub(r"\d\.\d{3,}", lambda number: f"{float(number[0]):.2f}", svg)


def band(axis, x, values, **style):
    """Mean of the rows of values (n, len(x)), and ± std around it."""
    mean = values.mean(0)
    (line,) = axis.plot(x, mean, **style)
    if len(values) > 1:
        std = values.std(0, ddof=1)
        axis.fill_between(x, mean - std, mean + std, color=line.get_color(), alpha=0.14, lw=0)


def first_run(plt, lines):
    """kNN a round of each method: of all its seeds, and of the run that went on for longest.

    lines: of first_run.jsonl; round 0, the untrained encoder, is the dashed line.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 4), sharey=True)
    runs = {}
    for line in lines:
        run = runs.setdefault(line["method"], {}).setdefault(line["seed"], [])
        run.append(line["knn"])
    last = min(len(run) for seeds in runs.values() for run in seeds.values())
    for colour, (method, seeds) in zip(COLOURS, runs.items()):
        short = np.array([run[1:last] for run in seeds.values()])
        band(left, range(1, last), short, color=colour, label=method)
        long = max(seeds.values(), key=len)
        right.plot(range(1, len(long)), long[1:], color=colour)
    untrained = np.mean([run[0] for seeds in runs.values() for run in seeds.values()])
    for axis in (left, right):
        label = {"label": "untrained encoder"} if axis is left else {}
        axis.axhline(untrained, color=COLOURS[7], linestyle="--", **label)
        axis.set_xlabel("round")
    left.set_title(f"kNN %, {len(seeds)} seeds: mean and ± std")
    right.set_title("one seed, more rounds")
    legend(figure, left)
    figure.tight_layout()
    return figure


def record(runs):
    """Run folders -> lines of first_run.jsonl: method, seed, terms, scores; round 0: untrained."""
    left_out = {"lr", "seconds", "clients", "left_out"}
    for run in runs:
        config = json.loads((run / "config.json").read_text())
        parts = list(json.loads((run / "split.json").read_text()).values())
        monitor = make_monitor(config, load_dataset(config["dataset"], config["data_dir"]), parts)
        untrained = make_model(config).to(memory_format=torch.channels_last)
        for line in ({"round": 0, **monitor(untrained)}, *read(run / "metrics.jsonl")):
            kept = {name: value for name, value in line.items() if name not in left_out}
            yield {"method": config["method"], "seed": config["seed"], **kept}


def separation(plt, lines):
    """A: where SSD's networks and two averages put z; B: the law of extras/law.py.

    A is of the last round that both rows have, its first seed; B of all rounds and seeds.
    """
    rows = ("ssd", "fedalignuniform")
    there = {(x["row"], x["round"], x["seed"], x["variant"]): x for x in lines if "shares" in x}
    runs = [{key[1:3] for key in there if key[0] == row} for row in rows]
    common = set.intersection(*runs)
    if not common:
        raise ValueError(f"no round of both {' and '.join(rows)} to draw")
    r = max(r for r, _ in common)
    seed = min(seed for at, seed in common if at == r)
    weights = np.array(there["ssd", r, seed, "average"]["weights"])
    order = np.argsort(-weights)  # the client with most images first
    networks = np.array(there["ssd", r, seed, "same-images"]["shares"])[order][:, order]
    averages = [np.mean(there[row, r, seed, "average"]["shares"], axis=0)[order] for row in rows]

    figure = plt.figure(figsize=(9.6, 4.9), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.4, 1))
    upper, lower = left.subplots(2, 1, height_ratios=(len(networks), 2))
    clients = [f"{100 * weight:.0f}" for weight in weights[order]]
    share_map(upper, networks, clients)
    share_map(lower, np.array(averages), ["average of these", "average without SSD's terms"])
    upper.set_title(
        "A: % of a network's output z in each client's\ndimensions, on the same images", size=12
    )
    upper.set_ylabel("network of the client with\n... % of all images", fontsize=10)
    lower.set(xticks=range(len(clients)), xticklabels=clients)
    lower.set_xlabel("dimensions of the client with ... % of all images", fontsize=10)
    law_points(right.subplots(), lines)
    return figure


def share_map(axis, shares, labels):
    """Shares as numbers in %, the darker the larger; a row is labelled."""
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for (i, k), share in np.ndenumerate(shares):
        colour = "white" if share > 0.55 else "black"
        axis.text(k, i, f"{100 * share:.0f}", color=colour, ha="center", va="center", size=9)
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0, labelsize=10)
    axis.set(xticks=[], yticks=range(len(labels)), yticklabels=labels)


def law_points(axis, lines):
    """Of every seed, round and client: the share of the average's z, by extras/law.py, measured."""
    found = compare([line for line in lines if line["row"] in ("ssd", "ssd --gamma 0.2")])
    found = found[found["variant"] == "average"]
    end = 5 + 100 * np.concatenate([*found["law"], *found["measured"]]).max()
    axis.plot([0, end], [0, end], color=COLOURS[7], linewidth=1)
    for colour, (row, part) in zip(COLOURS, found.groupby("row")):
        predicted, measured = 100 * np.hstack(part["law"]), 100 * np.hstack(part["measured"])
        label = "SSD, γ = 1" if row == "ssd" else "SSD, γ = 0.2"
        axis.plot(predicted, measured, "o", color=colour, ms=4, alpha=0.6, label=label)
    axis.set_title("B: % of the average's z in one\nclient's dimensions (a point each)", size=12)
    axis.set_xlabel("predicted: (sum of weight x √share)²", fontsize=10)
    axis.set_ylabel("measured", fontsize=10)
    axis.tick_params(labelsize=10)
    axis.set(xlim=(0, end), ylim=(0, end), aspect="equal")
    axis.legend(frameon=False, fontsize=10)


def rounds(plt, rows):
    """Uniformity of h and z, alignment, kNN over the rounds: mean over the seeds, band ± std."""
    panels = {
        "kNN %, 2,000 labels (↑ better)": ("knn_rounds", 1),
        "L_align in training (↓ closer)": ("align_rounds", 1),
        "−L_uniform of h (↑ more uniform)": ("uniformity_h_rounds", -1),
        "−L_uniform of z (↑ more uniform)": ("uniformity_z_rounds", -1),
    }
    figure, axes = plt.subplots(2, 2, figsize=(7.6, 6.5), sharex=True)
    for axis, (title, (key, sign)) in zip(axes.flat, panels.items()):
        for colour, (label, lines) in zip(itertools.cycle(COLOURS), rows.items()):
            if all(key in line for line in lines):  # an untrained row has none
                values = sign * np.array([line[key] for line in lines])
                r = range(1, 1 + values.shape[1])
                band(axis, r, values, color=colour, label=label)
        axis.set_title(title)
    for axis in axes[1]:
        axis.set_xlabel("round")
    legend(figure, axes[0, 0])
    figure.tight_layout()
    return figure


def forest(plt):
    """The claims on LP: mean differences with 95 % intervals, the paper's; cut off at 6 points."""
    end, forms, bars = 6, {"printed": "as printed", "run": "as run (authors' form)"}, []
    for claim in claims.read_claims():
        for form in forms:
            values = claims.compare(claim, form)
            if claim["column"] == "LP %" and len(values) > 1:
                bars.append((claim, form, values))
    figure, axis = plt.subplots(figsize=(4.2, 0.27 * len(bars) + 0.9))
    blend = axis.get_yaxis_transform()
    for y, (claim, form, values) in enumerate(bars):
        middle, half = interval(values)
        style = {"color": COLOURS[0 if form == "printed" else 2]}
        ends = np.clip([middle - half, middle + half], -end, end)
        axis.plot(ends, [y, y], label=f"{forms[form]}, 95 % interval", **style)
        for sign, marker in ((-1, "<"), (1, ">")):
            if sign * middle + half > end:
                axis.plot(sign * end, y, marker, ms=6, clip_on=False, **style)
        axis.plot(middle, y, "o", ms=6, **style)
        paper = float(claim["paper"].replace("−", "-"))
        axis.plot(paper, y, "D", color=COLOURS[1], ms=6, mfc="none", mew=2, label="the paper")
        text = f"{claim['number']} {claim['claim']}, {claim['images']} images"
        text = text.replace("`", "").replace(" the linear probe (LP)", " LP")
        axis.text(-0.03, y, text, transform=blend, va="center", ha="right")
        text = f"{cell(values, 1, True)}, n = {len(values)}"
        axis.text(1.04, y, text, transform=blend, va="center")
    axis.axvline(0, color=COLOURS[7], lw=1, zorder=0)
    axis.set(xlim=(-end, end), ylim=(len(bars) - 0.3, -0.7), yticks=[])
    axis.spines["left"].set_visible(False)
    axis.set_xlabel("LP minus the baseline's, in points (→ better)")
    handles, labels = axis.get_legend_handles_labels()
    once = dict(zip(labels, handles))
    place = {"loc": "lower center", "bbox_to_anchor": (0.5, 0.98)}
    axis.legend(once.values(), once, ncols=3, frameon=False, **place)
    return figure


def find_rows(path, asked=None):
    """{row: its lines, one a seed}, of a study's scores on its own data set."""
    rows = {}
    for line in read(path):
        if "alignment_z" not in line:
            raise ValueError(f"{path} is not a scores.jsonl of extras/study.py")
        if not line["transfer"]:
            rows.setdefault(line["row"], []).append(line)
    if not rows:
        raise ValueError(f"{path} has no scores on a study's own data set")
    for row in asked or []:
        if row not in rows:
            raise ValueError(f"no row {row} in {path}: it has {', '.join(rows)}")
    return {row: rows[row] for row in asked or rows}


def draw_all(plt, args):
    """Yields the name of a file and its figure, of all that the flags ask for."""
    rows = find_rows(args.scores, args.rows) if args.scores else {}
    if args.rows and not args.scores:
        raise ValueError("--rows is of a study's scores: give their file before --rows")
    controls = read(args.separation) if args.separation else []
    if not all("variant" in line for line in controls):
        raise ValueError(f"{args.separation} is not a file of extras/separation.py")
    shares = separation(plt, controls) if controls else None
    trees = forest(plt) if args.forest else None
    first, kept = list(record(args.first_run or [])), args.out / "first_run.jsonl"
    lines = first or (read(kept) if kept.exists() else [])
    curve = first_run(plt, lines) if lines else None
    args.out.mkdir(parents=True, exist_ok=True)  # nothing is written before all has been read
    if first:
        kept.write_text("".join(json.dumps(line) + "\n" for line in first))
    yield "pipeline.svg", pipeline(plt)
    yield "d_k.svg", scales(plt)
    yield "stopgrad.svg", stopgrad(plt)
    if curve:
        yield "first_run.svg", curve
    if shares:
        yield "separation.svg", shares
    if trees:
        yield "forest.svg", trees
    if any("knn_rounds" in line for lines in rows.values() for line in lines):
        yield f"{args.scores.stem}_rounds.svg", rounds(plt, rows)


def main(argv=None):
    """Run folders and records -> SVG files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.usage = argparse.SUPPRESS  # so that an error is one line
    add = parser.add_argument
    add("scores", type=Path, nargs="?", help="scores.jsonl, or what it is called in assets/")
    add("--rows", nargs="+", help="draw these of the study's rows, in this order (all)")
    add("--first-run", type=Path, nargs="+", metavar="RUN", help="run folders, one a seed")
    add("--separation", type=Path, metavar="FILE", help="of extras/separation.py")
    add("--forest", action="store_true", help="draw the claims on LP, from assets/claims.json")
    add("--out", type=Path, default=Path("assets"), help="where the figures go (%(default)s)")
    args = parser.parse_args(argv)
    try:
        import matplotlib.pyplot as plt

        plt.switch_backend("agg")
        plt.rcParams.update(STYLE)
        for name, figure in draw_all(plt, args):
            path = args.out / name
            figure.savefig(path, metadata={"Date": None})
            path.write_text(shorten(path.read_text()))
            plt.close(figure)
            print(path)
    except ModuleNotFoundError as error:
        parser.error(f"{error}: pip install matplotlib")
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
