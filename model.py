"""The network: a ResNet-18 encoder with the CIFAR stem, and a projector; its device and its file.

    x (B, 3, 32, 32) --encoder--> h (B, 8 width) --projector--> u (B, 8 width)

h, the representation, is what is kept after training; the losses act on z = u / ||u|| and, for
projector distillation, on h and u. At width 64 (the paper): h and u have 512 dimensions, the
projector is 512-2048-512; 11.17 M + 2.10 M parameters.
It needs torch and torchvision, and works alone in another project: h, u = SSDNet()(x). For another
network edit SSDNet. It has an `encoder` and returns h and u of 8 width dimensions each.

    python model.py         # shapes and parameter counts (a second, CPU)
"""

import io
from collections import OrderedDict
from pathlib import Path

import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, conv1x1, conv3x3


class SSDNet(nn.Module):
    """Encoder and projector; forward(x) -> (h, u).

    width: channels of the first stage (64: ResNet-18), ValueError below 1. embed_dim: dimensions of
    u, h's if None. projector=False: u is h itself, the paper's ablation.
    """

    def __init__(self, width=64, embed_dim=None, projector=True):
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
                nn.Linear(4 * dim, embed_dim or dim),
            )

    def forward(self, x):
        """x float (B, 3, H, W) in [0, 1] -> h, u (B, 8 width)."""
        h = self.encoder(x)
        return h, self.projector(h)


def resnet18(width=64):
    """torchvision's ResNet-18 without classifier, with the CIFAR stem: 3x3 stride 1, no max-pool.

    float (B, 3, H, W) -> (B, 8 width). Blocks, initialisation, names are torchvision's: its state
    dict fits at width 64 once conv1.weight and fc are dropped. Its class refuses other widths.
    """

    def stage(inputs, outputs, stride):
        shortcut = None
        if stride > 1:
            shortcut = strided_shortcut(inputs, outputs, stride)
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


def strided_shortcut(inputs, outputs, stride):
    """torchvision's shortcut beside a block that shrinks: a 1x1 convolution and BatchNorm.

    Below 16 channels a pooling layer takes the pixels and the convolution has stride 1: in one,
    channels-last, oneDNN writes the gradient past a buffer (torch 2.6 to 2.14, oneDNN issue 6035).
    """
    if inputs >= 16:
        return nn.Sequential(conv1x1(inputs, outputs, stride), nn.BatchNorm2d(outputs))
    parts = OrderedDict(pixels=nn.AvgPool2d(1, stride))
    parts["0"] = conv1x1(inputs, outputs)
    parts["1"] = nn.BatchNorm2d(outputs)
    return nn.Sequential(parts)


def pick_device(name="auto"):
    """A name -> torch.device, made the current one; "auto": CUDA where there is one, else CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.zeros(1, device=name).device
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("neither a CPU nor CUDA")
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} is not there: take --device cpu, cuda, auto") from error
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def save_checkpoint(path, config, split, model, history):
    """Write last.pt: all that --resume and eval.py need, tensors and plain values only.

    Weights and rounds done are enough to go on exactly: every client's optimiser is fresh, random
    numbers are keyed by seed, round and client. A kill leaves the old file or the new one.
    """
    checkpoint = {
        "config": config,
        "history": history,
        "split": [torch.as_tensor(part) for part in split],
        "model": {name: value.cpu() for name, value in model.state_dict().items()},
    }
    content = io.BytesIO()  # torch.save into a full disk is no OSError
    torch.save(checkpoint, content)
    unfinished = Path(f"{path}.tmp")
    unfinished.write_bytes(content.getbuffer())
    unfinished.replace(path)


def load_checkpoint(path):
    """What `save_checkpoint` wrote -> its dict, and its network on the CPU, in evaluation mode.

    No code in it is run; parts that the network does not have, as FedX's predictor, are left aside.
    ValueError for what is no checkpoint, or one of another network.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        for key in ("config", "model", "split", "history"):
            if key not in checkpoint:
                raise ValueError(f"no {key} in it")
        config, state = checkpoint["config"], checkpoint["model"]
        with torch.device("meta"):  # draws no random weights
            net = SSDNet(config["width"], config["embed_dim"], config["projector"])
        parts = {"encoder", "projector", *dict(net.named_children())}
        state = {name: state[name] for name in state if name.split(".")[0] in parts}
    except Exception as error:  # whatever a strange file does
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:120]
        raise ValueError(f"{path} is not a checkpoint of train.py ({reason})") from error
    load_weights(net, state, path)
    return checkpoint, net.eval().to(memory_format=torch.channels_last)


def load_weights(model, state, path):
    """Load a state dict in place; ValueError names the first entry in which the networks differ."""
    own = model.state_dict()
    for name in [*own, *state]:
        if name not in own or name not in state or own[name].shape != state[name].shape:
            raise ValueError(f"{path} is of another network than model.py's: see {name}")
    model.load_state_dict(state, assign=True)


if __name__ == "__main__":
    for width in (64, 32, 16):
        net = SSDNet(width)
        h, u = net(torch.rand(2, 3, 32, 32))
        print(f"width {width}: x (2, 3, 32, 32) -> h {tuple(h.shape)}, u {tuple(u.shape)}", end="")
        for name, part in net.named_children():
            print(f", {name} {sum(p.numel() for p in part.parameters()) / 1e6:.2f} M", end="")
        print()
