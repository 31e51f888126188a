r"""Soft Separation and Distillation on one page: the whole method, in the order of the paper.

    python extras/one_page.py      # README's first run, without its run folder

Three clients hold images of drawn patterns and train one network together. Training uses no label.
Images, split and views come from data.py, the network from model.py; all else is written out here.
The weights equal, bit for bit, those of train.py with the same settings.
"""

import hashlib
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
from data import dirichlet_split, draw_patterns, two_views  # noqa: E402
from model import SSDNet  # noqa: E402

CLIENTS, ALPHA, WIDTH, SEED = 3, 1.0, 8, 0
ROUNDS, EPOCHS, BATCH, LR = 8, 2, 32, 0.05
BETA, GAMMA, DELTA, SCALE, T = 1.0, 1.0, 0.1, 10.0, 2.0


def random_numbers(*key):
    """A generator that depends on its key alone: the same numbers whoever trains first."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


def uniformity(z):
    """log E exp(-t ||z - z'||^2) over the pairs of different rows; rows have length 1."""
    others = ~torch.eye(len(z), dtype=torch.bool)
    log_kernel = T * (2 * z @ z.T - 2)  # -t times the squared distance, which is 2 - 2 z.z'
    log_sum = log_kernel.where(others, -math.inf).flatten().logsumexp(0)
    return log_sum - math.log(len(z) * (len(z) - 1))


def separation(z, d_k):
    """DSR: E ||z - stopgrad(z * d_k, put back on the sphere)||^2, towards client k's dimensions."""
    target = F.normalize(z.detach() * d_k, dim=1)
    return (z - target).square().sum(1).mean()


def distillation(h, u):
    """E KL( softmax(h) || softmax(u) ): what DSR does to u reaches h, the representation."""
    return F.kl_div(u.log_softmax(1), h.log_softmax(1), reduction="batchmean", log_target=True)


def local_loss(model, images, d_k, generator):
    """What client k minimises on a batch."""
    x1, x2 = two_views(images, generator)
    h1, u1 = model(x1)
    h2, u2 = model(x2)
    z1, z2 = F.normalize(u1, dim=1), F.normalize(u2, dim=1)
    align = (z1 - z2).square().sum(1).mean()
    uniform = (uniformity(z1) + uniformity(z2)) / 2
    dsr = (separation(z1, d_k) + separation(z2, d_k)) / 2
    distill = (distillation(h1, u1) + distillation(h2, u2)) / 2
    return align + BETA * uniform + GAMMA * dsr + DELTA * distill


def main():
    """The rounds."""
    torch.manual_seed(SEED)
    model = SSDNet(WIDTH).to(memory_format=torch.channels_last)
    data = draw_patterns()
    split = dirichlet_split(data.train_y, CLIENTS, ALPHA, SEED)

    # The server gives each client dimensions of its own, once.
    d = torch.ones(CLIENTS, 8 * WIDTH)
    dimensions = torch.randperm(8 * WIDTH, generator=torch.Generator().manual_seed(SEED))
    for k, own in zip(range(CLIENTS), dimensions.split(8 * WIDTH // CLIENTS)):
        d[k, own] = SCALE

    for r in range(ROUNDS):
        start = {name: value.clone() for name, value in model.state_dict().items()}
        total = {
            name: torch.zeros_like(value, dtype=torch.float64) for name, value in start.items()
        }
        for k in range(CLIENTS):
            # Client k starts from the global weights and trains on its own images alone.
            model.load_state_dict(start)
            sgd = torch.optim.SGD(model.parameters(), LR, momentum=0.9, weight_decay=1e-4)
            generator = random_numbers(SEED, "client", r, k)
            for _ in range(EPOCHS):
                order = torch.as_tensor(split[k])[
                    torch.randperm(len(split[k]), generator=generator)
                ]
                full = len(order) // BATCH * BATCH  # the loss depends on the size of the batch
                for batch in order[:full].split(BATCH):
                    loss = local_loss(model, data.train_x[batch], d[k], generator)
                    sgd.zero_grad()
                    loss.backward()
                    sgd.step()
            for name, value in model.state_dict().items():
                total[name] += len(split[k]) * value.double()
        # The server averages the clients' weights, each by its number of images.
        for name, value in start.items():
            mean = total[name] / len(data.train_y)
            start[name] = mean.to(value.dtype) if value.is_floating_point() else mean.round().long()
        model.load_state_dict(start)
        print(f"round {r + 1}: the last client's last loss {loss.item():.3f}", flush=True)
    return model


if __name__ == "__main__":
    main()
