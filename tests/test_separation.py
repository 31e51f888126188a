"""extras/separation.py: a round's local and averaged networks, measured against slow oracles."""

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
from data import draw_patterns
from eval import encode, load_checkpoint
from federated import average_states

SMALL = "--dataset patterns --width 2 --batch-size 16 --clients 3 --alpha 1 --rounds 1".split()
SMALL += "--local-epochs 1 --lr 0.03 --device cpu --no-amp".split()
LAST = "runs/a-seed0/last.pt"


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    """120 patterns, and an empty folder to work in."""
    monkeypatch.setattr("data.draw_patterns", lambda: draw_patterns(120, 40))
    monkeypatch.chdir(tmp_path)


def measured(*flags, epochs=1, count=500, views=False, run="runs/a-seed0"):
    """A run of one round, and what separation.py finds: checkpoint, {(when, part): values}."""
    train.main([*SMALL, *flags, "--out", run])
    checkpoint, model = load_checkpoint(f"{run}/last.pt")
    images = draw_patterns(120, 40).train_x
    found = list(separation.measure(checkpoint, model, images, epochs, count, views))
    return checkpoint, {(values.pop("when"), values.pop("part")): values for values in found}


@pytest.mark.parametrize("part", "hz")
def test_values_against_a_loop_over_pairs(part):
    """h or z of local networks and their average, from the images up, one pair after the other."""
    checkpoint, found = measured("--method", "dsr")
    split, (_, model) = checkpoint["split"], load_checkpoint(LAST)
    images = draw_patterns(120, 40).train_x
    states = separation.local_states(model, checkpoint["config"], images, split, 1, 1)
    average = average_states(states, list(map(len, split)))
    for when, networks in (("before", states), ("after", [average] * 3)):
        z = []
        for state, index in zip(networks, split):
            model.load_state_dict(state)
            u = encode(model, images[index], amp=False)["hz".index(part)].double().numpy()
            z.append(u / np.linalg.norm(u, axis=1, keepdims=True))
        pairs = {(i, j): [] for i in range(3) for j in range(3)}
        for i, j in pairs:
            for a, one in enumerate(z[i]):
                for b, other in enumerate(z[j]):
                    if (i, a) != (j, b):
                        pairs[i, j].append(np.exp(-2 * np.sum((one - other) ** 2)))
        means = [rows.mean(0) / np.linalg.norm(rows.mean(0)) for rows in z]
        intra = sum((pairs[k, k] for k in range(3)), [])
        inter = sum((pairs[i, j] for i, j in pairs if i != j), [])
        values = found[when, part]
        assert values["total"] == pytest.approx(-np.log(np.mean(intra + inter)), abs=1e-5)
        assert values["intra"] == pytest.approx(-np.log(np.mean(intra)), abs=1e-5)
        assert values["inter"] == pytest.approx(-np.log(np.mean(inter)), abs=1e-5)
        cosine = np.mean([means[0] @ means[1], means[0] @ means[2], means[1] @ means[2]])
        assert values["cosine"] == pytest.approx(cosine, abs=1e-5)
        for (i, j), kernel in pairs.items():
            assert values["matrix"][i][j] == pytest.approx(-np.log(np.mean(kernel)), abs=1e-4)
    assert found["before", part] != found["after", part]


def test_the_round_is_the_one_that_resuming_trains():
    checkpoint, _ = measured()
    _, model = load_checkpoint(LAST)
    split, images = checkpoint["split"], draw_patterns(120, 40).train_x
    states = separation.local_states(model, checkpoint["config"], images, split, 1, 1)
    average = average_states(states, list(map(len, split)))
    train.main(["--resume", LAST, "--rounds", "2", "--device", "cpu"])
    resumed = torch.load(LAST, weights_only=True)["model"]
    assert all(torch.equal(average[name], value) for name, value in resumed.items())


def test_the_rate_is_that_of_the_round(monkeypatch):
    checkpoint, _ = measured()
    rates, (_, model) = [], load_checkpoint(LAST)

    def note(model, optimizer, *_, **__):
        rates.append(optimizer.param_groups[0]["lr"])
        return {"left_out": []}

    monkeypatch.setattr(separation, "federated_round", note)
    for method, done in (("ssd", 1), ("ssd-cosine", 1), ("ssd-cosine", 3)):
        config = {**checkpoint["config"], "method": method, "rounds": 3}
        separation.local_states(
            model, config, draw_patterns(120, 40).train_x, checkpoint["split"], done, 1
        )
    # (1 + cos(pi / 3)) / 2; of a finished run the last round's, (1 + cos(2 pi / 3)) / 2
    assert rates == pytest.approx([0.03, 0.03 * 0.75, 0.03 * 0.25])


def test_one_round_is_not_compiled(monkeypatch):
    checkpoint, _ = measured()
    monkeypatch.setattr(torch, "compile", lambda *_, **__: pytest.fail("compiled"))
    config, (_, model) = {**checkpoint["config"], "compile": True}, load_checkpoint(LAST)
    separation.local_states(
        model, config, draw_patterns(120, 40).train_x, checkpoint["split"], 1, 1
    )


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
    assert not Path("separation.jsonl").exists()


@pytest.mark.parametrize("flags, epochs", [(["--clients", "1"], 1), ([], 0)])
def test_averaging_changes_nothing_with_one_client_or_equal_networks(flags, epochs):
    _, found = measured(*flags, epochs=epochs, count=20)
    for part in "hz":
        assert found["before", part] == found["after", part]
        assert ("inter" in found["after", part]) == (not flags)


def test_hard_separation_makes_clients_orthogonal_where_it_is_applied():
    _, hsd = measured("--method", "hsd", views=True)
    _, pd = measured("--method", "pd", views=True, run="runs/b")
    for when in ("before", "after"):
        assert hsd[when, "z"]["inter"] == pytest.approx(4)
        assert hsd[when, "h"]["inter"] < 3.9 and pd[when, "z"]["inter"] < 3.9
        assert 0 < pd[when, "z"]["alignment"] < 4


def test_the_script_measures_once_and_prints_mean_and_spread(capsys):
    for seed in "01":
        train.main([*SMALL, "--seed", seed, "--out", f"runs/ssd-seed{seed}"])
    command = ["runs/ssd-seed0/last.pt", "runs/ssd-seed1/last.pt", "--images", "20", "--device"]
    separation.main([*command, "cpu"])
    printed = capsys.readouterr().out
    separation.main([*command, "cpu"])
    assert printed.endswith(capsys.readouterr().out) and "measured" in printed
    lines = [json.loads(line) for line in Path("separation.jsonl").read_text().splitlines()]
    assert len(lines) == 8 and {len(line["matrix"]) for line in lines} == {3}
    z = [line["total"] for line in lines if (line["part"], line["when"]) == ("z", "after")]
    spread = abs(z[0] - z[1]) / 2**0.5  # of two values
    row = f"| ssd, round 1, E = 1, after | {sum(z) / 2:.3f} ± {spread:.3f} | "
    assert row in printed.split("| z |")[1]


def test_mistakes_are_one_line(capsys):
    baselines.main([*SMALL, "--method", "fedprox", "--out", "runs/fedprox"])
    train.main([*SMALL, "--out", "runs/a-seed0"])
    line = {"matrix": [], "rounds": 1, "epochs": 1, "images": 500, "views": False}
    for name, run in (("other", "runs/wide/a-seed1"), ("kept", "runs/a-seed1")):
        Path(f"{name}.jsonl").write_text(json.dumps({**line, "run": run}))
    capsys.readouterr()
    for flags, words in (
        (["nowhere.pt"], "no checkpoint at nowhere.pt"),
        (["runs/fedprox/last.pt"], "is of fedprox"),
        (["runs/fedprox/last.pt", "--images", "1"], "at least 2"),
        (["nowhere.pt", "--out", "runs/fedprox/metrics.jsonl"], "holds something else"),
        ([LAST, "--out", "other.jsonl"], "of another folder, --images or --views: choose"),
        ([LAST, "--views", "--out", "kept.jsonl"], "of another folder, --images or --views"),
    ):
        with pytest.raises(SystemExit) as stop:
            separation.main(flags)
        err = capsys.readouterr().err
        assert stop.value.code == 2 and words in err and len(err.strip().splitlines()) == 1
    assert not Path("separation.jsonl").exists()
