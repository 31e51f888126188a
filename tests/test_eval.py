"""eval.py: every measure against a slow oracle or a value known by hand."""

import inspect
import json
import math
from pathlib import Path

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
    train_y, test_y = features(60, 4, seed=2).argmax(1), features(400, 4, seed=3).argmax(1)
    correct = 0
    for query, label in zip(test_h.double().numpy(), test_y.tolist()):
        rows = train_h.double().numpy()
        similarity = rows @ query / np.linalg.norm(query) / np.linalg.norm(rows, axis=1)
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


@pytest.mark.parametrize("measure", [knn_accuracy, linear_probe])
def test_labels_in_a_column_are_refused_and_not_compared_with_every_row(measure):
    h, y = torch.eye(4), torch.arange(4)
    with pytest.raises(ValueError, match=r"labels must be \(4,\), got \(4, 1\)"):
        measure(h, y, h, y[:, None], 1)


PAPER = {  # of the protocols: Fang et al. 2025, supplement and code
    linear_probe: {"epochs": 200, "lr": 3e-3, "batch_size": 512},
    fine_tune: {"epochs": 200, "lr": 1e-3, "batch_size": 128, "amp": False},
    knn_accuracy: {"k": 200, "temperature": 0.1},
    uniformity: {"t": 2.0},
    evaluation.evaluate: {"epochs": 200, "amp": False},
    encode: {"amp": False},
    quick_scores: {"amp": False},
}


@pytest.mark.parametrize("function", PAPER)
def test_the_protocols_defaults_are_the_papers(function):
    parameters = inspect.signature(function).parameters
    assert {name: parameters[name].default for name in PAPER[function]} == PAPER[function]
    args = evaluation.build_parser().parse_args(["last.pt"])
    assert args.epochs == 200 and args.finetune == [0.01, 0.1]


def test_the_probe_is_200_epochs_of_adam_written_out():
    h, test_h = features(600, 8), features(3000, 8, seed=1)
    y, test_y = h[:, :3].argmax(1), test_h[:, :3].argmax(1)
    w, b = torch.zeros(3, 8, requires_grad=True), torch.zeros(3, requires_grad=True)
    mean = [torch.zeros(3, 8), torch.zeros(3)]
    square = [torch.zeros(3, 8), torch.zeros(3)]
    shuffle, step = torch.Generator().manual_seed(0), 0
    for _ in range(200):
        for batch in torch.randperm(600, generator=shuffle).split(512):
            step += 1
            loss = F.cross_entropy(h[batch] @ w.T + b, y[batch])
            for i, gradient in enumerate(torch.autograd.grad(loss, [w, b])):
                mean[i] = 0.9 * mean[i] + 0.1 * gradient
                square[i] = 0.999 * square[i] + 0.001 * gradient**2
                size = (square[i] / (1 - 0.999**step)).sqrt() + 1e-8
                with torch.no_grad():
                    (w, b)[i].sub_(3e-3 * mean[i] / (1 - 0.9**step) / size)
    expected = 100 * ((test_h @ w.T + b).argmax(1) == test_y).float().mean().item()
    with torch.no_grad():  # the probe enables gradients itself
        accuracy = linear_probe(h, y, test_h, test_y)
    assert accuracy == pytest.approx(expected, abs=0.1)
    assert 80 < expected < 99  # not at an end where all protocols agree


def test_fine_tuning_takes_the_papers_optimiser_and_as_many_steps(monkeypatch):
    made = []

    class Spy(torch.optim.SGD):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            self.steps = 0
            made.append(self)

        def step(self):
            super().step()
            self.steps += 1

    monkeypatch.setattr(torch.optim, "SGD", Spy)
    x, y = light_and_dark(130)  # two batches of at most 128
    fine_tune(SSDNet(1), x, y, x[:4], y[:4], epochs=3)
    (optimizer,) = made
    encoder, head = optimizer.param_groups
    assert (encoder["lr"], head["lr"]) == (1e-3, 0.3)
    assert encoder["momentum"] == head["momentum"] == 0.9
    assert encoder["weight_decay"] == 0 and optimizer.steps == 3 * 2


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
    noise = torch.rand(n, 3, 16, 16, generator=torch.Generator().manual_seed(n))
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


def test_an_encoder_alone_is_encoded_and_tuned_as_a_network_without_projector():
    x, y = light_and_dark(60)
    net = settled_net(x)
    h, u = encode(net.encoder, x)
    assert torch.equal(h, encode(net, x)[0]) and torch.equal(h, u)
    assert fine_tune(net.encoder, x, y, x, y, epochs=2) == fine_tune(net, x, y, x, y, epochs=2)


def test_fine_tuning_learns_and_leaves_the_network_as_it_was():
    net = SSDNet(4).requires_grad_(False)  # a copy learns, also of a frozen network
    before = {name: value.clone() for name, value in net.state_dict().items()}
    train, test = light_and_dark(60), light_and_dark(200)
    accuracy = fine_tune(net, *train, *test, epochs=10, batch_size=16)
    with torch.no_grad():  # it enables gradients itself
        assert fine_tune(net, *train, *test, epochs=10, batch_size=16) == accuracy
    assert accuracy > 95
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_a_network_of_another_kind_is_tuned_whole():
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 16 * 16, 8))
    net.encoder = torch.nn.Linear(8, 8)  # the third layer, which alone takes no images
    x, y = light_and_dark(40)
    assert fine_tune(net, x, y, x, y, epochs=2) >= 50


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
    z = F.normalize(h.double(), dim=1)
    assert uniformity(h) == pytest.approx(uniform_loss(z).item(), abs=1e-5)
    assert uniformity(7 * h, t=0.5) == pytest.approx(uniform_loss(z, t=0.5).item(), abs=1e-5)
    assert uniformity(torch.ones(9, 3)) == pytest.approx(0, abs=1e-5)  # collapse


def test_parts_add_up_to_the_pooled_value_and_equal_slow_loops():
    h, client = features(40, 4), torch.randint(3, (40,), generator=torch.Generator().manual_seed(0))
    total, intra, inter = uniformity_parts(h, client)
    z = F.normalize(h.double(), dim=1)
    slow = np.zeros((3, 3))
    for i in range(40):
        for j in range(40):
            if i != j:
                kernel = math.exp(-2 * (z[i] - z[j]).square().sum())
                slow[client[i], client[j]] += kernel / (40 * 39)
    assert np.allclose(intra, np.diag(slow), atol=1e-7)
    assert np.allclose(inter, slow - np.diag(np.diag(slow)), atol=1e-7)
    assert torch.allclose((intra.sum() + inter.sum()).log(), total)
    assert total.item() == pytest.approx(uniformity(h), abs=1e-6)


@pytest.mark.parametrize(
    "h, client",
    [(torch.ones(1, 3), torch.zeros(1)), (torch.ones(4, 3), torch.zeros(3)), (torch.ones(4),) * 2],
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
    with pytest.raises(ValueError, match="alignment needs two"):
        alignment(torch.ones(5, 8), torch.ones(1, 8))


def test_effective_rank_by_hand():
    assert effective_rank(torch.ones(8, 5)) == pytest.approx(1)  # one direction
    assert effective_rank(torch.eye(4).repeat(3, 1)) == pytest.approx(4)  # four, equally strong
    rows = torch.tensor([[1.0, 0]] * 9 + [[0, 1.0]])  # singular values 3 and 1
    assert effective_rank(torch.zeros(4, 3)) == 0
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
    net.train()
    with pytest.raises(RuntimeError):
        encode(net, torch.rand(4, 5, 8, 8))
    assert all(module.training for module in net.modules())


# ------------------------------------------------------------------ script

FAST = ["--epochs", "1", "--device", "cpu", "--finetune"]


def records(run):
    return [json.loads(line) for line in (Path(run).parent / "eval.jsonl").open()]


def test_the_script_records_a_line_and_prints_it(run, patterns, capsys):
    evaluation.main([run, "--epochs", "4", "--device", "cpu", "--finetune", "0.1", "0.5"])
    printed = capsys.readouterr().out
    evaluation.main([run, *FAST])
    assert "1 rounds on patterns" in printed and "120 training and 40 test images" in printed
    line, other = records(run)
    assert (line["dataset"], line["round"], line["k"]) == ("patterns", 1, 120)
    assert line["flags"] == {"epochs": 4, "finetune": [0.1, 0.5], "seed": 0}
    assert other["flags"] == {"epochs": 1, "finetune": [], "seed": 0}
    net = load_checkpoint(run)[1]
    expected = evaluation.evaluate(net, patterns, epochs=4, fractions=(0.1, 0.5))
    assert "uniformity_inter_z" in line
    for name, value in expected.items():
        assert line[name] == value and f"{value:.3f}" in printed, name


def test_labels_are_of_the_images_that_clients_hold(run, capsys):
    checkpoint = torch.load(run, weights_only=True)
    checkpoint["split"] = [part[: len(part) // 2] for part in checkpoint["split"]]
    held = sum(len(part) for part in checkpoint["split"])
    torch.save(checkpoint, run)
    evaluation.main([run, *FAST])
    assert f"{held} training and 40 test" in capsys.readouterr().out


def test_the_record_is_written_before_anything_is_printed_of_it(run, monkeypatch):
    def broken_pipe(scores):
        raise BrokenPipeError

    monkeypatch.setattr(evaluation, "print_scores", broken_pipe)
    with pytest.raises(BrokenPipeError):
        evaluation.main([run, *FAST])
    assert len(records(run)) == 1


def test_another_data_set_is_transfer_and_has_no_clients(run):
    checkpoint = torch.load(run, weights_only=True)
    checkpoint["config"].update(images="others", dataset="a-folder", image_size=48)
    torch.save(checkpoint, run)
    evaluation.main([run, *FAST, "--dataset", "patterns"])
    (line,) = records(run)
    assert line["dataset"] == "patterns" and "uniformity_inter_h" not in line


def test_images_that_changed_since_the_run_are_refused(run, monkeypatch, patterns, mistake):
    other = patterns._replace(files=["another.png"])
    monkeypatch.setattr(evaluation, "load_dataset", lambda *_: other)
    mistake(evaluation.main, [run, *FAST], "patterns has other images than those the run began")
    assert not (Path(run).parent / "eval.jsonl").exists()


def test_parts_are_those_of_the_images_that_clients_hold():
    """Unequal clients of different images: a loop over all pairs."""
    x, y = light_and_dark(60)
    data = Images(x, y, *light_and_dark(20), ["dark", "bright"])
    net, client = settled_net(x), (torch.arange(60) < 20).long()
    scores = evaluation.evaluate(net, data, client, epochs=1)
    for part, h in zip("hz", encode(net, x)):
        z, within, between = F.normalize(h.double(), dim=1), [], []
        for i in range(60):
            for j in range(i):
                kernel = math.exp(4 * float(z[i] @ z[j]) - 4)
                (within if client[i] == client[j] else between).append(kernel)
        intra, inter = math.log(np.mean(within)), math.log(np.mean(between))
        assert abs(intra - inter) > 0.01
        assert scores[f"uniformity_intra_{part}"] == pytest.approx(intra, abs=1e-4)
        assert scores[f"uniformity_inter_{part}"] == pytest.approx(inter, abs=1e-4)
        total = math.log(np.mean(within + between))
        assert scores[f"uniformity_total_{part}"] == pytest.approx(total, abs=1e-4)


def test_scores_are_those_of_h_and_of_z_on_the_test_images():
    data = draw_patterns(210, 60)
    net = settled_net(data.train_x)
    scores = evaluation.evaluate(net, data, epochs=2, fractions=(0.5,), amp=False)
    quick = quick_scores(net, *data[:4], amp=False)
    train, test = encode(net, data.train_x), encode(net, data.test_x)
    features_and_labels = train[0], data.train_y, test[0], data.test_y
    assert scores["knn"] == knn_accuracy(*features_and_labels, k=200) and scores["k"] == 200
    assert quick["knn"] == knn_accuracy(*features_and_labels, k=20)
    assert scores["linear_probe"] == linear_probe(*features_and_labels, epochs=2)
    half = stratified(data.train_y, 0.5)
    labelled = data.train_x[half], data.train_y[half]
    tuned = fine_tune(net, *labelled, data.test_x, data.test_y, epochs=2)
    assert scores["finetune_0.5"] == tuned
    draws = torch.Generator().manual_seed(0)
    some = torch.randperm(60, generator=draws)
    views = [encode(net, view) for view in two_views(data.test_x[some], draws)]
    for part, rows, one, two in zip("hz", test, *views):
        assert scores[f"uniformity_{part}"] == quick[f"uniformity_{part}"] == uniformity(rows)
        assert scores[f"effective_rank_{part}"] == effective_rank(rows)
        assert scores[f"alignment_{part}"] == alignment(one, two)
        assert scores[f"norm_{part}"] == pytest.approx(rows.norm(dim=1).mean().item())


def test_the_script_takes_the_precision_of_the_run(run, patterns):
    checkpoint = torch.load(run, weights_only=True)
    checkpoint["config"].update(amp=True)
    torch.save(checkpoint, run)
    evaluation.main([run, *FAST])
    net = load_checkpoint(run)[1]
    for amp in (True, False):
        scores = evaluation.evaluate(net, patterns, epochs=1, amp=amp)
        assert (scores["uniformity_h"] == records(run)[0]["uniformity_h"]) == amp


@pytest.mark.parametrize(
    "flags",
    ["--epochs 0", "--epochs x", "--device tpu9", "--dataset no-such", "--finetune 0"]
    + ["--finetune 1.5", "--finetune nan", "--own-images"],
)
def test_bad_flags_are_one_line(run, flags, mistake):
    mistake(evaluation.main, [run, *flags.split()], flags.split()[-1])
