"""train.py: the paper's run is the default; the run folder; resuming; a line for every mistake."""

import json
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import files, lines, same, weights
from PIL import Image

import data
import eval as evaluation
import train
from federated import keyed_generator
from losses import scaling_vectors, ssd_loss
from model import SSDNet, load_checkpoint


def config_of(flags=""):
    """Flags -> config of a new run."""
    config, _ = train.read_config(train.build_parser(), flags.split())
    return config


# ------------------------------------------------------------------ the paper's run

# Fang et al. 2025; the learning rate, 0.2 * 128 / 256, is constant in their code
PAPER = """--dataset cifar10 --alpha 0.1 --participation 1 --rounds 100 --local-epochs 5
    --method ssd --beta 1 --gamma 1 --delta 0.1 --scale 10 --projector --lr 0.1 --momentum 0.9
    --weight-decay 0.0001 --batch-size 128 --width 64 --image-size 32 --seed 0"""


def test_the_bare_command_is_the_papers_run():
    config = config_of()
    assert config == config_of(PAPER)
    for name in "limit", "split_file", "clients", "amp", "compile":  # all images; the rest: below
        assert config[name] is None


def test_ten_clients_are_the_default(small):
    split = train.make_split(config_of(), torch.arange(500) % 10, {"split": None})
    assert len(split) == 10
    expected = data.dirichlet_split(torch.arange(500) % 10, 10, 0.1, seed=0)
    assert all((one == other).all() for one, other in zip(split, expected))


@pytest.mark.parametrize(
    "method, gamma, delta",
    [("ssd", 1, 0.1), ("dsr", 1, 0), ("pd", 0, 0.1), ("fedalignuniform", 0, 0), ("hsd", 0, 0)],
)
def test_a_row_of_the_ablation_is_its_weights(method, gamma, delta, small):
    assert config_of(f"--method {method}")["gamma"] == gamma
    assert config_of(f"--method {method}")["delta"] == delta
    assert config_of(f"--method {method} --gamma 0.3 --delta 0")["gamma"] == 0.3
    train.main([*small, "--method", method, "--out", "runs/a"])
    (line,) = lines()
    terms = line["align"] + line["uniform"] + gamma * line["dsr"] + delta * line["distill"]
    assert line["loss"] == pytest.approx(terms, abs=1e-5)
    assert (method == "hsd") == (abs(line["dsr"]) < 1e-6)  # z has own dimensions only


def test_a_client_trains_with_sgd_of_the_papers_momentum_and_weight_decay():
    """Three steps of the optimiser on ||w||^2, against the formula: v <- 0.9 v + g + 1e-4 w."""
    net = torch.nn.Linear(3, 1, bias=False)
    w, v = net.weight.detach().double().clone(), 0.0
    optimizer = train.make_optimizer(config_of(), net)
    for _ in range(3):
        optimizer.zero_grad()
        net.weight.square().sum().backward()
        optimizer.step()
        v = 0.9 * v + 2 * w + 1e-4 * w
        w = w - 0.1 * v
    assert torch.allclose(net.weight.double(), w, atol=1e-6)


@pytest.mark.parametrize("flag", ["--lr 0.11", "--momentum 0", "--weight-decay 0"])
def test_the_optimisers_flags_reach_the_clients(flag, run, small):
    train.main([*small, *flag.split(), "--out", "runs/b"])
    assert not same(weights(run), weights("runs/b/last.pt"))


def test_convolutions_are_chosen_by_their_time(small, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    train.prepare(config_of(" ".join(small)), {"split": None})
    assert torch.backends.cudnn.benchmark  # the shapes of training are fixed


def test_a_step_is_two_views_the_network_and_the_objective():
    """The loss that a client trains with, against a step written out with torch's own functions."""
    flags = "--width 2 --beta 0.5 --gamma 2 --delta 3 --scale 7 --seed 4 --no-amp"
    config, net = config_of(flags), SSDNet(2)
    images = torch.randint(256, (6, 3, 32, 32), dtype=torch.uint8)
    loss = train.make_loss(config, 3, torch.device("cpu"))
    value, terms = loss(net, images, 1, keyed_generator(5), None)

    d_k = scaling_vectors(3, 16, 7.0, seed=4)[1]
    x1, x2 = data.two_views(images, keyed_generator(5))
    h1, u1 = net(x1)
    h2, u2 = net(x2)
    z = F.normalize(torch.stack([u1, u2]).double(), dim=2)
    target = F.normalize(z * d_k, dim=2).detach()
    kernel = torch.stack([torch.pdist(view).square().mul(-2).exp().mean().log() for view in z])
    log_p, log_q = torch.stack([h1, h2]).log_softmax(2), torch.stack([u1, u2]).log_softmax(2)
    align = (z[0] - z[1]).square().sum(1).mean()
    dsr = (z - target).square().sum(2).mean()
    distill = (log_p.exp() * (log_p - log_q)).sum(2).mean()
    expected = align + 0.5 * kernel.mean() + 2 * dsr + 3 * distill
    assert value.item() == pytest.approx(expected.item(), abs=1e-5)
    by_hand = {"align": align, "uniform": kernel.mean(), "dsr": dsr, "distill": distill}
    for name, term in by_hand.items():
        assert terms[name].item() == pytest.approx(term.item(), abs=1e-5)


def test_the_flags_reach_the_rounds():
    flags = "--participation 0.4 --seed 3 --local-epochs 2 --batch-size 8 --rounds 7"
    options = train.round_options(config_of(flags))
    options.pop("on_client_start")
    assert options == {"participation": 0.4, "seed": 3, "local_epochs": 2, "batch_size": 8}


def test_labels_reach_no_part_of_training(small, patterns, monkeypatch):
    train.main([*small, "--limit", "60", "--out", "runs/a"])
    turned = patterns._replace(train_y=patterns.train_y.flip(0), test_y=patterns.test_y.flip(0))
    monkeypatch.setattr(data, "draw_patterns", lambda: turned)
    split = ["--limit", "60", "--split-file", "runs/a/split.json"]
    train.main([*small, *split, "--out", "runs/b"])
    assert same(weights("runs/a/last.pt"), weights("runs/b/last.pt"))


def test_training_moves_the_loss_and_the_weights(small):
    flags = "--clients 2 --alpha 100 --rounds 2 --local-epochs 3 --lr 0.02 --width 4 --out runs/a"
    train.main([*small, *flags.split()])
    torch.manual_seed(0)
    assert not same(weights(), SSDNet(4).state_dict())
    assert lines()[-1]["loss"] < lines()[0]["loss"] - 0.15
    assert lines()[-1]["uniform"] < lines()[0]["uniform"] - 0.3


# ------------------------------------------------------------------ the run folder


def test_a_run_leaves_its_folder_and_says_what_is_next(small, capsys):
    train.main([*small, "--rounds", "2", "--out", "runs/a"])
    printed = capsys.readouterr().out
    assert "round   0/2" in printed and "round   2/2" in printed
    assert "python eval.py runs/a/last.pt" in printed and "--resume" in printed
    names = sorted(path.name for path in Path("runs/a").iterdir())
    assert names == ["config.json", "last.pt", "metrics.jsonl", "split.json"]
    assert [line["round"] for line in lines()] == [1, 2]
    terms = "loss align uniform dsr distill"
    for key in f"{terms} knn uniformity_h uniformity_z seconds lr".split():
        assert isinstance(lines()[0][key], float), key
    assert lines()[0]["clients"] == [0, 1, 2] and lines()[0]["left_out"] == []
    config = json.loads(Path("runs/a/config.json").read_text())
    assert config["gamma"] == 1 and config["versions"]["torch"] == torch.__version__
    split = json.loads(Path("runs/a/split.json").read_text())
    assert sorted(sum(split.values(), [])) == list(range(120))
    content = torch.load("runs/a/last.pt", weights_only=True)
    assert set(content) == {"config", "split", "model", "history"} and content["history"] == lines()
    SSDNet(2).load_state_dict(content["model"])


def test_runs_without_rounds_are_untrained_and_have_their_own_folders(small):
    train.main([*small, "--rounds", "0"])
    train.main([*small, "--rounds", "0"])
    train.main([*small, "--rounds", "0", "--seed", "1"])
    names = sorted(path.name for path in Path("runs").iterdir())
    assert names == ["patterns-ssd-k3-seed0", "patterns-ssd-k3-seed0-2", "patterns-ssd-k3-seed1"]
    torch.manual_seed(0)
    assert same(weights(f"runs/{names[1]}/last.pt"), SSDNet(2).state_dict())
    assert lines(f"runs/{names[1]}") == []


def test_the_same_flags_give_the_same_weights_and_another_seed_others(run, small):
    for name, seed in (("b", "0"), ("c", "1")):
        train.main([*small, "--seed", seed, "--out", f"runs/{name}"])
    assert same(weights(run), weights("runs/b/last.pt"))
    assert not same(weights(run), weights("runs/c/last.pt"))


def test_limit_is_a_fixed_subset_and_its_split_file_reads_back(small):
    train.main([*small, "--limit", "60", "--out", "runs/a"])
    split = json.loads(Path("runs/a/split.json").read_text())
    chosen = sorted(sum(split.values(), []))
    assert len(set(chosen)) == 60 and chosen != list(range(60)) and max(chosen) < 120
    Path("bare.json").write_text(json.dumps(list(split.values())))
    for name in ("runs/a/split.json", "bare.json"):
        train.main([*small, "--limit", "60", "--split-file", name, "--out", "runs/b"])
        assert same(weights("runs/a/last.pt"), weights("runs/b/last.pt"))
        shutil.rmtree("runs/b")
    train.main([*small, "--limit", "60", "--seed", "1", "--rounds", "0", "--out", "runs/c"])
    other = json.loads(Path("runs/c/split.json").read_text())
    assert sorted(sum(other.values(), [])) == chosen and other != split


def test_a_run_that_diverges_stops_with_status_1_and_keeps_its_last_round(run, monkeypatch, capsys):
    def not_a_number(model, images, *_):
        return model(images.float())[0].sum() * float("nan"), {}

    monkeypatch.setattr(train, "ssd_step", not_a_number)
    before = weights(run)
    with pytest.warns(UserWarning), pytest.raises(SystemExit) as stop:
        train.main(["--resume", run, "--rounds", "2"])
    line = capsys.readouterr().err.strip()
    assert stop.value.code == 1 and len(line.splitlines()) == 1
    assert "every client" in line and f"--resume {run}" in line
    assert same(weights(run), before) and len(lines()) == 1


# ------------------------------------------------------------------ resuming


def test_resuming_ends_bit_equal_with_one_line_a_round(small):
    train.main([*small, "--rounds", "3", "--out", "runs/whole"])
    train.main([*small, "--rounds", "1", "--out", "runs/a"])
    with open("runs/a/metrics.jsonl", "a") as file:  # killed after a line, before its checkpoint
        file.write('{"round": 2, "half a li')
    Path("runs/a").rename("runs/moved")
    train.main(["--resume", "runs/moved/last.pt", "--rounds", "3"])
    assert same(weights("runs/whole/last.pt"), weights("runs/moved/last.pt"))
    for one, other in zip(lines("runs/whole"), lines("runs/moved"), strict=True):
        for name in ("round", "loss", "align", "uniform", "knn", "uniformity_h", "clients"):
            assert one[name] == other[name]


def test_flags_that_may_change_are_in_the_metrics_of_their_round(run, small):
    train.main(["--resume", run, "--rounds", "2", "--lr", "0.3", "--batch-size", "8"])
    before, after = lines()
    assert (before["lr"], before["batch_size"], before["rounds"]) == (0.1, 16, 1)
    assert (after["lr"], after["batch_size"], after["rounds"]) == (0.3, 8, 2)
    assert json.loads(Path("runs/a/config.json").read_text())["lr"] == 0.3


STAYS = "--clients 4,--method dsr,--width 4,--seed 1,--limit 60,--alpha 0.5,--gamma 0.5"
STAYS += ",--scale 5,--out runs/b,--image-size 48"


@pytest.mark.parametrize("flag", STAYS.split(","))
def test_a_resumed_run_stays_the_same_run(flag, run, mistake):
    before = files()
    mistake(train.main, ["--resume", run, "--rounds", "2", *flag.split()], flag)
    assert files() == before


def test_a_run_is_not_shortened(run, mistake):
    mistake(train.main, ["--resume", run, "--rounds", "0"], "--rounds 0: the run has 1 already")


def make_folder(root):
    """An image folder of two classes, twelve training and four test images each."""
    for part, count in (("train", 12), ("test", 4)):
        for name in ("cats", "dogs"):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                image = np.random.default_rng(i).integers(256, size=(40, 36, 3), dtype=np.uint8)
                Image.fromarray(image).save(root / part / name / f"{i:02d}.png")


def test_a_folders_images_are_known_by_their_names_wherever_they_lie(small, tmp_path, mistake):
    make_folder(tmp_path / "pictures")
    flags = "--dataset pictures --clients 2 --batch-size 4 --image-size 24 --out runs/a"
    train.main([*small, "--alpha", "1000", *flags.split()])
    assert load_checkpoint("runs/a/last.pt")[0]["config"]["image_size"] == 24
    evaluation.main(["runs/a/last.pt", "--dataset", "patterns", "--epochs", "1", "--finetune"])
    Path("pictures").rename("moved")
    again = ["--resume", "runs/a/last.pt", "--rounds", "2"]
    mistake(train.main, again, "'pictures' is neither a folder")
    train.main([*again, "--dataset", "./moved"])
    (tmp_path / "moved/train/cats/00.png").rename(tmp_path / "moved/train/cats/99.png")
    mistake(train.main, [*again, "--dataset", "moved", "--rounds", "3"], "has other images")


def test_on_a_terminal_a_short_line_says_who_trains(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    train.show_client(None, 7)
    printed = capsys.readouterr().out
    assert "client 7" in printed and printed.endswith("\r") and len(printed) <= 80


# ------------------------------------------------------------------ a loss of your own


def own_objective(h1, u1, h2, u2, d_k, **weights):
    total, terms = ssd_loss(h1, u1, h2, u2, d_k, **weights)
    own = h1.square().mean()
    names = {"own": own.detach(), "knn": torch.tensor(-7.0), "round": torch.tensor(-7.0)}
    return total + own, {**terms, **names}


def test_a_run_with_an_own_loss_bears_the_scripts_name(small, monkeypatch, mistake):
    monkeypatch.setattr(sys, "argv", ["somewhere/mine.py"])
    train.main(small, objective=own_objective)
    last, (line,) = "runs/patterns-mine-k3-seed0/last.pt", lines("runs/patterns-mine-k3-seed0")
    total = line["align"] + line["uniform"] + line["dsr"] + 0.1 * line["distill"] + line["own"]
    assert line["loss"] == pytest.approx(total, abs=1e-5)
    assert line["round"] == 1 and line["knn"] >= 0  # a term does not take the place of a score
    train.main(["--resume", last, "--rounds", "2"], objective=own_objective)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    mistake(train.main, ["--resume", last, "--rounds", "3"], "another script's run, of method mine")


def test_a_script_with_the_name_of_a_row_is_refused(small, monkeypatch, mistake):
    monkeypatch.setattr(sys, "argv", ["ssd.py"])
    mistake(lambda flags: train.main(flags, objective=own_objective), small, "ssd.py")


def test_a_bug_of_an_own_loss_is_pythons_traceback(small, monkeypatch):
    def buggy(h1, u1, h2, u2, d_k, **weights):
        raise ValueError("a bug of mine")

    monkeypatch.setattr(sys, "argv", ["mine.py"])
    with pytest.raises(ValueError, match="a bug of mine"):
        train.main(small, objective=buggy)


# ------------------------------------------------------------------ --compile


CPU, CUDA = torch.device("cpu"), types.SimpleNamespace(type="cuda")  # nothing is computed there


def a_step(compile, device, monkeypatch):
    """One full batch through `make_loss`, on the CPU whatever the device is."""
    d = scaling_vectors(3, 16)
    stays_here = types.SimpleNamespace(to=lambda device: d)
    monkeypatch.setattr(train, "scaling_vectors", lambda *_: stays_here)
    config = {**config_of("--width 2 --batch-size 4 --no-amp"), "compile": compile}
    torch.manual_seed(0)
    images = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)
    return train.make_loss(config, 3, device)(SSDNet(2), images, 0, keyed_generator(0), None)


def test_a_step_that_does_not_compile_runs_as_it_is_unless_it_must(monkeypatch, capsys):
    def fails(*_, **__):
        raise RuntimeError("no C compiler\nmore lines")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: fails)
    with pytest.warns(UserWarning, match="not compiled.*no C compiler$"):
        value, _ = a_step(None, CUDA, monkeypatch)
    assert value.item() == a_step(False, CPU, monkeypatch)[0].item()
    assert capsys.readouterr().out.count("about a minute") == 1
    with pytest.raises(RuntimeError, match="no C compiler"):
        a_step(True, CUDA, monkeypatch)


def test_a_step_is_compiled_by_itself_on_cuda_alone(monkeypatch):
    calls = []
    monkeypatch.setattr(torch, "compile", lambda step, **_: calls.append(step) or step)
    for device, flag, count in ((CPU, None, 0), (CUDA, None, 1), (CUDA, False, 0), (CPU, True, 1)):
        calls.clear()
        a_step(flag, device, monkeypatch)
        assert len(calls) == count


# ------------------------------------------------------------------ mistakes

OUT_OF_RANGE = "--clients 0,--clients 2.5,--alpha 0,--alpha nan,--alpha inf,--participation 0"
OUT_OF_RANGE += ",--participation 1.01,--rounds -1,--local-epochs 0,--limit 0,--image-size 0"
OUT_OF_RANGE += ",--method fedavg,--beta -1,--gamma x,--delta -0.1,--scale 0,--lr 0,--momentum 1.01"
OUT_OF_RANGE += ",--momentum -0.1,--weight-decay -1,--batch-size 1,--width 0,--seed -1"
AT_ITS_END = "--clients 1,--alpha 1e-12,--participation 1,--rounds 0,--local-epochs 1,--limit 1"
AT_ITS_END += ",--image-size 1,--beta 0,--gamma 0,--delta 0,--momentum 0,--momentum 1"
AT_ITS_END += ",--weight-decay 0,--batch-size 2,--width 1,--seed 0,--seed 9223372036854775807"


@pytest.mark.parametrize("flag", OUT_OF_RANGE.split(","))
def test_a_value_out_of_its_range_is_one_line(flag, mistake):
    mistake(train.main, flag.split(), flag.replace(" ", ":.*"))


def test_a_value_at_the_end_of_its_range_is_taken():
    for flag in AT_ITS_END.split(","):
        config_of(flag)


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--clients 1000", "1000 clients.*lower K"),
        ("--clients 13", "13 clients"),
        ("--alpha 0.001 --clients 11", "alpha 0.001.*raise alpha"),
        ("--limit 121", "--limit 121.*120"),
        ("--limit 20", "3 clients"),
        ("--image-size 48", "image size 48: patterns is 32x32"),
        ("--method hsd --scale 1", "hsd.*--scale"),
        ("--device tpu", "'tpu'.*--device cpu"),
        ("--dataset cifar11", "cifar11.*cifar10"),
        ("--dataset full", "full.*train/<class>"),
        ("--no-such-flag", "--no-such-flag"),
        ("--split-file missing.json", "missing.json"),
        ("--split-file not.json", "not.json must be JSON"),
        ("--split-file good.json", "--clients 3: split file good.json has 2"),
        ("--resume missing/last.pt", "missing/last.pt is not a checkpoint.*No such file"),
        ("--resume full/round2.pt", "round2.pt: call it last.pt"),
        ("--out full", "full is not empty"),
        ("--out not.json", "not.json"),
        ("--out not.json/run", "not.json"),
        ("--out /proc/run", "/proc"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(flags, words, small, tmp_path, mistake):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    (tmp_path / "not.json").write_text("{")
    (tmp_path / "good.json").write_text(json.dumps([list(range(60)), list(range(60, 120))]))
    before = files()
    mistake(train.main, [*small, *flags.split()], words)
    assert files() == before


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"method": "../x"}, "method ../x"),
        ({"dataset": "../x"}, "'../x'"),
        ({"no_such_flag": 1}, "another script's run"),
        ({"clients": 2}, "--clients 2.*has 3"),
        ({"limit": 100}, "last.pt must hold every training image once"),
    ],
)
def test_a_strangers_checkpoint_is_checked_before_it_is_used(changes, words, run, mistake):
    checkpoint = torch.load(run, weights_only=True)
    checkpoint["config"].update(changes)
    torch.save(checkpoint, run)
    before = files()
    mistake(train.main, ["--resume", run], words)
    assert files() == before


def test_the_papers_command_without_data_says_what_to_do(tmp_path, monkeypatch, mistake):
    def no_network(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    monkeypatch.chdir(tmp_path)
    mistake(train.main, ["--clients", "10"], "cifar10 is not in data/.*--dataset patterns")
