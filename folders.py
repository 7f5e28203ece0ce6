"""A folder of images as a data set: FOLDER/<class>/<image>, or FOLDER/train and FOLDER/test with
such folders of classes. Each file is read, refused, or reported as left out."""

import os
import re
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from tqdm.auto import tqdm

from errors import DataError, message, told

ACCEPTED = ("accepted are FOLDER/<class>/<image>, or FOLDER/train/<class>/<image> with "
            "FOLDER/test/<class>/<image>; validation images are taken from the training images")
TEXTS = {f".{kind}" for kind in "csv db html ini json log md py tsv txt xml yaml yml".split()}
SPLITS = {"train": r"\btrain|train(ing)?\b", "test": r"\btest|test(ing)?\b", "other":
          r"\b(val(id\w*)?(set|data|images?)?|eval\w*|dev(set)?|hold ?out\w*|un-?labell?ed|unsup\w*"
          r"|pred(ict\w*)?|infer\w*|samples?|extra|query|gallery|probe|folds?|splits?)\b"}
DEEP = r";16[BLN]|SGI16|'ppm.*, (25[6-9]|2[6-9]\d|[3-9]\d\d|\d{4,})\)"  # as Pillow describes it


def read_folder(folder, size):
    """Read the images of a folder and resize them to size x size. Raises DataError.

    Returns (images, labels) for training, the same for the test or None, the names of the classes,
    and lines that say what was done and left out."""
    intake, tested = Intake(folder), None
    train, test = intake.layout(folder)
    lines = [f"images are resized to {size}x{size} pixels in RGB"]
    *pair, names = read_image_folder(train, size, intake)
    if test:
        lines.append(f"{train} is trained on, {test} is the test")
        *tested, test_names = read_image_folder(test, size, intake)
        refuse_other_classes(names, test_names, f"{train} and {test} must have the same classes")
    notes = sorted(intake.notes.items())
    lines += [f"{len(paths)} {what}, first {min(paths)}" for what, paths in notes]
    return pair, tested, names, lines


def refuse_other_classes(train, test, demand):
    """Raise DataError, which begins with `demand`, if the names of the classes differ."""
    if list(train) != list(test):
        apart = sorted(set(map(str, train)) ^ set(map(str, test)))
        raise DataError(f"{demand}; only one of them has {', '.join(apart) or 'their order'}")


def read_image_folder(folder, size, intake=None):
    """Returns images (N, 3, size, size) uint8, labels (N,) int64 and the names of the classes."""
    intake = intake or Intake(folder)
    entries = list(intake.entries(folder))
    beside = [e.name for e in entries if not e.is_dir()]
    found = {e.name: list(intake.files(e.path, e.path)) for e in entries if e.is_dir()}
    empty = [name for name, paths in found.items() if not paths]
    for names, what in ((beside, "files beside the folders of the classes"),
                        (empty, "classes without an image")):
        if names:
            raise DataError(f"{folder} has {len(names)} {what}, first {names[0]}; {ACCEPTED}")
    if len(found) < 2:
        raise DataError(f"{folder} has {len(found)} classes, but needs two or more; {ACCEPTED}")
    labels = np.repeat(np.arange(len(found)), [len(paths) for paths in found.values()])
    return intake.decode(sum(found.values(), []), size), labels, tuple(found)


def split_of(name):
    """The key of SPLITS that a folder's name suggests, or None. Case and affixes do not matter."""
    words = " ".join(re.findall("[a-z]+", re.sub("(?<=[a-z])(?=[A-Z])", " ", name).lower()))
    kinds = [kind for kind, pattern in SPLITS.items() if re.search(pattern, words)]
    return kinds[0] if len(kinds) == 1 else "other" if kinds else None


class Intake:
    """The files of one folder. A file counts once, however many links lead to it."""

    def __init__(self, root):
        real = Path(os.path.realpath(root))
        # {real path: folder of its class}. No class may contain the root or a folder above it.
        self.owners = dict.fromkeys(map(str, (real, *real.parents)), root)
        self.notes = defaultdict(set)  # {what was done: paths}

    def entries(self, folder):
        """The entries of a folder by name, without hidden files and texts."""
        with told(f"cannot read the folder {folder}"):
            for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
                text = entry.is_file() and Path(entry.name).suffix.lower() in TEXTS
                # Such as .ipynb_checkpoints, and of macOS ._1.png and __MACOSX.
                if text or entry.name.startswith((".", "__MACOSX")):
                    self.notes["hidden files and texts left out"].add(entry.path)
                elif entry.is_dir() or entry.is_file():
                    yield entry
                else:
                    raise DataError(f"{entry.name} is a broken link, or neither file nor folder")

    def layout(self, folder):
        """The folders of the training images and of the test, which is None without splits."""
        entries, kinds, nested = list(self.entries(folder)), {}, {}
        for e in filter(os.DirEntry.is_dir, entries):
            kinds[e.name], inner = split_of(e.name), list(self.entries(e.path))
            if inner and all(i.is_dir() for i in inner):
                nested[e.name] = [i.name for i in inner]
        splits, within = [name for name in kinds if kinds[name]], sum(nested.values(), [])
        are_splits = len(splits) > 1 or any(name in nested for name in splits)
        if are_splits and sorted(map(str, kinds.values())) == ["test", "train"]:
            if beside := {e.path for e in entries if not e.is_dir()}:
                self.notes["files beside the folders left out"] = beside
            test, train = (os.path.join(folder, name) for name in sorted(kinds, key=kinds.get))
            return train, test
        if are_splits or len(set(within)) < len(within):  # two subfolders have one name
            raise DataError(f"{folder} has the subfolders {', '.join(splits or nested)}, which "
                            "look like parts of a data set, not like classes; move away what is "
                            f"neither train nor test, or rename what is a class; {ACCEPTED}")
        return folder, None

    def files(self, path, owner):
        """The files at and below a path. owner: the folder of their class."""
        real = os.path.realpath(path)
        if real not in self.owners:
            self.owners[real] = owner
            if os.path.isdir(path):
                for entry in self.entries(path):
                    yield from self.files(entry.path, owner)
            else:
                yield path
        elif self.owners[real] == owner:
            self.notes["links left out, as what they lead to is read already"].add(path)
        else:
            raise DataError(f"{path} is also in {self.owners[real]}: an image must not be in two "
                            "classes, or in both train and test")

    def decode(self, paths, size):
        """Read the images at the paths: (N, 3, size, size) uint8."""
        images, refused = np.empty((len(paths), size, size, 3), dtype=np.uint8), []

        def decode(i):
            try:
                with Image.open(paths[i]) as image:
                    image, done = prepared(image)
                images[i] = image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
                for what in done:
                    self.notes[what].add(paths[i])
            except Exception as error:  # Pillow's decoders raise errors of many kinds
                refused.append(f"{paths[i]} ({message(error)})")

        with ThreadPoolExecutor() as pool:
            list(progress(pool.map(decode, range(len(paths))), len(paths), "images"))
        if refused:
            raise DataError(f"cannot read {len(refused)} of {len(paths)} images, first "
                            f"{min(refused)}; accepted is what Pillow reads, of 8 bits a channel")
        return images.transpose(0, 3, 1, 2)


def prepared(image):
    """Turn a PIL image into grey (mode L) or RGB as people see it. Returns it, and a list of what
    was done. Raises DataError where Pillow says that a channel has more than 8 bits, and keeps 8;
    of JPEG 2000 and AVIF it does not say."""
    if image.mode[0] in "IF" or re.search(DEEP, str(getattr(image, "tile", ""))):
        raise DataError(f"it has more than 8 bits a channel (Pillow's mode {image.mode})")
    done = []
    if getattr(image, "n_frames", 1) > 1:
        done.append("images have several frames; only the first is read")
    if image.getexif().get(0x0112, 1) in range(2, 9):
        image = ImageOps.exif_transpose(image)
        done.append("images turned upright by their EXIF data")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if image.getextrema()[3][0] < 255:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            done.append("images with transparency laid on white")
    return image if image.mode == "L" else image.convert("RGB"), done


def progress(items, total, title):
    return tqdm(items, title, total, leave=False, disable=None)  # on a terminal only
