"""Data sets as uint8 tensors: readers, splits, and batched augmentation on the device (Sec. 4).

Every reader, and every data set of your own, goes through `make_data`: the one place where images are split,
the validation images enlarged and the statistics for normalisation taken. Training then calls `make_batch`.
"""

import gzip
import hashlib
import operator
import os
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from options import is_number, message, nearest

DEBIAN_FASHION = Path("/usr/share/datasets/fashion-mnist")  # of the package dataset-fashion-mnist
SPLIT, ENLARGE, NOISE = (0xDA7A, 0), (0xDA7A, 1), (0xDA7A, 2)  # random streams of a run's seed that nothing else draws from
# Subfolders that are not classes, if they are all there is.
SPLITS = {"train", "training", "val", "valid", "validation", "eval", "dev", "test", "testing"}
LABEL_NOISE = ("uniform", "pair")  # see wrong_labels
HOLD_OUT_SEED = 0  # where no test split is published, it is the same for every run
NO_DATASETS = (tuple, list, dict, str, torch.Tensor, np.ndarray)  # though they have a length and items


class DataError(Exception):
    """One line: what is wrong with the data, and what is accepted."""


@dataclass(frozen=True)
class Augmentation:
    """What happens at random to a training image (Sec. 4.1)."""

    flip: bool = False  # left to right, with probability 1/2
    shift: int = 0  # translation by up to so many pixels in each direction; zeros are shifted in
    cutout: int = 0  # side in pixels of the square that is cut out [6]; 0 cuts nothing

    def __post_init__(self):
        if not isinstance(self.flip, bool):
            raise DataError(f"augmentation: flip must be True or False, not {self.flip!r}")
        for name in ("shift", "cutout"):
            pixels = getattr(self, name)
            if not isinstance(pixels, int) or pixels < 0:
                raise DataError(f"augmentation: {name} must be a whole number of pixels from 0 on, not {pixels!r}")


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
    """One data set as a run uses it. The training images carry `augmentation.shift` zeros on each side."""

    name: str
    class_names: tuple
    train: ImageSet
    validation: ImageSet
    test: ImageSet
    mean: torch.Tensor  # (C,) float32, of the training images, in units of 0..255
    std: torch.Tensor  # (C,) float32, likewise
    augmentation: Augmentation
    train_clean: torch.Tensor | None = None  # (N,) int64: the labels before label noise; None: there is none

    @property
    def num_classes(self):
        return len(self.class_names)

    @property
    def channels(self):
        return self.test.images.shape[1]

    @property
    def height(self):
        return self.test.images.shape[2]

    @property
    def width(self):
        return self.test.images.shape[3]

    def to(self, device):
        """The same data with every tensor on `device`."""
        return replace(self, train=self.train.to(device), validation=self.validation.to(device),
                       test=self.test.to(device), mean=self.mean.to(device), std=self.std.to(device),
                       train_clean=None if self.train_clean is None else self.train_clean.to(device))

    def digest(self):
        """A fingerprint of every image and label, so that a run is not resumed on other data."""
        sha = hashlib.sha256()
        for part in (self.train, self.validation, self.test):
            sha.update(part.images.permute(0, 2, 3, 1).contiguous().numpy())
            sha.update(part.labels.numpy())
        return sha.hexdigest()[:16]


# Readers. Each returns ((images, labels), (test images, test labels), class names).


def read_digits(root, download):
    """The 1,797 digits of scikit-learn, 8x8."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.round(digits.images[:, None] * (255 / 16)).astype(np.uint8)  # 0..16 as published
    return *hold_out(images, digits.target), tuple("0123456789")


def hold_out(images, labels):
    """Hold out a fifth of each class for the test, to within an image, the same ones in every run."""
    order = np.random.default_rng(HOLD_OUT_SEED).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    test = np.zeros(len(labels), dtype=bool)
    test[order[::5]] = True
    return (images[~test], labels[~test]), (images[test], labels[test])


def read_fashion(root, download):
    """Fashion-MNIST in torchvision's layout, as the four files alone, or from Debian's package."""
    from torchvision.datasets import FashionMNIST

    folders = (root / "FashionMNIST" / "raw", root, DEBIAN_FASHION)
    names = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
    how = ("run with --download, or install Debian's package dataset-fashion-mnist, or put the four files "
           f"*-ubyte.gz of https://github.com/zalandoresearch/fashion-mnist into {root}")

    def find():
        for folder in folders:
            paths = [next(filter(Path.is_file, (folder / n, folder / f"{n}.gz")), None) for n in names]
            if all(paths):
                return paths
        return None

    paths = find()
    if paths is None and download:
        published("Fashion-MNIST", lambda: FashionMNIST(root, download=True), [], how)
        paths = find()
    if paths is None:
        raise DataError(f"Fashion-MNIST is in none of {', '.join(map(str, folders))} (all of "
                        f"{', '.join(names)}, each with or without .gz); {how}")
    images, labels, test_images, test_labels = map(read_idx, paths)
    return (images[:, None], labels), (test_images[:, None], test_labels), tuple(FashionMNIST.classes)


def read_idx(path):
    """The array of bytes in an idx file, plain or gzipped."""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            content = file.read()
        if content[:3] != b"\0\0\x08":
            raise ValueError("it does not begin like an idx file of bytes")
        rank = content[3]
        shape = np.frombuffer(content, ">i4", rank, offset=4)
        return np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(shape).copy()
    except (OSError, EOFError, ValueError, IndexError, zlib.error) as error:
        raise DataError(f"cannot read {path} ({error}); if damaged, delete it and get it again") from error


def read_cifar10(root, download):
    from torchvision.datasets import CIFAR10

    listed = [*CIFAR10.train_list, *CIFAR10.test_list, (CIFAR10.meta["filename"], CIFAR10.meta["md5"])]
    files = [(root / CIFAR10.base_folder / name, md5) for name, md5 in listed]
    how = (f"run with --download, or unpack {CIFAR10.filename} of "
           f"https://www.cs.toronto.edu/~kriz/cifar.html into {root}")

    def read():
        train, test = (CIFAR10(root, train, download=download) for train in (True, False))
        images, test_images = (part.data.transpose(0, 3, 1, 2) for part in (train, test))
        return (images, train.targets), (test_images, test.targets), tuple(train.classes)

    return published("CIFAR-10", read, files, how)


def read_svhn(root, download):
    """SVHN; its training images are those of train and extra together (Sec. 4.2)."""
    from torchvision.datasets import SVHN

    files = [(root / name, md5) for _, name, md5 in SVHN.split_list.values()]
    how = (f"run with --download, or put {', '.join(path.name for path, _ in files)} of "
           f"http://ufldl.stanford.edu/housenumbers/ into {root}")

    def read():
        train, extra, test = (SVHN(root, split, download=download) for split in ("train", "extra", "test"))
        images = np.concatenate([train.data, extra.data])
        labels = np.concatenate([train.labels, extra.labels])
        return (images, labels), (test.data, test.labels), tuple("0123456789")

    return published("SVHN", read, files, how)


def published(title, read, files, how):
    """read(), or one line that names which of `files` [(path, md5)] is at fault and says how to get it."""
    from torchvision.datasets.utils import check_integrity

    try:
        return read()
    except OSError as error:  # no permission, or no network
        problem, cause = message(error), error
    except RuntimeError as error:  # what torchvision raises for a missing file and for a wrong checksum
        problem, cause = message(error), error
        at_fault = next((path for path, md5 in files if not check_integrity(path, md5)), None)
        if at_fault is not None:
            problem = f"{at_fault} is " + ("damaged (wrong checksum)" if at_fault.is_file() else "missing")
    raise DataError(f"{title}: {problem}; {how}; --data-root or EPBT_DATA name another folder") from cause


def read_folder(folder, size):
    """FOLDER/<class>/<image>, a fifth of it held out; or FOLDER/train and FOLDER/test, each of that kind."""
    try:
        parts = {entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")}
    except OSError as error:
        raise DataError(f"cannot read the folder {folder} ({error.strerror})") from error
    splits = {"train", "test"} < parts or parts and {part.lower() for part in parts} <= SPLITS
    if splits and parts != {"train", "test"}:
        raise DataError(f"{folder} has the subfolders {', '.join(sorted(parts))}; accepted are FOLDER/<class>/<image>, or "
                        "FOLDER/train and FOLDER/test, each of that kind; validation images are taken from train")
    if parts != {"train", "test"}:
        images, labels, class_names = read_image_folder(folder, size)
        train, test = hold_out(images, labels)
        if gone := set(labels) - set(train[1]):
            raise DataError(f"{folder}: a fifth of the images is held out for the test, and that is all that "
                            f"{class_names[min(gone)]} has; accepted are more of them, or FOLDER/train and FOLDER/test")
        return train, test, class_names
    *train, class_names = read_image_folder(folder / "train", size)
    *test, test_names = read_image_folder(folder / "test", size)
    refuse_other_classes(class_names, test_names, f"{folder}: train and test must have the same classes")
    return train, test, class_names


def refuse_other_classes(train, test, demand):
    """Raise DataError where the names of the classes differ; it begins with what is demanded."""
    if list(train) != list(test):
        apart = sorted(set(map(str, train)) ^ set(map(str, test)))
        raise DataError(f"{demand}; only one of them has {', '.join(apart) or 'their order'}")


def read_image_folder(folder, size):
    """Images (N, 3, size, size) uint8, labels (N,) int64 and class names, as in torchvision's ImageFolder."""
    from torchvision.datasets.folder import IMG_EXTENSIONS, ImageFolder, has_file_allowed_extension

    class VisibleFolder(ImageFolder):
        """Without what has a dot before its name: .ipynb_checkpoints has copies, and ._1.png is no image."""

        def find_classes(self, directory):
            names = [name for name in super().find_classes(directory)[0] if not name.startswith(".")]
            return names, {name: i for i, name in enumerate(names)}

    def visible_image(path):
        parts = Path(path).relative_to(folder).parts
        return has_file_allowed_extension(path, IMG_EXTENSIONS) and not any(part.startswith(".") for part in parts)

    try:
        listing = VisibleFolder(folder, is_valid_file=visible_image)
    except (OSError, ValueError) as error:  # a class without images, or no class at all
        raise DataError(f"{folder}: {message(error)} Accepted is FOLDER/<class>/<image>") from error

    def decode(path):
        try:
            with Image.open(path) as image:
                return np.asarray(eight_bit(image).convert("RGB").resize((size, size), Image.Resampling.BILINEAR))
        except Exception as error:  # Pillow's decoders raise errors of many kinds
            raise DataError(f"cannot read the image {path} ({message(error)})") from error

    if len(listing.classes) < 2:
        raise DataError(f"{folder} has only one class, {listing.classes[0]!r}; accepted is a subfolder for each of several")
    paths = [path for path, _ in listing.samples]
    images = np.empty((len(paths), size, size, 3), dtype=np.uint8)
    with ThreadPoolExecutor() as pool:
        for i, image in enumerate(progress(pool.map(decode, paths), len(paths), str(folder))):
            images[i] = image
    return images.transpose(0, 3, 1, 2), np.array(listing.targets), tuple(listing.classes)


def eight_bit(image):
    """The same image; raises DataError for more than 8 bits, which Pillow would cut off: a 16-bit image becomes white."""
    if image.mode.startswith("I") or image.mode == "F":
        raise DataError(f"its pixels are of Pillow's mode {image.mode}; accepted are 8-bit images")
    return image


def progress(items, total, title):
    return tqdm(items, title, total, unit=" images", leave=False, disable=None)  # None: on a terminal only


@dataclass(frozen=True)
class DataSet:
    """How a data set is read, and its defaults."""

    read: Callable  # (root, download) -> ((images, labels), (test images, test labels), class names)
    validation: int | None  # how many training images are held out for the fitness; None is a tenth
    enlarge: int  # factor by which augmentation enlarges them
    augmentation: Augmentation


# paper: unspecified (shift and cutout in pixels: here as in [6]; digits and Fashion-MNIST are ours)
DATASETS = {
    "digits": DataSet(read_digits, 240, 4, Augmentation(shift=1)),
    "fashion": DataSet(read_fashion, 5_000, 1, Augmentation(flip=True, shift=2, cutout=8)),
    "cifar10": DataSet(read_cifar10, 1_250, 20, Augmentation(flip=True, shift=4, cutout=16)),  # Sec. 4.1
    "svhn": DataSet(read_svhn, 30_000, 1, Augmentation()),  # Sec. 4.2
}


def folder_source(folder, size):
    """A folder of images as a data set; its images are resized to `size` x `size` pixels."""
    if size < 8:
        raise DataError(f"the images of a folder cannot be resized to {size} pixels; 8 is the least")
    augmentation = Augmentation(flip=True, shift=size // 8, cutout=size // 2)
    return DataSet(lambda root, download: read_folder(folder, size), None, 1, augmentation)


def data_set(name, image_size):
    """One of DATASETS, or the folder of images at the path `name`."""
    return DATASETS.get(name) or folder_source(Path(name).expanduser(), image_size)


# From images to Data.


def load_data(name: str, root=None, seed=0, validation=None, enlarge=None, train_on_all=False, image_size=32,
              download=False, limit=None, label_noise=0.0, label_noise_kind="uniform") -> Data:
    """The data set called `name` (one of DATASETS), or the folder of images at the path `name`.

    root: where the published files lie, or are downloaded to; None is $EPBT_DATA or ./data.
    image_size: side in pixels to which the images of a folder are resized.
    validation, enlarge: None is the data set's default. The others are as in `make_data`. Raises DataError.
    """
    root = Path(root or os.environ.get("EPBT_DATA") or "data").expanduser()
    if name not in DATASETS and not os.path.isdir(os.path.expanduser(name)):
        raise DataError(f"no data set or folder is called {name!r}{nearest(name, DATASETS)}; accepted are "
                        f"{', '.join(DATASETS)} and a folder with one subfolder of images per class")
    source = data_set(name, image_size)
    train, test, class_names = source.read(root, download)
    return make_data(train, test, name=name, class_names=class_names, seed=seed,
                     validation=source.validation if validation is None else validation,
                     enlarge=source.enlarge if enlarge is None else enlarge,
                     augmentation=source.augmentation, train_on_all=train_on_all, limit=limit,
                     label_noise=label_noise, label_noise_kind=label_noise_kind)


def make_data(train, test, *, name="custom", class_names=None, seed=0, validation=None, enlarge=1,
              augmentation=None, train_on_all=False, limit=None, label_noise=0.0,
              label_noise_kind="uniform") -> Data:
    """Split, enlarge and measure a data set.

    train, test: (images, labels), tensors or arrays (N, C, H, W) and (N,); or a map-style torch Dataset of
        (image, label), read once. Images are uint8, floats in [0, 1] or, in a Dataset, PIL images.
    class_names: None is the list `classes` of the Dataset, or the numbers up to the highest label of `train`.
    validation: how many images of `train` are held out to measure the fitness; None is a tenth.
    enlarge: so many augmented copies are made of each validation image (Sec. 4.1); 1 leaves them as they are.
    train_on_all: train on the validation images as well, as Baseline 1 does (Sec. 4.1).
    limit: how many images of `train` are used, validation included; None is all.
    label_noise, label_noise_kind: see `wrong_labels`; the labels of the test images stay as they are.
    The split, the copies and the wrong labels are functions of `seed`. Raises DataError.
    """
    listed, of_test = (getattr(source, "classes", None) for source in (train, test))
    if isinstance(listed, list | tuple):
        if isinstance(of_test, list | tuple):
            refuse_other_classes(listed, of_test, "train.classes and test.classes must be the same")
        class_names = class_names or listed
    train, test = read_images(train, "training"), read_images(test, "test")
    highest = int(train.labels.max())
    if not class_names and highest >= len(train):
        raise DataError(f"the training labels go up to {highest}, of {len(train)} images; they must number the classes "
                        "from 0 on")
    class_names = tuple(map(str, class_names or range(highest + 1)))
    limit = len(train) if limit is None else limit
    validation = max(1, limit // 10) if validation is None else validation
    augmentation = augmentation or Augmentation()
    check(train, test, len(class_names), validation, limit, enlarge, augmentation)
    check_noise(label_noise, label_noise_kind)

    order = torch.from_numpy(np.random.default_rng((seed, *SPLIT)).permutation(len(train)))[:limit]
    held_out, rest = order[:validation], order if train_on_all else order[validation:]
    clean = train.labels
    if label_noise:
        rng = np.random.default_rng((seed, *NOISE))
        train = replace(train, labels=wrong_labels(clean, order, label_noise, label_noise_kind, len(class_names), rng))
    mean, std = pixel_statistics(train.images, rest)
    validation_set = ImageSet(pad(train.images[held_out], 0), train.labels[held_out])
    if enlarge > 1:
        rng = np.random.default_rng((seed, *ENLARGE))
        validation_set = enlarged(validation_set, enlarge, augmentation, mean, std, rng)
    train_set = ImageSet(pad(train.images[rest], augmentation.shift), train.labels[rest])
    test_set = ImageSet(pad(test.images, 0), test.labels)
    return Data(name, class_names, train_set, validation_set, test_set, mean, std, augmentation,
                clean[rest] if label_noise else None)


def wrong_labels(labels, used, share, kind, num_classes, rng):
    """labels (N,) in which a share of those at the indices `used`, to within half a label, is another class.

    kind: 'uniform', each of the other classes equally often, or 'pair', the next class (after the last, the first)."""
    wrong = used[torch.from_numpy(rng.permutation(len(used))[:round(share * len(used))])]
    further = rng.integers(1, num_classes, len(wrong)) if kind == "uniform" else np.ones(len(wrong), dtype=np.int64)
    labels = labels.clone()
    labels[wrong] = (labels[wrong] + torch.from_numpy(further)) % num_classes
    return labels


def check(train, test, num_classes, validation, limit, enlarge, augmentation):
    """Raise DataError if no sensible split can be made. Its lines name the options that a command line has."""
    if not isinstance(augmentation, Augmentation) or augmentation.shift >= min(train.images.shape[2:]):
        raise DataError("augmentation must be a data.Augmentation whose shift is below the height and width of the images, "
                        f"not {augmentation!r}")
    if train.images.shape[1:] != test.images.shape[1:]:
        raise DataError(f"the training images are {tuple(train.images.shape[1:])}, the test images "
                        f"{tuple(test.images.shape[1:])} (channels, height, width); they must agree")
    if len(train) < 2:
        raise DataError(f"there must be at least two training images, not {len(train)}")
    if num_classes < 2:
        raise DataError(f"there must be at least two classes, not {num_classes}")
    for part, labels in (("training", train.labels), ("test", test.labels)):
        if labels.min() < 0 or labels.max() >= num_classes:
            raise DataError(f"the {part} labels are {labels.min()} to {labels.max()}; with {num_classes} "
                            f"classes they must be 0 to {num_classes - 1}")
    if not 2 <= limit <= len(train):
        raise DataError(f"--limit must be 2 to {len(train)}, the number of training images, not {limit}")
    if not 0 < validation < limit:
        raise DataError(f"--validation must be 1 to {limit - 1} of the {limit} training images in use, not {validation}")
    if enlarge < 1:
        raise DataError(f"--enlarge must be at least 1, not {enlarge}")


def check_noise(share, kind):
    if not is_number(share) or not 0 <= share < 1:
        raise DataError(f"--label-noise must be a share of at least 0 and below 1, not {share!r}")
    if kind not in LABEL_NOISE:
        raise DataError(f"--label-noise-kind must be one of {', '.join(LABEL_NOISE)}, not {kind!r}")


def pixel_statistics(images, index):
    """Mean and standard deviation per channel, (C,) float32 each, of images[index]."""
    # Counting the 256 values is exact: the result depends neither on the order of a sum nor on the threads.
    channels = [images[index, c].flatten() for c in range(images.shape[1])]
    counts = torch.stack([channel.bincount(minlength=256) for channel in channels])
    share = counts.double() / counts.sum(1, keepdim=True)
    values = torch.arange(256, dtype=torch.float64)
    mean = share @ values
    std = (share * (values - mean[:, None]) ** 2).sum(1).sqrt()
    return mean.float(), std.clamp(min=1).float()  # so that a channel of one colour becomes 0, not NaN


def pad(images, shift):
    """A copy of images (N, C, H, W) with `shift` zeros on each side, channels last in memory."""
    n, channels, height, width = images.shape
    padded = images.new_zeros(n, height + 2 * shift, width + 2 * shift, channels)
    padded[:, shift:shift + height, shift:shift + width] = images.permute(0, 2, 3, 1)
    return padded.permute(0, 3, 1, 2)


def enlarged(image_set, copies, augmentation, mean, std, rng):
    """So many copies of every image, each augmented (Sec. 4.1)."""
    # paper: unspecified (how: here as in training, cutout included; the images themselves are not among them)
    n, channels, height, width = image_set.images.shape
    padded, index, images = pad(image_set.images, augmentation.shift), torch.arange(n), []
    for _ in range(copies):
        draws = torch.from_numpy(draw_augmentation(augmentation, n, height, width, rng))
        batch = make_batch(padded, index, draws, augmentation, mean, std)
        images.append((batch * std[:, None, None] + mean[:, None, None]).round().to(torch.uint8))
    return ImageSet(torch.cat(images), image_set.labels.repeat(copies))


def read_images(source, part):
    """The ImageSet of a source as `make_data` accepts it; `part` names it in errors."""
    if isinstance(source, tuple | list) and len(source) == 2:
        images, labels = to_uint8(as_tensor(source[0], f"{part} images"), part), as_tensor(source[1], f"{part} labels")
    elif hasattr(source, "__getitem__") and hasattr(source, "__len__") and not isinstance(source, NO_DATASETS):
        images, labels = read_dataset(source, part)
    else:
        raise DataError(f"the {part} data are {type(source).__name__}; accepted are a pair (images, labels), and a "
                        "map-style Dataset of (image, label)")
    if images.ndim != 4 or labels.shape != images.shape[:1] or 0 in images.shape:
        raise DataError(f"the {part} images have the shape {tuple(images.shape)}, their labels "
                        f"{tuple(labels.shape)}; accepted are (N, channels, height, width) and (N,)")
    if images.shape[3] <= 4 < images.shape[1]:
        raise DataError(f"the {part} images have the shape {tuple(images.shape)}: channels last; accepted are (N, "
                        "channels, height, width), which images.permute(0, 3, 1, 2) gives")
    if labels.is_floating_point() or labels.is_complex():
        raise DataError(f"the {part} labels are {labels.dtype}; they must be whole numbers")
    return ImageSet(images, labels.long())


def read_dataset(dataset, part):
    """Images and labels of a map-style Dataset."""
    images, labels = [], []
    for i in progress(range(len(dataset)), len(dataset), f"{part} images"):
        try:
            image, label = dataset[i]
            labels.append(operator.index(label))
        except (TypeError, ValueError) as error:
            raise DataError(f"{part} item {i} is not a pair (image, whole number): {message(error)}") from error
        if isinstance(image, Image.Image):
            image = np.array(image if eight_bit(image).mode == "L" else image.convert("RGB"))
            image = image[None] if image.ndim == 2 else image.transpose(2, 0, 1)
        images.append(to_uint8(as_tensor(image, f"{part} image {i}"), part))
        if images[i].shape != images[0].shape:
            raise DataError(f"{part} image {i} has the shape {tuple(images[i].shape)}, the first one "
                            f"{tuple(images[0].shape)}; all must have the same (channels, height, width)")
    return torch.stack(images) if images else torch.empty(0), torch.tensor(labels)


def as_tensor(array, what):
    if isinstance(array, torch.Tensor):
        return array.cpu()
    try:
        return torch.from_numpy(np.ascontiguousarray(array))
    except (TypeError, ValueError) as error:
        raise DataError(f"{what}: accepted are numbers in a tensor or an array ({message(error)})") from error


def to_uint8(images, part):
    if images.is_floating_point() and images.numel() and images.min() >= 0 and images.max() <= 1:
        images = (images * 255).round().to(torch.uint8)
    if images.dtype != torch.uint8:
        raise DataError(f"the {part} images are {images.dtype}; accepted are uint8, and floats in [0, 1] "
                        "(not yet normalised)")
    return images


# Batches: pure functions of explicit draws, without a word from the device to the host.


def draw_augmentation(augmentation: Augmentation, n, height, width, rng: np.random.Generator) -> np.ndarray:
    """The random part of augmenting n images: (n, 5) int64 with the columns dy, dx, flip, cut_y, cut_x.

    (dy, dx) is the corner of the crop in the padded image, in [0, 2 shift]; (cut_y, cut_x) is the centre of
    the square that is cut out, anywhere in the image [6].
    """
    offsets = 2 * augmentation.shift + 1
    centres = (height, width) if augmentation.cutout else (1, 1)
    return rng.integers(0, (offsets, offsets, 1 + augmentation.flip, *centres), size=(n, 5))


def make_batch(images, index, draws, augmentation: Augmentation, mean, std, cutout=None) -> torch.Tensor:
    """Augmented and normalised training images (B, C, H, W), float32, channels last.

    images: (N, C, H + 2 shift, W + 2 shift) uint8 with a border of zeros, channels last; index: (B,) int64
    into them; draws: (B, 5) int64 of `draw_augmentation`; mean, std: (C,) float32. All on one device.
    cutout: the side of the square where augmentation.cutout is not 0, as a 0-d int64 tensor on the device; so a
    captured CUDA graph can be replayed with another. None is augmentation.cutout.
    """
    dy, dx, flip, cut_y, cut_x = draws.unbind(1)
    crops = crop(images, index, dy, dx, augmentation.shift)
    if augmentation.flip:
        both = torch.cat([crops, crops.flip(2)])
        crops = both.index_select(0, flip * len(crops) + torch.arange(len(crops), device=crops.device))
    batch = standardize(crops, mean, std)
    if augmentation.cutout:  # paper: unspecified (what fills the square: the mean, which is 0 by now)
        side = augmentation.cutout if cutout is None else cutout
        batch *= 1 - squares(cut_y, cut_x, side, *crops.shape[1:])
    return batch.view(crops.shape).permute(0, 3, 1, 2)


def normalize(images, mean, std) -> torch.Tensor:
    """Images (B, C, H, W) uint8 as float32 of zero mean and unit variance (Sec. 4.1), channels last."""
    images = images.permute(0, 2, 3, 1)
    return standardize(images, mean, std).view(images.shape).permute(0, 3, 1, 2)


def crop(images, index, dy, dx, shift):
    """Crops (B, H, W, C) uint8 of padded images, with their corners at (dy, dx)."""
    images = images.contiguous(memory_format=torch.channels_last)  # as Data holds them: no copy
    n, channels, rows, columns = images.shape
    height, width = rows - 2 * shift, columns - 2 * shift
    # A row of a crop is W*C consecutive bytes. So gather rows, from a view of every such run of bytes,
    # numbered by its first pixel: this is several times faster than to gather pixels.
    runs = images.as_strided((n * rows * columns - width + 1, width * channels), (channels, 1))
    corner = (index * rows + dy) * columns + dx
    first = corner[:, None] + columns * torch.arange(height, device=images.device)
    return runs.index_select(0, first.flatten()).view(len(index), height, width, channels)


def standardize(images, mean, std):
    """(B, H, W, C) uint8 to (B, H, W*C) float32; an axis of only C elements would be slow."""
    width = images.shape[2]
    return images.flatten(2).float().sub_(mean.repeat(width)).div_(std.repeat(width))


def squares(cut_y, cut_x, side, height, width, channels):
    """(B, H, W*C) float32: 1 in the square around each centre, as far as it lies within the image, else 0."""
    y = torch.arange(height, device=cut_y.device) - cut_y[:, None] + side // 2
    x = torch.arange(width * channels, device=cut_x.device) // channels - cut_x[:, None] + side // 2
    inside_y, inside_x = (y >= 0) & (y < side), (x >= 0) & (x < side)
    return inside_y.float()[:, :, None] * inside_x.float()[:, None, :]
