"""extras/variants.py: the open choices by hand, the authors' split and first weights; all train."""

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import variants

import train
from losses import distill_loss, dsr_loss, scaling_vectors, ssd_loss


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def equal(one, two):
    return all(torch.equal(one[name], two[name]) for name in one)


# ------------------------------------------------------------------ objectives


def test_the_authors_dsr_is_a_norm_over_the_batch_along_other_axes():
    z, d_k = F.normalize(randn(6, 8), dim=1), scaling_vectors(2, 8)[1].double()
    q = variants.random_axes(8).double()
    assert torch.allclose(q.T @ q, torch.eye(8, dtype=torch.float64), atol=1e-6)
    total = 0.0
    for row in z:
        target = sum(d_k[i] * float(row @ q[:, i]) * q[:, i] for i in range(8))
        total += float((row - target / target.norm()).square().sum())
    assert variants.authors_dsr(z, d_k, q).item() == pytest.approx(math.sqrt(total) / 6)
    z.requires_grad_()
    variants.authors_dsr(z, d_k, q).backward()
    assert z.grad.norm().item() == pytest.approx(1 / 6)  # whatever the distance
    assert variants.authors_dsr(z, torch.ones(8).double(), q).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    "method, dsr, distill",
    [
        ("dsr-literal", lambda z, d: dsr_loss(z, d, on_sphere=False), distill_loss),
        ("ssd-reverse", dsr_loss, lambda h, u: distill_loss(u, h)),
        ("ssd-half", dsr_loss, lambda h, u: distill_loss(h / 0.5, u / 0.5)),
        ("ssd-into-h", dsr_loss, distill_loss),
        (
            "ssd-authors",
            lambda z, d: variants.authors_dsr(z, d, variants.random_axes(8)),
            lambda h, u: distill_loss(u / 0.5, h / 0.5),
        ),
    ],
)
def test_an_objective_is_align_and_uniform_and_its_own_two_terms(method, dsr, distill):
    h1, u1, h2, u2 = (randn(6, 8, seed=seed).float().requires_grad_() for seed in range(4))
    d_k = scaling_vectors(2, 8)[0]
    weights = {"beta": 0.5, "gamma": 2.0, "delta": 3.0, "hard": False}
    objective = variants.make_objective(method, 8, torch.device("cpu"))
    total, terms = objective(h1, u1, h2, u2, d_k, **weights)
    expected, _ = ssd_loss(h1, u1, h2, u2, d_k, 0.5, 0, 0)
    z1, z2 = F.normalize(u1, dim=1), F.normalize(u2, dim=1)
    expected = expected + 2 * (dsr(z1, d_k) + dsr(z2, d_k)) / 2
    without = expected
    expected = expected + 3 * (distill(h1, u1) + distill(h2, u2)) / 2
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)
    assert sorted(terms) == ["align", "distill", "dsr", "uniform"]
    torch._dynamo.reset()
    graph = torch.compile(objective, backend="eager", fullgraph=True)  # --compile needs one graph
    assert torch.equal(graph(h1, u1, h2, u2, d_k, **weights)[0], total)
    if method == "ssd-into-h":  # distillation leaves u alone
        expected = without
    (found,) = torch.autograd.grad(total, u1)
    assert torch.allclose(found, torch.autograd.grad(expected, u1)[0], atol=1e-5)


# ------------------------------------------------------------------ split and first weights


def test_the_authors_counts_are_theirs():
    counts = variants.authors_counts(5000)
    sizes = [7318, 3547, 5852, 5132, 7520, 4160, 3370, 2920, 4221, 5960]
    assert counts.sum(0).tolist() == sizes and (counts.sum(1) == 5000).all()


def test_a_dealt_split_is_a_partition_with_the_counts_and_stays_the_same():
    labels, counts = np.repeat(np.arange(10), 500), variants.authors_counts(500)
    split = variants.deal(labels, counts, seed=3)
    assert np.array_equal(np.sort(np.concatenate(split)), np.arange(5000))
    for k, part in enumerate(split):
        assert np.bincount(labels[part], minlength=10).tolist() == counts[:, k].tolist()
    text = json.dumps([part.tolist() for part in split])
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "25046e2963c6fec7"


@pytest.mark.parametrize("clients", [10, 5])
def test_equal_clients_have_one_size_and_keep_the_tables_skew(clients):
    counts = variants.equal_counts(500, clients, 10, alpha=0.1, seed=0)
    assert (counts.sum(0) == 5000 / clients).all() and (counts.sum(1) == 500).all()
    assert counts.std() > 0.8 * counts.mean()


def test_first_weights_like_pytorchs_have_its_spread():
    config, _ = train.read_config(variants.build_parser(), ["--init", "pytorch"], variants.METHODS)
    net = variants.make_model(config)
    weight = net.encoder.layer1[0].conv1.weight
    assert weight.std().item() == pytest.approx(1 / math.sqrt(3 * 9 * 64), rel=0.02)  # 0.024
    assert equal(net.state_dict(), variants.make_model(config).state_dict())


def test_the_flags_reach_the_run(run):
    run(variants, "--clients 10 --split authors --init pytorch --batch-size 4 --method ssd-authors")
    split = torch.load("runs/a/last.pt", weights_only=True)["split"]
    assert [len(part) for part in split] == variants.authors_counts(12).sum(0).tolist()
    variants.main(["--resume", "runs/a/last.pt", "--rounds", "2"])
    state, _ = run(variants, "--embed-dim 32 --method dsr", out="runs/b")
    assert state["projector.3.weight"].shape[0] == 32


# ------------------------------------------------------------------ script


def test_a_common_d_k_is_client_0s_sent_to_everyone_else_ssd_is_train_pys(run, monkeypatch):
    common, _ = run(variants, "--method ssd-common")
    plain, _ = run(train, out="runs/b")
    assert equal(plain, run(variants, "--method ssd", out="runs/c")[0])
    assert not equal(plain, common)
    monkeypatch.setattr(train, "scaling_vectors", lambda *of: scaling_vectors(*of)[[0, 0, 0]])
    assert equal(common, run(train, out="runs/d")[0])


def test_cosine_falls_from_lr_to_nearly_zero_over_the_rounds_it_began_with(run, mistake):
    _, lines = run(variants, "--method ssd-cosine --rounds 4")
    expected = [0.03 * (1 + math.cos(math.pi * r / 4)) / 2 for r in range(4)]
    assert [line["lr"] for line in lines] == pytest.approx(expected)
    before = Path("runs/a/last.pt").read_bytes()
    longer = ["--resume", "runs/a/last.pt", "--rounds", "5"]
    mistake(variants.main, longer, "the schedule is of 4 rounds")
    assert Path("runs/a/last.pt").read_bytes() == before


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--split authors", "10 clients"),
        ("--split equal --limit 60", "--split equal needs all images"),
        ("--embed-dim 32", "distillation needs u as wide as h"),
        ("--method fedx", "invalid choice: 'fedx'"),
    ],
)
def test_mistakes_are_one_line(flags, words, small, mistake):
    mistake(variants.main, [*small, *flags.split()], words)
    assert not Path("runs").exists()
