"""Splits and their statistics, data sets of one's own, and the digits."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from augmentation import Augmentation, normalize
from data import DataError, load_data, make_data


def numbered(n, channels=3, height=8, width=8, first=0):
    """n random images with their number in two corners; the label is its last digit."""
    shape = n, channels, height, width
    images = np.random.default_rng(first).integers(0, 256, shape, dtype=np.uint8)
    number = np.arange(first, first + n)
    images[:, 0, 0, 0], images[:, 0, -1, -1] = number % 256, number // 256
    return images, number % 10


def numbers(image_set, border=0):
    """The numbers of `numbered` images that have a border."""
    first, last = (image_set.images[:, 0, i, i].long() for i in (border, -1 - border))
    return first + 256 * last


def error_line(call, *arguments, **options):
    with pytest.raises(DataError) as error:
        call(*arguments, **options)
    line = str(error.value)
    assert line and "\n" not in line
    return line


def custom(seed=0, n=200, **options):
    options = {"augmentation": "flip shift=2 cutout=3", **options}
    return make_data(numbered(n), numbered(50, first=1000), seed=seed, **options)


@pytest.mark.parametrize("train_on_all", [False, True])
def test_splits_are_disjoint_and_complete(train_on_all):
    found = custom(validation=30, train_on_all=train_on_all)
    sets = found.train, found.validation, found.test
    train, validation, test = parts = [numbers(s, b) for s, b in zip(sets, (2, 0, 0), strict=True)]
    held_out = [] if train_on_all else validation.tolist()
    assert sorted(train.tolist() + held_out) == list(range(200)) and len(validation) == 30
    assert test.tolist() == list(range(1000, 1050))
    for image_set, number in zip(sets, parts, strict=True):
        assert torch.equal(image_set.labels, number % 10) and image_set.images.dtype == torch.uint8
    original = torch.from_numpy(numbered(200)[0])
    inner = found.train.images[:, :, 2:-2, 2:-2]
    assert torch.equal(found.validation.images, original[validation])
    assert torch.equal(inner, original[train]) and found.train.images.shape[2:] == (12, 12)
    assert found.train.images.sum() == inner.sum()  # the border is zero
    # Sec. 4.1: the statistics are those of the training images.
    torch.testing.assert_close(found.mean, inner.double().mean((0, 2, 3)).float())
    torch.testing.assert_close(found.std, inner.double().std((0, 2, 3), correction=0).float())
    batch = normalize(inner, found.mean, found.std)
    assert batch.mean((0, 2, 3)).abs().max() < 1e-5
    assert (batch.var((0, 2, 3)) - 1).abs().max() < 1e-3


def test_properties():
    options = dict(name="mine", augmentation=Augmentation(shift=1), label_noise=0.5)
    found = make_data(numbered(40, 2, 5, 9), numbered(20, 2, 5, 9), **options)
    assert (found.channels, found.height, found.width, found.num_classes) == (2, 5, 9, 10)
    assert found.name == "mine" and found.class_names == tuple("0123456789")
    assert len(found.validation) == 10  # a tenth, but one of each class
    moved = found.to("meta")
    sets = moved.train, moved.validation, moved.test
    tensors = [t for s in sets for t in (s.images, s.labels)]
    assert all(t.is_meta for t in (moved.mean, moved.std, moved.clean_labels, *tensors))
    for image_set in (*sets, found.train, found.validation, found.test):
        assert image_set.images.is_contiguous(memory_format=torch.channels_last)
    assert (moved.class_names, moved.augmentation) == (found.class_names, found.augmentation)
    grey = np.full((20, 1, 4, 4), 77, dtype=np.uint8), np.arange(20) % 2
    found = make_data(grey, grey)  # a channel of one colour becomes 0
    assert not normalize(found.test.images, found.mean, found.std).any()


def test_splits_depend_on_the_seed_alone():
    state, torch_state = np.random.get_state()[1].copy(), torch.get_rng_state()
    one, same, other = (custom(seed, enlarge=3, label_noise=0.4) for seed in (5, 5, 6))
    assert one.digest() == same.digest() != other.digest()
    assert set(numbers(one.train, 2).tolist()) != set(numbers(other.train, 2).tolist())
    assert torch.equal(one.test.images, other.test.images)
    assert (np.random.get_state()[1] == state).all()
    assert torch.equal(torch.get_rng_state(), torch_state)
    small, large = (custom(limit=limit, validation=20) for limit in (50, 150))
    assert (len(small.train), len(small.validation), len(small.test)) == (30, 20, 50)
    assert set(numbers(small.train, 2).tolist()) < set(numbers(large.train, 2).tolist())
    assert len(custom(limit=50, validation=20, train_on_all=True).train) == 50


@pytest.mark.parametrize("counts", [(100, 100, 40), (50, 50, 2), (2, 2, 2), (97, 3, 11)])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_each_class_has_its_share_of_each_part(counts, share):
    labels = np.random.default_rng(1).permutation(np.repeat(np.arange(3), counts))
    pair = np.zeros((len(labels), 1, 4, 4), dtype=np.uint8), labels
    for seed, limit in np.ndindex(5, 2):
        limit = max(6, sum(counts) // (1 + limit))
        validation = min(max(3, round(limit * share)), limit - 3)
        found = make_data(pair, pair, seed=seed, limit=limit, validation=validation)
        held_out = found.validation.labels.bincount(minlength=3)
        used = held_out + found.train.labels.bincount(minlength=3)
        assert (used.sum(), held_out.sum()) == (limit, validation)
        assert held_out.min() >= 1 and (used - held_out).min() >= 1
        assert ((used - torch.tensor(counts) * limit / sum(counts)).abs() <= 2).all()
        assert ((held_out - used * validation / limit).abs() <= 2).all()


def test_enlarged_validation_images():
    plain, found = custom(validation=30), custom(validation=30, enlarge=4, label_noise=0.5)
    noisy = custom(validation=30, label_noise=0.5).validation.labels  # copies share a wrong label
    assert torch.equal(found.validation.labels, noisy.repeat(4))
    copies = found.validation.images.view(4, 30, 3, 8, 8)
    assert all(not torch.equal(copies[i], copies[j]) for i in range(4) for j in range(i))
    # Image 7 flipped and shifted by up to 2, each 3x3 square set to the mean.
    candidates, mean = set(), found.mean.round().byte()[:, None, None]
    padded = torch.nn.functional.pad(plain.validation.images[7], (2, 2, 2, 2))
    for dy, dx, y, x, flip in np.ndindex(5, 5, 8, 8, 2):
        cut = padded[:, dy:dy + 8, dx:dx + 8].flip([2] * flip).clone()
        cut[:, max(0, y - 1):y + 2, max(0, x - 1):x + 2] = mean
        candidates.add(cut.numpy().tobytes())
    assert {copy.contiguous().numpy().tobytes() for copy in copies[:, 7]} <= candidates
    unchanged = custom(validation=30, enlarge=2, augmentation="none").validation.images
    assert torch.equal(unchanged, plain.validation.images.repeat(2, 1, 1, 1))


class Listed(torch.utils.data.Dataset):
    """Pairs of an image and a label; a function may give item 13 or raise an error."""

    def __init__(self, images, labels, item_13=None):
        self.images, self.labels, self.item_13 = images, labels, item_13

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.item_13() if self.item_13 and i == 13 else (self.images[i], self.labels[i])


def test_every_kind_of_source_gives_the_same_data():
    images, labels = numbered(40)
    tensors = torch.from_numpy(images), torch.from_numpy(labels)
    pictures = [Image.fromarray(image.transpose(1, 2, 0)) for image in images]
    sources = [
        (images, labels), [images, labels.astype(np.uint8)], tensors,
        (images[:, :, ::-1].copy()[:, :, ::-1], labels),  # negative strides
        (tensors[0].float() / 255, labels.tolist()),
        Listed(*tensors), Listed(pictures, labels), list(zip(pictures, labels, strict=True)),
        Listed(tensors[0].double() / 255, labels[:, None]),  # each label of shape (1,)
        Listed(images, tensors[1][:, None]),
    ]
    found = [make_data(source, source) for source in sources]
    assert len({data.digest() for data in found}) == 1
    told = ["40 test images of floats rounded to 256 levels" in data.describe() for data in found]
    assert told == [i in (4, 8) for i in range(len(sources))]
    twice = tensors[0].float() / 255 / 255, labels
    assert "channels: 3, values 0 to 1" in make_data(twice, twice).describe()[0]


def test_pictures_of_other_modes():
    images, labels = numbered(20, 1)[0], [0, 1] * 10
    grey = [Image.fromarray(image[0]) for image in images]
    found = make_data(Listed(grey, labels), Listed(grey, labels))
    assert np.array_equal(found.test.images, images)
    palette = [image.convert("RGB").quantize(256) for image in grey]
    palette[5] = Image.new("LA", (8, 8), (0, 51))  # a fifth of black on white
    found = make_data(Listed(palette, labels), Listed(palette, labels))
    colours = np.array(palette[3].convert("RGB")).transpose(2, 0, 1)
    assert np.array_equal(found.test.images[3], colours)
    assert found.test.images[5].unique().tolist() == [204]
    assert "1 test images with transparency laid on white" in found.describe()


def test_class_names():
    source, test = Listed(*numbered(40)), Listed(*numbered(20))
    source.classes = [f"class {i}" for i in range(12)]
    assert make_data(source, test).class_names[11] == "class 11"
    test.classes = source.classes[1:]
    words = "train.classes and test.classes must agree; only one of them has class 0"
    assert words in error_line(make_data, source, test)
    subsets = [torch.utils.data.Subset(Listed(*numbered(40)), range(40)) for _ in range(2)]
    for subset in subsets:
        subset.dataset.classes = np.array([f"class {i}" for i in range(12)])
    assert make_data(*subsets).class_names[11] == "class 11"
    source.classes = test.classes = 12  # no names
    assert make_data(source, test).class_names == tuple("0123456789")
    images, labels = numbered(40)
    gaps = images, labels % 2 * 7
    assert "the labels are 0 to 7, 2 classes in training" in error_line(make_data, gaps, gaps)
    named = make_data(gaps, gaps, class_names=np.array(["no", *"abcdef", "y\ne\udce9s"]))
    assert named.num_classes == 8 and named.class_names[7] == "y\\ne\\udce9s"
    assert "no [18, 2, 20]; a [0, 0, 0]; b" in named.describe()[1]
    words = "1 of 8 classes, first b, have fewer than two training images"
    assert words in error_line(make_data, gaps, (images, labels % 2 * 2), class_names="nabcdefy")


IMAGES, LABELS = GOOD = numbered(40)
STREAMED = type("Streamed", (torch.utils.data.IterableDataset,),
                {"__len__": lambda self: 20, "__iter__": lambda self: iter([])})()
PNG = io.BytesIO()
Image.fromarray(numbered(1, 1, 64, 64)[0][0, 0]).save(PNG, "PNG")


def broken(item_13):
    return Listed(IMAGES, LABELS, item_13)


@pytest.mark.parametrize("train, words", [
    (numbered(20, 1), "training images are (1, 8, 8), but the test images (3, 8, 8)"),
    ((IMAGES, LABELS[:19]), "(tuple): the shapes are (40, 3, 8, 8) and (19,)"),
    ((IMAGES[:, 0], LABELS), "(40, 8, 8)"), ((IMAGES[:0], LABELS[:0]), "(0, 3, 8, 8)"),
    ((IMAGES, LABELS[:, None]), "the shapes are (40, 3, 8, 8) and (40, 1)"),
    (Listed(IMAGES.transpose(0, 2, 3, 1), LABELS), "images (N, channels, height, width)"),
    (Listed(IMAGES.astype(np.int32), LABELS), "item 0: images are torch.int32; they must be uint8"),
    ((IMAGES.astype(np.float32), LABELS), "floats in [0, 1], not yet normalised"),
    ((IMAGES / 255 - 0.5, LABELS), "floats in [0, 1]"), ((IMAGES * np.nan, LABELS), "in [0, 1]"),
    ((IMAGES, LABELS / 2), "the labels torch.float64"), ((IMAGES, LABELS * 1j), "whole numbers"),
    ((IMAGES, list("ab" * 20)), "(tuple): TypeError: can't convert np.ndarray of type numpy.str_"),
    (Listed(IMAGES, LABELS / 2), "item 0: TypeError: 'float' object cannot be"),
    (Listed(IMAGES, list("ab" * 20)), "item 0: TypeError: 'str' object cannot be"),
    (Listed(IMAGES, np.stack([LABELS, LABELS], 1)), "item 0: ValueError"),
    ((IMAGES, LABELS - 1), "the labels are -1 to 9, 10 classes in training; accepted are 0 to 9"),
    ((IMAGES, LABELS * 10**9), "the labels are 0 to 9000000000, 10 classes"),
    ((IMAGES, LABELS * 0), "the labels are 0 to 9, 1 classes in training; accepted are 0 to 0"),
    (numbered(19), "1 of 10 classes, first 9, have fewer than two training images"),
    (Listed([torch.zeros(3, 8, 8), torch.zeros(3, 8, 9)], [0, 1]),
     "item 1: an image of the shape (3, 8, 9), while the first is (3, 8, 8); all must have one"),
    (Listed([], []), "(0,)"), (Listed(["a"], [0]), "item 0: TypeError"),
    (None, "(NoneType): TypeError"), (torch.from_numpy(IMAGES), "(Tensor): item 0: ValueError"),
    ((IMAGES, LABELS, LABELS), "(tuple): item 0"),
    (torch.utils.data.DataLoader(Listed(*GOOD)), "(DataLoader): item 0: TypeError"),
    (STREAMED, "(Streamed): item 0: NotImplementedError"),
    (broken(lambda: {}["label"]), "item 13: KeyError: 'label'; accepted are a pair (images, "),
    (broken(lambda: (Image.open(io.BytesIO(PNG.getvalue()[:900])), 1)), "item 13: OSError: "),
    (broken(lambda: (Image.open(io.BytesIO(b"")), 1)), "item 13: UnidentifiedImageError"),
    (broken(lambda: (Image.new("I;16", (8, 8)), 1)), "item 13: it has more than 8 bits a channel"),
])
def test_sources_that_cannot_be_used(train, words):
    assert words in error_line(make_data, train, GOOD)
    if "item" in words or "shapes" in words:
        assert error_line(make_data, GOOD, train).startswith("the test data (")


ONE_CLASS = IMAGES, LABELS * 0
NO_DATA = "no data set or folder is called '{}', did you mean '{}'?; accepted are digits, fashion, "


@pytest.mark.parametrize("call, words", [
    (lambda: make_data(ONE_CLASS, ONE_CLASS), "two classes or more"),
    (lambda: custom(validation=9),
     "--validation must be 10 to 190, not 9: of 200 images, each of 10 classes needs one"),
    (lambda: custom(validation=191), "--validation must be 10 to 190, not 191"),
    (lambda: custom(validation=50, limit=50), "--validation must be 10 to 40"),
    (lambda: custom(limit=201), "--limit must be 20 to 200"),
    (lambda: custom(limit=19), "--limit must be 20 to 200, not 19"),
    (lambda: custom(augmentation="shift=8"), "at most as large, not 'shift=8'"),
    (lambda: load_data("fashon"), NO_DATA.format("fashon", "fashion")),
    (lambda: load_data("CIFAR-10"), NO_DATA.format("CIFAR-10", "cifar10")),
    (lambda: load_data("~nobody/such"), "called '~nobody/such'; accepted are digits, "),
    (lambda: load_data("digits", "~nobodyelse/x"), "--data-root ~nobodyelse/x: "),
])
def test_other_mistakes(call, words):
    assert words in error_line(call)


def test_digits():
    options = dict(validation=240, enlarge=4, augmentation="shift=1")
    found, other = load_data("digits", seed=1, **options), load_data("digits", seed=2)
    assert [len(s) for s in (found.train, found.validation, found.test)] == [1197, 960, 360]
    assert (found.channels, found.height, found.width, found.num_classes) == (1, 8, 8, 10)
    assert found.train.images.max() == 255 and found.train.images.shape == (1197, 1, 10, 10)
    assert torch.equal(found.test.images, other.test.images)
    assert other.augmentation == Augmentation()
    assert found.test.labels.bincount().tolist() == pytest.approx([36] * 10, abs=1)  # stratified
