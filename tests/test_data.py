"""Readers, splits and batches of data.py. Published formats are read from small files that are written here."""

import gzip
import hashlib
import pickle
import shutil
from urllib.error import URLError

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image
from torchvision.datasets import CIFAR10, SVHN

import data
from data import (
    DATASETS,
    DEBIAN_FASHION,
    Augmentation,
    DataError,
    draw_augmentation,
    load_data,
    make_batch,
    make_data,
    normalize,
)


def numbered(n, channels=3, height=8, width=8, first=0):
    """n random images that say their number in two corners, as `numbers` reads it; the label is the last digit."""
    images = np.random.default_rng(first).integers(0, 256, (n, channels, height, width), dtype=np.uint8)
    number = np.arange(first, first + n)
    images[:, 0, 0, 0], images[:, 0, -1, -1] = number % 256, number // 256
    return images, number % 10


def numbers(image_set, border=0):
    """The numbers of `numbered` images that have a border."""
    corners = image_set.images[:, 0, border, border], image_set.images[:, 0, -1 - border, -1 - border]
    return corners[0].long() + 256 * corners[1].long()


def error_line(call, *arguments, **options):
    with pytest.raises(DataError) as error:
        call(*arguments, **options)
    line = str(error.value)
    assert line and "\n" not in line
    return line


# Batches


SQUARE = torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 9]], dtype=torch.uint8)


@pytest.mark.parametrize("draw, augmentation, expected", [
    ((1, 1, 0, 0, 0), Augmentation(shift=1), [[1, 2, 3], [4, 5, 6], [7, 8, 9]]),
    ((0, 1, 0, 0, 0), Augmentation(shift=1), [[0, 0, 0], [1, 2, 3], [4, 5, 6]]),  # down
    ((2, 0, 0, 0, 0), Augmentation(shift=1), [[0, 4, 5], [0, 7, 8], [0, 0, 0]]),  # up and to the right
    ((0, 0, 1, 0, 0), Augmentation(flip=True), [[3, 2, 1], [6, 5, 4], [9, 8, 7]]),
    ((2, 0, 1, 0, 0), Augmentation(flip=True, shift=1), [[5, 4, 0], [8, 7, 0], [0, 0, 0]]),  # first crop, then flip
    ((0, 0, 0, 1, 1), Augmentation(cutout=2), [[0, 0, 3], [0, 0, 6], [7, 8, 9]]),
    ((0, 0, 0, 0, 2), Augmentation(cutout=2), [[1, 0, 0], [4, 5, 6], [7, 8, 9]]),  # clipped at the border
    ((0, 0, 0, 1, 0), Augmentation(cutout=3), [[0, 0, 3], [0, 0, 6], [0, 0, 9]]),
    ((0, 0, 0, 2, 1), Augmentation(cutout=1), [[1, 2, 3], [4, 5, 6], [7, 0, 9]]),
    ((0, 0, 1, 0, 0), Augmentation(flip=True, cutout=1), [[0, 2, 1], [6, 5, 4], [9, 8, 7]]),  # first flip, then cut
])
def test_augmentation_by_hand(draw, augmentation, expected):
    images = torch.nn.functional.pad(SQUARE, (augmentation.shift,) * 4)[None, None]
    batch = make_batch(images, torch.tensor([0]), torch.tensor([draw]), augmentation, torch.zeros(1), torch.ones(1))
    assert batch.dtype == torch.float32 and batch[0, 0].tolist() == expected


def test_what_is_cut_out_becomes_the_mean():
    draws = torch.tensor([[0, 0, 0, 1, 1]])
    batch = make_batch(SQUARE[None, None], torch.tensor([0]), draws, Augmentation(cutout=2), torch.tensor([5.0]),
                       torch.tensor([2.0]))
    assert batch[0, 0].tolist() == [[0, 0, -1], [0, 0, 0.5], [1, 1.5, 2]]


def slow_batch(images, index, draws, augmentation, mean, std):
    """make_batch again, in NumPy and pixel by pixel."""
    n, channels, padded_height, padded_width = images.shape
    height, width = padded_height - 2 * augmentation.shift, padded_width - 2 * augmentation.shift
    batch = np.zeros((len(index), channels, height, width), dtype=np.float32)
    for b, (i, (dy, dx, flip, cut_y, cut_x)) in enumerate(zip(index, draws, strict=True)):
        for y in range(height):
            for x in range(width):
                top, left = cut_y - augmentation.cutout // 2, cut_x - augmentation.cutout // 2
                if top <= y < top + augmentation.cutout and left <= x < left + augmentation.cutout:
                    continue
                source = width - 1 - x if flip else x
                batch[b, :, y, x] = (images[i, :, dy + y, dx + source] - mean) / std
    return batch


@pytest.mark.parametrize("augmentation", [
    Augmentation(), Augmentation(shift=2), Augmentation(flip=True, shift=1, cutout=3),
    Augmentation(flip=True, cutout=4), Augmentation(shift=3, cutout=20),
])
@pytest.mark.parametrize("channels, height, width", [(1, 8, 8), (3, 7, 5), (2, 4, 9)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_batch_equals_pixel_by_pixel(augmentation, channels, height, width, memory_format):
    rng = np.random.default_rng(1)
    shape = (6, channels, height + 2 * augmentation.shift, width + 2 * augmentation.shift)
    images = torch.from_numpy(rng.integers(0, 256, shape, dtype=np.uint8)).contiguous(memory_format=memory_format)
    index = torch.from_numpy(rng.integers(0, 6, 17))
    draws = torch.from_numpy(draw_augmentation(augmentation, 17, height, width, rng))
    mean, std = torch.rand(channels) * 255, torch.rand(channels) * 80 + 1
    batch = make_batch(images, index, draws, augmentation, mean, std)
    assert batch.is_contiguous(memory_format=torch.channels_last)
    expected = slow_batch(images.numpy(), index.numpy(), draws.numpy(), augmentation, mean.numpy(), std.numpy())
    torch.testing.assert_close(batch, torch.from_numpy(expected))


def test_batch_of_a_slice_of_a_larger_tensor():
    images = torch.from_numpy(numbered(20)[0]).contiguous(memory_format=torch.channels_last)
    arguments = torch.zeros(4, 5, dtype=torch.int64), Augmentation(), torch.zeros(3), torch.ones(3)
    batch = make_batch(images[10:], torch.arange(4), *arguments)
    assert torch.equal(batch, make_batch(images, torch.arange(10, 14), *arguments))
    assert torch.equal(batch, images[10:14].float())


def test_batches_never_ask_the_device():
    # A tensor on "meta" has no values: whatever needs them on the host, or mixes devices, raises.
    augmentation = Augmentation(flip=True, shift=2, cutout=4)
    images, mean = torch.empty(9, 3, 12, 12, dtype=torch.uint8, device="meta"), torch.empty(3, device="meta")
    index, draws = (torch.empty(shape, dtype=torch.int64, device="meta") for shape in ((5,), (5, 5)))
    assert make_batch(images, index, draws, augmentation, mean, mean).shape == (5, 3, 8, 8)
    assert normalize(images, mean, mean).shape == (9, 3, 12, 12)


def test_draws_cover_their_ranges():
    draws = draw_augmentation(Augmentation(flip=True, shift=2, cutout=3), 4000, 7, 5, np.random.default_rng(0))
    assert draws.shape == (4000, 5) and draws.dtype == np.int64
    for column, size in zip(draws.T, (5, 5, 2, 7, 5), strict=True):
        share = np.bincount(column, minlength=size) / 4000
        assert share == pytest.approx([1 / size] * size, abs=0.03)  # more than 4 standard errors
    assert not draw_augmentation(Augmentation(), 100, 7, 5, np.random.default_rng(0)).any()


@pytest.mark.parametrize("channels", [1, 3])
def test_normalize(channels):
    images = torch.from_numpy(numbered(5, channels, 6, 7)[0])
    mean, std = torch.rand(channels) * 255, torch.rand(channels) * 80 + 1
    before = images.clone()
    batch = normalize(images, mean, std)
    torch.testing.assert_close(batch, (images - mean.view(-1, 1, 1)) / std.view(-1, 1, 1))
    assert batch.dtype == torch.float32 and batch.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(images, before)


# Splits


def custom(seed=0, n=200, **options):
    options = {"augmentation": Augmentation(flip=True, shift=2, cutout=3), **options}
    return make_data(numbered(n), numbered(50, first=1000), seed=seed, **options)


def test_splits_are_disjoint_and_complete():
    found = custom(validation=30)
    train, validation, test = numbers(found.train, border=2), numbers(found.validation), numbers(found.test)
    assert sorted(train.tolist() + validation.tolist()) == list(range(200)) and len(validation) == 30
    assert test.tolist() == list(range(1000, 1050))
    for image_set, number in ((found.train, train), (found.validation, validation), (found.test, test)):
        assert torch.equal(image_set.labels, number % 10) and image_set.labels.dtype == torch.int64
        assert image_set.images.dtype == torch.uint8
    original = torch.from_numpy(numbered(200)[0])
    assert torch.equal(found.validation.images, original[validation])
    assert torch.equal(found.train.images[:, :, 2:-2, 2:-2], original[train])
    assert found.train.images.shape == (170, 3, 12, 12)
    assert found.train.images.sum() == original[train].sum()  # the border is zero


def test_properties():
    found = make_data(numbered(40, 2, 5, 9), numbered(20, 2, 5, 9), name="mine", augmentation=Augmentation(shift=1))
    assert (found.channels, found.height, found.width, found.num_classes) == (2, 5, 9, 10)
    assert found.name == "mine" and found.class_names == tuple("0123456789")
    assert len(found.validation) == 4  # a tenth


def test_splits_depend_on_the_seed_alone():
    state, torch_state = np.random.get_state()[1].copy(), torch.get_rng_state()
    one, same, other = custom(5, enlarge=3), custom(5, enlarge=3), custom(6, enlarge=3)
    assert torch.equal(one.train.images, same.train.images)
    assert torch.equal(one.validation.images, same.validation.images)
    assert set(numbers(one.train, 2).tolist()) != set(numbers(other.train, 2).tolist())
    assert torch.equal(one.test.images, other.test.images)
    assert (np.random.get_state()[1] == state).all() and torch.equal(torch.get_rng_state(), torch_state)


def test_train_on_all_keeps_the_validation_images():
    part, everything = custom(validation=30), custom(validation=30, train_on_all=True)
    assert torch.equal(numbers(part.validation), numbers(everything.validation))
    assert sorted(numbers(everything.train, 2).tolist()) == list(range(200))


def test_limit():
    small, large = custom(limit=50, validation=20), custom(limit=150, validation=20)
    assert (len(small.train), len(small.validation), len(small.test)) == (30, 20, 50)
    assert set(numbers(small.train, 2).tolist()) < set(numbers(large.train, 2).tolist())
    assert set(numbers(custom(1, limit=50).train, 2).tolist()) != set(numbers(small.train, 2).tolist())
    assert len(custom(limit=50, validation=20, train_on_all=True).train) == 50
    assert len(custom(limit=50).validation) == 5


def test_enlarged_validation_images():
    plain, found = custom(validation=30), custom(validation=30, enlarge=4)
    assert found.validation.images.shape == (120, 3, 8, 8) and found.validation.images.dtype == torch.uint8
    assert torch.equal(found.validation.labels, plain.validation.labels.repeat(4))
    copies = found.validation.images.view(4, 30, 3, 8, 8)
    assert all(not torch.equal(copies[i], copies[j]) for i in range(4) for j in range(i))
    mean = found.mean.round().to(torch.uint8)
    for copy in copies[:, 7]:
        assert any(torch.equal(copy, candidate) for candidate in augmented(plain.validation.images[7], mean))


def augmented(image, mean):
    """Every flip and shift by up to 2 with every 3x3 square set to the mean, of an image (C, 8, 8)."""
    padded = torch.nn.functional.pad(image, (2, 2, 2, 2))
    for dy in range(5):
        for dx in range(5):
            for shifted in (padded[:, dy:dy + 8, dx:dx + 8], padded[:, dy:dy + 8, dx:dx + 8].flip(2)):
                for y in range(8):
                    for x in range(8):
                        cut = shifted.clone()
                        cut[:, max(0, y - 1):y + 2, max(0, x - 1):x + 2] = mean[:, None, None]
                        yield cut


def test_unaugmented_copies_are_exact():
    found = custom(validation=30, enlarge=2, augmentation=Augmentation())
    assert torch.equal(found.validation.images[:30], found.validation.images[30:])
    assert torch.equal(found.validation.images[:30], custom(validation=30).validation.images)


@pytest.mark.parametrize("train_on_all", [False, True])
def test_statistics_are_those_of_the_training_images(train_on_all):
    found = custom(validation=30, train_on_all=train_on_all)
    pixels = found.train.images[:, :, 2:-2, 2:-2].double()
    assert found.mean.dtype == found.std.dtype == torch.float32
    torch.testing.assert_close(found.mean, pixels.mean((0, 2, 3)).float())
    torch.testing.assert_close(found.std, pixels.std((0, 2, 3), correction=0).float())
    batch = normalize(found.train.images[:, :, 2:-2, 2:-2], found.mean, found.std)  # Sec. 4.1
    assert batch.mean((0, 2, 3)).abs().max() < 1e-5 and (batch.var((0, 2, 3)) - 1).abs().max() < 1e-3


def test_a_channel_of_one_colour_becomes_zero():
    images = np.full((20, 1, 4, 4), 77, dtype=np.uint8)
    found = make_data((images, np.arange(20) % 2), (images, np.arange(20) % 2))
    assert not normalize(found.test.images, found.mean, found.std).any()


# Wrong labels


@pytest.mark.parametrize("kind, further", [("uniform", range(1, 10)), ("pair", [1])])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.999])
def test_a_share_of_the_training_and_validation_labels_becomes_another_class(share, kind, further):
    plain, found = (custom(n=2000, validation=500, label_noise=s, label_noise_kind=kind) for s in (0, share))
    clean = torch.cat([plain.train.labels, plain.validation.labels])
    wrong = (torch.cat([found.train.labels, found.validation.labels]) - clean) % 10
    assert (wrong > 0).sum() == round(2000 * share)  # in both parts together, and in each about
    assert (wrong[1500:] > 0).sum().item() == pytest.approx(500 * share, abs=40)
    seen = torch.bincount(wrong, minlength=10)[1:]
    expected = [2000 * share / len(further) * (i in further) for i in range(1, 10)]
    assert seen.tolist() == pytest.approx(expected, abs=50 if kind == "uniform" else 1)
    assert torch.equal(found.test.labels, plain.test.labels) and torch.equal(found.train.images, plain.train.images)
    assert plain.train_clean is None
    assert share == 0 or torch.equal(found.train_clean, plain.train.labels)


def test_wrong_labels_depend_on_the_seed_alone():
    one, all_of_it = (custom(n=500, validation=100, label_noise=0.4, train_on_all=t) for t in (False, True))
    assert torch.equal(one.validation.labels, all_of_it.validation.labels)
    assert torch.equal(torch.cat([one.validation.labels, one.train.labels]), all_of_it.train.labels)
    assert torch.equal(numbers(all_of_it.train, 2) % 10, all_of_it.train_clean)
    two, other = (custom(seed, n=500, validation=100, label_noise=0.4) for seed in (0, 1))
    assert torch.equal(one.train.labels, two.train.labels)
    assert (one.train.labels != one.train_clean).ne(other.train.labels != other.train_clean).any()
    named = [load_data("digits", label_noise=noise) for noise in (0, 0.25)]
    assert (named[0].train.labels != named[1].train.labels).float().mean().item() == pytest.approx(0.25, abs=0.03)


def test_copies_of_an_image_share_its_wrong_label():
    found = custom(validation=30, enlarge=3, label_noise=0.5)
    assert torch.equal(found.validation.labels, custom(validation=30, label_noise=0.5).validation.labels.repeat(3))
    assert (found.validation.labels[:30] != numbers(custom(validation=30).validation) % 10).sum() > 5


@pytest.mark.parametrize("noise, words", [
    (dict(label_noise=1), "--label-noise must be a share of at least 0 and below 1, not 1"),
    (dict(label_noise=-0.1), "below 1, not -0.1"), (dict(label_noise=float("nan")), "below 1, not nan"),
    (dict(label_noise="much"), "below 1, not 'much'"),
    (dict(label_noise_kind="tree"), "--label-noise-kind must be one of uniform, pair, not 'tree'"),
])
def test_noise_that_cannot_be(noise, words):
    assert words in error_line(custom, **noise)


def test_moving():
    found = custom(label_noise=0.5)
    assert found.to("meta").train_clean.is_meta
    moved = found.to("meta")
    sets = [moved.train, moved.validation, moved.test]
    assert all(t.is_meta for t in [moved.mean, moved.std, *(s.images for s in sets), *(s.labels for s in sets)])
    assert moved.train.images.is_contiguous(memory_format=torch.channels_last)
    assert moved.class_names == found.class_names


# Data sets of one's own


class Listed(torch.utils.data.Dataset):
    def __init__(self, images, labels):
        self.images, self.labels = images, labels

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.images[i], self.labels[i]


class Named(Listed):
    def __getitem__(self, i):
        return {"image": self.images[i], "label": self.labels[i], "name": f"image {i}"}


def test_every_kind_of_source_gives_the_same_data():
    images, labels = numbered(40)
    sources = [
        (images, labels),
        (torch.from_numpy(images), torch.from_numpy(labels).int()),
        (torch.from_numpy(images).float() / 255, labels.tolist()),
        Listed(torch.from_numpy(images), torch.from_numpy(labels)),
        Listed(torch.from_numpy(images).double() / 255, labels),
        Listed([Image.fromarray(image.transpose(1, 2, 0)) for image in images], labels),
    ]
    first, *others = [make_data(source, source) for source in sources]
    for other in others:
        assert torch.equal(first.train.images, other.train.images) and torch.equal(first.mean, other.mean)
        assert torch.equal(first.train.labels, other.train.labels)
        assert torch.equal(first.test.images, other.test.images)


def test_grey_and_palette_images():
    grey = [Image.fromarray(image[0]) for image in numbered(20, 1)[0]]
    assert torch.equal(make_data(Listed(grey, [0, 1] * 10), Listed(grey, [0, 1] * 10)).test.images,
                       torch.from_numpy(numbered(20, 1)[0]))
    palette = [image.convert("RGB").quantize(256) for image in grey]
    images = make_data(Listed(palette, [0, 1] * 10), Listed(palette, [0, 1] * 10)).test.images
    assert images.shape == (20, 3, 8, 8)
    assert (images[3].numpy() == np.array(palette[3].convert("RGB")).transpose(2, 0, 1)).all()


@pytest.mark.parametrize("augmentation, words", [
    (dict(flip=0.5), "flip must be True or False, not 0.5"), (dict(shift=-1), "shift must be a whole number of pixels"),
    (dict(shift=1.5), "from 0 on, not 1.5"), (dict(cutout=-3), "cutout must be a whole number"),
    (dict(shift=8), "whose shift is below the height and width of the images"),
])
def test_augmentations_that_cannot_be(augmentation, words):
    assert words in error_line(lambda: make_data(numbered(20), numbered(20), augmentation=Augmentation(**augmentation)))
    assert "must be a data.Augmentation" in error_line(make_data, numbered(20), numbered(20), augmentation=augmentation)


def test_class_names_of_a_dataset():
    source = Listed(*numbered(20))
    source.classes = [f"class {i}" for i in range(12)]
    found = make_data(source, source)
    assert found.num_classes == 12 and found.class_names[11] == "class 11"
    test = Listed(*numbered(20))
    test.classes = source.classes[1:]
    assert "train.classes and test.classes must be the same; only one of them has class 0" in error_line(
        make_data, source, test)
    source.classes = 12  # no names
    assert make_data(source, source).class_names == make_data(numbered(20), numbered(20)).class_names


def test_an_array_with_negative_strides():
    images, labels = numbered(20)
    found, same = (make_data((x, labels), (x, labels)) for x in (images[:, :, ::-1], images[:, :, ::-1].copy()))
    assert torch.equal(found.train.images, same.train.images)


def test_sources_that_cannot_be_used():
    images, labels = numbered(20)
    good = (images, labels)
    for train, test, words in [
        (good, numbered(20, 1), "training images are (3, 8, 8), the test images (1, 8, 8)"),
        ((images, labels[:19]), good, "shape (20, 3, 8, 8), their labels (19,)"),
        ((images[:, 0], labels), good, "the training images have the shape (20, 8, 8)"),
        ((images[:0], labels[:0]), good, "(0, 3, 8, 8)"),
        (good, (images, labels[:, None]), "the test images have the shape (20, 3, 8, 8), their labels (20, 1)"),
        ((images.astype(np.int64), labels), good, "training images are torch.int64; accepted are uint8"),
        ((images.astype(np.float32), labels), good, "floats in [0, 1]"),
        ((images / 255 - 0.5, labels), good, "not yet normalised"),
        (((images / 255) * np.nan, labels), good, "floats in [0, 1]"),
        ((images, labels / 2), good, "the training labels are torch.float64; they must be whole numbers"),
        ((images, labels - 1), good, "the training labels are -1 to 8; with 9 classes they must be 0 to 8"),
        (good, (images, labels + 1), "the test labels are 1 to 10; with 10 classes they must be 0 to 9"),
        ((images, labels * 0), (images, labels * 0), "at least two classes, not 1"),
        (Listed([torch.zeros(3, 8, 8), torch.zeros(3, 8, 9)], [0, 1]), good, "image 1 has the shape (3, 8, 9)"),
        (Listed(torch.zeros(2, 8, 8), [0, 1]), good, "(2, 8, 8)"),
        (Listed(images.astype(np.int32), labels), good, "torch.int32"),
        (Listed([], []), good, "(0,)"),
        ((images, labels * 10**9), good, "go up to 9000000000, of 20 images; they must number the classes from 0 on"),
        ((images, list("ab" * 10)), good, "training labels: accepted are numbers in a tensor or an array"),
        ((images, torch.from_numpy(labels).to(torch.complex64)), good, "must be whole numbers"),
        (Listed(images, labels / 2), good, "training item 0 is not a pair (image, whole number)"),
        (Listed(images, list("ab" * 10)), good, "training item 0 is not a pair (image, whole number)"),
        (Listed(["a"], [0]), good, "training image 0: accepted are numbers in a tensor or an array"),
        (Named(images, labels), good, "training item 0 is not a pair"),
        (good, None, "the test data are NoneType; accepted are a pair (images, labels), and a map-style Dataset"),
        (torch.from_numpy(images), good, "the training data are Tensor"),
        ((images, labels, labels), good, "the training data are tuple"),
        (torch.utils.data.DataLoader(Listed(images, labels)), good, "the training data are DataLoader"),
        ((images.transpose(0, 2, 3, 1), labels), good, "(20, 8, 8, 3): channels last"),
        ((numbered(20, height=20, width=28)[0].transpose(0, 2, 3, 1), labels), good, "(20, 20, 28, 3): channels last"),
        (Listed(numbered(20, 4)[0].transpose(0, 2, 3, 1), labels), good, "(20, 8, 8, 4): channels last"),
        ((images[:1], labels[:1]), good, "at least two training images, not 1"),
    ]:
        assert words in error_line(make_data, train, test)


@pytest.mark.parametrize("options, words", [
    ({"validation": 0}, "--validation must be 1 to 199 of the 200 training images in use, not 0"),
    ({"validation": 200}, "--validation must be 1 to 199"),
    ({"validation": 50, "limit": 50}, "--validation must be 1 to 49 of the 50 training images in use, not 50"),
    ({"limit": 201}, "--limit must be 2 to 200, the number of training images, not 201"),
    ({"limit": 0}, "--limit must be 2 to 200, the number of training images, not 0"),
    ({"enlarge": 0}, "--enlarge must be at least 1, not 0"),
])
def test_splits_that_make_no_sense(options, words):
    assert words in error_line(custom, **options)


# Published data sets


def test_defaults():
    assert {name: (s.validation, s.enlarge, s.augmentation) for name, s in DATASETS.items()} == {
        "digits": (240, 4, Augmentation(shift=1)),
        "fashion": (5_000, 1, Augmentation(flip=True, shift=2, cutout=8)),
        "cifar10": (1_250, 20, Augmentation(flip=True, shift=4, cutout=16)),  # 1,250 enlarged to 25,000, Sec. 4.1
        "svhn": (30_000, 1, Augmentation()),  # Sec. 4.2
    }


def test_digits():
    found, other = load_data("digits", seed=1), load_data("digits", seed=2)
    assert [len(s) for s in (found.train, found.validation, found.test)] == [1197, 960, 360]
    assert (found.channels, found.height, found.width, found.num_classes) == (1, 8, 8, 10)
    assert found.train.images.max() == 255 and found.train.images.shape == (1197, 1, 10, 10)
    assert torch.equal(found.test.images, other.test.images)
    assert not torch.equal(found.train.images, other.train.images)
    assert found.test.labels.bincount().tolist() == pytest.approx([36] * 10, abs=1)  # stratified
    assert len(load_data("digits", train_on_all=True).train) == 1437


@pytest.mark.parametrize("name, nearest", [("fashon", "fashion"), ("CIFAR-10", "cifar10"), ("no/such", None)])
def test_unknown_name(name, nearest):
    line = error_line(load_data, name)
    assert line.startswith(f"no data set or folder is called '{name}'") and "digits, fashion, cifar10, svhn" in line
    assert (f"did you mean '{nearest}'?" in line) == bool(nearest)


def write_cifar10(root, monkeypatch, per_batch=20):
    """Six batches and the meta file as published, with their checksums made known to torchvision."""
    folder = root / CIFAR10.base_folder
    folder.mkdir(parents=True)

    def write(name, content):
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    listed = []
    for b, name in enumerate([f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]):
        images, labels = numbered(per_batch, 3, 32, 32, first=b * per_batch)
        listed.append([name, write(name, {"batch_label": f"batch {b}", "labels": labels.tolist(),
                                          "data": images.reshape(per_batch, 3072),
                                          "filenames": [f"{i}.png" for i in range(per_batch)]})])
    names = [f"name {i}" for i in range(10)]
    meta = write("batches.meta", {"label_names": names, "num_cases_per_batch": per_batch, "num_vis": 3072})
    monkeypatch.setattr(CIFAR10, "train_list", listed[:5])
    monkeypatch.setattr(CIFAR10, "test_list", listed[5:])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": meta})
    return folder


def test_cifar10(tmp_path, monkeypatch):
    write_cifar10(tmp_path, monkeypatch)
    found = load_data("cifar10", tmp_path, validation=10, enlarge=1)
    train = numbers(found.train, border=4)
    originals = torch.cat([torch.from_numpy(numbered(20, 3, 32, 32, first=20 * b)[0]) for b in range(6)])
    assert torch.equal(found.train.images[:, :, 4:-4, 4:-4], originals[train])
    assert torch.equal(found.train.labels, train % 10)
    assert sorted(train.tolist() + numbers(found.validation).tolist()) == list(range(100))
    assert torch.equal(found.test.images, originals[100:]) and found.class_names[3] == "name 3"


def test_cifar10_defaults(tmp_path, monkeypatch):
    write_cifar10(tmp_path, monkeypatch, per_batch=252)
    monkeypatch.setenv("EPBT_DATA", str(tmp_path))
    found = load_data("cifar10")
    assert found.validation.images.shape == (25_000, 3, 32, 32) and found.train.images.shape == (10, 3, 40, 40)


@pytest.mark.parametrize("name", ["data_batch_3", "test_batch", "batches.meta"])
def test_cifar10_damaged_and_missing(tmp_path, monkeypatch, name):
    path = write_cifar10(tmp_path, monkeypatch) / name
    path.write_bytes(path.read_bytes()[:-100])
    line = error_line(load_data, "cifar10", tmp_path)
    assert line.startswith(f"CIFAR-10: {path} is damaged (wrong checksum); run with --download, or unpack")
    path.unlink()
    line = error_line(load_data, "cifar10", tmp_path)
    assert line.startswith(f"CIFAR-10: {path} is missing; run with --download, or unpack cifar-10-python.tar.gz")
    assert line.endswith(f"into {tmp_path}; --data-root or EPBT_DATA name another folder")


def test_cifar10_download(tmp_path, monkeypatch):
    calls = []

    def download(url, root, filename, md5):
        calls.append(url)
        if len(calls) == 1:
            raise URLError("no\nnetwork")
        write_cifar10(tmp_path, monkeypatch)

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", download)
    assert "no network" in error_line(load_data, "cifar10", tmp_path, download=True)
    assert len(load_data("cifar10", tmp_path, validation=10, enlarge=1, download=True).train) == 90
    assert calls == [CIFAR10.url] * 2


def write_svhn(root, monkeypatch):
    """The three .mat files as published: X (32, 32, 3, N), y (N, 1) with 10 for the digit 0."""
    split_list = {}
    for first, (split, (url, name, _)) in zip((0, 100, 200), SVHN.split_list.items(), strict=True):
        images, labels = numbered(30, 3, 32, 32, first=first)
        labels = np.where(labels == 0, 10, labels).astype(np.uint8)[:, None]
        scipy.io.savemat(root / name, {"X": images.transpose(2, 3, 1, 0), "y": labels}, do_compression=True)
        split_list[split] = [url, name, hashlib.md5((root / name).read_bytes()).hexdigest()]
    monkeypatch.setattr(SVHN, "split_list", split_list)


def test_svhn(tmp_path, monkeypatch):
    write_svhn(tmp_path, monkeypatch)
    found = load_data("svhn", tmp_path, validation=20)
    train, validation, test = (numbers(s) for s in (found.train, found.validation, found.test))
    starts = {split: 100 * i for i, split in enumerate(SVHN.split_list)}
    expected = [start + i for split, start in starts.items() if split != "test" for i in range(30)]
    assert sorted(train.tolist() + validation.tolist()) == sorted(expected) and len(validation) == 20
    assert test.tolist() == [starts["test"] + i for i in range(30)]
    assert torch.equal(found.train.labels, train % 10)
    originals = torch.cat([torch.from_numpy(numbered(30, 3, 32, 32, first=first)[0]) for first in (0, 100, 200)])
    assert torch.equal(found.train.images, originals[train // 100 * 30 + train % 100])


@pytest.mark.parametrize("name", ["train_32x32.mat", "extra_32x32.mat", "test_32x32.mat"])
def test_svhn_damaged_and_missing(tmp_path, monkeypatch, name):
    write_svhn(tmp_path, monkeypatch)
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:-100])
    assert f"SVHN: {path} is damaged" in error_line(load_data, "svhn", tmp_path)
    path.unlink()
    line = error_line(load_data, "svhn", tmp_path)
    assert f"SVHN: {path} is missing; run with --download, or put train_32x32.mat" in line


def test_too_few_images_for_the_default_split(tmp_path, monkeypatch):
    write_svhn(tmp_path, monkeypatch)
    assert "--validation must be 1 to 59" in error_line(load_data, "svhn", tmp_path)


def write_fashion(folder, compress, train=60, test=20):
    """The four idx files."""
    folder.mkdir(parents=True, exist_ok=True)
    for part, n, first in (("train", train, 0), ("t10k", test, 1000)):
        images, labels = numbered(n, 1, 28, 28, first=first)
        for kind, array in (("images-idx3", images[:, 0]), ("labels-idx1", labels.astype(np.uint8))):
            content = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, dtype=">i4").tobytes() + array.tobytes()
            name = f"{part}-{kind}-ubyte"
            if compress:
                (folder / f"{name}.gz").write_bytes(gzip.compress(content))
            else:
                (folder / name).write_bytes(content)


@pytest.mark.parametrize("place", ["FashionMNIST/raw", ".", "debian"])
@pytest.mark.parametrize("compress", [True, False])
def test_fashion(tmp_path, monkeypatch, place, compress):
    monkeypatch.setattr(data, "DEBIAN_FASHION", tmp_path / "debian")
    write_fashion(tmp_path / place, compress)
    found = load_data("fashion", tmp_path, validation=10)
    train = numbers(found.train, border=2)
    assert sorted(train.tolist() + numbers(found.validation).tolist()) == list(range(60))
    assert torch.equal(found.train.images[:, :, 2:-2, 2:-2], torch.from_numpy(numbered(60, 1, 28, 28)[0])[train])
    assert torch.equal(found.train.labels, train % 10)
    assert numbers(found.test).tolist() == list(range(1000, 1020)) and found.class_names[9] == "Ankle boot"


@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("damage", [lambda content: content[:-5], lambda content: b"", lambda content: b"<html>" * 9])
def test_fashion_damaged(tmp_path, name, compress, damage):
    write_fashion(tmp_path, compress)
    path = tmp_path / (f"{name}.gz" if compress else name)
    path.write_bytes(damage(path.read_bytes()))
    assert error_line(load_data, "fashion", tmp_path).startswith(f"cannot read {path} (")


def test_fashion_missing_and_download(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "DEBIAN_FASHION", tmp_path / "debian")
    write_fashion(tmp_path, compress=True)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
    line = error_line(load_data, "fashion", tmp_path)
    for words in (f"Fashion-MNIST is in none of {tmp_path}/FashionMNIST/raw, {tmp_path}, {tmp_path}/debian",
                  "t10k-labels-idx1-ubyte", "--download", "dataset-fashion-mnist"):
        assert words in line

    def fail(url, **options):
        raise URLError("no network")

    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", fail)
    assert "no network" in error_line(load_data, "fashion", tmp_path, download=True)

    def download(url, download_root, **options):
        write_fashion(tmp_path / "FashionMNIST" / "raw", compress=False)

    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", download)
    assert len(load_data("fashion", tmp_path, validation=10, download=True).train) == 50


@pytest.mark.skipif(not DEBIAN_FASHION.is_dir(), reason="needs Debian's package dataset-fashion-mnist")
def test_fashion_of_debian(tmp_path):
    found = load_data("fashion", tmp_path)
    assert [len(s) for s in (found.train, found.validation, found.test)] == [55_000, 5_000, 10_000]
    assert found.test.labels.bincount().tolist() == [1000] * 10
    assert found.mean.item() / 255 == pytest.approx(0.286, abs=1e-3)  # the data set's known mean


# Folders of images


COLOURS = {"blue": (10, 20, 200), "green": (30, 180, 40), "red": (220, 50, 60)}


def write_folder(folder, classes=COLOURS, n=10, size=(12, 20)):
    for name in classes:
        (folder / name).mkdir(parents=True)
        for i in range(n):
            Image.new("RGB", size, COLOURS[name]).save(folder / name / f"{i}.png")


def test_folder(tmp_path):
    write_folder(tmp_path)
    found, other = load_data(str(tmp_path), image_size=16, seed=1), load_data(str(tmp_path), image_size=16, seed=2)
    assert found.class_names == ("blue", "green", "red") and found.augmentation == Augmentation(True, 2, 8)
    assert [len(s) for s in (found.train, found.validation, found.test)] == [22, 2, 6]
    assert found.test.images.shape == (6, 3, 16, 16) and found.test.labels.bincount().tolist() == [2, 2, 2]
    colours = torch.tensor(list(COLOURS.values()), dtype=torch.uint8)  # in the order of the labels
    assert torch.equal(found.test.images, colours[found.test.labels][:, :, None, None].expand(-1, 3, 16, 16))
    assert torch.equal(found.train.images[:, :, 9, 9], colours[found.train.labels])
    assert torch.equal(found.test.images, other.test.images)
    assert not torch.equal(found.train.labels, other.train.labels)


def test_folder_with_a_test_split(tmp_path):
    write_folder(tmp_path / "train", n=10)
    write_folder(tmp_path / "test", n=3)
    (tmp_path / "README").write_text("not a folder")
    for place in (tmp_path, tmp_path / "train", tmp_path / "train" / "red"):
        shutil.copytree(tmp_path / "test" / "red", place / ".ipynb_checkpoints")
    (tmp_path / "train" / "red" / "._0.png").write_text("what macOS leaves on other disks")
    found = load_data(str(tmp_path), validation=6)
    assert [len(s) for s in (found.train, found.validation, found.test)] == [24, 6, 9]
    assert found.height == 32 and found.num_classes == 3


def test_folder_of_other_image_modes(tmp_path):
    write_folder(tmp_path, n=4)
    Image.new("RGBA", (5, 5), (1, 2, 3, 4)).save(tmp_path / "red" / "with_alpha.PNG")
    Image.new("L", (50, 40), 9).save(tmp_path / "red" / "grey.jpg")
    assert len(load_data(str(tmp_path)).test) == 3


def test_images_of_more_than_8_bits_are_refused(tmp_path):
    deep = Image.fromarray(np.full((8, 8), 40_000, dtype=np.uint16))
    assert "mode I;16; accepted are 8-bit images" in error_line(make_data, Listed([deep], [0]), Listed([deep], [0]))
    write_folder(tmp_path)
    deep.save(tmp_path / "red" / "3.png")
    assert f"cannot read the image {tmp_path}/red/3.png (its pixels are of" in error_line(load_data, str(tmp_path))


def test_folders_that_cannot_be_used(tmp_path, monkeypatch):
    folder = tmp_path / "images"
    folder.mkdir()
    assert f"Couldn't find any class folder in {folder}." in error_line(load_data, str(folder))

    write_folder(folder, ["red"])
    assert f"{folder} has only one class, 'red'" in error_line(load_data, str(folder))

    (folder / "green").mkdir()
    (folder / "green" / "notes.txt").write_text("no image")
    line = error_line(load_data, str(folder))
    assert f"{folder}: Found no valid file for the classes green." in line and "FOLDER/<class>/<image>" in line

    Image.new("RGB", (9, 9)).save(folder / "green" / "a.png")
    assert f"{folder}: a fifth of the images is held out for the test, and that is all that green has" in error_line(
        load_data, str(folder))
    Image.new("RGB", (9, 9)).save(folder / "green" / "b.png")
    content = (folder / "red" / "3.png").read_bytes()
    for damaged in (content[:len(content) // 2], content[:20], b"", b"nothing"):
        (folder / "red" / "3.png").write_bytes(damaged)
        assert f"cannot read the image {folder}/red/3.png (" in error_line(load_data, str(folder))
    (folder / "red" / "3.png").write_bytes(content)
    assert len(load_data(str(folder)).test) == 3
    assert "cannot be resized to 7 pixels" in error_line(load_data, str(folder), image_size=7)

    def refuse(path):  # as a folder without permission does, but for the superuser too
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(type(folder), "iterdir", refuse)
    assert f"cannot read the folder {folder} (Permission denied)" in error_line(load_data, str(folder))


def test_folder_splits_with_different_classes(tmp_path):
    write_folder(tmp_path / "train", ["red", "green"])
    write_folder(tmp_path / "test", ["red", "blue"])
    assert "same classes; only one of them has blue, green" in error_line(load_data, str(tmp_path))


@pytest.mark.parametrize("parts", [["train", "val"], ["train", "test", "valid"], ["train"], ["Test", "Train"],
                                   ["red", "test", "train"]])
def test_a_split_is_not_taken_for_a_class(parts, tmp_path):
    for part in parts:
        write_folder(tmp_path / part, ["red", "green"])
    line = error_line(load_data, str(tmp_path))
    assert f"{tmp_path} has the subfolders {', '.join(sorted(parts))}; accepted are" in line and "FOLDER/test" in line


def test_a_class_may_be_called_train(tmp_path):
    write_folder(tmp_path, ["red", "green"])
    (tmp_path / "red").rename(tmp_path / "train")
    assert load_data(str(tmp_path)).class_names == ("green", "train")
