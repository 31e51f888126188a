"""Federated averaging (McMahan et al. 2017): one round in five steps, and the loop over rounds.

    w <- sum_k n_k w_k / sum_k n_k        over the clients k that took part, n_k their samples

One worker model and one optimiser serve every client in turn, so memory does not grow with their
number. A client sends its weights, its sample count and, to be shown, its loss terms.
Needs torch; copies into another project as it is. There, with labels:

    >>> x, y, net = torch.randn(40, 3), torch.arange(40) % 2, torch.nn.Linear(3, 2)
    >>> def loss(model, i, *_): return torch.nn.functional.cross_entropy(model(x[i]), y[i]), {}
    >>> sgd, split = torch.optim.SGD(net.parameters(), lr=0.1), [range(30), range(30, 40)]
    >>> rounds = train_federated(net, sgd, torch.arange(40), split, loss, rounds=2)
    >>> [report["clients"] for r, report in rounds]
    [[0, 1], [0, 1]]

    python federated.py     # FedAvg on a problem whose answer is known (a second, CPU)
"""

import hashlib
import math

import torch
import torch.distributed as dist
import torch.distributed.nn  # here: first imported in a process group it aborts at exit


def train_federated(model, optimizer, samples, split, loss, rounds, start=0, lr=None, **options):
    """Yield (r, `federated_round`'s report) after each round r = start .. rounds - 1.

    lr: a schedule, r -> learning rate of every parameter group, instead of the optimiser's own.
    """
    for r in range(start, rounds):
        if lr:
            for group in optimizer.param_groups:
                group["lr"] = lr(r)
        yield r, federated_round(model, optimizer, samples, split, loss, r, **options)


def federated_round(
    model, optimizer, samples, split, loss, r, *, participation=1.0, local_epochs=5, batch_size=128,
    seed=0, choose=None, average=None, progress=None,
):  # fmt: skip
    """Round r; the model, which plays every client, holds the global weights before and after.

    optimizer         the model's; its state is cleared for every client
    samples (N, ...)  of all clients, on the model's device: images, or torch.arange(N), by which
                      the loss looks up what it needs: images and labels, texts
    split             split[k]: indices of client k's samples
    loss              (model, batch, k, generator, global_state) -> scalar to minimise, dict of
                      detached scalars to report; global_state: the round's, to read only
    choose            (num_clients, participation, generator, r) -> ids; default `choose_clients`
    average           (states, weights, global_state, r, clients) -> state dict; lists of a state,
                      a sample count, an id for each client; default FedAvg, which keeps a sum only
    progress          (k, mine), called when client k of `mine`, this process's clients, begins:
                      the model holds the global weights, which it may change for k (FedBN)
    Returns {"clients": [k ...], "left_out": [k ...], "terms": {name: mean over the clients,
    weighted by samples}}. A client whose loss or weights are not finite is left out of all means;
    FloatingPointError if all are. The model is left in training mode, by an interrupt with the
    client's weights. Processes of torch.distributed start with equal weights, share the clients.
    """
    rank, world = processes()
    if average and world > 1:
        raise ValueError("a rule of averaging of your own needs all states: run one process")
    # 1. Choose: the server draws this round's clients; the processes share them, largest first.
    draw = len(split), participation, keyed_generator(seed, "clients", r)
    clients = [int(k) for k in (choose(*draw, r) if choose else choose_clients(*draw))]
    if not clients or len({*clients} & {*range(len(split))}) < len(clients):
        raise ValueError(f"choose gave {clients}: distinct ids below {len(split)}, at least one")
    largest_first = sorted((-len(split[k]), k) for k in clients)
    mine = [k for k in clients if (-len(split[k]), k) in largest_first[rank::world]]
    global_state = copy_state(model)
    total, states, reports = {}, [], {}
    add_to(total, global_state, weight=0)
    for k in mine:
        # 2. Send: every client starts from the same global weights.
        model.load_state_dict(global_state)
        optimizer.state.clear()
        if progress:
            progress(k, mine)
        # 3. Train locally, on the client's own samples alone.
        own, rng = split[k], keyed_generator(seed, "client", r, k)
        reports[k] = train_client(
            model, optimizer, samples, own, loss, k, rng, local_epochs, batch_size, global_state
        )
        # 4. Return the weights and the sample count, unless the client has diverged.
        state = model.state_dict()
        finite = torch.stack([value.isfinite().all() for value in state.values()]).all()
        if not (math.isfinite(reports[k]["loss"]) and finite):
            reports[k] = None
        elif average:
            states.append(copy_state(model))
        else:
            add_to(total, state, len(own))

    # 5. Average, over the clients of all processes.
    reports = gather(reports)
    kept = [k for k in clients if reports[k]]
    weights = [len(split[k]) for k in kept]
    if not kept:
        model.load_state_dict(global_state)
        raise FloatingPointError(f"no client of round {r + 1} has a finite loss and weights")
    names = reports[kept[0]].keys()
    if odd := [k for k in kept if reports[k].keys() != names]:
        raise ValueError(f"client {odd[0]} reports {[*reports[odd[0]]]}, others {[*names]}")
    if average:
        new_state = average(states, weights, global_state, r, kept)
    else:
        if world > 1:
            for value in total.values():
                dist.all_reduce(value)
        new_state = mean_of(total, sum(weights), global_state)
    model.load_state_dict(new_state)
    sums = {name: sum(n * reports[k][name] for k, n in zip(kept, weights)) for name in names}
    terms = {name: value / sum(weights) for name, value in sums.items()}
    return {"clients": clients, "left_out": [k for k in clients if not reports[k]], "terms": terms}


def train_client(
    model, optimizer, samples, index, loss, k, generator, epochs, batch_size, global_state=None
):
    """Local training in place on samples[index]; returns every term's mean over the steps, floats.

    An epoch's last batch, not full, is dropped: the loss depends on the size. A client with fewer
    than batch_size samples takes one step an epoch on all it has.
    """
    index = torch.as_tensor(index)
    if index.dtype in (torch.bool, torch.uint8) or not len(index):
        raise ValueError(f"client {k} needs int64 indices, got {len(index)} of {index.dtype}")
    model.train()
    sums, steps = {}, 0
    for _ in range(epochs):
        order = index[torch.randperm(len(index), generator=generator)]
        order = order.to(samples.device, non_blocking=True)
        for i in range(max(1, len(order) // batch_size)):
            batch = samples[order[i * batch_size : (i + 1) * batch_size]]
            value, terms = loss(model, batch, k, generator, global_state)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            for name, term in ({"loss": 0, **terms} | {"loss": value.detach()}).items():
                sums[name] = sums.get(name, 0) + term  # on the device, which nobody waits for
            steps += 1
    return {name: float(total) / steps for name, total in sums.items()}


def choose_clients(num_clients, participation, generator):
    """Ids of round(participation * num_clients), at least one, distinct clients, sorted."""
    if not 0 < participation <= 1:
        raise ValueError(f"participation must be in (0, 1], got {participation}")
    count = max(1, round(participation * num_clients))
    return torch.randperm(num_clients, generator=generator)[:count].sort().values.tolist()


def average_states(states, weights):
    """FedAvg of states at hand, sum_i w_i state_i / sum_i w_i, entry by entry -> state dict.

    states: an iterable, read one at a time; weights: as many numbers >= 0 with a sum > 0, else
    ValueError, as for states that differ in an entry's name or shape. BatchNorm's statistics are
    averaged like weights, integers (its counters) rounded.
    """
    total, weight_sum = {}, 0
    for state, weight in zip(states, map(float, weights), strict=True):
        if not 0 <= weight < math.inf:
            raise ValueError(f"average_states needs finite weights >= 0, got {weight}")
        add_to(total, state, weight)
        weight_sum += weight
    if not 0 < weight_sum < math.inf:
        raise ValueError("average_states needs weights with a finite sum > 0")
    return mean_of(total, weight_sum, state)


def add_to(total, state, weight):
    """total += weight * state, by name, in float64; an empty total begins with zeros."""
    if not total:  # contiguous, as torch.distributed needs it
        like = {"dtype": torch.float64, "memory_format": torch.contiguous_format}
        total.update({name: torch.zeros_like(value, **like) for name, value in state.items()})
    entries = [{(name, tuple(v.shape)) for name, v in part.items()} for part in (total, state)]
    if odd := entries[0] ^ entries[1]:
        raise ValueError("states of different networks: not all have {} {}".format(*min(odd)))
    for name, value in state.items():
        total[name].add_(value.detach(), alpha=weight)


def mean_of(total, weight, like):
    """total / weight with like's dtypes: in float64 equal float32 states average to that state."""
    means = ((name, total[name] / weight, value) for name, value in like.items())
    return {n: (m if v.is_floating_point() else m.round()).to(v.dtype) for n, m, v in means}


def copy_state(model):
    """The model's state dict, copied: later training does not change it."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def keyed_generator(*key):
    """A CPU generator that depends on its key of ints and strings alone: (seed, "client", r, k)."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


def processes():
    """(rank, number) of torch.distributed's processes, (0, 1) without it."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gather(reports):
    """All processes' reports in one dict."""
    parts = [reports] * processes()[1]
    if dist.is_initialized():
        dist.all_gather_object(parts, reports)
    return {k: report for part in parts for k, report in part.items()}


if __name__ == "__main__":
    # A client's loss (w - x)^2 / 2 wants w = x, its number; lr 0.5 halves the distance a round.
    numbers, owners = torch.tensor([1.0] * 6 + [4.0] * 3 + [12.0]), [range(6), range(6, 9), [9]]
    net = torch.nn.ParameterList([torch.zeros(())])

    def distance(model, batch, k, generator, global_state):
        return (model[0] - batch).square().mean() / 2, {}

    print("clients hold 6 x 1, 3 x 4, 1 x 12; the mean of all ten is 3")
    sgd = torch.optim.SGD(net.parameters(), lr=0.5)
    for number, _ in train_federated(net, sgd, numbers, owners, distance, rounds=6, local_epochs=1):
        print(f"round {number + 1}: w = {net[0].item():.4f}")
