"""federated.py: FedAvg on known answers; the order of the clients does not matter."""

import copy

import pytest
import torch
from torch import nn

import federated
from federated import (
    average_states,
    choose_clients,
    federated_round,
    keyed_generator,
    reset_optimizer,
    train_client,
    train_federated,
)


def small_net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(12, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4)
    )


def noisy_loss(model, batch, k, generator):
    """Depends on the client, on its random numbers and on the batch."""
    noise = torch.randn(batch.shape, generator=generator)
    value = (model(batch + 0.1 * noise) - k).square().mean()
    return value, {"k": torch.tensor(float(k))}


IMAGES = torch.randn(60, 3, 2, 2, generator=torch.Generator().manual_seed(0))
SPLIT = [range(0, 10), range(10, 35), range(35, 60)]


def sgd(net):
    return torch.optim.SGD(net.parameters(), 0.05, 0.9, weight_decay=1e-4)


def run(net, rounds=2, split=SPLIT, **options):
    options = {"local_epochs": 2, "batch_size": 8, **options}
    return [
        report
        for _, report in train_federated(
            net, sgd(net), IMAGES, split, noisy_loss, rounds, **options
        )
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


def test_reports_are_averaged_by_samples():
    report = run(small_net(), rounds=1)[0]
    assert report["clients"] == [0, 1, 2]
    assert report["terms"]["k"] == pytest.approx((10 * 0 + 25 * 1 + 25 * 2) / 60)


def test_another_rule_of_averaging_needs_no_edit():
    def last_one_wins(states, weights):
        return list(states)[-1]

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
    def inspect(states, weights):
        assert weights == [10, 25, 25]
        seen = list(states)
        assert all(
            value.shape == reference[name].shape for state in seen for name, value in state.items()
        )
        return average_states(seen, weights)

    net = small_net()
    reference = net.state_dict()
    run(net, rounds=1, average=inspect)


def test_a_client_sees_its_own_samples_only_and_every_batch_is_full():
    seen = []

    def spy(model, batch, k, generator):
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


@pytest.mark.parametrize("make", [sgd, lambda net: torch.optim.Adam(net.parameters(), 0.01)])
def test_a_reset_optimiser_is_bit_equal_to_a_fresh_one(make):
    def steps(net, optimizer):
        for i in range(5):
            optimizer.zero_grad()
            net(IMAGES[8 * i : 8 * i + 8]).square().mean().backward()
            optimizer.step()

    net = small_net()
    start = copy.deepcopy(net.state_dict())
    used = make(net)
    steps(net, used)
    net.load_state_dict(start)
    reset_optimizer(used)
    steps(net, used)
    fresh = small_net()
    steps(fresh, make(fresh))
    assert same(net.state_dict(), fresh.state_dict())
