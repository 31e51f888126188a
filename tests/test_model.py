"""model.py: the network is torchvision's ResNet-18 with another stem, at any width; its file."""

import os
from pathlib import Path

import pytest
import torch
import torchvision
from conftest import files, same

import eval as evaluation
import train
from model import SSDNet, load_checkpoint, load_weights, pick_device, resnet18, save_checkpoint


def count(module):
    return round(sum(p.numel() for p in module.parameters()) / 1e6, 2)


@pytest.mark.parametrize("width", [4, 16, 64])
def test_shapes_scale_with_width(width):
    net = SSDNet(width)
    h, u = net(torch.rand(2, 3, 32, 32))
    assert h.shape == u.shape == (2, 8 * width)
    first, norm, relu, last = net.projector
    assert first.out_features == last.in_features == 32 * width
    assert isinstance(norm, torch.nn.BatchNorm1d) and isinstance(relu, torch.nn.ReLU)
    if width == 64:  # the paper's
        assert (first.in_features, first.out_features, last.out_features) == (512, 2048, 512)
        assert (count(net.encoder), count(net.projector)) == (11.17, 2.10)


def test_u_may_have_other_dimensions_or_be_h_itself():
    x = torch.rand(2, 3, 16, 16)
    assert [part.shape for part in SSDNet(4, embed_dim=5)(x)] == [(2, 32), (2, 5)]
    h, u = SSDNet(4, projector=False)(x)
    assert torch.equal(h, u)
    assert SSDNet(1)(x)[0].shape == (2, 8)
    assert SSDNet().encoder.conv1.out_channels == resnet18().conv1.out_channels == 64
    with pytest.raises(ValueError, match="got 0"):
        SSDNet(0)


def cifar_resnet18():
    """torchvision's network with a 3x3 stem and without max-pool."""
    net = torchvision.models.resnet18()
    net.conv1 = torch.nn.Conv2d(3, 64, 3, stride=1, padding=1, bias=False)
    torch.nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
    net.maxpool = torch.nn.Identity()
    return net


def test_torchvisions_network_loads_the_encoder_as_it_is_and_gives_the_same():
    torch.manual_seed(0)
    encoder, net = SSDNet().encoder, cifar_resnet18()
    for name, ours in encoder.named_parameters():  # the initialisation, too
        assert ours.std().item() == pytest.approx(net.get_parameter(name).std().item(), rel=0.1)
    missing, unexpected = net.load_state_dict(encoder.state_dict(), strict=False)
    assert missing == ["fc.weight", "fc.bias"] and unexpected == []
    net.fc = torch.nn.Identity()
    x = torch.rand(4, 3, 16, 16)
    for training in (True, False):
        assert torch.allclose(encoder.train(training)(x), net.train(training)(x), atol=1e-6)


@pytest.mark.parametrize("width", [2, 8, 16])
def test_a_shortcut_is_a_strided_convolution_at_every_width(width):
    encoder, x = resnet18(width), torch.rand(3, width, 32, 32)
    assert encoder.state_dict().keys() == resnet18(64).state_dict().keys()
    shortcut = encoder.layer2[0].downsample
    weight, norm = shortcut.get_parameter("0.weight"), shortcut.get_submodule("1")
    strided = torch.nn.functional.conv2d(x, weight, stride=2)
    assert torch.allclose(shortcut(x), norm(strided), atol=1e-6)
    kinds = [type(module) for module in shortcut]  # one that pools only where oneDNN needs it
    assert (torch.nn.AvgPool2d in kinds) == (width < 16)


def test_a_device_that_is_not_there_is_a_value_error():
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device().type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("tpu", "meta", "cuda:99"):
        with pytest.raises(ValueError, match=f"{name}.*--device cpu"):
            pick_device(name)


# ------------------------------------------------------------------ its file

CONFIG = {"width": 2, "embed_dim": 3, "projector": True}


def test_a_checkpoint_comes_back_bit_equal(tmp_path):
    net, path = SSDNet(2, 3), tmp_path / "last.pt"
    save_checkpoint(path, CONFIG, [range(3), [4]], net, [{"round": 1}])
    assert os.listdir(tmp_path) == ["last.pt"]
    draws = torch.get_rng_state()
    checkpoint, again = load_checkpoint(path)
    assert torch.equal(draws, torch.get_rng_state())  # no weights are drawn for it
    assert checkpoint["config"] == CONFIG and checkpoint["history"] == [{"round": 1}]
    assert [part.tolist() for part in checkpoint["split"]] == [[0, 1, 2], [4]]
    assert same(again.state_dict(), net.state_dict())
    assert not again.training and all(p.requires_grad for p in again.parameters())


def test_a_part_that_is_not_of_the_network_is_left_aside(tmp_path):
    net, more = SSDNet(2, 3), SSDNet(2, 3)
    more.predictor = torch.nn.Linear(3, 3)  # as FedX has it
    more.load_state_dict(net.state_dict(), strict=False)
    save_checkpoint(tmp_path / "last.pt", CONFIG, [], more, [])
    assert same(load_checkpoint(tmp_path / "last.pt")[1].state_dict(), net.state_dict())
    with pytest.raises(ValueError, match="another network than model.py's: see predictor.weight"):
        load_weights(net, more.state_dict(), "last.pt")


def test_a_network_that_lost_its_projector_is_another(tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "last.pt", CONFIG, [], SSDNet(2, 3), [])
    whole = SSDNet.__init__

    def without(self, *arguments):
        whole(self, *arguments)
        del self.projector

    monkeypatch.setattr(SSDNet, "__init__", without)
    with pytest.raises(ValueError, match="another network than model.py's: see projector.0.weight"):
        load_checkpoint(tmp_path / "last.pt")


class Code:
    """A pickle of it creates a file when it is read without care."""

    def __reduce__(self):
        return open, ("was_run", "w")


def changed(change):
    """Load the file, change its content, write it again."""

    def damage(path):
        content = torch.load(path, weights_only=True)
        change(content)
        torch.save(content, path)

    return damage


BN, CONV = "encoder.bn1.weight", "encoder.layer1.0.conv1.weight"


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda path: path.write_bytes(b""), "not a checkpoint"),
        (lambda path: path.write_bytes(path.read_bytes()[:2000]), "not a checkpoint"),
        (lambda path: path.unlink(), "not a checkpoint"),
        (lambda path: torch.save(torch.ones(3), path), "not a checkpoint"),
        (lambda path: torch.save({"config": Code()}, path), "not a checkpoint"),
        (changed(lambda content: content["config"].update(width=10**9)), "checkpoint|network"),
        (changed(lambda content: content["config"].update(width=None)), "not a checkpoint"),
        (changed(lambda content: content["config"].update(width=8)), "another network"),
        (changed(lambda content: content["config"].update(projector=False)), "another network"),
        (changed(lambda content: content.pop("config")), "no config in it"),
        (changed(lambda content: content.pop("model")), "no model in it"),
        (changed(lambda content: content.pop("split")), "no split in it"),
        (changed(lambda content: content.pop("history")), "no history in it"),
        (changed(lambda content: content["model"].update({BN: torch.ones(3)})), f"network.*{BN}"),
        (changed(lambda content: content["model"].pop(CONV)), f"another network.*{CONV}"),
    ],
)
def test_a_file_that_is_no_checkpoint_is_one_line_and_changes_nothing(damage, words, run, mistake):
    damage(Path(run))
    before = files()
    mistake(train.main, ["--resume", run], words)
    mistake(evaluation.main, [run, "--device", "cpu"], words)
    assert files() == before
