"""extras/separation.py: a round's networks and who sees what, measured against slow oracles."""

import json
from pathlib import Path

import baselines
import numpy as np
import pytest
import separation
import torch
import variants

from data import draw_patterns, two_views
from eval import encode
from federated import average_states, copy_state, keyed_generator
from losses import scaling_vectors
from model import SSDNet, load_checkpoint

LAST = "runs/a-seed0/last.pt"


@pytest.fixture
def trained(small, patterns):
    """(flags): a run of one round -> its checkpoint and network, and the patterns."""

    def train(*flags):
        variants.main([*small, *flags, "--out", "runs/a-seed0"])
        return *load_checkpoint(LAST), patterns

    return train


def next_states(checkpoint, model, data):
    """The local networks of the round after the checkpoint's; the model stays as it is."""
    common, config = copy_state(model), checkpoint["config"]
    states = separation.local_states(model, config, data.train_x, checkpoint["split"], 1)
    model.load_state_dict(common)
    return states


def slowly(rows):
    """total, intra, inter of rows[k] (n, D) of clients k, one pair of images after the other."""
    owners = [k for k, z in enumerate(rows) for _ in z]
    z = np.concatenate([z / np.linalg.norm(z, axis=1, keepdims=True) for z in rows])
    intra, inter = [], []
    for a in range(len(z)):
        for b in range(len(z)):
            if a != b:
                kernel = np.exp(-2 * np.sum((z[a] - z[b]) ** 2))
                (intra if owners[a] == owners[b] else inter).append(kernel)
    parts = {"total": intra + inter, "intra": intra, "inter": inter}
    return {name: -np.log(np.mean(kernels)) for name, kernels in parts.items()}


@pytest.mark.parametrize("method", ["dsr", "ssd-common", "ssd-authors"])
def test_which_network_sees_which_images(method, monkeypatch, trained):
    """Every variant from the images up; variances of 1 stand for statistics measured anew."""
    pools = []

    def renew(model, images, generator):
        pools.append(images)
        for name, value in model.named_buffers():
            if name.endswith("running_var"):
                value.fill_(1)

    monkeypatch.setattr(separation, "recalibrate", renew)
    checkpoint, model, data = trained("--method", method)
    common, local = copy_state(model), next_states(checkpoint, model, data)
    found = list(separation.measure(checkpoint, model, data))
    (pool,) = pools  # every image that a client holds, once
    assert sorted(map(bytes, pool.numpy())) == sorted(map(bytes, data.train_x.numpy()))

    sizes = np.array([len(index) for index in checkpoint["split"]])
    own = [row.nonzero()[:, 0].numpy() for row in scaling_vectors(3, 16) != 1]
    axes = np.eye(16)
    if method == "ssd-common":
        own = own[:1] * 3
    if method == "ssd-authors":
        axes = variants.random_axes(16).double().numpy()

    def merged(weights):
        weights = weights / weights.sum()
        return {n: sum(w * s[n].double() for w, s in zip(weights, local)) for n in common}

    def part(k, *names):
        """The common network with what begins with the names from client k's."""
        return {n: local[k][n] if n.startswith(names) else common[n] for n in common}

    average, even, three = merged(sizes), merged(np.ones(3)), range(3)
    anew = {n: torch.ones_like(v) if "running_var" in n else v for n, v in average.items()}
    rest = ("encoder.", "projector.0.", "projector.1.")
    mine, test = [data.train_x[index] for index in checkpoint["split"]], [data.test_x] * 3
    expected = {
        "own": (local, mine),
        "average": ([average] * 3, mine),
        "average-equal": ([even] * 3, mine),
        "average-recalibrated": ([anew] * 3, mine),
        "swap-none": ([common] * 3, test),
        "swap-encoder": ([part(k, "encoder.") for k in three], test),
        "swap-all-but-last": ([part(k, *rest) for k in three], test),
        "swap-last": ([part(k, "projector.3.") for k in three], test),
        "same-images": (local, test),
    }
    names = [(variant, space) for variant in expected for space in "hz"]
    assert [(line.pop("variant"), line.pop("space")) for line in found] == names
    for (variant, space), line in zip(names, found, strict=True):
        rows = []
        for state, images in zip(*expected[variant]):
            model.load_state_dict(state)
            h, u = encode(model, images, amp=False)
            rows.append((h if space == "h" else u).double().numpy())
        if space == "z":
            rows = [u @ axes / np.linalg.norm(u, axis=1, keepdims=True) for u in rows]
            shares = [[np.mean([x[d] @ x[d] for x in z]) for d in own] for z in rows]
            assert np.allclose(line.pop("shares"), shares, atol=6e-4), variant
            assert np.allclose(line.pop("weights"), sizes / sizes.sum(), atol=6e-5)
            mean = np.average(np.diagonal(shares), weights=[len(z) for z in rows])
            assert line.pop("own_share") == pytest.approx(mean, abs=1e-4), variant
        assert line == pytest.approx(slowly(rows), abs=3e-4), (variant, space)


def test_the_axes_of_the_authors_dsr_are_those_along_which_it_moves_z():
    """A step of their DSR raises the own share that is taken after the turn."""
    config = {"embed_dim": None, "width": 2, "scale": 10.0, "seed": 0, "method": "ssd-authors"}
    own, basis = separation.own_dimensions(config, 3)
    z = torch.nn.functional.normalize(torch.randn(50, 16), dim=1).requires_grad_()
    d_k = scaling_vectors(3, 16)[1]
    variants.authors_dsr(z, d_k, variants.random_axes(16)).backward()
    moved = torch.nn.functional.normalize(z.detach() - 50 * z.grad, dim=1)

    before, after = ((rows @ basis).square()[:, own[1]].sum(1) for rows in (z.detach(), moved))
    assert (after > before).all()


@pytest.mark.parametrize("batch_size", [60, 20])
def test_batchnorms_statistics_are_those_of_the_batches(batch_size):
    """Of one batch its mean and unbiased variance, of three their means; weights untouched."""
    images, model, inputs = draw_patterns(60, 10).train_x, SSDNet(2), {}
    norms = {name: part for name, part in model.named_modules() if hasattr(part, "running_mean")}
    for name, part in norms.items():
        part.running_mean.normal_()  # what a round leaves behind
        inputs[name] = []
        part.register_forward_pre_hook(lambda _, x, name=name: inputs[name].append(x[0].double()))
    seen, before = [], [value.clone() for value in model.parameters()]
    model.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    separation.recalibrate(model.eval(), images, keyed_generator(1), batch_size)
    draws = keyed_generator(1)
    order = torch.randperm(60, generator=draws)
    assert torch.equal(seen[0], torch.cat(two_views(images[order[:batch_size]], draws)))
    assert not model.training and all(part.momentum == 0.1 for part in norms.values())
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    for name, part in norms.items():
        columns = [x.transpose(0, 1).flatten(1) for x in inputs[name]]
        assert len(columns) == 60 // batch_size and len(inputs[name][0]) == 2 * batch_size
        mean = sum(x.mean(1) for x in columns) / len(columns)
        variance = sum(x.var(1) for x in columns) / len(columns)
        assert torch.allclose(part.running_mean.double(), mean, atol=1e-6)
        assert torch.allclose(part.running_var.double(), variance, rtol=1e-4)


@pytest.mark.parametrize("method", ["ssd", "ssd-cosine"])
def test_the_round_is_the_one_that_training_on_would_have(method, small, trained):
    """And states of that round, if they are there, give the same lines without a round."""
    variants.main([*small, "--method", method, "--rounds", "2", "--out", "runs/whole"])
    whole = torch.load("runs/whole/last.pt", weights_only=True)["model"]
    checkpoint, model, data = trained("--method", method)
    checkpoint["config"]["rounds"] = 2  # the schedule's
    states = next_states(checkpoint, model, data)
    average = average_states(states, [len(index) for index in checkpoint["split"]])
    assert all(torch.equal(average[name], value) for name, value in whole.items())
    common = copy_state(model)
    lines = list(separation.measure(checkpoint, model, data))
    model.load_state_dict(common)
    assert list(separation.measure(checkpoint, model, data, states)) == lines


def test_a_client_that_diverges_is_not_averaged_in(monkeypatch, trained, mistake):
    trained()
    real = variants.make_loss

    def poisoned(config, images, split):
        loss = real(config, images, split)

        def broken(model, batch, k, *rest):
            value, terms = loss(model, batch, k, *rest)
            return value * (float("nan") if k == 1 else 1), terms

        return broken

    monkeypatch.setattr(variants, "make_loss", poisoned)
    with pytest.warns(UserWarning, match="client 1"):
        mistake(separation.main, [LAST, "--device", "cpu"], "clients [1] diverge")
    assert not Path("separation.jsonl").exists()


def test_one_client_is_its_own_average_and_has_no_others(trained):
    found = {}
    for line in separation.measure(*trained("--clients", "1", "--no-projector")):
        found.setdefault(line["space"], {})[line.pop("variant")] = line
    for lines in found.values():
        assert len(lines) == 6 and lines["own"].keys() >= {"total", "intra"}
        assert "inter" not in lines["own"] and lines["own"] == lines["average"]


def test_the_script_measures_once_and_says_what_and_where(small, capsys):
    variants.main([*small, "--seed", "0", "--gamma", "0.2", "--out", "runs/seed0"])
    variants.main([*small, "--seed", "1", "--gamma", "1.0", "--out", "runs/seed1"])
    capsys.readouterr()
    separation.main(["runs/seed0/last.pt", "runs/seed1/last.pt", "--device", "cpu"])
    printed = capsys.readouterr().out
    separation.main(["runs/seed1/last.pt", "--device", "cpu"])
    assert printed.count("measured") == 2 and printed.endswith(capsys.readouterr().out)
    lines = [json.loads(line) for line in Path("separation.jsonl").read_text().splitlines()]
    assert len(lines) == 2 * 18
    assert {(line["row"], line["seed"]) for line in lines} == {("ssd --gamma 0.2", 0), ("ssd", 1)}
    about = {"run": "runs/seed1", "round": 1, "epochs": 1, "torch": torch.__version__}
    about |= {"command": "python extras/separation.py runs/seed1/last.pt", "device": "cpu"}
    assert about.items() <= lines[-1].items() and {"commit", "threads"} <= lines[-1].keys()
    assert f"| {100 * lines[-1]['own_share']:.1f} |" in printed


def test_mistakes_are_one_line(small, mistake):
    baselines.main([*small, "--method", "fedu2", "--out", "runs/fedu2"])
    mistake(separation.main, ["nowhere.pt"], "nowhere.pt")
    mistake(separation.main, ["runs/fedu2/last.pt"], "is of fedu2")
    record = ["nowhere.pt", "--record", "runs/fedu2/metrics.jsonl"]
    mistake(separation.main, record, "is not a record")
