"""extras/baselines.py: loops, values by hand; every method trains."""

import copy
import itertools
import math
from pathlib import Path

import baselines
import pytest
import torch
import torch.nn.functional as F
from baselines import (
    feddecorr_loss,
    fedu2_average,
    fedu2_uniform,
    fedx_loss,
    fedx_relation,
    ldawa_average,
    min_norm_weights,
    nt_xent,
    sliced_distance,
)

import train
from data import augment, draw_params, two_views
from federated import average_states, copy_state, keyed_generator
from losses import align_loss, uniform_loss
from model import load_checkpoint


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unit(*shape, seed=0):
    return F.normalize(randn(*shape, seed=seed), dim=1)


def equal(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def cos(a, b):
    return float(a @ b / a.norm() / b.norm())


# ---------------------------------------------------------------------------- FedDecorr


def test_feddecorr_is_the_mean_squared_product_of_standardised_columns():
    h, total = randn(7, 4) @ randn(4, 4, seed=1), 0.0
    s = [(h[:, i] - h[:, i].mean()) / h[:, i].std() for i in range(4)]
    for i, j in itertools.permutations(range(4), 2):
        total += float(s[i] @ s[j]) ** 2 / 12
    assert feddecorr_loss(h).item() == pytest.approx(total / 7, rel=1e-6)


def test_feddecorr_at_the_edges():
    same = torch.tensor([[0.0, 0.0], [2.0, 2.0]], dtype=torch.float64)  # correlation 1, B = 2
    assert feddecorr_loss(same).item() == pytest.approx(0.5, rel=1e-6)
    one = torch.ones(1, 4, requires_grad=True)
    feddecorr_loss(one).backward()
    assert feddecorr_loss(one).item() == 0 and one.grad.abs().sum() == 0
    with pytest.raises(ValueError, match=r"\(3, 1\)"):
        feddecorr_loss(torch.ones(3, 1))


# ---------------------------------------------------------------------------- FedX


def test_nt_xent_equals_a_loop():
    x1, x2, total = randn(3, 5), randn(3, 5, seed=1), 0.0
    rows = [*x1, *x2]
    for i, row in enumerate(rows):
        others = [math.exp(cos(row, rows[j]) / 0.3) for j in range(6) if j != i]
        total -= math.log(math.exp(cos(row, rows[(i + 3) % 6]) / 0.3) / sum(others)) / 6
    assert nt_xent(x1, x2, 0.3).item() == pytest.approx(total)


def test_fedx_relation_equals_a_loop_and_is_zero_for_views_alike():
    a, b, r, t = randn(3, 5), randn(3, 5, seed=1), randn(4, 5, seed=2), 0.3

    def softmax(v):
        values = [math.exp(cos(v, row) / t) for row in r]
        return [value / sum(values) for value in values]

    total = 0.0
    for va, vb in zip(a, b):
        q = [(x + y) / 2 for x, y in zip(softmax(va), softmax(vb))]
        for v in (va, vb):
            total += sum(x * math.log(x / y) for x, y in zip(q, softmax(v))) / 2 / 3
    assert fedx_relation(a, b, r, t).item() == pytest.approx(total)
    assert fedx_relation(a, 2 * a, r).item() == pytest.approx(0, abs=1e-12)
    assert torch.autograd.gradcheck(
        lambda a, b: fedx_relation(a, b, r), (a.requires_grad_(), b.requires_grad_())
    )  # q is not detached: the gradient is that of the whole formula


def test_fedx_is_the_sum_of_its_four_terms():
    z1, z2, p1, p2, g, r, gr = (randn(4, 6, seed=seed) for seed in range(7))
    total, terms = fedx_loss(z1, z2, p1, p2, g, r, gr)
    expected = nt_xent(z1, z2) + nt_xent(p1, g) + fedx_relation(z1, z2, r)
    assert total.item() == pytest.approx((expected + fedx_relation(p1, p2, gr)).item())
    assert total.item() == pytest.approx(sum(terms.values()).item()) and len(terms) == 4


# ---------------------------------------------------------------------------- FedU2


def test_sliced_distance_equals_the_map_to_tangent_spaces_done_slowly():
    z, y, centres, directions = unit(5, 4), unit(5, 4, seed=1), unit(3, 4, seed=2), unit(3, 4)
    total = 0.0
    for c, v in zip(centres, directions):
        v = v - (v @ c) * c
        v = v / v.norm()
        lines = []
        for points in (z, y):
            angles = [math.acos(float(x @ c)) for x in points]
            mapped = [a / math.sin(a) * (x - math.cos(a) * c) for a, x in zip(angles, points)]
            lines.append(sorted(float(x @ v) for x in mapped))
        total += sum((one - two) ** 2 for one, two in zip(*lines)) / 15
    assert sliced_distance(z, y, centres, directions).item() == pytest.approx(total)
    shuffled = z[torch.tensor([3, 1, 4, 0, 2])]
    assert sliced_distance(z, shuffled, centres, directions).item() == pytest.approx(0, abs=1e-12)


def test_fur_grows_as_the_points_gather():
    noise, centre = randn(128, 16), randn(1, 16, seed=1)
    values = []
    for pull in (0, 0.5, 1, 2, 8):
        points = F.normalize(noise + pull * centre, dim=1)
        values.append(fedu2_uniform(points, keyed_generator(0)).item())
    assert values == sorted(values) and values[-1] > 5 * values[0]


@pytest.mark.parametrize(
    "updates, expected",
    [
        ([[1, 0, 0], [0, 1, 0], [0, 0, 1]], [1 / 3, 1 / 3, 1 / 3]),
        ([[1, 0, 0], [0, 2, 0], [0, 0, 2]], [2 / 3, 1 / 6, 1 / 6]),  # a_k ~ 1 / |g_k|^2
        ([[1, 1], [3, 1], [1, 3]], [1, 0, 0]),  # the nearest is a corner
        ([[1, 1], [1, -1], [5, 0]], [1 / 2, 1 / 2, 0]),  # an edge
        ([[1, 0], [0, 2]], [4 / 5, 1 / 5]),
        ([[2, 0]], [1]),
    ],
)
def test_least_norm_of_three_updates_by_hand(updates, expected):
    found = min_norm_weights(torch.tensor(updates, dtype=torch.float64))
    assert found.tolist() == pytest.approx(expected, abs=1e-6)


def test_least_norm_of_many_updates_meets_its_conditions():
    """At the optimum no update has a smaller product with the point than the point itself."""
    g = randn(30, 200) + 0.3 * randn(1, 200, seed=1)
    a = min_norm_weights(g)
    point = a @ g
    assert a.min() >= 0 and a.sum().item() == pytest.approx(1)
    assert (g @ point).min().item() == pytest.approx((point @ point).item(), rel=1e-6)
    equal = min_norm_weights(randn(1, 8).expand(5, 8))
    assert equal.tolist() == [0.2] * 5


def test_least_norm_of_nearly_equal_updates_stays_in_the_simplex():
    for seed in range(5):
        apart = randn(3, 50, seed=seed) + 1
        near = apart[0] * (1 + 1e-9 * randn(3, 50, seed=seed + 100))
        updates = torch.cat([near, apart[1:]])
        a = min_norm_weights(updates)
        assert a.min() >= 0 and a.sum().item() == pytest.approx(1)
        merged = (min_norm_weights(apart) @ apart).norm()
        assert (a @ updates).norm().item() == pytest.approx(merged.item(), rel=1e-6)


def state(w, mean=0.0, count=0):
    return {
        "w": torch.tensor(w),
        "running_mean": torch.tensor([mean]),
        "num_batches_tracked": torch.tensor(count),
    }


def test_eua_by_hand():
    start = state([0.0, 0.0])
    clients = [state([3.0, 0.0], 1.0, 4), state([0.0, 1.0], 5.0, 8)]
    new = fedu2_average(clients, [3, 1], start, 0, [])  # unit updates: half each, mean norm 2
    assert new["w"].tolist() == pytest.approx([1, 1])
    assert new["running_mean"].tolist() == [2.0] and new["num_batches_tracked"].item() == 5
    assert new["num_batches_tracked"].dtype == torch.int64
    still = [state([0.0, 0.0]), state([3.0, 0.0])]
    assert fedu2_average(still, [1, 1], start, 0, [])["w"].tolist() == pytest.approx([3, 0])
    assert fedu2_average(still[:1], [1], start, 0, [])["w"].tolist() == [0, 0]


# ---------------------------------------------------------------------------- L-DAWA


def test_ldawa_by_hand():
    start = {"w": torch.tensor([1.0, 0.0]), "s": torch.tensor(1.0), "n": torch.tensor(2)}
    clients = [
        {"w": torch.tensor([2.0, 0.0]), "s": torch.tensor(2.0), "n": torch.tensor(3)},  # cos 1
        {"w": torch.tensor([0.0, 4.0]), "s": torch.tensor(4.0), "n": torch.tensor(3)},  # cos 0
        {"w": torch.tensor([3.0, 4.0]), "s": torch.tensor(6.0), "n": torch.tensor(6)},  # cos 0.6
    ]
    new = ldawa_average(clients, [5, 1, 2], start, 2, [0, 1, 2])
    assert new["w"].tolist() == pytest.approx([3.8 / 3, 2.4 / 3])
    assert new["s"].item() == 4 and new["n"].item() == 4 and new["n"].dtype == torch.int64
    first = average_states(clients, [5, 1, 2])  # FedAvg by samples, twice
    for r in (0, 1):
        early = ldawa_average(clients, [5, 1, 2], start, r, [0, 1, 2])
        assert all(torch.equal(early[name], value) for name, value in first.items())


def test_ldawa_of_weights_at_zero_is_the_plain_mean():
    start = {"b": torch.zeros(3)}  # no angle to it
    assert (
        ldawa_average([{"b": torch.ones(3)}, start], [1, 3], start, 2, [])["b"].tolist()
        == [0.5] * 3
    )


# ---------------------------------------------------------------------------- local losses


@pytest.mark.parametrize(
    "name, dataset",
    [("feddecorr", "patterns"), ("feddecorr", "cifar100")]
    + [(name, "patterns") for name in ("fedx", "fedu2")],
)
def test_the_local_loss_by_hand(name, dataset, small, patterns):
    """Client 1's, away from the global weights: value, gradient, what BatchNorm has seen."""
    images, split = patterns.train_x[:60], [range(0, 60, 2), range(1, 60, 2)]
    beta = 1.0 if name == "fedx" else 0.5
    flags = [*small, "--method", name, "--dataset", dataset, "--beta", str(beta)]
    config, _ = train.read_config(baselines.build_parser(), flags, baselines.METHODS)
    local_loss = baselines.make_loss(config, images, split)
    model, other_net = (baselines.make_model({**config, "seed": seed}) for seed in (0, 1))
    by_hand, batch = copy.deepcopy(model).train(), images[1:33:2]
    kept = copy_state(other_net)
    loss, _ = local_loss(model, batch, 1, keyed_generator(0), other_net.state_dict())
    assert equal(other_net.state_dict(), kept)  # the global network stays, BatchNorm's too

    draws = keyed_generator(0)
    x1, x2 = two_views(batch, draws)
    (h1, u1), (h2, u2) = by_hand(x1), by_hand(x2)
    if name == "fedx":
        others = images[1::2][torch.randint(30, (16,), generator=draws)]
        x = augment(others, draw_params(16, 32, 32, draws))
        with torch.no_grad():
            global_u2, global_r = (other_net.eval()(view)[1] for view in (x2, x))
        p1, p2 = by_hand.predictor(u1), by_hand.predictor(u2)
        expected, _ = fedx_loss(u1, u2, p1, p2, global_u2, by_hand(x)[1], global_r)
    else:
        z1, z2 = F.normalize(u1, dim=1), F.normalize(u2, dim=1)
        expected = align_loss(z1, z2) + 0.5 * (uniform_loss(z1) + uniform_loss(z2)) / 2
    if name == "feddecorr":
        weight = {"patterns": 0.1, "cifar100": 0.05}[dataset]
        expected = expected + weight * (feddecorr_loss(h1) + feddecorr_loss(h2)) / 2
    elif name == "fedu2":
        expected = expected + 0.01 * fedu2_uniform(z1, draws) + 0.01 * fedu2_uniform(z2, draws)

    assert loss.item() == pytest.approx(expected.item(), rel=1e-5) and model.training
    loss.backward()
    expected.backward()
    for (key, w), other in zip(model.named_parameters(), by_hand.parameters()):
        assert torch.allclose(w.grad, other.grad, rtol=1e-3, atol=1e-5), key
    for (key, value), other in zip(model.named_buffers(), by_hand.buffers()):
        assert torch.allclose(value, other, atol=1e-6), key


# ---------------------------------------------------------------------------- script


def test_a_baseline_trains_and_is_not_align_and_uniform_alone(run):
    plain, _ = run(train, "--method fedalignuniform --rounds 3", out="runs/plain")
    for name in baselines.BASELINES:  # L-DAWA's first two rounds are FedAvg
        state, (*_, line) = run(baselines, f"--method {name} --rounds 3", out=f"runs/{name}")
        assert not equal({key: state[key] for key in plain}, plain)
        assert math.isfinite(line["loss"]) and line["left_out"] == []
        load_checkpoint(f"runs/{name}/last.pt")  # eval.py can take it


def test_ssd_is_the_same_in_every_script(run):
    plain, _ = run(train)
    assert equal(plain, run(baselines, "--method ssd", out="runs/b")[0])


def test_fedx_goes_on_where_it_was_stopped_with_its_predictor(run):
    whole, _ = run(baselines, "--method fedx --rounds 2", out="runs/b")
    run(baselines, "--method fedx")
    baselines.main(["--resume", "runs/a/last.pt", "--rounds", "2"])
    resumed = torch.load("runs/a/last.pt", weights_only=True)["model"]
    assert equal(whole, resumed) and any(name.startswith("predictor") for name in whole)


def test_one_client_alone(run):
    _, (line,) = run(baselines, "--method fedalignuniform --client 1")
    assert line["clients"] == [1]
    checkpoint = torch.load("runs/a/last.pt", weights_only=True)
    assert len(checkpoint["split"]) == 3  # all clients' images are there to be evaluated
    baselines.main(["--resume", "runs/a/last.pt", "--rounds", "2"])
    checkpoint = torch.load("runs/a/last.pt", weights_only=True)
    assert checkpoint["history"][-1]["clients"] == [1]


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--client 3", "--client 3: the last one is 2"),
        ("--client -1", "--client"),
        ("--method fedx --compile", "--compile: fedx cannot be compiled"),
        ("--method fedavg", "invalid choice: 'fedavg'"),
        ("--method feddecorr --gamma 1", "--gamma 1: feddecorr has no such term"),
        ("--method fedu2 --delta 0.1", "--delta 0.1: fedu2 has no such term"),
        ("--method fedx --beta 2", "--beta 2: fedx has no such term"),
    ],
)
def test_mistakes_are_one_line(flags, words, small, mistake):
    mistake(baselines.main, [*small, *flags.split()], words)
    assert not Path("runs").exists()
