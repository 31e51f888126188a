"""Images in memory, a non-IID split over clients, and two random views of every image.

Labels split and evaluate; training never sees them. Views: of whole batches, on their own device.
Needs torch, torchvision, numpy; copies into another project as it is. There:

    >>> images = torch.randint(256, (100, 3, 32, 32), dtype=torch.uint8)   # yours
    >>> x1, x2 = two_views(images[:8], torch.Generator().manual_seed(0))
    >>> split = dirichlet_split(np.arange(100) % 5, num_clients=4, alpha=1.0)
    >>> tuple(x1.shape), sum(map(len, split))
    ((8, 3, 32, 32), 100)

    python data.py          # the client x class table of a Dirichlet split (a few seconds, CPU)
"""

import contextlib
import io
import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
import torchvision.transforms.v2.functional as TF
from PIL import Image

TINYIMAGENET_URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
TINYIMAGENET_MD5 = "90528d7ca1a48142e341f4ef8d21d0de"
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)  # the four jitters


class Images(NamedTuple):
    """A data set in memory: images uint8 (N, 3, 32, 32), labels int64 (N,) in [0, len(classes))."""

    train_x: torch.Tensor
    train_y: torch.Tensor
    test_x: torch.Tensor
    test_y: torch.Tensor
    classes: list


def load_dataset(name, root="data"):
    """A data set as `Images` (train_x, train_y, test_x, test_y, classes).

    name: "cifar10", "cifar100", "tinyimagenet" (under `root`, downloaded on first use), "patterns"
    (drawn), or a folder with train/<class>/* and test/<class>/* or val/<class>/*, images of any
    size. FileNotFoundError for what is not there, ValueError for a folder of another layout.
    """
    if name == "patterns":
        return draw_patterns()
    places = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}
    places["tinyimagenet"] = "tiny-imagenet-200"
    if name not in places:
        if Path(name).is_dir():
            return _load_folder(Path(name))
        known = ", ".join(["patterns", *places])
        raise FileNotFoundError(f"data set {name!r} is neither a folder nor one of {known}")
    root, created = Path(root), not Path(root).exists()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return _load_tinyimagenet(root) if name == "tinyimagenet" else _load_cifar(name, root)
    except (OSError, RuntimeError) as error:
        if created and root.exists() and not any(root.iterdir()):
            root.rmdir()
        place = f"{name} is not in {root / places[name]} and could not be downloaded ({error})"
        hint = "put it there, or use --dataset patterns, which needs no download"
        raise FileNotFoundError(f"{place}; {hint}") from error


def _load_cifar(name, root):
    dataset = getattr(torchvision.datasets, name.upper())
    parts = [dataset(root, train=train, download=True) for train in (True, False)]
    train_x, test_x = (torch.from_numpy(p.data).permute(0, 3, 1, 2).contiguous() for p in parts)
    train_y, test_y = (torch.tensor(p.targets) for p in parts)
    return Images(train_x, train_y, test_x, test_y, parts[0].classes)


def _load_tinyimagenet(root):
    folder, fetch = root / "tiny-imagenet-200", torchvision.datasets.utils
    if not (folder / "val" / "val_annotations.txt").is_file():
        fetch.download_and_extract_archive(TINYIMAGENET_URL, root, md5=TINYIMAGENET_MD5)
    train = torchvision.datasets.ImageFolder(folder / "train")
    # The official val/ is one flat folder; the class of each file stands in a table beside it.
    lines = (folder / "val" / "val_annotations.txt").read_text().splitlines()
    pairs = [line.split("\t")[:2] for line in lines]
    test = [(folder / "val" / "images" / name, train.class_to_idx[wnid]) for name, wnid in pairs]
    return _decode(train.samples, test, train.classes)


def _load_folder(root):
    test_dir = next((root / part for part in ("test", "val") if (root / part).is_dir()), None)
    if not (root / "train").is_dir() or test_dir is None:
        raise ValueError(f"{root} needs the folders train/<class>/ and test/<class>/ (or val/)")
    try:
        train, test = map(torchvision.datasets.ImageFolder, (root / "train", test_dir))
    except FileNotFoundError as error:  # no class folder, or one without images
        raise ValueError(f"{root}: {error}") from error
    if odd := sorted(set(train.classes) ^ set(test.classes)):
        raise ValueError(f"{root}: train/ and {test_dir.name}/ differ in their classes: {odd[:5]}")
    if len(test.samples) < 2:
        raise ValueError(f"{root}: {test_dir.name}/ needs at least two images, it has one")
    return _decode(train.samples, test.samples, train.classes)


def _decode(train, test, classes):
    parts = []
    for samples in (train, test):  # pairs of a path and a class
        parts += [read_images(path for path, _ in samples), torch.tensor([y for _, y in samples])]
    return Images(*parts, classes)


def read_images(paths):
    """Files -> uint8 (N, 3, 32, 32): short side resized, centre cropped; else ValueError."""
    images = []
    for path in paths:
        try:
            with Image.open(path) as image:
                if image.mode[0] in "IF":  # more bits: RGB would cut off at 255
                    raise ValueError(image.mode)
                image = TF.center_crop(TF.resize(image.convert("RGB"), 32), 32)
            images.append(TF.pil_to_tensor(image))
        except Exception as error:
            raise ValueError(f"{path} does not decode as an image of 8 bits: remove it") from error
    return torch.stack(images)


def draw_patterns(num_train=5000, num_test=1000, seed=0):
    """Ten classes of drawn patterns as `Images`: 32x32 RGB, no file, no network, classes balanced.

    Colours, place, size and a small turn do not depend on the class: only the pattern tells it.
    """
    names = "stripes waves checks dots rings grid triangles bricks blobs grain".split()
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(num_train + num_test) % len(names)
    x = torch.cat([_draw_batch(part, generator) for part in y.split(500)])
    return Images(x[:num_train], y[:num_train], x[num_train:], y[num_train:], names)


def _draw_batch(labels, generator):
    n, side = len(labels), 64  # drawn at twice the size

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(n, *shape, generator=generator)

    # x, y: the pixels in cells of the pattern, three to five a side, turned and moved
    axis, turn = torch.linspace(-0.5, 0.5, side), uniform(-0.3, 0.3, 1, 1)
    cos, sin = uniform(3, 5, 1, 1) * torch.stack([turn.cos(), turn.sin()])
    x = axis * cos + axis[:, None] * sin + uniform(0, 1, 1, 1)
    y = axis[:, None] * cos - axis * sin + uniform(0, 1, 1, 1)
    u, v = x.remainder(1) - 0.5, y.remainder(1) - 0.5  # from the middle of a cell
    brick = (x + y.floor() / 2).remainder(1) - 0.5  # every other row is half a cell further
    r, far, high = u.hypot(v), u.abs(), v.abs()
    noise = [torch.randn(n, 1, cells, cells, generator=generator) for cells in (8, 32)]
    blobs, grain = (F.interpolate(cells, side, mode="bilinear")[:, 0] for cells in noise)
    patterns = [  # in the order of the classes
        far < 0.25,
        (x + 0.18 * (2 * math.pi * y).sin()).remainder(1) < 0.5,
        (u > 0) ^ (v > 0),
        r < 0.33,
        (r > 0.22) & (r < 0.42),
        torch.minimum(far, high) < 0.12,
        (v > -0.35) & (v + 2 * far < 0.35),
        (brick.abs() < 0.42) & (high < 0.36),
        blobs > 0,
        grain > 0,
    ]
    inside = torch.stack(patterns)[labels, torch.arange(n)]
    colour = uniform(0, 1, 3, 1, 1)
    ground = (colour + uniform(0.3, 0.7, 3, 1, 1)).remainder(1)  # no channel near the colour's
    image = torch.where(inside[:, None], colour, ground)
    return (F.avg_pool2d(image, 2) * 255).round().to(torch.uint8)


def dirichlet_split(labels, num_clients, alpha, seed=0, min_size=10, max_redraws=1000):
    """Partition indices over clients: class c goes to the clients by proportions p_c ~ Dir(alpha).

    labels (N,) or (N, 1), one a sample; alpha > 0, small = skewed (paper: 0.1), large = even.
    Returns num_clients sorted int64 arrays, together every index once. Cuts are rounded down: the
    last client gets the remainders. The draw is repeated until every client has at least min_size
    samples; ValueError after max_redraws of them.
    """
    labels = np.asarray(labels)
    labels = labels[:, 0] if labels.shape[1:] == (1,) else labels
    if labels.ndim != 1 or (labels != labels).any():  # NaN differs from itself
        raise ValueError(f"labels must be (N,), one class a sample, none NaN, got {labels.shape}")
    if num_clients < 1 or not 0 < alpha < math.inf or min_size < 1:
        got = f"got {num_clients}, {alpha}, {min_size}"
        raise ValueError(f"needs num_clients >= 1, finite alpha > 0, min_size >= 1, {got}")
    if num_clients * min_size > len(labels):
        need = f"{num_clients} clients of {min_size} samples need more than {len(labels)}"
        raise ValueError(f"{need}: take fewer clients or more images")
    rng = np.random.default_rng(seed)
    by_class, best = [np.flatnonzero(labels == c) for c in np.unique(labels)], 0
    for _ in range(max_redraws):
        shares = rng.dirichlet(np.full(num_clients, alpha), len(by_class)).cumsum(1)[:, :-1]
        cuts = [(share * len(index)).astype(int) for share, index in zip(shares, by_class)]
        sizes = sum(np.diff(cut, prepend=0, append=len(c)) for cut, c in zip(cuts, by_class))
        best = max(best, sizes.min())
        if sizes.min() >= min_size:
            parts = [np.split(rng.permutation(index), cut) for cut, index in zip(cuts, by_class)]
            return [np.sort(np.concatenate(part)).astype(np.int64) for part in zip(*parts)]
    got = f"alpha {alpha} gave the smallest of {num_clients} clients at most {best} samples"
    raise ValueError(f"{got} in {max_redraws} draws, not {min_size}: raise alpha or lower K")


def read_split(path):
    """A split file, JSON -> index arrays: an object client -> indices (split.json), or a list."""
    try:
        parts = json.loads(Path(path).read_text())
        parts = [parts[str(k)] for k in range(len(parts))] if isinstance(parts, dict) else parts
        if not all(type(index) is int for part in parts for index in part):
            raise TypeError
        return [np.array(part, dtype=np.int64) for part in parts]
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"split file {path} must be JSON, a list of lists of indices") from error


def check_split(split, pool, num_clients, source):
    """The split, each client's part sorted; ValueError unless it is a partition of `pool` (N,)."""
    split = [np.sort(np.asarray(part)) for part in split]
    if not split or min(map(len, split)) < 2:
        raise ValueError(f"{source}: every client needs at least 2 images")
    index, count = np.unique(np.concatenate(split), return_counts=True)
    if len(odd := np.append(index[count > 1], np.setxor1d(index, pool))):
        raise ValueError(f"{source} must hold every training image once: see image {odd[0]}")
    if num_clients not in (None, len(split)):
        raise ValueError(f"--clients {num_clients}: {source} has {len(split)}")
    return split


def two_views(images, generator):
    """Two random views of each image: uint8 (B, 3, H, W) -> two float32 (B, 3, H, W) in [0, 1].

    The paper's: RandomResizedCrop of scale (0.08, 1), horizontal flip 0.5, ColorJitter(0.8, 0.8,
    0.8, 0.2) with probability 0.8, grayscale 0.2; no normalisation. Every sample has its own
    parameters, from `generator` (on the CPU: every device sees the same views). ValueError for
    images that are not uint8; gray ones: images.expand(-1, 3, -1, -1). Faster than torchvision
    image by image below about 96 pixels a side.
    """
    return make_views(images, draw_views(images, generator))


def draw_views(images, generator):
    """The random half of `two_views`: `draw_params` side by side, float32 (2B, 16), one copy."""
    params = draw_params(2 * len(images), *images.shape[2:], generator)
    drawn = torch.cat([value.float().view(len(value), -1) for value in params.values()], 1)
    drawn = drawn.pin_memory() if images.device.type == "cuda" else drawn
    return drawn.to(images.device, non_blocking=True)


def make_views(images, drawn):
    """The other half, one graph: uint8 (B, 3, H, W), `draw_views`' (2B, 16) -> two (B, 3, H, W)."""
    names = ("box", "flip", "kind", "before", "after", "hue", "gray")
    params = dict(zip(names, drawn.split((4, 1, 3, 3, 3, 1, 1), 1)))
    return augment(images.repeat(2, 1, 1, 1), params).chunk(2)


def draw_params(n, height, width, generator, scale=(0.08, 1.0)):
    """Random parameters of n views, one entry per view: a dict of CPU tensors for `augment`.

    Draws as torchvision does: a crop has area ~ U(scale) x the image's, aspect ratio log-uniform
    in [3/4, 4/3], ten tries and then the largest centred box within these ratios; jitter factors
    ~ U(0.2, 1.8), hue shift ~ U(-0.2, 0.2) of the circle; the order of the four jitters is random.
    """

    def rand(*shape):
        return torch.rand(n, *shape, generator=generator)

    area = height * width * (scale[0] + (scale[1] - scale[0]) * rand(10))
    ratio = torch.exp((2 * rand(10) - 1) * math.log(4 / 3))
    w, h = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
    fits = (0 < w) & (w <= width) & (0 < h) & (h <= height)
    first = fits.float().argmax(1, keepdim=True)
    h, w = h.gather(1, first)[:, 0], w.gather(1, first)[:, 0]
    top, left = (rand() * (height - h + 1)).floor(), (rand() * (width - w + 1)).floor()
    box = torch.stack([top, left, h, w], 1)
    tall, wide = min(height, round(width * 4 / 3)), min(width, round(height * 4 / 3))
    box[~fits.any(1)] = box.new_tensor([(height - tall) // 2, (width - wide) // 2, tall, wide])
    jittered, flip = rand() < 0.8, rand() < 0.5
    factor = torch.where(jittered[:, None], 0.2 + 1.6 * rand(3), 1.0)
    turn = torch.where(jittered, 0.4 * rand() - 0.2, 0.0)
    order = rand(4).argsort(1)  # a permutation of BRIGHTNESS, CONTRAST, SATURATION, HUE
    kind = order[order != HUE].view(n, 3)
    is_before = torch.arange(3) < (order == HUE).int().argmax(1, keepdim=True)
    factor = factor.gather(1, kind)
    return {
        "box": box,  # (n, 4): top, left, height, width in pixels
        "flip": flip,  # (n,) bool
        "kind": kind,  # (n, 3): which blend is first, second, third
        "before": torch.where(is_before, factor, 1.0),  # (n, 3): their factors; 1 does nothing
        "after": torch.where(is_before, 1.0, factor),  # (n, 3)
        "hue": turn,  # (n,) in turns of the colour circle, between the two
        "gray": rand() < 0.2,  # (n,) bool
    }


def augment(images, params):
    """Apply parameters on the images' device: uint8 (n, 3, H, W) -> float32, same, in [0, 1].

    The same numbers as torchvision's functions image by image; ValueError for others than uint8.
    Three blends, the turn of hue, three blends, each of factor 1 where not due, make one graph.
    """
    x = crop(unit_range(images), params["box"], params["flip"])
    for place in range(3):
        x = blend(x, params["kind"][:, place], params["before"][:, place])
    x = hue(x, params["hue"])
    for place in range(3):
        x = blend(x, params["kind"][:, place], params["after"][:, place])
    return torch.where(params["gray"].view(-1, 1, 1, 1) > 0, TF.rgb_to_grayscale(x), x)


def unit_range(images):
    """uint8 (n, 3, H, W) -> float32 in [0, 1]; ValueError for others: they may be there already."""
    if images.dtype != torch.uint8 or images.shape[1:2] != (3,):
        what = f"{images.dtype} (n, {', '.join(map(str, images.shape[1:]))})"
        raise ValueError(f"images must be uint8 (n, 3, H, W), in 0 to 255, got {what}")
    return images.float() / 255


def crop(x, box, flip):
    """Each image's box (n, 4) stretched over x (n, 3, H, W), bilinear; mirrored where flip (n,)."""
    top, left, h, w = box.T[:, :, None]
    rows, columns = _resize_matrix(top, h, x.shape[2]), _resize_matrix(left, w, x.shape[3])
    columns = torch.where(flip.view(-1, 1, 1) > 0, columns.flip(1), columns)
    return torch.einsum("nij,ncjk,nlk->ncil", rows, x, columns)


def _resize_matrix(start, length, size):
    """Bilinear weights (n, size, size) that stretch pixels start .. start + length over `size`."""
    pixel = torch.arange(size, device=start.device)
    source = ((pixel + 0.5) * (length / size) - 0.5).clamp(min=0).minimum(length - 1)
    return (1 - (source[:, :, None] - (pixel - start)[:, None]).abs()).clamp_(min=0)


def blend(x, kind, factor):
    """Brightness, contrast, saturation: factor x + (1 - factor) black, mean gray, gray, by kind."""
    kind, factor, luma = kind.view(-1, 1, 1, 1), factor.view(-1, 1, 1, 1), TF.rgb_to_grayscale(x)
    other = luma * (kind == SATURATION) + luma.mean((2, 3), keepdim=True) * (kind == CONTRAST)
    return torch.lerp(other, x, factor).clamp_(0, 1)


def hue(x, turn):
    """Turn the hue of RGB x (n, 3, H, W) by turn (n,) in [-0.5, 0.5] of the circle, through HSV."""
    (r, g, b), value = x.unbind(1), x.amax(1)
    chroma = value - x.amin(1)
    c = chroma.clamp(min=1e-12)
    sixth = torch.where(value == g, (b - r) / c + 2, (r - g) / c + 4)  # the hue, in sixths
    sixth = torch.where(value == r, (g - b) / c, sixth) + 6 * turn.view(-1, 1, 1)
    channels = []
    for own in (0, 2, 4):  # a channel is full within a sixth of its own hue, empty from two on
        away = (sixth - own).abs()
        away = torch.minimum(away, (6 - away).abs())
        channels.append(value - chroma * (away - 1).clamp(0, 1))
    return torch.stack(channels, 1)


if __name__ == "__main__":
    labels = np.arange(5000) % 10
    split = dirichlet_split(labels, num_clients=10, alpha=0.1)
    table = np.stack([np.bincount(labels[part], minlength=10) for part in split])
    print("Dirichlet(0.1) split of 10 classes x 500 images over 10 clients: columns sum to 500\n")
    print("client" + "".join(f"{f'class {c}':>9}" for c in range(10)) + f"{'all':>8}")
    for name, row in [*enumerate(table), ("all", table.sum(0))]:
        print(f"{name:>6}" + "".join(f"{count or '.':>9}" for count in row) + f"{row.sum():8d}")
