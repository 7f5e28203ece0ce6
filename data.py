"""Data sets as uint8 tensors: readers, splits, and batched augmentation on the device (Sec. 4).

Every reader, and every data set of your own, goes through `make_data`: the one place where images
are split, the validation images enlarged and the statistics for normalisation taken. Training then
calls `make_batch` of augmentation.py. Folders of images are read by folders.py.
"""

import hashlib
import operator
import os
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import IterableDataset

from augmentation import Augmentation, draw_augmentation, make_batch, parse_augmentation
from augmentation import normalize as normalize  # for those who look for it here
from errors import DataError, nearest, plain, told
from folders import prepared, progress, read_folder, refuse_other_classes
from folders import read_image_folder as read_image_folder
from published import read_cifar10, read_digits, read_fashion, read_svhn

NO_DATASETS = (tuple, list, dict, str, torch.Tensor, np.ndarray, IterableDataset)  # though with items
HOLD_OUT_SEED = 0  # where no test split is published, it is the same for every run
# Random streams of a run's seed that nothing else draws from.
SPLIT, ENLARGE, NOISE = (0xDA7A, 0), (0xDA7A, 1), (0xDA7A, 2)


@dataclass
class ImageSet:
    images: torch.Tensor  # (N, C, H, W) uint8, channels last in memory
    labels: torch.Tensor  # (N,) int64

    def __len__(self):
        return len(self.labels)

    def to(self, device):
        return ImageSet(self.images.to(device), self.labels.to(device))


@dataclass
class Data:
    """A data set as a run uses it. Training images carry `augmentation.shift` zeros on each side."""

    name: str
    class_names: tuple
    train: ImageSet
    validation: ImageSet
    test: ImageSet
    mean: torch.Tensor  # (C,) float32, of the training images, in units of 0..255
    std: torch.Tensor  # (C,) float32, likewise
    augmentation: Augmentation
    train_clean: torch.Tensor | None = None  # (N,) int64: the labels before label noise; None: there is none
    notes: tuple = ()  # lines of `describe`: what else was done, and what was left out

    num_classes = property(lambda self: len(self.class_names))
    channels = property(lambda self: self.test.images.shape[1])
    height = property(lambda self: self.test.images.shape[2])
    width = property(lambda self: self.test.images.shape[3])

    def to(self, device):
        """The same data with every tensor on `device`."""
        return replace(self, **{name: value.to(device) for name, value in vars(self).items()
                                if hasattr(value, "to")})

    def digest(self):
        """A fingerprint of every image and label, so that a run is not resumed on other data."""
        sha = hashlib.sha256()
        for part in (self.train, self.validation, self.test):
            sha.update(part.images.permute(0, 2, 3, 1).contiguous().numpy())
            sha.update(part.labels.numpy())
        return sha.hexdigest()[:16]

    def describe(self):
        """What was read and what is done to it: lines for the start of a run."""
        sets = self.train, self.validation, self.test
        counts = torch.stack([s.labels.bincount(minlength=self.num_classes) for s in sets], 1)
        classes = [f"{name} {n}" for name, n in zip(self.class_names, counts.tolist(), strict=True)]
        if len(classes) > 20:
            order = counts[:, 0].argsort()
            classes = [f"the smallest {classes[order[0]]}", f"the largest {classes[order[-1]]}"]
        return [f"data {plain(self.name)}: {self.num_classes} classes, {self.height}x{self.width} pixels, "
                f"channels: {self.channels}", f"training, validation and test images: {list(map(len, sets))}; "
                f"{'; '.join(classes)}", f"training images at random: {self.augmentation}", *self.notes]


DATASETS = {"digits": read_digits, "fashion": read_fashion, "cifar10": read_cifar10, "svhn": read_svhn}
CAREFUL = ("a folder's images are not flipped, as an arrow or a letter would become another, and not cut, "
           "as that can hide what decides; where both are safe: --augmentation \"flip shift cutout\"")


def load_data(name: str, root="", image_size=32, download=False, augmentation="auto", **settings) -> Data:
    """The data set called `name` (one of DATASETS), or the folder of images at the path `name`.

    root: where the published files lie, or are downloaded to; empty: $EPBT_DATA or ./data.
    image_size: side in pixels to which the images of a folder are resized. augmentation: a text for
    `parse_augmentation`; "auto": a folder's images are shifted. settings: as in `make_data`.
    Raises DataError.
    """
    root = Path(os.path.expanduser(root or os.environ.get("EPBT_DATA") or "data"))
    if str(root).startswith("~"):
        raise DataError(f"--data-root {root}: there is no such user")
    if name in DATASETS:
        train, test, class_names, notes = DATASETS[name](root, download)
    elif os.path.isdir(os.path.expanduser(name)):
        train, test, class_names, notes = read_folder(os.path.expanduser(name), image_size)
    else:
        raise DataError(f"no data set or folder is called {name!r}{nearest(name, DATASETS)}; accepted are "
                        f"{', '.join(DATASETS)} and a folder with one subfolder of images per class")
    if test is None:
        train, test = hold_out(*train)
        notes.append("a fifth of each class is held out for the test")
    if augmentation == "auto" and name not in DATASETS:
        augmentation, notes = "shift", [*notes, CAREFUL]
    return make_data(train, test, name=name, class_names=class_names, notes=notes,
                     augmentation=augmentation, **settings)


def hold_out(images, labels):
    """Hold out a fifth of each class for the test, and at least one image, the same in every run."""
    order = np.random.default_rng(HOLD_OUT_SEED).permutation(len(labels))
    order = in_shares(labels, order, least=1)
    n = max(len(np.unique(labels)), -(-len(labels) // 5))
    return tuple((images[part], labels[part]) for part in (np.sort(order[n:]), np.sort(order[:n])))


def in_shares(labels, order, least):
    """The indices `order` into labels, so arranged that the first n, for every n, have each class in its
    share after `least` of each; and the last of each class are at the end."""
    order = order[np.argsort(labels[order], kind="stable")]
    _, start, size = np.unique(labels[order], return_index=True, return_counts=True)
    rank = np.arange(len(order)) - np.repeat(start, size)  # within its class
    size = np.repeat(size, size)
    share = np.where(rank == size - 1, 1, (rank + 0.5) / size)
    return order[np.argsort(np.where(rank < least, 0, share), kind="stable")]


def make_data(train, test, *, name="custom", class_names=None, seed=0, validation=0.1, enlarge=1,
              augmentation="auto", train_on_all=False, limit=0, label_noise=0.0,
              label_noise_kind="uniform", notes=()) -> Data:
    """Split, enlarge and measure a data set.

    train, test: (images, labels), tensors or arrays (N, C, H, W) and (N,); or a map-style Dataset of
        (image, label), read once. Images are uint8, floats in [0, 1] or, in a Dataset, PIL images.
    class_names: None is the list `classes` of the Dataset, or the labels, which must then be 0, 1, ...
    validation: images of `train` that are held out to measure the fitness; below 1, a share of them.
    enlarge: so many augmented copies are made of each validation image (Sec. 4.1); 1 leaves them.
    augmentation: an Augmentation, or a text for `parse_augmentation`; "auto" is none.
    train_on_all: train on the validation images as well, as Baseline 1 does (Sec. 4.1).
    limit: how many images of `train` are used, validation included; 0 is all.
    label_noise, label_noise_kind: see `wrong_labels`; the labels of the test images stay as they are.
    notes: lines that `Data.describe` repeats.
    Every class has its share, and an image at least, of what is trained on and of what is held out.
    The split and the copies are functions of `seed`. Raises DataError.
    """
    listed, of_test = (getattr(source, "classes", None) for source in (train, test))
    if isinstance(listed, list | tuple):
        if isinstance(of_test, list | tuple):
            refuse_other_classes(listed, of_test, "train.classes and test.classes must be the same")
        class_names = class_names or listed
    notes = list(notes)
    train, test = read_images(train, "training", notes), read_images(test, "test", notes)
    if isinstance(augmentation, str):
        size = min(train.images.shape[2:])
        augmentation = parse_augmentation(augmentation.replace("auto", "none"), size)
    class_names = check(train, test, class_names, enlarge, augmentation)
    limit, validation = check_split(train.labels, validation, limit)

    labels = train.labels.numpy()
    order = np.random.default_rng((seed, *SPLIT)).permutation(len(train))
    order = in_shares(labels, order, least=2)[:limit]
    order = torch.from_numpy(in_shares(labels, order, least=1))
    held_out, rest = order[:validation], order if train_on_all else order[validation:]
    clean = train.labels
    if label_noise:
        rng = np.random.default_rng((seed, *NOISE))
        train = replace(train, labels=wrong_labels(clean, order, label_noise, label_noise_kind, len(class_names), rng))
        notes.append(f"{label_noise:.0%} of the training and validation labels are made wrong ({label_noise_kind})")
    mean, std = pixel_statistics(train.images, rest)
    validation_set = ImageSet(pad(train.images[held_out], 0), train.labels[held_out])
    if enlarge > 1:
        rng = np.random.default_rng((seed, *ENLARGE))
        validation_set = enlarged(validation_set, enlarge, augmentation, mean, std, rng)
        notes.append(f"the validation images are {enlarge} augmented copies of each of {validation}")
    if train_on_all:
        notes.append("the validation images are trained on as well")
    train_set = ImageSet(pad(train.images[rest], augmentation.shift), train.labels[rest])
    test_set = ImageSet(pad(test.images, 0), test.labels)
    return Data(name, class_names, train_set, validation_set, test_set, mean, std, augmentation,
                clean[rest] if label_noise else None, tuple(notes))


def wrong_labels(labels, used, share, kind, num_classes, rng):
    """labels (N,) in which a share of those at the indices `used`, to within half a label, is another class.

    kind: "uniform", each of the other classes equally often, or "pair", the next class (after the last, the first)."""
    if not 0 <= share < 1 or kind not in ("uniform", "pair"):
        raise DataError("--label-noise must be at least 0 and below 1, of the kind uniform or pair, not "
                        f"{share!r} {kind!r}")
    wrong = used[torch.from_numpy(rng.permutation(len(used))[:round(share * len(used))])]
    further = rng.integers(1, num_classes, len(wrong)) if kind == "uniform" else np.ones(len(wrong), dtype=np.int64)
    labels = labels.clone()
    labels[wrong] = (labels[wrong] + torch.from_numpy(further)) % num_classes
    return labels


def check(train, test, class_names, enlarge, augmentation):
    """The names of the classes as text. Raises DataError for what does not fit together."""
    shape, test_shape = tuple(train.images.shape[1:]), tuple(test.images.shape[1:])
    if shape != test_shape:
        raise DataError(f"the training images are {shape}, the test images {test_shape} (channels, "
                        "height, width): they must agree")
    if not isinstance(augmentation, Augmentation) or augmentation.shift >= min(shape[1:]) or enlarge < 1:
        raise DataError(f"--enlarge must be 1 or more, not {enlarge}, and augmentation a data.Augmentation "
                        f"whose shift is below the height and width of images, not {augmentation!r}")
    labels, found = torch.cat([train.labels, test.labels]), len(train.labels.unique())
    names = tuple(map(plain, class_names or range(found)))
    if labels.min() < 0 or labels.max() >= len(names):
        raise DataError(f"the labels are {labels.min()} to {labels.max()}, and {len(names)} classes are "
                        f"{'named' if class_names else 'in the training data'}; accepted are 0 to "
                        f"{len(names) - 1}, with gaps only where class_names has them all")
    counts, tests = (s.labels.bincount(minlength=len(names)).tolist() for s in (train, test))
    rare = [i for i, n in enumerate(counts) if n == 1 or n == 0 and tests[i]]
    if rare:
        raise DataError(f"{len(rare)} of {len(names)} classes have too few images, first {names[rare[0]]}, "
                        f"with {counts[rare[0]]} for training; 2 are needed, as one validates")
    if found < 2:
        raise DataError(f"there must be images of at least two classes, not {found}")
    return names


def check_split(labels, validation, limit):
    """How many images are used and held out. Raises DataError where a class cannot be in each part."""
    n, classes = len(labels), len(labels.unique())
    limit = limit or n
    validation = max(classes, int(limit * validation)) if validation < 1 else int(validation)
    for option, value, low, high in (("limit", limit, 2 * classes, n),
                                     ("validation", validation, classes, limit - classes)):
        if not low <= value <= high:
            raise DataError(f"--{option} must be {low} to {high}, so that of {n} images each of {classes} "
                            f"classes has one in training and in validation, not {value}")
    return limit, validation


def pixel_statistics(images, index):
    """Mean and standard deviation per channel, (C,) float32 each, of images[index]."""
    # Counting the 256 values is exact, whatever the number of threads.
    channels = [images[index, c].flatten() for c in range(images.shape[1])]
    counts = torch.stack([channel.bincount(minlength=256) for channel in channels])
    share = counts.double() / counts.sum(1, keepdim=True)
    values = torch.arange(256, dtype=torch.float64)
    mean = share @ values
    std = (share * (values - mean[:, None]) ** 2).sum(1).sqrt()
    return mean.float(), std.clamp(min=1).float()  # a channel of one colour becomes 0, not NaN


def pad(images, shift):
    """A copy of images (N, C, H, W) with `shift` zeros on each side, channels last in memory."""
    n, channels, height, width = images.shape
    padded = images.new_zeros(n, height + 2 * shift, width + 2 * shift, channels)
    padded[:, shift:shift + height, shift:shift + width] = images.permute(0, 2, 3, 1)
    return padded.permute(0, 3, 1, 2)


def enlarged(image_set, copies, augmentation, mean, std, rng):
    """So many copies of every image, each augmented (Sec. 4.1)."""
    # paper: unspecified (how: here as in training, cutout included; the originals are not among them)
    n, _, height, width = image_set.images.shape
    padded, index, images = pad(image_set.images, augmentation.shift), torch.arange(n), []
    for _ in range(copies):
        draws = torch.from_numpy(draw_augmentation(augmentation, n, height, width, rng))
        batch = make_batch(padded, index, draws, augmentation, mean, std)
        images.append((batch * std[:, None, None] + mean[:, None, None]).round().to(torch.uint8))
    return ImageSet(torch.cat(images), image_set.labels.repeat(copies))


def read_images(source, part, notes):
    """The ImageSet of a source as `make_data` accepts it; `part` names it in errors and in notes."""
    pair = isinstance(source, tuple | list) and len(source) == 2
    if not pair and (isinstance(source, NO_DATASETS) or not hasattr(source, "__getitem__")):
        raise DataError(f"the {part} data are {type(source).__name__}; accepted are a pair (images, labels), "
                        "and a map-style Dataset of (image, label)")
    with told(f"the {part} data"):
        if pair:
            images, labels = to_uint8(source[0]), as_tensor(source[1])
        else:
            images, labels, done = read_dataset(source)
            notes.extend(f"{n} {part} {what}" for what, n in done.items())
        shape, whole = images.shape, not labels.is_floating_point() and not labels.is_complex()
        if images.ndim != 4 or labels.shape != shape[:1] or 0 in shape or not whole or (
                shape[3] <= 4 < shape[1]):
            raise DataError(f"the shapes are {tuple(shape)} and {tuple(labels.shape)}, the labels "
                            f"{labels.dtype}; accepted are images (N, channels, height, width), not "
                            "channels last, and whole numbers (N,)")
    return ImageSet(images, labels.long())


def read_dataset(dataset):
    """Images and labels of a map-style Dataset, and how often what was done to PIL images."""
    images, labels, done = [], [], Counter()
    for i in progress(range(len(dataset)), len(dataset), "data set"):
        with told(f"item {i}"):
            image, label = dataset[i]
            labels.append(operator.index(label.item() if hasattr(label, "item") else label))
            if isinstance(image, Image.Image):
                image, steps = prepared(image)
                image = np.atleast_3d(np.array(image)).transpose(2, 0, 1)
                done.update(steps)
            images.append(to_uint8(image))
            if images[i].shape != images[0].shape:
                raise DataError(f"its shape is {tuple(images[i].shape)}, that of the first "
                                f"{tuple(images[0].shape)}; all must have the same")
    return torch.stack(images) if images else torch.empty(0), torch.tensor(labels), done


def as_tensor(array):
    if isinstance(array, torch.Tensor):
        return array.cpu()
    return torch.from_numpy(np.ascontiguousarray(array))


def to_uint8(images):
    images = as_tensor(images)
    if images.is_floating_point() and images.numel() and images.min() >= 0 and images.max() <= 1:
        images = (images * 255).round().to(torch.uint8)
    if images.dtype != torch.uint8:
        raise DataError(f"images are {images.dtype}; accepted are uint8, and floats in [0, 1], not yet "
                        "normalised")
    return images
