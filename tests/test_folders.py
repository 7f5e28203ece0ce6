"""Folders of images: each file is read, reported as left out, or refused with its path."""

import io
import os
import struct
import subprocess
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from augmentation import Augmentation
from data import load_data
from folders import Intake, read_image_folder, split_of
from tests.test_data import error_line

COLOURS = {"blue": (10, 20, 200), "green": (30, 180, 40), "red": (220, 50, 60)}


def write_folder(folder, classes=COLOURS, n=10, colour=None):
    for name in classes:
        (folder / name).mkdir(parents=True)
        for i in range(n):
            Image.new("RGB", (12, 20), colour or COLOURS[name]).save(folder / name / f"{i}.png")


def described(folder, **options):
    return "\n".join(load_data(str(folder), **options).describe())


def refused(folder, **options):
    return error_line(load_data, str(folder), **options)


def test_folder(tmp_path):
    write_folder(tmp_path)
    found, other = (load_data(str(tmp_path), image_size=16, seed=seed) for seed in (1, 2))
    assert found.class_names == tuple(COLOURS) and found.augmentation == Augmentation(shift=2)
    assert [len(s) for s in (found.train, found.validation, found.test)] == [21, 3, 6]
    assert found.test.images.shape == (6, 3, 16, 16)
    assert found.test.labels.bincount().tolist() == [2, 2, 2]
    colours = torch.tensor(list(COLOURS.values()), dtype=torch.uint8)  # in the order of the labels
    for image_set in (found.train, found.validation, found.test):
        assert torch.equal(image_set.images[:, :, 9, 9], colours[image_set.labels])
    assert torch.equal(found.test.images, other.test.images)


def test_the_first_lines_of_a_run_say_what_was_read_and_left_out(tmp_path):
    write_folder(tmp_path / "Training_Set")
    write_folder(tmp_path / "test2", n=4)
    for text in ("LICENSE.md", "cover", "test2/red/labels.CSV", "test2/red/._0.png"):
        (tmp_path / text).write_text("no image")
    (tmp_path / "test2" / "red" / ".ipynb_checkpoints").mkdir()
    frames = [Image.new("RGB", (8, 8), (i, 99, 0)) for i in range(4)]
    film = tmp_path / "test2" / "red" / "film.gif"
    frames[0].save(film, save_all=True, append_images=frames[1:])
    lines = described(tmp_path, train_on_all=True, enlarge=2)
    for words in ("3 classes, 32x32 pixels", "to each training image: shift=4\n",
                  "training, validation and test images: [30, 6, 13]; blue [10, 2, 4]; green",
                  f"{tmp_path}/Training_Set is trained on, {tmp_path}/test2 is the test",
                  f"4 hidden files and texts left out, first {tmp_path}/LICENSE.md",
                  f"1 files beside the folders left out, first {tmp_path}/cover",
                  f"1 images have several frames; only the first is read, first {film}",
                  '--augmentation "flip shift cutout"', "are resized to 32x32 pixels in RGB",
                  "2 augmented copies of each of 3", "validation images are trained on as well"):
        assert words in lines, words
    lines = described(tmp_path, augmentation="flip cutout")
    assert "training image: flip cutout=16" in lines and "--augmentation" not in lines
    write_folder(tmp_path / "many", [f"c{i:02}" for i in range(30)], n=3, colour=(1, 2, 3))
    frames[0].save(tmp_path / "many" / "c17" / "more.png")
    words = ("[31, 30, 30]; c00 [1, 1, 1]; c17 [2, 1, 1]; "
             "the others have numbers of training images between")
    assert words in described(tmp_path / "many")


NAMES = {
    "train": "train,Training,seg_train,TRAIN,trainset,train-1,trainA,xTrain,Training_Set,"
             "train_images,my training data,imagesTrain2",
    "test": "test,TEST_SIMPLE,test1,testing,Real Test,images.test,testB",
    "other": "val,valid,VALIDATION,valset,seg_pred,holdout,dev,unlabeled,evaluation,hold-out,"
             "train_val,fold3,images_to_predict,sample",
    None: "cat,valley,oval,value,invalid,predator,terrain,device,attestation,猫,retrial,extract,"
          "manifold"}


def test_names_of_splits():
    found = {kind: ",".join(filter(lambda name: split_of(name) == kind, names.split(",")))
             for kind, names in NAMES.items()}
    assert found == NAMES


@pytest.mark.parametrize("parts", [
    "train val", "train test valid", "Train TEST meta", "red test train", "train other", "train",
    "TRAIN TEST TEST_SIMPLE", "train holdout", "seg_train seg_test seg_pred", "train sample",
    "training evaluation validation", "train-set test-set extra", "fold_1 fold_2", "2019 2020 2021",
    "train Test test", "Train unlabelled/", "test/ train/"])
def test_splits_that_are_refused(tmp_path, parts):
    for part in parts.split():  # with a slash, it has images in place of classes
        write_folder(tmp_path / part, [""] if part[-1] == "/" else COLOURS, 1, (1, 2, 3))
    line, flat = refused(tmp_path), parts == "test/ train/"
    assert ("has 1 files beside the folders" if flat else f"{tmp_path} has the subfolders ") in line
    assert ("look like parts of a data set, not like classes; move away what is" in line) != flat


@pytest.mark.parametrize("parts", [
    "train test", "Training_Set TEST_SET", "seg_train seg_test", "Test1 Train1"])
def test_splits_that_are_understood(tmp_path, parts):
    for part in parts.split():
        write_folder(tmp_path / part)
    found = load_data(str(tmp_path))
    assert (found.class_names, len(found.train), len(found.test)) == (tuple(COLOURS), 27, 30)
    (tmp_path / part / "red").rename(tmp_path / part / "pink")
    assert "must have the same classes; only one of them has pink, red" in refused(tmp_path)


@pytest.mark.parametrize("counts, rare", [
    ((50, 50, 2), True), ((50, 1), True), ((3,) * 20, False), ((40, 40, 3), False)])
def test_rare_classes(tmp_path, counts, rare):
    for i, n in enumerate(counts):  # one class may have the name of a split
        write_folder(tmp_path, ["train" if i == len(counts) - 1 else f"c{i:02}"], n, (i, i, i))
    if rare:
        assert "first train, have fewer than two training images" in refused(tmp_path)
    for seed in range(0 if rare else 3):
        found = load_data(str(tmp_path), seed=seed)
        for image_set in (found.train, found.validation, found.test):
            assert (image_set.labels == len(counts) - 1).sum() == 1


def test_transparency_and_orientation(tmp_path):
    write_folder(tmp_path, ["a", "b"], n=0)
    upright = np.zeros((64, 64, 3), np.uint8)
    upright[:32] = 255  # white above, black below
    turns = {1: 0, 2: 0, 3: 2, 6: 1, 8: 3}  # EXIF's orientation, and quarters of a turn
    for orientation, pixels in ((key, np.rot90(upright, n)) for key, n in turns.items()):
        exif = Image.Exif()
        exif[0x0112] = orientation
        image = Image.fromarray(np.ascontiguousarray(pixels))
        image.save(tmp_path / "a" / f"{orientation}.png", exif=exif)
    clear = Image.new("P", (8, 8), 0)
    clear.putpalette([0, 0, 0])
    clear.save(tmp_path / "a" / "x.gif", transparency=0)
    for i, mode in enumerate(("RGBA", "LA")):
        black = (0,) * (len(mode) - 1)
        Image.new(mode, (8, 8), (*black, 0)).save(tmp_path / "a" / f"y{i}.png")
        Image.new(mode, (8, 8), (*black, 255)).save(tmp_path / "a" / f"z{i}.png")  # opaque
    Image.new("L", (8, 8), 7).save(tmp_path / "b" / "grey.png")
    intake = Intake(tmp_path)
    images, labels, names = read_image_folder(tmp_path, 8, intake)
    assert names == ("a", "b") and labels.tolist() == [0] * 10 + [1]
    assert (images[:5, :, :3] > 250).all() and (images[:5, :, 5:] < 5).all()
    assert [images[i:j].mean() for i, j in ((5, 8), (8, 10), (10, 11))] == [255, 0, 7]
    assert {what: len(paths) for what, paths in intake.notes.items()} == {
        "images turned upright by their EXIF data": 4, "images with transparency laid on white": 3}


def png16(colour, channels):
    """A PNG file of 16 bits a channel, which Pillow cannot write."""
    rows = b"".join(b"\0" + np.full((8, channels), 1023, ">u2").tobytes() for _ in range(8))

    def chunk(kind, body):
        ends = len(body), zlib.crc32(kind + body)
        return struct.pack(">I", ends[0]) + kind + body + struct.pack(">I", ends[1])
    header = struct.pack(">IIBBBBB", 8, 8, 16, colour, 0, 0, 0)
    chunks = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def saved(mode, kind, **options):
    file = io.BytesIO()
    Image.new(mode, (8, 8)).save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("content", [
    png16(0, 1), png16(2, 3), png16(4, 2), png16(6, 4), png16(2, 3)[:60], b"", b"nothing",
    saved("RGB", "SGI", bpc=2), saved("I;16", "TIFF"),
    b"P6 8 8 65535\n" + bytes(384), b"P6 8 8 1023\n" + bytes(384), b"P3 8 8 256\n" + b"9 " * 192,
    b"P5 8 8 65535\n" + bytes(128)])
def test_images_that_cannot_be_read(tmp_path, content):
    write_folder(tmp_path)
    for i in (3, 7):
        (tmp_path / "red" / f"{i}.png").write_bytes(content)
    line = refused(tmp_path)
    assert f"cannot read 2 of 30 images, first {tmp_path}/red/3.png (" in line
    assert "8 bits a channel" in line


def test_images_of_any_extension(tmp_path):
    write_folder(tmp_path, n=0)
    kinds = {"": "PNG", ".gif": "GIF", ".jfif": "JPEG", ".jpe": "JPEG", ".avif": "AVIF",
             ".jp2": "JPEG2000", ".ppm": "PPM", ".jpg_large": "JPEG", ".JPG": "JPEG", ".tga": "TGA",
             ".bmp": "BMP", ".TIFF": "TIFF"}
    for (extension, kind), name in ((item, name) for item in kinds.items() for name in COLOURS):
        image = Image.new("RGB", (16, 16), COLOURS[name])
        image.save(tmp_path / name / f"{kind}{extension}", format=kind)
    (tmp_path / "red" / "15.ppm").write_bytes(b"P6 8 8 15\n" + bytes([15, 0, 0]) * 64)  # of 4 bits
    images, labels, _ = read_image_folder(tmp_path, 8)
    assert np.bincount(labels).tolist() == [12, 12, 13]
    assert images[24, :, 3, 3].tolist() == [255, 0, 0]
    colours = np.array(list(COLOURS.values()))[np.delete(labels, 24)]
    assert np.abs(np.delete(images, 24, 0)[:, :, 3, 3] - colours).max() <= 3


@pytest.mark.parametrize("made, counts", [
    ("ln -s . blue/self", [10, 10, 10]), ("ln -s 0.png blue/latest.png", [10, 10, 10]),
    ("ln -s ../.store/x.png blue/also.png", [11, 10, 10]),
    ("ln -s ../../elsewhere blue/more", [11, 10, 10])])
def test_links(tmp_path, made, counts):
    write_folder(tmp_path / "images")
    write_folder(tmp_path, ["elsewhere", "images/.store"], 1, (1, 2, 3))
    (tmp_path / "images" / ".store" / "0.png").rename(tmp_path / "images" / ".store" / "x.png")
    subprocess.run(made, shell=True, check=True, cwd=tmp_path / "images")
    assert np.bincount(read_image_folder(tmp_path / "images", 8)[1]).tolist() == counts
    left_out = "1 links left out, as what they lead to is read" in described(tmp_path / "images")
    assert left_out == (sum(counts) == 30)


@pytest.mark.parametrize("made, words", [
    ("rm -r red blue green", "images has 0 classes, but needs two or more; accepted are FOLDER/<c"),
    ("rm -r blue green", "images has 1 classes"),
    ("touch 0.png", "has 1 files beside the folders of "),
    ("mkdir grey; touch grey/a.txt", "images has 1 classes without an image, first grey; "),
    ("mkfifo red/pipe", "pipe is a broken link, or neither file nor folder"),
    ("mkdir red/closed", "PermissionError: "),
    ("ln -s .. blue/up", "blue/up is also in "), ("ln -s ../.. blue/out", "out is also in "),
    ("ln -s ../red blue/other", "red is also in "), ("ln -s red grey", "is also in "),
    ("ln -s red alpha", "is also in "), ("ln -s loop blue/loop", "blue: "),
    ("ln -s gone.png blue/broken.png", "broken.png is a broken link"),
    ("ln -s gone grey", "grey is a broken link")])
def test_folders_that_cannot_be_used(tmp_path, monkeypatch, made, words):
    write_folder(tmp_path / "images")
    subprocess.run(made, shell=True, check=True, cwd=tmp_path / "images")
    scandir = os.scandir

    def refuse(path):  # as a folder without permission does, but for the superuser too
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert words in refused(tmp_path / "images")


def test_names_that_are_no_utf8(tmp_path):
    root = os.fsencode(tmp_path) + b"/p\xe9"
    for name in (b"caf\xe9", b"$x_{$"):
        os.makedirs(root + b"/" + name)
        for i in range(5):
            Image.new("RGB", (8, 8)).save(os.fsdecode(root + b"/" + name + b"/%d.png" % i))
    found = load_data(os.fsdecode(root))
    assert found.class_names == ("$x_{$", "caf\\udce9") and "\n".join(found.describe()).encode()
    open(root + b"/caf\xe9/\xe9.png", "wb").close()
    assert "caf\\udce9/\\udce9.png (" in refused(os.fsdecode(root))
