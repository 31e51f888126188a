"""What paper and authors' code leave open, as rows to measure: SSD with one thing changed.

    python extras/choices.py --method ssd-reverse --clients 10 --alpha 0.1

Flags and run folder are train.py's; `extras/study.py` puts the rows in a table. The defaults of
losses.py and train.py are what this comparison left standing; see the README.
"""

import functools
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))

import train  # noqa: E402
from eval import load_checkpoint  # noqa: E402
from losses import distill_loss, dsr_loss, ssd_loss  # noqa: E402


@functools.cache
def random_axes(dim):
    """An orthonormal basis (D, D), float32, always the same one for its size."""
    draws = torch.randn(dim, dim, generator=torch.Generator().manual_seed(0))
    return torch.linalg.qr(draws).Q


def authors_dsr(z, d_k):
    """DSR as the authors' code has it: ||z - stopgrad(target)||_F / B, z unit rows (B, D) -> ().

    target = Q (Q^T z * d_k), back on the sphere, Q random axes. The norm is of the whole batch and
    not squared: the gradient for z is (z - target) / (B ||z - target||_F).
    """
    q = random_axes(z.shape[1]).to(z)
    target = F.normalize((z.detach() @ q * d_k) @ q.T, dim=1)
    return (z - target).norm() / len(z)


DSR = {"gamma": 1.0, "delta": 0.0}
SSD = {"gamma": 1.0, "delta": 0.1}
CHOICES = {  # row: weights, what stands for dsr_loss, for distill_loss
    "dsr-literal": (DSR, functools.partial(dsr_loss, on_sphere=False), distill_loss),
    "dsr-authors": (DSR, authors_dsr, distill_loss),
    "ssd-reverse": (SSD, dsr_loss, lambda h, u: distill_loss(u, h)),
    "ssd-half": (SSD, dsr_loss, functools.partial(distill_loss, temperature=0.5)),
    "ssd-into-h": (SSD, dsr_loss, lambda h, u: distill_loss(h, u.detach())),
    "ssd-authors": (SSD, authors_dsr, lambda h, u: distill_loss(u, h, temperature=0.5)),
    "ssd-cosine": (SSD, dsr_loss, distill_loss),  # lr falls to 0 as half a cosine over the rounds
}
METHODS = {**train.METHODS, **{name: choice[0] for name, choice in CHOICES.items()}}


def objective(h1, u1, h2, u2, d_k, beta, gamma, delta, hard, dsr, distill):
    """`losses.ssd_loss` with other functions for its last two terms."""
    total, terms = ssd_loss(h1, u1, h2, u2, d_k, beta, 0.0, 0.0)
    h, u = torch.stack([h1, h2]).float(), torch.stack([u1, u2]).float()
    dsr_term = sum(dsr(F.normalize(view, dim=1), d_k) for view in u) / 2
    distill_term = sum(map(distill, h, u)) / 2
    terms |= {"dsr": dsr_term.detach(), "distill": distill_term.detach()}
    return total + gamma * dsr_term + delta * distill_term, terms


def make_method(config, images, split):
    """The row as keyword arguments of `federated.train_federated`."""
    if config["method"] not in CHOICES:
        return train.make_method(config, images, split)
    _, dsr, distill = CHOICES[config["method"]]
    changed = functools.partial(objective, dsr=dsr, distill=distill)
    method = {"loss": train.make_loss(config, len(split), images.device, changed)}
    if config["method"] == "ssd-cosine":
        done = load_checkpoint(config["resume"])[0]["config"] if config["resume"] else config
        if done["rounds"] != config["rounds"]:
            raise ValueError(
                f"--rounds {config['rounds']}: the schedule is that of "
                f"{done['rounds']} rounds, start a run of its own"
            )
        method["lr"] = lambda r: config["lr"] * (1 + math.cos(math.pi * r / config["rounds"])) / 2
    return method


def build_parser():
    """train.py's flags."""
    parser = train.build_parser(METHODS)
    parser.prog = "extras/choices.py"
    return parser


def main(argv=None):
    """train.py's main with these rows."""
    train.main(argv, build_parser(), METHODS, make_method=make_method)


if __name__ == "__main__":
    main()
