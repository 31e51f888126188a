"""Images in memory, a non-IID split over clients, and two random views of every image.

Labels serve to split and to evaluate, never to train. Views are made of whole batches, on the
images' device. It needs torch, torchvision and numpy, and works alone in another project:

    >>> images = torch.randint(256, (100, 3, 32, 32), dtype=torch.uint8)   # yours
    >>> x1, x2 = two_views(images[:8], torch.Generator().manual_seed(0))
    >>> split = dirichlet_split(np.arange(100) % 5, num_clients=4, alpha=1.0)
    >>> tuple(x1.shape), sum(map(len, split))
    ((8, 3, 32, 32), 100)

    python data.py          # the client x class table of a Dirichlet split (a few seconds, CPU)
"""

import hashlib
import json
import math
import os
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
import torchvision.transforms.v2.functional as TF
from torchvision.datasets.folder import default_loader

NAMES = ("cifar10", "cifar100", "patterns")  # data sets that are no folder
EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp")  # the files of an image folder
PATTERNS = "stripes waves checks dots rings grid triangles bricks blobs grain".split()
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)  # the four jitters
FIELDS = {  # of a view's random parameters: how many numbers each has
    "box": 4,  # top, left, height, width of the crop, in pixels
    "flip": 1,  # mirrored or not
    "kind": 3,  # which of the three blends is first, second, third
    "before": 3,  # their factors if they come before the turn of hue, else 1, which does nothing
    "after": 3,  # their factors if they come after it, else 1
    "hue": 1,  # the turn, of the colour circle
    "gray": 1,  # gray or not
}


class Images(NamedTuple):
    """A data set in memory: images uint8 (N, 3, S, S), labels int64 (N,) in [0, len(classes))."""

    train_x: torch.Tensor
    train_y: torch.Tensor
    test_x: torch.Tensor
    test_y: torch.Tensor
    classes: list
    files: list = ()  # of a folder: the training images' paths in it, in their order

    def fingerprint(self):
        """A short string by which a run knows its images: of classes, labels and files."""
        content = repr((list(self.classes), self.train_y.tolist(), list(self.files)))
        return hashlib.blake2b(content.encode(), digest_size=8).hexdigest()


def load_dataset(name, root="data", image_size=32):
    """A data set as `Images` (train_x, train_y, test_x, test_y, classes, files).

    name: "cifar10", "cifar100" (under `root`, downloaded on first use), "patterns" (drawn), or a
    folder with train/<class>/* and test/<class>/* or val/<class>/*, whose images, of any size,
    become image_size x image_size. Its training image i is the i-th file when classes are sorted by
    name and, within a class, files. FileNotFoundError for what is not there, ValueError for a
    folder of another layout.
    """
    if name not in NAMES:
        if Path(name).is_dir():
            return _load_folder(Path(name), image_size)
        raise FileNotFoundError(f"data set {name!r} is neither a folder nor one of {NAMES}")
    if image_size != 32:
        raise ValueError(f"image size {image_size}: {name} is 32x32, only a folder has a choice")
    if name == "patterns":
        return draw_patterns()
    try:
        return _load_cifar(name, root)
    except (OSError, RuntimeError) as error:
        raise FileNotFoundError(
            f"{name} is not in {root}/ and could not be downloaded ({error}): "
            "put it there, or use --dataset patterns, which needs no download"
        ) from error


def _load_cifar(name, root):
    dataset = getattr(torchvision.datasets, name.upper())
    train = dataset(root, train=True, download=True)
    test = dataset(root, train=False, download=True)
    train_x = torch.from_numpy(train.data).permute(0, 3, 1, 2).contiguous()
    test_x = torch.from_numpy(test.data).permute(0, 3, 1, 2).contiguous()
    train_y, test_y = torch.tensor(train.targets), torch.tensor(test.targets)
    return Images(train_x, train_y, test_x, test_y, train.classes)


def _load_folder(root, image_size):
    test_dir = root / "test"
    if not test_dir.is_dir():
        test_dir = root / "val"
    if not (root / "train").is_dir() or not test_dir.is_dir():
        raise ValueError(f"{root} needs the folders train/<class>/ and test/<class>/ (or val/)")
    train = _find_images(root / "train")
    test = _find_images(test_dir)
    if train.classes != test.classes:
        differ = sorted(set(train.classes).symmetric_difference(test.classes))
        raise ValueError(f"{root}: train/ and {test_dir.name}/ differ in classes: {differ[:5]}")
    if len(test) < 2:
        raise ValueError(f"{root}: {test_dir.name}/ needs at least two images, it has one")
    train_paths = [Path(path) for path, _ in train.samples]
    return Images(
        read_images(train_paths, image_size),
        torch.tensor(train.targets),
        read_images([path for path, _ in test.samples], image_size),
        torch.tensor(test.targets),
        train.classes,
        [path.relative_to(root).as_posix() for path in train_paths],
    )


def _find_images(folder):
    """The files in the class folders of `folder`, torchvision's list; warns of other files."""
    try:
        found = torchvision.datasets.DatasetFolder(folder, default_loader, EXTENSIONS)
    except FileNotFoundError as error:  # no class folder, or one without images
        raise ValueError(f"{folder}: {error}") from error
    skipped = sum(len(names) for _, _, names in os.walk(folder, followlinks=True)) - len(found)
    if skipped:
        warnings.warn(f"{folder}: skips {skipped} files, not of {EXTENSIONS}", stacklevel=2)
    return found


def read_images(paths, size):
    """Files -> uint8 (N, 3, size, size): short side resized, centre cropped.

    ValueError names the files that do not decode, or have 16 bits a channel.
    """
    images, bad = [], []
    for path in paths:
        try:
            with open(path, "rb") as file:
                header = file.read(25)
            if header.startswith(b"\x89PNG") and header[24] > 8:  # would be cut off at 255
                raise ValueError("16 bits")
            image = TF.center_crop(TF.resize(default_loader(path), size), size)
            images.append(TF.pil_to_tensor(image))
        except Exception as error:  # whatever a broken file does
            bad.append(f"{path} ({str(error) or type(error).__name__})"[:200])
    if bad:
        names = ", ".join(bad[:10])
        raise ValueError(f"{len(bad)} files are no images of 8 bits, convert or remove: {names}")
    return torch.stack(images)


def draw_patterns(num_train=5000, num_test=1000, seed=0):
    """Ten classes of drawn patterns as `Images`: 32x32 RGB, no file, no network, classes balanced.

    Colours, place, size and a small turn do not depend on the class: only the pattern tells it.
    """
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(num_train + num_test) % len(PATTERNS)
    x = torch.cat([_draw_batch(part, generator) for part in y.split(500)])
    return Images(x[:num_train], y[:num_train], x[num_train:], y[num_train:], PATTERNS)


def _draw_batch(labels, generator):
    n = len(labels)
    side = 64  # drawn at twice the size

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(n, *shape, generator=generator)

    # The pixels' places in cells of the pattern, three to five a side, turned and moved.
    axis = torch.linspace(-0.5, 0.5, side)
    turn = uniform(-0.3, 0.3, 1, 1)
    cos, sin = uniform(3, 5, 1, 1) * torch.stack([turn.cos(), turn.sin()])
    across = axis * cos + axis[:, None] * sin + uniform(0, 1, 1, 1)
    down = axis[:, None] * cos - axis * sin + uniform(0, 1, 1, 1)
    # Within a cell, from its middle: to the right, downwards, and how far.
    right = across.remainder(1) - 0.5
    below = down.remainder(1) - 0.5
    beside = right.abs()
    above_or_below = below.abs()
    distance = right.hypot(below)
    brick = (across + down.floor() / 2).remainder(1) - 0.5  # every other row is half a cell on
    coarse = torch.randn(n, 1, 8, 8, generator=generator)
    fine = torch.randn(n, 1, 32, 32, generator=generator)
    patterns = {
        "stripes": beside < 0.25,
        "waves": (across + 0.18 * (2 * math.pi * down).sin()).remainder(1) < 0.5,
        "checks": (right > 0) ^ (below > 0),
        "dots": distance < 0.33,
        "rings": (distance > 0.22) & (distance < 0.42),
        "grid": torch.minimum(beside, above_or_below) < 0.12,
        "triangles": (below > -0.35) & (below + 2 * beside < 0.35),
        "bricks": (brick.abs() < 0.42) & (above_or_below < 0.36),
        "blobs": F.interpolate(coarse, side, mode="bilinear")[:, 0] > 0,
        "grain": F.interpolate(fine, side, mode="bilinear")[:, 0] > 0,
    }
    inside = torch.stack([patterns[name] for name in PATTERNS])[labels, torch.arange(n)]
    colour = uniform(0, 1, 3, 1, 1)
    ground = (colour + uniform(0.3, 0.7, 3, 1, 1)).remainder(1)  # no channel near the colour's
    image = torch.where(inside[:, None], colour, ground)
    return (F.avg_pool2d(image, 2) * 255).round().to(torch.uint8)


def dirichlet_split(labels, num_clients, alpha, seed=0, min_size=10, max_redraws=1000):
    """Partition indices over clients: class c goes to the clients by proportions p_c ~ Dir(alpha).

    labels (N,), one a sample; alpha > 0, small = skewed (paper: 0.1), large = even. Returns
    num_clients sorted int64 arrays, together every index once. A class is cut at the nearest
    sample. The draw is repeated until every client has at least min_size samples; ValueError after
    max_redraws draws.
    """
    labels = np.asarray(labels)
    if labels.ndim != 1:
        raise ValueError(f"labels must be (N,), one class a sample, got {labels.shape}")
    if num_clients < 1 or not 0 < alpha < math.inf or min_size < 1:
        given = f"{num_clients}, {alpha}, {min_size}"
        raise ValueError(f"needs num_clients >= 1, finite alpha > 0, min_size >= 1, got {given}")
    rng = np.random.default_rng(seed)
    by_class = [np.flatnonzero(labels == c) for c in np.unique(labels)]
    best = 0
    for _ in range(max_redraws):
        # For each class, the places at which its shuffled samples will be cut into clients' parts.
        cuts = []
        sizes = np.zeros(num_clients, dtype=np.int64)
        for index in by_class:
            shares = rng.dirichlet(np.full(num_clients, alpha))
            cut = np.rint(shares.cumsum()[:-1] * len(index)).astype(int)
            cuts.append(cut)
            sizes += np.diff(cut, prepend=0, append=len(index))
        if sizes.min() >= min_size:
            break
        best = max(best, sizes.min())
    else:
        drawn = f"{max_redraws} draws from {len(labels)} samples with alpha {alpha}"
        least = f"the smallest of {num_clients} clients had at most {best}, not {min_size}"
        raise ValueError(f"in {drawn} {least}: raise alpha or lower K")
    parts = [[] for _ in range(num_clients)]  # of each client: its part of every class
    for index, cut in zip(by_class, cuts):
        shuffled = rng.permutation(index)
        for k, part in enumerate(np.split(shuffled, cut)):
            parts[k].append(part)
    return [np.sort(np.concatenate(part)).astype(np.int64) for part in parts]


def read_split(path):
    """A split file, JSON -> index arrays: an object client -> indices (split.json), or a list.

    An index counts the training images in the order of `load_dataset`. A file for torchvision's
    `cifar10` does not fit a folder of the same images, whose order is another.
    """
    try:
        parts = json.loads(Path(path).read_text())
        if isinstance(parts, dict):
            parts = [parts[str(k)] for k in range(len(parts))]
        return [np.array(part, dtype=np.int64) for part in parts]
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"split file {path} must be JSON, a list of lists of indices") from error


def check_split(split, pool, num_clients, source):
    """The split, each client's part sorted; ValueError unless it is a partition of `pool` (N,)."""
    split = [np.sort(np.asarray(part)) for part in split]
    if num_clients not in (None, len(split)):
        raise ValueError(f"--clients {num_clients}: {source} has {len(split)}")
    if not split or min(len(part) for part in split) < 2:
        raise ValueError(f"{source}: every client needs at least 2 images")
    index, count = np.unique(np.concatenate(split), return_counts=True)
    wrong = np.append(index[count > 1], np.setxor1d(index, pool))
    if len(wrong):
        raise ValueError(f"{source} must hold every training image once: see image {wrong[0]}")
    return split


def two_views(images, generator):
    """Two random views of each image: uint8 (B, 3, H, W) -> two float32 (B, 3, H, W) in [0, 1].

    The paper's: RandomResizedCrop of scale (0.08, 1), horizontal flip 0.5, ColorJitter(0.8, 0.8,
    0.8, 0.2) with probability 0.8, grayscale 0.2; no normalisation. Every sample has its own
    parameters, from `generator` (on the CPU: every device sees the same views). ValueError for
    images that are not uint8, or for none; gray ones: images.expand(-1, 3, -1, -1).
    """
    return make_views(images, draw_views(images, generator))


def draw_views(images, generator):
    """The random half of `two_views`: all FIELDS side by side, float32 (2B, 16), in one copy."""
    params = draw_params(2 * len(images), *images.shape[2:], generator)
    columns = [params[name].float().view(-1, size) for name, size in FIELDS.items()]
    drawn = torch.cat(columns, dim=1)
    if images.device.type == "cuda":
        drawn = drawn.pin_memory()  # so that nobody waits for the copy
    return drawn.to(images.device, non_blocking=True)


def make_views(images, drawn):
    """The other half, one graph: uint8 (B, 3, H, W), `draw_views`' (2B, 16) -> two (B, 3, H, W)."""
    columns = drawn.split(list(FIELDS.values()), dim=1)
    params = dict(zip(FIELDS, columns))
    return augment(images.repeat(2, 1, 1, 1), params).chunk(2)


def draw_params(n, height, width, generator, scale=(0.08, 1.0)):
    """Random parameters of n views: a dict of CPU tensors (n,) or (n, m) by the names of FIELDS.

    Draws as torchvision does: a crop has area ~ U(scale) x the image's, aspect ratio log-uniform
    in [3/4, 4/3], ten tries and then the largest centred box within these ratios; jitter factors
    ~ U(0.2, 1.8), hue shift ~ U(-0.2, 0.2) of the circle; the order of the four jitters is random.
    """

    def rand(*shape):
        return torch.rand(n, *shape, generator=generator)

    # The crop: the first of ten tries that fits into the image.
    low, high = scale
    area = height * width * (low + (high - low) * rand(10))
    ratio = torch.exp((2 * rand(10) - 1) * math.log(4 / 3))
    w = (area * ratio).sqrt().round()
    h = (area / ratio).sqrt().round()
    fits = (0 < w) & (w <= width) & (0 < h) & (h <= height)
    first = fits.float().argmax(1, keepdim=True)
    h, w = h.gather(1, first)[:, 0], w.gather(1, first)[:, 0]
    top = (rand() * (height - h + 1)).floor()
    left = (rand() * (width - w + 1)).floor()
    box = torch.stack([top, left, h, w], 1)
    tall = min(height, round(width * 4 / 3))
    wide = min(width, round(height * 4 / 3))
    largest = [(height - tall) // 2, (width - wide) // 2, tall, wide]
    box[~fits.any(1)] = box.new_tensor(largest)

    jittered = rand() < 0.8
    flip = rand() < 0.5
    factor = torch.where(jittered[:, None], 0.2 + 1.6 * rand(3), 1.0)
    turn = torch.where(jittered, 0.4 * rand() - 0.2, 0.0)

    # The order of the four jitters. Hue's turn parts the three others, which are blends.
    order = rand(4).argsort(1)
    kind = order[order != HUE].view(n, 3)
    place_of_hue = (order == HUE).int().argmax(1, keepdim=True)
    is_before = torch.arange(3) < place_of_hue
    factor = factor.gather(1, kind)
    return {
        "box": box,
        "flip": flip,
        "kind": kind,
        "before": torch.where(is_before, factor, 1.0),
        "after": torch.where(is_before, 1.0, factor),
        "hue": turn,
        "gray": rand() < 0.2,
    }


def augment(images, params):
    """Apply parameters on the images' device: uint8 (n, 3, H, W) -> float32, same, in [0, 1].

    The same numbers as torchvision's functions image by image. Three blends, the turn of hue,
    three blends, each of factor 1 where not due, make one graph.
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
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or not len(images):
        given = f"{images.dtype} {tuple(images.shape)}"
        raise ValueError(f"images must be uint8 (n, 3, H, W), n >= 1, in 0 to 255, got {given}")
    return images.float() / 255


def crop(x, box, flip):
    """Each image's box (n, 4) stretched over x (n, 3, H, W), bilinear; mirrored where flip (n,)."""
    top, left, h, w = box.T[:, :, None]
    rows = _resize_matrix(top, h, x.shape[2])
    columns = _resize_matrix(left, w, x.shape[3])
    columns = torch.where(flip.view(-1, 1, 1) > 0, columns.flip(1), columns)
    return torch.einsum("nij,ncjk,nlk->ncil", rows, x, columns)


def _resize_matrix(start, length, size):
    """Bilinear weights (n, size, size) that stretch pixels start .. start + length over `size`."""
    pixel = torch.arange(size, device=start.device)
    source = ((pixel + 0.5) * (length / size) - 0.5).clamp(min=0).minimum(length - 1)
    return (1 - (source[:, :, None] - (pixel - start)[:, None]).abs()).clamp_(min=0)


def blend(x, kind, factor):
    """Brightness, contrast, saturation: factor x + (1 - factor) black, mean gray, gray, by kind."""
    kind = kind.view(-1, 1, 1, 1)
    factor = factor.view(-1, 1, 1, 1)
    luma = TF.rgb_to_grayscale(x)
    other = luma * (kind == SATURATION) + luma.mean((2, 3), keepdim=True) * (kind == CONTRAST)
    return torch.lerp(other, x, factor).clamp_(0, 1)


def hue(x, turn):
    """Turn the hue of RGB x (n, 3, H, W) by turn (n,) in [-0.5, 0.5] of the circle, through HSV."""
    r, g, b = x.unbind(1)
    value = x.amax(1)
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
    print("client" + "".join(f"  class {c}" for c in range(10)) + "     all")
    for k, row in enumerate(table):
        print(f"{k:6d}" + "".join(f"{count or '.':>9}" for count in row) + f"{row.sum():8d}")
