"""The authors' code and this project, side by side, rung by rung: from one state to one state.

    git clone https://github.com/hc-fang/ssd DIR && git -C DIR checkout ffb85ba
    python extras/parity.py DIR          # a minute on a CPU

Their network, losses, client, average and kNN are imported from DIR and run as they are, on the
same weights and views as ours, in float64, at width 8. What their files import and a round does not
need (wandb, sklearn ...) is stood in for. A rung is a line: what, the largest difference, the
largest that is allowed. Exit status 1 if one is above.
"""

import copy
import importlib
import sys
import types
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]

from variants import authors_dsr, make_objective, random_axes  # noqa: E402

from data import draw_patterns, two_views  # noqa: E402
from eval import knn_accuracy  # noqa: E402
from federated import average_states, federated_round  # noqa: E402
from losses import align_loss, distill_loss, scaling_vectors, uniform_loss  # noqa: E402
from model import SSDNet  # noqa: E402

WIDTH, DIM, BATCH, SCALE, CPU = 8, 64, 32, 10.0, torch.device("cpu")
SPLIT = [range(0, 96), range(96, 160)]  # 3 and 2 batches: they weight by batches, we by images
TEMPERATURE = 0.5  # of their distillation
# In float64 both round, each in its own order: values of about 1 differ by some 1e-16. Six steps
# of training magnify that: first weights that differ by 1e-16 end 3e-10 apart.
ONCE, TRAINED = 1e-14, 1e-9


def import_authors(folder):
    """Their losses, ResNet, client, average and kNN, as attributes of one object."""
    for name in "geoopt wandb tqdm tensorloader sklearn sklearn.metrics".split():
        sys.modules[name] = types.ModuleType(name)
    sys.modules["tqdm"].tqdm = iter
    sys.modules["tensorloader"].TensorLoader = lambda z, batch_size: z.split(batch_size)
    sys.modules["sklearn.metrics"].accuracy_score = lambda y, p: (y == p).double().mean()
    torch.cuda.amp.GradScaler = lambda: torch.amp.GradScaler("cpu", enabled=False)
    sys.path.insert(0, folder)
    load = importlib.import_module
    return types.SimpleNamespace(
        average=load("fedbox.utils.functional").model_average,
        loss=load("methods.loss"),
        Client=load("methods.fedalignuniform.client").FedAlignUniformClient,
        resnet=load("models.resnet"),
        knn=load("utils.evaluate").knn_evaluate,
    )


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
    theirs = torch.nn.ModuleDict({"encoder": encoder, "projector": projector}).double().train()
    theirs.load_state_dict({n.replace("downsample", "shortcut"): v for n, v in state.items()})
    return theirs


def value_and_gradient(loss, *inputs):
    """Of a loss on unit rows, as a function of the rows before they are normalised."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    value = loss(*(F.normalize(x, dim=1) for x in inputs))
    return [value.detach(), *torch.autograd.grad(value, inputs)]


def train_both(authors, method, split, epochs):
    """A round of ours and one of theirs, from one state -> their weights, two lists."""
    torch.manual_seed(0)
    net, images = SSDNet(WIDTH).double(), draw_patterns(160, 10).train_x
    sent, returned = their_network(authors, net.state_dict()), []
    views = [[] for _ in split]
    d = scaling_vectors(len(SPLIT), DIM, SCALE).double()
    gamma, delta = (1.0, 0.1) if method == "ssd-authors" else (0.0, 0.0)
    objective = make_objective(method, DIM, CPU)

    def loss(model, batch, k, generator, global_state):
        x1, x2 = (view.double() for view in two_views(images[batch], generator))
        views[k].append((x1, x2))
        return objective(*model(x1), *model(x2), d[k], 1.0, gamma, delta, hard=False)

    sgd = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    options = {"local_epochs": epochs, "batch_size": BATCH}
    federated_round(net, sgd, torch.arange(160), split, loss, 0, **options)

    for k in range(len(split)):
        axes = random_axes(DIM).double() * d[k].sqrt()
        client = authors.Client(
            id=k, **copy.deepcopy(sent), aug_train_loader=views[k], train_set=None,
            local_epochs=1, lr=0.1, momentum=0.9, weight_decay=1e-4, temperature=0.07,
            uniform_coeff=1.0, subspace_coeff=gamma, subspace_norm=True, subspace_detach=True,
            distill_coeff=delta, distill_method="KL", device=CPU, use_autocast=False,
        )  # fmt: skip
        returned.append(client.fit(sent["encoder"], sent["projector"], subspace=axes))
    states = [torch.nn.ModuleDict({p: x[p] for p in sent}).state_dict() for x in returned]
    mean = authors.average(states, [len(steps) for steps in views])
    ours = [value for value in net.state_dict().values() if value.is_floating_point()]
    return ours, [value for name, value in mean.items() if "num_batches" not in name]


def rungs(authors):
    """(what, our tensors, their tensors, allowed difference), one rung after the other."""
    torch.manual_seed(0)
    net, x = SSDNet(WIDTH).double(), torch.rand(BATCH, 3, 32, 32).double()
    theirs = their_network(authors, net.state_dict())
    h = theirs["encoder"](x)
    yield "network, training mode: h and u", net(x), (h, theirs["projector"](h)), ONCE

    h, u, u2 = torch.randn(3, BATCH, DIM).double()
    axes, d_k = random_axes(DIM).double(), scaling_vectors(2, DIM, SCALE)[1].double()
    scaled, loss = axes * d_k.sqrt(), authors.loss
    for name, ours, theirs, inputs in (
        ("alignment", align_loss, loss.align_loss, (u, u2)),
        ("uniformity", uniform_loss, loss.uniform_loss, (u,)),
        ("DSR", lambda z: authors_dsr(z, d_k, axes), lambda z: loss.subspace_loss(z, scaled), (u,)),
        ("distillation", lambda h, u: distill_loss(u, h, TEMPERATURE),
         loss.distillation_loss, (h, u)),
    ):  # fmt: skip
        both = [value_and_gradient(of, *inputs) for of in (ours, theirs)]
        yield f"{name}: value and gradient", *both, ONCE

    states, weights = [SSDNet(2).double().state_dict() for _ in range(3)], [3, 1, 2]
    both = average_states(states, weights), authors.average(states, weights)
    names = [name for name, value in both[0].items() if value.is_floating_point()]
    yield "average of three", *([state[name] for name in names] for state in both), ONCE

    for method in ("fedalignuniform", "ssd-authors"):
        yield f"{method}: one step", *train_both(authors, method, [range(BATCH)], 1), ONCE
        yield f"{method}: a round, two clients", *train_both(authors, method, SPLIT, 2), TRAINED

    bank, queries = F.normalize(torch.randn(3000, 16)), F.normalize(torch.randn(2000, 16))
    task = bank, torch.arange(3000) % 10, queries, torch.arange(2000) % 10
    ours, theirs = knn_accuracy(*task) / 100, authors.knn(*task, CPU)
    yield "kNN", [torch.tensor(ours)], [torch.tensor(theirs)], ONCE


def main(argv=None):
    """Print the ladder; exit status 1 if a rung is above what is allowed, 2 without their code."""
    warnings.simplefilter("ignore")  # theirs, of what torch has renamed since
    arguments = sys.argv[1:] if argv is None else argv
    try:
        (folder,) = arguments
        authors = import_authors(folder)
    except (ValueError, ImportError) as error:
        print(f"needs a clone of github.com/hc-fang/ssd, not {arguments}: {error}", file=sys.stderr)
        sys.exit(2)
    failed = False
    for what, ours, theirs, allowed in rungs(authors):
        differences = [(a - b).abs().max().double() for a, b in zip(ours, theirs, strict=True)]
        largest = torch.stack(differences).max().item()
        failed = failed or not largest <= allowed  # also where it is not a number
        print(f"{what:38s} {largest:8.1e}  (at most {allowed:.0e})", flush=True)
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
