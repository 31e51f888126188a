"""data.py: the split is a partition, the views equal torchvision's, folders of any images load."""

import inspect
import json
import math
import shutil

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from PIL import Image

import data
from data import dirichlet_split, draw_params, draw_patterns, load_dataset, two_views

# ------------------------------------------------------------------ split


@pytest.mark.parametrize("clients, alpha, n", [(10, 0.1, 5000), (50, 0.1, 50000), (1, 9.0, 100)])
def test_split_is_a_partition_with_a_smallest_size(clients, alpha, n):
    split = dirichlet_split(torch.arange(n) % 10, clients, alpha, seed=3)
    assert len(split) == clients and all(part.dtype == np.int64 for part in split)
    assert np.array_equal(np.sort(np.concatenate(split)), np.arange(n))
    assert min(map(len, split)) >= 10
    assert all((np.diff(part) > 0).all() for part in split)  # sorted


def test_split_depends_on_its_seed_alone():
    labels = np.arange(1000) % 10
    split = dirichlet_split(labels, 5, 0.5)
    for same in (labels, labels.astype(float), torch.as_tensor(labels)):
        assert all(map(np.array_equal, dirichlet_split(same, 5, 0.5), split))
    assert not all(map(np.array_equal, dirichlet_split(labels, 5, 0.5, seed=1), split))


def test_small_classes_are_shared_without_favour():
    """Where cuts are rounded down the last client gets what is left over of every class."""
    labels = np.arange(100 * 20) % 100
    sizes = np.mean([list(map(len, dirichlet_split(labels, 10, 1.0, s))) for s in range(20)], 0)
    assert abs(sizes - 200).max() < 20  # 152 and 254 when rounded down
    assert len(dirichlet_split(np.arange(3000) % 1000, 10, 1.0)) == 10


def test_alpha_sets_how_far_classes_are_from_shared_evenly():
    labels = np.arange(20000) % 10

    def spread(alpha):  # standard deviation of a client's images of a class, over their mean
        split = dirichlet_split(labels, 10, alpha, seed=0)
        counts = np.stack([np.bincount(labels[part], minlength=10) for part in split])
        return counts.std() / counts.mean()

    for alpha in (0.1, 1.0, 10.0):
        assert spread(alpha) == pytest.approx(math.sqrt(9 / (10 * alpha + 1)), rel=0.25)


def test_every_image_of_a_class_may_go_to_any_client():
    part = dirichlet_split(np.zeros(1000), 2, 1000.0, seed=0)[0]
    assert 450 < part.mean() < 550  # not the first half


@pytest.mark.parametrize("parts", [[[0, 3], [1, 2]], {"1": [1, 2], "0": [3, 0]}])
def test_a_split_file_is_a_list_or_an_object_of_clients(parts, tmp_path):
    (tmp_path / "split.json").write_text(json.dumps(parts))
    split = data.read_split(tmp_path / "split.json")
    assert [part.dtype for part in split] == [np.int64] * 2
    checked = data.check_split(split, np.arange(4), 2, "it")
    assert [part.tolist() for part in checked] == [[0, 3], [1, 2]]
    data.check_split(split, np.arange(4), None, "it")


# ------------------------------------------------------------------ views


def random_images(n, height=32, width=32):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(256, (n, 3, height, width), dtype=torch.uint8, generator=generator)


ADJUST = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation)


def by_torchvision(image, params, i):
    """One view by torchvision's own functions, one image at a time."""
    x = image.float() / 255
    top, left, height, width = params["box"][i].int().tolist()
    x = TF.resized_crop(x, top, left, height, width, list(image.shape[1:]), antialias=True)
    x = TF.hflip(x) if params["flip"][i] else x
    for place in range(3):
        if params["before"][i, place] != 1:
            x = ADJUST[params["kind"][i, place]](x, params["before"][i, place].item())
    x = TF.adjust_hue(x, params["hue"][i].item())
    for place in range(3):
        if params["after"][i, place] != 1:
            x = ADJUST[params["kind"][i, place]](x, params["after"][i, place].item())
    return TF.rgb_to_grayscale(x, 3) if params["gray"][i] else x


@pytest.mark.parametrize("height, width", [(32, 32), (20, 48)])
def test_views_equal_torchvision(height, width):
    images = random_images(100, height, width)
    images[:5], images[5:10] = 0, 77  # black, gray: they have no hue
    params = draw_params(200, height, width, torch.Generator().manual_seed(2))
    views = torch.cat(two_views(images, torch.Generator().manual_seed(2)))
    twice = images.repeat(2, 1, 1, 1)
    expected = torch.stack([by_torchvision(image, params, i) for i, image in enumerate(twice)])
    assert (views - expected).abs().max() < 1e-5


def test_parameters_have_the_distributions_of_the_paper():
    params = draw_params(20000, 32, 32, torch.Generator().manual_seed(0))
    top, left, height, width = params["box"].T
    assert (top >= 0).all() and (left >= 0).all()
    assert (top + height).max() <= 32 and (left + width).max() <= 32
    torch.manual_seed(0)
    draw = data.torchvision.transforms.RandomResizedCrop.get_params
    image = torch.empty(3, 32, 32)
    reference = [draw(image, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(5000)]
    for ours, theirs in zip((top, left, height, width), torch.tensor(reference).float().T):
        assert ours.mean().item() == pytest.approx(theirs.mean().item(), abs=0.4)
        assert ours.std().item() == pytest.approx(theirs.std().item(), abs=0.3)
    large = draw_params(20000, 900, 900, torch.Generator().manual_seed(0))["box"]
    ratio = (large[:, 3] / large[:, 2]).log() / math.log(4 / 3)  # width to height
    assert -1.01 < ratio.min() < -0.99 and 0.99 < ratio.max() < 1.01
    jittered = params["hue"] != 0
    assert jittered.float().mean() == pytest.approx(0.8, abs=0.015)
    factors = params["before"] * params["after"]  # one of the two is 1
    assert ((params["before"] == 1) | (params["after"] == 1)).all()
    assert (factors[~jittered] == 1).all() and (factors[jittered] != 1).any(1).all()
    assert 0.2 <= factors.min() < 0.21 and 1.79 < factors.max() <= 1.8
    assert factors[jittered].std() == pytest.approx(1.6 / 12**0.5, abs=0.01)
    assert factors[jittered].mean() == pytest.approx(1, abs=0.015)
    assert -0.2 <= params["hue"].min() < -0.199 and 0.199 < params["hue"].max() <= 0.2
    assert params["hue"][jittered].std() == pytest.approx(0.4 / 12**0.5, abs=0.003)
    assert params["flip"].float().mean() == pytest.approx(0.5, abs=0.015)
    assert params["gray"].float().mean() == pytest.approx(0.2, abs=0.015)
    hue_place = (params["before"] != 1).sum(1, keepdim=True)
    orders = torch.cat([params["kind"], hue_place], 1)[jittered]
    orders, counts = orders.unique(dim=0, return_counts=True)
    assert len(orders) == 24 and counts.min() > 16000 / 24 * 0.85


def test_a_box_that_never_fits_becomes_the_largest_centred_one():
    for height, width, expected in ((8, 64, [0, 26, 8, 11]), (64, 8, [26, 0, 11, 8])):  # 8:1
        params = draw_params(50, height, width, torch.Generator().manual_seed(0), scale=(0.9, 1.0))
        assert params["box"].unique(dim=0).tolist() == [expected]


def test_two_views_come_from_the_generator_alone_and_stay_in_range():
    images = random_images(16)
    first, again = (two_views(images, torch.Generator().manual_seed(5)) for _ in range(2))
    assert all(map(torch.equal, first, again))
    one, two = first
    assert one.shape == two.shape == images.shape and one.dtype == torch.float32
    assert min(one.min(), two.min()) >= 0 and max(one.max(), two.max()) <= 1
    assert (one - two).abs().flatten(1).amax(1).min() > 0  # different parameters
    same = two_views(images[:1].repeat(8, 1, 1, 1), torch.Generator().manual_seed(0))[0]
    assert len(same.flatten(1).unique(dim=0)) == 8  # per sample, also within a batch


# ------------------------------------------------------------------ data sets


def test_patterns_are_balanced_and_the_same_every_time():
    """Each image's product with a wave over its pixels: those of torch 2.14 on a CPU."""
    patterns = draw_patterns(600, 40)
    assert patterns.train_x.shape == (600, 3, 32, 32) and patterns.train_x.dtype == torch.uint8
    assert patterns.train_y.bincount().tolist() == [60] * 10 and len(patterns.classes) == 10
    assert patterns.test_y.bincount().tolist() == [4] * 10
    wave = (0.7 * torch.arange(3 * 32 * 32)).sin() / 50
    first = patterns.train_x[:10].flatten(1).float() @ wave
    last = patterns.test_x[-10:].flatten(1).float() @ wave
    expected = [2.7, 29.9, 15.6, -26.0, 11.9, -6.2, -6.8, 22.5, -27.8, -23.5]
    assert first.tolist() == pytest.approx(expected, abs=0.5)
    expected = [15.2, 2.0, 11.4, 23.4, -26.7, -0.5, -9.5, -11.8, 9.3, 19.1]
    assert last.tolist() == pytest.approx(expected, abs=0.5)
    sizes = inspect.signature(draw_patterns).parameters
    assert (sizes["num_train"].default, sizes["num_test"].default) == (5000, 1000)


def test_colour_and_brightness_do_not_give_a_pattern_away():
    patterns = draw_patterns(1000, 10)
    x = patterns.train_x.float()
    mean_colour, brightness = x.mean((2, 3)), x.mean((1, 2, 3))[:, None]
    statistics = torch.cat([mean_colour, brightness], 1)
    between = torch.stack([statistics[patterns.train_y == c].mean(0) for c in range(10)]).std(0)
    assert (between / statistics.std(0)).max() < 0.25  # the classes' means are close together


@pytest.fixture
def folder(tmp_path):
    """train/ and val/ with two classes: odd sizes and modes, a nested folder, no image."""
    rng = np.random.default_rng(0)
    for part in ("train", "val"):
        for name in ("cat", "dog"):
            place = tmp_path / part / name
            (place / "nested").mkdir(parents=True)
            image = Image.fromarray(rng.integers(0, 256, (40, 64, 3), dtype=np.uint8))
            image.save(place / "a.png")
            image.convert("L").resize((32, 32)).save(place / "b.jpg")
            image.convert("P").save(place / "c.png")
            image.convert("RGBA").save(place / "d.webp")
            image.convert("CMYK").save(place / "e.jpeg")
            image.resize((10, 90)).save(place / "nested" / "f.bmp")
            (place / "notes.txt").write_text("not an image")
    return tmp_path


def keep_one_test_image(root):
    shutil.rmtree(root / "train" / "dog"), shutil.rmtree(root / "val" / "dog")
    for path in sorted((root / "val").rglob("*.*"))[1:]:
        path.unlink()


def test_a_folder_of_any_images_loads_in_the_order_of_names_at_any_size(folder):
    with pytest.warns(UserWarning, match="skips 2 files"):  # notes.txt
        images = load_dataset(str(folder))
    assert images.train_x.shape == (12, 3, 32, 32) and images.train_x.dtype == torch.uint8
    names = "a.png b.jpg c.png d.webp e.jpeg nested/f.bmp".split()
    assert images.files == [f"train/{c}/{name}" for c in ("cat", "dog") for name in names]
    large = load_dataset(str(folder), image_size=48)
    assert large.train_x.shape == (12, 3, 48, 48) and large.test_x.shape == (12, 3, 48, 48)
    assert images.classes == ["cat", "dog"] and images.test_y.tolist() == [0] * 6 + [1] * 6
    pixels = np.array(Image.open(folder / "train" / "cat" / "a.png"))
    original = torch.from_numpy(pixels).permute(2, 0, 1)
    expected = TF.center_crop(TF.resize(original, 32, antialias=True), 32)
    assert (images.train_x[0].int() - expected.int()).abs().max() <= 2  # Pillow rounds otherwise
    gray = images.train_x[1]
    assert torch.equal(gray[0], gray[1]) and torch.equal(gray[0], gray[2])


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda root: (root / "val").rename(root / "other"), "needs the folders"),
        (lambda root: (root / "train").rename(root / "other"), "needs the folders"),
        (lambda root: (root / "val" / "dog").rename(root / "val" / "wolf"), "classes.*wolf"),
        (lambda root: (root / "train" / "empty").mkdir(), "empty"),
        (keep_one_test_image, "val/ needs at least two images"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*skips")
def test_a_broken_folder_says_what_is_wrong(folder, damage, words):
    damage(folder)
    with pytest.raises(ValueError, match=words):
        load_dataset(str(folder))


@pytest.mark.filterwarnings("ignore:.*skips")
def test_all_bad_files_are_named_at_once(folder):
    cat, dog = folder / "train" / "cat", folder / "train" / "dog"
    (cat / "a.png").write_bytes(b"no image")
    (cat / "b.jpg").write_bytes(b"")
    (dog / "e.jpeg").write_bytes((dog / "e.jpeg").read_bytes()[:200])
    Image.new("I;16", (32, 32)).save(dog / "c.png")
    with pytest.raises(ValueError, match="4 files are no images of 8 bits, convert") as error:
        load_dataset(str(folder))
    for name in ("cat/a.png", "cat/b.jpg", "dog/c.png (16 bits)", "dog/e.jpeg"):
        assert name in str(error.value)


def test_a_fingerprint_knows_the_images_of_a_run_again(patterns):
    other = draw_patterns(120, 40)
    assert patterns.fingerprint() == other.fingerprint()
    changed = [
        patterns._replace(train_y=patterns.train_y.flip(0)),
        patterns._replace(classes=patterns.classes[::-1]),
        patterns._replace(files=["train/a.png"]),
    ]
    assert len({images.fingerprint() for images in [patterns, *changed]}) == 4


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_a_data_set_that_cannot_be_fetched_is_one_line(name, tmp_path, monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    words = f"{name} is not in .*nowhere.*--dataset patterns"
    with pytest.raises(FileNotFoundError, match=words) as caught:
        load_dataset(name, tmp_path / "nowhere")
    assert "\n" not in str(caught.value)


def test_cifar_comes_from_torchvisions_files(tmp_path, monkeypatch):
    class FakeCIFAR:
        base_folder, classes = "cifar-10-batches-py", ["a", "b"]

        def __init__(self, root, train, download):
            n = 4 if train else 2
            self.data = np.arange(n * 32 * 32 * 3, dtype=np.uint8).reshape(n, 32, 32, 3)
            self.targets = [i % 2 for i in range(n)]

    monkeypatch.setattr(data.torchvision.datasets, "CIFAR10", FakeCIFAR)
    images = load_dataset("cifar10", tmp_path)
    assert images.train_x.shape == (4, 3, 32, 32) and images.test_y.tolist() == [0, 1]
    assert images.train_x[0, :, 0, 1].tolist() == [3, 4, 5]  # channels moved in front


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(FileNotFoundError, match="'cifar11' is neither a folder.*cifar10.*patterns"):
        load_dataset("cifar11")


TEN = np.arange(100) % 10
SPLIT = [[0, 1, 2, 3], [4, 5, 6, 7]]


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: dirichlet_split(TEN, 20, 0.1), "in 1000 draws from 100 .*lower K"),  # 20 x 10
        (
            lambda: dirichlet_split([0, 1], 3, 0.1),
            "smallest of 3 .* at most 0, not 10: raise alpha",
        ),
        (lambda: dirichlet_split(TEN, 0, 0.1), "num_clients"),
        (lambda: dirichlet_split(TEN, 2, 0.0), "alpha"),
        (lambda: dirichlet_split(TEN, 2, math.nan), "alpha"),
        (lambda: dirichlet_split(TEN, 2, math.inf), "alpha"),
        (lambda: dirichlet_split(TEN, 2, 1.0, min_size=0), "min_size"),
        (lambda: dirichlet_split(np.eye(10), 2, 1.0), r"labels must be \(N,\).*\(10, 10\)"),
        (lambda: data.check_split([[5, 6], range(8)], range(8), 2, "it"), "once: see image 5"),
        (lambda: data.check_split(SPLIT, range(9), 2, "it"), "see image 8"),
        (lambda: data.check_split(SPLIT, range(7), 2, "it"), "see image 7"),
        (lambda: data.check_split([[0], range(1, 8)], range(8), 2, "it"), "at least 2"),
        (lambda: data.check_split([], range(8), None, "it"), "at least 2"),
        (lambda: data.check_split(SPLIT, range(8), 3, "it"), "--clients 3: it has 2"),
        (lambda: data.unit_range(torch.zeros(4, 3, 8, 8)), r"uint8 \(n, 3, H, W\).*float32"),
        (lambda: data.unit_range(torch.zeros(4, 1, 8, 8).byte()), r"uint8 .*\(4, 1, 8, 8\)"),
        (lambda: data.unit_range(torch.zeros(3, 8, 8).byte()), r"uint8 .*\(3, 8, 8\)"),
        (lambda: data.unit_range(torch.zeros(0, 3, 8, 8).byte()), "n >= 1"),
        (lambda: load_dataset("patterns", image_size=48), "image size 48: patterns is 32x32"),
    ],
)
def test_what_cannot_be_used_is_a_value_error(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize("text", ["{", "3", '[["a"]]', "[[1e99]]", '{"0": [1], "2": [2]}', "[[[1]"])
def test_a_split_file_of_something_else_is_a_value_error(text, tmp_path):
    (tmp_path / "split.json").write_text(text)
    with pytest.raises(ValueError, match="split.json must be JSON"):
        data.read_split(tmp_path / "split.json")
