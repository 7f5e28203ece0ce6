"""The published data sets: those of Section 4 and three small ones. Each reader returns
(images, labels) for training, the same for the test or None, class names, and lines for people."""

import gzip
import hashlib
import importlib.util
from pathlib import Path

import numpy as np

from errors import DataError, told

CLOTHES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker",
           "Bag", "Ankle boot")  # Fashion-MNIST's classes
DEBIAN_FASHION = Path("/usr/share/datasets/fashion-mnist")  # package dataset-fashion-mnist
FASHION = {  # MD5 of the unpacked content; MNIST's files have the same names
    "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
    "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
    "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
    "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
}


def published(title, how):
    """Turn any error within into one line that says what to do."""
    return told(title, f"; run with --download, or {how}; --data-root or EPBT_DATA name another "
                "folder")


def read_digits(root, download):
    """The 1,797 digits, 8x8, from scikit-learn's file: to import scikit-learn takes a second."""
    (package,) = importlib.util.find_spec("sklearn").submodule_search_locations
    with gzip.open(Path(package, "datasets", "data", "digits.csv.gz"), "rt") as file:
        table = np.loadtxt(file, dtype=np.int64, delimiter=",")  # 64 pixels, 0..16, and the label
    images = np.round(table[:, :-1].reshape(-1, 1, 8, 8) * (255 / 16)).astype(np.uint8)
    return (images, table[:, -1]), None, tuple("0123456789"), []


def read_fashion(root, download):
    """Fashion-MNIST from torchvision's folders, from root itself, or from Debian's package."""
    folders = (root / "FashionMNIST" / "raw", root, DEBIAN_FASHION)

    def find(name):
        places = (folder / file for folder in folders for file in (name, f"{name}.gz"))
        return next(filter(Path.is_file, places), None)

    with published("Fashion-MNIST", "install Debian's package dataset-fashion-mnist, or put the "
                   f"*-ubyte.gz of https://github.com/zalandoresearch/fashion-mnist into {root}"):
        if download and not all(map(find, FASHION)):
            from torchvision.datasets import FashionMNIST  # slow to import

            FashionMNIST(root, download=True)
        if missing := [name for name in FASHION if not find(name)]:
            raise DataError(f"{', '.join(missing)}, with or without .gz, missing in each of "
                            f"{', '.join(map(str, folders))}")
        parts = [read_idx(find(name), md5) for name, md5 in FASHION.items()]
    return parts[:2], parts[2:], CLOTHES, []


def read_long_tail(root, download):
    """Fashion-MNIST with 6,000 training images of the first class, 4,112 of the second, and so on,
    each class in the same ratio to the one before, down to 200 of the last."""
    (images, labels), *rest = read_fashion(root, download)
    kept = np.concatenate([np.flatnonzero(labels == c)[: round(6000 * (1 / 30) ** (c / 9))]
                           for c in range(len(CLOTHES))])
    return (images[kept], labels[kept]), *rest


def read_idx(path, md5):
    """Read a file of Fashion-MNIST: images (N, 1, 28, 28) or labels (N,), uint8."""
    read = gzip.open if path.suffix == ".gz" else open
    with told(f"cannot read {path}"), read(path, "rb") as file:
        content = file.read()
        if hashlib.md5(content).hexdigest() != md5:
            raise DataError("wrong checksum: it is damaged, or of another data set with the same "
                            "names, such as MNIST; delete it")
    shape, header = ((-1, 1, 28, 28), 16) if "images" in path.name else (-1, 8)
    return np.frombuffer(bytearray(content), np.uint8, offset=header).reshape(shape)


def read_cifar10(root, download):
    from torchvision.datasets import CIFAR10

    with published("CIFAR-10", f"unpack {CIFAR10.filename} of "
                   f"https://www.cs.toronto.edu/~kriz/cifar.html into {root}"):
        parts = [CIFAR10(root, train, download=download) for train in (True, False)]
    pairs = [(part.data.transpose(0, 3, 1, 2), part.targets) for part in parts]
    return *pairs, tuple(parts[0].classes), []


def read_svhn(root, download):
    """SVHN. It trains on the splits train and extra together (Sec. 4.2)."""
    from torchvision.datasets import SVHN

    with published("SVHN", "put train_32x32.mat, extra_32x32.mat and test_32x32.mat of "
                   f"http://ufldl.stanford.edu/housenumbers/ into {root}"):
        *both, test = [SVHN(root, split, download=download) for split in ("train", "extra", "test")]
    train = [np.concatenate([getattr(p, name) for p in both]) for name in ("data", "labels")]
    return train, (test.data, test.labels), tuple("0123456789"), []
