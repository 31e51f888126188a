"""The training step that is fast is the step that is right; it does not grow or recompile."""

import gc

import pytest
import torch
import torch.nn.functional as F

import train
from data import two_views
from federated import federated_round, keyed_generator, train_client
from losses import align_loss, distill_loss, dsr_loss, scaling_vectors, uniform_loss
from model import SSDNet

IMAGES = torch.randint(256, (64, 3, 32, 32), generator=torch.Generator().manual_seed(0)).byte()
CPU = torch.device("cpu")


def config(**changes):
    flags = "--width 8 --batch-size 32 --lr 0.0003 --device cpu".split()
    return {**vars(train.build_parser().parse_args(flags)), **train.METHODS["ssd"], **changes}


def fast_losses(amp, steps=20):
    """The losses of one client's 20 steps as train.py takes them, one image batch a step."""
    torch.manual_seed(0)
    net = SSDNet(8).to(memory_format=torch.channels_last)
    sgd = torch.optim.SGD(net.parameters(), 0.0003, 0.9, weight_decay=1e-4)
    seen, loss = [], train.make_loss(config(amp=amp), 10, CPU)

    def spy(model, batch, k, generator, global_state):
        value, terms = loss(model, batch, k, generator, global_state)
        seen.append(value.detach())
        return value, terms

    train_client(net, sgd, IMAGES, range(64), spy, 3, keyed_generator("s"), steps // 2, 32)
    return torch.stack(seen)


def plain_losses(steps=20):
    """The same in float32, two forwards, written out from the equations."""
    torch.manual_seed(0)
    net = SSDNet(8).to(memory_format=torch.channels_last)
    generator, seen = keyed_generator("s"), []
    sgd = torch.optim.SGD(net.parameters(), 0.0003, 0.9, weight_decay=1e-4)
    d_k = scaling_vectors(10, 64)[3]
    while len(seen) < steps:
        for index in torch.randperm(64, generator=generator).split(32):
            (h1, u1), (h2, u2) = (net(view) for view in two_views(IMAGES[index], generator))
            z1, z2 = F.normalize(u1, dim=1), F.normalize(u2, dim=1)
            value = align_loss(z1, z2) + (uniform_loss(z1) + uniform_loss(z2)) / 2
            value = value + (dsr_loss(z1, d_k) + dsr_loss(z2, d_k)) / 2
            value = value + 0.1 * (distill_loss(h1, u1) + distill_loss(h2, u2)) / 2
            sgd.zero_grad()
            value.backward()
            sgd.step()
            seen.append(value.detach())
    return torch.stack(seen)


def test_the_fast_step_equals_a_plain_one():
    plain = plain_losses()
    assert plain[-1] < plain[0] - 0.2  # it trains
    assert (fast_losses(amp=False) - plain).abs().max() < 1e-5
    assert (fast_losses(amp=True) - plain).abs().max() < 0.05


def test_the_memory_layout_changes_no_gradient():
    """In float64: in float32 a rounding that crosses a ReLU's corner shows in either layout."""
    gradients = []
    x = torch.rand(32, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        net = SSDNet(8).to(dtype=torch.float64, memory_format=layout)
        uniform_loss(F.normalize(net(x)[1], dim=1)).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
    assert (gradients[0] - gradients[1]).norm() < 1e-9 * gradients[0].norm()


def test_compiled_code_is_made_once_for_all_clients(monkeypatch):
    """Clients of other sizes and d_k: no recompilation, and short batches stay outside."""
    compile_, calls = torch.compile, []

    def counting(graph, inputs):
        calls.append(graph)
        return graph.forward

    monkeypatch.setattr(
        train.torch,
        "compile",
        lambda f, **_: compile_(f, backend=counting, dynamic=False, fullgraph=True),
    )
    net = SSDNet(2)
    sgd = torch.optim.SGD(net.parameters(), 0.01)
    loss = train.make_loss(config(width=2, amp=False, compile=True, batch_size=8), 3, CPU)
    split = [range(0, 17), range(17, 22), range(22, 64)]
    for r in range(2):
        federated_round(net, sgd, IMAGES, split, loss, r, local_epochs=1, batch_size=8)
        if r == 0:
            compiled = len(calls)
    assert 1 <= compiled == len(calls)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_graphs_are_neither_skipped_nor_recorded_again():
    from torch._dynamo.utils import counters

    device = torch.device("cuda")
    net = SSDNet(8).to(device, memory_format=torch.channels_last)
    sgd = torch.optim.SGD(net.parameters(), 0.01)
    loss = train.make_loss(config(amp=True, compile=True), 3, device)
    images, split = IMAGES.to(device), [range(64), range(10), range(0, 64, 1)]
    for r in range(4):
        federated_round(net, sgd, images, split, loss, r, local_epochs=2, batch_size=32)
        if r == 1:
            before = counters["stats"]["unique_graphs"]
    assert counters["stats"]["unique_graphs"] == before
    assert counters["inductor"]["cudagraph_skips"] == 0


def test_a_round_costs_the_same_memory_for_10_and_for_1000_clients():
    def bytes_alive():
        storages = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
            for t in gc.get_objects()
            if type(t) in (torch.Tensor, torch.nn.Parameter)
        }
        return sum(storages.values())

    def peak(clients):
        net = torch.nn.Linear(50, 50)
        sgd = torch.optim.SGD(net.parameters(), 0.01, 0.9)
        samples, seen = torch.randn(clients, 50), []

        def progress(k, mine):
            if k % (clients // 10) == clients // 10 - 1:
                gc.collect()
                seen.append(bytes_alive() - samples.nbytes)

        def loss(model, batch, k, generator, global_state):
            return model(batch).square().mean(), {}

        split = [[k] for k in range(clients)]
        federated_round(net, sgd, samples, split, loss, 0, local_epochs=1, progress=progress)
        assert len(seen) == 10
        return max(seen)

    assert peak(1000) <= peak(10) + 1000
