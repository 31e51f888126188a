"""What a training step costs, from the usual pipeline to ours: one change a row, all in one run.

    python extras/bench.py    # eight minutes on two CPU cores; --quick: three, no compiled row

The step: a batch in two views, encoder + projector forward and backward, SSD's loss, SGD. Rows are
timed in interleaved blocks, so that a slow moment of the machine hits all of them. A row's figure
is the median over the blocks, +- half the distance between the quartiles. The first row is the
pipeline that this field's codes have: torchvision's transforms image by image in four DataLoader
workers, float32, every loss term read after every step. The others are train.py's loss in
federated.py's local training.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
import torchvision.transforms as T
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parent.parent))

from federated import keyed_generator, train_client  # noqa: E402
from losses import scaling_vectors, ssd_loss  # noqa: E402
from model import SSDNet, pick_device  # noqa: E402
from train import build_parser, make_loss, number  # noqa: E402

SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4}
PER_SAMPLE = T.Compose(
    [
        T.RandomResizedCrop(32, (0.08, 1.0)),
        T.RandomHorizontalFlip(),
        T.RandomApply([T.ColorJitter(0.8, 0.8, 0.8, 0.2)], p=0.8),
        T.RandomGrayscale(0.2),
        T.ToTensor(),
    ]
)


def clock(device):
    """The time, once the device has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def usual_views(pictures):
    """PIL images -> two views of each, image by image: what a DataLoader's worker does."""
    views = []
    for _ in range(2):
        views.append(torch.stack([PER_SAMPLE(picture) for picture in pictures]))
    return views


def make_usual_epoch(args, device):
    """The first row -> a function of images that runs a step for every batch: seconds a step."""
    net = SSDNet(args.width).to(device)
    optimizer = torch.optim.SGD(net.parameters(), **SGD)
    d_k = scaling_vectors(10, 8 * args.width)[0].to(device)
    size = args.batch_size

    def epoch(images):
        pictures = [T.functional.to_pil_image(image) for image in images.cpu()]
        steps = len(pictures) // size
        enough = pictures * 10  # eight batches are made ahead
        batches = iter(DataLoader(enough, size, num_workers=4, collate_fn=usual_views))
        for step in range(steps + 1):
            if step == 1:  # the workers' start is left out
                start = clock(device)
            x1, x2 = (view.to(device) for view in next(batches))
            (h1, u1), (h2, u2) = net(x1), net(x2)
            value, terms = ssd_loss(h1, u1, h2, u2, d_k)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            for term in terms.values():
                term.item()
        return (clock(device) - start) / steps

    return epoch


def make_epoch(args, device, amp, layout=torch.channels_last, wait=False, compile=False):
    """The other rows -> a function of images that trains one local epoch: seconds a step.

    wait: the loss terms are read after every step, for which Python waits for the device.
    """
    net = SSDNet(args.width).to(device, memory_format=layout)
    fused = device.type == "cuda" and not wait  # as train.py
    optimizer = torch.optim.SGD(net.parameters(), **SGD, fused=fused)
    config = {**vars(build_parser().parse_args([])), "gamma": 1.0, "delta": 0.1}
    config |= {"width": args.width, "batch_size": args.batch_size, "amp": amp, "compile": compile}
    train_loss = make_loss(config, 10, device)

    def loss(*arguments):
        value, terms = train_loss(*arguments)
        if wait:
            terms = {name: term.item() for name, term in terms.items()}
        return value, terms

    def epoch(images):
        index, size = range(len(images)), args.batch_size
        start = clock(device)
        train_client(net, optimizer, images, index, loss, 0, keyed_generator("bench"), 1, size)
        return (clock(device) - start) / (len(images) // size)

    return epoch


def make_rows(args, device):
    """{name: function of images}, a dict in the table's order."""
    amp = device.type == "cuda" and torch.cuda.get_device_capability()[0] >= 8  # as train.py
    plain = torch.contiguous_format
    rows = {
        "per-sample transforms, 4 workers": make_usual_epoch(args, device),
        "views on the device, batched": make_epoch(args, device, False, plain, wait=True),
        "+ channels-last": make_epoch(args, device, False, wait=True),
        "+ bfloat16 autocast": make_epoch(args, device, True, wait=True),
        f"+ no wait, {'bfloat16' if amp else 'float32'}: train.py": make_epoch(args, device, amp),
    }
    if device.type == "cuda" or not args.quick:
        rows["+ --compile"] = make_epoch(args, device, amp, compile=True)
    return rows


def print_table(times, batch_size):
    """A line a row."""
    print(f"\n{'':34s}{'ms/step':>16s}  views/s  x previous  x first")
    medians = []
    for name, seconds in times.items():
        low, middle, high = statistics.quantiles(seconds, n=4)
        medians.append(middle)
        print(
            f"{name:34s}{1e3 * middle:9.1f} +-{1e3 * (high - low) / 2:5.1f}"
            f"{2 * batch_size / middle:9.0f}{medians[-2:][0] / middle:12.2f}"
            f"{medians[0] / middle:9.2f}"
        )


def main():
    """Print the machine and the table."""
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
    torch.backends.cudnn.benchmark = True  # as train.py
    steps, machine = 1, "CPU"
    if device.type == "cuda":
        steps, machine = 20, torch.cuda.get_device_name(device)
    if not args.quick:
        steps *= 3
    print(f"{machine}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"width {args.width}, {args.batch_size} images in two views, {steps} steps a block")
    images = torch.randint(256, (steps * args.batch_size, 3, 32, 32), dtype=torch.uint8).to(device)
    rows = make_rows(args, device)
    times = {name: [] for name in rows}
    for name, epoch in rows.items():
        print(f"{name}: {steps * epoch(images):.1f} s for the first block", flush=True)
    for _ in range(5):
        for name, epoch in rows.items():
            times[name].append(epoch(images))
    print_table(times, args.batch_size)


if __name__ == "__main__":
    main()
