"""eval.py: every measure against a slow oracle or a value known by hand."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import eval as evaluation
from data import Images, draw_patterns, two_views
from eval import (
    alignment,
    effective_rank,
    encode,
    fine_tune,
    knn_accuracy,
    linear_probe,
    quick_scores,
    stratified,
    uniformity,
    uniformity_parts,
)
from losses import uniform_loss
from model import SSDNet, load_checkpoint


def features(n, d=5, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def test_knn_equals_a_slow_vote():
    train_h, test_h = features(60), features(400, seed=1)
    train_y, test_y = (
        torch.randint(4, (n,), generator=torch.Generator().manual_seed(n)) for n in (60, 400)
    )
    correct = 0
    for query, label in zip(test_h.double().numpy(), test_y.tolist()):
        similarity = [
            query @ row / np.linalg.norm(query) / np.linalg.norm(row)
            for row in train_h.double().numpy()
        ]
        votes = [0.0] * 4
        for i in np.argsort(similarity)[::-1][:7]:
            votes[train_y[i]] += math.exp(similarity[i] / 0.1)
        correct += int(np.argmax(votes)) == label
    assert knn_accuracy(train_h, train_y, test_h, test_y, k=7) == pytest.approx(100 * correct / 400)


def test_knn_ignores_length_and_lowers_k_to_what_is_there():
    train_h, train_y = torch.eye(3), torch.arange(3)
    assert knn_accuracy(5 * train_h, train_y, 0.1 * train_h, train_y, k=200) == 100
    assert knn_accuracy(train_h, train_y, train_h.flip(0), train_y, k=1) == pytest.approx(100 / 3)


def test_knn_at_a_small_temperature_is_its_limit_not_an_overflow():
    train_h, test_h = features(500), features(400, seed=1)
    train_y, test_y = (torch.randint(4, (n,), generator=torch.Generator()) for n in (500, 400))
    four = train_h, train_y, test_h, test_y
    nearest = knn_accuracy(*four, k=1)
    assert knn_accuracy(*four, k=20, temperature=1e-5) == pytest.approx(nearest, abs=1)
    assert knn_accuracy(*four, k=20, temperature=0.007) > 0.8 * nearest


def test_linear_probe_solves_what_is_linear_and_not_what_is_not():
    x = features(2000, 2)
    halves, quadrants = (x[:, 0] > 0.3).long(), (x.prod(1) > 0).long()
    assert linear_probe(x[:1500], halves[:1500], x[1500:], halves[1500:], epochs=400) > 97
    assert linear_probe(x[:1500], quadrants[:1500], x[1500:], quadrants[1500:], epochs=400) < 65
    runs = {
        linear_probe(x[:500], quadrants[:500], x[500:], quadrants[500:], epochs=3, seed=s)
        for s in (0, 0)
    }
    assert len(runs) == 1


@pytest.mark.parametrize("measure", [knn_accuracy, linear_probe])
def test_labels_in_a_column_are_refused_and_not_compared_with_every_row(measure):
    h, y = torch.eye(4), torch.arange(4)
    with pytest.raises(ValueError, match=r"labels must be \(4,\), got \(4, 1\)"):
        measure(h, y, h, y[:, None], 1)


def test_a_stratified_subset_has_its_share_of_every_class():
    labels = torch.tensor([0] * 100 + [1] * 40 + [2] * 3)[torch.randperm(143)]
    chosen = stratified(labels, 0.1)
    assert torch.bincount(labels[chosen]).tolist() == [10, 4, 1]  # at least one of each
    assert torch.equal(chosen, chosen.unique()) and torch.equal(chosen, stratified(labels, 0.1))
    assert not torch.equal(chosen, stratified(labels, 0.1, seed=1))
    assert torch.equal(stratified(labels, 1.0), torch.arange(143))


def light_and_dark(n):
    """Noise images of two classes, the second brighter."""
    y = torch.arange(n) % 2
    noise = torch.rand(n, 3, 32, 32, generator=torch.Generator().manual_seed(n))
    return (150 * noise + 100 * y.view(-1, 1, 1, 1)).byte(), y


def settled_net(x):
    """An untrained network whose BatchNorm has the statistics of x: features far apart."""
    torch.manual_seed(0)
    net = SSDNet(4)
    for module in net.modules():
        if hasattr(module, "momentum"):
            module.momentum = None  # the plain mean over all batches seen
    net.train()(x.float() / 255)
    return net


def test_what_learns_enables_gradients_itself():
    x, y = light_and_dark(40)
    h, net = F.one_hot(y).float(), SSDNet(2)
    probe, tuned = linear_probe(h, y, h, y, epochs=3), fine_tune(net, x, y, x, y, epochs=1)
    with torch.no_grad():
        assert linear_probe(h, y, h, y, epochs=3) == probe
        assert fine_tune(net, x, y, x, y, epochs=1) == tuned


def test_an_encoder_alone_is_encoded_and_tuned_as_a_network_without_projector():
    x, y = light_and_dark(60)
    net = settled_net(x)
    h, u = encode(net.encoder, x)
    assert torch.equal(h, encode(net, x)[0]) and torch.equal(h, u)
    assert fine_tune(net.encoder, x, y, x, y, epochs=2) == fine_tune(net, x, y, x, y, epochs=2)


def test_fine_tuning_refuses_images_that_are_in_0_to_1_already():
    x, y = light_and_dark(10)
    with pytest.raises(ValueError, match="uint8.*got torch.float32"):
        fine_tune(SSDNet(2), x.float() / 255, y, x, y, epochs=1)


def test_fine_tuning_moves_the_encoder_of_a_copy_and_learns(monkeypatch):
    net, seen = SSDNet(4).requires_grad_(False), []  # the copy learns, also of a frozen network
    before = {name: value.clone() for name, value in net.state_dict().items()}
    real = evaluation.encode
    monkeypatch.setattr(evaluation, "encode", lambda m, *a: (seen.append(m), real(m, *a))[1])
    train, test = light_and_dark(60), light_and_dark(200)
    accuracy = fine_tune(net, *train, *test, epochs=20, batch_size=16)
    assert accuracy > 95
    assert accuracy == fine_tune(net, *train, *test, epochs=20, batch_size=16)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    for name, value in seen[-1].state_dict().items():  # the encoder alone
        assert not torch.equal(value, before[f"encoder.{name}"]), name


def test_fine_tuning_sees_crops_and_flips_of_the_images_and_no_other_colours():
    """Red rises by 4 a column, green by 4 a row, blue is even: the slopes tell box and flip."""
    row, column = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    image = torch.stack([60 + 4 * column, 60 + 4 * row, torch.full((32, 32), 100)]).byte()
    x, net, seen = image.repeat(100, 1, 1, 1), SSDNet(2), []

    def look(encoder, args):
        if encoder.training:
            seen.append(args[0])

    net.encoder.register_forward_pre_hook(look)
    fine_tune(net, x, torch.arange(100) % 2, x[:1], torch.zeros(1).long(), epochs=1, amp=False)
    red, green, blue = (255 * torch.cat(seen)).unbind(1)
    assert torch.allclose(blue, torch.full_like(blue, 100), atol=0.01)
    assert red.diff(dim=1).abs().max() < 0.01 and green.diff(dim=2).abs().max() < 0.01
    width, height = 8 * red[:, 16].diff(dim=1)[:, 15], 8 * green[:, :, 16].diff(dim=1)[:, 15]
    assert 0.3 < (width < 0).float().mean() < 0.7 and height.min() > 0
    area = width.abs() * height / 32**2
    assert 0.6 < area.min() < 0.7 and 0.95 < area.max() <= 1.001
    assert width.abs().round().unique().numel() > 5 and height.round().unique().numel() > 5


def test_uniformity_is_the_training_loss_on_unit_rows():
    h = features(1500, 16)  # more rows than one block
    assert uniformity(h) == pytest.approx(
        uniform_loss(F.normalize(h.double(), dim=1)).item(), abs=1e-5
    )
    assert uniformity(7 * h, t=0.5) == pytest.approx(
        uniform_loss(F.normalize(h.double(), dim=1), t=0.5).item(), abs=1e-5
    )
    assert uniformity(torch.ones(9, 3)) == pytest.approx(0, abs=1e-5)  # collapse


def test_parts_add_up_to_the_pooled_value_and_equal_slow_loops():
    h, client = features(40, 4), torch.randint(3, (40,), generator=torch.Generator().manual_seed(0))
    total, intra, inter = uniformity_parts(h, client)
    z = F.normalize(h.double(), dim=1)
    slow = np.zeros((3, 3))
    for i in range(40):
        for j in range(40):
            if i != j:
                slow[client[i], client[j]] += math.exp(-2 * (z[i] - z[j]).square().sum()) / (
                    40 * 39
                )
    assert np.allclose(intra, np.diag(slow), atol=1e-7)
    assert np.allclose(inter, slow - np.diag(np.diag(slow)), atol=1e-7)
    assert torch.allclose((intra.sum() + inter.sum()).log(), total)
    assert total.item() == pytest.approx(uniformity(h), abs=1e-6)


def test_parts_tell_two_apart_clients_from_two_mixed_ones():
    near = torch.tensor([[1.0, 0]]).repeat(20, 1) + 0.01 * features(20, 2)
    client = torch.arange(40) // 20
    total, intra, inter = uniformity_parts(torch.cat([near, near]), client)
    apart = uniformity_parts(torch.cat([near, -near]), client)
    assert torch.allclose(intra, apart[1], atol=1e-6)  # the same within each client
    assert apart[2].sum() < 0.01 * inter.sum() and apart[0] < total


@pytest.mark.parametrize(
    "h, client",
    [
        (torch.ones(1, 3), torch.zeros(1)),
        (torch.ones(4, 3), torch.zeros(3)),
        (torch.ones(4), torch.zeros(4)),
    ],
)
def test_uniformity_of_nothing_is_a_value_error(h, client):
    with pytest.raises(ValueError, match="N >= 2"):
        uniformity_parts(h, client)


def test_a_row_of_zeros_is_one_point_not_far_from_itself():
    dead, half = torch.zeros(4, 3), torch.tensor([[0.0, 0], [0, 0], [2, 0]])
    assert uniformity(dead) == 0
    assert uniformity(half) == pytest.approx(math.log((1 + 2 * math.exp(-2)) / 3))


def test_alignment_by_hand():
    east, north = torch.tensor([[3.0, 0]]), torch.tensor([[0, 0.2]])
    assert alignment(east, 2 * east) == 0 and alignment(east, north) == pytest.approx(2)


def test_effective_rank_by_hand():
    assert effective_rank(torch.ones(8, 5)) == pytest.approx(1)  # one direction
    assert effective_rank(torch.eye(4).repeat(3, 1)) == pytest.approx(4)  # four, equally strong
    rows = torch.tensor([[1.0, 0]] * 9 + [[0, 1.0]])  # singular values 3 and 1
    p = np.array([0.75, 0.25])
    assert effective_rank(rows) == pytest.approx(math.exp(-(p * np.log(p)).sum()))


def test_encoding_leaves_the_network_as_it_was():
    net = SSDNet(4).train()
    net.encoder.bn1.eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    images = torch.randint(256, (9, 3, 32, 32), dtype=torch.uint8)
    h, u = encode(net, images, amp=False)
    assert [n for n, m in net.named_modules() if not m.training] == ["encoder.bn1"]
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert h.shape == u.shape == (9, 32) and not h.requires_grad
    assert torch.allclose(h, encode(net, images.float() / 255, amp=False)[0])
    with torch.no_grad():
        assert torch.allclose(h, net.eval()(images.float() / 255)[0], atol=1e-6)


# ------------------------------------------------------------------ script


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    """A run folder with an untrained network on few patterns, as train.py would have written it."""
    monkeypatch.setattr(evaluation, "load_dataset", lambda name, root: draw_patterns(200, 100))
    config = {"width": 4, "projector": True, "dataset": "patterns", "method": "ssd", "seed": 0}
    config |= {"amp": False, "data_dir": "data"}
    split = [torch.arange(0, 80), torch.arange(80, 150)]
    content = {"config": config, "split": split, "history": [{}] * 3}
    torch.save({**content, "model": SSDNet(4).state_dict()}, tmp_path / "last.pt")
    return tmp_path / "last.pt"


def test_a_checkpoints_network_is_ready_to_use(checkpoint):
    _, net = load_checkpoint(checkpoint)
    assert not any(module.training for module in net.modules())


def records(checkpoint):
    return [json.loads(line) for line in (checkpoint.parent / "eval.jsonl").open()]


def lines_of(printed, name):
    return [line for line in printed.splitlines() if line.split(" ")[0] == name]


def test_script_prints_a_table_and_appends_a_line(checkpoint, capsys):
    for _ in range(2):
        evaluation.main([str(checkpoint), "--epochs", "2", "--device", "cpu"])
    printed = capsys.readouterr().out
    assert "linear probe" in printed and "uniformity_inter" in printed and "3 rounds" in printed
    assert "kNN (k = 200)" in printed and lines_of(printed, "-uniformity_intra")
    lines = records(checkpoint)
    assert len(lines) == 2 and lines[0]["dataset"] == "patterns" and lines[0]["round"] == 3
    flags = {"epochs": 2, "finetune": [0.01, 0.1], "own_images": False, "seed": 0}
    assert lines[0]["flags"] == flags
    assert "fine-tuned,   1 %" in printed and "fine-tuned,  10 %" in printed
    for part, column in (("h", 1), ("z", 2)):  # one set of images: the total lies in between
        total, intra, inter = (
            float(lines_of(printed, f"-uniformity_{kind}")[0].split()[column])
            for kind in ("total", "intra", "inter")
        )
        assert min(intra, inter) <= total <= max(intra, inter)
        assert lines[0][f"uniformity_total_{part}"] == pytest.approx(-total, abs=1e-3)
    for key in (
        "linear_probe",
        "finetune_0.01",
        "finetune_0.1",
        "knn",
        "uniformity_h",
        "uniformity_inter_z",
        "effective_rank_h",
        "alignment_z",
    ):
        assert lines[0][key] == lines[1][key]  # reproducible


def test_own_images_are_those_that_the_clients_hold(checkpoint, capsys):
    flags = ["--epochs", "1", "--device", "cpu", "--finetune"]
    evaluation.main([str(checkpoint), *flags, "--own-images", "--seed", "3", "--dataset=patterns/"])
    printed = capsys.readouterr().out
    assert "150 training and 100 test" in printed and "fine-tuned" not in printed
    (line,) = records(checkpoint)
    assert line["flags"] == {"epochs": 1, "finetune": [], "own_images": True, "seed": 3}
    assert line["labels"] == 150
    with pytest.raises(SystemExit) as stop:
        evaluation.main([str(checkpoint), *flags, "--own-images", "--dataset", "cifar10"])
    assert stop.value.code == 2


def test_ctrl_c_is_one_line(checkpoint, monkeypatch, capsys):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluation, "evaluate", stop)
    with pytest.raises(SystemExit) as stopped:
        evaluation.main([str(checkpoint), "--device", "cpu"])
    assert stopped.value.code == 130 and capsys.readouterr().err == "stopped\n"
    assert not checkpoint.with_name("eval.jsonl").exists()


def test_transfer_has_no_clients(checkpoint, capsys):
    flags = ["--epochs", "1", "--dataset", "cifar10", "--device", "cpu", "--finetune"]
    evaluation.main([str(checkpoint), *flags])
    assert "uniformity_inter" not in capsys.readouterr().out
    assert records(checkpoint)[0]["dataset"] == "cifar10"


def test_parts_are_those_of_the_images_that_clients_hold(checkpoint, monkeypatch):
    """Unequal clients of different images, some held by none: a loop over all pairs."""
    x, y = light_and_dark(200)
    data = Images(x, y, *light_and_dark(20), ["dark", "bright"])
    monkeypatch.setattr(evaluation, "load_dataset", lambda *_: data)
    content = torch.load(checkpoint, weights_only=True)
    dark, bright = (y == 0).nonzero()[:, 0], (y == 1).nonzero()[:, 0]
    content["model"] = settled_net(x).state_dict()
    content["split"] = split = [torch.cat([dark, bright[:20]]), bright[20:50]]
    torch.save(content, checkpoint)
    flags = [str(checkpoint), "--epochs", "1", "--device", "cpu", "--finetune"]
    evaluation.main(flags)
    evaluation.main([*flags, "--own-images"])
    for part, h in zip("hz", encode(load_checkpoint(checkpoint)[1], x)):
        kernel, z = {True: [], False: []}, F.normalize(h.double(), dim=1).numpy()
        held = [(k, z[i]) for k, index in enumerate(split) for i in index.tolist()]
        for place, (k, a) in enumerate(held):
            for other, b in held[:place]:
                kernel[k == other].append(math.exp(4 * float(a @ b) - 4))
        intra, inter = (math.log(sum(kernel[own]) / len(kernel[own])) for own in (True, False))
        assert abs(intra - inter) > 0.02
        for line in records(checkpoint):
            assert line[f"uniformity_intra_{part}"] == pytest.approx(intra, abs=1e-4)
            assert line[f"uniformity_inter_{part}"] == pytest.approx(inter, abs=1e-4)
            assert min(intra, inter) < line[f"uniformity_total_{part}"] < max(intra, inter)


def test_everything_is_learnt_from_the_training_images(monkeypatch):
    """Test images under the other class's label: who has not learnt from them is always wrong."""
    (train_x, train_y), (test_x, test_y) = light_and_dark(40), light_and_dark(60)
    order = test_y.argsort()  # not the training images' order
    data = Images(train_x, train_y, test_x[order], 1 - test_y[order], ["dark", "bright"])
    tuned = []
    monkeypatch.setattr(
        evaluation, "fine_tune", lambda *a, **k: (tuned.append(a[1:3]), fine_tune(*a, **k))[1]
    )
    scores = evaluation.evaluate(settled_net(train_x), data, epochs=30, fractions=(0.5,))
    for key in ("linear_probe", "knn", "finetune_0.5"):
        assert scores[key] < 20, key
    some = stratified(train_y, 0.5)
    assert torch.equal(tuned[0][0], train_x[some]) and torch.equal(tuned[0][1], train_y[some])


def test_alignment_is_on_random_ones_of_all_test_images(monkeypatch):
    number, seen = torch.arange(6000), []
    x = torch.stack([number // 256, number % 256, 0 * number], 1).byte().view(-1, 3, 1, 1)
    data = draw_patterns(20, 10)._replace(test_x=x, test_y=number % 10)

    def views(images, generator):
        seen.append(256 * images[:, 0, 0, 0].long() + images[:, 1, 0, 0])
        return images, images

    monkeypatch.setattr(evaluation, "two_views", views)
    monkeypatch.setattr(evaluation, "encode", lambda m, x, amp: [1 + x.float()[:, :, 0, 0]] * 2)
    monkeypatch.setattr(evaluation, "uniformity", lambda h: 0.0)
    for seed in (0, 1):
        evaluation.evaluate(SSDNet(2), data, epochs=1, seed=seed)
    for chosen in seen:
        assert len(chosen.unique()) == 5000 and 750 < (chosen >= 5000).sum() < 920
    assert not torch.equal(seen[0].sort().values, seen[1].sort().values)


def test_scores_are_those_of_h_and_of_z_on_the_test_images():
    data = draw_patterns(100, 60)
    net = settled_net(data.train_x)
    scores = evaluation.evaluate(net, data, epochs=20, amp=False)
    quick = quick_scores(net, *data[:4], amp=False)
    train, test = (encode(net, x, amp=False) for x in (data.train_x, data.test_x))
    four = train[0], data.train_y, test[0], data.test_y
    assert scores["knn"] == knn_accuracy(*four, k=100) and scores["k"] == 100
    assert quick["knn"] == knn_accuracy(*four, k=20)
    assert scores["linear_probe"] == linear_probe(*four, epochs=20)
    draws = torch.Generator().manual_seed(0)
    some = torch.randperm(60, generator=draws)
    views = [encode(net, view, amp=False) for view in two_views(data.test_x[some], draws)]
    for part, rows, one, two in zip("hz", test, *views):
        assert scores[f"uniformity_{part}"] == quick[f"uniformity_{part}"] == uniformity(rows)
        assert scores[f"effective_rank_{part}"] == effective_rank(rows)
        assert scores[f"alignment_{part}"] == alignment(one, two)


def save_without(key):
    def damage(path):
        content = torch.load(path, weights_only=True)
        del content[key]
        torch.save(content, path)

    return damage


def with_config(**values):
    def damage(path):
        content = torch.load(path, weights_only=True)
        content["config"].update(values)
        torch.save(content, path)

    return damage


class Malicious:
    def __reduce__(self):
        return print, ("code from a checkpoint ran",)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b"garbage"),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:2000]),
        lambda path: path.unlink(),
        lambda path: torch.save(torch.ones(3), path),
        with_config(width=10**9),
        with_config(width=8),
        with_config(width=None),
        with_config(projector=False),
        lambda path: torch.save(Malicious(), path),
        save_without("model"),
        save_without("split"),
        save_without("config"),
        save_without("history"),
    ],
)
def test_a_checkpoint_that_is_none_is_one_line(checkpoint, damage, capsys):
    damage(checkpoint)
    with pytest.raises(SystemExit) as stop:
        evaluation.main([str(checkpoint), "--device", "cpu"])
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and len(err.strip().splitlines()) == 1 and "checkpoint" in err
    assert (
        "code from a checkpoint ran" not in out and not (checkpoint.parent / "eval.jsonl").exists()
    )


def test_the_script_takes_precision_and_data_folder_from_the_run(checkpoint, monkeypatch):
    seen, load = [], evaluation.load_dataset
    content = torch.load(checkpoint)
    content["config"].update(amp=True, data_dir="elsewhere")
    torch.save(content, checkpoint)

    def evaluate(*args):
        seen.append(args[-1])
        return {"linear_probe": 0.0, "knn": 0.0, "k": 7}

    monkeypatch.setattr(evaluation, "load_dataset", lambda *a: (seen.append(a[1]), load(*a))[1])
    monkeypatch.setattr(evaluation, "evaluate", evaluate)
    evaluation.main([str(checkpoint), "--device", "cpu"])
    evaluation.main([str(checkpoint), "--device", "cpu", "--data-dir", "here"])
    assert seen == ["elsewhere", True, "here", True]


def test_a_checkpoint_comes_back_bit_equal(checkpoint):
    content, net = load_checkpoint(checkpoint)
    assert all(
        torch.equal(value, net.state_dict()[name]) for name, value in content["model"].items()
    )
    assert all(p.requires_grad for p in net.parameters())


@pytest.mark.parametrize(
    "flags",
    [
        ["--epochs", "0"],
        ["--epochs", "x"],
        ["--device", "tpu9"],
        ["--dataset", "no-such"],
        ["--finetune", "0"],
        ["--finetune", "1.5"],
        ["--finetune", "nan"],
    ],
)
def test_bad_flags_are_one_line(checkpoint, flags, capsys, monkeypatch):
    monkeypatch.undo()
    with pytest.raises(SystemExit) as stop:
        evaluation.main([str(checkpoint), *flags])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and len(err.strip().splitlines()) == 1 and flags[1] in err
