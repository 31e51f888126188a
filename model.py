"""The network: a ResNet-18 encoder with the CIFAR stem, and a projector.

    x (B, 3, 32, 32) --encoder--> h (B, 8 width) --projector--> u (B, embed_dim)

h, the representation, is what is kept after training; the losses act on z = u / ||u|| and, for
projector distillation, on h and u. At width 64 (the paper): h and u have 512 dimensions, the
projector is 512-2048-512; 11.17 M + 2.10 M parameters.
Needs torch, torchvision; copies into another project as it is. There:

    >>> net = SSDNet(width=16)
    >>> h, u = net(torch.rand(2, 3, 32, 32))
    >>> tuple(h.shape), tuple(u.shape)
    ((2, 128), (2, 128))

    python model.py         # shapes and parameter counts (a second, CPU)
"""

from collections import OrderedDict

import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, conv1x1, conv3x3


class SSDNet(nn.Module):
    """Encoder and projector; forward(x) -> (h, u).

    width: channels of the first stage (64: ResNet-18); h has 8 x width dimensions. embed_dim: of u,
    by default that of h, as projector distillation needs. projector=False: u is h itself, the
    paper's ablation. ValueError for a width or embed_dim below 1.
    """

    def __init__(self, width=64, embed_dim=None, projector=True):
        super().__init__()
        dim = 8 * width
        embed_dim = dim if embed_dim is None else embed_dim
        if width < 1 or embed_dim < 1:
            raise ValueError(f"width and embed_dim must be at least 1, got {width} and {embed_dim}")
        if not projector and embed_dim != dim:
            raise ValueError(f"without projector u is h: embed_dim must be {dim}, got {embed_dim}")
        self.encoder = resnet18(width)
        self.projector = nn.Identity()
        if projector:
            self.projector = nn.Sequential(
                nn.Linear(dim, 4 * dim),
                nn.BatchNorm1d(4 * dim),
                nn.ReLU(inplace=True),
                nn.Linear(4 * dim, embed_dim),
            )

    def forward(self, x):
        """x float (B, 3, H, W) in [0, 1] -> h (B, 8 width), u (B, embed_dim)."""
        h = self.encoder(x)
        return h, self.projector(h)


def resnet18(width=64):
    """torchvision's ResNet-18 without classifier, with the CIFAR stem: 3x3 stride 1, no max-pool.

    float (B, 3, H, W) -> (B, 8 width). Same blocks, initialisation and names as torchvision's, so
    that state dicts fit both at width 64, conv1 and fc apart; the stages have width, 2, 4 and
    8 x width channels. Not torchvision's class itself: that refuses other widths.
    """

    def stage(inputs, outputs, stride):
        shortcut = None
        if stride > 1:
            # Below 16 channels every other pixel first, then a convolution of stride 1: the same
            # numbers. With both in one, channels-last, oneDNN writes past its buffer for the
            # gradient of the weights: a crash, or no end, on CPUs with AVX2 or AVX-512, torch 2.6
            # to 2.14 (github.com/uxlfoundation/oneDNN/issues/6035).
            narrow = inputs < 16
            parts = {"pixels": nn.AvgPool2d(1, stride)} if narrow else {}
            parts["0"] = conv1x1(inputs, outputs, 1 if narrow else stride)
            parts["1"] = nn.BatchNorm2d(outputs)
            shortcut = nn.Sequential(OrderedDict(parts))
        first = BasicBlock(inputs, outputs, stride, shortcut)
        return nn.Sequential(first, BasicBlock(outputs, outputs))

    parts = {
        "conv1": conv3x3(3, width),
        "bn1": nn.BatchNorm2d(width),
        "relu": nn.ReLU(inplace=True),
        "layer1": stage(width, width, 1),
        "layer2": stage(width, 2 * width, 2),
        "layer3": stage(2 * width, 4 * width, 2),
        "layer4": stage(4 * width, 8 * width, 2),
        "avgpool": nn.AdaptiveAvgPool2d(1),
        "flatten": nn.Flatten(),
    }
    net = nn.Sequential(OrderedDict(parts))
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return net


if __name__ == "__main__":
    for width in (64, 32, 16):
        net = SSDNet(width)
        h, u = net(torch.rand(2, 3, 32, 32))
        encoder, projector = (
            sum(p.numel() for p in part.parameters()) for part in (net.encoder, net.projector)
        )
        print(
            f"width {width}: x (2, 3, 32, 32) -> h {tuple(h.shape)}, u {tuple(u.shape)}; "
            f"parameters: encoder {encoder / 1e6:.2f} M, projector {projector / 1e6:.2f} M"
        )
