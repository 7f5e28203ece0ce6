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
