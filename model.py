"""The network: a ResNet-18 encoder with the CIFAR stem, and a projector.

    x (B, 3, 32, 32) --encoder--> h (B, 8 width) --projector--> u (B, 8 width)

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

    width: channels of the first stage (64: ResNet-18), ValueError below 1. projector=False: u is h
    itself, the paper's ablation.
    """

    def __init__(self, width=64, projector=True):
        super().__init__()
        if width < 1:
            raise ValueError(f"width must be at least 1, got {width}")
        dim = 8 * width
        self.encoder = resnet18(width)
        self.projector = nn.Identity()
        if projector:
            self.projector = nn.Sequential(
                nn.Linear(dim, 4 * dim),
                nn.BatchNorm1d(4 * dim),
                nn.ReLU(inplace=True),
                nn.Linear(4 * dim, dim),
            )

    def forward(self, x):
        """x float (B, 3, H, W) in [0, 1] -> h, u (B, 8 width)."""
        h = self.encoder(x)
        return h, self.projector(h)


def resnet18(width=64):
    """torchvision's ResNet-18 without classifier, with the CIFAR stem: 3x3 stride 1, no max-pool.

    float (B, 3, H, W) -> (B, 8 width). Blocks, initialisation and names are torchvision's, so that
    state dicts fit both at width 64, conv1 and fc apart; its class itself refuses other widths.
    """

    def stage(inputs, outputs, stride):
        shortcut = None
        if stride > 1:
            # Below 16 channels the pixels are taken before the convolution: in one, channels-last,
            # oneDNN writes its gradient past a buffer (torch 2.6 to 2.14, oneDNN's issue 6035).
            narrow = inputs < 16
            conv = conv1x1(inputs, outputs, 1 if narrow else stride)
            parts = OrderedDict(pixels=nn.AvgPool2d(1, stride)) if narrow else OrderedDict()
            parts |= {"0": conv, "1": nn.BatchNorm2d(outputs)}
            shortcut = nn.Sequential(parts)
        first = BasicBlock(inputs, outputs, stride, shortcut)
        return nn.Sequential(first, BasicBlock(outputs, outputs))

    parts = OrderedDict(
        conv1=conv3x3(3, width),
        bn1=nn.BatchNorm2d(width),
        relu=nn.ReLU(inplace=True),
        layer1=stage(width, width, 1),
        layer2=stage(width, 2 * width, 2),
        layer3=stage(2 * width, 4 * width, 2),
        layer4=stage(4 * width, 8 * width, 2),
        avgpool=nn.AdaptiveAvgPool2d(1),
        flatten=nn.Flatten(),
    )
    net = nn.Sequential(parts)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return net


def load_checkpoint(path):
    """A checkpoint of train.py -> its dict, and its network on the CPU, in evaluation mode.

    No code in it is run; parts besides encoder and projector are left aside. ValueError else.
    """
    try:
        checkpoint = dict(torch.load(path, map_location="cpu", weights_only=True))
        config, state, *_ = (checkpoint[x] for x in ("config", "model", "split", "history"))
        with torch.device("meta"):  # draws no random weights
            net = SSDNet(config["width"], projector=config["projector"])
        own = {n: v for n, v in state.items() if n.startswith(("encoder.", "projector."))}
        net.load_state_dict(own, assign=True)
    except Exception as error:
        reason = " ".join((str(error) or type(error).__name__).split())[:120]
        raise ValueError(f"{path} is not a checkpoint of this train.py ({reason})") from error
    return checkpoint, net.eval().to(memory_format=torch.channels_last)


if __name__ == "__main__":
    for width in (64, 32, 16):
        net = SSDNet(width)
        h, u = net(torch.rand(2, 3, 32, 32))
        millions = [sum(p.numel() for p in part.parameters()) / 1e6 for part in net.children()]
        print(f"width {width}: x (2, 3, 32, 32) -> h {tuple(h.shape)}, u {tuple(u.shape)}", end="")
        print("; parameters: encoder {:.2f} M, projector {:.2f} M".format(*millions))
