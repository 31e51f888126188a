"""federated.py: FedAvg on known answers; the order of the clients does not matter."""

import copy
import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

import federated
from federated import (
    average_states,
    choose_clients,
    federated_round,
    keyed_generator,
    train_client,
    train_federated,
)


def small_net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(12, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4)
    )


def noisy_loss(model, batch, k, generator, global_state):
    """Depends on the client, on its random numbers and on the batch."""
    noise = torch.randn(batch.shape, generator=generator)
    value = (model(batch + 0.1 * noise) - k).square().mean()
    return value, {"k": torch.tensor(float(k))}


IMAGES = torch.randn(60, 3, 2, 2, generator=torch.Generator().manual_seed(0))
SPLIT = [range(0, 10), range(10, 35), range(35, 60)]


def sgd(net):
    return torch.optim.SGD(net.parameters(), 0.05, 0.9, weight_decay=1e-4)


def run(net, rounds=2, split=SPLIT, loss=noisy_loss, **options):
    options = {"local_epochs": 2, "batch_size": 8, **options}
    return [
        report
        for _, report in train_federated(net, sgd(net), IMAGES, split, loss, rounds, **options)
    ]


def same(one, two):
    return all(torch.equal(value, two[name]) for name, value in one.items())


# ------------------------------------------------------------------ averaging


def test_average_by_hand():
    states = [
        {"w": torch.tensor([0.0, 2.0]), "n": torch.tensor(10)},
        {"w": torch.tensor([4.0, 6.0]), "n": torch.tensor(20)},
    ]
    average = average_states(states, [3, 1])
    assert average["w"].tolist() == [1.0, 3.0]
    assert average["n"].dtype == torch.int64 and average["n"].item() == 12  # 12.5 to even


def test_average_of_equal_models_is_that_model_and_of_one_is_that_one():
    state = small_net().state_dict()
    assert same(average_states([state] * 7, [3, 5, 1, 100, 7, 11, 13]), state)
    assert same(average_states([state], [17]), state)
    assert [v.dtype for v in average_states([state], [1]).values()] == [
        v.dtype for v in state.values()
    ]


def test_average_equals_a_loop_in_float64_and_reads_its_states_once():
    states = [small_net(seed).state_dict() for seed in range(4)]
    weights = [1, 2, 3, 4]
    average = average_states(iter(states), weights)
    for name, value in average.items():
        expected = sum(w / 10 * state[name].double() for w, state in zip(weights, states))
        assert torch.allclose(value.double(), expected, atol=1e-7)


def test_averaging_goes_by_name_and_states_that_do_not_fit_are_named():
    state = small_net().state_dict()
    turned = dict(reversed(state.items()))  # as a safetensors file may have them
    assert same(average_states([state, turned], [1, 1]), state)
    for other, words in (
        (nn.Linear(4, 2).state_dict(), r"bias \(2,\)|weight \(2, 4\)"),
        ({**nn.Linear(2, 4).state_dict(), "extra": torch.ones(1)}, r"extra \(1,\)"),
        ({"weight": torch.ones(4, 2)}, r"bias \(4,\)"),
    ):
        with pytest.raises(ValueError, match=words):
            average_states([nn.Linear(2, 4).state_dict(), other], [1, 1])


@pytest.mark.parametrize(
    "count, weights",
    [
        (1, []),
        (0, [1]),
        (2, [1]),
        (1, [1, 1]),
        (2, [0, 0]),
        (2, [2, -1]),
        (1, [float("nan")]),
        (1, [float("inf")]),
    ],
)
def test_weights_that_do_not_fit_are_a_value_error(count, weights):
    with pytest.raises(ValueError):
        average_states([{"w": torch.ones(2)}] * count, weights)


# ------------------------------------------------------------------ a round


def test_one_client_with_all_data_is_plain_training():
    net, alone = small_net(), small_net()
    run(net, rounds=1, split=[range(60)])
    train_client(
        alone,
        sgd(alone),
        IMAGES,
        range(60),
        noisy_loss,
        0,
        keyed_generator(0, "client", 0, 0),
        2,
        8,
    )
    assert same(net.state_dict(), alone.state_dict())


def test_a_round_equals_separate_models_averaged():
    net, states = small_net(), []
    for k, part in enumerate(SPLIT):  # every client a model and an optimiser of its own
        own = copy.deepcopy(net)
        train_client(
            own, sgd(own), IMAGES, part, noisy_loss, k, keyed_generator(0, "client", 0, k), 2, 8
        )
        states.append(own.state_dict())
    run(net, rounds=1)
    assert same(net.state_dict(), average_states(states, [10, 25, 25]))


def test_the_order_of_clients_does_not_matter(monkeypatch):
    net, turned = small_net(), small_net()
    run(net)
    forward = federated.choose_clients
    monkeypatch.setattr(federated, "choose_clients", lambda *arguments: forward(*arguments)[::-1])
    run(turned)
    for one, other in zip(net.state_dict().values(), turned.state_dict().values()):
        assert torch.allclose(one, other, atol=1e-6)  # up to the order of the sum


def test_going_on_from_a_round_equals_never_having_stopped():
    straight, stopped = small_net(), small_net()
    run(straight, rounds=4)
    run(stopped, rounds=2)
    fresh = small_net(seed=5)
    fresh.load_state_dict(stopped.state_dict())
    run(fresh, rounds=4, start=2)
    assert same(straight.state_dict(), fresh.state_dict())


def test_rounds_clients_and_seeds_have_their_own_random_numbers():
    keys = [
        (0, "client", 0, 0),
        (0, "client", 0, 1),
        (0, "client", 1, 0),
        (1, "client", 0, 0),
        (0, "clients", 0),
    ]
    draws = [torch.rand(4, generator=keyed_generator(*key)) for key in keys]
    assert len(torch.stack(draws).unique(dim=0)) == len(keys)
    assert torch.equal(draws[0], torch.rand(4, generator=keyed_generator(*keys[0])))


def test_every_round_and_seed_draws_its_own_clients_and_numbers():
    split, seen = [range(5 * k, 5 * k + 5) for k in range(10)], []

    def note(model, batch, k, generator, global_state):
        seen.append((k, generator.initial_seed()))
        return model(batch).square().mean(), {}

    for seed in (0, 1):
        options = {"participation": 0.3, "local_epochs": 1, "seed": seed}
        reports = run(small_net(), 3, split, note, **options)
        assert [len(report["clients"]) for report in reports] == [3] * 3
    assert seen == [
        (k, keyed_generator(seed, "client", r, k).initial_seed())
        for seed in (0, 1)
        for r in range(3)
        for k in choose_clients(10, 0.3, keyed_generator(seed, "clients", r))
    ]


def test_terms_are_means_over_all_steps():
    net, seen = small_net(), []

    def loss(model, batch, *_):
        value = model(batch).square().mean()
        seen.append(value.item())
        return value, {"twice": 2 * value.detach()}

    terms = train_client(net, sgd(net), IMAGES, range(60), loss, 0, keyed_generator(0), 2, 8)
    mean = sum(seen) / 14  # two epochs of seven full batches
    assert terms == {"loss": pytest.approx(mean), "twice": pytest.approx(2 * mean)}


def test_reports_are_averaged_by_samples():
    report = run(small_net(), rounds=1)[0]
    assert report["clients"] == [0, 1, 2]
    assert report["terms"]["k"] == pytest.approx((10 * 0 + 25 * 1 + 25 * 2) / 60)


def test_another_rule_of_averaging_needs_no_edit():
    def last_one_wins(states, weights, global_state, r, clients):
        assert same(global_state, small_net().state_dict())
        assert weights == [len(part) for part in SPLIT] and r == 0 and clients == [0, 1, 2]
        return states[-1]

    net, expected = small_net(), small_net()
    train_client(
        expected,
        sgd(expected),
        IMAGES,
        SPLIT[2],
        noisy_loss,
        2,
        keyed_generator(0, "client", 0, 2),
        2,
        8,
    )
    run(net, rounds=1, average=last_one_wins)
    assert same(net.state_dict(), expected.state_dict())


def test_only_weights_and_sample_counts_reach_the_averaging():
    def inspect(states, weights, global_state, r, clients):
        seen = list(states)
        assert weights == [10, 25, 25]
        for state in [*seen, global_state]:
            assert [(n, v.shape) for n, v in state.items()] == shapes
        return average_states(seen, weights)

    net = small_net()
    shapes = [(name, value.shape) for name, value in net.state_dict().items()]
    run(net, rounds=1, average=inspect)


def test_a_client_sees_its_own_samples_only_and_every_batch_is_full():
    seen = []

    def spy(model, batch, k, generator, global_state):
        seen.append((k, batch))
        return model(batch).sum() * 0, {}

    net = small_net()
    federated_round(net, sgd(net), IMAGES, SPLIT, spy, 0, local_epochs=2, batch_size=12)
    for k, batch in seen:
        own = IMAGES[list(SPLIT[k])].flatten(1)
        assert all((own == row).all(1).any() for row in batch.flatten(1))
    # client 0 has 10 < 12 samples: one batch of all; the others 25: two of 12, one sample waits
    assert [(k, len(batch)) for k, batch in seen] == [(0, 10)] * 2 + [(1, 12)] * 4 + [(2, 12)] * 4
    assert (
        len(torch.cat([batch for k, batch in seen[:1]]).flatten(1).unique(dim=0)) == 10
    )  # no sample twice


# ------------------------------------------------------------------ clients that diverge


def diverging(*bad, what="weights"):
    """noisy_loss, but the clients `bad` end with weights, or a loss, that are not finite."""

    def loss(model, batch, k, generator, global_state):
        value, terms = noisy_loss(model, batch, k, generator, global_state)
        if k in bad:
            value = value * float("inf") if what == "weights" else value + float("nan")
        return value, terms

    return loss


@pytest.mark.parametrize("what", ["weights", "loss"])
def test_a_client_that_is_not_finite_is_left_out_and_named(what):
    net, expected, states = small_net(), small_net(), []
    for k in (0, 2):
        own = copy.deepcopy(expected)
        train_client(
            own, sgd(own), IMAGES, SPLIT[k], noisy_loss, k, keyed_generator(0, "client", 0, k), 2, 8
        )
        states.append(own.state_dict())
    options = {"local_epochs": 2, "batch_size": 8}
    report = federated_round(net, sgd(net), IMAGES, SPLIT, diverging(1, what=what), 0, **options)
    assert report["clients"] == [0, 1, 2] and report["left_out"] == [1]
    assert report["terms"]["k"] == pytest.approx(25 * 2 / 35)
    assert same(net.state_dict(), average_states(states, [10, 25]))


def test_a_round_without_a_finite_client_is_an_error_and_keeps_the_weights():
    net = small_net()
    with pytest.raises(FloatingPointError, match="no client of round 4"):
        federated_round(net, sgd(net), IMAGES, SPLIT, diverging(0, 1, 2), 3, batch_size=8)
    assert same(net.state_dict(), small_net().state_dict())


# ------------------------------------------------------------------ many processes


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_processes_share_every_client_once_largest_first(count, monkeypatch):
    split, parts = [range(size) for size in (5, 9, 8, 7, 5)], []

    def gather(reports):
        parts.append(list(reports))
        raise StopIteration  # the rest needs the others

    monkeypatch.setattr(federated, "gather", gather)
    for rank in range(count):
        monkeypatch.setattr(federated, "processes", lambda rank=rank: (rank, count))
        with pytest.raises(RuntimeError, match="StopIteration"):
            run(small_net(), 1, split)
    assert sorted(sum(parts, [])) == [0, 1, 2, 3, 4]
    if count == 2:
        assert parts == [[1, 3, 4], [0, 2]]  # by size: 1, 2, 3, 0, 4


def one_of_many(rank, count, store, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=count, init_method=f"file://{store}")
    net = small_net()
    reports = run(net, rounds=2, loss=diverging(1))
    torch.save([net.state_dict(), reports], f"{folder}/{rank}.pt")
    group = dist.group.WORLD
    dist.destroy_process_group()
    # A group that something still holds keeps gloo's threads, which may abort the process at exit.
    assert sys.getrefcount(group) <= 2  # the name above and the call's argument


@pytest.mark.parametrize("count", [4])
def test_many_processes_equal_one(count, tmp_path):
    context = torch.multiprocessing.get_context("spawn")
    workers = [
        context.Process(target=one_of_many, args=(rank, count, tmp_path / "store", tmp_path))
        for rank in range(count)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(300)
        assert worker.exitcode == 0
    net = small_net()
    expected = run(net, rounds=2, loss=diverging(1))
    for rank in range(count):
        state, reports = torch.load(tmp_path / f"{rank}.pt")
        assert [report["left_out"] for report in reports] == [[1], [1]]
        assert [report["terms"] for report in reports] == [
            pytest.approx(report["terms"], abs=1e-5) for report in expected
        ]
        for name, value in net.state_dict().items():
            assert torch.allclose(state[name], value, atol=1e-6), name


# ------------------------------------------------------------------ choice of clients and optimiser


def test_choice_is_distinct_sorted_reproducible_and_fair():
    counts = torch.zeros(50)
    for round_number in range(2000):
        chosen = choose_clients(50, 0.2, keyed_generator(0, "clients", round_number))
        assert len(set(chosen)) == 10 and chosen == sorted(chosen)
        counts[chosen] += 1
    assert counts.min() > 330 and counts.max() < 470  # 400 expected, standard deviation 18
    assert (
        choose_clients(10, 0.01, keyed_generator(0))
        and len(choose_clients(3, 1.0, keyed_generator(0))) == 3
    )


@pytest.mark.parametrize("participation", [0, -0.5, 1.1, float("nan")])
def test_participation_outside_its_range_is_a_value_error(participation):
    with pytest.raises(ValueError, match="participation"):
        choose_clients(10, participation, keyed_generator(0))


@pytest.mark.parametrize(
    "name, options",
    [
        ("SGD", {"momentum": 0.9}),
        ("SGD", {"momentum": 0.9, "dampening": 0.5}),
        ("Adam", {}),
        ("AdamW", {}),
        ("NAdam", {}),
        ("Rprop", {}),
        ("ASGD", {}),
        ("Adagrad", {}),
        ("RMSprop", {"momentum": 0.9}),
    ],
)
def test_every_client_begins_with_an_optimiser_as_new(name, options):
    """A round of one optimiser for all clients equals one in which each client has its own."""

    def make(net):
        return getattr(torch.optim, name)(net.parameters(), lr=0.01, **options)

    net, states = small_net(), []
    for k, part in enumerate(SPLIT):
        own, rng = copy.deepcopy(net), keyed_generator(0, "client", 0, k)
        train_client(own, make(own), IMAGES, part, noisy_loss, k, rng, 2, 8)
        states.append(own.state_dict())
    used = make(net)
    federated_round(net, used, IMAGES, SPLIT, noisy_loss, 0, local_epochs=2, batch_size=8)
    assert same(net.state_dict(), average_states(states, [10, 25, 25]))


# ------------------------------------------------------------------ rules of one's own


def test_the_choice_knows_its_round_and_may_be_a_tensor():
    reports = run(small_net(), 3, choose=lambda n, share, rng, r: torch.tensor([r, 2 - r // 2]))
    assert [report["clients"] for report in reports] == [[0, 2], [1, 2], [2, 1]]
    assert all(type(k) is int for report in reports for k in report["clients"])


@pytest.mark.parametrize("clients", [[0, 0], [0, -2], [5], []])
def test_a_choice_of_no_distinct_clients_is_a_value_error(clients):
    with pytest.raises(ValueError, match="choose gave"):
        run(small_net(), 1, choose=lambda *_: clients)


@pytest.mark.parametrize("index", [torch.arange(60) < 30, torch.arange(9).byte(), []])
def test_a_mask_or_nothing_for_a_clients_indices_is_a_value_error(index):
    with pytest.raises(ValueError, match="client 1 needs int64 indices"):
        run(small_net(), 1, split=[range(10), index])


def test_small_integers_are_weights_too_and_no_graph_is_kept():
    states = [{"w": torch.ones(1, requires_grad=True)}, {"w": torch.zeros(1)}]
    average = average_states(states, np.array([200, 200], dtype=np.uint8))["w"]
    assert average == 0.5 and not average.requires_grad


def test_clients_that_report_other_terms_are_named():
    def loss(model, batch, k, generator, global_state):
        return model(batch).square().mean(), {"a" if k < 2 else "b": torch.tensor(1.0)}

    net = small_net()
    with pytest.raises(ValueError, match="client 2 reports.*'b'.*'a'"):
        run(net, 1, loss=loss)


def test_fedbn_keeps_every_clients_batchnorm_in_a_dozen_lines():
    """FedBN (Li et al. 2021): BatchNorm's entries stay with the client, the others are averaged."""
    own, net = {}, small_net()

    def is_bn(name):
        return name.startswith("2.")

    def keep(states, weights, global_state, r, clients):
        for k, state in zip(clients, states):
            own[k] = {name: value for name, value in state.items() if is_bn(name)}
        return average_states(states, weights)

    def bring_back(k, mine):
        net.load_state_dict(own.get(k, {}), strict=False)

    seen = []

    def watch(model, batch, k, generator, global_state):
        seen.append((k, copy.deepcopy(model.state_dict()), global_state))
        return noisy_loss(model, batch, k, generator, global_state)

    options = {"average": keep, "progress": bring_back, "local_epochs": 1, "batch_size": 25}
    for _ in train_federated(net, sgd(net), IMAGES, SPLIT, watch, 2, **options):
        last = own.copy()
        if len(seen) == 3:
            first = last
    assert [k for k, *_ in seen] == [0, 1, 2] * 2  # one step a client and round
    for k, state, global_state in seen[3:]:
        for name, value in state.items():
            begin = first[k] if is_bn(name) else global_state
            if not name.startswith("2.running") and not name.endswith("tracked"):  # forward moves
                assert torch.equal(value, begin[name]), name
    assert not same(first[0], first[1]) and not same(first[0], last[0])


def test_indices_as_samples_train_a_classifier_with_labels():
    x = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
    y, net = (x[:, 0] > 0).long(), nn.Linear(2, 2)

    def loss(model, i, *_):
        return nn.functional.cross_entropy(model(x[i]), y[i]), {}

    split = [range(0, 120), range(120, 200)]
    for _ in train_federated(net, sgd(net), torch.arange(200), split, loss, 5, batch_size=20):
        pass
    assert (net(x).argmax(1) == y).float().mean() > 0.95


def test_a_schedule_sets_every_parameter_group():
    net, rates = small_net(), []
    groups = [{"params": [p], "lr": 0.1 * i} for i, p in enumerate(net.parameters())]
    optimizer = torch.optim.SGD(groups)
    options = {"lr": lambda r: 1 / (r + 1), "batch_size": 8}
    for _ in train_federated(net, optimizer, IMAGES, SPLIT, noisy_loss, 2, **options):
        rates.append({group["lr"] for group in optimizer.param_groups})
    assert rates == [{1.0}, {0.5}]
