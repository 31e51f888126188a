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

import data
import train
from federated import keyed_generator
from losses import distill_loss, dsr_loss, scaling_vectors, ssd_loss

SMALL = "--dataset patterns --width 2 --batch-size 16 --clients 3 --alpha 1 --rounds 1".split()
SMALL += "--local-epochs 1 --device cpu --no-amp --lr 0.01".split()
CHOICES = [name for name in variants.METHODS if name not in train.METHODS]
CPU = torch.device("cpu")
draw_patterns = data.draw_patterns


@pytest.fixture(autouse=True)
def small_data(monkeypatch, tmp_path):
    small = draw_patterns(120, 40)
    monkeypatch.setattr(data, "draw_patterns", lambda: small)
    monkeypatch.chdir(tmp_path)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unit(*shape, seed=0):
    return F.normalize(randn(*shape, seed=seed), dim=1)


def run(module, *flags, out="runs/a"):
    """The run's weights and the lines of its metrics."""
    module.main([*SMALL, "--out", out, *flags])
    lines = Path(out, "metrics.jsonl").read_text().splitlines()
    state = torch.load(f"{out}/last.pt", weights_only=True)["model"]
    return state, [json.loads(line) for line in lines]


def equal(one, two):
    return all(torch.equal(one[name], two[name]) for name in one)


# ------------------------------------------------------------------ objectives


def test_the_authors_dsr_is_a_norm_over_the_batch_along_other_axes():
    z, d_k = unit(6, 8), scaling_vectors(2, 8)[1].double()
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
    h1, u1, h2, u2 = (randn(6, 8, seed=seed).float() for seed in range(4))
    d_k = scaling_vectors(2, 8)[0]
    objective = variants.make_objective(method, 8, CPU)
    total, terms = objective(h1, u1, h2, u2, d_k, beta=0.5, gamma=2.0, delta=3.0, hard=False)
    expected, _ = ssd_loss(h1, u1, h2, u2, d_k, 0.5, 0, 0)
    z1, z2 = F.normalize(u1, dim=1), F.normalize(u2, dim=1)
    expected = expected + 2 * (dsr(z1, d_k) + dsr(z2, d_k)) / 2
    expected = expected + 3 * (distill(h1, u1) + distill(h2, u2)) / 2
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)
    assert sorted(terms) == ["align", "distill", "dsr", "uniform"]


def test_into_h_leaves_u_alone():
    h, u = randn(4, 6).requires_grad_(), randn(4, 6, seed=1).requires_grad_()
    variants.distill_into_h(h, u).backward()
    assert h.grad.abs().max() > 0 and u.grad is None


# ------------------------------------------------------------------ split and first weights


def test_the_authors_counts_are_theirs():
    counts = variants.authors_counts(5000)
    sizes = [7318, 3547, 5852, 5132, 7520, 4160, 3370, 2920, 4221, 5960]
    assert counts.sum(0).tolist() == sizes and (counts.sum(1) == 5000).all()


def test_a_dealt_split_is_a_partition_with_the_counts_and_stays_the_same():
    labels = np.repeat(np.arange(10), 500)
    counts = variants.authors_counts(500)
    split = variants.deal(labels, counts, seed=3)
    assert np.array_equal(np.sort(np.concatenate(split)), np.arange(5000))
    for k, part in enumerate(split):
        assert np.bincount(labels[part], minlength=10).tolist() == counts[:, k].tolist()
    other = variants.deal(labels, counts, seed=4)
    assert not all(map(np.array_equal, split, other))
    text = json.dumps([part.tolist() for part in split])
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "25046e2963c6fec7"


@pytest.mark.parametrize("clients, classes", [(10, 10), (5, 10)])
def test_equal_clients_have_one_size_and_keep_the_tables_skew(clients, classes):
    counts = variants.equal_counts(500, clients, classes, alpha=0.1, seed=0)
    assert (counts.sum(0) == 500 * classes / clients).all() and (counts.sum(1) == 500).all()
    assert counts.std() > 0.8 * counts.mean()


def test_first_weights_like_pytorchs_have_its_spread():
    config, _ = train.read_config(variants.build_parser(), ["--init", "pytorch"], variants.METHODS)
    net = variants.make_model(config)
    weight = net.encoder.layer1[0].conv1.weight
    assert weight.std().item() == pytest.approx(1 / math.sqrt(3 * 9 * 64), rel=0.02)  # 0.024
    torch.manual_seed(0)
    again = variants.make_model(config)
    assert equal(net.state_dict(), again.state_dict())


def test_the_flags_reach_the_run():
    flags = "--clients 10 --split authors --init pytorch --batch-size 4 --method ssd-authors"
    run(variants, *flags.split())
    config = torch.load("runs/a/last.pt", weights_only=True)
    counts = variants.authors_counts(12)
    assert [len(part) for part in config["split"]] == counts.sum(0).tolist()
    variants.main(["--resume", "runs/a/last.pt", "--rounds", "2"])
    state, _ = run(variants, "--embed-dim", "32", "--method", "dsr", out="runs/b")
    assert state["projector.3.weight"].shape[0] == 32


# ------------------------------------------------------------------ script


@pytest.mark.parametrize("name", CHOICES)
def test_a_choice_compiles_as_one_graph(name, monkeypatch):
    torch._dynamo.reset()  # ssd_step is compiled anew a few times only
    real, images = torch.compile, draw_patterns(40, 10).train_x
    monkeypatch.setattr(torch, "compile", lambda f, **_: real(f, backend="eager", fullgraph=True))
    values = []
    for flags in ([], ["--compile"]):
        flags = [*SMALL, "--method", name, *flags]
        config, _ = train.read_config(variants.build_parser(), flags, variants.METHODS)
        loss = variants.make_loss(config, images, [range(20), range(20, 40)])
        model = variants.make_model(config)
        values.append(loss(model, images[:16], 1, keyed_generator(0), None)[0].item())
    assert values[0] == pytest.approx(values[1], rel=1e-5)


@pytest.mark.parametrize("name", [name for name in CHOICES if name != "ssd-cosine"])
def test_a_choice_trains_and_is_not_ssd(name):
    state, _ = run(variants, "--method", name)
    plain, _ = run(train, "--method", name.split("-")[0], out="runs/b")
    assert not equal(state, plain)


def test_ssd_is_the_same_in_every_script():
    plain, _ = run(train, "--method", "ssd")
    assert equal(plain, run(variants, "--method", "ssd", out="runs/b")[0])


def test_a_common_d_k_is_client_0s_sent_to_everyone(monkeypatch):
    common, _ = run(variants, "--method", "ssd-common")
    monkeypatch.setattr(train, "scaling_vectors", lambda *of: scaling_vectors(*of)[[0, 0, 0]])
    assert equal(common, run(train, "--method", "ssd", out="runs/c")[0])


def test_cosine_falls_from_lr_to_nearly_zero_over_the_rounds_it_began_with(capsys):
    _, lines = run(variants, "--method", "ssd-cosine", "--rounds", "4")
    expected = [0.01 * (1 + math.cos(math.pi * r / 4)) / 2 for r in range(4)]
    assert [line["lr"] for line in lines] == pytest.approx(expected)
    before = Path("runs/a/last.pt").read_bytes()
    with pytest.raises(SystemExit):
        variants.main(["--resume", "runs/a/last.pt", "--rounds", "5"])
    assert "the schedule is of 4 rounds" in capsys.readouterr().err
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
def test_mistakes_are_one_line(flags, words, capsys):
    with pytest.raises(SystemExit) as stop:
        variants.main([*SMALL, "--out", "runs/a", *flags.split()])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and len(err.strip().splitlines()) == 1 and words in err
    assert not Path("runs").exists()
