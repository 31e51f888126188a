"""Pictures of the method, which need no run; extras/figures.py draws them.

pipeline: from an image to z, where the four losses act, what is sent. scales: d_k, and z beside
its target. stopgrad: where a step of DSR moves a point, with it and without. And what all figures
share: style, colours, legend.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))

from losses import dsr_loss, scaling_vectors  # noqa: E402

STYLE = {  # a light card of its own: it reads the same on a light and on a dark page
    "figure.facecolor": "#f7f7f5",
    "axes.facecolor": "#f7f7f5",
    "axes.titlesize": 13,
    "savefig.bbox": "tight",
    "font.size": 13,
    "font.sans-serif": ["DejaVu Sans"],
    "lines.linewidth": 2,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "0",  # the same file again from the same runs
    "svg.fonttype": "none",
}
COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#444444", "#888888"]


def legend(figure, axis, **style):
    """One legend for the whole figure, below it."""
    style |= {"loc": "upper center", "bbox_to_anchor": (0.5, 0.02), "ncols": 3, "frameon": False}
    figure.legend(*axis.get_legend_handles_labels(), **style)


def pipeline(plt):
    """From an image to z, the four losses, where the gradient stops, what is sent."""
    figure = plt.figure(figsize=(9.6, 5.1))
    axis = figure.add_axes((0, 0, 1, 1), xlim=(-6, 906), ylim=(-6, 480))
    axis.axis("off")
    blue, red, green, pink, *_ = COLOURS

    def box(x, y, width, height, text, edge="#444444", fill="white", size=13):
        shape = plt.Rectangle((x, y), width, height, facecolor=fill, edgecolor=edge, linewidth=1.4)
        axis.add_patch(shape)
        axis.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=size)

    def arrow(start, end, colour="#444444", style="-|>", line="-"):
        look = {"arrowstyle": style, "color": colour, "linestyle": line, "linewidth": 1.6}
        axis.annotate("", end, start, arrowprops={**look, "shrinkA": 0, "shrinkB": 0})

    def note(x, y, text, colour="#444444", place="center"):
        axis.text(x, y, text, color=colour, ha=place, va="center", fontsize=12)

    box(0, 424, 900, 50, "server: the new weights are the clients' mean, weighted by samples", blue)
    box(0, 4, 900, 356, "", "#999999", "none")
    note(12, 342, "client k: its images never leave it", place="left")
    for x, start, end, text in (
        (60, 424, 362, "weights, every round"),
        (330, 360, 422, "weights and sample count, every round"),
        (775, 424, 302, "d_k, once"),
    ):
        arrow((x, start), (x, end), blue)
        note(x + 10, 392, text, blue, "left")
    box(12, 160, 60, 60, "image\nx")
    box(142, 120, 90, 140, "encoder")
    box(308, 120, 90, 140, "projector")
    for y, view in ((225, "1"), (155, "2")):
        arrow((74, 190), (96, y))
        for x, name in ((110, "x"), (270, "h"), (436, "u"), (536, "z")):
            axis.text(x, y, name + view, ha="center", va="center", fontsize=15)
        for start, end in ((124, 141), (232, 256), (284, 307), (398, 422), (450, 522)):
            arrow((start, y), (end, y))
    note(106, 276, "two views")
    note(486, 240, "÷ ||u||")
    axis.plot([552, 568, 568, 552], [225, 225, 155, 155], color="#444444", linewidth=1.6)
    box(622, 252, 268, 46, "target: z * d_k, normalised", red, "#fbe9dd", 12.5)
    losses = {"L_DSR: z near its target": 176, "L_align: z1 near z2": 100}
    losses["L_uniform: images spread"] = 24
    arrow((568, 190), (621, 275), line=":")
    for text, y in losses.items():
        box(622, y, 268, 46, text, green, "#e2f2ec")
        arrow((568, 190), (621, y + 23))
    arrow((660, 252), (660, 223), line=":")
    axis.plot([646, 674], [238, 238], color=red, linewidth=4)
    note(684, 238, "the gradient stops here", red, "left")
    box(210, 24, 286, 46, "L_distill:\nKL( softmax(h) ‖ softmax(u) )", green, "#e2f2ec")
    for x in (270, 436):  # from both views
        axis.plot([x, x], [207, 173], color="#444444", linewidth=1.6)
        arrow((x, 138), (x, 71))
    return figure


def scales(plt, clients=10, dim=40, k=3):
    """d_k of every client; z and its target for client k, dimension by dimension."""
    d, draws = scaling_vectors(clients, dim).numpy(), torch.Generator().manual_seed(0)
    z = F.normalize(torch.randn(dim, generator=draws), dim=0).numpy()
    target = z * d[k] / np.linalg.norm(z * d[k])
    figure, axes = plt.subplot_mosaic("ab;ac", figsize=(9.6, 4.4), sharex=True)
    for client, d_k in enumerate(d):
        colour = COLOURS[int(client == k)]
        axes["a"].stairs(client - 0.8 * d_k / d.max(), baseline=client, fill=True, color=colour)
    axes["a"].set_yticks(np.arange(clients) - 0.4, range(clients))
    axes["a"].set(
        ylim=(clients - 0.6, -1), ylabel="client", title=f"d_k, {d.max():g} where high, else 1"
    )
    for name, axis, rows in (("z", axes["b"], z), ("target", axes["c"], target)):
        own = np.where(d[k] > 1, rows, 0)
        axis.stairs(rows, fill=True, color=COLOURS[-1])
        axis.stairs(own, fill=True, color=COLOURS[1])
        share = 100 * np.square(own).sum()
        axis.set_title(
            f"{name}: {share:.0f} % of its squared length\nis in client {k}'s dimensions"
        )
        axis.set_ylim(-0.8, 0.8)
    for axis in (axes["a"], axes["c"]):
        axis.set_xlabel("dimension")
    figure.tight_layout()
    return figure


def dsr_slopes(share, a=10.0):
    """DSR's loss at points of these own shares, (N,) in (0, 1), and how fast descent changes them.

    A point of own share s is z = (sqrt(s), sqrt(1 - s)), its d_k (a, 1). Returns three (N,): the
    loss; ds/dt for dz/dt = -gradient along the circle, with stopgrad, and without it, where the
    gradient also flows through the target. Without it s rises only above 1 / (1 + a).
    """
    z = torch.stack([share.sqrt(), (1 - share).sqrt()], 1).requires_grad_()
    d_k = z.new_tensor([a, 1.0])
    loss = (z - F.normalize(z * d_k, dim=1)).square().sum(1)
    slopes = []
    for total in (dsr_loss(z, d_k) * len(z), loss.sum()):
        (gradient,) = torch.autograd.grad(total, z)
        along = gradient - (gradient * z).sum(1, keepdim=True) * z  # the rest changes ||z|| only
        slopes.append(-2 * (z * along)[:, 0].detach())  # ds = 2 z_own dz_own
    return loss.detach(), *slopes


def stopgrad(plt, a=10.0):
    """Why stopgrad: the loss over the own share, and what a step of descent does to that share."""
    peak, share = 1 / (1 + a), torch.linspace(1e-4, 0.4, 200, dtype=torch.float64)
    loss, stopped, through = dsr_slopes(share, a)
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(5, 5.2), sharex=True, layout="constrained")
    top.plot(100 * share, loss, color=COLOURS[6])
    top.set_title("A: DSR loss ‖z − target‖²", loc="left")
    top.set(ylim=(0, 1), yticks=[0, 0.5, 1])
    top.text(100 * peak, 0.9, f"peak at 1/(1 + a) = {100 * peak:.0f} %", fontsize=12)
    ends = zip((stopped, through), COLOURS, (0.07, 0.14), ("with stopgrad", "without"))
    for values, colour, below, label in ends:
        bottom.plot(100 * share, values, color=colour)
        bottom.text(40, values[-1] - below, label, color=colour, ha="right", va="top", fontsize=12)
    bottom.axhline(0, color="black", linewidth=1)
    bottom.set_title("B: change of the own share in a small step", loc="left")
    bottom.set(xlabel="own share of z, %", xlim=(0, 40), xticks=range(0, 41, 10), yticks=[0])
    bottom.text(100 * peak + 1, -0.75, "← without: away from\n    its own dimensions", fontsize=12)
    for axis in (top, bottom):
        axis.axvspan(0, 100 * peak, color=COLOURS[1], alpha=0.14, linewidth=0)
    return figure
