"""The intake of folders of images: each is read, told as left out, or refused with its number and its first path."""

import os
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

import folders
from data import Augmentation, data_set, load_data
from folders import read_image_folder, split_of
from tests.test_data import error_line

COLOURS = {"blue": (10, 20, 200), "green": (30, 180, 40), "red": (220, 50, 60)}


def write_folder(folder, classes=COLOURS, n=10, size=(12, 20), colour=None):
    for name in classes:
        (folder / name).mkdir(parents=True)
        for i in range(n):
            Image.new("RGB", size, colour or COLOURS[name]).save(folder / name / f"{i}.png")


def described(folder, **options):
    return "\n".join(load_data(str(folder), **options).describe())


def test_folder(tmp_path):
    write_folder(tmp_path)
    found, other = load_data(str(tmp_path), image_size=16, seed=1), load_data(str(tmp_path), image_size=16, seed=2)
    assert found.class_names == ("blue", "green", "red") and found.augmentation == Augmentation(shift=2)
    assert [len(s) for s in (found.train, found.validation, found.test)] == [21, 3, 6]
    assert found.test.images.shape == (6, 3, 16, 16) and found.test.labels.bincount().tolist() == [2, 2, 2]
    colours = torch.tensor(list(COLOURS.values()), dtype=torch.uint8)  # in the order of the labels
    assert torch.equal(found.test.images, colours[found.test.labels][:, :, None, None].expand(-1, 3, 16, 16))
    assert torch.equal(found.train.images[:, :, 9, 9], colours[found.train.labels])
    assert torch.equal(found.test.images, other.test.images)


def test_what_is_told(tmp_path):
    write_folder(tmp_path / "Training_Set", n=10)
    write_folder(tmp_path / "test2", n=4)
    for text in ("LICENSE.md", "test2/red/labels.CSV"):
        (tmp_path / text).write_text("no image")
    (tmp_path / "test2" / "red" / ".ipynb_checkpoints").mkdir()
    (tmp_path / "test2" / "red" / "._0.png").write_text("what macOS leaves on other disks")
    lines = described(tmp_path, train_on_all=True, enlarge=2)
    for words in ("3 classes, 32x32 pixels", "training, validation and test images: [30, 6, 12]; blue [10, 2, 4]; green",
                  "not flipped, shifted by up to 4 pixels\n", "are resized to 32x32 pixels",
                  f"{tmp_path}/Training_Set is trained on, {tmp_path}/test2 is the test",
                  f"2 hidden files left out, first {tmp_path}/test2/red/._0.png",
                  f"2 files of text left out, first {tmp_path}/LICENSE.md", '--augmentation "flip shift cutout"',
                  "2 augmented copies of each of 3", "validation images are trained on as well"):
        assert words in lines, words
    lines = described(tmp_path, augmentation="flip cutout")
    assert "flipped left to right, a square of 16 pixels cut out" in lines and "--augmentation" not in lines
    assert data_set(str(tmp_path), 32, "flip cutout").augmentation == Augmentation(flip=True, cutout=16)


def test_many_classes_are_told_in_one_line(tmp_path):
    write_folder(tmp_path, [f"c{i:02}" for i in range(30)], n=3, colour=(1, 2, 3))
    Image.new("RGB", (8, 8)).save(tmp_path / "c17" / "more.png")
    assert "[31, 30, 30]; the smallest c" in described(tmp_path) and "the largest c17 [2, 1, 1]" in described(tmp_path)


@pytest.mark.parametrize("name, kind", [
    *[(name, "train") for name in ("train", "Training", "seg_train", "TRAIN", "trainset", "train-1", "trainA", "xTrain",
                                   "Training_Set", "train_images", "my training data", "imagesTrain2")],
    *[(name, "test") for name in ("test", "TEST_SIMPLE", "test1", "testing", "Real Test", "images.test", "testB")],
    *[(name, "other") for name in ("val", "valid", "VALIDATION", "valset", "seg_pred", "holdout", "dev", "unlabeled",
                                   "evaluation", "hold-out", "train_val", "fold3", "images_to_predict", "sample")],
    *[(name, None) for name in ("cat", "valley", "oval", "value", "invalid", "predator", "terrain", "device", "attestation",
                                "猫", "retrial", "extract", "manifold")],
])
def test_names_of_splits(name, kind):
    assert split_of(name) == kind


@pytest.mark.parametrize("parts, words", [
    *[(parts, "look like parts of a data set, not like classes; accepted are FOLDER/<class>/<image>, or") for parts in (
        "train val", "train test valid", "Train TEST meta", "red test train", "TRAIN TEST TEST_SIMPLE", "train holdout",
        "seg_train seg_test seg_pred", "train", "train sample", "training evaluation validation", "train other",
        "train-set test-set extra", "train Test test", "fold_1 fold_2")],
    ("part1 part2", "2 subfolders of"), ("2019 2020 2021", "some the same, as blue: which are the classes?"),
    *[(parts, None) for parts in ("train test", "Training_Set TEST_SET", "seg_train seg_test", "Test1 Train1")],
])
def test_splits_are_understood_or_refused(tmp_path, parts, words):
    for part in parts.split():
        write_folder(tmp_path / part)
    if words:
        line = error_line(load_data, str(tmp_path))
        assert words in line and str(tmp_path) in line
    else:
        found = load_data(str(tmp_path))
        assert found.class_names == tuple(COLOURS) and [len(found.train), len(found.test)] == [27, 30]


@pytest.mark.parametrize("names, fine", [(["red", "train"], True), (["latest", "value"], True), (["test", "train"], False),
                                         (["Train", "unlabelled"], False), (["contest", "my_test"], False)])
def test_one_class_may_have_the_name_of_a_split(tmp_path, names, fine):
    write_folder(tmp_path, names, colour=(1, 2, 3))
    if fine:
        assert load_data(str(tmp_path)).class_names == tuple(names)
    else:
        error_line(load_data, str(tmp_path))


def test_classes_of_the_splits_differ(tmp_path):
    write_folder(tmp_path / "train", ["red", "green"])
    write_folder(tmp_path / "test", ["red", "blue"])
    assert "same classes; only one of them has blue, green" in error_line(load_data, str(tmp_path))


@pytest.mark.parametrize("counts, parts", [((50, 50, 2), None), ((3,) * 20, [1, 1, 1]), ((40, 40, 3), [1, 1, 1])])
def test_rare_classes(tmp_path, counts, parts):
    for i, n in enumerate(counts):
        write_folder(tmp_path, [f"c{i:02}"], n=n, colour=(i, i, i))
    for seed in range(5):
        if parts is None:
            assert "1 of 3 classes have too few images, first c02" in error_line(load_data, str(tmp_path), seed=seed)
        else:
            found = load_data(str(tmp_path), seed=seed)
            last = [int((s.labels == len(counts) - 1).sum()) for s in (found.train, found.validation, found.test)]
            assert last == parts


# Single images


def test_transparency_and_orientation(tmp_path):
    upright = np.zeros((64, 64, 3), np.uint8)
    upright[:32] = 255  # white above, black below
    stored = {1: upright, 2: upright, 3: upright[::-1], 6: np.rot90(upright), 8: np.rot90(upright, 3)}
    (tmp_path / "b").mkdir()
    Image.new("L", (8, 8), 7).save(tmp_path / "b" / "grey.png")
    (tmp_path / "a").mkdir()
    for orientation, pixels in stored.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(np.ascontiguousarray(pixels)).save(tmp_path / "a" / f"{orientation}.png", exif=exif)
    clear = Image.new("P", (8, 8), 0)
    clear.putpalette([0, 0, 0])
    clear.save(tmp_path / "a" / "x.gif", transparency=0)
    for i, mode in enumerate(("RGBA", "LA")):
        Image.new(mode, (8, 8), (0,) * len(mode)).save(tmp_path / "a" / f"y{i}.png")
        Image.new(mode, (8, 8), (0,) * (len(mode) - 1) + (255,)).save(tmp_path / "a" / f"z{i}.png")  # opaque
    intake = folders.Intake(tmp_path)
    images, labels, names = read_image_folder(tmp_path, 8, intake)
    assert names == ("a", "b") and labels.tolist() == [0] * 10 + [1]
    assert (images[:5, :, :3] > 250).all() and (images[:5, :, 5:] < 5).all()
    assert (images[5:8] == 255).all() and (images[8:10] == 0).all() and (images[10] == 7).all()
    assert {what: len(paths) for what, paths in intake.notes.items()} == {
        "images turned upright by their EXIF data": 4, "images with transparency laid on white": 3}


def png16(colour, channels):
    """A PNG file of 16 bits a channel, which Pillow cannot write."""
    rows = b"".join(b"\0" + np.full((8, channels), 1023, ">u2").tobytes() for _ in range(8))

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 16, colour, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


def tiff16():
    """A TIFF file of 16 bits a channel in RGB."""
    tags = [(256, 3, 1, 8), (257, 3, 1, 8), (258, 3, 3, 122), (259, 3, 1, 1), (262, 3, 1, 2), (273, 4, 1, 128),
            (277, 3, 1, 3), (278, 3, 1, 8), (279, 4, 1, 384)]
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + b"\0" * 4
    return head.ljust(122, b"\0") + struct.pack("<HHH", 16, 16, 16) + np.full(192, 1023, "<u2").tobytes()


@pytest.mark.parametrize("content", [
    png16(0, 1), png16(2, 3), png16(4, 2), png16(6, 4), tiff16(),
    b"P6 8 8 65535\n" + bytes(384), b"P6 8 8 1023\n" + bytes(384), b"P3 8 8 256\n" + b"9 " * 192,
    b"P5 8 8 65535\n" + bytes(128), b"", b"nothing", png16(2, 3)[:60],
])
def test_images_that_cannot_be_read(tmp_path, content):
    write_folder(tmp_path)
    for i in (3, 7):
        (tmp_path / "red" / f"{i}.png").write_bytes(content)
    line = error_line(load_data, str(tmp_path))
    assert f"cannot read 2 of 30 images, first {tmp_path}/red/3.png (" in line and "8 bits a channel" in line


@pytest.mark.parametrize("extension, kind", [
    (".gif", "GIF"), (".jfif", "JPEG"), (".jpe", "JPEG"), (".avif", "AVIF"), (".jp2", "JPEG2000"), ("", "PNG"),
    (".ppm", "PPM"), (".jpg_large", "JPEG"), (".JPG", "JPEG"), (".tga", "TGA"), (".bmp", "BMP"), (".TIFF", "TIFF")])
def test_images_of_any_extension(tmp_path, extension, kind):
    write_folder(tmp_path, n=6)
    for i in range(4):
        (tmp_path / "red" / f"{i}.png").unlink()
        Image.new("RGB", (16, 16), COLOURS["red"]).save(tmp_path / "red" / f"{i}{extension}", format=kind)
    found = load_data(str(tmp_path))
    assert sum((s.labels == 2).sum() for s in (found.train, found.validation, found.test)) == 6


def test_several_frames(tmp_path):
    write_folder(tmp_path)
    frames = [Image.new("RGB", (8, 8), (i, 99, 0)) for i in range(4)]
    frames[0].save(tmp_path / "red" / "film.gif", save_all=True, append_images=frames[1:])
    assert f"1 images have several frames, of which the first is read, first {tmp_path}/red/film.gif" in described(tmp_path)


# Folders and links


@pytest.mark.parametrize("link, target, words", [
    ("blue/self", ".", 1), ("blue/up", "..", 1), ("blue/out", "../..", 1), ("blue/other", "../red", 1),
    ("blue/latest.png", "0.png", 1), ("blue/also.png", "../.store/x.png", None),
    ("blue/broken.png", "gone.png", "blue/broken.png is neither a file nor a folder, or a link to nothing"),
    ("grey", "gone", "grey is neither a file nor a folder, or a link to nothing"),
    ("grey", "red", "1 of 4 classes in"), ("alpha", "red", "1 of 4 classes in"),
])
def test_links(tmp_path, link, target, words):
    folder = tmp_path / "images"
    write_folder(folder)
    (folder / ".store").mkdir()
    Image.new("RGB", (8, 8)).save(folder / ".store" / "x.png")
    os.symlink(target, folder / link)
    if isinstance(words, str):
        assert words in error_line(load_data, str(folder))
        return
    _, labels, _ = read_image_folder(folder, 8)
    assert np.bincount(labels).tolist() == [10 if words else 11, 10, 10]  # a link into what is hidden counts
    assert ("1 links left out, as what they lead to is read where it lies, first" in described(folder)) == bool(words)


def test_links_to_elsewhere(tmp_path):
    write_folder(tmp_path / "store")
    folder = tmp_path / "images"
    folder.mkdir()
    for name in COLOURS:
        os.symlink(tmp_path / "store" / name, folder / name)
    os.symlink(".", tmp_path / "store" / "red" / "self")
    assert load_data(str(folder)).class_names == tuple(COLOURS)
    assert np.bincount(read_image_folder(folder, 8)[1]).tolist() == [10, 10, 10]
    os.symlink(tmp_path / "store" / "red", folder / "pink")
    assert f"red is also in {folder}/pink: an image must be in one class alone" in error_line(load_data, str(folder))


def test_folders_that_cannot_be_used(tmp_path, monkeypatch):
    folder = tmp_path / "images"
    folder.mkdir()
    assert f"{folder} has 0 classes, where two are the least; accepted are" in error_line(load_data, str(folder))
    write_folder(folder, ["red"])
    assert f"{folder} has 1 classes" in error_line(load_data, str(folder))
    write_folder(folder, ["blue"])
    (folder / "green").mkdir()
    (folder / "green" / "notes.txt").write_text("no image")
    assert "1 of 3 classes in" in error_line(load_data, str(folder)) and "first green" in error_line(load_data, str(folder))
    (folder / "green").rename(folder / ".green")
    (folder / "0.png").write_bytes((folder / "red" / "0.png").read_bytes())
    assert f"1 files lie beside the folders of the classes, first {folder}/0.png" in error_line(load_data, str(folder))
    (folder / "0.png").unlink()
    assert "cannot be resized to 7 pixels" in error_line(load_data, str(folder), image_size=7)
    os.mkfifo(folder / "red" / "pipe")
    assert "red/pipe is neither a file nor a folder" in error_line(load_data, str(folder))
    (folder / "red" / "pipe").unlink()
    (folder / "red" / "more").mkdir()
    scandir = os.scandir

    def refuse(path):  # as a folder without permission does, but for the superuser too
        if str(path).endswith("more"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert f"cannot read the folder {folder}/red/more (Permission denied)" in error_line(load_data, str(folder))


def test_names_that_are_no_utf8(tmp_path):
    root = os.fsencode(tmp_path) + b"/p\xe9"
    for name in (b"caf\xe9", b"$x_{$"):
        os.makedirs(root + b"/" + name)
        for i in range(5):
            Image.new("RGB", (8, 8)).save(os.fsdecode(root + b"/" + name + b"/%d.png" % i))
    found = load_data(os.fsdecode(root))
    assert found.class_names == ("$x_{$", "caf\\udce9") and "\n".join(found.describe()).encode()
    open(root + b"/caf\xe9/\xe9.png", "wb").close()
    assert "caf\\udce9/\\udce9.png (" in error_line(load_data, os.fsdecode(root))
