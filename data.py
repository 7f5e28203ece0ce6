"""Data sets as uint8 tensors. `make_data` splits them and measures their pixels (Sec. 4)."""

import hashlib
import math
import operator
import os
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from torch.utils.data import Subset

from augmentation import Augmentation, draw_augmentation, make_batch, parse_augmentation, to_uint8
from augmentation import normalize as normalize  # users may import it from here
from config import floor
from errors import DataError, nearest, plain, told
from folders import prepared, progress, read_folder, refuse_other_classes
from published import read_cifar10, read_digits, read_fashion, read_long_tail, read_svhn


@dataclass
class ImageSet:
    images: torch.Tensor  # (N, C, H, W) uint8, channels last in memory
    labels: torch.Tensor  # (N,) int64

    def __len__(self):
        return len(self.labels)

    def to(self, device):
        return ImageSet(self.images.to(device), self.labels.to(device))

    def part(self, index=slice(None), shift=0):
        """Copy the images at `index`, with `shift` zeros on each side, channels last."""
        images = self.images[index].contiguous(memory_format=torch.channels_last)
        return ImageSet(F.pad(images, [shift] * 4), self.labels[index])


@dataclass
class Data:
    """A data set as a run uses it."""

    name: str
    class_names: tuple
    train: ImageSet  # its images have augmentation.shift zeros on each side
    validation: ImageSet
    test: ImageSet
    mean: torch.Tensor  # (C,) float32, of the training images, whose values are 0..255
    std: torch.Tensor  # (C,) float32, likewise
    augmentation: Augmentation
    clean_labels: torch.Tensor | None = None  # (N,) int64: of train, before label noise
    notes: tuple = ()  # further lines for `describe`

    num_classes = property(lambda self: len(self.class_names))
    channels = property(lambda self: self.test.images.shape[1])
    height = property(lambda self: self.test.images.shape[2])
    width = property(lambda self: self.test.images.shape[3])

    def to(self, device):
        return replace(self, **{name: value.to(device) for name, value in vars(self).items()
                                if hasattr(value, "to")})

    def digest(self):
        """Hash all images and labels: a run must not resume on other data."""
        sha = hashlib.sha256()
        for part in (self.train, self.validation, self.test):
            sha.update(part.images.permute(0, 2, 3, 1).contiguous().numpy())
            sha.update(part.labels.numpy())
        return sha.hexdigest()[:16]

    def describe(self):
        """Lines for the start of a run: what the data are and what was done to them."""
        sets = self.train, self.validation, self.test
        counts = [s.labels.bincount(minlength=self.num_classes).tolist() for s in sets]
        classes, rest = list(zip(*counts, self.class_names, strict=True)), ""
        low, high = self.test.images.aminmax()
        if len(classes) > 20:
            classes = [min(classes), max(classes)]
            rest = "; the others have numbers of training images between"
        classes = "; ".join(f"{name} {n}" for *n, name in classes)
        lines = [f"data {self.name}: {self.num_classes} classes, {self.height}x{self.width} "
                 f"pixels, channels: {self.channels}, values {low} to {high}",
                 f"training, validation and test images: {list(map(len, sets))}; {classes}{rest}",
                 f"at random to each training image: {self.augmentation}", *self.notes]
        return list(map(plain, lines))


DATASETS = {"digits": read_digits, "fashion": read_fashion,
            "fashion-long-tail": read_long_tail, "cifar10": read_cifar10, "svhn": read_svhn}
ROUNDED = "images of floats rounded to 256 levels"
CAREFUL = 'if flips and cutouts cannot change a class, use --augmentation "flip shift cutout"'


def load_data(name: str, root="", image_size=32, download=False, augmentation="auto", **settings):
    """Load the data set `name` of DATASETS, or the folder of images at this path, as Data.

    root: where the published files are or will be; if empty, $EPBT_DATA or ./data.
    image_size: a folder's images are resized to this side in pixels.
    augmentation: "auto" shifts a folder's images. settings: see `make_data`. Raises DataError."""
    with told(f"--data-root {root}"):
        root = Path(root or os.environ.get("EPBT_DATA") or "data").expanduser()
    usual = "none"
    if name in DATASETS:
        train, test, class_names, notes = DATASETS[name](root, download)
    elif os.path.isdir(folder := os.path.expanduser(name)):
        train, test, class_names, notes = read_folder(folder, image_size)
        usual = "shift"
    else:
        raise DataError(f"no data set or folder is called {name!r}{nearest(name, DATASETS)}; "
                        f"accepted are {', '.join(DATASETS)} and a folder with a subfolder a class")
    if test is None:
        train, test = hold_out(*train)
        notes.append("a fifth of each class is held out for the test")
    if augmentation == "auto":
        augmentation = usual
        notes += [CAREFUL] * (usual == "shift")
    return make_data(train, test, name=name, class_names=class_names, notes=notes,
                     augmentation=augmentation, **settings)


def hold_out(images, labels):
    """Hold out a fifth of each class, at least one image, as the test: the same in every run."""
    order = stratified_order(labels, np.random.default_rng(0).permutation(len(labels)), least=1)
    n = max(len(np.unique(labels)), math.ceil(len(labels) / 5))
    return [(images[part], labels[part]) for part in (np.sort(order[n:]), np.sort(order[:n]))]


def stratified_order(labels, order, least):
    """Rearrange the indices `order` into labels, so that any first n hold each class in its share,
    and `least` images of each class come first. The last image of each class is at the end."""
    order = order[np.argsort(labels[order], kind="stable")]  # class by class
    keys = []
    for size in np.unique(labels[order], return_counts=True)[1]:
        key = (np.arange(size) + 0.5) / size  # spreads the images of a class over 0 to 1
        key[-1] = 1
        key[:least] = 0
        keys.append(key)
    return order[np.argsort(np.concatenate(keys), kind="stable")]


def make_data(train, test, *, name="custom", class_names=None, seed=0, validation=0.1, enlarge=1,
              augmentation="none", train_on_all=False, limit=0, label_noise=0.0,
              label_noise_kind="uniform", notes=()) -> Data:
    """Split, enlarge and measure a data set. The random choices depend on `seed` alone.

    train, test: (images, labels), tensors or arrays (N, C, H, W) and (N,); or a map-style Dataset
        of (image, label). Images are uint8, floats in [0, 1] or, in a Dataset, PIL images.
    class_names: by default the Dataset's list `classes`, or else the labels 0, 1, ...
    augmentation: see `parse_augmentation`. notes: lines for `Data.describe`.
    train_on_all: train on the validation images too, as Baseline 1 does (Sec. 4.1).
    The others are as in Config. Training and validation have each class in its share, at least one
    image. `limit` counts both. Label noise leaves the test alone. Raises DataError."""
    notes = list(notes)
    listed = [names for names in map(listed_classes, (train, test)) if names]
    if listed:
        refuse_other_classes(listed[0], listed[-1], "train.classes and test.classes must agree")
    train, test = read_images(train, "training", notes), read_images(test, "test", notes)
    class_names = next(iter(listed), None) if class_names is None else class_names
    class_names = check(train, test, class_names)
    augmentation = parse_augmentation(augmentation, min(train.images.shape[2:]))
    # Nothing else draws from these three random streams.
    rngs = [np.random.default_rng((seed, 0xDA7A, i)) for i in range(3)]
    order, n = shuffled(train.labels, limit, validation, rngs[0])
    used, clean = order if train_on_all else order[n:], None
    if label_noise:
        clean = train.labels[used]
        train.labels = wrong_labels(train.labels, order, label_noise, label_noise_kind,
                                    len(class_names), rngs[2])
        notes.append(f"{label_noise:.0%} of the training and validation labels are made wrong "
                     f"({label_noise_kind})")
    mean, std = pixel_statistics(train.images, used)
    held_out = train.part(order[:n])
    if enlarge > 1:
        held_out = enlarged(held_out, enlarge, augmentation, mean, std, rngs[1])
        notes.append(f"the validation images are {enlarge} augmented copies of each of {n}")
    if train_on_all:
        notes.append("the validation images are trained on as well")
    return Data(name, class_names, train.part(used, augmentation.shift), held_out, test.part(),
                mean, std, augmentation, clean, tuple(notes))


def listed_classes(source):
    """The names of a Dataset's classes, if it has a list `classes`, as torchvision's do, or is a
    Subset of one that has."""
    while isinstance(source, Subset):
        source = source.dataset
    found = getattr(source, "classes", ())
    return tuple(found) if isinstance(found, list | tuple | np.ndarray) else ()


def check(train, test, class_names):
    """Return the names of the classes as text. Raises DataError if the parts do not fit."""
    shape, test_shape = (tuple(s.images.shape[1:]) for s in (train, test))
    if shape != test_shape:
        raise DataError(f"the training images are {shape}, but the test images {test_shape}")
    found = len(train.labels.unique())
    names = tuple(map(plain, range(found) if class_names is None else class_names))
    low, high = torch.cat([train.labels, test.labels]).aminmax()
    if low < 0 or high >= len(names):
        raise DataError(f"the labels are {low} to {high}, {found} classes in training; accepted "
                        f"are 0 to {len(names) - 1}, with gaps only where the Dataset's classes or "
                        "class_names list them all")
    counts, tests = (s.labels.bincount(minlength=len(names)).tolist() for s in (train, test))
    rare = [i for i, n in enumerate(counts) if n == 1 or n == 0 and tests[i]]
    if rare:
        raise DataError(f"{len(rare)} of {len(names)} classes, first {names[rare[0]]}, have fewer "
                        "than two training images; one is for validation")
    if found < 2:
        raise DataError("all images are of one class; accepted are two classes or more")
    return names


def shuffled(labels, limit, validation, rng):
    """The indices of the images to use, the validation images first, and the number of these.
    Raises DataError if a class cannot be in both training and validation."""
    n, classes = len(labels), len(labels.unique())
    limit = limit or n
    validation = max(classes, floor(limit * validation)) if validation < 1 else int(validation)
    for option, value, low, high in (("limit", limit, 2 * classes, n),
                                     ("validation", validation, classes, limit - classes)):
        if not low <= value <= high:
            raise DataError(f"--{option} must be {low} to {high}, not {value}: of {n} images, each "
                            f"of {classes} classes needs one for training and one for validation")
    labels = labels.numpy()
    order = stratified_order(labels, rng.permutation(n), least=2)[:limit]
    return torch.from_numpy(stratified_order(labels, order, least=1)), validation


def wrong_labels(labels, used, share, kind, num_classes, rng):
    """The labels (N,), a share of them at the indices `used` wrong. kind: "uniform" takes all other
    classes equally often, "pair" the next class (the first after the last)."""
    if not 0 <= share < 1 or kind not in ("uniform", "pair"):
        raise DataError("--label-noise must be at least 0 and below 1, of the kind uniform or pair,"
                        f" not {share!r} {kind!r}")
    wrong = used[torch.from_numpy(rng.permutation(len(used))[:round(share * len(used))])]
    further = rng.integers(1, num_classes if kind == "uniform" else 2, len(wrong))
    return labels.index_add(0, wrong, torch.from_numpy(further)) % num_classes


def pixel_statistics(images, index):
    """Mean and standard deviation per channel, (C,) float32 each, of images[index]."""
    # Counts of the 256 values are exact for any number of threads.
    counts = torch.stack([images[index, c].flatten().bincount(minlength=256)
                          for c in range(images.shape[1])])
    share, values = counts.double() / counts.sum(1, keepdim=True), torch.arange(256.0).double()
    mean = share @ values
    std = (share * (values - mean[:, None]) ** 2).sum(1).sqrt()
    return mean.float(), std.where(std > 0, 1).float()  # no division by 0


def enlarged(image_set, copies, augmentation, mean, std, rng):
    """Augmented copies of every image (Sec. 4.1). paper: unspecified: augment as in training, with
    cutout, and leave out the originals."""
    n, _, height, width = image_set.images.shape
    padded, index, images = image_set.part(shift=augmentation.shift).images, torch.arange(n), []
    for _ in range(copies):
        draws = torch.from_numpy(draw_augmentation(augmentation, n, height, width, rng))
        batch = make_batch(padded, index, draws, augmentation, mean, std)
        images.append((batch * std[:, None, None] + mean[:, None, None]).round().to(torch.uint8))
    return ImageSet(torch.cat(images), image_set.labels.repeat(copies))


def read_images(source, part, notes):
    """Read `train` or `test` of `make_data`; `part` names it in errors and notes."""
    with told(f"the {part} data ({type(source).__name__})",
              "; accepted are a pair (images, labels), and a map-style Dataset of (image, label)"):
        if isinstance(source, tuple | list) and len(source) == 2:
            given, labels = map(as_tensor, source)
            done = Counter([ROUNDED] * (len(given) * given.is_floating_point()))
            images = to_uint8(given)
        else:
            images, labels, done = read_dataset(source)
        notes.extend(f"{n} {part} {what}" for what, n in done.items())
        shape = tuple(images.shape)
        channels_last = len(shape) == 4 and shape[3] <= 4 < shape[1]
        if (len(shape) != 4 or channels_last or 0 in shape or shape[:1] != labels.shape
                or not torch.can_cast(labels.dtype, torch.int64)):
            raise DataError(f"the shapes are {shape} and {tuple(labels.shape)}, the labels "
                            f"{labels.dtype}; accepted are images (N, channels, height, width) and "
                            "whole numbers (N,)")
    return ImageSet(images, labels.long())


def read_dataset(dataset):
    """Images, labels, and a Counter of what was done to the images of a map-style Dataset."""
    images, labels, done = [], [], Counter()
    for i in progress(range(len(dataset)), len(dataset), "data set"):
        with told(f"item {i}"):
            image, label = dataset[i]
            labels.append(operator.index(label.item() if hasattr(label, "item") else label))
            if isinstance(image, Image.Image):
                image, steps = prepared(image)
                image = np.atleast_3d(np.array(image)).transpose(2, 0, 1)
                done.update(steps)
            image = as_tensor(image)
            done.update([ROUNDED] * image.is_floating_point())
            images.append(to_uint8(image))
            if image.shape != images[0].shape:
                raise DataError(f"an image of the shape {tuple(image.shape)}, while the first is "
                                f"{tuple(images[0].shape)}; all must have one")
    return torch.stack(images) if images else torch.empty(0), torch.tensor(labels), done


def as_tensor(array):
    is_tensor = isinstance(array, torch.Tensor)
    return array.cpu() if is_tensor else torch.from_numpy(np.ascontiguousarray(array))
