"""The losses explained a second time: values by hand, a slow oracle, where gradients flow.

python -m pytest test_losses.py
"""

import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import losses
from losses import (
    align_loss,
    distill_loss,
    dsr_loss,
    hard_separation,
    scaling_vectors,
    ssd_loss,
    uniform_loss,
)

EAST, NORTH, WEST = torch.tensor([1.0, 0]), torch.tensor([0, 1.0]), torch.tensor([-1.0, 0])


def unit_rows(n=6, d=8, seed=0):
    """n random points on the unit sphere in d dimensions, float64, with gradient."""
    points = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return F.normalize(points, dim=1).requires_grad_()


def rotation(d=8):
    draws = torch.randn(d, d, generator=torch.Generator().manual_seed(9)).double()
    return torch.linalg.qr(draws).Q


# ---------------------------------------------------------------- values that one can work out


def test_alignment_by_hand():
    assert align_loss(EAST[None], EAST[None]) == 0
    assert align_loss(EAST[None], NORTH[None]) == 2  # a right angle: 1 + 1
    assert align_loss(EAST[None], WEST[None]) == 4  # opposite points: the largest value
    assert align_loss(torch.stack([EAST, EAST]), torch.stack([EAST, WEST])) == 2  # a mean over rows


def test_uniformity_by_hand():
    assert uniform_loss(torch.stack([EAST, EAST])) == 0  # collapse: the worst value
    assert uniform_loss(torch.zeros(3, 2)) == 0  # so is a dead network
    # one pair, distance^2 = 2, t = 2
    assert uniform_loss(torch.stack([EAST, NORTH])) == pytest.approx(-4)
    # -4t, two points at their farthest
    assert uniform_loss(torch.stack([EAST, WEST])) == pytest.approx(-8)
    three = torch.stack([EAST, NORTH, WEST])  # pairs: 2, 2 and 4 apart (squared)
    for t in (1.0, 2.0):
        mean = (2 * math.exp(-2 * t) + math.exp(-4 * t)) / 3
        assert uniform_loss(three, t) == pytest.approx(math.log(mean))


def test_dsr_by_hand():
    z = torch.tensor([[0.6, 0.8]])
    d_k = torch.tensor([10.0, 1.0])  # the first dimension is the client's own
    # as printed: target (6, 0.8), difference (-5.4, 0)
    assert dsr_loss(z, d_k, on_sphere=False) == pytest.approx(5.4**2)
    # on the sphere: target (6, 0.8) / sqrt(36.64)
    target = np.array([6, 0.8]) / math.sqrt(36.64)
    assert dsr_loss(z, d_k) == pytest.approx(((np.array([0.6, 0.8]) - target) ** 2).sum(), rel=1e-5)


def test_distillation_by_hand():
    # softmaxes p = (3/4, 1/4), q = (1/2, 1/2)
    h, u = torch.tensor([[math.log(3.0), 0.0]]), torch.tensor([[0.0, 0.0]])
    forward = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    backward = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    assert distill_loss(h, u) == pytest.approx(forward)  # KL( softmax(h) || softmax(u) )
    assert distill_loss(u, h) == pytest.approx(backward)  # the other direction is another number


def test_hard_separation_by_hand():
    z = hard_separation(torch.tensor([[3.0, 4.0, 5.0]]), torch.tensor([10.0, 10.0, 1.0]))
    assert torch.allclose(z, torch.tensor([[0.6, 0.8, 0.0]]))


def test_scaling_vectors_are_disjoint():
    d = scaling_vectors(num_clients=3, dim=10, scale=7.0)
    assert d.shape == (3, 10) and set(d.flatten().tolist()) == {1.0, 7.0}
    own = d == 7
    assert own.sum(1).tolist() == [3, 3, 3]  # floor(10 / 3) dimensions each
    assert own.sum(0).max() == 1  # no dimension has two owners
    assert torch.equal(d, scaling_vectors(3, 10, 7.0))
    assert not torch.equal(d, scaling_vectors(3, 10, 7.0, seed=1))
    assert scaling_vectors(1, 4).eq(10).all()  # a single client owns all
    assert scaling_vectors(1, 1, scale=0.5).tolist() == [[0.5]]


def test_more_clients_than_dimensions_share_with_a_warning():
    with pytest.warns(UserWarning, match="not disjoint"):
        d = scaling_vectors(num_clients=5, dim=2)
    assert (d == 10).sum(1).tolist() == [1] * 5
    assert sorted((d == 10).sum(0).tolist()) == [2, 3]


# ---------------------------------------------------------------- a slow oracle, gradients too


def numpy_losses(z1, z2, h1, u1, d_k, t):
    n = len(z1)
    pairs = [math.exp(-t * sum((z1[i] - z1[j]) ** 2)) for i in range(n) for j in range(i)]
    literal = [sum((z1[i] - z1[i] * d_k) ** 2) for i in range(n)]
    sphere = [sum((z1[i] - z1[i] * d_k / np.linalg.norm(z1[i] * d_k)) ** 2) for i in range(n)]
    p, q = (np.exp(v) / np.exp(v).sum(1, keepdims=True) for v in (h1, u1))
    return {
        "align": np.mean([sum((z1[i] - z2[i]) ** 2) for i in range(n)]),
        "uniform": math.log(np.mean(pairs)),
        "literal": np.mean(literal),
        "sphere": np.mean(sphere),
        "distill": np.mean([sum(p[i] * np.log(p[i] / q[i])) for i in range(n)]),
    }


@pytest.mark.parametrize("t", [0.5, 2.0])
@pytest.mark.parametrize("n, d", [(2, 3), (7, 5), (16, 32)])
def test_every_loss_equals_the_slow_oracle(n, d, t):
    z1, z2 = unit_rows(n, d, seed=1), unit_rows(n, d, seed=2)
    h, u = 5 * unit_rows(n, d, seed=3), 5 * unit_rows(n, d, seed=4)
    d_k = scaling_vectors(2, d)[0].double()
    expected = numpy_losses(*(v.detach().numpy() for v in (z1, z2, h, u, d_k)), t)
    computed = {
        "align": align_loss(z1, z2),
        "uniform": uniform_loss(z1, t),
        "literal": dsr_loss(z1, d_k, on_sphere=False),
        "sphere": dsr_loss(z1, d_k),
        "distill": distill_loss(h, u),
    }
    for name, value in computed.items():
        assert value.item() == pytest.approx(expected[name], rel=1e-10), name


def test_gradients_by_finite_differences():
    z1, z2 = unit_rows(seed=1), unit_rows(seed=2)
    assert torch.autograd.gradcheck(align_loss, (z1, z2))
    assert torch.autograd.gradcheck(distill_loss, (z1, z2))
    # the Gram matrix stands for distances on the sphere only: normalise inside
    assert torch.autograd.gradcheck(lambda v: uniform_loss(F.normalize(v, dim=1)), (z1,))


@pytest.mark.parametrize("on_sphere", [True, False])
def test_dsr_gradient_is_exactly_two_times_the_difference(on_sphere):
    z, d_k = unit_rows(), scaling_vectors(2, 8)[1].double()
    dsr_loss(z, d_k, on_sphere).backward()
    target = z.detach() * d_k  # through z, not the target
    target = F.normalize(target, dim=1) if on_sphere else target
    assert torch.allclose(z.grad, 2 * (z.detach() - target) / len(z), rtol=1e-12)


def test_literal_dsr_pushes_eighteen_times_z_on_the_scaled_dimensions():
    z, d_k = unit_rows(), scaling_vectors(2, 8, scale=10.0)[0].double()
    dsr_loss(z, d_k, on_sphere=False).backward()
    own = d_k == 10
    assert torch.allclose(z.grad[:, own], -18 * z.detach()[:, own] / len(z))
    assert z.grad[:, ~own].abs().max() == 0


def test_distillation_reaches_both_h_and_u():
    h, u = unit_rows(seed=3), unit_rows(seed=4)
    assert all(g.abs().max() > 0 for g in torch.autograd.grad(distill_loss(h, u), (h, u)))


def test_alignment_and_uniformity_ignore_rotations_and_dsr_does_not():
    z1, z2, turn = unit_rows(seed=1), unit_rows(seed=2), rotation()
    assert torch.allclose(align_loss(z1 @ turn, z2 @ turn), align_loss(z1, z2))
    assert torch.allclose(uniform_loss(z1 @ turn), uniform_loss(z1))
    assert torch.allclose(uniform_loss(z1.flip(0)), uniform_loss(z1))  # nor of the order of rows
    d_k = scaling_vectors(2, 8)[0].double()
    assert (dsr_loss(z1 @ turn, d_k) - dsr_loss(z1, d_k)).abs() > 1e-3


def test_dsr_is_below_two_on_the_sphere_alone_and_a_scale_of_one_asks_for_nothing():
    z, d_k = unit_rows(64, 8).detach(), scaling_vectors(2, 8)[0].double()
    assert 0 < dsr_loss(z, d_k) < 2 < dsr_loss(z, d_k, on_sphere=False)
    for on_sphere in (True, False):
        assert dsr_loss(z, d_k**0, on_sphere) == pytest.approx(0, abs=1e-30)


def test_distillation_is_zero_only_for_equal_softmaxes():
    h, u = unit_rows(seed=3).detach(), unit_rows(seed=4).detach()
    assert distill_loss(h, h) == pytest.approx(0, abs=1e-15)
    assert distill_loss(h, h + 3) == pytest.approx(0, abs=1e-15)  # softmax ignores a shift
    assert distill_loss(h, u) > 0
    assert torch.allclose(distill_loss(h, u, temperature=0.5), distill_loss(2 * h, 2 * u))


def test_uniformity_stays_exact_in_float32_under_autocast():
    # near collapse, where bfloat16 is off by 6e-3
    noise = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    z = F.normalize(torch.ones(64, 128) + 0.05 * noise, dim=1)
    with torch.autocast("cpu", torch.bfloat16):
        value = uniform_loss(z)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(uniform_loss(z.double()).item(), abs=2e-6)


# ------------------------------------------------------------------ the sum


def make_views(seed=0):
    views = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return [view.requires_grad_() for view in views]


def test_ssd_loss_is_the_weighted_sum_of_its_terms():
    h1, u1, h2, u2 = views = make_views()
    d_k = scaling_vectors(2, 8)[0].double()
    total, terms = ssd_loss(*views, d_k, beta=2.0, gamma=3.0, delta=5.0)
    z1, z2 = F.normalize(u1, dim=1), F.normalize(u2, dim=1)
    expected = {
        "align": align_loss(z1, z2),
        "uniform": (uniform_loss(z1) + uniform_loss(z2)) / 2,
        "dsr": (dsr_loss(z1, d_k) + dsr_loss(z2, d_k)) / 2,
        "distill": (distill_loss(h1, u1) + distill_loss(h2, u2)) / 2,
    }
    for name, value in expected.items():
        assert torch.allclose(terms[name], value) and not terms[name].requires_grad
    align, uniform, dsr, distill = expected.values()
    assert torch.allclose(total, align + 2 * uniform + 3 * dsr + 5 * distill)
    papers, _ = ssd_loss(*views, d_k)  # the defaults
    assert torch.allclose(papers, align + uniform + dsr + 0.1 * distill)
    assert torch.allclose(papers, ssd_loss(h2, u2, h1, u1, d_k)[0])  # the views may change places


def test_h_may_be_wider_than_u_where_nothing_is_distilled():
    (h1, u1, h2, u2), d_k = make_views(), scaling_vectors(2, 4)[0].double()
    narrow, terms = ssd_loss(h1, u1[:, :4], h2, u2[:, :4], d_k, delta=0)
    same, _ = ssd_loss(h1[:, :4], u1[:, :4], h2[:, :4], u2[:, :4], d_k, delta=0)
    assert narrow == same and terms.keys() == {"align", "uniform", "dsr"}
    with pytest.raises(ValueError, match="or take delta 0"):
        ssd_loss(h1, u1[:, :4], h2, u2[:, :4], d_k)


def test_without_dsr_and_distillation_nothing_depends_on_the_client_or_on_h():
    views, d = make_views(), scaling_vectors(2, 8).double()
    first, second = (ssd_loss(*views, d_k, gamma=0, delta=0)[0] for d_k in d)
    assert first == second
    gradient = torch.autograd.grad(first, views)
    assert gradient[0].abs().max() == gradient[2].abs().max() == 0  # h1, h2
    assert gradient[1].abs().max() > 0


def test_hard_separation_leaves_other_dimensions_without_gradient():
    views, d_k = make_views(), scaling_vectors(2, 8)[0].double()
    total, _ = ssd_loss(*views, d_k, gamma=0, delta=0, hard=True)
    gradient = torch.autograd.grad(total, views[1])[0]
    assert gradient[:, d_k == 1].abs().max() == 0 < gradient[:, d_k != 1].abs().max()


def test_the_demonstration_shows_inter_client_uniformity_rising(capsys):
    losses.main()
    shown = [float(x) for x in re.findall(r"-L_uniform (\d\.\d+)", capsys.readouterr().out)]
    assert len(shown) == 6 and shown == sorted(shown) and shown[-1] > 3 * shown[0]


# ------------------------------------------------------------------ what is undefined raises


ROWS = torch.eye(4)


@pytest.mark.parametrize(
    "call",
    [
        lambda: align_loss(ROWS, ROWS[:1]),  # would broadcast
        lambda: align_loss(ROWS[0], ROWS[0]),
        lambda: uniform_loss(ROWS[:1]),  # a batch of one has no pair
        lambda: uniform_loss(ROWS[0]),
        lambda: scaling_vectors(0, 4),
        lambda: scaling_vectors(2, 0),
        lambda: scaling_vectors(2, 4, scale=0.0),
        lambda: scaling_vectors(2, 4, scale=math.inf),
        lambda: dsr_loss(ROWS, torch.ones(3)),  # d_k of the wrong length
        lambda: dsr_loss(ROWS, torch.ones(1)),  # would broadcast
        lambda: dsr_loss(ROWS, torch.ones(4, 4)),
        lambda: distill_loss(ROWS, ROWS[:, :1]),
        lambda: distill_loss(ROWS, ROWS, temperature=0.0),
        lambda: hard_separation(ROWS, torch.tensor([10.0, 1.0])),
        lambda: ssd_loss(ROWS, ROWS, ROWS, ROWS[:2], torch.ones(4)),
    ],
)
def test_what_is_undefined_is_a_value_error(call):
    with pytest.raises(ValueError, match="needs"):
        call()
