"""train.py: the run folder, exact resume, the ablation's rows, and one line for every mistake."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train
from data import draw_patterns
from federated import keyed_generator
from losses import scaling_vectors
from model import SSDNet, load_checkpoint

ROOT = Path(__file__).parent.parent
SMALL = (
    "--dataset patterns --width 2 --batch-size 16 --clients 3 --alpha 1 --local-epochs 1".split()
)
SMALL += "--device cpu --no-amp".split()


@pytest.fixture(autouse=True)
def small_patterns(monkeypatch, tmp_path):
    """120 drawn images, and a working folder where nothing of the project lies."""
    monkeypatch.setattr("data.draw_patterns", lambda: draw_patterns(120, 40))
    monkeypatch.chdir(tmp_path)


def run(flags):
    """One round of a small run with these flags besides."""
    train.main([*SMALL, "--rounds", "1", *flags.split()])


@pytest.fixture(scope="module")
def a_run(tmp_path_factory):
    """The folder of a run of one round, made once, to copy."""
    folder = tmp_path_factory.mktemp("once") / "a"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data.draw_patterns", lambda: draw_patterns(120, 40))
        run(f"--out {folder}")
    return folder


def weights(path="runs/a/last.pt"):
    return load_checkpoint(path)[0]["model"]


def same(one, two):
    return all(torch.equal(value, two[name]) for name, value in one.items())


def lines(path="runs/a/metrics.jsonl"):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


# ------------------------------------------------------------------ a run


def test_a_run_leaves_its_folder_and_says_what_is_next(capsys):
    train.main([*SMALL, "--rounds", "2", "--out", "runs/a"])
    printed = capsys.readouterr().out
    assert "round   2/2" in printed and "of the untrained encoder" in printed
    assert "python eval.py runs/a/last.pt" in printed and "--resume runs/a/last.pt" in printed
    assert sorted(path.name for path in Path("runs/a").iterdir()) == [
        "config.json",
        "last.pt",
        "metrics.jsonl",
        "split.json",
    ]
    assert [line["round"] for line in lines()] == [1, 2]
    for key in (
        "align",
        "uniform",
        "dsr",
        "distill",
        "loss",
        "knn",
        "uniformity_h",
        "uniformity_z",
        "seconds",
        "lr",
    ):
        assert isinstance(lines()[0][key], float), key
    assert lines()[0]["clients"] == [0, 1, 2]
    config = json.loads(Path("runs/a/config.json").read_text())
    assert (
        config["gamma"] == 1
        and config["delta"] == 0.1
        and config["versions"]["torch"] == torch.__version__
    )
    split = json.loads(Path("runs/a/split.json").read_text())
    assert sorted(sum(split.values(), [])) == list(range(120))


def test_every_cpu_computes_in_float32_unless_amp_says_otherwise(capsys):
    flags = [flag for flag in SMALL if flag != "--no-amp"] + ["--rounds", "0"]
    for more, type_ in ([], "float32"), (["--amp"], "bfloat16"):
        train.main([*flags, *more])
        assert f", cpu, {type_}\n" in capsys.readouterr().out


def test_the_checkpoint_holds_tensors_and_plain_values_only():
    run("--out runs/a")
    content = torch.load("runs/a/last.pt", weights_only=True)
    assert set(content) == {"config", "split", "model", "history"} and content["history"] == lines()
    SSDNet(2).load_state_dict(content["model"])


def test_training_moves_the_loss_and_the_weights():
    run("--rounds 3 --local-epochs 4 --lr 0.02 --width 4 --out runs/a")
    torch.manual_seed(0)
    assert not same(weights(), SSDNet(4).state_dict())
    assert lines()[-1]["loss"] < lines()[0]["loss"] - 0.15
    assert lines()[-1]["uniform"] < lines()[0]["uniform"] - 0.4


def test_the_same_flags_give_the_same_weights_and_another_seed_others():
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(f"--seed {seed} --out runs/{name}")
    assert same(weights("runs/a/last.pt"), weights("runs/b/last.pt"))
    assert not same(weights("runs/a/last.pt"), weights("runs/c/last.pt"))


def test_resuming_ends_bit_equal_with_one_line_a_round():
    train.main([*SMALL, "--rounds", "4", "--out", "runs/whole"])
    train.main([*SMALL, "--rounds", "2", "--out", "runs/a"])
    with open("runs/a/metrics.jsonl", "a") as file:  # killed after a line, before its checkpoint
        file.write('{"round": 3, "half a li')
    train.main(["--resume", "runs/a/last.pt", "--rounds", "4"])
    assert same(weights("runs/whole/last.pt"), weights("runs/a/last.pt"))

    def timeless(path):
        return [
            {key: value for key, value in line.items() if key != "seconds"} for line in lines(path)
        ]

    assert timeless("runs/a/metrics.jsonl") == timeless("runs/whole/metrics.jsonl")


def test_resuming_needs_nothing_but_the_checkpoint(tmp_path):
    train.main([*SMALL, "--rounds", "2", "--out", "runs/whole"])
    run("--out runs/a")
    Path("moved").mkdir()
    Path("runs/a/last.pt").rename("moved/last.pt")
    train.main(["--resume", "moved/last.pt", "--rounds", "2"])
    assert same(weights("runs/whole/last.pt"), weights("moved/last.pt"))
    assert [line["round"] for line in lines("moved/metrics.jsonl")] == [1, 2]


def test_a_resumed_run_stays_the_same_run_and_other_flags_hold(capsys):
    run("--out runs/a")
    before = Path("runs/a/last.pt").read_bytes()
    run("--resume runs/a/last.pt")  # nothing left to do
    for flags in (
        ["--clients", "4"],
        ["--method", "dsr"],
        ["--width", "4"],
        ["--seed", "1"],
        ["--limit", "60"],
        ["--alpha", "0.5"],
        ["--no-projector"],
        ["--out", "runs/b"],
    ):
        with pytest.raises(SystemExit) as stop:
            train.main(["--resume", "runs/a/last.pt", *flags])
        assert stop.value.code == 2
        err = capsys.readouterr().err
        assert len(err.splitlines()) == 1 and flags[0].removeprefix("--no-") in err
    assert Path("runs/a/last.pt").read_bytes() == before and not Path("runs/b").exists()
    flags = "--rounds 2 --lr 0.3 --amp --batch-size 8".split()
    train.main(["--resume", "runs/a/last.pt", *flags])
    config = load_checkpoint("runs/a/last.pt")[0]["config"]
    assert (config["lr"], config["amp"], config["batch_size"]) == (0.3, True, 8)
    assert lines()[-1]["lr"] == 0.3 and len(lines()) == 2


def test_a_script_that_only_calls_main_makes_a_run_that_train_resumes(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sweep.py"])
    run("--out runs/a")
    monkeypatch.setattr(sys, "argv", ["train.py"])
    train.main(["--resume", "runs/a/last.pt", "--rounds", "2"])
    assert len(lines()) == 2


def own_loss(config, images, split):
    return {"loss": lambda model, batch, *_: (model(batch / 255)[1].square().mean(), {})}


def test_a_loss_of_ones_own_has_a_row_of_its_own_and_never_goes_on_as_ssd(capsys):
    with pytest.raises(SystemExit) as stop:
        train.main([*SMALL, "--out", "runs/a"], make_options=own_loss)
    assert stop.value.code == 2 and "row of its own" in capsys.readouterr().err
    methods = {**train.METHODS, "mine": {"gamma": 0.0, "delta": 0.0}}
    flags = [*SMALL, "--rounds", "1", "--method", "mine"]
    train.main(flags, methods=methods, make_options=own_loss)
    assert Path("runs/patterns-mine-k3-seed0/last.pt").exists()
    with pytest.raises(SystemExit) as stop:
        train.main(["--resume", "runs/patterns-mine-k3-seed0/last.pt", "--rounds", "2"])
    assert stop.value.code == 2 and "--method mine" in capsys.readouterr().err


def test_a_progress_of_ones_own_is_kept():
    seen = []
    hook = {"progress": lambda k, mine: seen.append((k, mine))}
    train.main([*SMALL, "--rounds", "1", "--out", "runs/a"], make_options=lambda *_: hook)
    assert seen == [(k, [0, 1, 2]) for k in range(3)]


def test_an_empty_folder_is_taken_as_it_is():
    Path("real").mkdir()
    Path("link").symlink_to("real")
    inode = Path("real").stat().st_ino
    run("--out link")
    assert Path("link").is_symlink() and Path("real").stat().st_ino == inode
    assert len(lines("real/metrics.jsonl")) == 1


def test_a_second_run_of_the_same_name_gets_its_own_folder():
    for _ in range(2):
        run("")
    assert sorted(path.name for path in Path("runs").iterdir()) == [
        "patterns-ssd-k3-seed0",
        "patterns-ssd-k3-seed0-2",
    ]


def test_limit_is_a_fixed_subset_and_its_split_file_reads_back():
    run("--limit 60 --out runs/a")
    split = json.loads(Path("runs/a/split.json").read_text())
    chosen = sorted(sum(split.values(), []))
    assert len(set(chosen)) == 60 and chosen != list(range(60)) and max(chosen) < 120
    run("--limit 60 --split-file runs/a/split.json --out runs/b")
    assert same(weights("runs/a/last.pt"), weights("runs/b/last.pt"))
    Path("bare.json").write_text(json.dumps(list(split.values())))
    run("--limit 60 --split-file bare.json --out runs/c")
    assert same(weights("runs/a/last.pt"), weights("runs/c/last.pt"))
    run("--limit 60 --seed 1 --out runs/d")
    other = json.loads(Path("runs/d/split.json").read_text())
    assert sorted(sum(other.values(), [])) == chosen and other != split


def test_the_flags_reach_the_rounds(monkeypatch):
    seen = {}
    monkeypatch.setattr(train, "train_federated", lambda *_, **options: seen.update(options) or [])
    run("--participation 0.4 --seed 3 --local-epochs 2 --batch-size 8 --out runs/a")
    expected = {"participation": 0.4, "seed": 3, "local_epochs": 2, "batch_size": 8, "rounds": 1}
    assert expected.items() <= seen.items()


def test_the_weights_and_the_clients_d_k_reach_the_objective():
    flags = "--width 2 --beta 0.5 --gamma 2 --delta 3 --scale 7 --seed 4 --no-amp".split()
    config, _ = train.read_config(train.build_parser(), flags)
    seen = []

    def objective(h1, u1, h2, u2, d_k, **weights):
        seen.append((d_k, weights))
        return h1.sum(), {}

    loss = train.make_loss(config, 3, torch.device("cpu"), objective)
    images = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
    loss(SSDNet(2), images, 1, keyed_generator(0), None)
    ((d_k, weights),) = seen
    assert weights == {"beta": 0.5, "gamma": 2.0, "delta": 3.0, "hard": False}
    assert torch.equal(d_k, scaling_vectors(3, 16, 7.0, seed=4)[1])


def test_a_diverged_run_stops_and_keeps_its_last_good_round(monkeypatch, capsys):
    run("--out runs/a")
    before = Path("runs/a/last.pt").read_bytes()

    def not_a_number(model, images, *_):
        return model(images.float())[0].sum() * float("nan"), {}

    monkeypatch.setattr(train, "make_loss", lambda *_: not_a_number)
    with pytest.raises(SystemExit) as stop:
        train.main(["--resume", "runs/a/last.pt", "--rounds", "2"])
    err = capsys.readouterr().err
    assert stop.value.code == 1 and len(err.splitlines()) == 1
    assert "no client of round 2 has a finite loss and weights" in err and "--lr X" in err
    assert Path("runs/a/last.pt").read_bytes() == before and len(lines()) == 1


def test_a_client_that_diverges_is_named_on_the_terminal_and_in_the_metrics(monkeypatch, capsys):
    real = train.make_loss

    def poisoned(*arguments):
        loss = real(*arguments)

        def client_1_diverges(model, images, k, generator, global_state):
            value, terms = loss(model, images, k, generator, global_state)
            return (value * float("nan") if k == 1 else value), terms

        return client_1_diverges

    monkeypatch.setattr(train, "make_loss", poisoned)
    run("--out runs/a")
    assert "left out, not finite: [1]" in capsys.readouterr().out
    assert lines()[0]["left_out"] == [1] and lines()[0]["clients"] == [0, 1, 2]
    assert all(value.isfinite().all() for value in weights().values())


def test_no_rounds_leave_the_untrained_network():
    train.main([*SMALL, "--rounds", "0", "--out", "runs/a"])
    torch.manual_seed(0)
    assert same(weights(), SSDNet(2).state_dict()) and lines() == []
    train.main(["--resume", "runs/a/last.pt", "--rounds", "1"])
    run("--out runs/b")
    assert same(weights("runs/a/last.pt"), weights("runs/b/last.pt"))


# ------------------------------------------------------------------ waiting


def test_a_terminal_shows_who_trains_and_the_time_left(monkeypatch, capsys):
    clock, history = [100.0], []
    monkeypatch.setattr(train.time, "time", lambda: clock[0])
    monkeypatch.setattr(train, "CLEAR", "\n")
    arguments = {"rounds": 3}, [range(100), range(300)], history
    assert train.make_progress(*arguments) is None  # not a terminal
    monkeypatch.setattr(train, "TERMINAL", True)
    progress = train.make_progress(*arguments)
    for _ in range(2):
        for k, seconds in ((0, 10), (1, 30)):  # ten images a second
            progress(k, [0, 1])
            clock[0] += seconds
        history.append({})
    assert capsys.readouterr().out.splitlines()[1:] == [
        "client 1 of 2",
        "client 2 of 2, left: 0:00:30 of the round, 0:01:50 of the run",
        "client 1 of 2, left: 0:00:40 of the round, 0:01:20 of the run",
        "client 2 of 2, left: 0:00:30 of the round, 0:01:10 of the run",
    ]


# ------------------------------------------------------------------ methods


@pytest.mark.parametrize(
    "method, gamma, delta",
    [("fedalignuniform", 0, 0), ("pd", 0, 0.1), ("dsr", 1, 0), ("ssd", 1, 0.1), ("hsd", 0, 0)],
)
def test_a_method_is_its_weights(method, gamma, delta):
    run(f"--method {method} --out runs/a")
    line = lines()[0]
    assert line["loss"] == pytest.approx(
        line["align"] + line["uniform"] + gamma * line["dsr"] + delta * line["distill"], abs=1e-5
    )


def test_hsd_lives_on_own_dimensions_and_a_weight_may_be_set_by_hand():
    run("--method hsd --out runs/a")
    assert lines()[0]["dsr"] == pytest.approx(0, abs=1e-6)
    run("--method fedalignuniform --gamma 0.5 --out runs/b")
    assert json.loads(Path("runs/b/config.json").read_text())["gamma"] == 0.5


def test_without_projector_distillation_is_zero():
    run("--no-projector --out runs/a")
    assert lines()[0]["distill"] == 0


def test_labels_reach_no_part_of_training(monkeypatch):
    run("--limit 60 --out runs/a")
    patterns = draw_patterns(120, 40)
    y, test_y = patterns.train_y.flip(0), patterns.test_y.flip(0)
    shuffled = patterns._replace(train_y=y, test_y=test_y)
    monkeypatch.setattr("data.draw_patterns", lambda: shuffled)
    run("--limit 60 --split-file runs/a/split.json --out runs/b")
    assert same(weights("runs/a/last.pt"), weights("runs/b/last.pt"))


# ------------------------------------------------------------------ mistakes


PARTITION = [list(range(0, 60)), list(range(60, 120))]


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--clients", "0"], "--clients.*0 is not at least 1"),
        (["--clients", "2.5"], "--clients.*whole number.*'2.5'"),
        (["--clients", "1000"], "1000 clients.*fewer clients"),
        (["--clients", "13"], "13 clients.*120"),
        (["--alpha", "0"], "--alpha.*0 is not at least 1e-12"),
        (["--alpha", "-1"], "--alpha"),
        (["--alpha", "nan"], "--alpha"),
        (["--alpha", "inf"], "--alpha"),
        (["--alpha", "0.001", "--clients", "11"], "alpha 0.001.*raise alpha"),
        (["--participation", "0"], "--participation"),
        (["--participation", "1.01"], "--participation.*at most 1"),
        (["--rounds", "-1"], "--rounds"),
        (["--local-epochs", "0"], "--local-epochs"),
        (["--limit", "0"], "--limit"),
        (["--limit", "121"], "--limit 121.*120"),
        (["--limit", "20"], "3 clients.*fewer clients"),
        (["--method", "fedavg"], "--method.*fedavg"),
        (["--beta", "-1"], "--beta"),
        (["--gamma", "x"], "--gamma.*'x'"),
        (["--delta", "-0.1"], "--delta"),
        (["--scale", "0"], "--scale"),
        (["--method", "hsd", "--scale", "1"], "hsd.*--scale"),
        (["--method", "hsd", "--scale", "1.00000001"], "hsd.*--scale"),
        (["--lr", "0"], "--lr"),
        (["--momentum", "1.5"], "--momentum"),
        (["--weight-decay", "-1"], "--weight-decay"),
        (["--batch-size", "1"], "--batch-size.*1 is not at least 2"),
        (["--width", "0"], "--width"),
        (["--seed", "-1"], "--seed"),
        (["--seed", "9" * 400], "--seed.*at most"),
        (["--device", "tpu"], "'tpu'.*--device cpu"),
        (["--device", "meta"], "'meta'.*--device cpu"),
        (["--device", "cuda:99"], "'cuda:99'.*--device cpu"),
        (["--dataset", "cifar11"], "cifar11.*cifar10"),
        (["--dataset", "empty"], "empty.*train/<class>"),
        (["--no-such-flag"], "--no-such-flag"),
        (["--split-file", "missing.json"], "missing.json"),
        (["--split-file", "not.json"], "not.json must be JSON"),
        (["--split-file", "number.json"], "must be JSON"),
        (["--split-file", "words.json"], "must be JSON"),
        (["--split-file", "twice.json"], "once: see image 5"),
        (["--split-file", "outside.json"], "image 120"),
        (["--split-file", "short.json"], "once: see image 119"),
        (["--split-file", "lonely.json"], "at least 2"),
        (["--split-file", "good.json"], "--clients 3: split file good.json has 2"),
        (["--resume", "missing.pt"], "missing.pt is not a checkpoint.*No such file"),
        (["--resume", "garbage.pt"], "garbage.pt is not a checkpoint"),
        (["--resume", "shape.pt"], "shape.pt is not a checkpoint"),
        (["--out", "full"], "full is not empty"),
        (["--out", "not.json"], "not.json is not empty"),
        (["--out", "not.json/run"], "not.json"),
        (["--out", "/proc/run"], "/proc"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(flags, words, tmp_path, capsys):
    files = {
        "not.json": "{",
        "number.json": "3",
        "words.json": '[["a"]]',
        "twice.json": [[5, 5], *PARTITION],
        "outside.json": [*PARTITION, [120, 121]],
        "short.json": [PARTITION[0], PARTITION[1][:-1]],
        "lonely.json": [[0], list(range(1, 120))],
        "good.json": PARTITION,
        "garbage.pt": "garbage",
        "full/file": "x",
    }
    (tmp_path / "full").mkdir(), (tmp_path / "empty").mkdir()
    for name, content in files.items():
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    torch.save(
        {
            "history": [],
            "config": {"width": 4, "projector": True},
            "split": [torch.arange(9)],
            "model": SSDNet(2).state_dict(),
        },
        "shape.pt",
    )
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        train.main([*SMALL, *flags])
    err = capsys.readouterr().err
    assert stop.value.code == 2
    assert len(err.strip().splitlines()) == 1, err
    assert re.search(words, err), err
    assert sorted(tmp_path.rglob("*")) == before


class Code:
    """A pickle of it creates a file when it is read without care."""

    def __reduce__(self):
        return open, ("was_run", "w")


def with_config(**values):
    return lambda checkpoint: checkpoint["config"].update(values)


def with_split(*parts):
    return lambda checkpoint: checkpoint.update(split=[torch.as_tensor(part) for part in parts])


@pytest.mark.parametrize(
    "spoil, words",
    [
        (with_config(width=None), "not a checkpoint"),
        (with_config(method="../x"), "--method"),
        (with_config(dataset="../x"), "'../x'"),
        (with_config(no_such_flag=1), "last.pt is another script's: .* has no no_such_flag"),
        (with_config(clients=2), "--clients 2.*has 3"),
        (with_split(*PARTITION[:1], PARTITION[0]), "once: see image 0"),
        (with_split(*PARTITION, [120, 121]), "image 120"),
        (with_split(PARTITION[0]), "image 60"),
        (with_split(), "at least 2"),
        (lambda checkpoint: checkpoint.update(model={}), "not a checkpoint"),
        (lambda checkpoint: checkpoint.update(model=Code()), "not a checkpoint"),
        (lambda checkpoint: checkpoint.pop("config"), "not a checkpoint"),
        (lambda checkpoint: checkpoint.pop("history"), "not a checkpoint"),
    ],
)
def test_a_strangers_checkpoint_is_checked_before_it_is_used(spoil, words, a_run, tmp_path, capsys):
    shutil.copytree(a_run, "runs/a")
    checkpoint = torch.load("runs/a/last.pt", weights_only=True)
    spoil(checkpoint)
    torch.save(checkpoint, "runs/a/last.pt")
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        train.main(["--resume", "runs/a/last.pt"])
    err = capsys.readouterr().err
    assert stop.value.code == 2
    assert len(err.strip().splitlines()) == 1, err
    assert re.search(words, err), err
    assert {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")} == before


def test_too_little_memory_is_one_line(capsys):
    for error in (
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    ):
        with pytest.raises(SystemExit) as stop:
            train.leave(error, Path("runs/a"), "train.py")
        assert stop.value.code == 1
        err = capsys.readouterr().err
        assert len(err.splitlines()) == 1 and "memory" in err and "--resume runs/a/last.pt" in err


def test_processes_that_do_not_know_their_number_are_one_line(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")  # as a cluster sets it, without torchrun's RANK
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit) as stop:
        train.main(SMALL)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and "RANK" in err and len(err.strip().splitlines()) == 1


def test_the_papers_command_without_data_says_what_to_do(tmp_path):
    """The script without network (a proxy that nobody serves): one line and status 2."""
    dead = {
        "http_proxy": "http://127.0.0.1:9",
        "https_proxy": "http://127.0.0.1:9",
        "PATH": "/usr/bin:/bin",
    }
    done = subprocess.run(
        [sys.executable, ROOT / "train.py", "--clients", "10", "--alpha", "0.1"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=dead,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1
    for words in ("cifar10", "data/cifar-10-batches-py", "--dataset patterns"):
        assert words in done.stderr
    assert list(tmp_path.iterdir()) == []
