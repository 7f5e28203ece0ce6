"""Readers, splits and batches of data.py. Published formats are read from small files that are written here."""

import gzip
import hashlib
import io
import pickle
from urllib.error import URLError

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image
from torchvision.datasets import CIFAR10, SVHN

import published
from data import (
    DATASETS,
    Augmentation,
    DataError,
    data_set,
    draw_augmentation,
    load_data,
    make_batch,
    make_data,
    normalize,
    parse_augmentation,
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


@pytest.mark.parametrize("text, expected", [
    ("none", Augmentation()), ("flip", Augmentation(flip=True)), ("Shift, flip", Augmentation(True, 4)),
    ("flip shift cutout", Augmentation(True, 4, 16)), ("cutout", Augmentation(cutout=16)),
])
def test_an_augmentation_as_text(text, expected):
    assert parse_augmentation(text, 32) == data_set("cifar10", 64, text).augmentation == expected


@pytest.mark.parametrize("text", ["", "flop", "none flip", "flip rotate"])
def test_a_text_that_is_no_augmentation(text):
    assert f"must be none, or some of flip, shift and cutout, not {text!r}" in error_line(parse_augmentation, text, 32)


@pytest.mark.parametrize("augmentation", [dict(flip=0.5), dict(shift=-1), dict(shift=1.5), dict(cutout=-3)])
def test_augmentations_that_cannot_be(augmentation):
    assert "flip must be True or False, shift and cutout whole numbers" in error_line(Augmentation, **augmentation)
    for value in (augmentation, Augmentation(shift=8)):
        assert "a data.Augmentation whose shift is below the height and width" in error_line(
            make_data, numbered(20), numbered(20), augmentation=value)


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
    everything = custom(validation=30, train_on_all=True)
    assert torch.equal(validation, numbers(everything.validation))
    assert sorted(numbers(everything.train, 2).tolist()) == list(range(200))


def test_properties():
    found = make_data(numbered(40, 2, 5, 9), numbered(20, 2, 5, 9), name="mine", augmentation=Augmentation(shift=1))
    assert (found.channels, found.height, found.width, found.num_classes) == (2, 5, 9, 10)
    assert found.name == "mine" and found.class_names == tuple("0123456789")
    assert len(found.validation) == 10  # a tenth, but one of each class
    moved = found.to("meta")
    sets = [moved.train, moved.validation, moved.test]
    assert all(t.is_meta for t in [moved.mean, moved.std, *(s.images for s in sets), *(s.labels for s in sets)])
    assert moved.train.images.is_contiguous(memory_format=torch.channels_last)
    assert moved.class_names == found.class_names and moved.augmentation == found.augmentation


def test_splits_depend_on_the_seed_alone():
    state, torch_state = np.random.get_state()[1].copy(), torch.get_rng_state()
    one, same, other = custom(5, enlarge=3), custom(5, enlarge=3), custom(6, enlarge=3)
    assert one.digest() == same.digest() != other.digest()
    assert set(numbers(one.train, 2).tolist()) != set(numbers(other.train, 2).tolist())
    assert torch.equal(one.test.images, other.test.images)
    assert (np.random.get_state()[1] == state).all() and torch.equal(torch.get_rng_state(), torch_state)


def test_limit():
    small, large = custom(limit=50, validation=20), custom(limit=150, validation=20)
    assert (len(small.train), len(small.validation), len(small.test)) == (30, 20, 50)
    assert set(numbers(small.train, 2).tolist()) < set(numbers(large.train, 2).tolist())
    assert set(numbers(custom(1, limit=50).train, 2).tolist()) != set(numbers(small.train, 2).tolist())
    assert len(custom(limit=50, validation=20, train_on_all=True).train) == 50


@pytest.mark.parametrize("counts", [(100, 100, 40), (50, 50, 2), (2, 2, 2), (97, 3, 11), (400, 30, 7)])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_each_class_has_its_share_of_each_part(counts, share):
    labels = np.random.default_rng(1).permutation(np.repeat(np.arange(3), counts))
    images = np.zeros((len(labels), 1, 4, 4), dtype=np.uint8)
    for seed in range(5):
        for limit in {max(6, sum(counts) // 2), sum(counts)}:
            validation = min(max(3, round(limit * share)), limit - 3)
            found = make_data((images, labels), (images, labels), seed=seed, limit=limit, validation=validation)
            held_out = found.validation.labels.bincount(minlength=3)
            used = held_out + found.train.labels.bincount(minlength=3)
            assert (used.sum(), held_out.sum()) == (limit, validation)
            assert held_out.min() >= 1 and (used - held_out).min() >= 1
            shares = torch.tensor(counts) * limit / sum(counts)
            assert ((used - shares).abs() <= 2).all() and ((held_out - used * validation / limit).abs() <= 2).all()


@pytest.mark.parametrize("options, words", [
    ({"validation": 9}, "--validation must be 10 to 190, as there are 200 training images and each of 10 classes"),
    ({"validation": 191}, "--validation must be 10 to 190"),
    ({"validation": 50, "limit": 50}, "--validation must be 10 to 40"),
    ({"limit": 201}, "--limit must be 20 to 200"), ({"limit": 19}, "--limit must be 20 to 200"),
    ({"enlarge": 0}, "--enlarge must be 1 or more"),
])
def test_splits_that_make_no_sense(options, words):
    assert words in error_line(custom, **options) and str([*options.values()][-1]) in error_line(custom, **options)


def test_enlarged_validation_images():
    plain, found = custom(validation=30), custom(validation=30, enlarge=4)
    assert found.validation.images.shape == (120, 3, 8, 8) and found.validation.images.dtype == torch.uint8
    assert torch.equal(found.validation.labels, plain.validation.labels.repeat(4))
    copies = found.validation.images.view(4, 30, 3, 8, 8)
    assert all(not torch.equal(copies[i], copies[j]) for i in range(4) for j in range(i))
    mean = found.mean.round().to(torch.uint8)
    for copy in copies[:, 7]:
        assert any(torch.equal(copy, candidate) for candidate in augmented(plain.validation.images[7], mean))
    unchanged = custom(validation=30, enlarge=2, augmentation=Augmentation()).validation.images
    assert torch.equal(unchanged, plain.validation.images.repeat(2, 1, 1, 1))


def augmented(image, mean):
    """Every flip and shift by up to 2 with every 3x3 square set to the mean, of an image (C, 8, 8)."""
    padded = torch.nn.functional.pad(image, (2, 2, 2, 2))
    for dy, dx, y, x in np.ndindex(5, 5, 8, 8):
        for shifted in (padded[:, dy:dy + 8, dx:dx + 8], padded[:, dy:dy + 8, dx:dx + 8].flip(2)):
            cut = shifted.clone()
            cut[:, max(0, y - 1):y + 2, max(0, x - 1):x + 2] = mean[:, None, None]
            yield cut


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


# Data sets of one's own


class Listed(torch.utils.data.Dataset):
    def __init__(self, images, labels):
        self.images, self.labels = images, labels

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.images[i], self.labels[i]


class Streamed(torch.utils.data.IterableDataset):
    def __len__(self):
        return 20

    def __iter__(self):
        return iter([])


class Raising(Listed):
    """Its item 13 is what a function gives, or raises."""

    def __init__(self, item):
        super().__init__(*numbered(40))
        self.item = item

    def __getitem__(self, i):
        return self.item() if i == 13 else super().__getitem__(i)


def test_every_kind_of_source_gives_the_same_data():
    images, labels = numbered(40)
    sources = [
        (images, labels),
        (images[:, :, ::-1].copy()[:, :, ::-1], labels),  # negative strides
        (torch.from_numpy(images), torch.from_numpy(labels).int()),
        (torch.from_numpy(images).float() / 255, labels.tolist()),
        Listed(torch.from_numpy(images), torch.from_numpy(labels)),
        Listed(torch.from_numpy(images).double() / 255, labels[:, None]),  # each label of shape (1,)
        Listed(images, torch.from_numpy(labels)[:, None]),
        Listed([Image.fromarray(image.transpose(1, 2, 0)) for image in images], labels),
    ]
    assert len({make_data(source, source).digest() for source in sources}) == 1


def test_pictures_of_other_modes_in_a_data_set():
    grey = [Image.fromarray(image[0]) for image in numbered(20, 1)[0]]
    assert torch.equal(make_data(Listed(grey, [0, 1] * 10), Listed(grey, [0, 1] * 10)).test.images,
                       torch.from_numpy(numbered(20, 1)[0]))
    palette = [image.convert("RGB").quantize(256) for image in grey]
    palette[5] = Image.new("LA", (8, 8), (0, 51))  # a fifth of black on white
    found = make_data(Listed(palette, [0, 1] * 10), Listed(palette, [0, 1] * 10))
    assert (found.test.images[3].numpy() == np.array(palette[3].convert("RGB")).transpose(2, 0, 1)).all()
    assert found.test.images[5].unique().tolist() == [204] and found.test.images.shape == (20, 3, 8, 8)
    assert "1 test images with transparency laid on white" in found.describe()


def test_class_names():
    source = Listed(*numbered(40))
    source.classes = [f"class {i}" for i in range(12)]
    found = make_data(source, source)
    assert found.num_classes == 12 and found.class_names[11] == "class 11"
    test = Listed(*numbered(20))
    test.classes = source.classes[1:]
    assert "train.classes and test.classes must be the same; only one of them has class 0" in error_line(
        make_data, source, test)
    source.classes = 12  # no names
    assert make_data(source, source).class_names == tuple("0123456789")
    images, labels = numbered(40)
    with_gaps = (images, labels % 2 * 7)
    assert "the labels are 0 to 7, and 2 classes are in the training data" in error_line(
        make_data, with_gaps, with_gaps)
    named = make_data(with_gaps, with_gaps, class_names=["no", *"abcdef", "y\ne\udce9s"])
    assert named.num_classes == 8 and named.class_names[7] == "y\\ne\\udce9s"
    assert "a [0, 0, 0]" in named.describe()[1] and "no [18, 2, 20]" in named.describe()[1]


IMAGES, LABELS = numbered(40)
GOOD = (IMAGES, LABELS)
PNG = io.BytesIO()
Image.fromarray(numbered(1, 1, 64, 64)[0][0, 0]).save(PNG, "PNG")


@pytest.mark.parametrize("train, test, words", [
    (GOOD, numbered(20, 1), "training images are (3, 8, 8), the test images (1, 8, 8)"),
    ((IMAGES, LABELS[:19]), GOOD, "the training data: the shapes are (40, 3, 8, 8) and (19,)"),
    ((IMAGES[:, 0], LABELS), GOOD, "the shapes are (40, 8, 8)"),
    ((IMAGES[:0], LABELS[:0]), GOOD, "(0, 3, 8, 8)"),
    (GOOD, (IMAGES, LABELS[:, None]), "the test data: the shapes are (40, 3, 8, 8) and (40, 1)"),
    ((IMAGES.astype(np.int64), LABELS), GOOD, "images are torch.int64; accepted are uint8"),
    ((IMAGES.astype(np.float32), LABELS), GOOD, "floats in [0, 1]"),
    ((IMAGES / 255 - 0.5, LABELS), GOOD, "not yet normalised"),
    (((IMAGES / 255) * np.nan, LABELS), GOOD, "floats in [0, 1]"),
    ((IMAGES, LABELS / 2), GOOD, "the labels torch.float64; accepted are"),
    ((IMAGES, LABELS - 1), GOOD, "the labels are -1 to 9, and 10 classes are in the training data; accepted are 0 to 9"),
    ((IMAGES, LABELS + 1), (IMAGES, LABELS + 1), "the labels are 1 to 10, and 10 classes"),
    (GOOD, (IMAGES, LABELS + 1), "the labels are 0 to 10, and 10 classes"),
    ((IMAGES, LABELS * 0), (IMAGES, LABELS * 0), "at least two classes, not 1"),
    (numbered(19), GOOD, "1 of 10 classes have too few images, first 9, with 1 for training; 2 are needed"),
    (Listed([torch.zeros(3, 8, 8), torch.zeros(3, 8, 9)], [0, 1]), GOOD, "item 1: its shape is (3, 8, 9)"),
    (Listed(torch.zeros(2, 8, 8), [0, 1]), GOOD, "(2, 8, 8)"),
    (Listed(IMAGES.astype(np.int32), LABELS), GOOD, "item 0: images are torch.int32"),
    (Listed([], []), GOOD, "(0,)"),
    ((IMAGES, LABELS * 10**9), GOOD, "the labels are 0 to 9000000000, and 10 classes"),
    ((IMAGES, list("ab" * 20)), GOOD, "the training data: TypeError: can't convert np.ndarray of type numpy.str_"),
    ((IMAGES, torch.from_numpy(LABELS).to(torch.complex64)), GOOD, "whole numbers"),
    (Listed(IMAGES, LABELS / 2), GOOD, "the training data: item 0: TypeError: 'float' object cannot be"),
    (Listed(IMAGES, list("ab" * 20)), GOOD, "item 0: TypeError: 'str' object cannot be"),
    (Listed(IMAGES, np.stack([LABELS, LABELS], 1)), GOOD, "item 0: ValueError"),
    (Listed(["a"], [0]), GOOD, "item 0: TypeError"),
    (GOOD, None, "the test data: accepted are a pair (images, labels), and a map-style Dataset"),
    (torch.from_numpy(IMAGES), GOOD, "not Tensor"),
    ((IMAGES, LABELS, LABELS), GOOD, "not tuple"),
    (torch.utils.data.DataLoader(Listed(*GOOD)), GOOD, "not DataLoader"),
    (Streamed(), GOOD, "the training data: accepted are a pair (images, labels), and a map-style Dataset"),
    ((IMAGES.transpose(0, 2, 3, 1), LABELS), GOOD, "(40, 8, 8, 3) and (40,)"),
    (Listed(IMAGES.transpose(0, 2, 3, 1), LABELS), GOOD, "not channels last"),
    (GOOD, Raising(lambda: {}["label"]), "the test data: item 13: KeyError: 'label'"),
    (Raising(lambda: (int("seven"), 1)), GOOD, "item 13: ValueError: invalid literal for int() with base 10: 'seven'"),
    (Raising(lambda: (Image.open(io.BytesIO(PNG.getvalue()[:900])), 1)), GOOD, "item 13: OSError: "),
    (Raising(lambda: (Image.open(io.BytesIO(b"")), 1)), GOOD, "item 13: UnidentifiedImageError"),
    (Raising(lambda: (Image.new("I;16", (8, 8)), 1)), GOOD, "item 13: it has more than 8 bits a channel"),
])
def test_sources_that_cannot_be_used(train, test, words):
    assert words in error_line(make_data, train, test)


# Published data sets


def test_defaults():
    assert {name: (s.validation, s.enlarge, s.augmentation) for name, s in DATASETS.items()} == {
        "digits": (240, 4, Augmentation(shift=1)),
        "fashion": (5_000, 1, Augmentation(flip=True, shift=2, cutout=8)),
        "cifar10": (1_250, 20, Augmentation(flip=True, shift=4, cutout=16)),  # 1,250 enlarged to 25,000, Sec. 4.1
        "svhn": (30_000, 1, Augmentation()),  # Sec. 4.2
    }


def test_digits():
    found, other = load_data("digits", seed=1), load_data("digits", seed=2, augmentation="none")
    assert [len(s) for s in (found.train, found.validation, found.test)] == [1197, 960, 360]
    assert (found.channels, found.height, found.width, found.num_classes) == (1, 8, 8, 10)
    assert found.train.images.max() == 255 and found.train.images.shape == (1197, 1, 10, 10)
    assert torch.equal(found.test.images, other.test.images) and other.augmentation == Augmentation()
    assert found.digest() != other.digest()
    assert found.test.labels.bincount().tolist() == pytest.approx([36] * 10, abs=1)  # stratified
    assert len(load_data("digits", train_on_all=True).train) == 1437


@pytest.mark.parametrize("name, nearest", [("fashon", "fashion"), ("CIFAR-10", "cifar10"), ("~nobody/such", None)])
def test_unknown_name(name, nearest):
    line = error_line(load_data, name)
    assert line.startswith(f"no data set or folder is called '{name}'") and "digits, fashion, cifar10, svhn" in line
    assert (f"did you mean '{nearest}'?" in line) == bool(nearest)
    assert "--data-root ~nobodyelse/x: there is no such user" in error_line(load_data, "digits", "~nobodyelse/x")


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
        content = {"batch_label": f"batch {b}", "labels": labels.tolist(), "data": images.reshape(per_batch, 3072)}
        listed.append([name, write(name, content)])
    names = [f"name {i}" for i in range(10)]
    meta = write("batches.meta", {"label_names": names, "num_cases_per_batch": per_batch, "num_vis": 3072})
    monkeypatch.setattr(CIFAR10, "train_list", listed[:5])
    monkeypatch.setattr(CIFAR10, "test_list", listed[5:])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": meta})
    return folder


def test_cifar10(tmp_path, monkeypatch):
    folder = write_cifar10(tmp_path, monkeypatch)
    found = load_data("cifar10", tmp_path, validation=10, enlarge=1)
    train = numbers(found.train, border=4)
    originals = torch.cat([torch.from_numpy(numbered(20, 3, 32, 32, first=20 * b)[0]) for b in range(6)])
    assert torch.equal(found.train.images[:, :, 4:-4, 4:-4], originals[train])
    assert torch.equal(found.train.labels, train % 10)
    assert sorted(train.tolist() + numbers(found.validation).tolist()) == list(range(100))
    assert torch.equal(found.test.images, originals[100:]) and found.class_names[3] == "name 3"
    (folder / "data_batch_3").write_bytes((folder / "data_batch_3").read_bytes()[:-100])
    line = error_line(load_data, "cifar10", tmp_path)
    assert line.startswith("CIFAR-10: Dataset not found or corrupted.") and "unpack cifar-10-python.tar.gz" in line
    assert line.endswith(f"into {tmp_path}; --data-root or EPBT_DATA name another folder")


def test_cifar10_defaults(tmp_path, monkeypatch):
    write_cifar10(tmp_path, monkeypatch, per_batch=254)
    monkeypatch.setenv("EPBT_DATA", str(tmp_path))
    found = load_data("cifar10")
    assert found.validation.images.shape == (25_000, 3, 32, 32) and found.train.images.shape == (20, 3, 40, 40)


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


def test_svhn(tmp_path, monkeypatch):
    """The three .mat files as published: X (32, 32, 3, N), y (N, 1) with 10 for the digit 0."""
    split_list = {}
    for first, (split, (url, name, _)) in zip((0, 100, 200), SVHN.split_list.items(), strict=True):
        images, labels = numbered(30, 3, 32, 32, first=first)
        labels = np.where(labels == 0, 10, labels).astype(np.uint8)[:, None]
        scipy.io.savemat(tmp_path / name, {"X": images.transpose(2, 3, 1, 0), "y": labels}, do_compression=True)
        split_list[split] = [url, name, hashlib.md5((tmp_path / name).read_bytes()).hexdigest()]
    monkeypatch.setattr(SVHN, "split_list", split_list)
    found = load_data("svhn", tmp_path, validation=20)
    train, validation, test = (numbers(s) for s in (found.train, found.validation, found.test))
    starts = {split: 100 * i for i, split in enumerate(SVHN.split_list)}
    expected = [start + i for split, start in starts.items() if split != "test" for i in range(30)]
    assert sorted(train.tolist() + validation.tolist()) == sorted(expected) and len(validation) == 20
    assert test.tolist() == [starts["test"] + i for i in range(30)]
    assert torch.equal(found.train.labels, train % 10)
    originals = torch.cat([torch.from_numpy(numbered(30, 3, 32, 32, first=first)[0]) for first in (0, 100, 200)])
    assert torch.equal(found.train.images, originals[train // 100 * 30 + train % 100])
    assert "--validation must be 10 to 50" in error_line(load_data, "svhn", tmp_path)  # too few for the default
    (tmp_path / "extra_32x32.mat").unlink()
    assert "SVHN: Dataset not found or corrupted." in error_line(load_data, "svhn", tmp_path)


@pytest.fixture
def write_fashion(monkeypatch, tmp_path):
    """Writes the four idx files into a folder, and makes their checksums known."""
    monkeypatch.setattr(published, "DEBIAN_FASHION", tmp_path / "debian")

    def write(folder, compress):
        folder.mkdir(parents=True, exist_ok=True)
        for part, n, first in (("train", 60, 0), ("t10k", 20, 1000)):
            images, labels = numbered(n, 1, 28, 28, first=first)
            for kind, array in (("images-idx3", images[:, 0]), ("labels-idx1", labels.astype(np.uint8))):
                content = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, dtype=">i4").tobytes() + array.tobytes()
                name = f"{part}-{kind}-ubyte"
                monkeypatch.setitem(published.FASHION, name, hashlib.md5(content).hexdigest())
                (folder / (f"{name}.gz" if compress else name)).write_bytes(
                    gzip.compress(content) if compress else content)
    return write


@pytest.mark.parametrize("place", ["FashionMNIST/raw", ".", "debian"])
@pytest.mark.parametrize("compress", [True, False])
def test_fashion(tmp_path, write_fashion, place, compress):
    write_fashion(tmp_path / place, compress)
    found = load_data("fashion", tmp_path, validation=10)
    train = numbers(found.train, border=2)
    assert sorted(train.tolist() + numbers(found.validation).tolist()) == list(range(60))
    assert torch.equal(found.train.images[:, :, 2:-2, 2:-2], torch.from_numpy(numbered(60, 1, 28, 28)[0])[train])
    assert torch.equal(found.train.labels, train % 10)
    assert numbers(found.test).tolist() == list(range(1000, 1020)) and found.class_names[9] == "Ankle boot"


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("damage", [lambda content: content[:-5], lambda content: b"", lambda content: b"<html>" * 9])
def test_fashion_damaged(tmp_path, write_fashion, compress, damage):
    write_fashion(tmp_path, compress)
    path = tmp_path / ("t10k-labels-idx1-ubyte" + ".gz" * compress)
    path.write_bytes(damage(path.read_bytes()))
    assert f"Fashion-MNIST: cannot read {path}: " in error_line(load_data, "fashion", tmp_path)


def test_other_data_under_the_names_of_fashion_mnist(tmp_path, write_fashion, monkeypatch):
    checksums = dict(published.FASHION)
    write_fashion(tmp_path, compress=True)
    monkeypatch.setattr(published, "FASHION", checksums)
    line = error_line(load_data, "fashion", tmp_path)
    assert f"{tmp_path}/train-images-idx3-ubyte.gz: wrong checksum: it is damaged, or of another" in line


def test_fashion_missing_and_download(tmp_path, write_fashion, monkeypatch):
    write_fashion(tmp_path, compress=True)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
    line = error_line(load_data, "fashion", tmp_path)
    for words in (f"missing in each of {tmp_path}/FashionMNIST/raw, {tmp_path}, {tmp_path}/debian",
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


@pytest.mark.skipif(not published.DEBIAN_FASHION.is_dir(), reason="needs Debian's package dataset-fashion-mnist")
def test_fashion_of_debian(tmp_path):
    found = load_data("fashion", tmp_path)
    assert [len(s) for s in (found.train, found.validation, found.test)] == [55_000, 5_000, 10_000]
    assert found.validation.labels.bincount().tolist() == [500] * 10
    assert found.test.labels.bincount().tolist() == [1000] * 10
    assert found.mean.item() / 255 == pytest.approx(0.286, abs=1e-3)  # the data set's known mean
