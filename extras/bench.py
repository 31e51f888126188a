"""What a training step costs, from the usual pipeline to ours: one change a row, all in one run.

    python extras/bench.py --quick      # three minutes on two CPU cores
    python extras/bench.py              # longer blocks and the compiled rows, eight minutes there

The step: a batch in two views, encoder + projector forward and backward, SSD's loss, SGD. Rows are
timed in interleaved blocks, so that a slow moment of the machine hits all of them; a row's figure
is the median over the blocks, +- half the distance between the quartiles. The first row is the
pipeline that this field's codes have: torchvision's transforms image by image in four DataLoader
workers, float32, two forwards, every loss term read after every step. The rows below it run
train.py's own loss (one with the views outside) through federated.py's local training. An operation
is a launch, or more.
"""

import argparse
import math
import platform
import statistics
import sys
import time
import warnings
from pathlib import Path

import torch
import torchvision.transforms as T
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))

from data import draw_params, draw_views, two_views  # noqa: E402
from federated import keyed_generator, train_client  # noqa: E402
from losses import scaling_vectors, ssd_loss  # noqa: E402
from model import SSDNet, pick_device  # noqa: E402
from train import build_parser, make_loss, number  # noqa: E402

PAPER_STEPS = 192_500  # CIFAR-10, 10 clients, 100 rounds, 5 local epochs

PER_SAMPLE = T.Compose(
    [
        T.RandomResizedCrop(32, (0.08, 1.0)),
        T.RandomHorizontalFlip(),
        T.RandomApply([T.ColorJitter(0.8, 0.8, 0.8, 0.2)], p=0.8),
        T.RandomGrayscale(0.2),
        T.ToTensor(),
    ]
)


class TwoViewDataset(torch.utils.data.Dataset):
    """The usual data set: one image at a time through PIL, twice; `length` samples of `images`."""

    def __init__(self, images, length):
        self.images, self.length = [T.functional.to_pil_image(image) for image in images], length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        image = self.images[index % len(self.images)]
        return PER_SAMPLE(image), PER_SAMPLE(image)


class Row:
    """One configuration of the step, with a network and an optimiser of its own."""

    def __init__(self, name, args, device, *, loader=False, nchw=False, **config):
        torch.manual_seed(0)
        self.benchmark, views = config.pop("benchmark", False), config.pop("views", True)
        sync = config.pop("sync", True)
        self.name, self.device, self.loader, self.size = name, device, loader, args.batch_size
        layout = torch.contiguous_format if nchw else torch.channels_last
        self.net = SSDNet(args.width).to(device, memory_format=layout)
        fused = True if device.type == "cuda" and not sync else None  # as train.py
        sgd = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4, "fused": fused}
        self.optimizer = torch.optim.SGD(self.net.parameters(), **sgd)
        config = {**vars(build_parser().parse_args([])), **vars(args), "compile": False, **config}
        self.loss = make_loss({**config, "gamma": 1.0, "delta": 0.1}, 10, device)
        self.d_k, self.sync = scaling_vectors(10, 8 * args.width)[0].to(device), sync
        if not views:
            self.loss = loss_without_views(config["amp"], self.d_k)

    def local_loss(self, model, images, k, generator, global_state):
        """The loss as train.py has it, or with its terms read after every step."""
        value, terms = self.loss(model, images, k, generator, global_state)
        return value, {name: term.item() for name, term in terms.items()} if self.sync else terms

    def epoch(self, images, generator):
        """One local epoch over `images`: seconds a step."""
        steps, own = len(images) // self.size, range(len(images))
        if self.loader:
            return self.loader_epoch(images, steps)
        torch.backends.cudnn.benchmark = self.benchmark
        start = wait(self.device)
        train_client(
            self.net, self.optimizer, images, own, self.local_loss, 0, generator, 1, self.size
        )
        return (wait(self.device) - start) / steps

    def loader_epoch(self, images, steps):
        """The usual loop, timed while its workers are in full swing: their start is left out."""
        more = TwoViewDataset(images, (steps + 9) * self.size)  # 8 batches are made ahead
        batches = iter(torch.utils.data.DataLoader(more, self.size, num_workers=4))
        for step in range(steps + 1):
            if step == 1:
                start = wait(self.device)
            x1, x2 = (view.to(self.device) for view in next(batches))
            (h1, u1), (h2, u2) = self.net(x1), self.net(x2)
            value, terms = ssd_loss(h1, u1, h2, u2, self.d_k)
            self.optimizer.zero_grad()
            value.backward()
            self.optimizer.step()
            {name: term.item() for name, term in terms.items()}
        return (wait(self.device) - start) / steps


def loss_without_views(amp, d_k):
    """Only the forward passes and the objective are compiled; the views are made outside."""

    def step(model, x1, x2):
        with torch.autocast(d_k.device.type, torch.bfloat16, enabled=amp):
            (h1, u1), (h2, u2) = model(x1), model(x2)
        return ssd_loss(h1, u1, h2, u2, d_k)

    compiled = torch.compile(step, mode="reduce-overhead", dynamic=False, fullgraph=True)
    return lambda model, images, k, generator, _: compiled(model, *two_views(images, generator))


class Launches(TorchDispatchMode):
    """Counts operations; a view is none."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation.overloadpacket.__name__
        view = operation.is_view or "empty" in name or name == "_unsafe_view"
        self.count += operation.namespace == "aten" and not view
        return operation(*args, **(kwargs or {}))


def launches(row, images):
    """Operations of a step that --compile takes, and operations outside."""
    size, rng, images = row.size, keyed_generator("launches"), images.repeat(2, 1, 1, 1)
    shape = (2 * size, *images.shape[2:])
    fused = torch.optim.SGD(row.net.parameters(), 1e-9, 0.9, fused=True)

    def count(function, *arguments):
        with Launches() as counter:
            function(*arguments)
        return counter.count

    def epoch(steps):
        train_client(row.net, fused, images, range(steps * size), row.loss, 0, rng, 1, size)

    epoch(1)  # makes the momentum
    step = count(epoch, 2) - count(epoch, 1)
    drawn = count(draw_params, *shape, rng)  # on the CPU: no launch
    packed = count(draw_views, images[:size], rng)
    fused.zero_grad()
    inside = count(lambda: row.loss(row.net, images[:size], 0, rng, None)[0].backward()) - packed
    return inside, step - drawn - inside


def idle(row, images):
    """The share of an epoch's time in which the device does nothing, by torch.profiler."""
    cuda = row.device.type == "cuda"
    with profile(activities=[getattr(ProfilerActivity, row.device.type.upper())]) as profiler:
        seconds = row.epoch(images, keyed_generator("idle")) * (len(images) // row.size)
    kind, own = (DeviceType.CUDA, "device") if cuda else (DeviceType.CPU, "cpu")
    busy = sum(
        getattr(event, f"self_{own}_time_total")
        for event in profiler.key_averages()
        if event.device_type == kind and not event.is_user_annotation
    )
    return 1 - busy / 1e6 / seconds


def wait(device):
    """The clock, once the device has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def peaks(device):
    """Measured matmul TFLOP/s, float32 and bfloat16."""
    n = 8192 if device.type == "cuda" else 2048
    rates = []
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.randn(2, n, n, device=device).to(dtype)
        spans = []
        for _ in range(4):  # the first warms up
            start = wait(device)
            a @ b
            spans.append(wait(device) - start)
        rates.append(2 * n**3 / statistics.median(spans[1:]) / 1e12)
    return rates


def step_flops(args):
    """Floating-point operations of a step's forward and backward passes (counted on the CPU)."""
    net, batch = SSDNet(args.width), torch.rand(2, 3, 32, 32)
    with FlopCounterMode(display=False) as counter:
        sum(part.sum() for part in net(batch)).backward()
    return counter.get_total_flops() / len(batch) * 2 * args.batch_size


def main():
    """Print the machine, the table and the time of the paper's run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.usage = argparse.SUPPRESS  # so that an error is one line
    add = parser.add_argument
    add("--quick", action="store_true", help="shorter blocks")
    add("--width", type=number(int, 1), default=64, help="of the network (%(default)s)")
    add("--batch-size", type=number(int, 2), default=128, help="images a step (%(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda ... (%(default)s)")
    args = parser.parse_args()
    try:
        device = pick_device(args.device)
    except ValueError as error:
        parser.error(str(error))
    warnings.filterwarnings("ignore", "This DataLoader will create")  # 4 workers on 2 cores
    cuda = device.type == "cuda"
    amp = cuda and torch.cuda.get_device_capability()[0] >= 8
    blocks, steps = 5, (20 if args.quick else 50) if cuda else (1 if args.quick else 3)
    fp32, bf16 = peaks(device)
    name = torch.cuda.get_device_name(device) if cuda else platform.machine()
    print(
        f"{device} {name}, torch {torch.__version__}, {torch.get_num_threads()} threads; measured: "
        f"matmul {fp32:.2f} TFLOP/s float32, {bf16:.2f} bfloat16\n"
        f"width {args.width}, {args.batch_size} images in two views, {step_flops(args) / 1e12:.3f} "
        f"TFLOP a step; {blocks} interleaved blocks of {steps} steps a row\n",
        flush=True,
    )
    plain, last = {"nchw": True, "amp": False}, ", fused SGD" * cuda + ", float32" * (not amp)
    rows = [
        Row("per-sample transforms, 4 workers", args, device, loader=True, **plain),
        Row("views on the device, batched", args, device, **plain),
        Row("+ channels-last", args, device, amp=False),
        Row("+ bfloat16 autocast", args, device, amp=True),
        Row(f"+ no wait{last}: ours", args, device, amp=amp, sync=False),
    ]
    ours = rows[-1]
    if cuda or not args.quick:
        compiled = {"amp": amp, "sync": False, "compile": True}
        rows.append(Row("+ compiled, but for the views", args, device, views=False, **compiled))
        rows.append(Row("+ views inside the graph: --compile", args, device, **compiled))
    if cuda:  # as train.py sets it
        rows.append(Row("+ cudnn.benchmark", args, device, benchmark=True, **compiled))
    images = torch.randint(256, (steps * args.batch_size, 3, 32, 32), dtype=torch.uint8)
    where = {row: images if row.loader else images.to(device) for row in rows}
    for row in rows[1:]:
        start = wait(device)
        try:
            row.epoch(where[row], keyed_generator("warm-up"))
        except Exception as error:
            if row in rows[:5]:
                raise
            rows = [other for other in rows if other is not row]  # the others are worth their time
            print(f"{row.name}: {type(error).__name__}: {str(error)[:300]}\n")
        if row in rows[5:]:
            print(f"{row.name}: {wait(device) - start:.0f} s for the first {steps} steps\n")
    times, memory = {row: [] for row in rows}, {}
    for block in range(blocks):
        for row in rows:
            if cuda:
                torch.cuda.reset_peak_memory_stats(device)
            times[row].append(row.epoch(where[row], keyed_generator("block", block)))
            memory[row] = torch.cuda.max_memory_allocated(device) / 2**20 if cuda else math.nan
    print(f"{'':36s}{'ms/step':>15s}  views/s  x prev  x first  % matmul  peak MiB")
    flops, medians = step_flops(args), [statistics.median(times[row]) for row in rows]
    for i, (row, median) in enumerate(zip(rows, medians)):
        low, _, high = statistics.quantiles(times[row], n=4)
        peak = bf16 if i == 3 or (amp and i > 3) else fp32
        print(
            f"{row.name:36s}{1e3 * median:8.1f} +-{1e3 * (high - low) / 2:4.0f}"
            f"{2 * args.batch_size / median:9.0f}{medians[max(0, i - 1)] / median:8.2f}"
            f"{medians[0] / median:9.2f}{100 * flops / median / 1e12 / peak:10.0f}"
            + (f"{memory[row]:10.0f}" if cuda else "         -")
        )
    inside, outside = launches(ours, where[ours])
    print(f"\noperations a step: {inside} that --compile takes, {outside} outside")
    print(f"\n{PAPER_STEPS:,} steps, as many as the paper's run has, at these rates:")
    for row, median in zip(rows, medians):
        print(f"  {row.name:36s}{PAPER_STEPS * median / 3600:9.2f} h")
    print("\ntime in which no operation runs on the device")
    for row in rows[4:]:
        print(f"  {row.name:36s}{100 * idle(row, where[row]):9.1f} %", flush=True)


if __name__ == "__main__":
    main()
