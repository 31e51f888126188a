"""The other methods of the paper's table, and SSD with one thing changed, each as one function.

    FedDecorr   a regulariser on h                               feddecorr_loss
    FedX        distillation within and across networks          fedx_loss, nt_xent, fedx_relation
    FedU2       a regulariser on z and a rule of averaging       fedu2_uniform, fedu2_average
    L-DAWA      a rule of averaging                              ldawa_average
    FedProx     a term that holds on to the global weights       fedprox_term
    CHOICES     what paper and authors' code leave open in SSD   authors_dsr, objective
    ssd-common  client 0's d_k for everyone: DSR that cannot part clients

The first five, but for FedX with its own objective, stand on align + beta uniform as SSD does.
Data, split, network and evaluation are SSD's, flags and run folder train.py's:

    python extras/baselines.py --method fedx --clients 10 --alpha 0.1
    python extras/baselines.py --method fedalignuniform --client 3   # client 3 alone: lower bound
    python train.py --method fedalignuniform --clients 1             # centralised: upper bound
"""

import functools
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

sys.path.insert(0, str(Path(__file__).parent.parent))

import train  # noqa: E402
from data import augment, draw_params, two_views  # noqa: E402
from federated import average_states  # noqa: E402
from losses import distill_loss, dsr_loss, ssd_loss  # noqa: E402
from model import load_checkpoint  # noqa: E402

NAMES = ("feddecorr", "fedx", "fedu2", "ldawa", "fedprox")
LOSSES = {"feddecorr", "fedx", "fedu2", "fedprox"}  # those with a loss of their own

# ---------------------------------------------------------------------------- FedDecorr


def feddecorr_loss(h):
    """FedDecorr (Shi et al., ICLR 2023): 1/B mean over i != j of C_ij^2, C = s^T s -> (), >= 0.

    h (B, D), D >= 2; s its columns, centred and divided by their unbiased standard deviation (1e-8
    is added to the variance). 0 for B = 1. Weight 0.1, with --dataset cifar100 0.05.
    Paper / public code: ||K||_F^2 / D^2 with K the correlation matrix / as here, which is
    (B - 1)^2 / B times the mean squared correlation of two columns, so it grows with the batch.
    FedDecorr is supervised; here it acts on h of both views, averaged.
    """
    if h.ndim != 2 or h.shape[1] < 2:
        raise ValueError(f"feddecorr_loss needs h (B, D) with D >= 2, got {tuple(h.shape)}")
    if len(h) == 1:
        return 0 * h.sum()
    s = (h - h.mean(0)) / (h.var(0) + 1e-8).sqrt()
    dim, c = h.shape[1], s.T @ s
    return (c.square().sum() - c.diagonal().square().sum()) / (dim * (dim - 1)) / len(h)


# ---------------------------------------------------------------------------- FedX


def nt_xent(x1, x2, temperature=0.1):
    """InfoNCE of SimCLR (Chen et al. 2020) over both directions, the mean of -log p -> (), >= 0.

        p_i = exp(cos(x_i, x_j) / T) / sum over k != i of exp(cos(x_i, x_k) / T)

    x1, x2 (B, D): row i of one and row i of the other are a pair (i, j); k runs over all 2B rows.
    """
    x = F.normalize(torch.cat([x1, x2]), dim=1)
    logits = (x @ x.T / temperature).fill_diagonal_(-math.inf)
    pair = torch.arange(len(x), device=x.device).roll(len(x1))
    return F.cross_entropy(logits, pair)


def fedx_relation(a, b, r, temperature=0.1):
    """FedX's relational term: two views should be alike to other images in the same way.

        R = 1/2 [ KL(q || p_a) + KL(q || p_b) ],   p_a = softmax(cos(a, r) / T),  p_b likewise,
        q = 1/2 (p_a + p_b)

    a, b (B, D) two views' embeddings, r (M, D) of other images -> (), >= 0; mean over rows.
    Paper / public code: a Jensen-Shannon divergence, KL(p || q) / KL(q || p), q not detached, as
    here.
    """
    s = [F.normalize(v, dim=1) @ F.normalize(r, dim=1).T for v in (a, b)]
    q = sum(F.softmax(v / temperature, dim=1) for v in s) / 2
    return (
        sum(F.kl_div(F.log_softmax(v / temperature, dim=1), q, reduction="batchmean") for v in s)
        / 2
    )


def fedx_loss(z1, z2, p1, p2, global_z2, r, global_r, temperature=0.1):
    """FedX (Han et al., ECCV 2022), local and global distillation: total (), dict of its terms.

        L = NT(z1, z2) + NT(p1, global_z2) + R(z1, z2; r) + R(p1, p2; global_r)

    z (B, D) projector output, p = predictor(z), global_z2 the round's global network's, frozen; r
    and global_r (M, D): z of another random batch of the client, by either network. One temperature
    for all. Paper / public code: they disagree on lr and batch size; here the flags', as in SSD's
    table.
    """
    terms = {
        "contrast": nt_xent(z1, z2, temperature),
        "global_contrast": nt_xent(p1, global_z2, temperature),
        "relation": fedx_relation(z1, z2, r, temperature),
        "global_relation": fedx_relation(p1, p2, global_r, temperature),
    }
    return sum(terms.values()), {name: term.detach() for name, term in terms.items()}


# ---------------------------------------------------------------------------- FedU2


def sliced_distance(z, y, centres, directions):
    """Squared sliced Wasserstein distance of two sets on the sphere, in tangent spaces -> (), >= 0.

    z, y (N, D) unit rows; centres c, directions v (L, D) unit rows. A slice maps a point x to the
    tangent space at c, log_c(x) = a / sin(a) (x - cos(a) c), a the angle of x and c, then to its
    coordinate along the part of v that is tangent; both sets are sorted, the mean is over all.
    """
    v = F.normalize(directions - (directions * centres).sum(1, keepdim=True) * centres, dim=1)

    def coordinates(x):
        a = (x @ centres.T).clamp(-1 + 1e-6, 1 - 1e-6).acos()
        return (a / a.sin() * (x @ v.T)).sort(0).values

    return (coordinates(z) - coordinates(y)).square().mean()


def fedu2_uniform(z, generator, slices=128):
    """FUR, FedU2's flexible uniform regulariser (Liao et al., CVPR 2024) -> (), >= 0.

    The sliced distance from z (B, D), unit rows, to B random points of the sphere, over `slices`
    random tangent spaces and directions, all drawn from `generator` (on the CPU). Weight 0.01 a
    view.
    Paper / public code: unbalanced optimal transport / a sliced Wasserstein distance, as here.
    """
    draws = torch.randn(len(z) + 2 * slices, z.shape[1], generator=generator).to(z)
    y, centres, directions = F.normalize(draws, dim=1).split([len(z), slices, slices])
    return sliced_distance(z, y, centres, directions)


def min_norm_weights(updates, steps=10_000):
    """The point of least norm in the convex hull of the updates: weights a (K,) float64.

        a = argmin || sum_k a_k g_k ||,   a_k >= 0,  sum_k a_k = 1

    updates g (K, P). Each step moves weight between the two updates that gain most, as far as pays
    (pairwise Frank-Wolfe), until no pair gains. Paper / public code: ADMM / Frank-Wolfe.
    """
    gram = updates.double() @ updates.double().T
    a = gram.new_full((len(gram),), 1 / len(gram))
    for _ in range(steps):
        slope = gram @ a
        low, high = slope.argmin(), slope.where(a > 0, -math.inf).argmax()
        gain = slope[high] - slope[low]
        if gain <= 1e-12 * gram.diagonal().max():
            break
        curvature = gram[low, low] + gram[high, high] - 2 * gram[low, high]
        step = min(a[high], gain / curvature.clamp(min=1e-300))
        a[low], a[high] = a[low] + step, a[high] - step
    return a


def fedu2_average(states, weights, global_state, *_):
    """EUA, FedU2's efficient unified aggregator: a step that lowers every client's loss alike.

        g_k = (w - w_k) / ||w - w_k||,   w <- w - step sum_k a_k g_k,   a = min_norm_weights(g)

    over all trained tensors as one vector; BatchNorm's statistics are averaged by samples. A client
    that has not moved is left out. step: the mean of ||w - w_k||, so that equal clients give
    FedAvg. Paper / public code: ADMM / a min-norm solver, a step of 0.1 or 8 depending on the file.
    """
    means = average_states(states, weights)
    trained = [
        name
        for name in means
        if not name.endswith(("running_mean", "running_var", "num_batches_tracked"))
    ]

    def flat(state):
        return torch.cat([state[name].flatten().double() for name in trained])

    start = flat(global_state)
    updates = torch.stack([start - flat(state) for state in states])
    norms = updates.norm(dim=1)
    moved = norms > 0
    if moved.any():
        g = updates[moved] / norms[moved, None]
        start = start - norms[moved].mean() * (min_norm_weights(g) @ g)
    parts = start.split([means[name].numel() for name in trained])
    new = {name: part.view_as(means[name]).to(means[name]) for name, part in zip(trained, parts)}
    return {**means, **new}


# ---------------------------------------------------------------------------- L-DAWA


def ldawa_average(states, weights, global_state, r, *_):
    """L-DAWA (Rehman et al., ICCV 2023): every tensor weighted by its angle to the global one.

        w <- 1/K sum_k delta_k w_k,   delta_k = min(1, cos(w_k, w))

    for each tensor of the state with at least one dimension, biases and running statistics
    included; scalars are averaged. The deltas do not add up to K: weights shrink.
    A tensor of zeros (an untrained bias) has no angle: delta is 1 there. The first two rounds are
    FedAvg by samples, as in the public code: from random weights the angles are so wide that the
    weights, and with them the representation, shrink to nothing.
    """
    if r < 2:
        return average_states(states, weights)

    def average(name):
        tensors, w = [state[name].double() for state in states], global_state[name].double()
        if w.ndim:
            norms = [w.norm() * v.norm() for v in tensors]
            deltas = [
                min(1.0, ((w * v).sum() / n).item()) if n else 1.0 for v, n in zip(tensors, norms)
            ]
            tensors = [delta * v for delta, v in zip(deltas, tensors)]
        mean = torch.stack(tensors).mean(0)
        like = global_state[name]
        return (mean if like.is_floating_point() else mean.round()).to(like)

    return {name: average(name) for name in global_state}


# ---------------------------------------------------------------------------- FedProx


def fedprox_term(model, global_state):
    """FedProx (Li et al., MLSys 2020): 1/2 sum of (w - w_global)^2 over the parameters -> ().

    Weight mu = 0.01.
    """
    return sum((w - global_state[name]).square().sum() for name, w in model.named_parameters()) / 2


# ---------------------------------------------------------------------------- open choices of SSD


def random_axes(dim):
    """An orthonormal basis (D, D), float32, always the same one for its size."""
    draws = torch.randn(dim, dim, generator=torch.Generator().manual_seed(0))
    return torch.linalg.qr(draws).Q


def authors_dsr(z, d_k, q):
    """DSR as the authors' code has it: ||z - stopgrad(target)||_F / B, z unit rows (B, D) -> ().

    target = q (q^T z * d_k), back on the sphere; q (D, D): `random_axes`. The norm is of the whole
    batch and not squared: the gradient for z is (z - target) / (B ||z - target||_F).
    """
    target = F.normalize((z.detach() @ q * d_k) @ q.T, dim=1)
    return (z - target).norm() / len(z)


def objective(h1, u1, h2, u2, d_k, beta, gamma, delta, hard, dsr, distill):
    """`losses.ssd_loss` with other functions for its last two terms."""
    total, terms = ssd_loss(h1, u1, h2, u2, d_k, beta, 0.0, 0.0)
    h, u = torch.stack([h1, h2]).float(), torch.stack([u1, u2]).float()
    dsr_term = sum(dsr(F.normalize(view, dim=1), d_k) for view in u) / 2
    distill_term = sum(map(distill, h, u)) / 2
    terms |= {"dsr": dsr_term.detach(), "distill": distill_term.detach()}
    return total + gamma * dsr_term + delta * distill_term, terms


DSR = {"gamma": 1.0, "delta": 0.0}
SSD = {"gamma": 1.0, "delta": 0.1}
CHOICES = {  # method: weights, what stands for dsr_loss, for distill_loss
    "dsr-literal": (DSR, functools.partial(dsr_loss, on_sphere=False), distill_loss),
    "dsr-authors": (DSR, authors_dsr, distill_loss),
    "ssd-reverse": (SSD, dsr_loss, lambda h, u: distill_loss(u, h)),
    "ssd-half": (SSD, dsr_loss, functools.partial(distill_loss, temperature=0.5)),
    "ssd-into-h": (SSD, dsr_loss, lambda h, u: distill_loss(h, u.detach())),
    "ssd-authors": (SSD, authors_dsr, lambda h, u: distill_loss(u, h, temperature=0.5)),
    "ssd-cosine": (SSD, dsr_loss, distill_loss),  # lr falls to 0 as half a cosine over the rounds
}
METHODS = {
    **train.METHODS,
    **{name: {"gamma": 0.0, "delta": 0.0} for name in NAMES},
    **{name: choice[0] for name, choice in CHOICES.items()},
    "ssd-common": SSD,
}

# ---------------------------------------------------------------------------- script


def build_parser():
    """train.py's flags, and one more."""
    parser = train.build_parser(METHODS)
    parser.prog = "extras/baselines.py"
    parser.add_argument("--client", type=train.number(int, 0), help="train this client alone")
    return parser


def make_model(config):
    """train.py's network; for FedX with a predictor of the projector's shape."""
    model = train.make_model(config)
    if config["method"] == "fedx":
        dim = 8 * config["width"]
        model.predictor = nn.Sequential(
            nn.Linear(dim, 4 * dim),
            nn.BatchNorm1d(4 * dim),
            nn.ReLU(inplace=True),
            nn.Linear(4 * dim, dim),
        )
    return model


def make_options(config, images, split):
    """What differs from SSD, as keyword arguments of `federated.train_federated`."""
    name, method = config["method"], {}
    if name in LOSSES:
        for weight in ("gamma", "delta", *(["beta"] if name == "fedx" else [])):
            if config[weight] != (weight == "beta"):
                raise ValueError(
                    f"--{weight} {config[weight]:g}: --method {name} has no such term, leave it out"
                )
    if name == "ldawa":
        method["average"] = ldawa_average
    if name == "fedu2":
        method["average"] = fedu2_average
    if name in LOSSES:
        if config["compile"]:
            raise ValueError(f"--compile does not work with --method {name}: leave it out")
        method["loss"] = make_loss(config, images, split)
    if name in CHOICES:
        _, dsr, distill = CHOICES[name]
        if dsr is authors_dsr:
            dsr = functools.partial(dsr, q=random_axes(8 * config["width"]).to(images.device))
        changed = functools.partial(objective, dsr=dsr, distill=distill)
        method["loss"] = train.make_loss(config, len(split), images.device, changed)
    if name == "ssd-common":  # client 0's d_k for everyone
        ssd = train.make_loss(config, len(split), images.device)
        method["loss"] = lambda model, batch, k, *rest: ssd(model, batch, 0, *rest)
    if name == "ssd-cosine":
        done = load_checkpoint(config["resume"])[0]["config"] if config["resume"] else config
        if done["rounds"] != config["rounds"]:
            raise ValueError(
                f"--rounds {config['rounds']}: the schedule is that of "
                f"{done['rounds']} rounds, start a run of its own"
            )
        method["lr"] = lambda r: config["lr"] * (1 + math.cos(math.pi * r / config["rounds"])) / 2
    if config["client"] is not None:
        if config["client"] >= len(split):
            raise ValueError(f"--client {config['client']}: the last one is {len(split) - 1}")
        method["choose"] = lambda *_: [config["client"]]
    return method


def make_loss(config, images, split):
    """The local loss of the methods that have one of their own, for federated.py."""
    name, d_ones = config["method"], torch.ones(8 * config["width"], device=images.device)

    def forward(model, x):
        with torch.autocast(x.device.type, torch.bfloat16, enabled=config["amp"]):
            h, u = model(x)
        return h.float(), u.float()

    def predict(model, u):
        with torch.autocast(u.device.type, torch.bfloat16, enabled=config["amp"]):
            return model.predictor(u).float()

    @torch.no_grad()
    def frozen_u(model, global_state, x):
        model.eval()
        _, u = forward(functools.partial(functional_call, model, global_state), x)
        model.train()
        return u

    def loss(model, batch, k, generator, global_state):
        x1, x2 = two_views(batch, generator)
        (h1, u1), (h2, u2) = forward(model, x1), forward(model, x2)
        if name == "fedx":
            p1, p2 = predict(model, u1), predict(model, u2)
            index = torch.randint(len(split[k]), (len(batch),), generator=generator)
            others = images[torch.as_tensor(split[k])[index].to(images.device)]
            params = draw_params(len(batch), *batch.shape[2:], generator)
            x = augment(others, {name: v.to(images.device) for name, v in params.items()})
            _, r = forward(model, x)
            global_u2, global_r = (frozen_u(model, global_state, v) for v in (x2, x))
            return fedx_loss(u1, u2, p1, p2, global_u2, r, global_r)
        total, terms = ssd_loss(h1, u1, h2, u2, d_ones, config["beta"], gamma=0.0, delta=0.0)
        if name == "feddecorr":
            weight = 0.05 if config["dataset"] == "cifar100" else 0.1
            term = (feddecorr_loss(h1) + feddecorr_loss(h2)) / 2
        elif name == "fedu2":
            weight = 0.01
            term = sum(fedu2_uniform(F.normalize(u, dim=1), generator) for u in (u1, u2))
        else:
            weight, term = 0.01, fedprox_term(model, global_state)
        terms = {"align": terms["align"], "uniform": terms["uniform"], name: term.detach()}
        return total + weight * term, terms

    return loss


def main(argv=None):
    """train.py's main with these methods."""
    train.main(argv, build_parser(), METHODS, make_model, make_options)


if __name__ == "__main__":
    main()
