"""Splits and their statistics, data sets of one's own, and the digits."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from data import DATASETS, Augmentation, DataError, load_data, make_data, normalize


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
    ({"validation": 9}, "--validation must be 10 to 190, so that of 200 images each of 10 classes has one in"),
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
    (GOOD, None, "the test data are NoneType; accepted are a pair (images, labels), and a map-style"),
    (torch.from_numpy(IMAGES), GOOD, "the training data are Tensor"),
    ((IMAGES, LABELS, LABELS), GOOD, "the training data are tuple"),
    (torch.utils.data.DataLoader(Listed(*GOOD)), GOOD, "the training data are DataLoader"),
    (Streamed(), GOOD, "the training data are Streamed; accepted are a pair"),
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
