"""Training never waits for the GPU: tested without one, on a device that has shapes and no numbers.

This leans on private parts of torch. It was written for its versions TORCH, and skipped elsewhere.
"""
# ruff: noqa: E402

import contextlib

import pytest
import torch

TORCH = ("2.11", "2.14", "2.15")
if not torch.__version__.startswith(TORCH):
    pytest.skip(f"written for torch {', '.join(TORCH)}", allow_module_level=True)

from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

import train
from data import draw_params
from federated import keyed_generator, train_client
from model import SSDNet


class Waits(TorchDispatchMode):
    """Lists what a GPU would be asked for by the host: "read" and "waited" are waits.

    "pinned": sent from pinned memory without a wait; "staged": without a wait, from other memory.
    """

    def __init__(self):
        super().__init__()
        self.seen, self.pinned = [], []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, operation.overloadpacket.__name__
        if name == "_local_scalar_dense" and args[0].is_cuda:  # item(), float(), bool() ...
            self.seen.append("read")
            return 0
        if name == "_pin_memory":  # unknown to fake tensors, as fused SGD is
            self.pinned.append(args[0].clone())
            return self.pinned[-1]
        if name == "_fused_sgd_":
            assert all(value.is_cuda for part in args[:3] for value in part)
            return None
        result = operation(*args, **kwargs)
        if name in ("_to_copy", "copy_"):
            source = args[name == "copy_"]
            if source.is_cuda != result.is_cuda:
                sent = "pinned" if any(source is value for value in self.pinned) else "staged"
                self.seen.append(sent if kwargs.get("non_blocking") else "waited")
        return result


@pytest.fixture
def fake(monkeypatch):
    """A CUDA device that has shapes and no numbers. Backward passes do not work there."""
    torch._C._ensureCUDADeviceGuardSet()
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    with FakeTensorMode() as mode, Waits() as waits:

        def drawn(*arguments):
            with unset_fake_temporarily():  # on the CPU, where numbers decide on shapes
                params = draw_params(*arguments)
            return {name: mode.from_tensor(value) for name, value in params.items()}

        monkeypatch.setattr("data.draw_params", drawn)
        with torch.device("cuda"):
            waits.net = SSDNet(2)
            waits.images = torch.zeros(40, 3, 32, 32, dtype=torch.uint8)
        waits.seen.clear()
        yield waits


def local_epochs(fake, method="ssd"):
    """Two local epochs of two steps each; what the host asked for."""
    flags = ["--width", "2", "--batch-size", "16", "--method", method, "--amp", "--no-compile"]
    settings, _ = train.read_config(train.build_parser(), flags)
    loss = train.make_loss(settings, 10, torch.device("cuda"))
    sgd = torch.optim.SGD(fake.net.parameters(), 0.1, 0.9, fused=True)
    fake.seen.clear()

    def backward(value):
        fake.seen.append("step")
        for parameter in fake.net.parameters():
            parameter.grad = torch.zeros_like(parameter)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "backward", backward)
        train_client(fake.net, sgd, fake.images, range(40), loss, 3, keyed_generator("f"), 2, 16)
    return fake.seen


# The order of an epoch's images, then for every step one pinned copy; the terms when all is done.
EPOCH, TERMS = ["staged", *2 * ["pinned", "step"]], 5 * ["read"]


@pytest.mark.parametrize("method", ["ssd", "hsd"])
def test_local_training_never_waits_for_the_device(fake, method):
    seen = []
    fake.net.register_forward_hook(lambda *arguments: seen.append(arguments[2][0].dtype))
    assert local_epochs(fake, method) == EPOCH + EPOCH + TERMS
    assert set(seen) == {torch.bfloat16} and len(seen) == 8


def test_a_wait_would_be_seen(fake):
    fake.net.encoder.register_forward_hook(lambda _, __, h: h * h.sum().item())
