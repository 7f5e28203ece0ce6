"""The data sets that are published: of Section 4, and two that are at hand. Each reader returns
((images, labels), the same for the test or None, class names, lines for people)."""

import gzip
import hashlib
import os
from pathlib import Path

import numpy as np

from errors import DataError, message, told

DEBIAN_FASHION = Path("/usr/share/datasets/fashion-mnist")  # of the package dataset-fashion-mnist
FASHION = {  # the MD5 of each file's content, as MNIST's files have the same names
    "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
    "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
    "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
    "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
}


def read_digits(root, download):
    """The 1,797 digits of scikit-learn, 8x8."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.round(digits.images[:, None] * (255 / 16)).astype(np.uint8)  # 0..16 as published
    return (images, digits.target), None, tuple("0123456789"), []


def read_fashion(root, download):
    """Fashion-MNIST in torchvision's layout, as the four files alone, or from Debian's package."""
    from torchvision.datasets import FashionMNIST

    folders = (root / "FashionMNIST" / "raw", root, DEBIAN_FASHION)

    def find(name):
        places = [folder / file for folder in folders for file in (name, f"{name}.gz")]
        return next(filter(os.path.isfile, places), None)

    def read():
        if download and not all(map(find, FASHION)):
            FashionMNIST(root, download=True)
        if missing := [name for name in FASHION if find(name) is None]:
            raise DataError(f"{', '.join(missing)}, with or without .gz, missing in each of "
                            f"{', '.join(map(str, folders))}")
        images, labels, test_images, test_labels = (read_idx(find(n), md5) for n, md5 in FASHION.items())
        return (images, labels), (test_images, test_labels), tuple(FashionMNIST.classes), []

    return published("Fashion-MNIST", read, "install Debian's package dataset-fashion-mnist, or put the "
                     f"*-ubyte.gz of https://github.com/zalandoresearch/fashion-mnist into {root}")


def read_idx(path, md5):
    """Images (N, 1, 28, 28) or labels (N,) uint8 of one of Fashion-MNIST's files, plain or gzipped."""
    with told(f"cannot read {path}"), (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
        content = file.read()
        if hashlib.md5(content).hexdigest() != md5:
            raise DataError("wrong checksum: it is damaged, or of another data set with the same names, "
                            "such as MNIST; delete it")
    shape, header = ((-1, 1, 28, 28), 16) if content[3] == 3 else (-1, 8)
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape).copy()


def read_cifar10(root, download):
    from torchvision.datasets import CIFAR10

    def read():
        train, test = (CIFAR10(root, train, download=download) for train in (True, False))
        pairs = [(part.data.transpose(0, 3, 1, 2), part.targets) for part in (train, test)]
        return *pairs, tuple(train.classes), []

    return published("CIFAR-10", read, f"unpack {CIFAR10.filename} of "
                     f"https://www.cs.toronto.edu/~kriz/cifar.html into {root}")


def read_svhn(root, download):
    """SVHN; its training images are those of train and extra together (Sec. 4.2)."""
    from torchvision.datasets import SVHN

    def read():
        parts = [SVHN(root, split, download=download) for split in ("train", "extra", "test")]
        images, labels = [p.data for p in parts], [p.labels for p in parts]
        train = np.concatenate(images[:2]), np.concatenate(labels[:2])
        return train, (images[2], labels[2]), tuple("0123456789"), []

    return published("SVHN", read, "put train_32x32.mat, extra_32x32.mat and test_32x32.mat of "
                     f"http://ufldl.stanford.edu/housenumbers/ into {root}")


def published(title, read, how):
    """read(), or one line that says how to get the files."""
    try:
        return read()
    except (OSError, RuntimeError, DataError) as error:  # missing or damaged to torchvision; no network
        raise DataError(f"{title}: {message(error)}; run with --download, or {how}; --data-root or "
                        "EPBT_DATA name another folder") from error
