"""The authors' code and this project, side by side, rung by rung: from one state to one state.

    git clone https://github.com/hc-fang/ssd DIR && git -C DIR checkout ffb85ba
    python extras/parity.py DIR          # a minute on a CPU

Their network, losses, client and average are imported from DIR and run as they are, on the same
weights and the same views as ours, in float64, at width 8. A rung is a line: what, the largest
difference, the largest that is allowed. Exit status 1 if one is above. What their files import and
a round does not need (wandb, sklearn ...) is stood in for.
"""

import argparse
import sys
import types
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]

import variants  # noqa: E402

from data import draw_patterns, two_views  # noqa: E402
from eval import knn_accuracy  # noqa: E402
from federated import average_states, copy_state, federated_round  # noqa: E402
from losses import align_loss, distill_loss, scaling_vectors, uniform_loss  # noqa: E402
from model import SSDNet  # noqa: E402

WIDTH, DIM, BATCH, SCALE, ALLOWED = 8, 64, 32, 10.0, 1e-9
SPLIT = [range(0, 96), range(96, 160)]  # 3 and 2 batches: they weight by batches, we by images
TEMPERATURE = 0.5  # of their distillation
CPU = torch.device("cpu")


def import_authors(folder):
    """Their losses, ResNet, client, average and kNN, as attributes of one object."""
    for name in "geoopt wandb tqdm tensorloader sklearn sklearn.metrics".split():
        sys.modules[name] = types.ModuleType(name)
    sys.modules["tqdm"].tqdm = iter
    sys.modules["tensorloader"].TensorLoader = lambda z, batch_size: z.split(batch_size)
    sys.modules["sklearn.metrics"].accuracy_score = lambda y, p: (y == p).double().mean()
    torch.cuda.amp.GradScaler = lambda: torch.amp.GradScaler("cpu", enabled=False)
    sys.path.insert(0, folder)
    from fedbox.utils.functional import model_average
    from methods import loss
    from methods.fedalignuniform.client import FedAlignUniformClient as Client
    from models import resnet
    from utils.evaluate import knn_evaluate

    return types.SimpleNamespace(
        model_average=model_average, loss=loss, Client=Client, resnet=resnet, knn=knn_evaluate
    )


def their_names(state, part):
    """The part of our state dict by their names."""
    own = [name for name in state if name.startswith(part)]
    return {n.removeprefix(part).replace("downsample", "shortcut"): state[n] for n in own}


def their_network(authors, state):
    """Their encoder, at our width, and projector, with the weights of our state dict."""
    encoder = authors.resnet.ResNet18()
    encoder.in_planes = WIDTH
    encoder.conv1 = torch.nn.Conv2d(3, WIDTH, 3, padding=1, bias=False)
    encoder.bn1 = torch.nn.BatchNorm2d(WIDTH)
    for i, stride in enumerate((1, 2, 2, 2)):
        layer = encoder._make_layer(authors.resnet.BasicBlock, WIDTH * 2**i, 2, stride)
        setattr(encoder, f"layer{i + 1}", layer)
    encoder.fc = torch.nn.Identity()
    projector = SSDNet(WIDTH).projector  # the same layers
    encoder.load_state_dict(their_names(state, "encoder."))
    projector.load_state_dict(their_names(state, "projector."))
    return encoder.double().train(), projector.double().train()


def value_and_gradient(loss, *inputs):
    """Of a loss on unit rows, as a function of the rows before they are normalised."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    value = loss(*(F.normalize(x, dim=1) for x in inputs))
    return [value.detach(), *torch.autograd.grad(value, inputs)]


def train_both(authors, method, split, epochs):
    """A round of ours and one of theirs, from one state -> their weights, two lists."""
    torch.manual_seed(0)
    net, images = SSDNet(WIDTH).double(), draw_patterns(160, 10).train_x
    start, tape = copy_state(net), {k: [] for k in range(len(split))}
    d = scaling_vectors(len(split), DIM, SCALE).double()
    gamma, delta = (1.0, 0.1) if method == "ssd-authors" else (0.0, 0.0)
    objective = variants.make_objective(method, DIM, CPU)

    def loss(model, batch, k, generator, global_state):
        x1, x2 = (view.double() for view in two_views(images[batch], generator))
        tape[k].append((x1, x2))
        (h1, u1), (h2, u2) = model(x1), model(x2)
        return objective(h1, u1, h2, u2, d[k], beta=1.0, gamma=gamma, delta=delta, hard=False)

    sgd = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    options = {"local_epochs": epochs, "batch_size": BATCH}
    federated_round(net, sgd, torch.arange(160), split, loss, 0, **options)

    sent, returned = their_network(authors, start), []
    for k, views in tape.items():
        axes = variants.random_axes(DIM).double()
        axes[:, d[k] != 1] *= SCALE**0.5
        encoder, projector = their_network(authors, start)
        client = authors.Client(
            id=k, encoder=encoder, projector=projector, aug_train_loader=views, train_set=None,
            local_epochs=1, lr=0.1, momentum=0.9, weight_decay=1e-4, temperature=0.07,
            uniform_coeff=1.0, subspace_coeff=gamma, subspace_norm=True, subspace_detach=True,
            distill_coeff=delta, distill_method="KL", device=CPU, use_autocast=False,
        )  # fmt: skip
        returned.append(client.fit(*sent, subspace=axes))
    ours, theirs = [], []
    for part in ("encoder", "projector"):
        mean = authors.model_average([x[part] for x in returned], list(map(len, tape.values())))
        for name, value in their_names(net.state_dict(), f"{part}.").items():
            if value.is_floating_point():
                ours.append(value)
                theirs.append(mean[name])
    return ours, theirs


def rungs(authors):
    """(what, our tensors, their tensors), one rung after the other."""
    torch.manual_seed(0)
    net, x = SSDNet(WIDTH).double(), torch.rand(BATCH, 3, 32, 32).double()
    encoder, projector = their_network(authors, net.state_dict())
    h = encoder(x)
    yield "network, training mode: h and u", net(x), (h, projector(h))

    h, u, u2 = torch.randn(3, BATCH, DIM).double()
    axes, d_k = variants.random_axes(DIM).double(), scaling_vectors(2, DIM, SCALE)[1].double()
    scaled, loss = axes * d_k.sqrt(), authors.loss
    for name, ours, theirs, inputs in (
        ("alignment", align_loss, loss.align_loss, (u, u2)),
        ("uniformity", uniform_loss, loss.uniform_loss, (u,)),
        ("DSR", lambda z: variants.authors_dsr(z, d_k, axes),
         lambda z: loss.subspace_loss(z, scaled), (u,)),
        ("distillation", lambda h, u: distill_loss(u, h, TEMPERATURE),
         loss.distillation_loss, (h, u)),
    ):  # fmt: skip
        both = [value_and_gradient(of, *inputs) for of in (ours, theirs)]
        yield f"{name}: value and gradient", *both

    states, weights = [SSDNet(2).double().state_dict() for _ in range(3)], [3, 1, 2]
    ours, theirs = average_states(states, weights), authors.model_average(states, weights)
    names = [name for name, value in ours.items() if value.is_floating_point()]
    yield "average of three", [ours[name] for name in names], [theirs[name] for name in names]

    for method in ("fedalignuniform", "ssd-authors"):
        yield f"{method}: one step", *train_both(authors, method, [range(BATCH)], 1)
        yield f"{method}: a round, two clients", *train_both(authors, method, SPLIT, 2)

    bank, queries = F.normalize(torch.randn(500, 16)), F.normalize(torch.randn(300, 16))
    task = bank, torch.arange(500) % 10, queries, torch.arange(300) % 10
    ours, theirs = knn_accuracy(*task) / 100, authors.knn(*task, CPU)
    yield "kNN", [torch.tensor(ours)], [torch.tensor(theirs)]


def main(argv=None):
    """Print the ladder; exit status 1 if a rung is above what is allowed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.usage = argparse.SUPPRESS  # so that an error is one line
    parser.add_argument("folder", help="a clone of github.com/hc-fang/ssd")
    folder = parser.parse_args(argv).folder
    warnings.simplefilter("ignore")  # theirs, of what torch has renamed since
    try:
        authors = import_authors(folder)
    except ImportError as error:
        parser.error(f"{folder} is no clone of github.com/hc-fang/ssd: {error}")
    worst = 0.0
    for what, ours, theirs in rungs(authors):
        difference = max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True))
        worst = max(worst, difference)
        print(f"{what:38s} {difference:8.1e}  (at most {ALLOWED:.0e})", flush=True)
    sys.exit(int(worst > ALLOWED))


if __name__ == "__main__":
    main()
