"""Geometry of the clients' own images, under hard separation each in its client's dimensions.

    python extras/own_embeddings.py runs/ablation/*/last.pt      # ten seconds a run, CPU

eval.py embeds test images, which are no client's, by z = u / ||u||. In training, hard separation
(hsd) has another z for client k: only its own dimensions of u count. Here the trained network
embeds all clients' training images, two views each, and hsd's z are separated as in training; other
methods' are u / ||u||, to compare.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))

from data import load_dataset, two_views  # noqa: E402
from eval import OneLineParser, alignment, encode, load_checkpoint, mean_parts  # noqa: E402
from losses import hard_separation, scaling_vectors  # noqa: E402


def own_embeddings(checkpoint, model, images):
    """Two views' z (N, D), and each row's client (N,), of all the run's training images."""
    config, split = checkpoint["config"], checkpoint["split"]
    d = scaling_vectors(len(split), 8 * config["width"], config["scale"], config["seed"])
    generator, views = torch.Generator().manual_seed(0), ([], [])
    for part, d_k in zip(split, d):
        for z, x in zip(views, two_views(images[part], generator)):
            _, u = encode(model, x)
            hard = config["method"] == "hsd"
            z.append(hard_separation(u, d_k) if hard else F.normalize(u, dim=1))
    z1, z2 = map(torch.cat, views)
    return z1, z2, torch.arange(len(split)).repeat_interleave(torch.tensor(list(map(len, split))))


def main(argv=None):
    """Checkpoints -> a line each."""
    parser = OneLineParser("extras/own_embeddings.py", description=__doc__.splitlines()[0])
    parser.add_argument("checkpoints", nargs="+", help="of train.py")
    parser.add_argument("--data-dir", default="data", help="(%(default)s)")
    args = parser.parse_args(argv)
    print("-L_uniform z   intra-client   inter-client   alignment z")
    for path in args.checkpoints:
        try:
            checkpoint, model = load_checkpoint(path)
            images = load_dataset(checkpoint["config"]["dataset"], args.data_dir).train_x
        except (ValueError, OSError) as error:
            parser.error(str(error))
        z1, z2, client = own_embeddings(checkpoint, model, images)
        values = [-value for value in mean_parts(z1, client)]
        print(
            "".join(f"{v:12.3f}   " for v in (*values, alignment(z1, z2))) + str(path), flush=True
        )


if __name__ == "__main__":
    main()
