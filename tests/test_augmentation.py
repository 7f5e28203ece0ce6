"""Augmentation, by hand and pixel by pixel, and its texts."""

import numpy as np
import pytest
import torch

from augmentation import Augmentation, draw_augmentation, make_batch, normalize, parse_augmentation
from tests.test_data import error_line

SQUARE = torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 9]], dtype=torch.uint8)


@pytest.mark.parametrize("draw, text, expected", [
    ((1, 1, 0, 0, 0), "shift=1", [[1, 2, 3], [4, 5, 6], [7, 8, 9]]),
    ((0, 1, 0, 0, 0), "shift=1", [[0, 0, 0], [1, 2, 3], [4, 5, 6]]),  # down
    ((2, 0, 0, 0, 0), "shift=1", [[0, 4, 5], [0, 7, 8], [0, 0, 0]]),  # up and to the right
    ((0, 0, 1, 0, 0), "flip", [[3, 2, 1], [6, 5, 4], [9, 8, 7]]),
    ((2, 0, 1, 0, 0), "flip shift=1", [[5, 4, 0], [8, 7, 0], [0, 0, 0]]),  # first crop, then flip
    ((0, 0, 0, 1, 1), "cutout=2", [[0, 0, 3], [0, 0, 6], [7, 8, 9]]),
    ((0, 0, 0, 0, 2), "cutout=2", [[1, 0, 0], [4, 5, 6], [7, 8, 9]]),  # clipped at the border
    ((0, 0, 0, 1, 0), "cutout=3", [[0, 0, 3], [0, 0, 6], [0, 0, 9]]),
    ((0, 0, 0, 2, 1), "cutout=1", [[1, 2, 3], [4, 5, 6], [7, 0, 9]]),
    ((0, 0, 1, 0, 0), "flip cutout=1", [[0, 2, 1], [6, 5, 4], [9, 8, 7]]),  # first flip, then cut
])
def test_augmentation_by_hand(draw, text, expected):
    augmentation = parse_augmentation(text, 3)
    images = torch.nn.functional.pad(SQUARE, (augmentation.shift,) * 4)[None, None]
    arguments = images, torch.tensor([0]), torch.tensor([draw]), augmentation
    batch = make_batch(*arguments, torch.zeros(1), torch.ones(1))
    assert batch.dtype == torch.float32 and batch[0, 0].tolist() == expected
    mean, std = torch.tensor([5.0]), torch.tensor([2.0])
    pixels = torch.tensor(expected)
    cut = (pixels == 0) & (augmentation.cutout > 0)  # it becomes the mean
    expected = ((pixels - 5) / 2).masked_fill(cut, 0)
    assert torch.equal(make_batch(*arguments, mean, std)[0, 0], expected)


def test_what_would_blank_a_whole_image_is_refused():
    assert parse_augmentation("cutout=8", 8).cutout == 8
    words = "the shift below the images' 8 pixels and the cutout at most as large, not"
    for text in ("flip shift=4 cutout=16", "shift=8"):
        assert words in error_line(parse_augmentation, text, 8)


def test_floats_are_normalised_as_the_pixels_that_they_are_and_stay_as_they_were():
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    floats, mean, std = images / 255, torch.tensor([100.0]), torch.tensor([50.0])
    before = floats.clone()
    assert torch.equal(normalize(floats, mean, std), normalize(images, mean, std))
    assert torch.equal(floats, before)
    assert "images are torch.float32" in error_line(normalize, floats * 255, mean, std)


def slow_batch(images, index, draws, augmentation, mean, std):
    """The same as make_batch, in NumPy and pixel by pixel."""
    height, width = (size - 2 * augmentation.shift for size in images.shape[2:])
    batch = np.zeros((len(index), images.shape[1], height, width), dtype=np.float32)
    for b, (i, (dy, dx, flip, cut_y, cut_x)) in enumerate(zip(index, draws, strict=True)):
        side, top = augmentation.cutout, cut_y - augmentation.cutout // 2
        left = cut_x - side // 2
        for y, x in np.ndindex(height, width):
            if not (top <= y < top + side and left <= x < left + side):
                source = width - 1 - x if flip else x
                batch[b, :, y, x] = (images[i, :, dy + y, dx + source] - mean) / std
    return batch


@pytest.mark.parametrize("augmentation", [
    Augmentation(), Augmentation(shift=2), Augmentation(flip=True, shift=1, cutout=3),
    Augmentation(flip=True, cutout=4), Augmentation(shift=3, cutout=20),
])
@pytest.mark.parametrize("channels, height, width", [(1, 8, 8), (3, 7, 5), (2, 4, 9)])
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_batch_equals_pixel_by_pixel(augmentation, channels, height, width, memory):
    rng = np.random.default_rng(1)
    shape = (6, channels, height + 2 * augmentation.shift, width + 2 * augmentation.shift)
    images = torch.from_numpy(rng.integers(0, 256, shape, dtype=np.uint8))
    images = images.contiguous(memory_format=memory)
    index = torch.from_numpy(rng.integers(0, 6, 17))
    draws = torch.from_numpy(draw_augmentation(augmentation, 17, height, width, rng))
    mean, std = torch.rand(channels) * 255, torch.rand(channels) * 80 + 1
    batch = make_batch(images, index, draws, augmentation, mean, std)
    assert batch.is_contiguous(memory_format=torch.channels_last)
    arrays = (t.numpy() for t in (images, index, draws))
    expected = torch.from_numpy(slow_batch(*arrays, augmentation, mean.numpy(), std.numpy()))
    torch.testing.assert_close(batch, expected)
    batch, before = normalize(images, mean, std), images.clone()
    torch.testing.assert_close(batch, (before - mean.view(-1, 1, 1)) / std.view(-1, 1, 1))
    assert torch.equal(images, before) and batch.is_contiguous(memory_format=torch.channels_last)
    last = make_batch(images[4:], index % 2, draws, augmentation, mean, std)  # of a larger tensor
    assert torch.equal(last, make_batch(images, 4 + index % 2, draws, augmentation, mean, std))


def test_batches_never_ask_the_device():
    # Tensors on "meta" have no values: code that reads them on the host, or mixes devices, raises.
    augmentation = Augmentation(flip=True, shift=2, cutout=4)
    with torch.device("meta"):
        images, mean = torch.empty(9, 3, 12, 12, dtype=torch.uint8), torch.empty(3)
        index, draws = torch.empty(5, dtype=torch.int64), torch.empty(5, 5, dtype=torch.int64)
    assert make_batch(images, index, draws, augmentation, mean, mean).shape == (5, 3, 8, 8)
    assert normalize(images, mean, mean).shape == (9, 3, 12, 12)


def test_draws_cover_their_ranges():
    rng = np.random.default_rng(0)
    draws = draw_augmentation(Augmentation(flip=True, shift=2, cutout=3), 4000, 7, 5, rng)
    assert draws.shape == (4000, 5) and draws.dtype == np.int64
    for column, size in zip(draws.T, (5, 5, 2, 7, 5), strict=True):
        share = np.bincount(column, minlength=size) / 4000
        assert share == pytest.approx([1 / size] * size, abs=0.03)  # more than 4 standard errors
    assert not draw_augmentation(Augmentation(), 100, 7, 5, rng).any()


@pytest.mark.parametrize("text, expected", [
    ("none", Augmentation()), ("flip", Augmentation(flip=True)),
    ("cutout", Augmentation(cutout=16)),
    ("Shift, flip", Augmentation(True, 4)), ("flip shift cutout", Augmentation(True, 4, 16)),
    ("cutout=32 shift=0", Augmentation(cutout=32)), ("shift=31", Augmentation(shift=31)),
    ("cutout=33", None), ("", None), ("flop", None), ("none flip", None), ("flip rotate", None),
    ("flip=1", None),
    ("shift=32", None), ("shift=-1", None), ("shift=1.5", None), ("shift=", None),
    ("flipshift", None), (Augmentation(flip=0.5), None), (Augmentation(shift=-1), None),
    (Augmentation(True, 3, np.int64(5)), Augmentation(True, 3, 5)),
])
def test_an_augmentation_as_text(text, expected):
    if expected is None:
        assert f"not '{str(text).lower()}'" in error_line(parse_augmentation, text, 32)
    else:
        assert parse_augmentation(text, 32) == expected
        assert parse_augmentation(str(expected), 32) == expected
