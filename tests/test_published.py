"""The published data sets, read from small files in their formats, which are written here."""

import gzip
import hashlib
import pickle
from urllib.error import URLError

import numpy as np
import pytest
import scipy.io
import torch
from torchvision.datasets import CIFAR10, SVHN

import published
from data import load_data
from tests.test_data import error_line, numbered, numbers

TORCHVISION = "torchvision.datasets.{}.download_and_extract_archive"


def md5(content):
    return hashlib.md5(content).hexdigest()


def write_cifar10(root, monkeypatch, per_batch=20):
    """Six batches and the meta file as published, their checksums made known to torchvision."""
    folder = root / CIFAR10.base_folder
    folder.mkdir(parents=True)

    def write(name, **content):
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
        return md5((folder / name).read_bytes())

    listed = []
    for b, name in enumerate([f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]):
        images, labels = numbered(per_batch, 3, 32, 32, first=b * per_batch)
        checksum = write(name, labels=labels.tolist(), data=images.reshape(per_batch, 3072))
        listed.append([name, checksum])
    meta = write("batches.meta", label_names=[f"name {i}" for i in range(10)])
    monkeypatch.setattr(CIFAR10, "train_list", listed[:5])
    monkeypatch.setattr(CIFAR10, "test_list", listed[5:])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": meta})
    return folder


def write_svhn(root, monkeypatch):
    """The three .mat files as published: X (32, 32, 3, N), y (N, 1) with 10 for the digit 0."""
    split_list = {}
    for i, (split, (url, name, _)) in enumerate(SVHN.split_list.items()):
        images, labels = numbered(30, 3, 32, 32, first=100 * i)
        labels = np.where(labels == 0, 10, labels).astype(np.uint8)[:, None]
        scipy.io.savemat(root / name, {"X": images.transpose(2, 3, 1, 0), "y": labels})
        split_list[split] = [url, name, md5((root / name).read_bytes())]
    monkeypatch.setattr(SVHN, "split_list", split_list)


@pytest.fixture
def write_fashion(monkeypatch, tmp_path):
    """Writes the four idx files into a folder, and makes their checksums known."""
    monkeypatch.setattr(published, "DEBIAN_FASHION", tmp_path / "debian")

    def write(folder, compress, checksums=True):
        folder.mkdir(parents=True, exist_ok=True)
        for part, n, first in (("train", 60, 0), ("t10k", 20, 1000)):
            images, labels = numbered(n, 1, 28, 28, first=first)
            for kind, array in (("images", images[:, 0]), ("labels", labels.astype(np.uint8))):
                shape = np.array(array.shape, dtype=">i4").tobytes()
                content = bytes([0, 0, 8, array.ndim]) + shape + array.tobytes()
                name = f"{part}-{kind}-idx{array.ndim}-ubyte"
                if checksums:
                    monkeypatch.setitem(published.FASHION, name, md5(content))
                content = gzip.compress(content) if compress else content
                (folder / (name + ".gz" * compress)).write_bytes(content)
    return write


def check(found, originals, ids):
    """The training and validation images are the originals with the numbers `ids`, both in the same
    order; a border of 2 was added for shifts."""
    train, validation = numbers(found.train, 2), numbers(found.validation)
    assert sorted(train.tolist() + validation.tolist()) == ids
    where = torch.searchsorted(torch.tensor(ids), train)
    assert torch.equal(found.train.images[:, :, 2:-2, 2:-2], torch.from_numpy(originals)[where])
    assert torch.equal(found.train.labels, train % 10)


def test_cifar10(tmp_path, monkeypatch):
    folder = write_cifar10(tmp_path, monkeypatch)
    monkeypatch.setenv("EPBT_DATA", str(tmp_path))
    found = load_data("cifar10", validation=10, augmentation="shift=2")
    originals = [numbered(20, 3, 32, 32, first=20 * b)[0] for b in range(6)]
    check(found, np.concatenate(originals[:5]), list(range(100)))
    assert np.array_equal(found.test.images, originals[5]) and found.class_names[3] == "name 3"
    (folder / "data_batch_3").write_bytes((folder / "data_batch_3").read_bytes()[:-100])
    line = error_line(load_data, "cifar10", tmp_path)
    assert line.startswith("CIFAR-10: RuntimeError: Dataset not found or corrupted.")
    assert "run with --download, or unpack cifar-10-python.tar.gz" in line
    assert line.endswith(f"into {tmp_path}; --data-root or EPBT_DATA name another folder")


def test_svhn(tmp_path, monkeypatch):
    write_svhn(tmp_path, monkeypatch)
    found = load_data("svhn", tmp_path, validation=20, augmentation="shift=2")
    first = {split: 100 * i for i, split in enumerate(SVHN.split_list)}
    starts = sorted((first["train"], first["extra"]))
    originals = [numbered(30, 3, 32, 32, first=start)[0] for start in starts]
    check(found, np.concatenate(originals), [start + i for start in starts for i in range(30)])
    assert numbers(found.test).tolist() == [first["test"] + i for i in range(30)]
    assert len(found.validation) == 20
    (tmp_path / "extra_32x32.mat").unlink()
    assert "SVHN: RuntimeError: Dataset not found" in error_line(load_data, "svhn", tmp_path)


@pytest.mark.parametrize("place", ["FashionMNIST/raw", ".", "debian"])
@pytest.mark.parametrize("compress", [True, False])
def test_fashion(tmp_path, write_fashion, place, compress):
    write_fashion(tmp_path / place, compress)
    found = load_data("fashion", tmp_path, validation=10, augmentation="shift=2")
    check(found, numbered(60, 1, 28, 28)[0], list(range(60)))
    assert numbers(found.test).tolist() == list(range(1000, 1020))
    assert found.class_names[9] == "Ankle boot"


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("damage", [lambda c: c[:-5], lambda c: b"", lambda c: b"<html>" * 9, None])
def test_fashion_damaged_or_of_another_data_set(tmp_path, write_fashion, compress, damage):
    write_fashion(tmp_path, compress, checksums=damage is not None)
    name = "train-images-idx3-ubyte" + ".gz" * compress
    if damage:
        (tmp_path / name).write_bytes(damage((tmp_path / name).read_bytes()))
    line = error_line(load_data, "fashion", tmp_path)
    assert f"Fashion-MNIST: cannot read {tmp_path / name}: " in line and "--download" in line
    assert damage or "wrong checksum: it is damaged, or of another data set" in line


@pytest.mark.parametrize("name, module, words", [
    ("cifar10", "cifar", "Dataset not found"),
    ("fashion", "mnist", "labels-idx1-ubyte, with or without .gz, missing in each of /"),
])
def test_missing_and_downloaded(tmp_path, write_fashion, monkeypatch, name, module, words):
    calls = []

    def download(url, download_root, **options):
        calls.append(url)
        if len(calls) == 1:
            raise URLError("no\nnetwork")
        if name == "fashion":
            write_fashion(tmp_path / "FashionMNIST" / "raw", compress=False)
        else:
            write_cifar10(tmp_path, monkeypatch)

    monkeypatch.setattr(TORCHVISION.format(module), download)
    assert words in error_line(load_data, name, tmp_path) and not calls
    assert "no network" in error_line(load_data, name, tmp_path, download=True)
    assert len(load_data(name, tmp_path, validation=10, download=True).validation) == 10
    assert len(calls) > 1


@pytest.mark.skipif(not published.DEBIAN_FASHION.is_dir(), reason="needs dataset-fashion-mnist")
def test_fashion_of_debian_and_its_long_tail(tmp_path):
    found = load_data("fashion", tmp_path, validation=5000)
    assert [len(s) for s in (found.train, found.validation, found.test)] == [55_000, 5_000, 10_000]
    assert found.validation.labels.bincount().tolist() == [500] * 10
    assert found.mean.item() / 255 == pytest.approx(0.286, abs=1e-3)  # the data set's known mean
    ratio = 30 ** (-1 / 9)
    whole = load_data("fashion-long-tail", tmp_path, validation=10, train_on_all=True)
    assert whole.train.labels.bincount().tolist() == [round(6000 * ratio**c) for c in range(10)]
    part = load_data("fashion-long-tail", tmp_path, validation=0.2, limit=1862)
    train, held_out = part.train.labels.bincount(), part.validation.labels.bincount()
    assert (train + held_out).tolist() == pytest.approx([600 * ratio**c for c in range(10)], abs=1)
    assert held_out.tolist() == pytest.approx((train / 4).tolist(), abs=1)
    for data in (found, whole):
        assert data.test.labels.bincount().tolist() == [1000] * 10
