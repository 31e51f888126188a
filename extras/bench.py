"""What a training step costs, from the usual pipeline to ours: one change a row, all in one run.

    python extras/bench.py --quick              # three minutes on two CPU cores
    python extras/bench.py                      # more and longer blocks, and a compiled row

The step: a batch in two views, encoder + projector forward and backward, SSD's loss, SGD. Rows are
timed in interleaved blocks, so that a slow moment of the machine hits all of them; a row's figure
is the median over the blocks, +- half the distance between the quartiles. The first row is the
pipeline that this field's codes have: torchvision's transforms image by image in four DataLoader
workers, float32, two forwards, every loss term read after every step.
"""

import argparse
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
import torchvision.transforms as T
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))

from data import two_views  # noqa: E402
from eval import OneLineParser, pick_device  # noqa: E402
from federated import average_states, keyed_generator, reset_optimizer, train_client  # noqa: E402
from losses import scaling_vectors, ssd_loss  # noqa: E402
from model import SSDNet, bf16_is_fast  # noqa: E402

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
    """The usual data set: one image at a time through PIL, twice."""

    def __init__(self, images):
        self.images = [T.functional.to_pil_image(image) for image in images]

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return PER_SAMPLE(self.images[index]), PER_SAMPLE(self.images[index])


class Row:
    """One configuration of the step: a network, an optimiser and a loss of its own."""

    def __init__(
        self,
        name,
        args,
        device,
        *,
        loader=False,
        channels_last=True,
        amp=True,
        sync=False,
        compiled=False,
    ):
        torch.manual_seed(0)
        self.name, self.args, self.device, self.loader = name, args, device, loader
        self.net = SSDNet(args.width).to(device)
        if channels_last:
            self.net = self.net.to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.SGD(self.net.parameters(), 0.1, 0.9, weight_decay=1e-4)
        d_k = scaling_vectors(10, 8 * args.width)[0].to(device)

        def from_views(x1, x2):
            with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                (h1, u1), (h2, u2) = self.net(x1), self.net(x2)
            return ssd_loss(h1, u1, h2, u2, d_k)

        self.from_views = (
            torch.compile(from_views, mode="reduce-overhead") if compiled else from_views
        )

        def loss(model, images, k, generator):
            value, terms = self.from_views(*two_views(images, generator))
            return value, {name: term.item() for name, term in terms.items()} if sync else terms

        self.loss = loss

    def run(self, images, generator):
        """One local epoch of full batches over `images`: seconds a step."""
        steps, size = len(images) // self.args.batch_size, self.args.batch_size
        start = wait(self.device)
        if self.loader:
            for x1, x2 in torch.utils.data.DataLoader(TwoViewDataset(images), size, num_workers=4):
                value, terms = self.from_views(x1.to(self.device), x2.to(self.device))
                self.optimizer.zero_grad()
                value.backward()
                self.optimizer.step()
                {name: term.item() for name, term in terms.items()}
        else:
            train_client(
                self.net,
                self.optimizer,
                images,
                range(len(images)),
                self.loss,
                0,
                generator,
                1,
                size,
            )
        return (wait(self.device) - start) / steps


def wait(device):
    """The clock, once the device has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def timed(device, function, repeats=5):
    """Median seconds of function() after one warm-up."""
    function()
    spans = []
    for _ in range(repeats):
        start = wait(device)
        function()
        spans.append(wait(device) - start)
    return statistics.median(spans)


def peaks(device):
    """Measured matmul TFLOP/s, float32 and bfloat16, and copy GB/s counting reads and writes."""
    n = 8192 if device.type == "cuda" else 2048
    rates = []
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.randn(2, n, n, device=device).to(dtype)
        rates.append(2 * n**3 / timed(device, lambda a=a, b=b: a @ b) / 1e12)
    source = torch.randn(2**28 if device.type == "cuda" else 2**25, device=device)
    target = torch.empty_like(source)
    return *rates, 2 * source.nbytes / timed(device, lambda: target.copy_(source)) / 1e9


def step_flops(args):
    """Floating-point operations of a step's forward and backward passes (counted on the CPU)."""
    net, batch = SSDNet(args.width), torch.rand(2, 3, 32, 32)
    with FlopCounterMode(display=False) as counter:
        sum(part.sum() for part in net(batch)).backward()
    return counter.get_total_flops() / len(batch) * 2 * args.batch_size


def shares(row, images, generator):
    """Seconds of each part of a step (and per client) of one row, every part waited for."""
    device, size = row.device, row.args.batch_size
    batch = images[:size]
    x1, x2 = two_views(batch, generator)
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16_is_fast(device)):
        (h1, u1), (h2, u2) = row.net(x1), row.net(x2)
    outputs = [v.detach().float().requires_grad_() for v in (h1, u1, h2, u2)]
    d_k = scaling_vectors(10, 8 * row.args.width)[0].to(device)
    state = row.net.state_dict()

    def forward_backward():
        value, _ = row.from_views(x1, x2)
        row.optimizer.zero_grad()
        value.backward()

    losses = timed(device, lambda: ssd_loss(*outputs, d_k)[0].backward())
    return {
        "views": timed(device, lambda: two_views(batch, generator)),
        "forward and backward": timed(device, forward_backward) - losses,
        "losses": losses,
        "optimiser": timed(device, row.optimizer.step),
        "per client: reset": timed(
            device, lambda: (row.net.load_state_dict(state), reset_optimizer(row.optimizer))
        ),
        "per client: averaging": timed(device, lambda: average_states([state] * 4, [1] * 4)) / 4,
    }


def main():
    """Print the machine, the table, the parts of a step and the time of the paper's run."""
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="5 short blocks")
    parser.add_argument("--width", type=int, default=64, help="of the network (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=128, help="images a step (%(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda ... (%(default)s)")
    args = parser.parse_args()
    try:
        device = pick_device(args.device)
    except ValueError as error:
        parser.error(str(error))
    cuda, amp = device.type == "cuda", bf16_is_fast(device)
    blocks, steps = (5, 20 if cuda else 2) if args.quick else (9, 50 if cuda else 4)
    fp32, bf16, copy = peaks(device)
    name = (
        torch.cuda.get_device_name(device) if cuda else platform.processor() or platform.machine()
    )
    print(
        f"{device} {name}, torch {torch.__version__}, {torch.get_num_threads()} threads; measured: "
        f"matmul {fp32:.2f} TFLOP/s float32, {bf16:.2f} bfloat16; copy {copy:.0f} GB/s\n"
        f"width {args.width}, {args.batch_size} images in two views, {step_flops(args) / 1e12:.3f} "
        f"TFLOP a step; {blocks} blocks of {steps} steps\n"
    )
    rows = [
        Row(
            "per-sample transforms, 4 workers",
            args,
            device,
            loader=True,
            channels_last=False,
            amp=False,
            sync=True,
        ),
        Row(
            "views on the device, batched", args, device, channels_last=False, amp=False, sync=True
        ),
        Row("+ channels-last", args, device, amp=False, sync=True),
        Row("+ bfloat16 autocast", args, device, amp=amp, sync=True),
        Row("+ no wait inside an epoch (ours)", args, device, amp=amp),
    ]
    if cuda or not args.quick:
        rows.append(Row("+ torch.compile", args, device, amp=amp, compiled=True))
    images = torch.randint(256, (steps * args.batch_size, 3, 32, 32), dtype=torch.uint8)
    times, memory = {row: [] for row in rows}, {}
    for row in rows:  # warm-up; for the compiled row this is the compilation
        start = wait(device)
        for _ in range(3 if cuda else 1):
            row.run(
                images[: args.batch_size * (10 if cuda else 1)].to("cpu" if row.loader else device),
                keyed_generator("warm-up"),
            )
        if row.name.endswith("compile"):
            print(f"compilation and warm-up {wait(device) - start:.0f} s\n")
    for block in range(blocks):
        for row in rows:
            if cuda:
                torch.cuda.reset_peak_memory_stats(device)
            there = images if row.loader else images.to(device)
            times[row].append(row.run(there, keyed_generator("block", block)))
            memory[row] = torch.cuda.max_memory_allocated(device) / 2**20 if cuda else None
    print(
        f"{'':34s}{'ms/step':>16s}{'views/s':>9s}{'x prev':>8s}{'x first':>8s}{'% matmul':>9s}"
        + ("  peak MiB" if cuda else "")
    )
    medians = [statistics.median(times[row]) for row in rows]
    for i, (row, median) in enumerate(zip(rows, medians)):
        low, _, high = statistics.quantiles(times[row], n=4)
        peak = bf16 if amp and i >= 3 else fp32
        print(
            f"{row.name:34s}{1e3 * median:10.1f} +-{1e3 * (high - low) / 2:4.0f}"
            f"{2 * args.batch_size / median:9.0f}{medians[max(0, i - 1)] / median:8.2f}"
            f"{medians[0] / median:8.2f}{100 * step_flops(args) / median / 1e12 / peak:9.0f}"
            + (f"{memory[row]:10.0f}" if cuda else "")
        )
    ours = rows[4]
    print("\nparts of a step (ours), each waited for:")
    for part, seconds in shares(ours, images.to(device), keyed_generator("parts")).items():
        print(f"  {part:24s}{1e3 * seconds:9.2f} ms")
    print(
        f"\nthe paper's run of {PAPER_STEPS:,} steps: {PAPER_STEPS * medians[4] / 3600:.1f} h at our "
        f"rate, {PAPER_STEPS * medians[0] / 3600:.1f} h at the first row's"
    )


if __name__ == "__main__":
    main()
