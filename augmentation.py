"""Augments and normalises batches on the device (Sec. 4.1). The functions are pure: the random
draws are arguments. The host never waits for the device."""

import re
from dataclasses import dataclass

import numpy as np
import torch

from errors import DataError


@dataclass(frozen=True)
class Augmentation:
    """The random changes to a training image (Sec. 4.1). str() gives the text of --augmentation."""

    flip: bool = False  # left to right, with probability 1/2
    shift: int = 0  # by up to this many pixels in each direction; zeros fill the border
    cutout: int = 0  # side in pixels of the square that is cut out [6]; 0 for none

    def __str__(self):
        words = [name if n is True else f"{name}={n}" for name, n in vars(self).items() if n]
        return " ".join(words) or "none"


def parse_augmentation(text, size):
    """Read "none", a text such as "flip shift=4 cutout=16", or an Augmentation.

    size: the smaller side of the images in pixels. Without a number, shift is an eighth of it and
    cutout a half. Raises DataError."""
    text, usual = str(text).lower(), {"flip": True, "shift": size // 8, "cutout": size // 2}
    if re.fullmatch(r"none|(\b(flip|(shift|cutout)(=\d+)?)\b[\s,]*)+", text):
        found = Augmentation(**{name: int(number) if number else usual[name]
                                for name, number in re.findall(r"([fsc]\w+)=?(\d*)", text)})
        if found.shift < size and found.cutout <= size:
            return found
    raise DataError("--augmentation must be none, or some of flip, shift=PIXELS and cutout=PIXELS, "
                    f"the shift below the images' {size} pixels and the cutout at most as large, "
                    f"not {text!r}")


def draw_augmentation(augmentation: Augmentation, n, height, width, rng: np.random.Generator):
    """Draw how to augment n images: (n, 5) int64 with columns dy, dx, flip, cut_y, cut_x.

    (dy, dx), each 0 to 2 shift, is the corner of the crop in the padded image. (cut_y, cut_x),
    anywhere in the image, is the centre of the square to cut out [6]."""
    offsets = 2 * augmentation.shift + 1
    centres = (height, width) if augmentation.cutout else (1, 1)
    return rng.integers(0, (offsets, offsets, 1 + augmentation.flip, *centres), size=(n, 5))


def make_batch(images, index, draws, augmentation: Augmentation, mean, std, cutout=None):
    """Augment and normalise training images: (B, C, H, W) float32, channels last.

    images: (N, C, H + 2 shift, W + 2 shift) uint8 with a border of zeros, channels last; index:
    (B,) int64 into them; draws: (B, 5) int64 of `draw_augmentation`; mean, std: (C,) float32; all
    on one device. cutout: if augmentation.cutout is not 0, a 0-d int64 tensor on the device that
    replaces it: a captured CUDA graph can then be replayed with another size."""
    dy, dx, flip, cut_y, cut_x = draws.unbind(1)
    crops = crop(images, index, dy, dx, augmentation.shift)
    if augmentation.flip:
        both = torch.cat([crops, crops.flip(2)])  # several times faster than torch.where
        each = torch.arange(len(flip), device=flip.device)
        crops = both.index_select(0, flip * len(flip) + each)
    batch = standardize(crops, mean, std)
    if augmentation.cutout:  # paper: unspecified: the mean, here 0, fills the square
        side = augmentation.cutout if cutout is None else cutout
        batch *= 1 - squares(cut_y, cut_x, side, *crops.shape[1:])
    return batch.view(crops.shape).permute(0, 3, 1, 2)


def normalize(images, mean, std) -> torch.Tensor:
    """(B, C, H, W) uint8, or floats in [0, 1], to float32 of mean 0 and variance 1 (Sec. 4.1),
    channels last. Raises DataError."""
    images = to_uint8(images).permute(0, 2, 3, 1)
    return standardize(images, mean, std).view(images.shape).permute(0, 3, 1, 2)


def to_uint8(images):
    """Images of uint8, or of floats in [0, 1], as uint8. Raises DataError."""
    if images.is_floating_point() and images.numel() and images.min() >= 0 and images.max() <= 1:
        images = (images * 255).round().to(torch.uint8)
    if images.dtype != torch.uint8:
        raise DataError(f"images are {images.dtype}; they must be uint8, or floats in [0, 1], not "
                        "yet normalised")
    return images


def crop(images, index, dy, dx, shift):
    """Crops (B, H, W, C) uint8 of padded images; (dy, dx) are their corners."""
    images = images.contiguous(memory_format=torch.channels_last)  # Data's are: no copy
    n, channels, rows, columns = images.shape
    height, width = rows - 2 * shift, columns - 2 * shift
    # A row of a crop is W*C consecutive bytes. This view has such a run of bytes for each first
    # pixel. To gather rows from it is several times faster than to gather pixels.
    runs = images.as_strided((n * rows * columns - width + 1, width * channels), (channels, 1))
    corner = (index * rows + dy) * columns + dx
    first = corner[:, None] + columns * torch.arange(height, device=images.device)
    return runs.index_select(0, first.flatten()).view(len(index), height, width, channels)


def standardize(images, mean, std):
    """(B, H, W, C) uint8 to (B, H, W*C) float32: an axis of only C elements would be slow."""
    width = images.shape[2]
    return images.flatten(2).float().sub_(mean.repeat(width)).div_(std.repeat(width))


def squares(cut_y, cut_x, side, height, width, channels):
    """(B, H, W*C) float32: 1 in the square around each centre, else 0."""
    y = torch.arange(height, device=cut_y.device) - cut_y[:, None] + side // 2
    x = torch.arange(width * channels, device=cut_x.device) // channels - cut_x[:, None] + side // 2
    inside_y, inside_x = (y >= 0) & (y < side), (x >= 0) & (x < side)
    return inside_y.float()[:, :, None] * inside_x.float()[:, None, :]
