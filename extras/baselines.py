"""The other methods of the paper's table, each as one function.

    FedDecorr   a regulariser on h                          feddecorr_loss
    FedX        distillation within and across networks     fedx_loss, nt_xent, fedx_relation
    FedU2       a regulariser on z, a rule of averaging     fedu2_uniform, fedu2_average
    L-DAWA      a rule of averaging                         ldawa_average

FedX has an objective of its own; the others stand on align + beta uniform, as SSD does. Data,
split, network and evaluation are SSD's, flags and run folder train.py's:

    python extras/baselines.py --method fedx --clients 10 --alpha 0.1
    python extras/baselines.py --method fedalignuniform --client 3   # client 3 alone: lower bound
    python train.py --method fedalignuniform --clients 1             # centralised: upper bound
"""

import functools
import math
import sys
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

sys.path.insert(0, str(Path(__file__).parent.parent))

import train  # noqa: E402
from data import augment, draw_params, two_views  # noqa: E402
from federated import average_states, choose_clients, federated_round  # noqa: E402
from losses import ssd_loss  # noqa: E402

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


def fedu2_average(states, weights, global_state, r, clients):
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


def ldawa_average(states, weights, global_state, r, clients):
    """L-DAWA (Rehman et al., ICCV 2023): every tensor weighted by its angle to the global one.

        w <- 1/K sum_k delta_k w_k,   delta_k = min(1, cos(w_k, w))

    for each tensor of the state with at least one dimension, biases and running statistics
    included; scalars are averaged. The deltas do not add up to K: weights shrink.
    A tensor of zeros (an untrained bias) has no angle: delta is 1 there. The first two rounds are
    FedAvg by samples, as in the public code: from random weights the angles are so wide that the
    weights, and with them the representation, shrink to nothing.
    """
    if r < 2 or not states:
        return average_states(states, weights)
    new_state = {}
    for name, value in global_state.items():
        w = value.double()
        total = torch.zeros_like(w)
        for state in states:
            w_k = state[name].double()
            norms = w.norm() * w_k.norm()
            delta = 1.0
            if w.ndim and norms:
                delta = min(1.0, ((w * w_k).sum() / norms).item())
            total += delta * w_k
        mean = total / len(states)
        if not value.is_floating_point():
            mean = mean.round()
        new_state[name] = mean.to(value.dtype)
    return new_state


# ---------------------------------------------------------------------------- local losses


def outputs(model, x, amp):
    """h, u (B, D) of a batch of views, float32."""
    with torch.autocast(x.device.type, torch.bfloat16, enabled=amp):
        h, u = model(x)
    return h.float(), u.float()


def align_and_uniform(h1, u1, h2, u2, beta):
    """FedAlignUniform's objective: total (), dict of its two terms."""
    without_dsr = torch.ones_like(u1[0])
    total, terms = ssd_loss(h1, u1, h2, u2, without_dsr, beta, gamma=0.0, delta=0.0)
    return total, {"align": terms["align"], "uniform": terms["uniform"]}


def make_feddecorr_loss(config, images, split):
    """align + beta uniform + 0.1 FedDecorr of both views' h; on CIFAR-100 0.05."""
    weight = 0.1
    if config["dataset"] == "cifar100":
        weight = 0.05

    def loss(model, batch, k, generator, global_state):
        x1, x2 = two_views(batch, generator)
        h1, u1 = outputs(model, x1, config["amp"])
        h2, u2 = outputs(model, x2, config["amp"])
        total, terms = align_and_uniform(h1, u1, h2, u2, config["beta"])
        term = (feddecorr_loss(h1) + feddecorr_loss(h2)) / 2
        return total + weight * term, {**terms, "feddecorr": term.detach()}

    return loss


def make_fedu2_loss(config, images, split):
    """align + beta uniform + 0.01 FUR of each view's z."""

    def loss(model, batch, k, generator, global_state):
        x1, x2 = two_views(batch, generator)
        h1, u1 = outputs(model, x1, config["amp"])
        h2, u2 = outputs(model, x2, config["amp"])
        total, terms = align_and_uniform(h1, u1, h2, u2, config["beta"])
        term = fedu2_uniform(F.normalize(u1, dim=1), generator)
        term = term + fedu2_uniform(F.normalize(u2, dim=1), generator)
        return total + 0.01 * term, {**terms, "fedu2": term.detach()}

    return loss


def make_fedx_loss(config, images, split):
    """FedX's objective; the model has a predictor, the global network of the round is frozen."""
    amp = config["amp"]

    def predict(model, u):
        with torch.autocast(u.device.type, torch.bfloat16, enabled=amp):
            return model.predictor(u).float()

    @torch.no_grad()
    def frozen_u(model, global_state, x):
        model.eval()
        _, u = outputs(functools.partial(functional_call, model, global_state), x, amp)
        model.train()
        return u

    def loss(model, batch, k, generator, global_state):
        x1, x2 = two_views(batch, generator)
        _, u1 = outputs(model, x1, amp)
        _, u2 = outputs(model, x2, amp)
        p1, p2 = predict(model, u1), predict(model, u2)
        index = torch.randint(len(split[k]), (len(batch),), generator=generator)
        others = images[torch.as_tensor(split[k])[index].to(images.device)]
        params = draw_params(len(batch), *batch.shape[2:], generator)
        x = augment(others, {name: value.to(images.device) for name, value in params.items()})
        _, r = outputs(model, x, amp)
        global_u2 = frozen_u(model, global_state, x2)
        global_r = frozen_u(model, global_state, x)
        return fedx_loss(u1, u2, p1, p2, global_u2, r, global_r)

    return loss


# ---------------------------------------------------------------------------- script


class Method(NamedTuple):
    """What a method has in place of SSD's parts."""

    make_loss: object = None  # (config, images, split) -> the local loss; None: train.py's
    average: object = average_states  # the rule of averaging
    weights: tuple = ("beta", "gamma", "delta")  # the flags among these that it knows


BASELINES = {
    "feddecorr": Method(make_feddecorr_loss, weights=("beta",)),
    "fedx": Method(make_fedx_loss, weights=()),
    "fedu2": Method(make_fedu2_loss, fedu2_average, weights=("beta",)),
    "ldawa": Method(average=ldawa_average),
}
METHODS = {**train.METHODS, **{name: {"gamma": 0.0, "delta": 0.0} for name in BASELINES}}


def build_parser():
    """train.py's flags, and one more."""
    parser = train.build_parser(METHODS)
    parser.add_argument("--client", type=train.number(int, 0), help="train this client alone")
    return parser


def check_flags(config, num_clients):
    """ValueError for flags that the method does not know."""
    method = BASELINES.get(config["method"], Method())
    for name, default in {"beta": 1.0, "gamma": 0.0, "delta": 0.0}.items():
        if name not in method.weights and config[name] != default:
            raise ValueError(f"--{name} {config[name]:g}: {config['method']} has no such term")
    if config["client"] is not None and config["client"] >= num_clients:
        raise ValueError(f"--client {config['client']}: the last one is {num_clients - 1}")
    if config["compile"] and method.make_loss:
        raise ValueError(f"--compile: {config['method']} cannot be compiled, leave it out")


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


def make_loss(config, images, split):
    """The method's local loss, for federated.py."""
    method = BASELINES.get(config["method"], Method())
    if method.make_loss:
        return method.make_loss(config, images, split)
    return train.make_loss(config, len(split), images.device)


def make_round(config):
    """`federated_round` with the method's rule of averaging; with --client of that client alone."""
    method = BASELINES.get(config["method"], Method())

    def choose(num_clients, participation, generator, r):
        if config["client"] is not None:
            return [config["client"]]
        return choose_clients(num_clients, participation, generator, r)

    return functools.partial(federated_round, choose=choose, average=method.average)


def main(argv=None):
    """train.py's main, with this file's network, loss and round."""
    parser = build_parser()
    try:
        config, checkpoint = train.read_config(parser, argv, METHODS)
        device, data, split = train.prepare(config, checkpoint)
        check_flags(config, len(split))
        model = train.place(make_model(config), checkpoint, device)
        loss = make_loss(config, data.train_x, split)
        train.open_run(config, checkpoint, split, model)
    except (ValueError, OSError) as error:
        parser.error(" ".join(str(error).split()))
    train.run_rounds(config, checkpoint, data, split, model, loss, make_round(config))


if __name__ == "__main__":
    main()
