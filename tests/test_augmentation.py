"""Augmentation, by hand and again pixel by pixel."""

import numpy as np
import pytest
import torch

from data import (
    Augmentation,
    data_set,
    draw_augmentation,
    make_batch,
    make_data,
    normalize,
    parse_augmentation,
)
from tests.test_data import error_line, numbered

SQUARE = torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 9]], dtype=torch.uint8)


@pytest.mark.parametrize("draw, augmentation, expected", [
    ((1, 1, 0, 0, 0), Augmentation(shift=1), [[1, 2, 3], [4, 5, 6], [7, 8, 9]]),
    ((0, 1, 0, 0, 0), Augmentation(shift=1), [[0, 0, 0], [1, 2, 3], [4, 5, 6]]),  # down
    ((2, 0, 0, 0, 0), Augmentation(shift=1), [[0, 4, 5], [0, 7, 8], [0, 0, 0]]),  # up and to the right
    ((0, 0, 1, 0, 0), Augmentation(flip=True), [[3, 2, 1], [6, 5, 4], [9, 8, 7]]),
    ((2, 0, 1, 0, 0), Augmentation(flip=True, shift=1), [[5, 4, 0], [8, 7, 0], [0, 0, 0]]),  # first crop, then flip
    ((0, 0, 0, 1, 1), Augmentation(cutout=2), [[0, 0, 3], [0, 0, 6], [7, 8, 9]]),
    ((0, 0, 0, 0, 2), Augmentation(cutout=2), [[1, 0, 0], [4, 5, 6], [7, 8, 9]]),  # clipped at the border
    ((0, 0, 0, 1, 0), Augmentation(cutout=3), [[0, 0, 3], [0, 0, 6], [0, 0, 9]]),
    ((0, 0, 0, 2, 1), Augmentation(cutout=1), [[1, 2, 3], [4, 5, 6], [7, 0, 9]]),
    ((0, 0, 1, 0, 0), Augmentation(flip=True, cutout=1), [[0, 2, 1], [6, 5, 4], [9, 8, 7]]),  # first flip, then cut
])
def test_augmentation_by_hand(draw, augmentation, expected):
    images = torch.nn.functional.pad(SQUARE, (augmentation.shift,) * 4)[None, None]
    batch = make_batch(images, torch.tensor([0]), torch.tensor([draw]), augmentation, torch.zeros(1), torch.ones(1))
    assert batch.dtype == torch.float32 and batch[0, 0].tolist() == expected


def test_what_is_cut_out_becomes_the_mean():
    draws = torch.tensor([[0, 0, 0, 1, 1]])
    batch = make_batch(SQUARE[None, None], torch.tensor([0]), draws, Augmentation(cutout=2), torch.tensor([5.0]),
                       torch.tensor([2.0]))
    assert batch[0, 0].tolist() == [[0, 0, -1], [0, 0, 0.5], [1, 1.5, 2]]


def slow_batch(images, index, draws, augmentation, mean, std):
    """make_batch again, in NumPy and pixel by pixel."""
    n, channels, padded_height, padded_width = images.shape
    height, width = padded_height - 2 * augmentation.shift, padded_width - 2 * augmentation.shift
    batch = np.zeros((len(index), channels, height, width), dtype=np.float32)
    for b, (i, (dy, dx, flip, cut_y, cut_x)) in enumerate(zip(index, draws, strict=True)):
        for y in range(height):
            for x in range(width):
                top, left = cut_y - augmentation.cutout // 2, cut_x - augmentation.cutout // 2
                if top <= y < top + augmentation.cutout and left <= x < left + augmentation.cutout:
                    continue
                source = width - 1 - x if flip else x
                batch[b, :, y, x] = (images[i, :, dy + y, dx + source] - mean) / std
    return batch


@pytest.mark.parametrize("augmentation", [
    Augmentation(), Augmentation(shift=2), Augmentation(flip=True, shift=1, cutout=3),
    Augmentation(flip=True, cutout=4), Augmentation(shift=3, cutout=20),
])
@pytest.mark.parametrize("channels, height, width", [(1, 8, 8), (3, 7, 5), (2, 4, 9)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_batch_equals_pixel_by_pixel(augmentation, channels, height, width, memory_format):
    rng = np.random.default_rng(1)
    shape = (6, channels, height + 2 * augmentation.shift, width + 2 * augmentation.shift)
    images = torch.from_numpy(rng.integers(0, 256, shape, dtype=np.uint8)).contiguous(memory_format=memory_format)
    index = torch.from_numpy(rng.integers(0, 6, 17))
    draws = torch.from_numpy(draw_augmentation(augmentation, 17, height, width, rng))
    mean, std = torch.rand(channels) * 255, torch.rand(channels) * 80 + 1
    batch = make_batch(images, index, draws, augmentation, mean, std)
    assert batch.is_contiguous(memory_format=torch.channels_last)
    expected = slow_batch(images.numpy(), index.numpy(), draws.numpy(), augmentation, mean.numpy(), std.numpy())
    torch.testing.assert_close(batch, torch.from_numpy(expected))


def test_batch_of_a_slice_of_a_larger_tensor():
    images = torch.from_numpy(numbered(20)[0]).contiguous(memory_format=torch.channels_last)
    arguments = torch.zeros(4, 5, dtype=torch.int64), Augmentation(), torch.zeros(3), torch.ones(3)
    batch = make_batch(images[10:], torch.arange(4), *arguments)
    assert torch.equal(batch, make_batch(images, torch.arange(10, 14), *arguments))
    assert torch.equal(batch, images[10:14].float())


def test_batches_never_ask_the_device():
    # A tensor on "meta" has no values: whatever needs them on the host, or mixes devices, raises.
    augmentation = Augmentation(flip=True, shift=2, cutout=4)
    images, mean = torch.empty(9, 3, 12, 12, dtype=torch.uint8, device="meta"), torch.empty(3, device="meta")
    index, draws = (torch.empty(shape, dtype=torch.int64, device="meta") for shape in ((5,), (5, 5)))
    assert make_batch(images, index, draws, augmentation, mean, mean).shape == (5, 3, 8, 8)
    assert normalize(images, mean, mean).shape == (9, 3, 12, 12)


def test_draws_cover_their_ranges():
    draws = draw_augmentation(Augmentation(flip=True, shift=2, cutout=3), 4000, 7, 5, np.random.default_rng(0))
    assert draws.shape == (4000, 5) and draws.dtype == np.int64
    for column, size in zip(draws.T, (5, 5, 2, 7, 5), strict=True):
        share = np.bincount(column, minlength=size) / 4000
        assert share == pytest.approx([1 / size] * size, abs=0.03)  # more than 4 standard errors
    assert not draw_augmentation(Augmentation(), 100, 7, 5, np.random.default_rng(0)).any()


@pytest.mark.parametrize("channels", [1, 3])
def test_normalize(channels):
    images = torch.from_numpy(numbered(5, channels, 6, 7)[0])
    mean, std = torch.rand(channels) * 255, torch.rand(channels) * 80 + 1
    before = images.clone()
    batch = normalize(images, mean, std)
    torch.testing.assert_close(batch, (images - mean.view(-1, 1, 1)) / std.view(-1, 1, 1))
    assert batch.dtype == torch.float32 and batch.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(images, before)


@pytest.mark.parametrize("text, expected", [
    ("none", Augmentation()), ("flip", Augmentation(flip=True)), ("Shift, flip", Augmentation(True, 4)),
    ("flip shift cutout", Augmentation(True, 4, 16)), ("cutout", Augmentation(cutout=16)),
])
def test_an_augmentation_as_text(text, expected):
    assert parse_augmentation(text, 32) == data_set("cifar10", 64, text).augmentation == expected


@pytest.mark.parametrize("text", ["", "flop", "none flip", "flip rotate"])
def test_a_text_that_is_no_augmentation(text):
    assert f"must be none, or some of flip, shift and cutout, not {text!r}" in error_line(parse_augmentation, text, 32)


@pytest.mark.parametrize("augmentation", [dict(flip=0.5), dict(shift=-1), dict(shift=1.5), dict(cutout=-3)])
def test_augmentations_that_cannot_be(augmentation):
    assert "flip must be True or False, shift and cutout whole numbers" in error_line(Augmentation, **augmentation)
    for value in (augmentation, Augmentation(shift=8)):
        assert "a data.Augmentation whose shift is below the height and width of images" in error_line(
            make_data, numbered(20), numbered(20), augmentation=value)
