"""model.py: the network is torchvision's ResNet-18 with another stem, at any width."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision

from model import SSDNet, resnet18


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
    first, norm, relu, last = SSDNet(width).projector
    assert first.out_features == last.in_features == 32 * width
    assert isinstance(norm, torch.nn.BatchNorm1d) and isinstance(relu, torch.nn.ReLU)


def cifar_resnet18():
    """torchvision's network with a 3x3 stem and without max-pool."""
    net = torchvision.models.resnet18()
    net.conv1 = torch.nn.Conv2d(3, 64, 3, stride=1, padding=1, bias=False)
    net.maxpool = torch.nn.Identity()
    return net


def test_torchvisions_network_loads_the_encoder_as_it_is_and_gives_the_same():
    torch.manual_seed(0)
    encoder, net = SSDNet().encoder, cifar_resnet18()
    missing, unexpected = net.load_state_dict(encoder.state_dict(), strict=False)
    assert missing == ["fc.weight", "fc.bias"] and unexpected == []
    net.fc = torch.nn.Identity()
    x = torch.rand(4, 3, 32, 32)
    for training in (True, False):
        assert torch.allclose(encoder.train(training)(x), net.train(training)(x), atol=1e-6)


def test_initialisation_is_torchvisions():
    torch.manual_seed(0)
    ours, reference = resnet18(64), cifar_resnet18()
    torch.nn.init.kaiming_normal_(reference.conv1.weight, mode="fan_out", nonlinearity="relu")
    for name, one in ours.named_parameters():
        other = reference.get_parameter(name)
        assert one.std().item() == pytest.approx(other.std().item(), rel=0.1), name


@pytest.mark.parametrize("width", [2, 8, 16])
def test_a_shortcut_is_a_strided_convolution_at_every_width(width):
    encoder, x = resnet18(width), torch.rand(3, width, 32, 32)
    assert encoder.state_dict().keys() == resnet18(64).state_dict().keys()
    shortcut = encoder.layer2[0].downsample
    weight, norm = shortcut.get_parameter("0.weight"), shortcut.get_submodule("1")
    strided = torch.nn.functional.conv2d(x, weight, stride=2)
    assert torch.allclose(shortcut(x), norm(strided), atol=1e-6)


# A strided 1x1 convolution of 8 channels in the place of the shortcut ends this with a signal, on
# CPUs with AVX-512.
NARROW = """
import torch
from model import resnet18

torch.set_num_threads(2)
shortcut = resnet18(8).layer2[0].downsample.to(memory_format=torch.channels_last)
x = torch.rand(127, 8, 32, 32).to(memory_format=torch.channels_last)
for _ in range(12):
    shortcut(x).sum().backward()
"""


def test_a_narrow_network_trains_in_channels_last():
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", NARROW], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


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


def test_an_impossible_width_is_a_value_error():
    with pytest.raises(ValueError, match="got 0"):
        SSDNet(0)
