"""Federated averaging (McMahan et al. 2017): one round, in five steps.

    w <- sum_k n_k w_k / sum_k n_k        over the clients k that took part, n_k their samples

One model and one optimiser play all clients in turn. A client sends its weights, its number of
samples and, to be shown, the means of its loss terms; nothing else reaches the server. The parts
come first, in the order of the steps, then `federated_round`, which puts them together.
It needs torch alone and works alone in another project. There, with labels:

    >>> x, y, net = torch.randn(40, 3), torch.arange(40) % 2, torch.nn.Linear(3, 2)
    >>> def loss(model, i, *_): return torch.nn.functional.cross_entropy(model(x[i]), y[i]), {}
    >>> sgd, split = torch.optim.SGD(net.parameters(), lr=0.1), [range(30), range(30, 40)]
    >>> report = federated_round(net, sgd, torch.arange(40), split, loss, r=0)

    python federated.py     # FedAvg on a problem whose answer is known (a second, CPU)
"""

import hashlib
import math
import warnings

import torch


def keyed_generator(*key):
    """A CPU generator that depends on its key of ints and strings alone: (seed, "client", r, k).

    So a round's random numbers depend neither on the rounds before it nor on who trains first.
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


def copy_state(model):
    """The model's state dict, copied: later training does not change it."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def choose_clients(num_clients, participation, generator, r=None):
    """Step 1, FedAvg's choice: ids of round(participation * num_clients) clients, at least one.

    A choice of your own takes the same arguments; r is the round, which this one does not need.
    """
    if not 0 < participation <= 1:
        raise ValueError(f"participation must be in (0, 1], got {participation}")
    count = max(1, round(participation * num_clients))
    shuffled = torch.randperm(num_clients, generator=generator).tolist()
    return sorted(shuffled[:count])


def check_ids(clients, num_clients):
    """The chosen ids as a list of ints; ValueError for one that does not exist or comes twice."""
    clients = [int(k) for k in clients]
    for k in clients:
        if not 0 <= k < num_clients or clients.count(k) > 1:
            raise ValueError(f"choose gave {clients}: needs different ids below {num_clients}")
    return clients


def train_client(
    model, optimizer, samples, index, loss, k, generator, epochs, batch_size, global_state=None
):
    """Step 3, client k's training on samples[index], in place -> means of the loss terms.

    The whole model is put into training mode. An epoch's last batch is dropped if it is not full:
    the loss depends on the size. A client with fewer than batch_size samples takes one step an
    epoch, on all it has.
    """
    index = torch.as_tensor(index)
    if index.ndim != 1 or len(index) < 1 or index.dtype in (torch.bool, torch.uint8):
        raise ValueError(f"client {k} needs a list of sample numbers, got {index}")
    if epochs < 1 or batch_size < 1:
        raise ValueError(f"epochs and batch_size must be at least 1, got {epochs}, {batch_size}")
    num_batches = max(1, len(index) // batch_size)
    sums, counts = {"loss": 0.0}, {}  # "loss" is printed first
    model.train()
    gpus = []
    if samples.is_cuda:
        gpus.append(samples.device)
    with torch.random.fork_rng(gpus):
        torch.manual_seed(generator.initial_seed())  # dropout draws from torch's own generator
        for _ in range(epochs):
            order = index[torch.randperm(len(index), generator=generator)]
            order = order.to(samples.device, non_blocking=True)
            for i in range(num_batches):
                batch = samples[order[i * batch_size : (i + 1) * batch_size]]
                value, terms = loss(model, batch, k, generator, global_state)
                optimizer.zero_grad()
                value.backward()
                optimizer.step()
                if "loss" in terms:
                    raise ValueError('no term may be called "loss", the name of their sum')
                terms = {**terms, "loss": value.detach()}
                for name, term in terms.items():
                    sums[name] = sums.get(name, 0.0) + term  # on the device: nobody waits for it
                    counts[name] = counts.get(name, 0) + 1
    means = {}
    for name, total in sums.items():
        means[name] = float(total) / counts[name]
    return means


def find_divergence(state, terms, global_state):
    """Step 4: the name of a term or an entry of the state that is not finite any more, or None.

    An entry that is not finite in the global state either, say a mask of -inf, is allowed.
    """
    for name, value in terms.items():
        if not math.isfinite(value):
            return name
    for name, value in state.items():
        if (global_state[name].isfinite() & ~value.isfinite()).any():
            return name
    return None


def average_states(states, weights, global_state=None, r=None, clients=None):
    """Step 5, FedAvg's average: sum_i w_i state_i / sum_i w_i, entry by entry -> state dict.

    A rule of your own takes the same arguments; `clients` are the ids. BatchNorm's statistics are
    averaged like weights, its counters rounded. ValueError for weights that are negative or all
    zero and for different networks; FloatingPointError for no state: every client has diverged.
    """
    if not states:
        raise FloatingPointError("every client of the round has diverged: take a lower --lr")
    weights = [float(weight) for weight in weights]
    if min(weights) < 0 or not 0 < sum(weights) < math.inf:
        raise ValueError(f"weights must be at least 0, their sum finite and above 0: {weights}")
    total = weighted_sum(states, weights, like=states[0])
    return divide(total, sum(weights), like=states[0])


def weighted_sum(states, weights, like):
    """sum_i w_i state_i by name, in float64; every state has the names and shapes of `like`."""
    total = {}
    for name, value in like.items():
        total[name] = torch.zeros(value.shape, dtype=torch.float64, device=value.device)
    for state, weight in zip(states, weights, strict=True):
        for name in [*like, *state]:  # has each all of the other's names?
            if name not in state or name not in like or state[name].shape != like[name].shape:
                raise ValueError(f"states of different networks: they differ in {name}")
        if weight == 0:
            continue
        for name, value in state.items():
            total[name].add_(value.detach(), alpha=weight)
    return total


def divide(total, weight, like):
    """total / weight in the dtypes of `like`."""
    mean = {}
    for name, value in like.items():
        quotient = total[name] / weight
        if not value.is_floating_point():
            quotient = quotient.round()
        mean[name] = quotient.to(value.dtype)
    return mean


def mean_terms(reports, weights):
    """Every loss term's mean, weighted, over the reports that have it: dicts of floats -> dict."""
    sums, totals = {}, {}
    for terms, weight in zip(reports, weights, strict=True):
        for name, value in terms.items():
            sums[name] = sums.get(name, 0.0) + weight * value
            totals[name] = totals.get(name, 0.0) + weight
    return {name: sums[name] / totals[name] for name in sums}


def federated_round(
    model, optimizer, samples, split, loss, r, *, participation=1.0, local_epochs=5, batch_size=128,
    seed=0, choose=choose_clients, average=average_states, on_client_start=None,
):  # fmt: skip
    """Round r: the model holds the global weights before and after; returns a report.

    optimizer         the model's; its state is cleared for every client
    samples (N, ...)  of all clients, on the model's device: images, or torch.arange(N), by which
                      the loss looks up what it needs: images and labels, texts
    split             split[k]: the indices of client k's samples
    loss              (model, batch, k, generator, global_state) -> scalar to minimise, dict of
                      detached scalars to report; global_state: the round's, to read only
    choose            (num_clients, participation, generator, r) -> ids of this round's clients
    average           (states, weights, global_state, r, clients) -> state dict; the weights are
                      numbers of samples; all lists are empty if no client is left
    on_client_start   (model, k), called before client k trains; it may overwrite some of the global
                      weights in the model: FedBN brings back the client's own BatchNorm

    The report: {"clients": ids, "left_out": ids, "terms": {name: mean over the clients}}. A client
    that has diverged is left out of all means, and a warning says what is not finite. The states
    of a round's clients lie in memory together. All draws, also dropout's, depend on seed, r, k.
    """
    # 1. Choose: the server draws this round's clients.
    clients = choose(len(split), participation, keyed_generator(seed, "clients", r), r)
    clients = check_ids(clients, len(split))

    global_state = copy_state(model)
    kept, left_out = [], []
    states, weights, reports = [], [], []  # of the clients that are kept
    for k in clients:
        # 2. Send: every client starts from the same global weights.
        model.load_state_dict(global_state)
        optimizer.state.clear()
        if on_client_start:
            on_client_start(model, k)

        # 3. Train locally, on the client's own samples alone.
        draws = keyed_generator(seed, "client", r, k)
        terms = train_client(
            model, optimizer, samples, split[k], loss, k, draws,
            local_epochs, batch_size, global_state,
        )  # fmt: skip

        # 4. Return the weights and the number of samples, unless the client has diverged.
        state = copy_state(model)
        not_finite = find_divergence(state, terms, global_state)
        if not_finite:
            text = f"round {r + 1} leaves out client {k}: its {not_finite} is not finite"
            warnings.warn(text, stacklevel=2)
            left_out.append(k)
        else:
            kept.append(k)
            states.append(state)
            weights.append(len(split[k]))
            reports.append(terms)

    # 5. Average: the server's new weights. Should that fail, the model keeps the old ones.
    model.load_state_dict(global_state)
    new_state = average(states, weights, global_state, r, kept)
    model.load_state_dict(new_state)
    return {"clients": clients, "left_out": left_out, "terms": mean_terms(reports, weights)}


if __name__ == "__main__":
    # A sample is a number x, its loss (w - x)^2 / 2. A step of lr 0.5 goes halfway to the mean x.
    numbers = torch.tensor([1.0] * 6 + [4.0] * 3 + [12.0])
    owners = [range(6), range(6, 9), range(9, 10)]
    net = torch.nn.ParameterList([torch.zeros(())])
    sgd = torch.optim.SGD(net.parameters(), lr=0.5)

    def distance(model, batch, k, generator, global_state):
        return (model[0] - batch).square().mean() / 2, {}

    print("clients hold 6 x 1, 3 x 4, 1 x 12; the mean of all ten is 3")
    for r in range(6):
        federated_round(net, sgd, numbers, owners, distance, r, local_epochs=1)
        print(f"round {r + 1}: w = {net[0].item():.4f}")
