"""The README's figures, from run folders: `pip install matplotlib`, then

    python extras/figures.py runs/ablation --out assets      # a minute, CPU

where runs/ablation is what extras/study.py left: run folders of train.py, scored by eval.py, whose
names end in the seed. Five figures: the sphere before and after DSR, the split, the rounds,
uniformity against alignment, the two views.
"""

import itertools
import json
import re
import statistics
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from data import draw_shapes, load_dataset, two_views  # noqa: E402
from eval import OneLineParser  # noqa: E402
from losses import scaling_vectors, toy  # noqa: E402

STYLE = {  # a light card of its own: it reads the same on a light and on a dark page
    "figure.facecolor": "#f7f7f5",
    "axes.facecolor": "#f7f7f5",
    "savefig.bbox": "tight",
    "font.size": 13,
    "lines.linewidth": 2,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "0",  # the same file again from the same runs
    "svg.fonttype": "none",
}
COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#444444", "#888888"]

LABELS = {  # as in the README's tables; other rows keep their names
    "fedalignuniform": "FedAlignUniform",
    "pd": "+ PD",
    "dsr": "+ DSR",
    "ssd": "SSD (both)",
    "hsd": "HSD",
}


def legend(figure, axis):
    """One legend for the whole figure, below it."""
    handles = axis.get_legend_handles_labels()
    figure.legend(*handles, loc="upper center", bbox_to_anchor=(0.5, 0.02), ncols=3, frameon=False)


def sphere(plt):
    """Two clients' points before and after DSR, seen from between their own axes."""
    points = list(toy())
    view = torch.tensor([[-0.71, 0.0, 0.71], [-0.41, 0.82, -0.41], [0.58, 0.58, 0.58]])
    figure, axes = plt.subplots(1, 2, figsize=(7, 3.7))
    ends = zip(axes, (points[0], points[-1]), ("before DSR", "after five steps"))
    for axis, (both, inter), when in ends:
        axis.add_patch(plt.Circle((0, 0), 1, fill=False, color="#999999", linewidth=1))
        for k, (z, d_k) in enumerate(zip(both, scaling_vectors(2, 3))):
            seen = z @ view.T
            front = seen[:, 2] > 0
            axis.plot(
                *seen[front, :2].T.numpy(), ".", color=COLOURS[k], alpha=0.7, label=f"client {k}"
            )
            own = ((d_k != 1).float() @ view.T).tolist()
            axis.plot([0, own[0]], [0, own[1]], color=COLOURS[k], linestyle=":")
        axis.set_title(f"{when}: inter-client\n−L_uniform {inter:.2f}", fontsize=13)
        axis.set_aspect("equal")
        axis.axis("off")
    legend(figure, axes[0])
    figure.tight_layout()
    return figure


def split(plt, run):
    """How many images of a class each client has, as areas; the largest is labelled."""
    config = json.loads((run / "config.json").read_text())
    data = load_dataset(config["dataset"], config["data_dir"])
    parts = json.loads((run / "split.json").read_text()).values()
    counts = np.stack(
        [np.bincount(data.train_y[part], minlength=len(data.classes)) for part in parts]
    )
    figure, axis = plt.subplots(figsize=(7, 0.5 * len(data.classes) + 1.5))
    k, c = np.indices(counts.shape)
    axis.scatter(k, c, 600 * counts / counts.max(), COLOURS[0])
    k, c = np.unravel_index(counts.argmax(), counts.shape)
    axis.annotate(f"{counts.max():,}", (k, c), (12, 8), textcoords="offset points")
    axis.set_yticks(range(len(data.classes)), data.classes)
    axis.set_xticks(range(len(counts)), [f"{k}\n{n:,}" for k, n in enumerate(counts.sum(1))])
    axis.set(
        xlabel="client, and its number of images", title=f"Dirichlet({config['alpha']:g}) split"
    )
    axis.margins(0.08)
    return figure


def rounds(plt, rows):
    """Uniformity of h and z, alignment, kNN over the rounds: mean over the seeds, band ± std."""
    panels = {
        "−L_uniform of h (↑ more uniform)": ("uniformity_h", -1),
        "−L_uniform of z (↑ more uniform)": ("uniformity_z", -1),
        "alignment in training (↓ closer)": ("align", 1),
        "kNN %, 2,000 labels (↑)": ("knn", 1),
    }
    figure, axes = plt.subplots(2, 2, figsize=(7.6, 6.5), sharex=True)
    for axis, (title, (key, sign)) in zip(axes.flat, panels.items()):
        for colour, (label, runs) in zip(itertools.cycle(COLOURS), rows.items()):
            lines = [(run / "metrics.jsonl").read_text().splitlines() for run in runs]
            values = np.array(
                [[sign * json.loads(line).get(key, np.nan) for line in part] for part in lines]
            )
            r, mean = range(1, 1 + values.shape[1]), values.mean(0)
            axis.plot(r, mean, color=colour, label=LABELS.get(label, label))
            if len(values) > 1:
                std = values.std(0, ddof=1)
                axis.fill_between(r, mean - std, mean + std, color=colour, alpha=0.12, lw=0)
        axis.set_title(title, fontsize=13)
    for axis in axes[1]:
        axis.set_xlabel("round")
    legend(figure, axes[0, 0])
    figure.tight_layout()
    return figure


def own_scores(run):
    """The last line of a run's eval.jsonl on its own data set."""
    data_set = json.loads((run / "config.json").read_text())["dataset"]
    lines = map(json.loads, (run / "eval.jsonl").read_text().splitlines())
    return [line for line in lines if line["dataset"] == data_set][-1]


def trade_off(plt, rows):
    """Uniformity of z against its alignment: a point a row, mean ± std over the seeds."""
    figure, axis = plt.subplots(figsize=(7, 4.8))
    for colour, (label, runs) in zip(itertools.cycle(COLOURS), rows.items()):
        scores = [own_scores(run) for run in runs]
        ends = [[-score[key] for score in scores] for key in ("alignment_z", "uniformity_z")]
        (x, y) = map(statistics.mean, ends)
        spread = [statistics.stdev(end) if len(end) > 1 else 0 for end in ends]
        axis.errorbar(
            x, y, spread[1], spread[0], "o", color=colour, capsize=3, label=LABELS.get(label, label)
        )
    legend(figure, axis)
    axis.set(xlabel="−L_align of z (better →)", ylabel="−L_uniform of z (better ↑)")
    figure.tight_layout()
    return figure


def views(plt):
    """Six drawn images, each above its two random views."""
    images = draw_shapes(6, 1).train_x
    rows = [images / 255, *two_views(images, torch.Generator().manual_seed(3))]
    figure, axes = plt.subplots(3, 6, figsize=(7, 3.6))
    for row, pictures, label in zip(axes, rows, ("image", "view 1", "view 2")):
        for axis, picture in zip(row, pictures):
            axis.imshow(picture.permute(1, 2, 0).numpy(), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        row[0].set_ylabel(label)
    figure.subplots_adjust(wspace=0.06, hspace=0.06)
    return figure


def find_runs(folder):
    """{row: its run folders, one a seed}, of the trained and scored runs in a study's folder."""
    rows = {}
    for path in sorted(folder.glob("*-seed*")):
        name = re.sub(r"-seed\d+$", "", path.name)
        if (path / "eval.jsonl").exists() and (path / "metrics.jsonl").stat().st_size:
            rows.setdefault(name, []).append(path)
    if not rows:
        raise ValueError(f"{folder} holds no scored runs: make them with extras/study.py")
    return rows


def main(argv=None):
    """Run folders -> SVG files (the two views: PNG)."""
    parser = OneLineParser("extras/figures.py", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("folder", type=Path, help="a folder of run folders, as extras/study.py leaves it")
    add("--rows", nargs="+", help="draw these rows, in this order (all)")
    add("--out", type=Path, default=Path("assets"), help="where the figures go (%(default)s)")
    args = parser.parse_args(argv)
    try:
        import matplotlib.pyplot as plt

        rows = find_runs(args.folder)
        if args.rows:
            missing = [row for row in args.rows if row not in rows]
            if missing:
                raise ValueError(f"no row {missing[0]} in {args.folder}: it has {', '.join(rows)}")
            rows = {row: rows[row] for row in args.rows}
        run = next(iter(rows.values()))[0]
        plt.switch_backend("agg")
        plt.rcParams.update(STYLE)
        args.out.mkdir(parents=True, exist_ok=True)
        for name, draw in {
            "sphere.svg": lambda: sphere(plt),
            "split.svg": lambda: split(plt, run),
            "rounds.svg": lambda: rounds(plt, rows),
            "trade_off.svg": lambda: trade_off(plt, rows),
            "views.png": lambda: views(plt),
        }.items():
            draw().savefig(args.out / name, metadata={"Date": None} if "svg" in name else None)
            plt.close("all")
            print(args.out / name)
    except ModuleNotFoundError as error:
        parser.error(f"{error}: pip install matplotlib")
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
