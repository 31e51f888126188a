"""model.py: the network is torchvision's ResNet-18 with another stem, at any width."""

import pytest
import torch
import torchvision

from model import SSDNet, bf16_is_fast, resnet18


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_parameter_counts_of_the_paper():
    net = SSDNet()
    assert (
        round(count(net.encoder) / 1e6, 2) == 11.17 and round(count(net.projector) / 1e6, 2) == 2.10
    )


@pytest.mark.parametrize("width", [4, 16])
def test_shapes_scale_with_width(width):
    h, u = SSDNet(width)(torch.rand(2, 3, 32, 32))
    assert h.shape == u.shape == (2, 8 * width)
    assert SSDNet(width).projector[0].out_features == 32 * width
    assert SSDNet(width, embed_dim=7)(torch.rand(2, 3, 32, 32))[1].shape == (2, 7)


def test_full_width_encoder_equals_torchvisions_with_the_cifar_stem():
    torch.manual_seed(0)
    reference = torchvision.models.resnet18()
    reference.conv1 = torch.nn.Conv2d(3, 64, 3, stride=1, padding=1, bias=False)
    reference.maxpool, reference.fc = torch.nn.Identity(), torch.nn.Identity()
    ours = resnet18(64)
    # same tensors in the same order: only the names differ
    values = list(reference.state_dict().values())
    assert [v.shape for v in values] == [v.shape for v in ours.state_dict().values()]
    ours.load_state_dict(dict(zip(ours.state_dict(), values)))
    x = torch.rand(4, 3, 32, 32)
    for training in (True, False):
        assert torch.allclose(ours.train(training)(x), reference.train(training)(x), atol=1e-6)


def test_initialisation_is_torchvisions():
    torch.manual_seed(0)
    ours, reference = resnet18(64), torchvision.models.resnet18()
    for one, other in zip(ours[4][1].parameters(), reference.layer2[1].parameters()):
        assert one.std().item() == pytest.approx(other.std().item(), rel=0.02)


def test_without_projector_u_is_h():
    net = SSDNet(4, projector=False)
    h, u = net(torch.rand(2, 3, 32, 32))
    assert torch.equal(h, u) and not list(net.projector.parameters())


def test_the_stem_keeps_the_resolution():
    stages = resnet18(4)
    x, sizes = torch.rand(1, 3, 32, 32), []
    for module in stages:
        x = module(x)
        sizes.append(x.shape[-1])
    assert sizes == [32, 32, 32, 32, 16, 8, 4, 1, 32]


@pytest.mark.parametrize(
    "arguments",
    [{"width": 0}, {"width": 4, "embed_dim": 0}, {"width": 4, "embed_dim": 7, "projector": False}],
)
def test_impossible_sizes_are_a_value_error(arguments):
    with pytest.raises(ValueError, match="got"):
        SSDNet(**arguments)


def test_bf16_is_a_yes_or_no_for_the_cpu():
    assert bf16_is_fast("cpu") in (True, False) and bf16_is_fast("meta") is False
