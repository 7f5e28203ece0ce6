"""Wrong labels, and known losses at the start."""

import numpy as np
import pytest
import torch
from small import SEARCH_SPACE

from data import DataError, make_data
from evolution import Variable, initialize, known_loss
from taylorglo_ext.reference import reference_loss


def numbered(n=2000, **options):
    """Data of n images. Two pixels of each have its number; its label is the last digit."""
    images, number = np.zeros((n, 1, 8, 8), dtype=np.uint8), np.arange(n)
    images[:, 0, 0, 0], images[:, 0, 7, 7] = number % 256, number // 256
    test = images[:50], number[:50] % 10
    return make_data((images, number % 10), test, validation=n // 4, **options)


def right(images):
    """The labels that the images of `numbered` had."""
    return (images[:, 0, 0, 0].long() + 256 * images[:, 0, 7, 7].long()) % 10


@pytest.mark.parametrize("kind, steps", [("uniform", range(1, 10)), ("pair", [1])])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.9995])
def test_a_share_of_the_training_and_validation_labels_becomes_another_class(share, kind, steps):
    found = numbered(label_noise=share, label_noise_kind=kind)
    wrong = [(part.labels - right(part.images)) % 10 for part in (found.train, found.validation)]
    step = torch.cat(wrong)
    assert (step > 0).sum() == round(2000 * share)
    assert (wrong[1] > 0).sum().item() == pytest.approx(500 * share, abs=40)  # 4 deviations: 35
    seen = torch.bincount(step, minlength=10)[1:].tolist()
    expected = [2000 * share / len(steps) * (i in steps) for i in range(1, 10)]
    assert seen == pytest.approx(expected, abs=60)
    assert kind == "uniform" or sum(seen[1:]) == 0
    assert torch.equal(found.test.labels, right(found.test.images))
    clean = found.clean_labels
    assert torch.equal(clean, right(found.train.images)) if share else clean is None


def test_wrong_labels_depend_on_the_seed_alone_and_copies_of_an_image_share_them():
    one, whole, other = (numbered(label_noise=0.4, **options) for options in (
        {}, dict(train_on_all=True, enlarge=3), dict(seed=1)))

    def labelled(*parts):
        return [(tuple(image), label) for part in parts for image, label in zip(
            part.images.flatten(1).tolist(), part.labels.tolist(), strict=True)]

    labels = dict(labelled(one.train, one.validation))
    assert all(labels[i] == label for i, label in labelled(whole.train, whole.validation))
    assert len(whole.validation) == 3 * 500
    assert any(labels[i] != label for i, label in labelled(other.train))


@pytest.mark.parametrize("noise", [
    *(dict(label_noise=share) for share in (1, -0.1, float("nan"))),
    dict(label_noise=0.1, label_noise_kind="tree")])
def test_noise_that_cannot_be_is_one_line(noise):
    with pytest.raises(DataError, match="^--label-noise.*at least 0 and below 1.*uniform or pair"):
        numbered(**noise)


@pytest.mark.parametrize("classes", [2, 10, 100])
def test_the_known_loss_is_the_second_order_expansion_of_cross_entropy(classes):
    theta = torch.tensor(list(known_loss(classes).values()), dtype=torch.float64)
    rng = torch.Generator().manual_seed(classes)
    logits = torch.randn(7, classes, generator=rng, dtype=torch.float64)
    labels = torch.arange(7) % classes
    missing = 1 - logits.softmax(1)[torch.arange(7), labels]
    expected = (missing + missing**2 / 2).mean()
    torch.testing.assert_close(reference_loss(logits, labels, theta), expected)


def test_so_many_individuals_start_from_what_is_known_as_far_as_it_is_evolved():
    known = known_loss(10) | dict(lr_scale=1.0, lr_decay=50.0, momentum=0.9, weight_decay=0.1)
    plain, found = (initialize(SEARCH_SPACE, 5, np.random.default_rng(0), known, n) for n in (0, 2))
    clipped = [0, 1, 0, 0, 0, 10, -10, 0, 1, 10, 0.9]  # lr_decay is
    np.testing.assert_array_equal(found, [clipped, clipped, *plain[2:]])
    narrow = (Variable("theta5", -1, 1, clip=False), Variable("cutout", 0, 8))
    row, drawn = (initialize(narrow, 1, np.random.default_rng(0), known, n)[0] for n in (1, 0))
    assert row[0] == 10 and row[1] == drawn[1]
