"""A folder of images as a data set: FOLDER/<class>/<image>, or FOLDER/train and FOLDER/test of that
kind. All that is there is read, told as left out, or refused with its number and its first path."""

import os
import re
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from errors import DataError, message, plain

ACCEPTED = ("accepted are FOLDER/<class>/<image>, or a FOLDER/train and a FOLDER/test of that kind and "
            "no other; validation images are taken from the training images")
TEXTS = {f".{kind}" for kind in "csv db html ini json log md py tsv txt xml yaml yml".split()}
SPLITS = {"train": r"\btrain|train(ing)?\b", "test": r"\btest|test(ing)?\b", "other":
          r"\b(val(id\w*)?(set|data|images?)?|eval\w*|dev(set)?|hold ?out\w*|un-?labell?ed|unsup\w*"
          r"|pred(ict\w*)?|infer\w*|samples?|extra|query|gallery|probe|folds?|splits?)\b"}


def read_folder(folder, size):
    """(images, labels) to train on, the same for the test or None, the names of the classes, and
    lines that say what was done and left out. Images become size x size. Raises DataError."""
    intake = Intake(folder)
    train, test = intake.layout(folder)
    splits = [] if test is None else [plain(f"{train} is trained on, {test} is the test")]
    *train, names = read_image_folder(train, size, intake)
    if test is not None:
        *test, test_names = read_image_folder(test, size, intake)
        refuse_other_classes(names, test_names, f"{folder}: train and test must have the same classes")
    notes = [f"{len(paths)} {what}, first {plain(min(paths))}" for what, paths in intake.notes.items()]
    return train, test, names, [f"images are resized to {size}x{size} pixels in RGB", *splits, *notes]


def refuse_other_classes(train, test, demand):
    """Raise DataError where the names of the classes differ; it begins with what is demanded."""
    if list(train) != list(test):
        apart = sorted(set(map(str, train)) ^ set(map(str, test)))
        raise DataError(f"{demand}; only one of them has {', '.join(apart) or 'their order'}")


def read_image_folder(folder, size, intake=None):
    """Images (N, 3, size, size) uint8, labels (N,) int64 and the names of the classes."""
    intake = intake or Intake(folder)
    entries = list(intake.entries(folder))
    found = {e.name: list(intake.files(e, e.path)) for e in entries if e.is_dir()}
    if beside := [e.path for e in entries if not e.is_dir()]:
        raise DataError(f"{len(beside)} files lie beside the folders of the classes, first "
                        f"{beside[0]}; {ACCEPTED}")
    if empty := [name for name, paths in found.items() if not paths]:
        raise DataError(f"{len(empty)} of {len(found)} classes in {folder} have no image of their "
                        f"own, first {empty[0]}; {ACCEPTED}")
    if len(found) < 2:
        raise DataError(f"{folder} has {len(found)} classes, where two are the least; {ACCEPTED}")
    labels = np.repeat(np.arange(len(found)), [len(paths) for paths in found.values()])
    return intake.decode(sum(found.values(), []), size), labels, tuple(map(plain, found))


def split_of(name):
    """"train", "test" or "other" for a name like a split's, whatever its affixes and case; or None."""
    words = " ".join(re.findall("[a-z]+", re.sub("(?<=[a-z])(?=[A-Z])", " ", name).lower()))
    kinds = [kind for kind, pattern in SPLITS.items() if re.search(pattern, words)]
    return kinds[0] if len(kinds) == 1 else "other" if kinds else None


class Intake:
    """What is found in one folder. Each real file counts once, however many links lead to it."""

    def __init__(self, root):
        self.root = Path(os.path.realpath(root))
        self.owners = {}  # real paths, and the folders of the classes that have them
        self.notes = defaultdict(set)  # what was done, and with which paths

    def entries(self, folder):
        """The entries of a folder in the order of their names, without hidden ones and texts."""
        try:
            found = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            raise DataError(f"cannot read the folder {folder} ({error.strerror})") from error
        for entry in found:
            if entry.name.startswith("."):  # .ipynb_checkpoints has copies, and ._1.png is no image
                self.notes["hidden files left out"].add(entry.path)
            elif not entry.is_dir() and not entry.is_file():
                raise DataError(f"{entry.path} is neither a file nor a folder, or a link to nothing")
            elif entry.is_file() and Path(entry.name).suffix.lower() in TEXTS:
                self.notes["files of text left out"].add(entry.path)
            else:
                yield entry

    def layout(self, folder):
        """The folders to train on and for the test; the second is None where there are no splits."""
        kinds = {e.name: split_of(e.name) for e in self.entries(folder) if e.is_dir()}
        inner = {name: list(self.entries(os.path.join(folder, name))) for name in kinds}
        nested = {name: [e.name for e in found] for name, found in inner.items()
                  if found and all(e.is_dir() for e in found)}
        splits = [name for name, kind in kinds.items() if kind]
        if len(splits) > 1 or set(splits) & set(nested):
            if Counter(kinds.values()) != {"train": 1, "test": 1}:
                raise DataError(f"{folder} has the subfolders {', '.join(kinds)}: {', '.join(splits)} "
                                f"look like parts of a data set, not like classes; {ACCEPTED}")
            return [os.path.join(folder, name) for name in sorted(kinds, key=kinds.get, reverse=True)]
        shared = [name for name, n in Counter(sum(nested.values(), [])).items() if n > 1]
        if shared:
            raise DataError(f"{len(nested)} subfolders of {folder} have no image but subfolders, some "
                            f"the same, as {shared[0]}: which are the classes? {ACCEPTED}")
        return folder, None

    def files(self, entry, owner):
        """The paths of the files at and below an entry of a class's folder."""
        real = Path(os.path.realpath(entry.path))
        if self.owners.get(real, owner) != owner:
            raise DataError(f"{entry.path} is also in {self.owners[real]}: an image must be in one class "
                            "alone, and not in both train and test")
        if real in self.owners or entry.is_symlink() and self.covers(real):
            self.notes["links left out, as what they lead to is read where it lies"].add(entry.path)
        elif self.owners.setdefault(real, owner) and entry.is_dir():
            for inner in self.entries(entry.path):
                yield from self.files(inner, owner)
        else:
            yield entry.path

    def covers(self, real):
        """Whether a real path is visible below the root, or above it."""
        if real.is_relative_to(self.root):
            return not any(part.startswith(".") for part in real.relative_to(self.root).parts)
        return self.root.is_relative_to(real)

    def decode(self, paths, size):
        def decode(path):
            try:
                with Image.open(path) as image:
                    image, done = prepared(image)
                return image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR), done
            except Exception as error:  # Pillow's decoders raise errors of many kinds
                return None, message(error)

        images, refused = np.empty((len(paths), size, size, 3), dtype=np.uint8), []
        with ThreadPoolExecutor() as pool:
            results = progress(pool.map(decode, paths), len(paths), "images")
            for i, (image, done) in enumerate(results):
                if image is None:
                    refused.append(f"{paths[i]} ({done})")
                else:
                    images[i] = image
                    for what in done:
                        self.notes[what].add(paths[i])
        if refused:
            raise DataError(f"cannot read {len(refused)} of {len(paths)} images, first {refused[0]}; "
                            "accepted is what Pillow reads, of 8 bits a channel")
        return images.transpose(0, 3, 1, 2)


def prepared(image):
    """A PIL image as people see it, in grey (mode L) or RGB, and a list of what was done for that.
    Raises DataError for more than 8 bits a channel, of which Pillow would keep one byte."""
    stored = str(getattr(image, "tile", ""))  # such as "... args=('RGB;16B', ...": how it is stored
    highest = re.search(r"'ppm.*', (\d+)\)", stored)  # of a netpbm file
    if image.mode[0] in "IF" or re.search(";16[BLN]|SGI16", stored) or highest and int(highest[1]) > 255:
        raise DataError(f"it has more than 8 bits a channel, as Pillow's mode {image.mode}")
    done = ["images have several frames, of which the first is read"] * (getattr(image, "n_frames", 1) > 1)
    if image.getexif().get(0x0112, 1) in range(2, 9):
        image, done = ImageOps.exif_transpose(image), [*done, "images turned upright by their EXIF data"]
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if image.getextrema()[3][0] < 255:
            done.append("images with transparency laid on white")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "L" else image.convert("RGB"), done


def progress(items, total, title):
    return tqdm(items, title, total, unit=" images", leave=False, disable=None)  # on a terminal only
