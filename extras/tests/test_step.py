"""The training step that is fast is the step that is right; it neither waits, grows nor recompiles.

DEVICE (environment): the device that the step is tested on, the GPU where there is one. DEVICE=cpu
runs the comparisons with the CPU on itself: a rehearsal. What leans on private parts of torch (the
fake device, the compiler's backends) was written for TORCH and is skipped with other versions.
"""

import contextlib
import os

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before CUDA starts: deterministic

import bench
import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import eval as evaluation
import train
from data import augment, draw_params, two_views
from federated import federated_round, keyed_generator, train_client
from losses import align_loss, distill_loss, dsr_loss, scaling_vectors, ssd_loss, uniform_loss
from model import SSDNet

TORCH = ("2.11", "2.14", "2.15")
needs_private_parts = pytest.mark.skipif(
    not torch.__version__.startswith(TORCH), reason=f"written for torch {', '.join(TORCH)}"
)
IMAGES = torch.randint(256, (64, 3, 32, 32), generator=torch.Generator().manual_seed(0)).byte()
CPU = torch.device("cpu")
DEVICE = torch.device(os.environ.get("DEVICE", "cuda" if torch.cuda.is_available() else "cpu"))
compares_devices = pytest.mark.skipif(
    DEVICE == CPU and "DEVICE" not in os.environ, reason="needs a GPU, or DEVICE=cpu to rehearse"
)


def config(**changes):
    flags = "--width 8 --batch-size 32 --lr 0.0003 --device cpu".split()
    return {**vars(train.build_parser().parse_args(flags)), **train.METHODS["ssd"], **changes}


@pytest.fixture
def exact():
    """Deterministic algorithms and no TF32, as on the CPU."""
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        torch.use_deterministic_algorithms(True)
        yield
        torch.use_deterministic_algorithms(False)


# ------------------------------------------------------------------ right


def fast_losses(amp, steps=20):
    """The losses of one client's 20 steps as train.py takes them, one image batch a step."""
    torch.manual_seed(0)
    net = SSDNet(8).to(DEVICE, memory_format=torch.channels_last)
    sgd = torch.optim.SGD(net.parameters(), 0.0003, 0.9, weight_decay=1e-4)
    seen, loss = [], train.make_loss(config(amp=amp), 10, DEVICE)

    def spy(model, batch, k, generator, global_state):
        value, terms = loss(model, batch, k, generator, global_state)
        seen.append(value.detach())
        return value, terms

    rng = keyed_generator("s")
    train_client(net, sgd, IMAGES.to(DEVICE), range(64), spy, 3, rng, steps // 2, 32)
    return torch.stack(seen).cpu()


def plain_losses(dtype, steps=20):
    """The same on the CPU, two forwards, written out from the equations."""
    torch.manual_seed(0)
    net = SSDNet(8).to(dtype=dtype, memory_format=torch.channels_last)
    generator, seen = keyed_generator("s"), []
    sgd = torch.optim.SGD(net.parameters(), 0.0003, 0.9, weight_decay=1e-4)
    d_k = scaling_vectors(10, 64)[3]
    while len(seen) < steps:
        for index in torch.randperm(64, generator=generator).split(32):
            views = two_views(IMAGES[index], generator)
            (h1, u1), (h2, u2) = (net(view.to(dtype)) for view in views)
            z1, z2 = F.normalize(u1, dim=1), F.normalize(u2, dim=1)
            value = align_loss(z1, z2) + (uniform_loss(z1) + uniform_loss(z2)) / 2
            value = value + (dsr_loss(z1, d_k) + dsr_loss(z2, d_k)) / 2
            value = value + 0.1 * (distill_loss(h1, u1) + distill_loss(h2, u2)) / 2
            sgd.zero_grad()
            value.backward()
            sgd.step()
            seen.append(value.detach())
    return torch.stack(seen)


def test_the_fast_step_equals_a_plain_one(exact):
    """Over 20 steps roundings grow: float32 on the CPU is 0.008 from float64 at the 17th."""
    plain = plain_losses(torch.float64)
    assert plain[-1] < plain[0] - 0.2  # it trains
    float32, bfloat16 = fast_losses(amp=False), fast_losses(amp=True)
    assert (float32 - plain).abs().max() < 0.02
    assert (bfloat16 - plain).abs().max() < 0.05
    same = plain_losses(torch.float32, steps=4)  # the same roundings, where it is the same device
    assert (float32[:4] - same).abs().max() < (1e-5 if DEVICE == CPU else 1e-3)


@compares_devices
def test_the_views_equal_the_cpus(exact):
    here = two_views(IMAGES, keyed_generator("v"))
    there = two_views(IMAGES.to(DEVICE), keyed_generator("v"))
    for one, other in zip(here, there):
        assert other.device.type == DEVICE.type
        assert (one - other.cpu()).abs().max() < 1e-5


def flat(state):
    return torch.cat([value.flatten().double() for value in state.values()])


@compares_devices
def test_a_federated_round_equals_the_cpus(exact):
    """In float32: the round's change of the state to 1 %; twice on the device, bit by bit."""

    def change(device):
        torch.manual_seed(0)
        net = SSDNet(8).to(device, memory_format=torch.channels_last)
        before = flat(net.state_dict())
        sgd = torch.optim.SGD(net.parameters(), 0.0003, 0.9, fused=device.type == "cuda")
        loss = train.make_loss(config(amp=False), 3, device)
        split = [range(0, 34), range(30, 40), range(20, 64)]
        federated_round(net, sgd, IMAGES.to(device), split, loss, 0, local_epochs=2, batch_size=32)
        return (flat(net.state_dict()) - before).cpu()

    there, again, here = change(DEVICE), change(DEVICE), change(CPU)
    assert torch.equal(there, again)
    assert (there - here).norm() < 0.01 * here.norm()


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


# ------------------------------------------------------------------ one graph


def not_counted(function):
    """Dispatch modes do not see what it does; compiled code refuses to run under them."""

    def run(*arguments):
        with _disable_current_modes():
            return function(*arguments)

    return run


def compile_by(monkeypatch, backend):
    """torch.compile as train.py calls it, but for the backend; returns the flags it was given."""
    torch._dynamo.reset()
    compile_, flags = torch.compile, {}

    def compile_by_it(function, mode, **rest):
        flags.update(rest)
        return not_counted(compile_(function, backend=backend, **rest))

    monkeypatch.setattr(torch, "compile", compile_by_it)
    return flags


@pytest.fixture
def graphs(monkeypatch):
    """A backend that runs graphs as they are, lists them and counts the operations outside."""
    counter = bench.Launches()
    counter.made = []

    def compiler(graph, inputs):
        counter.made.append(graph)
        return make_boxed_func(not_counted(graph.forward))

    backend = aot_autograd(fw_compiler=compiler, keep_inference_input_mutations=True)
    counter.flags = compile_by(monkeypatch, backend)
    monkeypatch.setattr("data.draw_params", not_counted(draw_params))  # always on the CPU
    return counter


def two_rounds(objective=ssd_loss):
    """With --compile, over three clients; the second has a short batch alone."""
    net = SSDNet(2)
    sgd = torch.optim.SGD(net.parameters(), 0.01, 0.9, fused=True)
    settings = config(width=2, amp=False, compile=True, batch_size=8)
    loss = train.make_loss(settings, 3, CPU, objective)
    split = [range(0, 17), range(17, 22), range(22, 64)]
    with torch._dynamo.config.patch(error_on_recompile=True):
        for r in range(2):
            federated_round(net, sgd, IMAGES, split, loss, r, local_epochs=1, batch_size=8)
    return net, sgd, loss


@needs_private_parts
def test_the_step_is_one_graph_for_all_clients_and_little_stays_outside(graphs):
    net, sgd, loss = two_rounds()
    assert graphs.flags == {"dynamic": False, "fullgraph": True}
    assert len(graphs.made) == 2  # its forward and its backward

    def outside(steps):
        graphs.count = 0
        with graphs:
            rng = keyed_generator("o")
            train_client(net, sgd, IMAGES, range(8 * steps), loss, 0, rng, 1, 8)
        return graphs.count

    assert 10 < outside(3) - outside(2) <= 60
    assert len(graphs.made) == 2


def branching(*outputs, **options):
    value, terms = ssd_loss(*outputs, **options)
    return (value if value < 100 else -value), terms


def counting(*outputs, calls=[], **options):  # noqa: B006
    value, terms = ssd_loss(*outputs, **options)
    calls.append(value.shape)
    return value * len(calls), terms


@needs_private_parts
@pytest.mark.parametrize(
    "objective, error", [(branching, "Unsupported"), (counting, "RecompileError")]
)
def test_a_break_and_a_recompilation_would_be_seen(graphs, objective, error):
    with pytest.raises(RuntimeError) as raised:
        two_rounds(objective)
    assert type(raised.value).__name__ == error


@needs_private_parts
@pytest.mark.parametrize("amp", [False, True])
def test_the_compiled_step_equals_the_eager_one(amp, exact, monkeypatch):
    """Loss and gradients: float32 to 2 %, bfloat16 as near as bfloat16 is to float32 in eager mode.

    On a CPU by aot_eager: inductor takes minutes there. Its gradients were 0.8 % off in float32.
    """
    if DEVICE == CPU:
        compile_by(monkeypatch, "aot_eager")

    def gradients(amp, compiled=False):
        torch.manual_seed(0)
        net = SSDNet(2).to(DEVICE, memory_format=torch.channels_last)
        settings = config(width=2, amp=amp, compile=compiled)
        loss = train.make_loss(settings, 10, DEVICE)
        value, _ = loss(net, IMAGES[:32].to(DEVICE), 3, keyed_generator("g"), None)
        value.backward()
        return value.item(), torch.cat([p.grad.flatten() for p in net.parameters()])

    (_, exactly), (value, eager) = gradients(False), gradients(amp)
    compiled_value, compiled = gradients(amp, compiled=True)
    bound = (eager - exactly).norm() if amp else 0.02 * exactly.norm()
    assert bound < 0.5 * exactly.norm()
    assert (compiled - eager).norm() < bound
    assert abs(compiled_value - value) < (0.02 if amp else 1e-4)


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


# ------------------------------------------------------------------ no wait


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


def local_epochs(fake, epochs=1, method="ssd"):
    """Local epochs of two steps each; what the host asked for."""
    settings = config(width=2, amp=True, batch_size=16, compile=False) | train.METHODS[method]
    loss = train.make_loss(settings | {"method": method}, 10, torch.device("cuda"))
    fake.seen.clear()
    sgd = torch.optim.SGD(fake.net.parameters(), 0.1, 0.9, fused=True)

    def backward(value):
        fake.seen.append("step")
        for parameter in fake.net.parameters():
            parameter.grad = torch.zeros_like(parameter)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "backward", backward)
        rng = keyed_generator("f")
        train_client(fake.net, sgd, fake.images, range(40), loss, 3, rng, epochs, 16)
    return fake.seen


# The order of an epoch's images, then for every step one pinned copy; the terms when all is done.
EPOCH, TERMS = ["staged", *2 * ["pinned", "step"]], 5 * ["read"]


@needs_private_parts
@pytest.mark.parametrize("method", ["ssd", "hsd"])
def test_local_training_never_waits_for_the_device(fake, method):
    seen = []
    fake.net.register_forward_hook(lambda *arguments: seen.append(arguments[2][0].dtype))
    assert local_epochs(fake, 2, method) == EPOCH + EPOCH + TERMS
    assert set(seen) == {torch.bfloat16} and len(seen) == 8


def scores(fake):
    """Features of 1,200 images and their kNN; what the host asked for."""
    labels = torch.zeros(1200, dtype=torch.long, device="cuda")
    h, u = evaluation.encode(fake.net, torch.zeros(1200, 3, 32, 32, dtype=torch.uint8), amp=True)
    assert h.is_cuda and u.is_cuda
    evaluation.knn_accuracy(h, labels, h, labels)
    return fake.seen


# Three batches of images, as they lie on the CPU; the number of classes; the accuracy.
SCORES = 3 * ["waited"] + 2 * ["read"]


@needs_private_parts
def test_features_and_knn_wait_once_an_answer(fake):
    assert scores(fake) == SCORES


FAULTS = {
    "item": lambda x: x * x.mean().item(),
    "bool": lambda x: x if x.sum() > 0 else -x,
    "nonzero": lambda x: x[x.sum(1).nonzero()[:, 0]] if x.ndim == 2 else x[x.sum((1, 2, 3)) > 0],
    "to the CPU and back": lambda x: x.cpu().to(x.device),
    "a CPU operand": lambda x: x * torch.ones(len(x)).view(-1, *[1] * (x.ndim - 1)),
    "a copy": lambda x: x + torch.ones(2, 1).to(x.device).mean(),
}


@needs_private_parts
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("where", ["views", "network", "losses", "features"])
def test_a_wait_or_a_wrong_device_would_be_seen(fake, fault, where, monkeypatch):
    """Each fault once in each place: what is asked for is something else, or it does not run."""
    wrong = FAULTS[fault]
    if where == "views":
        monkeypatch.setattr("data.augment", lambda *both: wrong(augment(*both)))
    elif where == "losses":
        normalize = F.normalize
        monkeypatch.setattr(F, "normalize", lambda x, **dim: wrong(normalize(x, **dim)))
    else:
        fake.net.encoder.register_forward_hook(lambda *arguments: wrong(arguments[2]))
    run, expected = (scores, SCORES) if where == "features" else (local_epochs, EPOCH + TERMS)
    try:
        assert run(fake) != expected
    except (RuntimeError, NotImplementedError) as error:  # of fake tensors
        assert any(word in str(error) for word in ("same device", "nonzero", "Unhandled")), error
