"""extras/separation.py: a round's networks and who sees what, measured against slow oracles."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "extras"))

import baselines
import separation

import train
from data import draw_patterns, two_views
from eval import encode
from federated import average_states, copy_state, keyed_generator
from losses import scaling_vectors
from model import load_checkpoint

SMALL = "--dataset patterns --width 2 --batch-size 16 --clients 3 --alpha 1 --rounds 1".split()
SMALL += "--local-epochs 1 --lr 0.03 --device cpu --no-amp".split()
LAST = "runs/a-seed0/last.pt"


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    """120 patterns, and an empty folder to work in."""
    monkeypatch.setattr("data.draw_patterns", lambda: draw_patterns(120, 40))
    monkeypatch.chdir(tmp_path)


def trained(*flags):
    """A run of one round: its checkpoint and network, and the patterns."""
    baselines.main([*SMALL, *flags, "--out", "runs/a-seed0"])
    return *load_checkpoint(LAST), draw_patterns(120, 40)


def next_states(checkpoint, model, data):
    """The local networks of the round after the checkpoint's, and their average."""
    split = checkpoint["split"]
    states = separation.local_states(model, checkpoint["config"], data.train_x, split, 1)
    return states, average_states(states, list(map(len, split)))


def slowly(z, own):
    """Everything about z[k] (n, D) of clients k, one pair after the other; own[k]: dimensions."""
    z = [(rows / np.linalg.norm(rows, axis=1, keepdims=True)) for rows in z]
    pairs = {(i, j): [] for i in range(len(z)) for j in range(len(z))}
    for i, j in pairs:
        for a, one in enumerate(z[i]):
            for b, other in enumerate(z[j]):
                if (i, a) != (j, b):
                    pairs[i, j].append(np.exp(-2 * np.sum((one - other) ** 2)))
    means = [rows.mean(0) / np.linalg.norm(rows.mean(0)) for rows in z]
    intra = sum((pairs[i, j] for i, j in pairs if i == j), [])
    inter = sum((pairs[i, j] for i, j in pairs if i != j), [])
    values = {
        "total": -np.log(np.mean(intra + inter)),
        "intra": -np.log(np.mean(intra)),
        "inter": -np.log(np.mean(inter)),
        "cosine": np.mean([means[i] @ means[j] for i, j in pairs if i < j]),
        "own_share": np.mean([x[d] @ x[d] for rows, d in zip(z, own) for x in rows]),
    }
    shares = [[np.mean([x[d] @ x[d] for x in rows]) for d in own] for rows in z]
    return values, {pair: -np.log(np.mean(kernel)) for pair, kernel in pairs.items()}, shares


def test_values_against_a_loop_over_pairs():
    z = torch.nn.functional.normalize(torch.randn(12, 6) + 1, dim=1)
    client, own = torch.tensor([0] * 3 + [1] * 2 + [2] * 7), scaling_vectors(3, 6) != 1
    values, matrix, shares = separation.geometry(z, client, own)
    rows = [z[client == k].double().numpy() for k in range(3)]
    expected, pairs, slow_shares = slowly(rows, [d.nonzero()[:, 0].numpy() for d in own])
    assert np.allclose(shares, slow_shares, atol=1e-6)
    assert values == {name: pytest.approx(value, abs=1e-5) for name, value in expected.items()}
    assert all(
        matrix[pair].item() == pytest.approx(value, abs=1e-5) for pair, value in pairs.items()
    )


@pytest.mark.parametrize("method", ["dsr", "hsd", "ssd-common"])
def test_which_network_sees_which_images(method, monkeypatch):
    """Every variant from the images up; variances of 1 stand for statistics measured anew."""
    pools = []

    def renew(model, images, generator):
        pools.append(images)
        for part in model.modules():
            if isinstance(part, (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d)):
                part.running_var.fill_(1)

    checkpoint, model, data = trained("--method", method)
    start, split = copy_state(model), checkpoint["split"]
    local, average = next_states(checkpoint, model, data)
    model.load_state_dict(start)
    monkeypatch.setattr(separation, "recalibrate", renew)
    found = list(separation.measure(checkpoint, model, data))
    for pool in pools:  # every image that a client holds, once
        assert sorted(map(hash, map(bytes, pool.numpy()))) == sorted(
            map(hash, map(bytes, data.train_x.numpy()))
        )
    assert len(pools) == 2 and len(found) == 18

    d = [row.nonzero()[:, 0].numpy() for row in scaling_vectors(3, 16) != 1]
    d = d[:1] * 3 if method == "ssd-common" else d

    def see(state, images, k, new=False):
        """{space: (n, D)} of images by the network, new: with its variances 1."""
        ones = {name: torch.ones_like(v) for name, v in state.items() if "running_var" in name}
        model.load_state_dict({**state, **ones} if new else state)
        h, z = (rows.double().numpy() for rows in encode(model, images, amp=False))
        if method == "hsd":
            z = np.stack([z[:, i] * (i in d[k]) for i in range(16)], 1)
        return {"h": h, "z": z}

    mine, everyone = [data.train_x[index] for index in split], range(3)
    even = {name: sum(state[name].double() for state in local) / 3 for name in start}
    sizes = np.array(list(map(len, split)))
    expected = {
        "own": [[see(local[k], mine[k], k) for k in everyone]],
        "average": [[see(average, mine[k], k) for k in everyone]],
        "average-recalibrated": [[see(average, mine[k], k, True) for k in everyone]],
        "average-equal": [[see(even, mine[k], k) for k in everyone]],
        "same-images": [[see(local[k], data.test_x, k) for k in everyone]],
        "next-network": [[see(local[(1, 2, 0)[k]], mine[k], k) for k in everyone]],
        "one-network": [[see(local[j], mine[k], k) for k in everyone] for j in everyone],
        "start": [[see(start, mine[k], k) for k in everyone]],
        "start-recalibrated": [[see(start, mine[k], k, True) for k in everyone]],
    }
    assert {line["variant"] for line in found} == expected.keys()
    for line in found:
        variant, space = line.pop("variant"), line.pop("space")
        values = [slowly([rows[space] for rows in seen], d) for seen in expected[variant]]
        for key in values[0][0]:
            mean = np.mean([value[key] for value, *_ in values])
            assert line.pop(key) == pytest.approx(mean, abs=2e-4), (variant, space, key)
        if space == "z" and variant in ("own", "same-images", "average", "average-equal"):
            for (i, j), value in values[0][1].items():
                assert line["matrix"][i][j] == pytest.approx(value, abs=6e-3)
            assert line.pop("chance") == 5 / 16 and line.pop("matrix")
            assert np.allclose(line.pop("shares"), values[0][2], atol=6e-4)
            assert np.allclose(line.pop("weights"), sizes / sizes.sum(), atol=6e-5)
        assert not line


def test_not_more_images_than_asked_for(monkeypatch):
    checkpoint, model, data = trained()
    pools, sizes, real = [], [], separation.geometry
    monkeypatch.setattr(separation, "IMAGES", 4)
    monkeypatch.setattr(separation, "POOLED", 30)
    monkeypatch.setattr(separation, "recalibrate", lambda _, images, __: pools.append(len(images)))

    def note(z, client, own):
        sizes.append(torch.bincount(client).tolist())
        return real(z, client, own)

    monkeypatch.setattr(separation, "geometry", note)
    list(separation.measure(checkpoint, model, data))
    assert pools == [30, 30] and sizes == [[4, 4, 4]] * (2 * (8 + 3))


@pytest.mark.parametrize("batch_size", [60, 20])
def test_batchnorms_statistics_are_those_of_the_batches(batch_size):
    """Of one batch its mean and unbiased variance, of three their means; weights untouched."""
    images = draw_patterns(60, 10).train_x
    model = train.make_model({"seed": 0, "width": 2, "projector": True})
    norms = {n: part for n, part in model.named_modules() if hasattr(part, "running_mean")}
    for part in norms.values():  # what a round leaves behind
        part.running_mean.normal_(), part.num_batches_tracked.fill_(7)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    inputs = {name: [] for name in norms}
    hooks = [
        part.register_forward_pre_hook(lambda _, x, name=name: inputs[name].append(x[0].double()))
        for name, part in norms.items()
    ]
    separation.recalibrate(model.eval(), images, keyed_generator(0), batch_size)
    for hook in hooks:
        hook.remove()
    assert not model.training and all(part.momentum == 0.1 for part in norms.values())
    for name, part in norms.items():
        columns = [x.transpose(0, 1).flatten(1) for x in inputs[name]]
        assert len(columns) == 60 // batch_size and len(inputs[name][0]) == 2 * batch_size
        mean = sum(x.mean(1) for x in columns) / len(columns)
        variance = sum(x.var(1) for x in columns) / len(columns)
        assert torch.allclose(part.running_mean.double(), mean, atol=1e-6)
        assert torch.allclose(part.running_var.double(), variance, rtol=1e-4)
    for name, value in model.state_dict().items():
        if "running_" not in name and "num_batches" not in name:
            assert torch.equal(value, before[name]), name


def test_batchnorm_sees_two_views_of_every_image():
    seen, images = [], draw_patterns(50, 10).train_x
    model = train.make_model({"seed": 0, "width": 2, "projector": True})
    model.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    separation.recalibrate(model, images, keyed_generator(1))
    draws = keyed_generator(1)
    order = torch.randperm(50, generator=draws)
    assert model.training and torch.equal(seen[0], torch.cat(two_views(images[order], draws)))


def test_the_round_is_the_one_that_resuming_trains():
    _, average = next_states(*trained("--local-epochs", "2"))
    baselines.main(["--resume", LAST, "--rounds", "2", "--device", "cpu"])
    resumed = torch.load(LAST, weights_only=True)["model"]
    assert all(torch.equal(average[name], value) for name, value in resumed.items())


def test_the_rate_is_that_of_the_round(monkeypatch):
    checkpoint, model, data = trained()
    rates = []

    def note(model, optimizer, *_, **__):
        rates.append(optimizer.param_groups[0]["lr"])
        return {"left_out": []}

    monkeypatch.setattr(separation, "federated_round", note)
    for method, done in (("ssd", 1), ("ssd-cosine", 1), ("ssd-cosine", 3)):
        config = {**checkpoint["config"], "method": method, "rounds": 3}
        separation.local_states(model, config, data.train_x, checkpoint["split"], done)
    # (1 + cos(pi / 3)) / 2; of a finished run the last round's, (1 + cos(2 pi / 3)) / 2
    assert rates == pytest.approx([0.03, 0.03 * 0.75, 0.03 * 0.25])


def test_one_round_is_not_compiled(monkeypatch):
    checkpoint, model, data = trained()
    monkeypatch.setattr(torch, "compile", lambda *_, **__: pytest.fail("compiled"))
    config = {**checkpoint["config"], "compile": True}
    separation.local_states(model, config, data.train_x, checkpoint["split"], 1)


def test_a_client_that_diverges_is_not_averaged_in(monkeypatch, capsys):
    def poisoned(config, clients, device):
        real = train.make_loss(config, clients, device)

        def loss(model, batch, k, *rest):
            value, terms = real(model, batch, k, *rest)
            return value * (float("nan") if k == 1 else 1), terms

        return loss

    train.main([*SMALL, "--out", "runs/a-seed0"])
    monkeypatch.setattr(separation, "make_loss", poisoned)
    with pytest.raises(SystemExit) as stop:
        separation.main([LAST, "--device", "cpu"])
    assert stop.value.code == 2 and "clients [1] diverge" in capsys.readouterr().err
    assert not Path("controls.jsonl").exists()


def test_one_client_is_its_own_average_and_has_no_others():
    values = {}
    for line in separation.measure(*trained("--clients", "1")):
        values.setdefault(line["space"], {})[line.pop("variant")] = line
    for found in values.values():
        assert found["own"].keys() >= {"total", "intra", "own_share"}
        assert not found["own"].keys() & {"inter", "cosine"}
        for variant in ("average", "next-network", "one-network"):
            for key in ("total", "intra", "own_share"):
                assert found[variant][key] == found["own"][key]


def test_the_script_measures_once_and_prints_mean_spread_and_differences(capsys):
    for seed in "01":
        for method in ("ssd", "pd"):
            out = f"runs/{method}-seed{seed}"
            train.main([*SMALL, "--method", method, "--seed", seed, "--out", out])
    runs = [f"runs/{method}-seed{seed}/last.pt" for method in ("ssd", "pd") for seed in "01"]
    capsys.readouterr()
    separation.main([*runs, "--device", "cpu"])
    printed = capsys.readouterr().out
    separation.main(runs)
    assert printed.endswith(capsys.readouterr().out) and printed.count("measured") == 4
    lines = [json.loads(line) for line in Path("controls.jsonl").read_text().splitlines()]
    names = {"run": "runs/pd-seed1", "row": "pd", "seed": 1, "round": 1, "epochs": 1}
    assert len(lines) == 4 * 18 and sum(names.items() <= line.items() for line in lines) == 18
    ssd, pd = (
        [line["inter"] for line in lines if (line["row"], line["variant"], line["space"]) == key]
        for key in (("ssd", "average", "z"), ("pd", "average", "z"))
    )
    cells = [f"{sum(v) / 2:.3f} ± {abs(v[0] - v[1]) / 2**0.5:.3f}" for v in (ssd, pd)]
    assert "| inter-client −L_uniform of z | ssd | pd |" in printed
    assert f"| round 1, average | {' | '.join(cells)} |" in printed
    separation.main(["--minus", "pd"])
    apart = np.array(ssd) - pd
    half = 12.706 * apart.std(ddof=1) / 2**0.5
    ends = f"({apart.mean() - half:+.3f} to {apart.mean() + half:+.3f})"
    cell = f"{apart.mean():+.3f} {ends}".replace("-", "−")
    assert f"| round 1, average | {sum(pd) / 2:.3f} | {cell} |" in capsys.readouterr().out


def test_mistakes_are_one_line(capsys):
    baselines.main([*SMALL, "--method", "fedprox", "--out", "runs/fedprox"])
    capsys.readouterr()
    for flags, words in (
        (["nowhere.pt"], "nowhere.pt is not a checkpoint"),
        (["runs/fedprox/last.pt"], "is of fedprox"),
        (["nowhere.pt", "--out", "runs/fedprox/metrics.jsonl"], "holds something else"),
    ):
        with pytest.raises(SystemExit) as stop:
            separation.main(flags)
        err = capsys.readouterr().err
        assert stop.value.code == 2 and words in err and len(err.strip().splitlines()) == 1
    assert not Path("controls.jsonl").exists()
