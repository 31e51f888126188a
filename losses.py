"""The losses of Soft Separation and Distillation (SSD, ICCV 2025). Client k minimises

    L = L_align + beta L_uniform + gamma L_DSR + delta L_distill          paper: 1, 1, 0.1

    L_align   = E ||z1 - z2||^2                    two views of one image come together
    L_uniform = log E exp(-t ||z - z'||^2)         different images spread on the sphere
    L_DSR     = E ||z - stopgrad(target)||^2       target = z * d_k / ||z * d_k||: each client
                                                   leans to its own dimensions
    L_distill = E KL( softmax(h) || softmax(u) )   h learns what DSR did to u

h representation, u projector output, z = u / ||u||, d_k client k's scale vector, the server's.
Needs torch; copies into another project as it is. There:

    >>> h1, u1, h2, u2 = torch.randn(4, 32, 512)     # your network's, of two views of 32 images
    >>> d = scaling_vectors(num_clients=10, dim=512)
    >>> loss, terms = ssd_loss(h1, u1, h2, u2, d_k=d[3])
    >>> sorted(terms), loss.shape
    (['align', 'distill', 'dsr', 'uniform'], torch.Size([]))

    python losses.py        # values to check by hand; DSR parts two clients (a second, CPU)
"""

import math
import warnings

import torch
import torch.nn.functional as F


def align_loss(z1, z2):
    """Alignment, mean ||z1 - z2||^2 (Wang & Isola 2020): unit rows (B, D) -> (), in [0, 4]."""
    if z1.shape != z2.shape or z1.ndim != 2:
        raise ValueError(f"align_loss needs two (B, D) of one shape, got {_shapes(z1, z2)}")
    return (z1 - z2).square().sum(1).mean()


def uniform_loss(z, t=2.0):
    """Uniformity, log mean over pairs i < j of exp(-t ||zi - zj||^2) (Wang & Isola 2020).

    z: unit rows (B, D), B >= 2, not normalised here -> (), in [-4t, 0], lower is more uniform;
    about -2t at best for large B and D. ||zi - zj||^2 = 2 - 2 zi.zj: one Gram matrix gives all
    pairs, in float32 (or float64) even under autocast, since bfloat16 is too coarse.
    """
    if z.ndim != 2 or len(z) < 2:
        raise ValueError(f"uniform_loss needs at least two rows (B, D), got {tuple(z.shape)}")
    with torch.autocast(z.device.type, enabled=False):
        z = z if z.dtype == torch.float64 else z.float()
        log_kernel = t * (2 * z @ z.T - 2)
        others = ~torch.eye(len(z), dtype=torch.bool, device=z.device)
        pairs = len(z) * (len(z) - 1)
        return log_kernel.where(others, -math.inf).flatten().logsumexp(0) - math.log(pairs)


def scaling_vectors(num_clients, dim, scale=10.0, seed=0):
    """The server's vectors d_k, sent once before training: (K, D) float32 on the CPU, row k is d_k.

    d_k is `scale` on client k's own floor(D / K) dimensions, drawn from `seed`, and 1 elsewhere.
    The sets are disjoint while K <= D; beyond, each client has one dimension, shared, and a warning
    says so. Differs from the authors' code: there d_k belongs to the client's position in the
    round, and its axes are random orthonormal ones.
    """
    if num_clients < 1 or dim < 1 or not 0 < scale < math.inf:
        got = f"got {num_clients}, {dim}, {scale}"
        raise ValueError(f"scaling_vectors needs sizes >= 1 and a finite scale > 0, {got}")
    if num_clients > dim:
        warnings.warn(f"{num_clients} clients share {dim} dimensions, not disjoint", stacklevel=2)
    d, own = torch.ones(num_clients, dim), max(1, dim // num_clients)
    shuffled = torch.randperm(dim, generator=torch.Generator().manual_seed(seed))
    groups = shuffled.split(own)  # client k owns group k
    for k in range(num_clients):
        d[k, groups[k % len(groups)]] = scale
    return d


def dsr_loss(z, d_k, on_sphere=True):
    """Dimension-scaled regularisation, mean ||z - stopgrad(target)||^2: z unit rows (B, D) -> ().

    on_sphere=True, what training uses: target = z * d_k / ||z * d_k||; loss in [0, 2).
    on_sphere=False: target = z * d_k, as the paper prints it. With gamma 1 and scale a = 10 the
    gradient on own dimensions is then -2 (a - 1) z / B = -18 z / B and drowns the other terms.
    d_k (D,). The gradient for z is 2 (z - target) / B: nothing flows through the target.
    """
    if z.ndim != 2 or d_k.shape != z.shape[1:]:
        raise ValueError(f"dsr_loss needs z (B, D) and d_k (D,), got {_shapes(z, d_k)}")
    target = z.detach() * d_k
    if on_sphere:
        target = F.normalize(target, dim=1)
    return (z - target).square().sum(1).mean()


def distill_loss(h, u, temperature=1.0):
    """Projector distillation, mean KL( softmax(h/T) || softmax(u/T) ): (B, D) twice -> (), >= 0.

    h representation, u raw projector output; the gradient reaches both. The paper states no
    temperature (T = 1). Differs from the authors' code: KL(softmax(u/T) || softmax(h/T)), T = 0.5.
    """
    if h.shape != u.shape or h.ndim != 2:
        hint = "give the projector h's width, or take delta 0"
        raise ValueError(f"distill_loss needs h and u (B, D), got {_shapes(h, u)}: {hint}")
    if not temperature > 0:
        raise ValueError(f"distill_loss needs a temperature > 0, got {temperature}")
    log_p, log_q = (F.log_softmax(v / temperature, dim=1) for v in (h, u))
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def hard_separation(u, d_k):
    """Hard separation (HSD, the paper's ablation): u (B, D), unit rows on d_k's own dimensions.

    Where d_k is 1 everywhere the rows are zero: to look for that would wait for the device.
    """
    if u.ndim != 2 or d_k.shape != u.shape[1:]:
        raise ValueError(f"hard_separation needs u (B, D) and d_k (D,), got {_shapes(u, d_k)}")
    return F.normalize(u * (d_k != 1), dim=1)


def _shapes(one, other):
    return f"{tuple(one.shape)} and {tuple(other.shape)}"


def ssd_loss(h1, u1, h2, u2, d_k, beta=1.0, gamma=1.0, delta=0.1, hard=False):
    """SSD's local objective on two views: the total () and a dict of its terms by name, detached.

    h1, h2 (B, D) representations, u1, u2 (B, D) raw projector outputs, d_k (D,), all on one device.
    uniform, dsr, distill: means over the views, reported also at weight 0, but for distill where h
    and u differ in width. FedAlignUniform is gamma = delta = 0; hard=True: `hard_separation` for z.
    The weights are the paper's; its authors' code has a norm / B, about gamma 0.05 at B = 128.
    """
    h1, u1, h2, u2 = (v if v.dtype == torch.float64 else v.float() for v in (h1, u1, h2, u2))
    z1, z2 = (hard_separation(u, d_k) if hard else F.normalize(u, dim=1) for u in (u1, u2))
    terms = {
        "align": align_loss(z1, z2),
        "uniform": (uniform_loss(z1) + uniform_loss(z2)) / 2,
        "dsr": (dsr_loss(z1, d_k) + dsr_loss(z2, d_k)) / 2,
    }
    total = terms["align"] + beta * terms["uniform"] + gamma * terms["dsr"]
    if delta or h1.shape == u1.shape:
        terms["distill"] = (distill_loss(h1, u1) + distill_loss(h2, u2)) / 2
        total = total + delta * terms["distill"]
    return total, {name: term.detach() for name, term in terms.items()}


def toy(steps=5):
    """The paper's toy: two clients' points (200, 3) and inter-client -L_uniform, step by step.

    A step is gradient descent on every point's own DSR loss: z <- normalise(0.8 z + 0.2 target).
    """
    d, draws = scaling_vectors(num_clients=2, dim=3), torch.Generator().manual_seed(0)
    both = [F.normalize(1 + 0.5 * torch.randn(200, 3, generator=draws), dim=1) for _ in d]
    for _ in range(steps + 1):
        yield list(both), -(-2 * torch.cdist(*both).square()).exp().mean().log().item()
        for k, d_k in enumerate(d):
            z = both[k].detach().requires_grad_()
            (gradient,) = torch.autograd.grad(dsr_loss(z, d_k) * len(z), z)
            both[k] = F.normalize(z - 0.1 * gradient, dim=1).detach()


def main():
    """Values to check by hand, and the toy in figures."""
    east, north, west = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]).split(1)
    for name, other in (("at a right angle", north), ("opposite", west)):
        align, uniform = align_loss(east, other), uniform_loss(torch.cat([east, other]))
        print(f"two points {name}: align {align:.0f}, distance^2; ", end="")
        print(f"uniform {uniform:.0f}, -t times it")
    dsr = dsr_loss(torch.tensor([[0.6, 0.8]]), torch.tensor([10.0, 1.0]))
    print("z (0.6, 0.8), d_k (10, 1): z * d_k = (6, 0.8), on the sphere (0.991, 0.132)")
    print(f"dsr {dsr:.3f} = 0.391^2 + 0.668^2")
    distill = distill_loss(torch.tensor([[math.log(3), 0.0]]), torch.zeros(1, 2))
    print("softmax(h) (3/4, 1/4), softmax(u) (1/2, 1/2)")
    print(f"distill {distill:.3f} = 3/4 log 3/2 + 1/4 log 1/2")
    print("\ntwo clients, 200 points each on the unit sphere in 3-D, moved by DSR alone")
    for k, d_k in enumerate(scaling_vectors(num_clients=2, dim=3)):
        print(f"d_{k} = {d_k.tolist()}")
    for step, (both, inter) in enumerate(toy()):
        one, other = (", ".join(f"{c:.2f}" for c in z.mean(0)) for z in both)
        print(f"step {step}: inter-client -L_uniform {inter:.3f}, ", end="")
        print(f"client 0 around ({one}), client 1 around ({other})")


if __name__ == "__main__":
    main()
