"""extras/figures.py: small files from runs and records, and one line for every mistake."""

import json
from pathlib import Path

import diagrams
import figures
import numpy as np
import pytest
import study
import torch

import train
from data import draw_patterns

SMALL = "--dataset patterns --width 2 --batch-size 16 --clients 3 --alpha 1 --rounds 2".split()
SMALL += "--local-epochs 1 --device cpu --no-amp".split()
METHOD = ["d_k.svg", "pipeline.svg", "stopgrad.svg"]
FIRST = ["first_run.jsonl", "first_run.svg"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs of one row, and the scores of them, of another row and of an untrained one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data.draw_patterns", lambda: draw_patterns(120, 40))
        patch.chdir(tmp_path_factory.mktemp("study"))
        for seed in (0, 1):
            train.main([*SMALL, "--seed", str(seed), "--out", f"runs/ssd-seed{seed}"])
        values = {"alignment_z": 1.5, "uniformity_z": -3.0}
        curves = {f"{key}_rounds": [1.0, 2.0] for key in study.CURVES}
        lines = [
            {"row": "ssd", "seed": 0, "transfer": None, **values, **curves},
            {"row": "ssd", "seed": 1, "transfer": None, **values, **curves},
            {"row": "ssd", "seed": 0, "transfer": "elsewhere", **values, **curves},
            {"row": "pd", "seed": 0, "transfer": None, **values, **curves},
            {"row": "ssd --rounds 0", "seed": 0, "transfer": None, **values},
        ]
        Path("scores.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        yield


def names(folder):
    return sorted(path.name for path in Path(folder).iterdir())


def separation_lines():
    """Lines as extras/separation.py writes them, of two clients and of several seeds and rounds."""
    for i, row in enumerate(("fedalignuniform", "ssd", "hsd")):
        for r, seed in ((2, 0), (5, 0), (5, 1), (20, 0))[: 4 - i]:
            for variant in ("own", "average", "average-equal", "same-images"):
                line = {"row": row, "round": r, "seed": seed, "epochs": 1, "variant": variant}
                yield {**line, "space": "h", "own_share": 0.9}
                shares = [[0.1 * i, 0.4], [0.3, 0.1 * seed]]
                yield {**line, "space": "z", "shares": shares, "weights": [0.2, 0.8]}


def test_all_figures_the_same_again_and_small(runs):
    pytest.importorskip("matplotlib")
    Path("lines.jsonl").write_text("\n".join(map(json.dumps, separation_lines())))
    flags = ["scores.jsonl", "--separation", "lines.jsonl"]
    flags += ["--first-run", "runs/ssd-seed0", "runs/ssd-seed1", "--out"]
    figures.main([*flags, "one"])
    figures.main([*flags, "two"])
    assert names("one") == sorted([*METHOD, *FIRST, "scores_rounds.svg", "separation.svg"])
    for name in names("one"):
        assert Path("one", name).read_bytes() == Path("two", name).read_bytes()
        assert Path("one", name).stat().st_size < 100_000
    rounds = Path("one/scores_rounds.svg").read_text()
    assert ">ssd<" in rounds and ">pd<" in rounds and ">ssd --rounds 0<" not in rounds
    figures.main(["scores.jsonl", "--out", "one", "--rows", "pd"])
    assert ">ssd<" not in Path("one/scores_rounds.svg").read_text()
    figures.main(["scores.jsonl", "--out", "none", "--rows", "ssd --rounds 0"])
    assert names("none") == METHOD


def test_the_first_runs_rounds_are_kept_with_the_untrained_network(runs, capsys):
    pytest.importorskip("matplotlib")
    figures.main(["--first-run", "runs/ssd-seed0", "runs/ssd-seed1", "--out", "first"])
    lines = figures.read(Path("first/first_run.jsonl"))
    assert [(line["seed"], line["round"]) for line in lines] == [
        (seed, r) for seed in (0, 1) for r in (0, 1, 2)
    ]
    metrics = figures.read(Path("runs/ssd-seed1/metrics.jsonl"))
    kept = set(metrics[1]) - {"lr", "seconds", "clients", "left_out"}
    assert lines[5] == {"method": "ssd", "seed": 1, **{name: metrics[1][name] for name in kept}}
    train.main([*SMALL, "--seed", "1", "--rounds", "0", "--out", "runs/untrained"])
    assert f"round   0/0  kNN {lines[3]['knn']:.1f} %" in capsys.readouterr().out
    Path("first/first_run.svg").unlink()
    figures.main(["--out", "first"])  # from the record alone
    assert names("first") == sorted(METHOD + FIRST)


def test_the_forest_needs_nothing_but_the_records(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    figures.main(["--forest", "--out", str(tmp_path)])
    text = (tmp_path / "forest.svg").read_text()
    assert text.count(", n = ") >= 10  # the claims on LP
    assert names(tmp_path) == sorted([*METHOD, "forest.svg"])


def test_numbers_are_rounded_where_they_are_long():
    shortened = figures.shorten('x="123.456789" y="7.5" opacity="0.1449" points="1.5 100.25"')
    assert shortened == 'x="123.5" y="7.5" opacity="0.14" points="1.5 100.2"'


@pytest.mark.parametrize("a", [2.0, 10.0, 100.0])
def test_without_stopgrad_dsr_drives_small_own_shares_to_zero(a):
    """The loss peaks at 1 / (1 + a): below, its descent leaves the client's dimensions."""
    share = torch.linspace(1e-4, 1 - 1e-4, 100_001, dtype=torch.float64)
    loss, stopped, through = diagrams.dsr_slopes(share, a)
    cosine = (a * share + 1 - share) / (a**2 * share + 1 - share).sqrt()
    assert torch.allclose(loss, 2 - 2 * cosine, atol=1e-12)
    peak = share[loss.argmax()].item()
    assert peak == pytest.approx(1 / (1 + a), abs=2e-5)
    assert through[share < peak - 1e-4].max() < 0 < through[share > peak + 1e-4].min()
    assert stopped.min() > 0  # with stopgrad every point comes nearer
    # ds/dt of both by hand: 4 s (1 - s) (a - 1) / n and 8 s (1 - s) d cosine / ds
    n, slope = (a**2 * share + 1 - share).sqrt(), torch.gradient(cosine, spacing=(share,))[0]
    middle = (share > 0.01) & (share < 0.99)
    assert torch.allclose(stopped, 4 * share * (1 - share) * (a - 1) / n, atol=1e-12)
    by_hand = (8 * share * (1 - share) * slope)[middle]
    assert torch.allclose(through[middle], by_hand, atol=1e-3)


def test_a_band_is_mean_and_spread():
    plt = pytest.importorskip("matplotlib.pyplot")
    plt.switch_backend("agg")
    _, axis = plt.subplots()
    figures.band(axis, [1, 2], np.array([[1.0, 5.0], [3.0, 5.0]]))
    assert axis.lines[0].get_ydata().tolist() == [2, 5]
    outline = axis.collections[0].get_paths()[0].vertices[:, 1]
    assert outline.min() == pytest.approx(2 - 2**0.5) and outline.max() == 5


def test_the_separations_panels_are_of_the_last_common_round_and_of_all():
    plt = pytest.importorskip("matplotlib.pyplot")
    plt.switch_backend("agg")
    figure = figures.separation(plt, list(separation_lines()))
    networks, averages, law = figure.get_axes()
    # Round 5, seed 0; the client with 80 % of the images first.
    shown = [[float(text.get_text()) for text in axis.texts] for axis in (networks, averages)]
    assert shown == [[0, 30, 40, 10], [20, 20, 20, 15]]
    diagonal, points = law.lines
    assert diagonal.get_xdata().tolist() == diagonal.get_ydata().tolist()
    assert len(points.get_xdata()) == 2 * 3  # two clients, three checkpoints of SSD
    with pytest.raises(ValueError, match="no round of both"):
        figures.separation(plt, [line for line in separation_lines() if line["row"] != "ssd"])


def test_a_figure_shows_the_scores_on_the_runs_own_data_set(runs):
    rows = figures.find_rows(Path("scores.jsonl"))
    found = {row: [line["seed"] for line in lines] for row, lines in rows.items()}
    assert found == {"ssd": [0, 1], "pd": [0], "ssd --rounds 0": [0]}


def test_mistakes_are_one_line(runs, capsys):
    pytest.importorskip("matplotlib")
    train.main([*SMALL, "--method", "pd", "--rounds", "0", "--out", "runs/pd"])
    capsys.readouterr()
    (line, *_) = figures.read(Path("scores.jsonl"))
    Path("transfer.jsonl").write_text(json.dumps({**line, "transfer": "cifar10"}))
    for flags, words in (
        (["nowhere.jsonl"], "nowhere.jsonl"),
        (["runs"], "runs"),
        (["runs/ssd-seed0/metrics.jsonl"], "metrics.jsonl is not a scores.jsonl of extras/study"),
        (["scores.jsonl", "--rows", "dsr"], "no row dsr in scores.jsonl: it has ssd, pd"),
        (["transfer.jsonl"], "transfer.jsonl has no scores on a study's own data set"),
        (["--rows", "pd"], "--rows is of a study's scores: give their file before"),
        (["--separation", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--separation", "scores.jsonl"], "scores.jsonl is not a file of extras/separation.py"),
        (["--first-run", "nowhere"], "nowhere/config.json"),
    ):
        with pytest.raises(SystemExit) as stop:
            figures.main([*flags, "--out", "figures"])
        err = capsys.readouterr().err
        assert stop.value.code == 2 and words in err and len(err.strip().splitlines()) == 1
    assert not Path("figures").exists()
