"""train.py on several processes or GPUs: the clients of a round are shared out among them.

    torchrun --nproc-per-node 4 extras/parallel.py --clients 10     # all of train.py's flags

Every process takes federated.py's round with its own share of the clients; only the average, step
5, is a sum over all of them. So the weights are those that one process would have. The first one
prints, scores and writes the run folder, from which train.py can go on as well.
"""

import os
import signal
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent.parent))

import train  # noqa: E402
from federated import choose_clients, divide, federated_round, mean_terms, weighted_sum  # noqa: E402


def share_out(clients, sizes, count):
    """Clients -> `count` lists: the largest goes first, to the process that has least to do."""
    shares, loads = [[] for _ in range(count)], [0] * count
    for k in sorted(clients, key=lambda k: sizes[k], reverse=True):
        least = loads.index(min(loads))
        shares[least].append(k)
        loads[least] += sizes[k]
    return shares


def average_all(states, weights, global_state, r, clients):
    """`federated.average_states` over the clients of all processes; this one may have none."""
    total = weighted_sum(states, weights, like=global_state)
    weight = next(iter(total.values())).new_tensor(sum(weights))
    for value in [*total.values(), weight]:
        dist.all_reduce(value)
    if weight == 0:
        raise FloatingPointError("no client has a finite loss and finite weights: lower the lr")
    return divide(total, weight.item(), like=global_state)


def shared_round(model, optimizer, samples, split, loss, r, on_client_start=None, **options):
    """`federated_round` of all processes together -> the same report for each of them.

    on_client_start is not called: it would see the clients of one process alone.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    sizes = [len(part) for part in split]

    def choose(num_clients, participation, generator, r):
        clients = choose_clients(num_clients, participation, generator, r)
        return share_out(clients, sizes, world)[rank]

    options |= {"choose": choose, "average": average_all}
    own = federated_round(model, optimizer, samples, split, loss, r, **options)
    parts = [None] * world
    dist.all_gather_object(parts, own)
    clients, left_out, weights = [], [], []
    for part in parts:
        clients += part["clients"]
        left_out += part["left_out"]
        weights.append(sum(sizes[k] for k in part["clients"] if k not in part["left_out"]))
    terms = mean_terms([part["terms"] for part in parts], weights)
    return {"clients": sorted(clients), "left_out": sorted(left_out), "terms": terms}


def main(argv=None):
    """train.py's main on the first process; the others take part in its rounds, no more."""
    parser = train.build_parser()
    if "RANK" not in os.environ:
        parser.error(
            "start it with torchrun --nproc-per-node N extras/parallel.py, or run train.py"
        )
    first = os.environ["RANK"] == "0"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(timeout=timedelta(days=1))
    if not first:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first one speaks
        try:
            dist.barrier()  # until the first has checked the flags and opened the run
        except RuntimeError:  # it has not: it has said why
            sys.exit(2)
    try:
        config, checkpoint = train.read_config(parser, argv)
        device, data, split = train.prepare(config, checkpoint)
        model = train.place(train.make_model(config), checkpoint, device)
        loss = train.make_loss(config, len(split), device)
        if first:
            train.open_run(config, checkpoint, split, model)
    except (ValueError, OSError) as error:
        parser.error(" ".join(str(error).split()))
    if first:
        dist.barrier()
        train.run_rounds(config, checkpoint, data, split, model, loss, shared_round)
    else:
        optimizer, options = train.make_optimizer(config, model), train.round_options(config)
        for r in range(len(checkpoint["history"]), config["rounds"]):
            shared_round(model, optimizer, data.train_x, split, loss, r, **options)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
