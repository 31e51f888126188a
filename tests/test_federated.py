"""federated.py: FedAvg on known answers; the order of the clients does not matter."""

import copy
import inspect

import numpy as np
import pytest
import torch
from conftest import same
from torch import nn

from federated import (
    average_states,
    choose_clients,
    federated_round,
    keyed_generator,
    mean_terms,
    train_client,
)


def small_net(seed=0):
    torch.manual_seed(seed)
    body = nn.Flatten(), nn.Linear(12, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4)
    return nn.Sequential(*body)


def noisy_loss(model, batch, k, generator, global_state):
    """Depends on the client, on its random numbers and on the batch."""
    noise = torch.randn(batch.shape, generator=generator)
    value = (model(batch + 0.1 * noise) - k).square().mean()
    return value, {"k": torch.tensor(float(k))}


IMAGES = torch.randn(60, 3, 2, 2, generator=torch.Generator().manual_seed(0))
SPLIT = [range(0, 10), range(10, 35), range(35, 60)]


def sgd(net):
    return torch.optim.SGD(net.parameters(), 0.05, 0.9, weight_decay=1e-4)


def run(net, rounds=2, split=SPLIT, loss=noisy_loss, start=0, **options):
    options = {"local_epochs": 2, "batch_size": 8, **options}
    optimizer, reports = sgd(net), []
    for r in range(start, rounds):
        reports.append(federated_round(net, optimizer, IMAGES, split, loss, r, **options))
    return reports


def train_alone(net, k, split=SPLIT, make=sgd):
    """Client k's part of round 0, with an optimiser of its own -> its state dict."""
    own, rng = copy.deepcopy(net), keyed_generator(0, "client", 0, k)
    train_client(own, make(own), IMAGES, split[k], noisy_loss, k, rng, 2, 8)
    return own.state_dict()


# ------------------------------------------------------------------ averaging


def test_average_by_hand():
    states = [
        {"w": torch.tensor([0.0, 2.0]), "n": torch.tensor(10)},
        {"w": torch.tensor([4.0, 6.0]), "n": torch.tensor(20)},
    ]
    states[0]["w"].requires_grad_()
    for weights in ([3, 1], [0.3, 0.1], np.array([210, 70], dtype=np.uint8)):
        average = average_states(states, weights)
        assert not average["w"].requires_grad
        assert average["w"].tolist() == pytest.approx([1.0, 3.0])
        assert average["n"].dtype == torch.int64 and average["n"].item() == 12  # 12.5 to even


def test_average_of_equal_models_is_that_model_and_of_one_is_that_one():
    state = small_net().state_dict()
    assert same(average_states([state] * 7, [3, 5, 1, 100, 7, 11, 13]), state)
    alone = average_states([state], [17])
    assert same(alone, state)
    assert [v.dtype for v in alone.values()] == [v.dtype for v in state.values()]


def test_averaging_goes_by_name_and_states_that_do_not_fit_are_named():
    state = small_net().state_dict()
    turned = dict(reversed(state.items()))  # as a safetensors file may have them
    assert same(average_states([state, turned], [1, 1]), state)
    for other, words in (
        (nn.Linear(4, 2).state_dict(), "weight"),
        ({**nn.Linear(2, 4).state_dict(), "extra": torch.ones(1)}, "extra"),
        ({"weight": torch.ones(4, 2)}, "bias"),
    ):
        with pytest.raises(ValueError, match=words):
            average_states([nn.Linear(2, 4).state_dict(), other], [1, 1])


def test_what_is_meant_not_to_be_finite_is_averaged():
    mask = {"mask": torch.tensor([0.0, -torch.inf])}
    assert average_states([mask, mask], [1, 2])["mask"].tolist() == [0, -torch.inf]
    assert average_states([mask, mask], [0, 2])["mask"].tolist() == [0, -torch.inf]


@pytest.mark.parametrize(
    "count, weights",
    [(1, []), (2, [1]), (1, [1, 1]), (2, [0, 0]), (2, [2, -1]), (1, [torch.nan]), (1, [torch.inf])],
)
def test_weights_that_do_not_fit_are_a_value_error(count, weights):
    with pytest.raises(ValueError):
        average_states([{"w": torch.ones(2)}] * count, weights)
    with pytest.raises(ValueError):
        mean_terms([{"loss": 1.0}], [1, 1])


# ------------------------------------------------------------------ a round


@pytest.mark.parametrize(
    "name, options",
    [
        ("SGD", {"momentum": 0.9, "weight_decay": 1e-4}),
        ("Adam", {}),
        ("Adagrad", {}),
    ],
)
def test_a_round_equals_separate_models_with_their_own_optimisers_averaged(name, options):
    def make(net):
        return getattr(torch.optim, name)(net.parameters(), lr=0.01, **options)

    net = small_net()
    states = [train_alone(net, k, make=make) for k in range(3)]
    used = make(net)
    federated_round(net, used, IMAGES, SPLIT, noisy_loss, 0, local_epochs=2, batch_size=8)
    assert same(net.state_dict(), average_states(states, [10, 25, 25]))


def test_the_order_of_clients_does_not_matter_and_defaults_can_be_passed_as_they_are():
    net, again, turned = small_net(), small_net(), small_net()
    run(net.eval())  # training turns it into training mode
    run(again, choose=choose_clients, average=average_states)
    assert same(net.state_dict(), again.state_dict())
    run(turned, choose=lambda *_: [2, 1, 0])
    for one, other in zip(net.state_dict().values(), turned.state_dict().values()):
        assert torch.allclose(one, other, atol=1e-6)  # up to the order of the sum


def test_every_round_and_seed_draws_its_own_clients_and_numbers():
    split, seen = [range(5 * k, 5 * k + 5) for k in range(10)], []

    def note(model, batch, k, generator, global_state):
        seen.append((k, generator.initial_seed()))
        return model(batch).square().mean(), {}

    for seed in (0, 1):
        options = {"participation": 0.3, "local_epochs": 1, "seed": seed}
        reports = run(small_net(), 3, split, note, **options)
        assert [len(report["clients"]) for report in reports] == [3] * 3
    expected = []
    for seed in (0, 1):
        for r in range(3):
            for k in choose_clients(10, 0.3, keyed_generator(seed, "clients", r)):
                expected.append((k, keyed_generator(seed, "client", r, k).initial_seed()))
    assert seen == expected and len({numbers for _, numbers in seen}) == 18


def test_the_defaults_are_the_papers():
    parameters = inspect.signature(federated_round).parameters
    for name, value in (("participation", 1), ("local_epochs", 5), ("batch_size", 128)):
        assert parameters[name].default == value


def test_a_round_of_known_steps_ends_at_the_weighted_mean():
    """A step of lr 0.5 on (w - x)^2 / 2 halves the distance to the client's mean; two steps."""

    def distance(model, batch, *_):
        return (model[0] - batch).square().mean() / 2, {}

    net, numbers = nn.ParameterList([torch.zeros(())]), torch.tensor([1.0, 1.0, 1.0, 9.0])
    optimizer, split = torch.optim.SGD(net.parameters(), lr=0.5), [range(3), range(3, 4)]
    federated_round(net, optimizer, numbers, split, distance, 0, local_epochs=2)
    assert net[0].item() == pytest.approx((3 * 0.75 * 1 + 0.75 * 9) / 4)


def test_terms_are_means_over_all_steps():
    net, seen = small_net(), []

    def loss(model, batch, *_):
        value = model(batch).square().mean()
        seen.append(value.item())
        return value, {"twice": 2 * value.detach()}

    terms = train_client(net, sgd(net), IMAGES, range(60), loss, 0, keyed_generator(0), 2, 8)
    mean = sum(seen) / 14  # two epochs of seven full batches
    assert terms == {"loss": pytest.approx(mean), "twice": pytest.approx(2 * mean)}


def test_a_term_of_some_steps_is_their_mean():
    steps = []

    def loss(model, batch, *_):
        steps.append(len(steps))
        terms = {}
        if len(steps) > 5:
            terms["late"] = torch.tensor(float(len(steps)))
        return model(batch).square().mean(), terms

    net = small_net()
    terms = train_client(net, sgd(net), IMAGES, range(60), loss, 0, keyed_generator(0), 1, 8)
    assert terms["late"] == 6.5  # steps 6 and 7


def test_reports_are_averaged_by_samples():
    report = run(small_net(), rounds=1)[0]
    assert report["clients"] == [0, 1, 2]
    assert report["terms"]["k"] == pytest.approx((10 * 0 + 25 * 1 + 25 * 2) / 60)


def test_another_rule_of_averaging_needs_no_edit():
    def last_one_wins(states, weights, global_state, r, clients):
        assert same(global_state, small_net().state_dict())
        assert [state.keys() for state in states] == 3 * [global_state.keys()]  # nothing else
        assert weights == [10, 25, 25] and r == 0 and clients == [0, 1, 2]
        return states[-1]

    net = small_net()
    expected = train_alone(net, 2)
    run(net, rounds=1, average=last_one_wins)
    assert same(net.state_dict(), expected)


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
    assert len(seen[0][1].flatten(1).unique(dim=0)) == 10  # no sample twice


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
    net = small_net()
    states = [train_alone(net, k) for k in (0, 2)]
    with pytest.warns(UserWarning, match="round 1 leaves out client 1: its loss is not finite"):
        (report,) = run(net, 1, loss=diverging(1, what=what))
    assert report["clients"] == [0, 1, 2] and report["left_out"] == [1]
    assert report["terms"]["k"] == pytest.approx(25 * 2 / 35)
    assert same(net.state_dict(), average_states(states, [10, 25]))


def test_a_term_or_an_entry_that_is_not_finite_leaves_its_client_out():
    def bad_term(model, batch, k, generator, global_state):
        return model(batch).square().mean(), {"odd": torch.tensor(float("inf") if k else 1.0)}

    def bad_entry(model, batch, k, generator, global_state):
        if k == 2:
            model[2].running_var.fill_(float("nan"))
        return model[1](batch.flatten(1)).square().mean(), {}

    with pytest.warns(UserWarning, match="client 2: its odd is not finite"):
        assert run(small_net(), 1, loss=bad_term)[0]["left_out"] == [1, 2]
    with pytest.warns(UserWarning, match="client 2: its 2.running_var is not finite"):
        assert run(small_net(), 1, loss=bad_entry)[0]["left_out"] == [2]


def test_a_round_without_a_finite_client_is_an_error_and_keeps_the_weights():
    net = small_net()
    with pytest.warns(UserWarning), pytest.raises(FloatingPointError, match="every client"):
        run(net, 1, loss=diverging(0, 1, 2))
    assert same(net.state_dict(), small_net().state_dict())


def test_a_mask_of_infinities_is_no_divergence():
    net = small_net()
    net.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
    assert run(net, 1)[0]["left_out"] == []
    assert net.mask.tolist() == [0, -torch.inf]


# ------------------------------------------------------------------ choice of clients and optimiser


def test_choice_is_distinct_sorted_reproducible_and_fair():
    counts = torch.zeros(50)
    for round_number in range(2000):
        chosen = choose_clients(50, 0.2, keyed_generator(0, "clients", round_number))
        assert len(set(chosen)) == 10 and chosen == sorted(chosen)
        counts[chosen] += 1
    assert counts.min() > 330 and counts.max() < 470  # 400 expected, standard deviation 18
    for count, participation, expected in ((10, 0.01, 1), (3, 1.0, 3), (10, 0.26, 3)):
        assert len(choose_clients(count, participation, keyed_generator(0))) == expected


# ------------------------------------------------------------------ rules of one's own


def test_the_choice_knows_its_round_and_may_be_a_tensor():
    reports = run(small_net(), 3, choose=lambda n, share, rng, r: torch.tensor([r, 2 - r // 2]))
    assert [report["clients"] for report in reports] == [[0, 2], [1, 2], [2, 1]]
    assert all(type(k) is int for report in reports for k in report["clients"])


@pytest.mark.parametrize(
    "changed, words",
    [
        ({"split": [range(10), torch.arange(60) < 30]}, "client 1 needs a list"),
        ({"split": [range(10), torch.arange(9).byte()]}, "client 1 needs a list"),
        ({"split": [range(10), []]}, "client 1 needs a list"),
        ({"local_epochs": 0}, "at least 1, got 0, 8"),
        ({"batch_size": 0}, "at least 1, got 2, 0"),
        ({"participation": 0}, "participation"),
        ({"participation": 1.1}, "participation"),
        ({"participation": float("nan")}, "participation"),
        ({"choose": lambda *_: [0, 0]}, "choose gave"),
        ({"choose": lambda *_: [0, -2]}, "choose gave"),
        ({"choose": lambda *_: [3]}, "choose gave"),
        ({"loss": lambda model, batch, *_: (model(batch).sum(), {"loss": 1.0})}, '"loss"'),
    ],
)
def test_what_cannot_be_trained_is_a_value_error(changed, words):
    with pytest.raises(ValueError, match=words):
        run(small_net(), 1, **changed)


def test_dropout_draws_from_the_round_and_the_client_and_gives_torchs_generator_back():
    def net():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(12, 4))

    one, other = net(), net()
    torch.manual_seed(1)
    run(one, batch_size=1, split=[[7], range(10, 20)])
    following = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(following, torch.rand(1))
    torch.manual_seed(2)
    run(other, batch_size=1, split=[[7], range(10, 20)])
    assert same(one.state_dict(), other.state_dict())


def test_a_term_that_some_clients_report_is_their_mean():
    def loss(model, batch, k, generator, global_state):
        terms = {"k": torch.tensor(float(k))} if k else {}
        return model(batch).square().mean(), terms

    assert run(small_net(), 1, loss=loss)[0]["terms"]["k"] == pytest.approx(1.5)


def test_a_client_may_start_from_weights_of_its_own():
    """As FedBN (Li et al. 2021), where BatchNorm's entries stay with the client."""

    def bring_back(model, k):
        assert same(model.state_dict(), small_net().state_dict())  # the global weights
        model[2].weight.data.fill_(k + 2)

    def loss(model, batch, k, *_):
        assert (model[2].weight == k + 2).all()
        return 0 * model(batch).sum(), {}

    run(small_net(), 1, loss=loss, on_client_start=bring_back, local_epochs=1, batch_size=60)
