"""Federated averaging (McMahan et al. 2017): one round in five steps, and the loop over rounds.

    w <- sum_k n_k w_k / sum_k n_k        over the clients k that took part, n_k their samples

The local loss, the choice of clients and the rule of averaging are arguments: another method needs
no edit here. One worker model and one optimiser serve every client in turn, and FedAvg needs a sum
only, so memory does not grow with their number. A client sends its weights, its sample count and,
to be shown, its loss terms.
Needs torch; copies into another project as it is. There:

    >>> def loss(model, batch, *_): return (model(batch) - 1).square().mean(), {}
    >>> net, samples, split = torch.nn.Linear(3, 1), torch.randn(40, 3), [range(30), range(30, 40)]
    >>> sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    >>> [report["clients"] for r, report in train_federated(net, sgd, samples, split, loss, 2)]
    [[0, 1], [0, 1]]

    python federated.py     # FedAvg on a problem whose answer is known (a second, CPU)
"""

import hashlib
import math

import torch
import torch.distributed as dist
import torch.distributed.nn  # early: imported in a process group, it keeps that alive at exit


def train_federated(model, optimizer, samples, split, loss, rounds, start=0, lr=None, **options):
    """Yield (r, `federated_round`'s report) after each round r = start .. rounds - 1.

    lr: a schedule, the round's number r -> its learning rate; without it the optimiser's own.
    """
    for r in range(start, rounds):
        if lr:
            for group in optimizer.param_groups:
                group["lr"] = lr(r)
        yield r, federated_round(model, optimizer, samples, split, loss, r, **options)


def federated_round(
    model,
    optimizer,
    samples,
    split,
    loss,
    r,
    *,
    participation=1.0,
    local_epochs=5,
    batch_size=128,
    seed=0,
    choose=None,
    average=None,
    progress=None,
):
    """Round r; the model holds the global weights before and after.

    model, optimizer  the worker that plays every client in turn
    samples (N, ...)  of all clients, on the model's device
    split             split[k]: indices of client k's samples
    loss              (model, batch, k, generator, global_state) -> scalar to minimise, dict of
                      detached scalars to report; global_state: the round's, to read only
    choose            (num_clients, participation, generator) -> ids; default `choose_clients`
    average           (states, weights, global_state, r) -> state dict; states and weights, which
                      are sample counts: one a client; default FedAvg, which keeps only a sum
    progress          (k, mine), called before client k of `mine`, this process's clients, trains
    Returns {"clients": [k ...], "left_out": [k ...], "terms": {name: mean over the clients,
    weighted by samples}}. A client whose loss or weights are not finite is left out of all means;
    FloatingPointError if all are. Under torch.distributed the processes share the clients.
    """
    if dist.is_initialized() and average:
        raise ValueError("a rule of averaging of your own needs all states: run one process")

    # 1. Choose: the server draws this round's clients.
    choose = choose or choose_clients
    clients = choose(len(split), participation, keyed_generator(seed, "clients", r))
    mine = share_out(clients, [len(split[k]) for k in clients], *processes())

    global_state = copy_state(model)
    total = flatten(global_state).zero_()  # sum_k n_k w_k
    states, reports = [], {}
    for k in mine:
        if progress:
            progress(k, mine)
        # 2. Send: every client starts from the same global weights.
        model.load_state_dict(global_state)
        reset_optimizer(optimizer)
        # 3. Train locally, on the client's own images alone.
        own, rng = split[k], keyed_generator(seed, "client", r, k)
        reports[k] = train_client(
            model, optimizer, samples, own, loss, k, rng, local_epochs, batch_size, global_state
        )
        # 4. Return the weights and the sample count, unless the client has diverged.
        w = flatten(model.state_dict())
        if not (math.isfinite(reports[k]["loss"]) and w.isfinite().all()):
            reports[k] = None
        elif average:
            states.append(copy_state(model))
        else:
            total.add_(w, alpha=len(own))

    # 5. Average, over the clients of all processes.
    reports = gather(reports)
    kept = [k for k in clients if reports[k]]
    weights = [len(split[k]) for k in kept]
    if not kept:
        model.load_state_dict(global_state)
        raise FloatingPointError(f"no client of round {r + 1} has a finite loss and weights")
    if average:
        new_state = average(states, weights, global_state, r)
    else:
        if dist.is_initialized():
            dist.all_reduce(total)
        new_state = unflatten(total / sum(weights), global_state)
    model.load_state_dict(new_state)
    terms = {
        name: sum(n * reports[k][name] for k, n in zip(kept, weights)) / sum(weights)
        for name in reports[kept[0]]
    }
    return {"clients": clients, "left_out": [k for k in clients if not reports[k]], "terms": terms}


def train_client(
    model, optimizer, samples, index, loss, k, generator, epochs, batch_size, global_state=None
):
    """Local training in place on samples[index]; returns every term's mean over the steps, floats.

    Batches are full: what is left at an epoch's end is dropped, as usual in self-supervised
    learning, where the loss depends on the batch size. A client with fewer than batch_size samples
    takes one step an epoch on all it has.
    """
    model.train()
    sums, steps = {}, 0
    for _ in range(epochs):
        order = torch.as_tensor(index)[torch.randperm(len(index), generator=generator)]
        order = order.to(samples.device, non_blocking=True)
        for i in range(max(1, len(order) // batch_size)):
            batch = samples[order[i * batch_size : (i + 1) * batch_size]]
            value, terms = loss(model, batch, k, generator, global_state)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            for name, term in {"loss": value.detach(), **terms}.items():
                sums[name] = sums.get(name, 0) + term  # on the device, which nobody waits for
            steps += 1
    return {name: float(total) / steps for name, total in sums.items()}


def choose_clients(num_clients, participation, generator):
    """Sorted ids of round(participation * num_clients), at least one, distinct clients."""
    if not 0 < participation <= 1:
        raise ValueError(f"participation must be in (0, 1], got {participation}")
    count = max(1, round(participation * num_clients))
    return torch.randperm(num_clients, generator=generator)[:count].sort().values.tolist()


def average_states(states, weights):
    """FedAvg of states at hand, sum_i w_i state_i / sum_i w_i, entry by entry -> state dict.

    `federated_round` does the same as the states arrive; this is for other rules and real servers.
    states: an iterable of state dicts, read once and one at a time; weights: as many numbers >= 0
    with a sum > 0, or ValueError. BatchNorm statistics are averaged like weights.
    """
    total, weight_sum = None, 0
    for state, weight in zip(states, weights, strict=True):
        if not 0 <= weight < math.inf:
            raise ValueError(f"average_states needs finite weights >= 0, got {weight}")
        total = flatten(state).zero_() if total is None else total
        total.add_(flatten(state), alpha=weight)
        weight_sum += weight
    if not 0 < weight_sum < math.inf:
        raise ValueError("average_states needs weights with a finite sum > 0")
    return unflatten(total / weight_sum, state)


def flatten(state):
    """A state dict as one float64 vector, in which equal float32 states average to that state."""
    return torch.cat([value.flatten().double() for value in state.values()])


def unflatten(vector, like):
    """Back to a state dict with like's shapes and dtypes; integers (counters) are rounded."""
    parts = vector.split([value.numel() for value in like.values()])
    return {
        name: (part if value.is_floating_point() else part.round()).view_as(value).to(value)
        for (name, value), part in zip(like.items(), parts)
    }


def copy_state(model):
    """The model's state dict, copied: later training does not change it."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def reset_optimizer(optimizer):
    """Make the optimiser as new: zero its state. In place, so that compiled code stays valid.

    For SGD without dampening this is bit-equal to a fresh one.
    """
    for state in optimizer.state.values():
        for value in state.values():
            if torch.is_tensor(value):
                value.zero_()


def keyed_generator(*key):
    """A CPU generator that depends on its key alone, e.g. (seed, "client", r, k), on no order."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


def processes():
    """(rank, number) of torch.distributed's processes, (0, 1) without it."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def share_out(clients, sizes, rank, count):
    """Process `rank`'s part of the clients: largest first, each to the process with least to do."""
    loads, owner = [0] * count, {}
    for size, k in sorted(zip(sizes, clients), reverse=True):
        owner[k] = loads.index(min(loads))
        loads[owner[k]] += size
    return [k for k in clients if owner[k] == rank]


def gather(reports):
    """All processes' reports in one dict."""
    if not dist.is_initialized():
        return reports
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, reports)
    return {k: report for part in parts for k, report in part.items()}


if __name__ == "__main__":
    # Each client holds copies of one number x; its loss (w - x)^2 / 2 wants w = x. FedAvg must find
    # the mean of all samples, (6 * 1 + 3 * 4 + 12) / 10 = 3; lr 0.5 halves the distance a round.
    numbers = torch.tensor([1.0] * 6 + [4.0] * 3 + [12.0]).unsqueeze(1)
    owners = [range(6), range(6, 9), range(9, 10)]
    net = torch.nn.Linear(1, 1, bias=False)
    net.weight.data.zero_()

    def distance(model, batch, k, generator, global_state):
        return (model.weight - batch).square().mean() / 2, {}

    print("clients hold 6 x 1, 3 x 4, 1 x 12; the mean of all ten is 3")
    sgd = torch.optim.SGD(net.parameters(), lr=0.5)
    for number, _ in train_federated(net, sgd, numbers, owners, distance, rounds=6, local_epochs=1):
        print(f"round {number + 1}: w = {net.weight.item():.4f}")
