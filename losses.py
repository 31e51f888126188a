"""The losses of Soft Separation and Distillation (SSD, ICCV 2025). Client k minimises

    L = L_align + beta L_uniform + gamma L_DSR + delta L_distill          paper: 1, 1, 0.1

    L_align   = E ||z1 - z2||^2                    two views of one image come together
    L_uniform = log E exp(-t ||z - z'||^2)         different images spread on the sphere
    L_DSR     = E ||z - stopgrad(target)||^2       target = z * d_k / ||z * d_k||: each client
                                                   leans to its own dimensions
    L_distill = E KL( softmax(h) || softmax(u) )   h learns what DSR did to u

h is the representation, u the projector's output, z = u / ||u||. The server draws d_k, client k's
scale vector. This file needs torch alone and works alone in another project. A step there:

    >>> d = scaling_vectors(num_clients=10, dim=512)
    >>> h1, u1, h2, u2 = torch.randn(4, 32, 512)     # your network's, of two views of 32 images
    >>> loss, terms = ssd_loss(h1, u1, h2, u2, d_k=d[3])

    python losses.py        # values to check by hand; DSR parts two clients (a second, CPU)
"""

import math
import warnings

import torch
import torch.nn.functional as F


def align_loss(z1, z2):
    """Alignment, mean ||z1 - z2||^2 (Wang & Isola 2020): unit rows (B, D) -> (), in [0, 4]."""
    if z1.shape != z2.shape or z1.ndim != 2:
        raise ValueError(f"align_loss needs two (B, D), got {z1.shape} and {z2.shape}")
    return (z1 - z2).square().sum(1).mean()


def uniform_loss(z, t=2.0):
    """Uniformity, log mean over pairs i < j of exp(-t ||zi - zj||^2) (Wang & Isola 2020).

    z: unit rows (B, D), B >= 2, not normalised here -> (), in [-4t, 0], lower is more uniform;
    about -2t at best for large B and D, 0 at worst: also for rows of zeros, a dead network's. One
    Gram matrix gives all pairs, ||zi - zj||^2 = ||zi||^2 + ||zj||^2 - 2 zi.zj, in float32 (or
    float64) even under autocast, since bfloat16 is too coarse.
    """
    if z.ndim != 2 or len(z) < 2:
        raise ValueError(f"uniform_loss needs at least two rows (B, D), got {z.shape}")
    with torch.autocast(z.device.type, enabled=False):
        z = at_least_float32(z)
        length = (z != 0).any(dim=1).to(z.dtype)  # 1, and 0 of a row of zeros
        log_kernel = t * (2 * z @ z.T - (length[:, None] + length))
        others = ~torch.eye(len(z), dtype=torch.bool, device=z.device)
        pairs = len(z) * (len(z) - 1)
        return log_kernel.where(others, -math.inf).flatten().logsumexp(0) - math.log(pairs)


def dsr_loss(z, d_k, on_sphere=True):
    """Dimension-scaled regularisation, mean ||z - stopgrad(target)||^2: z unit rows (B, D) -> ().

    on_sphere=True, what training uses: target = z * d_k / ||z * d_k||; loss in [0, 2).
    on_sphere=False: target = z * d_k, as the paper prints it. With gamma 1 and scale a = 10 the
    gradient on own dimensions is then -2 (a - 1) z / B = -18 z / B and drowns the other terms.
    d_k (D,). The gradient for z is 2 (z - target) / B: nothing flows through the target.
    """
    _check_d_k("dsr_loss", z, d_k)
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
        given = f"{h.shape} and {u.shape}"
        raise ValueError(f"distill_loss needs h, u (B, D), got {given}: widen u or take delta 0")
    if not temperature > 0:
        raise ValueError(f"distill_loss needs a temperature above 0, got {temperature}")
    log_p = F.log_softmax(h / temperature, dim=1)
    log_q = F.log_softmax(u / temperature, dim=1)
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def ssd_loss(h1, u1, h2, u2, d_k, beta=1.0, gamma=1.0, delta=0.1, hard=False):
    """SSD's local objective on two views: the total () and a dict of its terms by name, detached.

    h1, h2 (B, D) representations, u1, u2 (B, D) raw projector outputs, d_k (D,), all on one device.
    uniform, dsr, distill: means over the views, reported also at weight 0; but distill is left out
    at weight 0 where h and u differ in width. FedAlignUniform is gamma = delta = 0; hard=True takes
    `hard_separation` for z. The weights are the paper's; its authors' code has a norm / B in place
    of DSR's mean square, about gamma 0.05 at B = 128.
    """
    h1, u1 = at_least_float32(h1), at_least_float32(u1)
    h2, u2 = at_least_float32(h2), at_least_float32(u2)
    if hard:
        z1, z2 = hard_separation(u1, d_k), hard_separation(u2, d_k)
    else:
        z1, z2 = F.normalize(u1, dim=1), F.normalize(u2, dim=1)
    align = align_loss(z1, z2)
    uniform = (uniform_loss(z1) + uniform_loss(z2)) / 2
    dsr = (dsr_loss(z1, d_k) + dsr_loss(z2, d_k)) / 2
    total = align + beta * uniform + gamma * dsr
    terms = {"align": align.detach(), "uniform": uniform.detach(), "dsr": dsr.detach()}
    if delta or h1.shape == u1.shape:
        distill = (distill_loss(h1, u1) + distill_loss(h2, u2)) / 2
        total = total + delta * distill
        terms["distill"] = distill.detach()
    return total, terms


def hard_separation(u, d_k):
    """Hard separation (HSD, the paper's ablation): u (B, D) -> unit rows on the own dimensions.

    The own dimensions are those that d_k (D,) scales. If it scales none the rows are zeros.
    """
    _check_d_k("hard_separation", u, d_k)
    return F.normalize(u * (d_k != 1), dim=1)


def at_least_float32(v):
    """v itself if it is float64, else in float32."""
    if v.dtype == torch.float64:
        return v
    return v.float()


def _check_d_k(name, z, d_k):
    shape = getattr(d_k, "shape", type(d_k))
    if z.ndim != 2 or shape != z.shape[1:]:
        raise ValueError(f"{name} needs a tensor (B, D) and d_k (D,), got {z.shape} and {shape}")


def scaling_vectors(num_clients, dim, scale=10.0, seed=0):
    """The server's vectors d_k, sent once before training: (K, D) float32 on the CPU, row k is d_k.

    d_k is `scale` on client k's own floor(D / K) dimensions, drawn from `seed`, and 1 elsewhere.
    Where K > D each client has one dimension, shared, and a warning says so. Differs from the
    authors' code: there d_k is the client's position's, and its axes are random orthonormal ones.
    """
    if num_clients < 1 or dim < 1 or not 0 < scale < math.inf:
        given = f"{num_clients}, {dim}, {scale}"
        raise ValueError(f"scaling_vectors needs sizes >= 1 and a finite scale > 0, got {given}")
    if num_clients > dim:
        warnings.warn(f"{num_clients} clients share {dim} dimensions, not disjoint", stacklevel=2)
    own = max(1, dim // num_clients)
    shuffled = torch.randperm(dim, generator=torch.Generator().manual_seed(seed))
    d = torch.ones(num_clients, dim)
    for k in range(num_clients):
        start = k * own % dim
        d[k, shuffled[start : start + own]] = scale
    return d


def main():
    """Values to check by hand; then the paper's toy, two clients' points moved by DSR alone.

    A step of the toy is gradient descent on a point's own loss: z <- normalise(0.8 z + 0.2 target).
    """
    z = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    print("two points at a right angle, their squared distance is 2")
    print(f"align {align_loss(z[:1], z[1:]):.0f}, uniform {uniform_loss(z):.0f} = -2 times 2")
    dsr = dsr_loss(torch.tensor([[0.6, 0.8]]), torch.tensor([10.0, 1.0]))
    print("z (0.6, 0.8), d_k (10, 1): z * d_k (6, 0.8), back on the sphere (0.991, 0.132)")
    print(f"dsr {dsr:.3f} = 0.391^2 + 0.668^2")
    distill = distill_loss(torch.tensor([[math.log(3), 0.0]]), torch.zeros(1, 2))
    print("softmax(h) (3/4, 1/4), softmax(u) (1/2, 1/2)")
    print(f"distill {distill:.3f} = 3/4 log 3/2 + 1/4 log 1/2\n")

    d = scaling_vectors(num_clients=2, dim=3)
    generator = torch.Generator().manual_seed(0)
    clients = [F.normalize(1 + 0.5 * torch.randn(200, 3, generator=generator)) for _ in d]
    print(f"two clients, 200 points each, d_0 = {d[0].tolist()}, d_1 = {d[1].tolist()}")
    for step in range(6):
        inter = -(-2 * torch.cdist(*clients).square()).exp().mean().log()
        print(f"step {step}: inter-client -L_uniform {inter:.3f}", end="")
        for k, z in enumerate(clients):
            centre = ", ".join(f"{c:.2f}" for c in z.mean(0))
            print(f", client {k} around ({centre})", end="")
            z.requires_grad_()
            (gradient,) = torch.autograd.grad(dsr_loss(z, d[k]) * len(z), z)
            clients[k] = F.normalize(z - 0.1 * gradient).detach()
        print()


if __name__ == "__main__":
    main()
